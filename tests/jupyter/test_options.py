"""The table of subcommands: every option is a parameter in Python, and every mistake is answered with what is right."""

from __future__ import annotations

import argparse
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest

import cm_notebook as cm
from cm_notebook import options
from cm_notebook.jupyter.notebook import Notebook
from cm_notebook.options import COMMANDS, Option


def parameters(*callables: Callable[..., Any]) -> set[str]:
    return {name for function in callables for name in inspect.signature(function).parameters}


TWINS: dict[str, set[str]] = {
    "workflow": {*cm.Workflow.model_fields, *parameters(cm.Run.start)},
    "agent": set(cm.Agent.model_fields),
    "step": parameters(cm.step, cm.Run.add),
    "module": parameters(cm.module, cm.step, cm.Run.add),
    "run": parameters(cm.Run.start, Notebook.go),
    "resume": parameters(cm.Run.start),
    "approve": parameters(cm.Run.approve),
    "reject": parameters(cm.Run.reject),
    "answer": parameters(cm.Run.answer),
    "retry": parameters(cm.Run.retry),
    "show": parameters(cm.StepView.attempt) | {"full"},
    "graph": parameters(cm.Run.graph),
    "diff": parameters(cm.Run.diff, cm.StepView.diff),
    "fork": parameters(cm.Run.fork, cm.Run.start),
    "export": parameters(cm.Run.export) & parameters(cm.Workflow.export),
}
SHORT = {"--max-cost", "--input", "--autonomous", "--timeout", "--gate-timeout", "--effort", "--attempt", "-o"}


@pytest.mark.parametrize(
    ("command", "option"),
    [(c.name, o) for c in COMMANDS.values() for o in c.options],
    ids=lambda v: str(getattr(v, "parameter", v)),
)
def test_an_option_is_a_parameter_with_hyphens(command: str, option: Option) -> None:
    assert option.flags[0] == "--" + option.parameter.strip("_").replace("_", "-")
    assert set(option.short) <= SHORT
    assert option.own or option.parameter in TWINS[command]


def test_every_command_says_what_it_does_and_how() -> None:
    for command in COMMANDS.values():
        assert command.meaning.endswith(".")
        assert command.twin
        assert command.examples, command.name
        assert all(option.meaning for option in command.options)
        for example in command.examples:
            head, _, body = example.partition("\n")
            line = head.partition("%cm ")[2]
            assert options.read(line, cell=bool(body)).command is command


READ: list[tuple[str, bool, dict[str, Any]]] = [
    ("step planner", False, {"id": "planner"}),
    ("step planner --timeout 300 --auto", True, {"id": "planner", "timeout_s": 300.0, "interactive": False}),
    ("step planner --timeout-s=300 --interactive", True, {"id": "planner", "timeout_s": 300.0, "interactive": True}),
    ("step a --context all", False, {"id": "a", "context": "all"}),
    ("step a --context b,c", False, {"id": "a", "context": ["b", "c"]}),
    ("module q --loop-steps 2 --loop-skip a,b", False, {"id": "q", "loop_steps": 2, "loop_skip": ["a", "b"]}),
    ("workflow w --autonomous never", False, {"name": "w", "autonomous_mode": "never"}),
    ("workflow 'Careful Builder' --autonomous true", False, {"name": "Careful Builder", "autonomous_mode": True}),
    ("workflow w --input n=-1 --input 'goal=a CLI'", False, {"name": "w", "inputs": {"n": -1, "goal": "a CLI"}}),
    ("workflow w --input flag=true --input id=007", False, {"name": "w", "inputs": {"flag": "true", "id": "007"}}),
    ("run -o x --until b", False, {"out": "x", "until": "b"}),
    ("run --from b", False, {"from_": "b"}),
    ("reject don't do it?", False, {"words": "don't do it?"}),
    ("reject --step planner   don't  --stop", False, {"step": "planner", "words": "don't  --stop"}),
    ("reject --step planner", True, {"step": "planner"}),
    ("answer “yes”, she said", False, {"words": "“yes”, she said"}),
    ("diff a -2 -1", False, {"step": "a", "attempts": [-2, -1]}),
    ("diff --against r-1", False, {"against": "r-1"}),
    ("fork a --run r-1 --max-turns 2", False, {"step": "a", "run": "r-1", "max_turns": 2}),
    ("approve", False, {}),
    ("approve planner", False, {"step": "planner"}),
    ("approve --max-cost 1.00", False, {"max_cost_usd": 1.0}),
    ("run --max-cost 0.50 --max-tokens 9000", False, {"max_cost_usd": 0.5, "max_tokens": 9000}),
    ("step a --max-turns 3", False, {"id": "a", "max_turns": 3}),
    ("mode gates", False, {"mode": "gates"}),
    ("export 'my plan.py' --overwrite", False, {"file": "my plan.py", "overwrite": True}),
]


@pytest.mark.parametrize(("line", "cell", "values"), READ, ids=[row[0] for row in READ])
def test_a_line_is_read_into_the_twins_arguments(line: str, cell: bool, values: dict[str, Any]) -> None:
    assert options.read(line, cell=cell).values == values


