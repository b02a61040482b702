"""Agents that call agents, and parallel steps, in runs. Through the public API only."""

from __future__ import annotations

import asyncio
import gc
import itertools
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import cm_notebook as cm
from cm_notebook import driving
from cm_notebook.journal import MemoryJournal
from cm_notebook.render import html, text
from cm_notebook.runstate import RunState
from cm_notebook.state import apply
from cm_notebook.team import MOST_DEPTH
from tests.helpers import gate, until


def boss(*asked: Any, name: str = "boss", limit: int | None = None, seen: list[Any] | None = None) -> cm.Agent:
    """An agent that makes these calls, one after the other, and says what came of each."""

    @cm.agent(name)
    async def calls(turn: cm.Turn) -> str:
        results = [one for call in asked for one in await turn.run_agents(call, max_concurrency=limit)]
        if seen is not None:
            seen.append(results)
        return "; ".join(f"{one.agent} {one.status}: {one.error or one.text}" for one in results)

    return calls


def worker(name: str, work: Callable[[cm.Turn], str] | None = None) -> cm.Agent:
    @cm.agent(name)
    def does(turn: cm.Turn) -> str:
        return work(turn) if work is not None else f"{name} did {turn.prompt}"

    return does


def team(*agents: cm.Agent, steps: str = "boss", **options: Any) -> cm.Workflow:
    """A workflow of `steps` in which all but the boss can be called."""
    others = [agent.id for agent in agents if agent.id != "boss"]
    return cm.Workflow(
        "team", steps=steps, agents=list(agents), sub_agents=options.pop("sub_agents", others), **options
    )


class Work:
    """Work that takes until it is let go, and counts how many are at it."""

    def __init__(self) -> None:
        self.lock, self.go = threading.Lock(), threading.Event()
        self.now = self.most = 0
        self.begun: list[str] = []

    def __call__(self, turn: cm.Turn) -> str:
        with self.lock:
            self.begun.append(turn.path)
            self.now += 1
            self.most = max(self.most, self.now)
        while not self.go.wait(0.005):
            turn.emit(".")  # raises when nobody waits for this turn any more
        with self.lock:
            self.now -= 1
        return f"{turn.path} done"


def started(run: cm.Run) -> list[str]:
    return [event.path for event in run.events if event.type == "TurnStarted"]


def folded(run: cm.Run) -> RunState:
    state = RunState()
    for event in run.events:
        apply(state, event.model_copy(deep=True))
    return state


# -- what comes back --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "asked",
    [
        "a 'x' & b 'y' && a 'z'",
        [[{"agent": "a", "prompt": "x"}, {"agent": "b", "prompt": "y"}], [{"agent": "a", "prompt": "z"}]],
    ],
    ids=["line", "list"],
)
def test_groups_run_in_order_and_their_outputs_come_back(asked: Any) -> None:
    run = team(boss(asked), worker("a"), worker("b")).start(journal=":memory:").wait(20)
    assert run["boss"].text == "a done: a did x; b done: b did y; a done: a did z"
    events = [(event.type, event.path) for event in run.events if event.type in ("TurnStarted", "TurnFinished")]
    assert events.index(("TurnStarted", "boss/a#2")) > events.index(("TurnFinished", "boss/b#1"))
    assert events.index(("TurnStarted", "boss/a#2")) > events.index(("TurnFinished", "boss/a#1"))
    assert [member.path for member in run["boss"].members] == ["boss/a#1", "boss/b#1", "boss/a#2"]
    assert run["boss/a#2"].text == "a did z"
    assert run["boss"].attempts[0].asked_s > 0, "its own time stands still meanwhile"


def test_a_sync_function_waits_by_itself() -> None:
    @cm.agent("boss")
    def calls(turn: cm.Turn) -> str:
        return turn.run_agents([{"agent": "a", "prompt": "x"}])[0].text

    assert team(calls, worker("a")).start(journal=":memory:").wait(20)["boss"].text == "a did x"


def test_a_member_is_told_its_own_prompt_the_files_and_what_it_is_asked() -> None:
    Path("work").mkdir()
    Path("work/design.md").write_text("blue\n\nand green")
    call = [{"agent": "a", "prompt": "Build {{ it }}.", "input_files": ["design.md"], "tail": 1}]
    agents = [boss(call), cm.Agent("a", "You know {{ goal }} and {{ first }}."), cm.Agent("first", "x")]
    flow = team(*agents, steps="first -> boss", inputs={"goal": "a CLI"})
    engine = cm.ScriptedEngine({"first": ["the plan"], "a": ["long\nand\nshort\n"]})
    run = flow.start(engine=engine, journal=":memory:", workspace="work").wait(20)
    assert run["boss/a#1"].prompt == (
        "You know a CLI and the plan.\n\n## design.md\n\nblue\n\nand green\n\n## What you are asked\n\nBuild {{ it }}."
    )
    assert run["boss"].text == "a done: short", "only its tail goes back"
    assert run["boss/a#1"].text == "long\nand\nshort\n"


def test_a_scripted_coordinator() -> None:
    """A turn goes on with the next reply when its tool calls are answered; the last one is its answer."""
    script = {
        "boss": [
            cm.Reply("I call.", tool_calls=[{"name": "run_agents", "arguments": {"script": "a 'x' & b 'y'"}}]),
            cm.Reply("I ask.", tool_calls=[{"name": "ask_human", "arguments": {"question": "Which port?"}}]),
            cm.Reply(
                "", tool_calls=[{"name": "run_agents", "arguments": {"groups": [[{"agent": "z", "prompt": "x"}]]}}]
            ),
            "all done",
            "second turn",
        ],
        "a": ["one"],
        "b": ["two"],
    }
    flow = team(*(cm.Agent(name, "Be useful.") for name in ("boss", "a", "b")), steps="boss?")
    run = flow.start(engine=cm.ScriptedEngine(script), journal=":memory:")
    assert gate(run).payload["question"] == "Which port?"
    assert run["boss/b#1"].text == "two"
    run.answer("8080")
    until(lambda: run.gates and run.gates[0].kind == "review", "the review")
    assert run["boss"].attempts[0].text == "all done"
    assert "'z' cannot be called here" in (run["boss"].attempts[0].note or ""), "and its model was told"
    run.reject("again")
    until(lambda: run.gates and run.gates[0].attempt == 2, "the second attempt")
    assert run["boss"].attempts[1].text == "second turn"
    run.stop()


