"""The functions and classes of a workflow as source, with all that they name.

Strategy: the source of each is got from where it was written, a file or a notebook's cell, and asked which names it
takes from outside (``symtable``). What a name stands for is looked up in the function's own module: a module or
something that can be imported becomes an import; a function or class that was written in the same place, a definition
of its own; plain data, an assignment. What is none of these is *missing*, and the file says so: nothing is left out
silently. Our own decorators are written anew, from what they have made.
"""

from __future__ import annotations
import __future__

import ast
import builtins
import inspect
import io
import keyword
import linecache
import re
import symtable
import sys
import tokenize
from collections.abc import Callable, Iterator, Mapping
from types import FunctionType, MappingProxyType, ModuleType
from typing import Any

from pydantic import BaseModel

import cm_notebook

from ..errors import WorkflowError, typed
from ..tools import Tool
from ..workflow import Agent
from .literals import Call, Code, write

AGENT_OPTIONS = ("system", "engine", "model", "reasoning_effort")
_PLAIN = (str, int, float, bool, bytes, type(None))
_ABSENT = object()


class Definitions:
    """What is to stand above the workflow.

    Attributes
    ----------
    ours
        The name that ``cm_notebook`` goes by.
    imports
        Its lines.
    blocks
        Definitions, each after those that it needs.
    missing
        What is named and could not be written, in words, by name.
    """

    def __init__(self, agents: list[Agent]) -> None:
        self.imports: dict[str, None] = {}
        self.blocks: list[str] = []
        self.missing: dict[str, str] = {}
        self.future = False
        self._names: dict[str, object] = {}
        functions = [each.function for agent in agents for each in agent.tools]
        functions += [agent.function for agent in agents]
        taken = [_scope(each).get("cm", cm_notebook) for each in functions if each is not None]
        self.ours = "cm" if all(value is cm_notebook for value in taken) else "cm_notebook"
        self._import(f"import cm_notebook{' as cm' if self.ours == 'cm' else ''}", self.ours, cm_notebook)

    # -- what a workflow is made of ------------------------------------------------------------------------------------

    def function_agent(self, agent: Agent) -> str:
        """Define a function that is an agent; returns the name that stands for it."""
        if agent.function is None:
            raise WorkflowError(f"agent {agent.id!r} {agent.missing}, and its source is not kept. {_define_first()}")
        options: dict[str, Any] = {name: value for name in AGENT_OPTIONS if (value := getattr(agent, name)) is not None}
        if agent.prompt:
            options["prompt"] = agent.prompt
        options |= self.parts(agent)
        return self._decorated(
            f"agent {agent.id!r}", agent, agent.function, Call(f"{self.ours}.agent", [agent.id], options), agent.id
        )

    def parts(self, agent: Agent) -> dict[str, Any]:
        """Define the tools and the output of an agent; returns them as options of its call."""
        if agent.missing is not None and agent.function is None and agent.implementation is None:
            raise WorkflowError(f"agent {agent.id!r} {agent.missing}, and its source is not kept. {_define_first()}")
        options: dict[str, Any] = {}
        if agent.tools:
            options["tools"] = [Code(self._tool(tool)) for tool in agent.tools]
        if agent.output is not None:
            options["output"] = Code(self._class(agent.output, f"agent {agent.id!r}"))
        return options

    def _tool(self, tool: Tool) -> str:
        function = tool.function
        if function is None:
            raise WorkflowError(f"tool {tool.name!r}: its source is not kept. {_define_first()}")
        options: dict[str, Any] = {}
        if tool.name != getattr(function, "__name__", ""):
            options["name"] = tool.name
        if tool.description != (inspect.getdoc(function) or ""):
            options["description"] = tool.description
        if tool.ask:
            options["ask"] = True
        decorator = Call(f"{self.ours}.tool", [], options) if options else Code(f"{self.ours}.tool")
        return self._decorated(f"tool {tool.name!r}", tool, function, decorator, tool.name)

    def _decorated(self, owner: str, made: Agent | Tool, function: Any, decorator: Call | Code, like: str) -> str:
        inner = inspect.unwrap(function)
        name = getattr(inner, "__name__", "")
        if (known := self._named(made)) is not None:
            return known
        there = self._names.get(name)
        if isinstance(there, (Agent, Tool)) and type(there) is type(made) and there.function is function:
            again = self.free_name(like, made)  # a second one of the same function
            self.blocks.append(f"{again} = {write(decorator)}({name}.function)\n")
            return again
        source = _source_of(inner, owner)
        self._claim(name, made, owner)
        code = _with_decorator(source, write(decorator), _scope(inner))
        self._define(code, inner, owner, ours=decorator)
        return name

    def _class(self, output: type[BaseModel], owner: str) -> str:
        if (known := self._named(output)) is not None:
            return known
        self._resolve(output.__name__, output, output, owner)
        if (known := self._named(output)) is None:
            raise WorkflowError(
                f"{owner}: the source of its output, {output.__name__}, cannot be read. Define the class in a file or "
                "in a cell, with a statement."
            )
        return known

    # -- names ---------------------------------------------------------------------------------------------------------

    def free_name(self, like: str, value: object = None) -> str:
        """A name for a variable, like that of an agent, that nothing else has; it is `value`'s from now on."""
        wanted = re.sub(r"\W", "_", like)
        wanted = f"_{wanted}" if wanted[:1].isdigit() else wanted
        used = {*self._names, *self.missing, *dir(builtins), *keyword.kwlist, *keyword.softkwlist}
        name, number = wanted, 1
        while name in used:
            number += 1
            name = f"{wanted}_{number}"
        self._names[name] = value
        return name

    def _named(self, value: object) -> str | None:
        return next((name for name, other in self._names.items() if other is value), None)

    def _claim(self, name: str, value: object, owner: str) -> bool:
        """Take `name` for `value`; false if it is that already."""
        there = self._names.get(name, _ABSENT)
        if there is value or (isinstance(value, _PLAIN) and type(there) is type(value) and there == value):
            return False
        if there is not _ABSENT:
            raise WorkflowError(
                f"{owner}: {name!r} is the name of two different things here, which one file cannot hold. Rename one."
            )
        self._names[name] = value
        return True

    def _import(self, line: str, name: str, value: object) -> None:
        if self._claim(name, value, "the file"):
            self.imports[line] = None

    def _define(self, code: str, thing: Any, owner: str, ours: Call | Code | None = None) -> None:
        """Put the definition `code` of `thing` where all that it names stands above it."""
        flags = getattr(getattr(thing, "__code__", None), "co_flags", 0)
        self.future = self.future or bool(flags & __future__.annotations.compiler_flag)
        scope = _scope(thing)
        for name in _free_names(code):
            if name == self.ours:
                continue
            value = scope.get(name, _ABSENT)
            if value is not _ABSENT:
                self._resolve(name, value, thing, owner)
            elif not hasattr(builtins, name) and self._names.get(name, _ABSENT) is _ABSENT:
                self.missing[name] = f"{name}, used by {owner}"
        self.blocks.append(code)

    def _resolve(self, name: str, value: Any, user: Any, owner: str) -> None:
        """Let `name` mean in the file what it means to `user`."""
        if self._names.get(name, _ABSENT) is value:
            return
        if isinstance(value, ModuleType) and _importable(value.__name__):
            parent, _, last = value.__name__.rpartition(".")
            plain = f"import {value.__name__}" + ("" if name == value.__name__ else f" as {name}")
            self._import(f"from {parent} import {last}" if parent and last == name else plain, name, value)
        elif isinstance(value, Agent) and value.function is not None:
            self._same(name, self.function_agent(value), owner)
        elif isinstance(value, Tool) and value.function is not None:
            self._same(name, self._tool(value), owner)
        elif (line := _import_line(name, value, user)) is not None:
            self._import(line, name, value)
        elif isinstance(value, (FunctionType, type)) and value.__name__ == name:
            self._own(name, value, owner)
        elif _is_plain(value):
            if self._claim(name, value, owner):
                note = "  # as it was when this was exported" if isinstance(value, (list, dict, set)) else ""
                self.blocks.append(f"{name} = {write(value, 0, len(name) + 3)}{note}\n")
        else:
            self.missing[name] = f"{name} (a {type(value).__name__}), used by {owner}"

    def _same(self, name: str, made: str, owner: str) -> None:
        if name != made:
            self._claim(name, Code(made), owner)
            self.blocks.append(f"{name} = {made}\n")

    def _own(self, name: str, value: Any, owner: str) -> None:
        """A function or class that was written where `owner` was."""
        try:
            source = _source_of(value, owner) if isinstance(value, FunctionType) else _class_source(value)
        except WorkflowError:
            source = None
        if source is None:
            self.missing[name] = f"{name} ({'a class' if isinstance(value, type) else 'a function'}), used by {owner}"
        elif self._claim(name, value, owner):
            self._define(source, value, owner)


