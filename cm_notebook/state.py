"""What the events mean, and what to do next. No I/O, no clock, no randomness: the same events give the same run.

Rule 1: everything that decides about a run lives in this file. Whoever shows, stores or executes only asks.
Rule 2: ``apply(state, event)`` checks first and changes after. An illegal event raises ``TransitionError`` and nothing
        has happened. Whether an event may come at all, and what it may make of its step, stands in ``TRANSITIONS``;
        what it may make of other steps stands in ``SWEPT``.
Rule 3: ``next_actions(state)`` only looks: at the step under the cursor, whose status says what it needs.

A step goes through these statuses (``running`` to ``finished`` is one *attempt*):

    pending ──────► running ──────► finished          waiting: its gate is open
       │ ▲          │  ▲ │  ▲          │              due:     its gate is to be opened
       │ └─looping◄─┤  │ │  └─ready ◄──┤              ready:   goes on, or begins its next attempt
       ▼            ▼  │ ▼             │              asking:  somebody is asked while the turn runs
    waiting ◄──── due  │ asking,       │              calling: waits for the agents it has called
       └───► ready,    │ calling       │              retrying: begins again by itself, at ``retry_at``
             finished, skipped, looping               looping: will send the run back

An agent that another one calls, or that works in a parallel step, is a *member*: a ``StepState`` of its own, held to
the same table, at a path below its caller's. Members wait in line for one of the run's places (``max_concurrency``).
One that calls others, or asks a person, gives its place back until it is answered. All that is needed to say who is
next is kept as it changes: see "members" below.

A turn is not started when the run, or its step, has used what it may (``Budget``): the step that comes next waits at
a ``budget`` gate, and while that is open nothing starts; see "budgets".

The cursor stands on the first step that is not settled. Nothing here scans or copies what grows with the run.
"""

from __future__ import annotations

import hashlib
import heapq
import json
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, cast

from .errors import AlreadyDecided, TransitionError, WorkflowError, did_you_mean
from .events import (
    ACTIONS,
    ASKED_BY_TURNS,
    EDITABLE,
    GATE_DEADLINE,
    Action,
    AgentsCalled,
    AgentsReturned,
    AnyEvent,
    CalledAgent,
    Decision,
    ErrorInfo,
    Gate,
    GateDecided,
    GateKind,
    GateOpened,
    LoopedBack,
    Mode,
    ModeChanged,
    Part,
    Ref,
    Rewound,
    RunEnd,
    RunFinished,
    RunPaused,
    RunResumed,
    RunStarted,
    RunUnpaused,
    SessionOpened,
    StepAdded,
    StepChanged,
    StepFailed,
    StepRemoved,
    StepSkipped,
    TellingFailed,
    ToolCalled,
    ToolReturned,
    TurnCutShort,
    TurnFailed,
    TurnFinished,
    TurnStarted,
    TurnWentOn,
    Usage,
    WorkflowChanged,
    place,
)
from .plain import Plain
from .prompts import EDITED, compose, digest, missing_field, pieces, text_of
from .team import CAP, MOST_DEPTH, AgentResult, Groups, last_lines
from .tools import read_arguments, write_arguments
from .workflow import (
    GATE_OPTIONS,
    LIMITS,
    Agent,
    AutonomousMode,
    GateDefault,
    Module,
    Parallel,
    Separator,
    Step,
    Verdict,
    Workflow,
    as_step,
    limits_of,
)

StepStatus = Literal[
    "pending",
    "ready",
    "running",
    "asking",
    "calling",
    "retrying",
    "due",
    "waiting",
    "looping",
    "finished",
    "skipped",
    "failed",
]
Status = Literal["running", "waiting", "paused", "completed", "stopped", "failed"]

TRANSITIONS: dict[StepStatus, dict[str, tuple[StepStatus, ...]]] = {
    "pending": {
        "TurnStarted": ("running",),
        "GateOpened": ("waiting",),  # start, budget
        "AgentsCalled": ("calling",),  # a parallel step
        "StepSkipped": ("skipped",),
        "Rewound": ("ready",),
    },
    "ready": {
        "TurnStarted": ("running",),
        "AgentsCalled": ("calling",),
        "GateOpened": ("waiting",),  # start, of a chained prompt; budget
        "Rewound": ("ready",),
    },
    "running": {
        "SessionOpened": ("running",),
        "ToolCalled": ("running",),
        "ToolReturned": ("running",),
        "TurnFinished": ("ready", "due", "looping", "finished"),
        "TurnFailed": ("retrying", "due"),
        "TurnCutShort": ("ready", "due"),
        "GateOpened": ("asking",),  # question, permission
        "AgentsCalled": ("calling",),
    },
    "calling": {
        "SessionOpened": ("calling",),
        "ToolCalled": ("calling",),
        "ToolReturned": ("calling",),
        "AgentsReturned": ("running", "due", "finished"),
        "TurnFinished": ("ready", "due", "looping", "finished"),
        "TurnFailed": ("retrying", "due"),
        "TurnCutShort": ("ready", "due"),
    },
    "asking": {
        "SessionOpened": ("asking",),
        "ToolCalled": ("asking",),
        "ToolReturned": ("asking",),
        "GateDecided": ("running", "asking"),
        "TurnWentOn": ("running",),
        "TurnFailed": ("retrying", "due"),
        "TurnCutShort": ("ready", "due"),
    },
    "retrying": {"TurnStarted": ("running",), "TurnCutShort": ("ready", "due"), "Rewound": ("ready",)},
    "due": {"GateOpened": ("waiting",), "StepFailed": ("failed",), "Rewound": ("ready",)},
    "waiting": {
        "GateDecided": ("ready", "finished", "skipped", "looping", "due", "pending"),
        "StepFailed": ("failed",),
        "Rewound": ("ready",),
    },
    "looping": {"LoopedBack": ("pending",), "Rewound": ("ready",)},
    "finished": {"GateOpened": ("waiting",), "Rewound": ("ready",)},  # stale
    "skipped": {"GateOpened": ("waiting",), "Rewound": ("ready",)},  # stale
    "failed": {},  # a member; called again, it is ready
}
"""Which events a step may meet in each status, and what it may become by them."""

_SETTLED: tuple[StepStatus, ...] = ("finished", "skipped")
_ENDED: tuple[StepStatus, ...] = (*_SETTLED, "failed")
"""How a member can have ended."""
_AT_REST: tuple[StepStatus, ...] = ("pending", "ready", "retrying", "due", "waiting", "looping", *_SETTLED)
SWEPT: dict[str, dict[StepStatus, tuple[StepStatus, ...]]] = {
    "LoopedBack": dict.fromkeys(_SETTLED, ("pending",)),
    "Rewound": {**dict.fromkeys(_AT_REST, ("pending", "finished")), "waiting": ("pending", "finished", "due")},
    "RunFinished": {"waiting": ("due", "finished", "pending", "ready")},
    "StepChanged": {**dict.fromkeys(_AT_REST, ("pending", "finished")), "waiting": ("pending", "finished", "due")},
    "AgentsCalled": {"failed": ("ready",)},
    # a member whose caller waits for it no more
    "AgentsReturned": {"waiting": ("due", "pending", "ready")},
    "TurnFinished": {"waiting": ("due", "pending", "ready")},
    "TurnFailed": {"waiting": ("due", "pending", "ready")},
    "TurnCutShort": {"waiting": ("due", "pending", "ready")},
    "WorkflowChanged": {"waiting": ("pending", "ready")},  # its limit is another one
}
"""What an event may make of the steps that it is not about (and ``StepChanged`` of its own), by their status."""

STATUS_WORDS: dict[StepStatus, str] = {
    "pending": "pending",
    "ready": "queued",
    "running": "running",
    "asking": "asks you",
    "calling": "waits for its team",
    "retrying": "tries again",
    "due": "waiting",
    "waiting": "waiting",
    "looping": "goes back",
    "finished": "done",
    "skipped": "skipped",
    "failed": "failed",
}
"""A step's status in words for people; :func:`status_word` knows of the run's end too."""


def status_word(state: RunState, step: StepState) -> str:
    """How `step` stands, in words: once the run has ended nothing waits any more."""
    if step.answered is not None:
        return STATUS_WORDS["ready"]
    if state.ended is None or step.status != "due":
        return STATUS_WORDS[step.status]
    kind = step.due.kind if step.due is not None else None
    ended_it = kind == "exhausted" and isinstance(step.step, Module) and step.step.on_exhausted == "fail"
    return "failed" if kind == "failed" or ended_it else "not decided"


def standing(state: RunState, step: StepState) -> str:
    """The same as what it does: ``is pending``, ``waits for its team``."""
    word = status_word(state, step)
    does = step.status in ("asking", "calling", "retrying", "looping") and step.answered is None
    return word if does else f"is {word}"


NO_FIELDS = "The edited text is not the JSON of the output any more, so it has no fields."
"""Said beside an edited output that had a structure."""


@dataclass(slots=True, eq=False, repr=False)
class ToolUse(Plain):
    """A tool that an agent called, and what it was told: ``None`` while it has not returned.

    Long texts are cut in the middle; ``called_at`` and ``returned_at`` are Unix seconds.
    """

    call_id: str
    name: str
    arguments: str
    text: str | None = None
    failed: bool = False
    called_at: float = 0.0
    returned_at: float | None = None


@dataclass(slots=True, eq=False, repr=False)
class Attempt(Plain):
    """One attempt of a step: what was sent, what came back, what was decided about it.

    ``prompt`` and ``text`` are texts; ``started_at`` and ``ended_at`` Unix seconds; ``asked_s`` the seconds in which
    the turn waited for an answer, which are not counted.
    """

    texts: dict[Ref, str | tuple[Part, ...]] = field(repr=False)
    number: int
    iteration: int
    engine: str = ""
    turns: list[int] = field(default_factory=list)
    """Events (``seq``) of its ``TurnStarted``, one for each chained prompt."""
    answer: Ref | None = None
    started_at: float = 0.0
    ended_at: float | None = None
    asked_s: float = 0.0
    measured_s: float | None = None
    output: Any = None
    verdict: Verdict | None = None
    usage: Usage | None = None
    cost_usd: float | None = None
    cost_estimated: bool = False
    """The cost, or a part of it, was computed from a table of prices."""
    tools: list[ToolUse] = field(default_factory=list)
    """What it did with tools, in that order."""
    session_id: str | None = None
    note: str | None = None
    decision: Decision | None = None
    errors: tuple[ErrorInfo, ...] = ()
    failures: int = 0
    """Failures of the present turn, each tried again by itself."""
    edited: bool = False
    cut_short: str | None = None
    members: list[StepState] = field(default_factory=list)
    """The agents that it called, in that order."""
    ordinal: int = 0
    """Which turn of its agent the last one is."""
    waits_since: float | None = None
    """Since when it waits for them, or, answered, for a place to go on at."""

    def __repr__(self) -> str:
        return f"<Attempt {self.number}: {self.text[:60]!r}>"

    @property
    def prompt(self) -> str:
        """The exact prompt sent; of chained prompts all, a blank line between."""
        return "\n\n".join(text_of((Ref(seq, "prompt"),), self.texts) for seq in self.turns)

    @property
    def text(self) -> str:
        """The answer, or ``""`` while there is none."""
        return text_of((self.answer,), self.texts) if self.answer is not None else ""

    @property
    def feedback(self) -> str | None:
        """Why it was rejected."""
        return self.decision.feedback if self.decision is not None else None

    @property
    def error(self) -> ErrorInfo | None:
        """The error that ended it, or the last one that was tried again after."""
        return self.errors[-1] if self.errors else None

    @property
    def duration_s(self) -> float | None:
        """Seconds it took, without waiting for others; of a tape, what was recorded; ``None`` until it ends."""
        if self.measured_s is not None:
            return self.measured_s
        return None if self.ended_at is None else max(0.0, self.ended_at - self.started_at - self.asked_s)


