"""Changing a workflow whose run lives: which events lead from the steps as they are to those that are wanted.

Strategy: pure, like ``state.py``. A change is first tried on the workflow as a whole, with the checks that a new
workflow has to pass, so what cannot run is refused by name before anything happens. Then it is said in events.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from .errors import WorkflowError, typed
from .events import AnyEvent, StepAdded, StepChanged, StepRemoved, WorkflowChanged
from .prompts import agent_facts, check_templates, fingerprint
from .runstate import RunState
from .state import cut_all
from .team import CAP
from .workflow import Agent, Separator, Step, Workflow, check_inputs, limits_of, sound, step_data

_MISSING = object()


def checked_inputs(inputs: Any) -> dict[str, Any]:
    """The inputs as plain JSON data.

    Raises
    ------
    WorkflowError    One cannot be kept in a journal; the message names it.
    """
    check_inputs(inputs)
    return {name: sound(value) for name, value in inputs.items()}


def inputs_of(state: RunState, workflow: Workflow | None, given: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The inputs of a run that goes on by `workflow`: its own, what is new in the definition, and what is `given` now.

    A default that stands in the definition as it did leaves the value that the run was started with.
    """
    defaults = workflow.inputs if workflow is not None else {}
    new = {name: value for name, value in defaults.items() if state.defaults.get(name, _MISSING) != value}
    return checked_inputs({**state.inputs, **new, **checked_inputs(given or {})})


def by_id(agents: Any) -> dict[str, Agent]:
    """The agents by their ids.

    Raises
    ------
    WorkflowError    They are none.
    """
    found = [*agents] if isinstance(agents, Iterable) else [agents]
    for agent in found:
        if not isinstance(agent, Agent):
            raise WorkflowError(f"agents: {agent!r} is no agent. Give a list of them: agents=[planner, reviewer].")
    return {agent.id: agent for agent in found}


def fingerprints(workflow: Workflow, inputs: Mapping[str, Any]) -> dict[str, str]:
    """What decides about each step, as a digest, by step."""
    agents = {agent.id: (agent, agent_facts(agent)) for agent in workflow.agents}
    return {
        item.id: fingerprint(
            item, [agents[name][0] for name in item.agents], inputs, [agents[name][1] for name in item.agents]
        )
        for item in workflow.executable
    }


def changed(
    state: RunState,
    items: Iterable[Step | Separator],
    agents: Mapping[str, Agent],
    inputs: Mapping[str, Any],
) -> Workflow:
    """The workflow of `state` with these steps instead, and with these agents and inputs over its own.

    Raises
    ------
    WorkflowError    It cannot run.
    """
    known = {**state.agents, **agents}
    values = {**state.inputs, **inputs}
    made = Workflow(
        state.name,
        steps=list(items),
        agents=list(known.values()),
        sub_agents=state.sub_agents,
        max_concurrency=state.default_places if state.default_places != CAP else None,
        autonomous_mode=state.autonomous_mode,
        inputs=values,
        engine=state.engine,
        **state.default_limits,
    )
    check_templates(made, values)
    return made


def addition(
    state: RunState,
    item: Step | Separator,
    after: str | None,
    made: Workflow,
    inputs: dict[str, Any],
    *,
    first: bool = False,
) -> StepAdded:
    """The event that adds `item` after the step `after`, first, or last."""
    return StepAdded(step=step_data(item), after=after, first=first, **_definition(state, item, made, inputs))


def replacement(state: RunState, item: Step, made: Workflow, inputs: dict[str, Any]) -> list[AnyEvent]:
    """The events that put `item` in the place of the step of its name; none when nothing is different."""
    old = state.step(item.id)
    definition = _definition(state, item, made, inputs)
    if definition["fingerprint"] == old.fingerprint:
        return []
    return [*cut_all(state, "defined anew", old), StepChanged(step=step_data(item), **definition)]


def removal(state: RunState, step: str) -> list[AnyEvent]:
    """The events that take a step out."""
    gone = state.step(step)
    return [*cut_all(state, "removed", gone), StepRemoved(step=gone.id)]


