"""The work of a run: who does a step, what they are told, and what they may ask for meanwhile.

Strategy: the driver says that a turn begins; here it gets its engine and its request, ``turns.py`` takes it, and how it
ended is proposed to the driver. From inside a turn a person can be asked, for an answer or for the permission to call a
tool, and other agents can be called: each is an event that is proposed and a future that waits for the event which
answers it. The turn's time stands still until then, and a turn waits for one thing at a time.
"""

from __future__ import annotations

import asyncio
import functools
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

from pydantic import BaseModel

from . import allowed, keys
from . import state as meaning
from .driving import Driver, more
from .engines.base import AgentRequest, Engine, configured_engine, find_engine, unpriced
from .engines.functions import FunctionEngine
from .errors import EngineError, WorkflowError
from .events import (
    AgentsCalled,
    AgentsReturned,
    AnyEvent,
    Decision,
    GateDecided,
    GateOpened,
    RunFinished,
    TurnCutShort,
    TurnStarted,
    TurnWentOn,
)
from .files import Files
from .journal import OWN_FOLDER, own_folder
from .prompts import missing_field
from .runstate import StepState
from .starting import check_places, making
from .team import AgentResult, Call, checked_calls
from .tools import Permission, Tool, read_arguments
from .turns import Ending, LiveTurn, failed, take_turn, too_late
from .workflow import Agent, Step, Workflow, sound

_FUNCTIONS = FunctionEngine()


