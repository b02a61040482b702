"""A team at work, as a person meets it: lanes that fill side by side, decisions in them, and what is saved.

The members are functions that write when they are told to, so every moment can be held. With ``CM_SCREENSHOTS`` set to
a folder, pictures are left there.
"""

from __future__ import annotations

import json

import pytest

from tests.browser.test_view import Keys, picture, value

__all__ = ["picture"]

SETUP = """
import asyncio, collections
import cm_notebook as cm
from cm_notebook.jupyter.view import show

said = collections.defaultdict(list)  # what each member is told to write; None: it ends; an error: it fails

def member(name):
    @cm.agent(name)
    async def works(turn):
        told = said[name]
        while True:
            while not told:
                await asyncio.sleep(0.01)
            word = told.pop(0)
            if word is None:
                return f"{name} is done."
            if isinstance(word, Exception):
                raise word
            if word.endswith("?"):
                turn.emit(f"They say {await turn.ask_human(word)}.")
            else:
                turn.emit(word)
    return works

team = ["frontend-dev", "backend-dev", "qa-engineer"]

@cm.agent("coordinator")
async def coordinator(turn):
    turn.emit("I call my team.")
    done = await turn.run_agents(call)
    return "; ".join(f"{one.agent} {one.status}" for one in done)

def start(line="frontend-dev 'UI' & backend-dev 'API' & qa-engineer 'test'", people=team):
    global call
    call = line
    agents = [coordinator, *map(member, people)]
    flow = cm.Workflow("team-builder", agents=agents, steps="coordinator", sub_agents=people)
    return flow.start(journal=":memory:")

def tell(word, *names):
    for name in names or team:
        said[name].append(word)
"""
RUN = "run = start()\nshow(run)"


class Team:
    """A notebook in which a team works; cells from 2 on tell it what to do."""

    def __init__(self, open_notebook, *cells, run=RUN, **options):
        self.nb = open_notebook([SETUP, run, *cells], **options)
        for cell in (0, 1):
            self.nb.run_cell(cell)
            self.nb.wait_done(cell)

    def do(self, cell):
        self.nb.run_cell(cell)
        self.nb.wait_done(cell)

    def lane(self, name):
        return self.nb.output(1).locator(f".cm-lane[data-step='coordinator/{name}#1']")

    def wait(self, name, text):
        lane = self.lane(name)
        self.nb.wait_until(lambda: lane.count() and text in lane.inner_text(), what=f"{text!r} in {name}", cell=1)

    def click(self, name, button):
        self.lane(name).get_by_role("button", name=button, exact=True).click()


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_three_lanes_fill_at_the_same_time_and_one_that_failed_is_retried(open_notebook, picture, theme):
    team = Team(
        open_notebook,
        "for name in team: tell(f'{name} writes one', name)",
        "tell('\\n\\n# and **two**')",
        "tell(cm.EngineError('no page to test'), 'qa-engineer'); tell('three', 'backend-dev')",
        "tell(None); said['qa-engineer'].insert(0, 'second try')",
        "run['coordinator/qa-engineer#1'].attempts[0].decision.action, run.status",
        theme=theme,
    )
    nb = team.nb
    team.do(2)
    for name in ("frontend-dev", "backend-dev", "qa-engineer"):
        team.wait(name, f"{name} writes one")
    boxes = [team.lane(name).bounding_box() for name in ("frontend-dev", "backend-dev", "qa-engineer")]
    assert len({box["y"] for box in boxes}) == 1, "side by side"
    nb.wait_text(1, "I call my team.")
    nb.wait_text(1, "0 of 3 finished")
    team.do(3)
    for name in ("frontend-dev", "backend-dev", "qa-engineer"):
        team.wait(name, "and two")
    picture(nb, f"team-lanes-{theme}")
    team.lane("backend-dev").locator("summary").click()  # its whole text, which goes on
    team.wait("backend-dev", "backend-dev writes one")
    team.do(4)
    team.wait("backend-dev", "three")
    team.wait("qa-engineer", "no page to test")
    picture(nb, f"team-failed-{theme}")
    assert nb.accessibility_violations(1) == []
    team.click("qa-engineer", "Retry this one")
    team.do(5)
    nb.wait_text(1, "Finished: 1 of 1 done.")
    picture(nb, f"team-frozen-{theme}")
    assert nb.accessibility_violations(1) == []
    assert value(nb, 6) == "('retry', 'completed')"
    assert nb.console_errors == []


def test_a_gate_inside_a_lane_is_answered_while_the_others_go_on(open_notebook, picture):
    team = Team(
        open_notebook,
        "tell('Which database?', 'backend-dev'); tell('before', 'qa-engineer')",
        "tell('\\nmeanwhile', 'qa-engineer')",
        "tell('\\nafter', 'qa-engineer')",
        "tell(None)",
    )
    nb = team.nb
    team.do(2)
    team.wait("backend-dev", "Which database?")
    team.do(3)
    team.wait("qa-engineer", "meanwhile")
    nb.wait_text(1, "1 decision waits for you")
    picture(nb, "team-question")
    assert nb.accessibility_violations(1) == []
    team.lane("backend-dev").get_by_role("textbox").fill("SQLite")
    team.click("backend-dev", "Answer")
    team.wait("backend-dev", "They say SQLite.")
    team.do(4)
    team.wait("qa-engineer", "after")
    team.do(5)
    nb.wait_text(1, "Finished")


