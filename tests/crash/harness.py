"""A run that is killed again and again, and what must be true of it then.

Strategy: this process has imported everything and forks each life of a run, so a life costs milliseconds; it opens no
journal and starts no thread itself. ``Scene`` is one plan with its kills: it starts a life, kills it or lets it die at
its point, looks at what is on disk, and starts the next one, until the run is completed. What is true is held against
what was written down outside the journal: by agents that they began and ended, by those who decided that they were told
so. All of it is drawn from a seed; ``python -m tests.crash`` has it as a command.

Where nobody else has the journal open, a copy of it is looked at after a death: the next life finds it as it was left.
"""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import gc
import hashlib
import json
import os
import random
import shutil
import signal
import sqlite3
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import filelock  # noqa: F401 - each life would import it anew

import cm_notebook as cm
import cm_notebook.driving
from cm_notebook import events as facts
from cm_notebook.workspace import Snapshots
from tests.crash.plans import Ledger, Plan, deeds_done, make, read_lines
from tests.crash.points import (
    CALL_POINTS,
    COUNTED,
    SIDES,
    SNAPSHOT_POINTS,
    SNAPSHOTS,
    Passed,
    Point,
    PointedJournal,
    around,
)

JOURNAL, LEDGER, ORACLE, LOG = Path("journal.db"), Path("ledger.jsonl"), Path("oracle.jsonl"), "log.txt"
LIFE_S = 30
"""No life takes so long, unless it hangs."""
LIVES = 40
RESUMING = ("RunResumed", "TurnCutShort")
"""What only a run that was killed has."""
LOOK_S = 0.001


class Broken(AssertionError):
    """A promise that was not kept."""


class Row(NamedTuple):
    """An event as it is on disk, read without any of our code."""

    seq: int
    type: str
    body: dict[str, Any]


@dataclass
class Kill:
    """Who is killed in a life, and when: at a point of its own, or from outside after so many seconds."""

    who: str = "driver"
    point: Point | None = None
    after_s: float | None = None

    def __str__(self) -> str:
        return f"{self.who} at {self.point}" if self.point is not None else f"{self.who} after {self.after_s:.4f} s"


# -- one life ---------------------------------------------------------------------------------------------------------


def _child(work: Callable[[], None], folder: Path) -> int:
    """Fork a process that does `work` in `folder`; returns its pid. What goes wrong in it is in a log there."""
    pid = os.fork()
    if pid:
        return pid
    code = 3
    with (folder / LOG).open("a") as out:
        try:
            os.chdir(folder)
            faulthandler.dump_traceback_later(LIFE_S - 2, exit=True, file=out)
            work()
            code = 0
        except BaseException:
            traceback.print_exc(file=out)
        finally:
            out.flush()
            os._exit(code)


def _drive(plan: Plan, run_id: str | None, deadly: Point | None) -> None:
    """Start the run or go on with it, to its end."""
    passed = Passed(deadly)
    oracle, plan.ledger = Ledger(ORACLE), Ledger(LEDGER, passed)
    _environment(plan)
    journal = PointedJournal(JOURNAL, passed)
    around(Snapshots, passed, SNAPSHOTS)
    options: dict[str, Any] = {"engine": plan.engine(), "journal": journal, "on_waiting": plan.on_waiting}
    if plan.headless:
        options["on_gate"] = plan.policy
    if run_id is None:
        run = plan.workflow.start(workspace="work", **options)
    elif plan.deeds:  # its steps are not those of the definition any more
        run = cm.resume(run_id, agents=plan.agents, **options)
    else:
        run = cm.resume(run_id, plan.workflow, **options)
    _conduct(plan, run, oracle)
    run.wait(LIFE_S)


def _environment(plan: Plan) -> None:
    os.environ["CM_HEADLESS"] = "1" if plan.headless else "0"
    cm_notebook.driving.POLL_S = 0.003  # what another process decides is to be heard at once


