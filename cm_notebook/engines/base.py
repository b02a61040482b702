"""The one narrow seam between a run and whoever does the work.

Strategy: an engine turns a prompt into a stream of agent events, and knows nothing of workflows, gates or journals. It
translates foreign errors into ``EngineError`` once, here in ``engines/``; any other exception is a bug and surfaces.
Where a turn needs something of its run (to ask a person), it calls what the request carries.
"""

from __future__ import annotations

import abc
import functools
import importlib.metadata
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol, TypeGuard, runtime_checkable

from pydantic import BaseModel

from .. import config, keys
from ..errors import EngineError, EngineNotFound, WorkflowError, did_you_mean
from ..events import HISTORY, Usage
from ..plain import Plain, not_json
from ..team import AgentResult
from ..tools import Permission
from ..workflow import Agent, Verdict


@dataclass(slots=True, eq=False, repr=False)
class AgentRequest(Plain):
    """One turn to be done.

    Attributes
    ----------
    agent
        Who is asked; with its function, its tools, and the class that its output must fit.
    prompt
        The exact text, templates filled in.
    step, path, attempt, turn, iteration
        Which turn of the run this is; numbers count from 1.
    ordinal
        Which turn of this agent in the run, over all its steps and attempts, from 1. Turns that ended count, by an
        answer or an error; one that was cut short does not, so a resumed run counts on where it was. 0: not known.
    failures
        How often this turn has failed before and was tried again by itself.
    feedback
        Why the last attempt was rejected, or why a module sent the run back; ``None`` in a first attempt.
    inputs, outputs
        The run's inputs, and the approved texts by step.
    workspace
        Folder to work in; absolute.
    session_id
        The agent's own conversation to continue.
    history
        The prompts and answers that came before in this conversation (chained prompts, and what was rejected), for
        engines that keep none of their own. After a rejection the prompt itself holds what an engine needs that has
        said nothing of a session.
    timeout_s
        Seconds the turn may take. The run enforces it; an engine may pass it on.
    emit
        Shows text now, from any thread; for agents that speak beside their stream.
    ask_human
        Asks a person and returns the answer; waiting is not counted in `timeout_s`.
    may_ask
        Whether its model should be told that it can: not where the person said not to be asked.
    sub_agents
        Ids of the agents that this turn may call; where there are none, its agent needs no tool for it.
    run_agents
        Has other agents work and returns what came of each; waiting is not counted. What is asked is a list of groups
        or a line, as for :func:`~cm_notebook.team.checked_calls`; then how many may work at the same time, or ``None``.
        Raises ``WorkflowError`` if it cannot be: an engine tells its model so.
    ask_permission
        Asks a person whether a tool may be called with these arguments. ``None``: nobody can be asked, so a tool that
        needs permission is refused.
    await_budget
        Returns as soon as the turn may use more: where a limit is reached a person is asked, and waiting is not
        counted. To be awaited before a model is called again in the same turn. ``None``: there are no limits.
    """

    agent: Agent
    prompt: str
    step: str
    path: str
    attempt: int = 1
    turn: int = 1
    iteration: int = 1
    ordinal: int = 0
    failures: int = 0
    system: str | None = None
    model: str | None = None
    reasoning_effort: str | None = None
    session_id: str | None = None
    history: Sequence[tuple[str, str]] = ()
    feedback: str | None = None
    inputs: Mapping[str, Any] = field(default_factory=dict)
    outputs: Mapping[str, str] = field(default_factory=dict)
    workspace: Path = Path()
    timeout_s: float | None = None
    emit: Callable[[str], None] | None = None
    ask_human: Callable[[str], Awaitable[str]] | None = None
    may_ask: bool = True
    sub_agents: tuple[str, ...] = ()
    run_agents: Callable[..., Awaitable[list[AgentResult]]] | None = None
    ask_permission: Callable[[str, Mapping[str, Any]], Awaitable[Permission]] | None = None
    await_budget: Callable[[], Awaitable[None]] | None = None


@dataclass(slots=True, eq=False, repr=False)
class Delta(Plain):
    """A piece of what is written: of the answer, or of the thinking before it. Live only, never journaled."""

    text: str
    kind: Literal["text", "thinking"] = "text"


@dataclass(slots=True, eq=False, repr=False)
class SessionStarted(Plain):
    """The agent's conversation has this id and can be continued.

    Without an id: the engine keeps none, but sends ``AgentRequest.history`` each time. Once a turn has ended so, the
    prompt after a rejection is the person's feedback alone.
    """

    session_id: str = HISTORY


