"""The words that every view shares: numbers, sentences, headless lines, text/plain."""

from __future__ import annotations

import re
import time
from typing import Any

import pytest

from cm_notebook.engines import offline
from cm_notebook.errors import in_terminal
from cm_notebook.events import Decision, RunPaused, Usage
from cm_notebook.render import html, svg, text
from cm_notebook.workflow import Verdict, module, separator, step
from tests.render import builder
from tests.render.builder import HOSTILE, Story


@pytest.fixture(autouse=True)
def _clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "clock", lambda at: f"@{at - builder.NOON:.0f}s")


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (None, ""),
        (0.0, "<0.1 s"),
        (0.06, "0.1 s"),
        (4.6, "4.6 s"),
        (19.94, "19.9 s"),
        (19.96, "20 s"),
        (119.4, "119 s"),
        (125, "2 min 05 s"),
        (3599.4, "59 min 59 s"),
        (3599.6, "1 h 00 min"),
        (3725, "1 h 02 min"),
    ],
)
def test_duration(seconds: float | None, words: str) -> None:
    assert text.duration(seconds) == words


@pytest.mark.parametrize(
    ("count", "words"),
    [
        (None, ""),
        (0, ""),
        (640, "640 tok"),
        (999, "999 tok"),
        (1000, "1.0k tok"),
        (1640, "1.6k tok"),
        (23_400, "23k tok"),
        (999_600, "1.0M tok"),
        (12_000_000, "12M tok"),
    ],
)
def test_tokens(count: int | None, words: str) -> None:
    assert text.tokens(count) == words
    if words:
        assert text.tokens(count, estimated=True) == "~" + words


@pytest.mark.parametrize(
    ("usd", "words"),
    [
        (None, ""),
        (0.0, ""),
        (0.00001, "<$0.0001"),
        (0.0004, "$0.0004"),
        (0.008, "$0.008"),
        (0.999, "$1.00"),
        (12.5, "$12.50"),
    ],
)
def test_cost(usd: float | None, words: str) -> None:
    assert text.cost(usd) == words
    if words.startswith("$"):
        assert text.cost(usd, estimated=True) == "~" + words


def test_a_waiting_run_reads_by_itself() -> None:
    story = builder.waiting()
    assert text.run_text(story.state, story.now).splitlines() == [
        "smart-builder: waiting for you · 38 s · 4.1k tok · $0.021",
        "  researcher   done      6.2 s 900 tok $0.004",
        "  planner      approved  14.8 s 1.6k tok $0.008  (attempt 1 rejected by you, @74s: “Name the tests now, and "
        "add `done`.”; attempt 2 approved by you, @141s)",
        "  implementer  done      12.4 s 1.2k tok $0.006",
        "  reviewer     waiting   4.6 s 400 tok $0.003",
        "  deployer     pending   starts when reviewer is approved",
        "reviewer is waiting for you. Next: deployer.",
        "  %cm approve · %%cm reject · %cm edit · %cm skip · %cm stop",
    ]


def test_headless_lines() -> None:
    assert builder.finished().lines == [
        "cm: smart-builder started: 5 steps, mode gates",
        "cm: researcher ok 6.2s 900 tok $0.004",
        "cm: planner ok 7.4s 700 tok $0.004",
        "cm: gate: planner is waiting for you. Next: implementer.",
        "cm: planner rejected by you, @74s: “Name the tests now, and add `done`.”",
        "cm: planner ok 7.4s 900 tok $0.004 (attempt 2)",
        "cm: gate: planner is waiting for you. Next: implementer.",
        "cm: planner approved by you, @141s",
        "cm: implementer ok 12.4s 1.2k tok $0.006",
        "cm: reviewer ok 4.6s 400 tok $0.003",
        "cm: gate: reviewer is waiting for you. Next: deployer.",
        "cm: reviewer approved by you, @218s",
        "cm: deployer ok 2.1s 200 tok $0.001",
        "cm: smart-builder completed 40s 4.3k tok $0.022",
    ]


