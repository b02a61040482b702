"""When what happened: a row for each step and each agent that was called, with a bar for each attempt.

Strategy: the events are applied one after the other; what they begin and end becomes ``Span``s: work, waiting for a
person, for a team, for a second try. The axis counts the time in which something was at work or tried again. Where the
run only waited for a person, or was not there at all, the axis has a *break* of fixed width with its length in words: a
night at a gate does not squeeze the minutes of work into a line. SVG, text and Mermaid are drawn from the same spans.

A run from a tape has no clock of its own: each turn takes what was recorded, in the order of the run; agents side by
side begin together, as far as there was a place for them. So the same tape gives the same bytes each time.
"""

from __future__ import annotations

import heapq
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from ..events import (
    AgentsCalled,
    AgentsReturned,
    AnyEvent,
    GateDecided,
    GateOpened,
    RunFinished,
    RunResumed,
    TurnCutShort,
    TurnFailed,
    TurnFinished,
    TurnStarted,
)
from ..runstate import Attempt, RunState, StepState, gate_path
from ..state import apply
from ..workflow import Parallel
from . import svg
from . import text as say
from .text import Tone, duration, lane_name, one_line

Kind = Literal["work", "person", "team", "again"]


@dataclass(slots=True)
class Span:
    """Something that lasted: what it was, from when to when in seconds, and how it ended."""

    kind: Kind
    start: float
    end: float
    tone: Tone = "running"
    word: str = ""
    number: int = 0
    """Of its attempt."""


@dataclass(slots=True)
class Row:
    """A step, or below it an agent that was called."""

    path: str
    name: str
    depth: int
    spans: list[Span] = field(default_factory=list)


class Break(NamedTuple):
    """Where nothing was at work: when, how long (``None``: a tape does not say), and for whom the run waited."""

    at: float
    seconds: float | None
    why: Literal["person", ""]


@dataclass(slots=True)
class Timeline:
    """Rows from top to bottom, and where the axis is broken; times count work alone."""

    rows: list[Row]
    breaks: list[Break]
    end: float


def timeline(events: Iterable[AnyEvent], now: float | None = None) -> tuple[RunState, Timeline]:
    """When what happened, and the state that it led to.

    Parameters
    ----------
    now
        Unix seconds: how far what still runs has come; ``None``: until the last event.
    """
    state, story = RunState(), _Story()
    for event in events:
        apply(state, event)
        story.hear(state, event)
    rows = _taped(state) if state.recorded is not None else story.rows(state, max(state.at, now or 0.0))
    return state, _without_pauses(state, rows, recorded=state.recorded is not None)


class _Story:
    """Spans as they begin and end, by path; with the clock of the machine."""

    def __init__(self) -> None:
        self.spans: dict[str, list[Span]] = {}
        self.open: dict[str, Span] = {}
        self._last = 0.0

    def hear(self, state: RunState, event: AnyEvent) -> None:
        """Begin and end what `event`, which was applied, begins and ends."""
        if isinstance(event, (TurnStarted, AgentsCalled, AgentsReturned)):
            kind: Kind = "team" if isinstance(event, AgentsCalled) else "work"
            step = state.find(event.path)
            if isinstance(event, AgentsReturned) and step.path not in state.running:
                self._end(event.path, event.at)
            else:
                self._begin(event.path, kind, event.at, step.attempt)
        elif isinstance(event, TurnFailed) and event.retry_in_s is not None:
            self._begin(event.path, "again", event.at, event.attempt)
        elif isinstance(event, (TurnFinished, TurnFailed, TurnCutShort)):
            self._end(event.path, event.at)
        elif isinstance(event, GateOpened):
            self._begin(event.gate.path, "person", event.at, event.gate.attempt)
        elif isinstance(event, GateDecided):
            path = gate_path(event.gate_id)
            self._end(path, event.at)
            if path in state.running:  # a question was answered
                self._begin(path, "work", event.at, state.running[path].attempt)
        elif isinstance(event, (RunFinished, RunResumed)):
            for path in list(self.open):  # of a process that died nobody knows more than its last event
                self._end(path, self._last if isinstance(event, RunResumed) else event.at)
        self._last = event.at

    def _begin(self, path: str, kind: Kind, at: float, number: int) -> None:
        self._end(path, at)
        self.open[path] = Span(kind, at, at, number=number)
        self.spans.setdefault(path, []).append(self.open[path])

    def _end(self, path: str, at: float) -> None:
        if (span := self.open.pop(path, None)) is not None:
            span.end = max(span.start, at)

    def rows(self, state: RunState, until: float) -> list[Row]:
        for span in self.open.values():
            span.end = max(span.start, until)
        return list(_rows(state, self.spans))


