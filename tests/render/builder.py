"""Makes runs for the tests of the views: events applied to a ``RunState`` the way the loop of a real run does it.

A ``Story`` has a clock of its own that starts at noon and moves only when told to. At the end stand the situations that
golden files, pictures and checks of whole views go through.
"""

from __future__ import annotations

from typing import Any

from cm_notebook.events import (
    AnyEvent,
    Decision,
    ErrorInfo,
    GateDecided,
    ModeChanged,
    Rewound,
    RunResumed,
    RunStarted,
    ToolCalled,
    ToolReturned,
    TurnCutShort,
    TurnFailed,
    TurnFinished,
    TurnStarted,
    Usage,
    place,
)
from cm_notebook.prompts import digest, text_of
from cm_notebook.render.text import event_line
from cm_notebook.runstate import Record, RunState, StartTurn
from cm_notebook.state import apply, ask, ask_permission, next_actions
from cm_notebook.workflow import Agent, Separator, Verdict, Workflow, as_step, parse_steps, separator, step

NOON = 1_700_049_600.0
HOSTILE = "<script>alert(1)</script>\"'&<img src=x onerror=alert(1)>\x1b[31m\u202e]]>--><!--\x00\ufffe%23#`"


class Story:
    """A run that goes on event by event; ``lines`` are its headless lines.

    Parameters
    ----------
    steps
        The arrow string, or a list of steps.
    engine
        Name of the engine that its turns say they ran on.
    recorded
        The name of a tape, for a run that plays one: its turns say how long they took, its decisions are the tape's.
    machine
        (start, speed, run id) of the machine that executes it.
    **options
        Those of ``Workflow``.
    """

    def __init__(
        self,
        steps: Any,
        *,
        engine: str = "claude",
        recorded: str | None = None,
        machine: tuple[float, float, str] = (NOON, 1.0, "r-7f3a"),
        name: str = "smart-builder",
        **options: Any,
    ) -> None:
        self.now, self.speed, run_id = machine
        self.engine, self.taped = engine, recorded is not None
        self.lines: list[str] = []
        self.events: list[AnyEvent] = []
        flow = Workflow(name=name, steps=steps, **{"agents": _agents(steps), **options})
        self.state = RunState()
        self.record(RunStarted(run_id=run_id, workflow=flow.to_dict(), recorded=recorded))
        self.go()

    def record(self, event: AnyEvent) -> Story:
        place(event, self.state.seq + 1, self.now)
        apply(self.state, event)
        self.events.append(event)
        if (line := event_line(self.state, event)) is not None:
            self.lines.append(line)
        return self

    def go(self) -> Story:
        """Do what is to be done, until a turn runs or a person is asked."""
        while actions := [one for one in next_actions(self.state) if isinstance(one, StartTurn) or not one.not_before]:
            for action in actions:
                if isinstance(action, Record):
                    self.record(action.event)
                else:
                    self._start(action)
        return self

    def _start(self, turn: StartTurn) -> None:
        self.now = max(self.now, turn.not_before or 0.0)
        self.record(
            TurnStarted(
                step=turn.step.id,
                path=turn.step.path,
                attempt=turn.attempt,
                turn=turn.turn,
                iteration=turn.step.iteration,
                prompt=turn.prompt,
                context=turn.context,
                digest=digest(text_of(turn.prompt + (turn.context or ()), self.state.texts)),
                session_id=turn.session_id,
                engine=self.engine,
            )
        )

    @property
    def _turn(self) -> dict[str, Any]:
        running = next(step for step in self.state.running.values() if step.status in ("running", "asking"))
        return {"step": running.id, "path": running.path, "attempt": running.attempt, "turn": running.turn}

    def after(self, seconds: float) -> Story:
        """Time passes."""
        self.now += seconds * self.speed
        return self

    def answer(
        self, text: str, took: float = 4.6, *, tokens: int = 400, usd: float | None = 0.003, **more: Any
    ) -> Story:
        """The agent that runs has answered, and the run goes on; `more` are fields of ``TurnFinished``."""
        self.after(took)
        if tokens:
            more.setdefault("usage", Usage(input_tokens=tokens - tokens // 4, output_tokens=tokens // 4))
        if self.taped:
            more.setdefault("duration_s", took)
        return self.record(TurnFinished(**self._turn, text=text, cost_usd=usd, **more)).go()

    def says(self, action: Any, reason: str = "", score: float | None = None) -> Story:
        """The module that runs, a function, has given its verdict."""
        verdict = Verdict(action=action, reason=reason, score=score)
        return self.answer(reason or action, 1.2, tokens=0, usd=None, verdict=verdict, duration_s=None)

    def fail(self, message: str, *, detail: str | None = None, retry_in_s: float | None = None) -> Story:
        """The turn that runs has failed."""
        error = ErrorInfo(kind="EngineAuthError", message=message, detail=detail)
        self.after(0.4).record(TurnFailed(**self._turn, error=error, retry_in_s=retry_in_s))
        return self if retry_in_s is not None else self.go()

    def cut(self, reason: str) -> Story:
        """The process died."""
        return self.after(0.4).record(TurnCutShort(**self._turn, reason=reason))

    def resume(self, reason: str) -> Story:
        return self.record(RunResumed(by="you", reason=reason)).go()

    def mode(self, mode: Any) -> Story:
        return self.record(ModeChanged(mode=mode)).go()

    def ask(self, question: str) -> Story:
        """The agent that runs asks a person."""
        return self.record(ask(self.state, next(iter(self.state.running.values())), question))

    def calls(self, name: str, arguments: str) -> Story:
        """The agent that runs calls a tool."""
        return self.record(ToolCalled(**self._turn, call_id="1", name=name, arguments=arguments))

    def told(self, name: str, text: str, *, failed: bool = False) -> Story:
        """And is told what came of it."""
        return self.after(0.2).record(ToolReturned(**self._turn, call_id="1", name=name, text=text, failed=failed))

    def permit(self, tool: str, **arguments: Any) -> Story:
        """The agent that runs wants to call a tool."""
        running = next(iter(self.state.running.values()))
        return self.record(ask_permission(self.state, running, (tool, "f:1"), arguments))

    def decide(self, action: Any, feedback: str | None = None, *, by: str | None = None, **more: Any) -> Story:
        """The oldest open gate is answered a minute later, and the run goes on."""
        self.after(60)
        decision = Decision(action=action, feedback=feedback, by=by or ("tape" if self.taped else "you"), **more)
        return self.record(GateDecided(gate_id=next(iter(self.state.gates)), decision=decision)).go()


def _agents(steps: Any) -> list[Agent]:
    items = parse_steps(steps) if isinstance(steps, str) else [as_step(1, item) for item in steps]
    names = dict.fromkeys(agent for item in items if not isinstance(item, Separator) for agent in item.agents)
    return [Agent(id=name, prompt=f"Do the work of {name}.") for name in names]


# -- situations -------------------------------------------------------------------------------------------------------

PLAN_1 = "1. Create `todo.py` with add and list\n2. Write tests later\n"
PLAN_2 = "1. Create `todo.py` with add, list and done\n2. Write `tests/test_todo.py` first\n3. Run `pytest -q`\n"
REVIEW = (
    "## Review\n\nTests pass (7/7). One nit: `done` accepts ids that do not exist.\n\n"
    "| check | result |\n|---|---|\n| tests | 7 passed |\n| lint | clean |\n"
)
FINDINGS = "# Findings\n\n- Storage: **SQLite** in WAL mode\n- 3 endpoints needed\n"
CODE = "Wrote 2 files.\n\n```python\ndef add(db, text): ...\n```\n"
TRACE = 'Traceback (most recent call last):\n  File "claude.py", line 12, in stream\nRuntimeError: HTTP 401'


def waiting(**options: Any) -> Story:
    """Three steps done, one of them after a rejection; the reviewer waits."""
    story = Story("researcher -> planner? -> implementer -> reviewer? -> deployer", **options)
    story.answer(FINDINGS, 6.2, tokens=900, usd=0.004)
    story.answer(PLAN_1, 7.4, tokens=700, usd=0.004).decide("reject", "Name the tests now, and add `done`.")
    story.answer(PLAN_2, 7.4, tokens=900, usd=0.004).decide("approve")
    return story.answer(CODE, 12.4, tokens=1200, usd=0.006).answer(REVIEW)


def finished(**options: Any) -> Story:
    return waiting(**options).decide("approve").answer("Released **v0.1.0**.", 2.1, tokens=200, usd=0.001)


def recorded(**options: Any) -> Story:
    """The same from a tape."""
    return finished(engine="offline", recorded="tapes/02", **options)


def looping(**options: Any) -> Story:
    """The third pass of a loop runs."""
    flow = "planner -> implementer -> quality-gate(loop 1, max 5) -> deployer"
    story = Story(flow, name="quality-first", **options).answer(PLAN_2)
    story.answer("First try.\n", 9.0, tokens=800).says("loop", "2 of 7 tests fail: `done` is missing.", 0.52)
    return story.answer("With `done`.\n", 8.0, tokens=800).says("loop", "1 of 7 tests fails.", 0.71).after(3)


def exhausted() -> Story:
    story = Story("planner -> implementer -> quality-gate(loop 1, max 2) -> deployer", name="quality-first")
    story.answer(PLAN_2)
    for score in (0.52, 0.71, 0.74):
        story.answer(f"A try that reaches {score}.\n").says("loop", "Tests still fail.", score)
    return story


def failed() -> Story:
    story = Story("researcher -> planner -> reviewer").answer("Found it.")
    return story.fail("No key for anthropic. Set ANTHROPIC_API_KEY before starting Jupyter.", detail=TRACE)


def stale() -> Story:
    """All but the last done, then the planner ran again: what builds on it is out of date."""
    story = Story("planner -> implementer -> reviewer? -> deployer")
    story.answer(PLAN_1).answer("Wrote it.").answer(REVIEW)
    return story.record(Rewound(to="planner")).go().answer(PLAN_2)


def edited() -> Story:
    """The person's own text counts; a second step was tried again unasked, and asked a question."""
    story = Story("planner? -> builder -> reviewer", engine="claude").answer(PLAN_1).decide("approve", output=PLAN_2)
    story.fail("rate limited", retry_in_s=4).go().ask("Which database?").decide("answer", "SQLite.")
    return story.answer("Built.", usage=Usage(input_tokens=900, output_tokens=300, estimated=True))


def many(count: int = 30, upto: int = 17) -> Story:
    story = Story([f"step-{number}" for number in range(1, count + 1)], name="long-haul")
    for number in range(1, upto):
        story.answer(f"Result {number}.", 1.0 + number / 3, tokens=300 + number)
    return story.after(2)


def long_names() -> Story:
    story = Story(
        "collect-requirements-from-every-stakeholder -> plan -> implement-the-backend-service-with-all-endpoints? -> "
        "quality-gate-for-the-backend(loop 2, max 3) -> deploy"
    )
    return story.answer("Collected.").answer("Planned.")


def hostile() -> Story:
    """Texts that attack whatever shows them, wherever a text can stand."""
    steps = [separator(HOSTILE), step("planner", interactive=True), "builder", separator(HOSTILE), "reviewer"]
    agents = [Agent(id=name, prompt=f"Work. {HOSTILE}") for name in ("planner", "builder", "reviewer")]
    story = Story(steps, name=HOSTILE, agents=agents)
    story.answer(HOSTILE, note=HOSTILE).decide("reject", HOSTILE, by=HOSTILE)
    story.answer(f"{HOSTILE}\n\n[x](javascript:alert(1))").decide("approve", output=HOSTILE, by=HOSTILE)
    story.answer(HOSTILE, verdict=Verdict(action="continue", reason=HOSTILE))
    story.fail(HOSTILE, detail=HOSTILE, retry_in_s=1).go()
    return story.ask(HOSTILE)


def team() -> Story:
    """Of three side by side one is done, one has failed, and one is at work."""
    story = Story("architect -> [frontend-dev | backend-dev | qa-engineer]? -> deployer", name="team-builder")
    return story.answer(PLAN_1).answer("Drew the page.").fail("No key for anthropic.", detail=TRACE).after(3)


def permission() -> Story:
    """A tool is to be called; another call of it was denied before."""
    story = Story("planner -> cleaner -> reviewer").calls("read_file", '{"path": "todo.py"}')
    story.told("read_file", "def add(db, text): ...").calls("run_agents", "{}").told("run_agents", "## qa").answer(
        PLAN_1
    )
    story.calls("remove", '{"path": "notes.md"}').permit("remove", path="notes.md", force=True)
    story.decide("reject", "not the notes").told("remove", "Refused by a person: not the notes", failed=True)
    story.calls("remove", f'{{"path": "build/{HOSTILE}"}}')
    return story.permit("remove", path=f"build/{HOSTILE}", why="It is made anew.")


SITUATIONS = {
    "permission": permission,
    "team": team,
    "waiting": waiting,
    "finished": finished,
    "recorded": recorded,
    "looping": looping,
    "exhausted": exhausted,
    "failed": failed,
    "stale": stale,
    "edited": edited,
    "many": many,
    "long-names": long_names,
    "hostile": hostile,
}
