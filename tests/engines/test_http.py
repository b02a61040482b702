"""Models behind an HTTP API: both dialects, against a server on the loopback."""

from __future__ import annotations

import asyncio
import datetime
import email.utils
import gc
import json
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import BaseModel, Field

import cm_notebook as cm
from cm_notebook.allowed import Rule, allows, keep
from cm_notebook.engines import chat, http
from cm_notebook.engines.anthropic import Anthropic
from cm_notebook.engines.base import (
    Delta,
    SessionStarted,
    ToolCalled,
    ToolReturned,
    TurnDone,
    UsageReported,
    find_engine,
)
from cm_notebook.engines.chat import ChatEngine, closed_schema
from cm_notebook.engines.openai import OpenAI
from cm_notebook.testing import answers, collect, fails, lets_go, request
from tests.helpers import gate, until

from .model_server import Asked, ModelServer, Said, anthropic_says, error, openai_says, sse

KEY = "sk-planted-0123456789abcdef"
FILES = Path("/proc/self/fd")

Dialect = Literal["openai", "anthropic"]
DIALECTS: tuple[Dialect, ...] = ("openai", "anthropic")
SAYS: dict[str, Any] = {"openai": openai_says, "anthropic": anthropic_says}
MADE: dict[str, type[ChatEngine]] = {"openai": OpenAI, "anthropic": Anthropic}

both = pytest.mark.parametrize("dialect", DIALECTS)


@pytest.fixture(autouse=True)
def _keys(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI", "ANTHROPIC"):
        monkeypatch.setenv(f"{name}_API_KEY", KEY)
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


def engine(dialect: str, server: ModelServer, **options: Any) -> ChatEngine:
    base = server.url + ("/v1" if dialect == "openai" else "")
    return MADE[dialect](base_url=base, **options)


def asked(agent: cm.Agent | str = "planner", prompt: str = "Say hello.", **options: Any) -> cm.AgentRequest:
    return request(agent, prompt, **{"model": "test-model", **options})


def messages(server: ModelServer, number: int = -1) -> list[Any]:
    return server.asked[number].body["messages"]


def everything(*things: Any) -> str:
    """All text that `things` show or hold, followed into their attributes and causes."""
    seen: set[int] = set()
    found: list[str] = []

    def look(thing: Any, depth: int) -> None:
        if id(thing) in seen or depth > 12:
            return
        seen.add(id(thing))
        if isinstance(thing, (str, bytes)):
            found.append(thing if isinstance(thing, str) else thing.decode("latin-1"))
            return
        if isinstance(thing, (type, int, float, bool, type(None))) or callable(thing):
            return
        found.append(repr(thing))
        if isinstance(thing, dict):
            for key, value in thing.items():
                look(key, depth + 1)
                look(value, depth + 1)
        elif isinstance(thing, (list, tuple, set)):
            for value in thing:
                look(value, depth + 1)
        if isinstance(thing, BaseException):
            look([thing.args, thing.__cause__, thing.__context__], depth + 1)
        look(getattr(thing, "__dict__", None), depth + 1)

    for thing in things:
        look(thing, 0)
    return "\n".join(found)


# -- answers -----------------------------------------------------------------------------------------------------------


@both
def test_an_answer_is_streamed(dialect):
    with ModelServer(SAYS[dialect](["Hel", "lo, ", "wörld 🙂 \u2028\u0085 end"], thinking="hm")) as server:
        events = asyncio.run(collect(engine(dialect, server), asked(system="Be short.")))
    assert [event.text for event in events if isinstance(event, Delta)] == [
        "hm",
        "Hel",
        "lo, ",
        "wörld 🙂 \u2028\u0085 end",
    ]
    assert events[0] == Delta("hm", "thinking")
    assert events[-3:] == [
        SessionStarted(),
        UsageReported(cm.Usage(input_tokens=100, output_tokens=20)),
        TurnDone("Hello, wörld 🙂 \u2028\u0085 end"),
    ]
    sent = server.asked[0]
    assert sent.body["stream"] is True
    assert sent.body["model"] == "test-model"
    assert sent.body["messages"][-1] == {"role": "user", "content": "Say hello."}
    if dialect == "openai":
        assert sent.path == "/v1/chat/completions"
        assert sent.headers["authorization"] == f"Bearer {KEY}"
        assert sent.body["messages"][0] == {"role": "system", "content": "Be short."}
    else:
        assert sent.path == "/v1/messages"
        assert sent.headers["x-api-key"] == KEY
        assert sent.headers["anthropic-version"] == "2026-10-21"
        assert sent.body["system"] == "Be short."


@both
def test_conformance(dialect):
    with ModelServer(SAYS[dialect](["Hello", "."])) as server:
        assert answers(engine(dialect, server), asked()).text == "Hello."
    with ModelServer(error(401, {"error": {"message": "no", "type": "authentication_error"}})) as server:
        fails(engine(dialect, server), asked(), cm.EngineAuthError)
    with ModelServer(SAYS[dialect]("Hello.").first(1, "hang")) as server:
        lets_go(engine(dialect, server), asked, lambda: asyncio.to_thread(server.waiting.acquire))


@both
def test_zipped(dialect):
    with ModelServer(SAYS[dialect]("Hello.").zipped()) as server:
        assert answers(engine(dialect, server), asked()).text == "Hello."


@both
def test_what_was_said_in_the_turns_before_is_sent_again(dialect):
    with ModelServer(SAYS[dialect]("Third.")) as server:
        answers(engine(dialect, server), asked(history=[("One?", "First."), ("Two?", "Second.")]))
    assert messages(server) == [
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "First."},
        {"role": "user", "content": "Two?"},
        {"role": "assistant", "content": "Second."},
        {"role": "user", "content": "Say hello."},
    ]


@pytest.mark.parametrize(
    ("dialect", "effort", "expected"),
    [
        ("openai", "low", {"reasoning_effort": "low"}),
        ("anthropic", "high", {"thinking": {"type": "adaptive", "display": "summarized"}}),
        ("anthropic", "high", {"output_config": {"effort": "high"}}),
        ("anthropic", "none", {"thinking": {"type": "disabled"}}),
        ("anthropic", "2048", {"thinking": {"type": "enabled", "budget_tokens": 2048}}),
        ("anthropic", "2048", {"max_tokens": 34_048}),
    ],
)
def test_reasoning_effort(dialect, effort, expected):
    with ModelServer(SAYS[dialect]("Hello.")) as server:
        answers(engine(dialect, server), asked(reasoning_effort=effort))
    assert expected.items() <= server.asked[0].body.items()


@both
@pytest.mark.parametrize("stop", ["length", "max_tokens"])
def test_an_answer_that_is_cut_off_says_so(dialect, stop):
    if (stop == "length") is not (dialect == "openai"):
        return
    with ModelServer(SAYS[dialect]("Hello, wor", stop=stop)) as server:
        assert answers(engine(dialect, server), asked()).note == chat.CUT_OFF
    with ModelServer(SAYS[dialect](thinking="hm", stop=stop)) as server:
        assert "used up its limit" in str(fails(engine(dialect, server), asked(), cm.EngineProtocolError))


# -- failures ----------------------------------------------------------------------------------------------------------


def complaint(kind: str, message: str = "the reason", code: Any = None) -> dict[str, Any]:
    return {"type": "error", "error": {"type": kind, "message": message, "code": code}}


FAILURES: list[tuple[str, Said, type[cm.EngineError], bool, str]] = [
    ("rate limit", error(429, complaint("rate_limit_error")), cm.EngineRateLimited, True, "the reason"),
    ("overloaded", error(529, complaint("overloaded_error")), cm.EngineUnavailable, True, "the reason"),
    ("unavailable", error(503, "busy"), cm.EngineUnavailable, True, "HTTP status 503, busy"),
    ("a gateway's page", error(502, "<html>Bad gateway"), cm.EngineUnavailable, True, "HTTP status 502, a web page"),
    ("no credit", error(429, complaint("x", code="insufficient_quota")), cm.EngineError, False, "no credit left"),
    ("wrong key", error(401, complaint("authentication_error")), cm.EngineAuthError, False, "reason. It comes from"),
    ("forbidden", error(403, complaint("permission_error")), cm.EngineAuthError, False, "does not permit"),
    ("unknown model", error(404, complaint("not_found_error")), cm.EngineNotFound, False, "does not know this model"),
    ("bad request", error(400, complaint("invalid_request_error")), cm.EngineError, False, "refused the request"),
    ("too long", error(400, complaint("x", "prompt is too long: 3 > 2")), cm.EngineError, False, "2. Shorten it"),
    ("context", error(400, complaint("x", code="context_length_exceeded")), cm.EngineError, False, "Shorten it"),
    ("elsewhere", error(307, "", location="http://localhost:1/"), cm.EngineError, False, "sends us elsewhere"),
    ("a page", error(200, "<!doctype html><p>Hi"), cm.EngineProtocolError, False, "a web page. Is it the base URL"),
    ("nothing", error(200, ""), cm.EngineProtocolError, False, "answered with nothing"),
    ("no stream", error(200, {"choices": []}), cm.EngineProtocolError, False, "application/json instead of a stream"),
    ("an error, and 200", error(200, complaint("overloaded_error")), cm.EngineUnavailable, True, "the reason"),
    ("an empty stream", Said(), cm.EngineUnavailable, True, "broke off"),
    ("not JSON", Said([sse('{"choices": [')]), cm.EngineProtocolError, False, "not JSON"),
    ("another shape", Said([sse([1])]), cm.EngineProtocolError, False, "a shape that is not known"),
    ("deep", Said([sse("[" * 100_000)]), cm.EngineProtocolError, False, "not JSON"),
    ("in mid-stream", Said([sse(complaint("overloaded_error"))]), cm.EngineUnavailable, True, "the reason"),
    ("as a number", Said([sse({"error": {"code": 429, "message": "slow"}})]), cm.EngineRateLimited, True, "slow"),
    ("not zipped", Said([b"xx"], headers={"content-encoding": "gzip"}), cm.EngineProtocolError, False, "unpacked"),
]


