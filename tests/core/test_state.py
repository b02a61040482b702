"""What events mean and what comes next: the promises of DESIGN.md §5 and PATTERNS.md, case by case, then at random."""

from __future__ import annotations

import ast
import copy
import itertools
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cm_notebook import rules
from cm_notebook import state as meaning
from cm_notebook.errors import AlreadyDecided, TransitionError
from cm_notebook.events import (
    ACTIONS,
    EDITABLE,
    AgentsCalled,
    AgentsReturned,
    AnyEvent,
    CalledAgent,
    Decision,
    ErrorInfo,
    Gate,
    GateDecided,
    GateKind,
    GateOpened,
    LoopedBack,
    ModeChanged,
    Ref,
    Rewound,
    RunFinished,
    RunPaused,
    RunResumed,
    RunStarted,
    RunUnpaused,
    SessionOpened,
    StepAdded,
    StepChanged,
    StepFailed,
    StepOutdated,
    StepRemoved,
    StepSkipped,
    ToolCalled,
    ToolReturned,
    TurnCutShort,
    TurnFailed,
    TurnFinished,
    TurnStarted,
    Usage,
    UsageReported,
    WorkflowChanged,
)
from cm_notebook.prompts import digest, text_of
from cm_notebook.rules.transitions import SWEPT, TRANSITIONS
from cm_notebook.runstate import StartTurn, why_stale
from cm_notebook.state import ask, cut_all, cut_short, next_actions, state_of
from cm_notebook.team import MOST_DEPTH
from cm_notebook.workflow import Agent, Module, Parallel, Step, Verdict, Workflow, module, separator, step
from tests.core.driver import Driver, Reply, approve, folded, go_on, loop, said

PATTERNS_STEPS = ("researcher", "planner", "implementer", "reviewer", "deployer")


def work(agent: str, prompt: str | list[str] = "work", **options: Any) -> Step:
    return step(agent, prompt=prompt, context=options.pop("context", "none"), **options)


def gate(back: int = 1, most: int | None = None, agent: str = "gate", **options: Any) -> Module:
    return module(agent, prompt="judge", loop_steps=back, loop_max_iterations=most, **options)


def run(*steps: Any, script: Any = None, mode: Any = True, policy: Any = None, **started: Any) -> Driver:
    inputs = started.pop("inputs", {})
    agents = [Agent(name, "work") for name in started.pop("agents", ())]
    workflow = Workflow("W", steps=list(steps), agents=agents, autonomous_mode=mode, inputs=inputs)
    return Driver(workflow, script, policy=policy, **started).go()


def change(driver: Driver, changed: Step) -> None:
    data = {**changed.model_dump(mode="json", exclude_defaults=True), "kind": changed.kind}
    driver.record(StepChanged(step=data, fingerprint="changed"))


# -- the user's five patterns -----------------------------------------------------------------------------------------


def test_pattern_1_pauses_at_every_step() -> None:
    driver = run(work("planner"), work("implementer"), work("reviewer"), mode="never", policy=approve)
    assert driver.opened == [(("review"), name, 1, 1) for name in ("planner", "implementer", "reviewer")]
    assert driver.state.status == "completed"


def test_pattern_2_pauses_once() -> None:
    steps = [work(name, interactive=True if name == "reviewer" else None) for name in PATTERNS_STEPS]
    driver = run(*steps, mode="always")
    assert driver.turns() == ["researcher", "planner", "implementer", "reviewer"]
    assert driver.opened == [("review", "reviewer", 1, 1)]
    assert driver.decide("approve").state.status == "completed"
    assert len(driver.opened) == 1


def test_pattern_3_never_pauses() -> None:
    driver = run(*map(work, PATTERNS_STEPS), mode="always")
    assert (driver.opened, driver.turns(), driver.state.status) == ([], list(PATTERNS_STEPS), "completed")


@pytest.mark.parametrize("jumps", range(6))
def test_pattern_4_loops_without_a_pause(jumps: int) -> None:
    script = {"gate": [*[loop("name the tests")] * jumps, go_on()]}
    driver = run(work("planner"), work("implementer"), gate(1, 5), work("deployer"), script=script)
    assert driver.turns() == ["planner", *["implementer", "gate"] * (jumps + 1), "deployer"]
    assert (driver.opened, driver.state.status) == ([], "completed")


def test_pattern_4_stops_at_a_person_after_five_jumps_back() -> None:
    driver = run(work("planner"), work("implementer"), gate(1, 5), work("deployer"), script={"gate": [loop()] * 9})
    assert driver.turns() == ["planner", *["implementer", "gate"] * 6]
    assert driver.opened == [("exhausted", "gate", 6, 1)]
    assert driver.gate().payload["iterations"] == 5


def test_pattern_5_gives_the_coordinator_what_the_architect_said() -> None:
    driver = run(work("architect"), work("coordinator", "share {{ architect }} out"), script={"architect": ["a plan"]})
    assert (driver.prompt("coordinator"), driver.state.status) == ("share a plan out", "completed")


# -- autonomy ---------------------------------------------------------------------------------------------------------

MODES: tuple[Any, ...] = ("never", False, "always", True, "unattended")
BEFORE, AFTER, BETWEEN = ("start", "a", 1, 1), ("review", "a", 1, 1), [("review", "a", 1, 1), ("review", "a", 1, 2)]
SECOND = ("start", "a", 1, 2)
GATES_OF: dict[tuple[bool, bool, str], list[tuple[str, str, int, int]]] = {
    # (every step pauses, chained prompts, gate): the gates; in manual mode chained prompts have theirs each
    (True, False, "after"): [AFTER],
    (True, False, "before"): [BEFORE],
    (True, False, "both"): [BEFORE, AFTER],
    (True, True, "after"): BETWEEN,
    (True, True, "before"): [BEFORE, SECOND],
    (True, True, "both"): [BEFORE, BETWEEN[0], SECOND, BETWEEN[1]],
    (False, False, "after"): [AFTER],
    (False, False, "before"): [BEFORE],
    (False, False, "both"): [BEFORE, AFTER],
    (False, True, "after"): [BETWEEN[1]],
    (False, True, "before"): [BEFORE],
    (False, True, "both"): [BEFORE, BETWEEN[1]],
}


@pytest.mark.parametrize("place", ["after", "before", "both"])
@pytest.mark.parametrize("chained", [False, True])
@pytest.mark.parametrize("interactive", [None, True, False])
@pytest.mark.parametrize("mode", MODES)
def test_autonomy(mode: Any, interactive: bool | None, chained: bool, place: Any) -> None:
    prompt: Any = ["one", "two"] if chained else "one"
    workflow = Workflow(
        "W",
        steps=[work("a", prompt, interactive=interactive, gate=place), work("z", interactive=False, gate="before")],
        autonomous_mode=True if mode == "unattended" else mode,
    )
    driver = Driver(workflow, policy=approve)
    if mode == "unattended":
        driver.record(ModeChanged(mode="unattended"))
    driver.go()
    manual = mode in ("never", False)
    expected = GATES_OF[manual, chained, place] if manual or interactive else []
    assert driver.opened == [*expected, *([("start", "z", 1, 1)] if manual else [])]
    assert driver.state.status == "completed"
    assert driver.turns() == [*["a"] * (1 + chained), "z"]
    assert [attempt.number for attempt in driver.state.steps["a"].attempts] == [1], "chained prompts are one attempt"


@pytest.mark.parametrize("mode", ["never", "always"])
def test_a_locked_workflow_cannot_be_switched(mode: str) -> None:
    driver = run(work("a", interactive=True), mode=mode)
    message = driver.refused(ModeChanged(mode="unattended"), TransitionError)
    assert "locked" in message
    assert "autonomous_mode=True" in message


@pytest.mark.parametrize("before", ["never", "always", True, False])
@pytest.mark.parametrize("after", ["never", "always", True, False])
@pytest.mark.parametrize("switched", ["step-by-step", "gates", "unattended"])
def test_autonomy_defined_anew_counts_from_then_on(before: Any, after: Any, switched: Any) -> None:
    driver = Driver(Workflow("W", steps=[work("a")], autonomous_mode=before))
    if isinstance(before, bool):
        driver.record(ModeChanged(mode=switched))
    was = driver.state.mode
    driver.record(WorkflowChanged(autonomous_mode=after))
    locked = after if isinstance(after, str) else None
    kept = was if after is True and was != "step-by-step" else "gates"
    assert driver.state.mode == ("step-by-step" if after in ("never", False) else kept)
    assert (driver.state.locked, driver.state.autonomous_mode) == (locked, after)


def test_inputs_defined_anew_are_the_next_turns() -> None:
    driver = Driver(Workflow("W", steps=[work("a", "{{ goal }} {{ who }}")], inputs={"goal": "x", "who": "y"}))
    driver.record(WorkflowChanged(defaults={"goal": "hats"}, inputs={"who": "me"}))
    assert driver.go().prompt("a") == "hats me"
    assert driver.state.defaults == {"goal": "hats", "who": "y"}


def test_an_open_gate_stays_open_when_the_mode_changes() -> None:
    driver = run(work("a"), work("b"), mode=False)
    opened = driver.gate().id
    driver.record(ModeChanged(mode="gates"))
    assert driver.go().gate().id == opened
    assert driver.decide("approve").state.status == "completed"
    assert driver.opened == [AFTER], "b runs in the new mode"


def test_manual_mode_says_why_a_step_that_asks_for_no_pause_has_one() -> None:
    for kind, place in (("review", "after"), ("start", "before")):
        driver = run(work("a", interactive=False, gate=place), mode=False)
        assert driver.gate().kind == kind
        assert "every step pauses" in driver.gate().payload["note"]
        assert "note" not in run(work("a", gate=place), mode=False).gate().payload


def test_each_chained_prompt_may_be_edited_before_it_is_sent() -> None:
    def asked() -> Driver:
        return run(work("a", ["one", "two", "three"], gate="before"), mode=False).decide("approve")

    def prompts(driver: Driver) -> list[str]:
        return [attempt.prompt for attempt in driver.state.steps["a"].attempts]

    driver = asked()
    gate = driver.gate()
    assert (gate.kind, gate.attempt, driver.turns()) == ("start", 1, ["a"])
    driver.decide("approve", output="TWO").decide("approve")
    assert (driver.state.status, prompts(driver)) == ("completed", ["one\n\nTWO\n\nthree"])

    driver = asked()
    driver.record(RunFinished(status="stopped"))
    driver.record(RunResumed())
    assert (driver.go().gate().kind, driver.gate().attempt, driver.turns()) == ("start", 1, ["a"]), "it asks again"
    driver.record(GateDecided(gate_id=driver.gate().id, decision=Decision(action="approve")))
    driver.until_running("a").cut()
    assert (driver.go().gate().kind, prompts(driver)) == ("start", ["one\n\ntwo", "two"])
    assert driver.decide("approve").state.status == "completed"

    driver = asked()
    assert driver.decide("skip").state.status == "completed"
    assert driver.text("a") == ""


# -- decisions --------------------------------------------------------------------------------------------------------


