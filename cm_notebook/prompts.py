"""Templates: what a prompt may name, and the parts it is made of.

Strategy: only ``{{ name }}`` and ``{{ name.field }}`` are special, so that prompts may hold any code or LaTeX. A
template is split once into literals and names; composing it puts *references* where names stood, because a text that
is already in the journal is never stored again. Values are never expanded a second time.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Container, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from .errors import WorkflowError, did_you_mean
from .events import HISTORY, Part, Ref
from .workflow import NAME, RESERVED, Agent, Module, Separator, Step, Workflow

if TYPE_CHECKING:
    from .runstate import Attempt, RunState, StepState

_HOLE = re.compile(rf"\{{\{{\s*({NAME})(?:\.({NAME}))?\s*\}}\}}")
LOOP_FIELDS = ("reason", "iteration")
_DIGEST_OF_NOTHING = hashlib.sha256().hexdigest()
"""What functions are told that have no prompt."""
EDITED = "output"
"""The name of an answer that is a decision's text (``Ref.name``)."""


class Hole(NamedTuple):
    """A place in a template: ``{{ name }}`` or ``{{ name.field }}``."""

    name: str
    field: str | None

    @property
    def written(self) -> str:
        """As it stands in the template."""
        return "{{ " + self.name + (f".{self.field}" if self.field else "") + " }}"


@functools.lru_cache(maxsize=4096)
def parse(template: str, raw: bool = False) -> tuple[str | Hole, ...]:
    """The literals and holes of `template`, in order; one literal when `raw`."""
    if raw:
        return (template,)
    parts: list[str | Hole] = []
    end = 0
    for found in _HOLE.finditer(template):
        if found.start() > end:
            parts.append(template[end : found.start()])
        parts.append(Hole(found[1], found[2]))
        end = found.end()
    if end < len(template) or not parts:
        parts.append(template[end:])
    return tuple(parts)


@functools.lru_cache(maxsize=4096)
def holes(template: str, raw: bool = False) -> tuple[Hole, ...]:
    """The places of `template` that are filled in."""
    return tuple(part for part in parse(template, raw) if isinstance(part, Hole))


def pieces(parts: Iterable[Part], texts: Mapping[Ref, str | tuple[Part, ...]]) -> Iterator[str]:
    """The literal texts that `parts` stand for, in order; a reference may lead to parts again."""
    stack = [iter(parts)]
    while stack:
        part = next(stack[-1], None)
        if part is None:
            stack.pop()
        elif isinstance(part, str):
            yield part
        else:
            found = texts[part]
            if isinstance(found, str):
                yield found
            else:
                stack.append(iter(found))


def text_of(parts: Iterable[Part], texts: Mapping[Ref, str | tuple[Part, ...]]) -> str:
    """The text that `parts` make together."""
    return "".join(pieces(parts, texts))


