"""The shipped notebooks: each runs from its tape with nobody there, always the same, and is saved as it comes out."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest

from tests.engines.model_server import Asked, ModelServer, Said
from tests.engines.test_http import SAYS, told
from tests.notebooks import execute as books

ROOT = books.NOTEBOOKS.parent
ALL = books.shipped()
TAPED = [path for path in ALL if (books.NOTEBOOKS / "tapes" / f"{path.name[:2]}.jsonl").exists()]
WITH_DECISIONS = [path for path in TAPED if '"decision"' in books.tape_of(path).read_text(encoding="utf-8")]

slow = pytest.mark.slow
pytestmark = [
    pytest.mark.filterwarnings("default"),  # what Jupyter's own packages warn about is not ours to mend
    pytest.mark.timeout(300),
]


def names(paths: list[Path]) -> list[Any]:
    return [pytest.param(path, id=path.stem) for path in paths]


def read(path: Path) -> Any:
    return nbformat.read(path, as_version=4)


def code_cells(book: Any) -> list[Any]:
    return [cell for cell in book.cells if cell.cell_type == "code"]


def errors(book: Any) -> list[Any]:
    return [output for cell in code_cells(book) for output in cell.outputs if output.output_type == "error"]


def said(book: Any) -> str:
    """All that the outputs say, as plain text."""
    parts = []
    for cell in code_cells(book):
        for output in cell.outputs:
            parts += [output.get("text", ""), output.get("data", {}).get("text/plain", ""), output.get("evalue", "")]
            parts += output.get("traceback", ())
    return re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(parts))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The notebooks and their tapes, to write to."""
    return books.copy_to(tmp_path)


def without_decisions(folder: Path, path: Path) -> Path:
    """The notebook of that name in `folder`, whose tape has lost its decisions."""
    tape = folder / books.tape_of(path).relative_to(books.NOTEBOOKS)
    lines = tape.read_text(encoding="utf-8").splitlines(keepends=True)
    tape.write_text("".join(line for line in lines if '"decision"' not in line), encoding="utf-8")
    return folder / path.name


# -- as they are saved -------------------------------------------------------------------------------------------------


def test_there_are_some() -> None:
    assert len(ALL) >= 9
    assert len(TAPED) >= 7
    assert len(WITH_DECISIONS) >= 5


@pytest.mark.parametrize("path", names(ALL))
def test_limits(path: Path) -> None:
    book = read(path)
    cells = code_cells(book)
    nbformat.validate(book)
    assert len(cells) <= 12
    assert path.stat().st_size < 300_000
    assert "widgets" not in book.metadata
    assert book.metadata.kernelspec.name == "python3"
    assert book.cells[0].cell_type == "markdown"
    assert book.cells[0].source.startswith("# ")
    assert book.cells[1].metadata.get("tags") == ["parameters"]
    assert book.cells[1].source == 'goal = "a todo CLI"'


@pytest.mark.parametrize("path", names(ALL))
def test_is_saved_with_its_outputs(path: Path) -> None:
    book = read(path)
    cells = code_cells(book)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    shown = "".join(str(cell.outputs) for cell in cells)
    assert "application/vnd.jupyter.widget" not in shown
    assert "text/html" in shown
    assert not errors(book)
    if "%load_ext" in str(cells):
        assert cells[-1].source == "%cm status"


