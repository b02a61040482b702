"""What can be asked for in words: one table of subcommands and options, for the magic and for the command line.

Strategy: a ``Command`` is a row: its arguments, its options, what the body of its cell is, its Python twin. An option
is the twin's parameter with hyphens, plus declared short forms; a test holds it to that. What is read comes out as the
twin's keyword arguments, and only what was written, so defaults are stated once, in Python. argparse does the reading
underneath, but never prints and never exits: whatever is wrong is one ``WorkflowError`` with what would be right.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import string
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Literal, NoReturn

from .errors import WorkflowError, did_you_mean

Kind = Literal["text", "number", "count", "list", "context", "switch", "choice", "pairs"]


@dataclass(frozen=True, slots=True)
class Option:
    """One option.

    Attributes
    ----------
    parameter
        The parameter of the Python twin that it sets.
    short
        Other spellings, declared by hand.
    off
        For a switch: the spelling that means ``False``.
    example
        A value, for the help and for the message about a missing one.
    own
        It has no parameter in Python; the notebook deals with it.
    above
        For a number: what it must be more than.
    verbatim
        Its value is the person's own text, in which ``{name}`` and ``$name`` are no variables.
    """

    parameter: str
    meaning: str
    kind: Kind = "text"
    short: tuple[str, ...] = ()
    off: str | None = None
    choices: tuple[str, ...] = ()
    example: str = ""
    own: bool = False
    above: int | None = None
    verbatim: bool = False

    @property
    def flags(self) -> tuple[str, ...]:
        """Its spellings; the first is the parameter's name with hyphens."""
        return (f"--{self.parameter.strip('_').replace('_', '-')}", *self.short)

    @property
    def usual(self) -> str:
        """The spelling to show: a declared short form, if it is a word; else the parameter's name."""
        return next((flag for flag in self.short if flag.startswith("--")), self.flags[0])


@dataclass(frozen=True, slots=True)
class Argument:
    """What stands without a flag. ``many``: how often: ``""`` once, ``"?"`` perhaps, ``"*"`` any number of times."""

    name: str
    meaning: str
    kind: Kind = "text"
    many: Literal["", "?", "*"] = ""
    choices: tuple[str, ...] = ()

    @property
    def shown(self) -> str:
        """What stands for it in a usage line."""
        return "|".join(self.choices) or {"id": "NAME"}.get(self.name, self.name.upper())


@dataclass(frozen=True, slots=True)
class Command:
    """One subcommand.

    Attributes
    ----------
    forms
        ``"line"`` (``%cm``), ``"cell"`` (``%%cm``), or both.
    body
        What the body of its cell is.
    words
        Name of what the rest of the line is, taken as it stands; for words of the person's.
    unsaid
        What is said about words that are too much, in place of repeating them.
    twin
        The same in Python.
    """

    name: str
    meaning: str
    twin: str
    arguments: tuple[Argument, ...] = ()
    options: tuple[Option, ...] = ()
    forms: tuple[Literal["line", "cell"], ...] = ("line",)
    body: str = ""
    words: str = ""
    examples: tuple[str, ...] = ()
    unsaid: str = ""


# -- the table ---------------------------------------------------------------------------------------------------------

