"""What a snapshot costs, by the number of files in the workspace.

``CM_MANY_FILES=100000 pytest tests/benchmarks/test_snapshots.py`` measures so many, too.
"""

from __future__ import annotations

import os
import time

import pytest

from cm_notebook.workspace import Snapshots
from tests.benchmarks.measure import Pair

COUNTS = sorted({100, 1_000, 10_000, int(os.environ.get("CM_MANY_FILES", "100"))})


@pytest.mark.parametrize("files", COUNTS)
def test_snapshot(budget, tmp_path, files):
    """The first one reads every file; the next one, with one file changed, only looks at them."""
    work = tmp_path / "work"
    for number in range(files):
        file = work / f"d{number // 100}" / f"f{number % 100}"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{number}\n" * 20)
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
