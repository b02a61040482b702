"""Notebooks are cleaned of what is true of one execution only, and of nothing else: as files, as a stream, by git."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cm_notebook as cm
from cm_notebook import cli
from cm_notebook.cleaning import SAVED_BELOW, WIDGET, cleaned
from cm_notebook.gitfilter import LINE
from cm_notebook.render import compare, html, text, timeline
from cm_notebook.state import RunState
from tests.notebooks import execute as books
from tests.render.builder import NOON, SITUATIONS, Story, finished, looping, recorded, waiting

HERE = (NOON, 1.0, "r-0000000a")
THERE = (NOON + 7777.7, 13.7, "r-0000000b")
QUICK = (NOON + 77.7, 0.001, "r-0000000c")
"""Steps that take less than a tenth of a second, which a page says with a ``&lt;``."""
LIKE_OURS = "It took\n\n12.4 s · 3 tok\n\nand was approved by you, 12:31. See run `r-0123abcd`: “12:31”, 4.6 s.\n"


def output(html_: str, plain: str, kind: str = "display_data") -> dict[str, Any]:
    data = {"text/html": html_.splitlines(True), "text/plain": plain.splitlines(True)}
    made: dict[str, Any] = {"data": data, "metadata": {}, "output_type": kind}
    return made if kind == "display_data" else {"execution_count": 3, **made}


def views(state: RunState) -> list[dict[str, Any]]:
    """What cells show of a run, one after the other."""
    made = [output(html.run_html(state), text.run_text(state), "execute_result")]
    made += [output(html.run_html(state, [step.id]), text.run_text(state)) for step in state.order]
    made += [output(html.show_html(state, step), text.show_text(state, step)) for step in state.order]
    return [*made, output(html.status_html(state), text.status_table(state))]


def stream(lines: list[str]) -> dict[str, Any]:
    return {"name": "stdout", "output_type": "stream", "text": [f"{line}\n" for line in lines]}


def notebook(*outputs: dict[str, Any], source: str = "run = %cm run", **metadata: Any) -> bytes:
    cell = {
        "cell_type": "code",
        "execution_count": 3,
        "id": "a",
        "metadata": {"execution": {"iopub.execute_input": "2026-01-01T10:00:00Z"}, "tags": ["kept"]},
        "outputs": list(outputs),
        "source": [source],
    }
    book = {"cells": [cell], "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}
    return (json.dumps(book, indent=1, ensure_ascii=False) + "\n").encode()


def of(story: Story) -> bytes:
    return notebook(stream(story.lines), *views(story.state))


def team(**options: Any) -> Story:
    story = Story("architect -> [frontend-dev | backend-dev]? -> deployer", name="a: done · 4.6 s", **options)
    story.answer(LIKE_OURS).answer("Drew the page.").fail("no key").decide("retry").answer("Wrote it.")
    return story.decide("approve").answer("Out.")


ENDED = {"finished": finished, "team": team}


@pytest.mark.parametrize("name", ENDED)
def test_two_executions_are_one_file(name: str) -> None:
    here, there, quick = (of(ENDED[name](machine=machine)) for machine in (HERE, THERE, QUICK))
    assert here != there
    assert cleaned(here) == cleaned(there) == cleaned(quick)
    assert cleaned(cleaned(here)) == cleaned(here)
    nbformat.validate(nbformat.reads(cleaned(here).decode(), as_version=4))
    made = json.loads(cleaned(here))["cells"][0]
    assert len(made["outputs"]) == len(json.loads(here)["cells"][0]["outputs"]), "no view is lost"
    assert made["metadata"] == {"tags": ["kept"]}
    assert made["execution_count"] is None


def test_a_fork_does_not_say_of_which_run_it_is() -> None:
    def fork() -> bytes:
        workflow = cm.Workflow("w", agents=[cm.Agent("a", "x"), cm.Agent("b", "y")], steps="a -> b")
        run = workflow.start(engine=cm.ScriptedEngine({"a": ["1"], "b": ["2", "3"]}), journal=":memory:").wait(20)
        return notebook(*views(run.fork("b").unpause().wait(20).state))

    once = cleaned(fork())
    assert once == cleaned(fork())
    assert b"Fork at b" in once
    assert b"fork at b" in once


def test_what_agents_wrote_stays() -> None:
    state = team(machine=HERE).state
    before, after = (json.dumps(json.loads(data), ensure_ascii=False) for data in (of(team()), cleaned(of(team()))))
    for words in ("12.4 s · 3 tok", "approved by you, 12:31. See run", "“12:31”, 4.6 s.", "a: done · 4.6 s"):
        assert before.count(words) == after.count(words) > 0, words
    assert state.steps["architect"].last is not None
    assert "400 tok" in after
    assert "$0.003" in after


def test_a_quotation_is_not_ours() -> None:
    def story(machine: Any) -> Story:
        made = Story("planner?", machine=machine).answer("One.")
        return made.decide("reject", "It was approved by you, 12:31 · 7.9 s").answer("Two.").decide("approve")

    after = cleaned(of(story(HERE))).decode()
    assert after == cleaned(of(story(THERE))).decode()
    assert "“It was approved by you, 12:31 · 7.9 s”" in after


@pytest.mark.parametrize("story", [recorded(), finished(engine="offline", recorded="smart-builder")])
def test_a_run_from_a_tape_is_left_as_it_is(story: Story) -> None:
    data = of(story)
    assert cleaned(data, keep_count=True) == data.replace(b'"execution": {\n     "iopub.execute_input": ', b"").replace(
        b'"2026-01-01T10:00:00Z"\n    },\n    ', b""
    )


@pytest.mark.parametrize("stem", [path.stem for path in books.shipped()])
def test_a_shipped_notebook_is_clean(stem: str) -> None:
    content = next(path for path in books.shipped() if path.stem == stem).read_bytes()
    assert cleaned(content, keep_count=True) == content


def test_ids_of_runs_are_taken_out_of_what_cells_print_and_of_errors() -> None:
    """A program that uses the package, in cells without a magic."""

    def book(id: str, took: str, clock: str) -> bytes:
        raised = [f"\x1b[31mTransitionError\x1b[39m: run \x1b[32m{id}\x1b[39m: cm.resume('{id}')"]
        already = f"'a' was already approved by you at {clock}; nothing was changed."
        outputs = [
            stream([f"{id} <Run {id} 'w': done>", f"cm: a ok {took}", f"cm: w completed {took} 3 tok"]),
            {"ename": "AlreadyDecided", "evalue": already, "output_type": "error", "traceback": [already]},
            {"ename": "TransitionError", "evalue": f"run '{id}'", "output_type": "error", "traceback": raised},
            {"data": {"text/plain": f"[<Run {id} 'w'>]"}, "execution_count": 3, "metadata": {}, "output_type": "x"},
        ]
        return notebook(*outputs, source="import cm_notebook as cm\nprint(run.id, run)")

    once = cleaned(book("r-0123abcd", "4.6s", "12:31"))
    assert once == cleaned(book("r-4567cdef", "13.9s", "08:02")) == cleaned(once)
    assert b"r-\xe2\x80\xa6 <Run r-\xe2\x80\xa6 'w': done>" in once
    assert b"cm: w completed 3 tok" in once
    for like in ("for-01234567", "r-0123abcde", "x-r-0123abcd"):
        assert like.encode() in cleaned(notebook(stream([like]), source="import cm_notebook"))


def test_of_a_timeline_the_words_stay() -> None:
    def picture(machine: Any) -> dict[str, Any]:
        events = team(machine=machine).events
        return output(timeline.img(events), timeline.draw(events, "text"))

    once = cleaned(notebook(picture(HERE)))
    assert once == cleaned(notebook(picture(THERE))) == cleaned(notebook(picture(QUICK))) == cleaned(once)
    [made] = json.loads(once)["cells"][0]["outputs"]
    [words] = made["data"]["text/plain"]
    assert words.startswith("Timeline of a: done · 4.6 s. architect: attempt 1 done; ")
    assert "backend-dev: attempt 1 failed, retried, attempt 2 done" in words
    assert not any("svg" in line for line in made["data"]["text/html"])


def test_two_runs_side_by_side_have_neither_ids_nor_times() -> None:
    def pair(here: Any, there: Any) -> bytes:
        both = [team(machine=machine).state for machine in (here, there)]
        made = [output(compare.compare_html(*both, step), compare.text(*both, step)) for step in (None, "architect")]
        return notebook(*made)

    once = cleaned(pair(HERE, THERE))
    assert once == cleaned(pair(THERE, HERE)) == cleaned(pair(QUICK, HERE)) == cleaned(once)
    assert re.search(r"Step +run r-… +run r-… +Answer", once.decode())


@pytest.mark.parametrize("make", [waiting, looping])
def test_what_shows_a_run_that_had_not_ended_goes(make: Any) -> None:
    story = make()
    state = story.state
    stale = [
        output(html.run_html(state), text.run_text(state)),
        output(html.status_html(state), text.status_table(state)),
        output(f'<div data-cm-static="x">\n{html.run_html(state)}</div>\n', text.run_text(state)),
        output(html.runs_html([("r-0000000a", "w", "completed", NOON)]), "Run  Workflow\nr-0000000a  w"),
        {"data": {WIDGET: {}, "text/plain": [f"w{SAVED_BELOW}"]}, "metadata": {}, "output_type": "display_data"},
        {"ename": "GatePending", "evalue": "x", "output_type": "error", "traceback": []},
        stream(story.lines),
    ]
    assert json.loads(cleaned(notebook(*stale)))["cells"][0]["outputs"] == []


def test_other_outputs_stay() -> None:
    others = [
        output("<div><b>7.9 s</b> · run</div>", "took: done · 7.9 s"),
        stream(["cm: mine completed 7.9s", "run r-0000000a"]),
        {"data": {WIDGET: {}, "text/plain": ["IntSlider"]}, "metadata": {}, "output_type": "display_data"},
        {"ename": "ValueError", "evalue": "x", "output_type": "error", "traceback": []},
    ]
    data = notebook(*others, source="print('mine')")
    assert json.loads(cleaned(data))["cells"][0]["outputs"] == others


def test_our_widgets_alone_are_taken_from_the_state_of_widgets() -> None:
    mine = {"1": {"state": {"_anywidget_id": "cm_notebook.jupyter.view.RunWidget", "layout": "IPY_MODEL_2"}}, "2": {}}
    other = {"3": {"state": {"value": 5}}}

    def kept(state: dict[str, Any]) -> Any:
        widgets = {"application/vnd.jupyter.widget-state+json": {"state": state, "version_major": 2}}
        return json.loads(cleaned(notebook(widgets=widgets)))["metadata"]

    assert kept({**mine, **other})["widgets"]["application/vnd.jupyter.widget-state+json"]["state"] == other
    assert kept(dict(mine)) == {}


# -- the file's form ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "form",
    [
        {"indent": 1, "ensure_ascii": False},
        {"indent": 4, "ensure_ascii": True},
        {"indent": "\t", "ensure_ascii": False},
        {"indent": None, "ensure_ascii": False},
        {"indent": None, "ensure_ascii": True, "separators": (",", ":")},
    ],
)
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("end", ["", "\n", "\n\n"])
def test_the_form_of_the_file_is_kept(form: dict[str, Any], newline: str, end: str) -> None:
    def written(data: bytes) -> bytes:
        return (json.dumps(json.loads(data), **form) + end).replace("\n", newline).encode()

    data = notebook(*views(finished().state), name="Grüße 😀")
    assert cleaned(written(data)) == written(cleaned(data))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
OUTPUTS = st.lists(
    st.sampled_from([view for make in SITUATIONS.values() for view in views(make().state)[:3]])
    | st.builds(output, st.text(max_size=30), st.text(max_size=30))
    | st.builds(stream, st.lists(st.text(max_size=20), max_size=3)),
    max_size=4,
)


@given(OUTPUTS, JSON, st.sampled_from(["%cm run", "%%cm step a", "x = 1"]))
@settings(deadline=None, max_examples=50)
def test_cleaning_twice_changes_nothing(outputs: list[Any], value: Any, source: str) -> None:
    data = notebook(*outputs, source=source, value=value)
    once = cleaned(data)
    assert cleaned(once) == once
    assert json.loads(once)["metadata"] == {"value": value}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff\xfe",
        b"{",
        b"[]",
        b'{"cells": []}',
        b'{"cells": [], "nbformat": 3}',
        b'{"cells": [5], "nbformat": 4}',
        b'{"cells": [{"cell_type": "code"}], "nbformat": 4}',
        b'{"cells": [], "cells": [], "nbformat": 4}',
        b'<<<<<<< HEAD\n{"cells": []}',
    ],
)
def test_what_is_no_notebook_comes_out_as_it_went_in(data: bytes, tmp_path: Path) -> None:
    with pytest.raises(cm.WorkflowError, match="this is no notebook"):
        cleaned(data)
    Path("x.ipynb").write_bytes(data)
    assert cli.main(["clean", "x.ipynb"]) == cli.FAILED
    assert Path("x.ipynb").read_bytes() == data


# -- the command -------------------------------------------------------------------------------------------------------


def clean(*words: str, data: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-P", "-m", "cm_notebook", "clean", *words]
    return subprocess.run(command, input=data, capture_output=True, timeout=60)


def test_as_a_filter() -> None:
    data = of(finished())
    done = clean(data=data)
    assert (done.returncode, done.stdout, done.stderr) == (0, cleaned(data), b"")
    failed = clean(data=b"\xff{")
    assert (failed.returncode, failed.stdout) == (1, b"\xff{")
    assert failed.stderr.startswith(b"cm-notebook: clean: this is no notebook: ")
    assert clean("--keep-count", data=data).stdout == cleaned(data, keep_count=True)


def test_files_in_place(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = of(finished())
    Path("a b.ipynb").write_bytes(data)
    Path("a b.ipynb").chmod(0o640)
    Path("clean.ipynb").write_bytes(cleaned(data))
    assert cli.main(["clean", "--check", "a b.ipynb", "clean.ipynb"]) == cli.FAILED
    assert capsys.readouterr().out == "a b.ipynb would be cleaned\n"
    assert Path("a b.ipynb").read_bytes() == data
    assert cli.main(["clean", "a b.ipynb", "clean.ipynb"]) == cli.DONE
    assert capsys.readouterr().out == "a b.ipynb is cleaned\n"
    assert Path("a b.ipynb").read_bytes() == cleaned(data)
    assert Path("a b.ipynb").stat().st_mode & 0o777 == 0o640
    assert cli.main(["clean", "--check", "a b.ipynb"]) == cli.DONE
    Path("a b.ipynb").write_bytes(data)
    assert cli.main(["clean", "a b.ipynb", "none.ipynb"]) == cli.FAILED
    assert Path("a b.ipynb").read_bytes() == data, "one cannot be read: none is changed"
    assert cli.main(["clean", "--install", "a b.ipynb"]) == cli.USAGE


# -- git ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A git repository whose path holds a blank and a quotation mark."""
    folder = tmp_path / "Anna's work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    git("init", "-q")
    return folder


