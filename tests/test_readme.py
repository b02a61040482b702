"""The README does what it says: its Python, its cells, its commands, its links."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import until
from tests.notebooks.execute import kernel_environment

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)


@pytest.fixture(autouse=True)
def _files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the examples read, as the README shows it."""
    for block in blocks("python"):
        if named := re.match(r"# (\w+\.py)\n", block):
            (tmp_path / named[1]).write_text(block, encoding="utf-8")
    [tape] = blocks("jsonl")
    (tmp_path / "plan.jsonl").write_text(tape, encoding="utf-8")


def python(*words: str, folder: Path) -> subprocess.CompletedProcess[str]:
    with kernel_environment():
        return subprocess.run(
            [sys.executable, *words], cwd=folder, capture_output=True, text=True, timeout=110, stdin=subprocess.DEVNULL
        )


@pytest.mark.parametrize("number", range(len(blocks("python"))))
def test_python(number: int, tmp_path: Path) -> None:
    (tmp_path / "example.py").write_text(blocks("python")[number], encoding="utf-8")
    done = python("example.py", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert not done.stderr


def test_one_may_follow_the_page(tmp_path: Path) -> None:
    """What an example leaves behind is in no later one's way."""
    for number, block in enumerate(blocks("python")):
        named = re.match(r"# (\w+\.py)\n", block)
        file = tmp_path / (named[1] if named else f"example{number}.py")
        file.write_text(block, encoding="utf-8")
        done = python(file.name, folder=tmp_path)
        assert done.returncode == 0, done.stderr


def test_a_gate_before_a_step_approves_its_prompt(tmp_path: Path) -> None:
    import cm_notebook as cm

    [written] = re.findall(r"`(cm\.step\([^`]*gate=\"before\"[^`]*\))`", TEXT)
    workflow = cm.Workflow("w", agents=[cm.Agent("deployer", "Deploy.")], steps=[eval(written, {"cm": cm})])
    run = workflow.start(journal=":memory:")
    until(lambda: run.gates or run.status == "completed", "the run to pause or to end")
    assert [gate.kind for gate in run.gates] == ["start"]
    run.stop()


def test_the_shortest_example_says_that_no_model_was_called(tmp_path: Path) -> None:
    assert "no model was called" in python("plan.py", folder=tmp_path).stdout


def test_cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In order, in one notebook, with somebody who approves."""
    from IPython.core.interactiveshell import InteractiveShell
    from IPython.utils.capture import capture_output

    monkeypatch.setenv("CM_HEADLESS", "1")
    monkeypatch.setenv("CM_ON_GATE", "approve")
    shell = InteractiveShell()
    said = ""
    try:
        for cell in blocks("ipython"):
            with capture_output() as captured:
                shell.run_cell(cell).raise_error()
            said += captured.stdout + "".join(str(output.data) for output in captured.outputs)
    finally:
        shell.run_line_magic("unload_ext", "cm_notebook")
        InteractiveShell.clear_instance()
    assert "planner approved by on_gate" in said
    assert "implementer approved by on_gate" in said


@pytest.mark.timeout(300)
@pytest.mark.filterwarnings("default")
def test_commands(tmp_path: Path) -> None:
    """In order, in one folder."""
    programs = {"cm-notebook": "cm_notebook", "papermill": "papermill", "jupyter": "jupyter"}
    folder = tmp_path
    for line in "".join(blocks("sh")).splitlines():
        program, *words = shlex.split(line, comments=True)
        if program == "cd":
            folder = folder / words[0]
            continue
        done = python("-m", programs[program], *words, folder=folder)
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"


@pytest.mark.timeout(300)
def test_answer_from_anywhere(tmp_path: Path) -> None:
    """In order, in one folder; whoever drives the run leaves it at the gate, where nobody is."""
    codes, out = [], ""
    for line in "".join(blocks("console")).splitlines():
        done = python("-m", "cm_notebook", *shlex.split(line.removeprefix("$ cm-notebook ")), folder=tmp_path)
        codes.append(done.returncode)
        out += done.stdout
    assert codes == [3, 0, 0, 0, 3, 0, 0], out
    assert "rejected by" in out
    assert out.splitlines()[-3].startswith("cm: careful-builder completed")


def test_tape_is_a_test(tmp_path: Path) -> None:
    """Another prompt than the recorded one, and a decision less."""
    tape = (tmp_path / "plan.jsonl").read_text(encoding="utf-8")
    (tmp_path / "other.jsonl").write_text(tape.replace("Implement this plan", "Build this"), encoding="utf-8")
    done = python("-m", "cm_notebook", "run", "plan.py", "--tape", "other.jsonl", folder=tmp_path)
    assert done.returncode == 1
    assert 'no answer for "implementer" with this prompt' in done.stderr
    less = "".join(line for line in tape.splitlines(keepends=True) if '"approve"' not in line)
    (tmp_path / "less.jsonl").write_text(less, encoding="utf-8")
    assert python("-m", "cm_notebook", "run", "plan.py", "--tape", "less.jsonl", folder=tmp_path).returncode == 3


def test_the_two_commands_stand_there() -> None:
    assert "pip install uv && uv run cm-notebook tutorial\n" in TEXT
    assert "pip install uv && uv run pytest\n" in TEXT


def test_magics_that_it_names_exist() -> None:
    from cm_notebook import options

    for name in set(re.findall(r"%cm ([a-z-]+)", TEXT)):
        assert name in options.COMMANDS, name
    for line in re.findall(r"`(%cm [a-z][^`]*)`", TEXT):
        options.read(line.removeprefix("%cm "))


def test_links_and_picture() -> None:
    for place in re.findall(r"\]\(([^)#]+)\)", TEXT):
        if not place.startswith("http"):
            assert (ROOT / place).is_file(), place
    picture = ROOT / ".github/images/run-view.png"
    assert picture.stat().st_size < 150_000


def test_the_map_of_the_code_is_whole() -> None:
    text = (ROOT / ".github" / "CONTRIBUTING.md").read_text(encoding="utf-8")
    there = [*(ROOT / "cm_notebook").iterdir(), *(file for file in (ROOT / "tests").iterdir() if file.is_dir())]
    parts = {f"{one.name}/" if one.is_dir() else one.name for one in there if not one.name.startswith(("_", "."))}
    named = set(re.findall(r"`(\w+(?:\.py|/))", text))
    assert parts - {"py.typed"} <= named
    assert {name for name in named if name.endswith(".py")} <= {file.name for file in ROOT.rglob("cm_notebook/**/*.py")}
