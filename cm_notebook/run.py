"""One execution of a workflow: the loop that acts on what ``state.py`` says.

Strategy: a run has an inbox and one synchronous pass. Turns that ended, decisions, other threads: all only put a
*proposal* into the inbox. The pass, on the run's own loop, does the rest without interruption:

    take the journal's write lock, with what other processes recorded     ┐
    → proposals become events, checked and applied one by one (record)    │ one transaction,
    → ask next_actions, record what it says, until there is nothing to do │ one fsync
    → commit                                                              ┘
    → show the events, answer the proposers, start the turns

``record`` is the only place where an event comes into being. What was there when the pass ran shares its transaction,
so the end of one step and the start of the next are one write. Nothing is shown or started before it is on disk.

While another program holds the journal the inbox stays as it is and the pass is tried again. When the journal cannot be
written at all, the run is given up here (``_lose``): who waits is told, and a resume finds what is on disk.

Who does not drive a run reads its state on from the journal whenever somebody looks (``_catch_up``).
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import functools
import gc
import os
import secrets
import sys
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Generator, Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, cast, get_args

from . import allowed, edits
from . import state as meaning
from .config import setting
from .engines.base import AgentRequest, Engine, configured_engine, find_engine, is_engine, unpriced
from .engines.functions import FunctionEngine
from .errors import (
    AlreadyDecided,
    CodeMachineError,
    EngineError,
    GatePending,
    JournalBusy,
    JournalError,
    RunFailed,
    TransitionError,
    WorkflowError,
    by_name,
    did_you_mean,
)
from .events import (
    Action,
    AgentsCalled,
    AgentsReturned,
    AnyEvent,
    Decision,
    Gate,
    GateDecided,
    GateOpened,
    Mode,
    ModeChanged,
    Rewound,
    RunFinished,
    RunPaused,
    RunResumed,
    RunStarted,
    RunUnpaused,
    Scope,
    SessionOpened,
    StepFailed,
    TurnCutShort,
    TurnFailed,
    TurnFinished,
    TurnStarted,
    TurnWentOn,
    Usage,
    WorkflowChanged,
    place,
    without_keys,
)
from .feed import Feed, LiveText
from .journal import OWN_FOLDER, AnyJournal, open_journal, own_folder
from .loops import SLICE_S, engine_loop, run_sync, running_loop, wait_detached
from .prompts import check_read, check_templates, digest, missing_field, text_of
from .runstate import Record, RunState, StartTurn, Status
from .state import apply, next_actions
from .steps import StepView
from .team import CAP, AgentResult, Call, checked_calls
from .tools import Permission, Tool, read_arguments
from .turns import Ending, LiveTurn, failed, take_turn, too_late
from .workflow import Agent, Separator, Step, Workflow, as_step, fitted, sound

GatePolicy = Literal["approve", "reject", "stop"] | Callable[[Gate], "Decision | Action | None"]
Proposal = Callable[[], Iterable[AnyEvent]]

POLL_S = 0.25
"""How often the journal is looked at for what another process has decided."""
PATIENCE_S = 60.0
"""How long a journal that another program holds is tried again before the run is given up."""
POLICY_FEEDBACK = "Rejected by the policy on_gate='reject'."

_FUNCTIONS = FunctionEngine()
_driven: dict[tuple[str, str], Run] = {}
_current: Run | None = None


class Run:
    """A run: watch it, decide at its gates, wait for it. Made by ``Workflow.start`` and :func:`resume`.

    Every method may be called from any thread. Attributes of the contract: ``id, status, mode, gates, events, usage,
    cost_usd, workflow, state``; ``run["planner"]`` is one of its steps.
    """

    def __init__(self, run_id: str, journal: AnyJournal) -> None:
        self.id = run_id
        self.error: BaseException | None = None
        self.notebook: str | None = None
        self._journal = journal
        self._state = RunState()
        self._lock = threading.RLock()
        self._inbox: deque[tuple[Proposal, concurrent.futures.Future[None] | None]] = deque()
        self._batch: list[AnyEvent] = []
        self._scheduled = False
        self._feeds: list[Feed] = []
        self._rest: concurrent.futures.Future[None] = concurrent.futures.Future()
        self._agents: dict[str, Agent] = {}
        self._driving = False
        self._lost: BaseException | None = None
        self._busy_since: float | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._hosted = False
        self._engine: str | Engine | None = None
        self._tape: Any = None
        self._on_gate: GatePolicy | None = None
        self._somebody = True
        self._turns: dict[str, LiveTurn] = {}
        self._questions: dict[str, asyncio.Future[Decision]] = {}
        self._calls: dict[tuple[str, int], asyncio.Future[None]] = {}
        self._asked: set[str] = set()
        self._unheard: dict[str, Gate] = {}
        self._rejected: set[str] = set()
        self._folder: Path | None = None
        self._shown_in: int | None = None
        self._lookout: asyncio.TimerHandle | None = None
        self._alarm: asyncio.TimerHandle | None = None

    # -- coming into being --------------------------------------------------------------------------------------------

    @classmethod
    def start(
        cls,
        workflow: Workflow,
        inputs: Mapping[str, Any] | None = None,
        *,
        engine: str | Engine | None = None,
        journal: str | os.PathLike[str] | AnyJournal | None = None,
        workspace: str | os.PathLike[str] | None = None,
        until: str | None = None,
        max_concurrency: int | None = None,
        max_cost_usd: float | None = None,
        max_tokens: int | None = None,
        max_turns: int | None = None,
        on_gate: GatePolicy | None = None,
        tape: Any = None,
        loop: Literal["thread", "kernel"] = "thread",
        notebook: str | None = None,
    ) -> Run:
        """Start a run of `workflow` and return it at once.

        Parameters
        ----------
        inputs
            Values of template names, over the workflow's own; JSON-ready.
        engine
            A name: the engine of agents and steps that name none. An engine itself: does all that is not a function.
        journal
            A path, ``":memory:"`` or a journal; by default ``.cm_notebook/journal.db`` below the working folder.
        workspace
            Folder the agents work in; by default an empty one below ``.cm_notebook/work``.
        until
            Id of a step: pause when it is done; a module is when it sends the run back no more.
        max_concurrency
            How many agents that others called, or of a parallel step, may work at the same time; by default as the
            workflow says, else 4.
        max_cost_usd, max_tokens, max_turns
            How much the run may use before a person is asked, in place of what the workflow says; see
            :class:`~cm_notebook.workflow.Workflow`.
        on_gate
            Answers gates in place of a person: ``"approve"``, ``"reject"`` (each step once), ``"stop"``, or a function
            that gets the gate and returns a ``Decision``, an action's name, or ``None`` to leave it open. ``"approve"``
            approves gates of kind ``budget`` too, each time for the same amount again; mode ``unattended`` never does.
        tape
            A recorded run to play instead of calling engines.
        loop
            ``"thread"``: the run has the engine's own thread. ``"kernel"``: the loop that runs here, for objects bound
            to it.
        notebook
            Under what the run is found again when its cell runs after a restart.

        Raises
        ------
        WorkflowError     A template names what is not there, an input cannot be kept, `until` is no step, `workspace`
                          cannot be made, the price of a model is not known and a limit on cost needs it.
        EngineNotFound    A step's engine is not there.
        JournalError      The journal cannot be used.
        """
        values = {**edits.checked_inputs(workflow.inputs), **edits.checked_inputs(inputs or {})}
        check_templates(workflow, values)
        check_read(workflow, inputs or {}, workflow.inputs)
        tape = check_options(engine=engine, tape=tape, workspace=workspace, on_gate=on_gate)
        _check_places("max_concurrency", max_concurrency)
        limits = checked_limits(max_cost_usd=max_cost_usd, max_tokens=max_tokens, max_turns=max_turns)
        if until is not None and until not in (known := [item.id for item in workflow.executable]):
            raise WorkflowError(f"until={until!r} is not a step. {did_you_mean(until, known, 'Steps')}")
        if workspace is not None:
            with _making(workspace, WorkflowError):
                Path(workspace).mkdir(parents=True, exist_ok=True)
        run = cls(f"r-{secrets.token_hex(4)}", open_journal(journal if journal is not None else setting("journal")))
        run.notebook = notebook
        run._prepare(workflow.agents, engine=engine, tape=tape, on_gate=on_gate, loop=loop)
        run._state.engine = workflow.engine
        run._check_prices(workflow, limits)
        run._journal.create(run.id, workflow.name, notebook)
        run._drive()
        try:
            started = RunStarted(
                run_id=run.id,
                workflow=workflow.kept(),
                inputs=values,
                fingerprints=edits.fingerprints(workflow, values),
                until=until,
                workspace=str(Path(workspace).absolute()) if workspace is not None else None,
                recorded=run._tape.run_name if run._tape is not None else None,
                max_concurrency=max_concurrency,
                limits=limits or None,
            )
            run._propose(lambda: [started])
        except BaseException:
            run._let_go()
            raise
        return run._become_current()

    @classmethod
    def open(cls, run_id: str, journal: str | os.PathLike[str] | AnyJournal | None = None) -> Run:
        """The run as its journal has it, to read and to decide; whoever drives it is not disturbed.

        Raises
        ------
        JournalError    There is no such run.
        """
        where = open_journal(journal if journal is not None else setting("journal"), make=False)
        driven = _driven.get((where.path, run_id))
        if driven is not None:
            driven._check_loop()
            if driven._driving:
                return driven
        run = cls(run_id, where)
        run._catch_up()
        return run

    def _reload(self) -> None:
        """Make the state anew from the journal."""
        self._state = RunState()
        with _no_collecting():
            self._read_on()

    def _read_on(self) -> list[AnyEvent]:
        """Bring the state up to what the journal holds; returns what was new, for those who watch."""
        found = []
        for event in self._journal.read(self.id, self._state.seq):
            try:
                apply(self._state, event)
            except CodeMachineError as error:
                raise JournalError(
                    f"run {self.id!r} in {self._journal.path} does not make sense at event {event.seq}: {error}",
                    path=self._journal.path,
                ) from error
            if self._feeds:  # else it need not be kept: a long run is read in half the memory
                found.append(event)
        return found

    def _catch_up(self) -> None:
        """Read what others have recorded, where no pass of this run does it."""
        self._check_loop()
        if self._driving:
            return
        with self._lock, _no_collecting():
            if self._lost is not None:
                with contextlib.suppress(JournalError):
                    if self._journal.events(self.id, self._state.seq):
                        self._find_again()  # somebody else goes on with it
                return
            known = self._state.seq
            self._show(self._read_on())
            if self._state.seq > known:
                self._wait_anew()
            if self._state.ended is not None:
                self._come_to_rest()

    def _show(self, events: list[AnyEvent]) -> None:
        """Tell those who watch what is on disk now."""
        for feed in self._feeds:
            for event in events:
                feed.put(event)

    def _wait_anew(self) -> None:
        """The run went on: those who wait from now on wait for what comes."""
        if self._rest.done():
            self._rest = concurrent.futures.Future()

    def _prepare(
        self,
        agents: Iterable[Agent],
        *,
        engine: str | Engine | None = None,
        tape: Any = None,
        on_gate: GatePolicy | None = None,
        loop: Literal["thread", "kernel"] = "thread",
    ) -> None:
        """Take what is needed for driving, from the thread that asks for it."""
        self._agents.update({agent.id: agent for agent in agents})
        self._on_gate = on_gate if on_gate is not None else cast("GatePolicy | None", setting("on_gate"))
        self._tape = check_options(engine=engine, tape=tape, on_gate=self._on_gate)
        self._engine = engine
        self._somebody = somebody()
        if self._tape is not None:
            from .engines.offline import OfflineEngine

            self._engine = OfflineEngine(tape=self._tape, strict=not self._somebody, delay=self._somebody)
        self._hosted = loop == "kernel"
        if loop == "kernel":
            self._loop = running_loop()
            if self._loop is None:
                raise WorkflowError('loop="kernel" needs a running event loop: call it in a cell or in a coroutine.')
        elif loop == "thread":
            self._loop = engine_loop()
        else:
            raise WorkflowError(f"loop={loop!r} is not known. Use 'thread' or 'kernel'.")

    def _drive(self) -> None:
        if not self._driving:
            self._journal.drive(self.id)
            self._find_again()
            self._driving = True
            _driven[self._journal.path, self.id] = self

    def _become_current(self) -> Run:
        set_current(self)
        return self

    # -- looking ------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def reading(self) -> Iterator[RunState]:
        """The run's state, which does not change inside the ``with`` block."""
        with self._lock:
            self._catch_up()
            yield self._state

    @property
    def state(self) -> RunState:
        """The run's state; to read several things that belong together use :meth:`reading`."""
        with self.reading() as state:
            return state

    @property
    def status(self) -> Status:
        """``running, waiting, paused, completed, stopped`` or ``failed``."""
        with self.reading() as state:
            return "failed" if self._lost is not None else state.status

    @property
    def mode(self) -> Mode:
        """``step-by-step``, ``gates`` or ``unattended``."""
        return self.state.mode

    @property
    def gates(self) -> list[Gate]:
        """The open gates, oldest first."""
        with self.reading() as state:
            return list(state.gates.values())

    @property
    def events(self) -> list[AnyEvent]:
        """All that has happened, in order, from the journal."""
        return self._journal.events(self.id)

    @property
    def usage(self) -> Usage:
        """Tokens of all turns together."""
        return self.state.usage

    @property
    def cost_usd(self) -> float:
        """US dollars of all turns together."""
        return self.state.cost_usd

    @property
    def workflow(self) -> Workflow:
        """The workflow as it is now, with the steps added since the start."""
        with self.reading() as state:
            return Workflow(
                state.name,
                steps=[*state.items],
                agents=[self._agents.get(agent.id, agent) for agent in state.agents.values()],
                sub_agents=state.sub_agents,
                max_concurrency=state.max_concurrency if state.max_concurrency != CAP else None,
                autonomous_mode=state.autonomous_mode,
                inputs=dict(state.inputs),
                engine=state.engine,
                **state.default_limits,
            )

    def __getitem__(self, step: str) -> StepView:
        """One step, by its id; an agent that another one called, by its path: ``run["coordinator/frontend-dev#1"]``."""
        with self.reading() as state:
            return StepView(self, state.find(step).path)

    def __iter__(self) -> Iterator[StepView]:
        """Its steps, in order."""
        with self.reading() as state:
            return iter([StepView(self, step.id) for step in state.order])

    def draft(self, path: str) -> str:
        """The text that is being written there now; ``""`` when nothing is."""
        turn = self._turns.get(path)
        return turn.text() if turn is not None else ""

    def watch(self, wake: Callable[[], None]) -> Feed:
        """A feed of what happens from now on; `wake` is called on the run's thread when there is something."""
        feed = Feed(wake)
        with self._lock:
            self._feeds.append(feed)
        return feed

    def unwatch(self, feed: Feed) -> None:
        """Close a feed."""
        with self._lock, contextlib.suppress(ValueError):
            self._feeds.remove(feed)

    async def stream(self) -> AsyncIterator[AnyEvent | LiveText]:
        """All events from the start, then events and live text as they happen, until the run rests; on any loop.

        Of a run that is not driven here: its events, until it rests or nobody drives it any more.
        """
        loop, awake = asyncio.get_running_loop(), asyncio.Event()
        with self.reading() as state:
            feed, known = self.watch(lambda: _quietly(loop, awake.set)), state.seq
            past = [event for event in self.events if event.seq <= known]
            under_way = [(path, turn.started.attempt, turn.text()) for path, turn in self._turns.items()]
        self._rest.add_done_callback(lambda _rest: _quietly(loop, awake.set))
        try:
            for event in past:
                yield event
            for path, attempt, text in under_way:
                if text:
                    yield LiveText(path, attempt, text)
            while True:
                over = self._over()
                things = feed.take()
                for thing in things:
                    if not isinstance(thing, LiveText) or thing.kind == "text":
                        yield thing
                if over and not things:
                    return
                if not things:
                    look = loop.call_later(POLL_S, awake.set)
                    await awake.wait()
                    look.cancel()
                awake.clear()
        finally:
            self.unwatch(feed)

    def _over(self) -> bool:
        """Whether nothing more comes by itself; what came before is in the feeds."""
        self._check_loop()
        if self._driving:
            return self._rest.done()
        alone = not self._journal.driven(self.id)  # asked first: what its driver wrote last is read next
        self._catch_up()
        return alone or self._resting()

    # -- waiting ------------------------------------------------------------------------------------------------------

    def wait(self, timeout_s: float | None = None) -> Run:
        """Wait until the run has ended or is paused; returns the run.

        Parameters
        ----------
        timeout_s
            Seconds; ``None`` waits for ever. The run goes on when the time is over.

        Raises
        ------
        RunFailed       It failed; the message is the reason.
        GatePending     It waits at a gate and nobody is there to answer.
        TimeoutError    It takes longer.
        """
        self._check_driven()
        host = _kernel_host()
        if host is not None:
            host.wait_in_cell(self._rest, timeout_s, loop=self._loop)
        else:
            run_sync(self._rest, timeout_s, loop=self._loop)
        return self

    def __await__(self) -> Generator[Any, None, Run]:
        """``await run``: as :meth:`wait`, on any loop; interrupting the wait leaves the run going on."""
        return self._awaited().__await__()

    async def _awaited(self) -> Run:
        self._check_driven()
        await wait_detached(self._rest, loop=self._loop)
        return self

    def _check_driven(self) -> None:
        self._catch_up()
        with self._lock:
            going_on = self._driving or self._rest.done()
        if not going_on:
            raise TransitionError(f"run {self.id!r} is not driven here. Go on with it: cm.resume({self.id!r}).")
        if not self._rest.done():
            self._check_turning()

    def _check_loop(self) -> None:
        """A run whose loop was closed is driven no more."""
        loop = self._loop
        if loop is None or not loop.is_closed():
            return
        with self._lock:
            if self._driving:
                self._lose(
                    CodeMachineError(
                        f"the event loop on which run {self.id!r} was driven has been closed. "
                        f"Go on with it on another: cm.resume({self.id!r})."
                    )
                )

    def _check_turning(self) -> None:
        """Refuse to wait for a loop that nobody runs."""
        loop = self._loop
        if self._driving and self._hosted and loop is not None and not loop.is_running():
            raise TransitionError(
                f"run {self.id!r} is driven on an event loop of yours that does not run now, so nothing would come of "
                "it. Run that loop, or start runs without loop='kernel'."
            )

    # -- deciding -----------------------------------------------------------------------------------------------------

    def approve(
        self,
        step: str | None = None,
        *,
        output: str | None = None,
        scope: Scope | None = None,
        max_cost_usd: float | None = None,
        max_tokens: int | None = None,
        max_turns: int | None = None,
    ) -> Run:
        """Go on with what the gate shows, or with `output` in its place.

        Where a limit is reached: with the same amount again, or so much more as is said here.
        Where a tool is to be called, `scope` says for how long it is allowed: ``"once"`` (as ``None``), ``"run"``: in
        this run, ``"always"``: see :func:`permissions`. `output` are then the arguments to call it with, as JSON.
        """
        scopes = get_args(Scope)
        if scope is not None and scope not in scopes:
            raise WorkflowError(f"scope={scope!r} is not known. {did_you_mean(str(scope), scopes, 'Scopes')}")
        more = checked_limits(max_cost_usd=max_cost_usd, max_tokens=max_tokens, max_turns=max_turns)
        return self._answer(step, Decision(action="approve", output=output, scope=scope, **more))

    def reject(self, feedback: str, step: str | None = None) -> Run:
        """Have it made again, with `feedback`."""
        return self._answer(step, Decision(action="reject", feedback=feedback))

    def retry(self, step: str | None = None, *, prompt: str | None = None, count: int = 1) -> Run:
        """Try again, with `prompt` instead of the last one; at an exhausted loop, `count` more iterations."""
        return self._answer(step, Decision(action="retry", prompt=prompt, count=count))

    def skip(self, step: str | None = None) -> Run:
        """Go on without this step's output."""
        return self._answer(step, Decision(action="skip"))

    def answer(self, text: str, step: str | None = None) -> Run:
        """Answer the question that a step asks."""
        return self._answer(step, Decision(action="answer", feedback=text))

    def decide(self, gate_id: str, decision: Decision, *, digest: str | None = None) -> Run:
        """Answer the gate of that id.

        Parameters
        ----------
        digest
            What the decider saw (``Gate.digest``); another one is refused.

        Raises
        ------
        AlreadyDecided     Somebody was faster, or the gate is closed; nothing was changed.
        TransitionError    The gate cannot be answered like this; nothing was changed.
        """
        given: tuple[Any, Any] = (gate_id, decision)
        if not isinstance(given[0], str) or not isinstance(given[1], Decision):
            raise TransitionError("decide takes a gate's id and a decision, such as cm.Decision(action='approve').")
        texts = {name: sound(text) for name in ("feedback", "output", "prompt") if (text := getattr(decision, name))}
        decision = decision.model_copy(update=texts)

        def propose() -> list[AnyEvent]:
            gate = meaning.gate_of(self._state, gate_id)
            if digest is not None and digest != gate.digest:
                raise AlreadyDecided(f"{gate.step!r} shows something else by now; nothing was changed. Look again.")
            self._check_decision(gate, decision)
            if decision.scope == "always":  # first, as the run may ask again at once
                self._allow_always(gate)
            return [GateDecided(gate_id=gate_id, decision=decision)]

        self._propose(propose)
        return self

    def _check_decision(self, gate: Gate, decision: Decision) -> None:
        """Refuse an answer that does not fit, also by the arguments that the tool takes, where it is known here."""
        meaning.check_decision(gate, decision)
        agent = self._agents.get(self._state.find(gate.path).step.agent)
        if decision.output is not None and gate.kind in ("review", "exhausted") and agent is not None:
            wrong = fitted(agent.output, decision.output)[1] if isinstance(agent.output, type) else None
            if wrong is not None:
                raise TransitionError(f"the edited text does not fit {agent.output.__name__}: {wrong}")
        tool = self._tool(gate.path, meaning.tool_of(gate)[0]) if gate.kind == "permission" else None
        if tool is not None and decision.output is not None and tool.checker is not None:
            try:
                tool.check(read_arguments(decision.output))
            except ValueError as error:
                raise TransitionError(f"{tool.name} does not take these arguments: {error}.") from None

    def _tool(self, path: str, name: str) -> Tool | None:
        agent = self._agents.get(self._state.find(path).step.agent)
        return next((tool for tool in agent.tools if tool.name == name), None) if agent is not None else None

    def _allow_always(self, gate: Gate) -> None:
        tool, implementation = meaning.tool_of(gate)
        rule = allowed.Rule(tool=tool, implementation=implementation, run=self.id, step=gate.step, at=time.time())
        try:
            allowed.keep(self._journal, rule)
        except CodeMachineError as error:
            raise CodeMachineError(
                f"that {tool} may always be called cannot be kept, so nothing is decided: {error}"
            ) from None

    def _answer(self, step: str | None, decision: Decision) -> Run:
        return self.decide(self.gate(step).id, decision)

    def gate(self, step: str | None = None) -> Gate:
        """The open gate of `step`, or the only one that is open.

        `step` is a step's id, the path of an agent that another one called (``coordinator/frontend-dev#1``), or that
        agent's id where only one gate of it is open.

        Raises
        ------
        AlreadyDecided     The last one has its answer, or was closed as the run ended.
        TransitionError    There is none, or more than one and no step was named.
        """
        with self.reading() as state:
            opened = list(state.gates.values())
            if step is None:
                if len(opened) == 1:
                    return opened[0]
                if not opened:
                    if self._lost is not None:
                        raise TransitionError(f"run {self.id!r} was given up here, so no gate is open: {self._lost}")
                    if state.last_gate is not None:
                        self._check_answered(state, state.last_gate)
                    raise TransitionError(f"no gate is open: run {self.id!r} is {state.status}.")
                raise TransitionError(
                    f"several gates are open; name the step: {', '.join(gate.path for gate in opened)}."
                )
            if step not in state.members and state.named(step) is None:
                meant = [gate for gate in opened if gate.step == step]
                if len(meant) == 1:
                    return meant[0]
                if meant:
                    paths = ", ".join(gate.path for gate in meant)
                    raise TransitionError(f"several gates of {step!r} are open; name the one: {paths}.")
                called = [member.path for member in state.members.values() if member.id == step]
                if state.last_gate is not None and state.last_gate.path in called:
                    step = state.last_gate.path  # whose gate was open last
                elif len(called) == 1:
                    step = called[0]
                elif called:
                    raise TransitionError(f"no gate of {step!r} is open.")
            found = state.find(step)
            if found.gate is not None:
                return found.gate
            last = found.last
            if last is not None and last.decision is not None:
                raise AlreadyDecided(f"{found.path!r} was {meaning.already(last.decision)}")
            if state.last_gate is not None and state.last_gate.path == found.path:
                self._check_answered(state, state.last_gate)
            raise TransitionError(f"{found.path!r} has no open gate: it {meaning.standing(state, found)}.")

    def _check_answered(self, state: RunState, gate: Gate) -> None:
        """Say what became of a gate that is open no more."""
        answer = state.decisions.get(gate.id)
        step = state.steps.get(gate.path) or state.members.get(gate.path)
        if answer is not None:
            raise AlreadyDecided(f"{gate.path!r} was {meaning.already(answer)}")
        if state.ended in ("stopped", "failed") and step is not None:
            raise AlreadyDecided(meaning.closed(state, step))

    # -- steering -----------------------------------------------------------------------------------------------------

    def pause(self) -> Run:
        """Let what runs finish and start nothing new."""
        self._propose(lambda: [RunPaused(reason="paused by you")])
        return self

    def unpause(self, until: str | None = None) -> Run:
        """Go on, up to and including the step `until` when that is given."""

        def propose() -> list[AnyEvent]:
            if until is not None:
                self._state.step(until)
            return [RunUnpaused(until=until)]

        self._propose(propose)
        return self

    def next(self) -> Run:
        """Run exactly one step, then pause; returns at once, and can be awaited."""

        def propose() -> list[AnyEvent]:
            step = self._state.current
            if step is None:
                raise TransitionError(f"run {self.id!r} has no step left.")
            return [RunUnpaused(until=step.id, once=True)]

        self._go_on(propose)
        return self

    def stop(self) -> Run:
        """End the run as ``stopped``: what runs is cancelled. It can be resumed."""

        def propose() -> list[AnyEvent]:
            if self._state.ended is not None:
                raise TransitionError(f"run {self.id!r} is {self._state.ended} already.")
            cut = meaning.cut_all(self._state, "stopped by you")
            return [*cut, RunFinished(status="stopped", reason="stopped by you")]

        self._propose(propose)
        return self

    def set_mode(self, mode: Mode) -> Run:
        """Who drives from now on: ``step-by-step``, ``gates`` or ``unattended``; an open gate stays open.

        ``unattended`` approves the gates that open later, but for those of kind ``budget``: a limit holds.
        """
        modes = ("step-by-step", "gates", "unattended")
        if mode not in modes:
            raise WorkflowError(f"there is no mode {mode!r}. {did_you_mean(str(mode), modes, 'Modes')}")
        with self.reading() as state:
            meaning.check_switch(state)  # said also of a run that is over: starting it again would change nothing
        self._propose(lambda: [ModeChanged(mode=mode)])
        return self

    def rerun(self, step: str, *, later: bool = False) -> Run:
        """Run a step again as a new attempt; later outputs are then stale, or with `later` made again too."""

        def propose() -> list[AnyEvent]:
            meaning.check_rewind(self._state, step)  # before anything is cut short for it
            return [*meaning.cut_all(self._state, f"{step} runs again"), Rewound(to=step, later=later)]

        self._go_on(propose)
        return self

    # -- building while it lives --------------------------------------------------------------------------------------

    def add(
        self,
        step: str | Step | Separator,
        after: str | None = None,
        *,
        agents: Iterable[Agent] = (),
        inputs: Mapping[str, Any] | None = None,
    ) -> StepView | None:
        """Put a step last, or after the step `after`; a completed run goes on with it.

        Returns
        -------
        StepView or None
            The new step; ``None`` for a separator.

        Raises
        ------
        WorkflowError    The workflow would not be right with it; nothing was changed.
        """
        item, values = as_step(len(self.state.order) + 1, step), edits.checked_inputs(inputs or {})
        with self._lock:
            items = list(self._state.items)
            place = len(items) if after is None else items.index(self._state.step(after).step) + 1
            items.insert(place, item)
            made = self._changed(items, agents, values)
        self._go_on(lambda: [edits.addition(self._state, item, after, made, values)])
        return None if isinstance(item, Separator) else self[item.id]

    def remove(self, step: str) -> Run:
        """Take a step out.

        Raises
        ------
        WorkflowError    Another step needs it; nothing was changed.
        """
        with self._lock:
            gone = self._state.step(step)
            self._changed([item for item in self._state.items if item is not gone.step], (), {})
        self._go_on(lambda: edits.removal(self._state, gone.id))
        return self

    def replace(self, step: Step, *, agents: Iterable[Agent] = (), inputs: Mapping[str, Any] | None = None) -> bool:
        """Define a step anew; what it had made is stale then. Returns whether anything was different.

        Raises
        ------
        WorkflowError    The workflow would not be right with it; nothing was changed.
        """
        values = edits.checked_inputs(inputs or {})
        with self._lock:
            old = self._state.step(step.id)
            made = self._changed([step if item is old.step else item for item in self._state.items], agents, values)
            if not edits.replacement(self._state, step, made, values):
                return False
        self._go_on(lambda: edits.replacement(self._state, step, made, values))
        return True

    def revise(self, workflow: Workflow, inputs: Mapping[str, Any] | None = None) -> list[str]:
        """Go on by an edited definition of the same workflow.

        Returns
        -------
        list of str
            Ids of the steps that had run and are stale now.

        Raises
        ------
        WorkflowError    A step that has run is renamed or deleted, or a step stands elsewhere; nothing was changed.
        """
        edits.check_order(self.state, workflow)
        values = edits.inputs_of(self.state, workflow, inputs)
        check_templates(workflow, values)
        with self._lock:
            different = edits.revision(self._state, workflow, values)
        self._agents.update({agent.id: agent for agent in workflow.agents})
        if different:
            self._go_on(lambda: edits.revision(self._state, workflow, values))
        with self._lock:
            return [step.id for step in self._state.order if step.stale]

    def go_on(
        self,
        workflow: Workflow | None = None,
        inputs: Mapping[str, Any] | None = None,
        *,
        until: str | None = None,
        once: bool = False,
        again: str | None = None,
        later: bool = False,
        limits: Mapping[str, Any] | None = None,
        on_gate: GatePolicy | None = None,
    ) -> Run:
        """Go on, ended or paused or not: what running a cell again comes to, as one change.

        Parameters
        ----------
        workflow, inputs
            The definition as it is now, as for :meth:`revise`.
        until, once
            Id of a step: pause when it is done, or (``once``) has run once. ``None``: no limit.
        again, later
            A step to run again, as for :meth:`rerun`.
        limits
            What the run may use in all from now on: ``max_cost_usd, max_tokens, max_turns``.
        on_gate
            Who answers in place of a person from now on, the gates that are open included.

        Raises
        ------
        WorkflowError    As for :meth:`revise`; nothing was changed.
        """
        if inputs and workflow is None:
            workflow = self.workflow
        if workflow is not None:
            edits.check_order(self.state, workflow)
        values = edits.inputs_of(self.state, workflow, inputs)
        if workflow is not None:
            check_templates(workflow, values)
            self._agents.update({agent.id: agent for agent in workflow.agents})
            for item in workflow.tasks:
                self._engine_for(item)

        def propose() -> list[AnyEvent]:
            state = self._state
            different = edits.revision(state, workflow, values) if workflow is not None else []
            events = [*different, *_permitting(limits)]
            if again is not None:
                if again in state.steps:
                    meaning.check_rewind(state, again)  # before anything is cut short for it
                events += _more(different, meaning.cut_all(state, f"{again} runs again"))
                events.append(Rewound(to=again, later=later))
            held = state.paused or state.until_reached or (state.until, state.until_once) != (until, once)
            if held if state.ended is None else until is not None:  # resuming lifts every limit
                events.append(RunUnpaused(until=until, once=once))
            if on_gate is not None:  # the gates that are open are put to it when this pass ends
                self._on_gate = on_gate
                self._asked.clear()
                self._unheard.clear()
                self._wait_anew()
            return events

        self._go_on(propose)
        return self._become_current()

    def _changed(self, items: list[Step | Separator], agents: Iterable[Agent], inputs: Mapping[str, Any]) -> Workflow:
        """The workflow with these steps; refused here, before anything changes, if it cannot run."""
        given = {**self._agents, **{agent.id: agent for agent in agents}}
        made = edits.changed(self._state, items, given, inputs)
        self._agents.update({agent.id: agent for agent in made.agents})
        for item in made.tasks:
            self._engine_for(item)
        return made

    def _go_on(self, proposal: Callable[[], list[AnyEvent]]) -> None:
        """As ``_propose``, but a run that has ended is resumed for it."""
        if self._loop is None or self._loop.is_closed():
            raise TransitionError(f"run {self.id!r} is not driven here. Resume it first: cm.resume({self.id!r}).")

        lost, driven = self._lost, self._driving

        def propose() -> list[AnyEvent]:
            wanted = proposal()
            ended = self._state.ended
            if lost is not None:
                cut = _more(wanted, meaning.cut_all(self._state, str(lost)))
                return [RunResumed(reason=str(lost)), *cut, *wanted]
            return [RunResumed(), *wanted] if ended is not None and (wanted or ended != "completed") else wanted

        try:
            self._propose(propose, drive=True)
        except BaseException:
            with self._lock:  # it was refused, and the run is where it was
                if lost is not None and self._lost is None:
                    self._lose(lost)
                elif not driven and self._rest.done():
                    self._let_go()
            raise
        if self._state.ended is not None and self._rest.done():
            self._let_go()  # nothing was wanted

    def _let_go(self) -> None:
        if self._driving:
            self._driving = False
            if self._alarm is not None and self._loop is not None:
                _quietly(self._loop, self._alarm.cancel)
                self._alarm = None
            if _driven.get((self._journal.path, self.id)) is self:
                del _driven[self._journal.path, self.id]
            self._journal.release(self.id)

    def _lose(self, error: BaseException) -> None:
        """Give the run up here, as it cannot be driven: what runs is cancelled, and everybody who waits is told.

        The state says so too, without a record: on disk it is as if this process had died.
        """
        turns = list(self._turns.values())
        self._turns.clear()
        self._questions.clear()
        self._calls.clear()
        if self._loop is not None:
            for turn in turns:
                _quietly(self._loop, turn.cancel)
        reason = str(error) or type(error).__name__
        if self._state.seq:  # it could be read
            cut = meaning.cut_all(self._state, reason)
            events: list[AnyEvent] = [*cut, RunFinished(status="failed", reason=reason)]
            for event in events:
                place(event, self._state.seq, max(time.time(), self._state.at))
                apply(self._state, event)
        self.error = self._lost = error
        self._let_go()
        if self._rest.done():
            self._rest = concurrent.futures.Future()
        self._rest.set_exception(error)
        for feed in self._feeds:
            feed.wake()

    def _find_again(self) -> None:
        """After :meth:`_lose`: the state as it is on disk."""
        if self._lost is not None:
            self._reload()
            self._lost = None

    # -- recording ----------------------------------------------------------------------------------------------------

    def _propose(self, proposal: Proposal, *, wait: bool = True, drive: bool = False) -> None:
        """Have `proposal` made into events; with `wait`, returns when they are on disk, or raises why not.

        With `drive` the run is driven for it; a run that is just coming to its end stays so.
        """
        self._check_loop()
        reply: concurrent.futures.Future[None] | None = concurrent.futures.Future() if wait else None
        entry = (proposal, reply)
        with self._lock:
            if drive:
                self._drive()
            if reply is None and not self._driving:
                return  # the run was let go meanwhile
            self._inbox.append(entry)
        if reply is None:
            self._schedule()
            return
        try:
            while not reply.done() and self._is_ours():
                time.sleep(self._pass())
            if not reply.done():
                self._check_turning()
                self._schedule()
            while not reply.done():
                with contextlib.suppress(TimeoutError):
                    reply.exception(timeout=SLICE_S)
                self._check_loop()
                if self._lost is not None and not reply.done():
                    raise self._lost
        except BaseException:
            with self._lock, contextlib.suppress(ValueError):
                self._inbox.remove(entry)  # nobody asks for it any more
            if not self._driving:
                self._busy_since = None
            raise
        reply.result()

    def _is_ours(self) -> bool:
        """Whether a pass may be made on this thread."""
        return not self._driving or self._loop is None or running_loop() is self._loop

    def _schedule(self) -> None:
        if not self._scheduled and self._loop is not None:
            self._scheduled = True
            if running_loop() is self._loop:
                self._loop.call_soon(self._pass)
            else:
                _quietly(self._loop, self._pass)

    def _schedule_in(self, delay_s: float) -> None:
        """Have the next pass made by then; there is one alarm, as each pass says anew when it is needed."""
        self._alarm = cast("asyncio.AbstractEventLoop", self._loop).call_later(delay_s, self._pass)

    def _pass(self) -> float:
        """All that is to be done now, as one transaction; see the top of this file.

        Returns in how many seconds to try again when another program holds the journal: then nothing was done. Else 0.
        """
        if not self._is_ours():
            self._schedule()  # somebody drives by now: turns start on its loop only
            return 0.0
        self._scheduled = False
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None
        answers: list[tuple[concurrent.futures.Future[None], Exception | None]] = []
        starts: list[tuple[TurnStarted, str]] = []
        begun = False
        with self._lock:
            batch = self._batch = []
            try:
                if self._lost is not None:
                    self._find_again()
                seen = self._journal.begin(self.id, self._state.seq)
                begun, self._busy_since = True, None
                for event in seen:
                    apply(self._state, event)
                while self._inbox:
                    proposal, reply = self._inbox[0]  # it stays there until then, so that its proposer hears of a bug
                    refused = self._record_all(proposal)
                    if reply is not None:
                        answers.append((reply, refused))
                    elif refused is not None and not isinstance(refused, CodeMachineError):
                        raise refused  # nobody else would hear of it
                    self._inbox.popleft()
                if self._driving:
                    self._act(starts)
                begun = False
                if batch:
                    self._journal.commit(self.id, batch)
                else:
                    self._journal.rollback()
            except BaseException as error:
                if begun:
                    self._journal.rollback()
                elif isinstance(error, JournalBusy) and (delay := self._try_again_in()) is not None:
                    return delay
                self._pass_failed(error, [reply for reply, _refused in answers])
                return 0.0
            finally:
                self._batch = []
            shown = [*seen, *batch] if seen else batch
            if shown:  # before the proposers go on: they may wait for the run next
                self._show(shown)
                self._wait_anew()
        try:
            if self._driving:
                self._follow(shown, starts)
        finally:  # last, so that who proposed finds the run as it is now
            for reply, refused in answers:
                reply.set_exception(refused) if refused is not None else reply.set_result(None)
        return 0.0

    def _try_again_in(self) -> float | None:
        """In how many seconds to make this pass again, another program holding the journal; ``None``: no more."""
        now = time.monotonic()
        if self._busy_since is None:
            self._busy_since = now
        waited = now - self._busy_since
        if waited >= PATIENCE_S:
            self._busy_since = None
            return None
        delay = min(1.0, 0.02 + waited / 4)
        if self._driving:
            self._scheduled = True
            self._schedule_in(delay)
        return delay

    def _record_all(self, proposal: Proposal) -> Exception | None:
        """Record what is proposed, all of it or nothing; returns why not."""
        try:
            events = list(proposal())
        except Exception as error:  # nothing was changed: it is between the proposer and us
            return error
        kept = len(self._batch)
        try:
            for event in events:
                self.record(event)
        except CodeMachineError as error:
            if len(self._batch) > kept:  # a state cannot go back: it is made anew, without these
                del self._batch[kept:]
                self._reload()
                for event in self._batch:
                    apply(self._state, event)
            return error
        return None

    def record(self, event: AnyEvent) -> None:
        """Give `event` its place and time, check it, apply it: the only way anything happens in a run.

        It is made durable, and only then shown, at the end of the pass that records it.

        Raises
        ------
        TransitionError    It is not legal now; nothing was changed.
        """
        if type(event) is TurnCutShort and (turn := self._turns.get(event.path)) is not None and turn.used:
            event = event.model_copy(update=turn.used)  # who cut it short does not know
        event, state = without_keys(event), self._state
        place(event, state.seq + 1, max(time.time(), state.at))
        apply(state, event)
        self._batch.append(event)

    def _act(self, starts: list[tuple[TurnStarted, str]]) -> None:
        """Record all that follows from the state, until only turns and people can go on."""
        progress = True
        while progress:
            progress, later = False, list[float]()
            for action in next_actions(self._state, self._engine_name):
                if action.not_before is not None and action.not_before > time.time():
                    later.append(action.not_before)
                elif isinstance(action, Record):
                    self.record(action.event)
                    progress = True
                    if action.not_before is not None:
                        break
                else:
                    start = self._turn_started(action)
                    self.record(start[0])
                    starts.append(start)
        if later:
            self._schedule_in(max(0.0, min(later) - time.time()))

    def _turn_started(self, action: StartTurn) -> tuple[TurnStarted, str]:
        step = action.step
        parts = action.prompt + (action.context or ())
        text = text_of(parts, self._state.texts) if parts else ""
        started = TurnStarted(
            step=step.id,
            path=step.path,
            attempt=action.attempt,
            turn=action.turn,
            iteration=step.iteration,
            prompt=action.prompt,
            context=action.context,
            digest=digest(text),
            session_id=action.session_id,
            engine=self._engine_name(step.step),
        )
        return started, text

    def _follow(self, events: list[AnyEvent], starts: list[tuple[TurnStarted, str]]) -> None:
        """What is on disk now has its effect outside: turns start and stop, gates are put to whoever may answer."""
        for event in events:
            if event.type in _EFFECTS:
                _EFFECTS[event.type](self, event)
        for started, prompt in starts:
            self._launch(started, prompt)
        state = self._state
        if self._asked or state.gates:
            self._asked.intersection_update(state.gates)
            for gate in list(state.gates.values()):
                if gate.id not in self._asked:
                    self._asked.add(gate.id)
                    self._put_to(gate)
        for gone in [id for id in self._questions if not meaning.waits_for(state, id)] if self._questions else ():
            del self._questions[gone]
        for over in [call for call in self._calls if call[0] not in state.calls] if self._calls else ():
            del self._calls[over]
        self._look_out()
        self._come_to_rest()

    def _cancel_turn(self, event: TurnCutShort) -> None:
        running = self._turns.pop(event.path, None)
        if running is not None:
            running.cancel()

    def _tell_caller(self, event: AgentsReturned) -> None:
        waiting = self._calls.pop((event.path, event.call), None)
        if waiting is not None and not waiting.done():
            waiting.set_result(None)

    def _forget_troubles(self, event: RunResumed) -> None:
        self.error = None
        self._unheard.clear()

    def _look_out(self) -> None:
        """Look now and then whether another process has decided something."""
        if self._lookout is None and self._journal.durable and self._driving:
            self._lookout = cast("asyncio.AbstractEventLoop", self._loop).call_later(POLL_S, self._look)

    def _look(self) -> None:
        self._lookout = None
        with contextlib.suppress(JournalError):  # it is looked at again, and every pass says what is wrong
            if self._driving and self._journal.changed(self.id):
                self._pass()
        self._look_out()

    def _resting(self) -> bool:
        """Whether the run goes no further until somebody does something."""
        state = self._state
        self._unheard = {id: gate for id, gate in self._unheard.items() if id in state.gates}
        if self._unheard and not state.at_work and not state.backing_off:
            return True  # else others go on beside it
        return state.ended is not None or (state.paused and state.status == "paused")

    def _come_to_rest(self) -> None:
        """Tell those who wait that the run goes no further by itself, and how it ended."""
        with self._lock:
            # What is in the inbox may go on with it; the pass that takes it comes here again.
            if not self._inbox and self._resting() and not self._rest.done():
                self._rest_now(self._state)

    def _rest_now(self, state: RunState) -> None:
        if state.ended is not None:
            self._let_go()
        if state.ended == "failed":
            failed = RunFailed(state.reason or f"run {self.id!r} failed.", run_id=self.id)
            failed.__cause__ = self.error
            as_itself = self.error is not None and not isinstance(self.error, EngineError)
            self._rest.set_exception(self.error if as_itself and self.error is not None else failed)
        elif self._unheard and state.ended is None:
            gate = next(iter(self._unheard.values()))
            self._rest.set_exception(GatePending(_nobody_there(gate), gate=gate, run=self))
        else:
            self._rest.set_result(None)

    def _pass_failed(self, error: BaseException, replies: list[concurrent.futures.Future[None]]) -> None:
        """Nothing of this pass was kept: go back to what is on disk, and tell everybody who waits."""
        waiting = [*replies, *(reply for _proposal, reply in self._inbox)]
        self._inbox.clear()
        self.error = error
        try:
            self._reload()
        except Exception:  # it cannot be read either, or there is a bug in reading; who waits is told the first error
            self._state = RunState()
        if self._driving:
            self._lose(error)
        for reply in waiting:
            if reply is not None:
                reply.set_exception(error)

    # -- gates that answer themselves ---------------------------------------------------------------------------------

    def _put_to(self, gate: Gate) -> None:
        """Ask those who may answer in place of a person: the mode, the tape, the policy; else it waits."""
        # A budget is what holds a run that nobody watches: being unattended must not lift it.
        if self._state.mode == "unattended" and "approve" in gate.actions and gate.kind != "budget":
            self._decide_soon(gate, Decision(action="approve", by="unattended mode"))
            return
        taped = self._tape.decision(gate) if self._tape is not None and not self._somebody else None
        if taped is not None:
            self._decide_soon(gate, taped)
        elif callable(self._on_gate):
            threading.Thread(
                target=self._ask_policy, args=(gate, self._on_gate), daemon=True, name="cm-on-gate"
            ).start()
        elif self._on_gate is not None and self._on_gate in gate.actions and gate.path not in self._rejected:
            feedback = None
            if self._on_gate == "reject":
                feedback = POLICY_FEEDBACK
                if gate.kind != "permission":  # of those, every one
                    self._rejected.add(gate.path)
            self._decide_soon(gate, Decision(action=self._on_gate, feedback=feedback, by="on_gate"))
        else:
            self._unanswered(gate)

    def _ask_policy(self, gate: Gate, policy: Callable[[Gate], Decision | Action | None]) -> None:
        decision: Decision | None = None
        try:
            said = policy(gate)
            if isinstance(said, str):
                decision = Decision(action=said, feedback=POLICY_FEEDBACK if said == "reject" else None, by="on_gate")
            elif isinstance(said, Decision):
                decision = said.model_copy(update={"by": "on_gate"})
            elif said is not None:
                raise TransitionError(f"on_gate returned {said!r}; it returns a Decision, an action's name or None.")
            if decision is not None:
                self._check_decision(gate, decision)
        except Exception as error:
            self.error = error
            reason = f"on_gate at {gate.step}: {error}"

            def give_up() -> list[AnyEvent]:
                cut = meaning.cut_all(self._state, "the run failed")
                return [*cut, RunFinished(status="failed", reason=reason)]

            self._propose(give_up, wait=False)
            return
        if decision is not None:
            self._decide_soon(gate, decision)
        elif self._loop is not None:
            self._loop.call_soon_threadsafe(self._nobody_answered, gate)

    def _decide_soon(self, gate: Gate, decision: Decision) -> None:
        if decision.scope == "always":  # the person's own list is for persons to write
            decision = decision.model_copy(update={"scope": "run"})

        def propose() -> list[AnyEvent]:
            if gate.id not in self._state.gates:
                return []  # a person was faster
            return [GateDecided(gate_id=gate.id, decision=decision)]

        self._propose(propose, wait=False)

    def _nobody_answered(self, gate: Gate) -> None:
        self._unanswered(gate)
        self._come_to_rest()

    def _unanswered(self, gate: Gate) -> None:
        if self._somebody or gate.default is not None:  # without one it could only stop, and later
            return
        if gate.kind == "failed" and gate.path in self._state.members:
            why = str(gate.payload.get("error", "failed"))

            def give_it_up() -> list[AnyEvent]:
                if gate.id not in self._state.gates:
                    return []  # its caller has ended
                return [StepFailed(step=gate.step, path=gate.path, reason=why)]

            self._propose(give_it_up, wait=False)
        elif gate.kind == "failed":
            reason = f"{gate.step}: {gate.payload.get('error', 'failed')}"
            self._propose(lambda: [RunFinished(status="failed", reason=reason)], wait=False)
        else:
            self._unheard[gate.id] = gate

    def _allow_alike(self) -> None:
        """A tool was allowed for longer: others who wait for the same need not be asked."""
        for gate in self._state.gates.values():
            given = self._state.allowed.get(meaning.tool_of(gate)) if gate.kind == "permission" else None
            if given is not None:
                self._decide_soon(gate, Decision(action="approve", by=given.by))

    # -- turns --------------------------------------------------------------------------------------------------------

    def _engine_for(self, step: Step) -> Engine:
        """Who does this step: the function, the tape, the engine given, or the one named nearest to the step."""
        agent = self._agents.get(step.agent) or self._state.agents[step.agent]
        if agent.implementation is not None:
            return _FUNCTIONS
        if self._engine is not None and not isinstance(self._engine, str):
            return self._engine
        if name := step.engine or agent.engine or self._engine or self._state.engine:
            return find_engine(name)
        return configured_engine()

    def _check_prices(self, workflow: Workflow, limits: Mapping[str, Any]) -> None:
        """Refuse a step whose engine is not there, or whose cost is limited and would not be known.

        Raises
        ------
        EngineNotFound    There is no engine of that name.
        WorkflowError     A price is not known.
        """
        most = limits.get("max_cost_usd", workflow.max_cost_usd)
        agents = {agent.id: agent for agent in workflow.agents}
        own = {name: item.max_cost_usd for item in workflow.executable for name in item.agents if item.max_cost_usd}
        called = next(iter(own.values()), None)
        for item in workflow.tasks:
            engine, agent = self._engine_for(item), agents[item.agent]
            limit = most or own.get(agent.id) or (called if agent.id in workflow.sub_agents else None)
            why = unpriced(engine, item.model or agent.model) if limit is not None else None
            if why is not None:
                raise WorkflowError(
                    f"max_cost_usd={limit:g} cannot be held: the cost of {item.id!r} would not be known. {why} "
                    "Or limit max_tokens instead."
                )

    def _engine_name(self, step: Step) -> str:
        try:
            return self._engine_for(step).name
        except EngineError as error:
            return error.engine or "unknown"

    def _launch(self, started: TurnStarted, prompt: str) -> None:
        step = self._state.find(started.path)
        turn = self._turns[started.path] = LiveTurn(started, step.step, self._too_late)
        turn.failures = step.attempts[-1].failures
        turn.task = cast("asyncio.AbstractEventLoop", self._loop).create_task(self._turn(turn, prompt))

    async def _turn(self, turn: LiveTurn, prompt: str) -> None:
        """Do one turn and propose how it ended. Cancelled when the turn was cut short, which is recorded by then."""

        def write(text: str, last: bool = False) -> None:
            with self._lock:  # who begins to watch meanwhile gets each piece once
                text = turn.hide(sound(text), last=last)
                if last and not text:
                    return
                turn.write(text)
                for feed in self._feeds:
                    feed.put_text(turn.started.path, turn.started.attempt, text)

        def think(text: str, last: bool = False) -> None:
            with self._lock:
                text = turn.hide_thoughts(sound(text), last=last)
                for feed in self._feeds if text else ():
                    feed.put_text(turn.started.path, turn.started.attempt, text, "thinking")

        def opened(session_id: str) -> None:
            where = {"step": turn.started.step, "path": turn.started.path, "attempt": turn.started.attempt}
            record(SessionOpened(**where, turn=turn.started.turn, session_id=session_id))

        def record(event: AnyEvent) -> None:
            def propose() -> list[AnyEvent]:
                return [event] if self._turns.get(turn.started.path) is turn else []  # else it was cut short

            self._propose(propose, wait=False)

        turn.run_clock()
        try:
            engine, request = self._engine_for(turn.step), self._request(turn, prompt, write)
            ending = await take_turn(turn, engine, request, write, think, opened, record)
            if turn.hide:
                write("", last=True)
            if turn.hide_thoughts:
                think("", last=True)
        except asyncio.CancelledError:  # by whoever cut it short, or (which is to be said) by its own agent
            ending = failed(turn, EngineError(f"{turn.started.step} was cancelled from within."), None)
            self._propose(lambda: self._turn_ended(turn, ending), wait=False)
            raise
        except EngineError as error:
            ending = failed(turn, error, None)
        except Exception as error:  # a bug: whatever happens, the turn has an end
            ending = failed(turn, error, None, fatal=True)
        turn.stop_clock()
        self._propose(lambda: self._turn_ended(turn, ending), wait=False)

    def _too_late(self, turn: LiveTurn) -> None:
        self._propose(lambda: self._turn_ended(turn, too_late(turn)), wait=False)
        turn.cancel()

    def _turn_ended(self, turn: LiveTurn, ending: Ending) -> list[AnyEvent]:
        """The end of a turn as events; none when the turn was cut short meanwhile."""
        started = turn.started
        if self._turns.get(started.path) is not turn:
            return []
        del self._turns[started.path]
        if ending.error is not None:
            self.error = ending.error
        called: list[TurnCutShort] = []
        if started.path in self._state.calls:  # a function may end without those that it has called
            step = self._state.find(started.path)
            cut = meaning.cut_all(self._state, "its caller has ended", step)
            called = [one for one in cut if one.path != started.path]
        if not ending.fatal:
            return [*called, ending.event]
        others = _more([*called, ending.event], meaning.cut_all(self._state, "the run failed"))
        return [*called, ending.event, *others, RunFinished(status="failed", reason=f"{started.step}: {ending.error}")]

    def _request(self, turn: LiveTurn, prompt: str, write: Callable[[str], None]) -> AgentRequest:
        started = turn.started
        with self._lock:
            state = self._state
            step = state.find(started.path)
            if started.prompt and (wrong := missing_field(state, step)) is not None:
                raise EngineError(wrong)
            task = step.step
            agent = self._agents.get(task.agent) or state.agents[task.agent]
            history = step.said[: started.turn - 1]
            return AgentRequest(
                agent=agent,
                prompt=prompt,
                step=started.step,
                path=started.path,
                attempt=started.attempt,
                turn=started.turn,
                iteration=started.iteration,
                ordinal=step.attempts[-1].ordinal,
                system=agent.system,
                model=task.model or agent.model,
                reasoning_effort=task.reasoning_effort or agent.reasoning_effort,
                session_id=started.session_id,
                history=[(state.text(asked), state.text(got)) for asked, got in history] if history else (),
                feedback=meaning.feedback_on(state, step) or None,
                inputs=MappingProxyType(state.inputs),
                outputs=_Outputs(self),
                workspace=self._workspace(),
                timeout_s=task.timeout_s,
                emit=write,
                ask_human=lambda question: self._ask_human(turn, question),
                may_ask=meaning.may_ask(state, step),
                ask_permission=lambda name, arguments: self._ask_permission(turn, name, arguments),
                sub_agents=meaning.may_call(state, step),
                run_agents=lambda asked, limit=None: self._run_agents(turn, asked, limit),
            )

    def _workspace(self) -> Path:
        """The folder to work in; made when the first turn needs it."""
        if self._folder is None:
            given = self._state.workspace
            with _making(given or Path(OWN_FOLDER, "work", self.id), EngineError):
                folder = Path(given) if given is not None else own_folder().joinpath("work", self.id).absolute()
                folder.mkdir(parents=True, exist_ok=True)
            self._folder = folder
        return self._folder

    async def _ask_human(self, turn: LiveTurn, question: str) -> str:
        """Ask a person; what was answered before the process died is not asked again."""
        question = sound(str(question))
        async with turn.one_at_a_time():
            step = self._state.find(turn.started.path)
            for place, (asked, said) in enumerate(step.resent):
                if asked == question and place not in turn.recalled:
                    turn.recalled.add(place)
                    return said
            decision = await self._ask(turn, lambda: meaning.ask(self._state, step, question))
            return decision.feedback or ""

    async def _ask_permission(self, turn: LiveTurn, name: str, arguments: Mapping[str, Any]) -> Permission:
        """Ask a person whether a tool may be called, unless it was allowed for longer."""
        arguments, path = sound(dict(arguments)), turn.started.path
        tool = self._tool(path, name)
        which = (name, tool.implementation if tool is not None else "")
        note = ""
        async with turn.one_at_a_time():
            while True:
                given = self._state.allowed.get(which)
                if (given is not None and given.scope == "run") or allowed.allows(self._journal, *which):
                    return Permission(True)
                opening = functools.partial(
                    meaning.ask_permission, self._state, self._state.find(path), which, arguments, note
                )
                decision = await self._ask(turn, opening)
                if decision.action == "reject":
                    return Permission(False, reason=decision.feedback or "")
                if decision.output is None:
                    return Permission(True)
                edited = read_arguments(decision.output)
                try:
                    if tool is not None:
                        tool.check(edited)
                except ValueError as error:  # by somebody who could not know, as in another process
                    note = f"The edited arguments do not fit: {error}."
                else:
                    return Permission(True, edited)

    async def _ask(self, turn: LiveTurn, opening: Callable[[], GateOpened]) -> Decision:
        """Open a gate in the midst of a turn and wait for its answer; the turn's time stands still."""
        answer: asyncio.Future[Decision] = asyncio.get_running_loop().create_future()

        def propose() -> list[AnyEvent]:
            opened = opening()
            self._questions[opened.gate.id] = answer
            return [opened]

        turn.stop_clock()
        self._propose(propose)
        decision = await answer
        turn.run_clock()
        return decision

    async def _run_agents(self, turn: LiveTurn, asked: object, limit: int | None = None) -> list[AgentResult]:
        """Have other agents work for a turn and wait for them all; the turn's time stands still."""
        groups = checked_calls(asked, self._state.sub_agents)
        _check_places("run_agents: max_concurrency", limit)
        async with turn.one_at_a_time():
            named = any(call.input_files for group in groups for call in group)
            files = await asyncio.to_thread(_read_files, self._workspace(), groups) if named else {}
            ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            made: list[AgentsCalled] = []

            def propose() -> list[AnyEvent]:
                step = self._state.find(turn.started.path)
                called = meaning.call_agents(self._state, step, groups, files, limit)
                self._calls[called.path, called.call] = ended
                made.append(called)
                return [called]

            turn.stop_clock()
            try:
                self._propose(propose)
                await ended
            except asyncio.CancelledError:
                self._propose(lambda: self._not_waited_for(made), wait=False)
                raise
            finally:
                if self._turns.get(turn.started.path) is turn:  # else it was cut short
                    turn.run_clock()
            with self._lock:
                return meaning.results(self._state, made[-1])

    def _not_waited_for(self, made: list[AgentsCalled]) -> list[AnyEvent]:
        """What becomes of a call whose turn goes on without it."""
        call = self._state.calls.get(made[-1].path) if made else None
        if call is None or call.number != made[-1].call:
            return []
        caller = self._state.find(made[-1].path)
        cut = meaning.cut_all(self._state, "nobody waits for it", caller)
        return [
            *(one for one in cut if one.path != caller.path),
            AgentsReturned(step=caller.id, path=caller.path, call=call.number),
        ]

    def _decided(self, event: GateDecided) -> None:
        if not meaning.waits_for(self._state, event.gate_id):
            self._tell_turn(event)
        if event.decision.scope in ("run", "always"):
            self._allow_alike()

    def _tell_turn(self, event: GateDecided | TurnWentOn) -> None:
        waiting = self._questions.pop(event.gate_id, None)
        if waiting is not None and not waiting.done():
            waiting.set_result(self._state.decisions[event.gate_id])

    # -- showing ------------------------------------------------------------------------------------------------------

    def __repr__(self) -> str:
        return f"<Run {self.id} {self.state.name!r}: {self.status}>"

    def show_here(self) -> None:
        """In a notebook with somebody there: the live view under the present cell, once; elsewhere nothing."""
        host = _kernel_host()
        if host is not None and self._somebody and self._shown_in != (here := host.shell().execution_count):
            from .jupyter import view

            self._shown_in = here
            view.show(self)

    def _ipython_display_(self) -> None:
        """As IPython shows it: live where somebody is there; elsewhere it takes the text or the static view."""
        if _kernel_host() is None or not self._somebody:
            raise NotImplementedError
        self.show_here()

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        from .render import html, text

        with self.reading() as state:
            return {"text/plain": text.run_text(state), "text/html": html.run_html(state)}

    def graph(self, format: Literal["svg", "mermaid", "text"] = "svg", timeline: bool = False) -> str:
        """A picture of the steps and where they stand; with `timeline`, of when each ran and who was waited for.

        Of a run from a tape the timeline has the recorded times, so it is the same each time.
        """
        from .render import svg
        from .render import timeline as when

        if timeline:
            return when.draw(self.events, format, None if self.state.ended is not None else time.time())
        with self.reading() as state:
            return svg.graph(state, format)


