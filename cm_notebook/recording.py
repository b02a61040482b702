"""Recording: the events of a run as the lines of a tape.

Strategy: a tape is a projection of the journal. :class:`Taping` reads events, one by one and in order, and gives the
lines that they make; so any run of the past can be made a tape (:func:`lines_of`), and one that goes on is recorded by
a reader among others (:class:`Recorder`, a feed of the run). What is not in the events, how fast a text came, is added
by who has seen it.

A tape tells the run as it would go without interruption. A turn that was cut short is not on it, and what came after is
counted as if it had not been: attempts, and the agents that it had called. So what agents do who were called waits for
the end of the step that called them, and is left out with it. Neither are the turns of Python functions, which run
again when a tape is played, nor those in which no model was called.

Pauses, going back and switches of the mode are not on it either: they say how a run was driven, not what came of it.
Played, a run is driven as its workflow says, so a gate that did not open in the mode it was recorded in has no decision
on the tape; and cells that go back find what they did then. A tape without what was gone back over is exported.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import tempfile
import time
import weakref
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from . import keys
from .errors import WorkflowError
from .events import (
    NOT_CALLED,
    AgentsCalled,
    AgentsReturned,
    AnyEvent,
    Decision,
    Gate,
    GateDecided,
    GateOpened,
    Part,
    Ref,
    RunStarted,
    SessionOpened,
    ToolCalled,
    ToolReturned,
    TurnCutShort,
    TurnFailed,
    TurnFinished,
    TurnStarted,
    TurnWentOn,
    UsageReported,
    without_keys,
)
from .feed import Feed
from .prompts import digest
from .runstate import RunState
from .state import apply
from .tape import ERRORS, VERSION, Header, Tape, about

_FUNCTION = "function"
"""The name of the engine that calls Python functions."""

Texts = Mapping[Ref, "str | tuple[Part, ...]"]
Place = tuple[str, int, int]
"""Path, attempt and turn."""
Pace = list[tuple[int, int]]
"""How a text arrived: milliseconds since the turn had nothing else to do, and characters, each time."""

WHOLE = 160
"""Characters of a text that was put into a prompt, above which its digest and its beginning stand for it."""
START = 80
"""Characters of that beginning."""
WORDS = 2_000
"""The same of a template's own words."""
MOST_PIECES = 40
"""In so many pieces a text is said to have arrived."""


def lines_of(
    events: Iterable[AnyEvent],
    gone: Container[int] = (),
    fewer: Mapping[int, Mapping[str, int]] | None = None,
) -> list[str]:
    """The lines of the tape that the events of a run make, without their ends; ``[]`` if nothing is to be played.

    A key of a service, as far as it is known here, is in none of them.

    Parameters
    ----------
    events
        All of a run, or its first ones: ``run.events``.
    gone
        Numbers of events that are not to be on it.
    fewer
        By how much less the numbers of the attempts of steps are, from which event on.
    """
    state = RunState()
    taping = Taping(lambda: state.texts)
    learn_keys()
    lines: list[str] = []
    for event in events:
        kept = without_keys(event)
        apply(state, kept)
        if fewer is not None and event.seq in fewer:
            taping.count_less(fewer[event.seq])
        if event.seq not in gone:
            taping.take(kept, lines)
    return lines if len(lines) > 1 else []


def learn_keys() -> None:
    """Know all keys that are at hand, whoever uses them: a tape is made to be given away."""
    for name in keys.names():
        keys.find(name)


@dataclass(slots=True)
class _Turn:
    """A turn that is under way, and what of it will be on the tape."""

    started: TurnStarted
    attempt: int
    waited_s: float = 0.0
    waits_since: float | None = None
    session_id: str | None = None
    calls: list[dict[str, Any]] = field(default_factory=list)
    decisions: list[dict[str, Any]] = field(default_factory=list)
    used: dict[str, Any] = field(default_factory=dict)
    """What it has said that it used, since its last call."""

    def call(self, **entry: Any) -> None:
        """One more call, before which it had said what it used."""
        self.calls.append(entry | self.used)
        self.used = {}

    def took(self, event: TurnFinished | TurnFailed) -> float:
        """The seconds until its end, without those in which it waited."""
        measured = event.duration_s
        return round(max(0.0, event.at - self.started.at - self.waited_s) if measured is None else measured, 2)

    def open_call(self, name: str) -> dict[str, Any] | None:
        """The last call of such a tool that has not returned."""
        return next((call for call in reversed(self.calls) if call.get("open") and call["name"] == name), None)

    def wait(self, at: float) -> None:
        """It waits for others from now on."""
        if self.waits_since is None:
            self.waits_since = at

    def go_on(self, at: float) -> None:
        """It waits no more."""
        if self.waits_since is not None:
            self.waited_s += max(0.0, at - self.waits_since)
            self.waits_since = None


