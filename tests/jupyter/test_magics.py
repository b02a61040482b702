"""The magics in a real shell, with every row of "Running a cell again" (UX.md §1a).

The shell has no kernel, so what is shown is the static view; ``test_cells.py`` has the same in real kernels and
``tests/browser`` in a real page. A kernel's end is played by ``restart``: the run loses its driver, the cells their
memory.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from IPython.core.completer import provisionalcompleter
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output
from traitlets.config import Config

import cm_notebook as cm
from cm_notebook import cli, config, driving, keys, options
from cm_notebook import run as runs
from cm_notebook.engines import base
from cm_notebook.jupyter import bridge
from cm_notebook.jupyter import notebook as books
from cm_notebook.jupyter.settings import SettingRefused
from tests.helpers import gate, until

REPLIES = {name: [f"{name} {n}" for n in range(1, 9)] for name in ("planner", "implementer", "reviewer", "deployer")}
PLANNER = "%%cm step planner\nPlan {{ goal }}."
IMPLEMENTER = "%%cm step implementer\nBuild {{ planner }}."
REVIEWER = "%%cm step reviewer\nReview {{ implementer }}."
WORKFLOW = "%cm workflow careful --autonomous never"


class Cells:
    """A notebook whose cells are run in this process."""

    def __init__(self, shell: InteractiveShell) -> None:
        self.shell = shell
        self.output = ""
        self.result: Any = None

    def __call__(self, *sources: str) -> str:
        """Run cells; what they wrote. An error that the user would see is raised."""
        for source in sources:
            with capture_output() as captured:
                done = self.shell.run_cell(source, store_history=True)
            self.shown = [output.data for output in captured.outputs]
            plain = [data.get("text/plain", "") for data in self.shown]
            self.output, self.result = "\n".join([captured.stdout, captured.stderr, *plain]), done.result
            done.raise_error()
        return self.output

    @property
    def book(self) -> books.Notebook:
        return books.notebook

    @property
    def run(self) -> cm.Run:
        assert self.book.run is not None
        return self.book.run

    def to(self, step: str, status: str = "waiting") -> cm.StepView:
        """The step, once it has come to that."""
        until(lambda: step in self.run.state.steps and self.run[step].status == status, f"{step} to be {status}")
        return self.run[step]

    def restart(self) -> None:
        """The kernel ends and another one begins."""
        for driver in list(driving.driven.values()):
            driver.driving, driver._scheduled = False, True  # deaf: what its turns propose is never taken
            driver.journal.release(driver.id)
        driving.driven.clear()
        runs._current = None
        fresh = books.Notebook(lambda: self.shell.user_ns)
        for name in vars(fresh):
            setattr(self.book, name, getattr(fresh, name))


@pytest.fixture
def cells(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cells]:
    monkeypatch.setattr(runs, "_current", None)
    monkeypatch.setattr(books, "notebook", books.Notebook())
    monkeypatch.setattr(config, "chosen", {})
    monkeypatch.setenv("JPY_SESSION_NAME", "/home/me/build.ipynb")
    monkeypatch.setattr(base, "_engines", dict(base._engines))  # what a cell registers ends with the test
    cm.register_engine(cm.ScriptedEngine(REPLIES))
    monkeypatch.setenv("CM_ENGINE", "scripted")
    settings = Config()
    settings.HistoryManager.enabled = False
    shell = InteractiveShell.instance(config=settings)
    page = Cells(shell)
    page("%load_ext cm_notebook", "goal = 'a todo CLI'")
    yield page
    if books.notebook.run is not None and books.notebook.run.state.ended is None:
        books.notebook.run.stop()
    page("%unload_ext cm_notebook")
    InteractiveShell.clear_instance()


def error(cells: Cells, source: str) -> str:
    """The one line that the cell says in place of a result."""
    with pytest.raises(Exception) as said:  # noqa: PT011
        cells(source)
    assert isinstance(said.value, cm.CodeMachineError), said.value
    assert len(said.value._render_traceback_()) == 1 or isinstance(said.value, cm.GatePending)
    assert "\n" not in str(said.value)
    return str(said.value)


# -- a notebook, cell by cell ------------------------------------------------------------------------------------------


def test_pattern_1_cell_by_cell(cells: Cells) -> None:
    cells(WORKFLOW, PLANNER)
    cells.to("planner")
    assert "rejected by you" in cells("%cm reject don't plan, do it?")
    until(lambda: len(cells.run["planner"].attempts) == 2 and cells.run.gates, "the second attempt")
    assert cells.run["planner"].attempts[0].feedback == "don't plan, do it?"
    assert "+planner 2" in cells("%cm diff planner")
    cells("%cm approve", IMPLEMENTER)
    cells.to("implementer")
    cells("%cm approve implementer", REVIEWER)
    cells.to("reviewer")
    cells("%cm approve", "review = %cm show reviewer")
    cells("text = review.text")
    assert cells.shell.user_ns["text"] == "reviewer 1"
    assert cells.run["planner"].prompt.endswith("don't plan, do it?")
    assert cells.run["planner"].attempts[0].prompt == "Plan a todo CLI."
    assert "total" in cells("%cm status")
    assert "planner" in cells("%cm graph --format mermaid")
    assert "waits for a person" in cells("%cm graph --timeline")
    assert 'alt="Timeline of careful' in cells.shown[-1]["text/html"]
    assert cells("%cm graph --timeline --format mermaid").startswith("gantt")
    assert cells.run.id in cells("%cm runs")


def test_what_the_cells_have_built_is_exported(cells: Cells) -> None:
    cells(
        "import statistics\nimport cm_notebook as cm\nLIMIT = 3",
        "@cm.agent('judge')\ndef judge(turn):\n    return str(statistics.mean([LIMIT, 5]))",
        "from pydantic import BaseModel\nclass Made(BaseModel):\n    name: str",
        "maker = cm.Agent('maker', 'Make {{ planner }}.', output=Made)",
        WORKFLOW,
    )
    cells(PLANNER, "%cm step judge", "%cm step maker")
    assert cells("%cm export early.py").splitlines()[0] == "early.py is written."
    made = cli.load("early.py")
    assert made.inputs == {"goal": "a todo CLI"}
    assert [step.id for step in made.executable] == ["planner", "judge", "maker"]
    assert made.agent("judge")(None) == "4"
    assert made.agent("maker").output.__name__ == "Made"
    cells.to("planner")
    assert "this one is waiting" in error(cells, "%cm export test_w.py")
    assert "early.py is written" in cells("%cm export early.py"), "the same again is no harm"
    cells("goal = 'another'")
    assert "early.py is there already" in error(cells, "%cm export early.py")
    assert cells("%cm export early.py --overwrite -o file").startswith("early.py is written.\n")
    assert cells.shell.user_ns["file"] == "early.py"
    assert "is a Python function (judge)" in cells("%cm export early.json")
    cells("import pydantic\nmaker = cm.Agent('maker', 'x', output=pydantic.create_model('Made', other=(str, ...)))")
    assert "the source of its output, Made, cannot be read" in error(cells, "%cm export other.py")


def test_pattern_2_in_one_go(cells: Cells) -> None:
    for name in ("planner", "implementer", "reviewer", "deployer"):
        cells(f"%%cm agent {name}\nDo your part of {{{{ goal }}}}.")
    cells("%%cm workflow smart --autonomous always\nplanner -> implementer -> reviewer? -> deployer")
    assert "4 steps" in cells.output
    cells("run = %cm run")
    run = cells.shell.user_ns["run"]
    assert isinstance(run, cm.Run)
    gate(run, "reviewer")
    assert run["implementer"].status == "done"
    assert "locked" in error(cells, "%cm mode unattended")
    cells("%cm approve")
    run.wait(10)
    assert run.status == "completed"


# -- running a cell again (UX.md §1a) ----------------------------------------------------------------------------------


def start(cells: Cells) -> cm.Run:
    """The planner waits, the implementer is queued."""
    cells(WORKFLOW, PLANNER, IMPLEMENTER)
    cells.to("planner")
    return cells.run


def test_pattern_5_a_team(cells: Cells) -> None:
    """An agent calls two others; one of them fails, and is tried again by its name."""
    cells(
        "import cm_notebook as cm",
        "%%cm agent planner\nPlan {{ goal }}.",
        '@cm.agent("coordinator")\n'
        "async def coordinator(turn):\n"
        """    results = await turn.run_agents("ui-dev 'the page' & api-dev 'the calls'")\n"""
        '    return "; ".join(f"{one.agent}: {one.text}" for one in results)',
        '@cm.agent("api-dev")\n'
        "def api_dev(turn):\n"
        "    if turn.attempt == 1:\n"
        '        raise ValueError("no disk")\n'
        '    return "calls"',
        "%%cm agent ui-dev\nYou build pages.",
    )
    cm.register_engine(cm.ScriptedEngine({**REPLIES, "ui-dev": ["page"]}))
    cells("%%cm workflow team-builder --sub-agents ui-dev,api-dev\nplanner -> coordinator", "%cm run")
    opened = gate(cells.run)
    assert opened.path == "coordinator/api-dev#1"
    shown = cells("%cm show coordinator/api-dev#1")
    assert "no disk" in shown
    assert "Retry this one" in cells.shown[-1]["text/html"]
    cells("%cm retry coordinator/api-dev#1")
    assert cells.run.wait(20)["coordinator"].text == "ui-dev: page; api-dev: calls"
    assert cells.run["coordinator/ui-dev#1"].prompt == "You build pages.\n\nthe page"
    cells("%%cm workflow other --sub-agents apidev\nplanner")
    assert "'apidev' is not defined. Did you mean 'api-dev'?" in error(cells, "%cm run")


def test_pattern_5_agents_side_by_side(cells: Cells) -> None:
    cells("%%cm agent planner\nPlan {{ goal }}.", "%%cm agent implementer\nBuild.", "%%cm agent reviewer\nReview.")
    cells("%%cm workflow sides\nplanner -> [implementer | reviewer]", "%cm run")
    assert (
        cells.run.wait(20)["implementer-reviewer"].text
        == "## implementer\n\nimplementer 1\n\n## reviewer\n\nreviewer 1"
    )
    assert "[implementer (done) | reviewer (done)]" in cells("%cm graph --format text")


def test_workflow_unchanged_keeps_its_unfinished_run(cells: Cells) -> None:
    run = start(cells)
    assert run.id in cells(WORKFLOW)
    cells(PLANNER)
    assert cells.run is run


def test_workflow_unchanged_and_finished_starts_a_new_run(cells: Cells) -> None:
    cells(WORKFLOW, PLANNER)
    cells.to("planner")
    cells("%cm approve")
    first = cells.run.wait(10)
    cells(WORKFLOW, PLANNER)
    assert cells.run.id != first.id
    cells.to("planner")
    assert [step.id for step in cells.run] == ["planner"]


def test_workflow_new_starts_a_new_run(cells: Cells) -> None:
    first = start(cells)
    cells(f"{WORKFLOW} --new", PLANNER)
    assert cells.run.id != first.id
    assert [step.id for step in cells.run] == ["planner"]
    first.stop()


def test_headless_every_run_is_new(cells: Cells, monkeypatch: pytest.MonkeyPatch) -> None:
    first = start(cells)
    monkeypatch.setenv("CM_HEADLESS", "1")
    cells(WORKFLOW)
    with pytest.raises(cm.GatePending):
        cells(PLANNER)
    assert cells.run.id != first.id
    first.stop()


def test_workflow_changed_keeps_what_it_shares(cells: Cells) -> None:
    cells("%%cm agent planner\nPlan {{ topic }}.", "%%cm agent implementer\nBuild it.", "%%cm agent reviewer\nLook.")
    line = "%%cm workflow w --autonomous always --input topic={}\n{}"
    cells(line.format("shoes", "planner -> implementer? -> reviewer"), "%cm run")
    run = cells.run
    gate(run, "implementer")
    drawn = cells(line.format("shoes", "planner -> implementer? -> reviewer"))
    assert "planner (done) -> implementer? (waiting" in drawn, "as the run stands that it goes on with"
    cells(line.format("hats", "planner -> implementer?"))
    assert cells.run is run
    assert [step.id for step in run] == ["planner", "implementer"]
    assert run["planner"].stale
    stale = gate(run, "planner")
    assert stale.kind == "stale"
    cells("%cm retry planner")
    until(lambda: len(run["planner"].attempts) == 2 and run["planner"].status == "done", "the new plan")
    assert run["planner"].prompt == "Plan hats."


def test_workflow_changed_beyond_its_run_is_refused_with_the_way_out(cells: Cells) -> None:
    cells("%%cm agent planner\nPlan.", "%%cm agent implementer\nBuild it.")
    cells("%%cm workflow w --autonomous always\nplanner -> implementer?", "%cm run")
    gate(cells.run, "implementer")
    assert "--new" in error(cells, "%%cm workflow w --autonomous always\nimplementer?")
    assert [step.id for step in cells.run] == ["planner", "implementer"]
    cells("%cm run")


def test_workflow_says_what_its_run_keeps(cells: Cells) -> None:
    run = start(cells)
    said = cells("%cm workflow careful --autonomous always --workspace elsewhere")
    assert "It keeps its workspace" in said
    assert (cells.run is run, run.state.locked) == (True, "always")


@pytest.mark.parametrize("again", [PLANNER, IMPLEMENTER])
def test_step_waiting_or_queued_is_shown_again(cells: Cells, again: str) -> None:
    run = start(cells)
    before = run.state.seq
    cells(again)
    assert cells.run is run
    assert run.state.seq == before
    assert run.gates[0].attempt == 1


def test_step_finished_is_a_new_attempt_and_later_ones_are_stale(cells: Cells) -> None:
    run = start(cells)
    cells("%cm approve planner")
    cells.to("implementer")
    cells("%cm approve")
    run.wait(10)
    cells(PLANNER)
    until(lambda: run.gates and len(run["planner"].attempts) == 2, "the second attempt")
    cells("%cm approve")
    stale = gate(run, "implementer")
    assert stale.kind == "stale"
    cells(IMPLEMENTER)
    until(lambda: len(run["implementer"].attempts) == 2, "a stale step's cell to run it again")
    assert run["implementer"].prompt == "Build planner 2."


def test_run_from_here(cells: Cells) -> None:
    run = start(cells)
    cells("%cm approve")
    cells.to("implementer")
    cells("%cm approve")
    run.wait(10)
    cells("%cm run --from planner")
    until(lambda: len(run["planner"].attempts) == 2 and run.gates, "planner again")
    cells("%cm approve")
    until(lambda: len(run["implementer"].attempts) == 2, "implementer again, unasked")


def test_step_after_a_restart_is_shown_not_paid_and_its_gate_is_the_same(cells: Cells) -> None:
    run = start(cells)
    before = gate(run, "planner")
    cells.restart()
    assert run.id in cells(WORKFLOW)
    cells(PLANNER)
    assert cells.run.id == run.id
    assert cells.run is not run
    assert cells.run.gates[0].id == before.id
    assert len(cells.run["planner"].attempts) == 1


def test_a_finished_step_after_a_restart_is_shown_and_not_run_again(cells: Cells) -> None:
    run = two_steps(cells)
    before = gate(run, "implementer")
    cells.restart()
    cells(WORKFLOW, PLANNER)
    assert cells.run.id == run.id
    assert [opened.id for opened in cells.run.gates] == [before.id]
    assert [event.type for event in cells.run.events if event.type in ("TurnStarted", "Rewound")] == 2 * ["TurnStarted"]


def test_after_a_restart_nothing_starts_whose_cell_was_not_run(cells: Cells) -> None:
    start(cells)
    cells.restart()
    cells(WORKFLOW, PLANNER, "%cm approve")
    until(lambda: cells.run.status == "paused", "a pause")
    assert cells.run["implementer"].status == "pending"
    cells(IMPLEMENTER)
    cells.to("implementer")
    assert len(cells.run["planner"].attempts) == 1


def test_a_kernel_that_dies_while_a_step_runs_and_the_step_is_changed(cells: Cells) -> None:
    cm.register_engine(cm.ScriptedEngine({"planner": [cm.Reply("never", delay_s=60)]}))
    cells(WORKFLOW, PLANNER)
    cells.to("planner", "running")
    cells.restart()
    cm.register_engine(cm.ScriptedEngine(REPLIES))
    cells(WORKFLOW, "%%cm step planner\nPlan {{ goal }} quickly.")
    step = cells.to("planner")
    assert [attempt.cut_short for attempt in step.attempts] == ["the kernel had ended", None]
    assert step.prompt == "Plan a todo CLI quickly."


def in_one_go(cells: Cells, topic: str) -> None:
    line = f"%%cm workflow w --autonomous always --input topic={topic}\nplanner -> implementer?"
    cells("%%cm agent planner\nPlan {{ topic }}.", "%%cm agent implementer\nBuild it.", line)


def test_after_a_restart_the_workflow_shows_its_run_and_not_only_steps_whose_cells_were_run(cells: Cells) -> None:
    cells(WORKFLOW, PLANNER, IMPLEMENTER)
    cells.to("planner")
    cells.restart()
    for between in ((), (PLANNER,)):
        said = cells(*between, WORKFLOW)
        assert "planner? (waiting)" in said
        assert "implementer? (pending)" in said


def test_after_a_restart_run_comes_back_to_the_same_gate(cells: Cells) -> None:
    in_one_go(cells, "shoes")
    cells("%cm run")
    before = gate(cells.run, "implementer")
    cells.restart()
    in_one_go(cells, "shoes")
    cells("%cm run")
    assert [opened.id for opened in cells.run.gates] == [before.id]


def test_after_a_restart_a_changed_workflow_makes_stale_what_had_run(cells: Cells) -> None:
    in_one_go(cells, "shoes")
    cells("%cm run")
    run = cells.run
    gate(run, "implementer")
    cells.restart()
    in_one_go(cells, "hats")
    cells("%cm run")
    assert cells.run.id == run.id
    assert gate(cells.run, "planner").kind == "stale"
    assert len(cells.run["planner"].attempts) == 1


def test_a_limit_outlives_a_stop(cells: Cells) -> None:
    start(cells)
    cells.restart()
    cells(WORKFLOW, PLANNER, "%cm stop", PLANNER)
    cells.to("planner")
    cells("%cm approve")
    until(lambda: cells.run.status == "paused", "a pause")
    assert cells.run["implementer"].status == "pending"


def test_a_budget_in_cells(cells: Cells) -> None:
    cells("%%cm workflow careful --autonomous always --max-turns 1\nplanner -> implementer -> reviewer -> deployer")
    cells("%%cm agent planner\nPlan.", "%%cm agent implementer\nBuild.", "%%cm agent reviewer\nReview.")
    cells("%%cm agent deployer\nDeploy.", "%cm run")
    cells.to("implementer")
    assert "Gate: Paused: 1 turn limit reached after planner. Continue with +1 turn?" in cells("%cm")
    assert "Try: %cm approve · %cm stop" in cells.output
    assert "is about max_turns, not max_cost_usd" in error(cells, "%cm approve --max-cost 1")
    assert "implementer: +1 turn permitted by you" in cells("%cm approve")
    cells.to("reviewer")
    cells("%%cm workflow careful --autonomous always --max-turns 3\nplanner -> implementer -> reviewer -> deployer")
    cells.to("deployer")
    cells("%cm stop", "%cm run")
    cells.to("deployer")
    cells("%cm stop", "%cm run --max-turns 9")
    cells.to("deployer", "done")
    assert "--max-cost nan is too little" in error(cells, "%cm run --max-cost nan")


def test_after_a_restart_a_run_goes_on_with_more(cells: Cells) -> None:
    cells("%%cm agent planner\nPlan.", "%%cm agent implementer\nBuild.")
    cells("%%cm workflow careful --autonomous always --max-turns 1\nplanner -> implementer", "%cm run")
    cells.to("implementer")
    cells.restart()
    cells("%%cm workflow careful --autonomous always --max-turns 1\nplanner -> implementer", "%cm run --max-turns 2")
    cells.to("implementer", "done")


def test_after_a_restart_a_second_run_of_the_cell_is_a_new_attempt(cells: Cells) -> None:
    start(cells)
    cells("%cm approve")
    cells.to("implementer")
    cells.restart()
    cells(WORKFLOW, PLANNER)
    assert len(cells.run["planner"].attempts) == 1
    cells(PLANNER)
    until(lambda: len(cells.run["planner"].attempts) == 2, "the second attempt")


def test_after_a_restart_a_changed_step_is_replaced_and_runs_again(cells: Cells) -> None:
    start(cells)
    cells("%cm approve")
    cells.to("implementer")
    cells.restart()
    cells(WORKFLOW, "%%cm step planner\nPlan {{ goal }} in three steps.")
    until(lambda: len(cells.run["planner"].attempts) == 2 and cells.run.gates, "the second attempt")
    assert cells.run["planner"].prompt == "Plan a todo CLI in three steps."
    assert [step.id for step in cells.run] == ["planner", "implementer"]


def test_after_a_restart_a_variable_that_changed_changes_the_step(cells: Cells) -> None:
    start(cells)
    cells.restart()
    cells("goal = 'a web shop'", WORKFLOW, PLANNER)
    until(lambda: cells.run["planner"].prompt == "Plan a web shop.", "the plan for the new goal")


def test_after_a_restart_a_run_that_was_stopped_goes_on(cells: Cells) -> None:
    run = start(cells)
    cells("%cm stop")
    cells.restart()
    assert "stopped" in cells(WORKFLOW)
    cells(PLANNER)
    assert cells.run.id == run.id
    assert len(cells.to("planner").attempts) == 1


def test_after_a_restart_the_workflows_cell_comes_first(cells: Cells) -> None:
    start(cells)
    cells.restart()
    assert "Run the cell with `%cm workflow careful`" in error(cells, PLANNER)


def test_after_a_restart_the_run_can_be_looked_at_and_decided(cells: Cells) -> None:
    run = start(cells)
    cells.restart()
    assert run.id in cells("%cm")
    assert "approved by you" in cells("%cm approve")


def test_after_a_restart_what_nobody_drives_is_not_said_to_run(cells: Cells) -> None:
    idle = "Nobody drives this run now. `%cm run` goes on with it."
    run = start(cells)
    assert idle not in cells("%cm status")
    cells.restart()
    assert "waiting, not driven" in cells("%cm")
    assert "waiting, not driven" in cells("%cm runs")
    assert idle in cells("%cm approve")  # it is not over: nobody is there to make what follows
    said = cells("%cm")
    assert f"run {run.id}: interrupted" in said
    assert "Try: %cm run" in said
    assert idle in cells("%cm status")
    assert idle in cells("%cm show")
    assert "which is interrupted" in cells(WORKFLOW)
    cells(PLANNER)
    assert cells.run.driven
    assert idle not in cells("%cm status")


def test_after_a_restart_with_a_finished_run_a_new_one_starts(cells: Cells) -> None:
    cells(WORKFLOW, PLANNER)
    cells.to("planner")
    cells("%cm approve")
    first = cells.run.wait(10)
    cells.restart()
    cells(WORKFLOW, PLANNER)
    assert cells.run.id != first.id


def test_another_notebook_has_another_run(cells: Cells, monkeypatch: pytest.MonkeyPatch) -> None:
    run = start(cells)
    cells.restart()
    monkeypatch.setenv("JPY_SESSION_NAME", "/home/me/other.ipynb")
    cells(WORKFLOW, PLANNER)
    assert cells.run.id != run.id


@pytest.mark.parametrize("state", ["waiting", "done"])
def test_step_changed_is_replaced_and_runs_as_a_new_attempt(cells: Cells, state: str) -> None:
    run = start(cells)
    if state == "done":
        cells("%cm approve")
        cells.to("implementer")
    cells("%%cm step planner\nPlan {{ goal }} in three steps.")
    until(lambda: len(run["planner"].attempts) == 2 and run.gates, "the second attempt")
    assert [step.id for step in run] == ["planner", "implementer"]
    assert run["planner"].prompt == "Plan a todo CLI in three steps."


def test_step_queued_and_changed_is_replaced_in_place(cells: Cells) -> None:
    run = start(cells)
    cells(REVIEWER, "%%cm step implementer\nBuild {{ planner }} in Rust.", "%cm approve")
    cells.to("implementer")
    assert run["implementer"].prompt == "Build planner 1 in Rust."
    assert [step.id for step in run] == ["planner", "implementer", "reviewer"]


def test_new_step_comes_last_or_after(cells: Cells) -> None:
    run = start(cells)
    cells("%%cm step reviewer --after planner\nReview {{ planner }}.", "%%cm step deployer\nShip it.")
    assert [step.id for step in run] == ["planner", "reviewer", "implementer", "deployer"]
    assert "Did you mean 'planner'?" in error(cells, "%%cm step x --after plannr\nDo.")


def test_remove_follows_a_deleted_cell(cells: Cells) -> None:
    run = start(cells)
    cells("%cm remove implementer")
    assert [step.id for step in run] == ["planner"]
    assert "Did you mean 'planner'?" in error(cells, "%cm remove plannr")


def test_out_of_order_says_which_cell_comes_first(cells: Cells) -> None:
    cells(WORKFLOW)
    assert "If it is a step, run its cell first" in error(cells, IMPLEMENTER)
    cells("%%cm agent planner\nPlan.")
    assert "Run the cell of planner first" in error(cells, IMPLEMENTER)
    cells(PLANNER, IMPLEMENTER)
    assert [step.id for step in cells.run] == ["planner", "implementer"]


def test_a_step_that_failed_runs_again_with_its_cell(cells: Cells) -> None:
    cells(
        "tries = []",
        "import cm_notebook as cm",
        "@cm.agent('flaky')\ndef flaky(turn):\n    tries.append(1)\n    assert len(tries) > 1\n    return 'ok'",
        "%cm workflow w",
        "%cm step flaky",
        "%cm run",
    )
    assert gate(cells.run).kind == "failed"
    cells("%cm next")
    assert gate(cells.run).kind == "failed"
    cells("%cm retry")
    assert cells.run.wait(10).status == "completed"


REMOVES = """
import cm_notebook as cm
class Removes:
    name = "removes"
    async def stream(self, request):
        said = await request.ask_permission("remove", {"path": request.step})
        yield cm.TurnDone(f"{said.allowed} {dict(said.arguments or {})} {said.reason}")