@dataclass(slots=True, eq=False, repr=False)
class Due(Plain):
    """A gate that is to be opened, and what it should tell."""

    kind: GateKind
    payload: dict[str, Any] = field(default_factory=dict)
    text: tuple[Part, ...] = ()


@dataclass(slots=True, eq=False, repr=False)
class Redo(Plain):
    """Why the next attempt runs, so that its prompt can be composed again after a crash."""

    feedback: Ref | None = None
    """The text of the rejection."""
    prompt: Ref | None = None
    """An edited prompt, sent instead of the template."""
    answered: bool = False
    """A person asked for it: its prompt needs no ``start`` gate of its own."""
    goes_on: bool = False
    """No next attempt at all: the one there is goes on with a chained prompt that was asked about."""


@dataclass(slots=True, eq=False, repr=False)
class Budget(Plain):
    """What a run, or a step with all its attempts and members, may use and has used.

    ``amounts``, by option: what was permitted, and what an approval permits again; ``limits``: where a person is asked.
    """

    amounts: dict[str, int | float] = field(default_factory=dict)
    limits: dict[str, int | float] = field(default_factory=dict)
    used: dict[str, int | float] = field(default_factory=lambda: dict.fromkeys(LIMITS, 0))
    unknown: dict[str, int] = field(default_factory=dict)
    """Turns that ended without saying what they used, by option."""
    waived: set[str] = field(default_factory=set)
    """Where a person knows that and goes on."""

    def permit(self, amounts: Mapping[str, int | float]) -> None:
        """From now on so much in all."""
        self.amounts |= amounts
        self.limits |= amounts
        self.waived -= amounts.keys()

    def lift(self, name: str) -> None:
        """From now on as much as is needed."""
        self.amounts.pop(name, None)
        self.limits.pop(name, None)
        self.waived.discard(name)

    def reached(self, ahead: int = 0) -> dict[str, Any] | None:
        """The limit at which a person is to be asked: it is reached, or nobody can say whether it is.

        `ahead`: so many turns are about to start.
        """
        for name, most in self.limits.items():
            used = self.used[name] + (ahead if name == "max_turns" else 0)
            found = {"limit": name, "amount": self.amounts[name], "most": most, "used": used}
            if used >= most * (1 - 1e-9):  # a sum of amounts in binary may be a little less than it should
                return found
            if name in self.unknown and name not in self.waived:
                return {**found, "unknown": self.unknown[name]}
        return None


@dataclass(slots=True, eq=False, repr=False)
class StepState(Plain):
    """Where one step stands. ``path`` is its place in the run; a step of the workflow has its id as path."""

    step: Step
    path: str
    index: int
    fingerprint: str = ""
    status: StepStatus = "pending"
    stale: bool = False
    outdated_by: str | None = None
    """Why it is stale: the earlier step that ran again after it."""
    changed: tuple[str, ...] = ()
    """Why it is stale: what of its own definition changed after it ran."""
    agents: tuple[Agent, ...] = ()
    """Who does it, as they were when the step was defined."""
    attempts: list[Attempt] = field(default_factory=list)
    turn: int = 1
    """The turn that runs, or is next."""
    iteration: int = 1
    approved: Ref | None = None
    """Where the output stands that later steps see; ``None``: it gave none."""
    due: Due | None = None
    gate: Gate | None = None
    gates: int = 0
    """Gates opened so far: the last part of a gate's id."""
    redo: Redo | None = None
    session: str | None = None
    """The agent's own conversation, to be continued; a step that begins anew begins a new one."""
    session_engine: str = ""
    """The engine that it was had with, the only one that knows it."""
    said: tuple[tuple[Ref, Ref | None], ...] = ()
    """The prompts of the turns before this one, and their answers: what an engine without sessions is told again."""
    retry_at: float | None = None
    looped_by: str | None = None
    """The module that sent the run back, at the first repeated step that runs."""
    answers: tuple[tuple[str, str], ...] = ()
    """Questions of this attempt and their answers."""
    resent: tuple[tuple[str, str], ...] = ()
    """Answers given in an attempt that was cut short: they need not be asked for again."""
    note: str | None = None
    caller: str = ""
    """Of a member: the path of the one that called it; all that follows is of members and their callers."""
    depth: int = 0
    request: tuple[Part, ...] = ()
    """What it was asked, after its agent's own prompt."""
    tail: int | None = None
    group: tuple[int, int, int] = (1, 1, 1)
    """By which call of its caller it was called, in which group of that, and of how many."""
    before: Ref | None = None
    """What the same member of a parallel step had answered, when that was rejected."""
    place: Literal["", "wants", "queued", "held"] = ""
    answered: str | None = None
    """The gate whose answer its turn is told as soon as there is a place for it."""
    called: int = 0
    """Calls made so far."""
    asked: tuple[str, str] = ("", "")
    """Who was asked what: its agent, and a digest of request and files."""
    team: tuple[StepState, ...] = ()
    """Those that its present turn has called."""
    recall: dict[tuple[str, str], list[StepState]] | None = None
    """Those of a turn that did not end, by what they were asked: asked the same again, they need not begin anew."""
    budget: Budget | None = None
    """Of a step of the workflow that has limits of its own."""

    @property
    def id(self) -> str:
        """The step's id; of a member, its agent's."""
        return self.step.id

    @property
    def attempt(self) -> int:
        """The number of the last attempt; 0 before the first."""
        return self.attempts[-1].number if self.attempts else 0

    @property
    def settled(self) -> bool:
        """Whether the run may go past it."""
        return self.status in ("finished", "skipped") and not self.stale

    @property
    def members(self) -> list[StepState]:
        """The agents that it called, over all its attempts, in that order."""
        return list({member.path: member for attempt in self.attempts for member in attempt.members}.values())

    @property
    def last(self) -> Attempt | None:
        """The last attempt."""
        return self.attempts[-1] if self.attempts else None


@dataclass(slots=True, eq=False, repr=False)
class Loop(Plain):
    """A module's loop: jumps made, jumps granted beyond the limit, and what it said last."""

    count: int = 0
    extra: int = 0
    active: bool = False
    reason: Part = ""
    output: Ref | None = None


@dataclass(slots=True, eq=False, repr=False)
class Call(Plain):
    """Members that are waited for: groups one after the other."""

    number: int
    groups: list[list[StepState]]
    limit: int | None = None
    """How many of them may work at the same time."""
    group: int = -1
    """The group that runs."""
    next: int = 0
    """The member of it that is to be put in line next."""
    left: int = 0
    """How many of it have not ended."""
    busy: int = 0
    """How many are in line or at work."""
    again: deque[StepState] = field(default_factory=deque)
    """Those that go on after a pause: they come first."""


@dataclass(slots=True, eq=False, repr=False)
class Ordinals(Plain):
    """Numbers the turns of an agent; the number of one that was cut short is given again."""

    last: int = 0
    free: list[int] = field(default_factory=list)

    def take(self) -> int:
        """The next number."""
        if self.free:
            return heapq.heappop(self.free)
        self.last += 1
        return self.last


@dataclass(slots=True, eq=False, repr=False)
class StartTurn(Plain):
    """Action: send a prompt: the text of ``prompt`` and then ``context``; not before ``not_before`` (Unix seconds)."""

    step: StepState
    attempt: int
    turn: int
    prompt: tuple[Part, ...]
    context: tuple[Part, ...] | None
    session_id: str | None
    not_before: float | None = None


@dataclass(slots=True, eq=False, repr=False)
class Record(Plain):
    """Action: write down what follows from the state; not before ``not_before`` (Unix seconds)."""

    event: AnyEvent
    not_before: float | None = None


