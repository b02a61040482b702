"""Live text: 100,000 chunks from an engine to whoever reads ``run.stream()``."""

from __future__ import annotations

import pytest

import cm_notebook as cm
from cm_notebook.events import TurnStarted
from tests.benchmarks import measure
from tests.benchmarks.measure import Chunks, Time, on_a_thread, paired, peak_memory, piece, stopwatch

COUNT = 100_000
CHARACTERS = len(piece(0)) * COUNT


async def read(loop: str, count: int = COUNT) -> Time:
    """Start a run of one step that writes so many chunks, read it to its end; time from the first chunk."""
    engine = Chunks(count)
    workflow = cm.Workflow("stream", agents=[cm.Agent("writer", "Write.")], steps="writer", autonomous_mode="always")
    run = workflow.start(engine=engine, journal=":memory:", loop=loop)
    characters = 0
    with stopwatch() as passed:
        async for thing in run.stream():
            if isinstance(thing, cm.LiveText):
                characters += len(thing.text)
            elif isinstance(thing, TurnStarted):
                engine.go = True
    assert characters == len(piece(0)) * count
    return passed()


@pytest.mark.parametrize(("loop", "place"), [("kernel", "the same loop"), ("thread", "another thread's loop")])
def test_stream(budget, loop, place):
    rounds = paired(lambda: on_a_thread(read(loop)).per(COUNT), lambda: measure.queue_of_64(COUNT).per(COUNT), rounds=9)
    budget(f"stream of 100,000 chunks to {place}; floor: Queue(64)", rounds.wall, "µs/chunk", times=3)


def test_stream_memory(budget):
    def peak_of(count: int) -> int:
        with peak_memory() as peak:
            on_a_thread(read("kernel", count))
        return peak()

    peak_of(100)  # what is loaded at first use
    budget("peak memory, stream of 10,000 chunks, 59 KiB", peak_of(10_000), "KiB", at_most=3 * 59 + 256)
    budget("peak memory, stream of 100,000 chunks, 586 KiB", peak_of(100_000), "KiB", at_most=3 * 586 + 256)
