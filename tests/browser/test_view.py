"""The run's view, as a person meets it: in JupyterLab, with mouse and keyboard.

With ``CM_SCREENSHOTS`` set to a folder, pictures of each state are left there, in light and dark.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

SETUP = """
import cm_notebook as cm
from cm_notebook.jupyter.view import show
used = dict(usage=cm.Usage(input_tokens=1200, output_tokens=400), cost_usd=0.008)
engine = cm.ScriptedEngine({
    "planner": [cm.Reply("1. Create `todo.py`\\n2. Write tests later", **used),
                cm.Reply("1. Create `todo.py`\\n2. Write `tests/test_todo.py` first", **used), "third plan"],
    "builder": ["Wrote **2** files.", "Wrote 3 files.", "Wrote 4 files."],
    "reviewer": ["## Review\\nTests pass.", "Again: tests pass."],
})
agents = [cm.Agent(id=name, prompt=f"Do the work of {name}.") for name in engine.script]
def start(steps="planner? -> builder", **options):
    flow = cm.Workflow("careful-builder", agents=agents, steps=steps, **options)
    return flow.start(engine=engine, journal=":memory:")
"""
RUN = "run = start()\nshow(run)"
TWO_GATES = "run = start('planner? -> builder?')\nshow(run)"
WAITS = "planner is waiting for you"


@pytest.fixture
def picture(request):
    """Function that takes a picture of a cell, if pictures are wanted."""
    folder = os.environ.get("CM_SCREENSHOTS")

    def picture(nb, name, cell=1):
        if folder:
            nb.page.wait_for_timeout(250)
            nb.screenshot(Path(folder) / f"{name}.png", cell)

    return picture


def start(open_notebook, *cells, **options):
    nb = open_notebook([SETUP, *(cells or [RUN])], **options)
    nb.run_all()
    return nb


def value(nb, cell):
    """What the expression in the cell gives now."""
    nb.run_cell(cell)
    nb.wait_done(cell)
    return nb.text(cell).strip()


def test_approve(open_notebook, kernel):
    nb = start(open_notebook, RUN, "run['planner'].attempts[0].decision.by, run.status", kernel=kernel)
    nb.wait_text(1, WAITS)
    nb.click("button", "Approve", cell=1)
    nb.wait_text(1, "Finished: 2 of 2 done.")
    assert "approved by you" in nb.text(1)
    assert value(nb, 2) == "('you', 'completed')"
    assert nb.console_errors == []


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_reject_gives_a_second_attempt_with_its_diff(open_notebook, picture, theme):
    nb = start(open_notebook, theme=theme)
    nb.wait_text(1, WAITS)
    picture(nb, f"gate-{theme}")
    nb.click("button", "Reject…", cell=1)
    nb.click("button", "Send back", cell=1)  # no words: refused
    nb.wait_text(1, "Say what should be different")
    nb.type("Name the tests `now`.")
    picture(nb, f"reject-{theme}")
    assert nb.accessibility_violations(1) == []
    nb.press("Control+Enter")
    nb.wait_text(1, "2 attempts")
    nb.wait_text(1, WAITS)
    nb.click("tab", "Diff", cell=1)
    nb.wait_until(lambda: nb.output(1).locator("ins").count() > 0)
    picture(nb, f"diff-{theme}")
    assert nb.accessibility_violations(1) == []
    nb.click("tab", "1 rejected", cell=1)
    nb.click("tab", "Output", cell=1)
    nb.wait_text(1, "Rejected by you")
    nb.wait_text(1, "Name the tests now.")
    nb.click("tab", "Prompt", cell=1)
    nb.wait_text(1, "Do the work of planner.")
    nb.click("tab", "Log", cell=1)
    nb.wait_text(1, "planner ok")
    picture(nb, f"log-{theme}")
    nb.click("button", "Approve", cell=1)
    nb.wait_text(1, "Finished")
    nb.wait_text(1, "attempt 2 approved by you")
    picture(nb, f"frozen-{theme}")
    assert nb.accessibility_violations(1) == []


def test_files_are_shown_and_taken_back_by_reject(open_notebook, picture):
    cells = [
        """
import cm_notebook as cm
from cm_notebook.jupyter.view import show
@cm.agent("builder")
def builder(turn):
    if turn.attempt == 1:
        (turn.workspace / "todo.py").write_text("print('todo')\\n")
    return f"attempt {turn.attempt}"
