"""The terminal itself: what is written to it, and what is typed.

Strategy: one object writes all lines, so that a line that was begun is ended before another one. Whatever the terminal
can show (colours, letters) is found out here, and so is that nobody reads any more.
"""

from __future__ import annotations

import codecs
import contextlib
import os
import select
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from ..errors import CodeMachineError
from ..loops import SLICE_S
from ..render import text as say

_COLOURS = {"bold": "1", "dim": "2", "red": "31", "green": "32", "yellow": "33"}
_IN_ASCII = str.maketrans({"“": '"', "”": '"', "‘": "'", "’": "'", "…": "...", "—": "-", "–": "-", "·": "|", "→": "->"})


class NobodyReads(Exception):
    """Stdout is closed: ``| head`` has seen enough, or the terminal is gone."""


class Console:
    """Stdout for what happens; for questions stdout too, or stderr where stdout is a file or a pipe."""

    def __init__(self) -> None:
        self._out, self._talk = sys.stdout, sys.stdout if is_terminal(sys.stdout) else sys.stderr
        self._mid_line = False
        self.closed = False
        self.can_ask = is_terminal(sys.stdin) and is_terminal(self._talk)

    def line(self, text: str, look: str = "") -> None:
        """A line about what happened."""
        self.fresh_line()
        self._write(self._out, _painted(self._out, text, look) + "\n")

    def live(self, text: str, look: str = "") -> None:
        """A piece of text as it is written."""
        if text:
            self._write(self._out, _painted(self._out, text, look))
            self._mid_line = not text.endswith("\n")

    def fresh_line(self) -> None:
        """End a line that was begun."""
        if self._mid_line:
            self._mid_line = False
            self._write(self._out, "\n")

    def say(self, text: str, look: str = "") -> None:
        """A line of the conversation."""
        self.fresh_line()
        self._write(self._talk, _painted(self._talk, text, look) + "\n")

    def ask(self, prompt: str, in_vain: Callable[[], bool]) -> str | None:
        """A line that the person types; ``None`` as soon as `in_vain` says that it is not needed any more.

        Raises
        ------
        EOFError    Ctrl+D, or the terminal is gone.
        """
        self._write(self._talk, _painted(self._talk, prompt, "bold"))
        self._mid_line = self._talk is self._out
        stdin = sys.stdin
        if os.name == "posix":  # elsewhere a terminal cannot be waited for together with anything else
            while not select.select([stdin], [], [], SLICE_S)[0]:
                if in_vain():
                    self.fresh_line()
                    return None
        line = stdin.readline()
        if not line:
            raise EOFError
        self._mid_line = False
        return line

    def forget_typed(self) -> None:
        """Drop what was typed before the question was there to be read."""
        if os.name == "posix":
            import termios

            with contextlib.suppress(termios.error):
                termios.tcflush(sys.stdin, termios.TCIFLUSH)

    def edit(self, text: str) -> str | None:
        """The text as the person leaves it in an editor; ``None`` when it is the same or the editor failed.

        Raises
        ------
        CodeMachineError    There is no editor.
        """
        usual = next((name for name in ("nano", "vi", "notepad") if shutil.which(name)), "")
        editor = os.environ.get("VISUAL") or os.environ.get("EDITOR") or usual
        if not editor:
            raise CodeMachineError("there is no editor here. Name one: export EDITOR=nano")
        with tempfile.TemporaryDirectory(prefix="cm-") as folder, _deaf_to_interrupts():
            file = Path(folder, "text.md")
            file.write_text(text, encoding="utf-8", errors="replace", newline="")
            try:
                ended = subprocess.run([*shlex.split(editor), str(file)], stdout=self._talk).returncode
            except (OSError, ValueError) as error:
                raise CodeMachineError(
                    f"the editor {editor!r} does not start: {error}. Name another: $EDITOR"
                ) from None
            new = file.read_text(encoding="utf-8", errors="replace")
        if not text.endswith("\n"):
            new = new.removesuffix("\n")  # editors end the last line
        return None if ended != 0 or new == text else new

    def _write(self, stream: IO[str] | None, text: str) -> None:
        if stream is None:
            return
        try:
            stream.write(text)
            stream.flush()
        except (OSError, ValueError):
            self.closed = True
            let_go_of_stdout()
            raise NobodyReads from None


@contextlib.contextmanager
def _deaf_to_interrupts() -> Iterator[None]:
    """While an editor has the terminal, Ctrl+C is the editor's."""
    before = signal.signal(signal.SIGINT, lambda *_: None)  # a handler, not SIG_IGN, which the editor would inherit
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def is_terminal(stream: IO[str] | None) -> bool:
    """Whether a person may be there: not where a file or a pipe stands in."""
    try:
        return stream is not None and stream.isatty()
    except ValueError:  # closed
        return False


def _painted(stream: IO[str] | None, text: str, look: str) -> str:
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb" or os.name != "posix"
    if not look or plain or not is_terminal(stream):
        return text
    return f"\x1b[{_COLOURS[look]}m{text}\x1b[0m"


def prepare_streams() -> None:
    """Whatever the terminal's alphabet, what is printed arrives: in plain letters if need be."""

    def in_ascii(error: UnicodeError) -> tuple[str, int]:
        if not isinstance(error, UnicodeEncodeError):
            raise error
        text = error.object[error.start : error.end].translate(_IN_ASCII)
        return text.encode("ascii", "replace").decode(), error.end

    codecs.register_error("cm_notebook.ascii", in_ascii)
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace" if stream is sys.stdin else "cm_notebook.ascii")


def let_go_of_stdout() -> None:
    """Nobody reads it: what Python still holds for it must not become an error at the end of the process."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, sys.stdout.fileno())
        os.close(devnull)


def complain(message: str, sign: str = "cm-notebook: ", more: str = "--debug") -> None:
    """Say on stderr what is wrong; `more` shows all of a long one."""
    with contextlib.suppress(OSError, ValueError):
        print(f"{sign}{say.bounded(message, more)}", file=sys.stderr, flush=True)