cm.register_engine(Removes())
@cm.tool(ask=True)
def remove(path: str) -> str:
    return path
cleaner = cm.Agent("cleaner", "Clean.", engine="removes", tools=[remove])
"""


def test_a_tool_is_allowed_edited_denied_and_taken_back(cells: Cells) -> None:
    cells(REMOVES, "%cm workflow w", *(f"%cm step {name} --agent cleaner" for name in "abcd"), "%cm run")
    assert gate(cells.run, "a").kind == "permission"
    cells("%cm edit")
    assert cells.shell.rl_next_input == '%%cm edit a\n{\n  "path": "a"\n}'
    assert "a calls remove with these arguments." in cells.output
    assert "does not take these arguments" in error(cells, '%%cm edit a\n{"way": 1}')
    cells('%%cm edit a\n{"path": "z"}')
    gate(cells.run, "b")
    cells("%cm reject why that one?")
    gate(cells.run, "c")
    assert "Did you mean 'run'?" in error(cells, "%cm approve --scope runs")
    cells("%cm approve --scope always")
    cells.to("d", "done")
    assert [cells.run[name].text for name in "abcd"] == [
        "True {'path': 'z'} ",
        "False {} why that one?",
        "True {} ",
        "True {} ",
    ]
    assert "remove  c (r-" in cells("found = %cm permissions")
    assert [rule.tool for rule in cells.shell.user_ns["found"]] == ["remove"]
    assert "needs a tool's name. Always allowed: remove." in error(cells, "%cm permissions revoke")
    cells("%cm permissions revoke remove")
    assert cm.permissions() == []
    assert "'remove' is not always allowed. None is." in error(cells, "%cm permissions revoke remove")


# -- building ----------------------------------------------------------------------------------------------------------


def test_lines_only_add(cells: Cells) -> None:
    cells(
        "%%cm agent planner\nPlan {{ goal }}.", "%%cm agent implementer\nBuild.", "%cm workflow w --autonomous always"
    )
    cells("%cm step planner", "%cm step implementer --interactive")
    assert cells.book.run is None
    assert "2 steps" in cells("%cm")
    cells("%cm next")
    until(lambda: cells.run.status == "paused", "a pause after one step")
    assert cells.run["planner"].text == "planner 1"
    cells("%cm run")
    gate(cells.run, "implementer")


def test_a_wrong_place_is_refused_in_its_own_cell_and_not_kept(cells: Cells) -> None:
    cells("%cm workflow wf --autonomous never", "%cm step alpha")
    for wrong, words in (
        ("%cm step b --after alpa", "--after 'alpa' is not a step. Did you mean 'alpha'? Steps: alpha."),
        ("%cm step b --after b", "--after 'b' is not a step. Steps: alpha."),
        ("%cm step b --context alpa", "Did you mean 'alpha'?"),
        ("%cm module b --loop-steps 5", "goes back beyond the start"),
    ):
        assert words in error(cells, wrong)
        assert "Workflow wf: 1 step, no run yet." in cells("%cm")
    cells("%cm step c --after alpha", "%cm step b --after alpha")
    assert "alpha" in cells("%cm graph")
    assert [item.id for item in cells.book.items()] == ["alpha", "b", "c"]


def test_a_workflow_whose_steps_do_not_fit_is_not_kept(cells: Cells) -> None:
    cells("%cm workflow wf", "%cm step a")
    assert "goes back beyond the start" in error(cells, "%%cm workflow wf\na -> b(loop 5)")
    assert "Workflow wf: 1 step, no run yet." in cells("%cm")


def test_the_step_behind_which_another_wants_to_stand_is_removed(cells: Cells) -> None:
    cells("%%cm workflow wf\nfirst -> last", "%cm step a --after first", "%cm step b --after a", "%cm remove a")
    assert "3 steps" in cells("%cm")
    cells("%cm step c", "%cm remove b", "%cm remove c", "%cm remove first")
    assert "1 step," in cells("%cm")


def test_a_removal_that_leaves_a_loop_without_its_steps_is_refused(cells: Cells) -> None:
    cells("%cm workflow wf", "%cm step a", "%cm module gate --loop-steps 1")
    assert "goes back beyond the start" in error(cells, "%cm remove a")
    assert "2 steps" in cells("%cm")


def test_a_step_that_is_there_already_is_kept_or_replaced(cells: Cells) -> None:
    cells("%cm workflow wf")
    assert cells("%cm step a").startswith("a is added.")
    assert "a is there already, the same as now" in cells("%cm step a")
    assert "a was there already; it is replaced" in cells("%cm step a --interactive")
    assert "Workflow wf: 1 step," in cells("%cm")


def test_no_run_adds_and_a_later_cell_runs_it_on_the_way(cells: Cells) -> None:
    cells("%cm workflow w --autonomous always", "%%cm step planner --no-run\nPlan.")
    assert cells.book.run is None
    cells("%%cm step implementer --interactive\nBuild {{ planner }}.")
    gate(cells.run, "implementer")
    assert cells.run["implementer"].prompt == "Build planner 1."


def test_agents_are_those_of_cells_and_variables(cells: Cells) -> None:
    cells("import cm_notebook as cm", "who = cm.Agent('planner', prompt='From a variable.')")
    cells("%cm workflow w --autonomous always", "%cm step planner", "%cm run")
    assert cells.run.wait(10)["planner"].prompt == "From a variable."


def test_a_changed_agent_is_taken_at_the_next_run_of_its_step(cells: Cells) -> None:
    cells("%%cm agent planner\nFirst.", WORKFLOW, "%cm step planner", "%cm run")
    cells.to("planner")
    cells("%%cm agent planner\nSecond.", "%cm run")
    until(lambda: cells.run["planner"].prompt == "Second.", "the new prompt")


def test_names_are_checked_when_the_run_starts(cells: Cells) -> None:
    cells("%%cm agent planner\nPlan.", "%%cm workflow w\nplaner -> planner")
    said = error(cells, "%cm run")
    assert "Did you mean 'planner'?" in said


def test_a_function_is_an_agent(cells: Cells) -> None:
    cells(
        "import cm_notebook as cm",
        "@cm.agent('count')\ndef count(turn):\n    return str(len(turn.inputs['goal']))",
        "%cm workflow w --input goal=abc",
        "%cm step count",
        "r = %cm run",
    )
    assert cells.shell.user_ns["r"].wait(10)["count"].text == "3"


@pytest.mark.parametrize(
    "line", ["%%cm step reviewer --agent planer\nLook.", "%%cm module reviewer --agent planer\nLook."]
)
def test_an_agent_that_nobody_defined_is_refused(cells: Cells, line: str) -> None:
    cells("%%cm agent writer\nWrite.", WORKFLOW, PLANNER)
    cells.to("planner")
    said = error(cells, line)
    assert "agent 'planer' is not defined. Did you mean 'planner'? Defined: planner, writer." in said
    assert [step.id for step in cells.run] == ["planner"]
    cells("%%cm step reviewer --agent writer\nLook.", "%%cm step again --agent planner\nLook.")
    assert [step.id for step in cells.run] == ["planner", "reviewer", "again"]


@pytest.mark.parametrize("line", ["%cm run", "%cm next"])
@pytest.mark.parametrize("before", ["%%cm workflow w\nwriter -> reviewer", "%cm workflow w\n%cm step reviewer"])
def test_an_agent_that_is_missing_is_named_with_the_cell_that_defines_it(cells: Cells, before: str, line: str) -> None:
    cells("%%cm agent writer\nWrite.", before)
    said = error(cells, line)
    assert "agent 'reviewer' is not defined. Defined: writer. To define it: %%cm agent reviewer" in said
    assert cells.book.run is None


def test_an_attempt_is_shown_once(cells: Cells) -> None:
    cells(WORKFLOW, PLANNER)
    cells.to("planner")
    cells("%cm show planner --attempt 1")
    assert len(cells.shown) == 1
    assert cells.result.text == cells.run["planner"].attempts[0].text


@pytest.mark.parametrize(
    ("line", "meant"),
    [("%cm stpe planner", "step"), ("%cm reveiw", None), ("%cm pasue", "pause"), ("%cm mode step", "step-by-step")],
)
def test_what_was_meant(cells: Cells, line: str, meant: str | None) -> None:
    said = error(cells, line)
    assert (f"Did you mean '{meant}'?" in said) if meant else ("Did you mean 're" in said)


def test_an_input_that_nothing_reads_is_refused(cells: Cells) -> None:
    cells("%%cm agent planner\nPlan {{ goal }}.", "%%cm workflow w --autonomous always --input gaol=x\nplanner?")
    assert "no prompt uses the input 'gaol'. Did you mean 'goal'?" in error(cells, "%cm run")
    cells("%%cm workflow w --autonomous always\nplanner?")
    assert "'goal'?" in error(cells, "%cm run --input gaol=x")
    cells("%cm run")  # the wrong one was not kept
    gate(cells.run)
    assert cells.run.state.inputs == {"goal": "a todo CLI"}


def test_an_input_may_be_for_a_step_that_is_still_to_come(cells: Cells) -> None:
    cells("%cm workflow w --autonomous always --input topic=shoes", PLANNER)
    until(lambda: cells.run.status == "completed", "the end")
    cells("%%cm step reviewer\nReview {{ topic }}.")
    until(lambda: cells.run.state.steps["reviewer"].settled, "the second step")
    assert cells.run["reviewer"].prompt.startswith("Review shoes.")


@pytest.mark.parametrize("line", [
    "%cm workflow w{}", "%cm run{}", "%%cm agent planner{}\nPlan.", "%%cm step planner{}\nPlan.", "%cm step planner{}",
])  # fmt: skip
def test_a_wrong_engine_is_refused_in_the_cell_that_names_it(cells: Cells, line: str) -> None:
    cells("%%cm workflow w --autonomous never\nplanner", "%%cm agent planner\nPlan.")
    assert "Did you mean 'offline'?" in error(cells, line.format(" --engine offlin"))
    if "agent" not in line and "step" not in line:
        assert "tape 'nope.jsonl' cannot be read" in error(cells, line.format(" --tape nope.jsonl"))
    assert cells.book.run is None
    assert cells.book.plan.engine is None, "nothing was changed"
    cells("%cm run")
    cells.to("planner")


def test_a_tape_is_recorded_played_and_recorded_again(cells: Cells, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CM_HEADLESS", "1")
    said = iter(["one", "two"])

    class Counting:
        name = "counting"

        async def stream(self, request: cm.AgentRequest) -> Any:
            yield cm.TurnDone(next(said))

    cm.register_engine(Counting())
    workflow = "%%cm workflow w --autonomous always --engine counting{}\nplanner"
    agent = "%%cm agent planner\nPlan."

    def text() -> str:
        until(lambda: cells.run.status == "completed", "the end")
        return str(cells.run["planner"].text)

    cells(workflow.format(""), agent, "%cm run --record t.jsonl")
    assert text() == "one"
    cells(workflow.format(" --tape t.jsonl"), agent, "%cm run")
    assert text() == "one"
    cells(workflow.format(" --tape t.jsonl"), agent, "%cm run --record t.jsonl")
    assert text() == "two", "the tape of the workflow is recorded again, so it is not played"
    assert '"text": "two"' in Path("t.jsonl").read_text("utf-8")
    cells(workflow.format(" --tape t.jsonl --record u.jsonl"), agent, "%cm run")
    assert text() == "two"
    assert Path("u.jsonl").read_bytes() == Path("t.jsonl").read_bytes()
    assert "is the tape that is played" in error(cells, "%cm run --tape t.jsonl --record t.jsonl")
    assert "is a folder" in error(cells, workflow.format(" --record ."))


def test_what_a_run_that_is_under_way_cannot_take_is_refused(cells: Cells) -> None:
    run = start(cells)
    assert "which keeps what it began with" in error(cells, "%cm run --engine offline")
    cells(f"{WORKFLOW} --new", "%%cm step planner --no-run\nPlan.", "%cm run --on-gate stop", "%cm run --on-gate stop")
    assert "--on-gate" in error(cells, "%cm run --on-gate approve")
    run.stop()


def test_an_undefined_name_is_said_with_what_is_similar(cells: Cells) -> None:
    cells(WORKFLOW)
    said = error(cells, "%%cm step planner\nPlan {{ gaol }}.")
    assert said.startswith("The prompt of step 'planner' uses `{{ gaol }}`, which is not defined. Similar: `goal`.")
    assert said.endswith("For literal braces add `--raw`.")
    assert cells.book.run is None
    cells("%%cm step planner --raw\nPlan {{ gaol }}.")
    assert cells.to("planner").prompt == "Plan {{ gaol }}."


def test_only_texts_and_numbers_stand_in_a_prompt(cells: Cells) -> None:
    cells("frame = [1, 2]", "n = 3", WORKFLOW)
    assert "{{ frame }} is a list" in error(cells, "%%cm step planner\nPlan {{ frame }}.")
    cells("%%cm step planner\nPlan {{ n }} things.")
    assert cells.to("planner").prompt == "Plan 3 things."
    assert cells.run.state.inputs["n"] == 3


def test_an_input_comes_before_a_variable_and_a_step_before_both(cells: Cells) -> None:
    cells("planner = 'a variable'", "%cm workflow w --input goal=given --autonomous always", PLANNER, IMPLEMENTER)
    run = cells.run
    until(lambda: run.status == "completed", "the end")
    assert run["planner"].prompt == "Plan given."
    assert run["implementer"].prompt == "Build planner 1."


def test_without_a_workflow_the_notebook_is_one(cells: Cells) -> None:
    cells("%%cm step planner --interactive\nPlan.")
    assert cells.run.state.name == "build"
    gate(cells.run)


# -- running -----------------------------------------------------------------------------------------------------------


def test_run_starts_pauses_goes_on_and_begins_again(cells: Cells) -> None:
    cells("%%cm agent planner\nPlan.", "%%cm agent implementer\nBuild.", "%%cm workflow w\nplanner -> implementer")
    cells("%cm run --until planner")
    run = cells.run
    until(lambda: run.status == "paused", "a pause")
    assert run["implementer"].status == "pending"
    cells("%cm run")
    assert run.wait(10).status == "completed"
    cells("%cm run")
    assert cells.run is not run
    assert "Did you mean 'planner'?" in error(cells, "%cm run --until plannr")


def test_run_goes_on_with_what_was_added_to_a_finished_run(cells: Cells) -> None:
    cells("%%cm agent planner\nPlan.", "%%cm agent deployer\nShip.", "%cm workflow w", "%cm step planner", "%cm run")
    run = cells.run.wait(10)
    cells("%cm step deployer", "%cm run")
    assert cells.run is run
    assert run.wait(10)["deployer"].text == "deployer 1"


def test_run_takes_inputs_and_a_policy(cells: Cells) -> None:
    cells("%%cm agent planner\nPlan {{ topic }}.", "%%cm workflow w --autonomous never\nplanner")
    cells("%cm run --input topic='two words' --on-gate approve -o mine")
    run = cells.shell.user_ns["mine"].wait(10)
    assert run["planner"].prompt == "Plan two words."
    assert run["planner"].attempts[0].decision.by == "on_gate"


def test_nothing_to_run(cells: Cells) -> None:
    assert "has no steps yet" in error(cells, "%cm run")
    assert "build has no run yet. Add a step: `%%cm step NAME`" in error(cells, "%cm approve")


def test_no_run_yet_names_the_magic(cells: Cells) -> None:
    assert error(cells, "%cm approve") == "there is no run yet. Begin with `%cm workflow NAME`."
    cells("%cm workflow w", "%cm step a")
    assert "w has no run yet. `%cm run` starts it." in error(cells, "%cm status")


def test_stop_and_go_on(cells: Cells) -> None:
    run = start(cells)
    cells("%cm stop")
    assert run.status == "stopped"
    cells("%cm run")
    assert cells.run is run
    assert len(cells.to("planner").attempts) == 1


def test_pause_and_mode(cells: Cells) -> None:
    cells("%cm workflow w --autonomous false", PLANNER)
    cells.to("planner")
    cells("%cm pause")
    cells("%cm mode unattended")
    assert cells.run.mode == "unattended"


def test_a_mode_chosen_while_the_run_is_paused_says_that_it_stays_paused(cells: Cells) -> None:
    cells("%%cm agent planner\nPlan.", "%%cm agent implementer\nBuild.", "%%cm workflow w\nplanner -> implementer")
    cells("%cm run --until planner")
    until(lambda: cells.run.status == "paused", "the pause")
    assert "w stays paused; its mode is step-by-step from `%cm run` on." in cells("%cm mode step-by-step")


def test_a_locked_workflow_says_so_also_when_it_is_over(cells: Cells) -> None:
    cells(WORKFLOW, PLANNER)
    cells.to("planner")
    assert "is locked to --autonomous never" in error(cells, "%cm mode gates")
    assert "Define it with --autonomous true to switch" in error(cells, "%cm mode gates")
    cells("%cm approve")
    assert cells.run.wait(10).status == "completed"
    assert "is locked to --autonomous never" in error(cells, "%cm mode gates")


def test_resume_by_id(cells: Cells) -> None:
    run = start(cells)
    cells("%cm resume r-")
    assert cells.run.id == run.id
    cells("%cm fork planner")
    cells.restart()
    assert "Did you mean" in error(cells, f"%cm resume {run.id}x")
    assert "'r-' begins the ids of several runs" in error(cells, "%cm resume r-")
    cells(f"%cm resume {run.id[:-1]}")
    assert cells.run.id == run.id
    cells.to("planner")


def test_somebody_is_told_of_a_gate(cells: Cells) -> None:
    told = Path("told")
    tells = """--on-waiting "sh -c 'echo $CM_GATE >> told'\""""
    run = start(cells)
    assert "there is no program" in error(cells, "%cm run --on-waiting notify-sedn")
    cells(f"%cm run {tells}")
    cells("%cm reject again")
    until(lambda: told.exists() and told.read_text() == f"{run.id}/planner/2/2\n", "the second gate")
    cells.restart()
    cells(f"%cm resume {run.id} {tells}")
    until(lambda: told.read_text() == 2 * f"{run.id}/planner/2/2\n", "the gate that is open")
    cells("%cm approve --output 'My plan'")
    cells.to("implementer")
    assert cells.run["planner"].text == "My plan"


