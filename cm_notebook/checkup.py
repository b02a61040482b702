"""What is here and what is missing: one finding a line, each problem with its remedy.

Strategy: ask, change nothing, and let no question fail: a question that cannot be answered is itself a finding. No
model is called; of a server on this machine it is asked whether anything listens there. What an engine says of itself
are two attributes, ``about`` and ``remedy`` (``""``: it can be used), which any engine may have.
"""

from __future__ import annotations

import html
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from . import config, keys
from .engines.base import engine_names, find_engine, offered_by
from .errors import CodeMachineError


@dataclass(frozen=True, slots=True)
class Finding:
    """What was asked, what was found, and when it is a problem, what to do about it.

    ``needed``: the problem is in the way of what is set up; else it only matters to who wants to use that.
    """

    about: str
    found: str
    remedy: str = ""
    needed: bool = True

    @property
    def word(self) -> str:
        """``ok``, ``look`` (at a problem), or ``off`` (it cannot be used as it is, and nothing needs it)."""
        return "ok" if not self.remedy else "look" if self.needed else "off"


@dataclass(frozen=True, slots=True)
class Report:
    """All findings; it displays itself as a table."""

    findings: list[Finding] = field(default_factory=list)

    @property
    def problems(self) -> list[Finding]:
        """Those that are in the way."""
        return [finding for finding in self.findings if finding.word == "look"]

    @property
    def text(self) -> str:
        """A line for each."""
        from .render.text import table

        rows = table([[finding.word, finding.about, finding.found] for finding in self.findings])
        lines: list[str] = []
        for row, finding in zip(rows, self.findings, strict=True):
            lines.append(row)
            if finding.remedy:
                lines.append(f"      → {finding.remedy}")
        count = len(self.problems)
        lines.append(f"{count} to look at." if count else "All is well.")
        return "\n".join(lines)

    @property
    def html(self) -> str:
        """The same as an HTML table."""
        from .render.html import inline, page

        cell = "padding:2px 12px 2px 0;vertical-align:top;text-align:left"
        rows = []
        for finding in self.findings:
            remedy = f"<div>→ {inline(finding.remedy)}</div>" if finding.remedy else ""
            word = f"<b>{finding.word}</b>" if finding.word == "look" else finding.word
            rows.append(
                f'<tr>\n<td style="{cell}">{word}</td>\n'
                f'<th scope="row" style="{cell};white-space:nowrap">{html.escape(finding.about)}</th>\n'
                f'<td style="{cell}">{html.escape(finding.found)}{remedy}</td>\n</tr>'
            )
        table = f'<table style="border-collapse:collapse;font-size:13px">\n{chr(10).join(rows)}\n</table>\n'
        return page(table, framed=False)

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        return self.text

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, str]:
        return {"text/plain": self.text, "text/html": self.html}


def examine() -> Report:
    """Look at kernel, front end, journal, engines, settings and programs."""
    findings: list[Finding] = []
    for question in (_versions, _kernel, _clicks, _journal, _engines, _settings, _programs):
        try:
            findings += question()
        except CodeMachineError as error:
            found, _, remedy = str(error).partition(". ")  # what happened, and what to do about it
            findings.append(Finding(question.__name__.strip("_"), found, remedy or "see what it says"))
    return Report(findings)


def _versions() -> Iterator[Finding]:
    from importlib.metadata import PackageNotFoundError, version

    try:
        number = version("cm-notebook")
    except PackageNotFoundError:
        number = "from its sources"
    yield Finding("cm_notebook", f"{number}, Python {platform.python_version()}, {sys.platform}")


