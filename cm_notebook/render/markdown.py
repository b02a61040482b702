"""What an agent wrote, made harmless and readable: hostile text to safe HTML.

Strategy, in three layers, each of which holds by itself:

1. ``clean`` takes out of a text what acts instead of being read (escape sequences, control characters) and makes visible
   what hides (bidi overrides, invisible tag letters). Nothing in it reaches beyond one line, so a stream can be cleaned
   line by line with the same result.
2. ``BlockStream`` cuts the cleaned lines into top-level Markdown blocks. It cuts only where the line that follows must
   begin a new block whatever comes later, so that a closed block never changes and each character is rendered once.
3. ``_render`` gives one block to markdown-it with raw HTML off. Tags, attributes and styles are ours alone; links go to
   http, https and mailto, images are links. The same HTML is shown live and saved in notebooks that nobody trusts, so its
   look is inline ``style=`` in the forms that JupyterLab's sanitizer keeps (``0.12``, never ``.12``), without text colours.

``to_html`` is layer 2 run over a whole text. Three limits bound the cost of anything: a block ends after ``BLOCK_LIMIT``
characters, only the first ``FORMAT_LIMIT`` of a text are formatted (the rest is shown as plain text), and a block nested
deeper than ``DEPTH_LIMIT`` is shown as plain text. Nothing is left out: link definitions, titles and the words after a
code fence are shown too, because what is approved unseen is read by the next agent.

markdown-it is imported at first use: ``import cm_notebook`` must not pay for it.
"""

from __future__ import annotations

import functools
import html
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from markdown_it import MarkdownIt
    from markdown_it.rules_block import StateBlock
    from markdown_it.token import Token

BLOCK_LIMIT = 65_536
"""Characters after which an unfinished block is shown in pieces; a list may hold twice as many."""
FORMAT_LIMIT = 131_072
"""Characters of a text that are formatted; what follows is plain. A step shows 64 kB by default."""
DEPTH_LIMIT = 20
"""Markdown levels inside each other (a list has two: list and item) beyond which a block is plain text."""
COLUMN_LIMIT = 100
"""Columns beyond which a table is plain text."""

# --- 1. Cleaning -----------------------------------------------------------------------------------------------------

# The classes are spelt as escapes: the characters themselves would act on whoever edits this file.
_SUSPECT = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069\U000e0000-\U000e007f]"
)
_ESCAPE = re.compile(
    "(?:\x1b\\[|\x9b)[0-?]*+[ -/]*+[@-~]"  # CSI: colours, cursor movement
    "|(?:\x1b[\\]PX^_]|[\x90\x98\x9d-\x9f])[^\x07\x1b\x9c\r\n]*+(?:\x07|\x1b\\\\|\x9c)"  # OSC and kin, if they end
    "|\x1b[ -/]*+[0-~]"
)
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]+")
_SURROGATES = re.compile("[\ud800-\udbff][\udc00-\udfff]|[\ud800-\udfff]")
_FLAG_OR_HIDDEN = re.compile(
    "(\U0001f3f4[\U000e0020-\U000e007e]{1,8}\U000e007f)"  # the flags of England, Scotland and Wales
    "|[\u202a-\u202e\u2066-\u2069\U000e0000-\U000e007f]"
)


