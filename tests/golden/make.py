"""Make the golden files of the present format: ``python -m tests.golden.make``, once for each format, and keep them.

Strategy: journals of real runs, small, that have between them every kind of event, each with what a reader must find in
it. They are never made anew: that a later version still reads what this one wrote is the point. Where a new kind of
event has come, give ``python -m tests.golden.make NAME`` the name of a plan that has it (``tests/crash/plans.py``).
"""

from __future__ import annotations

import contextlib
import json
import shutil
import sqlite3
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import cm_notebook as cm
from cm_notebook import events as facts
from cm_notebook.journal import MIGRATIONS
from cm_notebook.tape import Tape
from tests.crash.harness import JOURNAL, Kill, Scene, warm_up
from tests.crash.plans import NAMED, make
from tests.crash.points import Point

HERE = Path(__file__).parent
FORMAT = len(MIGRATIONS)
CUT = "cut"
"""A run that died in mid-turn, and went on."""
OPEN = "open"
"""A run that waits at its gate."""


FORKED = "forked"
"""A fork of a fork of a run, each of which has gone on, beside those."""


def forked(journal: Path) -> None:
    """Write the fork of a fork, the newest run of its journal."""
    names = ("a", "b", "c")
    flow = cm.Workflow("forked", agents=[cm.Agent(name, f"Be {name}.") for name in names], steps="a -> b -> c")
    script = cm.ScriptedEngine({name: [f"{name} {number}" for number in range(1, 9)] for name in names})
    run = flow.start(engine=script, journal=journal, workspace=journal.parent).wait()
    for step in ("b", "c"):
        run = run.fork(step)
        run.unpause().wait()


def open_flow() -> cm.Workflow:
    """The workflow of the run that waits, as its cell would define it."""
    steps = [cm.step("plan", prompt="Plan {{ goal }}.", interactive=True), cm.step("build", prompt="Build {{ plan }}.")]
    return cm.Workflow("open", steps=steps, inputs={"goal": "a todo CLI"})


def of_run(run: cm.Run) -> dict[str, Any]:
    """What a reader must find in a run, as JSON."""
    with run.reading() as state:
        steps = {
            step.path: {
                "status": step.status,
                "text": state.text(step.approved),
                "attempts": [[one.number, one.text, one.prompt, one.cut_short] for one in step.attempts],
            }
            for step in (*state.order, *state.members.values())
        }
        found = {
            "id": run.id,
            "name": state.name,
            "status": run.status,
            "mode": state.mode,
            "inputs": dict(state.inputs),
            "steps": steps,
            "open": [[gate.id, gate.kind, gate.digest, list(gate.actions)] for gate in state.gates.values()],
            "decisions": {id: [one.action, one.feedback, one.output] for id, one in state.decisions.items()},
            "tokens": [state.usage.input_tokens, state.usage.output_tokens],
            "cost_usd": state.cost_usd,
        }
    events = [[event.seq, event.at, event.type, json.loads(facts.body(event))] for event in run.events]
    return {**found, "events": events}


def of_tape(tape: Tape) -> dict[str, Any]:
    """What a reader must find on a tape, as JSON."""
    return {
        "run": tape.run_name,
        "turns": [turn.model_dump(mode="json", exclude_none=True) for turn in tape.turns.values()],
        "decisions": [
            [
                one.gate.model_dump(mode="json", exclude_none=True),
                one.decision.model_dump(mode="json", exclude_none=True),
            ]
            for lines in tape.decisions.values()
            for one in lines
        ],
    }


def _keep(name: str, journal: Path) -> None:
    """Put the journal beside this file, in one piece, with what is in it."""
    target = HERE / str(FORMAT) / f"{name}.db"
    with contextlib.closing(sqlite3.connect(journal, isolation_level=None)) as database:
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    shutil.copyfile(journal, target)
    with tempfile.TemporaryDirectory() as folder:
        shutil.copyfile(target, Path(folder, "j.db"))
        kept = cm.Journal(Path(folder, "j.db"))
        found = of_run(cm.Run.open(kept.runs()[0].id, kept))
        kept.close()
    _write(target.with_suffix(".json"), found)


def _write(path: Path, found: dict[str, Any]) -> None:
    path.write_text(json.dumps(found, indent=1, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")


def main(names: Iterable[str]) -> None:
    """Make those that are not there yet."""
    (HERE / str(FORMAT)).mkdir(exist_ok=True)
    names = [name for name in names if not (HERE / str(FORMAT) / f"{name}.db").exists()]
    with tempfile.TemporaryDirectory() as folder:
        warm_up()
        for name in [name for name in names if name not in (OPEN, FORKED)]:
            kills = [Kill(point=Point("after:TurnStarted", 2))] if name == CUT else []
            scene = Scene(Path(folder, name), make("gates" if name == CUT else name), kills)
            scene.prepare()
            scene.play()
            _keep(name, scene.folder / JOURNAL)
        if OPEN in names:  # last: it starts a thread, and what is above forks
            run = open_flow().start(engine=cm.ScriptedEngine({"plan": ["1. Write it."]}), journal=Path(folder, "o.db"))
            while not run.gates:
                pass
            _keep(OPEN, Path(folder, "o.db"))
            run.stop()
        if FORKED in names:
            forked(Path(folder, "f.db"))
            _keep(FORKED, Path(folder, "f.db"))
    for tape in (HERE / str(FORMAT)).glob("*.jsonl"):
        if not (beside := tape.with_suffix(".json")).exists():
            _write(beside, of_tape(Tape.read(tape)))


if __name__ == "__main__":
    main(sys.argv[1:] or [*NAMED, CUT, OPEN, FORKED])
