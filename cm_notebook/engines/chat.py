"""A turn with a model behind an HTTP API: prompt, answer, tools, until the answer is there.

Strategy: the loop is written once, here, and dialects only translate. A dialect (``openai.py``, ``anthropic.py``) makes
the body of a request, and reads the events of a stream into an ``Answer``, without I/O. Of the conversation nothing is
kept between turns: all that is sent comes with the request, which the run makes from its journal.

    send the messages → deltas … → answer ─┬─ calls tools: call them, add what they return, send again (within limits)
                                           ├─ does not fit the output's class: say why, send again, once
                                           └─ else it is the turn's
"""

from __future__ import annotations

import abc
import asyncio
import contextlib
import functools
import inspect
import json
import re
import socket
import urllib.parse
from collections.abc import AsyncIterator, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, cast

from .. import keys
from ..config import SETTINGS, setting, shown
from ..errors import EngineAuthError, EngineError, EngineProtocolError, WorkflowError, did_you_mean
from ..events import Usage
from ..tools import Tool, read_arguments, text_of
from ..workflow import fitted, unfenced
from .base import AgentEvent, AgentRequest, Delta, SessionStarted, ToolCalled, ToolReturned, TurnDone, UsageReported
from .builtin import built_in, refusal
from .functions import Raised, in_thread
from .http import SILENCE_S, Complaint, Connection, no_address
from .prices import Tokens, cost_usd, price_of

LISTENS_S = 0.5
"""So long a server on this machine may take to be there."""
MOST_ROUNDS = 100
"""So often a model may call tools in one turn."""
CUT_OFF = "the answer is cut off: the model reached its limit of output tokens"


@dataclass(slots=True)
class Call:
    """A tool that the model calls, with its arguments as it wrote them."""

    call_id: str
    name: str
    written: str = ""

    @property
    def arguments(self) -> dict[str, Any] | None:
        """The arguments; ``None`` when what was written is no JSON object."""
        try:
            return read_arguments(self.written)
        except ValueError:
            return None


@dataclass(slots=True)
class Answer:
    """What the model said in one exchange, and ``message``: the same in its dialect, to be sent back to it."""

    text: str = ""
    calls: list[Call] = field(default_factory=list)
    stop: Literal["end", "length", "refusal"] = "end"
    tokens: Tokens | None = None
    message: dict[str, Any] = field(default_factory=dict)


class Reader(abc.ABC):
    """Reads the events of one stream; each dialect has its own."""

    ended = False
    """The answer is whole."""
    over = False
    """Nothing more comes."""

    @abc.abstractmethod
    def take(self, event: Any) -> Iterable[Delta]:
        """What an event adds. Any error of a wrong type or a missing key says that the event cannot be read."""

    @abc.abstractmethod
    def answer(self) -> Answer:
        """All of it."""