def at_gate(kind: GateKind) -> Driver:
    """A run that waits at such a gate of step ``b`` (of ``gate`` for a module's); ``z`` comes after it."""
    match kind:
        case "review":
            return run(work("a"), work("b", interactive=True), work("z"))
        case "start":
            return run(work("a"), work("b", "do {{ a }}", interactive=True, gate="before"), work("z"))
        case "verdict":
            return run(work("b"), gate(1, 5), work("z"), script={"gate": [Reply("who knows")]})
        case "exhausted":
            return run(work("b"), gate(1, 0), work("z"), script={"gate": [loop("not yet"), go_on("at last")]})
        case "failed":
            return run(work("a"), work("b"), work("z"), script={"b": [Reply(error="bad key")]})
        case "stale":
            driver = run(work("a"), work("b"), work("z"))
            driver.record(RunResumed())
            driver.record(Rewound(to="a"))
            return driver.go()
        case "question":
            return run(work("a"), work("b"), work("z"), script={"b": [Reply("said", ask=("which?",))]})
        case "permission":
            return run(work("a"), work("b"), work("z"), script={"b": [Reply("said", tools=("remove",))]})
        case "may_have_run":
            driver = Driver(Workflow("W", steps=[work("a"), work("b", idempotent=False), work("z")]))
            return driver.until_running("b").cut().go()
        case "budget":
            return run(work("a"), work("b"), work("z"), limits={"max_turns": 1})
    raise AssertionError(kind)


# (kind, action) -> status of the step after the decision, its text after the run went on, attempts, end of the run.
EFFECTS: dict[tuple[str, str], tuple[str, str, int, str]] = {
    ("review", "approve"): ("finished", "b 1", 1, "completed"),
    ("review", "reject"): ("ready", "", 2, "waiting"),
    ("review", "skip"): ("skipped", "", 1, "completed"),
    ("review", "stop"): ("due", "", 1, "stopped"),
    ("start", "approve"): ("ready", "b 1", 1, "completed"),
    ("start", "skip"): ("skipped", "", 0, "completed"),
    ("start", "stop"): ("pending", "", 0, "stopped"),
    ("verdict", "approve"): ("finished", "who knows", 1, "completed"),
    ("verdict", "reject"): ("looping", "gate 2", 2, "completed"),
    ("verdict", "retry"): ("ready", "gate 2", 2, "completed"),
    ("verdict", "skip"): ("skipped", "", 1, "completed"),
    ("verdict", "stop"): ("due", "", 1, "stopped"),
    ("exhausted", "approve"): ("finished", "not yet", 1, "completed"),
    ("exhausted", "retry"): ("looping", "at last", 2, "completed"),
    ("exhausted", "skip"): ("skipped", "", 1, "completed"),
    ("exhausted", "stop"): ("due", "", 1, "stopped"),
    ("failed", "retry"): ("ready", "b 2", 2, "completed"),
    ("failed", "skip"): ("skipped", "", 1, "completed"),
    ("failed", "stop"): ("due", "", 1, "stopped"),
    ("stale", "approve"): ("finished", "b 1", 1, "waiting"),
    ("stale", "retry"): ("ready", "b 2", 2, "waiting"),
    ("stale", "skip"): ("skipped", "", 1, "waiting"),
    ("stale", "stop"): ("finished", "b 1", 1, "stopped"),
    ("question", "answer"): ("running", "said", 1, "completed"),
    ("question", "stop"): ("asking", "", 1, "stopped"),
    ("permission", "approve"): ("running", "said", 1, "completed"),
    ("permission", "reject"): ("running", "said", 1, "completed"),
    ("permission", "stop"): ("asking", "", 1, "stopped"),
    ("may_have_run", "approve"): ("finished", "", 1, "completed"),
    ("may_have_run", "retry"): ("ready", "b 1", 2, "completed"),
    ("may_have_run", "skip"): ("skipped", "", 1, "completed"),
    ("may_have_run", "stop"): ("due", "", 1, "stopped"),
    ("budget", "approve"): ("pending", "b 1", 1, "waiting"),
    ("budget", "stop"): ("pending", "", 0, "stopped"),
}
WORDS = {"reject": "name the tests", "answer": "the red one"}
ALL_ACTIONS = ("approve", "reject", "retry", "skip", "answer", "stop")


def test_the_tables_name_the_same_decisions() -> None:
    assert set(EFFECTS) == {(kind, action) for kind, actions in ACTIONS.items() for action in actions}


@pytest.mark.parametrize(("kind", "action"), [*itertools.product(ACTIONS, ALL_ACTIONS)])
def test_decision(kind: Any, action: Any) -> None:
    driver = at_gate(kind)
    opened = driver.gate()
    assert (opened.kind, opened.actions) == (kind, ACTIONS[kind])
    made = GateDecided(gate_id=opened.id, decision=Decision(action=action, feedback=WORDS.get(action)))
    if (kind, action) not in EFFECTS:
        assert f"cannot be answered with '{action}'. Possible: {', '.join(ACTIONS[kind])}" in driver.refused(
            made, TransitionError
        )
        return
    status, text, attempts, end = EFFECTS[kind, action]
    about = driver.state.steps[opened.step]
    driver.record(made)
    assert (about.status, driver.state.gates) == (status, {})
    assert "already" in driver.refused(made, AlreadyDecided)
    driver.go()
    assert (driver.text(about.id), len(about.attempts), driver.state.status) == (text, attempts, end)
    assert (driver.turns().count("z") > 0) is (kind == "stale" or end == "completed")


@pytest.mark.parametrize("kind", ACTIONS)
@pytest.mark.parametrize("action", ALL_ACTIONS)
def test_an_edited_text_goes_with_approve_at_some_gates_only(kind: Any, action: Any) -> None:
    driver = at_gate(kind)
    edited = '{"path": "y"}' if kind == "permission" else "edited"
    decision = Decision(action=action, feedback=WORDS.get(action), output=edited)
    if action != "approve" or kind not in EDITABLE:
        driver.refused(GateDecided(gate_id=driver.gate().id, decision=decision), TransitionError)
        return
    about = driver.state.steps[driver.gate().step]
    driver.decide("approve", output=edited)
    assert driver.state.status == "completed"
    if kind == "permission":
        assert [attempt.edited for attempt in about.attempts] == [False], "it is no output that was edited"
    elif kind == "start":
        assert (about.attempts[-1].prompt, driver.text("b")) == ("edited", "b 1")
    else:
        assert (about.last.edited, about.last.text, driver.text(about.id)) == (True, "edited", "edited")
        assert [attempt.number for attempt in about.attempts] == [1, 2], "the edit is an attempt of its own"
        assert about.attempts[0].text != "edited"
        assert about.last.duration_s == 0.0


@pytest.mark.parametrize("kind", ["failed", "may_have_run", "stale"])
def test_retry_with_another_prompt(kind: Any) -> None:
    driver = at_gate(kind).decide("retry", prompt="try {{ this }}")
    assert driver.prompt("b") == "try {{ this }}"


@pytest.mark.parametrize(
    ("kind", "decision"),
    [
        ("review", Decision(action="reject")),
        ("review", Decision(action="reject", feedback="  \n")),
        ("verdict", Decision(action="reject")),
        ("question", Decision(action="answer", feedback=" ")),
        ("review", Decision(action="approve", prompt="p")),
        ("permission", Decision(action="reject")),
        ("review", Decision(action="approve", scope="once")),
        ("permission", Decision(action="reject", feedback="no", scope="run")),
        ("permission", Decision(action="approve", output='{"path": "y"}', scope="run")),
        ("permission", Decision(action="approve", output='{"path": "y"')),
        ("permission", Decision(action="approve", output='{"path": NaN}')),
        ("permission", Decision(action="approve", output="[1]")),
    ],
)
def test_a_decision_without_its_words_is_refused(kind: Any, decision: Decision) -> None:
    driver = at_gate(kind)
    driver.refused(GateDecided(gate_id=driver.gate().id, decision=decision), TransitionError)


def test_what_a_turn_does_with_tools_is_kept_with_its_attempt() -> None:
    driver = Driver(Workflow("W", steps=[work("b")]), {"b": [Reply("said")]}).until_running("b")
    where = {"step": "b", "path": "b", "attempt": 1, "turn": 1}
    driver.record(ToolCalled(**where, call_id="1", name="add", arguments='{"a": 1}'))
    driver.record(ask(driver.state, driver.state.steps["b"], "which?"))
    driver.record(ToolCalled(**where, call_id="2", name="add", arguments='{"a": 2}'))
    driver.record(ToolReturned(**where, call_id="1", name="add", text="1"))
    driver.refused(ToolReturned(**where, call_id="1", name="add", text="1"), TransitionError)
    driver.refused(ToolReturned(**where, call_id="2", name="sub", text="1"), TransitionError)
    driver.refused(ToolCalled(**{**where, "attempt": 2}, call_id="3", name="add"), TransitionError)
    one, two = driver.state.steps["b"].attempts[0].tools
    assert (one.arguments, one.text, one.failed) == ('{"a": 1}', "1", False)
    assert one.returned_at is not None
    assert (two.arguments, two.text, two.returned_at) == ('{"a": 2}', None, None)
    driver.decide("answer", "this")
    driver.refused(ToolReturned(**where, call_id="2", name="add", text="1"), TransitionError)
    assert driver.state.status == "completed"


def test_for_how_long_a_tool_is_allowed_is_in_the_events() -> None:
    tools = ("remove", "write", "remove", "send")
    driver = Driver(Workflow("W", steps=[work("b")]), {"b": [Reply("said", tools=tools)]}).go()
    assert driver.gate().payload == {"tool": "remove", "arguments": {"path": "x"}}
    assert driver.gate().digest == digest('remove\n{\n  "path": "x"\n}')
    driver.decide("approve", scope="run").decide("approve").decide("approve", scope="once").decide("approve")
    assert driver.state.status == "completed"
    assert [name for name, _ in driver.state.allowed] == ["remove"]
    assert [name for name, _ in folded(driver.events).allowed] == ["remove"]


def test_the_second_answer_is_told_of_the_first() -> None:
    driver = at_gate("review")
    opened = driver.gate().id
    driver.decide("approve", by="Ada")
    at = time.strftime("%H:%M", time.localtime(driver.state.decisions[opened].at))
    for action in ALL_ACTIONS:
        again = GateDecided(gate_id=opened, decision=Decision(action=action, feedback="x"))
        message = driver.refused(again, AlreadyDecided)
        assert message == f"already approved by Ada at {at}; nothing was changed."


@pytest.mark.parametrize(
    "gate_id", ["", "x", "r/b/1/9", "r/b/1/zz", "r/b/1/²", "r/b/1/-1", "r/none/1/1", "////", "r/b/1/"]
)
def test_a_gate_that_never_was(gate_id: str) -> None:
    driver = at_gate("review")
    message = driver.refused(GateDecided(gate_id=gate_id, decision=Decision(action="approve")), TransitionError)
    assert driver.gate().id in message, "it says which gate is open"


def test_the_gate_of_a_turn_that_is_over_is_closed() -> None:
    driver = at_gate("question")
    opened = driver.gate().id
    driver.cut()
    assert "its turn is over" in driver.refused(
        GateDecided(gate_id=opened, decision=Decision(action="answer", feedback="x")), AlreadyDecided
    )


def test_a_step_removed_and_added_again_has_gates_of_its_own() -> None:
    """A late click on the first gate must not approve the second one unseen."""
    driver = at_gate("review")
    opened = driver.gate().id
    driver.record(StepRemoved(step="b"))
    driver.add(work("b", interactive=True), after="a").go()
    assert driver.gate().id != opened
    driver.refused(GateDecided(gate_id=opened, decision=Decision(action="approve")), AlreadyDecided)