class Work:
    """Who does the turns of one run.

    Attributes
    ----------
    agents
        As they were handed over, with their functions, which a journal cannot keep.
    engine
        The one given for the run: a name, or what does all that is no function.
    models
        The classes of the values that agents gave here, by path.
    questions, calls, held
        What waits inside a turn: for the answer of a gate, for agents it has called, for a larger budget.
    """

    def __init__(self, driver: Driver) -> None:
        self.agents: dict[str, Agent] = {}
        self.engine: str | Engine | None = None
        self.models: dict[str, type[BaseModel]] = {}
        self.questions: dict[str, asyncio.Future[Decision]] = {}
        self.calls: dict[tuple[str, int], asyncio.Future[None]] = {}
        self.held: list[asyncio.Future[None]] = []
        self.files = Files(driver, self.workspace)
        self._driver = driver
        self._outputs = _Outputs(driver)
        self._folder: Path | None = None

    # -- a turn --------------------------------------------------------------------------------------------------------

    def launch(self, step: StepState, started: TurnStarted, prompt: str) -> None:
        """Begin a turn of `step`."""
        driver = self._driver
        turn = driver.turns[started.path] = LiveTurn(started, step.step, self._too_late, driver.since)
        turn.failures = step.attempts[-1].failures
        turn.task = cast("asyncio.AbstractEventLoop", driver.loop).create_task(self._turn(turn, prompt))

    async def _turn(self, turn: LiveTurn, prompt: str) -> None:
        """Do one turn and propose how it ended. Cancelled when the turn was cut short, which is recorded by then."""
        driver, said = self._driver, _Said(self._driver, turn)
        try:
            await self.files.begin(turn, said.write)
            turn.run_clock()
            engine, request = self.engine_for(turn.step), self._request(turn, prompt, said.write)
            ending = await take_turn(turn, engine, request, said)
            said.all()
        except asyncio.CancelledError:  # by whoever cut it short, or (which is to be said) by its own agent
            await self._end(turn, failed(turn, EngineError(f"{turn.started.step} was cancelled from within."), None))
            raise
        except GeneratorExit:  # by its own agent; or the loop was left, and nobody comes to hear of it
            loop = cast("asyncio.AbstractEventLoop", driver.loop)
            ending = failed(turn, EngineError(f"{turn.started.step} raised GeneratorExit."), None)
            loop.call_soon(lambda: setattr(turn, "task", loop.create_task(self._end(turn, ending))))  # no await here
            return
        except EngineError as error:
            ending = failed(turn, error, None)
        except Exception as error:  # a bug: whatever happens, the turn has an end
            ending = failed(turn, error, None, fatal=True)
        await self._end(turn, ending)

    def _too_late(self, turn: LiveTurn) -> None:
        ending, working = too_late(turn), turn.task
        # first, so that this is what it ended by; whoever cuts it short meanwhile ends this
        turn.task = cast("asyncio.AbstractEventLoop", self._driver.loop).create_task(self._end(turn, ending))
        if working is not None:
            working.cancel()

    async def _end(self, turn: LiveTurn, ending: Ending) -> None:
        """Propose how a turn ended, with what it has changed in the workspace; the first word about that counts."""
        turn.stop_clock()
        if turn.over or self._driver.turns.get(turn.started.path) is not turn:
            return
        turn.over = True
        changed: list[AnyEvent] = []
        try:
            changed = await self.files.end(turn, ending.event)
        except Exception as error:  # a bug
            ending = failed(turn, error, None, fatal=True)
        self._driver.propose_end(lambda: self._turn_ended(turn, ending, changed))

    def _turn_ended(self, turn: LiveTurn, ending: Ending, changed: list[AnyEvent]) -> list[AnyEvent]:
        """The end of a turn as events; none when the turn was cut short meanwhile."""
        started = turn.started
        if self._driver.turns.get(started.path) is not turn:
            return []
        del self._driver.turns[started.path]
        if turn.model is not None:
            self.models[started.path] = turn.model
        if ending.error is not None:
            self._driver.error = ending.error
        called: list[TurnCutShort] = []
        if started.path in self._driver.state.calls:  # a function may end without those that it has called
            step = self._driver.state.find(started.path)
            cut = meaning.cut_all(self._driver.state, "its caller has ended", step)
            called = [one for one in cut if one.path != started.path]
        if not ending.fatal:
            return [*called, *changed, ending.event]
        others = more([*called, ending.event], meaning.cut_all(self._driver.state, "the run failed"))
        over = RunFinished(status="failed", reason=f"{started.step}: {ending.error}")
        return [*called, *changed, ending.event, *others, over]

    def cut_short(self, event: TurnCutShort) -> None:
        """Stop the turn that was cut short."""
        running = self._driver.turns.pop(event.path, None)
        if running is not None:
            running.cancel()

    # -- who does a step -----------------------------------------------------------------------------------------------

    def engine_for(self, step: Step) -> Engine:
        """Who does this step: the function, the tape, the engine given, or the one named nearest to the step."""
        agent = self.agents.get(step.agent) or self._driver.state.agents[step.agent]
        if agent.implementation is not None:
            return _FUNCTIONS
        if self.engine is not None and not isinstance(self.engine, str):
            return self.engine
        if name := step.engine or agent.engine or self.engine or self._driver.state.engine:
            return find_engine(name)
        return configured_engine()

    def engine_name(self, step: Step) -> str:
        """The name of the engine that does this step, also where it is not there."""
        try:
            return self.engine_for(step).name
        except EngineError as error:
            return error.engine or "unknown"

    def check_prices(self, workflow: Workflow, limits: Mapping[str, Any]) -> None:
        """Refuse a step whose engine is not there, or whose cost is limited and would not be known.

        Raises
        ------
        EngineNotFound    There is no engine of that name.
        WorkflowError     A price is not known.
        """
        most = limits.get("max_cost_usd", workflow.max_cost_usd)
        agents = {agent.id: agent for agent in workflow.agents}
        own = {name: item.max_cost_usd for item in workflow.executable for name in item.agents if item.max_cost_usd}
        called = next(iter(own.values()), None)
        for item in workflow.tasks:
            engine, agent = self.engine_for(item), agents[item.agent]
            limit = most or own.get(agent.id) or (called if agent.id in workflow.sub_agents else None)
            why = unpriced(engine, item.model or agent.model) if limit is not None else None
            if why is not None:
                raise WorkflowError(
                    f"max_cost_usd={limit:g} cannot be held: the cost of {item.id!r} would not be known. {why} "
                    "Or limit max_tokens instead."
                )

    def _request(self, turn: LiveTurn, prompt: str, write: Callable[[str], None]) -> AgentRequest:
        started, driver = turn.started, self._driver
        with driver.lock:
            state = driver.state
            step = state.find(started.path)
            if started.prompt and (wrong := missing_field(state, step)) is not None:
                raise EngineError(wrong)
            task = step.step
            agent = self.agents.get(task.agent) or state.agents[task.agent]
            return AgentRequest(
                agent=agent,
                prompt=prompt,
                step=started.step,
                path=started.path,
                attempt=started.attempt,
                turn=started.turn,
                iteration=started.iteration,
                ordinal=step.attempts[-1].ordinal,
                failures=turn.failures,
                system=agent.system,
                model=task.model or agent.model,
                reasoning_effort=task.reasoning_effort or agent.reasoning_effort,
                session_id=started.session_id,
                history=[(state.text(asked), state.text(got)) for asked, got in step.said] if step.said else (),
                feedback=meaning.feedback_on(state, step) or None,
                inputs=MappingProxyType(state.inputs),
                outputs=self._outputs,
                workspace=self.workspace(),
                timeout_s=task.timeout_s,
                emit=write,
                ask_human=lambda question: self._ask_human(turn, question),
                may_ask=meaning.may_ask(state, step),
                ask_permission=lambda name, arguments: self._ask_permission(turn, name, arguments),
                sub_agents=meaning.may_call(state, step),
                run_agents=lambda asked, limit=None: self._run_agents(turn, asked, limit),
                await_budget=lambda: self._await_budget(turn),
            )

    def workspace(self) -> Path:
        """The folder to work in; made when the first turn needs it."""
        if self._folder is None:
            given = self._driver.state.workspace
            with making(given or Path(OWN_FOLDER, "work", self._driver.id), EngineError):
                folder = Path(given) if given is not None else own_folder().joinpath("work", self._driver.id).absolute()
                new = given is None and not folder.exists()
                folder.mkdir(parents=True, exist_ok=True)
                if new:  # its first file is to show in its time, within the same tick of the clock too
                    os.utime(folder, (time.time() - 60,) * 2)
            self._folder = folder
        return self._folder

    def model(self, path: str) -> type[BaseModel] | None:
        """The class that the output there fits, where it is known here: the one its agent names, else its value's."""
        agent = self.agents.get(self._driver.state.find(path).step.agent)
        named = agent.output if agent is not None else None
        return named if isinstance(named, type) else self.models.get(path)

    def tool(self, path: str, name: str) -> Tool | None:
        """The tool of that name that the agent there has."""
        agent = self.agents.get(self._driver.state.find(path).step.agent)
        return next((tool for tool in agent.tools if tool.name == name), None) if agent is not None else None

    # -- what a turn asks for ------------------------------------------------------------------------------------------

    async def _ask_human(self, turn: LiveTurn, question: str) -> str:
        """Ask a person; what was answered before the process died is not asked again."""
        question = sound(str(question))
        if not question.strip():
            raise WorkflowError("ask_human: the question is empty. Say what you want to know.")
        async with turn.one_at_a_time():
            step = self._driver.state.find(turn.started.path)
            for place, (asked, said) in enumerate(step.resent):
                if asked == question and place not in turn.recalled:
                    turn.recalled.add(place)
                    return said
            decision = await self._ask(turn, lambda: meaning.ask(self._driver.state, step, question))
            return decision.feedback or ""

    async def _ask_permission(self, turn: LiveTurn, name: str, arguments: Mapping[str, Any]) -> Permission:
        """Ask a person whether a tool may be called, unless it was allowed for longer."""
        arguments, path = sound(dict(arguments)), turn.started.path
        tool = self.tool(path, name)
        which = (name, tool.implementation if tool is not None else "")
        note = ""
        async with turn.one_at_a_time():
            while True:
                given = self._driver.state.allowed.get(which)
                if (given is not None and given.scope == "run") or allowed.allows(self._driver.journal, *which):
                    return Permission(True)
                opening = functools.partial(
                    meaning.ask_permission, self._driver.state, self._driver.state.find(path), which, arguments, note
                )
                decision = await self._ask(turn, opening)
                if decision.action == "reject":
                    return Permission(False, reason=decision.feedback or "")
                if decision.output is None:
                    return Permission(True)
                edited = read_arguments(decision.output)
                try:
                    if tool is not None:
                        tool.check(edited)
                except ValueError as error:  # by somebody who could not know, as in another process
                    note = f"The edited arguments do not fit: {error}."
                else:
                    return Permission(True, edited)

    async def _ask(self, turn: LiveTurn, opening: Callable[[], GateOpened]) -> Decision:
        """Open a gate in the midst of a turn and wait for its answer; the turn's time stands still."""
        answer: asyncio.Future[Decision] = asyncio.get_running_loop().create_future()

        def propose() -> list[AnyEvent]:
            opened = opening()
            self.questions[opened.gate.id] = answer
            return [*turn.spent(), opened]

        turn.stop_clock()
        self._driver.propose(propose)
        decision = await answer
        turn.run_clock()
        return decision

    async def _await_budget(self, turn: LiveTurn) -> None:
        """Wait until no limit is reached; a person is asked about it, by the first turn that comes to it."""
        path = turn.started.path

        def ask() -> list[AnyEvent]:
            state = self._driver.state
            return [*meaning.ask_for_more(state, state.find(path))] if self._driver.turns.get(path) is turn else []

        async with turn.one_at_a_time():
            self._driver.propose(lambda: turn.spent() if self._driver.turns.get(path) is turn else [])
            while True:
                self._driver.propose(ask)
                with self._driver.lock:
                    state = self._driver.state
                    turn.held = state.held is not None and meaning.used_up(state, state.find(path)) is not None
                if not turn.held:
                    return
                freed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
                self.held.append(freed)
                turn.stop_clock()
                self._driver.come_to_rest()
                await freed
                turn.held = False
                turn.run_clock()

    def tell(self, event: GateDecided | TurnWentOn) -> None:
        """Give the turn that has asked its answer."""
        waiting = self.questions.pop(event.gate_id, None)
        if waiting is not None and not waiting.done():
            waiting.set_result(self._driver.state.decisions[event.gate_id])

    async def _run_agents(self, turn: LiveTurn, asked: object, limit: int | None = None) -> list[AgentResult]:
        """Have other agents work for a turn and wait for them all; the turn's time stands still."""
        groups = checked_calls(asked, self._driver.state.sub_agents)
        check_places("run_agents: max_concurrency", limit)
        async with turn.one_at_a_time():
            named = any(call.input_files for group in groups for call in group)
            files = await asyncio.to_thread(_read_files, self.workspace(), groups) if named else {}
            ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            made: list[AgentsCalled] = []

            def propose() -> list[AnyEvent]:
                step = self._driver.state.find(turn.started.path)
                called = meaning.call_agents(self._driver.state, step, groups, files, limit)
                self.calls[called.path, called.call] = ended
                made.append(called)
                return [*turn.spent(), called]

            turn.stop_clock()
            try:
                self._driver.propose(propose)
                await ended
            except asyncio.CancelledError:
                self._driver.propose(lambda: self._not_waited_for(made), wait=False)
                raise
            finally:
                if self._driver.turns.get(turn.started.path) is turn:  # else it was cut short
                    turn.run_clock()
            with self._driver.lock:
                return meaning.results(self._driver.state, made[-1])

    def _not_waited_for(self, made: list[AgentsCalled]) -> list[AnyEvent]:
        """What becomes of a call whose turn goes on without it."""
        call = self._driver.state.calls.get(made[-1].path) if made else None
        if call is None or call.number != made[-1].call:
            return []
        caller = self._driver.state.find(made[-1].path)
        cut = meaning.cut_all(self._driver.state, "nobody waits for it", caller)
        return [
            *(one for one in cut if one.path != caller.path),
            AgentsReturned(step=caller.id, path=caller.path, call=call.number),
        ]

    def tell_caller(self, event: AgentsReturned) -> None:
        """Let the turn go on whose agents are done."""
        waiting = self.calls.pop((event.path, event.call), None)
        if waiting is not None and not waiting.done():
            waiting.set_result(None)

    def forget_answered(self) -> None:
        """Whom nobody will answer any more need not be kept, and whom nothing holds any more goes on."""
        state = self._driver.state
        if self.held and state.held is None:
            for freed in self.held:
                if not freed.done():
                    freed.set_result(None)
            self.held.clear()
        if self.questions:
            self.questions = {id: one for id, one in self.questions.items() if meaning.waits_for(state, id)}
        if self.calls:
            self.calls = {call: one for call, one in self.calls.items() if call[0] in state.calls}

    def drop(self) -> None:
        """The run is given up here: its turns are cancelled, and nobody waits inside them."""
        self.questions.clear()
        self.calls.clear()
        self.held.clear()


