"""What is run while it is killed: workflows drawn by a seed, and what a person does in them.

Strategy: a plan is a pure function of its seed. What its agents answer follows from the prompt alone, and what people
decide from what they are shown, so a plan comes to the same end however often it is killed on the way: that of a run
that nobody kills. Every agent writes down outside, on disk, that it began and that it ended (``Ledger``): that is what
really ran, whatever the journal says.
"""

from __future__ import annotations

import asyncio
import functools
import json
import os
import random
import time
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cm_notebook as cm
from cm_notebook.engines.base import AgentEvent, AgentRequest, SessionStarted, ToolCalled, ToolReturned, UsageReported
from cm_notebook.prompts import digest
from cm_notebook.state import RunState
from tests.crash.points import Passed


class Ledger:
    """Lines of JSON, each on disk before anything goes on; what is in it is known whoever dies."""

    def __init__(self, path: Path, passed: Passed | None = None) -> None:
        self.path, self.passed = path, passed or Passed()
        self._file = os.open(path, os.O_APPEND | os.O_CREAT | os.O_WRONLY, 0o600)

    def note(self, what: str, **more: Any) -> None:
        """Write one line down."""
        self.passed("ledger")
        os.write(self._file, json.dumps({"what": what, **more}).encode() + b"\n")
        os.fsync(self._file)
        self.passed("ledger")

    def lines(self, *what: str) -> list[dict[str, Any]]:
        """What was written, of those kinds, by whichever process."""
        return [line for line in read_lines(self.path) if line["what"] in what]


def read_lines(path: Path) -> list[dict[str, Any]]:
    """All that a ledger holds."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@dataclass
class Deed:
    """What the driver's own person does besides deciding: while the gate of `step` is open, until `event` is there."""

    step: str
    event: str
    do: Callable[[cm.Run], Any]


@dataclass
class Plan:
    """A workflow to be run, and how. It is made once; each life gives it its own ``ledger``."""

    seed: str
    agents: list[cm.Agent] = field(default_factory=list)
    steps: list[Any] = field(default_factory=list)
    called: list[str] = field(default_factory=list)
    answers: dict[str, str] = field(default_factory=dict)
    """What is decided, by path; ``path!``: at its gate ``may_have_run``."""
    deeds: list[Deed] = field(default_factory=list)
    fails: dict[str, int] = field(default_factory=dict)
    """How often the turn of a path is refused by the engine before it is done."""
    deciders: int = 0
    """Processes that decide; 0: the one that drives."""
    headless: bool = False
    on_waiting: Callable[[cm.Gate], Any] | None = None
    max_turns: int | None = None
    max_tokens: int | None = None
    last: str = ""
    ledger: Ledger = field(default_factory=lambda: Ledger(Path(os.devnull)))

    @functools.cached_property
    def workflow(self) -> cm.Workflow:
        """The workflow; the same in each life."""
        return cm.Workflow(
            f"plan {self.seed}",
            steps=self.steps,
            agents=self.agents,
            sub_agents=self.called,
            inputs={"goal": "a todo CLI", "colour": "red"},
            max_turns=self.max_turns,
            max_tokens=self.max_tokens,
        )

    def engine(self) -> cm.Engine:
        """Does what is no function."""
        return LedgerEngine(self)

    def answer(self, state: RunState, gate: cm.Gate) -> cm.Decision:
        """What is decided there, whoever is asked, and whenever."""
        if gate.kind == "question":
            return cm.Decision(action="answer", feedback="8080")
        if gate.kind == "may_have_run":
            return cm.Decision(action=self.answers.get(f"{gate.path}!", "retry"))  # type: ignore[arg-type]
        if gate.kind in ("failed", "stale"):
            return cm.Decision(action="retry")
        wanted = self.answers.get(gate.path, "approve")
        if gate.kind == "start":
            edited = f"edited prompt of {gate.path}" if wanted == "edit" else None
            return cm.Decision(action="approve", output=edited)
        if gate.kind == "review":
            if wanted == "reject" and not rejected(state, gate.path):
                return cm.Decision(action="reject", feedback="once more")
            if wanted == "edit":
                return cm.Decision(action="approve", output=f"edited text of {gate.path}")
            if wanted == "skip":
                return cm.Decision(action="skip")
        return cm.Decision(action="approve")

    def policy(self, gate: cm.Gate) -> cm.Decision | None:
        """The same where nobody is there; an agent that was called and failed is given up."""
        if gate.kind == "failed" and "/" in gate.path:
            return None
        return self.answer(RunState(), gate)

    def prompt(self, name: str) -> str:
        """A template that names what was approved before."""
        return f"{name}: on {{{{ {self.last} }}}}." if self.last else f"{name}: begin with {{{{ goal }}}}."

    def add(self, name: str, item: Any, *agents: cm.Agent) -> None:
        """One more step, whose output the next one names."""
        self.steps.append(item)
        self.agents += agents
        self.last = name


