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
       ▼            ▼  │ ▼             │              asking:  a question is open while the turn runs
    waiting ◄──── due  │ asking        │              retrying: begins again by itself, at ``retry_at``
       └───► ready, finished, skipped, looping        looping: will send the run back

The cursor stands on the first step that is not settled. Nothing here scans or copies what grows with the run.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, cast

from .errors import AlreadyDecided, TransitionError, did_you_mean
from .events import (
    ACTIONS,
    EDITABLE,
    Action,
    AnyEvent,
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
    StepAdded,
    StepChanged,
    StepRemoved,
    StepSkipped,
    TurnCutShort,
    TurnFailed,
    TurnFinished,
    TurnStarted,
    Usage,
    WorkflowChanged,
)
from .prompts import compose, missing_field, pieces, text_of
from .workflow import Agent, AutonomousMode, Module, Separator, Step, Verdict, Workflow, as_step

StepStatus = Literal[
    "pending", "ready", "running", "asking", "retrying", "due", "waiting", "looping", "finished", "skipped"
]
Status = Literal["running", "waiting", "paused", "completed", "stopped", "failed"]

TRANSITIONS: dict[StepStatus, dict[str, tuple[StepStatus, ...]]] = {
    "pending": {
        "TurnStarted": ("running",),
        "GateOpened": ("waiting",),  # start
        "StepSkipped": ("skipped",),
        "Rewound": ("ready",),
    },
    "ready": {"TurnStarted": ("running",), "Rewound": ("ready",)},
    "running": {
        "TurnFinished": ("ready", "due", "looping", "finished"),
        "TurnFailed": ("retrying", "due"),
        "TurnCutShort": ("ready", "due"),
        "GateOpened": ("asking",),  # question
    },
    "asking": {
        "GateDecided": ("running", "asking"),
        "TurnFailed": ("retrying", "due"),
        "TurnCutShort": ("ready", "due"),
    },
    "retrying": {"TurnStarted": ("running",), "TurnCutShort": ("ready", "due"), "Rewound": ("ready",)},
    "due": {"GateOpened": ("waiting",), "Rewound": ("ready",)},
    "waiting": {
        "GateDecided": ("ready", "finished", "skipped", "looping", "due", "pending"),
        "Rewound": ("ready",),
    },
    "looping": {"LoopedBack": ("pending",), "Rewound": ("ready",)},
    "finished": {"GateOpened": ("waiting",), "Rewound": ("ready",)},  # stale
    "skipped": {"GateOpened": ("waiting",), "Rewound": ("ready",)},  # stale
}
"""Which events a step may meet in each status, and what it may become by them."""

_SETTLED: tuple[StepStatus, ...] = ("finished", "skipped")
_AT_REST: tuple[StepStatus, ...] = ("pending", "ready", "retrying", "due", "waiting", "looping", *_SETTLED)
SWEPT: dict[str, dict[StepStatus, tuple[StepStatus, ...]]] = {
    "LoopedBack": dict.fromkeys(_SETTLED, ("pending",)),
    "Rewound": dict.fromkeys(_AT_REST, ("pending", "finished")),
    "RunFinished": {"waiting": ("due", "finished", "pending")},
    "StepChanged": dict.fromkeys(_AT_REST, ("pending", "finished")),
}
"""What an event may make of the steps that it is not about (and ``StepChanged`` of its own), by their status."""

STATUS_WORDS: dict[StepStatus, str] = {
    "pending": "pending",
    "ready": "queued",
    "running": "running",
    "asking": "asks you",
    "retrying": "tries again",
    "due": "waiting",
    "waiting": "waiting",
    "looping": "goes back",
    "finished": "done",
    "skipped": "skipped",
}
"""A step's status in words for people."""


NO_FIELDS = "The edited text is not the JSON of the output any more, so it has no fields."
"""Said beside an edited output that had a structure."""


