"""The command line: what can be asked for, and who does it.

Strategy: a thin edge. A command is a row of a table (``options.py`` has the form, and the options that the magic has,
too) and a function that takes its words and gives an exit code. The parts stand in ``terminal/``: reading words, the
terminal, a run in it, and what decides about runs that are driven elsewhere. Whatever is wrong is one line.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import shlex
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from . import config
from . import run as runs
from .allowed import permissions
from .errors import CodeMachineError, GatePending, RunLocked, WorkflowError, did_you_mean, in_terminal
from .journal import AnyJournal, command_of, open_journal
from .options import COMMANDS, Argument, Command, Option
from .presence import somebody
from .prompts import check_read
from .render.markdown import clean
from .run import Run
from .starting import check_options
from .terminal import DONE, FAILED, LOCKED, STOPPED, USAGE, WAITING, anywhere
from .terminal.anywhere import DEBUG, JOURNAL
from .terminal.console import Console, complain, is_terminal, let_go_of_stdout, prepare_streams
from .terminal.files import file_and_name, load
from .terminal.parser import Misunderstood, Pair, Parser
from .terminal.session import Session
from .workflow import LIMITS, Workflow

# -- what can be asked for ---------------------------------------------------------------------------------------------

_VERBOSE = Option("verbose", "print what the agents write, too", "switch", ("-v",), own=True)
_SHARED = ("until", "inputs", "engine", "tape", "record", "on_gate", "on_waiting", *LIMITS, "workspace")
"""Options of ``%cm run`` that ``run`` has, too; ``resume`` all but the last, as a run keeps its folder."""

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
        _VERBOSE,
        DEBUG,
    ),
)
RESUME = Command(
    "resume",
    "Go on with a run of the journal here: finished steps and decisions are kept.",
    "cm.resume(…)",
    (Argument("run", "its id, or how it begins; the one that is unfinished without it", many="?"),),
    (
        Option("workflow", "where it is defined, if it has Python functions: plan.py", example="FILE", own=True),
        *(
            option
            for option in COMMANDS["run"].options
            if option.parameter in _SHARED and option.parameter != "workspace"
        ),
        JOURNAL,
        _VERBOSE,
        DEBUG,
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
        DEBUG,
    ),
)
PERMISSIONS = Command(
    "permissions",
    "The tools that may always be called unasked; revoke NAME: ask again before that one.",
    "cm.permissions(…)",
    COMMANDS["permissions"].arguments,
    (Option("journal", "beside which the list is kept", example="FILE"), DEBUG),
)
DOCTOR = Command("doctor", "What is here, what is missing, and how to mend it.", "cm.doctor()", (), (DEBUG,))
CLEAN = Command(
    "clean",
    "Take run ids, times and views of unfinished runs out of notebooks: files, or from stdin to stdout.",
    "",
    (Argument("files", "notebooks, cleaned in place; none: stdin", many="*"),),
    (
        Option("install", "let git clean what is added in the repository here", "switch", own=True),
        Option("uninstall", "let it do that no more", "switch", own=True),
        Option("check", "change nothing; say which would change, or whether git cleans here", "switch", own=True),
        Option("keep_count", "leave the numbers of executions", "switch", own=True),
        DEBUG,
    ),
)
CLEAN_EXAMPLES = """\
Examples:
  cm-notebook clean --install
  cm-notebook clean --install --keep-count
  cm-notebook clean plan.ipynb
  cm-notebook clean --check *.ipynb

Taken out: ids and times of runs in views, in lines that begin with "cm: " and in errors; ids of
runs in all that cells print; the picture of a timeline, of which the words stay; views of runs at
work and of gates. What your own code prints besides stays, as do runs that play a tape, and a
timeline as text or Mermaid.

Exit codes: 0 done, or nothing to do; 1 something would change or is wrong. What is no notebook
comes out of the filter as it went in.
"""
DOCTOR_CODES = "Exit codes: 0 all is well; 1 there is something to look at.\n"

HELP = """\
cm-notebook: workflows of AI agents, with you deciding at the right moments.

  cm-notebook tutorial [NAME]    copy the notebooks and open them in JupyterLab
  cm-notebook run FILE           run the workflow in a .py or .json file
  cm-notebook runs               the runs there are, wherever they are driven
  cm-notebook show [RUN] [STEP]  how it stands, what it waits for, what to type
  cm-notebook approve [RUN] [STEP]
              also reject, edit, skip, retry, answer; pause, unpause, stop
  cm-notebook resume [RUN]       go on with it here
  cm-notebook rewind RUN STEP    go back to before a step; fork: in a new run
  cm-notebook diff RUN STEP      compare attempts, or with --against two runs
  cm-notebook export RUN FILE    write it as a program, a test or a tape
  cm-notebook clean [FILE …]     take times and ids out of notebooks, for git
  cm-notebook permissions        the tools that may always be called unasked
  cm-notebook doctor             what is here, what is missing, how to mend it
  cm-notebook COMMAND --help     more about one of them
  cm-notebook --version

