"""When what happened: bars that tell how attempts ended, pauses that squeeze nothing, the same bytes from a tape."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

import pytest

from cm_notebook.errors import WorkflowError
from cm_notebook.events import Usage
from cm_notebook.render import svg, timeline
from cm_notebook.state import call_agents
from cm_notebook.team import Call
from cm_notebook.workflow import Agent
from tests.render import builder
from tests.render.builder import SITUATIONS, Story
from tests.render.test_html import contrast
from tests.render.test_svg import ATTRIBUTES, ELEMENTS, local


def drawn(story: Story) -> ET.Element:
    return ET.fromstring(timeline.draw(story.events, now=story.now))


def row(story: Story, name: str) -> list[timeline.Span]:
    _state, made = timeline.timeline(story.events, story.now)
    return next(one.spans for one in made.rows if one.name == name)


def seen(story: Story, name: str) -> list[tuple[str, str]]:
    return [(span.kind, span.word) for span in row(story, name)]


@pytest.mark.parametrize("name", SITUATIONS)
def test_it_survives_where_style_sheets_do_not(name: str) -> None:
    story = SITUATIONS[name]()
    root = drawn(story)
    width, height = float(root.get("width", 0)), float(root.get("height", 0))
    assert width <= svg.WIDTH
    for element in root.iter():
        assert local(element) in ELEMENTS
        assert set(element.attrib) <= ATTRIBUTES
        if local(element) == "rect":
            assert 0 <= float(element.get("x", 0)) <= width - float(element.get("width", 0))
            assert 0 <= float(element.get("y", 0)) <= height - float(element.get("height", 0))
    assert max(map(len, timeline.img(story.events, story.now).split("\n"))) < 2_000
    for line in timeline.draw(story.events, "text", story.now).splitlines():
        assert len(line) < 260
        assert "\x1b" not in line


def test_the_colours_can_be_read_in_both_schemes() -> None:
    darks = svg.DARK_GROUNDS | svg.DARK_INKS
    for paint in svg.PAINTS.values():
        assert contrast("#ffffff", paint.line) >= 4.5
        assert contrast(darks["#ffffff"], darks[paint.line]) >= 4.5
        assert contrast(paint.line, svg.PLATE) >= 3
        assert contrast(darks[paint.line], darks[svg.PLATE]) >= 3


def test_bars_say_how_attempts_ended() -> None:
    story = builder.finished()
    assert seen(story, "planner") == [("work", "rejected"), ("person", ""), ("work", "approved"), ("person", "")]
    assert [span.tone for span in row(story, "planner") if span.kind == "work"] == ["waiting", "done"]
    assert seen(builder.looping(), "implementer") == [("work", "sent back"), ("work", "sent back"), ("work", "running")]
    assert seen(builder.looping(), "quality-gate") == [("work", "loop 0.52"), ("work", "loop 0.71")]
    assert seen(builder.edited(), "builder")[:3] == [("work", "tried again"), ("again", ""), ("work", "")]
    assert seen(builder.failed(), "planner") == [("work", "failed"), ("person", "")]
    cut = Story("a -> b").cut("kernel stopped").after(3600).resume("kernel stopped").answer("A.")
    assert seen(cut, "a") == [("work", "cut short"), ("work", "done")]


def test_a_pause_does_not_squeeze_the_work() -> None:
    story = Story("a? -> b").answer("A.", 10.0).after(12 * 3600).decide("approve").answer("B.", 10.0)
    _state, made = timeline.timeline(story.events, story.now)
    assert made.end == pytest.approx(20)
    (pause,) = made.breaks
    assert (pause.at, pause.seconds, pause.why) == (pytest.approx(10), pytest.approx(12 * 3600 + 60), "person")
    assert "waited for a person: 12 h 01 min" in timeline.draw(story.events, "text")
    a, b = (next(e for e in drawn(story).iter() if local(e) == "title" and (e.text or "").startswith(n)) for n in "ab")
    assert (a.text, b.text) == ("a: attempt 1: approved, 10.0 s", "b: attempt 1: done, 10.0 s")


def test_what_died_ends_with_its_last_event() -> None:
    story = Story("a -> b").answer("A.", 5.0)
    story.after(3600).resume("the process that drove it had ended")
    assert sum(span.end - span.start for span in row(story, "a")) == pytest.approx(5)


def team(**options: object) -> Story:
    names = ["frontend-dev", "backend-dev", "qa-engineer"]
    agents = [*builder._agents("architect -> coordinator"), *(Agent(name, "Go.") for name in names)]
    story = Story("architect -> coordinator", agents=agents, sub_agents=names, **options).answer("A plan.", 2.0)
    groups = [[Call(agent=name, prompt="Go.") for name in names[:2]], [Call(agent=names[2], prompt="Go.")]]
    story.record(call_agents(story.state, story.state.steps["coordinator"], groups, {})).go()
    return story


def finish(story: Story) -> Story:
    """All answer, the last one first where they work side by side."""
    usage = Usage(input_tokens=10, output_tokens=10)
    for took in (3.0, 1.0, 4.0, 6.0):
        story.answer("Done.", took, usage=usage)
    return story


def test_a_team_stands_below_its_caller() -> None:
    story = finish(team())
    _state, made = timeline.timeline(story.events)
    assert [(one.name, one.depth) for one in made.rows] == [
        ("architect", 0),
        ("coordinator", 0),
        ("frontend-dev", 1),
        ("backend-dev", 1),
        ("qa-engineer", 1),
    ]
    assert [span.kind for span in row(story, "coordinator")] == ["work", "team", "work"]


def test_a_tape_gives_the_same_bytes_on_every_machine() -> None:
    for make in (builder.recorded, lambda **o: finish(team(engine="offline", recorded="tapes/05", **o))):
        one, two = make(machine=(builder.NOON, 1.0, "r-1")), make(machine=(builder.NOON + 86_399, 0.01, "r-2"))
        for form in ("svg", "text", "mermaid"):
            assert timeline.draw(one.events, form) == timeline.draw(two.events, form)
        assert timeline.img(one.events) == timeline.img(two.events)
    story = finish(team(engine="offline", recorded="tapes/05"))
    front, back, last = (row(story, name)[0] for name in ("frontend-dev", "backend-dev", "qa-engineer"))
    assert front.start == back.start, "side by side"
    assert last.start == max(front.end, back.end), "the next group"
    waits = next(span for span in row(story, "coordinator") if span.kind == "team")
    assert (waits.start, waits.end) == (front.start, last.end)


def test_text_and_mermaid() -> None:
    said = timeline.draw(builder.finished().events, "text")
    assert re.search(r"^planner +~+\?+=+\?+ +rejected, approved$", said, re.MULTILINE)
    assert "waited for a person: 60 s, 60 s, 60 s" in said
    assert "= done  ~ sent back or rejected  ? waits for a person" in said
    assert timeline.draw(builder.waiting().events, "mermaid").splitlines()[:7] == [
        "gantt",
        "  title smart-builder",
        "  dateFormat x",
        "  axisFormat %M:%S",
        "  section researcher",
        "  attempt 1 done :done, 0, 6200",
        "  section planner",
    ]
    with pytest.raises(WorkflowError, match="Formats: svg, mermaid, text"):
        timeline.draw(builder.waiting().events, "png")  # type: ignore[arg-type]
