"""What is exported is the same workflow again, reads as a person would write it, and leaves nothing out silently."""

from __future__ import annotations

import ast
import functools
import json
import subprocess
import sys
import types
import warnings
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, Field, create_model

import cm_notebook as cm
from cm_notebook import cli
from cm_notebook.exports.literals import write
from tests.helpers import gate, until

LIMIT = 4
SEEN: list[str] = ["once"]
STREAM = sys.stdout


class Part(BaseModel):
    title: str


class Plan(BaseModel):
    parts: list[Part] = Field(default_factory=list)


def words_of(text: str) -> int:
    return len(text.split())


@cm.tool
def read_file(path: str) -> str:
    """The text of a file."""
    return Path(path).read_text()


@cm.tool(name="remove-file", ask=True)
def remove(path: str) -> None:
    """Remove a file."""
    Path(path).unlink()


@cm.agent("word-limit")
def word_limit(turn: cm.Turn) -> cm.Verdict:
    """At most so many words."""
    count = words_of(turn.outputs["writer"])
    return cm.Verdict(action="continue" if count <= LIMIT else "loop", reason=f"{count} words")


def made(workflow: cm.Workflow, file: str = "made.py") -> str:
    """The program that it is exported as; it makes the same workflow."""
    workflow.export(file, overwrite=True)
    text = Path(file).read_text(encoding="utf-8")
    again = cli.load(file)
    assert data(again) == data(workflow)
    return text


def data(workflow: cm.Workflow) -> dict[str, Any]:
    """What it is; of a function without the digest of its source, which may be written a little differently."""
    found = workflow.to_dict()
    for agent in found.get("agents", []):
        agent.pop("implementation", None)
        for tool in agent.get("tools", []):
            tool.pop("implementation")
    return found


def said(workflow: cm.Workflow, file: str) -> str:
    """The warning that comes with the file."""
    with pytest.warns(UserWarning, match=file) as noted:
        workflow.export(file)
    [one] = noted
    assert one.filename == __file__, "it names the line that exported"
    return str(one.message)


# -- texts -------------------------------------------------------------------------------------------------------------

CHARACTERS = st.one_of(st.sampled_from("\"'\\\n\r\t {}#ab\u2028\x0b\x85\x00é😀\u202e"), st.characters())
TEXTS = st.text(CHARACTERS, max_size=80) | st.text(max_size=300)
VALUES = st.recursive(
    TEXTS | st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner) | st.dictionaries(TEXTS, inner) | st.tuples(inner),
    max_leaves=10,
)


@given(VALUES)
@settings(deadline=None)
def test_a_literal_is_the_value(value: Any) -> None:
    source = write(value)
    assert ast.literal_eval(f"(\n{source}\n)") == value
    assert not any(line.endswith(" ") for line in source.split("\n"))


@given(TEXTS, TEXTS, st.dictionaries(st.from_regex("[a-z]{3}", fullmatch=True), VALUES, max_size=3))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_prompt_comes_back(tmp_path: Path, prompt: str, system: str, inputs: dict[str, Any]) -> None:
    agent = cm.Agent("planner", f"x{prompt}", system=system)
    workflow = cm.Workflow(f"W{system}", agents=[agent], steps=[cm.step("planner", raw=True)], inputs=inputs)
    file = workflow.export(tmp_path / "made.py", overwrite=True)
    space: dict[str, Any] = {}
    exec(file.read_text(encoding="utf-8"), space)
    assert space["wf"] == workflow


def test_it_reads_as_a_person_would_write_it(tmp_path: Path) -> None:
    workflow = cm.Workflow(
        "careful-builder",
        agents=[
            cm.Agent("planner", "Plan {{ goal }}.\n\n1. Be brief.\n2. Name the tests.\n"),
            cm.Agent("quality-gate", "Is it good? " * 12, model="small"),
        ],
        steps="planner? -> quality-gate(loop 1, max 5)",
        inputs={"goal": "a todo CLI"},
    )
    assert (
        made(workflow)
        == '''\
"""careful-builder: a workflow of cm_notebook. Run it: cm-notebook run made.py"""

import cm_notebook as cm

planner = cm.Agent(
    "planner",
    """\\
Plan {{ goal }}.

1. Be brief.
2. Name the tests.
""",
)

quality_gate = cm.Agent(
    "quality-gate",
    (
        "Is it good? Is it good? Is it good? Is it good? Is it good? Is it good? Is it good? Is it "
        "good? Is it good? Is it good? Is it good? Is it good? "
    ),
    model="small",
)

wf = cm.Workflow(
    "careful-builder",
    agents=[planner, quality_gate],
    steps="planner? -> quality-gate(loop 1, max 5)",
    inputs={"goal": "a todo CLI"},
)


if __name__ == "__main__":
    # Where a step waits for you, `cm-notebook run made.py` asks in the terminal.
    for step in wf.start().wait():
        print(f"## {step.id}\\n\\n{step.text}\\n")
'''
    )


