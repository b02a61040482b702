"""How the run moves over its steps: past one that is settled, back in a loop, back because a person wants it.

Strategy: the cursor stands on the first step that is not settled. What was made after a step whose output is another
now is *stale*: it keeps its output until a person says what becomes of it. One that still waits for its first yes is
*outdated*, and made again: nobody is to approve what is built on something else. ``settle``, ``begin_again``, ``owe``
and ``close`` are the verbs that the later themes are told in.
"""

from __future__ import annotations

from typing import Literal, cast

from ..errors import TransitionError
from ..events import ASKED_BY_TURNS, Gate, GateKind, LoopedBack, Ref, Rewound, StepOutdated, StepSkipped
from ..runstate import Due, Loop, Redo, RunState, StepState
from ..workflow import Module, Parallel
from .budgets import release
from .files import files_before, forget_files, take_back
from .places import member_ended, owe_member
from .transitions import met


def settle(state: RunState, step: StepState, status: Literal["finished", "skipped"], output: Ref | None) -> None:
    """The run may go past `step`, whose output is `output`; what was made from an earlier one is stale."""
    if step.looped_by is not None and status == "skipped":
        _hand_on(state, step)
    step.status, step.approved = status, output
    trust(step)
    step.due, step.redo, step.looped_by, step.resent = None, None, None, ()
    step.restore = None
    if step.caller:
        member_ended(state, step)
        return
    if isinstance(step.step, Parallel) and step.last is not None:
        for member in step.last.members:
            state.voices[member.id] = member.approved if output is not None else None
    if step.path in state.loops:
        state.loops[step.path] = Loop()
    begun(state, step)
    if step.index + 1 < state.frontier:
        state.epoch += 1
        doubt_later(state, step)
    if state.until == step.path:
        state.until_reached = True
    advance(state)


def _hand_on(state: RunState, step: StepState) -> None:
    """What the module said that sent the run back is for the first repeated step that runs: `step` is passed over."""
    module, after = state.steps.get(cast("str", step.looped_by)), state.after(step)
    ran = step.last is not None and step.last.iteration == step.iteration
    if module is not None and after is not None and after.index <= module.index and not ran:
        after.looped_by = step.looped_by


def advance(state: RunState) -> None:
    """The cursor goes to the first step that is not settled."""
    order, cursor = state.order, state.cursor
    while cursor < len(order) and order[cursor].settled:
        cursor += 1
    state.cursor = cursor


def begun(state: RunState, step: StepState) -> None:
    """The step builds on what there is now; what becomes of earlier ones from here on is its business."""
    state.outdated.pop(step.path, None)
    if state.frontier <= step.index:
        state.frontier = step.index + 1


def doubt_later(state: RunState, step: StepState) -> None:
    """What was made after `step` is stale, or outdated: from now on the output that it builds on is another."""
    for later in state.order[step.index + 1 : state.frontier] if step.index + 1 < state.frontier else ():
        if later.status in ("finished", "skipped"):
            later.stale, later.outdated_by = True, step.id
        elif _waits_with_it(later):
            state.outdated[later.path] = step.id


_WITH_IT: tuple[GateKind, ...] = ("review", "verdict", "exhausted", "start")
"""Gates at which an output, or a prompt with those of earlier steps, is put to a person."""


def _waits_with_it(step: StepState) -> bool:
    """Whether the step has made something that nobody has said yes to."""
    kind = step.gate.kind if step.gate is not None else step.due.kind if step.due is not None else None
    return step.status == "looping" or (step.status in ("waiting", "due") and kind in _WITH_IT)


def outdated(state: RunState) -> list[StepOutdated]:
    """What is to be said of the steps that wait with something which was made before an earlier one ran again."""
    steps = ((state.steps.get(path), by) for path, by in state.outdated.items())
    return [
        StepOutdated(step=step.id, path=step.path, by=by)
        for step, by in steps
        if step is not None and _waits_with_it(step)
    ]


def step_outdated(state: RunState, event: StepOutdated) -> None:
    """The step is made again; what it had made stays to be seen."""
    step = met(state, event.path, event.type)
    if not _waits_with_it(step):
        raise TransitionError(f"step {step.id!r} waits with nothing that could be outdated.")
    close(state, step, reopen=True)
    begin_again(step, "pending")
    state.outdated.pop(step.path, None)


def trust(step: StepState) -> None:
    """The step is not stale any more."""
    step.stale, step.outdated_by, step.changed = False, None, ()


def step_skipped(state: RunState, event: StepSkipped) -> None:
    """The run passes a step over by a rule of the workflow."""
    step = met(state, event.path, event.type)
    step.note = event.reason
    settle(state, step, "skipped", step.approved)


def looped_back(state: RunState, event: LoopedBack) -> None:
    """A module sends the run back: the steps in between run again."""
    step = met(state, event.module, event.type)
    target = state.step(event.to)
    if target.index > step.index:
        raise TransitionError(f"{step.id!r} cannot go back to {target.id!r}, which comes after it.")
    loop = state.loops.setdefault(step.id, Loop())
    loop.count += 1
    loop.active = True
    for inside in state.order[target.index : step.index + 1]:
        if isinstance(inside.step, Module) and inside is not step:
            state.loops[inside.id] = Loop()  # an inner loop begins anew
        begin_again(inside, "pending")
        inside.looped_by = None
        inside.iteration = event.iteration
    target.looped_by = step.id
    state.epoch += 1
    state.cursor = target.index
    if state.until == step.id and state.until_once:
        state.until_reached = True


