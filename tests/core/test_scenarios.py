"""Situations that every durable engine is tested for, by the names they have there; each says what is promised."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

import cm_notebook as cm
from tests.helpers import gate, until

ROOT = str(Path(__file__).parents[2])


def flow(*steps: str, name: str = "scenario") -> cm.Workflow:
    """Steps one after the other; ``a?`` waits for a person."""
    return cm.Workflow(
        name,
        steps=[cm.step(id.rstrip("?"), prompt=f"Do {id[0]}.", interactive=id.endswith("?") or None) for id in steps],
    )


def script(**replies: Any) -> cm.ScriptedEngine:
    """Five replies for each step, but for those that are given."""
    return cm.ScriptedEngine({**{name: [f"{name}{number}" for number in range(1, 6)] for name in "abc"}, **replies})


def answers(run: cm.Run) -> list[tuple[str, str]]:
    """Which gate was decided how, in order."""
    return [(event.gate_id, event.decision.action) for event in run.events if event.type == "GateDecided"]


def turns(run: cm.Run) -> list[str]:
    """Which steps ran, in order."""
    return [event.step for event in run.events if event.type == "TurnStarted"]


def test_duplicate_answer() -> None:
    """The first answer counts. The second is told of it, by whom and when, and changes nothing."""
    run = flow("a?", "b?").start(engine=script(), journal=":memory:")
    opened = gate(run)
    run.decide(opened.id, cm.Decision(action="approve"))
    gate(run, "b")
    before = run.events
    for again in (cm.Decision(action="approve"), cm.Decision(action="reject", feedback="no")):
        with pytest.raises(cm.AlreadyDecided, match=r"already approved by you at \d\d:\d\d; nothing was changed"):
            run.decide(opened.id, again)
    assert run.events == before
    assert turns(run) == ["a", "b"]
    run.stop()


@pytest.mark.parametrize("ends", ["stopped", "completed", "rejected"])
def test_late_answer(ends: str) -> None:
    """An answer to a gate that is closed by now is refused with what became of it, and changes nothing."""
    run = flow("a?").start(engine=script(), journal=":memory:")
    opened = gate(run)
    if ends == "stopped":
        run.stop().wait(10)
    elif ends == "completed":
        run.approve().wait(10)
    else:
        run.reject("shorter")
        gate(run)
    before = run.events
    with pytest.raises(cm.AlreadyDecided):
        run.decide(opened.id, cm.Decision(action="approve"))
    assert run.events == before
    if ends == "rejected":
        run.stop()


def test_answer_to_the_wrong_gate() -> None:
    """Of no gate, of another run, with what was shown being another text, or not possible there: refused by name."""
    run, other = (flow("a?", "b?").start(engine=script(), journal=":memory:") for _ in range(2))
    here, there = gate(run), gate(other)
    before = run.events
    approve = cm.Decision(action="approve")
    for id in (there.id, here.id + "9", "nonsense"):
        with pytest.raises(cm.TransitionError, match="gate"):
            run.decide(id, approve)
    with pytest.raises(cm.AlreadyDecided, match="shows something else by now"):
        run.decide(here.id, approve, digest="0" * 64)
    with pytest.raises(cm.TransitionError, match="answer"):
        run.decide(here.id, cm.Decision(action="answer", feedback="8080"))
    with pytest.raises(cm.TransitionError, match="'b' has no open gate: it is pending"):
        run.approve("b")
    assert run.events == before
    assert run.gates == [here]
    run.stop()
    other.stop()


ANSWERS = """
import sys, cm_notebook as cm
path, run_id, words = sys.argv[1:]
run = cm.Run.open(run_id, path)
opened = run.gates[0]
print("ready", flush=True)
sys.stdin.readline()
try:
    run.decide(opened.id, cm.Decision(action="reject", feedback=words))
    print("counts", flush=True)
except cm.AlreadyDecided as late:
    print("late:", late, flush=True)
