"""What a snapshot costs, by the number of files in the workspace, and that nobody stands still meanwhile.

``CM_MANY_FILES=100000 pytest tests/benchmarks/test_snapshots.py`` measures so many, too.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import cm_notebook as cm
from cm_notebook.workspace import Snapshots
from tests.benchmarks.measure import Pair

MOST = int(os.environ.get("CM_MANY_FILES", "10000"))
COUNTS = sorted({100, 1_000, 10_000, MOST})


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """Function that makes a folder of so many files, a hundred in each folder below it."""
    made: dict[int, Path] = {}

    def folder_of(files: int) -> Path:
        if files not in made:
            made[files] = tmp_path_factory.mktemp("work")
            for number in range(files):
                file = made[files] / f"d{number // 100}" / f"f{number % 100}"
                if number % 100 == 0:
                    file.parent.mkdir()
                file.write_text(f"{number}\n" * 20)
        return made[files]

    return folder_of


@pytest.mark.parametrize("files", COUNTS)
def test_snapshot(budget, tmp_path, folder_of, files):
    """The first one reads every file; the next one, with one file changed, only looks at them."""
    work = folder_of(files)
    snapshots = Snapshots(work, tmp_path / "snapshots.git")
    begun = time.perf_counter()
    snapshots.take()
    first = time.perf_counter() - begun
    later, floor = [], []
    for number in range(3):
        (work / "d0" / "f0").write_text(f"changed {number}")
        begun = time.perf_counter()
        snapshots.take()
        later.append(time.perf_counter() - begun)
        begun = time.perf_counter()
        for folder, _folders, names in os.walk(work):
            for name in names:
                os.stat(os.path.join(folder, name))  # noqa: PTH116, PTH118 - as quickly as it can be done
        floor.append(time.perf_counter() - begun)
    budget(f"first snapshot of {files:,} files", Pair([first], [min(floor)], "wall"), "ms")
    budget(f"snapshot of {files:,} files, one changed ÷ looking at each", Pair(later, floor, "wall"), "ms")


def test_other_runs_go_on_meanwhile(budget, tmp_path, folder_of):
    """The loop that drives all runs of the process: how long it stands still at most while a run keeps many files."""
    gaps: list[float] = []
    over = False

    @cm.agent("ticker")
    async def ticker(turn: cm.Turn) -> str:
        last = time.perf_counter()
        while not over:
            await asyncio.sleep(0.001)
            now = time.perf_counter()
            gaps.append(now - last)
            last = now
        return "over"

    @cm.agent("builder")
    def builder(turn: cm.Turn) -> str:
        (turn.workspace / "new").write_text(str(turn.attempt))
        return "written"

    decisions = iter([cm.Decision(action="reject", feedback="again"), cm.Decision(action="approve")])
    ticking = cm.Workflow("ticks", agents=[ticker], steps="ticker").start(journal=":memory:", workspace=tmp_path / "x")
    run = cm.Workflow("many", agents=[builder], steps="builder?").start(
        workspace=folder_of(MOST), journal=tmp_path / "j.db", on_gate=lambda gate: next(decisions)
    )
    begun = time.perf_counter()
    run.wait()
    took, meanwhile = time.perf_counter() - begun, len(gaps)
    time.sleep(took)  # the floor: on a busy machine it stands still without us, too
    over = True
    ticking.wait()
    assert [change.path for change in run["builder"].files_changed] == ["new"]
    assert "WorkspaceRestored" in [event.type for event in run.events]
    budget(f"a step in {MOST:,} files, rejected once and made again", took, "ms")
    longest = Pair([max(gaps[:meanwhile])], [max(gaps[meanwhile:])], "wall")
    budget("the longest that the loop stood still meanwhile; floor: at rest", longest, "ms", plus=200)
