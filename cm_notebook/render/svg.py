"""The run as a picture: steps from left to right, in rows when there are many; and the same as Mermaid or as text.

Strategy: place, then draw. ``_place`` puts steps, captions and loop arcs on a plane from an estimate of text widths
that errs on the wide side (we cannot ask a browser). ``_draw`` turns each into SVG elements, one a line.

The picture must survive places that strip style sheets: presentation attributes, and one light plate behind everything
that carries its own colours. Where style sheets are kept, a dark page gets each colour's dark twin: browsers tell
an image the colour scheme of the page around it. Text reaches 4.5 : 1 and lines 3 : 1 on what they lie on, in both
(tested). State is an icon *and* a word; icons are paths, because fonts show many symbols as boxes. The places depend on
the names alone, so that nothing jumps while the run goes on. Same state, same bytes.

All nodes of a row stand on one axis. A parallel step is a stack of its agents, to which lines fan out and from which
they come together. Whom a step has called hangs below it: that is known only when it calls.

``graph_img`` wraps the SVG for saved notebooks: an ``<img>`` with a percent-encoded data URI, one element a line, so
that a diff shows which step changed. Browsers drop line breaks in a URI before they read it.
"""

from __future__ import annotations

import html
import urllib.parse
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, cast

from ..errors import WorkflowError, did_you_mean
from ..runstate import RunState, StepState
from ..workflow import Module, Parallel, Separator
from .text import Look, Tone, lane_name, look, loop_limit, one_line, team_words, will_stop

PLATE = "#f6f8fa"
INK = "#1f2328"
FAINT = "#57606a"
LINE = "#6e7781"
AMBER = "#855600"


class Paint(NamedTuple):
    """Colours of a tone: ``line`` for border, icon and word; ``fill`` of the node when it is the current one."""

    line: str
    fill: str


PAINTS: dict[Tone, Paint] = {
    "done": Paint("#1a7f37", "#ffffff"),
    "waiting": Paint(AMBER, "#fff6d6"),
    "running": Paint("#0757ba", "#e6f1ff"),
    "failed": Paint("#b42318", "#ffeceb"),
    "pending": Paint(FAINT, "#ffffff"),
    "skipped": Paint(FAINT, "#ffffff"),
}
DARK_GROUNDS = {
    PLATE: "#1c2025",
    "#ffffff": "#272c33",
    "#fff6d6": "#3a2f10",
    "#e6f1ff": "#14304f",
    "#ffeceb": "#4a201d",
}
DARK_INKS = {
    INK: "#e6edf3",
    FAINT: "#a7b1bc",
    LINE: "#848d97",
    AMBER: "#e3b341",
    "#1a7f37": "#56d364",
    "#0757ba": "#79b8ff",
    "#b42318": "#ff938a",
}
"""What each colour becomes on a dark page; inks are lines, too."""
_ICONS: dict[Tone, str] = {  # in a square of 12
    "done": '<path d="M1.5 6.5l3.2 3.2 5.8-7" fill="none" stroke="{}" stroke-width="2"/>',
    "waiting": '<path d="M3.5 1.5v9M8.5 1.5v9" fill="none" stroke="{}" stroke-width="2.6"/>',
    "running": '<path d="M2.5 1l8 5-8 5z" fill="{}"/>',
    "failed": '<path d="M2 2l8 8M10 2l-8 8" fill="none" stroke="{}" stroke-width="2.2"/>',
    "pending": '<circle cx="6" cy="6" r="4.4" fill="none" stroke="{}" stroke-width="1.5"/>',
    "skipped": '<path d="M1 2.5l4 3.5-4 3.5M6 2.5l4 3.5-4 3.5" fill="none" stroke="{}" stroke-width="1.7"/>',
}

WIDTH = 764
"""Widest picture in px: fits a cell of 800 with the frame around it."""
_PAD, _GAP, _HEIGHT, _RADIUS = 12, 22, 42, 7
_TEXT_X, _NODE_MIN, _NODE_MAX = 29, 124, 200
_LANE, _ROW_GAP, _CAPTION, _CHIP = 16, 20, 20, 10
_FAN_GAP, _HEAD = 40, 36
"""Between nodes where lines fan out; and the height of what stands above a stack."""
_MEMBER, _BETWEEN, _INDENT, _WORD, _MEMBERS = 26, 7, 16, 62, 6
"""Of an agent in a stack: height, distance to the next, how far one that was called is set in, place for its state; and
how many there are at most."""
_NAME_PX, _WORD_PX, _SMALL_PX = 12.5, 10.5, 10
_FONT = 'font-family="system-ui,sans-serif"'


