"""What a decision at a gate does.

Strategy: ``check_decision`` refuses what does not fit the gate. ``_DECIDED`` has a small function for each kind of gate
and action; ``stop`` is the same everywhere.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, cast

from ..errors import TransitionError
from ..events import (
    ACTIONS,
    ASKED_BY_TURNS,
    EDITABLE,
    GATE_DEADLINE,
    Action,
    Decision,
    Gate,
    GateDecided,
    GateKind,
    Ref,
)
from ..prompts import EDITED
from ..runstate import Attempt, Due, Loop, Redo, RunState, StepState
from ..tools import read_arguments
from ..workflow import Module, Parallel, Verdict, limits_of
from .budgets import grant
from .files import forget_files, take_back
from .gates import gate_of, tool_of
from .moves import advance, ask_again, asked_until, close, settle, trust
from .places import want_place
from .texts import take_fields
from .verdicts import conclude, go_back, next_prompt

NO_FIELDS = "The edited text is not the JSON of the output any more, so it has no fields."
"""Said beside an edited output that had a structure."""


def check_decision(gate: Gate, decision: Decision) -> None:
    """Refuse an answer that does not fit the gate; the message says what would."""
    if decision.action not in gate.actions:
        can = ", ".join(gate.actions)
        raise TransitionError(
            f"the {gate.kind} gate of {gate.step!r} cannot be answered with {decision.action!r}. Possible: {can}."
        )
    if decision.action == "reject" and not (decision.feedback or "").strip():
        raise TransitionError(
            f"say why {gate.step!r} is rejected: its agent gets your words, for instance 'name the tests'."
        )
    if decision.action == "answer" and not (decision.feedback or "").strip():
        raise TransitionError(f"the answer to {gate.step!r} is empty.")
    if decision.output is not None and (decision.action != "approve" or gate.kind not in EDITABLE):
        raise TransitionError(
            f"an edited text goes with approve at {', '.join(EDITABLE)}, not with {decision.action} at {gate.kind}."
        )
    if decision.scope is not None and (decision.action, gate.kind) != ("approve", "permission"):
        raise TransitionError(
            f"a scope goes with approve at a permission, not with {decision.action} at {gate.kind}: it says for how "
            "long a tool is allowed."
        )
    if gate.kind == "permission" and decision.output is not None:
        if decision.scope not in (None, "once"):
            raise TransitionError("edited arguments are for this call alone: leave out the scope.")
        try:
            read_arguments(decision.output)
        except ValueError as error:
            raise TransitionError(f"the arguments are a JSON object; these cannot be read: {error}.") from None
    if decision.prompt is not None and decision.action != "retry":
        raise TransitionError("an edited prompt goes with retry.")
    for name in limits_of(decision):
        if gate.kind != "budget" or decision.action != "approve":
            raise TransitionError(
                f"{name} says how much more may be used where a limit is reached, which is not what the {gate.kind} "
                f"gate of {gate.step!r} is about: answer it without."
            )
        if (about := gate.payload.get("limit", name)) != name:
            raise TransitionError(f"the gate of {gate.step!r} is about {about}, not {name}; nothing was changed.")


def gate_decided(state: RunState, event: GateDecided) -> None:
    """A person has answered a gate, or its deadline has."""
    gate, decision = gate_of(state, event.gate_id), event.decision
    check_decision(gate, decision)
    step = state.find(gate.path)
    if decision.prompt is not None and isinstance(step.step, Parallel):
        raise TransitionError(f"{step.id!r} has no prompt of its own to edit: its members have theirs.")
    decision.at = event.at
    for name in ("feedback", "output", "prompt"):
        if (text := getattr(decision, name)) is not None:
            state.texts[Ref(event.seq, name)] = text
    due = step.due
    close(state, step)
    state.decisions[gate.id] = decision
    last = step.last
    if last is not None and gate.kind not in ("start", "stale", "budget", *ASKED_BY_TURNS):
        last.decision = decision
    if decision.action == "stop":
        _stop_at(state, step, gate, due, decision)
    else:
        _DECIDED[gate.kind, decision.action](state, step, gate, decision, event.seq)


def _stop_at(state: RunState, step: StepState, gate: Gate, due: Due | None, decision: Decision) -> None:
    reason = f"stopped by {decision.by} at {step.id}"
    if decision.by == GATE_DEADLINE:
        reason = f"stopped by the deadline of a gate: nobody decided about {step.id} in time"
    state.ending = ("stopped", reason)
    if gate.kind in ASKED_BY_TURNS:
        step.status = "asking"  # its turn is cut short next
        asked_until(step, gate, decision.at)
    elif gate.kind == "stale":
        step.status, step.stale = "finished", True
    elif gate.kind == "start":
        ask_again(step)
    elif gate.kind != "budget":
        step.status, step.due = "due", due


def _approve_review(state: RunState, step: StepState, gate: Gate, decision: Decision, seq: int) -> None:
    last = _edited(state, step, decision, seq)
    if step.turn < step.step.turns:
        next_prompt(step, last)
    else:
        conclude(state, step, last)


def _edited(state: RunState, step: StepState, decision: Decision, seq: int) -> Attempt:
    """The last attempt, or the one that the person's own text makes."""
    last = step.attempts[-1]
    if decision.output is None:
        return last
    made = Attempt(state.texts, last.number + 1, last.iteration, engine=last.engine, edited=True)
    made.started_at = made.ended_at = decision.at
    made.turns, made.answer, made.decision = list(last.turns), Ref(seq, EDITED), decision
    made.verdict = last.verdict if last.verdict is None else Verdict.from_text(decision.output) or last.verdict
    made.session_id, made.members = last.session_id, last.members
    made.before, made.after, made.patch = last.before, last.after, last.patch
    made.files_changed, made.files_total = last.files_changed, last.files_total
    if last.output is not None:
        made.output = _as_before(decision.output, last.output)
        made.note = NO_FIELDS if made.output is None else None
        take_fields(state, seq, made.output)
    step.attempts.append(made)
    return made