Examples:
  cm-notebook tutorial
  cm-notebook run plan.py --input goal='a todo CLI'

In a notebook: %load_ext cm_notebook, then %cm?
"""
CODES = """\
-p NAME VALUE is --input NAME=VALUE, as papermill has it.

Exit codes: 0 completed, or paused where --until said; 1 failed, or the file or a value is wrong;
2 not understood; 3 waits for a decision; 4 stopped; 8 driven elsewhere. --resume goes on with what did not complete.
"""
RESUME_CODES = """\
Exit codes: those of `cm-notebook run`; 6 nothing is unfinished; 7 no such run or journal; 8 it is driven elsewhere.
"""
RUN_EXAMPLES = """\
Examples:
  cm-notebook run plan.py --input goal='a todo CLI' -v
  cm-notebook run plan.py --resume r-1f2e3d4c
"""


def main(words: Sequence[str] | None = None) -> int:
    """What the program does with `words` (default: those of the process); returns the exit code."""
    words = list(sys.argv[1:] if words is None else words)
    prepare_streams()
    try:
        with _ends_as_interrupts(), in_terminal():
            return _dispatch(words)
    except Misunderstood as error:
        code = USAGE
        complain(str(error))
    except anywhere.Refused as error:
        code = error.code
        complain(str(error))
    except RunLocked as error:
        code = LOCKED
        listing = command_of(error.path, "runs") if error.path is not None else "cm-notebook runs"
        complain(f"{error} `{listing}` shows what it waits for.")
    except GatePending as error:
        code = WAITING
        complain(str(error))
    except CodeMachineError as error:
        code = FAILED
        if "--debug" in words:
            traceback.print_exc()
        complain(str(error))
    except KeyboardInterrupt:
        code = STOPPED
        complain("stopped.")
    except BrokenPipeError:  # `| head` has seen enough
        code = FAILED
        let_go_of_stdout()
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
        "resume": _resume,
        "tutorial": _tutorial,
        "clean": _clean,
        "permissions": _permissions,
        "doctor": _doctor,
        **{name: functools.partial(anywhere.obey, name) for name in anywhere.COMMANDS_HERE},
    }
    if name not in commands:
        raise Misunderstood(f"there is no command {name!r}. {did_you_mean(name, commands, 'Commands')}")
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
    asked = Parser(PERMISSIONS).read(words)
    if asked is None:
        return DONE
    found = permissions(asked.get("journal"))
    if asked["what"] is not None:
        if asked["what"] != "revoke" or asked["tool"] is None:
            raise Misunderstood("permissions lists them; permissions revoke NAME takes one back.")
        found.revoke(asked["tool"])
    print(clean(repr(found)))
    return DONE


def _clean(words: list[str]) -> int:
    asked = Parser(CLEAN, CLEAN_EXAMPLES).read(words)
    if asked is None:
        return DONE
    from . import gitfilter

    files, check, keep_count = asked["files"], "check" in asked, "keep_count" in asked
    ways = [name for name in ("install", "uninstall", "check") if name in asked]
    if len(ways) > 1 or (files and ways and not check):
        raise Misunderstood("clean: --install and --uninstall stand alone; --check may have files.")
    if files:
        changed = gitfilter.clean_files(files, keep_count=keep_count, check=check)
        for name in changed:
            print(f"{name} {'would be' if check else 'is'} cleaned")
        return FAILED if check and changed else DONE
    if check:
        here = gitfilter.installed() and gitfilter.attributed()
        print(f"git {'cleans' if here else 'does not clean'} notebooks here.")
        return DONE if here else FAILED
    if ways:
        print(gitfilter.install(keep_count=keep_count) if "install" in asked else gitfilter.uninstall())
        return DONE
    if is_terminal(sys.stdin):
        raise Misunderstood("clean: name a notebook, or --install. As a filter it reads stdin.")
    problem = gitfilter.filter_stdin(keep_count=keep_count)
    if problem is not None:
        complain(f"clean: {problem}")
    return DONE if problem is None else FAILED


def _doctor(words: list[str]) -> int:
    if Parser(DOCTOR, DOCTOR_CODES).read(words) is not None:
        from . import doctor

        report = doctor()
        print(report)
        return FAILED if report.problems else DONE
    return DONE


def _tutorial(words: list[str]) -> int:
    asked = Parser(TUTORIAL, "Exit codes of --execute: those of `cm-notebook run`.\n").read(words)
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
    parser = Parser(RUN, f"{CODES}\n{RUN_EXAMPLES}")
    parser.add_argument("-p", nargs=2, dest="inputs", action=Pair, default=argparse.SUPPRESS)
    asked = parser.read(words)
    if asked is None:
        return DONE
    if "resume" in asked and "workspace" in asked:
        raise Misunderstood("--workspace: a run keeps the folder that it began in. Leave it out with --resume.")
    return _drive(asked, _beginning(asked), lambda run: _again(asked, run))


def _resume(words: list[str]) -> int:
    asked = Parser(RESUME, RESUME_CODES).read(words)
    if asked is None:
        return DONE
    journal = anywhere.journal_of(asked)
    found = anywhere.find_run(journal, asked["run"], anywhere.unfinished, "is unfinished")
    file = asked.get("workflow")
    workflow = load(*file_and_name(file)) if file is not None else None
    asked = {**asked, "resume": found.id}

    def again(run: str) -> str:
        words = ["cm-notebook", "resume", run]
        return shlex.join([*words, *_kept(asked, "workflow", "journal", "engine", "tape", "record")])

    functions = [agent.id for agent in found.state.agents.values() if agent.missing is not None]
    if workflow is None and functions:
        raise WorkflowError(
            f"{found.id} needs Python functions, which no journal can keep: {', '.join(functions)}. Name the file that "
            f"defines them: {again(found.id)} --workflow FILE.py"
        )
    return _drive(asked, _going_on(asked, workflow, journal), again)


Begins = Callable[..., tuple[Run, int]]
"""Takes the options that ``Run.start`` and ``cm.resume`` share; gives the run, and up to where its story was told."""


def _drive(asked: dict[str, Any], begin: Begins, again: Callable[[str], str | None]) -> int:
    """Begin a run and see it through; `again` is the line that goes on with it."""
    console = Console()
    policy = asked.get("on_gate") or config.setting("on_gate")
    there = policy is None and somebody() and (console.can_ask or config.setting("headless") is False)
    config.chosen["headless"] = not there  # the run asks the same question, and must come to the same answer
    given = {
        name: asked[name] for name in ("engine", "tape", "record", "until", "on_waiting", *LIMITS) if name in asked
    }
    held = _HeldInterrupts()
    try:
        run, known = begin(on_gate=policy, **given)
        told = Session(run, console, asks=there and console.can_ask, verbose="verbose" in asked, known=known)
    except BaseException:
        held.release()
        raise
    return told.see_through(again(run.id), until=asked.get("until"), ready=held.release)


def _beginning(asked: dict[str, Any]) -> Begins:
    """What begins the run that was asked for."""
    workflow = load(asked["file"], asked.get("workflow"))
    names = ("engine", "tape", "record", "workspace", "on_waiting")
    check_options(**{name: asked[name] for name in names if name in asked})
    journal = open_journal(asked.get("journal") or config.setting("journal"))
    if "resume" in asked:
        return _going_on(asked, workflow, journal)
    inputs, workspace = asked.get("inputs", {}), asked.get("workspace")
    return lambda **options: (Run.start(workflow, inputs, journal=journal, workspace=workspace, **options), 0)


def _going_on(asked: dict[str, Any], workflow: Workflow | None, journal: AnyJournal) -> Begins:
    """What goes on with a run of the journal."""
    before, inputs = Run.open(asked["resume"], journal), asked.get("inputs", {})
    state, known = before.state, before.state.seq
    now = workflow if workflow is not None else before.workflow
    check_read(now, inputs, {**now.inputs, **state.inputs})
    return lambda **options: (runs.resume(before.id, workflow, inputs=inputs, journal=journal, **options), known)


def _kept(asked: dict[str, Any], *names: str) -> list[str]:
    """The options among `names` that were given, as they are written."""
    return [word for name in names if name in asked for word in (f"--{name}", asked[name])]


def _again(asked: dict[str, Any], run_id: str) -> str | None:
    """The line that goes on with the run; ``None`` where it is not kept."""
    journal = asked.get("journal") or config.setting("journal")
    if journal == ":memory:":
        return None
    words = ["cm-notebook", "run", asked["file"], "--resume", run_id]
    return shlex.join([*words, *_kept(asked, "workflow", "journal", "engine", "tape", "record")])