def test_headless_lines_of_a_loop_and_of_failures() -> None:
    lines = builder.looping().lines
    assert "cm: quality-gate loop (0.52) 1.2s: 2 of 7 tests fail: `done` is missing." in lines
    assert "cm: quality-gate goes back to implementer (pass 2, max 5): 2 of 7 tests fail: `done` is missing." in lines
    story = Story("planner").fail("rate limited", retry_in_s=4).go().cut("kernel stopped")
    assert story.lines[1:] == [
        "cm: planner failed: rate limited; again in 4 s (2 of 3)",
        "cm: planner cut short: kernel stopped",
    ]
    assert builder.failed().lines[-1] == "cm: planner waits: %cm retry · %cm edit · %cm skip · %cm stop"


def test_in_a_terminal_nothing_can_be_added_after_the_last_step() -> None:
    last = Story("a?").answer("A")
    with in_terminal():
        assert text.sentence(last.state) == "a is waiting for you. No step follows: it ends the run."


GATES = {
    "review": (
        lambda: Story("a? -> b").answer("A"),
        "a is waiting for you. Next: b.",
    ),
    "last": (
        lambda: Story("a?").answer("A"),
        "a is waiting for you. No step follows so far: add one, or it ends the run.",
    ),
    "chained": (
        lambda: Story([step("a", prompt=["One", "Two"])], autonomous_mode=False).answer("A"),
        "a is waiting for you. Next: its prompt 2 of 2.",
    ),
    "note": (
        lambda: Story([step("a", interactive=False), "b"], autonomous_mode="never").answer("A"),
        "a is waiting for you. Next: b. This step asks for no pause, but in step-by-step mode every step pauses.",
    ),
    "start": (
        lambda: Story([step("a", interactive=True, gate="before")]),
        "a is about to start. This is its prompt: send it, edit it, or skip the step.",
    ),
    "verdict": (
        lambda: Story(["a", module("m")]).answer("A").says("pause", "Is this fast enough?"),
        "m needs your verdict. Is this fast enough? Continue goes on; Loop goes back with your words.",
    ),
    "verdict of a step": (
        lambda: Story("a").answer("A", verdict=Verdict(action="pause")),
        "a needs your verdict. a asks you to decide. Continue goes on; Reject runs it again with your words.",
    ),
    "exhausted": (
        builder.exhausted,
        "quality-gate: not good enough after 2 repeats: “Tests still fail.” "
        "Accept the last output, allow 2 more, or stop.",
    ),
    "failed": (
        builder.failed,
        "planner failed: No key for anthropic. Set ANTHROPIC_API_KEY before starting Jupyter. "
        "Retry, edit its prompt, skip it, or stop.",
    ),
    "failed for good": (
        lambda: Story("a").fail("overloaded", retry_in_s=1).go().fail("overloaded"),
        "a failed after 2 tries: overloaded. Retry, edit its prompt, skip it, or stop.",
    ),
    "stale": (
        builder.stale,
        "implementer is stale: planner changed after this ran. "
        "Keep it, run this step again, or run from here: it and all after it.",
    ),
    "question": (lambda: Story("a").ask("Which\ndatabase?"), "a asks: “Which database?”"),
    "permission": (
        lambda: Story("a").permit("remove", path="x y", force=True),
        'a wants to call remove with { "path": "x y", "force": true }. Allow it, change its arguments, or deny it: the '
        "agent is told why.",
    ),
    "may_have_run": (
        lambda: Story([step("a", idempotent=False)]).cut("kernel stopped").go(),
        "a was cut short (kernel stopped) and may have had its effect. Did it? If not, run it again.",
    ),
}


@pytest.mark.parametrize("case", GATES)
def test_every_gate_says_what_it_waits_for(case: str) -> None:
    make, words = GATES[case]
    state = make().state
    assert text.gate_sentence(state, next(iter(state.gates.values()))) == words
    assert text.sentence(state) == words


def test_every_answer_of_a_gate_has_a_label_and_a_magic() -> None:
    for make, _ in GATES.values():
        state = make().state
        gate = next(iter(state.gates.values()))
        ways = text.ways(state, gate)
        assert {way.action for way in ways} >= set(gate.actions)
        assert all(way.label and way.magic.lstrip("%").startswith("cm ") for way in ways)
        assert len({way.label for way in ways}) == len(ways)
        assert len({way.magic for way in ways}) == len(ways)


