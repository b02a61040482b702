"""What changed between two attempts: word by word for prose, line by line for code.

Strategy: one comparison, ``_changes``, over lists of lines or words, and five ways of showing it. Prose is Markdown:
its words are compared as they are read, not as they are written. It is rendered, then flattened to words that know how
they look; items of lists are compared with items, so that a new one is new as a whole, and a number that moved on is no
change. difflib's cost grows with the third power of a text made for it, so each comparison has a price, and all of
one call share ``BUDGET``. What is too dear at once is cut into small comparisons at the items that occur once in both
texts; what is still too dear is shown as replaced as a whole: right, if coarse. Above the sizes below ``prose`` becomes
``words``, that becomes ``lines``, and ``lines`` becomes one sentence.

Texts are cleaned and escaped here. ``<ins>`` and ``<del>`` are told apart by underline and line-through, or by signs at
their lines, and by words for screen readers; never by colour alone.
"""

from __future__ import annotations

import difflib
import html
import itertools
import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from html.parser import HTMLParser
from typing import Literal, NamedTuple

from .markdown import clean, to_html

PROSE_LIMIT = 30_000
"""Characters of both texts together beyond which Markdown is not rendered: that takes 10 ms for a thousand."""
WORD_LIMIT = 60_000
"""Characters of both texts together beyond which words are not compared, but lines."""
LINE_LIMIT = 20_000
"""Lines of both texts together beyond which nothing is compared."""
CHAR_LIMIT = 2_000_000
"""Characters of both texts together beyond which nothing is compared."""
BUDGET = 10_000_000
"""Steps that difflib may take in the worst case; about two seconds."""
PAIRS = 2_500
"""Pairs of list items beyond which a stretch of changed ones is not compared item by item, but as one text."""
ALIKE = 0.5
"""The share of the shorter one's words in common from which on one item counts as what became of another."""
JOINED = 0.6
"""The share of an item's words that must stand in another one for it to have been joined with that."""
CONTEXT_LINES = 3
CONTEXT_WORDS = 25
"""Unchanged lines and words that stay around a change; the rest is folded."""

_HIDDEN = "position:absolute;width:1px;height:1px;overflow:hidden;clip:rect(0,0,0,0);white-space:nowrap"
_GROUND = {"ins": "background:rgba(46,160,67,0.25)", "del": "background:rgba(248,81,73,0.25)"}
_DRAWN = {"ins": "text-decoration:underline", "del": "text-decoration:line-through"}
_WORD = {"ins": "added", "del": "removed"}
_FRAME = "margin:0 0 8px;white-space:pre-wrap;overflow-wrap:break-word"


def between(old: str, new: str) -> str:
    """Show the difference as HTML: by words when both texts are prose, by lines when one looks like code."""
    return lines(old, new) if _is_code(old) or _is_code(new) else prose(old, new)


def prose(old: str, new: str) -> str:
    """Show the difference word by word, as HTML, without the marks of Markdown; long unchanged stretches are folded.

    What differs in marks alone (a number of spaces, the address behind a picture) is shown as it is written.
    """
    if len(old) + len(new) > PROSE_LIMIT:
        return words(old, new)
    return _compared(_flat(old), _flat(new)) or words(old, new)


def words(old: str, new: str) -> str:
    """Show the difference word by word, as HTML; long unchanged stretches are folded to "…"."""
    old, new = clean(old), clean(new)
    if len(old) + len(new) > WORD_LIMIT:
        return lines(old, new)
    if old == new:
        return _sentence("No changes.")
    return _compared(*([_Word(word, word) for word in _split_words(text)] for text in (old, new)))


def _compared(before: Sequence[_Word], after: Sequence[_Word]) -> str:
    """Both texts in one; ``""`` when there is no difference to be seen."""
    shown: list[str] = []
    differ = False
    for change in _by_items(before, after):
        old, new = before[change.old : change.old_end], after[change.new : change.new_end]
        if change.same:
            at_end = change.old_end == len(before) and change.new_end == len(after)
            shown.append(_fold(new, at_start=not (change.old or change.new), at_end=at_end))
        else:
            shown += [_mark_words("del", old), _mark_words("ins", new)]
            differ = differ or any(word.text for word in (*old, *new))
    return f'<div style="{_FRAME}">{"".join(shown)}</div>\n' if differ else ""


