"""Snapshots of the workspace in a run: what is shown, what is taken back, what is left alone. With the real git."""

from __future__ import annotations

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

import cm_notebook as cm
from cm_notebook.events import FileChange
from cm_notebook.journal import Journal, MemoryJournal
from cm_notebook.render import text
from tests import helpers
from tests.core.test_workspace import git, held, put, write

Work = Callable[[cm.Turn], object]


def until(condition: Callable[[], object]) -> None:
    helpers.until(condition, "it")


def agent(id: str, *works: Work | None) -> cm.Agent:
    """An agent of functions: the n-th attempt does the n-th, more than those the last one; it says which it was."""

    @cm.agent(id)
    def run(turn: cm.Turn) -> str:
        work = works[min(turn.attempt, len(works)) - 1]
        if work is not None:
            work(turn)
        return f"{id} {turn.attempt}"

    return run


def writes(**files: str | bytes) -> Work:
    def work(turn: cm.Turn) -> None:
        write(turn.workspace, **files)

    return work


def started(folder: Path | None, *agents: cm.Agent, steps: str = "", **options: object) -> cm.Run:
    """A run in `folder`, which waits at its first gate, or is over."""
    names = steps or " -> ".join(f"{one.id}?" for one in agents)
    return cm.Workflow("files", agents=agents, steps=names).start(
        workspace=folder, **{"journal": ":memory:", **options}
    )


def waiting(run: cm.Run, number: int = 1) -> cm.Run:
    """The run, when it waits at the gate of that attempt."""
    until(lambda: run.gates and run.gates[0].attempt == number)
    return run


def kinds(run: cm.Run) -> list[str]:
    return [event.type for event in run.events]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "work"
    made.mkdir()
    return made


def test_what_an_attempt_changed(folder):
    write(folder, a="1\n", gone="g\n")

    def work(turn):
        write(turn.workspace, a="1\n2\n", new="n\n", data=b"\0\1")
        (turn.workspace / "gone").unlink()

    run = waiting(started(folder, agent("one", work)))
    assert run["one"].files_changed == [
        FileChange("a", "modified", None, 1, 0),
        FileChange("data", "added"),
        FileChange("gone", "deleted", None, 0, 1),
        FileChange("new", "added", None, 1, 0),
    ]
    diff = run["one"].attempts[0].diff
    assert "--- a/a\n+++ b/a\n@@ -1 +1,2 @@\n 1\n+2\n" in diff
    assert "Binary files /dev/null and b/data differ" in diff
    run.approve()
    run.wait()


def test_what_changed_is_on_disk_before_the_gate_opens(folder):
    run = waiting(started(folder, agent("one", writes(a="1"))))
    assert kinds(run) == ["RunStarted", "TurnStarted", "SnapshotTaken", "TurnFinished", "GateOpened"]
    run.stop()


def test_each_step_has_its_own_changes(tmp_path, folder):
    run = started(
        folder,
        agent("one", writes(a="1\n")),
        agent("two", None),
        agent("three", writes(a="2\n", b="3\n")),
        steps="one -> two -> three",
        journal=tmp_path / "j.db",
    )
    run.wait()
    changed = [[change.path for change in step.files_changed] for step in run]
    assert changed == [["a"], [], ["a", "b"]]
    assert [
        [change.path for change in step.files_changed] for step in cm.Run.open(run.id, tmp_path / "j.db")
    ] == changed
    assert run["two"].attempts[0].diff == ""
    assert "-1\n+2\n" in run["three"].attempts[0].diff