flow = cm.Workflow("files", agents=[builder], steps="builder?")
run = flow.start(workspace="site", journal=":memory:")
show(run)
""",
        "import os; os.listdir('site')",
    ]
    nb = open_notebook(cells)
    nb.run_cell(0)
    nb.wait_text(0, "builder is waiting for you")
    nb.click("tab", "Files", cell=0)
    nb.wait_text(0, "+print('todo')")
    assert "1 file changed" in nb.text(0)
    picture(nb, "files", cell=0)
    assert nb.accessibility_violations(0) == []
    nb.click("button", "Reject…", cell=0)
    nb.type("without a file")
    nb.press("Control+Enter")
    nb.wait_text(0, "attempt 2")
    nb.wait_text(0, "It began with the files as they were before the step.")
    assert value(nb, 1) == "[]"


def test_edit_is_kept_as_an_attempt(open_notebook, picture):
    nb = start(open_notebook, RUN, "run['planner'].text")
    nb.wait_text(1, WAITS)
    nb.click("button", "Edit", cell=1)
    field = nb.output(1).get_by_role("textbox")
    nb.wait_until(lambda: "Write tests later" in field.input_value())
    assert field.evaluate("field => field.selectionStart") == 0  # one reads it from its beginning
    field.fill("My own plan")
    picture(nb, "edit-light")
    nb.output(1).get_by_role("button", name="Approve this").click()
    nb.wait_text(1, "edited and approved by you")
    assert value(nb, 2) == "'My own plan'"


def test_skip_asks_first(open_notebook):
    nb = start(open_notebook, RUN, "run['planner'].status")
    nb.wait_text(1, WAITS)
    nb.click("button", "Skip", cell=1)
    nb.wait_text(1, "Skip planner?")
    assert "Finished" not in nb.text(1)
    nb.click("button", "Back", cell=1)
    nb.click("button", "Skip", cell=1)
    nb.click("button", "Skip it", cell=1)
    nb.wait_text(1, "1 skipped")
    assert value(nb, 2) == "'skipped'"


def test_unattended_asks_first_and_a_locked_workflow_has_no_menu(open_notebook, picture):
    nb = start(open_notebook, TWO_GATES, "show(start(autonomous_mode='always'))")
    nb.wait_text(1, WAITS)
    nb.output(1).get_by_role("button", name="mode: gates").click()
    nb.wait_until(lambda: nb.output(1).get_by_role("menuitemradio").count() == 3)
    picture(nb, "mode-light")
    assert nb.accessibility_violations(1) == []
    nb.press("ArrowDown")
    nb.press("Enter")
    nb.wait_text(1, "Switch to unattended?")
    nb.click("button", "Switch to unattended", cell=1)
    nb.wait_text(1, "mode: unattended")
    nb.click("button", "Approve", cell=1)
    nb.wait_text(1, "Approved by unattended mode")
    nb.wait_text(2, WAITS)
    assert nb.output(2).get_by_role("button", name="mode:").count() == 0


def test_stop_needs_no_confirmation(open_notebook):
    nb = start(open_notebook, RUN, "run.status")
    nb.wait_text(1, WAITS)
    nb.click("button", "Stop", cell=1)
    nb.wait_text(1, "Stopped by you")
    assert value(nb, 2) == "'stopped'"


def test_keyboard_alone(open_notebook, picture):
    nb = start(open_notebook)
    nb.wait_text(1, WAITS)
    nb.by_role("button", "Stop", cell=1).focus()
    cells = nb.count_cells()
    for key in "bbb":  # would add cells
        nb.press(key)
    assert nb.count_cells() == cells
    nb.press("a")  # outside the bar: nothing
    nb.press("?")
    nb.wait_text(1, "approve (in the bar)")
    picture(nb, "help-light")
    nb.press("r")  # the box opens at once, also while a bar is too young to take a decision
    nb.type("bring tests")
    nb.press("Escape")  # closes the box alone: the focus stays in the bar, and with it the next key
    nb.press("r")
    nb.type("name the tests")
    nb.wait_until(lambda: nb.by_role("button", "Approve", cell=1).is_enabled())
    nb.press("Control+Enter")
    nb.wait_text(1, "2 attempts")
    nb.wait_text(1, WAITS)
    nb.wait_until(lambda: nb.by_role("button", "Approve", cell=1).is_enabled())
    nb.press("j")
    nb.press("[")
    nb.wait_text(1, "Rejected by you")
    nb.press("d")
    nb.press("]")
    nb.wait_text(1, "From attempt 1 to 2")
    nb.press("g")
    nb.press("a")
    nb.wait_text(1, "Finished")


class Keys:
    """Presses keys in a view, and holds that none of them falls to the notebook."""

    def __init__(self, nb):
        self.nb, self.cells = nb, nb.count_cells()

    def focused(self):
        """What has the focus: its text, or where it is."""
        return self.nb.page.evaluate(
            "() => { const at = document.activeElement; return at.closest('.cm-run') ? at.innerText || '-' : 'away'; }"
        )

    def press(self, *keys, then=None):
        for key in keys:
            self.nb.press(key)
        if then:
            self.nb.wait_text(1, then)
        self.hold()

    def hold(self, inside=True):
        self.nb.page.wait_for_timeout(100)  # the browser takes the focus from what is hidden when it draws
        assert (self.focused() != "away") is inside
        for key in "bxdd":  # would add, cut and delete cells
            self.nb.press(key)
        assert self.nb.count_cells() == self.cells

    def bar(self, step):
        """To the first button of the bar, as soon as it takes a decision."""
        self.nb.wait_text(1, f"{step} is waiting for you")
        self.nb.wait_until(lambda: self.nb.by_role("button", "Approve", cell=1).is_enabled())
        self.press("g")
        assert self.focused().startswith("Approve")


def test_no_key_falls_to_the_notebook_whatever_becomes_of_the_focus(open_notebook):
    nb = start(open_notebook, "run = start('planner? -> builder? -> reviewer?')\nshow(run)")
    nb.wait_text(1, WAITS)
    keys = Keys(nb)
    nb.by_role("button", "Stop", cell=1).focus()
    keys.bar("planner")
    keys.press("a", then="builder is waiting for you")  # the bar is replaced by the next one
    keys.bar("builder")
    keys.press("Enter", then="reviewer is waiting for you")
    keys.bar("reviewer")
    nb.press("e")
    nb.wait_until(lambda: nb.page.evaluate("() => document.activeElement.tagName === 'TEXTAREA'"))
    keys.press("Escape")
    assert keys.focused().startswith("Edit")
    nb.by_role("tab", "Output", cell=1).focus()
    keys.press("ArrowRight")
    assert keys.focused() == "Prompt"
    keys.press("ArrowLeft", "ArrowLeft", then="reviewer ok")
    assert keys.focused() == "Log"


def test_no_key_falls_to_the_notebook_from_the_menu(open_notebook):
    nb = start(open_notebook, TWO_GATES)
    nb.wait_text(1, WAITS)
    keys = Keys(nb)
    mode = nb.output(1).get_by_role("button", name="mode:")
    mode.focus()
    keys.press("Enter")
    keys.press("Escape")
    assert keys.focused().startswith("mode: gates")
    keys.press("Enter", "ArrowDown", "Enter", then="Switch to unattended?")
    assert keys.focused() == "Back"
    keys.press("Enter")
    assert keys.focused().startswith("mode: gates")
    keys.press("Enter", "ArrowUp", "Enter", then="mode: step-by-step")
    keys.press("Enter", "ArrowUp", "Enter", then="Go on")  # paused
    nb.by_role("button", "Go on", cell=1).focus()
    nb.press("Enter")
    nb.wait_until(lambda: nb.by_role("button", "Go on", cell=1).count() == 0)
    keys.hold()
    keys.bar("planner")
    keys.press("s", then="Skip planner?")
    assert keys.focused() == "Back"
    skip = nb.by_role("button", "Skip it", cell=1)
    assert "cm-go" not in skip.get_attribute("class")  # it does not look like Approve
    nb.wait_until(skip.is_enabled)
    keys.press("Shift+Tab", "Enter", then="builder is waiting for you")
    nb.by_role("button", "Stop", cell=1).focus()
    nb.press("Enter")
    nb.wait_text(1, "Stopped by you")
    nb.wait_until(lambda: nb.output(1).get_by_role("button").count() == 0)
    keys.hold(inside=False)  # frozen: there is nothing to hold it, and still no cell gets the keys


def test_a_held_key_decides_once(open_notebook):
    nb = start(open_notebook, TWO_GATES, "len(run.state.decisions), len(run.gates)")
    nb.wait_text(1, WAITS)
    nb.wait_until(lambda: nb.by_role("button", "Approve", cell=1).is_enabled())
    nb.by_role("button", "Stop", cell=1).focus()
    nb.press("g")
    nb.page.keyboard.down("a")
    nb.wait_text(1, "builder is waiting for you")
    nb.wait_until(lambda: nb.by_role("button", "Approve", cell=1).is_enabled())
    nb.by_role("button", "Approve", cell=1).focus()
    nb.page.keyboard.down("a")  # the keyboard repeats it
    nb.page.keyboard.up("a")
    assert value(nb, 2) == "(1, 1)"


def test_escape_gives_the_keys_back_to_the_cell(open_notebook):
    nb = start(open_notebook)
    nb.wait_text(1, WAITS)
    nb.by_role("button", "Stop", cell=1).focus()
    nb.press("Escape")
    nb.press("b")
    nb.wait_until(lambda: nb.count_cells() == 3)


def test_double_click_decides_once(open_notebook):
    nb = start(open_notebook, TWO_GATES, "len(run.state.decisions), len(run.gates)")
    nb.wait_text(1, WAITS)
    nb.by_role("button", "Approve", cell=1).dblclick()
    nb.wait_text(1, "builder is waiting for you")
    nb.page.wait_for_timeout(300)
    assert value(nb, 2) == "(1, 1)"


HOLD = """
() => {
  const later = window.setTimeout;
  window.cmHeld = [];
  window.setTimeout = (what, ...more) =>
    String(what).includes("young") ? window.cmHeld.push(what) : later(what, ...more);
}
"""


def test_a_new_bar_takes_no_click_that_was_meant_for_the_one_before(open_notebook):
    """The time in which it is dead is held still: it is over when the test says so."""
    nb = start(open_notebook, TWO_GATES, "len(run.state.decisions), len(run.gates)")
    nb.wait_text(1, WAITS)
    nb.wait_until(lambda: nb.by_role("button", "Approve", cell=1).is_enabled())
    nb.page.evaluate(HOLD)
    nb.click("button", "Approve", cell=1)
    nb.wait_text(1, "builder is waiting for you")
    approve = nb.by_role("button", "Approve", cell=1)
    approve.dblclick(force=True)
    nb.press("a")
    assert value(nb, 2) == "(1, 1)"
    assert approve.is_disabled()
    nb.page.evaluate("() => { for (const what of window.cmHeld) what(); }")
    nb.click("button", "Approve", cell=1)
    nb.wait_text(1, "Finished")


def test_a_click_that_a_busy_kernel_does_not_hear_yet_says_so_and_counts_once(open_notebook):
    """Ipykernel 6 reads nothing while a cell computes."""
    busy = "import pathlib, time\nwhile not pathlib.Path('go').exists():\n    time.sleep(0.05)"
    nb = open_notebook([SETUP, TWO_GATES, busy, "len(run.state.decisions), len(run.gates)"], kernel="6.31")
    for cell in (0, 1):
        nb.run_cell(cell)
    nb.wait_text(1, WAITS)
    nb.wait_until(lambda: nb.by_role("button", "Approve", cell=1).is_enabled())
    nb.run_cell(2)
    nb.wait_running(2)
    nb.click("button", "Approve", cell=1)
    nb.wait_text(1, "Sent. The kernel is busy")
    assert nb.by_role("button", "Approve", cell=1).is_disabled()
    (nb.path.parent / "go").touch()
    nb.wait_text(1, "builder is waiting for you")
    assert nb.output(1).locator(".cm-bar .cm-note:visible").count() == 0
    assert value(nb, 3) == "(1, 1)"


def test_a_click_by_a_script_is_ignored(open_notebook):
    nb = start(open_notebook, RUN, "run.status")
    nb.wait_text(1, WAITS)
    nb.wait_until(lambda: nb.by_role("button", "Approve", cell=1).is_enabled())
    nb.by_role("button", "Approve", cell=1).evaluate(
        "node => { node.click(); node.dispatchEvent(new KeyboardEvent('keydown', {key: 'a', bubbles: true})); }"
    )
    nb.page.wait_for_timeout(500)
    assert value(nb, 2) == "'waiting'"


def test_two_tabs_and_a_reload_show_the_same(open_notebook):
    nb = start(open_notebook, TWO_GATES)
    nb.wait_text(1, WAITS)
    nb.save()
    other = nb.second_tab()
    other.wait_text(1, WAITS)
    other.wait_until(lambda: other.by_role("button", "Approve", cell=1).is_enabled())
    nb.reload()
    nb.wait_text(1, WAITS)
    nb.click("button", "Approve", cell=1)
    for tab in (nb, other):
        tab.wait_text(1, "builder is waiting for you")
        tab.wait_text(1, "Wrote 2 files.")
    other.click("button", "Approve", cell=1)
    for tab in (nb, other):
        tab.wait_text(1, "Finished")
    other.close()


def test_after_a_restart_the_buttons_are_dead_and_say_so(open_notebook, picture):
    nb = start(open_notebook)
    nb.wait_text(1, WAITS)
    nb.wait_until(lambda: nb.by_role("button", "Approve", cell=1).is_enabled())
    nb.restart_kernel()
    nb.wait_text(1, "Not connected to the kernel. Run the notebook from the top to here")
    assert nb.by_role("button", "Approve", cell=1).is_disabled()
    picture(nb, "gone-light")


BUSY = """
import time
end, decided = time.time() + 60, run.state.decisions
while time.time() < end and len(decided) < 2:
    pass