def _conduct(plan: Plan, run: cm.Run, oracle: Ledger) -> None:
    """What the person does who sits at the process that drives."""
    if plan.headless:
        return
    while run.status not in ("completed", "stopped", "failed"):
        for gate in run.gates:
            if (deed := _next_deed(plan, run, gate)) is not None:
                deed.do(run)
                oracle.note("done", event=deed.event)
            elif not plan.deciders:
                _decide(plan, run, gate, oracle)
        time.sleep(LOOK_S)


def _next_deed(plan: Plan, run: cm.Run, gate: cm.Gate) -> Any:
    mine = [deed for deed in plan.deeds if deed.step == gate.step]
    done = deeds_done(run.events) if mine else set()
    return next((deed for deed in mine if deed.event not in done), None)


def _decide(plan: Plan, run: cm.Run, gate: cm.Gate, oracle: Ledger) -> None:
    with run.reading() as state:
        if gate.id not in state.gates:
            return
        decision = plan.answer(state, gate)
    try:
        run.decide(gate.id, decision, digest=gate.digest)
    except cm.AlreadyDecided:
        oracle.note("late", gate=gate.id)
    else:
        oracle.note("decided", gate=gate.id, **decision.model_dump(include={"action", "feedback", "output"}))


def _decider(plan: Plan, deadly: Point | None) -> None:
    """Another process that decides at each gate, as soon as it sees it."""
    _environment(plan)
    oracle = Ledger(ORACLE)
    while not JOURNAL.exists():
        time.sleep(LOOK_S)
    journal = PointedJournal(JOURNAL, Passed(deadly))
    while not (known := journal.runs()):
        time.sleep(LOOK_S)
    run = cm.Run.open(known[0].id, journal)
    while run.state.ended != "completed":
        for gate in run.gates:
            _decide(plan, run, gate, oracle)
        time.sleep(LOOK_S)


def _whole(plan: Plan) -> None:
    """The same run in one life, in memory: how it ends, and which events it has."""
    plan.ledger = Ledger(Path("whole-ledger.jsonl"))
    _environment(plan)
    options: dict[str, Any] = {"on_waiting": plan.on_waiting}
    if plan.headless:
        options["on_gate"] = plan.policy
    begun = time.monotonic()
    plan.deciders = 0
    run = plan.workflow.start(engine=plan.engine(), journal=":memory:", workspace="whole", **options)
    _conduct(plan, run, Ledger(Path("whole-oracle.jsonl")))
    run.wait(LIFE_S)
    took, kinds = time.monotonic() - begun, Counter(event.type for event in run.events)
    Path("whole.json").write_text(json.dumps({"texts": _texts(run), "kinds": kinds, "took_s": took}))


def _texts(run: cm.Run) -> dict[str, str]:
    with run.reading() as state:
        return {step.id: state.text(step.approved) for step in state.order}


# -- a run and its deaths ---------------------------------------------------------------------------------------------


