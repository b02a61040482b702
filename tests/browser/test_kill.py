"""A kernel that is killed (``kill -9``) in JupyterLab, at moments drawn by a seed: the cells, run again, go on.

What the agents write down outside, and what was clicked and shown as approved, is held against the journal as in
``tests/crash``.
"""

from __future__ import annotations

import os
import random
import signal
from collections import Counter

import pytest

from tests.crash.harness import check, copy_files, read_rows, turns_under_way
from tests.crash.plans import read_lines

SETUP = """\
%load_ext cm_notebook
import asyncio, hashlib, json, os
import cm_notebook as cm
from cm_notebook.engines.base import TurnDone

class Outside:
    name = "outside"
    def note(self, what, request, **more):
        digest = hashlib.sha256(request.prompt.encode()).hexdigest()
        line = {"what": what, "path": request.path, "attempt": request.attempt, "digest": digest, **more}
        with open("ledger.jsonl", "a") as file:
            file.write(json.dumps(line) + "\\n")
    async def stream(self, request):
        self.note("begin", request)
        await asyncio.sleep(0.4)
        text = f"{request.path} says yes"
        self.note("end", request, text=text)
        yield TurnDone(text)

cm.register_engine(Outside())
print("pid", os.getpid())"""
CELLS = [
    SETUP,
    "goal = 'a todo CLI'",
    "%cm workflow killed --autonomous never --engine outside",
    "%%cm step planner\nPlan {{ goal }}.",
    "%%cm step builder\nBuild {{ planner }}.",
    "%%cm step tester\nTest {{ builder }}.",
]
STEPS = {"planner": 3, "builder": 4, "tester": 5}
"""In which cells they are; one more than are approved before the last death, as a finished run is begun anew."""


def run_all(nb):
    """Run the cells one by one; returns the kernel's process."""
    for cell in range(len(CELLS)):
        nb.run_cell(cell)
        nb.wait_done(cell)
    return int(nb.text(0).split("pid")[1].split()[0])


def kill(nb, pid):
    """End the kernel as the system does, and wait until JupyterLab has a new one."""
    os.kill(pid, signal.SIGKILL)
    nb.page.get_by_text("appears to have died. It will restart automatically").wait_for(timeout=60_000)
    nb.click("button", "Ok")
    nb.wait_idle(60)


@pytest.mark.parametrize("seed", range(3))
def test_a_killed_kernel_loses_nothing_and_repeats_nothing(open_notebook, seed):
    chance = random.Random(f"kernel {seed}")
    nb = open_notebook(CELLS)
    folder, in_flight, decided, before = nb.path.parent, Counter(), [], []
    moments = chance.sample(("working", "waiting", "clicked", "later"), 2)

    def look():
        nonlocal before
        noted = read_lines(folder / "ledger.jsonl")
        rows = read_rows(copy_files(folder / ".cm_notebook" / "journal.db", folder / "copy"))
        assert rows[: len(before)] == before
        before = rows
        in_flight.update(turns_under_way(rows))
        check(rows, noted, decided, in_flight)
        return rows

    def approve():
        """The next step, which waits."""
        step, cell = list(STEPS.items())[len(decided)]
        nb.wait_text(cell, f"{step} is waiting for you")
        nb.click("button", "Approve", cell=cell)
        nb.wait_text(cell, "approved")
        opened = [row.body["gate"] for row in look() if row.type == "GateOpened"]
        gate = next(gate["id"] for gate in opened if gate["step"] == step)
        decided.append({"what": "decided", "gate": gate, "action": "approve", "feedback": None, "output": None})

    for moment in moments:
        pid = run_all(nb)
        if moment == "working":
            nb.page.wait_for_timeout(chance.uniform(0, 400))
        elif moment == "waiting":
            nb.wait_text(list(STEPS.values())[len(decided)], "is waiting for you")
        else:
            approve()
        if moment == "later":
            nb.page.wait_for_timeout(chance.uniform(0, 600))
        kill(nb, pid)
        look()
    run_all(nb)
    while len(decided) < len(STEPS):
        approve()
    nb.wait_text(STEPS["tester"], "tester says yes")
    rows = look()
    finished = [row.body["path"] for row in rows if row.type == "TurnFinished"]
    assert finished == list(STEPS), "each once"
