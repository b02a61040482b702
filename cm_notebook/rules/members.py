"""Agents that are called by another one, or work in a parallel step.

Strategy: a *member* is a ``StepState`` of its own, held to the same table as a step, at a path below its caller's
(``lead/critic#2``). A call is made of groups, one after the other; the members of a group work side by side, as far as
there are ``places``. A turn that did not end keeps its team: asked the same again, a member need not begin anew.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from typing import cast

from ..errors import TransitionError, WorkflowError
from ..events import AgentsCalled, AgentsReturned, CalledAgent, ErrorInfo, Part, Ref, StepFailed
from ..prompts import digest
from ..runstate import ENDED, STATUS_WORDS, Attempt, Call, Due, Redo, RunState, StepState
from ..team import MOST_DEPTH, AgentResult, Groups, last_lines
from ..workflow import GATE_OPTIONS, Parallel, Step
from .files import begin_files
from .moves import begun, close, doubt_later, next_attempt, owe
from .places import leave_place, member_ended, next_group, take_place
from .transitions import met
from .verdicts import judge


def call_agents(
    state: RunState, caller: StepState, groups: Groups, files: Mapping[str, str], limit: int | None = None
) -> AgentsCalled:
    """The event with which the running turn of `caller` calls other agents.

    Parameters
    ----------
    groups
        Calls that were checked to be of agents that may be called.
    files
        The texts of the input files that they name.

    Raises
    ------
    WorkflowError    They would call in a circle, or too deep.
    """
    above = _above(state, caller)
    for group in groups:
        for call in group:
            if call.agent in above:
                raise WorkflowError(
                    f"run_agents: {call.agent!r} is at work above ({above[call.agent]}) and would wait for itself. "
                    "Call another agent."
                )
    if caller.depth >= MOST_DEPTH:
        raise WorkflowError(
            f"run_agents: {caller.path} was called by others {caller.depth} deep, which is the limit. "
            "Do this part yourself."
        )
    return _called(
        state,
        caller,
        [[(call.agent, call.prompt, call.input_files, call.tail) for call in group] for group in groups],
        files,
        limit,
    )


def call_members(state: RunState, step: StepState, parallel: Parallel) -> AgentsCalled:
    """The event with which a parallel step begins."""
    return _called(state, step, [[(agent, "", (), None) for agent in parallel.members]], {}, parallel.max_concurrency)


def _called(
    state: RunState,
    caller: StepState,
    groups: Iterable[Iterable[tuple[str, str, tuple[str, ...], int | None]]],
    files: Mapping[str, str],
    limit: int | None,
) -> AgentsCalled:
    known = {key: deque(members) for key, members in (caller.recall or {}).items()}
    numbers: dict[str, int] = {}

    def path(agent: str, prompt: str, named: tuple[str, ...]) -> str:
        earlier = known.get(_key(agent, prompt, named, files)) if known else None
        if earlier:
            return earlier.popleft().path
        here = f"{caller.path}/{agent}"
        numbers[here] = numbers.get(here, state.named_calls.get(here, 0)) + 1
        return f"{here}#{numbers[here]}"

    made = [
        [
            CalledAgent(agent=agent, path=path(agent, prompt, named), prompt=prompt, files=named, tail=tail)
            for agent, prompt, named, tail in group
        ]
        for group in groups
    ]
    attempt = next_attempt(caller) if isinstance(caller.step, Parallel) else caller.attempt
    return AgentsCalled(
        step=caller.id,
        path=caller.path,
        attempt=attempt,
        call=caller.called + 1,
        groups=made,
        files=dict(files),
        max_concurrency=limit,
    )


def _key(agent: str, prompt: str, named: Iterable[str], files: Mapping[str, str]) -> tuple[str, str]:
    """What tells one call from another."""
    return agent, digest(repr((prompt, [(name, files[name]) for name in named])))


def may_call(state: RunState, step: StepState) -> tuple[str, ...]:
    """Whom the agent at work in `step` may call."""
    if not state.sub_agents or step.depth >= MOST_DEPTH:
        return ()
    above = _above(state, step)
    return tuple(name for name in state.sub_agents if name not in above)


def may_ask(state: RunState, step: StepState) -> bool:
    """Whether the model at work in `step` is told that it can ask a person.

    Not where nobody wants to be asked: in unattended mode, and in a workflow that is locked to run by itself, but for
    the steps that pause there anyway.
    """
    return step.step.interactive is True or (state.mode != "unattended" and state.locked != "always")


def _above(state: RunState, caller: StepState) -> dict[str, str]:
    """The agents that wait for `caller`, and its own: where each is at work."""
    above = {caller.step.agent: caller.path}
    while caller.caller:
        caller = state.find(caller.caller)
        above[caller.step.agent] = caller.path  # of a parallel step, nobody's
    return above


def agents_called(state: RunState, event: AgentsCalled) -> None:
    """A turn, or a parallel step, waits for others from now on."""
    caller = met(state, event.path, event.type)
    parallel = caller.step if isinstance(caller.step, Parallel) else None
    number = next_attempt(caller) if parallel is not None else caller.attempt
    if (parallel is None) != (caller.status == "running"):
        raise TransitionError(f"AgentsCalled is not possible while {caller.path!r} is {caller.status}.")
    if parallel is not None and state.running:
        raise TransitionError(f"{caller.path!r} cannot start: {', '.join(state.running)} is at work.")
    if (event.attempt, event.call) != (number, caller.called + 1):
        raise TransitionError(
            f"AgentsCalled names attempt {event.attempt}, call {event.call} of {caller.path!r}; attempt {number}, call "
            f"{caller.called + 1} is next."
        )
    known = {member.path: member for members in (caller.recall or {}).values() for member in members}
    state.named_calls.update(_check_called(state, caller, event, known))
    before = _rejected_answers(caller)
    if parallel is not None:
        caller.attempts.append(Attempt(state.texts, number, caller.iteration, started_at=event.at))
        state.running[caller.path] = caller
        begun(state, caller)
        doubt_later(state, caller)
        begin_files(state, caller, attempt=True)
    last = caller.attempts[-1]
    caller.status, caller.note, caller.called, last.waits_since = "calling", None, event.call, event.at
    for name, text in event.files.items():
        state.texts[Ref(event.seq, f"file {name}")] = text
    # one for all members of an agent: a step is dear to make
    tasks = {agent: _task(caller.step, agent) for agent in {one.agent for group in event.groups for one in group}}
    mine = {member.path for member in last.members} if known else set[str]()
    groups: list[list[StepState]] = []
    for number, group in enumerate(event.groups, 1):
        groups.append([])
        for one in group:
            member = known.get(one.path)
            if member is None:
                member = _new_member(state, event, one, len(last.members) + 1, caller, tasks[one.agent])
                member.before = before.get(one.agent)
                last.members.append(member)
            else:
                _take_again(caller, member)
                if member.path not in mine:
                    last.members.append(member)
            member.tail, member.index = one.tail, caller.index
            member.group = (event.call, number, len(event.groups))
            groups[-1].append(member)
    caller.team += tuple(member for group in groups for member in group)
    if caller.caller:
        leave_place(state, caller)
    call = state.calls[caller.path] = Call(event.call, groups, event.max_concurrency)
    next_group(state, caller, call)


def _check_called(
    state: RunState, caller: StepState, event: AgentsCalled, known: Mapping[str, StepState]
) -> dict[str, int]:
    """How often each agent has been called then; a ``TransitionError`` says what is wrong."""
    if caller.depth >= MOST_DEPTH:
        raise TransitionError(f"{caller.path!r} is too deep to call others.")
    if not event.groups or not all(event.groups):
        raise TransitionError(f"{caller.path!r} calls nobody.")
    numbers: dict[str, int] = {}
    taken: set[str] = set()
    for one in (one for group in event.groups for one in group):
        if one.path in known and known[one.path].id == one.agent and one.path not in taken:
            taken.add(one.path)
            continue
        here = f"{caller.path}/{one.agent}"
        number = numbers[here] = numbers.get(here, state.named_calls.get(here, 0)) + 1
        if one.path != f"{here}#{number}":
            raise TransitionError(f"{caller.path!r} calls {one.agent!r} as {one.path!r}; {here}#{number} is next.")
        if missing := [name for name in one.files if name not in event.files]:
            raise TransitionError(f"{one.path!r} is given {missing[0]!r}, which was not read.")
    return numbers


def _task(step: Step, agent: str) -> Step:
    """What a member has to do: in a parallel step, that; called by a turn, what it is asked in the call."""
    if isinstance(step, Parallel):
        return step.member(agent)
    own = ("timeout_s", "retries", "idempotent", *GATE_OPTIONS)
    return Step(agent=agent, context="none", **{name: getattr(step, name) for name in own})


def _new_member(
    state: RunState, event: AgentsCalled, one: CalledAgent, number: int, caller: StepState, task: Step
) -> StepState:
    member = StepState(task, one.path, caller.index)
    member.iteration, member.caller, member.depth = caller.iteration, caller.path, caller.depth + 1
    member.asked = _key(one.agent, one.prompt, one.files, event.files)
    if isinstance(caller.step, Parallel):
        member.looped_by = caller.looped_by
        if caller.redo is not None and caller.redo.feedback is not None:
            member.redo = Redo(feedback=caller.redo.feedback, answered=True)
    else:
        here = Ref(event.seq, f"request {number}")
        state.texts[here] = one.prompt
        files = tuple(part for name in one.files for part in (f"## {name}\n\n", Ref(event.seq, f"file {name}"), "\n\n"))
        member.request = (*files, "## What you are asked\n\n", here) if files else (here,)
    state.members[member.path] = member
    return member


def _take_again(caller: StepState, member: StepState) -> None:
    """A member of a turn that did not end is called again: what it has done counts; if it failed, it is tried anew."""
    cast("dict[tuple[str, str], list[StepState]]", caller.recall)[member.asked].remove(member)
    if member.status == "failed":
        member.status, member.note = "ready", None
        member.redo = Redo(feedback=member.redo.feedback if member.redo is not None else None, answered=True)


def _rejected_answers(caller: StepState) -> dict[str, Ref | None]:
    """What each member of a parallel step had answered in the attempt that was rejected."""
    if not isinstance(caller.step, Parallel) or caller.redo is None or caller.redo.feedback is None:
        return {}
    rejected = next((one for one in reversed(caller.attempts) if one.feedback is not None), None)
    return {member.id: member.approved for member in rejected.members} if rejected is not None else {}


def agents_returned(state: RunState, event: AgentsReturned) -> None:
    """Those that were called have ended: the turn goes on, or the parallel step is judged."""
    caller = met(state, event.path, event.type)
    call = state.calls[caller.path]
    if event.call != call.number:
        raise TransitionError(
            f"AgentsReturned names call {event.call} of {caller.path!r}, which waits for {call.number}."
        )
    check_alone(state, caller)
    end_calls(state, caller, event.at)
    if not isinstance(caller.step, Parallel):
        caller.status = "running"
        return
    del state.running[caller.path]
    last = caller.attempts[-1]
    last.ended_at = event.at
    members = call.groups[0]
    wrong = [f"{member.id} failed: {member.note}" for member in members if member.status == "failed"]
    if wrong:
        keep_team(caller)
        error = ErrorInfo(kind="MemberFailed", message=" ".join(wrong))
        last.errors += (error,)
        owe(caller, Due("failed", {"error": error.message}, (error.message,)))
        return
    caller.team, caller.recall = (), None
    last.answer = Ref(event.seq)
    parts: tuple[Part, ...] = ()
    for member in members:
        said = member.approved if member.approved is not None else f"No output: {member.note}."
        parts += ("\n\n" if parts else "", f"## {member.id}\n\n", said)
    state.texts[last.answer] = parts
    judge(state, caller, last)


def step_failed(state: RunState, event: StepFailed) -> None:
    """A member is given up; its caller is told."""
    member = met(state, event.path, event.type)
    if not member.caller:
        raise TransitionError(f"{member.id!r} was called by nobody, so nobody can be told that it failed.")
    close(state, member)
    member.status, member.due, member.note = "failed", None, event.reason
    member_ended(state, member)


def check_alone(state: RunState, caller: StepState) -> None:
    """Refuse to end a turn while one that it has called is under way: that is cut short first."""
    call = state.calls[caller.path]
    for member in call.groups[call.group]:
        if member.path in state.running or member.path in state.backing_off:
            raise TransitionError(f"{member.path} is running; it is cut short first.")


def end_calls(state: RunState, caller: StepState, at: float) -> None:
    """The turn waits for nobody any more; it works on or ends, so it has a place."""
    call = state.calls.pop(caller.path, None)
    if call is None:
        return
    waited(caller.attempts[-1], at)
    for member in call.groups[call.group]:
        leave_place(state, member)
        state.owed.pop(member.path, None)
        close(state, member, reopen=True)
    if caller.caller:
        take_place(state, caller)
    else:
        state.lines[0].pop(caller.path, None)


def waited(attempt: Attempt, at: float) -> None:
    """Until now the attempt waited for others: that time is not its own."""
    if attempt.waits_since is not None:
        attempt.asked_s += max(0.0, at - attempt.waits_since)
        attempt.waits_since = None


def keep_team(step: StepState) -> None:
    """The turn did not end: whom it has called can be called again without beginning anew."""
    if step.team:
        step.recall = step.recall or {}
        for member in step.team:
            step.recall.setdefault(member.asked, []).append(member)
        step.team = ()


def results(state: RunState, called: AgentsCalled) -> list[AgentResult]:
    """What came of a call, in its order, for its caller."""
    found = []
    for one in (one for group in called.groups for one in group):
        member = state.members[one.path]
        text = last_lines(state.text(member.approved), one.tail)
        status, error = member.status, None
        if status == "failed":
            error = member.note or "it failed"
        elif status not in ENDED:
            status, error = "pending", "it was not begun, because one before it failed"
        found.append(AgentResult(member.id, member.path, text, error, STATUS_WORDS[status]))
    return found
