"""One turn: a prompt goes out to an engine, one event comes back.

Strategy: this is the edge between a run and whoever does the work. It knows time, retries and errors, and nothing of
gates or journals: ``take_turn`` hands live text on, and returns how the turn ended as the event that says so.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

from pydantic import BaseModel

from . import events, keys
from .engines.base import (
    AgentEvent,
    AgentRequest,
    Delta,
    Engine,
    Streamless,
    ToolCalled,
    ToolReturned,
    TurnDone,
    UsageReported,
    misfit,
)
from .errors import CodeMachineError, EngineError, EngineProtocolError, EngineTimeout
from .events import HISTORY, AnyEvent, ErrorInfo, SessionOpened, TurnFailed, TurnFinished, TurnStarted
from .plain import not_json
from .tools import shortened
from .workflow import Module, Step, Verdict, fitted, sound, unfenced

YIELD_EVERY = 64
"""After so many pieces of text other turns get their chance."""
MOST_PIECES = 4096
"""So many pieces of text are kept apart; joined, they take a tenth of the memory."""
LONGEST_BACKOFF_S = 60
LONGEST_KEPT = 2_000
"""Characters that are kept of a tool's arguments and result."""
LONGEST_LINE = 200
"""Characters that are shown of a tool's arguments and result."""


class Ending(NamedTuple):
    """How a turn ended. ``error``: what was raised; ``fatal``: it is no engine's error, and ends the run as itself."""

    event: TurnFinished | TurnFailed
    error: Exception | None = None
    fatal: bool = False


