"""Where events are kept: append-only, in order, and on disk before anyone sees them.

Strategy: one SQLite file in WAL mode with ``synchronous=FULL``; all that one pass of a run records is one transaction,
so one fsync. SQLite appends it to a log (``-wal``), and an fsync takes half as long where a file need not grow: the log
is made long enough at once, and soon written anew from its beginning. An event is a row with one integer key,
``run number << 32 | seq``. Events are all there is: what else one wants to know about a run is read out of them.

A *fork* begins with the events of another run, up to one of them (``parent``, ``shared``), and its own go on counting
from there. Nothing is copied: it is read in *stretches*, first that of its parent's, which may be a fork itself.

Several processes may write. Whoever wants to takes the write lock first (``begin``), and gets what others have
recorded meanwhile; so the check "is this legal now?" is always made on all there is. While another program writes,
``begin`` says so at once (``JournalBusy``) and holds nothing: when to try again is the caller's. A file that was
deleted or replaced could still be written, but nobody would find it: ``begin`` sees that too. Who *drives* a run
holds a lock on a file of its own, which the operating system lets go of when the process dies, however it dies.

``MemoryJournal`` is the same without a disk: a list.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import shlex
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from . import events as facts
from .config import setting
from .errors import CodeMachineError, JournalBusy, JournalError, RunLocked, did_you_mean, typed
from .events import AnyEvent

if TYPE_CHECKING:
    from filelock import BaseFileLock

MAGIC = b"SQLite format 3\0"
_HEADER = ((16, 18), (28, 32), (24, 28), (92, 96))
APPLICATION_ID = 0x434D4E42  # "CMNB", so that another program's database is not taken for a journal
MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        "CREATE TABLE runs (no INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, name TEXT NOT NULL, notebook TEXT,"
        " created_at REAL NOT NULL)",
        "CREATE TABLE events (id INTEGER PRIMARY KEY, at REAL NOT NULL, type TEXT NOT NULL, body TEXT NOT NULL)",
    ),
    (  # forks: the number of the run that it begins with, and up to which event
        "ALTER TABLE runs ADD COLUMN parent INTEGER",
        "ALTER TABLE runs ADD COLUMN shared INTEGER",
    ),
)
"""The statements that lead from version n to n + 1; a journal of version n has had the first n."""

_RUNS = (
    "SELECT id, name, notebook, created_at FROM runs WHERE EXISTS"
    " (SELECT 1 FROM events WHERE events.id > no << 32 AND events.id < (no + 1) << 32) ORDER BY no DESC"
)
_INSERT = "INSERT INTO runs (id, name, notebook, created_at, parent, shared) VALUES (?, ?, ?, ?, ?, ?)"
_SELECT = "SELECT id, at, type, body FROM events WHERE id > ? AND id < ? ORDER BY id"

MOVE_IT = "Move it away, and the next run makes a new one; the runs in it cannot be read."
OWN_FOLDER = ".cm_notebook"
BUSY_S = 5.0
"""Seconds to wait for another process while a journal is opened or read."""
BEGIN_S = 0.05
"""Seconds in which ``begin`` waits for another process that is just finishing its transaction."""
LOG_PAGES = 256
"""With so many pages in the log they are brought over into the file, and the log is written anew from its beginning.
SQLite's own 1,000 are those of 500 steps, each of which would have to wait for a file that grows."""
ROOM = 1 << 18
"""Bytes that the log has at least while a run is driven: those of the first thirty steps."""
LEASE_S = 0.5
"""Seconds in which the lock of a run may be held by one who only asks whether the run is driven."""


class RunInfo(NamedTuple):
    """What identifies a run. ``created_at`` is Unix time in seconds."""

    id: str
    name: str
    notebook: str | None
    created_at: float


class _Stretch(NamedTuple):
    """Events of one run in the file that belong to a run: those after ``first`` up to ``last``."""

    number: int
    first: int
    last: int


_WHOLE = (1 << 32) - 1
"""The last event there can be."""