@pytest.mark.parametrize(
    ("kind", "at"),
    [(kind, at) for kind in ACTIONS for at in ("pending", "running", "due", "finished", "stale")],
)
def test_a_gate_opens_only_where_it_belongs(kind: Any, at: str) -> None:
    """Of all kinds, the one that the step's status asks for."""
    driver = Driver(Workflow("W", steps=[work("a"), work("b", interactive=True)]))
    if at != "pending":
        driver.until_running("a" if at == "running" else "b")
    about = {"pending": "a", "running": "a", "due": "b", "finished": "a", "stale": "a"}[at]
    if at == "due":
        driver.end(driver.state.steps["b"], Reply("x"))
    if at == "stale":
        driver.cut()
        change(driver, work("a", "other"))
    asks = kind if kind in ("question", "permission") else None
    fits = {"pending": "start", "running": asks, "due": "review", "finished": None, "stale": "stale"}[at]
    gate = Gate(id="r/x/1/1", kind=kind, step=about, path=about, attempt=1, digest="", actions=ACTIONS[kind])
    opening = GateOpened(gate=gate, prompt=("work",) if kind == "start" else None)
    if kind == fits:
        if kind == "start":
            driver.refused(GateOpened(gate=gate), TransitionError)  # nothing to ask about
        driver.record(opening)
    else:
        driver.refused(opening, TransitionError)


# -- rejection --------------------------------------------------------------------------------------------------------


def test_a_rejected_step_hears_why() -> None:
    driver = at_gate("review").decide("reject", "name the tests")
    assert driver.prompt("b") == "work\n\n## Your last answer\n\nb 1\n\n## Feedback on it\n\nname the tests"
    driver.decide("reject", "and run them")
    assert driver.prompt("b").endswith("## Your last answer\n\nb 2\n\n## Feedback on it\n\nand run them")
    assert "name the tests" in driver.prompt("b"), "what it was told before stays"
    assert [attempt.feedback for attempt in driver.state.steps["b"].attempts] == [
        "name the tests",
        "and run them",
        None,
    ]


def test_an_agent_with_a_session_gets_the_feedback_alone() -> None:
    driver = run(work("b", interactive=True), script={"b": [Reply("first", session="s1"), "second"]})
    driver.decide("reject", "shorter")
    assert driver.prompt("b") == "shorter"
    assert driver.state.steps["b"].last.session_id == "s1"


def test_a_template_may_place_the_feedback_itself() -> None:
    driver = run(work("b", "do it. {{ feedback }}", interactive=True))
    assert driver.prompt("b") == "do it. "
    assert driver.decide("reject", "{{ b }}").prompt("b") == "do it. {{ b }}"


def test_a_chained_prompt_is_rejected_alone() -> None:
    driver = run(
        work("b", ["one", "two"]), mode=False, script={"b": [Reply("1", session="s"), Reply("2", session="s")]}
    )
    driver.decide("approve").decide("reject", "again")
    last = driver.state.steps["b"].last
    assert (last.number, last.prompt, driver.gate().attempt) == (2, "again", 2)
    assert driver.decide("approve").state.status == "completed"


def test_time_between_chained_prompts_is_a_persons() -> None:
    driver = run(work("b", ["one", "two"]), mode=False)
    before = len(driver.events)
    driver.record(ModeChanged(mode="gates"))
    driver.record(ModeChanged(mode="step-by-step"))
    assert len(driver.events) == before + 2, "two seconds of the driver's clock pass"
    driver.decide("approve").decide("approve")
    assert driver.state.steps["b"].last.duration_s == 2.0, "each turn took one second"


@pytest.mark.parametrize("session", [None, "s"])
def test_an_answer_in_mid_chain_may_be_edited(session: str | None) -> None:
    replies = [Reply(f"answer {n}", session=session) for n in (1, 2, 3, 4)]
    driver = run(work("b", ["one", "two", "three"]), mode=False, script={"b": replies})
    driver.decide("approve", output="mine")
    told = "\n\n## Your last answer, changed by a person to this\n\nmine" if session else ""
    b = driver.state.steps["b"]

    def attempts() -> list[tuple[int, str, str, bool]]:
        return [(one.number, one.prompt, one.text, one.edited) for one in b.attempts]

    first = [(1, "one", "answer 1", False), (2, "one", "mine", True)]
    assert attempts() == [*first, (3, f"two{told}", "answer 2", False)]
    assert [driver.state.text(answer) for _, answer in b.said] == ["mine"], "who keeps no session is told by this"
    assert driver.gate().attempt == 3
    assert driver.decide("approve").gate().attempt == 3
    assert attempts() == [*first, (3, f"two{told}\n\nthree", "answer 3", False)], "and it is told once"
    assert driver.decide("approve").state.status == "completed"
    assert driver.text("b") == "answer 3"
    assert (b.last.duration_s or 0.0) < 10.0


def test_an_edited_answer_is_told_again_when_the_turn_was_cut_short() -> None:
    driver = run(work("b", ["one", "two"]), mode=False, script={"b": [Reply("1", session="s")]})
    driver.record(GateDecided(gate_id=driver.gate().id, decision=Decision(action="approve", output="mine")))
    driver.until_running("b").cut().go()
    texts = [(one.number, one.text) for one in driver.state.steps["b"].attempts]
    assert texts == [(1, "1"), (2, "mine"), (3, ""), (4, "b 2")]
    assert driver.prompt("b").endswith("mine")


# -- loops ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("back", [1, 2, 3])
def test_a_loop_goes_back_that_many_steps(back: int) -> None:
    steps = [work("a"), separator("--"), work("b"), separator(), work("c"), separator(), gate(back, 1), work("z")]
    driver = run(*steps, script={"gate": [loop(), go_on()]})
    names = ["a", "b", "c", "gate"]
    assert driver.turns() == [*names, *names[3 - back :], "z"], "separators do not count"


@pytest.mark.parametrize("most", [0, 1, 5])
@pytest.mark.parametrize("on_exhausted", ["pause", "continue", "fail"])
def test_the_jumps_are_used_up(most: int, on_exhausted: Any) -> None:
    driver = run(work("a"), gate(1, most, on_exhausted=on_exhausted), work("z"), script={"gate": [loop("no")] * 20})
    assert driver.turns().count("gate") == most + 1
    end = {"pause": "waiting", "continue": "completed", "fail": "failed"}[on_exhausted]
    assert (driver.state.status, driver.turns().count("z")) == (end, int(end == "completed"))
    if on_exhausted == "continue":
        assert driver.text("gate") == "no"
    if on_exhausted == "fail":
        assert driver.state.reason == f"gate: Not good enough after {most} {'repeat' if most == 1 else 'repeats'}: “no”"
        driver.record(RunResumed())
        assert driver.go().gate().kind == "exhausted", "resumed, it asks instead of failing again"


def test_without_a_limit_a_loop_goes_on() -> None:
    driver = run(work("a"), gate(1, None), script={"gate": [loop()] * 40})
    assert (driver.turns().count("a"), driver.state.status) == (41, "completed")


@pytest.mark.parametrize("count", [1, 2, 3])
def test_more_iterations_may_be_granted(count: int) -> None:
    driver = run(work("a"), gate(1, 1), script={"gate": [loop()] * 20})
    driver.decide("retry", count=count)
    assert driver.turns().count("a") == 2 + count
    assert driver.gate().payload["iterations"] == 1 + count
    assert driver.decide("retry").turns().count("a") == 3 + count


def test_steps_to_leave_out_while_the_loop_is_active() -> None:
    steps = [work("a"), work("b"), gate(2, 3, loop_skip=["a"]), work("z", "{{ a }} {{ b }}")]
    driver = run(*steps, script={"gate": [loop(), loop(), go_on()]})
    assert driver.turns() == ["a", "b", "gate", "b", "gate", "b", "gate", "z"]
    assert driver.prompt("z") == "a 1 b 3", "its output is kept"
    assert driver.state.steps["a"].status == "skipped"


def test_a_step_that_runs_once() -> None:
    driver = run(work("a", execute_once=True), work("b"), gate(2, 3), script={"gate": [loop(), go_on()]})
    assert driver.turns() == ["a", "b", "gate", "b", "gate"]
    assert driver.text("a") == "a 1"


def test_loops_in_loops_begin_anew() -> None:
    script = {"inner": [loop(), go_on(), loop(), go_on()], "outer": [loop(), go_on()]}
    steps = [work("a"), work("b"), gate(1, 1, "inner"), gate(3, 1, "outer"), work("z")]
    driver = run(*steps, script=script)
    once = ["b", "inner", "b", "inner"]
    assert driver.turns() == ["a", *once, "outer", "a", *once, "outer", "z"]
    assert (driver.opened, driver.state.status) == ([], "completed")


def test_the_repeated_step_is_told_why() -> None:
    script = {"gate": [Reply("the whole report", Verdict(action="loop", reason="name the tests")), go_on()]}
    driver = run(work("a", "write"), work("b", "check"), gate(2, 3), script=script)
    assert driver.prompt("a") == (
        "write\n\n## Not accepted yet by gate (pass 2)\n\nname the tests\n\n## Output of gate\n\nthe whole report"
    )
    assert driver.prompt("b") == "check", "only the step that it goes back to is told"


@pytest.mark.parametrize("passed_over", ["loop_skip", "execute_once", "both", "by you"])
def test_the_first_repeated_step_that_runs_is_told_why(passed_over: str) -> None:
    plan, draft = work("plan"), work("draft")
    skip: tuple[str, ...] = ()
    if passed_over == "execute_once":
        plan = work("plan", execute_once=True)
    elif passed_over == "by you":
        plan = work("plan", gate="before", interactive=True)
    else:
        skip = ("plan",) if passed_over == "loop_skip" else ("plan", "draft")
    script = {"gate": [loop("no tests"), go_on()]}
    driver = run(plan, draft, work("impl"), gate(3, loop_skip=skip), work("z"), script=script)
    if passed_over == "by you":
        driver.decide("approve").decide("skip")
    told, after = ("impl", "draft") if passed_over == "both" else ("draft", "impl")
    assert driver.prompt(told) == "work\n\n## Not accepted yet by gate (pass 2)\n\nno tests"
    assert [driver.prompt(id) for id in ("plan", after, "z")] == ["work"] * 3
    assert driver.state.status == "completed"


def test_a_template_may_place_the_reason_itself() -> None:
    script = {"gate": [loop("name the tests"), go_on()]}
    driver = run(work("a", "{{ loop.iteration }}: {{ loop.reason }}"), gate(1, 3), script=script)
    assert (driver.prompt("a", 1), driver.prompt("a", 2)) == ("1: ", "2: name the tests")


def test_the_number_of_the_pass_alone_does_not_keep_the_reason_away() -> None:
    script = {"gate": [loop("name the tests"), go_on()]}
    driver = run(work("a", "pass {{ loop.iteration }}"), gate(1, 3), script=script)
    assert driver.prompt("a", 1) == "pass 1"
    assert driver.prompt("a", 2) == "pass 2\n\n## Not accepted yet by gate (pass 2)\n\nname the tests"


def test_the_reason_is_that_of_the_loop_that_went_back() -> None:
    script = {"inner": [go_on(), go_on()], "outer": [loop("too long"), go_on()]}
    steps = [work("a", "{{ loop.reason }}"), gate(1, 3, "inner"), gate(2, 3, "outer")]
    assert run(*steps, script=script).prompt("a") == "too long"


def test_a_rejected_verdict_goes_back_with_the_persons_words() -> None:
    driver = at_gate("verdict").decide("reject", "see line 3")
    assert "Not accepted yet by gate (pass 2)\n\nsee line 3" in driver.prompt("b")