def rejected(state: RunState, path: str) -> bool:
    """Whether an attempt of that step has been rejected."""
    attempts = state.find(path).attempts
    return any(one.decision is not None and one.decision.action == "reject" for one in attempts)


# -- agents -----------------------------------------------------------------------------------------------------------


def said(name: str, prompt: str) -> str:
    """What an agent answers: so much of its prompt that a single other letter shows in all that follows."""
    return f"{name} made {digest(prompt)[:12]}"


def worker(plan: Plan, name: str, *, sync: bool = False, asks: bool = False, breaks: int = 0) -> cm.Agent:
    """A function; it ``asks`` a person, and the first so many times it raises."""

    def begin(turn: cm.Turn) -> dict[str, Any]:
        about = {"path": turn.path, "attempt": turn.attempt, "digest": digest(turn.prompt)}
        plan.ledger.note("begin", **about)
        if sum(line["path"] == turn.path for line in plan.ledger.lines("failed")) < breaks:
            plan.ledger.note("failed", **about)
            raise cm.EngineError("no such file")  # without a traceback, which would name this machine
        return about

    def end(turn: cm.Turn, about: dict[str, Any], heard: str) -> str:
        text = said(name, turn.prompt) + heard
        plan.ledger.note("end", **about, text=text)
        return text

    if sync:

        @cm.agent(name)
        def work(turn: cm.Turn) -> str:
            about = begin(turn)
            heard = f", port {turn.ask_human('Which port?')}" if asks else ""
            time.sleep(0.001)
            return end(turn, about, heard)

    else:

        @cm.agent(name)
        async def work(turn: cm.Turn) -> str:
            about = begin(turn)
            heard = f", port {await turn.ask_human('Which port?')}" if asks else ""
            await asyncio.sleep(0.001)
            return end(turn, about, heard)

    return work


def writer(plan: Plan, name: str, file: str) -> cm.Agent:
    """A function that writes a file, which holds what it answers."""

    @cm.agent(name)
    def write(turn: cm.Turn) -> str:
        about = {"path": turn.path, "attempt": turn.attempt, "digest": digest(turn.prompt)}
        plan.ledger.note("begin", **about)
        text = said(name, turn.prompt)
        (turn.workspace / file).write_text(f"{text}\n")
        plan.ledger.note("end", **about, text=text)
        return text

    return write


def caller(plan: Plan, name: str, asked: str) -> cm.Agent:
    """A function that calls others, and says what came of it."""

    @cm.agent(name)
    async def lead(turn: cm.Turn) -> str:
        about = {"path": turn.path, "attempt": turn.attempt, "digest": digest(turn.prompt)}
        plan.ledger.note("begin", **about)
        results = await turn.run_agents(asked)
        text = said(name, turn.prompt) + "".join(f"; {one.agent}: {one.error or one.text}" for one in results)
        plan.ledger.note("end", **about, text=text)
        return text

    return lead