def begun_like(ids: Iterable[str], word: str) -> list[str]:
    """The runs that are meant: the one of that id, else those whose ids begin so; what all ids begin with may go."""
    known = [*ids]
    return [word] if word in known else [id for id in known if word and id.startswith((word, f"r-{word}"))]


class MemoryJournal:
    """A journal that ends with the process."""

    path = ":memory:"
    durable = False

    def __init__(self) -> None:
        self._runs: dict[str, tuple[RunInfo, list[AnyEvent]]] = {}
        self._parents: dict[str, tuple[str, int]] = {}
        self._leases: set[str] = set()

    def create(self, run_id: str, name: str, notebook: str | None, parent: tuple[str, int] | None = None) -> None:
        """Make room for a new run, which is there with its first events; see :meth:`Journal.create`."""
        self._runs[run_id] = (RunInfo(run_id, name, notebook, time.time()), [])
        if parent is not None:
            self._parents[run_id] = parent

    def begin(self, run_id: str, after: int) -> list[AnyEvent]:
        """Start to write; returns the events after `after` that others have recorded."""
        own = self._runs[run_id][1]
        return [] if own and own[-1].seq == after else self.events(run_id, after)

    def commit(self, run_id: str, events: Sequence[AnyEvent]) -> None:
        """Keep `events`, whose ``seq`` follow what is there."""
        self._runs[run_id][1].extend(events)

    def rollback(self) -> None:
        """Write nothing after all."""

    def changed(self, run_id: str) -> bool:
        """Whether somebody else may have written."""
        return False

    def read(self, run_id: str, after: int = 0) -> Iterator[AnyEvent]:
        """The events of a run one by one."""
        return iter(self.events(run_id, after))

    def events(self, run_id: str, after: int = 0) -> list[AnyEvent]:
        """The events of a run, from ``seq`` `after` + 1 on."""
        if run_id not in self._runs:
            raise JournalError(
                f"there is no run {run_id!r}. {did_you_mean(run_id, self._runs, 'Runs')}", path=self.path
            )
        found: list[AnyEvent] = []
        last: int | None = None
        while True:  # its own, and before them those of the run that it is a fork of
            own, (parent, shared) = self._runs[run_id][1], self._parents.get(run_id, (None, 0))
            found[:0] = own[max(0, after - shared) : None if last is None else max(0, last - shared)]
            if parent is None or after >= shared:
                return found
            run_id, last = parent, shared if last is None else min(last, shared)

    def runs(self) -> list[RunInfo]:
        """All runs, newest first."""
        return [info for info, events in reversed(self._runs.values()) if events]

    def drive(self, run_id: str) -> None:
        """Become the one who drives this run."""
        if run_id in self._leases:
            raise RunLocked(f"run {run_id!r} is driven already.", path=self.path)
        self._leases.add(run_id)

    def driven(self, run_id: str) -> bool:
        """Whether somebody drives this run now."""
        return run_id in self._leases

    def release(self, run_id: str) -> None:
        """Drive it no more."""
        self._leases.discard(run_id)


class _Translated:
    """What SQLite and the file system raise in the block, as a ``JournalError``."""

    __slots__ = ("path",)

    def __init__(self, path: str) -> None:
        self.path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None:
            return
        if isinstance(error, sqlite3.Error):
            made = JournalBusy if _is_busy(error) else JournalError
            raise made(_explain(self.path, error), path=self.path) from error
        if isinstance(error, OSError):
            problem = f"the journal {self.path} cannot be opened: {error.strerror or error}."
            raise JournalError(problem, path=self.path) from error


