"""What dialects read: recorded streams, in whatever pieces, and streams that somebody has damaged."""

from __future__ import annotations

import asyncio
import copy
import functools
import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cm_notebook.engines import http
from cm_notebook.engines.anthropic import Anthropic
from cm_notebook.engines.base import Delta
from cm_notebook.engines.chat import Answer, ChatEngine
from cm_notebook.engines.openai import OpenAI
from cm_notebook.engines.prices import Tokens
from cm_notebook.errors import EngineError, EngineUnavailable

FILES = sorted((Path(__file__).parent / "recordings").glob("*.sse"))
MADE: dict[str, ChatEngine] = {"openai": OpenAI(), "anthropic": Anthropic()}

recorded = pytest.mark.parametrize("file", FILES, ids=[file.stem for file in FILES])


def dialect(file: Path) -> ChatEngine:
    return MADE[file.stem.partition("-")[0]]


def replayed(engine: ChatEngine, pieces: list[bytes]) -> tuple[list[Delta], Answer]:
    """What `engine` makes of a stream that arrives in these pieces."""

    async def serve(_: httpx.Request) -> httpx.Response:
        async def content() -> Any:
            for piece in pieces:
                yield piece

        return httpx.Response(200, headers={"content-type": "text/event-stream"}, content=content())

    async def read() -> tuple[list[Delta], Answer]:
        reader = engine.reader()
        async with http.Connection("test", "http://test", {}) as connection:
            await connection._client.aclose()
            connection._client = httpx.AsyncClient(transport=httpx.MockTransport(serve))
            deltas = [delta async for delta in engine._exchange(connection, {}, reader)]
        return deltas, reader.answer()

    return asyncio.run(read())


def events(file: Path) -> list[Any]:
    lines = file.read_text(encoding="utf-8").split("\n")
    data = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    return [json.loads(line) if line != "[DONE]" else line for line in data]


def written(told: list[Any]) -> bytes:
    return "".join(f"data: {json.dumps(each) if each != '[DONE]' else each}\n\n" for each in told).encode()


EXPECTED: dict[str, tuple[str, str, list[tuple[str, Any]], Tokens | None]] = {
    "openai-chat-1": (
        "Look at the file first.",
        "Let me look.",
        [("Bash", {"command": "cat hello.txt"}), ("Read", {"path": "a b"})],
        Tokens(100, 20),
    ),
    "openai-chat-2": ("", "It says: hello world.", [], Tokens(100, 20)),
    "anthropic-claude-1": (
        "The user wants the file.",
        "Let me look.",
        [("Bash", {"command": "cat hello.txt", "description": "Show file"})],
        Tokens(260, 30, 50, 10),
    ),
}


@recorded
def test_recorded_streams(file):
    deltas, answer = replayed(dialect(file), [file.read_bytes()])
    thinking = "".join(delta.text for delta in deltas if delta.kind == "thinking")
    text = "".join(delta.text for delta in deltas if delta.kind == "text")
    assert answer.text == text
    assert text or answer.calls
    assert all(call.arguments is not None for call in answer.calls)
    if file.stem in EXPECTED:
        calls = [(call.name, call.arguments) for call in answer.calls]
        assert (thinking, text, calls, answer.tokens) == EXPECTED[file.stem]


@functools.cache
def at_once(file: Path, newline: bytes) -> tuple[bytes, tuple[list[Delta], Answer]]:
    """A stream with odd characters in it, and what is made of it when it arrives as one piece."""
    whole = file.read_bytes().replace(b"look", "lö\u2028\u0085ok🙂".encode()).replace(b"\n", newline)
    return whole, replayed(dialect(file), [whole])


@recorded
@settings(deadline=None)
@given(data=st.data())
def test_however_the_bytes_arrive(file, data):
    whole, expected = at_once(file, data.draw(st.sampled_from([b"\n", b"\r\n"])))
    cuts = sorted(data.draw(st.sets(st.integers(1, len(whole) - 1), max_size=8)))
    pieces = [whole[start:end] for start, end in zip([0, *cuts], [*cuts, len(whole)], strict=True)]
    assert replayed(dialect(file), pieces) == expected


@recorded
def test_cut_anywhere_it_is_no_answer(file):
    told = events(file)
    end = next(n for n, each in enumerate(told) if "message_stop" in str(each) or "'finish_reason': '" in str(each))
    for count in range(end):
        with pytest.raises(EngineUnavailable, match="broke off"):
            replayed(dialect(file), [written(told[:count])])


_scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3)
_values = st.recursive(
    _scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inside: list[tuple[Any, Any]] = []
    if isinstance(value, dict):
        inside = list(value.items())
    elif isinstance(value, list):
        inside = list(enumerate(value))
    return [path, *(place for key, inner in inside for place in _places(inner, (*path, key)))]


@recorded
@settings(deadline=None)
@given(data=st.data())
def test_a_damaged_stream_is_an_answer_or_an_error_of_the_engine(file, data):
    told = copy.deepcopy(events(file))
    *path, last = data.draw(st.sampled_from(_places(told)[1:]))
    parent: Any = told
    for key in path:
        parent = parent[key]
    if data.draw(st.booleans()):
        parent[last] = data.draw(_values)
    else:
        del parent[last]
    try:
        deltas, answer = replayed(dialect(file), [written(told)])
    except EngineError:
        return
    assert all(isinstance(delta.text, str) and delta.text for delta in deltas)
    assert isinstance(answer.text, str)
    assert all(isinstance(call.name, str) and isinstance(call.call_id, str) for call in answer.calls)
    json.dumps(answer.message)