def test_rewinding_before_a_loop_begins_it_anew() -> None:
    driver = run(work("a"), work("b"), gate(1, 1, loop_skip=["b"]), script={"gate": [loop()] * 9})
    assert driver.turns().count("b") == 1
    driver.record(Rewound(to="a", later=True))
    driver.go()
    assert driver.turns().count("b") == 2, "no loop is active"
    assert driver.state.steps["b"].last.iteration == 1
    assert driver.turns().count("gate") == 4, "both of its passes again"


def test_iterations_are_counted_by_events_alone() -> None:
    steps = [work("a"), work("b"), gate(1, 2, "inner"), gate(3, None, "outer"), work("z")]
    script = {"inner": [loop()] * 7 + [go_on()] * 9, "outer": [loop(), go_on()]}
    driver = run(*steps, script=script, policy=approve)
    for end in range(len(driver.events) + 1):
        one, two = folded(driver.events[:end]), folded(driver.events[:end])
        assert one == two
        one.seq += 1
        assert one != two, "states are compared deeply"
    assert folded(driver.events) == driver.state


# -- verdicts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "kinds", "end"),
    [
        ("no verdict at all", ["verdict"], "waiting"),
        ('{"action": "maybe"}', ["verdict"], "waiting"),
        ('{"action": "continue"} no: {"action": "loop", "reason": "a "quoted" word"}', ["verdict"], "waiting"),
        ('so: {"action": "continue"}', [], "completed"),
        ('{"action": "pause", "reason": "look"}', ["verdict"], "waiting"),
        ('{"action": "error", "reason": "no tests"}', ["failed"], "waiting"),
        ('{"action": "stop", "reason": "enough"}', [], "stopped"),
    ],
)
def test_verdict(text: str, kinds: list[str], end: str) -> None:
    driver = run(work("a"), gate(1, 3), work("z"), script={"gate": [text]})
    assert [kind for kind, *_ in driver.opened] == kinds
    assert driver.state.status == end
    assert driver.turns().count("z") == int(end == "completed"), "a gate never fails open"
    if end == "stopped":
        assert driver.state.reason == "gate: enough"
    if "error" in text:
        assert driver.gate().payload["error"] == "no tests"


EXPECTED = 'Expected at the end: {"action": "continue" or "loop", "reason": "…"}.'
POSSIBLE = "Possible: continue, loop, pause, stop, error."


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", f"gate gave no verdict. {EXPECTED}"),
        ("looks good", f"gate gave no verdict. {EXPECTED}"),
        ('{"result": "loop"}', f'gate gave no verdict: the JSON at the end has no "action". {EXPECTED}'),
        ('{"action": "lop"}', f"gate's verdict says “lop”. Did you mean 'loop'? {POSSIBLE}"),
        ('{"action": "LOOP"}', f"gate's verdict says “LOOP”. Did you mean 'loop'? {POSSIBLE}"),
        ('{"action": "\\ud800 again"}', f"gate's verdict says “? again”. {POSSIBLE}"),
        (f'{{"action": "{"x" * 999}"}}', f"gate's verdict says “{'x' * 79}…”. {POSSIBLE}"),
        ('{"action": ["loop"]}', f'gate\'s verdict cannot be followed: its "action" is no text. {EXPECTED}'),
        ('{"action": "loop", "reason": 5}', "gate's verdict: reason=5 is not valid: Input should be a valid string."),
        (
            '{"action": "continue"}\n{"reason":\n "a "b"", "action": "lo',
            f'gate\'s verdict is not JSON that can be read: “{{"reason": "a "b"", "action": "lo”. {EXPECTED}',
        ),
        ("'action': 'loop'", f"gate's verdict is not JSON that can be read: “'action': 'loop'”. {EXPECTED}"),
    ],
)
def test_a_verdict_that_cannot_be_followed_is_named(text: str, words: str) -> None:
    driver = run(work("a"), gate(1, 3), script={"gate": [text]})
    assert (driver.gate().kind, driver.gate().payload["reason"]) == ("verdict", words)


def test_only_a_module_goes_back() -> None:
    driver = run(work("a"), work("b"), script={"a": [loop()]})
    assert "only a module can go back" in driver.gate().payload["reason"]
    driver.decide("reject", "once more")
    assert driver.turns() == ["a", "a", "b"], "rejected, the step itself runs again"


def test_in_manual_mode_a_person_sees_the_verdict_before_it_counts() -> None:
    driver = run(work("a"), gate(1, 3), mode=False, script={"gate": [loop(), go_on()]}).decide("approve")
    assert driver.gate().step == "gate"
    assert driver.decide("approve").turns() == ["a", "gate", "a"]


# -- failures, questions, crashes -------------------------------------------------------------------------------------


def test_a_turn_that_is_tried_again_stays_the_same_attempt() -> None:
    driver = run(
        work("a"), script={"a": [Reply(error="busy", retry_in_s=4.0), Reply(error="busy", retry_in_s=4.0), "ok"]}
    )
    (attempt,) = driver.state.steps["a"].attempts
    assert (attempt.number, attempt.text, len(attempt.turns), len(attempt.errors)) == (1, "ok", 1, 2)
    assert driver.state.status == "completed"
    assert attempt.duration_s == 3.0, "each try took one second, and waiting for the next one is no work"


def test_when_it_is_tried_again() -> None:
    driver = Driver(Workflow("W", steps=[work("a")]), {"a": [Reply(error="busy", retry_in_s=4.0)]}).until_running("a")
    driver.advance()
    (action,) = next_actions(driver.state)
    assert action.not_before == driver.events[-1].at + 4.0
    assert driver.state.steps["a"].last.duration_s is not None
    change(driver, work("a", "other"))
    (action,) = next_actions(driver.state)
    assert action.not_before is None, "what is defined anew does not wait"


def test_an_error_that_is_not_tried_again_asks() -> None:
    driver = at_gate("failed")
    assert driver.gate().payload == {"error": "bad key"}
    driver.decide("retry")
    assert (driver.text("b"), driver.state.steps["b"].attempt) == ("b 2", 2)


@pytest.mark.parametrize("idempotent", [True, False])
def test_a_step_that_was_cut_short_is_the_next_attempt(idempotent: bool) -> None:
    driver = Driver(Workflow("W", steps=[work("a", idempotent=idempotent)]))
    driver.until_running("a").cut("kernel stopped").go()
    first = driver.state.steps["a"].attempts[0]
    assert (first.cut_short, first.text) == ("kernel stopped", "")
    if not idempotent:
        assert driver.gate().kind == "may_have_run"
        assert driver.turns() == ["a"], "it does not run again unasked"
        driver.decide("retry")
    assert (driver.turns(), driver.state.steps["a"].attempt, driver.state.status) == (["a", "a"], 2, "completed")


@pytest.mark.parametrize("when", ["it runs", "its gate is open", "its gate is due"])
@pytest.mark.parametrize("how", ["changed", "an earlier one runs again", "all runs again from an earlier one"])
def test_what_may_have_run_is_asked_about_however_the_run_comes_to_it_again(when: str, how: str) -> None:
    steps = [work("a"), work("pay", ["one", "two"], idempotent=False)]
    driver = Driver(Workflow("W", steps=steps)).until_running("pay")
    driver.end(driver.state.steps["pay"])
    driver.until_running("pay")
    driver.record(cut_short(driver.state.steps["pay"], "its process died"))
    if when != "it runs":
        driver.go()
    if when == "its gate is due":
        driver.record(RunFinished(status="stopped"))
        driver.record(RunResumed())
    if how == "changed":
        change(driver, work("pay", ["one", "other"], idempotent=False))
    else:
        driver.record(Rewound(to="a", later=how.startswith("all")))
    driver.go()
    assert (driver.gate().step, driver.gate().kind, driver.turns().count("pay")) == ("pay", "may_have_run", 2)
    driver.decide("retry")
    assert (driver.turns().count("pay"), driver.state.status) == (4, "completed")
    assert driver.prompt("pay") == ("one\n\nother" if how == "changed" else "one\n\ntwo")


def test_who_runs_again_the_very_step_that_may_have_run_has_answered() -> None:
    driver = Driver(Workflow("W", steps=[work("pay", idempotent=False)])).until_running("pay").cut().go()
    driver.record(Rewound(to="pay"))
    assert (driver.go().turns(), driver.state.status) == (["pay", "pay"], "completed")


def test_a_cut_turn_keeps_feedback_session_and_prompt() -> None:
    driver = run(work("a", interactive=True), script={"a": [Reply("x", session="s"), Reply("y")]})
    driver.record(GateDecided(gate_id=driver.gate().id, decision=Decision(action="reject", feedback="shorter")))
    driver.until_running("a").cut().until_running("a")
    assert [attempt.prompt for attempt in driver.state.steps["a"].attempts] == ["work", "shorter", "shorter"]
    assert driver.state.steps["a"].last.session_id == "s"


@pytest.mark.parametrize("ends", ["cut short", "failed"])
def test_a_session_is_continued_whatever_became_of_the_turn_that_opened_it(ends: str) -> None:
    driver = Driver(Workflow("W", steps=[work("a")])).until_running("a")
    where: dict[str, Any] = {"step": "a", "path": "a", "attempt": 1}
    driver.record(SessionOpened(**where, session_id="s"))
    assert "turn 1" in driver.refused(SessionOpened(**{**where, "attempt": 2}, session_id="t"), TransitionError)
    if ends == "failed":
        driver.end(driver.state.steps["a"], Reply(error="dropped"))
        driver.go().decide("retry")
    else:
        driver.cut().go()
    first, second = driver.state.steps["a"].attempts
    assert (first.session_id, second.session_id, second.prompt) == ("s", "s", "work")


def test_a_question_waits_for_its_answer() -> None:
    driver = at_gate("question")
    b = driver.state.steps["b"]
    assert (b.status, driver.gate().payload, driver.state.status) == ("asking", {"question": "which?"}, "waiting")
    message = driver.refused(TurnFinished(step="b", path="b", attempt=1, text="x"), TransitionError)
    assert "asking" in message
    driver.decide("answer", "the red one")
    assert b.answers == (("which?", "the red one"),)
    assert b.last.asked_s == 1.0
    assert (driver.text("b"), driver.state.status) == ("said", "completed")


def test_answers_are_not_asked_for_again_after_any_number_of_cuts() -> None:
    questions = ("one?", "two?", "three?")
    driver = Driver(Workflow("W", steps=[work("a")]), {"a": [Reply("said", ask=questions)]})
    for question in questions:
        driver.go()
        assert driver.gate().payload["question"] == question
        driver.record(
            GateDecided(gate_id=driver.gate().id, decision=Decision(action="answer", feedback=f"to {question}"))
        )
        driver.cut()
    assert driver.go().text("a") == "said"
    assert len(driver.opened) == 3


@pytest.mark.parametrize("by", ["a decision", "run.stop()"])
def test_the_time_that_a_question_stood_open_is_not_the_turns_own(by: str) -> None:
    driver = at_gate("question")
    driver.record(ModeChanged(mode="step-by-step"))  # a second goes by
    if by == "a decision":
        driver.decide("stop")
    else:
        driver.cut("stopped by you")
    last = driver.state.steps["b"].last
    assert last.cut_short
    assert last.asked_s == 2.0
    assert last.duration_s == (2.0 if by == "a decision" else 1.0), "from its start to the question, and its end"


