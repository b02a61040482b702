"""One step of a run, for those who look: its result, its attempts, what changed between them.

Strategy: nothing is kept here; everything is read from the run's state when it is asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .errors import GatePending, TransitionError, typed
from .events import FileChange, Gate, Usage
from .runstate import Attempt, StepState, standing, status_word
from .state import prompt_of

if TYPE_CHECKING:
    from .run import Run


def _decide(gate: Gate) -> str:
    """What to do about `gate`: its first action is the one that goes on."""
    first = gate.actions[0]
    words = "'…'" if first == "answer" else ""
    return typed(
        f"Decide here (or `%cm {first}{' …' if words else ''}`), then run this cell again.",
        f"Decide in another terminal: cm-notebook {first} {gate.id.partition('/')[0]}{' --text …' if words else ''}",
        f"Decide first: run.{first}({words}).",
    )


class StepView:
    """One step of a run: what it said, and how it came to that. ``run["planner"]`` is one.

    It keeps nothing: each attribute says how things stand when it is asked for.

    Attributes
    ----------
    text, output
        What later steps see, and the validated value, if its agent gives one. Both raise ``GatePending`` until they are
        decided.
    status
        How it stands, in a word.
    attempts
        What was tried, oldest first: an :class:`Attempt` each.
    prompt
        The exact text that its agent got, or gets next.
    usage, cost_usd
        Tokens and US dollars of all its attempts; ``team_usage`` and ``team_cost_usd`` have those of the agents that it
        called, too.
    duration_s
        Seconds that the last attempt took.
    files_changed
        What the last attempt changed in the workspace.
    """

    def __init__(self, run: Run, path: str) -> None:
        self.run, self.path = run, path

    @property
    def id(self) -> str:
        """The step's id; of an agent that another one called, that agent's."""
        with self.run.reading():
            return self._step.id

    @property
    def members(self) -> list[StepView]:
        """The agents that it called, or that work in it, in that order."""
        with self.run.reading():
            return [StepView(self.run, member.path) for member in self._step.members]

    @property
    def _step(self) -> StepState:
        return self.run._driver.state.find(self.path)

    @property
    def status(self) -> str:
        """How it stands, in a word.

        ``pending, queued, running, asks you, waits for its team, tries again, waiting`` (for a decision)``, goes back,
        done`` or ``skipped``; where the run has ended at it also ``failed`` or ``not decided``.
        """
        with self.run.reading() as state:
            return status_word(state, self._step)

    @property
    def retry_at(self) -> float | None:
        """When it is tried again by itself, in Unix seconds; ``None`` while it is not about to be."""
        with self.run.reading():
            step = self._step
            return step.retry_at if step.status == "retrying" else None

    @property
    def stale(self) -> bool:
        """Whether something it builds on has changed since."""
        with self.run.reading():
            return self._step.stale

    @property
    def attempts(self) -> list[Attempt]:
        """Its attempts, oldest first."""
        with self.run.reading():
            return list(self._step.attempts)

    @property
    def text(self) -> str:
        """The output that later steps see; ``""`` when it was skipped.

        Raises
        ------
        GatePending    Its gate is undecided, or it has not run yet.
        """
        with self.run.reading() as state:
            step = self._settled()
            return state.text(step.approved)

    @property
    def output(self) -> Any:
        """The validated value, as JSON-ready data; ``None`` when the agent gave only text, or was skipped.

        Raises
        ------
        GatePending    As for :attr:`text`.
        """
        with self.run.reading():
            step = self._settled()
            return step.attempts[-1].output if step.approved is not None and step.attempts else None

    def _settled(self) -> StepState:
        step = self._step
        if step.gate is not None:
            raise GatePending(
                f'"{step.id}" is waiting for your decision. {_decide(step.gate)}',
                gate=step.gate,
                run=self.run,
            )
        if step.status not in ("finished", "skipped"):
            opened = next(iter(self.run._driver.state.gates.values()), None)
            if opened is not None:
                raise GatePending(
                    f'"{step.id}" has no result yet: "{opened.step}" is waiting for your decision. {_decide(opened)}',
                    gate=opened,
                    run=self.run,
                )
            if (ended := self.run._driver.state.ended) is not None:
                raise GatePending(
                    f'"{step.id}" has no result: the run is {ended}. '
                    f"Go on with it: `%cm run`, or {self.run._driver.resuming()}.",
                    run=self.run,
                )
            raise GatePending(self._not_yet(step), run=self.run, step=step.id)
        return step

    def _not_yet(self, step: StepState) -> str:
        """Why there is no result, no gate being open, and what to do about it; true in a cell and in a script."""
        state = self.run._driver.state
        at_work = [f'"{other.id}"' for other in state.running.values() if other.id != step.id]
        then = "When it has one, run this cell again"
        if at_work and step.status == "pending":
            why = f"has no result yet: {', '.join(at_work)} {'is' if len(at_work) == 1 else 'are'} running"
            then = "Decide there, then run this cell again"
        elif state.paused and step.status == "pending":
            why, then = "has no result yet: the run is paused", "Go on (`%cm run`), then run this cell again"
        else:
            why = f"has no result yet: it {standing(state, step)}"
        return f'"{step.id}" {why}. {then}; a script waits first: `run.wait()`.'

    @property
    def prompt(self) -> str:
        """The exact prompt: where its turn is next, the one that would be sent now; else that of the last attempt.

        Of a step that the run has not come to yet it is the template, as earlier outputs are still to come.
        """
        with self.run.reading() as state:
            return prompt_of(state, self._step, self.run._work.engine_name)

    @property
    def files_changed(self) -> list[FileChange]:
        """The files of the workspace that the last attempt changed, by their paths; of very many, the first.

        Each has ``path``, ``kind`` (``added, deleted, modified, renamed, mode``), ``old_path``, and of texts the lines
        ``added`` and ``removed``. What changed in them: ``run["step"].attempts[-1].diff``.
        """
        attempts = self.attempts
        return list(attempts[-1].files_changed) if attempts else []

    @property
    def usage(self) -> Usage:
        """Tokens of all its attempts together."""
        return sum((attempt.usage for attempt in self.attempts if attempt.usage is not None), Usage())

    @property
    def cost_usd(self) -> float:
        """US dollars of all its attempts together."""
        return sum(attempt.cost_usd or 0.0 for attempt in self.attempts)

    @property
    def team_usage(self) -> Usage:
        """Tokens of all its attempts and of all agents that it called, and that those called."""
        return sum((member.team_usage for member in self.members), self.usage)

    @property
    def team_cost_usd(self) -> float:
        """US dollars of the same."""
        return sum((member.team_cost_usd for member in self.members), self.cost_usd)

    @property
    def duration_s(self) -> float | None:
        """Seconds that the last attempt took, waiting for a person not counted."""
        attempts = self.attempts
        return attempts[-1].duration_s if attempts else None

    def diff(self, a: int = -2, b: int = -1) -> str:
        """What changed in its output from attempt `a` to `b` (1, 2 …, or counted from the end), as a unified diff.

        What an attempt changed in the files of the workspace is its own ``diff``: ``run["step"].attempts[-1].diff``.

        Raises
        ------
        TransitionError    There is no such attempt.
        """
        from .render import diff

        old, new = self.attempt(a), self.attempt(b)
        return diff.text(old.text, new.text)

    def attempt(self, number: int = -1) -> Attempt:
        """The attempt of that number: 1 is the first, -1 the last."""
        attempts = self.attempts
        for place, candidate in enumerate(attempts):
            if number in (candidate.number, place - len(attempts)):
                return candidate
        made = ", ".join(str(candidate.number) for candidate in attempts) or "none"
        raise TransitionError(f"step {self.id!r} has no attempt {number}. Attempts: {made}.")

    def __repr__(self) -> str:
        return f"<Step {self.path}: {self.status}>"

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        from .render import html, text

        with self.run.reading() as state:
            return {"text/plain": text.show_text(state, self._step), "text/html": html.run_html(state, [self.path])}
