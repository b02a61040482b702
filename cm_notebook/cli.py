"""The command line: run a workflow in a terminal or a pipe, open the tutorial, look what is here.

Strategy: a thin edge. The run goes on its own thread; this one takes turns at three things: print what has happened,
ask the person at a gate, wait. Each line is made from a copy of the state as it was at its event, so that a fast run
reads like a slow one. A person is asked only where one can see the question and type the answer, and only when no
policy (``--on-gate``) stands in; what was typed before a question was shown is no answer to it. Whatever ends the
waiting, be it the run, Ctrl+C or a closed pipe, leaves a run that can be resumed, one line about how, and an exit code.

What agents write is hostile: it is cleaned before a terminal sees it.
"""

from __future__ import annotations

import argparse
import asyncio
import codecs
import contextlib
import importlib.util
import json
import os
import re
import select
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import IO, Any, NoReturn

from . import config, options
from . import run as runs
from .allowed import permissions
from .errors import CodeMachineError, GatePending, TransitionError, WorkflowError, did_you_mean
from .events import (
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
from .feed import LiveText
from .journal import open_journal
from .loops import SLICE_S, engine_loop, run_sync
from .options import COMMANDS, Argument, Command, Option
from .presence import somebody
from .prompts import check_read
from .render import text as say
from .render.markdown import clean
from .run import Run
from .runstate import RunState, StepState
from .starting import check_options
from .state import apply
from .workflow import LIMITS, Workflow

DONE, FAILED, USAGE, WAITING, STOPPED = range(5)
"""Exit codes."""

ENDING_S = 5.0
"""Seconds that agents get to end their programs when the run is stopped."""

# -- what can be asked for ---------------------------------------------------------------------------------------------

_DEBUG = Option("debug", "show where an error comes from", "switch", own=True)
_SHARED = ("until", "inputs", "engine", "tape", "on_gate", "workspace", *LIMITS)

RUN = Command(
    "run",
    "Run the workflow in a file; one line for each thing that happens.",
    "workflow.start(…)",
    (Argument("file", "a .py with a cm.Workflow, or a .json of Workflow.to_dict()"),),
    (
        *(option for option in COMMANDS["run"].options if option.parameter in _SHARED),
        Option("journal", "where runs are kept, or :memory:", example="FILE"),
        Option("workflow", "which one, when the file has several", example="NAME", own=True),
        Option("resume", "go on with a run of the journal", example="RUN", own=True),
        Option("verbose", "print what the agents write, too", "switch", ("-v",), own=True),
        _DEBUG,
    ),
)
TUTORIAL = Command(
    "tutorial",
    "Copy the notebooks here and open them in JupyterLab; no key is needed.",
    "",
    (Argument("name", "which one: 01, human, …; the first one without it", many="?"),),
    (
        Option("to", "folder for the copy", example="DIR", own=True),
        Option("list", "only say which there are", "switch", own=True),
        Option("execute", "run it here, with nobody watching", "switch", own=True),
        Option("no_browser", "only print the address", "switch", own=True),
        _DEBUG,
    ),
)
PERMISSIONS = Command(
    "permissions",
    "The tools that may always be called unasked; revoke NAME: ask again before that one.",
    "cm.permissions(…)",
    COMMANDS["permissions"].arguments,
    (Option("journal", "beside which the list is kept", example="FILE"), _DEBUG),
)
DOCTOR = Command("doctor", "What is here, what is missing, and how to mend it.", "cm.doctor()", (), (_DEBUG,))
DOCTOR_CODES = "Exit codes: 0 all is well; 1 there is something to look at.\n"

HELP = """\
cm-notebook: workflows of AI agents, with you deciding at the right moments.

  cm-notebook tutorial [NAME]    copy the notebooks and open them in JupyterLab
  cm-notebook run FILE           run the workflow in a .py or .json file
  cm-notebook permissions        the tools that may always be called unasked
  cm-notebook doctor             what is here, what is missing, how to mend it
  cm-notebook COMMAND --help     more about one of them
  cm-notebook --version

Examples:
  cm-notebook tutorial
  cm-notebook run plan.py --input goal='a todo CLI'
  cm-notebook run plan.py --tape tapes/plan.jsonl --on-gate approve

In a notebook: %load_ext cm_notebook, then %cm?
"""
CODES = """\
-p NAME VALUE is --input NAME=VALUE, as papermill has it.

Exit codes: 0 completed, or paused where --until said; 1 failed, or the file or a value is wrong;
2 not understood; 3 waits for a decision; 4 stopped. A run that did not complete can go on: --resume.
"""
RUN_EXAMPLES = """\
Examples:
  cm-notebook run plan.py --input goal='a todo CLI' -v
  cm-notebook run plan.py --until planner
  cm-notebook run plan.py --resume r-1f2e3d4c
"""


class _Misunderstood(CodeMachineError):
    """The command line itself is wrong."""


class _Parser(argparse.ArgumentParser):
    """argparse that says in one line what would be right, and never ends the process."""

    def __init__(self, command: Command, epilog: str = "") -> None:
        super().__init__(
            prog=f"cm-notebook {command.name}",
            allow_abbrev=False,
            add_help=False,
        )
        self._command, self._epilog = command, epilog
        for argument in command.arguments:
            many: dict[str, Any] = {"nargs": argument.many} if argument.many else {}
            self.add_argument(argument.name, metavar=argument.shown, **many)
        options.add_options(self, command.options)
        self._flags = {flag: option.usual for option in command.options for flag in option.flags}

    def format_help(self) -> str:
        """The page that ``--help`` prints."""
        arguments = self._command.arguments
        rows = [[argument.shown, argument.meaning] for argument in arguments]
        for option in self._command.options:
            flags = ", ".join([*(flag for flag in option.short if flag[1] != "-"), option.usual])
            value = "" if option.kind == "switch" else " " + ("|".join(option.choices) or option.example)
            rows.append([flags + value, option.meaning])
        shown = "".join(f" [{argument.shown}]" if argument.many else f" {argument.shown}" for argument in arguments)
        lines = [f"usage: {self.prog}{shown} [options]", "", self._command.meaning, ""]
        lines += (f"  {line}" for line in say.table(rows))
        return "\n".join([*lines, *(["", self._epilog] if self._epilog else [""])])

    def read(self, words: Sequence[str]) -> dict[str, Any] | None:
        """What was asked for, by parameter; ``None`` when help was, which is printed.

        Raises
        ------
        _Misunderstood    It cannot be read.
        """
        if "-h" in words or "--help" in words:
            print(self.format_help(), end="")
            return None
        for word in words:
            flag = word.partition("=")[0]
            if re.match(r"--[A-Za-z]", word) and flag not in self._flags:
                hint = did_you_mean(flag, dict.fromkeys(self._flags.values()), "Options")
                raise _Misunderstood(f"{self._command.name} has no option {flag}. {hint}")
        try:
            return vars(self.parse_args(list(words)))
        except WorkflowError as error:  # from what reads a value
            raise _Misunderstood(f"{self._command.name}: {error}") from None

    def error(self, message: str) -> NoReturn:
        """Refuse, in one line."""
        raise _Misunderstood(f"{self._command.name}: {message}. See `{self.prog} --help`.")


class _Pair(argparse.Action):
    """``-p NAME VALUE``, as papermill has it."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option: str | None = None) -> None:
        pairs = dict(getattr(namespace, self.dest, None) or {})
        namespace.__dict__[self.dest] = {**pairs, values[0]: options.value_of(values[1])}


def main(words: Sequence[str] | None = None) -> int:
    """What the program does with `words` (default: those of the process); returns the exit code."""
    words = list(sys.argv[1:] if words is None else words)
    _prepare_streams()
    try:
        with _ends_as_interrupts():
            return _dispatch(words)
    except _Misunderstood as error:
        code = USAGE
        _complain(str(error))
    except GatePending as error:
        code = WAITING
        _complain(str(error))
    except CodeMachineError as error:
        code = FAILED
        if "--debug" in words:
            traceback.print_exc()
        _complain(str(error))
    except KeyboardInterrupt:
        code = STOPPED
        _complain("stopped.")
    except BrokenPipeError:  # `| head` has seen enough
        code = FAILED
        _let_go_of_stdout()
    return code


@contextlib.contextmanager
def _ends_as_interrupts() -> Iterator[None]:
    """The end of a CI job, and of a terminal, are taken as Ctrl+C."""
    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    mine = threading.current_thread() is threading.main_thread()
    taken = [number for number in numbers if mine and signal.getsignal(number) is signal.SIG_DFL]
    try:
        for number in taken:
            signal.signal(number, signal.default_int_handler)
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)


class _HeldInterrupts:
    """Ctrl+C waits until ``release``, where it counts: a run that has begun must be there to be stopped by it.

    A second one does not wait.
    """

    def __init__(self) -> None:
        self._came = False
        numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
        mine = threading.current_thread() is threading.main_thread()
        self._taken = [number for number in numbers if mine and signal.getsignal(number) is signal.default_int_handler]
        for number in self._taken:
            signal.signal(number, self._note)

    def _note(self, *_: object) -> None:
        if self._came:
            raise KeyboardInterrupt
        self._came = True

    def release(self) -> None:
        """From now on it is as before; what came meanwhile comes now."""
        for number in self._taken:
            signal.signal(number, signal.default_int_handler)
        self._taken = []
        if self._came:
            self._came = False
            raise KeyboardInterrupt


def _dispatch(words: list[str]) -> int:
    name = words[0] if words else "--help"
    if name in ("-h", "--help", "help"):
        print(HELP, end="")
        return DONE if words else USAGE
    if name in ("-V", "--version"):
        print(f"cm-notebook {version()}")
        return DONE
    commands: dict[str, Callable[[list[str]], int]] = {
        "run": _run,
        "tutorial": _tutorial,
        "permissions": _permissions,
        "doctor": _doctor,
    }
    if name not in commands:
        raise _Misunderstood(f"there is no command {name!r}. {did_you_mean(name, commands, 'Commands')}")
    return commands[name](words[1:])


def version() -> str:
    """The installed version."""
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as installed

    try:
        return installed("cm-notebook")
    except PackageNotFoundError:
        return "(from its sources)"


def _permissions(words: list[str]) -> int:
    asked = _Parser(PERMISSIONS).read(words)
    if asked is None:
        return DONE
    found = permissions(asked.get("journal"))
    if asked["what"] is not None:
        if asked["what"] != "revoke" or asked["tool"] is None:
            raise _Misunderstood("permissions lists them; permissions revoke NAME takes one back.")
        found.revoke(asked["tool"])
    print(clean(repr(found)))
    return DONE


def _doctor(words: list[str]) -> int:
    if _Parser(DOCTOR, DOCTOR_CODES).read(words) is not None:
        from . import doctor

        report = doctor()
        print(report)
        return FAILED if report.problems else DONE
    return DONE


def _tutorial(words: list[str]) -> int:
    asked = _Parser(TUTORIAL, "Exit codes of --execute: those of `cm-notebook run`.\n").read(words)
    if asked is None:
        return DONE
    from . import tutorial

    if asked.get("list"):
        print("\n".join(tutorial.listing(tutorial.source())))
        return DONE
    return tutorial.tutorial(
        asked["name"],
        Path(asked["to"]) if "to" in asked else None,
        execute="execute" in asked,
        browser="no_browser" not in asked,
    )


# -- run: from the words to the run ------------------------------------------------------------------------------------


def _run(words: list[str]) -> int:
    parser = _Parser(RUN, f"{CODES}\n{RUN_EXAMPLES}")
    parser.add_argument("-p", nargs=2, dest="inputs", action=_Pair, default=argparse.SUPPRESS)
    asked = parser.read(words)
    if asked is None:
        return DONE
    if "resume" in asked and "workspace" in asked:
        raise _Misunderstood("--workspace: a run keeps the folder that it began in. Leave it out with --resume.")
    console = Console()
    policy = asked.get("on_gate") or config.setting("on_gate")
    there = policy is None and somebody() and (console.can_ask or config.setting("headless") is False)
    config.chosen["headless"] = not there  # the run asks the same question, and must come to the same answer
    begin = _beginning(asked, policy)
    held = _HeldInterrupts()
    try:
        run, known = begin()
        told = Session(run, console, asks=there and console.can_ask, verbose="verbose" in asked, known=known)
    except BaseException:
        held.release()
        raise
    return told.see_through(_again(asked, run.id), until=asked.get("until"), ready=held.release)


def _beginning(asked: dict[str, Any], policy: Any) -> Callable[[], tuple[Run, int]]:
    """What begins the run that was asked for, and says up to which event its story was told before."""
    workflow = load(asked["file"], asked.get("workflow"))
    check_options(**{name: asked[name] for name in ("engine", "tape", "workspace") if name in asked})
    journal = open_journal(asked.get("journal") or config.setting("journal"))
    inputs = asked.get("inputs", {})
    given = {name: asked[name] for name in ("engine", "tape", "until", *LIMITS) if name in asked}
    if "resume" not in asked:
        workspace = asked.get("workspace")
        return lambda: (
            Run.start(workflow, inputs, journal=journal, workspace=workspace, on_gate=policy, **given),
            0,
        )
    before = Run.open(asked["resume"], journal).state
    known = before.seq
    check_read(workflow, inputs, {**workflow.inputs, **before.inputs})
    return lambda: (
        runs.resume(asked["resume"], workflow, inputs=inputs, journal=journal, on_gate=policy, **given),
        known,
    )


def _again(asked: dict[str, Any], run_id: str) -> str | None:
    """The line that goes on with the run; ``None`` where it is not kept."""
    journal = asked.get("journal") or config.setting("journal")
    if journal == ":memory:":
        return None
    words = ["cm-notebook", "run", asked["file"], "--resume", run_id]
    for name in ("workflow", "journal", "engine", "tape"):
        if name in asked:
            words += [f"--{name}", asked[name]]
    return shlex.join(words)


def load(file: str, name: str | None = None) -> Workflow:
    """The workflow in a file: ``.py``, which is imported, or ``.json``.

    Parameters
    ----------
    name
        The variable that holds it, when a ``.py`` has several; without it the one named ``workflow`` or ``wf``.

    Raises
    ------
    WorkflowError    There is no such file, none or more than one in it, or it is wrong; the message says where.
    """
    path = Path(file)
    if not path.is_file():
        near = sorted(str(other) for pattern in ("*.py", "*.json") for other in path.parent.glob(pattern))
        hint = f" {did_you_mean(file, near, 'Here')}" if near else ""
        raise WorkflowError(f"there is no file {file!r}.{hint}")
    if path.suffix == ".json":
        return _load_json(path)
    if path.suffix == ".ipynb":
        raise WorkflowError(f"{file!r} is a notebook. Open it in Jupyter, or run it headless: jupyter execute {file}")
    if path.suffix != ".py":
        raise WorkflowError(f"{file!r} is neither .py nor .json.")
    return _choose(_import(path), file, name)


def _load_json(path: Path) -> Workflow:
    try:
        return Workflow.from_dict(json.loads(path.read_text(encoding="utf-8-sig")))
    except (OSError, ValueError, RecursionError) as error:
        raise WorkflowError(f"{path}: this is not JSON: {error}.") from error
    except WorkflowError as error:
        raise WorkflowError(f"{path}: {error}") from error


def _import(path: Path) -> ModuleType:
    """The module of that file, as if imported from its folder; what stands under ``__main__`` is not run."""
    name = f"cm_file_{re.sub(r'[^0-9A-Za-z_]', '_', path.stem)}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise WorkflowError(f"{path} cannot be imported.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    sys.path.insert(0, str(path.parent.absolute()))
    before = _current()
    try:
        spec.loader.exec_module(module)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # anything that a file can do, SystemExit included
        raise WorkflowError(f"{_place(path, error)}: {_said(error)}") from error
    started = _current()
    if started is not None and started is not before:
        with contextlib.suppress(CodeMachineError):
            started.stop()
        raise WorkflowError(
            f'{path} starts a run itself. Put that below `if __name__ == "__main__":`, so that only one run begins.'
        )
    return module


def _current() -> Run | None:
    with contextlib.suppress(TransitionError):
        return runs.current()
    return None


def _place(path: Path, error: BaseException) -> str:
    """The file, and the line in it where the error came up."""
    own = str(path.absolute())
    if isinstance(error, SyntaxError):
        file = path if error.filename in (own, None) else error.filename  # a NUL byte stands nowhere
        return f"{file}, line {error.lineno}" if error.lineno is not None else str(file)
    here = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == own]
    return f"{path}, line {here[-1]}" if here else str(path)


def _said(error: BaseException) -> str:
    if isinstance(error, SyntaxError):
        return f"{type(error).__name__}: {error.msg}"
    return str(error) if isinstance(error, CodeMachineError) else f"{type(error).__name__}: {error}"


def _choose(module: ModuleType, file: str, name: str | None) -> Workflow:
    found = {key: value for key, value in vars(module).items() if isinstance(value, Workflow)}
    if name is not None:
        if name not in found:
            raise WorkflowError(f"{file} has no workflow {name!r}. {did_you_mean(name, found, 'Workflows')}")
        return found[name]
    if not found:
        raise WorkflowError(f"{file} defines no workflow: workflow = cm.Workflow(…) is expected at its top level.")
    if len({id(value) for value in found.values()}) == 1:
        return next(iter(found.values()))
    for usual in ("workflow", "wf"):
        if usual in found:
            return found[usual]
    raise WorkflowError(f"{file} defines several workflows. Choose one: --workflow {' or '.join(found)}")


# -- run: telling and asking -------------------------------------------------------------------------------------------

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
        feed = self._run.watch(self._awake.set)
        try:
            ready()
            self._tell(self._run.events)
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
        path = self._run._journal.path
        if path == ":memory:":
            return "--journal FILE"
        usual = os.path.realpath(str(config.setting("journal"))) == path
        return f"cm.Run.open({self._run.id!r}{'' if usual else f', {path!r}'}){what}"

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
            _complain(message, more=self._in_python(".state.reason"))
        if again is not None:
            _complain(f"Go on with it: {again}", sign="")
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
            decision = state.decisions.get(gate.id)
        in_vain = decision is not None and decision.by == GATE_DEADLINE
        return "(its time is over)" if in_vain else "(answered elsewhere)"

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
        shown, asks = self._subject(gate, step), gate.kind == "question"
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

    def _subject(self, gate: Gate, step: StepState) -> str:
        """The text that is decided about."""
        if gate.kind == "start":
            return self._state.text(step.redo.prompt) if step.redo is not None else ""
        if gate.kind == "budget":
            return ""
        if gate.kind == "permission":
            return say.requested(gate)
        if gate.kind == "question":
            question = str(gate.payload.get("question", ""))
            return "" if say.one_line(question, say.QUESTION) == question else question  # else the sentence has it
        last = step.last
        if gate.kind == "failed":
            return (last.error.detail or "") if last is not None and last.error is not None else ""
        return last.text if last is not None else ""

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
            text = self._console.edit(self._subject(gate, step))
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
        return clean(self._subject(gate, step)) or "There is no text."

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


# -- the terminal ------------------------------------------------------------------------------------------------------

_COLOURS = {"bold": "1", "dim": "2", "red": "31", "green": "32", "yellow": "33"}
_IN_ASCII = str.maketrans({"“": '"', "”": '"', "‘": "'", "’": "'", "…": "...", "—": "-", "–": "-", "·": "|", "→": "->"})


class NobodyReads(Exception):
    """Stdout is closed: ``| head`` has seen enough, or the terminal is gone."""


class Console:
    """Stdout for what happens; for questions stdout too, or stderr where stdout is a file or a pipe."""

    def __init__(self) -> None:
        self._out, self._talk = sys.stdout, sys.stdout if _is_terminal(sys.stdout) else sys.stderr
        self._mid_line = False
        self.closed = False
        self.can_ask = _is_terminal(sys.stdin) and _is_terminal(self._talk)

    def line(self, text: str, look: str = "") -> None:
        """A line about what happened."""
        self.fresh_line()
        self._write(self._out, _painted(self._out, text, look) + "\n")

    def live(self, text: str, look: str = "") -> None:
        """A piece of text as it is written."""
        if text:
            self._write(self._out, _painted(self._out, text, look))
            self._mid_line = not text.endswith("\n")

    def fresh_line(self) -> None:
        """End a line that was begun."""
        if self._mid_line:
            self._mid_line = False
            self._write(self._out, "\n")

    def say(self, text: str, look: str = "") -> None:
        """A line of the conversation."""
        self.fresh_line()
        self._write(self._talk, _painted(self._talk, text, look) + "\n")

    def ask(self, prompt: str, in_vain: Callable[[], bool]) -> str | None:
        """A line that the person types; ``None`` as soon as `in_vain` says that it is not needed any more.

        Raises
        ------
        EOFError    Ctrl+D, or the terminal is gone.
        """
        self._write(self._talk, _painted(self._talk, prompt, "bold"))
        self._mid_line = self._talk is self._out
        stdin = sys.stdin
        if os.name == "posix":  # elsewhere a terminal cannot be waited for together with anything else
            while not select.select([stdin], [], [], SLICE_S)[0]:
                if in_vain():
                    self.fresh_line()
                    return None
        line = stdin.readline()
        if not line:
            raise EOFError
        self._mid_line = False
        return line

    def forget_typed(self) -> None:
        """Drop what was typed before the question was there to be read."""
        if os.name == "posix":
            import termios

            with contextlib.suppress(termios.error):
                termios.tcflush(sys.stdin, termios.TCIFLUSH)

    def edit(self, text: str) -> str | None:
        """The text as the person leaves it in an editor; ``None`` when it is the same or the editor failed.

        Raises
        ------
        CodeMachineError    There is no editor.
        """
        usual = next((name for name in ("nano", "vi", "notepad") if shutil.which(name)), "")
        editor = os.environ.get("VISUAL") or os.environ.get("EDITOR") or usual
        if not editor:
            raise CodeMachineError("there is no editor here. Name one: export EDITOR=nano")
        with tempfile.TemporaryDirectory(prefix="cm-") as folder, _deaf_to_interrupts():
            file = Path(folder, "text.md")
            file.write_text(text, encoding="utf-8", errors="replace", newline="")
            try:
                ended = subprocess.run([*shlex.split(editor), str(file)], stdout=self._talk).returncode
            except (OSError, ValueError) as error:
                raise CodeMachineError(
                    f"the editor {editor!r} does not start: {error}. Name another: $EDITOR"
                ) from None
            new = file.read_text(encoding="utf-8", errors="replace")
        if not text.endswith("\n"):
            new = new.removesuffix("\n")  # editors end the last line
        return None if ended != 0 or new == text else new

    def _write(self, stream: IO[str] | None, text: str) -> None:
        if stream is None:
            return
        try:
            stream.write(text)
            stream.flush()
        except (OSError, ValueError):
            self.closed = True
            _let_go_of_stdout()
            raise NobodyReads from None


@contextlib.contextmanager
def _deaf_to_interrupts() -> Iterator[None]:
    """While an editor has the terminal, Ctrl+C is the editor's."""
    before = signal.signal(signal.SIGINT, lambda *_: None)  # a handler, not SIG_IGN, which the editor would inherit
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _is_terminal(stream: IO[str] | None) -> bool:
    try:
        return stream is not None and stream.isatty()
    except ValueError:  # closed
        return False


def _painted(stream: IO[str] | None, text: str, look: str) -> str:
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb" or os.name != "posix"
    if not look or plain or not _is_terminal(stream):
        return text
    return f"\x1b[{_COLOURS[look]}m{text}\x1b[0m"


def _prepare_streams() -> None:
    """Whatever the terminal's alphabet, what is printed arrives: in plain letters if need be."""

    def in_ascii(error: UnicodeError) -> tuple[str, int]:
        if not isinstance(error, UnicodeEncodeError):
            raise error
        text = error.object[error.start : error.end].translate(_IN_ASCII)
        return text.encode("ascii", "replace").decode(), error.end

    codecs.register_error("cm_notebook.ascii", in_ascii)
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace" if stream is sys.stdin else "cm_notebook.ascii")


def _let_go_of_stdout() -> None:
    """Nobody reads it: what Python still holds for it must not become an error at the end of the process."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, sys.stdout.fileno())
        os.close(devnull)


def _complain(message: str, sign: str = "cm-notebook: ", more: str = "--debug") -> None:
    with contextlib.suppress(OSError, ValueError):
        print(f"{sign}{say.bounded(message, more)}", file=sys.stderr, flush=True)
