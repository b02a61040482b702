"""The files of a run: what its turns find in the workspace and what they leave there, as events.

Strategy: ``begin`` and ``end`` stand around the work of a turn, in its own coroutine. A quick look that finds the
folder empty, or as it was, is all that most turns cost, and one that begins by the end of another need not look again.
git works on a thread, one thing at a time. What is to be taken back (``StepState.restore``) is taken back by ``begin``,
after what is there has been kept. ``end`` gives its events to be recorded with the end of the turn: no gate is open and
no next step at work before they are.

The members of a parallel step begin and end for it: the first of them keeps the files, and whoever ends when no other
one is at work or to come says what they have changed together. Those that a turn calls are part of that turn.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import secrets
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from .driving import Driver
from .errors import EngineError
from .events import (
    NO_FILES,
    AnyEvent,
    SnapshotFailed,
    SnapshotTaken,
    TurnFailed,
    TurnFinished,
    WorkspaceRestored,
)
from .journal import OWN_FOLDER, AnyJournal
from .runstate import StepState
from .turns import LiveTurn
from .workflow import Parallel, sound
from .workspace import NoGit, SnapshotError, Snapshots

MOST_CHANGES = 1_000
"""Changed files of an attempt that are named; the others are counted."""
LONG_S = 1.0
"""After so long a person is told what is waited for."""
STORE = "snapshots.git"
"""The repository of snapshots, beside the journal."""


class Files:
    """The workspace of one run.

    Parameters
    ----------
    driver
        Drives the run.
    folder
        Makes the folder and returns it.
    """

    def __init__(self, driver: Driver, folder: Callable[[], Path]) -> None:
        self._driver, self._folder = driver, folder
        self._one = asyncio.Lock()
        self._begun: tuple[tuple[str, int, int], str | None] | None = None
        """The last turn that has begun, and the snapshot that it began with."""
        self._left: tuple[AnyEvent, str] | None = None
        """The end of a turn that has left the files as they were, and the snapshot that they are as in."""
        self._made: Snapshots | None = None
        self._besides: list[Path] = []

    def leave_out(self, path: Path) -> None:
        """Have no snapshot hold `path`, which the run itself writes: Reject would take it back, too."""
        self._besides.append(path)
        self._made = None

    def snapshots(self) -> Snapshots:
        """Those of this run's workspace."""
        if self._made is None:
            hands = getattr(self._driver, "hands", None)  # who only reads a run has none
            journal, notebook = self._driver.journal, hands.run.notebook if hands is not None else None
            store = store_of(journal)
            left_out = [*_left_out(journal, store, notebook), *self._besides]
            self._made = Snapshots(self._folder(), store, left_out)
        return self._made

    def _whose(self, turn: LiveTurn) -> tuple[StepState, tuple[str, int, int]] | None:
        """The step whose files those of `turn` are, and which of its turns it is; ``None``: it is part of another."""
        started = turn.started
        step = self._driver.state.find(started.path)
        if not step.caller:
            return step, (started.path, started.attempt, started.turn)
        caller = self._driver.state.find(step.caller)
        return (caller, (caller.path, caller.attempt, 0)) if isinstance(caller.step, Parallel) else None

    def _more(self, turn: LiveTurn, step: StepState) -> bool:
        """Whether others of a parallel `step` are at work or to come, now that `turn` of one of its members ends."""
        call = self._driver.state.calls.get(step.path)
        if call is None or turn.started.path == step.path:
            return False
        others = (one for path, one in self._driver.turns.items() if path.rpartition("/")[0] == step.path)
        to_come = call.next < len(call.groups[call.group]) or call.again or self._driver.state.lines[1]
        return bool(to_come) or any(not one.over for one in others)

    # -- around a turn -------------------------------------------------------------------------------------------------

    async def begin(self, turn: LiveTurn, write: Callable[[str], None]) -> None:
        """Keep the files as `turn` finds them; before that, take back what is to be taken back.

        Parameters
        ----------
        write
            Gets a line for who watches, if it takes long.

        Raises
        ------
        EngineError    They cannot be taken back, or there can be no workspace.
        """
        whose = self._whose(turn)
        if whose is None:
            return
        step, key = whose
        if not self._one.locked() and self._has_begun(turn, step, key):
            return
        async with self._one:
            if self._has_begun(turn, step, key):
                return
            snapshots, state = self.snapshots(), self._driver.state
            try:
                looked = snapshots.unchanged()
                tree = looked if looked is not None else await self._told(write, snapshots.take)
                if step.restore is not None:
                    tree = await self._restore(turn, write, step, tree)
                elif tree != state.tree or tree != NO_FILES:
                    self._record(turn, [self._taken(step, "before", tree)])
            except (NoGit, SnapshotError) as error:
                if step.restore is not None:
                    raise EngineError(
                        f"{step.path}: the files could not be brought back to what they were: {_words(error)}"
                    ) from error
                self._record(turn, self._failed(step, error))
                self._begun = key, None
            else:
                self._begun = key, tree

    def _has_begun(self, turn: LiveTurn, step: StepState, key: tuple[str, int, int]) -> bool:
        """Whether nothing is to be kept or taken back: `turn` finds a folder without a file, as is known."""
        if self._begun is not None and self._begun[0] == key:
            return True  # it is tried again, or a sibling has done it
        if self._driver.state.tree != NO_FILES or step.restore is not None:
            return False
        if self._left is not None and self._left[0].seq >= turn.since:  # that end has begun this one
            empty = self._left[1] == NO_FILES
        else:
            empty = self.snapshots().unchanged() == NO_FILES
        if empty:
            self._begun = key, NO_FILES
        return empty

    async def _told(self, write: Callable[[str], None], work: Callable[..., Any], *args: Any) -> Any:
        """What `work` returns, on a thread; if it takes long, a line says so, as a block of code as those of tools."""
        working = asyncio.ensure_future(asyncio.to_thread(work, *args))
        try:
            done, _ = await asyncio.wait({working}, timeout=LONG_S)
            if not done:
                many = await asyncio.to_thread(lambda: sum(len(names) for _, _, names in os.walk(self._folder())))
                write(f"\n\n    Taking a snapshot of the workspace: {many:,} files …\n\n")
            return await working
        finally:
            working.cancel()

    async def _restore(self, turn: LiveTurn, write: Callable[[str], None], step: StepState, found: str) -> str:
        """Take back what the attempts before have done; what was `found` and is in no snapshot yet is kept."""
        snapshots, known, wanted = self.snapshots(), self._driver.state.tree, step.restore or NO_FILES
        if found != known:
            total = len(await asyncio.to_thread(snapshots.changes, known, found))
            self._record(turn, [self._taken(step, "kept", found, total=total)])
        await self._told(write, snapshots.restore, wanted)
        self._record(turn, [WorkspaceRestored(step=step.id, path=step.path, attempt=step.attempt, tree=wanted)])
        return wanted

    async def end(self, turn: LiveTurn, ending: TurnFinished | TurnFailed) -> list[AnyEvent]:
        """What `turn` has changed, to be recorded before its `ending`."""
        whose = self._whose(turn)
        if whose is None or (isinstance(ending, TurnFailed) and ending.retry_in_s is not None):
            return []
        step, key = whose
        if not self._one.locked() and self._has_changed(turn, step, key, ending) is None:
            return []
        async with self._one:
            if (known := self._has_changed(turn, step, key, ending)) is None:
                return []
            try:
                return await asyncio.to_thread(self._changed, step, *known)
            except (NoGit, SnapshotError) as error:
                return self._failed(step, error)

    def _has_changed(
        self, turn: LiveTurn, step: StepState, key: tuple[str, int, int], ending: AnyEvent
    ) -> tuple[str | None, str | None, str] | None:
        """What the turn is to be compared with, if it may have changed anything: see :meth:`_changed`."""
        last = step.last
        if last is None or self._begun is None or self._begun[0] != key or self._more(turn, step):
            return None  # it has not begun, or goes on
        known = self._driver.state.tree
        before = last.before if last.before is not None else self._begun[1]
        said = last.after if last.after is not None else before
        found = self.snapshots().unchanged()
        if found is not None and found == said == known:
            self._left = ending, found
            return None
        return before, said, known

    def _changed(self, step: StepState, before: str | None, said: str | None, known: str) -> list[AnyEvent]:
        """What is other than `before`, unless that is `said` and `known` already. This blocks."""
        snapshots = self.snapshots()
        tree = snapshots.take()
        if tree == said == known:
            return []
        changes = snapshots.changes(before, tree) if before is not None else []
        diff = snapshots.diff(before, tree) if before is not None else ""
        shown = [_sound(change) for change in changes[:MOST_CHANGES]]
        about = {"before": before, "changes": shown, "total": len(changes), "diff": sound(diff)}
        return [self._taken(step, "after", tree, **about)]

    def bring_back(self, tree: str) -> str:
        """Bring the files to that snapshot; returns the one of what was there. This blocks.

        Raises
        ------
        NoGit, SnapshotError    It cannot be done.
        """
        snapshots = self.snapshots()
        found = snapshots.take()
        snapshots.restore(tree)
        return found

    # -- events --------------------------------------------------------------------------------------------------------

    def _record(self, turn: LiveTurn, events: Iterable[AnyEvent]) -> None:
        """Write them down, unless the turn was cut short meanwhile."""
        found = list(events)
        if found:
            turns = self._driver.turns
            self._driver.propose(lambda: found if turns.get(turn.started.path) is turn else [])

    def _taken(self, step: StepState, when: str, tree: str, **about: Any) -> SnapshotTaken:
        about |= {"step": step.id, "path": step.path, "attempt": step.attempt, "when": when, "tree": tree}
        return SnapshotTaken(**about, unread=sound(self.snapshots().skipped))

    def _failed(self, step: StepState, error: Exception) -> list[AnyEvent]:
        lasting = isinstance(error, NoGit)
        if lasting and self._driver.state.unkept is not None:
            return []  # once is enough
        about = {"step": step.id, "path": step.path, "attempt": step.attempt}
        return [SnapshotFailed(**about, reason=_words(error), lasting=lasting)]