@dataclass(slots=True, eq=False, repr=False)
class RunState(Plain):
    """All that a run is, as its events say. Nobody but ``apply`` changes it."""

    run_id: str = ""
    name: str = ""
    mode: Mode = "gates"
    autonomous_mode: AutonomousMode = True
    """As the workflow's definition has it."""
    locked: str | None = None
    """``"never"`` or ``"always"`` when the workflow forbids switching."""
    items: list[Step | Separator] = field(default_factory=list)
    agents: dict[str, Agent] = field(default_factory=dict)
    engine: str | None = None
    order: list[StepState] = field(default_factory=list)
    steps: dict[str, StepState] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    """The ids of steps by their other spelling, with ``_`` for ``-``."""
    cursor: int = 0
    frontier: int = 0
    """One past the last step that ever settled: beyond it nothing can be stale."""
    removed: dict[str, int] = field(default_factory=dict)
    """Gates that steps since removed have had: a step of that name counts on, so no id of a gate comes twice."""
    running: dict[str, StepState] = field(default_factory=dict)
    gates: dict[str, Gate] = field(default_factory=dict)
    """The open ones, by id, oldest first."""
    last_gate: Gate | None = None
    """The one that opened last, open or not."""
    decisions: dict[str, Decision] = field(default_factory=dict)
    allowed: dict[tuple[str, str], Decision] = field(default_factory=dict)
    """The decisions by which a tool (its name, its implementation) needs no further permission here; one with the scope
    ``always`` counts as long as the person's own list has it, see ``allowed.py``."""
    inputs: dict[str, Any] = field(default_factory=dict)
    defaults: dict[str, Any] = field(default_factory=dict)
    """The inputs as the workflow's definition has them."""
    input_refs: dict[str, Ref] = field(default_factory=dict)
    loops: dict[str, Loop] = field(default_factory=dict)
    texts: dict[Ref, str | tuple[Part, ...]] = field(default_factory=dict)
    """Every text that a later event may refer to."""
    context_all: tuple[Ref, int, int] | None = None
    """Last ``context="all"`` block: where it stands, how many steps it holds, and at which ``epoch``."""
    epoch: int = 0
    """Counts the times an output that was already settled may have changed."""
    paused: bool = False
    pause_reason: str = ""
    until: str | None = None
    until_once: bool = False
    """A module is gone as far as when it has spoken, even where it sends the run back."""
    until_reached: bool = False
    ending: tuple[RunEnd, str] | None = None
    """The end that has been decided on and is to be recorded."""
    ended: RunEnd | None = None
    reason: str = ""
    ordinals: dict[str, Ordinals] = field(default_factory=dict)
    """The turns of each agent, counted."""
    sub_agents: list[str] = field(default_factory=list)
    """Who may be called."""
    max_concurrency: int = CAP
    """How many members may work at the same time."""
    members: dict[str, StepState] = field(default_factory=dict)
    """Every agent that was called, by path."""
    named_calls: dict[str, int] = field(default_factory=dict)
    """How often each caller has called each agent: no path of a member comes twice."""
    voices: dict[str, Ref | None] = field(default_factory=dict)
    """The approved outputs of those who work in parallel steps, by their name."""
    calls: dict[str, Call] = field(default_factory=dict)
    """Members that are waited for, by the path of who waits."""
    lines: list[OrderedDict[str, StepState]] = field(
        default_factory=lambda: [OrderedDict() for _ in range(MOST_DEPTH + 1)]
    )
    """Who is in line for a place, by depth: what was begun is finished before more is begun."""
    busy: int = 0
    """Places taken."""
    owed: OrderedDict[str, StepState] = field(default_factory=OrderedDict)
    """Members whose gate is to be opened."""
    backing_off: dict[str, StepState] = field(default_factory=dict)
    """Members that are tried again by themselves; they keep their places."""
    usage: Usage = field(default_factory=Usage)
    cost_usd: float = 0.0
    cost_estimated: bool = False
    budget: Budget = field(default_factory=Budget)
    default_limits: dict[str, int | float] = field(default_factory=dict)
    """The limits as the workflow's definition has them."""
    held: tuple[StepState, StepStatus] | None = None
    """The step whose ``budget`` gate is open, and how it stood."""
    last_turn: str = ""
    """The path of the turn that ended last."""
    workspace: str | None = None
    recorded: str | None = None
    resumed: list[RunResumed] = field(default_factory=list)
    untold: dict[str, str] = field(default_factory=dict)
    """By gate: why nobody was told that it is open."""
    started_at: float = 0.0
    ended_at: float | None = None
    at: float = 0.0
    seq: int = 0

    @classmethod
    def of(cls, workflow: Workflow) -> RunState:
        """The state of `workflow` before anything ran, for drawing it."""
        state = cls()
        started = RunStarted(run_id="", workflow=workflow.kept())
        place(started, 1, 0.0)
        apply(state, started)
        return state

    @property
    def status(self) -> Status:
        """The run in one word."""
        if self.ended is not None:
            return self.ended
        if self.gates:
            return "waiting"
        return "paused" if self.paused and not self.at_work else "running"

    @property
    def current(self) -> StepState | None:
        """The step under the cursor; ``None`` past the last one."""
        return self.order[self.cursor] if self.cursor < len(self.order) else None

    def named(self, name: str) -> StepState | None:
        """The step of that id, or of that id with ``_`` for ``-``."""
        return self.steps.get(name) or self.steps.get(self.names.get(name, ""))

    def voice(self, name: str) -> str | None:
        """The id of who works in a parallel step and is called `name` in prompts."""
        if name in self.voices:
            return name
        other = self.names.get(name)
        return other if other in self.voices else None

    @property
    def at_work(self) -> bool:
        """Whether a turn runs that waits for nobody."""
        return any(step.status == "running" for step in self.running.values())

    @property
    def under_way(self) -> list[StepState]:
        """The steps whose turn runs, or is about to be tried again; who was called before its caller."""
        current = self.current
        waits = [current] if current is not None and current.status == "retrying" else []
        return [*self.backing_off.values(), *reversed(self.running.values()), *waits]

    def find(self, path: str) -> StepState:
        """The step or member at `path`; a ``TransitionError`` lists the right names."""
        return self.steps.get(path) or self.members.get(path) or self.step(path)

    def step(self, id: str) -> StepState:
        """The step named `id`; a ``TransitionError`` lists the right names."""
        found = self.steps.get(id) or self.named(id)
        if found is None:
            raise TransitionError(
                f"there is no step {id!r}. {did_you_mean(id, {**self.steps, **self.members}, 'Steps')}"
            )
        return found

    def after(self, step: StepState) -> StepState | None:
        """The step that follows `step`."""
        return self.order[step.index + 1] if step.index + 1 < len(self.order) else None

    def text(self, ref: Ref | None) -> str:
        """The text that stands there; ``""`` for ``None``."""
        return text_of((ref,), self.texts) if ref is not None else ""

    def pauses(self, step: Step) -> bool:
        """Whether a person is asked at `step` as the mode is now."""
        return self.mode == "step-by-step" or step.interactive is True

    def loop_of(self, step: StepState) -> Module | None:
        """The innermost module that may repeat `step` (or is it)."""
        for later in self.order[step.index :]:
            module = later.step
            if isinstance(module, Module) and later.index - module.loop_steps <= step.index:
                return module
        return None


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
    elif state.ended is not None and kind not in ("RunResumed", "GateDecided"):
        raise TransitionError(f"run {state.run_id!r} is {state.ended}; resume it first.")
    _HANDLERS[kind](state, event)
    state.at, state.seq = event.at, event.seq


def _met(state: RunState, path: str, kind: str) -> StepState:
    """The step that an event of that kind is about, if it may meet it now."""
    step = state.find(path)
    if kind not in TRANSITIONS[step.status]:
        allowed = ", ".join(TRANSITIONS[step.status]) or "nothing"
        raise TransitionError(
            f"{kind} is not possible while step {step.path!r} is {step.status} (possible: {allowed})."
        )
    return step


def _turn_met(
    state: RunState, event: SessionOpened | ToolCalled | ToolReturned | TurnFinished | TurnFailed | TurnCutShort
) -> tuple[StepState, Attempt]:
    """The turn that an event is about, which runs now; one that ends it needs all that it has called to have ended."""
    step = _met(state, event.path, event.type)
    last = step.attempts[-1] if step.attempts else None
    if last is None or last.number != event.attempt or step.turn != event.turn:
        raise TransitionError(
            f"{event.type} names attempt {event.attempt}, turn {event.turn} of step {step.id!r}, "
            f"which is at attempt {step.attempt}, turn {step.turn}."
        )
    if step.path in state.calls and not isinstance(event, (SessionOpened, ToolCalled, ToolReturned)):
        _check_alone(state, step)
    return step, last


def _run_started(state: RunState, event: RunStarted) -> None:
    workflow = event.workflow
    state.run_id, state.name, state.engine = event.run_id, workflow.name, workflow.engine
    state.agents = {agent.id: agent for agent in workflow.agents}
    _take_autonomy(state, workflow.autonomous_mode)
    state.sub_agents = workflow.sub_agents
    state.max_concurrency = event.max_concurrency or workflow.max_concurrency or CAP
    state.workspace, state.recorded, state.started_at = event.workspace, event.recorded, event.at
    state.defaults = workflow.inputs
    state.default_limits = limits_of(workflow)
    state.budget.permit({**state.default_limits, **(event.limits or {})})
    _take_inputs(state, event.seq, {**workflow.inputs, **event.inputs})
    for item in workflow.steps:
        _append(state, item)
    for id, known in event.fingerprints.items():
        if id in state.steps:
            state.steps[id].fingerprint = known
    _go_until(state, event.until)


def _run_resumed(state: RunState, event: RunResumed) -> None:
    state.ended, state.ended_at, state.reason = None, None, ""  # an end decided on before a crash still comes
    state.paused, state.pause_reason = False, ""
    state.resumed.append(event)
    _go_until(state, event.until)


def _run_paused(state: RunState, event: RunPaused) -> None:
    if state.paused:
        raise TransitionError("the run is paused already.")
    state.paused, state.pause_reason = True, event.reason
    state.until, state.until_once, state.until_reached = None, False, False


def _run_unpaused(state: RunState, event: RunUnpaused) -> None:
    state.paused, state.pause_reason = False, ""
    _go_until(state, event.until, once=event.once)


def _go_until(state: RunState, until: str | None, *, once: bool = False) -> None:
    state.until, state.until_once = until, once
    state.until_reached = until is not None and until in state.steps and state.steps[until].index < state.cursor


def check_switch(state: RunState) -> None:
    """Refuse to switch the mode of a locked workflow."""
    if state.locked is not None:
        raise TransitionError(
            f"workflow {state.name!r} is locked to autonomous_mode={state.locked!r}; its mode cannot be switched. "
            "Define it with autonomous_mode=True to switch while it runs."
        )


def _mode_changed(state: RunState, event: ModeChanged) -> None:
    check_switch(state)
    state.mode = event.mode


def _workflow_changed(state: RunState, event: WorkflowChanged) -> None:
    if event.autonomous_mode is not None:
        _take_autonomy(state, event.autonomous_mode)
    if event.engine is not None:
        state.engine = event.engine or None
    if event.sub_agents is not None:
        state.sub_agents = event.sub_agents
    state.max_concurrency = event.max_concurrency or state.max_concurrency
    if event.limits or event.default_limits:
        for name, most in (event.default_limits or {}).items():
            if most is None:
                state.default_limits.pop(name, None)
                state.budget.lift(name)
            else:
                state.default_limits[name] = most
                state.budget.permit({name: most})
        state.budget.permit(event.limits or {})
        _let_go(state)
    _take_agents(state, event.agents)
    state.defaults = {**state.defaults, **event.defaults}
    _take_inputs(state, event.seq, {**event.defaults, **event.inputs})


def _take_autonomy(state: RunState, given: AutonomousMode) -> None:
    """The mode that the definition asks for; ``True`` asks for any but ``step-by-step``."""
    state.autonomous_mode = given
    state.locked = given if isinstance(given, str) else None
    if given in ("never", False):
        state.mode = "step-by-step"
    elif given == "always" or state.mode == "step-by-step":
        state.mode = "gates"


def _run_finished(state: RunState, event: RunFinished) -> None:
    if state.running:
        raise TransitionError(f"RunFinished while {', '.join(state.running)} is running.")
    if event.status == "completed" and state.cursor < len(state.order):
        raise TransitionError(f"RunFinished(completed) while step {state.order[state.cursor].id!r} is not done.")
    for gate in list(state.gates.values()):
        _close(state, state.find(gate.path), reopen=True)
    state.ended, state.reason, state.ended_at = event.status, event.reason, event.at
    state.ending = None


