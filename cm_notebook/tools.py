"""Python functions that a model may call while it works.

Strategy: what a function wants is read off its annotations once, when it is decorated, and nonsense is refused then.
What comes from a model is never trusted: ``Tool.check`` turns its arguments into the ones the function wants, or says
in words the model can use why they do not fit. Who calls the function, and when, is the engine's business.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import re
import sys
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NotRequired, overload

from pydantic import BaseModel, ConfigDict, Field, PydanticUserError, ValidationError
from pydantic_core import PydanticUndefined, to_json

from .errors import WorkflowError
from .plain import Plain, not_json

if sys.version_info >= (3, 12):
    from typing import TypedDict
else:  # pydantic reads the one of typing from 3.12 on
    from typing_extensions import TypedDict

if TYPE_CHECKING:
    from pydantic import TypeAdapter

LONGEST_RESULT = 200_000
"""Characters of a result that a model is told; what is longer is cut in the middle."""

REFUSED = "Refused by a person"
"""So begins what a model is told of a call that a person has denied."""

BUILT_IN = ("run_agents", "ask_human")
"""Tools that models have without being given them; see ``engines/builtin.py``."""

_NAME = r"[A-Za-z0-9_-]{1,64}"
_LEFT_OUT = r"\n\[… [\d,]+ characters are left out …\]\n"


@dataclass(slots=True, eq=False, repr=False)
class Permission(Plain):
    """The answer to whether a tool may be called: with which arguments, or why not."""

    allowed: bool
    arguments: Mapping[str, Any] | None = None
    """Edited ones to call it with."""
    reason: str = ""


class Tool(BaseModel):
    """A function that a model may call; make it with :func:`tool`.

    Attributes
    ----------
    name, description
        What the model is told it is called and does.
    parameters
        JSON schema of its arguments.
    ask
        Whether a person is asked for permission before each call.
    implementation
        Its name and a digest of its source, so that a change is noticed.
    function
        ``None`` where the tool comes from a journal, which keeps only what is above.
    """

    model_config = ConfigDict(extra="forbid", defer_build=True, arbitrary_types_allowed=True, frozen=True)

    name: str
    description: str = ""
    parameters: dict[str, Any] = Field(default_factory=dict)
    ask: bool = False
    implementation: str = ""
    function: Callable[..., Any] | None = Field(default=None, exclude=True, repr=False)
    checker: Any = Field(default=None, exclude=True, repr=False)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function, as if it had not been decorated."""
        if self.function is None:
            raise WorkflowError(f"tool {self.name!r} is a Python function, and a journal keeps only its name.")
        return self.function(*args, **kwargs)

    def check(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments as the function wants them.

        Raises
        ------
        ValueError    They do not fit; the message says which and why, in one line.
        """
        try:
            return dict(self.checker.validate_python(dict(arguments)))
        except ValidationError as error:
            said = [f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors(include_url=False)]
            raise ValueError("; ".join(said[:5])) from None


@overload
def tool(function: Callable[..., Any], /) -> Tool: ...


@overload
def tool(
    *, name: str | None = None, description: str | None = None, ask: bool = False
) -> Callable[[Callable[..., Any]], Tool]: ...


def tool(
    function: Callable[..., Any] | None = None,
    /,
    *,
    name: str | None = None,
    description: str | None = None,
    ask: bool = False,
) -> Tool | Callable[[Callable[..., Any]], Tool]:
    """Decorator: make a Python function, sync or async, a tool for the models of HTTP engines.

    Its annotations say which arguments it takes, its docstring what it does. A sync function runs in a thread. What it
    returns is told to the model as text (anything but ``str`` as JSON), and so is what it raises.

    Parameters
    ----------
    name, description
        In place of the function's name and docstring.
    ask
        ``True``: a person is asked before each call.

    Raises
    ------
    WorkflowError    The function takes ``*args``, ``**kwargs`` or something that JSON cannot say.

    Examples
    --------
    >>> @cm.tool
    ... def add(a: int, b: int = 1) -> int:
    ...     \"\"\"The sum of two numbers.\"\"\"
    ...     return a + b
    >>> adder = cm.Agent("adder", "What is 2 + 3?", engine="openai:gpt-5-mini", tools=[add])
    """

    def decorate(function: Callable[..., Any]) -> Tool:
        called = name or str(getattr(function, "__name__", type(function).__name__))
        if not re.fullmatch(_NAME, called):
            raise WorkflowError(f"tool {called!r}: a name holds letters, digits, '-' and '_'. Give it one: name=….")
        checker, schema = _arguments(called, function)
        return Tool(
            name=called,
            description=description if description is not None else inspect.getdoc(function) or "",
            parameters=schema,
            ask=ask,
            implementation=implementation_of(function),
            function=function,
            checker=checker,
        )

    return decorate if function is None else decorate(function)


def as_tool(given: Any) -> Tool:
    """A tool from a tool, a plain function, or what a journal keeps of one.

    Raises
    ------
    WorkflowError    It is none of these, or its name is that of a tool that every model has.
    """
    if isinstance(given, Tool):
        if given.name in BUILT_IN:
            raise WorkflowError(
                f"tools: {given.name!r} is the name of a tool that models have anyway. Give yours another: "
                "@cm.tool(name=…)."
            )
        return given
    if isinstance(given, Mapping):
        try:
            return Tool(**given)
        except ValidationError as error:
            raise WorkflowError(f"tools: {given!r} is not a tool: {error.errors()[0]['msg']}.") from None
    if not callable(given) or isinstance(given, type):
        raise WorkflowError(f"tools: {given!r} is not a tool. Write @cm.tool above a function and give its name.")
    return as_tool(tool(given))


def _arguments(name: str, function: Callable[..., Any]) -> tuple[TypeAdapter[Any], dict[str, Any]]:
    """What checks a call's arguments, and their JSON schema."""
    from pydantic import TypeAdapter  # only for who has tools

    try:
        signature = inspect.signature(function)
        annotated: Any = function if inspect.isroutine(function) else vars(type(function)).get("__call__", function)
        hints = typing.get_type_hints(annotated, include_extras=True)
    except (NameError, TypeError, ValueError) as error:
        raise WorkflowError(f"tool {name!r}: its annotations cannot be read: {error}.") from None
    fields: dict[str, Any] = {}
    for each in signature.parameters.values():
        if each.kind not in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY):
            raise WorkflowError(
                f"tool {name!r}: {each} cannot be described to a model. Name each parameter: def {name}(path: str)."
            )
        hint = hints.get(each.name, Any)
        fields[each.name] = hint if each.default is each.empty else NotRequired[hint]
    # a TypedDict, as parameters may have any name, also such as a model's field must not have
    made: Any = TypedDict  # its functional form, as the names are known only now
    shape = made(name, fields)
    shape.__pydantic_config__ = ConfigDict(extra="forbid", arbitrary_types_allowed=False)
    try:
        checker = TypeAdapter(shape)
        schema = checker.json_schema()
    except (PydanticUserError, TypeError) as error:
        raise WorkflowError(f"tool {name!r}: JSON cannot say what it takes: {str(error).splitlines()[0]}") from None
    schema.pop("title", None)
    for each in signature.parameters.values():
        described = schema["properties"][each.name] if "properties" in schema else {}
        described.pop("title", None)
        if each.default is not each.empty and "default" not in described:
            default = _plain(each.default)
            if default is not PydanticUndefined:
                described["default"] = default
    return checker, schema