def lines(old: str, new: str) -> str:
    """Show the difference line by line, as HTML: changed lines with three unchanged ones around them."""
    shown: list[str] = []
    for kind, text in _unified(old, new):
        if kind == "sentence":
            return _sentence(text)
        # The signs tell them apart: a line through a minus sign would hide it.
        plain = f"{_GROUND[kind]};text-decoration:none" if kind in ("ins", "del") else ""
        shown.append(_mark(kind, plain, html.escape(text)) if plain else html.escape(text))
        shown.append("\n")
    style = "margin:0 0 8px;font-family:monospace;font-size:12px;overflow-x:auto"
    return f'<pre style="{style}">{"".join(shown)}</pre>\n'


def side_by_side(old: str, new: str, heads: tuple[str, str] = ("before", "after")) -> str:
    """Show both texts beside each other, as HTML: changed lines with three unchanged ones around them, marked by words.

    `heads`: what stands above the two columns.
    """
    old, new = clean(old), clean(new)
    before, after = old.split("\n") if old else [], new.split("\n") if new else []
    if old == new or len(before) + len(after) > LINE_LIMIT or len(old) + len(new) > CHAR_LIMIT:
        return lines(old, new)  # which says so
    purse, rows = _Purse(), [_row(*(f"<b>{html.escape(head)}</b>" for head in heads))]
    for number, hunk in enumerate(_hunks(_changes(before, after, purse))):
        rows += [_row("…", "…")] if number or hunk[0].old or hunk[0].new else []
        for change in hunk:
            removed, added = before[change.old : change.old_end], after[change.new : change.new_end]
            if change.same:
                rows += [_row(html.escape(line), html.escape(line)) for line in removed]
            else:
                rows += [_row(*_sides(*pair, purse)) for pair in itertools.zip_longest(removed, added)]
    frame = "width:100%;table-layout:fixed;border-collapse:collapse;font-size:13px;margin:0 0 8px"
    return f'<table style="{frame}"><tbody>\n{"".join(rows)}</tbody></table>\n'


def _row(left: str, right: str) -> str:
    style = (
        "vertical-align:top;text-align:left;padding:1px 8px;border:1px solid rgba(128,128,128,0.35);"
        "white-space:pre-wrap;overflow-wrap:anywhere"
    )
    return f'<tr><td style="{style}">{left}</td><td style="{style}">{right}</td></tr>\n'


def _sides(old: str | None, new: str | None, purse: _Purse) -> tuple[str, str]:
    """A line and what became of it; ``None`` where there is none."""
    left, right = _split_words(old or ""), _split_words(new or "")
    if len(left) + len(right) > WORD_LIMIT // 8:
        left, right = [old or ""], [new or ""]
    made: tuple[list[str], list[str]] = [], []
    for change in _changes(left, right, purse):
        for side, (tag, words) in enumerate(
            (("del", left[change.old : change.old_end]), ("ins", right[change.new : change.new_end]))
        ):
            shown = html.escape("".join(words))
            made[side].append(shown if change.same or not shown else _mark(tag, f"{_GROUND[tag]};{_DRAWN[tag]}", shown))
    return "".join(made[0]), "".join(made[1])


def text(old: str, new: str) -> str:
    """Show the difference as a plain unified diff, for ``text/plain``."""
    return "\n".join(text for _, text in _unified(old, new)) + "\n"


def patch(unified: str) -> str:
    """Show a unified diff of files as HTML, its lines marked as in :func:`lines`.

    A file begins with its name; of what git says before its hunks only what one would want to know is shown.
    """
    shown: list[str] = []
    for kind, group in itertools.groupby(_patch_lines(clean(unified)), key=lambda line: line[0]):
        inner = html.escape("\n".join(text for _, text in group))
        plain = f"{_GROUND[kind]};text-decoration:none" if kind in ("ins", "del") else ""
        if kind == "file":
            shown.append(("\n" if shown else "") + f"<b>{inner}</b>")
        else:
            shown.append(_mark(kind, plain, inner) if plain else inner)
        shown.append("\n")
    style = "margin:0 0 8px;font-family:monospace;font-size:12px;overflow-x:auto"
    return f'<pre style="{style}">{"".join(shown)}</pre>\n'