class Taping:
    """Makes lines of events.

    Parameters
    ----------
    texts
        Gives the texts that the events so far refer to (``RunState.texts``).
    header
        The first line, where it is known: of a tape that is played.
    pace
        How the text of a turn arrived, by its place; ``None``: not known.
    waits
        After how many seconds a turn was tried again, by its place and how often it had been before; ``None``: as the
        event says.
    """

    def __init__(
        self,
        texts: Callable[[], Texts],
        header: Header | None = None,
        pace: Callable[[Place, str], Pace | None] = lambda place, text: None,
        waits: Callable[[Place, int], float | None] = lambda place, failures: None,
    ) -> None:
        self._texts, self._header, self._pace, self._waits = texts, header, pace, waits
        self._turns: dict[str, _Turn] = {}
        self._gates: dict[str, tuple[Gate, int, float]] = {}
        self._cuts: dict[str, int] = {}
        self._answers: dict[str, list[dict[str, Any]]] = {}
        """What a turn was answered that was cut short then: the next one does not ask again."""
        self._held: dict[str, list[Any]] = {}
        """What has happened below a step of the workflow, until its turn ends."""
        self._left: dict[str, list[Any]] = {}
        """The same of turns that were cut short, by the path of the agent that was called."""
        self._paths: dict[str, str] = {}
        """The paths of agents that were called, as they are on the tape."""
        self._numbers: dict[str, int] = {}
        self._ranks: dict[str, int] = {}
        """In which order they were called."""
        self._tries: dict[Place, int] = {}
        self._sources: dict[int, str] = {}
        self._stopped = False

    def take(self, event: AnyEvent, lines: list[str]) -> None:
        """Add to `lines` those that `event` makes; ``RunResumed`` takes back the one by which the run had ended."""
        handle = _HANDLERS.get(event.type)
        if handle is not None:
            handle(self, event, lines)

    def count_less(self, attempts: Mapping[str, int]) -> None:
        """From now on the attempts at these paths have numbers that are so much lower."""
        for path, number in attempts.items():
            self._cuts[path] = self._cuts.get(path, 0) + number

    def _write(self, lines: list[str], made: Iterable[Mapping[str, Any]]) -> None:
        for line in made:
            self._stopped = False
            lines.append(keys.hide(json.dumps(line, ensure_ascii=False)))

    # -- the run

    def _run_started(self, event: RunStarted, lines: list[str]) -> None:
        self._input(event, lines)
        name = event.workflow.name
        made: dict[str, Any] = {"tape": VERSION, "run": event.recorded or name, "workflow": name}
        if self._header is not None:
            made |= self._header.model_dump(exclude_none=True, exclude={"tape"})
        elif event.recorded is None:
            made["recorded_at"] = datetime.fromtimestamp(event.at, UTC).date().isoformat()
        self._write(lines, [made])

    def _input(self, event: AnyEvent, lines: list[str]) -> None:
        self._sources[event.seq] = "input "

    def _run_resumed(self, event: AnyEvent, lines: list[str]) -> None:
        if self._stopped:
            lines.pop()
            self._stopped = False

    # -- turns

    def _turn_started(self, event: TurnStarted, lines: list[str]) -> None:
        attempt = event.attempt - self._cuts.get(event.path, 0)
        before = self._answers.pop(event.path, [])
        self._turns[event.path] = _Turn(event, attempt, decisions=before)

    def _session_opened(self, event: SessionOpened, lines: list[str]) -> None:
        self._turns[event.path].session_id = event.session_id

    def _tool_called(self, event: ToolCalled, lines: list[str]) -> None:
        arguments = _as_object(event.arguments)
        self._turns[event.path].call(name=event.name, arguments=arguments, call_id=event.call_id, open=True)

    def _tool_returned(self, event: ToolReturned, lines: list[str]) -> None:
        calls, which = self._turns[event.path].calls, (event.call_id, event.name)
        called = next(call for call in reversed(calls) if call.get("open") and (call["call_id"], call["name"]) == which)
        called.pop("open")
        if called.get("does") and not event.failed:
            return  # it is done again, and returns what comes of that
        came: dict[str, Any] = {"returned": event.text, **({"failed": True} if event.failed else {})}
        if called is calls[-1]:
            called |= came
        else:  # others were called meanwhile
            calls.append({"name": event.name, "call_id": event.call_id, **came})

    def _usage_reported(self, event: UsageReported, lines: list[str]) -> None:
        self._turns[event.path].used = {**_used(event, ended=True), "cost_usd": event.cost_usd}

    def _turn_finished(self, event: TurnFinished, lines: list[str]) -> None:
        turn = self._turns.pop(event.path)
        self._sources[event.seq] = event.path
        if event.note == NOT_CALLED or turn.started.engine == _FUNCTION:
            self._end(event.path, [*turn.decisions], lines)
            return
        turn.go_on(event.at)
        line = self._line(turn, event, event.text)
        if event.output is not None:
            line["output"] = event.output
        if event.verdict is not None:
            line["verdict"] = event.verdict.model_dump(exclude_defaults=True)
        line |= _used(event, ended=True)
        line["duration_s"] = turn.took(event)
        if event.note is not None:
            line["note"] = event.note
        self._end(event.path, [line, *turn.decisions], lines)

    def _turn_failed(self, event: TurnFailed, lines: list[str]) -> None:
        turn = self._turns.pop(event.path)
        if turn.started.engine == _FUNCTION:
            self._end(event.path, [*turn.decisions], lines)
            return
        turn.go_on(event.at)
        line = self._line(turn, event, "")
        if event.retry_in_s is not None:
            line.pop("prompt", None)  # the same is sent again, and stands where that ended
        error = event.error.model_dump(exclude_none=True)
        if error["kind"] not in ERRORS:  # of another package, or a bug
            error["kind"] = "EngineError"
        line["error"] = error
        if event.retry_in_s is not None:
            place = (event.path, turn.attempt, event.turn)
            tries = self._tries[place] = self._tries.get(place, 0) + 1
            taped = self._waits(place, tries - 1)
            line["retry_in_s"] = event.retry_in_s if taped is None else taped
        line |= _used(event, ended=False)
        line["duration_s"] = turn.took(event)
        self._end(event.path, [line, *turn.decisions], lines)

    def _turn_cut_short(self, event: TurnCutShort, lines: list[str]) -> None:
        turn = self._turns.pop(event.path, None)
        self._cuts[event.path] = self._cuts.get(event.path, 0) + 1
        if turn is not None:
            answers = [line for line in turn.decisions if line["decision"]["action"] == "answer"]
            self._answers[event.path] = answers
        if "/" not in event.path:
            for thing in self._held.pop(event.path, ()):
                if not isinstance(thing, AgentsCalled):
                    self._left.setdefault(_where(thing), []).append(thing)
                elif thing.path != event.path:
                    self._left.setdefault(thing.path, []).append(thing)

    def _line(self, turn: _Turn, event: TurnFinished | TurnFailed, text: str) -> dict[str, Any]:
        started = turn.started
        place = (started.path, turn.attempt, started.turn)
        line: dict[str, Any] = {"path": started.path, "attempt": turn.attempt}
        if started.turn > 1:
            line["turn"] = started.turn
        if started.prompt or started.context:
            line["prompt"] = self._prompt(started)
        session_id = (event.session_id if isinstance(event, TurnFinished) else None) or turn.session_id
        if session_id is not None:
            line["session_id"] = session_id
        if turn.calls:
            line["tool_calls"] = [
                {name: value for name, value in call.items() if name not in ("open", "does")} for call in turn.calls
            ]
        if text and (pace := self._pace(place, text)):
            line["events"] = pace
        line["text"] = text
        return line

    def _end(self, path: str, made: list[dict[str, Any]], lines: list[str]) -> None:
        """A turn has ended: what is below it counts."""
        if "/" in path:
            self._held.setdefault(path.partition("/")[0], []).extend(made)
            return
        self._write(lines, made)
        below = []
        for thing in self._held.pop(path, ()):
            if isinstance(thing, AgentsCalled):
                self._number(thing)
            else:
                below.append(thing)
        # in the order in which they were called: that in which they ended may be another one each time
        for line in sorted(below, key=lambda line: self._rank(_where(line))):
            owner = line.get("gate", line)
            owner["path"] = self._paths.get(owner["path"], owner["path"])
            self._write(lines, [line])

    def _number(self, called: AgentsCalled) -> None:
        """Give those who are called for the first time their paths, counted from 1."""
        above = self._paths.get(called.path, called.path)
        for one in (one for group in called.groups for one in group):
            if one.path not in self._paths:
                here = f"{above}/{one.agent}"
                self._numbers[here] = self._numbers.get(here, 0) + 1
                self._paths[one.path] = f"{here}#{self._numbers[here]}"
                self._ranks[one.path] = len(self._ranks)

    def _rank(self, path: str) -> list[int]:
        """Sorts agents below those who called them, and beside each other as they were called."""
        names = path.split("/")
        return [self._ranks.get("/".join(names[: count + 1]), 0) for count in range(1, len(names))]

    # -- what a turn asks for

    def _agents_called(self, event: AgentsCalled, lines: list[str]) -> None:
        self._sources[event.seq] = f"what {event.path} asks"
        top = event.path.partition("/")[0]
        held = self._held.setdefault(top, [])
        for path in [one.path for group in event.groups for one in group]:
            for left in [left for left in self._left if left == path or left.startswith(f"{path}/")]:
                held += self._left.pop(left)
        held.append(event)
        turn = self._turns.get(event.path)
        if turn is None:
            return  # a parallel step
        turn.wait(event.at)
        meant: dict[str, Any] = {"groups": [[_call(one) for one in group] for group in event.groups]}
        if event.max_concurrency is not None:
            meant["max_concurrency"] = event.max_concurrency
        self._does(turn, "run_agents", meant)

    def _does(self, turn: _Turn, name: str, meant: dict[str, Any]) -> None:
        """It is done again when the tape is played: by the arguments that the engine told of, if they are whole."""
        call = turn.open_call(name)
        if call is None:
            turn.call(name=name, arguments=meant)
            return
        call["does"] = True
        if not isinstance(call["arguments"], dict):
            call["meant"] = meant

    def _agents_returned(self, event: AgentsReturned, lines: list[str]) -> None:
        turn = self._turns.get(event.path)
        if turn is not None:
            turn.go_on(event.at)
        else:
            self._sources[event.seq] = event.path
            self._end(event.path, [], lines)

    def _went_on(self, event: TurnWentOn, lines: list[str]) -> None:
        self._turns[event.path].go_on(event.at)

    def _gate_opened(self, event: GateOpened, lines: list[str]) -> None:
        gate = event.gate
        self._gates[gate.id] = (gate, gate.attempt - self._cuts.get(gate.path, 0), event.at)
        turn = self._turns.get(gate.path)
        if turn is None or gate.kind == "budget":
            return
        turn.wait(event.at)
        if gate.kind == "question":
            self._does(turn, "ask_human", {"question": gate.payload.get("question", "")})
            return
        tool, arguments = str(gate.payload.get("tool", "")), gate.payload.get("arguments", {})
        call = turn.open_call(tool)
        if call is None:
            turn.call(name=tool, arguments=arguments, permission=True)
            return
        call["permission"] = True
        if not isinstance(call["arguments"], dict):
            call["meant"] = arguments

    def _gate_decided(self, event: GateDecided, lines: list[str]) -> None:
        gate, attempt, opened_at = self._gates.pop(event.gate_id)
        self._sources[event.seq] = gate.path
        turn = self._turns.get(gate.path)
        place: dict[str, Any] = {"path": gate.path, "attempt": attempt, "kind": gate.kind}
        if (asked := about(gate)) is not None:
            place["about"] = asked
        line = {"gate": place, "decision": _decision(event.decision)}
        if gate.kind == "may_have_run":
            return  # only a turn that was cut short asks for it
        if turn is not None:
            if gate.kind == "budget":
                turn.waited_s += max(0.0, event.at - opened_at)
            elif "/" not in gate.path:
                turn.go_on(event.at)
            turn.decisions.append(line)
        elif "/" in gate.path:
            self._held.setdefault(gate.path.partition("/")[0], []).append(line)
        else:
            self._write(lines, [line])
            self._stopped = event.decision.action == "stop"

    # -- prompts

    def _prompt(self, started: TurnStarted) -> Any:
        """The prompt as it stands on the tape: short ones whole, of long ones what each part of them came from."""
        parts: list[tuple[str, str]] = []
        for source, text in self._pieces(started.prompt + (started.context or ())):
            if parts and parts[-1][0] == source == "":
                parts[-1] = ("", parts[-1][1] + text)
            elif text:
                parts.append((source, text))
        whole = "".join(text for _source, text in parts)
        if len(whole) <= WHOLE and all(source == "" for source, _text in parts):
            return whole if len(whole) != len(digest("")) else {"text": whole}
        return {"parts": [_part(source, text) for source, text in parts]}

    def _pieces(self, parts: Iterable[Part]) -> Iterator[tuple[str, str]]:
        """What `parts` came from, and their texts."""
        texts = self._texts()
        for part in parts:
            if isinstance(part, str):
                yield "", part
            elif isinstance(text := texts[Ref(*part)], str):
                yield self._source(Ref(*part)), text
            elif part.name in ("prompt", "context"):
                yield from self._pieces(text)
            else:  # what the members of a parallel step have said, together
                yield self._source(Ref(*part)), "".join(piece for _source, piece in self._pieces(text))

    def _source(self, ref: Ref) -> str:
        """Where a text came from, in words."""
        where = self._sources.get(ref.seq, "")
        if where == "input " or ref.name.startswith("."):
            return where + ref.name
        if ref.name in ("feedback", "reason"):
            return f"{ref.name} {'of' if ref.name == 'reason' else 'on'} {where}"
        if ref.name.startswith("file "):
            return ref.name
        return where


