"""What an agent wrote, made harmless and readable: hostile text to safe HTML.

Strategy, in three layers, each of which holds by itself:

1. ``clean`` takes out of a text what acts instead of being read (escape sequences, control characters) and makes
   visible what hides (bidi overrides, invisible tag letters). Nothing in it reaches beyond one line, so a stream can
   be cleaned line by line with the same result.
2. ``_Cutter`` cuts the cleaned lines into top-level Markdown blocks. It cuts only where the line that follows must
   begin a new block whatever comes later, so that a closed block never changes and each character is rendered once.
3. ``_render`` gives one block to markdown-it with raw HTML off. Tags, attributes and styles are ours alone; links go
   to http, https and mailto, images are links. The same HTML is shown live and saved in notebooks that nobody trusts,
   so its look is inline ``style=`` in forms that JupyterLab's sanitizer keeps (``0.12``, never ``.12``), and it sets
   no text colour, to be readable in light and dark.

``BlockStream`` and ``to_html`` are layers 2 and 3 over a stream and over a whole text. The limits below bound the cost
of any text: a block that grows too long is shown in pieces, and what is too much is shown as plain text. Nothing is
left out: link definitions, titles and the words after a code fence are shown too, because the next agent reads them.

markdown-it is imported at first use: ``import cm_notebook`` must not pay for it.
"""

from __future__ import annotations

import contextlib
import functools
import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from markdown_it import MarkdownIt
    from markdown_it.rules_block import StateBlock
    from markdown_it.rules_core import StateCore
    from markdown_it.token import Token

BLOCK_LIMIT = 65_536
"""Characters after which an unfinished block is shown in pieces; a list may hold twice as many."""
FORMAT_LIMIT = 131_072
"""Characters of a text that are formatted; what follows is plain. A step shows 64 kB by default."""
DEPTH_LIMIT = 18
"""Markdown levels inside each other (a list has two: list and item) from which on a block is plain text."""
COLUMN_LIMIT = 100
"""Columns beyond which a table is plain text."""

# --- 1. Cleaning -----------------------------------------------------------------------------------------------------

# The classes are spelt as escapes: the characters themselves would act on whoever edits this file.
_SUSPECT = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069\U000e0000-\U000e007f]")
_ESCAPE = re.compile(
    "(?:\x1b\\[|\x9b)[0-?]*+[ -/]*+[@-~]"  # CSI: colours, cursor movement
    "|(?:\x1b[\\]PX^_]|[\x90\x98\x9d-\x9f])[^\x07\x1b\x9c\r\n]*+(?:\x07|\x1b\\\\|\x9c)"  # OSC and kin, if they end
    "|\x1b[ -/]*+[0-~]"
)
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]+")
_SURROGATE = re.compile("[\ud800-\udfff]")
_HIDDEN = [*range(0x202A, 0x202F), *range(0x2066, 0x206A), *range(0xE0000, 0xE0080)]
_SPELT = {code: f"⟨U+{code:04X}⟩" for code in _HIDDEN}
# The flags of England, Scotland and Wales are written with such letters.
_FLAGS = ["\U0001f3f4" + "".join(chr(0xE0000 + ord(c)) for c in f"gb{place}\x7f") for place in ("eng", "sct", "wls")]
_FLAG = re.compile(f"({'|'.join(_FLAGS)})")


