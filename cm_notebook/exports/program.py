"""A workflow as a Python program that makes the same workflow again.

Strategy: what is written is what a person would write: only the options that say something, the steps as an arrow line
where that says all, and no agent that a step makes by itself. What was left out is checked to come back.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from ..errors import WorkflowError
from ..workflow import Agent, AnyStep, Module, Parallel, Separator, Workflow, complete_agents, parse_steps, step_data
from .definitions import AGENT_OPTIONS, Definitions
from .literals import Call, Code, write


def program(workflow: Workflow, about: str, end: str = "", imports: Iterable[str] = ()) -> tuple[str, list[str], str]:
    """The workflow as Python source.

    Parameters
    ----------
    about
        Text of its docstring, after the workflow's name.
    end
        What stands below the workflow; ``{wf}`` is the workflow's name there.
    imports
        What that needs.

    Returns
    -------
    source, missing, name
        The file's text; in words, what it names and does not define; the name of the workflow in it.

    Raises
    ------
    WorkflowError    A part of it is Python whose source cannot be got.
    """
    agents = _agents(workflow)
    made = Definitions(agents)
    made.imports |= dict.fromkeys(imports)
    names = {id(agent): made.function_agent(agent) for agent in agents if agent.implementation is not None}
    written = []
    for agent in agents:
        if id(agent) in names:
            continue
        options = {name: value for name in AGENT_OPTIONS if (value := getattr(agent, name)) is not None}
        said = [agent.id, agent.prompt] if agent.prompt else [agent.id]
        call = Call(f"{made.ours}.Agent", said, options | made.parts(agent))
        names[id(agent)] = name = made.free_name(agent.id, agent)
        written.append(f"{name} = {write(call, 0, len(name) + 3)}\n")
    name = made.free_name("wf")
    options = _options(workflow, [names[id(agent)] for agent in agents], made.ours)
    call = Call(f"{made.ours}.Workflow", [workflow.name], options)
    head = f'"""{_docstring(f"{workflow.name}: {about}")}"""\n'
    if made.missing:
        head += "\n# Not in this file. Define or import it, before this runs:\n"
        head += "".join(f"#   {said}\n" for said in made.missing.values())
    future = ["from __future__ import annotations\n"] if made.future else []
    blocks = [
        head + "".join(f"\n{line}" for line in future),
        "\n".join(_sorted(made.imports)) + "\n",
        _spaced([*made.blocks, *written, f"{name} = {write(call, 0, len(name) + 3)}\n"]),
    ]
    text = "\n".join(blocks) + end.replace("{wf}", name)
    return text, list(made.missing.values()), name


def _agents(workflow: Workflow) -> list[Agent]:
    """The agents that must be written down: a step with a prompt makes one by itself."""
    kept = list(workflow.agents)
    for agent in reversed(workflow.agents):
        rest = [one for one in kept if one is not agent]
        if agent.id not in workflow.sub_agents and complete_agents(rest, workflow.steps) == workflow.agents:
            kept = rest
    return kept


def _options(workflow: Workflow, agents: list[str], ours: str) -> dict[str, Any]:
    default = {name: field.get_default(call_default_factory=True) for name, field in Workflow.model_fields.items()}
    values = {name: getattr(workflow, name) for name in default if name not in ("name", "agents", "steps")}
    options: dict[str, Any] = {"agents": [Code(name) for name in agents]} if agents else {}
    options["steps"] = _arrow(workflow.steps) or [_step(item, ours) for item in workflow.steps]
    return options | {name: value for name, value in values.items() if value != default[name]}


def _arrow(steps: list[AnyStep]) -> str | None:
    """The steps as an arrow line, if that says all about them and can be read at a glance."""
    words = []
    for item in steps:
        if isinstance(item, Separator):
            return None
        word = f"[{' | '.join(item.members)}]" if isinstance(item, Parallel) else item.agent
        if isinstance(item, Module):
            most = [f"max {item.loop_max_iterations}"] if item.loop_max_iterations is not None else []
            skip = [f"skip {' '.join(item.loop_skip)}"] if item.loop_skip else []
            word += f"({', '.join([f'loop {item.loop_steps}', *most, *skip])})"
        words.append(word + ("?" if item.interactive else ""))
    line = " -> ".join(words)
    try:
        return line if words and len(line) <= 90 and parse_steps(line) == steps else None
    except WorkflowError:
        return None


def _step(item: AnyStep, ours: str) -> Any:
    data = {name: value for name, value in step_data(item).items() if name not in ("kind", "agent", "members", "text")}
    # the values themselves, not their JSON
    options = {name: getattr(item, name) for name in type(item).model_fields if name in data}
    if isinstance(item, Separator):
        return Call(f"{ours}.separator", [item.text] if item.text else [])
    if isinstance(item, Parallel):
        if item.id == "-".join(item.members):
            options.pop("id", None)
        return Call(f"{ours}.parallel", item.members, options)
    if item.id == item.agent:
        options.pop("id", None)
    return Call(f"{ours}.{item.kind}", [item.agent], options)


def _docstring(text: str) -> str:
    made = "".join(c if c == "\n" or (c != "\\" and c.isprintable()) else repr(c)[1:-1] for c in text)
    return made.replace('"', '\\"') if '"""' in made or made.endswith('"') else made


def _sorted(imports: dict[str, None]) -> list[str]:
    """The standard library's first, then the others, as formatters have it."""

    def place(line: str) -> tuple[bool, bool, str]:
        module = line.split()[1]
        return module.partition(".")[0] not in sys.stdlib_module_names, line.startswith("from "), module

    lines = sorted(imports, key=place)
    first = [line for line in lines if not place(line)[0]]
    rest = [line for line in lines if place(line)[0]]
    return [*first, *([""] if first else []), *rest]


def _spaced(blocks: list[str]) -> str:
    """Two empty lines around a definition, one around what takes several lines, none between short assignments."""
    made, before = "", ""
    for block in blocks:
        if made:
            several = any("\n" in one.rstrip() for one in (block, before))
            made += "\n" * (2 if _is_definition(block) or _is_definition(before) else several)
        elif _is_definition(block):
            made = "\n"
        made += block.rstrip() + "\n"
        before = block
    return made


def _is_definition(block: str) -> bool:
    return block.startswith(("def ", "async def ", "class ", "@"))
