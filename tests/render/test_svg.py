"""The picture of a run: well-formed, readable, calm, and the same in an ``<img>``."""

from __future__ import annotations

import html
import re
import urllib.parse
import xml.etree.ElementTree as ET
from itertools import pairwise

import pytest

from cm_notebook.errors import WorkflowError
from cm_notebook.render import svg
from cm_notebook.runstate import RunState
from cm_notebook.state import call_agents, state_of
from cm_notebook.team import Call
from cm_notebook.workflow import Agent, Workflow, module, parallel, separator, step
from tests.render import builder
from tests.render.builder import SITUATIONS, Story
from tests.render.test_html import contrast

ELEMENTS = {"svg", "rect", "path", "circle", "g", "text", "title", "style"}
ATTRIBUTES = {
    *("width", "height", "viewBox", "role", "aria-label", "x", "y", "rx", "cx", "cy", "r", "d", "fill", "stroke"),
    *("stroke-width", "stroke-dasharray", "transform", "font-family", "font-size", "font-weight", "text-anchor"),
}
LIVE = {"data-step", "tabindex"}


def drawn(state: RunState, *, live: bool = False) -> ET.Element:
    return ET.fromstring(svg.graph(state, live=live))


def of(steps: object, **options: object) -> RunState:
    return state_of(Workflow("w", steps=steps, agents=builder._agents(steps), **options))


def local(element: ET.Element) -> str:
    return element.tag.removeprefix("{http://www.w3.org/2000/svg}")


def texts(root: ET.Element) -> list[str]:
    return [element.text or "" for element in root.iter() if local(element) == "text"]


def boxes(root: ET.Element) -> list[tuple[float, float, float]]:
    """(x, y, width) of the nodes, in order."""
    return [
        (float(e.get("x", 0)), float(e.get("y", 0)), float(e.get("width", 0)))
        for e in root.iter()
        if local(e) == "rect" and e.get("height") == "42"
    ]


@pytest.mark.parametrize("name", SITUATIONS)
@pytest.mark.parametrize("live", [False, True])
def test_only_presentation_attributes(name: str, live: bool) -> None:
    for element in drawn(SITUATIONS[name]().state, live=live).iter():
        assert local(element) in ELEMENTS
        assert set(element.attrib) <= ATTRIBUTES | (LIVE if live else set())


@pytest.mark.parametrize("name", SITUATIONS)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_everything_can_be_read_on_the_plate(name: str, scheme: str) -> None:
    made = svg.graph(SITUATIONS[name]().state)
    if scheme == "dark":  # what the style sheet does
        style, made = re.search(r"<style>.*</style>", made, re.DOTALL)[0], re.sub(r"(?s)<style>.*</style>", "", made)
        rules = dict(re.findall(r"\[fill='(#\w+)'\]{fill:(#\w+)}", style))
        strokes = dict(re.findall(r"\[stroke='(#\w+)'\]{stroke:(#\w+)}", style))
        assert strokes.items() <= rules.items()
        assert all(stroke in strokes for stroke in re.findall(r'stroke="(#\w+)"', made))
        assert contrast(rules[svg.PLATE], "#111111") < 1.3  # no slab
        made = re.sub(r'(?<=fill="|roke=")#\w+', lambda found: rules[found[0]], made)
    root = ET.fromstring(made)
    board = next(element for element in root if local(element) == "rect")
    plate = board.get("fill", "")
    assert plate == (svg.PLATE if scheme == "light" else svg.DARK_GROUNDS[svg.PLATE])
    for group in root.iter():
        ground = plate
        for element in group:
            if local(element) == "rect" and element is not board:
                if stroke := element.get("stroke"):
                    assert contrast(stroke, plate) >= 3
                    assert contrast(stroke, element.get("fill", plate)) >= 3 or stroke == element.get("fill")
                ground = element.get("fill", plate)
            elif local(element) == "text":
                assert contrast(element.get("fill", ""), ground) >= 4.5
            elif local(element) == "path":
                assert contrast(element.get("stroke") or element.get("fill", ""), plate) >= 3


@pytest.mark.parametrize("count", [1, 2, 5, 8, 30, 60])
def test_nodes_stand_apart_and_inside(count: int) -> None:
    root = drawn(of([f"step-{number}" for number in range(count)]))
    width, height = float(root.get("width", 0)), float(root.get("height", 0))
    places = boxes(root)
    assert len(places) == count
    assert width <= svg.WIDTH
    assert all(x > 0 and x + w < width and y > 0 and y + 42 < height for x, y, w in places)
    for (x1, y1, w), (x2, y2, _) in pairwise(places):
        assert (y1 == y2 and x2 >= x1 + w + 15) or y2 >= y1 + 42 + 15
    if count <= 5:
        assert len({y for _, y, _ in places}) == 1


