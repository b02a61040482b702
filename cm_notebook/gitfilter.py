"""``cm-notebook clean``: as a filter of git's, so that what is committed holds no times, and for files in place.

Strategy: a *clean filter* of git gets each notebook that is added on stdin and stores what it writes; the file in the
working folder stays as it is. Two lines set it up: one in the repository's ``.gitattributes``, for everybody, and one
in its own configuration, which names this Python. Where it fails, on what is no notebook, the file comes out as it went
in and git stores that: a filter must lose nothing, so it is not ``required`` either. Who has the attribute and not the
configuration commits notebooks as they are.
"""

from __future__ import annotations

import secrets
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from .cleaning import cleaned
from .errors import WorkflowError

NAME = "cm-notebook"
LINE = f"*.ipynb filter={NAME}"


def filter_stdin(*, keep_count: bool = False) -> str | None:
    """From stdin to stdout, cleaned; what was wrong, and then it came out as it went in."""
    data = sys.stdin.buffer.read()
    problem = None
    try:
        data = cleaned(data, keep_count=keep_count)
    except WorkflowError as error:
        problem = str(error)
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()
    return problem


def clean_files(files: Iterable[str], *, keep_count: bool = False, check: bool = False) -> list[str]:
    """Clean notebooks in place, or only look; the names of those that change.

    Raises
    ------
    WorkflowError    One of them cannot be read; none was changed.
    """
    made: dict[Path, bytes] = {}
    for name in files:
        path = Path(name)
        try:
            data = path.read_bytes()
            new = cleaned(data, keep_count=keep_count)
        except OSError as error:
            raise WorkflowError(f"{name} cannot be read: {error.strerror or error}.") from None
        except WorkflowError as error:
            raise WorkflowError(f"{name}: {error} Nothing was changed.") from None
        if new != data:
            made[path] = new
    if not check:
        for path, new in made.items():
            _replace(path, new)
    return [str(path) for path in made]


def _replace(path: Path, data: bytes) -> None:
    """Put `data` in the place of a file, which is there whole at any time."""
    scratch = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        scratch.write_bytes(data)
        if path.exists():
            shutil.copymode(path, scratch)
        scratch.replace(path)
    except OSError as error:
        scratch.unlink(missing_ok=True)
        raise WorkflowError(f"{path} cannot be written: {error.strerror or error}.") from None


# -- git ---------------------------------------------------------------------------------------------------------------


def install(*, keep_count: bool = False) -> str:
    """Make it the filter for notebooks of the repository here; what was done, in words.

    Parameters
    ----------
    keep_count
        The filter leaves the numbers of executions.

    Raises
    ------
    WorkflowError    There is no repository, or notebooks have another filter.
    """
    top = _top()
    other = _git("check-attr", "filter", "--", "x.ipynb").rpartition(": ")[2]
    if other not in (NAME, "unspecified", "unset"):
        raise WorkflowError(
            f"notebooks have the filter {other!r} here already, and git takes one. Take its line out of .gitattributes "
            "first; nothing was changed."
        )
    # -P: a json.py in the repository is not ours
    command = f"{shlex.quote(Path(sys.executable).as_posix())} -P -m cm_notebook clean{' --keep-count' * keep_count}"
    _git("config", "--local", f"filter.{NAME}.clean", command)
    if other != NAME:
        attributes = top / ".gitattributes"
        before = attributes.read_bytes() if attributes.exists() else b""
        gap = b"" if not before or before.endswith(b"\n") else b"\n"
        _replace(attributes, before + gap + LINE.encode() + b"\n")
    return (
        f"git cleans notebooks of {top} from now on, when they are added. Commit .gitattributes, where it says so. "
        "To clean those that were committed before: git add --renormalize ."
    )


def uninstall() -> str:
    """Take back what :func:`install` did; what was done, in words."""
    top = _top()
    attributes = top / ".gitattributes"
    if attributes.exists():
        before = attributes.read_bytes()
        kept = b"".join(line for line in before.splitlines(keepends=True) if line.strip() != LINE.encode())
        if kept != before:
            _replace(attributes, kept)
        if not kept:
            attributes.unlink()
    if installed():
        _git("config", "--local", "--remove-section", f"filter.{NAME}")
    return f"git leaves notebooks of {top} as they are from now on."


def installed() -> bool:
    """Whether the repository here has the filter."""
    _top()
    return bool(_run("config", "--local", "--get", f"filter.{NAME}.clean").stdout.strip())


def attributed() -> bool:
    """Whether its notebooks are given to it."""
    return _git("check-attr", "filter", "--", "x.ipynb").endswith(f": {NAME}")


def _top() -> Path:
    found = _run("rev-parse", "--show-toplevel")
    if found.returncode != 0:
        raise WorkflowError("this is no working folder of a git repository. Go to one, or make one: git init")
    return Path(found.stdout.removesuffix("\n"))


def _git(*words: str) -> str:
    done = _run(*words)
    if done.returncode != 0:
        raise WorkflowError(f"git {words[0]} failed: {done.stderr.strip()[:300]}.")
    return done.stdout.strip()


def _run(*words: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(["git", *words], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    except FileNotFoundError:
        raise WorkflowError("git is not installed here.") from None
