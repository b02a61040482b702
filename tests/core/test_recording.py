"""Recording: a run's events as a tape, and the file in which it is written while the run goes on."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import cm_notebook as cm
from cm_notebook import recording
from cm_notebook.events import GateDecided, RunResumed
from cm_notebook.recording import lines_of
from cm_notebook.tape import Tape
from tests.helpers import facts

from .driver import Driver, Reply

SAID = '{"action": "continue"}'


@pytest.fixture(autouse=True)
def _nobody_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CM_HEADLESS", "1")
    monkeypatch.chdir(tmp_path)


def read(lines: list[str] | Path) -> list[Any]:
    """What is on a tape after its first line, in short."""
    found = [json.loads(line) for line in (lines if isinstance(lines, list) else lines.read_text("utf-8").splitlines())]
    return [
        (line["gate"]["path"], line["gate"]["attempt"], line["decision"]["action"])
        if "gate" in line
        else (line["path"], line["attempt"], line["text"])
        for line in found[1:]
    ]


def played(workflow: cm.Workflow, tape: str, **options: Any) -> cm.Run:
    return workflow.start(journal=":memory:", tape=tape, **options).wait(30)


def chain(*steps: Any, **more: Any) -> cm.Workflow:
    ids = [step if isinstance(step, str) else step.agent for step in steps]
    agents = [cm.Agent(id, f"Do {id}.") for id in ids]
    return cm.Workflow("chain", steps=list(steps), agents=agents, **more)


# -- any run, played, is the same run ----------------------------------------------------------------------------------


def team() -> cm.Workflow:
    return cm.Workflow(
        name="any",
        agents=[
            cm.Agent("planner", "Plan {{ goal }}."),
            cm.Agent("lead", "Lead."),
            cm.Agent("judge", "Judge {{ writer }}."),
            *(cm.Agent(id, f"You are {id}, for {{{{ goal }}}}.") for id in ("writer", "ui", "api")),
        ],
        steps=[
            cm.step("planner", interactive=True, retries=1),
            cm.step("writer", prompt=["Write: {{ planner }}", "Shorter."]),
            cm.module("judge", loop_steps=1, loop_max_iterations=1),
            cm.step("lead", interactive=True, retries=1),
            cm.parallel("ui", "api", id="both"),
        ],
        sub_agents=["ui", "api"],
        inputs={"goal": "a todo CLI " * 30},
    )


CALLS = (
    {"name": "run_agents", "arguments": {"script": "ui 'the UI' & api 'the API'"}},
    {"name": "run_agents", "arguments": {"groups": [[{"agent": "ui", "prompt": "Do it."}]], "max_concurrency": 1}},
    {"name": "ask_human", "arguments": {"question": "Which port?"}},
    {"name": "run_agents", "arguments": {"script": "nobody 'x'"}},
)
texts = st.sampled_from(["yes", "no\nor so", SAID, '{"action": "loop", "reason": "again"}', "ü 🙂 \u2028 x" * 40])
failures = st.sampled_from([cm.EngineRateLimited, cm.EngineTimeout, cm.EngineAuthError])
replies = st.one_of(
    st.builds(
        lambda text, tokens, cost, session: cm.Reply(
            text, usage=cm.Usage(input_tokens=tokens) if tokens else None, cost_usd=cost, session_id=session
        ),
        texts,
        st.integers(0, 9),
        st.sampled_from([None, 0.25]),
        st.sampled_from([None, "s1"]),
    ),
    st.builds(lambda kind: cm.Reply("so far", error=kind("no", retry_after_s=0)), failures),
    st.builds(lambda call: cm.Reply("hm", tool_calls=[call]), st.sampled_from(CALLS)),
)
scripts = st.fixed_dictionaries(
    {id: st.lists(replies, max_size=4) for id in ("planner", "lead", "judge", "writer", "ui", "api")}
)
choices = st.lists(st.integers(0, 9), max_size=8)


def policy(chosen: list[int]) -> Any:
    """A person who does this and that, and then what ends it."""
    left = iter(chosen)

    def decide(gate: cm.Gate) -> cm.Decision:
        if gate.kind == "question":
            return cm.Decision(action="answer", feedback=f"8080 {next(left, 0)}")
        if (number := next(left, None)) is None:
            return cm.Decision(action="approve" if "approve" in gate.actions else "skip")
        possible = [action for action in gate.actions if action != "stop" or number == 9]
        action = possible[number % len(possible)]
        output = "edited" if action == "approve" and number > 6 and gate.kind in ("review", "exhausted") else None
        return cm.Decision(action=action, output=output, feedback="Better." if action == "reject" else None)

    return decide


@given(scripts, choices)
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_run_is_played_with_the_same_events_and_recorded_again_as_the_same_tape(script, chosen):
    calm = [cm.Reply(f"{SAID} {number}") for number in range(40)]
    engine = cm.ScriptedEngine({id: [*said, *calm] for id, said in script.items()})
    for name in ("1.jsonl", "2.jsonl"):
        Path(name).unlink(missing_ok=True)
    run = team().start(engine=engine, journal=":memory:", record="1.jsonl", on_gate=policy(chosen))
    ended(run)
    again = team().start(journal=":memory:", tape="1.jsonl", record="2.jsonl")
    ended(again)
    assert facts(again.events) == facts(run.events)
    assert Path("2.jsonl").read_text("utf-8") == Path("1.jsonl").read_text("utf-8")


def ended(run: cm.Run) -> None:
    with contextlib.suppress(cm.RunFailed):
        run.wait(30)
    assert run.state.ended is not None


# -- a run that was interrupted, as it would have gone without ---------------------------------------------------------


def answered(driver: Driver, action: Any, feedback: str | None = None) -> Driver:
    """The open gate is decided, and nothing goes on yet."""
    driver.record(GateDecided(gate_id=driver.gate().id, decision=cm.Decision(action=action, feedback=feedback)))
    return driver


def test_a_turn_that_was_cut_short_is_not_on_the_tape_and_does_not_count():
    driver = Driver(chain(cm.step("a", interactive=True), "b")).until_running("a").cut().go()
    answered(driver, "reject", "Better.").until_running("a").cut().go()
    driver.decide("approve")
    assert driver.state.steps["a"].attempt == 4
    assert read(lines_of(driver.events)) == [
        ("a", 1, "a 1"),
        ("a", 1, "reject"),
        ("a", 2, "a 2"),
        ("a", 2, "approve"),
        ("b", 1, "b 1"),
    ]


def test_an_answer_given_before_the_cut_is_on_the_tape_and_a_permission_is_not():
    driver = Driver(chain("a"), {"a": [Reply("done", tools=("save",), ask=("Which port?",))]}).go()
    driver.decide("approve")
    answered(driver, "answer", "8080").cut().go()
    assert driver.gate().kind == "permission"
    driver.decide("reject", "not that")
    assert read(lines_of(driver.events)) == [("a", 1, "done"), ("a", 1, "answer"), ("a", 1, "reject")]


def lead(calls: list[str]) -> Driver:
    """A run whose leader calls these, each time it is asked."""
    workflow = cm.Workflow(
        name="team",
        agents=[cm.Agent(id, f"Do {id}.") for id in ("lead", "ui", "api")],
        steps=["lead"],
        sub_agents=["ui", "api"],
    )
    said = iter(calls)
    replies: dict[int, Reply] = {}

    def script(driver: Driver, step: Any) -> str | Reply:
        if step.id != "lead":
            return f"{step.id} {driver.said_by(step.id) + 1}"
        if step.attempt not in replies:
            replies[step.attempt] = Reply("built", calls=(next(said),))
        return replies[step.attempt]

    return Driver(workflow, script)


def until_at_work(driver: Driver, path: str) -> Driver:
    for _ in range(100):
        if path in driver.state.running:
            return driver
        driver.advance()
    raise AssertionError(f"{path} never runs")


def test_who_was_called_before_the_cut_and_is_called_again_is_on_the_tape_with_what_it_did():
    driver = until_at_work(lead(["ui 'x' && api 'y'"] * 2), "lead/api#1").cut().go()
    assert driver.state.ended == "completed"
    assert read(lines_of(driver.events)) == [("lead", 1, "built"), ("lead/ui#1", 1, "ui 1"), ("lead/api#1", 1, "api 1")]


def test_who_was_called_before_the_cut_and_never_again_is_not():
    """A model that begins anew calls others, or in other words: they are counted as if it had been the first time."""
    driver = until_at_work(lead(["ui 'x' && api 'y'", "ui 'another' && api 'z'"]), "lead/api#1").cut().go()
    assert driver.state.ended == "completed"
    assert set(driver.state.members) == {"lead/ui#1", "lead/api#1", "lead/ui#2", "lead/api#2"}
    assert read(lines_of(driver.events)) == [("lead", 1, "built"), ("lead/ui#1", 1, "ui 2"), ("lead/api#1", 1, "api 1")]


def test_a_run_that_was_stopped_at_a_gate_and_goes_on_has_not_been_stopped():
    driver = Driver(chain(cm.step("a", interactive=True), "b")).go().decide("stop")
    assert driver.state.ended == "stopped"
    assert read(lines_of(driver.events)) == [("a", 1, "a 1"), ("a", 1, "stop")]
    driver.record(RunResumed())
    driver.go().decide("approve")
    assert read(lines_of(driver.events)) == [("a", 1, "a 1"), ("a", 1, "approve"), ("b", 1, "b 1")]


def test_an_error_of_another_package_is_one_that_a_tape_knows():
    driver = Driver(chain("a"), {"a": [Reply(error="no", retry_in_s=2.5), "yes"]}).go()
    for event in driver.events:
        if event.type == "TurnFailed":
            event.error.kind = "AcmeError"
    tape = Tape.parse("\n".join(lines_of(driver.events)).encode())
    assert tape.tries["a", 1, 1][0].error.kind == "EngineError"
    assert tape.tries["a", 1, 1][0].retry_in_s == 2.5
    assert tape.turn("a", 1, failures=1).text == "yes"


def test_nothing_that_could_be_played_is_no_tape():
    assert lines_of([]) == []
    assert lines_of(Driver(chain("a")).until_running("a").events) == []
    assert lines_of(chain("a").start(journal=":memory:").wait(20).events) == [], "no model was called"


def test_functions_run_again_and_are_not_on_the_tape():
    @cm.agent("count")
    def count(turn: cm.Turn) -> str:
        return str(len(turn.prompt))

    workflow = cm.Workflow("w", steps=["a", "count"], agents=[cm.Agent("a", "Do a."), count])
    run = workflow.start(engine=cm.ScriptedEngine({"a": ["yes"]}), journal=":memory:", record="t.jsonl").wait(20)
    assert read(Path("t.jsonl")) == [("a", 1, "yes")]
    assert facts(played(workflow, "t.jsonl").events) == facts(run.events)


# -- the file ----------------------------------------------------------------------------------------------------------


def scripted(**replies: Any) -> cm.ScriptedEngine:
    return cm.ScriptedEngine(replies)


def test_a_tape_is_replaced_as_soon_as_there_is_another_and_not_before():
    tape = Path("t.jsonl")
    chain("a").start(engine=scripted(a=["old"]), journal=":memory:", record=tape).wait(20)
    assert read(tape) == [("a", 1, "old")]
    before = tape.read_bytes()
    wrong_key = cm.Reply(error=cm.EngineAuthError("no such key"))
    failed = chain("a").start(engine=scripted(a=[wrong_key]), journal=":memory:", record=tape)
    with pytest.raises(cm.RunFailed):
        failed.wait(20)
    chain(cm.step("a", gate="before", interactive=True)).start(
        engine=scripted(a=["new"]), journal=":memory:", record=tape, on_gate=lambda gate: None
    )
    assert tape.read_bytes() == before
    chain("a").start(engine=scripted(a=["new"]), journal=":memory:", record=tape).wait(20)
    assert read(tape) == [("a", 1, "new")]
    assert tape.stat().st_mode & 0o777 == 0o600
    assert [path.name for path in Path().iterdir() if path.suffix == ".jsonl" or ".jsonl." in path.name] == ["t.jsonl"]


PROGRAM = """\
import os, sys
import cm_notebook as cm

