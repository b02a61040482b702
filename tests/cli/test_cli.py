"""The command line as people meet it: real processes, with pipes, signals, and a terminal where one decides."""

from __future__ import annotations

import inspect
import json
import os
import pty
import re
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import cm_notebook as cm
from cm_notebook import cli, config
from cm_notebook.allowed import Rule, keep
from tests.helpers import until

HEAD = "import time\nfrom pathlib import Path\nimport cm_notebook as cm\n"
TWO_STEPS = (
    HEAD
    + """
@cm.agent("planner")
def planner(turn):
    return f"plan {turn.attempt} for {turn.inputs['goal']}: {turn.feedback or 'no wishes'}"

@cm.agent("coder")
def coder(turn):
    return "code for " + turn.outputs.get("planner", "")

workflow = cm.Workflow("demo", agents=[planner, coder], steps="planner? -> coder", inputs={"goal": "a CLI"})
"""
)
SLOW = (
    HEAD
    + """
@cm.agent("first")
def first(turn):
    return "one"

@cm.agent("second")
def second(turn):
    Path("started").touch()
    while not Path("go").exists():
        time.sleep(0.01)
    return "two"

@cm.agent("last")
def last(turn):
    time.sleep(60)
    return "three"

workflow = cm.Workflow("slow", agents=[first, second, last], steps="first -> second")
"""
)


def write(text: str, name: str = "flow.py") -> str:
    Path(name).write_text(text, encoding="utf-8")
    return name


def environment(**more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("CM_HEADLESS", "NO_COLOR")}
    return {**kept, "TERM": "xterm", **more}


def start(*words: str, **more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "cm_notebook", *words],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        env=environment(**more),
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # whoever runs us may ignore it
    )


