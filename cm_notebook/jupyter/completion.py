"""Completion of ``%cm`` lines: subcommands, options, their values, steps, agents, runs, engines.

Strategy: the table in ``options.py`` says what may stand where; the notebook says which names there are.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

from ..engines.base import engine_names
from ..errors import CodeMachineError
from ..options import COMMANDS, Command, Option
from .notebook import Notebook

_LINE = re.compile(r"^\s*(?:[A-Za-z_]\w*\s*=\s*)?%%?cm(?:\s+(?P<rest>.*))?$")


def candidates(notebook: Notebook, line: str) -> list[str] | None:
    """What may stand at the end of `line` in place of its last word.

    Parameters
    ----------
    line
        The line up to the cursor.

    Returns
    -------
    list of str or None
        Whole words, in the order to offer; ``None``: it is no line of ours.
    """
    found = _LINE.match(line)
    if found is None or found["rest"] is None:
        return None
    *before, last = found["rest"].split(" ")
    words = [word for word in before if word]
    if not words:
        return _fitting([*COMMANDS, "--help"], last)
    command = COMMANDS.get(words[0])
    if command is None:
        return []
    flag, equals, _value = last.partition("=")
    option = _named(command, flag if equals else words[-1])
    if option is not None and option.kind != "switch":
        prefix = f"{flag}=" if equals else ""
        return _fitting([prefix + name for name in _values(notebook, option.parameter, option.choices)], last)
    if last.startswith("-"):
        return _fitting(_flags(command), last)
    place = sum(
        1 for n, word in enumerate(words[1:], 1) if not word.startswith("-") and not _takes(command, words[n - 1])
    )
    named: list[str] = []
    if place < len(command.arguments):
        argument = command.arguments[place]
        named = _values(notebook, _NAMES.get((command.name, argument.name), argument.name), argument.choices)
    return _fitting([*named, *_flags(command)], last)


_NAMES = {("step", "id"): "agent", ("module", "id"): "agent", ("workflow", "name"): ""}


def _fitting(words: Iterable[str], start: str) -> list[str]:
    return [word for word in words if word.startswith(start)]


def _flags(command: Command) -> list[str]:
    found = [flag for option in command.options for flag in (option.usual, option.off) if flag]
    return list(dict.fromkeys(found))


def _named(command: Command, flag: str) -> Option | None:
    return next((option for option in command.options if flag in option.flags), None)


def _takes(command: Command, flag: str) -> bool:
    option = _named(command, flag)
    return option is not None and option.kind != "switch"


def _values(notebook: Notebook, what: str, choices: tuple[str, ...]) -> list[str]:
    """The names there are of that sort."""
    if choices:
        return list(choices)
    sources: dict[str, Callable[[], Iterable[str]]] = {
        "step": lambda: _steps(notebook),
        "until": lambda: _steps(notebook),
        "from_": lambda: _steps(notebook),
        "after": lambda: _steps(notebook),
        "agent": lambda: notebook.agents,
        "engine": engine_names,
        "run": notebook.run_ids,
    }
    return sorted(dict.fromkeys(sources[what]())) if what in sources else []


def _steps(notebook: Notebook) -> list[str]:
    try:
        return list(notebook.current().state.steps)
    except CodeMachineError:
        return list(notebook.plan.placed) if notebook.plan is not None else []


def make_matcher(notebook: Notebook) -> Any:
    """IPython's matcher for this notebook."""
    from IPython.core.completer import SimpleCompletion, context_matcher

    @context_matcher()  # type: ignore[untyped-decorator]
    def cm_matcher(context: Any) -> dict[str, Any]:
        line = context.line_with_cursor[: context.cursor_position]
        words = candidates(notebook, line)
        if words is None:
            return {"completions": [], "suppress": False}
        # IPython replaces its own token, which may begin inside our word.
        word = line.rsplit(" ", 1)[-1]
        cut = len(word) - len(context.token) if word.endswith(context.token) else 0
        made = [SimpleCompletion(text=found[cut:], type="cm") for found in words]
        return {"completions": made, "suppress": True, "matched_fragment": context.token}

    return cm_matcher
