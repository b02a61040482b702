"""Live text: 100,000 chunks from an engine to whoever reads ``run.stream()``."""

from __future__ import annotations

import asyncio
import threading

import pytest

import cm_notebook as cm
from tests.benchmarks import measure
from tests.benchmarks.measure import Chunks, paired, peak_memory, piece, stopwatch, wall

COUNT = 100_000
CHARACTERS = len(piece(0)) * COUNT


def start(count: int, loop: str) -> cm.Run:
    """A run of one step that writes so many chunks."""
    workflow = cm.Workflow("stream", agents=[cm.Agent("writer", "Write.")], steps="writer", autonomous_mode="always")
    return workflow.start(engine=Chunks(count), journal=":memory:", loop=loop)


async def consume(loop: str, count: int = COUNT) -> int:
    """Start the run and read it to its end; how many characters arrived."""
    run = start(count, loop)
    return sum([len(thing.text) async for thing in run.stream() if isinstance(thing, cm.LiveText)])


def on_a_thread(coroutine) -> None:
    """As the floor is run: on a loop of a thread of its own, which is the run's loop too for ``loop="kernel"``."""
    thread = threading.Thread(target=lambda: asyncio.run(coroutine))
    thread.start()
    thread.join()


@pytest.mark.parametrize(("loop", "place"), [("kernel", "the same loop"), ("thread", "another thread's loop")])
def test_stream(budget, loop, place):
    def ours() -> float:
        got = []

        async def read() -> None:
            got.append(await consume(loop))

        with stopwatch(wall) as passed:
            on_a_thread(read())
        assert got == [CHARACTERS]
        return passed() / COUNT

    pair = paired(ours, lambda: measure.queue_of_64(COUNT, wall) / COUNT, rounds=9)
    budget(f"stream of 100,000 chunks to {place}; floor: Queue(64)", pair, "µs/chunk", clock="wall", times=3)


def test_stream_memory(budget):
    async def read(count: int) -> int:
        with peak_memory() as peak:
            await consume("kernel", count)
        return peak()

    asyncio.run(read(100))
    few, many = asyncio.run(read(COUNT // 10)), asyncio.run(read(COUNT))
    text = CHARACTERS / 2**20
    budget(
        f"peak memory, stream of 10,000 chunks ({text / 10:.2g} MiB of text)", few / 1, "MiB", clock="–"
    )
    budget(f"peak memory, stream of 100,000 chunks ({text:.2g} MiB of text)", many / 1, "MiB", clock="–", at_most=3 * text + 1)
