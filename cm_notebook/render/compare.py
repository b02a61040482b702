"""Two runs side by side: which of their steps differ, and in what.

Strategy: a step is compared by what later steps see of it: its approved output, or, while there is none, its last
answer. Runs are named by what they are to each other (a fork, what it was forked from), else by their ids, which are
left out where a tape says the same each time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from ..errors import TransitionError, did_you_mean
from ..runstate import RunState, StepState
from . import diff, html
from . import text as say

MOST = 12
"""So many answers that differ are shown in full; of the others it is said that they do."""


class Pair(NamedTuple):
    """A step in both runs; ``None`` where it is in one alone."""

    id: str
    old: StepState | None
    new: StepState | None
    texts: tuple[str, str]

    @property
    def word(self) -> str:
        """Whether its answer is another one."""
        if self.old is None or self.new is None:
            return "only in one"
        if self.texts == ("", ""):
            return ""
        return "the same" if self.texts[0] == self.texts[1] else "different"


def text(old: RunState, new: RunState, step: str | None = None) -> str:
    """The comparison as ``text/plain``: a unified diff of one step; of all a table, and a diff of each that differs."""
    if step is not None:
        return diff.text(*_pair(old, new, step).texts)
    pairs = list(_pairs(old, new))
    rows = [["Step", *names(old, new), "Answer"]]
    rows += [[pair.id, _stands(old, pair.old), _stands(new, pair.new), pair.word] for pair in pairs]
    parts = [
        "\n".join(say.table(rows)),
        *(f"{pair.id}:\n{diff.text(*pair.texts)}" for pair in _different(pairs)[:MOST]),
    ]
    return "\n\n".join(parts).rstrip() + "\n"


def compare_html(old: RunState, new: RunState, step: str | None = None) -> str:
    """The comparison as HTML: answers in two columns, one for each run."""
    heads = names(old, new)
    pairs = [_pair(old, new, step)] if step is not None else list(_pairs(old, new))
    table = html.table(
        ("Step", *heads, "Answer"),
        [[html.bold(pair.id), _pill(old, pair.old), _pill(new, pair.new), pair.word] for pair in pairs],
    )
    shown = pairs if step is not None else _different(pairs)[:MOST]
    parts = [f"<div>{html.bold(pair.id)}</div>\n{diff.side_by_side(*pair.texts, heads)}" for pair in shown]
    return html.page((table if step is None else "") + "".join(parts))


def names(old: RunState, new: RunState) -> tuple[str, str]:
    """What the two runs are called beside each other."""
    return _name(old, new, "the other run"), _name(new, old, "this run")


def _name(state: RunState, other: RunState, plain: str) -> str:
    id = "" if state.recorded is not None else f" {state.run_id}"
    if state.origin is not None and state.origin.run == other.run_id:
        return f"fork at {state.origin.step}{id}"
    if other.origin is not None and other.origin.run == state.run_id:
        return f"forked from{id}" if id else "what it was forked from"
    return f"run{id}" if id else plain


def _pairs(old: RunState, new: RunState) -> Iterator[Pair]:
    ids = dict.fromkeys([*(step.id for step in old.order), *(step.id for step in new.order)])
    for id in ids:
        one, other = old.steps.get(id), new.steps.get(id)
        yield Pair(id, one, other, (_said(old, one), _said(new, other)))


def _pair(old: RunState, new: RunState, step: str) -> Pair:
    known = {**old.steps, **new.steps, **old.members, **new.members}
    one, other = (_met(state, step) for state in (old, new))
    if one is None and other is None:
        raise TransitionError(f"neither run has a step {step!r}. {did_you_mean(step, known, 'Steps')}")
    return Pair(step, one, other, (_said(old, one), _said(new, other)))


def _met(state: RunState, step: object) -> StepState | None:
    return {**state.steps, **state.members}.get(step) or state.named(step) if isinstance(step, str) else None


def _different(pairs: list[Pair]) -> list[Pair]:
    return [pair for pair in pairs if pair.texts[0] != pair.texts[1]]


def _said(state: RunState, step: StepState | None) -> str:
    if step is None:
        return ""
    if step.approved is not None or step.settled:
        return state.text(step.approved)
    # what was tried before somebody went back to it is not its answer any more
    return step.last.text if step.last is not None and step.status != "pending" else ""


def _stands(state: RunState, step: StepState | None) -> str:
    return " ".join([say.look(state, step).word, *say.taken(state, step).words()]) if step is not None else ""


def _pill(state: RunState, step: StepState | None) -> str:
    return f"{html.pill(say.look(state, step))} {html.faint(*say.taken(state, step).words())}" if step else ""