INPUTS = Option(
    "inputs", "the value of a template name, again and again", "pairs", ("--input",), example="goal='a CLI'"
)
OUT = Option("out", "store the result under this name", short=("-o",), example="run", own=True)
_ENGINE = Option("engine", "which engine does the work", example="offline")
_TAPE = Option("tape", "play a recorded run", example="tapes/01.jsonl")
_RECORD = Option("record", "record the run to this file, as a tape", example="tapes/01.jsonl")
LIMITS = (
    Option(
        "max_cost_usd",
        "US dollars that may be spent before you are asked",
        "number",
        ("--max-cost",),
        example="0.50",
        above=0,
    ),
    Option("max_tokens", "tokens that may be used before you are asked", "count", example="50000", above=0),
    Option("max_turns", "turns that may start before you are asked", "count", example="20", above=0),
)
_MORE = tuple(
    replace(option, meaning=f"where a limit is reached: so many {unit} more, in place of the same again")
    for option, unit in zip(LIMITS, ("US dollars", "tokens", "turns"), strict=True)
)
ON_WAITING = Option(
    "on_waiting",
    "a command that tells you when a gate is open; it finds the answer to give in $CM_ANSWER",
    example="'notify-send Waiting'",
    verbatim=True,
)
_STEP_OPTIONS = (
    Option("agent", "who does it, if not the agent of the step's name", example="planner"),
    Option("interactive", "pause for a person, or not", "switch", off="--auto"),
    Option("gate", "where the pause falls", "choice", choices=("before", "after", "both")),
    Option(
        "gate_timeout_s",
        "seconds a gate waits; then the run stops, or --gate-default is decided",
        "number",
        ("--gate-timeout",),
        example="3600",
        above=0,
    ),
    Option("gate_default", "what is decided then", "choice", choices=("reject", "skip", "stop")),
    Option("timeout_s", "seconds a turn may take", "number", ("--timeout",), example="300", above=0),
    Option("retries", "how often a dropped connection is tried again", "count", example="2", above=-1),
    Option("context", "which outputs it sees: previous, all, none, or names of steps", "context", example="previous"),
    _ENGINE,
    Option("model", "the engine's model", example="MODEL"),
    Option("reasoning_effort", "how hard the model thinks", short=("--effort",), example="high"),
    Option("execute_once", "not repeated when a loop goes over it again", "switch"),
    Option("idempotent", "may run again after a crash, or ask first", "switch", off="--not-idempotent"),
    Option("raw", "leave {{ braces }} as they are", "switch"),
    *LIMITS,
    Option("after", "put it behind this step", example="planner"),
    Option("no_run", "only add it", "switch", own=True),
    OUT,
)
_STEP = Argument("step", "the step, when several gates are open", many="?")
_NAMED_STEP = Argument("step", "the step")
_OF_RUN = Option("run", "which run, if not the current one: its id, or a variable", example="r-1f2e3d4c", own=True)
_DECIDED_STEP = Option("step", "the step, when several gates are open", example="planner")
_MODES = ("step-by-step", "gates", "unattended")
_AUTONOMY = ("never", "always", "true", "false")

