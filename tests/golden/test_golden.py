"""Journals and tapes that this and earlier versions wrote are read, shown and gone on with by this one.

A newer version may find more in them than was kept beside them (a field with a default), and never less.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import cm_notebook as cm
from cm_notebook import tape
from cm_notebook.events import TYPES
from cm_notebook.journal import MIGRATIONS
from cm_notebook.render import html, text
from tests.golden.make import CUT, HERE, OPEN, of_run, of_tape, open_flow

JOURNALS = sorted(HERE.glob("*/*.db"))
TAPES = sorted(HERE.glob("*/*.jsonl"))
LARGEST = 100_000


def name(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


def kept(path: Path) -> dict[str, Any]:
    """What stands beside a golden file."""
    found: dict[str, Any] = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    return found


def opened(path: Path, folder: Path) -> cm.Run:
    """The run in a copy of that journal."""
    shutil.copyfile(path, folder / path.name)
    journal = cm.Journal(folder / path.name)
    return cm.Run.open(journal.runs()[0].id, journal)


def missing(found: Any, expected: Any, where: str = "") -> str | None:
    """Where something that was kept is not found any more."""
    if isinstance(expected, dict) and isinstance(found, dict):
        gone = [key for key in expected if key not in found]
        inside = (missing(found[key], expected[key], f"{where}/{key}") for key in expected if key in found)
        return f"{where}/{gone[0]}" if gone else next((one for one in inside if one), None)
    if isinstance(expected, list) and isinstance(found, list) and len(expected) == len(found):
        pairs = enumerate(zip(found, expected, strict=True))
        return next((one for at, (a, b) in pairs if (one := missing(a, b, f"{where}/{at}"))), None)
    return None if found == expected else f"{where}: {found!r}, kept is {expected!r}"


@pytest.mark.parametrize("path", JOURNALS, ids=name)
def test_a_journal_is_read_as_it_was_meant(path: Path, tmp_path: Path) -> None:
    run = opened(path, tmp_path)
    assert missing(of_run(run), kept(path)) is None
    with run.reading() as state:  # and can be shown
        assert state.name in text.run_text(state)
        assert state.name in html.run_html(state)


@pytest.mark.parametrize("path", TAPES, ids=name)
def test_a_tape_is_read_as_it_was_meant(path: Path) -> None:
    assert missing(of_tape(tape.Tape.read(path)), kept(path)) is None


@pytest.mark.parametrize("path", sorted(HERE.glob(f"*/{OPEN}.db")), ids=name)
def test_a_run_of_then_goes_on_now(path: Path, tmp_path: Path) -> None:
    """Its gate can be decided, and its steps are not stale."""
    run = opened(path, tmp_path)
    engine = cm.ScriptedEngine({"plan": ["never asked", "never"], "build": ["built"]})
    again = cm.resume(run.id, open_flow(), engine=engine, journal=tmp_path / path.name)
    assert [gate.kind for gate in again.gates] == ["review"]
    again.approve()
    assert again.wait(20)["build"].text == "built"
    assert again["plan"].text == "1. Write it."
    assert len(again["plan"].attempts) == 1


def test_each_format_has_its_golden_files() -> None:
    advice = "Run `python -m tests.golden.make`, and keep what it makes beside the older ones."
    formats = {int(path.parent.name) for path in JOURNALS}
    assert formats == set(range(1, len(MIGRATIONS) + 1)), f"journals have format {len(MIGRATIONS)} now. {advice}"
    first_lines = {json.loads(path.read_text(encoding="utf-8").splitlines()[0])["tape"] for path in TAPES}
    assert first_lines == set(range(1, tape.VERSION + 1)), f"tapes have version {tape.VERSION} now. {advice}"


def test_each_kind_of_event_is_in_one_of_them() -> None:
    found = {event[2] for path in JOURNALS for event in kept(path)["events"]}
    assert found >= set(TYPES), (
        f"no golden journal has {sorted(set(TYPES) - found)}. Give a plan of tests/crash/plans.py that event, and keep "
        "what `python -m tests.golden.make NAME` makes."
    )
    assert CUT in {path.stem for path in JOURNALS}


def test_they_are_small() -> None:
    assert [path.name for path in HERE.glob("*/*") if path.stat().st_size > LARGEST] == []
