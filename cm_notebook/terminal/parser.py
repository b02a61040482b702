"""Words of a command line, read by the table of commands.

Strategy: argparse does the reading, but never prints and never ends the process: what is wrong is one line that says
what would be right.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from typing import Any, NoReturn

from .. import options
from ..errors import CodeMachineError, WorkflowError, did_you_mean
from ..options import Command
from ..render import text as say


class Misunderstood(CodeMachineError):
    """The command line itself is wrong."""


class Parser(argparse.ArgumentParser):
    """argparse that says in one line what would be right, and never ends the process."""

    def __init__(self, command: Command, epilog: str = "") -> None:
        super().__init__(
            prog=f"cm-notebook {command.name}",
            allow_abbrev=False,
            add_help=False,
        )
        self._command, self._epilog = command, epilog
        options.add_arguments(self, command.arguments)
        options.add_options(self, command.options)
        self._flags = {flag: option.usual for option in command.options for flag in option.flags}

    def format_help(self) -> str:
        """The page that ``--help`` prints."""
        arguments = self._command.arguments
        rows = [[argument.shown, argument.meaning] for argument in arguments]
        for option in self._command.options:
            flags = ", ".join([*(flag for flag in option.short if flag[1] != "-"), option.usual])
            value = "" if option.kind == "switch" else " " + ("|".join(option.choices) or option.example)
            rows.append([flags + value, option.meaning])
        shown = "".join(f" [{argument.shown}]" if argument.many else f" {argument.shown}" for argument in arguments)
        lines = [f"usage: {self.prog}{shown} [options]", "", self._command.meaning, ""]
        lines += (f"  {line}" for line in say.table(rows))
        return "\n".join([*lines, *(["", self._epilog] if self._epilog else [""])])

    def read(self, words: Sequence[str]) -> dict[str, Any] | None:
        """What was asked for, by parameter; ``None`` when help was, which is printed.

        Raises
        ------
        Misunderstood    It cannot be read.
        """
        if "-h" in words or "--help" in words:
            print(self.format_help(), end="")
            return None
        for word in words:
            flag = word.partition("=")[0]
            if re.match(r"--[A-Za-z]", word) and flag not in self._flags:
                hint = did_you_mean(flag, dict.fromkeys(self._flags.values()), "Options")
                raise Misunderstood(f"{self._command.name} has no option {flag}. {hint}")
        try:
            return vars(self.parse_args(list(words)))
        except WorkflowError as error:  # from what reads a value
            raise Misunderstood(f"{self._command.name}: {error}") from None

    def error(self, message: str) -> NoReturn:
        """Refuse, in one line."""
        raise Misunderstood(f"{self._command.name}: {message}. See `{self.prog} --help`.")


class Pair(argparse.Action):
    """``-p NAME VALUE``, as papermill has it."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option: str | None = None) -> None:
        """Add the pair to what was given before."""
        pairs = dict(getattr(namespace, self.dest, None) or {})
        namespace.__dict__[self.dest] = {**pairs, values[0]: options.value_of(values[1])}