@pytest.mark.parametrize(
    ("made", "words"),
    [
        ({"name": "run_agent", "arguments": {}}, "name='run_agent' is not valid"),
        ({"name": "run_agents", "arguments": {}}, "run_agents takes either 'groups' or 'script', not nothing"),
        ({"name": "ask_human", "arguments": {"text": "?"}}, "ask_human takes 'question', not 'text'"),
    ],
)
def test_a_wrong_tool_call_is_refused(made: dict[str, Any], words: str) -> None:
    with pytest.raises(cm.WorkflowError, match=words):
        cm.Reply("x", tool_calls=[made])


def test_a_script_that_ends_with_a_tool_call_says_so() -> None:
    call = cm.Reply("x", tool_calls=[{"name": "run_agents", "arguments": {"script": "a 'x'"}}])
    flow = team(cm.Agent("boss", "x"), worker("a"))
    run = flow.start(engine=cm.ScriptedEngine({"boss": [call]}), journal=":memory:")
    with pytest.raises(cm.ReplayMismatch, match="turn 1 of agent 'boss' ends with a tool call"):
        run.wait(20)


def test_a_tape_plays_members_too(headless: None) -> None:
    tool = {"name": "run_agents", "arguments": {"script": "a 'x' & b 'y'"}}
    lines = [
        {"tape": 1},
        {"path": "boss", "attempt": 1, "text": "all done", "tool_calls": [tool]},
        {"path": "boss/a#1", "attempt": 1, "text": "one", "usage": {"input_tokens": 3}},
        {"path": "boss/b#1", "attempt": 1, "text": "two", "prompt": "Be useful.\n\ny"},
    ]
    Path("t.jsonl").write_text("\n".join(map(json.dumps, lines)))
    flow = team(*(cm.Agent(name, "Be useful.") for name in ("boss", "a", "b")))
    run = flow.start(tape="t.jsonl", journal=":memory:").wait(20)
    assert [run[path].text for path in ("boss", "boss/a#1", "boss/b#1")] == ["all done", "one", "two"]
    del lines[3]
    Path("t.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(cm.ReplayMismatch, match='no answer for "boss/b#1"'):
        flow.start(tape="t.jsonl", journal=":memory:").wait(20)


@pytest.mark.parametrize("kind", ["EngineTimeout", "EngineRateLimited"])
def test_a_tape_plays_a_member_that_fails_and_is_retried(headless: None, kind: str) -> None:
    """Also one that would be tried again unasked: the tape holds how it ended."""
    tool = {"name": "run_agents", "arguments": {"script": "a 'x' & b 'y'"}, "said": "Both at once."}
    place = {"path": "boss/a#1", "attempt": 1, "kind": "failed"}
    lines = [
        {"tape": 1},
        {"path": "boss", "attempt": 1, "text": "Both are done.", "tool_calls": [tool]},
        {"path": "boss/a#1", "attempt": 1, "text": "I beg", "error": {"kind": kind, "message": "a said no more"}},
        {"gate": place, "decision": {"action": "retry"}},
        {"path": "boss/a#1", "attempt": 2, "text": "one"},
        {"path": "boss/b#1", "attempt": 1, "text": "two"},
    ]
    Path("t.jsonl").write_text("\n".join(map(json.dumps, lines)))
    flow = team(*(cm.Agent(name, "Be useful.") for name in ("boss", "a", "b")))
    run = flow.start(tape="t.jsonl", journal=":memory:").wait(20)
    first, second = run["boss/a#1"].attempts
    assert (first.error.kind, first.error.message, first.text) == (kind, "a said no more", "")
    assert (first.decision.action, second.text) == ("retry", "one")
    assert run["boss"].text == "Both are done."


def test_a_member_that_is_too_late_says_which_step_needs_more_time() -> None:
    @cm.agent("never")
    async def never(turn: cm.Turn) -> str:
        await asyncio.Event().wait()
        return ""

    @cm.agent("lead")
    async def lead(turn: cm.Turn) -> str:
        return " ".join(result.status for result in await turn.run_agents("never 'x'"))

    steps = [cm.step("lead", timeout_s=0.1)]
    run = cm.Workflow("w", agents=[lead, never], steps=steps, sub_agents=["never"]).start(journal=":memory:")
    error = gate(run, "never").payload["error"]
    with pytest.raises(cm.TransitionError, match="'lead' has no open gate: it waits for its team"):
        run.retry("lead")
    assert error.startswith("never did not finish within 0.1 s (without any output).")
    assert "`%cm step lead --timeout 0.25`" in error
    assert run.skip("never").wait(20)["lead"].text == "skipped"


def test_who_is_late_at_a_member_hears_what_became_of_it() -> None:
    @cm.agent("asks")
    async def asks(turn: cm.Turn) -> str:
        return await turn.ask_human("Which?") + await turn.ask_human("And then?")

    @cm.agent("quiet")
    async def quiet(turn: cm.Turn) -> str:
        return "done"

    @cm.agent("lead")
    async def lead(turn: cm.Turn) -> str:
        return " ".join(result.text for result in await turn.run_agents("quiet 'x' & quiet 'y' && asks 'z'"))

    flow = cm.Workflow("w", agents=[lead, asks, quiet], steps="lead", sub_agents=["asks", "quiet"])
    run = flow.start(journal=":memory:")
    gate(run, "asks")
    with pytest.raises(cm.TransitionError, match=r"^no gate of 'quiet' is open\.$"):
        run.skip("quiet")
    run.answer("a", "asks")
    gate(run, "asks")
    run.answer("b", "asks")
    assert run.wait(20)["lead"].text == "done done ab"
    with pytest.raises(cm.AlreadyDecided, match="answered by you"):
        run.answer("c", "asks")


def test_usage_of_members_counts_once_in_the_run_and_is_summed_for_their_caller() -> None:
    used = cm.Usage(input_tokens=10, output_tokens=1)
    call = [{"name": "run_agents", "arguments": {"script": "a 'x' & a 'y'"}}]
    script = {
        "boss": [cm.Reply("", tool_calls=call, usage=used, cost_usd=1.0), cm.Reply("x", usage=used, cost_usd=1.0)],
        "a": [cm.Reply("x", usage=used, cost_usd=0.25)] * 2,
    }
    flow = team(cm.Agent("boss", "x"), cm.Agent("a"))
    run = flow.start(engine=cm.ScriptedEngine(script), journal=":memory:").wait(20)
    assert (run.usage.input_tokens, run.cost_usd) == (40, 2.5)
    assert (run["boss"].usage.input_tokens, run["boss"].team_usage.input_tokens) == (20, 40)
    assert (run["boss"].cost_usd, run["boss"].team_cost_usd) == (2.0, 2.5)


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ("c 'x'", "'c' cannot be called here. Possible: a, b."),
        ("aa 'x'", "Did you mean 'a'?"),
        ("a ''", "what a is asked, not an empty text"),
        ([{"agent": "a", "prompt": " "}], "it is asked nothing"),
        ("a x", "column 3: expected what a is asked, in quotes"),
        ("a 'x' &", "column 8: expected an agent's id, found the end"),
        ([[]], "a group without a call"),
        (5, "takes a list of groups or a line, not int"),
        ("boss 'x'", "'boss' cannot be called here"),
        ([{"agent": "a", "prompt": "x", "input_files": ["nope.md"]}], "the input file 'nope.md' cannot be read"),
        ([{"agent": "a", "prompt": "x", "input_files": ["../x"]}], "lies outside the workspace"),
    ],
)
def test_a_wrong_call_is_an_error_of_that_turn_alone(asked: Any, words: str) -> None:
    @cm.agent("boss")
    async def tries(turn: cm.Turn) -> str:
        with pytest.raises(cm.WorkflowError) as refused:
            await turn.run_agents(asked)
        assert "\n" not in str(refused.value)
        results = await turn.run_agents("b 'y'")
        return f"{refused.value} {results[0].text}"

    run = team(tries, worker("a"), worker("b")).start(journal=":memory:").wait(20)
    assert words in run["boss"].text
    assert run["boss"].text.endswith("b did y"), "the turn goes on"
    assert started(run) == ["boss", "boss/b#1"]


