"""Which events a step may meet, by its status, and what it may become by them.

A step goes through these statuses (``running`` to ``finished`` is one *attempt*):

    pending ──────► running ──────► finished          waiting: its gate is open
       │ ▲          │  ▲ │  ▲          │              due:     its gate is to be opened
       │ └─looping◄─┤  │ │  └─ready ◄──┤              ready:   goes on, or begins its next attempt
       ▼            ▼  │ ▼             │              asking:  somebody is asked while the turn runs
    waiting ◄──── due  │ asking,       │              calling: waits for the agents it has called
       └───► ready,    │ calling       │              retrying: begins again by itself, at ``retry_at``,
             finished, skipped, looping                        or waits, when a limit is reached by then
                                                      looping: will send the run back

Whatever moves a step along begins with ``met``, which holds it to this table; a member is held to the same one.
"""

from __future__ import annotations

from ..errors import TransitionError
from ..runstate import SETTLED, RunState, StepState, StepStatus

TRANSITIONS: dict[StepStatus, dict[str, tuple[StepStatus, ...]]] = {
    "pending": {
        "TurnStarted": ("running",),
        "GateOpened": ("waiting",),  # start, budget
        "AgentsCalled": ("calling",),  # a parallel step
        "StepSkipped": ("skipped",),
        "Rewound": ("ready", "pending"),
    },
    "ready": {
        "TurnStarted": ("running",),
        "AgentsCalled": ("calling",),
        "GateOpened": ("waiting",),  # start, of a chained prompt; budget
        "Rewound": ("ready", "pending"),
    },
    "running": {
        "SessionOpened": ("running",),
        "ToolCalled": ("running",),
        "ToolReturned": ("running",),
        "UsageReported": ("running",),
        "SnapshotTaken": ("running",),
        "SnapshotFailed": ("running",),
        "WorkspaceRestored": ("running",),
        "TurnFinished": ("ready", "due", "looping", "finished"),
        "TurnFailed": ("retrying", "due"),
        "TurnCutShort": ("ready", "due"),
        "GateOpened": ("asking",),  # question, permission, budget
        "AgentsCalled": ("calling",),
    },
    "calling": {
        "SessionOpened": ("calling",),
        "ToolCalled": ("calling",),
        "ToolReturned": ("calling",),
        "UsageReported": ("calling",),
        "SnapshotTaken": ("calling",),
        "SnapshotFailed": ("calling",),
        "WorkspaceRestored": ("calling",),
        "AgentsReturned": ("running", "due", "finished"),
        "TurnFinished": ("ready", "due", "looping", "finished"),
        "TurnFailed": ("retrying", "due"),
        "TurnCutShort": ("ready", "due"),
    },
    "asking": {
        "SessionOpened": ("asking",),
        "ToolCalled": ("asking",),
        "ToolReturned": ("asking",),
        "UsageReported": ("asking",),
        "SnapshotTaken": ("asking",),
        "SnapshotFailed": ("asking",),
        "WorkspaceRestored": ("asking",),
        "GateDecided": ("running", "asking"),
        "TurnWentOn": ("running",),
        "TurnFailed": ("retrying", "due"),
        "TurnCutShort": ("ready", "due"),
    },
    "retrying": {
        "TurnStarted": ("running",),
        "GateOpened": ("waiting",),  # budget
        "TurnCutShort": ("ready", "due"),
        "Rewound": ("ready", "pending"),
    },
    "due": {
        "GateOpened": ("waiting",),
        "StepFailed": ("failed",),
        "StepOutdated": ("pending",),
        "Rewound": ("ready", "pending"),
    },
    "waiting": {
        "GateDecided": ("ready", "finished", "skipped", "looping", "due", "pending", "retrying"),
        "TurnCutShort": ("ready", "due"),  # held before it is tried again
        "StepFailed": ("failed",),
        "StepOutdated": ("pending",),
        "Rewound": ("ready", "pending"),
    },
    "looping": {"LoopedBack": ("pending",), "StepOutdated": ("pending",), "Rewound": ("ready", "pending")},
    "finished": {"GateOpened": ("waiting",), "Rewound": ("ready", "pending")},  # stale
    "skipped": {"GateOpened": ("waiting",), "Rewound": ("ready", "pending")},  # stale
    "failed": {},  # a member; called again, it is ready
}
"""Which events a step may meet in each status, and what it may become by them."""

_AT_REST: tuple[StepStatus, ...] = ("pending", "ready", "retrying", "due", "waiting", "looping", *SETTLED)
SWEPT: dict[str, dict[StepStatus, tuple[StepStatus, ...]]] = {
    "LoopedBack": dict.fromkeys(SETTLED, ("pending",)),
    "Rewound": {**dict.fromkeys(_AT_REST, ("pending", "finished")), "waiting": ("pending", "finished", "due")},
    "RunFinished": {"waiting": ("due", "finished", "pending", "ready")},
    "RunForked": {"waiting": ("due", "finished", "pending", "ready")},
    "StepChanged": {**dict.fromkeys(_AT_REST, ("pending", "finished")), "waiting": ("pending", "finished", "due")},
    "StepRemoved": {"waiting": ("pending", "ready")},  # at its limit; it is gone
    "AgentsCalled": {"failed": ("ready",)},
    # a member whose caller waits for it no more
    **{
        ending: {"waiting": ("due", "pending", "ready", "retrying")}
        for ending in ("AgentsReturned", "TurnFinished", "TurnFailed", "TurnCutShort")
    },
    "WorkflowChanged": {
        "waiting": ("pending", "ready", "retrying"),
        "asking": ("running",),
    },  # its limit is another one
}
"""What an event may make of the steps that it is not about (and ``StepChanged`` of its own), by their status."""


def met(state: RunState, path: str, kind: str) -> StepState:
    """The step that an event of that kind is about, if it may meet it now."""
    step = state.find(path)
    if kind not in TRANSITIONS[step.status]:
        allowed = ", ".join(TRANSITIONS[step.status]) or "nothing"
        raise TransitionError(
            f"{kind} is not possible while step {step.path!r} is {step.status} (possible: {allowed})."
        )
    return step