class Done:
    """A process that has ended."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.out, self.err = process.communicate(timeout=60)
        self.code = process.returncode

    @property
    def lines(self) -> list[str]:
        return self.out.splitlines()


def ran(*words: str, **more: str) -> Done:
    return Done(start(*words, **more))


Here = Callable[..., tuple[int, str]]


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Here:
    """The same in this process, for what ends before an agent does anything: exit code and stderr."""
    monkeypatch.setattr(config, "chosen", {})
    monkeypatch.setattr(sys, "path", [*sys.path])

    def ran(*words: str) -> tuple[int, str]:
        code = cli.main(words)
        return code, capsys.readouterr().err

    return ran


def last_run() -> cm.Run:
    return cm.runs()[0]


# -- a run in a pipe ---------------------------------------------------------------------------------------------------


def test_a_run_is_a_line_per_event_and_ends_with_0() -> None:
    done = ran("run", write(TWO_STEPS), "--on-gate", "approve")
    assert (done.code, done.err) == (0, "")
    assert [re.split(r" <?\d+\.\ds|, ", line)[0] for line in done.lines[:6]] == [
        "cm: demo started: 2 steps",
        "cm: planner ok",
        "cm: gate: planner is waiting for you. Next: coder.",
        "cm: planner approved by on_gate",
        "cm: coder ok",
        "cm: demo completed",
    ]
    assert [line.split()[:2] for line in done.lines[6:]] == [["planner", "approved"], ["coder", "done"]]


def test_a_run_offline_says_so_once() -> None:
    agents = "a, b = cm.Agent('a', 'A.'), cm.Agent('b', 'B.')\n"
    done = ran("run", write(HEAD + agents + "wf = cm.Workflow('w', agents=[a, b], steps='a -> b')\n"))
    assert done.out.count("no model was called") == 1
    assert [" ".join(line.split()) for line in done.lines[-2:]] == ["a done", "b done"]
    assert done.out.count("w completed") == 1


def test_verbose_prints_what_the_agents_write() -> None:
    done = ran("run", write(TWO_STEPS), "--on-gate", "approve", "-v")
    assert done.lines[1:3] == ["plan 1 for a CLI: no wishes", done.lines[2]]
    assert "code for plan 1 for a CLI: no wishes" in done.lines


def test_verbose_does_not_repeat_what_was_streamed() -> None:
    text = HEAD + "\n@cm.agent('a')\ndef a(turn):\n    turn.emit('streamed text')\n    return 'streamed text'\n"
    done = ran("run", write(text + "wf = cm.Workflow('w', agents=[a], steps='a')\n"), "--verbose")
    assert done.out.count("streamed text") == 1
    assert done.lines[2].startswith("cm: a ok"), done.out


def test_verbose_tells_once_what_was_written_while_it_began_to_look(capsys: pytest.CaptureFixture[str]) -> None:
    looked_at = threading.Event()

    @cm.agent("a")
    def agent(turn: cm.Turn) -> str:
        turn.emit("before, ")
        began.set()
        looked_at.wait()
        turn.emit("after")
        return "before, after"

    def ends() -> None:
        looked_at.set()
        run.wait()

    began = threading.Event()
    run = cm.Workflow("w", agents=[agent], steps="a").start()
    began.wait()
    assert cli.Session(run, cli.Console(), asks=False, verbose=True).see_through(None, ready=ends) == 0
    out = capsys.readouterr().out
    assert (out.splitlines()[1], out.count("after")) == ("before, after", 1), out


@pytest.mark.parametrize("how", ["return text", "turn.emit(text)\n    return text"])
def test_verbose_is_bounded_and_says_where_the_rest_is(how: str) -> None:
    text = HEAD + f"\n@cm.agent('a')\ndef a(turn):\n    text = 'begin ' + 'x' * 300_000 + ' end'\n    {how}\n"
    done = ran("run", write(text + "wf = cm.Workflow('w', agents=[a], steps='a')\n"), "--verbose")
    assert len(done.out) < 70_000
    assert re.search(r"\nbegin x+\n", done.out)
    assert re.search(r"\nx+ end\n", done.out)
    command = re.search(r"\n… 236,010 characters left out. Show all: `(cm\..*)` …\n", done.out)
    assert command
    assert eval(command[1]) == "begin " + "x" * 300_000 + " end"


def test_inputs_come_from_the_command_line() -> None:
    done = ran("run", write(TWO_STEPS), "--input", "goal=a=b c", "-p", "other", "7", "--on-gate", "approve", "-v")
    assert "plan 1 for a=b c: no wishes" in done.lines
    assert last_run().state.inputs == {"goal": "a=b c", "other": 7}


def test_a_json_workflow_runs_with_the_offline_engine() -> None:
    workflow = cm.Workflow("from data", agents=[cm.Agent("planner", "Plan {{ goal }}.")], steps="planner")
    file = write(json.dumps(workflow.to_dict()), "flow.json")
    done = ran("run", file, "-p", "goal", "a CLI", "-v")
    assert done.code == 0
    assert "> Plan a CLI." in done.lines


def test_nobody_there_and_undecided_says_how_to_go_on() -> None:
    done = ran("run", write(TWO_STEPS))
    assert done.code == 3
    run = last_run()
    assert done.err.splitlines() == [
        'cm-notebook: Stopped at the gate "planner": nobody can answer here. Play a tape with a decision (`--tape`), '
        "or pass `--on-gate approve` if that is what you want.",
        f"Go on with it: cm-notebook run flow.py --resume {run.id}",
    ]


def test_a_resumed_run_tells_only_what_is_new_and_keeps_its_inputs() -> None:
    ran("run", write(TWO_STEPS), "--input", "goal=a blog")
    run = last_run()
    done = ran("run", "flow.py", "--resume", run.id, "--on-gate", "approve", "-v")
    assert (done.code, done.err) == (0, "")
    assert done.lines[0].startswith("cm: demo goes on")
    assert not any("demo started" in line or "planner ok" in line for line in done.lines)
    assert "code for plan 1 for a blog: no wishes" in done.lines


def test_until_pauses_and_is_a_success() -> None:
    done = ran("run", write(SLOW), "--until", "first")
    assert done.code == 0
    assert done.err == f"Go on with it: cm-notebook run flow.py --resume {last_run().id}\n"
    assert last_run().status == "paused"


def test_a_limit_holds_where_nobody_is_and_the_run_goes_on_with_more() -> None:
    done = ran("run", write(TWO_STEPS.replace("planner? ->", "planner ->")), "--max-turns", "1")
    assert done.code == 3
    assert (
        "cm-notebook: Paused: 1 turn limit reached after planner. Nobody can answer here. Go on with more" in done.err
    )
    assert "(`--max-turns`)" in done.err
    assert ran("run", "flow.py", "--resume", last_run().id, "--max-turns", "2").code == 0


def test_a_tape_decides_where_nobody_is() -> None:
    agent = "planner = cm.Agent('planner', 'Plan it.')\nwf = cm.Workflow('taped', agents=[planner], steps='planner?')\n"
    tape = [
        {"tape": 1, "run": "taped-1"},
        {"path": "planner", "attempt": 1, "text": "1. Do it."},
        {"gate": {"path": "planner", "attempt": 1, "kind": "review"}, "decision": {"action": "approve"}},
    ]
    Path("t.jsonl").write_text("\n".join(map(json.dumps, tape)), encoding="utf-8")
    done = ran("run", write(HEAD + agent), "--tape", "t.jsonl")
    assert (done.code, done.err) == (0, "")
    assert "cm: planner approved (recorded)" in done.lines


def test_a_run_is_recorded_and_played_by_the_command_line() -> None:
    agent = (
        "planner = cm.Agent('planner', 'Plan {{ goal }}.', engine='scripted')\n"
        "cm.register_engine(cm.ScriptedEngine({'planner': ['1. Do it.', '1. Test it.']}))\n"
        "wf = cm.Workflow('taped', agents=[planner], steps='planner?', inputs={'goal': 'it'})\n"
    )
    file = write(HEAD + agent)
    assert ran("run", file, "--record", "tapes/t.jsonl", "--on-gate", "approve").code == 0
    done = ran("run", file, "--tape", "tapes/t.jsonl")
    assert (done.code, done.err) == (0, "")
    assert "cm: planner approved (recorded)" in done.lines
    other = ran("run", file, "--tape", "tapes/t.jsonl", "--input", "goal=that")
    assert other.code == 1
    assert (
        "it changed here: recorded 'it', now 'that' (from input goal). `cm-notebook run FILE --record tapes/t"
        in other.err
    )
    refused = ran("run", file, "--tape", "tapes/t.jsonl", "--record", "tapes/t.jsonl")
    assert refused.code == 1
    assert "is the tape that is played" in refused.err
    waiting = ran("run", file, "--record", "tapes/u.jsonl")
    assert waiting.code == 3
    assert f"--resume {last_run().id} --record tapes/u.jsonl" in waiting.err


def test_the_journal_can_be_elsewhere_or_nowhere() -> None:
    done = ran("run", write(TWO_STEPS), "--journal", "else where/runs.db")
    assert done.err.endswith("--journal 'else where/runs.db'\n")
    assert [run.status for run in cm.runs("else where/runs.db")] == ["waiting"]
    done = ran("run", write(TWO_STEPS), "--journal", ":memory:")
    assert done.code == 3
    assert "--resume" not in done.err  # it is gone with the process
    assert not Path(".cm_notebook/journal.db").exists()


def test_the_workspace_is_where_agents_work(here: Here) -> None:
    text = HEAD + "\n@cm.agent('a')\ndef a(turn):\n    (turn.workspace / 'made').touch()\n    return 'x'\n"
    assert ran("run", write(text + "wf = cm.Workflow('w', agents=[a], steps='a')\n"), "--workspace", "site").code == 0
    assert Path("site/made").exists()
    code, complaint = here("run", "flow.py", "--workspace", "site", "--resume", last_run().id)
    assert code == 2
    assert complaint.startswith("cm-notebook: --workspace: ")


# -- what can be wrong -------------------------------------------------------------------------------------------------


def test_a_failed_run_ends_with_1_and_one_line() -> None:
    text = HEAD + "\n@cm.agent('a')\ndef a(turn):\n    raise ValueError('no luck')\n"
    done = ran("run", write(text + "wf = cm.Workflow('w', agents=[a], steps='a')\n"))
    assert done.code == 1
    assert done.err.splitlines() == [
        "cm-notebook: a: agent 'a' raised ValueError: no luck",
        f"Go on with it: cm-notebook run flow.py --resume {last_run().id}",
    ]
    assert "%cm" not in done.out


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("import cm_notebook as cm\n\nx = nothing\n", "flow.py, line 3: NameError: name 'nothing' is not defined"),
        ("x = (\n", "flow.py, line 1: SyntaxError: '(' was never closed"),
        ("x = 1\0\n", "flow.py: SyntaxError: source code string cannot contain null bytes"),
        ("raise ValueError('no luck\\nat all')\n", "flow.py, line 1: ValueError: no luck at all"),
        ("import sys\nsys.exit(0)\n", "flow.py, line 2: SystemExit: 0"),
        (HEAD, "flow.py defines no workflow: workflow = cm.Workflow(…) is expected at its top level."),
        (
            HEAD + "wf = cm.Workflow('w', steps='planer')\n",
            "flow.py, line 4: step 1: agent 'planer' is not defined. Defined: (none).",
        ),
        (
            HEAD + "a = cm.Workflow('a', agents=[cm.Agent('x', 'X.')], steps='x')\nb = a.model_copy()\n",
            "flow.py defines several workflows. Choose one: --workflow a or b",
        ),
    ],
)
def test_what_is_wrong_with_the_file_is_one_line(here: Here, text: str, said: str) -> None:
    assert here("run", write(text)) == (1, f"cm-notebook: {said}\n")


def test_debug_shows_where_it_comes_from() -> None:
    done = ran("run", write("x = nothing\n"), "--debug")
    assert done.code == 1
    assert 'flow.py", line 1, in <module>' in done.err
    assert done.err.splitlines()[-1].startswith("cm-notebook: ")


def test_a_workflow_is_chosen_by_its_variable(here: Here) -> None:
    agents = "x = cm.Agent('x', 'X.')\n"
    made = "one = cm.Workflow('One', agents=[x], steps='x')\nworkflow = cm.Workflow('Two', agents=[x], steps='x')\n"
    file = write(HEAD + agents + made)
    assert ran("run", file).lines[0].startswith("cm: Two started")
    assert ran("run", file, "--workflow", "one").lines[0].startswith("cm: One started")
    assert here("run", file, "--workflow", "on")[1] == (
        "cm-notebook: flow.py has no workflow 'on'. Did you mean 'one'? Workflows: one, workflow.\n"
    )


def test_a_file_that_starts_its_own_run_is_told_how_not_to() -> None:
    done = ran("run", write(TWO_STEPS + "\nrun = workflow.start()\n"))
    assert done.code == 1
    assert 'below `if __name__ == "__main__":`' in done.err
    assert last_run().status == "stopped"
    assert ran("run", write(TWO_STEPS + "\nif __name__ == '__main__':\n    workflow.start()\n")).code == 3


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["rum"], "there is no command 'rum'. Did you mean 'run'?"),
        (["run"], "run: the following arguments are required: FILE."),
        (["run", "f.py", "--untl", "x"], "run has no option --untl. Did you mean '--until'?"),
        (["run", "f.py", "--on-gate", "aprove"], "run: --on-gate 'aprove' is not known. Did you mean 'approve'?"),
        (["run", "f.py", "--input", "goal"], "run: --input 'goal' is not NAME=VALUE."),
        (["tutorial", "a", "b"], "tutorial: unrecognized arguments: b."),
    ],
)
def test_what_is_not_understood_ends_with_2(here: Here, words: list[str], said: str) -> None:
    code, complaint = here(*words)
    assert code == 2
    assert complaint.startswith(f"cm-notebook: {said}")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["run", "flw.py"], "there is no file 'flw.py'. Did you mean 'flow.py'? Here: a.json, flow.py."),
        (
            ["run", "a.ipynb"],
            "'a.ipynb' is a notebook. Open it in Jupyter, or run it headless: jupyter execute a.ipynb",
        ),
        (["run", "a.txt"], "'a.txt' is neither .py nor .json."),
        (["run", "."], "'.' is a folder. Here: a.json, flow.py."),
        (["run", "a.json"], "a.json: this is not JSON: Expecting value: line 1 column 1 (char 0)."),
        (["run", "flow.py", "--until", "x"], "until='x' is not a step. Steps: planner, coder."),
        (
            ["run", "flow.py", "--input", "gaol=1"],
            "no prompt uses the input 'gaol'. Did you mean 'goal'? Inputs: goal. If a function reads it, add it to the "
            "workflow's own inputs.",
        ),
        (["run", "flow.py", "--tape", "x"], "tape 'x' cannot be read: No such file or directory."),
        (
            ["run", "flow.py", "--workspace", "a.txt"],
            "the workspace 'a.txt' cannot be used: it is a file. Name a folder that can be made, for instance "
            "workspace='site'.",
        ),
    ],
)
def test_what_cannot_be_run_ends_with_1(here: Here, words: list[str], said: str) -> None:
    write(TWO_STEPS)
    for name in ("a.ipynb", "a.txt", "a.json"):
        write("", name)
    assert here(*words) == (1, f"cm-notebook: {said}\n")


def test_what_a_file_imports_to_load_it_late_is_not_loaded(here: Here) -> None:
    late = """