_EFFECTS: dict[str, Callable[[Run, Any], None]] = {
    "TurnCutShort": Run._cancel_turn,
    "GateDecided": Run._decided,
    "TurnWentOn": Run._tell_turn,
    "AgentsReturned": Run._tell_caller,
    "RunResumed": Run._forget_troubles,
}
"""What an event does outside the state, once it is on disk."""


class _Outputs(Mapping[str, str]):
    """The approved texts by step, looked up when asked for: a run of ten thousand steps copies nothing."""

    def __init__(self, run: Run) -> None:
        self._run = run

    def __getitem__(self, step: str) -> str:
        with self._run.reading() as state:
            found = state.steps.get(step) or state.steps.get(step.replace("_", "-"))
            if found is None and (voice := state.voice(step)) is not None and state.voices[voice] is not None:
                return state.text(state.voices[voice])
            if found is None or (found.approved is None and not found.settled):
                raise KeyError(step)
            return state.text(found.approved)  # "" of a skipped one

    def __iter__(self) -> Iterator[str]:
        with self._run.reading() as state:
            steps = [step.id for step in state.order if step.approved is not None or step.settled]
            return iter([*steps, *(name for name, said in state.voices.items() if said is not None)])

    def __len__(self) -> int:
        return sum(1 for _ in self)


