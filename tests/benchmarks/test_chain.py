"""Steps one after the other: what the machinery costs beside the disk, in time, on disk and in memory."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

import cm_notebook as cm
from cm_notebook.journal import Journal
from tests.benchmarks import measure
from tests.benchmarks.measure import TEXT, chain, cpu, finish, looping, paired, peak_memory, wall

_numbers = itertools.count()


def new_file() -> Path:
    """A path below the test's own folder."""
    return Path(f"{next(_numbers)}.db").absolute()


def durable(steps: int, clock: measure.Clock) -> float:
    """Seconds for each step of a durable chain."""
    return finish(chain(steps), Journal(new_file()), clock) / steps


def rows(steps: int, clock: measure.Clock) -> float:
    """Seconds for each step of its floor."""
    return measure.rows_committed(new_file(), steps, clock) / steps


@pytest.mark.parametrize("steps", [100, 1_000, 10_000])
def test_durable_step(budget, steps):
    pair = paired(lambda: durable(steps, wall), lambda: rows(steps, wall), rounds=7)
    times = None if steps != 1_000 else 1.5 if pair.floor >= 0.25e-3 else 2
    budget(f"durable step, N = {steps:,}", pair, "ms/step", clock="wall", times=times)


def test_durable_step_costs_the_same_in_a_long_run(budget):
    few = paired(lambda: durable(100, cpu), lambda: rows(100, cpu), rounds=20)
    many = paired(lambda: durable(10_000, cpu), lambda: rows(10_000, cpu), rounds=3)
    budget("durable step, N = 100", few, "ms/step", clock="CPU")
    budget("durable step, N = 10,000", many, "ms/step", clock="CPU")
    budget("growth: (ours ÷ floor) at 10,000 ÷ at 100", many.ratio / few.ratio, "×", clock="CPU", at_most=1.15)


@pytest.mark.parametrize("context", ["none", "previous", "all"])
def test_database_holds_each_text_once(budget, context):
    journal = Journal(new_file())
    finish(chain(1_000, prompt="Go on.", context=context), journal, wall)
    budget(f"database, context={context!r}, N = 1,000", _size(journal) / 1_000, "KiB/step", clock="–", at_most=2)


def _size(journal: Journal) -> int:
    """Bytes on disk, once what is in the write-ahead log is in the file too."""
    journal._writer.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    return Path(journal.path).stat().st_size


def test_chain_in_memory(budget):
    pair = paired(
        lambda: finish(chain(1_000), ":memory:", cpu) / 1_000,
        lambda: measure.tasks_awaited(1_000, cpu) / 1_000,
        rounds=15,
    )
    budget("step in memory, N = 1,000; floor: one Task", pair, "µs/step", clock="CPU", times=6)


def test_loop_costs_as_much_as_a_chain(budget):
    pair = paired(
        lambda: finish(looping(1_000), ":memory:", cpu) / 2_002,
        lambda: finish(chain(2_000), ":memory:", cpu) / 2_000,
        rounds=7,
    )
    budget("loop, 1,000 × 2 steps; floor: our chain", pair, "µs/step", clock="CPU", times=1.25)


@pytest.mark.parametrize("steps", [1_000, 5_000])
def test_peak_memory_of_a_durable_run(budget, steps):
    workflow, journal = chain(steps), Journal(new_file())
    finish(chain(10), journal, wall)
    with peak_memory() as peak:
        run = workflow.start(journal=journal).wait()
    assert run.status == "completed"
    budget(f"peak memory, durable, N = {steps:,}", peak() / steps, "KiB/step", clock="–", at_most=len(TEXT) / 1024 + 3)
    assert isinstance(run, cm.Run)