class ChatEngine(abc.ABC):
    """Models behind an HTTP API. ``OpenAI`` and ``Anthropic`` are its dialects.

    Parameters
    ----------
    name
        By which agents name it. The base URL is the setting ``<name>_base_url``, the key the variable
        ``<NAME>_API_KEY`` or what ``cm.keys.set(name)`` has asked for, looked up for each turn.
    base_url
        In place of the setting.
    silence_s
        Seconds without a byte after which the service is given up.
    tells_cost
        The service says what a turn costs, so no table of prices is needed.
    """

    path: ClassVar[str]

    def __init__(
        self, name: str, *, base_url: str | None = None, silence_s: float = SILENCE_S, tells_cost: bool = False
    ) -> None:
        self.name, self._base_url, self._silence_s, self._tells_cost = name, base_url, silence_s, tells_cost
        self._without_tools = set[str]()
        """Models whose service said that they cannot call tools."""

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name!r}>"

    @property
    def about(self) -> str:
        """Where it is and whether there is a key, for ``cm.doctor()``."""
        variable, where = keys.variable(self.name), keys.source(self.name)
        said = f"{variable} is set" if where == variable else f"key {where}" if where else f"{variable} is not set"
        return f"{shown(self._where())}; {said}"

    @property
    def remedy(self) -> str:
        """What to do before it can be used; ``""``: nothing that could be found out without asking it."""
        if (wrong := no_address(self._where())) is not None:
            return f"{wrong}."
        if self.needs_key and not keys.find(self.name):
            return keys.missing(self.name)
        address = urllib.parse.urlsplit(self._where())
        if address.hostname not in ("localhost", "127.0.0.1", "::1"):
            return ""
        port = address.port or (443 if address.scheme == "https" else 80)
        try:
            socket.create_connection((address.hostname, port), timeout=LISTENS_S).close()
        except OSError:
            setting_name = f"{self.name}_base_url"
            where = f"%config CM.{setting_name} = 'http://…/v1'" if setting_name in SETTINGS else "base_url=…"
            return f"nothing listens there. Start its server, or say where it is: {where}"
        return ""

    def unpriced(self, model: str | None) -> str | None:
        """Why the cost of a turn with `model` would not be known; ``None``: it is, or its service says it."""
        if model is None or self._tells_cost or price_of(model) is not None:
            return None  # a turn without a model fails by itself
        return (
            f"{self.name} has no price for {model!r}. Put it into a table of yours, "
            f"""[models] "{model}" = {{ input = 0, output = 0 }} where it costs nothing, and name that: """
            "%config CM.prices = 'prices.toml'."
        )

    # -- what a dialect says

    @abc.abstractmethod
    def headers(self, key: str) -> dict[str, str]:
        """The headers; with the key, unless it is ``""``."""

    @abc.abstractmethod
    def body(self, request: AgentRequest) -> dict[str, Any]:
        """The first request, with its ``messages``."""

    @abc.abstractmethod
    def reader(self) -> Reader:
        """What reads an answer."""

    @abc.abstractmethod
    def results(self, returned: list[ToolReturned]) -> list[dict[str, Any]]:
        """The messages that tell what tools returned."""

    def complaint(self, event: Any) -> Complaint | None:
        """What `event` complains about, if it does: ``{"error": {"message": …, "type": …}}`` in both dialects."""
        error = event.get("error") if isinstance(event, dict) else None
        if isinstance(error, str):
            return Complaint(error)
        if not isinstance(error, dict):
            return None
        code = error.get("code")
        kind = code if isinstance(code, str) and code else error.get("type")
        status = code if isinstance(code, int) else 0
        return Complaint(str(error.get("message") or ""), str(kind or ""), status)

    # -- the turn

    async def stream(self, request: AgentRequest) -> AsyncIterator[AgentEvent]:
        """Ask the model, call the tools it asks for, and yield what happens; ``TurnDone`` is its last answer.

        Raises
        ------
        EngineError    See :meth:`cm_notebook.engines.http.Connection.events`; also: no model or key is named, the
                       model refuses, answers nothing, or goes on calling tools for ever.
        """
        agent = request.agent
        if agent.missing is not None:
            raise self._error(
                f"agent {agent.id!r} {agent.missing}, which the journal does not keep. Run its cell again, or pass "
                "the workflow: cm.resume(run_id, workflow)."
            )
        if not request.model:
            raise self._error(
                f"agent {agent.id!r} names no model. Write model=…, or both in one: engine='{self.name}:MODEL'."
            )
        try:
            price = price_of(request.model)  # now, as a table that cannot be read must not cost an answer
        except WorkflowError as error:
            raise self._error(str(error)) from None
        tools = {tool.name: tool for tool in (*agent.tools, *built_in(request))}
        if tools.keys() == {"ask_human"} and request.model in self._without_tools:
            tools = {}
        body = self.body(replace(request, agent=agent.model_copy(update={"tools": tuple(tools.values())})))
        spent, opened, written, corrected = _Spent(price), False, False, False
        async with self._connection() as connection:
            for _ in range(MOST_ROUNDS):
                reader, begun = self.reader(), False
                try:
                    async with contextlib.aclosing(self._exchange(connection, body, reader)) as deltas:  # type: ignore[type-var]
                        async for delta in deltas:
                            if delta.kind == "text" and written and not begun:
                                yield Delta("\n\n")
                            begun = begun or delta.kind == "text"
                            yield delta
                except EngineError as error:
                    if tools.keys() == {"ask_human"} and _cannot_use_tools(error) and body.pop("tools", None):
                        self._without_tools.add(request.model)
                        continue  # nobody gave it that tool: it does without
                    if spent.add(body, _so_far(reader)):
                        yield spent.report()
                    raise
                if not opened:
                    opened = True
                    yield SessionStarted()  # what was said can be gone on from, now that there is an answer
                answer, written = _without_keys(reader.answer()), written or begun
                spent.add(body, answer)
                yield spent.report()
                if answer.calls:
                    returned = []
                    for call in answer.calls:
                        arguments = call.arguments
                        yield ToolCalled(call.call_id, call.name, call.written if arguments is None else arguments)
                        told = await _use(call, tools, request)
                        returned.append(replace(told, text=keys.hide(told.text)))  # what the journal shows, no more
                        yield returned[-1]
                    body["messages"] += [answer.message, *self.results(returned)]
                    if request.await_budget is not None:
                        await request.await_budget()
                    continue
                self._check(answer)
                note = CUT_OFF if answer.stop == "length" else None
                if agent.output is None:
                    yield TurnDone(answer.text, note=note)
                    return
                value, wrong = fitted(agent.output, unfenced(answer.text))
                if wrong is None:
                    yield TurnDone(answer.text, output=value)
                    return
                if corrected:
                    problem = f"the answer does not fit {agent.output.__name__}, told so once: {wrong}"
                    raise self._error(problem, EngineProtocolError, line=answer.text[:2000])
                corrected = True
                again = f"This does not fit: {wrong}. Answer again, with JSON that fits the schema and nothing else."
                body["messages"] += [answer.message, {"role": "user", "content": again}]
        raise self._error(f"the model went on calling tools for {MOST_ROUNDS} rounds and did not answer.")

    async def _exchange(self, connection: Connection, body: dict[str, Any], reader: Reader) -> AsyncIterator[Delta]:
        """One request and its answer."""
        async with contextlib.aclosing(connection.events(self.path, body, self.complaint)) as events:  # type: ignore[type-var]
            async for _, data in events:
                if data.strip() == "[DONE]":
                    reader.ended = reader.over = True
                elif data:
                    deltas, failure = self._taken(connection, reader, data)
                    if failure is not None:
                        raise failure
                    for delta in deltas:
                        yield delta
                if reader.over:
                    return
        if not reader.ended:
            raise connection.broken_off()

    def _taken(self, connection: Connection, reader: Reader, data: str) -> tuple[list[Delta], EngineError | None]:
        """What an event adds, or the error that it is; returned, as one raised here would hold what came before it."""
        try:
            event = json.loads(data)
        except (ValueError, RecursionError):
            return [], connection.unreadable("an event that is not JSON", data)
        wrong = self.complaint(event)
        if wrong is not None:
            return [], connection.complain(wrong)
        try:
            return list(reader.take(event)), None
        except (AttributeError, IndexError, KeyError, TypeError, ValueError):
            return [], connection.unreadable("an event of a shape that is not known", data)

    def _connection(self) -> Connection:
        where, key = self._where(), keys.find(self.name)
        if not key and self.needs_key:
            raise EngineAuthError(keys.missing(self.name), engine=self.name)
        if not (key.reveal().isascii() and key.reveal().isprintable()):
            raise self._error(f"{keys.variable(self.name)} holds what is in no key. Copy it again.", EngineAuthError)
        return Connection(
            self.name, where, self.headers(key.reveal()), secrets=(key.reveal(),), silence_s=self._silence_s
        )

    @property
    def needs_key(self) -> bool:
        """Whether it can do nothing without a key: where its service is one of the big ones' own."""
        where, standard = self._where(), SETTINGS.get(f"{self.name}_base_url")
        return standard is not None and where == standard.default and where.startswith("https:")

    def _where(self) -> str:
        if self._base_url is not None:
            return self._base_url
        name = f"{self.name}_base_url"
        if name not in SETTINGS:
            raise self._error(f"no address is known. Give it one: {type(self).__name__}({self.name!r}, base_url=…).")
        return str(setting(name))

    def _check(self, answer: Answer) -> None:
        """Refuse what is no answer."""
        if answer.stop == "refusal":
            raise self._error(f"the model refuses: {answer.text.strip() or 'it gives no reason.'}")
        if not answer.text.strip():
            why = "it used up its limit of output tokens before" if answer.stop == "length" else "the answer is empty"
            raise self._error(f"the model said nothing: {why}.", EngineProtocolError)

    def _error(self, message: str, kind: type[EngineError] = EngineError, **more: Any) -> EngineError:
        return kind(keys.hide(f"{self.name}: {' '.join(message.split())}"), engine=self.name, **more)


