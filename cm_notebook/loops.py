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

SLICE_S = 0.25
"""Longest wait in one piece: ipykernel's interrupt of an awaiting cell is noticed only when its loop wakes, and on
Windows a blocked thread hears Ctrl+C only between waits."""

_lock = threading.Lock()
_loop: asyncio.AbstractEventLoop | None = None
_left_behind: list[asyncio.AbstractEventLoop] = []


def engine_loop() -> asyncio.AbstractEventLoop:
    """The loop on which runs are driven: one a process, started at first use.

    Where threads do not exist (Pyodide) it is the host's own loop.
    """
    global _loop
    with _lock:
        if _loop is None or _loop.is_closed():
            if sys.platform == "emscripten":
                _loop = asyncio.get_event_loop()
            else:
                _loop = asyncio.new_event_loop()
                threading.Thread(target=_loop.run_forever, name="cm-engine", daemon=True).start()
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
    deadline = _deadline(timeout_s)
    while not future.done():
        _check_open(loop)
        piece = _next_slice(deadline, timeout_s)
        with contextlib.suppress(TimeoutError, concurrent.futures.CancelledError):
            future.exception(timeout=piece)
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
    deadline = _deadline(timeout_s)
    while not future.done():
        _check_open(loop)
        piece = _next_slice(deadline, timeout_s)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(finished.wait(), piece)
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