def _patch_lines(unified: str) -> Iterator[tuple[_Kind, str]]:
    """The lines of a unified diff. Only the numbers in a hunk's head say whether ``--- a`` is a line of a file."""
    old = new = 0
    for line in unified.removesuffix("\n").split("\n"):
        if old <= 0 and new <= 0:
            head = re.match(r"@@ -\d+(?:,(\d+))? \+\d+(?:,(\d+))? @@", line)
            if head is not None:
                old, new = (int(count) if count is not None else 1 for count in head.groups())
            named = re.match(r"diff --git (.*)", line)
            if named is not None:
                same = re.fullmatch(r"a/(.*) b/\1", named[1])
                yield "file", same[1] if same is not None else named[1]
            elif not re.match(r"index |--- |\+\+\+ |(?:new|deleted) file mode 100644$", line):
                yield "hunk", line
        elif line.startswith("-"):
            old -= 1
            yield "del", line
        elif line.startswith("+"):
            new -= 1
            yield "ins", line
        else:
            if not line.startswith("\\"):
                old, new = old - 1, new - 1
            yield "same", line


_Kind = Literal["file", "hunk", "same", "ins", "del", "sentence"]


def _unified(old: str, new: str) -> Iterator[tuple[_Kind, str]]:
    """Yield a unified diff in pieces: heads of hunks, and runs of lines with their signs; or one sentence instead."""
    old, new = clean(old), clean(new)
    before, after = old.split("\n") if old else [], new.split("\n") if new else []
    if old == new:
        yield "sentence", "No changes."
    elif len(before) + len(after) > LINE_LIMIT or len(old) + len(new) > CHAR_LIMIT:
        yield "sentence", f"Too large to compare: {_count(before)} and {_count(after)}."
    else:
        for hunk in _hunks(_changes(before, after)):
            first, last = hunk[0], hunk[-1]
            spans = _span(first.old, last.old_end), _span(first.new, last.new_end)
            yield "hunk", f"@@ -{spans[0]} +{spans[1]} @@"
            for change in hunk:
                removed, added = before[change.old : change.old_end], after[change.new : change.new_end]
                if change.same:
                    yield "same", _signed(" ", removed)
                    continue
                if removed:
                    yield "del", _signed("-", removed)
                if added:
                    yield "ins", _signed("+", added)


def _count(lines: Sequence[str]) -> str:
    return f"{len(lines)} line{'' if len(lines) == 1 else 's'}"


def _span(start: int, end: int) -> str:
    return f"{start + 1 if end > start else start},{end - start}"


def _signed(sign: str, lines: Sequence[str]) -> str:
    return "\n".join(sign + line for line in lines)


def _sentence(words: str) -> str:
    return f'<p style="margin:0 0 8px">{html.escape(words)}</p>\n'


def _mark(tag: str, style: str, inner: str) -> str:
    hidden = f'<span style="{_HIDDEN}">{_WORD[tag]} </span>'
    return f'<{tag} style="{style}">{hidden}{inner}</{tag}>'


def _mark_words(tag: str, words: Sequence[_Word]) -> str:
    if not any(word.text for word in words):
        return "".join(word.lead for word in words) if tag == "ins" else ""
    first = next(index for index, word in enumerate(words) if word.text)
    lead = "".join(word.lead for word in words[: first + 1])
    marked = [words[first]._replace(lead=""), *words[first + 1 :]]
    return lead + _mark(tag, f"{_GROUND[tag]};{_DRAWN[tag]}", _dressed(marked))


