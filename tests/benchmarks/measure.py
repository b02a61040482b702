"""Measuring: ours and its floor in turn, in one process, so that only their ratio counts.

Strategy: a figure is seconds (or bytes) for one unit of work, smaller is better. ``paired`` takes ours and the floor in
turns (A B A B …), so whatever else the machine does meets both; ``Pair`` says how the rounds become one figure. Work
that only computes is measured in CPU time, which a busy neighbour hardly lengthens; work that waits for the disk,
another thread or another process on the clock ("wall").

A *floor* is a plain program that does the same input and output by hand. They stand at the end of this file.
"""

from __future__ import annotations

import asyncio
import gc
import os
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import tracemalloc
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import cm_notebook as cm
from cm_notebook.journal import AnyJournal

Measure = Callable[[], "Time"]


class Time(NamedTuple):
    """Seconds that something took: on the clock, and of all threads' computing."""

    wall: float
    cpu: float

    def per(self, count: int) -> Time:
        """For one of `count`."""
        return Time(self.wall / count, self.cpu / count)


LONG_S = 5
"""Seconds of a first round that counts: what is loaded at first use is some hundredths of that."""

SIZE = 1024
"""Characters that each step produces; all steps different ones."""

UNITS = {"×": 1.0, "s": 1.0, "ms": 1e3, "µs": 1e6, "bytes": 1.0, "KiB": 1 / 1024, "MiB": 1 / 1024**2}


# -- rounds ------------------------------------------------------------------------------------------------------------


@dataclass
class Pair:
    """What the rounds gave: the figures of ours and of the floor, in order. ``clock`` says what they are."""

    ours_all: list[float]
    floor_all: list[float]
    clock: str

    @property
    def ours(self) -> float:
        """The best round of ours."""
        return min(self.ours_all)

    @property
    def floor(self) -> float:
        """The best round of the floor."""
        return min(self.floor_all)

    @property
    def ratio(self) -> float:
        """Ours divided by the floor: of the best rounds, or the median of each round's, whichever is lower.

        A lucky round of the floor spoils the first, steady disturbance the second; what has become slower raises both.
        """
        each = [ours / floor for ours, floor in zip(self.ours_all, self.floor_all, strict=True)]
        return min(self.ours / self.floor, statistics.median(each))

    @property
    def difference(self) -> float:
        """Ours less the floor, likewise."""
        each = [ours - floor for ours, floor in zip(self.ours_all, self.floor_all, strict=True)]
        return min(self.ours - self.floor, statistics.median(each))


class Rounds(NamedTuple):
    """The same rounds by both clocks."""

    wall: Pair
    cpu: Pair


def paired(ours: Measure, floor: Measure | None = None, *, rounds: int = 5, within_s: float = 40) -> Rounds:
    """Measure both in turns, after a first round that only warms up; one so long that this does not show in it counts.

    Parameters
    ----------
    floor
        ``None``: there is none, the budget is a figure of its own.
    rounds
        How often. At most; at least one is made.
    within_s
        Seconds after which no further round begins, so that a slow disk costs precision and not an hour.
    """
    times: dict[Measure, list[Time]] = {ours: [], **({floor: []} if floor is not None else {})}
    begun = time.monotonic()

    def one_round() -> float:
        for measure, figures in times.items():
            gc.collect()
            figures.append(measure())
        return time.monotonic() - begun

    if (passed := one_round()) < LONG_S:
        for figures in times.values():
            figures.clear()
        passed = one_round()
    while len(times[ours]) < rounds and passed < within_s:
        passed = one_round()
    kept = [times[measure] if measure is not None else [] for measure in (ours, floor)]
    return Rounds(*(Pair(*([getattr(one, clock) for one in side] for side in kept), clock) for clock in Time._fields))


@contextmanager
def stopwatch() -> Iterator[Callable[[], Time]]:
    """Time of the block: call what this gives, after the block."""
    wall, cpu = time.perf_counter(), time.process_time()
    passed: list[Time] = []
    yield lambda: passed[0]
    passed.append(Time(time.perf_counter() - wall, time.process_time() - cpu))


@contextmanager
def peak_memory() -> Iterator[Callable[[], int]]:
    """Bytes that Python objects took at most in the block, beyond what was there before; as :func:`stopwatch`."""
    gc.collect()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        peak: list[int] = []
        yield lambda: peak[0]
        peak.append(tracemalloc.get_traced_memory()[1] - before)
    finally:
        tracemalloc.stop()


# -- work --------------------------------------------------------------------------------------------------------------


@cm.agent("work")
async def work(turn: cm.Turn) -> str:
    """A step that costs nothing and produces 1 KiB."""
    return turn.step.ljust(SIZE)


