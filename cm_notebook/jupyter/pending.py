"""A gate's bar alone, under a cell that has read a result too early.

Strategy: it is a display like any other (``view.py``), with the gate and without graph and cards: the cards stay under
the cells of their steps. When the gate has its answer, one line is left.
"""

from __future__ import annotations

from typing import Any

from ..config import setting
from ..events import Gate
from ..render import html
from ..render import text as say
from ..run import Run
from ..state import RunState
from . import bridge, view


def show_bar(run: Run, gate: Gate | None) -> None:
    """Show the bar of `gate` under the present cell, or of the gates that are open when it is ``None``."""
    with run.reading() as state:
        is_open = bool(_wanted(state, gate))
    if not is_open or bridge.kernel() is None or run._loop is None or setting("view") != "full":
        bridge.Slot.open(_static(run, gate))
        return
    if setting("direct_clicks"):
        bridge.direct_clicks.install(bridge.kernel())
    hub = view._hub(run)
    if hub.makes_room(None, "full"):
        hub.add(Bar(run, gate, hub.listen))


def _wanted(state: RunState, gate: Gate | None) -> list[Gate]:
    """Those that are still open."""
    return [one for one in state.gates.values() if gate is None or one.id == gate.id]


def _static(run: Run, gate: Gate | None) -> dict[str, str]:
    with run.reading() as state:
        gates = _wanted(state, gate)
        if not gates:
            said = "; ".join(f"{say.gate_step(id)} {say.decided(state, how)}" for id, how in state.decisions.items()
                             if gate is not None and id == gate.id)  # fmt: skip
            return view._line(said)
        bars = "".join(html.gate_bar(state, one) for one in gates)
        ways = "\n".join(" · ".join(way.magic for way in say.ways(state, one)) for one in gates)
        return {"text/html": f'<div style="{html.FRAME}">\n{bars}</div>\n', "text/plain": ways}


class Bar(view.Display):
    """The gate, live."""

    def __init__(self, run: Run, gate: Gate | None, listen: Any) -> None:
        self.gate = gate
        super().__init__(run, None, "full", listen)

    def over(self, state: RunState) -> bool:
        """Whether it has its answer."""
        return not _wanted(state, self.gate)

    def covers(self, path: str) -> bool:
        """No step is shown here."""
        return False

    def _traits(self, state: RunState, now: float) -> dict[str, Any]:
        gates = _wanted(state, self.gate)
        head = view.head_record(state, [one.step for one in gates], now)
        return {"head": head, "graph": "", "cards": [], "gates": [view.gate_record(state, one) for one in gates]}

    def _snapshot(self) -> dict[str, str]:
        bundle = _static(self.run, self.gate)
        bundle["text/html"] = f'<div data-cm-static="{self.place}">\n{bundle["text/html"]}</div>\n'
        return bundle

    def _freeze(self) -> None:
        self.main.update(_static(self.run, self.gate))
        if self.spare is not None:
            self.spare.update({"text/plain": ""})
        self.close()
