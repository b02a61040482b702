"""What can happen in a run: facts, in the past tense, and nothing about screens.

Strategy: a run *is* the list of these events. Each is a small pydantic model told apart by ``type``; ``seq`` (1, 2, 3 …
within the run) and ``at`` (Unix time in seconds) are given by the journal when the event is recorded. A text is stored
in one event only; whoever needs it again holds a ``Ref`` to that event. What an event *means* is said in ``state.py``.

Annotations are evaluated here, as in ``workflow.py``: from text, pydantic would compile each of them at every import.
"""

import json
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple, Self, get_args

from pydantic import BaseModel, ConfigDict, Field
from pydantic_core import to_json

from . import keys
from .errors import CodeMachineError
from .plain import Plain
from .workflow import Amount, AutonomousMode, Count, GateDefault, Model, Verdict, Workflow, Written, fill

Mode = Literal["step-by-step", "gates", "unattended"]
"""Who drives: a pause after every step, a pause where a step asks for one, or no pause at all."""

RunEnd = Literal["completed", "stopped", "failed"]

GateKind = Literal[
    "review", "start", "verdict", "exhausted", "failed", "stale", "question", "permission", "may_have_run", "budget"
]
Action = Literal["approve", "reject", "retry", "skip", "answer", "stop"]
Scope = Literal["once", "run", "always"]
"""For how long a permission counts: for this call, for this tool in this run, for this tool for ever."""
GATE_DEADLINE = "deadline"
"""Who decided at a gate that nobody has answered in time."""

ACTIONS: dict[GateKind, tuple[Action, ...]] = {
    "review": ("approve", "reject", "skip", "stop"),
    "start": ("approve", "skip", "stop"),
    "verdict": ("approve", "reject", "retry", "skip", "stop"),
    "exhausted": ("approve", "retry", "skip", "stop"),
    "failed": ("retry", "skip", "stop"),
    "stale": ("approve", "retry", "skip", "stop"),
    "question": ("answer", "stop"),
    "permission": ("approve", "reject", "stop"),
    "may_have_run": ("approve", "retry", "skip", "stop"),
    "budget": ("approve", "stop"),
}
"""What may be decided at each kind of gate."""

EDITABLE: tuple[GateKind, ...] = ("review", "start", "exhausted", "permission")
"""Where approving may carry an edited text; for a permission, the arguments as a JSON object."""
ASKED_BY_TURNS: tuple[GateKind, ...] = ("question", "permission")
"""Those that a turn opens in its midst, and for whose answer it waits."""
NO_FILES = "4b825dc642cb6eb9a060e54bf8d69288fbee4904"
"""The snapshot of a folder without a file: git's id of the empty tree."""
HISTORY = "history"
"""The session of an engine that keeps none, and is told the whole conversation each time, as the events have it."""
NOT_CALLED = "offline: no model was called"
"""The note of a turn whose answer is no agent's."""
OTHER_WORDS = "your words reached no model"
"""So ends the note of a turn whose answer was recorded for another prompt."""


class Ref(NamedTuple):
    """A text that stands in another event: which event, and which of its texts (``""``: the answer of a turn)."""

    seq: int
    name: str = ""


@dataclass(slots=True, eq=False, repr=False)
class FileChange(Plain):
    """A file that differs between two snapshots of the workspace.

    Attributes
    ----------
    path, old_path
        Relative to the workspace, with ``/``; ``old_path`` is what one that was renamed was called.
    kind
        What became of it. ``mode``: only its type or its permissions changed.
    added, removed
        Lines; ``None`` when it is no text, or too large to be compared.
    """

    path: str
    kind: Literal["added", "deleted", "modified", "renamed", "mode"]
    old_path: str | None = None
    added: int | None = None
    removed: int | None = None


Part = str | Ref
"""A piece of a prompt: literal text, or where the text stands."""


class Fact(BaseModel):
    """Base of what is written to the journal: unknown keys are refused, so damage is noticed."""

    model_config = ConfigDict(extra="forbid", defer_build=True)


