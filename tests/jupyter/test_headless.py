"""Notebooks with nobody there: nbclient and papermill run them in a real kernel, as a CI does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nbformat
import papermill
import pytest
from jupyter_client.manager import start_new_kernel
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

SETUP = """\
%load_ext cm_notebook
import cm_notebook as cm
cm.register_engine(cm.ScriptedEngine({"planner": ["a plan"], "implementer": ["a program"]}))"""
GOAL = "goal = 'a todo CLI'"
WORKFLOW = "%cm workflow careful --autonomous {} --engine scripted"
PLANNER = "%%cm step planner\nPlan {{ goal }}."
IMPLEMENTER = "%%cm step implementer\nBuild {{ planner }}."
TAPE = """\
{"tape": 1, "run": "careful-1", "workflow": "careful"}
{"path": "planner", "attempt": 1, "text": "a recorded plan"}
{"gate": {"path": "planner", "attempt": 1, "kind": "review"}, "decision": {"action": "approve"}}
"""


@pytest.fixture(autouse=True)
def nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel is to find out by itself."""
    monkeypatch.delenv("CM_HEADLESS")


def notebook(*sources: str) -> Any:
    made = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])
    made.metadata.kernelspec = {"name": "python3", "language": "python", "display_name": "Python 3"}
    return made


def execute(*sources: str) -> Any:
    made = notebook(*sources)
    NotebookClient(made, timeout=90, kernel_name="python3").execute()
    return made


def printed(cell: Any) -> str:
    return "".join(output.text for output in cell.outputs if output.output_type == "stream")


def test_run_all_waits_in_each_cell_and_leaves_lines_and_the_static_view() -> None:
    done = execute(SETUP, GOAL, WORKFLOW.format("always"), PLANNER, IMPLEMENTER, "cm.current()['implementer'].text")
    assert "cm: planner ok" in printed(done.cells[3])
    assert "cm: implementer ok" in printed(done.cells[4])
    assert "planner ok" not in printed(done.cells[4])
    shown = [output for output in done.cells[3].outputs if output.output_type == "display_data"]
    assert len(shown) == 1
    assert "a plan" in shown[0].data["text/html"]
    assert "application/vnd.jupyter.widget-view+json" not in json.dumps(done)
    assert done.cells[5].outputs[0].data["text/plain"] == "'a program'"


def test_an_undecided_gate_stops_the_notebook_in_one_sentence() -> None:
    made = notebook(SETUP, GOAL, WORKFLOW.format("never"), PLANNER, IMPLEMENTER)
    with pytest.raises(CellExecutionError, match="nobody can answer here"):
        NotebookClient(made, timeout=90, kernel_name="python3").execute()
    error = made.cells[3].outputs[-1]
    assert error.ename == "GatePending"
    assert len(error.traceback) == 1
    assert "text/html" in made.cells[3].outputs[-2].data
    assert made.cells[4].outputs == []


def test_a_wrong_line_stops_the_notebook() -> None:
    with pytest.raises(CellExecutionError, match="Did you mean 'workflow'"):
        execute(SETUP, "%cm workflw careful")


def test_decision_cells_have_nothing_to_decide_where_something_else_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CM_ON_GATE", "approve")
    done = execute(SETUP, GOAL, WORKFLOW.format("never"), PLANNER, "%cm approve", IMPLEMENTER, "%cm status")
    assert "Nothing is to be decided" in printed(done.cells[4])
    assert "on_gate" in done.cells[5].outputs[-1].data["text/html"]


def test_every_execution_is_a_new_run() -> None:
    for _ in range(2):
        done = execute(SETUP, GOAL, WORKFLOW.format("always"), PLANNER, "print(len(cm.runs()))")
    assert printed(done.cells[4]) == "2\n"


def test_a_tape_answers_turns_and_gates(tmp_path: Path) -> None:
    Path("tape.jsonl").write_text(TAPE, encoding="utf-8")
    line = "%cm workflow careful --autonomous never --tape tape.jsonl"
    done = execute(SETUP, GOAL, line, PLANNER)
    assert "a recorded plan" in done.cells[3].outputs[-1].data["text/html"]
    assert "approved (recorded)" in printed(done.cells[3])


def test_interrupting_a_waiting_cell_leaves_the_run_going_on() -> None:
    manager, client = start_new_kernel(kernel_name="python3")
    try:

        def run(source: str) -> str:
            said: list[str] = []
            take = lambda message: said.append(message["content"].get("text", ""))  # noqa: E731
            client.execute_interactive(source, allow_stdin=False, output_hook=take, timeout=60)
            return "".join(said)

        run("%load_ext cm_notebook\nimport cm_notebook as cm, threading, signal, os\ngo = threading.Event()")
        run("@cm.agent('slow')\ndef slow(turn):\n    go.wait(60)\n    return 'done'")
        run("%cm workflow w\n%cm step slow")
        run("threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGINT)).start()\n%cm run")
        assert run("print(cm.current().status)") == "running\n"
        run("go.set()")
        assert run("print(cm.current().wait(20)['slow'].text)") == "done\n"
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


def test_a_key_is_asked_for_in_a_hidden_field_and_refused_where_nobody_can_type() -> None:
    manager, client = start_new_kernel(kernel_name="python3")
    asked: list[dict[str, Any]] = []

    def type_it(message: dict[str, Any]) -> None:
        asked.append(message["content"])
        client.input("sk-planted-0123456789abcdef")

    def run(source: str, allow_stdin: bool = True) -> str:
        said: list[str] = []
        take = lambda message: said.append(str(message["content"]))  # noqa: E731
        options: dict[str, Any] = {"stdin_hook": type_it} if allow_stdin else {}
        client.execute_interactive(source, allow_stdin=allow_stdin, output_hook=take, timeout=60, **options)
        return "".join(said)

    try:
        run("%load_ext cm_notebook")
        assert "anthropic has a key until this session ends" in run("%cm keys set anthropic")
        assert asked == [{"prompt": "Key for anthropic (not shown): ", "password": True}]
        shown = (
            run("%cm keys")
            + run("%cm doctor")
            + run("import os, sys; print(os.environ, vars(sys.modules['cm_notebook.keys']))")
        )
        assert "typed, for this session" in shown
        assert "planted" not in shown
        refused = run("%cm keys set openai", allow_stdin=False)
        assert "nobody can type a key here. Set OPENAI_API_KEY in the environment" in refused.replace(
            "Nobody", "nobody"
        )
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


def test_papermills_parameters_stand_in_prompts(tmp_path: Path) -> None:
    made = notebook(SETUP, GOAL, WORKFLOW.format("always"), PLANNER, "print(cm.current()['planner'].prompt)")
    made.cells[1].metadata.tags = ["parameters"]
    nbformat.write(made, tmp_path / "in.ipynb")
    papermill.execute_notebook(
        str(tmp_path / "in.ipynb"), str(tmp_path / "out.ipynb"), parameters={"goal": "a web shop"}, progress_bar=False
    )
    done = nbformat.read(tmp_path / "out.ipynb", as_version=4)
    assert printed(done.cells[-1]) == "Plan a web shop.\n"