def test_all_kinds_of_steps_and_options(tmp_path: Path) -> None:
    workflow = cm.Workflow(
        "all",
        agents=[cm.Agent(name, "x") for name in ("a", "b", "c", "class", "cm", "wf", "int")],
        steps=[
            cm.step("a", prompt=["one", "two\nlines\nand more"], context="none", gate="both", interactive=True),
            cm.separator("now"),
            cm.parallel("b", "c", max_concurrency=1),
            cm.step("class", id="other", context=["a"], timeout_s=2.5, gate_timeout_s=60, gate_default="skip"),
            cm.module("cm", loop_steps=2, loop_skip=["other"], on_exhausted="fail", idempotent=False, max_turns=3),
            cm.step("unseen", prompt="made by its step"),
            cm.step("wf", interactive=False, raw=True, execute_once=True, retries=0),
        ],
        sub_agents=["int"],
        max_concurrency=2,
        autonomous_mode="never",
        inputs={"n": 1, "nested": {"list": [1, 2.5, None, True], "text": "a" * 200}},
        engine="offline",
        max_cost_usd=0.5,
        max_tokens=7,
        specification="spec",
    )
    text = made(workflow)
    assert "class_2 = cm.Agent(" in text
    assert "cm_2 = cm.Agent(" in text
    assert "wf_2 = cm.Workflow(" in text
    assert 'cm.step("unseen", prompt="made by its step")' in text
    assert "unseen = " not in text


def test_it_runs(tmp_path: Path, headless: None) -> None:
    agents = [cm.Agent("writer", "A slogan for {{ thing }}."), word_limit]
    cm.Workflow("slogan", agents=agents, steps="writer", inputs={"thing": "tea"}).export("slogan.py")
    done = subprocess.run([sys.executable, "slogan.py"], capture_output=True, text=True, timeout=60, check=True)
    assert "A slogan for tea." in done.stdout
    words = [sys.executable, "-m", "cm_notebook", "run", "slogan.py", "--on-gate", "approve"]
    assert "slogan completed" in subprocess.run(words, capture_output=True, text=True, timeout=60, check=True).stdout


# -- functions, tools, outputs -----------------------------------------------------------------------------------------


def test_a_function_comes_with_what_it_names(tmp_path: Path) -> None:
    writer = cm.Agent("writer", "Write.", tools=[read_file, remove], output=Plan)
    text = made(cm.Workflow("slogan", agents=[writer, word_limit], steps="writer -> word-limit(loop 1, max 3)"))
    order = [
        "from __future__",
        "from pathlib import Path",
        "import cm_notebook as cm",
        "from pydantic import",
        "LIMIT = 4",
    ]
    order += ["def words_of", '@cm.agent("word-limit")\ndef word_limit', "@cm.tool\ndef read_file"]
    order += ['@cm.tool(name="remove-file", ask=True)\ndef remove', "class Part", "class Plan", "writer = cm.Agent("]
    places = [text.index(one) for one in order]
    assert places == sorted(places)
    again = cli.load("made.py")
    verdict = again.agent("word-limit")(type("Turn", (), {"outputs": {"writer": "far too many words here"}})())
    assert verdict == cm.Verdict(action="loop", reason="5 words")
    assert again.agent("writer").output.model_json_schema() == Plan.model_json_schema()