def read_arguments(written: str) -> dict[str, Any]:
    """The arguments of a call as they were written: a JSON object.

    Raises
    ------
    ValueError    It is none.
    """
    try:
        value = json.loads(written) if written.strip() else {}
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    if not isinstance(value, dict):
        raise ValueError("it is no JSON object")
    if (wrong := not_json(value)) is not None:
        raise ValueError(f"it holds {wrong}")
    return value


def write_arguments(arguments: Mapping[str, Any]) -> str:
    """The arguments of a call, for a person to read and to edit."""
    return json.dumps(arguments, indent=2, ensure_ascii=False)


def _plain(value: Any) -> Any:
    try:
        return json.loads(to_json(value))
    except ValueError:
        return PydanticUndefined


def denied(text: str | None, failed: bool) -> bool:
    """Whether a person did not allow the call that returned so."""
    return failed and text is not None and text.startswith(REFUSED)


def text_of(value: Any) -> str:
    """What a model is told of a tool's result."""
    return shortened(value if isinstance(value, str) else to_json(value, fallback=str).decode(), LONGEST_RESULT)


def shortened(text: str, most: int) -> str:
    """The text; of one that is longer than that, the beginning and the end. One that was cut so stays as it is."""
    half = most // 2
    if len(text) <= most or re.fullmatch(_LEFT_OUT, text[half:-half]):
        return text
    return f"{text[:half]}\n[… {len(text) - 2 * half:,} characters are left out …]\n{text[-half:]}"


def implementation_of(function: Callable[..., Any]) -> str:
    """A function as it is kept: its name and a digest of its source, so that a change is noticed."""
    try:
        source = inspect.getsource(function)
    except (OSError, TypeError):
        source = repr(getattr(getattr(function, "__code__", None), "co_code", ""))
    digest = hashlib.sha256(source.encode("utf-8", "replace")).hexdigest()[:16]
    return f"{getattr(function, '__qualname__', type(function).__name__)}:{digest}"