class Journal:
    """A journal in a file.

    Parameters
    ----------
    path
        Made, readable by its owner only, when there is none. What is there and cannot be used is never replaced.

    Raises
    ------
    JournalError    The file is no journal, is damaged, read-only, locked or of a newer version.
    """

    durable = True

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.path.realpath(path)  # one lock a file, by whatever name
        self._write = threading.RLock()
        self._read = threading.Lock()
        self._numbers: dict[str, int] = {}
        self._inherited: dict[str, tuple[_Stretch, ...]] = {}
        self._new: dict[str, tuple[RunInfo, tuple[int, int] | None]] = {}
        self._leases: dict[str, BaseFileLock] = {}
        self._seen: dict[str, tuple[int, int]] = {}
        self._inserts: dict[int, str] = {}
        self._translated = _Translated(self.path)
        with self._translated:
            _make(Path(self.path))
            self._check_owner()
            self._file = os.stat(self.path)  # noqa: PTH116 - asked in every pass, and a Path asks four times as slowly
            self._writer = self._connect()
            self._migrate()
            self._writer.execute(f"PRAGMA busy_timeout={round(BEGIN_S * 1000)}")
            self._reader = self._connect()
        self._check_place()

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self.path, timeout=BUSY_S, isolation_level=None, check_same_thread=False)
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=FULL")
            connection.execute(f"PRAGMA wal_autocheckpoint={LOG_PAGES}")
        except BaseException:
            connection.close()
            raise
        return connection

    def close(self) -> None:
        """Let go of the file; what is in it is then in the one file. A journal that is not needed does so by itself."""
        if self._write.acquire(timeout=1):
            try:
                for connection in (getattr(self, "_reader", None), getattr(self, "_writer", None)):
                    if connection is not None:
                        connection.close()
            finally:
                self._write.release()

    def __del__(self) -> None:
        with contextlib.suppress(Exception):
            self.close()

    @property
    def in_place(self) -> bool:
        """Whether the file that is open here is still the one of this name."""
        try:
            return os.path.samestat(self._file, os.stat(self.path))  # noqa: PTH116
        except OSError:
            return False

    def _check_place(self) -> None:
        if not self.in_place:
            raise JournalError(
                f"the journal {self.path} was deleted or replaced while it was in use, so nothing can be recorded in "
                "it any more. Put the file back with those beside it (-wal, -shm) and resume, or start a new run.",
                path=self.path,
            )

    def _check_owner(self) -> None:
        """Leave files of others alone: opening one as a journal would already change it."""
        pending = _is_filled(self.path + "-wal")
        with Path(self.path).open("rb") as file:
            header, size = file.read(100), os.fstat(file.fileno()).st_size
        if len(header) < 100 and header.startswith(MAGIC[: len(header)]):
            raise JournalError(_cut_off(self.path), path=self.path)
        if header.startswith(MAGIC) and int.from_bytes(header[68:72], "big") != APPLICATION_ID:
            raise JournalError(f"{self.path} is a database of another program. Name another file.", path=self.path)
        # SQLite sees a missing page, not a missing byte. What is still in the log need not be in the file yet; and the
        # log is looked at on both sides, as another process may be bringing its pages over just now.
        if size < _size_by(header) and not pending and not _is_filled(self.path + "-wal"):
            raise JournalError(_cut_off(self.path), path=self.path)

    def _migrate(self) -> None:
        execute = self._writer.execute
        (version,) = execute("PRAGMA user_version").fetchone()
        if version == 0:  # a journal is made whole
            raise JournalError(_cut_off(self.path), path=self.path)
        if version > len(MIGRATIONS):
            raise JournalError(
                f"{self.path} was written by a newer version of cm_notebook (format {version}; this one knows "
                f"{len(MIGRATIONS)}). Install the newer version: pip install -U cm-notebook.",
                path=self.path,
            )
        _bring_up(self._writer)
        execute("SELECT no, id, name, notebook, created_at, parent, shared FROM runs LIMIT 1")
        execute("SELECT id, at, type, body FROM events LIMIT 1")

    def create(self, run_id: str, name: str, notebook: str | None, parent: tuple[str, int] | None = None) -> None:
        """Name a new run; it is written together with its first events.

        Parameters
        ----------
        parent
            Of a fork: the run that it begins with, and the last event (``seq``) that they share; its own come after.
        """
        before: tuple[int, int] | None = None
        stretches: tuple[_Stretch, ...] = ()
        if parent is not None:
            before = self._number(parent[0]), parent[1]
            stretches = _cut((*self._inherited[parent[0]], _Stretch(before[0], 0, _WHOLE)), parent[1])
        self._inherited[run_id] = stretches
        self._new[run_id] = RunInfo(run_id, name, notebook, time.time()), before

    def _number(self, run_id: str) -> int:
        """The number of the run, and with it what it inherits."""
        number = self._numbers.get(run_id)
        if number is None:
            select = "SELECT no, parent, shared FROM runs WHERE "
            with self._read, self._translated:
                row = self._reader.execute(f"{select}id = ?", (run_id,)).fetchone()
                line = [row] if row is not None else []
                while line and line[-1][1] is not None:
                    above = self._reader.execute(f"{select}no = ? AND no < ?", (line[-1][1], line[-1][0])).fetchone()
                    if above is None:
                        raise JournalError(
                            f"{self.path} is damaged: the run that {run_id!r} is a fork of is not there.",
                            path=self.path,
                        )
                    line.append(above)
            if row is None:
                known = [info.id for info in self.runs()]
                raise JournalError(
                    f"there is no run {run_id!r} in {self.path}. {did_you_mean(run_id, known, 'Runs')}", path=self.path
                )
            stretches: tuple[_Stretch, ...] = ()
            for (above, _parent, _shared), (_no, _above, shared) in zip(line[:0:-1], line[-2::-1], strict=True):
                stretches = _cut((*stretches, _Stretch(above, 0, _WHOLE)), shared)
            self._inherited[run_id] = stretches
            number = self._numbers[run_id] = int(row[0])
        return number

    def _rows(self, connection: sqlite3.Connection, run_id: str, after: int) -> Iterator[AnyEvent]:
        """The events of a run after `after`, in order."""
        number = self._numbers.get(run_id)  # one that is not written yet has none
        for own, first, last in (*self._inherited[run_id], *([(number, 0, _WHOLE)] if number is not None else ())):
            if last > after:
                base = own << 32
                rows = connection.execute(_SELECT, (base + max(first, after), base + last + 1))
                yield from _read_rows(rows, self.path)

    def begin(self, run_id: str, after: int) -> list[AnyEvent]:
        """Take the write lock; returns the events after `after` that others have recorded meanwhile.

        Ends with :meth:`commit` or :meth:`rollback`; until then nobody else writes.

        Raises
        ------
        JournalBusy     Another program is writing: try again in a moment.
        JournalError    There is no such run, or the journal cannot be used.
        """
        new = self._new.get(run_id)
        if new is None:
            self._number(run_id)
        self._write.acquire()
        try:
            with self._translated:
                self._check_place()
                execute = self._writer.execute
                execute("BEGIN IMMEDIATE")
                version = execute("PRAGMA data_version").fetchone()[0]
                if new is not None:
                    info, before = new
                    added = execute(_INSERT, (*info, *(before or (None, None))))
                    self._numbers[run_id] = int(added.lastrowid or 0)
                    self._seen[run_id] = (version, before[1] if before is not None else 0)
                if self._seen.get(run_id) == (version, after):
                    return []
                found = list(self._rows(self._writer, run_id, after))
                self._seen[run_id] = (version, found[-1].seq if found else after)
                return found
        except BaseException:
            self.rollback()
            raise

    def commit(self, run_id: str, events: Sequence[AnyEvent]) -> None:
        """Make `events` durable and let go of the write lock.

        Raises
        ------
        JournalError    They could not be written (disk full, read-only …); none of them was.
        """
        base = self._number(run_id) << 32
        try:
            with self._translated:
                execute = self._writer.execute
                for start in range(0, len(events), 64):
                    some = events[start : start + 64]
                    values: list[object] = []
                    for event in some:
                        values += (base + event.seq, event.at, event.type, facts.body(event))
                    execute(self._insert(len(some)), values)
                execute("COMMIT")
        except BaseException:
            self.rollback()
            raise
        self._new.pop(run_id, None)
        if events:
            self._seen[run_id] = (self._seen[run_id][0], events[-1].seq)
        self._write.release()

    def _insert(self, count: int) -> str:
        statement = self._inserts.get(count)
        if statement is None:
            rows = ", ".join(["(?, ?, ?, ?)"] * count)
            statement = self._inserts[count] = f"INSERT INTO events (id, at, type, body) VALUES {rows}"
        return statement

    def rollback(self) -> None:
        """Write nothing after all, and let go of the write lock."""
        try:
            with contextlib.suppress(sqlite3.Error):
                if self._writer.in_transaction:
                    self._writer.execute("ROLLBACK")
        finally:
            self._write.release()

    def changed(self, run_id: str) -> bool:
        """Whether another process has written since the run's last ``begin``; costs microseconds."""
        with self._write, self._translated:
            version = self._writer.execute("PRAGMA data_version").fetchone()[0]
        return run_id not in self._seen or bool(version != self._seen[run_id][0])

    def events(self, run_id: str, after: int = 0) -> list[AnyEvent]:
        """The events of a run, from ``seq`` `after` + 1 on.

        Raises
        ------
        JournalError    There is no such run, or a row is damaged; the message names it.
        """
        return list(self.read(run_id, after))

    def read(self, run_id: str, after: int = 0) -> Iterator[AnyEvent]:
        """The events of a run one by one, as :meth:`events`; nobody else reads here until the last one is taken."""
        if run_id not in self._new:
            self._number(run_id)
        with self._read, self._translated:
            yield from self._rows(self._reader, run_id, after)

    def runs(self) -> list[RunInfo]:
        """All runs, newest first."""
        with self._read, self._translated:
            rows = self._reader.execute(_RUNS).fetchall()
        return [RunInfo(*row) for row in rows]

    def drive(self, run_id: str) -> None:
        """Become the one who drives this run, until :meth:`release` or the end of the process.

        Raises
        ------
        RunLocked    Another process does.
        """
        from filelock import Timeout

        with self._translated:
            self._lock_file(run_id).parent.mkdir(mode=0o700, exist_ok=True)
            try:
                self._leases[run_id] = self._lock(run_id, LEASE_S)
            except Timeout:
                raise RunLocked(
                    f"run {run_id!r} is driven by another process or notebook. It can still be read and decided; "
                    "end the other one to drive it here.",
                    path=self.path,
                ) from None
        self._make_room()

    def _make_room(self) -> None:
        """Make the log longer than it is needed now.

        By a large row that is taken back: all of it but a few pages has been written behind the log's end by then.
        """
        execute = self._writer.execute
        with self._write, contextlib.suppress(OSError, sqlite3.Error):  # no room, or somebody writes: it goes without
            if self._writer.in_transaction or os.stat(self.path + "-wal").st_size >= ROOM:  # noqa: PTH116
                return
            (memory,) = execute("PRAGMA cache_size").fetchone()
            execute("PRAGMA cache_size=8")
            try:
                execute("BEGIN IMMEDIATE")
                execute("INSERT INTO events VALUES (-1, 0, '', zeroblob(?))", (ROOM + (1 << 16),))
            finally:
                execute(f"PRAGMA cache_size={memory}")
                execute("ROLLBACK")

    def driven(self, run_id: str) -> bool:
        """Whether somebody, here or in another process, drives this run now."""
        from filelock import Timeout

        if run_id in self._leases:
            return True
        with self._translated:
            if not self._lock_file(run_id).exists():
                return False
            try:
                lock = self._lock(run_id, 0)
            except Timeout:
                return True
            self._unlock(run_id, lock)  # who drove it has died
            return False

    def release(self, run_id: str) -> None:
        """Drive it no more."""
        lock = self._leases.pop(run_id, None)
        if self._new.pop(run_id, None) is not None:  # nothing was ever written
            self._numbers.pop(run_id, None)
            self._inherited.pop(run_id, None)
        with contextlib.suppress(sqlite3.Error), self._write:
            self._writer.execute("PRAGMA wal_checkpoint(PASSIVE)")  # so that a copy of the file alone holds the run
        if lock is not None:
            self._unlock(run_id, lock)

    def _lock_file(self, run_id: str) -> Path:
        return Path(self.path + "-locks", f"{run_id}.lock")

    def _lock(self, run_id: str, timeout_s: float) -> BaseFileLock:
        """The lock of this run. Its file may be removed by who lets go of it just now: then filelock makes it anew."""
        from filelock import FileLock  # only durable runs need it

        lock = FileLock(self._lock_file(run_id), mode=0o600, thread_local=False)
        lock.acquire(timeout=timeout_s, poll_interval=0.02)
        return lock

    def _unlock(self, run_id: str, lock: BaseFileLock) -> None:
        """Remove the file, and only then let go of it: what has the name is never free while somebody drives."""
        with contextlib.suppress(OSError):  # Windows removes no open file; there filelock does it
            self._lock_file(run_id).unlink()
        lock.release()


