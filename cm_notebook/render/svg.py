"""The run as a picture: steps from left to right, in rows when there are many; and the same as Mermaid or as text.

Strategy: place, then draw. ``_place`` puts steps, captions and loop arcs on a plane from an estimate of text widths
that errs on the wide side (we cannot ask a browser). ``_draw`` turns each into SVG elements, one a line.

The picture must survive places that strip style sheets: presentation attributes, and one light plate behind everything
that carries its own colours. Where style sheets are kept, a dark page gets each colour's dark twin: browsers tell
an image the colour scheme of the page around it. Text reaches 4.5 : 1 and lines 3 : 1 on what they lie on, in both
(tested). State is an icon *and* a word; icons are paths, because fonts show many symbols as boxes. The places depend on
the names alone, so that nothing jumps while the run goes on. Same state, same bytes.

``graph_img`` wraps the SVG for saved notebooks: an ``<img>`` with a percent-encoded data URI, one element a line, so
that a diff shows which step changed. Browsers drop line breaks in a URI before they read it.
"""

from __future__ import annotations

import html
import urllib.parse
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, cast

from ..state import RunState, StepState
from ..workflow import Module, Parallel, Separator
from .text import Look, Tone, look, loop_limit, one_line, team_words, will_stop

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
_MEMBER, _MEMBERS = 16, 6
"""Height of a line for who works in a parallel step, and how many there are at most."""
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


@dataclass(slots=True)
class _Node:
    step: StepState
    look: Look
    words: str
    members: list[tuple[str, Look]] = field(default_factory=list)
    """Of a parallel step: who works in it, and how that stands."""
    row: int = 0
    x: float = 0.0
    y: float = 0.0

    @property
    def height(self) -> int:
        """By the number of names alone."""
        return _HEIGHT + (_MEMBER * len(self.members) + 4 if self.members else 0)


@dataclass(slots=True)
class _Row:
    caption: str | None = None
    """Text of the separator above it; ``""`` for a bare line."""
    nodes: list[_Node] = field(default_factory=list)
    taken: list[tuple[int, float, float]] = field(default_factory=list)
    """Stretches of the lanes below it that loops run through: lane, from, to."""
    y: float = 0.0

    @property
    def height(self) -> int:
        """Of its highest node."""
        return max((node.height for node in self.nodes), default=0)

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
    left: float
    width: float
    height: float


