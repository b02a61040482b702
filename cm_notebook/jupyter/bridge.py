"""What depends on the kernel: who is there, clicks while a cell runs, waiting in a cell, outputs from threads.

Strategy: ask the kernel as little as possible, believe nothing, and have a way on when an answer is missing. What is
not public API is used in one class, `DirectClicks`, and only there: it takes the click where the kernel reads it
instead of where the kernel gets round to it. Without it (another kernel, a new ipykernel, switched off) the same
messages arrive by the usual `on_msg`, only later.

IPython is never imported here; when it is not loaded already, there is no kernel.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import datetime
import math
import os
import signal
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, TypeVar

from ..errors import CodeMachineError
from ..loops import run_sync, running_loop, wait_detached

T = TypeVar("T")
FrontEnd = Literal["jupyter", "colab", "vscode", "voila", "terminal", "headless", "none"]


# -- who is there ------------------------------------------------------------------------------------------------------


def shell() -> Any:
    """The IPython shell of this process, or ``None``."""
    get_ipython = getattr(sys.modules.get("IPython"), "get_ipython", None)
    return get_ipython() if get_ipython else None


def kernel() -> Any:
    """The kernel this process is, or ``None`` in a terminal or a script."""
    return getattr(shell(), "kernel", None)


def kernel_version() -> str:
    """Version of ipykernel, for instance ``"7.4.0"``; empty outside it."""
    return getattr(sys.modules.get("ipykernel"), "__version__", "") if kernel() is not None else ""


def _request() -> dict[str, Any]:
    """The message that the kernel is answering; empty outside a kernel."""
    try:
        found = kernel().get_parent("shell")
    except Exception:  # no kernel, or one that does not know the question
        return {}
    return found if isinstance(found, dict) else {}


def somebody() -> bool:
    """Whether a person can answer here.

    The first sign counts: ``CM_HEADLESS`` (``1`` nobody, ``0`` somebody), Voila, Colab, what the request says
    (nbclient and papermill send ``allow_stdin: false``), and without a kernel, whether stdin is a terminal.

    Notes
    -----
    Call it in the cell that starts the run, and keep the answer: once that cell has ended, the kernel's request is
    another one.
    """
    said = os.environ.get("CM_HEADLESS", "").strip().lower()
    if said:
        return said in ("0", "false", "no", "off")
    if _in_voila() or _in_colab():
        return True
    present = kernel()
    if present is None:
        return _terminal()
    request = _request()
    content = request.get("content")
    if isinstance(content, dict) and "allow_stdin" in content:
        return bool(content["allow_stdin"])
    if str(request.get("header", {}).get("msg_type", "")).startswith("comm_"):
        return True  # we are in a click
    return bool(getattr(present, "_allow_stdin", False))


def front_end() -> FrontEnd:
    """What shows our output. Ask in a cell, as for :func:`somebody`."""
    if not somebody():
        return "none" if kernel() is None else "headless"
    if _in_voila():
        return "voila"
    if _in_colab():
        return "colab"
    if kernel() is None:
        return "terminal" if _terminal() else "none"
    return "vscode" if _in_vscode() else "jupyter"


def notebook_key() -> str:
    """What tells this notebook from others: its file where the front end says it, else the working folder."""
    named = os.environ.get("JPY_SESSION_NAME") or getattr(shell(), "user_ns", {}).get("__vsc_ipynb_file__")
    return str(named or os.getcwd())  # noqa: PTH109 (a plain string is wanted)


def cell_id() -> str | None:
    """The id of the cell that runs, where the front end sends it."""
    found = (_request().get("metadata") or {}).get("cellId")
    return None if found is None else str(found)


def asked_at() -> float:
    """When the execution of the present cell was asked for, in seconds since the epoch.

    The moment its request arrived at the kernel, if direct clicks saw it; else the date that the front end wrote on
    it, by the front end's clock. Outside a kernel: now.
    """
    header = _request().get("header") or {}
    arrived = direct_clicks.arrival(header.get("msg_id", ""))
    return arrived or _seconds(header.get("date")) or time.time()


def _seconds(date: object) -> float | None:
    if not isinstance(date, datetime.datetime):
        return None
    return (date if date.tzinfo else date.replace(tzinfo=datetime.UTC)).timestamp()


def _in_voila() -> bool:
    return os.environ.get("SERVER_SOFTWARE", "").lower().startswith("voila/")


def _in_colab() -> bool:
    return "google.colab" in sys.modules


def _in_vscode() -> bool:
    """VS Code says so itself, or has started the kernel; a server started from its terminal does not count."""
    if "__vsc_ipynb_file__" in getattr(shell(), "user_ns", {}):
        return True
    return "JPY_SESSION_NAME" not in os.environ and any(name.startswith("VSCODE_") for name in os.environ)


def _terminal() -> bool:
    try:
        return sys.stdin.isatty()
    except (AttributeError, ValueError):  # no stdin, or closed
        return False


# -- clicks while a cell runs ------------------------------------------------------------------------------------------


Handler = Callable[[dict[str, Any]], None]
"""Gets the content of a widget's custom message. It runs on any thread, so it must be short and thread-safe
(``loop.call_soon_threadsafe(…)``), and it belongs to no cell, so it must not print or display."""


class DirectClicks:
    """A filter before the kernel's shell queue: clicks on our views go straight to their handlers.

    ipykernel 7 reads the shell socket on a thread of its own and then queues the message behind the running cell;
    ipykernel 6 reads it on the main loop, so also while a cell awaits. Both call the function that was given to
    ``kernel.shell_stream.on_recv``. We put ourselves before it: a custom message for a registered comm is verified
    and handed over at once, everything else takes its usual way untouched.

    Not public, and checked: the stream's ``_recv_callback`` and ``_recv_copy`` (pyzmq). On ipykernel and
    jupyter_client public names are relied on: ``shell_stream``, ``session``, ``iopub_socket``, ``get_parent``.

    Attributes
    ----------
    enabled
        The switch (``%config CM.direct_clicks``). Off: every message takes its usual way.
    """

    REMEMBERED = 1000
    """How many arrival times are kept."""

    def __init__(self) -> None:
        self.enabled = True
        self._kernel: Any = None
        self._filter: _Filter | None = None
        self._handlers: dict[str, Handler] = {}
        self._arrivals: dict[str, float] = {}
        self._delays: dict[str, float] = {}
        self._running: dict[str, Any] | None = None
        self._running_lock = threading.Lock()

    @property
    def installed(self) -> bool:
        """Whether the filter is in place."""
        return self._filter is not None

    @property
    def heard_while_blocked(self) -> bool:
        """Whether a click arrives even while a cell computes or waits synchronously (ipykernel 7)."""
        return self.enabled and self.installed and self._kernel.shell_stream.io_loop is not self._kernel.io_loop

    def register(self, comm_id: str, handler: Handler) -> None:
        """Hand the custom messages of this comm to `handler` as they are read."""
        self._handlers[comm_id] = handler

    def unregister(self, comm_id: str) -> None:
        """Let this comm's messages take their usual way again."""
        self._handlers.pop(comm_id, None)

    def arrival(self, msg_id: str) -> float | None:
        """When this ``execute_request`` reached the kernel, in seconds since the epoch; ``None`` if not seen."""
        return self._arrivals.get(msg_id)

    def install(self, kernel: Any) -> bool:
        """Put the filter in place; harmless when it is there already, also an older one of a reloaded module.

        Returns
        -------
        bool
            ``False`` when something is not as expected, or the kernel has not started yet (an extension loaded from
            a configuration file: call again at first use). Clicks then arrive the usual way.
        """
        stream: Any = getattr(kernel, "shell_stream", None)
        session: Any = getattr(kernel, "session", None)
        present = getattr(stream, "_recv_callback", None)
        if present is not None and present is self._filter:
            return True
        if not callable(present) or getattr(stream, "_recv_copy", None) is not False:
            return False
        needed = ((kernel, "iopub_socket get_parent io_loop shell"), (stream, "on_recv io_loop"))
        if not all(hasattr(owner, name) for owner, names in needed for name in names.split()):
            return False
        if not all(hasattr(session, name) for name in ("feed_identities", "deserialize", "unpack", "send")):
            return False
        made = _Filter(self, kernel, getattr(present, "cm_usual", present))
        if not _on_loop(stream.io_loop, lambda: stream.on_recv(made, copy=False)):
            return False
        self.uninstall()  # from a kernel before this one (tests), or from under another tool's filter
        self._kernel, self._filter = kernel, made
        self._running = kernel.get_parent("shell") or None  # we are in a cell, as a rule
        kernel.shell.events.register("pre_run_cell", self._cell_begins)
        kernel.shell.events.register("post_run_cell", self._cell_ends)
        return True

    def uninstall(self) -> None:
        """Take the filter out. If another tool has put its own on top, ours stays and lets everything through."""
        ours, kernel = self._filter, self._kernel
        self._filter = self._kernel = self._running = None
        if ours is None:
            return
        stream = kernel.shell_stream

        def restore() -> None:
            if stream._recv_callback is ours:
                stream.on_recv(ours.cm_usual, copy=False)

        _on_loop(stream.io_loop, restore)
        for event, callback in (("pre_run_cell", self._cell_begins), ("post_run_cell", self._cell_ends)):
            with contextlib.suppress(ValueError):
                kernel.shell.events.unregister(event, callback)

    def _take(self, kernel: Any, frames: list[Any]) -> bool:
        """Whether this message was for us and is dealt with. Called by the kernel's reader, on its thread."""
        try:
            found = self._read(kernel.session, frames)
        except Exception:  # forged, repeated or malformed: the usual way refuses it and says so
            return False
        if found is None:
            return False
        message, handler = found
        try:
            handler(message["content"]["data"].get("content") or {})
        except Exception:
            kernel.log.exception("cm_notebook: a click could not be handled")
        self._publish_idle(kernel, message)
        return True

    def _read(self, session: Any, frames: list[Any]) -> tuple[dict[str, Any], Handler] | None:
        """The message and its handler, if it has one; its signature is verified, and may be used once."""
        _identities, parts = session.feed_identities(frames, copy=False)
        header = parts[1].bytes
        if b"comm_msg" not in header and b"execute_request" not in header:  # the usual case costs nothing
            return None
        message = session.deserialize(parts, content=False, copy=False)  # raises when the signature is wrong
        if message["msg_type"] == "execute_request":
            self._note_arrival(message["header"])
        if message["msg_type"] != "comm_msg":
            return None
        content = session.unpack(message["content"])
        handler = self._handlers.get(content["comm_id"])
        if handler is None or content["data"].get("method") != "custom":
            return None
        return session.deserialize(parts, content=True, copy=False), handler  # notes the signature: no replay

    def _note_arrival(self, header: dict[str, Any]) -> None:
        """Remember when this request came.

        ipykernel 6 reads nothing while a cell computes, so a request may have waited unread. Then the date that its
        sender wrote on it is used, put right by the shortest delay seen from that sender (its clock may be wrong).
        """
        came = time.time()
        sent = _seconds(header.get("date"))
        if sent is not None and not self.heard_while_blocked:
            sender = str(header.get("session"))
            delay = min(came - sent, self._delays.get(sender, math.inf))
            _remember(self._delays, sender, delay, self.REMEMBERED)
            came = sent + delay
        _remember(self._arrivals, header["msg_id"], came, self.REMEMBERED)

    def _cell_begins(self, *_info: object) -> None:
        with self._running_lock:
            self._running = _request() or None

    def _cell_ends(self, *_result: object) -> None:
        with self._running_lock:
            self._running = None

    def _publish_idle(self, kernel: Any, message: dict[str, Any]) -> None:
        """Tell the page that its message is dealt with, and that the running cell, if any, still runs.

        Without the second half the front end shows an idle kernel and the server may cull it. The lock keeps it from
        overtaking the end of the cell.
        """
        topic = kernel._topic("status") if hasattr(kernel, "_topic") else b"status"

        def say(state: str, about: dict[str, Any]) -> None:
            kernel.session.send(kernel.iopub_socket, "status", {"execution_state": state}, parent=about, ident=topic)

        try:
            with self._running_lock:
                say("idle", message)
                if self._running is not None:
                    say("busy", self._running)
        except Exception:
            kernel.log.exception("cm_notebook: the state after a click could not be published")


