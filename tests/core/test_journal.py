"""The journal: what is written is there, what cannot be used is refused and left as it is."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import cm_notebook as cm
from cm_notebook import events as facts
from cm_notebook.errors import JournalBusy
from cm_notebook.journal import MIGRATIONS
from tests.helpers import gate, until


def flow(*steps: str) -> cm.Workflow:
    return cm.Workflow("j", agents=[cm.Agent(name.rstrip("?"), "x") for name in steps], steps=" -> ".join(steps))


def finished(path: Path, text: str = "hello") -> cm.Run:
    engine = cm.ScriptedEngine({"a": [text]})
    return flow("a").start(engine=engine, journal=path).wait(10)


def test_events_are_read_back_as_they_were(tmp_path: Path) -> None:
    run = finished(tmp_path / "j.db")
    read = cm.Journal(tmp_path / "j.db").events(run.id)
    assert read == run.events
    assert [event.seq for event in read] == list(range(1, len(read) + 1))
    assert cm.Run.open(run.id, tmp_path / "j.db")["a"].text == "hello"


@given(text=st.text(), reason=st.text(), value=st.recursive(st.none() | st.integers() | st.text(), st.lists))
def test_any_text_survives(text: str, reason: str, value: Any) -> None:
    for event in (
        cm_event("TurnFinished", step="a", path="a", attempt=1, text=text, output=value),
        cm_event("RunFinished", status="failed", reason=reason),
    ):
        again = facts.read(event.type, event.seq, event.at, facts.body(event))
        assert again == event


def test_events_of_a_step_are_in_memory_as_they_are_read() -> None:
    """They are made without a check of their own; a number of another type counts as that of its field."""

    class Counting:
        name = "counting"

        async def stream(self, request: cm.AgentRequest) -> Any:
            yield cm.SessionStarted("s-1")
            yield cm.UsageReported(cm.Usage(input_tokens=1, output_tokens=2), cost_usd=1, cost_estimated=True)
            yield cm.TurnDone("hello", output={"n": 1}, duration_s=2, note="a note")

    agents = [cm.Agent("a", "Begin with {{ goal }}."), cm.Agent("b", "Go on.")]
    workflow = cm.Workflow("j", agents=agents, steps="a -> b", inputs={"goal": "a plan"})
    events = workflow.start(engine=Counting(), journal=":memory:").wait(10).events
    assert [event.type for event in events].count("TurnFinished") == 2
    for event in events:
        again = facts.read(event.type, event.seq, event.at, facts.body(event))
        assert again == event
        assert facts.body(again) == facts.body(event)
        assert again.model_dump() == event.model_dump()
        assert list(vars(again)) == list(vars(event))


def cm_event(kind: str, **values: Any) -> Any:
    event = facts.TYPES[kind](**values)
    facts.place(event, 7, 1.5)
    return event


def test_undecodable_text_of_an_agent_is_kept_harmlessly(tmp_path: Path) -> None:
    run = finished(tmp_path / "j.db", "bad \udcff byte \x00 nul")
    assert cm.Run.open(run.id, tmp_path / "j.db")["a"].text == "bad ? byte \x00 nul"


def test_undecodable_text_of_a_prompt_is_sent_and_kept_harmlessly(tmp_path: Path) -> None:
    run = cm.Workflow("w", steps=[cm.step("a", prompt="bad \udcff byte")]).start(
        journal=tmp_path / "j.db", engine=cm.ScriptedEngine({"a": ["fine"]})
    )
    assert run.wait(10)["a"].prompt == cm.Run.open(run.id, tmp_path / "j.db")["a"].prompt == "bad ? byte"


def test_only_its_owner_reads_it_and_git_does_not_see_it(tmp_path: Path) -> None:
    engine = cm.ScriptedEngine({"a": ["x"]})
    flow("a").start(engine=engine).wait(10)
    journal = tmp_path / ".cm_notebook" / "journal.db"
    assert stat.S_IMODE(journal.stat().st_mode) == 0o600
    assert (tmp_path / ".cm_notebook" / ".gitignore").read_text() == "*\n"


def test_runs_lists_the_newest_first(tmp_path: Path) -> None:
    first, second = finished(tmp_path / "j.db"), finished(tmp_path / "j.db")
    assert [run.id for run in cm.runs(tmp_path / "j.db")] == [second.id, first.id]
    assert {run.status for run in cm.runs(tmp_path / "j.db")} == {"completed"}


def test_an_unknown_run_is_named_with_the_nearest(tmp_path: Path) -> None:
    run = finished(tmp_path / "j.db")
    with pytest.raises(cm.JournalError, match=f"Did you mean '{run.id}'"):
        cm.resume(run.id[:-1] + "x", journal=tmp_path / "j.db")


def _spoil_text(path: Path) -> None:
    path.write_text("this is no database, but a long enough text " * 100)


def _spoil_header(path: Path) -> None:
    path.write_bytes(b"\xff" * 200 + path.read_bytes()[200:])


def _spoil_cut(path: Path) -> None:
    _fold_in(path)
    path.write_bytes(path.read_bytes()[:5000])


def _spoil_cut_early(path: Path) -> None:
    _fold_in(path)
    path.write_bytes(path.read_bytes()[:50])


def _spoil_cut_late(path: Path) -> None:
    _fold_in(path)
    path.write_bytes(path.read_bytes()[:-1])


def _spoil_empty(path: Path) -> None:
    _fold_in(path)
    path.write_bytes(b"")


def _spoil_foreign(path: Path) -> None:
    for file in path.parent.glob(path.name + "*"):
        if file.is_file():
            file.unlink()
    with sqlite3.connect(path) as other:
        other.execute("CREATE TABLE events (id INTEGER)")
    other.close()


def _spoil_newer(path: Path) -> None:
    with sqlite3.connect(path) as ours:
        ours.execute(f"PRAGMA user_version={len(MIGRATIONS) + 1}")
    ours.close()


def _spoil_row(path: Path) -> None:
    with sqlite3.connect(path) as ours:
        ours.execute("UPDATE events SET body = substr(body, 1, 10) WHERE type = 'TurnFinished'")
    ours.close()


def _spoil_usage(path: Path) -> None:
    with sqlite3.connect(path) as ours:
        used = """json_set(body, '$.usage', json('{"input_tokens": "many"}'))"""
        ours.execute(f"UPDATE events SET body = {used} WHERE type = 'TurnFinished'")
    ours.close()


def _spoil_type(path: Path) -> None:
    with sqlite3.connect(path) as ours:
        ours.execute("UPDATE events SET type = 'Surprise' WHERE type = 'TurnFinished'")
    ours.close()


def _spoil_order(path: Path) -> None:
    with sqlite3.connect(path) as ours:
        ours.execute("DELETE FROM events WHERE type = 'TurnStarted'")
    ours.close()


def _fold_in(path: Path) -> None:
    with sqlite3.connect(path) as ours:
        ours.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    ours.close()
    for suffix in ("-wal", "-shm"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)


@pytest.fixture(scope="module")
def made_elsewhere(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A run that has ended, and the folder of its journal: made by another process, as this one keeps its own open."""
    script = (
        "import sys, cm_notebook as cm\n"
        "flow = cm.Workflow('j', agents=[cm.Agent('a', 'x')], steps='a')\n"
        "print(flow.start(engine=cm.ScriptedEngine({'a': ['hello']}), journal=sys.argv[1]).wait(10).id)"
    )
    folder = tmp_path_factory.mktemp("elsewhere")
    command = [sys.executable, "-c", script, str(folder / "j.db")]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip(), folder


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (_spoil_text, "damaged or no journal"),
        (_spoil_header, "damaged or no journal"),
        (_spoil_cut, "damaged"),
        (_spoil_cut_early, "damaged: it was cut off"),
        (_spoil_cut_late, "damaged: it was cut off"),
        (_spoil_empty, "is empty: it was cut off"),
        (_spoil_foreign, "a database of another program"),
        (_spoil_newer, "written by a newer version"),
        (_spoil_row, r"damaged at event 3 \(TurnFinished\)"),
        (_spoil_usage, r"damaged at event 3 \(TurnFinished\)"),
        (_spoil_type, "unknown type 'Surprise'"),
        (_spoil_order, "does not make sense at event 3"),
    ],
)
def test_what_cannot_be_used_is_refused_and_left_as_it_is(
    tmp_path: Path, made_elsewhere: tuple[str, Path], spoil: Any, words: str
) -> None:
    run_id, folder = made_elsewhere
    path = shutil.copytree(folder, tmp_path, dirs_exist_ok=True) / "j.db"
    spoil(path)
    before = path.read_bytes()
    with pytest.raises(cm.JournalError) as refused:
        cm.resume(run_id, journal=cm.Journal(path))
    assert re.search(words, str(refused.value)), str(refused.value)
    assert str(path) in str(refused.value)
    assert path.read_bytes() == before


