"""OpenAI's chat completions, which most services and servers for models speak.

Strategy: a dialect of ``chat.py``. Ollama, vLLM, LM Studio and OpenRouter are this engine under another name, with
another base URL (``config.py``); others are one line: ``cm.register_engine(OpenAI("mine", base_url="http://…/v1"))``.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Iterable
from typing import Any

from .base import AgentRequest, Delta, ToolReturned
from .chat import Answer, Call, ChatEngine, Reader, closed_schema
from .prices import Tokens


class OpenAI(ChatEngine):
    """Models behind an API like OpenAI's; parameters as of :class:`~cm_notebook.engines.chat.ChatEngine`."""

    path = "/chat/completions"

    def __init__(self, name: str = "openai", **options: Any) -> None:
        super().__init__(name, **options)

    def headers(self, key: str) -> dict[str, str]:
        """The headers; with the key, unless it is ``""``."""
        return {"authorization": f"Bearer {key}"} if key else {}

    def body(self, request: AgentRequest) -> dict[str, Any]:
        """The first request."""
        agent = request.agent
        messages = [{"role": "system", "content": request.system}] if request.system else []
        for prompt, answer in request.history:
            messages += [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        messages.append({"role": "user", "content": request.prompt})
        body: dict[str, Any] = {
            "model": request.model,
            "messages": messages,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if request.reasoning_effort:
            body["reasoning_effort"] = request.reasoning_effort
        if agent.tools:
            body["tools"] = [
                {
                    "type": "function",
                    "function": {"name": each.name, "description": each.description, "parameters": each.parameters},
                }
                for each in agent.tools
            ]
        if agent.output is not None:
            schema = agent.output.model_json_schema()
            closed = closed_schema(schema)
            name = re.sub(r"[^A-Za-z0-9_-]", "_", agent.output.__name__)[:64]
            asked = {"name": name, "schema": closed or schema, "strict": closed is not None}
            body["response_format"] = {"type": "json_schema", "json_schema": asked}
        return body

    def reader(self) -> Reader:
        """What reads an answer."""
        return _Reader()

    def results(self, returned: list[ToolReturned]) -> list[dict[str, Any]]:
        """The messages that tell what tools returned."""
        return [{"role": "tool", "tool_call_id": each.call_id, "content": each.text} for each in returned]


Ollama = functools.partial(OpenAI, "ollama")
VLLM = functools.partial(OpenAI, "vllm")
LMStudio = functools.partial(OpenAI, "lmstudio")
OpenRouter = functools.partial(OpenAI, "openrouter", tells_cost=True)


class _Reader(Reader):
    """Reads chunks; a call of a tool comes in pieces, which say by ``index`` which call they belong to."""

    def __init__(self) -> None:
        self._texts: list[str] = []
        self._refusals: list[str] = []
        self._calls: list[Call] = []
        self._places: dict[int, Call] = {}
        self._stop = ""
        self._tokens: Tokens | None = None

    def take(self, event: Any) -> Iterable[Delta]:
        """What a chunk adds."""
        if event.get("usage"):
            self._tokens = _tokens(event["usage"])
        for choice in event.get("choices") or ():
            delta = choice.get("delta") or {}
            # two names of what some services add for models that think
            if thought := _text(delta.get("reasoning_content") or delta.get("reasoning")):
                yield Delta(thought, "thinking")
            if said := _text(delta.get("content")):
                self._texts.append(said)
                yield Delta(said)
            if refusal := _text(delta.get("refusal")):
                self._refusals.append(refusal)
            for piece in delta.get("tool_calls") or ():
                self._piece(piece)
            if choice.get("finish_reason"):
                self._stop, self.ended = choice["finish_reason"], True

    def _piece(self, piece: Any) -> None:
        function = piece.get("function") or {}
        place, call_id = piece.get("index") or 0, _text(piece.get("id"))
        call = self._places.get(place)
        if call is None or (call_id and call_id != call.call_id and function.get("name")):
            call = Call(call_id or f"call_{len(self._calls)}", _text(function.get("name")))
            self._calls.append(call)
            self._places[place] = call
        written = function.get("arguments") or ""
        call.written += written if isinstance(written, str) else json.dumps(written)

    def answer(self) -> Answer:
        """All of it."""
        text = "".join(self._texts)
        message: dict[str, Any] = {"role": "assistant", "content": text or None}
        if self._calls:
            message["tool_calls"] = [
                {
                    "id": call.call_id,
                    "type": "function",
                    # some servers read it, and fail at what is not JSON
                    "function": {"name": call.name, "arguments": json.dumps(call.arguments or {})},
                }
                for call in self._calls
            ]
        if self._refusals or self._stop == "content_filter":
            return Answer("".join(self._refusals) or text, stop="refusal", tokens=self._tokens, message=message)
        return Answer(text, self._calls, "length" if self._stop == "length" else "end", self._tokens, message)


def _text(value: Any) -> str:
    """A text, or none; one in parts is joined."""
    if isinstance(value, list):
        return "".join(_text(part.get("text")) for part in value)
    if value is not None and not isinstance(value, str):
        raise TypeError(value)
    return value or ""


def _tokens(usage: Any) -> Tokens:
    cost = usage.get("cost")
    details = usage.get("prompt_tokens_details") or {}
    return Tokens(
        input=int(usage.get("prompt_tokens") or 0),
        output=int(usage.get("completion_tokens") or 0),
        cached=int(details.get("cached_tokens") or 0),
        cache_write=int(details.get("cache_write_tokens") or 0),
        cost_usd=float(cost) if type(cost) in (int, float) and 0 <= cost < math.inf else None,
    )