"""


def test_two_processes_answering(tmp_path: Path) -> None:
    """Of any number of processes that answer at the same moment exactly one is told that its answer counts."""
    run = flow("a?").start(engine=script(), journal=tmp_path / "j.db")
    opened = gate(run)
    env = {**os.environ, "PYTHONPATH": ROOT}
    others = [
        subprocess.Popen(
            [sys.executable, "-c", ANSWERS, str(tmp_path / "j.db"), run.id, f"words {number}"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env,
        )
        for number in range(3)
    ]  # fmt: skip
    for other in others:
        assert other.stdout is not None
        assert other.stdout.readline() == "ready\n"
    for other in others:
        assert other.stdin is not None
        other.stdin.write("\n")
        other.stdin.flush()
    said = [other.communicate(timeout=60)[0].strip() for other in others]
    winners = [number for number, words in enumerate(said) if words == "counts"]
    assert len(winners) == 1, said
    assert all(words.startswith("late: already rejected by you at") for words in said if words != "counts"), said
    until(lambda: any(found.id != opened.id for found in run.gates), "the next attempt")
    assert answers(run) == [(opened.id, "reject")]
    assert run["a"].attempts[0].feedback == f"words {winners[0]}"
    run.stop()


RESUMES = """
import sys, cm_notebook as cm
path, run_id = sys.argv[1:]
from tests.core.test_scenarios import flow, script
print("ready", flush=True)
sys.stdin.readline()
try:
    run = cm.resume(run_id, flow("a?", "b"), engine=script(), journal=path)
    print("drives", flush=True)
    run.wait(60)
except cm.RunLocked as locked:
    print("locked:", locked, flush=True)
    cm.Run.open(run_id, path).approve()
    print("approved", flush=True)
"""


def test_resume_twice_at_once(tmp_path: Path) -> None:
    """One of two processes drives; the other is told so at once, and can still read and decide."""
    run = flow("a?", "b").start(engine=script(), journal=tmp_path / "j.db")
    opened = gate(run)
    run.stop().wait(10)
    env = {**os.environ, "PYTHONPATH": ROOT}
    both = [
        subprocess.Popen(
            [sys.executable, "-c", RESUMES, str(tmp_path / "j.db"), run.id],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env,
        )
        for _ in range(2)
    ]  # fmt: skip
    for other in both:
        assert other.stdout is not None
        assert other.stdout.readline() == "ready\n"
    for other in both:
        assert other.stdin is not None
        other.stdin.write("\n")
        other.stdin.flush()
    said = sorted(other.communicate(timeout=90)[0].split("\n")[0] for other in both)
    assert said[0] == "drives"
    assert said[1].startswith(f"locked: run '{run.id}' is driven by another process or notebook. It can still be read")
    done = cm.Run.open(run.id, tmp_path / "j.db")
    assert done.status == "completed"
    assert [event.type for event in done.events].count("RunResumed") == 1
    assert turns(done) == ["a", "b"]
    assert [action for _id, action in answers(done)] == ["approve"]
    assert opened.id.split("/")[1] == "a"


def test_signal_during_replay(tmp_path: Path) -> None:
    """A decision that arrives while another process is just reading the run's history to go on with it is not lost."""

    class Interrupted(cm.Journal):
        def drive(self, run_id: str) -> None:
            """Somebody decides after the history was read, and before its reader drives."""
            super().drive(run_id)
            other = cm.Run(run_id, cm.Journal(self.path))
            other.approve()

    run = flow("a?", "b").start(engine=script(), journal=tmp_path / "j.db")
    opened = gate(run)
    left = sqlite3.connect(tmp_path / "j.db")
    with sqlite3.connect(tmp_path / "copy.db") as copy:  # as a process that died here leaves it
        left.backup(copy)
    left.close()
    copy.close()
    run.stop()
    again = cm.resume(run.id, flow("a?", "b"), engine=script(), journal=Interrupted(tmp_path / "copy.db")).wait(20)
    assert again.status == "completed"
    assert answers(again) == [(opened.id, "approve")]
    assert turns(again) == ["a", "b"]


