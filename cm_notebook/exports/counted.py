"""Which events of a run count for a tape that is to be played from start to end by itself.

Strategy: nobody goes back, and nobody edits a step, while such a tape plays. So what a run has gone back over is left
out, as is what a step did before it was edited and run again; attempts are counted as if that had never been. A step's
*pass* begins with the first that it does after the run has come to it: by its course, in a loop, or back.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from typing import NamedTuple

from ..events import AnyEvent, Gate, GateDecided, GateOpened, LoopedBack, Rewound, StepOutdated, TurnStarted
from ..runstate import RunState, StepState
from ..state import apply


class Counted(NamedTuple):
    """``gone``: the numbers of events that do not count; ``fewer``: how many attempts less steps have, from one on."""

    gone: set[int]
    fewer: dict[int, dict[str, int]]


def counted(events: Iterable[AnyEvent]) -> Counted:
    """Find what of all the events of a run does not count."""
    told = _Told()
    for event in events:
        told.hear(event)
    return Counted(told.gone, told.fewer)


class _Pass(NamedTuple):
    """With which event a step began a pass, and in which iteration."""

    seq: int
    iteration: int


class _Done(NamedTuple):
    """An event in a step, and how many attempts the step had before it."""

    seq: int
    step: str
    attempts: int


class _Told:
    """What the events so far have told: the passes of each step, and what was done in them."""

    def __init__(self) -> None:
        self.gone: set[int] = set()
        self.fewer: dict[int, dict[str, int]] = {}
        self._state = RunState()
        self._passes: dict[str, list[_Pass]] = {}
        self._to_begin: set[str] = set()
        """Steps whose next event begins a new pass."""
        self._done: list[_Done] = []
        self._gates: dict[str, Gate] = {}

    def hear(self, event: AnyEvent) -> None:
        """Take in the next event."""
        if isinstance(event, GateOpened):
            self._gates[event.gate.id] = event.gate
        gate = self._gates[event.gate_id] if isinstance(event, GateDecided) else getattr(event, "gate", None)
        path = gate.path if gate is not None else getattr(event, "path", "")
        step = self._state.steps.get(path.partition("/")[0])  # what a member does is done in the step that called it
        if gate is not None and gate.kind == "stale":
            self._hear_stale(event, gate)
        elif isinstance(event, LoopedBack):
            self._to_begin.update(later.id for later in self._from(event.to))
        elif step is not None:
            self._note(event, step)
        apply(self._state, event)
        if isinstance(event, Rewound):
            back = self._from(event.to)
            self._forget(back if event.later or event.afresh else back[:1], event.seq)
        elif isinstance(event, StepOutdated):
            self._forget([self._state.step(event.step)], event.seq)

    def _hear_stale(self, event: AnyEvent, gate: Gate) -> None:
        """There is no such gate while the tape plays; who runs the step again takes back what it did."""
        self.gone.add(event.seq)
        if isinstance(event, GateDecided) and event.decision.action == "retry":
            self._forget([self._state.step(gate.path.partition("/")[0])], event.seq)

    def _note(self, event: AnyEvent, step: StepState) -> None:
        """Something was done in a step; perhaps it is the first of a pass."""
        first = step.id not in self._passes or step.id in self._to_begin
        if first and isinstance(event, (TurnStarted, GateOpened)):
            self._passes.setdefault(step.id, []).append(_Pass(event.seq, step.iteration))
            self._to_begin.discard(step.id)
        self._done.append(_Done(event.seq, step.id, step.attempt))

    def _forget(self, steps: list[StepState], seq: int) -> None:
        """With the event of that number, what these steps did since the pass of the first of them does not count."""
        begin = self._take_pass(steps[0])
        if begin is None:
            return
        ids, before = {step.id for step in steps}, dict[str, int]()
        for done in self._done[bisect_left(self._done, begin, key=lambda one: one.seq) :]:
            if done.step in ids:
                self.gone.add(done.seq)
                before.setdefault(done.step, done.attempts)
        for number, less in self.fewer.items():
            if number >= begin:  # what was gone back over in there is counted now
                self.fewer[number] = {id: count for id, count in less.items() if id not in ids}
        self._to_begin |= ids
        self.fewer[seq] = {id: self._state.step(id).attempt - attempts for id, attempts in before.items()}

    def _take_pass(self, step: StepState) -> int | None:
        """The event with which the step's pass began, which is no longer one; ``None``: it has not begun it."""
        passes = self._passes.get(step.id)
        if not passes or step.id in self._to_begin:
            return None
        looping = any(loop.count for loop in self._state.loops.values())
        taken = passes.pop()
        while passes and taken.iteration > (step.iteration if looping else 1):  # a loop that had ended begins anew
            taken = passes.pop()
        return taken.seq

    def _from(self, step: str) -> list[StepState]:
        return self._state.order[self._state.step(step).index :]
