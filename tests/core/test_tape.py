"""Tapes: what may stand in them, and how they are read."""

import json
import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cm_notebook.errors import WorkflowError
from cm_notebook.events import ACTIONS, Decision, Gate, Usage
from cm_notebook.prompts import digest
from cm_notebook.tape import Prompt, Tape, TapedTurn
from cm_notebook.workflow import Verdict

HEADER = '{"tape": 1, "run": "careful-builder-1", "workflow": "careful-builder"}'


def parse(*lines, header=HEADER):
    return Tape.parse("\n".join([header, *lines]).encode(), "t.jsonl")


def gate(attempt=1, kind="review", ordinal=1, run="r", path="planner"):
    id = f"{run}/{path}/{attempt}/{ordinal}"
    return Gate(id=id, kind=kind, step=path, path=path, attempt=attempt, digest="", actions=ACTIONS[kind])


def decided(action="approve", attempt=1, kind="review", **more):
    place = {"path": "planner", "attempt": attempt, "kind": kind}
    if "ordinal" in more:
        place["ordinal"] = more.pop("ordinal")
    return json.dumps({"gate": place, "decision": {"action": action, **more}})


# -- reading -----------------------------------------------------------------------------------------------------------


def test_what_is_needed():
    tape = parse('{"path": "planner", "attempt": 1, "text": "1. Write it."}')
    turn = tape.turn("planner", 1)
    assert (turn.text, turn.turn, turn.prompt, turn.usage) == ("1. Write it.", 1, None, None)
    assert tape.turn("planner", 2) is None
    assert (tape.run_name, tape.header.workflow) == ("careful-builder-1", "careful-builder")


def test_all_that_there_is():
    whole = {
        "path": "team/coder#2",
        "attempt": 3,
        "turn": 2,
        "prompt": {"sha256": digest("Do it"), "start": "Do"},
        "session_id": "s1",
        "events": [[120, 3], [400, 2]],
        "text": "Done.",
        "tool_calls": [{"name": "ask_human", "arguments": {"question": "Which port?"}, "said": "I wonder."}],
        "error": {"kind": "EngineTimeout", "message": "too late"},
        "output": {"n": [1, None]},
        "verdict": {"action": "loop", "reason": "no", "score": 0.5},
        "usage": {"input_tokens": 3, "output_tokens": 4, "estimated": True},
        "cost_usd": 0.1,
        "duration_s": 2.5,
    }
    turn = parse(json.dumps(whole)).turn("team/coder#2", 3, 2)
    assert turn.verdict == Verdict(action="loop", reason="no", score=0.5)
    assert turn.usage == Usage(input_tokens=3, output_tokens=4, estimated=True)
    assert turn.pieces() == [(0.12, "Don"), (0.4, "e.")]
    assert json.loads(turn.model_dump_json(exclude_defaults=True)) == whole  # what a recorder will write


