"""Completion of ``%cm`` lines, and through IPython itself."""

from __future__ import annotations

import pytest

import cm_notebook as cm
from cm_notebook.jupyter.completion import candidates
from cm_notebook.jupyter.notebook import Notebook, Plan


@pytest.fixture
def notebook(monkeypatch: pytest.MonkeyPatch) -> Notebook:
    monkeypatch.setattr("cm_notebook.run._current", None)
    book = Notebook(lambda: {"writer": cm.Agent("writer", "Write."), "n": 3})
    book.plan = Plan("w")
    book.place(cm.step("planner", prompt="Plan."))
    book.place(cm.step("poet", prompt="Sing."))
    return book


CASES = [
    ("%cm st", ["step", "stop", "status"]),
    ("run = %cm ru", ["run", "runs"]),
    ("%%cm step wr", ["writer"]),
    ("%%cm step writer --ti", ["--timeout"]),
    ("%%cm step writer --gate ", ["before", "after", "both"]),
    ("%%cm step writer --gate=a", ["--gate=after"]),
    ("%%cm step x --agent w", ["writer"]),
    ("%%cm step x --after p", ["planner", "poet"]),
    ("%cm approve po", ["poet"]),
    ("%cm reject --step pl", ["planner"]),
    ("%cm mode un", ["unattended"]),
    ("%cm run --engine off", ["offline"]),
    ("%cm run --un", ["--until"]),
    ("%cm show po", ["poet"]),
    ("%cm show planner --", ["--attempt", "--full", "--out"]),
    ("%cm nonsense x", []),
]


@pytest.mark.parametrize(("line", "words"), CASES, ids=[line for line, _ in CASES])
def test_what_may_stand_there(notebook: Notebook, line: str, words: list[str]) -> None:
    assert candidates(notebook, line) == words


@pytest.mark.parametrize("line", ["x = 1", "%cmx st", "%timeit st", "print('%cm st"])
def test_other_lines_are_left_alone(notebook: Notebook, line: str) -> None:
    assert candidates(notebook, line) is None
