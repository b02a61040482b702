"""A workflow of five steps with a rejection and a loop in it, and what its agents say; also used by killed children."""

from __future__ import annotations

from typing import Any

import cm_notebook as cm

SCRIPT = {
    "researcher": ["facts"],
    "planner": ["plan one", "plan two", "plan three"],
    "implementer": [f"code {number}" for number in range(1, 30)],
    "quality-gate": ['{"action": "loop", "reason": "tests fail"}'] * 2 + ['{"action": "continue"}'] * 20,
    "deployer": ["deployed"] * 9,
}


def five_steps() -> cm.Workflow:
    return cm.Workflow(
        "five",
        agents=[cm.Agent(name, f"Be the {name}.") for name in SCRIPT],
        steps="researcher -> planner? -> implementer -> quality-gate(loop 1, max 5) -> deployer?",
    )


def policy(opened: cm.Gate) -> cm.Decision:
    """Rejects the planner's first answer, approves everything else."""
    if opened.step == "planner" and opened.id.endswith("/1"):
        return cm.Decision(action="reject", feedback="shorter")
    return cm.Decision(action="approve")


def outcome(run: cm.Run) -> dict[str, Any]:
    return {"status": run.status, **{step.id: step.text for step in run}}


def whole() -> cm.Run:
    return five_steps().start(engine=cm.ScriptedEngine(SCRIPT), journal=":memory:", on_gate=policy).wait(20)