@pytest.mark.parametrize("path", names(ALL))
def test_knows_nothing_of_the_machine_that_saved_it(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for word in ("/home/", "/root", "/tmp", "/work", "/Users/", str(ROOT), "r-" + "0" * 8):
        assert word not in text
    assert not re.search(r"\br-[0-9a-f]{8}\b", text), "the id of a run"


@pytest.mark.parametrize("path", names(TAPED))
def test_tape(path: Path) -> None:
    tape = books.tape_of(path)
    turns = [line for line in map(json.loads, tape.read_text(encoding="utf-8").splitlines()) if "path" in line]
    assert tape.stat().st_size <= 100_000
    for turn in turns:
        where = f"{turn['path']} {turn['attempt']}"
        assert turn["events"], where
        assert sum(length for _ms, length in turn["events"]) == len(turn["text"]), where
        prompt = turn["prompt"]  # whole, or as digest and beginning: either is compared
        assert prompt if isinstance(prompt, str) else prompt["start"] and re.fullmatch("[0-9a-f]{64}", prompt["sha256"])
        if "error" in turn:
            continue  # what it used is not known
        assert turn["usage"]["output_tokens"] > 0, where
        assert turn["cost_usd"] > 0, where
        assert turn["duration_s"] * 1000 >= turn["events"][-1][0], where


@pytest.mark.parametrize("path", names(TAPED))
def test_programs_on_the_tape_are_python(path: Path) -> None:
    tape = books.tape_of(path).read_text(encoding="utf-8")
    for line in map(json.loads, tape.splitlines()):
        for program in re.findall(r"```python\n(.*?)```", line.get("text", ""), re.DOTALL):
            compile(program, path.stem, "exec")


@pytest.mark.parametrize("number", ["00", "01"])
def test_the_first_ones_show_a_rejection(number: str) -> None:
    path = next(path for path in ALL if path.name.startswith(number))
    assert "attempt 1 rejected (recorded)" in said(read(path))
    assert "attempt 2 approved (recorded)" in said(read(path))


def test_a_lane_of_the_team_fails_and_is_retried() -> None:
    text = said(read(books.NOTEBOOKS / "05-parallel-team.ipynb"))
    assert "coordinator calls frontend-dev, backend-dev, qa-engineer" in text
    assert re.search(r"backend-dev#1 +done .*attempt 1 failed: .*retried \(recorded\)", text)
    assert text.count("PASSED test_todo.py::") == 7, "what they have written fits together"
    assert "FAILED" not in text


def test_a_gate_a_team_and_a_loop() -> None:
    text = said(read(books.NOTEBOOKS / "06-mix-patterns.ipynb"))
    assert text.count("programmer-writer calls programmer, writer") == 2
    for told in ("planner approved (recorded)", "quality-gate loop (0.5)", "quality-gate ok (1)", "announcer approved"):
        assert told in text
    assert "\nTrue\n" in text, "the line and the list are the same steps"


def test_a_rejection_and_a_rewind_bring_files_back() -> None:
    text = said(read(books.NOTEBOOKS / "08-resume-and-rewind.ipynb"))
    assert "cm: builder: the files are as they were before it" in text
    assert "-- notes.txt\nAda: it must keep its list!\n\n-- todo.py\n" in text
    assert text.count("# released") == 1
    assert "as attempt 1 left it: ['todo.py']" in text


def test_an_engine_of_ones_own_passes_the_checks() -> None:
    text = said(read(books.NOTEBOOKS / "11-write-an-engine.ipynb"))
    assert text.count("passed test_") == 4
    assert "stopped - broken ended with 1: the licence has expired" in text
    assert 'offline = "cm_notebook.engines.offline:OfflineEngine"' in text


def test_without_a_key_it_says_what_to_set_and_calls_nobody() -> None:
    text = said(read(books.NOTEBOOKS / "07-real-agents.ipynb"))
    assert "OPENAI_API_KEY is not set\nNo key for openai. Set OPENAI_API_KEY before starting Jupyter" in text
    assert "recorded: no model was called" in text
    assert "of 40,000 tokens" in text
    assert "plan: {'title': " in text


# -- executed ----------------------------------------------------------------------------------------------------------


@slow
@pytest.mark.parametrize("path", names(ALL))
def test_comes_out_as_it_is_saved(path: Path, folder: Path) -> None:
    """The saved one is the first execution, this is the second."""
    book = books.execute(folder / path.name)
    assert not errors(book)
    assert books.text(book) == path.read_text(encoding="utf-8"), (
        "Another execution gives another file. If that is right: uv run python tests/notebooks/execute.py"
    )


@slow
def test_twice_in_the_same_folder(folder: Path) -> None:
    """What the first run has left in the journal changes nothing: where nobody is there, each is a new one."""
    path = folder / ALL[0].name
    first = books.text(books.execute(path))
    assert books.text(books.execute(path)) == first


@slow
@pytest.mark.parametrize("path", names([path for path in WITH_DECISIONS if path.name[:2] != "05"]))
def test_stops_where_nobody_decides(path: Path, folder: Path) -> None:
    from nbclient.exceptions import CellExecutionError

    with pytest.raises(CellExecutionError) as stopped:
        books.execute(without_decisions(folder, path))
    assert stopped.value.ename == "GatePending"
    first = json.loads(next(x for x in books.tape_of(path).read_text("utf-8").splitlines() if '"decision"' in x))
    assert stopped.value.evalue == (
        f'Stopped at the gate "{first["gate"]["path"]}": nobody can answer here. '
        "Play a tape with a decision (`--tape`), or pass `--on-gate approve` if that is what you want."
    )


@slow
def test_a_lane_that_nobody_decides_about_is_given_up_and_the_others_are_not(folder: Path) -> None:
    path = without_decisions(folder, books.NOTEBOOKS / "05-parallel-team.ipynb")
    text = said(books.execute(path))
    assert "coordinator/backend-dev#1 is given up: nobody was there to decide" in text
    assert "'completed'" in text
    assert "PASSED" not in text, "a part is missing"


@slow
@pytest.mark.parametrize("engine", ["openai:gpt-5-mini", "anthropic:claude-sonnet-5", "ollama:llama3.2"])
def test_real_agents_with_a_service(engine: str, folder: Path) -> None:
    """A key and an address are all it needs; a model on one's own machine needs no key."""
    name = engine.partition(":")[0]
    says = SAYS["anthropic" if name == "anthropic" else "openai"]
    plan = {"title": "Todo", "steps": ["Write it.", "Test it."]}
    program = json.dumps({"name": "todo.py", "text": "print('buy milk')"})

    def answer(asked: Asked) -> Said:
        if "Plan a todo CLI" in json.dumps(asked.body):
            return says(json.dumps(plan))
        return says("Run it with Python.") if told(asked) else says("Here.", calls=[("1", "save", program)])

    path = folder / "07-real-agents.ipynb"
    source = path.read_text("utf-8")
    path.write_text(source.replace('engine = \\"openai:gpt-5-mini\\"', f'engine = \\"{engine}\\"'), "utf-8")
    key = "sk-planted-0123456789abcdef"
    with ModelServer(answer) as server:
        environment = {
            f"CM_{name.upper()}_BASE_URL": server.url + ("" if name == "anthropic" else "/v1"),
            "CM_ON_GATE": "approve",
        }
        if name != "ollama":
            environment[f"{name.upper()}_API_KEY"] = key
        book = books.execute(path, environment=environment)
    text = said(book)
    assert {asked.body["model"] for asked in server.asked} == {engine.partition(":")[2]}
    assert [told(asked) for asked in server.asked] == [[], [], ["saved todo.py, 17 characters"]]
    assert "Ready." in text
    assert f"plan: {plan}" in text
    assert "save -> saved todo.py, 17 characters" in text
    assert "360 of 40,000 tokens" in text
    assert (folder / "real-agents" / "todo.py").read_text() == "print('buy milk')"
    assert "recorded" not in text
    assert key not in json.dumps(book)


@slow
def test_the_cell_that_stopped_shows_the_gate(folder: Path) -> None:
    book = books.execute(without_decisions(folder, ALL[0]), allow_errors=True)
    stopped = next(cell for cell in code_cells(book) if any(o.output_type == "error" for o in cell.outputs))
    assert "%%cm step planner" in stopped.source
    error = next(output for output in stopped.outputs if output.output_type == "error")
    assert "Traceback" not in "\n".join(error.traceback)
    assert "planner is waiting for you" in said(book)


# -- by the tools that people use --------------------------------------------------------------------------------------


@slow
def test_papermill_with_another_goal(folder: Path) -> None:
    """The tape is strict: it has no answer for this prompt, and says so."""
    import papermill

    with pytest.raises(papermill.PapermillExecutionError), books.kernel_environment():
        papermill.execute_notebook(
            folder / ALL[0].name, folder / "out.ipynb", {"goal": "a bookmark CLI"}, cwd=folder, progress_bar=False
        )
    book = read(folder / "out.ipynb")
    assert "ReplayMismatch" in "".join(str(cell.outputs) for cell in code_cells(book))
    assert (
        'The tape has no answer for "planner" with this prompt; it changed here: '
        "recorded 'Plan a todo CLI in at most five steps.', now 'Plan a bookmark CLI in at most five steps.'."
    ) in said(book)
    assert not any("%%cm step implementer" in cell.source and cell.outputs for cell in code_cells(book))


@slow
def test_papermill_with_the_same_goal(folder: Path) -> None:
    import papermill

    with books.kernel_environment():
        papermill.execute_notebook(
            folder / ALL[0].name, folder / "out.ipynb", {"goal": "a todo CLI"}, cwd=folder, progress_bar=False
        )
    book = read(folder / "out.ipynb")
    assert any(cell.metadata.get("tags") == ["injected-parameters"] for cell in book.cells)
    assert "cm: implementer approved (recorded)" in said(book)


def run(*words: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", *words]
    with books.kernel_environment():
        return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600)


@slow
def test_jupyter_execute(folder: Path) -> None:
    assert run("jupyter", "execute", ALL[0].name, folder=folder).returncode == 0
    stopped = run("jupyter", "execute", without_decisions(folder, ALL[0]).name, folder=folder)
    assert stopped.returncode != 0
    assert 'Stopped at the gate "planner": nobody can answer here.' in stopped.stderr


@slow
@pytest.mark.timeout(900)
def test_nbmake(folder: Path) -> None:
    """All of them at once, as tests of a project that ships notebooks."""
    done = run("pytest", "--nbmake", "-q", "-p", "no:cacheprovider", *(path.name for path in ALL), folder=folder)
    assert done.returncode == 0, done.stdout
    assert f"{len(ALL)} passed" in done.stdout
    stopped = run(
        "pytest", "--nbmake", "-q", "-p", "no:cacheprovider", without_decisions(folder, ALL[0]).name, folder=folder
    )
    assert stopped.returncode == 1
    assert 'Stopped at the gate "planner": nobody can answer here.' in stopped.stdout


@slow
def test_tutorial_execute(tmp_path: Path) -> None:
    words = ("cm_notebook", "tutorial", "01", "--to", "mine", "--execute")
    done = run(*words, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "cm: reviewer approved (recorded)" in done.stdout
    without_decisions(tmp_path / "mine", ALL[1])
    stopped = run(*words, folder=tmp_path)
    assert stopped.returncode == 3
    assert 'Stopped at the gate "planner": nobody can answer here.' in stopped.stderr


@pytest.mark.parametrize("path", names(ALL))
def test_html_needs_no_network(path: Path) -> None:
    """The static view is in the page, and neither a widget nor what would show one."""
    from nbconvert import HTMLExporter

    page, _ = HTMLExporter().from_filename(str(path))
    assert "html-manager" not in page
    assert "jupyter.widget" not in page
    # "basic" is what notebook and views bring themselves; "lab", above, adds MathJax and the like.
    page, _ = HTMLExporter(template_name="basic").from_filename(str(path))
    assert "<details" in page or "data:image/svg" in page, "the view of a run, or the picture of a workflow"
    assert "<script" not in page
    assert not re.findall(r'src="(?!data:)[^"]*', page)