"in time" if time.time() < end else "too late"
"""


@pytest.mark.parametrize("kernel", ["7.3", "7.4"])
def test_a_computing_cell_stops_neither_agents_nor_clicks(open_notebook, kernel):
    nb = start(open_notebook, TWO_GATES, BUSY, kernel=kernel)
    nb.wait_text(1, WAITS)
    nb.wait_running(2)
    nb.click("button", "Approve", cell=1)
    nb.wait_text(1, "builder is waiting for you")
    assert nb.is_running(2)
    nb.click("button", "Approve", cell=1)
    nb.wait_done(2)
    assert nb.text(2).strip() == "'in time'"


DEAF = """
run = start()
show(run)
import pathlib, time
while not pathlib.Path("go").exists():
    time.sleep(0.05)
"""


def test_while_no_hello_is_answered_the_snapshot_is_there_and_the_buttons_come_later(open_notebook, picture):
    """Such as on ipykernel 6 while a cell computes."""
    nb = start(open_notebook, DEAF, kernel="6.31")
    nb.wait_text(1, "The kernel has not answered yet", 30)
    nb.wait_text(1, "Run this cell again to decide")
    picture(nb, "silent-light")
    (nb.path.parent / "go").touch()
    nb.click("button", "Approve", cell=1)
    nb.wait_text(1, "Finished")


HOSTILE = """
text = '''<script>window.hacked = 1</script><img src=x onerror="window.hacked=2">
# <h1 onclick=alert(1)>Heading
[click](javascript:window.hacked=3) \\u202e &lt;b&gt; \\x1b[31m'''
import asyncio
from cm_notebook.engines.base import Delta, TurnDone
class Slow:
    name = "slow"
    async def stream(self, request):
        for char in text * 3:
            yield Delta(char)
            await asyncio.sleep(0.002)
        yield TurnDone(text * 3)
