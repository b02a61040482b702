"""Who may work: members in line for one of the run's places (``max_concurrency``).

Strategy: a ``Call`` puts in line as many of its group as its own limit allows, and those first who were at work
before. Lines are kept by depth, so that what was begun is finished before more is begun. A member holds a place from
its turn's start until it ends, asks a person or calls others; then it gives it back, and *wants* one again. All that
is needed to say who is next is kept as it changes, so asking costs the same however many there are.

    "" ───────────► queued ──► held ──► ""    begins its turn
    "" ──► wants ──► queued ──► held ──► ""    goes on with it
"""

from __future__ import annotations

from ..runstate import ENDED, Call, RunState, StepState


def want_place(state: RunState, member: StepState) -> None:
    """The member goes on as soon as there is a place."""
    leave_place(state, member, fill=False)
    call = state.calls.get(member.caller)
    if call is not None:
        member.place = "wants"
        call.again.append(member)
        _fill(state, call)


def take_place(state: RunState, member: StepState) -> None:
    """The member is at work; it was in line, or nobody asked (its caller goes on while it waits)."""
    call = state.calls[member.caller]
    if member.place == "queued":
        del state.lines[member.depth][member.path]
    elif member.place != "held":
        if member.place == "wants":
            call.again.remove(member)
        call.busy += 1
    if member.place != "held":
        state.busy += 1
    member.place = "held"


def leave_place(state: RunState, member: StepState, *, fill: bool = True) -> None:
    """The member is not at work any more, nor in line: others may be."""
    was, member.place = member.place, ""
    call = state.calls.get(member.caller)
    if was == "held":
        state.busy -= 1
    elif was == "queued":
        del state.lines[member.depth][member.path]
    if call is None or not was:
        return
    if was == "wants":
        call.again.remove(member)
    else:
        call.busy -= 1
    if fill:
        _fill(state, call)


def owe_member(state: RunState, step: StepState) -> None:
    """If `step` is a member that is waited for, its gate is opened beside whatever its siblings do."""
    if step.caller:
        leave_place(state, step)
        if step.caller in state.calls:
            state.owed[step.path] = step


def member_ended(state: RunState, member: StepState) -> None:
    """The member has ended, in whatever way: the next one's turn, the next group's, or its caller's."""
    leave_place(state, member)
    state.owed.pop(member.path, None)
    call = state.calls.get(member.caller)
    if call is not None:
        call.left -= 1
        if not call.left:
            next_group(state, state.find(member.caller), call)


def next_group(state: RunState, caller: StepState, call: Call) -> None:
    """Begin with the first or next group; past the last one, and past a failure, the caller goes on."""
    while call.group + 1 < len(call.groups):
        if call.group >= 0 and any(member.status == "failed" for member in call.groups[call.group]):
            break
        call.group, call.next = call.group + 1, 0
        call.left = sum(member.status not in ENDED for member in call.groups[call.group])
        if call.left:
            _fill(state, call)
            return
    if caller.caller:
        want_place(state, caller)
    else:
        state.lines[0][caller.path] = caller


def _fill(state: RunState, call: Call) -> None:
    """Put in line whoever of `call` may work: first who was at it before."""
    group = call.groups[call.group]
    while call.limit is None or call.busy < call.limit:
        begun = bool(call.again)
        if begun:
            member = call.again.popleft()
        elif call.next < len(group):
            member = group[call.next]
            call.next += 1
            if member.status == "due":
                state.owed[member.path] = member
            if member.status == "due" or member.status in ENDED:
                continue
        else:
            return
        call.busy += 1
        member.place = "queued"
        line = state.lines[member.depth]
        line[member.path] = member
        if begun:
            line.move_to_end(member.path, last=False)