@dataclass
class Scene:
    """One plan, killed as `kills` say, in a folder of its own."""

    folder: Path
    plan: Plan
    kills: list[Kill] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    died: list[str] = field(default_factory=list)
    in_flight: Counter[str] = field(default_factory=Counter)
    """How often a turn of that path was under way when its process died."""
    whole: dict[str, Any] = field(default_factory=dict)

    def prepare(self) -> None:
        """Have it run once with nobody killed."""
        self.folder.mkdir(parents=True)
        self._wait(_child(lambda: _whole(self.plan), self.folder), "the whole run")
        self.whole = json.loads((self.folder / "whole.json").read_text())

    def play(self) -> None:
        """Live, die and live again, until the run is completed; then check all of it.

        Raises
        ------
        Broken    A promise was not kept.
        """
        mine = iter([kill for kill in self.kills if kill.who == "driver"])
        with self._others() as others:
            for _life in range(LIVES):
                self._life(next(mine, None), others)
                self._look(others)
                if self.rows and self.rows[-1].type == "RunFinished":
                    break
            else:
                raise Broken(f"not finished after {LIVES} lives")
        self._check_end()

    def _life(self, kill: Kill | None, others: dict[int, Kill | None]) -> None:
        run_id = self.rows[0].body["run_id"] if self.rows else None
        pid = _child(lambda: _drive(self.plan, run_id, kill.point if kill is not None else None), self.folder)
        if kill is not None and kill.after_s is not None:
            time.sleep(kill.after_s)
            os.kill(pid, signal.SIGKILL)
        if self._wait(pid, "a life", others):
            self.died.append(str(kill))

    @contextlib.contextmanager
    def _others(self) -> Iterator[dict[int, Kill | None]]:
        """The processes that decide, by pid, with their deaths."""
        others: dict[int, Kill | None] = {}
        self._fates = iter([kill for kill in self.kills if kill.who == "decider"])
        try:
            for _number in range(self.plan.deciders):
                self._another(others)
            yield others
        finally:
            for pid in others:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)

    def _another(self, others: dict[int, Kill | None]) -> None:
        kill = next(self._fates, None)
        others[_child(lambda: _decider(self.plan, kill.point if kill is not None else None), self.folder)] = kill

    def _wait(self, pid: int, what: str, others: dict[int, Kill | None] | None = None) -> bool:
        """Wait for the process; returns whether it was killed."""
        end = time.monotonic() + LIFE_S
        while True:
            gone, status = os.waitpid(pid, os.WNOHANG)
            if gone:
                break
            if time.monotonic() > end:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                raise Broken(f"{what} did not end:\n{self._log()}")
            for other in list(others or ()):
                gone, status = os.waitpid(other, os.WNOHANG)
                if gone and others is not None:
                    kill = others.pop(other)
                    if os.WIFSIGNALED(status):
                        self.died.append(str(kill))
                        self._another(others)
                    elif os.WEXITSTATUS(status):
                        raise Broken(f"a process that decides failed:\n{self._log()}")
            time.sleep(0.0005)
        if os.WIFSIGNALED(status):
            return True
        if os.WEXITSTATUS(status):
            raise Broken(f"{what} failed:\n{self._log()}")
        return False

    def _log(self) -> str:
        return (self.folder / LOG).read_text()

    def _look(self, others: Collection[int]) -> None:
        """See what is on disk after a life, and check what must be true at any moment."""
        # first, as those who decide go on meanwhile
        ledger, oracle = read_lines(self.folder / LEDGER), read_lines(self.folder / ORACLE)
        # While others have it open, SQLite counts what they can see of the log, and not what was just being added.
        journal = self.folder / JOURNAL
        before, self.rows = self.rows, read_rows(journal if others else copy_files(journal, self.folder / "copy"))
        if self.rows[: len(before)] != before:
            here = next(at for at, row in enumerate(before) if self.rows[at : at + 1] != [row])
            raise Broken(f"what was on disk is gone, or is another: {before[here]}, now {self.rows[here : here + 1]}")
        self.in_flight.update(turns_under_way(self.rows))
        check(self.rows, ledger, oracle, self.in_flight)

    def _check_end(self) -> None:
        last = self.rows[-1].body
        if last["status"] != "completed":
            raise Broken(f"it ended {last['status']}: {last.get('reason')}")
        if any(gave_up(row) for row in self.rows):
            return  # a person went on without a text, which a run that nobody kills has
        self._wait(_child(_say_texts, self.folder), "reading it")
        if (texts := json.loads((self.folder / "end.json").read_text())) != self.whole["texts"]:
            raise Broken(f"it came to another end: {texts}, not {self.whole['texts']}")


def _say_texts() -> None:
    journal = cm.Journal(JOURNAL)
    Path("end.json").write_text(json.dumps(_texts(cm.Run.open(journal.runs()[0].id, journal))))


def gave_up(row: Row) -> bool:
    """Whether a person went on without the output of a step that may have run."""
    if row.type != "GateDecided":
        return False
    return bool(row.body["decision"]["action"] == "approve" and row.body.get("kind") == "may_have_run")


