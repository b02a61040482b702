"""Limits on cost, tokens and turns, of runs and of steps. Through the public API only."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import cm_notebook as cm
from cm_notebook.events import TurnCutShort, place
from cm_notebook.render import html, text
from tests.core.driver import folded
from tests.helpers import until

PAID = cm.Reply("said", usage=cm.Usage(input_tokens=60, output_tokens=40), cost_usd=0.25)


class Untold:
    """An engine that says nothing about cost or tokens."""

    name = "untold"

    async def stream(self, request: cm.AgentRequest) -> Any:
        yield cm.TurnDone(f"{request.step} {request.attempt}")


def five(**options: Any) -> cm.Workflow:
    """Five steps; each turn is paid $0.25 and uses 100 tokens."""
    steps = options.pop("steps", "a -> b -> c -> d -> e")
    return cm.Workflow("five", steps=steps, agents=[cm.Agent(name, f"Do {name}.") for name in "abcde"], **options)


def paid(**script: list[Any]) -> cm.ScriptedEngine:
    return cm.ScriptedEngine({name: script.get(name, [PAID] * 9) for name in "abcde"})


def start(workflow: cm.Workflow, engine: Any = None, **options: Any) -> cm.Run:
    return workflow.start(engine=engine or paid(), **{"journal": ":memory:", **options})


def gate(run: cm.Run, kind: str = "") -> cm.Gate:
    """The gate that opens next, which is of that kind."""
    opened: cm.Gate = until(lambda: next(iter(run.gates), None), f"a gate {kind}")
    assert kind in ("", opened.kind)
    return opened


def done(run: cm.Run) -> str:
    """The steps that have their result, in order."""
    return "".join(step.id for step in run if step.status == "done")


def say(run: cm.Run) -> str:
    with run.reading() as state:
        return text.sentence(state)


# -- where it pauses, and how it goes on ------------------------------------------------------------------------------

# limit -> what is done when it is reached, the sentence, and how often one approves until the end
REACHED: list[tuple[dict[str, Any], str, str, int]] = [
    ({"max_cost_usd": 0.25}, "a", "Paused: $0.25 limit reached after a. Continue with +$0.25?", 4),
    ({"max_cost_usd": 0.50}, "ab", "Paused: $0.50 limit reached after b. Continue with +$0.50?", 2),
    ({"max_cost_usd": 0.60}, "abc", "Paused: $0.60 limit reached after c. Continue with +$0.60?", 1),
    ({"max_cost_usd": 1.25}, "abcde", "Finished: 5 of 5 done.", 0),
    ({"max_cost_usd": 0.001}, "a", "Paused: $0.001 limit reached after a. Continue with +$0.001?", 4),
    ({"max_tokens": 150}, "ab", "Paused: 150 tokens limit reached after b. Continue with +150 tokens?", 2),
    ({"max_turns": 1}, "a", "Paused: 1 turn limit reached after a. Continue with +1 turn?", 4),
    ({"max_turns": 3}, "abc", "Paused: 3 turns limit reached after c. Continue with +3 turns?", 1),
    ({"max_turns": 2, "max_cost_usd": 0.75}, "ab", "Paused: 2 turns limit reached after b. Continue with +2 turns?", 3),
]


@pytest.mark.parametrize("where", ["workflow", "start"])
@pytest.mark.parametrize(("limits", "before", "sentence", "approvals"), REACHED, ids=[str(row[0]) for row in REACHED])
def test_a_limit_is_reached(limits: dict[str, Any], before: str, sentence: str, approvals: int, where: str) -> None:
    run = start(five(**limits)) if where == "workflow" else start(five(), **limits)
    made = 0
    for made in range(1, approvals + 1):
        assert gate(run).kind == "budget"
        if made == 1:
            assert (done(run), say(run)) == (before, sentence)
        run.approve()
    assert (run.wait().status, done(run)) == ("completed", "abcde")
    assert made == approvals
    assert not approvals or run.gates == []
    assert approvals or say(run) == sentence


@pytest.mark.parametrize(
    ("limit", "more", "then"),
    [("max_cost_usd", 0.75, "abcd"), ("max_tokens", 201, "abcd"), ("max_turns", 1, "ab")],
)
def test_another_amount(limit: str, more: float, then: str) -> None:
    """What is permitted counts from what was used: nobody has to approve twice because a turn went far over."""
    run = start(five(), **{limit: 1 if limit == "max_turns" else 0.01 if limit == "max_cost_usd" else 1})
    gate(run)
    run.approve(**{limit: more})  # type: ignore[arg-type]
    gate(run)
    assert done(run) == then
    assert getattr(next(iter(run.state.decisions.values())), limit) == more


@pytest.mark.parametrize(
    ("how", "words"),
    [
        (lambda run: run.approve(max_turns=3), "is about max_cost_usd, not max_turns"),
        (lambda run: run.approve(max_cost_usd=0), "max_cost_usd=0 is not an amount of US dollars, such as 0.50"),
        (lambda run: run.approve(max_cost_usd=float("nan")), "max_cost_usd=nan is not an amount"),
        (lambda run: run.approve(output="x"), "an edited text goes with approve at"),
        (lambda run: run.skip(), "cannot be answered with 'skip'. Possible: approve, stop"),
    ],
)
def test_an_answer_that_does_not_fit_changes_nothing(how: Callable[[cm.Run], Any], words: str) -> None:
    run = start(five(max_cost_usd=0.25))
    opened = gate(run)
    with pytest.raises(cm.CodeMachineError, match=words):
        how(run)
    assert run.gates == [opened]


def test_an_amount_is_no_answer_to_another_gate() -> None:
    run = start(five(steps="a?"))
    gate(run)
    with pytest.raises(cm.TransitionError, match=r"max_cost_usd says how much more .* not what the review gate of 'a'"):
        run.approve(max_cost_usd=1)
    run.stop()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_cost_usd": 0}, "max_cost_usd=0 is not an amount of US dollars, such as 0.50"),
        ({"max_cost_usd": "1"}, "max_cost_usd='1' is not an amount"),
        ({"max_tokens": 0.5}, "max_tokens=0.5 is not a number of tokens from 1 on"),
        ({"max_turns": True}, "max_turns=True is not a number of turns from 1 on"),
    ],
)
def test_a_limit_that_is_none_is_refused_before_anything_runs(options: dict[str, Any], words: str) -> None:
    with pytest.raises(cm.WorkflowError, match=words.replace(".", r"\.")):
        five().start(**options)
    assert not Path(".cm_notebook").exists()


# -- steps, loops, teams ----------------------------------------------------------------------------------------------


def test_the_limit_of_a_step_counts_all_its_attempts() -> None:
    run = start(five(steps=[cm.step("a", max_cost_usd=0.5, interactive=True), cm.step("b")]))
    for _ in range(2):
        gate(run, kind="review")
        run.reject("again")
    opened = gate(run, kind="budget")
    assert (opened.path, opened.payload["of"], run.cost_usd) == ("a", "a", 0.5)
    assert say(run) == "Paused: $0.50 limit of a reached after a. Continue with +$0.50?"
    run.approve()
    gate(run, kind="review")
    run.approve()
    assert (run.wait().status, run.cost_usd, len(run["a"].attempts)) == ("completed", 1.0, 3)
    assert run["a"].attempts[1].feedback == "again", "the answer about the money is not one about the work"


def test_a_loop_is_held_by_the_limit_of_its_module() -> None:
    judge = [cm.Reply('{"action": "loop"}', cost_usd=0.25)] * 9
    steps = [cm.step("a"), cm.module("b", loop_steps=1, max_turns=2)]
    run = start(five(steps=steps), paid(b=judge))
    assert gate(run).payload["of"] == "b"
    assert [len(run[name].attempts) for name in "ab"] == [3, 2]
    run.stop()
    assert run.wait().status == "stopped"


def test_what_runs_finishes_and_no_other_member_begins() -> None:
    side_by_side = cm.parallel("b", "c", "d", "e", id="team", max_concurrency=2)
    run = start(five(steps=[cm.step("a"), side_by_side]), max_turns=3)
    opened = gate(run)
    assert (opened.kind, opened.path, opened.attempt) == ("budget", "team/d#1", 1)
    assert [member.status for member in run["team"].members] == ["done", "done", "waiting", "pending"]
    assert len(run.gates) == 1, "one question, not one for each who is in line"
    run.approve(max_turns=1)
    assert gate(run).path == "team/e#1"
    run.approve("team/e#1")
    assert (run.wait().status, run.cost_usd) == ("completed", 1.25)


def test_the_limit_of_a_step_counts_whom_it_calls() -> None:
    @cm.agent("boss")
    async def boss(turn: cm.Turn) -> str:
        results = await turn.run_agents("a 'x' && b 'y' && c 'z'")
        return " ".join(one.status for one in results)

    agents = [boss, *(cm.Agent(name, "Do it.") for name in "abc")]
    workflow = cm.Workflow("team", steps=[cm.step("boss", max_cost_usd=0.5)], agents=agents, sub_agents=["a", "b", "c"])
    run = start(workflow)
    assert (gate(run).path, say(run)) == (
        "boss/c#1",
        "Paused: $0.50 limit of boss reached after boss/b#1. Continue with +$0.50?",
    )
    run.approve()
    assert run.wait()["boss"].text == "done done done"
    assert run["boss"].team_cost_usd == 0.75


@pytest.mark.parametrize("whose", ["run", "step"])
def test_what_a_caller_has_used_by_then_counts_before_the_first_whom_it_calls(whose: str, tmp_path: Path) -> None:
    calls = [{"name": "run_agents", "arguments": {"script": "b 'x' & c 'y'"}}]
    asks = cm.Reply("I call.", usage=cm.Usage(input_tokens=60, output_tokens=40), cost_usd=0.5, tool_calls=calls)
    limit = {"max_cost_usd": 0.5}
    steps = [cm.step("a", **(limit if whose == "step" else {}))]
    team = cm.Workflow("team", steps=steps, agents=five().agents, sub_agents=["b", "c"])
    run = start(team, paid(a=[asks, PAID]), journal=tmp_path / "journal.db", **(limit if whose == "run" else {}))
    opened = gate(run, kind="budget")
    assert (opened.path, opened.payload["used"], run.cost_usd) == ("a/b#1", 0.5, 0.5)
    assert [event.path for event in run.events if event.type == "TurnStarted"] == ["a"]
    assert "reached after a. Continue with +$0.50?" in say(run)
    run.approve()
    assert (gate(run, kind="budget").path, run.cost_usd) == ("a", 1.0), "and before it goes on with what they said"
    run.approve()
    assert run.wait().cost_usd == 1.25, "what was said before is not paid twice"
    assert run["a"].cost_usd == 0.75
    assert (run.usage.input_tokens, run.state.budget.used["max_tokens"]) == (240, 400)
    assert folded(run.events).budget.used == run.state.budget.used


def test_a_tape_knows_what_a_caller_had_used_by_then(headless: None, tmp_path: Path) -> None:
    calls = [{"name": "run_agents", "arguments": {"script": "b 'x'"}}]
    asks = cm.Reply("I call.", usage=cm.Usage(input_tokens=60), cost_usd=0.5, tool_calls=calls)
    options: dict[str, Any] = {"steps": "a", "agents": five().agents, "sub_agents": ["b"], "max_cost_usd": 0.5}
    where, journal = tmp_path / "tape.jsonl", ":memory:"
    run = start(cm.Workflow("team", **options), paid(a=[asks, PAID]), record=where, on_gate="approve").wait()
    assert [event.type for event in run.events].count("GateOpened") == 1
    again = cm.Workflow("team", **options).start(tape=where, journal=journal).wait()
    assert [event.type for event in again.events] == [event.type for event in run.events]
    assert again.cost_usd == run.cost_usd == 1.0


def test_what_a_turn_had_said_is_paid_also_when_its_process_dies(tmp_path: Path) -> None:
    asks = cm.Reply("", cost_usd=0.5, tool_calls=[{"name": "ask_human", "arguments": {"question": "Which?"}}])
    run = start(five(steps="a"), paid(a=[asks, PAID]), journal=tmp_path / "journal.db")
    gate(run, kind="question")
    events = [*run.events, TurnCutShort(step="a", path="a", attempt=1, reason="the process died")]
    place(events[-1], len(events), events[-2].at)
    assert (folded(events).cost_usd, folded(events).steps["a"].attempts[0].cost_usd) == (0.5, 0.5)
    run.stop()
    assert run.wait().cost_usd == 0.5


def test_a_turn_that_fails_is_paid_all_the_same() -> None:
    broken = cm.Reply("half", cost_usd=0.25, error=cm.EngineError("broke off"))
    run = start(five(steps="a"), paid(a=[broken, PAID]), max_cost_usd=0.25)
    gate(run, kind="failed")
    run.retry()
    assert gate(run, kind="budget").payload["used"] == 0.25
    run.approve()
    assert run.wait().cost_usd == 0.5


def test_a_turn_that_is_tried_again_by_itself_counts_once() -> None:
    busy = cm.Reply("", error=cm.EngineRateLimited("busy", retry_after_s=0))
    run = start(five(steps="a"), paid(a=[busy, busy, PAID]), max_turns=1)
    assert run.wait().status == "completed"


# -- tried again by itself --------------------------------------------------------------------------------------------

BUSY = cm.Reply(
    "half",
    usage=cm.Usage(input_tokens=60, output_tokens=40),
    cost_usd=0.25,
    error=cm.EngineRateLimited("busy", retry_after_s=0),
)


def started(run: cm.Run) -> list[str]:
    """The paths of the turns that have begun, in that order."""
    return [event.path for event in run.events if event.type == "TurnStarted"]


@pytest.mark.parametrize("whose", ["run", "step"])
@pytest.mark.parametrize(
    ("limit", "asked"),
    [({"max_cost_usd": 0.25}, 2), ({"max_cost_usd": 0.50}, 1), ({"max_tokens": 100}, 2), ({"max_turns": 1}, 0)],
    ids=str,
)
def test_at_the_limit_it_is_not_tried_again_unasked(limit: dict[str, Any], asked: int, whose: str) -> None:
    workflow = five(steps=[cm.step("a", **(limit if whose == "step" else {}))])
    run = start(workflow, paid(a=[BUSY, BUSY, PAID]), **(limit if whose == "run" else {}))
    for number in range(asked):
        opened = gate(run, kind="budget")
        tries = 3 - asked + number
        assert (opened.path, opened.attempt, len(started(run))) == ("a", 1, tries)
        assert "limit" in say(run)
        assert "reached after a. Continue with +" in say(run)
        with run.reading() as state:
            assert text.look(state, state.steps["a"]) == ("waiting", "waiting")
            assert "Continue with +" in html.run_html(state)
        run.approve()
    assert run.wait().status == "completed"
    assert (run.cost_usd, len(run["a"].attempts), len(started(run))) == (0.75, 1, 3)
    assert folded(run.events) == run.state


def test_stopped_before_it_is_tried_again_it_asks_when_it_goes_on() -> None:
    run = start(five(steps="a"), paid(a=[BUSY, PAID]), journal="j.db", max_cost_usd=0.25)
    gate(run, kind="budget")
    assert run.stop().wait().status == "stopped"
    assert run["a"].attempts[0].cut_short
    again = cm.resume(run.id, journal="j.db", engine=paid())
    assert gate(again, kind="budget").attempt == 2
    again.approve()
    assert again.wait().status == "completed"


def test_a_higher_limit_lets_it_be_tried_again() -> None:
    run = start(five(steps="a", max_cost_usd=0.25), paid(a=[BUSY, PAID]))
    gate(run, kind="budget")
    assert run.revise(five(steps="a", max_cost_usd=1)) == []
    assert (run.wait().status, len(run["a"].attempts)) == ("completed", 1)


def test_members_that_are_to_be_tried_again_wait_for_one_answer(headless: None) -> None:
    """Nobody waits for what cannot begin: the run rests although some are to be tried again."""
    side_by_side = cm.parallel("a", "b", id="team")
    script = paid(a=[BUSY, PAID], b=[BUSY, PAID])
    run = start(five(steps=[side_by_side]), script, journal="j.db", max_cost_usd=0.5)
    with pytest.raises(cm.GatePending, match=r"limit reached after team/[ab]#1"):
        run.wait()
    (opened,) = run.gates
    assert (opened.kind, sorted(started(run))) == ("budget", ["team/a#1", "team/b#1"])
    run.decide(opened.id, cm.Decision(action="approve", max_cost_usd=1))
    assert (run.wait().status, run.cost_usd) == ("completed", 1.0)
    assert [len(member.attempts) for member in run["team"].members] == [1, 1]


def test_a_caller_whose_member_waits_so_can_be_cut_short() -> None:
    run = start(five(steps=[cm.parallel("a", "b", id="team")]), paid(a=[BUSY, PAID]), journal="j.db", max_cost_usd=0.5)
    assert gate(run, kind="budget").path == "team/a#1"
    run.stop().wait()
    again = cm.resume(run.id, journal="j.db", engine=paid(), max_cost_usd=9).wait()
    assert again.status == "completed"
    assert folded(again.events) == again.state


def test_a_tape_knows_where_it_was_asked(headless: None, tmp_path: Path) -> None:
    where = tmp_path / "tape.jsonl"
    run = start(five(steps="a"), paid(a=[BUSY, PAID]), record=where, on_gate="approve", max_cost_usd=0.25).wait()
    assert [event.type for event in run.events].count("GateOpened") == 1
    again = five(steps="a").start(tape=where, journal=":memory:", max_cost_usd=0.25).wait()
    assert [event.type for event in again.events] == [event.type for event in run.events]
    assert again.cost_usd == run.cost_usd == 0.5


# -- in the midst of a turn --------------------------------------------------------------------------------------------

ASKS = cm.Reply(
    "One moment.",
    usage=cm.Usage(input_tokens=60, output_tokens=40),
    cost_usd=0.25,
    tool_calls=[{"name": "ask_human", "arguments": {"question": "Which?"}}],
)


def answered(run: cm.Run, path: str = "a") -> cm.Run:
    """The question of the turn there is answered; what it asks next is another thing."""
    question = until(lambda: next((one for one in run.gates if (one.kind, one.path) == ("question", path)), None), "it")
    return run.decide(question.id, cm.Decision(action="answer", feedback="this"))


@pytest.mark.parametrize("whose", ["run", "step"])
@pytest.mark.parametrize(
    ("limit", "asked"),
    [
        ({"max_cost_usd": 0.25}, True),
        ({"max_cost_usd": 0.50}, False),
        ({"max_tokens": 100}, True),
        ({"max_turns": 1}, False),
    ],
    ids=str,
)
def test_a_turn_calls_its_model_again_only_within_its_limits(limit: dict[str, Any], asked: bool, whose: str) -> None:
    workflow = five(steps=[cm.step("a", timeout_s=20, **(limit if whose == "step" else {}))])
    run = answered(start(workflow, paid(a=[ASKS, PAID]), **(limit if whose == "run" else {})))
    if asked:
        opened = gate(run, kind="budget")
        assert (opened.path, opened.attempt, run["a"].status, run.cost_usd) == ("a", 1, "asks you", 0.25)
        assert "reached after a. Continue with +" in say(run)
        with run.reading() as state:
            assert "Continue with +" in html.run_html(state)
        run.approve()
    assert (run.wait().status, started(run), run.cost_usd) == ("completed", ["a"], 0.5)
    assert run["a"].attempts[0].decision is None
    assert folded(run.events) == run.state


def test_it_is_stopped_there_and_asks_again_before_its_next_attempt() -> None:
    run = answered(start(five(steps="a"), paid(a=[ASKS, PAID]), journal="j.db", max_cost_usd=0.25))
    opened = gate(run, kind="budget")
    run.decide(opened.id, cm.Decision(action="stop")).wait()
    assert (run.status, run["a"].attempts[0].cut_short is not None, run.cost_usd) == ("stopped", True, 0.25)
    again = cm.resume(run.id, journal="j.db", engine=paid())
    assert gate(again, kind="budget").attempt == 2
    assert again.approve().wait().status == "completed"


def test_a_higher_limit_lets_it_go_on() -> None:
    run = answered(start(five(steps="a", max_cost_usd=0.25), paid(a=[ASKS, PAID])))
    opened = gate(run, kind="budget")
    assert run.revise(five(steps="a", max_cost_usd=1)) == []
    assert (run.wait().status, started(run)) == ("completed", ["a"])
    with pytest.raises(cm.AlreadyDecided):
        run.decide(opened.id, cm.Decision(action="approve"))


def test_those_side_by_side_wait_for_one_answer() -> None:
    side_by_side = cm.parallel("a", "b", "c", id="team", max_concurrency=2)
    run = start(five(steps=[side_by_side]), paid(a=[ASKS, PAID], b=[ASKS, PAID]), max_cost_usd=0.25)
    for path in ("team/a#1", "team/b#1"):
        answered(run, path)
    opened = until(lambda: [one for one in run.gates if one.kind == "budget"], "the budget")
    assert (len(opened), len(run.gates)) == (1, 1), "also where the other one comes to it later"
    assert sorted(started(run)) == ["team/a#1", "team/b#1"], "and nobody else begins"
    run.decide(opened[0].id, cm.Decision(action="approve", max_cost_usd=5))
    assert (run.wait().status, run.cost_usd) == ("completed", 1.25)
    assert folded(run.events) == run.state


def test_with_nobody_there_the_run_rests_although_turns_wait_inside(headless: None) -> None:
    def answers(one: cm.Gate) -> Any:
        return cm.Decision(action="answer", feedback="this") if one.kind == "question" else None

    side_by_side = cm.parallel("a", "b", id="team")
    script = paid(a=[ASKS, PAID], b=[ASKS, PAID])
    run = start(five(steps=[side_by_side]), script, journal="j.db", max_cost_usd=0.25, on_gate=answers)
    with pytest.raises(cm.GatePending, match="limit reached after team/"):
        run.wait(20)
    (opened,) = run.gates
    run.decide(opened.id, cm.Decision(action="approve", max_cost_usd=5))
    assert (run.wait(20).status, run.cost_usd) == ("completed", 1.0)


def test_a_tape_asks_in_the_midst_of_a_turn_where_it_was_asked(headless: None, tmp_path: Path) -> None:
    def yes(one: cm.Gate) -> cm.Decision:
        return cm.Decision(action="answer" if one.kind == "question" else "approve", feedback="this")

    where, script = tmp_path / "tape.jsonl", paid(a=[ASKS, ASKS, PAID])
    limits: dict[str, Any] = {"max_cost_usd": 0.25}
    run = start(five(steps="a -> b"), script, record=where, on_gate=yes, **limits).wait(20)
    gates = [event.gate.kind for event in run.events if event.type == "GateOpened"]
    assert gates == ["question", "budget", "question", "budget", "budget"]
    again = five(steps="a -> b").start(tape=where, journal=":memory:", **limits).wait(20)
    assert [event.type for event in again.events] == [event.type for event in run.events]
    assert again.cost_usd == run.cost_usd == 1.0


# -- what is not known ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limit", "sentence"),
    [
        (
            {"max_cost_usd": 0.5},
            "Paused: the cost of a turn is not known, so the limit of $0.50 cannot be held. "
            "Continue without counting it?",
        ),
        (
            {"max_tokens": 9},
            "Paused: the number of tokens of a turn is not known, so the limit of 9 tokens cannot be held. "
            "Continue without counting it?",
        ),
    ],
)
def test_what_is_not_known_does_not_count_as_nothing(limit: dict[str, Any], sentence: str) -> None:
    run = start(five(), Untold(), **limit)
    opened = gate(run)
    assert (done(run), say(run), opened.payload["unknown"]) == ("a", sentence, 1)
    with run.reading() as state:
        assert [way.label for way in text.ways(state, opened)] == ["Continue uncounted", "Stop"]
    run.approve()
    assert run.wait().status == "completed", "it is asked once"


def test_a_function_and_a_tape_cost_nothing(tmp_path: Path) -> None:
    @cm.agent("f")
    def f(turn: cm.Turn) -> str:
        return "free"

    run = cm.Workflow("free", steps="f", agents=[f]).start(journal=":memory:", max_cost_usd=0.1, max_tokens=5)
    assert run.wait().status == "completed"
    tape = tmp_path / "t.jsonl"
    tape.write_text('{"tape": 1}\n{"path": "a", "attempt": 1, "text": "x"}\n{"path": "b", "attempt": 1, "text": "y"}\n')
    run = five(steps="a -> b").start(tape=tape, journal=":memory:", max_cost_usd=0.1)
    assert run.wait().status == "completed"


@pytest.mark.parametrize(
    ("steps", "options"),
    [
        ("a", {"max_cost_usd": 0.5}),
        ([cm.step("a", max_cost_usd=0.5)], {}),
        ([cm.parallel("a", "b", max_cost_usd=0.5)], {}),
    ],
)
def test_a_price_that_is_known_not_to_be_known_is_refused(steps: Any, options: dict[str, Any]) -> None:
    with pytest.raises(cm.WorkflowError) as refused:
        five(steps=steps).start(engine="ollama:llama3.2", **options)
    said = str(refused.value)
    assert "max_cost_usd=0.5 cannot be held: the cost of 'a' would not be known. ollama has no price for" in said
    assert "%config CM.prices" in said
    assert cm.runs() == []


def test_a_price_in_a_table_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prices = tmp_path / "prices.toml"
    prices.write_text('[models]\n"llama3.2" = { input = 0, output = 0 }\n')
    monkeypatch.setenv("CM_PRICES", str(prices))
    run = five(steps=[cm.step("a", gate="before", interactive=True)]).start(
        engine="ollama:llama3.2", journal=":memory:", max_cost_usd=0.5
    )
    gate(run, kind="start")
    run.stop()


# -- who may lift it --------------------------------------------------------------------------------------------------


def test_unattended_mode_does_not_lift_a_limit() -> None:
    run = start(five(steps="a? -> b? -> c"), max_turns=2)
    gate(run, kind="review")
    run.set_mode("unattended").approve()
    until(lambda: [opened for opened in run.gates if opened.kind == "budget"], "the budget, with b approved before it")
    assert done(run) == "ab"
    run.approve()
    assert run.wait().status == "completed"


@pytest.mark.parametrize(
    ("policy", "status", "finished"),
    [
        ("approve", "completed", "abcde"),
        ("stop", "stopped", "ab"),
        (lambda gate: "stop" if gate.kind == "budget" else "approve", "stopped", "ab"),
        (lambda gate: cm.Decision(action="approve", max_turns=9), "completed", "abcde"),
    ],
    ids=["approve", "stop", "a function that stops", "a function that permits more"],
)
def test_on_gate_is_a_persons_word(headless: None, policy: Any, status: str, finished: str) -> None:
    run = start(five(), max_turns=2, on_gate=policy).wait()
    assert (run.status, done(run)) == (status, finished)


def test_with_nobody_there_it_stops_with_a_sentence_and_can_go_on_with_more(headless: None) -> None:
    run = start(five(), journal="j.db", max_cost_usd=0.5, on_gate="reject")
    with pytest.raises(cm.GatePending) as stopped:
        run.wait()
    said = str(stopped.value)
    assert said.startswith("Paused: $0.50 limit reached after b. Nobody can answer here. Go on with more in all (")
    assert "`--max-cost`" in said
    again = cm.resume(run.stop().id, journal="j.db", engine=paid(), max_cost_usd=2)
    assert (again.wait().status, again.cost_usd) == ("completed", 1.25)


def test_a_tape_answers(headless: None, tmp_path: Path) -> None:
    tape = tmp_path / "t.jsonl"
    turns = [f'{{"path": "{name}", "attempt": 1, "text": "x", "cost_usd": 0.25}}' for name in "abcde"]
    said = '{"gate": {"path": "%s", "attempt": 1, "kind": "budget"}, "decision": {"action": "approve"%s}}'
    tape.write_text("\n".join(['{"tape": 1}', *turns, said % ("c", ""), said % ("e", ', "max_cost_usd": 5')]))
    run = five().start(tape=tape, journal=":memory:", max_cost_usd=0.5)
    assert (run.wait().status, len(run.state.decisions)) == ("completed", 2)
    assert [one.max_cost_usd for one in run.state.decisions.values()] == [0.5, 5]


# -- going on later ---------------------------------------------------------------------------------------------------


def test_stopped_at_its_limit_it_asks_again_and_a_higher_one_lets_it_go_on() -> None:
    run = start(five(max_turns=2), journal="j.db")
    before = gate(run)
    run.decide(before.id, cm.Decision(action="stop")).wait()
    again = cm.resume(run.id, journal="j.db", engine=paid())
    assert gate(again).digest == before.digest
    again.stop().wait()
    assert cm.resume(run.id, journal="j.db", engine=paid(), max_turns=9).wait().status == "completed"


def test_a_limit_that_is_edited_counts_at_once() -> None:
    run = start(five(max_turns=2))
    opened = gate(run)
    assert run.revise(five(max_turns=4)) == []
    assert gate(run).path == "e"
    with pytest.raises(cm.AlreadyDecided):
        run.decide(opened.id, cm.Decision(action="approve"))
    assert run.workflow.max_turns == 4
    run.go_on(limits={"max_turns": 9})
    assert run.wait().status == "completed"
    with run.reading() as state:
        said = [text.event_line(state, event) for event in run.events if event.type == "WorkflowChanged"]
    assert said == ["cm: the workflow is defined anew: limit 4 turns", "cm: five may use 9 turns in all from now on"]
    assert run.workflow.max_turns == 4, "that is the definition's"


def test_a_limit_that_the_definition_has_no_more_holds_nothing() -> None:
    run = start(five(max_turns=2, max_cost_usd=9))
    gate(run)
    assert run.revise(five(max_cost_usd=9)) == []
    assert run.wait(20).status == "completed"
    assert (run.workflow.max_turns, run.workflow.max_cost_usd) == (None, 9)
    with run.reading() as state:
        said = [text.event_line(state, event) for event in run.events if event.type == "WorkflowChanged"]
    assert said == ["cm: the workflow is defined anew: no limit of turns"]


def test_a_limit_given_at_the_start_is_no_matter_of_the_definition() -> None:
    run = start(five(), max_turns=2)
    opened = gate(run)
    run.revise(five(inputs={"unread": 1}))
    assert [one.id for one in run.gates] == [opened.id]


# -- what is shown ----------------------------------------------------------------------------------------------------


def test_it_is_shown_the_same_everywhere() -> None:
    run = start(five(max_cost_usd=0.5, max_tokens=900))
    opened = gate(run)
    with run.reading() as state:
        assert "200 of 900 tokens · $0.50 of $0.50" in text.headline(state)
        assert [tuple(way)[:3] for way in text.ways(state, opened)] == [
            ("approve", "Continue with +$0.50", "%cm approve"),
            ("stop", "Stop", "%cm stop"),
        ]
        page = html.run_html(state)
        assert "Paused: $0.50 limit reached after b. Continue with +$0.50?" in page
        assert "$0.50 of $0.50" in page
        assert "Paused: $0.50 limit reached" in text.run_text(state)
        assert text.look(state, state.steps["c"]) == ("waiting", "waiting")
    run.approve(max_cost_usd=0.75)
    run.wait()
    with run.reading() as state:
        said = [text.event_line(state, event) for event in run.events if type(event).__name__ == "GateDecided"]
        assert said[0] is not None
        assert said[0].startswith("cm: c +$0.75 permitted by you")
