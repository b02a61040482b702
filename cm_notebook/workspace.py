"""Snapshots of the folder in which agents work: taken before and after an attempt, compared, restored exactly.

Strategy: git keeps them, in a bare repository of ours with an index of ours, so that the user's own ``.git``, index,
stash and branches are never touched. A snapshot is the id of a tree, and nothing else has to be remembered. What git
would do to texts on their way (line ends, filters, the user's settings) is switched off: bytes come back as they were.
What is ignored is in no snapshot, and stays as it is when one is restored; so do nested repositories and submodules.

    folder ──stat──► unchanged since the last snapshot? ──► the same id, and git is not asked
       └──── git add, git write-tree ──► id of a tree ──► git diff-tree, git read-tree -u

All of this blocks, except ``unchanged``; whoever has an event loop calls it from a thread.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import re
import shutil
import stat
import subprocess
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from .errors import CodeMachineError
from .events import NO_FILES as EMPTY
from .events import FileChange

__all__ = ["EMPTY", "FileChange", "NoGit", "SnapshotError", "Snapshots"]

MOST_LOOKED_AT = 5_000
"""Files that are looked at to see whether anything changed; of more, git keeps account more quickly."""
FEW = 64
"""Files that can be looked at between two steps."""
SETTLED_S = 0.1
"""A file that was written less than this before it was looked at may be written again without a trace in its time."""
LONGEST_DIFF = 64_000
"""Characters of a diff that are kept."""

_SETTINGS = {
    "advice.addEmbeddedRepo": "false",
    "core.autocrlf": "false",
    "core.bare": "false",
    "core.bigFileThreshold": "4m",  # what is larger is not compared line by line
    "core.fsmonitor": "false",
    "core.hooksPath": os.devnull,
    "core.quotePath": "false",
    "core.untrackedCache": "false",
    "gc.auto": "0",
    "maintenance.auto": "false",
    "submodule.recurse": "false",
}
_ATTRIBUTES = "* -text -eol -filter -ident -working-tree-encoding\n"
_WITHOUT_COMMIT = r"(?m)^error: '(.+?)/?' does not have a commit checked out$"
_UNREADABLE = r"(?m)^error: (?:open\(\"(.+?)\"\)|unable to index file '(.+?)')"


class NoGit(CodeMachineError):
    """There is no ``git`` on this machine, so there are no snapshots."""


class SnapshotError(CodeMachineError):
    """A snapshot could not be taken or restored; the message says why."""


class _Place(NamedTuple):
    """Where git starts looking: the top of the user's own repository, for the sake of the rules in it."""

    root: Path
    prefix: str
    """The workspace below ``root``, with ``/`` at its end; ``""`` when it is the same."""
    excludes: str
    tracked: bool
    """Whether the user's repository may track what its rules ignore."""


