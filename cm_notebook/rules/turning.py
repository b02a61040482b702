"""Turns: started, heard from, and ended in one of three ways.

Strategy: a turn is one prompt and its answer; an attempt has one turn for each chained prompt. Each event names its
attempt and turn, and one that belongs to an earlier turn is refused. A turn that ends waits for nobody any more.
"""

from __future__ import annotations

import heapq

from ..errors import TransitionError
from ..events import (
    HISTORY,
    Ref,
    SessionOpened,
    ToolCalled,
    ToolReturned,
    TurnCutShort,
    TurnFailed,
    TurnFinished,
    TurnStarted,
    TurnWentOn,
    UsageReported,
)
from ..prompts import rejected
from ..runstate import Attempt, Due, Ordinals, Redo, RunState, StepState, ToolUse
from ..workflow import Parallel
from .budgets import budgets_of, pay, used_up
from .files import begin_files
from .members import check_alone, end_calls, keep_team, waited
from .moves import asked_until, begun, close, doubt_later, next_attempt, owe
from .places import owe_member, take_place, want_place
from .texts import take_fields
from .transitions import met
from .verdicts import judge


def turn_started(state: RunState, event: TurnStarted) -> None:
    """A prompt was sent: a new attempt, or the next turn of the one there is."""
    step = met(state, event.path, event.type)
    number, seq, context, again = next_attempt(step), event.seq, event.context, step.status == "retrying"
    if step.caller and step.place != "held" and (step.place != "queued" or state.busy >= state.max_concurrency):
        raise TransitionError(f"{step.path!r} has no place to work at yet.")
    if not step.caller and state.running:
        raise TransitionError(f"{step.path!r} cannot start: {', '.join(state.running)} is at work.")
    if event.attempt != number or event.turn != step.turn:
        raise TransitionError(
            f"attempt {event.attempt}, turn {event.turn} of step {step.id!r} cannot start; attempt "
            f"{number}, turn {step.turn} is next."
        )
    if not again and (state.held is not None or used_up(state, step) is not None):
        raise TransitionError(f"{step.path!r} cannot start: a person is asked first, as a limit is reached.")
    anew = not step.attempts or number > step.attempts[-1].number
    if anew:
        step.attempts.append(Attempt(state.texts, number, event.iteration, started_at=event.at))
        step.answers = ()
    last = step.attempts[-1]
    if step.redo is not None:
        step.redo.goes_on = False  # cut short, it is the next attempt
        if step.redo.feedback is not None:
            _remember(step, event.session_id)
    if again:
        last.turns.pop()
    else:
        for budget in budgets_of(state, step):
            budget.used["max_turns"] += 1
    if last.ended_at is not None:  # waiting between two tries is not work, nor is a person's look at the last answer
        last.asked_s += max(0.0, event.at - last.ended_at)
    last.ended_at, last.engine = None, event.engine
    last.turns.append(seq)
    last.session_id = event.session_id
    state.texts[Ref(seq, "prompt")] = event.prompt if context is None else event.prompt + context
    if context is not None:
        here = Ref(seq, "context")
        state.texts[here] = context
        if step.step.context == "all":
            state.context_all = (here, step.index, state.epoch)
    if step.caller:
        state.backing_off.pop(step.path, None)
        take_place(state, step)
    else:
        begun(state, step)
        doubt_later(state, step)
        if not again:
            begin_files(state, step, attempt=anew)
    ordinals = state.ordinals.get(step.step.agent)
    if ordinals is None:
        ordinals = state.ordinals[step.step.agent] = Ordinals()
    last.ordinal = ordinals.take()
    step.status, step.retry_at, step.note = "running", None, None
    state.running[step.path] = step


def _remember(step: StepState, session_id: str | None) -> None:
    """What was rejected is a part of the conversation, where that is told by its history; else the prompt holds it."""
    last = rejected(step)
    if last is None or not last.turns:
        return
    exchange = (Ref(last.turns[-1], "prompt"), last.answer)
    before = step.said[:-1] if step.said[-1:] == (exchange,) else step.said  # this turn may have been begun before
    step.said = (*before, exchange) if session_id == HISTORY else before


def _turn_met(
    state: RunState,
    event: SessionOpened | ToolCalled | ToolReturned | UsageReported | TurnFinished | TurnFailed | TurnCutShort,
) -> tuple[StepState, Attempt]:
    """The turn that an event is about, which runs now; one that ends it needs all that it has called to have ended."""
    step = met(state, event.path, event.type)
    last = step.attempts[-1] if step.attempts else None
    if last is None or last.number != event.attempt or step.turn != event.turn:
        raise TransitionError(
            f"{event.type} names attempt {event.attempt}, turn {event.turn} of step {step.id!r}, "
            f"which is at attempt {step.attempt}, turn {step.turn}."
        )
    if step.path in state.calls and not isinstance(event, (SessionOpened, ToolCalled, ToolReturned, UsageReported)):
        check_alone(state, step)
    return step, last


def session_opened(state: RunState, event: SessionOpened) -> None:
    """The agent has a conversation, which later turns of the step can continue."""
    step, last = _turn_met(state, event)
    last.session_id = event.session_id
    step.session, step.session_engine = last.session_id, last.engine