def test_reject_brings_the_files_back_exactly(folder):
    put(folder / "deep" / "text", "1\r\n")
    put(folder / ".gitignore", "*.log\n")
    write(folder, gone="g", data=bytes(range(256)))
    put(folder / "x.log", "ignored")
    (folder / "tool").write_text("#!/bin/sh\n")
    (folder / "tool").chmod(0o755)
    (folder / "link").symlink_to("deep/text")
    before = held(folder)

    def spoil(turn):
        there = turn.workspace
        shutil.rmtree(there / "deep")
        write(there, data=b"\0", new="n", deep="a file now")
        (there / "gone").unlink()
        (there / "tool").chmod(0o644)
        (there / "link").unlink()
        put(there / "link" / "below", "a folder now")

    found = []
    run = waiting(started(folder, agent("one", spoil, lambda turn: found.append(held(turn.workspace)))))
    assert held(folder) != before
    run.reject("leave it alone")
    waiting(run, 2)
    assert found == [before]
    assert held(folder) == before
    assert run["one"].files_changed == []
    assert {change.path for change in run["one"].attempts[0].files_changed} >= {"deep/text", "data", "new"}
    assert "WorkspaceRestored" in kinds(run)
    run.approve()
    run.wait()


LARGE = ("x" * 79 + "\n") * 100_000


def link(there: Path, name: str, to: object) -> None:
    (there / name).symlink_to(str(to))


def committed(folder: Path) -> None:
    git(folder, "init", "--quiet", "-b", "main")
    git(folder, "add", "-A")
    git(folder, "commit", "-qm", "first")


def with_submodule(folder: Path) -> None:
    library = folder.parent / "library"
    write(library, inside="1")
    committed(library)
    committed(folder)
    git(folder, "-c", "protocol.file.allow=always", "submodule", "add", "-q", str(library), "inner")
    git(folder, "commit", "-qm", "second")


def with_nested(folder: Path) -> None:
    write(folder / "inner", inside="1")
    committed(folder / "inner")


def in_inner(there: Path) -> None:
    write(there / "inner", inside="2", more="m")
    git(there / "inner", "commit", "-qam", "by the agent")
    write(there, kept="2\n")


CHANGED = [FileChange("kept", "modified", None, 1, 1)]
KINDS: dict[str, tuple[Callable[[Path], object], Callable[[Path], object], list[FileChange], set[str]]] = {
    "new": (lambda _: None, lambda at: put(at / "a" / "b", "1\n"), [FileChange("a/b", "added", None, 1, 0)], set()),
    "deleted": (lambda _: None, lambda at: (at / "kept").unlink(), [FileChange("kept", "deleted", None, 0, 1)], set()),
    "renamed": (
        lambda _: None,
        lambda at: (at / "kept").rename(at / "other"),
        [FileChange("other", "renamed", "kept", 0, 0)],
        set(),
    ),
    "binary": (
        lambda at: write(at, data=b"\0\1"),
        lambda at: write(at, data=b"\0\2"),
        [FileChange("data", "modified")],
        set(),
    ),
    "large": (lambda _: None, lambda at: write(at, large=LARGE), [FileChange("large", "added")], set()),
    "a link out of the folder": (
        lambda at: link(at, "link", at.parent / "nowhere"),
        lambda at: ((at / "link").unlink(), link(at, "link", at.parent)),
        [FileChange("link", "modified", None, 1, 1)],
        set(),
    ),
    "ignored": (
        lambda at: put(at / ".gitignore", "*.log\n"),
        lambda at: (put(at / "x.log", "1"), write(at, kept="2\n")),
        CHANGED,
        {"x.log"},
    ),
    "a nested repository": (with_nested, in_inner, CHANGED, {"inner/inside", "inner/more"}),
    "a submodule": (with_submodule, in_inner, CHANGED, {"inner/inside", "inner/more"}),
}
"""What was there, what an agent does, what is shown of it, and what Reject leaves alone."""


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_files(folder, kind):
    before, does, shown, left = KINDS[kind]
    write(folder, kept="1\n")
    before(folder)

    def ours() -> dict[str, tuple[int, bytes]]:
        return {name: it for name, it in held(folder).items() if ".git/" not in name and name not in left}

    there = ours()
    run = waiting(started(folder, agent("one", lambda turn: does(turn.workspace), None)))
    assert run["one"].files_changed == shown
    run.reject("again")
    waiting(run, 2)
    assert ours() == there
    assert left <= held(folder).keys()
    run.stop()