def _cut(stretches: tuple[_Stretch, ...], last: int) -> tuple[_Stretch, ...]:
    """Of these stretches what lies up to the event `last`; each begins where the one before ends."""
    found: list[_Stretch] = []
    for number, _first, end in stretches:
        first = found[-1].last if found else 0
        if first < last:
            found.append(_Stretch(number, first, min(end, last)))
    return tuple(found)


AnyJournal = Journal | MemoryJournal
_opened: dict[str, Journal] = {}
_opening = threading.Lock()


@atexit.register
def _close_all() -> None:
    for journal in _opened.values():
        journal.close()


def open_journal(where: str | os.PathLike[str] | AnyJournal, *, make: bool = True) -> AnyJournal:
    """The journal at `where`: a path, ``":memory:"``, or a journal as it is. One object a file in this process.

    Raises
    ------
    JournalError    It cannot be used, or there is none and `make` is off.
    """
    if isinstance(where, (Journal, MemoryJournal)):
        return where
    if not isinstance(where, (str, os.PathLike)):
        raise JournalError(f"journal={where!r} is not a file. Name one, or ':memory:', or pass a cm.Journal.")
    name = str(where)
    if name == ":memory:":
        return MemoryJournal()
    if not make and not Path(name).exists():
        raise JournalError(f"there is no journal {name}. Start a run first, or name the right file.", path=name)
    key = f"{os.getpid()}:{os.path.realpath(name)}"
    with _opening:
        found = _opened.get(key)
        if found is None or not found.in_place:
            found = _opened[key] = Journal(name)
        return found


