"""Which events of a run count for a tape that is to be played from start to end by itself.

Strategy: nobody goes back, and nobody edits a step, while such a tape plays. So what a run has gone back over is left
out, as is what a step did before it was edited and run again; attempts are counted as if that had never been. A step's
*pass* begins with the first that it does after the run has come to it: by its course, in a loop, or back.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Iterable
from typing import NamedTuple

from ..events import AnyEvent, GateDecided, GateOpened, LoopedBack, Rewound, StepOutdated, TurnStarted
from ..runstate import RunState, StepState
from ..state import apply


class Counted(NamedTuple):
    """``gone``: the numbers of events that do not count; ``fewer``: how many attempts less steps have, from one on."""

    gone: set[int]
    fewer: dict[int, dict[str, int]]


def counted(events: Iterable[AnyEvent]) -> Counted:
    """Find what of all the events of a run does not count."""
    state, gone, fewer = RunState(), set[int](), dict[int, dict[str, int]]()
    begun: dict[str, list[tuple[int, int]]] = {}  # with which event each pass of a step began, and which one it was
    to_begin: set[str] = set()  # steps that come to a new one
    done: list[tuple[int, str, int]] = []  # what was done in which step, and how many attempts it had before
    gates: dict[str, GateOpened] = {}

    def forget(steps: list[StepState], since: str, seq: int) -> None:
        """What these steps did since that one's pass began does not count."""
        passes = begun.get(since)
        if not passes or since in to_begin:
            return
        first, number = passes.pop()
        going = any(loop.count for loop in state.loops.values())
        while passes and number > (state.step(since).iteration if going else 1):  # a loop that had ended begins anew
            first, number = passes.pop()
        ids = {step.id for step in steps}
        before: dict[str, int] = {}
        for number, id, attempts in done[bisect(done, first, key=lambda entry: entry[0] + 1) :]:
            if id in ids:
                gone.add(number)
                before.setdefault(id, attempts)
        for number, less in fewer.items():  # what was gone back over in there is counted now
            if number >= first:
                fewer[number] = {id: count for id, count in less.items() if id not in ids}
        fewer[seq] = {id: state.step(id).attempt - attempts for id, attempts in before.items()}
        to_begin.update(ids)

    for event in events:
        gate = gates[event.gate_id].gate if isinstance(event, GateDecided) else getattr(event, "gate", None)
        step: str = (gate.path if gate is not None else getattr(event, "path", "")).partition("/")[0]
        if isinstance(event, GateOpened):
            gates[event.gate.id] = event
        if gate is not None and gate.kind == "stale":  # there is no such gate while the tape plays
            gone.add(event.seq)
            if isinstance(event, GateDecided) and event.decision.action == "retry":
                forget([state.step(step)], step, event.seq)
        elif isinstance(event, LoopedBack):
            to_begin.update(later.id for later in state.order[state.step(event.to).index :])
        elif step in state.steps:
            if isinstance(event, (TurnStarted, GateOpened)) and (step not in begun or step in to_begin):
                begun.setdefault(step, []).append((event.seq, state.steps[step].iteration))
                to_begin.discard(step)
            done.append((event.seq, step, state.steps[step].attempt))
        apply(state, event)
        if isinstance(event, Rewound):
            over = state.order[state.step(event.to).index :]
            forget(over if event.later or event.afresh else over[:1], over[0].id, event.seq)
        elif isinstance(event, StepOutdated):
            forget([state.step(event.step)], event.step, event.seq)
    return Counted(gone, fewer)
