"""A person has decided: how soon the next step is done and on disk.

A third step keeps the run from its end, which is not meant here: then the journal is brought back into its one file.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import sqlite3
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path

import cm_notebook as cm
from cm_notebook.journal import Journal
from tests.benchmarks import measure
from tests.benchmarks.measure import SIZE, Time, paired, stopwatch
from tests.helpers import gate

_numbers = itertools.count()

GATED = """
import cm_notebook as cm

@cm.agent("work")
async def work(turn):
    return "x" * 1024

steps = [cm.step("work", id="asks", interactive=True), cm.step("work", id="next"), cm.step("work", id="later")]
workflow = cm.Workflow("gate", agents=[work], steps=steps)
"""
COLD = f"""{GATED}
import os, sys
run = cm.resume(sys.argv[1], workflow, journal=sys.argv[2], until="next")
run.approve()
run.wait()
print("done", flush=True)
os._exit(0)
"""
COLD_FLOOR = """
import asyncio, json, os, sqlite3, sys
from pydantic import BaseModel

class Fact(BaseModel):
    type: str
    text: str = ""

async def step():
    return "x" * 1024

async def main(path):
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("PRAGMA synchronous=FULL")
    facts = [Fact(**json.loads(body)) for body, in connection.execute("SELECT body FROM steps ORDER BY id")]
    assert facts[-1].type == "opened"
    for fact in (Fact(type="approved"), Fact(type="started")):
        connection.execute("INSERT INTO steps (body) VALUES (?)", (fact.model_dump_json(),))
    done = Fact(type="finished", text=await asyncio.create_task(step()))
    connection.execute("INSERT INTO steps (body) VALUES (?)", (done.model_dump_json(),))

asyncio.run(main(sys.argv[1]))
print("done", flush=True)
os._exit(0)
"""
"""As somebody would write it who wants each fact on disk when it happens: the decision, the start, the end."""


def new_file() -> Path:
    """A path below the test's own folder."""
    return Path(f"{next(_numbers)}.db").absolute()


def waiting_run(journal: Journal) -> cm.Run:
    """A run that waits at the gate of its first step."""
    names: dict[str, cm.Workflow] = {}
    exec(GATED, names)
    run = names["workflow"].start(journal=journal, until="next")
    gate(run)
    return run


def test_cold(budget):
    def ours() -> Time:
        journal = Journal(new_file())
        run = waiting_run(journal)
        run._driver.let_go()  # as if its process had died
        return measure.new_process(COLD, run.id, journal.path)

    def floor() -> Time:
        path = new_file()
        _gate_by_hand(path).close()
        return measure.new_process(COLD_FLOOR, str(path))

    pair = paired(ours, floor, rounds=12)
    budget("gate, new process to next step done", pair.wall, "ms", times=1.5)


def test_warm(budget):
    def ours() -> Time:
        run = waiting_run(Journal(new_file()))
        with stopwatch() as passed:
            run.approve()
            run.wait()
        return passed()

    with a_loop() as loop:
        pair = paired(ours, lambda: _answered_by_hand(loop, new_file()), rounds=50)
    budget("gate, click to next step done", pair.wall, "ms", times=1, known=1.3)


@contextmanager
def a_loop() -> Iterator[asyncio.AbstractEventLoop]:
    """An event loop on a thread of its own."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield loop
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def _answered_by_hand(loop: asyncio.AbstractEventLoop, path: Path) -> Time:
    """Floor: a person decides on this thread, and the step is done on `loop`, so that no cell holds it up.

    The person waits twice, as with ours: until the answer is on disk, and until the step is. Each fact is written when
    it happens, so there are three transactions where ours has two.
    """
    waits: Future[asyncio.Future[str]] = Future()
    answered, done = Future[None](), Future[None]()

    async def step() -> str:
        return "x" * SIZE

    async def gate_and_step() -> None:
        connection = _gate_by_hand(path)
        answer: asyncio.Future[str] = loop.create_future()
        waits.set_result(answer)
        _write(connection, _fact(await answer))
        answered.set_result(None)
        _write(connection, _fact("started"))
        _write(connection, _fact("finished", await loop.create_task(step())))
        done.set_result(None)
        connection.close()

    run = asyncio.run_coroutine_threadsafe(gate_and_step(), loop)
    answer = waits.result()
    with stopwatch() as passed:
        loop.call_soon_threadsafe(answer.set_result, "approved")
        answered.result()
        done.result()
    run.result()
    return passed()


def _gate_by_hand(path: Path) -> sqlite3.Connection:
    connection = measure.database(path)
    _write(connection, _fact("started"), _fact("finished", "x" * SIZE), _fact("opened"))
    return connection


def _write(connection: sqlite3.Connection, *bodies: str) -> None:
    for body in bodies:
        connection.execute("INSERT INTO steps (body) VALUES (?)", (body,))


def _fact(kind: str, text: str = "") -> str:
    return json.dumps({"type": kind, "text": text})