def _dressed(words: Sequence[_Word]) -> str:
    """Words as HTML, each stretch of a look in one element."""
    parts: list[str] = []
    for look, group in itertools.groupby(words, key=lambda word: word.look):
        some = list(group)
        text = html.escape(some[0].text + "".join(word.lead + word.text for word in some[1:]))
        parts.append(some[0].lead + (f'<span style="{look}">{text}</span>' if look and text else text))
    return "".join(parts)


def _fold(words: Sequence[_Word], *, at_start: bool, at_end: bool) -> str:
    head, tail = 0 if at_start else CONTEXT_WORDS, 0 if at_end else CONTEXT_WORDS
    if len(words) <= head + tail + CONTEXT_WORDS:  # a short fold hides more than it saves
        return _dressed(words)
    ending = _dressed(words[len(words) - tail :]) if tail else ""
    return _dressed(words[:head]) + (" …" if head else "…") + ending


def _split_words(text: str) -> list[str]:
    # A space belongs to its word: by itself it would match everywhere.
    return re.findall(r"\s*(?:\w+|[^\w\s])|\s+", text)


# --- Markdown as words -----------------------------------------------------------------------------------------------


class _Word(NamedTuple):
    """A word as it is read. ``key`` is compared; ``lead``, the space before it, and ``look``, as CSS, are shown."""

    key: str
    text: str
    lead: str = ""
    look: str = ""
    item: int = 0
    """Which item of a list it belongs to, or which stretch between lists; counted through the text."""


_LOOKS = {
    "strong": "font-weight:600",
    "th": "font-weight:600",
    "em": "font-style:italic",
    "s": "text-decoration:line-through",
    "code": "font-family:monospace;font-size:12px",
    "pre": "font-family:monospace;font-size:12px",
}
_BLOCKS = {"p", "div", "pre", "ul", "ol", "li", "tr", "table", "blockquote", "hr", "br"}
_MARKS = ("1.", "•.")
"""What stands for the marks of lists, whatever number they show, when words are compared; no word looks like that."""
_PARAGRAPHS = {"p", "div", "pre", "table", "blockquote", "hr"}


def _flat(markdown: str) -> list[_Word]:
    """The words of a text, a break before each block, and its list marks, bars between cells and addresses of links."""
    reader = _Reader()
    reader.feed(to_html(markdown))
    reader.close()
    return reader.words


