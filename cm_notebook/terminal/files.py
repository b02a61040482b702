"""The workflow that stands in a file.

Strategy: a ``.py`` is imported as Python imports it, a ``.json`` is what ``Workflow.to_dict`` gave. Whatever is wrong
with the file is one line that says where.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import re
import sys
import traceback
from pathlib import Path
from types import ModuleType

from .. import run as runs
from ..errors import CodeMachineError, TransitionError, WorkflowError, did_you_mean
from ..run import Run
from ..workflow import Workflow


def file_and_name(given: str) -> tuple[str, str | None]:
    """``plan.py:flow`` as file and variable."""
    file, colon, name = given.rpartition(":")
    return (file, name) if colon and name.isidentifier() and not Path(given).exists() else (given, None)


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
        beside = [other for pattern in ("*.py", "*.json") for other in path.parent.glob(pattern)]
        near = sorted(str(other) for other in beside if other.is_file())
        hint = f" {did_you_mean(file, near, 'Here')}" if near else ""
        raise WorkflowError(f"{file!r} is a folder.{hint}" if path.is_dir() else f"there is no file {file!r}.{hint}")
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
    if isinstance(error, CodeMachineError):
        return str(error)
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _choose(module: ModuleType, file: str, name: str | None) -> Workflow:
    # By `type`: a stand-in for something that is loaded late would load it to answer `isinstance`.
    found: dict[str, Workflow] = {
        key: value for key, value in vars(module).items() if issubclass(type(value), Workflow)
    }
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
