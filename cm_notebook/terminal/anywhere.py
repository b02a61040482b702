"""Runs that are driven elsewhere: which there are, what they wait for, and the answer.

Strategy: there is no connection to who drives a run. The journal is read, a decision is written into it, and the driver
looks there a few times a second; so an answer counts whether its kernel is busy, on another screen, or gone. Each
command takes a run by the beginning of its id. The decisions are those of the magic, with its options (``COMMANDS``).
What is approved is the text that stands there as the decision is made, or what ``--digest`` says was seen: else it is
refused.
"""

from __future__ import annotations

import contextlib
import getpass
import json
import socket
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .. import config
from ..errors import AlreadyDecided, CodeMachineError, JournalError, TransitionError, WorkflowError, did_you_mean
from ..events import EDITABLE, Decision, Gate
from ..journal import AnyJournal, begun_like, command_of, open_journal
from ..options import COMMANDS, Argument, Command, Option
from ..render import html
from ..render import text as say
from ..render.markdown import clean
from ..render.shell import Shell, editable, facts, gate_lines, subject
from ..run import Run
from ..runstate import RunState, StepState
from ..workflow import LIMITS
from . import DECIDED, DONE, NOT_FOUND, NOTHING
from .console import Console, is_terminal
from .files import file_and_name, load
from .parser import Misunderstood, Parser

JOURNAL = Option("journal", "where runs are kept", example="FILE")
DEBUG = Option("debug", "show where an error comes from", "switch", own=True)
_RUN = Argument("run", "its id, or how it begins; the one that waits without it", many="?")
_STEP = Argument("step", "the step, when several gates are open", many="?")
_DIGEST = Option("digest", "what was seen: refused if something else stands there", example="3f2a9c1b")
_JSON = Option("json", "as data", "switch", own=True)
_WORDS = {
    "reject": Option("feedback", "why: the agent is told", example="'name the tests'"),
    "answer": Option("text", "the answer", example="'the blue one'"),
}

RUNS = Command(
    "runs",
    "The runs that can go on, newest first: how they stand, and what they wait for.",
    "cm.runs(…)",
    (),
    (Option("all", "those that have ended, too", "switch", own=True), _JSON, JOURNAL, DEBUG),
)
SHOW = Command(
    "show",
    "A run, or one of its steps: how it stands, what it waits for, and what to type.",
    'run["planner"]',
    (_RUN, Argument("step", "the step; the whole run without it", many="?")),
    (*(option for option in COMMANDS["show"].options if not option.own), _JSON, JOURNAL, DEBUG),
)


def _decision(name: str) -> Command:
    """The magic's command, for a run that is named."""
    magic = COMMANDS[name]
    own = [option for option in magic.options if option.parameter not in ("step", "out")]
    words = [_WORDS[name]] if name in _WORDS else []
    if name == "retry":
        words = [Option("prompt", "the prompt to try with", example="'Plan it in three steps.'")]
    return Command(name, magic.meaning, magic.twin, (_RUN, _STEP), (*words, *own, _DIGEST, JOURNAL, DEBUG))


DECISIONS = {name: _decision(name) for name in ("approve", "reject", "skip", "answer", "retry")}
EDIT = Command(
    "edit",
    "Go on with another text: typed in your editor, or read from stdin.",
    "run.approve(output=…)",
    (_RUN, _STEP),
    (_DIGEST, JOURNAL, DEBUG),
)
STEERING = {
    name: Command(name, meaning, f"run.{name}()", (_RUN,), (JOURNAL, DEBUG))
    for name, meaning in {
        "stop": "End the run; resume goes on with it.",
        "pause": "Let what runs finish and start nothing new.",
        "unpause": "Go on with a run that was paused.",
    }.items()
}
_THAT_RUN = Argument("run", "its id, or how it begins")


def _of_run(
    name: str, meaning: str, arguments: Sequence[Argument], *options: Option, but: Sequence[str] = ()
) -> Command:
    """The magic's command, of a run that is named first: with its options `but` these, and with some of its own."""
    magic = COMMANDS[name]
    kept = [option for option in magic.options if option.parameter not in ("run", "out", *but)]
    return Command(name, meaning, magic.twin, (_THAT_RUN, *arguments), (*options, *kept, JOURNAL, DEBUG))