@both
@pytest.mark.parametrize(("said", "kind", "again", "words"), [pytest.param(*rest, id=name) for name, *rest in FAILURES])
def test_failures(dialect, said, kind, again, words):
    with ModelServer(said) as server:
        failed = fails(engine(dialect, server), asked(), kind)
    assert type(failed) is kind
    assert failed.retryable is again
    assert words in str(failed)
    assert failed.engine == dialect


@both
@pytest.mark.parametrize("end", ["cut", "reset"])
@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_dropped_connection(dialect, end, count):
    with ModelServer(SAYS[dialect](["Hello", " you"]).first(count, end)) as server:
        assert fails(engine(dialect, server), asked(), cm.EngineUnavailable).retryable


@both
def test_a_stream_that_ends_too_early(dialect):
    with ModelServer(SAYS[dialect](["Hello", " you"]).first(3, "well")) as server:
        assert "broke off" in str(fails(engine(dialect, server), asked(), cm.EngineUnavailable))


def test_no_end_marker_but_a_reason_to_finish():
    said = openai_says("Hello.")
    with ModelServer(said.first(len(said.pieces) - 1, "well")) as server:
        assert answers(engine("openai", server), asked()).text == "Hello."


@both
def test_nobody_listens(dialect):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
        failed = fails(MADE[dialect](base_url=url), asked(), cm.EngineUnavailable)
    assert "cannot be reached" in str(failed)
    assert failed.retryable


@both
def test_silence(dialect):
    with ModelServer(SAYS[dialect]("Hello.").first(1, "hang")) as server:
        failed = fails(engine(dialect, server, silence_s=0.05), asked(), cm.EngineTimeout)
    assert "was silent for 0.05 s" in str(failed)


@both
def test_a_refusal(dialect):
    with ModelServer(SAYS[dialect](refusal="I will not.")) as server:
        assert "refuses: I will not." in str(fails(engine(dialect, server), asked()))


@both
@pytest.mark.parametrize("text", ["", " \n"])
def test_an_empty_answer(dialect, text):
    with ModelServer(SAYS[dialect](text)) as server:
        assert "said nothing" in str(fails(engine(dialect, server), asked(), cm.EngineProtocolError))


@both
def test_what_is_read_is_bounded(dialect, monkeypatch):
    monkeypatch.setattr(http, "LONGEST_EVENT", 200_000)
    with ModelServer(Said([b"data: ", *[b"x" * 50_000] * 8])) as server:
        assert "an event of more" in str(fails(engine(dialect, server), asked(), cm.EngineProtocolError))
    monkeypatch.setattr(http, "LONGEST_STREAM", 300_000)
    with ModelServer(Said([sse({"type": "ping"}) * 1000] * 20)) as server:
        assert "sent more than" in str(fails(engine(dialect, server), asked(), cm.EngineProtocolError))


def _date(seconds: float) -> str:
    return email.utils.format_datetime(datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=seconds), True)


@pytest.mark.parametrize(
    ("said", "low", "high"),
    [
        ("7", 7, 7),
        ("0.5", 0.5, 0.5),
        ("-3", 0, 0),
        ("nan", 0, 0),
        ("1e99", 3600, 3600),
        (1800, 1200, 1800),
        (-60, 0, 0),
    ],
)
def test_how_long_to_wait(said, low, high):
    if isinstance(said, int):  # seconds from now, as a date
        said = _date(said)
    with ModelServer(error(429, complaint("rate_limit_error"), retry_after=said)) as server:
        failed = fails(engine("openai", server), asked(), cm.EngineRateLimited)
    assert failed.retry_after_s is not None
    assert low <= failed.retry_after_s <= high


def test_how_long_to_wait_is_not_said():
    with ModelServer(error(429, complaint("rate_limit_error"), retry_after="soon")) as server:
        assert fails(engine("openai", server), asked()).retry_after_s is None


# -- settings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("url", ["", "localhost:11434", "ftp://example.com", "http://", "http://x:y", "nonsense"])
def test_a_base_url_that_is_none(url):
    assert "is not an address" in str(fails(OpenAI(base_url=url), asked()))


def test_a_password_in_a_base_url_is_not_told():
    failed = fails(OpenAI(base_url="ftp://me:hunter2@example.com"), asked())
    assert "hunter2" not in everything(failed)
    with ModelServer(error(400, "no")) as server:
        url = server.url.replace("//", "//me:hunter2@")
        assert "hunter2" not in everything(fails(OpenAI(base_url=url), asked()))


@both
def test_no_key(dialect, monkeypatch):
    monkeypatch.setenv(f"{dialect.upper()}_API_KEY", " ")
    assert f"No key for {dialect}. Set {dialect.upper()}_API_KEY before" in str(fails(find_engine(dialect), asked()))
    with ModelServer(SAYS[dialect]("Hello.")) as server:  # a service of one's own may need none
        monkeypatch.setenv(f"CM_{dialect.upper()}_BASE_URL", server.url)
        assert answers(find_engine(dialect), asked()).text == "Hello."
    assert not {"authorization", "x-api-key"} & server.asked[0].headers.keys()


@both
@pytest.mark.parametrize("key", ["sk-a\nb", "sk-ä"])
def test_a_key_that_is_none(dialect, key, monkeypatch):
    monkeypatch.setenv(f"{dialect.upper()}_API_KEY", key)
    failed = fails(MADE[dialect](base_url="http://localhost:1"), asked(), cm.EngineAuthError)
    assert key not in everything(failed)


def test_no_model():
    failed = fails(OpenAI(base_url="http://localhost:1"), asked(model=None))
    assert "agent 'planner' names no model" in str(failed)


@pytest.mark.parametrize("name", ["openai", "ollama", "vllm", "lmstudio", "openrouter"])
def test_services_are_settings(name, monkeypatch):
    monkeypatch.setenv(f"{name.upper()}_API_KEY", "key-of-" + name)
    with ModelServer(openai_says("Hello.")) as server:
        monkeypatch.setenv(f"CM_{name.upper()}_BASE_URL", server.url + "/v1/")
        made = find_engine(f"{name}:some-model:7b")
        assert made.name == name
        assert answers(made, asked(model=None)).text == "Hello."
        assert answers(made, asked(model="other")).text == "Hello."
    assert [sent.body["model"] for sent in server.asked] == ["some-model:7b", "other"]
    assert server.asked[0].headers["authorization"] == f"Bearer key-of-{name}"


def test_the_name_that_others_use_for_the_base_url(monkeypatch):
    monkeypatch.setenv("OPENAI_BASE_URL", "http://others/v1")
    assert OpenAI().about == "http://others/v1; OPENAI_API_KEY is set"
    monkeypatch.setenv("CM_OPENAI_BASE_URL", "http://ours/v1")
    assert OpenAI().about == "http://ours/v1; OPENAI_API_KEY is set"
    assert KEY not in everything(OpenAI(), cm.doctor())


def test_importing_loads_no_client():
    code = "import sys, cm_notebook; print([name for name in ('httpx', 'httpx_sse') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


# -- tools -------------------------------------------------------------------------------------------------------------


@cm.tool
def add(a: int, b: int = 1) -> int:
    """The sum of two numbers."""
    return a + b


@cm.tool(name="look-up", description="Looks it up.")
async def look_up(word: str) -> dict[str, str]:
    await asyncio.sleep(0)
    return {word: "found"}


@cm.tool
def broken() -> str:
    raise RuntimeError("out of order")


@cm.tool
def exits() -> str:
    sys.exit(3)


@cm.tool
async def cancels() -> str:
    raise asyncio.CancelledError("the query was cancelled")


@cm.tool(ask=True)
def remove(path: str) -> str:
    """Removes a file."""
    return f"removed {path}"