def chain(steps: int, agent: cm.Agent = work, **options: Any) -> cm.Workflow:
    """A workflow of so many such steps, one after the other."""
    return cm.Workflow(
        f"chain of {steps}",
        agents=[agent],
        steps=[cm.step("work", id=f"s{number}", **options) for number in range(steps)],
        autonomous_mode="always",
    )


def looping(times: int) -> cm.Workflow:
    """A workflow of two such steps, of which the second sends the run back so many times."""

    @cm.agent("again")
    async def again(turn: cm.Turn) -> cm.Verdict:
        return cm.Verdict(action="loop" if turn.iteration <= times else "continue", reason="x" * SIZE)

    steps = f"work -> again(loop 1, max {times})"
    return cm.Workflow("loop", agents=[work, again], steps=steps, autonomous_mode="always")


def finish(workflow: cm.Workflow, journal: str | os.PathLike[str] | AnyJournal, **options: Any) -> Time:
    """Time from the start of a run to its end."""
    with stopwatch() as passed:
        run = workflow.start(journal=journal, **options).wait()
    assert run.status == "completed"
    return passed()


class Chunks:
    """An engine that writes so many pieces of text, all different."""

    name = "chunks"

    def __init__(self, count: int) -> None:
        self.count = count
        self.go = False
        """Set by the reader when it is there."""

    async def stream(self, request: cm.AgentRequest) -> AsyncIterator[cm.AgentEvent]:
        """One turn."""
        while not self.go:
            await asyncio.sleep(0.001)
        for number in range(self.count):
            yield cm.Delta(piece(number))
        yield cm.TurnDone("done")


def piece(number: int) -> str:
    """The text of a chunk: a word of five letters, as models send them."""
    return f"{number:05d} "


# -- processes ---------------------------------------------------------------------------------------------------------

_compiled = tempfile.TemporaryDirectory(prefix="cm-compiled-")


def new_process(code: str, *arguments: str) -> Time:
    """Run `code` in a new Python until it prints "done", which is its end but for its last bytes.

    What it imports is compiled, as an installed package is, whatever ``PYTHONDONTWRITEBYTECODE`` says here: the first
    round compiles it, into a folder of this process.
    """
    environment = {**os.environ, "PYTHONPYCACHEPREFIX": _compiled.name}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    start = time.perf_counter()
    child = subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdout=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        text=True,
        env=environment,
    )
    assert child.stdout is not None
    with child.stdout:
        said = child.stdout.readline()
        until_line = time.perf_counter() - start
    _pid, status, used = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    assert child.returncode == 0, f"ended with {child.returncode}"
    assert said.strip() == "done", said
    return Time(until_line, used.ru_utime + used.ru_stime)


# -- floors ------------------------------------------------------------------------------------------------------------


def database(path: Path) -> sqlite3.Connection:
    """A database that is on disk after each commit, as the journal is."""
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=FULL")
    connection.execute("CREATE TABLE IF NOT EXISTS steps (id INTEGER PRIMARY KEY, body TEXT NOT NULL)")
    return connection


def rows_committed(path: Path, count: int) -> Time:
    """Floor of a durable chain: a row of 1 KiB for each step, each committed."""
    connection = database(path)
    with stopwatch() as passed:
        for number in range(count):
            connection.execute("INSERT INTO steps (body) VALUES (?)", (str(number).ljust(SIZE),))
    connection.close()
    return passed()


def tasks_awaited(count: int) -> Time:
    """Floor of a chain in memory: one Task for each step."""

    async def step(number: int) -> str:
        return str(number).ljust(SIZE)

    async def steps() -> Time:
        loop = asyncio.get_running_loop()
        with stopwatch() as passed:
            for number in range(count):
                await loop.create_task(step(number))
        return passed()

    return on_a_thread(steps())


def queue_of_64(count: int) -> Time:
    """Floor of a stream: chunks through an ``asyncio.Queue(64)``."""

    async def produce(queue: asyncio.Queue[str | None]) -> None:
        for number in range(count):
            await queue.put(piece(number))
        await queue.put(None)

    async def both() -> Time:
        queue: asyncio.Queue[str | None] = asyncio.Queue(64)
        characters = 0
        with stopwatch() as passed:
            producer = asyncio.get_running_loop().create_task(produce(queue))
            while (text := await queue.get()) is not None:
                characters += len(text)
            await producer
        return passed()

    return on_a_thread(both())


def on_a_thread(work: Coroutine[Any, Any, Time]) -> Time:
    """Run `work` on a loop of its own thread while this one waits, as a run's loop does."""
    result: list[Time] = []
    thread = threading.Thread(target=lambda: result.append(asyncio.run(work)))
    thread.start()
    thread.join()
    return result[0]