COMMANDS: dict[str, Command] = {
    command.name: command
    for command in (
        Command(
            "workflow",
            "Name the workflow that the next cells build, or write its steps down.",
            "cm.Workflow(…)",
            (Argument("name", "what people call it"),),
            (
                Option(
                    "autonomous_mode",
                    "who drives: never alone, always alone, or may be switched (true, false)",
                    "choice",
                    ("--autonomous",),
                    choices=_AUTONOMY,
                ),
                INPUTS,
                Option(
                    "sub_agents", "agents that an agent at work may call", "list", example="frontend-dev,backend-dev"
                ),
                _ENGINE,
                _TAPE,
                _RECORD,
                Option("workspace", "folder the agents work in", example="site"),
                *LIMITS,
                Option("new", "begin a new run, whatever there was", "switch", own=True),
                OUT,
            ),
            ("line", "cell"),
            "its steps: planner -> [ui | api] -> quality-gate(loop 1, max 5) -> deployer?",
            examples=(
                "%cm workflow careful-builder --autonomous never",
                "%%cm workflow smart-builder --autonomous always\nresearcher -> planner -> reviewer? -> deployer",
            ),
        ),
        Command(
            "agent",
            "Define who does the work.",
            "cm.Agent(…)",
            (Argument("id", "its name"),),
            (
                _ENGINE,
                Option("model", "the engine's model", example="MODEL"),
                Option("reasoning_effort", "how hard the model thinks", short=("--effort",), example="high"),
                Option("system", "its system prompt", example="'You are terse.'", verbatim=True),
                OUT,
            ),
            ("cell",),
            "its prompt",
            examples=("%%cm agent planner\nPlan {{ goal }} in at most five steps.",),
        ),
        Command(
            "step",
            "Run a step now, under this cell, or queue it behind an open gate. As a line: only add it.",
            "run.add(cm.step(…))",
            (Argument("id", "its name"),),
            _STEP_OPTIONS,
            ("line", "cell"),
            "its prompt",
            examples=("%%cm step planner\nPlan {{ goal }} in at most five steps.", "%cm step deployer --interactive"),
        ),
        Command(
            "module",
            "Like step, but its verdict may send the run back.",
            "run.add(cm.module(…))",
            (Argument("id", "its name"),),
            (
                Option("loop_steps", "how many steps to go back", "count", example="1", above=0),
                Option("loop_max_iterations", "how often at most", "count", example="5", above=0),
                Option("loop_skip", "steps left out while it loops", "list", example="a,b"),
                Option("on_exhausted", "when the loops are used up", "choice", choices=("pause", "continue", "fail")),
                *_STEP_OPTIONS,
            ),
            ("line", "cell"),
            "its criteria",
            examples=("%cm module quality-gate --loop-steps 1 --loop-max-iterations 5",),
        ),
        Command(
            "remove",
            "Take a step out, after its cell was deleted.",
            "run.remove(…)",
            (_NAMED_STEP,),
            examples=("%cm remove reviewer",),
        ),
        Command(
            "run",
            "Start the workflow, or go on with a paused or stopped run.",
            "run = workflow.start(…)",
            (),
            (
                Option("until", "pause when this step is done", example="planner"),
                Option("from_", "make this step and all after it again", example="planner", own=True),
                INPUTS,
                _ENGINE,
                _TAPE,
                _RECORD,
                Option("workspace", "folder the agents work in", example="site"),
                *LIMITS,
                Option(
                    "on_gate",
                    "answer to gates that nobody else answers",
                    "choice",
                    choices=("approve", "reject", "stop"),
                ),
                ON_WAITING,
                Option("view", "how it is shown", "choice", choices=("full", "html", "log"), own=True),
                OUT,
            ),
            examples=("run = %cm run", "%cm run --until planner"),
        ),
        Command(
            "next", "Run exactly one step here, with its gate.", "run.next()", options=(OUT,), examples=("%cm next",)
        ),
        Command(
            "approve",
            "Go on with what the gate shows; allow a tool; where a limit is reached, go on with so much more.",
            "run.approve(…)",
            (_STEP,),
            (
                Option(
                    "output", "the text to go on with in place of the one shown", example="'My plan'", verbatim=True
                ),
                Option("scope", "for how long a tool is allowed", "choice", choices=("once", "run", "always")),
                *_MORE,
            ),
            examples=("%cm approve", "%cm approve --scope run", "%cm approve --max-cost 1.00"),
        ),
        Command(
            "reject",
            "Have it made again; your words go to the agent.",
            "run.reject(…)",
            (),
            (_DECIDED_STEP,),
            ("line", "cell"),
            "why",
            "why",
            ("%cm reject name the tests", "%%cm reject\nWhy no tests? I don't see any."),
        ),
        Command(
            "edit",
            "Open a cell with the output to edit, or the prompt of a step that failed; run it to go on.",
            "run.approve(output=…)",
            (_STEP,),
            (),
            ("line", "cell"),
            "the text to go on with",
            examples=("%cm edit planner",),
        ),
        Command("skip", "Go on without this step's output.", "run.skip(…)", (_STEP,), examples=("%cm skip",)),
        Command(
            "answer",
            "Answer the question that a step asks.",
            "run.answer(…)",
            (),
            (_DECIDED_STEP,),
            ("line", "cell"),
            "the answer",
            "the answer",
            ("%cm answer the blue one",),
        ),
        Command(
            "retry",
            "Try again what failed or is stale, or loop once more.",
            "run.retry(…)",
            (_STEP,),
            (Option("count", "how many more loops", "count", example="2", above=0),),
            ("line", "cell"),
            "the prompt to try with, in place of the one that was sent",
            examples=("%cm retry", "%cm retry quality-gate --count 2", "%%cm retry planner\nPlan it in three steps."),
        ),
        Command("stop", "End the run; `%cm run` goes on with it.", "run.stop()", examples=("%cm stop",)),
        Command("pause", "Let what runs finish and start nothing new.", "run.pause()", examples=("%cm pause",)),
        Command(
            "mode",
            "Say who drives: a pause after every step, at gates only, or none.",
            "run.set_mode(…)",
            (Argument("mode", "who drives", "choice", choices=_MODES),),
            examples=("%cm mode step-by-step",),
        ),
        Command(
            "show",
            "Show a step, or the run.",
            'run["planner"]',
            (Argument("step", "the step; the whole run without it", many="?"),),
            (
                Option("number", "which attempt", "count", ("--attempt",), example="1"),
                Option("full", "all of it, whatever its size", "switch"),
                OUT,
            ),
            examples=("plan = %cm show planner", "%cm show reviewer --attempt 1"),
        ),
        Command(
            "diff",
            "Show what changed between two attempts, by default the last two, or between two runs.",
            'run["planner"].diff(…), run.diff(against)',
            (
                Argument("step", "the step; against another run, all steps without it", many="?"),
                Argument("attempts", "which two", "count", many="*"),
            ),
            (
                Option("against", "what is different from this run: its id, or a variable", example="r-1f2e3d4c"),
                Option("side_by_side", "two columns, as for runs", "switch", own=True),
                OUT,
            ),
            examples=(
                "%cm diff implementer 1 3",
                "%cm diff --against r-1f2e3d4c",
            ),
        ),
        Command(
            "graph",
            "Draw the steps and where they stand, or when each ran.",
            "run.graph(…)",
            (),
            (
                Option("format", "as what", "choice", choices=("svg", "mermaid", "text")),
                Option("timeline", "when each attempt ran, and who was waited for", "switch"),
                OUT,
            ),
            examples=("%cm graph --format mermaid", "%cm graph --timeline"),
        ),
        Command(
            "status", "One table: states, times, tokens, cost.", "run.state", options=(OUT,), examples=("%cm status",)
        ),
        Command(
            "rewind",
            "Go back to before a step: it and all after it are to run again. Nothing runs until you go on: `%cm run`.",
            "run.rewind(…)",
            (_NAMED_STEP,),
            (_OF_RUN, OUT),
            examples=("%cm rewind implementer",),
        ),
        Command(
            "fork",
            "A new run with the same history, paused before a step; the run itself is not touched.",
            "run.fork(…)",
            (_NAMED_STEP,),
            (
                _OF_RUN,
                _ENGINE,
                _TAPE,
                Option("record", "record the fork, with its history, to this file", example="tapes/01.jsonl"),
                Option("workspace", "folder the agents work in, by default a new one", example="site"),
                *LIMITS,
                OUT,
            ),
            examples=("other = %cm fork implementer", "%cm fork implementer --run r-1f2e3d4c"),
        ),
        Command(
            "export",
            "Write the workflow as .py or .json; the run as a pytest test (test_*.py), or as its tape (.jsonl).",
            "run.export(…), workflow.export(…)",
            (Argument("file", "its name says what is written"),),
            (Option("overwrite", "replace a file that holds something else", "switch"), OUT),
            examples=("%cm export plan.py", "%cm export test_plan.py --overwrite"),
        ),
        Command("runs", "The runs in the journal, newest first.", "cm.runs()", options=(OUT,), examples=("%cm runs",)),
        Command(
            "resume",
            "Go on with a run of the journal.",
            "cm.resume(…)",
            (Argument("run", "its id, from %cm runs"),),
            (ON_WAITING, OUT),
            examples=("%cm resume r-1f2e3d4c",),
        ),
        Command(
            "permissions",
            "The tools that may always be called unasked; revoke NAME: ask again before that one.",
            "cm.permissions()",
            (Argument("what", "what to do", "choice", "?", ("revoke",)), Argument("tool", "which tool", many="?")),
            (OUT,),
            examples=("%cm permissions", "%cm permissions revoke write_file"),
        ),
        Command(
            "config",
            "Each setting, its value, and where that came from.",
            "cm_notebook.config",
            examples=("%cm config",),
        ),
        Command(
            "keys",
            "Which engines have a key and from where; set one, typed hidden and kept for this session, or forget it.",
            "cm.keys.set(…)",
            (
                Argument("action", "what to do", many="?", choices=("set", "forget")),
                Argument("name", "the engine", many="?"),
            ),
            examples=("%cm keys", "%cm keys set anthropic", "%cm keys forget anthropic"),
            unsaid="a key is never written in a cell, where it would be saved: take it out of this one. "
            "`%cm keys set NAME` asks for it in a hidden field.",
        ),
        Command(
            "doctor",
            "What is here, what is missing, and how to mend it.",
            "cm.doctor()",
            options=(OUT,),
            examples=("%cm doctor",),
        ),
    )
}


