"""Waiting in tests: for a condition, with a deadline, never for a time."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import cm_notebook as cm


def until(condition: Callable[[], Any], what: str, timeout_s: float = 20) -> Any:
    """The first true value of `condition`, asked again and again; fails after `timeout_s`."""
    end = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < end, f"waited {timeout_s} s in vain for {what}"
        time.sleep(0.005)
    return value


def gate(run: cm.Run, step: str | None = None) -> cm.Gate:
    """The gate of `step` once it is open."""
    return until(
        lambda: next((gate for gate in run.gates if step in (None, gate.step)), None),
        f"a gate of {step or 'any step'}",
    )
