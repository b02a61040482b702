"""Python functions as agents: what a function is told, and how it runs.

Strategy: the function gets a ``Turn`` and runs where the turn runs: an async one in the turn's own task, a sync one in
a daemon thread. What it emits goes straight to the run, from whatever thread (``AgentRequest.emit``). When the turn is
over before the function is, an async function is cancelled with its task. A thread cannot be and is let go: what it
next asks of its ``Turn`` raises ``_TurnOver``, and one that asks nothing delays nobody.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import contextvars
import functools
import inspect
import threading
import traceback
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from .. import keys
from ..errors import EngineError, EngineProtocolError, ReplayMismatch
from ..plain import Plain
from ..workflow import Verdict
from .base import AgentRequest, Streamless, TurnDone


class _TurnOver(BaseException):
    """Ends a function whose turn nobody waits for. Not an ``Exception``: ``except Exception`` must not swallow it."""


@dataclass(slots=True, eq=False, repr=False)
class Turn(Plain):
    """What a function agent is told, and how it speaks while it works.

    A plain object: make one by hand to test a function, ``quality_gate(cm.Turn(step="quality-gate"))``. A sync function
    uses :meth:`emit`, :meth:`ask_human` and :meth:`run_agents` as they are, an async one awaits the last two.

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
        The run's inputs, and the approved texts of earlier steps, by their ids. ``outputs`` is a live view: in a turn
        that is kept after its end it shows what was approved later; ``dict(turn.outputs)`` keeps what there is now.
    workspace
        The folder to work in; in a turn made by hand, the working folder.
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

        It is live only: the answer is what the function returns.
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
        if line is None or line.request.ask_human is None:
            raise EngineError(f"{self.step!r} asks {question!r}, but there is nobody to answer here.", step=self.step)
        return line.call(line.request.ask_human, question)

    def run_agents(self, *groups: Any, max_concurrency: int | None = None) -> Any:
        """Have other agents of the workflow work, and get what came of each: a list of ``AgentResult``.

        As :meth:`ask_human`, it is awaited in an async function, and waits by itself in a sync one.

        Parameters
        ----------
        groups
            Lists of calls ``{"agent": …, "prompt": …, "input_files": [files of the workspace], "tail": lines}``: one
            list after the other, the calls of a list side by side. Or one line in this spelling:
            ``frontend-dev 'the UI' & backend-dev 'the API' && qa-engineer 'test both'``.
        max_concurrency
            How many of them may work at the same time; ``None``: as many as the run allows.

        Raises
        ------
        WorkflowError    One of them cannot be called (``Workflow(sub_agents=[…])`` lists who can) or is asked nothing.

        Notes
        -----
        An agent that fails is said in its result (``error``); what was asked beside it goes on, later lists do not
        begin.
        """
        line = self._line
        if line is None or line.request.run_agents is None:
            raise EngineError(f"{self.step!r} calls agents, but it is no part of a run here.", step=self.step)
        asked = groups[0] if len(groups) == 1 else list(groups)
        return line.call(line.request.run_agents, asked, max_concurrency)


class Raised(Exception):
    """Carries what a sync function raised out of its thread, whatever it is."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(error)
        self.error = error


class _Line:
    """Joins a function to its run, as long as somebody listens: text one way, answers the other."""

    __slots__ = ("asked", "loop", "open", "request", "thread")

    def __init__(self, request: AgentRequest) -> None:
        self.request = request
        self.loop = asyncio.get_running_loop()
        self.thread = threading.get_ident()
        self.open = True
        self.asked: set[concurrent.futures.Future[Any]] | None = None

    def check(self) -> None:
        """Raise ``_TurnOver`` when nobody listens any more."""
        if not self.open:
            raise _TurnOver("this turn is over")

    def send(self, text: str) -> None:
        """Hand over `text`, from any thread."""
        self.check()
        if self.request.emit is not None:
            self.request.emit(text)

    def call(self, ask: Callable[..., Awaitable[Any]], *what: Any) -> Any:
        """What `ask` returns: on the loop's thread to be awaited, on another one when it is there."""
        self.check()
        return ask(*what) if threading.get_ident() == self.thread else self._wait_for(ask, what)

    def _wait_for(self, ask: Callable[..., Awaitable[Any]], what: tuple[Any, ...]) -> Any:
        """Ask from another thread, and block it until the answer is there or the turn is over."""

        async def put() -> Any:
            return await ask(*what)

        answer = asyncio.run_coroutine_threadsafe(put(), self.loop)
        if self.asked is None:
            self.asked = set()
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
        for answer in list(self.asked or ()):
            answer.cancel()


class FunctionEngine(Streamless):
    """Runs the Python function of an agent made with ``@cm.agent``.

    The function's context variables are those of the caller; its stdout is not touched.
    """

    name = "function"
    free = True

    async def answer(self, request: AgentRequest) -> TurnDone:
        """Call the function; what it emits goes to ``request.emit`` meanwhile.

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
        line = _Line(request)
        try:
            if _is_async(function):
                value = await function(_turn(request, line))
            else:
                value = await _call_in_thread(function, _turn(request, line))
        except (asyncio.CancelledError, KeyboardInterrupt, GeneratorExit):
            raise
        except Raised as raised:
            raise _translated(request, raised.error) from raised.error
        except BaseException as error:  # SystemExit too: raised in a task it would end the loop
            raise _translated(request, error) from error
        finally:
            line.close()
        return _done(request, value)


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


_is_async = functools.lru_cache(maxsize=1024)(inspect.iscoroutinefunction)


async def _call_in_thread(function: Callable[[Turn], Any], turn: Turn) -> Any:
    value = await in_thread(functools.partial(function, turn), f"cm {turn.path}")
    # a decorated async function often looks like a sync one that returns a coroutine
    return await value if inspect.isawaitable(value) else value


async def in_thread(function: Callable[[], Any], name: str) -> Any:
    """Run the function in a thread that delays neither loop nor interpreter when it never ends.

    Raises
    ------
    Raised    It carries what the function raised.
    """
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
            value = context.run(function)
        except BaseException as error:
            failure = error
        with contextlib.suppress(RuntimeError):  # the loop is closed: the turn was over long ago
            loop.call_soon_threadsafe(settle, value, failure)

    threading.Thread(target=work, name=name, daemon=True).start()
    value, failure = await ended
    if failure is not None:
        raise Raised(failure)
    return value


def _done(request: AgentRequest, value: Any) -> TurnDone:
    if isinstance(value, str):
        return TurnDone(str(value))
    if isinstance(value, Verdict):
        return TurnDone(str(value.reason), verdict=value)
    name = request.agent.id
    right = "A function agent returns str, cm.Verdict or a pydantic model"
    if isinstance(value, BaseModel):
        try:
            return TurnDone(value.model_dump_json(indent=2), value.model_dump(mode="json"), type(value))
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
        said = keys.hide(" ".join(str(error).split()))[:500]  # cut last: half a key is not known again
    except Exception:
        said = ""
    problem = f"agent {request.agent.id!r} raised {type(error).__name__}" + (f": {said}" if said else "")
    detail = keys.hide("".join(traceback.format_exception(type(error), error, frames)))
    made = EngineError(problem, detail=detail, **_where(request))
    made.__cause__ = error
    return made


def _where(request: AgentRequest) -> dict[str, Any]:
    return {"engine": FunctionEngine.name, "step": request.step, "attempt": request.attempt}
