"""Places with a name at which a process kills itself, with the signal that nothing can catch.

Strategy: the journal that a run is given (``journal=``) is the real one with ears. Each transaction is passed on three
sides: ``before`` anything of it is written, ``mid``: all rows are written and nothing is committed, ``after``: it is
committed, and nobody has been told. A point is named for what a transaction records, ``before:TurnFinished``; a
transaction that records several kinds of event passes several points. Around what the journal, and the snapshots of a
workspace, do besides, stand points named for that: ``before:drive``, ``after:snapshot``.

``Point.nth`` says at which passing it goes off. Two more count what has no name: ``statement`` (of SQLite) and
``ledger`` (what an agent writes down outside).
"""

from __future__ import annotations

import functools
import os
import signal
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, NoReturn

import cm_notebook as cm
from cm_notebook.events import TYPES, AnyEvent

SIDES = ("before", "mid", "after")
CALLS = ("create", "drive", "begin", "release")
"""What a journal does besides."""
ELSEWHERE = ("RunForked",)
"""Begins another run than the one that is killed here; tests/core/test_rewind.py kills around it."""
EVENT_POINTS = tuple(f"{side}:{name}" for name in TYPES if name not in ELSEWHERE for side in SIDES)
CALL_POINTS = tuple(f"{side}:{name}" for name in CALLS for side in ("before", "after"))
SNAPSHOTS = ("take", "diff", "restore")
"""What is done with the files of a workspace."""
SNAPSHOT_POINTS = tuple(f"{side}:{name}" for name in SNAPSHOTS for side in ("before", "after"))
COUNTED = ("statement", "ledger")


class Point(NamedTuple):
    """The `nth` passing of the point of that `name`."""

    name: str
    nth: int = 1

    def __str__(self) -> str:
        return f"{self.name}#{self.nth}"

    @classmethod
    def read(cls, text: str) -> Point:
        """The point that ``str`` wrote."""
        name, _, nth = text.partition("#")
        return cls(name, int(nth or 1))


class Passed:
    """Counts the points that this process passes, and ends it at the one that is `deadly`."""

    def __init__(self, deadly: Point | None = None) -> None:
        self.deadly = deadly
        self.count: Counter[str] = Counter()

    def __call__(self, name: str) -> None:
        self.count[name] += 1
        if self.deadly is not None and name == self.deadly.name and self.count[name] == self.deadly.nth:
            die()


def die() -> NoReturn:
    """End this process as ``kill -9`` does."""
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("it is dead")


def around(thing: Any, passed: Passed, names: Iterable[str]) -> None:
    """Have points before and after each call of these methods of an object, a class or a module."""

    def between(name: str, call: Any) -> Any:
        @functools.wraps(call)
        def pointed(*given: Any, **options: Any) -> Any:
            passed(f"before:{name}")
            value = call(*given, **options)
            passed(f"after:{name}")
            return value

        return pointed

    for name in names:
        setattr(thing, name, between(name, getattr(thing, name)))


class PointedJournal(cm.Journal):
    """A journal that says which point it passes."""

    def __init__(self, path: str | os.PathLike[str], passed: Passed) -> None:
        self.passed = passed
        self.kinds: list[str] = []
        super().__init__(path)
        around(self, passed, CALLS)
        self._writer.set_trace_callback(self._statement)

    def _statement(self, statement: str) -> None:
        """Called by SQLite before it does anything."""
        self.passed("statement")
        if statement == "COMMIT":
            self._pass("mid")

    def _pass(self, side: str) -> None:
        for name in self.kinds:
            self.passed(f"{side}:{name}")

    def commit(self, run_id: str, events: Sequence[AnyEvent]) -> None:
        """As it is, between points."""
        self.kinds = list(dict.fromkeys(event.type for event in events))
        self._pass("before")
        super().commit(run_id, events)
        self._pass("after")