run = cm.Workflow("hostile <b>", agents=agents, steps="planner?").start(engine=Slow(), journal=":memory:")
show(run)
"""


def test_what_an_agent_wrote_is_only_read(open_notebook):
    nb = start(open_notebook, HOSTILE)
    nb.wait_text(1, WAITS)
    nb.wait_text(1, "<script>window.hacked")
    assert nb.page.evaluate("() => window.hacked") is None
    alive = "script, img:not([src^='data:']), h1, [onerror], [onclick], a[href^='javascript']"
    assert nb.output(1).locator(alive).count() == 0
    nb.click("button", "Approve", cell=1)
    nb.wait_text(1, "Finished")
    assert nb.page.evaluate("() => window.hacked") is None


def test_what_stands_between_two_prices_is_no_formula(open_notebook):
    engine = "cm.ScriptedEngine({'seller': [cm.Reply(said, cost_usd=0.25)], 'buyer': ['Bought.']})"
    agents = "[cm.Agent('seller', 'Sell.'), cm.Agent('buyer', 'Buy.')]"
    setup = (
        "%load_ext cm_notebook\nimport cm_notebook as cm\nfrom IPython.display import HTML\n"
        "said = r'It is $5 or $6. \\begin{align}x\\end{align}'\n"
        f"flow = cm.Workflow('shop', agents={agents}, steps='seller -> buyer', max_cost_usd=0.25)\n"
        f"run = flow.start(engine={engine}, journal=':memory:')"
    )
    nb = open_notebook([setup, "run", "%cm status", "%cm show seller", "run.approve(); await run;", "HTML('$a$')"])
    for cell in (0, 1):
        nb.run_cell(cell)
    nb.wait_text(1, "Paused: $0.25 limit reached after seller. Continue with +$0.25?")
    for cell in (2, 3, 4, 5):
        nb.run_cell(cell)
        nb.wait_done(cell)
    formula = nb.page.locator("mjx-container")
    nb.output(5).locator("mjx-container").wait_for()  # it is at work, and has been at the others before
    nb.wait_text(1, "Finished: 2 of 2 done.")
    assert "$0.25 of $0.50" in nb.text(1)
    assert "Paused: $0.25 limit reached after seller. Continue with +$0.25?" in nb.text(2)
    assert r"It is $5 or $6. \begin{align}x\end{align}" in nb.text(3)
    assert formula.count() == 1


def test_what_is_saved(open_notebook):
    nb = start(open_notebook)
    nb.wait_text(1, WAITS)
    nb.click("button", "Approve", cell=1)
    nb.wait_text(1, "Finished")
    notebook = nb.save()
    assert "widgets" not in notebook["metadata"]
    main, spare = notebook["cells"][1]["outputs"]
    assert set(main["data"]) == {"text/html", "text/plain"}
    assert "".join(spare["data"].pop("text/plain")) == ""
    assert spare["data"] == {}
    assert "planner" in "".join(main["data"]["text/html"])
    assert "widget" not in json.dumps(main)


def test_a_file_saved_at_a_gate_opens_as_the_snapshot(open_notebook, picture):
    nb = start(open_notebook)
    nb.wait_text(1, WAITS)
    hidden = nb.output(1).locator("[data-cm-static]")
    nb.wait_until(lambda: hidden.count() and "Run this cell again to decide" in hidden.text_content())
    main, spare = nb.save()["cells"][1]["outputs"]
    assert "Run this cell again to decide" in "".join(spare["data"]["text/html"])
    assert "text/html" not in main["data"]


SEVERAL = [
    "run = start('planner? -> builder? -> reviewer')",
    "show(run, ['planner'])",
    "show(run, ['builder'])",
    "show(run)",
]


def test_several_views_of_one_run_stay_in_step(open_notebook, picture):
    nb = start(open_notebook, *SEVERAL)
    for cell in (2, 3, 4):
        nb.wait_text(cell, WAITS)
    nb.wait_text(3, "starts when planner is approved")
    picture(nb, "queued-light", 3)
    assert nb.accessibility_violations(3) == []
    nb.click("button", "Approve", cell=3)  # the copy under the queued step
    for cell in (3, 4):
        nb.wait_text(cell, "builder is waiting for you")
    nb.wait_text(2, "Approved by you")
    assert nb.output(2).get_by_role("button").count() == 0  # settled: frozen
    nb.click("button", "Approve", cell=4)
    for cell, text in ((3, "Approved by you"), (4, "Finished")):
        nb.wait_text(cell, text)


def test_a_card_moves_to_the_cell_that_shows_it_last(open_notebook):
    nb = start(open_notebook, "run = start('planner? -> builder')", "show(run, ['planner'])", "show(run, ['planner'])")
    nb.wait_text(3, WAITS)
    nb.wait_text(2, "planner: shown further below")
    nb.click("button", "Approve", cell=3)
    nb.wait_text(3, "Approved by you")


def test_a_cell_run_again_shows_the_waiting_gate_again(open_notebook):
    nb = start(open_notebook, "run = start()", "show(run)")
    nb.wait_text(2, WAITS)
    nb.run_cell(2)
    nb.wait_done(2)
    nb.wait_text(2, WAITS)
    nb.click("button", "Approve", cell=2)
    nb.wait_text(2, "Finished")


def test_a_finished_run_that_goes_on_is_live_again(open_notebook):
    nb = open_notebook([SETUP, RUN, "run.add(cm.step('reviewer', interactive=True));"])
    nb.run_cell(0)
    nb.run_cell(1)
    nb.wait_text(1, WAITS)
    nb.click("button", "Approve", cell=1)
    nb.wait_text(1, "Finished")
    nb.run_cell(2)
    nb.wait_text(1, "reviewer is waiting for you")
    nb.click("button", "Approve", cell=1)
    nb.wait_text(1, "Finished: 3 of 3 done.")
    assert "reviewer" in "".join(nb.save()["cells"][1]["outputs"][0]["data"]["text/html"])


STREAM = """
import asyncio
from cm_notebook.engines.base import Delta, TurnDone
class Many:
    name = "many"
    async def stream(self, request):
        parts = [f"{n:06d}" + ("\\n" if n % 12 == 0 else " ") for n in range(100_000)]
        for part in parts:
            yield Delta(part)
            if int(part) % 50 == 0:
                await asyncio.sleep(0.002)
        yield Delta("THE END")
        while not go:
            await asyncio.sleep(0.05)
        yield TurnDone("".join(parts) + "THE END")