# -- going back --------------------------------------------------------------------------------------------------------


def two_steps(cells: Cells) -> cm.Run:
    run = start(cells)
    cells.to("planner")
    cells("%cm approve", IMPLEMENTER)
    cells.to("implementer")
    return run


def test_rewind_waits_before_the_step_and_its_cell_runs_it_alone(cells: Cells) -> None:
    run = two_steps(cells)
    said = cells("%cm rewind planner")
    assert "Back at planner: nothing runs until you go on. Next: `%cm run`" in said
    assert run.status == "paused"
    cells("%%cm step planner\nPlan {{ goal }} in three steps.")
    cells.to("planner")
    assert run["planner"].prompt.endswith("in three steps.")
    cells("%cm approve")
    until(lambda: run.status == "paused", "the run to stop behind the cell that was run")
    assert run["implementer"].status == "pending"
    cells("%cm run")
    cells.to("implementer")
    assert len(run["implementer"].attempts) == 2
    assert "name planner" not in error(cells, "%cm rewind plannr")


def test_rewind_in_a_new_kernel(cells: Cells) -> None:
    run = two_steps(cells)
    cells.restart()
    cells(WORKFLOW, PLANNER.replace("%%cm step planner", "%%cm agent other"))
    assert "Back at planner" in cells("%cm rewind planner")
    assert cells.run.id == run.id
    assert cells.run.status == "paused"
    cells("%cm run")
    cells.to("planner")
    assert len(cells.run["planner"].attempts) == 2


