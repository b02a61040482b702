"""Everything that can go wrong, in one tree.

Strategy: whoever catches ``CodeMachineError`` has caught all that the project raises on purpose; anything else that
surfaces is a bug of ours. A message is one line: what happened (with the value), where, what to do.

    CodeMachineError
    ├─ WorkflowError         the workflow as written is wrong; raised before anything ran
    ├─ EngineError           an agent's turn failed            .engine .step .attempt .retry_after_s
    │  ├─ EngineNotFound     no engine, program or model of that name
    │  ├─ EngineAuthError    no key, or a key that was refused
    │  ├─ EngineRateLimited  try again later (the only kind retried unasked, with EngineUnavailable)
    │  ├─ EngineUnavailable  overload or a dropped connection
    │  ├─ EngineTimeout      the turn did not end in time
    │  ├─ EngineExited       a program ended badly           .exit_code .stderr_tail
    │  └─ EngineProtocolError  an answer we cannot read      .line
    ├─ JournalError          the journal cannot be read or written   .path
    │  └─ RunLocked          another process drives this run
    ├─ TransitionError       not legal now; nothing was changed
    │  └─ AlreadyDecided     that gate has its answer
    ├─ GatePending           the result waits for a decision  .gate
    ├─ RunFailed             the run ended without success    .run_id
    └─ ReplayMismatch        a tape was recorded for another prompt
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

_Callable = TypeVar("_Callable", bound=Callable[..., Any])


class CodeMachineError(Exception):
    """Root of every error raised on purpose by this package."""


class WorkflowError(CodeMachineError):
    """The workflow, an agent or a step as written is wrong. Raised before any I/O."""


class EngineError(CodeMachineError):
    """An agent's turn failed.

    Attributes
    ----------
    engine, step : str or None
        Who was at work, when known.
    attempt : int or None
        Which attempt, counted from 1.
    detail : str or None
        More to read, folded in a view: a traceback, the end of stderr.
    retry_after_s : float or None
        Seconds the service asked us to wait.
    """

    retryable = False
    """Whether trying again unasked may help."""
    duration_s: float | None = None
    """Seconds that the turn took, where they were not measured now (a tape)."""

    def __init__(
        self,
        message: str,
        *,
        engine: str | None = None,
        step: str | None = None,
        attempt: int | None = None,
        detail: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.engine, self.step, self.attempt = engine, step, attempt
        self.detail, self.retry_after_s = detail, retry_after_s


class EngineNotFound(EngineError):
    """There is no engine, program or model of that name."""


class EngineAuthError(EngineError):
    """There is no key, or it was refused."""


class EngineRateLimited(EngineError):
    """The service asks for patience."""

    retryable = True


class EngineUnavailable(EngineError):
    """The service is overloaded, or the connection was dropped."""

    retryable = True


class EngineTimeout(EngineError):
    """The turn did not end within its time. Time spent waiting for a person is not counted."""


class EngineExited(EngineError):
    """The agent's program ended badly: ``exit_code``, ``stderr_tail``."""

    def __init__(self, message: str, *, exit_code: int | None = None, stderr_tail: str = "", **where: Any) -> None:
        super().__init__(message, detail=stderr_tail or None, **where)
        self.exit_code, self.stderr_tail = exit_code, stderr_tail


class EngineProtocolError(EngineError):
    """The agent answered something that cannot be read; ``line`` is what it said."""

    def __init__(self, message: str, *, line: str | None = None, **where: Any) -> None:
        super().__init__(message, **where)
        self.line = line


class JournalError(CodeMachineError):
    """The journal at ``path`` cannot be read or written. Nothing in it was changed."""

    def __init__(self, message: str, *, path: str | None = None) -> None:
        super().__init__(message)
        self.path = path


class JournalBusy(JournalError):
    """Another program is writing to the journal; in a moment it may be free."""


class RunLocked(JournalError):
    """Another process drives this run; it can still be read and decided."""


class TransitionError(CodeMachineError):
    """The event or decision is not legal in the present state; nothing was changed."""


class AlreadyDecided(TransitionError):
    """The gate has its answer already, or is gone; the second one changed nothing."""