go = []
run = cm.Workflow("many", agents=agents, steps="planner?").start(engine=Many(), journal=":memory:")
show(run)
"""


def test_100_000_chunks(open_notebook):
    nb = open_notebook([SETUP, STREAM, "go.append(1)"])
    received = {"bytes": 0, "updates": 0, "customs": 0}

    def count(frame):
        data = frame if isinstance(frame, bytes) else frame.encode()
        received["bytes"] += len(data)
        received["customs"] += b'"method": "custom"' in data or b'"method":"custom"' in data

    nb.page.on("websocket", lambda socket: socket.on("framereceived", count))
    nb.reload()
    nb.run_cell(0)
    nb.wait_done(0)
    begun = time.time()
    nb.run_cell(1)
    body = nb.output(1).locator(".cm-body")
    nb.wait_until(lambda: body.count() and "THE END" in body.text_content(), 60, cell=1)
    took = time.time() - begun
    assert "000001 000002" in body.text_content()  # head and tail while it is written
    assert "left out until it is finished" in body.text_content()
    nb.run_cell(2)
    nb.wait_text(1, "characters left out", 30)
    assert body.text_content().rstrip().endswith("THE END")
    assert "%cm show planner --full" in nb.text(1)
    print(received, took)
    assert received["bytes"] <= 3 * 700_000
    assert received["customs"] <= 21 * took + 20
    nb.click("button", "Approve", cell=1)
    nb.wait_text(1, "Finished")
    assert nb.console_errors == []


KINDS = """
from cm_notebook.errors import EngineAuthError, EngineRateLimited
replies = {
    "sender": ["Sent."] * 9,
    "breaker": [cm.Reply(error=EngineAuthError("no key for anthropic")), "It works."],
    "busy": [cm.Reply(error=EngineRateLimited("rate limited", retry_after_s=30))],
    "checker": [cm.Reply(verdict=cm.Verdict(action="loop", reason="not good", score=0.5)) for _ in range(9)],
    "unclear": ["What a nice day."],
}
def kind(steps, **options):
    flow = cm.Workflow("kinds", agents=[cm.Agent(id=name, prompt="Go.") for name in replies], steps=steps)
    run = flow.start(engine=cm.ScriptedEngine(replies), journal=":memory:", **options)
    show(run)
    return run