class _Named:
    id = "r-1"
    inputs: ClassVar = {"goal": "a shop"}


# line -> its values, where there are the variables run and n
FILLED: list[tuple[str, dict[str, Any]]] = [
    ("diff --against {run.id}", {"against": "r-1"}),
    ("diff --against $run.id", {"against": "r-1"}),
    ("step s$n --timeout $n", {"id": "s3", "timeout_s": 3.0}),
    ("run --input goal={run.inputs[goal]}", {"inputs": {"goal": "a shop"}}),
    ("run --input 'goal=$n, $$n, $5, $m, {m}, {{n}}'", {"inputs": {"goal": "3, $$n, $5, $m, {m}, {{n}}"}}),
    ("export $run.py", {"file": "$run.py"}),
    ("run --on-waiting 'tell $n'", {"on_waiting": "tell $n"}),
    ("reject $n is wrong", {"words": "$n is wrong"}),
]


@pytest.mark.parametrize(("line", "values"), FILLED, ids=[row[0] for row in FILLED])
def test_variables_of_the_notebook_in_a_line(line: str, values: dict[str, Any]) -> None:
    assert options.read(line, variables={"run": _Named(), "n": 3}).values == values


MISTAKES: list[tuple[str, str]] = [
    ("stepp planner", "Did you mean 'step'?"),
    ("step planner --tmeout 5", "Did you mean '--timeout'?"),
    ("step planner --gate afer", "Did you mean 'after'?"),
    ("step", "needs NAME"),
    ("step planner --timeout", "--timeout needs a value, for instance --timeout 300"),
    ("step planner --timeout soon", "--timeout 'soon' is not a number. For instance: --timeout 300"),
    ("step planner --timeout -5", "--timeout -5 is too little: it takes more than 0 seconds. For instance: --timeout"),
    ("step planner --timeout nan", "it takes more than 0 seconds"),
    ("step planner --retries -1", "--retries -1 is too little: it takes 0 or more."),
    ("run --max-cost 0", "--max-cost 0 is too little: it takes more than 0. For instance: --max-cost 0.50"),
    ("run --max-turns 1.5", "not a whole number"),
    ("module m --loop-steps 0", "--loop-steps 0 is too little: it takes 1 or more."),
    ("step planner --retries 1.5", "not a whole number"),
    ("step planner --interactive --auto", "--interactive and --auto say opposite things. Leave one out."),
    ("step it's", "a quotation mark is not closed"),
    ("workflow w --autonomous nevr", "Did you mean 'never'?"),
    ("workflow careful builder", "A text with spaces goes between quotes"),
    ("workflow w --input goal", "is not NAME=VALUE"),
    ("run planner", "takes no arguments"),
    ("mode gate", "Did you mean 'gates'?"),
    ("reject --stp planner no", "Did you mean '--step'?"),
    ("reject --step", "--step needs a value"),
    ("agent planner", "%%cm agent"),
]


@pytest.mark.parametrize(("line", "words"), MISTAKES, ids=[row[0] for row in MISTAKES])
def test_a_mistake_is_one_line_with_what_would_be_right(
    line: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(cm.WorkflowError) as said:
        options.read(line)
    assert words in str(said.value)
    assert "\n" not in str(said.value)
    printed = capsys.readouterr()
    assert printed.out + printed.err == ""


SAID = re.compile(r"`(%%?cm(?: [^`]*)?)`")


def test_every_magic_that_is_named_anywhere_is_there() -> None:
    """Messages, help, views: what they tell people to run can be run."""
    found = 0
    for file in Path(cm.__file__).parent.rglob("*"):
        if file.suffix not in (".py", ".js"):
            continue
        for said in SAID.findall(file.read_text(encoding="utf-8")):
            name = said.replace("%%", "%").removeprefix("%cm").strip().partition(" ")[0]
            if re.fullmatch("[a-z]+", name):
                assert name in COMMANDS, f"{file.name} names `{said}`"
                flags = re.findall(r"--[a-z-]+", said)
                known = {flag for option in COMMANDS[name].options for flag in option.flags}
                assert set(flags) <= known | {"--help"}, f"{file.name} names `{said}`"
                found += 1
    assert found > 20


def test_a_body_where_none_belongs() -> None:
    with pytest.raises(cm.WorkflowError, match="takes no body"):
        options.read("run", cell=True)


def test_help_is_text_and_nothing_else_happens() -> None:
    for name in COMMANDS:
        said = options.read(f"{name} --help").help
        assert said is not None
        assert COMMANDS[name].meaning in said
        assert len(said.splitlines()) <= 30, "it is a screen"
    assert all(name in (options.read("--help").help or "") for name in COMMANDS)


def test_the_command_line_has_the_same_options() -> None:
    parser = argparse.ArgumentParser()
    options.add_options(parser, [options.INPUTS])
    assert parser.parse_args(["--input", "goal=a CLI", "--input", "n=3"]).inputs == {"goal": "a CLI", "n": 3}
    assert vars(parser.parse_args([])) == {}