TOOLS = [add, look_up, broken, exits, cancels, remove]


def with_tools(dialect: str, *calls: tuple[str, str], **options: Any) -> tuple[list[Any], ModelServer]:
    says = SAYS[dialect]
    listed = [(f"id{number}", name, written) for number, (name, written) in enumerate(calls)]
    with ModelServer([says("Let me look.", thinking="hm", calls=listed), says("Done.")]) as server:
        agent = cm.Agent("planner", "Do it.", tools=TOOLS)
        events = asyncio.run(collect(engine(dialect, server), asked(agent, **options)))
    return events, server


@both
def test_tools_are_described(dialect):
    _, server = with_tools(dialect, ("add", '{"a": 2}'))
    described = server.asked[0].body["tools"][0]
    if dialect == "openai":
        assert described["type"] == "function"
        described = described["function"]
    assert described["name"] == "add"
    assert described["description"] == "The sum of two numbers."
    assert described["parameters" if dialect == "openai" else "input_schema"] == {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": {"type": "integer", "default": 1}},
        "required": ["a"],
        "additionalProperties": False,
    }


@both
def test_tools_are_called_and_the_model_is_told(dialect):
    events, server = with_tools(dialect, ("add", '{"a": 2, "b": 3}'), ("look-up", '{"word": "x"}'))
    tools = [event for event in events if isinstance(event, (ToolCalled, ToolReturned))]
    assert tools == [
        ToolCalled("id0", "add", {"a": 2, "b": 3}),
        ToolReturned("id0", "add", "5"),
        ToolCalled("id1", "look-up", {"word": "x"}),
        ToolReturned("id1", "look-up", '{"x":"found"}'),
    ]
    assert events[-1] == TurnDone("Done.")
    assert events[-2] == UsageReported(cm.Usage(input_tokens=200, output_tokens=40))
    written = "".join(event.text for event in events if isinstance(event, Delta) and event.kind == "text")
    assert written == "Let me look.\n\nDone."
    called, *returned = messages(server)[1:]
    if dialect == "openai":
        assert called["content"] == "Let me look."
        assert [json.loads(call["function"]["arguments"]) for call in called["tool_calls"]] == [
            {"a": 2, "b": 3},
            {"word": "x"},
        ]
        assert returned == [
            {"role": "tool", "tool_call_id": "id0", "content": "5"},
            {"role": "tool", "tool_call_id": "id1", "content": '{"x":"found"}'},
        ]
    else:
        assert called["content"] == [
            {"type": "thinking", "thinking": "hm", "signature": "c2ln"},
            {"type": "text", "text": "Let me look."},
            {"type": "tool_use", "id": "id0", "name": "add", "input": {"a": 2, "b": 3}},
            {"type": "tool_use", "id": "id1", "name": "look-up", "input": {"word": "x"}},
        ]
        assert returned[0]["content"][0] == {
            "type": "tool_result",
            "tool_use_id": "id0",
            "content": "5",
            "is_error": False,
        }


@both
@pytest.mark.parametrize(
    ("name", "written", "told"),
    [
        ("broken", "{}", "RuntimeError: out of order"),
        ("exits", "", "SystemExit: 3"),
        ("cancels", "", "CancelledError: the query was cancelled"),
        ("ad", "{}", "There is no tool 'ad'. Did you mean 'add'? Tools: add, look-up, broken, exits, cancels, remove."),
        ("add", '{"a": "two"}', "The arguments do not fit: a: Input should be a valid integer"),
        ("add", '{"b": 1}', "The arguments do not fit: a: Field required"),
        ("add", '{"a": 1, "c": 2}', "The arguments do not fit: c: Extra inputs are not permitted"),
        ("add", '{"a": 1', "The arguments are not a JSON object: '{\"a\": 1'"),
        ("add", "[1]", "The arguments are not a JSON object: '[1]'"),
        ("add", '{"a": ' + "[" * 150 + "]" * 150 + "}", 'The arguments are not a JSON object: \'{"a": [[['),
        ("add", '{"a": NaN}', 'The arguments are not a JSON object: \'{"a": NaN'),
        ("remove", '{"path": "x"}', "Refused: this needs a person's permission, and nobody can be asked here."),
    ],
)
def test_what_goes_wrong_with_a_tool_is_told_to_the_model(dialect, name, written, told):
    events, server = with_tools(dialect, (name, written))
    returned = next(event for event in events if isinstance(event, ToolReturned))
    assert returned.failed
    assert returned.text.startswith(told)
    assert events[-1] == TurnDone("Done.")
    assert told in json.dumps(messages(server)[-1], ensure_ascii=False).replace('\\"', '"')


@both
@pytest.mark.parametrize(
    ("permission", "told"),
    [
        (cm.Permission(True), "removed a"),
        (cm.Permission(True, {"path": "b"}), "removed b"),
        (cm.Permission(True, {"way": "b"}), "The arguments do not fit"),
        (cm.Permission(False, reason="not this one"), "Refused by a person: not this one"),
        (cm.Permission(False), "Refused by a person."),
    ],
)
def test_permission_is_asked(dialect, permission, told):
    put: list[Any] = []

    async def ask(name: str, arguments: Any) -> cm.Permission:
        put.append((name, arguments))
        return permission

    events, _ = with_tools(dialect, ("add", '{"a": 1}'), ("remove", '{"path": "a"}'), ask_permission=ask)
    assert put == [("remove", {"path": "a"})]
    assert [event.text for event in events if isinstance(event, ToolReturned)][1].startswith(told)


def test_a_sync_tool_has_a_thread_of_its_own():
    where: list[Any] = []

    @cm.tool
    def here() -> str:
        where.append(threading.current_thread())
        return ""

    with ModelServer([openai_says(calls=[("1", "here", "{}")]), openai_says("Done.")]) as server:
        answers(engine("openai", server), asked(cm.Agent("planner", "x", tools=[here])))
    assert where[0] is not threading.main_thread()
    assert where[0].daemon


@both
def test_a_tool_that_never_ends_is_let_go(dialect):
    begun, let_go = threading.Event(), threading.Event()

    @cm.tool
    def waits() -> str:
        begun.set()
        let_go.wait()
        return ""

    async def started() -> None:
        await asyncio.to_thread(begun.wait)
        begun.clear()

    try:
        with ModelServer(SAYS[dialect](calls=[("1", "waits", "{}")])) as server:
            made = engine(dialect, server)
            turn = asked(cm.Agent("planner", "x", tools=[waits]))

            async def cancelled() -> None:
                task = asyncio.create_task(collect(made, turn))
                await started()
                task.cancel()
                await asyncio.wait({task})
                assert task.cancelled()

            asyncio.run(cancelled())
    finally:
        let_go.set()


@both
def test_a_model_that_calls_tools_for_ever(dialect, monkeypatch):
    monkeypatch.setattr(chat, "MOST_ROUNDS", 3)
    with ModelServer(SAYS[dialect](calls=[("1", "add", '{"a": 1}')])) as server:
        failed = fails(engine(dialect, server), asked(cm.Agent("planner", "x", tools=[add])))
    assert "went on calling tools for 3 rounds" in str(failed)
    assert len(server.asked) == 3


def test_calls_as_other_servers_stream_them():
    """Whole, without index or id, with an object for arguments; two calls at one place."""
    whole = {"function": {"name": "add", "arguments": {"a": 1}}}
    others = [
        {"index": 0, "id": "x", "function": {"name": "add", "arguments": '{"a": 2}'}},
        {"index": 0, "id": "y", "function": {"name": "add", "arguments": '{"a": 3}'}},
    ]
    for calls, expected in ([[whole], ["2"]], [others, ["3", "4"]]):
        choice = {"delta": {"tool_calls": calls}, "finish_reason": "tool_calls"}
        with ModelServer([Said([sse({"choices": [choice]})]), openai_says("Done.")]) as server:
            agent = cm.Agent("planner", "x", tools=[add])
            events = asyncio.run(collect(engine("openai", server), asked(agent)))
        assert [event.text for event in events if isinstance(event, ToolReturned)] == expected


# -- answers that must fit ---------------------------------------------------------------------------------------------


class Plan(BaseModel):
    title: str
    steps: list[str] = Field(min_length=1)


GOOD, BAD = '{"title": "T", "steps": ["a"]}', '{"title": "T", "steps": []}'


@both
@pytest.mark.parametrize("text", [GOOD, f"```json\n{GOOD}\n```"])
def test_an_answer_that_fits(dialect, text):
    with ModelServer(SAYS[dialect](text)) as server:
        done = answers(engine(dialect, server), asked(cm.Agent("planner", "x", output=Plan)))
    assert done == TurnDone(text, output={"title": "T", "steps": ["a"]})
    schema = {
        "type": "object",
        "title": "Plan",
        "properties": {
            "title": {"type": "string", "title": "Title"},
            "steps": {"type": "array", "title": "Steps", "items": {"type": "string"}},
        },
        "required": ["title", "steps"],
        "additionalProperties": False,
    }
    body = server.asked[0].body
    if dialect == "openai":
        wanted = {"name": "Plan", "schema": schema, "strict": True}
        assert body["response_format"] == {"type": "json_schema", "json_schema": wanted}
    else:
        assert body["output_config"] == {"format": {"type": "json_schema", "schema": schema}}


