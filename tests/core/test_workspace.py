"""Snapshots of a folder: what they hold, what they leave alone, and that they come back exactly."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import stat
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cm_notebook.workspace import EMPTY, LONGEST_DIFF, FileChange, NoGit, SnapshotError, Snapshots
from tests.helpers import powerless

CLEAN = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
NOBODY = {
    **CLEAN,
    "GIT_CONFIG_GLOBAL": os.devnull,
    "GIT_AUTHOR_NAME": "n",
    "GIT_AUTHOR_EMAIL": "n@example.com",
    "GIT_COMMITTER_NAME": "n",
    "GIT_COMMITTER_EMAIL": "n@example.com",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "site"
    made.mkdir()
    return made


@pytest.fixture
def snapshots(folder: Path, tmp_path: Path) -> Snapshots:
    return Snapshots(folder, tmp_path / "state" / "snapshots.git")


def git(folder: Path, *words: str) -> str:
    return subprocess.run(["git", *words], cwd=folder, env=NOBODY, check=True, capture_output=True, text=True).stdout


def write(folder: Path, **files: str | bytes) -> None:
    for name, content in files.items():
        put(folder / name, content)


def put(file: Path, content: str | bytes) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content.encode() if isinstance(content, str) else content)


def held(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file below a folder: its type with the bit that makes it a program, and what is in it."""
    found = {}
    for file in sorted(folder.rglob("*")):
        mode = file.lstat().st_mode
        if file.is_symlink():
            found[file.relative_to(folder).as_posix()] = (stat.S_IFLNK, os.fsencode(file.readlink()))
        elif file.is_file():
            found[file.relative_to(folder).as_posix()] = (mode & (stat.S_IFREG | stat.S_IXUSR), file.read_bytes())
    return found


