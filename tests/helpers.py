"""Waiting in tests: for a condition, with a deadline, never for a time. And comparing runs."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import cm_notebook as cm
from cm_notebook.events import AnyEvent, body


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


NOBODY = 65534


@contextlib.contextmanager
def powerless() -> Iterator[None]:
    """Without the rights of root, if this is root. Nothing more can be imported then: what is used must be loaded."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


LEFT_OUT = {"run_id", "recorded", "engine", "duration_s", "retry_in_s", "by", "workspace", "id", "gate_id"}
"""What is another one when a run is played: names, times, who decided."""


def facts(events: list[AnyEvent]) -> list[tuple[str, Any]]:
    """What happened, without when and under which name; what went on side by side, in the order of places."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: plain(inner) for name, inner in value.items() if name not in LEFT_OUT}
        if isinstance(value, list):
            return [plain(inner) for inner in value]
        return value.replace("by on_gate", "by tape") if isinstance(value, str) else value

    made = []
    for event in events:
        said = json.loads(body(event))
        for name in ("prompt", "context"):
            said.pop(name, None)  # the digest tells; the parts hold numbers of events
        path = getattr(event, "path", "") or (event.gate.path if event.type == "GateOpened" else "")
        if event.type == "GateDecided":
            path = event.gate_id.partition("/")[2].rsplit("/", 2)[0]
        made.append((path, event.type, plain(said)))
    return sorted(made, key=lambda one: one[0])  # stable: in each place, as it happened