@pytest.mark.parametrize("ends", ["cut short", "it was to be tried again"])
def test_the_time_in_which_nobody_drove_the_run_is_not_the_turns_own(ends: str) -> None:
    driver = Driver(Workflow("W", steps=[work("a")]), {"a": [Reply(error="busy", retry_in_s=4.0)]}).until_running("a")
    driver.record(UsageReported(step="a", path="a", attempt=1, usage=Usage(input_tokens=1)))
    if ends != "cut short":
        driver.end(driver.state.steps["a"])
    heard = driver.state.at
    driver.record(RunResumed())
    driver.cut()
    last = driver.state.steps["a"].last
    assert (last.cut_short, last.ended_at) == ("its process died", heard)
    driver.until_running("a").cut()
    assert driver.state.steps["a"].last.duration_s == 1.0, "of the next one it is known"


def test_stopped_while_asking_it_asks_again() -> None:
    driver = at_gate("question").decide("stop")
    assert (driver.state.status, driver.kinds()[-2:]) == ("stopped", ["TurnCutShort", "RunFinished"])
    driver.record(RunResumed())
    assert driver.go().gate().payload == {"question": "which?"}


@pytest.mark.parametrize("kind", ACTIONS)
def test_stopping_closes_the_gate_and_resuming_opens_it_again(kind: Any) -> None:
    driver = at_gate(kind)
    before = driver.gate()
    for running in list(driver.state.running.values()):
        driver.record(cut_short(running, "stopped by you"))
    driver.record(RunFinished(status="stopped"))
    assert (driver.state.gates, next_actions(driver.state)) == ({}, [])
    message = driver.refused(
        GateDecided(gate_id=before.id, decision=Decision(action=before.actions[0])), TransitionError
    )
    assert "is stopped. Nothing was changed" in message
    assert "resume it first" in driver.refused(RunPaused(), TransitionError)
    driver.record(RunResumed())
    after = driver.go().gate()
    assert (after.kind, after.step, after.digest, after.payload) == (kind, before.step, before.digest, before.payload)
    assert after.id != before.id


@pytest.mark.parametrize("kind", ACTIONS)
def test_a_process_that_dies_leaves_the_gate_open(kind: Any) -> None:
    driver = at_gate(kind)
    before = driver.gate()
    again = Driver(events=driver.events)
    asked = {"question": Reply("said", ask=("which?",)), "permission": Reply("said", tools=("remove",))}.get(kind)
    again.script = {"b": [asked]} if asked is not None else {}
    again.cut().go()
    assert (again.gate().id == before.id) is (asked is None), "a question ends with its turn"
    assert again.gate().kind == kind


# -- pause, until -----------------------------------------------------------------------------------------------------


def test_pause_lets_finish_what_runs() -> None:
    driver = Driver(Workflow("W", steps=[work("a", interactive=True), work("b")])).until_running("a")
    driver.record(RunPaused(reason="lunch"))
    assert driver.state.status == "running"
    assert driver.go().gate().kind == "review", "a gate that is due opens"
    assert driver.decide("approve").state.status == "paused"
    assert driver.turns() == ["a"]
    assert "paused already" in driver.refused(RunPaused(), TransitionError)
    assert driver.unpause().turns() == ["a", "b"]


@pytest.mark.parametrize("until", ["a", "gate", "b", "z"])
def test_until(until: str) -> None:
    steps = [work("a"), gate(1, 3), work("b"), work("z")]
    driver = run(*steps, script={"gate": [loop(), go_on()]}, until=until)
    assert driver.turns() == ["a", "gate", "a", "gate", "b", "z"][: {"a": 1, "gate": 4, "b": 5, "z": 6}[until]]
    assert driver.state.status == ("completed" if until == "z" else "paused")
    if until != "z":
        assert f"as far as {until}" in driver.state.pause_reason
        assert driver.unpause().state.status == "completed"


def test_until_waits_for_the_gate_of_the_step() -> None:
    driver = run(work("a", interactive=True), work("b"), until="a")
    assert driver.state.status == "waiting"
    assert driver.decide("approve").state.status == "paused"


def test_until_a_step_that_is_removed_pauses_and_does_not_run_on() -> None:
    driver = run(work("a"), work("b"), work("c"), until="a")
    driver.record(RunUnpaused(until="b"))
    driver.record(StepRemoved(step="b"))
    assert (driver.go().state.status, driver.turns()) == ("paused", ["a"])


def test_resuming_a_paused_run_goes_on() -> None:
    driver = run(work("a"), work("b"), work("c"), until="a")
    driver.record(RunResumed(until="b"))
    assert (driver.go().turns(), driver.state.status) == (["a", "b"], "paused")


# -- a workflow that changes while it lives (UX.md §1a) ---------------------------------------------------------------


def test_a_new_step_comes_last_or_after_another() -> None:
    driver = run(work("a"), work("b"), mode=True, policy=approve, until="b")
    driver.record(RunResumed())
    driver.add(work("c")).go()
    assert (driver.turns(), list(driver.state.steps)) == (["a", "b", "c"], ["a", "b", "c"])
    driver.record(RunResumed())
    driver.add(work("x"), after="a")
    assert [step.id for step in driver.state.order] == ["a", "x", "b", "c"]
    driver.policy = None
    driver.go()
    assert driver.turns()[-1] == "x"
    assert driver.gate().kind == "stale", "what comes after it was made without it"
    assert driver.gate().step == "b"


def test_a_step_added_before_the_one_that_runs_waits_for_it() -> None:
    driver = Driver(Workflow("W", steps=[work("a"), work("b")])).until_running("b")
    driver.add(work("x"), after="a")
    assert next_actions(driver.state) == [], "one turn at a time"
    assert driver.go().turns() == ["a", "b", "x"]


@pytest.mark.parametrize(
    ("event", "words"),
    [
        (StepAdded(step={"agent": "a"}, fingerprint=""), "there is a step 'a' already"),
        (StepAdded(step={"agent": "c"}, after="bb", fingerprint=""), "no step 'bb'. Did you mean"),
        (StepChanged(step={"agent": "c"}, fingerprint=""), "no step 'c'"),
        (StepChanged(step={"kind": "separator"}, fingerprint=""), "a separator cannot be changed"),
        (StepChanged(step={"agent": "b"}, fingerprint=""), "'b' is running"),
        (StepRemoved(step="c"), "no step 'c'"),
        (StepRemoved(step="b"), "'b' is running"),
        (Rewound(to="b"), "running"),
        (Rewound(to="a"), "b is running"),
        (Rewound(to="c"), "no step 'c'"),
        (RunStarted(run_id="q", workflow={"name": "x"}), "has started already"),
        (RunFinished(status="stopped"), "b is running"),
        (TurnStarted(step="a", path="a", attempt=2, digest="", engine=""), "while step 'a' is finished"),
        (TurnFinished(step="b", path="b", attempt=2, text=""), "names attempt 2"),
        (TurnFinished(step="b", path="b", attempt=1, turn=2, text=""), "turn 2"),
        (LoopedBack(module="a", to="b", iteration=2), "while step 'a' is finished"),
        (StepSkipped(step="b", path="b", reason=""), "while step 'b' is running"),
    ],
)
def test_an_illegal_event_changes_nothing(event: AnyEvent, words: str) -> None:
    driver = Driver(Workflow("W", steps=[work("a"), work("b")])).until_running("b")
    message = driver.refused(event, TransitionError)
    assert words in message
    assert "\n" not in message


@pytest.mark.parametrize(("attempt", "turn"), [(0, 1), (2, 1), (1, 0), (1, 2), (-1, 1)])
def test_a_turn_that_is_not_next_cannot_start(attempt: int, turn: int) -> None:
    driver = Driver(Workflow("W", steps=[work("a")]))
    event = TurnStarted(step="a", path="a", attempt=attempt, turn=turn, digest="", engine="")
    assert "attempt 1, turn 1 is next" in driver.refused(event, TransitionError)


@pytest.mark.parametrize("later", ["b", "c"])
def test_one_step_works_at_a_time(later: str) -> None:
    workflow = Workflow("W", steps=[work(name) for name in "abc"], agents=[Agent(name, "work") for name in "abc"])
    driver = Driver(workflow, {})
    driver.advance()
    assert list(driver.state.running) == ["a"]
    started = driver.events[-1].model_dump() | {"step": later, "path": later}
    with pytest.raises(TransitionError, match=f"'{later}' cannot start: a is at work"):
        driver.record(TurnStarted(**started))
    assert list(driver.state.running) == ["a"]


def test_nothing_comes_before_the_start() -> None:
    assert "before RunStarted" in Driver().refused(RunPaused(), TransitionError)


@pytest.mark.parametrize(
    ("at", "status", "turns"),
    [
        ("pending", "pending", ["a"]),
        ("start", "pending", ["a"]),
        ("review", "pending", ["a", "a"]),
        ("finished", "finished", ["a"]),
        ("stale", "finished", ["a"]),
    ],
)
def test_a_step_is_defined_anew(at: str, status: str, turns: list[str]) -> None:
    places: dict[str, Any] = {"start": {"gate": "before", "interactive": True}, "review": {"interactive": True}}
    driver = Driver(Workflow("W", steps=[work("a", **places.get(at, {})), work("z", interactive=True)]))
    if at != "pending":
        driver.go()
    if at == "stale":
        change(driver, work("a", "second"))
        assert driver.go().gate("a").kind == "stale"
    change(driver, work("a", "new"))
    a = driver.state.steps["a"]
    assert (a.status, a.gate) == (status, None)
    if at in ("finished", "stale"):
        assert a.stale
        assert driver.go().gate("a").kind == "stale", "a person decides whether it runs again"
        driver.decide("retry", step="a")
        turns = [*turns, "a"]
    driver.go()
    assert [name for name in driver.turns() if name == "a"] == turns
    assert driver.prompt("a") == "new"


ALL_PARTS = {"prompt": "new", "engine": "other", "model": "small", "timeout_s": 9.0}


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"prompt": "new"}, "its prompt changed after it ran"),
        ({"engine": "other"}, "its engine changed after it ran"),
        ({"model": "small"}, "its model changed after it ran"),
        ({"reasoning_effort": "low"}, "its model changed after it ran"),
        ({"timeout_s": 9.0}, "its options changed after it ran"),
        ({}, "its inputs changed after it ran"),
        (ALL_PARTS, "its prompt, engine, model and options changed after it ran"),
    ],
)
def test_what_is_stale_says_what_of_it_changed(changed: dict[str, Any], words: str) -> None:
    driver = run(work("a"), work("b"))
    driver.record(RunResumed())
    change(driver, work("a", changed.get("prompt", "work"), **{k: v for k, v in changed.items() if k != "prompt"}))
    assert driver.go().gate().payload["reason"] == f"a: {words}."
    driver.decide("retry")
    assert driver.gate().payload["reason"] == "b: a changed after this ran."


def test_agents_that_changed_are_said_to_by_each_of_their_steps() -> None:
    driver = run(step("x", id="a"), step("x", id="b"), agents=["x"])
    driver.record(RunResumed())
    for id in ("a", "b"):
        data = {"agent": "x", "id": id}
        driver.record(StepChanged(step=data, agents=[{"id": "x", "prompt": "new", "system": "s"}], fingerprint="n"))
    words = [why_stale(driver.state, one) for one in driver.state.order]
    assert words == ["its prompt and agent changed after it ran"] * 2


def test_what_was_made_from_an_old_output_is_stale() -> None:
    driver = run(work("a"), work("b", "{{ a }}"), work("c", "{{ b }}"))
    driver.record(RunResumed())
    driver.record(Rewound(to="a"))
    driver.go()
    assert driver.turns() == ["a", "b", "c", "a"]
    assert driver.gate().step == "b"
    driver.decide("approve")
    assert driver.gate().step == "c", "each is asked about"
    assert driver.decide("retry").prompt("c") == "b 1"
    assert driver.state.status == "completed"


