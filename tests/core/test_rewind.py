"""Going back: in the run itself (rewind), and in a new one that shares its history (fork)."""

from __future__ import annotations

import os
import random
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import cm_notebook as cm
from cm_notebook.events import AnyEvent, Rewound, RunForked, RunPaused
from cm_notebook.journal import MIGRATIONS, Journal, MemoryJournal
from cm_notebook.run import runs
from cm_notebook.runstate import RunState
from cm_notebook.state import cut_all, next_actions
from cm_notebook.workflow import Parallel
from tests.core.driver import Driver, Reply, approve, folded, loop
from tests.core.five import SCRIPT, five_steps, outcome, policy
from tests.helpers import gate, until

LETTERS = "abcd"


def replies(**more: Any) -> cm.ScriptedEngine:
    return cm.ScriptedEngine({**{name: [f"{name} {n}" for n in range(1, 20)] for name in LETTERS}, **more})


def letters(steps: str = "a -> b -> c? -> d", **options: Any) -> cm.Workflow:
    return cm.Workflow("letters", agents=[cm.Agent(name, f"Be {name}.") for name in LETTERS], steps=steps, **options)


def start(journal: Any = None, workflow: cm.Workflow | None = None, **options: Any) -> cm.Run:
    """The letters, waiting at c."""
    run = (workflow or letters()).start(
        engine=replies(), journal=journal if journal is not None else MemoryJournal(), **options
    )
    gate(run)
    return run


def standing(run: cm.Run) -> dict[str, str]:
    return {step.id: step.status for step in run}


def finish(run: cm.Run) -> cm.Run:
    run.unpause()
    gate(run)
    return run.approve().wait(20)


# -- rewind ------------------------------------------------------------------------------------------------------------


def test_rewind_goes_back_and_waits() -> None:
    run = start()
    turns = len([event for event in run.events if event.type == "TurnStarted"])
    assert run.rewind("b") is run
    assert run.wait(10).status == "paused"
    assert standing(run) == {"a": "done", "b": "pending", "c": "pending", "d": "pending"}
    assert not run.gates
    assert len([event for event in run.events if event.type == "TurnStarted"]) == turns, "nothing runs"
    assert run["a"].text == "a 1", "what earlier steps gave stays"
    with pytest.raises(cm.GatePending):
        _ = run["b"].text
    assert [attempt.text for attempt in run["b"].attempts] == ["b 1"], "what was tried stays to be seen"
    assert finish(run).status == "completed"
    assert [run[name].text for name in LETTERS] == ["a 1", "b 2", "c 2", "d 1"]
    assert [attempt.number for attempt in run["b"].attempts] == [1, 2]


@pytest.mark.parametrize("end", ["completed", "stopped"])
def test_a_run_that_has_ended_can_be_rewound(end: str) -> None:
    run = start()
    run = run.approve().wait(10) if end == "completed" else run.stop().wait(10)
    assert run.status == end
    assert run.rewind("a").status == "paused"
    assert finish(run).status == "completed"
    assert run["d"].text == ("d 2" if end == "completed" else "d 1")


@pytest.mark.parametrize("driven", [True, False])
def test_a_run_of_another_process_is_rewound_as_it_is_taken_up(tmp_path: Path, driven: bool) -> None:
    run = start(tmp_path / "j.db").approve().wait(10)
    found = run if driven else cm.Run(run.id, Journal(tmp_path / "j.db"))
    if not driven:
        with pytest.raises(cm.TransitionError, match=r"is completed\. .*rewind='STEP'"):
            cm.resume(run.id, journal=found._journal)
    again = cm.resume(run.id, journal=found._journal, engine=replies(), rewind="b")
    assert again.wait(10).status == "paused"
    assert standing(again)["b"] == "pending"
    assert finish(again)["b"].text == "b 2"


@pytest.mark.parametrize("end", ["", "completed"])
def test_a_run_that_is_not_driven_here_is_told_to_go_back(tmp_path: Path, end: str) -> None:
    """Whoever drives it waits there; where nobody does, it is gone on with as it is taken up."""
    run = start(tmp_path / "j.db")
    if end:
        run.approve().wait(10)
    found = cm.Run(run.id, Journal(tmp_path / "j.db"))
    with pytest.raises(cm.TransitionError, match="there is no step 'nobody'"):
        found.rewind("nobody")
    assert found.rewind("b").status == "paused"
    until(lambda: run.status == "paused", "the driver to hear of it")
    assert standing(run) == {"a": "done", "b": "pending", "c": "pending", "d": "pending"}
    again = cm.resume(run.id, journal=found._journal, engine=replies()) if end else run.unpause()
    gate(again)
    assert [attempt.text for attempt in again["b"].attempts] == ["b 1", "b 2"]
    again.stop()