class Usage(Fact):
    """Tokens that a turn used; ``estimated`` when we counted instead of the service."""

    input_tokens: int = 0
    output_tokens: int = 0
    estimated: bool = False

    def __init__(self, **data: Any) -> None:
        fill(self, data)

    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]  # a journal is read past it, as other facts are

    def __add__(self, other: "Usage") -> "Usage":
        """Both together."""
        return Usage(
            input_tokens=self.input_tokens + other.input_tokens,
            output_tokens=self.output_tokens + other.output_tokens,
            estimated=self.estimated or other.estimated,
        )

    def __sub__(self, other: "Usage") -> "Usage":
        """What is more than `other`."""
        return Usage(
            input_tokens=self.input_tokens - other.input_tokens,
            output_tokens=self.output_tokens - other.output_tokens,
            estimated=self.estimated,
        )


class ErrorInfo(Fact):
    """An error as it is kept: its class, its one line, and more to read."""

    kind: str
    message: str
    detail: str | None = None


class Gate(Fact):
    """A pause for a decision. It is on disk before anyone sees it.

    Attributes
    ----------
    id
        ``run/path/attempt/ordinal``; whoever decides must name it.
    kind
        What is to be decided: whether an output is right (``review``), a prompt is sent (``start``) or a verdict counts
        (``verdict``); what to do where a loop is used up (``exhausted``), a step has failed (``failed``), was made from
        what is another now (``stale``) or may have had its effect before a crash (``may_have_run``), or a limit is
        reached (``budget``); whether a tool may be called (``permission``); a question of an agent's (``question``).
    step, path, attempt
        At which step it is, and at which of its attempts; ``path`` is another than the step's id where an agent that
        the step called is meant: ``coordinator/frontend-dev#1``.
    payload
        What the person should know: ``reason``, ``question``, ``error``, ``note``; of a permission ``tool`` and its
        ``arguments``.
    digest
        SHA-256 of the text that is decided about; what was approved is what runs.
    actions
        The decisions that are possible; the first one is that which goes on.
    timeout_s
        Seconds after which it is decided without a person; ``None``: it waits for ever.
    default
        What is decided then; ``None``: the run stops. Never ``approve``.
    opened_at, deadline
        Unix time in seconds; the deadline is when `timeout_s` is over.
    """

    id: str
    kind: GateKind
    step: str
    path: str
    attempt: int
    payload: dict[str, Any] = Field(default_factory=dict)
    digest: str
    actions: tuple[Action, ...]
    timeout_s: float | None = None
    default: GateDefault | None = None
    opened_at: float = Field(default=0.0, exclude=True)
    deadline: float | None = Field(default=None, exclude=True)


class Decision(Model):
    """The answer to a gate.

    Attributes
    ----------
    action
        One of the gate's ``actions``.
    feedback
        Why it is rejected, or the answer to a question.
    output
        The edited text to go on with (approve); at ``start`` the prompt to send, at ``permission`` the arguments, as a
        JSON object.
    prompt
        The edited prompt to try again with (retry).
    count
        How many more iterations (retry at ``exhausted``).
    scope
        For how long a tool is allowed (approve at ``permission``): ``once``, ``run``, ``always``; ``None``: once.
    max_cost_usd, max_tokens, max_turns
        How much more may be used, in US dollars, tokens and prompts sent (approve at ``budget``); ``None``: the same
        amount again.
    by
        Who decided: ``"you"``, ``"tape"``, ``"on_gate"``, ``"unattended mode"``, ``"deadline"`` …
    at
        Unix time in seconds; set when it is recorded.
    """

    action: Action
    feedback: str | None = None
    output: str | None = None
    prompt: str | None = None
    count: Count = Field(default=1, ge=1)
    scope: Scope | None = None
    max_cost_usd: Amount | None = Field(default=None, gt=0, allow_inf_nan=False)
    max_tokens: Count | None = Field(default=None, ge=1)
    max_turns: Count | None = Field(default=None, ge=1)
    by: str = "you"
    at: float = Field(default=0.0, exclude=True)


class Placed:
    """Kind, place and time of a fact: columns of the journal and no fields, so the body leaves them out.

    Nobody but :func:`place` gives them. (In the model itself, or as its fields, pydantic would look at them again for
    each kind of event, at every import.)
    """

    type = ""
    seq = 0
    at = 0.0
    _all = set[str]()  # noqa: RUF012 - an annotation would make it a field

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls.type = cls.__name__


