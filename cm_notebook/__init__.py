"""Workflows of AI agents in the notebook, with a person deciding at the right moments.

This page is the table of contents. ``workflow.py`` says what is to be done, ``run.py`` has it done (by ``driving.py``,
its loop, ``work.py``, its turns, and ``answering.py``, its gates). ``state.py`` (and, by theme, ``rules/``) says what
what has happened means, ``runstate.py`` is what comes of it; ``engines/`` are those who do the work, ``render/`` and
``jupyter/`` show it.

    import cm_notebook as cm

    planner = cm.Agent(id="planner", prompt="Plan {{ goal }} in at most five steps.")
    workflow = cm.Workflow("Careful Builder", agents=[planner], steps="planner?", inputs={"goal": "a todo CLI"})
    run = workflow.start()          # returns at once; in a notebook the run's view is the cell's output
    ...                             # the gate opens: press Approve under the cell, or
    run.approve("planner")
    run.wait()["planner"].text
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import keys
from .errors import (
    AlreadyDecided,
    CodeMachineError,
    EngineAuthError,
    EngineError,
    EngineExited,
    EngineNotFound,
    EngineProtocolError,
    EngineRateLimited,
    EngineTimeout,
    EngineUnavailable,
    GatePending,
    JournalError,
    ReplayMismatch,
    RunFailed,
    RunLocked,
    TransitionError,
    WorkflowError,
)
from .tools import Permission, Tool, tool
from .workflow import (
    Agent,
    Module,
    Parallel,
    Separator,
    Step,
    Verdict,
    Workflow,
    agent,
    module,
    parallel,
    separator,
    step,
)

# What it takes to define a workflow is here at once, the rest when it is asked for: see _LATER below.
if TYPE_CHECKING:
    from .allowed import Permissions, permissions
    from .checkup import Report
    from .engines.base import (
        AgentEvent,
        AgentRequest,
        Delta,
        Engine,
        SessionStarted,
        ToolCalled,
        ToolReturned,
        TurnDone,
        UsageReported,
        register_engine,
    )
    from .engines.functions import Turn
    from .engines.scripted import Reply, ScriptedEngine
    from .events import Decision, Gate, Usage
    from .feed import LiveText
    from .journal import Journal, MemoryJournal
    from .run import Run, current, resume, runs
    from .runstate import Attempt
    from .steps import StepView
    from .team import AgentResult

__all__ = [
    "Agent",
    "AgentEvent",
    "AgentRequest",
    "AgentResult",
    "AlreadyDecided",
    "Attempt",
    "CodeMachineError",
    "Decision",
    "Delta",
    "Engine",
    "EngineAuthError",
    "EngineError",
    "EngineExited",
    "EngineNotFound",
    "EngineProtocolError",
    "EngineRateLimited",
    "EngineTimeout",
    "EngineUnavailable",
    "Gate",
    "GatePending",
    "Journal",
    "JournalError",
    "LiveText",
    "MemoryJournal",
    "Module",
    "Parallel",
    "Permission",
    "Permissions",
    "ReplayMismatch",
    "Reply",
    "Run",
    "RunFailed",
    "RunLocked",
    "ScriptedEngine",
    "Separator",
    "SessionStarted",
    "Step",
    "StepView",
    "Tool",
    "ToolCalled",
    "ToolReturned",
    "TransitionError",
    "Turn",
    "TurnDone",
    "Usage",
    "UsageReported",
    "Verdict",
    "Workflow",
    "WorkflowError",
    "agent",
    "current",
    "doctor",
    "keys",
    "module",
    "parallel",
    "permissions",
    "register_engine",
    "resume",
    "runs",
    "separator",
    "step",
    "tool",
]


_LATER = {
    "allowed": ("Permissions", "permissions"),
    "engines.base": (
        "AgentEvent",
        "AgentRequest",
        "Delta",
        "Engine",
        "SessionStarted",
        "ToolCalled",
        "ToolReturned",
        "TurnDone",
        "UsageReported",
        "register_engine",
    ),
    "engines.functions": ("Turn",),
    "engines.scripted": ("Reply", "ScriptedEngine"),
    "events": ("Decision", "Gate", "Usage"),
    "feed": ("LiveText",),
    "journal": ("Journal", "MemoryJournal"),
    "run": ("Run", "current", "resume", "runs"),
    "runstate": ("Attempt",),
    "steps": ("StepView",),
    "team": ("AgentResult",),
}
"""Names of what has to do with runs, by module: most of the package, a database and an event loop, loaded when the
first of them is asked for (PEP 562)."""
_MODULE_OF = {name: module for module, names in _LATER.items() for name in names}


def __getattr__(name: str) -> Any:
    module = _MODULE_OF.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = getattr(import_module(f".{module}", __name__), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def doctor() -> Report:
    """What is here and what is missing: kernel, front end, journal, engines, and how to mend each.

    No model is called and nothing is changed.

    Returns
    -------
    Report
        It shows itself, a line for each finding; ``report.problems`` are those that are in the way, each with a
        ``remedy``.
    """
    from .checkup import examine

    return examine()


def load_ipython_extension(shell: Any) -> None:
    """``%load_ext cm_notebook``."""
    from .jupyter import load

    load(shell)


def unload_ipython_extension(shell: Any) -> None:
    """``%unload_ext cm_notebook``."""
    from .jupyter import unload

    unload(shell)