def test_nobody_can_be_called_where_nobody_is_listed() -> None:
    run = team(boss("a 'x'"), worker("a"), sub_agents=[]).start(journal=":memory:")
    assert "nobody can be called here. List who can" in gate(run).payload["error"]
    run.stop()


def test_nobody_calls_in_a_circle() -> None:
    ping, pong = boss("pong 'x'", name="ping"), boss("ping 'x'", name="pong")
    run = team(boss("ping 'x'"), ping, pong).start(journal=":memory:")
    opened = gate(run)
    assert opened.path == "boss/ping#1/pong#1"
    assert "'ping' is at work above (boss/ping#1) and would wait for itself" in opened.payload["error"]
    run.stop()


def test_an_engine_knows_whom_its_agent_may_call() -> None:
    known: dict[str, tuple[str, ...]] = {}

    class Asks:
        name = "asks"

        async def stream(self, request: cm.AgentRequest) -> Any:
            known[request.path] = request.sub_agents
            if request.sub_agents and request.run_agents is not None:
                await request.run_agents([{"agent": request.sub_agents[0], "prompt": "x"}])
            yield cm.TurnDone("x")

    team(*(cm.Agent(name, "x") for name in ("boss", "a", "b", "c"))).start(engine=Asks(), journal=":memory:").wait(20)
    assert known == {"boss": ("a", "b", "c"), "boss/a#1": ("b", "c"), "boss/a#1/b#1": ("c",), "boss/a#1/b#1/c#1": ()}


def test_nobody_calls_too_deep() -> None:
    names = [f"d{n}" for n in range(1, MOST_DEPTH + 2)]
    chain = [boss(f"{below} 'x'", name=name) for name, below in itertools.pairwise(names)]
    run = team(boss("d1 'x'"), *chain, worker(names[-1])).start(journal=":memory:")
    opened = gate(run)
    assert opened.path.count("/") == MOST_DEPTH
    assert f"{MOST_DEPTH} deep, which is the limit" in opened.payload["error"]
    run.stop()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sub_agents": ["aa"]}, "sub_agents: agent 'aa' is not defined. Did you mean 'a'?"),
        ({"sub_agents": ["a", "a"]}, "sub_agents: 'a' is listed twice"),
        ({"steps": "[a | a]"}, "'a' is in it twice"),
        ({"steps": "[a | z]"}, "agent 'z' is not defined"),
        ({"steps": "[a | b] -> a"}, "the id 'a' is already step 1"),
        ({"max_concurrency": 0}, "max_concurrency=0 is not valid"),
    ],
)
def test_a_wrong_team_is_refused_by_name(options: dict[str, Any], words: str) -> None:
    with pytest.raises(cm.WorkflowError) as refused:
        cm.Workflow("t", **{"agents": [cm.Agent("a", "x"), cm.Agent("b", "y")], "steps": "a", **options})
    assert words in str(refused.value)


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (lambda: cm.parallel(), "members=[] is not valid"),
        (lambda: cm.parallel("a", "b", gate="before"), "gate='before' shows one prompt"),
        (lambda: cm.parallel("a", "b", prompt=["x", "y"]), "prompts cannot be chained here"),
        (lambda: cm.parallel("a", "b", id="a"), "'a' is one of its agents"),
        (lambda: cm.parallel("a", retris=1), "no option 'retris'. Did you mean 'retries'?"),
    ],
)
def test_a_wrong_parallel_step_is_refused_by_name(made: Callable[[], Any], words: str) -> None:
    with pytest.raises(cm.WorkflowError) as refused:
        made()
    assert words in str(refused.value)