def test_approve_with_another_output_leaves_the_files(folder):
    run = waiting(started(folder, agent("one", writes(a="1"))))
    run.approve(output="mine")
    run.wait()
    assert (folder / "a").read_text() == "1"
    assert [change.path for change in run["one"].files_changed] == ["a"]


def test_what_was_changed_by_hand_while_the_gate_was_open_is_not_lost(folder):
    write(folder, a="1")
    run = waiting(started(folder, agent("one", writes(a="2"), writes(b="b"))))
    write(folder, a="by hand", mine="m")
    run.reject("again")
    waiting(run, 2)
    assert {name: content for name, (_, content) in held(folder).items()} == {"a": b"1", "b": b"b"}
    assert run["one"].attempts[1].kept_total == 2
    run.restore_files("one", "kept")
    assert (folder / "a").read_text() == "by hand"
    assert (folder / "mine").read_text() == "m"
    assert not (folder / "b").exists()
    run.restore_files("one", "after", attempt=1)
    assert {name: content for name, (_, content) in held(folder).items()} == {"a": b"2"}
    run.restore_files("one", "before")
    assert (folder / "a").read_text() == "1"
    run.stop()


def test_files_that_cannot_be_brought_back_so(folder):
    run = waiting(started(folder, agent("one", writes(a="2"))))
    with pytest.raises(cm.TransitionError, match=r"attempt 1 of 'one' has no snapshot 'kept'.*before, after"):
        run.restore_files("one", "kept")
    with pytest.raises(cm.WorkflowError, match=r"Did you mean 'after'"):
        run.restore_files("one", "aftr")
    run.stop()


def test_what_was_changed_by_hand_before_an_attempt_stays_when_it_is_rejected(folder):
    def fails(turn):
        write(turn.workspace, a="half")
        raise cm.EngineError("no")

    run = started(folder, agent("one", fails, writes(b="2"), None))
    until(lambda: run.gates and run.gates[0].kind == "failed")
    write(folder, mine="m")
    run.retry()
    waiting(run, 2)
    run.reject("again")
    waiting(run, 3)
    assert held(folder).keys() == {"a", "mine"}
    run.stop()


def test_what_comes_into_an_empty_folder_while_a_gate_is_open_is_not_the_next_steps(folder):
    run = started(folder, agent("one", None), agent("two", writes(b="2"), None))
    waiting(run)
    write(folder, mine="m")
    run.approve()
    until(lambda: run.gates and run.gates[0].step == "two")
    assert [change.path for change in run["two"].files_changed] == ["b"]
    run.reject("again")
    waiting(run, 2)
    assert held(folder).keys() == {"mine"}
    run.stop()


def test_a_failed_attempt_that_is_tried_again_goes_on_with_its_files(folder):
    def fails(turn):
        write(turn.workspace, a="half")
        raise cm.EngineError("no")

    run = started(folder, agent("one", fails, writes(b="2"), None))
    until(lambda: run.gates and run.gates[0].kind == "failed")
    assert [change.path for change in run["one"].files_changed] == ["a"]
    run.retry()
    waiting(run, 2)
    assert [change.path for change in run["one"].files_changed] == ["a", "b"], "what Reject would take back"
    run.reject("all of it")
    waiting(run, 3)
    assert held(folder) == {}
    run.stop()


def test_running_a_step_again_brings_its_files_back(folder):
    seen = []
    run = started(
        folder,
        agent("one", writes(a="1")),
        agent("two", writes(a="2", b="2"), lambda turn: seen.append(held(turn.workspace))),
        agent("three", writes(c="3")),
        steps="one -> two -> three",
    )
    run.wait()
    run.rerun("two", later=True).wait()
    assert [files.keys() for files in seen] == [{"a"}]
    assert seen[0]["a"][1] == b"1"
    assert held(folder).keys() == {"a", "c"}


def test_a_step_that_is_cut_short_and_run_again_begins_with_its_files_as_they_were(folder):
    write(folder, a="1")
    at_work, go = [], []

    def work(turn):
        write(turn.workspace, a="half")
        at_work.append(turn)
        until(lambda: go)

    seen = []
    run = started(folder, agent("one", work, lambda turn: seen.append((turn.workspace / "a").read_text())))
    until(lambda: at_work)
    run.rerun("one")
    waiting(run, 2)
    go.append(True)
    assert seen == ["1"]
    run.stop()