def test_an_empty_folder_needs_no_git(snapshots, folder, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert snapshots.take() == snapshots.unchanged() == EMPTY
    snapshots.restore(EMPTY)
    shutil.rmtree(folder)
    assert snapshots.take() == EMPTY
    assert not snapshots.store.exists()


def test_without_git_it_is_said_so(snapshots, folder, monkeypatch):
    write(folder, a="1")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(NoGit, match="Install git"):
        snapshots.take()


def test_the_same_content_is_the_same_snapshot(snapshots, folder, tmp_path):
    write(folder, a="1", b="2")
    first = snapshots.take()
    write(folder, a="other")
    other = snapshots.take()
    write(folder, a="1")
    assert first == snapshots.take() != other
    assert Snapshots(folder, tmp_path / "elsewhere.git").take() == first


def test_a_quick_look_finds_what_is_unchanged(snapshots, folder):
    write(folder, a="1")
    assert snapshots.unchanged() is None, "nothing was kept yet"
    time.sleep(0.15)  # what was written just now could be written again unseen
    kept = snapshots.take()
    assert snapshots.unchanged() == kept
    write(folder, a="2")
    assert snapshots.unchanged() is None
    assert snapshots.take() != kept


def test_a_change_at_once_after_a_snapshot_is_seen(snapshots, folder):
    trees = []
    for number in range(20):
        write(folder, a=f"{number:02}")
        trees.append(snapshots.take())
    assert len(set(trees)) == 20


@pytest.mark.parametrize("within", ["", "deep", ".hidden"], ids=["the folder", "a folder in it", "a hidden one"])
@pytest.mark.parametrize("since_s", [0, 60], ids=["just made", "made a minute ago"])
def test_the_first_file_of_a_bare_folder_is_seen_at_once(snapshots, folder, within, since_s):
    (folder / within).mkdir(exist_ok=True)
    then = time.time() - since_s
    os.utime(folder, (then, then))
    for _ in range(3):
        assert snapshots.unchanged() == EMPTY
        file = folder / within / "first.txt"
        file.write_text("now")
        assert snapshots.unchanged() is None
        file.unlink()


def test_a_bare_folder_that_is_replaced_is_looked_at(snapshots, folder, tmp_path):
    then = time.time() - 60
    os.utime(folder, (then, then))
    assert snapshots.unchanged() == snapshots.unchanged() == EMPTY
    other = tmp_path / "other"
    other.mkdir()
    (other / "there.txt").write_text("before")
    os.utime(other, (then, then))
    folder.rmdir()
    other.rename(folder)
    assert snapshots.unchanged() is None


def test_changes_and_diff(snapshots, folder):
    write(folder, same="s", gone="g\n", old="1\n2\n3\n4\n5\n6\n", text="a\nb\n", data=b"\0\1\2", tool="#!/bin/sh\n")
    before = snapshots.take()
    (folder / "gone").unlink()
    (folder / "old").rename(folder / "nëw name")
    put(folder / "deep" / "er" / "file", "x\n")
    write(folder, text="a\nc\nd\n", data=b"\0\1\3")
    (folder / "tool").chmod(0o755)
    after = snapshots.take()
    assert snapshots.changes(before, after) == [
        FileChange("data", "modified"),
        FileChange("deep/er/file", "added", None, 1, 0),
        FileChange("gone", "deleted", None, 0, 1),
        FileChange("nëw name", "renamed", "old", 0, 0),
        FileChange("text", "modified", None, 2, 1),
        FileChange("tool", "mode", None, 0, 0),
    ]
    diff = snapshots.diff(before, after)
    assert "--- a/text\n+++ b/text\n@@ -1,2 +1,3 @@\n a\n-b\n+c\n+d\n" in diff
    assert "rename from old\nrename to nëw name\n" in diff
    assert "Binary files a/data and b/data differ" in diff
    assert snapshots.changes(before, before) == []
    assert snapshots.diff(before, before) == ""


def test_a_long_diff_is_cut_and_says_so(snapshots, folder):
    before = snapshots.take()
    write(folder, a="".join(f"line {number}\n" for number in range(100_000)))
    after = snapshots.take()
    diff = snapshots.diff(before, after)
    assert LONGEST_DIFF - 200 < len(diff) < LONGEST_DIFF + 200
    assert diff.endswith("… longer than 64 kB: the rest is not kept.\n")
    assert snapshots.changes(before, after) == [FileChange("a", "added", None, 100_000, 0)]


def test_a_large_file_is_kept_but_not_compared(snapshots, folder):
    before = snapshots.take()
    write(folder, a=("x" * 79 + "\n") * 100_000)
    after = snapshots.take()
    assert snapshots.changes(before, after) == [FileChange("a", "added")]
    write(folder, a="")
    snapshots.restore(after)
    assert (folder / "a").stat().st_size == 8_000_000


def test_restored_exactly(snapshots, folder):
    crlf, latin = b"a\r\nb\n", "é".encode("latin-1")
    write(folder, crlf=crlf, latin=latin, empty=b"", data=bytes(range(256)))
    put(folder / ".gitattributes", "* text=auto eol=lf filter=lfs\n")
    put(folder / "dir" / "inner", "1")
    (folder / "tool").write_text("#!/bin/sh\n")
    (folder / "tool").chmod(0o755)
    (folder / "link").symlink_to("dir/inner")
    (folder / "away").symlink_to("/nowhere/at/all")
    put(folder / "we\nird '\"name", "2")
    put(folder / ":(top)x", "3")
    before, tree = held(folder), snapshots.take()

    shutil.rmtree(folder / "dir")
    put(folder / "dir", "a file now")
    (folder / "link").unlink()
    put(folder / "link" / "below", "a folder now")
    (folder / "tool").chmod(0o644)
    write(folder, crlf="other", new="new")
    (folder / "we\nird '\"name").unlink()
    changed = snapshots.take()
    snapshots.restore(tree)
    assert held(folder) == before
    assert snapshots.take() == tree
    snapshots.restore(changed)
    assert (folder / "dir").read_text() == "a file now"
    snapshots.restore(EMPTY)
    assert held(folder) == {}


def test_who_may_read_a_file_is_not_changed_when_it_comes_back(snapshots, folder):
    rights = {"key": 0o600, "program": 0o700, "ours": 0o664, "all": 0o644, "becomes": 0o640}
    for name, mode in rights.items():
        put(folder / name, "1")
        (folder / name).chmod(mode)
    tree = snapshots.take()
    for name in rights:
        put(folder / name, "other")
    (folder / "becomes").chmod(0o750)
    snapshots.restore(tree)
    assert {name: stat.S_IMODE((folder / name).stat().st_mode) for name in rights} == rights
    assert snapshots.take() == tree


def test_a_link_is_never_followed(snapshots, folder, tmp_path):
    outside = tmp_path / "outside"
    put(outside / "precious", "p")
    put(folder / "dir" / "precious", "mine")
    tree = snapshots.take()
    shutil.rmtree(folder / "dir")
    (folder / "dir").symlink_to(outside)
    snapshots.take()
    snapshots.restore(tree)
    assert held(outside) == {"precious": (stat.S_IFREG, b"p")}
    assert (folder / "dir" / "precious").read_text() == "mine"
    (folder / "more").symlink_to(outside)
    snapshots.restore(tree)
    assert held(outside) == {"precious": (stat.S_IFREG, b"p")}


def test_what_is_ignored_is_left_alone(snapshots, folder):
    put(folder / ".gitignore", "secret\nbuild/\n")
    put(folder / "secret", "s1")
    put(folder / "build" / "out", "o1")
    write(folder, a="1")
    before = snapshots.take()
    put(folder / "secret", "s2")
    write(folder, a="2")
    after = snapshots.take()
    assert [change.path for change in snapshots.changes(before, after)] == ["a"]
    snapshots.restore(before)
    assert (folder / "secret").read_text() == "s2"
    assert (folder / "build" / "out").read_text() == "o1"
    assert (folder / "a").read_text() == "1"


def test_rules_that_an_agent_changes_neither_delete_nor_hide(snapshots, folder):
    put(folder / ".gitignore", "secret\n")
    put(folder / "secret", "s")
    write(folder, a="1")
    tree = snapshots.take()
    put(folder / ".gitignore", "hidden\na\n")  # "secret" is ignored no more, "a" and a new file are
    put(folder / "sub" / ".gitignore", "*.txt\n")
    write(folder, hidden="h", a="2")
    put(folder / "sub" / "b.txt", "b")
    snapshots.take()
    snapshots.restore(tree)
    assert {name: content for name, (_, content) in held(folder).items()} == {
        ".gitignore": b"secret\n",
        "secret": b"s",
        "a": b"1",
    }


@pytest.fixture
def repository(folder: Path) -> Path:
    """A repository of the user's, with something in each corner of it."""
    git(folder, "init", "--quiet", "-b", "main")
    write(folder, tracked="1", staged="1", tracked_too="t")
    put(folder / ".gitignore", "*.log\n")
    put(folder / "kept.log", "tracked though ignored")
    git(folder, "add", "-A")
    git(folder, "add", "-f", "kept.log")
    git(folder, "commit", "-qm", "first")
    write(folder, tracked="stashed")
    git(folder, "stash", "-q")
    write(folder, staged="2")
    git(folder, "add", "staged")
    put(folder / ".git" / "info" / "exclude", "private\n")
    put(folder / ".git" / "hooks" / "post-checkout", "#!/bin/sh\ntouch ran\n")
    (folder / ".git" / "hooks" / "post-checkout").chmod(0o755)
    write(folder, private="p", untracked="u")
    return folder


def test_the_users_repository_is_untouched(snapshots, repository):
    ours, status = held(repository / ".git"), git(repository, "status", "--porcelain")
    ours = held(repository / ".git")  # status itself writes the index
    before, tree = held(repository), snapshots.take()
    write(repository, tracked="x", staged="x", untracked="x", new="n")
    put(repository / "kept.log", "changed")
    (repository / "tracked_too").unlink()
    snapshots.take()
    snapshots.restore(tree)
    assert held(repository / ".git") == ours
    assert held(repository) == before
    assert git(repository, "status", "--porcelain") == status
    assert git(repository, "stash", "list").count("\n") == 1


def test_private_rules_of_the_users_repository_count(snapshots, repository):
    before = snapshots.take()
    write(repository, private="p2")
    put(repository / "x.log", "new and ignored")
    assert snapshots.changes(before, snapshots.take()) == []


def test_a_folder_inside_of_a_repository(repository, tmp_path):
    work = repository / "packages" / "web"
    put(work / "a", "1")
    put(work / "x.log", "ignored by the rules above")
    snapshots = Snapshots(work, tmp_path / "snapshots.git")
    before = snapshots.take()
    write(work, a="2", b="3")
    write(repository, tracked="the user's, meanwhile")
    after = snapshots.take()
    assert [change.path for change in snapshots.changes(before, after)] == ["a", "b"]
    assert "--- a/a\n+++ b/a\n" in snapshots.diff(before, after)
    snapshots.restore(before)
    assert held(work).keys() == {"a", "x.log"}
    assert (repository / "tracked").read_text() == "the user's, meanwhile"


def test_a_folder_that_the_repository_around_it_ignores(repository, tmp_path):
    work = repository / ".cm_notebook" / "work" / "r1"
    put(repository / ".cm_notebook" / ".gitignore", "*\n")
    put(work / "a", "1")
    snapshots = Snapshots(work, tmp_path / "snapshots.git")
    before = snapshots.take()
    write(work, a="2")
    assert [change.path for change in snapshots.changes(before, snapshots.take())] == ["a"]


def test_nested_repositories_are_left_alone(snapshots, folder):
    write(folder, a="1")
    for name in ("full", "empty"):
        (folder / name).mkdir()
        git(folder / name, "init", "--quiet")
        put(folder / name / "file", "1")
    git(folder / "full", "add", "-A")
    git(folder / "full", "commit", "-qm", "first")
    tree = snapshots.take()
    for name in ("full", "empty"):
        put(folder / name / "file", "2")
    git(folder / "full", "commit", "-qam", "second")
    write(folder, a="2")
    inner = held(folder / "full"), held(folder / "empty")
    after = snapshots.take()
    assert [change.path for change in snapshots.changes(tree, after)] == ["a"]
    snapshots.restore(tree)
    assert (held(folder / "full"), held(folder / "empty")) == inner
    assert (folder / "a").read_text() == "1"


def test_settings_of_the_user_change_nothing(snapshots, folder, tmp_path, monkeypatch):
    put(tmp_path / "gitconfig", "[core]\n\tautocrlf = true\n\texcludesFile = /dev/null\n[diff]\n\tnoprefix = true\n")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(tmp_path / "gitconfig"))
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "not-there"))
    monkeypatch.setenv("GIT_INDEX_FILE", str(tmp_path / "index"))
    write(folder, a=b"1\r\n")
    tree = snapshots.take()
    write(folder, a=b"2\r\n")
    assert "--- a/a\n" in snapshots.diff(tree, snapshots.take())
    snapshots.restore(tree)
    assert (folder / "a").read_bytes() == b"1\r\n"
    assert not (tmp_path / "index").exists()


