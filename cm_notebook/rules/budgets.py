"""What a run and its steps may use, and have used.

Strategy: each turn is paid from the run's ``Budget`` and from that of the workflow's step that it belongs to, when it
ends, and before that as far as it says what it has used (``UsageReported``). When one of them is used up no turn is
started or tried again, nor calls its model again after tools: the step whose turn it is waits at a ``budget`` gate
(``RunState.held``), and while that is open nothing starts. One that is held in the midst of its turn keeps its place.
"""

from __future__ import annotations

import json
from typing import cast

from ..events import Decision, Gate, TurnCutShort, TurnFailed, TurnFinished, Usage, UsageReported
from ..runstate import Attempt, Budget, Due, RunState, StepState, StepStatus
from ..workflow import Step, limits_of


def own_budget(item: Step, before: StepState | None = None) -> Budget | None:
    """The budget of a step as it is defined now; what it used `before` counts."""
    limits = limits_of(item)
    if not limits:
        return None
    budget = Budget()
    budget.permit(limits)
    if before is not None and before.budget is not None:
        budget.used, budget.unknown = before.budget.used, before.budget.unknown
    elif before is not None:
        everybody = [before]
        for one in everybody:
            everybody += one.members
            for attempt in one.attempts:
                if not attempt.edited:
                    budget.used["max_turns"] += len(attempt.turns)
                    _add(budget, attempt.usage, attempt.cost_usd, ended=attempt.answer is not None)
    return budget


def budgets_of(state: RunState, step: StepState) -> tuple[Budget, ...]:
    """The budgets from which `step` is paid: the run's, and that of the workflow's step that it belongs to."""
    own = (state.steps[step.path.partition("/")[0]] if step.caller else step).budget
    return (state.budget,) if own is None else (state.budget, own)


def pay(
    state: RunState, step: StepState, last: Attempt, event: UsageReported | TurnFinished | TurnFailed | TurnCutShort
) -> None:
    """What the turn is known to have used counts, whatever becomes of it; what it has said before counts already."""
    usage, cost_usd = event.usage, event.cost_usd
    before, paid = last.so_far
    more = usage - before if usage is not None and before is not None else usage
    more_usd = cost_usd - paid if cost_usd is not None and paid is not None else cost_usd
    if more is not None:
        last.usage = more if last.usage is None else last.usage + more
        state.usage = state.usage + more
    if more_usd is not None:
        last.cost_usd = (last.cost_usd or 0.0) + more_usd
        state.cost_usd += more_usd
    if event.cost_estimated:
        last.cost_estimated = state.cost_estimated = True
    state.last_turn = step.path
    ended = event.type == "TurnFinished"
    for budget in budgets_of(state, step):
        _add(budget, more, more_usd, ended=ended)
    last.so_far = (usage, cost_usd) if event.type == "UsageReported" else (None, None)


def _add(budget: Budget, usage: Usage | None, cost_usd: float | None, *, ended: bool) -> None:
    """Count what was used; of a turn that `ended` and does not say, that it is not known.

    One that says that it cost nothing has asked no model: where it counts no tokens, there are none.
    """
    if usage is not None:
        budget.used["max_tokens"] += usage.input_tokens + usage.output_tokens
    elif ended and cost_usd != 0:
        budget.unknown["max_tokens"] = budget.unknown.get("max_tokens", 0) + 1
    if cost_usd is not None:
        budget.used["max_cost_usd"] += cost_usd
    elif ended:
        budget.unknown["max_cost_usd"] = budget.unknown.get("max_cost_usd", 0) + 1


def used_up(state: RunState, step: StepState, ahead: int = 0) -> Due | None:
    """The gate that comes before the next turn of `step`, once `ahead` others have started; ``None``: it may start."""
    if step.status in ("retrying", "running", "asking"):
        ahead = -1  # its turn counts already
    for budget in budgets_of(state, step):
        if budget.limits and (payload := budget.reached(ahead)) is not None:
            if budget is not state.budget:
                payload["of"] = step.path.partition("/")[0]
            if state.last_turn:
                payload["after"] = state.last_turn
            return Due("budget", payload, (json.dumps(payload),))
    return None


def grant(state: RunState, step: StepState, gate: Gate, decision: Decision, seq: int) -> None:
    """So much more may be used, counted from what is used by now; what was only unknown is not asked about again."""
    if step.status == "running":
        step.attempts[-1].asked_s += max(0.0, decision.at - gate.opened_at)
    name = gate.payload["limit"]
    budget = state.budget if "of" not in gate.payload else state.steps[gate.payload["of"]].budget
    more = getattr(decision, name)
    if budget is None:
        return
    if "unknown" in gate.payload:
        budget.waived.add(name)
    elif more is None:
        more = budget.amounts[name]
        setattr(decision, name, more)  # said in the event, for whoever reads it
    if more is not None:
        budget.limits[name] = max(budget.limits[name], budget.used[name]) + more


def release(state: RunState) -> None:
    """The step that was held stands as it did."""
    step, status = cast("tuple[StepState, StepStatus]", state.held)
    step.status, state.held = status, None
