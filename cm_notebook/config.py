"""Settings: which there are, and where a value comes from.

Strategy: one table. A value is looked up in this order: what was set in the notebook (``%config CM.name = …``), the
environment (``CM_NAME``; for some, the name that other programs use), ``[tool.cm_notebook]`` in the nearest
pyproject.toml, the default. An option of a call comes before all of them and never passes through here.
"""

from __future__ import annotations

import functools
import os
import re
from pathlib import Path
from typing import Any, Literal, NamedTuple

from .errors import CodeMachineError, did_you_mean

Kind = Literal["text", "switch"]


class Setting(NamedTuple):
    """One setting: its kind, its default, what it is for, a variable of other programs that says the same.

    ``choices``: the values it may have, if not any.
    """

    kind: Kind
    default: Any
    meaning: str
    also: str | None = None
    choices: tuple[str, ...] = ()


SETTINGS: dict[str, Setting] = {
    "engine": Setting("text", "offline", "engine of agents that name none"),
    "journal": Setting("text", ".cm_notebook/journal.db", "where runs are kept, or ':memory:'"),
    "headless": Setting("switch", None, "nobody can answer (on), or somebody can (off); unset: found out"),
    "on_gate": Setting(
        "text",
        None,
        "answer to gates that nobody else answers: approve, reject or stop",
        choices=("approve", "reject", "stop"),
    ),
    "view": Setting("text", "full", "how a run is shown: full, html or log", choices=("full", "html", "log")),
    "shortcuts": Setting("switch", True, "keys inside the view"),
    "direct_clicks": Setting("switch", True, "clicks reach the run while a cell computes"),
    "openai_base_url": Setting("text", "https://api.openai.com/v1", "where the engine openai is", "OPENAI_BASE_URL"),
    "anthropic_base_url": Setting(
        "text", "https://api.anthropic.com", "where the engine anthropic is", "ANTHROPIC_BASE_URL"
    ),
    "ollama_base_url": Setting("text", "http://localhost:11434/v1", "where the engine ollama is"),
    "vllm_base_url": Setting("text", "http://localhost:8000/v1", "where the engine vllm is"),
    "lmstudio_base_url": Setting("text", "http://localhost:1234/v1", "where the engine lmstudio is"),
    "openrouter_base_url": Setting("text", "https://openrouter.ai/api/v1", "where the engine openrouter is"),
    "prices": Setting("text", None, "a TOML file of models' prices, over those that come along"),
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
    for variable in (f"CM_{name.upper()}", SETTINGS[name].also):
        if variable is not None and os.environ.get(variable):
            return _fitting(name, kind, os.environ[variable], variable), variable
    for file, values in _project_files():
        if name in values:
            return _fitting(name, kind, values[name], f"{file}: {name}"), file
    return SETTINGS[name].default, "default"


def shown(value: Any) -> Any:
    """The value as it may be shown: an address without the name and the password in it."""
    return re.sub(r"//[^/]*@", "//", value) if isinstance(value, str) else value


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
    choices = SETTINGS[name].choices
    if choices and value not in choices:
        raise CodeMachineError(f"{where}={value!r} is not known. {did_you_mean(value, choices, 'Possible')}")
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
