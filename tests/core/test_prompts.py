"""Templates: what is special in a prompt and what is not, and the texts that its parts stand for."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cm_notebook.errors import WorkflowError
from cm_notebook.events import Ref
from cm_notebook.prompts import Hole, check_read, check_templates, digest, holes, parse, pieces, step_names, text_of
from cm_notebook.workflow import Agent, Step, Workflow, agent, module, separator, step

# -- parse ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "parts"),
    [
        ("", ("",)),
        ("plain", ("plain",)),
        ("{{a}}", (Hole("a", None),)),
        ("x {{ quality-gate }} y", ("x ", Hole("quality-gate", None), " y")),
        ("{{ a.b }}{{a}}", (Hole("a", "b"), Hole("a", None))),
        ("{{\n a \t}}", (Hole("a", None),)),
        ("{{{ a }}}", ("{", Hole("a", None), "}")),
        ("{{ größe }}", (Hole("größe", None),)),
    ],
)
def test_parse(template: str, parts: tuple[Any, ...]) -> None:
    assert parse(template) == parts


CODE = r"{{ a b }}|{{ 1 }}|{{}}|{{ a.b.c }}|{{ a. }}|{ a }|{% x %}|{#1}|$a|%(a)s|\frac{{1}}{2}|{{ f() }}|{{'a': 1}}"


@pytest.mark.parametrize("text", [*CODE.split("|"), "{{ a | upper }}"])
def test_code_and_latex_are_left_alone(text: str) -> None:
    assert parse(text) == (text,)


def test_raw_templates_have_no_holes() -> None:
    assert parse("{{ a }}", True) == ("{{ a }}",)
    assert (list(holes("{{ a }}{{ b.c }}")), list(holes("{{ a }}", True))) == ([Hole("a", None), Hole("b", "c")], [])


@given(
    st.lists(st.sampled_from(["{{ a }}", "{{b.c}}", "x", "{", "}", "{{", "}}", " ", "ä-"]), max_size=12).map("".join)
)
def test_nothing_of_a_template_is_lost(template: str) -> None:
    parts = parse(template)
    spelled = "".join(
        part if isinstance(part, str) else "{{" + part.name + (f".{part.field}" if part.field else "") + "}}"
        for part in parts
    )
    assert spelled.replace(" ", "") == template.replace(" ", "")
    assert parts, "there is always a part"
    assert template == "" or "" not in parts


# -- pieces -----------------------------------------------------------------------------------------------------------


def test_parts_stand_for_texts() -> None:
    texts: dict[Ref, Any] = {
        Ref(1): "one {{ not special }}",
        Ref(2, "prompt"): ("<", Ref(1), ">"),
        Ref(3, "context"): (Ref(2, "prompt"), "|", Ref(2, "prompt")),
        Ref(4): "",
        Ref(5, "context"): (),
    }
    inner = ["<", "one {{ not special }}", ">"]
    assert list(pieces((Ref(3, "context"), "."), texts)) == [*inner, "|", *inner, "."]
    assert text_of((Ref(4), Ref(5, "context"), "x"), texts) == "x"
    with pytest.raises(KeyError):
        text_of((Ref(9),), texts)


def test_a_long_chain_of_references_is_no_deep_recursion() -> None:
    texts: dict[Ref, Any] = {Ref(0): "x"}
    for seq in range(1, 20_000):
        texts[Ref(seq)] = (Ref(seq - 1), "y")
    assert len(text_of((Ref(19_999),), texts)) == 20_000


@given(st.text())
def test_digest(text: str) -> None:
    assert digest(text) == hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def test_half_a_character_has_a_digest_too() -> None:
    assert digest("\ud800") != digest("?")


# -- names ------------------------------------------------------------------------------------------------------------


def test_names_of_steps() -> None:
    steps = [step("a-b"), separator("x"), step("a_b"), step("c-d_e"), step("c_d-e")]
    assert step_names(steps) == {
        "a-b": "a-b",
        "a_b": "a_b",  # an exact name comes before another's second spelling
        "c-d_e": "c-d_e",
        "c_d_e": "c-d_e",
        "c_d-e": "c_d-e",
    }


def flow(*steps: Step) -> Workflow:
    return Workflow("W", steps=list(steps))


GOAL: dict[str, Any] = {"goal": "x"}
FINE: list[tuple[list[Step], dict[str, Any]]] = [
    ([step("a", prompt="{{ goal }} {{ previous }} {{ feedback }} {{ loop.reason }}{{ loop.iteration }}")], GOAL),
    ([step("a", prompt="x"), step("b-c", prompt="{{ a.field }}"), step("d", prompt="{{ b_c }}{{ b-c }}")], {}),
    ([step("a", prompt="{{ nobody }}", raw=True)], {}),
    ([step("a", prompt="{{ gate }}"), module("gate", prompt="{{ a }}{{ gate }}")], {}),
    ([step("a", prompt="{{ b }}"), step("b", prompt="x"), module("gate", prompt="x", loop_steps=2)], {}),
    ([step("a", prompt="{{ goal.deep }}")], {"goal": {"deep": [1]}}),
    ([step("a", prompt="x"), step("b", prompt="{{ a.deep }}")], {"a": "an input of the step's name"}),
]


@pytest.mark.parametrize(("steps", "inputs"), FINE)
def test_templates_that_are_fine(steps: list[Step], inputs: dict[str, Any]) -> None:
    check_templates(flow(*steps), inputs)


WRONG: list[tuple[list[Step], str]] = [
    ([step("a", prompt="{{ goal }}")], r"step 'a' uses \{\{ goal \}\}, which is not defined"),
    ([step("a", prompt="{{ goal.x }}")], r"\{\{ goal.x \}\}"),
    ([step("a", prompt=["x", "{{ goal }}"])], "step 'a'"),
    ([step("a", prompt="{{ b }}"), step("b", prompt="x")], "Put 'b' before 'a'"),
    ([step("a", prompt="{{ b_c }}"), step("b-c", prompt="x")], "Put 'b-c' before 'a'"),
    ([step("a", prompt="{{ a }}")], r"uses \{\{ a \}\}, its own output, which is there only in a loop"),
    ([step("a", prompt="{{ b }}"), step("b", prompt="x"), module("gate", prompt="x", loop_steps=1)], "Put 'b' before"),
    (
        [step("a", prompt="{{ c }}"), module("b", prompt="x"), step("c", prompt="x"), module("d", prompt="x")],
        "Put 'c' before 'a'",  # both are in a loop, but not in the same one
    ),
    ([step("a", prompt="{{ loop.count }}")], "loop.iteration"),
    ([step("a", prompt="{{ feedback.x }}")], "no fields"),
    ([step("a", prompt="{{ table.dept }}")], "no field 'dept'. Did you mean 'depth'. Fields: depth, width"),
    ([step("a", prompt="{{ text.x }}")], "the input text is a text and has no fields"),
    ([step("a", prompt="{{ list.x }}")], "the input list is no table and has no fields"),
]


@pytest.mark.parametrize(("steps", "words"), WRONG)
def test_templates_that_name_what_will_not_be_there(steps: list[Step], words: str) -> None:
    with pytest.raises(WorkflowError, match=words) as refusal:
        check_templates(flow(*steps), {"table": {"depth": 1, "width": 2}, "text": "x", "list": [1]})
    assert "\n" not in str(refusal.value)


def test_the_prompt_of_the_agent_is_checked_too() -> None:
    workflow = Workflow("W", agents=[Agent("a", "{{ goal }}")], steps=["a"])
    with pytest.raises(WorkflowError, match="goal"):
        check_templates(workflow, {})
    check_templates(workflow, GOAL)


# -- inputs that nothing reads ----------------------------------------------------------------------------------------


def test_an_input_that_nothing_reads_is_refused_with_what_was_meant() -> None:
    workflow = flow(step("a", prompt="{{ goal }} {{ style.tone }}"), step("b", prompt="{{ a }} {{ previous }}"))
    check_read(workflow, ["goal", "style", "a"], ())
    check_read(workflow, ["other"], ["other"])
    with pytest.raises(WorkflowError, match=r"input 'gaol'\. Did you mean 'goal'\? Inputs: goal, style\.$"):
        check_read(workflow, ["gaol"], ())
    with pytest.raises(WorkflowError, match=r"no prompt uses the input 'other'. Inputs: goal, style"):
        check_read(workflow, ["other"], ())


def test_a_function_may_read_any_input_but_one_that_looks_misspelt() -> None:
    reads = agent("reads")(lambda turn: "x")
    workflow = Workflow("W", agents=[reads], steps=["reads"], inputs={"goal": 1})
    check_read(workflow, ["other"], workflow.inputs)
    check_read(workflow, ["gaol"], ["goal", "gaol"])
    with pytest.raises(WorkflowError, match=r"Did you mean 'goal'.*add it to the workflow's own inputs"):
        check_read(workflow, ["gaol"], workflow.inputs)


def test_a_start_refuses_an_input_that_nothing_reads() -> None:
    with pytest.raises(WorkflowError, match=r"input 'gaol'\. Did you mean 'goal'"):
        flow(step("a", prompt="{{ goal }}")).start({"goal": 1, "gaol": 1})