def test_what_runs_is_cut_short() -> None:
    run = letters().start(engine=replies(b=[cm.Reply("late", delay_s=60), "b 2"]), journal=MemoryJournal())
    until(lambda: run["b"].status == "running", "b to run")
    run.rewind("a")
    assert run.wait(10).status == "paused"
    assert run["b"].attempts[0].cut_short == "back to a"
    run.stop()


def test_a_step_is_edited_before_the_run_goes_on() -> None:
    run = start()
    run.rewind("b")
    assert run["b"].prompt == "Be b.\n\n## Output of a\n\na 1", "the exact prompt that would be sent"
    run.replace(cm.step("b", prompt="Be brief, {{ a }}."))
    assert run.status == "paused"
    assert run["b"].prompt == "Be brief, a 1."
    assert finish(run)["b"].prompt == "Be brief, a 1."
    assert not any(step.stale for step in run)


@pytest.mark.parametrize("paused", [True, False])
def test_what_waits_is_made_again_when_an_earlier_step_was_edited_meanwhile(paused: bool) -> None:
    run = start()
    if paused:
        run.pause()
    waits = run.gates[0]
    run.replace(cm.step("b", prompt="Be better, {{ a }}."))
    if paused:
        run.unpause()
    gate(run, "b")
    assert run.gates[0].id == waits.id, "it may still be kept"
    run.retry("b")
    until(lambda: len(run["c"].attempts) == 2 and run.gates, "c to be made again")
    with pytest.raises(cm.AlreadyDecided, match="is closed"):
        run.decide(waits.id, cm.Decision(action="approve"))
    assert run["c"].prompt.endswith("b 2"), "what is approved is built on what there is"
    assert run.approve("c").wait(10).status == "completed"
    assert [attempt.text for attempt in run["c"].attempts] == ["c 1", "c 2"]


REFUSED = [
    ("nobody", "there is no step 'nobody'"),
    ("d", "step 'd' has not run yet; 'c' comes first"),
]


@pytest.mark.parametrize(("step", "words"), REFUSED)
@pytest.mark.parametrize("how", ["rewind", "fork"])
def test_where_nobody_can_go_back_to_is_said(step: str, words: str, how: str) -> None:
    run = start()
    before = run.events
    with pytest.raises(cm.TransitionError, match=words):
        getattr(run, how)(step)
    assert run.events == before
    assert run.status == "waiting"
    assert runs(run._journal) == [run]


@pytest.mark.parametrize("how", ["rewind", "fork"])
@pytest.mark.parametrize("name", ["a", "team/a#1"])
def test_who_works_in_a_step_has_no_place_to_go_back_to(how: str, name: str) -> None:
    steps = [Parallel(members=["a", "b"], id="team", prompt="Work."), cm.step("c", interactive=True)]
    run = start(workflow=letters(steps=steps))  # type: ignore[arg-type]
    with pytest.raises(cm.TransitionError, match=r"is called by 'team'.*name 'team'"):
        getattr(run, how)(name)


def test_back_in_a_loop_it_is_the_pass_that_it_was_in() -> None:
    @cm.agent("gate")
    def judge(turn: cm.Turn) -> cm.Verdict:
        if turn.attempt == 2:
            turn.ask_human("Is it?")  # never answered
        return cm.Verdict(action="loop" if turn.attempt == 1 else "continue", reason="too long")

    agents = [cm.Agent("make", "Make it."), judge, cm.Agent("end", "End.")]
    flow = cm.Workflow("l", agents=agents, steps="make -> gate(loop 1, max 5) -> end?")
    script = {"make": ["m1", "m2", "m3", "m4"], "end": ["e"] * 3}
    run = flow.start(engine=cm.ScriptedEngine(script), journal=MemoryJournal())
    assert gate(run).kind == "question"
    run.rewind("make")
    assert "too long" in run["make"].prompt, "why it was sent back is said again"
    run.unpause()
    gate(run, "end")
    assert [attempt.iteration for attempt in run["make"].attempts] == [1, 2, 2]
    run.rewind("make")
    assert "too long" not in run["make"].prompt, "the loop was over: it begins anew"
    assert run.state.steps["make"].iteration == 1
    run.stop()