_HANDLERS: dict[str, Callable[[Taping, Any, list[str]], None]] = {
    "RunStarted": Taping._run_started,
    "RunResumed": Taping._run_resumed,
    "WorkflowChanged": Taping._input,
    "StepAdded": Taping._input,
    "StepChanged": Taping._input,
    "TurnStarted": Taping._turn_started,
    "SessionOpened": Taping._session_opened,
    "ToolCalled": Taping._tool_called,
    "ToolReturned": Taping._tool_returned,
    "UsageReported": Taping._usage_reported,
    "TurnFinished": Taping._turn_finished,
    "TurnFailed": Taping._turn_failed,
    "TurnCutShort": Taping._turn_cut_short,
    "AgentsCalled": Taping._agents_called,
    "AgentsReturned": Taping._agents_returned,
    "TurnWentOn": Taping._went_on,
    "GateOpened": Taping._gate_opened,
    "GateDecided": Taping._gate_decided,
}


def _answered(line: str) -> bool:
    """Whether it is a turn that an agent has answered."""
    made = json.loads(line)
    return "path" in made and "error" not in made


def _where(line: Mapping[str, Any]) -> str:
    return str(line["gate"]["path"] if "gate" in line else line["path"])


def _as_object(written: str) -> dict[str, Any] | str:
    """Arguments as an object, where that is written in the same way again."""
    try:
        value = json.loads(written)
    except (ValueError, RecursionError):
        return written
    return value if isinstance(value, dict) and json.dumps(value, ensure_ascii=False) == written else written


