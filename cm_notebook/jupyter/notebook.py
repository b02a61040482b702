"""What the cells of a notebook have said so far, and what running one of them means for the run.

Strategy: one ``Notebook`` a kernel. It keeps only what a run cannot know: how the workflow was named (``Plan``), what
cells have defined, and how far they let the run go. Everything else is asked of the run, which is found again in the
journal after a kernel restart. A cell that runs again is one of the rows of ``UX.md`` §1a, and each row is one call:

    the run lives here                →  run.go_on(workflow as it is now, until=…, again=…)
    it was found in the journal       →  resume(…, until=…), so that nothing starts whose cell has not been run
    there is none, or it is completed →  Run.start(…)

``until`` is the last step whose cell has been run in this kernel. Nothing here prints or displays.

The current workflow is that of the last ``%cm workflow`` cell, and the current run is that workflow's (or one started
since, from Python, which the cells go on with when they are to go on and it is paused or stopped). The run of another
workflow is *left*: it goes on by itself, its gates can be decided by the names
of their steps, and its workflow's cell, or ``%cm resume``, goes back to it.
"""

from __future__ import annotations

import contextlib
import numbers
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from .. import edits
from .. import run as runs
from ..config import setting
from ..errors import CodeMachineError, RunLocked, TransitionError, WorkflowError, did_you_mean
from ..events import Gate
from ..journal import AnyJournal, begun_like, open_journal
from ..prompts import Hole, check_read, check_templates, holes, step_names
from ..render import text
from ..run import Run
from ..runstate import RunState, StepState
from ..starting import check_options, checked_limits
from ..state import state_of
from ..waiting import OnWaiting
from ..workflow import LIMITS, RESERVED, Agent, AnyStep, AutonomousMode, Separator, Step, Workflow, limits_of
from . import bridge

_CHANGES = (*LIMITS, "on_waiting")
"""Options that a run takes at any time."""


