"""What is to be done: agents, steps, modules, workflows, and the verdicts that steer loops.

Strategy: plain pydantic data that refuses nonsense by name as soon as it is built, before any I/O. Nothing here runs.
A workflow is a list of steps; each step names the agent that does the work. The arrow string
``planner -> implementer -> quality-gate(loop 1, max 5) -> deployer?`` is a second spelling of that list.
"""

import inspect
import json
import operator
import os
import re
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, cast, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    Strict,
    StrictBool,
    ValidationError,
)
from pydantic_core import PydanticSerializationError, core_schema

from .errors import WorkflowError, brief, by_name, did_you_mean
from .plain import not_json
from .tools import Tool, as_tool, implementation_of

if TYPE_CHECKING:
    from pathlib import Path

    from .run import Run

AutonomousMode = Literal["never", "always"] | bool
GatePlace = Literal["after", "before", "both"]
GateDefault = Literal["reject", "skip", "stop"]
NAME = r"[A-Za-z_](?:\w|-(?!>))*"
_NAME = re.compile(NAME)
_MEANT = r"""["']action["']\s*:"""
RESERVED = ("previous", "feedback", "loop")
"""Template names with a meaning of their own; no step or input may take them."""
LIMITS = ("max_cost_usd", "max_tokens", "max_turns")
"""Options that say how much a run, or a step, may use before a person is asked."""
_limits = operator.attrgetter(*LIMITS)
_UNLIMITED = (None,) * len(LIMITS)


class Model(BaseModel):
    """Data that says in one line what is wrong with it."""

    model_config = ConfigDict(extra="forbid", defer_build=True, arbitrary_types_allowed=True)

    def __init__(self, **data: Any) -> None:
        fill(self, data)


def fill(model: BaseModel, data: Mapping[str, Any]) -> None:
    """Give a new model its data.

    Raises
    ------
    WorkflowError    The data does not fit; in one line.
    """
    try:
        BaseModel.__init__(model, **data)
    except ValidationError as error:
        raise WorkflowError(_one_line(type(model), data, error)) from None


def _one_line(model: type[BaseModel], data: Mapping[str, Any], error: ValidationError) -> str:
    problems = error.errors(include_url=False)
    problem = next(
        (each for each in problems if each["type"] == "extra_forbidden"), problems[0]
    )  # it says what is meant
    first, *rest = problem["loc"] or ("",)
    where = ".".join(str(part) for part in (first, *(part for part in rest if isinstance(part, int))))
    subject = _subject(model, data)
    if problem["type"] == "extra_forbidden":
        known = [name for name, field in model.model_fields.items() if field.repr]  # the others are not for people
        return f"{subject}: there is no option {where!r}. {did_you_mean(where, known, 'Options')}"
    if problem["type"] == "missing":
        return f"{subject}: {where!r} is missing."
    said = problem["msg"].removeprefix("Value error, ")
    if not problem["loc"]:  # about the whole
        return f"{subject}: {said}."
    return f"{subject}: {where}={brief(problem['input'])} is not valid: {said}."


def _subject(model: type[BaseModel], data: Mapping[str, Any]) -> str:
    owner, kind = data.get("id") or data.get("agent") or data.get("name"), model.__name__
    kind = "".join(f" {letter}" if letter.isupper() else letter for letter in kind).strip().lower()
    return f"{kind} {owner!r}" if owner else kind


class Fixed(Model):
    """Data that stays as it was checked, so a run can have it without a copy."""

    def __setattr__(self, name: str, value: Any) -> None:
        raise WorkflowError(
            f"{_subject(type(self), self.__dict__)}: {name} cannot be changed any more. Make another one with another "
            f"{name}."
        )


