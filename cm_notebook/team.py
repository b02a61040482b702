"""What an agent asks of others: groups of calls, and their one-line spelling.

Strategy: groups run one after the other, the members of a group side by side. However they are written (a list, or
``frontend-dev 'the UI' & backend-dev 'the API' && qa-engineer 'test it'``), they are checked here, before anything
starts, and refused with what is wrong and where. Nothing here runs; what a call means stands in ``rules/members.py``.
"""

import json
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from .errors import WorkflowError, did_you_mean
from .plain import Plain
from .workflow import NAME, Count, Model

MOST_DEPTH = 3
"""Agents that call agents that call agents: not deeper than this."""
CAP = 4
"""Members that run at the same time, where nothing else is said."""

_SPACE = r"\s*"
_OPTIONS = r"\[([^\]]*)\]"
_QUOTED = r"(?s)'((?:[^'\\]|\\.)*)'|\"((?:[^\"\\]|\\.)*)\""
_ESCAPED = r"\\(['\"\\])"
_JOIN = r"&&|&|$"


class Call(Model):
    """One agent that is called.

    Attributes
    ----------
    agent
        Its id.
    prompt
        What it is asked; it gets its own prompt (``Agent.prompt``) before that.
    input_files
        Files of the workspace whose texts it is given.
    tail
        Only so many of the last lines of its answer go back to the caller; ``None``: all.
    """

    agent: str
    prompt: str
    input_files: tuple[str, ...] = ()
    tail: Count | None = Field(default=None, ge=1)

    @field_validator("prompt")
    @classmethod
    def _says_something(cls, prompt: str) -> str:
        if not prompt.strip():
            raise ValueError("it is asked nothing")
        return prompt


Groups = list[list[Call]]


class ToolCall(Model):
    """What a scripted or recorded agent asks of its run in the middle of a turn.

    Attributes
    ----------
    name
        ``run_agents`` or ``ask_human``.
    arguments
        ``{"groups": [[{"agent": …, "prompt": …}, …], …]}`` or ``{"script": "a 'x' & b 'y'"}``, with ``max_concurrency``
        if there is one; or ``{"question": …}``.
    """

    name: Literal["run_agents", "ask_human"]
    arguments: dict[str, Any]

    @model_validator(mode="after")
    def _has_its_arguments(self) -> "ToolCall":
        if (wrong := wrong_arguments(self.name, self.arguments)) is not None:
            raise ValueError(wrong)
        return self

    @property
    def asked(self) -> Any:
        """Whom to call, or what to ask."""
        return self.arguments.get("groups", self.arguments.get("script", self.arguments.get("question")))


def wrong_arguments(name: str, arguments: Collection[str]) -> str | None:
    """What is wrong with the names of the arguments of such a call; ``None``: nothing."""
    given = set(arguments)
    if name == "ask_human":
        right = given == {"question"}
    else:
        right = len(given & {"groups", "script"}) == 1 and given <= {"groups", "script", "max_concurrency"}
    if right:
        return None
    wanted = "'question'" if name == "ask_human" else "either 'groups' or 'script'"
    return f"{name} takes {wanted}, not {', '.join(map(repr, sorted(given))) or 'nothing'}"


@dataclass(slots=True, eq=False, repr=False)
class AgentResult(Plain):
    """What came of one agent that was called.

    Attributes
    ----------
    agent, path
        Who it is, and where its turns are: ``run["coordinator/frontend-dev#1"]``.
    text
        Its answer; ``""`` if it gave none.
    error
        Why it has failed, or was not begun; ``None`` if neither.
    status
        ``done``, ``skipped`` (a person decided to go on without it), ``failed``, or ``pending``: it was not begun.
    """

    agent: str
    path: str
    text: str = ""
    error: str | None = None
    status: str = "done"


def told(results: Iterable[AgentResult]) -> str:
    """What came of a call, in words for a model."""
    said = []
    for result in results:
        head = result.agent if result.status == "done" else f"{result.agent} ({result.status})"
        skipped = "A person decided to go on without its output." if result.status == "skipped" else ""
        said.append(f"## {head}\n\n{result.error or result.text or skipped}".rstrip())
    return "\n\n".join(said)


def last_lines(text: str, count: int | None) -> str:
    """The last `count` lines; ``None``: all."""
    return text if count is None else "\n".join(text.rstrip("\n").split("\n")[-count:])


def parse_calls(script: str) -> Groups:
    r"""The groups that a line of CodeMachine's spelling means.

    ``a 'x' & b 'y'`` run side by side, ``&&`` waits for all before it; ``a[input:design.md;api.md,tail:20] 'x'``
    gives it files, and its caller the last 20 lines. Quotes are ``'`` or ``"``; ``\'`` is a quote inside.

    Raises
    ------
    WorkflowError    With the column, from 1, and what was expected there.
    """
    groups: Groups = [[]]
    at = _skip(script, 0)
    while True:
        call, at = _call(script, at)
        groups[-1].append(call)
        join = _match(_JOIN, script, at)
        if join is None:
            raise _wrong(script, at, "'&' (beside it), '&&' (after it) or the end")
        if not join[0]:
            return groups
        if join[0] == "&&":
            groups.append([])
        at = _skip(script, join.end())