"""


def test_each_kind_of_gate_has_its_buttons(open_notebook, picture):
    nb = start(
        open_notebook,
        KINDS,
        "before = kind([cm.step('sender', gate='before', interactive=True)])",
        "failed = kind('breaker')",
        "busy = kind('busy')",
        "spent = kind([cm.step('sender'), cm.module('checker', loop_steps=1, loop_max_iterations=1)])",
        "verdict = kind([cm.step('sender'), cm.module('unclear', loop_steps=1, loop_max_iterations=1)])",
        ASK,
    )
    seen = {
        2: ("start", "Send it", "Edit", "Skip"),
        3: ("failed", "Retry", "Edit prompt", "Skip", "Stop"),
        5: ("exhausted", "Accept the last", "2 more", "Edit", "Skip", "Stop"),
        6: ("verdict", "Continue", "Loop…", "Retry", "Skip"),
    }
    for cell, (name, *labels) in seen.items():
        bar = nb.output(cell).locator(".cm-bar .cm-buttons").first
        nb.wait_until(lambda bar=bar: bar.count(), cell=cell)
        assert [text.strip()[: len(label)] for text, label in zip(buttons(bar), labels, strict=True)] == labels
        picture(nb, f"kind-{name}", cell)
        assert nb.accessibility_violations(cell) == []
        assert nb.output(cell).locator(".cm-head").get_by_role("button", name="Stop").is_visible()
    nb.wait_text(4, "again in")
    picture(nb, "kind-retrying", 4)

    nb.click("button", "Edit", cell=2)
    field = nb.output(2).get_by_role("textbox")
    nb.wait_until(lambda: "Go." in field.input_value())
    field.fill("Go at once.")
    nb.click("button", "Send this", cell=2)
    nb.wait_text(2, "Finished")
    nb.click("button", "Retry", cell=3)
    nb.wait_text(3, "It works.")
    nb.click("button", "2 more", cell=5)
    nb.wait_text(5, "not good enough after 3")
    nb.click("button", "Loop…", cell=6)
    nb.type("Be clear.")
    nb.press("Control+Enter")
    nb.wait_text(6, "pass 2")

    nb.wait_text(7, "Which database?")
    assert nb.accessibility_violations(7) == []
    picture(nb, "kind-question", 7)
    nb.output(7).get_by_role("textbox").fill("SQLite")
    nb.click("button", "Answer", cell=7)
    nb.wait_text(7, "We take SQLite.")


def buttons(bar):
    return [node.text_content() for node in bar.get_by_role("button").all()]


THRIFTY = """
%load_ext cm_notebook
import cm_notebook as cm
from cm_notebook.jupyter.view import show
used = dict(usage=cm.Usage(input_tokens=60, output_tokens=40), cost_usd=0.25)
asks = cm.Reply("One moment.", tool_calls=[{"name": "ask_human", "arguments": {"question": "Which database?"}}], **used)
def start(*said):
    script = cm.ScriptedEngine({"writer": [*said, cm.Reply("It is written.", **used)]})
    flow = cm.Workflow("thrifty", agents=[cm.Agent("writer", "Write.")], steps="writer")
    run = flow.start(engine=script, journal=":memory:", max_cost_usd=0.25)
    show(run)
    return run
