"""Gates: how they open, and which one an id means.

Strategy: the event that opens a gate is made here (``opening``) and understood here (``gate_opened``). A gate's id is
``run/path/attempt/ordinal``; none comes twice, so an answer that is late can be told what became of its gate.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

from ..errors import AlreadyDecided, TransitionError
from ..events import (
    ACTIONS,
    ASKED_BY_TURNS,
    GATE_DEADLINE,
    Decision,
    Gate,
    GateKind,
    GateOpened,
    Part,
    Ref,
    TellingFailed,
)
from ..prompts import pieces
from ..runstate import Due, Redo, RunState, StepState, gate_path
from ..tools import write_arguments
from ..workflow import GateDefault, Parallel
from .budgets import used_up
from .moves import begun, next_attempt
from .places import leave_place
from .transitions import met


def opening(
    state: RunState,
    step: StepState,
    due: Due,
    prompt: tuple[Part, ...] | None = None,
    context: tuple[Part, ...] | None = None,
) -> GateOpened:
    """The event that opens the gate that is due at `step`."""
    whole = hashlib.sha256()
    for piece in pieces(due.text, state.texts):
        whole.update(piece.encode("utf-8", "surrogatepass"))
    begins = due.kind in ("start", "budget") and step.status != "running"
    attempt = next_attempt(step) if begins else step.attempt
    gate = Gate(
        id=f"{state.run_id}/{step.path}/{attempt}/{step.gates + 1}",
        kind=due.kind,
        step=step.id,
        path=step.path,
        attempt=attempt,
        payload=due.payload,
        digest=whole.hexdigest(),
        actions=ACTIONS[due.kind],
        timeout_s=step.step.gate_timeout_s,
        default=_gate_default(step, due.kind),
    )
    return GateOpened(gate=gate, prompt=prompt, context=context)


def _gate_default(step: StepState, kind: GateKind) -> GateDefault | None:
    """What is decided at a gate of `step` if nobody does, where it can be; nobody's "no" is said only once."""
    default = step.step.gate_default
    if default is None or default not in ACTIONS[kind]:
        return None
    said = (attempt.decision for attempt in step.attempts)
    again = default == "reject" and any(one.action == "reject" and one.by == GATE_DEADLINE for one in said if one)
    return None if again else default


def by_default(gate: Gate) -> Decision:
    """What is decided at `gate` when its time is over."""
    words = "Nobody has looked at this in time. Look it over again." if gate.default == "reject" else None
    return Decision(action=gate.default or "stop", feedback=words, by=GATE_DEADLINE)


def ask(state: RunState, step: StepState, question: str) -> GateOpened:
    """The event with which the running turn of `step` asks a person."""
    return opening(state, step, Due("question", {"question": question}, (question,)))


def ask_permission(
    state: RunState, step: StepState, tool: tuple[str, str], arguments: Mapping[str, Any], note: str = ""
) -> GateOpened:
    """The event with which the running turn of `step` asks for permission to call `tool`: name and implementation."""
    name, implementation = tool
    payload = {"tool": name, "arguments": dict(arguments), "implementation": implementation, "note": note}
    given = {key: value for key, value in payload.items() if value != ""}
    return opening(state, step, Due("permission", given, (f"{name}\n{write_arguments(arguments)}",)))


def ask_for_more(state: RunState, step: StepState) -> list[GateOpened]:
    """With which the running turn of `step` asks for more; nothing where it has enough, or somebody asks already."""
    over = used_up(state, step)
    return [opening(state, step, over)] if over is not None and state.held is None else []


def tool_of(gate: Gate) -> tuple[str, str]:
    """The tool that a permission is about: its name, its implementation."""
    return str(gate.payload.get("tool", "")), str(gate.payload.get("implementation", ""))


