"""The workflow changes while it runs: steps added, changed and removed, agents and inputs defined anew.

Strategy: a change makes stale what was built on the old definition and nothing else. What only waits is made again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ..errors import TransitionError
from ..events import StepAdded, StepChanged, StepRemoved, WorkflowChanged
from ..runstate import RunState, StepState
from ..workflow import Agent, AutonomousMode, Parallel, Separator, Step, as_step
from .budgets import own_budget
from .files import take_back
from .moves import advance, begin_again, close
from .texts import take_inputs


def workflow_changed(state: RunState, event: WorkflowChanged) -> None:
    """Agents, inputs, limits, the engine or the mode are defined anew."""
    if event.autonomous_mode is not None:
        take_autonomy(state, event.autonomous_mode)
    if event.engine is not None:
        state.engine = event.engine or None
    if event.sub_agents is not None:
        state.sub_agents = event.sub_agents
    if event.max_concurrency is not None:
        state.max_concurrency = state.default_places = event.max_concurrency
    if event.limits or event.default_limits:
        for name, most in (event.default_limits or {}).items():
            if most is None:
                state.default_limits.pop(name, None)
                state.budget.lift(name)
            else:
                state.default_limits[name] = most
                state.budget.permit({name: most})
        state.budget.permit(event.limits or {})
        if state.held is not None:
            close(state, state.held[0])  # its limit is another one now; if that is reached too, it asks again
    _take_agents(state, event.agents)
    state.defaults = {**state.defaults, **event.defaults}
    take_inputs(state, event.seq, {**event.defaults, **event.inputs})


def take_autonomy(state: RunState, given: AutonomousMode) -> None:
    """The mode that the definition asks for; ``True`` asks for any but ``step-by-step``."""
    state.autonomous_mode = given
    state.locked = given if isinstance(given, str) else None
    if given in ("never", False):
        state.mode = "step-by-step"
    elif given == "always" or state.mode == "step-by-step":
        state.mode = "gates"


def step_added(state: RunState, event: StepAdded) -> None:
    """A step or a separator is put in; it is the next one if the run was past its place."""
    item = as_step(len(state.order) + 1, event.step)
    if not isinstance(item, Separator) and item.id in state.steps:
        raise TransitionError(f"there is a step {item.id!r} already.")
    place = 0 if event.first else len(state.items)
    if event.after is not None:
        before = state.step(event.after).step
        place = next(number for number, other in enumerate(state.items) if other is before) + 1
    _take_agents(state, event.agents)
    take_inputs(state, event.seq, event.inputs)
    if place == len(state.items):
        append_item(state, item)
    else:
        state.items.insert(place, item)
        _reindex(state)
    if not isinstance(item, Separator):
        added = state.steps[item.id]
        added.fingerprint, added.added = event.fingerprint, event.seq
        added.gates = state.removed.pop(item.id, 0)
        state.cursor = min(state.cursor, added.index)


def step_changed(state: RunState, event: StepChanged) -> None:
    """A step has another definition: one that is done is stale, one that waits is made again."""
    item = as_step(0, event.step)
    if isinstance(item, Separator):
        raise TransitionError("a separator cannot be changed.")
    step = state.step(item.id)
    if step.path in state.running:
        raise TransitionError(f"step {step.id!r} is running; it is cut short before it is changed.")
    _take_agents(state, event.agents)
    take_inputs(state, event.seq, event.inputs)
    place = next(number for number, other in enumerate(state.items) if other is step.step)
    agents = _agents_of(state, item)
    what = _what_changed(step.step, step.agents, item, agents)
    state.items[place] = item
    _hear(state, step.step, item)
    step.step, step.fingerprint, step.agents = item, event.fingerprint, agents
    step.budget = own_budget(item, step)
    close(state, step, reopen=True)
    if step.status in ("finished", "skipped"):
        step.stale = True
        step.changed = (*step.changed, *(part for part in what if part not in step.changed))
        state.cursor = min(state.cursor, step.index)
    elif step.status != "pending":
        # what waits for a decision was made by the old definition: it is made again
        before = step.files_before
        begin_again(step, "pending")
        take_back(state, step, before)


def _what_changed(old: Step, were: tuple[Agent, ...], new: Step, agents: tuple[Agent, ...]) -> tuple[str, ...]:
    """Which parts of a step's definition are others now; with none of them, it is an input that its prompt names."""

    def parts(step: Step, agents: tuple[Agent, ...]) -> dict[str, Any]:
        named = agents or tuple(Agent(name) for name in step.agents)
        own = {"prompt", "engine", "model", "reasoning_effort"}
        return {
            "prompt": [step.prompts(agent) for agent in agents or (None,)],
            "agent": [agent.model_dump(exclude=own) for agent in named],
            "engine": [step.engine or agent.engine for agent in named],
            "model": [(step.model or agent.model, step.reasoning_effort or agent.reasoning_effort) for agent in named],
            "options": step.model_dump(exclude={"agent", "members", *own}),
        }

    before, after = parts(old, were), parts(new, agents)
    return tuple(part for part in after if before[part] != after[part]) or ("inputs",)