class _Filter:
    """What is given to ``on_recv`` in place of `cm_usual`; known by that name to a reloaded module."""

    def __init__(self, owner: DirectClicks, kernel: Any, usual: Callable[[list[Any]], Any]) -> None:
        self.owner, self.kernel, self.cm_usual = owner, kernel, usual

    def __call__(self, frames: list[Any]) -> Any:
        if self.owner.enabled and self.owner._filter is self and self.owner._take(self.kernel, frames):
            return None
        return self.cm_usual(frames)  # a coroutine on ipykernel 7, which the stream awaits


def _on_loop(io_loop: Any, action: Callable[[], None], timeout_s: float = 2.0) -> bool:
    """Do it on the thread of that tornado loop, and say whether it was done in time."""
    if running_loop() is io_loop.asyncio_loop:
        action()
        return True
    done = threading.Event()

    def act() -> None:
        action()
        done.set()

    io_loop.add_callback(act)
    return done.wait(timeout_s)


def _remember(table: dict[str, float], key: str, value: float, limit: int) -> None:
    table[key] = value
    while len(table) > limit:
        del table[next(iter(table))]


direct_clicks = DirectClicks()
"""The one filter of this process."""


# -- waiting in a cell -------------------------------------------------------------------------------------------------


def wait_in_cell(future: concurrent.futures.Future[T], timeout_s: float | None = None, *, loop: Any = None) -> T:
    """Wait synchronously, so that a click can still end the wait; anywhere else the same as ``run_sync``.

    ipykernel 7 reads clicks on another thread, so plain waiting will do. ipykernel 6 reads them on the loop that the
    cell blocks, so that loop is turned from within (nest-asyncio2; never on 7, where it loses messages). Where nobody
    is there to click, nothing is turned.

    Parameters
    ----------
    future, timeout_s, loop
        As for :func:`cm_notebook.loops.run_sync`.

    Raises
    ------
    TimeoutError        It takes longer; the work goes on.
    CodeMachineError    No click could arrive here, or the loop cannot be turned; the message says what to do instead.
    """
    here: Any = running_loop()
    in_kernel = here is not None and here is getattr(getattr(kernel(), "io_loop", None), "asyncio_loop", None)
    awaiting = in_kernel and _in_awaiting_cell()
    if in_kernel and not future.done():
        clicks = here is not loop and somebody()
        if clicks and direct_clicks.enabled:
            direct_clicks.install(kernel())
        filtered = direct_clicks.installed and direct_clicks.enabled
        if kernel_version().startswith("6.") and (here is loop or (clicks and filtered)):
            if awaiting:
                raise CodeMachineError(
                    "On ipykernel 6, a cell that holds an `await` cannot wait synchronously. Use `await run`."
                )
            return _turn_and_wait(here, future, timeout_s)
        if clicks and not direct_clicks.heard_while_blocked:
            raise _deaf()
    with _interruptible() if awaiting else contextlib.nullcontext():
        return run_sync(future, timeout_s, loop=loop)


