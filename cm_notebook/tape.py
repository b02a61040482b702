"""Tapes: the turns and decisions of a run, in a file from which they can be played again.

Strategy: JSON Lines, small enough to read in a diff and simple enough to write by hand. The first line says what it is;
every other line is one turn or one decision, and says itself where in a run it belongs, so no line depends on another:

    {"tape": 2, "run": "careful-builder-1", "workflow": "careful-builder"}
    {"path": "planner", "attempt": 1, "text": "1. Write it."}
    {"gate": {"path": "planner", "attempt": 1, "kind": "review"}, "decision": {"action": "reject", "feedback": "Test!"}}
    {"path": "planner", "attempt": 2, "prompt": {"sha256": "9f86…", "start": "Plan a todo CLI"},
     "events": [[310, 13], [640, 11]], "text": "1. Write it. 2. Test it.", "usage": {"input_tokens": 41,
     "output_tokens": 12}, "cost_usd": 0.0004, "duration_s": 0.7}

(the last three are one line). A turn needs ``path``, ``attempt`` and ``text``; ``turn`` counts chained prompts.
``events`` says how the text arrived, ``[ms since the start, characters]`` each, and never repeats it. Where nothing is
said about the prompt, any will do. ``tool_calls`` are what the agent asked of its run before that text, each with what
it had ``said`` until then; agents that it called have lines of their own, with paths like ``lead/qa-engineer#1``. A
turn that failed has an ``error`` (``kind`` and ``message``), and as ``text`` what it had written. A reader takes the
versions that it knows, and refuses by name every key that it does not.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from .errors import EngineError, TransitionError, WorkflowError, did_you_mean
from .events import ACTIONS, Decision, ErrorInfo, Fact, Gate, GateKind, Usage
from .prompts import digest
from .state import check_decision
from .team import ToolCall, wrong_arguments
from .tools import BUILT_IN
from .workflow import Verdict

VERSION = 2
"""Of what is written. A tape of version 1 has fewer keys, which mean the same."""
READ = (1, 2)
_DIGEST = re.compile(r"[0-9a-f]{64}")
_MARK = 24
"""Characters by which the beginning of a part is known again."""

Counted = Annotated[int, Field(ge=1)]
Length = Annotated[int, Field(ge=0)]
Millis = Annotated[int, Field(ge=0, le=86_400_000)]
Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Header(Fact):
    """The first line. ``run``: what a run from this tape is called; ``recorded_at``: an ISO 8601 date, to read."""

    tape: Literal[1, 2] = 2
    run: str | None = None
    workflow: str | None = None
    recorded_at: str | None = None


Digest = Annotated[str, Field(pattern=_DIGEST.pattern + "$")]


class Part(Fact):
    """A piece of a prompt: its ``text``, or of a long one ``sha256``, the number of its ``chars``, and its ``start``.

    ``source``: what the text was put in from, such as ``input goal`` or ``planner``; ``""``: the template's own words.
    On a tape a plain string will do for those.
    """

    source: str = ""
    text: str | None = None
    sha256: Digest | None = None
    chars: Length = 0
    start: str = ""

    @model_validator(mode="before")
    @classmethod
    def _of_text(cls, data: Any) -> Any:
        return {"text": data} if isinstance(data, str) else data

    @model_validator(mode="after")
    def _is_known(self) -> Part:
        if self.text is None and self.sha256 is None:
            raise ValueError("a part of a prompt has its text, or sha256 and chars")
        return self

    @property
    def length(self) -> int:
        """The number of its characters."""
        return len(self.text) if self.text is not None else self.chars

    def stands(self, now: str, at: int) -> bool:
        """Whether it stands in the prompt `now`, from there on."""
        if self.text is not None:
            return now.startswith(self.text, at)
        return at + self.chars <= len(now) and digest(now[at : at + self.chars]) == self.sha256

    @property
    def where(self) -> str:
        """Where it came from, in words."""
        return f"from {self.source}" if self.source else "in its own words"


class Prompt(Fact):
    """The prompt that a turn answered: its ``text``, its ``parts``, or ``sha256`` with the ``start`` that tells which.

    On a tape a plain string will do: the prompt's text, or its digest.
    """

    sha256: Digest | None = None
    start: str = ""
    text: str | None = None
    parts: list[Part] | None = None

    @model_validator(mode="before")
    @classmethod
    def _of_text(cls, data: Any) -> Any:
        if isinstance(data, str):
            return {"sha256": data} if _DIGEST.fullmatch(data) else {"text": data}
        return data

    def difference(self, now: str, known: Callable[[str], str | None] = lambda sha256: None) -> str | None:
        """Where the prompt `now` differs from this one, in a few words; ``None`` when it does not.

        `known` gives the text of a digest, where it is on the tape too.
        """
        if self.text is not None:
            return None if self.text == now else _apart(self.text, now)
        if self.parts is not None:
            return "; ".join(_apart_in(self.parts, now, known)) or None
        if self.sha256 is None or self.sha256 == digest(now):
            return None
        if not self.start:
            return f"the tape holds a digest only; the prompt begins now {_short(now)!r}"
        if not now.startswith(self.start):
            return _apart(self.start, now[: len(self.start) + 40])
        rest = now[len(self.start) :]
        return f"somewhere after {_short(self.start, end=True)!r} (the tape keeps no more of it), now {_short(rest)!r}"


class TapedCall(Fact):
    """A tool that an agent called, or what it asked of its run.

    Attributes
    ----------
    name, arguments
        Which tool, and with what. ``run_agents`` and ``ask_human`` are done again when the tape is played; of all
        others only what they returned is on the tape. No ``arguments``: the call stands above, and returns here.
    said
        What the agent had written before.
    call_id
        By which the agent's engine told of the call; without it, it told nothing.
    permission
        A person was asked whether the tool may be called.
    returned, failed
        What the agent was told of it; of what is done again only where it was refused.
    meant
        The arguments, where those that the engine told of are cut.
    usage, cost_usd, cost_estimated
        What the turn had used by then, where it has said so since its last call.
    """

    name: str
    arguments: dict[str, Any] | str | None = None
    said: str = ""
    call_id: str | None = None
    permission: bool = False
    returned: str | None = None
    failed: bool = False
    meant: dict[str, Any] | None = None
    usage: Usage | None = None
    cost_usd: Amount | None = None
    cost_estimated: bool = False

    @model_validator(mode="after")
    def _can_be_played(self) -> TapedCall:
        if self.again is not None:
            wrong = wrong_arguments(self.name, self.given)
            if wrong is not None:
                raise ValueError(wrong)
        elif self.call_id is None and not self.permission:
            raise ValueError(f"{self.name} needs a call_id, under which its engine told of it. Without: {_PLAYED}")
        return self

    @property
    def given(self) -> dict[str, Any]:
        """The arguments to call it with."""
        return self.meant or (self.arguments if isinstance(self.arguments, dict) else {})

    @property
    def again(self) -> ToolCall | None:
        """What is to be done again, if it is."""
        name: Any = self.name
        if name not in BUILT_IN or self.returned is not None or self.arguments is None:
            return None
        return ToolCall.model_construct(name=name, arguments=self.given)


_PLAYED = " or ".join(BUILT_IN)


_KINDS: list[type[EngineError]] = [EngineError, *EngineError.__subclasses__()]
ERRORS = {kind.__name__: kind for kind in _KINDS}
"""What may be a turn's ``error``, by its ``kind``."""


