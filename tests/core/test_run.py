"""The run: patterns, decisions from anywhere, waiting, steering, errors. Through the public API only."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import json
import math
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

import cm_notebook as cm
from cm_notebook import loops
from cm_notebook.engines.base import AgentRequest, Delta, SessionStarted, TurnDone
from cm_notebook.events import (
    AnyEvent,
    GateDecided,
    ModeChanged,
    Rewound,
    RunFinished,
    RunPaused,
    RunResumed,
    RunUnpaused,
    StepAdded,
    StepRemoved,
    place,
)
from cm_notebook.journal import MemoryJournal
from cm_notebook.render import html, text
from cm_notebook.state import apply
from cm_notebook.workflow import START_OPTIONS
from tests.core.driver import Driver, folded
from tests.helpers import gate, until

FIVE = ("researcher", "planner", "implementer", "reviewer", "deployer")


def workflow(steps: str, **options: Any) -> cm.Workflow:
    """A workflow whose agents all have a prompt."""
    names = [item.agent for item in cm.Workflow("x", agents=_all(steps), steps=steps).executable]
    return cm.Workflow("test", agents=[cm.Agent(name, f"Be the {name}.") for name in names], steps=steps, **options)


def _all(steps: str) -> list[cm.Agent]:
    from cm_notebook.workflow import parse_steps

    return [cm.Agent(item.agent, "x") for item in parse_steps(steps) if not isinstance(item, cm.Separator)]


class Echo:
    """Answers with step and attempt."""

    name = "echo"

    async def stream(self, request: AgentRequest) -> Any:
        yield Delta(f"{request.step} ")
        yield TurnDone(f"{request.step} {request.attempt}")


def start(steps: str, **options: Any) -> cm.Run:
    mode = options.pop("autonomous_mode", True)
    return workflow(steps, autonomous_mode=mode).start(engine=Echo(), journal=":memory:", **options)


def kinds(run: cm.Run) -> list[str]:
    return [type(event).__name__ for event in run.events]


# -- what a run is started with --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tape": 5}, "tape=5 is not a file. Name one"),
        ({"tape": "tapes/nope.jsonl"}, "tape 'tapes/nope.jsonl' cannot be read"),
        ({"tape": "on.jsonl"}, "Did you mean 'one.jsonl'?"),
        ({"workspace": 5}, "workspace=5 is not a folder. Name one"),
        ({"workspace": "one.jsonl"}, "the workspace 'one.jsonl' cannot be used: it is a file. Name a folder"),
        ({"workspace": "one.jsonl/x"}, "the workspace 'one.jsonl/x' cannot be used: Not a directory"),
        ({"workspace": "a\0b"}, "cannot be used"),
        ({"journal": 5}, "journal=5 is not a file. Name one"),
        ({"engine": 5}, "engine=5 is neither a name nor an engine"),
        ({"engine": Echo}, "is neither a name nor an engine"),
        ({"engine": "offlin"}, "Did you mean 'offline'?"),
        ({"on_gate": 5}, "on_gate=5 is not 'approve'"),
        ({"on_gate": "aprove"}, "Did you mean 'approve'?"),
        ({"until": 5}, "until=5 is not a step. Steps: a"),
        ({"jurnal": "x"}, "there is no option 'jurnal'. Did you mean 'journal'?"),
    ],
)
def test_a_wrong_option_is_one_line_before_anything_is_written(options: dict[str, Any], words: str) -> None:
    Path("one.jsonl").touch()
    with pytest.raises(cm.CodeMachineError) as refused:
        workflow("a").start(**options)
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not Path(".cm_notebook").exists()


def test_a_resumed_run_has_the_same_options() -> None:
    run = workflow("a?").start(engine=Echo())
    gate(run)
    run.stop()
    for options, words in (({"jurnal": 1}, "'journal'"), ({"tape": 5}, "tape=5"), ({"engine": "offlin"}, "'offline'")):
        with pytest.raises(cm.CodeMachineError, match=words):
            cm.resume(run.id, **options)
    assert run.status == "stopped"


def test_the_options_of_a_start_are_all_named() -> None:
    taken = set(inspect.signature(cm.Run.start).parameters) - {"workflow", "inputs", "notebook"}
    assert set(START_OPTIONS) == taken


def test_a_workspace_that_is_gone_is_a_failed_step(tmp_path: Path) -> None:
    run = workflow("a? -> b").start(engine=Echo(), journal=":memory:", workspace="site")
    gate(run)
    run.stop()
    (tmp_path / "site").rmdir()
    (tmp_path / "site").touch()
    again = cm.resume(run.id, journal=run._journal, engine=Echo()).approve()
    assert "site' cannot be used: it is a file" in gate(again, "b").payload["error"]
    (tmp_path / "site").unlink()
    assert again.retry().wait(10)["b"].text == "b 2"


def test_a_bug_of_ours_around_a_turn_ends_the_run_as_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*given: Any) -> None:
        raise ZeroDivisionError("ours")

    monkeypatch.setattr("cm_notebook.work.Work._request", broken)
    run = start("a -> b")
    with pytest.raises(ZeroDivisionError, match="ours"):
        run.wait(10)
    assert (run.status, kinds(run)[-2:]) == ("failed", ["TurnFailed", "RunFinished"])
    monkeypatch.undo()
    monkeypatch.setattr("cm_notebook.work.Work._turn_ended", broken)
    run = start("a -> b")
    with pytest.raises(ZeroDivisionError, match="ours"):
        run.wait(10)
    assert run.status == "failed"


async def _events(*told: Any) -> Any:
    for each in told:
        yield each


async def _answer() -> Any:
    return TurnDone("x")


def _circle() -> list[Any]:
    """A list that is in itself, twice."""
    made: list[Any] = []
    made += [made, made]
    return made


def _nested(deep: int) -> list[Any]:
    made: list[Any] = []
    for _ in range(deep - 1):
        made = [made]
    return made


@pytest.mark.parametrize(
    ("stream", "words"),
    [
        (lambda request: [TurnDone("x")], "the stream of the engine 'mine' gave a list, not events one by one: write"),
        (lambda request: _answer(), "the stream of the engine 'mine' gave a coroutine"),
        (lambda request: _events(TurnDone(5)), "the engine 'mine' gave a TurnDone with text=5, which is not a text"),  # type: ignore[arg-type]
        (lambda request: _events(Delta(None)), "the engine 'mine' gave a Delta with text=None, which is not a text"),  # type: ignore[arg-type]
        (lambda request: _events("x"), "the engine 'mine' gave 'x', which is no event. It yields cm.Delta"),
        (lambda request: _events(cm.UsageReported(5)), "a UsageReported with usage=5, which is not a cm.Usage"),  # type: ignore[arg-type]
        (lambda request: _events(cm.UsageReported(cm.Usage(), math.nan)), "cost_usd=nan, which is not an amount of US"),
        (
            lambda request: _events(cm.UsageReported(cm.Usage(), -1)),
            "cost_usd=-1, which is not an amount of US dollars",
        ),
        (lambda request: _events(cm.SessionStarted(5)), "a SessionStarted with session_id=5, which is not a text"),  # type: ignore[arg-type]
        (lambda request: _events(cm.ToolReturned("1", "look", 5)), "a ToolReturned with text=5, which is not a text"),  # type: ignore[arg-type]
        (lambda request: _events(TurnDone("x", verdict="loop")), "a TurnDone with verdict='loop', which is not a cm"),  # type: ignore[arg-type]
        (lambda request: _events(cm.UsageReported(cm.Usage(input_tokens=-1))), "which is not a cm.Usage with numbers"),
        (lambda request: _events(cm.ToolCalled("1", "look", {"a": {1}})), "which is not a JSON object or a text"),  # type: ignore[dict-item]
        (lambda request: _events(cm.ToolReturned("1", "look", "", failed=5)), "failed=5, which is not True or False"),  # type: ignore[arg-type]
        (
            lambda request: _events(TurnDone("x", output={"at": object()})),
            "a: its output holds a value of type object",
        ),
        (lambda request: _events(TurnDone("x", output=_circle())), "a: its output holds itself, so it has no end"),
        (lambda request: _events(TurnDone("x", output=_nested(101))), "more than 100 deep"),
        (lambda request: _events(TurnDone("x", output=_nested(5000))), "a: its output holds lists or dicts in each"),
    ],
)
def test_an_engine_that_is_wrong_is_named(stream: Any, words: str) -> None:
    class Mine:
        name = "mine"

    mine: Any = Mine()
    mine.stream = stream
    run = workflow("a").start(engine=mine, journal=":memory:")
    opened = gate(run)
    assert opened.kind == "failed"
    assert re.search(words, opened.payload["error"])


def test_what_of_an_engine_no_file_can_hold_is_replaced(tmp_path: Path) -> None:
    class Mine:
        name = "mine"

        async def stream(self, request: AgentRequest) -> Any:
            yield SessionStarted("s\ud800")
            yield TurnDone("x\ud800", note="n\ud800", output=_nested(100))

    run = workflow("a").start(engine=Mine(), journal=tmp_path / "journal.db").wait(10)
    again = cm.Run.open(run.id, tmp_path / "journal.db").state.steps["a"].last
    assert again is not None
    assert (again.session_id, again.text, again.note) == ("s?", "x?", "n?")
    assert again.output == _nested(100)


@pytest.mark.parametrize("engine", [5, Echo])
def test_only_an_engine_is_registered(engine: Any) -> None:
    with pytest.raises(cm.WorkflowError, match=r"cm\.register_engine: .* is no engine: an object with a name"):
        cm.register_engine(engine)


def test_waiting_takes_seconds() -> None:
    run = start("a?")
    with pytest.raises(cm.CodeMachineError, match="timeout_s='x' is not a number of seconds"):
        run.wait(timeout_s="x")  # type: ignore[arg-type]
    with pytest.raises(cm.CodeMachineError, match="timeout_s=nan is not a number of seconds"):
        run.wait(timeout_s=float("nan"))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda run: run.approve({}), "there is no step {}. Steps: a"),
        (lambda run: run.reject("why", 5), "there is no step 5. Steps: a"),
        (lambda run: run[["a"]], "there is no step ['a']"),
        (lambda run: run.diff("a"), "'a' is no run"),
        (lambda run: run.diff(run, step={}), "neither run has a step {}. Steps: a"),
        (lambda run: run.draft({"a"}), "there is no step {'a'}. Steps: a"),
        (lambda run: run.rerun("a", later="no"), "later='no' is not True or False"),
        (lambda run: run.go_on(once=1), "once=1 is not True or False"),
        (lambda run: run.go_on(until=5.0), "there is no step 5.0. Steps: a"),
        (lambda run: run.go_on(until="b"), "there is no step 'b'. Steps: a"),
        (lambda run: run.go_on(again=["a"]), "there is no step ['a']. Steps: a"),
        (lambda run: cm.resume(run.id, rewind=set(), journal=run._journal), "there is no step set(). Steps: a"),
        (lambda run: cm.resume(set(), journal=run._journal), "there is no run set()"),
        (lambda run: run.add("a", agents="a"), "agents: 'a' is no agent"),
        (lambda run: run.replace("a"), "'a' is not a step"),
        (lambda run: run.restore_files("a", to=b"x"), "to=b'x' is not known. Possible: before, after, kept"),
        (lambda run: run.revise("w"), "workflow='w' is no workflow"),
        (lambda run: run.revise(run.workflow, ["x"]), "inputs=['x'] is not a dict"),
        (lambda run: run.fork("a", 7), "workflow=7 is no workflow"),
        (lambda run: run.fork("a", agents=5), "agents: 5 is no agent"),
        (lambda run: run.fork("a", inputs="x"), "inputs='x' is not a dict"),
        (lambda run: run.graph("sgv"), "format='sgv' is not known. Did you mean 'svg'?"),
        (lambda run: run.graph("png", timeline=True), "format='png' is not known. Formats: svg, mermaid, text"),
    ],
)
def test_what_is_of_another_kind_is_refused_in_one_line(call: Callable[[cm.Run], Any], words: str) -> None:
    run = start("a?")
    gate(run)
    with pytest.raises(cm.CodeMachineError) as refused:
        call(run)
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)
    run.approve()
    assert run.wait(10).status == "completed"


@pytest.mark.parametrize("journal", [":memory:", "journal.db"])
def test_a_run_is_named_by_a_text(journal: str, tmp_path: Path) -> None:
    where = journal if journal == ":memory:" else tmp_path / journal
    workflow("a").start(engine=Echo(), journal=where).wait(10)
    with pytest.raises(cm.JournalError, match=r"there is no run set\(\)"):
        cm.resume(set(), journal=where)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"input_tokens": "x"}, "usage: input_tokens='x' is not valid: Input should be a valid integer"),
        ({"inputs": 1}, "usage: there is no option 'inputs'. Did you mean 'input_tokens'?"),
    ],
)
def test_a_wrong_usage_is_one_line(given: dict[str, Any], words: str) -> None:
    with pytest.raises(cm.WorkflowError) as refused:
        cm.Usage(**given)
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "make",
    [
        lambda engine: cm.Workflow("w", steps="a", engine=engine),
        lambda engine: cm.Agent("a", "do", engine=engine),
        lambda engine: cm.step("a", engine=engine),
    ],
    ids=["workflow", "agent", "step"],
)
def test_an_engine_in_the_place_of_its_name_is_told_where_it_goes(make: Callable[[Any], Any]) -> None:
    with pytest.raises(cm.WorkflowError, match="it is an engine, and here stands the name of one") as refused:
        make(cm.ScriptedEngine({}))
    assert "cm.register_engine(…) and write engine='scripted', or pass it to workflow.start(engine=…)." in str(
        refused.value
    )


# -- the patterns ----------------------------------------------------------------------------------------------------


def test_pattern_1_pauses_after_every_step() -> None:
    run = start("planner -> implementer -> reviewer", autonomous_mode="never")
    asked = []
    for name in ("planner", "implementer", "reviewer"):
        asked.append(gate(run).step)
        run.approve(name)
    run.wait(10)
    assert asked == ["planner", "implementer", "reviewer"]
    assert run.status == "completed"
    assert kinds(run).count("GateOpened") == 3


def test_pattern_2_pauses_once_where_a_step_asks_for_it() -> None:
    run = start("researcher -> planner -> implementer -> reviewer? -> deployer", autonomous_mode="always")
    assert gate(run).step == "reviewer"
    run.approve()
    run.wait(10)
    assert [step.text for step in run] == [f"{name} 1" for name in FIVE]
    assert kinds(run).count("GateOpened") == 1


def test_pattern_3_never_pauses() -> None:
    run = start(" -> ".join(FIVE), autonomous_mode="always").wait(10)
    assert run.status == "completed"
    assert "GateOpened" not in kinds(run)


def test_pattern_4_loops_until_the_gate_is_content() -> None:
    seen: list[str | None] = []

    @cm.agent("implementer")
    def implementer(turn: cm.Turn) -> str:
        seen.append(turn.feedback)
        return f"version {turn.attempt}"

    @cm.agent("quality-gate")
    def quality_gate(turn: cm.Turn) -> cm.Verdict:
        good = turn.outputs["implementer"] == "version 3"
        return cm.Verdict(action="continue" if good else "loop", reason=f"{turn.outputs['implementer']} is not good")

    flow = cm.Workflow(
        "Quality-First Builder",
        agents=[cm.Agent("planner", "Plan."), implementer, quality_gate, cm.Agent("deployer", "Deploy.")],
        steps="planner -> implementer -> quality-gate(loop 1, max 5) -> deployer",
    )
    run = flow.start(engine=Echo(), journal=":memory:").wait(10)
    assert seen == [None, "version 1 is not good", "version 2 is not good"]
    assert [len(step.attempts) for step in run] == [1, 3, 3, 1]
    assert "GateOpened" not in kinds(run)


def test_pattern_4_asks_when_five_repeats_were_not_enough() -> None:
    @cm.agent("judge")
    def judge(turn: cm.Turn) -> cm.Verdict:
        return cm.Verdict(action="loop", reason="no")

    flow = cm.Workflow("q", agents=[cm.Agent("a", "x"), judge], steps="a -> judge(loop 1, max 5)")
    run = flow.start(engine=Echo(), journal=":memory:")
    assert gate(run).kind == "exhausted"
    assert len(run["judge"].attempts) == len(run["a"].attempts) == 6
    run.retry(count=2)
    until(lambda: len(run["judge"].attempts) == 8 and run.gates, "two more")
    run.approve()
    assert run.wait(10).status == "completed"


# -- decisions -------------------------------------------------------------------------------------------------------


def test_reject_runs_again_with_the_feedback_and_keeps_both_attempts() -> None:
    run = start("planner?")
    gate(run)
    run.reject("name the tests")
    until(lambda: run.gates and run.gates[0].attempt == 2, "the second attempt")
    first, second = run["planner"].attempts
    assert first.feedback == "name the tests"
    assert "name the tests" in second.prompt
    assert first.text in second.prompt
    run.approve()
    assert run.wait(10)["planner"].text == "planner 2"
    assert "-planner 1" in run["planner"].diff()


def test_edit_goes_on_with_the_edited_text() -> None:
    run = start("planner? -> implementer")
    gate(run)
    run.approve(output="my own plan")
    run.wait(10)
    assert run["planner"].text == "my own plan"
    assert "my own plan" in run["implementer"].prompt
    assert run["planner"].attempts[-1].edited


def test_skip_goes_on_without_output() -> None:
    run = start("planner? -> implementer")
    gate(run)
    run.skip("planner")
    run.wait(10)
    assert run["planner"].text == ""
    assert run["planner"].status == "skipped"


@pytest.mark.parametrize(("on_exhausted", "word"), [("fail", "failed"), ("pause", "not decided")])
def test_nothing_waits_in_a_run_that_has_ended(on_exhausted: Any, word: str) -> None:
    judge = cm.module("judge", prompt="Judge.", loop_max_iterations=0, on_exhausted=on_exhausted)
    script = {"a": ["1"], "judge": ['{"action": "loop"}']}
    flow = cm.Workflow("w", steps=[cm.step("a", prompt="Work."), judge])
    run = flow.start(engine=cm.ScriptedEngine(script), journal=":memory:")
    if on_exhausted == "pause":
        gate(run)
        assert run["judge"].status == "waiting"
        run.stop()
    with contextlib.suppress(cm.RunFailed):
        run.wait(10)
    assert (run.status, run["judge"].status) == ("failed" if word == "failed" else "stopped", word)
    assert f"judge  {word}" in repr(run._repr_mimebundle_()["text/plain"]), "the view says the same"
    again = cm.resume(run.id, journal=run._journal)
    assert (gate(again).kind, again["judge"].status) == ("exhausted", "waiting")
    again.stop()


def test_a_decision_counts_once() -> None:
    run = start("planner? -> reviewer?")
    opened = gate(run)
    run.approve()
    gate(run, "reviewer")
    with pytest.raises(cm.AlreadyDecided, match=r"already approved by you at \d\d:\d\d"):
        run.decide(opened.id, cm.Decision(action="reject", feedback="too late"))
    with pytest.raises(cm.AlreadyDecided, match="already approved"):
        run.approve("planner")
    assert [event.type for event in run.events].count("GateDecided") == 1


@pytest.mark.parametrize("place", ["a?", "a? -> b?"])
def test_the_same_decision_twice_says_who_was_first(place: str) -> None:
    run = start(place)
    opened = gate(run)
    run.stop().wait(10)
    for late in (
        lambda: run.decide(opened.id, cm.Decision(action="approve")),
        lambda: run.approve(),
        lambda: run.approve("a"),
    ):
        with pytest.raises(cm.AlreadyDecided, match=r"the gate of 'a' is closed: run '.*' is stopped: stopped by you"):
            late()
    again = cm.resume(run.id, workflow(place), journal=run._journal, engine=Echo())
    gate(again)
    again.approve()
    if "b" in place:
        gate(again, "b")
        again.approve()
    for late in (lambda: again.approve(), lambda: again.skip()):
        with pytest.raises(cm.AlreadyDecided, match=r"'[ab]' was already approved by you at \d\d:\d\d"):
            late()
    assert again.wait(10).status == "completed"
    with pytest.raises(cm.TransitionError, match=r"no gate is open: run '.*' is completed"):
        start("a").wait(10).approve()


def test_of_many_threads_one_wins() -> None:
    run = start("planner?")
    opened, won, lost = gate(run), [], []
    barrier = threading.Barrier(8)

    def decide(number: int) -> None:
        barrier.wait()
        try:
            run.decide(opened.id, cm.Decision(action="approve", by=f"thread {number}"))
            won.append(number)
        except cm.AlreadyDecided:
            lost.append(number)

    threads = [threading.Thread(target=decide, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(won), len(lost)) == (1, 7)


def test_what_was_seen_is_what_is_approved() -> None:
    run = start("planner?")
    opened = gate(run)
    with pytest.raises(cm.AlreadyDecided, match="shows something else"):
        run.decide(opened.id, cm.Decision(action="approve"), digest="0" * 64)
    run.decide(opened.id, cm.Decision(action="approve"), digest=opened.digest)
    assert run.wait(10).status == "completed"


@pytest.mark.parametrize(
    ("decision", "words"),
    [
        (lambda run: run.reject("   "), "say why 'planner' is rejected"),
        (lambda run: run.answer("42"), "cannot be answered with 'answer'. Possible: approve, reject, skip, stop"),
        (lambda run: run.retry(), "cannot be answered with 'retry'"),
        (lambda run: run.approve("implementr"), "Did you mean 'implementer'?"),
        (lambda run: run.approve("implementer"), "has no open gate: it is pending"),
        (lambda run: run.decide("nonsense", cm.Decision(action="approve")), "there is no gate 'nonsense'"),
    ],
)
def test_a_wrong_decision_is_refused_in_words_and_changes_nothing(decision: Any, words: str) -> None:
    run = start("planner? -> implementer")
    gate(run)
    before = kinds(run)
    with pytest.raises(cm.TransitionError) as refused:
        decision(run)
    assert words in str(refused.value)
    assert kinds(run) == before
    assert run.gates


@pytest.mark.parametrize("where", ["usual", "other.db", ":memory:"])
def test_what_is_said_to_go_on_with_works_as_it_is_printed(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    journal = {} if where == "usual" else {"journal": where}
    run = workflow("a? -> b").start(engine=cm.ScriptedEngine({"a": ["1"], "b": ["2"]}), **journal)
    opened = gate(run)
    run.stop()
    refused: list[Callable[[], Any]] = [
        lambda: run.decide(opened.id, cm.Decision(action="approve")),
        lambda: run.approve(),
        lambda: run.approve("a"),
        lambda: run["b"].text,
    ]
    for ask in refused:
        with pytest.raises(cm.CodeMachineError) as said:
            ask()
        call = re.search(r"(?:cm\.resume|run\.go_on)\([^)]*\)", str(said.value))
        assert call is not None
        assert ("journal=" in call[0]) == (where == "other.db")
        again = eval(call[0], {"cm": cm, "run": run})
        assert (again.id, gate(again).step) == (run.id, "a")
        again.stop()
        run = again


def test_a_gate_of_another_run_is_said_to_be_that() -> None:
    one, other = start("a?"), start("a?")
    theirs, mine = gate(one), gate(other)
    assert theirs.path == mine.path
    with pytest.raises(cm.TransitionError, match=f"is a gate of run '{one.id}', and this is run '{other.id}'") as said:
        other.decide(theirs.id, cm.Decision(action="approve"))
    assert not isinstance(said.value, cm.AlreadyDecided)
    assert one.gates
    assert other.gates


def test_a_gate_before_asks_about_the_prompt() -> None:
    flow = cm.Workflow(
        "g", agents=[cm.Agent("a", "Say {{ word }}.")], steps=[cm.step("a", gate="before", interactive=True)]
    )
    run = flow.start({"word": "hello"}, engine=Echo(), journal=":memory:")
    assert gate(run).kind == "start"
    assert run["a"].attempts == []
    with pytest.raises(cm.TransitionError, match="the prompt for 'a' is empty"):
        run.approve(output=" ")
    run.approve(output="Say goodbye.")
    assert run.wait(10)["a"].prompt == "Say goodbye."


def test_a_function_may_ask_and_waiting_is_not_counted() -> None:
    @cm.agent("asker")
    async def asker(turn: cm.Turn) -> str:
        return "port " + await turn.ask_human("Which port?")

    flow = cm.Workflow("ask", agents=[asker], steps=[cm.step("asker", timeout_s=0.4)])
    run = flow.start(journal=":memory:")
    opened = gate(run)
    assert (opened.kind, opened.payload["question"]) == ("question", "Which port?")
    waited = threading.Event()
    waited.wait(0.8)  # longer than the step may take
    run.answer("8080")
    assert run.wait(10)["asker"].text == "port 8080"


def test_a_sync_function_may_ask_too() -> None:
    @cm.agent("asker")
    def asker(turn: cm.Turn) -> str:
        return "port " + turn.ask_human("Which port?")

    run = cm.Workflow("ask", agents=[asker], steps="asker").start(journal=":memory:")
    gate(run)
    run.answer("8080")
    assert run.wait(10)["asker"].text == "port 8080"


# -- deadlines -------------------------------------------------------------------------------------------------------

SOON_S = 0.02


def timed(wait_s: float, default: Any = None, then: str = "b", **options: Any) -> cm.Run:
    first = cm.step("a", prompt="Do it.", interactive=True, gate_timeout_s=wait_s, gate_default=default)
    flow = cm.Workflow("w", agents=[cm.Agent("b", "Go on: {{ a }}")], steps=[first, cm.step(then)])
    return flow.start(engine=Echo(), **{"journal": MemoryJournal(), **options})


def decisions(run: cm.Run) -> list[tuple[str, str]]:
    return [(event.decision.action, event.decision.by) for event in run.events if event.type == "GateDecided"]


def test_a_gate_that_nobody_answers_in_time_stops_the_run_which_can_go_on() -> None:
    run = timed(SOON_S).wait(20)
    assert (run.status, run["a"].status, decisions(run)) == ("stopped", "not decided", [("stop", "deadline")])
    assert run.state.reason == "stopped by the deadline of a gate: nobody decided about a in time"
    (opened,) = [event.gate for event in run.events if event.type == "GateOpened"]
    assert (opened.timeout_s, opened.default, opened.deadline) == (SOON_S, None, opened.opened_at + SOON_S)
    with pytest.raises(cm.AlreadyDecided, match="already stopped by deadline at"):
        run.decide(opened.id, cm.Decision(action="approve"))
    again = cm.resume(run.id, journal=run._journal, engine=Echo(), on_gate="approve").wait(20)
    assert (again.status, again["b"].text) == ("completed", "b 1")


def test_a_default_that_fits_the_gate_is_decided_at_its_deadline() -> None:
    run = timed(SOON_S, "skip").wait(20)
    assert (run.status, run["a"].status, run["a"].text) == ("completed", "skipped", "")
    run = timed(SOON_S, "reject").wait(20)
    assert run.status == "stopped", "nobody looked at the second attempt either"
    assert decisions(run) == [("reject", "deadline"), ("stop", "deadline")]
    assert "Nobody has looked at this in time." in run["a"].attempts[1].prompt
    assert [event.gate.default for event in run.events if event.type == "GateOpened"] == ["reject", None]


def test_a_default_that_does_not_fit_the_gate_stops_the_run() -> None:
    @cm.agent("a")
    def asks(turn: cm.Turn) -> str:
        return turn.ask_human("Which port?")

    flow = cm.Workflow("w", agents=[asks], steps=[cm.step("a", gate_timeout_s=SOON_S, gate_default="skip")])
    run = flow.start(journal=":memory:").wait(20)
    assert (run.status, decisions(run)) == ("stopped", [("stop", "deadline")])


def test_who_decides_before_the_deadline_is_first() -> None:
    run = timed(600)
    assert gate(run).deadline == gate(run).opened_at + 600
    run.approve().wait(20)
    assert (run.status, decisions(run)) == ("completed", [("approve", "you")])


@pytest.mark.parametrize(("ago_s", "status"), [(0.0, "waiting"), (700.0, "stopped")])
def test_the_deadline_of_a_gate_goes_on_while_nobody_drives_its_run(ago_s: float, status: str) -> None:
    run = timed(600)
    gate(run)
    journal, kept = MemoryJournal(), [event.model_copy(deep=True) for event in run.events]
    run.stop().wait(20)  # the copy of its journal knows nothing of that
    for event in kept:
        place(event, event.seq, event.at - ago_s)
    journal.create(run.id, "w", None)
    journal.commit(run.id, kept)
    again = cm.resume(run.id, journal=journal, engine=Echo())
    assert again.status == status
    assert decisions(again) == ([] if status == "waiting" else [("stop", "deadline")])
    again = again if status == "waiting" else cm.resume(run.id, journal=journal, engine=Echo())
    again.approve().wait(20)
    assert again["b"].text == "b 1"


def test_of_two_deadlines_that_are_over_only_one_stops_the_run() -> None:
    flow = cm.Workflow(
        "w",
        agents=[cm.Agent("a", "A."), cm.Agent("b", "B.")],
        steps=[cm.parallel("a", "b", gate_timeout_s=SOON_S), cm.step("a", id="c")],
    )
    script = cm.ScriptedEngine({name: [cm.Reply(error=cm.EngineError("no luck"))] for name in "ab"})
    run = flow.start(engine=script, journal=":memory:").wait(20)
    assert run.status == "stopped"
    assert set(decisions(run)) == {("stop", "deadline")}


@pytest.mark.usefixtures("headless")
def test_where_nobody_is_a_default_is_waited_for_and_without_one_nothing_is() -> None:
    assert timed(SOON_S, "skip").wait(20).status == "completed"
    run = timed(600)
    with pytest.raises(cm.GatePending):
        run.wait(20)
    run.stop()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"gate_timeout_s": 60, "gate_default": "approve"}, "nothing is approved by default. Use 'reject'"),
        ({"gate_timeout_s": 60, "gate_default": "retry"}, "step 'a': gate_default='retry' is not valid"),
        ({"gate_default": "skip"}, "Say how long it waits: gate_timeout_s="),
        ({"gate_timeout_s": 0}, "step 'a': gate_timeout_s=0 is not valid"),
        ({"gate_timeout_s": float("inf")}, "step 'a': gate_timeout_s=inf is not valid"),
    ],
)
def test_a_wrong_deadline_is_refused_by_name(options: dict[str, Any], words: str) -> None:
    with pytest.raises(cm.WorkflowError, match=re.escape(words)):
        cm.step("a", **options)


# -- waiting and watching --------------------------------------------------------------------------------------------


async def test_await_on_any_loop() -> None:
    run = start("planner -> implementer")
    assert (await run).status == "completed"
    assert (await run) is run


def test_wait_gives_up_after_its_time_and_the_run_goes_on() -> None:
    run = start("planner?")
    with pytest.raises(TimeoutError, match="goes on"):
        run.wait(0.05)
    gate(run)
    run.approve()
    assert run.wait(10).status == "completed"


async def test_a_run_on_the_loop_that_is_here() -> None:
    run = start("planner? -> implementer", loop="kernel")
    while not run.gates:
        await asyncio.sleep(0)
    run.approve()
    assert (await run).status == "completed"


async def _at_the_gate() -> cm.Run:
    run = start("planner? -> implementer", loop="kernel")
    while not run.gates:
        await asyncio.sleep(0)
    return run


def test_a_run_whose_loop_was_closed_says_so_and_goes_on_elsewhere() -> None:
    run = asyncio.run(_at_the_gate())
    with pytest.raises(cm.CodeMachineError, match=r"has been closed\. Go on with it on another: cm\.resume"):
        run.approve()
    with pytest.raises(cm.CodeMachineError, match="has been closed"):
        run.wait(10)
    assert run.status == "failed"
    again = cm.resume(run.id, journal=run._journal, engine=Echo())
    assert again.approve().wait(10).status == "completed"
    assert run.status == "completed"


def test_who_waits_hears_that_the_loop_was_closed() -> None:
    run = asyncio.run(_at_the_gate())
    with pytest.raises(cm.CodeMachineError, match="has been closed"):
        asyncio.run(asyncio.wait_for(_awaited(run), 10))
    assert cm.Run.open(run.id, run._journal) is not run


async def _awaited(run: cm.Run) -> cm.Run:
    return await run


def test_a_loop_that_does_not_run_now_is_not_waited_for() -> None:
    loop = asyncio.new_event_loop()
    run = loop.run_until_complete(_at_the_gate())
    for impatient in (run.approve, run.wait):
        with pytest.raises(cm.TransitionError, match="does not run now"):
            impatient()
    assert run.status == "waiting", "nothing was changed"

    async def go_on() -> None:
        await run.approve()

    loop.run_until_complete(go_on())
    assert run.status == "completed"
    loop.close()


async def test_stream_gives_text_and_events_in_order() -> None:
    run = start("planner -> implementer")
    told = [thing async for thing in run.stream()]
    text = [thing.text for thing in told if isinstance(thing, cm.LiveText)]
    assert [type(thing).__name__ for thing in told][-1] == "RunFinished"
    assert set(text) <= {"planner ", "implementer "}


async def test_stream_begins_with_what_is_written_already() -> None:
    written, go_on = threading.Event(), threading.Event()

    @cm.agent("writer")
    def writer(turn: cm.Turn) -> str:
        turn.emit("early ")
        written.set()
        go_on.wait(10)
        turn.emit("late")
        return "done"

    run = cm.Workflow("w", agents=[writer], steps="writer").start(journal=":memory:")
    await asyncio.to_thread(written.wait, 10)
    text = ""
    async for thing in run.stream():
        go_on.set()
        if isinstance(thing, cm.LiveText):
            text += thing.text
    assert text == "early late"


def test_a_result_that_is_not_there_says_why() -> None:
    run = start("planner? -> implementer")
    gate(run)
    with pytest.raises(
        cm.GatePending, match=r'"planner" is waiting for your decision. Decide first: run\.approve\(\)\.$'
    ) as pending:
        _ = run["planner"].text
    assert pending.value.gate is not None
    with pytest.raises(
        cm.GatePending, match='"implementer" has no result yet: "planner" is waiting for your'
    ) as behind:
        _ = run["implementer"].text
    assert behind.value.gate == pending.value.gate


def test_a_result_that_is_still_being_made_names_who_is_at_work_and_no_variable_of_a_notebook() -> None:
    release = threading.Event()

    @cm.agent("planner")
    def planner(turn: cm.Turn) -> str:
        release.wait(30)
        return "a plan"

    run = cm.Workflow("w", agents=[planner, cm.Agent("b", "Go.")], steps="planner -> b").start(journal=":memory:")
    said = {}
    for step in ("planner", "b"):
        with pytest.raises(cm.GatePending) as early:
            _ = run[step].text
        assert early.value.step == step
        said[step] = str(early.value)
    release.set()
    run.stop()
    assert '"b" has no result yet: "planner" is running. Decide there, then run this cell again' in said["b"]
    assert '"planner" has no result yet: it is running.' in said["planner"]
    assert "await run" not in said["b"] + said["planner"]


# -- what JSON cannot hold ---------------------------------------------------------------------------------------------


class Measure(BaseModel):
    value: float | dict[str, list[float]]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (float("nan"), "nan, which JSON does not have"),
        (float("inf"), "inf, which JSON does not have"),
        ([1, {"deep": -float("inf")}], "-inf, which JSON does not have"),
        ({"a": Path()}, "a value of type PosixPath, which JSON does not have"),
        ({(1, 2): "a"}, "a key that is no text"),
        (_circle(), "itself, so it has no end"),
        (_nested(101), "lists or dicts in each other, more than 100 deep"),
        (_nested(5000), "lists or dicts in each other, more than 100 deep?"),
    ],
)
def test_what_json_does_not_have_is_refused_as_an_input(value: Any, words: str) -> None:
    steps = [cm.step("a", prompt="{{ v }}")]
    with pytest.raises(cm.WorkflowError, match=rf"^input 'v' holds {words}\. An input is text, a number"):
        cm.Workflow("w", steps=steps, inputs={"v": value})
    with pytest.raises(cm.WorkflowError, match="input 'v' holds"):
        cm.Workflow("w", steps=steps).start({"v": value}, journal=":memory:")


@pytest.mark.parametrize("value", [float("nan"), {"deep": [1.0, -float("inf")]}, "a score"])
def test_a_number_that_json_does_not_have_fails_the_turn_that_made_it(value: Any) -> None:
    scored = value == "a score"

    @cm.agent("a")
    def a(turn: cm.Turn) -> Measure | cm.Verdict:
        return cm.Verdict(action="continue", score=float("nan")) if scored else Measure(value=value)

    run = cm.Workflow("w", agents=[a], steps="a").start(journal=":memory:")
    opened = gate(run)
    assert opened.kind == "failed"
    what = "score" if scored else "output"
    assert f"a: its {what} holds" in opened.payload["error"]
    run.stop()
    assert folded(run.events).steps["a"].last.output is run.state.steps["a"].last.output is None


# -- steering --------------------------------------------------------------------------------------------------------


def test_until_and_next_run_as_far_as_asked() -> None:
    run = start("a -> b -> c -> d", until="b").wait(10)
    assert (run.status, [step.status for step in run]) == ("paused", ["done", "done", "pending", "pending"])
    run.next().wait(10)
    assert [step.status for step in run] == ["done", "done", "done", "pending"]
    run.unpause().wait(10)
    assert run.status == "completed"


def test_until_a_module_goes_its_loop_and_next_goes_one_step_of_it() -> None:
    again, enough = '{"action": "loop"}', '{"action": "continue"}'

    def judged(until: str) -> cm.Run:
        script = {"a": ["1", "2", "3"], "judge": [again, again, enough], "z": ["end"]}
        flow = workflow("a -> judge(loop 1) -> z")
        return flow.start(engine=cm.ScriptedEngine(script), journal=":memory:", until=until).wait(10)

    run = judged("judge")
    assert (run.status, [step.status for step in run]) == ("paused", ["done", "done", "pending"])
    assert len(run["judge"].attempts) == 3
    run = judged("a")
    for made in ([1, 1, 0], [2, 1, 0], [2, 2, 0]):
        run.next().wait(10)
        assert (run.status, [len(step.attempts) for step in run]) == ("paused", made)
    assert run.unpause(until="judge").wait(10)["judge"].status == "done"
    assert run["z"].status == "pending"
    assert run.unpause().wait(10).status == "completed"


def test_pause_lets_what_runs_finish() -> None:
    started, release = threading.Event(), threading.Event()

    @cm.agent("slow")
    def slow(turn: cm.Turn) -> str:
        started.set()
        release.wait(10)
        return "done"

    run = cm.Workflow("p", agents=[slow, cm.Agent("b", "x")], steps="slow -> b").start(
        engine=Echo(), journal=":memory:"
    )
    started.wait(10)
    run.pause()
    assert run.status == "running"
    release.set()
    assert run.wait(10).status == "paused"
    assert [step.status for step in run] == ["done", "pending"]
    assert run.unpause().wait(10).status == "completed"


def test_what_is_done_with_is_not_kept() -> None:
    """Of gates and questions that are closed, and of waits that are over, nothing stays."""

    @cm.agent("asker")
    async def asker(turn: cm.Turn) -> str:
        return await turn.ask_human("Which port?")

    flow = cm.Workflow("ask", agents=[asker], steps=[cm.step("asker", interactive=True)])
    run = flow.start(journal=":memory:")
    gate(run)
    run.stop().wait(10)  # the question is closed without an answer
    run.go_on()
    gate(run)
    run.answer("8080")
    until(lambda: run.gates and run.gates[0].kind == "review", "the answer to be seen")
    run.approve()
    run.wait(10)
    assert (run._answers.asked, run._work.questions) == (set(), {})


async def test_waiting_to_try_again_is_one_timer() -> None:
    busy = cm.Reply(error=cm.EngineRateLimited("busy", retry_after_s=600))
    flow = cm.Workflow("r", agents=[cm.Agent("a", "x")], steps="a")
    run = flow.start(engine=cm.ScriptedEngine({"a": [busy]}), journal=":memory:", loop="kernel")
    while run["a"].status != "tries again":
        await asyncio.sleep(0)
    for _ in range(20):
        run.set_mode("gates")
    timers = [timer for timer in asyncio.get_running_loop()._scheduled if not timer.cancelled()]  # type: ignore[attr-defined]
    assert len(timers) == 1
    run.stop()


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (cm.EngineRateLimited("openai: slow down", retry_after_s=600), "rate limited, again in 10 min 00 s (2 of 3)"),
        (cm.EngineUnavailable("openai: gone", retry_after_s=4.5), "not available, again in 4.5 s (2 of 3)"),
    ],
)
def test_a_step_that_is_tried_again_by_itself_says_why_when_and_how_often(error: cm.EngineError, said: str) -> None:
    """The tries are those of the prompt that is sent now, not of chained ones before it."""
    busy = cm.Reply(error=cm.EngineRateLimited("busy", retry_after_s=0))
    flow = cm.Workflow("r", agents=[cm.Agent("a", "x")], steps=[cm.step("a", prompt=["one", "two"])])
    run = flow.start(
        engine=cm.ScriptedEngine({"a": [busy, "first", cm.Reply(error=error)]}), journal=":memory:", loop="thread"
    )
    until(lambda: run["a"].retry_at is not None and run.state.steps["a"].turn == 2, "the second prompt to fail")
    at = run["a"].retry_at
    assert at is not None
    with run.reading() as state:
        assert at == pytest.approx(state.at + (error.retry_after_s or 0))
        assert text.sentence(state) == f"a: {said}."
        assert said in text.run_text(state)
        assert said in text.show_text(state, state.steps["a"])
        assert said in html.run_html(state)
        assert text.look(state, state.steps["a"]).word == "tries again"
    run.stop()
    assert run["a"].retry_at is None


def test_a_member_that_is_tried_again_says_so() -> None:
    busy = cm.Reply(error=cm.EngineRateLimited("busy", retry_after_s=600))
    flow = cm.Workflow("r", agents=[cm.Agent("a", "x"), cm.Agent("b", "y")], steps="[a | b]")
    run = flow.start(engine=cm.ScriptedEngine({"a": [busy], "b": ["done"]}), journal=":memory:")
    until(lambda: run["a-b"].members and run["a-b"].members[0].retry_at is not None, "a to wait")
    with run.reading() as state:
        assert "rate limited, again in 10 min 00 s (2 of 3)" in text.run_text(state)
        assert "rate limited, again in 10 min 00 s (2 of 3)" in html.run_html(state)
    run.stop()


def test_stop_cancels_what_runs_and_resume_makes_it_again() -> None:
    started = threading.Event()
    cancelled = threading.Event()

    @cm.agent("slow")
    async def slow(turn: cm.Turn) -> str:
        if turn.attempt > 1:
            return f"attempt {turn.attempt}"
        started.set()
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.set()
            raise
        return "never"

    flow = cm.Workflow("s", agents=[slow], steps="slow")
    run = flow.start(journal=":memory:")
    started.wait(10)
    run.stop()
    assert cancelled.wait(10)
    assert run.wait(10).status == "stopped"
    assert kinds(run)[-2:] == ["TurnCutShort", "RunFinished"]
    again = cm.resume(run.id, flow, journal=run._journal)
    assert again.wait(10)["slow"].text == "attempt 2"


def test_stop_at_a_gate_and_go_on_later_asks_again() -> None:
    run = start("planner? -> implementer")
    first = gate(run)
    run.stop().wait(10)
    with pytest.raises(cm.AlreadyDecided, match="closed"):
        run.decide(first.id, cm.Decision(action="approve"))
    again = cm.resume(run.id, journal=run._journal, engine=Echo())
    assert gate(again).id != first.id
    again.approve()
    assert again.wait(10).status == "completed"


def test_the_mode_may_change_while_it_runs() -> None:
    run = start("a -> b -> c?", autonomous_mode=False)
    gate(run, "a")
    run.set_mode("gates").approve()
    assert gate(run).step == "c"
    run.set_mode("unattended")
    assert run.gates, "an open gate stays open"
    run.approve()
    run.wait(10)
    assert kinds(run).count("GateOpened") == 2


def test_unattended_approves_and_says_so() -> None:
    run = start("a? -> b? -> c?")
    gate(run)
    run.set_mode("unattended").approve()
    run.wait(10)
    decided = [event.decision.by for event in run.events if event.type == "GateDecided"]
    assert decided == ["you", "unattended mode", "unattended mode"]


@pytest.mark.parametrize("mode", ["never", "always"])
def test_a_locked_workflow_cannot_be_switched(mode: str) -> None:
    run = start("a? -> b", autonomous_mode=mode)
    gate(run)
    with pytest.raises(cm.TransitionError, match=f"locked to autonomous_mode='{mode}'"):
        run.set_mode("unattended")


def test_steps_may_be_added_while_it_lives_and_after_it_was_completed() -> None:
    run = start("a").wait(10)
    assert run.status == "completed"
    run.add(cm.step("b", prompt="Go on from {{ a }}."))
    run.wait(10)
    assert run["b"].prompt == "Go on from a 1."
    with pytest.raises(cm.WorkflowError, match="the id 'b' is already step"):
        run.add(cm.step("b", prompt="again"))


def test_a_finished_step_run_again_makes_later_ones_stale() -> None:
    run = start("a -> b -> c").wait(10)
    run.rerun("a")
    stale = gate(run)
    assert (stale.kind, stale.step) == ("stale", "b")
    run.approve()
    assert gate(run).step == "c"
    run.retry()
    run.wait(10)
    assert [len(step.attempts) for step in run] == [2, 1, 2]


def test_a_later_step_says_that_the_one_before_was_removed() -> None:
    run = start("a -> x -> b").wait(10)
    run.rerun("x")
    assert gate(run).step == "b"
    assert "b is stale: x changed after this ran." in text.sentence(run.state)
    run.remove("x")
    assert "b is stale: x was removed after this ran." in text.sentence(run.state)


def test_an_added_step_that_runs_again_has_changed_for_who_knew_it() -> None:
    agents = [cm.Agent(name, "x") for name in "abcd"]
    flow = cm.Workflow("added", agents=agents, steps="a -> [b | c] -> d")
    run = flow.start(engine=Echo(), journal=":memory:").wait(10)
    run.add(cm.step("x", prompt="X."), after="a")
    both, last = (step.id for step in run if step.id not in "ax")
    assert gate(run).payload["reason"] == f"{both}: x was added after this ran."
    run.approve()
    assert gate(run).payload["reason"] == f"{last}: x was added after this ran."
    run.retry().wait(10)
    run.rerun("x")
    assert gate(run).payload["reason"] == f"{both}: x changed after this ran.", "it was kept, with x there"
    run.approve()
    assert gate(run).payload["reason"] == f"{last}: x changed after this ran."
    run.stop()


def test_while_a_step_runs_again_later_ones_are_stale() -> None:
    run = start("a? -> b -> c")
    gate(run)
    run.approve().wait(10)
    run.rerun("a")
    gate(run)
    assert [step.stale for step in run] == [False, True, True]
    assert run["b"].text == "b 1"
    run.reject("again")
    until(lambda: run.gates and run.gates[0].attempt == 3, "the third attempt")
    assert [step.stale for step in run] == [False, True, True]
    run.stop()


def test_run_from_here_makes_all_later_ones_again() -> None:
    run = start("a -> b -> c").wait(10)
    run.rerun("b", later=True).wait(10)
    assert [len(step.attempts) for step in run] == [1, 2, 2]


def test_a_step_defined_anew_is_stale() -> None:
    run = start("a -> b").wait(10)
    assert run.replace(cm.step("a", prompt="Be the a.")) is True  # a prompt of its own instead of the agent's
    assert gate(run).kind == "stale"
    run.retry()
    assert gate(run).step == "b"


def test_removing_what_another_needs_is_refused() -> None:
    run = start("a? -> b")
    gate(run)
    run.add(cm.step("c", prompt="From {{ a }}."))
    with pytest.raises(cm.WorkflowError, match="a"):
        run.remove("a")
    run.remove("b").approve()
    run.wait(10)
    assert [step.id for step in run] == ["a", "c"]


# -- fields of an output ---------------------------------------------------------------------------------------------


class Plan(BaseModel):
    title: str
    hours: int


@cm.agent("planner")
def planner(turn: cm.Turn) -> Plan:
    return Plan(title="Build it", hours=3)


def fields(prompt: str, steps: str = "planner? -> coder") -> cm.Run:
    """A run in which the coder's prompt names fields of the planner's output."""
    flow = cm.Workflow("fields", agents=[planner, cm.Agent("coder", prompt)], steps=steps)
    return flow.start(engine=Echo(), journal=":memory:")


def test_a_field_that_an_output_does_not_have_is_a_failed_gate() -> None:
    for prompt in ("Take {{ planner.hour }} hours.", "Take {{ previous.hour }} hours."):
        run = fields(prompt, "planner -> coder")
        opened = gate(run)
        assert (opened.kind, opened.step) == ("failed", "coder")
        hole = prompt[5:-7]
        assert opened.payload["error"] == (
            f"its prompt uses {hole}, but the output of planner has no field 'hour'. Did you mean 'hours'? "
            "Fields: title, hours."
        )
        assert run["coder"].attempts[0].prompt == prompt, "what is missing stands there as it was written"
        run.retry(prompt="Take three hours.").wait(10)
        assert run["coder"].prompt == "Take three hours."


def test_a_prompt_that_cannot_be_made_is_not_put_to_a_person() -> None:
    coder = cm.step("coder", interactive=True, gate="before")
    agents = [planner, cm.Agent("coder", "Take {{ planner.hour }} hours.")]
    run = cm.Workflow("fields", agents=agents, steps=["planner", coder]).start(engine=Echo(), journal=":memory:")
    assert gate(run).kind == "failed"


def test_a_plain_text_has_no_fields() -> None:
    run = start("a -> b", autonomous_mode="always")
    run.wait(10)
    run.add(cm.step("c", prompt="{{ a.title }}"))
    assert "the output of a is a text and has no fields" in gate(run).payload["error"]


def test_an_edited_output_keeps_its_fields() -> None:
    run = fields("{{ planner.title }} in {{ planner.hours }} h.")
    gate(run)
    run.approve(output='{"title": "Rebuild it", "hours": 5}').wait(10)
    assert run["coder"].prompt == "Rebuild it in 5 h."
    assert run["planner"].output == {"title": "Rebuild it", "hours": 5}
    assert run["planner"].attempts[-1].note is None


def test_a_step_that_is_skipped_has_no_output() -> None:
    run = fields("x")
    gate(run)
    run.skip().wait(10)
    assert (run["planner"].text, run["planner"].output) == ("", None)
    assert run["planner"].attempts[-1].output is not None, "what was tried stays to be seen"


@pytest.mark.parametrize("by", ["a person", "a policy"])
def test_an_edit_has_the_fields_that_its_class_adds(by: str) -> None:
    class Estimate(BaseModel):
        title: str
        hours: float = 8

    @cm.agent("planner")
    def estimates(turn: cm.Turn) -> Estimate:
        return Estimate(title="Build it", hours=3)

    agents = [estimates, cm.Agent("coder", "{{ planner.title }} in {{ planner.hours }} h.")]
    flow = cm.Workflow("fields", agents=agents, steps="planner? -> coder")
    edit = cm.Decision(action="approve", output='{"title": "Größer"}')
    run = flow.start(engine=Echo(), journal=":memory:", on_gate=(lambda gate: edit) if by == "a policy" else None)
    if by == "a person":
        gate(run)
        run.approve(output=edit.output)
    run.wait(10)
    assert run["planner"].output == {"title": "Größer", "hours": 8.0}
    assert run["coder"].prompt == "Größer in 8.0 h."
    assert json.loads(run["planner"].text) == run["planner"].output


def test_an_edit_fits_the_class_of_what_the_function_returned() -> None:
    run = fields("{{ planner.title }}")
    opened = gate(run)
    for edited, words in (("Rebuild it", "Invalid JSON"), ('{"title": "Rebuild it"}', "hours: Field required")):
        with pytest.raises(cm.TransitionError, match=f"the edited text does not fit Plan: .*{words}"):
            run.approve(output=edited)
    assert run.gates == [opened]
    run.stop()


def test_an_edited_output_that_is_no_json_any_more_says_so() -> None:
    engine = cm.ScriptedEngine({"planner": [cm.Reply("{}", output={"title": "Build it"})]})
    agents = [cm.Agent("planner", "Plan."), cm.Agent("coder", "{{ planner.title }}")]
    run = cm.Workflow("fields", agents=agents, steps="planner? -> coder").start(engine=engine, journal=":memory:")
    gate(run)
    run.approve(output="Rebuild it")
    assert "edited" in gate(run, "coder").payload["error"]
    assert run["planner"].output is None
    assert "no fields" in (run["planner"].attempts[-1].note or "")


def test_a_skipped_steps_fields_are_empty() -> None:
    run = fields("[{{ planner.title }}]")
    gate(run)
    run.skip().wait(10)
    assert run["coder"].prompt == "[]"


# -- failure ---------------------------------------------------------------------------------------------------------


def test_a_rate_limit_is_tried_again_by_itself() -> None:
    busy = cm.Reply(error=cm.EngineRateLimited("busy", retry_after_s=0.01))
    flow = cm.Workflow("r", agents=[cm.Agent("a", "x")], steps="a")
    run = flow.start(engine=cm.ScriptedEngine({"a": [busy, busy, "fine"]}), journal=":memory:").wait(10)
    assert run["a"].text == "fine"
    assert [event.retry_in_s for event in run.events if event.type == "TurnFailed"] == [0.01, 0.01]
    assert len(run["a"].attempts) == 1


def test_after_the_retries_a_gate_asks() -> None:
    busy = cm.Reply(error=cm.EngineUnavailable("overloaded", retry_after_s=0.0))
    flow = cm.Workflow("r", agents=[cm.Agent("a", "x")], steps=[cm.step("a", retries=1)])
    run = flow.start(engine=cm.ScriptedEngine({"a": [busy, busy, "fine"]}), journal=":memory:")
    opened = gate(run)
    assert (opened.kind, opened.payload["error"]) == ("failed", "overloaded")
    with pytest.raises(cm.TransitionError, match="the prompt for 'a' is empty"):
        run.retry(prompt=" ")
    run.retry(prompt="x, shorter")
    assert run.wait(10)["a"].prompt == "x, shorter"


def test_an_error_of_the_agent_is_not_tried_again_unasked() -> None:
    @cm.agent("broken")
    def broken(turn: cm.Turn) -> str:
        raise ValueError("no such file")

    run = cm.Workflow("b", agents=[broken], steps="broken").start(journal=":memory:")
    opened = gate(run)
    assert "ValueError: no such file" in opened.payload["error"]
    detail = run["broken"].attempts[0].error
    assert detail is not None
    assert "raise ValueError" in (detail.detail or "")
    run.skip()
    assert run.wait(10).status == "completed"


def test_a_function_that_never_ends_is_given_up() -> None:
    release = threading.Event()

    @cm.agent("hangs")
    def hangs(turn: cm.Turn) -> str:
        release.wait(30)
        return "late"

    run = cm.Workflow("h", agents=[hangs], steps=[cm.step("hangs", timeout_s=0.05)]).start(journal=":memory:")
    assert gate(run).payload["error"] == (
        "hangs did not finish within 0.05 s (without any output). "
        "Retry, or give it more time: `%cm step hangs --timeout 0.125`, in Python timeout_s=0.125."
    )
    release.set()
    run.skip()
    assert run.wait(10)["hangs"].text == "", "the late answer is not taken"


def test_a_task_that_cancels_itself_fails() -> None:
    @cm.agent("a")
    async def cancels(turn: cm.Turn) -> str:
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        await asyncio.sleep(0)
        return "never"

    run = cm.Workflow("c", agents=[cancels], steps="a").start(journal=":memory:")
    assert gate(run).payload["error"] == "a was cancelled from within."
    run.stop()


def test_an_agent_that_raises_what_closes_generators_fails() -> None:
    @cm.agent("a")
    async def closes(turn: cm.Turn) -> str:
        raise GeneratorExit

    run = cm.Workflow("c", agents=[closes], steps="a").start(journal=":memory:")
    assert gate(run).payload["error"] == "a raised GeneratorExit."
    run.stop()


def test_an_async_function_that_will_not_be_cancelled_is_given_up() -> None:
    release = threading.Event()

    @cm.agent("stubborn")
    async def stubborn(turn: cm.Turn) -> str:
        while not release.is_set():
            try:
                await asyncio.sleep(0.01)
            except asyncio.CancelledError:
                continue
        return "late"

    run = cm.Workflow("s", agents=[stubborn], steps=[cm.step("stubborn", timeout_s=0.05)]).start(journal=":memory:")
    assert "did not finish within 0.05 s" in gate(run).payload["error"]
    run.skip()
    assert run.wait(10)["stubborn"].text == ""
    release.set()


def test_nobody_is_asked_an_empty_question() -> None:
    @cm.agent("asker")
    def asker(turn: cm.Turn) -> str:
        return str(turn.ask_human(" \n"))

    run = cm.Workflow("asks", agents=[asker], steps="asker").start(journal=":memory:")
    opened = gate(run)
    assert (opened.kind, "ask_human: the question is empty" in opened.payload["error"]) == ("failed", True)
    run.stop()


def test_a_bug_in_an_engine_surfaces_as_itself() -> None:
    class Buggy:
        name = "buggy"

        async def stream(self, request: AgentRequest) -> Any:
            yield Delta("x")
            raise KeyError("oops")

    run = workflow("a").start(engine=Buggy(), journal=":memory:")
    with pytest.raises(KeyError, match="oops"):
        run.wait(10)
    assert run.status == "failed"


def test_a_missing_verdict_never_opens_the_way() -> None:
    flow = cm.Workflow("v", agents=[cm.Agent("a", "x"), cm.Agent("judge", "y")], steps="a -> judge(loop 1)")
    run = flow.start(
        engine=cm.ScriptedEngine({"a": ["1", "2"], "judge": ["looks good", '{"action": "lop"}']}), journal=":memory:"
    )
    opened = gate(run)
    assert opened.kind == "verdict"
    assert opened.payload["reason"].startswith("judge gave no verdict. Expected at the end: ")
    run.reject("not good at all")
    until(lambda: run.gates and run.gates[0].attempt == 2, "the second pass")
    assert "not good at all" in run["a"].attempts[1].prompt
    assert "judge's verdict says “lop”. Did you mean 'loop'?" in run.gates[0].payload["reason"]
    run.approve()
    assert run.wait(10).status == "completed"


def test_a_bug_in_a_proposal_reaches_the_proposer_and_nobody_else() -> None:
    run = start("planner?")
    gate(run)
    with pytest.raises(ZeroDivisionError):
        run._driver.propose(lambda: [1 / 0])
    run.approve()
    assert run.wait(10).status == "completed"


def test_a_bug_in_who_watches_does_not_stop_the_run(caplog: pytest.LogCaptureFixture) -> None:
    run = start("planner?")
    gate(run)
    run.watch(lambda: 1 / 0)  # type: ignore[arg-type, return-value]
    run.approve()
    assert run.wait(10).status == "completed"
    assert "ZeroDivisionError" in caplog.text


def test_a_bug_while_recording_reaches_who_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    run = start("planner?")
    gate(run)

    def broken(state: Any, event: Any) -> None:
        raise KeyError("bug")

    monkeypatch.setattr("cm_notebook.driving.apply", broken)
    with pytest.raises(KeyError, match="bug"):
        run.approve()
    monkeypatch.undo()
    with pytest.raises(KeyError, match="bug"):
        run.wait(10)


PROPOSED: list[Callable[[], AnyEvent]] = [
    lambda: RunPaused(),
    lambda: RunUnpaused(),
    lambda: ModeChanged(mode="unattended"),
    lambda: GateDecided(gate_id="r/a/1/1", decision=cm.Decision(action="approve")),
    lambda: StepAdded(step={"agent": "x", "prompt": "x"}, agents=[{"id": "x", "prompt": "x"}], fingerprint="f"),
    lambda: StepRemoved(step="c"),
    lambda: Rewound(to="a"),
    lambda: Rewound(to="c"),
    lambda: RunFinished(status="stopped"),
    lambda: RunResumed(),
]


@settings(deadline=None)
@given(st.lists(st.lists(st.sampled_from(PROPOSED), min_size=1, max_size=5), max_size=4))
def test_a_proposal_is_recorded_whole_or_not_at_all(proposals: list[list[Callable[[], AnyEvent]]]) -> None:
    steps = [cm.step(name, prompt="x", interactive=name == "a") for name in "abc"]
    driver = Driver(cm.Workflow("w", steps=steps)).go()
    journal = MemoryJournal()
    journal.create("r", "w", None)
    journal.commit("r", driver.events)
    run = cm.Run.open("r", journal)
    for proposal in proposals:
        before = journal.events("r")
        events, legal = [make() for make in proposal], folded(before)
        refused = False
        for event in events:
            try:
                apply(legal, event.model_copy(update={"seq": legal.seq + 1}, deep=True))
            except cm.TransitionError:
                refused = True
                break
        with pytest.raises(cm.TransitionError) if refused else contextlib.nullcontext():
            run._driver.propose(lambda events=events: events)  # type: ignore[misc]
        assert journal.events("r") == (before if refused else [*before, *events])
        assert run.state == folded(journal.events("r"))


def test_a_refused_rerun_cuts_nothing_short() -> None:
    release = threading.Event()

    @cm.agent("slow")
    def slow(turn: cm.Turn) -> str:
        release.wait(10)
        return "done"

    flow = cm.Workflow("s", agents=[slow, cm.Agent("b", "x"), cm.Agent("c", "x")], steps="slow -> b -> c")
    run = flow.start(engine=Echo(), journal=":memory:")
    until(lambda: run["slow"].status == "running", "the turn to run")
    before = kinds(run)
    with pytest.raises(cm.TransitionError, match="'c' has not run yet"):
        run.rerun("c")
    assert kinds(run) == before
    release.set()
    assert [step.text for step in run.wait(10)] == ["done", "b 1", "c 1"]


def test_an_agent_that_exits_does_not_take_the_engine_with_it() -> None:
    class Exits:
        name = "exits"

        async def stream(self, request: AgentRequest) -> Any:
            yield Delta("x")
            raise SystemExit(2)

    run = workflow("a").start(engine=Exits(), journal=":memory:")
    assert gate(run).payload["error"] == "a raised SystemExit."
    run.stop()
    assert start("b").wait(10).status == "completed"


@pytest.mark.parametrize("answer", [True, "reject", "answer", cm.Decision(action="answer", feedback="x")])
def test_a_policy_that_answers_badly_ends_the_run_or_counts(answer: Any) -> None:
    run = start("planner?", on_gate=lambda gate: answer if gate.attempt == 1 else "approve")
    if answer == "reject":
        assert run.wait(10)["planner"].text == "planner 2"
        return
    with pytest.raises(cm.TransitionError):
        run.wait(10)
    assert run.status == "failed"


def test_what_a_function_does_to_its_inputs_stays_with_it() -> None:
    @cm.agent("a")
    def writes(turn: cm.Turn) -> str:
        with pytest.raises(TypeError):
            turn.inputs["goal"] = "hacked"  # type: ignore[index]
        return "ok"

    run = cm.Workflow("i", agents=[writes], steps="a").start({"goal": "x"}, journal=":memory:").wait(10)
    assert run["a"].text == "ok"


def test_what_a_function_knows_of_earlier_steps_can_be_printed() -> None:
    seen = cm.agent("b")(lambda turn: f"{turn.outputs}")
    run = cm.Workflow("o", agents=[cm.agent("a")(lambda turn: "x"), seen], steps="a -> b").start(journal=":memory:")
    assert run.wait(10)["b"].text == "{'a': 'x'}"


def test_unknown_engines_are_refused_before_anything_runs() -> None:
    flow = cm.Workflow("e", agents=[cm.Agent("a", "x", engine="offlin")], steps="a")
    with pytest.raises(cm.EngineNotFound, match="Did you mean 'offline'"):
        flow.start(journal="journal.db")


class Talks:
    """Has a session of its own, and writes down which it was given."""

    def __init__(self, name: str) -> None:
        self.name, self.asked = name, list[AgentRequest]()

    async def stream(self, request: AgentRequest) -> Any:
        self.asked.append(request)
        yield SessionStarted(request.session_id or f"{self.name}-1")
        yield TurnDone(f"{self.name} {request.attempt}")


def test_a_session_is_known_while_its_turn_runs_and_continued_after_a_cut() -> None:
    sent: list[tuple[int, str | None]] = []

    class Hangs:
        name = "hangs"

        async def stream(self, request: AgentRequest) -> Any:
            sent.append((request.attempt, request.session_id))
            yield SessionStarted("s")
            yield SessionStarted("s")
            if len(sent) == 1:
                await asyncio.Event().wait()
            yield TurnDone("done")

    flow = cm.Workflow("w", steps=[cm.step("a", prompt="x")])
    run = flow.start(engine=Hangs(), journal=":memory:")
    until(lambda: "SessionOpened" in kinds(run), "the session to be written down")
    run.stop().wait(10)
    again = cm.resume(run.id, flow, journal=run._journal, engine=Hangs()).wait(10)
    assert sent == [(1, None), (2, "s")]
    assert kinds(again).count("SessionOpened") == 1, "what is known is not said again"


@pytest.mark.parametrize("session", [None, "s"])
def test_the_next_chained_prompt_comes_with_the_edited_answer(session: str | None) -> None:
    requests: list[AgentRequest] = []

    class Remembers:
        name = "remembers"

        async def stream(self, request: AgentRequest) -> Any:
            requests.append(request)
            if session is not None:
                yield SessionStarted(session)
            yield TurnDone(f"answer {request.turn}")

    steps = [cm.step("a", prompt=["Draft it", "Translate it"])]
    run = cm.Workflow("w", steps=steps, autonomous_mode=False).start(engine=Remembers(), journal=":memory:")
    gate(run)
    run.approve(output="MINE")
    assert gate(run).attempt == 3
    second = requests[1]
    assert (second.attempt, second.session_id, list(second.history)) == (3, session, [("Draft it", "MINE")])
    assert ("MINE" in second.prompt) is (session is not None)
    assert [attempt.text for attempt in run["a"].attempts] == ["answer 1", "MINE", "answer 2"]
    run.stop()


def test_a_session_belongs_to_the_engine_it_came_from() -> None:
    first, second = Talks("first"), Talks("second")
    run = workflow("a?").start(engine=first, journal=":memory:")
    gate(run)
    run.stop().wait(10)
    again = cm.resume(run.id, journal=run._journal, engine=second)
    gate(again)
    again.reject("shorter")
    until(lambda: again.gates and again.gates[0].attempt == 2, "the second attempt")
    again.reject("longer")
    until(lambda: again.gates and again.gates[0].attempt == 3, "the third attempt")
    again.stop()
    assert [request.session_id for request in second.asked] == [None, "second-1"]
    told, feedback = (request.prompt for request in second.asked)
    assert "first 1" in told, "who does not know the conversation is told of it"
    assert feedback == "longer"


# -- nobody there ----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("headless")
def test_nobody_there_stops_at_the_gate_and_says_what_to_do() -> None:
    run = start("planner? -> implementer")
    with pytest.raises(cm.GatePending, match="nobody can answer here"):
        run.wait(10)
    assert run.status == "waiting"
    run.approve()
    assert run.wait(10).status == "completed"


async def later(gate: cm.Gate) -> str:
    await asyncio.sleep(0)
    return "approve"


@pytest.mark.usefixtures("headless")
@pytest.mark.parametrize(
    ("policy", "status", "attempts"),
    [
        ("approve", "completed", 1),
        ("stop", "stopped", 1),
        (
            lambda gate: "approve" if gate.attempt == 2 else cm.Decision(action="reject", feedback="again"),
            "completed",
            2,
        ),
        (later, "completed", 1),
    ],
)
def test_a_policy_answers(policy: Any, status: str, attempts: int) -> None:
    run = start("planner? -> implementer", on_gate=policy).wait(10)
    assert run.status == status
    assert len(run["planner"].attempts) == attempts
    assert {event.decision.by for event in run.events if event.type == "GateDecided"} == {"on_gate"}


@pytest.mark.usefixtures("headless")
@pytest.mark.parametrize("policy", ["approve", lambda gate: "approve"])
def test_a_policy_for_a_run_that_waits_here_answers_the_gate_that_is_open(policy: Any) -> None:
    run = start("planner? -> implementer?")
    with pytest.raises(cm.GatePending):
        run.wait(10)
    assert cm.resume(run.id, journal=run._journal, on_gate=policy).wait(10).status == "completed"


@pytest.mark.usefixtures("headless")
@pytest.mark.parametrize("first", [0, 1])
def test_of_two_gates_that_nobody_answers_the_other_one_still_ends_the_wait(first: int) -> None:
    @cm.agent("asks")
    async def asks(turn: cm.Turn) -> str:
        return await turn.ask_human("Which?")

    @cm.agent("leads")
    async def leads(turn: cm.Turn) -> str:
        return " ".join(result.text for result in await turn.run_agents("asks 'a' & asks 'b'"))

    run = cm.Workflow("w", agents=[asks, leads], steps="leads", sub_agents=["asks"]).start(journal=":memory:")
    words = "have a function answer: on_gate="
    with pytest.raises(cm.GatePending, match=words):
        run.wait(10)
    paths = ["leads/asks#1", "leads/asks#2"]
    run.answer("blue", paths.pop(first))
    with pytest.raises(cm.GatePending, match=f'gate "{paths[0]}"'):
        run.wait(10)
    assert run.answer("blue", paths[0]).wait(10)["leads"].text == "blue blue"


@pytest.mark.usefixtures("headless")
def test_rejecting_by_policy_ends() -> None:
    run = start("planner?", on_gate="reject")
    with pytest.raises(cm.GatePending):
        run.wait(10)
    assert len(run["planner"].attempts) == 2


@pytest.mark.usefixtures("headless")
def test_a_failure_with_nobody_there_is_the_end() -> None:
    broken = cm.ScriptedEngine({"a": [cm.Reply(error=cm.EngineAuthError("no key"))]})
    run = workflow("a").start(engine=broken, journal=":memory:", on_gate="approve")
    with pytest.raises(cm.RunFailed, match="a: no key"):
        run.wait(10)
    assert run.status == "failed"


def test_a_policy_that_raises_ends_the_run() -> None:
    def policy(gate: cm.Gate) -> None:
        raise RuntimeError("policy is broken")

    run = start("planner?", on_gate=policy)
    with pytest.raises(RuntimeError, match="policy is broken"):
        run.wait(10)


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("aprove", "on_gate returned 'aprove' for the review gate of 'planner'. Did you mean 'approve'?"),
        (
            "answer",
            "on_gate returned 'answer' for the review gate of 'planner'. Possible: approve, reject, skip, stop.",
        ),
        (True, "on_gate returned True; it returns a Decision, an action's name or None."),
    ],
)
def test_what_a_policy_returns_is_refused_by_its_name(said: Any, words: str) -> None:
    run = start("planner?", on_gate=lambda gate: said)
    with pytest.raises(cm.TransitionError) as refused:
        run.wait(10)
    assert words in str(refused.value)


def test_an_async_function_that_holds_the_loop_is_named_to_whoever_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loops, "STILL_S", 0.0)
    began, may_end = threading.Event(), threading.Event()

    @cm.agent("a")
    async def holds(turn: cm.Turn) -> str:
        began.set()
        may_end.wait(60)
        return "x"

    words = r"the loop of all runs has stood still .* holds \(.*test_run.py, line \d+\) .*does not await\. Write it as"
    run = cm.Workflow("w", agents=[holds], steps="a").start(journal=":memory:")
    try:
        assert began.wait(20)
        with pytest.raises(cm.CodeMachineError, match=f"Nothing was changed: {words}"):
            run.stop()
        with pytest.raises(cm.CodeMachineError, match=f"Nothing was changed: {words}"):
            start("b")
        with pytest.raises(RuntimeWarning, match=words):  # as warnings are errors here
            run.wait(60)
    finally:
        may_end.set()
    assert run.wait(20).status == "completed"


def test_current_is_the_last_one() -> None:
    run = start("a")
    assert cm.current() is run
    run.wait(10)


# -- answers that must fit a class ------------------------------------------------------------------------------------


class Outline(BaseModel):
    title: str
    steps: list[str] = []


class Answers:
    """An engine that answers, and gives a value beside the text."""

    name = "answers"

    def __init__(self, said: str, output: Any = None) -> None:
        self.said = TurnDone(said, output=output)

    async def stream(self, request: AgentRequest) -> Any:
        yield self.said


def planned(engine: Any, steps: str = "planner? -> writer") -> cm.Run:
    agents = [cm.Agent("planner", "Plan.", output=Outline), cm.Agent("writer", "{{ planner.title }}")]
    if engine is not None:
        agents[1] = cm.agent("writer")(lambda turn: turn.outputs["planner"])
    return cm.Workflow("w", agents=agents, steps=steps).start(engine=engine, journal=":memory:")


@pytest.mark.parametrize(
    "engine",
    [
        Answers('{"title": "T"}'),
        Answers('```json\n{"title": "T"}\n```'),
        Answers("I call it T.", {"title": "T"}),
        cm.ScriptedEngine({"planner": '{"title": "T"}'}),
    ],
)
def test_whoever_answers_the_output_is_of_the_agents_class(engine: Any) -> None:
    run = planned(engine)
    gate(run)
    run.approve().wait(20)
    assert run["planner"].output == {"title": "T", "steps": []}


@pytest.mark.parametrize("engine", [Answers("I call it T."), Answers("T", {"title": 3}), Answers('{"title": 3}')])
def test_whoever_answers_what_does_not_fit_is_no_answer(engine: Any) -> None:
    run = planned(engine)
    asked = gate(run)
    assert asked.kind == "failed"
    assert "planner: the answer does not fit Outline: " in asked.payload["error"]
    run.stop()


def test_where_no_model_is_called_nothing_has_to_fit() -> None:
    run = planned(None, "planner")
    assert "no model was called" in run.wait(20)["planner"].text


def test_an_edited_output_fits_the_class_too() -> None:
    run = planned(Answers('{"title": "T"}'))
    gate(run)
    for edited in ('{"title": 3}', "T", '```json\n{"title": "U"}\n```'):
        with pytest.raises(cm.TransitionError, match="the edited text does not fit Outline: "):
            run.approve(output=edited)
    run.approve(output='{"title": "U", "steps": ["a"]}').wait(20)
    assert run["planner"].output == {"title": "U", "steps": ["a"]}
