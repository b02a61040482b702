"""Functions as tools: what is read off them, and what is made of a model's arguments."""

from __future__ import annotations

import enum
from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, Field

import cm_notebook as cm
from cm_notebook.tools import LONGEST_RESULT, text_of


class Color(enum.Enum):
    RED = "red"


class Point(BaseModel):
    x: int
    y: int = 0


@cm.tool
def draw(
    schema: Annotated[str, Field(description="where to")],
    points: list[Point],
    color: Color = Color.RED,
    *,
    size: Literal[1, 2] = 1,
    json: Any = None,
) -> str:
    """Draws.

    And more.
    """
    return f"{schema} {points} {color} {size} {json}"


def test_what_is_read_off_a_function():
    assert (draw.name, draw.description, draw.ask) == ("draw", "Draws.\n\nAnd more.", False)
    properties = draw.parameters["properties"]
    assert properties["schema"] == {"type": "string", "description": "where to"}
    assert properties["size"] == {"enum": [1, 2], "type": "integer", "default": 1}
    assert properties["color"]["default"] == "red"
    assert draw.parameters["required"] == ["schema", "points"]
    assert draw.parameters["additionalProperties"] is False


def test_arguments_become_what_the_function_wants():
    checked = draw.check({"schema": "s", "points": [{"x": "1"}], "color": "red"})
    assert checked == {"schema": "s", "points": [Point(x=1)], "color": Color.RED}
    assert draw(**checked) == draw("s", [Point(x=1)])
    with pytest.raises(ValueError, match=r"^points\.0\.x: Field required; size: Input should be 1 or 2$"):
        draw.check({"schema": "s", "points": [{}], "size": 3})


def test_a_plain_function_is_a_tool():
    def here(path: str) -> str:
        return path

    agent = cm.Agent("coder", "x", tools=[here, draw])
    assert [each.name for each in agent.tools] == ["here", "draw"]


def takes_anything(*paths: str) -> None: ...
def takes_names(**paths: str) -> None: ...
def takes_places(path: str, /) -> None: ...
def takes_a_connection(connection: type[cm.Run] | threading.Thread) -> None: ...  # type: ignore[name-defined]  # noqa: F821
def takes_a_run(run: cm.Run) -> None: ...


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (takes_anything, r"\*paths: 'str' cannot be described"),
        (takes_names, r"\*\*paths: 'str' cannot be described"),
        (takes_places, "cannot be described to a model. Name each parameter"),
        (takes_a_connection, "its annotations cannot be read: name 'threading' is not defined"),
        (takes_a_run, "JSON cannot say what it takes"),
        (lambda: None, "a name holds letters"),
    ],
)
def test_what_cannot_be_a_tool(function, words):
    with pytest.raises(cm.WorkflowError, match=words):
        cm.tool(function)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tools": [draw, draw]}, "two of them are called 'draw'"),
        ({"tools": draw}, "is not a list of tools"),
        ({"tools": ["draw"]}, "'draw' is not a tool. Write @cm.tool"),
        ({"tools": [Point]}, "is not a tool"),
        ({"tools": [{"nme": "x"}]}, "is not a tool"),
        ({"output": "Plan"}, "output='Plan' is not a pydantic class"),
        ({"output": Point(x=1)}, "is not a pydantic class"),
    ],
)
def test_what_an_agent_refuses(options, words):
    with pytest.raises(cm.WorkflowError, match=words):
        cm.Agent("coder", "x", **options)


def test_data_keeps_all_but_the_functions():
    agent = cm.Agent("coder", "x", tools=[draw], output=Point)
    workflow = cm.Workflow("w", agents=[agent], steps="coder")
    data = workflow.to_dict()
    kept = cm.Workflow(**data).agents[0]
    assert kept.missing == "has a tool that is a Python function (draw)"
    assert kept.tools[0].parameters == draw.parameters
    with pytest.raises(cm.WorkflowError, match=r"draw.*journal keeps only its name"):
        kept.tools[0]("s")
    assert cm.Agent("coder", "x", output=kept.output).missing == "has an output that is a Python class (Point)"
    with pytest.raises(cm.WorkflowError, match=r"'coder' has a tool .* agents=\[coder\]"):
        cm.Workflow.from_dict(data)
    assert cm.Workflow.from_dict(data, agents=[agent]) == workflow
    assert cm.Workflow(**data).to_dict() == data


def test_a_tool_that_changes_is_another_implementation():
    def first() -> int:
        return 1

    def second() -> int:
        return 2

    second.__qualname__ = first.__qualname__
    made = [cm.tool(name="f")(function).implementation for function in (first, first, second)]
    assert made[0] == made[1] != made[2]


@pytest.mark.parametrize(
    ("value", "text"),
    [("as it is", "as it is"), (None, "null"), ({"a": Point(x=1)}, '{"a":{"x":1,"y":0}}'), (b"\xff", None), (1j, "1j")],
)
def test_results_are_told_as_text(value, text):
    assert text is None or text_of(value).strip('"()') == text or text_of(value) == text


def test_a_long_result_is_cut_in_the_middle():
    told = text_of("a" * LONGEST_RESULT + "b" * 1000)
    assert len(told) < LONGEST_RESULT + 100
    assert "[… 1,000 characters are left out …]" in told
    assert told.endswith("b" * 1000)
