"""One request to a model's service: JSON goes out, the events of its stream come back.

Strategy: this is the only module that knows httpx, and all of it that leaves is an ``EngineError`` that says which kind
of failure it was; whether a turn is tried again is the run's business (``retryable``). A ``Connection`` lives as long
as one turn and closes all it has opened, so nothing is left of a turn that is cancelled. Nobody is believed: what may
be read is bounded, in all and for each event, and silence has an end. No key is in any text or object that leaves:
texts are redacted, and httpx's own errors, which hold the request, are left behind.
"""

from __future__ import annotations

import contextlib
import datetime
import email.utils
import functools
import json
import logging
import re
import ssl
import urllib.parse
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import httpx
import httpx_sse

from .. import keys
from ..config import shown
from ..errors import (
    EngineAuthError,
    EngineError,
    EngineNotFound,
    EngineProtocolError,
    EngineRateLimited,
    EngineTimeout,
    EngineUnavailable,
)

CONNECT_S = 30.0
SILENCE_S = 300.0
"""A model may think for minutes before its first word."""
LONGEST_EVENT = 4_000_000
LONGEST_STREAM = 256_000_000
"""Characters that are read at most: of one event, and of all."""
LONGEST_BODY = 64_000
"""Bytes that are read of an answer that is no stream."""

_KEYS = re.compile(r"\b(?:sk|rk|pk|xai|gsk)[-_][A-Za-z0-9_*.-]{6,}|(?<=[Bb]earer )\S+")
_TOO_LONG = re.compile(
    r"context[ _](?:length|window)|prompt is too long|maximum context|too many tokens", re.IGNORECASE
)
_PAGE = re.compile(r"<(?:!doctype|html|head|body)\b", re.IGNORECASE)
_NO_MONEY = ("insufficient_quota", "billing_hard_limit_reached", "billing_not_active", "billing_error")
_Error = TypeVar("_Error", bound=EngineError)


class _NoKeys(logging.Filter):
    """Takes keys out of what the HTTP client logs: a service may send one back in its headers."""

    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        if (hidden := keys.hide(text)) != text:
            record.msg, record.args = hidden, ()
        return True


for _name in ("httpx", *(f"httpcore.{part}" for part in ("connection", "http11", "http2", "proxy", "socks"))):
    logging.getLogger(_name).addFilter(_NoKeys())


class Complaint(NamedTuple):
    """What a service says went wrong, whatever its dialect: in its words, its name for it, and as an HTTP status."""

    message: str = ""
    kind: str = ""
    status: int = 0