class BaseEvent(Placed, Fact):
    """A fact with its kind, place and time."""

    @classmethod
    def __pydantic_init_subclass__(cls, **options: Any) -> None:
        super().__pydantic_init_subclass__(**options)
        cls._all = {*cls.model_fields}

    @classmethod
    def made(cls, **parts: Any) -> Self:
        """The event with all of its fields, in their order, of which each is known to be what it has to be.

        Nothing is checked again: for the two events of every step, of which checking takes more time than making.
        """
        if not cls.__pydantic_complete__:  # building waits for the first one that is checked, and there may be none
            cls.model_rebuild()
        event = cls.__new__(cls)
        put = object.__setattr__  # a model's own looks for fields
        put(event, "__dict__", parts)
        put(event, "__pydantic_fields_set__", cls._all)
        put(event, "__pydantic_extra__", None)
        put(event, "__pydantic_private__", None)
        return event


class RunStarted(BaseEvent):
    """The run exists. ``recorded``: the name under which its tape was recorded.

    ``limits``: what it may use, by option, where that is not as the workflow says.
    """

    run_id: str
    workflow: Annotated[Workflow, Written(Workflow.to_dict)]
    inputs: dict[str, Any] = Field(default_factory=dict)
    fingerprints: dict[str, str] = Field(default_factory=dict)
    until: str | None = None
    workspace: str | None = None
    recorded: str | None = None
    max_concurrency: int | None = None
    limits: dict[str, int | float] | None = None


class RunResumed(BaseEvent):
    """The run goes on after it had ended or its process had died."""

    by: str = "you"
    reason: str = ""
    until: str | None = None


class RunPaused(BaseEvent):
    """Nothing new starts until ``RunUnpaused``; what runs may finish."""

    reason: str = ""


class RunUnpaused(BaseEvent):
    """The run goes on, up to and including the step ``until`` when that is given.

    ``once``: as far as that step has run once, even if it is a module that sends the run back.
    """

    until: str | None = None
    once: bool = False


class ModeChanged(BaseEvent):
    """Somebody else drives from now on."""

    mode: Mode


class RunFinished(BaseEvent):
    """Nothing goes on by itself any more."""

    status: RunEnd
    reason: str = ""


class WorkflowChanged(BaseEvent):
    """The workflow is defined anew, beyond its steps; what is not named here is as it was.

    ``defaults``: inputs whose value is another one in the definition; ``inputs``: those that were given besides.
    ``engine``: ``""`` where the definition names none any more; ``agents``: the sub-agents that are others now.
    ``limits``: what may be used in all, by option, as a person says now; ``default_limits``: as the definition does,
    ``None`` of a limit that it has no more.
    """

    inputs: dict[str, Any] = Field(default_factory=dict)
    defaults: dict[str, Any] = Field(default_factory=dict)
    autonomous_mode: AutonomousMode | None = None
    engine: str | None = None
    sub_agents: list[str] | None = None
    agents: list[dict[str, Any]] = Field(default_factory=list)
    max_concurrency: int | None = None
    limits: dict[str, int | float] | None = None
    default_limits: dict[str, int | float | None] | None = None


class StepAdded(BaseEvent):
    """A step was put first, after the step ``after``, or last; with agents and inputs that came with it."""

    step: dict[str, Any]
    after: str | None = None
    first: bool = False
    agents: list[dict[str, Any]] = Field(default_factory=list)
    inputs: dict[str, Any] = Field(default_factory=dict)
    fingerprint: str


class StepChanged(BaseEvent):
    """A step is defined anew; if it had run, its output is stale now."""

    step: dict[str, Any]
    agents: list[dict[str, Any]] = Field(default_factory=list)
    inputs: dict[str, Any] = Field(default_factory=dict)
    fingerprint: str


class StepRemoved(BaseEvent):
    """The step is no longer part of the workflow."""

    step: str


class StepSkipped(BaseEvent):
    """The step was passed over by rule; an output it had is kept."""

    step: str
    path: str
    reason: str


class StepOutdated(BaseEvent):
    """What the step waited with was made before the earlier step ``by`` ran again: it is made again."""

    step: str
    path: str
    by: str


class TurnStarted(BaseEvent):
    """A prompt was sent. The text is that of ``prompt`` and then ``context``; ``digest`` is its SHA-256."""

    step: str
    path: str
    attempt: int
    turn: int = 1
    iteration: int = 1
    prompt: tuple[Part, ...] = ()
    context: tuple[Part, ...] | None = None
    digest: str
    session_id: str | None = None
    engine: str