def test_a_fork_is_what_the_cells_go_on_with(cells: Cells) -> None:
    run = two_steps(cells)
    said = cells("other = %cm fork implementer")
    fork = cells.shell.user_ns["other"]
    assert f"Run {fork.id} is a fork of {run.id} at implementer." in said
    assert cells.run is fork
    assert (run.status, fork.status) == ("waiting", "paused")
    cells("%cm run")
    cells.to("implementer")
    assert f"fork of {run.id} at implementer" in cells("%cm runs")
    assert f"fork of {run.id} at implementer" in cells("%cm show")
    said = cells(f"%cm diff --against {run.id}")
    assert "implementer 1" in said
    assert "the same" in said
    assert "<table" in cells.shown[-1]["text/html"]
    cells.shell.user_ns["before"] = run
    assert "-implementer 1" in cells("%cm diff implementer --against before")
    for run_id in (run.id, "{before.id}", "$before.id"):
        assert "-implementer 1" in cells(f"%cm diff implementer --against {run_id}")
    cells("%cm approve implementer")
    assert run.gates, "only the fork was decided"
    cells(f"%cm resume {run.id}")
    assert cells.run is run
    assert "leave out the attempts" in error(cells, f"%cm diff implementer 1 2 --against {fork.id}")
    assert "needs a step, or another run" in error(cells, "%cm diff")
    assert "Did you mean" in error(cells, f"%cm fork planner --run {run.id}x")