class _Said:
    """Passes on what a turn does while it is under way: text to those who watch, facts to the driver."""

    _text: keys.Hider | None = None
    _thoughts: keys.Hider | None = None

    def __init__(self, driver: Driver, turn: LiveTurn) -> None:
        self._driver, self._turn = driver, turn

    def write(self, text: str, last: bool = False) -> None:
        driver, turn = self._driver, self._turn
        with driver.lock:  # who begins to watch meanwhile gets each piece once
            if self._text is None:
                self._text = keys.Hider()
            text = self._text(sound(text), last)
            if last and not text:
                return
            turn.write(text)
            for feed in driver.feeds:
                feed.put_text(turn.started.path, turn.started.attempt, text)

    def think(self, text: str, last: bool = False) -> None:
        driver, turn = self._driver, self._turn
        with driver.lock:
            if self._thoughts is None:
                self._thoughts = keys.Hider()
            text = self._thoughts(sound(text), last)
            for feed in driver.feeds if text else ():
                feed.put_text(turn.started.path, turn.started.attempt, text, "thinking")

    def all(self) -> None:
        """Nothing more comes: what was held back, as it might have become a key, is passed on."""
        if self._text:
            self.write("", last=True)
        if self._thoughts:
            self.think("", last=True)

    def record(self, event: AnyEvent) -> None:
        driver, turn = self._driver, self._turn
        told = [*turn.spent(), event]

        def propose() -> list[AnyEvent]:
            return told if driver.turns.get(turn.started.path) is turn else []  # else it was cut short

        driver.propose(propose, wait=False)