def test_a_sub_agents_prompt_is_checked_at_the_start() -> None:
    flow = team(boss("a 'x'"), cm.Agent("a", "Know {{ gaol }}."), inputs={"goal": "x"})
    with pytest.raises(cm.WorkflowError, match=r"gaol.*Did you mean 'goal'"):
        flow.start(journal=":memory:")


# -- a member that fails ----------------------------------------------------------------------------------------------


def broken(*, heals: bool) -> Callable[[cm.Turn], str]:
    def work(turn: cm.Turn) -> str:
        if turn.attempt == 1 or not heals:
            raise ValueError("no disk")
        return "mended"

    return work


@pytest.mark.parametrize(
    ("action", "said"),
    [
        ("retry", "a done: mended; b done: b did y; c done: c did z"),
        ("skip", "a skipped: ; b done: b did y; c done: c did z"),
    ],
)
def test_a_failed_member_waits_for_a_person_while_its_siblings_go_on(action: str, said: str) -> None:
    run = team(boss("a 'x' & b 'y' && c 'z'"), worker("a", broken(heals=True)), worker("b"), worker("c")).start(
        journal=":memory:"
    )
    opened = gate(run)
    assert (opened.step, opened.path, opened.kind) == ("a", "boss/a#1", "failed")
    until(lambda: run["boss/b#1"].status == "done", "its sibling")
    assert "boss/c#1" not in started(run)
    with run.reading() as state:
        said_of_it = text.gate_sentence(state, opened)
        labels = [way.label for way in text.ways(state, opened)]
    assert "no disk" in said_of_it
    assert labels == ["Retry this one", "Edit prompt", "Continue without it", "Stop"]
    assert run.gate("a") == run.gate("boss/a#1") == run.gate() == opened
    run.decide(opened.id, cm.Decision(action=action))
    assert run.wait(20)["boss"].text == said
    assert started(run).count("boss/b#1") == 1
    assert folded(run) == run.state


def test_with_nobody_there_its_caller_is_told_and_later_groups_do_not_start(headless: None) -> None:
    seen: list[Any] = []
    flow = team(boss("a 'x' & b 'y' && c 'z'", seen=seen), worker("a", broken(heals=False)), worker("b"), worker("c"))
    run = flow.start(journal=":memory:").wait(20)
    a, b, c = seen[0]
    assert (a.status, b.status, b.text, c.status) == ("failed", "done", "b did y", "pending")
    assert "no disk" in a.error
    assert "not begun" in c.error
    assert run["boss/a#1"].status == "failed"
    assert "boss/c#1" not in started(run)
    assert run.status == "completed", "what it makes of that is its own affair"


def test_a_policy_may_answer_for_a_member(headless: None) -> None:
    flow = team(boss("a 'x' & b 'y'"), worker("a", broken(heals=True)), worker("b"))
    run = flow.start(journal=":memory:", on_gate=lambda opened: "retry" if opened.path == "boss/a#1" else None)
    assert run.wait(20)["boss"].text == "a done: mended; b done: b did y"


def test_several_failed_members_are_told_apart() -> None:
    run = team(boss("a 'x' & a 'y'"), worker("a", broken(heals=True))).start(journal=":memory:")
    until(lambda: len(run.gates) == 2, "both gates")
    with pytest.raises(cm.TransitionError, match="several gates of 'a' are open; name the one: boss/a#1, boss/a#2"):
        run.retry("a")
    run.retry("boss/a#2")
    until(lambda: run["boss/a#2"].status == "done", "the second")
    assert [opened.path for opened in run.gates] == ["boss/a#1"]
    run.skip("a")
    assert run.wait(20)["boss"].text == "a skipped: ; a done: mended"
    with pytest.raises(cm.AlreadyDecided):
        run.gate("boss/a#1")


def test_a_rate_limit_of_a_member_is_waited_out() -> None:
    script = {"a": [cm.Reply(error=cm.EngineRateLimited("busy", retry_after_s=0.01)), "fine"]}
    flow = team(boss("a 'x' & b 'y'", limit=1), cm.Agent("a"), worker("b"))
    run = flow.start(engine=cm.ScriptedEngine(script), journal=":memory:", max_concurrency=1).wait(20)
    assert run["boss"].text == "a done: fine; b done: b did y"
    assert started(run) == ["boss", "boss/a#1", "boss/a#1", "boss/b#1"], "it keeps its place"


# -- places -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("of_run", "of_workflow", "of_call", "most"),
    [(None, None, None, 4), (2, None, None, 2), (None, 3, None, 3), (2, 3, None, 2), (4, None, 1, 1), (1, None, 3, 1)],
)
def test_never_more_are_at_work_than_may_be(
    of_run: int | None, of_workflow: int | None, of_call: int | None, most: int
) -> None:
    work = Work()
    flow = team(
        boss([{"agent": "a", "prompt": str(n)} for n in range(6)], limit=of_call),
        worker("a", work),
        max_concurrency=of_workflow,
    )
    run = flow.start(journal=":memory:", max_concurrency=of_run)
    until(lambda: len(work.begun) == most, "the first ones")
    assert run.state.busy == most
    work.go.set()
    assert run.wait(20).status == "completed"
    assert work.most == most
    assert sorted(work.begun) == [f"boss/a#{n}" for n in range(1, 7)]