def _step_added(state: RunState, event: StepAdded) -> None:
    item = as_step(len(state.order) + 1, event.step)
    if not isinstance(item, Separator) and item.id in state.steps:
        raise TransitionError(f"there is a step {item.id!r} already.")
    place = 0 if event.first else len(state.items)
    if event.after is not None:
        before = state.step(event.after).step
        place = next(number for number, other in enumerate(state.items) if other is before) + 1
    _take_agents(state, event.agents)
    _take_inputs(state, event.seq, event.inputs)
    if place == len(state.items):
        _append(state, item)
    else:
        state.items.insert(place, item)
        _reindex(state)
    if not isinstance(item, Separator):
        added = state.steps[item.id]
        added.fingerprint = event.fingerprint
        added.gates = state.removed.pop(item.id, 0)
        state.cursor = min(state.cursor, added.index)


def _step_changed(state: RunState, event: StepChanged) -> None:
    item = as_step(0, event.step)
    if isinstance(item, Separator):
        raise TransitionError("a separator cannot be changed.")
    step = state.step(item.id)
    if step.path in state.running:
        raise TransitionError(f"step {step.id!r} is running; it is cut short before it is changed.")
    _take_agents(state, event.agents)
    _take_inputs(state, event.seq, event.inputs)
    place = next(number for number, other in enumerate(state.items) if other is step.step)
    agents = _agents_of(state, item)
    what = _what_changed(step.step, step.agents, item, agents)
    state.items[place] = item
    _hear(state, step.step, item)
    step.step, step.fingerprint, step.agents = item, event.fingerprint, agents
    step.budget = _budget_of(item, step)
    _close(state, step, reopen=True)
    if step.status in ("finished", "skipped"):
        step.stale = True
        step.changed = (*step.changed, *(part for part in what if part not in step.changed))
        state.cursor = min(state.cursor, step.index)
    elif step.status != "pending":
        # what waits for a decision was made by the old definition: it is made again
        _begin_again(step, "pending")


def _agents_of(state: RunState, item: Step) -> tuple[Agent, ...]:
    return tuple([state.agents[name] for name in item.agents if name in state.agents])


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


def why_stale(step: StepState) -> str:
    """Why `step` is stale: "planner changed after this ran", "its prompt changed after it ran"."""
    if step.changed:
        *most, last = step.changed
        return f"its {', '.join(most)} and {last} changed after it ran" if most else f"its {last} changed after it ran"
    return f"{step.outdated_by or 'something it builds on'} changed after this ran"


def _step_removed(state: RunState, event: StepRemoved) -> None:
    step = state.step(event.step)
    if step.path in state.running:
        raise TransitionError(f"step {step.id!r} is running; it is cut short before it is removed.")
    _close(state, step)
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
    _advance(state)


def _step_skipped(state: RunState, event: StepSkipped) -> None:
    step = _met(state, event.path, event.type)
    step.note = event.reason
    _settle(state, step, "skipped", step.approved)


def _turn_started(state: RunState, event: TurnStarted) -> None:
    step = _met(state, event.path, event.type)
    number, seq, context = _next_attempt(step), event.seq, event.context
    if step.caller and step.place != "held" and (step.place != "queued" or state.busy >= state.max_concurrency):
        raise TransitionError(f"{step.path!r} has no place to work at yet.")
    if event.attempt != number or event.turn != step.turn:
        raise TransitionError(
            f"attempt {event.attempt}, turn {event.turn} of step {step.id!r} cannot start; attempt "
            f"{number}, turn {step.turn} is next."
        )
    if step.status != "retrying" and (state.held is not None or _over(state, step) is not None):
        raise TransitionError(f"{step.path!r} cannot start: a person is asked first, as a limit is reached.")
    if not step.attempts or number > step.attempts[-1].number:
        step.attempts.append(Attempt(state.texts, number, event.iteration, engine=event.engine, started_at=event.at))
        step.answers = ()
    last = step.attempts[-1]
    if step.redo is not None:
        step.redo.goes_on = False  # cut short, it is the next attempt
    if step.status != "retrying":
        for budget in _budgets(state, step):
            budget.used["max_turns"] += 1
    if step.status == "retrying":
        last.turns.pop()
        last.started_at = event.at  # waiting between two tries is not work
    elif last.ended_at is not None:
        last.asked_s += max(0.0, event.at - last.ended_at)  # a person looked at the answer to the prompt before
    last.ended_at, last.engine = None, event.engine
    last.turns.append(seq)
    last.session_id = event.session_id
    state.texts[Ref(seq, "prompt")] = event.prompt if context is None else event.prompt + context
    if context is not None:
        here = Ref(seq, "context")
        state.texts[here] = context
        if step.step.context == "all":
            state.context_all = (here, step.index, state.epoch)
    if step.caller:
        state.backing_off.pop(step.path, None)
        _take_place(state, step)
    else:
        _doubt_later(state, step)
    if step.step.agent not in state.ordinals:
        state.ordinals[step.step.agent] = Ordinals()
    last.ordinal = state.ordinals[step.step.agent].take()
    step.status, step.retry_at, step.note = "running", None, None
    state.running[step.path] = step


def _session_opened(state: RunState, event: SessionOpened) -> None:
    step, last = _turn_met(state, event)
    last.session_id = event.session_id
    step.session, step.session_engine = last.session_id, last.engine


def _tool_called(state: RunState, event: ToolCalled) -> None:
    _step, last = _turn_met(state, event)
    last.tools.append(ToolUse(event.call_id, event.name, event.arguments, called_at=event.at))


def _tool_returned(state: RunState, event: ToolReturned) -> None:
    _step, last = _turn_met(state, event)
    called = (
        use for use in reversed(last.tools) if (use.call_id, use.name, use.text) == (event.call_id, event.name, None)
    )
    use = next(called, None)
    if use is None:
        raise TransitionError(f"{event.name!r} returned to {event.path!r}, which had not called it.")
    use.text, use.failed, use.returned_at = event.text, event.failed, event.at


def _turn_finished(state: RunState, event: TurnFinished) -> None:
    step, last = _turn_met(state, event)
    del state.running[step.path]
    if step.path in state.calls:
        _end_calls(state, step, event.at)
    step.team, step.recall, step.resent = (), None, ()
    here = Ref(event.seq)
    state.texts[here] = event.text
    last.failures = 0
    last.answer, last.output, last.verdict, last.ended_at = here, event.output, event.verdict, event.at
    last.session_id, last.note = event.session_id or last.session_id, event.note
    step.session, step.session_engine = last.session_id, last.engine
    if event.output is not None:
        _take_fields(state, event.seq, event.output)
    if event.duration_s is not None:
        last.measured_s = (last.measured_s or 0.0) + event.duration_s
    _pay(state, step, last, event)
    _judge(state, step, last)


def _judge(state: RunState, step: StepState, last: Attempt) -> None:
    """What the end of a turn leads to: a pause, the next chained prompt, or what the verdict says."""
    if step.caller:
        _judge_member(state, step, last)
        return
    more = step.turn < step.step.turns
    asks = state.mode == "step-by-step" or (step.step.interactive is True and not more)
    asks = asks and step.step.gate in ("after", "both")
    answer = (last.answer,) if last.answer is not None else ()
    if not more and (problem := _verdict_problem(step, last)) is not None:
        _owe(step, Due("verdict", {"reason": problem}, answer))
    elif asks:
        payload = _note(state, step)
        if more:
            payload["next_prompt"] = step.turn + 1
        _owe(step, Due("review", payload, answer))
    elif more:
        _next_prompt(step, last)
    else:
        _conclude(state, step, last)


def _note(state: RunState, step: StepState) -> dict[str, Any]:
    """What a gate says beside, where the mode asks and not the step."""
    if state.mode == "step-by-step" and step.step.interactive is False:
        return {"note": "This step asks for no pause, but in step-by-step mode every step pauses."}
    return {}


def _next_prompt(step: StepState, last: Attempt) -> None:
    """The next of the chained prompts is sent."""
    step.said = (*step.said[: step.turn - 1], (Ref(last.turns[-1], "prompt"), last.answer))
    step.turn += 1
    step.status, step.redo = "ready", None


def _verdict_problem(step: StepState, last: Attempt) -> str | None:
    """Why a person must read the verdict; ``None`` when it can be followed."""
    verdict = last.verdict
    if verdict is None:
        if isinstance(step.step, Module):
            return (
                f'{step.id} gave no verdict that can be read. Expected at the end: {{"action": "continue" or "loop", '
                '"reason": "…"}.'
            )
        return None
    if verdict.action == "pause":
        return verdict.reason or f"{step.id} asks you to decide."
    if verdict.action == "loop" and not isinstance(step.step, Module):
        return f'{step.id} says "loop", but only a module can go back. Make it one: cm.module({step.step.agent!r}, …).'
    return None


def _conclude(state: RunState, step: StepState, last: Attempt) -> None:
    """The attempt counts: do what its verdict says."""
    action = last.verdict.action if last.verdict is not None else "continue"
    reason = last.verdict.reason if last.verdict is not None else ""
    if action == "error":
        info = ErrorInfo(kind="Verdict", message=reason or f"{step.id} reports an error.")
        last.errors += (info,)
        _owe(step, Due("failed", {"error": info.message}, (info.message,)))
    elif action == "stop":
        _settle(state, step, "finished", last.answer)
        state.ending = ("stopped", f"{step.id}: {reason}" if reason else f"{step.id} said stop.")
    elif action == "loop" and isinstance(step.step, Module):
        loop = state.loops.setdefault(step.id, Loop())
        loop.output = last.answer
        loop.reason = Ref(last.answer.seq, "reason") if last.answer is not None and reason else ""
        if loop.reason:
            state.texts[cast("Ref", loop.reason)] = reason
        _go_back(state, step)
    else:
        _settle(state, step, "finished", last.answer)


def _go_back(state: RunState, step: StepState, *, asked: bool = False) -> None:
    """Loop once more, or say that the jumps are used up; a person who `asked` for it is not passed over."""
    module = cast("Module", step.step)
    loop = state.loops.setdefault(step.id, Loop())
    limit = module.loop_max_iterations
    if limit is None or loop.count < limit + loop.extra:
        step.status = "looping"
        return
    last = step.last
    answer = last.answer if last is not None else None
    if module.on_exhausted == "continue" and not asked:
        _settle(state, step, "finished", answer)
        return
    used = loop.count
    reason = f"Not good enough after {used} {'repeat' if used == 1 else 'repeats'}."
    said = state.text(loop.reason) if isinstance(loop.reason, Ref) else loop.reason
    payload = {"reason": f"{reason} {said}".strip(), "iterations": used}
    _owe(step, Due("exhausted", payload, (answer,) if answer is not None else ()))
    if module.on_exhausted == "fail":
        state.ending = ("failed", f"{step.id}: {payload['reason']}")