"""
KNOWN = "[(run['writer'].attempts[0].text, len(run['writer'].attempts), run.cost_usd, run.status)]"


def test_a_limit_that_is_reached_in_the_midst_of_a_turn(open_notebook, picture):
    go_on = "Continue with +$0.25"
    cells = [THRIFTY, "run = start(asks, asks)", KNOWN, "%cm approve --max-cost 0.10", "run = start(asks)", KNOWN]
    nb = open_notebook(cells)

    def answer(cell, words):
        nb.wait_text(cell, "writer is waiting for your answer")
        nb.output(cell).get_by_role("textbox").fill(words)
        nb.click("button", "Answer", cell=cell)
        nb.wait_text(cell, f"Answered: “{words}”")

    for cell in (0, 1):
        nb.run_cell(cell)
    answer(1, "SQLite")
    nb.wait_text(1, "Paused: $0.25 limit reached after writer. Continue with +$0.25?")
    bar = nb.output(1).locator(".cm-bar .cm-buttons").first
    assert [text.strip() for text in buttons(bar)] == [go_on + "A", "Stop"]
    assert nb.accessibility_violations(1) == []
    picture(nb, "kind-budget", 1)
    assert value(nb, 3) == "writer: +$0.10 permitted by you, " + nb.text(3).strip()[-6:]  # another amount
    answer(1, "the other one")  # the same turn has gone on, and what it cost counts against the new limit
    nb.wait_text(1, "Paused: $0.35 limit reached after writer. Continue with +$0.25?")
    nb.save()
    nb.reload()
    nb.wait_text(1, "Paused: $0.35 limit reached")
    nb.by_role("button", go_on, cell=1).dblclick()
    nb.wait_text(1, "Finished: 1 of 1 done.")
    assert value(nb, 2) == "[('It is written.', 1, 0.75, 'completed')]"

    nb.run_cell(4)
    answer(4, "none")
    nb.wait_text(4, "limit reached after writer")
    nb.output(4).locator(".cm-bar").get_by_role("button", name="Stop", exact=True).click()
    nb.wait_text(4, "Stopped by you at writer")
    assert value(nb, 5) == "[('', 1, 0.25, 'stopped')]"
    assert nb.console_errors == []


ASK = """
@cm.agent("asker")
async def asker(turn):
    return f"We take {await turn.ask_human('Which database?')}."
asking = cm.Workflow("asking", agents=[asker], steps="asker").start(journal=":memory:")
show(asking)
"""


def test_what_is_stale_can_run_from_here(open_notebook, picture):
    begin = "run = start('planner -> builder -> reviewer')\nshow(run)"
    nb = start(open_notebook, begin, "await run\nrun.rerun('planner');")
    nb.wait_text(1, "builder is stale")
    picture(nb, "kind-stale", 1)
    bar = nb.output(1).locator(".cm-bar .cm-buttons").first
    assert [text.strip() for text in buttons(bar)] == ["KeepA", "Run again", "Run from here", "SkipS"]
    nb.click("button", "Run from here", cell=1)
    nb.wait_text(1, "Finished")


MANY = """
names = [f"s{n}" for n in range(20)]
flow = cm.Workflow("many", agents=[cm.Agent(id=name, prompt="Go.") for name in names],
                   steps=" -> ".join(name + "?" * (name == "s9") for name in names))