@pytest.mark.parametrize("places", [1, 2, 5])
def test_who_waits_for_others_gives_its_place_to_them(places: int) -> None:
    lock, now, most = threading.Lock(), [0], [0]

    def enter() -> None:
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])

    def leave() -> None:
        with lock:
            now[0] -= 1

    @cm.agent("lead")
    def leads(turn: cm.Turn) -> str:
        enter()
        leave()  # from here on it waits
        results = turn.run_agents("w 'x' & w 'y' && w 'z'")
        enter()
        leave()
        return str(len(results))

    def work(turn: cm.Turn) -> str:
        enter()
        turn.emit("x")
        leave()
        return "done"

    flow = team(boss([{"agent": "lead", "prompt": str(n)} for n in range(5)]), leads, worker("w", work))
    run = flow.start(journal=":memory:", max_concurrency=places).wait(30)
    assert run["boss"].text == "; ".join(["lead done: 3"] * 5)
    assert most[0] <= places
    assert len(started(run)) == 1 + 5 + 15


def test_a_thousand_members_at_once() -> None:
    asked = [{"agent": "a", "prompt": str(n)} for n in range(1000)]
    engine = cm.ScriptedEngine({"a": [f"reply {n}" for n in range(1000)]})
    flow = team(boss(asked), cm.Agent("a"))
    run = flow.start(engine=engine, journal=":memory:", max_concurrency=1000).wait(60)
    assert run["boss"].text.count("a done") == 1000
    assert run["boss/a#700"].text == "reply 699", "turns are counted in the order in which they start"
    assert len(html.run_html(run.state)) < 200_000
    assert "980 more: 980 done" in text.run_text(run.state) or "1000 more: 1000 done" in text.run_text(run.state)


# -- questions --------------------------------------------------------------------------------------------------------


def test_a_question_of_a_member_is_answered_while_its_siblings_work() -> None:
    work = Work()

    @cm.agent("asker")
    async def asks(turn: cm.Turn) -> str:
        return f"port {await turn.ask_human('Which port?')}"

    run = team(boss("asker 'x' & a 'y'"), asks, worker("a", work)).start(journal=":memory:")
    opened = gate(run)
    assert (opened.path, opened.kind) == ("boss/asker#1", "question")
    until(lambda: work.begun, "its sibling")
    run.answer("8080", "asker")
    until(lambda: run["boss/asker#1"].status == "done", "the answer")
    assert run["boss/a#1"].status == "running"
    work.go.set()
    assert run.wait(20)["boss"].text == "asker done: port 8080; a done: boss/a#1 done"


def test_a_question_that_nobody_can_answer_ends_the_wait_when_the_others_are_done(headless: None) -> None:
    @cm.agent("asker")
    async def asks(turn: cm.Turn) -> str:
        return str(await turn.ask_human("Which port?"))

    run = team(boss("asker 'x' & a 'y'"), asks, worker("a")).start(journal=":memory:")
    with pytest.raises(cm.GatePending, match='at the gate "boss/asker#1"'):
        run.wait(20)
    assert run["boss/a#1"].status == "done"
    run.stop()


def test_one_that_asks_keeps_no_place_from_others_and_goes_on_when_there_is_one() -> None:
    work, told = Work(), []

    @cm.agent("asker")
    async def asks(turn: cm.Turn) -> str:
        told.append(await turn.ask_human("Which port?"))
        return f"port {told[0]}"

    flow = team(boss("asker 'q' & a '1' & a '2'"), asks, worker("a", work))
    run = flow.start(journal=":memory:", max_concurrency=1)
    until(lambda: len(work.begun) == 1, "the next one began, though nobody has answered")
    run.answer("8080", "asker")
    until(lambda: run["boss/asker#1"].status == "queued", "it is answered, and waits for a place")
    with pytest.raises(cm.AlreadyDecided, match="already answered by you"):
        run.answer("9090", "asker")
    assert (told, work.most) == ([], 1)
    work.go.set()
    assert run.wait(20).status == "completed"
    assert run["boss/asker#1"].text == "port 8080"
    assert work.most == 1
    assert [event.type for event in run.events].count("TurnWentOn") == 1
    order = [(event.type, event.path) for event in run.events if event.type in ("TurnStarted", "TurnWentOn")]
    assert order[-2:] == [("TurnWentOn", "boss/asker#1"), ("TurnStarted", "boss/a#2")], "first who was at it before"


def test_stopped_while_an_answered_one_waits_for_a_place_it_is_not_asked_again() -> None:
    work, asked = Work(), []

    @cm.agent("asker")
    async def asks(turn: cm.Turn) -> str:
        asked.append(turn.attempt)
        return f"port {await turn.ask_human('Which port?')}"

    flow = team(boss("asker 'q' & a '1'"), asks, worker("a", work))
    run = flow.start(journal="journal.db", max_concurrency=1)
    until(lambda: len(work.begun) == 1, "the other one began")
    run.answer("8080", "asker")
    run.stop()
    work.go.set()
    run.wait(20)
    again = cm.resume(run.id, flow, journal="journal.db").wait(20)
    assert again.status == "completed"
    assert again["boss/asker#1"].text == "port 8080"
    assert asked == [1, 2]
    assert sum(event.type == "GateOpened" for event in again.events) == 1


# -- pausing, stopping, going back ------------------------------------------------------------------------------------


def test_pause_lets_members_finish_and_starts_no_other() -> None:
    work = Work()
    flow = team(boss("a '1' & a '2' & a '3' && a '4'"), worker("a", work))
    run = flow.start(journal=":memory:", max_concurrency=2)
    until(lambda: len(work.begun) == 2, "two of them")
    run.pause()
    assert run.status == "running", "two are still at work"
    work.go.set()
    assert run.wait(20).status == "paused"
    assert started(run) == ["boss", "boss/a#1", "boss/a#2"]
    assert run["boss"].status == "waits for its team"
    run.unpause()
    assert run.wait(20).status == "completed"
    assert len(started(run)) == 5


