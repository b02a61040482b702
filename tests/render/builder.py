"""Makes runs for the tests of the views: events applied to a ``RunState`` the way the loop of a real run does it.

A ``Story`` has a clock of its own that starts at noon UTC and moves only when told to.
"""

from __future__ import annotations

from typing import Any

from cm_notebook.events import (
    AnyEvent,
    Decision,
    ErrorInfo,
    GateDecided,
    RunResumed,
    RunStarted,
    TurnCutShort,
    TurnFailed,
    TurnFinished,
    TurnStarted,
    Usage,
)
from cm_notebook.prompts import digest, text_of
from cm_notebook.state import Record, RunState, StartTurn, apply, ask, next_actions
from cm_notebook.workflow import Agent, Verdict, Workflow

NOON = 1_700_049_600.0
HOSTILE = "<script>alert(1)</script>\"'&<img src=x onerror=alert(1)>\x1b[31m\u202e]]>--><!--\x00\ufffe%23#"


class Story:
    """A run that goes on event by event.

    Parameters
    ----------
    steps
        The arrow string, or a list of steps.
    engine
        Name of the engine that its turns say they ran on.
    recorded
        The name of a tape, for a run that plays one.
    **options
        Those of ``Workflow``.
    """

    def __init__(self, steps: Any, *, engine: str = "claude", recorded: str | None = None, name: str = "smart-builder", **options: Any):
        self.engine, self.now, self.lines, self.skew = engine, NOON, [], 1.0
        flow = Workflow(name=name, steps=steps, **{"agents": _agents(steps), **options})
        self.state = RunState()
        self.record(RunStarted(run_id="r-7f3a", workflow=flow.to_dict(), recorded=recorded))
        self.go()

    def record(self, event: AnyEvent) -> Story:
        from cm_notebook.render.text import event_line

        event.seq, event.at = self.state.seq + 1, self.now
        apply(self.state, event)
        if (line := event_line(self.state, event)) is not None:
            self.lines.append(line)
        return self

    def go(self) -> Story:
        """Do what is to be done, until a turn runs or a person is asked."""
        while actions := next_actions(self.state):
            for action in actions:
                if isinstance(action, Record):
                    self.record(action.event)
                    continue
                self._start(action)
        return self

    def _start(self, turn: StartTurn) -> None:
        if turn.not_before is not None:
            self.now = max(self.now, turn.not_before)
        text = text_of(turn.prompt + (turn.context or ()), self.state.texts)
        self.record(
            TurnStarted(
                step=turn.step.id,
                path=turn.step.path,
                attempt=turn.attempt,
                turn=turn.turn,
                iteration=turn.step.iteration,
                prompt=turn.prompt,
                context=turn.context,
                digest=digest(text),
                session_id=turn.session_id,
                engine=self.engine,
            )
        )

    @property
    def _turn(self) -> dict[str, Any]:
        step = next(iter(self.state.running.values()))
        return {"step": step.id, "path": step.path, "attempt": step.attempt, "turn": step.turn}

    def after(self, seconds: float) -> Story:
        """Time passes."""
        self.now += seconds * self.skew
        return self

    def answer(
        self,
        text: str,
        took: float = 4.6,
        *,
        tokens: int = 400,
        usd: float | None = 0.003,
        verdict: Verdict | None = None,
        note: str | None = None,
        estimated: bool = False,
        duration_s: float | None = None,
    ) -> Story:
        """The agent that runs has answered, and the run goes on."""
        self.after(took)
        usage = Usage(input_tokens=tokens - tokens // 4, output_tokens=tokens // 4, estimated=estimated) if tokens else None
        self.record(
            TurnFinished(**self._turn, text=text, usage=usage, cost_usd=usd, verdict=verdict, note=note, duration_s=duration_s)
        )
        return self.go()

    def says(self, action: Any, reason: str = "", score: float | None = None, text: str = "") -> Story:
        """The module that runs has given its verdict."""
        verdict = Verdict(action=action, reason=reason, score=score)
        return self.answer(text or reason or action, 1.2, tokens=0, usd=None, verdict=verdict)

    def fail(self, message: str, *, kind: str = "EngineAuthError", detail: str | None = None, retry_in_s: float | None = None) -> Story:
        """The turn that runs has failed."""
        self.after(0.4)
        self.record(TurnFailed(**self._turn, error=ErrorInfo(kind=kind, message=message, detail=detail), retry_in_s=retry_in_s))
        return self if retry_in_s is not None else self.go()

    def cut(self, reason: str) -> Story:
        self.after(0.4)
        return self.record(TurnCutShort(**self._turn, reason=reason))

    def resume(self, reason: str) -> Story:
        self.record(RunResumed(by="you", reason=reason))
        return self.go()

    def ask(self, question: str) -> Story:
        return self.record(ask(self.state, next(iter(self.state.running.values())), question))

    def decide(self, action: Any, feedback: str | None = None, *, by: str = "you", wait: float = 60, **more: Any) -> Story:
        """The oldest open gate is answered, and the run goes on."""
        self.after(wait)
        gate = next(iter(self.state.gates))
        self.record(GateDecided(gate_id=gate, decision=Decision(action=action, feedback=feedback, by=by, **more)))
        return self.go()


def _agents(steps: Any) -> list[Agent]:
    from cm_notebook.workflow import Separator, as_step, parse_steps

    items = parse_steps(steps) if isinstance(steps, str) else [as_step(1, item) for item in steps]
    names = dict.fromkeys(item.agent for item in items if not isinstance(item, Separator))
    return [Agent(id=name, prompt=f"Do the work of {name}.") for name in names]


# -- the situations that golden files and pictures show ---------------------------------------------------------------

PLAN_1 = "1. Create `todo.py` with add and list\n2. Write tests later\n"
PLAN_2 = "1. Create `todo.py` with add, list and done\n2. Write `tests/test_todo.py` first\n3. Run `pytest -q`\n"
REVIEW = "## Review\n\nTests pass (7/7). One nit: `done` accepts ids that do not exist.\n\n| check | result |\n|---|---|\n| tests | 7 passed |\n| lint | clean |\n"


def waiting(**options: Any) -> Story:
    """Three steps done, one of them after a rejection; the reviewer waits."""
    story = Story("researcher -> planner? -> implementer -> reviewer? -> deployer", **options)
    taped = (lambda s: {"duration_s": s}) if options.get("recorded") else (lambda s: {})
    by = "tape" if options.get("recorded") else "you"
    story.answer("# Findings\n\n- Storage: **SQLite** in WAL mode\n- 3 endpoints needed\n", 6.2, tokens=900, usd=0.004, **taped(6.2))
    story.answer(PLAN_1, 7.4, tokens=700, usd=0.004, **taped(7.4))
    story.decide("reject", "Name the tests now, and add `done`.", by=by)
    story.answer(PLAN_2, 7.4, tokens=900, usd=0.004, **taped(7.4)).decide("approve", by=by)
    story.answer("Wrote 2 files.\n\n```python\ndef add(db, text): ...\n```\n", 12.4, tokens=1200, usd=0.006, **taped(12.4))
    return story.answer(REVIEW, 4.6, tokens=400, usd=0.003, **taped(4.6))


def finished(**options: Any) -> Story:
    by = "tape" if options.get("recorded") else "you"
    story = waiting(**options).decide("approve", by=by)
    taped = {"duration_s": 2.1} if options.get("recorded") else {}
    return story.answer("Released **v0.1.0**.", 2.1, tokens=200, usd=0.001, **taped)


def looping() -> Story:
    """The third pass of a loop runs."""
    story = Story("planner -> implementer -> quality-gate(loop 1, max 5) -> deployer", name="quality-first")
    story.answer(PLAN_2).answer("First try.\n", 9.0, tokens=800).says("loop", "2 of 7 tests fail: `done` is missing.", 0.52)
    return story.answer("Second try, with `done`.\n", 8.0, tokens=800).says("loop", "1 of 7 tests fails.", 0.71).after(3)


def exhausted() -> Story:
    story = Story("planner -> implementer -> quality-gate(loop 1, max 2) -> deployer", name="quality-first")
    story.answer(PLAN_2)
    for score in (0.52, 0.71, 0.74):
        story.answer(f"A try that reaches {score}.\n").says("loop", "Tests still fail.", score)
    return story


def failed() -> Story:
    story = Story("researcher -> planner -> reviewer")
    trace = 'Traceback (most recent call last):\n  File "claude.py", line 12, in stream\nRuntimeError: HTTP 401'
    return story.answer("Found it.").fail("No key for anthropic. Set ANTHROPIC_API_KEY before starting Jupyter.", detail=trace)


def stale() -> Story:
    """All done, then the planner ran again: what builds on it is out of date."""
    from cm_notebook.events import Rewound

    story = Story("planner -> implementer -> reviewer? -> deployer")
    story.answer(PLAN_1).answer("Wrote it.").answer(REVIEW)
    return story.record(Rewound(to="planner")).go().answer(PLAN_2)


def many(count: int = 30, upto: int = 17) -> Story:
    steps: list[Any] = [f"step-{number}" for number in range(1, count + 1)]
    story = Story(steps, name="long-haul")
    for number in range(1, upto):
        story.answer(f"Result {number}.", 1.0 + number / 3, tokens=300 + number)
    return story.after(2)


def long_names() -> Story:
    return Story(
        "collect-requirements-from-every-stakeholder -> plan -> implement-the-backend-service-with-all-endpoints? -> "
        "quality-gate-for-the-backend(loop 2, max 3) -> deploy"
    ).answer("Collected.").answer("Planned.")


def hostile() -> Story:
    """Texts that attack whatever shows them, wherever a text can stand."""
    from cm_notebook.workflow import separator, step

    story = Story(
        [separator(HOSTILE), step("planner", interactive=True), "builder", separator(HOSTILE), "reviewer"],
        name=HOSTILE,
        agents=[Agent(id=name, prompt=f"Work. {HOSTILE}") for name in ("planner", "builder", "reviewer")],
    )
    story.answer(HOSTILE, note=HOSTILE).decide("reject", HOSTILE, by=HOSTILE).answer(f"{HOSTILE}\n\n[x](javascript:alert(1))")
    story.decide("approve", output=HOSTILE, by=HOSTILE)
    story.answer(HOSTILE, verdict=Verdict(action="continue", reason=HOSTILE))
    story.fail(HOSTILE, detail=HOSTILE, retry_in_s=1).go()
    story.ask(HOSTILE)
    return story


SITUATIONS = {
    "waiting": waiting,
    "finished": finished,
    "looping": looping,
    "exhausted": exhausted,
    "failed": failed,
    "stale": stale,
    "many": many,
    "long-names": long_names,
    "hostile": hostile,
}