@pytest.mark.parametrize("how", ["rewind", "fork", "fork into a folder"])
def test_who_goes_back_finds_the_files_of_then(folder, tmp_path, monkeypatch, how):
    monkeypatch.chdir(tmp_path)
    seen = []
    run = started(
        folder,
        agent("one", writes(a="1")),
        agent("two", writes(a="2", b="2"), lambda turn: seen.append(held(turn.workspace))),
        agent("three", writes(c="3")),
        steps="one -> two -> three",
    ).wait()
    after = held(folder)
    mine = tmp_path / "mine"
    write(mine, d="mine")
    if how == "rewind":
        other = run.rewind("two")
    else:
        other = run.fork("two", **({"workspace": mine} if how == "fork into a folder" else {}))
    waits = "Back at two: nothing runs until you go on. The files are as they were before two when it begins, not yet"
    assert waits in text.sentence(other.state)
    assert "but kept: `run.restore_files('two', 'kept')`." in text.sentence(other.state)
    assert held(folder) == after, "the folder is not touched before"
    if how == "rewind":
        write(folder, mine="by hand")
    other.unpause().wait()
    assert [{name: about[1] for name, about in files.items()} for files in seen] == [{"a": b"1"}]
    if how == "rewind":
        assert "mine" not in held(folder)
        other.restore_files("two", "kept")
        assert held(folder)["mine"][1] == b"by hand"
    if how != "rewind":
        assert held(folder) == after
        assert other["one"].files_changed == run["one"].files_changed
    if how == "fork into a folder":
        assert held(mine).keys() == {"a", "c"}
        other.restore_files("two", "kept")
        assert held(mine).keys() == {"d"}


def test_a_loop_refines_the_files(folder):
    @cm.agent("check")
    def check(turn):
        tries = (turn.workspace / "a").read_text()
        return cm.Verdict(action="continue" if tries == "xx" else "loop", reason="more")

    def more(turn):
        file = turn.workspace / "a"
        file.write_text((file.read_text() if file.exists() else "") + "x")

    run = started(folder, agent("one", more), check, steps="one -> check(loop 1, max 5)")
    run.wait()
    assert (folder / "a").read_text() == "xx"
    first, second = run["one"].attempts
    assert (first.files_changed[0].kind, second.files_changed[0].kind) == ("added", "modified")


def test_chained_prompts_go_back_by_one(folder):
    @cm.agent("one")
    def work(turn):
        name = f"{turn.prompt[0]}{turn.attempt}"
        write(turn.workspace, **{name: "1"})
        return name

    steps = [cm.step("one", prompt=["p", "q"])]
    run = cm.Workflow("chain", agents=[work], steps=steps, autonomous_mode="never").start(
        workspace=folder, journal=":memory:", on_gate=lambda gate: "approve" if gate.kind == "start" else None
    )
    until(lambda: run.gates and run.gates[0].kind == "review")
    run.approve()
    until(lambda: run.gates and run.gates[0].kind == "review" and (folder / "q1").exists())
    assert [change.path for change in run["one"].files_changed] == ["p1", "q1"]
    run.reject("the second one again")
    waiting(run, 2)
    assert held(folder).keys() == {"p1", "q2"}
    run.stop()


def test_a_team_and_a_parallel_step(folder):
    @cm.agent("boss")
    async def boss(turn):
        await turn.run_agents("helper 'do it'")
        return "done"

    team = cm.Workflow(
        "team",
        agents=[boss, agent("helper", writes(h="1")), agent("left", writes(left="1")), agent("right", writes(r="1"))],
        steps=[cm.step("boss", interactive=True), cm.parallel("left", "right", interactive=True, id="both")],
        sub_agents=["helper"],
    )
    run = waiting(team.start(workspace=folder, journal=":memory:"))
    assert [change.path for change in run["boss"].files_changed] == ["h"]
    run.reject("again")
    waiting(run, 2)
    run.approve()
    until(lambda: run.gates and run.gates[0].step == "both")
    assert [change.path for change in run["both"].files_changed] == ["left", "r"]
    run.reject("again")
    until(lambda: run.gates and run.gates[0].step == "both" and run.gates[0].attempt == 2)
    assert kinds(run).count("WorkspaceRestored") == 2
    assert held(folder).keys() == {"h", "left", "r"}
    run.stop()


