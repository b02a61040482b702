"""The five patterns with models behind an HTTP API, as a person meets them: a real kernel, a real page, a loopback.

Strategy: the model's service is in this process, so that a test holds an answer back, lets one fail, and reads what was
sent. Where it is and its key come to the kernel by its environment alone. One notebook for each dialect: a pattern a
cell, since opening a notebook takes longer than all that happens in it.
"""

from __future__ import annotations

import json
import re
import threading

import pytest

from tests.browser.test_view import picture, value
from tests.engines.model_server import ModelServer, error
from tests.engines.test_http import SAYS, call, complaint, told
from tests.engines.test_patterns import Model, who

__all__ = ["picture"]

KEY = "sk-planted-0123456789abcdef"
MODELS = {"openai": "gpt-5-mini", "anthropic": "claude-sonnet-5"}

SETUP = """
%load_ext cm_notebook
import cm_notebook as cm
from cm_notebook.jupyter.view import show

removed = []

@cm.tool(ask=True)
def remove(path: str) -> str:
    removed.append(path)
    return f"removed {path}"

def start(steps, names, *, tools=(), limit=None, **options):
    agents = [cm.Agent(name, f"I am {name}.", tools=tools if name == "qa-engineer" else ()) for name in names.split()]
    flow = cm.Workflow("flow", agents=agents, steps=steps, engine=ENGINE, **options)
    return flow.start(journal=":memory:", max_cost_usd=limit)
"""
SUPERVISED = """
line = "researcher -> planner -> implementer -> reviewer? -> deployer"
run = start(line, "researcher planner implementer reviewer deployer", autonomous_mode="always")
show(run)
"""
FAILED = "[event.error.kind for event in run.events if event.type == 'TurnFailed']"
UNATTENDED = """
run = start("thrifty -> second", "thrifty second", autonomous_mode="always", limit=LIMIT)
show(run)
"""
LOOP = """
run = start("coder -> judge(loop 1, max 5)", "coder judge")
show(run)
"""
TEAM = """
workers = "frontend-dev backend-dev qa-engineer"
run = start("coordinator", f"coordinator {workers}", tools=[remove], sub_agents=workers.split())
show(run)
"""


def held(said, before, go):
    """The answer `said`, of which the piece with `before` in it waits until `go` is set."""

    def pieces():
        for piece in said.pieces:
            if before in piece:
                go.wait(60)
            yield piece

    return said.but(pieces=pieces())


