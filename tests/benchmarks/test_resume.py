"""Going on with a long run, or back in it: reading its events and knowing where it stands."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import cm_notebook as cm
from cm_notebook.journal import Journal, MemoryJournal
from tests.benchmarks.measure import Time, chain, paired, stopwatch, work


@pytest.fixture(scope="module")
def stopped(tmp_path_factory) -> dict[int, tuple[str, Path]]:
    """For each number of steps, a run that was stopped before its last one, and the file it is in."""
    folder, made = tmp_path_factory.mktemp("runs"), {}
    for steps in (500, 5_000, 10_000):
        written = MemoryJournal()
        run = chain(steps).start(journal=written, workspace=folder / "work", until=f"s{steps - 2}").wait()
        run.stop()
        journal = Journal(folder / f"{steps}.db")
        journal.create(run.id, "chain", None)
        journal.begin(run.id, 0)
        journal.commit(run.id, run.events)
        made[steps] = (run.id, Path(journal.path))
    return made


def test_resume_takes_time_for_each_event_only(budget, stopped):
    figures = {}
    for steps, (run_id, path) in stopped.items():

        def resume(run_id: str = run_id, path: Path = path, last: str = f"s{steps - 2}") -> Time:
            journal = Journal(path)
            events = journal.events(run_id)[-1].seq
            with stopwatch() as passed:
                run = cm.resume(run_id, agents=[work], journal=journal, until=last)
            run.wait()
            run.stop()
            return passed().per(events)

        figures[steps] = paired(resume, rounds=5).cpu
    for steps in (5_000, 10_000):
        name = f"resume, {steps:,} steps, {2 * steps:,} events"
        budget(name, figures[steps], "ms/event", at_most=0.03)
    budget("resume, per event, 10,000 steps ÷ 500", figures[10_000].ours / figures[500].ours, "×", at_most=1.25)


def test_fork_and_rewind_take_time_for_each_event_only(budget, stopped):
    forked, rewound = {}, {}
    for steps in (500, 10_000):
        run_id, path = stopped[steps]

        def fork(run_id: str = run_id, path: Path = path, last: str = f"s{steps - 2}", steps: int = steps) -> cm.Run:
            return cm.Run(run_id, Journal(path)).fork(last, agents=[work])

        def forks(fork: Callable[[], cm.Run] = fork, events: int = 2 * steps) -> Time:
            with stopwatch() as passed:
                made = fork()
            made.stop()
            return passed().per(events)

        def rewinds(fork: Callable[[], cm.Run] = fork, events: int = 2 * steps) -> Time:
            made = fork()
            with stopwatch() as passed:
                made.rewind("s1")
            made.stop()
            return passed().per(events)

        forked[steps], rewound[steps] = paired(forks, rounds=4).cpu, paired(rewinds, rounds=4).cpu
    for what, figures in (("fork", forked), ("rewind", rewound)):
        budget(f"{what}, 10,000 steps, 20,000 events", figures[10_000], "ms/event")
        growth = figures[10_000].ours / figures[500].ours
        budget(f"{what}, per event, 10,000 steps ÷ 500", growth, "×", at_most=1.5)
