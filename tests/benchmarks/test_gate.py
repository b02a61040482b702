"""A person has decided: how soon the next step is done and on disk.

A third step keeps the run from its end, which is not meant here: then the journal is brought back into its one file.
"""

from __future__ import annotations

import itertools
import json
import sqlite3
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

STARTED, OPENED, APPROVED = (json.dumps({"type": kind}) for kind in ("started", "opened", "approved"))
FINISHED = json.dumps({"type": "finished", "text": "x" * SIZE})


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

    def floor() -> Time:
        connection = _gate_by_hand(new_file())
        with stopwatch() as passed:
            _write(connection, APPROVED, STARTED, FINISHED)
        connection.close()
        return passed()

    pair = paired(ours, floor, rounds=50)
    budget("gate, click to next step done", pair.wall, "ms", times=1, known=1.75)


def _gate_by_hand(path: Path) -> sqlite3.Connection:
    connection = measure.database(path)
    _write(connection, STARTED, FINISHED, OPENED)
    return connection


def _write(connection: sqlite3.Connection, *bodies: str) -> None:
    for body in bodies:
        connection.execute("INSERT INTO steps (body) VALUES (?)", (body,))