@dataclass(slots=True, repr=False)
class Attempt:
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
    session_id: str | None = None
    note: str | None = None
    decision: Decision | None = None
    errors: list[ErrorInfo] = field(default_factory=list)
    failures: int = 0
    """Failures of the present turn, each tried again by itself."""
    edited: bool = False
    cut_short: str | None = None

    def __repr__(self) -> str:
        return f"<Attempt {self.number}: {self.text[:60]!r}>"

    @property
    def prompt(self) -> str:
        """The exact prompt sent; of chained prompts all, a blank line between."""
        return "\n\n".join(text_of((Ref(seq, "prompt"),), self.texts) for seq in self.turns)

    @property
    def text(self) -> str:
        """The answer, or ``""`` while there is none."""
        return cast("str", self.texts[self.answer]) if self.answer is not None else ""

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
        """Seconds it took, waiting for a person not counted; of a tape, what was recorded; ``None`` until it ends."""
        if self.measured_s is not None:
            return self.measured_s
        return None if self.ended_at is None else max(0.0, self.ended_at - self.started_at - self.asked_s)


@dataclass(slots=True)
class Due:
    """A gate that is to be opened, and what it should tell."""

    kind: GateKind
    payload: dict[str, Any] = field(default_factory=dict)
    text: tuple[Part, ...] = ()


@dataclass(slots=True)
class Redo:
    """Why the next attempt runs, so that its prompt can be composed again after a crash."""

    feedback: Ref | None = None
    """The text of the rejection."""
    prompt: Ref | None = None
    """An edited prompt, sent instead of the template."""
    answered: bool = False
    """A person asked for it: its prompt needs no ``start`` gate of its own."""


@dataclass(slots=True)
class StepState:
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
    agent: Agent | None = None
    """Its agent, as it was when the step was defined."""
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
    retry_at: float | None = None
    looped_by: str | None = None
    """The module that sent the run back to this step."""
    answers: list[tuple[str, str]] = field(default_factory=list)
    """Questions of this attempt and their answers."""
    resent: list[tuple[str, str]] = field(default_factory=list)
    """Answers given in an attempt that was cut short: they need not be asked for again."""
    note: str | None = None

    @property
    def id(self) -> str:
        """The step's id."""
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
    def last(self) -> Attempt | None:
        """The last attempt."""
        return self.attempts[-1] if self.attempts else None


@dataclass(slots=True)
class Loop:
    """A module's loop: jumps made, jumps granted beyond the limit, and what it said last."""

    count: int = 0
    extra: int = 0
    active: bool = False
    reason: Part = ""
    output: Ref | None = None


@dataclass(slots=True)
class StartTurn:
    """Action: send a prompt: the text of ``prompt`` and then ``context``; not before ``not_before`` (Unix seconds)."""

    step: StepState
    attempt: int
    turn: int
    prompt: tuple[Part, ...]
    context: tuple[Part, ...] | None
    session_id: str | None
    not_before: float | None = None


@dataclass(slots=True)
class Record:
    """Action: write down what follows from the state."""

    event: AnyEvent


