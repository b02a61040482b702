"""Tapes: how large they are, and what writing and playing one costs beside the run itself."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

import cm_notebook as cm
from cm_notebook.recording import lines_of
from cm_notebook.tape import Tape
from tests.benchmarks.measure import Time, paired, stopwatch

STEPS = 300
ANSWER = "A line of an answer, as long as such lines are.\n" * 20
_numbers = itertools.count()


def workflow() -> cm.Workflow:
    """Steps one after the other, each of which sees what the one before it has answered."""
    agents = [cm.Agent(f"s{n}", "Do it, given {{ previous }}" if n else "Do it.") for n in range(STEPS)]
    return cm.Workflow("chain", steps=[agent.id for agent in agents], agents=agents)


def engine() -> cm.ScriptedEngine:
    reply = cm.Reply(ANSWER, deltas=[ANSWER], usage=cm.Usage(input_tokens=300, output_tokens=200))
    return cm.ScriptedEngine({f"s{n}": [reply] for n in range(STEPS)})


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CM_HEADLESS", "1")
    return tmp_path


def test_tape(budget, folder):
    def ran(**options) -> Time:
        made = workflow()
        with stopwatch() as passed:
            made.start(journal=":memory:", workspace=folder, **options).wait()
        return passed().per(STEPS)

    def recorded() -> Time:
        return ran(engine=engine(), record=folder / f"{next(_numbers)}.jsonl")

    def scripted() -> Time:
        return ran(engine=engine())

    budget("a step that is recorded ÷ one that is not", paired(recorded, scripted, rounds=7).cpu, "ms/step", times=2.5)
    file = folder / "0.jsonl"
    lines = file.read_text("utf-8").splitlines()
    assert len(lines) == STEPS + 1
    budget("size of a tape ÷ the answers on it", file.stat().st_size / (STEPS * len(ANSWER)), "×", at_most=1.75)
    budget("size of a tape per step, without its answer", file.stat().st_size / STEPS - len(ANSWER), "bytes/step")
    tape = Tape.read(file)
    played = paired(lambda: ran(tape=tape), scripted, rounds=7).cpu
    budget("a step that is played from a tape ÷ one of a script", played, "ms/step", times=2)


def test_a_run_of_the_past_is_made_a_tape(budget, folder):
    run = workflow().start(engine=engine(), journal=":memory:", workspace=folder).wait()
    events = run.events

    def made() -> Time:
        with stopwatch() as passed:
            lines_of(events)
        return passed().per(len(events))

    budget("an event of the past put on a tape", paired(made, rounds=7).cpu, "ms/event", at_most=0.2)
