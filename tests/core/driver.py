"""The oracle: runs a workflow on ``RunState`` with scripted agents and decisions, without I/O or a clock.

Every event goes through the journal's JSON before it is applied, gets the next ``seq`` and the next second, and is
held to the table of transitions: a step may only become what ``TRANSITIONS`` says, and a step that an event is not
about only what ``SWEPT`` says.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cm_notebook.events import (
    AnyEvent,
    Decision,
    ErrorInfo,
    Gate,
    GateDecided,
    RunResumed,
    RunStarted,
    RunUnpaused,
    StepAdded,
    TurnFailed,
    TurnFinished,
    TurnStarted,
    Usage,
    UsageReported,
    body,
    read,
)
from cm_notebook.prompts import digest, text_of
from cm_notebook.rules.transitions import SWEPT, TRANSITIONS
from cm_notebook.runstate import Record, RunState, StartTurn, StepState
from cm_notebook.state import (
    apply,
    ask,
    ask_for_more,
    ask_permission,
    call_agents,
    cut_all,
    next_actions,
    used_up,
)
from cm_notebook.team import checked_calls
from cm_notebook.workflow import AnyStep, Module, Verdict, Workflow


@dataclass
class Reply:
    """What a turn comes to. ``calls``: whom it calls first; ``tools``: for which it asks permission then; ``ask``:
    questions it asks then; ``spends``: what it says then that it has used, before each call of its model but the first;
    ``error``: it fails."""

    text: str = ""
    verdict: Verdict | None = None
    output: Any = None
    ask: tuple[str, ...] = ()
    error: str | None = None
    retry_in_s: float | None = None
    session: str | None = None
    calls: tuple[str, ...] = ()
    tools: tuple[str, ...] = ()
    usage: Usage | None = None
    cost_usd: float | None = None
    spends: tuple[float, ...] = ()


Script = Mapping[str, Sequence[str | Reply]] | Callable[["Driver", StepState], str | Reply]
Policy = Callable[["Driver", Gate], Decision | None]


def loop(reason: str = "again") -> Reply:
    return Reply(reason, Verdict(action="loop", reason=reason))


def go_on(text: str = "good") -> Reply:
    return Reply(text, Verdict(action="continue"))


def said(action: Any, reason: str = "") -> Reply:
    return Reply(action, Verdict(action=action, reason=reason))


def approve(driver: Driver, gate: Gate) -> Decision:
    """The policy that says yes to whatever can be approved, tries what failed again, and answers "yes"."""
    if "approve" in gate.actions:
        return Decision(action="approve")
    return Decision(action="retry") if "retry" in gate.actions else Decision(action="answer", feedback="yes")


class Driver:
    """A run. ``events`` is what happened; ``opened`` the gates, as ``(kind, step, attempt, turn)``.

    A script is the replies of each agent, in order; past its end, and without one, the agent says ``"<step> <n>"``, a
    module ``continue``. How many replies an agent has given is read from the events, so a run that was cut anywhere and
    goes on gets the same ones.
    """

    def __init__(
        self,
        workflow: Workflow | None = None,
        script: Script | None = None,
        *,
        policy: Policy | None = None,
        events: Iterable[AnyEvent] = (),
        **started: Any,
    ) -> None:
        self.script: Script = {} if script is None else script
        self.policy = policy
        self.state = RunState()
        self.events: list[AnyEvent] = []
        self.opened: list[tuple[str, str, int, int]] = []
        self.unasked = 0
        for event in events:
            self.record(event)
        if workflow is not None:
            self.record(RunStarted(run_id="r", workflow=workflow.to_dict(), **started))

    # -- facts

    def record(self, event: AnyEvent) -> AnyEvent:
        """Write `event` down as the journal would; nothing is kept of one that is refused."""
        seq = len(self.events) + 1
        kind = type(event).__name__
        kept = read(kind, seq, 1000.0 + seq, body(event))
        subject = self._subject(kept)
        everybody = {**self.state.steps, **self.state.members}
        before = {path: step.status for path, step in everybody.items()}
        undecided = [step for step in everybody.values() if step.status in ("due", "waiting")]
        apply(self.state, kept)
        self.events.append(kept)
        for step in undecided:
            decided = kind == "GateDecided" and step.path == subject
            assert decided or not step.settled, f"{step.path} went past its gate by {kind}"
        for id, was in before.items():
            now = everybody[id].status
            if id == subject and kind != "StepChanged":
                assert now in TRANSITIONS[was].get(kind, ()), f"{id}: {was} -> {now} by {kind} is not in TRANSITIONS"
            elif now != was:
                assert now in SWEPT.get(kind, {}).get(was, ()), f"{id}: {was} -> {now} by {kind} is not in SWEPT"
        if kept.type == "GateOpened":
            step = self.state.find(kept.gate.path)
            self.opened.append((kept.gate.kind, step.id, kept.gate.attempt, step.turn))
        return kept

    def _subject(self, event: AnyEvent) -> str | None:
        if event.type == "GateOpened":
            return event.gate.path
        if event.type == "GateDecided":
            gate = self.state.gates.get(event.gate_id)
            return gate.path if gate is not None else None
        if event.type in ("LoopedBack", "Rewound"):
            return event.module if event.type == "LoopedBack" else event.to
        return getattr(event, "path", None)

    def refused(self, event: AnyEvent, error: type[Exception]) -> str:
        """The message with which `event` is refused; the state is as deeply the same as before."""
        before = copy.deepcopy(self.state)
        try:
            apply(self.state, read(type(event).__name__, len(self.events) + 1, 0.0, body(event)))
        except error as refusal:
            assert self.state == before, f"{type(event).__name__} was refused and left something behind"
            return str(refusal)
        raise AssertionError(f"{event!r} was not refused")

    # -- driving

    def go(self) -> Driver:
        """Go on until only somebody outside can."""
        for _ in range(2000):
            if not self.advance():
                return self
        raise AssertionError("the run does not come to rest")

    def advance(self) -> bool:
        """Do one thing: what follows from the state, else the end of a turn, else a decision of the policy."""
        actions = next_actions(self.state)
        assert actions == next_actions(self.state), "looking changes nothing"
        deadlines = [one for one in actions if isinstance(one, Record) and one.not_before is not None]
        actions = [one for one in actions if one not in deadlines]
        self.unasked = self.unasked + 1 if actions else 0
        assert self.unasked <= 3 * len(self.state.order) + 3, "too much happens without anyone's doing"
        for action in actions:
            if isinstance(action, Record):
                self.record(action.event)
            else:
                self.begin(action)
        if actions:
            return True
        turns = self.state.running.values()
        running = next((step for step in turns if step.status == "running" and not self.held(step)), None)
        if running is not None:
            self.end(running)
            return True
        for gate in list(self.state.gates.values()):
            decision = self.policy(self, gate) if self.policy is not None else None
            if decision is not None:
                self.record(GateDecided(gate_id=gate.id, decision=decision))
                return True
        if deadlines:  # nobody has decided: time passes
            self.record(min(deadlines, key=lambda one: one.not_before or 0.0).event)
        return bool(deadlines)

    def until_running(self, step: str) -> Driver:
        """Go on until the turn of `step` runs."""
        for _ in range(500):
            if self.state.steps[step].path in self.state.running:
                return self
            assert self.advance(), f"{step} never runs"
        raise AssertionError(f"{step} never runs")

    def begin(self, action: StartTurn) -> None:
        step = action.step
        whole = text_of(action.prompt + (action.context or ()), self.state.texts)
        self.record(
            TurnStarted(
                step=step.id,
                path=step.path,
                attempt=action.attempt,
                turn=action.turn,
                iteration=step.iteration,
                prompt=action.prompt,
                context=action.context,
                digest=digest(whole),
                session_id=action.session_id,
                engine="scripted",
            )
        )

    def said_by(self, agent: str) -> int:
        """How many turns of `agent` have come to an end, good or bad."""
        mine = {
            step.id for step in (*self.state.steps.values(), *self.state.members.values()) if step.step.agent == agent
        }
        return sum(event.type in ("TurnFinished", "TurnFailed") and event.step in mine for event in self.events)

    def reply(self, step: StepState) -> Reply:
        if callable(self.script):
            found = self.script(self, step)
        else:
            n = self.said_by(step.step.agent)
            replies = self.script.get(step.step.agent, ())
            found = replies[n] if n < len(replies) else f"{step.id} {n + 1}"
        reply = found if isinstance(found, Reply) else Reply(found)
        if isinstance(step.step, Module) and reply.verdict is None and not callable(self.script):
            known = step.step.agent in self.script and self.said_by(step.step.agent) < len(self.script[step.step.agent])
            reply.verdict = Verdict.from_text(reply.text) if known else Verdict(action="continue")
        return reply

    def end(self, step: StepState, reply: Reply | None = None) -> None:
        """The turn asks its next question, or ends."""
        reply = self.reply(step) if reply is None else reply
        where: dict[str, Any] = {"step": step.id, "path": step.path, "attempt": step.attempt, "turn": step.turn}
        if (calls := self.count(step, "AgentsCalled")) < len(reply.calls):
            groups = checked_calls(reply.calls[calls], self.state.sub_agents)
            self.record(call_agents(self.state, step, groups, {}))
            return
        if (asked := self.count(step, "permission")) < len(reply.tools):
            self.record(ask_permission(self.state, step, (reply.tools[asked], ""), {"path": "x"}))
            return
        said_so_far = self.count(step, "UsageReported")
        if said_so_far and (asks := ask_for_more(self.state, step)):
            self.record(asks[0])
            return
        if said_so_far < len(reply.spends):
            self.record(UsageReported(**where, cost_usd=reply.spends[said_so_far]))
            return
        used: dict[str, Any] = {"usage": reply.usage, "cost_usd": reply.cost_usd}
        known = {question for question, _ in [*step.resent, *step.answers]}
        for question in reply.ask:
            if question not in known:
                self.record(ask(self.state, step, question))
                return
        if reply.error is not None:
            error = ErrorInfo(kind="EngineError", message=reply.error)
            self.record(TurnFailed(**where, error=error, retry_in_s=reply.retry_in_s, **used))
            return
        said = {"verdict": reply.verdict, "output": reply.output, "session_id": reply.session}
        self.record(TurnFinished(**where, text=reply.text, **said, **used))

    def held(self, step: StepState) -> bool:
        """Whether the turn of `step` waits for a budget about which somebody is asked."""
        asked = self.state.held is not None and self.count(step, "UsageReported")
        return bool(asked) and used_up(self.state, step) is not None

    def count(self, step: StepState, what: str) -> int:
        """How many events of that type, or gates of that kind, the present turn of `step` has."""
        count = 0
        for event in reversed(self.events):
            if event.type == "GateOpened":
                count += event.gate.path == step.path and event.gate.kind == what
            elif getattr(event, "path", "") == step.path:
                if event.type == "TurnStarted":
                    break
                count += event.type == what
        return count

    # -- what people do

    def gate(self, step: str | None = None) -> Gate:
        gates = [gate for gate in self.state.gates.values() if step in (None, gate.step, gate.path)]
        assert len(gates) == 1, f"{len(gates)} gates are open: {list(self.state.gates)}"
        return gates[0]

    def decide(self, action: Any, feedback: str | None = None, *, step: str | None = None, **more: Any) -> Driver:
        """Answer the one open gate (of `step`), and go on."""
        decision = Decision(action=action, feedback=feedback, **more)
        self.record(GateDecided(gate_id=self.gate(step).id, decision=decision))
        return self.go()

    def add(self, item: AnyStep, after: str | None = None, **more: Any) -> Driver:
        data = {"kind": item.kind, **item.model_dump(mode="json", exclude_defaults=True)}
        self.record(StepAdded(step=data, after=after, fingerprint="f", **more))
        return self

    def cut(self, reason: str = "its process died") -> Driver:
        """What whoever resumes writes down: the turns that ran are over, and the run goes on."""
        for event in cut_all(self.state, reason):
            self.record(event)
        self.record(RunResumed())
        return self

    def unpause(self, until: str | None = None) -> Driver:
        self.record(RunUnpaused(until=until))
        return self.go()

    # -- what came out

    def prompt(self, step: str, attempt: int = -1) -> str:
        """The prompt of an attempt of `step`: the last one, or the n-th."""
        attempts = self.state.steps[step].attempts
        return attempts[attempt if attempt < 0 else attempt - 1].prompt

    def text(self, step: str) -> str:
        return self.state.text(self.state.steps[step].approved)

    def texts(self) -> dict[str, str]:
        """The approved texts of all steps."""
        return {id: self.text(id) for id in self.state.steps}

    def statuses(self) -> dict[str, str]:
        return {id: step.status for id, step in self.state.steps.items()}

    def turns(self) -> list[str]:
        """The steps that ran, in order."""
        return [event.step for event in self.events if event.type == "TurnStarted"]

    def kinds(self) -> list[str]:
        return [event.type for event in self.events]


def folded(events: Iterable[AnyEvent]) -> RunState:
    """The state that `events` make, read from their JSON."""
    state = RunState()
    for event in events:
        apply(state, read(type(event).__name__, event.seq, event.at, body(event)))
    return state
