"""Runs that are killed, again and again, lose nothing and repeat nothing; see ``harness.py``."""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cm_notebook.events import TYPES
from tests.crash.__main__ import share, summary
from tests.crash.harness import Broken, Row, check
from tests.crash.points import CALL_POINTS, ELSEWHERE, EVENT_POINTS, SNAPSHOT_POINTS

RUNS = 200
"""A thousand, and from which seed on: ``python -m tests.crash --seeds 0:1000 --jobs 2``."""
JOBS = min(2, os.cpu_count() or 1)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_killed_at_each_point_with_a_name(tmp_path: Path) -> None:
    """Before, in the midst of and after every kind of transaction, and around what else a journal does."""
    points = [*EVENT_POINTS, *CALL_POINTS, *SNAPSHOT_POINTS]
    said = share(points, JOBS, tmp_path)
    assert not any("broken" in one for one in said), summary(said)
    passed = {kill.partition(" at ")[2].partition("#")[0] for one in said for kill in one["died"]}
    assert passed >= set(points), f"nobody died at {set(points) - passed}"


def test_each_kind_of_event_has_points() -> None:
    assert {point.partition(":")[2] for point in EVENT_POINTS} == set(TYPES) - set(ELSEWHERE)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_killed_at_random_lose_nothing_and_repeat_nothing(tmp_path: Path) -> None:
    """Other seeds each time; what fails says the command that plays it again."""
    first = random.randrange(10**6)
    said = share([str(first + number) for number in range(RUNS)], JOBS, tmp_path)
    assert not any("broken" in one for one in said), summary(said)
    assert sum(len(one["died"]) for one in said) > RUNS / 2, "few were killed"


# -- the harness itself: a promise that is not kept is noticed ---------------------------------------------------------

TURN = {"path": "a", "attempt": 1, "digest": "d1"}
TOLD = {"what": "decided", "gate": "g1", "action": "approve", "feedback": None, "output": None}


def history() -> tuple[list[Row], list[dict[str, Any]], list[dict[str, Any]]]:
    """A run of one step whose prompt was approved, with what was written down outside."""
    gate = {"id": "g1", "kind": "start", "path": "a", "digest": "d1"}
    rows = [
        ("RunStarted", {"workflow": {"steps": [{"agent": "a", "idempotent": False}]}}),
        ("GateOpened", {"gate": gate}),
        ("GateDecided", {"gate_id": "g1", "kind": "start", "decision": {"action": "approve"}}),
        ("TurnStarted", dict(TURN)),
        ("TurnFinished", {"path": "a", "attempt": 1, "text": "done"}),
        ("RunFinished", {"status": "completed"}),
    ]
    ledger = [{"what": "begin", **TURN}, {"what": "end", **TURN, "text": "done"}]
    return [Row(seq, kind, body) for seq, (kind, body) in enumerate(rows, 1)], ledger, [dict(TOLD)]


def again(rows: list[Row], kind: str, at: int | None = None, **changed: Any) -> None:
    """One more event of that kind, with something else in it."""
    body = next((row.body for row in rows if row.type == kind), TURN)
    rows.insert(len(rows) if at is None else at, Row(99, kind, {**body, **changed}))


def lost(rows: list[Row], _ledger: Any, _oracle: Any) -> None:
    del rows[2]


def twice(rows: list[Row], _ledger: Any, _oracle: Any) -> None:
    again(rows, "GateDecided")


def two_told(_rows: Any, _ledger: Any, oracle: Any) -> None:
    oracle.append(dict(TOLD))


def another_answer(_rows: Any, _ledger: Any, oracle: Any) -> None:
    oracle[0]["action"] = "skip"


def unrecorded(_rows: Any, ledger: Any, _oracle: Any) -> None:
    ledger.append({"what": "begin", **TURN, "attempt": 2})


def invented(_rows: Any, ledger: Any, _oracle: Any) -> None:
    del ledger[1]


def another_prompt(rows: list[Row], ledger: Any, _oracle: Any) -> None:
    rows[3].body["digest"] = ledger[0]["digest"] = "d2"


def finished_again(rows: list[Row], _ledger: Any, _oracle: Any) -> None:
    again(rows, "TurnStarted", attempt=2)


def once_too_often(rows: list[Row], ledger: Any, _oracle: Any) -> None:
    """Begun twice, and nobody died meanwhile."""
    rows[3:3] = [Row(99, "TurnStarted", {**TURN, "attempt": 1}), Row(99, "TurnCutShort", {"path": "b", "attempt": 1})]
    ledger.insert(0, {"what": "begin", **TURN})


def unasked(rows: list[Row], _ledger: Any, _oracle: Any) -> None:
    rows[3:3] = [Row(99, "TurnStarted", dict(TURN)), Row(99, "TurnCutShort", {"path": "a", "attempt": 1})]


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lost, "the answer to g1 is lost"),
        (twice, "was decided twice"),
        (two_told, "two were told"),
        (another_answer, "and told"),
        (unrecorded, "began and are not on disk"),
        (invented, "said to have ended and have not"),
        (another_prompt, "another prompt of a runs than was approved"),
        (finished_again, "was finished .* and runs again"),
        (once_too_often, "began 2 times, ended 1, died 0"),
        (unasked, "ran again unasked"),
    ],
)
def test_what_is_not_kept_is_noticed(spoil: Callable[..., None], words: str) -> None:
    told = history()
    check(*told, Counter())
    spoil(*told)
    with pytest.raises(Broken, match=words):
        check(*told, Counter())
