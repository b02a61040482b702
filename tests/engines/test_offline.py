"""The engine that calls nobody."""

import asyncio
import time

import pytest

from cm_notebook.engines import offline
from cm_notebook.engines.base import Delta, SessionStarted, TurnDone, UsageReported, find_engine
from cm_notebook.engines.offline import BESIDE, NOT_CALLED, REPEATED, OfflineEngine
from cm_notebook.errors import EngineExited, ReplayMismatch
from cm_notebook.events import Usage
from cm_notebook.prompts import digest
from cm_notebook.tape import Tape
from cm_notebook.testing import answers, collect, fails, lets_go, request
from cm_notebook.workflow import Verdict

TAPE = """{"tape": 1, "run": "careful-builder"}
{"path": "planner", "attempt": 1, "prompt": "Plan a todo CLI.", "text": "1. Write it."}
{"path": "planner", "attempt": 2, "prompt": {"sha256": "DIGEST", "start": "Plan a"}, "events": [[200, 3], [30000, 4]],\
 "text": "1. Write it. 2. Test it.", "usage": {"input_tokens": 41}, "cost_usd": 0.25, "duration_s": 30.5,\
 "session_id": "s1", "output": {"n": 2}, "verdict": {"action": "loop", "reason": "r"}}
""".replace("DIGEST", digest("Plan a todo CLI."))


def tape(text=TAPE):
    return Tape.parse(text.encode(), "tapes/01.jsonl")


def test_it_is_found_by_name():
    assert isinstance(find_engine("offline"), OfflineEngine)


# -- without a tape ----------------------------------------------------------------------------------------------------


def test_without_a_tape_it_shows_the_prompt():
    done = answers(OfflineEngine(), request(prompt="Plan it.\n\nBriefly."))
    assert done.text == "**Offline: no model was called.** planner would have been sent:\n\n> Plan it.\n>\n> Briefly."
    assert done.note == NOT_CALLED == "offline: no model was called"


@pytest.mark.parametrize(
    "example", ['{"action": "continue", "reason": "tests pass"}', '{"action": "loop"} or {}', "none"]
)
def test_an_example_in_the_prompt_is_never_taken_for_a_verdict(example):
    done = answers(OfflineEngine(), request(prompt=f"Judge it. End with {example}"))
    assert done.verdict is None
    assert Verdict.from_text(done.text) is None


# -- playing -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strict", [True, False])
def test_it_plays_what_was_recorded(strict):
    engine = OfflineEngine(tape(), strict=strict, delay=0)
    assert answers(engine, request()) == TurnDone("1. Write it.")
    assert asyncio.run(collect(engine, request(attempt=2))) == [
        SessionStarted("s1"),
        Delta("1. Write it. 2. Test it."),
        UsageReported(Usage(input_tokens=41), 0.25),
        TurnDone(
            "1. Write it. 2. Test it.", output={"n": 2}, verdict=Verdict(action="loop", reason="r"), duration_s=30.5
        ),
    ]


def test_it_reads_the_file(tmp_path):
    path = tmp_path / "01.jsonl"
    path.write_text(TAPE)
    assert answers(OfflineEngine(path, delay=0), request()).text == "1. Write it."


@pytest.mark.parametrize("attempt", [1, 2])
def test_timing_is_compressed_and_the_text_the_same(attempt):
    begun = time.monotonic()
    events = asyncio.run(collect(OfflineEngine(tape(), delay=0.05), request(attempt=attempt)))
    assert time.monotonic() - begun < 5  # recorded: 30 s
    assert len([event for event in events if isinstance(event, Delta)]) == 3
    assert answers(OfflineEngine(tape(), delay=0.01), request(attempt=attempt)).note is None


def test_a_long_text_takes_no_longer_than_it_may(monkeypatch):
    slept = []

    async def sleep(seconds):
        slept.append(seconds)

    monkeypatch.setattr(offline.asyncio, "sleep", sleep)
    text = "word " * 5000
    engine = OfflineEngine(tape('{"tape": 1}\n{"path": "planner", "attempt": 1, "text": "T"}'.replace("T", text)))
    assert answers(engine, request()).text == text
    assert max(slept) <= 1.0


def test_what_was_said_before_a_call_is_written_before_it_and_the_answer_after():
    order = []

    async def run_agents(asked, limit):
        order.append(asked)
        return []

    async def turn():
        line = """{"path": "lead", "attempt": 1, "text": "They are done.", "tool_calls":
            [{"name": "run_agents", "arguments": {"script": "a 'x'"}, "said": "I call a."}]}""".replace("\n", "")
        asked = request("lead", run_agents=run_agents, sub_agents=("a",))
        async for event in OfflineEngine(tape('{"tape": 1}\n' + line), delay=0).stream(asked):
            order.append(event)

    asyncio.run(turn())
    assert order == [Delta("I call a.\n\n"), "a 'x'", Delta("They are done."), TurnDone("They are done.")]


def test_a_recorded_failure():
    line = (
        """{"path": "planner", "attempt": 1, "text": "1. W", "error": {"kind": "EngineExited", "message": "no disk"}}"""
    )
    engine = OfflineEngine(tape(f'{{"tape": 1}}\n{line}'), delay=0)
    assert str(fails(engine, request(), EngineExited)) == "no disk"


def test_it_lets_go():
    lets_go(OfflineEngine(tape(), delay=3600), lambda: request(attempt=2))


# -- a person decides --------------------------------------------------------------------------------------------------


def test_other_words_are_answered_and_said_to_be_unread():
    done = answers(OfflineEngine(tape(), delay=0), request(prompt="Plan a shop."))
    assert done == TurnDone("1. Write it.", note=BESIDE)
    assert BESIDE == "recorded answer: your words reached no model"


@pytest.mark.parametrize(("attempt", "turn"), [(3, 1), (9, 1), (2, 2)])
def test_past_the_end_the_last_answer_is_repeated(attempt, turn):
    done = answers(OfflineEngine(tape(), delay=0), request(attempt=attempt, turn=turn))
    assert done.text == "1. Write it. 2. Test it."
    assert done.note == REPEATED


def test_a_step_that_is_not_on_the_tape_shows_its_prompt():
    done = answers(OfflineEngine(tape(), delay=0), request("reviewer"))
    assert done.note == NOT_CALLED
    assert "> Plan a todo CLI." in done.text


# -- nobody there ------------------------------------------------------------------------------------------------------


def mismatch(**options):
    with pytest.raises(ReplayMismatch) as caught:
        asyncio.run(collect(OfflineEngine(tape(), strict=True, delay=0), request(**options)))
    return str(caught.value)


AGAIN = "`start(record='tapes/01.jsonl')` in place of `tape=` records again; this calls a model."


def test_strict_shows_what_changed():
    assert mismatch(prompt="Plan a shop.") == (
        'The tape has no answer for "planner" with this prompt; it changed here: '
        f"recorded 'Plan a todo CLI.', now 'Plan a shop.'. {AGAIN}"
    )


def test_strict_refuses_a_turn_that_was_not_recorded():
    assert mismatch(attempt=3) == f'The tape has no answer for "planner", attempt 3; it has attempt 1, 2. {AGAIN}'
    assert mismatch(attempt=2, turn=2).startswith('The tape has no answer for "planner", attempt 2, turn 2;')
    assert "it has none for that step" in mismatch(agent="reviewer")