def _as_before(text: str, before: Any) -> Any:
    """The value that an edited text is the JSON of, if it is one of the kind it was `before`; else ``None``."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if type(value) is type(before) else None


def _reject_review(state: RunState, step: StepState, gate: Gate, decision: Decision, seq: int) -> None:
    step.status, step.redo = "ready", Redo(feedback=Ref(seq, "feedback"), answered=True)
    take_back(state, step, step.files_before)


def _skip(state: RunState, step: StepState, gate: Gate, decision: Decision, seq: int) -> None:
    step.note = f"skipped by {decision.by}"
    settle(state, step, "skipped", None)


def _approve_start(state: RunState, step: StepState, gate: Gate, decision: Decision, seq: int) -> None:
    shown = cast("Redo", step.redo)
    edited = Ref(seq, "output") if decision.output is not None else shown.prompt
    step.status, step.redo = "ready", Redo(prompt=edited, answered=True, goes_on=shown.goes_on)


def _approve_verdict(state: RunState, step: StepState, gate: Gate, decision: Decision, seq: int) -> None:
    last = step.last
    settle(state, step, "finished", last.answer if last is not None else None)


def _reject_verdict(state: RunState, step: StepState, gate: Gate, decision: Decision, seq: int) -> None:
    if not isinstance(step.step, Module):
        _reject_review(state, step, gate, decision, seq)
        return
    loop = state.loops.setdefault(step.id, Loop())
    loop.reason = Ref(seq, "feedback")
    loop.output = step.last.answer if step.last is not None else None
    go_back(state, step, asked=True)


def _retry(state: RunState, step: StepState, gate: Gate, decision: Decision, seq: int) -> None:
    if gate.kind == "stale":
        step.turn, step.session, step.said = 1, None, ()  # from the first prompt, in a new conversation
        forget_files(step)
    edited = Ref(seq, "prompt") if decision.prompt is not None else None
    kept = step.redo.feedback if step.redo is not None and edited is None else None
    if edited is None and step.redo is not None:
        edited = step.redo.prompt
    step.status = "ready"
    trust(step)
    step.redo = Redo(prompt=edited, feedback=kept, answered=True)
    if step.caller:
        want_place(state, step)


def _approve_exhausted(state: RunState, step: StepState, gate: Gate, decision: Decision, seq: int) -> None:
    settle(state, step, "finished", _edited(state, step, decision, seq).answer)


def _retry_exhausted(state: RunState, step: StepState, gate: Gate, decision: Decision, seq: int) -> None:
    state.loops[step.id].extra += decision.count
    go_back(state, step)


def _keep_stale(state: RunState, step: StepState, gate: Gate, decision: Decision, seq: int) -> None:
    step.status = "finished" if step.approved is not None else "skipped"
    step.kept = seq
    trust(step)
    advance(state)


def _did_run(state: RunState, step: StepState, gate: Gate, decision: Decision, seq: int) -> None:
    step.note = f"{decision.by} said that it had run"
    settle(state, step, "finished", None)


def _answer(state: RunState, step: StepState, gate: Gate, decision: Decision, seq: int) -> None:
    step.answers += ((str(gate.payload.get("question", "")), decision.feedback or ""),)
    _answered(state, step, gate, decision, seq)


def _allow(state: RunState, step: StepState, gate: Gate, decision: Decision, seq: int) -> None:
    if decision.scope in ("run", "always"):
        state.allowed[tool_of(gate)] = decision
    _answered(state, step, gate, decision, seq)


def _answered(state: RunState, step: StepState, gate: Gate, decision: Decision, seq: int) -> None:
    """The turn that had asked goes on, a member as soon as it has a place; the time it waited is not its own."""
    asked_until(step, gate, decision.at)
    if step.caller:
        step.status, step.answered, step.attempts[-1].waits_since = "asking", gate.id, decision.at
        want_place(state, step)
    else:
        step.status = "running"


_Effect = Callable[[RunState, StepState, Gate, Decision, int], None]
_DECIDED: dict[tuple[GateKind, Action], _Effect] = {
    ("review", "approve"): _approve_review,
    ("review", "reject"): _reject_review,
    ("start", "approve"): _approve_start,
    ("verdict", "approve"): _approve_verdict,
    ("verdict", "reject"): _reject_verdict,
    ("verdict", "retry"): _retry,
    ("exhausted", "approve"): _approve_exhausted,
    ("exhausted", "retry"): _retry_exhausted,
    ("failed", "retry"): _retry,
    ("stale", "approve"): _keep_stale,
    ("stale", "retry"): _retry,
    ("may_have_run", "approve"): _did_run,
    ("may_have_run", "retry"): _retry,
    ("question", "answer"): _answer,
    ("permission", "approve"): _allow,
    ("permission", "reject"): _answered,
    ("budget", "approve"): grant,
    **{(kind, "skip"): _skip for kind, actions in ACTIONS.items() if "skip" in actions},
}