@both
def test_an_answer_that_does_not_fit_is_told_so_once(dialect):
    agent = cm.Agent("planner", "x", output=Plan)
    says = SAYS[dialect]
    with ModelServer([says(BAD), says(GOOD)]) as server:
        assert answers(engine(dialect, server), asked(agent)).output == {"title": "T", "steps": ["a"]}
    assert "steps: List should have at least 1 item" in messages(server)[-1]["content"]
    assert messages(server)[-2]["role"] == "assistant"
    with ModelServer([says(BAD), says("no JSON"), says(GOOD)]) as server:
        failed = fails(engine(dialect, server), asked(agent), cm.EngineProtocolError)
    assert "does not fit Plan" in str(failed)
    assert failed.line == "no JSON"
    assert len(server.asked) == 2


@both
def test_a_schema_that_no_service_can_hold_a_model_to(dialect):
    class Table(BaseModel):
        rows: dict[str, int]

    with ModelServer(SAYS[dialect]('{"rows": {"a": 1}}')) as server:
        done = answers(engine(dialect, server), asked(cm.Agent("planner", "x", output=Table)))
    assert done.output == {"rows": {"a": 1}}
    body = server.asked[0].body
    if dialect == "openai":
        assert body["response_format"]["json_schema"]["strict"] is False
    else:
        assert "Answer with JSON that fits this schema" in body["system"]


@both
def test_a_verdict_is_an_output(dialect):
    with ModelServer(SAYS[dialect]('{"action": "loop", "reason": "2 failed", "score": null}')) as server:
        done = answers(engine(dialect, server), asked(cm.Agent("planner", "x", output=cm.Verdict)))
    assert done.output == {"action": "loop", "reason": "2 failed", "score": None}


# -- usage and cost ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dialect", "model", "more", "expected", "tokens"),
    [
        ("openai", "gpt-5-mini", {}, (100 * 0.25 + 20 * 2) / 1e6, 100),
        ("openai", "gpt-5-mini-2025-08-07", {}, (100 * 0.25 + 20 * 2) / 1e6, 100),
        (
            "openai",
            "gpt-5-mini",
            {"prompt_tokens_details": {"cached_tokens": 40}},
            (60 * 0.25 + 40 * 0.025 + 20 * 2) / 1e6,
            100,
        ),
        ("openai", "no-price", {"cost": 0.5}, 0.5, 100),
        ("openai", "no-price", {}, None, 100),
        ("openai", "gpt-5-mini-ultra", {}, None, 100),
        ("anthropic", "claude-opus-5", {}, (100 * 5 + 20 * 25) / 1e6, 100),
        (
            "anthropic",
            "claude-opus-5-20260724",
            {"cache_read_input_tokens": 10, "cache_creation_input_tokens": 4},
            (100 * 5 + 10 * 0.5 + 4 * 6.25 + 20 * 25) / 1e6,
            114,
        ),
    ],
)
def test_cost(dialect, model, more, expected, tokens):
    with ModelServer(SAYS[dialect]("Hello.", more=more)) as server:
        events = asyncio.run(collect(engine(dialect, server), asked(model=model)))
    used = events[-2]
    assert used.usage == cm.Usage(input_tokens=tokens, output_tokens=20)
    assert used.cost_usd == (None if expected is None else pytest.approx(expected))
    assert used.cost_estimated is (expected is not None and "cost" not in more)


def test_tokens_that_nobody_counted_are_estimated():
    with ModelServer(openai_says("x" * 40, used=None)) as server:
        used = asyncio.run(collect(engine("openai", server), asked(model="gpt-5-mini")))[-2]
    assert used.usage.estimated
    assert used.usage.output_tokens == 10
    assert used.usage.input_tokens > 10
    assert used.cost_usd > 0


def test_prices_of_ones_own(tmp_path, monkeypatch):
    file = tmp_path / "prices.toml"
    monkeypatch.setenv("CM_PRICES", str(file))
    with ModelServer(openai_says("Hello.")) as server:
        made = engine("openai", server)

        def cost(model: str) -> float | None:
            return asyncio.run(collect(made, asked(model=model)))[-2].cost_usd

        file.write_text('[models]\n"gpt-5-mini" = { input = 1e6, output = 0 }\n"llama3" = { input = 0, output = 0 }\n')
        assert cost("gpt-5-mini") == 100
        assert cost("llama3") == 0
        assert cost("gpt-5") == pytest.approx((100 * 1.25 + 20 * 10) / 1e6)
        for content, words in [
            ("[models", "cannot be read"),
            ("date = 2026-01-01", r"there is no table \[models\]"),
            ('[models]\n"m" = { input = 1 }', "a price has input, output"),
            ('[models]\n"m" = { input = 1, output = -1 }', "a price that is no amount"),
        ]:
            file.write_text(content + "\n" * len(words))
            with pytest.raises(cm.EngineError, match=words):
                cost("m")
        file.unlink()
        asked_before = len(server.asked)
        with pytest.raises(cm.EngineError, match=r"prices '.*' \(CM_PRICES\) cannot be read: No such file"):
            cost("m")
        assert len(server.asked) == asked_before == 3


# -- in a run ----------------------------------------------------------------------------------------------------------


def start(dialect: str, server: ModelServer, **options: Any) -> cm.Run:
    agent = cm.Agent("planner", "Plan {{ goal }}.", **{"model": "test-model", **options.pop("agent", {})})
    mode = options.pop("mode", "never")
    steps = options.pop("steps", [cm.step("planner")])
    workflow = cm.Workflow("w", agents=[agent], steps=steps, inputs={"goal": "it"}, autonomous_mode=mode)
    return workflow.start(engine=engine(dialect, server), journal=options.pop("journal", ":memory:"), **options)


@both
def test_a_rejected_answer_is_made_again_with_the_feedback(dialect):
    with ModelServer([SAYS[dialect]("First plan."), SAYS[dialect]("Second plan.")]) as server:
        run = start(dialect, server)
        gate(run)
        run.reject("Name the tests.")
        assert gate(run).attempt == 2
        run.approve().wait(20)
        assert run["planner"].text == "Second plan."
    said = [message["content"] for message in messages(server)]
    assert said == ["Plan it.", "First plan.", "Name the tests."]
    assert run["planner"].prompt == "Name the tests.", "what was sent is what the journal shows"


@both
def test_chained_prompts_are_one_conversation_also_in_another_process(dialect, tmp_path):
    journal = cm.Journal(tmp_path / "journal.db")
    says = SAYS[dialect]
    with ModelServer([says("One."), says("Two."), says("Two, better."), says("Three.")]) as server:
        made = engine(dialect, server)
        run = start(dialect, server, steps=[cm.step("planner", prompt=["A", "B", "C"])], journal=journal)
        gate(run)
        run.approve(output="One, edited.")
        gate(run)
        run.stop().wait(20)
        again = cm.resume(run.id, journal=journal, engine=made)  # all it knows is in the journal
        gate(again)
        again.reject("Better.")
        gate(again)
        again.approve()
        gate(again)
        again.approve().wait(20)
        assert again["planner"].text == "Three."
    said = [[message["content"] for message in sent.body["messages"]] for sent in server.asked]
    assert said[0] == ["A"]
    assert said[1] == ["A", "One, edited.", "B"]
    assert said[2] == [*said[1], "Two.", "Better."]
    assert said[3] == [*said[2], "Two, better.", "C"]


@both
def test_a_turn_continues_the_conversation_after_each_reject_also_in_another_process(dialect, tmp_path):
    journal = cm.Journal(tmp_path / "journal.db")
    says = SAYS[dialect]
    replies = [says("One."), error(500, complaint("api_error")), says("Two."), says("Three."), says("Anew.")]
    with ModelServer(replies) as server:
        made = engine(dialect, server)
        step = cm.step("planner", prompt="Plan it.", retries=0)
        run = start(dialect, server, steps=[step, cm.step("end", prompt="End.", interactive=True)], journal=journal)
        gate(run)
        run.reject("Shorter.")
        assert gate(run).kind == "failed"
        run.stop().wait(20)
        again = cm.resume(run.id, journal=journal, engine=made)
        gate(again)
        again.retry()
        gate(again)
        again.reject("And friendly.")
        gate(again)
        assert again["planner"].prompt == "And friendly."
        again.rerun("planner")
        until(lambda: len(server.asked) == 5, "a new conversation")
        again.stop().wait(20)
    said = [[message["content"] for message in sent.body["messages"]] for sent in server.asked]
    assert said[0] == ["Plan it."]
    assert said[1] == said[2] == ["Plan it.", "One.", "Shorter."]
    assert said[3] == [*said[2], "Two.", "And friendly."]
    assert said[4] == ["Plan it."], "what runs anew begins a new conversation"
    roles = [message["role"] for message in server.asked[3].body["messages"]]
    assert roles == ["user", "assistant", "user", "assistant", "user"]


