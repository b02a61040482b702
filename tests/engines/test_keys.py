"""Keys: where they come from, who is asked, and that none of them is ever shown or kept."""

from __future__ import annotations

import contextlib
import getpass
import logging
import os
import pickle
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import cm_notebook as cm
from cm_notebook import keys
from cm_notebook.jupyter import view
from cm_notebook.render import html, text
from cm_notebook.tools import tool

from .model_server import ModelServer, Said, anthropic_says, error, openai_says

PLANTED = "sk-planted-0123456789abcdef"


@pytest.fixture(autouse=True)
def _no_keys() -> Iterator[None]:
    yield
    keys._typed.clear()
    keys._known.clear()


def typed(monkeypatch: pytest.MonkeyPatch, said: Any = PLANTED) -> None:
    """Somebody types it when asked."""

    def ask(prompt: str = "") -> str:
        if isinstance(said, BaseException):
            raise said
        return str(said)

    monkeypatch.setattr(getpass, "getpass", ask)


# -- where one comes from ---------------------------------------------------------------------------------------------


def test_the_environment_comes_first_and_then_what_was_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cm.keys.sources()["anthropic"] == ""
    typed(monkeypatch)
    cm.keys.set("anthropic")
    assert (keys.find("anthropic").reveal(), keys.source("anthropic")) == (PLANTED, "typed, for this session")
    assert PLANTED not in os.environ.values()
    monkeypatch.setenv("ANTHROPIC_API_KEY", "sk-of-the-environment")
    assert (keys.find("anthropic").reveal(), keys.source("anthropic")) == ("sk-of-the-environment", "ANTHROPIC_API_KEY")
    with pytest.raises(cm.WorkflowError, match="ANTHROPIC_API_KEY is set, and comes first"):
        cm.keys.set("anthropic")
    monkeypatch.delenv("ANTHROPIC_API_KEY")
    cm.keys.forget("anthropic")
    assert not keys.find("anthropic")
    with pytest.raises(cm.WorkflowError, match="no key of anthropic was typed here: there is none"):
        cm.keys.forget("anthropic")