class _Reader(HTMLParser):
    """Flattens what ``to_html`` has made."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.words: list[_Word] = []
        self._open: list[tuple[str, str]] = []  # tags and their looks
        self._lists: list[int] = []  # the number of the next item; 0: bullets
        self._item = 0
        self._break = ""  # before the next word
        self._space = ""
        self._marked = False  # a list mark or a bar was the last: what follows stands beside it
        self._address = self._linked = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self._begin(tag)
        look = _LOOKS["strong"] if given.get("role") == "heading" else _LOOKS.get(tag, "")
        if tag in ("ul", "ol"):
            self._lists.append(0 if tag == "ul" else int(given.get("start") or 1))
        elif tag == "li" and self._lists:
            number = self._lists[-1]
            self._lists[-1] += bool(number)
            self._item += 1
            mark = f"{number}." if number else "•"
            self._add(_MARKS[not number], mark, "    " * (len(self._lists) - 1), indents=True)
            self._space, self._marked = " ", True
        elif tag in ("td", "th") and self.words and not self._break:
            self._add("|", "|", " ")
            self._space, self._marked = " ", True
        elif tag == "hr":
            self._add("---", "———")
        elif tag == "a":
            self._address, self._linked = given.get("href") or "", ""
        if tag not in ("br", "hr"):
            self._open.append((tag, look))

    def handle_endtag(self, tag: str) -> None:
        if self._open and tag == self._open[-1][0]:
            self._open.pop()
        self._marked = self._marked and tag not in ("td", "th", "li")  # an empty one
        if tag in ("ul", "ol") and self._lists:
            self._lists.pop()
            self._item += 1
        if tag == "a" and self._address.removeprefix("mailto:") != self._linked:
            self._add(self._address, f"({self._address})", " ")
        self._begin(tag)

    def handle_data(self, data: str) -> None:
        code = any(tag == "pre" for tag, _ in self._open)
        if not code:
            self._linked += data
            data = re.sub(r"\s+", " ", data)
        for number, line in enumerate(data.removesuffix("\n").split("\n")):
            self._break += "\n" if number else ""
            self._read(line, code)

    def _begin(self, tag: str) -> None:
        """A block begins or ends: the next word begins a line."""
        if tag in _BLOCKS and self.words and not self._marked:
            inside = len(self._lists) > (tag in ("ul", "ol"))
            self._break = max(self._break, "\n\n" if tag in _PARAGRAPHS and not inside else "\n")
            self._space = ""

    def _read(self, line: str, code: bool) -> None:
        for piece in _split_words(line):
            word = piece.lstrip()
            space = piece[: len(piece) - len(word)]
            if word:
                self._add(piece if code else word, word, self._space or space, indents=code)
            elif not self._break and not self._marked:
                self._space = space

    def _add(self, key: str, text: str, lead: str = "", *, indents: bool = False) -> None:
        if self._break:
            self.words.append(_Word("\n", "", self._break, item=self._item))
            lead = lead if indents else ""
        look = ";".join(dict.fromkeys(look for _, look in self._open if look))
        self.words.append(_Word(f"{key} {look}", text, lead, look, self._item))
        self._break, self._space, self._marked = "", "", False


# --- Comparing -------------------------------------------------------------------------------------------------------


class _Change(NamedTuple):
    """``old[old:old_end]`` is, or becomes, ``new[new:new_end]``."""

    same: bool
    old: int
    old_end: int
    new: int
    new_end: int


class _Purse:
    """What the comparisons of one call may still cost together."""

    def __init__(self) -> None:
        self.left = BUDGET

    def pays(self, price: int) -> bool:
        """Whether it is enough; then it is paid."""
        enough = price <= self.left
        self.left -= price if enough else 0
        return enough


def _changes(old: Sequence[Hashable], new: Sequence[Hashable], purse: _Purse | None = None) -> list[_Change]:
    """List the steps from `old` to `new`, in order: what is the same and what is not take turns."""
    changes: list[_Change] = []
    at, to = 0, 0
    for start, other, size in (*_matches(old, new, purse or _Purse()), (len(old), len(new), 0)):
        if (at, to) != (start, other):
            changes.append(_Change(False, at, start, to, other))
        elif size and changes:
            joined = changes.pop()
            start, other, size = joined.old, joined.new, size + joined.old_end - joined.old
        if size:
            changes.append(_Change(True, start, start + size, other, other + size))
        at, to = start + size, other + size
    return changes


def _matches(old: Sequence[Hashable], new: Sequence[Hashable], purse: _Purse) -> Iterator[tuple[int, int, int]]:
    """Where equal stretches start in `old` and `new`, and their lengths; in order, never overlapping."""
    shorter = min(len(old), len(new))
    head = next((index for index in range(shorter) if old[index] != new[index]), shorter)
    rest = shorter - head
    tail = next((index for index in range(rest) if old[-1 - index] != new[-1 - index]), rest)
    end, other_end = len(old) - tail, len(new) - tail
    yield 0, 0, head
    anchors = [(end, other_end)]
    if _price(old[head:end], new[head:other_end]) > purse.left:
        anchors = [*_anchors(old, new, head, end, other_end), *anchors]
    at, to = head, head
    for start, other in anchors:
        part, other_part = old[at:start], new[to:other]
        if purse.pays(_price(part, other_part)):
            matcher = difflib.SequenceMatcher(None, part, other_part, autojunk=False)
            yield from (
                (at + block.a, to + block.b, block.size) for block in matcher.get_matching_blocks() if block.size
            )
        if start < end:
            yield start, other, 1
        at, to = start + 1, other + 1
    yield end, other_end, tail


def _price(old: Sequence[Hashable], new: Sequence[Hashable]) -> int:
    """Bound of difflib's steps: it looks at all equal pairs, and does so again for each stretch that it finds."""
    counts = Counter(old)
    return sum(counts[item] for item in new) * min(len(old), len(new)) + len(old) + len(new)