@pytest.mark.parametrize("cut", range(1, 40))
def test_stopped_or_cut_after_every_event_it_ends_the_same_and_repeats_nothing(cut: int) -> None:
    """``kill -9`` after any event, with parallel steps, members of members, a failure and a question."""

    def work(turn: cm.Turn) -> str:
        if turn.path == "boss/a#1" and turn.attempt == 1:
            raise ValueError("no disk")
        return f"{turn.path}: {turn.prompt}"

    @cm.agent("asker")
    async def asks(turn: cm.Turn) -> str:
        return f"port {await turn.ask_human('Which port?')}"

    def flow() -> cm.Workflow:
        lead = boss("a 'deep' & asker 'q'", name="lead")
        agents = [boss("a 'x' & lead 'y' && a 'z'"), lead, worker("a", work), asks, worker("p"), worker("q")]
        return team(*agents, steps="boss -> [p | q]", sub_agents=["a", "lead", "asker"])

    def policy(opened: cm.Gate) -> cm.Decision:
        if opened.kind == "question":
            return cm.Decision(action="answer", feedback="8080")
        return cm.Decision(action="retry")

    whole = flow().start(journal=":memory:", on_gate=policy).wait(20)
    assert whole.status == "completed"
    kept = [event.model_copy(deep=True) for event in whole.events[:cut]]
    if kept[-1].type == "RunFinished":
        return
    journal = MemoryJournal()
    journal.create(whole.id, "team", None)
    journal.commit(whole.id, kept)
    again = cm.resume(whole.id, flow(), journal=journal, on_gate=policy).wait(20)
    assert again.status == "completed"
    assert {step.id: step.text for step in again} == {step.id: step.text for step in whole}
    finished = [event.path for event in again.events if event.type == "TurnFinished"]
    assert len(finished) == len(set(finished)), "no finished member is repeated"
    assert set(again.state.members) == set(whole.state.members)
    assert folded(again) == again.state


@pytest.mark.parametrize("how", ["stop", "rerun", "replace", "remove"])
def test_what_ends_the_caller_ends_its_members(how: str) -> None:
    work = Work()
    flow = team(
        boss("lead 'x' & a 'y'"), boss("a 'z'", name="lead"), worker("a", work), worker("other"), steps="boss -> other"
    )
    run = flow.start(journal=":memory:")
    until(lambda: len(work.begun) == 2, "both")
    if how == "stop":
        run.stop()
    elif how == "rerun":
        run.rerun("boss")
    elif how == "replace":
        run.replace(cm.step("boss", timeout_s=60))
    else:
        run.remove("boss")
    cut = [event.path for event in run.events if event.type == "TurnCutShort"]
    assert sorted(cut) == ["boss", "boss/a#1", "boss/lead#1", "boss/lead#1/a#1"]
    work.go.set()
    if how == "stop":
        run = cm.resume(run.id, flow, journal=run._journal)
    assert run.wait(20).status == "completed"
    if how == "stop":
        assert [len(run[path].attempts) for path in ("boss/a#1", "boss/lead#1", "boss/lead#1/a#1")] == [2, 2, 2]
    elif how != "remove":
        assert len(run["boss/a#2"].attempts) == 1, "a step that begins anew calls anew"


def test_a_caller_that_is_tried_again_calls_nobody_twice() -> None:
    tries = []

    @cm.agent("boss")
    async def calls(turn: cm.Turn) -> str:
        results = await turn.run_agents("a 'x' & a 'x' & b 'y'")
        tries.append([one.path for one in results])
        if len(tries) == 1:
            raise cm.EngineRateLimited("busy", retry_after_s=0)
        return ", ".join(one.text for one in results)

    run = team(calls, worker("a"), worker("b")).start(journal=":memory:").wait(20)
    assert run["boss"].text == "a did x, a did x, b did y"
    assert tries == [["boss/a#1", "boss/a#2", "boss/b#1"]] * 2
    assert started(run) == ["boss", "boss/a#1", "boss/a#2", "boss/b#1", "boss"]


def test_after_a_rejection_members_run_anew() -> None:
    run = team(boss("a 'x'"), worker("a"), steps="boss?").start(journal=":memory:")
    gate(run)
    run.reject("again")
    until(lambda: run.gates and run.gates[0].attempt == 2, "the second attempt")
    run.approve()
    assert [member.path for member in run.wait(20)["boss"].members] == ["boss/a#1", "boss/a#2"]


def test_what_nobody_waits_for_any_more_is_cut_short() -> None:
    work = Work()

    @cm.agent("boss")
    async def gives_up(turn: cm.Turn) -> str:
        waiting = asyncio.ensure_future(turn.run_agents("a 'x' & a 'y'"))
        while len(work.begun) < 2:
            await asyncio.sleep(0.005)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        return (await turn.run_agents("b 'z'"))[0].text

    run = team(gives_up, worker("a", work), worker("b")).start(journal=":memory:").wait(20)
    assert run["boss"].text == "b did z"
    assert [run[path].status for path in ("boss/a#1", "boss/a#2")] == ["queued", "queued"]
    assert run["boss/a#1"].attempts[0].cut_short == "nobody waits for it"


def test_what_must_not_run_twice_asks_first_in_a_team_too() -> None:
    work = Work()
    flow = team(boss("x 'y'"), worker("p", work), worker("q"), steps="boss", sub_agents=[])
    flow = cm.Workflow("p", agents=flow.agents, steps=[cm.parallel("p", "q", idempotent=False)])
    run = flow.start(journal=MemoryJournal())
    until(lambda: work.begun and run["p-q/q#1"].status == "done", "one of them")
    run.stop().wait(20)
    work.go.set()
    run = cm.resume(run.id, flow, journal=run._journal)
    opened = gate(run)
    assert (opened.kind, opened.path) == ("may_have_run", "p-q/p#1")
    run.approve()
    assert run.wait(20)["p-q"].text == "## p\n\nNo output: you said that it had run.\n\n## q\n\nq did "


