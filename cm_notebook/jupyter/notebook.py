"""What the cells of a notebook have said so far, and what running one of them means for the run.

Strategy: one ``Notebook`` a kernel. It keeps only what a run cannot know: how the workflow was named (``Plan``), what
cells have defined, and how far they let the run go. Everything else is asked of the run, which is found again in the
journal after a kernel restart. A cell that runs again is one of the rows of ``UX.md`` §1a, and each row is one call:

    the run lives here                →  run.go_on(workflow as it is now, until=…, again=…)
    it was found in the journal       →  resume(…, until=…), so that nothing starts whose cell has not been run
    there is none, or it is completed →  Run.start(…)

``until`` is the last step whose cell has been run in this kernel. Nothing here prints or displays.
"""

from __future__ import annotations

import difflib
import numbers
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import edits
from .. import run as runs
from ..config import setting
from ..errors import CodeMachineError, RunLocked, TransitionError, WorkflowError, did_you_mean
from ..events import Gate, Mode
from ..journal import AnyJournal, open_journal
from ..prompts import Hole, check_templates, holes, step_names
from ..run import Run
from ..state import RunState, StepState
from ..workflow import RESERVED, Agent, AnyStep, AutonomousMode, Separator, Step, Workflow
from . import bridge


@dataclass(slots=True)
class Plan:
    """A workflow as the cells describe it; the steps themselves are in the run as soon as there is one."""

    name: str
    autonomous_mode: AutonomousMode = True
    inputs: dict[str, Any] = field(default_factory=dict)
    engine: str | None = None
    tape: str | None = None
    workspace: str | None = None
    body: list[AnyStep] | None = None
    """The steps that the workflow's own cell writes down; ``None``: step cells bring them."""
    placed: dict[str, tuple[Step, str | None]] = field(default_factory=dict)
    """Steps defined by cells of their own, by id, and behind which step they want to stand."""

    def steps(self, before: Iterable[AnyStep]) -> list[AnyStep]:
        """The steps in order: those of the body, else those there were `before`, with what cells define since."""
        made = list(self.body) if self.body is not None else list(before)
        for item, after in self.placed.values():
            place = _place(made, item.id)
            if place is not None:
                made[place] = item
            elif after is not None:
                behind = _place(made, after)
                if behind is None:
                    known = [other.id for other in made if not isinstance(other, Separator)]
                    raise WorkflowError(f"--after {after!r} is not a step. {did_you_mean(after, known, 'Steps')}")
                made.insert(behind + 1, item)
            else:
                made.append(item)
        return made


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
        self.cell_agents: dict[str, Agent] = {}
        self.since = 0.0
        """When the run was started or taken up here, in seconds since the epoch."""
        self._looked = False
        self._seen: set[str] = set()
        self._allowed: set[str] = set()

    # -- what there is -------------------------------------------------------------------------------------------------

    @property
    def agents(self) -> dict[str, Agent]:
        """The agents of ``%%cm agent`` cells, and those among the notebook's variables."""
        named = [value for name, value in self.variables().items() if not name.startswith("_")]
        return {**{value.id: value for value in named if isinstance(value, Agent)}, **self.cell_agents}

    def current(self) -> Run:
        """The run that is looked at and decided: the last one here, else the last one of this notebook.

        Raises
        ------
        TransitionError    There is none.
        """
        try:
            return runs.current()
        except TransitionError:
            if self.found is None and not self._looked:
                self.found = self._last_run(self.plan.name if self.plan is not None else None)
            if self.found is None:
                raise
            return self.found

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
        before = self.plan
        same = before is not None and before.name == plan.name
        fixed: list[str] = []
        if new or not bridge.somebody():
            self._forget(looked=True)
        elif not same or self.run is None:
            self._forget()
            self.found = self._last_run(plan.name)
            self._looked = True
        elif self.run.status == "completed":
            self._forget(looked=True)
        elif before is not None:
            plan.placed = before.placed
            self._revise(plan, before)
            fixed = [name for name in ("engine", "tape", "workspace") if getattr(plan, name) != getattr(before, name)]
        self.plan = plan
        return self._kept_words(plan, fixed)

    def _forget(self, *, looked: bool = False) -> None:
        self.run = self.found = None
        self._seen, self._allowed, self._looked = set(), set(), looked

    def _revise(self, plan: Plan, before: Plan) -> None:
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
        wanted: Mode = "step-by-step" if plan.autonomous_mode is False else "gates"
        may_switch = run.state.locked is None and isinstance(plan.autonomous_mode, bool)
        if may_switch and plan.autonomous_mode != before.autonomous_mode and run.mode != wanted:
            run.set_mode(wanted)

    def _kept_words(self, plan: Plan, fixed: list[str]) -> list[str]:
        run = self.run or self.found
        if run is None:
            return []
        words = [f"{plan.name} goes on with its run {run.id}, which is {run.status}."]
        locked = plan.autonomous_mode if isinstance(plan.autonomous_mode, str) else None
        if run.state.locked != locked:
            fixed = ["autonomous mode", *fixed]
        if fixed:
            words.append(f"It keeps its {', '.join(fixed)}; with --new another run begins.")
        return words

    # -- step cells ----------------------------------------------------------------------------------------------------

    def place(self, item: Step, after: str | None = None) -> None:
        """Add a step, or define it anew, without running it: it counts when something runs next."""
        self._planned().placed[item.id] = (item, after)

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
        plan = self._planned()
        before = plan.placed.get(item.id)
        self.place(item, after)
        try:
            run = self._run_to([item.id], [item], cell=item)
        except CodeMachineError:
            if before is None:
                del plan.placed[item.id]
            else:
                plan.placed[item.id] = before
            raise
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
        known = [item.id for item in plan.steps(run.state.items if run else ()) if not isinstance(item, Separator)]
        if step not in known:
            raise WorkflowError(f"there is no step {step!r}. {did_you_mean(step, known, 'Steps')}")
        if run is not None and step in run.state.steps:
            run.remove(step)
        plan.placed.pop(step, None)
        if plan.body is not None:
            plan.body = [item for item in plan.body if isinstance(item, Separator) or item.id != step]
        for names in (self._seen, self._allowed):
            names.discard(step)
        return run

    # -- going on ------------------------------------------------------------------------------------------------------

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
            ``engine, tape, workspace, on_gate`` of ``Workflow.start``, for a run that is started or taken up.
        """
        plan = self._planned()
        if inputs:
            plan.inputs = {**plan.inputs, **inputs}
        run = self._last()
        items = plan.steps(run.state.items if run is not None else ())
        ids = [item.id for item in items if not isinstance(item, Separator)]
        if run is not None and run.status == "completed" and again is None and set(ids) <= set(run.state.steps):
            plan.body = items  # nothing is left to do: the same once more
            self._forget(looked=True)
        if not ids:
            raise WorkflowError(
                f"{plan.name} has no steps yet. Add one with a cell: %%cm step NAME, and its prompt below."
            )
        for name, value in (("--until", until), ("--from", again)):
            if value is not None and value not in ids:
                raise WorkflowError(f"{name} {value!r} is not a step. {did_you_mean(value, ids, 'Steps')}")
        reach = ids if until is None else ids[: ids.index(until) + 1]
        return self._run_to(reach, items, exactly=until is not None, again=again, **options)

    def next(self) -> tuple[Run, str]:
        """Run exactly one step; returns the run and the step's id.

        Raises
        ------
        TransitionError    There is no step left.
        """
        run = self._last()
        items = self._planned().steps(run.state.items if run is not None else ())
        ids = [item.id for item in items if not isinstance(item, Separator)]
        current = run.state.current if run is not None else None
        done = run.state.steps if run is not None else {}
        id = current.id if current is not None else next((id for id in ids if id not in done), None)
        if id is None:
            raise TransitionError(f"{self._planned().name} has no step left. Add one, or start anew: `%cm run`.")
        return self._run_to(ids[: ids.index(id) + 1], items, exactly=True), id

    def take_up(self, run_id: str) -> Run:
        """Go on with a run of the journal, by its id."""
        if run_id not in (known := self.run_ids()):
            raise TransitionError(f"there is no run {run_id!r}. {did_you_mean(run_id, known, 'Runs')}")
        found = Run.open(run_id)
        self._check_functions(found.state)
        plan = self.plan if self.plan is not None and self.plan.name == found.state.name else Plan(found.state.name)
        agents = [agent for agent in self.agents.values() if agent.id in found.state.agents]
        run = runs.resume(run_id, agents=agents, engine=plan.engine, tape=plan.tape)
        self._forget(looked=True)
        self.plan = plan
        self.run, self.since = run, time.time()
        self._allowed = set(run.state.steps)
        return run

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
        cell: Step | None = None,
        again: str | None = None,
        **options: Any,
    ) -> Run:
        """Let the run go as far as `reach`, no further if `exactly`.

        The notebook's variables are read for the steps that are `touched`; `cell` is the step whose cell is run.
        """
        run, plan = self._last(), self._planned()
        allowed = set(reach) if exactly else self._allowed | set(reach)
        workflow = self._fresh(touched) if run is None else self._workflow(run, touched)
        limit = _limit([item.id for item in workflow.executable], allowed)
        if run is None:
            given = {"tape": plan.tape, "workspace": plan.workspace, **options}
            run = Run.start(workflow, until=limit, notebook=bridge.notebook_key(), **given)
            self.since = time.time()
        else:
            later = again is not None
            if cell is not None:
                again = self._again(run.state, cell, workflow)
            if run is self.found:
                run = self._resume(run, workflow, limit, options)
                if again is not None:
                    run.go_on(until=limit, again=again, later=later)
            else:
                run.go_on(workflow, until=limit, again=again, later=later)
        self.run, self.found, self._allowed = run, None, allowed
        return run

    def _resume(self, found: Run, workflow: Workflow, until: str | None, options: dict[str, Any]) -> Run:
        self._check_functions(found.state)
        plan = self._planned()
        given = {"engine": plan.engine, "tape": plan.tape, **options}
        given.pop("workspace", None)
        why = "stopped by you" if found.status == "stopped" else "the kernel had ended"
        try:
            run = runs.resume(found.id, workflow, until=until, reason=why, **given)
        except RunLocked as error:
            raise RunLocked(
                f"{error} Or begin another run: `%cm workflow {plan.name} --new`.", path=error.path
            ) from None
        self.run, self.found, self.since = run, None, time.time()
        return run

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
            agents = {**state.agents, **self.agents}
            inputs = {**plan.inputs, **self._read(touched, items, agents, {**state.inputs, **plan.inputs})}
            return edits.changed(state, items, agents, inputs)

    def _fresh(self, touched: list[AnyStep]) -> Workflow:
        """The workflow of a run that is to start."""
        plan, agents = self._planned(), self.agents
        items = plan.steps(())
        inputs = {**plan.inputs, **self._read(items, items, agents, plan.inputs)}
        used = {item.agent for item in items if not isinstance(item, Separator)}
        complete = all(name in agents for name in used)
        made = Workflow(
            plan.name,
            steps=items,
            # With one missing, all: the message says who there is.
            agents=[agent for agent in agents.values() if agent.id in used or not complete],
            autonomous_mode=plan.autonomous_mode,
            inputs=inputs,
            engine=plan.engine,
        )
        check_templates(made, inputs)
        return made.model_copy(update={"agents": [agent for agent in made.agents if agent.id in used]})

    def draft(self) -> Workflow | None:
        """The workflow as far as it is known, to look at; ``None`` while agents are missing."""
        plan = self._planned()
        run = self.run or self.found
        try:
            items = plan.steps(run.state.items if run is not None else ())
            agents = {**(run.state.agents if run is not None else {}), **self.agents}
            used = {item.agent for item in items if not isinstance(item, Separator)}
            known = [agent for agent in agents.values() if agent.id in used]
            return Workflow(
                plan.name,
                steps=items,
                agents=known,
                autonomous_mode=plan.autonomous_mode,
                inputs=plan.inputs,
                engine=plan.engine,
            )
        except WorkflowError:
            return None

    def sketch(self) -> RunState | None:
        """The steps, to draw them: agents that are not defined yet are stood in for."""
        plan = self._planned()
        items = plan.steps(())
        named = {item.agent for item in items if not isinstance(item, Separator)}
        stand_ins = [Agent(id=name, prompt="…") for name in named]
        if not items:
            return None
        return RunState.of(Workflow(plan.name, steps=items, agents=stand_ins, autonomous_mode=plan.autonomous_mode))

    def _check_functions(self, state: RunState) -> None:
        """A function that no cell has defined in this kernel cannot run."""
        agents, used = self.agents, {step.step.agent for step in state.order}
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
            found = [hole for template in item.prompts(agents.get(item.agent)) for hole in holes(template, item.raw)]
            for hole in found:
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
                f"{item.id}: {written} is a {kind}, and only a text or a number can stand in a prompt. "
                f"Make one of it first, for instance {hole.name}_text = str({hole.name})."
            )
        if hole.name in self.agents:
            return (
                f"{item.id} builds on {written}, and no step of that name has run. Run the cell of {hole.name} first."
            )
        texts = {name for name, value in variables.items() if isinstance(value, (str, int, float)) and name[0] != "_"}
        near = difflib.get_close_matches(hole.name, sorted(known | texts | set(RESERVED)), n=1)
        similar = f"Similar: {near[0]}. " if near else ""
        return (
            f"{item.id}: the prompt uses {written}, which is not defined. {similar}"
            "If it is a step, run its cell first; if it is a variable, set it. For literal braces add --raw."
        )


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