def _call(one: Any) -> dict[str, Any]:
    call: dict[str, Any] = {"agent": one.agent, "prompt": one.prompt}
    if one.files:
        call["input_files"] = list(one.files)
    if one.tail is not None:
        call["tail"] = one.tail
    return call


def _used(event: TurnFinished | TurnFailed | UsageReported, *, ended: bool) -> dict[str, Any]:
    """What it used; what it cost is left out where that was nothing."""
    made: dict[str, Any] = {}
    if event.usage is not None:
        made["usage"] = event.usage.model_dump(exclude_defaults=True)
    if event.cost_usd or (event.cost_usd is None and ended):
        made["cost_usd"] = event.cost_usd
    if event.cost_estimated:
        made["cost_estimated"] = True
    return made


def _decision(decision: Decision) -> dict[str, Any]:
    """What was decided, not by whom: when it is played, it is the tape that decides."""
    made = decision.model_dump(exclude_defaults=True, exclude={"by"})
    if decision.scope == "always":  # a person's own list is for persons to write
        made["scope"] = "run"
    return made


def _part(source: str, text: str) -> Any:
    if len(text) <= (WHOLE if source else WORDS):
        return {"source": source, "text": text} if source else text
    named = {"source": source} if source else {}
    return {**named, "sha256": digest(text), "chars": len(text), "start": text[:START]}