# -- module functions -------------------------------------------------------------------------------------------------


def current() -> Run:
    """The run that was started or resumed last.

    Raises
    ------
    TransitionError    There is none yet.
    """
    if _current is None:
        raise TransitionError("there is no run yet. Start one: run = workflow.start(), or `%cm run` in a notebook.")
    return _current


def set_current(run: Run | None) -> None:
    """What :func:`current` gives from now on; ``None``: nothing, until a run is started or resumed."""
    global _current
    _current = run


def runs(journal: str | os.PathLike[str] | AnyJournal | None = None) -> list[Run]:
    """All runs of a journal, newest first, to read and to decide; those driven here are the very objects."""
    named = journal if journal is not None else setting("journal")
    if isinstance(named, (str, os.PathLike)) and str(named) != ":memory:" and not Path(named).exists():
        return []
    where = open_journal(named)
    found = []
    for info in where.runs():
        run = Run.open(info.id, where)
        run.notebook = info.notebook
        found.append(run)
    return found


@by_name("cm.resume", "engine", "on_gate", "tape", "loop")
def resume(
    run_id: str,
    workflow: Workflow | None = None,
    *,
    inputs: Mapping[str, Any] | None = None,
    journal: str | os.PathLike[str] | AnyJournal | None = None,
    agents: Iterable[Agent] = (),
    until: str | None = None,
    reason: str = "",
    max_cost_usd: float | None = None,
    max_tokens: int | None = None,
    max_turns: int | None = None,
    **options: Any,
) -> Run:
    """Go on with a run from its journal; finished steps and decisions are kept.

    Parameters
    ----------
    workflow
        Its definition as it is now: steps that changed are stale. One that has run keeps its name and is not deleted;
        one that has not may be; those that stay keep their order. Needed for the Python functions among its agents,
        unless `agents` has them.
    inputs
        Values of template names, over those the run has.
    until
        Id of a step: pause when it is done.
    reason
        What had happened, for those who look; by default, where its process had not ended it, that.
    max_cost_usd, max_tokens, max_turns
        How much it may use in all, what it has used included; by default as before.
    **options
        ``engine, on_gate, tape, loop`` of :meth:`Run.start`; of a run that is driven here already, ``on_gate`` alone.

    Raises
    ------
    RunLocked          Another process drives it.
    JournalError       There is no such run.
    TransitionError    It is completed.
    WorkflowError      A function is missing, or `workflow` is no edit of this run's.
    """
    check_options(**{name: value for name, value in options.items() if name != "loop"})
    limits = checked_limits(max_cost_usd=max_cost_usd, max_tokens=max_tokens, max_turns=max_turns)
    run = Run.open(run_id, journal)
    if run._driving:
        return run.go_on(workflow, inputs, until=until, limits=limits, on_gate=options.get("on_gate"))
    with run.reading() as state:
        if state.ended == "completed":
            raise TransitionError(f"run {run_id!r} is completed. Start a new one, or add a step: run.add(…).")
        given = {agent.id: agent for agent in (*agents, *(workflow.agents if workflow is not None else ()))}
        for agent in state.agents.values():
            missing = (given.get(agent.id) or agent).missing
            if missing is not None:
                raise WorkflowError(
                    f"agent {agent.id!r} {missing}, which a journal cannot keep. "
                    f"Pass it: cm.resume({run_id!r}, agents=[{agent.id.replace('-', '_')}]), or workflow=."
                )
    run._prepare(given.values(), **options)
    run._drive()

    different: list[AnyEvent] = []

    def propose() -> list[AnyEvent]:
        why = reason or ("" if run._state.ended is not None else "the process that drove it had ended")
        cut = meaning.cut_all(run._state, why)
        changes = [event for event in different if not isinstance(event, TurnCutShort)]  # it was not the edit that cut
        return [RunResumed(reason=why, until=until), *cut, *changes, *_permitting(limits)]

    try:
        run._read_on()  # what the one who drove it before wrote until the last moment
        if inputs and workflow is None:
            workflow = run.workflow
        if workflow is not None:
            edits.check_order(run.state, workflow)
            values = edits.inputs_of(run.state, workflow, inputs)
            check_templates(workflow, values)
            different = edits.revision(run._state, workflow, values)
        run._propose(propose)
    except BaseException:
        run._let_go()
        raise
    return run._become_current()


