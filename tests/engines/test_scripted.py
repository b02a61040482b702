"""The double that says what it was told to say."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cm_notebook.engines.base import Delta, SessionStarted, TurnDone, UsageReported
from cm_notebook.engines.scripted import Reply, ScriptedEngine, words
from cm_notebook.errors import EngineRateLimited, ReplayMismatch, WorkflowError
from cm_notebook.events import Usage
from cm_notebook.testing import answers, collect, fails, lets_go, request
from cm_notebook.workflow import Verdict


def say(engine, agent="planner", **options):
    return answers(engine, request(agent, **options)).text


def test_the_nth_turn_gets_the_nth_reply():
    engine = ScriptedEngine({"planner": ["one", Reply("two")], "coder": "only"})
    assert [say(engine), say(engine, "coder"), say(engine)] == ["one", "only", "two"]


def test_a_new_engine_goes_on_where_the_run_is():
    script = {"planner": ["one", "two", "three"]}
    assert say(ScriptedEngine(script), ordinal=3, attempt=2) == "three"
    assert say(ScriptedEngine(script), ordinal=1, attempt=2) == "one"


def test_a_failed_turn_has_used_up_its_reply():
    engine = ScriptedEngine({"planner": [Reply("par", error=EngineRateLimited("busy")), "text"]})
    assert str(fails(engine, request(), EngineRateLimited)) == "busy"
    assert say(engine) == "text"


def test_a_turn_that_was_cut_short_has_not():
    engine = ScriptedEngine({"planner": [Reply("one two", delay_s=3600), "next"]})
    lets_go(engine, request)
    assert engine._ended == {}


def test_words_are_streamed_one_by_one():
    events = asyncio.run(collect(ScriptedEngine({"planner": ["  first reply\n\nof it "]}), request()))
    assert events == [
        Delta("  "),
        Delta("first "),
        Delta("reply\n\n"),
        Delta("of "),
        Delta("it "),
        TurnDone("  first reply\n\nof it "),
    ]


@given(st.text())
def test_words_lose_nothing(text):
    assert "".join(words(text)) == text
    assert "" not in words(text)


def test_all_that_a_reply_may_hold():
    verdict = Verdict(action="loop", reason="again")
    reply = Reply(
        deltas=["a", "bc"],
        usage=Usage(input_tokens=3),
        cost_usd=0.5,
        delay_s=0.001,
        session_id="s1",
        verdict=verdict,
        output={"k": 1},
    )
    assert asyncio.run(collect(ScriptedEngine({"planner": [reply]}), request())) == [
        SessionStarted("s1"),
        Delta("a"),
        Delta("bc"),
        UsageReported(Usage(input_tokens=3), 0.5),
        TurnDone("abc", output={"k": 1}, verdict=verdict),
    ]
    assert say(ScriptedEngine({"planner": [Reply(verdict=verdict)]})) == "again"
    assert say(ScriptedEngine({"planner": [Reply()]})) == ""
    assert asyncio.run(collect(ScriptedEngine({"planner": [Reply(cost_usd=1.0)]}), request()))[0].cost_usd == 1.0


@pytest.mark.parametrize(
    ("script", "agent", "message"),
    [
        ({"planner": ["one"]}, "planner", r"no reply for turn 2 of agent 'planner'; it has 1\. Add one"),
        ({"planer": ["one"]}, "planner", r"no replies for agent 'planner' \(turn 2\)\. Did you mean 'planer'\?"),
    ],
)
def test_a_missing_reply_names_agent_and_turn(script, agent, message):
    with pytest.raises(ReplayMismatch, match=message):
        asyncio.run(collect(ScriptedEngine(script), request(agent, ordinal=2)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Reply("ab", deltas=["a"]), "its deltas make 'a'"),
        (lambda: Reply("a", delay_s=-1), "delay_s=-1 is negative"),
        (lambda: Reply("a", delay_s="1"), "delay_s='1' is not a number of seconds"),
        (lambda: Reply(5), "text=5 is not a text"),
        (lambda: Reply(deltas=5), "deltas=5 is not a list of texts"),
        (lambda: Reply(verdict="loop"), "verdict='loop' is not a cm.Verdict"),
        (lambda: Reply(tool_calls="x"), "tool_calls='x' is not a list of calls"),
        (lambda: Reply(error="busy"), "error='busy' is not an error that can be raised"),
        (lambda: ScriptedEngine(None), "cm.ScriptedEngine: None is not a dict of agents and their replies"),
        (lambda: ScriptedEngine({"a": 5}), "script of 'a': 5 is not a list of replies"),
        (lambda: Reply(txt="a"), "cm.Reply: there is no option 'txt'. Did you mean 'text'?"),
        (
            lambda: ScriptedEngine({"planner": ["a", 2]}),
            "script of 'planner', reply 2: 2 is neither text nor a cm.Reply",
        ),
    ],
)
def test_nonsense_is_refused_when_it_is_written(make, message):
    with pytest.raises(WorkflowError, match=message):
        make()
