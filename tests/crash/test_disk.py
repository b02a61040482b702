"""A disk that is full, read-only or slow: a clear error, nothing lost, and the run goes on when there is a disk again.

Real file systems of a few hundred kilobytes where this user may mount them; a limit on the size of files elsewhere.
"""

from __future__ import annotations

import contextlib
import resource
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

import cm_notebook as cm
from cm_notebook.events import AnyEvent
from tests.crash.harness import check, read_rows
from tests.crash.plans import Ledger, Plan, make, read_lines
from tests.helpers import gate, until


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Function that mounts a file system in memory; skipped where this user may not."""
    mounted: list[Path] = []

    def mount(options: str) -> Path:
        place = tmp_path / f"disk{len(mounted)}"
        place.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)]
        if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("this user may not mount file systems")
        mounted.append(place)
        return place

    yield mount
    for place in mounted:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def flow() -> cm.Workflow:
    steps = [cm.step("a", prompt="x", interactive=True), *(cm.step(name, prompt="y") for name in "bcd")]
    return cm.Workflow("disk", steps=steps)


BIG = cm.ScriptedEngine({"a": ["small"], "b": ["b" * 60_000], "c": ["c" * 60_000], "d": ["d"]})


def fill(disk: Path) -> None:
    """Leave no byte free."""
    with (disk / "filler").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"\0" * 1024)


def goes_on(run: cm.Run, path: Path, kept: list[AnyEvent]) -> None:
    """All that was recorded is there, and the run comes to its end."""
    assert cm.Run.open(run.id, path).events[: len(kept)] == kept
    again = cm.resume(run.id, journal=path, engine=BIG)
    if again.gates:
        again.approve()
    assert again.wait(20).status == "completed"
    assert [len(step.text) for step in again] == [5, 60_000, 60_000, 1]
    answers = Counter(event.gate_id for event in again.events if event.type == "GateDecided")
    assert list(answers.values()) == [1]


def test_full_while_a_turn_is_recorded(mount: Callable[..., Path]) -> None:
    """The decision was taken while there was room; the turn after it finds none."""
    disk = mount("size=600k")
    run = flow().start(engine=BIG, journal=disk / "j.db")
    gate(run)
    (disk / "filler").write_bytes(b"\0" * 400_000)
    run.approve()
    with pytest.raises(cm.JournalError, match=r"the disk is full\. What is recorded is safe; make room and resume"):
        run.wait(20)
    assert run.status == "failed"
    kept = run.events
    assert any(event.type == "GateDecided" for event in kept)
    (disk / "filler").unlink()
    goes_on(run, disk / "j.db", kept)


def test_full_when_a_person_decides(mount: Callable[..., Path]) -> None:
    """Who decides is told that it was not recorded; the gate is open again when there is room."""
    disk = mount("size=600k")
    run = flow().start(engine=BIG, journal=disk / "j.db")
    gate(run)
    kept = run.events
    fill(disk)
    for _ in range(60):  # SQLite may still have a page or two that it can use again
        try:
            run.approve() if run.gates else run.pause()
        except cm.CodeMachineError as error:
            refused = error
            break
    else:
        pytest.fail("the disk is never full")
    assert "the disk is full" in str(refused)
    (disk / "filler").unlink()
    goes_on(run, disk / "j.db", kept)


def test_full_where_a_journal_should_be_made(mount: Callable[..., Path]) -> None:
    disk = mount("size=100k")
    fill(disk)
    with pytest.raises(cm.JournalError, match="disk is full"):
        flow().start(engine=BIG, journal=disk / "j.db")
    (disk / "filler").unlink()
    assert [file.name for file in disk.iterdir()] == [], "no half of one is left"


def test_a_file_may_not_grow(tmp_path: Path) -> None:
    """``ulimit -f``, or the quota of a user."""
    run = flow().start(engine=BIG, journal=tmp_path / "j.db")
    gate(run)
    kept, limits = run.events, resource.getrlimit(resource.RLIMIT_FSIZE)
    size = (tmp_path / "j.db-wal").stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20_000, limits[1]))
    try:
        run.approve()
        with pytest.raises(cm.JournalError, match=r"j\.db could not be read or written: .*What is recorded is safe"):
            run.wait(20)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    goes_on(run, tmp_path / "j.db", kept)


def test_a_read_only_disk(mount: Callable[..., Path], tmp_path: Path) -> None:
    """It is said before anything runs, and what is there stays as it is."""
    disk = mount("size=2m")
    journal = cm.Journal(disk / "j.db")
    run = flow().start(engine=BIG, journal=journal)
    gate(run)
    run.stop().wait(20)
    kept = run.events
    journal.close()
    before = (disk / "j.db").read_bytes()
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    with pytest.raises(cm.JournalError, match=r"is read-only|cannot be opened: is its folder there and writable"):
        cm.resume(run.id, journal=cm.Journal(disk / "j.db"), engine=BIG)
    with pytest.raises(cm.JournalError, match=r"read-only|cannot be opened"):
        flow().start(engine=BIG, journal=disk / "new.db")
    assert (disk / "j.db").read_bytes() == before
    subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
    goes_on(run, disk / "j.db", kept)


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