def check_options(
    *,
    engine: str | Engine | None = None,
    tape: Any = None,
    workspace: str | os.PathLike[str] | None = None,
    on_gate: GatePolicy | None = None,
) -> Any:
    """Refuse what :meth:`Run.start` could not use, before anything happens; returns the tape, read.

    Raises
    ------
    WorkflowError     One of them is none of its kind, or the tape cannot be read.
    EngineNotFound    There is no engine of that name.
    """
    if engine is not None and not isinstance(engine, str) and not is_engine(engine):
        raise WorkflowError(f"engine={engine!r} is neither a name nor an engine (name, stream).")
    if isinstance(engine, str):
        find_engine(engine)
    if workspace is not None and not isinstance(workspace, (str, os.PathLike)):
        raise WorkflowError(f"workspace={workspace!r} is not a folder. Name one, for instance workspace='site'.")
    if on_gate is not None and not isinstance(on_gate, str) and not callable(on_gate):
        raise WorkflowError(f"on_gate={on_gate!r} is not 'approve', 'reject', 'stop' or a function.")
    if isinstance(on_gate, str) and on_gate not in (policies := ("approve", "reject", "stop")):
        raise WorkflowError(f"on_gate={on_gate!r} is not known. {did_you_mean(on_gate, policies, 'Possible')}")
    if tape is None:
        return None
    from .tape import Tape

    return tape if isinstance(tape, Tape) else Tape.read(tape)