def test_a_fork_made_in_python_is_gone_on_with_too(cells: Cells) -> None:
    run = two_steps(cells)
    fork = run.fork("planner")
    cells("%cm run")
    cells.to("planner")
    assert cells.run is fork
    assert len(run["planner"].attempts) == 1


def test_a_run_resumed_in_python_is_gone_on_with(cells: Cells) -> None:
    run = two_steps(cells)
    run.stop().wait(10)
    again = cm.resume(run.id, until="planner", rewind="planner")
    cells("%cm run")
    cells.to("planner")
    assert cells.run is again


IN_PYTHON = """\
import cm_notebook as cm
@cm.agent('first')
def work(turn):
    return f'first {turn.attempt}'
agents = {'first': work, 'second': cm.Agent('planner', 'Plan.')}
del work
flow = cm.Workflow('mine', agents=[*agents.values()], steps='first -> planner?', max_concurrency=2)
run = flow.start(max_turns=20)
"""


@pytest.mark.parametrize("line", ["run", "next"])
@pytest.mark.parametrize("before", ["", "another workflow"])
@pytest.mark.parametrize("rewind", ["%cm rewind first", "run.rewind('first')"])
def test_a_run_started_in_python_is_gone_on_with_when_it_went_back(
    cells: Cells, line: str, before: str, rewind: str
) -> None:
    if before:
        other = start(cells)
        cells.to("planner")
    cells(IN_PYTHON)
    run = cells.shell.user_ns["run"]
    gate(run)
    events = len(run.events)
    cells(rewind, f"%cm {line}")
    assert cells.run is run
    until(lambda: run.gates if line == "run" else run.status == "paused" and run["first"].status == "done", "the run")
    assert run["first"].text == "first 2"
    assert len(run["planner"].attempts) == (2 if line == "run" else 1)
    assert "WorkflowChanged" not in [event.type for event in run.events[events:]], "it goes on as it is"
    if before:
        assert other.id in cells("%cm")
        cells(WORKFLOW)
        assert cells.run is other
        other.stop()
    run.stop()