@dataclass(slots=True)
class RunState:
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
    decisions: dict[str, Decision] = field(default_factory=dict)
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
    until_reached: bool = False
    ending: tuple[RunEnd, str] | None = None
    """The end that has been decided on and is to be recorded."""
    ended: RunEnd | None = None
    reason: str = ""
    turns_ended: dict[str, int] = field(default_factory=dict)
    """Turns of each agent that ended, by an answer or an error."""
    usage: Usage = field(default_factory=Usage)
    cost_usd: float = 0.0
    workspace: str | None = None
    recorded: str | None = None
    resumed: list[RunResumed] = field(default_factory=list)
    started_at: float = 0.0
    ended_at: float | None = None
    at: float = 0.0
    seq: int = 0

    @classmethod
    def of(cls, workflow: Workflow) -> RunState:
        """The state of `workflow` before anything ran, for drawing it."""
        state = cls()
        apply(state, RunStarted(seq=1, run_id="", workflow=workflow.to_dict()))
        return state

    @property
    def status(self) -> Status:
        """The run in one word."""
        if self.ended is not None:
            return self.ended
        if self.gates:
            return "waiting"
        return "paused" if self.paused and not self.running else "running"

    @property
    def current(self) -> StepState | None:
        """The step under the cursor; ``None`` past the last one."""
        return self.order[self.cursor] if self.cursor < len(self.order) else None

    def named(self, name: str) -> StepState | None:
        """The step of that id, or of that id with ``_`` for ``-``."""
        return self.steps.get(name) or self.steps.get(self.names.get(name, ""))

    @property
    def under_way(self) -> list[StepState]:
        """The steps whose turn runs, or is about to be tried again."""
        current = self.current
        waits = [current] if current is not None and current.status == "retrying" else []
        return [*self.running.values(), *waits]

    def step(self, id: str) -> StepState:
        """The step named `id`; a ``TransitionError`` lists the right names."""
        found = self.steps.get(id) or self.named(id)
        if found is None:
            raise TransitionError(f"there is no step {id!r}. {did_you_mean(id, self.steps, 'Steps')}")
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
    if state.run_id or state.seq:
        if kind == "RunStarted":
            raise TransitionError(f"run {state.run_id!r} has started already.")
        if state.ended is not None and kind not in ("RunResumed", "GateDecided"):
            raise TransitionError(f"run {state.run_id!r} is {state.ended}; resume it first.")
    elif kind != "RunStarted":
        raise TransitionError(f"{kind} comes before RunStarted.")
    _HANDLERS[kind](state, event)
    state.at = event.at
    state.seq = event.seq


def _met(state: RunState, step_id: str, kind: str) -> StepState:
    """The step that an event of that kind is about, if it may meet it now."""
    step = state.step(step_id)
    if kind not in TRANSITIONS[step.status]:
        allowed = ", ".join(TRANSITIONS[step.status]) or "nothing"
        raise TransitionError(f"{kind} is not possible while step {step.id!r} is {step.status} (possible: {allowed}).")
    return step


def _turn_met(state: RunState, event: TurnFinished | TurnFailed | TurnCutShort) -> tuple[StepState, Attempt]:
    step = _met(state, event.step, event.type)
    last = step.attempts[-1] if step.attempts else None
    if last is None or last.number != event.attempt or step.turn != event.turn:
        raise TransitionError(
            f"{event.type} names attempt {event.attempt}, turn {event.turn} of step {step.id!r}, "
            f"which is at attempt {step.attempt}, turn {step.turn}."
        )
    return step, last


def _run_started(state: RunState, event: RunStarted) -> None:
    workflow = Workflow.restore(event.workflow)
    state.run_id, state.name, state.engine = event.run_id, workflow.name, workflow.engine
    state.agents = {agent.id: agent for agent in workflow.agents}
    _take_autonomy(state, workflow.autonomous_mode)
    state.workspace, state.recorded, state.started_at = event.workspace, event.recorded, event.at
    state.defaults = workflow.inputs
    _take_inputs(state, event.seq, {**workflow.inputs, **event.inputs})
    for item in workflow.steps:
        _append(state, item)
    for id, digest in event.fingerprints.items():
        if id in state.steps:
            state.steps[id].fingerprint = digest
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
    state.until, state.until_reached = None, False


def _run_unpaused(state: RunState, event: RunUnpaused) -> None:
    state.paused, state.pause_reason = False, ""
    _go_until(state, event.until)


def _go_until(state: RunState, until: str | None) -> None:
    state.until = until
    state.until_reached = until is not None and until in state.steps and state.steps[until].index < state.cursor


def _mode_changed(state: RunState, event: ModeChanged) -> None:
    if state.locked is not None:
        raise TransitionError(
            f"workflow {state.name!r} is locked to autonomous_mode={state.locked!r}; its mode cannot be switched. "
            "Define it with autonomous_mode=True to switch while it runs."
        )
    state.mode = event.mode