class Late:
    def __getattribute__(self, name):
        raise ModuleNotFoundError("not installed")
late = Late()
"""
    write(TWO_STEPS + late)
    assert here("run", "flow.py", "--workflow", "nobody")[1].startswith("cm-notebook: flow.py has no workflow 'nobody'")


def test_a_run_that_is_not_there(here: Here) -> None:
    write(TWO_STEPS)
    code, complaint = here("run", "flow.py", "--resume", "r-x")
    assert code == 1
    assert "'r-x'" in complaint
    assert len(complaint.splitlines()) == 1


# -- pipes and signals -------------------------------------------------------------------------------------------------


def test_a_closed_pipe_stops_the_run_which_can_go_on() -> None:
    process = start("run", write(SLOW.replace("first -> second", "first -> second -> last")))
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.readline()
    until(Path("started").exists, "the second step")
    process.stdout.close()
    Path("go").touch()
    assert process.wait(30) == 4
    assert process.stderr.read().splitlines() == [
        "cm-notebook: slow was stopped, because nobody reads its output any more.",
        f"Go on with it: cm-notebook run flow.py --resume {last_run().id}",
    ]
    process.stderr.close()
    assert last_run().status == "stopped"


def test_nobody_reads_the_complaint_either() -> None:
    file = write(SLOW.replace("first -> second", "first -> second -> last"))
    argv = [sys.executable, "-m", "cm_notebook", "run", file]
    process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert process.stdout is not None
    process.stdout.readline()
    until(Path("started").exists, "the second step")
    process.stdout.close()
    Path("go").touch()
    assert process.wait(30) == 4


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupt_stops_the_run_which_can_go_on(number: signal.Signals) -> None:
    process = start("run", write(SLOW))
    until(Path("started").exists, "the second step")
    process.send_signal(number)
    done = Done(process)
    assert done.code == 4
    assert any(line.startswith("cm: second cut short: stopped by you") for line in done.lines)
    assert done.err.splitlines()[0] == "cm-notebook: slow was stopped by you."
    Path("go").touch()
    again = ran("run", "flow.py", "--resume", last_run().id)
    assert again.code == 0
    assert not any("first ok" in line for line in again.lines)


def test_an_interrupt_while_the_run_begins_stops_it(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = cli.Run.start

    def interrupted(*args: Any, **options: Any) -> cm.Run:
        run = begun(*args, **options)
        signal.raise_signal(signal.SIGINT)  # the run is on disk by then, and only this frame knows it
        return run

    monkeypatch.setattr(cli.Run, "start", interrupted)
    assert here("run", write(SLOW))[0] == 4
    assert last_run().status == "stopped"


def test_agents_get_to_end_what_they_began() -> None:
    text = """
