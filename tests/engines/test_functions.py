"""Python functions as agents."""

import asyncio
import contextvars
import functools
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from pydantic import BaseModel

import cm_notebook
from cm_notebook.engines.base import TurnDone
from cm_notebook.engines.functions import FunctionEngine, Turn, _TurnOver
from cm_notebook.errors import EngineError, EngineProtocolError, EngineRateLimited, ReplayMismatch
from cm_notebook.testing import PROMPT_S, answers, collect, fails, lets_go, request
from cm_notebook.workflow import Agent, Verdict, agent

engine = FunctionEngine()


def asked(function, **options):
    return request(Agent(id="coder", function=function, implementation="f"), **options)


def both(function):
    """`function` as it is, sync, and as an async function."""

    @functools.wraps(function)
    async def made(turn):
        return function(turn)

    return [function, made]


def in_both_kinds(function):
    return pytest.mark.parametrize("function", both(function), ids=["sync", "async"])


class Plan(BaseModel):
    title: str
    steps: list[str]


# -- what it returns ---------------------------------------------------------------------------------------------------


@in_both_kinds(lambda turn: "done")
def test_text(function):
    assert answers(engine, asked(function)) == TurnDone("done")


@in_both_kinds(lambda turn: Verdict(action="loop", reason="2 failed", score=0.5))
def test_the_text_of_a_verdict_is_its_reason(function):
    done = answers(engine, asked(function))
    assert done.text == "2 failed"
    assert done.verdict == Verdict(action="loop", reason="2 failed", score=0.5)


@in_both_kinds(lambda turn: Plan(title="Größe", steps=["a"]))
def test_a_model_is_json_and_value(function):
    done = answers(engine, asked(function))
    assert done.text == '{\n  "title": "Größe",\n  "steps": [\n    "a"\n  ]\n}'
    assert done.output == {"title": "Größe", "steps": ["a"]}


def generator(turn):
    yield "text"


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda turn: None, "agent 'coder' returned None. A function agent returns str"),
        (lambda turn: 42, "agent 'coder' returned int."),
        (lambda turn: {"a": 1}, "returned dict.*json.dumps"),
        (generator, "returned a generator.*turn.emit"),
    ],
    ids=["None", "int", "dict", "generator"],
)
def test_anything_else_is_refused(function, message):
    for made in both(function):
        error = fails(engine, asked(made, attempt=2), EngineProtocolError)
        assert re.search(message, str(error))
        assert (error.engine, error.step, error.attempt) == ("function", "coder", 2)


def test_a_model_that_is_no_json():
    class Odd(BaseModel):
        model_config = {"arbitrary_types_allowed": True}
        thing: threading.Event

    error = fails(engine, asked(lambda turn: Odd(thing=threading.Event())), EngineProtocolError)
    assert "returned a Odd that cannot be written as JSON" in str(error)


def test_a_decorated_async_function_and_an_async_object():
    async def inner(turn):
        await asyncio.sleep(0)
        return "inner"

    class Callable:
        async def __call__(self, turn):
            return await inner(turn)

    assert answers(engine, asked(lambda turn: inner(turn))).text == "inner"
    assert answers(engine, asked(Callable())).text == "inner"
    assert answers(engine, asked(functools.partial(inner))).text == "inner"


# -- what it is told ---------------------------------------------------------------------------------------------------


def test_the_turn():
    seen = []

    @agent("coder")
    def coder(turn):
        seen.append(turn)
        return turn.prompt

    told = {
        "prompt": "Do it",
        "feedback": "no",
        "attempt": 3,
        "iteration": 2,
        "inputs": {"goal": "x"},
        "outputs": {"planner": "plan"},
    }
    answers(engine, request(coder, path="team/coder#1", workspace=Path("/tmp/w"), **told))
    assert seen == [Turn(step="coder", path="team/coder#1", workspace=Path("/tmp/w"), **told)]


def test_a_function_can_be_tested_without_a_run():
    @agent("gate")
    def gate(turn: Turn) -> Verdict:
        turn.emit("looking")
        return Verdict(action="continue", reason=turn.step)

    assert gate(Turn(step="gate")).reason == "gate"
    with pytest.raises(EngineError, match="nobody to answer"):
        Turn(step="gate").ask_human("Which?")