def tool_called(state: RunState, event: ToolCalled) -> None:
    """The turn calls a tool."""
    _step, last = _turn_met(state, event)
    last.tools.append(ToolUse(event.call_id, event.name, event.arguments, called_at=event.at))


def tool_returned(state: RunState, event: ToolReturned) -> None:
    """The tool has answered."""
    _step, last = _turn_met(state, event)
    called = (
        use for use in reversed(last.tools) if (use.call_id, use.name, use.text) == (event.call_id, event.name, None)
    )
    use = next(called, None)
    if use is None:
        raise TransitionError(f"{event.name!r} returned to {event.path!r}, which had not called it.")
    use.text, use.failed, use.returned_at = event.text, event.failed, event.at


def usage_reported(state: RunState, event: UsageReported) -> None:
    """What the turn has used so far is paid."""
    step, last = _turn_met(state, event)
    pay(state, step, last, event)


def turn_finished(state: RunState, event: TurnFinished) -> None:
    """The answer is there; it is paid for and judged."""
    step, last = _turn_met(state, event)
    del state.running[step.path]
    if step.path in state.calls:
        end_calls(state, step, event.at)
    step.team, step.recall, step.resent = (), None, ()
    here = Ref(event.seq)
    state.texts[here] = event.text
    last.failures = 0
    last.answer, last.output, last.verdict, last.ended_at = here, event.output, event.verdict, event.at
    last.session_id, last.note = event.session_id or last.session_id, event.note
    step.session, step.session_engine = last.session_id, last.engine
    if event.output is not None:
        take_fields(state, event.seq, event.output)
    _count_time(last, event)
    pay(state, step, last, event)
    judge(state, step, last)


def _count_time(last: Attempt, event: TurnFinished | TurnFailed) -> None:
    """The time that a tape says counts, of every try."""
    if event.duration_s is not None:
        last.measured_s = (last.measured_s or 0.0) + event.duration_s


def turn_failed(state: RunState, event: TurnFailed) -> None:
    """The turn ended with an error: it is tried again by itself, or a person is asked."""
    step, last = _turn_met(state, event)
    _stop_running(state, step, event.at)
    _count_time(last, event)
    pay(state, step, last, event)
    last.errors += (event.error,)
    last.failures += 1
    last.ended_at = event.at
    if event.retry_in_s is not None:
        step.status, step.retry_at = "retrying", event.at + event.retry_in_s
        if step.place == "held":
            state.backing_off[step.path] = step
        elif step.caller:  # it had asked somebody
            want_place(state, step)
    else:
        owe(step, Due("failed", {"error": event.error.message}, (event.error.message,)))
        owe_member(state, step)


def turn_cut_short(state: RunState, event: TurnCutShort) -> None:
    """The turn did not end: it is run again, or a person says whether it had its effect."""
    step, last = _turn_met(state, event)
    at = _ended_at(state, last, event)
    if step.status == "waiting":
        if step is not state.held_retry:
            raise TransitionError(f"no turn of {step.path!r} is under way.")
        close(state, step)
    if step.status != "retrying" and not isinstance(step.step, Parallel):
        heapq.heappush(state.ordinals[step.step.agent].free, last.ordinal)
    state.backing_off.pop(step.path, None)
    _stop_running(state, step, at)
    pay(state, step, last, event)
    if last.ended_at is not None:  # it was to be tried again
        last.asked_s += max(0.0, at - last.ended_at)
    last.cut_short, last.ended_at = event.reason or "stopped", at
    state.loose = True
    step.retry_at = None
    step.resent += step.answers
    if step.step.idempotent or isinstance(step.step, Parallel):  # of that, its members say it
        step.status = "ready"
        step.redo = step.redo or Redo()
        step.redo.answered = True
        if step.caller:
            want_place(state, step)
    else:
        reason = f"{step.id} was cut short ({last.cut_short}) and may have had its effect."
        owe(step, Due("may_have_run", {"reason": reason}, (reason,)))
        owe_member(state, step)


def _ended_at(state: RunState, last: Attempt, event: TurnCutShort) -> float:
    """When the turn was cut short: one whose process had died, when the last thing was heard of the run."""
    if not state.resumed:
        return event.at
    here = last.started_at > state.broke_off_at  # a parallel step, which has no prompt of its own
    if last.turns:
        here = last.turns[-1] > state.resumed[-1].seq
    return event.at if here else state.broke_off_at


def _stop_running(state: RunState, step: StepState, at: float) -> None:
    """It runs no more; a question it had asked is void, and so are the calls it had made."""
    state.running.pop(step.path, None)
    end_calls(state, step, at)
    if step.answered is not None:
        waited(step.attempts[-1], at)
        step.answered = None
    keep_team(step)
    if step.gate is not None:
        asked_until(step, step.gate, at)
    close(state, step)


def turn_went_on(state: RunState, event: TurnWentOn) -> None:
    """A member that was answered has a place again."""
    step = met(state, event.path, event.type)
    if step.answered is None or step.answered != event.gate_id:
        raise TransitionError(f"{step.path!r} waits for no answer that it has, so it does not go on.")
    if step.place != "queued" or state.busy >= state.max_concurrency:
        raise TransitionError(f"{step.path!r} has no place to work at yet.")
    last = step.attempts[-1]
    waited(last, event.at)
    take_place(state, step)
    step.status, step.answered = "running", None