def test_a_run_taken_up_by_its_id_keeps_its_mode(cells: Cells) -> None:
    run = start(cells)
    cells.to("planner")
    cells.restart()
    cells(f"%cm resume {run.id}", "%cm pause", "%cm run")
    assert cells.run.mode == "step-by-step"
    assert cells.run.workflow.autonomous_mode == "never"


def test_attempts_stand_in_two_columns(cells: Cells) -> None:
    start(cells)
    cells.to("planner")
    cells("%cm reject shorter")
    until(lambda: cells.run.gates and len(cells.run["planner"].attempts) == 2, "the second attempt")
    cells("%cm diff planner --side-by-side")
    assert "<del" in (made := cells.shown[-1]["text/html"])
    assert made.count("<td") >= 4


# -- two workflows -----------------------------------------------------------------------------------------------------


def test_the_current_run_is_that_of_the_current_workflow(cells: Cells) -> None:
    first = start(cells)
    said = cells("%cm workflow other --autonomous never")
    assert f"Run {first.id} of careful still waits at planner: `%cm resume {first.id}` goes back to it." in said
    for line in ("%cm status", "%cm show", "%cm show planner", "%cm stop", "%cm approve"):
        refused = error(cells, line)
        assert "other has no run yet. Add a step: `%%cm step NAME`" in refused
        assert first.id in refused
    assert first.id in cells("%cm")
    with pytest.raises(cm.TransitionError):
        cm.current()
    cells("%%cm step deployer\nShip.")
    second = cells.run
    assert second is not first
    cells.to("deployer")
    cells("%cm show")
    assert cells.result is second
    assert "Did you mean" in error(cells, "%cm show deploye")
    assert "implementer" not in cells("%cm graph")
    assert [gate.step for gate in first.gates] == ["planner"]


def test_the_gate_of_another_workflows_run_is_decided_by_its_steps_name(cells: Cells) -> None:
    first = start(cells)
    cells("%cm workflow other --autonomous never", "%cm approve planner")
    gate(first, "implementer")
    cells("%%cm step deployer\nShip.")
    cells.to("deployer")
    cells("%cm reject --step implementer no tests")
    until(lambda: len(first["implementer"].attempts) == 2, "the second attempt")
    assert cells.run["deployer"].status == "waiting"


def test_of_several_runs_that_were_left_the_last_is_named_and_the_others_counted(cells: Cells) -> None:
    for name in ("one", "two", "three"):
        cells(f"%cm workflow {name} --autonomous never", PLANNER)
        cells.to("planner")
    said = cells("%cm workflow four")
    assert said.count("goes back to it") == 1
    assert "of three still waits at planner" in said
    assert "And 2 more: `%cm runs`." in said
    for left in cells.book.left.values():
        left.run.stop()