@pytest.mark.parametrize("at_once", [1, 4])
def test_a_large_team_says_once_what_it_has_changed(folder, at_once):
    names = [f"m{number:02}" for number in range(40)]
    members = [agent(name, writes(**{f"{name}_txt": f"{name}\n" * 100})) for name in names]
    team = cm.parallel(*names, id="team", interactive=True, max_concurrency=at_once)
    flow = cm.Workflow("files", agents=members, steps=[team])
    run = waiting(flow.start(workspace=folder, journal=":memory:"))
    (attempt,) = run["team"].attempts
    assert attempt.files_total == 40
    assert [change.path for change in attempt.files_changed] == [f"{name}_txt" for name in names]
    taken = [event for event in run.events if event.type == "SnapshotTaken"]
    assert len(taken) <= at_once, "those who end at the same time may each say it"
    run.reject("once more")
    waiting(run, 2)
    assert run["team"].attempts[1].files_total == 40


def test_a_member_that_fails_hides_no_changes_of_the_others(folder):
    def fails(turn: cm.Turn) -> None:
        raise cm.EngineError("no")

    members = [agent("left", writes(left="l")), agent("wrong", fails), agent("right", writes(right="r"))]
    team = cm.parallel("left", "wrong", "right", id="team", interactive=True)
    flow = cm.Workflow("files", agents=members, steps=[team])
    run = flow.start(workspace=folder, journal=":memory:")
    until(lambda: [gate.kind for gate in run.gates] == ["failed"])
    until(lambda: run["team/left#1"].status == run["team/right#1"].status == "done")
    run.skip("team/wrong#1")
    until(lambda: [gate.kind for gate in run.gates] == ["review"])
    assert {change.path for change in run["team"].attempts[0].files_changed} == {"left", "right"}
    run.reject("once more")
    until(lambda: [gate.kind for gate in run.gates] == ["failed"])
    run.stop()


@pytest.mark.parametrize("where", [".", "packages/web"])
def test_the_users_own_repository_is_untouched(folder, where):
    git(folder, "init", "--quiet", "-b", "main")
    write(folder, tracked="1", staged="1")
    git(folder, "add", "-A")
    git(folder, "commit", "-qm", "first")
    write(folder, tracked="stashed")
    git(folder, "stash", "-q")
    write(folder, staged="2", untracked="u")
    git(folder, "add", "staged")
    ours, before = held(folder / ".git"), held(folder)  # HEAD, branches, index, stash, and all else
    work = agent("one", writes(tracked="x", staged="x", new="n", untracked="x"), None)
    run = waiting(started(folder / where, work))
    assert len(run["one"].files_changed) == 4
    run.reject("no")
    waiting(run, 2)
    assert held(folder / ".git") == ours
    assert held(folder) == before
    run.stop()


def test_a_run_without_files_records_nothing_more(tmp_path):
    run = started(None, agent("one", None), agent("two", None), steps="one -> two", journal=tmp_path / "j.db")
    run.wait()
    assert {kind for kind in kinds(run) if "Snapshot" in kind or "Workspace" in kind} == set()
    assert not (tmp_path / "snapshots.git").exists()


def test_what_we_write_ourselves_and_the_notebook_are_left_out(tmp_path, monkeypatch):
    monkeypatch.setenv("JPY_SESSION_NAME", str(tmp_path / "build.ipynb"))
    write(tmp_path, **{"build.ipynb": "0", "a": "1"})

    def work(turn):
        write(tmp_path, **{"build.ipynb": "saved by JupyterLab", "a": "2"})
        put(tmp_path / ".ipynb_checkpoints" / "build-checkpoint.ipynb", "0")

    run = waiting(started(tmp_path, agent("one", work, None), journal="j.db"))
    assert [change.path for change in run["one"].files_changed] == ["a"]
    run.reject("no")
    waiting(run, 2)
    assert (tmp_path / "build.ipynb").read_text() == "saved by JupyterLab"
    assert (tmp_path / "a").read_text() == "1"
    assert run["one"].files_changed == []
    run.stop()