def test_tools_are_lines_of_the_log_and_of_the_step() -> None:
    story = builder.permission()
    assert [line for line in story.lines if "read_file" in line or "remove" in line] == [
        'cm: planner calls read_file {"path": "todo.py"}',
        "cm: planner: read_file returned: def add(db, text): ...",
        'cm: cleaner calls remove {"path": "notes.md"}',
        'cm: gate: cleaner wants to call remove with { "path": "notes.md", "force": true }. Allow it, change its '
        "arguments, or deny it: the agent is told why.",
        "cm: cleaner: remove denied: Refused by a person: not the notes",
        *story.lines[-2:],
    ]
    planner = story.state.steps["planner"]
    assert text.tool_lines(planner.attempts[0]) == [
        '→ read_file {"path": "todo.py"}',
        "← def add(db, text): ...",
        "→ run_agents {}",
        "← ## qa",
    ]
    assert '  → read_file {"path": "todo.py"}\n  ← def add' in text.show_text(story.state, planner)
    assert text.tool_words(story.state.steps["cleaner"].attempts[0]) == "called remove; 1 denied"  # the other waits


def test_a_cost_that_was_computed_is_marked() -> None:
    used = {"usage": Usage(input_tokens=300, output_tokens=100)}
    told = Story("a -> b").answer("x", **used)
    assert text.run_total(told.state).words()[1:] == ["400 tok", "$0.003"]
    computed = Story("a -> b").answer("x", cost_estimated=True, **used)
    assert text.run_total(computed.state).words()[1:] == ["400 tok", "~$0.003"]
    assert computed.lines[-1] == "cm: a ok 4.6s 400 tok ~$0.003"
    assert text.status_rows(computed.state)[0][4] == "~$0.003"


def test_how_a_tool_is_allowed() -> None:
    story = Story("a").permit("remove", path="x")
    ways = [(way.label, way.magic) for way in text.ways(story.state, next(iter(story.state.gates.values())))]
    assert ways == [
        ("Allow once", "%cm approve"),
        ("Allow for this run", "%cm approve --scope run"),
        ("Always allow", "%cm approve --scope always"),
        ("Edit…", "%cm edit"),
        ("Deny…", "%%cm reject"),
        ("Stop", "%cm stop"),
    ]
    for decision, words in [
        ({}, "approved by you, @60s"),
        ({"scope": "run"}, "allowed for this run by you, @60s"),
        ({"scope": "always"}, "always allowed by you, @60s"),
        ({"output": '{"path": "y"}'}, "edited and approved by you, @60s"),
    ]:
        story = Story("a").permit("remove", path="x").decide("approve", **decision)
        assert story.lines[-1] == f"cm: a {words}"


@pytest.mark.parametrize(
    ("story", "words"),
    [
        (Story("a? -> b").answer("A"), "starts when a is approved"),
        (
            Story("a? -> b").record(RunPaused(reason="lunch")).answer("A"),
            "starts when a is approved and the run goes on",
        ),
        (Story("a -> b").ask("Which?"), "starts when a is done"),
        (Story("a -> b").fail("No key"), "starts when a is decided"),
    ],
)
def test_what_a_step_waits_for(story: Story, words: str) -> None:
    assert text.waits_for(story.state, story.state.steps["b"]) == words


def test_what_state_the_run_is_in() -> None:
    assert text.sentence(builder.looping().state) == "implementer is running (pass 3). Next: quality-gate."
    assert text.sentence(builder.finished().state) == "Finished: 5 of 5 done."
    stopped = builder.waiting().decide("stop")
    assert text.sentence(stopped.state) == "Stopped by you at reviewer. 3 of 5 done. `%cm run` goes on."
    assert text.look(stopped.state, stopped.state.steps["reviewer"]).word == "not decided"
    paused = Story("a -> b").record(RunPaused(reason="lunch"))
    assert text.sentence(paused.answer("A").state) == "Paused (lunch). Next: b. `%cm run` goes on."
    mine = Story("a -> b").record(RunPaused(reason="paused by you"))
    assert text.sentence(mine.answer("A").state) == "Paused by you. Next: b. `%cm run` goes on."
    again = Story("a").fail("rate limited", retry_in_s=4)
    assert text.sentence(again.state, again.now + 1) == "a: rate limited, again in 3 s (2 of 3)."
    lost = Story([step("a"), module("m", loop_max_iterations=0, on_exhausted="fail")]).answer("A").says("loop", "No.")
    assert (
        text.sentence(lost.state) == "Failed: m: Not good enough after 0 repeats: “No.” 1 of 2 done. `%cm run` goes on."
    )


