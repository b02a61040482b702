"""A disk that is full, read-only or slow: a clear error, nothing lost, and the run goes on when there is a disk again.

Each in two ways: on a real file system of a few megabytes, where this user may mount one; and everywhere with
what SQLite and the operating system offer instead: a limit of pages, a limit on the size of files, missing rights.
"""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import stat
import subprocess
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

import cm_notebook as cm
from cm_notebook.events import AnyEvent
from tests.crash.harness import check, read_rows
from tests.crash.plans import Ledger, Plan, make, read_lines
from tests.helpers import gate, powerless, until


class Mounted:
    """A disk of its own, in memory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)]
        if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("this user may not mount file systems")

    def fill(self, journal: cm.Journal, leave: int = 0) -> None:
        with (self.folder / "filler").open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(b"\0" * 1024)
        if leave:
            os.truncate(self.folder / "filler", (self.folder / "filler").stat().st_size - leave)

    def free(self) -> None:
        (self.folder / "filler").unlink(missing_ok=True)

    @contextlib.contextmanager
    def read_only(self) -> Iterator[None]:
        for way in ("ro", "rw"):
            subprocess.run(["mount", "-o", f"remount,{way}", str(self.folder)], check=True)
            if way == "ro":
                yield

    def gone(self) -> None:
        subprocess.run(["umount", "--lazy", str(self.folder)], check=True)


class Limited:
    """A folder in which one may lose the right to write, and a journal may have only so many pages."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._journals: list[cm.Journal] = []

    def fill(self, journal: cm.Journal, leave: int = 0) -> None:
        (size,) = journal._writer.execute("PRAGMA page_size").fetchone()
        (pages,) = journal._writer.execute("PRAGMA page_count").fetchone()
        journal._writer.execute(f"PRAGMA max_page_count={pages + leave // size}")
        self._journals.append(journal)

    def free(self) -> None:
        for journal in self._journals:
            journal._writer.execute("PRAGMA max_page_count=1000000000")

    @contextlib.contextmanager
    def read_only(self) -> Iterator[None]:
        files = [self.folder, *self.folder.iterdir()]
        modes = [file.stat().st_mode for file in files]
        for file, mode in zip(files, modes, strict=True):
            file.chmod(0o555 if stat.S_ISDIR(mode) else 0o444)
        with powerless():
            yield
        for file, mode in zip(files, modes, strict=True):
            file.chmod(mode)

    def gone(self) -> None:
        pass


@pytest.fixture(params=[Mounted, Limited])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Mounted | Limited]:
    """A disk that can be filled, and made read-only."""
    folder = request.getfixturevalue("reachable") if request.param is Limited else tmp_path / "disk"
    made = request.param(folder)
    yield made
    made.gone()


def flow() -> cm.Workflow:
    steps = [cm.step("a", prompt="x", interactive=True), *(cm.step(name, prompt="y") for name in "bcd")]
    return cm.Workflow("disk", steps=steps)


LARGE = 300_000
"""More characters than the journal has made room for ahead."""
BIG = cm.ScriptedEngine({"a": ["small"], "b": ["b" * LARGE], "c": ["c" * LARGE], "d": ["d"]})


def goes_on(run: cm.Run, path: Path, kept: list[AnyEvent]) -> None:
    """All that was recorded is there, and the run comes to its end."""
    assert cm.Run.open(run.id, path).events[: len(kept)] == kept
    again = cm.resume(run.id, journal=path, engine=BIG)
    if again.gates:
        again.approve()
    assert again.wait(20).status == "completed"
    assert [len(step.text) for step in again] == [5, LARGE, LARGE, 1]
    answers = Counter(event.gate_id for event in again.events if event.type == "GateDecided")
    assert list(answers.values()) == [1]


def test_full_while_a_turn_is_recorded(disk: Mounted | Limited) -> None:
    """The decision was taken while there was room; the turn after it finds none."""
    journal = cm.Journal(disk.folder / "j.db")
    run = flow().start(engine=BIG, journal=journal)
    gate(run)
    disk.fill(journal, leave=40_000)
    run.approve()
    with pytest.raises(cm.JournalError, match=r"the disk is full\. What is recorded is safe; make room and resume"):
        run.wait(20)
    assert run.status == "failed"
    kept = run.events
    assert any(event.type == "GateDecided" for event in kept)
    disk.free()
    goes_on(run, disk.folder / "j.db", kept)