def _workflow_changed(state: RunState, event: WorkflowChanged) -> None:
    if event.autonomous_mode is not None:
        _take_autonomy(state, event.autonomous_mode)
    if event.engine is not None:
        state.engine = event.engine or None
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
        _close(state, state.steps[gate.step], reopen=True)
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
    what = _what_changed(step.step, step.agent, item, state.agents.get(item.agent))
    state.items[place] = item
    step.step, step.fingerprint, step.agent = item, event.fingerprint, state.agents.get(item.agent)
    _close(state, step, reopen=True)
    if step.status in ("finished", "skipped"):
        step.stale = True
        step.changed = (*step.changed, *(part for part in what if part not in step.changed))
        state.cursor = min(state.cursor, step.index)
    elif step.status != "pending":
        # what waits for a decision was made by the old definition: it is made again
        _begin_again(step, "pending")


def _what_changed(old: Step, was: Agent | None, new: Step, agent: Agent | None) -> tuple[str, ...]:
    """Which parts of a step's definition are others now; with none of them, it is an input that its prompt names."""

    def parts(step: Step, agent: Agent | None) -> dict[str, Any]:
        named = agent if agent is not None else Agent(step.agent)
        own = {"prompt", "engine", "model", "reasoning_effort"}
        return {
            "prompt": step.prompts(agent),
            "agent": named.model_dump(exclude=own),
            "engine": step.engine or named.engine,
            "model": (step.model or named.model, step.reasoning_effort or named.reasoning_effort),
            "options": step.model_dump(exclude={"agent", *own}),
        }

    before, after = parts(old, was), parts(new, agent)
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
    state.removed[step.id] = step.gates
    state.until_reached = state.until_reached or state.until == step.id
    if step.index < state.cursor:
        state.cursor -= 1
    _reindex(state)
    state.epoch += 1
    _advance(state)


def _step_skipped(state: RunState, event: StepSkipped) -> None:
    step = _met(state, event.step, event.type)
    step.note = event.reason
    _settle(state, step, "skipped", step.approved)


def _turn_started(state: RunState, event: TurnStarted) -> None:
    step = _met(state, event.step, event.type)
    number, seq, context = _next_attempt(step), event.seq, event.context
    if event.attempt != number or event.turn != step.turn:
        raise TransitionError(
            f"attempt {event.attempt}, turn {event.turn} of step {step.id!r} cannot start; attempt "
            f"{number}, turn {step.turn} is next."
        )
    if not step.attempts or number > step.attempts[-1].number:
        step.attempts.append(Attempt(state.texts, number, event.iteration, engine=event.engine, started_at=event.at))
        step.answers = []
    last = step.attempts[-1]
    if step.status == "retrying":
        last.turns.pop()
        last.started_at = event.at  # waiting between two tries is not work
    elif last.ended_at is not None:
        last.asked_s += max(0.0, event.at - last.ended_at)  # a person looked at the answer to the prompt before
    last.ended_at, last.engine = None, event.engine
    last.turns.append(seq)
    last.session_id = event.session_id
    state.texts[Ref(seq, "prompt")] = event.prompt + (context or ())
    if context is not None:
        here = Ref(seq, "context")
        state.texts[here] = context
        if step.step.context == "all":
            state.context_all = (here, step.index, state.epoch)
    _doubt_later(state, step)
    step.status, step.retry_at, step.note = "running", None, None
    state.running[step.path] = step


def _turn_finished(state: RunState, event: TurnFinished) -> None:
    step, last = _turn_met(state, event)
    del state.running[step.path]
    _count_turn(state, step)
    here = Ref(event.seq)
    state.texts[here] = event.text
    usage = event.usage
    last.failures = 0
    last.answer, last.output, last.verdict, last.ended_at = here, event.output, event.verdict, event.at
    last.session_id, last.note = event.session_id or last.session_id, event.note
    step.session, step.session_engine = last.session_id, last.engine
    _take_fields(state, event.seq, event.output)
    if event.duration_s is not None:
        last.measured_s = (last.measured_s or 0.0) + event.duration_s
    if usage is not None:
        last.usage = usage if last.usage is None else last.usage + usage
        state.usage = state.usage + usage
    if event.cost_usd is not None:
        last.cost_usd = (last.cost_usd or 0.0) + event.cost_usd
        state.cost_usd += event.cost_usd
    _judge(state, step, last)