@cm.agent("die")
def die(turn):
    if sys.argv[1] == "die":
        os._exit(9)
    return "alive"

workflow = cm.Workflow("w", steps="a -> b -> die -> c", agents=[*(cm.Agent(id, f"Do {id}.") for id in "abc"), die])
engine = cm.ScriptedEngine({id: [f"{id} says"] for id in "abc"})
if sys.argv[1] == "die":
    workflow.start(engine=engine, record="tapes/t.jsonl").wait(30)
else:
    cm.resume(cm.runs()[0].id, workflow, engine=engine, record="tapes/t.jsonl").wait(30)
"""


def test_a_run_whose_process_dies_leaves_a_tape_and_goes_on_with_it():
    Path("program.py").write_text(PROGRAM, encoding="utf-8")
    tape = Path("tapes/t.jsonl")
    assert subprocess.run([sys.executable, "program.py", "die"], timeout=60, check=False).returncode == 9
    assert read(tape) == [("a", 1, "a says"), ("b", 1, "b says")]
    first = tape.read_text("utf-8")
    Tape.read(tape)
    subprocess.run([sys.executable, "program.py", "go on"], timeout=60, check=True)
    assert read(tape) == [("a", 1, "a says"), ("b", 1, "b says"), ("c", 1, "c says")]
    assert tape.read_text("utf-8").startswith(first), "how fast the texts came is kept"
    assert '"events"' in first


def test_a_run_that_goes_on_after_its_end_goes_on_recording():
    workflow = chain("a")
    run = workflow.start(engine=scripted(a=["one"], b=["two"]), journal=":memory:", record="t.jsonl").wait(20)
    run.add("b", agents=[cm.Agent("b", "Do b.")])
    run.wait(20)
    assert read(Path("t.jsonl")) == [("a", 1, "one"), ("b", 1, "two")]


def test_decisions_about_functions_go_on_being_recorded_after_the_end():
    @cm.agent("count")
    def count(turn: cm.Turn) -> str:
        return str(turn.attempt)

    workflow = cm.Workflow("w", steps="count?", agents=[count])
    run = workflow.start(journal=":memory:", record="t.jsonl", on_gate="approve").wait(20)
    assert read(Path("t.jsonl")) == [("count", 1, "approve")]
    run.rerun("count").wait(20)
    assert read(Path("t.jsonl")) == [("count", 1, "approve"), ("count", 2, "approve")]


def test_a_fork_is_recorded_with_its_history_beside_the_tape_of_its_run():
    script = scripted(a=["a 1"], b=["b 1", "b 2", "b 3"])
    run = chain("a", "b").start(engine=script, journal="j.db", record="t.jsonl").wait(20)
    run.rewind("b").unpause().wait(20)
    whole = [("a", 1, "a 1"), ("b", 1, "b 1"), ("b", 2, "b 2")]
    assert read(Path("t.jsonl")) == whole, "cells that go back find what was done then"
    fork = run.fork("b", record="fork.jsonl").unpause().wait(20)
    assert read(Path("fork.jsonl")) == [*whole, ("b", 3, "b 3")]
    assert read(Path("t.jsonl")) == whole
    fork.export("short.jsonl")
    assert [step.text for step in played(fork.workflow, "short.jsonl")] == ["a 1", "b 3"]


def test_any_run_of_the_past_is_made_a_tape_by_what_it_did():
    run = chain("a").start(engine=scripted(a=["one"]), journal="j.db").wait(20)
    Path("t.jsonl").write_text("\n".join(lines_of(cm.Run.open(run.id, "j.db").events)), encoding="utf-8")
    assert played(chain("a"), "t.jsonl")["a"].text == "one"


def test_a_tape_that_cannot_be_written_any_more_does_not_end_the_run(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(file: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(recording, "replace", full)
    run = chain("a", "b").start(engine=scripted(a=["x"], b=["y"]), journal=":memory:", record="t.jsonl").wait(20)
    assert run.status == "completed"
    assert [record.message for record in caplog.records] == [
        f"cm: the tape {Path('t.jsonl').absolute()} cannot be written: No space left on device. The run goes on "
        "without it; its journal has all that happened."
    ]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"record": 5}, "record=5 is not a file. Name one, for instance record='tapes/01.jsonl'."),
        ({"record": "."}, r"record='\.' is a folder. Name a file in it"),
        ({"record": "plan.py"}, "record='plan.py' is there already, and no tape; it would be lost. Name another"),
        ({"record": "plan.py/t.jsonl"}, "record='plan.py/t.jsonl' cannot be written: Not a directory. Name a file in"),
        ({"record": "/proc/none/t.jsonl"}, "cannot be written: "),
        ({"record": "a\0b"}, "cannot be written: a name holds no null"),
        ({"record": "t.jsonl", "tape": "./t.jsonl"}, r"is the tape that is played.*Leave out tape= \(--tape\)"),
        ({"record": "new.jsonl"}, "there is nothing to record, as the engine is 'offline'"),
        ({"rekord": "t.jsonl"}, "Did you mean 'record'"),
    ],
)
def test_what_cannot_be_recorded_is_refused_before_anything_runs(given: dict[str, Any], message: str) -> None:
    Path("plan.py").write_text("print()\n")
    Path("t.jsonl").write_text('{"tape": 1}\n{"path": "a", "attempt": 1, "text": "x"}\n')
    before = sorted(Path().glob("[!.]*"))
    with pytest.raises(cm.WorkflowError, match=message) as said:
        chain("a").start(**given)
    assert "\n" not in str(said.value)
    assert sorted(Path().glob("[!.]*")) == before
    assert cm.runs() == []
    assert Path("plan.py").read_text() == "print()\n"


# -- what has changed --------------------------------------------------------------------------------------------------


def mismatch(before: cm.Workflow, after: cm.Workflow, engine: cm.ScriptedEngine, **inputs: Any) -> str:
    before.start(engine=engine, journal=":memory:", record="t.jsonl", on_gate="approve").wait(20)
    with pytest.raises(cm.ReplayMismatch) as said:
        played(after, "t.jsonl", inputs=inputs)
    found = str(said.value)
    again = " `start(record='t.jsonl')` in place of `tape=` records again; this calls a model."
    assert found.endswith(again)
    return found.partition("; it changed here: ")[2].removesuffix(again)


def two(first: str = "Plan {{ goal }}.", then: str = "Write what {{ a }} says, in {{ words }} words.") -> cm.Workflow:
    agents = [cm.Agent("a", first), cm.Agent("b", then)]
    return cm.Workflow("w", steps=["a", "b"], agents=agents, inputs={"goal": "a todo CLI", "words": 10})


LONG = "A long plan, in which much is said. " * 20


@pytest.mark.parametrize(
    ("after", "inputs", "said"),
    [
        (two(), {"goal": "a shop"}, "recorded 'a todo CLI', now 'a shop' (from input goal)."),
        (two(), {"words": 20}, "recorded '10', now '20' (from input words)."),
        (
            two(then="Write what {{ a }} says, in {{ words }} lines."),
            {},
            "recorded ' words.', now ' lines.' (in its own words).",
        ),
        (
            two(then="Write, what {{ a }} says, in {{ words }} words."),
            {"words": 20},
            "recorded 'Write what ', now 'Write, what ' (in its own words); "
            "recorded '10', now '20' (from input words).",
        ),
        (two(then="Write what {{ a }} says, in {{ words }} words. Now."), {}, "new at its end ' Now.'."),
    ],
)
def test_which_part_of_a_prompt_has_changed_and_where_it_came_from(
    after: cm.Workflow, inputs: dict[str, Any], said: str
) -> None:
    assert mismatch(two(), after, scripted(a=[LONG], b=["ok"]), **inputs).endswith(said)


def test_what_a_function_says_now_is_compared_with_what_it_said_then():
    said = [LONG + "five" + LONG, LONG + "six" + LONG]

    @cm.agent("count")
    def count(turn: cm.Turn) -> str:
        return said.pop(0)

    workflow = cm.Workflow("w", steps=["count", "b"], agents=[count, cm.Agent("b", "See {{ count }}!")])
    found = mismatch(workflow, workflow, scripted(b=["ok"]))
    assert found == f"somewhere after {'…' + LONG[20:80]!r}, now {LONG[80:140] + '…'!r} (from count)."


def test_an_answer_is_compared_with_the_one_on_the_tape():
    """The tape was edited by hand: what follows from it is another prompt."""
    two().start(engine=scripted(a=[LONG + "five."], b=["ok"]), journal=":memory:", record="t.jsonl").wait(20)
    tape = Path("t.jsonl")
    tape.write_text(tape.read_text("utf-8").replace("five.", "six."), encoding="utf-8")
    with pytest.raises(cm.ReplayMismatch, match=r"now '.*' \(from a\)"):
        played(two(), "t.jsonl")