class _Outputs(Mapping[str, str]):
    """The approved texts by step, looked up when asked for: a run of ten thousand steps copies nothing."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver

    def __getitem__(self, step: str) -> str:
        with self._driver.reading() as state:
            found = state.steps.get(step) or state.steps.get(step.replace("_", "-"))
            if found is None and (voice := state.voice(step)) is not None and state.voices[voice] is not None:
                return state.text(state.voices[voice])
            if found is None or (found.approved is None and not found.settled):
                raise KeyError(step)
            return state.text(found.approved)  # "" of a skipped one

    def __iter__(self) -> Iterator[str]:
        with self._driver.reading() as state:
            steps = [step.id for step in state.order if step.approved is not None or step.settled]
            return iter([*steps, *(name for name, said in state.voices.items() if said is not None)])

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __repr__(self) -> str:
        return repr(dict(self))


def _read_files(folder: Path, groups: Iterable[Iterable[Call]]) -> dict[str, str]:
    """The input files that calls name, as they are now.

    Raises
    ------
    WorkflowError    One cannot be read, is no text, or lies outside the workspace.
    """
    found: dict[str, str] = {}
    for name in (name for group in groups for call in group for name in call.input_files):
        if name in found:
            continue
        where = folder.joinpath(name).resolve()
        if not where.is_relative_to(folder.resolve()):
            raise WorkflowError(f"run_agents: the input file {name!r} lies outside the workspace.")
        try:
            found[name] = where.read_text("utf-8")
        except OSError as error:
            reason = error.strerror or error
            raise WorkflowError(f"run_agents: the input file {name!r} cannot be read: {reason}.") from None
        except ValueError:
            raise WorkflowError(f"run_agents: the input file {name!r} is not a text in UTF-8.") from None
    return found