def test_the_tape_that_is_recorded_is_left_out(folder):
    tape = folder / "tapes" / "t.jsonl"
    run = started(folder, agent("one", writes(a="1"), writes(b="2")), agent("two", None), record=tape)
    waiting(run)
    run.reject("again")
    waiting(run, 2)
    run.approve()
    until(lambda: run.gates and run.gates[0].step == "two")
    run.approve()
    run.wait()
    assert [[change.path for change in step.files_changed] for step in run] == [["b"], []]
    taped = [line["decision"]["action"] for line in map(json.loads, tape.read_text().splitlines()) if "gate" in line]
    assert taped == ["reject", "approve", "approve"], "Reject did not take it back"


def test_a_notebook_that_was_kept_once_is_not_brought_back(tmp_path, monkeypatch):
    work = tmp_path / "work"
    put(work / "build.ipynb", "0")
    waiting(started(work, agent("one", writes(a="1")), journal="j.db")).stop()
    monkeypatch.setenv("JPY_SESSION_NAME", str(work / "build.ipynb"))
    run = waiting(started(work, agent("one", writes(a="2"), None), journal="j.db"))
    write(work, **{"build.ipynb": "1"})
    run.reject("no")
    waiting(run, 2)
    assert (work / "build.ipynb").read_text() == "1"
    run.stop()


def test_without_git_it_is_said_once_and_the_run_goes_on(folder, monkeypatch):
    monkeypatch.setenv("PATH", "")
    run = started(folder, agent("one", writes(a="1")), agent("two", writes(a="2"), None), steps="one -> two?")
    waiting(run)
    assert kinds(run).count("SnapshotFailed") == 1
    assert "here is no git on this machine" in run._repr_mimebundle_()["text/html"]
    assert "here is no git on this machine" in run._repr_mimebundle_()["text/plain"]
    run.reject("again")
    waiting(run, 2)
    assert (folder / "a").read_text() == "2", "it could not be taken back, and that is said"
    run.approve()
    run.wait()


def test_a_snapshot_that_fails_is_said_at_the_step(folder, tmp_path):
    put(tmp_path / "snapshots.git", "no folder")
    run = waiting(started(folder, agent("one", writes(a="1")), journal="j.db"))
    assert run.status == "waiting"
    assert "snapshots.git" in (run["one"].attempts[0].unkept or "")
    assert "snapshots.git" in run["one"]._repr_mimebundle_()["text/html"]
    assert "snapshots.git" in run["one"]._repr_mimebundle_()["text/plain"]
    run.stop()


def test_files_that_cannot_be_taken_back_fail_the_step(folder, tmp_path):
    run = waiting(started(folder, agent("one", writes(a="1"), writes(b="2")), journal="j.db"))
    store = tmp_path / "snapshots.git"
    store.rename(tmp_path / "away")
    store.write_text("")
    run.reject("again")
    until(lambda: run.gates and run.gates[0].kind == "failed")
    assert "could not be brought back" in run["one"].attempts[-1].error.message
    assert not (folder / "b").exists(), "nothing ran on the wrong files"
    store.unlink()
    (tmp_path / "away").rename(store)
    run.retry()
    waiting(run, 3)
    assert held(folder).keys() == {"b"}
    run.stop()


def test_keys_are_not_kept_in_diffs(folder, monkeypatch):
    monkeypatch.setenv("ANTHROPIC_API_KEY", "sk-ant-planted-1234567890")
    monkeypatch.setattr(cm.keys, "_known", {})
    assert cm.keys.find("anthropic")
    run = waiting(started(folder, agent("one", writes(a="key = sk-ant-planted-1234567890\n"))))
    assert "+key = " in run["one"].attempts[0].diff
    assert "planted" not in run["one"].attempts[0].diff
    run.stop()