def test_a_step_that_runs_once_runs_again_when_somebody_went_back_to_it() -> None:
    steps = [cm.step("a", execute_once=True), cm.step("b", interactive=True)]
    run = start(workflow=letters(steps=steps))
    run.rewind("a").unpause()
    until(lambda: run.gates and len(run["a"].attempts) == 2, "the second attempt")
    run.stop()


def test_a_prompt_that_a_person_approves_is_asked_about_again() -> None:
    flow = letters(steps=[cm.step("a"), cm.step("b", interactive=True, gate="before"), cm.step("c", interactive=True)])
    run = start(workflow=flow)
    assert gate(run).kind == "start"
    assert run["b"].prompt == "Be b.\n\n## Output of a\n\na 1", "what waits to be sent"
    run.approve()
    gate(run, "c")
    run.rewind("b").unpause()
    opened = gate(run)
    assert (opened.kind, opened.step) == ("start", "b")
    run.approve(output="Be better.")
    gate(run, "c")
    assert run["b"].prompt == "Be better."
    assert run["c"].prompt == "Be c.\n\n## Output of b\n\nb 2"
    run.stop()


def test_the_prompt_of_a_step_that_is_far_away_is_its_template() -> None:
    run = start(workflow=letters(steps=[cm.step("a", interactive=True), cm.step("b", prompt="On {{ a }}.")]))
    assert run["b"].prompt == "On {{ a }}."
    run.stop()