def test_terminal_run_refuses() -> None:
    """A completed run takes no decision and no steering, and is not resumed; nothing in it changes."""
    run = flow("a").start(engine=script(), journal=":memory:").wait(10)
    before = run.events
    deeds = [
        lambda: run.approve(),
        lambda: run.reject("no"),
        lambda: run.pause(),
        lambda: run.stop(),
        lambda: cm.resume(run.id, journal=run._journal),
    ]
    for deed in deeds:
        with pytest.raises(cm.TransitionError, match="completed"):
            deed()
    assert run.events == before


@pytest.mark.parametrize("edit", ["renamed", "deleted", "moved"])
def test_code_divergence_refused(tmp_path: Path, edit: str) -> None:
    """A definition that no longer fits what has run is refused by name before anything happens."""
    run = flow("a", "b?", "c").start(engine=script(), journal=tmp_path / "j.db")
    gate(run)
    run.stop().wait(10)
    before = run.events
    other = {"renamed": flow("x", "b?", "c"), "deleted": flow("b?", "c"), "moved": flow("b?", "a", "c")}[edit]
    words = {"renamed": "'a' has run and is renamed to 'x'", "deleted": "'a' has run", "moved": "stands elsewhere now"}
    with pytest.raises(cm.WorkflowError, match=words[edit]):
        cm.resume(run.id, other, engine=script(), journal=tmp_path / "j.db")
    assert run.events == before
    again = cm.resume(run.id, flow("a", "b?", "c"), engine=script(), journal=tmp_path / "j.db")
    again.approve()
    assert again.wait(10).status == "completed", "it is still there for the definition that fits"


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        ("DELETE FROM events WHERE type = 'TurnStarted'", "does not make sense at event"),
        ("UPDATE events SET type = 'Surprise' WHERE type = 'GateOpened'", "unknown type 'Surprise'"),
        ("UPDATE events SET body = '{' WHERE type = 'TurnFinished'", r"damaged at event \d+ \(TurnFinished\)"),
        ("UPDATE events SET body = replace(body, 'path', 'pfad') WHERE type = 'TurnStarted'", "damaged at event"),
        ("UPDATE events SET type = 'TurnFinished' WHERE type = 'TurnStarted'", "damaged at event"),
    ],
)
def test_malformed_history_refused(tmp_path: Path, spoil: str, words: str) -> None:
    """A history that cannot be is refused with the event where it goes wrong; nothing runs and nothing is written."""
    made = flow("a?").start(engine=script(), journal=tmp_path / "j.db")
    gate(made)
    made.stop().wait(10)
    with sqlite3.connect(tmp_path / "j.db") as ours, sqlite3.connect(tmp_path / "spoilt.db") as copy:
        ours.backup(copy)
    ours.close()
    copy.execute(spoil)
    copy.commit()
    before = copy.execute("SELECT * FROM events").fetchall()
    began: list[str] = []

    class Watching(cm.ScriptedEngine):
        def stream(self, request: Any) -> Any:
            began.append(request.path)
            return super().stream(request)

    with pytest.raises(cm.JournalError, match=words):
        cm.resume(made.id, engine=Watching({"a": ["x"]}), journal=tmp_path / "spoilt.db")
    assert copy.execute("SELECT * FROM events").fetchall() == before
    copy.close()
    assert began == []