def test_what_a_function_names_and_the_file_cannot_hold_is_said(tmp_path: Path) -> None:
    @cm.agent("printer")
    def printer(turn: cm.Turn) -> str:
        STREAM.write("x")
        return nowhere  # type: ignore[name-defined]  # noqa: F821

    workflow = cm.Workflow("w", agents=[printer], steps="printer")
    assert (
        said(workflow, "w.py")
        == (
            "w.py does not define STREAM (a TextIOWrapper), used by agent 'printer'; nowhere, used by agent 'printer'. "
            "Add it there before it runs."
        )
        or "nowhere, used by agent 'printer'" in Path("w.py").read_text()
    )
    assert "# Not in this file. Define or import it, before this runs:\n#   STREAM (" in Path("w.py").read_text()


def test_data_that_may_change_is_said_to_be_of_now(tmp_path: Path) -> None:
    @cm.agent("a")
    def work(turn: cm.Turn) -> str:
        return SEEN[0]

    assert 'SEEN = ["once"]  # as it was when this was exported' in made(cm.Workflow("w", agents=[work], steps="a"))


def test_a_function_inside_another_keeps_its_texts(tmp_path: Path) -> None:
    greeting = "hello"

    @cm.agent("a")
    def work(turn: cm.Turn) -> str:
        text = """
            indented
        """
        return greeting + text

    text = made(cm.Workflow("w", agents=[work], steps="a"))
    assert 'greeting = "hello"\n' in text
    assert cli.load("made.py").agent("a")(None) == "hello\n            indented\n        "


def test_decorators_of_others_stay(tmp_path: Path) -> None:
    @cm.agent("a")
    @functools.cache
    def work(turn: Any) -> str:
        return "done"

    text = made(cm.Workflow("w", agents=[work], steps="a"))
    assert '@cm.agent("a")\n@functools.cache\ndef work' in text
    assert "import functools\n" in text


def test_two_agents_of_one_function(tmp_path: Path) -> None:
    def work(turn: Any) -> str:
        return "done"

    agents = [cm.agent("a")(work), cm.agent("b", system="s")(work)]
    assert 'b = cm.agent("b", system="s")(work.function)' in made(cm.Workflow("w", agents=agents, steps="a -> b"))


def test_another_cm(tmp_path: Path) -> None:
    """Who calls something else cm gets our name in full."""
    Path("colours.py").write_text(
        "import cm_notebook\n\ncm = 2.54\n\n\n@cm_notebook.agent('a')\ndef inch(turn):\n    return str(cm)\n\n\n"
        "wf = cm_notebook.Workflow('w', agents=[inch], steps='a')\n"
    )
    text = made(cli.load("colours.py"))
    assert '@cm_notebook.agent("a")' in text
    assert cli.load("made.py").agent("a")(None) == "2.54"


def _lambda() -> cm.Workflow:
    return cm.Workflow("w", agents=[cm.agent("a")(lambda turn: "x")], steps="a")


def _unnamed() -> cm.Workflow:
    space: dict[str, Any] = {}
    exec("def work(turn): return 'x'", space)
    return cm.Workflow("w", agents=[cm.agent("a")(space["work"])], steps="a")


def _no_class() -> cm.Workflow:
    return cm.Workflow("w", agents=[cm.Agent("a", "x", output=create_model("Made", name=(str, ...)))], steps="a")


def _from_a_journal() -> cm.Workflow:
    return cm.Workflow("w", agents=[word_limit], steps="word-limit").kept()