@pytest.mark.parametrize("kind", ["review", "start", "verdict", "exhausted"])
@pytest.mark.parametrize("action", ["retry", "skip", "approve"])
@pytest.mark.parametrize("stopped", [False, True])
def test_what_waits_with_something_made_from_an_old_output_is_made_again(
    kind: GateKind, action: Any, stopped: bool
) -> None:
    """What is approved is what is built on: an answer to the gate from before would be about something else."""
    driver = at_gate(kind)
    earlier, later = ("b", "gate") if kind in ("verdict", "exhausted") else ("a", "b")
    before = driver.gate(later)
    change(driver, work(earlier, "new"))
    if stopped:
        driver.record(RunFinished(status="stopped"))
        driver.record(RunResumed())
    driver.go()
    assert driver.gate(earlier).kind == "stale"
    driver.decide(action, step=earlier)
    if action == "approve":
        assert driver.gate(later).digest == before.digest
        assert driver.turns().count(later) == (kind != "start")
        return
    assert "is closed" in driver.refused(
        GateDecided(gate_id=before.id, decision=Decision(action="approve")), AlreadyDecided
    )
    if kind != "start" or not stopped:  # a stop closes that one, and it opens anew
        assert [event.by for event in driver.events if event.type == "StepOutdated"] == [earlier]
    if kind == "start":
        assert driver.gate(later).digest != before.digest
    else:
        assert driver.turns().count(later) == 2
    assert folded(driver.events) == driver.state


def test_it_is_made_again_for_a_step_that_was_put_before_it() -> None:
    driver = run(work("a"), work("b", "on {{ previous }}", interactive=True), work("z"))
    driver.add(work("x", interactive=True), "a").go()
    assert driver.gate().step == "x", "the one that waited is closed as soon as the other begins"
    assert driver.decide("approve").prompt("b") == "on x 1"
    driver.refused(StepOutdated(step="a", path="a", by="x"), TransitionError)
    driver.refused(StepOutdated(step="z", path="z", by="x"), TransitionError)


@pytest.mark.parametrize("kind", ["failed", "may_have_run", "stale"])
def test_what_waits_for_another_reason_still_asks(kind: GateKind) -> None:
    driver = at_gate(kind)
    before = driver.gate()
    if kind != "stale":
        change(driver, work("a", "new"))
        driver.go().decide("retry", step="a")
    else:
        driver.record(Rewound(to="a"))
        driver.go()
    assert driver.gate().kind == before.kind
    assert "StepOutdated" not in driver.kinds()


def test_later_steps_are_stale_as_soon_as_one_runs_again() -> None:
    driver = run(work("a", interactive=True), work("b"), work("c")).decide("approve")
    driver.record(RunResumed())
    driver.record(Rewound(to="a"))
    meanwhile: list[Any] = [
        lambda: None,
        lambda: driver.until_running("a"),
        lambda: driver.end(driver.state.steps["a"], Reply(error="bad key")),
        lambda: driver.go().decide("retry"),
        lambda: driver.decide("reject", "again"),
    ]
    for happens in meanwhile:
        happens()
        stale = [(step.id, step.stale, why_stale(driver.state, step)) for step in driver.state.order[1:]]
        assert stale == [(id, True, "a changed after this ran") for id in "bc"]
    assert driver.gate().step == "a"
    assert (driver.decide("approve").gate().kind, driver.gate().step) == ("stale", "b")
    assert not driver.decide("approve").state.steps["b"].stale
    assert driver.gate().step == "c"
    assert driver.decide("approve").state.status == "completed"


def test_what_is_stale_while_another_runs_again_stays_so_after_a_stop() -> None:
    driver = run(work("a"), work("b"))
    driver.record(RunResumed())
    driver.record(Rewound(to="a"))
    driver.until_running("a")
    driver.record(cut_short(driver.state.steps["a"], "stopped"))
    driver.record(RunFinished(status="stopped"))
    assert driver.state.steps["b"].stale
    driver.record(RunResumed())
    assert (driver.go().gate().kind, driver.gate().step) == ("stale", "b")


def test_a_step_that_is_kept_makes_no_later_one_stale_and_one_that_runs_again_does() -> None:
    for action, stale in (("approve", False), ("retry", True)):
        driver = run(work("a"), work("b"))
        driver.record(RunResumed())
        change(driver, work("a", "new"))
        driver.go()
        assert not driver.state.steps["b"].stale, "nothing has run yet"
        driver.record(GateDecided(gate_id=driver.gate().id, decision=Decision(action=action)))  # type: ignore[arg-type]
        driver.advance()
        assert driver.state.steps["b"].stale is stale


def test_run_from_here() -> None:
    driver = run(work("a"), work("b", "{{ a }}"), work("c", "{{ b }}"))
    driver.record(RunResumed())
    driver.record(Rewound(to="b", later=True))
    driver.go()
    assert (driver.turns(), driver.opened) == (["a", "b", "c", "b", "c"], [])
    assert driver.prompt("c") == "b 2"


def test_going_back_keeps_the_question_whether_a_later_step_is_stale() -> None:
    driver = at_gate("stale")
    driver.record(Rewound(to="a"))
    driver.go()
    assert (driver.gate().kind, driver.gate().step) == ("stale", "b"), "it is not run again unasked"
    assert driver.turns().count("b") == 1


def test_going_forward_past_what_has_not_run_is_refused() -> None:
    driver = run(work("a", interactive=True), work("b"), work("c"))
    assert "'a' comes first" in driver.refused(Rewound(to="c"), TransitionError)
    assert driver.gate().step == "a"


def test_a_finished_step_may_run_again_while_an_earlier_one_waits() -> None:
    driver = run(work("a"), work("b"), work("c"), until="b")
    change(driver, work("a", "other"))
    driver.record(RunUnpaused())
    assert driver.go().gate().step == "a"
    driver.record(Rewound(to="b"))
    assert driver.go().gate().step == "a", "the gate is not passed"
    driver.decide("approve")
    assert driver.turns() == ["a", "b", "b", "c"]


def test_a_step_that_is_removed() -> None:
    driver = run(work("a"), work("b", interactive=True), work("c"))
    driver.record(StepRemoved(step="b"))
    assert (driver.state.gates, driver.go().state.status, driver.turns()) == ({}, "completed", ["a", "b", "c"])


def test_a_module_added_again_counts_from_nought() -> None:
    driver = run(work("a"), gate(1, 2, loop_skip=["a"]), script={"gate": [loop()] * 9})
    driver.record(StepRemoved(step="gate"))
    assert driver.turns().count("gate") == 3
    driver.add(gate(1, 2)).go()
    assert driver.turns().count("gate") == 6, "it may go back twice again"


def test_a_loop_goes_back_and_not_forward() -> None:
    driver = Driver(Workflow("W", steps=[work("a"), gate(1, 2), work("z")])).until_running("gate")
    driver.end(driver.state.steps["gate"], loop())
    assert driver.state.steps["gate"].status == "looping"
    message = driver.refused(LoopedBack(module="gate", to="z", iteration=2), TransitionError)
    assert "cannot go back to 'z'" in message


def test_context_all_after_an_earlier_step_changed() -> None:
    """The block that a failed attempt has put together is not used again when what it holds has changed."""
    steps = [work("a"), work("b"), work("c", context="all")]
    driver = run(*steps, script={"c": [Reply(error="bad key")]})
    change(driver, work("b", "other"))
    driver.go().decide("retry", step="b").decide("retry", step="c")
    assert driver.prompt("c") == "work\n\n## Output of a\n\na 1\n\n## Output of b\n\nb 2"


# -- data flow --------------------------------------------------------------------------------------------------------

BLOCK_A, BLOCK_B = "\n\n## Output of a\n\nA", "\n\n## Output of b-2\n\nB"
SHOWN: list[tuple[str, Any, str]] = [
    ("go", "previous", f"go{BLOCK_B}"),
    ("go", "all", f"go{BLOCK_A}{BLOCK_B}"),
    ("go", "none", "go"),
    ("go", ["a"], f"go{BLOCK_A}"),
    ("go", ["b-2", "a"], f"go{BLOCK_B}{BLOCK_A}"),
    ("{{ a }}", "all", "A"),
    ("{{a}}/{{  b-2  }}/{{ b_2 }}", "previous", "A/B/B"),
    ("{{ previous }}", "all", "B"),
    ("{{ goal }}", "previous", f"a todo {{{{ a }}}}{BLOCK_B}"),
    ("{{ data.k }} {{ data }} {{ n }}", "none", 'v {"k": "v", "w": [1]} 3'),
    ("{{ data.w }}", "none", "[1]"),
    ("{{ a.title }} {{ previous.size }}", "all", "T 2"),
    ("{{ loop.iteration }}{{ loop.reason }}{{ feedback }}", "none", "1"),
    ("{a} {{{ a }}} {{ a b }} {{}} {{ 1 }} {% x %} {#1} $a \\frac{{1}}{{2}}", "none", None),
]


@pytest.mark.parametrize(("template", "context", "expected"), SHOWN)
def test_what_a_prompt_says(template: str, context: Any, expected: str | None) -> None:
    script = {"a": [Reply("A", output={"title": "T"})], "b-2": [Reply("B", output={"size": 2})]}
    inputs = {"goal": "a todo {{ a }}", "data": {"k": "v", "w": [1]}, "n": 3}
    driver = run(work("a"), work("b-2"), work("z", template, context=context), script=script, inputs=inputs)
    assert driver.prompt("z") == (template.replace("{{ a }}", "A") if expected is None else expected)


def test_values_are_never_expanded_again() -> None:
    script = {"a": ["{{ goal }} {{ z }}"]}
    driver = run(work("a"), work("z", "{{ a }}"), script=script, inputs={"goal": "secret"})
    assert driver.prompt("z") == "{{ goal }} {{ z }}"


def test_raw_prompts_are_sent_as_written() -> None:
    driver = run(work("a"), work("z", "{{ a }} {{ nobody }}", raw=True))
    assert driver.prompt("z") == "{{ a }} {{ nobody }}"


def test_names_with_both_signs() -> None:
    driver = run(work("a_b-c"), work("z", "{{ a_b_c }} {{ a_b-c }}"))
    assert driver.prompt("z") == "a_b-c 1 a_b-c 1"


def test_a_skipped_step_gives_no_text() -> None:
    driver = run(work("a"), work("b", interactive=True), work("z", "[{{ b }}]"), work("y", context="previous"))
    driver.decide("skip")
    assert driver.prompt("z") == "[]"
    driver = run(work("a"), work("b", interactive=True), work("z", context="previous")).decide("skip")
    assert driver.prompt("z") == "work\n\n## Output of a\n\na 1"


def test_what_was_approved_is_what_runs() -> None:
    driver = run(
        work("a"), work("b", "do {{ a }} for {{ goal }}", interactive=True, gate="before"), inputs={"goal": "x"}
    )
    shown = driver.state.text(Ref(driver.events[-1].seq, "prompt"))
    driver.add(work("c"), inputs={"goal": "y"})
    driver.decide("approve")
    assert driver.prompt("b") == shown == "do a 1 for x"


def test_inputs_that_come_with_a_step() -> None:
    driver = run(work("a"), until="a", inputs={"goal": "x"})
    driver.record(RunResumed())
    driver.add(work("b", "{{ goal }} {{ more }}"), inputs={"goal": "y", "more": "z"}).go()
    assert driver.prompt("b") == "y z"


