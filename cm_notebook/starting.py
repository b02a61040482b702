"""What a run is started with, checked.

Strategy: whatever a run could not use is refused here, in words, before anything happens: no journal is opened and no
folder made for it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Awaitable, Callable, Iterator, Mapping
from typing import Any, Literal

from . import waiting
from .engines.base import Engine, engine_names, find_engine, is_engine
from .errors import CodeMachineError, WorkflowError, did_you_mean
from .events import Action, AnyEvent, Decision, Gate, WorkflowChanged
from .waiting import OnWaiting

_Said = Decision | Action | None
GatePolicy = Literal["approve", "reject", "stop"] | Callable[[Gate], _Said | Awaitable[_Said]]


def check_options(
    *,
    engine: str | Engine | None = None,
    tape: Any = None,
    record: str | os.PathLike[str] | None = None,
    workspace: str | os.PathLike[str] | None = None,
    on_gate: GatePolicy | None = None,
    on_waiting: OnWaiting | None = None,
) -> Any:
    """Refuse what :meth:`Run.start` could not use, before anything happens; returns the tape, read.

    Raises
    ------
    WorkflowError     One of them is none of its kind, the tape cannot be read, or `record` not be written.
    EngineNotFound    There is no engine of that name.
    """
    if engine is not None and not isinstance(engine, str) and not is_engine(engine):
        raise WorkflowError(f"engine={engine!r} is neither a name nor an engine (name, stream).")
    if isinstance(engine, str) and (tape is None or engine.partition(":")[0] not in engine_names()):
        find_engine(engine)  # who plays a tape needs none, not even made
    if workspace is not None and not isinstance(workspace, (str, os.PathLike)):
        raise WorkflowError(f"workspace={workspace!r} is not a folder. Name one, for instance workspace='site'.")
    if on_gate is not None and not isinstance(on_gate, str) and not callable(on_gate):
        raise WorkflowError(f"on_gate={on_gate!r} is not 'approve', 'reject', 'stop' or a function.")
    if isinstance(on_gate, str) and on_gate not in (policies := ("approve", "reject", "stop")):
        raise WorkflowError(f"on_gate={on_gate!r} is not known. {did_you_mean(on_gate, policies, 'Possible')}")
    waiting.checked(on_waiting)
    if tape is not None:
        from .tape import Tape

        tape = tape if isinstance(tape, Tape) else Tape.read(tape)
    if record is not None:
        from .recording import check

        check(record, tape)
    return tape


def checked_limits(**given: Any) -> dict[str, int | float]:
    """Those of the limits that are given, by option.

    Raises
    ------
    WorkflowError    One is not an amount that can be reached.
    """
    found: dict[str, int | float] = {}
    for name, value in given.items():
        if value is None:
            continue
        whole = name != "max_cost_usd"
        fits = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
        if not fits or not 0 < value < float("inf"):
            right = f"a number of {name[4:]} from 1 on" if whole else "an amount of US dollars, such as 0.50"
            raise WorkflowError(f"{name}={value!r} is not {right}.")
        found[name] = value
    return found


def permitting(limits: Mapping[str, Any] | None) -> list[AnyEvent]:
    """The event that says what the run may use from now on, if that is another amount."""
    return [WorkflowChanged(limits=checked_limits(**limits))] if limits else []


def check_places(what: str, number: object) -> None:
    """Refuse what is no number of agents that may work at the same time.

    Raises
    ------
    WorkflowError    It is none.
    """
    if number is not None and (not isinstance(number, int) or isinstance(number, bool) or number < 1):
        raise WorkflowError(f"{what}={number!r} is not a number of agents from 1 on.")


def check_switches(**given: object) -> None:
    """Refuse what is neither ``True`` nor ``False``.

    Raises
    ------
    WorkflowError    One is neither.
    """
    for name, value in given.items():
        if not isinstance(value, bool):
            raise WorkflowError(f"{name}={value!r} is not True or False.")


@contextlib.contextmanager
def making(folder: str | os.PathLike[str], kind: type[CodeMachineError]) -> Iterator[None]:
    """What goes wrong while `folder` is made to work in, as an error of this kind."""
    try:
        yield
    except (OSError, ValueError) as error:
        why = "it is a file" if isinstance(error, FileExistsError) else getattr(error, "strerror", None) or error
        raise kind(
            f"the workspace {os.fspath(folder)!r} cannot be used: {why}. Name a folder that can be made, for instance "
            "workspace='site'."
        ) from error