# -- fork --------------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["memory", "file"])
def journal(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    return MemoryJournal() if request.param == "memory" else Journal(tmp_path / "j.db")


def test_a_fork_shares_the_history_and_is_a_run_of_its_own(journal: Any) -> None:
    run = start(journal)
    before = run.events
    fork = run.fork("b")
    assert cm.current() is fork
    assert fork.id != run.id
    assert fork.status == "paused"
    assert standing(fork) == {"a": "done", "b": "pending", "c": "pending", "d": "pending"}
    assert run.events == before, "the run itself is not touched"
    assert (run.status, gate(run).step) == ("waiting", "c")
    assert fork.events[: len(before)] == before
    assert [event.type for event in fork.events[len(before) :]] == ["RunForked", "Rewound"]
    assert [event.seq for event in fork.events] == list(range(1, len(fork.events) + 1))
    assert finish(fork).status == "completed"
    assert run.approve().wait(10).status == "completed"
    assert [run[name].text for name in LETTERS] == ["a 1", "b 1", "c 1", "d 1"]
    assert [fork[name].text for name in LETTERS] == ["a 1", "b 2", "c 2", "d 1"]
    assert run.id in {gate_id.split("/")[0] for gate_id in run.state.decisions}
    assert {gate_id.split("/")[0] for gate_id in fork.state.decisions} == {fork.id}
    for one in (run, fork):
        assert cm.Run.open(one.id, journal).events == one.events
        assert folded(one.events) == one.state
    assert [one.id for one in runs(journal)] == [fork.id, run.id]


def test_a_gate_of_the_run_is_none_of_the_forks() -> None:
    run = start()
    theirs = run.gates[0].id
    fork = run.fork("c")
    with pytest.raises(cm.TransitionError, match=f"is a gate of run '{run.id}', and this is run '{fork.id}'"):
        fork.decide(theirs, cm.Decision(action="approve"))
    fork.unpause()
    assert gate(fork).id.startswith(f"{fork.id}/c/2/")
    run.approve().wait(10)
    assert fork.gates, "answering one never touches the other"
    fork.stop()


def test_forks_of_one_point_and_of_a_fork(journal: Any) -> None:
    run = start(journal)
    one, two = run.fork("b"), run.fork("b")
    finish(one)
    three = one.fork("c")
    finish(three)
    finish(two)
    run.stop().wait(10)
    late = run.fork("a")
    assert [fork["b"].text for fork in (one, two, three)] == ["b 2", "b 2", "b 2"]
    assert three["c"].text == "c 3"
    assert three.state.origin is not None
    assert three.state.origin.run == one.id
    for parent, fork in ((run, one), (run, two), (one, three), (run, late)):
        shared = fork.state.origin.seq  # type: ignore[union-attr]
        assert fork.events[:shared] == parent.events[:shared]
        assert [event.seq for event in fork.events] == list(range(1, len(fork.events) + 1))
        for after in range(0, len(fork.events) + 1, 3):
            assert journal.events(fork.id, after) == fork.events[after:]
        assert folded(fork.events) == fork.state


def test_what_runs_goes_on_in_the_run_and_not_in_the_fork() -> None:
    engine = replies(b=[cm.Reply("b 1", delay_s=0.4), "b 2"])
    run = letters().start(engine=engine, journal=MemoryJournal())
    until(lambda: run["b"].status == "running", "b to run")
    fork = run.fork("b")
    assert fork["b"].attempts[0].cut_short == f"it goes on in run {run.id}, not in this fork"
    gate(run)
    assert run["b"].text == "b 1"
    assert fork.status == "paused"
    run.stop()
    fork.stop()


def test_a_fork_of_a_run_that_another_journal_object_drives(tmp_path: Path) -> None:
    """As another process has it: no lease of the run is taken, and its functions are given."""
    seen: list[str] = []

    @cm.agent("b")
    def b(turn: cm.Turn) -> str:
        seen.append(turn.prompt)
        return "from the function"

    flow = cm.Workflow("f", agents=[cm.Agent("a", "Be a."), b, cm.Agent("c", "Be c.")], steps="a -> b -> c?")
    run = start(Journal(tmp_path / "j.db"), flow)
    other = cm.Run.open(run.id, Journal(tmp_path / "j.db"))
    assert other is not run or os.path.realpath(run._journal.path) == other._journal.path
    read = cm.Run(run.id, Journal(tmp_path / "j.db"))
    with pytest.raises(cm.WorkflowError, match=r"Pass it: run\.fork\('b', agents=\[b\]\)"):
        read.fork("b")
    fork = read.fork("b", agents=[b], engine=replies())
    fork.unpause()
    gate(fork)
    assert fork["b"].text == "from the function"
    assert len(seen) == 2
    assert run.status == "waiting"
    fork.stop()
    run.stop()


def test_a_fork_by_an_edited_definition() -> None:
    run = start()
    edited = letters(steps=[cm.step("a"), cm.step("b", prompt="Other words."), cm.step("c", interactive=True)])
    fork = run.fork("b", edited)
    assert fork["b"].prompt == "Other words.\n\n## Output of a\n\na 1"
    assert [step.id for step in fork] == ["a", "b", "c"]
    assert [step.id for step in run] == ["a", "b", "c", "d"]
    with pytest.raises(cm.WorkflowError, match="'a' has run and is renamed"):
        run.fork("b", letters(steps=[cm.step("x", prompt="x"), *edited.steps[1:]]))
    assert len(runs(run._journal)) == 2, "there is no half of a fork"
    fork.stop()
    run.stop()


def test_what_was_used_before_does_not_count_against_a_fork() -> None:
    def paid(name: str) -> list[cm.Reply]:
        return [cm.Reply(f"{name} {n}", usage=cm.Usage(input_tokens=10, output_tokens=5)) for n in range(1, 9)]

    run = letters().start(
        engine=cm.ScriptedEngine({name: paid(name) for name in LETTERS}), journal=MemoryJournal(), max_turns=3
    )
    gate(run)
    fork = run.fork("b")
    assert fork.usage == run.usage, "of the whole history"
    assert fork.state.origin is not None
    assert fork.state.origin.usage == run.usage
    assert fork.state.budget.used["max_turns"] == 0
    fork.unpause()
    gate(fork).step  # noqa: B018
    fork.approve()
    assert fork.wait(10).status == "completed", "three turns of its own"
    small = run.fork("a", max_turns=1)
    small.unpause()
    assert gate(small).kind == "budget"
    small.stop()
    run.stop()


def test_a_fork_works_in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folders: list[Path] = []

    @cm.agent("a")
    def a(turn: cm.Turn) -> str:
        folders.append(turn.workspace)
        return "done"

    flow = cm.Workflow("w", agents=[a, cm.Agent("c", "x")], steps="a -> c?")
    run = start(workflow=flow, workspace=tmp_path / "mine")
    for fork in (run.fork("a"), run.fork("a", workspace=tmp_path / "named")):
        fork.unpause()
        gate(fork)
        fork.stop()
    assert folders[0] == tmp_path / "mine"
    assert folders[1].parent.name == "work"
    assert folders[2] == tmp_path / "named"
    run.stop()


def test_two_runs_are_compared() -> None:
    run = start()
    fork = run.fork("b")
    fork.unpause()
    gate(fork)
    assert fork.diff(run, "a") == "No changes.\n"
    assert "-b 1\n+b 2" in fork.diff(run, "b")
    said = fork.diff(run)
    assert f"fork at b {fork.id}" in said
    assert [line.split()[-1] for line in said.splitlines()[1:4]] == ["same", "different", "different"]
    with pytest.raises(cm.TransitionError, match="neither run has a step 'x'"):
        fork.diff(run, "x")
    run.stop()
    fork.stop()


# -- journals ----------------------------------------------------------------------------------------------------------


def test_a_journal_of_version_1_is_brought_up_and_forked(tmp_path: Path) -> None:
    run = start(tmp_path / "j.db").approve().wait(10)
    events = run.events
    run._journal.close()
    old = tmp_path / "old.db"
    with sqlite3.connect(tmp_path / "j.db") as now, sqlite3.connect(old) as made:
        for statement in MIGRATIONS[0]:
            made.execute(statement)
        columns = "no, id, name, notebook, created_at"
        made.executemany("INSERT INTO runs VALUES (?, ?, ?, ?, ?)", now.execute(f"SELECT {columns} FROM runs"))
        made.executemany("INSERT INTO events VALUES (?, ?, ?, ?)", now.execute("SELECT * FROM events"))
        made.execute(f"PRAGMA application_id={now.execute('PRAGMA application_id').fetchone()[0]}")
        made.execute("PRAGMA user_version=1")
    for connection in (now, made):
        connection.close()
    journal = Journal(old)
    found = cm.Run(run.id, journal)
    assert found.events == events
    fork = found.fork("b", engine=replies())
    assert finish(fork)["b"].text == "b 2"
    with sqlite3.connect(old) as made:
        assert made.execute("PRAGMA user_version").fetchone() == (len(MIGRATIONS),)
        own, all_of_it = len(fork.events) - len(events), made.execute("SELECT count(*) FROM events").fetchone()[0]
    made.close()
    assert all_of_it == len(events) + own, "nothing is copied"


FORKING = """
import sys
import cm_notebook as cm
from tests.core.five import SCRIPT, five_steps, policy
run = cm.Run.open(sys.argv[1], "j.db")
fork = run.fork("implementer", engine=cm.ScriptedEngine(SCRIPT), on_gate=policy)
print(fork.id, flush=True)
fork.unpause()
fork.wait(60)
print("end", flush=True)
"""


@pytest.mark.slow
def test_kill_9_around_a_fork(tmp_path: Path) -> None:
    """A fork is there as a whole or not at all; it can be resumed, and the run is as it was."""
    run = five_steps().start(engine=cm.ScriptedEngine(SCRIPT), journal=tmp_path / "j.db", on_gate=policy).wait(20)
    before, chance = run.events, random.Random(7)
    root = Path(__file__).parents[2]
    for _ in range(12):
        known = {one.id for one in runs(tmp_path / "j.db")}
        env = {**os.environ, "PYTHONPATH": str(root)}
        command = [sys.executable, "-c", FORKING, run.id]
        with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=tmp_path, env=env) as child:
            if chance.random() < 0.5:
                child.stdout.readline()  # type: ignore[union-attr]
            try:
                child.wait(chance.uniform(0.0, 0.6))
            except subprocess.TimeoutExpired:
                child.kill()
        assert run.events == before
        for id in {one.id for one in runs(tmp_path / "j.db")} - known:
            fork = cm.Run.open(id, tmp_path / "j.db")
            assert fork.events[: len(before)] == before
            if fork.status != "completed":
                fork = cm.resume(id, journal=tmp_path / "j.db", engine=cm.ScriptedEngine(SCRIPT), on_gate=policy)
            assert fork.wait(20).status == "completed"
            assert outcome(fork).keys() == outcome(run).keys()


