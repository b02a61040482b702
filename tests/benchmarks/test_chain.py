"""Steps one after the other: what the machinery costs beside the disk, in time, on disk and in memory."""

from __future__ import annotations

import itertools
import statistics
import time
from pathlib import Path

import pytest

import cm_notebook as cm
from cm_notebook.journal import Journal
from tests.benchmarks import measure
from tests.benchmarks.measure import SIZE, Rounds, Time, chain, finish, looping, paired, peak_memory

_numbers = itertools.count()


@pytest.fixture(scope="module")
def durable(tmp_path_factory) -> dict[int, Rounds]:
    """A durable chain beside its floor, for each length: time for each step."""
    folder = tmp_path_factory.mktemp("durable")

    def new_file() -> Path:
        return folder / f"{next(_numbers)}.db"

    def figures(steps: int, rounds: int) -> Rounds:
        def ours() -> Time:
            return finish(chain(steps), Journal(new_file()), workspace=folder / "work").per(steps)

        def floor() -> Time:
            return measure.rows_committed(new_file(), steps).per(steps)

        return paired(ours, floor, rounds=rounds)

    return {10: figures(10, 40), 100: figures(100, 20), 1_000: figures(1_000, 7), 10_000: figures(10_000, 3)}


@pytest.mark.parametrize("steps", [10, 100, 1_000, 10_000])
def test_durable_step(budget, durable, steps):
    pair = durable[steps].wall
    times = None if steps != 1_000 else 1.5 if pair.floor >= 0.25e-3 else 2
    budget(f"durable step, N = {steps:,}", durable[steps].cpu, "ms/step")
    budget(f"durable step, N = {steps:,}", pair, "ms/step", times=times)


def test_durable_step_costs_the_same_in_a_long_run(budget, tmp_path):
    """In files that have been in use: a new one's log grows, for which the floor pays in its short runs alone."""
    journal, rows = Journal(tmp_path / "journal.db"), tmp_path / "rows.db"
    open_still = measure.database(rows)  # else its log would go with each round
    open_still.execute("SELECT * FROM steps").fetchall()
    finish(chain(1_000), journal, workspace=tmp_path / "work")
    measure.rows_committed(rows, 2_000)

    def ratio(steps: int, rounds: int) -> float:
        pair = paired(
            lambda: finish(chain(steps), journal, workspace=tmp_path / "work").per(steps),
            lambda: measure.rows_committed(rows, steps).per(steps),
            rounds=rounds,
        )
        return pair.wall.ratio

    growth = ratio(10_000, 2) / ratio(100, 40)
    open_still.close()
    budget("durable step, (ours ÷ floor) at N = 10,000 ÷ the same at N = 100", growth, "×", at_most=1.15)


def test_durable_step_costs_the_same_at_the_end_of_a_run(budget):
    """What a run costs once, spread over 100 steps, would hide a small growth: so also windows inside one run.

    Each of 10,000 steps tells the CPU time of its thread, in which a busy disk does not show.
    """
    seconds: list[float] = []

    @cm.agent("work")
    async def work(turn: cm.Turn) -> str:
        seconds.append(time.thread_time())
        return turn.step.ljust(SIZE)

    finish(chain(10_000, work), Journal(Path("journal.db").absolute()))
    windows = [after - before for before, after in itertools.pairwise(seconds[::100])]
    early, late = (sorted(part)[: len(part) // 2] for part in (windows[:20], windows[-20:]))
    growth = statistics.mean(late) / statistics.mean(early)
    budget("durable step, one of the last 2,000 of 10,000 ÷ one of the first", growth, "×", at_most=1.15)


@pytest.mark.parametrize("context", ["none", "previous", "all"])
def test_database_holds_each_text_once(budget, context):
    journal = Journal(Path("journal.db").absolute())
    finish(chain(1_000, prompt="Go on.", context=context), journal)
    journal._writer.execute("PRAGMA wal_checkpoint(TRUNCATE)")  # all of it is in the file now
    size = Path(journal.path).stat().st_size / 1_000
    budget(f"database, context={context!r}, N = 1,000", size, "KiB/step", at_most=SIZE / 1024 + 1)


def test_chain_in_memory(budget):
    rounds = paired(
        lambda: finish(chain(1_000), ":memory:").per(1_000),
        lambda: measure.tasks_awaited(10_000).per(10_000),
        rounds=10,
    )
    budget("step in memory, N = 1,000; floor: one Task", rounds.cpu, "µs/step", times=6, known=2)


def test_loop_costs_as_much_as_a_chain(budget):
    rounds = paired(
        lambda: finish(looping(1_000), ":memory:").per(2_002),
        lambda: finish(chain(2_000), ":memory:").per(2_000),
        rounds=5,
    )
    budget("step of a loop, 1,000 × 2; floor: our chain", rounds.cpu, "µs/step", times=1.25)


@pytest.mark.parametrize("steps", [1_000, 5_000])
def test_peak_memory_of_a_durable_run(budget, steps):
    workflow, journal = chain(steps), Journal(Path("journal.db").absolute())
    finish(chain(10), journal)  # what is loaded at first use
    with peak_memory() as peak:
        run = workflow.start(journal=journal).wait()
    assert run.status == "completed"
    budget(f"peak memory, durable, N = {steps:,}", peak() / steps, "KiB/step", at_most=SIZE / 1024 + 3)
