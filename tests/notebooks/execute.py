"""Execute the shipped notebooks and save them with their outputs.

    uv run python tests/notebooks/execute.py              all of them
    uv run python tests/notebooks/execute.py 01 04        those whose names begin so
    uv run python tests/notebooks/execute.py --check      save nothing; exit code 1 when one would change
    uv run python tests/notebooks/execute.py --prompts 01 write its prompts on its tape first, after an edit of either

The notebooks are edited in place, in JupyterLab or by hand; nothing here knows what is in them. Each is executed in a
copy of the folder, with nobody there to answer, so from its tape and its taped decisions. What is saved does not depend
on the machine: no times of execution, no widget state, no version of Python.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import sqlite3
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import nbformat
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
KERNEL = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
SHOWN = 160
"""Characters of a prompt that stand on a tape, so that the message about another one can say where it differs."""


def shipped() -> list[Path]:
    """The notebooks, in their order."""
    return sorted(NOTEBOOKS.glob("*.ipynb"))


def tape_of(path: Path) -> Path:
    """The tape that the notebook `path` plays, whether there is one or not."""
    return NOTEBOOKS / "tapes" / f"{path.name[:2]}.jsonl"


def copy_to(folder: Path) -> Path:
    """A copy of the notebooks and their tapes, without what runs have left behind."""
    return Path(shutil.copytree(NOTEBOOKS, folder / "notebooks", ignore=shutil.ignore_patterns(".*", "__pycache__")))


@contextlib.contextmanager
def kernel_environment(more: Mapping[str, str] | None = None) -> Iterator[None]:
    """The environment for a kernel, with `more` in it.

    It is without settings of this package and of pytest, which it would take from us, and without keys: what is saved
    calls no model, and costs nobody anything.
    """
    before = dict(os.environ)
    for name in before:
        if name.startswith(("CM_", "PYTEST_", "JPY_")) or name.endswith(("_API_KEY", "_BASE_URL")):
            del os.environ[name]
    os.environ.update(more or {})
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def execute(path: Path, *, allow_errors: bool = False, environment: Mapping[str, str] | None = None) -> Any:
    """The notebook at `path`, executed in its folder; the file stays as it is.

    `environment` is added to the kernel's.

    Raises
    ------
    CellExecutionError    A cell failed; with `allow_errors` none does.
    """
    book = nbformat.read(path, as_version=4)
    client = NotebookClient(
        book,
        timeout=60,
        kernel_name="python3",
        allow_errors=allow_errors,
        store_widget_state=False,
        record_timing=False,
        resources={"metadata": {"path": str(path.parent)}},
    )
    with kernel_environment(environment), tempfile.TemporaryDirectory(prefix="cm-") as sockets:
        if sys.platform != "win32":
            # Files cannot be taken by another process between choosing and binding, as ports are now and then.
            client.km = AsyncKernelManager(kernel_name="python3", transport="ipc", ip=f"{sockets}/k")
        client.execute()
    return book


def text(book: Any) -> str:
    """The file of an executed notebook: what is of this machine left out, pieces of one stream put together."""
    book.metadata.pop("widgets", None)
    book.metadata.kernelspec = dict(KERNEL)
    book.metadata.language_info = {"name": "python"}
    for cell in book.cells:
        for name in ("execution", "collapsed", "scrolled", "ExecuteTime"):
            cell.metadata.pop(name, None)
        if cell.cell_type == "code":
            cell.outputs = _joined(cell.outputs)
    return nbformat.writes(book, version=4) + "\n"


def _joined(outputs: list[Any]) -> list[Any]:
    made: list[Any] = []
    for output in outputs:
        if made and output.output_type == "stream" == made[-1].output_type and output.name == made[-1].name:
            made[-1].text += output.text
        else:
            made.append(output)
    return made


def write_prompts(path: Path, tape: Path) -> None:
    """Put on `tape` the prompts that executing the notebook at `path` sends; of long ones digest and beginning."""
    from cm_notebook.prompts import digest
    from cm_notebook.run import Run

    lines = [json.loads(line) for line in tape.read_text(encoding="utf-8").splitlines() if line.strip()]
    for line in lines:
        line.pop("prompt", None)
    with tempfile.TemporaryDirectory() as scratch:
        there = copy_to(Path(scratch))
        _write_tape(there / tape.relative_to(NOTEBOOKS), lines)
        execute(there / path.name)
        journal = there / ".cm_notebook" / "journal.db"
        with contextlib.closing(sqlite3.connect(journal)) as database:
            ids = [row[0] for row in database.execute("select id from runs")]
        sent: dict[tuple[str, int], str] = {}
        for id in ids:
            run = Run.open(id, journal)
            if run.state.recorded is not None:
                sent |= {(view.path, one.number): one.prompt for view in _with_members(run) for one in view.attempts}
    for line in lines:
        prompt = sent.get((line.get("path", ""), line.get("attempt", 0)))
        if prompt is not None:
            line["prompt"] = prompt if len(prompt) <= SHOWN else {"sha256": digest(prompt), "start": prompt[:SHOWN]}
    _write_tape(tape, lines)


def _with_members(views: Iterable[Any]) -> Iterator[Any]:
    """These steps, and the agents that they called."""
    for view in views:
        yield view
        yield from _with_members(view.members)


_ORDER = ("path", "attempt", "turn", "prompt", "session_id", "tool_calls", "events", "text")


def _write_tape(tape: Path, lines: list[dict[str, Any]]) -> None:
    ordered = [{**{name: line[name] for name in _ORDER if name in line}, **line} for line in lines]
    tape.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in ordered), encoding="utf-8")


def main() -> int:
    """Execute and save those that were asked for; returns the exit code."""
    parser = argparse.ArgumentParser(description="Execute the shipped notebooks and save them with their outputs.")
    parser.add_argument("names", nargs="*", help="beginnings of their names, for instance 01; all without it")
    parser.add_argument("--check", action="store_true", help="save nothing, and say which would change")
    parser.add_argument("--prompts", action="store_true", help="write the prompts on the tape first")
    asked = parser.parse_args()
    changed = 0
    for path in shipped():
        if asked.names and not path.name.startswith(tuple(asked.names)):
            continue
        tape = tape_of(path)
        if asked.prompts and tape.exists():
            write_prompts(path, tape)
        with tempfile.TemporaryDirectory() as scratch:
            try:
                made = text(execute(copy_to(Path(scratch)) / path.name))
            except CellExecutionError as error:
                print(f"{path.name}: {error}", file=sys.stderr)
                return 1
        same = made == path.read_text(encoding="utf-8")
        print(f"{path.name}: {'as it was' if same else 'would change' if asked.check else 'saved'}")
        changed += not same
        if not asked.check:
            path.write_text(made, encoding="utf-8")
    return 1 if asked.check and changed else 0


if __name__ == "__main__":
    sys.exit(main())