class Connection:
    """Sends requests to one service, for as long as one turn; ``async with`` it.

    Parameters
    ----------
    engine
        Name of the engine, for messages.
    base_url
        Where the service is, such as ``https://api.openai.com/v1``.
    headers
        Sent with each request.
    secrets
        Texts that must not be in any message.
    silence_s
        Seconds without a byte after which the service is given up.

    Raises
    ------
    EngineError    `base_url` is no address.
    """

    def __init__(
        self,
        engine: str,
        base_url: str,
        headers: Mapping[str, str],
        *,
        secrets: tuple[str, ...] = (),
        silence_s: float = SILENCE_S,
    ) -> None:
        self._engine, self._silence_s = engine, silence_s
        self._secrets = tuple(secret for secret in secrets if secret)
        if (wrong := no_address(base_url)) is not None:
            raise self._error(EngineError, f"{wrong}; set {engine}_base_url.")
        address = httpx.URL(base_url.strip())
        self._base = str(address).rstrip("/")
        self._where = str(address.copy_with(username=None, password=None, query=None, fragment=None)).rstrip("/")
        self._client = httpx.AsyncClient(
            headers={"accept": "text/event-stream, application/json", **headers},
            timeout=httpx.Timeout(silence_s, connect=CONNECT_S),
            verify=_trusted(),
        )

    def __repr__(self) -> str:
        return f"<Connection to {self._where}>"

    async def __aenter__(self) -> Connection:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.aclose()

    async def events(
        self, path: str, body: Mapping[str, Any], complaint: Callable[[Any], Complaint | None]
    ) -> AsyncIterator[tuple[str, str]]:
        """Send `body` and yield the name and the data of each event of the answer.

        Parameters
        ----------
        path
            Below the base URL, with its slash.
        complaint
            What a JSON answer complains about, if it does: the one thing about errors that dialects differ in.

        Raises
        ------
        EngineAuthError       401, 403.
        EngineRateLimited     429; with the seconds to wait if the service says so.
        EngineUnavailable     5xx, no connection, or one that broke off.
        EngineNotFound        404: no such model, or no such service at that address.
        EngineTimeout         Silence.
        EngineProtocolError   What comes back is no stream, or too much of it.
        EngineError           The request was refused for another reason.
        """
        failure: EngineError
        try:
            content = json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")
            sent = {"content-type": "application/json"}
            async with self._client.stream("POST", self._base + path, content=content, headers=sent) as response:
                kind = response.headers.get("content-type", "").partition(";")[0].strip().lower()
                if response.status_code == 200 and kind == "text/event-stream":
                    bounded = _Bounded(response)
                    async with contextlib.aclosing(httpx_sse.EventSource(bounded).aiter_sse()) as stream:  # type: ignore[arg-type]
                        async for event in stream:
                            bounded.since = 0
                            yield event.event, keys.hide(event.data)
                    return
                failure = await self._no_stream(response, kind, complaint)
        except httpx.HTTPError as error:
            failure = self._broken(error)
        except _TooMuchError as error:
            failure = self._error(EngineProtocolError, f"{self._where} sent {error}. Nothing sensible is that long.")
        raise failure  # outside of the handlers: an error of httpx holds the request, and so the key

    def complain(self, complaint: Complaint, retry_after_s: float | None = None) -> EngineError:
        """The error for what the service says, by its status or its own name for the error; redacted."""
        message, kind, status = complaint
        said = message.strip() or (f"HTTP status {status}" if status else kind or "no reason was given")
        sentence = said if said.endswith((".", "!", "?")) else f"{said}."  # where one of ours follows
        tell = functools.partial(self._error, retry_after_s=retry_after_s)
        if kind in _NO_MONEY or status == 402:
            return tell(EngineError, f"the account at {self._where} has no credit left: {said}")
        if status == 401 or kind in ("authentication_error", "invalid_api_key"):
            return tell(
                EngineAuthError, f"{self._where} does not accept the key: {sentence} {keys.refused(self._engine)}"
            )
        if status == 403 or kind == "permission_error":
            return tell(EngineAuthError, f"{self._where} does not permit this: {said}")
        if status == 429 or kind.startswith("rate_limit"):
            return tell(EngineRateLimited, f"{self._where} asks for patience: {said}")
        if status >= 500 or kind in ("overloaded_error", "api_error", "server_error", "timeout_error"):
            return tell(EngineUnavailable, f"{self._where} is overloaded or broken: {said}")
        if status == 404 or kind in ("model_not_found", "not_found_error"):
            return tell(EngineNotFound, f"{self._where} does not know this model or address: {said}")
        if kind == "context_length_exceeded" or status == 413 or _TOO_LONG.search(said):
            hint = "Shorten it, or give the step less context=…."
            return tell(EngineError, f"the prompt is too long for the model: {sentence} {hint}")
        return tell(EngineError, f"{self._where} refused the request: {said}")

    def unreadable(self, what: str, line: str) -> EngineProtocolError:
        """The error for an event that cannot be read."""
        text = self._redacted(f"{self._engine}: {self._where} sent {what}: {line[:200]!r}")
        return EngineProtocolError(text, line=self._redacted(line[:2000]), engine=self._engine)

    def broken_off(self) -> EngineUnavailable:
        """The error for a stream that ends before the answer does."""
        return self._error(EngineUnavailable, f"{self._where} broke off before the end of the answer.")

    async def _no_stream(
        self, response: httpx.Response, kind: str, complaint: Callable[[Any], Complaint | None]
    ) -> EngineError:
        """The error for an answer that is no stream."""
        status = response.status_code
        body = b""
        async for chunk in response.aiter_bytes():
            body += chunk
            if len(body) > LONGEST_BODY:
                break
        text = keys.hide(body[:LONGEST_BODY].decode("utf-8", "replace"))  # before it is cut: half a key is one too
        page = kind in ("text/html", "application/xhtml+xml") or _PAGE.search(text[:500]) is not None
        if 300 <= status < 400:
            return self._error(
                EngineError, f"{self._where} sends us elsewhere (HTTP {status}), which is not followed. Is it the API?"
            )
        try:
            found = complaint(json.loads(text))
        except (ValueError, RecursionError, AttributeError, TypeError, KeyError, IndexError):
            found = None
        if status == 200 and found is None:
            what = "a web page" if page else "nothing" if not text.strip() else f"{kind or 'text'} instead of a stream"
            problem = f"{self._where} answered with {what}. Is it the base URL of the API?"
            return self._error(EngineProtocolError, problem, line=self._redacted(text[:2000]))
        if found is None:
            said = "a web page" if page else " ".join(text.split())[:300]
            found = Complaint(f"HTTP status {status}" + (f", {said}" if said else ""))
        if status != 200:
            found = found._replace(status=status)
        return self.complain(found, _retry_after_s(response.headers))

    def _broken(self, error: httpx.HTTPError) -> EngineError:
        said = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, httpx.ConnectTimeout):
            return self._error(EngineUnavailable, f"{self._where} cannot be reached within {CONNECT_S:g} s.")
        if isinstance(error, httpx.TimeoutException):
            return self._error(EngineTimeout, f"{self._where} was silent for {self._silence_s:g} s.")
        if "CERTIFICATE_VERIFY_FAILED" in said:
            return self._error(EngineError, f"{self._where} cannot be trusted: {said}")
        if isinstance(error, httpx.ConnectError):
            return self._error(EngineUnavailable, f"{self._where} cannot be reached: {said}. Does it run?")
        if isinstance(error, httpx.DecodingError):
            return self._error(EngineProtocolError, f"{self._where} sent what cannot be unpacked: {said}")
        if isinstance(error, (httpx.NetworkError, httpx.RemoteProtocolError)):
            return self._error(EngineUnavailable, f"{self._where} dropped the connection: {said}")
        return self._error(EngineError, f"{self._where}: {said}")

    def _error(self, kind: type[_Error], message: str, **more: Any) -> _Error:
        return kind(self._redacted(f"{self._engine}: {' '.join(message.split())}"), engine=self._engine, **more)

    def _redacted(self, text: str) -> str:
        for secret in self._secrets:
            text = text.replace(secret, "[key]")
        return _KEYS.sub("[key]", text)