def check_rewind(state: RunState, to: str) -> StepState:
    """The step `to`, if the run can go back to it; a turn that runs can be cut short for it.

    Raises
    ------
    TransitionError    There is no such step, it is no step of the workflow's own, or the run has not come to it.
    """
    caller = next((member.caller for member in state.members.values() if to in (member.path, member.id)), None)
    if caller is not None and state.named(to) is None:
        own = caller.partition("/")[0]
        raise TransitionError(
            f"{to!r} is called by {own!r}, so it has no place of its own to go back to: name {own!r}."
        )
    target = state.step(to)
    if target.status == "pending" and target.index > state.cursor:
        why = "is to run again" if target.attempts else "has not run yet"
        raise TransitionError(f"step {target.id!r} {why}; {state.order[state.cursor].id!r} comes first.")
    return target


def rewound(state: RunState, event: Rewound) -> None:
    """The run goes on from an earlier step."""
    target = met(state, event.to, event.type)
    if state.running:
        raise TransitionError(f"{', '.join(state.running)} is running; it is cut short first.")
    check_rewind(state, event.to)
    for later in state.order[target.index + 1 :]:
        close(state, later, reopen=True)
        if later.status not in ("finished", "skipped") or event.later or event.afresh:
            begin_again(later, "pending")
        if isinstance(later.step, Module) and later.index - later.step.loop_steps > target.index:
            state.loops.pop(later.id, None)  # its loop has not begun yet
            for inside in state.order[later.index - later.step.loop_steps : later.index + 1]:
                inside.iteration, inside.looped_by = 1, None
    close(state, target)
    before = files_before(state, target)
    begin_again(target, "ready")
    take_back(state, target, before)
    if event.afresh:
        _forget_from(state, target)
        state.paused, state.pause_reason, state.back_at = True, f"back at {target.id}", target.id
        state.until, state.until_once, state.until_reached = None, False, False
    else:
        target.redo = Redo(answered=True)
    doubt_later(state, target)
    state.cursor = min(state.cursor, target.index)
    state.epoch += 1


def _forget_from(state: RunState, target: StepState) -> None:
    """`target` and what comes after it have given nothing yet; a loop that goes over `target` is in the pass it is in.

    What they did stays to be seen: their attempts.
    """
    target.status = "pending"
    for step in state.order[target.index :]:
        step.approved, step.note, step.looped_by, step.resent, step.iteration = None, None, None, (), 1
        if isinstance(step.step, Parallel):
            state.voices.update(dict.fromkeys(step.step.members))
    for later in reversed(state.order[target.index :]):  # of loops in one another, the inner one counts
        loop = state.loops.get(later.id)
        if isinstance(later.step, Module) and loop is not None and loop.count:
            begins = max(0, later.index - later.step.loop_steps)
            for inside in state.order[max(begins, target.index) : later.index + 1]:
                inside.iteration = loop.count + 1
            if begins == target.index:
                target.looped_by = later.id  # what sent the run back is said again
    state.frontier = min(state.frontier, target.index)


def begin_again(step: StepState, status: Literal["pending", "ready"]) -> None:
    """The step runs anew, from its first prompt: ``ready`` as a person asks for it, ``pending`` in the run's course.

    One that may have run does not in the run's course: its gate asks first.
    """
    step.turn, step.redo, step.retry_at, step.session, step.said = 1, None, None, None, ()
    step.team, step.recall = (), None
    if status == "pending" and _may_have_run(step):
        step.status = "due"
        return
    step.status, step.due = status, None
    forget_files(step)
    trust(step)


def _may_have_run(step: StepState) -> bool:
    """Whether a person still has to say if a turn that was cut short had its effect."""
    return step.status in ("due", "waiting") and step.due is not None and step.due.kind == "may_have_run"


def next_attempt(step: StepState) -> int:
    """The number of the attempt that the next turn belongs to: a chained prompt and a second try stay in theirs.

    After a person's own text comes another one, so that theirs stays what it was.
    """
    if not step.attempts:
        return 1
    last = step.attempts[-1]
    if step.status == "retrying":
        return last.number
    asked = step.redo is not None and not step.redo.goes_on
    return last.number if step.turn > 1 and not asked and not last.edited else last.number + 1


def owe(step: StepState, due: Due) -> None:
    """A gate is to be opened for `step`."""
    step.status, step.due = "due", due


def close(state: RunState, step: StepState, *, reopen: bool = False) -> None:
    """The gate of `step` is no longer open; with `reopen` it comes again when the run goes on."""
    if step.gate is None:
        return
    kind = step.gate.kind
    state.gates.pop(step.gate.id, None)
    step.gate = None
    if kind == "budget":
        release(state)
        return
    if not reopen:
        return
    if kind == "stale":
        step.status, step.stale = "finished", True
    elif kind == "start":
        ask_again(step)
    elif kind not in ASKED_BY_TURNS:
        step.status = "due"
        owe_member(state, step)


def asked_until(step: StepState, gate: Gate, at: float) -> None:
    """The turn of `step` waited for a person from when `gate` opened until now: that time is not its own."""
    step.attempts[-1].asked_s += max(0.0, at - gate.opened_at)


def ask_again(step: StepState) -> None:
    """The prompt of `step` is put to a person again when the run goes on."""
    step.status, step.redo = "pending" if step.turn == 1 else "ready", None