def _define_first() -> str:
    return typed(
        "Import the file or run the cell that defines it first, then export again.",
        "Name the file that defines it: --workflow FILE.py",
    )


# -- what a name is ----------------------------------------------------------------------------------------------------


def _scope(thing: Any) -> Mapping[str, Any]:
    """What the names in a function or class stand for."""
    inner = inspect.unwrap(thing) if callable(thing) else thing
    own = getattr(inner, "__globals__", None)
    if own is None:
        module = sys.modules.get(getattr(inner, "__module__", ""))
        return vars(module) if module is not None else MappingProxyType({})
    closure = dict[str, Any]()
    cells = inner.__closure__ or ()
    for name, cell in zip(inner.__code__.co_freevars, cells, strict=True):
        try:
            closure[name] = cell.cell_contents
        except ValueError:  # not set yet
            continue
    return {**own, **closure}


def _free_names(code: str) -> Iterator[str]:
    """The names that `code` takes from outside, in a fixed order."""
    top = symtable.symtable(code, "<export>", "exec")
    here = {one.get_name() for one in top.get_symbols() if one.is_assigned() or one.is_imported()}
    found: dict[str, None] = {}
    tables = [top]
    while tables:
        table = tables.pop(0)
        tables += table.get_children()
        for symbol in table.get_symbols():
            outside = table is top or symbol.is_global()
            if outside and (symbol.is_referenced() or symbol.is_declared_global()):
                found[symbol.get_name()] = None
    return iter(sorted(name for name in found if name not in here and not re.fullmatch("__.*__", name)))


