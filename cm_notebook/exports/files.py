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
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from .. import keys
from ..errors import WorkflowError, did_you_mean, typed
from ..events import NOT_CALLED, TurnFinished, TurnStarted
from ..prompts import agent_facts, digest
from ..workflow import Agent, Workflow
from .counted import counted
from .literals import write
from .program import program

if TYPE_CHECKING:
    from ..run import Run

KINDS = (".py", ".json")
SHORT = 80
"""Characters of a text that stands whole in a test; of a longer one its digest does."""


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
        return export_workflow(_with_functions(run.workflow), path, overwrite=overwrite)
    tape = file.with_suffix(".jsonl")
    files = {tape: _tape(run)}
    if file.suffix == ".py":
        files = {file: _test(run, file, tape), **files}
    _write(files, overwrite)
    return file


def _with_functions(workflow: Workflow) -> Workflow:
    """`workflow` with the Python that no journal keeps, where it has been imported, or a cell has defined it."""
    lacking = {agent.id: agent_facts(agent) for agent in workflow.agents if agent.missing is not None}
    if not lacking:
        return workflow
    found: dict[str, Agent] = {}
    # Looked at past `__getattr__` and `__class__`: some modules and objects load something when they are asked.
    modules = [module for module in sys.modules.values() if issubclass(type(module), ModuleType)]
    for module in modules:
        for value in [*object.__getattribute__(module, "__dict__").values()]:
            agents: Iterable[Agent] = ()
            if issubclass(type(value), Workflow):
                agents = value.agents
            elif issubclass(type(value), Agent):
                agents = (value,)
            for agent in agents:
                if lacking.get(agent.id) == agent_facts(agent) and agent.missing is None:
                    found[agent.id] = agent
    return workflow.model_copy(update={"agents": [found.get(agent.id, agent) for agent in workflow.agents]})


def _tape(run: Run) -> str:
    from ..recording import lines_of

    events = run.events
    gone, fewer = counted(events)
    left = (event for event in events if event.seq not in gone)
    if any(isinstance(event, TurnFinished) and event.note == NOT_CALLED for event in left):
        raise WorkflowError(
            "export: no model was called in this run, so there is no tape of it: its answers are the prompts."
        )
    for event in events:
        if not isinstance(event, TurnStarted) or event.seq in gone:
            continue
        if any(not isinstance(part, str) and part[0] in gone for part in event.prompt + (event.context or ())):
            raise WorkflowError(
                f"export: {event.path!r} was asked with what another answer has replaced since, so no tape plays this "
                f"run. Make it again, then export: run.rerun({event.path.partition('/')[0]!r}, later=True)."
            )
    lines = lines_of(events, gone, fewer)
    if not lines:
        raise WorkflowError("export: nothing of this run is for a tape: functions did it, and nobody has decided.")
    return "".join(f"{line}\n" for line in lines)


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


_TEST = """

def test_{name}(tmp_path, monkeypatch):
    monkeypatch.setenv("CM_HEADLESS", "1")  # nobody is there: the tape answers and decides
    tape = Path(__file__).with_suffix(".jsonl")
    run = {wf}.start(tape=tape, journal=":memory:", workspace=tmp_path).wait()
    assert run.status == "completed"
    assert {step.id: step.status for step in run} == {statuses}
{texts}"""
_DIGEST = """    # {start}
    said = {digest}
    assert sha256(run[{id}].text.encode()).hexdigest() == said
"""


def _test(run: Run, file: Path, tape: Path) -> str:
    if run.status != "completed":
        raise WorkflowError(f"export: a test plays a whole run, and this one is {run.status}. Let it complete first.")
    workflow, texts, imports = _with_functions(run.workflow), "", ["from pathlib import Path"]
    done_by = {item.id: item.agents for item in workflow.executable}
    for step in run:
        agents = [workflow.agent(name) for name in done_by[step.id]]
        if any(agent.implementation is not None for agent in agents):
            continue  # a function runs again, and may say something else
        if len(step.text) <= SHORT:
            expected = write(step.text, 4, 4 + len(f"assert run[{write(step.id)}].text == "))
            texts += f"    assert run[{write(step.id)}].text == {expected}\n"
        else:
            start = " ".join(step.text[:200].split())[:SHORT]
            texts += _DIGEST.format(id=write(step.id), digest=write(digest(step.text)), start=f"{start} …")
    if "sha256(" in texts:
        imports.append("from hashlib import sha256")
    statuses = write({step.id: step.status for step in run}, 4, 61)
    name = re.sub(r"\W+", "_", workflow.name).strip("_").lower() or "workflow"
    end = _TEST.replace("{name}", name).replace("{statuses}", statuses).replace("{texts}", texts)
    about = f"a run of cm_notebook as a test.\n\nIt plays {tape.name}: no key, no network. Run it: pytest {file.name}\n"
    text, missing, _ = program(workflow, about, end, imports)
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
                f"To replace it: {typed(f'overwrite=True (`%cm export {file} --overwrite`)', '--overwrite')}."
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