class SessionOpened(BaseEvent):
    """The agent said by which id its conversation can be continued, whatever becomes of the turn."""

    step: str
    path: str
    attempt: int
    turn: int = 1
    session_id: str


class ToolCalled(BaseEvent):
    """The agent called a tool; ``arguments``: as JSON, or as it wrote them; long ones are cut in the middle."""

    step: str
    path: str
    attempt: int
    turn: int = 1
    call_id: str
    name: str
    arguments: str = ""


class ToolReturned(BaseEvent):
    """What the agent was told of that call, cut in the middle; ``failed``: it raised, was refused, or was no call."""

    step: str
    path: str
    attempt: int
    turn: int = 1
    call_id: str
    name: str
    text: str
    failed: bool = False


class UsageReported(BaseEvent):
    """What the turn has used so far, where it goes on; the event that ends it says the whole of it again."""

    step: str
    path: str
    attempt: int
    turn: int = 1
    usage: Usage | None = None
    cost_usd: float | None = None
    cost_estimated: bool | None = None


class TurnFinished(BaseEvent):
    """The agent answered. ``duration_s`` only where it was not measured here (a tape); ``note`` is said beside it.

    ``cost_estimated``: the cost was computed from a table of prices.
    """

    step: str
    path: str
    attempt: int
    turn: int = 1
    text: str
    output: Any = None
    verdict: Verdict | None = None
    usage: Usage | None = None
    cost_usd: float | None = None
    cost_estimated: bool | None = None
    session_id: str | None = None
    duration_s: float | None = None
    note: str | None = None


class TurnFailed(BaseEvent):
    """The turn failed; it is tried again in ``retry_in_s`` seconds, or (``None``) not unasked.

    ``usage``, ``cost_usd``: what it is known to have used; that is paid all the same. ``duration_s``: as of
    ``TurnFinished``.
    """

    step: str
    path: str
    attempt: int
    turn: int = 1
    error: ErrorInfo
    retry_in_s: float | None = None
    usage: Usage | None = None
    cost_usd: float | None = None
    cost_estimated: bool | None = None
    duration_s: float | None = None


class TurnCutShort(BaseEvent):
    """The turn was stopped, or its process died, before it ended; ``usage``, ``cost_usd``: as of ``TurnFailed``."""

    step: str
    path: str
    attempt: int
    turn: int = 1
    reason: str = ""
    usage: Usage | None = None
    cost_usd: float | None = None
    cost_estimated: bool | None = None


class GateOpened(BaseEvent):
    """The run waits for a decision. ``prompt`` and ``context``: the prompt that a ``start`` gate asks about."""

    gate: Gate
    prompt: tuple[Part, ...] | None = None
    context: tuple[Part, ...] | None = None


class GateDecided(BaseEvent):
    """The gate has its answer, the only one it will ever have."""

    gate_id: str
    decision: Decision


class CalledAgent(Fact):
    """One agent that another one called, or that works in a parallel step.

    ``path``: its place in the run, ``caller/agent#n``; of one that was called in a turn that did not end, its old one:
    what it did counts. ``files``: names of the texts that it is given; ``tail``: how many lines of its answer go back.
    """

    agent: str
    path: str
    prompt: str = ""
    files: tuple[str, ...] = ()
    tail: int | None = None


class TellingFailed(BaseEvent):
    """Somebody should have been told that the gate is open (``on_waiting``), and was not."""

    gate_id: str
    reason: str


class AgentsCalled(BaseEvent):
    """The step's turn waits for other agents: groups one after the other, the members of a group side by side.

    ``call``: which call of this step it is, from 1; ``files``: the input files, as they were read; ``attempt``: the one
    it belongs to, which of a parallel step begins with it.
    """

    step: str
    path: str
    attempt: int
    call: int
    groups: list[list[CalledAgent]]
    files: dict[str, str] = Field(default_factory=dict)
    max_concurrency: int | None = None


class TurnWentOn(BaseEvent):
    """A called agent that had asked a person has the answer, and a place to go on working at."""

    step: str
    path: str
    gate_id: str


class AgentsReturned(BaseEvent):
    """The agents that the step had called have all ended, or are not waited for any more."""

    step: str
    path: str
    call: int