def checked_limits(**given: Any) -> dict[str, int | float]:
    """Those of the limits that are given, by option.

    Raises
    ------
    WorkflowError    One is not an amount that can be reached.
    """
    found: dict[str, int | float] = {}
    for name, value in given.items():
        if value is None:
            continue
        whole = name != "max_cost_usd"
        fits = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
        if not fits or not 0 < value < float("inf"):
            right = f"a number of {name[4:]} from 1 on" if whole else "an amount of US dollars, such as 0.50"
            raise WorkflowError(f"{name}={value!r} is not {right}.")
        found[name] = value
    return found


def _permitting(limits: Mapping[str, Any] | None) -> list[AnyEvent]:
    """The event that says what the run may use from now on, if that is another amount."""
    return [WorkflowChanged(limits=checked_limits(**limits))] if limits else []


def _check_places(what: str, number: object) -> None:
    if number is not None and (not isinstance(number, int) or number < 1):
        raise WorkflowError(f"{what}={number!r} is not a number of agents from 1 on.")


def _read_files(folder: Path, groups: Iterable[Iterable[Call]]) -> dict[str, str]:
    """The input files that calls name, as they are now.

    Raises
    ------
    WorkflowError    One cannot be read, is no text, or lies outside the workspace.
    """
    found: dict[str, str] = {}
    for name in (name for group in groups for call in group for name in call.input_files):
        if name in found:
            continue
        where = folder.joinpath(name).resolve()
        if not where.is_relative_to(folder.resolve()):
            raise WorkflowError(f"run_agents: the input file {name!r} lies outside the workspace.")
        try:
            found[name] = where.read_text("utf-8")
        except OSError as error:
            reason = error.strerror or error
            raise WorkflowError(f"run_agents: the input file {name!r} cannot be read: {reason}.") from None
        except ValueError:
            raise WorkflowError(f"run_agents: the input file {name!r} is not a text in UTF-8.") from None
    return found