class TapedTurn(Fact):
    """One turn as it was recorded.

    ``session_id``: of the conversation that later turns continued, if there was one. ``cost_usd``: nothing where it is
    left out; ``null`` where it is not known. ``note``: was said beside the answer.
    """

    path: str
    attempt: Counted
    turn: Counted = 1
    prompt: Prompt | None = None
    session_id: str | None = None
    events: list[tuple[Millis, Length]] = Field(default_factory=list)
    text: str
    tool_calls: list[TapedCall] = Field(default_factory=list)
    error: ErrorInfo | None = None
    retry_in_s: Amount | None = None
    output: Any = None
    verdict: Verdict | None = None
    usage: Usage | None = None
    cost_usd: Amount | None = None
    cost_estimated: bool = False
    duration_s: Amount | None = None
    note: str | None = None

    @field_validator("error")
    @classmethod
    def _of_a_known_kind(cls, error: ErrorInfo | None) -> ErrorInfo | None:
        if error is not None and error.kind not in ERRORS:
            raise ValueError(f"there is no error {error.kind!r}. {did_you_mean(error.kind, ERRORS, 'Possible')}")
        return error

    @model_validator(mode="after")
    def _tried_again_after_an_error(self) -> TapedTurn:
        if self.retry_in_s is not None and self.error is None:
            raise ValueError("retry_in_s goes with an error")
        return self

    @property
    def unpriced(self) -> bool:
        """Whether it is not known what it cost."""
        return self.cost_usd is None and "cost_usd" in self.model_fields_set

    def failure(self, longest_s: float = 0.0) -> EngineError | None:
        """The error with which it ended, if it did; what was tried again then is tried again in at most `longest_s`."""
        if self.error is None:
            return None
        made = ERRORS[self.error.kind](self.error.message)
        made.detail, made.retryable = self.error.detail, self.retry_in_s is not None
        made.duration_s = self.duration_s
        if self.retry_in_s is not None:
            made.retry_after_s = min(self.retry_in_s, longest_s)
        return made

    def pieces(self) -> list[tuple[float, str]]:
        """The text as it arrived: seconds since the start, and a piece. All of it, also when it was edited since."""
        found: list[tuple[float, str]] = []
        start, at_ms = 0, 0
        for ms, length in self.events:
            at_ms = max(at_ms, ms)
            if piece := self.text[start : start + length]:
                found.append((at_ms / 1000, piece))
            start += length
        if rest := self.text[start:]:
            found.append((at_ms / 1000, rest))
        return found