def test_a_function_that_is_known_by_name_only():
    assert "the journal keeps only its name" in str(fails(engine, asked(None)))


@in_both_kinds(lambda turn: who.get())
def test_context_variables_are_those_of_the_caller(function):
    token = who.set("caller")
    try:
        assert answers(engine, asked(function)).text == "caller"
    finally:
        who.reset(token)


who = contextvars.ContextVar("who", default="nobody")


def test_sync_functions_have_a_daemon_thread_and_async_ones_the_loop():
    def here(turn):
        thread = threading.current_thread()
        return f"{thread is threading.main_thread()} {thread.daemon}"

    sync, on_loop = both(here)
    assert answers(engine, asked(sync)).text == "False True"
    assert answers(engine, asked(on_loop)).text == "True False"


# -- emit --------------------------------------------------------------------------------------------------------------


def emitted(function):
    """What `function` emits in one turn, and then what it returns."""
    said = []

    async def main():
        async for event in engine.stream(asked(function, emit=said.append)):
            said.append(event)

    asyncio.run(main())
    return said


def test_emit_is_shown_at_once():
    shown = threading.Event()

    def coder(turn):
        turn.emit("first")
        turn.emit("")
        assert shown.wait(PROMPT_S)
        return "done"

    def show(text):
        assert text == "first"
        shown.set()

    assert asyncio.run(collect(engine, asked(coder, emit=show))) == [TurnDone("done")]


def test_an_async_function_emits_too():
    async def coder(turn):
        turn.emit("a")
        await asyncio.sleep(0)
        turn.emit("b")
        return "done"

    assert emitted(coder) == ["a", "b", TurnDone("done")]


