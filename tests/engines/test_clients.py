"""The services' own clients as the judge: they ask the same server for the same, and get the same out of it."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import anthropic
import openai
import pytest
from openai.lib._pydantic import to_strict_json_schema
from pydantic import BaseModel

import cm_notebook as cm
from cm_notebook.engines.anthropic import Anthropic
from cm_notebook.engines.base import Delta, ToolCalled, TurnDone, UsageReported
from cm_notebook.engines.chat import closed_schema
from cm_notebook.engines.openai import OpenAI
from cm_notebook.testing import collect, request

from .model_server import ModelServer, anthropic_says, openai_says

KEY = "sk-test-0123456789"


class Plan(BaseModel):
    title: str
    steps: list[str]
    risk: float | None


@cm.tool
def add(a: int, b: int = 1) -> int:
    """The sum of two numbers."""
    return a + b


CALLS = [("call_1", "add", '{"a": 2, "b": 3}'), ("call_2", "add", '{"a": 5}')]
HISTORY = [("One?", "First.")]


def ours(engine: Any, **options: Any) -> list[Any]:
    agent = cm.Agent("planner", "Add.", tools=[add], output=Plan)
    turn = request(agent, "Add.", model="test-model", system="Be short.", history=HISTORY, **options)
    return asyncio.run(collect(engine, turn))


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("ANTHROPIC_API_KEY", KEY)


def test_openai():
    good = json.dumps({"title": "T", "steps": [], "risk": None})
    says = openai_says("Let me see.", calls=CALLS, more={"prompt_tokens_details": {"cached_tokens": 7}})
    with ModelServer([says, openai_says(good), says, openai_says(good)]) as server:
        events = ours(OpenAI(base_url=server.url + "/v1"), reasoning_effort="low")
        with openai.OpenAI(base_url=server.url + "/v1", api_key=KEY, max_retries=0) as client:
            tool: Any = {
                "type": "function",
                "function": {"name": "add", "description": add.description, "parameters": add.parameters},
            }
            schema = {"name": "Plan", "schema": to_strict_json_schema(Plan), "strict": True}
            told: list[Any] = [
                {"role": "system", "content": "Be short."},
                {"role": "user", "content": "One?"},
                {"role": "assistant", "content": "First."},
                {"role": "user", "content": "Add."},
            ]
            options: dict[str, Any] = {
                "model": "test-model",
                "stream": True,
                "stream_options": {"include_usage": True},
                "reasoning_effort": "low",
                "tools": [tool],
                "response_format": {"type": "json_schema", "json_schema": schema},
            }
            stream = client.chat.completions.create(messages=told, **options)
            texts, usage, calls = [], None, {}
            for chunk in stream:
                usage = chunk.usage or usage
                for choice in chunk.choices:
                    texts.append(choice.delta.content or "")
                    for piece in choice.delta.tool_calls or ():
                        call = calls.setdefault(piece.index, {"id": piece.id, "name": "", "arguments": ""})
                        call["name"] += piece.function.name or "" if piece.function else ""
                        call["arguments"] += piece.function.arguments or "" if piece.function else ""
            made = [
                {
                    "id": call["id"],
                    "type": "function",
                    "function": {"name": call["name"], "arguments": call["arguments"]},
                }
                for call in calls.values()
            ]
            told += [
                {"role": "assistant", "content": "".join(texts), "tool_calls": made},
                {"role": "tool", "tool_call_id": "call_1", "content": "5"},
                {"role": "tool", "tool_call_id": "call_2", "content": "6"},
            ]
            list(client.chat.completions.create(messages=told, **options))
    first, second, their_first, their_second = server.asked
    assert first.body == their_first.body
    assert second.body == their_second.body
    assert first.path == their_first.path
    assert first.headers["authorization"] == their_first.headers["authorization"]
    text, called = _until_the_tools(events)
    assert text == "".join(texts)
    assert called == [(call["id"], call["name"], json.loads(call["arguments"])) for call in calls.values()]
    reported = next(event for event in events if isinstance(event, UsageReported)).usage
    assert usage is not None
    assert (reported.input_tokens, reported.output_tokens) == (usage.prompt_tokens, usage.completion_tokens)
    assert events[-1] == TurnDone(good, output={"title": "T", "steps": [], "risk": None})


def test_anthropic():
    good = json.dumps({"title": "T", "steps": [], "risk": None})
    says = anthropic_says("Let me see.", thinking="hm", calls=CALLS, more={"cache_read_input_tokens": 7})
    with ModelServer([says, anthropic_says(good), says, anthropic_says(good)]) as server:
        events = ours(Anthropic(base_url=server.url), reasoning_effort="high")
        with anthropic.Anthropic(base_url=server.url, api_key=KEY, max_retries=0) as client:
            options: dict[str, Any] = {
                "model": "test-model",
                "max_tokens": 32_000,
                "system": "Be short.",
                "tools": [{"name": "add", "description": add.description, "input_schema": add.parameters}],
                "thinking": {"type": "adaptive", "display": "summarized"},
                "output_config": {
                    "effort": "high",
                    "format": {"type": "json_schema", "schema": closed_schema(Plan.model_json_schema())},
                },
            }
            told: list[Any] = [
                {"role": "user", "content": "One?"},
                {"role": "assistant", "content": "First."},
                {"role": "user", "content": "Add."},
            ]
            with client.messages.stream(messages=told, **options) as stream:
                answer = stream.get_final_message()
            content = [block.model_dump(exclude_none=True) for block in answer.content]
            results = [
                {"type": "tool_result", "tool_use_id": "call_1", "content": "5", "is_error": False},
                {"type": "tool_result", "tool_use_id": "call_2", "content": "6", "is_error": False},
            ]
            told += [{"role": "assistant", "content": content}, {"role": "user", "content": results}]
            with client.messages.stream(messages=told, **options) as stream:
                stream.until_done()
    first, second, their_first, their_second = server.asked
    assert first.body == their_first.body
    assert second.body == their_second.body
    assert first.path == their_first.path
    for name in ("anthropic-version", "content-type"):
        assert first.headers[name] == their_first.headers[name]
    assert f"Bearer {first.headers['x-api-key']}" == their_first.headers["authorization"]  # both are documented
    text, called = _until_the_tools(events)
    assert text == "".join(block.text for block in answer.content if block.type == "text")
    assert called == [(block.id, block.name, block.input) for block in answer.content if block.type == "tool_use"]
    reported = next(event for event in events if isinstance(event, UsageReported)).usage
    used = answer.usage
    assert reported.input_tokens == used.input_tokens + (used.cache_read_input_tokens or 0)
    assert reported.output_tokens == used.output_tokens


def _until_the_tools(events: list[Any]) -> tuple[str, list[Any]]:
    """The text before the first call, and the calls."""
    start = next(number for number, event in enumerate(events) if isinstance(event, ToolCalled))
    text = "".join(event.text for event in events[:start] if isinstance(event, Delta) and event.kind == "text")
    return text, [(each.call_id, each.name, each.arguments) for each in events if isinstance(each, ToolCalled)]


@pytest.mark.parametrize("kind", [Plan, cm.Verdict])
def test_schemas(kind):
    """As OpenAI's client closes them; what it leaves in besides are defaults, which say nothing to a model."""

    def without_defaults(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: without_defaults(inner) for name, inner in value.items() if name != "default"}
        return [without_defaults(inner) for inner in value] if isinstance(value, list) else value

    closed = closed_schema(kind.model_json_schema())
    assert closed == without_defaults(to_strict_json_schema(kind))