class GatePlace(Fact):
    """Which gate a decision answers. ``ordinal``, the last part of a gate's id, tells apart several of one kind.

    ``about``: the question, or the tool that may be called; a gate that asks something else is not answered.
    """

    path: str
    attempt: Counted
    kind: GateKind
    ordinal: Counted | None = None
    about: str | None = None

    def fits(self, gate: Gate) -> bool:
        """Whether `gate`, at this place, asks what was asked."""
        return self.about is None or self.about == about(gate)


def about(gate: Gate) -> str | None:
    """What `gate` asks in the midst of a turn: the question, or the tool that may be called."""
    told = gate.payload.get({"question": "question", "permission": "tool"}.get(gate.kind, ""))
    return str(told) if told is not None else None


class TapedDecision(Fact):
    """A gate and its answer."""

    gate: GatePlace
    decision: Decision


_PARTS: dict[str, type[BaseModel]] = {
    "gate": GatePlace,
    "decision": Decision,
    "prompt": Prompt,
    "parts": Part,
    "usage": Usage,
    "error": ErrorInfo,
    "tool_calls": TapedCall,
}
_Line = TypeVar("_Line", bound=Fact)


@dataclass(slots=True)
class Tape:
    """What was recorded of a run, found by place. Make one with :meth:`read`.

    Attributes
    ----------
    source
        The file, for messages.
    turns
        By path, attempt and turn.
    tries
        What was tried again by itself in each of them before, in order.
    decisions
        By path, attempt and kind of gate; in the order of the file.
    """

    source: str
    header: Header
    turns: dict[tuple[str, int, int], TapedTurn] = field(default_factory=dict)
    tries: dict[tuple[str, int, int], list[TapedTurn]] = field(default_factory=dict)
    decisions: dict[tuple[str, int, str], list[TapedDecision]] = field(default_factory=dict)
    _asked: dict[tuple[str, str], list[str]] = field(default_factory=dict, repr=False)
    _texts: dict[str, str] = field(default_factory=dict, repr=False)

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Tape:
        """The tape in the file `path`.

        Raises
        ------
        WorkflowError    It cannot be read, or is not a tape; the message names file, line and what is wrong.
        """
        if not isinstance(path, (str, os.PathLike)):
            raise WorkflowError(f"tape={path!r} is not a file. Name one, for instance tape='tapes/01.jsonl'.")
        source = os.fspath(path)
        try:
            data = Path(source).read_bytes()
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            near = sorted(map(str, Path(source).parent.glob("*.jsonl"))) if "\0" not in source else []
            hint = f" {did_you_mean(source, near, 'Here')}" if near else ""
            raise WorkflowError(f"tape {source!r} cannot be read: {reason}.{hint}") from None
        return cls.parse(data, source)

    @classmethod
    def parse(cls, data: bytes, source: str = "tape") -> Tape:
        """The tape that `data` holds; as :meth:`read`."""
        tape: Tape | None = None
        # only "\n" ends a line: str.splitlines would also break at characters that JSON allows inside a text
        for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
            if not line.strip():
                continue
            try:
                value = _value(line)
                if tape is None:
                    tape = cls(source, _header(value))
                else:
                    tape._add(value)
            except WorkflowError as error:
                raise WorkflowError(f"{source}, line {number}: {error}") from None
        if tape is None:
            raise WorkflowError(f"{source} is empty. A tape begins with {_BEGINNING}.")
        return tape

    def _add(self, value: dict[str, Any]) -> None:
        if "gate" in value or "decision" in value:
            taped = _checked(TapedDecision, value)
            place = taped.gate
            _check_answer(taped)
            self.decisions.setdefault((place.path, place.attempt, place.kind), []).append(taped)
            return
        if "path" not in value:
            raise WorkflowError("a turn has 'path', 'attempt' and 'text'; a decision has 'gate' and 'decision'.")
        turn = _checked(TapedTurn, value)
        key = (turn.path, turn.attempt, turn.turn)
        if key in self.turns:
            raise WorkflowError(f"{turn.path!r}, attempt {turn.attempt}, turn {turn.turn} is on the tape already.")
        if turn.retry_in_s is not None:
            self.tries.setdefault(key, []).append(turn)
        else:
            self.turns[key] = turn

    @property
    def run_name(self) -> str:
        """The name that a run from this tape goes by."""
        return self.header.run or Path(self.source).stem

    def turn(self, path: str, attempt: int, turn: int = 1, failures: int = 0) -> TapedTurn | None:
        """What was recorded there, when it has been tried again by itself so often; ``None`` when nothing was."""
        tries = self.tries.get((path, attempt, turn), [])
        return tries[failures] if failures < len(tries) else self.turns.get((path, attempt, turn))

    def text(self, sha256: str) -> str | None:
        """The text of that digest, if it stands on the tape: an answer, or what a person has written."""
        if not self._texts:
            said = [turn.text for turn in self.turns.values()]
            for lines in self.decisions.values():
                given = (line.decision for line in lines)
                said += [text for one in given for text in (one.feedback, one.output, one.prompt) if text is not None]
            self._texts = {digest(text): text for text in said}
        return self._texts.get(sha256)

    def nearest(self, path: str, attempt: int, turn: int = 1) -> TapedTurn | None:
        """What stands in for a turn that is not there: the last answer before it at that `path`, else the next."""

        def closeness(taped: TapedTurn) -> tuple[bool, bool, bool, int, int]:
            before = taped.attempt <= attempt
            nearer = taped.attempt if before else -taped.attempt
            return taped.error is None, taped.turn == turn, before, nearer, taped.turn

        return max((taped for taped in self.turns.values() if taped.path == path), key=closeness, default=None)

    def attempts(self, path: str) -> list[int]:
        """The attempts that were recorded at `path`, in order."""
        return sorted({taped.attempt for taped in self.turns.values() if taped.path == path})

    def decision(self, gate: Gate) -> Decision | None:
        """The recorded answer to `gate`, as by ``"tape"``; ``None`` when there is none.

        Found by path, attempt and kind. Of several there, the one with the gate's ordinal; of those without an ordinal,
        the first for the first gate that is asked about here, the second for the second, and none is given twice.
        """
        lines = [line for line in self.decisions.get((gate.path, gate.attempt, gate.kind), []) if line.gate.fits(gate)]
        place, _, ordinal = gate.id.rpartition("/")
        found = next((line for line in lines if str(line.gate.ordinal) == ordinal), None)
        if found is None:
            free = [line for line in lines if line.gate.ordinal is None]
            asked = self._asked.setdefault((place, f"{gate.kind} {about(gate)}"), []) if free else []
            if gate.id not in asked:
                asked.append(gate.id)
            number = asked.index(gate.id)
            found = free[number] if number < len(free) else None
        return found.decision.model_copy(update={"by": "tape"}) if found is not None else None