# -- what must be true ------------------------------------------------------------------------------------------------


def copy_files(journal: Path, to: Path) -> Path:
    """The files of a journal as they are now, in the folder `to`."""
    to.mkdir(exist_ok=True)
    for end in ("", "-wal", "-shm"):
        (to / f"{journal.name}{end}").unlink(missing_ok=True)
        if end != "-shm":
            with contextlib.suppress(FileNotFoundError):
                shutil.copyfile(f"{journal}{end}", to / f"{journal.name}{end}")
    return to / journal.name


def read_rows(journal: Path) -> list[Row]:
    """The events of the one run in it."""
    if not journal.exists():
        return []
    with contextlib.closing(sqlite3.connect(journal)) as database:
        if (wrong := database.execute("PRAGMA integrity_check").fetchall()) != [("ok",)]:
            raise Broken(f"the journal is damaged: {wrong}")
        found = database.execute("SELECT id, type, body FROM events ORDER BY id").fetchall()
    runs = {key >> 32 for key, _type, _body in found}
    if len(runs) > 1:
        raise Broken("there are two runs")
    rows, kinds = [], dict[str, str]()
    for key, kind, body in found:
        row = Row(key & 0xFFFFFFFF, kind, json.loads(body))
        if kind == "GateOpened":
            kinds[row.body["gate"]["id"]] = row.body["gate"]["kind"]
        elif kind == "GateDecided":
            row.body["kind"] = kinds.get(row.body["gate_id"], "?")
        rows.append(row)
    if [row.seq for row in rows] != list(range(1, len(rows) + 1)):
        raise Broken("an event is missing")
    return rows


def turns_under_way(rows: Iterable[Row]) -> list[str]:
    """The paths of those that began and have not ended."""
    under_way: dict[str, None] = {}
    for row in rows:
        if row.type == "TurnStarted":
            under_way[row.body["path"]] = None
        elif row.type in ("TurnFinished", "TurnFailed", "TurnCutShort"):
            under_way.pop(row.body["path"], None)
    return list(under_way)


def check(rows: list[Row], ledger: list[dict[str, Any]], oracle: list[dict[str, Any]], in_flight: Counter[str]) -> None:
    """Hold what is on disk against what was written down outside.

    Raises
    ------
    Broken    They do not agree.
    """
    _check_decisions(rows, oracle)
    _check_what_ran(rows, ledger)
    _check_approved(rows)
    _check_finished(rows)
    _check_repeats(rows, ledger, in_flight)


def _check_decisions(rows: list[Row], oracle: list[dict[str, Any]]) -> None:
    """No decision that somebody was told of is lost, and each gate has one answer."""
    decided: dict[str, dict[str, Any]] = {}
    for row in rows:
        if row.type == "GateDecided":
            if row.body["gate_id"] in decided:
                raise Broken(f"{row.body['gate_id']} was decided twice")
            decided[row.body["gate_id"]] = row.body["decision"]
    told = [line for line in oracle if line["what"] == "decided"]
    if len(told) != len({line["gate"] for line in told}):
        raise Broken("two were told that theirs is the answer")
    for line in told:
        found = decided.get(line["gate"])
        if found is None:
            raise Broken(f"the answer to {line['gate']} is lost")
        if any(found.get(key) != line[key] for key in ("action", "feedback", "output")):
            raise Broken(f"{line['gate']} was decided {found}, and told {line}")
    for line in oracle:
        if line["what"] == "late" and line["gate"] not in decided and not _closed(rows, line["gate"]):
            raise Broken(f"{line['gate']} is said to have an answer, and has none")
        if line["what"] == "done" and line["event"] not in {row.type for row in rows}:
            raise Broken(f"{line['event']} was acknowledged and is lost")