# -- reading -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Request:
    """What was asked for: the command, its arguments and options by parameter (only those that were written).

    ``help`` is set when help was asked for, and then nothing else counts.
    """

    command: Command | None
    values: dict[str, Any] = field(default_factory=dict)
    help: str | None = None


def read(line: str, *, cell: bool = False, variables: Mapping[str, Any] | None = None) -> Request:
    """Read a magic's line.

    Parameters
    ----------
    line
        All behind ``%cm``.
    cell
        Whether it heads a cell (``%%cm``).
    variables
        What ``{name}``, ``{name.attribute}``, ``$name`` and ``$name.attribute`` in a value stand for, as in other
        magics; not in a person's own words.

    Raises
    ------
    WorkflowError    It cannot be understood; the message says what would be right.
    """
    name, _, rest = line.strip().partition(" ")
    if not name:
        return Request(None)
    if name in ("help", "--help", "-h"):
        return Request(None, help=overview())
    if name not in COMMANDS:
        raise WorkflowError(f"`%cm {name}` is not known. {did_you_mean(name, COMMANDS, 'Subcommands')}")
    command = COMMANDS[name]
    if command.words:
        values, asked_help = _read_words(command, rest)
    else:
        values, asked_help = _read_options(command, _split(rest), variables or _NONE)
    if asked_help:
        return Request(command, help=help_text(command))
    _check_form(command, cell)
    return Request(command, values)