import asyncio

@cm.agent("a")
async def a(turn):
    Path("started").touch()
    try:
        await asyncio.sleep(60)
    finally:
        await asyncio.sleep(0.05)
        Path("tidied").touch()

wf = cm.Workflow("w", agents=[a], steps="a")
"""
    process = start("run", write(HEAD + text))
    until(Path("started").exists, "the step")
    process.send_signal(signal.SIGINT)
    assert Done(process).code == 4
    assert Path("tidied").exists()


def test_a_terminal_without_unicode_gets_plain_letters() -> None:
    text = HEAD + "\n@cm.agent('a')\ndef a(turn):\n    return '“so” → 1…2 · é 漢'\n"
    file = write(text + "wf = cm.Workflow('w', agents=[a], steps='a')\n")
    done = ran("run", file, "-v", PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert done.code == 0
    assert done.lines[1] == '"so" -> 1...2 | ? ?'


def test_no_colour_in_a_pipe() -> None:
    assert "\x1b" not in ran("run", write(TWO_STEPS)).out


# -- a terminal --------------------------------------------------------------------------------------------------------


class Terminal:
    """A process with a terminal of its own, and the person before it."""

    def __init__(self, *words: str, **more: str) -> None:
        self.screen, slave = pty.openpty()
        take = (
            "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
        )
        self.process = subprocess.Popen(
            [sys.executable, "-c", take, sys.executable, "-m", "cm_notebook", *words],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            env=environment(**more),
        )
        os.close(slave)
        self.text, self._read = "", 0

    def see(self, wanted: str, timeout_s: float = 30) -> str:
        """All that is new, up to and with `wanted`."""
        deadline = time.monotonic() + timeout_s
        while (place := self.text.find(wanted, self._read)) < 0:
            assert self._more(deadline), f"{wanted!r} is not in {self.text[self._read :]!r}"
        new = self.text[self._read : place + len(wanted)]
        self._read = place + len(wanted)
        return new

    def _more(self, deadline: float) -> bool:
        with selectors.DefaultSelector() as screens:  # not select(), which refuses the high numbers of many open files
            screens.register(self.screen, selectors.EVENT_READ)
            ready = screens.select(max(0.0, deadline - time.monotonic()))
        try:
            data = os.read(self.screen, 65536) if ready else b""
        except OSError:  # the other end is closed
            data = b""
        self.text += data.decode(errors="replace").replace("\r\n", "\n")
        return bool(data)

    def type(self, text: str) -> None:
        os.write(self.screen, text.encode())

    def answer(self, text: str, prompt: str = "> ") -> str:
        """See the choices, and type a line; returns what was on the screen."""
        seen = self.see(prompt)
        self.type(text + "\n")
        return seen

    def end(self) -> int:
        """The exit code, when all has been read."""
        deadline = time.monotonic() + 30
        while self._more(deadline):
            pass
        return self.process.wait(10)


Open = Callable[..., Terminal]


@pytest.fixture
def terminal() -> Iterator[Open]:
    opened: list[Terminal] = []

    def make(*words: str, **more: str) -> Terminal:
        opened.append(Terminal(*words, NO_COLOR="1", **more))
        return opened[-1]

    yield make
    for one in opened:
        if one.process.poll() is None:
            one.process.kill()
            one.process.wait()
        os.close(one.screen)


def test_a_person_rejects_looks_at_the_difference_and_approves(terminal: Open) -> None:
    person = terminal("run", write(TWO_STEPS))
    seen = person.answer("r")
    assert "--- planner\nplan 1 for a CLI: no wishes\n---\nplanner is waiting for you. Next: coder.\n" in seen
    assert "[a] Approve  [r] Reject…  [e] Edit  [s] Skip  [t] Stop  [?] Help\n" in seen
    assert "cm: gate" not in seen
    person.answer("name the tests", "Why? ")
    seen = person.answer("d")
    assert "cm: planner rejected by you" in seen
    assert "--- planner, attempt 2\nplan 2 for a CLI: name the tests\n" in seen
    assert "[d] Diff" in seen
    seen = person.answer("approve")
    assert "-plan 1 for a CLI: no wishes" in seen
    assert "+plan 2 for a CLI: name the tests" in seen
    assert person.end() == 0
    assert last_run()["coder"].text == "code for plan 2 for a CLI: name the tests"


def test_of_what_is_long_both_ends_are_shown(terminal: Open) -> None:
    text = HEAD + "\n@cm.agent('a')\ndef a(turn):\n    return f'begin {\"x\" * 1_000_000} end'\n"
    text += "\n@cm.agent('b')\ndef b(turn):\n    raise ValueError('E' * 300_000)\n"
    person = terminal("run", write(text + "wf = cm.Workflow('w', agents=[a, b], steps='a? -> b')\n"))
    seen = person.answer("v")
    assert len(seen) < 70_000
    assert re.search(
        r"\nbegin x+\n… 936,010 characters left out. Show all 1.0 MB: `v` …\nx+ end\n---\na is waiting", seen
    )
    assert f"begin {'x' * 1_000_000} end" in person.answer("a")
    seen = person.answer("t")
    assert len(seen) < 70_000
    assert re.search(r"E\n… [0-9,]+ characters left out. Show all \S+ kB: `v` …\nE", seen)
    assert person.end() == 4


def test_a_long_reason_is_cut(here: Here) -> None:
    code, said = here("run", write("raise ValueError('E' * 300_000)"))
    assert (code, len(said) < 70_000) == (1, True)
    assert "characters left out. Show all 300 kB: `--debug` …" in said


def test_nothing_is_decided_by_chance(terminal: Open) -> None:
    person = terminal("run", write(TWO_STEPS))
    for line in ("", "yes", "approve it", "r"):
        person.answer(line)
    assert "approve takes no words; nothing was decided." in person.text
    person.answer("", "Why? ")
    person.answer("s")
    person.answer("n", "[y/N] ")
    person.answer("?")
    assert "leave; the gate stays open" in person.answer("v")
    assert "plan 1 for a CLI" in person.see("> ")
    assert [gate.step for gate in last_run().gates] == ["planner"]
    person.type("s\n")
    assert "Skip planner? It gives no output" in person.answer("y", "[y/N] ")
    assert person.end() == 0
    assert last_run()["planner"].status == "skipped"


def test_what_was_typed_before_the_question_is_no_answer(terminal: Open) -> None:
    text = SLOW.replace("first -> second", "first -> second?")
    person = terminal("run", write(text))
    until(Path("started").exists, "the second step")
    person.type("a\n")
    person.see("a\n")
    Path("go").touch()
    person.see("> ")
    person.type("stop\n")
    assert person.end() == 4
    assert last_run().state.reason == "stopped by you at second"


def test_a_person_edits_in_an_editor(terminal: Open) -> None:
    editor = write("import sys\nfrom pathlib import Path\nfile = Path(sys.argv[-1])\n"
                   "file.write_text(file.read_text().replace('a CLI', 'a blog') + '\\n')\n", "editor.py")  # fmt: skip
    person = terminal("run", write(TWO_STEPS), EDITOR=f"{sys.executable} {editor}", VISUAL="")
    person.answer("e")
    assert person.end() == 0
    assert last_run()["planner"].text == "plan 1 for a blog: no wishes"
    assert last_run()["planner"].attempts[-1].edited


@pytest.mark.parametrize(("editor", "said"), [("true", "Nothing was changed"), ("false", "Nothing was changed"),
                                              ("no-such-editor", "does not start")])  # fmt: skip
def test_an_editor_that_changes_nothing_decides_nothing(terminal: Open, editor: str, said: str) -> None:
    person = terminal("run", write(TWO_STEPS), VISUAL=editor)
    person.answer("e")
    person.see(said)
    person.answer("t")
    assert person.end() == 4


def test_a_question_takes_a_line(terminal: Open) -> None:
    text = HEAD + "\n@cm.agent('a')\ndef a(turn):\n    return 'port ' + turn.ask_human('Which port?')\n"
    person = terminal("run", write(text + "wf = cm.Workflow('w', agents=[a], steps='a')\n"))
    assert "a asks: “Which port?”" in person.answer("", "answer> ")
    person.answer("it's 80?", "answer> ")
    assert person.end() == 0
    assert last_run()["a"].text == "port it's 80?"


REMOVES = """
class Removes:
    name = "removes"
    async def stream(self, request):
        said = await request.ask_permission("remove", {"path": request.step})
        yield cm.TurnDone(f"{said.allowed} {dict(said.arguments or {})} {said.reason}")