@pytest.mark.parametrize("way", ["cell", "resume"])
def test_back_to_the_workflow_before(cells: Cells, way: str) -> None:
    first = start(cells)
    cells("%cm workflow other --autonomous never", "%%cm step deployer\nShip.")
    second = cells.run
    cells.to("deployer")
    if way == "cell":
        said = cells(WORKFLOW)
        assert f"careful goes on with its run {first.id}, which is waiting." in said
        assert f"Run {second.id} of other still waits at deployer" in said
    else:
        cells(f"%cm resume {first.id}")
        assert f"Run {second.id} of other" in cells("%cm")
    assert cells.run is first
    assert cm.current() is first
    cells(PLANNER, "%cm approve")
    cells.to("implementer")
    assert [step.id for step in first] == ["planner", "implementer"]
    assert len(first["planner"].attempts) == 1
    second.stop()
    assert second.id not in cells("%cm")


def test_a_run_started_from_python_is_current_until_the_workflows_cell_runs_again(cells: Cells) -> None:
    first = start(cells)
    cells("import cm_notebook as cm", "agents = [cm.Agent('planner', 'Plan.')]")
    cells("mine = cm.Workflow('mine', agents=agents, steps='planner?').start()")
    mine = cells.shell.user_ns["mine"]
    assert mine.id in cells("%cm")
    said = cells(WORKFLOW)
    assert f"careful goes on with its run {first.id}" in said
    assert mine.id in said
    cells("%cm show")
    assert cells.result is first
    mine.stop()


def test_a_workflow_cell_that_is_refused_changes_nothing(cells: Cells) -> None:
    first = start(cells)
    cells("%cm workflow other --autonomous never", "%%cm step deployer\nShip.")
    second = cells.run
    cells.to("deployer")
    assert "Put 'planner' before" in error(cells, "%%cm workflow careful --autonomous never\nimplementer -> planner")
    assert cells.run is second
    assert cm.current() is second
    first.stop()


# -- deciding ----------------------------------------------------------------------------------------------------------


def test_edit_as_line_opens_a_cell_and_as_cell_decides(cells: Cells, monkeypatch: pytest.MonkeyPatch) -> None:
    start(cells)
    opened: list[str] = []
    monkeypatch.setattr(cells.shell, "set_next_input", lambda text, replace=False: opened.append(text))
    cells("%cm edit")
    assert opened == ["%%cm edit planner\nplanner 1"]
    cells("%%cm edit planner\nmy own plan")
    assert cells.run["planner"].text == "my own plan"
    assert cells.run["planner"].attempts[-1].edited


def test_edit_where_a_step_failed_opens_its_prompt(cells: Cells, monkeypatch: pytest.MonkeyPatch) -> None:
    cm.register_engine(cm.ScriptedEngine({"planner": [cm.Reply(error=cm.EngineError("no luck")), "at last"]}))
    cells("%cm workflow w --autonomous always", PLANNER)
    assert gate(cells.run).kind == "failed"
    opened: list[str] = []
    monkeypatch.setattr(cells.shell, "set_next_input", lambda text, replace=False: opened.append(text))
    said = cells("%cm edit")
    assert "planner is tried again with this prompt" in said
    assert opened == ["%%cm retry planner\nPlan a todo CLI."]
    cells("%%cm retry planner\nPlan it better.")
    assert cells.run.wait(10)["planner"].prompt == "Plan it better."
    assert cells.run["planner"].text == "at last"


def test_edit_where_there_is_nothing_to_edit_says_what_to_run(cells: Cells) -> None:
    cells("import cm_notebook as cm", "@cm.agent('ask')\ndef ask(turn):\n    return turn.ask_human('Which?')")
    cells("%cm workflow w", "%cm step ask", "%cm run")
    gate(cells.run)
    assert "no text to edit: it asks a question. Use `%%cm answer` or `%cm stop`." in error(cells, "%cm edit")


def test_reject_as_cell_takes_every_character(cells: Cells) -> None:
    start(cells)
    cells("%%cm reject\nWhy no tests? I don't see `any`: {{ goal }} {x}")
    assert cells.run["planner"].attempts[0].feedback == "Why no tests? I don't see `any`: {{ goal }} {x}"


def test_a_line_expands_nothing(cells: Cells) -> None:
    start(cells)
    cells("%cm reject not {goal} and $goal")
    assert cells.run["planner"].attempts[0].feedback == "not {goal} and $goal"


def test_a_line_takes_variables_where_other_magics_do(cells: Cells) -> None:
    """In names and values, and never in a person's own words."""
    run = two_steps(cells)
    cells("step = 'implementer'", "names = {'first': 'planner'}")
    cells.shell.user_ns["before"] = run
    cells("other = %cm fork {step}", "%cm run")
    cells.to("implementer")
    assert "-implementer 1" in cells("%cm diff {step} --against {before.id}")
    cells("%cm show {names[first]}")
    assert cells.result.id == "planner"
    assert "there is no run '{nobody.id}'" in error(cells, "%cm diff --against {nobody.id}").lower()
    cells("%cm approve --output 'of {step} and {\"json\": 1} and {{ goal }}'")
    assert cells.run["implementer"].text == 'of {step} and {"json": 1} and {{ goal }}'
    run.stop()


def test_reject_needs_words(cells: Cells) -> None:
    start(cells)
    assert "say why" in error(cells, "%cm reject")
    assert cells.run.gates


def test_skip_and_answer_and_retry(cells: Cells) -> None:
    cells("import cm_notebook as cm")
    cells("@cm.agent('ask')\ndef ask(turn):\n    return turn.ask_human('Which?')")
    cells("%cm workflow w", "%cm step ask", "%cm run")
    gate(cells.run)
    assert "cannot be answered with 'approve'" in error(cells, "%cm approve")
    cells("%cm answer the blue one?")
    assert cells.run.wait(10)["ask"].text == "the blue one?"
    cells(f"{WORKFLOW} --new", PLANNER)
    cells.to("planner")
    cells("%cm skip")
    assert cells.run["planner"].status == "skipped"


def test_a_decision_asked_for_before_its_gate_opened_is_refused(cells: Cells, monkeypatch: pytest.MonkeyPatch) -> None:
    start(cells)
    asked = gate(cells.run).opened_at - 1
    monkeypatch.setattr(bridge, "asked_at", lambda: asked)
    for line in ("%cm approve", "%cm skip", "%cm reject no", "%%cm edit\nmine"):
        assert "nothing was decided" in error(cells, line)
    assert gate(cells.run).attempt == 1


def test_after_a_restart_run_all_decides_nothing_either(cells: Cells, monkeypatch: pytest.MonkeyPatch) -> None:
    start(cells)
    cells.restart()
    asked = time.time()
    cells(WORKFLOW, PLANNER)
    monkeypatch.setattr(bridge, "asked_at", lambda: asked)
    assert "nothing was decided" in error(cells, "%cm approve")


def test_a_second_decision_says_who_was_first(cells: Cells) -> None:
    start(cells)
    cells("%cm approve planner")
    assert "already approved by you" in error(cells, "%cm approve planner")


# -- nobody there ------------------------------------------------------------------------------------------------------


