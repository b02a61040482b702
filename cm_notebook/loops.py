"""The engine's own event loop, and how everybody else waits for it.

Strategy: runs are driven by one asyncio loop on one daemon thread of this process, so neither a computing cell nor a
blocked kernel can stall them. What a run gives to the outside is a ``concurrent.futures.Future``: any thread and any
loop may wait for it, in slices, and whoever stops waiting (an interrupted cell, a time-out) merely lets go of it. A
wait never cancels what it waits for; ``Run.stop()`` does.

``asyncio.wrap_future`` is not used: it cancels the source when the waiter is cancelled, and one left behind complains
later ("exception was never retrieved", or "loop is closed" from inside the engine's thread).
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

from .errors import CodeMachineError

T = TypeVar("T")
_OURS = __file__.removesuffix("loops.py")

SLICE_S = 0.25
"""Longest wait in one piece: ipykernel's interrupt of an awaiting cell is noticed only when its loop wakes, and on
Windows a blocked thread hears Ctrl+C only between waits."""

STILL_S = 10.0
"""After so long a loop that does not answer is said to stand still."""

_lock = threading.Lock()
_thread: threading.Thread | None = None
_loop: asyncio.AbstractEventLoop | None = None
_left_behind: list[asyncio.AbstractEventLoop] = []


def engine_loop() -> asyncio.AbstractEventLoop:
    """The loop on which runs are driven: one a process, started at first use.

    Where threads do not exist (Pyodide) it is the host's own loop.
    """
    global _loop, _thread
    with _lock:
        if _loop is None or _loop.is_closed():
            if sys.platform == "emscripten":
                _loop = asyncio.get_event_loop()
            else:
                _loop = asyncio.new_event_loop()
                _thread = threading.Thread(target=_loop.run_forever, name="cm-engine", daemon=True)
                _thread.start()
        return _loop


def _forget_in_child() -> None:
    """After a fork: the thread stayed in the parent, so the child starts afresh.

    The parent's loop is kept but never touched: its selector is shared with the parent, and closing it here would
    deafen the parent's loop.
    """
    global _lock, _loop
    _lock = threading.Lock()  # the parent's may be held by a thread that does not exist here
    if _loop is not None:
        _left_behind.append(_loop)
        _loop = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)


def running_loop() -> asyncio.AbstractEventLoop | None:
    """The loop that runs in this thread, or ``None``."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


class Pulse:
    """Feels, for who waits on another thread, whether the engine's loop turns.

    An async function that computes long, or waits without ``await``, holds it: then no time-out counts, no other run
    goes on, and nothing can be decided, so whoever waits has to be told.
    """

    __slots__ = ("_answered", "_asked_at", "_loop")

    def __init__(self, loop: asyncio.AbstractEventLoop | None) -> None:
        self._loop = loop
        self._answered = True
        self._asked_at = 0.0

    def held(self) -> str | None:
        """What holds the loop, in a sentence, once it has stood still for long; to be asked again and again."""
        if self._loop is None or self._loop is not _loop:
            return None  # a loop of the user's may be at work for them
        if self._answered:
            self._answered, self._asked_at = False, time.monotonic()
            quietly(self._loop, self._answer)
            return None
        still = time.monotonic() - self._asked_at
        who = _at_work() if still >= STILL_S else None
        if who is None:
            return None
        return (
            f"the loop of all runs has stood still for {still:.0f} s: {who} is async, works on it and does not await. "
            "Write it as a plain function (def), which has a thread of its own."
        )

    def warn(self) -> None:
        """Say it as a warning, once."""
        held = self.held()
        if held is not None:
            import warnings

            self._loop = None
            warnings.warn(held, RuntimeWarning, stacklevel=4)

    def _answer(self) -> None:
        self._answered = True


