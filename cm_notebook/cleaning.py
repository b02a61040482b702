"""Notebooks for version control: without what is true of one execution only.

Strategy: the saved views of runs are known by their frames and by the places where words about time stand in them
(``render/html.py`` and ``render/text.py`` have both), so that nothing is looked for in what agents, or other programs,
have written. From a run that is over, or paused, the times and its id are taken; what shows a run at work or a gate, or
a live widget, says nothing to who opens the file, and goes. A run from a tape is left as it is: its times are the
tape's. Of a timeline only the words stay: all else in it is times. Ids of runs are taken out of what cells print and of
errors, too, in a notebook that uses this package: each is ``r-…`` then. Besides, the counts of executions and the clock
times that front ends note beside cells go.

The file keeps its form: indentation, order of keys, ends of lines. What has nothing to be cleaned keeps its bytes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from html import unescape
from typing import Any

from .errors import WorkflowError
from .render import html
from .render import text as say

WIDGET = "application/vnd.jupyter.widget-view+json"
SAVED_BELOW = ", as saved below. Run this cell again to go on here."
"""The end of what stands for a live view where no widget can be shown."""
_NOTED = ("execution", "ExecuteTime")
"""Where front ends write down when a cell was executed."""

_TIME = r"(?:(?:<|&lt;)0\.1 ?s|\d+(?:\.\d)? ?s|\d+ ?min ?\d\d ?s|\d+ ?h ?\d\d ?min)"
_WHO = r"(?:by [^“”,;:·]{1,60}|at its deadline)"
_CLOCK = re.compile(rf"(\b[A-Za-z]+ {_WHO}), \d\d:\d\d(?=$|[:;.)]| [·(])", re.MULTILINE)
_OPEN = "waiting for you|running"
_HEAD = re.compile(rf"(?P<name>.+?): (?P<state>{_OPEN}|[a-z]+(?: [a-z]+){{0,2}})(?= · |\n|$)")
_ROW = re.compile(rf"^( +\S+ {{2,}}[a-z]+(?: [a-z]+)* {{2,}}){_TIME}(?: +|$)", re.MULTILINE)
_LINE = re.compile(
    rf"^(cm: (?:\S+ (?:ok|[a-z]+)(?: \([^)\n]*\))?|.* (?:completed|stopped|failed))) {_TIME}(?=[ ;:]|$)", re.MULTILINE
)
_RECORDED = re.compile(r"(?:^|· |>)[Rr]ecorded(?: \([^\n]*?\))?: no model was called", re.MULTILINE)
_RUN = re.compile(r"(^|[^\w-]|\x1b\[[\d;]*m)r-[0-9a-f]{8}(?![\w-])", re.MULTILINE)
_FORK = re.compile(r"((?:^|· )[Ff]ork) of r-[0-9a-f]{8}(?= at )", re.MULTILINE)
_BESIDE = re.compile(r"(<(?:b|th [^>]*)>(?:fork at [^<]+|forked from|run) )r-[0-9a-f]{8}(?=</(?:b|th)>)")
"""The head of a column that shows one of two runs."""
_BESIDE_HEAD = re.compile(r"Step  .*  Answer$", re.MULTILINE)
_TIMELINE = re.compile(
    r'\A<img width="\d+" height="\d+" style="max-width:100%;height:auto"\n'
    rf'alt="(Timeline of [^"]*), {_TIME} of work(\. [^"]*)"\nsrc="data:image/svg'
)
_ALREADY = re.compile(rf"(\balready [a-z]+ {_WHO}) at \d\d:\d\d(?=; nothing was changed)")
_RUN_CODE = re.compile(r'(?: · |(?<=">))run <code style="[^"]*">[^<]*</code>(?=</span>)')
_HEADER = '<b style="font-size:15px">'
_PLACE = re.compile(r"Step \d+.* in ")
_SNAPSHOT = re.compile(r'\A<div data-cm-static="[^"]*">\n')
_USES = re.compile(r"^\s*(?:\w+\s*=\s*)?%%?cm\b|^[^#\n]*\bcm_notebook\b", re.MULTILINE)


def cleaned(data: bytes, *, keep_count: bool = False) -> bytes:
    """The notebook `data` without run ids, times and views of runs that had not ended.

    Parameters
    ----------
    keep_count
        Leave the numbers of executions.

    Raises
    ------
    WorkflowError    It is no notebook that can be read.
    """
    try:
        text = data.decode("utf-8")
        book = json.loads(text, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise WorkflowError(f"this is no notebook: {str(error)[:120]}.") from None
    if not isinstance(book, dict) or book.get("nbformat") != 4 or not isinstance(book.get("cells"), list):
        raise WorkflowError("this is no notebook of version 4.")
    form = _form(text, book)
    try:
        _clean_book(book, keep_count)
        made = form(book).encode("utf-8")
    except (AttributeError, KeyError, TypeError, UnicodeError):
        raise WorkflowError("this is no notebook: a part of it is not as it should be.") from None
    return data if json.loads(text) == book else made


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        raise ValueError("a name stands twice in one of its objects")
    return made


def _form(text: str, book: Any) -> Callable[[Any], str]:
    """What writes a notebook as `text` is written."""
    body = text.strip()
    before, after = text[: len(text) - len(text.lstrip())], text[len(text.rstrip()) :]
    windows = "\r\n" in body
    plain = body.replace("\r\n", "\n")
    found = re.match(r"\{\n([ \t]*)", plain)
    options: dict[str, Any] = {"indent": found[1] if found else None, "ensure_ascii": False}
    if found is None:
        options["separators"] = (", ", ": ") if '": ' in plain[:200] else (",", ":")
    for ascii_only in (False, True):
        options["ensure_ascii"] = ascii_only
        if json.dumps(book, **options) == plain:
            break
    else:
        options["ensure_ascii"] = text.isascii()

    def write(changed: Any) -> str:
        made = json.dumps(changed, **options)
        return before + (made.replace("\n", "\r\n") if windows else made) + after

    return write


def _clean_book(book: dict[str, Any], keep_count: bool) -> None:
    recorded = False
    uses = any(cell.get("cell_type") == "code" and _USES.search(_text(cell["source"])) for cell in book["cells"])
    for cell in book["cells"]:
        for name in _NOTED:
            cell.get("metadata", {}).pop(name, None)
        if cell.get("cell_type") != "code":
            continue
        recorded = _tells_of_tape(cell["outputs"], recorded)
        cell["outputs"] = _clean_outputs(cell["outputs"], uses, recorded)
        if not keep_count:
            for one in (cell, *cell["outputs"]):
                if "execution_count" in one:
                    one["execution_count"] = None
    _clean_widgets(book.get("metadata", {}))


def _clean_widgets(metadata: dict[str, Any]) -> None:
    """Take the state of our widgets out of what is kept of all."""
    kept = metadata.get("widgets", {}).get("application/vnd.jupyter.widget-state+json", {}).get("state", {})
    for id, model in list(kept.items()):
        state = model.get("state", {})
        if str(state.get("_anywidget_id", "")).startswith("cm_notebook."):
            del kept[id]
            kept.pop(str(state.get("layout", "")).removeprefix("IPY_MODEL_"), None)
    if "widgets" in metadata and not kept:
        del metadata["widgets"]


def _tells_of_tape(outputs: list[dict[str, Any]], before: bool) -> bool:
    """Whether the views are of a run from a tape; those that do not say it are of the run that was shown `before`."""
    for output in outputs:
        page = _text(output.get("data", {}).get("text/html", ""))
        if _is_ours(page):
            words = [piece for piece, style in _walk(page) if style]
            if any(map(_RECORDED.search, words)):
                return True
            if _HEADER in page or html.STATUS_HEAD in page or any(map(_PLACE.match, words)):
                before = False
    return before


def _clean_outputs(outputs: list[dict[str, Any]], uses: bool, recorded: bool) -> list[dict[str, Any]]:
    made = [output for output in outputs if not _is_over(output)]
    gone = len(made) < len(outputs)
    for output in made:
        if not recorded and "data" in output:
            _clean_data(output["data"])
        if uses:
            _clean_words(output, gone, recorded)
    return [one for one in made if one.get("output_type") != "stream" or one["text"] or not uses]


def _clean_words(output: dict[str, Any], gone: bool, recorded: bool) -> None:
    """Clean what a cell has printed, its error, and its value where that is no view."""
    if output.get("output_type") == "stream":
        lines = _text(output["text"])
        if gone:  # lines about a run that had not ended
            lines = re.sub(r"^cm: .*\n?", "", lines, flags=re.MULTILINE)
        if gone or not recorded:
            lines = _without_clock(_LINE.sub(r"\1", lines))
        _put(output, "text", _without_ids(lines))
    elif output.get("output_type") == "error":
        _put(output, "evalue", _without_ids(output["evalue"]))
        output["traceback"] = [_without_ids(line) for line in output["traceback"]]
    else:
        data = output["data"]
        if not _is_ours(_text(data.get("text/html", ""))):
            for kind in data:
                if kind.startswith("text/"):
                    _put(data, kind, _without_ids(_text(data[kind])))


def _is_over(output: dict[str, Any]) -> bool:
    """Whether it shows what is no more: a live view, a gate, a run at work, the runs of a journal."""
    if output.get("output_type") == "error":
        return output.get("ename") == "GatePending"
    data = output.get("data", {})
    plain, page = _text(data.get("text/plain", "")), _text(data.get("text/html", ""))
    if WIDGET in data:
        return plain.endswith(SAVED_BELOW)
    if drawn := _TIMELINE.search(page):
        return re.search(r"attempt \d+ running[,;.]", drawn[2]) is not None
    if not _is_ours(page):
        return False
    head = _HEAD.match(plain)
    ended = head is None or not re.fullmatch(_OPEN, head["state"])
    return html.RUNS_HEAD in page or f'<div style="{html.BAR}">' in page or not ended or _is_at_work(page, plain)


def _is_at_work(page: str, plain: str) -> bool:
    return html.STATUS_HEAD in page and re.search(rf"^total +(?:{_OPEN})\b", plain, re.MULTILINE) is not None


def _is_ours(page: str) -> bool:
    page = _SNAPSHOT.sub("", page)
    return page.startswith(html.FRAMED) or html.STATUS_HEAD in page or html.RUNS_HEAD in page


def _clean_data(data: dict[str, Any]) -> None:
    page, plain = _text(data.get("text/html", "")), _text(data.get("text/plain", ""))
    if drawn := _TIMELINE.search(page):
        words = drawn[1] + drawn[2]
        _put(data, "text/plain", unescape(words))
        _put(data, "text/html", html.page(words))
    if not _is_ours(page):
        return
    made = "".join(_clean_page(page))
    if html.STATUS_HEAD in page:
        made = re.sub(r"(<tr>\n(?:<td[^>]*>.*</td>\n){2}<td[^>]*>)[^<\n]*(</td>)", r"\1\2", made)
        _put(data, "text/plain", _without_column(plain, "Time"))
    elif _BESIDE_HEAD.match(plain):
        table, gap, answers = plain.partition("\n\n")
        _put(data, "text/plain", _cells_without_times(table) + gap + answers)
    elif _HEAD.match(plain):
        about, gap, output = plain.partition("\n\n")
        first, *rest = about.split("\n")
        rows = _ROW.sub(lambda found: found[1].rstrip() if found[0].endswith("s") else found[1], "\n".join(rest))
        words = "\n".join([_without_times(first, ": "), *([rows] if rest else [])])
        _put(data, "text/plain", _without_clock(words) + gap + output)
    _put(data, "text/html", _BESIDE.sub(r"\1r-…", _RUN_CODE.sub("", made)))


# -- places in a page --------------------------------------------------------------------------------------------------

_TAG = re.compile(r"(<[^>]*>)")
_EMPTY = ("<img", "<br", "<hr")


def _walk(page: str) -> Iterator[tuple[str, str]]:
    """The tags and texts of a page, each with the style of the nearest element that is ours, or ``""``."""
    open_: list[str] = [""]
    for piece in _TAG.split(page):
        if not piece.startswith("<"):
            yield piece, open_[-1]
            continue
        if piece.startswith("</"):
            open_.pop()
        yield piece, ""
        if not piece.startswith(("</", *_EMPTY)):
            style = re.search(r'style="([^"]*)"', piece)
            mine = style[1] if style and html.FAINT in style[1].split(";") else ""
            open_.append(mine)


def _clean_page(page: str) -> Iterator[str]:
    for piece, style in _walk(page):
        if style == html.FAINT:
            piece = _without_times(piece)
        yield _without_clock(piece) if style else piece


# -- words -------------------------------------------------------------------------------------------------------------


def _without_times(words: str, head: str = "") -> str:
    """Words with a dot between them, without those that are a length of time; what is quoted stays."""
    before, quote, after = words.partition("“")
    name, colon, rest = before.rpartition(head) if head else ("", "", before)
    kept = [word for word in rest.split(" · ") if not re.fullmatch(_TIME, word)]
    return name + colon + " · ".join(kept) + quote + after


def _without_clock(words: str) -> str:
    """Without the time of day of a decision, and the run that a fork is of; what is quoted stays."""
    parts = re.split("(“[^”]*”)", words)
    return "".join(part if part.startswith("“") else _FORK.sub(r"\1", _CLOCK.sub(r"\1", part)) for part in parts)


def _without_ids(words: str) -> str:
    """With ``r-…`` in place of ids of runs, and without the time at which somebody else was first to decide."""
    return _RUN.sub(r"\1r-…", _ALREADY.sub(r"\1", words))


def _cells_without_times(table: str) -> str:
    """An aligned table whose cells hold no lengths of time among their words, and no ids of runs."""
    lines = table.split("\n")
    starts = [found.start() for found in re.finditer(r"(?:^|(?<=  ))\S", lines[0])]
    ends = [*starts[1:], None]
    rows = [[line[start:end].strip() for start, end in zip(starts, ends, strict=True)] for line in lines]
    return "\n".join(say.table([[re.sub(rf" {_TIME}(?= |$)", "", _without_ids(cell)) for cell in row] for row in rows]))


def _without_column(table: str, name: str) -> str:
    """An aligned table without that column, whose cells end in line."""
    lines = table.split("\n")
    found = re.search(rf"\b{name}\b", lines[0])
    if found is None:
        return table
    end = found.end()
    cells = [re.search(rf"(?:{_TIME}|\b{name})$", line[:end]) for line in lines]
    start = min(cell.start() for cell in cells if cell is not None) - 2
    return "\n".join((line[:start] + line[end:]).rstrip() for line in lines)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else "".join(value)


def _put(owner: dict[str, Any], name: str, text: str) -> None:
    """Put a text where one is, in the form it has: whole, or by lines."""
    if name in owner and text != _text(owner[name]):
        owner[name] = text if isinstance(owner[name], str) else text.splitlines(keepends=True)