def sound(value: Any) -> Any:
    """`value` without what UTF-8 cannot hold: lone surrogates, as undecodable bytes or half an emoji leave them."""
    if isinstance(value, str):
        return value if value.isascii() else value.encode("utf-8", "replace").decode("utf-8")
    if isinstance(value, dict):
        return {sound(key): sound(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [sound(inner) for inner in value]
    return value


class Written:
    """Annotates a field that is written as what `function` makes of it.

    As pydantic's ``PlainSerializer``, for whose sake all its serializers would be loaded at every import.
    """

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self.function = function

    def __get_pydantic_core_schema__(self, source: Any, handler: Callable[[Any], Any]) -> Any:
        """Pydantic asks for it when it builds the model."""
        schema = handler(source)
        schema["serialization"] = core_schema.plain_serializer_function_ser_schema(self.function)
        return schema


def _engine_name(given: Any) -> Any:
    name = getattr(given, "name", None)
    if isinstance(name, str) and hasattr(given, "stream"):
        raise ValueError(
            "it is an engine, and here stands the name of one. Register it with cm.register_engine(…) and write "
            f"engine={name!r}, or pass it to workflow.start(engine=…)"
        )
    return given


Text = Annotated[str, AfterValidator(sound)]
"""A text that can be kept."""
EngineName = Annotated[Text, BeforeValidator(_engine_name)]
Count = Annotated[int, Strict()]
Amount = Annotated[float, Strict()]
"""Numbers; ``True`` is none, although Python takes it for 1."""


class Verdict(Model):
    """What a module says after looking at the work.

    ``continue`` goes on, ``loop`` goes back, ``pause`` asks a person, ``stop`` ends the run, ``error`` fails the step.
    ``score`` is the module's own measure, shown beside the iteration.
    """

    action: Literal["continue", "loop", "pause", "stop", "error"]
    reason: str = ""
    score: float | None = None

    @classmethod
    def from_text(cls, text: str) -> "Verdict | None":
        """The last JSON object in `text`, if it is a verdict; else ``None``.

        An object inside another one does not count. Only the last 64 kB are searched and at most 200 places tried, so
        hostile text costs nothing.
        """
        found, meant = _last_object(text)
        if found is None or "action" not in found or meant:
            return None  # none, or a later one was meant and cannot be read
        try:
            return cls(**_parts_of_verdict(found))
        except WorkflowError:
            return None  # the last word was meant as a verdict and is malformed: never guess an earlier one

    @classmethod
    def missed(cls, whose: str, text: str) -> str:
        """Why ``from_text`` finds no verdict in the `text` of agent `whose`, in a sentence."""
        found, meant = _last_object(text)
        if meant:
            return f"{whose}'s verdict is not JSON that can be read: “{meant}”. {_EXPECTED}"
        if found is None:
            return f"{whose} gave no verdict. {_EXPECTED}"
        if "action" not in found:
            return f'{whose} gave no verdict: the JSON at the end has no "action". {_EXPECTED}'
        action = found["action"]
        if not isinstance(action, str):
            return f'{whose}\'s verdict cannot be followed: its "action" is no text. {_EXPECTED}'
        known = get_args(cls.model_fields["action"].annotation)
        if action not in known:
            nearest = did_you_mean(action.lower(), known, "Possible")
            return f"{whose}'s verdict says “{_excerpt(sound(action))}”. {nearest}"
        try:
            cls(**_parts_of_verdict(found))
        except WorkflowError as error:
            return f"{whose}'s {error}"
        return ""


_EXPECTED = 'Expected at the end: {"action": "continue" or "loop", "reason": "…"}.'


def _parts_of_verdict(found: Mapping[str, Any]) -> dict[str, Any]:
    return {key: found[key] for key in ("action", "reason", "score") if found.get(key) is not None}


def _last_object(text: str) -> tuple[dict[str, Any] | None, str]:
    """The last JSON object in `text`; and how a later one begins that was meant as a verdict and cannot be read."""
    tail, decoder = text[-65536:], json.JSONDecoder()
    start, found, found_end = len(tail), None, 0
    for _ in range(200):
        start = tail.rfind("{", 0, start)
        if start < 0:
            break
        try:
            value, end = decoder.raw_decode(tail, start)
        except (ValueError, RecursionError):
            continue
        if found is not None and end < found_end:
            break  # it stands before the last one
        found, found_end = value, end  # the last one, or one around it
    meant = re.compile(_MEANT).search(tail, found_end)
    if meant is None:
        return found, ""
    begins = tail.rfind("{", found_end, meant.start())
    return found, _excerpt(tail[begins if begins >= 0 else meant.start() :])


def _excerpt(text: str) -> str:
    """The text on one line, and not long."""
    line = " ".join(text[:400].split())
    return line if len(line) <= 80 else f"{line[:79].rstrip()}…"


def _tools(given: Any) -> tuple[Tool, ...]:
    if isinstance(given, (Tool, str)) or not isinstance(given, Iterable):
        raise WorkflowError(f"tools={brief(given)} is not a list of tools. Write tools=[…].")
    tools = tuple(as_tool(each) for each in given)
    names = [each.name for each in tools]
    for name in names:
        if names.count(name) > 1:
            raise WorkflowError(f"tools: two of them are called {name!r}. Give one another: @cm.tool(name=…).")
    return tools


def _output(given: Any) -> Any:
    if given is None or isinstance(given, Mapping) or (isinstance(given, type) and issubclass(given, BaseModel)):
        return given
    raise WorkflowError(f"output={brief(given)} is not a pydantic class. Define one: class Plan(pydantic.BaseModel): …")


def _output_schema(given: Any) -> Any:
    return cast("type[BaseModel]", given).model_json_schema() if isinstance(given, type) else given


def fitted(output: type[BaseModel], text: str) -> tuple[Any, str | None]:
    """The JSON in `text` as JSON-ready data of that class, or what is wrong with it."""
    try:
        return output.model_validate_json(text).model_dump(mode="json"), None
    except ValidationError as error:
        problems = error.errors(include_url=False)[:5]
        return None, "; ".join(f"{'.'.join(map(str, each['loc'])) or 'the whole'}: {each['msg']}" for each in problems)
    except PydanticSerializationError as error:
        return None, f"it cannot be kept as JSON: {error}"


def unfenced(text: str) -> str:
    """The text without the fence that models like to put around JSON."""
    text = text.strip()
    return text.partition("\n")[2].rstrip("`").strip() if text.startswith("```") else text


class Agent(Model):
    """Who does the work: an engine's model with a prompt, or a Python function.

    Parameters
    ----------
    id
        Its name, also the default id of the step it works in.
    prompt
        Template of what it is told: ``{{ goal }}`` (an input), ``{{ planner }}`` (a step's approved text),
        ``{{ previous }}``, ``{{ feedback }}``, ``{{ loop.reason }}``, ``{{ loop.iteration }}``.
    system
        System prompt, sent as it is.
    engine, model, reasoning_effort
        Which engine runs it and how; ``None`` leaves the choice to step, workflow and configuration.
    tools
        Functions made with :func:`~cm_notebook.tools.tool` that its model may call; for HTTP engines.
    output
        A pydantic class that the answer must fit, and a person's edit of it. HTTP engines tell their model so; of any
        other engine, an answer that does not fit fails the turn. A journal keeps its schema. Where a function returns a
        model and names no class here, an edit must fit the class of what it returned, as long as its process lives.
    """

    id: str
    prompt: Text = ""
    system: Text | None = None
    engine: EngineName | None = None
    model: Text | None = None
    reasoning_effort: Text | None = None
    tools: Annotated[tuple[Tool, ...], BeforeValidator(_tools)] = ()
    output: Annotated[Any, BeforeValidator(_output), Written(_output_schema)] = None
    implementation: str | None = Field(default=None, repr=False)
    """For a function: its name and a digest of its source, so that a change is noticed."""
    function: Callable[..., Any] | None = Field(default=None, exclude=True, repr=False)

    @by_name("cm.Agent")
    def __init__(self, id: str, prompt: str = "", **options: Any) -> None:
        super().__init__(id=id, prompt=prompt, **options)
        _check_name("agent", self.id)

    @property
    def missing(self) -> str | None:
        """What of it is Python and was not kept by the journal it comes from; ``None``: nothing."""
        if self.implementation is not None and self.function is None:
            return f"is a Python function ({self.implementation.split(':')[0]})"
        for each in self.tools:
            if each.function is None:
                return f"has a tool that is a Python function ({each.name})"
        if isinstance(self.output, Mapping):
            return f"has an output that is a Python class ({self.output.get('title', 'output')})"
        return None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function behind a function agent, as if it had not been decorated."""
        if self.function is None:
            raise WorkflowError(f"agent {self.id!r} is not a Python function; run it as a step of a workflow.")
        return self.function(*args, **kwargs)


_Function = TypeVar("_Function", bound=Callable[..., Any])


def agent(id: str, **options: Any) -> Callable[[_Function], Agent]:
    """Decorator: make a Python function, sync or async, an agent named `id`.

    The function gets a ``Turn`` and returns ``str``, ``Verdict`` or a pydantic model. Sync functions run in a thread.
    """
    if not isinstance(id, str):
        raise WorkflowError('@cm.agent needs a name: write @cm.agent("quality-gate") above the function.')

    def decorate(function: _Function) -> Agent:
        _check_takes_turn(id, function)
        made = Agent(id=id, function=function, implementation=implementation_of(function), **options)
        made.__doc__ = function.__doc__
        return made

    return decorate


def _check_takes_turn(id: str, function: Any) -> None:
    """Refuse a function that cannot be called with a turn, before a run has come to it."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # no function, which is said elsewhere; or written in C, and says nothing of itself
        return
    try:
        signature.bind(None)
    except TypeError as misfit:
        name = getattr(function, "__name__", "work")
        raise WorkflowError(
            f"agent {id!r}: its function is called with the turn alone, and {name} cannot be: {misfit}. "
            f"Write def {name if name.isidentifier() else 'work'}(turn: cm.Turn) -> str."
        ) from None


def _gate_default(given: Any) -> Any:
    if given == "approve":
        raise WorkflowError("gate_default='approve': nothing is approved by default. Use 'reject', 'skip' or 'stop'.")
    return given


class Step(Fixed):
    """One step of a workflow; make it with :func:`step`, where the fields are explained."""

    kind: Literal["step"] = "step"
    agent: str
    id: str = ""
    interactive: StrictBool | None = None
    prompt: Text | list[Text] | None = None
    engine: EngineName | None = None
    model: Text | None = None
    reasoning_effort: Text | None = None
    execute_once: StrictBool = False
    context: Literal["previous", "all", "none"] | list[str] = "previous"
    gate: GatePlace = "after"
    gate_timeout_s: Amount | None = Field(default=None, gt=0, allow_inf_nan=False)
    gate_default: Annotated[GateDefault | None, BeforeValidator(_gate_default)] = None
    timeout_s: Amount | None = Field(default=None, gt=0, allow_inf_nan=False)
    retries: Count = Field(default=2, ge=0)
    idempotent: StrictBool = True
    raw: StrictBool = False
    max_cost_usd: Amount | None = Field(default=None, gt=0, allow_inf_nan=False)
    max_tokens: Count | None = Field(default=None, ge=1)
    max_turns: Count | None = Field(default=None, ge=1)

    def model_post_init(self, context: Any, /) -> None:
        """The id defaults to the agent's name."""
        if not self.id:
            self.__dict__["id"] = self.agent
        _check_name("step", self.id)
        if self.gate_default is not None and self.gate_timeout_s is None:
            raise WorkflowError(
                f"step {self.id!r}: gate_default={self.gate_default!r} is for a gate that nobody has answered in time. "
                "Say how long it waits: gate_timeout_s=…"
            )

    @property
    def agents(self) -> tuple[str, ...]:
        """The ids of the agents that do it."""
        return (self.agent,)

    @property
    def voices(self) -> tuple[str, ...]:
        """Under what names it gives an output."""
        return (self.id,)

    @property
    def turns(self) -> int:
        """How many prompts are sent in one attempt."""
        return len(self.prompt) if isinstance(self.prompt, list) and self.prompt else 1

    def prompts(self, agent: Agent | None) -> tuple[str, ...]:
        """The prompt templates of this step's turns, in order; at least one."""
        if isinstance(self.prompt, str):
            return (self.prompt,)
        if self.prompt:
            return tuple(self.prompt)
        return (agent.prompt if agent is not None else "",)


class Module(Step):
    """A step that may send the run back; make it with :func:`module`."""

    kind: Literal["module"] = "module"  # type: ignore[assignment]
    loop_steps: Count = Field(default=1, ge=1)
    loop_max_iterations: Count | None = Field(default=None, ge=0)
    loop_skip: list[str] = Field(default_factory=list)
    on_exhausted: Literal["pause", "continue", "fail"] = "pause"


class Parallel(Step):
    """A step that several agents do side by side; make it with :func:`parallel`."""

    kind: Literal["parallel"] = "parallel"  # type: ignore[assignment]
    agent: Literal[""] = ""
    members: list[str] = Field(min_length=1)
    max_concurrency: Count | None = Field(default=None, ge=1)

    def model_post_init(self, context: Any, /) -> None:
        """The id defaults to the members' names."""
        self.__dict__["id"] = self.id or "-".join(self.members)
        super().model_post_init(context)
        where = f"parallel step {self.id!r}"
        for number, name in enumerate(self.members):
            _check_name("agent", name)
            if name in self.members[:number]:
                raise WorkflowError(f"{where}: {name!r} is in it twice. Give the second agent another id.")
        if len(self.members) > 1 and self.id in self.members:
            raise WorkflowError(f"{where}: {self.id!r} is one of its agents. Give the step a name of its own: id=….")
        if self.gate != "after":
            raise WorkflowError(f"{where}: gate={self.gate!r} shows one prompt, and it has several. Use gate='after'.")
        if isinstance(self.prompt, list):
            raise WorkflowError(f"{where}: prompts cannot be chained here. Make it several steps.")

    @property
    def agents(self) -> tuple[str, ...]:
        """The ids of its members."""
        return tuple(self.members)

    @property
    def voices(self) -> tuple[str, ...]:
        """Its own id and those of its members, of which a single one may be the same."""
        return tuple(dict.fromkeys((self.id, *self.members)))

    def member(self, agent: str) -> Step:
        """What the agent of that id has to do in it."""
        own = ("prompt", "engine", "model", "reasoning_effort", "context", "timeout_s", "retries", "idempotent", "raw")
        return Step(agent=agent, **{name: getattr(self, name) for name in (*own, *GATE_OPTIONS)})


GATE_OPTIONS = ("gate_timeout_s", "gate_default")
"""Those options of a step that are about all gates in it, also of agents that it calls."""


class Separator(Fixed):
    """A line in the timeline; it is passed over and does not count in ``loop_steps``."""

    kind: Literal["separator"] = "separator"
    text: Text = ""


AnyStep = Step | Module | Parallel | Separator


@by_name("cm.step")
def step(
    agent: str,
    *,
    id: str | None = None,
    interactive: bool | None = None,
    prompt: str | list[str] | None = None,
    engine: str | None = None,
    model: str | None = None,
    reasoning_effort: str | None = None,
    execute_once: bool = False,
    context: Literal["previous", "all", "none"] | list[str] = "previous",
    gate: GatePlace = "after",
    gate_timeout_s: float | None = None,
    gate_default: GateDefault | None = None,
    timeout_s: float | None = None,
    retries: int = 2,
    idempotent: bool = True,
    raw: bool = False,
    max_cost_usd: float | None = None,
    max_tokens: int | None = None,
    max_turns: int | None = None,
) -> Step:
    """A step in which `agent` does its work.

    Parameters
    ----------
    agent
        Id of the agent. With `prompt`, an agent of that name is made if there is none.
    id
        The step's own name when it is not the agent's.
    interactive
        ``True`` pauses for a person, ``False`` does not, ``None`` means as the workflow's mode says. In manual mode
        every step pauses.
    prompt
        A template that replaces the agent's, or a list of them, sent in turn into the same agent session; a run in
        manual mode pauses after each, else a step that pauses does after the last.
    engine, model, reasoning_effort
        Replace the agent's.
    execute_once
        Not repeated when a loop goes over it again; its output is kept.
    context
        Which approved outputs are appended to a prompt that names no earlier step: the ``"previous"`` one, ``"all"``,
        ``"none"``, or those of the named steps.
    gate
        Where the pause of a step that pauses (see `interactive`) falls: ``"after"`` the turn, ``"before"`` it (the
        prompt is approved), or ``"both"``.
    gate_timeout_s
        Seconds that a gate of this step waits for a decision; then `gate_default` is decided, or, where nothing is
        said or it does not fit the gate, the run stops. ``None`` waits for ever.
    gate_default
        ``"skip"``, ``"stop"``, or ``"reject"``, which is done once: if nobody looks at what comes of it, the run stops.
        Nothing is approved by default.
    timeout_s
        Seconds a turn may take, waiting for a person not counted; ``None`` waits for ever.
    retries
        How often a turn is tried again unasked after a rate limit, an overload or a dropped connection.
    idempotent
        ``False``: after a crash in mid-turn a person is asked before it runs again.
    raw
        ``True``: the prompt is sent as written, ``{{ }}`` included.
    max_cost_usd, max_tokens, max_turns
        How much it may use (US dollars, tokens, prompts sent): all its attempts and all agents that it calls count.
        Where that is reached, a person is asked before its next turn starts; see :class:`Workflow`.

    Returns
    -------
    Step
        It runs nothing; a workflow, or ``run.add``, takes it.

    Raises
    ------
    WorkflowError    A wrong name or value.
    """
    return Step(**{key: value for key, value in locals().items() if not (key == "id" and value is None)})


@by_name("cm.module")
def module(
    agent: str,
    *,
    loop_steps: int = 1,
    loop_max_iterations: int | None = None,
    loop_skip: Iterable[str] = (),
    on_exhausted: Literal["pause", "continue", "fail"] = "pause",
    **options: Any,
) -> Module:
    """A step whose verdict may send the run back.

    Parameters
    ----------
    agent
        Id of the agent that judges: a function that returns a ``Verdict``, or a model whose answer ends with
        ``{"action": "continue" | "loop" | "pause" | "stop" | "error", "reason": "…"}``.
    loop_steps
        How many executable steps to go back (separators do not count).
    loop_max_iterations
        How many jumps back are permitted; ``None`` means no limit.
    loop_skip
        Ids of steps that are passed over while this loop is active.
    on_exhausted
        What happens when the jumps are used up: ``"pause"`` asks a person, ``"continue"`` goes on with the last
        output, ``"fail"`` ends the run as failed.
    **options
        As for :func:`step`.

    Returns
    -------
    Module
        A step that judges; where its verdict is missing or cannot be read, a person is asked.

    Raises
    ------
    WorkflowError    A wrong name or value.
    """
    skipped: Any = [loop_skip] if isinstance(loop_skip, str) else loop_skip
    if isinstance(skipped, Iterable):
        skipped = list(skipped)
    return Module(
        agent=agent,
        loop_steps=loop_steps,
        loop_max_iterations=loop_max_iterations,
        loop_skip=skipped,
        on_exhausted=on_exhausted,
        **options,
    )


@by_name("cm.parallel")
def parallel(*agents: str, id: str | None = None, max_concurrency: int | None = None, **options: Any) -> Parallel:
    """A step that several agents do side by side. Its output is theirs together, each under its name.

    Parameters
    ----------
    agents
        Ids of the agents. A later prompt has the output of one of them as ``{{ its-id }}``.
    id
        The step's own name; by default the agents' ids, joined with ``-``.
    max_concurrency
        How many may work at the same time; ``None``: as many as the run allows.
    **options
        As for :func:`step`; ``prompt``, ``engine``, ``context`` and such are for each of the agents.

    Returns
    -------
    Parallel
        One step of the workflow.

    Raises
    ------
    WorkflowError    A wrong name or value.
    """
    given = {"id": id} if id is not None else {}
    return Parallel(members=list(agents), max_concurrency=max_concurrency, **given, **options)


def separator(text: str = "") -> Separator:
    """A line in the timeline with `text` on it."""
    return Separator(text=text)


START_OPTIONS = (
    *("engine", "journal", "workspace", "until", "max_concurrency", *LIMITS),
    *("on_gate", "on_waiting", "tape", "record", "loop"),
)


def limits_of(source: Any) -> dict[str, int | float]:
    """The limits that a workflow, a step or a decision names, by option."""
    values = _limits(source)
    if values == _UNLIMITED:
        return {}
    return {name: value for name, value in zip(LIMITS, values, strict=True) if value is not None}


class Workflow(Model):
    """A named list of steps and the agents that do them.

    Parameters
    ----------
    name
        What people call it.
    steps
        A list of :func:`step`, :func:`module`, :func:`parallel`, :func:`separator` (a plain string is a step), or the
        arrow string ``"planner -> [frontend | backend] -> quality-gate(loop 1, max 5) -> deployer?"``.
    agents
        The agents that the steps name.
    sub_agents
        Ids of those agents that an agent at work may call (``run_agents``).
    max_concurrency
        How many agents that others called, or of a parallel step, may work at the same time; 4 if nothing is said.
    autonomous_mode
        ``"never"``: every step pauses, locked. ``"always"``: only steps with ``interactive=True`` pause, locked.
        ``True`` / ``False``: start that way, and the user may switch while it runs.
    inputs
        Default values of template names.
    specification
        What is to be built, in words; kept with the workflow for those who read it, and in no prompt by itself.
    engine
        Engine of all agents and steps that name none.
    max_cost_usd
        US dollars that a run may spend. Where they are spent a gate of kind ``budget`` opens before the next turn
        starts; what runs finishes. Approving it permits the same amount again. The cost of a turn is known when it
        ends, so a run may go over its limit by the turns under way. A model whose price is not known is refused at
        the start; an engine that says no cost is asked about after its first turn: nothing unknown counts as nothing.
        Python functions, scripts and tapes cost nothing.
        What a turn that was cut short used after its last report is not known and does not count.
    max_tokens, max_turns
        The same for tokens (input and output) and turns (prompts sent; one that is tried again by itself counts
        once).

    Raises
    ------
    WorkflowError    Unknown agent, duplicate step id, a loop beyond the start, an empty prompt, …
    """

    name: Text
    steps: list[Step | Module | Parallel | Separator] = Field(default_factory=list)
    agents: list[Agent] = Field(default_factory=list)
    sub_agents: list[str] = Field(default_factory=list)
    max_concurrency: Count | None = Field(default=None, ge=1)
    autonomous_mode: AutonomousMode = True
    inputs: dict[str, Any] = Field(default_factory=dict)
    specification: Text | None = None
    engine: EngineName | None = None
    max_cost_usd: Amount | None = Field(default=None, gt=0, allow_inf_nan=False)
    max_tokens: Count | None = Field(default=None, ge=1)
    max_turns: Count | None = Field(default=None, ge=1)

    @by_name("cm.Workflow")
    def __init__(self, name: str, **data: Any) -> None:
        steps = data.get("steps", [])
        if isinstance(steps, str):
            data["steps"] = parse_steps(steps)
        elif isinstance(steps, (list, tuple)):
            data["steps"] = [as_step(number, item) for number, item in enumerate(steps, 1)]
        _check_agents(name, data.get("agents"))
        mode = data.get("autonomous_mode", True)
        if mode not in ("never", "always") and not isinstance(mode, bool):
            raise WorkflowError(
                f"workflow {name!r}: autonomous_mode={mode!r} is not known. Use 'never', 'always', True or False."
            )
        super().__init__(name=name, **data)
        if not self.name.strip():
            raise WorkflowError("workflow: name is empty. Give it a name, for instance 'Careful Builder'.")
        self.agents = complete_agents(self.agents, self.steps)
        check(self)

    def agent(self, id: str) -> Agent:
        """The agent named `id`; a ``WorkflowError`` lists the defined ones."""
        for candidate in self.agents:
            if candidate.id == id:
                return candidate
        raise WorkflowError(_no_agent(id, self.agents))

    @property
    def executable(self) -> list[Step]:
        """The steps that are run: all but the separators."""
        return [item for item in self.steps if not isinstance(item, Separator)]

    @property
    def tasks(self) -> list[Step]:
        """What each agent has to do: in a step, as a member of a parallel one, or when it is called."""
        found: list[Step] = []
        for item in self.executable:
            if isinstance(item, Parallel):
                found += [item.member(agent) for agent in item.members]
            else:
                found.append(item)
        return [*found, *(Step(agent=agent) for agent in self.sub_agents)]

    @by_name("workflow.start", *START_OPTIONS)
    def start(self, inputs: Mapping[str, Any] | None = None, **options: Any) -> "Run":
        """Start a run and return it at once.

        Parameters
        ----------
        inputs
            Values of template names, over the workflow's own.
        **options
            Those of :meth:`cm_notebook.run.Run.start`: ``engine, journal, workspace, until, max_concurrency,
            max_cost_usd, max_tokens, max_turns, on_gate, on_waiting, tape, record, loop``.
        """
        from .run import Run  # the run knows the workflow, not the other way round; this is only the short way to it

        run = Run.start(self, inputs, **options)
        run.show_here()
        return run

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        from .render import svg
        from .state import state_of

        state = state_of(self)
        drawn = {"text/html": svg.graph_img(state)} if state.order else {}
        return {"text/plain": svg.graph(state, "text"), **drawn}

    def graph(self, format: Literal["svg", "mermaid", "text"] = "svg") -> str:
        """A picture of the steps: an SVG document, a Mermaid flowchart, or plain text."""
        from .render import svg
        from .state import state_of

        return svg.graph(state_of(self), format)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready data from which :meth:`from_dict` builds the same workflow (functions by name only)."""
        return {**self._data(), "steps": [step_data(item) for item in self.steps]}

    def export(self, path: "str | os.PathLike[str]", *, overwrite: bool = False) -> "Path":
        """Write it to a file, and return the file's path.

        Parameters
        ----------
        path
            ``plan.py``: a Python program with the agents, their functions, tools and outputs, which
            ``cm-notebook run plan.py`` runs. ``plan.json``: :meth:`to_dict` as JSON, with functions by name only. A
            warning says what the file names and does not hold.
        overwrite
            Replace a file that is there and holds something else, which is refused otherwise.

        Raises
        ------
        WorkflowError    The source of a function cannot be got, or the file cannot be written; nothing was.
        """
        from .exports import export_workflow

        return export_workflow(self, path, overwrite=overwrite)

    def _data(self) -> dict[str, Any]:
        return cast("dict[str, Any]", sound(self.model_dump(mode="json", exclude_defaults=True, exclude={"steps"})))

    def kept(self) -> "Workflow":
        """The workflow as a journal has it: checked, functions by name only; no part can be changed from here."""
        return Workflow(**self._data(), steps=self.steps)

    @classmethod
    def from_dict(cls, data: Any, agents: Iterable[Agent] = ()) -> "Workflow":
        """A workflow from :meth:`to_dict`'s data; `agents` supplies the Python functions, by id.

        Raises
        ------
        WorkflowError    The data is not a workflow, or names a function that `agents` does not hold.
        """
        if not isinstance(data, Mapping) or "name" not in data:
            raise WorkflowError("this is not a workflow: a JSON object with 'name' and 'steps' is expected.")
        given = {item.id: item for item in agents}
        merged: list[Agent] = []
        described = data.get("agents", [])
        if not isinstance(described, list) or not all(isinstance(item, (Agent, Mapping)) for item in described):
            raise WorkflowError(f"workflow {data['name']!r}: agents={brief(described)} is not a list of agents.")
        for item in described:
            made = item if isinstance(item, Agent) else Agent(**{"id": "", **item})
            if made.missing is not None:
                if made.id not in given:
                    raise WorkflowError(
                        f"agent {made.id!r} {made.missing}, which cannot be restored from data. "
                        "Run the .py file that defines it, or pass it in Python: "
                        f"cm.Workflow.from_dict(data, agents=[{made.id.replace('-', '_')}])."
                    )
                made = given[made.id]
            merged.append(made)
        known = {item.id for item in merged}
        merged += [item for item in given.values() if item.id not in known]
        return cls(**{**data, "agents": merged})


def _check_agents(workflow: Any, given: Any) -> None:
    """Refuse what is easily taken for a list of agents."""
    where = f"workflow {workflow!r}"
    if isinstance(given, Agent):
        raise WorkflowError(f"{where}: agents is a list, and {given.id!r} is one agent. Write agents=[…].")
    for item in given if isinstance(given, (list, tuple)) else ():
        if callable(item) and not isinstance(item, Agent):
            raise WorkflowError(f"{where}: {_no_agent_yet(item)}")


def _no_agent_yet(function: Any) -> str:
    name = getattr(function, "__name__", type(function).__name__)
    called = name.replace("_", "-") if _NAME.fullmatch(name) else "quality-gate"
    return f'{name} is a function, and no agent yet. Write @cm.agent("{called}") above it.'


def complete_agents(agents: Iterable[Agent], steps: Iterable[AnyStep]) -> list[Agent]:
    """`agents`, and one for each step that has a prompt but no agent of its name."""
    result = list(agents)
    known = {item.id for item in result}
    for item in steps:
        if isinstance(item, Separator) or not item.prompt:
            continue
        for agent in item.agents:
            if agent not in known:
                first = item.prompt if isinstance(item.prompt, str) else item.prompt[0]
                result.append(Agent(id=agent, prompt=first))
                known.add(agent)
    return result


def check(workflow: Workflow) -> None:
    """Refuse what cannot run; every message names the step and what would be right."""
    seen: dict[str, int] = {}
    read_as: dict[str, str] = {}  # the ids by their spelling with "_", which a prompt may use too
    agents: dict[str, Agent] = {}
    for defined in workflow.agents:
        if defined.id in agents:
            raise WorkflowError(f"agent {defined.id!r} is defined twice. Keep one of them, or give one another id.")
        agents[defined.id] = defined
    check_inputs(workflow.inputs)
    for number, name in enumerate(workflow.sub_agents):
        if name not in agents:
            raise WorkflowError(f"sub_agents: {_no_agent(name, workflow.agents)}")
        if name in workflow.sub_agents[:number]:
            raise WorkflowError(f"sub_agents: {name!r} is listed twice.")
    executable: list[Step] = []
    for number, item in enumerate(workflow.steps, 1):
        if isinstance(item, Separator):
            continue
        for name in item.voices:
            _check_id(number, item, name, seen, read_as)
        for name in item.agents:
            if name not in agents:
                raise WorkflowError(f"step {number}: {_no_agent(name, workflow.agents)}")
            if agents[name].implementation is None:
                prompts = item.prompts(agents[name]) if item.prompt != [] else [""]
                if not all(prompt.strip() for prompt in prompts):
                    said = item.id if name == item.agent else name
                    raise WorkflowError(
                        f"step {number} ({said!r}): the prompt is empty. Write what the agent should do."
                    )
        if isinstance(item, Module):
            _check_loop(f"step {number}", item, executable)
        if isinstance(item.context, list):
            for name in item.context:
                if name not in seen:
                    known = did_you_mean(name, seen, "Earlier steps")
                    raise WorkflowError(f"step {number}: context names {name!r}. {known}")
        for name in item.voices:
            seen[name] = number
        executable.append(item)


def _check_id(number: int, item: Step, name: str, seen: Mapping[str, int], read_as: dict[str, str]) -> None:
    """Refuse a name that an earlier step gives its output under, or that a prompt could not tell from it."""
    if name in seen:
        another = "" if isinstance(item, Parallel) else f': cm.step({item.agent!r}, id="{item.id}-2")'
        raise WorkflowError(
            f"step {number}: the id {name!r} is already step {seen[name]}. Give one of them another{another}."
        )
    if (other := read_as.setdefault(name.replace("-", "_"), name)) != name:
        raise WorkflowError(
            f"step {number}: a prompt cannot tell {name!r} from {other!r} (step {seen.get(other, number)}): "
            f"{{{{ {name.replace('-', '_')} }}}} names both. Give one of them another id."
        )
    if name in RESERVED:
        raise WorkflowError(f"step {number}: the id {name!r} is taken by templates. Use another.")


def check_inputs(inputs: Any) -> None:
    """Refuse inputs that a journal cannot keep, by name."""
    if not isinstance(inputs, Mapping):
        raise WorkflowError(
            f"inputs={brief(inputs)} is not a dict of names and values, for instance {{'goal': 'a todo CLI'}}."
        )
    for name, value in inputs.items():
        if not isinstance(name, str) or name in RESERVED:
            raise WorkflowError(f"input {name!r}: an input has a name of its own; {', '.join(RESERVED)} are taken.")
        if (wrong := not_json(value)) is not None:
            raise WorkflowError(
                f"input {name!r} holds {wrong}. An input is text, a number, a list or a dict. "
                f"Pass its text: str({name})."
            )


def _check_loop(where: str, item: Module, before: list[Step]) -> None:
    if item.loop_steps > len(before):
        raise WorkflowError(
            f"{where} ({item.id!r}): loop_steps={item.loop_steps} goes back beyond the start; "
            f"{len(before)} {'step stands' if len(before) == 1 else 'steps stand'} before it."
        )
    inside = [other.id for other in before[len(before) - item.loop_steps :]]
    for name in item.loop_skip:
        if name not in inside:
            raise WorkflowError(
                f"{where} ({item.id!r}): loop_skip names {name!r}. {did_you_mean(name, inside, 'Steps of this loop')}"
            )


def _no_agent(id: str, agents: Iterable[Agent]) -> str:
    return f"agent {id!r} is not defined. {did_you_mean(id, [item.id for item in agents], 'Defined')}"


def _check_name(what: str, name: str) -> None:
    if not _NAME.fullmatch(name):
        raise WorkflowError(
            f"{what} {name!r}: a name starts with a letter and holds letters, digits, '-' and '_', "
            "for instance 'quality-gate'."
        )


_KINDS: dict[str, type[AnyStep]] = {"step": Step, "module": Module, "parallel": Parallel, "separator": Separator}


def as_step(number: int, item: Any) -> AnyStep:
    """A step from a name, from :meth:`Workflow.to_dict`'s data, or as it is; `number` is its place, for the message."""
    if isinstance(item, (Step, Separator)):
        return item
    if isinstance(item, (dict, Mapping)):
        kind = item.get("kind", "step")
        if not isinstance(kind, str) or kind not in _KINDS:
            hint = did_you_mean(str(kind), _KINDS, "Kinds")
            raise WorkflowError(f"step {number}: kind={kind!r} is not known. {hint}")
        try:
            return _KINDS[kind](**{str(name): value for name, value in item.items()})
        except WorkflowError as error:
            if item.get("id") or item.get("agent"):
                raise
            raise WorkflowError(f"step {number}: {str(error).removeprefix(f'{kind}: ')}") from None  # it has no name
    if isinstance(item, str):
        return Step(agent=item)
    if isinstance(item, Agent):
        raise WorkflowError(
            f"step {number}: an agent is not a step. Write its name, {item.id!r}, or cm.step({item.id!r}), and the "
            "agent in agents=[…]."
        )
    if callable(item):
        raise WorkflowError(f"step {number}: {_no_agent_yet(item)} Then write its name here.")
    raise WorkflowError(
        f"step {number}: {brief(item)} is not a step. "
        "Use cm.step(…), cm.module(…), cm.parallel(…), cm.separator(…) or a name."
    )


def step_data(item: AnyStep) -> dict[str, Any]:
    """JSON-ready data from which :func:`as_step` makes the same step."""
    return {"kind": item.kind, **item.model_dump(mode="json", exclude_defaults=True)}


_TOKEN = (
    rf"\s*(?:(?P<arrow>->|→)"
    rf"|(?:(?P<name>{NAME})(?P<rest>\s*\((?P<options>[^()]*)\))?|\[(?P<members>\s*{NAME}(?:\s*\|\s*{NAME})*\s*)\])"
    rf"\s*(?P<ask>\?)?)"
)


def parse_steps(text: str) -> list[AnyStep]:
    """The steps of an arrow string.

    ``a -> b? -> gate(loop 1, max 5, skip a) -> [c | d]``: ``?`` pauses for a person, ``(…)`` makes a module, ``[…]`` a
    parallel step.

    Raises
    ------
    WorkflowError    With the column of what cannot be read.
    """
    steps: list[AnyStep] = []
    position, want_name = 0, True
    while text[position:].strip():
        found = re.compile(_TOKEN).match(text, position)
        start = position + len(text[position:]) - len(text[position:].lstrip())
        if found is None or bool(found["arrow"]) is want_name:
            wanted = "a step's name" if want_name else "'->'"
            example = "planner -> implementer -> quality-gate(loop 1, max 5) -> deployer?"
            if want_name and text[start] == "[":
                start, wanted = _wrong_team(text, start)
                example = "architect -> [programmer | writer]? -> deployer"
            here = repr(text[start : start + 12].strip()) if text[start:].strip() else "the end"
            raise WorkflowError(
                f"steps, column {start + 1}: {wanted} is expected at {here}. Write for instance: {example}"
            )
        if not found["arrow"]:
            steps.append(_arrow_step(found, start))
        want_name = bool(found["arrow"])
        position = found.end()
    if steps and want_name:
        raise WorkflowError(f"steps, column {len(text.rstrip()) + 1}: a step's name is missing after the last '->'.")
    if not steps:
        raise WorkflowError("steps: the line is empty. Write for instance: planner -> implementer -> reviewer?")
    return steps


def _wrong_team(text: str, at: int) -> tuple[int, str]:
    """Where the parallel step that begins there cannot be read on, and what is expected."""
    while True:  # from each '[' and '|' to the next
        at += 1 + len(text[at + 1 :]) - len(text[at + 1 :].lstrip())
        name = _NAME.match(text, at)
        if name is None:
            return at, "an agent's name"
        at = name.end() + len(text[name.end() :]) - len(text[name.end() :].lstrip())
        if text[at : at + 1] != "|":
            return at, "'|' or ']'"


def _arrow_step(found: re.Match[str], start: int) -> AnyStep:
    interactive = True if found["ask"] else None
    if found["members"] is not None:
        return Parallel(members=[name.strip() for name in found["members"].split("|")], interactive=interactive)
    if found["rest"] is None:
        return Step(agent=found["name"], interactive=interactive)
    options: dict[str, Any] = {}
    names = {"loop": "loop_steps", "max": "loop_max_iterations", "skip": "loop_skip"}
    for part in filter(None, (" ".join(piece.split()) for piece in found["options"].split(","))):
        key, _, value = part.partition(" ")
        if key not in names:
            raise WorkflowError(
                f"steps, column {start + 1}: {found['name']}({part}) is not understood. "
                + did_you_mean(key, names, "Options")
            )
        if key == "skip":
            options["loop_skip"] = value.split()
        elif re.fullmatch("[0-9]{1,9}", value):
            options[names[key]] = int(value)
        else:
            raise WorkflowError(
                f"steps, column {start + 1}: {found['name']}({part}): a number is expected after {key!r}."
            )
    return Module(agent=found["name"], interactive=interactive, **options)