def _rows(state: RunState, spans: dict[str, list[Span]]) -> Iterable[Row]:
    for step in state.order:
        for depth, one in [(0, step), *say.team(step)]:
            found = spans.get(one.path, [])
            retried = {span.start for span in found if span.kind == "again"}
            does = "team" if isinstance(one.step, Parallel) else "work"
            for attempt in one.attempts:
                mine = [span for span in found if span.number == attempt.number and span.kind == does]
                for span in mine:
                    again = span.end in retried
                    span.tone, span.word = ("failed", "tried again") if again else ("done", "")
                if mine and not mine[-1].word:  # how it ended is said of its last piece
                    mine[-1].tone, mine[-1].word = _ending(state, one, attempt)
                    for span in mine:
                        span.tone = span.tone if span.word else mine[-1].tone
            yield Row(one.path, lane_name(one), depth, found)


_TONES: dict[str, Tone] = {"failed": "failed", "cut short": "failed", "rejected": "waiting", "sent back": "waiting"}


def _ending(state: RunState, step: StepState, attempt: Attempt) -> tuple[Tone, str]:
    """How an attempt ended, as a colour and in words."""
    if attempt.ended_at is None and attempt is step.last and step.path in state.running:
        return "running", "running"
    word = say.attempt_word(state, step, attempt)
    if attempt.verdict is not None and attempt.verdict.action == "loop":
        return "waiting", word
    if attempt.decision is not None and attempt.decision.action in ("retry", "skip") and attempt.answer is None:
        return "failed", f"failed, {word}"
    if word == "replaced" and attempt.decision is not None:
        return "done", "edited"
    return _TONES.get(word, "done"), word or "done"


# -- of a tape --------------------------------------------------------------------------------------------------------


def _taped(state: RunState) -> list[Row]:
    """Spans of what was recorded, laid out one after the other."""
    spans: dict[str, list[Span]] = {}
    turns = [
        (attempt.turns[0] if attempt.turns else _first(attempt), step, attempt)
        for step in state.order
        for attempt in step.attempts
        if not attempt.edited
    ]
    at = 0.0
    for _seq, step, attempt in sorted(turns, key=lambda turn: turn[0]):
        at = _lay(state, spans, step, attempt, at)
        if attempt.decision is not None:
            spans[step.path].append(Span("person", at, at, number=attempt.number))
    return list(_rows(state, spans))


def _first(attempt: Attempt) -> int:
    """The event with which a parallel step's attempt began, for their order."""
    return min((_first_turn(member) for member in attempt.members), default=0)


def _first_turn(member: StepState) -> int:
    return min((seq for attempt in member.attempts for seq in attempt.turns), default=0)


def _lay(state: RunState, spans: dict[str, list[Span]], step: StepState, attempt: Attempt, at: float) -> float:
    """Lay out an attempt and those whom it called from `at` on; when it ends."""
    mine = spans.setdefault(step.path, [])
    groups: dict[tuple[int, int, int], list[StepState]] = {}
    for member in attempt.members:
        groups.setdefault(member.group, []).append(member)
    calls = len({call for call, _number, _of in groups})
    own = (attempt.measured_s or 0.0) / (calls + 1)  # its own work, before, between and after its calls
    whole = not isinstance(step.step, Parallel)
    if whole:
        mine.append(Span("work", at, at + own, number=attempt.number))
        at += own
    for key in sorted(groups):
        start, places = at, [at] * max(1, state.max_concurrency)
        for member in groups[key]:
            begin = heapq.heappop(places)
            for tried in member.attempts:
                begin = _lay(state, spans, member, tried, begin)
            heapq.heappush(places, begin)
            at = max(at, begin)
        if mine and mine[-1].kind == "team":
            mine[-1].end = at
        else:
            mine.append(Span("team", start, at, number=attempt.number))
        last = key[1] == key[2]
        if whole and last:
            mine.append(Span("work", at, at + own, number=attempt.number))
            at += own
    return at