def _closed(rows: list[Row], gate: str) -> bool:
    """Whether something came after which that gate is open no more, besides an answer."""
    opened = next((row.seq for row in rows if row.type == "GateOpened" and row.body["gate"]["id"] == gate), None)
    closing = ("TurnCutShort", "TurnFailed", "TurnFinished", "Rewound", "StepChanged", "StepRemoved", "RunFinished")
    return opened is not None and any(row.seq > opened and row.type in closing for row in rows)


def _check_what_ran(rows: list[Row], ledger: list[dict[str, Any]]) -> None:
    """Nothing ran that was not on disk before, with that very prompt; what is said to have ended, has."""
    if too_many := _noted(ledger, "begin", "digest") - _recorded(rows, "TurnStarted", "digest"):
        raise Broken(f"these began and are not on disk: {too_many}")
    if invented := _recorded(rows, "TurnFinished", "text") - _noted(ledger, "end", "text"):
        raise Broken(f"these are said to have ended and have not: {invented}")


def _noted(ledger: list[dict[str, Any]], what: str, which: str) -> Counter[Any]:
    return Counter((line["path"], line["attempt"], line[which]) for line in ledger if line["what"] == what)


def _recorded(rows: list[Row], kind: str, which: str) -> Counter[Any]:
    return Counter((row.body["path"], row.body["attempt"], row.body[which]) for row in rows if row.type == kind)


def _check_approved(rows: list[Row]) -> None:
    """What was approved is what runs: a prompt, or the text that was edited."""
    gates: dict[str, dict[str, Any]] = {}
    approved: dict[str, str] = {}
    for row in rows:
        if row.type == "GateOpened":
            gates[row.body["gate"]["id"]] = row.body["gate"]
        elif row.type == "GateDecided" and row.body["kind"] == "start" and row.body["decision"]["action"] == "approve":
            gate, edited = gates[row.body["gate_id"]], row.body["decision"].get("output")
            approved[gate["path"]] = hashlib.sha256(edited.encode()).hexdigest() if edited else gate["digest"]
        elif row.type == "TurnStarted" and row.body["path"] in approved:
            if row.body["digest"] != approved[row.body["path"]]:
                raise Broken(f"another prompt of {row.body['path']} runs than was approved")
        elif row.type in ("LoopedBack", "Rewound", "StepChanged"):
            approved.clear()
        elif row.type == "StepOutdated":
            approved.pop(row.body["path"], None)
        elif row.type == "GateDecided" and row.body["decision"]["action"] in ("reject", "retry"):
            approved.pop(gates[row.body["gate_id"]]["path"], None)


def _check_finished(rows: list[Row]) -> None:
    """A step that is finished does not run again, unless a person or a loop says so."""
    finished: dict[str, tuple[int, int]] = {}
    gates: dict[str, str] = {}
    for row in rows:
        body = row.body
        if row.type == "TurnFinished":
            finished[body["path"]] = (body["attempt"], body.get("turn", 1))
        elif row.type == "GateOpened":
            gates[body["gate"]["id"]] = body["gate"]["path"]
        elif row.type == "GateDecided" and body["decision"]["action"] in ("reject", "retry"):
            finished.pop(gates[body["gate_id"]], None)
        elif row.type in ("LoopedBack", "Rewound"):
            finished.clear()
        elif row.type == "StepOutdated":  # nobody had said yes to it
            finished.pop(row.body["path"], None)
        elif row.type == "TurnStarted":
            turn = body.get("turn", 1)
            last = finished.get(body["path"])
            if last is not None and turn <= last[1]:
                raise Broken(f"{body['path']} was finished (attempt, turn: {last}) and runs again: {body['attempt']}")