@dataclass(slots=True)
class Plan:
    """A workflow as the cells describe it; the steps themselves are in the run as soon as there is one."""

    name: str
    autonomous_mode: AutonomousMode = True
    inputs: dict[str, Any] = field(default_factory=dict)
    sub_agents: list[str] = field(default_factory=list)
    engine: str | None = None
    tape: str | None = None
    record: str | None = None
    workspace: str | None = None
    max_cost_usd: float | None = None
    max_tokens: int | None = None
    max_turns: int | None = None
    body: list[AnyStep] | None = None
    """The steps that the workflow's own cell writes down; ``None``: step cells bring them."""
    placed: dict[str, tuple[Step, str | None]] = field(default_factory=dict)
    """Steps defined by cells of their own, by id, and behind which step they want to stand."""

    def steps(self, before: Iterable[AnyStep]) -> list[AnyStep]:
        """The steps in order: those of the body, else those there were `before`, with what cells define since."""
        made = list(self.body) if self.body is not None else list(before)
        for item, after in self.placed.values():
            place = _place(made, item.id)
            behind = _place(made, after) if after is not None else None  # it may have been taken out since
            if place is not None:
                made[place] = item
            elif behind is not None:
                made.insert(behind + 1, item)
            else:
                made.append(item)
        return made

    def played(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Which tapes a run plays and writes: `options` come before what the workflow's cell says.

        To record again the tape that the workflow plays, it is not played.
        """
        given = {"tape": self.tape, "record": self.record, **options}
        if "record" in options and "tape" not in options and _same_file(self.tape, options["record"]):
            given["tape"] = None
        return given


class Left(NamedTuple):
    """An unfinished run whose workflow is not the current one, and what cells had said about it."""

    run: Run
    plan: Plan | None
    seen: set[str]
    allowed: set[str]
    since: float
    given: dict[str, Any]

    def words(self) -> str:
        """That it is there, and how to get back to it."""
        with self.run.reading() as state:
            at = ", ".join(gate.step for gate in state.gates.values())
            how = f"waits at {at}" if at else f"is {state.status}"
            return f"Run {self.run.id} of {state.name} still {how}: `%cm resume {self.run.id}` goes back to it."


def _same_file(one: str | None, other: str | None) -> bool:
    return one is not None and other is not None and Path(one).resolve() == Path(other).resolve()


def _place(items: list[AnyStep], id: str) -> int | None:
    return next((n for n, item in enumerate(items) if not isinstance(item, Separator) and item.id == id), None)


class Notebook:
    """What this kernel's cells have said.

    Parameters
    ----------
    variables
        Gives the notebook's variables.
    """

    def __init__(self, variables: Callable[[], Mapping[str, Any]] = dict) -> None:
        self.variables = variables
        self.plan: Plan | None = None
        self.run: Run | None = None
        """The run that the cells build; it was started or taken up in this kernel."""
        self.found: Run | None = None
        """A run of an earlier kernel, as the journal has it; nobody drives it yet."""
        self.left: dict[str, Left] = {}
        """By the run's id, the last one left last."""
        self.cell_agents: dict[str, Agent] = {}
        self.since = 0.0
        """When the run was started or taken up here, in seconds since the epoch."""
        self._looked = False
        self._seen: set[str] = set()
        self._allowed: set[str] = set()
        self._given: dict[str, Any] = {}
        """The options that the run was started or taken up with."""

    # -- what there is -------------------------------------------------------------------------------------------------

    @property
    def agents(self) -> dict[str, Agent]:
        """The agents of ``%%cm agent`` cells, and those among the notebook's variables."""
        named = [value for name, value in self.variables().items() if not name.startswith("_")]
        return {**{value.id: value for value in named if isinstance(value, Agent)}, **self.cell_agents}

    def current(self) -> Run:
        """The run that is looked at and decided: that of the current workflow, here or in the journal.

        Raises
        ------
        TransitionError    There is none.
        """
        try:
            return runs.current()
        except TransitionError:
            if self.found is None and not self._looked:
                self.found = self._last_run(self.plan.name if self.plan is not None else None)
            if self.found is not None:
                return self.found
            if self.plan is None:
                raise TransitionError("there is no run yet. Begin with `%cm workflow NAME`.") from None
            start = "`%cm run` starts it." if self.items() else "Add a step: `%%cm step NAME`, its prompt below."
            raise TransitionError(f"{self.plan.name} has no run yet. {start} {self.left_words()}".strip()) from None

    def deciding(self, step: str | None) -> Run:
        """The run in which `step` is decided: the current one, or one that was left if only that has a gate there."""
        others = [
            left.run for left in self.left.values() if any(step in (gate.step, gate.path) for gate in left.run.gates)
        ]
        try:
            run = self.current()
        except TransitionError:
            if len(others) != 1:
                raise
            return others[0]
        with run.reading() as state:
            known = step in {*state.steps, *state.members, *(gate.step for gate in state.gates.values())}
        return others[0] if len(others) == 1 and not known else run

    def left_words(self) -> str:
        """Which other run is unfinished and how to get back to it; of several, the last one that was left."""
        unfinished = [left for left in self.left.values() if left.run.state.ended is None]
        if not unfinished:
            return ""
        more = f" And {len(unfinished) - 1} more: `%cm runs`." if len(unfinished) > 1 else ""
        return unfinished[-1].words() + more

    def run_ids(self) -> list[str]:
        """The ids of the journal's runs, newest first."""
        journal = self._journal()
        return [info.id for info in journal.runs()] if journal is not None else []

    def may_decide(self, gate: Gate) -> None:
        """Refuse a decision whose cell was asked for before anybody could see what it decides (Run All).

        Raises
        ------
        TransitionError    It was.
        """
        if bridge.asked_at() < max(gate.opened_at, self.since):
            raise TransitionError(
                f"nothing was decided: {gate.step!r} came to its gate only after this cell had been asked for, so "
                "nobody can have seen what it decides. Look at it, then run this cell again."
            )

    # -- the workflow's own cell ---------------------------------------------------------------------------------------

    def define(self, plan: Plan, *, new: bool = False) -> list[str]:
        """Take the workflow as its cell says it.

        Returns
        -------
        list of str
            Sentences about what becomes of the run there was.

        Raises
        ------
        WorkflowError    The run there was does not fit it; nothing was changed.
        """
        check_options(engine=plan.engine, tape=plan.tape, record=plan.record, workspace=plan.workspace)
        kept, current = dict(vars(self)), self._started()
        try:
            return self._define(plan, new or not bridge.somebody())
        except CodeMachineError:
            vars(self).update(kept)
            runs.set_current(current)
            raise

    def _define(self, plan: Plan, new: bool) -> list[str]:
        same = self.plan is not None and self.plan.name == plan.name
        if new or not same:
            self._leave()
        if not new and not same:
            self._go_back(plan.name)
        before = self.plan
        fixed: list[str] = []
        if plan.body is not None:
            _drawn(plan, plan.body)
        if new:
            self._forget(looked=True)
        elif self.run is None:
            self._forget()
            self.found = self._last_run(plan.name)
            self._looked = True
        elif self.run.status == "completed":
            self._forget(looked=True)
        elif before is not None and before.name == plan.name:
            plan.placed = before.placed
            self._revise(plan)
            kept = ("engine", "tape", "record", "workspace")
            fixed = [name for name in kept if getattr(plan, name) != getattr(before, name)]
        self.plan = plan
        if self.run is not None and (other := self._started()) is not self.run:
            self._note(other)
            runs.set_current(self.run)
        return self._kept_words(plan, fixed)

    @staticmethod
    def _started() -> Run | None:
        with contextlib.suppress(TransitionError):
            return runs.current()
        return None

    def _leave(self) -> None:
        """Turn to another run: what is unfinished of the cells' run, and of one started since, is kept in mind."""
        self._note(self.run)
        self._note(self._started())
        runs.set_current(None)
        self.run = None

    def _note(self, run: Run | None) -> None:
        if run is None or run.state.ended is not None or run.id in self.left:
            return
        said = (self.plan, self._seen, self._allowed) if run is self.run else (None, set[str](), set[str]())
        given = self._given if run is self.run else {}
        self.left = {**self.left, run.id: Left(run, *said, self.since, given)}

    def _go_back(self, name: str) -> None:
        """Take up the run of that workflow which was left last, with what cells had said about it."""
        for left in reversed(list(self.left.values())):
            if left.run.state.name == name and left.run.state.ended is None:
                self._return(left)
                return

    def _return(self, left: Left) -> None:
        self.left = {id: other for id, other in self.left.items() if id != left.run.id}
        self.run, self.found, self._looked, self.plan = left.run, None, True, left.plan
        self._seen, self._allowed, self.since, self._given = left.seen, left.allowed, left.since, left.given
        runs.set_current(left.run)

    def _forget(self, *, looked: bool = False) -> None:
        self.run = self.found = None
        self._seen, self._allowed, self._looked = set(), set(), looked

    def _revise(self, plan: Plan) -> None:
        """Give the living run what its workflow's cell says now; one that has ended gets it when it goes on."""
        run = self.run
        if run is None or run.state.ended is not None:
            return
        old = self.plan
        self.plan = plan
        try:
            run.revise(self._workflow(run), plan.inputs)
        except CodeMachineError:
            self.plan = old
            raise

    def _kept_words(self, plan: Plan, fixed: list[str]) -> list[str]:
        run = self.run or self.found
        if run is None:
            return []
        stands = run.status if run.status != "running" or run.driven else text.undriven("running")
        words = [f"{plan.name} goes on with its run {run.id}, which is {stands}."]
        if fixed:
            words.append(f"It keeps its {', '.join(fixed)}; with --new another run begins.")
        return words

    # -- step cells ----------------------------------------------------------------------------------------------------

    def place(self, item: Step, after: str | None = None) -> Literal["added", "replaced", "kept"]:
        """Add a step, or define it anew, without running it: it counts when something runs next.

        Returns
        -------
        str
            What happened: there may have been such a step, and it may have been the same.

        Raises
        ------
        WorkflowError    It cannot stand there; nothing was changed.
        """
        plan, items = self._planned(), self.items()
        there = next((other for other in items if not isinstance(other, Separator) and other.id == item.id), None)
        known = [other.id for other in items if not isinstance(other, Separator) and other is not there]
        if after is not None and after not in known:
            raise WorkflowError(f"--after {after!r} is not a step. {did_you_mean(after, known, 'Steps')}")
        with self._kept_plan(plan):
            plan.placed[item.id] = (item, after)
            _drawn(plan, self.items())
        return "added" if there is None else "kept" if there == item else "replaced"

    def items(self) -> list[AnyStep]:
        """The steps as cells say them now, with those of the run if there is one; whatever they are, this works."""
        run = self._last()
        return self._planned().steps(run.state.items if run is not None else ())

    @staticmethod
    @contextlib.contextmanager
    def _kept_plan(plan: Plan) -> Iterator[None]:
        """What is said about the steps counts only if nothing is wrong with it."""
        placed, body = dict(plan.placed), plan.body
        try:
            yield
        except CodeMachineError:
            plan.placed, plan.body = placed, body
            raise

    def run_step(self, item: Step, after: str | None = None) -> Run:
        """Run a step as its cell says it now, or whatever UX.md §1a says instead.

        Returns
        -------
        Run
            The run, in which the step runs, waits its turn, or is shown as it was.

        Raises
        ------
        CodeMachineError    It cannot run like this; nothing was changed.
        """
        with self._kept_plan(self._planned()):
            self.place(item, after)
            run = self._run_to([item.id], [item], cell=item)
        self._seen.add(item.id)
        return run

    def remove(self, step: str) -> Run | None:
        """Take a step out of the workflow, and of its run if there is one."""
        plan = self._planned()
        run = self._last()
        if run is not None and run is self.found:
            raise TransitionError(
                f"run {run.id!r} is not taken up yet. Run a cell of one of its steps, or `%cm run`, "
                f"and remove {step!r} then."
            )
        items = self.items()
        known = [item.id for item in items if not isinstance(item, Separator)]
        if step not in known:
            raise WorkflowError(f"there is no step {step!r}. {did_you_mean(step, known, 'Steps')}")
        with self._kept_plan(plan):
            plan.placed.pop(step, None)
            if plan.body is not None:
                plan.body = [item for item in plan.body if isinstance(item, Separator) or item.id != step]
            if run is not None and step in run.state.steps:
                run.remove(step)
            else:
                _drawn(plan, self.items())
        for names in (self._seen, self._allowed):
            names.discard(step)
        return run

    # -- going on ------------------------------------------------------------------------------------------------------

    def _turn_to_shown(self) -> None:
        """A run from Python that somebody has to go on with, or the only one there is, is what the cells go on with."""
        started = self._started()
        if started is None or started is self.run or started.status == "completed":
            return
        if started.status in ("paused", "stopped") or self.plan is None:
            self._last()  # it may be theirs: resumed, or a fork
            if self.run is not started:
                self._follow(started)

    def go(
        self,
        *,
        until: str | None = None,
        again: str | None = None,
        inputs: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Run:
        """Start the workflow, or go on with its run.

        Parameters
        ----------
        until
            Pause when this step is done; ``None``: no limit.
        again
            Make this step and all after it again.
        inputs
            Values of template names, over the workflow's.
        **options
            ``engine, tape, record, workspace, on_gate`` of ``Workflow.start``, for a run that is started or taken up;
            and ``max_cost_usd, max_tokens, max_turns``, what it may use in all, and ``on_waiting``, from now on.
        """
        self._turn_to_shown()
        plan = self._planned()
        check_options(**{name: value for name, value in options.items() if name not in LIMITS})
        checked_limits(**{name: value for name, value in options.items() if name in LIMITS})
        before = plan.inputs
        if inputs:
            plan.inputs = {**plan.inputs, **inputs}
        try:
            return self._go(plan, until, again, [*(inputs or ())], options)
        except CodeMachineError:
            plan.inputs = before
            raise

    def _go(
        self, plan: Plan, until: str | None, again: str | None, given: list[str], options: Mapping[str, Any]
    ) -> Run:
        run = self._last()
        items = plan.steps(run.state.items if run is not None else ())
        ids = [item.id for item in items if not isinstance(item, Separator)]
        if run is not None and run.status == "completed" and again is None and set(ids) <= set(run.state.steps):
            plan.body = items  # nothing is left to do: the same once more
            self._forget(looked=True)
        if not ids:
            raise WorkflowError(_empty(plan))
        for name, value in (("--until", until), ("--from", again)):
            if value is not None and value not in ids:
                raise WorkflowError(f"{name} {value!r} is not a step. {did_you_mean(value, ids, 'Steps')}")
        reach = ids if until is None else ids[: ids.index(until) + 1]
        return self._run_to(reach, items, exactly=until is not None, again=again, given=given, **options)

    def next(self) -> tuple[Run, str]:
        """Run exactly one step; returns the run and the step's id.

        Raises
        ------
        TransitionError    There is no step left.
        """
        self._turn_to_shown()
        run, items = self._last(), self.items()
        ids = [item.id for item in items if not isinstance(item, Separator)]
        current = run.state.current if run is not None else None
        done = run.state.steps if run is not None else {}
        if not ids:
            raise WorkflowError(_empty(self._planned()))
        id = current.id if current is not None else next((id for id in ids if id not in done), None)
        if id is None:
            raise TransitionError(f"{self._planned().name} has no step left. Add one, or start anew: `%cm run`.")
        return self._run_to(ids[: ids.index(id) + 1], items, exactly=True, once=True), id

    def take_up(self, run_id: str, on_waiting: OnWaiting | None = None) -> Run:
        """Go on with a run of the journal, by its id."""
        if run_id not in self.left:
            run_id = self._meant(run_id)
        here = self.left.get(run_id)
        return self._take(here.run if here is not None else Run.open(run_id), on_waiting=on_waiting)

    def _take(self, found: Run, rewind: str | None = None, on_waiting: OnWaiting | None = None) -> Run:
        """The cells go on with this run; with `rewind` it goes back to before that step, and waits there."""
        run_id, here = found.id, self.left.get(found.id)
        self._check_functions(found.state)
        mine = here.plan if here is not None else self.plan
        plan = mine if mine is not None and mine.name == found.state.name else _plan_of(found.state)
        before = self._started()
        if here is not None and found.state.ended is None:
            run = found.go_on(on_waiting=on_waiting)
        else:
            agents = [agent for agent in self.agents.values() if agent.id in found.state.agents]
            played = plan.played({})
            run = runs.resume(run_id, agents=agents, engine=plan.engine, on_waiting=on_waiting, rewind=rewind, **played)
        if before is not None and before is not run:
            runs.set_current(before)
            self._leave()
        self._forget(looked=True)
        self.left = {id: left for id, left in self.left.items() if id != run_id}
        self.plan = plan
        self.run, self.since, self._given = run, time.time(), {}
        self._allowed = set(run.state.steps)
        runs.set_current(run)
        return run

    def rewind(self, step: str, run_id: str | None = None) -> Run:
        """Go back to before a step of the current run, or of that run of the journal, and wait there.

        Raises
        ------
        CodeMachineError    It cannot go back there; nothing was changed.
        """
        run = self._last() if run_id is None and self._started() is None else self.named(run_id)
        if run is None:
            return self.current().rewind(step)  # which says that there is none
        if run is self.found:
            return self._resume(run, self._workflow(run), None, {}, rewind=step)
        if run._driver.loop is None:
            return self._take(run, rewind=step)
        run.rewind(step)
        self._turn_to_shown()
        return run

    def fork(self, step: str, run_id: str | None = None, **options: Any) -> Run:
        """A fork of the current run, or of that run of the journal, which the cells go on with.

        `options` are those of :meth:`Run.fork`.
        """
        parent = self.named(run_id)
        if parent is self.found:
            self._check_functions(parent.state)
        agents = [agent for agent in self.agents.values() if agent.id in parent.state.agents]
        mine = self.plan if self.plan is not None and self.plan.name == parent.state.name else None
        given = {name: options.get(name) for name in ("engine", "tape")}
        if mine is not None and parent._driver.loop is None and not any(given.values()):
            given = {"engine": mine.engine, "tape": mine.tape}
        with_ = {**options, **{name: value for name, value in given.items() if value is not None}}
        fork = parent.fork(step, agents=agents, notebook=bridge.notebook_key(), **with_)
        self._follow(fork)
        return fork

    def named(self, run_id: str | None) -> Run:
        """The run of that id, here or in the journal, or in the variable of that name; the current one without it."""
        if run_id is None:
            return self.current()
        if isinstance(variable := self.variables().get(run_id), Run):
            return variable
        here = [run for run in (self.run, *(left.run for left in self.left.values())) if run is not None]
        known = {run.id: run for run in here}
        if run_id not in known:
            run_id = self._meant(run_id)
        return known.get(run_id) or Run.open(run_id)

    def _meant(self, word: str) -> str:
        """The id of the run that is meant; its beginning is enough where no other begins so."""
        known = self.run_ids()
        meant = begun_like(known, word)
        if len(meant) == 1:
            return meant[0]
        if meant:
            raise TransitionError(f"{word!r} begins the ids of several runs: {', '.join(meant)}. Type more of it.")
        raise TransitionError(f"there is no run {word!r}. {did_you_mean(word, known, 'Runs')}")

    def _follow(self, run: Run) -> None:
        """The cells go on with `run`: if it is a fork, with what they said about the one that it was forked from."""
        mine = self.plan is not None and self.plan.name == run.state.name and run.state.origin is not None
        plan = self.plan if mine and self.plan is not None else _plan_of(run.state)
        seen, allowed = (self._seen, self._allowed) if mine else (set[str](), set(run.state.steps))
        runs.set_current(None)
        self._note(self.run)
        self._forget(looked=True)
        self.plan = replace(plan, inputs=dict(plan.inputs), placed=dict(plan.placed))
        self.run, self.since, self._given = run, time.time(), {}
        self._seen, self._allowed = set(seen), set(allowed)
        runs.set_current(run)

    # -- inside --------------------------------------------------------------------------------------------------------

    def _planned(self) -> Plan:
        """The plan; a notebook that has not named its workflow has one of the notebook's name."""
        if self.plan is None:
            path = Path(bridge.notebook_key())
            name = path.stem if path.suffix == ".ipynb" else "notebook"
            last = self._last_run(None)
            if last is not None and last.state.name != name:
                other = last.state.name
                raise WorkflowError(
                    f"the cell of the workflow comes first: this notebook has a run of {other!r}, which is "
                    f"{last.status}. Run the cell with `%cm workflow {other}`, then this one."
                )
            self.plan = Plan(name)
        return self.plan

    def _last(self) -> Run | None:
        """The run that cells go on with: the one of this kernel, else the one that was found."""
        if self.run is None and self.found is None and not self._looked:
            self.found, self._looked = self._last_run(self._planned().name), True
        started = self._started()
        if self.run is not None and started is not None and started is not self.run:
            origin = started.state.origin
            if started.id == self.run.id:  # resumed in Python
                self.run = started
            elif origin is not None and origin.run == self.run.id:  # forked in Python
                self._follow(started)
        return self.run or self.found

    def _journal(self) -> AnyJournal | None:
        where = setting("journal")
        return open_journal(where) if where != ":memory:" and Path(where).exists() else None

    def _last_run(self, name: str | None) -> Run | None:
        """The last run of this notebook (and of that workflow), if it is unfinished; headless there is none."""
        journal = self._journal()
        if journal is None or not bridge.somebody():
            return None
        key = bridge.notebook_key()
        for info in journal.runs():
            if info.notebook == key and name in (None, info.name):
                run = Run.open(info.id, journal)
                return None if run.status == "completed" else run
        return None

    def _run_to(
        self,
        reach: list[str],
        touched: list[AnyStep],
        *,
        exactly: bool = False,
        once: bool = False,
        cell: Step | None = None,
        again: str | None = None,
        given: Iterable[str] = (),
        **options: Any,
    ) -> Run:
        """Let the run go as far as `reach`, no further if `exactly`, and if `once` not even back in a loop.

        The notebook's variables are read for the steps that are `touched`; `cell` is the step whose cell is run;
        `given` names the inputs of this very call.
        """
        run, plan = self._last(), self._planned()
        if run is not None and (back := run.state.steps.get(run.state.back_at or "")) is not None:
            # what cells had allowed after it was allowed before somebody went back
            self._allowed = {step.id for step in run.state.order[: back.index]} & self._allowed
        allowed = set(reach) if exactly else self._allowed | set(reach)
        named = [item for item in touched if not isinstance(item, Separator) and not item.prompt]
        for agent in (agent for item in named for agent in item.agents):
            self.check_agent(agent)
        workflow = self._fresh(touched) if run is None else self._workflow(run, touched)
        self._check_inputs(plan, workflow, given)
        if run is not None and run is not self.found:
            self._check_kept(run, {name: value for name, value in options.items() if name not in _CHANGES})
        limit = _limit([item.id for item in workflow.executable], allowed)
        if run is None:
            with_ = {"workspace": plan.workspace, **plan.played(options)}
            run = Run.start(workflow, until=limit, notebook=bridge.notebook_key(), **with_)
            self.since, self._given = time.time(), with_
        else:
            later = again is not None
            if cell is not None:
                again = self._again(run.state, cell, workflow)
            if run is self.found:
                run = self._resume(run, workflow, limit, options)
                if again is not None or once:
                    run.go_on(until=limit, once=once, again=again, later=later)
            else:
                limits = {name: options[name] for name in LIMITS if name in options}
                told = options.get("on_waiting")
                run.go_on(workflow, until=limit, once=once, again=again, later=later, limits=limits, on_waiting=told)
        self.run, self.found, self._allowed = run, None, allowed
        return run

    def _resume(
        self, found: Run, workflow: Workflow, until: str | None, options: dict[str, Any], rewind: str | None = None
    ) -> Run:
        self._check_functions(found.state)
        plan = self._planned()
        given = {"engine": plan.engine, **plan.played(options)}
        given.pop("workspace", None)
        why = found.state.reason if found.status == "stopped" else "the kernel had ended"
        try:
            run = runs.resume(found.id, workflow, until=until, rewind=rewind, reason=why, **given)
        except RunLocked as error:
            raise RunLocked(
                f"{error} Or begin another run: `%cm workflow {plan.name} --new`.", path=error.path
            ) from None
        self.run, self.found, self.since, self._given = run, None, time.time(), given
        return run

    def _check_inputs(self, plan: Plan, workflow: Workflow, given: Iterable[str]) -> None:
        """Refuse an input that nothing reads; where steps are still to come, and functions are, only a `given` one."""
        functions = any(workflow.agent(item.agent).implementation is not None for item in workflow.tasks)
        meant = plan.inputs if functions or plan.body is None else {}
        check_read(workflow, plan.inputs if not meant else given, [name for name in meant if name not in given])

    def _check_kept(self, run: Run, options: Mapping[str, Any]) -> None:
        """Refuse options that a run which is under way cannot take any more."""
        if fixed := [name for name, value in options.items() if self._given.get(name) != value]:
            names = ", ".join(f"--{name.replace('_', '-')}" for name in fixed)
            raise WorkflowError(
                f"{names}: {run.state.name} goes on with its run {run.id}, which keeps what it began with. "
                f"`%cm workflow {run.state.name} --new` begins another."
            )

    def check_agent(self, agent: str) -> None:
        """Refuse an agent that nobody has defined: where a step's cell names it, it would be made, of a misspelt name.

        Raises
        ------
        WorkflowError    With those that are defined.
        """
        run, plan = self._last(), self._planned()
        made = [agent for item, _ in plan.placed.values() if item.prompt for agent in item.agents]
        known = [*(run.state.agents if run is not None else ()), *self.agents, *made]
        if agent not in known:
            hint = did_you_mean(agent, dict.fromkeys(known), "Defined")
            raise WorkflowError(f"agent {agent!r} is not defined. {hint} To define it: %%cm agent {agent}")

    def _again(self, state: RunState, item: Step, workflow: Workflow) -> str | None:
        """Whether the step of the present cell is to be made again."""
        step = state.steps.get(item.id)
        if step is None or not _over(state, step):
            return None
        changed = edits.replacement(state, item, workflow, workflow.inputs)
        return step.id if changed or step.id in self._seen else None

    def _workflow(self, run: Run, touched: Iterable[AnyStep] = ()) -> Workflow:
        """The run's workflow with what cells say now."""
        plan = self._planned()
        with run.reading() as state:
            items = plan.steps(state.items)
            agents = {**state.agents, **{agent.id: agent for agent in run.workflow.agents}, **self.agents}
            inputs = {**plan.inputs, **self._read(touched, items, agents, {**state.inputs, **plan.inputs})}
            made = edits.changed(state, items, agents, inputs)
        for name in plan.sub_agents:
            made.agent(name)  # refused by name, if nobody has defined it
        said = {"autonomous_mode": plan.autonomous_mode, "sub_agents": plan.sub_agents, **limits_of(plan)}
        return made.model_copy(update=said)

    def _fresh(self, touched: list[AnyStep]) -> Workflow:
        """The workflow of a run that is to start."""
        plan, agents = self._planned(), self.agents
        items = plan.steps(())
        inputs = {**plan.inputs, **self._read(items, items, agents, plan.inputs)}
        used = {*plan.sub_agents, *(name for item in items if not isinstance(item, Separator) for name in item.agents)}
        complete = all(name in agents for name in used)
        made = Workflow(
            plan.name,
            **limits_of(plan),
            steps=items,
            # With one missing, all: the message says who there is.
            agents=[agent for agent in agents.values() if agent.id in used or not complete],
            sub_agents=plan.sub_agents,
            autonomous_mode=plan.autonomous_mode,
            inputs=inputs,
            engine=plan.engine,
        )
        check_templates(made, inputs)
        return made.model_copy(update={"agents": [agent for agent in made.agents if agent.id in used]})

    def exported(self) -> Workflow | None:
        """The workflow as cells say it, with the notebook's variables that its prompts name; ``None``: no cell does.

        Raises
        ------
        WorkflowError    It is not complete.
        """
        if self.plan is None:
            return None
        items, run = self.items(), self._last()
        return self._fresh(items) if run is None else self._workflow(run, items)

    def draft(self) -> Workflow | None:
        """The workflow as far as it is known, to look at; ``None`` while agents are missing."""
        plan = self._planned()
        run = self.run or self.found
        try:
            items = plan.steps(run.state.items if run is not None else ())
            agents = {**(run.state.agents if run is not None else {}), **self.agents}
            used = {
                *plan.sub_agents,
                *(name for item in items if not isinstance(item, Separator) for name in item.agents),
            }
            known = [agent for agent in agents.values() if agent.id in used]
            return Workflow(
                plan.name,
                steps=items,
                agents=known,
                sub_agents=plan.sub_agents,
                autonomous_mode=plan.autonomous_mode,
                inputs=plan.inputs,
                engine=plan.engine,
                **limits_of(plan),
            )
        except WorkflowError:
            return None

    def sketch(self) -> RunState | None:
        """The steps, to draw them: agents that are not defined yet are stood in for."""
        plan = self._planned()
        items = plan.steps(())
        return state_of(_drawn(plan, items)) if items else None

    def _check_functions(self, state: RunState) -> None:
        """A function that no cell has defined in this kernel cannot run."""
        agents, used = self.agents, {*state.sub_agents, *(agent for step in state.order for agent in step.step.agents)}
        for agent in state.agents.values():
            missing = (agents.get(agent.id) or agent).missing
            if missing is not None and agent.id in used:
                raise WorkflowError(
                    f"agent {agent.id!r} {missing}, which no journal can keep. Run the cell that defines it "
                    "first, then this one."
                )

    def _read(
        self,
        touched: Iterable[AnyStep],
        items: list[AnyStep],
        agents: Mapping[str, Agent],
        inputs: Mapping[str, Any],
    ) -> dict[str, Any]:
        """The notebook's variables that the prompts of `touched` name; steps come first, then the plan's inputs."""
        names, values = step_names(items), dict[str, Any]()
        explicit = self._planned().inputs
        variables = self.variables()
        for item in touched:
            if isinstance(item, Separator):
                continue
            templates = [template for agent in item.agents for template in item.prompts(agents.get(agent))]
            for hole in (hole for template in templates for hole in holes(template, item.raw)):
                if hole.name in RESERVED or hole.name in names or hole.name in explicit:
                    continue
                value = variables.get(hole.name)
                if isinstance(value, str):
                    values[hole.name] = value
                elif isinstance(value, numbers.Real):  # numpy's too
                    values[hole.name] = int(value) if isinstance(value, numbers.Integral) else float(value)
                elif hole.name not in inputs:
                    raise WorkflowError(self._undefined(item, hole, {*names, *inputs}))
        return values

    def _undefined(self, item: Step, hole: Hole, known: set[str]) -> str:
        written = "{{ " + hole.name + " }}"
        variables = self.variables()
        if hole.name in variables and not hole.name.startswith("_"):
            kind = type(variables[hole.name]).__name__
            return (
                f"Step {item.id!r}: {written} is a {kind}, and only a text or a number can stand in a prompt. "
                f"Make one of it first, for instance {hole.name}_text = str({hole.name})."
            )
        if hole.name in self.agents:
            return (
                f"Step {item.id!r} builds on {written}, and no step of that name has run. "
                f"Run the cell of {hole.name} first."
            )
        texts = {name for name, value in variables.items() if isinstance(value, (str, int, float)) and name[0] != "_"}
        import difflib  # only for who makes a mistake

        near = difflib.get_close_matches(hole.name, sorted(known | texts | set(RESERVED)), n=1)
        similar = f"Similar: `{near[0]}`. " if near else ""
        return (
            f"The prompt of step {item.id!r} uses `{written}`, which is not defined. {similar}"
            "If it is a step, run its cell first; if it is a variable, set it. For literal braces add `--raw`."
        )


def _plan_of(state: RunState) -> Plan:
    """What a run that no cell has described goes on by: what it has."""
    return Plan(state.name, state.autonomous_mode, sub_agents=[*state.sub_agents], engine=state.engine)


def _drawn(plan: Plan, items: list[AnyStep]) -> Workflow:
    """The steps as a workflow that can be looked at, its agents stood in for; refused if they do not fit together."""
    named = dict.fromkeys(name for item in items if not isinstance(item, Separator) for name in item.agents)
    stand_ins = [Agent(id=name, prompt="…") for name in named]
    return Workflow(plan.name, steps=items, agents=stand_ins, autonomous_mode=plan.autonomous_mode)


def _empty(plan: Plan) -> str:
    return f"{plan.name} has no steps yet. Add one with a cell: %%cm step NAME, and its prompt below."


def _limit(ids: list[str], allowed: set[str]) -> str | None:
    """The last step that may run, ``None`` when it is the last of all."""
    reached = [id for id in ids if id in allowed]
    return reached[-1] if reached and reached[-1] != ids[-1] else None


def _over(state: RunState, step: StepState) -> bool:
    """Whether nothing more comes of the step by itself: it is done, stale, or it failed."""
    kind = step.gate.kind if step.gate is not None else step.due.kind if step.due is not None else None
    return step.status in ("finished", "skipped") or (step.status in ("waiting", "due") and kind in ("stale", "failed"))


notebook = Notebook()
"""The one of this kernel."""
