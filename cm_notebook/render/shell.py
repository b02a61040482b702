"""What to type in a terminal: the command that does what a button or a magic does.

Strategy: a command names its run, the step, the journal and what was shown, so that it does the same wherever and
whenever it is run, or is refused because something else stands there by now.
"""

from __future__ import annotations

import shlex
from typing import Any, NamedTuple

from ..events import EDITABLE, Gate, Ref
from ..runstate import RunState, StepState
from . import text as say
from .markdown import clean

SHOWN = 12
"""So many characters of a digest tell what was shown."""


class Shell(NamedTuple):
    """The command lines about one run.

    Attributes
    ----------
    run
        Its id.
    journal
        The file it is kept in; ``None``: the one that is looked into anyway.
    """

    run: str
    journal: str | None = None

    def command(self, name: str, *words: str) -> str:
        """``cm-notebook NAME RUN WORDS``."""
        where = ("--journal", self.journal) if self.journal is not None else ()
        return shlex.join(["cm-notebook", name, self.run, *words, *where])

    def ways(self, state: RunState, gate: Gate) -> list[tuple[say.Way, str]]:
        """How `gate` can be answered, in the order of the buttons, each with its command.

        What makes a whole run again can only be said where the run is driven.
        """
        return [(way, self.way(gate, way)) for way in say.ways(state, gate) if way.action != "rerun"]

    def way(self, gate: Gate, way: say.Way) -> str:
        """The command of one way."""
        if way.action == "stop":
            return self.command("stop")
        words = [gate.path]
        if way.action in _WORDS:
            words += _WORDS[way.action]
        if way.times > 1:
            words += ["--count", str(way.times)]
        if way.scope is not None:
            words += ["--scope", way.scope]
        name = "edit" if way.action == "prompt" else way.action
        return self.command(name, *words, "--digest", gate.digest[:SHOWN])

    @property
    def goes_on(self) -> str:
        """The command that goes on with a run that has stopped."""
        return self.command("resume")


_WORDS = {"reject": ["--feedback", "WHY"], "answer": ["--text", "ANSWER"]}


def subject(state: RunState, gate: Gate) -> str:
    """The text that is decided about at `gate`, as it is; ``""`` where there is none."""
    step = state.find(gate.path)
    if gate.kind == "start":
        return state.text(step.redo.prompt) if step.redo is not None else ""
    if gate.kind == "budget":
        return ""
    if gate.kind == "permission":
        return say.requested(gate)
    if gate.kind == "question":
        return str(gate.payload.get("question", ""))
    last = step.last
    if gate.kind == "failed":
        return (last.error.detail or "") if last is not None and last.error is not None else ""
    return last.text if last is not None else ""


def editable(state: RunState, gate: Gate) -> str | None:
    """The text that a person may change at `gate`: its subject, or the prompt of what failed; ``None``: none."""
    if gate.kind in EDITABLE:
        return subject(state, gate)
    if "retry" not in gate.actions:
        return None
    turns = _turns(state.find(gate.path))
    return state.text(Ref(turns[-1], "prompt")) if turns else ""


def _turns(step: StepState) -> list[Any]:
    return [*step.last.turns] if step.last is not None else []


def facts(state: RunState, gate: Gate, shell: Shell) -> dict[str, Any]:
    """The gate as data: what a program needs to show it, and to answer it, if the run is kept in a file."""
    ways = shell.ways(state, gate) if shell.journal != ":memory:" else []
    return {
        "run": state.run_id,
        "workflow": state.name,
        "gate": gate.id,
        "kind": gate.kind,
        "step": gate.step,
        "path": gate.path,
        "attempt": gate.attempt,
        "message": clean(say.gate_sentence(state, gate)),
        "text": subject(state, gate),
        "digest": gate.digest,
        "actions": list(gate.actions),
        "answer": ways[0][1] if ways else "",
        "answers": {way.name: line for way, line in ways},
        "opened_at": gate.opened_at,
        "deadline": gate.deadline,
    }


def gate_lines(state: RunState, gate: Gate, shell: Shell, full: bool = False) -> list[str]:
    """The gate to be read in a terminal: what it is about, its sentence, and a command for each way to answer."""
    text = subject(state, gate)
    whole = say.one_line(text, say.QUESTION) == text and gate.kind == "question"
    lines = []
    if text and not whole:
        more = shell.command("show", gate.path, "--full")
        head = f"--- {gate.path}{f', attempt {gate.attempt}' if gate.attempt > 1 else ''}"
        lines += [head, clean(text) if full else say.bounded(text, more), "---"]
    lines.append(clean(say.gate_sentence(state, gate, beside=gate.kind == "permission" or (bool(text) and not whole))))
    rows = [[f"  {way.label.rstrip('…')}", line] for way, line in shell.ways(state, gate)]
    return [*lines, *say.table(rows)]