def _in_awaiting_cell() -> bool:
    """Whether we are directly in a cell that holds an ``await``: ipykernel runs it as a task of its own.

    An interrupt cancels that task, through the loop. Turning the loop from within would let it be cancelled while it
    runs; ipykernel 6 then takes the end of the cell for its own end, and answers no more.
    """
    task = asyncio.current_task()
    return task is not None and getattr(task.get_coro(), "__name__", "") == "run_cell_async"


def _turn_and_wait(here: Any, future: concurrent.futures.Future[T], timeout_s: float | None) -> T:
    try:
        import nest_asyncio2  # type: ignore[import-untyped]

        nest_asyncio2.apply(here)
    except (ImportError, ValueError):  # not installed, or a loop that it cannot patch, such as uvloop's
        raise _deaf() from None
    waiting = here.create_task(wait_detached(future, timeout_s))
    try:
        result: T = here.run_until_complete(waiting)
        return result
    finally:
        waiting.cancel()


def _deaf() -> CodeMachineError:
    version = kernel_version()
    if version.startswith("6."):
        remedy = "Use the buttons without `await`, or install ipykernel 7.4 or newer."
    elif not direct_clicks.enabled:
        remedy = "Use `await`, or switch on `%config CM.direct_clicks = True`."
    else:
        remedy = "Use `await`, or the buttons without waiting."
    return CodeMachineError(f"This kernel (ipykernel {version}) cannot receive clicks while a cell waits. {remedy}")


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Hear an interrupt at once, in a cell that holds an ``await``: there ipykernel answers it on the blocked loop."""
    if threading.current_thread() is not threading.main_thread():  # a subshell: it has no signals
        yield
        return
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before if before is not None else signal.SIG_DFL)


# -- outputs from threads ----------------------------------------------------------------------------------------------


class Slot:
    """One output of a cell that can be replaced later, from any thread.

    A plain ``display`` from a thread lands under whichever cell ran last; an update goes where its id was first shown.
    """

    def __init__(self, publisher: Any, display_id: str) -> None:
        self._publisher, self.display_id = publisher, display_id

    @classmethod
    def open(cls, bundle: Mapping[str, Any], metadata: Mapping[str, Any] | None = None) -> Slot:
        """Show `bundle` (MIME type → data) under the present cell. Without IPython its text is printed."""
        # Kept, because %%capture in another cell swaps the shell's publisher while it runs.
        slot = cls(getattr(shell(), "display_pub", None), uuid.uuid4().hex)
        slot._publish(bundle, metadata, update=False)
        return slot

    def update(self, bundle: Mapping[str, Any], metadata: Mapping[str, Any] | None = None) -> None:
        """Show `bundle` in its place."""
        self._publish(bundle, metadata, update=True)

    def _publish(self, bundle: Mapping[str, Any], metadata: Mapping[str, Any] | None, *, update: bool) -> None:
        if self._publisher is None:
            print(bundle.get("text/plain", ""))
            return
        self._publisher.publish(
            data=dict(bundle),
            metadata=dict(metadata or {}),
            transient={"display_id": self.display_id},
            update=update,
        )