def step_removed(state: RunState, event: StepRemoved) -> None:
    """A step is not part of the run any more; what it did stays in the journal."""
    step = state.step(event.step)
    if step.path in state.running:
        raise TransitionError(f"step {step.id!r} is running; it is cut short before it is removed.")
    close(state, step)
    state.items = [item for item in state.items if item is not step.step]
    del state.steps[step.id]
    state.loops.pop(step.id, None)
    _hear(state, step.step, None)
    state.removed[step.id] = step.gates
    state.until_reached = state.until_reached or state.until == step.id
    if step.index < state.cursor:
        state.cursor -= 1
    _reindex(state)
    state.epoch += 1
    advance(state)


def append_item(state: RunState, item: Step | Separator) -> None:
    """A step or a separator comes last."""
    state.items.append(item)
    if not isinstance(item, Separator):
        if isinstance(item, Parallel):
            _hear(state, None, item)
        id, agents, budget = item.id, _agents_of(state, item), own_budget(item)
        made = state.steps[id] = StepState(item, id, len(state.order), agents=agents, budget=budget)
        state.order.append(made)
        if "-" in id:
            state.names.setdefault(id.replace("-", "_"), id)


def _reindex(state: RunState) -> None:
    """After an insertion or a removal: the steps in order, each knowing its place."""
    known = {id(step.step): step for step in state.order}
    cursor = state.current
    state.order, state.names = [], {}
    for item in state.items:
        if not isinstance(item, Separator):
            step = known.get(id(item)) or StepState(
                item, item.id, 0, agents=_agents_of(state, item), budget=own_budget(item)
            )
            step.index = len(state.order)
            state.order.append(step)
            state.steps[item.id] = step
            state.names.setdefault(item.id.replace("-", "_"), item.id)
            _hear(state, None, item)
    for path, call in state.calls.items():
        for group in call.groups:
            for member in group:
                member.index = state.steps[path.split("/")[0]].index
    state.frontier = max((step.index for step in state.order if step.status != "pending"), default=-1) + 1
    if cursor is not None and cursor.id in state.steps:
        state.cursor = cursor.index


def _agents_of(state: RunState, item: Step) -> tuple[Agent, ...]:
    return tuple([state.agents[name] for name in item.agents if name in state.agents])


def _take_agents(state: RunState, agents: Iterable[Mapping[str, Any]]) -> None:
    for data in agents:
        made = Agent(**data)
        state.agents[made.id] = made


def _hear(state: RunState, old: Step | None, new: Step | None) -> None:
    """Who works in a parallel step has a name of its own in prompts."""
    if isinstance(old, Parallel):
        for name in old.members:
            state.voices.pop(name, None)
    if isinstance(new, Parallel):
        for name in new.members:
            state.voices.setdefault(name, None)
            state.names.setdefault(name.replace("-", "_"), name)