def _owe(step: StepState, due: Due) -> None:
    step.status, step.due = "due", due


def _turn_failed(state: RunState, event: TurnFailed) -> None:
    step, last = _turn_met(state, event)
    _stop_running(state, step, event.at)
    _pay(state, step, last, event)
    last.errors += (event.error,)
    last.failures += 1
    last.ended_at = event.at
    if event.retry_in_s is not None:
        step.status, step.retry_at = "retrying", event.at + event.retry_in_s
        if step.place == "held":
            state.backing_off[step.path] = step
        elif step.caller:  # it had asked somebody
            _want_place(state, step)
    else:
        _owe(step, Due("failed", {"error": event.error.message}, (event.error.message,)))
        _owe_member(state, step)


def _turn_cut_short(state: RunState, event: TurnCutShort) -> None:
    step, last = _turn_met(state, event)
    if step.status != "retrying" and not isinstance(step.step, Parallel):
        heapq.heappush(state.ordinals[step.step.agent].free, last.ordinal)
    state.backing_off.pop(step.path, None)
    _stop_running(state, step, event.at)
    _pay(state, step, last, event)
    last.cut_short, last.ended_at = event.reason or "stopped", event.at
    step.retry_at = None
    step.resent += step.answers
    if step.step.idempotent or isinstance(step.step, Parallel):  # of that, its members say it
        step.status = "ready"
        step.redo = step.redo or Redo()
        step.redo.answered = True
        if step.caller:
            _want_place(state, step)
    else:
        reason = f"{step.id} was cut short ({last.cut_short}) and may have had its effect."
        _owe(step, Due("may_have_run", {"reason": reason}, (reason,)))
        _owe_member(state, step)


def _stop_running(state: RunState, step: StepState, at: float) -> None:
    """It runs no more; a question it had asked is void, and so are the calls it had made."""
    state.running.pop(step.path, None)
    _end_calls(state, step, at)
    if step.answered is not None:
        _waited(step.attempts[-1], at)
        step.answered = None
    _keep_team(step)
    _close(state, step)


def _gate_opened(state: RunState, event: GateOpened) -> None:
    gate = event.gate
    step = _met(state, gate.path, event.type)
    chained = step.turn > 1 and step.redo is None
    fits: dict[str, GateKind | None] = {
        "pending": "start",
        "ready": "start" if chained else None,
        "running": gate.kind if gate.kind in ASKED_BY_TURNS else None,
        "due": step.due.kind if step.due is not None else None,
    }
    without = {"stale": not step.stale, "start": bool(step.caller) or isinstance(step.step, Parallel)}
    held = gate.kind == "budget" and step.status in ("pending", "ready") and state.held is None
    if held and _over(state, step) is not None:
        state.held = (step, step.status)
    elif gate.kind != fits.get(step.status, "stale") or without.get(gate.kind):
        raise TransitionError(f"a {gate.kind!r} gate cannot open while step {step.id!r} is {step.status}.")
    if gate.kind == "start" and event.prompt is None:
        raise TransitionError(f"a 'start' gate of step {step.id!r} asks about a prompt, and none is there.")
    gate.opened_at = event.at
    gate.deadline = event.at + gate.timeout_s if gate.timeout_s is not None else None
    state.owed.pop(step.path, None)
    step.status = "asking" if gate.kind in ASKED_BY_TURNS else "waiting"
    if step.status == "asking" and step.caller:
        _leave_place(state, step)
    step.gate = gate
    step.gates += 1
    if event.prompt is not None:
        state.texts[Ref(event.seq, "prompt")] = event.prompt + (event.context or ())
    if gate.kind == "start":
        step.redo = Redo(prompt=Ref(event.seq, "prompt"), goes_on=chained)
    state.gates[gate.id] = state.last_gate = gate


def gate_path(gate_id: str) -> str:
    """The path of the step that a gate's id (``run/path/attempt/ordinal``) names."""
    return gate_id.partition("/")[2].rsplit("/", 2)[0]


def waits_for(state: RunState, gate_id: str) -> bool:
    """Whether somebody waits for that gate: for its answer, or with it for a place to go on at."""
    member = state.members.get(gate_path(gate_id))
    return gate_id in state.gates or (member is not None and member.answered == gate_id)


def gate_of(state: RunState, gate_id: str) -> Gate:
    """The open gate of that id.

    Raises
    ------
    AlreadyDecided     It has its answer, or its turn is over.
    TransitionError    There never was such a gate.
    """
    gate = state.gates.get(gate_id)
    if gate is not None:
        return gate
    before = state.decisions.get(gate_id)
    if before is not None:
        raise AlreadyDecided(already(before))
    place, path = gate_id.split("/"), gate_path(gate_id)
    earlier = state.steps.get(path) or state.members.get(path)
    if earlier is not None and place[-1] in map(str, range(1, earlier.gates + 1)):
        if place[-1] == str(earlier.gates) and state.ended in ("stopped", "failed"):
            raise AlreadyDecided(closed(state, earlier))
        raise AlreadyDecided(f"that gate of {earlier.id!r} is closed: its turn is over. Nothing was changed.")
    opened = ", ".join(state.gates) or "none"
    raise TransitionError(f"there is no gate {gate_id!r}. Open: {opened}.")


def closed(state: RunState, step: StepState) -> str:
    """That the gate of `step` was closed without an answer, as the run ended."""
    why = f": {state.reason}" if state.reason else ""
    return (
        f"the gate of {step.id!r} is closed: run {state.run_id!r} is {state.ended}{why}. Nothing was changed. "
        f"Go on with it, and it asks again: cm.resume({state.run_id!r})."
    )


def already(decision: Decision) -> str:
    """That somebody was first: "already approved by you at 12:31"."""
    import time

    words = {"approve": "approved", "reject": "rejected", "retry": "retried", "skip": "skipped", "answer": "answered"}
    done = words.get(decision.action, "stopped")
    clock = time.strftime("%H:%M", time.localtime(decision.at))
    return f"already {done} by {decision.by} at {clock}; nothing was changed."


def check_decision(gate: Gate, decision: Decision) -> None:
    """Refuse an answer that does not fit the gate; the message says what would."""
    if decision.action not in gate.actions:
        can = ", ".join(gate.actions)
        raise TransitionError(
            f"the {gate.kind} gate of {gate.step!r} cannot be answered with {decision.action!r}. Possible: {can}."
        )
    if decision.action == "reject" and not (decision.feedback or "").strip():
        raise TransitionError(
            f"say why {gate.step!r} is rejected: its agent gets your words, for instance 'name the tests'."
        )
    if decision.action == "answer" and not (decision.feedback or "").strip():
        raise TransitionError(f"the answer to {gate.step!r} is empty.")
    if decision.output is not None and (decision.action != "approve" or gate.kind not in EDITABLE):
        raise TransitionError(
            f"an edited text goes with approve at {', '.join(EDITABLE)}, not with {decision.action} at {gate.kind}."
        )
    if decision.scope is not None and (decision.action, gate.kind) != ("approve", "permission"):
        raise TransitionError(
            f"a scope goes with approve at a permission, not with {decision.action} at {gate.kind}: it says for how "
            "long a tool is allowed."
        )
    if gate.kind == "permission" and decision.output is not None:
        if decision.scope not in (None, "once"):
            raise TransitionError("edited arguments are for this call alone: leave out the scope.")
        try:
            read_arguments(decision.output)
        except ValueError as error:
            raise TransitionError(f"the arguments are a JSON object; these cannot be read: {error}.") from None
    if decision.prompt is not None and decision.action != "retry":
        raise TransitionError("an edited prompt goes with retry.")
    for name in limits_of(decision):
        if gate.kind != "budget" or decision.action != "approve":
            raise TransitionError(f"{name} goes with approve at budget, not with {decision.action} at {gate.kind}.")
        if (about := gate.payload.get("limit", name)) != name:
            raise TransitionError(f"the gate of {gate.step!r} is about {about}, not {name}; nothing was changed.")


def _telling_failed(state: RunState, event: TellingFailed) -> None:
    state.untold[gate_of(state, event.gate_id).id] = event.reason


def _gate_decided(state: RunState, event: GateDecided) -> None:
    gate, decision = gate_of(state, event.gate_id), event.decision
    check_decision(gate, decision)
    step = state.find(gate.path)
    if decision.prompt is not None and isinstance(step.step, Parallel):
        raise TransitionError(f"{step.id!r} has no prompt of its own to edit: its members have theirs.")
    decision.at = event.at
    for name in ("feedback", "output", "prompt"):
        if (text := getattr(decision, name)) is not None:
            state.texts[Ref(event.seq, name)] = text
    due = step.due
    _close(state, step)
    state.decisions[gate.id] = decision
    last = step.last
    if last is not None and gate.kind not in ("start", "stale", "budget", *ASKED_BY_TURNS):
        last.decision = decision
    if decision.action == "stop":
        _stop_at(state, step, gate, due, decision)
    else:
        _DECIDED[gate.kind, decision.action](state, step, gate, decision, event.seq)


def _stop_at(state: RunState, step: StepState, gate: Gate, due: Due | None, decision: Decision) -> None:
    reason = f"stopped by {decision.by} at {step.id}"
    if decision.by == GATE_DEADLINE:
        reason = f"stopped by the deadline of a gate: nobody decided about {step.id} in time"
    state.ending = ("stopped", reason)
    if gate.kind in ASKED_BY_TURNS:
        step.status = "asking"  # its turn is cut short next
    elif gate.kind == "stale":
        step.status, step.stale = "finished", True
    elif gate.kind == "start":
        _ask_again(step)
    elif gate.kind != "budget":
        step.status, step.due = "due", due


def _ask_again(step: StepState) -> None:
    """The prompt of `step` is put to a person again when the run goes on."""
    step.status, step.redo = "pending" if step.turn == 1 else "ready", None


def _approve_review(state: RunState, step: StepState, gate: Gate, decision: Decision, seq: int) -> None:
    last = _edited(state, step, decision, seq)
    if step.turn < step.step.turns:
        _next_prompt(step, last)
    else:
        _conclude(state, step, last)


def _edited(state: RunState, step: StepState, decision: Decision, seq: int) -> Attempt:
    """The last attempt, or the one that the person's own text makes."""
    last = step.attempts[-1]
    if decision.output is None:
        return last
    made = Attempt(state.texts, last.number + 1, last.iteration, engine=last.engine, edited=True)
    made.started_at = made.ended_at = decision.at
    made.turns, made.answer, made.decision = list(last.turns), Ref(seq, EDITED), decision
    made.verdict = last.verdict if last.verdict is None else Verdict.from_text(decision.output) or last.verdict
    made.session_id, made.members = last.session_id, last.members
    if last.output is not None:
        made.output = _as_before(decision.output, last.output)
        made.note = NO_FIELDS if made.output is None else None
        _take_fields(state, seq, made.output)
    step.attempts.append(made)
    return made


