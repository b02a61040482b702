"""The engine that calls nobody: it plays a tape, or shows the prompt that would have been sent.

Strategy: one answer, two audiences. Where nobody is there (``strict``) a tape is a test: a turn that it does not hold,
or holds for another prompt, ends the run with ``ReplayMismatch``. Where a person decides, their words may lead
anywhere: the nearest recorded answer is given, and a note says that no model has read them. Nothing is invented,
neither session nor usage. No tool is called: what it had returned is told again. Only agents that were called and
people who were asked are part of the run, and so are called and asked.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable

from ..errors import ReplayMismatch, WorkflowError, typed
from ..events import NOT_CALLED as NOT_CALLED
from ..events import OTHER_WORDS, Usage
from ..tape import Tape, TapedCall, TapedTurn
from ..tools import REFUSED
from ..workflow import Verdict
from .base import (
    AgentEvent,
    AgentRequest,
    Delta,
    SessionStarted,
    ToolCalled,
    ToolReturned,
    TurnDone,
    UsageReported,
)
from .builtin import refusal, use
from .scripted import words

BESIDE = f"recorded answer: {OTHER_WORDS}"
REPEATED = f"recorded answer again, as the tape has none for this attempt: {OTHER_WORDS}"

_WORD_S = 0.02
_TICK_S = 0.01
"""Pieces that are due sooner than this are not waited for."""


class OfflineEngine:
    """Plays recorded answers; without a tape it answers with the prompt.

    Parameters
    ----------
    tape
        A :class:`~cm_notebook.tape.Tape` or its file.
    strict
        Whether what the tape does not hold is an error. For where nobody is there.
    delay
        The longest that a turn takes, in seconds; recorded pauses are shortened in proportion. 0: none at all.
    """

    name = "offline"
    free = True
    about = "no model is called: plays tapes"
    """For ``cm.doctor()``."""

    def __init__(
        self, tape: Tape | str | os.PathLike[str] | None = None, *, strict: bool = False, delay: float = 1.0
    ) -> None:
        self.tape = tape if tape is None or isinstance(tape, Tape) else Tape.read(tape)
        self.strict, self.delay = strict, delay

    async def stream(self, request: AgentRequest) -> AsyncIterator[AgentEvent]:
        """Yield what the tape holds for this turn.

        Raises
        ------
        ReplayMismatch    Strict, and the tape has no answer for this turn, or for another prompt than this.
        EngineError       The recorded turn failed.
        """
        taped, note = self._found(request)
        if taped is None:
            text = unsent(request)
            yield Delta(text)
            yield TurnDone(text, note=note, unsent=True)
            return
        if taped.session_id is not None:
            yield SessionStarted(taped.session_id)
        notes = [taped.note, note]
        asks = request.await_budget if taped.tool_calls else None
        for number, call in enumerate(taped.tool_calls):
            if number and asks is not None and (call.usage is not None or call.cost_usd is not None):
                await asks()  # here the model was called again
            due = _clock()
            for at_s, piece in self._paced(call.said.rstrip() + "\n\n" if call.said else ""):
                await due(at_s)
                yield Delta(piece)
            if call.usage is not None or call.cost_usd is not None:
                yield _reported(call)
            if call.call_id is not None and call.arguments is not None:
                yield ToolCalled(call.call_id, call.name, call.arguments)
            returned, wrong = await _done_again(request, call)
            notes.append(wrong)
            if returned is not None:
                yield returned
        if asks is not None:
            await asks()
        due = _clock()
        for at_s, piece in self._paced(taped.text, taped):
            await due(at_s)
            yield Delta(piece)
        if taped.usage is not None or taped.cost_usd is not None:
            yield _reported(taped)
        if (failure := taped.failure(self.delay)) is not None:
            raise failure
        yield TurnDone(
            taped.text,
            output=taped.output,
            verdict=taped.verdict,
            duration_s=taped.duration_s,
            note=" ".join(filter(None, notes)) or None,
            unpriced=taped.unpriced,
        )

    def _found(self, request: AgentRequest) -> tuple[TapedTurn | None, str | None]:
        """The recorded turn to play, and what is to be said beside it."""
        if self.tape is None:
            return None, NOT_CALLED
        where = (request.path, request.attempt, request.turn)
        taped = self.tape.turn(*where, request.failures)
        if taped is None:
            if self.strict:
                raise ReplayMismatch(self._missing(request))
            taped = self.tape.nearest(*where)
            return taped, NOT_CALLED if taped is None else REPEATED
        difference = taped.prompt.difference(request.prompt, self.tape.text) if taped.prompt is not None else None
        if difference is None:
            return taped, None
        if self.strict:
            raise ReplayMismatch(
                f'The tape has no answer for "{request.path}" with this prompt; it changed here: {difference}. '
                + self._again()
            )
        return taped, BESIDE

    def _missing(self, request: AgentRequest) -> str:
        tape = self.tape
        held = ", ".join(map(str, tape.attempts(request.path))) if tape is not None else ""
        turn = f", turn {request.turn}" if request.turn > 1 else ""
        has = f"it has attempt {held}" if held else "it has none for that step"
        return f'The tape has no answer for "{request.path}", attempt {request.attempt}{turn}; {has}. {self._again()}'

    def _again(self) -> str:
        source = self.tape.source if self.tape is not None else "FILE"
        again = typed(
            f"`%cm run --record {source}`",
            f"`cm-notebook run FILE --record {source}`",
            f"`start(record={source!r})` in place of `tape=`",
        )
        return f"{again} records again; this calls a model."

    def _paced(self, text: str, taped: TapedTurn | None = None) -> list[tuple[float, str]]:
        """The text as it was streamed, in at most `delay` seconds: when each piece is due, and the piece."""
        if self.delay <= 0:
            return [(0.0, text)] if text else []
        if taped is not None and taped.events:
            pieces = taped.pieces()
        else:
            pieces = [(number * _WORD_S, word) for number, word in enumerate(words(text), 1)]
        total_s = pieces[-1][0] if pieces else 0.0
        pace = min(1.0, self.delay / total_s) if total_s else 0.0
        return [(at_s * pace, piece) for at_s, piece in pieces]


def _reported(taped: TapedTurn | TapedCall) -> UsageReported:
    return UsageReported(taped.usage or Usage(), taped.cost_usd, cost_estimated=taped.cost_estimated)


async def _done_again(request: AgentRequest, call: TapedCall) -> tuple[ToolReturned | None, str | None]:
    """What is told of a tool that was called, and what is to be said beside the answer."""
    again, text, failed, wrong = call.again, call.returned, call.failed, None
    if again is not None:
        try:
            text = await use(request, again)
        except WorkflowError as refused:
            text, failed, wrong = str(refused), True, None if call.call_id is not None else str(refused)
    elif call.permission and request.ask_permission is not None:
        permission = await request.ask_permission(call.name, call.given)
        if not permission.allowed and not failed:
            text, failed, wrong = refusal(permission), True, BESIDE
        elif permission.allowed and failed and (call.returned or "").startswith(REFUSED):
            wrong = BESIDE
    if call.call_id is None or text is None:
        return None, wrong
    return ToolReturned(call.call_id, call.name, text, failed), wrong


def _clock() -> Callable[[float], Awaitable[None]]:
    """Waits until that many seconds from now are over."""
    now = asyncio.get_running_loop().time
    start = now()

    async def due(at_s: float) -> None:
        wait_s = start + at_s - now()
        if wait_s > _TICK_S:
            await asyncio.sleep(wait_s)

    return due


def unsent(request: AgentRequest) -> str:
    """What the step shows when no model is called: the prompt, marked as such, and never a verdict."""
    quoted = "\n".join(f"> {line}".rstrip() for line in request.prompt.split("\n"))
    text = f"**Offline: no model was called.** {request.agent.id} would have been sent:\n\n{quoted}"
    if Verdict.from_text(text) is not None:
        # the prompt shows its agent how a verdict looks: that example must not be taken for one
        text += '\n\nNo verdict was given: {"action": null}'
    return text