@dataclass(slots=True, eq=False, repr=False)
class ToolCalled(Plain):
    """The agent calls a tool. ``arguments`` is the text it wrote when that cannot be read as a JSON object."""

    call_id: str
    name: str
    arguments: dict[str, Any] | str


@dataclass(slots=True, eq=False, repr=False)
class ToolReturned(Plain):
    """What the agent was told of that call; ``failed``: the tool raised, was refused, or could not be called."""

    call_id: str
    name: str
    text: str
    failed: bool = False


@dataclass(slots=True, eq=False, repr=False)
class UsageReported(Plain):
    """What the turn used so far; the last report counts.

    ``cost_estimated``: the cost was computed from a table of prices; the service did not say it.
    """

    usage: Usage
    cost_usd: float | None = None
    cost_estimated: bool = False


@dataclass(slots=True, eq=False, repr=False)
class TurnDone(Plain):
    """The whole answer. Every stream ends with exactly one.

    ``output``: a validated value (JSON-ready) when the agent gave one; ``model``: its class, where the agent says none
    (``Agent.output``): a person's edit must fit it too. ``verdict``: when the agent gave one apart from
    its text; engines whose agents only write leave ``None``, and the run reads a module's text (``Verdict.from_text``).
    ``duration_s``: only when it was not measured now (a tape). ``note``: one line that the view says beside the answer.
    ``unsent``: nobody was asked, so the text is no answer, and need not fit the agent's ``output``. ``unpriced``: it is
    not known what it cost, though the engine is free now (a tape).
    """

    text: str
    output: Any = None
    model: type[BaseModel] | None = None
    verdict: Verdict | None = None
    duration_s: float | None = None
    note: str | None = None
    unsent: bool = False
    unpriced: bool = False


AgentEvent = Delta | SessionStarted | ToolCalled | ToolReturned | UsageReported | TurnDone