@cm.tool(ask=True)
def remove(path: str) -> str:
    return path

cm.register_engine(Removes())
cleaner = cm.Agent("cleaner", "Clean.", engine="removes", tools=[remove])
steps = [cm.step("cleaner", id=name) for name in "abcde"]
wf = cm.Workflow("w", agents=[cleaner], steps=steps)
"""


def test_a_tool_is_denied_edited_and_allowed_for_good(
    terminal: Open, here: Here, capsys: pytest.CaptureFixture[str]
) -> None:
    person = terminal("run", write(HEAD + REMOVES), VISUAL="sed -i s/b/zz/")
    seen = person.answer("r not that one")
    assert '--- a\n{\n  "path": "a"\n}\n---\na wants to call remove. Allow it' in seen
    assert "[a] Allow once  [u] Allow for this run  [w] Always allow  [e] Edit…  [r] Deny…  [t] Stop  [?] Help" in seen
    assert "b wants to call remove" in person.answer("e")
    assert "and never ask about this tool again" in (person.answer("?"), person.answer("a"))[1]
    person.answer("w")
    assert person.end() == 0
    texts = [last_run()[name].text for name in "abcde"]
    assert texts == ["False {} not that one", "True {'path': 'zz'} ", "True {} ", "True {} ", "True {} "]
    assert here("permissions") == (0, "")
    assert here("permissions", "revoke") == (
        2,
        "cm-notebook: permissions lists them; permissions revoke NAME takes one back.\n",
    )
    assert here("permissions", "revoke", "remove") == (0, "")
    assert cm.permissions() == []


def test_the_list_of_tools_is_printed(here: Here, capsys: pytest.CaptureFixture[str]) -> None:
    keep(cm.Journal(".cm_notebook/journal.db"), Rule(tool="remove", step="a", run="r-1"))
    assert cli.main(["permissions"]) == 0
    assert "remove  a (r-1)" in capsys.readouterr().out
    assert cli.main(["permissions", "revoke", "remov", "--journal", ".cm_notebook/journal.db"]) == 1
    assert "Did you mean 'remove'?" in capsys.readouterr().err


def test_a_long_question_is_shown_whole(terminal: Open) -> None:
    text = HEAD + "\n@cm.agent('a')\ndef a(turn):\n"
    text += "    return turn.ask_human('\\n'.join(f'{number}. a line of the question' for number in range(99)))\n"
    person = terminal("run", write(text + "wf = cm.Workflow('w', agents=[a], steps='a')\n"))
    seen = person.answer("yes", "answer> ")
    assert all(f"\n{number}. a line of the question\n" in seen for number in range(99))
    assert "\na is waiting for your answer.\nType the answer." in seen
    assert person.end() == 0


def test_a_question_has_a_limit_too_and_says_where_the_rest_is(terminal: Open) -> None:
    text = HEAD + "\n@cm.agent('a')\ndef a(turn):\n    return turn.ask_human('Q' * 300_000)\n"
    person = terminal("run", write(text + "wf = cm.Workflow('w', agents=[a], steps='a')\n"))
    seen = person.see("answer> ")
    assert len(seen) < 70_000
    command = re.search(r"Show all 300 kB: `(cm\..*)` …", seen)
    assert command
    assert eval(command[1]) == "Q" * 300_000
    person.answer("yes", "")
    assert person.end() == 0


def test_a_long_difference_is_bounded_and_can_be_seen_whole(terminal: Open) -> None:
    text = HEAD + "\n@cm.agent('a')\ndef a(turn):\n    return f'{turn.attempt} some line\\n' * 9_000\n"
    person = terminal("run", write(text + "wf = cm.Workflow('w', agents=[a], steps='a?')\n"))
    person.answer("r again")
    person.answer("d")
    seen = person.answer("d all")
    assert len(seen) < 70_000
    assert re.search(r"\n… [0-9,]+ characters left out. Show all \d+ kB: `d all` …\n", seen)
    seen = person.answer("t")
    assert (seen.count("-1 some line"), seen.count("+2 some line")) == (9_000, 9_000)
    assert person.end() == 4


GATES = """
@cm.agent("left")
def left(turn):
    return "left: " + DO

