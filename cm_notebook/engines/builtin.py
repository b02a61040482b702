"""The tools that every model has without being given them: to call other agents, and to ask a person.

Strategy: they are tools like any other (``tools.py``), made for one turn from what its request can do, so engines and
dialects know nothing of them. What an agent may ask of its run is said once, in ``team.py``; here it is put into words
for a model: a description, a schema, and what came of it as text. Whatever is wrong with a call is told to the model.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..errors import EngineError, WorkflowError
from ..team import ToolCall, checked_calls, told, wrong_arguments
from ..tools import LONGEST_RESULT, REFUSED, Permission, Tool, shortened
from .base import AgentRequest

MOST_CALLED = 100
"""So many agents a model may call at once: a slip of it should not cost a fortune."""

_RUN_AGENTS = (
    "Have other agents work for you and get their answers. They see nothing of this conversation: say all they need. "
    "Groups run one after the other, the agents of a group at the same time. If one fails, later groups do not start."
)
_ASK_HUMAN = (
    "Ask the person who oversees this work, and wait for the answer. Only for what you need and cannot find out or "
    "decide yourself."
)


def built_in(request: AgentRequest) -> list[Tool]:
    """The tools that the agent of this turn has besides its own."""
    made = []
    if request.sub_agents and request.run_agents is not None:
        made.append(_tool("run_agents", _RUN_AGENTS, _calls_schema(request.sub_agents), request))
    if request.may_ask and request.ask_human is not None:
        question = {"type": "string", "description": "What you want to know, as the person should read it."}
        made.append(_tool("ask_human", _ASK_HUMAN, _object({"question": question}, "question"), request))
    return made


async def use(request: AgentRequest, call: ToolCall) -> str:
    """What comes of a call, in words for a model.

    Raises
    ------
    WorkflowError    It cannot be; the message says why, in one line.
    EngineError      The turn is no part of a run.
    """
    if call.name == "ask_human" and request.ask_human is not None:
        return await request.ask_human(str(call.asked))
    if call.name == "run_agents" and request.run_agents is not None:
        results = await request.run_agents(call.asked, call.arguments.get("max_concurrency"))
        share = LONGEST_RESULT // max(1, len(results))  # so that one who says too much hides no other
        return told(replace(one, text=shortened(one.text, share)) for one in results)
    raise EngineError(f"{request.step!r} uses {call.name}, but is no part of a run here.", step=request.step)


def refusal(permission: Permission) -> str:
    """What a model is told of a tool that a person does not allow."""
    return f"{REFUSED}{': ' + permission.reason if permission.reason else '.'}"


class _Checker:
    """In place of pydantic's: what is wrong is said in the words of ``team.py``."""

    def __init__(self, name: Any, allowed: tuple[str, ...]) -> None:
        self._name, self._allowed = name, allowed

    def validate_python(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """The call that these arguments make."""
        arguments = {name: value for name, value in arguments.items() if value is not None}  # as some models write
        if (wrong := wrong_arguments(self._name, arguments)) is not None:
            raise WorkflowError(f"{wrong}.")
        call = ToolCall(name=self._name, arguments=arguments)
        if self._name == "run_agents":
            count = sum(map(len, checked_calls(call.asked, self._allowed)))
            if count > MOST_CALLED:
                raise WorkflowError(
                    f"run_agents: {count} agents at once are too many; {MOST_CALLED} can be called. Call fewer, and "
                    "give each more to do."
                )
        elif not isinstance(call.asked, str) or not call.asked.strip():
            raise WorkflowError("ask_human: the question is empty. Say what you want to know.")
        return {"call": call}


def _tool(name: str, description: str, schema: dict[str, Any], request: AgentRequest) -> Tool:
    async def function(call: ToolCall) -> str:
        return await use(request, call)

    checker = _Checker(name, request.sub_agents)
    return Tool(name=name, description=description, parameters=schema, function=function, checker=checker)


def _object(properties: dict[str, Any], *required: str) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


def _calls_schema(agents: tuple[str, ...]) -> dict[str, Any]:
    call = _object(
        {
            "agent": {"type": "string", "enum": list(agents)},
            "prompt": {"type": "string", "description": "What it is asked, with all that it must know."},
            "input_files": {
                "type": "array",
                "items": {"type": "string"},
                "description": "Files of the workspace whose text it is given.",
            },
        },
        "agent",
        "prompt",
    )
    groups = {
        "type": "array",
        "items": {"type": "array", "items": call},
        "description": "Groups of calls. Give this or script.",
    }
    line = "frontend-dev 'the UI' & backend-dev 'the API' && qa-engineer 'test both'"
    script = {"type": "string", "description": f"The same in one line, & beside and && after, for instance: {line}"}
    return _object({"groups": groups, "script": script})
