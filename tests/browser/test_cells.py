"""Cells of a notebook as a person runs them, in JupyterLab: Run All, running a cell again, a kernel that restarts.

``tests/jupyter/test_magics.py`` holds every row of UX.md §1a to its words; here they are seen in a page, by hand.
With ``CM_SCREENSHOTS`` set to a folder, pictures are left there.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.browser.harness import ROOT

SETUP = """\
%load_ext cm_notebook
import cm_notebook as cm
replies = {name: [f"{name} says {n}" for n in range(1, 6)] for name in ("planner", "implementer", "reviewer")}
cm.register_engine(cm.ScriptedEngine(replies))"""
GOAL = "goal = 'a todo CLI'"
WORKFLOW = "%cm workflow careful --autonomous never --engine scripted"
PLANNER = "%%cm step planner\nPlan {{ goal }}."
IMPLEMENTER = "%%cm step implementer\nBuild {{ planner }}."
REVIEWER = "%%cm step reviewer\nReview {{ implementer }}."
PLAN, BUILD, REVIEW = 3, 4, 5
ASK = "run = cm.current(); print([(s.id, s.status, len(s.attempts)) for s in run], [g.id for g in run.gates])"


class Pages:
    """A three-step notebook of pattern 1; its last cell tells what the kernel knows."""

    def __init__(self, open_notebook, *more, **options):
        self.nb = open_notebook([SETUP, GOAL, WORKFLOW, PLANNER, IMPLEMENTER, REVIEWER, *more, ASK], **options)
        self.last = 6 + len(more)

    def run(self, *cells):
        for cell in cells:
            self.nb.run_cell(cell)
            self.nb.wait_done(cell)

    def write(self, cell, source):
        """Put other text into a cell, and run it."""
        self.nb.page.evaluate("([i, text]) => cmTest.cell(i).model.sharedModel.setSource(text)", [cell, source])
        self.run(cell)

    def known(self):
        """What the kernel knows about the run."""
        self.run(self.last)
        return self.nb.text(self.last).strip()

    def approve(self, cell, step):
        self.nb.wait_text(cell, f"{step} is waiting for you")
        self.nb.click("button", "Approve", cell=cell)
        self.nb.wait_text(cell, "approved")

    def picture(self, name, cell):
        if folder := os.environ.get("CM_SCREENSHOTS"):
            self.nb.page.wait_for_timeout(300)
            self.nb.screenshot(Path(folder) / f"{name}.png", cell)


def test_run_all_stops_at_the_first_gate_and_clicks_let_the_rest_go_on(open_notebook, kernel):
    page = Pages(open_notebook, "review = %cm show reviewer\nreview.text", kernel=kernel)
    nb, end = page.nb, 6
    nb.run_all()
    nb.wait_text(PLAN, "planner is waiting for you")
    nb.wait_text(BUILD, "starts when planner is approved")
    nb.wait_text(REVIEW, "starts when planner is approved")
    nb.wait_text(end, "has no result yet")
    assert "Traceback" not in nb.text(end)
    assert not nb.text(page.last)  # Run All has stopped before it
    page.picture("run-all-stopped", end)
    page.approve(PLAN, "planner")
    page.approve(BUILD, "implementer")
    page.approve(REVIEW, "reviewer")
    nb.run_cell(end)
    nb.wait_text(end, "'reviewer says 1'")
    assert "Approved by you" in nb.text(PLAN)
    assert nb.console_errors == []


@pytest.mark.parametrize("app", ["lab", "notebook"])
def test_run_all_of_the_shipped_notebook(open_notebook, app):
    """As a newcomer meets it: it plays its tape, and the person's own words count."""
    book = ROOT / "notebooks" / "01-human-in-the-loop.ipynb"
    cells = json.loads(book.read_text(encoding="utf-8"))["cells"]
    code = {number: "".join(cell["source"]) for number, cell in enumerate(cells) if cell["cell_type"] == "code"}
    plan, build, review, show, read, *rest = [number for number in code if number >= 6]
    assert "review.text" in code[read]
    nb = open_notebook(book, app=app)
    nb.run_all()
    nb.wait_text(plan, "planner is waiting for you")
    for cell in (build, review):
        nb.wait_text(cell, "starts when planner is approved")
    nb.wait_text(read, "has no result yet")
    assert "Traceback" not in nb.text(read)
    assert [nb.prompt(cell) for cell in rest] == ["", ""], "Run All has stopped before them"
    nb.click("button", "Reject…", cell=plan)
    nb.type("Who tests it?")
    nb.press("Control+Enter")
    nb.wait_text(plan, "2 attempts")
    nb.wait_text(plan, "Recorded answer: your words reached no model")
    for cell, step in ((plan, "planner"), (build, "implementer"), (review, "reviewer")):
        nb.wait_text(cell, f"{step} is waiting for you")
        nb.click("button", "Approve", cell=cell)
        nb.wait_text(cell, "Approved by you")
    for cell in (show, read, *rest):
        nb.run_cell(cell)
        nb.wait_done(cell)
    assert "Who tests it?" in nb.text(plan)
    assert "careful-builder" in nb.text(rest[-1])
    saved = nb.save()
    assert "widgets" not in saved["metadata"]
    outputs = [output for cell in saved["cells"] for output in cell.get("outputs", ())]
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert "widget-view" not in json.dumps(outputs)
    assert nb.console_errors == []