@pytest.mark.parametrize("name", SITUATIONS)
def test_words_fit_their_boxes(name: str) -> None:
    root = drawn(SITUATIONS[name]().state)
    for group in root.iter():
        frame = next((e for e in group if local(e) == "rect" and e.get("height") == "42"), None)
        for element in group if frame is not None else ():
            if local(element) == "text" and element.get("text-anchor") is None:
                end = float(element.get("x", 0)) + svg.text_width(
                    element.text or "", float(element.get("font-size", 0))
                )
                assert end <= float(frame.get("x", 0)) + float(frame.get("width", 0))  # type: ignore[union-attr]


def test_lines_fan_out_to_who_works_in_a_parallel_step_and_come_together() -> None:
    state = builder.team().state
    root = drawn(state)
    names = ["frontend-dev", "backend-dev", "qa-engineer"]
    stack = [e for e in root.iter() if local(e) == "rect" and e.get("height") == "26"]
    assert len({e.get("x") for e in stack}) == 1
    assert len({e.get("y") for e in stack}) == len(stack) == 3
    lines = [e.get("d", "") for e in root if local(e) == "path"]
    assert len(lines) == 6, "one to each, one from each"
    assert len({y for _, y, _ in boxes(root)}) == 1, "the others stand on its axis"
    assert [text for text in texts(root) if text in names] == names
    assert "(frontend-dev done, backend-dev failed, qa-engineer running)" in svg.describe(state)
    assert "[frontend-dev (done) | backend-dev (failed) | qa-engineer (running)]" in svg.graph(state, "text")
    assert 'subgraph s2["' in svg.graph(state, "mermaid")
    many = of([parallel(*(f"m{n}" for n in range(9)), id="many"), "after"])
    assert [text for text in texts(drawn(many)) if text[0] == "m" or "more" in text] == [
        "many", "m0", "m1", "m2", "m3", "m4", "4 more",
    ]  # fmt: skip


def called(*names: str) -> RunState:
    """A coordinator has called them."""
    agents = [*builder._agents("architect -> coordinator? -> deployer"), *(Agent(name, "Go.") for name in names)]
    story = Story("architect -> coordinator? -> deployer", agents=agents, sub_agents=list(names)).answer("A plan.")
    groups = [[Call(agent=name, prompt="Go.") for name in names]]
    story.record(call_agents(story.state, story.state.steps["coordinator"], groups, {})).go()
    return story.state


def test_whom_a_step_has_called_hangs_below_it() -> None:
    state = called("frontend-dev", "backend-dev", "qa-engineer")
    root = drawn(state, live=True)
    below = [e for e in root.iter() if local(e) == "rect" and e.get("height") == "26"]
    (_, y, _), (x, coordinator, _), _ = boxes(root)
    assert y == coordinator
    assert all(float(e.get("y", 0)) > y + 42 and float(e.get("x", 0)) > x for e in below)
    assert [e.get("data-step") for e in root.iter() if "/" in (e.get("data-step") or "")] == [
        "coordinator/frontend-dev#1",
        "coordinator/backend-dev#1",
        "coordinator/qa-engineer#1",
    ]
    assert "0 of 3 finished" in texts(root)
    assert "coordinator? (waits for its team, 0 of 3 finished) calls frontend-dev (running), " in svg.graph(
        state, "text"
    )
    assert '  s2 -.-> s2m1["frontend-dev<br/>running"]' in svg.graph(state, "mermaid")


def test_stacks_beside_each_other_and_in_several_rows() -> None:
    state = of("[a | b] -> [c | d] -> e -> [f | g | h] -> i -> j -> [k | l]")
    root = drawn(state)
    width, height = float(root.get("width", 0)), float(root.get("height", 0))
    assert width <= svg.WIDTH
    for e in root.iter():
        if local(e) == "rect" and e.get("height") in ("26", "42"):
            assert 0 < float(e.get("x", 0)) <= width - float(e.get("width", 0))
            assert 0 < float(e.get("y", 0)) <= height - 26


def test_a_long_name_is_shortened_and_kept_in_the_title() -> None:
    root = drawn(builder.long_names().state)
    titles = [element.text for element in root.iter() if local(element) == "title"]
    assert "collect-requirements-from-every-stakeholder: done" in titles
    assert any("…" in text for text in texts(root))


