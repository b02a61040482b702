"""One turn: a prompt goes out to an engine, one event comes back.

Strategy: this is the edge between a run and whoever does the work. It knows time-outs, retries and errors, and nothing
of gates or journals: ``take_turn`` hands live text on, and returns how the turn ended as the event that says so.
"""

from __future__ import annotations

import asyncio
import contextlib
import traceback
from collections.abc import Callable
from typing import Any, NamedTuple, cast

from .engines.base import AgentRequest, Delta, Engine, SessionStarted, TurnDone, UsageReported
from .errors import CodeMachineError, EngineError, EngineTimeout
from .events import ErrorInfo, TurnFailed, TurnFinished, TurnStarted
from .workflow import Module, Step, Verdict

YIELD_EVERY = 64
"""After so many pieces of text other turns get their chance."""
LONGEST_BACKOFF_S = 60


class Ending(NamedTuple):
    """How a turn ended. ``error``: what was raised; ``fatal``: it is no engine's error, and ends the run as itself."""

    event: TurnFinished | TurnFailed
    error: Exception | None = None
    fatal: bool = False


async def take_turn(
    started: TurnStarted,
    step: Step,
    engine: Callable[[], Engine],
    request: AgentRequest,
    limit: asyncio.Timeout,
    write: Callable[[str], None],
    failures: int,
) -> Ending:
    """Do the turn that `started` announces.

    Parameters
    ----------
    engine
        Finds the engine; what it raises is how the turn fails.
    limit
        The turn's time-out, not yet entered; whoever makes the turn wait for a person moves it.
    write
        Gets the live text.
    failures
        How often this attempt has failed before.

    Raises
    ------
    asyncio.CancelledError    The turn was cut short; whoever did that has recorded it.
    """
    where = {"step": started.step, "path": started.path, "attempt": started.attempt, "turn": started.turn}
    done: TurnDone | None = None
    usage: UsageReported | None = None
    session_id: str | None = None
    pieces = 0
    try:
        async with limit, contextlib.aclosing(cast("Any", engine().stream(request))) as stream:
            async for told in stream:
                if isinstance(told, Delta):
                    write(told.text)
                    pieces += 1
                    if pieces % YIELD_EVERY == 0:
                        await asyncio.sleep(0)
                elif isinstance(told, TurnDone):
                    done = told
                elif isinstance(told, UsageReported):
                    usage = told
                elif isinstance(told, SessionStarted):
                    session_id = told.session_id
        if done is None:
            raise EngineError(f"{started.step}: the engine {started.engine!r} ended without an answer.")
        event = TurnFinished(
            **where,
            text=sound(done.text),
            output=sound(done.output),
            verdict=_verdict(step, done),
            usage=usage.usage if usage is not None else None,
            cost_usd=usage.cost_usd if usage is not None else None,
            session_id=session_id,
            duration_s=done.duration_s,
            note=done.note,
        )
    except EngineError as error:
        return Ending(_failed(where, error, _retry_in_s(step, error, failures)), error)
    except Exception as error:
        if isinstance(error, TimeoutError) and limit.expired():
            text = (
                f"{started.step} did not finish within {step.timeout_s:g} s. Retry, or give it more time: timeout_s=…"
            )
            late = EngineTimeout(text)
            return Ending(_failed(where, late, None), late)
        return Ending(_failed(where, error, None), error, fatal=True)  # a tape that differs, or a bug
    return Ending(event)


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


def _failed(where: dict[str, Any], error: Exception, retry_in_s: float | None) -> TurnFailed:
    detail = getattr(error, "detail", None)
    if not isinstance(error, CodeMachineError):
        detail = "".join(traceback.format_exception(error))
    message = sound(str(error) or type(error).__name__)
    info = ErrorInfo(kind=type(error).__name__, message=message, detail=sound(detail) if detail else None)
    return TurnFailed(**where, error=info, retry_in_s=retry_in_s)


def sound(value: Any) -> Any:
    """`value` without what UTF-8 cannot hold: lone surrogates, as undecodable bytes or half an emoji leave them."""
    if isinstance(value, str):
        return value if value.isascii() else value.encode("utf-8", "replace").decode("utf-8")
    if isinstance(value, dict):
        return {sound(key): sound(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [sound(inner) for inner in value]
    return value