def _more(have: Iterable[AnyEvent], cut: Iterable[TurnCutShort]) -> list[TurnCutShort]:
    """Those of `cut` whose turns do not end by what is in `have` already."""
    known = {event.path for event in have if isinstance(event, (TurnCutShort, TurnFinished, TurnFailed))}
    return [event for event in cut if event.path not in known]


def somebody() -> bool:
    """Whether a person can answer a gate: ``CM_HEADLESS``, else the notebook's front end, else a terminal."""
    headless = setting("headless")
    if headless is not None:
        return not headless
    host = _kernel_host()
    if host is not None:
        return bool(host.somebody())
    try:
        return sys.stdin is not None and sys.stdin.isatty()
    except ValueError:  # closed
        return False


def _kernel_host() -> Any:
    """What knows the kernel, when this process is one."""
    if "ipykernel" not in sys.modules:
        return None
    from .jupyter import bridge

    return bridge if bridge.kernel() is not None else None


def _nobody_there(gate: Gate) -> str:
    if gate.kind == "budget":
        from .render import text

        option = f"--{gate.payload['limit'].replace('_usd', '').replace('_', '-')}"
        return (
            f"{text.limit_words(gate.payload)} Nobody can answer here. Go on with more in all (`{option}`), play a "
            "tape with a decision (`--tape`), or pass `--on-gate approve` if that is what you want."
        )
    else_ = "pass `--on-gate approve` if that is what you want."
    if "approve" not in gate.actions:  # a question
        else_ = "have a function answer: on_gate=lambda gate: cm.Decision(action='answer', feedback='…')."
    return (
        f'Stopped at the gate "{gate.path}": nobody can answer here. Play a tape with a decision (`--tape`), or {else_}'
    )


@contextlib.contextmanager
def _making(folder: str | os.PathLike[str], kind: type[CodeMachineError]) -> Iterator[None]:
    """What goes wrong while `folder` is made to work in, as an error of this kind."""
    try:
        yield
    except (OSError, ValueError) as error:
        why = "it is a file" if isinstance(error, FileExistsError) else getattr(error, "strerror", None) or error
        raise kind(
            f"the workspace {os.fspath(folder)!r} cannot be used: {why}. Name a folder that can be made, for instance "
            "workspace='site'."
        ) from error


@contextlib.contextmanager
def _no_collecting() -> Iterator[None]:
    """Keep the garbage collector from walking a state again and again while it is built of objects that all stay."""
    on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if on:
            gc.enable()


def _quietly(loop: asyncio.AbstractEventLoop, callback: Callable[[], object]) -> None:
    with contextlib.suppress(RuntimeError):  # that loop is closed: nobody waits there any more
        loop.call_soon_threadsafe(callback)