# -- widths of text ---------------------------------------------------------------------------------------------------

_NARROW = {**dict.fromkeys("iljI'|!.,:; ", 0.34), **dict.fromkeys('ftr-()[]/\\"', 0.43), **dict.fromkeys("mwMW@%", 1.0)}


def _em(char: str) -> float:
    """Width of a character in em, in the widest of the usual sans-serif fonts."""
    if char in _NARROW:
        return _NARROW[char]
    if ord(char) >= 0x1100:
        return 1.05
    return 0.75 if char.isupper() else 0.64


def text_width(text: str, px: float, bold: bool = False) -> float:
    """Width of `text` in px at most."""
    return sum(map(_em, text)) * px * (1.06 if bold else 1.0)


def shorten(text: str, width: float, px: float, bold: bool = False) -> str:
    """`text` cut with ``…`` so that it is no wider than `width`; it keeps its end, where names differ."""
    if text_width(text, px, bold) <= width:
        return text
    keep = len(text) - 1
    while keep > 2 and text_width(_middle(text, keep), px, bold) > width:
        keep -= 1
    return _middle(text, keep)


def _middle(text: str, keep: int) -> str:
    tail = keep // 3
    return text[: keep - tail] + "…" + (text[-tail:] if tail else "")


# -- placing ----------------------------------------------------------------------------------------------------------


class _Member(NamedTuple):
    """Who works in a parallel step, or was called."""

    name: str
    look: Look
    path: str = ""


@dataclass(slots=True)
class _Node:
    step: StepState
    look: Look
    words: str
    short: str
    """What stands in its box."""
    members: list[_Member] = field(default_factory=list)
    row: int = 0
    x: float = 0.0
    axis: float = 0.0
    """The y of its middle, to which lines run."""

    @property
    def fans(self) -> bool:
        """Whether it is a stack of its members."""
        return isinstance(self.step.step, Parallel)

    @property
    def _stack(self) -> int:
        return len(self.members) * (_MEMBER + _BETWEEN) - _BETWEEN

    @property
    def up(self) -> float:
        """From its axis to its top."""
        return self._stack / 2 + _HEAD if self.fans else _HEIGHT / 2

    @property
    def down(self) -> float:
        """From its axis to its bottom."""
        hangs = self._stack + _BETWEEN + 1 if self.members else 0
        return self._stack / 2 if self.fans else _HEIGHT / 2 + hangs

    @property
    def bottom(self) -> float:
        """The y below which nothing of it is."""
        return self.axis + self.down

    def tops(self) -> list[float]:
        """The y of each member's box."""
        first = self.axis - self._stack / 2 if self.fans else self.axis + _HEIGHT / 2 + _BETWEEN + 1
        return [first + number * (_MEMBER + _BETWEEN) for number in range(len(self.members))]

    def ports(self) -> list[float]:
        """The y of each line that enters or leaves it."""
        return [top + _MEMBER / 2 for top in self.tops()] if self.fans else [self.axis]


@dataclass(slots=True)
class _Row:
    caption: str | None = None
    """Text of the separator above it; ``""`` for a bare line."""
    nodes: list[_Node] = field(default_factory=list)
    taken: list[tuple[int, float, float]] = field(default_factory=list)
    """Stretches of the lanes below it that loops run through: lane, from, to."""
    y: float = 0.0

    @property
    def up(self) -> float:
        """From its top to the axis."""
        return max((node.up for node in self.nodes), default=0)

    @property
    def height(self) -> float:
        """Of its highest node above the axis, and its lowest one below it."""
        return self.up + max((node.down for node in self.nodes), default=0)

    @property
    def bottom(self) -> float:
        """The y below its nodes and loops."""
        return self.y + self.height + (self.lanes * _LANE + 6 if self.lanes else 0)

    def lane(self, start: float, end: float) -> int:
        """The first lane that is free between `start` and `end`; it is taken from now on."""
        number = 0
        while any(lane == number and start < right + 6 and left - 6 < end for lane, left, right in self.taken):
            number += 1
        self.taken.append((number, start, end))
        return number

    @property
    def lanes(self) -> int:
        """How many lanes it needs."""
        return max((lane + 1 for lane, _, _ in self.taken), default=0)