def test_a_step_tells_what_became_of_its_attempts() -> None:
    loop = builder.looping().state
    assert text.story(loop, loop.steps["implementer"]) == (
        "attempt 1 sent back by quality-gate (0.52): “2 of 7 tests fail: `done` is missing.”; "
        "attempt 2 sent back by quality-gate (0.71): “1 of 7 tests fails.”"
    )
    assert text.loop_words(loop.steps["quality-gate"]) == "1 loop 0.52 · 2 loop 0.71 (max 5)"
    edited = builder.edited().state
    assert text.story(edited, edited.steps["planner"]) == (
        "attempt 1 replaced by an edited text; attempt 2 edited and approved by you, @65s"
    )


def test_what_a_used_up_loop_accepted_was_not_sent_back() -> None:
    waits = builder.exhausted().state
    back = "attempt {} sent back by quality-gate ({}): “Tests still fail.”"
    told = f"{back.format(1, 0.52)}; {back.format(2, 0.71)}"
    assert text.story(waits, waits.steps["implementer"]) == told
    done = builder.exhausted().decide("approve").state
    assert text.story(done, done.steps["implementer"]) == f"{told}; attempt 3 accepted at the limit of quality-gate"
    gate = done.steps["quality-gate"]
    assert text.outcome(done, gate, gate.attempts[-1]) == (
        "said loop (0.74): “Tests still fail.”; the limit was reached; the last output accepted by you, @82s"
    )
    assert "sent back by quality-gate (0.74)" not in text.run_text(done)


def test_what_is_allowed_beyond_the_limit_counts() -> None:
    more = builder.exhausted().decide("retry", count=2).answer("Again.").says("loop", "No.", 0.8)
    state = more.answer("And again.").says("continue", "Good.", 0.9).state
    gate, maker = state.steps["quality-gate"], state.steps["implementer"]
    assert text.loop_words(gate).endswith("4 loop 0.8 · 5 continue 0.9 (max 4)")
    assert "sent back by quality-gate (0.74)" in text.outcome(state, maker, maker.attempts[2])
    assert "(pass 4, max 4)" in "\n".join(more.lines)
    assert "again, max 4" in svg.graph(state)


def test_an_attempt_in_a_word() -> None:
    def words(story: Story, id: str) -> list[str]:
        step = story.state.steps[id]
        return [text.attempt_word(story.state, step, attempt) for attempt in step.attempts]

    assert words(builder.edited(), "planner") == ["replaced", "edited"]
    assert words(builder.waiting(), "planner") == ["rejected", "approved"]
    assert words(builder.exhausted(), "quality-gate") == ["loop 0.52", "loop 0.71", "loop 0.74"]
    assert words(builder.exhausted(), "implementer") == ["sent back", "sent back", ""]
    assert words(builder.exhausted().decide("approve"), "implementer") == ["sent back", "sent back", "accepted"]


def test_an_attempt_that_was_run_again_says_so() -> None:
    again = builder.stale()
    planner = again.state.steps["planner"]
    assert text.outcome(again.state, planner, planner.attempts[0]) == "replaced by attempt 2"
    assert text.attempt_word(again.state, planner, planner.attempts[0]) == "replaced"


def test_a_closed_card_and_a_fold_say_that_an_answer_was_for_other_words() -> None:
    story = Story("a -> b -> c").answer("A").answer("B", note=offline.BESIDE).answer("C", note=offline.REPEATED)
    assert "b, c recorded for other words" in html.fold_summary(story.state, story.state.order)
    summary = html.summary(story.state, story.state.steps["b"])
    assert "recorded for other words" in summary
    assert "recorded for other words" not in html.summary(story.state, story.state.steps["a"])


def test_a_tape_says_the_same_on_every_machine() -> None:
    machines = [(builder.NOON, 1.0, "r-1"), (builder.NOON + 86_399, 0.01, "r-2")]
    one, two = (builder.recorded(machine=machine) for machine in machines)
    assert one.lines == two.lines
    for view in (text.run_text, text.status_table):
        assert view(one.state, one.now) == view(two.state, two.now)
    assert "r-1" not in text.run_text(one.state)
    assert "recorded (tapes/02): no model was called" in text.run_text(one.state)
    assert "@" not in text.run_text(one.state)


