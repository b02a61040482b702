"""Completion of ``%cm`` lines: subcommands, options, their values, steps, agents, runs, engines, files.

Strategy: the table in ``options.py`` says what may stand where; the notebook says which names there are. In the body of
a cell it is the names that a prompt may use, and in a workflow's line of arrows the agents.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from .. import keys
from ..allowed import permissions
from ..engines.base import engine_names
from ..errors import CodeMachineError
from ..options import COMMANDS, Command, Option
from ..workflow import RESERVED
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
    flag, equals, value = last.partition("=")
    option = _named(command, flag if equals else words[-1])
    if option is not None and option.kind != "switch":
        prefix = f"{flag}=" if equals else ""
        if option.parameter in _FILES:
            return [prefix + name for name in _files(value if equals else last, _FILES[option.parameter])]
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


def in_body(notebook: Notebook, head: str, line: str) -> list[str] | None:
    """What may stand at the end of `line`, in the body of the cell that begins with `head`; ``None``: anything."""
    found = _LINE.match(head)
    if found is None or not head.lstrip().startswith("%%") or not found["rest"]:
        return None
    start = _fragment(line)
    if found["rest"].split()[0] == "workflow":
        return _fitting(sorted(notebook.agents), start)
    if not re.search(r"\{\{\s*$", line[: len(line) - len(start)]):
        return None
    inputs = notebook.plan.inputs if notebook.plan is not None else {}
    texts = [name for name, value in notebook.variables().items() if isinstance(value, (str, int, float))]
    names = [*_steps(notebook), *inputs, *(name for name in texts if name[0] != "_"), *RESERVED]
    return _fitting(dict.fromkeys(names), start)


def _fragment(line: str) -> str:
    """The name that is being written at the end of `line`."""
    return re.search(r"[\w-]*$", line)[0]  # type: ignore[index]


_FILES = {"tape": ".jsonl", "record": ".jsonl", "workspace": ""}
"""Options that name a file, and how its name ends; ``""``: a folder."""


def _files(start: str, ending: str) -> list[str]:
    """The files and folders there are whose path begins like that."""
    folder, slash, name = start.rpartition("/")
    try:
        found = sorted(Path(folder + slash or ".").iterdir())
    except OSError:
        return []
    shown = [path for path in found if path.name.startswith(name) and (name or path.name[0] != ".")]
    return [
        f"{folder}{slash}{path.name}{'/' if path.is_dir() else ''}"
        for path in shown
        if path.is_dir() or (ending and path.name.endswith(ending))
    ]


_NAMES = {("keys", "name"): "key", ("step", "id"): "agent", ("module", "id"): "agent", ("workflow", "name"): ""}


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
        "key": keys.names,
        "run": notebook.run_ids,
        "against": notebook.run_ids,
        "tool": _allowed_tools,
    }
    return sorted(dict.fromkeys(sources[what]())) if what in sources else []


def _allowed_tools() -> list[str]:
    try:
        return [rule.tool for rule in permissions()]
    except CodeMachineError:
        return []


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
        if context.cursor_line:
            words, word = in_body(notebook, context.full_text.partition("\n")[0], line), _fragment(line)
        else:
            words, word = candidates(notebook, line), line.rsplit(" ", 1)[-1]
        if words is None:
            return {"completions": [], "suppress": False}
        # IPython replaces its own token, which may begin inside our word.
        cut = len(word) - len(context.token) if word.endswith(context.token) else 0
        made = [SimpleCompletion(text=found[cut:], type="cm") for found in words]
        return {"completions": made, "suppress": True, "matched_fragment": context.token}

    return cm_matcher