def _same_name() -> cm.Workflow:
    def of(number: int) -> cm.Agent:
        @cm.agent(f"a{number}")
        def work(turn: cm.Turn) -> str:
            return str(number)

        return work

    return cm.Workflow("w", agents=[of(1), of(2)], steps="a1 -> a2")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (_lambda, "agent 'a' is a Python function whose source cannot be read. Define it with `def`"),
        (_unnamed, "agent 'a' is a Python function whose source cannot be read."),
        (_no_class, "the source of its output, Made, cannot be read"),
        (_from_a_journal, "agent 'word-limit' is a Python function (word_limit), and its source is not kept."),
        (_same_name, "'work' is the name of two different things here"),
    ],
)
def test_what_has_no_source_is_refused(make: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(cm.WorkflowError) as refused:
        make().export("w.py")
    assert words in str(refused.value)
    assert not list(tmp_path.iterdir())


def test_no_key_gets_into_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-planted-0123456789abcdef")
    workflow = cm.Workflow("w", agents=[cm.Agent("a", "The key is sk-planted-0123456789abcdef.")], steps="a")
    for name in ("w.py", "w.json"):
        with pytest.raises(cm.WorkflowError, match="would hold the key of a service"):
            workflow.export(name)
    assert not list(tmp_path.iterdir())


# -- files -------------------------------------------------------------------------------------------------------------


def test_json_and_what_it_cannot_hold(tmp_path: Path) -> None:
    plain = cm.Workflow("plain", agents=[cm.Agent("a", "Grüße")], steps="a?")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert plain.export("plain.json") == Path("plain.json")
    assert "Grüße" in Path("plain.json").read_text(encoding="utf-8")
    assert cli.load("plain.json") == plain
    writer = cm.Agent("writer", "Write.", tools=[read_file])
    workflow = cm.Workflow("w", agents=[writer, word_limit], steps="writer -> word-limit")
    assert said(workflow, "w.json").startswith(
        "w.json names what JSON cannot hold: writer has a tool that is a Python function (read_file); "
        "word-limit is a Python function (word_limit). Read it with cm.Workflow.from_dict(data, agents=[…]), or export"
    )
    data = json.loads(Path("w.json").read_text(encoding="utf-8"))
    assert cm.Workflow.from_dict(data, agents=[writer, word_limit]) == workflow


def test_nothing_is_lost(tmp_path: Path) -> None:
    workflow = cm.Workflow("w", agents=[cm.Agent("a", "x")], steps="a")
    Path("w.py").write_text("mine")
    with pytest.raises(cm.WorkflowError, match=r"w\.py is there already and holds something else; nothing was written"):
        workflow.export("w.py")
    assert Path("w.py").read_text() == "mine"
    workflow.export("w.py", overwrite=True)
    workflow.export("w.py")
    assert [path.name for path in tmp_path.iterdir()] == ["w.py"]


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("w.yaml", "its ending says what is written. Possible: .py, .json."),
        ("w.jso", "Did you mean '.json'?"),
        (".py", "its ending says what is written"),
        ("none/w.py", "there is no folder 'none'. Make it first."),
        (5, "5 is not the name of a file"),
    ],
)
def test_a_name_that_says_nothing(file: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(cm.WorkflowError) as refused:
        cm.Workflow("w", agents=[cm.Agent("a", "x")], steps="a").export(file)
    assert words in str(refused.value)


def test_a_run_gives_its_workflow_as_it_is_now(tmp_path: Path) -> None:
    workflow = cm.Workflow("w", agents=[cm.Agent("a", "About {{ topic }}."), word_limit], steps="a")
    run = workflow.start({"topic": "tea"}, journal=":memory:").wait()
    run.export("w.py")
    again = cli.load("w.py")
    assert again.inputs == {"topic": "tea"}
    assert again.agent("a") == workflow.agent("a")


# -- a run as a test ---------------------------------------------------------------------------------------------------

ARTICLE = "Tea is a drink.\n\n" + "It is made of leaves. " * 20


def played(tmp_path: Path) -> cm.Run:
    """A run with a rejection, a loop and a function."""
    writer = cm.Agent("writer", "A slogan for {{ topic }}.")
    workflow = cm.Workflow(
        "Tea party!",
        agents=[writer, word_limit, cm.Agent("author", "Write on {{ writer }}.")],
        steps="writer? -> word-limit(loop 1, max 3) -> author",
        inputs={"topic": "tea"},
    )
    script = cm.ScriptedEngine(
        {"writer": ["Coffee", "Far too many words about tea", "Tea is tea"], "author": [ARTICLE]}
    )
    answers = iter(["reject", "approve", "approve"])

    def decide(gate: cm.Gate) -> cm.Decision:
        action: Any = next(answers)
        return cm.Decision(action=action, feedback="Tea!" if action == "reject" else None)

    return workflow.start(engine=script, journal=":memory:", workspace=tmp_path / "work", on_gate=decide).wait()


def run_pytest(*words: str) -> subprocess.CompletedProcess[str]:
    """Plain pytest, in a folder without any settings."""
    Path("pytest.ini").write_text("[pytest]\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=100)


def test_a_run_is_a_test(tmp_path: Path, headless: None) -> None:
    run = played(tmp_path)
    assert run.export("test_tea.py") == Path("test_tea.py")
    text = Path("test_tea.py").read_text(encoding="utf-8")
    assert "def test_tea_party(tmp_path, monkeypatch):" in text
    assert 'assert run["writer"].text == "Tea is tea"' in text
    assert "Tea is a drink. It is made of leaves." in text
    assert 'run["word-limit"].text' not in text, "a function may say something else"
    changed = {"prompt": ("A slogan for", "A poem about"), "text": ('"Tea is tea"', '"Tea is not"')}
    for name, (old, new) in changed.items():
        Path(f"test_{name}.py").write_text(text.replace(old, new), encoding="utf-8")
        Path(f"test_{name}.jsonl").write_bytes(Path("test_tea.jsonl").read_bytes())
    done = run_pytest("test_tea.py", "test_prompt.py", "test_text.py")
    assert "2 failed, 1 passed" in done.stdout, done.stdout + done.stderr
    assert 'ReplayMismatch: The tape has no answer for "writer" with this prompt' in done.stdout
    assert "test_prompt.jsonl')` in place of `tape=` records again" in done.stdout
    assert "%cm" not in done.stdout
    assert "FAILED test_text.py::test_tea_party - AssertionError" in done.stdout


def test_a_run_of_a_journal_is_exported_with_the_functions_that_are_at_hand(tmp_path: Path, headless: None) -> None:
    run = played(tmp_path)
    found = cm.Run.open(run.id, run._journal)
    assert found is not run
    assert [agent.id for agent in found.workflow.agents if agent.missing] == ["word-limit"]
    for name in ("test_tea.py", "tea.py"):
        found.export(name)
        assert "count = words_of(" in Path(name).read_text(encoding="utf-8")

    @cm.agent("nowhere")  # in no module, so it is not found again
    def nowhere(turn: cm.Turn) -> str:
        return "done"

    run = cm.Workflow("w", agents=[nowhere], steps="nowhere").start(journal=":memory:").wait()
    found = cm.Run.open(run.id, run._journal)
    with pytest.raises(cm.WorkflowError, match=r"is not kept\. Import the file or run the cell that defines"):
        found.export("other.py")


class LoadedLate(types.ModuleType):
    """What loads a package, which is not installed, when it is asked for anything, its class included."""

    def __getattribute__(self, name: str) -> object:
        raise ModuleNotFoundError("not installed")


def test_nothing_is_loaded_by_looking_for_functions_that_are_at_hand(
    tmp_path: Path, headless: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    late = LoadedLate("late")
    monkeypatch.setitem(sys.modules, "late", late)
    monkeypatch.setitem(globals(), "late", late)
    run = played(tmp_path)
    cm.Run.open(run.id, run._journal).export("tea.py")
    assert "count = words_of(" in Path("tea.py").read_text(encoding="utf-8")


def test_a_run_is_a_tape(tmp_path: Path, headless: None) -> None:
    run = played(tmp_path)
    run.export("tea.jsonl")
    again = run.workflow.start(tape="tea.jsonl", journal=":memory:", workspace=tmp_path / "again").wait()
    assert again["author"].text == ARTICLE
    assert [attempt.number for attempt in again["writer"].attempts] == [1, 2, 3]


def back(run: cm.Run, step: str) -> cm.Run:
    return run.rewind(step).unpause().wait()


def forked(run: cm.Run) -> cm.Run:
    back(run, "writer")
    return run.fork("judge").unpause().wait()


def edited(run: cm.Run) -> cm.Run:
    run.replace(cm.step("writer", prompt="A poem about tea."))
    return run.wait()


@pytest.mark.parametrize(
    ("goes_on", "attempts"),
    [
        (lambda run: back(run, "author"), {"writer": 2, "judge": 2, "author": 1}),
        (lambda run: back(run, "writer"), {"writer": 1, "judge": 1, "author": 1}),
        (lambda run: back(back(run, "writer"), "judge"), {"writer": 1, "judge": 1, "author": 1}),
        (lambda run: back(back(run, "author"), "writer"), {"writer": 1, "judge": 1, "author": 1}),
        (lambda run: run.rerun("writer", later=True).wait(), {"writer": 1, "judge": 1, "author": 1}),
        (lambda run: run.rerun("author").wait(), {"writer": 2, "judge": 2, "author": 1}),
        (forked, {"writer": 1, "judge": 1, "author": 1}),
        (edited, {"writer": 1, "judge": 1, "author": 1}),
    ],
)
def test_what_was_gone_back_over_is_not_on_the_tape(
    goes_on: Any, attempts: dict[str, int], tmp_path: Path, headless: None
) -> None:
    agents = [cm.Agent("writer", "A slogan: {{ loop.reason }}"), cm.Agent("judge", "Judge {{ writer }}")]
    workflow = cm.Workflow(
        "tea",
        agents=[*agents, cm.Agent("author", "Write on {{ writer }}")],
        steps="writer? -> judge(loop 1, max 3) -> author?",
    )
    numbers = [str(number) for number in range(9)]
    verdicts = [json.dumps({"action": "loop" if number == "0" else "continue", "reason": number}) for number in numbers]
    script = cm.ScriptedEngine({"writer": numbers, "judge": verdicts, "author": numbers})

    def decide(gate: cm.Gate) -> str:
        return "retry" if gate.kind == "stale" else "approve"

    run = goes_on(workflow.start(engine=script, journal=":memory:", on_gate=decide).wait())
    assert run.status == "completed"
    run.export("tea.jsonl")
    again = run.workflow.start(tape="tea.jsonl", journal=":memory:").wait()
    assert {step.id: step.text for step in again} == {step.id: step.text for step in run}
    assert {step.id: len(step.attempts) for step in again} == attempts


def test_what_waited_and_was_made_again_is_on_the_tape_once(headless: None) -> None:
    workflow = cm.Workflow("w", agents=[cm.Agent("a", "x"), cm.Agent("b", "On {{ a }}")], steps="a -> b?")
    script = cm.ScriptedEngine({"a": ["1", "2"], "b": ["3", "4"]})
    run = workflow.start(engine=script, journal=":memory:")
    gate(run)
    run.replace(cm.step("a", prompt="y"))
    gate(run, "a")
    run.retry("a")
    until(lambda: len(run["b"].attempts) == 2 and run.gates, "b to be made again")
    run.approve().wait().export("w.jsonl")
    again = run.workflow.start(tape="w.jsonl", journal=":memory:").wait()
    assert [[attempt.text for attempt in step.attempts] for step in again] == [["2"], ["4"]]


def test_a_step_that_was_kept_though_another_was_made_again_is_on_no_tape(tmp_path: Path, headless: None) -> None:
    workflow = cm.Workflow("w", agents=[cm.Agent("a", "x"), cm.Agent("b", "On {{ a }}")], steps="a -> b")
    script = cm.ScriptedEngine({"a": ["1", "2"], "b": ["3"]})
    run = workflow.start(engine=script, journal=":memory:", on_gate="approve").wait()
    run.rerun("a").wait()
    with pytest.raises(cm.WorkflowError, match=r"'b' was asked with what another answer has replaced since"):
        run.export("test_w.py")


def test_both_files_or_none(tmp_path: Path) -> None:
    run = played(tmp_path)
    Path("tea_test.jsonl").write_text("mine")
    with pytest.raises(cm.WorkflowError, match=r"tea_test\.jsonl is there already"):
        run.export("tea_test.py")
    assert not Path("tea_test.py").exists()
    run.export("tea_test.py", overwrite=True)
    assert Path("tea_test.py").exists()


def test_what_is_no_test_yet(tmp_path: Path) -> None:
    workflow = cm.Workflow("w", agents=[cm.Agent("a", "x")], steps="a?")
    run = workflow.start(engine=cm.ScriptedEngine({"a": ["y"]}), journal=":memory:")
    gate(run)
    with pytest.raises(cm.WorkflowError, match=r"this one is waiting\. Let it complete first"):
        run.export("test_w.py")
    with pytest.raises(cm.WorkflowError, match=r"Possible: \.py, \.json, \.jsonl"):
        run.export("w.txt")
    run.stop()
    quiet = cm.Workflow("w", agents=[word_limit, cm.Agent("a", "x")], steps="a").start(journal=":memory:").wait()
    with pytest.raises(cm.WorkflowError, match="no model was called in this run"):
        quiet.export("w.jsonl")