run = flow.start(engine=cm.ScriptedEngine({name: "Done." for name in names}), journal=":memory:")
show(run)
"""


READING = """
import threading
import cm_notebook as cm
from cm_notebook.jupyter.view import show
go = {name: threading.Event() for name in ("one", "two", "three", "four", "five")}
def step(name):
    @cm.agent(name)
    def works(turn):
        go[name].wait()
        return f"The answer of {name}."
    return works
run = cm.Workflow("flow", agents=[step(name) for name in go], steps=" -> ".join(go)).start(journal=":memory:")
show(run)
"""


def test_what_somebody_reads_does_not_fold_away(open_notebook):
    nb = open_notebook(
        [READING, *(f"for name in {names}: go[name].set()" for names in (["one", "two"], ["three"], ["four"]))]
    )
    for cell in (0, 1):
        nb.run_cell(cell)
        nb.wait_done(cell)
    nb.wait_text(0, "three is running")
    card = nb.output(0).locator("li[data-step=one]")
    card.locator("summary").click()
    nb.wait_text(0, "The answer of one.")
    nb.run_cell(2)
    nb.wait_text(0, "four is running")
    nb.wait_text(0, "3 done")
    assert "The answer of one." in nb.text(0)
    assert nb.output(0).locator("li[data-step=two]").count() == 0
    card.locator("summary").click()
    nb.run_cell(3)
    nb.wait_text(0, "five is running")
    nb.wait_until(lambda: card.count() == 0, what="the card to fold with the others", cell=0)
    assert nb.console_errors == []


def test_a_mouse_that_rests_after_a_decision_reads_nothing(open_notebook):
    nb = start(open_notebook, TWO_GATES)
    nb.wait_text(1, WAITS)
    card = nb.output(1).locator("li[data-step=planner]")
    approve = nb.by_role("button", "Approve", 1)
    nb.wait_until(lambda: approve.get_attribute("aria-disabled") == "false", what="the button", cell=1)
    card.locator("summary").hover()
    approve.press("Enter")
    nb.wait_text(1, "builder is waiting for you")
    assert card.evaluate("card => card.matches(':hover')")
    assert card.locator("details[open]").count() == 0
    assert nb.console_errors == []


TWO_RUNS = """
import threading
import cm_notebook as cm
from cm_notebook.jupyter.view import show
go = threading.Event()
@cm.agent("planner")
def planner(turn):
    turn.emit("written before the end")
    go.wait()
    return "The plan."
flow = cm.Workflow("flow", agents=[planner], steps="planner?")
"""


def test_two_runs_write_at_the_same_time_also_below_the_window(open_notebook):
    runs = [
        "run = flow.start(journal=':memory:')\nshow(run)" + "\n" * 40,
        "run = flow.start(journal=':memory:')\nshow(run)",
    ]
    nb = open_notebook([TWO_RUNS, *runs, "go.set()"])
    for cell in range(3):
        nb.run_cell(cell)
        nb.wait_done(cell)
    for cell in (1, 2):
        nb.wait_text(cell, "written before the end")
        # as high as its line, in sight or not: what is below does not jump when it comes into sight
        assert nb.output(cell).locator(".cm-body").bounding_box()["height"] < 60
    nb.run_cell(3)
    for cell in (1, 2):
        nb.wait_text(cell, "The plan.")
    assert nb.console_errors == []


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_many_steps_fold(open_notebook, picture, theme):
    nb = start(open_notebook, MANY, theme=theme)
    nb.wait_text(1, "s9 is waiting for you")
    nb.output(1).locator("summary", has_text="9 done").first.click()
    nb.wait_text(1, "s3 done")
    picture(nb, f"many-{theme}", 1)
    assert nb.accessibility_violations(1) == []
    nb.output(1).locator("svg [data-step=s9]").focus()
    nb.press("Enter")
    nb.wait_until(lambda: nb.page.evaluate("() => document.activeElement.tagName === 'SUMMARY'"))


def test_the_same_in_notebook_7(open_notebook, picture):
    nb = start(open_notebook, TWO_GATES, "run.status", app="notebook")
    nb.wait_text(1, WAITS)
    nb.click("button", "Reject…", cell=1)
    nb.type("name the tests")
    nb.press("Control+Enter")
    nb.wait_text(1, "2 attempts")
    nb.wait_text(1, WAITS)
    picture(nb, "notebook-7")
    assert nb.accessibility_violations(1) == []
    nb.save()
    nb.reload()
    nb.wait_text(1, WAITS)
    nb.wait_until(lambda: nb.by_role("button", "Approve", cell=1).is_enabled())
    nb.by_role("button", "Stop", cell=1).focus()
    cells = nb.count_cells()
    for key in "bbb":  # would add cells
        nb.press(key)
    assert nb.count_cells() == cells
    nb.press("g")
    nb.press("a")
    nb.wait_text(1, "builder is waiting for you")
    nb.click("button", "Approve", cell=1)
    nb.wait_text(1, "Finished")
    assert value(nb, 2) == "'completed'"
    assert "widgets" not in nb.save()["metadata"]
    assert nb.console_errors == []