def test_nothing_is_lost_between_threads():
    def coder(turn):
        def work(letter):
            for _ in range(2000):
                turn.emit(letter)

        threads = [threading.Thread(target=work, args=(letter,)) for letter in "xyz"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return "done"

    text = "".join(emitted(coder)[:-1])
    assert {letter: text.count(letter) for letter in "xyz"} == dict.fromkeys("xyz", 2000)


def test_emit_takes_text():
    assert "raised TypeError: turn.emit takes text, not int" in str(fails(engine, asked(lambda turn: turn.emit(1))))


def test_stdout_is_not_touched(capsys):
    answers(engine, asked(lambda turn: print("hello") or "done"))
    assert capsys.readouterr().out == "hello\n"


# -- errors ------------------------------------------------------------------------------------------------------------


def broken(turn):
    raise ValueError("no such\nfile")


@in_both_kinds(broken)
def test_an_exception_is_one_line_and_its_traceback(function):
    error = fails(engine, asked(function))
    assert str(error) == "agent 'coder' raised ValueError: no such file"
    assert 'raise ValueError("no such\\nfile")' in error.detail
    assert "functions.py" not in error.detail.replace(__file__, "")
    assert isinstance(error.__cause__, ValueError)
    assert not error.retryable


class Unprintable(Exception):
    def __str__(self):
        raise RuntimeError("no")


@pytest.mark.parametrize(
    ("raised", "message"),
    [
        (SystemExit(3), "agent 'coder' raised SystemExit: 3"),
        (StopIteration(), "agent 'coder' raised"),
        (KeyError("a"), "agent 'coder' raised KeyError: 'a'"),
        (Unprintable(), "agent 'coder' raised Unprintable"),
        (asyncio.CancelledError(), "agent 'coder' "),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_whatever_is_raised_is_an_engine_error(raised, message):
    def function(turn):
        raise raised

    sync, on_loop = both(function)
    assert str(fails(engine, asked(sync))).startswith(message)
    if not isinstance(raised, asyncio.CancelledError):  # on the loop it cancels the turn, which the run sees
        assert str(fails(engine, asked(on_loop))).startswith(message)


def test_errors_that_say_what_to_do_pass_as_they_are():
    def busy(turn):
        raise EngineRateLimited("busy", retry_after_s=2)

    error = fails(engine, asked(busy), EngineRateLimited)
    assert (str(error), error.retry_after_s, error.step) == ("busy", 2, "coder")

    def mismatch(turn):
        raise ReplayMismatch("other prompt")

    with pytest.raises(ReplayMismatch):
        asyncio.run(collect(engine, asked(mismatch)))


# -- ask_human ---------------------------------------------------------------------------------------------------------


async def echo(question):
    await asyncio.sleep(0)
    return question.upper()


def test_ask_human_waits_in_a_thread_and_is_awaited_on_the_loop():
    def sync(turn):
        return turn.ask_human("which?")

    async def on_loop(turn):
        return await turn.ask_human("which?")

    async def from_a_thread(turn):
        return await asyncio.to_thread(turn.ask_human, "which?")

    for function in (sync, on_loop, from_a_thread):
        assert answers(engine, asked(function, ask_human=echo)).text == "WHICH?"


def test_an_error_while_asking_is_the_functions_to_handle():
    async def refuse(question):
        raise LookupError("nobody there")

    def sync(turn):
        try:
            return turn.ask_human("which?")
        except LookupError as error:
            return f"default, {error}"

    assert answers(engine, asked(sync, ask_human=refuse)).text == "default, nobody there"
    assert "nobody to answer here" in str(fails(engine, asked(sync)))


# -- cancellation ------------------------------------------------------------------------------------------------------


def test_an_async_function_is_cancelled():
    cleaned = []

    async def forever(turn):
        try:
            turn.emit("working")
            await asyncio.Event().wait()
        finally:
            cleaned.append(True)

    lets_go(engine, lambda: asked(forever))
    assert cleaned == [True, True]


def test_a_sync_function_is_let_go_and_ends_at_its_next_emit():
    started, go_on, ended = threading.Event(), threading.Event(), threading.Event()

    def forever(turn):
        started.set()
        try:
            go_on.wait(PROMPT_S)
            for _ in range(10**9):
                try:
                    turn.emit("x")
                except Exception:
                    continue  # a careless function cannot keep itself alive
        except _TurnOver:
            ended.set()
            raise

    async def at_work():
        await asyncio.to_thread(started.wait, PROMPT_S)

    async def main():
        turn = asyncio.create_task(collect(engine, asked(forever)))
        await at_work()
        turn.cancel()
        await asyncio.wait({turn}, timeout=PROMPT_S)
        assert turn.cancelled()
        go_on.set()
        assert await asyncio.to_thread(ended.wait, PROMPT_S)

    asyncio.run(main())


def test_a_thread_that_waits_for_an_answer_ends_with_its_turn():
    ended, asking = threading.Event(), threading.Event()

    async def never(question):
        asking.set()
        await asyncio.Event().wait()

    def asks(turn):
        try:
            return turn.ask_human("which?")
        except _TurnOver:
            ended.set()
            raise

    async def at_work():
        await asyncio.to_thread(asking.wait, PROMPT_S)

    def fresh():
        asking.clear()
        return asked(asks, ask_human=never)

    lets_go(engine, fresh, at_work)
    assert ended.wait(PROMPT_S)


def test_after_the_turn_nothing_is_said():
    kept = []

    async def leaves_its_turn(turn):
        kept.append(turn)
        return "done"

    answers(engine, asked(leaves_its_turn, ask_human=echo))
    with pytest.raises(_TurnOver):
        kept[0].emit("late")
    with pytest.raises(_TurnOver):
        kept[0].ask_human("late?")


def test_a_function_that_never_ends_delays_neither_loop_nor_interpreter():
    program = """
import asyncio, threading
from cm_notebook.engines.base import AgentRequest
from cm_notebook.engines.functions import FunctionEngine
from cm_notebook.workflow import Agent

started = threading.Event()

def forever(turn):
    started.set()
    threading.Event().wait()

async def main():
    request = AgentRequest(agent=Agent(id="a", function=forever), prompt="", step="a", path="a")
    stream = FunctionEngine().stream(request)
    first = asyncio.ensure_future(anext(stream))
    await asyncio.to_thread(started.wait)
    first.cancel()

asyncio.run(main())
print("over")
"""
    begun = time.monotonic()
    root = Path(cm_notebook.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("over\n", "")
    assert time.monotonic() - begun < 30