def _as_before(text: str, before: Any) -> Any:
    """The value that an edited text is the JSON of, if it is one of the kind it was `before`; else ``None``."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if type(value) is type(before) else None


def _reject_review(state: RunState, step: StepState, gate: Gate, decision: Decision, seq: int) -> None:
    step.status, step.redo = "ready", Redo(feedback=Ref(seq, "feedback"), answered=True)


def _skip(state: RunState, step: StepState, gate: Gate, decision: Decision, seq: int) -> None:
    step.note = f"skipped by {decision.by}"
    _settle(state, step, "skipped", None)


def _approve_start(state: RunState, step: StepState, gate: Gate, decision: Decision, seq: int) -> None:
    shown = cast("Redo", step.redo)
    edited = Ref(seq, "output") if decision.output is not None else shown.prompt
    step.status, step.redo = "ready", Redo(prompt=edited, answered=True, goes_on=shown.goes_on)


def _approve_verdict(state: RunState, step: StepState, gate: Gate, decision: Decision, seq: int) -> None:
    last = step.last
    _settle(state, step, "finished", last.answer if last is not None else None)


def _reject_verdict(state: RunState, step: StepState, gate: Gate, decision: Decision, seq: int) -> None:
    if not isinstance(step.step, Module):
        _reject_review(state, step, gate, decision, seq)
        return
    loop = state.loops.setdefault(step.id, Loop())
    loop.reason = Ref(seq, "feedback")
    loop.output = step.last.answer if step.last is not None else None
    _go_back(state, step, asked=True)


def _retry(state: RunState, step: StepState, gate: Gate, decision: Decision, seq: int) -> None:
    if gate.kind == "stale":
        step.session = None
    edited = Ref(seq, "prompt") if decision.prompt is not None else None
    kept = step.redo.feedback if step.redo is not None and edited is None else None
    if edited is None and step.redo is not None:
        edited = step.redo.prompt
    step.status = "ready"
    _trust(step)
    step.redo = Redo(prompt=edited, feedback=kept, answered=True)
    if step.caller:
        _want_place(state, step)


def _approve_exhausted(state: RunState, step: StepState, gate: Gate, decision: Decision, seq: int) -> None:
    _settle(state, step, "finished", _edited(state, step, decision, seq).answer)


def _retry_exhausted(state: RunState, step: StepState, gate: Gate, decision: Decision, seq: int) -> None:
    state.loops[step.id].extra += decision.count
    _go_back(state, step)


def _keep_stale(state: RunState, step: StepState, gate: Gate, decision: Decision, seq: int) -> None:
    step.status = "finished" if step.approved is not None else "skipped"
    _trust(step)
    _advance(state)


def _did_run(state: RunState, step: StepState, gate: Gate, decision: Decision, seq: int) -> None:
    step.note = f"{decision.by} said that it had run"
    _settle(state, step, "finished", None)


def _answer(state: RunState, step: StepState, gate: Gate, decision: Decision, seq: int) -> None:
    step.answers += ((str(gate.payload.get("question", "")), decision.feedback or ""),)
    _answered(state, step, gate, decision, seq)


def _allow(state: RunState, step: StepState, gate: Gate, decision: Decision, seq: int) -> None:
    if decision.scope in ("run", "always"):
        state.allowed[tool_of(gate)] = decision
    _answered(state, step, gate, decision, seq)


def _answered(state: RunState, step: StepState, gate: Gate, decision: Decision, seq: int) -> None:
    """The turn that had asked goes on, a member as soon as it has a place; the time it waited is not its own."""
    last = step.attempts[-1]
    last.asked_s += max(0.0, decision.at - gate.opened_at)
    if step.caller:
        step.status, step.answered, last.waits_since = "asking", gate.id, decision.at
        _want_place(state, step)
    else:
        step.status = "running"


def _turn_went_on(state: RunState, event: TurnWentOn) -> None:
    step = _met(state, event.path, event.type)
    if step.answered is None or step.answered != event.gate_id:
        raise TransitionError(f"{step.path!r} waits for no answer that it has, so it does not go on.")
    if step.place != "queued" or state.busy >= state.max_concurrency:
        raise TransitionError(f"{step.path!r} has no place to work at yet.")
    last = step.attempts[-1]
    _waited(last, event.at)
    _take_place(state, step)
    step.status, step.answered = "running", None


_Effect = Callable[[RunState, StepState, Gate, Decision, int], None]
_DECIDED: dict[tuple[GateKind, Action], _Effect] = {
    ("review", "approve"): _approve_review,
    ("review", "reject"): _reject_review,
    ("start", "approve"): _approve_start,
    ("verdict", "approve"): _approve_verdict,
    ("verdict", "reject"): _reject_verdict,
    ("verdict", "retry"): _retry,
    ("exhausted", "approve"): _approve_exhausted,
    ("exhausted", "retry"): _retry_exhausted,
    ("failed", "retry"): _retry,
    ("stale", "approve"): _keep_stale,
    ("stale", "retry"): _retry,
    ("may_have_run", "approve"): _did_run,
    ("may_have_run", "retry"): _retry,
    ("question", "answer"): _answer,
    ("permission", "approve"): _allow,
    ("permission", "reject"): _answered,
    ("budget", "approve"): lambda *given: _grant(*given),
    **{(kind, "skip"): _skip for kind, actions in ACTIONS.items() if "skip" in actions},
}


def _looped_back(state: RunState, event: LoopedBack) -> None:
    step = _met(state, event.module, event.type)
    target = state.step(event.to)
    if target.index > step.index:
        raise TransitionError(f"{step.id!r} cannot go back to {target.id!r}, which comes after it.")
    loop = state.loops.setdefault(step.id, Loop())
    loop.count += 1
    loop.active = True
    for inside in state.order[target.index : step.index + 1]:
        if isinstance(inside.step, Module) and inside is not step:
            state.loops[inside.id] = Loop()  # an inner loop begins anew
        _begin_again(inside, "pending")
        inside.looped_by = None
        inside.iteration = event.iteration
    target.looped_by = step.id
    state.epoch += 1
    state.cursor = target.index
    if state.until == step.id and state.until_once:
        state.until_reached = True


def check_rewind(state: RunState, to: str) -> StepState:
    """The step `to`, if the run can go back to it; a turn that runs can be cut short for it."""
    target = state.step(to)
    if target.status == "pending" and target.index > state.cursor:
        raise TransitionError(f"step {target.id!r} has not run yet; {state.order[state.cursor].id!r} comes first.")
    return target


def _rewound(state: RunState, event: Rewound) -> None:
    target = _met(state, event.to, event.type)
    if state.running:
        raise TransitionError(f"{', '.join(state.running)} is running; it is cut short first.")
    check_rewind(state, event.to)
    for later in state.order[target.index + 1 :]:
        _close(state, later, reopen=True)
        if later.status not in ("finished", "skipped") or event.later:
            _begin_again(later, "pending")
        if isinstance(later.step, Module) and later.index - later.step.loop_steps > target.index:
            state.loops.pop(later.id, None)  # its loop has not begun yet
            for inside in state.order[later.index - later.step.loop_steps : later.index + 1]:
                inside.iteration, inside.looped_by = 1, None
    _close(state, target)
    _begin_again(target, "ready")
    target.redo = Redo(answered=True)
    _doubt_later(state, target)
    state.cursor = min(state.cursor, target.index)
    state.epoch += 1


_HANDLERS: dict[str, Callable[[RunState, Any], None]] = {
    "RunStarted": _run_started,
    "RunResumed": _run_resumed,
    "RunPaused": _run_paused,
    "RunUnpaused": _run_unpaused,
    "ModeChanged": _mode_changed,
    "RunFinished": _run_finished,
    "WorkflowChanged": _workflow_changed,
    "StepAdded": _step_added,
    "StepChanged": _step_changed,
    "StepRemoved": _step_removed,
    "StepSkipped": _step_skipped,
    "TurnStarted": _turn_started,
    "SessionOpened": _session_opened,
    "ToolCalled": _tool_called,
    "ToolReturned": _tool_returned,
    "TurnFinished": _turn_finished,
    "TurnFailed": _turn_failed,
    "TurnCutShort": _turn_cut_short,
    "GateOpened": _gate_opened,
    "GateDecided": _gate_decided,
    "TellingFailed": _telling_failed,
    "AgentsCalled": lambda state, event: _agents_called(state, event),
    "AgentsReturned": lambda state, event: _agents_returned(state, event),
    "TurnWentOn": _turn_went_on,
    "StepFailed": lambda state, event: _step_failed(state, event),
    "LoopedBack": _looped_back,
    "Rewound": _rewound,
}


def _settle(state: RunState, step: StepState, status: Literal["finished", "skipped"], output: Ref | None) -> None:
    """The run may go past `step`, whose output is `output`; what was made from an earlier one is stale."""
    if step.looped_by is not None and status == "skipped":
        _hand_on(state, step)
    step.status, step.approved = status, output
    _trust(step)
    step.due, step.redo, step.looped_by, step.resent = None, None, None, ()
    if step.caller:
        _member_ended(state, step)
        return
    if isinstance(step.step, Parallel) and step.last is not None:
        for member in step.last.members:
            state.voices[member.id] = member.approved if output is not None else None
    if step.id in state.loops:
        state.loops[step.id] = Loop()
    if step.index < state.frontier:
        state.epoch += 1
        _doubt_later(state, step)
    else:
        state.frontier = step.index + 1
    if state.until == step.id:
        state.until_reached = True
    _advance(state)


def _hand_on(state: RunState, step: StepState) -> None:
    """What the module said that sent the run back is for the first repeated step that runs: `step` is passed over."""
    module, after = state.steps.get(cast("str", step.looped_by)), state.after(step)
    ran = step.last is not None and step.last.iteration == step.iteration
    if module is not None and after is not None and after.index <= module.index and not ran:
        after.looped_by = step.looped_by


def _doubt_later(state: RunState, step: StepState) -> None:
    """What was made after `step` is stale: from now on the output that it builds on is another."""
    for later in state.order[step.index + 1 : state.frontier] if step.index < state.frontier else ():
        if later.status in ("finished", "skipped"):
            later.stale, later.outdated_by = True, step.id


def _trust(step: StepState) -> None:
    """The step is not stale any more."""
    step.stale, step.outdated_by, step.changed = False, None, ()


def _advance(state: RunState) -> None:
    order, cursor = state.order, state.cursor
    while cursor < len(order) and order[cursor].settled:
        cursor += 1
    state.cursor = cursor


def _begin_again(step: StepState, status: Literal["pending", "ready"]) -> None:
    """The step runs anew, from its first prompt: ``ready`` as a person asks for it, ``pending`` in the run's course.

    One that may have run does not in the run's course: its gate asks first.
    """
    step.turn, step.redo, step.retry_at, step.session = 1, None, None, None
    step.team, step.recall = (), None
    if status == "pending" and _may_have_run(step):
        step.status = "due"
        return
    step.status, step.due = status, None
    _trust(step)


def _may_have_run(step: StepState) -> bool:
    """Whether a person still has to say if a turn that was cut short had its effect."""
    return step.status in ("due", "waiting") and step.due is not None and step.due.kind == "may_have_run"


def _next_attempt(step: StepState) -> int:
    """The number of the attempt that the next turn belongs to: a chained prompt and a second try stay in theirs.

    After a person's own text comes another one, so that theirs stays what it was.
    """
    if not step.attempts:
        return 1
    last = step.attempts[-1]
    if step.status == "retrying":
        return last.number
    asked = step.redo is not None and not step.redo.goes_on
    return last.number if step.turn > 1 and not asked and not last.edited else last.number + 1


def _close(state: RunState, step: StepState, *, reopen: bool = False) -> None:
    """The gate of `step` is no longer open; with `reopen` it comes again when the run goes on."""
    if step.gate is None:
        return
    kind = step.gate.kind
    state.gates.pop(step.gate.id, None)
    step.gate = None
    if kind == "budget":
        _release(state)
        return
    if not reopen:
        return
    if kind == "stale":
        step.status, step.stale = "finished", True
    elif kind == "start":
        _ask_again(step)
    elif kind not in ASKED_BY_TURNS:
        step.status = "due"
        _owe_member(state, step)


def _append(state: RunState, item: Step | Separator) -> None:
    state.items.append(item)
    if not isinstance(item, Separator):
        if isinstance(item, Parallel):
            _hear(state, None, item)
        id, agents, budget = item.id, _agents_of(state, item), _budget_of(item)
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
                item, item.id, 0, agents=_agents_of(state, item), budget=_budget_of(item)
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
    settled = [step.index for step in state.order if step.status in ("finished", "skipped")]
    state.frontier = max(settled, default=-1) + 1
    if cursor is not None and cursor.id in state.steps:
        state.cursor = cursor.index


def _take_agents(state: RunState, agents: Iterable[Mapping[str, Any]]) -> None:
    for data in agents:
        made = Agent(**data)
        state.agents[made.id] = made


def _take_inputs(state: RunState, seq: int, inputs: Mapping[str, Any]) -> None:
    for name, value in inputs.items():
        here = Ref(seq, name)
        state.inputs[name] = value
        state.input_refs[name] = here
        state.texts[here] = as_text(value)
        if isinstance(value, dict):
            for key, inner in value.items():
                state.texts[Ref(seq, f"{name}.{key}")] = as_text(inner)


def _take_fields(state: RunState, seq: int, output: Any) -> None:
    if isinstance(output, dict):
        for key, value in output.items():
            state.texts[Ref(seq, f".{key}")] = as_text(value)


def as_text(value: Any) -> str:
    """An input as it stands in a prompt: text as it is, everything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


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
    return [*_deadlines(state), *_next_in_course(state, engine_of)]


