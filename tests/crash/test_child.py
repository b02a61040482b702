"""The agent's own child process is killed, or the run's process while such a child works."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import cm_notebook as cm
from tests.helpers import gate, until

ROOT = str(Path(__file__).parents[2])
SLEEPER = [sys.executable, "-c", "import os, time; print(os.getpid(), flush=True); time.sleep(60)"]


def test_a_killed_child_fails_its_step_in_clear_words_and_a_retry_goes_on() -> None:
    """The step waits at a gate that says what happened; nothing else of the run is lost."""
    children: list[subprocess.Popen[str]] = []

    @cm.agent("builder")
    def build(turn: cm.Turn) -> str:
        if turn.attempt > 1:
            return "built"
        with subprocess.Popen(SLEEPER, stdout=subprocess.PIPE, text=True) as child:
            children.append(child)
            code = child.wait()
        raise cm.EngineExited(f"the compiler was ended by signal {signal.Signals(-code).name}", exit_code=code)

    steps = [cm.step("first", prompt="x"), cm.step("builder", prompt="build it"), cm.step("last", prompt="y")]
    flow = cm.Workflow("child", steps=steps, agents=[build])
    run = flow.start(engine=cm.ScriptedEngine({"first": ["1"], "last": ["2"]}), journal=":memory:")
    until(lambda: children, "the child")
    children[0].kill()
    opened = gate(run)
    assert (opened.kind, opened.step) == ("failed", "builder")
    assert opened.payload["error"] == "the compiler was ended by signal SIGKILL"
    run.retry()
    assert run.wait(20)["builder"].text == "built"
    started = [event.step for event in run.events if event.type == "TurnStarted"]
    assert started == ["first", "builder", "builder", "last"]


@pytest.mark.parametrize("seed", range(10))
def test_children_that_are_killed_at_any_moment(tmp_path: Path, seed: int) -> None:
    """Before they begin, at work, or as they end: a step is made again until its child has ended by itself, once."""
    chance = random.Random(seed)
    codes: dict[str, list[int]] = {}

    @cm.agent("builder")
    def build(turn: cm.Turn) -> str:
        with subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(0.05)"]) as child:
            killer = threading.Timer(chance.uniform(0, 0.15), child.kill if turn.attempt < 3 else int)
            killer.start()
            code = child.wait()
            killer.cancel()
        codes.setdefault(turn.step, []).append(code)
        if code:
            raise cm.EngineExited(f"the compiler was ended by signal {signal.Signals(-code).name}", exit_code=code)
        return turn.step.upper()

    names = ["a", "b", "c", "d"]
    flow = cm.Workflow("children", steps=[cm.step("builder", id=name, prompt="x") for name in names], agents=[build])
    run = flow.start(journal=tmp_path / "j.db", on_gate=lambda opened: "retry").wait(60)
    assert [event.step for event in run.events if event.type == "TurnFinished"] == names
    for name in names:
        *killed, last = codes[name]
        assert (set(killed) <= {-signal.SIGKILL}, last) == (True, 0)
        errors = [attempt.error for attempt in run[name].attempts]
        assert [error.message if error else None for error in errors] == [
            *["the compiler was ended by signal SIGKILL"] * len(killed),
            None,
        ]
        assert run[name].text == name.upper()


DRIVER = """
import os, subprocess, sys
import cm_notebook as cm
sleeper, path, run_id, idempotent = sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4] == "True"
@cm.agent("builder")
def build(turn):
    with open("begun", "a") as file:
        file.write(f"{turn.attempt}\\n")
    if run_id == "-":
        child = subprocess.Popen([sys.executable, "-c", sleeper], stdout=subprocess.PIPE, text=True)
        print(child.stdout.readline().strip(), flush=True)
        child.wait()
    return "built"
steps = [cm.step("first", prompt="x"), cm.step("builder", prompt="build it", idempotent=idempotent)]
flow = cm.Workflow("child", steps=steps, agents=[build])
engine = cm.ScriptedEngine({"first": ["1"]})
if run_id == "-":
    run = flow.start(engine=engine, journal=path)
    print(run.id, flush=True)
else:
    run = cm.resume(run_id, flow, engine=engine, journal=path, on_gate="approve")
run.wait(60)
"""


@pytest.mark.parametrize("idempotent", [True, False])
def test_the_process_dies_while_a_child_works(tmp_path: Path, idempotent: bool) -> None:
    """The step runs again once, or, where it must not, is asked about; what was finished is not done again."""
    env = {**os.environ, "PYTHONPATH": ROOT}
    command = [sys.executable, "-c", DRIVER, SLEEPER[2], str(tmp_path / "j.db")]
    with subprocess.Popen(
        [*command, "-", str(idempotent)], stdout=subprocess.PIPE, text=True, cwd=tmp_path, env=env
    ) as driver:
        assert driver.stdout is not None
        said = {driver.stdout.readline().strip(), driver.stdout.readline().strip()}
        (run_id,) = (word for word in said if word.startswith("r-"))
        (child,) = (int(word) for word in said if not word.startswith("r-"))
        os.kill(driver.pid, signal.SIGKILL)
        driver.wait()
        os.kill(child, signal.SIGKILL)  # it outlives its parent, as any child does
    kept = cm.Journal(tmp_path / "j.db").events(run_id)
    subprocess.run([*command, run_id, str(idempotent)], check=True, cwd=tmp_path, env=env, timeout=60)
    run = cm.Run.open(run_id, tmp_path / "j.db")
    assert run.status == "completed"
    assert run.events[: len(kept)] == kept
    assert [event.step for event in run.events if event.type == "TurnFinished"] == (
        ["first", "builder"] if idempotent else ["first"]
    )
    opened = [event.gate.kind for event in run.events if event.type == "GateOpened"]
    assert opened == ([] if idempotent else ["may_have_run"])
    assert (tmp_path / "begun").read_text().split() == (["1", "2"] if idempotent else ["1"])