def test_the_file_gives_the_name_when_the_tape_does_not(tmp_path):
    path = tmp_path / "smart-builder.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"tape": 1}\r\n\r\n{"path": "a", "attempt": 1, "text": "x\xe2\x80\xa8y"}\r\n')
    tape = Tape.read(path)
    assert tape.run_name == "smart-builder"
    assert tape.turn("a", 1).text == "x\u2028y"  # which str.splitlines takes for the end of a line


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "this is not JSON: "),
        ("[1]", r"a JSON object is expected, not \[1\]"),
        ('{"path": "a", "attempt": 1}', "'text' is missing"),
        ('{"attempt": 1, "text": "x"}', "a turn has 'path', 'attempt' and 'text'"),
        ('{"path": "a", "attemt": 1, "attempt": 1, "text": ""}', "there is no 'attemt'. Did you mean 'attempt'"),
        ('{"path": "a", "attempt": 0, "text": ""}', "attempt = 0: Input should be greater than or equal to 1"),
        ('{"path": "a", "attempt": 1, "text": 5}', "text = 5: Input should be a valid string"),
        ('{"path": "a", "attempt": 1, "text": "", "cost_usd": NaN}', "NaN is not a number"),
        ('{"path": "a", "attempt": 1, "text": "", "cost_usd": 1e999}', "cost_usd = inf"),
        ('{"path": "a", "attempt": 1, "text": "", "usage": {"tokens": 1}}', "there is no 'usage.tokens'.*input_tokens"),
        ('{"path": "a", "attempt": 1, "text": "", "events": [[1]]}', "'events.0.1' is missing"),
        ('{"path": "a", "attempt": 1, "text": "", "prompt": {"sha": "1"}}', "there is no 'prompt.sha'.*sha256"),
        ('{"path": "a", "attempt": 1, "text": "", "verdict": {"action": "go"}}', "verdict: action='go' is not valid"),
        ('{"path": "a", "attempt": 1, "text": "\\ud800"}', "not UTF-8"),
        ('{"path": "a", "attempt": %s, "text": ""}' % ("9" * 5000), "not JSON that can be read"),
        (
            '{"path": "a", "attempt": 1, "text": "", "error": {"kind": "Timeout", "message": "x"}}',
            "Did you mean 'EngineTim",
        ),
        (
            '{"path": "a", "attempt": 1, "text": "", "tool_calls": [{"name": "ask_human", "arguments": {}, "sad": 1}]}',
            "Did you mean 'said'",
        ),
        ("[" * 100_000, "not JSON"),
        ('{"gate": {"path": "a", "attempt": 1, "kind": "review"}}', "'decision' is missing"),
        (decided(kind="revew"), "gate.kind = 'revew'"),
        (decided("retry"), "cannot be answered with 'retry'. Possible: approve, reject, skip, stop"),
        (decided("reject"), "say why 'planner' is rejected"),
        (decided(outptu="x"), "decision: there is no option 'outptu'. Did you mean 'output'"),
    ],
)
def test_what_is_wrong_is_named_with_file_and_line(line, message):
    with pytest.raises(WorkflowError, match=r"^t\.jsonl, line 3: .*" + message) as caught:
        parse("", line)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", r"t\.jsonl is empty\. A tape begins with"),
        (b"\n \n", "is empty"),
        (b'{"path": "a", "attempt": 1, "text": ""}', "line 1: this is not a tape, which begins with"),
        (b'{"tape": 3}', r"line 1: this tape has the version 3; this cm_notebook reads 1 and 2\..*pip install -U"),
        (b'{"tape": true}', "the version True"),
        (b'{"tape": 1, "name": "x"}', "there is no 'name'.*run, workflow"),
        (b"\xff\xfe", "line 1: this is not UTF-8 text"),
    ],
)
def test_what_is_no_tape(data, message):
    with pytest.raises(WorkflowError, match=message):
        Tape.parse(data, "t.jsonl")


def test_a_turn_stands_there_once():
    line = '{"path": "a", "attempt": 1, "text": "x"}'
    with pytest.raises(WorkflowError, match="line 3: 'a', attempt 1, turn 1 is on the tape already"):
        parse(line, line)


@pytest.mark.parametrize("name", ["nowhere.jsonl", ".", "a\0b"])
def test_a_file_that_cannot_be_read(tmp_path, name):
    with pytest.raises(WorkflowError, match="cannot be read: "):
        Tape.read(f"{tmp_path}/{name}")


# -- fuzz --------------------------------------------------------------------------------------------------------------

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
KEYS = [*TapedTurn.model_fields, "gate", "decision", "tape", "run"]
almost_lines = st.dictionaries(st.sampled_from(KEYS), json_values, max_size=8).map(json.dumps)
good = {"path": "a", "attempt": 1, "text": "x"}
damaged_lines = st.dictionaries(st.sampled_from(KEYS), json_values, max_size=2).map(
    lambda more: json.dumps({**good, **more})
)


def reads_or_refuses(data):
    try:
        tape = Tape.parse(data)
    except WorkflowError as error:
        str(error).encode()
        return
    for turn in tape.turns.values():
        assert "".join(piece for _, piece in turn.pieces()) == turn.text
        assert turn.prompt is None or turn.prompt.difference("another") != ""
        turn.model_dump_json()


@given(st.binary())
@example(b"\xef\xbb\xbf")
@example(b'{"tape": 1}\n' + b'{"a":' * 50_000)
def test_any_bytes_are_read_or_refused(data):
    reads_or_refuses(data)


