"""What a run is: the data that its events make, and small questions that the data alone answers.

Strategy: plain dataclasses with slots, for one run at a time. ``RunState`` holds all of it: the steps in their order
and a cursor on the first that is not settled, the turns that run, the gates that are open, the members and their places
in line, every text that a later event may refer to. A ``StepState`` is a step, or an agent that another one called; its
``Attempt``s are what was tried. What has to be known quickly is kept as it changes, and nothing here scans what grows
with the run.

Only ``rules/`` and ``state.py`` change any of this; everybody else reads.
"""

from __future__ import annotations

import heapq
import sys
from collections import OrderedDict, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from .errors import TransitionError, did_you_mean
from .events import (
    NO_FILES,
    AnyEvent,
    Decision,
    ErrorInfo,
    FileChange,
    Gate,
    GateKind,
    Mode,
    Part,
    Ref,
    RunEnd,
    RunResumed,
    Usage,
)
from .plain import Plain
from .prompts import text_of
from .team import CAP, MOST_DEPTH
from .tools import denied
from .workflow import LIMITS, Agent, AutonomousMode, Module, Separator, Step, Verdict

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
"""The run in one word."""

SETTLED: tuple[StepStatus, ...] = ("finished", "skipped")
"""How a step can have come to its end."""
ENDED: tuple[StepStatus, ...] = (*SETTLED, "failed")
"""How a member can."""

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

    @property
    def denied(self) -> bool:
        """A person did not allow the call."""
        return denied(self.text, self.failed)