def _anchors(
    old: Sequence[Hashable], new: Sequence[Hashable], head: int, end: int, other_end: int
) -> list[tuple[int, int]]:
    """Find what occurs once in both: the longest series that has the same order in both (patience diff)."""
    once = {item for item, count in Counter(old[head:end]).items() if count == 1}
    once &= {item for item, count in Counter(new[head:other_end]).items() if count == 1}
    places = {new[index]: index for index in range(head, other_end) if new[index] in once}
    ends: list[int] = []  # the smallest place in `new` that ends a series of each length …
    chains: list[tuple[int, int, int]] = []  # … and every item of a series: its places, and the item before it
    last: list[int] = []  # … the chain that ends there
    for index in range(head, end):
        if old[index] in once:
            place = places[old[index]]
            length = bisect_left(ends, place)
            chains.append((index, place, last[length - 1] if length else -1))
            ends[length : length + 1] = [place]
            last[length : length + 1] = [len(chains) - 1]
    series: list[tuple[int, int]] = []
    link = last[-1] if last else -1
    while link >= 0:
        index, place, link = chains[link]
        series.append((index, place))
    return series[::-1]


def _by_items(before: Sequence[_Word], after: Sequence[_Word]) -> Iterator[_Change]:
    """The steps from one text to the other: items that stay are found first, then what became of the others."""
    same: _Change | None = None  # what stays is told in one piece, however many items it goes through
    for change in _item_changes(before, after):
        if same is not None and change.same:
            same = same._replace(old_end=change.old_end, new_end=change.new_end)
            continue
        if same is not None:
            yield same
        same = change if change.same else None
        if same is None:
            yield change
    if same is not None:
        yield same


def _item_changes(before: Sequence[_Word], after: Sequence[_Word]) -> Iterator[_Change]:
    purse, old, new = _Purse(), _items(before), _items(after)
    keys, new_keys = (
        [tuple(words[at].key for at in item if words[at].text) for item in items]
        for words, items in ((before, old), (after, new))
    )
    at, to = 0, 0
    for change in _changes(keys, new_keys, purse):
        olds, news = old[change.old : change.old_end], new[change.new : change.new_end]
        for mine, theirs in [(olds, news)] if change.same else _partners(before, after, olds, news):
            end, other_end = mine[-1].stop if mine else at, theirs[-1].stop if theirs else to
            if change.same or not mine or not theirs:
                yield _Change(change.same, at, end, to, other_end)
            else:
                words = [word.key for word in before[at:end]], [word.key for word in after[to:other_end]]
                # where an item went on in the one before it, its mark is not what somebody took out
                marks = {item.start + 2 for item in mine[1:] if before[item.start + 1].key.startswith(_MARKS)}
                for same, start, stop, other, other_stop in _changes(*words, purse):
                    inside = [] if same else sorted(mark for mark in marks if at + start < mark <= at + stop)
                    begin = at + start
                    for mark in inside:
                        yield _Change(False, begin, max(begin, mark - 2), to + other, to + other)
                        begin = mark
                    yield _Change(same, begin, at + stop, to + other, to + other_stop)
            at, to = end, other_end


def _items(words: Sequence[_Word]) -> list[range]:
    """Where the items of lists, and the stretches between lists, begin and end."""
    starts = [at for at in range(len(words)) if not at or words[at].item != words[at - 1].item]
    return [range(start, end) for start, end in itertools.pairwise([*starts, len(words)])]


_Partners = tuple[list[range], list[range]]