@given(st.lists(almost_lines | damaged_lines | json_values.map(json.dumps) | st.text(), max_size=3))
def test_any_lines_are_read_or_refused(lines):
    reads_or_refuses("\n".join([HEADER, *lines]).encode("utf-8", "surrogatepass"))


# -- prompts -----------------------------------------------------------------------------------------------------------


def difference(kept, now):
    return Prompt.model_validate(kept).difference(now)


@pytest.mark.parametrize("kept", ["Plan it.", digest("Plan it."), {"sha256": digest("Plan it."), "start": "Plan"}, {}])
def test_the_same_prompt(kept):
    assert difference(kept, "Plan it.") is None


def test_where_a_prompt_differs():
    before, after = "Plan a todo CLI in at most five steps.", "Plan a todo CLI in at most six steps, please."
    assert (
        difference(before, after)
        == "recorded '…todo CLI in at most five steps.', now '…todo CLI in at most six steps, please.'"
    )
    assert difference("a", "") == "recorded 'a', now ''"
    mark = {"sha256": digest(before), "start": "Plan a todo CLI"}
    assert difference(mark, "Plan a shop") == "recorded 'Plan a todo CLI', now 'Plan a shop'"
    assert difference(mark, after) == (
        "somewhere after 'Plan a todo CLI' (the tape keeps no more of it), now ' in at most six steps, please.'"
    )
    assert difference(digest(before), after) == f"the tape holds a digest only; the prompt begins now {after!r}"


# -- a turn that is not there ------------------------------------------------------------------------------------------


def test_the_nearest_turn():
    tape = parse(
        '{"path": "a", "attempt": 2, "text": "2"}',
        '{"path": "a", "attempt": 2, "turn": 2, "text": "2.2"}',
        '{"path": "a", "attempt": 4, "text": "4"}',
        '{"path": "a", "attempt": 5, "text": "", "error": {"kind": "EngineExited", "message": "no answer to repeat"}}',
    )
    assert [tape.nearest("a", attempt).text for attempt in (1, 2, 3, 4, 9)] == ["2", "2", "2", "4", "4"]
    assert tape.nearest("a", 9, 2).text == "2.2"
    assert tape.nearest("a", 9, 3).text == "4"
    assert tape.nearest("b", 1) is None
    assert tape.attempts("a") == [2, 4, 5]


# -- decisions ---------------------------------------------------------------------------------------------------------


def test_a_decision_is_found_by_path_attempt_and_kind():
    tape = parse(decided("reject", feedback="Test it.", by="you"), decided("approve", 2, output="1. Test it."))
    answer = tape.decision(gate())
    assert answer == Decision(action="reject", feedback="Test it.", by="tape")
    assert tape.decision(gate()) == answer
    assert tape.decision(gate()) is not answer  # whoever records it writes its time into it
    assert tape.decision(gate(2, ordinal=2)).output == "1. Test it."
    assert tape.decision(gate(3)) is None
    assert tape.decision(gate(kind="verdict")) is None
    assert tape.decision(gate(path="coder")) is None


def test_several_gates_of_one_kind_in_the_order_of_the_file():
    tape = parse(decided("answer", kind="question", feedback="A"), decided("answer", kind="question", feedback="B"))

    def say(ordinal, run="r"):
        answer = tape.decision(gate(kind="question", ordinal=ordinal, run=run))
        return answer and answer.feedback

    assert [say(3), say(4), say(3), say(5)] == ["A", "B", "A", None]
    assert say(3, run="another") == "A"


def test_an_ordinal_says_which():
    tape = parse(decided("skip", ordinal=2), decided("stop"))
    assert tape.decision(gate(ordinal=2)).action == "skip"
    assert tape.decision(gate(ordinal=1)).action == "stop"
    assert tape.decision(gate(ordinal=3)) is None


def test_a_tape_that_is_not_there_is_said_with_those_that_are_in_order(tmp_path):
    for name in ("04", "01", "00", "03", "02"):
        (tmp_path / f"{name}.jsonl").touch()
    with pytest.raises(WorkflowError) as said:
        Tape.read(tmp_path / "nope.jsonl")
    assert re.findall(r"(\d\d)\.jsonl[,.]", str(said.value)) == ["00", "01", "02", "03", "04"]