def test_a_recording_is_named_where_its_name_says_something() -> None:
    state = builder.looping(engine="offline", recorded="quality-first").state
    assert text.source(state) == "recorded: no model was called", "it has the workflow's own name, which stands there"
    assert text.source(builder.recorded().state) == "recorded (tapes/02): no model was called"


def test_a_function_in_a_recorded_run_shows_no_time() -> None:
    state = builder.looping(engine="offline", recorded="tapes/04").state
    assert text.total(state, state.steps["quality-gate"].attempts).words() == []
    assert text.total(state, state.steps["planner"].attempts).words() == ["4.6 s", "400 tok", "$0.003"]


def test_hostile_texts_stay_on_their_line() -> None:
    story = builder.hostile()
    lines = text.run_text(story.state, story.now).splitlines()
    assert len(lines) == 8  # headline, 5 items, sentence, ways
    for line in [*lines, *story.lines]:
        assert not any(char in line for char in "\x1b\x00\u202e\n\r")
    assert all(line.startswith("cm: ") for line in story.lines)


def test_separators_stand_between_the_steps() -> None:
    story = Story(["a", separator("Second part"), "b"])
    assert "  -- Second part" in text.run_text(story.state).splitlines()


def test_status_table_lines_up() -> None:
    lines = text.status_table(builder.edited().state).splitlines()
    assert lines[0].split() == list(text.STATUS_COLUMNS)
    assert lines[-1].split() == ["total", "running", "9.6", "s", "~1.6k", "~$0.006", "4"]
    assert text.quoted(HOSTILE).count("\n") == 0


def test_show_text_gives_the_whole_output() -> None:
    state = builder.waiting().state
    shown = text.show_text(state, state.steps["planner"])
    assert shown.startswith("planner: approved · attempt 2 of 2 · 7.4 s · 900 tok · $0.004 · approved by you")
    assert shown.endswith(builder.PLAN_2)


def test_show_text_gives_both_ends_of_a_long_output() -> None:
    state = Story("a").answer(f"begin {'x' * 5_000_000} end").state
    shown = text.show_text(state, state.steps["a"])
    assert len(shown) < 65_000
    assert shown.splitlines()[2].startswith("begin x")
    assert shown.splitlines()[3] == "… 4,936,010 characters left out. Show all 5.0 MB: `%cm show a --full` …"
    assert shown.endswith("x end")
    assert len(text.show_text(state, state.steps["a"], full=True)) > 5_000_000


def test_a_skipped_step_says_so_once() -> None:
    after = Story("a? -> b").answer("A").decide("skip")
    assert "  a  skipped  4.6 s 400 tok $0.003  (skipped by you, @65s)" in text.run_text(after.state)
    before = Story([step("a", interactive=True, gate="before"), "b"]).decide("skip")
    assert "  a  skipped  skipped by you" in text.run_text(before.state)


def test_a_person_there_is_told_when_it_was_decided_also_beside_a_tape() -> None:
    state, decision = builder.recorded().state, Decision(action="approve", at=builder.NOON)
    assert text.decided(state, decision, live=True) == "approved by you, @0s"
    assert text.decided(state, decision) == "approved by you"
    assert text.decided(state, decision.model_copy(update={"by": "tape"}), live=True) == "approved (recorded)"


def test_a_gate_with_a_deadline_says_until_when_and_what_comes_then() -> None:
    def sentence(wait_s: float, default: Any = None, **options: Any) -> str:
        one = step("a", prompt="Do it.", interactive=True, gate_timeout_s=wait_s, gate_default=default)
        state = builder.Story([one], **options).answer("done").state
        return text.sentence(state)

    noon = time.strftime("%Y-%m-%d %H:%M", time.localtime(builder.NOON + 86_400))
    assert re.search(r" Decide by \d\d:\d\d:\d\d, else it is skipped\.$", sentence(30, "skip"))
    assert re.search(r" Decide by \d\d:\d\d, else the run stops\.$", sentence(900))
    assert f" Decide by {noon}, else it is rejected." in sentence(86_400, "reject")
    assert sentence(300, recorded="tapes/01").endswith(" Decide within 5 min 00 s, else the run stops.")