def judge(plan: Plan, name: str, loops: int) -> cm.Agent:
    """A function that sends the run back so many times."""

    @cm.agent(name)
    async def verdict(turn: cm.Turn) -> cm.Verdict:
        about = {"path": turn.path, "attempt": turn.attempt, "digest": digest(turn.prompt)}
        plan.ledger.note("begin", **about)
        action = "loop" if turn.iteration <= loops else "continue"
        reason = said(name, turn.prompt)
        plan.ledger.note("end", **about, text=reason)
        return cm.Verdict(action=action, reason=reason)

    return verdict


class LedgerEngine:
    """An engine with sessions, tools and a service that asks for patience."""

    name = "ledger"

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    async def stream(self, request: AgentRequest) -> AsyncIterator[AgentEvent]:
        """Do one turn."""
        ledger, path = self.plan.ledger, request.path
        about = {"path": path, "attempt": request.attempt, "digest": digest(request.prompt)}
        ledger.note("begin", **about)
        yield SessionStarted(f"session of {path}")
        yield UsageReported(cm.Usage(input_tokens=3, output_tokens=2), 0.0004)
        yield ToolCalled("1", "look", {"at": path})
        await asyncio.sleep(0)
        yield ToolReturned("1", "look", "it is there")
        if request.await_budget is not None:
            await request.await_budget()
        if sum(line["path"] == path for line in ledger.lines("failed")) < self.plan.fails.get(path, 0):
            ledger.note("failed", **about)
            raise cm.EngineRateLimited("slow down", retry_after_s=0.0)
        text = said(request.agent.id, request.prompt)
        yield UsageReported(cm.Usage(input_tokens=7, output_tokens=5), 0.001)
        ledger.note("end", **about, text=text)
        yield cm.TurnDone(text)


# -- pieces of plans --------------------------------------------------------------------------------------------------


def _plain(plan: Plan, chance: random.Random, name: str) -> None:
    item = cm.step(name, prompt=plan.prompt(name))
    plan.add(name, item, worker(plan, name, sync=chance.random() < 0.3))


def _served(plan: Plan, chance: random.Random, name: str) -> None:
    plan.fails[name] = chance.choice((0, 0, 1, 2))
    plan.answers[name] = chance.choice(("approve", "reject", "edit"))
    plan.add(name, cm.step(name, interactive=chance.random() < 0.5), cm.Agent(name, plan.prompt(name)))


def _review(plan: Plan, chance: random.Random, name: str) -> None:
    plan.answers[name] = chance.choice(("approve", "reject", "edit", "skip"))
    plan.add(name, cm.step(name, prompt=plan.prompt(name), interactive=True), worker(plan, name))


def _start(plan: Plan, chance: random.Random, name: str) -> None:
    plan.answers[name] = chance.choice(("approve", "edit"))
    place = chance.choice(("before", "both"))
    plan.add(name, cm.step(name, prompt=plan.prompt(name), interactive=True, gate=place), worker(plan, name))


def _chain(plan: Plan, chance: random.Random, name: str) -> None:
    prompts = [plan.prompt(name), "And now the tests.", "And now the words."][: chance.choice((2, 3))]
    if chance.random() < 0.5:
        plan.add(name, cm.step(name, prompt=prompts, interactive=chance.random() < 0.5), worker(plan, name))
    else:
        plan.add(name, cm.step(name, prompt=prompts), cm.Agent(name, "unused"))


def _once(plan: Plan, chance: random.Random, name: str) -> None:
    plan.answers[f"{name}!"] = chance.choice(("retry", "retry", "approve"))
    plan.add(name, cm.step(name, prompt=plan.prompt(name), idempotent=False), worker(plan, name))


def _ask(plan: Plan, chance: random.Random, name: str) -> None:
    item = cm.step(name, prompt=plan.prompt(name))
    plan.add(name, item, worker(plan, name, asks=True, sync=chance.random() < 0.3))


