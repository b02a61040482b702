"""Python functions as agents: what a function is told, and how it runs.

Strategy: the function gets a ``Turn`` and works beside the stream, an async one on the loop, a sync one in a daemon
thread of its own. A ``_Line`` joins the two: what the function emits, in whatever thread, waits in one buffer, and the
loop is woken once per batch. When the turn is over before the function is, an async function is cancelled. A thread
cannot be, so it is let go: what it next asks of its ``Turn`` raises ``_TurnOver``; one that asks nothing delays nobody.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import contextvars
import inspect
import threading
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from ..errors import EngineError, EngineProtocolError, ReplayMismatch
from ..workflow import Verdict
from .base import AgentEvent, AgentRequest, Delta, TurnDone

GRACE_S = 1.0
"""Seconds that a cancelled async function has for cleaning up."""


class _TurnOver(BaseException):
    """Ends a function whose turn nobody waits for. Not an ``Exception``: ``except Exception`` must not swallow it."""


@dataclass(slots=True)
class Turn:
    """What a function agent is told, and how it speaks while it works.

    A plain object: make one by hand to test a function, ``quality_gate(cm.Turn(step="quality-gate"))``.

    Attributes
    ----------
    step, path
        The step's id, and its place in the run (the same, for a step of the workflow).
    prompt
        The exact text, templates filled in; empty when neither agent nor step has a prompt.
    feedback
        Why the last attempt was rejected, or why a module sent the run back; ``None`` in a first attempt.
    attempt, iteration
        Which repeat of the step, and which pass of its loop; from 1.
    inputs, outputs
        The run's inputs, and the approved texts by step.
    workspace
        The folder to work in.
    """

    step: str
    path: str = ""
    prompt: str = ""
    feedback: str | None = None
    attempt: int = 1
    iteration: int = 1
    inputs: Mapping[str, Any] = field(default_factory=dict)
    outputs: Mapping[str, str] = field(default_factory=dict)
    workspace: Path = Path()
    _line: _Line | None = field(default=None, repr=False, compare=False)

    def emit(self, text: str) -> None:
        """Show `text` now. From sync and async code, from any thread; it never waits.

        It is live only: the answer is what the function returns. An async function is shown at its next ``await``.
        """
        if not isinstance(text, str):
            raise TypeError(f"turn.emit takes text, not {type(text).__name__}; write turn.emit(str(…)).")
        if text and self._line is not None:
            self._line.send(text)

    def ask_human(self, question: str) -> Any:
        """Ask a person and get the answer, a ``str``. The run waits; the time is not counted.

        In an async function ``answer = await turn.ask_human("Which port?")``; in a sync function, which has a thread of
        its own, ``answer = turn.ask_human("Which port?")`` waits by itself. Which of the two it is, is decided by the
        thread that calls: on the loop's it returns an awaitable, on any other it blocks until the answer is there.
        """
        line = self._line
        if line is None or line.ask is None:
            raise EngineError(f"{self.step!r} asks {question!r}, but there is nobody to answer here.", step=self.step)
        line.check()
        return line.ask(question) if threading.get_ident() == line.thread else line.ask_and_wait(question)


class _Line:
    """Joins a function to the stream that the run reads: text one way, answers the other."""

    __slots__ = ("ask", "asked", "loop", "open", "pieces", "thread", "waiter", "woken")

    def __init__(self, ask: Callable[[str], Awaitable[str]] | None) -> None:
        self.ask = ask
        self.loop = asyncio.get_running_loop()
        self.thread = threading.get_ident()
        self.waiter: asyncio.Future[None] | None = None
        self.open = True
        self.woken = False
        self.pieces: list[str] = []
        self.asked: set[concurrent.futures.Future[str]] = set()

    def check(self) -> None:
        """Raise ``_TurnOver`` when nobody listens any more."""
        if not self.open:
            raise _TurnOver("this turn is over")

    def send(self, text: str) -> None:
        """Hand over `text`, from any thread."""
        self.check()
        self.pieces.append(text)
        if self.woken:
            return  # whoever takes the batch clears the flag first, so this piece is in it
        self.woken = True
        if threading.get_ident() == self.thread:
            self.wake()
        else:
            self.loop.call_soon_threadsafe(self.wake)

    def take(self) -> str:
        """All that was handed over since the last time."""
        self.woken = False
        batch = self.pieces[:]
        del self.pieces[: len(batch)]  # not a new list: another thread may be about to append to this one
        return "".join(batch)

    async def news(self) -> None:
        """Wait for the next :meth:`wake`. On the loop, as that is, so none is missed between looking and waiting."""
        self.waiter = self.loop.create_future()
        await self.waiter

    def wake(self, _ended: object = None) -> None:
        """There is something to take, or the function has ended."""
        if self.waiter is not None and not self.waiter.done():
            self.waiter.set_result(None)

    def ask_and_wait(self, question: str) -> str:
        """Ask from another thread, and block it until the answer is there or the turn is over."""

        async def put() -> str:
            assert self.ask is not None  # checked by Turn
            return await self.ask(question)

        answer = asyncio.run_coroutine_threadsafe(put(), self.loop)
        self.asked.add(answer)
        if not self.open:
            answer.cancel()  # closed since it was checked
        try:
            return answer.result()
        except concurrent.futures.CancelledError:
            raise _TurnOver("this turn is over") from None
        finally:
            self.asked.discard(answer)

    def close(self) -> None:
        """Nobody listens any more; questions that are open are void."""
        self.open = False
        for answer in list(self.asked):
            answer.cancel()


class FunctionEngine:
    """Runs the Python function of an agent made with ``@cm.agent``.

    The function's context variables are those of the caller; its stdout is not touched.
    """

    name = "function"

    async def stream(self, request: AgentRequest) -> AsyncIterator[AgentEvent]:
        """Call the function and yield what it emits, then what it returns.

        The deltas are what it emits; they need not add up to the text.

        Raises
        ------
        EngineError            The function raised; ``detail`` is its traceback. An ``EngineError`` of its own passes as
                               it is, so that ``EngineRateLimited`` is tried again.
        EngineProtocolError    It returned something else than ``str``, ``Verdict`` or a pydantic model.
        """
        function = request.agent.function
        if function is None:
            raise EngineError(
                f"agent {request.agent.id!r} is a Python function, and the journal keeps only its name. "
                "Run its cell again, or pass the workflow: cm.resume(run_id, workflow).",
                **_where(request),
            )
        line = _Line(request.ask_human)
        task = line.loop.create_task(_call(function, _turn(request, line)))
        task.add_done_callback(line.wake)
        try:
            while True:
                if text := line.take():
                    yield Delta(text)
                elif task.done():
                    break
                else:
                    await line.news()
        finally:
            line.close()
            if not task.done():
                task.cancel()
                await asyncio.wait({task}, timeout=GRACE_S)
        if task.cancelled():
            raise EngineError(f"agent {request.agent.id!r} was cancelled from within.", **_where(request))
        value, error = task.result()
        if error is not None:
            raise _translated(request, error)
        yield _done(request, value)


def _turn(request: AgentRequest, line: _Line) -> Turn:
    return Turn(
        step=request.step,
        path=request.path,
        prompt=request.prompt,
        feedback=request.feedback,
        attempt=request.attempt,
        iteration=request.iteration,
        inputs=request.inputs,
        outputs=request.outputs,
        workspace=request.workspace,
        _line=line,
    )


async def _call(function: Callable[[Turn], Any], turn: Turn) -> tuple[Any, BaseException | None]:
    """What the function returned, or what it raised: ``SystemExit`` raised in a task would end the loop."""
    try:
        if inspect.iscoroutinefunction(function):
            return await function(turn), None
        value, error = await _in_thread(function, turn)
        # a decorated async function often looks like a sync one that returns a coroutine
        return (await value, None) if error is None and inspect.isawaitable(value) else (value, error)
    except (asyncio.CancelledError, KeyboardInterrupt):
        raise
    except BaseException as error:
        return None, error


async def _in_thread(function: Callable[[Turn], Any], turn: Turn) -> tuple[Any, BaseException | None]:
    """Run the function in a thread that delays neither loop nor interpreter when it never ends."""
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[tuple[Any, BaseException | None]] = loop.create_future()
    context = contextvars.copy_context()

    def settle(value: Any, error: BaseException | None) -> None:
        if not ended.done():
            ended.set_result((value, error))

    def work() -> None:
        value: Any = None
        failure: BaseException | None = None
        try:
            value = context.run(function, turn)
        except BaseException as error:
            failure = error
        with contextlib.suppress(RuntimeError):  # the loop is closed: the turn was over long ago
            loop.call_soon_threadsafe(settle, value, failure)

    threading.Thread(target=work, name=f"cm {turn.path}", daemon=True).start()
    return await ended


def _done(request: AgentRequest, value: Any) -> TurnDone:
    if isinstance(value, str):
        return TurnDone(str(value))
    if isinstance(value, Verdict):
        return TurnDone(value.reason, verdict=value)
    name = request.agent.id
    right = "A function agent returns str, cm.Verdict or a pydantic model"
    if isinstance(value, BaseModel):
        try:
            return TurnDone(value.model_dump_json(indent=2), output=value.model_dump(mode="json"))
        except ValueError as error:
            problem = f"agent {name!r} returned a {type(value).__name__} that cannot be written as JSON: {error}"
            raise EngineProtocolError(problem, **_where(request)) from error
    if value is None:
        said, hint = "None", "; a return is missing at its end."
    elif inspect.isgenerator(value) or inspect.isasyncgen(value):
        said, hint = "a generator", "; to stream, call turn.emit(text) and return the whole text."
    else:
        said, hint = type(value).__name__, "; make it text with str(…) or json.dumps(…)."
    raise EngineProtocolError(f"agent {name!r} returned {said}. {right}{hint}", **_where(request))


def _translated(request: AgentRequest, error: BaseException) -> BaseException:
    """The one error that leaves this module; those that already say what the run should do pass as they are."""
    if isinstance(error, ReplayMismatch):
        return error
    if isinstance(error, EngineError):
        for name, value in _where(request).items():
            if getattr(error, name) is None:
                setattr(error, name, value)
        return error
    frames = error.__traceback__
    while frames is not None and frames.tb_frame.f_code.co_filename == __file__:
        frames = frames.tb_next  # ours say nothing to who wrote the function
    try:
        said = " ".join(str(error).split())
    except Exception:
        said = ""
    problem = f"agent {request.agent.id!r} raised {type(error).__name__}" + (f": {said[:500]}" if said else "")
    detail = "".join(traceback.format_exception(type(error), error, frames))
    made = EngineError(problem, detail=detail, **_where(request))
    made.__cause__ = error
    return made


def _where(request: AgentRequest) -> dict[str, Any]:
    return {"engine": FunctionEngine.name, "step": request.step, "attempt": request.attempt}