@dataclass(slots=True)
class _Loop:
    source: _Node
    target: _Node
    label: str
    active: bool
    lanes: tuple[int, int] = (0, 0)
    """Below the source's row, and below the target's."""
    left: float = 0.0
    """Where its row begins."""
    margin: int = 0
    """Which line left of the rows it climbs along, when they are different rows."""


@dataclass(slots=True)
class _Plan:
    rows: list[_Row]
    nodes: dict[str, _Node]
    loops: list[_Loop]
    node_width: float
    gap: int
    left: float
    width: float
    height: float


def _place(state: RunState) -> _Plan:
    nodes = {step.id: _node(state, step) for step in state.order}
    # By the names alone: words of state come and go, and the picture must not jump.
    needed = [text_width(name, _NAME_PX, bold=True) + _TEXT_X + 8 for name in nodes]
    for node in nodes.values():
        needed += [text_width(one.name, _WORD_PX) + (0 if node.fans else _INDENT) + 26 + _WORD for one in node.members]
    node_width = round(min(max([*needed, _NODE_MIN]), _NODE_MAX))
    gap = _FAN_GAP if any(node.fans for node in nodes.values()) else _GAP
    one_row = int((WIDTH - 2 * _PAD + gap) // (node_width + gap))
    fits = max(1, int((WIDTH - 2 * _PAD - 42 + gap) // (node_width + gap)))
    rows = _rows(state, nodes, len(nodes) if len(nodes) <= one_row and not _has_captions(state) else fits)
    for number, row in enumerate(rows):
        for node in row.nodes:
            node.row = number
    loops = [_loop(state, nodes, module) for module in state.order if isinstance(module.step, Module)]
    climbing = [loop for loop in loops if loop.source.row != loop.target.row]
    for number, loop in enumerate(sorted(climbing, key=lambda loop: loop.source.step.index - loop.target.step.index)):
        loop.margin = number
    several = sum(1 for row in rows if row.nodes) > 1
    left = (
        _PAD
        + (14 if several and gap == _GAP else 26 if several else 0)
        + (12 + 7 * (len(climbing) - 1) if climbing else 0)
    )
    for row in rows:
        for column, node in enumerate(row.nodes):
            node.x = left + column * (node_width + gap)
    for loop in loops:
        loop.left = left
    _take_lanes(rows, sorted(loops, key=lambda loop: loop.source.step.index - loop.target.step.index), node_width)
    height = _stack(rows)
    longest = max((len(row.nodes) for row in rows), default=0)
    width = left + longest * (node_width + gap) - gap + _PAD + (12 if several else 0)
    captions = max((text_width(row.caption or "", _SMALL_PX) for row in rows), default=0) + left + _PAD + 40
    return _Plan(rows, nodes, loops, node_width, gap, left, max(width, min(captions, WIDTH), 120), height)


def _node(state: RunState, step: StepState) -> _Node:
    seen = look(state, step)
    again = f", pass {step.iteration}" if step.iteration > 1 and not step.settled else ""
    words, team = seen.word + again, team_words(step) if step.status == "calling" else ""
    return _Node(step, seen, f"{words}, {team}" if team else words, team or words, _members(state, step))


def _members(state: RunState, step: StepState) -> list[_Member]:
    """Who works in it or was called by its last attempt; of many the first, and how the rest stand."""
    called = step.last.members if step.last is not None else []
    found = [_Member(lane_name(member), look(state, member), member.path) for member in called]
    if isinstance(step.step, Parallel):
        known = {member.id: _Member(member.id, look(state, member), member.path) for member in called}
        found = [known.get(name) or _Member(name, Look("pending", "pending")) for name in step.step.members]
    if len(found) <= _MEMBERS:
        return found
    few, more = found[: _MEMBERS - 1], found[_MEMBERS - 1 :]
    tones = {one.look.tone for one in more}
    tone: Tone = next((one for one in ("failed", "waiting", "running", "pending") if one in tones), "done")
    return [*few, _Member(f"{len(more)} more", Look("", tone))]


def _has_captions(state: RunState) -> bool:
    return any(isinstance(item, Separator) for item in state.items)


def _rows(state: RunState, nodes: dict[str, _Node], fits: int) -> list[_Row]:
    """Rows of at most `fits` nodes, about equally long within a section; a separator begins a section."""
    sections: list[_Row] = [_Row()]
    for item in state.items:
        if isinstance(item, Separator):
            sections.append(_Row(caption=one_line(item.text, 90)))
        else:
            sections[-1].nodes.append(nodes[item.id])
    rows: list[_Row] = []
    for section in sections:
        count = len(section.nodes)
        if not count:
            if section.caption is not None:
                rows.append(section)
            continue
        each = -(-count // -(-count // fits))
        for start in range(0, count, each):
            rows.append(_Row(section.caption if start == 0 else None, section.nodes[start : start + each]))
    return rows


def _loop(state: RunState, nodes: dict[str, _Node], module: StepState) -> _Loop:
    loop = state.loops.get(module.id)
    label = f"again, {loop_limit(module)}"
    return _Loop(nodes[module.id], nodes[_back_to(state, module).id], label, loop is not None and loop.active)


def _back_to(state: RunState, module: StepState) -> StepState:
    """The step from which `module` lets the run repeat."""
    return state.order[max(0, module.index - cast("Module", module.step).loop_steps)]


def _take_lanes(rows: list[_Row], loops: list[_Loop], node_width: float) -> None:
    """Give `loops`, the shortest first, their lanes: nested without crossing each other."""
    for loop in loops:
        out, into = _ports(loop, node_width)
        row = rows[loop.source.row]
        if loop.source.row == loop.target.row:
            lane = row.lane(into, out)
            loop.lanes = (lane, lane)
        else:
            after = text_width(loop.label, _SMALL_PX) + 14 if _narrow(loop) else 0
            loop.lanes = (row.lane(0, out + after), 0)
    for loop in reversed(loops):  # at its upper end the outer one comes first
        if loop.source.row != loop.target.row:
            loop.lanes = (loop.lanes[0], rows[loop.target.row].lane(0, _ports(loop, node_width)[1]))


def _narrow(loop: _Loop) -> bool:
    """Whether its line is too short for the label, which then stands beside it."""
    return loop.source.row != loop.target.row and loop.source.x == loop.left


def _ports(loop: _Loop, node_width: float) -> tuple[float, float]:
    """Where a loop leaves its module and where it enters its target, in x."""
    return loop.source.x + node_width / 2 - 14, loop.target.x + node_width / 2 + 14


def _stack(rows: list[_Row]) -> float:
    """Give every row its y, and return the height of all."""
    y = float(_PAD)
    for number, row in enumerate(rows):
        if row.caption is not None:
            y += _CAPTION
        if row.nodes:
            row.y = y + _CHIP
            for node in row.nodes:
                node.axis = row.y + row.up
            y = row.bottom
        if number + 1 < len(rows):
            y += _ROW_GAP if any(later.nodes for later in rows[number + 1 :]) and row.nodes else 4
    return y + _PAD


# -- drawing ----------------------------------------------------------------------------------------------------------


def graph(state: RunState, format: Literal["svg", "mermaid", "text"] = "svg", *, live: bool = False) -> str:
    """The steps of a run and how they stand.

    Parameters
    ----------
    state
        The run; ``state_of(workflow)`` of ``state.py`` draws a workflow that has not started.
    format
        ``"svg"``: a document with one element a line. ``"mermaid"``: a flowchart. ``"text"``: lines of arrows.
    live
        For inline use: each step is a focusable button with ``data-step``, and the picture a group of them.
    """
    if format == "mermaid":
        return _mermaid(state)
    if format == "text":
        return _text(state)
    check_format(format)
    plan = _place(state)
    said = f' role="{"group" if live else "img"}" aria-label="{_esc(describe(state))}"'
    return "\n".join(_draw(state, plan, live, said))


def check_format(format: str) -> None:
    """Refuse a format that no picture has.

    Raises
    ------
    WorkflowError    It is none of those.
    """
    if format not in (formats := ("svg", "mermaid", "text")):
        raise WorkflowError(f"format={format!r} is not known. {did_you_mean(format, formats, 'Formats')}")


def graph_img(state: RunState) -> str:
    """The picture as an ``<img>`` for saved notebooks, with its meaning in words as ``alt``."""
    plan = _place(state)
    return as_img(_draw(state, plan, live=False, said=""), plan.width, plan.height, describe(state))  # words: ``alt``


def as_img(lines: Iterable[str], width: float, height: float, alt: str) -> str:
    """A picture of these lines that survives where SVG and style sheets are taken out."""
    uri = "\n".join(urllib.parse.quote(line.replace('"', "'"), safe="/:;=,'()!*~$@+?") for line in lines)
    return (
        f'<img width="{width:.0f}" height="{height:.0f}" style="max-width:100%;height:auto"\n'
        f'alt="{html.escape(alt)}"\n'
        f'src="data:image/svg+xml;charset=utf-8,{uri}">'
    )


def describe(state: RunState) -> str:
    """The picture in words: ``Workflow builder: planner approved; reviewer waiting, gate; deployer pending.``."""
    parts = []
    for step in state.order:
        node = _node(state, step)
        stops = ", gate" if _chips(state, step) else ""
        inside = ", ".join(f"{one.name} {one.look.word}".rstrip() for one in node.members)
        parts.append(f"{step.id} {node.words}{stops}" + (f" ({inside})" if inside else ""))
    text = f"Workflow {one_line(state.name, 80)}: {'; '.join(parts) or 'no steps'}."
    for step in state.order:
        if isinstance(step.step, Module):
            text += f" {step.id} may go back to {_back_to(state, step).id}, {loop_limit(step)}."
    return _xml_text(text)


def _xml_text(text: str) -> str:
    return text.replace("\ufffe", "").replace("\uffff", "")  # the two that XML does not know


def _esc(text: str) -> str:
    return html.escape(_xml_text(text))


def _draw(state: RunState, plan: _Plan, live: bool, said: str) -> list[str]:
    width, height = f"{plan.width:.0f}", f"{plan.height:.0f}"
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}"{said}>',
        f'<rect width="{width}" height="{height}" rx="8" fill="{PLATE}"/>',
    ]
    before: _Node | None = None
    for row in plan.rows:
        if row.caption is not None:
            lines += _caption(row, plan)
        for node in row.nodes:
            if before is not None:
                lines += _arrows(before, node, plan)
            before = node
    for loop in plan.loops:
        lines += _arc(loop, plan)
    for node in plan.nodes.values():
        lines += _stack_head(state, node, plan, live) if node.fans else _box(state, node, plan, live)
        lines += _member_boxes(node, plan, live)
    if not live:  # the page that shows it live has `live_css`; always the same, so that a step forward changes nothing
        lines[1:1] = dark_style()
    return [*lines, "</svg>"]


def dark_style() -> list[str]:
    """The style sheet that gives a picture its dark colours on a dark page."""
    fills, strokes = _recolour("", "{1}")
    return [f"<style>@media (prefers-color-scheme:dark){{{fills}", f"{strokes}}}</style>"]


def _recolour(place: str, colour: str) -> list[str]:
    """CSS, for fills and for strokes: for each colour below `place`, what `colour` makes of it and its dark twin."""
    pairs = [("fill", DARK_GROUNDS | DARK_INKS), ("stroke", DARK_INKS)]
    return [
        "".join(f"{place}[{name}='{light}']{{{name}:{colour.format(light, dark)}}}" for light, dark in twins.items())
        for name, twins in pairs
    ]


def live_css(place: str) -> str:
    """The style sheet that gives live pictures below `place`, a CSS selector, their dark colours on a dark page."""
    return "\n".join(_recolour(f"{place} ", "light-dark({0},{1})"))


def _caption(row: _Row, plan: _Plan) -> list[str]:
    base = (row.y - _CHIP if row.nodes else plan.height - _PAD) - 6
    text = shorten(row.caption or "", plan.width - plan.left - _PAD - 30, _SMALL_PX)
    start = plan.left + (text_width(text, _SMALL_PX) + 8 if text else 0)
    lines = [f'<path d="M{start:.0f} {base - 3.5:.1f}H{plan.width - _PAD:.0f}" fill="none" stroke="{LINE}"/>']
    if text:
        lines.append(_label(plan.left, base, text, _SMALL_PX, FAINT))
    return lines


def _label(x: float, y: float, text: str, px: float, colour: str, extra: str = "") -> str:
    return f'<text x="{x:g}" y="{y:g}" {_FONT} font-size="{px:g}" fill="{colour}"{extra}>{_esc(text)}</text>'


_TIP = "m-6 -4l6 4l-6 4"


def _line(path: str) -> str:
    return f'<path d="{path}" fill="none" stroke="{LINE}" stroke-width="1.4"/>'


def _arrows(a: _Node, b: _Node, plan: _Plan) -> list[str]:
    """From a step to the next: straight, or around to the beginning of the next row; from and to each of a stack."""
    x1, x2 = a.x + plan.node_width + 2, b.x - 3
    if a.row == b.row and not (a.fans and b.fans):
        return [_line(_curve(x1, y1, x2, y2) + _TIP) for y1 in a.ports() for y2 in b.ports()]
    out, into = x1 + 8, x2 - 11  # where the lines of a stack are one
    if a.row == b.row:
        out = into = (x1 + x2) / 2
    lines = [_line(_curve(x1, y, out, a.axis)) for y in a.ports()] if a.fans else []
    if a.row != b.row:
        start, right = (out, out) if a.fans else (x1, x1 + 2)
        left, stop = (into, f"H{into:g}") if b.fans else (x2 - 3, f"H{x2:g}{_TIP}")
        across = f"M{start:g} {a.axis:g}H{right:g}q6 0 6 6V{_turn(a, b, plan) - 6:g}q0 6 -6 6"
        lines.append(_line(f"{across}H{left:g}q-6 0 -6 6V{b.axis - 6:g}q0 6 6 6{stop}"))
    return lines + ([_line(_curve(into, b.axis, x2, y) + _TIP) for y in b.ports()] if b.fans else [])


def _curve(x1: float, y1: float, x2: float, y2: float) -> str:
    """From one point to another, level at both ends."""
    if y1 == y2:
        return f"M{x1:g} {y1:g}H{x2:g}"
    middle = (x1 + x2) / 2
    return f"M{x1:g} {y1:g}C{middle:g} {y1:g} {middle:g} {y2:g} {x2:g} {y2:g}"


def _turn(a: _Node, b: _Node, plan: _Plan) -> float:
    """The y between two rows, below the loops of the upper one and above the caption of the lower one."""
    row, lower = plan.rows[a.row], plan.rows[b.row]
    top = lower.y - _CHIP - (_CAPTION if lower.caption is not None else 0)
    return (row.bottom + top) / 2 + (0 if lower.caption is not None else 2)


def _arc(loop: _Loop, plan: _Plan) -> list[str]:
    """Back from a module to where it repeats from, below the nodes, with what it may do written on it."""
    out, into = _ports(loop, plan.node_width)
    low, ends = loop.source.bottom, loop.target.bottom
    row, upper = plan.rows[loop.source.row], plan.rows[loop.target.row]
    y = row.y + row.height + 12 + loop.lanes[0] * _LANE
    colour = AMBER if loop.active else FAINT
    if loop.source.row == loop.target.row:
        path = f"M{out:g} {low + 1:g}V{y - 6:g}q0 6 -6 6H{into + 6:g}q-6 0 -6 -6V{ends + 3:g}"
        start = into
    else:
        start = plan.left - 24 - 7 * loop.margin
        y2 = upper.y + upper.height + 12 + loop.lanes[1] * _LANE
        path = (
            f"M{out:g} {low + 1:g}V{y - 6:g}q0 6 -6 6H{start + 6:g}q-6 0 -6 -6V{y2 + 6:g}q0 -6 6 -6"
            f"H{into - 6:g}q6 0 6 -6V{ends + 3:g}"
        )
    wide = text_width(loop.label, _SMALL_PX) + 8
    line = f'<path d="{path}m-4 6l4 -6l4 6" fill="none" stroke="{colour}" stroke-width="1.4"/>'
    if _narrow(loop):
        return [line, _label(out + 6, y + 3.5, loop.label, _SMALL_PX, colour)]
    middle = out - min((out - start) / 2, wide / 2 + 16)  # near its module: no other line comes from above there
    return [
        line,
        f'<rect x="{middle - wide / 2:g}" y="{y - 7:g}" width="{wide:g}" height="14" fill="{PLATE}"/>',
        _label(middle, y + 3.5, loop.label, _SMALL_PX, colour, ' text-anchor="middle"'),
    ]


def _is_current(state: RunState, node: _Node) -> bool:
    return node.step is state.current and state.ended is None and bool(state.run_id)


def _box(state: RunState, node: _Node, plan: _Plan, live: bool) -> list[str]:
    paint, x, y, width = PAINTS[node.look.tone], node.x, node.axis - _HEIGHT / 2, plan.node_width
    line, current = AMBER if node.step.stale else paint.line, _is_current(state, node)
    name = shorten(node.step.id, width - _TEXT_X - 7, _NAME_PX, bold=True)
    words = shorten(node.short, width - _TEXT_X - 8, _WORD_PX)
    dashes = ' stroke-dasharray="5 3"' if node.step.stale else ""
    fill = paint.fill if current or node.look.tone in ("running", "failed") else "#ffffff"
    chips = _chips(state, node.step)
    lines = [f"<g{_button(node, chips) if live else ''}>"]
    if name != node.step.id or words != node.words:
        lines.append(f"<title>{_esc(f'{node.step.id}: {node.words}')}</title>")
    lines += [
        f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{_HEIGHT}" rx="{_RADIUS}" fill="{fill}" '
        f'stroke="{line}" stroke-width="{2.4 if current else 1.3}"{dashes}/>',
        *_label_lines(node, x + 10, y, line, name, words, current),
    ]
    for place, is_open in chips:
        lines += _chip(x + 8 if place == "before" else x + width - 40, y - 10, is_open)
    return [*lines, "</g>"]


def _label_lines(node: _Node, x: float, y: float, line: str, name: str, words: str, current: bool) -> list[str]:
    """Icon, name and state of a step."""
    return [
        f'<g transform="translate({x:g},{y + _HEIGHT / 2 - 6:g})">{_ICONS[node.look.tone].format(line)}</g>',
        _label(x + _TEXT_X - 10, y + 18.5, name, _NAME_PX, INK, ' font-weight="600"' if current else ""),
        _label(x + _TEXT_X - 10, y + 32.5, words, _WORD_PX, line),
    ]


def _stack_head(state: RunState, node: _Node, plan: _Plan, live: bool) -> list[str]:
    """What stands above the agents of a parallel step: its name and how it stands."""
    x, y, width = node.x, node.axis - node.up - 6, plan.node_width
    line, chips = AMBER if node.step.stale else PAINTS[node.look.tone].line, _chips(state, node.step)
    room = width - _TEXT_X + 6 - (36 if chips else 0)
    name, words = (
        shorten(text, room, px, bold=True) for text, px in ((node.step.id, _NAME_PX), (node.short, _WORD_PX))
    )
    lines = [f"<g{_button(node, chips) if live else ''}>"]
    if name != node.step.id or words != node.words:
        lines.append(f"<title>{_esc(f'{node.step.id}: {node.words}')}</title>")
    lines += _label_lines(node, x + 2, y, line, name, words, _is_current(state, node))
    for _place, is_open in chips:
        lines += _chip(x + width - 32, y + 9, is_open)
    return [*lines, "</g>"]


def _member_boxes(node: _Node, plan: _Plan, live: bool) -> list[str]:
    """The agents of a parallel step, or below a step those that it has called."""
    lines = []
    inset = 0 if node.fans else _INDENT
    for top, one in zip(node.tops(), node.members, strict=True):
        paint, x, width = PAINTS[one.look.tone], node.x + inset, plan.node_width - inset
        if inset:
            start = node.axis + _HEIGHT / 2 + 1
            lines.append(_line(f"M{node.x + 8:g} {start:g}V{top + _MEMBER / 2 - 5:g}q0 5 5 5H{x - 1:g}"))
        word = shorten(one.look.word, _WORD, _SMALL_PX)
        name = shorten(one.name, width - 36 - text_width(word, _SMALL_PX), _WORD_PX)
        said = f"{one.name}: {one.look.word}".rstrip(": ")
        lines.append(f"<g{_button_for(one.path, said) if live and one.path else ''}>")
        if name != one.name or word != one.look.word:
            lines.append(f"<title>{_esc(said)}</title>")
        fill = paint.fill if one.look.tone in ("running", "failed", "waiting") else "#ffffff"
        lines += [
            f'<rect x="{x:g}" y="{top:g}" width="{width:g}" height="{_MEMBER}" rx="6" fill="{fill}" '
            f'stroke="{paint.line}" stroke-width="1.2"/>',
            f'<g transform="translate({x + 8:g},{top + 8:g}) scale(0.85)">',
            f"{_ICONS[one.look.tone].format(paint.line)}</g>",
            _label(x + 23, top + 17, name, _WORD_PX, INK),
        ]
        if word:
            lines.append(_label(x + width - 8, top + 17, word, _SMALL_PX, paint.line, ' text-anchor="end"'))
        lines.append("</g>")
    return lines


def _button(node: _Node, chips: list[tuple[str, bool]]) -> str:
    said = f"{node.step.id}: {node.words}{', gate' if chips else ''}"
    return _button_for(node.step.id, said)


def _button_for(path: str, said: str) -> str:
    return f' data-step="{_esc(path)}" tabindex="0" role="button" aria-label="{_esc(said)}"'


def _chips(state: RunState, step: StepState) -> list[tuple[str, bool]]:
    """Where the run will stop at `step`, or does: (``before`` or ``after``, whether that gate is open)."""
    if step.gate is not None:
        return [("before" if step.gate.kind == "start" else "after", True)]
    places: tuple[Literal["before", "after"], ...] = ("before", "after")
    return [(place, False) for place in places if will_stop(state, step, place)]


def _chip(x: float, y: float, is_open: bool) -> list[str]:
    fill, ink = (AMBER, "#ffffff") if is_open else ("#fff6d6", AMBER)
    return [
        f'<rect x="{x:g}" y="{y:g}" width="32" height="15" rx="7.5" fill="{fill}" stroke="{AMBER}"/>',
        _label(x + 16, y + 11, "gate", _SMALL_PX, ink, ' text-anchor="middle"'),
    ]


# -- other formats ----------------------------------------------------------------------------------------------------


def _mermaid(state: RunState) -> str:
    lines = ["flowchart LR"]
    names = {step.id: f"s{step.index + 1}" for step in state.order}
    for step in state.order:
        node = _node(state, step)
        stops = ", gate" if _chips(state, step) else ""
        shape = ("{{", "}}") if isinstance(step.step, Module) else ("[", "]")
        if node.fans:
            lines.append(f'  subgraph {names[step.id]}["{step.id}: {node.words}{stops}"]')
            lines += [f"    {line}" for line in _mermaid_members(names[step.id], node)]
            lines.append("  end")
            continue
        lines.append(f'  {names[step.id]}{shape[0]}"{step.id}<br/>{node.words}{stops}"{shape[1]}')
        lines += [f"  {names[step.id]} -.-> {line}" for line in _mermaid_members(names[step.id], node)]
    pairs = zip(state.order, state.order[1:], strict=False)
    lines += [f"  {names[a.id]} --> {names[b.id]}" for a, b in pairs]
    for step in state.order:
        if isinstance(step.step, Module):
            lines.append(f'  {names[step.id]} -. "again, {loop_limit(step)}" .-> {names[_back_to(state, step).id]}')
    return "\n".join(lines)


def _mermaid_members(step: str, node: _Node) -> list[str]:
    return [f'{step}m{number}["{one.name}<br/>{one.look.word}"]' for number, one in enumerate(node.members, 1)]


def _text(state: RunState) -> str:
    lines, line = [], ""
    for item in state.items:
        if isinstance(item, Separator):
            lines += [line] if line else []
            lines.append(f"-- {one_line(item.text, 80)}".rstrip())
            line = "   " if line else ""
            continue
        step = state.steps[item.id]
        stops = "?" if _chips(state, step) else ""
        node = _node(state, step)
        part = f"{step.id}{stops} ({node.words})"
        inside = [f"{one.name} ({one.look.word})" if one.look.word else one.name for one in node.members]
        if inside:
            part += f" [{' | '.join(inside)}]" if node.fans else f" calls {', '.join(inside)}"
        if isinstance(item, Module):
            part += f" [again from {_back_to(state, step).id}, {loop_limit(step)}]"
        arrow = "-> " if step.index else ""
        if line.strip() and len(line) + len(arrow) + len(part) > 100:
            lines.append(line)
            line = "   "
        line += f"{' ' if line.strip() else ''}{arrow}{part}"
    return "\n".join([*lines, line] if line.strip() else lines) or f"{one_line(state.name, 80)}: no steps"