# -- without pauses ---------------------------------------------------------------------------------------------------


def _without_pauses(state: RunState, rows: list[Row], *, recorded: bool) -> Timeline:
    """Times become times of work: where nothing was at work, the axis is broken."""
    busy = sorted((span.start, span.end) for row in rows for span in row.spans if span.kind in ("work", "again"))
    merged: list[list[float]] = []
    for start, end in busy:
        if merged and start <= merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], end)
        else:
            merged.append([start, end])
    last = max((span.end for row in rows for span in row.spans), default=0.0)
    waits = sorted((span.start, span.end) for row in rows for span in row.spans if span.kind == "person")
    breaks: list[Break] = []
    begins, ends, sums = [one[0] for one in merged], [one[1] for one in merged], [0.0]
    for start, end in merged:
        sums.append(sums[-1] + end - start)
    if recorded:
        breaks = [Break(place, None, "person") for place in sorted({start for start, _end in waits})]
    else:
        for number, end in enumerate(ends):
            until = begins[number + 1] if number + 1 < len(begins) else last
            if until - end > 0.05:
                asked = any(start <= until and stop > end for start, stop in waits)
                breaks.append(Break(sums[number + 1], until - end, "person" if asked else ""))

    def worked_at(time: float) -> float:
        number = bisect_right(begins, time) - 1
        return 0.0 if number < 0 else sums[number] + min(time, ends[number]) - begins[number]

    for row in rows:
        for span in row.spans:
            span.start, span.end = worked_at(span.start), worked_at(span.end)
    return Timeline(rows, breaks, sums[-1])


# -- drawing ----------------------------------------------------------------------------------------------------------

_ROW, _BAR, _TOP, _BREAK, _BREAK_MIN, _INDENT = 26, 16, 30, 46, 8, 14
_NAME_PX, _WORD_PX = 11.5, 10
_TICKS = (
    *(unit * many for unit in (0.001, 0.01, 0.1) for many in (1, 2, 5)),
    *(unit * many for unit in (1, 60) for many in (1, 2, 5, 10, 15, 30)),
    *(3600 * many for many in (1, 2, 4, 12, 24)),
)
"""Distances between ticks, in seconds."""
LEGEND: dict[str, str] = {
    "done": "done",
    "waiting": "sent back or rejected",
    "failed": "failed or cut short",
    "running": "running",
    "person": "waits for a person",
    "team": "waits for its team",
    "again": "waits to try again",
}


class _Scale:
    """Where a time of work is on a line that begins at `left` and is `width` long, with breaks of a fixed width."""

    def __init__(self, made: Timeline, left: float, width: float, gap: float, least: float) -> None:
        self.breaks, self.left = [one.at for one in made.breaks], left
        self.gap = min(gap, width / 2 / len(self.breaks)) if self.breaks else 0.0
        self.gap = max(self.gap, least) if self.breaks else 0.0
        self.unit = max(1.0, width - self.gap * len(self.breaks)) / max(made.end, 1e-3)

    def before(self, at: float) -> float:
        """The place of a time that ends something: before a break that is there."""
        return self.left + at * self.unit + self.gap * sum(one < at for one in self.breaks)

    def after(self, at: float) -> float:
        """The place of a time that begins something: after a break that is there."""
        return self.left + at * self.unit + self.gap * sum(one <= at for one in self.breaks)

    def place(self, span: Span) -> tuple[float, float]:
        """From where to where `span` lies; a wait for a person lies in the breaks, the rest beside them."""
        if span.kind == "person":
            return self.before(span.start), self.after(span.end)
        start, end = self.after(span.start), self.before(span.end)
        return start, max(start, end)