BACK = {
    "rewind": _of_run(
        "rewind",
        "Go back to before a step: it and all after it are to run again. Nothing runs until you go on.",
        [Argument("step", "the step")],
    ),
    "fork": _of_run(
        "fork",
        "A new run with the same history, paused before a step; the run itself is not touched.",
        [Argument("step", "the step")],
        but=("engine", "tape", "record"),  # they count where it is driven: resume has them
    ),
}
DIFF = _of_run(
    "diff",
    COMMANDS["diff"].meaning,
    COMMANDS["diff"].arguments,
    Option("against", "what is different from this run", example="RUN"),
    but=("against", "side_by_side"),
)
EXPORT = _of_run(
    "export",
    COMMANDS["export"].meaning,
    COMMANDS["export"].arguments,
    Option("workflow", "where its Python functions are defined: plan.py", example="FILE", own=True),
)
COMMANDS_HERE: dict[str, Command] = {
    command.name: command
    for command in (RUNS, SHOW, *DECISIONS.values(), EDIT, *STEERING.values(), *BACK.values(), DIFF, EXPORT)
}
CODES = """\
Exit codes: 0 done; 1 it cannot be answered like this; 2 not understood, or several runs wait;
5 decided already, by whom and when is said; 6 nothing waits there; 7 no such run, step or journal.
"""