def _parallel(plan: Plan, chance: random.Random, name: str) -> None:
    names = [f"{name}{letter}" for letter in "abc"[: chance.choice((2, 3))]]
    item = cm.parallel(
        *names, id=name, prompt=plan.prompt(name), max_concurrency=chance.choice((None, 1, 2)),
        interactive=chance.random() < 0.3,
    )  # fmt: skip
    plan.answers[name] = chance.choice(("approve", "reject"))
    plan.add(name, item, *(worker(plan, each, asks=chance.random() < 0.2) for each in names))


def _team(plan: Plan, chance: random.Random, name: str) -> None:
    one, two, three = (f"{name}{letter}" for letter in "abc")
    asked = f"{one} 'the UI' & {two} 'the API' && {three} 'test both'"
    members = [worker(plan, one, asks=chance.random() < 0.4), worker(plan, two, sync=True)]
    members.append(worker(plan, three, breaks=chance.choice((0, 0, 1))))
    plan.called += [one, two, three]
    plan.add(name, cm.step(name, prompt=plan.prompt(name)), caller(plan, name, asked), *members)


def _loop(plan: Plan, chance: random.Random, name: str) -> None:
    work, gate, loops = f"{name}-work", f"{name}-gate", chance.choice((0, 1, 2))
    plan.add(work, cm.step(work, prompt=plan.prompt(work)), worker(plan, work))
    most = chance.choice((None, 1))
    plan.add(gate, cm.module(gate, loop_max_iterations=most), judge(plan, gate, loops))


PIECES = (_plain, _served, _review, _start, _chain, _once, _ask, _parallel, _team, _loop)


def draw(seed: int) -> Plan:
    """The plan of that seed."""
    chance = random.Random(f"plan {seed}")
    plan = Plan(str(seed))
    for number in range(chance.randint(2, 4)):
        chance.choice(PIECES)(plan, chance, f"s{number}")
    plan.deciders = chance.choice((0, 0, 1, 2))
    if chance.random() < 0.2:
        plan.max_turns = chance.randint(1, 4)
    elif chance.random() < 0.2:
        plan.max_tokens = chance.choice((5, 12, 30))
    return plan


# -- plans with a name, which have each kind of event ------------------------------------------------------------------


def _gates(plan: Plan) -> None:
    """Reviews, edits, a chain, and a service that asks for patience."""
    plan.add("draft", cm.step("draft", interactive=True), cm.Agent("draft", plan.prompt("draft")))
    plan.fails["draft"], plan.answers["draft"] = 1, "reject"
    item = cm.step("edited", prompt=plan.prompt("edited"), interactive=True, gate="both")
    plan.add("edited", item, worker(plan, "edited"))
    plan.answers["edited"] = "edit"
    plan.add("chain", cm.step("chain", prompt=[plan.prompt("chain"), "More."]), worker(plan, "chain"))


def _steered(plan: Plan) -> None:
    """A person who pauses, adds, changes, removes and goes back."""
    for name in ("first", "second"):
        item = cm.step(name, prompt=plan.prompt(name), interactive=True)
        plan.add(name, item, worker(plan, name))
    plan.steps.append(cm.step("spare", prompt="not needed"))
    plan.agents += [worker(plan, "spare"), worker(plan, "added")]
    plan.deeds = [
        Deed("first", "RunPaused", lambda run: run.pause()),
        Deed("first", "RunUnpaused", lambda run: run.unpause()),
        Deed("first", "ModeChanged", lambda run: run.set_mode("step-by-step")),
        Deed("first", "WorkflowChanged", lambda run: run.go_on(inputs={"colour": "blue"})),
        Deed("first", "StepAdded", lambda run: run.add(cm.step("added", prompt="added to {{ goal }}"), "second")),
        Deed("first", "StepRemoved", lambda run: run.remove("spare")),
        Deed("second", "StepChanged", lambda run: run.replace(cm.step("added", prompt="changed"))),
        Deed("second", "Rewound", lambda run: run.rerun("first", later=True)),
    ]


