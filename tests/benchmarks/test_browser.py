"""In a real browser: a long text arriving at a page, and how soon a click has its effect."""

from __future__ import annotations

import json
import re
import statistics
import time

CHUNKS = 100_000

STREAM = f"""
import asyncio
import cm_notebook as cm
from cm_notebook.jupyter.view import show

class Writer:
    name = "writer"

    async def stream(self, request):
        for number in range({CHUNKS}):
            yield cm.Delta(f"{{number:05d}} ")
            if number % 1000 == 0:
                await asyncio.sleep(0.15)  # in fifteen seconds, a hundred times what models send
        yield cm.TurnDone("written")

agents = [cm.Agent("writer", "Write."), cm.Agent("other", "Wait.")]

def start(steps, engine):
    return cm.Workflow("benchmark", agents=agents, steps=steps).start(engine=engine)

steps = [cm.step("other", id=f"s{{number}}", interactive=True) for number in range(6)]
show(start(steps, cm.ScriptedEngine({{"other": ["I am here."] * 6}})))
"""
GATES = 15
GATED = f"""
import time
import cm_notebook as cm
from cm_notebook.jupyter.view import show

started = []

@cm.agent("work")
async def work(turn):
    started.append(time.time())
    return "done"

steps = [cm.step("work", id=f"s{{number}}", interactive=True) for number in range({GATES + 1})]
run = cm.Workflow("benchmark", agents=[work], steps=steps).start()
show(run)
"""
LISTEN = """
() => {
  window.clicks = [];
  document.addEventListener("click", event => {
    if (event.target.closest("button")?.textContent.trim().startsWith("Approve")) {
      window.clicks.push((performance.timeOrigin + performance.now()) / 1000);
    }
  }, true);
}
"""
UNTIL_SHOWN = """
([cell, text]) => {
  const output = document.querySelectorAll(".jp-NotebookPanel:not(.lm-mod-hidden) .jp-Notebook .jp-Cell")[cell];
  window.shown = null;
  const look = () => {
    if (output.innerText.includes(text)) window.shown = (performance.timeOrigin + performance.now()) / 1000;
    else requestAnimationFrame(look);
  };
  look();
}
"""


def test_stream_to_a_page(budget, open_notebook):
    nb = open_notebook([STREAM, "run = start('writer', Writer())\nshow(run)"])
    received: list[int] = []

    def count(socket) -> None:
        socket.on("framereceived", lambda payload: received.append(len(payload)))

    nb.page.on("websocket", count)
    nb.reload()
    nb.page.evaluate(LISTEN)
    nb.run_cell(0)
    nb.wait_text(0, "s0 is waiting for you")
    nb.wait_idle()
    before = len(received)
    nb.run_cell(1)
    nb.wait_until(lambda: re.search(r"\d{5} \d{5} ", nb.output(1).text_content()), what="text that arrives", cell=1)
    answered = []
    for number in range(1, 6):
        nb.page.evaluate(UNTIL_SHOWN, [0, f"s{number} is waiting for you"])
        nb.click("button", "Approve", cell=0)
        nb.wait_until(lambda: nb.page.evaluate("window.shown"), what="the answer to the click")
        answered.append(nb.page.evaluate("window.shown - window.clicks.at(-1)"))
    assert "Finished" not in nb.output(1).text_content(), "the clicks were meant to fall into the stream"
    nb.wait_text(1, "Finished", timeout_s=90)
    assert "rate exceeded" not in nb.server.log()
    text = CHUNKS * len(f"{0:05d} ")
    ratio = sum(received[before:]) / text
    budget("stream of 100,000 chunks to a page: bytes over the socket ÷ text", ratio, "×", at_most=3)
    budget("click answered while 100,000 chunks arrive, median", statistics.median(answered), "ms", at_most=200)


def test_click_to_next_step(budget, open_notebook):
    nb = open_notebook([GATED, "import json; print(json.dumps(started))"])
    nb.page.evaluate(LISTEN)
    nb.run_cell(0)
    for number in range(GATES):
        nb.wait_text(0, f"s{number} is waiting for you")
        nb.wait_idle()
        nb.click("button", "Approve", cell=0)
    nb.wait_text(0, f"s{GATES} is waiting for you")
    nb.run_cell(1)
    nb.wait_done(1)
    started = json.loads(nb.text(1))[1:]
    clicked = nb.page.evaluate("window.clicks")
    assert len(clicked) == len(started) == GATES
    delays = [start - click for click, start in zip(clicked, started, strict=True)]
    budget("click to next step started, median", statistics.median(delays), "ms", at_most=50)


MEMBERS = 100
TEAM = f"""
import asyncio
import cm_notebook as cm
from cm_notebook.jupyter.view import show

names = [f"m{{number}}" for number in range({MEMBERS})]

def member(name):
    @cm.agent(name)
    async def works(turn):
        for number in range(100_000):
            turn.emit(f"{{name}} has come to {{number}}. ")
            await asyncio.sleep(0.1)
            if done:
                return f"{{name}} is done."
        return "too late"
    return works

@cm.agent("boss")
async def boss(turn):
    await turn.run_agents([[{{"agent": name, "prompt": "Go."}} for name in names]])
    return "All are done."

done = []
gates = [cm.step("other", id=f"s{{number}}", interactive=True) for number in range(6)]
other = cm.Workflow("other", agents=[cm.Agent("other", "Wait.")], steps=gates)
show(other.start(engine=cm.ScriptedEngine({{"other": ["I am here."] * 6}}), journal=":memory:"))
team = cm.Workflow("team", agents=[boss, *map(member, names)], steps="boss", sub_agents=names)
"""


def test_a_hundred_members(budget, open_notebook):
    """A click in one view while a hundred agents write in another: 1,000 pieces of text a second."""
    nb = open_notebook([TEAM, f"show(team.start(journal=':memory:', max_concurrency={MEMBERS}))", "done.append(1)"])
    received: list[int] = []
    nb.page.on("websocket", lambda socket: socket.on("framereceived", lambda frame: received.append(len(frame))))
    nb.reload()
    nb.page.evaluate(LISTEN)
    nb.run_cell(0)
    nb.wait_text(0, "s0 is waiting for you")
    nb.run_cell(1)
    lanes = nb.output(1).locator(".cm-lane")
    nb.wait_until(
        lambda: lanes.count() == 20 and "has come to" in lanes.last.inner_text(), what="lanes that fill", cell=1
    )
    before, begun = sum(received), time.monotonic()
    answered = []
    for number in range(1, 6):
        nb.page.evaluate(UNTIL_SHOWN, [0, f"s{number} is waiting for you"])
        nb.click("button", "Approve", cell=0)
        nb.wait_until(lambda: nb.page.evaluate("window.shown"), what="the answer to the click")
        answered.append(nb.page.evaluate("window.shown - window.clicks.at(-1)"))
    rate = (sum(received) - before) / (time.monotonic() - begun)
    assert lanes.count() == 20, "the rest is counted, not shown"
    nb.run_cell(2)
    nb.wait_text(1, "Finished", timeout_s=90)
    assert "rate exceeded" not in nb.server.log()
    budget("100 members that write: bytes over the socket in a second", rate, "KiB", at_most=100)
    budget("click answered while 100 members write, median", statistics.median(answered), "ms", at_most=200)
