"""The saved view: what it says, that it is harmless and readable everywhere, and that it stays as it is (golden files).

``CM_UPDATE_GOLDEN=1 pytest tests/render/test_html.py`` writes the golden files anew; look at the diff.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest

from cm_notebook.errors import TransitionError
from cm_notebook.events import NOT_CALLED, Rewound
from cm_notebook.render import compare, html, text
from cm_notebook.workflow import agent, step
from tests.render import builder
from tests.render.builder import SITUATIONS, Story

GOLDEN = Path(__file__).parent / "golden"
TAGS = {
    *("div", "span", "p", "b", "strong", "em", "s", "del", "ins", "code", "pre", "details", "summary", "img", "a"),
    *("table", "thead", "tbody", "tr", "th", "td", "ul", "ol", "li", "blockquote", "hr", "br"),
}
ATTRIBUTES = {
    "*": {"style", "class", "role", "aria-level", "title", "tabindex", "aria-label"},
    "details": {"open"},
    "img": {"src", "alt", "width", "height"},
    "a": {"href", "rel", "target"},
    "th": {"scope"},
    "ol": {"start"},
}
VOID = {"img", "br", "hr"}


@pytest.fixture(autouse=True)
def _clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "clock", lambda at: "12:31")


def contrast(one: str, two: str) -> float:
    """The WCAG contrast of two colours written ``#rgb`` or ``#rrggbb``."""

    def luminance(colour: str) -> float:
        digits = colour.lstrip("#")
        digits = "".join(2 * digit for digit in digits) if len(digits) == 3 else digits
        parts = [int(digits[place : place + 2], 16) / 255 for place in (0, 2, 4)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(one), luminance(two)), reverse=True)
    return (high + 0.05) / (low + 0.05)