def _inserted(plan: Plan) -> None:
    """A step is put before one that waits, which is made again."""
    for name in ("first", "second"):
        plan.add(name, cm.step(name, prompt=plan.prompt(name), interactive=name == "second"), worker(plan, name))
    plan.agents.append(worker(plan, "added"))
    plan.deeds = [Deed("second", "StepAdded", lambda run: run.add(cm.step("added", prompt="added"), "first"))]


def _looped(plan: Plan) -> None:
    """A loop that goes back over a step that runs once."""
    plan.add("once", cm.step("once", prompt="once", execute_once=True), worker(plan, "once"))
    plan.add("work", cm.step("work", prompt="work"), worker(plan, "work"))
    plan.add("gate", cm.module("gate", loop_steps=2), judge(plan, "gate", 2))


def _teamed(plan: Plan) -> None:
    """Agents that call others, ask, and work side by side."""
    members = [worker(plan, "asker", asks=True), worker(plan, "quick"), worker(plan, "last")]
    plan.called += ["asker", "quick", "last"]
    lead = caller(plan, "lead", "asker 'x' & quick 'y' && last 'z'")
    plan.add("lead", cm.step("lead", prompt="lead"), lead, *members)
    plan.add("both", cm.parallel("left", "right", id="both"), worker(plan, "left"), worker(plan, "right"))


def _alone(plan: Plan) -> None:
    """Nobody is there, and an agent that was called fails for good."""
    plan.headless = True
    plan.called += ["broken", "quick"]
    lead = caller(plan, "lead", "broken 'x' & quick 'y'")
    members = [worker(plan, "broken", breaks=9), worker(plan, "quick")]
    plan.add("lead", cm.step("lead", prompt="lead"), lead, *members)
    plan.add("end", cm.step("end", prompt=plan.prompt("end"), interactive=True), worker(plan, "end"))


def _untold(plan: Plan) -> None:
    """Who should be told that a gate is open cannot be."""

    def nobody(_gate: cm.Gate) -> None:
        raise OSError("no such address")

    def heard(run: cm.Run) -> None:
        while "TellingFailed" not in deeds_done(run.events):
            time.sleep(0.001)

    plan.on_waiting = nobody
    plan.add("first", cm.step("first", prompt="first", interactive=True), worker(plan, "first"))
    plan.deeds = [Deed("first", "TellingFailed", heard)]


def _filed(plan: Plan) -> None:
    """Agents that write files: one is rejected, and one writes what git does not take."""
    for name, file in (("first", "a.txt"), ("second", "git~1")):
        plan.add(name, cm.step(name, prompt=plan.prompt(name), interactive=True), writer(plan, name, file))
    plan.answers["first"] = "reject"


def _limited(plan: Plan) -> None:
    """A limit that is reached in the midst of turns, and before one is tried again."""
    plan.max_tokens = 4
    plan.fails["first"] = 1
    plan.add("first", cm.step("first"), cm.Agent("first", plan.prompt("first")))
    plan.add("both", cm.parallel("left", "right", id="both"), cm.Agent("left", "left"), cm.Agent("right", "right"))


NAMED = {
    "limited": _limited,
    "filed": _filed,
    "untold": _untold,
    "gates": _gates,
    "steered": _steered,
    "inserted": _inserted,
    "looped": _looped,
    "teamed": _teamed,
    "alone": _alone,
}


def make(seed: str) -> Plan:
    """The plan with that name, or of that number."""
    if seed not in NAMED:
        return draw(int(seed))
    plan = Plan(seed)
    NAMED[seed](plan)
    return plan


def deeds_done(events: Iterable[Any]) -> set[str]:
    """The kinds of event that are there already."""
    return {event.type for event in events}
