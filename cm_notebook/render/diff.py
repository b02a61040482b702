"""What changed between two attempts: word by word for prose, line by line for code.

Strategy: one comparison, ``_changes``, over lists of lines or words, and four ways of showing it. difflib's cost grows
with the third power of a text made for it, so each comparison has a price, and all of one call share ``BUDGET``. What
is too dear at once is cut into small comparisons at the items that occur once in both texts; what is still too dear is
shown as replaced as a whole: right, if coarse. Above the sizes below ``words`` becomes ``lines``, and ``lines`` becomes
one sentence.

Texts are cleaned and escaped here. ``<ins>`` and ``<del>`` are told apart by underline and line-through and by words
for screen readers, never by colour alone.
"""

from __future__ import annotations

import difflib
import html
import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

from .markdown import clean

WORD_LIMIT = 60_000
"""Characters of both texts together beyond which words are not compared, but lines."""
LINE_LIMIT = 20_000
"""Lines of both texts together beyond which nothing is compared."""
CHAR_LIMIT = 2_000_000
"""Characters of both texts together beyond which nothing is compared."""
BUDGET = 10_000_000
"""Steps that difflib may take in the worst case; about two seconds."""
CONTEXT_LINES = 3
CONTEXT_WORDS = 25
"""Unchanged lines and words that stay around a change; the rest is folded."""

_HIDDEN = "position:absolute;width:1px;height:1px;overflow:hidden;clip:rect(0,0,0,0);white-space:nowrap"
_STYLE = {
    "ins": "background:rgba(46,160,67,0.25);text-decoration:underline",
    "del": "background:rgba(248,81,73,0.25);text-decoration:line-through",
}
_WORD = {"ins": "added", "del": "removed"}
_FRAME = "margin:0 0 8px;white-space:pre-wrap;overflow-wrap:break-word"


def between(old: str, new: str) -> str:
    """Show the difference as HTML: by words when both texts are prose, by lines when one looks like code."""
    return lines(old, new) if _is_code(old) or _is_code(new) else words(old, new)


def words(old: str, new: str) -> str:
    """Show the difference word by word, as HTML; long unchanged stretches are folded to "…"."""
    old, new = clean(old), clean(new)
    if len(old) + len(new) > WORD_LIMIT:
        return lines(old, new)
    if old == new:
        return _sentence("No changes.")
    before, after = _split_words(old), _split_words(new)
    shown: list[str] = []
    for change in _changes(before, after):
        if change.same:
            kept = before[change.old : change.old_end]
            shown.append(_fold(kept, at_start=change.old == 0, at_end=change.old_end == len(before)))
        else:
            shown.append(_mark("del", "".join(before[change.old : change.old_end])))
            shown.append(_mark("ins", "".join(after[change.new : change.new_end])))
    return f'<div style="{_FRAME}">{"".join(shown)}</div>\n'


def lines(old: str, new: str) -> str:
    """Show the difference line by line, as HTML: changed lines with three unchanged ones around them."""
    shown: list[str] = []
    for kind, text in _unified(old, new):
        if kind == "sentence":
            return _sentence(text)
        shown.append(_mark(kind, text) if kind in ("ins", "del") else html.escape(text))
        shown.append("\n")
    style = "margin:0 0 8px;font-family:monospace;font-size:12px;overflow-x:auto"
    return f'<pre style="{style}">{"".join(shown)}</pre>\n'


def text(old: str, new: str) -> str:
    """Show the difference as a plain unified diff, for ``text/plain``."""
    return "\n".join(text for _, text in _unified(old, new)) + "\n"


_Kind = Literal["hunk", "same", "ins", "del", "sentence"]


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


def _mark(tag: str, text: str) -> str:
    if not text:
        return ""
    hidden = f'<span style="{_HIDDEN}">{_WORD[tag]} </span>'
    return f'<{tag} style="{_STYLE[tag]}">{hidden}{html.escape(text)}</{tag}>'


def _fold(words: Sequence[str], *, at_start: bool, at_end: bool) -> str:
    head, tail = 0 if at_start else CONTEXT_WORDS, 0 if at_end else CONTEXT_WORDS
    if len(words) <= head + tail + CONTEXT_WORDS:  # a short fold hides more than it saves
        return html.escape("".join(words))
    ending = words[len(words) - tail :]
    return html.escape("".join(words[:head]) + (" …" if head else "…") + "".join(ending))


def _split_words(text: str) -> list[str]:
    # A space belongs to its word: by itself it would match everywhere.
    return re.findall(r"\s*(?:\w+|[^\w\s])|\s+", text)


# --- Comparing -------------------------------------------------------------------------------------------------------


class _Change(NamedTuple):
    """``old[old:old_end]`` is, or becomes, ``new[new:new_end]``."""

    same: bool
    old: int
    old_end: int
    new: int
    new_end: int


def _changes(old: Sequence[str], new: Sequence[str]) -> list[_Change]:
    """List the steps from `old` to `new`, in order: what is the same and what is not take turns."""
    changes: list[_Change] = []
    at, to = 0, 0
    for start, other, size in (*_matches(old, new), (len(old), len(new), 0)):
        if (at, to) != (start, other):
            changes.append(_Change(False, at, start, to, other))
        elif size and changes:
            joined = changes.pop()
            start, other, size = joined.old, joined.new, size + joined.old_end - joined.old
        if size:
            changes.append(_Change(True, start, start + size, other, other + size))
        at, to = start + size, other + size
    return changes


def _matches(old: Sequence[str], new: Sequence[str]) -> Iterator[tuple[int, int, int]]:
    """Where equal stretches start in `old` and `new`, and their lengths; in order, never overlapping."""
    shorter = min(len(old), len(new))
    head = next((index for index in range(shorter) if old[index] != new[index]), shorter)
    rest = shorter - head
    tail = next((index for index in range(rest) if old[-1 - index] != new[-1 - index]), rest)
    end, other_end = len(old) - tail, len(new) - tail
    yield 0, 0, head
    budget = BUDGET
    anchors = [(end, other_end)]
    if _price(old[head:end], new[head:other_end]) > budget:
        anchors = [*_anchors(old, new, head, end, other_end), *anchors]
    at, to = head, head
    for start, other in anchors:
        part, other_part = old[at:start], new[to:other]
        price = _price(part, other_part)
        if price <= budget:
            budget -= price
            matcher = difflib.SequenceMatcher(None, part, other_part, autojunk=False)
            yield from (
                (at + block.a, to + block.b, block.size) for block in matcher.get_matching_blocks() if block.size
            )
        if start < end:
            yield start, other, 1
        at, to = start + 1, other + 1
    yield end, other_end, tail


def _price(old: Sequence[str], new: Sequence[str]) -> int:
    """Bound of difflib's steps: it looks at all equal pairs, and does so again for each stretch that it finds."""
    counts = Counter(old)
    return sum(counts[item] for item in new) * min(len(old), len(new)) + len(old) + len(new)


def _anchors(old: Sequence[str], new: Sequence[str], head: int, end: int, other_end: int) -> list[tuple[int, int]]:
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
    """Whether most lines look like program text or data rather than sentences."""
    sample = [line for line in text[:50_000].split("\n") if line.strip()]
    return bool(sample) and 2 * sum(1 for line in sample if _CODE_LINE.match(line)) > len(sample)
