"""Answer from anywhere: runs that one process drives, looked at and decided by others."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import cm_notebook as cm
from cm_notebook import cli, config
from cm_notebook.options import COMMANDS
from cm_notebook.terminal import anywhere
from tests.helpers import gate, until

FLOW = """
import cm_notebook as cm

@cm.agent("planner")
def planner(turn):
    return f"plan {turn.attempt}: {turn.feedback or 'no wishes'}"

@cm.agent("coder")
def coder(turn):
    return "code for " + turn.outputs["planner"]

workflow = cm.Workflow("demo", agents=[planner, coder], steps="planner? -> coder")
if __name__ == "__main__":
    run = workflow.start()
    print(run.id, flush=True)
    run.wait()
    print(run["coder"].text, flush=True)
"""
Here = Callable[..., tuple[int, str, str]]


def start(text: str = "plan?", **options: object) -> cm.Run:
    """A run of this process that waits at `planner`."""
    agents = [cm.Agent("planner", "Plan."), cm.Agent("coder", "Code.")]
    script = cm.ScriptedEngine({"planner": [text, "another"], "coder": ["code"]})
    run = cm.Workflow("demo", agents=agents, steps="planner? -> coder").start(engine=script, **options)  # type: ignore[arg-type]
    gate(run, "planner")
    return run


def process(*words: str, stdin: str = "") -> tuple[int, str, str]:
    """The same command in a process of its own."""
    command = [sys.executable, "-m", "cm_notebook", *words]
    done = subprocess.run(command, input=stdin, capture_output=True, encoding="utf-8", timeout=60)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Here:
    """A command in this process: exit code, stdout and stderr."""
    monkeypatch.setattr(config, "chosen", {})

    def ran(*words: str) -> tuple[int, str, str]:
        code = cli.main(words)
        return code, *capsys.readouterr()

    return ran


# -- from one process to another ---------------------------------------------------------------------------------------


def test_another_process_looks_and_decides_and_the_driver_goes_on() -> None:
    Path("flow.py").write_text(FLOW, encoding="utf-8")
    driver = subprocess.Popen([sys.executable, "flow.py"], stdout=subprocess.PIPE, encoding="utf-8")
    assert driver.stdout is not None
    id = driver.stdout.readline().strip()
    gate(cm.Run.open(id))
    code, out, _ = process("runs")
    assert (code, "waiting for you  planner" in out) == (0, True)
    code, out, _ = process("reject", id[:5], "--feedback", "name the tests")
    assert code == 0
    assert f"{id} planner: rejected by {anywhere.person()}" in out
    assert "Nobody drives it" not in out
    second = until(lambda: next((one for one in cm.Run.open(id).gates if one.attempt == 2), None), "attempt 2")
    code, out, _ = process("show", id)
    assert "plan 2: name the tests" in out
    line = next(line for line in out.splitlines() if line.startswith("  Approve"))
    words = line.split()[2:]
    assert words == ["approve", id, "planner", "--digest", second.digest[:12]]
    assert process(*words)[0] == 0
    assert driver.communicate(timeout=60)[0] == "code for plan 2: name the tests\n"
    code, _, err = process(*words)
    assert code == 5
    assert f"'planner' was already approved by {anywhere.person()} at " in err


def test_a_run_that_nobody_drives_is_decided_and_resumed_here(headless: None) -> None:
    Path("flow.py").write_text(FLOW, encoding="utf-8")
    assert process("run", "flow.py", "--record", "t.jsonl")[0] == 3
    id = cm.runs()[0].id
    code, out, _ = process("approve")
    assert code == 0
    assert out.startswith(f"{id} is the only run that waits.\n{id} planner: approved by ")
    assert out.endswith(f"Nobody drives it now. Go on with it: cm-notebook resume {id}\n")
    code, _, err = process("resume")
    assert code == 1
    assert "needs Python functions, which no journal can keep: planner, coder. Name the file that defines them: " in err
    code, out, err = process("resume", id, "--workflow", "flow.py:workflow", "--record", "t.jsonl")
    assert (code, err) == (0, "")
    assert "cm: coder ok" in out
    assert "planner ok" not in out  # it was told before
    taped = Path("t.jsonl").read_text(encoding="utf-8").splitlines()[1:]
    assert [json.loads(line)["decision"] for line in taped] == [{"action": "approve"}]


def test_a_run_that_is_driven_elsewhere_is_not_driven_here() -> None:
    run = start()
    code, _, err = process("resume", run.id)
    assert code == 8
    assert "is driven by another process" in err
    assert process("pause", run.id)[:1] == (0,)
    until(lambda: run.state.paused, "the pause")
    assert run.state.pause_reason == f"paused by {anywhere.person()}"
    assert process("unpause", run.id)[:1] == (0,)
    until(lambda: not run.state.paused, "its end")
    assert process("stop", run.id)[:1] == (0,)
    until(lambda: run.status == "stopped", "the stop")
    assert run.state.reason == f"stopped by {anywhere.person()}"


def test_a_run_goes_back_is_forked_compared_and_exported(here: Here, headless: None) -> None:
    Path("flow.py").write_text(FLOW, encoding="utf-8")
    assert process("run", "flow.py", "--on-gate", "approve", "--record", "t.jsonl")[0] == 0
    id = cm.runs()[0].id
    goes_on = "Back at coder: nothing runs until you go on. Next: `cm-notebook resume {}`.\n"
    code, out, err = here("fork", id[:5], "coder", "--max-turns", "9")
    fork = cm.runs()[0].id
    assert (code, out, err) == (0, f"{fork}, a fork of {id} at coder: {goes_on.format(fork)}", "")
    assert cm.Run.open(id).status == "completed"
    assert here("rewind", id, "coder")[:2] == (0, f"{id}: {goes_on.format(id)}")
    for run in (id, fork):
        assert process("resume", run, "--workflow", "flow.py")[0] == 0
    code, out, _ = here("diff", id, "--against", fork)
    assert (code, "the same" in out) == (0, True)
    assert here("diff", id, "coder") == here("diff", id, "coder", "1", "2")
    code, _, err = here("export", fork, "test_flow.py")
    assert (code, "Name the file that defines it: --workflow FILE.py" in err) == (1, True)
    assert here("export", fork, "test_flow.py", "--workflow", "flow.py")[:2] == (0, "test_flow.py is written.\n")
    Path("test_flow.py").write_text("mine", encoding="utf-8")
    code, _, err = here("export", fork, "test_flow.py", "--workflow", "flow.py")
    assert (code, "To replace it: --overwrite." in err) == (1, True)


WRONG_BACK = [
    (["rewind", "RUN"], 2, "the following arguments are required: STEP"),
    (["rewind", "RUN", "codr"], 7, "Did you mean 'coder'?"),
    (["rewind", "RUN", "coder"], 1, "step 'coder' has not run yet; 'planner' comes first."),
    (["fork", "RUN", "coder"], 1, "step 'coder' has not run yet; 'planner' comes first."),
    (["rewind", "nobody", "coder"], 7, "there is no run 'nobody'."),
    (["diff", "RUN"], 2, "diff takes a step and two of its attempts, or another run: --against RUN"),
    (["diff", "RUN", "planner"], 6, "planner has fewer than two attempts so far; there is nothing to compare."),
    (["diff", "RUN", "planner", "one"], 2, "'one' is not a whole number"),
    (["diff", "RUN", "planner", "1", "--against", "RUN"], 2, "leave out the attempts."),
    (["export", "RUN", "plan.txt"], 1, "Possible: .py, .json, .jsonl"),
]


@pytest.mark.parametrize(("words", "code", "said"), WRONG_BACK)
def test_where_nobody_can_go_back_to_is_said(words: list[str], code: int, said: str, here: Here) -> None:
    run = start()
    before = run.events
    found, _, err = here(*(run.id if word == "RUN" else word for word in words))
    assert (found, said in err, err.count("\n")) == (code, True, 1), err
    assert "%cm" not in err
    assert run.events == before
    run.stop()


def test_a_definition_that_does_not_fit_is_refused_with_what_is_typed_here(here: Here, headless: None) -> None:
    Path("flow.py").write_text(FLOW, encoding="utf-8")
    assert here("run", "flow.py")[0] == 3
    Path("flow.py").write_text(FLOW.replace("planner", "designer"), encoding="utf-8")
    code, _, err = here("resume", "--workflow", "flow.py")
    assert code == 1
    assert "step 'planner' has run and is renamed to 'designer'. " in err
    assert "Start a new run for the new workflow: `cm-notebook run FILE`." in err


def test_a_run_that_went_back_or_was_stopped_says_the_command_that_goes_on(here: Here) -> None:
    run = start().rewind("planner")
    assert f"Back at planner: nothing runs until you go on. Next: `cm-notebook unpause {run.id}`.\n" in here("show")[1]
    code, _, err = here("approve", run.id)
    assert (code, err.count(f"is paused. Go on with it: cm-notebook unpause {run.id}\n")) == (6, 1)
    assert here("unpause")[0] == 0
    gate(run, "planner")
    run.stop()
    code, _, err = here("approve", run.id)
    assert (code, err.count(f"and it asks again: cm-notebook resume {run.id}.\n")) == (5, 1)


def test_a_stopped_run_of_another_journal_says_the_command_that_goes_on(here: Here, headless: None) -> None:
    text = "import cm_notebook as cm\nwf = cm.Workflow('w', agents=[cm.Agent('planner', 'Plan.')], steps='planner?')\n"
    Path("flow.py").write_text(text, encoding="utf-8")
    assert here("run", "flow.py", "--journal", "other.db")[0] == 3
    (run,) = cm.runs("other.db")
    run.stop()
    code, _, err = here("approve", run.id, "--journal", "other.db")
    command = re.search(r"it asks again: cm-notebook (.*)\.\n", err)
    assert command is not None
    assert code == 5
    assert here(*shlex.split(command[1]))[0] == 3, "it waits again"
    assert [one.step for one in cm.runs("other.db")[0].gates] == ["planner"]
    assert here("approve", run.id, "--journal", "other.db")[0] == 0
    _, _, err = here("approve", "--journal", "other.db")
    command = re.search(r"`cm-notebook (runs --all .*)` lists", err)
    assert command is not None
    assert run.id in here(*shlex.split(command[1]))[1]


def test_edit_takes_the_text_from_stdin() -> None:
    run = start()
    code, out, err = process("edit", run.id, stdin="My own plan")
    assert (code, err) == (0, "")
    assert "edited and approved by" in out
    run.wait()
    assert run["planner"].text == "My own plan"


# -- which run, and what is refused ------------------------------------------------------------------------------------

REFUSED: list[tuple[list[str], int, str]] = [
    (["approve", "r-x"], 7, "there is no run 'r-x'. "),
    (["approve", "planner"], 7, "there is no run 'planner', which is a step. The run comes first: RUN planner"),
    (["approve", "RUN", "planer"], 7, "there is no step 'planer'. Did you mean 'planner'?"),
    (["approve", "RUN", "coder"], 6, "'coder' has no open gate: it "),
    (["approve", "RUN", "--digest", "0000"], 5, "'planner' shows something else by now; nothing was changed."),
    (["approve", "RUN", "--digest", ""], 5, "'planner' shows something else by now"),
    (["approve", "RUN", "--scope", "rn"], 2, "--scope 'rn' is not known. Did you mean 'run'?"),
    (["approve", "RUN", "--scope", "run"], 1, ""),
    (["aprove"], 2, "Did you mean 'approve'?"),
    (["answer", "RUN", "--text", "x"], 1, "cannot be answered with 'answer'. Possible: approve, reject, skip, stop."),
    (["reject", "RUN"], 2, "reject needs words: --feedback 'name the tests'"),
    (["show", "RUN", "planer"], 7, "there is no step 'planer'. Did you mean 'planner'?"),
    (["edit", "RUN"], 1, "nothing was changed, so nothing is decided."),
    (
        ["show", "--journal", "no.db"],
        7,
        "there is no run here: no journal no.db. Go to the folder where it was started",
    ),
    (["runs", "--journal", ":memory:"], 7, "a run that is kept in memory cannot be seen from outside."),
]


@pytest.mark.parametrize(("words", "code", "said"), REFUSED, ids=[" ".join(row[0]) for row in REFUSED])
def test_what_is_refused_changes_nothing(
    here: Here, monkeypatch: pytest.MonkeyPatch, words: list[str], code: int, said: str
) -> None:
    run = start()
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    before = len(run.events)
    ended, _, err = here(*[run.id if word == "RUN" else word for word in words])
    assert ended == code, err
    assert said.replace("RUN", run.id) in err
    assert len(err.splitlines()) == 1
    assert len(run.events) == before


@pytest.mark.parametrize("length", [5, 6, 10])
@pytest.mark.parametrize("prefix", ["r-", ""])
def test_the_beginning_of_an_id_is_enough(here: Here, prefix: str, length: int) -> None:
    run = start()
    assert here("approve", prefix + run.id[2:length])[0] == 0
    assert run.wait().status == "completed"


def test_without_a_run_or_with_too_little_of_it_those_that_fit_are_named(here: Here) -> None:
    first, second = start(), start()
    for words in (["approve"], ["approve", "r-"], ["stop"]):
        code, _, err = here(*words)
        assert code == 2
        assert f"{second.id} (demo, planner waits), {first.id} (demo, planner waits)" in err
    assert here("approve", first.id)[0] == 0
    code, out, _ = here("approve")
    assert (code, out.splitlines()[0]) == (0, f"{second.id} is the only run that waits.")
    code, _, err = here("approve")
    assert code == 6
    assert "no run waits for a decision in " in err


def test_the_runs_are_a_table(here: Here) -> None:
    done, waits = start(), start()
    done.approve().wait()
    code, out, _ = here("runs")
    assert code == 0
    assert out.splitlines()[0].split() == ["Run", "Workflow", "State", "Waits", "at", "Age", "Cost"]
    assert out.splitlines()[1].startswith(f"{waits.id}  demo      waiting for you  planner")
    assert out.splitlines()[2] == "1 run completed: cm-notebook runs --all"
    assert f"{done.id}  demo      done" in here("runs", "--all")[1]
    facts = json.loads(here("runs", "--json")[1])
    assert [(one["run"], one["status"], one["driven"]) for one in facts] == [(waits.id, "waiting", True)]


def test_a_step_is_shown_with_its_gate_and_as_data(here: Here) -> None:
    run = start("plan\x1b[2J\n" + "x" * 99_000)
    _, out, _ = here("show", run.id, "planner")
    assert "\x1b" not in out
    assert f"Show all 99 kB: `cm-notebook show {run.id} planner --full`" in out
    assert f"  Reject   cm-notebook reject {run.id} planner --feedback WHY --digest " in out
    assert "x" * 99_000 in here("show", run.id, "planner", "--full")[1]
    facts = json.loads(here("show", run.id, "--json")[1])
    assert facts["gates"][0]["text"] == run["planner"].attempts[0].text
    assert json.loads(here("show", run.id, "planner", "--json")[1])["attempts"][0]["attempt"] == 1


def test_what_was_stopped_is_shown_where_nothing_else_is_unfinished(here: Here) -> None:
    start().approve().wait()
    code, _, err = here("show")
    assert (code, "no run can go on" in err) == (6, True)
    stopped = start().stop()
    code, out, _ = here("show")
    assert (code, stopped.id in out) == (0, True)
    waits = start()
    code, out, _ = here("show")
    assert (code, waits.id in out) == (0, True)


def test_every_kind_of_answer_is_a_command_that_is_there() -> None:
    for name, command in anywhere.DECISIONS.items():
        mine = {option.parameter for option in command.options}
        assert {option.parameter for option in COMMANDS[name].options} - {"step"} <= mine


# -- on_waiting --------------------------------------------------------------------------------------------------------

TELL = "import json, os, sys; open('told', 'a').write(json.dumps([json.load(sys.stdin), dict(os.environ)]) + chr(10))"


def told() -> list[list[dict[str, str]]]:
    try:
        return [json.loads(line) for line in Path("told").read_text(encoding="utf-8").splitlines()]
    except (FileNotFoundError, ValueError):
        return []


def test_a_command_is_told_how_to_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-planted")
    run = start("a $(touch owned) `plan`", on_waiting=[sys.executable, "-c", TELL])
    facts, environment = until(told, "the command")[0]
    opened = gate(run)
    assert environment["CM_GATE"] == facts["gate"] == opened.id
    assert (environment["CM_RUN"], environment["CM_STEP"], environment["CM_KIND"]) == (run.id, "planner", "review")
    assert environment["CM_MESSAGE"] == "planner is waiting for you. Next: coder."
    assert facts["text"] == "a $(touch owned) `plan`"
    assert "sk-planted" not in str(environment)
    words = environment["CM_ANSWER"].split()
    assert words[:3] == ["cm-notebook", "approve", run.id]
    assert process(*words[1:])[0] == 0
    assert run.wait().status == "completed"
    assert len(told()) == 1


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_a_function_is_told_once_and_of_what_a_person_must_answer_alone(kind: str) -> None:
    seen: list[str] = []

    def tell(opened: cm.Gate) -> None:
        seen.append(opened.id)

    async def tell_later(opened: cm.Gate) -> None:
        tell(opened)

    hook = tell if kind == "sync" else tell_later
    run = start(on_waiting=hook)
    until(lambda: seen, "the first gate")
    run.reject("again")
    until(lambda: len(seen) == 2, "the second gate")
    run.approve().wait()
    assert seen == [f"{run.id}/planner/1/1", f"{run.id}/planner/2/2"]
    agents = [cm.Agent("planner", "Plan.")]
    cm.Workflow("w", agents=agents, steps="planner?").start(on_gate="approve", on_waiting=hook).wait()
    assert len(seen) == 2


def test_who_resumes_is_told_of_the_gate_that_is_open(headless: None) -> None:
    agents, seen = [cm.Agent("planner", "Plan.")], list[str]()
    run = cm.Workflow("w", agents=agents, steps="planner?").start(on_waiting=lambda opened: seen.append(opened.id))
    with pytest.raises(cm.GatePending):
        run.wait()
    until(lambda: len(seen) == 1, "the gate")
    run.stop()
    again = cm.resume(run.id, on_waiting=lambda opened: seen.append(opened.id))
    until(lambda: len(seen) == 2, "the gate again")
    again.approve().wait()


@pytest.mark.parametrize(
    ("hook", "said"),
    [
        (lambda opened: 1 / 0, "on_waiting: ZeroDivisionError: division by zero."),
        ([sys.executable, "-c", "import sys; sys.exit('no luck')"], "ended with 1: no luck."),
    ],
)
def test_a_failure_is_said_and_changes_nothing(hook: object, said: str) -> None:
    run = start(on_waiting=hook)
    until(lambda: run.state.untold, "the failure")
    assert said in run._repr_mimebundle_()["text/plain"]
    assert "Nobody was told: on_waiting: " in run._repr_mimebundle_()["text/html"]
    assert run.approve().wait().status == "completed"
    assert cm.Run.open(run.id).state.untold  # a fact of the journal


def test_a_command_that_does_not_end_is_ended_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cm_notebook.waiting.LIMIT_S", 0.5)
    sleeps = "import os, time; open('pid', 'w').write(str(os.getpid())); time.sleep(60)"
    run = start(on_waiting=[sys.executable, "-c", sleeps])
    why = until(lambda: [*run.state.untold.values()], "the limit")[0]
    assert "did not end within 0.5 s, and was ended" in why
    if (pid := Path("pid")).exists():
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid.read_text(encoding="utf-8")), 0)
    run.approve().wait()


@pytest.mark.parametrize(
    ("hook", "said"),
    [
        ("notify-sedn x", "there is no program 'notify-sedn'"),
        ("", "is no command"),
        ("it's", "neither a function nor a command: No closing quotation"),
        (7, "neither a function nor a command"),
        ([sys.executable, 7], "is no command"),
    ],
)
def test_what_can_tell_nobody_is_refused_before_anything_runs(hook: object, said: str) -> None:
    flow = cm.Workflow("w", agents=[cm.Agent("planner", "Plan.")], steps="planner?")
    with pytest.raises(cm.WorkflowError, match=said):
        flow.start(on_waiting=hook)
    assert cm.runs() == []


def test_the_command_line_tells_before_it_ends(headless: None) -> None:
    Path("flow.py").write_text(FLOW, encoding="utf-8")
    Path("tell.py").write_text(TELL, encoding="utf-8")
    assert process("run", "flow.py", "--on-waiting", f"{sys.executable} tell.py")[0] == 3
    assert told()[0][0]["answer"].startswith("cm-notebook approve ")