def _judge(state: RunState, step: StepState, last: Attempt) -> None:
    """What the end of a turn leads to: a pause, the next chained prompt, or what the verdict says."""
    more = step.turn < step.step.turns
    asks = state.mode == "step-by-step" or (step.step.interactive is True and not more)
    asks = asks and step.step.gate in ("after", "both")
    answer = (last.answer,) if last.answer is not None else ()
    if not more and (problem := _verdict_problem(step, last)) is not None:
        _owe(step, Due("verdict", {"reason": problem}, answer))
    elif asks:
        payload: dict[str, Any] = {}
        if state.mode == "step-by-step" and step.step.interactive is False:
            payload["note"] = "This step asks for no pause, but in step-by-step mode every step pauses."
        if more:
            payload["next_prompt"] = step.turn + 1
        _owe(step, Due("review", payload, answer))
    elif more:
        step.turn += 1
        step.status, step.redo = "ready", None
    else:
        _conclude(state, step, last)


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
        last.errors.append(info)
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
    _stop_running(state, step)
    _count_turn(state, step)
    last.errors.append(event.error)
    last.failures += 1
    last.ended_at = event.at
    if event.retry_in_s is not None:
        step.status, step.retry_at = "retrying", event.at + event.retry_in_s
    else:
        _owe(step, Due("failed", {"error": event.error.message}, (event.error.message,)))


def _turn_cut_short(state: RunState, event: TurnCutShort) -> None:
    step, last = _turn_met(state, event)
    _stop_running(state, step)
    last.cut_short, last.ended_at = event.reason or "stopped", event.at
    step.retry_at = None
    step.resent = [*step.resent, *step.answers]
    if step.step.idempotent:
        step.status = "ready"
        step.redo = step.redo or Redo()
        step.redo.answered = True
    else:
        reason = f"{step.id} was cut short ({last.cut_short}) and may have had its effect."
        _owe(step, Due("may_have_run", {"reason": reason}, (reason,)))


def _count_turn(state: RunState, step: StepState) -> None:
    agent = step.step.agent
    state.turns_ended[agent] = state.turns_ended.get(agent, 0) + 1


def _stop_running(state: RunState, step: StepState) -> None:
    """It runs no more; a question it had asked is void."""
    state.running.pop(step.path, None)
    _close(state, step)


def _gate_opened(state: RunState, event: GateOpened) -> None:
    gate = event.gate
    step = _met(state, gate.step, event.type)
    fits = {"pending": "start", "running": "question", "due": step.due and step.due.kind}
    if gate.kind != fits.get(step.status, "stale") or (gate.kind == "stale" and not step.stale):
        raise TransitionError(f"a {gate.kind!r} gate cannot open while step {step.id!r} is {step.status}.")
    gate.opened_at = event.at
    step.status = "asking" if gate.kind == "question" else "waiting"
    step.gate = gate
    step.gates += 1
    if event.prompt is not None:
        state.texts[Ref(event.seq, "prompt")] = event.prompt + (event.context or ())
    if gate.kind == "start":
        step.redo = Redo(prompt=Ref(event.seq, "prompt"))
    state.gates[gate.id] = gate


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
    place = gate_id.split("/")
    earlier = state.steps.get("/".join(place[1:-2]))
    if earlier is not None and place[-1] in map(str, range(1, earlier.gates + 1)):
        raise AlreadyDecided(f"that gate of {earlier.id!r} is closed: its turn is over. Nothing was changed.")
    opened = ", ".join(state.gates) or "none"
    raise TransitionError(f"there is no gate {gate_id!r}. Open: {opened}.")


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
    if decision.prompt is not None and decision.action != "retry":
        raise TransitionError("an edited prompt goes with retry.")