def digest(text: str) -> str:
    """SHA-256 of `text`, as hexadecimal digits."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest() if text else _DIGEST_OF_NOTHING


def step_names(steps: Iterable[Step | Separator]) -> dict[str, str]:
    """The template names of steps and of those who work in a parallel one: each id, and with ``_`` for ``-``."""
    names: dict[str, str] = {}
    for item in steps:
        if not isinstance(item, Separator):
            for id in item.voices:
                if "-" in id:
                    names.setdefault(id.replace("-", "_"), id)
                names[id] = id
    return names


def check_templates(workflow: Workflow, inputs: Mapping[str, Any]) -> None:
    """Refuse a template that names what will not be there: an unknown name is an error at the start, not a hole.

    A step may name an earlier step, or a later one that a loop has run before; that is empty in the first pass. Which
    fields the output of a step has is known only when it has run: see :func:`missing_field`. A sub-agent, which may be
    called in any step, may name them all; those that have not run then are empty.

    Raises
    ------
    WorkflowError    With the step, the name, and the nearest right one.
    """
    names = step_names(workflow.steps)
    order = [item for item in workflow.steps if not isinstance(item, Separator)]
    loops: list[set[str]] = []
    for index, item in enumerate(order):
        if isinstance(item, Module):
            inside = order[max(0, index - item.loop_steps) : index + 1]
            loops.append({name for other in inside for name in other.voices})
    agents = {agent.id: agent for agent in workflow.agents}
    earlier: set[str] = set()
    for item in order:
        for agent in item.agents:
            for template in item.prompts(agents.get(agent) or workflow.agent(agent)):
                for hole in holes(template, item.raw):
                    _check_hole(item, hole, inputs, names, earlier, loops)
        earlier.update(item.voices)
    for agent in workflow.sub_agents:
        task = Step(agent=agent)
        for template in task.prompts(agents[agent]):
            for hole in holes(template):
                _check_hole(task, hole, inputs, names, names.values(), ())


def _check_hole(
    item: Step,
    hole: Hole,
    given: Mapping[str, Any],
    names: dict[str, str],
    earlier: Container[str],
    loops: Iterable[Container[str]],
) -> None:
    written = hole.written
    if hole.name == "loop":
        if hole.field not in LOOP_FIELDS:
            raise WorkflowError(
                f"step {item.id!r} uses {written}. Known: {{{{ loop.reason }}}}, {{{{ loop.iteration }}}}."
            )
        return
    if hole.name == "feedback" and hole.field is not None:
        raise WorkflowError(f"step {item.id!r} uses {written}, but feedback has no fields. Write {{{{ feedback }}}}.")
    if hole.name in RESERVED:
        return
    if hole.name in given:
        if hole.field is not None and hole.name not in names:
            wrong = _no_field(hole, given[hole.name], f"the input {hole.name}")
            if wrong is not None:
                raise WorkflowError(f"step {item.id!r} uses {written}, but {wrong}")
        return
    if hole.name in names:
        named = names[hole.name]
        if named in earlier or any(item.id in loop and named in loop for loop in loops):
            return
        if named in item.voices:
            raise WorkflowError(
                f"step {item.id!r} uses {written}, its own output, which is there only in a loop that goes over it."
            )
        raise WorkflowError(
            f"step {item.id!r} uses {written}, which has not run by then. Put {named!r} before {item.id!r}."
        )
    known = sorted({*given, *names, *RESERVED})
    raise WorkflowError(
        f"step {item.id!r} uses {written}, which is not defined. {did_you_mean(hole.name, known, 'Defined')} "
        "For literal braces use raw=True (--raw)."
    )


def _no_field(hole: Hole, value: Any, what: str) -> str | None:
    """What is wrong with the field of `hole`, if `value` has no such field."""
    if not isinstance(value, Mapping):
        return f"{what} is {'a text' if isinstance(value, str) else 'no table'} and has no fields."
    if hole.field in value:
        return None
    return f"{what} has no field {hole.field!r}. {did_you_mean(hole.field, map(str, value), 'Fields')}"


def check_read(workflow: Workflow, given: Iterable[str], declared: Iterable[str]) -> None:
    """Refuse an input that nothing reads: its name is most likely misspelt.

    A function reads ``turn.inputs``, so where there is one only a name much like one that is in use is refused; the
    inputs that the workflow itself has are the way to say that such a name is meant.

    Parameters
    ----------
    given
        The names of the inputs that were given for this run.
    declared
        Those that the workflow has of itself.
    """
    given = list(given)
    if not given:
        return
    import difflib

    named = {
        hole.name
        for item in workflow.tasks
        for template in item.prompts(workflow.agent(item.agent))
        for hole in holes(template, item.raw)
    }
    names = step_names(workflow.steps)
    known = sorted({*(name for name in named if name not in names and name not in RESERVED), *declared})
    functions = any(workflow.agent(item.agent).implementation is not None for item in workflow.tasks)
    for name in given:
        if name in known or name in named or (functions and not difflib.get_close_matches(name, known, 1)):
            continue
        meant = " If a function reads it, add it to the workflow's own inputs." if functions else ""
        raise WorkflowError(f"no prompt uses the input {name!r}. {did_you_mean(name, known, 'Inputs')}{meant}")


def agent_facts(agent: Agent) -> str:
    """All that decides what an agent does: its prompt, engine, model, source, as JSON."""
    return agent.model_dump_json(exclude_defaults=True)


def fingerprint(
    step: Step, agents: Iterable[Agent], inputs: Mapping[str, object], facts: Iterable[str] | None = None
) -> str:
    """A digest of all that decides what a step is told to do.

    Its options, what decides about its agents (`facts`, where :func:`agent_facts` is at hand already), and the values
    of the inputs that its templates name.
    """
    agents = list(agents)
    used: dict[str, object] = {}
    for agent in agents if inputs else ():
        for template in step.prompts(agent):
            for hole in holes(template, step.raw):
                if hole.name in inputs:
                    used[hole.name] = inputs[hole.name]
    said = json.dumps(used, sort_keys=True) if used else ""
    known = facts if facts is not None else map(agent_facts, agents)
    return digest("\n".join((step.model_dump_json(exclude_defaults=True), *known, said)))[:16]


# -- composing --------------------------------------------------------------------------------------------------------


def compose(state: RunState, step: StepState, *, continues: bool) -> tuple[tuple[Part, ...], tuple[Part, ...] | None]:
    """What is sent in the next turn of `step`: the parts of its prompt, and of the context appended to it.

    `continues`: it is sent into the agent's own session, which knows what was said before.

    In this order of precedence: an edited prompt as it is; after a rejection the feedback alone, where the agent's own
    session is continued, else the last prompt, the last answer and the feedback; else the template, with what the
    module said that sent the run back, and with earlier outputs as ``context`` when the template names none. Of chained
    prompts each stands for itself; in its own session the agent is told of a last answer that a person has edited.
    """
    redo = step.redo
    if redo is not None and redo.prompt is not None:
        return (redo.prompt,), None
    if step.caller:
        return _member_prompt(state, step)
    return _step_prompt(state, step, continues=continues)


def _member_prompt(state: RunState, member: StepState) -> tuple[tuple[Part, ...], tuple[Part, ...] | None]:
    """Of an agent that was called: its own prompt, then what it is asked; what its rejected answer was, if it was."""
    parts, context = _step_prompt(state, member, continues=False)
    if member.request:
        parts = (*parts, "\n\n", *member.request) if parts else member.request
    feedback = member.redo.feedback if member.redo is not None else None
    if feedback is not None and member.before is not None and feedback not in parts and parts:
        parts += ("\n\n## Your last answer\n\n", member.before, "\n\n## Feedback on it\n\n", feedback)
    return parts, context


def _step_prompt(
    state: RunState, step: StepState, *, continues: bool
) -> tuple[tuple[Part, ...], tuple[Part, ...] | None]:
    redo = step.redo
    templates = step.step.prompts(state.agents.get(step.step.agent))
    template = templates[step.turn - 1]
    if not template:
        return (), None  # a function without a prompt reads its Turn
    parsed = parse(template, step.step.raw)
    found = holes(template, step.step.raw)
    names = {hole.name for hole in found}
    feedback = redo.feedback if redo is not None else None
    if feedback is not None and (last := _repeated(step, names)) is not None:
        if continues:
            return (feedback,), None
        answer: tuple[Part, ...] = (last.answer,) if last.answer is not None else ()
        before: Part = Ref(last.turns[-1], "prompt") if last.turns else ""
        return (before, "\n\n## Your last answer\n\n", *answer, "\n\n## Feedback on it\n\n", feedback), None
    parts: tuple[Part, ...] = parsed  # type: ignore[assignment]
    if names:
        parts = tuple(_filled(state, step, part, feedback) if isinstance(part, Hole) else part for part in parsed)
    if step.turn > 1:
        return parts + (_edit_block(step) if continues else ()), None
    if step.looped_by is not None and not any((hole.name, hole.field) == ("loop", "reason") for hole in found):
        parts += _loop_block(state, step.looped_by, step.iteration)
    context = None if _names_a_step(state, templates, step.step.raw) else _context(state, step)
    return parts, context


def missing_field(state: RunState, step: StepState) -> str | None:
    """Why the next prompt of `step` cannot be made: the field of an output that has none of that name; else ``None``.

    Of a step that was skipped, or that has not run yet in the first pass of its loop, every field is empty.
    """
    redo, raw = step.redo, step.step.raw
    if redo is not None and redo.prompt is not None:
        return None
    found = holes(step.step.prompts(state.agents.get(step.step.agent))[step.turn - 1], raw)
    if redo is not None and redo.feedback is not None and _repeated(step, {hole.name for hole in found}) is not None:
        return None
    for hole in found:
        if hole.field is None or hole.name in ("feedback", "loop"):
            continue
        where, fields = _place(state, step, hole)
        if where is None or Ref(where.seq, fields + hole.field) in state.texts:
            continue
        owner = next((other for other in state.order if other.approved == where), None)
        made = next((one for one in owner.attempts if one.answer == where), None) if owner is not None else None
        what = f"the output of {owner.id}" if owner is not None else f"the input {hole.name}"
        if owner is None and (voice := state.voice(hole.name)) is not None and state.voices[voice] == where:
            what = f"the output of {voice}"
        if made is not None and made.edited:
            what += ", as it was edited,"
        wrong = _no_field(hole, made.output if made is not None and made.output is not None else "", what)
        return f"its prompt uses {hole.written}, but {wrong}"
    return None


def _repeated(step: StepState, names: Container[str]) -> Attempt | None:
    """The attempt whose prompt is sent again with the feedback on it; ``None``: the template has a place for that."""
    return None if "feedback" in names else rejected(step)


def rejected(step: StepState) -> Attempt | None:
    """The attempt that the feedback is about; attempts cut short since do not count."""
    for attempt in reversed(step.attempts):
        if attempt.decision is not None and attempt.decision.action == "reject":
            return attempt
    return None


def _filled(state: RunState, step: StepState, hole: Hole, feedback: Ref | None) -> Part:
    """What stands in place of `hole`; a step that gave no output gives no text, a field that is not there itself."""
    if hole.name == "feedback":
        return feedback if feedback is not None else ""
    if hole.name == "loop":
        if hole.field == "iteration":
            return str(step.iteration)
        module = state.loop_of(step)
        loop = state.loops.get(step.looped_by or (module.id if module is not None else ""))
        return loop.reason if loop is not None else ""
    where, fields = _place(state, step, hole)
    if where is None:
        return ""
    if hole.field is not None:
        where = Ref(where.seq, fields + hole.field)
    return where if where in state.texts else hole.written


def _place(state: RunState, step: StepState, hole: Hole) -> tuple[Ref | None, str]:
    """Where the text stands that `hole` names, and what its fields are called there."""
    if hole.name == "previous":
        return _previous(state, step), "."
    named = state.named(hole.name)
    if named is not None and (named.approved is not None or hole.name not in state.input_refs):
        return named.approved, "."
    voice = state.voice(hole.name)
    if voice is not None and (state.voices[voice] is not None or hole.name not in state.input_refs):
        return state.voices[voice], "."
    return state.input_refs.get(hole.name), f"{hole.name}."


def _names_a_step(state: RunState, templates: Iterable[str], raw: bool) -> bool:
    for template in templates:
        for hole in holes(template, raw):
            if hole.name == "previous" or state.named(hole.name) is not None or state.voice(hole.name) is not None:
                return True
    return False


def _previous(state: RunState, step: StepState) -> Ref | None:
    for index in range(step.index - 1, -1, -1):
        if (approved := state.order[index].approved) is not None:
            return approved
    return None


def _context(state: RunState, step: StepState) -> tuple[Part, ...] | None:
    wanted = step.step.context
    if wanted == "none":
        return None
    if wanted == "all":
        return _all(state, step)
    if wanted == "previous":
        chosen = [other for other in reversed(state.order[max(0, step.index - 1) : step.index]) if other.approved]
        if not chosen and (where := _previous(state, step)) is not None:
            chosen = [other for other in state.order[: step.index] if other.approved == where]
    else:
        named = (
            (name, state.steps[name].approved if name in state.steps else state.voices.get(name)) for name in wanted
        )
        return tuple(part for name, approved in named for part in _headed(name, approved)) or None
    return tuple(part for other in chosen for part in _headed(other.id, other.approved)) or None


def _all(state: RunState, step: StepState) -> tuple[Part, ...] | None:
    """Every earlier output. What the last such block held is named as a whole, so a long chain stays small."""
    start, parts = 0, []
    if state.context_all is not None:
        where, index, epoch = state.context_all
        if epoch == state.epoch and index <= step.index:
            start, parts = index, [where]
    new: list[Part] = [part for other in state.order[start : step.index] for part in _headed(other.id, other.approved)]
    return (*parts, *new) or None


def _headed(name: str, output: Ref | None) -> tuple[Part, ...]:
    return (f"\n\n## Output of {name}\n\n", output) if output is not None else ()


def _edit_block(step: StepState) -> tuple[Part, ...]:
    """The answer to the chained prompt before, if it is a person's; where the history is sent, that has it."""
    _asked, answer = step.said[-1]
    if answer is None or answer.name != EDITED or step.session == HISTORY:
        return ()
    return ("\n\n## Your last answer, changed by a person to this\n\n", answer)


def _loop_block(state: RunState, module_id: str, iteration: int) -> tuple[Part, ...]:
    loop = state.loops.get(module_id)
    if loop is None:
        return ()
    parts: tuple[Part, ...] = ()
    said = state.text(loop.reason) if isinstance(loop.reason, Ref) else loop.reason
    if said:
        parts += (f"\n\n## Not accepted yet by {module_id} (pass {iteration})\n\n", loop.reason)
    if loop.output is not None and state.text(loop.output) not in ("", said):
        parts += (f"\n\n## Output of {module_id}\n\n", loop.output)
    return parts