def _said(state: RunState, span: Span) -> str:
    """A span in words: ``attempt 2: approved, 7.4 s``."""
    took = duration(span.end - span.start)
    if span.kind == "work":
        return f"attempt {span.number}: {span.word or 'at work'}, {took}"
    return LEGEND[span.kind] + (f", {took}" if span.kind != "person" else "")


def _pauses(made: Timeline, span: Span) -> str:
    """How long the breaks are in which `span` lies."""
    inside = [one.seconds for one in made.breaks if span.start <= one.at <= span.end]
    known = [seconds for seconds in inside if seconds is not None]
    return duration(sum(known) + span.end - span.start) if known else ""


def _ticks(made: Timeline, unit: float, room: float) -> list[float]:
    """Round times at least `room` apart."""
    step = next((one for one in _TICKS if one * unit >= room), _TICKS[-1])
    return [number * step for number in range(int(made.end / step + 1e-9) + 1)]


def _tick_words(at: float) -> str:
    if at < 60:
        return f"{at:g} s"
    minutes, seconds = divmod(round(at), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d} h" if hours else f"{minutes}:{seconds:02d} min"


def draw(
    events: Iterable[AnyEvent], format: Literal["svg", "mermaid", "text"] = "svg", now: float | None = None
) -> str:
    """When what happened in a run.

    Parameters
    ----------
    events
        Those of the run.
    format
        ``"svg"``: a document with one element a line. ``"mermaid"``: a Gantt chart. ``"text"``: lines of characters.
    now
        Unix seconds: how far what still runs has come.
    """
    state, made = timeline(events, now)
    if format == "mermaid":
        return _mermaid(state, made)
    if format == "text":
        return _text(state, made)
    svg.check_format(format)
    lines, _width, _height = _draw(state, made, f' role="img" aria-label="{svg._esc(describe(state, made))}"')
    return "\n".join(lines)


def img(events: Iterable[AnyEvent], now: float | None = None) -> str:
    """The picture as an ``<img>`` for saved notebooks."""
    state, made = timeline(events, now)
    lines, width, height = _draw(state, made, "")
    return svg.as_img(lines, width, height, describe(state, made))


def describe(state: RunState, made: Timeline) -> str:
    """The timeline in words."""
    rows = []
    for row in made.rows:
        ended = [f"attempt {span.number} {span.word}" for span in row.spans if span.kind == "work" and span.word]
        rows.append(f"{row.name}: {', '.join(ended) or 'nothing yet'}")
    return svg._xml_text(f"Timeline of {one_line(state.name, 80)}, {duration(made.end)} of work. {'; '.join(rows)}.")


def _draw(state: RunState, made: Timeline, said: str) -> tuple[list[str], float, float]:
    names = [svg.text_width(row.name, _NAME_PX) + _INDENT * row.depth for row in made.rows]
    left = 12 + min(max([*names, 60.0]), 190.0) + 10
    right = svg.WIDTH - 14
    scale = _Scale(made, left, right - left - 40, _BREAK, _BREAK_MIN)
    bottom = _TOP + _ROW * len(made.rows)
    height = bottom + 34
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{svg.WIDTH}" height="{height}" '
        f'viewBox="0 0 {svg.WIDTH} {height}"{said}>',
        *svg.dark_style(),
        f'<rect width="{svg.WIDTH}" height="{height}" rx="8" fill="{svg.PLATE}"/>',
    ]
    for at in _ticks(made, scale.unit, 64):
        x = scale.before(at)
        lines.append(f'<path d="M{x:.1f} {_TOP - 6}V{bottom}" fill="none" stroke="{svg.LINE}" stroke-dasharray="1 5"/>')
        lines.append(svg._label(round(x, 1), 17, _tick_words(at), _WORD_PX, svg.FAINT, ' text-anchor="middle"'))
    for one in made.breaks:
        x = scale.before(one.at)
        lines.append(
            f'<path d="M{x + 1:.1f} {_TOP - 4}V{bottom}M{x + scale.gap - 1:.1f} {_TOP - 4}V{bottom}" fill="none" '
            f'stroke="{svg.AMBER if one.why else svg.LINE}" stroke-dasharray="4 3"/>'
        )
        if not one.why:
            lines.append(_fitting(x, scale.gap, bottom + 1, duration(one.seconds), svg.FAINT))
    for number, row in enumerate(made.rows):
        lines += _draw_row(state, made, row, _TOP + _ROW * number, left, scale)
    lines += _legend(made, height - 10)
    return [*(line for line in lines if line), "</svg>"], svg.WIDTH, height


