"""Members in parallel, and models over HTTP: what they cost beside the disk, and beside reading the stream by hand."""

from __future__ import annotations

import itertools
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import httpx_sse
import pytest

import cm_notebook as cm
from cm_notebook.engines.openai import OpenAI
from cm_notebook.journal import Journal
from cm_notebook.testing import request
from tests.benchmarks import measure
from tests.benchmarks.measure import SIZE, Rounds, Time, finish, on_a_thread, paired, peak_memory, piece, stopwatch

_numbers = itertools.count()


@cm.agent("member")
async def member(turn: cm.Turn) -> str:
    """One that costs nothing and produces 1 KiB."""
    return turn.path.ljust(SIZE)


def team(members: int) -> cm.Workflow:
    """A workflow of one step that calls so many members at once."""

    @cm.agent("caller")
    async def caller(turn: cm.Turn) -> str:
        calls = [{"agent": "member", "prompt": f"Part {number}"} for number in range(members)]
        results = await turn.run_agents([calls])
        return str(sum(len(result.text) for result in results))

    return cm.Workflow(
        f"team of {members}",
        agents=[caller, member],
        steps=[cm.step("caller")],
        sub_agents=["member"],
        max_concurrency=members,
        autonomous_mode="always",
    )


@pytest.fixture(scope="module")
def fan_out(tmp_path_factory) -> dict[int, Rounds]:
    """Fan-out and fan-in, durable, beside the floor that commits each member: time for each member."""
    folder = tmp_path_factory.mktemp("team")

    def new_file() -> Path:
        return folder / f"{next(_numbers)}.db"

    def figures(members: int, rounds: int) -> Rounds:
        def ours() -> Time:
            return finish(team(members), Journal(new_file()), workspace=folder / "work").per(members)

        def floor() -> Time:
            return measure.rows_committed(new_file(), members).per(members)

        return paired(ours, floor, rounds=rounds)

    return {10: figures(10, 20), 100: figures(100, 10), 1_000: figures(1_000, 5), 10_000: figures(10_000, 2)}


@pytest.mark.parametrize("members", [10, 100, 1_000])
def test_fan_out_and_fan_in(budget, fan_out, members):
    times = 1 if members == 1_000 else None
    budget(f"fan-out of {members:,} durable members", fan_out[members].wall, "ms/member", times=times)


def test_a_member_costs_the_same_among_many(budget, fan_out):
    growth = fan_out[10_000].cpu.ours / fan_out[1_000].cpu.ours
    budget("fan-out, a member of 10,000 ÷ one of 1,000", growth, "×", at_most=1.5)


def test_memory_of_a_fan_out(budget):
    workflow, journal = team(1_000), Journal(Path("journal.db").absolute())
    finish(team(10), journal)  # what is loaded at first use
    with peak_memory() as peak:
        run = workflow.start(journal=journal).wait()
    assert run.status == "completed"
    budget("peak memory, fan-out of 1,000 durable members", peak() / 1_000, "KiB/member")


# -- models over HTTP --------------------------------------------------------------------------------------------------


def chunks(count: int) -> bytes:
    """A streamed answer of so many pieces of text, as OpenAI's API sends it."""

    def event(choices: list[Any], **more: Any) -> bytes:
        base = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": choices, **more}
        return b"data: " + json.dumps(base).encode() + b"\n\n"

    said = [event([{"index": 0, "delta": {"content": piece(number)}}]) for number in range(count)]
    said += [event([{"index": 0, "delta": {}, "finish_reason": "stop"}])]
    said += [event([], usage={"prompt_tokens": 1, "completion_tokens": count, "total_tokens": count + 1})]
    return b"".join(said) + b"data: [DONE]\n\n"


@pytest.fixture
def serve():
    """Function that starts a server on the loopback, which gives each request the same stream; it returns its URL."""
    servers: list[ThreadingHTTPServer] = []

    def start(body: bytes) -> str:
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["content-length"]))
                self.send_response(200)
                self.send_header("content-type", "text/event-stream")
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        servers.append(server)
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        return f"http://127.0.0.1:{server.server_address[1]}/v1"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_a_chunk_costs_little_beside_reading_it(budget, serve, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "not-needed")
    count, engine = 20_000, OpenAI(base_url=(url := serve(chunks(20_000))))

    async def ours() -> Time:
        characters = 0
        with stopwatch() as passed:
            async for event in engine.stream(request(model="m")):
                characters += len(event.text) if isinstance(event, cm.Delta) else 0
        assert characters == sum(len(piece(number)) for number in range(count))
        return passed()

    async def floor() -> Time:
        characters = 0
        with stopwatch() as passed:
            async with (
                httpx.AsyncClient() as client,
                httpx_sse.aconnect_sse(client, "POST", url + "/chat/completions", json={}) as source,
            ):
                async for event in source.aiter_sse():
                    if event.data != "[DONE]" and (choices := json.loads(event.data)["choices"]):
                        characters += len(choices[0]["delta"].get("content") or "")
        assert characters == sum(len(piece(number)) for number in range(count))
        return passed()

    rounds = paired(lambda: on_a_thread(ours()).per(count), lambda: on_a_thread(floor()).per(count), rounds=7)
    budget("streamed chunk over HTTP; floor: httpx and httpx-sse by hand", rounds.cpu, "µs/chunk")
