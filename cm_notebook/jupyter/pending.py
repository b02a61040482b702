"""A gate's bar alone, under a cell that has read a result too early.

Strategy: it is a display like any other (``view.py``), with the gate and without graph and cards: the cards stay under
the cells of their steps. When the gate has its answer, one line is left. A step may be read before any gate is open
(Run All asks for every cell at once): then where the run is stands there, and each gate that opens on the way to the
step puts its bar in that place.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from ..config import setting
from ..events import Gate
from ..render import html
from ..render import text as say
from ..run import Run
from ..runstate import RunState, gate_path
from . import bridge, view


def show_bar(run: Run, gate: Gate | None, step: str | None = None) -> None:
    """Show the bar of `gate` under the present cell.

    Parameters
    ----------
    gate
        ``None``: those that are open, and with `step` also those that open until that step has its result.
    """
    wait = Wait(gate, step)
    with run.reading() as state:
        over = wait.over(state)
    if over or bridge.kernel() is None or run._driver.loop is None or setting("view") != "full":
        bridge.Slot.open(wait.static(run))
        return
    if setting("direct_clicks"):
        bridge.direct_clicks.install(bridge.kernel())
    hub = view._hub(run)
    if hub.makes_room(None, "full"):
        hub.add(Bar(run, wait, hub.listen))


class Wait(NamedTuple):
    """What the cell waits for: one gate, all that are open, or those on the way to a step."""

    gate: Gate | None
    step: str | None

    def gates(self, state: RunState) -> list[Gate]:
        """Those that are still open."""
        return [one for one in state.gates.values() if self.gate is None or one.id == self.gate.id]

    def over(self, state: RunState) -> bool:
        """Whether it has its answer, or the step its result."""
        if self.step is None or self.gate is not None:
            return not self.gates(state)
        step = state.steps.get(self.step)
        return step is None or step.settled or state.ended is not None

    def words(self, state: RunState) -> str:
        """What stands there while no gate is open."""
        if self.gate is not None:
            how = state.decisions.get(self.gate.id)
            return (
                f"{gate_path(self.gate.id)} {say.decided(state, how, live=bridge.somebody())}"
                if how is not None
                else ""
            )
        if self.step is None or state.ended is not None:
            return say.sentence(state)
        if self.over(state):
            return f"{self.step} has its result: run this cell again."
        return f"{say.sentence(state)} What is to be decided shows up here."

    def static(self, run: Run) -> dict[str, str]:
        """What stands there now, without buttons that work."""
        with run.reading() as state:
            gates = self.gates(state)
            if not gates or (self.step is not None and self.over(state)):
                return view._line(self.words(state))
            bars = "".join(html.gate_bar(state, one) for one in gates)
            ways = "\n".join(" · ".join(way.magic for way in say.ways(state, one)) for one in gates)
            return {"text/html": html.page(bars), "text/plain": ways}


class Bar(view.Display):
    """The gate, live."""

    def __init__(self, run: Run, wait: Wait, listen: Any) -> None:
        self.wait = wait
        super().__init__(run, None, "full", listen)

    def over(self, state: RunState) -> bool:
        """Whether nothing more is to be decided for this cell."""
        return self.wait.over(state)

    def covers(self, path: str) -> bool:
        """No step is shown here."""
        return False

    def _page(self, state: RunState) -> dict[str, Any]:
        return view.page_record(state, [])

    def _lanes(self, state: RunState, now: float) -> dict[str, dict[str, Any]]:
        return {}

    def _traits(self, state: RunState, now: float) -> dict[str, Any]:
        gates = self.wait.gates(state)
        steps = list(dict.fromkeys(one.path.partition("/")[0] for one in gates))
        head = {**view.head_record(state, steps, now), "tray": ""}
        if not gates:
            head["place"] = html.inline(self.wait.words(state))
        return {
            "head": head,
            "graph": "",
            "cards": [],
            "gates": [view.gate_record(state, one, beside=False) for one in gates],
        }

    def _snapshot(self) -> dict[str, str]:
        bundle = self.wait.static(self.run)
        bundle["text/html"] = f'<div data-cm-static="{self.place}">\n{bundle["text/html"]}</div>\n'
        return bundle

    def _freeze(self) -> None:
        self.main.update(self.wait.static(self.run))
        if self.spare is not None:
            self.spare.update({"text/plain": ""})
        self.close()