def clean(text: str | bytes) -> str:
    """The text without what acts or hides; linear in its length.

    ANSI and OSC sequences and control characters other than ``\\n`` and ``\\t`` are gone; ``\\r\\n`` is ``\\n`` and a line
    that ``\\r`` overwrote (a progress bar) keeps its last state; surrogate halves are joined or replaced by U+FFFD, as
    is invalid UTF-8; bidi overrides and invisible tag letters are spelt out, for instance ``⟨U+202E⟩``.

    Cleaning twice changes nothing, and cleaning line by line gives the same text.
    """
    if isinstance(text, bytes):
        text = text.decode("utf-8", "replace")
    if not _SUSPECT.search(text):
        return text
    text = _ESCAPE.sub("", text).replace("\r\n", "\n")
    if "\r" in text:
        text = "\n".join(line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n"))
    text = _SURROGATES.sub(lambda found: found[0].encode("utf-16", "surrogatepass").decode("utf-16", "replace"), text)
    return _spell_hidden(_CONTROL.sub("", text))


def _spell_hidden(text: str) -> str:
    return _FLAG_OR_HIDDEN.sub(lambda found: found[1] or f"⟨U+{ord(found[0]):04X}⟩", text)


class Clipped(NamedTuple):
    """A text cut to its two ends; ``tail`` is empty when nothing was left out."""

    head: str
    tail: str
    omitted_chars: int
    """Characters between head and tail."""
    total_bytes: int
    """Size of the whole text in UTF-8."""


def clip(text: str, limit_bytes: int = 64_000) -> Clipped:
    """The beginning and the end of `text`, together at most `limit_bytes` bytes of UTF-8.

    Cuts fall between lines where a line ends within half of the piece, never inside a character.
    """
    data = text.encode("utf-8", "surrogatepass")
    total = len(data)
    if total <= limit_bytes:
        return Clipped(text, "", 0, total)
    half = max(limit_bytes, 0) // 2
    start, end = half, total - half
    while start > 0 and data[start] & 0xC0 == 0x80:
        start -= 1
    while end < total and data[end] & 0xC0 == 0x80:
        end += 1
    head, tail = data[:start].decode("utf-8", "surrogatepass"), data[end:].decode("utf-8", "surrogatepass")
    head = head[: head.rfind("\n", len(head) // 2) + 1] or head
    after = tail.find("\n", 0, len(tail) // 2) + 1
    tail = tail[after:]
    return Clipped(head, tail, len(text) - len(head) - len(tail), total)


# --- 2. Cutting a stream into blocks ---------------------------------------------------------------------------------

_FENCE = re.compile(r" {0,3}(?:(`{3,})(?=[^`]*$)|(~{3,}))")
_FENCE_END = re.compile(r" {0,3}(`{3,}|~{3,})[ \t]*$")
_HEADING = re.compile(r" {0,3}#{1,6}(?:[ \t]|$)")
_ITEM = re.compile(r" {0,3}(?:[-+*]|\d{1,9}[.)])(?:[ \t]|$)")


class Block(NamedTuple):
    """A finished piece of a streamed text; it will not change."""

    index: int
    """Counted from 0."""
    html: str
    source: str
    """The cleaned text it shows; all sources together are the whole cleaned text."""


class BlockStream:
    """Renders a text while it is being written: each character once, however long it gets.

    The blocks do not depend on how the text was cut into deltas. Joined, their HTML is that of :func:`to_html`, which
    is the HTML of the text as a whole, with these differences: a link by reference works once its definition has been
    written (``to_html`` looks ahead); a block of more than ``BLOCK_LIMIT`` characters is shown in pieces, so a list goes
    on as a second list, and the rows of a table without their header as text.

    Examples
    --------
    >>> stream = BlockStream()
    >>> stream.push("# Plan\\nFirst")
    [Block(index=0, html='<div role="heading" …>Plan</div>\\n', source='# Plan\\n')]
    >>> stream.tail
    'First'
    >>> stream.finish()
    [Block(index=1, html='<p …>First</p>\\n', source='First')]
    """

    def __init__(self) -> None:
        self._references: dict[str, Any] = {}
        self._count = 0
        self._done = 0  # characters in closed blocks
        self._unfinished: list[str] = []  # pieces of the line that is being written, as they came
        self._blocks: list[Block] = []  # closed, to be handed out by the call under way
        self._fence = ""  # the marker that opened the top-level fence we are in
        self._fence_again = ""  # what opens it again for a later piece
        self._continued = False  # a piece of it has been shown
        self._reset()

    def _reset(self) -> None:
        self._open: list[str] = []  # cleaned lines of the open block
        self._size = 0
        self._blank = True  # nothing but blank lines yet
        self._after_blank = False
        self._in_list = False
        self._inner_fence = False  # a list holds what may be a fence, of an item or of its own
        self._check_at = 0  # size at which asking markdown-it again is affordable

    def push(self, delta: str) -> list[Block]:
        """Take the next piece of text, of any length, and return the blocks that it closed."""
        if "\n" not in delta:
            self._unfinished.append(delta)
            return []
        first, *lines, rest = delta.split("\n")
        self._unfinished.append(first)
        self._line(clean("".join(self._unfinished)) + "\n")
        for line in lines:
            self._line(clean(line) + "\n")
        self._unfinished = [rest] if rest else []
        return self._take()

    @property
    def tail(self) -> str:
        """The cleaned text that is in no block yet. Costs its length: ask when blocks closed, not at every delta."""
        return "".join(self._open) + clean("".join(self._unfinished))

    def finish(self) -> list[Block]:
        """The text is complete: close and return what is open."""
        last = clean("".join(self._unfinished))
        self._unfinished = []
        if last:
            self._line(last)
        self._close()
        self._fence, self._continued = "", False
        return self._take()

    def _take(self) -> list[Block]:
        closed, self._blocks = self._blocks, []
        return closed

    def _line(self, line: str) -> None:
        if self._done >= FORMAT_LIMIT or len(line) > BLOCK_LIMIT:
            self._plain_line(line)
        elif self._fence:
            self._fenced_line(line)
        else:
            self._markdown_line(line)

    def _plain_line(self, line: str) -> None:
        if self._size + len(line) > BLOCK_LIMIT:
            self._close()
        if len(line) <= BLOCK_LIMIT:
            self._append(line)
            return
        for start in range(0, len(line), BLOCK_LIMIT):
            piece = line[start : start + BLOCK_LIMIT]
            self._emit(piece, _code(piece) if self._fence else _plain(piece))

    def _fenced_line(self, line: str) -> None:
        self._append(line)
        end = _FENCE_END.match(line)
        if end and end[1].startswith(self._fence):
            self._close()
            self._fence, self._continued = "", False
        elif self._size >= BLOCK_LIMIT:
            self._close()

    def _markdown_line(self, line: str) -> None:
        if not line.strip(" \t\n"):
            self._append(line)
            self._after_blank = True
        else:
            fence, heading = _FENCE.match(line), _HEADING.match(line)
            if not self._blank and self._begins_block(line, bool(fence or heading)):
                self._close()
            self._append(line)
            self._blank = self._after_blank = False
            if _ITEM.match(line):
                self._in_list = True
            if self._in_list:
                self._inner_fence = self._inner_fence or "```" in line or "~~~" in line
            elif fence:
                self._fence = fence[1] or fence[2]
                self._fence_again = " " * (len(line) - len(line.lstrip(" "))) + self._fence + "\n"
            elif heading:
                self._close()
        if self._size >= BLOCK_LIMIT * (2 if self._in_list else 1):
            self._close()

    def _begins_block(self, line: str, interrupts: bool) -> bool:
        """Whether `line` begins a block of its own, whatever the open block is and whatever follows."""
        indent = len(line) - len(line.lstrip(" "))
        if line[indent] == "\t":
            return False
        if not self._in_list:
            return interrupts or (self._after_blank and indent <= 3)
        # An item's text starts at column 2 or later, so a line before that is outside of it, unless it is a lazy
        # continuation (not after a blank line), another item, or code in a fence that was opened between two items.
        item = bool(_ITEM.match(line))
        if indent > 1 or not (interrupts or (self._after_blank and not item) or (item and self._size >= BLOCK_LIMIT)):
            return False
        return not self._inner_fence or self._fences_are_closed()

    def _fences_are_closed(self) -> bool:
        # Which fence belongs to which item takes a real parser. Asked again only after a quarter more text: linear.
        if self._size < self._check_at:
            return False
        try:
            tokens = _block_parser().parse("".join(self._open) + "# end\n", {})
        except _TooDeep:
            tokens = []
        closed = bool(tokens) and tokens[-1].type == "heading_close" and tokens[-1].level == 0
        self._check_at = self._size + self._size // 4
        return closed

    def _append(self, line: str) -> None:
        self._open.append(line)
        self._size += len(line)

    def _close(self) -> None:
        if self._open:
            source = "".join(self._open)
            if self._done >= FORMAT_LIMIT:
                self._emit(source, _plain(source))
            else:
                self._emit(source, _render((self._fence_again if self._continued else "") + source, self._references))
        self._reset()

    def _emit(self, source: str, made: str) -> None:
        self._blocks.append(Block(self._count, made, source))
        self._count += 1
        self._done += len(source)
        self._continued = bool(self._fence)


def to_html(text: str | bytes) -> str:
    """The Markdown `text` of an agent as safe HTML; cleaned, bounded, see the limits on top of this file."""
    text = clean(text)
    stream = BlockStream()
    if "]:" in text[:FORMAT_LIMIT]:
        stream._references = _references(text)
    return "".join(block.html for block in (*stream.push(text), *stream.finish()))


def _references(text: str) -> dict[str, Any]:
    # Definitions may stand at the end, so they are read first. The same cuts as later: the same definitions.
    found: dict[str, Any] = {}
    cutter = BlockStream()
    for block in (*cutter.push(text[:FORMAT_LIMIT]), *cutter.finish()):
        pass
    return found
