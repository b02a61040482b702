"""A server that speaks as models' services do, on the loopback: for what it says and how it fails, tests give a script.

Strategy: a ``Said`` is one answer, byte for byte: its pieces are sent as they are, so that anything can be wrong with
them. ``openai_says`` and ``anthropic_says`` write good ones. Requests are kept as they came.
"""

from __future__ import annotations

import gzip
import json
import socket
import struct
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal


@dataclass
class Said:
    """One answer. ``end``: how the connection ends after the pieces; ``hang`` waits until the server is closed."""

    pieces: list[bytes] = field(default_factory=list)
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    kind: str = "text/event-stream; charset=utf-8"
    end: Literal["well", "cut", "reset", "hang"] = "well"

    def but(self, **changed: Any) -> Said:
        return Said(**{**vars(self), **changed})

    def first(self, count: int, end: Any) -> Said:
        """Only the first pieces of it, and then this end."""
        return self.but(pieces=self.pieces[:count], end=end)

    def zipped(self) -> Said:
        whole = gzip.compress(b"".join(self.pieces))
        pieces = [whole[start : start + 7] for start in range(0, len(whole), 7)]
        return self.but(pieces=pieces, headers={**self.headers, "content-encoding": "gzip"})


def error(status: int, body: Any, **headers: str) -> Said:
    """An answer that is no stream: JSON, or text as it is."""
    kind = "text/html" if isinstance(body, str) and body.startswith("<") else "application/json"
    data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
    return Said([data], status, {name.replace("_", "-"): value for name, value in headers.items()}, kind)


def sse(data: Any, name: str | None = None) -> bytes:
    text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False)
    return ((f"event: {name}\n" if name else "") + f"data: {text}\n\n").encode()


Called = tuple[str, str, str]
"""A call of a tool: id, name, and the arguments as they are written."""
USED = {"input": 100, "output": 20}


def openai_says(
    text: str | Iterable[str] = (),
    *,
    thinking: str = "",
    calls: Iterable[Called] = (),
    used: dict[str, int] | None = USED,
    stop: str | None = None,
    refusal: str = "",
    more: dict[str, Any] | None = None,
) -> Said:
    calls = list(calls)
    pieces = []

    def chunk(delta: Any, finish: str | None = None) -> None:
        choice = {"index": 0, "delta": delta, "finish_reason": finish}
        base = {"id": "c1", "object": "chat.completion.chunk", "created": 1, "model": "m"}
        pieces.append(sse({**base, "choices": [choice]}))

    chunk({"role": "assistant", "content": ""})
    if thinking:
        chunk({"reasoning_content": thinking})
    if refusal:
        chunk({"refusal": refusal})
    for piece in [text] if isinstance(text, str) else text:
        chunk({"content": piece})
    for index, (call_id, name, written) in enumerate(calls):
        head = {"index": index, "id": call_id, "type": "function", "function": {"name": name, "arguments": ""}}
        chunk({"tool_calls": [head]})
        for start in range(0, len(written), 5):
            chunk({"tool_calls": [{"index": index, "function": {"arguments": written[start : start + 5]}}]})
    chunk({}, stop or ("tool_calls" if calls else "stop"))
    if used is not None:
        usage = {"prompt_tokens": used["input"], "completion_tokens": used["output"], "total_tokens": 0, **(more or {})}
        base = {"id": "c1", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": []}
        pieces.append(sse({**base, "usage": usage}))
    return Said([*pieces, sse("[DONE]")])


def anthropic_says(
    text: str | Iterable[str] = (),
    *,
    thinking: str = "",
    calls: Iterable[Called] = (),
    used: dict[str, int] | None = USED,
    stop: str | None = None,
    refusal: str = "",
    more: dict[str, Any] | None = None,
) -> Said:
    calls = list(calls)
    used, pieces, blocks = used or {"input": 0, "output": 0}, [], iter(range(100))
    if refusal:
        text, stop = refusal, "refusal"

    def event(kind: str, **data: Any) -> None:
        pieces.append(sse({"type": kind, **data}, kind))

    def block(start: Any, deltas: Iterable[Any]) -> None:
        index = next(blocks)
        event("content_block_start", index=index, content_block=start)
        for delta in deltas:
            event("content_block_delta", index=index, delta=delta)
        event("content_block_stop", index=index)

    counted = {"input_tokens": used["input"], "output_tokens": 1, **(more or {})}
    message = {"id": "m1", "type": "message", "role": "assistant", "model": "m", "content": [], "usage": counted}
    event("message_start", message={**message, "stop_reason": None, "stop_sequence": None})
    event("ping")
    if thinking:
        parts = [{"type": "thinking_delta", "thinking": thinking}, {"type": "signature_delta", "signature": "c2ln"}]
        block({"type": "thinking", "thinking": "", "signature": ""}, parts)
    said = [text] if isinstance(text, str) else list(text)
    if said:
        block({"type": "text", "text": ""}, [{"type": "text_delta", "text": piece} for piece in said])
    for call_id, name, written in calls:
        pieces_of = [written[start : start + 5] for start in range(0, len(written), 5)]
        parts = [{"type": "input_json_delta", "partial_json": piece} for piece in pieces_of]
        block({"type": "tool_use", "id": call_id, "name": name, "input": {}}, parts)
    reason = stop or ("tool_use" if calls else "end_turn")
    ended = {"output_tokens": used["output"]}
    event("message_delta", delta={"stop_reason": reason, "stop_sequence": None}, usage=ended)
    event("message_stop")
    return Said(pieces)


@dataclass
class Asked:
    """A request as it came."""

    path: str
    headers: dict[str, str]
    body: Any


Script = list[Said] | Callable[[Asked], Said]


class ModelServer:
    """``with ModelServer([…]) as server``: gives the n-th request the n-th answer, and the last one again and again."""

    def __init__(self, script: Script | Said) -> None:
        self.script: Script = [script] if isinstance(script, Said) else script
        self.asked: list[Asked] = []
        self.waiting = threading.Semaphore(0)
        self.closed = threading.Event()
        self._http = _Server(("127.0.0.1", 0), _Handler)
        self._http.served = self
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"

    def answer(self, asked: Asked) -> Said:
        self.asked.append(asked)
        if callable(self.script):
            return self.script(asked)
        return self.script[min(len(self.asked), len(self.script)) - 1]

    def __enter__(self) -> ModelServer:
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closed.set()
        self._http.shutdown()
        self._http.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128
    served: ModelServer

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # a client that goes away, as many tests do


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, *_: Any) -> None:
        pass

    def do_POST(self) -> None:
        served = self.server.served
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        headers = {name.lower(): value for name, value in self.headers.items()}
        said = served.answer(Asked(self.path, headers, json.loads(body)))
        self.send_response(said.status)
        for name, value in {"content-type": said.kind, **said.headers}.items():
            self.send_header(name, value)
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        for piece in said.pieces:
            if piece:
                self.wfile.write(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
                self.wfile.flush()
        if said.end == "hang":
            served.waiting.release()
            served.closed.wait()
        if said.end == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        self.close_connection = said.end != "well"
        if said.end == "well":
            self.wfile.write(b"0\r\n\r\n")