def clean(text: str | bytes) -> str:
    r"""Take out of a text what acts, and make visible what hides; linear in its length.

    ANSI and OSC sequences and control characters other than ``\n`` and ``\t`` are gone; ``\r\n`` is ``\n`` and a
    line that ``\r`` overwrote (a progress bar) keeps its last state; surrogate halves are joined or replaced by U+FFFD,
    as is invalid UTF-8; bidi overrides and invisible tag letters are spelt out, for instance ``⟨U+202E⟩``.

    Cleaning twice changes nothing, and cleaning line by line gives the same text.
    """
    if isinstance(text, bytes):
        text = text.decode("utf-8", "replace")
    if not _SUSPECT.search(text):
        return text
    text = _CONTROL.sub("", _ESCAPE.sub("", text)).replace("\r\n", "\n")
    if "\r" in text:
        text = "\n".join(line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n"))
    if _SURROGATE.search(text):
        text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return _spell_hidden(text)


def _spell_hidden(text: str) -> str:
    """Spell out what no reader can see. The letters of a flag are no secret."""
    parts = _FLAG.split(text)  # flags at the odd places
    parts[::2] = [part.translate(_SPELT) for part in parts[::2]]
    return "".join(parts)


class Clipped(NamedTuple):
    """A text cut to its two ends; ``tail`` is empty when nothing was left out."""

    head: str
    tail: str
    omitted_chars: int
    """Characters between head and tail."""
    total_bytes: int
    """Size of the whole text in UTF-8."""


def clip(text: str, limit_bytes: int = 64_000) -> Clipped:
    """Cut `text` to its beginning and its end, together at most `limit_bytes` bytes of UTF-8.

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

_FENCE_START = re.compile(r" {0,3}(?:(`{3,})(?=[^`]*$)|(~{3,}))")
_FENCE_END = re.compile(r" {0,3}(`{3,}|~{3,})[ \t]*$")
_HEADING = re.compile(r" {0,3}#{1,6}(?:[ \t]|$)")
_ITEM = re.compile(r" {0,3}(?:[-+*]|\d{1,9}[.)])(?:[ \t]|$)")


class _Piece(NamedTuple):
    source: str
    markdown: str | None
    """What markdown-it gets for it; ``None``: shown as it stands."""


class _Cutter:
    """Cuts a text, given line by line, into pieces of Markdown that can be rendered one by one."""

    def __init__(self) -> None:
        self._pieces: list[_Piece] = []  # finished, not yet taken
        self._done = 0  # characters in finished pieces
        self._fence = ""  # the marker of the top-level fence we are in
        self._fence_again = ""  # what opens it again for a later piece of it; "" in its first piece
        self._fence_indent = 0
        self._reset()

    def _reset(self) -> None:
        self.open: list[str] = []  # lines of the unfinished piece
        self._size = 0
        self._blank = True  # nothing but blank lines yet
        self._after_blank = False
        self._in_list = False
        self._inner_fence = False  # a list holds what may be a fence, of an item or of its own
        self._check_at = 0  # size at which asking markdown-it again is affordable

    def take(self) -> list[_Piece]:
        finished, self._pieces = self._pieces, []
        return finished

    def line(self, line: str) -> None:
        if self._done >= FORMAT_LIMIT or len(line) > BLOCK_LIMIT:
            self._plain_line(line)
        elif self._fence:
            self._fenced_line(line)
        else:
            self._markdown_line(line)

    def close(self) -> None:
        """Finish the open piece. A fence stays open: its next line goes on with it."""
        if self.open:
            source = "".join(self.open)
            self._emit(source, None if self._done >= FORMAT_LIMIT else self._fence_again + source)
        self._reset()

    def _emit(self, source: str, markdown: str | None) -> None:
        self._pieces.append(_Piece(source, markdown))
        self._done += len(source)
        if self._fence:
            self._fence_again = f"{' ' * self._fence_indent}{self._fence}\n"

    def _append(self, line: str) -> None:
        self.open.append(line)
        self._size += len(line)

    def _plain_line(self, line: str) -> None:
        if self._size + len(line) > BLOCK_LIMIT:
            self.close()
        if len(line) <= BLOCK_LIMIT:
            self._append(line)
        else:
            for start in range(0, len(line), BLOCK_LIMIT):
                self._emit(line[start : start + BLOCK_LIMIT], None)

    def _fenced_line(self, line: str) -> None:
        self._append(line)
        end = _FENCE_END.match(line)
        if end and end[1].startswith(self._fence):
            self.close()
            self._fence = self._fence_again = ""
        elif self._size >= BLOCK_LIMIT:
            self.close()

    def _markdown_line(self, line: str) -> None:
        if not line.strip(" \t\n"):
            self._append(line)
            self._after_blank = True
        else:
            indent = len(line) - len(line.lstrip(" "))
            fence, heading = _FENCE_START.match(line), _HEADING.match(line)
            if not self._blank and self._begins_block(line, indent, bool(fence or heading)):
                self.close()
            self._append(line)
            self._blank = self._after_blank = False
            self._in_list = self._in_list or bool(_ITEM.match(line))
            if self._in_list:
                self._inner_fence = self._inner_fence or "```" in line or "~~~" in line
            elif fence:
                self._fence, self._fence_indent = fence[1] or fence[2], indent
            elif heading:
                self.close()
        if self._size >= BLOCK_LIMIT * (2 if self._in_list else 1):
            self.close()

    def _begins_block(self, line: str, indent: int, interrupts: bool) -> bool:
        """Whether `line` begins a block of its own, whatever the open one is and whatever follows."""
        if line[indent] == "\t":
            return False  # code, or the text of an item
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
        self._check_at = self._size + self._size // 4
        try:
            tokens = _block_parser().parse("".join(self.open) + "# end\n", {})
        except _TooDeepError:
            return False
        return tokens[-1].type == "heading_close" and tokens[-1].level == 0


@dataclass(frozen=True, slots=True)
class Block:
    """A finished piece of a streamed text; it will not change."""

    index: int
    """Counted from 0."""
    html: str
    source: str
    """The cleaned text it shows; all sources together are the whole cleaned text."""


class BlockStream:
    r"""Renders a text while it is being written: each character once, however long it gets.

    The blocks do not depend on how the text was cut into deltas, and their HTML together is that of :func:`to_html`,
    with one difference: a link by reference works only once its definition has been written (``to_html`` looks ahead).
    Against Markdown rendered as a whole, a block longer than ``BLOCK_LIMIT`` is shown in pieces: a list goes on as a
    second list, a code block as a second code block, the rows of a table without their header as text.

    Examples
    --------
    >>> stream = BlockStream()
    >>> [block.source for block in stream.push("# Plan\nFirst, ")]
    ['# Plan\n']
    >>> stream.tail
    'First, '
    >>> [block.source for block in stream.push("look.\n\nThen") + stream.finish()]
    ['First, look.\n\n', 'Then']
    """

    def __init__(self) -> None:
        self._cutter = _Cutter()
        self._unfinished: list[str] = []  # the line that is being written, in pieces as they came
        self._references: dict[str, Any] = {}
        self._count = 0

    def push(self, delta: str) -> list[Block]:
        """Take the next piece of text, of any length; the blocks it closed."""
        if "\n" not in delta:
            self._unfinished.append(delta)
            return []
        first, *lines, rest = delta.split("\n")
        self._cutter.line(clean("".join(self._unfinished) + first) + "\n")
        for line in lines:
            self._cutter.line(clean(line) + "\n")
        self._unfinished = [rest]
        return self._render()

    @property
    def tail(self) -> str:
        """The cleaned text that is in no block yet. Costs its length: ask when blocks closed, not at every delta."""
        return "".join(self._cutter.open) + clean("".join(self._unfinished))

    def finish(self) -> list[Block]:
        """Close what is open, the text being complete; the last blocks."""
        last = clean("".join(self._unfinished))
        self._unfinished = []
        if last:
            self._cutter.line(last)
        self._cutter.close()
        return self._render()

    def _render(self) -> list[Block]:
        start, pieces = self._count, self._cutter.take()
        self._count += len(pieces)
        return [
            Block(index, _render(piece, self._references), piece.source) for index, piece in enumerate(pieces, start)
        ]


def to_html(text: str | bytes) -> str:
    """Turn the Markdown that an agent wrote into safe HTML.

    Cleaned first. Bounded in every direction; see the limits on top of this file.
    """
    cutter = _Cutter()
    *lines, last = clean(text).split("\n")
    for line in lines:
        cutter.line(line + "\n")
    if last:
        cutter.line(last)
    cutter.close()
    pieces = cutter.take()
    references: dict[str, Any] = {}
    for piece in pieces:  # definitions often stand at the end
        if piece.markdown is not None and "]:" in piece.markdown:
            _define(piece.markdown, references)
    return "".join(_render(piece, references) for piece in pieces)


# --- 3. From a block to HTML -----------------------------------------------------------------------------------------

_GREY = "background:rgba(128,128,128,0.12)"
_LINE = "1px solid rgba(128,128,128,0.4)"
_MONO = "font-family:monospace;font-size:12px"
_STYLES = {
    "p": "margin:0 0 8px",
    "ul": "margin:0 0 8px;padding-left:24px",
    "ol": "margin:0 0 8px;padding-left:24px",
    "blockquote": "margin:0 0 8px;padding:0 0 0 12px;border-left:3px solid rgba(128,128,128,0.5)",
    "table": "border-collapse:collapse",
    "th": f"border:{_LINE};padding:2px 8px",
    "td": f"border:{_LINE};padding:2px 8px",
    "hr": f"border:0;border-top:{_LINE};margin:8px 0",
}
_HEADING_PX = {"h1": 15, "h2": 14}
_LINK = re.compile(r"(?:https?://|mailto:)", re.IGNORECASE)


class _TooDeepError(Exception):
    """Blocks inside blocks beyond DEPTH_LIMIT, where markdown-it would leave out the rest."""


def _render(piece: _Piece, references: dict[str, Any]) -> str:
    if piece.markdown is None:
        return _plain(piece.source)
    try:
        made = str(_parser().render(piece.markdown, {"references": references}))
    except _TooDeepError:
        return _plain(piece.source)
    return _spell_hidden(made)  # entities such as &#8238; come to life only here


def _define(markdown: str, references: dict[str, Any]) -> None:
    with contextlib.suppress(_TooDeepError):  # such a block will be plain text and defines nothing
        _block_parser().parse(markdown, {"references": references})


@functools.cache
def _block_parser() -> MarkdownIt:
    """Tells blocks apart and collects link definitions; does not look inside paragraphs."""
    from markdown_it import MarkdownIt

    # maxNesting also bounds brackets inside brackets, whose cost grows with it. At DEPTH_LIMIT we refuse ourselves, and
    # no block adds more than two levels. "inline_definitions" keeps link definitions in sight.
    parser = MarkdownIt("commonmark", {"html": False, "maxNesting": DEPTH_LIMIT + 2, "inline_definitions": True})
    parser.enable(["table", "strikethrough"])
    parser.validateLink = _is_safe  # type: ignore[method-assign]
    rules = parser.block.ruler
    rules.at("table", _table, {"alt": ["paragraph", "reference"]})
    rules.before("table", "depth", _refuse_depth)
    rules.before("table", "short_row", _ends_table, {"alt": ["blockquote"]})  # a table asks this chain where it ends
    parser.core.ruler.enableOnly(["normalize", "block"])
    return parser


@functools.cache
def _parser() -> MarkdownIt:
    parser = _block_parser.__wrapped__()
    parser.core.ruler.enable(["inline", "text_join"])
    parser.core.ruler.push("style", _style)
    renderer: Any = parser.renderer  # its rules are typed as methods, and ours are functions
    renderer.rules.update(
        link_open=_link_open,
        link_close=_link_close,
        image=_image,
        definition=_definition,
        fence=_fence,
        code_block=lambda tokens, index, options, env: _code(tokens[index].content),
        code_inline=_code_inline,
        table_open=lambda tokens, index, options, env: (
            '<div style="overflow-x:auto;margin:0 0 8px">\n' + renderer.renderToken(tokens, index, options, env)
        ),
        table_close=lambda *_: "</table>\n</div>\n",
    )
    return parser


def _is_safe(url: str) -> bool:
    return _LINK.match(url) is not None


def _refuse_depth(state: StateBlock, line: int, end: int, silent: bool) -> bool:
    if state.level >= DEPTH_LIMIT:
        raise _TooDeepError
    return False


def _table(state: StateBlock, line: int, end: int, silent: bool) -> bool:
    from markdown_it.rules_block import table

    if line + 1 < end:
        columns = state.src.count("|", state.bMarks[line + 1], state.eMarks[line + 1])
        if columns > COLUMN_LIMIT:
            return False
        if not silent:
            state.env["columns"] = columns
    return table(state, line, end, silent)


def _ends_table(state: StateBlock, line: int, end: int, silent: bool) -> bool:
    # Missing cells are filled in: without this, rows of one character cost a hundred cells each.
    if state.parentType != "table":
        return False
    return bool(state.eMarks[line] - state.bMarks[line] < state.env["columns"] - 1)


def _style(state: StateCore) -> None:
    for token in state.tokens:
        if token.type in ("heading_open", "heading_close"):
            # Not <h1>: JupyterLab would list it among the notebook's own headings.
            if token.nesting > 0:
                token.attrs = {
                    "role": "heading",
                    "aria-level": token.tag[1:],
                    "style": f"font-size:{_HEADING_PX.get(token.tag, 13)}px;font-weight:600;margin:12px 0 4px",
                }
            token.tag = "div"
        elif token.nesting >= 0 and token.tag in _STYLES:
            usual = "text-align:left" if token.tag in ("td", "th") else ""  # JupyterLab's own is to the right
            align = token.attrs.get("style", usual)
            token.attrs["style"] = f"{_STYLES[token.tag]};{align}" if align else _STYLES[token.tag]


def _anchor(href: object, title: object) -> str:
    named = f' title="{html.escape(str(title))}"' if title else ""
    return f'<a href="{html.escape(str(href))}"{named} rel="noopener noreferrer" target="_blank">'


def _link_open(tokens: Sequence[Token], index: int, options: Any, env: Any) -> str:
    env["in_link"] = True
    return _anchor(tokens[index].attrs["href"], tokens[index].attrs.get("title"))


def _link_close(tokens: Sequence[Token], index: int, options: Any, env: Any) -> str:
    env["in_link"] = False
    return "</a>"


def _image(tokens: Sequence[Token], index: int, options: Any, env: Any) -> str:
    token = tokens[index]
    renderer: Any = _parser().renderer
    text = html.escape(renderer.renderInlineAsText(token.children, options, env) or str(token.attrs["src"]))
    if env.get("in_link"):
        return text  # a badge: the link around it goes where the author wanted
    return f"{_anchor(token.attrs['src'], token.attrs.get('title'))}{text}</a>"


def _definition(tokens: Sequence[Token], index: int, options: Any, env: Any) -> str:
    meta = tokens[index].meta
    title = f" “{html.escape(meta['title'])}”" if meta["title"] else ""
    shown = f"[{html.escape(meta['label'])}]: {_anchor(meta['url'], '')}{html.escape(meta['url'])}</a>{title}"
    return f'<p style="{_STYLES["p"]}">{shown}</p>\n'


def _fence(tokens: Sequence[Token], index: int, options: Any, env: Any) -> str:
    info = tokens[index].info.strip()
    label = f'<div style="font-size:11px">{html.escape(info)}</div>\n' if info else ""
    return label + _code(tokens[index].content)


def _code_inline(tokens: Sequence[Token], index: int, options: Any, env: Any) -> str:
    return f'<code style="{_GREY};padding:0 3px;{_MONO}">{html.escape(tokens[index].content)}</code>'


def _code(text: str) -> str:
    style = f"{_GREY};{_MONO};margin:0 0 8px;padding:8px;overflow-x:auto"
    return f'<pre style="{style}"><code style="background:transparent">{html.escape(text)}</code></pre>\n'


def _plain(text: str) -> str:
    # A browser drops a newline that comes first in <pre>, so it gets one to drop.
    return f'<pre style="margin:0 0 8px;white-space:pre-wrap;overflow-wrap:break-word">\n{html.escape(text)}</pre>\n'