def _importable(module: str) -> bool:
    return module in sys.modules and module != "__main__" and not module.startswith("cm_file_")


def _import_line(name: str, value: Any, user: Any) -> str | None:
    """How `value` is imported under `name`; ``None``: it cannot be, or it was written where `user` was."""
    module = getattr(value, "__module__", None)
    if not isinstance(module, str) or not _importable(module) or module == getattr(user, "__module__", None):
        return None
    called = next((one for key in ("__qualname__", "__name__", "_name") if (one := getattr(value, key, None))), name)
    parts = module.split(".")
    for length in range(1, len(parts) + 1):  # the shortest way is the public one
        place = ".".join(parts[:length])
        if _importable(place) and getattr(sys.modules[place], str(called), _ABSENT) is value:
            return f"from {place} import {called}" + (f" as {name}" if called != name else "")
    return None


def _is_plain(value: Any) -> bool:
    if type(value) in (list, tuple, set, frozenset):
        return all(map(_is_plain, value))
    if type(value) is dict:
        return all(_is_plain(key) and _is_plain(inner) for key, inner in value.items())
    return type(value) in _PLAIN


# -- source ------------------------------------------------------------------------------------------------------------


def _source_of(function: Any, owner: str) -> str:
    """The source of a function that was defined by a statement.

    Raises
    ------
    WorkflowError    It was not, or the source cannot be read.
    """
    try:
        code = _dedented("".join(inspect.getsourcelines(function)[0]))
        [statement] = ast.parse(code).body
    except (OSError, TypeError, ValueError, SyntaxError, tokenize.TokenError):
        statement = None
    if not isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef)):
        raise WorkflowError(
            f"{owner} is a Python function whose source cannot be read. Define it with `def`, in a file or in a cell, "
            "then export again."
        )
    return code


def _class_source(wanted: type) -> str | None:
    """The source of a class; in a notebook it is looked for in the cells, the last one first."""
    try:
        return _dedented(inspect.getsource(wanted))
    except (OSError, TypeError, tokenize.TokenError):
        if wanted.__module__ != "__main__":
            return None
    for name, entry in reversed(list(linecache.cache.items())):
        if "ipykernel" not in name and "ipython-input" not in name:
            continue
        lines = list(entry[2]) if len(entry) > 2 else []
        try:
            statements = ast.parse("".join(lines)).body
        except SyntaxError:
            continue
        for one in reversed(statements):
            if isinstance(one, ast.ClassDef) and one.name == wanted.__name__ and _declares(one, wanted):
                begin = min([one.lineno, *(each.lineno for each in one.decorator_list)])
                return "".join(lines[begin - 1 : one.end_lineno]).rstrip() + "\n"
    return None


def _declares(statement: ast.ClassDef, wanted: type) -> bool:
    """Whether the statement annotates what the class has annotated: there may be another class of its name."""
    targets = [one.target for one in statement.body if isinstance(one, ast.AnnAssign)]
    named = {target.id for target in targets if isinstance(target, ast.Name)}
    return named == set(vars(wanted).get("__annotations__", {}))


def _dedented(source: str) -> str:
    """`source` moved to the margin; the lines inside its texts stay as they are."""
    margin = len(source) - len(source.lstrip(" \t"))
    if not margin:
        return source
    inside: set[int] = set()
    begun = 0
    lines = source.splitlines(keepends=True)
    for token in tokenize.generate_tokens(io.StringIO(f"if True:\n{source}").readline):
        kind = tokenize.tok_name[token.type]
        if kind == "STRING":
            inside |= set(range(token.start[0] + 1, token.end[0] + 1))
        elif kind == "FSTRING_START":
            begun = token.start[0]
        elif kind == "FSTRING_END":
            inside |= set(range(begun + 1, token.end[0] + 1))

    def moved(number: int, line: str) -> str:
        return line if number in inside or not line[:margin].isspace() else line[margin:]

    return "".join(moved(number, line) for number, line in enumerate(lines, 2))


def _with_decorator(source: str, ours: str, scope: Mapping[str, Any]) -> str:
    """`source` with the decorator `ours` in place of what stood there for it, or above all others."""
    [statement] = ast.parse(source).body
    assert isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef))
    lines = source.splitlines(keepends=True)
    written = f"@{ours}\n"
    for each in statement.decorator_list:
        if _value_of(each.func if isinstance(each, ast.Call) else each, scope) in (cm_notebook.agent, cm_notebook.tool):
            return "".join([*lines[: each.lineno - 1], written, *lines[each.end_lineno :]])
    return written + source


def _value_of(node: ast.expr, scope: Mapping[str, Any]) -> Callable[..., Any] | None:
    """What a dotted name stands for."""
    if isinstance(node, ast.Attribute):
        return getattr(_value_of(node.value, scope), node.attr, None)
    return scope.get(node.id) if isinstance(node, ast.Name) else None