def test_snapshots_of_a_journal_in_memory_go_with_it(folder):
    from cm_notebook.files import store_of

    journal = MemoryJournal()
    run = waiting(started(folder, agent("one", writes(a="1")), journal=journal))
    store = store_of(journal)
    assert store.is_dir()
    assert stat.S_IMODE(store.stat().st_mode) == 0o700
    run.stop()


def test_a_time_limit_does_not_count_snapshots_and_keeps_what_was_done(folder):
    def work(turn):
        write(turn.workspace, a="1")
        until(lambda: run.gates)

    slow = agent("one", work)
    run = cm.Workflow("late", agents=[slow], steps=[cm.step("one", timeout_s=0.5)]).start(
        workspace=folder, journal=":memory:"
    )
    until(lambda: run.gates and run.gates[0].kind == "failed")
    assert [change.path for change in run["one"].files_changed] == ["a"]
    run.stop()


CHILD = """
import os, signal, sys
from pathlib import Path
import cm_notebook as cm
from cm_notebook import driving, files
from cm_notebook.workspace import Snapshots

where, point = sys.argv[1:]

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

@cm.agent("one")
def one(turn):
    (turn.workspace / "a").write_text(f"attempt {turn.attempt}")
    (turn.workspace / f"new{turn.attempt}").write_text("n")
    if point == "work":
        die()
    return "done"

if point == "before":
    Snapshots.take = die
elif point == "after":
    files.Files._changed = die
elif point == "restore":
    restore = Snapshots.restore
    def half(self, tree):
        restore(self, tree)
        (self.workspace / "a").write_text("half")
        die()
    Snapshots.restore = half
elif point == "restored":
    restore = Snapshots.restore
    def whole(self, tree):
        restore(self, tree)
        die()
    Snapshots.restore = whole

run = cm.Workflow("crash", agents=[one], steps="one?").start(workspace="work", journal="j.db")
print(run.id, flush=True)
while not run.gates:
    pass
run.reject("again")
run.wait()
"""


@pytest.mark.parametrize("point", ["before", "work", "after", "restore", "restored"])
def test_killed_at_any_point_the_files_are_right_when_it_goes_on(tmp_path, point):
    work = tmp_path / "work"
    write(work, a="mine")
    environment = {**os.environ, "CM_HEADLESS": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    child = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(CHILD), str(tmp_path), point],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert child.returncode == -signal.SIGKILL, child.stderr
    found: list[str] = []

    @cm.agent("one")
    def one(turn):
        found.append((turn.workspace / "a").read_text())
        write(turn.workspace, a="after the crash", more="m")
        return "done"

    run = cm.resume(child.stdout.strip(), journal="j.db", agents=[one])
    until(lambda: run.gates)
    in_place = {"before": "mine", "work": "attempt 1", "after": "attempt 1", "restore": "mine", "restored": "mine"}
    assert found == [in_place[point]]
    run.reject("again")
    until(lambda: len(found) == 2 and run.gates)
    assert found[1] == "mine"
    assert held(work).keys() == {"a", "more"}
    run.stop()


def test_who_waits_long_for_a_snapshot_is_told(folder, monkeypatch):
    monkeypatch.setattr("cm_notebook.files.LONG_S", 0)
    write(folder, a="1", b="2")
    go = []
    run = started(folder, agent("one", lambda turn: until(lambda: go)))
    until(lambda: "Taking a snapshot of the workspace: 2 files" in run.draft("one"))
    go.append(True)
    waiting(run)
    assert run["one"].attempts[0].text == "one 1"
    run.stop()


def test_the_journal_says_it_all_again(folder, tmp_path):
    run = waiting(started(folder, agent("one", writes(a="1"), writes(b="2")), journal="j.db"))
    run.reject("again")
    waiting(run, 2)
    run.stop()
    again = cm.Run.open(run.id, Journal(tmp_path / "j.db"))
    assert again["one"].attempts[0].diff == run["one"].attempts[0].diff != ""
    assert again["one"].attempts == run["one"].attempts