class Refused(CodeMachineError):
    """Nothing was done, for a reason that has an exit code."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


def obey(name: str, words: Sequence[str]) -> int:
    """Do what the command `name` says; returns the exit code."""
    asked = Parser(COMMANDS_HERE[name], "" if name == "runs" else CODES).read(words)
    if asked is None:
        return DONE
    others = {"runs": _list, "show": _show, "edit": _edit, "diff": _diff, "export": _export}
    others |= dict.fromkeys(BACK, _go_back)
    does = _decide if name in DECISIONS else others.get(name, _steer)
    try:
        does({**asked, "command": name})
    except AlreadyDecided as error:
        raise Refused(str(error), DECIDED) from error
    return DONE


# -- which run -----------------------------------------------------------------------------------------------------


def journal_of(asked: dict[str, Any]) -> AnyJournal:
    """The journal that is meant.

    Raises
    ------
    Refused    There is none.
    """
    where = asked.get("journal") or config.setting("journal")
    if where == ":memory:":
        raise Refused(
            "a run that is kept in memory cannot be seen from outside. Name its journal: --journal FILE", NOT_FOUND
        )
    try:
        return open_journal(where, make=False)
    except JournalError as error:
        if Path(where).exists():
            raise
        hint = "Go to the folder where it was started, or name its journal: --journal FILE"
        raise Refused(f"there is no run here: no journal {where}. {hint}", NOT_FOUND) from error


def find_run(journal: AnyJournal, word: str | None, wanted: Callable[[RunState], object], what: str) -> Run:
    """The run whose id is `word`, or begins like it; without one, the only one that is `wanted`.

    Raises
    ------
    Refused          There is none.
    Misunderstood    It could be several.
    """
    ids = [info.id for info in journal.runs()]
    if word is None:
        return _only(journal, ids, wanted, what)
    meant = begun_like(ids, word)
    if len(meant) == 1:
        return Run.open(meant[0], journal)
    if meant:
        raise Misunderstood(f"{word!r} begins the ids of several runs: {_named(journal, meant)}. Type more of it.")
    alone = None
    with contextlib.suppress(CodeMachineError):
        alone = _only(journal, ids, wanted, what)
    if alone is not None and word in {**alone.state.steps, **alone.state.members}:
        raise Refused(f"there is no run {word!r}, which is a step. The run comes first: {alone.id} {word}", NOT_FOUND)
    raise Refused(f"there is no run {word!r}. {did_you_mean(word, ids, 'Runs')}", NOT_FOUND)


def _named_run(journal: AnyJournal, word: str) -> Run:
    """The run whose id is `word`, or begins like it."""
    return find_run(journal, word, unfinished, "is unfinished")


def _only(journal: AnyJournal, ids: Sequence[str], wanted: Callable[[RunState], object], what: str) -> Run:
    found = [run for id in ids if wanted((run := Run.open(id, journal)).state)]
    if not found:
        listing = command_of(journal.path, "runs", "--all")
        raise Refused(f"no run {what} in {journal.path}. `{listing}` lists those there are.", NOTHING)
    if len(found) > 1:
        ids = [run.id for run in found]
        raise Misunderstood(f"several runs could be meant, so name one: {_named(journal, ids)}.")
    return found[0]


def _named(journal: AnyJournal, ids: Sequence[str]) -> str:
    shown = []
    for id in ids[:8]:
        state = Run.open(id, journal).state
        gates = "".join(f", {gate.path} waits" for gate in state.gates.values())
        shown.append(f"{id} ({say.one_line(state.name, 40)}{say.one_line(gates, 60)})")
    return ", ".join(shown) + (f" and {len(ids) - 8} more" if len(ids) > 8 else "")


def waits(state: RunState) -> object:
    """Whether a decision is wanted of a person."""
    return state.gates


def unfinished(state: RunState) -> bool:
    """Whether the run has not ended."""
    return state.ended is None


def can_go_on(state: RunState) -> bool:
    """Whether the run has not come to its end: it may have been stopped, or have failed."""
    return state.ended != "completed"


def shell_of(run: Run, asked: dict[str, Any]) -> Shell:
    """How commands about `run` are typed here."""
    return Shell(run.id, asked.get("journal"))


def _goes_on(run: Run, asked: dict[str, Any]) -> str:
    """The command by which a run that is paused, or has stopped, goes on."""
    shell = shell_of(run, asked)
    return shell.command("unpause") if run.driven else shell.goes_on


# -- looking -------------------------------------------------------------------------------------------------------


def _list(asked: dict[str, Any]) -> None:
    journal = journal_of(asked)
    found = [Run.open(info.id, journal) for info in journal.runs()]
    shown = [run for run in found if "all" in asked or can_go_on(run.state)]
    if "json" in asked:
        print(json.dumps([_run_facts(run, asked) for run in shown], indent=2))
        return
    if shown:
        print("\n".join(say.table([["Run", "Workflow", "State", "Waits at", "Age", "Cost"], *map(_row, shown)])))
    if len(found) > len(shown):
        rest = len(found) - len(shown)
        print(f"{rest} run{'s' if rest > 1 else ''} completed: {command_of(journal.path, 'runs', '--all')}")
    elif not found:
        print("There are no runs yet.")


def _row(run: Run) -> list[str]:
    with run.reading() as state:
        gates = [gate.path for gate in state.gates.values()]
        more = f" and {len(gates) - 3} more" if len(gates) > 3 else ""
        word, paid = say.run_look(state).word, say.cost(state.cost_usd, state.cost_estimated)
        return [
            run.id,
            say.one_line(state.name, 40),
            word if state.ended is not None or run.driven else say.undriven(word),
            say.one_line(", ".join(gates[:3]), 60) + more,
            _age(time.time() - (state.started_at or time.time())),
            paid,
        ]


def _age(seconds: float) -> str:
    if seconds < 20:
        return f"{max(0.0, seconds):.0f} s"
    return say.duration(seconds) if seconds < 172_800 else f"{seconds / 86_400:.0f} d"


def _run_facts(run: Run, asked: dict[str, Any]) -> dict[str, Any]:
    """The run as data."""
    shell = shell_of(run, asked)
    with run.reading() as state:
        return {
            "run": run.id,
            "workflow": state.name,
            "status": state.status,
            "driven": run.driven,
            "mode": state.mode,
            "reason": state.reason,
            "started_at": state.started_at,
            "cost_usd": state.cost_usd,
            "tokens": state.usage.input_tokens + state.usage.output_tokens,
            "steps": [_step_facts(state, step) for step in state.order],
            "gates": [facts(state, gate, shell) for gate in state.gates.values()],
            "journal": run._driver.journal.path,
        }


def _step_facts(state: RunState, step: StepState, texts: bool = False) -> dict[str, Any]:
    made = {"step": step.path, "state": say.look(state, step).word, "story": say.story(state, step)}
    return made | {
        "attempts": [
            {
                "attempt": one.number,
                "outcome": say.outcome(state, step, one),
                "cost_usd": one.cost_usd,
                **({"prompt": one.prompt, "text": one.text} if texts else {}),
            }
            for one in step.attempts
        ],
        "agents": [_step_facts(state, member, texts) for member in step.members],
    }


def _show(asked: dict[str, Any]) -> None:
    journal = journal_of(asked)
    try:
        run = find_run(journal, asked["run"], unfinished, "is unfinished")
    except Refused:
        if asked["run"] is not None:
            raise
        run = find_run(journal, None, can_go_on, "can go on")
    if "json" in asked and asked["step"] is None:
        print(json.dumps(_run_facts(run, asked), indent=2))
        return
    shell, full = shell_of(run, asked), "full" in asked
    with run.reading() as state:
        if asked["step"] is None:
            print("\n".join(_run_lines(run, state, asked, full)))
            return
        step = _found_step(state, asked["step"])
        if "json" in asked:
            print(json.dumps(_step_facts(state, step, texts=True), indent=2))
            return
        attempt = html.find_attempt(step, asked["number"]) if "number" in asked else None
        if step.gate is not None and attempt is None:
            print(say.show_text(state, step, None, full, "").partition("\n\n")[0])
            print("\n".join(["", *gate_lines(state, step.gate, shell, full)]))
        else:
            words = ["--attempt", str(attempt.number)] if attempt is not None else []
            print(say.show_text(state, step, attempt, full, shell.command("show", step.path, *words, "--full")))


def _run_lines(run: Run, state: RunState, asked: dict[str, Any], full: bool) -> list[str]:
    now, shell = time.time(), shell_of(run, asked)
    lines = [f"{run.id}  {say.headline(state, now)}", *say.step_lines(state, now)]
    for gate in state.gates.values():
        lines += ["", *gate_lines(state, gate, shell, full)]
    if not state.gates:
        lines.append(say.sentence(state, now, _goes_on(run, asked)))
    if state.ended is None and not run.driven:
        lines += ["", f"Nobody drives it now. Go on with it: {shell.goes_on}"]
    return lines


def _diff(asked: dict[str, Any]) -> None:
    journal = journal_of(asked)
    run, step, numbers = _named_run(journal, asked["run"]), asked["step"], asked["attempts"]
    if step is not None:
        _found_step(run.state, step)
    if "against" in asked:
        if numbers:
            raise Misunderstood("diff --against compares two runs as they are: leave out the attempts.")
        said = run.diff(_named_run(journal, asked["against"]), step)
    elif step is None or len(numbers) > 2:
        raise Misunderstood("diff takes a step and two of its attempts, or another run: --against RUN")
    else:
        a, b = numbers if len(numbers) == 2 else (*numbers, -1) if numbers else (-2, -1)
        if len(run[step].attempts) < 2:
            raise Refused(f"{step} has fewer than two attempts so far; there is nothing to compare.", NOTHING)
        said = run[step].diff(a, b)
    print(clean(said), end="" if said.endswith("\n") else "\n")


def _export(asked: dict[str, Any]) -> None:
    run = _named_run(journal_of(asked), asked["run"])
    if "workflow" in asked:
        load(*file_and_name(asked["workflow"]))  # its functions are found, as they are imported now
    with warnings.catch_warnings(record=True) as noted:
        warnings.simplefilter("always")
        made = run.export(asked["file"], overwrite="overwrite" in asked)
    print("\n".join([f"{made} is written.", *(str(one.message) for one in noted)]))


def _found_step(state: RunState, name: str) -> StepState:
    try:
        return state.find(name)
    except TransitionError as error:
        raise Refused(str(error), NOT_FOUND) from error


# -- deciding ------------------------------------------------------------------------------------------------------


def person() -> str:
    """Who decides here, in the words that others read: ``ana@box in a terminal``."""
    try:
        name = getpass.getuser()
    except (OSError, KeyError, ImportError):  # a container may know no names
        name = "somebody"
    return f"{name}@{socket.gethostname()} in a terminal"


def _gate(asked: dict[str, Any]) -> tuple[Run, Gate]:
    """The gate that is meant, which shows what was seen."""
    run = find_run(journal_of(asked), asked["run"], waits, "waits for a decision")
    if asked["run"] is None:
        print(f"{run.id} is the only run that waits.")
    with run.reading() as state:
        several = asked["step"] in (None, *(gate.step for gate in state.gates.values()))
        if not several:
            _found_step(state, asked["step"])
        try:
            gate = run.gate(asked["step"])
        except AlreadyDecided:
            raise
        except TransitionError as error:
            if state.paused and not state.gates:
                raise Refused(f"{error} Go on with it: {_goes_on(run, asked)}", NOTHING) from error
            raise (Misunderstood(str(error)) if several and state.gates else Refused(str(error), NOTHING)) from error
        seen = asked.get("digest")
        if seen is not None and not (seen and gate.digest.startswith(seen)):
            again = shell_of(run, asked).command("show", gate.path)
            raise AlreadyDecided(f"{gate.path!r} shows something else by now; nothing was changed. Look again: {again}")
    return run, gate


def _decide(asked: dict[str, Any]) -> None:
    action = asked["command"]
    run, gate = _gate(asked)
    given = {name: asked[name] for name in ("output", "prompt", "count", "scope", *LIMITS) if name in asked}
    words = asked.get(_WORDS[action].parameter) if action in _WORDS else None
    if action in _WORDS and not (words or "").strip():
        console = Console()
        words = console.ask(f"{_WORDS[action].meaning}> ", lambda: False) if console.can_ask else None
        if not (words or "").strip():
            raise Misunderstood(f"{action} needs words: {_WORDS[action].usual} {_WORDS[action].example}")
    _made(run, gate, asked, action=action, feedback=(words or "").strip() or None, **given)


def _edit(asked: dict[str, Any]) -> None:
    run, gate = _gate(asked)
    with run.reading() as state:
        text = editable(state, gate)
    if text is None:
        raise WorkflowError(f"{gate.path} has no text to edit: it is a gate of kind {gate.kind}.")
    new = Console().edit(text) if is_terminal(sys.stdin) else sys.stdin.read()
    if new is None or new == text or not new.strip():
        raise WorkflowError("nothing was changed, so nothing is decided.")
    if gate.kind in EDITABLE:
        _made(run, gate, asked, action="approve", output=new)
    else:
        _made(run, gate, asked, action="retry", prompt=new)


def _made(run: Run, gate: Gate, asked: dict[str, Any], **decision: Any) -> None:
    """Record the decision about what the gate showed, and say it in one line."""
    with run.reading() as state:
        text = subject(state, gate)
    try:
        made = Decision(**decision, by=person())
    except ValueError as error:  # pydantic's
        raise WorkflowError(f"this is no decision: {error}".splitlines()[0]) from error
    run.decide(gate.id, made, digest=gate.digest)
    with run.reading() as state:
        shown = f" It was {say.quoted(text, 60)} ({len(text):,} characters)." if text and not made.output else ""
        said = say.decided(state, state.decisions[gate.id], live=True)
    print(f"{run.id} {gate.path}: {said}.{shown}{_from_here(run, asked)}")


def _from_here(run: Run, asked: dict[str, Any]) -> str:
    if run.driven or run.state.ended is not None:
        return ""
    return f"\nNobody drives it now. Go on with it: {shell_of(run, asked).goes_on}"


def _go_back(asked: dict[str, Any]) -> None:
    run, step = _named_run(journal_of(asked), asked["run"]), asked["step"]
    _found_step(run.state, step)
    if asked["command"] == "rewind":
        run.rewind(step)
    else:
        limits = {name: asked[name] for name in LIMITS if name in asked}
        run = run._fork(step, workspace=asked.get("workspace"), limits=limits)
    with run.reading() as state:
        fork = say.fork_words(state)
        print(f"{run.id}{f', a {fork}' if fork else ''}: {say.sentence(state, go_on=_goes_on(run, asked))}")


def _steer(asked: dict[str, Any]) -> None:
    what = asked["command"]
    run = find_run(journal_of(asked), asked["run"], unfinished, "is unfinished")
    if run.state.ended is not None:
        raise Refused(f"run {run.id!r} is {run.state.ended} already.", NOTHING)
    if what == "unpause":
        run.unpause()
    else:
        getattr(run, what)(by=person())
    said = {"stop": "stopped", "pause": "paused: what runs may finish", "unpause": "goes on"}[what]
    print(f"{run.id} {say.one_line(run.state.name, 80)}: {said}.{_from_here(run, asked)}")