@pytest.mark.parametrize("dialect", list(SAYS))
def test_the_five_patterns(open_notebook, picture, dialect):
    says, go = SAYS[dialect], threading.Event()
    story = says(["Once upon a time ", "there was a plan."])
    limited = error(429, complaint("rate_limit_error"), retry_after="2")
    wrong_key = error(401, complaint("authentication_error", f"wrong key {KEY}"))
    dear = says("That was dear.", used={"input": 100_000, "output": 20_000})
    line = "frontend-dev 'the UI' & backend-dev 'the API' & qa-engineer 'the tests'"
    removals = [(number, "remove", json.dumps({"path": f"{number}.txt"})) for number in ("one", "two")]
    model = Model(
        dialect,
        researcher=[held(story, b"there was", go)],
        planner=[limited],
        implementer=[says(["Half ", "of it"]).first(4, "reset")],
        reviewer=[wrong_key],
        thrifty=[dear],
        judge=[says('{"action": "loop", "reason": "a test fails"}'), says('Well. {"action": "continue"}')],
        coordinator=[says("I delegate.", calls=[call("run_agents", script=line)])],
        backend_dev=[error(400, complaint("invalid_request_error", "no such thing"))],
        qa_engineer=[says("I tidy up.", calls=removals)],
    )
    engine = f"{dialect}:{MODELS[dialect]}"
    cells = [
        f"ENGINE, LIMIT = {engine!r}, {0.06 if dialect == 'openai' else 0.3}\n{SETUP}",
        *(SUPERVISED, FAILED, UNATTENDED, LOOP, "[one.text for one in run['coder'].attempts]", TEAM),
        "removed, run['coordinator'].text, len(run['coordinator/backend-dev#1'].attempts)",
        f"%cm workflow careful-builder --autonomous never --engine {engine}",
        "%%cm step author\nI am author.",
        "%%cm step finisher\nI am finisher.",
    ]
    with ModelServer(model) as server:
        environment = {
            f"{dialect.upper()}_BASE_URL": server.url + ("/v1" if dialect == "openai" else ""),
            f"{dialect.upper()}_API_KEY": KEY,
        }
        nb = open_notebook(cells, environment=environment)

        def sent(name):
            return [asked for asked in server.asked if who(asked) == name]

        # one step is decided by a person; on the way all goes wrong that passes by itself, and the key is not accepted
        for cell in (0, 1):
            nb.run_cell(cell)
        nb.wait_text(1, "Once upon a time")
        picture(nb, f"models-{dialect}-stream")
        assert "there was a plan." not in nb.text(1)
        go.set()
        nb.wait_text(1, "again in")
        nb.wait_text(1, "does not accept the key")
        picture(nb, f"models-{dialect}-key")
        nb.click("button", "Retry", cell=1)
        nb.wait_text(1, "reviewer is waiting for you")
        nb.wait_text(1, "reviewer 2")
        nb.click("button", "Approve", cell=1)
        nb.wait_text(1, "Finished: 5 of 5 done.")
        kinds = ["EngineRateLimited", "EngineUnavailable", "EngineAuthError"]
        assert value(nb, 2) == repr(kinds)
        assert [len(sent(name)) for name in ("researcher", "planner", "implementer", "reviewer")] == [1, 2, 2, 2]

        # none is decided by a person, but a limit is reached
        nb.run_cell(3)
        nb.wait_text(3, "limit reached after thrifty")
        picture(nb, f"models-{dialect}-budget", 3)
        assert not sent("second")
        nb.output(3).get_by_role("button", name=re.compile(r"^Continue with \+")).click()
        nb.wait_text(3, "Finished: 2 of 2 done.")
        assert len(sent("second")) == 1

        # a model judges, and the one before it is told why
        nb.run_cell(4)
        nb.wait_text(4, "Finished: 2 of 2 done.")
        assert value(nb, 5) == "['coder 1', 'coder 2']"
        assert "a test fails" in json.dumps(sent("coder")[1].body)

        # a model calls three others; one of them fails, one asks for permission twice
        nb.run_cell(6)
        nb.wait_text(6, "no such thing")
        nb.wait_text(6, "one.txt")
        picture(nb, f"models-{dialect}-team", 6)
        nb.click("button", "Retry this one", cell=6)
        nb.click("button", "Allow once", cell=6)
        nb.wait_text(6, "two.txt")
        nb.wait_until(lambda: len(sent("backend-dev")) == 2)
        nb.click("button", "Deny…", cell=6)
        nb.type("two is mine")
        nb.click("button", "Deny", cell=6)
        nb.wait_text(6, "Finished: 1 of 1 done.")
        assert told(sent("qa-engineer")[-1]) == ["removed one.txt", "Refused by a person: two is mine"]
        (answers,) = told(sent("coordinator")[-1])
        for answer in ("frontend-dev 1", "backend-dev 2", "qa-engineer 2"):
            assert answer in answers
        assert value(nb, 7) == "(['one.txt'], 'coordinator 2', 2)"

        # every step is decided by a person, and what was rejected is made again with the words of the person
        for cell in (8, 9):
            nb.run_cell(cell)
        nb.wait_text(9, "author is waiting for you")
        nb.click("button", "Reject…", cell=9)
        nb.type("Name the tests.")
        nb.click("button", "Send back", cell=9)
        nb.wait_text(9, "author 2")
        nb.wait_text(9, "author is waiting for you")
        nb.click("button", "Approve", cell=9)
        nb.run_cell(10)
        nb.wait_text(10, "finisher is waiting for you")
        nb.click("button", "Approve", cell=10)
        nb.wait_text(10, "finisher 1")
        first, second = (json.dumps(asked.body["messages"]) for asked in sent("author"))
        assert "author 1" not in first
        assert "author 1" in second
        assert "Name the tests." in second

        header = {"openai": ("authorization", f"Bearer {KEY}"), "anthropic": ("x-api-key", KEY)}[dialect]
        assert {asked.headers[header[0]] for asked in server.asked} == {header[1]}
        assert {asked.body["model"] for asked in server.asked} == {MODELS[dialect]}
        assert KEY not in json.dumps(nb.save())
        assert nb.console_errors == []