def test_another_engine_is_told_in_its_prompt_what_was_rejected(tmp_path):
    journal = cm.Journal(tmp_path / "journal.db")
    with ModelServer([openai_says("One.")]) as server:
        run = start("openai", server, steps=[cm.step("planner", prompt="Plan it.")], journal=journal)
        gate(run)
        run.stop().wait(20)
    with ModelServer([anthropic_says("Two.")]) as server:
        again = cm.resume(run.id, journal=journal, engine=engine("anthropic", server))
        gate(again)
        again.reject("Shorter.")
        until(lambda: again["planner"].attempts[-1].text == "Two.", "its answer")
        again.stop().wait(20)
    (said,) = server.asked[0].body["messages"]
    assert said["content"] == "Plan it.\n\n## Your last answer\n\nOne.\n\n## Feedback on it\n\nShorter."


@both
def test_tools_are_shown_while_the_turn_runs_and_thinking_is_not(dialect):
    calls = [("1", "add", '{"a": 2, "b": 3}'), ("2", "broken", "{}")]

    async def watched(run: cm.Run) -> str:
        return "".join([thing.text async for thing in run.stream() if isinstance(thing, cm.LiveText)])

    with ModelServer([SAYS[dialect]("Let me look.", thinking="hmm", calls=calls), SAYS[dialect]("Done.")]) as server:
        run = start(dialect, server, mode="always", agent={"tools": [add, broken]}, steps=[cm.step("planner")])
        shown = asyncio.run(watched(run))
        assert run["planner"].text == "Done."
    lines = [line.strip() for line in shown.splitlines() if line.strip()]
    assert lines == [
        "Let me look.",
        '→ add {"a": 2, "b": 3}',
        "← 5",
        "→ broken {}",
        "✗ RuntimeError: out of order",
        "Done.",
    ]


# -- other agents, and people ------------------------------------------------------------------------------------------

WORKERS = ["frontend-dev", "backend-dev", "qa-engineer"]


def prompt_of(sent: Asked) -> str:
    """What the agent was asked: the first message that is not the system's."""
    first = next(one for one in sent.body["messages"] if one["role"] == "user")
    return str(first["content"])


def told(sent: Asked) -> list[str]:
    """What the model was told that its tools returned, last round only."""
    found: list[str] = []
    for message in sent.body["messages"]:
        if message["role"] == "assistant":
            found = []
        elif message["role"] == "tool":
            found.append(message["content"])
        elif isinstance(message["content"], list):
            found += [part["content"] for part in message["content"] if part["type"] == "tool_result"]
    return found


def offered(sent: Asked) -> dict[str, Any]:
    """The tools that the model was offered, with the schema of each."""
    listed = [one.get("function", one) for one in sent.body.get("tools", ())]
    return {one["name"]: one.get("parameters", one.get("input_schema")) for one in listed}


def call(name: str, **arguments: Any) -> tuple[str, str, str]:
    return ("id1", name, json.dumps(arguments))


def team_of(dialect: str, server: ModelServer, **options: Any) -> cm.Run:
    agents = [cm.Agent("coordinator", "Build it.", model="m")]
    agents += [cm.Agent(name, f"I am {name}.", model="m") for name in WORKERS]
    workflow = cm.Workflow("team", agents=agents, steps=options.pop("steps", "coordinator"), sub_agents=WORKERS)
    return workflow.start(engine=engine(dialect, server), journal=options.pop("journal", ":memory:"), **options)


@both
@pytest.mark.parametrize(
    "arguments",
    [
        {
            "groups": [
                [{"agent": "frontend-dev", "prompt": "UI"}, {"agent": "backend-dev", "prompt": "API"}],
                [{"agent": "qa-engineer", "prompt": "test"}],
            ]
        },
        {
            "groups": '[[{"agent": "frontend-dev", "prompt": "UI"}, {"agent": "backend-dev", "prompt": "API"}],'
            ' [{"agent": "qa-engineer", "prompt": "test"}]]'
        },
        {"script": "frontend-dev 'UI' & backend-dev 'API' && qa-engineer 'test'", "groups": None},
    ],
    ids=["groups", "groups as text", "script"],
)
def test_a_model_calls_other_agents(dialect, arguments):
    says = SAYS[dialect]

    def script(sent: Asked) -> Said:
        if not prompt_of(sent).startswith("Build it."):
            return says(f"{prompt_of(sent)} Done.")
        return says("All done.") if told(sent) else says("I delegate.", calls=[call("run_agents", **arguments)])

    with ModelServer(script) as server:
        run = team_of(dialect, server).wait(20)
    assert run["coordinator"].text == "All done."
    assert [member.path for member in run["coordinator"].members] == [f"coordinator/{name}#1" for name in WORKERS]
    assert told(server.asked[-1]) == [
        "## frontend-dev\n\nI am frontend-dev.\n\nUI Done.\n\n## backend-dev\n\nI am backend-dev.\n\nAPI Done.\n\n"
        "## qa-engineer\n\nI am qa-engineer.\n\ntest Done."
    ]
    schema = offered(server.asked[0])["run_agents"]
    asks = schema["properties"]["groups"]["items"]["items"]
    assert asks["properties"]["agent"]["enum"] == WORKERS
    assert asks["required"] == ["agent", "prompt"]
    one = next(sent for sent in server.asked if prompt_of(sent).startswith("I am frontend-dev."))
    asks = offered(one)["run_agents"]["properties"]["groups"]["items"]["items"]
    assert asks["properties"]["agent"]["enum"] == ["backend-dev", "qa-engineer"], "nobody may call itself"
    assert run.usage.input_tokens == 100 * len(server.asked)


@both
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"groups": [[{"agent": "frontend", "prompt": "x"}]]}, "'frontend' cannot be called here. Did you mean 'front"),
        ({"script": "frontend-dev 'x' & "}, "run_agents, column 20: expected an agent's id, found the end."),
        ({"script": "coordinator 'x'"}, "run_agents: 'coordinator' cannot be called here."),
        ({"groups": [[{"agent": "qa-engineer", "prompt": " "}]]}, "it is asked nothing"),
        ({"groups": [[{"agent": "qa-engineer"}]]}, "call 'qa-engineer': 'prompt' is missing."),
        ({"groups": []}, "run_agents: a group without a call."),
        ({"groups": 5}, "run_agents takes a list of groups or a line, not int."),
        ({"groups": [[{"agent": "qa-engineer", "prompt": "x"}] * 500]}, "run_agents: 500 agents at once are too many"),
        ({}, "run_agents takes either 'groups' or 'script', not nothing."),
        ({"groups": [], "script": "x"}, "run_agents takes either 'groups' or 'script', not 'groups', 'script'."),
        (
            {"groups": [[{"agent": "qa-engineer", "prompt": "x", "input_files": ["no.md"]}]]},
            "the input file 'no.md' cannot be read: No such file or directory.",
        ),
    ],
)
def test_a_wrong_call_of_agents_is_told_to_the_model_and_the_turn_goes_on(dialect, arguments, words):
    says = SAYS[dialect]
    with ModelServer([says(calls=[call("run_agents", **arguments)]), says("I do it myself.")]) as server:
        run = team_of(dialect, server).wait(20)
    (line,) = told(server.asked[-1])
    assert words in line
    assert "\n" not in line
    assert run["coordinator"].text == "I do it myself."
    assert run["coordinator"].members == []


@both
def test_a_failed_member_is_told_to_the_model(dialect, headless):
    says = SAYS[dialect]

    def script(sent: Asked) -> Said:
        if prompt_of(sent).startswith("I am qa-engineer"):
            return error(400, complaint("invalid_request_error", "no such thing"))
        if not prompt_of(sent).startswith("Build it."):
            return says("Done.")
        line = "frontend-dev 'x' & qa-engineer 'y' && backend-dev 'z'"
        return says("I see.") if told(sent) else says(calls=[call("run_agents", script=line)])

    with ModelServer(script) as server:
        run = team_of(dialect, server).wait(20)
    (said,) = told(server.asked[-1])
    assert said.startswith("## frontend-dev\n\nDone.\n\n## qa-engineer (failed)\n\n")
    assert said.endswith("## backend-dev (pending)\n\nit was not begun, because one before it failed")
    assert run["coordinator"].text == "I see."