def git(*words: str) -> str:
    done = subprocess.run(["git", *words], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def stored(name: str) -> bytes:
    return subprocess.run(["git", "show", f":{name}"], capture_output=True, check=True, timeout=60).stdout


def test_git_stores_what_is_clean(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path(".gitattributes").write_text("*.png binary")
    Path("json.py").write_text("raise SystemExit('not this one')")
    assert cli.main(["clean", "--check"]) == cli.FAILED
    for _ in range(2):
        assert cli.main(["clean", "--install"]) == cli.DONE
    assert Path(".gitattributes").read_text() == f"*.png binary\n{LINE}\n"
    assert cli.main(["clean", "--check"]) == cli.DONE
    data = of(finished(machine=HERE))
    Path("deep down").mkdir()
    Path("deep down/my run.ipynb").write_bytes(data)
    git("add", ".")
    assert stored("deep down/my run.ipynb") == cleaned(data)
    assert Path("deep down/my run.ipynb").read_bytes() == data, "the file itself stays"
    git("-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "x")
    Path("deep down/my run.ipynb").write_bytes(of(finished(machine=THERE)))
    assert git("diff") == "", "another execution is no change"
    Path("broken.ipynb").write_bytes(b"{")
    git("add", "broken.ipynb")
    assert stored("broken.ipynb") == b"{", "nothing is lost"
    capsys.readouterr()
    assert cli.main(["clean", "--uninstall"]) == cli.DONE
    assert cli.main(["clean", "--uninstall"]) == cli.DONE
    assert Path(".gitattributes").read_text() == "*.png binary\n"
    assert cli.main(["clean", "--check"]) == cli.FAILED
    git("add", "--renormalize", ".")
    assert stored("deep down/my run.ipynb") == of(finished(machine=THERE))


def test_the_filter_may_leave_the_numbers_of_executions(repository: Path) -> None:
    for words, kept in ((["--keep-count"], True), ([], False)):
        assert cli.main(["clean", "--install", *words]) == cli.DONE
        data = of(finished())
        Path("a.ipynb").write_bytes(data)
        git("add", "--renormalize", ".")
        git("add", ".")
        assert stored("a.ipynb") == cleaned(data, keep_count=kept)


def test_our_line_alone_leaves_no_file(repository: Path) -> None:
    cli.main(["clean", "--install"])
    cli.main(["clean", "--uninstall"])
    assert not Path(".gitattributes").exists()
    assert "filter" not in Path(".git/config").read_text()


def test_another_filter_is_not_pushed_aside(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path(".gitattributes").write_text("*.ipynb filter=nbstripout\n")
    assert cli.main(["clean", "--install"]) == cli.FAILED
    assert "notebooks have the filter 'nbstripout' here already" in capsys.readouterr().err
    assert Path(".gitattributes").read_text() == "*.ipynb filter=nbstripout\n"


def test_outside_of_a_repository(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for way in ("--install", "--uninstall", "--check"):
        assert cli.main(["clean", way]) == cli.FAILED
        assert "this is no working folder of a git repository" in capsys.readouterr().err