def gate_opened(state: RunState, event: GateOpened) -> None:
    """A person is asked; the step waits, or its turn does."""
    gate = event.gate
    step = met(state, gate.path, event.type)
    chained = step.turn > 1 and step.redo is None
    fits: dict[str, GateKind | None] = {
        "pending": "start",
        "ready": "start" if chained else None,
        "running": gate.kind if gate.kind in ASKED_BY_TURNS else None,
        "due": step.due.kind if step.due is not None else None,
    }
    without = {"stale": not step.stale, "start": bool(step.caller) or isinstance(step.step, Parallel)}
    held = gate.kind == "budget" and step.status in ("pending", "ready", "retrying", "running") and state.held is None
    if held and used_up(state, step) is not None:
        state.held = (step, step.status)
    elif gate.kind != fits.get(step.status, "stale") or without.get(gate.kind):
        raise TransitionError(f"a {gate.kind!r} gate cannot open while step {step.id!r} is {step.status}.")
    if gate.kind == "start" and event.prompt is None:
        raise TransitionError(f"a 'start' gate of step {step.id!r} asks about a prompt, and none is there.")
    gate.opened_at = event.at
    gate.deadline = event.at + gate.timeout_s if gate.timeout_s is not None else None
    state.owed.pop(step.path, None)
    step.status = "asking" if step.path in state.running else "waiting"
    if gate.kind in ASKED_BY_TURNS and step.caller:
        leave_place(state, step)
    step.gate = gate
    step.gates += 1
    if event.prompt is not None:
        state.texts[Ref(event.seq, "prompt")] = event.prompt + (event.context or ())
    if gate.kind == "start":
        begun(state, step)
        step.redo = Redo(prompt=Ref(event.seq, "prompt"), goes_on=chained)
    state.gates[gate.id] = state.last_gate = gate


def telling_failed(state: RunState, event: TellingFailed) -> None:
    """Nobody knows of the gate; it stays open."""
    state.untold[gate_of(state, event.gate_id).id] = event.reason


def waits_for(state: RunState, gate_id: str) -> bool:
    """Whether somebody waits for that gate: for its answer, or with it for a place to go on at."""
    member = state.members.get(gate_path(gate_id))
    return gate_id in state.gates or (member is not None and member.answered == gate_id)


def gate_of(state: RunState, gate_id: str, resuming: Callable[[], str] | None = None) -> Gate:
    """The open gate of that id; `resuming` knows what to type to go on with the run.

    Raises
    ------
    AlreadyDecided     It has its answer, or its turn is over.
    TransitionError    There never was such a gate.
    """
    gate = state.gates.get(gate_id)
    if gate is not None:
        return gate
    before = state.decisions.get(gate_id)
    if before is not None:
        raise AlreadyDecided(already(before))
    place, path = gate_id.split("/"), gate_path(gate_id)
    if len(place) >= 4 and place[0] not in ("", state.run_id):
        raise TransitionError(
            f"{gate_id!r} is a gate of run {place[0]!r}, and this is run {state.run_id!r}. Nothing was changed; decide "
            "it in its own run."
        )
    earlier = state.steps.get(path) or state.members.get(path)
    if earlier is not None and place[-1] in map(str, range(1, earlier.gates + 1)):
        if place[-1] == str(earlier.gates) and state.ended in ("stopped", "failed"):
            raise AlreadyDecided(closed(state, earlier, resuming))
        raise AlreadyDecided(f"that gate of {earlier.id!r} is closed: its turn is over. Nothing was changed.")
    opened = ", ".join(state.gates) or "none"
    raise TransitionError(f"there is no gate {gate_id!r}. Open: {opened}.")


def closed(state: RunState, step: StepState, resuming: Callable[[], str] | None) -> str:
    """That the gate of `step` was closed without an answer, as the run ended."""
    why = f": {state.reason}" if state.reason else ""
    on = f": {resuming()}" if resuming is not None else ""
    return (
        f"the gate of {step.id!r} is closed: run {state.run_id!r} is {state.ended}{why}. Nothing was changed. "
        f"Go on with it, and it asks again{on}."
    )


def already(decision: Decision) -> str:
    """That somebody was first: "already approved by you at 12:31"."""
    import time

    words = {"approve": "approved", "reject": "rejected", "retry": "retried", "skip": "skipped", "answer": "answered"}
    done = words.get(decision.action, "stopped")
    clock = time.strftime("%H:%M", time.localtime(decision.at))
    return f"already {done} by {decision.by} at {clock}; nothing was changed."