def call_of(what: str, run_id: str, journal: AnyJournal, *options: str) -> str:
    """How to write a call about that run, so that it works as it stands: ``cm.resume('r-1', journal='runs.db')``.

    A journal that is looked into anyway is not named; one in memory has no name.
    """
    where = _named(journal.path)
    return f"{what}({', '.join([repr(run_id), *([f'journal={where}'] if where else []), *options])})"


def resuming(run_id: str, journal: AnyJournal) -> str:
    """What to type to go on with that run, where the reader is."""
    return typed(call_of("cm.resume", run_id, journal), command_of(journal.path, "resume", run_id))


def command_of(path: str, *words: str) -> str:
    """How to type a command about the journal at `path`, so that it works as it stands."""
    return shlex.join(["cm-notebook", *words, *(["--journal", path] if _named(path) else [])])


def _named(path: str) -> str:
    if path == MemoryJournal.path:
        return "…"
    with contextlib.suppress(CodeMachineError):  # what is configured may be no journal at all
        if os.path.realpath(str(setting("journal"))) == path:
            return ""
    return repr(path)


def _read_rows(rows: sqlite3.Cursor, path: str) -> Iterator[AnyEvent]:
    for key, at, type_name, text in rows:
        try:
            yield facts.read(type_name, key & 0xFFFFFFFF, at, text)
        except (ValueError, TypeError) as error:
            line = str(error).splitlines()[0]
            raise JournalError(
                f"{path} is damaged at event {key & 0xFFFFFFFF} ({type_name}): {line}.", path=path
            ) from error


