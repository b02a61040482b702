"""Whether a person is there, and what is said when nobody is.

Strategy: the setting decides, else the kernel knows, else it is whoever sits at a terminal. What knows the kernel is
loaded in a kernel only, here and nowhere else.
"""

from __future__ import annotations

import sys
from typing import Any

from .config import setting
from .events import Gate


def somebody() -> bool:
    """Whether a person can answer a gate: ``CM_HEADLESS``, else the notebook's front end, else a terminal."""
    headless = setting("headless")
    if headless is not None:
        return not headless
    host = kernel_host()
    if host is not None:
        return bool(host.somebody())
    try:
        return sys.stdin is not None and sys.stdin.isatty()
    except ValueError:  # closed
        return False


def kernel_host() -> Any:
    """What knows the kernel, when this process is one."""
    if "ipykernel" not in sys.modules:
        return None
    from .jupyter import bridge

    return bridge if bridge.kernel() is not None else None


def nobody_there(gate: Gate) -> str:
    """Why the run rests at this gate, and what would answer it."""
    if gate.kind == "budget":
        from .render import text

        option = f"--{gate.payload['limit'].replace('_usd', '').replace('_', '-')}"
        return (
            f"{text.limit_words(gate.payload)} Nobody can answer here. Go on with more in all (`{option}`), play a "
            "tape with a decision (`--tape`), or pass `--on-gate approve` if that is what you want."
        )
    else_ = "pass `--on-gate approve` if that is what you want."
    if "approve" not in gate.actions:  # a question
        else_ = "have a function answer: on_gate=lambda gate: cm.Decision(action='answer', feedback='…')."
    return (
        f'Stopped at the gate "{gate.path}": nobody can answer here. Play a tape with a decision (`--tape`), or {else_}'
    )