@cm.agent("right")
def right(turn):
    while not Path("go").exists():
        time.sleep(0.01)
    return "right: " + DO

workflow = cm.Workflow("pair", agents=[left, right], steps=[cm.parallel("left", "right", id="team")])
"""


def test_of_several_questions_the_person_picks_one(terminal: Open) -> None:
    person = terminal("run", write(HEAD + GATES.replace("DO", "turn.ask_human('Which way?')")))
    assert "left asks: “Which way?”" in person.see("answer> ")
    Path("go").touch()
    seen = person.answer("", "team/left#1 answer> ")
    assert "2 gates are open: [1] team/left#1 (question)  [2] team/right#1 (question). This is 1" in seen
    assert "right asks: “Which way?”" in person.answer("this one", "team/right#1 answer> ")
    assert "left asks: “Which way?”" in person.answer("that one", "\nanswer> ")
    assert person.end() == 0
    assert last_run()["team"].text == "## left\n\nleft: that one\n\n## right\n\nright: this one"


def test_of_several_gates_the_person_picks_one(terminal: Open) -> None:
    failing = "    if turn.attempt == 1:\n        raise ValueError('no luck')\n    return"
    person = terminal("run", write(HEAD + GATES.replace("DO", "'done'").replace("    return", failing)))
    assert "left failed: agent 'left' raised ValueError: no luck" in person.see("\n> ")
    Path("go").touch()
    assert "This is 1; g goes to the next, g 2 to the second." in person.answer("g 3", "team/left#1> ")
    assert "there is no gate '3'. Open: 1 to 2." in person.answer("g", "team/left#1> ")
    assert "right failed: agent 'right' raised ValueError: no luck" in person.answer("?", "team/right#1> ")
    assert "the next open gate" in person.answer("y", "team/right#1> ")
    assert "left failed" in person.answer("s", "\n> ")
    person.answer("y", "[y/N] ")
    assert person.end() == 0
    run = last_run()
    assert (run["team/right#1"].text, run["team/left#1"].status) == ("right: done", "skipped")


def test_a_gate_that_nobody_answers_in_time_says_so(terminal: Open) -> None:
    limit = TWO_STEPS.replace(
        '"planner? -> coder"', '[cm.step("planner", interactive=True, gate_timeout_s=2), "coder"]'
    )
    person = terminal("run", write(limit))
    seen = person.see("(its time is over)\ncm: planner stopped at its deadline")
    assert re.search(r"Next: coder\. Decide by \d\d:\d\d:\d\d, else the run stops\.\n", seen)
    assert person.end() == 4


def test_verbose_prints_what_an_agent_thinks_apart(terminal: Open) -> None:
    thinks = """