def test_the_file_alone_holds_a_run_that_has_ended(tmp_path: Path) -> None:
    run = finished(tmp_path / "j.db")
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "j.db").write_bytes((tmp_path / "j.db").read_bytes())
    assert [found.id for found in cm.runs(tmp_path / "copy" / "j.db")] == [run.id]


def test_two_may_make_the_same_journal_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process opens it, and reads, as soon as it has its name."""
    monkeypatch.setattr("cm_notebook.journal.BUSY_S", 0.1)
    link, others = os.link, []

    def and_read(draft: Path, path: Path) -> None:
        link(draft, path)
        others.append(sqlite3.connect(path, isolation_level=None))
        others[-1].execute("BEGIN")
        others[-1].execute("SELECT * FROM runs").fetchall()

    monkeypatch.setattr("os.link", and_read)
    assert finished(tmp_path / "j.db").status == "completed"
    others[0].close()


def test_looking_makes_no_journal(tmp_path: Path) -> None:
    assert cm.runs(tmp_path / "typo.db") == []
    with pytest.raises(cm.JournalError, match="there is no journal"):
        cm.resume("r-1", journal=tmp_path / "typo.db")
    assert not (tmp_path / "typo.db").exists()


@pytest.mark.parametrize("where", ["a folder", "no/permission"])
def test_a_place_where_none_can_be(tmp_path: Path, where: str) -> None:
    target = tmp_path
    if where != "a folder":
        (tmp_path / "file").write_text("x")
        target = tmp_path / "file" / "j.db"
    with pytest.raises(cm.JournalError):
        finished(target)


def test_a_read_only_journal_says_so(tmp_path: Path) -> None:
    """Root may write everywhere, so the whole file system is made read-only for SQLite by its own switch."""
    finished(tmp_path / "j.db")
    journal = cm.Journal(tmp_path / "j.db")
    journal._writer.execute("PRAGMA query_only=1")
    with pytest.raises(cm.JournalError, match=r"is read-only\. Make it writable"):
        flow("a").start(engine=cm.ScriptedEngine({"a": ["x"]}), journal=journal)


def test_a_locked_journal_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cm_notebook.driving.PATIENCE_S", 0.05)
    finished(tmp_path / "j.db")
    other = sqlite3.connect(tmp_path / "j.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(cm.JournalError, match="is locked by another program"):
        flow("a").start(engine=cm.ScriptedEngine({"a": ["x"]}), journal=cm.Journal(tmp_path / "j.db"))
    other.execute("ROLLBACK")
    other.close()


def test_a_full_disk_loses_nothing_that_was_recorded(tmp_path: Path) -> None:
    """The page limit of SQLite stands for the end of the disk."""
    journal = cm.Journal(tmp_path / "j.db")
    big = cm.ScriptedEngine({"a": ["x" * 200], "b": ["y" * 3_000_000], "c": ["z"]})
    run = flow("a?", "b", "c").start(engine=big, journal=journal)
    gate(run)
    pages = journal._writer.execute("PRAGMA page_count").fetchone()[0]
    journal._writer.execute(f"PRAGMA max_page_count={pages + 20}")
    run.approve()
    feed = run.watch(lambda: None)
    with pytest.raises(cm.JournalError, match="the disk is full"):
        run.wait(10)
    assert (run.status, "disk is full" in run.state.reason) == ("failed", True)
    assert "TurnFinished" not in [type(event).__name__ for event in feed.take()], "only what is on disk is shown"
    assert run.events[-1].type == "TurnStarted"
    with pytest.raises(cm.GatePending):
        _ = run["b"].text
    assert cm.Run.open(run.id, tmp_path / "j.db")["a"].text == "x" * 200
    journal._writer.execute("PRAGMA max_page_count=1000000000")
    again = cm.resume(run.id, journal=journal, engine=big).wait(10)
    assert again.status == "completed"
    assert [event.decision.action for event in again.events if event.type == "GateDecided"] == ["approve"]


def _gone(path: Path) -> None:
    for suffix in ("", "-wal", "-shm"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)


def _replaced(path: Path) -> None:
    """By another process that has made a journal of that name."""
    _gone(path)
    script = (
        "import sys, cm_notebook as cm\n"
        "cm.Workflow('other', steps=[cm.step('a', prompt='x')]).start(journal=sys.argv[1]).wait(10)"
    )
    subprocess.run([sys.executable, "-c", script, str(path)], check=True)


@pytest.mark.parametrize("away", [_gone, _replaced])
def test_a_file_that_is_gone_takes_no_decision_and_no_run(tmp_path: Path, away: Callable[[Path], None]) -> None:
    path = tmp_path / "j.db"
    engine = cm.ScriptedEngine({"a": ["x", "y"], "b": ["z"]})
    run = flow("a?", "b").start(engine=engine, journal=path)
    gate(run)
    away(path)
    others = [] if away is _gone else [found.id for found in cm.runs(path)]
    with pytest.raises(cm.JournalError, match=r"j\.db was deleted or replaced while it was in use.* Put the file back"):
        run.approve()
    assert run.status == "failed"
    assert "deleted or replaced" in run.state.reason
    new = flow("a").start(engine=engine, journal=path).wait(10)
    assert [found.id for found in cm.runs(path)] == [new.id, *others]
    script = "import sys, cm_notebook as cm; print(*[run.id for run in cm.runs(sys.argv[1])])"
    seen = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=True)
    assert seen.stdout.split() == [new.id, *others]


def test_a_file_that_is_put_back_is_the_same_journal(tmp_path: Path) -> None:
    (tmp_path / "at").mkdir()
    run = flow("a?").start(engine=cm.ScriptedEngine({"a": ["x"]}), journal=tmp_path / "at" / "j.db")
    gate(run)
    (tmp_path / "at").rename(tmp_path / "elsewhere")
    with pytest.raises(cm.JournalError, match="deleted or replaced"):
        run.approve()
    (tmp_path / "elsewhere").rename(tmp_path / "at")
    again = cm.resume(run.id, journal=tmp_path / "at" / "j.db").approve().wait(10)
    assert again["a"].text == "x"


HOLDS = """
import sqlite3, sys
other = sqlite3.connect(sys.argv[1], isolation_level=None)
other.execute("BEGIN IMMEDIATE")
print("held", flush=True)
sys.stdin.readline()
other.execute("ROLLBACK")
other.close()
"""


@contextlib.contextmanager
def held(path: Path) -> Iterator[Callable[[], None]]:
    """Another program has the write lock, until what this gives is called."""
    command = [sys.executable, "-c", HOLDS, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"

        def let_go() -> None:
            other.communicate("\n")

        yield let_go
        if other.poll() is None:
            let_go()


class Counting(cm.Journal):
    """Counts how often another program was in the way."""

    refused = 0

    def begin(self, run_id: str, after: int) -> Any:
        try:
            return super().begin(run_id, after)
        except JournalBusy:
            self.refused += 1
            raise


def slow(release: threading.Event, calls: list[int]) -> cm.Workflow:
    """``a``, which answers when it is told to, then ``b``."""

    @cm.agent("a")
    def a(turn: cm.Turn) -> str:
        calls.append(turn.attempt)
        release.wait(20)
        return "dear words"

    @cm.agent("b")
    def b(turn: cm.Turn) -> str:
        return f"after {turn.outputs['a']}"

    return cm.Workflow("slow", agents=[a, b], steps="a -> b")


def test_what_finished_waits_until_another_program_lets_go(tmp_path: Path) -> None:
    journal, release, calls = Counting(tmp_path / "j.db"), threading.Event(), list[int]()
    run = slow(release, calls).start(journal=journal)
    until(lambda: calls, "the turn to run")
    with held(tmp_path / "j.db") as let_go:
        release.set()
        until(lambda: journal.refused >= 5, "the lock to be in the way")
        assert (run.status, run["a"].status, run.events[-1].type) == ("running", "running", "TurnStarted")
        let_go()
        run.wait(20)
    assert (run["a"].text, run["b"].text, calls) == ("dear words", "after dear words", [1])


def test_who_decides_waits_until_another_program_lets_go(tmp_path: Path) -> None:
    journal = Counting(tmp_path / "j.db")
    run = flow("a?").start(engine=cm.ScriptedEngine({"a": ["one"]}), journal=journal)
    gate(run)
    other = cm.Run(run.id, Counting(tmp_path / "j.db"))  # as another process would have it
    with held(tmp_path / "j.db") as let_go:
        clicks = [threading.Thread(target=handle.approve) for handle in (run, other)]
        failures: list[Any] = []
        hook, threading.excepthook = threading.excepthook, failures.append
        for click in clicks:
            click.start()
        until(lambda: journal.refused >= 5 and other._journal.refused >= 5, "the lock to be in the way")  # type: ignore[union-attr]
        assert (run.status, other.status, len(other.gates)) == ("waiting", "waiting", 1)
        let_go()
        for click in clicks:
            click.join()
        threading.excepthook = hook
    assert run.wait(20).status == "completed"
    assert [failure.exc_type for failure in failures] == [cm.AlreadyDecided]


def test_a_lock_that_stays_ends_the_run_here_and_loses_only_what_was_not_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cm_notebook.driving.PATIENCE_S", 0.3)
    journal, release, calls = Counting(tmp_path / "j.db"), threading.Event(), list[int]()
    run = slow(release, calls).start(journal=journal)
    until(lambda: calls, "the turn to run")
    on_disk, feed = run.events, run.watch(lambda: None)
    with held(tmp_path / "j.db"):
        release.set()
        with pytest.raises(cm.JournalError, match="is locked by another program"):
            run.wait(20)
        assert (run.status, run["a"].attempts[0].cut_short is not None) == ("failed", True)
        assert (feed.take(), run.events) == ([], on_disk)
        with pytest.raises(cm.JournalError, match="is locked by another program"):
            run.go_on()
        assert run.status == "failed"
    run.go_on().wait(20)
    assert (run.status, run["b"].text, calls) == ("completed", "after dear words", [1, 2])
    assert cm.Run.open(run.id, cm.Journal(tmp_path / "j.db")).state == run.state


def test_a_run_is_there_with_its_first_event_or_not_at_all(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys, cm_notebook as cm\n"
        "cm.Journal.commit = lambda *given: os.kill(os.getpid(), signal.SIGKILL)\n"
        "flow = cm.Workflow('j', agents=[cm.Agent('a', 'x')], steps='a')\n"
        "flow.start(engine=cm.ScriptedEngine({'a': ['hello']}), journal=sys.argv[1])"
    )
    run = finished(tmp_path / "j.db")
    killed = subprocess.run([sys.executable, "-c", script, str(tmp_path / "j.db")], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert [found.id for found in cm.runs(tmp_path / "j.db")] == [run.id]


def test_a_row_without_events_is_no_run(tmp_path: Path) -> None:
    run = finished(tmp_path / "j.db")
    with sqlite3.connect(tmp_path / "j.db") as ours:
        ours.execute("INSERT INTO runs (id, name, created_at) VALUES ('r-empty', 'j', 0)")
    ours.close()
    assert [found.id for found in cm.runs(tmp_path / "j.db")] == [run.id]


def test_no_lock_is_left_behind(tmp_path: Path) -> None:
    finished(tmp_path / "j.db")
    run = flow("a?").start(engine=cm.ScriptedEngine({"a": ["one"]}), journal=tmp_path / "j.db")
    gate(run)
    assert [file.stem for file in (tmp_path / "j.db-locks").iterdir()] == [run.id]
    run.stop().wait(10)
    assert list((tmp_path / "j.db-locks").iterdir()) == []


def test_a_start_that_fails_lets_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*given: Any) -> None:
        raise ZeroDivisionError("ours")

    changed = flow("a")
    changed.inputs["goal"] = object()
    with pytest.raises(cm.WorkflowError, match="input 'goal' holds a value of type object"):
        changed.start(journal=tmp_path / "j.db")
    assert not (tmp_path / "j.db").exists()
    monkeypatch.setattr("cm_notebook.edits.fingerprints", broken)
    with pytest.raises(ZeroDivisionError):
        flow("a").start(journal=tmp_path / "j.db")
    assert list((tmp_path / "j.db-locks").iterdir()) == []


def test_of_many_who_want_to_drive_one_does(tmp_path: Path) -> None:
    """Also while the file of the lock is removed again and again."""
    journals = [cm.Journal(tmp_path / "j.db") for _ in range(4)]
    driving, most = [0], [0]
    taken = [0] * len(journals)

    def drive(number: int) -> None:
        for _ in range(50):
            try:
                journals[number].drive("r-1")
            except cm.RunLocked:
                continue
            driving[0] += 1
            most[0] = max(most[0], driving[0])
            taken[number] += 1
            driving[0] -= 1
            journals[number].release("r-1")

    threads = [threading.Thread(target=drive, args=(number,)) for number in range(len(journals))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (most, sum(taken) > 0) == ([1], True)
    assert not journals[0].driven("r-1")


DRIVES = """
import sys, cm_notebook as cm
flow = cm.Workflow("d", agents=[cm.Agent("a", "x"), cm.Agent("b", "y")], steps="a? -> b?")
run = flow.start(engine=cm.ScriptedEngine({"a": ["one"], "b": ["two"]}), journal=sys.argv[1])
print(run.id, flush=True)
run.wait(60)
"""


async def test_who_only_looks_sees_what_is_there_now(tmp_path: Path) -> None:
    command = [sys.executable, "-c", DRIVES, str(tmp_path / "j.db")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as driver:
        assert driver.stdout is not None
        run = cm.Run.open(driver.stdout.readline().strip(), tmp_path / "j.db")
        assert gate(run).step == "a"
        told = []
        async for thing in run.stream():
            told.append(type(thing).__name__)
            if told.count("GateOpened") > told.count("GateDecided") and run.gates:
                run.approve()
        assert told == [type(event).__name__ for event in run.events]
        assert (run.status, run["b"].text, run.gates) == ("completed", "two", [])
        driver.wait(20)


async def test_a_stream_ends_when_the_driver_is_gone(tmp_path: Path) -> None:
    command = [sys.executable, "-c", DRIVES, str(tmp_path / "j.db")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as driver:
        assert driver.stdout is not None
        run = cm.Run.open(driver.stdout.readline().strip(), tmp_path / "j.db")
        gate(run)
        last = ""
        async for thing in run.stream():
            last = type(thing).__name__
            driver.kill()
        assert (last, run.status) == ("GateOpened", "waiting")
    assert (
        cm.resume(run.id, journal=tmp_path / "j.db", engine=cm.ScriptedEngine({})).stop().wait(10).status == "stopped"
    )


def test_a_second_process_is_locked_out_and_may_still_decide(tmp_path: Path) -> None:
    run = flow("a?", "b").start(engine=cm.ScriptedEngine({"a": ["one"], "b": ["two"]}), journal=tmp_path / "j.db")
    opened = gate(run)
    script = (
        "import sys, cm_notebook as cm\n"
        "run_id, path, gate = sys.argv[1:]\n"
        "try: cm.resume(run_id, journal=path)\n"
        "except cm.RunLocked as error: print('locked', error)\n"
        "other = cm.Run.open(run_id, path)\n"
        "for ask in (other.wait, other.next):\n"
        "    try: ask()\n"
        "    except cm.TransitionError as error: print('elsewhere', error)\n"
        "print(other.gates[0].id)\n"
        "other.decide(gate, cm.Decision(action='approve', by='the other process'))\n"
        "try: other.decide(gate, cm.Decision(action='skip'))\n"
        "except cm.AlreadyDecided as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, run.id, str(tmp_path / "j.db"), opened.id],
        capture_output=True,
        text=True,
        check=True,
    )
    first, *asked, second, third = done.stdout.splitlines()
    assert len(asked) == 2
    assert all("is driven elsewhere, by another process or" in each for each in asked), "cm.resume would be refused"
    assert first.startswith("locked")
    assert "driven by another process" in first
    assert second == opened.id
    assert third.startswith("already approved by the other process")
    assert run.wait(10).status == "completed"
    with pytest.raises(cm.AlreadyDecided, match="already approved by the other process"):
        run.approve("a")


def test_two_handles_of_one_process_see_each_other(tmp_path: Path) -> None:
    run = flow("a?").start(engine=cm.ScriptedEngine({"a": ["one"]}), journal=tmp_path / "j.db")
    opened = gate(run)
    assert cm.runs(tmp_path / "j.db")[0] is run
    stranger = cm.Run(run.id, cm.Journal(tmp_path / "j.db"))
    stranger._driver.read_on()
    stranger.approve()
    until(lambda: run.status == "completed", "the driver to notice")
    with pytest.raises(cm.AlreadyDecided):
        stranger.decide(opened.id, cm.Decision(action="approve"))


def test_who_drives_is_let_go_at_the_end(tmp_path: Path) -> None:
    run = flow("a?").start(engine=cm.ScriptedEngine({"a": ["one"]}), journal=tmp_path / "j.db")
    gate(run)
    run.stop().wait(10)
    script = "import sys, cm_notebook as cm; cm.resume(sys.argv[1], journal=sys.argv[2]); print('driven')"
    done = subprocess.run(
        [sys.executable, "-c", script, run.id, str(tmp_path / "j.db")], capture_output=True, text=True, check=True
    )
    assert done.stdout == "driven\n"


def test_the_log_has_room_from_the_start_and_stays_short(tmp_path: Path) -> None:
    """Each commit that makes the log longer takes about twice as long as one that writes over what is there."""
    log = tmp_path / "j.db-wal"
    names = [f"s{number}" for number in range(300)]
    engine = cm.ScriptedEngine({name: ["t" * 1024] for name in names})
    run = flow("s0?", *names[1:]).start(engine=engine, journal=tmp_path / "j.db")
    gate(run)
    assert log.stat().st_size >= 256 * 1024
    run.approve().wait(30)
    assert log.stat().st_size <= 1.25 * 1024 * 1024, "all that was written to it are 2.4 MiB"
    assert len(run.events) == 2 * 300 + 4, "what made room is not among them"


def test_a_chain_stores_each_text_once(tmp_path: Path) -> None:
    """New text and at most 1 KiB a step, also when every prompt holds everything before it."""
    for context in ("previous", "all"):
        steps = [cm.step("a", id=f"s{number}", context=context) for number in range(120)]
        run = cm.Workflow("c", agents=[cm.Agent("a", "x")], steps=steps).start(
            engine=cm.ScriptedEngine({"a": ["t" * 1024] * 120}), journal=tmp_path / f"{context}.db"
        )
        run.wait(30)
        _fold_in(tmp_path / f"{context}.db")
        started = sum(len(facts.body(event)) for event in run.events if event.type == "RunStarted")
        size = (tmp_path / f"{context}.db").stat().st_size
        assert size - started <= 120 * (1024 + 1024) + 32768, context
    assert run["s119"].prompt.count("t" * 1024) == 119
