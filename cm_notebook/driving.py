"""The loop that drives a run: it acts on what ``state.py`` says.

Strategy: a run has an inbox and one synchronous pass. Turns that ended, decisions, other threads: all only put a
*proposal* into the inbox. The pass, on the run's own loop, does the rest without interruption:

    take the journal's write lock, with what other processes recorded     ┐
    → proposals become events, checked and applied one by one (record)    │ one transaction,
    → ask next_actions, record what it says, until there is nothing to do │ one fsync
    → commit                                                              ┘
    → show the events, give them into the run's hands, answer the proposers

``record`` is the only place where an event comes into being. What was there when the pass ran shares its transaction,
so the end of one step and the start of the next are one write. Nothing is shown or started before it is on disk.

While another program holds the journal the inbox stays as it is and the pass is tried again. When the journal cannot be
written at all, the run is given up here (``_lose``): who waits is told, and a resume finds what is on disk.

Who does not drive a run reads its state on from the journal whenever somebody looks (``catch_up``).

Nothing here knows how a turn is done or a gate is answered: what an event comes to outside is left to ``Hands``.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import gc
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, cast

from . import state as meaning
from .errors import (
    CodeMachineError,
    EngineError,
    GatePending,
    JournalBusy,
    JournalError,
    RunFailed,
    TransitionError,
)
from .events import (
    AnyEvent,
    Gate,
    RunFinished,
    RunResumed,
    TurnCutShort,
    TurnFailed,
    TurnFinished,
    TurnStarted,
    place,
    without_keys,
)
from .feed import Feed
from .journal import AnyJournal, resuming
from .loops import SLICE_S, Pulse, quietly, running_loop
from .presence import nobody_there
from .prompts import digest, text_of
from .runstate import Record, RunState, StartTurn, StepState
from .state import apply, next_actions
from .turns import LiveTurn
from .workflow import Step

Proposal = Callable[[], Iterable[AnyEvent]]
Start = tuple[StepState, TurnStarted, str]
"""A turn that is recorded and can begin: its step, the event, its prompt as text."""

POLL_S = 0.25
"""How often the journal is looked at for what another process has decided."""
MANY = 10_000
"""So many new objects make a collection of the young ones dear."""
FEW = 64
"""So many turns can begin at once without being many objects."""
_AS_IT_IS = contextlib.nullcontext()
PATIENCE_S = 60.0
"""How long a journal that another program holds is tried again before the run is given up."""

driven: dict[tuple[str, str], Driver] = {}
"""Those that drive a run in this process, by its journal and id."""


class Hands(NamedTuple):
    """What the loop leaves to the run: who does a step, and what events come to outside the journal."""

    run: Any
    engine_name: Callable[[Step], str]
    follow: Callable[[list[AnyEvent], list[Start]], None]
    drop: Callable[[], None]


class Driver:
    """What drives one run: its state, its inbox, and the one pass. Every method may be called from any thread.

    Attributes
    ----------
    state
        As far as it is known here; :meth:`reading` has it up to date.
    turns
        Those under way, by path.
    unheard
        The gates that nobody can answer here.
    rest, rested
        A future that is done when the run goes no further by itself, and whether it is.
    since
        The first event (``seq``) of the pass that is made, or was made last.
    hands
        Given before it is driven; who only reads a run needs none.
    """

    hands: Hands

    def __init__(self, run_id: str, journal: AnyJournal) -> None:
        self.id = run_id
        self.journal = journal
        self.state = RunState()
        self.since = 0
        self.error: BaseException | None = None
        self.lock = threading.RLock()
        self.feeds: list[Feed] = []
        self.turns: dict[str, LiveTurn] = {}
        self.unheard: dict[str, Gate] = {}
        self.rest: concurrent.futures.Future[None] = concurrent.futures.Future()
        self.rested = False
        self.loop: asyncio.AbstractEventLoop | None = None
        self.hosted = False
        self.driving = False
        self.lost: BaseException | None = None
        self._inbox: deque[tuple[Proposal, concurrent.futures.Future[None] | None]] = deque()
        self._batch: list[AnyEvent] = []
        self._scheduled = False
        self._busy_since: float | None = None
        self._lookout: asyncio.TimerHandle | None = None
        self._alarm: asyncio.TimerHandle | None = None

    # -- recording -----------------------------------------------------------------------------------------------------

    def propose(self, proposal: Proposal, *, wait: bool = True, drive: bool = False) -> None:
        """Have `proposal` made into events; with `wait`, returns when they are on disk, or raises why not.

        With `drive` the run is driven for it; a run that is just coming to its end stays so.
        """
        self.check_loop()
        reply: concurrent.futures.Future[None] | None = concurrent.futures.Future() if wait else None
        entry = (proposal, reply)
        with self.lock:
            if drive:
                self.drive()
            if reply is None and not self.driving:
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
            pulse = Pulse(self.loop)
            while not reply.done():
                with contextlib.suppress(TimeoutError):
                    reply.exception(timeout=SLICE_S)
                self.check_loop()
                if self.lost is not None and not reply.done():
                    raise self.lost
                if not reply.done() and (held := pulse.held()) is not None:
                    raise CodeMachineError(f"Nothing was changed: {held}")
        except BaseException:
            with self.lock, contextlib.suppress(ValueError):
                self._inbox.remove(entry)  # nobody asks for it any more
            if not self.driving:
                self._busy_since = None
            raise
        reply.result()

    def propose_end(self, proposal: Proposal) -> None:
        """As :meth:`propose`, without waiting, for a turn that ends: on the run's loop, and not in a pass.

        While no other turn is under way, nobody is there to share the transaction with: the pass is made at once.
        """
        with self.lock:
            if not self.driving:
                return  # the run was let go meanwhile
            self._inbox.append((proposal, None))
        if self._scheduled or len(self.turns) > 1:
            self._schedule()
        else:
            self._pass()

    def go_on(self, proposal: Callable[[], list[AnyEvent]]) -> None:
        """As :meth:`propose`, but a run that has ended is resumed for it."""
        if self.loop is None or self.loop.is_closed():
            raise self._not_here()

        lost, driven = self.lost, self.driving

        def propose() -> list[AnyEvent]:
            wanted = proposal()
            ended = self.state.ended
            if lost is not None:
                cut = more(wanted, meaning.cut_all(self.state, str(lost)))
                return [RunResumed(reason=str(lost)), *cut, *wanted]
            return [RunResumed(), *wanted] if ended is not None and (wanted or ended != "completed") else wanted

        try:
            self.propose(propose, drive=True)
        except BaseException:
            with self.lock:  # it was refused, and the run is where it was
                if lost is not None and self.lost is None:
                    self._lose(lost)
                elif not driven and self.rested:
                    self.let_go()
            raise
        if self.state.ended is not None and self.rested:
            self.let_go()  # nothing was wanted

    def send_back(self, proposal: Callable[[], list[AnyEvent]]) -> None:
        """As :meth:`go_on`; a run that is not driven here is told in its journal, for whoever drives it or will."""
        if self.loop is not None and not self.loop.is_closed():
            self.go_on(proposal)
            return

        def propose() -> list[AnyEvent]:
            wanted = proposal()
            return [RunResumed(), *wanted] if self.state.ended is not None else wanted

        self.propose(propose)

    def _is_ours(self) -> bool:
        """Whether a pass may be made on this thread."""
        return not self.driving or self.loop is None or running_loop() is self.loop

    def _schedule(self) -> None:
        if not self._scheduled and self.loop is not None:
            self._scheduled = True
            if running_loop() is self.loop:
                self.loop.call_soon(self._pass)
            else:
                quietly(self.loop, self._pass)

    def _schedule_in(self, delay_s: float) -> None:
        """Have the next pass made by then; there is one alarm, as each pass says anew when it is needed."""
        self._alarm = cast("asyncio.AbstractEventLoop", self.loop).call_later(delay_s, self._pass)

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
        starts: list[Start] = []
        begun = False
        with self.lock:
            batch = self._batch = []
            try:
                if self.lost is not None:
                    self._find_again()
                seen = self.journal.begin(self.id, self.state.seq)
                begun, self._busy_since = True, None
                self.since = self.state.seq + 1
                with _NoCollecting():  # but not while the disk is waited for: others compute meanwhile
                    self._record_due(seen, answers, starts)
                begun = False
                if batch:
                    self.journal.commit(self.id, batch)
                else:
                    self.journal.rollback()
            except BaseException as error:
                if begun:
                    self.journal.rollback()
                elif isinstance(error, JournalBusy) and (delay := self._try_again_in()) is not None:
                    return delay
                self._pass_failed(error, [reply for reply, _refused in answers])
                return 0.0
            finally:
                self._batch = []
            shown = [*seen, *batch] if seen else batch
            if shown:  # before the proposers go on: they may wait for the run next
                self._show(shown)
                self.wait_anew()
        try:
            if self.driving:
                with _NoCollecting() if len(starts) > FEW else _AS_IT_IS:
                    self.hands.follow(shown, starts)
                self._look_out()
                self.come_to_rest()
        finally:  # last, so that who proposed finds the run as it is now
            for reply, refused in answers:
                reply.set_exception(refused) if refused is not None else reply.set_result(None)
        return 0.0

    def _record_due(
        self,
        seen: list[AnyEvent],
        answers: list[tuple[concurrent.futures.Future[None], Exception | None]],
        starts: list[Start],
    ) -> None:
        """Take in what others have recorded, record what is proposed here, and all that follows."""
        for event in seen:
            apply(self.state, event)
        while self._inbox:
            proposal, reply = self._inbox[0]  # it stays there until then, so that its proposer hears of a bug
            refused = self._record_all(proposal)
            if reply is not None:
                answers.append((reply, refused))
            elif refused is not None and not isinstance(refused, CodeMachineError):
                raise refused  # nobody else would hear of it
            self._inbox.popleft()
        if self.driving:
            self._act(starts)

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
        if self.driving:
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
                self.reload()
                for event in self._batch:
                    apply(self.state, event)
            return error
        return None

    def record(self, event: AnyEvent) -> None:
        """Give `event` its place and time, check it, apply it: the only way anything happens in a run.

        It is made durable, and only then shown, at the end of the pass that records it.

        Raises
        ------
        TransitionError    It is not legal now; nothing was changed.
        """
        if type(event) is TurnCutShort and (turn := self.turns.get(event.path)) is not None and turn.used:
            event = event.model_copy(update=turn.used)  # who cut it short does not know
        event, state = without_keys(event), self.state
        place(event, state.seq + 1, max(time.time(), state.at))
        apply(state, event)
        self._batch.append(event)

    def _act(self, starts: list[Start]) -> None:
        """Record all that follows from the state, until only turns and people can go on."""
        progress = True
        while progress:
            progress = False
            later: list[float] = []
            for action in next_actions(self.state, self.hands.engine_name):
                if action.not_before is not None and action.not_before > time.time():
                    later.append(action.not_before)
                elif isinstance(action, Record):
                    self.record(action.event)
                    progress = True
                    if action.not_before is not None:
                        break
                else:
                    start = self._turn_started(action)
                    self.record(start[1])
                    starts.append(start)
                    progress = progress or bool(self.state.outdated)
        if later:
            self._schedule_in(max(0.0, min(later) - time.time()))

    def _turn_started(self, action: StartTurn) -> Start:
        step = action.step
        parts = action.prompt + (action.context or ())
        text = text_of(parts, self.state.texts) if parts else ""
        started = TurnStarted.made(
            step=step.id,
            path=step.path,
            attempt=action.attempt,
            turn=action.turn,
            iteration=step.iteration,
            prompt=action.prompt,
            context=action.context,
            digest=digest(text),
            session_id=action.session_id,
            engine=self.hands.engine_name(step.step),
        )
        return step, started, text

    def _pass_failed(self, error: BaseException, replies: list[concurrent.futures.Future[None]]) -> None:
        """Nothing of this pass was kept: go back to what is on disk, and tell everybody who waits."""
        waiting = [*replies, *(reply for _proposal, reply in self._inbox)]
        self._inbox.clear()
        self.error = error
        try:
            self.reload()
        except Exception:  # it cannot be read either, or there is a bug in reading; who waits is told the first error
            self.state = RunState()
        if self.driving:
            self._lose(error)
        for reply in waiting:
            if reply is not None:
                reply.set_exception(error)

    # -- coming to rest ------------------------------------------------------------------------------------------------

    def _resting(self) -> bool:
        """Whether the run goes no further until somebody does something."""
        state = self.state
        if self.unheard:
            self.unheard = {id: gate for id, gate in self.unheard.items() if id in state.gates}
        if self.unheard and not self._at_work():
            return True  # else others go on beside it
        return state.ended is not None or (state.paused and state.status == "paused")

    def _at_work(self) -> bool:
        """Whether something goes on by itself: a turn that waits for nobody, or one that is to be tried again."""
        state = self.state
        if state.held is None:
            return state.at_work or bool(state.backing_off)
        turns = ((step, self.turns.get(path)) for path, step in state.running.items())
        return any(step.status == "running" and not (turn is not None and turn.held) for step, turn in turns)

    def come_to_rest(self) -> None:
        """Tell those who wait that the run goes no further by itself, and how it ended."""
        with self.lock:
            # What is in the inbox may go on with it; the pass that takes it comes here again.
            if not self._inbox and self._resting() and not self.rested:
                self._rest_now(self.state)

    def _rest_now(self, state: RunState) -> None:
        if state.ended is not None:
            self.let_go()
        self.rested = True
        if state.ended == "failed":
            failed = RunFailed(state.reason or f"run {self.id!r} failed.", run_id=self.id)
            failed.__cause__ = self.error
            as_itself = self.error is not None and not isinstance(self.error, EngineError)
            self.rest.set_exception(self.error if as_itself and self.error is not None else failed)
        elif self.unheard and state.ended is None:
            gate = next(iter(self.unheard.values()))
            self.rest.set_exception(GatePending(nobody_there(gate), gate=gate, run=self.hands.run))
        else:
            self.rest.set_result(None)

    def _look_out(self) -> None:
        """Look now and then whether another process has decided something."""
        if self._lookout is None and self.journal.durable and self.driving:
            self._lookout = cast("asyncio.AbstractEventLoop", self.loop).call_later(POLL_S, self._look)

    def _look(self) -> None:
        self._lookout = None
        with contextlib.suppress(JournalError):  # it is looked at again, and every pass says what is wrong
            if self.driving and self.journal.changed(self.id):
                self._pass()
        self._look_out()

    # -- what is on disk -----------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def reading(self) -> Iterator[RunState]:
        """The run's state, which does not change inside the ``with`` block."""
        with self.lock:
            self.catch_up()
            yield self.state

    def catch_up(self) -> None:
        """Read what others have recorded, where no pass of this run does it."""
        self.check_loop()
        if self.driving:
            return
        with self.lock, _NoCollecting():
            if self.lost is not None:
                with contextlib.suppress(JournalError):
                    if self.journal.events(self.id, self.state.seq):
                        self._find_again()  # somebody else goes on with it
                return
            known = self.state.seq
            self._show(self.read_on())
            if self.state.seq > known:
                self.wait_anew()
            if self.state.ended is not None:
                self.come_to_rest()

    def read_on(self) -> list[AnyEvent]:
        """Bring the state up to what the journal holds; returns what was new, for those who watch."""
        found = []
        for event in self.journal.read(self.id, self.state.seq):
            try:
                apply(self.state, event)
            except CodeMachineError as error:
                raise JournalError(
                    f"run {self.id!r} in {self.journal.path} does not make sense at event {event.seq}: {error}",
                    path=self.journal.path,
                ) from error
            if self.feeds:  # else it need not be kept: a long run is read in half the memory
                found.append(event)
        return found

    def reload(self) -> None:
        """Make the state anew from the journal."""
        self.state = RunState()
        with _NoCollecting():
            self.read_on()

    def _show(self, events: list[AnyEvent]) -> None:
        """Tell those who watch what is on disk now."""
        for feed in self.feeds:
            for event in events:
                feed.put(event)

    def wait_anew(self) -> None:
        """The run went on: those who wait from now on wait for what comes."""
        if self.rested:
            self.rest, self.rested = concurrent.futures.Future(), False

    # -- who drives ----------------------------------------------------------------------------------------------------

    def drive(self) -> None:
        """Drive the run from here.

        Raises
        ------
        RunLocked    Another process drives it.
        """
        if not self.driving:
            self.journal.drive(self.id)
            self._find_again()
            self.driving = True
            driven[self.journal.path, self.id] = self

    def let_go(self) -> None:
        """Drive it no more; its journal is free for others."""
        if self.driving:
            self.driving = False
            if self._alarm is not None and self.loop is not None:
                quietly(self.loop, self._alarm.cancel)
                self._alarm = None
            if driven.get((self.journal.path, self.id)) is self:
                del driven[self.journal.path, self.id]
            self.journal.release(self.id)

    def _lose(self, error: BaseException) -> None:
        """Give the run up here, as it cannot be driven: what runs is cancelled, and everybody who waits is told.

        The state says so too, without a record: on disk it is as if this process had died.
        """
        turns = list(self.turns.values())
        self.turns.clear()
        self.hands.drop()
        if self.loop is not None:
            for turn in turns:
                quietly(self.loop, turn.cancel)
        reason = str(error) or type(error).__name__
        if self.state.seq:  # it could be read
            cut = meaning.cut_all(self.state, reason)
            events: list[AnyEvent] = [*cut, RunFinished(status="failed", reason=reason)]
            for event in events:
                place(event, self.state.seq, max(time.time(), self.state.at))
                apply(self.state, event)
        self.error = self.lost = error
        self.let_go()
        self.wait_anew()
        self.rested = True
        self.rest.set_exception(error)
        for feed in self.feeds:
            feed.wake()

    def _find_again(self) -> None:
        """After :meth:`_lose`: the state as it is on disk."""
        if self.lost is not None:
            self.reload()
            self.lost = None

    # -- who waits -----------------------------------------------------------------------------------------------------

    def over(self) -> bool:
        """Whether nothing more comes by itself; what came before is in the feeds."""
        self.check_loop()
        if self.driving:
            return self.rested
        alone = not self.journal.driven(self.id)  # asked first: what its driver wrote last is read next
        self.catch_up()
        return alone or self._resting()

    def check_driven(self) -> None:
        """Refuse to wait for what would never come.

        Raises
        ------
        TransitionError    Nobody drives the run here, or its loop does not run.
        """
        self.catch_up()
        with self.lock:
            going_on = self.driving or self.rested
        if not going_on:
            raise self._not_here()
        if not self.rested:
            self._check_turning()

    def _not_here(self) -> TransitionError:
        if self.journal.driven(self.id):
            return TransitionError(
                f"run {self.id!r} is driven elsewhere, by another process or by the run that cm.resume returned: ask "
                "that one. Here it can be read and decided."
            )
        return TransitionError(f"run {self.id!r} is not driven here. Go on with it: {self.resuming()}.")

    def resuming(self) -> str:
        """What to type to go on with it; one in memory goes on here or nowhere."""
        here = not self.journal.durable and self.loop is not None and not self.loop.is_closed()
        return "run.go_on()" if here else resuming(self.id, self.journal)

    def check_loop(self) -> None:
        """A run whose loop was closed is driven no more."""
        loop = self.loop
        if loop is None or not loop.is_closed():
            return
        with self.lock:
            if self.driving:
                self._lose(
                    CodeMachineError(
                        f"the event loop on which run {self.id!r} was driven has been closed. "
                        f"Go on with it on another: {self.resuming()}."
                    )
                )

    def _check_turning(self) -> None:
        """Refuse to wait for a loop that nobody runs."""
        loop = self.loop
        if self.driving and self.hosted and loop is not None and not loop.is_running():
            raise TransitionError(
                f"run {self.id!r} is driven on an event loop of yours that does not run now, so nothing would come of "
                "it. Run that loop, or start runs without loop='kernel'."
            )


def driven_here(journal: AnyJournal, run_id: str) -> Driver | None:
    """What drives that run in this process, if anything does."""
    driver = driven.get((journal.path, run_id))
    if driver is not None:
        driver.check_loop()
    return driver if driver is not None and driver.driving else None


def more(have: Iterable[AnyEvent], cut: Iterable[TurnCutShort]) -> list[TurnCutShort]:
    """Those of `cut` whose turns do not end by what is in `have` already."""
    known = {event.path for event in have if isinstance(event, (TurnCutShort, TurnFinished, TurnFailed))}
    return [event for event in cut if event.path not in known]


class _NoCollecting:
    """Keep the garbage collector from walking again and again what is built of objects that all stay: state and turns.

    Many of them count as old at the end: else the next collection, which is to be of young ones, would walk them all.
    """

    __slots__ = ("_on",)

    def __enter__(self) -> None:
        self._on = gc.isenabled()
        gc.disable()

    def __exit__(self, *_error: object) -> None:
        if not self._on:
            return
        if gc.get_count()[0] > MANY:
            if gc.get_freeze_count():  # the host's, or Python 3.12's own, stay so; the young are walked this once
                gc.collect(1)
            else:
                gc.freeze()
                gc.unfreeze()
        gc.enable()