@both
def test_a_model_asks_a_person(dialect):
    says = SAYS[dialect]
    replies = [says("Hm.", calls=[call("ask_human", question="Which port?")]), says("On 80.")]
    with ModelServer(replies) as server:
        run = start(dialect, server, mode=True, steps=[cm.step("planner", timeout_s=20)])
        opened = gate(run)
        assert (opened.kind, opened.payload) == ("question", {"question": "Which port?"})
        assert run["planner"].status == "asks you"
        run.answer("80, please").wait(20)
        assert told(server.asked[-1]) == ["80, please"]
        assert run["planner"].text == "On 80."
        assert run["planner"].attempts[0].asked_s > 0


@both
@pytest.mark.parametrize(
    ("arguments", "words"),
    [({}, "ask_human takes 'question', not nothing."), ({"question": " "}, "ask_human: the question is empty.")],
)
def test_a_question_that_is_none(dialect, arguments, words):
    with ModelServer([SAYS[dialect](calls=[call("ask_human", **arguments)]), SAYS[dialect]("Well.")]) as server:
        run = start(dialect, server, mode=True).wait(20)
    assert run["planner"].text == "Well."
    assert told(server.asked[-1])[0].startswith(words)


@pytest.mark.parametrize(
    ("mode", "step", "expected"),
    [
        (True, cm.step("planner"), True),
        (False, cm.step("planner"), True),
        ("never", cm.step("planner"), True),
        ("always", cm.step("planner"), False),
        ("always", cm.step("planner", interactive=True), True),
    ],
)
def test_who_wants_no_pause_is_asked_nothing(mode, step, expected):
    with ModelServer(openai_says("Done.")) as server:
        run = start("openai", server, mode=mode, steps=[step])
        until(lambda: run.gates or run.status == "completed", "the end of the turn")
        assert ("ask_human" in offered(server.asked[0])) is expected
        if run.status != "completed":
            run.stop().wait(20)


def test_a_service_that_cannot_call_tools_is_asked_without():
    """The tool that every agent has must not be in the way of models that know none."""

    def script(sent: Asked) -> Said:
        if "tools" in sent.body:
            return error(400, {"error": {"message": "gemma3 does not support tools"}})
        return openai_says("Hello.")

    with ModelServer(script) as server:
        made = engine("openai", server)
        workflow = cm.Workflow("w", agents=[cm.Agent("planner", "Plan.", model="m")], steps="planner")
        for _ in range(2):
            assert workflow.start(engine=made, journal=":memory:").wait(20)["planner"].text == "Hello."
        assert ["tools" in sent.body for sent in server.asked] == [True, False, False]
        with_tool = cm.Agent("planner", "Plan.", model="m", tools=[add])
        run = cm.Workflow("w", agents=[with_tool], steps="planner").start(engine=made, journal=":memory:")
        assert "does not support tools" in gate(run).payload["error"]
        run.stop().wait(20)


@pytest.mark.parametrize("name", ["run_agents", "ask_human"])
def test_a_tool_of_ones_own_is_not_called_like_one_that_is_there(name):
    with pytest.raises(cm.WorkflowError, match=rf"tools: '{name}' is the name of a tool that models have anyway"):
        cm.Agent("planner", "x", tools=[cm.tool(name=name)(lambda: "")])

    def plain() -> str:
        return ""

    plain.__name__ = name
    with pytest.raises(cm.WorkflowError, match=name):
        cm.Agent("planner", "x", tools=[plain])


# -- limits ------------------------------------------------------------------------------------------------------------


@both
def test_a_model_that_goes_on_calling_tools_is_held_by_a_limit(dialect, tmp_path):
    journal, made = cm.Journal(tmp_path / "j.db"), [SAYS[dialect](calls=[call("add", a=1, b=2)])] * 3
    with ModelServer([*made, SAYS[dialect]("Done.")]) as server:
        run = asking(dialect, server, agent={"tools": [add]}, max_tokens=200, journal=journal)
        opened = gate(run)
        assert (opened.kind, opened.payload["used"], len(server.asked)) == ("budget", 240, 2)
        run.approve(max_tokens=1000).wait(20)
        assert (run["planner"].text, len(server.asked), len(run["planner"].attempts)) == ("Done.", 4, 1)


# -- permission --------------------------------------------------------------------------------------------------------


def asking(dialect: str, server: ModelServer, **options: Any) -> cm.Run:
    given = {"mode": True, "agent": {"tools": [add, remove]}, **options}
    return start(dialect, server, **given)


def removes(dialect: str, *paths: str) -> list[Said]:
    """A model that removes one file after the other, and then is done."""
    says = SAYS[dialect]
    return [*(says(calls=[call("remove", path=path)]) for path in paths), says("Done.")]


def kinds(run: cm.Run) -> list[str]:
    return [event.gate.kind for event in run.events if event.type == "GateOpened"]


@both
def test_a_tool_is_allowed_once(dialect):
    with ModelServer(removes(dialect, "a", "b")) as server:
        run = asking(dialect, server, steps=[cm.step("planner", timeout_s=20)])
        opened = gate(run)
        assert (opened.kind, opened.actions) == ("permission", ("approve", "reject", "stop"))
        assert (opened.payload["tool"], opened.payload["arguments"]) == ("remove", {"path": "a"})
        assert run["planner"].status == "asks you"
        run.approve()
        second = until(lambda: next((one for one in run.gates if one.id != opened.id), None), "the second call")
        assert second.digest != opened.digest, "the arguments are part of what is decided"
        run.approve(scope="once").wait(20)
        assert told(server.asked[1]) == ["removed a"]
        assert told(server.asked[2]) == ["removed b"]
        assert run["planner"].attempts[0].asked_s > 0
        assert run["planner"].attempts[0].decision is None, "it is about the tool, not about the attempt"


@both
def test_a_tool_is_denied_and_the_model_is_told_why(dialect):
    with ModelServer(removes(dialect, "a")) as server:
        run = asking(dialect, server)
        gate(run)
        with pytest.raises(cm.TransitionError, match="say why"):
            run.reject(" ")
        run.reject("not this one, it's mine").wait(20)
        assert told(server.asked[1]) == ["Refused by a person: not this one, it's mine"]
        assert run["planner"].text == "Done."


@both
def test_arguments_are_edited_and_checked_before_they_count(dialect):
    with ModelServer(removes(dialect, "a")) as server:
        run = asking(dialect, server)
        opened = gate(run)
        for wrong, words in [
            ('{"way": "b"}', "remove does not take these arguments: path: Field required"),
            ('{"path": "b"', "the arguments are a JSON object"),
            ("[]", "the arguments are a JSON object"),
        ]:
            with pytest.raises(cm.TransitionError, match=words):
                run.approve(output=wrong)
        with pytest.raises(cm.TransitionError, match="edited arguments are for this call alone"):
            run.approve(output='{"path": "b"}', scope="run")
        assert run.gates == [opened]
        run.approve(output='{"path": "b"}').wait(20)
        assert told(server.asked[1]) == ["removed b"]


def test_arguments_that_another_process_edited_are_asked_about_again(tmp_path):
    """It does not know the tool: what does not fit opens the gate again, and says why."""
    with ModelServer(removes("openai", "a")) as server:
        run = asking("openai", server, journal=tmp_path / "j.db")
        opened = gate(run)
        other = cm.Run(run.id, cm.Journal(tmp_path / "j.db"))
        other.approve(output='{"way": "b"}')
        again = until(lambda: next((one for one in run.gates if one.id != opened.id), None), "the gate again")
        assert again.payload["note"].startswith("The edited arguments do not fit: path: Field required")
        assert "do not fit: path: Field required" in run._repr_mimebundle_()["text/plain"]
        other.approve(output='{"path": "b"}')
        run.wait(20)
        assert told(server.asked[1]) == ["removed b"]


@both
def test_a_tool_is_allowed_for_the_run_also_after_a_resume(dialect, tmp_path):
    journal = cm.Journal(tmp_path / "j.db")
    replies = removes(dialect, "a", "b")
    with ModelServer([*replies, *replies]) as server:
        run = asking(dialect, server, mode="never", journal=journal)
        gate(run)
        run.approve(scope="run")
        until(lambda: any(one.kind == "review" for one in run.gates), "the review")
        assert kinds(run) == ["permission", "review"]
        run.stop().wait(20)
        agent = cm.Agent("planner", "Plan {{ goal }}.", model="test-model", tools=[add, remove])
        again = cm.resume(run.id, journal=journal, engine=engine(dialect, server), agents=[agent])
        gate(again)
        again.reject("once more")
        until(lambda: len(again["planner"].attempts) == 2 and again.gates, "the second review")
        assert kinds(again) == ["permission", "review", "review", "review"]
        assert not (tmp_path / "permissions.json").exists()
        again.approve().wait(20)