def _fitting(x: float, width: float, y: float, words: str, colour: str) -> str:
    """Words in the middle of a place that is `width` wide; none where they do not fit."""
    if not words or svg.text_width(words, _WORD_PX) > width:
        return ""
    return svg._label(round(x + width / 2, 1), y, words, _WORD_PX, colour, ' text-anchor="middle"')


def _draw_row(state: RunState, made: Timeline, row: Row, top: float, left: float, scale: _Scale) -> list[str]:
    indent, middle, bar = 12 + _INDENT * row.depth, top + _ROW / 2, top + (_ROW - _BAR) / 2
    name = svg.shorten(row.name, left - indent - 8, _NAME_PX)
    lines = ["<g>", svg._label(indent, middle + 4, name, _NAME_PX, svg.INK)]
    for number, span in enumerate(row.spans):
        x1, x2 = scale.place(span)
        width = max(x2 - x1, 2.0)
        title = f"<title>{svg._esc(f'{row.name}: {_said(state, span)}')}</title>"
        paint = svg.PAINTS[span.tone]
        if span.kind == "work":
            lines.append(
                f'<rect x="{x1:.1f}" y="{bar:g}" width="{width:.1f}" height="{_BAR}" rx="3" fill="{paint.line}">'
            )
            lines.append(f"{title}</rect>")
            if inside := _fitting(x1, width, bar + 11.5, span.word, "#ffffff"):
                lines.append(inside)
            elif span.word:
                free = min((scale.place(one)[0] for one in row.spans[number + 1 :]), default=svg.WIDTH - 8) - x2
                if svg.text_width(span.word, _WORD_PX) <= free - 4:
                    lines.append(svg._label(round(x2 + 4, 1), bar + 11.5, span.word, _WORD_PX, paint.line))
        elif span.kind == "person":
            lines.append(
                f'<rect x="{x1 + 2:.1f}" y="{bar + 1:g}" width="{max(width - 4, 2.0):.1f}" height="{_BAR - 2}" rx="7" '
                f'fill="#fff6d6" stroke="{svg.AMBER}" stroke-dasharray="3 2">'
            )
            lines.append(f"{title}</rect>")
            lines.append(_fitting(x1, width, bar + 11.5, _pauses(made, span) or "you", svg.AMBER))
        else:
            line = (
                svg.LINE if span.kind == "team" and not span.word else paint.line if span.kind == "team" else svg.AMBER
            )
            dash = ' stroke-dasharray="2 3"' if span.kind == "again" else ""
            path = f"M{x1:.1f} {middle:g}H{x1 + width:.1f}"
            lines.append(f'<path d="{path}" fill="none" stroke="{line}" stroke-width="2.4"{dash}>{title}</path>')
            if span.word:
                lines.append(svg._label(round(x2 + 4, 1), bar + 11.5, span.word, _WORD_PX, line))
    return [*lines, "</g>"]


def _kinds(made: Timeline) -> list[str]:
    spans = [span for row in made.rows for span in row.spans]
    found = {span.tone if span.kind == "work" else span.kind for span in spans}
    return [kind for kind in LEGEND if kind in found]