def test_usage_and_cost_add_up() -> None:
    driver = Driver(Workflow("W", steps=[work("a", ["one", "two"])])).until_running("a")
    for _turn in (1, 2):
        a = driver.until_running("a").state.steps["a"]
        use = Usage(input_tokens=2, output_tokens=3, estimated=True)
        driver.record(TurnFinished(step="a", path="a", attempt=1, turn=a.turn, text="x", usage=use, cost_usd=0.25))
    assert (driver.state.usage, driver.state.cost_usd) == (Usage(input_tokens=4, output_tokens=6, estimated=True), 0.5)
    assert (driver.state.steps["a"].last.usage, driver.state.steps["a"].last.cost_usd) == (driver.state.usage, 0.5)


# -- the tables and the picture of them -------------------------------------------------------------------------------


def test_what_sweeps_others_leaves_no_turn_running() -> None:
    for event, swept in SWEPT.items():
        found = {*swept, *itertools.chain(*swept.values())}
        held = {"running", "asking"} if event == "WorkflowChanged" else set()  # whom a limit held goes on by another
        assert {"running", "asking", "calling"} & found == held, event


def test_every_status_has_a_row_and_leads_on() -> None:
    statuses = set(TRANSITIONS)
    reached = {to for row in TRANSITIONS.values() for tos in row.values() for to in tos}
    assert reached == statuses


def test_the_workflow_may_be_looked_at_before_it_runs() -> None:
    state = state_of(Workflow("W", steps=[work("a"), separator("x"), gate(1)], autonomous_mode="never"))
    assert ([step.id for step in state.order], state.locked, state.mode) == (["a", "gate"], "never", "step-by-step")


# -- at random --------------------------------------------------------------------------------------------------------

TEAM = ["m0", "m1", "m2"]
CONTEXTS = ("previous", "all", "none", "list")
LIMITED = st.sampled_from(
    [*[{}] * 5, {"max_turns": 2}, {"max_turns": 5}, {"max_cost_usd": 0.5}, {"max_tokens": 9, "max_turns": 4}]
)
COMMON = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])


@st.composite
def some_steps(draw: st.DrawFn, index: int, ids: list[str]) -> Step:
    """A step that may name those of `ids`; a module when there is something to go back to."""
    me = f"s{index}"
    named = draw(st.sampled_from([*ids, None, None])) if ids else None
    template = f"{me} does {{{{ {named} }}}}" if named else f"{me} works"
    context: Any = draw(st.sampled_from(CONTEXTS))
    prompt: Any = [template, f"{me} more"] if draw(st.integers(0, 3)) == 0 else template
    options: dict[str, Any] = {
        "agent": me,
        "prompt": prompt,
        "context": ids[:1] if context == "list" else context,
        "interactive": draw(st.sampled_from((None, None, True, False))),
        "gate": draw(st.sampled_from(("after", "after", "before", "both"))),
        "execute_once": draw(st.integers(0, 5)) == 0,
        "idempotent": draw(st.integers(0, 3)) > 0,
        **draw(LIMITED),
    }
    if ids and draw(st.booleans()):
        back = draw(st.integers(1, min(3, len(ids))))
        options |= {
            "loop_steps": back,
            "loop_max_iterations": draw(st.sampled_from((0, 1, 2, None))),
            "loop_skip": draw(st.lists(st.sampled_from(ids[-back:]), max_size=1)),
            "on_exhausted": draw(st.sampled_from(("pause", "continue", "fail"))),
        }
        return Module(**options)
    if draw(st.integers(0, 4)) == 0 and isinstance(prompt, str):
        del options["agent"]
        several = [f"{me}x", f"{me}y", f"{me}z"][: draw(st.integers(1, 3))]
        places = draw(st.sampled_from((None, 1, 2)))
        return Parallel(**{**options, "gate": "after"}, id=me, members=several, max_concurrency=places)
    return Step(**options)


@st.composite
def workflows(draw: st.DrawFn) -> Workflow:
    chosen: list[Any] = []
    ids: list[str] = []
    for index in range(draw(st.integers(1, 6))):
        if draw(st.integers(0, 4)) == 0:
            chosen.append(separator(f"line {index}"))
        chosen.append(draw(some_steps(index, ids)))
        ids.append(f"s{index}")
    return Workflow(
        "W",
        steps=chosen,
        autonomous_mode=draw(st.sampled_from(("never", "always", True, False))),
        agents=[Agent(name, f"{name} knows {{{{ previous }}}}") for name in TEAM],
        sub_agents=TEAM,
        max_concurrency=draw(st.sampled_from((None, 1, 2))),
        **draw(LIMITED),
    )


OUTCOMES = st.sampled_from(
    [
        "fine",
        "fine",
        go_on(),
        go_on(),
        loop("one"),
        loop("two"),
        loop("three"),
        Reply("no verdict"),
        said("pause", "look"),
        said("stop", "enough"),
        said("error", "broken"),
        Reply(error="overloaded", retry_in_s=2.0),
        Reply(error="bad key"),
        Reply("asked", ask=("which?",)),
        Reply("asked twice", Verdict(action="continue"), ask=("which?", "where?")),
        Reply("session", session="z"),
        Reply("paid", cost_usd=0.25, usage=Usage(input_tokens=4)),
        Reply(error="paid all the same", cost_usd=0.25, retry_in_s=1.0),
        Reply("free", cost_usd=0.0),
        Reply("one after the other", Verdict(action="continue"), spends=(0.25, 0.5), cost_usd=0.75),
        Reply(error="half way", spends=(0.25,), cost_usd=0.5, retry_in_s=1.0),
        Reply("called", calls=("m0 'a' & m1 'b' && m2 'c'",)),
        Reply("called twice", Verdict(action="continue"), calls=("m1 'x' & m1 'x' & m2 'y'", "m0 'z'"), ask=("why?",)),
        Reply(error="too much", calls=("m2 'x' & m0 'y'",), retry_in_s=1.0),
    ]
)
SCRIPTS = st.lists(st.lists(OUTCOMES, max_size=5), min_size=9, max_size=9)
CHOICES = st.lists(st.integers(0, 20), min_size=1, max_size=12)


def script_of(outcomes: list[list[str | Reply]]) -> Any:
    """Agents that give these outcomes in turn, then go on."""

    def script(driver: Driver, step: Any) -> Reply:
        if step.caller:
            return member_reply(driver, step, outcomes)
        own = outcomes[int(step.id[1:]) % 9]
        n = driver.said_by(step.step.agent)
        if n < len(own):
            found = own[n]
            return found if isinstance(found, Reply) else Reply(f"{step.id}: {found} {n}")
        return Reply(f"{step.id}: done {n}", Verdict(action="continue") if isinstance(step.step, Module) else None)

    return script


def member_reply(driver: Driver, member: Any, outcomes: list[list[str | Reply]]) -> Reply:
    """What an agent says that was called: it depends on what happened at its own path, as siblings have no order."""
    place = sum(map(ord, member.path))
    own = outcomes[place % 9]
    n = sum(event.type in ("TurnFinished", "TurnFailed") and event.path == member.path for event in driver.events)
    found = own[n] if n < min(len(own), 2) else "done"
    reply = found if isinstance(found, Reply) else Reply(f"{member.path}: {found} {n}")
    others = [name for name in TEAM if name > member.id and member.depth < MOST_DEPTH]
    if reply.calls:
        calls = tuple(f"{name} 'from {member.id}'" for name in others) if member.id in TEAM else reply.calls
        reply = replace(reply, calls=calls)
    return reply


def decision_of(gate: Gate, choice: int, n: int) -> Decision:
    """One of the gate's decisions, with words of its own."""
    action = gate.actions[choice % len(gate.actions)]
    if action in ("reject", "answer"):
        return Decision(action=action, feedback=f"words {n}")
    if action == "approve" and gate.kind in ("review", "exhausted", "start") and choice > 15:
        return Decision(action=action, output=f"edited {n}")
    if action == "retry" and gate.kind != "exhausted" and choice > 15:
        return Decision(action=action, prompt=f"other prompt {n}")
    return Decision(action=action)


def policy_of(choices: list[int]) -> Any:
    """Decisions that depend on what was decided before, not on when; in the end it says yes."""

    def policy(driver: Checked, gate: Gate) -> Decision:
        if gate.kind == "may_have_run":
            return Decision(action="retry")
        if gate.kind == "budget":  # turns that were cut short count, so there are more or fewer of these
            return Decision(action="approve")
        if gate.path in driver.state.members:  # siblings have no order, so these count by themselves
            if gate.kind == "failed":
                before = [e for e in driver.events if e.type == "GateDecided" and f"/{gate.path}/" in e.gate_id]
                failures = [e for e in before if driver.kind_of[e.gate_id] == "failed"]
                return Decision(action="skip" if len(failures) % 2 == choices[0] % 2 else "retry")
            return approve(driver, gate)
        own = [
            e
            for e in driver.events
            if e.type == "GateDecided"
            and driver.kind_of[e.gate_id] not in ("may_have_run", "budget")
            and e.gate_id.count("/") == 3
        ]
        n = len(own)
        return decision_of(gate, choices[n], n) if n < len(choices) else approve(driver, gate)

    return policy


