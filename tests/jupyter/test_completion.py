"""Completion of ``%cm`` lines, and through IPython itself."""

from __future__ import annotations

from pathlib import Path

import pytest

import cm_notebook as cm
from cm_notebook.jupyter.completion import candidates, in_body
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
    ("%cm approve --scope r", ["run"]),
    ("%cm permissions r", ["revoke"]),
    ("%cm permissions revoke x", []),
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


def test_files_stand_behind_the_options_that_name_them(
    notebook: Notebook, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tapes").mkdir()
    for name in ("02.jsonl", "01.jsonl", "notes.txt", ".hidden.jsonl"):
        (tmp_path / "tapes" / name).touch()
    (tmp_path / "t.jsonl").touch()
    monkeypatch.chdir(tmp_path)
    assert candidates(notebook, "%cm run --tape ") == ["t.jsonl", "tapes/"]
    assert candidates(notebook, "%cm run --tape tapes/") == ["tapes/01.jsonl", "tapes/02.jsonl"]
    assert candidates(notebook, "%cm workflow w --tape=tapes/02") == ["--tape=tapes/02.jsonl"]
    assert candidates(notebook, f"%cm run --tape {tmp_path}/t.") == [f"{tmp_path}/t.jsonl"]
    assert candidates(notebook, "%cm workflow w --workspace ta") == ["tapes/"]
    assert candidates(notebook, "%cm run --tape nowhere/") == []


BODIES = [
    ("%%cm workflow w", "planner -> wr", ["writer"]),
    ("%%cm workflow w --new", "wr", ["writer"]),
    ("%%cm step x", "Build {{ pl", ["planner"]),
    ("%%cm step x", "Build {{planner}} for {{ go", ["goal"]),
    ("%%cm agent x", "Build {{n", ["n"]),
    ("%%cm step x", "Again: {{ lo", ["loop"]),
    ("%%cm step x", "Build pl", None),
    ("%%cm step x", "Build {{ planner }} pl", None),
    ("%%bash", "echo {{ pl", None),
    ("x = 1", "f'{{ pl", None),
]


@pytest.mark.parametrize(("head", "line", "words"), BODIES, ids=[line for _, line, _ in BODIES])
def test_what_may_stand_in_a_body(notebook: Notebook, head: str, line: str, words: list[str] | None) -> None:
    assert notebook.plan is not None
    notebook.plan.inputs = {"goal": "a CLI"}
    assert in_body(notebook, head, line) == words