@dataclass(slots=True, eq=False, repr=False)
class Attempt(Plain):
    """One attempt of a step: what was sent, what came back, what was decided about it.

    Attributes
    ----------
    number, iteration
        Which attempt of the step it is, and in which pass of its loop; from 1.
    prompt, text
        The exact prompt, and the answer (``""`` while there is none).
    output
        The answer as JSON-ready data, where it had to fit a class.
    verdict
        What a module says: ``action, reason, score``.
    decision, feedback
        What was decided about it, and why it was rejected; ``None`` while nobody has.
    usage, cost_usd
        Tokens and US dollars; ``None``: its engine does not say. ``cost_estimated``: computed from a table of prices.
    duration_s
        Seconds it took, without those in which it waited for an answer (``asked_s``).
    started_at, ended_at
        Unix time in seconds.
    files_changed, diff
        The files that it changed in the workspace, and what in them, as a unified diff.
    error, errors
        The last error, and all of them, those included after which it was tried again by itself.
    edited, cut_short
        Whether a person wrote it; why it did not end.
    note
        What else is to be said of the answer, for instance that no model was called.
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
    so_far: tuple[Usage | None, float | None] = (None, None)
    """Of that, what the turn that runs has said that it used."""
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
    before: str | None = None
    """The snapshot of the workspace that it began with, as far as one is known."""
    after: str | None = None
    """The snapshot after it, where it changed something; what was taken back since is still in it."""
    files_changed: tuple[FileChange, ...] = ()
    """The files that it changed in the workspace; of many, the first."""
    files_total: int = 0
    """How many they are."""
    patch: Ref | None = None
    """Where the diff stands."""
    kept: str | None = None
    """The snapshot of what was there before it began and the files were taken back, where that was in none."""
    kept_total: int = 0
    """How many files were other ones in it."""
    unkept: str | None = None
    """Why there is no snapshot, or no whole one."""
    restored: bool = False
    """It began with the files as they had been, others being taken back."""

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
    def diff(self) -> str:
        """What it changed in the files of the workspace, as a unified diff; ``""`` when nothing."""
        return text_of((self.patch,), self.texts) if self.patch is not None else ""

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

    def begin_anew(self) -> None:
        """Nothing of it is used yet."""
        self.limits, self.used, self.unknown = dict(self.amounts), dict.fromkeys(LIMITS, 0), {}

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
    kept: int = 0
    """The event (``seq``) with which somebody kept it although it was stale; 0: nobody did."""
    changed: tuple[str, ...] = ()
    """Why it is stale: what of its own definition changed after it ran."""
    added: int = 0
    """The event (``seq``) that put it in while the run lived; 0: it was there from the start."""
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
    """The prompts before this one in its conversation, and the answers: what an engine without sessions is told."""
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
    files_before: str | None = None
    """The snapshot that a rejection goes back to; ``None``: not known. See ``rules/files.py``."""
    files_first: str | None = None
    """The one that a rewind goes back to: before its first attempt since the run came to it."""
    restore: str | None = None
    """The one that its next turn is to begin with, until that is so."""

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
class Origin(Plain):
    """What a fork was made of: the run, the step it begins at, and how far their history is shared.

    ``usage`` and ``cost_usd``: what had been used by then, in the runs before.
    """

    run: str
    step: str
    seq: int
    usage: Usage
    cost_usd: float


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
    """One past the last step that ever began: beyond it nothing can be stale."""
    outdated: dict[str, str] = field(default_factory=dict)
    """Steps that may wait with what they made before an earlier one ran again, by path, and which one that was."""
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
    back_at: str | None = None
    """The step before which the run is paused since somebody went back to it."""
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
    default_places: int = CAP
    """The same as the workflow's definition has it."""
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
    tree: str = NO_FILES
    """The last snapshot of the workspace."""
    loose: bool = False
    """A turn may have changed files since, of which there is no snapshot."""
    unkept: str | None = None
    """Why there are no snapshots at all."""
    recorded: str | None = None
    origin: Origin | None = None
    """Of a fork."""
    resumed: list[RunResumed] = field(default_factory=list)
    broke_off_at: float = 0.0
    """When the last thing was heard of it before it was resumed, the last time."""
    untold: dict[str, str] = field(default_factory=dict)
    """By gate: why nobody was told that it is open."""
    started_at: float = 0.0
    ended_at: float | None = None
    at: float = 0.0
    seq: int = 0

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
        """The steps whose turn runs, or is to be tried again; who was called before its caller."""
        current = self.current
        again = current is not None and (current.status == "retrying" or current is self.held_retry)
        waits = [current] if current is not None and again else []
        return [*self.backing_off.values(), *reversed(self.running.values()), *waits]

    @property
    def held_retry(self) -> StepState | None:
        """The step that is to be tried again by itself once a person has said yes to its cost."""
        return self.held[0] if self.held is not None and self.held[1] == "retrying" else None

    def find(self, path: object) -> StepState:
        """The step or member at `path`; a ``TransitionError`` lists the right names."""
        if isinstance(path, str) and (found := self.steps.get(path) or self.members.get(path)) is not None:
            return found
        return self.step(path)

    def step(self, id: object) -> StepState:
        """The step named `id`; a ``TransitionError`` lists the right names."""
        found = self.named(id) if isinstance(id, str) else None
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


def why_stale(state: RunState, step: StepState) -> str:
    """Why `step` is stale: "planner changed after this ran", "its prompt changed after it ran"."""
    if step.changed:
        *most, last = step.changed
        return f"its {', '.join(most)} and {last} changed after it ran" if most else f"its {last} changed after it ran"
    before = step.outdated_by
    if before is None:
        return "something it builds on changed after this ran"
    earlier = state.steps.get(before)
    became = "was removed" if earlier is None else "was added" if earlier.added > _built(step) else "changed"
    return f"{before} {became} after this ran"


def _built(step: StepState) -> int:
    """The event from which on what `step` gave says nothing of what is new: it began, or was kept as it is."""
    if step.last is not None and step.last.turns:
        return max(step.last.turns[0], step.kept)
    return max(step.approved.seq, step.kept) if step.approved is not None else sys.maxsize


def gate_path(gate_id: str) -> str:
    """The path of the step that a gate's id (``run/path/attempt/ordinal``) names."""
    return gate_id.partition("/")[2].rsplit("/", 2)[0]