def _deadlines(state: RunState) -> list[StartTurn | Record]:
    """What is decided at the open gates if nobody does, and when."""
    return [
        Record(GateDecided(gate_id=gate.id, decision=_by_default(gate)), not_before=gate.deadline)
        for gate in state.gates.values()
        if gate.deadline is not None
    ]


def _by_default(gate: Gate) -> Decision:
    words = "Nobody has looked at this in time. Look it over again." if gate.default == "reject" else None
    return Decision(action=gate.default or "stop", feedback=words, by=GATE_DEADLINE)


def _gate_default(step: StepState, kind: GateKind) -> GateDefault | None:
    """What is decided at a gate of `step` if nobody does, where it can be; nobody's "no" is said only once."""
    default = step.step.gate_default
    if default is None or default not in ACTIONS[kind]:
        return None
    said = (attempt.decision for attempt in step.attempts)
    again = default == "reject" and any(one.action == "reject" and one.by == GATE_DEADLINE for one in said if one)
    return None if again else default


def _next_in_course(state: RunState, engine_of: Callable[[Step], str] | None) -> list[StartTurn | Record]:
    if state.calls:
        return _members_next(state, engine_of)
    step = state.current
    if step is None:
        return [Record(RunFinished(status="completed"))]
    if step.status == "due":
        return [Record(_open(state, step, cast("Due", step.due)))]
    if step.status == "looping":
        return [Record(_loop_back(state, step))]
    if step.status == "waiting" or state.running or state.paused or state.held is not None:
        return []
    if state.until_reached:
        return [Record(RunPaused(reason=f"as far as {state.until}"))]
    if step.stale:
        reason = f"{step.id}: {why_stale(step)}."
        due = Due("stale", {"reason": reason}, (step.approved,) if step.approved is not None else (reason,))
        return [Record(_open(state, step, due))]
    if step.status == "pending" and (rule := _skip_reason(state, step)):
        return [Record(StepSkipped(step=step.id, path=step.path, reason=rule))]
    return [_start(state, step, engine_of)]


def _end(state: RunState) -> list[StartTurn | Record]:
    status, reason = cast("tuple[RunEnd, str]", state.ending)
    return [
        *(Record(event) for event in cut_all(state, "the run ended")),
        Record(RunFinished(status=status, reason=reason)),
    ]


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


def _open(
    state: RunState,
    step: StepState,
    due: Due,
    prompt: tuple[Part, ...] | None = None,
    context: tuple[Part, ...] | None = None,
) -> GateOpened:
    whole = hashlib.sha256()
    for piece in pieces(due.text, state.texts):
        whole.update(piece.encode("utf-8", "surrogatepass"))
    attempt = _next_attempt(step) if due.kind in ("start", "budget") else step.attempt
    gate = Gate(
        id=f"{state.run_id}/{step.path}/{attempt}/{step.gates + 1}",
        kind=due.kind,
        step=step.id,
        path=step.path,
        attempt=attempt,
        payload=due.payload,
        digest=whole.hexdigest(),
        actions=ACTIONS[due.kind],
        timeout_s=step.step.gate_timeout_s,
        default=_gate_default(step, due.kind),
    )
    return GateOpened(gate=gate, prompt=prompt, context=context)


def feedback_on(state: RunState, step: StepState) -> str:
    """Why the turn of `step` runs again: the words of who rejected it, else of the module that sent the run back."""
    if step.redo is not None and step.redo.feedback is not None:
        return state.text(step.redo.feedback)
    loop = state.loops.get(step.looped_by) if step.looped_by is not None else None
    if loop is None:
        return ""
    return loop.reason if isinstance(loop.reason, str) else state.text(loop.reason)


def ask(state: RunState, step: StepState, question: str) -> GateOpened:
    """The event with which the running turn of `step` asks a person."""
    return _open(state, step, Due("question", {"question": question}, (question,)))


def ask_permission(
    state: RunState, step: StepState, tool: tuple[str, str], arguments: Mapping[str, Any], note: str = ""
) -> GateOpened:
    """The event with which the running turn of `step` asks for permission to call `tool`: name and implementation."""
    name, implementation = tool
    payload = {"tool": name, "arguments": dict(arguments), "implementation": implementation, "note": note}
    given = {key: value for key, value in payload.items() if value != ""}
    return _open(state, step, Due("permission", given, (f"{name}\n{write_arguments(arguments)}",)))


def tool_of(gate: Gate) -> tuple[str, str]:
    """The tool that a permission is about: its name, its implementation."""
    return str(gate.payload.get("tool", "")), str(gate.payload.get("implementation", ""))


def _loop_back(state: RunState, step: StepState) -> LoopedBack:
    module = cast("Module", step.step)
    target = state.order[max(0, step.index - module.loop_steps)]
    loop = state.loops.setdefault(step.id, Loop())
    return LoopedBack(module=step.id, to=target.id, iteration=loop.count + 2, reason=loop.reason)


def _skip_reason(state: RunState, step: StepState) -> str | None:
    if step.step.execute_once and step.approved is not None:
        return "runs once; its output is kept"
    for module_id, loop in state.loops.items():
        if loop.active and module_id in state.steps:
            module = cast("Module", state.steps[module_id].step)
            if step.id in module.loop_skip:
                return f"left out while {module_id} goes back"
    return None


def _start(
    state: RunState, step: StepState, engine_of: Callable[[Step], str] | None, ahead: int = 0
) -> StartTurn | Record:
    """Begin `step`, or ask first; `ahead`: so many others begin before it."""
    if step.status != "retrying" and (over := _over(state, step, ahead)) is not None:
        return Record(_open(state, step, over))
    if isinstance(step.step, Parallel):
        return Record(_call_members(state, step, step.step))
    session = step.session
    if session is not None and engine_of is not None and engine_of(step.step) != step.session_engine:
        session = None  # another engine would not know it
    prompt, context = compose(state, step, continues=session is not None)
    if _asks_first(state, step) and missing_field(state, step) is None:  # else it fails as a turn
        return Record(_open(state, step, Due("start", _note(state, step), prompt + (context or ())), prompt, context))
    return StartTurn(
        step=step,
        attempt=_next_attempt(step),
        turn=step.turn,
        prompt=prompt,
        context=context,
        session_id=session,
        not_before=step.retry_at,
    )


def _asks_first(state: RunState, step: StepState) -> bool:
    """Whether the next prompt of `step` is put to a person; of chained prompts each in a manual run, else the first."""
    if step.step.gate == "after" or not state.pauses(step.step):
        return False
    if step.turn > 1:
        return step.status == "ready" and step.redo is None and state.mode == "step-by-step"
    return step.status == "pending" and (step.redo is None or not step.redo.answered)


# -- budgets ----------------------------------------------------------------------------------------------------------


def _budget_of(item: Step, before: StepState | None = None) -> Budget | None:
    """The budget of a step as it is defined now; what it used `before` counts."""
    limits = limits_of(item)
    if not limits:
        return None
    budget = Budget()
    budget.permit(limits)
    if before is not None and before.budget is not None:
        budget.used, budget.unknown = before.budget.used, before.budget.unknown
    elif before is not None:
        everybody = [before]
        for one in everybody:
            everybody += one.members
            for attempt in one.attempts:
                if not attempt.edited:
                    budget.used["max_turns"] += len(attempt.turns)
                    _add(budget, attempt.usage, attempt.cost_usd, ended=attempt.answer is not None)
    return budget