def test_parent_stop_reaches_children() -> None:
    """Stopping a run cancels the agents that its agents have called, and theirs; each is recorded as cut short."""
    begun: set[str] = set()
    cancelled: set[str] = set()

    def sleeper(name: str) -> cm.Agent:
        @cm.agent(name)
        async def sleeps(turn: cm.Turn) -> str:
            begun.add(turn.path)
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                cancelled.add(turn.path)
                raise
            return "never"

        return sleeps

    def caller(name: str, asked: str) -> cm.Agent:
        @cm.agent(name)
        async def calls(turn: cm.Turn) -> str:
            return str(await turn.run_agents(asked))

        return calls

    agents = [caller("boss", "lead 'x' & a 'y'"), caller("lead", "b 'z'"), sleeper("a"), sleeper("b")]
    family = cm.Workflow("family", steps=["boss"], agents=agents, sub_agents=["lead", "a", "b"])
    run = family.start(journal=":memory:")
    until(lambda: len(begun) == 2, "both at work")
    run.stop().wait(10)
    assert run.status == "stopped"
    until(lambda: cancelled == begun, "both to hear of it")
    cut = [event.path for event in run.events if event.type == "TurnCutShort"]
    assert set(cut) == {"boss", "boss/lead#1", *begun}
    assert len(cut) == 4
    assert not run.state.running


def test_waiting_not_counted_in_time_outs() -> None:
    """The time of a turn stands still while it waits for a person or for others, however long they take."""
    limit_s = 1.5
    answered = threading.Event()

    @cm.agent("asker")
    async def asks(turn: cm.Turn) -> str:
        return f"port {await turn.ask_human('Which port?')}"

    @cm.agent("boss")
    async def calls(turn: cm.Turn) -> str:
        (one,) = await turn.run_agents("waiter 'x'")
        return one.text

    @cm.agent("waiter")
    def waits(turn: cm.Turn) -> str:
        return f"answer {turn.ask_human('And now?')}"

    steps = [cm.step("asker", timeout_s=limit_s), cm.step("boss", timeout_s=limit_s)]
    work = cm.Workflow("patience", steps=steps, agents=[asks, calls, waits], sub_agents=["waiter"])
    run = work.start(journal=":memory:")
    for words in ("8080", "go"):
        gate(run)
        answered.wait(limit_s + 0.5)  # longer than the turn has
        assert run.status == "waiting"
        run.answer(words)
        if words == "8080":
            until(lambda: run["asker"].status == "done", "the first step")
    assert run.wait(20)["boss"].text == "answer go"
    assert not [event for event in run.events if event.type == "TurnFailed"]


def test_multiple_forks_from_one_point() -> None:
    """Each fork has the history up to that point, and after it its own; neither they nor the run see of each other."""
    run = flow("a", "b?", "c").start(engine=script(), journal=":memory:")
    gate(run, "b")
    before = run.events
    forks = [run.fork("b"), run.fork("b")]
    assert len({run.id, *(fork.id for fork in forks)}) == 3
    for fork, words in zip(forks, ("left", "right"), strict=True):
        assert fork.events[: len(before)] == before
        fork.unpause()
        gate(fork, "b")
        fork.approve(output=words).wait(20)
    assert [fork["b"].text for fork in forks] == ["left", "right"]
    assert [fork["a"].text for fork in forks] == ["a1", "a1"]
    assert run.events == before
    run.approve().wait(20)
    assert run["b"].text == "b1"


def test_fork_does_not_apply_pending_writes() -> None:
    """What a turn of the run writes later is none of the fork's: there the turn was cut short, and runs anew."""
    go = threading.Event()
    at_work: list[str] = []

    @cm.agent("b")
    def b(turn: cm.Turn) -> str:
        at_work.append(turn.step)
        assert go.wait(20)
        return f"late {len(at_work)}"

    made = cm.Workflow("scenario", agents=[b], steps=[cm.step("a", prompt="Do a."), cm.step("b")])
    run = made.start(engine=script(), journal=":memory:")
    until(lambda: at_work, "b is at work")
    fork = run.fork("b")
    shared = fork.events
    go.set()
    run.wait(20)
    assert run["b"].text == "late 1"
    assert fork.events == shared
    assert [attempt.text for attempt in fork["b"].attempts] == [""]
    fork.unpause().wait(20)
    assert fork["b"].text == "late 2"
    assert turns(fork) == ["a", "b", "b"]