class LiveTurn:
    """A turn that is under way: its task, what it has written so far, and its time.

    Parameters
    ----------
    step
        The step; its ``timeout_s`` is the turn's time, which stands still while the turn waits for a person.
    late
        Called when the time is over. The task may not listen to being cancelled, so the turn's end is not left to it.
    since
        The first event (``seq``) of the pass that began it.
    """

    task: asyncio.Task[None] | None = None
    failures = 0
    held = False
    """A limit is reached, and it waits until that is another one."""
    used: Mapping[str, Any] = MappingProxyType({})
    """What it has said so far that it used, as its last event keeps it."""
    said = used
    """The same as it was recorded last."""
    session_id: str | None = None
    """Its agent's conversation, as far as it has said so."""
    model: type[BaseModel] | None = None
    """The class of the value that it gave."""
    asking: asyncio.Lock | None = None
    over = False
    """It is known how it ends; that is still to be written down."""
    _since = 0.0
    _timer: asyncio.TimerHandle | None = None
    _heard_at: float | None = None

    def __init__(self, started: TurnStarted, step: Step, late: Callable[[LiveTurn], None], since: int) -> None:
        self.started, self.step, self.since = started, step, since
        self.recalled: set[int] = set()
        self._late = late
        self._left_s = step.timeout_s
        self._parts: list[str] = []

    def one_at_a_time(self) -> asyncio.Lock:
        """Held while it asks somebody for something: a turn waits for one thing at a time."""
        if self.asking is None:
            self.asking = asyncio.Lock()
        return self.asking

    def write(self, text: str) -> None:
        """Append to what it has written."""
        self._heard_at = time.monotonic()
        self._parts.append(text)
        if len(self._parts) > MOST_PIECES:
            self._parts = ["".join(self._parts)]

    def text(self) -> str:
        """All that it has written; from any thread."""
        return "".join(self._parts[:])

    def silence(self) -> str:
        """How long nothing has come of it, in words."""
        if self._heard_at is None:
            return "without any output"
        silent_s = time.monotonic() - self._heard_at
        return f"{silent_s:.0f} s without output" if silent_s >= 1 else "it was still writing"

    def run_clock(self) -> None:
        """Let its time run, from where it stood."""
        if self._left_s is not None and self._timer is None:
            loop = asyncio.get_running_loop()
            self._since = loop.time()
            self._timer = loop.call_later(self._left_s, self._late, self)

    def stop_clock(self) -> None:
        """Let its time stand still."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
            self._left_s = max(0.0, (self._left_s or 0.0) - (asyncio.get_running_loop().time() - self._since))

    def spent(self) -> list[AnyEvent]:
        """What is to be recorded before it goes on: what it has used, where that is not known yet."""
        if self.said is self.used:
            return []
        self.said, one = self.used, self.started
        about = {"step": one.step, "path": one.path, "attempt": one.attempt, "turn": one.turn}
        return [events.UsageReported(**about, **self.used)]

    def cancel(self) -> None:
        """It is not waited for any more."""
        self.stop_clock()
        if self.task is not None:
            self.task.cancel()


class Listener(Protocol):
    """Who hears what a turn does while it is under way."""

    def write(self, text: str) -> None:
        """Take live text."""

    def think(self, text: str) -> None:
        """Take what the agent thinks before it writes."""

    def record(self, event: AnyEvent) -> None:
        """Take what the agent does with tools, and the id of its conversation as soon as it is known, as an event."""


async def take_turn(turn: LiveTurn, engine: Engine, request: AgentRequest, listener: Listener) -> Ending:
    """Do `turn`: send the request to the engine and pass on what it tells.

    Raises
    ------
    asyncio.CancelledError    The turn was cut short; whoever did that has recorded it.
    """
    started, step = turn.started, turn.step
    try:
        if isinstance(engine, Streamless):
            done = await engine.answer(request)
        else:
            done = await _heard(turn, engine, request, listener)
        text, verdict = sound(done.text), _verdict(step, done)
        output, turn.model = None, done.model
        if done.output is not None:
            _check_json("output", done.output, started)
            output = sound(done.output)
        if isinstance(request.agent.output, type) and not done.unsent:
            output = _held(request.agent.output, text, output, started)
        if verdict is not None and verdict.score is not None:
            _check_json("score", verdict.score, started)
        if turn.used.get("cost_usd") is None and getattr(engine, "free", False) and not done.unpriced:
            turn.used = {**turn.used, "cost_usd": 0.0}
        event = TurnFinished.made(
            step=started.step,
            path=started.path,
            attempt=started.attempt,
            turn=started.turn,
            text=text,
            output=output,
            verdict=verdict,
            usage=turn.used.get("usage"),
            cost_usd=turn.used.get("cost_usd"),
            cost_estimated=turn.used.get("cost_estimated"),
            session_id=turn.session_id,
            duration_s=None if done.duration_s is None else float(done.duration_s),
            note=sound(done.note),
        )
    except EngineError as error:
        return failed(turn, error, _retry_in_s(step, error, turn.failures))
    except Exception as error:  # a tape that differs, or a bug
        return failed(turn, error, None, fatal=True)
    except (SystemExit, KeyboardInterrupt) as error:
        if isinstance(error, KeyboardInterrupt) and threading.current_thread() is threading.main_thread():
            raise  # the person's own, where the run has the kernel's loop
        # raised on, it would end the thread on which all runs are driven
        return failed(turn, EngineError(f"{started.step} raised {type(error).__name__}."), None)
    return Ending(event)


async def _heard(turn: LiveTurn, engine: Engine, request: AgentRequest, listener: Listener) -> TurnDone:
    """The answer at the end of the engine's stream; what it tells before is passed on."""
    started, write, think = turn.started, listener.write, listener.think
    done: TurnDone | None = None
    pieces = 0
    stream = _stream(engine, request)
    try:
        async for told in stream:
            if not isinstance(told, Delta) or not isinstance(told.text, str):  # a piece of text has nothing else
                _check(told, engine)
            if isinstance(told, Delta):
                (write if told.kind == "text" else think)(told.text)
                pieces += 1
                if pieces % YIELD_EVERY == 0:
                    await asyncio.sleep(0)
            elif isinstance(told, TurnDone):
                done = told
            elif isinstance(told, UsageReported):
                used = {"usage": told.usage, "cost_usd": None if told.cost_usd is None else float(told.cost_usd)}
                turn.used = {**used, "cost_estimated": True} if told.cost_estimated else used
            elif isinstance(told, (ToolCalled, ToolReturned)):
                write(_tool_line(told))
                listener.record(_tool_event(started, told))
            else:
                before, turn.session_id = turn.session_id, sound(told.session_id)
                if turn.session_id not in (before, started.session_id, HISTORY):  # that is there once it ended
                    about = {"step": started.step, "path": started.path, "attempt": started.attempt}
                    listener.record(SessionOpened(**about, turn=started.turn, session_id=turn.session_id))
    finally:
        await stream.aclose()
    if done is None:
        raise EngineError(f"{started.step}: the engine {started.engine!r} ended without an answer.")
    return done


def _stream(engine: Engine, request: AgentRequest) -> Any:
    """What the engine tells, one by one.

    Raises
    ------
    EngineProtocolError    It gives something else.
    """
    stream: Any = engine.stream(request)
    if hasattr(stream, "__aiter__") and hasattr(stream, "aclose"):
        return stream
    if asyncio.iscoroutine(stream):
        stream.close()
    raise EngineProtocolError(
        f"the stream of the engine {engine.name!r} gave a {type(stream).__name__}, not events one by one: "
        "write `async def stream(self, request)` with `yield cm.TurnDone(…)` in it.",
        engine=engine.name,
    )