def _is_amount(value: Any) -> bool:
    """Whether it is a number from 0 on: with ``nan``, or less than nothing, a budget would never be used up."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < math.inf


def _is_usage(value: Any) -> bool:
    return isinstance(value, Usage) and value.input_tokens >= 0 and value.output_tokens >= 0


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_model(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, BaseModel)


def _is_arguments(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, dict) and not_json(value) is None)


_PARTS: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(("text", "session_id", "call_id", "name", "note"), (_is_text, "a text")),
    "arguments": (_is_arguments, "a JSON object or a text"),
    "usage": (_is_usage, "a cm.Usage with numbers of tokens"),
    "cost_usd": (_is_amount, "an amount of US dollars"),
    **dict.fromkeys(("duration_s", "delay_s"), (_is_amount, "a number of seconds")),
    "model": (_is_model, "a pydantic class"),
    "verdict": (lambda value: isinstance(value, Verdict), "a cm.Verdict"),
    **dict.fromkeys(("failed", "unsent", "unpriced"), (lambda value: isinstance(value, bool), "True or False")),
}
"""What the parts of events have to be, by name; ``None`` is right where it is the default."""


@functools.lru_cache(maxsize=64)
def _parts_of(kind: type[Any]) -> tuple[tuple[str, Any, Callable[[Any], bool]], ...]:
    """Of a kind of agent event, the parts that are checked: name, default, and the check of any other value."""
    return tuple(
        (name, part.default, _PARTS[name][0]) for name, part in kind.__dataclass_fields__.items() if name in _PARTS
    )


def misfit(told: Any) -> str | None:
    """Which part of an agent event is not what it has to be: "cost_usd=nan, which is not an amount of US dollars"."""
    kind: Any = type(told)
    for name, default, fits in _parts_of(kind):
        value = getattr(told, name)
        if value is not default and not fits(value):
            return f"{name}={repr(value)[:100]}, which is not {_PARTS[name][1]}"
    return None


@runtime_checkable
class Engine(Protocol):
    """Turns a prompt into a stream of agent events.

    Two more attributes count where there is a limit on cost (``max_cost_usd``), if an engine has them: ``free``, true
    of one that never costs anything; and ``unpriced(model)``, which returns why the cost of a turn with that model
    would not be known, or ``None``. Of any other engine, a turn that ends without a cost has one that is not known.
    ``about`` and ``remedy`` are what the doctor says of it: where it is, and what to do before it can be used (``""``:
    nothing).
    """

    name: str

    def stream(self, request: AgentRequest) -> AsyncIterator[AgentEvent]:
        """Do one turn and yield what the agent does, as it does it.

        Yields
        ------
        AgentEvent
            Any number of ``Delta``, ``SessionStarted``, ``ToolCalled``, ``ToolReturned``, ``UsageReported``, then one
            ``TurnDone``.

        Raises
        ------
        EngineError    The turn failed; the kind says whether trying again may help.
        """
        ...


class Streamless(abc.ABC):
    """Base of an engine of ours that tells nothing but its answer: the run asks for that alone, and needs no stream."""

    @abc.abstractmethod
    async def answer(self, request: AgentRequest) -> TurnDone:
        """Do one turn; as :meth:`Engine.stream`."""

    async def stream(self, request: AgentRequest) -> AsyncIterator[AgentEvent]:
        """The same as a stream of one event."""
        yield await self.answer(request)


_engines: dict[str, Engine] = {}


def register_engine(engine: Engine) -> None:
    """Make `engine` known under its ``name``; one of the same name is replaced.

    Raises
    ------
    WorkflowError    It is no engine.
    """
    if not is_engine(engine):
        raise WorkflowError(
            f"cm.register_engine: {engine!r} is no engine: an object with a name and a method stream, for instance "
            "cm.register_engine(Echo())."
        )
    _engines[engine.name] = engine


def is_engine(thing: object) -> TypeGuard[Engine]:
    """Whether it is one; the class of one is not."""
    return isinstance(thing, Engine) and not isinstance(thing, type) and isinstance(thing.name, str)


def engine_names() -> list[str]:
    """The engines that can be named: registered ones, and those that installed packages offer."""
    offered = importlib.metadata.entry_points(group="cm_notebook.engines")
    return sorted({*_engines, *(point.name for point in offered)})


def unpriced(engine: Engine, model: str | None) -> str | None:
    """Why the cost of a turn would not be known, if that is known now; else ``None``."""
    ask = getattr(engine, "unpriced", None)
    found: str | None = ask(model) if ask is not None else None
    return found


def offered_by(name: str) -> str:
    """The package that offers an engine of that name; ``""``: none, it was registered."""
    points = importlib.metadata.entry_points(group="cm_notebook.engines", name=name)
    return next((point.dist.name for point in points if point.dist is not None), "")


class _WithModel:
    """An engine with the model that was named along with it, for requests that name none."""

    def __init__(self, engine: Engine, model: str) -> None:
        self.name, self._engine, self._model = engine.name, engine, model
        self.free = getattr(engine, "free", False)

    def unpriced(self, model: str | None) -> str | None:
        return unpriced(self._engine, model or self._model)

    def stream(self, request: AgentRequest) -> AsyncIterator[AgentEvent]:
        return self._engine.stream(request if request.model else replace(request, model=self._model))


def find_engine(name: str) -> Engine:
    """The engine of that name; ``"openai:gpt-5-mini"`` is the engine and the model of those who name none.

    Raises
    ------
    EngineNotFound    Nobody offers it; the message lists who is there.
    EngineError       The package that offers it cannot be loaded.
    """
    name, _, model = name.partition(":")
    if model:
        return _WithModel(find_engine(name), model)
    if name not in _engines:
        for point in importlib.metadata.entry_points(group="cm_notebook.engines", name=name):
            register_engine(_loaded(point))
            break
        else:
            raise EngineNotFound(
                f"there is no engine {name!r}. {did_you_mean(name, engine_names(), 'Engines')} "
                "A package that offers one registers it in the entry-point group 'cm_notebook.engines'.",
                engine=name,
            )
    return _engines[name]


def _loaded(point: importlib.metadata.EntryPoint) -> Engine:
    """The engine of a package, which may do anything when it is imported."""
    try:
        engine: Engine = point.load()()
    except (Exception, SystemExit) as error:
        package = point.dist.name if point.dist is not None else point.value
        said = keys.hide(" ".join(str(error).split()))[:300]
        raise EngineError(
            f"the engine {point.name!r} of the package {package} cannot be loaded: {type(error).__name__}: "
            f"{said}. Update it (pip install -U {package}), or name another engine.",
            engine=point.name,
        ) from error
    return engine


def configured_engine() -> Engine:
    """The engine of those who name none.

    Raises
    ------
    EngineNotFound    Nobody offers it; the message says also where that name was written.
    """
    name, where = config.lookup("engine")
    try:
        return find_engine(name)
    except EngineNotFound as error:
        raise EngineNotFound(f"{where}={name!r}: {error}", engine=error.engine) from None
