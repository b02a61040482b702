"""What any engine must do, whoever wrote it. Each check takes an engine and a request and runs one turn.

``answers``: the stream ends with exactly one ``TurnDone`` and holds nothing after it; deltas, if there are any, add up
to its text. ``fails``: a turn that goes wrong says so with an ``EngineError``, and with no ``TurnDone`` before it.
``lets_go``: a stream that is cancelled, or closed early, ends promptly and leaves no task and no thread that would keep
the interpreter alive.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Awaitable, Callable
from typing import Any

from cm_notebook.engines.base import AgentEvent, AgentRequest, Delta, Engine, SessionStarted, TurnDone, UsageReported
from cm_notebook.errors import EngineError
from cm_notebook.events import Usage
from cm_notebook.workflow import Agent

PROMPT_S = 10.0
"""Only an upper limit: nothing here waits this long unless it fails."""


def request(agent: Agent | str = "planner", prompt: str = "Plan a todo CLI.", **options: Any) -> AgentRequest:
    made = agent if isinstance(agent, Agent) else Agent(id=agent, prompt=prompt)
    return AgentRequest(**{"agent": made, "prompt": prompt, "step": made.id, "path": made.id, **options})


async def collect(engine: Engine, asked: AgentRequest) -> list[AgentEvent]:
    async with asyncio.timeout(PROMPT_S):
        return [event async for event in engine.stream(asked)]


def answers(engine: Engine, asked: AgentRequest, *, streams_answer: bool = True) -> TurnDone:
    """One good turn; its ``TurnDone`` is returned."""
    assert isinstance(engine, Engine)
    events = asyncio.run(collect(engine, asked))
    *before, done = events
    assert isinstance(done, TurnDone)
    assert all(isinstance(event, (Delta, SessionStarted, UsageReported)) for event in before)
    assert isinstance(done.text, str)
    deltas = [event.text for event in before if isinstance(event, Delta)]
    assert all(isinstance(text, str) and text for text in deltas)
    if streams_answer and deltas:
        assert "".join(deltas) == done.text
    assert all(isinstance(event.usage, Usage) for event in before if isinstance(event, UsageReported))
    return done


def fails(engine: Engine, asked: AgentRequest, kind: type[EngineError] = EngineError) -> EngineError:
    """One turn that goes wrong; its error is returned."""

    async def turn() -> EngineError:
        try:
            async with asyncio.timeout(PROMPT_S):
                async for event in engine.stream(asked):
                    assert not isinstance(event, TurnDone)
        except kind as error:
            return error
        raise AssertionError("the turn was to fail")

    error = asyncio.run(turn())
    assert str(error)
    assert "\n" not in str(error)
    return error


def lets_go(
    engine: Engine, asked: Callable[[], AgentRequest], started: Callable[[], Awaitable[Any]] | None = None
) -> None:
    """A turn that would not end by itself, cancelled while it works, and again closed at its first event, if any.

    `started` waits until the turn is at work; without it, two passes of the loop are enough.
    """
    threads = {thread for thread in threading.enumerate() if not thread.daemon}

    async def cancelled() -> None:
        turn = asyncio.create_task(collect(engine, asked()))
        if started is not None:
            await started()
        else:
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        turn.cancel()
        await asyncio.wait({turn}, timeout=PROMPT_S)
        assert turn.cancelled()
        await _nothing_left()

    async def closed() -> None:
        stream = engine.stream(asked())
        first = asyncio.ensure_future(anext(stream))
        if started is not None:
            await started()
        await asyncio.wait({first}, timeout=0.05)
        if not first.done():
            first.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await first
        async with asyncio.timeout(PROMPT_S):
            await stream.aclose()  # type: ignore[attr-defined]
        await _nothing_left()

    asyncio.run(cancelled())
    asyncio.run(closed())
    assert {thread for thread in threading.enumerate() if not thread.daemon} <= threads


async def _nothing_left() -> None:
    """No task but this one; those that are ending may do so."""
    left = asyncio.all_tasks() - {asyncio.current_task()}
    if left:
        await asyncio.wait(left, timeout=PROMPT_S)
    assert asyncio.all_tasks() == {asyncio.current_task()}