def test_a_tool_is_always_allowed_until_that_is_taken_back(tmp_path):
    journal = cm.Journal(tmp_path / "j.db")
    with ModelServer([*removes("openai", "a", "b"), *removes("openai", "c"), *removes("openai", "d")]) as server:
        run = asking("openai", server, journal=journal)
        gate(run)
        run.approve(scope="always").wait(20)
        assert kinds(run) == ["permission"]
        assert kinds(asking("openai", server, journal=journal).wait(20)) == []
        rules = cm.permissions(journal)
        assert [(rule.tool, rule.run, rule.step) for rule in rules] == [("remove", run.id, "planner")]
        rules.revoke("remove")
        third = asking("openai", server, journal=journal)
        assert gate(third).kind == "permission"
        third.stop().wait(20)


def test_where_the_list_cannot_be_kept_nothing_is_decided(tmp_path):
    journal = cm.Journal(tmp_path / "j.db")
    (tmp_path / "permissions.json").mkdir()
    with ModelServer(removes("openai", "a")) as server:
        run = asking("openai", server, journal=journal)
        opened = gate(run)
        with pytest.raises(cm.CodeMachineError, match=r"cannot be kept, so nothing is decided: .*Is a directory"):
            run.approve(scope="always")
        assert run.gates == [opened]
        assert run.approve(scope="run").wait(20)["planner"].text == "Done."


def test_a_tool_that_was_changed_is_asked_about_again(tmp_path):
    """A rule is for the function that the person saw."""

    @cm.tool(name="remove", ask=True)
    def another(path: str) -> str:
        return f"shredded {path}"

    journal = cm.Journal(tmp_path / "j.db")
    with ModelServer([*removes("openai", "a"), *removes("openai", "a")]) as server:
        run = asking("openai", server, journal=journal)
        gate(run)
        run.approve(scope="always").wait(20)
        other = asking("openai", server, journal=journal, agent={"tools": [another]})
        assert gate(other).payload["tool"] == "remove"
        other.stop().wait(20)


def test_in_unattended_mode_it_is_recorded_who_allowed_it():
    with ModelServer(removes("openai", "a", "b")) as server:
        run = asking("openai", server)
        gate(run)
        run.set_mode("unattended")
        run.approve().wait(20)
    assert [decision.by for decision in run.state.decisions.values()] == ["you", "unattended mode"]


def test_with_nobody_there_a_policy_answers_or_the_run_stops(headless):
    with ModelServer(removes("openai", "a", "b")) as server:
        run = asking("openai", server)
        with pytest.raises(cm.GatePending, match=r'Stopped at the gate "planner": nobody can answer here'):
            run.wait(20)
        run.stop()

    def policy(asked: cm.Gate) -> cm.Decision:
        if asked.payload["arguments"]["path"] == "a":
            return cm.Decision(action="approve", output='{"path": "x"}')
        return cm.Decision(action="reject", feedback="no")

    for on_gate, expected in [
        ("approve", ["removed a", "removed b"]),
        ("reject", ["Refused by a person: Rejected by the policy on_gate='reject'."] * 2),
        (policy, ["removed x", "Refused by a person: no"]),
    ]:
        with ModelServer(removes("openai", "a", "b")) as server:
            asking("openai", server, on_gate=on_gate).wait(20)
            assert [told(sent)[0] for sent in server.asked[1:]] == expected


def test_a_policy_writes_no_list_and_its_arguments_are_checked(headless, tmp_path):
    journal = cm.Journal(tmp_path / "j.db")
    always = cm.Decision(action="approve", scope="always")
    with ModelServer([*removes("openai", "a", "b"), *removes("openai", "a")]) as server:
        run = asking("openai", server, on_gate=lambda asked: always, journal=journal).wait(20)
        assert kinds(run) == ["permission"], "it counts for the run"
        assert cm.permissions(journal) == []
        wrong = cm.Decision(action="approve", output='{"way": 1}')
        with pytest.raises(cm.TransitionError, match="remove does not take these arguments"):
            asking("openai", server, on_gate=lambda asked: wrong).wait(20)


def test_what_is_allowed_for_the_run_answers_all_who_wait_for_it():
    def script(sent: Asked) -> Said:
        if prompt_of(sent).startswith("Build it."):
            line = "frontend-dev 'x' & backend-dev 'y' & qa-engineer 'z'"
            return openai_says("All done.") if told(sent) else openai_says(calls=[call("run_agents", script=line)])
        return openai_says("Done.") if told(sent) else openai_says(calls=[call("remove", path=prompt_of(sent))])

    agents = [cm.Agent("coordinator", "Build it.", model="m")]
    agents += [cm.Agent(name, f"I am {name}.", model="m", tools=[remove]) for name in WORKERS]
    workflow = cm.Workflow("team", agents=agents, steps="coordinator", sub_agents=WORKERS)
    with ModelServer(script) as server:
        run = workflow.start(engine=engine("openai", server), journal=":memory:")
        until(lambda: len(run.gates) == 3, "all three")
        assert {one.kind for one in run.gates} == {"permission"}
        run.approve("coordinator/backend-dev#1", scope="run").wait(20)
    assert run["coordinator"].text == "All done."
    assert [decision.scope for decision in run.state.decisions.values()] == ["run", None, None]


def test_stopped_while_it_asks_it_asks_again(tmp_path):
    journal = cm.Journal(tmp_path / "j.db")
    with ModelServer(removes("openai", "a")[0]) as server:
        run = asking("openai", server, journal=journal)
        opened = gate(run)
        run.stop().wait(20)
        with pytest.raises(cm.AlreadyDecided, match="closed"):
            run.decide(opened.id, cm.Decision(action="approve"))
        agent = cm.Agent("planner", "Plan {{ goal }}.", model="test-model", tools=[add, remove])
        again = cm.resume(run.id, journal=journal, engine=engine("openai", server), agents=[agent])
        assert gate(again).payload == opened.payload
        again.stop().wait(20)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("cm planner remove")]


def test_the_list_of_tools_always_allowed(tmp_path):
    path = tmp_path / "permissions.json"
    assert repr(cm.permissions(tmp_path / "j.db")).startswith("No tool is always allowed")
    assert not list(tmp_path.iterdir()), "looking makes nothing"
    journal = cm.Journal(tmp_path / "j.db")
    for name in ("remove", "send"):
        keep(journal, Rule(tool=name, implementation="x", run="r-1", step="planner", at=1.7e9))
    keep(journal, Rule(tool="send", implementation="x", run="r-2"))
    assert path.stat().st_mode & 0o777 == 0o600
    found = cm.permissions(tmp_path / "j.db")
    assert [(rule.tool, rule.run) for rule in found] == [("remove", "r-1"), ("send", "r-2")]
    assert "planner (r-1)" in repr(found)
    with pytest.raises(cm.WorkflowError, match=r"'sent' is not always allowed\. Did you mean 'send'\?"):
        found.revoke("sent")
    assert [rule.tool for rule in found.revoke("remove")] == ["send"]
    assert allows(journal, "send", "x")
    assert not allows(journal, "send", "y")
    for spoil in (lambda: path.write_text("{"), lambda: path.write_text('{"version": 1, "more": 2}')):
        spoil()
        assert not allows(journal, "send", "x"), "what cannot be read allows nothing"
        with pytest.raises(cm.CodeMachineError, match="cannot be read"):
            cm.permissions(journal)
    path.write_text('{"always": [{"tool": "send", "implementation": "x"}]}')
    assert allows(journal, "send", "x")
    path.chmod(0o666)
    assert not allows(journal, "send", "x"), "others could have written it"
    with pytest.raises(cm.CodeMachineError, match="others can write it"):
        cm.permissions(journal)


@both
def test_what_is_done_with_tools_is_journaled(dialect, tmp_path):
    """Bounded, and whatever becomes of the turn; thinking is not."""

    @cm.tool
    def prints(lines: int) -> str:
        return "x" * 50_000_000

    calls = [("1", "prints", '{"lines": 2}'), ("2", "broken", "{}"), ("3", "add", '{"a": ')]
    says = [SAYS[dialect]("Hm.", thinking="secret thoughts", calls=calls), error(400, complaint("invalid", "no"))]
    with ModelServer(says) as server:
        run = start(dialect, server, agent={"tools": [add, broken, prints]}, journal=tmp_path / "j.db")
        gate(run)
        run.stop().wait(20)
    kept = [event for event in cm.Journal(tmp_path / "j.db").events(run.id) if event.type.startswith("Tool")]
    assert [(event.type, event.call_id, event.name) for event in kept] == [
        ("ToolCalled", "1", "prints"),
        ("ToolReturned", "1", "prints"),
        ("ToolCalled", "2", "broken"),
        ("ToolReturned", "2", "broken"),
        ("ToolCalled", "3", "add"),
        ("ToolReturned", "3", "add"),
    ]
    assert "characters are left out …]" in kept[1].text
    assert len(kept[1].text) < 2_100
    assert [event.failed for event in kept if event.type == "ToolReturned"] == [False, True, True]
    (attempt,) = run["planner"].attempts
    assert [(use.name, use.arguments, use.failed) for use in attempt.tools] == [
        ("prints", '{"lines": 2}', False),
        ("broken", "{}", True),
        ("add", '{"a": ', True),
    ]
    assert "secret thoughts" not in "".join(map(repr, run.events))
    assert len(told(server.asked[1])[0]) < 200_100, "the model is told both ends of it"