class _TooMuchError(Exception):
    pass


class _Bounded:
    """A response, as httpx-sse reads it, that ends where it is too long."""

    def __init__(self, response: httpx.Response) -> None:
        self.headers = response.headers
        self.since = self.total = 0
        self._response = response
        response.encoding = "utf-8"  # that of every event stream, whatever the header says

    async def aiter_text(self) -> AsyncIterator[str]:
        async with contextlib.aclosing(self._response.aiter_text()) as texts:  # type: ignore[type-var]
            async for text in texts:
                self.since += len(text)
                self.total += len(text)
                if self.since > LONGEST_EVENT:
                    raise _TooMuchError(f"an event of more than {LONGEST_EVENT:,} characters")
                if self.total > LONGEST_STREAM:
                    raise _TooMuchError(f"more than {LONGEST_STREAM:,} characters")
                yield text


def no_address(base_url: str) -> str | None:
    """Why no service can be at `base_url`, without the password in it; ``None``: there may be one."""
    try:
        address = httpx.URL(base_url.strip())
        urllib.parse.urlsplit(base_url)  # refuses half an IPv6 address, which httpx takes for a name
        if address.scheme in ("http", "https") and address.host:
            return None
    except (httpx.InvalidURL, ValueError):
        pass
    return f"the base URL {shown(base_url)!r} is not an address. Write it like https://api.example.com/v1"


def _retry_after_s(headers: httpx.Headers) -> float | None:
    """Seconds that the service asks us to wait: a number, or the date until when."""
    said = headers.get("retry-after", "").strip()
    try:
        return min(3600.0, max(0.0, float(said)))
    except ValueError:
        pass
    try:
        until = email.utils.parsedate_to_datetime(said)
    except ValueError:
        return None
    if until.tzinfo is None:
        until = until.replace(tzinfo=datetime.UTC)
    left = until - datetime.datetime.now(datetime.UTC)
    return min(3600.0, max(0.0, left.total_seconds()))


@functools.cache
def _trusted() -> ssl.SSLContext:
    """The certificates we trust, read once: they take longer to read than a client to make."""
    return httpx.create_ssl_context()