def _gate_decided(state: RunState, event: GateDecided) -> None:
    gate, decision = gate_of(state, event.gate_id), event.decision
    check_decision(gate, decision)
    step = state.steps[gate.step]
    decision.at = event.at
    for name in ("feedback", "output", "prompt"):
        if (text := getattr(decision, name)) is not None:
            state.texts[Ref(event.seq, name)] = text
    due = step.due
    _close(state, step)
    state.decisions[gate.id] = decision
    last = step.last
    if last is not None and gate.kind not in ("start", "question", "stale"):
        last.decision = decision
    if decision.action == "stop":
        _stop_at(state, step, gate, due, decision)
    else:
        _DECIDED[gate.kind, decision.action](state, step, gate, decision, event.seq)


def _stop_at(state: RunState, step: StepState, gate: Gate, due: Due | None, decision: Decision) -> None:
    state.ending = ("stopped", f"stopped by {decision.by} at {step.id}")
    if gate.kind == "question":
        step.status = "asking"  # its turn is cut short next
    elif gate.kind == "stale":
        step.status, step.stale = "finished", True
    elif gate.kind == "start":
        step.status, step.redo = "pending", None
    else:
        step.status, step.due = "due", due


def _approve_review(state: RunState, step: StepState, gate: Gate, decision: Decision, seq: int) -> None:
    last = _edited(state, step, decision, seq)
    if step.turn < step.step.turns:
        step.turn += 1
        step.status = "ready"
        step.redo = None
    else:
        _conclude(state, step, last)


def _edited(state: RunState, step: StepState, decision: Decision, seq: int) -> Attempt:
    """The last attempt, or the one that the person's own text makes."""
    last = step.attempts[-1]
    if decision.output is None:
        return last
    made = Attempt(state.texts, last.number + 1, last.iteration, engine=last.engine, edited=True)
    made.started_at = made.ended_at = decision.at
    made.turns, made.answer, made.decision = list(last.turns), Ref(seq, "output"), decision
    made.verdict = last.verdict if last.verdict is None else Verdict.from_text(decision.output) or last.verdict
    made.session_id = last.session_id
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
    shown = step.redo.prompt if step.redo is not None else None
    edited = Ref(seq, "output") if decision.output is not None else shown
    step.status, step.redo = "ready", Redo(prompt=edited, answered=True)


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
    step.attempts[-1].asked_s += max(0.0, decision.at - gate.opened_at)
    step.answers.append((str(gate.payload.get("question", "")), decision.feedback or ""))
    step.status = "running"


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
    if state.until == step.id:
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
    "TurnFinished": _turn_finished,
    "TurnFailed": _turn_failed,
    "TurnCutShort": _turn_cut_short,
    "GateOpened": _gate_opened,
    "GateDecided": _gate_decided,
    "LoopedBack": _looped_back,
    "Rewound": _rewound,
}


def _settle(state: RunState, step: StepState, status: Literal["finished", "skipped"], output: Ref | None) -> None:
    """The run may go past `step`, whose output is `output`; what was made from an earlier one is stale."""
    step.status, step.approved = status, output
    _trust(step)
    step.due, step.redo, step.looped_by, step.resent = None, None, None, []
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


def _doubt_later(state: RunState, step: StepState) -> None:
    """What was made after `step` is stale: from now on the output that it builds on is another."""
    for later in state.order[step.index + 1 : state.frontier]:
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
    """The step runs anew, from its first prompt."""
    step.status, step.turn = status, 1
    _trust(step)
    step.redo, step.due, step.retry_at, step.session = None, None, None, None


def _next_attempt(step: StepState) -> int:
    """The number of the attempt that the next turn belongs to: a chained prompt and a second try stay in theirs."""
    same = step.status == "retrying" or (step.turn > 1 and step.redo is None and step.attempts)
    return step.attempt if same else step.attempt + 1