def test_a_result_too_early_is_a_sentence_with_the_gate_and_its_buttons_work(open_notebook):
    page = Pages(open_notebook, "cm.current()['planner'].text")
    nb, end = page.nb, 6
    nb.run_all()
    nb.wait_text(end, '"planner" is waiting for your decision')
    assert "Traceback" not in nb.text(end)
    page.picture("too-early", end)
    approve = nb.by_role("button", "Approve", cell=end)
    approve.first.wait_for()
    assert approve.count() == 1
    nb.click("button", "Approve", cell=end)
    nb.wait_text(BUILD, "implementer is waiting for you")
    page.run(end)
    assert nb.text(end).strip() == "'planner says 1'"


def test_an_approve_cell_in_a_run_all_decides_nothing(open_notebook, front):
    page = Pages(open_notebook, **front)
    nb = page.nb
    nb.page.evaluate("([i, text]) => cmTest.cell(i).model.sharedModel.setSource(text)", [BUILD, "%cm approve"])
    nb.run_all()
    nb.wait_text(PLAN, "planner is waiting for you")
    nb.wait_text(BUILD, "Nothing was decided")
    assert "('planner', 'waiting', 1)" in page.known()
    page.run(BUILD)  # now it has been seen
    nb.wait_text(PLAN, "Approved by you")


def test_running_cells_again(open_notebook):
    page = Pages(open_notebook)
    nb = page.nb
    page.run(0, 1, 2, PLAN, BUILD)
    nb.wait_text(PLAN, "planner is waiting for you")
    before = page.known()
    page.run(2)  # workflow, unchanged: keeps its run
    nb.wait_text(2, "goes on with its run")
    page.run(PLAN)  # waiting: shown again, with buttons that work
    page.run(BUILD)  # queued: the same
    nb.wait_text(BUILD, "starts when planner is approved")
    assert page.known() == before
    page.approve(PLAN, "planner")
    page.approve(BUILD, "implementer")
    page.run(PLAN)  # finished: a new attempt
    nb.wait_text(PLAN, "planner is waiting for you")
    assert "('planner', 'waiting', 2)" in page.known()
    page.approve(PLAN, "planner")
    nb.wait_text(BUILD, "implementer is stale")
    page.picture("stale", BUILD)
    page.run(BUILD)  # stale: it runs again
    page.approve(BUILD, "implementer")
    page.write(PLAN, "%%cm step planner\nPlan {{ goal }} in three steps.")  # changed: replaced, and a new attempt
    nb.wait_text(PLAN, "planner is waiting for you")
    page.run(REVIEW)  # new: comes last
    nb.wait_text(REVIEW, "starts when planner is approved")
    known = page.known()
    assert known.index("planner") < known.index("implementer") < known.index("reviewer")
    assert "('planner', 'waiting', 3)" in known
    page.write(2, "%cm remove reviewer")
    assert "reviewer" not in page.known()
    nb.wait_text(REVIEW, "removed")


def test_a_workflow_cell_that_changed_or_whose_run_is_over(open_notebook):
    page = Pages(open_notebook)
    nb = page.nb
    page.run(0, 1, 2, PLAN, BUILD)
    page.approve(PLAN, "planner")
    nb.wait_text(BUILD, "implementer is waiting for you")
    page.write(2, f"{WORKFLOW} --input goal='a shop'")  # changed: what has run on the old goal is stale
    nb.wait_text(2, "goes on with its run")
    nb.wait_text(PLAN, "planner is stale")
    assert page.known().startswith("[('planner', 'waiting', 1), ('implementer', 'waiting', 1)]")
    page.run(PLAN)  # again, with the new one
    page.approve(PLAN, "planner")
    page.write(REVIEW, "%%cm step reviewer --after planner\nReview {{ planner }}.")
    assert page.known().index("reviewer") < page.known().index("implementer")
    page.approve(REVIEW, "reviewer")
    page.approve(BUILD, "implementer")
    page.run(2)  # its run is over: the next step begins another one
    page.run(PLAN)
    nb.wait_text(PLAN, "planner is waiting for you")
    assert page.known().startswith("[('planner', 'waiting', 1)]")


def test_a_kernel_restart_at_a_gate_comes_back_to_the_same_gate(open_notebook, front):
    page = Pages(open_notebook, **front)
    nb = page.nb
    nb.run_all()
    page.approve(PLAN, "planner")
    nb.wait_text(BUILD, "implementer is waiting for you")
    before = page.known()
    nb.restart_kernel()
    page.run(0, 1, 2)
    nb.wait_text(2, "goes on with its run")
    page.run(PLAN)
    nb.wait_text(PLAN, "planner says 1")
    assert page.known() == before
    page.run(BUILD)
    assert page.known() == before
    page.approve(BUILD, "implementer")
    nb.page.wait_for_timeout(1000)
    assert "('reviewer', 'pending', 0)" in page.known()  # its cell has not been run yet
    page.run(REVIEW)
    page.approve(REVIEW, "reviewer")
    assert nb.console_errors == []


@pytest.mark.parametrize("line", ["%cm edit"])
def test_edit_opens_a_cell_with_the_output(open_notebook, line):
    page = Pages(open_notebook)
    nb = page.nb
    page.run(0, 1, 2, PLAN)
    nb.wait_text(PLAN, "planner is waiting for you")
    page.write(BUILD, line)
    nb.wait_until(lambda: nb.source(BUILD + 1) == "%%cm edit planner\nplanner says 1", what="a cell with the output")
    page.last += 1
    page.write(BUILD + 1, "%%cm edit planner\nmy own plan")
    nb.wait_text(PLAN, "my own plan")
    assert "Edited and approved by you" in nb.text(PLAN)