class Page(HTMLParser):
    """Reads HTML and complains about what GitHub or an untrusted JupyterLab would strip."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.said: list[str] = []
        self.styles: set[str] = set()
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in TAGS, tag
        for name, value in attrs:
            assert name in ATTRIBUTES["*"] | ATTRIBUTES.get(tag, set()), (tag, name)
            if name == "style":
                self.styles.add(value or "")
            if name == "src":
                assert (value or "").startswith("data:image/svg+xml;charset=utf-8,")
            if name == "href":
                assert re.match(r"(https?|mailto):", value or "")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.said.append(data)

    def handle_comment(self, data: str) -> None:
        raise AssertionError(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.said).split())


def views(story: Story) -> Iterator[str]:
    state = story.state
    yield html.run_html(state, now=story.now)
    yield html.run_html(state, full=True)
    yield html.status_html(state)
    yield html.runs_html(
        [(state.run_id, state.name, state.status, builder.NOON), (builder.HOSTILE, builder.HOSTILE, "?", 0.0)]
    )
    yield html.rows_html(("Setting", "Value"), [(builder.HOSTILE, builder.HOSTILE)], "To change one: `%config`")
    for each in state.order:
        yield html.run_html(state, [each.id])
        yield html.show_html(state, each)
        for attempt in each.attempts:
            yield html.show_html(state, each, attempt.number)
        if len(each.attempts) > 1:
            yield html.diff_html(state, each)


@pytest.mark.parametrize("name", SITUATIONS)
def test_nothing_that_would_be_stripped_or_acts(name: str) -> None:
    for view in views(SITUATIONS[name]()):
        page = Page(view)
        assert not any(char in view for char in "\x00\x1b\u202e")
        for style in page.styles:
            assert "url(" not in style
            assert not re.search(r"[:\s,(]\.\d", style)  # JupyterLab keeps 0.12, not .12
        assert max(map(len, view.split("\n"))) < 2_500


@pytest.mark.parametrize("name", SITUATIONS)
def test_text_takes_the_colour_of_the_page(name: str) -> None:
    for view in views(SITUATIONS[name]()):
        for style in Page(view).styles:
            if colour := re.search(r"(?:^|;)color:([^;]+)", style):
                ground = re.search(r"background:(#\w+)", style)
                assert ground is not None, style
                assert contrast(colour[1], ground[1]) >= 4.5
            if border := re.search(r"border(?:-left|-top)?:\dpx \w+ (#\w+)", style):
                assert contrast(border[1], "#ffffff") >= 3
                assert contrast(border[1], "#111111") >= 3


@pytest.mark.parametrize(
    "name",
    ["waiting", "recorded", "looping", "exhausted", "failed", "stale", "edited", "hostile", "team", "permission"],
)
def test_golden(name: str) -> None:
    story = SITUATIONS[name]()
    made = html.run_html(story.state, now=story.now)
    path = GOLDEN / f"{name}.html"
    if os.environ.get("CM_UPDATE_GOLDEN"):
        GOLDEN.mkdir(exist_ok=True)
        path.write_text(made, encoding="utf-8", newline="\n")
    assert made == path.read_text(encoding="utf-8"), "changed on purpose? CM_UPDATE_GOLDEN=1 writes it anew"


def test_what_stands_between_two_prices_is_no_formula() -> None:
    story = builder.finished()
    state, done = story.state, story.state.order[0]
    pages = [html.run_html(state), html.run_html(state, [done.id]), html.status_html(state)]
    pages += [html.show_html(state, done), html.show_html(state, done, 1)]
    pages += [html.runs_html([(state.run_id, "a", "completed", 0.0)])]
    pages += [compare.compare_html(state, state), html.rows_html(("Setting",), [("CM.engine",)], "")]
    for page in pages:
        assert re.match('<div class="mathjax_ignore tex2jax_ignore"[ >]', page), page[:200]


def test_a_tape_gives_the_same_bytes_on_every_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # the real clock
    for make in (builder.recorded, lambda **o: builder.looping(engine="offline", recorded="tapes/04", **o)):
        one = make(machine=(builder.NOON, 1.0, "r-1"))
        two = make(machine=(builder.NOON + 86_399, 0.01, "r-2"))
        assert html.run_html(one.state, now=one.now) == html.run_html(two.state, now=two.now)
        for step_one, step_two in zip(one.state.order, two.state.order, strict=True):
            assert html.show_html(one.state, step_one) == html.show_html(two.state, step_two)
        assert html.status_html(one.state) == html.status_html(two.state)


def test_it_tells_the_story() -> None:
    said = Page(html.run_html(builder.finished().state)).text
    assert (
        "Attempt 1 rejected by you, 12:31: “Name the tests now, and add done.”; attempt 2 approved by you, 12:31"
        in said
    )
    assert "What changed since attempt 1" in said
    assert "Finished: 5 of 5 done." in said
    assert "cell" not in said  # nothing is left to decide
    assert "%cm" not in said


def test_a_pending_one_says_how_to_decide() -> None:
    said = Page(html.run_html(builder.waiting().state)).text
    assert "reviewer is waiting for you. Next: deployer." in said
    assert "Run this cell again to decide, or: %cm approve %%cm reject %cm edit %cm skip %cm stop" in said
    exhausted = Page(html.run_html(builder.exhausted().state)).text
    assert "allow 2 more, or stop." in exhausted
    assert "Accept the last %cm approve 2 more %cm retry --count 2 %cm edit" in exhausted


def test_where_the_answers_came_from() -> None:
    assert "Recorded (tapes/02): no model was called" in Page(html.run_html(builder.recorded().state)).text
    assert "r-7f3a" not in html.run_html(builder.recorded().state)
    assert "Offline: no model was called" in Page(html.run_html(Story("a", engine="offline").answer("A").state)).text
    assert "~1.2k tok" in Page(html.run_html(builder.edited().state)).text
    noted = Story("a").answer("A", note="recorded answer: your words reached no model")
    assert "Recorded answer: your words reached no model" in Page(html.run_html(noted.state)).text
    resumed = Story("a -> b").answer("A").cut("kernel stopped").resume("kernel stopped")
    assert "Resumed by you, 12:31 (kernel stopped)" in Page(html.run_html(resumed.state)).text


def test_open_is_what_wants_attention_or_came_last() -> None:
    def opened(story: Story) -> list[str]:
        return re.findall(r"<details open[^>]*>\n<summary[^>]*><b>([\w-]+)", html.run_html(story.state))

    assert opened(builder.waiting()) == ["reviewer"]
    assert opened(builder.finished()) == ["deployer"]
    assert opened(builder.failed()) == ["planner"]
    assert opened(builder.looping()) == ["implementer"]


def test_many_steps_fold() -> None:
    said = Page(html.run_html(builder.many().state, now=builder.many().now)).text
    assert "16 done step-1 to step-16 · 61 s · 4.9k tok · $0.048" in said
    assert "13 pending step-18 to step-30" in said


def test_a_few_finished_steps_fold_but_one_with_a_story_does_not() -> None:
    story = Story("a -> b -> c -> d? -> e -> f -> g").answer("A").answer("B").answer("C").answer("D")
    said = Page(html.run_html(story.state, now=story.now)).text
    assert "3 done a, b, c · 13.8 s · 1.2k tok" in said
    assert "3 pending e, f, g · starts when d is approved" in said
    one = Story("a -> b? -> c -> d").answer("A").answer("B").decide("approve").answer("C").answer("D")
    assert (
        "3 done a, b, c · 13.8 s · 1.2k tok · $0.009 · b approved by you, 12:31" in Page(html.run_html(one.state)).text
    )
    told = Story("a? -> b -> c -> d?").answer("A").decide("reject", "More.").answer("AA").decide("approve")
    told.answer("B").answer("C").answer("D")
    assert [[step.id for step in row.steps] for row in html.rows(told.state)] == [["a"], ["b"], ["c"], ["d"]]


def test_an_error_is_said_once_and_with_all_ways_out() -> None:
    state = builder.failed().state
    said = Page(html.run_html(state)).text
    assert said.count("No key for anthropic.") == 1
    assert "planner failed. Retry, edit its prompt, skip it, or stop." in said
    assert "%cm retry Edit prompt %cm edit %cm skip %cm stop" in said
    queued = Page(html.run_html(state, ["reviewer"])).text  # without the card, the bar must say it
    assert "planner failed: No key for anthropic. Set ANTHROPIC_API_KEY before starting Jupyter. Retry, edit" in queued


def test_a_question_is_asked_once() -> None:
    story = Story("a -> b").ask("Which **database**?")
    assert Page(html.run_html(story.state)).text.count("database") == 1
    assert "a asks: “Which **database**?”" in Page(html.run_html(story.state, ["b"])).text


def test_a_sentence_begins_with_a_capital_unless_with_a_name() -> None:
    state = builder.waiting().state
    assert html.opened(state, "already approved by you") == "Already approved by you"
    for words in ("planner is not waiting", "action='fly' is not valid", "'x' is no step"):
        assert html.opened(state, words) == words


def test_a_step_cell_shows_its_card_and_its_gate() -> None:
    state = builder.waiting().state
    planner = Page(html.run_html(state, ["planner"])).text
    assert planner.startswith("planner approved")
    assert "Step 2 of 5 in smart-builder" in planner
    assert "Step 5 in smart-builder" in Page(html.run_html(state, ["deployer"])).text  # the next cell may add a step
    assert "Step 5 of 5" in Page(html.run_html(builder.finished().state, ["deployer"])).text
    assert "%cm approve" not in planner
    assert "%cm approve" in Page(html.run_html(state, ["reviewer"])).text
    queued = Page(html.run_html(state, ["deployer"])).text
    assert "starts when reviewer is approved" in queued
    assert "%cm approve" in queued  # a copy of the gate that holds it


def test_questions_and_prompts_are_shown_in_full() -> None:
    asked = Page(html.run_html(Story("a").ask("Which database?\n\n- SQLite\n- Postgres").state)).text
    assert "SQLite Postgres" in asked
    assert "%%cm answer" in asked
    built = Page(html.run_html(builder.edited().state)).text
    assert "Asked: “Which database?” Answered: “SQLite.”" in built
    start = Page(html.run_html(Story([step("a", interactive=True, gate="before")]).state)).text
    assert "The prompt that would be sent: Do the work of a." in start


def test_a_long_output_shows_its_ends_and_how_to_see_all() -> None:
    story = Story("reviewer -> b").answer("first\n\n" + "x " * 106_000 + "\n\nlast")
    reviewer = story.state.steps["reviewer"]
    made = html.run_html(story.state)
    assert len(made) < 90_000
    said = Page(made).text
    assert "Show all 212 kB: %cm show reviewer --full" in said
    assert "first" in said
    assert "last" in said
    assert len(html.show_html(story.state, reviewer, full=True)) > 212_000


def test_a_run_stays_below_a_megabyte() -> None:
    story = Story([f"s{number}" for number in range(40)], name="big")
    for number in range(40):
        story.answer(f"- item {number}\n" * 20_000)
    assert len(html.run_html(story.state).encode()) <= html.RUN_LIMIT
    loop = Story("a -> gate(loop 1) -> b")
    for _ in range(40):
        loop.answer("- item\n" * 20_000).says("loop", "more")
    made = html.run_html(loop.state)
    assert len(made.encode()) <= html.RUN_LIMIT
    assert "earlier attempts are not shown" in made


def test_attempts_are_found_by_number_and_from_the_end() -> None:
    state = builder.waiting().state
    planner = state.steps["planner"]
    assert [html.find_attempt(planner, number).number for number in (None, 1, -1, -2)] == [2, 1, 2, 1]
    with pytest.raises(TransitionError, match="no attempt 7; there is 1 to 2"):
        html.find_attempt(planner, 7)
    with pytest.raises(TransitionError, match="has not run yet"):
        html.find_attempt(state.steps["deployer"], None)
    said = Page(html.diff_html(state, planner, 1, 2)).text
    assert "attempt 1 to attempt 2" in said
    assert "Name the tests now" in said


def test_the_live_pieces_say_what_the_saved_view_says() -> None:
    state = builder.waiting().state
    planner = state.steps["planner"]
    first, second = planner.attempts
    assert [[step.id for step in row.steps] for row in html.rows(state)] == [[step.id] for step in state.order]
    assert [len(row.steps) for row in html.rows(builder.many().state)] == [16, 1, 13]
    assert "Rejected by you" in Page(html.output_html(state, planner, first)).text
    assert "Approved by you" in Page(html.output_html(state, planner, second)).text
    assert "From attempt 1 to 2:" in Page(html.changes_html(planner, second)).text
    assert "no earlier output" in Page(html.changes_html(planner, first)).text
    assert "Sent to claude: Do the work of planner." in Page(html.prompt_html(planner, first)).text
    assert html.summary(state, planner) in html.run_html(state)


def test_a_step_without_a_prompt_says_so() -> None:
    state = Story("a", agents=[agent("a")(lambda turn: "A")], engine="function").answer("A").state
    assert (
        Page(html.prompt_html(state.steps["a"], state.steps["a"].attempts[0])).text.strip() == "It was given no prompt."
    )


def test_that_no_model_was_called_is_said_once_beside_its_text() -> None:
    text = "**Offline: no model was called.** a would have been sent:"
    state = Story("a", engine="offline").answer(text, note=NOT_CALLED).state
    said = Page(html.output_html(state, state.steps["a"], state.steps["a"].last)).text
    assert said.count("no model was called") == 1
    other = Story("a", engine="offline").answer("A", note="recorded answer").state
    assert "Recorded answer" in html.output_html(other, other.steps["a"], other.steps["a"].last)


def test_the_step_gone_back_to_stays_open() -> None:
    story = Story("a -> b -> c?", autonomous_mode="always").answer("A").answer("B").answer("C")
    assert [row.open for row in html.rows(story.state)][-1]
    story.record(Rewound(to="b", later=True, afresh=True))
    assert [step.id for row in html.rows(story.state) if row.open for step in row.steps] == ["b"]