def check_order(state: RunState, workflow: object) -> None:
    """Refuse an edited definition in which a step that has run is not found again; said before all else of it.

    A step that has not run may be renamed or deleted: it has nothing to lose. The steps that stay keep their order.

    Raises
    ------
    WorkflowError    A step that has run is renamed or deleted, or a step stands elsewhere; or it is no workflow.
    """
    if not isinstance(workflow, Workflow):
        raise WorkflowError(f"workflow={workflow!r} is no workflow. Make one: cm.Workflow('my-workflow', steps=…).")
    old, new = [step.id for step in state.order], [item.id for item in workflow.executable]
    new_run = typed(f"`%cm workflow {state.name} --new`, or workflow.start()", "`cm-notebook run FILE`")
    hint = f"Start a new run for the new workflow: {new_run}."
    for place, id in enumerate(old):
        if id not in new and state.steps[id].attempts:
            other = new[place] if place < len(new) and new[place] not in old else None
            now = f"is renamed to {other!r}" if other is not None else "is no longer in the workflow"
            raise WorkflowError(f"step {id!r} has run and {now}. {hint}")
    kept, wanted = [id for id in old if id in new], [id for id in new if id in old]
    for here, there in zip(kept, wanted, strict=True):
        if here != there:
            raise WorkflowError(f"step {here!r} stands elsewhere now. {hint}")


def revision(state: RunState, workflow: Workflow, inputs: dict[str, Any]) -> list[AnyEvent]:
    """The events that lead to `workflow`, an edited definition of the same one.

    Raises
    ------
    WorkflowError    As for :func:`check_order`.
    """
    check_order(state, workflow)
    kept = {item.id for item in workflow.executable}
    gone = [step.id for step in state.order if step.id not in kept]
    events = [*_redefinition(state, workflow, inputs), *(event for id in gone for event in removal(state, id))]
    made = workflow.model_copy(update={"inputs": inputs})  # which are known by then
    before: str | None = None
    for item in workflow.executable:
        if item.id in state.steps:
            events += replacement(state, item, made, {})
        else:
            events.append(addition(state, item, before, made, {}, first=before is None))
        before = item.id
    return events


def _redefinition(state: RunState, workflow: Workflow, inputs: Mapping[str, Any]) -> list[AnyEvent]:
    """The event that says what is different in `workflow` beyond its steps; none when nothing is."""
    new = {name: value for name, value in inputs.items() if state.inputs.get(name, _MISSING) != value}
    defaults = {name: value for name, value in new.items() if sound(workflow.inputs.get(name, _MISSING)) == value}
    mode = workflow.autonomous_mode if workflow.autonomous_mode != state.autonomous_mode else None
    engine = (workflow.engine or "") if workflow.engine != state.engine else None
    team = workflow.sub_agents if workflow.sub_agents != state.sub_agents else None
    agents = _others(state, (workflow.agent(name) for name in workflow.sub_agents))
    have, want = state.default_limits, limits_of(workflow)
    limits = {name: want.get(name) for name in {**have, **want} if have.get(name) != want.get(name)}
    cap = workflow.max_concurrency or CAP
    places = cap if cap != state.default_places else None
    if not new and not agents and not limits and (mode, engine, team, places) == (None,) * 4:
        return []
    given = {name: value for name, value in new.items() if name not in defaults}
    return [
        WorkflowChanged(
            inputs=given,
            defaults=defaults,
            autonomous_mode=mode,
            engine=engine,
            sub_agents=team,
            agents=agents,
            max_concurrency=places,
            default_limits=limits or None,
        )
    ]


def _others(state: RunState, agents: Iterable[Agent]) -> list[dict[str, Any]]:
    """Those of `agents` that the run does not know as they are now, as data."""
    return [
        agent.model_dump(mode="json", exclude_defaults=True)
        for agent in agents
        if (known := state.agents.get(agent.id)) is None or agent_facts(known) != agent_facts(agent)
    ]


def _definition(state: RunState, item: Step | Separator, made: Workflow, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What comes with a step that is added or changed: its agents that are new, its inputs, its fingerprint."""
    if isinstance(item, Separator):
        return {"fingerprint": ""}
    agents = [made.agent(name) for name in item.agents]
    return {
        "agents": _others(state, agents),
        "inputs": {name: value for name, value in inputs.items() if state.inputs.get(name, _MISSING) != value},
        "fingerprint": fingerprint(item, agents, {**made.inputs, **inputs}),
    }
