"""What is refused before anything runs, and in which words: one line that says what, where, and what to do."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from cm_notebook.errors import CodeMachineError, WorkflowError
from cm_notebook.events import Decision
from cm_notebook.prompts import check_templates
from cm_notebook.workflow import (
    Agent,
    Module,
    Separator,
    Step,
    Verdict,
    Workflow,
    agent,
    as_step,
    module,
    parallel,
    parse_steps,
    separator,
    step,
)

PLANNER, CODER = Agent("planner", "plan"), Agent("coder", "code")


def flow(*steps: Any, **options: Any) -> Workflow:
    return Workflow("W", steps=list(steps), agents=[PLANNER, CODER], **options)


def checked(workflow: Workflow) -> None:
    check_templates(workflow, workflow.inputs)


def look_over(turn: Any) -> str:
    return "fine"


def compare(one: Any, two: Any) -> str:
    return "the same"


# -- refusals ---------------------------------------------------------------------------------------------------------

REFUSED: list[tuple[Callable[[], Any], tuple[str, ...]]] = [
    # names that are not known
    (
        lambda: flow("planner", "codr"),
        ("step 2", "agent 'codr' is not defined", "Did you mean 'coder'?", "planner, coder"),
    ),
    (lambda: flow("planner", Step(agent="nobody")), ("step 2", "'nobody'", "Defined: planner, coder.")),
    (lambda: flow().agent("codr"), ("agent 'codr' is not defined", "'coder'")),
    (lambda: Step(agent="a", promt="x"), ("step 'a'", "no option 'promt'", "Did you mean 'prompt'?", "Options:")),
    (lambda: module("a", loop_step=2), ("module 'a'", "no option 'loop_step'", "Did you mean 'loop_steps'?")),
    (lambda: Agent("a", promt="x"), ("agent 'a'", "no option 'promt'", "'prompt'")),
    (lambda: agent("a", modl="x")(print), ("agent 'a'", "no option 'modl'", "'model'")),
    (lambda: step("a", promt="x"), ("cm.step: ", "no option 'promt'", "Did you mean 'prompt'?")),  # type: ignore[call-arg]
    (lambda: step("a", "x"), ("cm.step: too many positional arguments", "Write cm.step(agent, option=…)")),  # type: ignore[misc]
    (lambda: module(), ("cm.module: missing a required argument: 'agent'",)),  # type: ignore[call-arg]
    (lambda: Agent(promt="x"), ("cm.Agent: missing a required argument: 'id'", "cm.Agent(id, prompt, option=…)")),
    (lambda: flow().start(engin="x"), ("workflow.start: ", "no option 'engin'", "Did you mean 'engine'?")),
    (lambda: Workflow("W", stepps=[]), ("workflow 'W'", "no option 'stepps'", "'steps'")),
    (lambda: flow({"agent": "coder", "kind": "modul"}), ("step 1", "kind='modul'", "Did you mean 'module'?")),
    (
        lambda: flow({"agent": "coder", "kind": ["x"]}),
        ("step 1", "kind=['x']", "Kinds: step, module, parallel, separator."),
    ),
    (
        lambda: flow(Step(agent="coder", context=["planer"])),
        ("step 1", "context names 'planer'", "Earlier steps: (none)"),
    ),
    (lambda: flow("planner", Step(agent="coder", context=["planer"])), ("step 2", "'planer'", "'planner'")),
    # values that are not valid
    (lambda: flow(autonomous_mode="Always"), ("autonomous_mode='Always'", "'never', 'always', True or False")),
    (lambda: flow(autonomous_mode=[]), ("autonomous_mode=[]", "'never'")),
    (lambda: flow(autonomous_mode=None), ("autonomous_mode=None",)),
    (lambda: step("a", interactive="maybe"), ("step 'a'", "interactive='maybe'", "boolean")),  # type: ignore[arg-type]
    (lambda: step("a", interactive="yes"), ("step 'a'", "interactive='yes'", "boolean")),  # type: ignore[arg-type]
    (lambda: step("a", raw=1), ("step 'a'", "raw=1", "boolean")),  # type: ignore[arg-type]
    (lambda: flow(autonomous_mode=1), ("autonomous_mode=1", "'never', 'always', True or False")),
    (lambda: module("a", loop_skip=5), ("module 'a'", "loop_skip=5", "list")),  # type: ignore[arg-type]
    (lambda: Agent("a", promt="x"), ("Options: id, prompt, system, engine, model, reasoning_effort, tools, output.",)),
    (lambda: step("a", context=5), ("step 'a'", "context=5", "'previous', 'all' or 'none'")),  # type: ignore[arg-type]
    (lambda: step("a", gate="befor"), ("step 'a'", "gate='befor'", "'before'")),  # type: ignore[arg-type]
    (lambda: step("a", retries=-1), ("step 'a'", "retries=-1", "0")),
    (lambda: step("a", timeout_s="x"), ("step 'a'", "timeout_s='x'", "number")),  # type: ignore[arg-type]
    (lambda: step("a", retries=True), ("step 'a'", "retries=True", "integer")),
    (lambda: step("a", timeout_s=True), ("step 'a'", "timeout_s=True", "number")),
    (lambda: step("a", gate_timeout_s=True), ("step 'a'", "gate_timeout_s=True", "number")),
    (lambda: step("a", max_cost_usd=True), ("step 'a'", "max_cost_usd=True", "number")),
    (lambda: step("a", max_turns=True), ("step 'a'", "max_turns=True", "integer")),
    (lambda: module("a", loop_steps=True), ("module 'a'", "loop_steps=True", "integer")),
    (lambda: module("a", loop_max_iterations=True), ("module 'a'", "loop_max_iterations=True", "integer")),
    (lambda: parallel("a", "b", max_concurrency=True), ("parallel: max_concurrency=True", "integer")),
    (lambda: flow(max_cost_usd=True), ("max_cost_usd=True", "number")),
    (lambda: flow(max_tokens=True), ("max_tokens=True", "integer")),
    (lambda: flow(max_concurrency=True), ("workflow 'W'", "max_concurrency=True", "integer")),
    (lambda: Decision(action="retry", count=True), ("count=True", "integer")),
    (lambda: step("a", timeout_s=0), ("step 'a'", "timeout_s=0", "greater than 0")),
    (lambda: step("a", prompt=["x", 5]), ("step 'a'", "prompt=", "string")),  # type: ignore[list-item]
    (lambda: step(5), ("agent=5", "string")),  # type: ignore[arg-type]
    (lambda: Step(), ("step: 'agent' is missing",)),
    (lambda: module("a", loop_steps=0), ("module 'a'", "loop_steps=0", "1")),
    (lambda: module("a", loop_max_iterations=-1), ("module 'a'", "loop_max_iterations=-1")),
    (lambda: module("a", on_exhausted="ask"), ("on_exhausted='ask'", "'pause', 'continue' or 'fail'")),  # type: ignore[arg-type]
    (lambda: Verdict(action="lop"), ("verdict", "action='lop'", "'loop'")),
    (lambda: flow(5), ("step 1", "5 is not a step", "cm.step")),
    (lambda: flow("planner", None), ("step 2", "None is not a step")),
    (lambda: Workflow("W", steps=5), ("workflow 'W'", "steps=5", "list")),
    (lambda: Workflow("W", agents=[5]), ("workflow 'W'", "agents.0=5")),
    (lambda: Workflow("W", agents=PLANNER), ("workflow 'W'", "'planner' is one agent", "agents=[…]")),
    (lambda: Workflow("W", agents=[look_over]), ("look_over is a function", '@cm.agent("look-over") above it')),
    (lambda: flow(PLANNER), ("step 1: an agent is not a step", "cm.step('planner')", "agents=[…]")),
    (lambda: flow("planner", look_over), ("step 2", '@cm.agent("look-over")', "its name here")),
    (lambda: agent("a")(lambda: "x"), ("agent 'a'", "called with the turn alone", "too many positional arguments")),
    (lambda: agent("a")(compare), ("agent 'a'", "compare cannot be", "'two'", "def compare(turn: cm.Turn) -> str")),
    (lambda: step("a", timeout_s=float("inf")), ("step 'a'", "timeout_s=inf", "finite")),
    (lambda: step("a", interactive="x" * 5000), ("step 'a'", "interactive='xxx", "xxx…xxx", "boolean")),  # type: ignore[arg-type]
    (lambda: Workflow("W", inputs=[1]), ("workflow 'W'", "inputs=[1]", "dictionary")),
    (lambda: Workflow(5), ("name=5", "string")),  # type: ignore[arg-type]
    (lambda: Workflow("  "), ("name is empty", "Careful Builder")),
    # names that cannot be
    (lambda: Agent("9a"), ("agent '9a'", "starts with a letter", "quality-gate")),
    (lambda: Agent(""), ("agent ''", "starts with a letter")),
    (lambda: Agent("two\nlines"), ("agent 'two\\nlines'",)),
    (lambda: step("coder", id="a b"), ("step 'a b'", "starts with a letter")),
    (lambda: step("coder", id="a->b"), ("step 'a->b'",)),
    (lambda: agent(print), ('write @cm.agent("quality-gate")',)),  # type: ignore[type-var, arg-type]
    (lambda: flow(step("coder", id="loop")), ("step 1", "'loop' is taken by templates", "another")),
    (lambda: flow(inputs={"feedback": 1}), ("input 'feedback'", "taken")),
    (lambda: flow(inputs={"goal": {1, 2}}), ("input 'goal' holds a value of type set", "Pass its text: str(goal)")),
    (lambda: flow(inputs={"goal": [object()]}), ("input 'goal' holds a value of type object", "Pass its text")),
    # what does not fit together
    (lambda: flow("coder", "planner", "coder"), ("step 3", "'coder' is already step 1", 'id="coder-2"')),
    (
        lambda: flow("planner", step("coder", id="a-b"), step("coder", id="a_b")),
        ("step 3", "cannot tell 'a_b' from 'a-b' (step 2)", "{{ a_b }} names both", "another id"),
    ),
    (lambda: Workflow("W", agents=[PLANNER, PLANNER]), ("agent 'planner' is defined twice",)),
    (
        lambda: flow(module("coder")),
        ("step 1 ('coder')", "loop_steps=1 goes back beyond the start", "0 steps stand before"),
    ),
    (lambda: flow("planner", module("coder", loop_steps=2)), ("step 2 ('coder')", "loop_steps=2", "1 step stand")),
    (
        lambda: flow("planner", separator("x"), module("coder", loop_steps=2)),
        ("step 3", "beyond the start", "1 step"),
    ),
    (
        lambda: flow("planner", module("coder", loop_skip=["planer"])),
        ("step 2 ('coder')", "loop_skip names 'planer'", "Did you mean 'planner'?"),
    ),
    (lambda: flow(Step(agent="new", prompt=" \n")), ("step 1 ('new')", "prompt is empty", "Write what")),
    (lambda: flow(Step(agent="new", prompt=["x", ""])), ("step 1 ('new')", "prompt is empty")),
    (lambda: flow(Step(agent="planner", prompt=[])), ("step 1 ('planner')", "prompt is empty")),
    (lambda: Workflow("W", agents=[Agent("a")], steps=["a"]), ("step 1 ('a')", "prompt is empty")),
    (lambda: Agent("a")(), ("agent 'a' is not a Python function", "step of a workflow")),
    # templates
    (
        lambda: checked(flow(Step(agent="coder", prompt="{{ planer }}"), inputs={"planner": 1})),
        ("step 'coder'", "{{ planer }}", "not defined", "Did you mean 'planner'?", "raw=True (--raw)"),
    ),
    (
        lambda: checked(flow(Step(agent="coder", prompt="{{ planner.x }}"), "planner")),
        ("step 'coder'", "{{ planner.x }}", "has not run by then", "Put 'planner' before 'coder'"),
    ),
    (lambda: checked(flow(Step(agent="coder", prompt="{{ coder }}"))), ("{{ coder }}", "its own output", "in a loop")),
    (lambda: checked(flow(Step(agent="coder", prompt="{{ loop }}"))), ("{{ loop }}", "Known: {{ loop.reason }}")),
    (
        lambda: checked(flow(Step(agent="coder", prompt="{{ loop.resaon }}"))),
        ("{{ loop.resaon }}", "{{ loop.iteration }}"),
    ),
    (lambda: checked(flow(Step(agent="coder", prompt="{{ feedback.x }}"))), ("{{ feedback.x }}", "no fields")),
    (
        lambda: checked(Workflow("W", steps=[Step(agent="a", prompt="x"), Step(agent="b", prompt=["y", "{{ c }}"])])),
        ("step 'b'", "{{ c }}", "Defined: a, b, feedback, loop, previous."),
    ),
    # data
    (lambda: Workflow.from_dict([]), ("not a workflow", "'name' and 'steps'")),  # type: ignore[arg-type]
    (lambda: Workflow.from_dict({}), ("not a workflow",)),
    (lambda: Workflow.from_dict({"name": None}), ("name=None",)),
    (lambda: Workflow.from_dict({"name": "W", "agents": 5}), ("workflow 'W'", "agents=5")),
    (lambda: Workflow.from_dict({"name": "W", "agents": ["a"]}), ("workflow 'W'", "agents=['a']")),
    (lambda: Workflow.from_dict({"name": "W", "agents": [{"prompt": "x"}]}), ("agent ''",)),
    (lambda: Workflow.from_dict({"name": "W", "steps": [{"agent": "a"}]}), ("step 1", "agent 'a' is not defined")),
    (lambda: Workflow.from_dict({"name": "W", "steps": [{"agnt": "a"}]}), ("step 1: there is no option 'agnt'",)),
    (lambda: Workflow.from_dict({"name": "W", "stepps": []}), ("no option 'stepps'", "'steps'")),
]


@pytest.mark.parametrize(("attempt", "words"), REFUSED, ids=[" ".join(words) for _, words in REFUSED])
def test_refused_by_name(attempt: Callable[[], Any], words: tuple[str, ...]) -> None:
    with pytest.raises(WorkflowError) as refusal:
        attempt()
    message = str(refusal.value)
    assert "\n" not in message
    for word in words:
        assert word in message
    assert refusal.value.__cause__ is None, "pydantic's own words are not shown"
    assert isinstance(refusal.value, CodeMachineError)


def test_all_that_is_right_is_taken() -> None:
    workflow = flow(
        "planner",
        separator("halfway"),
        step("coder", id="coder-2", context=["planner"], timeout_s=0.5, retries=0),
        step("new", prompt=["one", "two"]),
        module("coder", loop_steps=3, loop_max_iterations=0, loop_skip="new", interactive=False),
    )
    assert [getattr(item, "id", None) for item in workflow.steps] == ["planner", None, "coder-2", "new", "coder"]
    assert workflow.agent("new").prompt == "one", "a step with a prompt makes the agent of its name"
    assert workflow.steps[-1].loop_skip == ["new"]  # type: ignore[union-attr]


def test_a_loop_may_name_what_comes_later_in_it() -> None:
    a, b = Step(agent="a", prompt="{{ gate }} {{ b }}"), Step(agent="b", prompt="x")
    checked(Workflow("W", steps=[a, b, module("gate", prompt="y", loop_steps=2)]))
    first, second = module("one", prompt="x"), module("two", prompt="x")
    with pytest.raises(WorkflowError, match="has not run by then"):
        checked(Workflow("W", steps=[Step(agent="a", prompt="{{ b }}"), first, b, second]))


# -- functions --------------------------------------------------------------------------------------------------------


def test_a_function_is_an_agent() -> None:
    @agent("double")
    def double(x: int) -> int:
        """Twice as much."""
        return 2 * x

    assert isinstance(double, Agent)
    assert (double(4), double.id, double.__doc__) == (8, "double", "Twice as much.")
    assert double.implementation is not None
    assert double.implementation.split(":")[0].endswith("double")
    assert Workflow("W", agents=[double], steps=["double"]).agent("double").function is double.function


def test_a_function_that_changes_is_another_implementation() -> None:
    def one(turn: Any) -> str:
        return "1"

    def two(turn: Any) -> str:
        return "2"

    assert Agent("f", implementation="x").implementation == "x"
    assert agent("f")(one).implementation != agent("f")(two).implementation
    assert agent("f")(one).implementation == agent("f")(one).implementation
    assert agent("f")(len).implementation, "there is no source to read"


def test_functions_are_given_when_a_workflow_is_read() -> None:
    made = agent("check-it")(lambda turn: "fine")
    data = json.loads(json.dumps(Workflow("W", agents=[made], steps=["check-it"]).to_dict()))
    with pytest.raises(WorkflowError, match=r"from data\. Run the \.py file .*, or .*agents=\[check_it\]"):
        Workflow.from_dict(data)
    assert Workflow.from_dict(data, [made]).agent("check-it").function is made.function
    looked_at = Workflow(**data).agent("check-it")
    assert (looked_at.function, looked_at.implementation) == (None, made.implementation)


# -- there and back ---------------------------------------------------------------------------------------------------


def read_as(name: str) -> str:
    return name.replace("-", "_")


NAMES = st.from_regex(r"[A-Za-z_][A-Za-z0-9_-]{0,8}", fullmatch=True).filter(
    lambda name: name not in ("previous", "feedback", "loop")
)
TEXTS = st.text(min_size=1, max_size=20).filter(lambda text: bool(text.strip()))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def any_workflow(draw: st.DrawFn) -> Workflow:
    ids = draw(st.lists(NAMES, max_size=5, unique_by=read_as))
    steps: list[Any] = []
    for index, name in enumerate(ids):
        if draw(st.booleans()):
            steps.append(separator(draw(st.text(max_size=5))))
        options: dict[str, Any] = {
            "id": name,
            "prompt": draw(TEXTS | st.lists(TEXTS, min_size=1, max_size=2)),
            "interactive": draw(st.sampled_from((None, True, False))),
            "gate": draw(st.sampled_from(("after", "before", "both"))),
            "context": draw(st.sampled_from(("previous", "all", "none")) | st.just(ids[:index])),
            "timeout_s": draw(st.none() | st.floats(0.1, 1e6)),
            "raw": draw(st.booleans()),
            "idempotent": draw(st.booleans()),
        }
        if index and draw(st.booleans()):
            options["loop_steps"] = draw(st.integers(1, index))
            options["loop_max_iterations"] = draw(st.none() | st.integers(0, 9))
            options["on_exhausted"] = draw(st.sampled_from(("pause", "continue", "fail")))
            steps.append(module("worker", **options))
        else:
            steps.append(step("worker", **options))
    return Workflow(
        draw(TEXTS),
        agents=[Agent("worker", "work", model=draw(st.none() | TEXTS))],
        steps=steps,
        inputs=draw(st.dictionaries(NAMES, JSON, max_size=3)),
        autonomous_mode=draw(st.sampled_from(("never", "always", True, False))),
        engine=draw(st.none() | TEXTS),
    )


@settings(max_examples=80, deadline=None)
@given(any_workflow())
def test_a_workflow_comes_back_from_json_as_it_was(workflow: Workflow) -> None:
    data = json.loads(json.dumps(workflow.to_dict()))
    for again in (Workflow.from_dict(data), Workflow(**data)):
        assert again == workflow
        assert [type(item) for item in again.steps] == [type(item) for item in workflow.steps]
        assert again.to_dict() == workflow.to_dict()


@settings(max_examples=150, deadline=None)
@given(st.fixed_dictionaries({"name": st.just("W") | JSON}, optional={"steps": JSON, "agents": JSON, "inputs": JSON}))
def test_data_that_is_no_workflow_is_refused_by_name(data: dict[str, Any]) -> None:
    try:
        Workflow.from_dict(data)
    except WorkflowError as refusal:
        assert "\n" not in str(refusal)  # noqa: PT017  (many inputs are right)


# -- the arrow string -------------------------------------------------------------------------------------------------

ARROWS: list[tuple[str, list[Any]]] = [
    ("a", [step("a")]),
    ("a -> b", [step("a"), step("b")]),
    ("a->b→c", [step("a"), step("b"), step("c")]),
    ("  a\n  -> b-2?\n", [step("a"), step("b-2", interactive=True)]),
    ("a -> g()", [step("a"), module("g")]),
    ("a -> g(loop 1, max 5) -> z?", [step("a"), module("g", loop_max_iterations=5), step("z", interactive=True)]),
    (
        "a -> b -> g ( max 3 , skip a b,loop\t2 ) ?",
        [
            step("a"),
            step("b"),
            module("g", loop_steps=2, loop_max_iterations=3, loop_skip=["a", "b"], interactive=True),
        ],
    ),
]


@pytest.mark.parametrize(("text", "steps"), ARROWS)
def test_arrows(text: str, steps: list[Any]) -> None:
    assert parse_steps(text) == steps


def test_a_workflow_takes_an_arrow_string() -> None:
    arrow = Workflow("W", agents=[PLANNER, CODER], steps="planner -> coder(loop 1, max 5)")
    assert arrow.steps == flow("planner", module("coder", loop_max_iterations=5)).steps


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ("line is empty", "planner ->")),
        ("  \n", ("line is empty",)),
        ("a ->", ("column 5", "name is missing after the last '->'")),
        ("-> a", ("column 1", "a step's name is expected at '-> a'")),
        ("a -> -> b", ("column 6", "a step's name is expected at '-> b'")),
        ("a b", ("column 3", "'->' is expected at 'b'")),
        ("a -> [b | c", ("column 12", "'|' or ']' is expected at the end", "[programmer | writer]?")),
        ("[a? | b]", ("column 3", "'|' or ']' is expected at '? | b]'")),
        ("[a | [b | c]]", ("column 6", "an agent's name is expected at '[b | c]]'")),
        ("[]", ("column 2", "an agent's name is expected at ']'")),
        ("a -> 9", ("column 6", "a step's name is expected at '9'")),
        ("a -> b, c", ("column 7", "'->' is expected at ', c'")),
        ("a -> g(loop)", ("column 6", "g(loop)", "a number is expected after 'loop'")),
        ("a -> g(loop x)", ("column 6", "a number is expected after 'loop'")),
        ("a -> g(max -1)", ("column 6", "a number is expected after 'max'")),
        ("a -> g(max ²)", ("column 6", "a number is expected after 'max'")),
        ("a -> g(max " + "9" * 5000 + ")", ("column 6", "a number is expected after 'max'")),
        ("a -> g(lop 1)", ("column 6", "g(lop 1) is not understood", "Did you mean 'loop'?")),
        ("a -> g(two\nlines)", ("column 6", "g(two lines) is not understood", "loop, max, skip")),
        ("a -> g(loop 0)", ("module 'g'", "loop_steps=0")),
        ("a -> g(loop 1", ("column 7", "'->' is expected at '(loop 1'")),
        ("a -> b?? -> c", ("column 8", "'->' is expected at '? -> c'")),
    ],
)
def test_arrows_that_cannot_be_read(text: str, words: tuple[str, ...]) -> None:
    with pytest.raises(WorkflowError) as refusal:
        parse_steps(text)
    for word in words:
        assert word in str(refusal.value)
    assert "\n" not in str(refusal.value)


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=40) | st.text("ab1 ->→?(),²\n\tloopmaxskip", max_size=40))
def test_any_text_is_steps_or_refused(text: str) -> None:
    try:
        assert all(isinstance(item, (Step, Module)) for item in parse_steps(text))
    except WorkflowError as refusal:
        assert "\n" not in str(refusal)  # noqa: PT017  (some texts are right)


@given(st.lists(NAMES, min_size=1, max_size=5), st.sampled_from((" -> ", "->", " →\n")))
def test_names_and_arrows_are_read(names: list[str], arrow: str) -> None:
    assert [item.agent for item in parse_steps(arrow.join(names))] == names  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", ["step", "module", "separator"])
def test_a_step_from_data(kind: str) -> None:
    made = as_step(1, {"kind": kind, **({} if kind == "separator" else {"agent": "a"})})
    assert type(made) is {"step": Step, "module": Module, "separator": Separator}[kind]
    assert as_step(1, made) is made


# -- verdicts ---------------------------------------------------------------------------------------------------------

CONTINUE, LOOP = Verdict(action="continue"), Verdict(action="loop", reason="r", score=0.5)
SPOKEN: list[tuple[str, Verdict | None]] = [
    ('{"action": "continue"}', CONTINUE),
    ('Well.\n```json\n{"action": "loop", "reason": "r", "score": 0.5}\n```\nBye {x}', LOOP),
    ('{"action": "continue"} but: {"action": "loop", "reason": "r", "score": "0.5"}', LOOP),
    ('{"action": "continue", "reason": null, "more": [1]}', CONTINUE),
    (
        '{"action": "loop", "reason": "use {x} and {\\"action\\": 1}"}',
        Verdict(action="loop", reason='use {x} and {"action": 1}'),
    ),
    ('{"reason": "use {braces}", "action": "loop"}', Verdict(action="loop", reason="use {braces}")),
    ('{"details": {"action": "continue"}, "action": "loop"}', Verdict(action="loop")),
    ('{"other": 1}', None),
    ("continue", None),
    ("", None),
    ('{"action": "CONTINUE"}', None),
    ('{"action": ["continue"]}', None),
    # the last word was meant as a verdict and cannot be read: an earlier one is not taken for it
    ('{"action": "continue"} {"action": "lop"}', None),
    ('{"action": "continue"} {"action": "loop", "reason": "a "b" c"}', None),
    ("{\"action\": \"continue\"} {'action': 'loop'}", None),
    ('{"action": "continue"} {"reason": "cut off", "action": "lo', None),
]


@pytest.mark.parametrize(("text", "verdict"), SPOKEN)
def test_the_verdict_in_a_text(text: str, verdict: Verdict | None) -> None:
    assert Verdict.from_text(text) == verdict


@given(st.text(max_size=60) | st.text('{}[]":, actionloprs\\', max_size=60))
def test_any_text_has_a_verdict_or_none(text: str) -> None:
    verdict = Verdict.from_text(text)
    assert isinstance(verdict, Verdict | None)
    assert (Verdict.missed("m", text) == "") == (verdict is not None), "why there is none is always said"


@pytest.mark.parametrize("text", ["{" * 200_000, '{"a":' * 100_000, "[" * 200_000 + '{"action"', '{"action":' * 50_000])
def test_hostile_text_costs_nothing(text: str) -> None:
    assert Verdict.from_text(text) is None
    assert len(Verdict.missed("m", text)) < 300


def test_models_are_pydantic() -> None:
    for made in (PLANNER, step("a"), CONTINUE, flow()):
        assert isinstance(made, BaseModel)


def test_a_step_stays_as_it_was_checked() -> None:
    flow = Workflow("W", agents=[Agent("a", "Do it.")], steps=[step("a")])
    with pytest.raises(WorkflowError, match=r"step 'a': retries cannot be changed any more\. Make another one"):
        flow.steps[0].retries = -1  # type: ignore[union-attr]
    kept = flow.kept()
    flow.agents[0].prompt, flow.inputs["goal"] = "Do more.", "x"
    flow.steps.append(step("a", id="b"))
    assert (kept.agents[0].prompt, kept.inputs, [item.id for item in kept.executable]) == ("Do it.", {}, ["a"])


def test_one_without_steps_says_so_where_it_is_shown() -> None:
    assert Workflow("later")._repr_mimebundle_() == {"text/plain": "later: no steps"}
