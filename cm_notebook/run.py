"""One execution of a workflow: what can be asked of it, and how its parts hang together.

Strategy: everything happens as an event, and one loop makes them. Whatever is asked of a run here (approve, stop, add a
step) becomes a *proposal*: a function that says which events are wanted now. So do the ends of turns and the answers of
those who stand in for a person. It goes round:

    driving.py      proposals → events → what follows from them (``state.py`` says what) → on disk     the one loop
    ``_follow``     what is on disk has its effect outside: turns start and stop, gates are put to whoever may answer
    work.py         turns: an engine works, asks meanwhile, and how it ended                           → a proposal
    answering.py    gates: the mode, the tape, a policy, or this very class for a person               → a proposal

``Driver.record`` is the only place where an event comes into being. Nothing is shown or started before it is on disk,
so a run that dies anywhere goes on from its journal (:func:`resume`). Who does not drive a run (:meth:`Run.open`) reads
it and decides by the same journal.

What a run is started with is checked in ``starting.py``; whether a person is there is said in ``presence.py``. None of
these knows this file.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import secrets
import time
from collections.abc import AsyncIterator, Callable, Generator, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, cast, get_args

from . import edits, keys, waiting
from . import state as meaning
from .answering import Answers
from .config import setting
from .driving import POLL_S, Driver, Hands, Start, driven_here, more
from .engines.base import Engine
from .errors import AlreadyDecided, JournalError, TransitionError, WorkflowError, by_name, did_you_mean
from .events import (
    AnyEvent,
    Decision,
    Gate,
    GateDecided,
    Mode,
    ModeChanged,
    Rewound,
    RunFinished,
    RunForked,
    RunPaused,
    RunResumed,
    RunStarted,
    RunUnpaused,
    Scope,
    TurnCutShort,
    Usage,
)
from .feed import Feed, LiveText
from .journal import AnyJournal, call_of, open_journal
from .loops import engine_loop, quietly, run_sync, running_loop, wait_detached
from .presence import kernel_host, somebody
from .prompts import check_read, check_templates
from .runstate import RunState, Status
from .starting import GatePolicy, check_options, check_places, check_switches, checked_limits, making, permitting
from .steps import StepView
from .team import CAP
from .waiting import OnWaiting
from .work import Work
from .workflow import Agent, Separator, Step, Workflow, as_step, sound

_current: Run | None = None
_SNAPSHOT = "[0-9a-f]{40,64}"


class Run:
    """A run: watch it, decide at its gates, wait for it. Made by ``Workflow.start`` and :func:`resume`.

    ``run["planner"]`` is one of its steps, ``await run`` and :meth:`wait` wait for it. Every method may be called from
    any thread; those that decide or steer return the run.

    Attributes
    ----------
    id
        What the journal, ``cm.resume`` and the command line know it by, for instance ``r-1f2e3d4c``.
    status
        ``running, waiting`` (at a gate)``, paused, completed, stopped`` or ``failed``.
    mode
        Who drives: ``step-by-step, gates`` or ``unattended``.
    gates
        The open gates, oldest first.
    events
        All that has happened, in order.
    usage, cost_usd
        Tokens and US dollars of all turns together, also of those that failed.
    workflow
        The workflow as it is now.
    state
        What all that has happened comes to.
    """

    def __init__(self, run_id: str, journal: AnyJournal) -> None:
        keys.learn()  # whatever is recorded from here on is without them
        self.id = run_id
        self.notebook: str | None = None
        self._journal = journal
        self._driver = Driver(run_id, journal)
        self._work = Work(self._driver)
        self._answers = Answers(self._driver, self._work)
        self._shown_in: int | None = None
        self._options: dict[str, Any] = {}
        """What it was started or taken up with here: ``engine, tape, on_gate, on_waiting, loop``."""

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
        on_waiting: OnWaiting | None = None,
        tape: Any = None,
        record: str | os.PathLike[str] | None = None,
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
            How much the run may use (US dollars, tokens, prompts sent) before a person is asked, in place of what the
            workflow says; see :class:`~cm_notebook.workflow.Workflow`.
        on_gate
            Answers gates in place of a person: ``"approve"``, ``"reject"`` (each step once), ``"stop"``, or a function
            (sync or async; on a thread of its own) that gets the gate and returns a ``Decision``, an action's name, or
            ``None`` to leave it open. ``"approve"`` approves gates of kind ``budget`` too, each time for the same
            amount again; mode ``unattended`` never does.
        on_waiting
            Tells somebody that a gate is open: called once for each gate that a person has to answer, by each process
            that drives the run, so also for one that was open when it was resumed. A function that gets the gate (sync
            or async; on a thread of its own), or a command (a line, or a list of words; no shell), which has 30 s, the
            variables ``CM_RUN``, ``CM_STEP``, ``CM_GATE``, ``CM_KIND``, ``CM_MESSAGE``, ``CM_ANSWER`` (the command that
            answers), and all of it as JSON on its stdin. If it fails, the gate says so, and nothing else changes.
        tape
            A recorded run to play instead of calling engines.
        record
            File to which the run is recorded as a tape, with what agents did and people decided. A tape that is there
            is replaced as soon as an agent has answered. Pauses, going back and switches of the mode are not on it:
            played, the run is driven as the workflow says; :meth:`export` leaves out what it has gone back over.
        loop
            ``"thread"``: the run has the engine's own thread. ``"kernel"``: the loop that runs here, for objects bound
            to it.
        notebook
            Under what the run is found again when its cell runs after a restart.

        Raises
        ------
        WorkflowError     A template names what is not there, an input cannot be kept, `until` is no step, `workspace`
                          cannot be made, `record` cannot be written or nothing would be recorded, the price of a model
                          is not known and a limit on cost needs it.
        EngineNotFound    A step's engine is not there.
        JournalError      The journal cannot be used.
        """
        values = {**edits.checked_inputs(workflow.inputs), **edits.checked_inputs(inputs or {})}
        check_templates(workflow, values)
        check_read(workflow, inputs or {}, workflow.inputs)
        tape = check_options(
            engine=engine, tape=tape, record=record, workspace=workspace, on_gate=on_gate, on_waiting=on_waiting
        )
        check_places("max_concurrency", max_concurrency)
        limits = checked_limits(max_cost_usd=max_cost_usd, max_tokens=max_tokens, max_turns=max_turns)
        if until is not None and until not in (known := [item.id for item in workflow.executable]):
            raise WorkflowError(f"until={until!r} is not a step. {did_you_mean(until, known, 'Steps')}")
        if workspace is not None:
            with making(workspace, WorkflowError):
                Path(workspace).mkdir(parents=True, exist_ok=True)
        run = cls(_new_id(), open_journal(journal if journal is not None else setting("journal")))
        run.notebook = notebook
        playing = {"tape": tape, "record": record}
        run._prepare(workflow.agents, engine=engine, **playing, on_gate=on_gate, on_waiting=on_waiting, loop=loop)
        run._driver.state.engine = workflow.engine
        run._work.check_prices(workflow, limits)
        if record is not None and tape is None:
            from .recording import check_heard

            check_heard(record, map(run._work.engine_for, workflow.tasks))
        run._journal.create(run.id, workflow.name, notebook)
        run._driver.drive()
        try:
            started = RunStarted(
                run_id=run.id,
                workflow=workflow.kept(),
                inputs=values,
                fingerprints=edits.fingerprints(workflow, values),
                until=until,
                workspace=str(Path(workspace).absolute()) if workspace is not None else None,
                recorded=run._answers.tape.run_name if run._answers.tape is not None else None,
                max_concurrency=max_concurrency,
                limits=limits or None,
            )
            run._driver.propose(lambda: [started])
        except BaseException:
            run._driver.let_go()
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
        named: Any = run_id
        if not isinstance(named, str):
            known = [info.id for info in where.runs()]
            raise JournalError(f"there is no run {named!r}. {did_you_mean(named, known, 'Runs')}", path=where.path)
        driver = driven_here(where, run_id)
        if driver is not None:
            run: Run = driver.hands.run
            return run
        run = cls(run_id, where)
        run._driver.catch_up()
        return run

    def _prepare(
        self,
        agents: Iterable[Agent],
        *,
        engine: str | Engine | None = None,
        tape: Any = None,
        record: str | os.PathLike[str] | None = None,
        on_gate: GatePolicy | None = None,
        on_waiting: OnWaiting | None = None,
        loop: Literal["thread", "kernel"] = "thread",
    ) -> None:
        """Take what is needed for driving, from the thread that asks for it."""
        driver, work, answers = self._driver, self._work, self._answers
        self._options = {"engine": engine, "tape": tape, "on_gate": on_gate, "on_waiting": on_waiting, "loop": loop}
        work.agents.update({agent.id: agent for agent in agents})
        answers.on_gate = on_gate if on_gate is not None else cast("GatePolicy | None", setting("on_gate"))
        self._options["tape"] = answers.tape = check_options(engine=engine, tape=tape, on_gate=answers.on_gate)
        answers.tell_anew(waiting.checked(on_waiting))
        work.engine = engine
        answers.somebody = somebody()
        if answers.tape is not None:
            from .engines.offline import OfflineEngine

            work.engine = OfflineEngine(tape=answers.tape, strict=not answers.somebody, delay=answers.somebody)
        if record is not None:
            from .recording import Recorder

            recorder = Recorder(record, lambda: self.events, lambda: driver.state.texts, answers.tape)
            driver.feeds.append(recorder)
            work.files.leave_out(recorder.file)
        driver.hosted = loop == "kernel"
        if loop == "kernel":
            driver.loop = running_loop()
            if driver.loop is None:
                raise WorkflowError('loop="kernel" needs a running event loop: call it in a cell or in a coroutine.')
        elif loop == "thread":
            driver.loop = engine_loop()
        else:
            raise WorkflowError(f"loop={loop!r} is not known. Use 'thread' or 'kernel'.")
        driver.hands = Hands(self, work.engine_name, self._follow, work.drop)

    def _become_current(self) -> Run:
        set_current(self)
        return self

    # -- what is on disk ----------------------------------------------------------------------------------------------

    def _follow(self, events: list[AnyEvent], starts: list[Start]) -> None:
        """What is on disk now has its effect outside: turns start and stop, gates are put to whoever may answer."""
        for event in events:
            if event.type in _EFFECTS:
                _EFFECTS[event.type](self, event)
        for start in starts:
            self._work.launch(*start)
        self._answers.put_open()
        self._work.forget_answered()

    def _decided(self, event: GateDecided) -> None:
        if not meaning.waits_for(self._driver.state, event.gate_id):
            self._work.tell(event)
        if event.decision.scope in ("run", "always"):
            self._answers.allow_alike()

    def _forget_troubles(self, event: RunResumed) -> None:
        self._driver.error = None
        self._driver.unheard.clear()

    # -- looking ------------------------------------------------------------------------------------------------------

    def reading(self) -> contextlib.AbstractContextManager[RunState]:
        """The run's state, which does not change inside the ``with`` block."""
        return self._driver.reading()

    @property
    def state(self) -> RunState:
        """The run's state; to read several things that belong together use :meth:`reading`."""
        with self.reading() as state:
            return state

    @property
    def status(self) -> Status:
        """``running, waiting, paused, completed, stopped`` or ``failed``."""
        with self.reading() as state:
            return "failed" if self._driver.lost is not None else state.status

    @property
    def driven(self) -> bool:
        """Whether anybody, here or in another process, drives it now. Without, it is read and decided, and stands."""
        return self._driver.driving or self._journal.driven(self.id)

    @property
    def error(self) -> BaseException | None:
        """What went wrong last."""
        return self._driver.error

    @error.setter
    def error(self, error: BaseException | None) -> None:
        self._driver.error = error

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
                agents=[self._work.agents.get(agent.id, agent) for agent in state.agents.values()],
                sub_agents=state.sub_agents,
                max_concurrency=state.default_places if state.default_places != CAP else None,
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
        asked: Any = path
        if not isinstance(asked, str):
            return self[path].text  # which says what is wrong
        turn = self._driver.turns.get(path)
        return turn.text() if turn is not None else ""

    def watch(self, wake: Callable[[], None]) -> Feed:
        """A feed of what happens from now on; `wake` is called on the run's thread when there is something."""
        feed = Feed(wake)
        with self._driver.lock:
            self._driver.feeds.append(feed)
        return feed

    def follow(self, wake: Callable[[], None]) -> tuple[Feed, list[AnyEvent | LiveText]]:
        """A feed as of :meth:`watch`, and what was before it: all events, then what is being written; nothing twice."""
        with self.reading() as state:
            feed = self.watch(wake)
            past: list[AnyEvent | LiveText] = [event for event in self.events if event.seq <= state.seq]
            turns = self._driver.turns.items()
            texts = (LiveText(path, turn.started.attempt, turn.text()) for path, turn in turns)
            return feed, past + [live for live in texts if live.text]

    def unwatch(self, feed: Feed) -> None:
        """Close a feed."""
        with self._driver.lock, contextlib.suppress(ValueError):
            self._driver.feeds.remove(feed)

    async def stream(self) -> AsyncIterator[AnyEvent | LiveText]:
        """All events from the start, then events and live text as they happen, until the run rests; on any loop.

        Of a run that is not driven here: its events, until it rests or nobody drives it any more.
        """
        loop, awake = asyncio.get_running_loop(), asyncio.Event()
        feed, before = self.follow(lambda: quietly(loop, awake.set))
        self._driver.rest.add_done_callback(lambda _rest: quietly(loop, awake.set))
        try:
            for thing in before:
                yield thing
            while True:
                over = self._driver.over()
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
        self._driver.check_driven()
        host = kernel_host()
        if host is not None:
            host.wait_in_cell(self._driver.rest, timeout_s, loop=self._driver.loop)
        else:
            run_sync(self._driver.rest, timeout_s, loop=self._driver.loop)
        return self

    def __await__(self) -> Generator[Any, None, Run]:
        """``await run``: as :meth:`wait`, on any loop; interrupting the wait leaves the run going on."""
        return self._awaited().__await__()

    async def _awaited(self) -> Run:
        self._driver.check_driven()
        await wait_detached(self._driver.rest, loop=self._driver.loop)
        return self

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
        """Have it made again, with the files as they were before; its agent is told `feedback`.

        At a verdict: go back, with `feedback` as the reason. Where a tool is to be called: it is not.
        """
        return self._answer(step, Decision(action="reject", feedback=feedback))

    def retry(self, step: str | None = None, *, prompt: str | None = None, count: int = 1) -> Run:
        """Try again, with `prompt` instead of the last one; at an exhausted loop, `count` more iterations."""
        return self._answer(step, Decision(action="retry", prompt=prompt, count=count))

    def skip(self, step: str | None = None) -> Run:
        """Go on without this step's output; what names it gets an empty text."""
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
            gate = meaning.gate_of(self._driver.state, gate_id, self._driver.resuming)
            if digest is not None and digest != gate.digest:
                raise AlreadyDecided(f"{gate.step!r} shows something else by now; nothing was changed. Look again.")
            kept = self._answers.checked(gate, decision)
            if kept.scope == "always":  # first, as the run may ask again at once
                self._answers.allow_always(gate)
            return [GateDecided(gate_id=gate_id, decision=kept)]

        self._driver.propose(propose)
        return self

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
        return self._answers.gate(step)

    # -- steering -----------------------------------------------------------------------------------------------------

    def pause(self, *, by: str = "you") -> Run:
        """Let what runs finish and start nothing new; `by`: who says so, as others read it."""
        self._driver.propose(lambda: [RunPaused(reason=f"paused by {sound(by)}")])
        return self

    def unpause(self, until: str | None = None) -> Run:
        """Go on, up to and including the step `until` when that is given."""

        def propose() -> list[AnyEvent]:
            if until is not None:
                self._driver.state.step(until)
            return [RunUnpaused(until=until)]

        self._driver.propose(propose)
        return self

    def next(self) -> Run:
        """Run exactly one step, then pause; returns at once, and can be awaited."""

        def propose() -> list[AnyEvent]:
            step = self._driver.state.current
            if step is None:
                raise TransitionError(f"run {self.id!r} has no step left.")
            return [RunUnpaused(until=step.id, once=True)]

        self._driver.go_on(propose)
        return self

    def stop(self, *, by: str = "you") -> Run:
        """End the run as ``stopped``: what runs is cancelled. It can be resumed; `by`: who says so, for others."""
        reason = f"stopped by {sound(by)}"

        def propose() -> list[AnyEvent]:
            if self._driver.state.ended is not None:
                raise TransitionError(f"run {self.id!r} is {self._driver.state.ended} already.")
            return [*meaning.cut_all(self._driver.state, reason), RunFinished(status="stopped", reason=reason)]

        self._driver.propose(propose)
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
        self._driver.propose(lambda: [ModeChanged(mode=mode)])
        return self

    def rerun(self, step: str, *, later: bool = False) -> Run:
        """Run a step again as a new attempt; later outputs are then stale, or with `later` made again too."""
        check_switches(later=later)

        def propose() -> list[AnyEvent]:
            meaning.check_rewind(self._driver.state, step)  # before anything is cut short for it
            return [*meaning.cut_all(self._driver.state, f"{step} runs again"), Rewound(to=step, later=later)]

        self._driver.go_on(propose)
        return self

    def restore_files(self, step: str, to: str = "before", *, attempt: int = -1) -> str:
        """Bring the files of the workspace to what they were at an attempt of `step`. No agent may be at work.

        Parameters
        ----------
        to
            ``"before"`` it, ``"after"`` it (what was rejected, too), or ``"kept"``: what was there when files were
            taken back for it. Or what this method returned.
        attempt
            1, 2 …, or counted from the end.

        Returns
        -------
        str
            The snapshot of what was there: given as `to`, it undoes this.

        Raises
        ------
        TransitionError    An agent is at work, or there is no such snapshot.
        WorkflowError      `to` is none of these.
        SnapshotError      It cannot be done; the message says why.
        """
        view = self[step]
        tree = to if re.fullmatch(_SNAPSHOT, str(to)) else None
        if tree is None:
            names = ("before", "after", "kept")
            if to not in names:
                raise WorkflowError(f"to={to!r} is not known. {did_you_mean(to, names, 'Possible')}")
            found = view.attempt(attempt)
            tree = getattr(found, to)
            if tree is None and to == "after" and not found.files_total and not found.unkept:
                tree = found.before  # it changed nothing
            if tree is None:
                there = ", ".join(name for name in names if getattr(found, name) is not None) or "none"
                raise TransitionError(f"attempt {found.number} of {step!r} has no snapshot {to!r}. It has: {there}.")
        with self._driver.lock:
            if self._driver.driving and self._driver.state.at_work:
                raise TransitionError(f"{', '.join(self._driver.state.running)} is at work on the files. Wait for it.")
            return self._work.files.bring_back(tree)

    def rewind(self, step: str) -> Run:
        """Go back to before `step`: it and all after it are to run as if they never had; the run is paused there.

        Nothing runs, and nothing is paid, until you go on (:meth:`unpause`, :meth:`next`), so the step may be edited
        first (:meth:`replace`). What runs is cut short. What earlier steps gave stays; what was tried stays to be seen.
        A loop that goes over the step is in the pass that it was in. A run that has ended can be rewound too, and one
        that another process drives, which then waits there; where nobody does, :func:`resume` goes on.
        The files are brought back as the step begins to run, not before; what is there by then is kept first.

        Raises
        ------
        TransitionError    There is no such step, or the run has not come to it; nothing was changed.
        """

        def propose() -> list[AnyEvent]:
            to = meaning.check_rewind(self._driver.state, step).id  # before anything is cut short for it
            return [*meaning.cut_all(self._driver.state, f"back to {to}"), Rewound(to=to, later=True, afresh=True)]

        self._driver.send_back(propose)
        return self

    @by_name("run.fork", "engine", "on_gate", "on_waiting", "tape", "record", "loop")
    def fork(
        self,
        step: str,
        workflow: Workflow | None = None,
        *,
        inputs: Mapping[str, Any] | None = None,
        agents: Iterable[Agent] = (),
        workspace: str | os.PathLike[str] | None = None,
        max_cost_usd: float | None = None,
        max_tokens: int | None = None,
        max_turns: int | None = None,
        notebook: str | None = None,
        **options: Any,
    ) -> Run:
        """A new run that shares this one's history and is paused before `step`, as after :meth:`rewind`.

        This run is not touched: it goes on, here or in another process, and may be forked again. Nothing is copied. The
        fork has gates, a workspace and limits of its own: what was used before it does not count against them, while
        ``usage`` and ``cost_usd`` are of the whole history (``state.origin`` has what of them is from before). Tools
        that were allowed for the run ask again.

        Parameters
        ----------
        workflow, inputs, agents
            As of :func:`resume`: the definition as the fork goes on by, if that is another one.
        workspace
            Folder its agents work in; by default an own one, never this run's.
        max_cost_usd, max_tokens, max_turns
            How much the fork may use, from its beginning; by default as much as this run from its.
        notebook
            As of :meth:`start`; by default as this run.
        **options
            ``engine, on_gate, on_waiting, tape, loop`` of :meth:`start`; by default those that this run has here. And
            ``record``: what is recorded is the fork with its history, as of :func:`resume`.

        Raises
        ------
        TransitionError    There is no such step, or the run has not come to it.
        WorkflowError      A function is missing, or `workflow` is no edit of this run's.
        """
        mine = {name: one for name, one in self._options.items() if name != "tape" or "engine" not in options}
        options = {**mine, **options}
        check_options(workspace=workspace, **{name: value for name, value in options.items() if name != "loop"})
        limits = checked_limits(max_cost_usd=max_cost_usd, max_tokens=max_tokens, max_turns=max_turns)
        with self.reading() as state:
            meaning.check_rewind(state, step)
            known = {**self._work.agents, **edits.by_id(agents)}
            given = _given(state, known.values(), workflow, f"run.fork({step!r})")

        def drive(fork: Run) -> None:
            fork._prepare(given.values(), **options)

        fork = self._fork(step, workflow, inputs, workspace, limits, notebook, prepare=drive)
        return fork._become_current()

    def _fork(
        self,
        step: str,
        workflow: Workflow | None = None,
        inputs: Mapping[str, Any] | None = None,
        workspace: str | os.PathLike[str] | None = None,
        limits: Mapping[str, Any] | None = None,
        notebook: str | None = None,
        prepare: Callable[[Run], None] | None = None,
    ) -> Run:
        """The fork: driven here once `prepare` has given it what that takes; else by nobody yet."""
        with self.reading() as state:
            to, shared, name = meaning.check_rewind(state, step).id, state.seq, state.name
        if workspace is not None:
            with making(workspace, WorkflowError):
                Path(workspace).mkdir(parents=True, exist_ok=True)
        fork = Run(_new_id(), self._journal)
        fork.notebook = notebook if notebook is not None else self.notebook
        if prepare is not None:
            prepare(fork)
        self._journal.create(fork.id, name, fork.notebook, (self.id, shared))
        if prepare is not None:
            fork._driver.drive()
        forked = RunForked(
            run_id=fork.id,
            of=self.id,
            step=to,
            workspace=str(Path(workspace).absolute()) if workspace is not None else None,
            recorded=fork._answers.tape.run_name if fork._answers.tape is not None else None,
        )
        different: list[AnyEvent] = []

        def propose() -> list[AnyEvent]:
            cut = meaning.cut_all(fork._driver.state, f"it goes on in run {self.id}, not in this fork")
            return [forked, *cut, Rewound(to=to, later=True, afresh=True), *different, *permitting(limits)]

        try:
            fork._driver.reload()
            different = [event for event in fork._revision(workflow, inputs) if not isinstance(event, TurnCutShort)]
            if prepare is not None:
                fork._work.check_prices(workflow or fork.workflow, limits or {})
            fork._driver.propose(propose)
        except BaseException:
            fork._driver.let_go()
            raise
        return fork

    def diff(self, against: Run, step: str | None = None) -> str:
        """What is different here from the run `against`: the answer of `step`, else all that differs; a unified diff.

        Raises
        ------
        TransitionError    One of them has no such step.
        """
        from .render import compare

        if not isinstance(against, Run):
            raise TransitionError(f"{against!r} is no run. One of the journal: cm.runs()[0].")
        with both(against, self) as (old, new):
            return compare.text(old, new, step)

    def _revision(self, workflow: Workflow | None, inputs: Mapping[str, Any] | None) -> list[AnyEvent]:
        """The events that lead to an edited definition; refused if it is none of this run's."""
        if inputs and workflow is None:
            workflow = self.workflow
        if workflow is None:
            return []
        edits.check_order(self.state, workflow)
        values = edits.inputs_of(self.state, workflow, inputs)
        check_templates(workflow, values)
        check_read(workflow, inputs or {}, {**self.state.inputs, **workflow.inputs})
        return edits.revision(self._driver.state, workflow, values)

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
        with self._driver.lock:
            items = list(self._driver.state.items)
            place = len(items) if after is None else items.index(self._driver.state.step(after).step) + 1
            items.insert(place, item)
            made = self._changed(items, agents, values)
        self._driver.go_on(lambda: [edits.addition(self._driver.state, item, after, made, values)])
        return None if isinstance(item, Separator) else self[item.id]

    def remove(self, step: str) -> Run:
        """Take a step out.

        Raises
        ------
        WorkflowError    Another step needs it; nothing was changed.
        """
        with self._driver.lock:
            gone = self._driver.state.step(step)
            self._changed([item for item in self._driver.state.items if item is not gone.step], (), {})
        self._driver.go_on(lambda: edits.removal(self._driver.state, gone.id))
        return self

    def replace(self, step: Step, *, agents: Iterable[Agent] = (), inputs: Mapping[str, Any] | None = None) -> bool:
        """Define a step anew; what it had made is stale then. Returns whether anything was different.

        Raises
        ------
        WorkflowError    The workflow would not be right with it; nothing was changed.
        """
        values = edits.checked_inputs(inputs or {})
        if not isinstance(step, Step):
            raise WorkflowError(f"{step!r} is not a step. Use cm.step(…), cm.module(…) or cm.parallel(…).")
        with self._driver.lock:
            old = self._driver.state.step(step.id)
            made = self._changed(
                [step if item is old.step else item for item in self._driver.state.items], agents, values
            )
            if not edits.replacement(self._driver.state, step, made, values):
                return False
        self._driver.go_on(lambda: edits.replacement(self._driver.state, step, made, values))
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
        with self._driver.lock:
            different = edits.revision(self._driver.state, workflow, values)
        self._work.agents.update({agent.id: agent for agent in workflow.agents})
        if different:
            self._driver.go_on(lambda: edits.revision(self._driver.state, workflow, values))
        with self._driver.lock:
            return [step.id for step in self._driver.state.order if step.stale]

    def go_on(
        self,
        workflow: Workflow | None = None,
        inputs: Mapping[str, Any] | None = None,
        *,
        until: str | None = None,
        once: bool = False,
        again: str | None = None,
        later: bool = False,
        afresh: bool = False,
        limits: Mapping[str, Any] | None = None,
        on_gate: GatePolicy | None = None,
        on_waiting: OnWaiting | None = None,
    ) -> Run:
        """Go on, ended or paused or not: what running a cell again comes to, as one change.

        Parameters
        ----------
        workflow, inputs
            The definition as it is now, as for :meth:`revise`.
        until, once
            Id of a step: pause when it is done, or (``once``) has run once. ``None``: no limit.
        again, later
            A step to run again, as for :meth:`rerun`; with `afresh` to go back to and wait at, as for :meth:`rewind`.
        limits
            What the run may use in all from now on: ``max_cost_usd, max_tokens, max_turns``.
        on_gate
            Who answers in place of a person from now on, the gates that are open included.
        on_waiting
            Who is told of gates that open from now on, in place of who was.

        Raises
        ------
        WorkflowError      As for :meth:`revise`; nothing was changed.
        TransitionError    There is no such step; nothing was changed.
        """
        check_switches(once=once, later=later, afresh=afresh)
        if inputs and workflow is None:
            workflow = self.workflow
        if workflow is not None:
            edits.check_order(self.state, workflow)
        with self.reading() as state:
            _check_steps(state, workflow, until, again)
        values = edits.inputs_of(self.state, workflow, inputs)
        told = waiting.checked(on_waiting)
        if workflow is not None:
            check_templates(workflow, values)
            self._work.agents.update({agent.id: agent for agent in workflow.agents})
            for item in workflow.tasks:
                self._work.engine_for(item)

        def propose() -> list[AnyEvent]:
            state = self._driver.state
            different = edits.revision(state, workflow, values) if workflow is not None else []
            events = [*different, *permitting(limits)]
            if again is not None:
                if again in state.steps:
                    meaning.check_rewind(state, again)  # before anything is cut short for it
                events += more(different, meaning.cut_all(state, f"{again} runs again"))
                events.append(Rewound(to=again, later=later or afresh, afresh=afresh))
            held = state.paused or state.until_reached or (state.until, state.until_once) != (until, once)
            if not afresh and held if state.ended is None else until is not None:  # resuming lifts every limit
                events.append(RunUnpaused(until=until, once=once))
            if told is not None:
                self._answers.tell_anew(told)
            if on_gate is not None:  # the gates that are open are put to it when this pass ends
                self._answers.ask_anew(on_gate)
            return events

        self._driver.go_on(propose)
        return self._become_current()

    def _changed(self, items: list[Step | Separator], agents: Iterable[Agent], inputs: Mapping[str, Any]) -> Workflow:
        """The workflow with these steps; refused here, before anything changes, if it cannot run."""
        given = {**self._work.agents, **edits.by_id(agents)}
        made = edits.changed(self._driver.state, items, given, inputs)
        self._work.agents.update({agent.id: agent for agent in made.agents})
        for item in made.tasks:
            self._work.engine_for(item)
        return made

    # -- showing ------------------------------------------------------------------------------------------------------

    def __repr__(self) -> str:
        from .render import text

        with self.reading() as state:
            fork = text.fork_words(state)
            return f"<Run {self.id} {state.name!r}{f' ({fork})' if fork else ''}: {self.status}>"

    def show_here(self) -> None:
        """In a notebook with somebody there: the live view under the present cell, once; elsewhere nothing."""
        host = kernel_host()
        if host is not None and self._answers.somebody and self._shown_in != (here := host.shell().execution_count):
            from .jupyter import view

            self._shown_in = here
            view.show(self)

    def _ipython_display_(self) -> None:
        """As IPython shows it: live where somebody is there; elsewhere it takes the text or the static view."""
        if kernel_host() is None or not self._answers.somebody:
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

    def export(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Write it to a file, and return the file's path.

        Parameters
        ----------
        path
            ``test_plan.py`` or ``plan_test.py``: a pytest test that plays the run's tape and compares what its steps
            say, with the tape beside it (``test_plan.jsonl``). ``plan.jsonl``: the tape alone. Any other ``.py``, and
            ``.json``: its workflow, see :meth:`~cm_notebook.workflow.Workflow.export`.
            On the tape is the way to what the run came to: what it has gone back over is left out.
        overwrite
            Replace a file that is there and holds something else, which is refused otherwise.

        Raises
        ------
        WorkflowError    The source of a function cannot be got, a file cannot be written, or a step was kept although
                         what it builds on is another now, so no tape plays the run; no file was written.
        """
        from .exports import export_run

        return export_run(self, path, overwrite=overwrite)


_EFFECTS: dict[str, Callable[[Run, Any], None]] = {
    "TurnCutShort": lambda run, event: run._work.cut_short(event),
    "GateDecided": Run._decided,
    "TurnWentOn": lambda run, event: run._work.tell(event),
    "AgentsReturned": lambda run, event: run._work.tell_caller(event),
    "RunResumed": Run._forget_troubles,
}
"""What an event does outside the state, once it is on disk."""


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
    """All runs of a journal, newest first, to read and to decide; those driven here are the very objects.

    Parameters
    ----------
    journal
        A path or a journal; by default ``.cm_notebook/journal.db`` below the working folder. Where there is none yet,
        there are no runs.

    Returns
    -------
    list of Run
        Looking at them drives none: to go on with one, :func:`resume`.

    Raises
    ------
    JournalError    The journal cannot be read.
    """
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


@by_name("cm.resume", "engine", "on_gate", "on_waiting", "tape", "record", "loop")
def resume(
    run_id: str,
    workflow: Workflow | None = None,
    *,
    inputs: Mapping[str, Any] | None = None,
    journal: str | os.PathLike[str] | AnyJournal | None = None,
    agents: Iterable[Agent] = (),
    until: str | None = None,
    rewind: str | None = None,
    reason: str = "",
    max_cost_usd: float | None = None,
    max_tokens: int | None = None,
    max_turns: int | None = None,
    **options: Any,
) -> Run:
    """Go on with a run from its journal; finished steps and decisions are kept.

    Parameters
    ----------
    run_id
        Its ``id``; ``cm.runs()`` has them all.
    workflow
        Its definition as it is now: steps that changed are stale. One that has run keeps its name and is not deleted;
        one that has not may be; those that stay keep their order. Needed for the Python functions among its agents,
        unless `agents` has them.
    inputs
        Values of template names, over those the run has.
    journal
        Where the run is: a path or a journal; by default ``.cm_notebook/journal.db`` below the working folder.
    agents
        Python functions among its agents, and others to take in place of those that it has.
    until
        Id of a step: pause when it is done.
    rewind
        Id of a step: go back to before it and wait there, as :meth:`Run.rewind`; so a completed run can go on too.
    reason
        Why it goes on, for those who look; by default, of a run that had not ended, that its process had.
    max_cost_usd, max_tokens, max_turns
        How much it may use in all (US dollars, tokens, prompts sent), what it has used included; by default as before.
    **options
        ``engine, on_gate, on_waiting, tape, record, loop`` of :meth:`Run.start`; of a run that is driven here already,
        ``on_gate`` and ``on_waiting`` alone. What is recorded is the whole run, not only what comes.

    Returns
    -------
    Run
        It goes on already, or waits at the gate where it stood; of a run that is driven here, the very object.

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

    def call(*more: str) -> str:
        return call_of("cm.resume", run_id, run._journal, *more)

    if run._driver.driving:
        for name in ("engine", "tape", "record", "loop"):
            if options.get(name) is not None:
                raise WorkflowError(
                    f"{name}= cannot be changed while run {run_id!r} is driven here. Stop it first: run.stop(), then "
                    f"{call(f'{name}=…')}."
                )
        answers = {name: options[name] for name in ("on_gate", "on_waiting") if name in options}
        back: dict[str, Any] = {"again": rewind, "afresh": True} if rewind is not None else {"until": until}
        return run.go_on(workflow, inputs, limits=limits, **answers, **back)
    with run.reading() as state:
        if rewind is not None:
            rewind = meaning.check_rewind(state, rewind).id
        elif state.ended == "completed":
            earlier = call("rewind='STEP'")
            raise TransitionError(
                f"run {run_id!r} is completed. Start a new one, add a step: run.add(…), or go back to one: {earlier}."
            )
        given = _given(state, agents, workflow, call())
        _check_steps(state, workflow, until)
    run._prepare(given.values(), **options)
    run._driver.drive()

    different: list[AnyEvent] = []

    def propose() -> list[AnyEvent]:
        why = reason or ("" if run._driver.state.ended is not None else "the process that drove it had ended")
        cut = meaning.cut_all(run._driver.state, why)
        changes = [event for event in different if not isinstance(event, TurnCutShort)]  # it was not the edit that cut
        back = [Rewound(to=rewind, later=True, afresh=True)] if rewind is not None else []
        return [RunResumed(reason=why, until=until), *cut, *changes, *permitting(limits), *back]

    try:
        run._driver.read_on()  # what the one who drove it before wrote until the last moment
        different = run._revision(workflow, inputs)
        run._driver.propose(propose)
    except BaseException:
        run._driver.let_go()
        raise
    return run._become_current()


@contextlib.contextmanager
def both(one: Run, other: Run) -> Iterator[tuple[RunState, RunState]]:
    """The states of two runs, which do not change inside the ``with`` block; always locked in the same order."""
    first, second = sorted((one, other), key=lambda run: run.id)
    with first.reading(), second.reading():
        yield one._driver.state, other._driver.state


def _new_id() -> str:
    return f"r-{secrets.token_hex(4)}"


def _check_steps(state: RunState, workflow: Workflow | None, *steps: str | None) -> None:
    """Refuse what is a step neither of the run nor of the definition that it goes on by."""
    known = [item.id for item in workflow.executable] if workflow is not None else []
    for step in steps:
        if step is not None and step not in known:
            state.find(step)


def _given(state: RunState, agents: Iterable[Agent], workflow: Workflow | None, call: str) -> dict[str, Agent]:
    """The agents that are given, by id; refused when the run needs one that its journal cannot keep."""
    if workflow is not None:
        edits.check_order(state, workflow)  # an agent may be missing as its step is
    given = {**edits.by_id(agents), **edits.by_id(workflow.agents if workflow is not None else ())}
    for agent in state.agents.values() if workflow is None else workflow.agents:
        missing = (given.get(agent.id) or agent).missing
        if missing is not None:
            raise WorkflowError(
                f"agent {agent.id!r} {missing}, which a journal cannot keep. "
                f"Pass it: {call[:-1]}, agents=[{agent.id.replace('-', '_')}]), or workflow=."
            )
    return given
