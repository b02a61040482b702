"""Budgets, and the table of figures at the end of the session.

``pytest tests/benchmarks --benchmark-table FILE`` also writes the table as Markdown.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.benchmarks.measure import UNITS, Pair
from tests.browser.conftest import chromium, jupyter_server, open_notebook

__all__ = ["chromium", "jupyter_server", "open_notebook"]  # fixtures of the tests in a browser

_TABLE = pytest.StashKey["list[Row]"]()
HEADINGS = ("work", "ours", "floor", "ratio", "budget", "clock", "kept")


@dataclass
class Row:
    """One line of the table, in words."""

    work: str
    ours: str
    floor: str
    ratio: str
    budget: str
    clock: str
    kept: str

    def cells(self) -> tuple[str, ...]:
        """Its cells, in the order of ``HEADINGS``."""
        return (self.work, self.ours, self.floor, self.ratio, self.budget, self.clock, self.kept)


Budget = Callable[..., None]
SLACK = 2.0
"""A budget that is missed is shown; one that is missed so many times over fails. ``--strict-budgets`` makes it 1."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--benchmark-table``."""
    parser.addoption("--benchmark-table", metavar="FILE", type=Path, help="write the table of benchmarks as Markdown")
    parser.addoption("--strict-budgets", action="store_true", help="fail on every missed budget, however noisy it is")


def pytest_configure(config: pytest.Config) -> None:
    """Begin the table."""
    config.stash[_TABLE] = []


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what is in this folder; a slow disk may take minutes."""
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker("benchmark")
            item.add_marker(pytest.mark.timeout(600))


@pytest.fixture
def budget(request: pytest.FixtureRequest) -> Budget:
    """Function that adds a row to the table, and fails if the budget is not kept."""
    table = request.config.stash[_TABLE]
    slack = 1.0 if request.config.getoption("strict_budgets") else SLACK

    def check(
        work: str,
        figures: Pair | float,
        unit: str,
        *,
        times: float | None = None,
        plus: float | None = None,
        at_most: float | None = None,
        known: float = 1.0,
    ) -> None:
        """Add a row and assert its budget; without one it is there to be read.

        Parameters
        ----------
        figures
            What was measured: ours and its floor, or ours alone, in seconds or bytes.
        unit
            A key of ``UNITS``, perhaps with more behind it: ``"ms/step"``.
        times, plus, at_most
            The budget: so many times the floor, so much more than the floor, or so much; the last two in `unit`.
        known
            By how much it is known to be missed; only what is worse than that fails.
        """
        pair = figures if isinstance(figures, Pair) else Pair([figures], [], "")
        scale = UNITS[unit.partition("/")[0]]
        used: list[float] = []  # of each budget, how much is used: more than 1 is a miss
        words: list[str] = []
        if times is not None:
            used.append(pair.ratio / times)
            words.append(f"≤ {times:g} ×")
        if plus is not None:
            used.append(pair.difference * scale / plus)
            words.append(f"≤ floor + {plus:g} {unit}")
        if at_most is not None:
            used.append(pair.ours * scale / at_most)
            words.append(f"≤ {at_most:g} {unit}")
        alone = not pair.floor_all
        row = Row(
            work,
            f"{pair.ours * scale:.3g} {unit}",
            "" if alone else f"{pair.floor * scale:.3g} {unit}",
            "" if alone else f"{pair.ratio:.2f}",
            ", ".join(words) or "–",
            pair.clock,
            "" if not words else "yes" if max(used) <= 1 else "NO",
        )
        table.append(row)
        shown = f"{work}: {row.ours}; floor {row.floor or '–'}; ratio {row.ratio}; budget {row.budget}"
        assert max(used, default=0) <= slack * known, (
            f"{shown}; rounds: ours {_rounds(pair.ours_all, scale)}, floor {_rounds(pair.floor_all, scale)}"
        )

    return check


def _rounds(figures: list[float], scale: float) -> str:
    return ", ".join(f"{figure * scale:.3g}" for figure in figures)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print the table, and write it where ``--benchmark-table`` says."""
    rows = config.stash[_TABLE]
    if not rows:
        return
    lines = [HEADINGS, *(row.cells() for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEADINGS))]
    markdown = [_line(line, widths) for line in lines]
    markdown.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    terminalreporter.section("benchmarks")
    for text in markdown:
        terminalreporter.write_line(text)
    file: Path | None = config.getoption("benchmark_table", default=None)
    if file is not None:
        file.write_text("\n".join(markdown) + "\n", encoding="utf-8")


def _line(cells: tuple[str, ...], widths: list[int]) -> str:
    return "| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |"
