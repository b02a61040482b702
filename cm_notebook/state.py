"""What the events mean, and what to do next. No I/O, no clock, no randomness: the same events give the same run.

Rule 1: everything that decides about a run stands here and in ``rules/``, about the data of ``runstate.py``. Whoever
        shows, stores or executes only asks; ``__all__`` below is what can be asked.
Rule 2: ``apply(state, event)`` checks first and changes after. An illegal event raises ``TransitionError`` and nothing
        has happened. Whether an event may come at all, and what it may make of its step, stands in ``TRANSITIONS``;
        what it may make of other steps stands in ``SWEPT`` (both in ``rules/transitions.py``).
Rule 3: ``next_actions(state)`` only looks: at the step under the cursor, whose status says what it needs.

``_HANDLERS`` says which function has the meaning of an event. What is about the run as a whole stands here, the rest
in ``rules/``, by theme, each importing only those before it:

    transitions  which events a step may meet in each status: the picture of a step's life
    texts        inputs and outputs as texts that prompts can name
    places       members in line for a place to work at
    budgets      what may be used and has been used
    files        snapshots of the workspace, and what is taken back
    moves        past a settled step, back in a loop, back to an earlier step, stale ones
    verdicts     what the end of a turn leads to
    members      agents that were called, and parallel steps
    gates        opening them, finding them
    deciding     what each decision does
    turning      turns started, finished, failed, cut short
    building     the workflow changes while it runs

Nothing here scans or copies what grows with the run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from .errors import TransitionError, typed
from .events import (
    NO_FILES,
    AgentsReturned,
    AnyEvent,
    GateDecided,
    LoopedBack,
    ModeChanged,
    Part,
    RunEnd,
    RunFinished,
    RunForked,
    RunPaused,
    RunResumed,
    RunStarted,
    RunUnpaused,
    StepSkipped,
    TurnCutShort,
    TurnWentOn,
    place,
)
from .prompts import compose, missing_field, text_of
from .rules import building, deciding, files, gates, members, moves, turning
from .rules.budgets import used_up
from .rules.building import append_item, take_autonomy
from .rules.deciding import check_decision
from .rules.files import files_before
from .rules.gates import (
    already,
    ask,
    ask_for_more,
    ask_permission,
    by_default,
    closed,
    gate_of,
    opening,
    tool_of,
    waits_for,
)
from .rules.members import call_agents, call_members, may_ask, may_call, results
from .rules.moves import check_rewind, close, next_attempt, outdated
from .rules.texts import take_inputs
from .rules.verdicts import note_beside
from .runstate import Due, Loop, Origin, Record, RunState, StartTurn, StepState, standing, why_stale
from .team import CAP
from .workflow import Module, Parallel, Step, Workflow, limits_of

__all__ = [
    "already",
    "apply",
    "ask",
    "ask_for_more",
    "ask_permission",
    "call_agents",
    "check_decision",
    "check_rewind",
    "check_switch",
    "closed",
    "cut_all",
    "cut_short",
    "feedback_on",
    "files_before",
    "gate_of",
    "may_ask",
    "may_call",
    "next_actions",
    "prompt_of",
    "results",
    "standing",
    "state_of",
    "tool_of",
    "used_up",
    "waits_for",
]

# -- apply ------------------------------------------------------------------------------------------------------------


def apply(state: RunState, event: AnyEvent) -> None:
    """Change `state` by what `event` means.

    Raises
    ------
    TransitionError    The event is not legal now (``AlreadyDecided``: its gate has its answer); nothing was changed.
    """
    kind = event.type
    begun = state.run_id or state.seq
    if kind == "RunStarted":
        if begun:
            raise TransitionError(f"run {state.run_id!r} has started already.")
    elif not begun:
        raise TransitionError(f"{kind} comes before RunStarted.")
    elif state.ended is not None and kind not in ("RunResumed", "RunForked", "GateDecided"):
        if state.ended == "completed":
            raise TransitionError(f"run {state.run_id!r} is completed: there is nothing left to go on with in it.")
        raise TransitionError(f"run {state.run_id!r} is {state.ended}; resume it first.")
    _HANDLERS[kind](state, event)
    state.at, state.seq = event.at, event.seq


def state_of(workflow: Workflow) -> RunState:
    """The state of `workflow` before anything ran, for drawing it."""
    state = RunState()
    started = RunStarted(run_id="", workflow=workflow.kept())
    place(started, 1, 0.0)
    apply(state, started)
    return state


# -- the run as a whole -----------------------------------------------------------------------------------------------


def _run_started(state: RunState, event: RunStarted) -> None:
    workflow = event.workflow
    state.run_id, state.name, state.engine = event.run_id, workflow.name, workflow.engine
    state.agents = {agent.id: agent for agent in workflow.agents}
    take_autonomy(state, workflow.autonomous_mode)
    state.sub_agents = workflow.sub_agents
    state.default_places = workflow.max_concurrency or CAP
    state.max_concurrency = event.max_concurrency or state.default_places
    state.workspace, state.recorded, state.started_at = event.workspace, event.recorded, event.at
    state.defaults = workflow.inputs
    state.default_limits = limits_of(workflow)
    state.budget.permit({**state.default_limits, **(event.limits or {})})
    take_inputs(state, event.seq, {**workflow.inputs, **event.inputs})
    for item in workflow.steps:
        append_item(state, item)
    for id, known in event.fingerprints.items():
        if id in state.steps:
            state.steps[id].fingerprint = known
    _go_until(state, event.until)


def _run_resumed(state: RunState, event: RunResumed) -> None:
    state.broke_off_at = state.at
    state.ended, state.ended_at, state.reason = None, None, ""  # an end decided on before a crash still comes
    state.paused, state.pause_reason, state.back_at = False, "", None
    state.resumed.append(event)
    _go_until(state, event.until)


def _run_forked(state: RunState, event: RunForked) -> None:
    """The same history, and another run from now on: what was open there is not open here, and nothing is used yet."""
    _close_gates(state)
    state.origin = Origin(event.of, event.step, event.seq - 1, state.usage, state.cost_usd)
    state.run_id, state.workspace, state.recorded = event.run_id, event.workspace, event.recorded
    state.tree, state.loose, state.unkept = NO_FILES, False, None  # its folder is another one
    state.started_at, state.resumed = event.at, []
    state.ended, state.ended_at, state.reason, state.ending = None, None, "", None
    state.allowed = {tool: one for tool, one in state.allowed.items() if one.scope == "always"}
    for budget in (state.budget, *(step.budget for step in state.order)):
        if budget is not None:
            budget.begin_anew()


def _run_paused(state: RunState, event: RunPaused) -> None:
    if state.paused:
        raise TransitionError("the run is paused already.")
    state.paused, state.pause_reason = True, event.reason
    state.until, state.until_once, state.until_reached = None, False, False


def _run_unpaused(state: RunState, event: RunUnpaused) -> None:
    state.paused, state.pause_reason, state.back_at = False, "", None
    _go_until(state, event.until, once=event.once)


def _go_until(state: RunState, until: str | None, *, once: bool = False) -> None:
    state.until, state.until_once = until, once
    state.until_reached = until is not None and until in state.steps and state.steps[until].index < state.cursor


def check_switch(state: RunState) -> None:
    """Refuse to switch the mode of a locked workflow."""
    if state.locked is not None:
        raise TransitionError(
            f"workflow {state.name!r} is locked to {_autonomy(state.locked)}; its mode cannot be switched. "
            f"Define it with {_autonomy(True)} to switch while it runs."
        )


def _autonomy(value: str | bool) -> str:
    in_code = f"autonomous_mode={value!r}"
    return typed(f"--autonomous {value}".lower(), in_code, in_code)


def _mode_changed(state: RunState, event: ModeChanged) -> None:
    check_switch(state)
    state.mode = event.mode


def _run_finished(state: RunState, event: RunFinished) -> None:
    if state.running:
        raise TransitionError(f"RunFinished while {', '.join(state.running)} is running.")
    if event.status == "completed" and state.cursor < len(state.order):
        raise TransitionError(f"RunFinished(completed) while step {state.order[state.cursor].id!r} is not done.")
    _close_gates(state)
    state.ended, state.reason, state.ended_at = event.status, event.reason, event.at
    state.ending = None


def _close_gates(state: RunState) -> None:
    """No gate is open any more; each opens anew when the run goes on."""
    for gate in list(state.gates.values()):
        close(state, state.find(gate.path), reopen=True)


# -- what each event means ---------------------------------------------------------------------------------------------

_HANDLERS: dict[str, Callable[[RunState, Any], None]] = {
    "RunStarted": _run_started,
    "RunResumed": _run_resumed,
    "RunPaused": _run_paused,
    "RunUnpaused": _run_unpaused,
    "ModeChanged": _mode_changed,
    "RunFinished": _run_finished,
    "RunForked": _run_forked,
    "WorkflowChanged": building.workflow_changed,
    "StepAdded": building.step_added,
    "StepChanged": building.step_changed,
    "StepRemoved": building.step_removed,
    "StepSkipped": moves.step_skipped,
    "StepOutdated": moves.step_outdated,
    "LoopedBack": moves.looped_back,
    "Rewound": moves.rewound,
    "TurnStarted": turning.turn_started,
    "SessionOpened": turning.session_opened,
    "ToolCalled": turning.tool_called,
    "ToolReturned": turning.tool_returned,
    "UsageReported": turning.usage_reported,
    "TurnFinished": turning.turn_finished,
    "TurnFailed": turning.turn_failed,
    "TurnCutShort": turning.turn_cut_short,
    "TurnWentOn": turning.turn_went_on,
    "GateOpened": gates.gate_opened,
    "GateDecided": deciding.gate_decided,
    "TellingFailed": gates.telling_failed,
    "AgentsCalled": members.agents_called,
    "AgentsReturned": members.agents_returned,
    "StepFailed": members.step_failed,
    "SnapshotTaken": files.snapshot_taken,
    "SnapshotFailed": files.snapshot_failed,
    "WorkspaceRestored": files.workspace_restored,
}
"""The one place where an event finds its function."""

# -- next_actions -----------------------------------------------------------------------------------------------------


def next_actions(state: RunState, engine_of: Callable[[Step], str] | None = None) -> list[StartTurn | Record]:
    """What to do now, or at its time, in this order. Nothing for now: wait for a turn to end or a person to decide.

    After one that had to wait for its time, ask again: what comes behind it need not be right any more.

    Parameters
    ----------
    engine_of
        The name of the engine that will do a step; a session of another one is not continued. ``None``: the same ones.
    """
    if state.ended is not None:
        return []
    if state.ending is not None:
        return _end(state)
    if state.outdated and (again := outdated(state)):
        return [Record(event) for event in again]
    course = _next_in_course(state, engine_of)
    return [*_deadlines(state), *course] if state.gates else course


def _end(state: RunState) -> list[StartTurn | Record]:
    status, reason = cast("tuple[RunEnd, str]", state.ending)
    return [
        *(Record(event) for event in cut_all(state, "the run ended")),
        Record(RunFinished(status=status, reason=reason)),
    ]


def _deadlines(state: RunState) -> list[StartTurn | Record]:
    """What is decided at the open gates if nobody does, and when."""
    return [
        Record(GateDecided(gate_id=gate.id, decision=by_default(gate)), not_before=gate.deadline)
        for gate in state.gates.values()
        if gate.deadline is not None
    ]


def _next_in_course(state: RunState, engine_of: Callable[[Step], str] | None) -> list[StartTurn | Record]:
    if state.calls:
        return _members_next(state, engine_of)
    step = state.current
    if step is None:
        return [Record(RunFinished(status="completed"))]
    status = step.status
    if status == "due":
        return [Record(opening(state, step, cast("Due", step.due)))]
    if status == "looping":
        return [Record(_loop_back(state, step))]
    if status == "waiting" or state.running or state.paused or state.held is not None:
        return []
    if state.until_reached:
        return [Record(RunPaused(reason=f"as far as {state.until}"))]
    if step.stale:
        reason = f"{step.id}: {why_stale(state, step)}."
        due = Due("stale", {"reason": reason}, (step.approved,) if step.approved is not None else (reason,))
        return [Record(opening(state, step, due))]
    if status == "pending" and (rule := _skip_reason(state, step)):
        return [Record(StepSkipped(step=step.id, path=step.path, reason=rule))]
    return [_start(state, step, engine_of)]


def _members_next(state: RunState, engine_of: Callable[[Step], str] | None) -> list[StartTurn | Record]:
    """What to do while a turn waits for others."""
    actions: list[StartTurn | Record] = [
        Record(opening(state, member, cast("Due", member.due))) for member in state.owed.values()
    ]
    if not state.paused and state.held is None:
        for member in state.backing_off.values():
            actions.append(_start(state, member, engine_of))
            if isinstance(actions[-1], Record):
                return actions
    free, ahead = state.max_concurrency - state.busy, 0
    for line in reversed(state.lines):
        for step in line.values():
            if step.caller and free <= 0:
                return actions
            if step.status == "calling":
                call = state.calls[step.path]
                actions.append(Record(AgentsReturned(step=step.id, path=step.path, call=call.number)))
            elif step.status == "asking":
                actions.append(Record(TurnWentOn(step=step.id, path=step.path, gate_id=cast("str", step.answered))))
            elif state.paused or state.held is not None:
                break  # who was at work stands before those that begin
            else:
                actions.append(_start(state, step, engine_of, ahead))
                ahead += step.status != "retrying"
                if isinstance(actions[-1], Record):  # its budget is used up: nobody else begins
                    return actions
            free -= 1
    return actions


def _skip_reason(state: RunState, step: StepState) -> str | None:
    if step.step.execute_once and step.approved is not None:
        return "runs once; its output is kept"
    for module_id, loop in state.loops.items():
        if loop.active and module_id in state.steps:
            module = cast("Module", state.steps[module_id].step)
            if step.id in module.loop_skip:
                return f"left out while {module_id} goes back"
    return None


def _loop_back(state: RunState, step: StepState) -> LoopedBack:
    module = cast("Module", step.step)
    target = state.order[max(0, step.index - module.loop_steps)]
    loop = state.loops.setdefault(step.id, Loop())
    return LoopedBack(module=step.id, to=target.id, iteration=loop.count + 2, reason=loop.reason)


def _start(
    state: RunState, step: StepState, engine_of: Callable[[Step], str] | None, ahead: int = 0
) -> StartTurn | Record:
    """Begin `step`, or ask first; `ahead`: so many others begin before it."""
    if (over := used_up(state, step, ahead)) is not None:
        return Record(opening(state, step, over))
    if isinstance(step.step, Parallel):
        return Record(call_members(state, step, step.step))
    prompt, context, session = _next_prompt(state, step, engine_of)
    if _asks_first(state, step) and missing_field(state, step) is None:  # else it fails as a turn
        return Record(
            opening(state, step, Due("start", note_beside(state, step), prompt + (context or ())), prompt, context)
        )
    return StartTurn(
        step=step,
        attempt=next_attempt(step),
        turn=step.turn,
        prompt=prompt,
        context=context,
        session_id=session,
        not_before=step.retry_at,
    )


def _next_prompt(
    state: RunState, step: StepState, engine_of: Callable[[Step], str] | None
) -> tuple[tuple[Part, ...], tuple[Part, ...] | None, str | None]:
    """What would be sent to `step` now, and into which session."""
    session = step.session
    if session is not None and engine_of is not None and engine_of(step.step) != step.session_engine:
        session = None  # another engine would not know it
    return *compose(state, step, continues=session is not None), session


def prompt_of(state: RunState, step: StepState, engine_of: Callable[[Step], str] | None = None) -> str:
    """The prompt of `step`: what would be sent now, where its turn is the next; else what was sent last.

    Of one that the run has not come to yet, its templates as they stand.
    """
    if isinstance(step.step, Parallel):
        return ""
    if step.gate is not None and step.gate.kind == "start" and step.redo is not None:
        return state.text(step.redo.prompt)
    if step.status in ("pending", "ready") and (step is state.current or step.caller):
        prompt, context, _session = _next_prompt(state, step, engine_of)
        return text_of(prompt + (context or ()), state.texts)
    if step.last is not None:
        return step.last.prompt
    return "\n\n".join(step.step.prompts(state.agents.get(step.step.agent)))


def _asks_first(state: RunState, step: StepState) -> bool:
    """Whether the next prompt of `step` is put to a person; of chained prompts each in a manual run, else the first."""
    if step.step.gate == "after" or not state.pauses(step.step):
        return False
    if step.turn > 1:
        return step.status == "ready" and step.redo is None and state.mode == "step-by-step"
    return step.status == "pending" and (step.redo is None or not step.redo.answered)


def feedback_on(state: RunState, step: StepState) -> str:
    """Why the turn of `step` runs again: the words of who rejected it, else of the module that sent the run back."""
    if step.redo is not None and step.redo.feedback is not None:
        return state.text(step.redo.feedback)
    loop = state.loops.get(step.looped_by) if step.looped_by is not None else None
    if loop is None:
        return ""
    return loop.reason if isinstance(loop.reason, str) else state.text(loop.reason)


def cut_short(step: StepState, reason: str) -> TurnCutShort:
    """The event that says that the turn of `step` did not end."""
    return TurnCutShort(step=step.id, path=step.path, attempt=step.attempt, turn=step.turn, reason=reason)


def cut_all(state: RunState, reason: str, of: StepState | None = None) -> list[TurnCutShort]:
    """The events that say that nothing went to its end that is under way: of that step and its members, or at all."""
    return [
        cut_short(step, reason)
        for step in state.under_way
        if of is None or step is of or step.path.startswith(f"{of.path}/")
    ]