def test_the_picture_does_not_jump_while_the_run_goes_on() -> None:
    places = []
    for story in (builder.looping(), Story("planner -> implementer -> quality-gate(loop 1, max 5) -> deployer")):
        places.append(boxes(drawn(story.state)))
    assert places[0] == places[1]


def test_chips_only_where_the_run_will_stop() -> None:
    assert texts(drawn(builder.waiting().state)).count("gate") == 1  # the open one; planner's is behind us
    assert texts(drawn(of("a? -> b", autonomous_mode="always"))).count("gate") == 1
    assert texts(drawn(of("a? -> b", autonomous_mode="never"))).count("gate") == 2
    assert texts(drawn(of([step("a", gate="both", interactive=True)]))).count("gate") == 2
    assert texts(drawn(Story("a? -> b?").mode("unattended").state)).count("gate") == 0
    assert texts(drawn(builder.finished().state)).count("gate") == 0


def test_loops_say_how_often() -> None:
    nested = of(
        ["a", "b", module("inner", loop_max_iterations=5), module("outer", loop_steps=3, loop_max_iterations=2)]
    )
    assert [text for text in texts(drawn(nested)) if text.startswith("again")] == ["again, max 5", "again, max 2"]
    far = of([*(f"s{n}" for n in range(8)), module("far", loop_steps=8)])
    assert "again, no limit" in texts(drawn(far))


def test_separators_are_captions() -> None:
    root = drawn(of([separator("Plan <it>"), "a", separator(), "b", separator("End")]))
    assert "Plan <it>" in texts(root)
    assert "End" in texts(root)


def test_stale_is_dashed_and_a_word() -> None:
    root = drawn(builder.stale().state)
    assert [e.get("stroke-dasharray") for e in root.iter() if e.get("height") == "42"].count("5 3") == 1
    assert "stale" in texts(root)


@pytest.mark.parametrize("name", SITUATIONS)
def test_the_image_holds_the_same_picture(name: str) -> None:
    state = SITUATIONS[name]().state
    made = svg.graph_img(state)
    source = re.search(r'src="data:image/svg\+xml;charset=utf-8,([^"]*)"', made)
    assert source is not None
    assert not set(source[1]) & set("<># \t")
    found = urllib.parse.unquote(source[1].replace("\n", ""))  # as a browser reads it
    bare = re.sub(r' role="img" aria-label="[^"]*"', "", svg.graph(state))  # the image has its ``alt``
    assert found == bare.replace('"', "'").replace("\n", "")
    ET.fromstring(found)
    alt = re.search(r'alt="([^"]*)"', made)
    assert alt is not None
    assert html.unescape(alt[1]) == drawn(state).get("aria-label") == svg.describe(state)
    assert max(map(len, made.split("\n"))) < 1200


def test_a_step_forward_changes_few_lines() -> None:
    before, after = builder.waiting(), builder.waiting().decide("approve")
    one, two = svg.graph_img(before.state).split("\n"), svg.graph_img(after.state).split("\n")
    changed = set(one) ^ set(two)
    assert sum(map(len, changed)) < 2_600  # both sides of the diff
    assert len(changed) < 24


def test_live_nodes_are_buttons() -> None:
    root = drawn(builder.waiting().state, live=True)
    assert root.get("role") == "group"
    buttons = [element for element in root.iter() if element.get("role") == "button"]
    assert [element.get("data-step") for element in buttons] == [
        "researcher",
        "planner",
        "implementer",
        "reviewer",
        "deployer",
    ]
    assert all(element.get("tabindex") == "0" for element in buttons)
    assert buttons[3].get("aria-label") == "reviewer: waiting, gate"


def test_mermaid_and_text() -> None:
    state = builder.looping().state
    assert svg.graph(state, "mermaid").splitlines() == [
        "flowchart LR",
        '  s1["planner<br/>done"]',
        '  s2["implementer<br/>running, pass 3"]',
        '  s3{{"quality-gate<br/>pending, pass 3"}}',
        '  s4["deployer<br/>pending"]',
        "  s1 --> s2",
        "  s2 --> s3",
        "  s3 --> s4",
        '  s3 -. "again, max 5" .-> s2',
    ]
    assert svg.graph(of("a? -> b"), "text") == "a? (pending) -> b (pending)"
    assert "[again from implementer, max 5]" in svg.graph(state, "text")
    with pytest.raises(WorkflowError, match="Formats: svg, mermaid, text"):
        svg.graph(state, "png")  # type: ignore[arg-type]


def test_a_workflow_can_be_drawn_before_it_runs() -> None:
    assert Workflow("w", steps="a -> b?", agents=builder._agents("a -> b?")).graph().startswith("<svg")
    assert "no steps" in svg.describe(of([]))