def test_headless_a_cell_waits_says_each_event_and_leaves_the_view(
    cells: Cells, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CM_HEADLESS", "1")
    monkeypatch.setenv("CM_ON_GATE", "approve")
    cells(WORKFLOW)
    assert "cm: planner ok" in cells(PLANNER)
    assert "text/html" in cells.shown[-1]
    assert cells.run["planner"].status == "done"
    assert "Nothing is to be decided" in cells("%cm approve")


def test_headless_an_undecided_gate_stops_the_notebook(cells: Cells, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CM_HEADLESS", "1")
    cells(WORKFLOW)
    assert "nobody can answer here" in error(cells, PLANNER)
    assert "text/html" in cells.shown[-1]


def test_headless_a_failure_stops_the_notebook(cells: Cells, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CM_HEADLESS", "1")
    cells(
        "%cm workflow w",
        "import cm_notebook as cm",
        "@cm.agent('bad')\ndef bad(turn):\n    raise ValueError('no luck')",
    )
    cells("%cm step bad")
    assert "no luck" in error(cells, "%cm run")
    assert cells.run.error is not None


# -- the magic itself --------------------------------------------------------------------------------------------------


def test_help_fits_one_screen_and_names_every_subcommand(cells: Cells) -> None:
    said = cells.shell.find_line_magic("cm").__doc__
    lines = said.splitlines()
    assert len(lines) <= 26
    assert max(map(len, lines)) <= 120
    words = said.replace("%cm", " ").split()
    assert [name for name in options.COMMANDS if name not in words] == []
    assert "%cm step NAME" in cells("%cm step --help")
    assert "Did you mean 'step'?" in error(cells, "%cm stepp x")


def test_what_is_said_begins_with_a_capital_or_a_name(cells: Cells) -> None:
    def line(source: str) -> str:
        with pytest.raises(cm.CodeMachineError) as said:
            cells(source)
        return said.value._render_traceback_()[0]

    assert line("%cm approve").startswith("There is no run yet.")
    cells("%cm workflow careful")
    assert line("%cm run").startswith("careful has no steps yet.")
    assert line("%cm next").startswith("careful has no steps yet.")
    assert cells("%%cm agent planner\nPlan.").startswith("Agent planner is defined.")
    assert "careful: 1 step. It runs by itself; with" in cells("%%cm workflow careful\nplanner")
    assert "careful: 2 steps. It asks you at planner; with" in cells("%%cm workflow careful\nplanner? -> planner-2")
    assert "careful: 1 step. Next: %cm run" in cells("%%cm workflow careful --autonomous never\nplanner")
    assert "careful: 1 step, no run yet." in cells("%cm")


def test_bare_cm_says_where_things_stand(cells: Cells) -> None:
    assert "%cm workflow my-workflow" in cells("%cm")
    cells(WORKFLOW)
    assert "%%cm step NAME" in cells("%cm")
    cells(PLANNER)
    cells.to("planner")
    said = cells("%cm")
    assert "careful" in said
    assert cells.run.id in said
    assert "planner is waiting for you" in said
    assert "%cm approve" in said


def test_a_result_is_shown_once(cells: Cells) -> None:
    cells(WORKFLOW, PLANNER)
    cells.to("planner")
    cells("%cm show")
    assert len(cells.shown) == 1
    cells("run = %cm show")
    assert len(cells.shown) == 1
    assert cells.shell.user_ns["run"] is cells.run
    for line in ("%cm runs", "%cm graph", "%cm status", "%cm doctor", "%cm show planner"):
        cells(line)
        assert len(cells.shown) == 1, line


def test_no_name_is_written_but_o(cells: Cells) -> None:
    before = {name for name in cells.shell.user_ns if not name.startswith("_")}
    start(cells)
    assert {name for name in cells.shell.user_ns if not name.startswith("_")} == before
    cells(f"{PLANNER.replace('planner', 'planner -o step', 1)}")
    assert cells.shell.user_ns["step"].id == "planner"
    assert "is not a name" in error(cells, "%cm status -o 1x")


def test_an_error_is_one_line_and_keeps_its_traceback(cells: Cells) -> None:
    start(cells)
    error(cells, "%cm show nonsense")
    assert isinstance(cells.run.error, cm.TransitionError)
    assert cells.run.error.__traceback__ is not None


def test_a_result_too_early_is_one_sentence_and_the_view(cells: Cells) -> None:
    start(cells)
    said = error(cells, "cm_run = %cm show\ncm_run['planner'].text")
    assert said.startswith('"planner" is waiting for your decision')
    assert cells.output.count("Traceback") == 0


def test_a_result_too_early_shows_the_gates_bar_and_no_more(cells: Cells) -> None:
    start(cells)
    failure = cm.GatePending("too early", gate=gate(cells.run), run=cells.run)
    with capture_output() as captured:
        assert failure._render_traceback_() == ["too early"]
        assert failure._render_traceback_() == ["too early"], "IPython asks twice; it is shown once"
    (shown,) = captured.outputs
    assert "planner</b> is waiting for you" in shown.data["text/html"]
    assert "%cm approve" in shown.data["text/html"]
    assert "implementer</summary>" not in shown.data["text/html"]
    assert "planner 1" not in shown.data["text/html"], "its card stays under its own cell"


def test_config_shows_and_sets(cells: Cells) -> None:
    assert "CM_ENGINE" in cells("%cm config")
    cells("%config CM.engine = 'offline'")
    assert config.lookup("engine") == ("offline", "%config CM.engine")
    assert "%config CM.engine" in cells("%cm config")
    shown = cells.shown[-1]["text/html"]
    assert shown.count("<tr>") == 1 + len(config.SETTINGS)
    assert ">CM.engine</code></td>" in shown
    assert "engine of agents" in cells("%config CM")
    cells("%config CM.direct_clicks = False")
    assert not bridge.direct_clicks.enabled
    cells("%config CM.direct_clicks = True")
    assert bridge.direct_clicks.enabled


@pytest.mark.parametrize(("said", "words"), [
    ("view = 'ful'", "%config CM.view='ful' is not known. Did you mean 'full'? Possible: full, html, log."),
    ("on_gate = 'aprove'", "Did you mean 'approve'?"),
    ("engine = 'offlin'", "Did you mean 'offline'?"),
    ("veiw = 'full'", "There is no setting CM.veiw. Did you mean 'view'?"),
])  # fmt: skip
def test_a_setting_that_cannot_be_is_refused_in_its_cell(cells: Cells, said: str, words: str) -> None:
    with pytest.raises(SettingRefused) as refused:
        cells(f"%config CM.{said}\nafter = 1")
    assert words in "\n".join(refused.value._render_traceback_())
    assert "\n" not in str(refused.value)
    assert "after" not in cells.shell.user_ns, "the cell ends there"
    assert config.chosen == {}, "nothing was changed"
    cells("%config CM.view = 'html'", "%config CM.on_gate = None")
    assert config.setting("view") == "html"


def test_a_setting_from_elsewhere_that_cannot_be_is_refused_with_where_it_stands(
    cells: Cells, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CM_VIEW", "fancy")
    assert "CM_VIEW='fancy' is not known" in cells("%cm config")
    monkeypatch.setenv("CM_ON_GATE", "maybe")
    assert "CM_ON_GATE='maybe' is not known." in error(cells, "%%cm step planner\nPlan.")
    monkeypatch.delenv("CM_ON_GATE")
    monkeypatch.setenv("CM_ENGINE", "scriptd")
    assert "CM_ENGINE='scriptd': there is no engine 'scriptd'. Did you mean" in cells("%reload_ext cm_notebook")
    monkeypatch.delenv("CM_VIEW")
    (tmp_path / "pyproject.toml").write_text("[tool.cm_notebook]\nview = 'fancy'\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(cm.CodeMachineError, match=r"^pyproject.toml: view=.fancy. is not known"):
        config.setting("view")


def test_loading_twice_and_unloading_leaves_no_trace(cells: Cells) -> None:
    shell = cells.shell
    matchers, settings = len(shell.Completer.custom_matchers), len(shell.configurables)
    run = start(cells)
    cells("%reload_ext cm_notebook")
    assert len(shell.Completer.custom_matchers) == matchers
    assert len(shell.configurables) == settings
    assert run.id in cells("%cm")
    cells("%unload_ext cm_notebook")
    assert cells.shell.find_line_magic("cm") is None
    assert cm.GatePending.show is None
    said = cells("%load_ext cm_notebook")
    assert said.count("\n") <= 2
    assert "engine scripted (CM_ENGINE)" in said
    assert "%cm workflow" in said


def test_completion_through_ipython(cells: Cells) -> None:
    start(cells)
    completer = cells.shell.Completer

    def offered(line: str) -> set[str]:
        with provisionalcompleter():
            return {line[: c.start] + c.text for c in completer.completions(line, len(line))}

    assert "%cm status" in offered("%cm st")
    assert "%cm run --until" in offered("%cm run --un")
    assert "%cm approve planner" in offered("%cm approve pl")
    assert "run = %cm run" in offered("run = %cm ru")
    assert offered("%%cm step x\nBuild {{ pla") == {"%%cm step x\nBuild {{ planner"}
    assert offered("%%cm step x\nBuild {{ go") == {"%%cm step x\nBuild {{ goal"}
    cells("%%cm agent quality-gate\nJudge.")
    assert offered("%%cm workflow w\nplanner -> quality-g") == {"%%cm workflow w\nplanner -> quality-gate"}


def test_keys(cells: Cells, monkeypatch: pytest.MonkeyPatch) -> None:
    key = "sk-planted-0123456789abcdef"
    monkeypatch.setattr(keys, "_typed", {})
    monkeypatch.setattr(keys, "_known", {})
    monkeypatch.setattr("getpass.getpass", lambda prompt: key)
    monkeypatch.setenv("OPENAI_API_KEY", key + "2")
    assert "anthropic has a key until this session ends." in cells("%cm keys set anthropic")
    said = [line.split(maxsplit=1) for line in cells("%cm keys").splitlines()]
    assert ">anthropic</code></td>" in cells.shown[-1]["text/html"]
    assert ["anthropic", "typed, for this session"] in said
    assert ["openai", "OPENAI_API_KEY"] in said
    assert ["ollama", "none"] in said
    assert key[:6] not in cells.output
    for line in (f"set anthropic {key}", f"set {key}", key, f"{key} anthropic", "set", f"set anthropic --key={key}"):
        assert key not in error(cells, f"%cm keys {line}")
    assert "The key of anthropic is forgotten." in cells("%cm keys forget anthropic")


def test_doctor_says_what_is_missing_and_how_to_mend_it(cells: Cells, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "engine in force" in cells("%cm doctor")
    monkeypatch.setenv("CM_ENGINE", "nobody")
    said = cells("report = %cm doctor")
    assert "name one of: anthropic, lmstudio, offline, " in said
    assert "OPENAI_API_KEY is not set" in said
    assert cells.shell.user_ns["report"].problems
    assert isinstance(cm.doctor().html, str)