def _legend(made: Timeline, y: float) -> list[str]:
    lines, x = [], 12.0
    for kind in _kinds(made):
        if kind == "person":
            lines.append(
                f'<rect x="{x:g}" y="{y - 8.5:g}" width="14" height="9" rx="4" fill="#fff6d6" stroke="{svg.AMBER}" '
                'stroke-dasharray="3 2"/>'
            )
        elif kind in ("team", "again"):
            line, dash = (svg.LINE, "") if kind == "team" else (svg.AMBER, ' stroke-dasharray="2 3"')
            lines.append(f'<path d="M{x:g} {y - 4:g}h14" fill="none" stroke="{line}" stroke-width="2.4"{dash}/>')
        else:
            colour = next(paint.line for tone, paint in svg.PAINTS.items() if tone == kind)
            lines.append(f'<rect x="{x:g}" y="{y - 8.5:g}" width="14" height="9" rx="2" fill="{colour}"/>')
        lines.append(svg._label(x + 19, y, LEGEND[kind], _WORD_PX, svg.FAINT))
        x = round(x + 19 + svg.text_width(LEGEND[kind], _WORD_PX) + 14, 1)
    return lines


_MARKS = {"done": "=", "waiting": "~", "failed": "x", "running": ">", "person": "?", "team": "-", "again": "."}
_COLUMNS = 56


def _text(state: RunState, made: Timeline) -> str:
    names = ["  " * row.depth + row.name for row in made.rows]
    wide = min(max([*map(len, names), 6]), 28)
    scale = _Scale(made, 0, _COLUMNS, 3, 1)
    lines = [f"{one_line(state.name, 80)}: {duration(made.end)} of work"]
    axis = [" "] * (_COLUMNS + 12)
    for at in _ticks(made, scale.unit, 12):
        place = round(scale.before(at))
        axis[place : place + len(_tick_words(at)) + 1] = f"|{_tick_words(at)}"
    lines.append(f"{'':{wide}} {''.join(axis)}".rstrip())
    for name, row in zip(names, made.rows, strict=True):
        cells = [" "] * (_COLUMNS + 1)
        for span in row.spans:
            start, end = (round(place) for place in scale.place(span))
            mark = _MARKS[span.tone if span.kind == "work" else span.kind]
            cells[start : max(end, start + 1)] = mark * max(end - start, 1)
        words = [span.word for span in row.spans if span.word]
        shown = name if len(name) <= wide else f"{name[: wide - 1]}…"
        lines.append(f"{shown:{wide}} {''.join(cells[:_COLUMNS])}  {', '.join(words)}".rstrip())
    if pauses := [duration(one.seconds) or "not recorded" for one in made.breaks if one.why]:
        lines.append(f"waited for a person: {', '.join(pauses)}")
    lines.append("  ".join(f"{_MARKS[kind]} {LEGEND[kind]}" for kind in _kinds(made)))
    return "\n".join(lines)


_TAGS: dict[Tone, str] = {"done": "done, ", "failed": "crit, ", "running": "active, "}


def _mermaid(state: RunState, made: Timeline) -> str:
    lines = ["gantt", f"  title {_plain(one_line(state.name, 80))}", "  dateFormat x", "  axisFormat %M:%S"]
    for row in made.rows:
        if row.spans:
            lines.append(f"  section {_plain(row.name)}")
        for span in row.spans:
            start, end = round(span.start * 1000), round(max(span.end, span.start + 0.001) * 1000)
            if span.kind == "work":
                lines.append(f"  attempt {span.number} {_plain(span.word)} :{_TAGS.get(span.tone, '')}{start}, {end}")
            elif span.kind == "person":
                took = _pauses(made, span)
                lines.append(f"  {_plain(f'waited for a person {took}'.rstrip())} :milestone, {start}, {start}")
            else:
                lines.append(f"  {LEGEND[span.kind]} :{start}, {end}")
    return "\n".join(lines)


def _plain(text: str) -> str:
    """Without what has a meaning in Mermaid."""
    return "".join(char for char in text if char not in ":;#,").strip() or "-"