def _check_form(command: Command, cell: bool) -> None:
    if cell and "cell" not in command.forms:
        raise WorkflowError(f"`%%cm {command.name}` takes no body. Write it as a line: %cm {command.name}")
    if not cell and "line" not in command.forms:
        raise WorkflowError(
            f"`%cm {command.name}` needs a body ({command.body}). Write it as a cell: %%cm {command.name} …, "
            "and the body in the lines below."
        )


def _split(text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError:
        raise WorkflowError(
            f"a quotation mark is not closed in: {text.strip()} — put a text that holds one between the other kind, "
            """for instance "don't"."""
        ) from None


def _read_words(command: Command, rest: str) -> tuple[dict[str, Any], bool]:
    """Leading options, and then the person's own words, in which no character means anything."""
    values: dict[str, Any] = {}
    rest = rest.strip()
    while found := re.match(r"(--?[\w-]+)(?:\s*=\s*|\s+|$)", rest):
        flag = found[1]
        if flag in ("--help", "-h"):
            return {}, True
        option = next((option for option in command.options if flag in option.flags), None)
        if option is None:
            known = [flag for option in command.options for flag in option.flags]
            raise WorkflowError(
                f"`%cm {command.name}` has no option {flag}. {did_you_mean(flag, known, 'Options')} "
                f"For words that begin with a hyphen use a cell: %%cm {command.name}"
            )
        value, _, rest = rest[found.end() :].partition(" ")
        if not value:
            raise WorkflowError(_no_value(command, option))
        values[option.parameter], rest = value, rest.strip()
    if rest:
        values["words"] = rest
    return values, False


def _read_options(command: Command, words: Sequence[str], variables: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
    """The values of split words by parameter, and whether help was asked for."""
    if any(word in ("--help", "-h") for word in words):
        return {}, True
    known = {flag: option for option in command.options for flag in _spellings(option)}
    for word in words:
        flag = word.partition("=")[0]
        if re.match(r"--?[A-Za-z]", word) and flag not in known:
            shown = [option.usual for option in command.options]
            raise WorkflowError(f"`%cm {command.name}` has no option {flag}. {did_you_mean(flag, shown, 'Options')}")
    parser = _Parser(command)
    add_arguments(parser, command.arguments, variables)
    add_options(parser, command.options, variables)
    found = vars(parser.parse_args(_joined(words, known)))
    return {name: value for name, value in found.items() if value is not None and value != []}, False


_VARIABLE = re.compile(
    r"(?<!\{)\{([A-Za-z_]\w*(?:\.[A-Za-z_]\w*|\[\w+\])*)\}(?!\})|(?<!\$)\$([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*)"
)
_NONE: Mapping[str, Any] = MappingProxyType({})


def _filled(text: str, variables: Mapping[str, Any]) -> str:
    """`text` with the values of the variables that it names; any other braces and dollar signs stay as they are."""

    def value(found: re.Match[str]) -> str:
        try:
            return str(string.Formatter().get_field(found[1] or found[2], (), variables)[0])
        except (KeyError, AttributeError, IndexError, TypeError):
            return found[0]

    return _VARIABLE.sub(value, text)


def add_arguments(
    parser: argparse.ArgumentParser, arguments: Iterable[Argument], variables: Mapping[str, Any] = _NONE
) -> None:
    """Give an argparse parser these arguments."""
    for argument in arguments:
        many: dict[str, Any] = {"nargs": argument.many} if argument.many else {}
        convert = _converter(argument, argument.name.upper(), variables)
        parser.add_argument(argument.name, type=convert, metavar=argument.shown, **many)


def add_options(
    parser: argparse.ArgumentParser, options: Iterable[Option], variables: Mapping[str, Any] = _NONE
) -> None:
    """Give an argparse parser these options; absent ones leave no trace in what it reads."""
    for option in options:
        rules: dict[str, Any] = {"dest": option.parameter, "default": argparse.SUPPRESS, "help": option.meaning}
        if option.kind == "switch":
            ways = parser.add_mutually_exclusive_group()
            ways.add_argument(*option.flags, action="store_const", const=True, **rules)
            if option.off:
                ways.add_argument(option.off, action="store_const", const=False, **rules)
        else:
            action: dict[str, Any] = {"action": _AddPair} if option.kind == "pairs" else {}
            parser.add_argument(
                *option.flags,
                type=_converter(option, option.usual, _NONE if option.verbatim else variables),
                metavar=option.example or option.parameter.upper(),
                **action,
                **rules,
            )


def _spellings(option: Option) -> tuple[str, ...]:
    return (*option.flags, option.off) if option.off else option.flags


def _joined(words: Sequence[str], known: dict[str, Option]) -> list[str]:
    """``--input x=-1`` as one word: argparse takes a value that begins with a hyphen for a flag."""
    joined: list[str] = []
    waiting: str | None = None
    for word in words:
        if waiting is not None:
            joined.append(f"{waiting}={word}" if waiting.startswith("--") else f"{waiting}{word}")
            waiting = None
        elif word in known and known[word].kind != "switch":
            waiting = word
        else:
            joined.append(word)
    return joined if waiting is None else [*joined, waiting]


class _Parser(argparse.ArgumentParser):
    """argparse that says what is wrong instead of printing a page and ending the process."""

    def __init__(self, command: Command) -> None:
        super().__init__(prog=f"%cm {command.name}", add_help=False, allow_abbrev=False)
        self._command = command

    def error(self, message: str) -> NoReturn:
        """Refuse, in one line."""
        command = self._command
        if found := re.match(r"argument ([\w-]+).*expected one argument", message):
            option = next(option for option in command.options if found[1] in _spellings(option))
            raise WorkflowError(_no_value(command, option))
        if found := re.match(r"argument ([\w-]+): not allowed with argument ([\w-]+)", message):
            raise WorkflowError(f"`%cm {command.name}`: {found[2]} and {found[1]} say opposite things. Leave one out.")
        if message.startswith("the following arguments are required"):
            example = f" For instance: {command.examples[0].splitlines()[0]}" if command.examples else ""
            raise WorkflowError(f"`%cm {command.name}` needs {message.partition(': ')[2]}.{example}")
        if message.startswith("unrecognized arguments") and command.unsaid:
            raise WorkflowError(command.unsaid)
        if message.startswith("unrecognized arguments"):
            takes = " ".join(argument.shown for argument in command.arguments) or "no arguments"
            more = message.partition(": ")[2]
            raise WorkflowError(
                f"`%cm {command.name}` takes {takes}; {more!r} is too much. A text with spaces goes between quotes."
            )
        raise WorkflowError(f"`%cm {command.name}`: {message}. See `%cm {command.name} --help`.")


def _no_value(command: Command, option: Option) -> str:
    example = option.example or (option.choices[0] if option.choices else "VALUE")
    return f"`%cm {command.name}`: {option.usual} needs a value, for instance {option.usual} {example}"


class _AddPair(argparse.Action):
    """Add a converted ``(name, value)`` to what was given before."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, flag: str | None = None) -> None:
        pairs = dict(getattr(namespace, self.dest, None) or {})
        setattr(namespace, self.dest, {**pairs, values[0]: values[1]})


def _converter(given: Option | Argument, where: str, variables: Mapping[str, Any]) -> Callable[[str], Any]:
    kind, choices = given.kind, given.choices

    def convert(text: str) -> Any:
        text = _filled(text, variables)
        if kind == "choice":
            if text not in choices:
                raise WorkflowError(f"{where} {text!r} is not known. {did_you_mean(text, choices, 'Possible')}")
            return {"true": True, "false": False}.get(text, text)
        if kind in ("number", "count"):
            return _number(text, where, given)
        if kind == "context" and text in ("previous", "all", "none"):
            return text
        if kind in ("list", "context"):
            return [part.strip() for part in text.split(",") if part.strip()]
        return pair(text) if kind == "pairs" else text

    return convert


def _number(text: str, where: str, given: Option | Argument) -> int | float:
    whole = given.kind == "count"
    above, example = (given.above, given.example) if isinstance(given, Option) else (None, "")
    right = f" For instance: {where} {example}" if example else ""
    try:
        number = int(text) if whole else float(text)
    except ValueError:
        raise WorkflowError(f"{where} {text!r} is not a {'whole ' if whole else ''}number.{right}") from None
    if above is not None and not number > above:
        least = f"{above + 1} or more" if whole else f"more than {above}"
        raise WorkflowError(f"{where} {text} is too little: it takes {least}{_UNIT.get(where, '')}.{right}")
    return number


_UNIT = {"--timeout": " seconds"}


def limit_in_words(parameter: str, text: str) -> dict[str, Any]:
    """The limit of that parameter, as a person types it: ``$1``, ``20000``.

    Raises
    ------
    WorkflowError    It is no amount of that.
    """
    option = next(option for option in LIMITS if option.parameter == parameter)
    return {parameter: _number(text.strip().removeprefix("$"), option.usual, option)}


def pair(text: str) -> tuple[str, Any]:
    """``goal=a CLI`` as name and value; a number is a number, everything else is text.

    Raises
    ------
    WorkflowError    There is no ``=``.
    """
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise WorkflowError(f"--input {text!r} is not NAME=VALUE. For instance: --input goal='a todo CLI'")
    return name.strip(), value_of(value)


def value_of(text: str) -> Any:
    """A number when `text` is one, else `text`."""
    try:
        found = json.loads(text)
    except ValueError:
        return text
    return found if isinstance(found, (int, float)) and not isinstance(found, bool) else text


# -- help --------------------------------------------------------------------------------------------------------------


def usage(command: Command) -> str:
    """The shape of the command in one line."""
    sign = "%%cm" if command.forms == ("cell",) else "%cm"
    words = [sign, command.name]
    for argument in command.arguments:
        shown = argument.shown
        words.append({"": shown, "?": f"[{shown}]", "*": f"[{shown} …]"}[argument.many])
    if command.words:
        words += ["[--step STEP]", command.words.upper().replace(" ", "-")]
    elif command.options:
        words.append("[options]")
    return " ".join(words)


def help_text(command: Command) -> str:
    """What ``%cm COMMAND --help`` says: a screen, of at most 30 lines."""
    lines = [usage(command), command.meaning]
    if "cell" in command.forms:
        body = f"The body of `%%cm {command.name}` is {command.body}."
        lines[1:] = [f"{lines[1]} {body}"] if len(lines[1] + body) < 120 else [lines[1], body]
    if command.options:
        rows = []
        for option in command.options:
            shape = ", ".join(sorted({*option.short, option.usual}, key=len))
            if option.off:
                shape += f" / {option.off}"
            elif option.kind != "switch":
                shape += " " + ("|".join(option.choices) or option.example or "VALUE")
            rows.append((shape, option.meaning))
        width = min(44, max(len(shape) for shape, _ in rows))
        lines += ["", *(f"  {shape:<{width}}  {meaning}" for shape, meaning in rows)]
    lines += ["", f"In Python: {command.twin}"]
    for before, example in zip(("", *command.examples), command.examples, strict=False):
        if before and "\n" in before + example:  # a cell stands apart; lines stand below each other
            lines.append("")
        lines += [f"    {line}" for line in example.splitlines()]
    return "\n".join(lines)


def overview() -> str:
    """What there is, a line each: ``%cm --help``."""
    width = max(map(len, COMMANDS))
    lines = [f"  {command.name:<{width}}  {command.meaning}" for command in COMMANDS.values()]
    return "\n".join(
        ["%cm SUBCOMMAND …; `%cm SUBCOMMAND --help` says more about one, `%cm?` has examples.", "", *lines]
    )
