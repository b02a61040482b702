"""Going on from a journal: cut after every event, with edits, and with the process really killed."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import cm_notebook as cm
from cm_notebook import driving
from cm_notebook.events import AnyEvent
from cm_notebook.journal import MemoryJournal
from tests.core.five import SCRIPT, five_steps, outcome, policy, whole
from tests.helpers import gate, until

WHOLE = 30


def test_the_five_steps_have_as_many_events_as_are_cut() -> None:
    assert len(whole().events) == WHOLE


@pytest.mark.parametrize("cut", range(1, WHOLE))
def test_cut_after_every_event_it_ends_the_same(cut: int) -> None:
    run = whole()
    journal, kept = MemoryJournal(), [event.model_copy(deep=True) for event in run.events[:cut]]
    journal.create(run.id, "five", None)
    journal.commit(run.id, kept)
    again = cm.resume(run.id, five_steps(), journal=journal, engine=cm.ScriptedEngine(SCRIPT), on_gate=policy).wait(20)
    assert outcome(again) == outcome(run)
    assert _finished(again.events) == _finished(run.events), "each turn's answer counts once"
    assert again.events[:cut] == kept
    assert _answered_once(again.events)


def _finished(events: list[AnyEvent]) -> list[tuple[str, str]]:
    return [(event.step, event.text) for event in events if event.type == "TurnFinished"]


def _answered_once(events: list[AnyEvent]) -> bool:
    decided = [event.gate_id for event in events if event.type == "GateDecided"]
    return len(decided) == len(set(decided))


def test_resuming_what_is_driven_here_gives_the_same_run(tmp_path: Path) -> None:
    run = five_steps().start(engine=cm.ScriptedEngine(SCRIPT), journal=tmp_path / "j.db")
    gate(run)
    assert cm.resume(run.id, journal=tmp_path / "j.db") is run


def test_a_handle_from_before_the_stop_says_who_drives_the_run_now(tmp_path: Path) -> None:
    run = five_steps().start(engine=cm.ScriptedEngine(SCRIPT), journal=tmp_path / "j.db")
    gate(run)
    run.stop().wait(10)
    again = cm.resume(run.id, five_steps(), journal=tmp_path / "j.db", engine=cm.ScriptedEngine(SCRIPT))
    gate(again)
    with pytest.raises(cm.TransitionError, match=r"driven elsewhere, .* or by the run that cm\.resume returned"):
        run.wait(10)
    again.stop()


def test_a_completed_run_is_not_resumed() -> None:
    run = whole()
    for ask in (run.pause, run.unpause):
        with pytest.raises(cm.TransitionError, match="is completed: there is nothing left"):
            ask()
    with pytest.raises(cm.TransitionError, match=r"is completed\. Start a new one"):
        cm.resume(run.id, journal=run._journal)


def test_an_input_given_at_the_start_outlives_the_default() -> None:
    agents = [cm.Agent("a", "Say {{ word }}."), cm.Agent("b", "y")]
    flow = cm.Workflow("i", agents=agents, steps="a -> b?", inputs={"word": "default"})
    journal = MemoryJournal()
    run = flow.start({"word": "given"}, engine=cm.ScriptedEngine({"a": ["1"], "b": ["2"]}), journal=journal)
    gate(run)
    run.stop().wait(10)
    again = cm.resume(run.id, flow, journal=journal, engine=cm.ScriptedEngine({"b": ["2"]}))
    assert gate(again).step == "b", "nothing is stale"
    assert again.state.inputs == {"word": "given"}


def reader(seen: list[Any]) -> cm.Agent:
    @cm.agent("reader")
    def reads(turn: cm.Turn) -> str:
        seen.append(dict(turn.inputs))
        return "read"

    return reads


def test_inputs_that_only_a_function_reads_are_kept() -> None:
    """They are in the journal, so the next process has them too; a default that did not change overrides nothing."""
    seen: list[Any] = []

    def flow(word: str) -> cm.Workflow:
        return cm.Workflow("f", agents=[reader(seen)], steps="reader?", inputs={"word": word, "other": 1})

    journal = MemoryJournal()
    run = flow("first").start(journal=journal)
    gate(run)
    run.revise(flow("second"))
    run.reject("again")
    until(lambda: len(seen) == 2 and run.gates, "the second attempt")
    run.stop().wait(10)
    again = cm.resume(run.id, flow("second"), inputs={"other": 2}, journal=journal)
    gate(again)
    again.stop().wait(10)
    last = cm.resume(run.id, flow("second"), journal=journal)
    gate(last)
    last.reject("once more")
    until(lambda: len(seen) == 3, "the third attempt")
    assert [turn["word"] for turn in seen] == ["first", "second", "second"]
    assert seen[2] == {"word": "second", "other": 2}
    last.revise(flow("first"))
    assert last.state.inputs == {"word": "first", "other": 2}, "also back to what it was"
    assert not last["reader"].stale
    last.stop()


@pytest.mark.parametrize("how", ["revise", "resume"])
def test_autonomy_defined_anew_takes_effect(how: str) -> None:
    def flow(mode: Any) -> cm.Workflow:
        agents = [cm.Agent(name, "x") for name in "abc"]
        return cm.Workflow("m", agents=agents, steps="a? -> b -> c", autonomous_mode=mode)

    journal, engine = MemoryJournal(), cm.ScriptedEngine({"a": ["1"], "b": ["2"], "c": ["3"]})
    run = flow("always").start(engine=engine, journal=journal)
    gate(run)
    if how == "revise":
        run.revise(flow("never"))
    else:
        run.stop().wait(10)
        run = cm.resume(run.id, flow("never"), journal=journal, engine=engine)
        gate(run)
    run.approve("a")
    assert gate(run).step == "b", "every step pauses"
    assert cm.Run(run.id, journal).state.locked == "never"
    before = run.events
    run.revise(flow("never"))
    assert run.events == before, "nothing is different"
    run.stop()


def test_inputs_may_be_given_without_a_definition() -> None:
    flow = cm.Workflow("i", agents=[cm.Agent("a", "Say {{ word }}.")], steps="a?", inputs={"word": "one"})
    run = flow.start(engine=cm.ScriptedEngine({"a": ["1", "2"]}), journal=MemoryJournal())
    gate(run)
    run.set_mode("step-by-step")
    run.go_on(inputs={"word": "two"})
    assert run.mode == "step-by-step", "what nobody defined anew is as it was"
    until(lambda: run.gates and run["a"].prompt == "Say two.", "what waits to be made again")
    run.stop()


def test_an_input_that_nothing_reads_is_refused_as_at_the_start() -> None:
    flow = cm.Workflow("i", agents=[cm.Agent("a", "Say {{ word }}.")], steps="a?", inputs={"word": "one"})
    journal = MemoryJournal()
    run = flow.start(journal=journal)
    gate(run)
    run.stop()
    with pytest.raises(cm.WorkflowError, match="no prompt uses the input 'wrod'"):
        cm.resume(run.id, inputs={"wrod": "two"}, journal=journal)
    with pytest.raises(cm.WorkflowError, match="no prompt uses the input 'wrod'"):
        run.fork("a", inputs={"wrod": "two"})
    again = cm.resume(run.id, inputs={"word": "two"}, journal=journal)
    assert gate(again).kind == "review"
    again.stop()


@pytest.mark.parametrize("edited", [False, True])
def test_what_a_crash_cut_short_says_so(edited: bool) -> None:
    run = whole()
    started = next(event.seq for event in run.events if event.type == "TurnStarted")
    journal = MemoryJournal()
    journal.create(run.id, "five", None)
    journal.commit(run.id, [event.model_copy(deep=True) for event in run.events[:started]])
    flow = five_steps()
    flow.agents[0].prompt += " Be quick." if edited else ""
    again = cm.resume(run.id, flow, journal=journal, engine=cm.ScriptedEngine(SCRIPT), on_gate=policy)
    assert again["researcher"].attempts[0].cut_short == "the process that drove it had ended"
    assert again.wait(20).status == "completed"


def _stopped_at_deployer() -> tuple[cm.Run, Any]:
    journal = MemoryJournal()
    run = five_steps().start(engine=cm.ScriptedEngine(SCRIPT), journal=journal, on_gate=policy, until="implementer")
    return run.wait(20).stop().wait(20), journal


def test_an_edited_step_is_stale_and_the_choice_is_a_gate() -> None:
    run, journal = _stopped_at_deployer()
    edited = five_steps()
    edited.agents[0].prompt = "Be another researcher."
    again = cm.resume(
        run.id, edited, journal=journal, engine=cm.ScriptedEngine({**SCRIPT, "researcher": ["facts", "more"]})
    )
    stale = gate(again)
    assert (stale.kind, stale.step) == ("stale", "researcher")
    again.retry()
    assert gate(again).step == "planner"
    assert again["researcher"].text == "more"


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        (
            "planner? -> implementer -> quality-gate(loop 1, max 5) -> deployer?",
            "'researcher' has run and is no longer",
        ),
        ("planner? -> researcher -> implementer -> quality-gate(loop 1) -> deployer?", "stands elsewhere now"),
    ],
)
def test_what_has_run_cannot_be_deleted_or_moved(steps: str, words: str) -> None:
    run, journal = _stopped_at_deployer()
    edited = cm.Workflow("five", agents=five_steps().agents, steps=steps)
    before = run.events
    with pytest.raises(cm.WorkflowError, match=words) as refused:
        cm.resume(run.id, edited, journal=journal, engine=cm.ScriptedEngine(SCRIPT))
    assert "--new" in str(refused.value)
    assert run.events == before
    cm.resume(run.id, five_steps(), journal=journal, engine=cm.ScriptedEngine(SCRIPT), on_gate=policy).wait(20)


@pytest.mark.parametrize("how", ["resume", "revise", "go_on"])
def test_a_renamed_step_is_named_before_the_template_that_misses_it(how: str) -> None:
    def flow(first: str, last: str) -> cm.Workflow:
        steps = [cm.step(first, prompt="x"), cm.step("b", prompt="on {{ a }}", interactive=True)]
        return cm.Workflow("w", steps=[*steps, cm.step(last, prompt="z")])

    script = {"a": ["1"], "b": ["2", "3"], "end": ["4"]}
    run = flow("a", "z").start(engine=cm.ScriptedEngine(script), journal=MemoryJournal())
    gate(run)
    if how == "resume":
        run.stop().wait(10)

    def go_on(workflow: cm.Workflow) -> cm.Run:
        if how == "resume":
            return cm.resume(run.id, workflow, journal=run._journal, engine=cm.ScriptedEngine(script))
        if how == "revise":
            run.revise(workflow)
            return run
        return run.go_on(workflow)

    with pytest.raises(cm.WorkflowError, match="step 'a' has run and is renamed to 'plan'"):
        go_on(flow("plan", "z"))
    again = go_on(flow("a", "end"))
    gate(again)
    again.approve()
    assert again.wait(10)["end"].text == "4", "a step that has not run may have another name"


def test_a_new_step_stands_where_the_definition_has_it() -> None:
    run, journal = _stopped_at_deployer()
    edited = cm.Workflow(
        "five",
        agents=[*five_steps().agents, cm.Agent("x", "x"), cm.Agent("y", "y")],
        steps="x -> researcher -> planner? -> implementer -> y -> quality-gate(loop 1, max 5) -> deployer?",
    )
    again = cm.resume(run.id, edited, journal=journal, engine=cm.ScriptedEngine({**SCRIPT, "x": ["1"], "y": ["2"]}))
    assert [step.id for step in again] == [item.id for item in edited.executable]
    again.stop()


def test_a_function_must_be_given_again() -> None:
    @cm.agent("judge")
    def judge(turn: cm.Turn) -> str:
        return "fine"

    flow = cm.Workflow("f", agents=[judge], steps="judge?")
    run = flow.start(journal=MemoryJournal())
    gate(run)
    run.stop().wait(10)
    with pytest.raises(cm.WorkflowError, match=r"'judge' is a Python function.*agents=\[judge\]"):
        cm.resume(run.id, journal=run._journal)
    again = cm.resume(run.id, journal=run._journal, agents=[judge])
    gate(again)
    again.approve()
    assert again.wait(10).status == "completed"


def test_a_function_is_needed_only_where_the_definition_has_it() -> None:
    def function(id: str) -> cm.Agent:
        return cm.agent(id)(lambda turn: id)

    a, b, c = map(function, "abc")
    run = cm.Workflow("f", agents=[a, b, c], steps="a -> b? -> c").start(journal=MemoryJournal())
    gate(run)
    run.stop().wait(10)
    with pytest.raises(cm.WorkflowError, match="step 'a' has run and is no longer in the workflow"):
        cm.resume(run.id, cm.Workflow("f", agents=[b, c], steps="b? -> c"), journal=run._journal)
    again = cm.resume(run.id, cm.Workflow("f", agents=[a, b], steps="a -> b?"), journal=run._journal)
    gate(again)
    again.approve()
    assert again.wait(10).status == "completed", "a step that has not run may be deleted, with its agent"


def test_what_must_not_run_twice_asks_first() -> None:
    flow = cm.Workflow("i", agents=[cm.Agent("a", "x")], steps=[cm.step("a", idempotent=False)])
    run = flow.start(engine=cm.ScriptedEngine({"a": [cm.Reply("sent", delay_s=30)]}), journal=MemoryJournal())
    until(lambda: run["a"].status == "running", "the turn to run")
    run.stop().wait(10)
    again = cm.resume(run.id, journal=run._journal, engine=cm.ScriptedEngine({"a": ["sent again"]}))
    opened = gate(again)
    assert opened.kind == "may_have_run"
    again.approve()
    assert again.wait(10)["a"].text == ""
    assert len(again["a"].attempts) == 1


@pytest.mark.parametrize("edited", ["prompt", "input"])
def test_what_must_not_run_twice_asks_first_after_an_edit_too(edited: str) -> None:
    ran = threading.Semaphore(0)

    @cm.agent("pay")
    def pay(turn: cm.Turn) -> str:
        ran.release()
        if turn.attempt == 1:
            turn.ask_human("Which?")  # never answered
        return "paid"

    def flow(words: str, amount: int) -> cm.Workflow:
        steps = [cm.step("pay", prompt=f"{words} {{{{ amount }}}}", idempotent=False)]
        return cm.Workflow("i", agents=[pay], steps=steps, inputs={"amount": amount})

    run = flow("Pay", 1).start(journal=MemoryJournal())
    assert gate(run).kind == "question"
    run.stop().wait(10)
    other = ("Transfer", 1) if edited == "prompt" else ("Pay", 2)
    again = cm.resume(run.id, flow(*other), journal=run._journal)
    assert gate(again).kind == "may_have_run"
    again.revise(flow("Send", 3))
    assert gate(again).kind == "may_have_run"
    assert ran.acquire(blocking=False)
    assert not ran.acquire(blocking=False), "it ran again unasked"
    again.retry()
    assert again.wait(10)["pay"].prompt == "Send 3"


def test_an_answer_given_before_the_crash_is_not_asked_for_again() -> None:
    asked = []

    @cm.agent("asker")
    async def asker(turn: cm.Turn) -> str:
        asked.append(turn.attempt)
        port = await turn.ask_human("Which port?")
        if turn.attempt == 1:
            await asyncio.sleep(60)
        return f"port {port}"

    flow = cm.Workflow("ask", agents=[asker], steps="asker")
    run = flow.start(journal=MemoryJournal())
    gate(run)
    run.answer("8080")
    run.stop().wait(10)
    again = cm.resume(run.id, flow, journal=run._journal).wait(10)
    assert again["asker"].text == "port 8080"
    assert asked == [1, 2]


def test_an_answer_given_before_the_crash_is_asked_for_again_after_a_rejection() -> None:
    @cm.agent("asker")
    async def asker(turn: cm.Turn) -> str:
        port = await turn.ask_human("Which port?")
        if turn.attempt == 1:
            await asyncio.sleep(60)
        return f"port {port}"

    flow = cm.Workflow("ask", agents=[asker], steps="asker?")
    run = flow.start(journal=MemoryJournal())
    gate(run)
    run.answer("8080")
    run.stop().wait(10)
    again = cm.resume(run.id, flow, journal=run._journal)
    assert gate(again).kind == "review"
    again.reject("another one")
    until(lambda: again.gates and again.gates[0].kind == "question", "the question")
    again.answer("9090")
    until(lambda: again.gates and again.gates[0].kind == "review", "the review")
    assert again["asker"].attempts[-1].text == "port 9090"
    again.stop()


# -- killed ----------------------------------------------------------------------------------------------------------

CHILD = """
import sys, cm_notebook as cm
from tests.core.five import SCRIPT, five_steps, policy
slow = {name: [cm.Reply(text, delay_s=0.004) for text in texts] for name, texts in SCRIPT.items()}
path, run_id = sys.argv[1], sys.argv[2]
engine = cm.ScriptedEngine(slow)
if run_id == "-":
    run = five_steps().start(engine=engine, journal=path, on_gate=policy)