def test_full_when_a_person_decides(disk: Mounted | Limited) -> None:
    """Who decides is told that it was not recorded; the gate is open again when there is room."""
    journal = cm.Journal(disk.folder / "j.db")
    run = flow().start(engine=BIG, journal=journal)
    gate(run)
    kept = run.events
    disk.fill(journal)
    with pytest.raises(cm.JournalError, match="the disk is full"):
        run.approve(output="longer than what the journal has room for " * 10_000)
    disk.free()
    goes_on(run, disk.folder / "j.db", kept)


def test_full_where_a_journal_should_be_made(tmp_path: Path) -> None:
    disk = Mounted(tmp_path / "disk")
    try:
        with (disk.folder / "filler").open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(b"\0" * 1024)
        with pytest.raises(cm.JournalError, match="disk is full"):
            flow().start(engine=BIG, journal=disk.folder / "j.db")
        disk.free()
        assert [file.name for file in disk.folder.iterdir()] == [], "no half of one is left"
    finally:
        disk.gone()


@contextlib.contextmanager
def limited(size: int) -> Iterator[None]:
    """No file may become larger: ``ulimit -f``, or the quota of a user."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_no_file_may_grow_where_a_journal_should_be_made(tmp_path: Path) -> None:
    folder = tmp_path / "new"
    folder.mkdir()
    with (
        limited(0),
        pytest.raises(cm.JournalError, match=r"j\.db could not be read or written: .*no limit \(ulimit -f\)"),
    ):
        flow().start(engine=BIG, journal=folder / "j.db")
    assert [file.name for file in folder.iterdir()] == [], "no half of one is left"


def test_a_file_may_not_grow(tmp_path: Path) -> None:
    run = flow().start(engine=BIG, journal=tmp_path / "j.db")
    gate(run)
    kept = run.events
    with limited((tmp_path / "j.db-wal").stat().st_size + 20_000):
        run.approve()
        with pytest.raises(cm.JournalError, match=r"j\.db could not be read or written: .*What is recorded is safe"):
            run.wait(20)
    goes_on(run, tmp_path / "j.db", kept)


def test_a_read_only_disk(disk: Mounted | Limited) -> None:
    """It is said before anything runs, and what is there stays as it is."""
    journal = cm.Journal(disk.folder / "j.db")
    run = flow().start(engine=BIG, journal=journal)
    gate(run)
    run.stop().wait(20)
    kept = run.events
    journal.close()
    before = (disk.folder / "j.db").read_bytes()
    with disk.read_only():
        with pytest.raises(cm.JournalError, match=r"is read-only|cannot be opened: is its folder there and writable"):
            cm.resume(run.id, journal=cm.Journal(disk.folder / "j.db"), engine=BIG)
        with pytest.raises(cm.JournalError, match=r"read-only|cannot be opened"):
            flow().start(engine=BIG, journal=disk.folder / "new.db")
    assert (disk.folder / "j.db").read_bytes() == before
    goes_on(run, disk.folder / "j.db", kept)


class SlowJournal(cm.Journal):
    """Every transaction takes as long as on a disk at the other end of a network."""

    def commit(self, run_id: str, events: Sequence[AnyEvent]) -> None:
        """Late, but all of it."""
        time.sleep(0.05)
        super().commit(run_id, events)


@pytest.mark.parametrize("name", ["gates", "teamed", "looped"])
def test_a_slow_disk(tmp_path: Path, name: str) -> None:
    """Nothing is shown and nothing runs before it is on disk, however long that takes."""
    plan: Plan = make(name)
    plan.ledger = Ledger(tmp_path / "ledger.jsonl")
    journal = SlowJournal(tmp_path / "j.db")
    run = plan.workflow.start(engine=plan.engine(), journal=journal)
    feed, seen, decided = run.watch(lambda: None), 0, []

    def over() -> bool:
        nonlocal seen
        for shown in feed.take():
            if isinstance(seq := getattr(shown, "seq", None), int) and seq:
                seen = max(seen, seq)
        assert len(read_rows(tmp_path / "j.db")) >= seen, "something was shown before it was on disk"
        for opened in run.gates:
            with run.reading() as state:
                decision = plan.answer(state, opened)
            run.decide(opened.id, decision)
            decided.append({"what": "decided", "gate": opened.id, "action": decision.action,
                            "feedback": decision.feedback, "output": decision.output})  # fmt: skip
            answered = [row.body["gate_id"] for row in read_rows(tmp_path / "j.db") if row.type == "GateDecided"]
            assert opened.id in answered, "who decided was told before it was on disk"
        return run.status == "completed"

    until(over, "its end", timeout_s=60)
    check(read_rows(tmp_path / "j.db"), read_lines(tmp_path / "ledger.jsonl"), decided, Counter())
    journal.close()