class Checked(Driver):
    """A driver that holds every state to what must always be true of it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.kind_of: dict[str, str] = {}
        super().__init__(*args, **kwargs)

    def record(self, event: AnyEvent) -> AnyEvent:
        kept = super().record(event)
        state = self.state
        if kept.type == "GateOpened":
            assert kept.gate.id not in self.kind_of, "the id of a gate comes twice"
            self.kind_of[kept.gate.id] = kept.gate.kind
        for index, one in enumerate(state.order):
            assert one.index == index
            assert state.steps[one.id] is one
            assert one.settled or index >= state.cursor
        everybody = [*state.order, *state.members.values()]
        for one in everybody:
            assert (one.gate is not None) is (one.status in ("waiting", "asking")) or one.path in state.running
            assert one.gate is None or state.gates[one.gate.id] is one.gate
            assert (one.path in state.running) == (one.status in ("running", "asking", "calling"))
            assert (one.path in state.calls) == (one.status == "calling")
            assert one.status != "due" or one.due is not None
        assert len(state.gates) == sum(one.gate is not None for one in everybody)
        self.hold_places()
        self.hold_budgets(kept)
        assert state.current is None or not state.current.settled
        assert sum(not one.caller for one in state.running.values()) <= 1, "two turns at a time"
        if state.ended == "completed":
            assert all(one.settled for one in state.order)
        if state.ended:
            assert not state.gates
            assert not state.running
            assert not state.calls
        return kept

    def hold_places(self) -> None:
        """The counters say what a look at everybody would say."""
        state = self.state
        held = [one for one in state.members.values() if one.place == "held"]
        assert {one.path for one in held} == {
            one.path
            for one in state.members.values()
            if one.status == "running"
            or one.path in state.backing_off
            or (one.status == "asking" and state.held is not None and one is state.held[0])
        }
        assert state.busy == len(held) <= state.max_concurrency
        queued = {path: one for line in state.lines for path, one in line.items() if one.caller}
        assert queued == {one.path: one for one in state.members.values() if one.place == "queued"}
        for path, call in state.calls.items():
            group = call.groups[call.group]
            assert call.left == sum(one.status not in ("finished", "skipped", "failed") for one in group)
            assert call.busy == sum(one.place in ("held", "queued") for one in group)
            assert call.limit is None or call.busy <= call.limit
            assert call.left or path in queued or path in state.lines[0] or state.members[path].place == "wants"
        for one in state.owed.values():
            assert one.status == "due"
            assert one.caller in state.calls

    def hold_budgets(self, event: AnyEvent) -> None:
        """While a budget is used up nothing begins; the sums are those of all events."""
        state = self.state
        opened = [gate for gate in state.gates.values() if gate.kind == "budget"]
        assert [gate.path for gate in opened] == ([state.held[0].path] if state.held else [])
        if event.type == "TurnStarted":
            for budget in (state.budget, state.steps[event.path.split("/")[0]].budget):
                for name, most in budget.limits.items() if budget is not None else ():
                    used = budget.used[name] - (name == "max_turns")  # type: ignore[union-attr]
                    assert used < most, f"{name}: {used} of {most}, and yet {event.path} began"
        paid, so_far = 0.0, dict[str, float]()
        for e in self.events:
            if e.type == "UsageReported":
                so_far[e.path] = e.cost_usd or 0.0
            elif e.type in ("TurnFinished", "TurnFailed", "TurnCutShort"):
                before = so_far.pop(e.path, 0.0)
                paid += e.cost_usd if e.cost_usd is not None else before
        assert state.budget.used["max_cost_usd"] == state.cost_usd == paid + sum(so_far.values())

    def begin(self, action: StartTurn) -> None:
        step = action.step
        if action.context is not None:
            wanted = step.step.context
            before = self.state.order[: step.index]
            if wanted == "previous":
                before = [other for other in before if other.approved][-1:]
            elif wanted != "all":
                before = [other for other in before if other.id in wanted]
            naive = "".join(f"\n\n## Output of {o.id}\n\n{self.text(o.id)}" for o in before if o.approved)
            assert text_of(action.context, self.state.texts) == naive
        super().begin(action)


def to_the_end(driver: Driver, most: int = 60) -> Driver:
    """Whenever it rests or ends before it is done, it is resumed; and one can always say what it waits for."""
    for _ in range(most):
        state = driver.go().state
        assert state.ended or state.running or state.gates or state.paused, f"it waits for nothing: {driver.statuses()}"
        if driver.state.ended == "completed":
            return driver
        if driver.state.ended is None and driver.state.paused:
            driver.record(RunUnpaused())
        else:
            driver.record(RunResumed())
    raise AssertionError(f"never completed: {driver.statuses()} {driver.state.reason}")


def told(driver: Driver) -> list[tuple[str, int, str, str]]:
    """What was sent and what came back, turn by turn, without the turns that did not end."""
    sent: dict[str, str] = {}
    result = []
    for event in driver.events:
        if event.type == "TurnStarted":
            sent[event.path] = driver.state.text(Ref(event.seq, "prompt"))
        elif event.type == "TurnFinished":
            result.append((event.path, event.turn, sent[event.path], event.text))
    return sorted(result, key=lambda one: (1, *one) if "/" in one[0] else (0,))  # siblings have no order


@settings(COMMON, max_examples=60)
@given(workflows(), SCRIPTS, CHOICES, st.lists(st.integers(0, 400), min_size=1, max_size=4))
def test_cut_anywhere_a_run_comes_to_the_same_end(
    workflow: Workflow, outcomes: list[list[str | Reply]], choices: list[int], cuts: list[int]
) -> None:
    """``kill -9`` after any event: with the same agents and decisions the same is sent, answered and approved."""
    script, policy = script_of(outcomes), policy_of(choices)
    whole = to_the_end(Checked(workflow, script, policy=policy))
    assert folded(whole.events) == whole.state
    for at in cuts:
        cut = Checked(None, script, policy=policy, events=whole.events[: at % len(whole.events) + 1])
        if cut.state.ended != "completed":
            to_the_end(cut.cut())
        assert told(cut) == told(whole)
        assert cut.texts() == whole.texts()
        assert cut.statuses() == whole.statuses()


@pytest.mark.parametrize(
    "limits", [{"max_turns": 1}, {"max_turns": 3}, {"max_cost_usd": 0.5}, {"max_tokens": 7}], ids=str
)
def test_cut_at_every_event_a_limit_holds(limits: dict[str, Any]) -> None:
    """Whatever the moment: what is left of the run asks again where it had asked, and comes to the same end."""

    def script(driver: Driver, one: Any) -> Reply:
        calls = ("m0 'x' & m1 'y' && m2 'z'",) if one.id == "b" else ()
        n = driver.said_by(one.step.agent)
        verdict = Verdict(action="loop" if one.id == "gate" and n == 0 else "continue")
        use = Usage(input_tokens=3, output_tokens=1)
        return Reply(f"{one.path} {n}", verdict, calls=calls, cost_usd=None if one.id == "m1" else 0.25, usage=use)

    team = Parallel(members=["p", "q"], id="team", prompt="work")
    steps = [work("a", ["one", "two"], interactive=True), work("b", max_turns=2), team, gate(1, 3), work("z")]
    agents = [Agent(name, "work") for name in TEAM]
    workflow = Workflow("W", steps=steps, agents=agents, sub_agents=TEAM, max_concurrency=1, **limits)
    whole = to_the_end(Checked(workflow, script, policy=approve))
    opened = [event.gate for event in whole.events if event.type == "GateOpened" and event.gate.kind == "budget"]
    assert len(opened) > 1
    for at in range(1, len(whole.events)):
        cut = Checked(None, script, policy=approve, events=whole.events[:at])
        asked = [gate.id for gate in cut.state.gates.values() if gate.kind == "budget"]
        cut.cut()
        assert [
            gate.id for gate in cut.state.gates.values() if gate.kind == "budget" and gate.path in cut.state.steps
        ] == [id for id in asked if id.count("/") == 3], (
            "an open gate is the same gate; that of a member comes again with its caller"
        )
        to_the_end(cut)
        assert told(cut) == told(whole)
        assert cut.statuses() == whole.statuses()


MOVES = st.lists(st.tuples(st.integers(0, 25), st.integers(0, 20), st.integers(0, 20)), max_size=40)


def mostly_illegal(driver: Checked, kind: int, a: int, b: int) -> AnyEvent:
    """Some event that names real and unreal things."""
    ids = [*driver.state.steps, *driver.state.members, "nobody"]
    name = ids[a % len(ids)]
    known = driver.state.steps.get(name) or driver.state.members.get(name)
    attempt = (known.attempt if known else 0) + b % 4 - 1
    where: dict[str, Any] = {"step": name, "path": name, "attempt": attempt, "turn": b % 3}
    gate_ids = [*driver.kind_of, f"r/{name}/1/9", "x", f"r/{name}/1/zz", "r//1/²"]
    decision = Decision(action=ALL_ACTIONS[b % 6], feedback="words")
    kinds = list(ACTIONS)
    opened = Gate(
        id=f"r/{name}/1/{900 + len(driver.events)}", kind=(kind_of := kinds[b % len(kinds)]), step=name, path=name,
        attempt=1, digest="", actions=ACTIONS[kind_of],
    )  # fmt: skip
    return [
        TurnStarted(**where, prompt=("p",), digest="", engine="e"),
        TurnFinished(**where, text="t"),
        TurnFailed(**where, error=ErrorInfo(kind="E", message="m")),
        TurnCutShort(**where),
        GateDecided(gate_id=gate_ids[a % len(gate_ids)], decision=decision),
        LoopedBack(module=name, to=ids[b % len(ids)], iteration=2),
        GateOpened(gate=opened),
        StepSkipped(step=name, path=name, reason="r"),
        StepOutdated(step=name, path=name, by="a"),
        RunFinished(status="completed" if b % 2 else "stopped"),
        RunStarted(run_id="q", workflow={"name": "x"}),
        Rewound(to=name),
        AgentsCalled(
            step=name,
            path=name,
            attempt=attempt,
            call=b % 3,
            groups=[[CalledAgent(agent="m0", path=f"{name}/m0#{b % 4}", prompt="p")]],
        ),
        AgentsReturned(step=name, path=name, call=b % 3),
        StepFailed(step=name, path=name, reason="r"),
        ToolCalled(**where, call_id="1", name="t"),
        ToolReturned(**where, call_id=str(b % 2), name="t", text="r"),
    ][kind % 17]


def propose(driver: Driver, event: AnyEvent) -> None:
    """Record `event`; if it is refused, then by a ``TransitionError``, and nothing has changed."""
    before, events = copy.deepcopy(driver.state), len(driver.events)
    try:
        driver.record(event)
    except TransitionError:
        assert driver.state == before, f"{event!r} was refused and left something behind"
        assert len(driver.events) == events


def move(driver: Checked, what: int, a: int, b: int) -> None:
    """Something that people, agents, crashes or bugs may do."""
    state = driver.state
    if not state.order:
        return
    chosen = state.order[a % len(state.order)]
    some = chosen.id if b % 2 else None
    match what:
        case 10 | 11 | 12 if state.gates:
            gate = [*state.gates.values()][a % len(state.gates)]
            propose(driver, GateDecided(gate_id=gate.id, decision=decision_of(gate, b, a)))
        case 13:
            propose(driver, RunPaused())
        case 14:
            propose(driver, RunUnpaused(until=some))
        case 15:
            for event in cut_all(state, "stop"):
                propose(driver, event)
            propose(driver, RunFinished(status="stopped"))
        case 16:
            driver.cut()
        case 17:
            propose(driver, ModeChanged(mode=(("step-by-step", "gates", "unattended")[a % 3])))  # type: ignore[arg-type]
        case 18 if len(state.order) < 9:
            new = f"s{len(driver.events) + 10}"
            data = {"agent": new, "prompt": "new {{ previous }}", "context": "all", "interactive": a % 2 == 0}
            agents = [{"id": new, "prompt": "x"}]
            propose(driver, StepAdded(step=data, after=some, fingerprint="n", agents=agents))
        case 19:
            changed = chosen.step.model_dump(mode="json", exclude_defaults=True)
            data = {**changed, "kind": chosen.step.kind, "prompt": f"changed {b}", "context": "all"}
            propose(driver, StepChanged(step=data, fingerprint="c"))
        case 20 if len(state.order) > 1:
            propose(driver, StepRemoved(step=chosen.id))
        case 21:
            propose(driver, Rewound(to=chosen.id, later=b % 2 == 0))
        case 22:
            mode = ("never", "always", True, False)[a % 4]
            propose(driver, WorkflowChanged(inputs={"i": a}, autonomous_mode=mode))  # type: ignore[arg-type]
        case 23 | 24 | 25:
            propose(driver, mostly_illegal(driver, a, b, a + b))
        case _:
            driver.advance()


@settings(COMMON, max_examples=120)
@given(workflows(), SCRIPTS, MOVES)
def test_whatever_happens_a_run_stays_sound(
    workflow: Workflow, outcomes: list[list[str | Reply]], moves: list[tuple[int, int, int]]
) -> None:
    """``Checked`` holds each state to what must be true; in the end, with a person who says yes, it completes."""
    driver = Checked(workflow, script_of(outcomes))
    for what, a, b in moves:
        move(driver, what, a, b)
    driver.policy = approve
    to_the_end(driver, 200)
    assert folded(driver.events) == driver.state


def test_each_theme_of_the_rules_knows_only_those_before_it() -> None:
    listed = re.findall(r"^    (\w+)  ", meaning.__doc__ or "", re.MULTILINE)
    files = {file.stem: file for file in Path(rules.__path__[0]).glob("*.py") if file.stem != "__init__"}
    assert sorted(listed) == sorted(files)
    for number, name in enumerate(listed):
        imports = [
            node for node in ast.walk(ast.parse(files[name].read_text("utf-8"))) if isinstance(node, ast.ImportFrom)
        ]
        assert {node.module for node in imports if node.level == 1} <= {*listed[:number]}, name
        assert not {node.module for node in imports if node.level == 2} & {"state", "run"}, name