class Thinks:
    name = "thinks"
    async def stream(self, request):
        yield cm.Delta("hm, ", "thinking")
        yield cm.Delta("well", "thinking")
        yield cm.Delta("Yes.")
        yield cm.TurnDone("Yes.")
cm.register_engine(Thinks())
agents = [cm.Agent("a", "Well?", engine="thinks")]
wf = cm.Workflow("w", agents=agents, steps=[cm.step("a", interactive=True, gate="before")])
"""
    person = terminal("run", write(HEAD + thinks), "-v")
    person.answer("a")  # it begins when somebody looks: thoughts are not kept for later
    assert person.end() == 0
    assert "hm, well\nYes.\n" in person.text
    assert person.text.count("Yes.") == 1


def test_a_failed_step_is_retried_with_another_prompt(terminal: Open) -> None:
    text = HEAD + "\n@cm.agent('a')\ndef a(turn):\n    if turn.attempt == 1:\n        raise ValueError('no luck')\n"
    text += "    return 'at last'\nwf = cm.Workflow('w', agents=[a], steps='a')\n"
    person = terminal("run", write(text))
    seen = person.answer("y")
    assert "a failed: agent 'a' raised ValueError: no luck" in seen
    assert "[y] Retry  [p] Edit prompt  [s] Skip  [t] Stop" in seen
    assert person.end() == 0


def test_an_exhausted_loop_gets_two_more(terminal: Open) -> None:
    text = HEAD + "\n@cm.agent('a')\ndef a(turn):\n    return 'work'\n@cm.agent('gate')\ndef gate(turn):\n"
    text += "    return cm.Verdict(action='loop' if turn.iteration < 4 else 'continue', reason='not yet')\n"
    person = terminal(
        "run", write(text + "wf = cm.Workflow('w', agents=[a, gate], steps='a -> gate(loop 1, max 1)')\n")
    )
    assert "[y] 2 more" in person.answer("y 2")
    assert person.end() == 0
    assert len(last_run()["gate"].attempts) == 4


def test_where_a_limit_is_reached_a_person_may_permit_more(terminal: Open) -> None:
    text = HEAD + "\nwf = cm.Workflow('w', agents=[cm.Agent(x, 'Do it.') for x in 'abcd'], steps='a -> b -> c -> d')\n"
    person = terminal("run", write(text), "--max-turns", "1")
    seen = person.answer("a x")
    assert "Paused: 1 turn limit reached after a. Continue with +1 turn?" in seen
    assert "[a] Continue with +1 turn  [t] Stop  [?] Help" in seen
    person.see("--max-turns 'x' is not a whole number")
    person.answer("a 2")
    assert "1 turn limit" not in person.answer("a")
    assert person.end() == 0


def test_an_answer_that_is_none_is_named(terminal: Open) -> None:
    person = terminal("run", write(TWO_STEPS))
    person.answer("aprove it")
    assert "'aprove' is none of them. Did you mean 'approve'?\n[a] Approve" in person.answer("foo")
    seen = person.answer("")
    assert "'foo' is none of them.\n[a] Approve" in seen
    seen = person.answer("a")
    assert "none of them" not in seen, "an empty line asks for the choices"
    assert "[a] Approve" in seen
    assert person.end() == 0


def test_ctrl_c_at_the_question_stops_and_the_gate_comes_again(terminal: Open) -> None:
    person = terminal("run", write(TWO_STEPS))
    person.see("> ")
    person.type("\x03")
    person.see("cm-notebook: demo was stopped by you.\nGo on with it: ")
    assert person.end() == 4
    person = terminal("run", "flow.py", "--resume", last_run().id)
    assert "demo goes on" in person.answer("a")
    assert person.end() == 0


def test_ctrl_d_leaves_the_gate_open(terminal: Open) -> None:
    person = terminal("run", write(TWO_STEPS))
    person.see("> ")
    person.type("\x04")
    assert person.end() == 3
    assert "Traceback" not in person.text
    assert last_run().status == "waiting"


def test_somebody_else_may_answer(terminal: Open) -> None:
    person = terminal("run", write(TWO_STEPS))
    person.see("> ")
    last_run().approve()
    person.see("(answered elsewhere)")
    assert person.end() == 0


@pytest.mark.parametrize("at_the_gate", [False, True])
def test_somebody_else_may_stop(terminal: Open, *, at_the_gate: bool) -> None:
    person = terminal("run", write(TWO_STEPS))
    person.see("> ")
    run = last_run()
    if at_the_gate:
        run.decide(run.gates[0].id, cm.Decision(action="stop"))
    else:
        run.stop()
    person.see("(stopped elsewhere)")
    assert person.end() == 4
    assert "answered elsewhere" not in person.text


def test_a_policy_means_that_nobody_is_asked(terminal: Open) -> None:
    person = terminal("run", write(TWO_STEPS), "--on-gate", "reject")
    assert person.end() == 3  # rejected once, and then left to a person
    assert "[a] Approve" not in person.text
    assert terminal("run", "flow.py", CM_ON_GATE="approve").end() == 0
    assert terminal("run", "flow.py", CM_HEADLESS="1").end() == 3


def test_questions_go_to_stderr_when_stdout_is_a_file(terminal: Open, tmp_path: Path) -> None:
    write(TWO_STEPS)
    shell = f"{sys.executable} -m cm_notebook run flow.py > out.txt"
    person = Terminal.__new__(Terminal)
    person.screen, slave = pty.openpty()
    person.process = subprocess.Popen(["sh", "-c", shell], stdin=slave, stdout=slave, stderr=slave, env=environment())
    os.close(slave)
    person.text, person._read = "", 0
    person.answer("a", "\x1b[1m> \x1b[0m")
    assert person.end() == 0
    os.close(person.screen)
    written = Path("out.txt").read_text(encoding="utf-8")
    assert "cm: coder ok" in written
    assert "[a] Approve" not in written
    assert "\x1b" not in written


def test_colours_on_a_terminal_and_none_of_the_agents() -> None:
    text = HEAD + "\n@cm.agent('a')\ndef a(turn):\n    return '\\x1b[2J\\x1b]0;owned\\x07 bad'\n"
    person = Terminal("run", write(text + "wf = cm.Workflow('w', agents=[a], steps='a?')\n"), "-v")
    person.answer("a", "\x1b[1m> \x1b[0m")
    assert person.end() == 0
    os.close(person.screen)
    assert "\x1b[32mcm: w completed" in person.text
    assert "\x1b[2J" not in person.text
    assert "owned" not in person.text
    assert not re.search(r"\x1b(?!\[\d*m)", person.text)


# -- the rest ----------------------------------------------------------------------------------------------------------


def test_help_is_one_screen(here: Here, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    page = capsys.readouterr().out
    assert len(page.splitlines()) < 24
    assert max(map(len, page.splitlines())) <= 80
    assert cli.main([]) == 2
    assert capsys.readouterr().out == page
    elsewhere = cli.anywhere.COMMANDS_HERE.values()
    for command in (cli.RUN, cli.RESUME, cli.TUTORIAL, cli.CLEAN, cli.PERMISSIONS, cli.DOCTOR, *elsewhere):
        assert re.search(rf"\b{command.name}\b", page)
        assert cli.main([command.name, "--help"]) == 0
        more = capsys.readouterr().out
        assert len(more.splitlines()) <= 30
        for option in command.options:
            assert option.usual in more
    assert all(f"{code} " in cli.CODES for code in range(5))


def test_version(here: Here, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert re.fullmatch(r"cm-notebook \d+\.\d+\S*\n", capsys.readouterr().out)


def test_doctor_finds_something(here: Here, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / ".cm_notebook").mkdir()
    (tmp_path / ".cm_notebook" / "journal.db").write_text("no database " * 1000)
    assert cli.main(["doctor"]) == 1
    said = capsys.readouterr().out
    assert re.search(r"look  journal .*journal\.db is damaged or no journal", said)
    assert "Move it away, and the next run makes a new one; the runs in it cannot be read.\n" in said
    assert said.endswith("1 to look at.\n")


def test_doctor(here: Here, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor"]) == 0
    assert "engine offline" in capsys.readouterr().out


def test_an_option_is_the_parameter_of_its_twin() -> None:
    known = inspect.signature(cm.Run.start).parameters
    assert [option.parameter for option in cli.RUN.options if not option.own and option.parameter not in known] == []


def test_the_command_line_loads_no_jupyter() -> None:
    code = (
        "import sys, cm_notebook.cli; "
        "print([name for name in sys.modules if name.partition('.')[0] in "
        "('IPython', 'ipykernel', 'jupyter_client', 'jupyter_core', 'nbformat', 'nbclient', 'httpx', 'ipywidgets')])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
