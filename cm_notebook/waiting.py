"""Telling somebody that a gate is open: a function of theirs, or a command.

Strategy: it is told once for each gate by each process that drives the run, and only when a person is needed: not where
the mode, a tape or a policy answers. It happens on a thread of its own, so nothing waits for it; a command has
``LIMIT_S``, no shell, and an environment without keys. What goes wrong is a fact of the run (``TellingFailed``), which
the gate says, and changes nothing else. A process that ends waits a little for what was begun.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import inspect
import json
import os
import shlex
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from .errors import WorkflowError
from .events import Gate

OnWaiting = str | Sequence[str] | Callable[[Gate], object]
"""A function that gets the gate (it may be async), or a command: its words, or one line of them."""
Told = Callable[[Gate], object] | list[str]
"""The function, or the words of the command."""
LIMIT_S = 30.0
"""Seconds that a command may take."""
_KEPT = (
    *("PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "TERM", "TMPDIR", "TEMP", "TMP"),
    *("DISPLAY", "WAYLAND_DISPLAY", "XAUTHORITY", "XDG_RUNTIME_DIR", "DBUS_SESSION_BUS_ADDRESS"),  # for a desktop
    *("SYSTEMROOT", "COMSPEC", "PATHEXT", "APPDATA", "USERPROFILE"),  # Windows starts nothing without
)
"""What a command gets of our environment."""
_under_way: set[threading.Thread] = set()


def checked(told: OnWaiting | None) -> Told | None:
    """What is to be called, or the words of the command.

    Raises
    ------
    WorkflowError    It is neither, or there is no such program.
    """
    if told is None or callable(told):
        return told
    try:
        words = shlex.split(told) if isinstance(told, str) else [*told]
    except (TypeError, ValueError) as error:
        raise WorkflowError(f"on_waiting={told!r} is neither a function nor a command: {error}.") from None
    if not words or any(type(word) is not str or "\0" in word for word in words):
        raise WorkflowError(f"on_waiting={told!r} is no command. For instance: on_waiting='notify-send Waiting'.")
    import shutil  # this one and tempfile: only for who uses a command

    if shutil.which(words[0]) is None:
        raise WorkflowError(
            f"on_waiting: there is no program {words[0]!r}. It is started as it is, without a shell; for a line of a "
            "shell write: sh -c '…'"
        )
    return words


def tell(told: Told, gate: Gate, facts: dict[str, Any], failed: Callable[[str], None]) -> None:
    """Have it told, on a thread of its own; `failed` is called there with what went wrong."""

    def work() -> None:
        try:
            wrong = _run(told, facts) if isinstance(told, list) else _call(told, gate)
            if wrong:
                failed(f"on_waiting: {wrong}")
        finally:
            _under_way.discard(threading.current_thread())

    thread = threading.Thread(target=work, name="cm-on-waiting", daemon=True)
    _under_way.add(thread)
    thread.start()


@atexit.register
def _finish() -> None:
    """What was begun may come to its end, within its limit."""
    end = time.monotonic() + LIMIT_S
    for thread in [*_under_way]:
        thread.join(max(0.0, end - time.monotonic()))


def called(function: Callable[[Gate], Any], gate: Gate) -> Any:
    """What a person's function says about `gate`; an async one has a loop of its own on this thread."""

    async def wait_for(made: Any) -> Any:
        return await made

    made = function(gate)
    return asyncio.run(wait_for(made)) if inspect.isawaitable(made) else made


def _call(function: Callable[[Gate], object], gate: Gate) -> str:
    try:
        called(function, gate)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _run(words: list[str], facts: dict[str, Any]) -> str:
    """Run the command to its end; returns what was wrong, or ``""``."""
    import tempfile

    names = {"CM_RUN": "run", "CM_STEP": "path", "CM_GATE": "gate", "CM_KIND": "kind", "CM_MESSAGE": "message"}
    environment = {name: os.environ[name] for name in _KEPT if name in os.environ}
    environment |= {name: str(facts[key]) for name, key in names.items()}
    environment["CM_ANSWER"] = facts["answer"]
    # Files, not pipes: one that it leaves open, or does not read, holds nobody up.
    with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as said:
        given.write(json.dumps(facts).encode())
        given.seek(0)
        try:
            process = subprocess.Popen(
                words, stdin=given, stdout=subprocess.DEVNULL, stderr=said, env=environment, start_new_session=True
            )
        except (OSError, ValueError) as error:
            return f"{words[0]!r} does not start: {error}"
        try:
            code = process.wait(LIMIT_S)
        except subprocess.TimeoutExpired:
            _end(process)
            return f"{words[0]!r} did not end within {LIMIT_S:g} s, and was ended"
        if code == 0:
            return ""
        said.seek(max(0, said.seek(0, os.SEEK_END) - 500))
        last = said.read().decode(errors="replace").strip().rpartition("\n")[2]
        return f"{words[0]!r} ended with {code}{f': {last}' if last else ''}"


def _end(process: subprocess.Popen[bytes]) -> None:
    """End it, with all that it has started, and wait for it, so that nothing of it is left."""
    with contextlib.suppress(OSError):
        if os.name == "posix":
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
    process.wait()