def _at_work() -> str | None:
    """The function that is at work on the engine's thread, if it is not one of ours."""
    frame = sys._current_frames().get(_thread.ident or 0) if _thread is not None else None
    called = None
    while frame is not None and not frame.f_code.co_filename.startswith(_OURS):
        called, frame = frame, frame.f_back
    if frame is None or called is None:
        return None
    return f"{called.f_code.co_name} ({called.f_code.co_filename}, line {called.f_lineno})"


def run_sync(
    future: concurrent.futures.Future[T],
    timeout_s: float | None = None,
    *,
    loop: asyncio.AbstractEventLoop | None = None,
) -> T:
    """Wait in synchronous code, and return the future's result.

    A ``KeyboardInterrupt`` arrives at once and leaves the work going on.

    Parameters
    ----------
    future
        What to wait for, for instance from ``asyncio.run_coroutine_threadsafe(work(), engine_loop())``.
    timeout_s
        Seconds to wait; ``None`` waits for ever.
    loop
        The loop that does the work; ``None`` means the engine's.

    Raises
    ------
    TimeoutError        It takes longer; the work goes on.
    CodeMachineError    This thread runs `loop`, so it would wait for itself; or `loop` was closed.
    """
    here = running_loop()
    if not future.done() and here is not None and here is (loop or _loop):
        raise CodeMachineError(
            "wait() was called on the event loop that does the work, which would stand still for ever. "
            "Use `await` here instead."
        )
    deadline, pulse = _deadline(timeout_s), Pulse(loop or _loop)
    while not future.done():
        _check_open(loop)
        piece = _next_slice(deadline, timeout_s)
        with contextlib.suppress(TimeoutError, concurrent.futures.CancelledError):
            future.exception(timeout=piece)
        if not future.done():
            pulse.warn()
    return future.result()


async def wait_detached(
    future: concurrent.futures.Future[T],
    timeout_s: float | None = None,
    *,
    loop: asyncio.AbstractEventLoop | None = None,
) -> T:
    """Wait on any loop, and return the future's result; being cancelled or interrupted leaves the work going on.

    Raises
    ------
    TimeoutError        It takes longer than `timeout_s` seconds; the work goes on.
    CodeMachineError    The `loop` that does the work was closed.
    """
    here, finished = asyncio.get_running_loop(), asyncio.Event()

    def wake(_future: object) -> None:  # on the thread that finished the work
        with contextlib.suppress(RuntimeError):  # the waiting loop has been closed meanwhile: nobody is left to wake
            here.call_soon_threadsafe(finished.set)

    future.add_done_callback(wake)
    deadline, pulse = _deadline(timeout_s), Pulse(loop or _loop)
    while not future.done():
        _check_open(loop)
        piece = _next_slice(deadline, timeout_s)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(finished.wait(), piece)
        if not future.done():
            pulse.warn()
    return future.result()


def _check_open(loop: asyncio.AbstractEventLoop | None) -> None:
    if loop is not None and loop.is_closed():
        raise CodeMachineError("the event loop that does the work has been closed: it would never end.")


def _deadline(timeout_s: Any) -> float | None:
    if timeout_s is not None and (not isinstance(timeout_s, (int, float)) or timeout_s != timeout_s):
        raise CodeMachineError(f"timeout_s={timeout_s!r} is not a number of seconds, for instance timeout_s=30.")
    return None if timeout_s is None else time.monotonic() + timeout_s


def _next_slice(deadline: float | None, timeout_s: float | None) -> float:
    """How long the next piece of waiting may be, in seconds; past the deadline it raises ``TimeoutError``."""
    if deadline is None:
        return SLICE_S
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError(f"not finished within {timeout_s:g} s. It goes on: wait again, or stop it.")
    return min(SLICE_S, left)


def quietly(loop: asyncio.AbstractEventLoop, callback: Callable[[], object]) -> None:
    """Call it on that loop, if there is one still."""
    with contextlib.suppress(RuntimeError):  # that loop is closed: nobody waits there any more
        loop.call_soon_threadsafe(callback)