def _bring_up(connection: sqlite3.Connection) -> None:
    """Run the migrations that this file has not had, each with its record in one transaction."""
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    for number in range(version, len(MIGRATIONS)):
        connection.execute("BEGIN IMMEDIATE")
        if connection.execute("PRAGMA user_version").fetchone()[0] == number:  # nobody was faster
            for statement in MIGRATIONS[number]:
                connection.execute(statement)
            connection.execute(f"PRAGMA user_version={number + 1}")
        connection.execute("COMMIT")


def own_folder() -> Path:
    """``.cm_notebook`` below the working folder, where journals and work are kept out of the user's git."""
    folder = Path(OWN_FOLDER)
    folder.mkdir(exist_ok=True)
    ignore = folder / ".gitignore"
    if not ignore.exists():
        ignore.write_text("*\n", encoding="ascii")
    return folder


def _make(path: Path) -> None:
    """Make a new journal whole, under another name first: a crash leaves no half of one."""
    if path.exists():
        if path.is_dir():
            raise JournalError(f"{path} is a folder. Name a file for the journal.", path=str(path))
        if path.stat().st_size == 0:
            raise JournalError(f"{path} is empty: it was cut off, or is no journal. {MOVE_IT}", path=str(path))
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.parent.absolute() == Path(OWN_FOLDER).absolute():
        own_folder()
    draft = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}")
    os.close(os.open(draft, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    try:
        with contextlib.closing(sqlite3.connect(draft)) as connection:
            connection.isolation_level = None
            # here, where nobody else is: of two who change a file to it at the same time, one is refused at once
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute(f"PRAGMA application_id={APPLICATION_ID}")
            _bring_up(connection)
        try:
            os.link(draft, path)
        except FileExistsError:
            pass  # somebody was faster: theirs counts
        except OSError:  # a file system without hard links
            if not path.exists():
                draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def _size_by(header: bytes) -> int:
    """The size in bytes that a database's header says it has; 0 when it does not say.

    The fields are those of https://sqlite.org/fileformat2.html#the_database_header: page size, pages, and the two
    counters that agree when the number of pages is right.
    """
    page, pages, changes, valid_for = (int.from_bytes(header[at:end], "big") for at, end in _HEADER)
    return (65536 if page == 1 else page) * pages if header.startswith(MAGIC) and changes == valid_for else 0


def _is_filled(path: str) -> bool:
    try:
        return Path(path).stat().st_size > 0
    except FileNotFoundError:
        return False


def _cut_off(path: str) -> str:
    return f"{path} is damaged: it was cut off, and only its beginning is there. {MOVE_IT}"


def _is_busy(error: sqlite3.Error) -> bool:
    """Whether another connection holds the lock that was needed."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)


def _explain(path: str, error: sqlite3.Error) -> str:
    """SQLite's words with what to do about them."""
    said = str(error)
    if "readonly" in said or "attempt to write" in said:
        return f"the journal {path} is read-only. Make it writable, or name another with journal=."
    if _is_busy(error):
        return (
            f"the journal {path} is locked by another program, which does not let go of it. "
            "What is recorded is safe; end that program and resume, or name another journal with journal=."
        )
    if "full" in said:
        return (
            f"the journal {path} could not be written: the disk is full. "
            "What is recorded is safe; make room and resume."
        )
    if getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_IOERR:
        return (
            f"the journal {path} could not be read or written: {said}. What is recorded is safe; see that the disk is "
            "there and that no quota and no limit (ulimit -f) is reached, and resume."
        )
    if "not a database" in said or "malformed" in said or "no such table" in said or "no such column" in said:
        return f"the journal {path} is damaged or no journal ({said}). It was left as it is. {MOVE_IT}"
    if "unable to open" in said:
        return f"the journal {path} cannot be opened: is its folder there and writable?"
    return f"the journal {path} cannot be used: {said}."
