"""An agent that says what it was told to say: the double for tests and demonstrations.

Strategy: which reply a turn gets is decided by counting, and the run does the counting (``AgentRequest.ordinal``), from
its events: a turn that ended, by an answer or an error, has used up its reply; one that was cut short has not. So a run
that is resumed, by a new engine in a new process, goes on in the script where it was.

A reply with tool calls is not the end of its turn: when they are answered, the turn goes on with the next reply. So the
replies of a turn are those up to the first one without.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import ReplayMismatch, WorkflowError, by_name, did_you_mean
from ..events import Usage
from ..plain import Plain
from ..team import ToolCall
from ..workflow import Verdict
from .base import AgentEvent, AgentRequest, Delta, SessionStarted, TurnDone, UsageReported, misfit
from .builtin import use


@by_name("cm.Reply")
@dataclass(slots=True, eq=False, repr=False)
class Reply(Plain):
    """What a scripted agent does in one turn.

    Attributes
    ----------
    text
        The answer. Left out, it is what `deltas` add up to, or the verdict's reason.
    deltas
        The pieces in which it is streamed; ``None``: word by word.
    usage, cost_usd
        What is reported as used.
    delay_s
        Seconds that the turn takes, spread over the pieces.
    error
        Raised at the end, after the pieces, instead of an answer.
    session_id
        The conversation that the agent says it has begun.
    verdict, output
        As an engine may give them beside the text.
    tool_calls
        What the agent asks of its run after this text: ``{"name": "run_agents", "arguments": {"groups": […]}}`` (or
        ``{"script": "a 'x' & b 'y'"}``), ``{"name": "ask_human", "arguments": {"question": "…"}}``. When they are
        answered the turn goes on with the next reply, and the last one is the answer.
    """

    text: str = ""
    deltas: Sequence[str] | None = None
    usage: Usage | None = None
    cost_usd: float | None = None
    delay_s: float = 0.0
    error: Exception | None = None
    session_id: str | None = None
    verdict: Verdict | None = None
    output: Any = None
    tool_calls: Sequence[ToolCall | Mapping[str, Any]] = ()

    def __post_init__(self) -> None:
        if (wrong := misfit(self)) is not None:
            raise WorkflowError(f"cm.Reply: {wrong}.")
        if not (self.error is None or isinstance(self.error, Exception)):
            raise WorkflowError(f"cm.Reply: error={self.error!r}, which is not an exception.")
        if not (self.deltas is None or _listed(self.deltas, str)):
            raise WorkflowError(f"cm.Reply: deltas={self.deltas!r}, which is not a list of texts.")
        calls = self.tool_calls
        if not _listed(calls, (ToolCall, Mapping)):
            raise WorkflowError(f"cm.Reply: tool_calls={calls!r}, which is not a list of calls: tool_calls=[{{…}}].")
        self.tool_calls = tuple(call if isinstance(call, ToolCall) else ToolCall(**dict(call)) for call in calls)
        whole = "".join(self.deltas) if self.deltas is not None else self.verdict.reason if self.verdict else ""
        if not self.text:
            self.text = whole
        elif self.deltas is not None and whole != self.text:
            raise WorkflowError(f"reply {self.text[:40]!r}: its deltas make {whole[:40]!r}. Leave one of them out.")


def _listed(value: Any, kinds: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(one, kinds) for one in value)


class ScriptedEngine:
    """Gives the n-th turn of an agent its n-th reply.

    Parameters
    ----------
    script
        The replies of each agent, in order; plain text is a reply.

    Notes
    -----
    Turns are counted per agent, over all its steps, attempts, chained prompts and automatic retries, across a resume; a
    turn that was cut short gets the same reply again. Where the request does not say which turn it is (``ordinal`` is
    0, outside a run), the engine counts by the same rule.

    Examples
    --------
    >>> engine = ScriptedEngine({
    ...     "planner": ["1. Write it.", "1. Write it. 2. Test it."],
    ...     "reviewer": [Reply(error=EngineRateLimited("busy")), '{"action": "continue"}'],
    ... })
    """

    name = "scripted"
    free = True

    def __init__(self, script: Mapping[str, str | Reply | Iterable[str | Reply]]) -> None:
        if not isinstance(script, Mapping):
            raise WorkflowError(
                f"cm.ScriptedEngine: {script!r} is not a dict of agents and their replies, for instance "
                "{'planner': ['1. Write it.']}."
            )
        self.script = {agent: _turns(_replies(agent, said)) for agent, said in script.items()}
        self._ended: dict[str, int] = {}

    async def stream(self, request: AgentRequest) -> AsyncIterator[AgentEvent]:
        """Yield the reply whose turn it is.

        Raises
        ------
        ReplayMismatch    The script has no reply for this turn.
        Exception         The reply's ``error``.
        """
        agent = request.agent.id
        number = request.ordinal or self._ended.get(agent, 0) + 1
        replies = self._turn(agent, number)
        if replies[0].session_id is not None:
            yield SessionStarted(replies[0].session_id)
        spent, cost_usd, wrong = None, None, list[str]()
        for reply in replies:
            pieces = words(reply.text) if reply.deltas is None else reply.deltas
            pause_s = reply.delay_s / max(1, len(pieces))
            for piece in pieces or ("",):
                if pause_s:
                    await asyncio.sleep(pause_s)
                if piece:
                    yield Delta(piece)
            if reply.usage is not None:
                spent = reply.usage if spent is None else spent + reply.usage
            if reply.cost_usd is not None:
                cost_usd = (cost_usd or 0.0) + reply.cost_usd
            if spent is not None or cost_usd is not None:
                yield UsageReported(spent or Usage(), cost_usd)
            wrong += await use_tools(request, reply.tool_calls)
            if reply is not replies[-1] and request.await_budget is not None:
                await request.await_budget()
        self._ended[agent] = number
        if reply.error is not None:
            raise reply.error
        if reply.tool_calls:
            raise ReplayMismatch(
                f"turn {number} of agent {agent!r} ends with a tool call. Add the reply with which it goes on to "
                f"ScriptedEngine({{{agent!r}: […]}})."
            )
        yield TurnDone(reply.text, output=reply.output, verdict=reply.verdict, note=" ".join(wrong) or None)

    def _turn(self, agent: str, number: int) -> list[Reply]:
        if agent not in self.script:
            known = did_you_mean(agent, self.script, "In the script")
            raise ReplayMismatch(f"the script has no replies for agent {agent!r} (turn {number}). {known}")
        turns = self.script[agent]
        if number > len(turns):
            raise ReplayMismatch(
                f"the script has no reply for turn {number} of agent {agent!r}; it has {len(turns)}. "
                f"Add one to ScriptedEngine({{{agent!r}: […]}})."
            )
        return turns[number - 1]


def _turns(replies: Iterable[Reply]) -> list[list[Reply]]:
    """The replies of each turn."""
    turns: list[list[Reply]] = []
    goes_on = False
    for reply in replies:
        if goes_on:
            turns[-1].append(reply)
        else:
            turns.append([reply])
        goes_on = bool(reply.tool_calls) and reply.error is None
    return turns


async def use_tools(request: AgentRequest, calls: Iterable[ToolCall | Any]) -> list[str]:
    """Have `calls` (of :class:`~cm_notebook.team.ToolCall`) done, one after the other; returns what was refused."""
    wrong = []
    for call in calls:
        try:
            await use(request, call)
        except WorkflowError as refused:
            wrong.append(str(refused))
    return wrong


def _replies(agent: str, said: str | Reply | Iterable[str | Reply]) -> list[Reply]:
    if not isinstance(said, Iterable) and not isinstance(said, Reply):
        raise WorkflowError(
            f"script of {agent!r}: {said!r} is not a list of replies. Write for instance ['1. Write it.']."
        )
    listed = [said] if isinstance(said, (str, Reply)) else list(said)
    for number, reply in enumerate(listed, 1):
        if not isinstance(reply, (str, Reply)):
            raise WorkflowError(f"script of {agent!r}, reply {number}: {reply!r} is neither text nor a cm.Reply.")
    return [reply if isinstance(reply, Reply) else Reply(reply) for reply in listed]


def words(text: str) -> list[str]:
    """`text` in pieces of one word each, with the blanks that follow it."""
    return re.findall(r"\S+\s*|\s+", text)