_BEGINNING = f'{{"tape": {VERSION}, "run": "a name"}}'


def _value(line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(line.decode("utf-8"), parse_constant=_no_constant)
        json.dumps(value, ensure_ascii=False).encode("utf-8")  # half of a surrogate pair could not be journaled
    except UnicodeError:
        raise WorkflowError("this is not UTF-8 text.") from None
    except json.JSONDecodeError as error:
        raise WorkflowError(f"this is not JSON: {error.msg}, column {error.colno}.") from None
    except (ValueError, RecursionError) as error:
        raise WorkflowError(f"this is not JSON that can be read: {str(error)[:80]}.") from None
    if not isinstance(value, dict):
        raise WorkflowError(f"a JSON object is expected, not {_short(repr(value))}.")
    return value


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number")


def _header(value: dict[str, Any]) -> Header:
    version = value.get("tape")
    if version is None:
        raise WorkflowError(f"this is not a tape, which begins with {_BEGINNING}.")
    if type(version) is not int or version not in READ:
        known = " and ".join(map(str, READ))
        raise WorkflowError(
            f"this tape has the version {_short(repr(version))}; this cm_notebook reads {known}. "
            "A newer one may read it: pip install -U cm-notebook."
        )
    return _checked(Header, value)


def _checked(kind: type[_Line], value: dict[str, Any]) -> _Line:
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
    *parents, last = problem["loc"] or ("",)
    where = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        owner = next((_PARTS[name] for name in reversed(parents) if name in _PARTS), kind)
        raise WorkflowError(f"there is no {where!r}. {did_you_mean(str(last), owner.model_fields, 'Possible')}")
    if problem["type"] == "missing":
        raise WorkflowError(f"{where!r} is missing.")
    wrong = problem["msg"].removeprefix("Value error, ").removesuffix(".")
    raise WorkflowError(f"{where} = {_short(repr(problem['input']))}: {wrong}.")


def _check_answer(taped: TapedDecision) -> None:
    """Refuse now what would be refused when it is played."""
    place = taped.gate
    gate = Gate(
        id="",
        kind=place.kind,
        step=place.path,
        path=place.path,
        attempt=place.attempt,
        digest="",
        actions=ACTIONS[place.kind],
    )
    try:
        check_decision(gate, taped.decision)
    except TransitionError as error:
        raise WorkflowError(str(error)) from None


def _short(text: str, *, end: bool = False) -> str:
    """The beginning of `text`, or its end."""
    if len(text) <= 60:
        return text
    return f"…{text[-60:]}" if end else f"{text[:60]}…"


def _apart(then: str, now: str) -> str:
    """Both texts from a little before the first character in which they differ."""
    same = next((n for n, (a, b) in enumerate(zip(then, now, strict=False)) if a != b), min(len(then), len(now)))
    start = max(0, same - 20)
    before = "…" if start else ""
    return f"recorded {before + _short(then[start:])!r}, now {before + _short(now[start:])!r}"


def _apart_in(parts: Sequence[Part], now: str, known: Callable[[str], str | None]) -> Iterator[str]:
    """What has become of each part that does not stand in the prompt `now` any more."""
    at = 0
    for number, part in enumerate(parts):
        if part.stands(now, at):
            at += part.length
            continue
        # the part ends where the next one that is still there begins
        end = next((found for later in parts[number + 1 :] if (found := _begins(later, now, at)) is not None), len(now))
        was = part.text if part.text is not None else known(part.sha256 or "")
        if was is not None:
            yield f"{_apart(was, now[at:end])} ({part.where})"
        elif now.startswith(part.start, at):
            rest = now[at + len(part.start) : end]
            yield f"somewhere after {_short(part.start, end=True)!r}, now {_short(rest)!r} ({part.where})"
        else:
            yield f"recorded {_short(part.start)!r} and more, now {_short(now[at:end])!r} ({part.where})"
        at = end
    if rest := now[at:]:
        yield f"new at its end {_short(rest)!r}"


def _begins(part: Part, now: str, at: int) -> int | None:
    """Where it begins in `now`, from there on, as far as its first characters say."""
    mark = (part.text if part.text is not None else part.start)[:_MARK]
    found = now.find(mark, at) if mark.strip() else -1
    return found if found >= 0 else None