@pytest.mark.parametrize(
    ("engine", "said", "words"),
    [
        ("anthropik", "x", "there is no engine of that name. Did you mean 'anthropic'?"),
        (PLANTED, "x", "there is no engine of that name. Engines: anthropic,"),
        ("offline", "x", "offline calls no service, so it needs no key."),
        ("openai", " ", "nothing was typed, and nothing was changed."),
        ("openai", "sk-ä", "what was typed is no key"),
        ("openai", EOFError(), "nobody can type a key here. Set OPENAI_API_KEY in the environment"),
        ("openai", NotImplementedError("no stdin"), "nobody can type a key here."),
        ("openai", getpass.GetPassWarning("it would be shown"), "nobody can type a key here."),
    ],
)
def test_what_is_no_key_is_refused(engine: str, said: Any, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    typed(monkeypatch, said)
    with pytest.raises(cm.WorkflowError) as refused:
        cm.keys.set(engine)
    assert words in str(refused.value)
    assert PLANTED not in str(refused.value)
    assert not any(cm.keys.sources().values())


def test_no_key_says_both_ways_to_one() -> None:
    run = cm.Workflow("w", agents=[cm.Agent("a", "Do it.", engine="anthropic:m")], steps="a").start(journal=":memory:")
    opened = _gate(run)
    assert opened.payload["error"] == (
        "No key for anthropic. Set ANTHROPIC_API_KEY before starting Jupyter, or run `%cm keys set anthropic` "
        "(typed hidden, kept for this session only)."
    )
    run.stop()


def test_a_child_process_does_not_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    typed(monkeypatch)
    cm.keys.set("openai")
    keys.find("openai")
    program = "import os; print(os.environ)"
    assert PLANTED not in subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout


def test_a_key_does_not_show_itself() -> None:
    key = keys.Key(PLANTED)
    assert PLANTED not in f"{key} {key!r} {[key]}"
    with pytest.raises(TypeError):
        pickle.dumps(key)


# -- hiding -----------------------------------------------------------------------------------------------------------


@given(st.lists(st.sampled_from(["a", "s", "sk-", PLANTED, PLANTED[:9], PLANTED[9:], PLANTED[:-1], " "]), max_size=12))
def test_however_a_text_is_cut_the_key_is_not_in_it(pieces: list[str]) -> None:
    keys._known["k"] = keys.Key(PLANTED)
    hide = keys.Hider()
    shown = [hide(piece) for piece in pieces] + [hide("", last=True)]
    assert "".join(shown) == "".join(pieces).replace(PLANTED, "[key]")


def test_with_no_key_a_text_is_as_it_is() -> None:
    hide = keys.Hider()
    assert hide("sk-") == "sk-"


# -- planted ----------------------------------------------------------------------------------------------------------


def _gate(run: cm.Run) -> cm.Gate:
    from tests.helpers import gate

    return gate(run)


def _shown(run: cm.Run) -> dict[str, str]:
    """All that people see of a run, and all that is kept of it."""
    with contextlib.suppress(cm.CodeMachineError):
        run.stop()
    with contextlib.suppress(cm.CodeMachineError):
        run.wait()
    with run.reading() as state:
        steps = list(state.steps.values())
        found = {
            "text": text.run_text(state) + text.status_table(state),
            "html": html.run_html(state),
            "steps": "".join(text.show_text(state, step, full=True) + html.show_html(state, step) for step in steps),
            "lines": "\n".join(filter(None, (text.event_line(state, event) for event in run.events))),
            "records": repr([view.head_record(state), view.card_records(state), view.gate_records(state)]),
            "bodies": repr([view.body_record(state, "a", 1, tab) for tab in ("output", "diff", "prompt")]),
            "state": repr(state),
        }
    found["events"] = repr(run.events)
    found["journal"] = "".join(
        file.read_bytes().decode("latin-1") for file in Path(".cm_notebook").rglob("*") if file.is_file()
    )
    found["workflow"] = repr(run.workflow.to_dict())
    found["doctor"] = cm.doctor().text + cm.doctor().html
    error = run.error
    if error is not None:
        found["traceback"] = "".join(traceback.TracebackException.from_exception(error, capture_locals=True).format())
        found["error"] = repr(error) + repr(vars(error))
    return found


def _echoes(dialect: str) -> dict[str, Said]:
    says: Callable[..., Said] = openai_says if dialect == "openai" else anthropic_says
    told = {"error": {"message": f"bad key {PLANTED}, really", "type": "x", "code": PLANTED}}
    return {
        "an error": error(400, told),
        "a refused key": error(401, told),
        "a page": error(500, f"<html>{PLANTED}</html>"),
        "headers": error(400, "no").but(headers={"x-echo": PLANTED, "retry-after": PLANTED}),
        "a text": says(["Your key is ", PLANTED[:7], PLANTED[7:20], PLANTED[20:], "."]),
        "thinking": says("said", thinking=f"the key {PLANTED}"),
        "a call": says(calls=[("1", "look", f'{{"where": "{PLANTED}"}}')]),
        "a refusal": says(refusal=f"no, {PLANTED}"),
        "nonsense": Said([f"data: {{{PLANTED}\n\n".encode()]),
    }


@tool
def look(where: str) -> str:
    """Look there."""
    return f"at {where}: {PLANTED}"


@pytest.mark.parametrize("comes_from", ["environment", "typed"])
@pytest.mark.parametrize("dialect", ["openai", "anthropic"])
def test_a_planted_key_is_nowhere(
    dialect: str, comes_from: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever a service does with the key that it is sent, it is in nothing that is shown or kept."""
    caplog.set_level(logging.DEBUG)
    if comes_from == "environment":
        monkeypatch.setenv(keys.variable(dialect), PLANTED)
    else:
        typed(monkeypatch)
        cm.keys.set(dialect)
    for name, said in _echoes(dialect).items():
        live: list[str] = []
        with ModelServer([said, openai_says("done") if dialect == "openai" else anthropic_says("done")]) as server:
            monkeypatch.setenv(f"CM_{dialect.upper()}_BASE_URL", server.url)
            agent = cm.Agent("a", "Do it.", engine=f"{dialect}:m", tools=[look])
            run = cm.Workflow("w", agents=[agent], steps=[cm.step("a", interactive=True, retries=0)]).start()
            feed = run.watch(lambda: None)
            _gate(run)
            live = [repr(thing) for thing in feed.take()]
            assert PLANTED in "".join(value for sent in server.asked for value in sent.headers.values()), "it was sent"
            places = {**_shown(run), "live": "".join(live), "log": caplog.text}
        for place, found in places.items():
            assert PLANTED not in found, (
                f"{name}: it is in the {place}: …{found[max(0, found.find(PLANTED) - 90) :][:200]}"
            )
    assert "[key]" in caplog.text, "a header came back, and was logged"


def test_a_third_partys_engine_that_says_it(monkeypatch: pytest.MonkeyPatch) -> None:
    class Chatty:
        name = "chatty"

        async def stream(self, request: cm.AgentRequest) -> Any:
            key = keys.find("openai").reveal()
            yield cm.Delta(f"I use {key}")
            if request.attempt > 1:
                raise cm.EngineError(f"bad {key}", detail=f"so {key}")
            yield cm.TurnDone(f"I use {key}", output={"key": key})

    monkeypatch.setenv("OPENAI_API_KEY", PLANTED)
    workflow = cm.Workflow("w", agents=[cm.Agent("a", "Do it.")], steps="a?")
    run = workflow.start(engine=Chatty())
    _gate(run)
    assert run["a"].attempts[0].text == "I use [key]"
    run.reject("again")
    _gate(run)
    assert not {place for place, found in _shown(run).items() if PLANTED in found} - {"traceback", "error"}


@pytest.mark.parametrize("comes_from", ["environment", "typed"])
def test_a_function_that_says_it_though_no_engine_has_used_it(
    comes_from: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    @cm.agent("a")
    def a(turn: cm.Turn) -> str:
        turn.workspace.joinpath(".env").write_text(f"OPENAI_API_KEY={PLANTED}\n")
        turn.emit(f"I use {PLANTED}")
        if turn.attempt > 1:
            raise RuntimeError("x" * 480 + f" bad key {PLANTED}")  # where it is cut, half a key would be left
        return f"I use {PLANTED}"

    if comes_from == "environment":
        monkeypatch.setenv("OPENAI_API_KEY", PLANTED)
    else:
        typed(monkeypatch)
        cm.keys.set("openai")
    run = cm.Workflow("w", agents=[a], steps="a?").start({"key": PLANTED}, workspace=tmp_path / "work")
    _gate(run)
    assert run["a"].attempts[0].text == "I use [key]"
    assert "+OPENAI_API_KEY=[key]" in run["a"].attempts[0].diff
    run.reject(f"not {PLANTED}")
    _gate(run)
    assert PLANTED in (tmp_path / "work/.env").read_text(), "files are as agents write them"
    assert not {place for place, found in _shown(run).items() if PLANTED[:20] in found} - {"traceback"}


def test_a_key_where_an_error_is_cut_is_not_half_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", key := "0123456789" * 3)  # of a form that nobody knows as a key
    with ModelServer(error(400, "x" * 290 + " " + key)) as server:
        monkeypatch.setenv("CM_OPENAI_BASE_URL", server.url)
        run = cm.Workflow("w", agents=[cm.Agent("a", "Do it.", engine="openai:m")], steps="a").start()
        said = _gate(run).payload["error"]
        run.stop()
    assert "x [key" in said
    assert "0123" not in said


def test_a_key_that_was_refused_is_mended_where_it_comes_from(monkeypatch):
    monkeypatch.setenv("ANTHROPIC_API_KEY", "sk-planted-of-the-environment")
    assert "take it out (`del os.environ['ANTHROPIC_API_KEY']`) and run `%cm keys set anthropic`" in keys.refused(
        "anthropic"
    )
    monkeypatch.delenv("ANTHROPIC_API_KEY")
    assert keys.refused("anthropic").startswith("Type it again: `%cm keys set anthropic`")
