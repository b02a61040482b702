"""Settings: which there are, and where a value comes from.

Strategy: one table. A value is looked up in this order: what was set in the notebook (``%config CM.name = …``), the
environment (``CM_NAME``), ``[tool.cm_notebook]`` in the nearest pyproject.toml, the default. An option of a call comes
before all of them and never passes through here.
"""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from .errors import CodeMachineError, did_you_mean

Kind = Literal["text", "switch"]


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting: its kind, its default, and what it is for."""

    kind: Kind
    default: Any
    meaning: str


SETTINGS: dict[str, Setting] = {
    "engine": Setting("text", "offline", "engine of agents that name none"),
    "journal": Setting("text", ".cm_notebook/journal.db", "where runs are kept, or ':memory:'"),
    "headless": Setting("switch", None, "nobody can answer (on), or somebody can (off); unset: found out"),
    "on_gate": Setting("text", None, "answer to gates that nobody else answers: approve, reject or stop"),
    "view": Setting("text", "full", "how a run is shown: full, html or log"),
    "shortcuts": Setting("switch", True, "keys inside the view"),
    "direct_clicks": Setting("switch", True, "clicks reach the run while a cell computes"),
}

chosen: dict[str, Any] = {}
"""What was set in this process (``%config CM.name = value``)."""


def setting(name: str) -> Any:
    """The value in force."""
    return lookup(name)[0]


def lookup(name: str) -> tuple[Any, str]:
    """The value in force and where it came from.

    Raises
    ------
    CodeMachineError    There is no such setting, or its value does not fit.
    """
    if name not in SETTINGS:
        raise CodeMachineError(f"there is no setting {name!r}. {did_you_mean(name, SETTINGS, 'Settings')}")
    kind = SETTINGS[name].kind
    if name in chosen:
        return _fitting(name, kind, chosen[name], f"%config CM.{name}"), f"%config CM.{name}"
    variable = f"CM_{name.upper()}"
    if os.environ.get(variable):
        return _fitting(name, kind, os.environ[variable], variable), variable
    for file, values in _project_files():
        if name in values:
            return _fitting(name, kind, values[name], file), file
    return SETTINGS[name].default, "default"


def _fitting(name: str, kind: Kind, value: Any, where: str) -> Any:
    if value is None:
        return SETTINGS[name].default
    if kind == "switch":
        if isinstance(value, bool):
            return value
        words = {
            "1": True,
            "true": True,
            "yes": True,
            "on": True,
            "0": False,
            "false": False,
            "no": False,
            "off": False,
        }
        if str(value).strip().lower() not in words:
            raise CodeMachineError(f"{where}={value!r}: {name} is a switch. Use 1 or 0.")
        return words[str(value).strip().lower()]
    if not isinstance(value, str):
        raise CodeMachineError(f"{where}={value!r}: {name} is a text.")
    return value


def _project_files() -> list[tuple[str, dict[str, Any]]]:
    """The nearest pyproject.toml that has a ``[tool.cm_notebook]`` table."""
    here = Path.cwd()
    for folder in (here, *here.parents):
        file = folder / "pyproject.toml"
        try:
            stamp = file.stat().st_mtime_ns
        except OSError:
            continue
        values = _table(str(file), stamp)
        return [(file.name, values)] if values else []
    return []


@functools.lru_cache(maxsize=8)
def _table(file: str, stamp: int) -> dict[str, Any]:
    import tomllib  # only where there is such a file

    try:
        content = tomllib.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CodeMachineError(f"{file} cannot be read: {error}.") from None
    table = content.get("tool", {}).get("cm_notebook", {})
    return table if isinstance(table, dict) else {}