def test_what_a_killed_process_leaves_is_in_nobodys_way(snapshots, folder):
    write(folder, a="1")
    tree = snapshots.take()
    Path(f"{snapshots._index}.lock").touch()
    write(folder, a="2")
    snapshots.restore(tree)
    assert (folder / "a").read_text() == "1"


def test_a_file_that_cannot_be_read_is_named(snapshots, folder, reachable):
    write(folder, a="1")
    snapshots.take()  # loads what it needs
    others = Snapshots(reachable / "work", reachable / "snapshots.git")
    with powerless():
        write(others.workspace, a="1", b="2")
        (others.workspace / "b").chmod(0)
        others.take()
    assert others.skipped == ("b",)


def test_a_store_that_cannot_be_made(folder, tmp_path):
    (tmp_path / "file").write_text("")
    write(folder, a="1")
    with pytest.raises(SnapshotError, match="file"):
        Snapshots(folder, tmp_path / "file" / "snapshots.git").take()


def test_two_at_once_in_one_folder(folder, tmp_path):
    for number in range(50):
        put(folder / f"f{number}", str(number))
    both = [Snapshots(folder, tmp_path / "snapshots.git") for _ in range(2)]
    trees: list[str] = []
    threads = [threading.Thread(target=lambda made=made: trees.extend(made.take() for _ in range(5))) for made in both]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(trees) == 10
    assert len(set(trees)) == 1