def _check_repeats(rows: list[Row], ledger: list[dict[str, Any]], in_flight: Counter[str]) -> None:
    """A turn that was under way runs at most once more for each death; one that must not, only if a person says so."""
    ends = Counter(row.body["path"] for row in rows if row.type in ("TurnFinished", "TurnFailed"))
    began = Counter(line["path"] for line in ledger if line["what"] == "begin")
    for path, times in began.items():
        if times > ends[path] + in_flight[path]:
            raise Broken(f"{path} began {times} times, ended {ends[path]}, died {in_flight[path]}")
    steps = rows[0].body["workflow"]["steps"] if rows else ()
    careful = {step["agent"] for step in steps if step.get("idempotent") is False}
    asked: set[str] = set()
    for row in rows:
        if row.type == "TurnCutShort" and row.body["path"] in careful:
            asked.add(row.body["path"])
        elif row.type == "GateDecided" and row.body["kind"] == "may_have_run":
            asked.clear()
        elif row.type == "TurnStarted" and row.body["path"] in asked:
            raise Broken(f"{row.body['path']} may have run, and ran again unasked")


# -- drawing ----------------------------------------------------------------------------------------------------------


def draw_kills(seed: str, whole: dict[str, Any], deciders: int) -> list[Kill]:
    """One to four deaths: at points with a name, at the n-th of what is counted, or at any time."""
    chance = random.Random(f"kills {seed}")
    kinds = [*whole["kinds"], *RESUMING]
    kills = []
    for _ in range(chance.randint(1, 4)):
        who = "decider" if deciders and chance.random() < 0.3 else "driver"
        how = chance.random()
        if who == "decider":
            name = chance.choice(("before:GateDecided", "mid:GateDecided", "after:GateDecided", "statement"))
            kills.append(Kill(who, Point(name, chance.randint(1, 3) if name != "statement" else chance.randint(5, 30))))
        elif how < 0.55:
            name = f"{chance.choice(SIDES)}:{chance.choice(kinds)}"
            kills.append(Kill(who, Point(name, chance.choice((1, 1, 1, 2, 3)))))
        elif how < 0.8:
            counted = chance.choice(COUNTED)
            kills.append(Kill(who, Point(counted, chance.randint(1, 12 if counted == "ledger" else 60))))
        else:
            kills.append(Kill(who, after_s=chance.uniform(0.0, whole["took_s"] * 1.5 + 0.02)))
    return kills


def at_point(name: str, kinds: Mapping[str, Container[str]]) -> tuple[str, list[Kill]]:
    """The plan in which the point of that name is passed, and the deaths that lead there; `kinds`: events by plan.

    Raises
    ------
    Broken    There is none.
    """
    what = name.partition(":")[2]
    if what in RESUMING:
        return "gates", [Kill(point=Point("after:TurnStarted")), Kill(point=Point(name))]
    if name in SNAPSHOT_POINTS:
        return "filed", [Kill(point=Point(name))]
    plan = "gates" if name in CALL_POINTS else next((plan for plan, known in kinds.items() if what in known), None)
    if plan is None:
        raise Broken(f"no plan has the event {what}: give one of NAMED it, so that the run is killed there too")
    return plan, [Kill(point=Point(name))]


def play(folder: Path, seed: str, kills: list[Kill] | None = None) -> Scene:
    """One run with its deaths, drawn from its seed unless they are given; its `folder` stays only if it is `Broken`."""
    scene = Scene(folder, make(seed), kills or [])
    scene.prepare()
    if kills is None:
        scene.kills = draw_kills(seed, scene.whole, scene.plan.deciders)
    scene.play()
    shutil.rmtree(scene.folder)
    return scene


async def _in_memory() -> None:
    """A run on this thread's own loop."""
    steps = [cm.step("a", prompt="x", interactive=True, gate="both"), cm.step("b", prompt="{{ a }}")]
    engine = cm.ScriptedEngine({"a": ["1"], "b": ["2"]})
    await cm.Workflow("warm", steps=steps).start(engine=engine, journal=":memory:", on_gate="approve", loop="kernel")


def warm_up() -> None:
    """Have everything that a life needs in memory, and leave no thread behind."""
    for kind in facts.TYPES.values():
        kind.model_rebuild()
    asyncio.run(_in_memory())
    gc.collect()
    gc.freeze()
    sys.stdout.flush()