# -- while a run goes on ----------------------------------------------------------------------------------------------


class Recorder(Feed):
    """Writes the tape of a run while it goes on, as one of those who watch it.

    A tape that stood in the file is replaced as soon as an agent has answered, and not before: as a whole, so that the
    file is always a tape. From then on lines are added as they come. A run that goes on after its end or after its
    process has died, and a fork, writes its tape anew, from its events.

    Parameters
    ----------
    file
        Where; see :func:`check`.
    events, texts
        Give what has happened in the run so far, and the texts that it refers to.
    tape
        What the run plays, if it does: what it records is the same again.
    """

    def __init__(
        self,
        file: str | os.PathLike[str],
        events: Callable[[], list[AnyEvent]],
        texts: Callable[[], Texts],
        tape: Tape | None = None,
    ) -> None:
        super().__init__(lambda: None)
        self.file = Path(file).absolute()
        self._events, self._texts, self._tapes = events, texts, [tape] if tape is not None else []
        self._header = tape.header if tape is not None else None
        self._taping = self._anew()
        self._lines: list[str] = []
        """Those that are not in the file yet."""
        self._close: Callable[[], object] | None = None
        self._handle = -1
        self._broken = False
        self._since: dict[str, float] = {}
        self._paces: dict[str, Pace] = {}
        learn_keys()

    def _anew(self) -> Taping:
        return Taping(self._texts, self._header, self._pace, self._waits)

    def put(self, event: AnyEvent) -> None:
        """Write what `event` makes."""
        if self._broken:
            return
        try:
            if event.type in ("RunResumed", "RunForked"):
                self._read_again(event.seq)
                return
            before = len(self._lines)
            self._taping.take(event, self._lines)
            if len(self._lines) > before and event.type != "RunStarted":
                self._write()
            if event.type in _GOES_ON:
                where = getattr(event, "path", "")
                self._since[where], self._paces[where] = time.monotonic(), []
            if event.type == "RunFinished" and self._close is not None:
                self._close()
                self._close = None
        except OSError as error:  # the run itself goes on: its journal has all of it
            self._broken = True
            logging.getLogger("cm_notebook").warning(
                "cm: the tape %s cannot be written: %s. The run goes on without it; its journal has all that happened.",
                self.file,
                error.strerror or error,
            )

    def put_text(self, path: str, attempt: int, text: str, kind: Literal["text", "thinking"] = "text") -> None:
        """Note when so much text came."""
        since = self._since.get(path)
        if kind != "text" or since is None or self._broken:
            return
        pace, ms = self._paces[path], round(1000 * (time.monotonic() - since))
        if pace and ms - pace[-1][0] < _TOGETHER_MS:
            pace[-1] = (pace[-1][0], pace[-1][1] + len(text))
        else:
            pace.append((ms, len(text)))

    def _read_again(self, seq: int) -> None:
        """Begin anew, with what the run has done so far; how fast that came may stand in the file."""
        with contextlib.suppress(WorkflowError):  # there is none yet
            self._tapes.append(Tape.read(self.file))
        if self._close is not None:
            self._close()
        self._taping, self._lines, self._close = self._anew(), [], None
        for event in self._events():
            if event.seq <= seq:
                self._taping.take(event, self._lines)
        if len(self._lines) > 1:  # what was decided while nobody drove it may be the last that is
            self._write()

    def _write(self) -> None:
        if self._close is None and not any(map(_answered, self._lines)) and self._answers_there():
            return  # one where everything failed is not worth the one that is there
        data = "".join(f"{line}\n" for line in self._lines).encode()
        if self._close is None:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            replace(self.file, data)
            self._handle = os.open(self.file, os.O_WRONLY | os.O_APPEND)
            self._close = weakref.finalize(self, os.close, self._handle)
        else:
            while data:
                data = data[os.write(self._handle, data) :]
        self._lines.clear()

    def _answers_there(self) -> bool:
        """Whether the file holds a tape on which an agent has answered, or that cannot be read."""
        try:
            return self.file.exists() and any(turn.error is None for turn in Tape.read(self.file).turns.values())
        except WorkflowError:
            return True

    def _pace(self, place: Place, text: str) -> Pace | None:
        for tape in self._tapes:
            taped = tape.turns.get(place)
            if taped is not None and taped.text == text and taped.error is None:
                return taped.events
        return _gathered(self._paces.pop(place[0], []), len(text))

    def _waits(self, place: Place, failures: int) -> float | None:
        for tape in self._tapes:
            taped = tape.turn(*place, failures)
            if taped is not None and taped.retry_in_s is not None:
                return taped.retry_in_s
        return None