def test_only_its_owner_may_read_the_store(snapshots, folder):
    write(folder, a="1")
    snapshots.take()
    assert stat.S_IMODE(snapshots.store.stat().st_mode) == 0o700


NAMES = st.sampled_from(["a", "b", "dir/a", "dir/b", "dir/deep/a", "x.log", "é", "c d"])
CONTENTS = st.sampled_from([b"", b"1\n", b"2\n", b"1\r\n2\r\n", b"\0\xff", b"long " * 50])
EDITS = st.lists(
    st.tuples(st.sampled_from(["write", "delete", "link", "program", "folder"]), NAMES, CONTENTS), max_size=8
)


def edit(folder: Path, edits: list[tuple[str, str, bytes]]) -> None:
    """Do what an agent might; what is not possible is not done."""
    for what, name, content in edits:
        file = folder / name
        with contextlib.suppress(FileExistsError, NotADirectoryError, IsADirectoryError, FileNotFoundError):
            if what == "folder" and file.is_file():
                file.unlink()
                put(file / "inner", content)
            elif what == "program" and file.is_file() and not file.is_symlink():
                file.chmod(0o755)
            elif what == "delete" and file.is_dir() and not file.is_symlink():
                shutil.rmtree(file)
            elif what == "delete":
                file.unlink()
            elif what == "link":
                file.parent.mkdir(parents=True, exist_ok=True)
                file.unlink(missing_ok=True)
                file.symlink_to(hashlib.sha256(content).hexdigest()[:8])
            elif not file.is_symlink():
                put(file, content)


@contextlib.contextmanager
def fresh(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "random"
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(EDITS, min_size=1, max_size=4), st.data())
def test_any_snapshot_comes_back(tmp_path, history, data):
    with fresh(tmp_path) as folder:
        snapshots = Snapshots(folder, tmp_path / "random.git")
        kept = []
        for edits in history:
            edit(folder, edits)
            kept.append((snapshots.take(), held(folder)))
        for _ in range(3):
            tree, files = data.draw(st.sampled_from(kept))
            snapshots.restore(tree)
            assert held(folder) == files
            assert snapshots.take() == tree