def _words(error: Exception) -> str:
    return str(sound(str(error)))


def _sound(change: Any) -> Any:
    """The change with names that can be kept."""
    return dataclasses.replace(change, path=sound(change.path), old_path=sound(change.old_path))


# -- where they are kept -----------------------------------------------------------------------------------------------

_stores: weakref.WeakKeyDictionary[Any, Path] = weakref.WeakKeyDictionary()


def store_of(journal: AnyJournal) -> Path:
    """The repository of snapshots: beside the journal; of one in memory a folder that goes when it does."""
    if journal.durable:
        return Path(journal.path).parent / STORE
    if journal not in _stores:
        # a name that nobody can know: it is made when there is something to keep
        store = _stores[journal] = Path(tempfile.gettempdir(), f"cm-notebook-{secrets.token_hex(16)}.git")
        weakref.finalize(journal, shutil.rmtree, store, ignore_errors=True)
    return _stores[journal]


def _left_out(journal: AnyJournal, store: Path, notebook: str | None) -> list[Path]:
    """What a workspace may hold that is no work of an agent: what we write ourselves, and the notebook that runs.

    JupyterLab writes that at any time, and would find it changed on disk when it is restored.
    """
    found = [store.parent] if store.parent.name == OWN_FOLDER else [store]
    if journal.durable:
        found += [Path(f"{journal.path}{end}") for end in ("", "-wal", "-shm", "-journal", "-locks")]
    found.append(Path(OWN_FOLDER).absolute())
    for name in {notebook, os.environ.get("JPY_SESSION_NAME")} - {None, ""}:
        path = Path(str(name))
        if path.suffix == ".ipynb":
            found += [path, path.parent / ".ipynb_checkpoints"]
    return found