def _partners(before: Sequence[_Word], after: Sequence[_Word], old: list[range], new: list[range]) -> list[_Partners]:
    """Which items became which, in order: those that have most words in common; the others went, or are new.

    One that has no partner, but whose words stand in its neighbour's, was joined with it or cut off from it.
    """
    if not old or not new or len(old) == len(new) == 1 or len(old) * len(new) > PAIRS:
        return [(old, new)]
    mine, theirs = (
        [Counter(words[at].text for at in item[2:] if words[at].text[:1].isalnum()) for item in items]
        for words, items in ((before, old), (after, new))
    )
    best = [[0.0] * (len(new) + 1) for _ in range(len(old) + 1)]  # of the items from there on
    alike: dict[tuple[int, int], float] = {}
    for i, j in itertools.product(reversed(range(len(old))), reversed(range(len(new)))):
        both, sizes = (mine[i] & theirs[j]).total(), (mine[i].total(), theirs[j].total())
        fits = both and both >= ALIKE * min(sizes)
        alike[i, j] = both / min(sizes) + both / max(sizes) if fits else 0.0
        best[i][j] = max(best[i + 1][j], best[i][j + 1], alike[i, j] + best[i + 1][j + 1])
    found: list[_Partners] = []
    rest: Counter[str] = Counter()  # the words of the last pair that stand on one side only
    lone: list[tuple[_Partners, Counter[str]]] = []  # since that pair
    i = j = 0
    while i < len(old) or j < len(new):
        if i < len(old) and j < len(new) and alike[i, j] and best[i][j] == alike[i, j] + best[i + 1][j + 1]:
            pair = ([old[i]], [new[j]])
            rest = (mine[i] - theirs[j]) + (theirs[j] - mine[i])
            while lone and _is_within(lone[-1][1], rest):
                (olds, news), _words = lone.pop()
                found.pop()
                pair = (olds + pair[0], news + pair[1])
            found.append(pair)
            lone = []
            i, j = i + 1, j + 1
            continue
        gone = j == len(new) or (i < len(old) and best[i][j] == best[i + 1][j])
        alone: _Partners = ([old[i]], []) if gone else ([], [new[j]])
        words = mine[i] if gone else theirs[j]
        i, j = (i + 1, j) if gone else (i, j + 1)
        if found and not lone and _is_within(words, rest):
            found[-1] = (found[-1][0] + alone[0], found[-1][1] + alone[1])
            continue
        lone.append((alone, words))
        found.append(alone)
    return found


def _is_within(words: Counter[str], others: Counter[str]) -> bool:
    """Whether most of `words` are among `others`, which then holds them no more."""
    both = words & others
    if not words or both.total() < JOINED * words.total():
        return False
    others -= both
    return True


def _hunks(changes: Sequence[_Change]) -> Iterator[list[_Change]]:
    """Group changes that are near each other, with their context."""
    hunk: list[_Change] = []
    for number, change in enumerate(changes):
        before = CONTEXT_LINES if number else 0  # context of the change before this stretch, and of the one after it
        after = CONTEXT_LINES if number < len(changes) - 1 else 0
        _, old, old_end, new, new_end = change
        if not change.same or old_end - old <= before + after:
            hunk.append(change)
            continue
        if hunk:
            yield [*hunk, _Change(True, old, old + before, new, new + before)]
        hunk = [_Change(True, old_end - after, old_end, new_end - after, new_end)] if after else []
    if hunk:
        yield hunk


# --- Prose or code ---------------------------------------------------------------------------------------------------

_CODE_LINE = re.compile(
    r"""
      \s{4,}\S | \t                                     # indented
    | [{}\[\]()<@$\#]+\S*$                              # a bracket, a tag, a decorator by itself
    | (?:async|await|def|class|import|return|const|var|function|from\ \S+\ import)\b
    | (?:if|elif|for|while|with|try|else)\b.*:$
    | .*[;{\[(]\s*$ | .*\w\([^)]*\)[:;]?\s*$            # ends like a statement or a call
    | [\w.\[\]"']+\ ?[:+-]?=[^=]                       # an assignment
    | \s*["'][\w-]+["']:                               # JSON
    """,
    re.VERBOSE,
)


def _is_code(text: str) -> bool:
    """Whether most lines look like program text or data rather than sentences; what Markdown fences in does."""
    lines, code, fenced = 0, 0, False
    for line in text[:50_000].split("\n"):
        if line.lstrip().startswith(("```", "~~~")):
            fenced = not fenced
        elif line.strip():
            lines += 1
            code += fenced or _CODE_LINE.match(line) is not None
    return 2 * code > lines
