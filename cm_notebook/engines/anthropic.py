"""Anthropic's messages API.

Strategy: a dialect of ``chat.py``. An answer is a list of blocks (text, thinking, calls of tools), each streamed in
pieces; they are put together as they came and sent back as they were, as thinking must be when tools are used.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from .base import AgentRequest, Delta, ToolReturned
from .chat import Answer, Call, ChatEngine, Reader, closed_schema
from .prices import Tokens

MAX_TOKENS = 32_000
"""An answer may be so long; the API wants to be told."""


class Anthropic(ChatEngine):
    """Models behind Anthropic's API; parameters as of :class:`~cm_notebook.engines.chat.ChatEngine`.

    Parameters
    ----------
    max_tokens
        Tokens that an answer may have, thinking included.

    Notes
    -----
    ``reasoning_effort`` is a word (``low``, ``medium``, ``high``, ``xhigh``, ``max``: the model thinks as it sees fit),
    ``none``, or for older models a number of tokens to think with.
    """

    path = "/v1/messages"

    def __init__(self, name: str = "anthropic", *, max_tokens: int = MAX_TOKENS, **options: Any) -> None:
        super().__init__(name, **options)
        self._max_tokens = max_tokens

    def headers(self, key: str) -> dict[str, str]:
        """The headers; with the key, unless it is ``""``."""
        return {"anthropic-version": "2026-10-21", **({"x-api-key": key} if key else {})}

    def body(self, request: AgentRequest) -> dict[str, Any]:
        """The first request."""
        agent, effort = request.agent, request.reasoning_effort
        messages: list[dict[str, Any]] = []
        for prompt, answer in request.history:
            messages += [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        messages.append({"role": "user", "content": request.prompt})
        body: dict[str, Any] = {
            "model": request.model,
            "max_tokens": self._max_tokens,
            "messages": messages,
            "stream": True,
        }
        asked: dict[str, Any] = {}
        system = [request.system] if request.system else []
        if effort == "none":
            body["thinking"] = {"type": "disabled"}
        elif effort and effort.isdecimal():
            body["thinking"] = {"type": "enabled", "budget_tokens": int(effort)}
            body["max_tokens"] += int(effort)
        elif effort:
            body["thinking"] = {"type": "adaptive", "display": "summarized"}
            asked["effort"] = effort
        if agent.tools:
            body["tools"] = [
                {"name": each.name, "description": each.description, "input_schema": each.parameters}
                for each in agent.tools
            ]
        if agent.output is not None:
            schema = agent.output.model_json_schema()
            closed = closed_schema(schema)
            if closed is not None:
                asked["format"] = {"type": "json_schema", "schema": closed}
            else:
                system.append(f"Answer with JSON that fits this schema, and nothing else:\n{json.dumps(schema)}")
        if asked:
            body["output_config"] = asked
        if system:
            body["system"] = "\n\n".join(system)
        return body

    def reader(self) -> Reader:
        """What reads an answer."""
        return _Reader()

    def results(self, returned: list[ToolReturned]) -> list[dict[str, Any]]:
        """The message that tells what tools returned."""
        content = [
            {"type": "tool_result", "tool_use_id": each.call_id, "content": each.text, "is_error": each.failed}
            for each in returned
        ]
        return [{"role": "user", "content": content}]


class _Reader(Reader):
    """Puts blocks together."""

    def __init__(self) -> None:
        self._blocks: list[dict[str, Any]] = []
        self._calls: list[Call] = []
        self._places: dict[int, dict[str, Any]] = {}  # some services count from 0 again and again
        self._stop = ""
        self._usage: dict[str, int] = {}

    def take(self, event: Any) -> Iterable[Delta]:
        """What an event adds."""
        kind = event["type"]
        if kind == "message_start":
            self._count(event["message"].get("usage"))
        elif kind == "content_block_start":
            block = self._places[int(event["index"])] = dict(event["content_block"])
            self._blocks.append(block)
            if block["type"] == "tool_use":
                given = block.get("input")
                self._calls.append(Call(_text(block["id"]), _text(block["name"]), json.dumps(given) if given else ""))
            elif block["type"] in ("text", "thinking") and (said := _text(block.get(block["type"], ""))):
                yield Delta(said, block["type"])
        elif kind == "content_block_delta":
            yield from self._delta(int(event["index"]), event["delta"])
        elif kind == "message_delta":
            self._stop = event["delta"].get("stop_reason") or self._stop
            self._count(event.get("usage"))
        elif kind == "message_stop":
            self.ended = self.over = True

    def _delta(self, index: int, delta: Any) -> Iterable[Delta]:
        block, kind = self._places[index], delta["type"]
        if kind == "text_delta":
            block["text"] = block.get("text", "") + _text(delta["text"])
            if delta["text"]:
                yield Delta(delta["text"])
        elif kind == "thinking_delta":
            block["thinking"] = block.get("thinking", "") + _text(delta["thinking"])
            if delta["thinking"]:
                yield Delta(delta["thinking"], "thinking")
        elif kind == "signature_delta":
            block["signature"] = block.get("signature", "") + _text(delta["signature"])
        elif kind == "input_json_delta":
            self._calls[-1].written += _text(delta["partial_json"])

    def _count(self, usage: Any) -> None:
        """Counts are of all so far; those left out stay as they were."""
        self._usage.update({name: int(count) for name, count in (usage or {}).items() if isinstance(count, int)})

    def answer(self) -> Answer:
        """All of it."""
        content, calls = [], iter(self._calls)
        for block in self._blocks:
            if block["type"] == "tool_use":
                content.append({**block, "input": next(calls).arguments or {}})
            elif block["type"] != "text" or block.get("text"):  # an empty one is refused when it is sent back
                content.append(block)
        text = "".join(block["text"] for block in content if block["type"] == "text")
        used, stop = self._usage, self._stop
        written, cached = used.get("cache_creation_input_tokens", 0), used.get("cache_read_input_tokens", 0)
        tokens = Tokens(
            input=used.get("input_tokens", 0) + written + cached,
            output=used.get("output_tokens", 0),
            cached=cached,
            cache_write=written,
        )
        message = {"role": "assistant", "content": content}
        if stop == "refusal":
            return Answer(text, stop="refusal", tokens=tokens if used else None, message=message)
        cut = stop in ("max_tokens", "model_context_window_exceeded")
        return Answer(text, self._calls, "length" if cut else "end", tokens if used else None, message)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(value)
    return value