def _budgets(state: RunState, step: StepState) -> tuple[Budget, ...]:
    """The budgets from which `step` is paid: the run's, and that of the workflow's step that it belongs to."""
    own = (state.steps[step.path.partition("/")[0]] if step.caller else step).budget
    return (state.budget,) if own is None else (state.budget, own)


def _pay(state: RunState, step: StepState, last: Attempt, event: TurnFinished | TurnFailed | TurnCutShort) -> None:
    """What the turn is known to have used counts, whatever became of it."""
    usage, cost_usd = event.usage, event.cost_usd
    if usage is not None:
        last.usage = usage if last.usage is None else last.usage + usage
        state.usage = state.usage + usage
    if cost_usd is not None:
        last.cost_usd = (last.cost_usd or 0.0) + cost_usd
        state.cost_usd += cost_usd
    if event.cost_estimated:
        last.cost_estimated = state.cost_estimated = True
    state.last_turn = step.path
    for budget in _budgets(state, step):
        _add(budget, usage, cost_usd, ended=event.type == "TurnFinished")


def _add(budget: Budget, usage: Usage | None, cost_usd: float | None, *, ended: bool) -> None:
    """Count what was used; of a turn that `ended` and does not say, that it is not known.

    One that says that it cost nothing has asked no model: where it counts no tokens, there are none.
    """
    if usage is not None:
        budget.used["max_tokens"] += usage.input_tokens + usage.output_tokens
    elif ended and cost_usd != 0:
        budget.unknown["max_tokens"] = budget.unknown.get("max_tokens", 0) + 1
    if cost_usd is not None:
        budget.used["max_cost_usd"] += cost_usd
    elif ended:
        budget.unknown["max_cost_usd"] = budget.unknown.get("max_cost_usd", 0) + 1


def _over(state: RunState, step: StepState, ahead: int = 0) -> Due | None:
    """The gate that comes before the next turn of `step`, once `ahead` others have started; ``None``: it may start."""
    for budget in _budgets(state, step):
        if budget.limits and (payload := budget.reached(ahead)) is not None:
            if budget is not state.budget:
                payload["of"] = step.path.partition("/")[0]
            if state.last_turn:
                payload["after"] = state.last_turn
            return Due("budget", payload, (json.dumps(payload),))
    return None


def _grant(state: RunState, step: StepState, gate: Gate, decision: Decision, seq: int) -> None:
    """So much more may be used, counted from what is used by now; what was only unknown is not asked about again."""
    name = gate.payload["limit"]
    budget = state.budget if "of" not in gate.payload else state.steps[gate.payload["of"]].budget
    more = getattr(decision, name)
    if budget is None:
        return
    if "unknown" in gate.payload:
        budget.waived.add(name)
    elif more is None:
        more = budget.amounts[name]
        setattr(decision, name, more)  # said in the event, for whoever reads it
    if more is not None:
        budget.limits[name] = max(budget.limits[name], budget.used[name]) + more


def _release(state: RunState) -> None:
    """The step that was held stands as it did."""
    step, status = cast("tuple[StepState, StepStatus]", state.held)
    step.status, state.held = status, None


def _let_go(state: RunState) -> None:
    """Close a ``budget`` gate that asks about a limit which is another one now; if it is reached too, it asks again."""
    if state.held is not None:
        _close(state, state.held[0])


# -- members ----------------------------------------------------------------------------------------------------------


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


def _call_members(state: RunState, step: StepState, parallel: Parallel) -> AgentsCalled:
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
    attempt = _next_attempt(caller) if isinstance(caller.step, Parallel) else caller.attempt
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


def _agents_called(state: RunState, event: AgentsCalled) -> None:
    caller = _met(state, event.path, event.type)
    parallel = caller.step if isinstance(caller.step, Parallel) else None
    number = _next_attempt(caller) if parallel is not None else caller.attempt
    if (parallel is None) != (caller.status == "running"):
        raise TransitionError(f"AgentsCalled is not possible while {caller.path!r} is {caller.status}.")
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
        _doubt_later(state, caller)
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
        _leave_place(state, caller)
    call = state.calls[caller.path] = Call(event.call, groups, event.max_concurrency)
    _next_group(state, caller, call)


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
    member = StepState(
        task,
        one.path,
        caller.index,
        iteration=caller.iteration,
        caller=caller.path,
        depth=caller.depth + 1,
        asked=_key(one.agent, one.prompt, one.files, event.files),
    )
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


def _next_group(state: RunState, caller: StepState, call: Call) -> None:
    """Begin with the first or next group; past the last one, and past a failure, the caller goes on."""
    while call.group + 1 < len(call.groups):
        if call.group >= 0 and any(member.status == "failed" for member in call.groups[call.group]):
            break
        call.group, call.next = call.group + 1, 0
        call.left = sum(member.status not in _ENDED for member in call.groups[call.group])
        if call.left:
            _fill(state, call)
            return
    if caller.caller:
        _want_place(state, caller)
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
            if member.status == "due" or member.status in _ENDED:
                continue
        else:
            return
        call.busy += 1
        member.place = "queued"
        line = state.lines[member.depth]
        line[member.path] = member
        if begun:
            line.move_to_end(member.path, last=False)


def _want_place(state: RunState, member: StepState) -> None:
    """The member goes on as soon as there is a place."""
    _leave_place(state, member, fill=False)
    call = state.calls.get(member.caller)
    if call is not None:
        member.place = "wants"
        call.again.append(member)
        _fill(state, call)


def _take_place(state: RunState, member: StepState) -> None:
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


def _leave_place(state: RunState, member: StepState, *, fill: bool = True) -> None:
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


def _owe_member(state: RunState, step: StepState) -> None:
    """If `step` is a member that is waited for, its gate is opened beside whatever its siblings do."""
    if step.caller:
        _leave_place(state, step)
        if step.caller in state.calls:
            state.owed[step.path] = step


def _judge_member(state: RunState, member: StepState, last: Attempt) -> None:
    """The end of a member's turn: what its verdict says is its caller's to read, but for an error."""
    if last.verdict is not None and last.verdict.action == "error":
        _conclude(state, member, last)
        _owe_member(state, member)
    else:
        _settle(state, member, "finished", last.answer)


def _member_ended(state: RunState, member: StepState) -> None:
    """The member has ended, in whatever way: the next one's turn, the next group's, or its caller's."""
    _leave_place(state, member)
    state.owed.pop(member.path, None)
    call = state.calls.get(member.caller)
    if call is not None:
        call.left -= 1
        if not call.left:
            _next_group(state, state.find(member.caller), call)


def _step_failed(state: RunState, event: StepFailed) -> None:
    member = _met(state, event.path, event.type)
    if not member.caller:
        raise TransitionError(f"{member.id!r} was called by nobody, so nobody can be told that it failed.")
    _close(state, member)
    member.status, member.due, member.note = "failed", None, event.reason
    _member_ended(state, member)


def _check_alone(state: RunState, caller: StepState) -> None:
    """Refuse to end a turn while one that it has called is under way: that is cut short first."""
    call = state.calls[caller.path]
    for member in call.groups[call.group]:
        if member.path in state.running or member.path in state.backing_off:
            raise TransitionError(f"{member.path} is running; it is cut short first.")


def _waited(attempt: Attempt, at: float) -> None:
    """Until now the attempt waited for others: that time is not its own."""
    if attempt.waits_since is not None:
        attempt.asked_s += max(0.0, at - attempt.waits_since)
        attempt.waits_since = None


def _end_calls(state: RunState, caller: StepState, at: float) -> None:
    """The turn waits for nobody any more; it works on or ends, so it has a place."""
    call = state.calls.pop(caller.path, None)
    if call is None:
        return
    _waited(caller.attempts[-1], at)
    for member in call.groups[call.group]:
        _leave_place(state, member)
        state.owed.pop(member.path, None)
        _close(state, member, reopen=True)
    if caller.caller:
        _take_place(state, caller)
    else:
        state.lines[0].pop(caller.path, None)


def _keep_team(step: StepState) -> None:
    """The turn did not end: whom it has called can be called again without beginning anew."""
    if step.team:
        step.recall = step.recall or {}
        for member in step.team:
            step.recall.setdefault(member.asked, []).append(member)
        step.team = ()


def _agents_returned(state: RunState, event: AgentsReturned) -> None:
    caller = _met(state, event.path, event.type)
    call = state.calls[caller.path]
    if event.call != call.number:
        raise TransitionError(
            f"AgentsReturned names call {event.call} of {caller.path!r}, which waits for {call.number}."
        )
    _check_alone(state, caller)
    _end_calls(state, caller, event.at)
    if not isinstance(caller.step, Parallel):
        caller.status = "running"
        return
    del state.running[caller.path]
    last = caller.attempts[-1]
    last.ended_at = event.at
    members = call.groups[0]
    wrong = [f"{member.id} failed: {member.note}" for member in members if member.status == "failed"]
    if wrong:
        _keep_team(caller)
        error = ErrorInfo(kind="MemberFailed", message=" ".join(wrong))
        last.errors += (error,)
        _owe(caller, Due("failed", {"error": error.message}, (error.message,)))
        return
    caller.team, caller.recall = (), None
    last.answer = Ref(event.seq)
    parts: tuple[Part, ...] = ()
    for member in members:
        said = member.approved if member.approved is not None else f"No output: {member.note}."
        parts += ("\n\n" if parts else "", f"## {member.id}\n\n", said)
    state.texts[last.answer] = parts
    _judge(state, caller, last)


def _hear(state: RunState, old: Step | None, new: Step | None) -> None:
    """Who works in a parallel step has a name of its own in prompts."""
    if isinstance(old, Parallel):
        for name in old.members:
            state.voices.pop(name, None)
    if isinstance(new, Parallel):
        for name in new.members:
            state.voices.setdefault(name, None)
            state.names.setdefault(name.replace("-", "_"), name)


def _members_next(state: RunState, engine_of: Callable[[Step], str] | None) -> list[StartTurn | Record]:
    """What to do while a turn waits for others."""
    actions: list[StartTurn | Record] = [
        Record(_open(state, member, cast("Due", member.due))) for member in state.owed.values()
    ]
    if not state.paused:
        actions += [_start(state, member, engine_of) for member in state.backing_off.values()]
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


def results(state: RunState, called: AgentsCalled) -> list[AgentResult]:
    """What came of a call, in its order, for its caller."""
    found = []
    for one in (one for group in called.groups for one in group):
        member = state.members[one.path]
        text = last_lines(state.text(member.approved), one.tail)
        status, error = member.status, None
        if status == "failed":
            error = member.note or "it failed"
        elif status not in _ENDED:
            status, error = "pending", "it was not begun, because one before it failed"
        found.append(AgentResult(member.id, member.path, text, error, STATUS_WORDS[status]))
    return found
