"""What agents write is hostile until rendered: only an allow-list of HTML ever comes out, and nothing is lost."""

from __future__ import annotations

import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cm_notebook.render import markdown
from cm_notebook.render.markdown import BLOCK_LIMIT, FORMAT_LIMIT, BlockStream, clean, clip, to_html

ALLOWED = {
    "a": {"href", "title", "rel", "target"},
    "div": {"role", "aria-level", "style"},
    "ol": {"start", "style"},
    **{tag: {"style"} for tag in ("p", "ul", "blockquote", "table", "th", "td", "hr", "pre", "code")},
    **{tag: set() for tag in ("br", "em", "strong", "s", "li", "thead", "tbody", "tr")},
}
VOID = {"br", "hr"}


UNHURRIED = settings(deadline=None, max_examples=200)
"""Property tests look at results, never at the clock."""


class Page(HTMLParser):
    """Reads HTML as a browser would, and refuses what is not on the list."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.text, self.links, self.open = "", [], []
        self.feed(html)
        self.close()
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        assert tag in ALLOWED, tag
        assert {name for name, _ in attrs} <= ALLOWED[tag], (tag, attrs)
        for name, value in attrs:
            if name == "style":
                assert re.fullmatch(r"(?!.*url)[a-z0-9 :;,.()-]+", value), value
        if tag == "a":
            given = dict(attrs)
            assert re.match(r"(?:https?://|mailto:)", given["href"], re.IGNORECASE), given
            assert (given["rel"], given["target"]) == ("noopener noreferrer", "_blank")
            assert "a" not in self.open, "a link in a link"
            self.links.append(given["href"])
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        assert tag in VOID
        self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data

    def refuse(self, *args):
        raise AssertionError(args)

    handle_comment = handle_decl = handle_pi = unknown_decl = refuse


def streamed(text: str, *, size: int | None = None) -> list[markdown.Block]:
    stream = BlockStream()
    size = size or max(len(text), 1)
    blocks = [block for start in range(0, len(text), size) for block in stream.push(text[start : start + size])]
    return blocks + stream.finish()


FRAGMENTS = st.sampled_from(
    [
        *[
            "- ",
            "* ",
            "+ ",
            "1. ",
            "2) ",
            "- [ ] ",
            "  - ",
            "   1. ",
            "- a\n",
            "# ",
            "# h\n",
            "###### ",
            "===",
            "---",
            "***",
            "* * *",
        ],
        *[
            " ",
            "  ",
            "   ",
            "    ",
            "\t",
            "\n",
            "\n",
            "\n\n",
            "\r",
            "\r\n",
            "> ",
            "```",
            "~~~",
            "````",
            "```py\n",
            "  ```\n",
        ],
        *[
            "[",
            "](",
            ")",
            "![",
            "]",
            "]: ",
            "(",
            ":",
            "<",
            ">",
            "http://x.y",
            "javascript:x",
            "|",
            "|a|b|\n|-|-|\n",
            "|x|",
        ],
        *["`", "``", "**", "_", "~~", "\\", "&", "&amp;", "&#8238;", "&#x1b;", "<b>", "<script>", "<!-- ", '"', "'"],
        *["a", "word", "é", "🙂", "\u202e", "\x1b[31m", "\ud83d", "\ude00", "\0"],
    ]
)
MARKDOWN = st.lists(FRAGMENTS, max_size=40).map("".join)
ANY = st.text(st.characters(exclude_categories=()), max_size=200)


# --- clean -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ("plain\ttext\n", "plain\ttext\n"),
        ("\x1b[1;31mred\x1b[0m", "red"),
        ("\x9b31mred\x9b0m", "red"),
        ("\x1b[2K\x1b[1Gline", "line"),
        ("\x1b]0;title\x07text", "text"),
        ("\x1b]8;;javascript:alert(1)\x1b\\link\x1b]8;;\x1b\\", "link"),
        ("\x1bPq#0;2\x1b\\after", "after"),
        ("\x1b(Btext\x1b7", "text"),
        ("an \x1b]0;unfinished title is shown", "an 0;unfinished title is shown"),
        ("end \x1b", "end "),
        ("end \x1b[", "end "),
        ("a\r\nb\r\n", "a\nb\n"),
        ("10%\r50%\r100%\r\ndone", "100%\ndone"),
        ("10%\r50%\r", "50%"),
        ("kept\r\x00\n", "kept\n"),
        ("a\rb\nc", "b\nc"),
        ("nul\x00 bell\x07 back\x08 del\x7f nel\x85.", "nul bell back del nel."),
        ("lone \ud800 and \udc00.", "lone \ufffd and \ufffd."),
        ("\ud83d\ude42", "🙂"),
        ("user\u202egpj.exe", "user⟨U+202E⟩gpj.exe"),
        ("\u2066a\u2069", "⟨U+2066⟩a⟨U+2069⟩"),
        ("hi\U000e0068\U000e0069", "hi⟨U+E0068⟩⟨U+E0069⟩"),
        ("\U0001f3f4\U000e0067\U000e0062\U000e0073\U000e0063\U000e0074\U000e007f", None),
        ("العربية עברית é 🙂 👩‍💻", None),
        (b"caf\xc3\xa9 \xff\xfe", "café \ufffd\ufffd"),
    ],
)
def test_clean(raw, expected):
    assert clean(raw) == (raw if expected is None else expected)


@UNHURRIED
@given(ANY | MARKDOWN)
def test_cleaning_twice_changes_nothing_and_lines_can_be_cleaned_alone(text):
    cleaned = clean(text)
    assert clean(cleaned) == cleaned
    assert "\n".join(clean(line) for line in text.split("\n")) == cleaned
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069]", cleaned)
    cleaned.encode()


@UNHURRIED
@given(st.binary(max_size=100))
def test_any_bytes_become_text(data):
    clean(data).encode()


# --- clip ------------------------------------------------------------------------------------------------------------


def test_clip_cuts_between_lines():
    clipped = clip("first\nsecond\n" + "x" * 100 + "\nlast but one\nlast\n", 40)
    assert (clipped.head, clipped.tail) == ("first\nsecond\n", "last but one\nlast\n")
    assert clipped.omitted_chars == 101
    assert clipped.total_bytes == 132


@UNHURRIED
@given(st.text(st.characters(exclude_categories=()) | st.just("\n")), st.integers(0, 60))
@example("é" * 50, 33)
def test_clip_keeps_the_ends_and_counts_the_rest(text, limit):
    head, tail, omitted, total = clip(text, limit)
    size = len(text.encode("utf-8", "surrogatepass"))
    assert total == size
    if size <= limit:
        assert (head, tail, omitted) == (text, "", 0)
    assert text.startswith(head)
    assert text.endswith(tail)
    assert len(head) + omitted + len(tail) == len(text)
    assert len((head + tail).encode("utf-8", "surrogatepass")) <= limit


# --- to_html ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "hostile",
    [
        "<script>alert(1)</script>",
        "<img src=x onerror=alert(1)>",
        "a <b onclick='x()'>b</b> <svg/onload=x> <iframe srcdoc=x> <style>*{}</style>",
        "<details open ontoggle=alert(1)>",
        "<!-- hidden -->\n\n<![CDATA[x]]> <?php x ?> <!DOCTYPE x>",
        "</pre></code></div></p><script>x</script>",
        "```\n</code></pre><script>x</script>\n```",
        '```"><script>x</script>\ncode\n```',
        "`</code><script>`",
        "| <script> | b |\n|---|---|\n| <img src=x> | \" onx=' |",
        '[x](http://a.b/"onmouseover="alert(1))',
        "[x](http://a.b 'a\" onclick=\"x')",
        '![x" onerror="y](http://a.b/c.png)',
        '<http://a.b/"onclick="x>',
        '[a]: http://a.b/"x "t\\" onclick=x"\n\n[a]',
        "# <script>x</script>\n\n<script>\n===",
        "1000000000. a\n\n999999999. b",
        "&lt;script&gt;alert(1)&lt;/script&gt;",
        "&#60;script&#62;",
        "> > > <script>",
        "- [ ] <script>\n- [x] </li></ul>",
    ],
)
def test_markup_is_text(hostile):
    html = to_html(hostile)
    Page(html)
    assert not re.search(r"<(?:script|img|svg|iframe|style|details|!|\?)", html, re.IGNORECASE)


@pytest.mark.parametrize(
    "url",
    [
        "javascript:alert(1)",
        "JaVaScRiPt:alert(1)",
        " javascript:alert(1)",
        "java&#x09;script:alert(1)",
        "java&Tab;script:alert(1)",
        "java&NewLine;script:alert(1)",
        "javascript&colon;alert(1)",
        "&#106;avascript:alert(1)",
        "&#x6A&#x61vascript:alert(1)",
        "java\\script:alert(1)",
        "%6aavascript:alert(1)",
        "\x01javascript:alert(1)",
        "<javascript:alert(1)>",
        "<java\tscript:alert(1)>",
        "vbscript:x",
        "data:text/html,<script>x</script>",
        "data:image/png;base64,AAAA",
        "file:///etc/passwd",
        "//evil.example",
        "/relative",
        "#fragment",
        "blob:http://a.b/c",
        "http:a",
        "jar:http://a",
        "\u202ehttp://a.b",
    ],
)
@pytest.mark.parametrize(
    "form", ["[x]({})", "![x]({})", "[x]: {}\n\n[x] ![x]", "<{}>", '[x]({} "t")', "[![x]({})]({})"]
)
def test_other_schemes_stay_text(form, url):
    page = Page(to_html(form.replace("{}", url)))
    assert page.links == []
    assert "x" in page.text or form == "<{}>"


@pytest.mark.parametrize(
    ("source", "links", "text"),
    [
        ("[x](http://a.b/c?d=e&f)", ["http://a.b/c?d=e&f"], "x"),
        ("[x](HTTPS://a.b)", ["HTTPS://a.b"], "x"),
        ("<http://a.b> <mailto:a@b.c> <a@b.c>", ["http://a.b", "mailto:a@b.c", "mailto:a@b.c"], None),
        ("![alt *text*](http://a.b/c.png)", ["http://a.b/c.png"], "alt text"),
        ("![](http://a.b/c.png)", ["http://a.b/c.png"], "http://a.b/c.png"),
        ("[![badge](http://a.b/c.png)](http://d.e)", ["http://d.e"], "badge"),
        ("![a [b](http://c.d) e](http://f.g)", ["http://f.g"], "a b e"),
        ("[x][Ref]\n\n[ref]: http://a.b", ["http://a.b"] * 2, None),
        ("[a\u202eb](http://a.b)", ["http://a.b"], "a⟨U+202E⟩b"),
    ],
)
def test_links(source, links, text):
    page = Page(to_html(source))
    assert page.links == links
    if text is not None:
        assert page.text.strip() == text


def test_what_is_written_is_shown():
    source = (
        "```python exec\npass\n```\n\n[a]: http://a.b 'hidden title'\n\n<!-- comment -->\n\n- [ ] todo\n- [x] done\n"
    )
    shown = Page(to_html(source)).text
    for words in ("python exec", "pass", "[a]: http://a.b “hidden title”", "<!-- comment -->", "[ ] todo", "[x] done"):
        assert words in shown


def test_entities_cannot_bring_hidden_characters_back():
    html = to_html("&#8238;x &#x2066; &#0; &#27; &#xE0041; [a](http://b.c '&#8238;')\n\n```&#8238;\n```")
    assert not re.search("[\x00\x1b\u202a-\u202e\u2066-\u2069\U000e0000-\U000e007f]", html)


def test_headings_are_small_and_not_headings_of_the_page():
    html = to_html("# A\n\n## B\n\n### C\n\n###### D\n\nE\n===\n")
    assert re.findall(r'role="heading" aria-level="(\d)" style="font-size:(\d+)px', html) == [
        ("1", "15"),
        ("2", "14"),
        ("3", "13"),
        ("6", "13"),
        ("1", "15"),
    ]
    assert "<h" not in html


def test_no_text_colour_and_only_grey_behind_text():
    html = to_html("# a\n\n`b`\n\n    c\n\n> d\n\n|a|b|\n|:-|-:|\n|1|2|\n\n---\n\n1. x\n")
    styles = ";".join(re.findall(r'style="([^"]*)"', html)).split(";")
    assert not [style for style in styles if style.startswith("color")]
    behind = {style for style in styles if "background" in style}
    assert behind == {"background:rgba(128,128,128,0.12)", "background:transparent"}
    assert not re.search(r"[ ,(:]\.\d", html)  # JupyterLab's sanitizer drops ".12"
    assert "text-align:right" in html


@pytest.mark.parametrize(
    "text",
    [
        ">" * 10_000,
        "> " * 10_000 + "x",
        "- " * 10_000 + "x",
        "".join("  " * depth + "- x\n" for depth in range(300)),
        "[" * 20_000,
        "![" * 10_000,
        "*" * 100_000,
        "**a " * 10_000,
        "[a](" * 10_000,
        "`" * 50_000 + "a" + "`" * 49_999,
        "<a" * 30_000,
        "|a" * 5_000 + "|\n" + "|-" * 5_000 + "|\n" + "|\n" * 20_000,
        "|a" * 90 + "|\n" + "|-" * 90 + "|\n" + "|\n" * 20_000,
        "|a|b|\n|-|-|\n" + "|1|2|\n" * 20_000,
        "x" * 5_000_000,
        "word " * 1_000_000,
        "line\n" * 300_000,
        "```\n" + "code\n" * 300_000,
    ],
    ids=lambda text: f"{text[:4]!r}*{len(text)}",
)
def test_hostile_sizes_are_bounded(text):
    html = to_html(text)
    Page(html)
    assert len(html) < 6 * len(text) + 20 * FORMAT_LIMIT


def test_too_deep_is_plain_text_and_complete():
    assert Page(to_html(">" * 100 + " deep")).text.strip() == ">" * 100 + " deep"
    nested = "".join("  " * depth + f"- level{depth}\n" for depth in range(40))
    assert "level39" in Page(to_html(nested)).text


@UNHURRIED
@given(ANY | MARKDOWN)
def test_only_listed_html_comes_out(text):
    Page(to_html(text))


@UNHURRIED
@given(MARKDOWN)
def test_blocks_render_as_the_whole_does(text):
    whole = clean(text).replace("]:", "]")  # definitions act across blocks
    try:
        expected = str(markdown._parser().render(whole, {"references": {}}))
    except markdown._TooDeepError:
        return
    assert to_html(whole) == markdown._spell_hidden(expected)


# --- BlockStream -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "sources"),
    [
        ("a\nb\n\nc", ["a\nb\n\n", "c"]),
        ("# h\ntext\n\n\nmore\n", ["# h\n", "text\n\n\n", "more\n"]),
        ("```\na\n\nb\n```\nc", ["```\na\n\nb\n```\n", "c"]),
        ("text\n```\na\n```\n", ["text\n", "```\na\n```\n"]),
        ("````\n```\n\nx\n````\ny", ["````\n```\n\nx\n````\n", "y"]),
        ("- a\n\n- b\n\n  c\n\nd", ["- a\n\n- b\n\n  c\n\n", "d"]),
        (
            "1. a\n\n   ```\n   x\n\n   y\n   ```\n\n2. b\n\nc",
            ["1. a\n\n   ```\n   x\n\n   y\n   ```\n\n2. b\n\n", "c"],
        ),
        ("1. a\n```\nx\n\ny\n```\n2. b\n", ["1. a\n", "```\nx\n\ny\n```\n", "2. b\n"]),
        ("1. a\n\n  ```\nx\n\ny\n\n  ```\n\nz", ["1. a\n\n  ```\nx\n\ny\n\n  ```\n\n", "z"]),
        ("    code\n\n    more\n\ntext", ["    code\n\n    more\n\n", "text"]),
        ("> a\n\n> b\n", ["> a\n\n", "> b\n"]),
        ("\n\na", ["\n\na"]),
        ("", []),
    ],
)
def test_blocks(text, sources):
    assert [block.source for block in streamed(text)] == sources
    assert [block.index for block in streamed(text)] == list(range(len(sources)))


@UNHURRIED
@given(MARKDOWN | ANY, st.lists(st.integers(0, 200)))
def test_any_split_gives_the_same_blocks_and_loses_nothing(text, cuts):
    stream, blocks, at = BlockStream(), [], 0
    for cut in [*sorted(cuts), len(text)]:
        blocks += stream.push(text[at:cut])
        at = max(at, cut)
        assert "".join(block.source for block in blocks) + stream.tail == clean(text[:at])
    blocks += stream.finish()
    assert stream.tail == ""
    assert blocks == streamed(text, size=1) == streamed(text)
    assert "".join(block.source for block in blocks) == clean(text)
    for block in blocks:
        Page(block.html)


@UNHURRIED
@given(MARKDOWN)
def test_the_stream_and_the_whole_agree(text):
    text = text.replace("]:", "]")
    assert "".join(block.html for block in streamed(text)) == to_html(text)


def test_a_reference_works_from_its_definition_on():
    blocks = streamed("[a]\n\n[a]: http://a.b\n\n[a]\n")
    assert [Page(block.html).links for block in blocks] == [[], ["http://a.b"], ["http://a.b"]]


def test_a_long_fence_comes_in_pieces_of_code():
    lines = [f"value = {number} * <b>\n" for number in range(5_000)]
    text = "Look:\n  ~~~~python\n" + "".join(lines) + "  ~~~~\nDone.\n"
    intro, *pieces, outro = streamed(text)
    assert (intro.source, outro.source) == ("Look:\n", "Done.\n")
    assert len(pieces) > 1
    assert all(BLOCK_LIMIT <= len(piece.source) < BLOCK_LIMIT + 100 for piece in pieces[:-1])
    pages = [Page(piece.html) for piece in pieces]
    assert all("<pre" in piece.html and "<p " not in piece.html for piece in pieces)
    assert "".join(page.text for page in pages).replace("\n", "") == ("python" + "".join(lines)).replace("\n", "")


@pytest.mark.parametrize(
    "unit", ["x", "x ", "word\n", "- item\n", "- a\n  ```\n", "```\n", "a\n\n", "|a|b|\n", "> q\n", "\n"]
)
def test_pieces_are_bounded(monkeypatch, unit):
    monkeypatch.setattr(markdown, "BLOCK_LIMIT", limit := 2_000)
    monkeypatch.setattr(markdown, "FORMAT_LIMIT", 8_000)
    for text in (unit * (20_000 // len(unit)), "```\n" + unit * (20_000 // len(unit))):
        blocks = streamed(text, size=5_000)
        assert "".join(block.source for block in blocks) == text
        assert max(len(block.source) for block in blocks) <= 2 * limit + 100


def test_halves_of_a_character_and_of_an_escape_may_come_in_two_deltas():
    assert [block.source for block in streamed("a \ud83d\ude42 \x1b[31mb\x1b[0m\r\n\nc", size=1)] == ["a 🙂 b\n\n", "c"]


def test_importing_the_package_does_not_load_markdown_it():
    program = "import sys, cm_notebook.render.markdown, cm_notebook.render.diff; print('markdown_it' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "False\n"
    )
