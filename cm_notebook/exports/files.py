"""Exporting to a file: what its name asks for, written whole or not at all, and never over something else.

``.py`` is the workflow as a Python program, ``.json`` as data. Of a run, ``test_*.py`` and ``*_test.py``, which pytest
looks for, are a test that plays its tape, with the tape beside it; ``.jsonl`` is the tape alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from .. import keys
from ..errors import WorkflowError, did_you_mean
from ..workflow import Workflow
from .program import program

if TYPE_CHECKING:
    from ..run import Run

KINDS = (".py", ".json")


def export_workflow(workflow: Workflow, path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """Write the workflow to the file `path`, as its ending says; see :meth:`Workflow.export`."""
    file = _file(path, KINDS)
    text = _json(workflow, file) if file.suffix == ".json" else _python(workflow, file)
    _write({file: text}, overwrite)
    return file


def export_run(run: Run, path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """Write the run, or its workflow, to the file `path`, as its name says; see :meth:`Run.export`."""
    file = _file(path, (*KINDS, ".jsonl"))
    if is_program(file):
        return export_workflow(run.workflow, path, overwrite=overwrite)
    raise WorkflowError("export: tests and tapes of runs cannot be written yet.")


def is_program(file: Path) -> bool:
    """Whether a file of that name is for a workflow: pytest would not look for tests in it."""
    return file.suffix in KINDS and not (file.suffix == ".py" and re.match("test_|.*_test$", file.stem) is not None)


def _file(path: str | os.PathLike[str], kinds: tuple[str, ...]) -> Path:
    if not isinstance(path, (str, os.PathLike)):
        raise WorkflowError(f"export: {path!r} is not the name of a file. For instance: plan.py")
    file = Path(path)
    if file.suffix not in kinds or not file.stem:
        hint = did_you_mean(file.suffix, kinds, "Possible")
        raise WorkflowError(f"export: {os.fspath(path)!r}: its ending says what is written. {hint}")
    if not file.parent.is_dir():
        raise WorkflowError(f"export: there is no folder {str(file.parent)!r}. Make it first.")
    return file


def _json(workflow: Workflow, file: Path) -> str:
    missing = [f"{agent.id} {agent.missing}" for agent in workflow.kept().agents if agent.missing is not None]
    if missing:
        warnings.warn(
            f"{file} names what JSON cannot hold: {'; '.join(missing)}. Read it with "
            "cm.Workflow.from_dict(data, agents=[…]), or export a .py, which holds the source.",
            stacklevel=4,
        )
    return json.dumps(workflow.to_dict(), ensure_ascii=False, indent=2) + "\n"


_MAIN = """

if __name__ == "__main__":
    # Where a step waits for you, `cm-notebook run {file}` asks in the terminal.
    for step in {wf}.start().wait():
        print(f"## {step.id}\\n\\n{step.text}\\n")
"""


def _python(workflow: Workflow, file: Path) -> str:
    about = f"a workflow of cm_notebook. Run it: cm-notebook run {file.name}"
    text, missing, _ = program(workflow, about, _MAIN.replace("{file}", file.name))
    _say_missing(file, missing)
    return text


def _say_missing(file: Path, missing: list[str]) -> None:
    if missing:
        warnings.warn(f"{file} does not define {'; '.join(missing)}. Add it there before it runs.", stacklevel=5)


def _write(files: dict[Path, str], overwrite: bool) -> None:
    """Write all of them, each at once; refuse first what would take the place of something else."""
    for engine in keys.names():
        keys.find(engine)  # those of the environment are known from now on
    for file, text in files.items():
        if keys.hide(text) != text:
            raise WorkflowError(
                f"{file} would hold the key of a service, which stands in a prompt, an input or a variable of a "
                "function. Read it from the environment instead, then export again."
            )
        there = _read(file)
        if there is not None and there != text.encode("utf-8") and not overwrite:
            raise WorkflowError(
                f"{file} is there already and holds something else; nothing was written. "
                f"To replace it: overwrite=True (`%cm export {file} --overwrite`)."
            )
    for file, text in files.items():
        scratch = file.with_name(f".{file.name}.{secrets.token_hex(4)}")
        try:
            scratch.write_text(text, encoding="utf-8", newline="\n")
            scratch.replace(file)
        except OSError as error:
            with contextlib.suppress(OSError):
                scratch.unlink()
            raise WorkflowError(f"{file} cannot be written: {error.strerror or error}.") from None


def _read(file: Path) -> bytes | None:
    try:
        return file.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise WorkflowError(f"{file} cannot be written: {error.strerror or error}.") from None