class StepFailed(BaseEvent):
    """A called agent has failed for good, as nobody was there to decide about it; its caller is told."""

    step: str
    path: str
    reason: str


class SnapshotTaken(BaseEvent):
    """The workspace was kept as it was; not recorded where there is no file and was none.

    ``when``: before an attempt or one of its chained prompts, after it, or (``kept``) before files are taken back.
    ``before``: what ``changes`` and ``diff`` begin from; ``total``: the number of changes, of which many are not all
    listed; ``unread``: files that could not be read, and are not in it as they are now.
    """

    step: str
    path: str
    attempt: int
    when: Literal["before", "after", "kept"]
    tree: str
    before: str | None = None
    changes: tuple[FileChange, ...] = ()
    total: int = 0
    diff: str = ""
    unread: tuple[str, ...] = ()


class SnapshotFailed(BaseEvent):
    """The workspace could not be kept. ``lasting``: there is no git, so it is so for the whole run."""

    step: str
    path: str
    attempt: int
    reason: str
    lasting: bool = False


class WorkspaceRestored(BaseEvent):
    """The files are again as they were in the snapshot ``tree``; the attempt begins with them."""

    step: str
    path: str
    attempt: int
    tree: str


class LoopedBack(BaseEvent):
    """A module sent the run back to the step ``to``; ``iteration`` is the pass that begins."""

    module: str
    to: str
    iteration: int
    reason: Part = ""


class Rewound(BaseEvent):
    """The step ``to`` runs again; later outputs are stale, or (``later``) are made again too.

    ``afresh``: as if ``to`` and all after it had never run; the run is paused before it.
    """

    to: str
    later: bool = False
    afresh: bool = False


class RunForked(BaseEvent):
    """From here on this is a run of its own, ``run_id``; all before it is shared with the run ``of``, at ``step``.

    ``recorded``: as of ``RunStarted``, for what comes.
    """

    run_id: str
    of: str
    step: str
    workspace: str | None = None
    recorded: str | None = None


AnyEvent = (
    RunStarted
    | RunResumed
    | RunPaused
    | RunUnpaused
    | ModeChanged
    | RunFinished
    | WorkflowChanged
    | StepAdded
    | StepChanged
    | StepRemoved
    | StepSkipped
    | StepOutdated
    | TurnStarted
    | SessionOpened
    | ToolCalled
    | ToolReturned
    | UsageReported
    | TurnFinished
    | TurnFailed
    | TurnCutShort
    | GateOpened
    | GateDecided
    | TellingFailed
    | AgentsCalled
    | AgentsReturned
    | TurnWentOn
    | StepFailed
    | SnapshotTaken
    | SnapshotFailed
    | WorkspaceRestored
    | LoopedBack
    | Rewound
    | RunForked
)
TYPES: dict[str, type[BaseEvent]] = {kind.__name__: kind for kind in get_args(AnyEvent)}
"""The kinds of event, by name."""


def body(event: BaseEvent) -> str:
    """The event as JSON, without what the journal keeps in columns."""
    return to_json(event, exclude_none=True).decode()


def without_keys(event: AnyEvent) -> AnyEvent:
    """The event, with no key of a service in it, whoever may have written one."""
    known = keys.known()
    if not known:
        return event
    secrets = [json.dumps(secret)[1:-1] for secret in known]
    text = body(event)
    if not any(secret in text for secret in secrets):
        return event
    for secret in secrets:
        text = text.replace(secret, keys.SHOWN)
    return read(event.type, event.seq, event.at, text)


def place(event: BaseEvent, seq: int, at: float) -> None:
    """Give `event` its place and time."""
    own = event.__dict__
    own["seq"], own["at"] = seq, at


def read(type_name: str, seq: int, at: float, text: str) -> AnyEvent:
    """The event that :func:`body` wrote.

    Raises
    ------
    ValueError    The kind is unknown or the body does not fit it (pydantic's ``ValidationError`` is a ``ValueError``).
    """
    kind = TYPES.get(type_name)
    if kind is None:
        raise ValueError(f"event {seq} has the unknown type {type_name!r}")
    try:
        event = kind.model_validate_json(text)
    except CodeMachineError as error:
        raise ValueError(str(error)) from None
    place(event, seq, at)
    return event  # type: ignore[return-value]
