"""What the end of a turn leads to: a pause, the next chained prompt, or what its verdict says.

Strategy: ``judge`` first asks whether a person must look (a verdict that cannot be followed, a step that pauses);
``conclude`` does what the verdict says, then or after the person's approval.
"""

from __future__ import annotations

from typing import Any, cast

from ..events import ErrorInfo, Ref
from ..runstate import Attempt, Due, Loop, RunState, StepState
from ..workflow import Module, Verdict
from .moves import owe, settle
from .places import owe_member


def judge(state: RunState, step: StepState, last: Attempt) -> None:
    """What the end of a turn leads to: a pause, the next chained prompt, or what the verdict says."""
    if step.caller:
        _judge_member(state, step, last)
        return
    more = step.turn < step.step.turns
    asks = state.mode == "step-by-step" or (step.step.interactive is True and not more)
    if not more and (problem := _verdict_problem(step, last)) is not None:
        owe(step, Due("verdict", {"reason": problem}, _answer(last)))
    elif asks and step.step.gate in ("after", "both"):
        payload = note_beside(state, step)
        if more:
            payload["next_prompt"] = step.turn + 1
        owe(step, Due("review", payload, _answer(last)))
    elif more:
        next_prompt(step, last)
    else:
        conclude(state, step, last)


def _answer(last: Attempt) -> tuple[Ref, ...]:
    """What a gate shows of an attempt."""
    return (last.answer,) if last.answer is not None else ()


def _judge_member(state: RunState, member: StepState, last: Attempt) -> None:
    """The end of a member's turn: what its verdict says is its caller's to read, but for an error."""
    if last.verdict is not None and last.verdict.action == "error":
        conclude(state, member, last)
        owe_member(state, member)
    else:
        settle(state, member, "finished", last.answer)


def note_beside(state: RunState, step: StepState) -> dict[str, Any]:
    """What a gate says beside, where the mode asks and not the step."""
    if state.mode == "step-by-step" and step.step.interactive is False:
        return {"note": "This step asks for no pause, but in step-by-step mode every step pauses."}
    return {}


def next_prompt(step: StepState, last: Attempt) -> None:
    """The next of the chained prompts is sent."""
    step.said = (*step.said, (Ref(last.turns[-1], "prompt"), last.answer))
    step.turn += 1
    step.status, step.redo = "ready", None


def _verdict_problem(step: StepState, last: Attempt) -> str | None:
    """Why a person must read the verdict; ``None`` when it can be followed."""
    verdict = last.verdict
    if verdict is None:
        if isinstance(step.step, Module):
            return Verdict.missed(step.id, last.text)
        return None
    if verdict.action == "pause":
        return verdict.reason or f"{step.id} asks you to decide."
    if verdict.action == "loop" and not isinstance(step.step, Module):
        return f'{step.id} says "loop", but only a module can go back. Make it one: cm.module({step.step.agent!r}, …).'
    return None


def conclude(state: RunState, step: StepState, last: Attempt) -> None:
    """The attempt counts: do what its verdict says."""
    action = last.verdict.action if last.verdict is not None else "continue"
    reason = last.verdict.reason if last.verdict is not None else ""
    if action == "error":
        info = ErrorInfo(kind="Verdict", message=reason or f"{step.id} reports an error.")
        last.errors += (info,)
        owe(step, Due("failed", {"error": info.message}, (info.message,)))
    elif action == "stop":
        settle(state, step, "finished", last.answer)
        state.ending = ("stopped", f"{step.id}: {reason}" if reason else f"{step.id} said stop.")
    elif action == "loop" and isinstance(step.step, Module):
        loop = state.loops.setdefault(step.id, Loop())
        loop.output = last.answer
        loop.reason = Ref(last.answer.seq, "reason") if last.answer is not None and reason else ""
        if loop.reason:
            state.texts[cast("Ref", loop.reason)] = reason
        go_back(state, step)
    else:
        settle(state, step, "finished", last.answer)


def go_back(state: RunState, step: StepState, *, asked: bool = False) -> None:
    """Loop once more, or say that the jumps are used up; a person who `asked` for it is not passed over."""
    module = cast("Module", step.step)
    loop = state.loops.setdefault(step.id, Loop())
    limit = module.loop_max_iterations
    if limit is None or loop.count < limit + loop.extra:
        step.status = "looping"
        return
    last = step.last
    answer = last.answer if last is not None else None
    if module.on_exhausted == "continue" and not asked:
        settle(state, step, "finished", answer)
        return
    used = loop.count
    said = (state.text(loop.reason) if isinstance(loop.reason, Ref) else loop.reason).strip()
    reason = f"Not good enough after {used} {'repeat' if used == 1 else 'repeats'}{f': “{said}”' if said else '.'}"
    payload = {"reason": reason, "iterations": used}
    owe(step, Due("exhausted", payload, (answer,) if answer is not None else ()))
    if module.on_exhausted == "fail":
        state.ending = ("failed", f"{step.id}: {payload['reason']}")
