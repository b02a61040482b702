"""A run with models behind HTTP APIs is recorded, and played with the same events: no server, no key, no engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import cm_notebook as cm
from cm_notebook import keys
from cm_notebook.engines.chat import ChatEngine
from cm_notebook.recording import lines_of
from cm_notebook.tape import Tape
from tests.helpers import facts

from .model_server import Asked, ModelServer, Said, error
from .test_http import DIALECTS, KEY, SAYS, told

both = pytest.mark.parametrize("dialect", DIALECTS)
MEMBERS = ("frontend-dev", "backend-dev", "qa-engineer")


@pytest.fixture(autouse=True)
def _nobody_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CM_HEADLESS", "1")
    monkeypatch.chdir(tmp_path)
    for name in ("OPENAI_API_KEY", "ANTHROPIC_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(keys, "_known", {})


saved: list[str] = []


@cm.tool(ask=True)
def save(name: str, text: str) -> str:
    """Keep a text in a file."""
    saved.append(name)
    return f"saved {name}, {len(text)} characters"


@cm.tool
def look(name: str) -> str:
    """Read a file."""
    raise FileNotFoundError(f"there is no {name}")


def workflow(dialect: str, **more: Any) -> cm.Workflow:
    model = f"{dialect}:test-model"
    return cm.Workflow(
        name="team-builder",
        agents=[
            cm.Agent("planner", "Plan {{ goal }}.", engine=model, tools=[save, look]),
            cm.Agent("coordinator", "Build it: {{ planner }}", engine=model),
            *(cm.Agent(name, f"You are the {name}.", engine=model) for name in MEMBERS),
        ],
        steps=[cm.step("planner", interactive=True), cm.step("coordinator")],
        sub_agents=list(MEMBERS),
        inputs={"goal": "a todo CLI"},
        **more,
    )


def answer(dialect: str) -> Any:
    """What the models say: refused once for being too many, then tools, a question, three called at the same time."""
    says, busy = SAYS[dialect], iter([error(429, {"error": {"message": "slow down"}}, retry_after="0")])
    again = iter(["", "again"])

    def said(asked: Asked) -> Said:
        text, results = json.dumps(asked.body["messages"]), told(asked)
        for name in MEMBERS:
            if f"You are the {name}." in text:
                return says(f"{name} is done.", used={"input": 10, "output": 3})
        if "Build it" in text:
            if not results:
                calls = [{"agent": name, "prompt": "Do your part. " * 80} for name in MEMBERS]
                return says("I call them.", calls=[("c9", "run_agents", json.dumps({"groups": [calls]}))])
            return says(["All ", "is ", "built."])
        if (refused := next(busy, None)) is not None:
            return refused
        if not results:
            return says(
                "Let me see.",
                thinking="hm",
                calls=[
                    ("c1", "look", '{"name": "a.md"}'),
                    ("c2", "save", json.dumps({"name": "b.md", "text": "x" * 3000})),
                    ("c3", "save", '{"name": "c.md", "text": "no"}'),
                    ("c4", "ask_human", '{"question": "Which port?"}'),
                    ("c5", "nothing", "not JSON"),
                ],
            )
        return says(f"1. Write it.{next(again)}")

    return said


def decide(gate: cm.Gate) -> cm.Decision:
    """As a person would: one file may be written, the other not; the first plan is rejected."""
    if gate.kind == "question":
        return cm.Decision(action="answer", feedback="8080")
    if gate.kind == "permission":
        refused = gate.payload["arguments"]["name"] == "c.md"
        return cm.Decision(action="reject", feedback="not that") if refused else cm.Decision(action="approve")
    if gate.kind == "review" and gate.attempt == 1:
        return cm.Decision(action="reject", feedback="Name the tests.")
    return cm.Decision(action="approve")


def play(dialect: str, tape: str | Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> cm.Run:
    """A run from `tape`, where an engine that is so much as made is a failure."""

    def made(*_given: Any, **_more: Any) -> None:
        raise AssertionError("no engine is needed")

    with monkeypatch.context() as patch:
        patch.setattr(ChatEngine, "__init__", made)
        patch.setattr(ChatEngine, "stream", made)
        patch.setattr("cm_notebook.engines.base._engines", {})
        return workflow(dialect).start(journal=":memory:", tape=tape, **options).wait(30)


@pytest.fixture(params=DIALECTS)
def recorded(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[str, cm.Run, Path]:
    """A dialect, a run of it, and its tape."""
    dialect, tape = request.param, Path("tapes/01.jsonl")
    saved.clear()
    with ModelServer(answer(dialect)) as server, monkeypatch.context() as patch:
        patch.setenv(f"CM_{dialect.upper()}_BASE_URL", server.url + ("/v1" if dialect == "openai" else ""))
        patch.setenv(f"{dialect.upper()}_API_KEY", KEY)
        run = workflow(dialect).start(journal=":memory:", record=tape, on_gate=decide).wait(30)
        assert run.status == "completed"
        assert saved == ["b.md", "b.md"]
    return dialect, run, tape


def test_it_is_played_with_the_same_events(recorded: tuple[str, cm.Run, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    dialect, run, tape = recorded
    saved.clear()
    played = play(dialect, tape, monkeypatch)
    assert facts(played.events) == facts(run.events)
    assert saved == [], "a tool is not called again"
    kinds = {event.type for event in run.events}
    assert {"TurnFailed", "ToolCalled", "ToolReturned", "GateDecided", "AgentsCalled"} <= kinds
    assert len([event for event in run.events if event.type == "TurnStarted"]) == 7
    assert (played.usage, played.cost_usd) == (run.usage, run.cost_usd)
    lines = [json.loads(line) for line in tape.read_text("utf-8").splitlines()]
    assert {line["gate"]["kind"] for line in lines if "gate" in line} == {"permission", "question", "review"}


def test_a_tape_of_the_tape_is_the_same(recorded: tuple[str, cm.Run, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    dialect, run, tape = recorded
    again = Path("again.jsonl")
    played = play(dialect, tape, monkeypatch, record=again)
    assert again.read_text("utf-8") == tape.read_text("utf-8")
    assert tape.stat().st_mode & 0o777 == 0o600

    def bare(line: str) -> Any:
        """Without what only the recorder has seen, or what is compressed when it is played."""
        left_out = ("events", "recorded_at", "retry_in_s")
        return {name: value for name, value in json.loads(line).items() if name not in left_out}

    written = [bare(line) for line in tape.read_text("utf-8").splitlines()]
    assert [bare(line) for line in lines_of(run.events)] == written
    assert [bare(line) for line in lines_of(played.events)] == written


def test_no_key_is_on_the_tape(recorded: tuple[str, cm.Run, Path]) -> None:
    assert KEY not in recorded[2].read_text("utf-8")


def test_thinking_is_not_on_the_tape(recorded: tuple[str, cm.Run, Path]) -> None:
    assert '"hm"' not in recorded[2].read_text("utf-8")


@both
@pytest.mark.parametrize("whose", ["the engine's", "another one's"])
def test_a_planted_key_is_not_on_the_tape(dialect: str, whose: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that repeats a key, in pieces too, in an answer, in a call, in an error; a person who writes one."""
    key = KEY if whose == "the engine's" else "sk-another-9876543210fedcba"
    says = SAYS[dialect]
    answers = [
        says(calls=[("c1", "look", json.dumps({"name": key}))]),
        says([f"It is {key[:9]}", key[9:], " so."]),
        says(f"Again {key}"),
        error(400, {"error": {"message": f"no {key}"}}),
    ]
    with ModelServer(answers) as server, monkeypatch.context() as patch:
        patch.setenv(f"CM_{dialect.upper()}_BASE_URL", server.url + ("/v1" if dialect == "openai" else ""))
        patch.setenv(f"{dialect.upper()}_API_KEY", KEY)
        other = "ANTHROPIC" if dialect == "openai" else "OPENAI"
        if key != KEY:
            patch.setenv(f"{other}_API_KEY", key)

        def reject(gate: cm.Gate) -> cm.Decision:
            if gate.kind == "failed":
                return cm.Decision(action="stop")
            feedback = f"why {key}" if gate.attempt == 1 else None
            return cm.Decision(action="reject" if feedback else "approve", feedback=feedback)

        run = workflow(dialect).start(journal=":memory:", record="t.jsonl", on_gate=reject).wait(30)
        text = Path("t.jsonl").read_text("utf-8")
        lines = "\n".join(lines_of(run.events))
    assert len(text.splitlines()) == len(lines.splitlines()) == 7
    assert text.count("[key]") >= 5
    for found in (text, lines):
        assert key not in found
    Tape.read("t.jsonl")