CHILD = """
import sys, time, cm_notebook as cm
from pathlib import Path
path, run_id = sys.argv[1], sys.argv[2]
@cm.agent("boss")
async def boss(turn):
    return ", ".join(one.text for one in await turn.run_agents("a 'x' & b 'y' & c 'z' & d 'w'"))
def work(turn):
    with open("begun", "a") as file:
        file.write(turn.path + "\\n")
    if turn.step != "d" and run_id == "-":
        time.sleep(60)
    return turn.path
agents = [boss, *(cm.agent(name)(work) for name in "abcd")]
flow = cm.Workflow("t", agents=agents, steps="boss", sub_agents=list("abcd"))
run = flow.start(journal=path) if run_id == "-" else cm.resume(run_id, flow, journal=path)
print(run.id, flush=True)
run.wait(60)
"""


def test_killed_with_three_members_in_flight_it_goes_on_without_repeating_what_is_done(tmp_path: Path) -> None:
    path, root = tmp_path / "j.db", str(Path(__file__).parents[2])
    env = {**os.environ, "PYTHONPATH": root}
    begun = tmp_path / "begun"
    command = [sys.executable, "-c", CHILD, str(path), "-"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=tmp_path, env=env) as child:
        assert child.stdout is not None
        run_id = child.stdout.readline().strip()
        until(lambda: begun.exists() and len(begun.read_text().split()) == 4, "all four")
        until(lambda: cm.Run.open(run_id, path)["boss/d#1"].status == "done", "the fourth")
        child.kill()
    kept = cm.Journal(path).events(run_id)
    subprocess.run([*command[:3], str(path), run_id], check=True, cwd=tmp_path, env=env, timeout=60)
    run = cm.Run.open(run_id, path)
    assert run["boss"].text == "boss/a#1, boss/b#1, boss/c#1, boss/d#1"
    assert run.events[: len(kept)] == kept
    assert sorted(begun.read_text().split()) == sorted([*["boss/a#1", "boss/b#1", "boss/c#1"] * 2, "boss/d#1"])
    assert [len(run[f"boss/{name}#1"].attempts) for name in "abcd"] == [2, 2, 2, 1]


# -- parallel steps ---------------------------------------------------------------------------------------------------

ABC = [cm.Agent("a", "Do A for {{ goal }}."), cm.Agent("b", "Do B."), cm.Agent("c", "Merge {{ a }} and {{ b }}.")]


def script(**more: Any) -> cm.ScriptedEngine:
    return cm.ScriptedEngine({"first": ["plan"], "a": ["A1", "A2"], "b": ["B1", "B2"], "c": ["C1", "C2"], **more})


@pytest.mark.parametrize("steps", ["[a | b] -> c", [cm.parallel("a", "b"), "c"]], ids=["arrow", "list"])
def test_a_parallel_step(steps: Any) -> None:
    flow = cm.Workflow("p", agents=ABC, steps=steps, inputs={"goal": "it"})
    assert cm.Workflow.from_dict(json.loads(json.dumps(flow.to_dict()))) == flow
    run = flow.start(engine=script(), journal=":memory:").wait(20)
    assert run["a-b"].text == "## a\n\nA1\n\n## b\n\nB1"
    assert run["c"].prompt == "Merge A1 and B1."
    assert [member.prompt for member in run["a-b"].members] == ["Do A for it.", "Do B."]
    stored = [event for event in run.events if "A1" in event.model_dump_json()]
    assert len(stored) == 1, "no text is kept twice"
    assert folded(run) == run.state


def test_its_members_get_the_context_and_whoever_follows_gets_them_all() -> None:
    agents = [cm.Agent("first", "x"), cm.Agent("a", "Do A."), cm.Agent("b", "Do B."), cm.Agent("c", "Merge.")]
    flow = cm.Workflow("p", agents=agents, steps="first -> [a | b] -> c")
    run = flow.start(engine=script(), journal=":memory:").wait(20)
    assert run["a-b/b#1"].prompt == "Do B.\n\n## Output of first\n\nplan"
    assert run["c"].prompt == "Merge.\n\n## Output of a-b\n\n## a\n\nA1\n\n## b\n\nB1"


def test_it_is_reviewed_as_a_whole_and_rejected_as_a_whole() -> None:
    flow = cm.Workflow("p", agents=ABC, steps="[a | b]? -> c", inputs={"goal": "it"})
    run = flow.start(engine=script(), journal=":memory:")
    assert gate(run).path == "a-b"
    run.reject("shorter")
    until(lambda: run.gates and run.gates[0].attempt == 2, "the second attempt")
    assert run["a-b/b#2"].prompt == "Do B.\n\n## Your last answer\n\nB1\n\n## Feedback on it\n\nshorter"
    assert "A2" in run["a-b"].attempts[1].text
    assert "-A1" in run["a-b"].diff() or "A1" in run["a-b"].diff()
    run.approve()
    assert run.wait(20)["c"].prompt == "Merge A2 and B2."


def test_skipped_its_members_have_no_output() -> None:
    flow = cm.Workflow("p", agents=ABC, steps="[a | b]? -> c", inputs={"goal": "it"})
    run = flow.start(engine=script(), journal=":memory:")
    gate(run)
    run.skip()
    assert run.wait(20)["c"].prompt == "Merge  and ."


def test_a_failed_member_fails_it_where_nobody_is_there(headless: None) -> None:
    agents = [worker("a", broken(heals=False)), worker("b")]
    run = cm.Workflow("p", agents=agents, steps="[a | b]").start(journal=":memory:")
    with pytest.raises(cm.RunFailed, match=r"a-b: a failed: .*no disk"):
        run.wait(20)
    again = cm.Workflow("p", agents=[worker("a"), agents[1]], steps="[a | b]")
    run = cm.resume(run.id, journal=run._journal, agents=again.agents, on_gate=lambda opened: "retry").wait(20)
    assert run["a-b"].text == "## a\n\na did \n\n## b\n\nb did "
    assert started(run) == ["a-b/a#1", "a-b/b#1", "a-b/a#1"], "what is done is not repeated"