def _kernel() -> Iterator[Finding]:
    from .jupyter import bridge

    version = bridge.kernel_version()
    if not version:
        yield Finding("kernel", "none: a script or a terminal")
        return
    lost = version.startswith("7.0.")
    yield Finding("kernel", f"ipykernel {version}", "install ipykernel 7.4: 7.0 loses what a run shows" if lost else "")
    names = {
        "jupyter": "a Jupyter front end",
        "vscode": "VS Code",
        "colab": "Colab",
        "voila": "Voila",
        "headless": "nobody: cells wait for the run, and a gate that nobody answers stops it",
    }
    front_end = bridge.front_end()
    yield Finding("front end", names.get(front_end, front_end))
    if find_spec("anywidget") is None:
        yield Finding("buttons", "anywidget is not installed", "pip install anywidget, or %config CM.view = 'html'")


def _clicks() -> Iterator[Finding]:
    from .jupyter import bridge

    if bridge.kernel() is None:
        return
    if bridge.direct_clicks.heard_while_blocked:
        yield Finding("clicks", "are heard even while a cell computes")
    elif not bridge.direct_clicks.enabled:
        yield Finding("clicks", "wait until the cell ends: direct clicks are off", "%config CM.direct_clicks = True")
    elif bridge.kernel_version().startswith("6."):
        yield Finding(
            "clicks",
            "are heard while a cell awaits, not while it computes",
            "install ipykernel 7.4, or do not compute while a gate is open",
        )
    elif not bridge.direct_clicks.installed:
        yield Finding("clicks", "wait until the cell ends", "%load_ext cm_notebook installs what hears them at once")


def _journal() -> Iterator[Finding]:
    from .journal import open_journal

    where = config.setting("journal")
    if where == ":memory:":
        yield Finding(
            "journal", "in memory: runs end with the kernel", "%config CM.journal = '.cm_notebook/journal.db'"
        )
        return
    path = Path(where)
    if not path.exists():
        folder = next(parent for parent in path.absolute().parents if parent.exists())
        writable = os.access(folder, os.W_OK)
        remedy = "" if writable else f"{folder} cannot be written: %config CM.journal names another place"
        yield Finding("journal", f"{path}, made by the first run", remedy)
        return
    count = len(open_journal(path).runs())
    yield Finding("journal", f"{path}: {count} run{'s' if count != 1 else ''}, {path.stat().st_size / 1e6:.1f} MB")


def _engines() -> Iterator[Finding]:
    chosen, where = config.lookup("engine")
    in_force, names = chosen.partition(":")[0], engine_names()
    for name in names:
        package = offered_by(name)
        of = f" (package {package})" if package not in ("", "cm-notebook") else ""
        needed = name == in_force
        try:
            engine = find_engine(name)
            said, remedy = str(getattr(engine, "about", "can be named")), str(getattr(engine, "remedy", ""))
        except (Exception, SystemExit) as error:  # somebody else's plug-in, which may do anything
            cause = error.__cause__ or error
            wrong = f"cannot be loaded: {type(cause).__name__}: {keys.hide(' '.join(str(cause).split()))[:300]}"
            update = f"update {package} or remove it: pip install -U {package}" if package else "register another"
            yield Finding(f"engine {name}{of}", wrong, update, needed or bool(package))
        else:
            yield Finding(f"engine {name}{of}", said, remedy, needed)
    if in_force not in names:
        yield Finding("engine in force", f"{chosen} ({where}) is not there", f"name one of: {', '.join(names)}")
    else:
        yield Finding("engine in force", f"{chosen} ({where})")


def _settings() -> Iterator[Finding]:
    for name in config.SETTINGS:
        value, where = config.lookup(name)
        if where != "default" and name != "engine":
            yield Finding(f"CM.{name}", f"{config.shown(value)!r} ({where})")


def _programs() -> Iterator[Finding]:
    programs = (
        ("git", shutil.which("git"), "diffs of the files that agents change", "install git"),
        # Gates run `sys.executable -m pytest`: one that is somewhere on PATH is of no use to them.
        ("pytest", find_spec("pytest"), "quality gates that run tests", "pip install pytest"),
    )
    for name, there, use, remedy in programs:
        if there:
            yield Finding(name, "is here")
        else:
            yield Finding(name, f"not found; only needed for {use}", remedy, needed=False)
