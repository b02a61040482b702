"""Tools that may always be called unasked: the person's own list, beside the journal.

Strategy: a rule is for one tool: its name, and the digest of its source, so that a function that was changed is asked
about again. Rules stand in ``permissions.json`` next to the journal, for the user's eyes alone (0600); runs only look
there, each time anew, so that a rule that is taken back counts at once. A file that cannot be read, or that others
could have written, allows nothing. A journal in memory keeps its rules in memory.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from .config import setting
from .errors import CodeMachineError, WorkflowError, did_you_mean, typed
from .events import Fact
from .journal import AnyJournal, open_journal

FILE = "permissions.json"
Place = Path | AnyJournal
"""The file, or a journal in memory."""
_in_memory: weakref.WeakKeyDictionary[AnyJournal, list[Rule]] = weakref.WeakKeyDictionary()


class Rule(Fact):
    """A tool that may always be called; ``run`` and ``step``: where that was decided, ``at``: when (Unix seconds)."""

    tool: str
    implementation: str = ""
    run: str = ""
    step: str = ""
    at: float = 0.0


class _File(Fact):
    version: int = 1
    always: list[Rule] = Field(default_factory=list)


class Permissions(list[Rule]):
    """The tools that may always be called unasked, as a list; shown as a table."""

    def __init__(self, place: Place) -> None:
        super().__init__(_read(place))
        self._place = place

    def revoke(self, tool: str) -> Permissions:
        """Ask again before this tool is called, from now on.

        Raises
        ------
        WorkflowError       There is no rule for it.
        CodeMachineError    The file cannot be written.
        """
        with _changing(self._place) as rules:
            self[:] = rules
            if tool not in (known := [rule.tool for rule in rules]):
                hint = did_you_mean(tool, dict.fromkeys(known), "Allowed") if known else "None is."
                raise WorkflowError(f"{tool!r} is not always allowed. {hint}")
            rules[:] = [rule for rule in rules if rule.tool != tool]
            self[:] = rules
        return self

    def rows(self) -> list[list[str]]:
        """A row for each: the tool, where and when it was allowed."""
        made = [["Tool", "Allowed in", "When"]]
        for rule in self:
            when = time.strftime("%Y-%m-%d %H:%M", time.localtime(rule.at)) if rule.at else ""
            made.append([rule.tool, " ".join(filter(None, (rule.step, rule.run and f"({rule.run})"))), when])
        return made

    def __repr__(self) -> str:
        if not self:
            return "No tool is always allowed; each with ask=True is asked about."
        widths = [max(map(len, column)) for column in zip(*self.rows(), strict=True)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in self.rows()
        ]
        return "\n".join([*lines, "", f"To be asked again: {typed('%cm', 'cm-notebook')} permissions revoke NAME"])

    def _repr_html_(self) -> str:
        from html import escape  # only where somebody looks

        return f'<pre style="font-size:13px;margin:4px 0">{escape(repr(self))}</pre>'


def permissions(journal: str | os.PathLike[str] | AnyJournal | None = None) -> Permissions:
    """The tools that may always be called unasked, by the journal's list; ``.revoke(name)`` takes one off it.

    Raises
    ------
    CodeMachineError    The list cannot be read.
    """
    named = journal if journal is not None else setting("journal")
    if isinstance(named, (str, os.PathLike)) and str(named) != ":memory:":
        return Permissions(Path(named).with_name(FILE))  # there may be no journal yet
    return Permissions(_place(open_journal(named)))


def allows(journal: AnyJournal, tool: str, implementation: str) -> bool:
    """Whether this tool may always be called; what cannot be read allows nothing."""
    try:
        return any((rule.tool, rule.implementation) == (tool, implementation) for rule in _read(_place(journal)))
    except CodeMachineError:
        return False


def keep(journal: AnyJournal, rule: Rule) -> None:
    """Allow a tool for ever.

    Raises
    ------
    CodeMachineError    The file cannot be read or written.
    """
    with _changing(_place(journal)) as rules:
        rules[:] = [one for one in rules if (one.tool, one.implementation) != (rule.tool, rule.implementation)]
        rules.append(rule)


def _place(journal: AnyJournal) -> Place:
    return Path(journal.path).with_name(FILE) if journal.durable else journal


def _read(path: Place) -> list[Rule]:
    if not isinstance(path, Path):
        return list(_in_memory.get(path, ()))
    try:
        with path.open("rb") as file:
            if os.name == "posix":
                about = os.fstat(file.fileno())
                if about.st_uid != os.geteuid() or about.st_mode & 0o022:
                    raise CodeMachineError(
                        f"{path} is not counted, as others can write it. If it is as you want it: chmod 600 {path}"
                    )
            data: Any = json.load(file)
        return _File.model_validate(data).always
    except FileNotFoundError:
        return []
    except (OSError, ValueError, RecursionError, ValidationError) as error:
        why = getattr(error, "strerror", None) or str(error).splitlines()[0]
        mend = "Mend it, or move it away: then every tool asks."
        raise CodeMachineError(f"{path} cannot be read: {why}. {mend}") from None


@contextlib.contextmanager
def _changing(path: Place) -> Iterator[list[Rule]]:
    """The rules, to be changed; they are written when the block ends well."""
    if not isinstance(path, Path):
        yield _in_memory.setdefault(path, [])
        return
    from filelock import FileLock, Timeout

    try:
        with FileLock(f"{path}.lock", timeout=5, mode=0o600):
            rules = _read(path)
            yield rules
            made = _File(always=rules).model_dump(mode="json")
            draft = path.with_name(f".{FILE}")  # nobody else writes it: the lock is held
            draft.unlink(missing_ok=True)
            number = os.open(draft, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
            with os.fdopen(number, "w", encoding="utf-8") as file:
                json.dump(made, file, indent=2, ensure_ascii=False)
                file.write("\n")
            draft.replace(path)
    except (OSError, Timeout) as error:
        why = getattr(error, "strerror", None) or error
        raise CodeMachineError(f"{path} cannot be written: {why}.") from None