def _call(script: str, at: int) -> tuple[Call, int]:
    name = _match(NAME, script, at)
    if name is None:
        raise _wrong(script, at, "an agent's id")
    at = name.end()
    given: dict[str, Any] = {}
    options = _match(_OPTIONS, script, at)
    if options is not None:
        given = _options(script, at + 1, options[1])
        at = options.end()
    elif script.startswith("[", at):
        raise _wrong(script, at, "a ']' that closes this '['")
    at = _skip(script, at)
    quoted = _match(_QUOTED, script, at)
    if quoted is None:
        raise _wrong(script, at, f"what {name[0]} is asked, in quotes")
    prompt = re.sub(_ESCAPED, r"\1", quoted[1] if quoted[1] is not None else quoted[2])
    if not prompt.strip():
        raise _wrong(script, at, f"what {name[0]} is asked, not an empty text")
    return Call(agent=name[0], prompt=prompt, **given), _skip(script, quoted.end())


def _options(script: str, at: int, text: str) -> dict[str, Any]:
    given: dict[str, Any] = {}
    seen = set[str]()
    for option in text.split(","):
        key, _colon, value = (part.strip() for part in option.partition(":"))
        files = tuple(name for part in value.split(";") if (name := part.strip()))
        if key in seen:
            raise _wrong(script, at, "each option once, as in input:FILE;FILE")
        seen.add(key)
        if key == "input" and files:
            given["input_files"] = files
        elif key == "tail" and value.isdecimal() and int(value) > 0:
            given["tail"] = int(value)
        else:
            raise _wrong(script, at, "input:FILE;FILE or tail:LINES")
        at += len(option) + 1
    return given


def _match(pattern: str, script: str, at: int) -> re.Match[str] | None:
    return re.compile(pattern).match(script, at)  # compiled when it is needed, and kept by re


def _skip(script: str, at: int) -> int:
    space = _match(_SPACE, script, at)
    return space.end() if space is not None else at


def _wrong(script: str, at: int, expected: str) -> WorkflowError:
    found = repr(script[at : at + 20]) if at < len(script) else "the end"
    return WorkflowError(
        f"run_agents, column {at + 1}: expected {expected}, found {found}. "
        "For instance: frontend-dev 'the UI' & backend-dev 'the API' && qa-engineer 'test both'."
    )


def checked_calls(asked: object, allowed: Collection[str]) -> Groups:
    """The groups that were asked for, each call of an agent that may be called.

    Parameters
    ----------
    asked
        A line as for :func:`parse_calls`; a list of calls, which run side by side; or a list of such lists, which run
        one after the other. A call is a :class:`Call` or its mapping. A list may be written out as JSON.
    allowed
        The ids of the agents that may be called.

    Raises
    ------
    WorkflowError    It is none of these, nobody is called, or one is called who may not be.
    """
    if isinstance(asked, str) and asked.lstrip()[:1] in ("[", "{"):  # no line begins so; models write lists so
        asked = _list_in(asked)
    if isinstance(asked, str):
        groups = parse_calls(asked)
    elif isinstance(asked, Sequence) and not isinstance(asked, bytes):
        nested = [isinstance(one, Sequence) and not isinstance(one, (str, bytes)) for one in asked]
        if any(nested) and not all(nested):
            raise WorkflowError("run_agents: a list of calls, or a list of groups, not both in one.")
        groups = [_group(one) for one in (asked if any(nested) else [asked])]
    else:
        raise WorkflowError(f"run_agents takes a list of groups or a line, not {type(asked).__name__}.")
    if not allowed:
        raise WorkflowError(
            "run_agents: nobody can be called here. List who can, among the agents: Workflow(…, sub_agents=['a', 'b'])."
        )
    if not groups or not all(groups):
        raise WorkflowError("run_agents: a group without a call. Leave it out, or say whom to call.")
    for group in groups:
        for call in group:
            if call.agent not in allowed:
                hint = did_you_mean(call.agent, allowed, "Possible")
                raise WorkflowError(f"run_agents: {call.agent!r} cannot be called here. {hint}")
    return groups


def _list_in(written: str) -> Any:
    """The value that is written out as JSON.

    Raises
    ------
    WorkflowError    It is no JSON.
    """
    try:
        return json.loads(written)
    except (ValueError, RecursionError) as error:
        wrong = str(error) if isinstance(error, ValueError) else "it is nested too deep"
        raise WorkflowError(
            f"run_agents: what begins like JSON cannot be read as such: {wrong}. Give a list of groups, not its text."
        ) from None


def _group(calls: Iterable[Any]) -> list[Call]:
    return [_as_call(number, call) for number, call in enumerate(calls, 1)]


def _as_call(number: int, call: Any) -> Call:
    if isinstance(call, Call):
        return call
    if isinstance(call, dict) and all(isinstance(key, str) for key in call):
        return Call(**call)
    raise WorkflowError(f'run_agents: call {number} is {call!r}; it is {{"agent": "…", "prompt": "…"}}.')