def test_a_loop_goes_over_it_again() -> None:
    agents = [*ABC[:2], cm.Agent("check", "Judge {{ a }}.")]
    flow = cm.Workflow("p", agents=agents, steps="[a | b] -> check(loop 1, max 2)", inputs={"goal": "it"})
    verdicts = ['{"action": "loop", "reason": "too long"}', '{"action": "continue"}']
    run = flow.start(engine=script(check=verdicts), journal=":memory:").wait(20)
    assert [attempt.text for attempt in run["a-b"].attempts] == ["## a\n\nA1\n\n## b\n\nB1", "## a\n\nA2\n\n## b\n\nB2"]
    assert "## Not accepted yet by check (pass 2)\n\ntoo long" in run["a-b/b#2"].prompt


def test_an_edited_agent_makes_it_stale() -> None:
    flow = cm.Workflow("p", agents=ABC, steps="[a | b] -> c?", inputs={"goal": "it"})
    run = flow.start(engine=script(), journal=MemoryJournal())
    gate(run)
    run.stop().wait(20)
    edited = cm.Workflow(
        "p", agents=[ABC[0], cm.Agent("b", "Do B better."), ABC[2]], steps="[a | b] -> c?", inputs={"goal": "it"}
    )
    run = cm.resume(run.id, edited, journal=run._journal, engine=script())
    assert (gate(run).kind, gate(run).step) == ("stale", "a-b")
    run.retry()
    until(lambda: run.gates and run.gates[0].step == "c", "what follows")
    assert run["a-b/b#2"].prompt == "Do B better."
    run.stop()


def test_who_may_be_called_can_be_edited() -> None:
    work = Work()
    flow = team(boss("a 'x'"), worker("a", work))
    run = flow.start(journal=MemoryJournal())
    until(lambda: work.begun, "the member")
    run.stop().wait(20)
    edited = team(boss("b 'x'"), worker("b"))
    again = cm.resume(run.id, edited, journal=run._journal, agents=flow.agents).wait(20)
    assert again["boss"].text == "b done: b did x"
    assert again.workflow.sub_agents == ["b"]


def test_a_bug_in_a_member_ends_the_run_as_itself() -> None:
    class Buggy:
        name = "buggy"

        async def stream(self, request: cm.AgentRequest) -> Any:
            if request.agent.id == "b":
                raise RuntimeError("a bug of ours")
            await asyncio.sleep(60)
            yield cm.TurnDone("x")

    flow = team(boss("a 'x' & b 'y'"), cm.Agent("a"), cm.Agent("b"))
    run = flow.start(engine=Buggy(), journal=":memory:")
    with pytest.raises(RuntimeError, match="a bug of ours"):
        run.wait(20)
    assert [event.path for event in run.events if event.type == "TurnCutShort"] == ["boss/a#1", "boss"]


def test_another_process_decides_at_a_member(tmp_path: Path) -> None:
    run = team(boss("a 'x'"), worker("a", broken(heals=True))).start(journal=tmp_path / "j.db")
    gate(run)
    other = cm.Run(run.id, cm.Journal(tmp_path / "j.db"))
    other._driver.catch_up()
    assert other["boss"].status == "waits for its team"
    other.retry("a")
    assert run.wait(20)["boss"].text == "a done: mended"


# -- how it is shown --------------------------------------------------------------------------------------------------


def test_views_show_members_at_every_moment() -> None:
    flow = team(boss("a 'x' & lead 'y'"), boss("a 'z'", name="lead"), worker("a", broken(heals=True)))
    run = flow.start(journal=":memory:", on_gate=lambda opened: "retry").wait(20)
    state = RunState()
    for event in run.events:
        apply(state, event.model_copy(deep=True))
        text.event_line(state, event)
        shown = text.run_text(state)
        if state.members and not state.ended:
            assert "\n    a#1 " in shown
        assert "<b>a</b>" in html.run_html(state) or not state.members
        for step in state.order:
            html.show_html(state, step)
            text.show_text(state, step)
        for member in state.members.values():
            html.show_html(state, member)
        html.status_html(state)
        run.graph("text")


def test_what_a_member_costs_does_not_grow_with_their_number() -> None:
    """Counted in calls of functions, which is the same each time."""

    class Quick:
        name = "quick"

        async def stream(self, request: cm.AgentRequest) -> Any:
            yield cm.TurnDone("x")

    async def calls(number: int, places: int) -> float:
        asked = [{"agent": "a", "prompt": str(n)} for n in range(number)]
        flow, count = team(boss(asked), cm.Agent("a")), 0

        def counted(frame: Any, event: str, arg: Any) -> None:
            nonlocal count
            count += 1

        sys.setprofile(counted)
        try:
            run = flow.start(engine=Quick(), journal=":memory:", max_concurrency=places, loop="kernel")
            await run
        finally:
            sys.setprofile(None)
        return count / number

    for places in (4, 10_000):
        few, many = asyncio.run(calls(100, places)), asyncio.run(calls(2000, places))
        assert many < 1.2 * few, f"{few:.0f} calls for each of 100, {many:.0f} for each of 2000, {places} at a time"


def test_many_that_begin_together_count_as_old_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else each full collection while they begin would walk them all."""
    monkeypatch.setattr(driving, "MANY", 100)
    young: list[str] = []

    @cm.agent("a")
    async def first(turn: cm.Turn) -> str:
        if turn.path.endswith("#1"):
            old = {id(one) for one in gc.get_objects(generation=2)}
            turns = cm.current()._driver.turns
            young.extend(path for path, live in turns.items() if path != "boss" and id(live) not in old)
            young.append(f"of {len(turns)}")
        return "done"

    flow = team(boss([{"agent": "a", "prompt": str(number)} for number in range(300)]), first)
    flow.start(journal=":memory:", max_concurrency=300).wait(60)
    assert young == ["of 301"]