def _without_keys(answer: Answer) -> Answer:
    """The answer, with no key in it: one that came in pieces is whole only here."""
    if keys.known():
        answer.text = keys.hide(answer.text)
        answer.message = json.loads(keys.hide(json.dumps(answer.message)))
        for call in answer.calls:
            call.written = keys.hide(call.written)
    return answer


class _Spent:
    """What the exchanges of a turn used and cost together."""

    def __init__(self, price: Mapping[str, float] | None) -> None:
        self._price = price
        self._usage, self._costs, self._estimated = Usage(), list[float | None](), False

    def add(self, body: Mapping[str, Any], answer: Answer | None) -> bool:
        """Count an exchange; where the service does not, four characters are taken for a token."""
        if answer is None:
            return False
        tokens = answer.tokens
        if tokens is None:
            said = len(answer.text) + sum(len(call.written) for call in answer.calls)
            tokens = Tokens(len(json.dumps(body, ensure_ascii=False)) // 4, said // 4)
        counted = Usage(input_tokens=tokens.input, output_tokens=tokens.output, estimated=answer.tokens is None)
        self._usage, self._costs = self._usage + counted, [*self._costs, cost_usd(self._price, tokens)]
        self._estimated = self._estimated or tokens.cost_usd is None
        return True

    def report(self) -> UsageReported:
        """All so far; the cost only where it is known of each exchange."""
        known = [cost for cost in self._costs if cost is not None]
        whole = sum(known) if len(known) == len(self._costs) else None
        return UsageReported(self._usage, whole, cost_estimated=whole is not None and self._estimated)


def _so_far(reader: Reader) -> Answer | None:
    """What came of an answer that was broken off, which is paid for too; ``None``: nothing."""
    try:
        answer = reader.answer()
    except (AttributeError, IndexError, KeyError, StopIteration, TypeError, ValueError):
        return None
    return answer if answer.tokens is not None or answer.text or answer.calls else None


def _cannot_use_tools(error: EngineError) -> bool:
    """Whether the service says that it cannot call tools at all, as those for small models do."""
    return type(error) is EngineError and re.search(r"\btools?\b", str(error), re.IGNORECASE) is not None


async def _use(call: Call, tools: Mapping[str, Tool], request: AgentRequest) -> ToolReturned:
    """Call the tool; whatever goes wrong is told to the model, which may do better."""
    tool, arguments = tools.get(call.name), call.arguments

    def failed(text: str) -> ToolReturned:
        return ToolReturned(call.call_id, call.name, text, failed=True)

    if tool is None or tool.function is None:
        return failed(f"There is no tool {call.name!r}. {did_you_mean(call.name, tools, 'Tools')}")
    if arguments is None:
        return failed(f"The arguments are not a JSON object: {call.written[:200]!r}")
    try:
        checked = tool.check(arguments)
        if tool.ask:
            if request.ask_permission is None:
                return failed("Refused: this needs a person's permission, and nobody can be asked here.")
            permission = await request.ask_permission(tool.name, arguments)
            if not permission.allowed:
                return failed(refusal(permission))
            if permission.arguments is not None:
                checked = tool.check(permission.arguments)
    except WorkflowError as error:
        return failed(str(error))
    except ValueError as error:
        return failed(f"The arguments do not fit: {error}")
    try:
        work = functools.partial(tool.function, **checked)
        if inspect.iscoroutinefunction(tool.function):
            value = await work()
        else:
            value = await in_thread(work, f"cm {request.path} {tool.name}")
            if inspect.isawaitable(value):
                value = await value
        return ToolReturned(call.call_id, call.name, text_of(value))
    except (GeneratorExit, KeyboardInterrupt):
        raise
    except BaseException as error:  # SystemExit too: raised in a task it would end the loop
        if isinstance(error, asyncio.CancelledError) and cast("asyncio.Task[Any]", asyncio.current_task()).cancelling():
            raise  # the turn was cut short; else the function awaited what was cancelled
        raised = error.error if isinstance(error, Raised) else error
        return failed(str(raised) if isinstance(raised, WorkflowError) else f"{type(raised).__name__}: {raised}")


# -- schemas ----------------------------------------------------------------------------------------------------------

_KEPT = ("type", "enum", "const", "description", "title")


def closed_schema(schema: Any) -> dict[str, Any] | None:
    """The part of a JSON schema that services can hold a model to: objects closed, and all their fields required.

    What a service could not check (lengths, patterns) is left out and checked afterwards. ``None``: the schema says
    something that has no such form, as an object with any keys or a tuple.
    """
    try:
        made = _closed(schema)
        if "$defs" in schema:
            made["$defs"] = {name: _closed(inner) for name, inner in schema["$defs"].items()}
    except _NotClosedError:
        return None
    return made


class _NotClosedError(Exception):
    pass


def _closed(schema: dict[str, Any]) -> dict[str, Any]:
    if "$ref" in schema:
        return {"$ref": schema["$ref"]}
    made = {key: schema[key] for key in _KEPT if key in schema}
    either = schema.get("anyOf") or schema.get("oneOf")
    if either is not None:
        made["anyOf"] = [_closed(inner) for inner in either]
    elif schema.get("type") == "object":
        if "properties" not in schema or schema.get("additionalProperties", False) is not False:
            raise _NotClosedError
        made["properties"] = {name: _closed(inner) for name, inner in schema["properties"].items()}
        made["required"], made["additionalProperties"] = list(schema["properties"]), False
    elif schema.get("type") == "array":
        if "items" not in schema:
            raise _NotClosedError
        made["items"] = _closed(schema["items"])
    elif not {"type", "enum", "const"} & made.keys():
        raise _NotClosedError  # anything at all
    return made
