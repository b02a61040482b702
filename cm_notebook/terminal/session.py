"""A run in the terminal, from its start to where it rests: telling what happens, asking at its gates.

Strategy: the run goes on its own thread; this one takes turns at three things: print what has happened, ask the person
at a gate, wait. Each line is made from a copy of the state as it was at its event, so that a fast run reads like a slow
one. A person is asked only where one can see the question and type the answer, and only when no policy (``--on-gate``)
stands in; what was typed before a question was shown is no answer to it. Whatever ends the waiting, be it the run,
Ctrl+C or a closed pipe, leaves a run that can be resumed, one line about how, and an exit code.

What agents write is hostile: it is cleaned before a terminal sees it.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import threading
from collections.abc import Callable, Iterable

from .. import options
from ..errors import CodeMachineError, WorkflowError, brief, nearest
from ..events import (
    GATE_DEADLINE,
    Action,
    AnyEvent,
    Decision,
    Gate,
    GateOpened,
    RunFinished,
    TurnCutShort,
    TurnFailed,
    TurnFinished,
    TurnStarted,
)
from ..feed import LiveText
from ..journal import call_of
from ..loops import SLICE_S, engine_loop, run_sync
from ..render import text as say
from ..render.markdown import clean
from ..render.shell import subject
from ..run import Run
from ..runstate import RunState, StepState
from ..state import apply
from . import DONE, FAILED, STOPPED, WAITING
from .console import Console, NobodyReads, complain

ENDING_S = 5.0
"""Seconds that agents get to end their programs when the run is stopped."""
_KEYS: dict[str, str] = {
    **{"approve": "a", "reject": "r", "edit": "e", "skip": "s", "stop": "t"},
    **{"retry": "y", "prompt": "p", "rerun": "f", "run": "u", "always": "w"},
}
_LONG, _HEAD, _TAIL = 60, 40, 12
"""Lines of an output: from how many on it is cut, and how many then remain of its beginning and end."""
_STREAMED = 32_000
"""Characters of an attempt that are printed as they are written; of what comes then, as many from its end."""


class Streamed:
    """What an agent has written in one attempt, and how much of it was printed."""

    def __init__(self) -> None:
        self._pieces: list[str] = []
        self.printed = self.left_out = 0

    def take(self, text: str) -> str:
        """The part of `text` that is to be printed now."""
        self._pieces.append(text)
        shown = text[: max(0, _STREAMED - self.printed)]
        self.printed += len(shown)
        self.left_out += len(text) - len(shown)
        return shown

    @property
    def text(self) -> str:
        """All of it."""
        return "".join(self._pieces)


class Session:
    """One run in this terminal.

    Parameters
    ----------
    asks
        Whether the person here decides.
    verbose
        Whether to print what the agents write.
    known
        The last event that was told already, when the run is resumed.
    """

    def __init__(self, run: Run, console: Console, *, asks: bool, verbose: bool, known: int = 0) -> None:
        self._run, self._console = run, console
        self._asks, self._verbose, self._known = asks, verbose, known
        self._state = RunState()
        self._awake = threading.Event()
        self._rests = False
        self._ended: BaseException | None = None
        self._thinks = False
        self._written: dict[tuple[str, int], Streamed] = {}

    def see_through(self, again: str | None, until: str | None = None, ready: Callable[[], None] = lambda: None) -> int:
        """Follow the run until it rests; returns the exit code, having said why if it is not 0.

        `ready` is called where an interrupt stops the run.
        """
        why = ""
        feed, before = self._run.follow(self._awake.set)
        try:
            ready()
            self._tell(before)
            threading.Thread(target=self._await_rest, name="cm-rest", daemon=True).start()
            while not self._rests:
                self._take(feed.take)
                self._awake.wait(SLICE_S)  # in slices: Windows hears Ctrl+C only between them
                self._awake.clear()
            self._tell(feed.take())
        except KeyboardInterrupt:
            self._console.fresh_line()
            why = self._stop("stopped by you")
        except NobodyReads:
            why = self._stop("stopped, because nobody reads its output any more")
        except EOFError:
            self._console.fresh_line()
        finally:
            self._run.unwatch(feed)
        if why and not self._console.closed:
            self._state = RunState()  # it may have been interrupted in the middle of an event
            with contextlib.suppress(NobodyReads):
                self._tell(self._run.events)
        if not self._asks and not self._console.closed:
            # Nobody watched: after the lines, how each step stands. What the last line has said is not said again.
            with contextlib.suppress(NobodyReads):
                for line in say.step_lines(self._state):
                    self._console.line(line)
        return self._end(again, why, until)

    def _take(self, take: Callable[[], Iterable[AnyEvent | LiveText]]) -> None:
        """Tell what there is, and ask about a gate that is open then; until there is nothing more."""
        self._tell(take())
        chosen: str | None = None
        while self._asks and (gates := self._state.gates):
            gate = gates.get(chosen or "") or next(iter(gates.values()))
            chosen = self._put(gate, take)
            self._tell(take())

    def _await_rest(self) -> None:
        try:
            self._run.wait()
        except BaseException as error:
            self._ended = error
        self._rests = True
        self._awake.set()

    def _stop(self, why: str) -> str:
        """Stop the run, and give its agents time to end what they began; a second Ctrl+C does not wait for that."""
        try:
            self._run.stop()
        except CodeMachineError:
            return ""  # it has ended by itself
        with contextlib.suppress(TimeoutError):
            run_sync(asyncio.run_coroutine_threadsafe(_all_done(), engine_loop()), ENDING_S)
        return why

    # -- telling ------------------------------------------------------------------------------------------------------

    def _tell(self, things: Iterable[AnyEvent | LiveText]) -> None:
        for thing in things:
            if isinstance(thing, LiveText):
                if self._verbose and thing.kind == "thinking":
                    self._think(thing.text)
                elif self._verbose:
                    self._write(thing.path, thing.attempt, thing.text)
            elif thing.seq > self._state.seq:
                apply(self._state, thing)
                if thing.seq > self._known:
                    self._tell_event(thing)
                    self._known = thing.seq

    def _tell_event(self, event: AnyEvent) -> None:
        if isinstance(event, TurnStarted):
            self._written.pop((event.path, event.attempt), None)
        if isinstance(event, (TurnFinished, TurnFailed, TurnCutShort)) and self._verbose:
            self._tell_rest(event)
        if isinstance(event, GateOpened) and (self._asks or event.gate.kind == "failed"):
            return  # the question says it, or the failure was the line before
        if (line := say.event_line(self._state, event)) is not None:
            bad = isinstance(event, TurnFailed) or (isinstance(event, RunFinished) and event.status != "completed")
            good = isinstance(event, RunFinished) and event.status == "completed"
            self._console.line(line, "red" if bad else "green" if good else "")

    def _think(self, text: str) -> None:
        """What an agent thinks stands apart, and is no part of its answer."""
        if not self._thinks:
            self._console.fresh_line()
        self._thinks = True
        self._console.live(clean(text), "dim")

    def _write(self, path: str, attempt: int, text: str) -> None:
        if self._thinks:
            self._console.fresh_line()
        self._thinks = False
        self._console.live(clean(self._written.setdefault((path, attempt), Streamed()).take(text)))

    def _tell_rest(self, event: TurnFinished | TurnFailed | TurnCutShort) -> None:
        """What is left to be printed of an attempt's text as it ends: the end of a long one, or all that came late."""
        if isinstance(event, TurnFinished) and not self._is_written(event, event.text):
            self._console.fresh_line()
            self._written.pop((event.path, event.attempt), None)
            self._write(event.path, event.attempt, event.text)
        written = self._written.get((event.path, event.attempt))
        if written is None or not written.left_out:
            return
        rest = written.text[-written.left_out :][-_STREAMED:]
        omitted = written.left_out - len(rest)
        written.left_out = 0
        if omitted:
            kept = isinstance(event, TurnFinished)
            whole = f" Show all: `{self._in_python(f'[{event.path!r}].text')}`" if kept else ""
            self._console.line(f"… {omitted:,} characters left out.{whole} …", "dim")
        self._console.live(clean(rest))

    def _in_python(self, what: str) -> str:
        """What shows something of this run in Python; where nothing is kept, what would keep it."""
        journal = self._run._driver.journal
        return call_of("cm.Run.open", self._run.id, journal) + what if journal.durable else "--journal FILE"

    def _is_written(self, place: TurnFinished | Gate, text: str) -> bool:
        """Whether all of `text` stands on the screen."""
        written = self._written.get((place.path, place.attempt))
        return written is not None and written.text.strip() == text.strip()

    def _end(self, again: str | None, why: str, until: str | None) -> int:
        """The exit code; what is not 0 is explained on stderr."""
        with self._run.reading() as state:
            status, reason = state.status, state.reason
        if status == "completed":
            return DONE
        if self._ended is not None and not isinstance(self._ended, CodeMachineError):
            raise self._ended  # a bug surfaces as itself
        as_asked = status == "paused" and until is not None
        said = {
            "failed": reason,
            "stopped": f"{say.one_line(state.name, 80)} was {why or reason or 'stopped'}.",
            "waiting": "the gate stays open.",
            "paused": "" if as_asked else f"{say.one_line(state.name, 80)} is paused: {state.pause_reason}.",
        }
        if message := str(self._ended or said.get(status, "")):
            complain(message, more=self._in_python(".state.reason"))
        if again is not None:
            complain(f"Go on with it: {again}", sign="")
        if as_asked:
            return DONE
        return {"waiting": WAITING, "failed": FAILED}.get(status, STOPPED)

    # -- asking -------------------------------------------------------------------------------------------------------

    def _put(self, gate: Gate, take: Callable[[], Iterable[AnyEvent | LiveText]]) -> str | None:
        """Show the gate and take answers until it is closed, here or by somebody else.

        Returns the id of another open gate when the person wants to go to that one.
        """
        step = self._state.find(gate.path)
        self._show(gate, step)
        while self._is_open(gate):
            others = f"{gate.path} " if len(self._state.gates) > 1 else ""
            prompt = f"{others}answer> " if gate.kind == "question" else f"{others.strip()}> "
            line = self._console.ask(prompt, lambda: not self._is_open(gate) or self._opened())
            if line is None:
                if self._is_open(gate):  # another one was opened meanwhile; this one is still asked about
                    self._tell(take())
                    if tray := self._tray(gate):
                        self._console.say(tray)
                    continue
                break
            try:
                if (other := self._other(gate, line.strip())) is not None:
                    return other
                decision = self._decision(gate, step, line.strip())
                if decision is not None:
                    self._run.decide(gate.id, decision, digest=gate.digest)
                if decision is not None or not self._is_open(gate):
                    return None
            except CodeMachineError as error:
                self._console.say(str(error), "yellow")
        self._console.line(self._closed_by(gate), "dim")
        return None

    def _is_open(self, gate: Gate) -> bool:
        with self._run.reading() as state:
            return gate.id in state.gates

    def _opened(self) -> bool:
        """Whether there is an open gate that the person has not been told of."""
        with self._run.reading() as state:
            return not state.gates.keys() <= self._state.gates.keys()

    def _closed_by(self, gate: Gate) -> str:
        with self._run.reading() as state:
            decision, ended = state.decisions.get(gate.id), state.ended
        if decision is not None and decision.by == GATE_DEADLINE:
            return "(its time is over)"
        if ended == "stopped" and (decision is None or decision.action == "stop"):
            return "(stopped elsewhere)"
        return "(closed elsewhere)" if decision is None else "(answered elsewhere)"

    def _tray(self, gate: Gate) -> str:
        """Which gates are open, when it is more than one, and how to go to another."""
        gates = [*self._state.gates.values()]
        if len(gates) < 2 or gate not in gates:
            return ""
        named = "  ".join(f"[{number}] {one.path} ({one.kind})" for number, one in enumerate(gates, 1))
        here = gates.index(gate) + 1
        how = "an empty line goes to the next" if gate.kind == "question" else "g goes to the next, g 2 to the second"
        return f"{len(gates)} gates are open: {named}. This is {here}; {how}."

    def _other(self, gate: Gate, line: str) -> str | None:
        """The id of the open gate that `line` asks to go to.

        Raises
        ------
        WorkflowError    There is no such gate.
        """
        ids = [*self._state.gates]
        asked = re.fullmatch(r"" if gate.kind == "question" else r"[gG](?:ate)?(?:\s+(\S+))?", line)
        if asked is None or len(ids) < 2:
            return None
        number = asked[1] if gate.kind != "question" else None
        if number is None:
            return ids[(ids.index(gate.id) + 1) % len(ids)]
        if number not in map(str, range(1, len(ids) + 1)):
            raise WorkflowError(f"there is no gate {number!r}. Open: 1 to {len(ids)}.")
        return ids[int(number) - 1]

    def _show(self, gate: Gate, step: StepState) -> None:
        shown, asks = self._subject(gate), gate.kind == "question"
        if shown and not self._is_written(gate, shown):
            self._console.say(f"--- {gate.path}{f', attempt {gate.attempt}' if gate.attempt > 1 else ''}", "dim")
            more = self._in_python(f".gate({gate.path!r}).payload['question']") if asks else "v"
            lines = say.bounded(shown, more).splitlines()
            if len(lines) > _LONG and not asks:  # there, what is typed is the answer, so nothing can be asked for
                left_out = len(lines) - _HEAD - _TAIL
                lines[_HEAD:-_TAIL] = [f"… {left_out} lines more: v shows all …"]
            self._console.say("\n".join(lines))
            self._console.say("---", "dim")
        beside = gate.kind == "permission" or (asks and bool(shown))
        self._console.say(clean(say.gate_sentence(self._state, gate, beside=beside)), "bold")
        self._console.forget_typed()
        if tray := self._tray(gate):
            self._console.say(tray)
        self._console.say(self._choices(gate, step))

    def _subject(self, gate: Gate) -> str:
        """The text that is decided about; ``""`` where the sentence has all of it."""
        text = subject(self._state, gate)
        return "" if gate.kind == "question" and say.one_line(text, say.QUESTION) == text else text

    def _choices(self, gate: Gate, step: StepState) -> str:
        if gate.kind == "question":
            return "Type the answer. Ctrl+C stops the run."
        found = [f"[{_KEYS[way.name]}] {way.label}" for way in say.ways(self._state, gate)]
        if len(step.attempts) > 1 and gate.kind not in ("start", "permission", "budget"):
            found.append("[d] Diff")
        return "  ".join([*found, "[?] Help"])

    def _decision(self, gate: Gate, step: StepState, line: str) -> Decision | None:
        """What a line means: a decision, or ``None`` when it only asked for something.

        Raises
        ------
        CodeMachineError    It means nothing here.
        """
        if gate.kind == "question":
            return Decision(action="answer", feedback=line) if line else None
        word, _, rest = line.partition(" ")
        word, rest = word.lower(), rest.strip()
        ways = {way.name: way for way in say.ways(self._state, gate)}
        known: dict[str, str] = {"d": "diff", "v": "view", "?": "help"}
        for name in ways:
            known |= {_KEYS[name]: name, name: name}
        action = known.get(word)
        if action is None:
            if word:
                words = [name for name in known if len(name) > 1]
                self._console.say(f"{brief(word)} is none of them. {nearest(word, words)}".rstrip(), "yellow")
            self._console.say(self._choices(gate, step))
            return None
        if action == "diff":
            self._console.say(self._diff(gate, step, whole=rest.lower() == "all"))
            return None
        if action in ("view", "help"):
            self._console.say(getattr(self, f"_{action}")(gate, step))
            return None
        if rest and action == "approve" and gate.kind == "budget":
            return Decision(action="approve", **options.limit_in_words(gate.payload["limit"], rest))
        if rest and action not in ("reject", "retry"):
            raise WorkflowError(f"{action} takes no words; nothing was decided.")
        if action == "rerun":
            self._run.rerun(step.id, later=True)
            return None
        return self._made(gate, step, ways[action], rest)

    def _made(self, gate: Gate, step: StepState, way: say.Way, rest: str) -> Decision | None:
        action = way.action
        if action == "reject":
            words = rest or self._asked("Why? ", gate)
            return Decision(action="reject", feedback=words) if words else self._nothing()
        if action == "prompt":
            text = self._console.edit(step.last.prompt if step.last is not None else "")
            return Decision(action="retry", prompt=text) if text is not None else self._nothing()
        if action == "edit":
            text = self._console.edit(self._subject(gate))
            return Decision(action="approve", output=text) if text is not None else self._nothing()
        if action == "skip":
            question = f"Skip {gate.step}? It gives no output; what names it gets an empty text. [y/N] "
            sure = self._asked(question, gate).lower() in ("y", "yes")
            return Decision(action="skip") if sure else self._nothing()
        if action == "retry" and rest:
            if gate.kind != "exhausted" or not re.fullmatch("[1-9][0-9]{0,5}", rest):
                raise WorkflowError("retry takes a number, and only where a loop is used up: y 2")
            return Decision(action="retry", count=int(rest))
        made: Action = action  # type: ignore[assignment]
        return Decision(action=made, count=way.times, scope=way.scope)

    def _asked(self, question: str, gate: Gate) -> str:
        return (self._console.ask(question, lambda: not self._is_open(gate)) or "").strip()

    def _nothing(self) -> Decision | None:
        self._console.say("Nothing was changed, so nothing is decided.", "yellow")
        return None

    def _view(self, gate: Gate, step: StepState) -> str:
        return clean(self._subject(gate)) or "There is no text."

    def _diff(self, gate: Gate, step: StepState, *, whole: bool) -> str:
        if len(step.attempts) < 2:
            return "There is only one attempt."
        changes = self._run[gate.path].diff()
        return clean(changes) if whole else say.bounded(changes, "d all")

    def _help(self, gate: Gate, step: StepState) -> str:
        meanings = {
            "approve": "go on with what is shown"
            if gate.kind != "budget"
            else "go on with the same amount again; a 2 with two, in the limit's unit",
            "run": "the same, and do not ask about this tool again in this run",
            "always": "the same, and never ask about this tool again; cm-notebook permissions lists them",
            "reject": "send it back; r WORDS says why",
            "edit": "change the text in your editor ($EDITOR), and go on with that",
            "prompt": "change its prompt in your editor ($EDITOR), and try that",
            "retry": "make it again" + ("; y 5 allows five more passes" if gate.kind == "exhausted" else ""),
            "rerun": "make it again, and all that comes after it",
            "skip": "go on without it",
            "stop": "end the run; it can be resumed",
        }
        rows = [[_KEYS[way.name], way.label, meanings[way.name]] for way in say.ways(self._state, gate)]
        if len(step.attempts) > 1:
            rows.append(["d", "Diff", "what changed since the attempt before"])
        rows.append(["v", "View", "all of the text"])
        if len(self._state.gates) > 1:
            rows.append(["g", "Gate", "the next open gate; g 2 is the second"])
        rows += [["Ctrl+C", "", "stop the run"], ["Ctrl+D", "", "leave; the gate stays open"]]
        return "\n".join(f"  {line}" for line in say.table(rows))


async def _all_done() -> None:
    """Return when nothing is under way on this loop any more."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    if others:
        await asyncio.wait(others)