else:
    run = cm.resume(run_id, five_steps(), journal=path, engine=engine, on_gate=policy)
print(run.id, flush=True)
for event in run.events:
    pass
run.wait(60)
print("end", flush=True)
"""


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_kill_9_at_random_points_loses_nothing_and_repeats_nothing(tmp_path: Path) -> None:
    """A hundred real kills; after each, what was on disk before is still there, in the same order."""
    seed = random.randrange(2**32)
    chance, kills, runs = random.Random(seed), 0, 0
    root = str(Path(__file__).parents[2])
    env = {**os.environ, "PYTHONPATH": root}
    uncut = whole()
    expected = outcome(uncut)
    while kills < 100:
        runs += 1
        path, run_id, kept = tmp_path / f"{runs}.db", "-", []
        for _life in range(200):
            command = [sys.executable, "-c", CHILD, str(path), run_id]
            with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root, env=env) as child:
                assert child.stdout is not None
                run_id = child.stdout.readline().strip() or run_id
                time.sleep(chance.uniform(0, 0.06))
                child.kill()
                rest = child.stdout.read()
            if run_id == "-":
                continue
            events = cm.Journal(path).events(run_id)
            assert events[: len(kept)] == kept, f"seed {seed}: recorded events are gone"
            kept = events
            if "end" in rest or (events[-1:] and events[-1].type == "RunFinished"):
                break  # killed after the end at most, before it could say so
            kills += 1
        run = cm.Run.open(run_id, path)
        assert outcome(run) == expected, f"seed {seed}"
        assert _answered_once(kept), f"seed {seed}"
        assert _finished(kept) == _finished(uncut.events), f"seed {seed}: a finished turn was repeated"


# -- the garbage collector of the process --------------------------------------------------------------------------


def _read_anew(monkeypatch: pytest.MonkeyPatch) -> cm.Run:
    """A run of some steps as its journal has it, which counts as a long one."""

    @cm.agent("work")
    async def work(turn: cm.Turn) -> str:
        return turn.step

    journal = MemoryJournal()
    steps = [cm.step("work", id=f"s{number}") for number in range(100)]
    run = cm.Workflow("long", agents=[work], steps=steps).start(journal=journal).wait(20)
    monkeypatch.setattr(driving, "MANY", 100)
    return cm.Run.open(run.id, journal)


def test_what_is_read_of_a_long_run_counts_as_old_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    run = _read_anew(monkeypatch)
    old = {id(one) for one in gc.get_objects(generation=2)}
    assert all(id(step) in old for step in run.state.order)


def test_what_the_host_has_frozen_stays_frozen(monkeypatch: pytest.MonkeyPatch) -> None:
    gc.freeze()
    try:
        _read_anew(monkeypatch)
        assert gc.get_freeze_count() > 0
    finally:
        gc.unfreeze()


@pytest.mark.parametrize("on", [True, False])
def test_collecting_is_on_or_off_as_the_host_has_it(on: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    with contextlib.ExitStack() as after:
        if not on:
            gc.disable()
            after.callback(gc.enable)
        _read_anew(monkeypatch)
        assert gc.isenabled() is on


def test_a_cap_that_is_dropped_from_the_definition_is_none() -> None:
    def flow(cap: int | None) -> cm.Workflow:
        agents = [cm.Agent("a", "A."), cm.Agent("b", "B.")]
        return cm.Workflow("w", agents=agents, steps="[a | b]?", max_concurrency=cap)

    run = flow(2).start(engine=cm.ScriptedEngine({"a": ["1"], "b": ["1"]}), journal=":memory:")
    gate(run)
    assert (run.revise(flow(2)), run.state.max_concurrency) == ([], 2)
    run.revise(flow(None))
    assert (run.state.max_concurrency, run.workflow.max_concurrency) == (4, None)
    run.stop()


def test_a_cap_of_the_run_stays_when_the_definition_says_nothing_else() -> None:
    flow = cm.Workflow("w", agents=[cm.Agent("a", "A.")], steps="a?")
    run = flow.start(engine=cm.ScriptedEngine({"a": ["1", "2"]}), journal=":memory:", max_concurrency=1)
    gate(run)
    run.revise(cm.Workflow("w", agents=[cm.Agent("a", "A.", system="Be short.")], steps="a?"))
    assert run.state.max_concurrency == 1
    run.stop()


@pytest.mark.parametrize("option", [{"engine": "offline"}, {"loop": "thread"}])
def test_what_drives_a_run_is_not_changed_under_it(option: dict[str, str]) -> None:
    run = cm.Workflow("w", agents=[cm.Agent("a", "A.")], steps="a?").start(
        engine=cm.ScriptedEngine({"a": ["1"]}), journal=":memory:"
    )
    gate(run)
    name = next(iter(option))
    with pytest.raises(cm.WorkflowError, match=f"{name}= cannot be changed while run .* is driven here. Stop it first"):
        cm.resume(run.id, journal=run._journal, **option)
    run.stop()