def _place(state: RunState) -> _Plan:
    nodes = {step.id: _node(state, step) for step in state.order}
    # By the names alone: words of state come and go, and the picture must not jump.
    names = [*nodes, *(name for node in nodes.values() for name, _look in node.members)]
    needed = max((text_width(name, _NAME_PX, bold=True) for name in names), default=0) + _TEXT_X + 8
    node_width = round(min(max(needed, _NODE_MIN), _NODE_MAX))
    one_row = int((WIDTH - 2 * _PAD + _GAP) // (node_width + _GAP))
    fits = max(1, int((WIDTH - 2 * _PAD - 26 + _GAP) // (node_width + _GAP)))
    rows = _rows(state, nodes, len(nodes) if len(nodes) <= one_row and not _has_captions(state) else fits)
    for number, row in enumerate(rows):
        for node in row.nodes:
            node.row = number
    loops = [_loop(state, nodes, module) for module in state.order if isinstance(module.step, Module)]
    climbing = [loop for loop in loops if loop.source.row != loop.target.row]
    for number, loop in enumerate(sorted(climbing, key=lambda loop: loop.source.step.index - loop.target.step.index)):
        loop.margin = number
    several = sum(1 for row in rows if row.nodes) > 1
    left = _PAD + (14 if several else 0) + (12 + 7 * (len(climbing) - 1) if climbing else 0)
    for row in rows:
        for column, node in enumerate(row.nodes):
            node.x = left + column * (node_width + _GAP)
    for loop in loops:
        loop.left = left
    _take_lanes(rows, sorted(loops, key=lambda loop: loop.source.step.index - loop.target.step.index), node_width)
    height = _stack(rows)
    longest = max((len(row.nodes) for row in rows), default=0)
    width = left + longest * (node_width + _GAP) - _GAP + _PAD + (12 if several else 0)
    captions = max((text_width(row.caption or "", _SMALL_PX) for row in rows), default=0) + left + _PAD + 40
    return _Plan(rows, nodes, loops, node_width, left, max(width, min(captions, WIDTH), 120), height)


def _node(state: RunState, step: StepState) -> _Node:
    seen = look(state, step)
    again = f", pass {step.iteration}" if step.iteration > 1 and not step.settled else ""
    team = f", {team_words(step)}" if step.status == "calling" else ""
    return _Node(step, seen, seen.word + again + team, _members(state, step))


def _members(state: RunState, step: StepState) -> list[tuple[str, Look]]:
    if not isinstance(step.step, Parallel):
        return []
    called = {member.id: look(state, member) for member in step.last.members} if step.last is not None else {}
    names = step.step.members
    few = names if len(names) <= _MEMBERS else names[: _MEMBERS - 1]
    found = [(name, called.get(name, Look("pending", "pending"))) for name in few]
    if more := names[len(few) :]:
        tones = {called[name].tone if name in called else "pending" for name in more}
        tone: Tone = next((one for one in ("failed", "waiting", "running", "pending") if one in tones), "done")
        found.append((f"{len(more)} more", Look("", tone)))
    return found


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
            y += _CHIP
            row.y = y
            for node in row.nodes:
                node.y = y
            y += row.height + (row.lanes * _LANE + 6 if row.lanes else 0)
        if number + 1 < len(rows):
            y += _ROW_GAP if any(later.nodes for later in rows[number + 1 :]) and row.nodes else 4
    return y + _PAD


# -- drawing ----------------------------------------------------------------------------------------------------------


def graph(state: RunState, format: Literal["svg", "mermaid", "text"] = "svg", *, live: bool = False) -> str:
    """The steps of a run and how they stand.

    Parameters
    ----------
    state
        The run; ``RunState.of(workflow)`` draws a workflow that has not started.
    format
        ``"svg"``: a document with one element a line. ``"mermaid"``: a flowchart. ``"text"``: lines of arrows.
    live
        For inline use: each step is a focusable button with ``data-step``, and the picture a group of them.
    """
    if format == "mermaid":
        return _mermaid(state)
    if format == "text":
        return _text(state)
    if format != "svg":
        raise ValueError(f"graph format {format!r} is not known. Use 'svg', 'mermaid' or 'text'.")
    plan = _place(state)
    said = f' role="{"group" if live else "img"}" aria-label="{_esc(describe(state))}"'
    return "\n".join(_draw(state, plan, live, said))


def graph_img(state: RunState) -> str:
    """The picture as an ``<img>`` for saved notebooks, with its meaning in words as ``alt``."""
    plan = _place(state)
    lines = [line.replace('"', "'") for line in _draw(state, plan, live=False, said="")]  # its words are the ``alt``
    uri = "\n".join(urllib.parse.quote(line, safe="/:;=,'()!*~$@+?") for line in lines)
    return (
        f'<img width="{plan.width:.0f}" height="{plan.height:.0f}" style="max-width:100%;height:auto"\n'
        f'alt="{html.escape(describe(state))}"\n'
        f'src="data:image/svg+xml;charset=utf-8,{uri}">'
    )


def describe(state: RunState) -> str:
    """The picture in words: ``Workflow builder: planner approved; reviewer waiting, gate; deployer pending.``."""
    parts = []
    for step in state.order:
        node = _node(state, step)
        stops = ", gate" if _chips(state, step) else ""
        inside = ", ".join(f"{name} {seen.word}".rstrip() for name, seen in node.members)
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
                lines.append(_arrow(before, node, plan))
            before = node
    for loop in plan.loops:
        lines += _arc(loop, plan)
    for node in plan.nodes.values():
        lines += _box(state, node, plan, live)
    if not live:  # the page that shows it live has `live_css`; always the same, so that a step forward changes nothing
        fills, strokes = _recolour("", "{1}")
        lines[1:1] = [f"<style>@media (prefers-color-scheme:dark){{{fills}", f"{strokes}}}</style>"]
    return [*lines, "</svg>"]


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


def _arrow(a: _Node, b: _Node, plan: _Plan) -> str:
    """From a step to the next: straight, or around to the beginning of the next row."""
    x1, y1, y2 = a.x + plan.node_width, a.y + _HEIGHT / 2, b.y + _HEIGHT / 2
    head = "m-6 -4l6 4l-6 4"
    if a.row == b.row:
        path = f"M{x1 + 2:g} {y1:g}H{b.x - 3:g}{head}"
    else:
        right, between = x1 + 10, _turn(a, b, plan)
        path = (
            f"M{x1 + 2:g} {y1:g}H{right - 6:g}q6 0 6 6V{between - 6:g}q0 6 -6 6"
            f"H{b.x - 6:g}q-6 0 -6 6V{y2 - 6:g}q0 6 6 6H{b.x - 3:g}{head}"
        )
    return f'<path d="{path}" fill="none" stroke="{LINE}" stroke-width="1.4"/>'


def _turn(a: _Node, b: _Node, plan: _Plan) -> float:
    """The y between two rows, below the loops of the upper one and above the caption of the lower one."""
    row, lower = plan.rows[a.row], plan.rows[b.row]
    bottom = a.y + row.height + (row.lanes * _LANE + 6 if row.lanes else 0)
    top = lower.y - _CHIP - (_CAPTION if lower.caption is not None else 0)
    return (bottom + top) / 2 + (0 if lower.caption is not None else 2)


def _arc(loop: _Loop, plan: _Plan) -> list[str]:
    """Back from a module to where it repeats from, below the nodes, with what it may do written on it."""
    out, into = _ports(loop, plan.node_width)
    low, ends = loop.source.y + loop.source.height, loop.target.y + loop.target.height
    y = loop.source.y + plan.rows[loop.source.row].height + 12 + loop.lanes[0] * _LANE
    colour = AMBER if loop.active else FAINT
    if loop.source.row == loop.target.row:
        path = f"M{out:g} {low + 1:g}V{y - 6:g}q0 6 -6 6H{into + 6:g}q-6 0 -6 -6V{ends + 3:g}"
        start = into
    else:
        start = plan.left - 24 - 7 * loop.margin
        y2 = loop.target.y + plan.rows[loop.target.row].height + 12 + loop.lanes[1] * _LANE
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


def _box(state: RunState, node: _Node, plan: _Plan, live: bool) -> list[str]:
    paint, x, y, width = PAINTS[node.look.tone], node.x, node.y, plan.node_width
    line = AMBER if node.step.stale else paint.line
    current = node.step is state.current and state.ended is None and bool(state.run_id)
    name = shorten(node.step.id, width - _TEXT_X - 7, _NAME_PX, bold=True)
    words = shorten(node.words, width - _TEXT_X - 8, _WORD_PX)
    dashes = ' stroke-dasharray="5 3"' if node.step.stale else ""
    fill = paint.fill if current or node.look.tone in ("running", "failed") else "#ffffff"
    chips = _chips(state, node.step)
    lines = [f"<g{_button(node, chips) if live else ''}>"]
    if name != node.step.id or words != node.words:
        lines.append(f"<title>{_esc(f'{node.step.id}: {node.words}')}</title>")
    lines += [
        f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{node.height}" rx="{_RADIUS}" fill="{fill}" '
        f'stroke="{line}" stroke-width="{2.4 if current else 1.3}"{dashes}/>',
        f'<g transform="translate({x + 10:g},{y + _HEIGHT / 2 - 6:g})">{_ICONS[node.look.tone].format(line)}</g>',
        _label(x + _TEXT_X, y + 18.5, name, _NAME_PX, INK, ' font-weight="600"' if current else ""),
        _label(x + _TEXT_X, y + 32.5, words, _WORD_PX, line),
    ]
    for number, (member, seen) in enumerate(node.members):
        below = y + _HEIGHT + number * _MEMBER
        colour = PAINTS[seen.tone].line
        icon = f"translate({x + _TEXT_X:g},{below + 1:g}) scale(0.8)"
        lines.append(f'<g transform="{icon}">{_ICONS[seen.tone].format(colour)}</g>')
        shown = shorten(member, width - _TEXT_X - 22, _WORD_PX)
        lines.append(_label(x + _TEXT_X + 14, below + 9.5, shown, _WORD_PX, INK))
    for place, is_open in chips:
        lines += _chip(x + 8 if place == "before" else x + width - 40, y - 10, is_open)
    return [*lines, "</g>"]


def _button(node: _Node, chips: list[tuple[str, bool]]) -> str:
    said = f"{node.step.id}: {node.words}{', gate' if chips else ''}"
    return f' data-step="{_esc(node.step.id)}" tabindex="0" role="button" aria-label="{_esc(said)}"'


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
        if node.members:
            lines.append(f'  subgraph {names[step.id]}["{step.id}: {node.words}{stops}"]')
            for number, (name, seen) in enumerate(node.members, 1):
                lines.append(f'    {names[step.id]}m{number}["{name}<br/>{seen.word}"]')
            lines.append("  end")
            continue
        lines.append(f'  {names[step.id]}{shape[0]}"{step.id}<br/>{node.words}{stops}"{shape[1]}')
    pairs = zip(state.order, state.order[1:], strict=False)
    lines += [f"  {names[a.id]} --> {names[b.id]}" for a, b in pairs]
    for step in state.order:
        if isinstance(step.step, Module):
            lines.append(f'  {names[step.id]} -. "again, {loop_limit(step)}" .-> {names[_back_to(state, step).id]}')
    return "\n".join(lines)


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
        part = f"{step.id}{stops} ({_node(state, step).words})"
        if isinstance(item, Parallel):
            part += f" [{' | '.join(f'{name} ({seen.word})' for name, seen in _members(state, step))}]"
        if isinstance(item, Module):
            part += f" [again from {_back_to(state, step).id}, {loop_limit(step)}]"
        arrow = "-> " if step.index else ""
        if line.strip() and len(line) + len(arrow) + len(part) > 100:
            lines.append(line)
            line = "   "
        line += f"{' ' if line.strip() else ''}{arrow}{part}"
    return "\n".join([*lines, line] if line.strip() else lines)