# -- whatever was before -----------------------------------------------------------------------------------------------


def some_run(shape: int, paid: bool) -> Driver:
    """A run that loops, asks, fails, calls a team, has chained prompts."""
    steps: list[Any] = [
        cm.step("a", prompt=["one", "two"], interactive=True),
        cm.step("b", prompt="{{ a }}", idempotent=shape % 2 == 0, gate="both", interactive=True),
        Parallel(members=["p", "q"], id="team", prompt="work"),
        cm.module("judge", prompt="judge", loop_steps=2, loop_max_iterations=2),
        cm.step("z", prompt="{{ previous }}", execute_once=True, context="all"),
    ]
    agents = [cm.Agent(name, "x") for name in ("a", "b", "p", "q", "judge", "z", "m0", "m1")]
    limits = {"max_turns": 6} if paid else {}

    def script(driver: Driver, step: Any) -> Reply:
        n = driver.said_by(step.step.agent)
        if step.id == "judge":
            return loop("more") if n % 3 < 2 else Reply("good", cm.Verdict(action="continue"))
        if step.id == "b":
            return Reply(f"b {n}", calls=("m0 'x' & m1 'y'",), ask=("Which?",), cost_usd=0.5)
        return Reply(f"{step.id} {n}", error="no" if (step.id, n) == ("p", 0) else None, cost_usd=0.25)

    flow = cm.Workflow("R", steps=steps, agents=agents, sub_agents=["m0", "m1"], max_concurrency=2, **limits)
    return Driver(flow, script, policy=approve)