@both
def test_what_a_failed_turn_used_counts(dialect):
    """What was spent before it failed; of an answer that broke off, what had come of it."""
    says = SAYS[dialect]
    answers_in_turn = [
        says(calls=[call("add", a=1)]),
        says("x" * 400).first(4 if dialect == "anthropic" else 2, "reset"),
        says("Done."),
    ]
    with ModelServer(answers_in_turn) as server:
        run = start(dialect, server, mode="always", agent={"tools": [add], "model": "gpt-5-mini"}).wait(20)
    failed = next(event for event in run.events if event.type == "TurnFailed")
    (attempt,) = run["planner"].attempts
    assert failed.usage.input_tokens > 100, "the first exchange, and what was sent for the second"
    assert failed.usage.output_tokens > 20
    assert attempt.usage.output_tokens == failed.usage.output_tokens + 20
    assert attempt.usage == run.usage
    if dialect == "openai":
        assert (failed.cost_usd > 0, failed.cost_estimated) == (True, True)
        assert attempt.cost_estimated
        assert f"~${run.cost_usd:.3f}" in repr(run._repr_mimebundle_())


@both
def test_a_key_that_a_tool_returns_is_kept_nowhere(dialect, tmp_path):
    """Not even the half of it that remains where a long text is cut."""

    @cm.tool
    def leaks() -> str:
        return "x" * 990 + KEY + "x" * 5_000

    replies = [
        SAYS[dialect](calls=[("1", "leaks", json.dumps({"key": KEY}))]),
        SAYS[dialect](calls=[("1", "leaks", "{}")]),
    ]
    with ModelServer([*replies, SAYS[dialect]("Done.")]) as server:
        run = start(dialect, server, mode="always", agent={"tools": [leaks]}, journal=tmp_path / "j.db").wait(20)
    kept = b"".join(file.read_bytes() for file in tmp_path.iterdir() if file.is_file()).decode("latin-1")
    for text in (kept, everything(run.events, run.state), run._repr_mimebundle_()["text/html"]):
        assert KEY[:10] not in text
    assert "[key]" in run["planner"].attempts[0].tools[0].arguments


def test_a_key_that_is_wrong_costs_nothing():
    with ModelServer(error(401, complaint("authentication_error"))) as server:
        run = start("openai", server, mode="always")
        gate(run)
        assert run.usage == cm.Usage()
        run.stop().wait(20)


def test_a_run_tries_again_what_may_help(monkeypatch):
    limited = error(429, complaint("rate_limit_error"), retry_after="0")
    with ModelServer([limited, openai_says("Half").first(2, "reset"), openai_says("Whole.")]) as server:
        monkeypatch.setattr("cm_notebook.turns.LONGEST_BACKOFF_S", 0)
        run = start("openai", server, mode="always").wait(20)
    assert run["planner"].text == "Whole."
    failed = [event for event in run.events if event.type == "TurnFailed"]
    assert [event.error.kind for event in failed] == ["EngineRateLimited", "EngineUnavailable"]


@both
def test_no_key_in_what_a_tool_returns_goes_to_a_model(dialect, monkeypatch):
    @cm.tool
    def environment() -> str:
        """The variables of the environment."""
        return f"OTHER_API_KEY={KEY}"

    monkeypatch.setenv("OPENROUTER_API_KEY", KEY)
    says = SAYS[dialect]
    with ModelServer([says(calls=[("c1", "environment", "{}")]), says("Done.")]) as server:
        start(dialect, server, agent={"tools": [environment]}, mode="always").wait(20)
    told = json.dumps(messages(server)[-1])
    assert "OTHER_API_KEY=[key]" in told
    assert KEY not in told


def test_a_tool_and_an_output_do_not_survive_without_their_cell(tmp_path):
    journal = cm.Journal(tmp_path / "journal.db")
    with ModelServer(openai_says(GOOD)) as server:
        made = engine("openai", server)
        for given, words in [({"tools": [add]}, "a tool that is a Python"), ({"output": Plan}, "an output that is a")]:
            run = start("openai", server, agent=given, journal=journal)
            gate(run)
            run.stop().wait(20)
            with pytest.raises(cm.WorkflowError, match=words):
                cm.resume(run.id, journal=journal, engine=made)
            agent = cm.Agent("planner", "Plan {{ goal }}.", model="test-model", **given)
            again = cm.resume(run.id, journal=journal, engine=made, agents=[agent])
            gate(again)
            assert again.approve().wait(20)["planner"].text == GOOD


@both
@pytest.mark.parametrize(
    "said",
    [
        error(401, complaint("authentication_error", f"wrong key {KEY}, or Bearer {KEY}")),
        error(400, f"you sent {KEY}"),
        error(500, f"<html>{KEY}"),
        Said([sse(complaint("overloaded_error", KEY))]),
        Said([sse(f"{{broken {KEY}")]),
        Said([sse([KEY])]),
        error(302, "", location=f"http://x/{KEY}"),
        Said(end="reset"),
        error(401, complaint("authentication_error", "wrong key sk-another*****key")),
    ],
)
def test_no_key_is_anywhere(dialect, said, tmp_path):
    journal = cm.Journal(tmp_path / "journal.db")
    with ModelServer(said) as server:
        run = start(dialect, server, steps=[cm.step("planner", retries=0)], journal=journal)
        gate(run)
        shown = everything(run.error, run.events, run.state, server.url, repr(run._work.engine), run._work.engine)
        run.stop().wait(20)
    kept = b"".join(file.read_bytes() for file in tmp_path.iterdir() if file.is_file())
    assert server.asked[0].headers.get("x-api-key", "") + server.asked[0].headers.get("authorization", "")
    for text in (shown, kept.decode("latin-1"), run._repr_mimebundle_()["text/html"]):
        assert KEY not in text
        assert "sk-another" not in text


@both
def test_a_thousand_turns_leave_nothing(dialect):
    says = SAYS[dialect]
    answers_in_turn = [says("Hello."), error(503, "busy"), says("Hello.").first(2, "reset"), says("x").first(1, "cut")]

    def script(sent: Asked) -> Said:
        return answers_in_turn[int(sent.body["messages"][0]["content"]) % 4]

    async def turns(made: ChatEngine) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
        async def turn(number: int) -> bool:
            try:
                return isinstance((await collect(made, asked(prompt=str(number))))[-1], TurnDone)
            except cm.EngineUnavailable:
                return False

        async def settled(wanted: tuple[int, ...]) -> tuple[int, ...]:
            """Tasks, descriptors and threads, once what is closing has closed."""
            gc.collect()
            for _ in range(500):
                now = len(asyncio.all_tasks()), len(list(FILES.iterdir())) if FILES.exists() else 0
                now += (threading.active_count(),)
                if all(count <= most for count, most in zip(now, wanted, strict=True)):
                    break
                await asyncio.sleep(0.02)
            return now

        before = await settled((1000, 1000, 1000))
        good = 0
        for start in range(0, 1000, 10):
            good += sum(await asyncio.gather(*(turn(number) for number in range(start, start + 10))))
        return good, before, await settled(before)

    with ModelServer(script) as server:
        good, before, after = asyncio.run(turns(engine(dialect, server)))
    assert good == 250
    assert all(left <= was for left, was in zip(after, before, strict=True)), f"{before} became {after}"


# -- schemas -----------------------------------------------------------------------------------------------------------


def test_closed_schemas():
    class Inner(BaseModel):
        kind: Literal["a", "b"] = "a"

    class Outer(BaseModel):
        inner: Inner = Field(default_factory=Inner, description="inside")
        many: list[Inner] | None = None
        name: str = Field(pattern="x+", default="x")

    assert closed_schema(Outer.model_json_schema()) == {
        "title": "Outer",
        "type": "object",
        "properties": {
            "inner": {"$ref": "#/$defs/Inner"},
            "many": {
                "title": "Many",
                "anyOf": [{"type": "array", "items": {"$ref": "#/$defs/Inner"}}, {"type": "null"}],
            },
            "name": {"type": "string", "title": "Name"},
        },
        "required": ["inner", "many", "name"],
        "additionalProperties": False,
        "$defs": {
            "Inner": {
                "title": "Inner",
                "type": "object",
                "properties": {"kind": {"type": "string", "enum": ["a", "b"], "title": "Kind"}},
                "required": ["kind"],
                "additionalProperties": False,
            }
        },
    }


@pytest.mark.parametrize("hint", [dict[str, int], tuple[int, str], Any])
def test_schemas_that_cannot_be_closed(hint):
    made = type("Made", (BaseModel,), {"__annotations__": {"field": hint}})
    assert closed_schema(made.model_json_schema()) is None
