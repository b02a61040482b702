"""The five patterns of working together, each with models behind an HTTP API, over the loopback."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import cm_notebook as cm
from tests.helpers import gate, until

from .model_server import Asked, ModelServer, Said, error, openai_says
from .test_http import KEY, SAYS, both, call, complaint, engine, prompt_of, told


@pytest.fixture(autouse=True)
def _keys(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI", "ANTHROPIC"):
        monkeypatch.setenv(f"{name}_API_KEY", KEY)
    monkeypatch.setattr("cm_notebook.turns.LONGEST_BACKOFF_S", 0)


def agents(*names: str, **tools: list[Any]) -> list[cm.Agent]:
    listed = [cm.Agent(name, f"I am {name}.", model="m", tools=tools.get(name, [])) for name in names]
    return [*listed]


def who(sent: Asked) -> str:
    return prompt_of(sent).partition("I am ")[2].partition(".")[0]


class Model:
    """Answers each agent by its script, and then with its name and how often it was asked."""

    def __init__(self, dialect: str, **script: list[Said]) -> None:
        self.says, self.script = SAYS[dialect], {name.replace("_", "-"): said for name, said in script.items()}
        self.count: Counter[str] = Counter()
        self.lock = threading.Lock()

    def __call__(self, sent: Asked) -> Said:
        with self.lock:
            name = who(sent)
            number = self.count[name]
            self.count[name] += 1
        script = self.script.get(name, [])
        return script[number] if number < len(script) else self.says([f"{name} ", str(number + 1)])


@both
def test_every_step_is_decided_by_a_person(dialect):
    """Pattern 1, and it streams."""
    names = ("planner", "implementer", "reviewer")
    workflow = cm.Workflow("careful-builder", agents=agents(*names), steps=list(names), autonomous_mode="never")

    texts, looking, model = list[str](), threading.Event(), Model(dialect)

    async def look(run: cm.Run) -> None:
        async for thing in run.stream():
            looking.set()
            if isinstance(thing, cm.LiveText):
                texts.append(thing.text)

    def say(asked: Asked) -> Said:
        assert looking.wait(20), "what was written before somebody looks is not live any more"
        return model(asked)

    with ModelServer(say) as server:
        run = workflow.start(engine=engine(dialect, server), journal=":memory:")
        watched = threading.Thread(target=lambda: asyncio.run(look(run)))
        watched.start()
        gate(run, "planner")
        run.reject("shorter")
        until(lambda: run["planner"].attempts[-1].number == 2 and run.gates, "the second attempt")
        run.approve()
        for name in names[1:]:
            gate(run, name)
            run.approve()
        run.wait(20)
        watched.join(20)
    assert "shorter" in run["planner"].prompt
    assert [run[name].text for name in names] == ["planner 2", "implementer 1", "reviewer 1"]
    assert "".join(texts) == "planner 1planner 2implementer 1reviewer 1"


@both
def test_one_step_is_decided_by_a_person(dialect):
    """Pattern 2; on the way a service asks for patience, and one breaks off."""
    says = SAYS[dialect]
    steps = "researcher -> planner -> implementer -> reviewer? -> deployer"
    names = ("researcher", "planner", "implementer", "reviewer", "deployer")
    workflow = cm.Workflow("smart-builder", agents=agents(*names), steps=steps, autonomous_mode="always")
    limited = error(429, complaint("rate_limit_error"), retry_after="0")
    model = Model(dialect, researcher=[limited], implementer=[says("Half of it").first(4, "cut")])
    with ModelServer(model) as server:
        run = workflow.start(engine=engine(dialect, server), journal=":memory:")
        assert gate(run).step == "reviewer"
        assert run.approve().wait(20)["deployer"].text == "deployer 1"
    assert [event.error.kind for event in run.events if event.type == "TurnFailed"] == [
        "EngineRateLimited",
        "EngineUnavailable",
    ]
    assert (run["researcher"].text, run["implementer"].text) == ("researcher 2", "implementer 2")


@both
def test_nothing_is_decided_by_a_person(dialect, headless):
    """Pattern 3; nobody is asked, nor told to be there to be asked. With a key that is wrong it fails at once."""
    names = ("researcher", "planner", "implementer", "reviewer", "deployer")
    workflow = cm.Workflow("autopilot", agents=agents(*names), steps=list(names), autonomous_mode="always")
    with ModelServer(Model(dialect)) as server:
        run = workflow.start(engine=engine(dialect, server), journal=":memory:").wait(20)
        assert run["deployer"].text == "deployer 1"
        assert all("tools" not in sent.body for sent in server.asked)
        assert run.usage == cm.Usage(input_tokens=500, output_tokens=100)
    with ModelServer(error(401, complaint("authentication_error", f"wrong key {KEY}"))) as server:
        run = workflow.start(engine=engine(dialect, server), journal=":memory:")
        with pytest.raises(cm.RunFailed, match="does not accept the key") as failed:
            run.wait(20)
        assert KEY not in str(failed.value)
        assert len(server.asked) == 1


@both
def test_a_loop_goes_on_until_it_is_good(dialect):
    """Pattern 4: the judge is a model too, and its answer a verdict."""
    says = SAYS[dialect]
    judged = [says(json.dumps({"action": "loop", "reason": f"test {n} fails"})) for n in (1, 2)]
    model = Model(dialect, quality_gate=[*judged, says('Well. {"action": "continue", "reason": "good"}')])
    steps = "planner -> implementer -> quality-gate(loop 1, max 5) -> deployer"
    names = ("planner", "implementer", "quality-gate", "deployer")
    with ModelServer(model) as server:
        workflow = cm.Workflow("quality-first", agents=agents(*names), steps=steps)
        run = workflow.start(engine=engine(dialect, server), journal=":memory:").wait(20)
    assert [attempt.text for attempt in run["implementer"].attempts] == [f"implementer {n}" for n in (1, 2, 3)]
    assert "test 2 fails" in run["implementer"].prompt
    assert run["deployer"].text == "deployer 1"


@both
def test_a_team_works_side_by_side(dialect):
    """Pattern 5: a model calls three agents by its own tool; one fails and is tried again by a person; one asks for
    permission twice, and is denied it once."""
    removed: list[str] = []

    @cm.tool(ask=True)
    def remove(path: str) -> str:
        removed.append(path)
        return f"removed {path}"

    says, workers = SAYS[dialect], ["frontend-dev", "backend-dev", "qa-engineer"]
    line = "frontend-dev 'the UI' & backend-dev 'the API' & qa-engineer 'the tests'"
    model = Model(
        dialect,
        coordinator=[says("I delegate.", calls=[call("run_agents", script=line)])],
        backend_dev=[error(400, complaint("invalid_request_error", "no such thing"))],
        qa_engineer=[
            says(calls=[("1", "remove", '{"path": "a"}'), ("2", "remove", '{"path": "b"}')]),
        ],
    )
    made = agents("architect", "coordinator", "frontend-dev", "backend-dev")
    made.append(cm.Agent("qa-engineer", "I am qa-engineer.", model="m", tools=[remove]))
    workflow = cm.Workflow("team-builder", agents=made, steps="architect -> coordinator", sub_agents=workers)
    with ModelServer(model) as server:
        run = workflow.start(engine=engine(dialect, server), journal=":memory:")
        until(lambda: len(run.gates) == 2, "two members to wait")
        assert {opened.kind for opened in run.gates} == {"failed", "permission"}
        run.retry("coordinator/backend-dev#1")
        first = run.gate("qa-engineer")
        run.approve("qa-engineer")
        until(lambda: [opened for opened in run.gates if opened.id != first.id], "the second permission")
        run.reject("b is mine", "qa-engineer")
        run.wait(20)
        (said,) = [sent for sent in server.asked if who(sent) == "qa-engineer" and told(sent)]
    assert told(said) == ["removed a", "Refused by a person: b is mine"]
    assert removed == ["a"]
    assert run["coordinator"].text == "coordinator 2"
    assert run["coordinator/backend-dev#1"].text == "backend-dev 2"
    assert [len(run[f"coordinator/{name}#1"].attempts) for name in workers] == [1, 2, 1]
    whole = run["coordinator"].team_usage
    assert whole == cm.Usage(input_tokens=600, output_tokens=120)


@both
def test_a_coordinator_at_its_limit_has_nobody_begin(dialect):
    """What it has used is known after each of its exchanges, not only when its turn ends."""
    model = Model(dialect, boss=[SAYS[dialect](calls=[call("run_agents", script="a 'x' & b 'y'")])])
    workflow = cm.Workflow("w", agents=agents("boss", "a", "b"), steps="boss", sub_agents=["a", "b"], max_tokens=120)
    with ModelServer(model) as server:
        run = workflow.start(engine=engine(dialect, server), journal=":memory:")
        opened = gate(run)
        assert (opened.kind, opened.path) == ("budget", "boss/a#1")
        assert [who(sent) for sent in server.asked] == ["boss"]
        assert run["boss"].usage == cm.Usage(input_tokens=100, output_tokens=20)
        run.approve(max_tokens=10_000).wait(20)
    assert run["boss"].text == "boss 2"
    assert run.usage == cm.Usage(input_tokens=400, output_tokens=80), "what was known before is not counted twice"


def test_a_member_that_says_too_much_hides_no_other():
    @cm.agent("printer")
    def printer(turn: cm.Turn) -> str:
        return "x" * 50_000_000

    line = "a 'x' & printer 'y' & b 'z'"
    model = Model("openai", boss=[SAYS["openai"](calls=[call("run_agents", script=line)])])
    workflow = cm.Workflow(
        "w", agents=[*agents("boss", "a", "b"), printer], steps="boss", sub_agents=["a", "b", "printer"]
    )
    with ModelServer(model) as server:
        run = workflow.start(engine=engine("openai", server), journal=":memory:").wait(60)
        (said,) = told(server.asked[-1])
    assert len(run["boss/printer#1"].text) == 50_000_000
    assert len(said) < 100_000
    assert said.startswith("## a\n\na 1\n\n## printer\n\nxxx")
    assert "characters are left out" in said
    assert said.endswith("## b\n\nb 1")


@both
def test_a_tool_that_never_ends_is_ended_by_the_steps_time(dialect):
    let_go = threading.Event()

    @cm.tool
    def waits() -> str:
        let_go.wait()
        return ""

    agent = cm.Agent("a", "I am a.", model="m", tools=[waits])
    workflow = cm.Workflow("w", agents=[agent], steps=[cm.step("a", timeout_s=0.3)])
    try:
        with ModelServer(SAYS[dialect](calls=[("1", "waits", "{}")])) as server:
            run = workflow.start(engine=engine(dialect, server), journal=":memory:")
            opened = gate(run)
            assert "did not finish within 0.3 s" in opened.payload["error"]
            (use,) = run["a"].attempts[0].tools
            assert (use.name, use.text) == ("waits", None)
            assert run.usage == cm.Usage(input_tokens=100, output_tokens=20), "what it used until then counts"
            run.stop().wait(20)
    finally:
        let_go.set()


def test_the_time_of_a_step_stands_still_while_it_asks():
    @cm.tool(ask=True)
    def remove(path: str) -> str:
        return f"removed {path}"

    agent = cm.Agent("a", "I am a.", model="m", tools=[remove])
    workflow = cm.Workflow("w", agents=[agent], steps=[cm.step("a", timeout_s=60)])
    model = Model("openai", a=[SAYS["openai"](calls=[call("remove", path="x")])])
    with ModelServer(model) as server:
        run = workflow.start(engine=engine("openai", server), journal=":memory:")
        gate(run)
        assert run._driver.turns["a"]._timer is None
        assert run.approve().wait(20)["a"].text == "a 2"


CHILD = """
import sys, cm_notebook as cm
from cm_notebook.engines.openai import OpenAI
names = ["boss", "a", "b", "c"]
agents = [cm.Agent(name, f"I am {name}.", model="m") for name in names]
flow = cm.Workflow("t", agents=agents, steps="boss", sub_agents=names[1:])
run = flow.start(engine=OpenAI(base_url=sys.argv[1]), journal="j.db")
print(run.id, flush=True)
run.wait(60)
"""


def test_killed_with_members_in_flight_it_goes_on_without_repeating_what_is_done(tmp_path):
    asked: Counter[str] = Counter()
    lock, killed = threading.Lock(), threading.Event()

    def script(sent: Asked) -> Said:
        name = who(sent)
        with lock:
            asked[name] += 1
        if name == "boss":
            calls = [call("run_agents", script="a 'x' & b 'y' & c 'z'")]
            return openai_says("Done.") if told(sent) else openai_says(calls=calls)
        whole = openai_says(f"{name} did it.")
        return whole if name == "c" or killed.is_set() else whole.first(2, "hang")

    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    with ModelServer(script) as server:
        command = [sys.executable, "-c", CHILD, f"{server.url}/v1"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=tmp_path, env=env) as child:
            assert child.stdout is not None
            run_id = child.stdout.readline().strip()
            server.waiting.acquire(timeout=30)
            server.waiting.acquire(timeout=30)
            seen = cm.Run.open(run_id, tmp_path / "j.db")
            until(lambda: seen["boss/c#1"].status == "done", "the third")
            child.kill()
        killed.set()
        made = engine("openai", server)
        run = cm.resume(run_id, journal=tmp_path / "j.db", engine=made).wait(20)
        assert run["boss"].text == "Done."
        assert asked == {"boss": 3, "a": 2, "b": 2, "c": 1}
        assert told(server.asked[-1]) == ["## a\n\na did it.\n\n## b\n\nb did it.\n\n## c\n\nc did it."]