def _check(told: Any, engine: Engine) -> None:
    """Refuse what cannot be kept of what the engine told, which may be anybody's.

    Raises
    ------
    EngineProtocolError    It is no event, or a part of it is not what it has to be.
    """
    if not isinstance(told, AgentEvent):
        raise EngineProtocolError(
            f"the engine {engine.name!r} gave {told!r}, which is no event. It yields cm.Delta(…) and at the end "
            "cm.TurnDone(…).",
            engine=engine.name,
        )
    if (wrong := misfit(told)) is not None:
        problem = f"the engine {engine.name!r} gave a {type(told).__name__} with {wrong}."
        raise EngineProtocolError(problem, engine=engine.name)


def _check_json(what: str, value: Any, started: TurnStarted) -> None:
    if (wrong := not_json(value)) is not None:
        problem = f"{started.step}: its {what} holds {wrong}. Give null instead, or text."
        raise EngineProtocolError(problem, engine=started.engine, step=started.step)


def _held(to: type[BaseModel], text: str, output: Any, started: TurnStarted) -> Any:
    """The value of an answer, as the agent's class has it: that in its text, else the one given beside it.

    Raises
    ------
    EngineProtocolError    Neither fits.
    """
    value, wrong = fitted(to, unfenced(text))
    if wrong is not None and output is not None:
        value, wrong = fitted(to, json.dumps(output))
    if wrong is not None:
        problem = f"{started.step}: the answer does not fit {to.__name__}: {wrong}"
        raise EngineProtocolError(problem, line=text[:2000], engine=started.engine, step=started.step)
    return value


def _tool_event(started: TurnStarted, told: ToolCalled | ToolReturned) -> AnyEvent:
    """What is kept of it."""
    about = {"step": started.step, "path": started.path, "attempt": started.attempt, "turn": started.turn}
    about |= {"call_id": sound(told.call_id), "name": sound(told.name)}
    said = shortened(_tool_text(told), LONGEST_KEPT)
    if isinstance(told, ToolReturned):
        return events.ToolReturned(**about, text=said, failed=told.failed)
    return events.ToolCalled(**about, arguments=said)


def _tool_text(told: ToolCalled | ToolReturned) -> str:
    """The arguments, or the result; without keys, before it is cut: half of one would not be known again."""
    if isinstance(told, ToolReturned):
        said = told.text
    elif isinstance(told.arguments, str):
        said = told.arguments
    else:
        said = json.dumps(told.arguments, ensure_ascii=False)
    return keys.hide(str(sound(said)))


def _tool_line(told: ToolCalled | ToolReturned) -> str:
    """What is shown of a tool while the turn runs: a line as a block of code, so that nothing in it is Markdown."""
    sign = f"→ {told.name}" if isinstance(told, ToolCalled) else "✗" if told.failed else "←"
    line = " ".join(f"{sign} {_tool_text(told)[: 20 * LONGEST_LINE]}".split())
    return f"\n\n    {line[:LONGEST_LINE]}{'…' if len(line) > LONGEST_LINE else ''}\n\n"


def too_late(turn: LiveTurn) -> Ending:
    """The ending of a turn whose time is over."""
    id, limit_s = turn.started.step, turn.step.timeout_s or 0.0
    whose = turn.started.path.partition("/")[0]  # an agent that another one calls has the time of that step
    more = f"{2.5 * limit_s:g}"
    text = (
        f"{id} did not finish within {limit_s:g} s ({turn.silence()}). "
        f"Retry, or give it more time: `%cm step {whose} --timeout {more}`, in Python timeout_s={more}."
    )
    return failed(turn, EngineTimeout(text), None)


def _verdict(step: Step, done: TurnDone) -> Verdict | None:
    """What a module says: the agent's own verdict, else the last JSON object of its text."""
    if done.verdict is not None:
        return done.verdict.model_copy(update={"reason": sound(done.verdict.reason)})
    if not isinstance(step, Module):
        return None
    return Verdict.from_text(done.text)


def _retry_in_s(step: Step, error: EngineError, failures: int) -> float | None:
    """Seconds until the turn is tried again unasked: what the service asks for, else 1, 2, 4 …; ``None``: not."""
    if not error.retryable or failures >= step.retries:
        return None
    if error.retry_after_s is not None:
        return max(0.0, error.retry_after_s)
    return float(min(LONGEST_BACKOFF_S, 2**failures))


def failed(turn: LiveTurn, error: Exception, retry_in_s: float | None, *, fatal: bool = False) -> Ending:
    """The ending of a turn that raised `error`."""
    detail = getattr(error, "detail", None)
    if not isinstance(error, CodeMachineError):
        detail = "".join(traceback.format_exception(error))
    message = sound(str(error) or type(error).__name__)
    started = turn.started
    event = TurnFailed(
        step=started.step,
        path=started.path,
        attempt=started.attempt,
        turn=started.turn,
        error=ErrorInfo(kind=type(error).__name__, message=message, detail=sound(detail) if detail else None),
        retry_in_s=retry_in_s,
        duration_s=getattr(error, "duration_s", None),
        **turn.used,
    )
    return Ending(event, error, fatal)