def test_continue_without_it(open_notebook):
    team = Team(
        open_notebook,
        "tell(cm.EngineError('no'), 'qa-engineer'); tell(None, 'frontend-dev', 'backend-dev')",
        "run['coordinator'].text",
    )
    team.do(2)
    team.click("qa-engineer", "Continue without it")
    team.click("qa-engineer", "Skip it")
    team.nb.wait_text(1, "Finished: 1 of 1 done.")
    assert "frontend-dev done; backend-dev done; qa-engineer skipped" in value(team.nb, 3)


def test_two_decisions_are_answered_the_last_one_first_by_keys_alone(open_notebook, picture):
    team = Team(
        open_notebook,
        "tell(cm.EngineError('first'), 'frontend-dev')",
        "tell(cm.EngineError('second'), 'qa-engineer'); tell(None, 'backend-dev')",
        "[step.split('/')[1] for step in map(str, run.state.decisions)], len(run.gates)",
        "tell(None)",
    )
    nb = team.nb
    team.do(2)
    team.wait("frontend-dev", "first")
    team.do(3)
    team.wait("qa-engineer", "second")
    nb.wait_text(1, "2 decisions wait for you")
    nb.wait_text(1, "Retry all 2 that failed")
    picture(nb, "team-tray")
    keys = Keys(nb)
    nb.by_role("button", "Stop", cell=1).first.focus()
    for name in ("frontend-dev", "qa-engineer"):
        keys.press("g")
        nb.wait_until(lambda name=name: team.lane(name).locator(":focus").count(), what=f"the focus in {name}")
    ready = team.lane("qa-engineer").get_by_role("button", name="Retry this one")
    nb.wait_until(ready.is_enabled)
    keys.press("Enter")
    nb.wait_text(1, "1 decision waits for you")
    assert team.lane("frontend-dev").get_by_role("button", name="Retry this one").count() == 1
    keys.press("g")
    nb.wait_until(lambda: team.lane("frontend-dev").locator(":focus").count(), what="the focus in the first")
    nb.wait_until(team.lane("frontend-dev").get_by_role("button", name="Retry this one").is_enabled)
    keys.press("Enter")
    team.do(5)
    nb.wait_text(1, "Finished")


def test_all_that_failed_are_retried_in_one_go(open_notebook):
    team = Team(
        open_notebook,
        "tell(cm.EngineError('no'), 'frontend-dev', 'qa-engineer'); tell(None)",
        "len(run.state.decisions)",
    )
    team.do(2)
    team.wait("frontend-dev", "Retry all 2 that failed")
    team.click("frontend-dev", "Retry all 2 that failed")
    team.nb.wait_text(1, "Finished")
    assert value(team.nb, 3) == "2"


def test_what_is_saved_of_a_team(open_notebook):
    team = Team(open_notebook, "tell(None)")
    team.do(2)
    team.nb.wait_text(1, "Finished")
    notebook = team.nb.save()
    assert "widgets" not in notebook["metadata"]
    saved = "".join(notebook["cells"][1]["outputs"][0]["data"]["text/html"])
    for name in ("frontend-dev", "backend-dev", "qa-engineer"):
        assert f"{name} is done." in saved
    assert "widget" not in json.dumps(notebook["cells"][1]["outputs"][0])
    assert saved.count("class=") == 1, "but for what MathJax reads"


def test_groups_stand_in_order_and_a_team_within_a_team_below_its_caller(open_notebook, picture):
    run = """
run = start("frontend-dev 'a' & lead 'b' && qa-engineer 'c'", people=["lead", *team])
show(run)
"""
    lead = """
def member(name, plain=member):
    if name != "lead":
        return plain(name)
    @cm.agent("lead")
    async def leads(turn):
        return (await turn.run_agents("backend-dev 'x'"))[0].text
    return leads
"""
    team = Team(open_notebook, "tell('deep', 'backend-dev')", "tell(None)", run=lead + run)
    nb = team.nb
    team.do(2)
    nested = nb.output(1).locator(".cm-lane[data-step='coordinator/lead#1'] .cm-lane")
    nb.wait_until(lambda: nested.count() and "deep" in nested.inner_text(), what="the lane within a lane", cell=1)
    nb.wait_text(1, "Group 1 of 2: 0 of 2 finished")
    nb.wait_text(1, "Group 2 of 2: starts when those before have finished")
    picture(nb, "team-nested")
    assert nb.accessibility_violations(1) == []
    team.do(3)
    nb.wait_text(1, "Finished")


BUSY = """
class Busy:
    name = "busy"
    async def stream(self, request):
        raise cm.EngineRateLimited("rate limited", retry_after_s=60)
        yield
run = cm.Workflow("busy", agents=[cm.Agent("a", "Go.")], steps="a").start(engine=Busy(), journal=":memory:")
show(run)
"""


def test_a_countdown_ticks_in_the_page_without_a_message(open_notebook, picture):
    nb = open_notebook([SETUP, BUSY])
    frames = []
    nb.page.on("websocket", lambda socket: socket.on("framereceived", lambda frame: frames.append(frame)))
    nb.reload()
    for cell in (0, 1):
        nb.run_cell(cell)
    nb.wait_text(1, "again in")
    left = nb.output(1).locator("[data-until]").first
    nb.wait_idle()
    nb.wait_until(lambda: left.inner_text() in ("57 s", "56 s"), what="the first seconds")
    picture(nb, "countdown")
    before, spoken = len(frames), nb.output(1).get_by_role("status").text_content()
    nb.wait_until(lambda: left.inner_text() == "53 s", what="three more")
    assert len(frames) == before
    assert nb.output(1).get_by_role("status").text_content() == spoken
    assert nb.accessibility_violations(1) == []
    nb.click("button", "Stop", cell=1)
    nb.wait_text(1, "Stopped by you")
