"""What an agent may ask of others, and how it is refused."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cm_notebook.errors import WorkflowError
from cm_notebook.team import AgentResult, Call, checked_calls, parse_calls, told

TEAM = ("frontend-dev", "backend-dev", "qa-engineer")


def said(groups):
    return [[(call.agent, call.prompt) for call in group] for group in groups]


@pytest.mark.parametrize(
    ("line", "groups"),
    [
        ("a 'x'", [[("a", "x")]]),
        ("a 'x' & b 'y'", [[("a", "x"), ("b", "y")]]),
        ("a 'x'&b 'y'&&c 'z'", [[("a", "x"), ("b", "y")], [("c", "z")]]),
        ("""a "it's" && b 'say \\'yes\\''""", [[("a", "it's")], [("b", "say 'yes'")]]),
        ("  frontend-dev\n'two\nlines'  ", [[("frontend-dev", "two\nlines")]]),
        ("a 'x && y' & b 'c & d'", [[("a", "x && y"), ("b", "c & d")]]),
    ],
)
def test_a_line_means_groups(line, groups):
    assert said(parse_calls(line)) == groups


def test_files_and_the_last_lines():
    ((call,),) = parse_calls("qa-engineer[input: design.md; api.md, tail:20] 'test'")
    assert call == Call(agent="qa-engineer", prompt="test", input_files=("design.md", "api.md"), tail=20)


@pytest.mark.parametrize(
    ("line", "column", "expected"),
    [
        ("", 1, "an agent's id, found the end"),
        ("'x'", 1, "an agent's id"),
        ("a", 2, "what a is asked, in quotes, found the end"),
        ("a 'x' b 'y'", 7, "'&' (beside it), '&&' (after it) or the end, found \"b 'y'\""),
        ("a 'x' &", 8, "an agent's id, found the end"),
        ("a 'x' &&& b 'y'", 9, "an agent's id, found \"& b 'y'\""),
        ("a 'x", 3, "what a is asked, in quotes"),
        ("a '  '", 3, "what a is asked, not an empty text"),
        ("a[input:x 'y'", 2, "a ']' that closes this '['"),
        ("a[input:] 'y'", 3, "input:FILE;FILE or tail:LINES"),
        ("a[input:x,tail:no] 'y'", 11, "input:FILE;FILE or tail:LINES"),
        ("a[input:x,input:z] 'y'", 11, "each option once, as in input:FILE;FILE"),
        ("a[tail:1, tail:2] 'y'", 10, "each option once, as in input:FILE;FILE"),
    ],
)
def test_a_wrong_line_names_the_column(line, column, expected):
    with pytest.raises(WorkflowError, match=re.escape(f"column {column}: expected {expected}"[:60])) as refused:
        parse_calls(line)
    assert expected in str(refused.value)


@given(st.text(alphabet="ab-'\"& [];:,\\input\n", max_size=60))
def test_any_line_is_read_or_refused(line):
    try:
        groups = parse_calls(line)
    except WorkflowError as refused:
        column = int(re.search(r"column (\d+)", str(refused))[1])
        assert 1 <= column <= len(line) + 1
    else:
        assert all(call.prompt.strip() for group in groups for call in group)


_prompts = st.text(min_size=1).filter(lambda text: text.strip())


@given(st.lists(st.lists(st.tuples(st.sampled_from(TEAM), _prompts), min_size=1, max_size=4), min_size=1, max_size=4))
def test_what_is_written_is_read(groups):
    def quoted(prompt):
        return "'" + prompt.replace("\\", "\\\\").replace("'", "\\'") + "'"

    line = " && ".join(" & ".join(f"{agent} {quoted(prompt)}" for agent, prompt in group) for group in groups)
    assert said(checked_calls(line, TEAM)) == groups


@pytest.mark.parametrize(
    ("asked", "groups"),
    [
        ([{"agent": "qa-engineer", "prompt": "x"}], [[("qa-engineer", "x")]]),
        ([[{"agent": "qa-engineer", "prompt": "x"}], [Call(agent="backend-dev", prompt="y")]],
         [[("qa-engineer", "x")], [("backend-dev", "y")]]),
        ("qa-engineer 'x'", [[("qa-engineer", "x")]]),
        ('[{"agent": "qa-engineer", "prompt": "x"}]', [[("qa-engineer", "x")]]),
        (' [[{"agent": "qa-engineer", "prompt": "x"}],\n [{"agent": "backend-dev", "prompt": "y"}]]',
         [[("qa-engineer", "x")], [("backend-dev", "y")]]),
    ],
)  # fmt: skip
def test_ways_to_ask(asked, groups):
    assert said(checked_calls(asked, TEAM)) == groups


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("qa-enginer 'x'", "'qa-enginer' cannot be called here. Did you mean 'qa-engineer'?"),
        ([], "a group without a call"),
        ([[], []], "a group without a call"),
        (None, "takes a list of groups or a line, not NoneType"),
        ({"agent": "qa-engineer"}, "takes a list of groups or a line, not dict"),
        ([{"agent": "qa-engineer"}], "'prompt' is missing"),
        ([{"agent": "qa-engineer", "prompt": " "}], "it is asked nothing"),
        ([{"agent": "qa-engineer", "prompt": "x", "promt": "y"}], "there is no option 'promt'. Did you mean 'prompt'?"),
        ([{"agent": "qa-engineer", "prompt": "x", "tail": True}], "tail=True is not valid"),
        ('[{"agent": "qa-engineer"', "what begins like JSON cannot be read as such: Expecting ',' delimiter: line 1"),
        ("[" * 100_000, "cannot be read as such: it is nested too deep"),
        ('{"agent": "qa-engineer", "prompt": "x"}', "takes a list of groups or a line, not dict"),
        ("[]", "a group without a call"),
        (["qa-engineer 'x'"], "call 1 is \"qa-engineer 'x'\""),
        ([[{"agent": "qa-engineer", "prompt": "x"}], {"agent": "qa-engineer", "prompt": "x"}], "not both in one"),
    ],
)
def test_what_cannot_be_asked_is_refused_by_name(asked, message):
    with pytest.raises(WorkflowError, match=re.escape(message)):
        checked_calls(asked, TEAM)


def test_a_model_is_told_what_came_of_each() -> None:
    results = [
        AgentResult("a", "boss/a#1", "done it\n"),
        AgentResult("b", "boss/b#1", error="no disk", status="failed"),
        AgentResult("c", "boss/c#1", status="skipped"),
        AgentResult("d", "boss/d#1", error="it was not begun", status="pending"),
    ]
    assert told(results) == (
        "## a\n\ndone it\n\n## b (failed)\n\nno disk\n\n## c (skipped)\n\nA person decided to go on without its output."
        "\n\n## d (pending)\n\nit was not begun"
    )