class GatePending(CodeMachineError):
    """The result asked for waits for a decision at ``gate``, or (None) for ``step``, which has not run yet."""

    show: Callable[[GatePending], list[str]] | None = None
    """Set by the notebook: shows the gate's bar again and gives the lines that stand for a traceback."""

    def __init__(self, message: str, *, gate: Any = None, run: Any = None, step: str | None = None) -> None:
        super().__init__(message)
        self.gate, self.run, self.step = gate, run, step

    def _render_traceback_(self) -> list[str]:
        """IPython's hook: one sentence instead of a traceback."""
        show = type(self).show
        return show(self) if show is not None else [str(self)]


class RunFailed(CodeMachineError):
    """The run ended without success; the message is the reason."""

    def __init__(self, message: str, *, run_id: str | None = None) -> None:
        super().__init__(message)
        self.run_id = run_id


class ReplayMismatch(CodeMachineError):
    """The tape has no answer for this turn, or was recorded for another prompt."""


def by_name(shown: str, *more: str) -> Callable[[_Callable], _Callable]:
    """Decorator: a call that does not fit is refused in one line, with what was meant, instead of a ``TypeError``.

    Parameters
    ----------
    shown
        How people write the call: ``cm.step``.
    *more
        Options that the function passes on in its ``**options``.

    Raises
    ------
    WorkflowError    An option is not known, or one is missing.
    """

    def decorate(function: _Callable) -> _Callable:
        if isinstance(function, type):  # a class: its calls are those of its __init__
            made: Any = function
            made.__init__ = decorate(made.__init__)
            return function
        signature = inspect.signature(function)
        kinds = {name: one.kind for name, one in signature.parameters.items() if name not in ("self", "cls")}
        plain = [name for name, kind in kinds.items() if kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
        known = [*plain, *(name for name, kind in kinds.items() if kind is inspect.Parameter.KEYWORD_ONLY), *more]
        any_other = inspect.Parameter.VAR_KEYWORD in kinds.values() and not more
        usage = f"{shown}({', '.join([*plain, 'option=…'])})"

        @functools.wraps(function)
        def call(*args: Any, **given: Any) -> Any:
            for name in given:
                if name not in known and not any_other:
                    raise WorkflowError(f"{shown}: there is no option {name!r}. {did_you_mean(name, known, 'Options')}")
            try:
                return function(*args, **given)
            except TypeError:
                try:
                    signature.bind(*args, **given)
                except TypeError as misfit:
                    raise WorkflowError(f"{shown}: {misfit}. Write {usage}.") from None
                raise

        return call  # type: ignore[return-value]

    return decorate


has_magic = False
"""Set by the notebook: whoever reads what is said can type ``%cm``."""
_in_terminal = False


@contextlib.contextmanager
def in_terminal() -> Iterator[None]:
    """Whoever reads what is said meanwhile sits at a terminal, and types commands there."""
    global _in_terminal
    before, _in_terminal = _in_terminal, True
    try:
        yield
    finally:
        _in_terminal = before


def typed(magic: str, command: str, call: str | None = None) -> str:
    """What to type where the reader is: the magic, in a terminal the command, in a program (a test, too) the call."""
    if _in_terminal:
        return command
    return magic if has_magic or call is None else call


def brief(value: object) -> str:
    """What was given, for a message: on one line and not long, whatever it is."""
    try:
        said = " ".join(repr(value).split())
    except Exception:
        said = f"a {type(value).__name__}"
    return said if len(said) <= 120 else f"{said[:80]}…{said[-30:]}"


def did_you_mean(wrong: object, known: Iterable[str], label: str = "Known") -> str:
    """The end of an error message: the nearest valid name, and all of them.

    Parameters
    ----------
    wrong
        What was written; of whatever kind it is.
    known
        What would have been right, in the order to show.
    label
        The word before the list.

    Returns
    -------
    str
        ``"Did you mean 'planner'? Known: planner, reviewer."``
    """
    names = list(known)
    listed = ", ".join(names[:40]) + (f" and {len(names) - 40} more" if len(names) > 40 else "")
    return f"{nearest(wrong, names)}{label}: {listed or '(none)'}."


def nearest(wrong: object, names: Sequence[str]) -> str:
    """``"Did you mean 'planner'? "``, or nothing where no name is like it."""
    import difflib  # only for who makes a mistake

    near = difflib.get_close_matches(str(wrong), names, n=3, cutoff=0.6)
    near.sort(key=lambda name: sorted(name) != sorted(str(wrong)))  # two letters changed places: "stpe" is no "stop"
    near = near or [name for name in names if wrong and name.startswith(f"{wrong}-")]
    return f"Did you mean {near[0]!r}? " if near else ""