class Snapshots:
    """Snapshots of one folder.

    Parameters
    ----------
    workspace
        The folder. It need not exist yet; it is empty then.
    store
        Folder of our repository. It is made when the first file is kept.
    left_out
        Files and folders that are in no snapshot, and stay as they are when one is restored: the journal, a notebook.
    """

    def __init__(self, workspace: Path, store: Path, left_out: Iterable[Path] = ()) -> None:
        self.workspace, self.store = workspace.absolute(), store.absolute()
        self._given = (self.store, *left_out)
        self.skipped: tuple[str, ...] = ()
        """Files that could not be read: the last snapshot holds them as they were before, or not at all."""
        self._tree = EMPTY
        self._seen: tuple[object, ...] | None = None
        self._folder = str(self.workspace)
        self._bare: tuple[int, ...] | None = None
        """The times of the folder when there was nothing at all in it."""
        name = hashlib.sha256(os.fsencode(self.workspace)).hexdigest()[:16]
        self._index = self.store / f"index-{name}"
        self._busy = threading.Lock()

    def __repr__(self) -> str:
        return f"<Snapshots of {self.workspace}>"

    def take(self) -> str:
        """Keep the folder as it is; returns the id of its tree. The same content has the same id.

        Raises
        ------
        NoGit            There is no git, and the folder is not empty.
        SnapshotError    git failed: a disk that is full, a store that cannot be written.
        """
        with self._busy:
            seen = self._look(MOST_LOOKED_AT)
            if seen is None or seen != self._seen:
                self._tree = EMPTY if seen == () else self._kept()
                self._seen = seen
            return self._tree

    def unchanged(self) -> str | None:
        """The id of the last snapshot, when a quick look finds the folder as it was or empty; else ``None``.

        Quick enough for an event loop: no process, no waiting, and no more than a few dozen files.
        """
        if not self._busy.acquire(blocking=False):
            return None
        try:
            seen = self._glance()
            if seen == ():
                self._seen, self._tree = seen, EMPTY
            return self._tree if seen is not None and seen == self._seen else None
        finally:
            self._busy.release()

    def changes(self, before: str, after: str) -> list[FileChange]:
        """The files that differ, by their paths."""
        if before == after:
            return []
        with self._alone():
            raw = self._git("diff-tree", *self._compared(), "-z", "--raw", "--numstat", before, after)
        return sorted(_parsed(raw), key=lambda change: change.path)

    def diff(self, before: str, after: str, *, most: int = LONGEST_DIFF) -> str:
        """The unified diff, at most so many characters of it; its last line says what is missing.

        Files that are no text are only named.
        """
        if before == after:
            return ""
        with self._alone():
            text = self._git("diff-tree", *self._compared(), "--patch", before, after, most=4 * most)
        if len(text) <= most:
            return text
        return f"{text[:most].rpartition(chr(10))[0]}\n… longer than {most // 1000} kB: the rest is not kept.\n"

    def restore(self, tree: str) -> None:
        """Bring the folder back to a snapshot.

        Raises
        ------
        NoGit            There is no git.
        SnapshotError    git failed, or somebody writes there meanwhile. It may be tried again.
        """
        if tree == EMPTY and self._look(MOST_LOOKED_AT) == ():
            return
        with self._busy, self._alone() as place:
            self._seen = None
            self._git("read-tree", "--reset", tree)
            if self._leave_out(place):  # it may have been taken when something else was left out
                tree = self._git("write-tree").strip()
            self._restore_rules(place)
            rights = self._rights(place, self._stage(place), tree)
            self._git("read-tree", "--reset", "-u", tree)
            _give_back(rights)
            left = self._stage(place)
            if left != tree and self._git("diff-tree", *self._compared(), "--name-only", tree, left):
                raise SnapshotError(f"{self.workspace} is not as it was: something writes there at the same time.")
            self._tree = left

    def _rights(self, place: _Place, now: str, tree: str) -> dict[Path, int]:
        """Who may read and write the files that are about to be written anew, which git makes readable for all."""
        changed = self._git("diff-tree", "-r", "-z", "--no-renames", "--diff-filter=M", "--name-only", now, tree)
        found: dict[Path, int] = {}
        for name in changed.split("\0"):
            with contextlib.suppress(OSError):
                mode = (place.root / name).lstat().st_mode
                if name and stat.S_ISREG(mode):
                    found[place.root / name] = stat.S_IMODE(mode)
        return found

    def _restore_rules(self, place: _Place) -> None:
        """Bring back the rules of that time: what they ignored is left alone, what they did not has come since."""
        rules = f":(top,glob){place.prefix}**/.gitignore"
        known = self._git("ls-files", "-z", "--cached", "--", rules)
        if known:
            self._git("checkout-index", "--force", "--quiet", "-z", "--stdin", stdin=known)
        for name in self._git("ls-files", "-z", "--others", "--exclude-standard", "--", rules).split("\0"):
            if name:
                (place.root / name).unlink(missing_ok=True)

    # -- looking -------------------------------------------------------------------------------------------------------

    def _glance(self) -> tuple[object, ...] | None:
        """As :meth:`_look`, of few files; a folder that was bare, and has its times still, is not read again."""
        try:
            about = os.stat(self._folder)  # noqa: PTH116 - at every step, and a Path asks four times as slowly
        except OSError:
            return self._look(FEW)
        times = (about.st_mtime_ns, about.st_ctime_ns, about.st_ino)
        if times == self._bare:
            return ()
        seen = self._look(FEW)
        settled = about.st_mtime_ns < time.time_ns() - int(SETTLED_S * 1e9)
        self._bare = None
        if seen == () and settled:
            with contextlib.suppress(OSError):
                self._bare = None if any(self.workspace.iterdir()) else times
        return seen

    def _look(self, most: int) -> tuple[object, ...] | None:
        """Each file with its size and times; ``()``: there is none; ``None``: too many to tell, or just written."""
        found: list[tuple[str, int, int, int, int, int]] = []
        folders, newest = [self._folder], 0
        while folders:
            try:
                with os.scandir(folders.pop()) as entries:
                    for entry in entries:
                        if entry.name == ".git" or entry.path in self._left_out:
                            continue
                        about = entry.stat(follow_symlinks=False)
                        if stat.S_ISDIR(about.st_mode):
                            folders.append(entry.path)
                            continue
                        changed = about.st_ctime_ns
                        found.append(
                            (entry.path, about.st_mode, about.st_size, about.st_mtime_ns, changed, about.st_ino)
                        )
                        newest = max(newest, about.st_mtime_ns, changed)
                        if len(found) > most:
                            return None
            except FileNotFoundError:
                continue
            except OSError:
                return None
        if found and newest > time.time_ns() - int(SETTLED_S * 1e9):
            return None
        return tuple(sorted(found))

    @functools.cached_property
    def _left_out(self) -> dict[str, str]:
        """What lies in the workspace and is left out: as it is found there, and relative to it."""
        found, top = {}, self.workspace.resolve()
        for path in self._given:
            with contextlib.suppress(ValueError, OSError):
                name = path.absolute().resolve().relative_to(top).as_posix()
                if name != ".":
                    found[f"{self.workspace}{os.sep}{name.replace('/', os.sep)}"] = name
        return found

    def _leave_out(self, place: _Place) -> bool:
        """Take out of our index what is left out; whether there is such."""
        named = [f":(top,literal){place.prefix}{name}" for name in self._left_out.values()]
        if named:
            self._git("rm", "-r", "--cached", "--quiet", "--ignore-unmatch", "--force", "--", *named)
        return bool(named)

    # -- git -----------------------------------------------------------------------------------------------------------

    @functools.cached_property
    def _place(self) -> _Place:
        """Found out once: repositories are not made around a workspace while agents work in it."""
        alone = _Place(self.workspace, "", os.devnull, tracked=False)
        where = ["git", "-C", str(self.workspace)]
        asked = _ran([*where, "rev-parse", "--show-toplevel", "--git-path", "info/exclude"], _environment())
        if asked.returncode or _ran([*where, "check-ignore", "--quiet", "."], _environment()).returncode == 0:
            return alone  # of its own, as a folder inside of .cm_notebook is
        top, excludes = asked.stdout.splitlines()[:2]
        root = Path(top)
        with contextlib.suppress(ValueError, OSError):
            prefix = self.workspace.resolve().relative_to(root.resolve()).as_posix()
            return _Place(root, "" if prefix == "." else f"{prefix}/", str(self.workspace / excludes), tracked=True)
        return alone

    @contextlib.contextmanager
    def _alone(self) -> Iterator[_Place]:
        """Be the only one with our index, in a store that is there."""
        if shutil.which("git") is None:
            raise NoGit(
                "there is no git on this machine: changes of files are not shown, and Reject does not take them back. "
                "Install git."
            )
        import filelock  # only where there are files

        try:
            self.workspace.mkdir(parents=True, exist_ok=True)
            self.store.mkdir(parents=True, exist_ok=True, mode=0o700)
            with filelock.FileLock(f"{self._index}.guard"):
                Path(f"{self._index}.lock").unlink(missing_ok=True)  # git's own, of a process that was killed
                attributes = self.store / "info" / "attributes"
                if not attributes.exists():
                    done = _ran(["git", "init", "--quiet", "--bare", "--template=", str(self.store)], _environment())
                    if done.returncode:
                        raise _failed("init", done.stderr)
                    self._git("hash-object", "-w", "-t", "tree", "--stdin")  # EMPTY
                    attributes.parent.mkdir(exist_ok=True)
                    attributes.write_text(_ATTRIBUTES, encoding="utf-8")
                yield self._place
        except OSError as error:
            raise SnapshotError(f"{error.filename or self.store}: {error.strerror or error}.") from error

    def _kept(self) -> str:
        with self._alone() as place:
            return self._stage(place)

    def _stage(self, place: _Place) -> str:
        """Bring our index in line with the folder; the id of its tree."""
        within = [f":(top,literal){place.prefix}" if place.prefix else ":(top)"]
        within += [f":(top,exclude,literal){place.prefix}{name}" for name in self._left_out.values()]
        while True:
            done = self._tried("add", "--all", "--ignore-errors", "--", *within)
            # a repository in which nothing was committed yet stops git; it is passed over, as all nested ones are
            passed = [f":(top,exclude,literal){name}" for name in re.findall(_WITHOUT_COMMIT, done.stderr)]
            if not set(passed) - set(within):
                break
            within += passed
        self.skipped = tuple(dict.fromkeys(one or other for one, other in re.findall(_UNREADABLE, done.stderr)))
        if done.returncode and not self.skipped:
            raise _failed("add", done.stderr)
        if place.tracked:
            listed = ["ls-files", "-z", "--cached", "--ignored", "--exclude-standard", "--full-name"]
            forced = _ran(["git", "-C", str(self.workspace), *listed], _environment()).stdout
            there = "".join(f"{name}\0" for name in forced.split("\0") if name and os.path.lexists(place.root / name))
            if there:
                words = ["--pathspec-from-file=-", "--pathspec-file-nul"]
                self._git("--literal-pathspecs", "add", "--force", "--ignore-errors", *words, stdin=there)
        self._leave_out(place)
        return self._git("write-tree").strip()

    def _compared(self) -> list[str]:
        """How trees are compared."""
        words = ["-r", "-M", "--no-color", "--no-ext-diff", "--no-textconv", "--ignore-submodules=all"]
        words += ["--src-prefix=a/", "--dst-prefix=b/"]
        return [*words, f"--relative={self._place.prefix}"] if self._place.prefix else words

    def _git(self, *words: str, stdin: str = "", most: int | None = None) -> str:
        done = self._tried(*words, stdin=stdin, most=most)
        if done.returncode:
            raise _failed(words[0], done.stderr)
        return done.stdout

    def _tried(self, *words: str, stdin: str = "", most: int | None = None) -> subprocess.CompletedProcess[str]:
        place = self._place
        settings = {**_SETTINGS, "core.excludesFile": place.excludes}
        chosen = [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
        ours = {"GIT_DIR": str(self.store), "GIT_WORK_TREE": str(place.root), "GIT_INDEX_FILE": str(self._index)}
        return _ran(["git", *chosen, *words], {**_environment(), **ours}, stdin=stdin, cwd=place.root, most=most)


def _give_back(rights: dict[Path, int]) -> None:
    """Let the same people read and write a file as before it was written anew; whether it is a program, it says now."""
    for file, before in rights.items():
        with contextlib.suppress(OSError):
            mode = file.lstat().st_mode
            wanted = before & 0o666 | ((before & 0o444) >> 2 if mode & stat.S_IXUSR else 0)
            if stat.S_ISREG(mode) and stat.S_IMODE(mode) != wanted:
                file.chmod(wanted)


def _environment() -> dict[str, str]:
    """What git is to know: nothing of the user's settings, and nothing of a git that called us."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    return {
        **kept,
        "GIT_CONFIG_GLOBAL": os.devnull,
        "GIT_CONFIG_NOSYSTEM": "1",
        "LC_ALL": "C",
        "GIT_OPTIONAL_LOCKS": "0",
    }


def _ran(
    argv: list[str], environment: dict[str, str], *, stdin: str = "", cwd: Path | None = None, most: int | None = None
) -> subprocess.CompletedProcess[str]:
    """Run git to its end, or until it has said `most` bytes."""
    sent, said = stdin.encode("utf-8", "surrogateescape"), subprocess.PIPE
    with subprocess.Popen(argv, env=environment, cwd=cwd, stdin=said, stdout=said, stderr=said) as git:
        if most is None:
            output, complaint = git.communicate(sent)
            text = output.decode("utf-8", "surrogateescape")
        else:
            assert git.stdout is not None
            text = git.stdout.read(most).decode("utf-8", "replace")
            whole = not git.stdout.read(1)
            if not whole:
                git.kill()
            _, complaint = git.communicate()
            if not whole:
                git.returncode = 0
    return subprocess.CompletedProcess(argv, git.returncode, text, complaint.decode("utf-8", "replace"))


def _failed(command: str, said: str) -> SnapshotError:
    lines = [line for line in said.splitlines() if line.startswith(("fatal:", "error:"))] or said.splitlines()
    return SnapshotError(f"git {command} failed: {lines[0] if lines else 'it gave no reason'}")


def _parsed(raw: str) -> Iterator[FileChange]:
    """Read ``git diff-tree -z --raw --numstat``: first what happened to each file, then how many lines."""
    words = iter(raw.split("\0"))
    found: dict[str, FileChange] = {}
    for word in words:
        if word.startswith(":"):
            _, _, old, new, status = word.split(" ")
            path = next(words)
            if status[0] == "R":
                old_path, path = path, next(words)
                found[path] = FileChange(path, "renamed", old_path)
            elif status[0] == "A":
                found[path] = FileChange(path, "added")
            elif status[0] == "D":
                found[path] = FileChange(path, "deleted")
            else:
                found[path] = FileChange(path, "mode" if status[0] == "T" or old == new else "modified")
        elif word:
            added, removed, path = word.split("\t", 2)
            if not path:  # renamed: both names follow
                _, path = next(words), next(words)
            change = found[path]
            lines = (int(added), int(removed)) if added != "-" else (None, None)
            found[path] = FileChange(change.path, change.kind, change.old_path, *lines)
    yield from found.values()
