"""What any engine must do, whoever wrote it: checks for the tests of an engine.

Strategy: each check takes an engine, runs one turn on a loop of its own, and fails with an ``AssertionError`` that says
what was promised and not kept. They need no run, no journal and no test framework:

    from cm_notebook.testing import answers, fails, lets_go, request

    def test_it_answers():
        assert answers(MyEngine(), request(prompt="Say hello.")).text == "Hello."

``answers``: the stream ends with exactly one ``TurnDone`` and holds nothing after it; what is streamed ends with its
text; each call of a tool has its return. ``fails``: a turn that goes wrong says so with an ``EngineError``, in one line
and with no ``TurnDone`` before it. ``lets_go``: a stream that is cancelled, or closed early, ends promptly and leaves
no task and no thread that would keep the interpreter alive.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Awaitable, Callable
from typing import Any

from .engines.base import (
    AgentEvent,
    AgentRequest,
    Delta,
    Engine,
    SessionStarted,
    ToolCalled,
    ToolReturned,
    TurnDone,
    UsageReported,
    misfit,
)
from .errors import EngineError
from .plain import not_json
from .workflow import Agent

PROMPT_S = 10.0
"""Only an upper limit, in seconds: nothing here waits this long unless it fails."""


def request(agent: Agent | str = "planner", prompt: str = "Plan a todo CLI.", **options: Any) -> AgentRequest:
    """A turn to be done.

    Parameters
    ----------
    agent
        Or the name of one that is made.
    **options
        Attributes of :class:`~cm_notebook.engines.base.AgentRequest`.
    """
    made = agent if isinstance(agent, Agent) else Agent(id=agent, prompt=prompt)
    return AgentRequest(**{"agent": made, "prompt": prompt, "step": made.id, "path": made.id, **options})


async def collect(engine: Engine, asked: AgentRequest) -> list[AgentEvent]:
    """All that one turn yields."""
    async with asyncio.timeout(PROMPT_S):
        return [event async for event in engine.stream(asked)]


def answers(engine: Engine, asked: AgentRequest) -> TurnDone:
    """Check one turn that goes well; its ``TurnDone`` is returned."""
    assert isinstance(engine, Engine), "an engine has a name and a stream"
    events = asyncio.run(collect(engine, asked))
    assert events, "the stream is empty"
    *before, done = events
    assert isinstance(done, TurnDone), f"the stream ends with {done!r}, not with TurnDone"
    known = (Delta, SessionStarted, ToolCalled, ToolReturned, UsageReported)
    for event in before:
        assert isinstance(event, known), f"{event!r} stands before the end"
    for event in events:
        wrong = misfit(event)
        assert wrong is None, f"a {type(event).__name__} has {wrong}"
    assert (wrong := not_json(done.output)) is None, f"the output of TurnDone holds {wrong}"
    deltas = [event for event in before if isinstance(event, Delta)]
    assert all(delta.text for delta in deltas), "a delta is empty"
    written = "".join(delta.text for delta in deltas if delta.kind == "text")
    ends = written.rstrip().endswith(done.text.rstrip())
    assert not written or ends, f"streamed was {written[-200:]!r}, but it ends {done.text!r}"
    called = [event.call_id for event in before if isinstance(event, ToolCalled)]
    returned = [event.call_id for event in before if isinstance(event, ToolReturned)]
    assert called == returned, f"called were {called}, returned {returned}"
    return done


def fails(engine: Engine, asked: AgentRequest, kind: type[EngineError] = EngineError) -> EngineError:
    """Check one turn that goes wrong, with an error of this `kind`; the error is returned."""

    async def turn() -> EngineError:
        try:
            async with asyncio.timeout(PROMPT_S):
                async for event in engine.stream(asked):
                    assert not isinstance(event, TurnDone), f"the turn was to fail, and ended with {event!r}"
        except kind as error:
            return error
        raise AssertionError("the turn was to fail")

    error = asyncio.run(turn())
    assert str(error), "the error says nothing"
    assert "\n" not in str(error), f"the error has more than one line: {str(error)!r}"
    return error


def lets_go(
    engine: Engine, asked: Callable[[], AgentRequest], started: Callable[[], Awaitable[Any]] | None = None
) -> None:
    """Check a turn that would not end by itself: cancelled while it works, and closed at its first event, if any.

    Parameters
    ----------
    asked
        Makes the request, for each of the two turns.
    started
        Waits until the turn is at work; without it, two passes of the loop are enough.
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
        assert turn.cancelled(), "the turn was cancelled and went on"
        await _nothing_left()

    async def closed() -> None:
        stream: Any = engine.stream(asked())
        first = asyncio.ensure_future(anext(stream))
        if started is not None:
            await started()
        await asyncio.wait({first}, timeout=0.05)
        if not first.done():
            first.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await first
        async with asyncio.timeout(PROMPT_S):
            await stream.aclose()
        await _nothing_left()

    asyncio.run(cancelled())
    asyncio.run(closed())
    left = {thread for thread in threading.enumerate() if not thread.daemon} - threads
    assert not left, f"threads are left that keep the interpreter alive: {left}"


async def _nothing_left() -> None:
    """No task but this one; those that are ending may do so."""
    left = asyncio.all_tasks() - {asyncio.current_task()}
    if left:
        await asyncio.wait(left, timeout=PROMPT_S)
    left = asyncio.all_tasks() - {asyncio.current_task()}
    assert not left, f"tasks are left: {left}"