def _close(state: RunState, step: StepState, *, reopen: bool = False) -> None:
    """The gate of `step` is no longer open; with `reopen` it comes again when the run goes on."""
    if step.gate is None:
        return
    kind = step.gate.kind
    state.gates.pop(step.gate.id, None)
    step.gate = None
    if not reopen:
        return
    if kind == "stale":
        step.status, step.stale = "finished", True
    elif kind == "start":
        step.status, step.redo = "pending", None
    elif kind != "question":
        step.status = "due"


def _append(state: RunState, item: Step | Separator) -> None:
    state.items.append(item)
    if not isinstance(item, Separator):
        made = StepState(item, item.id, len(state.order), agent=state.agents.get(item.agent))
        state.order.append(made)
        state.steps[item.id] = made
        state.names.setdefault(item.id.replace("-", "_"), item.id)


def _reindex(state: RunState) -> None:
    """After an insertion or a removal: the steps in order, each knowing its place."""
    known = {id(step.step): step for step in state.order}
    cursor = state.current
    state.order, state.names = [], {}
    for item in state.items:
        if not isinstance(item, Separator):
            step = known.get(id(item)) or StepState(item, item.id, 0, agent=state.agents.get(item.agent))
            step.index = len(state.order)
            state.order.append(step)
            state.steps[item.id] = step
            state.names.setdefault(item.id.replace("-", "_"), item.id)
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
    """What to do now, in this order. Empty: wait for a turn to end or a person to decide.

    Parameters
    ----------
    engine_of
        The name of the engine that will do a step; a session of another one is not continued. ``None``: the same ones.
    """
    if state.ended is not None:
        return []
    if state.ending is not None:
        return _end(state)
    step = state.current
    if step is None:
        return [Record(RunFinished(status="completed"))]
    if step.status == "due":
        return [Record(_open(state, step, cast("Due", step.due)))]
    if step.status == "looping":
        return [Record(_loop_back(state, step))]
    if step.status == "waiting" or state.running or state.paused:
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
    cut = [cut_short(step, "the run ended") for step in state.running.values()]
    return [*(Record(event) for event in cut), Record(RunFinished(status=status, reason=reason))]


def cut_short(step: StepState, reason: str) -> TurnCutShort:
    """The event that says that the turn of `step` did not end."""
    return TurnCutShort(step=step.id, path=step.path, attempt=step.attempt, turn=step.turn, reason=reason)


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
    attempt = step.attempt + 1 if due.kind == "start" else step.attempt
    gate = Gate(
        id=f"{state.run_id}/{step.path}/{attempt}/{step.gates + 1}",
        kind=due.kind,
        step=step.id,
        path=step.path,
        attempt=attempt,
        payload=due.payload,
        digest=whole.hexdigest(),
        actions=ACTIONS[due.kind],
    )
    return GateOpened(gate=gate, prompt=prompt, context=context)


def ask(state: RunState, step: StepState, question: str) -> GateOpened:
    """The event with which the running turn of `step` asks a person."""
    return _open(state, step, Due("question", {"question": question}, (question,)))


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


def _start(state: RunState, step: StepState, engine_of: Callable[[Step], str] | None) -> StartTurn | Record:
    session = step.session
    if session is not None and engine_of is not None and engine_of(step.step) != step.session_engine:
        session = None  # another engine would not know it
    prompt, context = compose(state, step, continues=session is not None)
    first = step.status == "pending" and step.turn == 1
    asked = step.redo is not None and step.redo.answered
    shows = step.step.gate != "after" and state.pauses(step.step)
    if first and not asked and shows and missing_field(state, step) is None:  # else it fails as a turn
        return Record(_open(state, step, Due("start", {}, prompt + (context or ())), prompt, context))
    return StartTurn(
        step=step,
        attempt=_next_attempt(step),
        turn=step.turn,
        prompt=prompt,
        context=context,
        session_id=session,
        not_before=step.retry_at,
    )