_GOES_ON = ("TurnStarted", "ToolReturned", "AgentsReturned", "TurnWentOn")
"""From then on a turn has nothing to wait for but its agent."""
_TOGETHER_MS = 50
"""What comes within this time is one piece."""


def _gathered(pace: Pace, length: int) -> Pace:
    """The last so many characters of a text, in not too many pieces."""
    left, found = length, Pace()
    for ms, count in reversed(pace):
        if left <= 0:
            break
        found.append((ms, min(count, left)))
        left -= count
    found.reverse()
    if left > 0 and found:
        found[0] = (found[0][0], found[0][1] + left)
    step = -(-len(found) // MOST_PIECES) or 1
    groups = (found[start : start + step] for start in range(0, len(found), step))
    return [(group[-1][0], sum(count for _ms, count in group)) for group in groups]


def replace(file: Path, data: bytes) -> None:
    """Put `data` in the place of what `file` holds, as a whole, for its owner alone to read."""
    handle, made = tempfile.mkstemp(prefix=f".{file.name}.", dir=file.parent)
    try:
        with os.fdopen(handle, "wb") as out:
            out.write(data)
            out.flush()
            os.fsync(out.fileno())
        Path(made).replace(file)
    except BaseException:
        Path(made).unlink()
        raise


def check(record: object, tape: Tape | None) -> None:
    """Refuse a file that cannot be recorded to.

    Raises
    ------
    WorkflowError    It cannot be written, is the tape that is to be played, or holds something else than a tape.
    """
    if not isinstance(record, (str, os.PathLike)) or not str(record):
        raise WorkflowError(f"record={record!r} is not a file. Name one, for instance record='tapes/01.jsonl'.")
    file = Path(record)
    shown = repr(str(record))
    try:
        if "\0" in str(record):
            raise ValueError("a name holds no null character")
        _check_file(file, shown)
        same = tape is not None and Path(tape.source).exists() and file.exists() and file.samefile(tape.source)
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise WorkflowError(
            f"record={shown} cannot be written: {why}. Name a file in a folder of yours, for instance "
            "record='tapes/01.jsonl'."
        ) from None
    if same:
        raise WorkflowError(
            f"record={shown} is the tape that is played: nothing new would come of it. Leave out tape= (--tape) to "
            "record it again, which calls a model; or record to another file."
        )


def _check_file(file: Path, shown: str) -> None:
    if file.is_dir():
        raise WorkflowError(f"record={shown} is a folder. Name a file in it, for instance '{file / 'run.jsonl'}'.")
    if file.exists():
        with file.open("rb") as there:
            first = there.readline(10_000)
        try:
            Tape.parse(first)
        except WorkflowError:
            if first.strip():
                raise WorkflowError(
                    f"record={shown} is there already, and no tape; it would be lost. Name another file, or delete it."
                ) from None
    folder = file.absolute().parent
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    with tempfile.TemporaryFile(dir=folder):
        pass


def check_heard(record: object, engines: Iterable[Any]) -> None:
    """Refuse to record where nobody is asked, as far as is known: `engines` do what there is to do.

    Raises
    ------
    WorkflowError    All of them show only what would be sent.
    """
    names = {engine.name for engine in engines}
    if names - {_FUNCTION} == {"offline"}:
        raise WorkflowError(
            f"record={str(record)!r}: there is nothing to record, as the engine is 'offline', which calls no model. "
            "Name one that does (engine=, --engine), or a tape to play."
        )