def prefix(driver: Driver, events: list[AnyEvent]) -> Driver:
    return Driver(None, driver.script, policy=approve, events=events)


WHOLE: dict[tuple[int, bool], Driver] = {}


def whole(shape: int, paid: bool) -> Driver:
    key = shape, paid
    if key not in WHOLE:
        WHOLE[key] = some_run(shape, paid).go()
    return WHOLE[key]


def check_back(state: RunState, to: str) -> None:
    at = state.steps[to].index
    assert state.paused
    assert state.status == "paused" or state.gates
    assert not state.running
    assert not state.calls
    assert state.cursor <= at
    for step in state.order[at:]:
        assert step.status == "pending" or (step.due is not None and step.due.kind == "may_have_run"), step.id
        assert step.approved is None
        assert step.gate is None
    assert state.steps[to].status == "pending"


@settings(deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))
@given(st.integers(0, 1), st.booleans(), st.floats(0, 1), st.integers(0, 4), st.booleans())
def test_back_from_wherever_it_was(shape: int, paid: bool, where: float, step: int, forks: bool) -> None:
    """At any moment of a run: nothing is lost, nothing runs by itself, it comes to its end, and replay is the same."""
    made = whole(shape, paid)
    cut = 1 + int(where * (len(made.events) - 1))
    driver = prefix(made, made.events[:cut])
    to = driver.state.order[step].id
    if driver.state.steps[to].status == "pending" and step > driver.state.cursor:
        return  # it has not come there yet
    before, tried = list(driver.events), {one.id: len(one.attempts) for one in driver.state.order}
    texts = {one.id: driver.text(one.id) for one in driver.state.order[:step]}
    if forks:
        cuts = cut_all(driver.state, "forked")
        driver.record(RunForked(run_id="f", of="r", step=to))
        assert not driver.state.gates
    else:
        if driver.state.ended is not None:
            driver.cut()
        cuts = cut_all(driver.state, "back")
    for event in (*cuts, Rewound(to=to, later=True, afresh=True)):
        driver.record(event)
    check_back(driver.state, to)
    assert driver.events[: len(before)] == before
    assert {one.id: len(one.attempts) for one in driver.state.order} == tried
    assert {one.id: driver.text(one.id) for one in driver.state.order[:step]} == texts
    if driver.state.cursor == step and not driver.state.gates:
        assert not [one for one in next_actions(driver.state) if getattr(one, "not_before", None) is None]
    driver.refused(RunPaused(), cm.TransitionError)
    driver.unpause()
    assert driver.state.ended == "completed"
    assert folded(driver.events) == driver.state
    if forks:
        opened = [event.gate.id for event in driver.events[len(before) :] if event.type == "GateOpened"]
        assert all(id.startswith("f/") for id in opened)
