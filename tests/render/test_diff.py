"""A difference shows every word of both texts, escaped, within bounds."""

from __future__ import annotations

import re
from html import escape
from html.parser import HTMLParser

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cm_notebook.render import diff
from cm_notebook.render.markdown import clean
from tests.render.test_html import contrast

HIDDEN = ("added ", "removed ")


UNHURRIED = settings(deadline=None, max_examples=200)
"""Property tests look at results, never at the clock."""


class Page(HTMLParser):
    """Reads a difference: the text of each tag, without the words for screen readers."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.pieces: list[tuple[str, str]] = []
        self.open: list[str] = []
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        assert tag in ("div", "pre", "p", "ins", "del", "span"), tag
        assert [name for name, _ in attrs] == ["style"], attrs
        self.open.append("hidden" if "position:absolute" in attrs[0][1] else tag)

    def handle_endtag(self, tag):
        assert self.open.pop() in (tag, "hidden")

    def handle_data(self, data):
        if self.open and self.open[-1] == "hidden":
            assert data == HIDDEN[self.open[-2] == "del"]
        elif self.open:
            self.pieces.append((next(tag for tag in reversed(self.open) if tag != "span"), data))

    def side(self, *tags: str) -> str:
        return "".join(data for tag, data in self.pieces if tag in tags)


PROSE = st.lists(
    st.sampled_from(["plan", "the", "tests ", " ", "\n", "<b>", "&amp;", ".", "é", "a", "\u202e", "'"])
).map(" ".join)
LINES = st.lists(st.sampled_from(["a", "b", "", "c d", "<x>", "}"]), max_size=30).map("\n".join)


@UNHURRIED
@given(PROSE | st.text(), PROSE | st.text())
def test_words_hold_both_texts(old, new):
    page = Page(diff.words(old, new))
    if clean(old) == clean(new):
        assert page.side("p") == "No changes."
    elif "…" not in page.side("div"):
        assert page.side("div", "del") == clean(old)
        assert page.side("div", "ins") == clean(new)


@UNHURRIED
@given(LINES, LINES)
def test_a_unified_diff_turns_one_text_into_the_other(old, new):
    patch = diff.text(old, new)
    assert _patched(old, patch) == new
    assert "".join(data for tag, data in Page(diff.lines(old, new)).pieces).rstrip("\n") == patch.rstrip("\n")


def _patched(old: str, patch: str) -> str:
    if patch == "No changes.\n":
        return old
    before, after, at = (old.split("\n") if old else []), [], 0
    for line in patch.removesuffix("\n").split("\n"):
        if found := re.fullmatch(r"@@ -(\d+),(\d+) \+\d+,\d+ @@", line):
            start = int(found[1]) - (found[2] != "0")
            after += before[at:start]
            at = start
            continue
        if line[0] in " -":
            assert before[at] == line[1:]
            at += 1
        if line[0] in " +":
            after.append(line[1:])
    return "\n".join(after + before[at:])


@UNHURRIED
@given(LINES, LINES)
def test_a_comparison_without_budget_is_coarse_and_right(old, new):
    whole, diff.BUDGET = diff.BUDGET, 0
    try:
        assert _patched(old, diff.text(old, new)) == new
    finally:
        diff.BUDGET = whole


def test_words():
    html = diff.words("The plan has three steps.", "The plan has four short steps.")
    assert Page(html).pieces == [("div", "The plan has"), ("del", " three"), ("ins", " four short"), ("div", " steps.")]
    assert re.findall(r">(added|removed) </span>", html) == ["removed", "added"]
    assert "color:" not in html.replace("background-color:", "")


def test_long_unchanged_stretches_are_folded():
    words = [f"word{number}" for number in range(300)]
    shown = Page(diff.words(" ".join(words), " ".join([*words[:150], "NEW", *words[151:]]))).side("div", "ins")
    assert shown.startswith("… word125 ")
    assert " word149 NEW word151 " in shown
    assert shown.endswith(" word175 …")


def test_lines_have_context_and_heads():
    old = "\n".join(str(number) for number in range(30))
    new = old.replace("\n5\n", "\nfive\n").replace("\n20\n", "\n")
    assert diff.text(old, new).splitlines() == [
        *["@@ -3,7 +3,7 @@", " 2", " 3", " 4", "-5", "+five", " 6", " 7", " 8"],
        *["@@ -18,7 +18,6 @@", " 17", " 18", " 19", "-20", " 21", " 22", " 23"],
    ]


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("", "x", "@@ -0,0 +1,1 @@\n+x\n"),
        ("x", "", "@@ -1,1 +0,0 @@\n-x\n"),
        ("x", "x\n", "@@ -1,1 +1,2 @@\n x\n+\n"),
        ("x\r\n", "x\n", "No changes.\n"),
        ("", "", "No changes.\n"),
    ],
)
def test_small_texts(old, new, expected):
    assert diff.text(old, new) == expected


MARKDOWN = st.lists(
    st.sampled_from(["# a", "- b", "1. c", "    d", "**e** `f`", "[g](https://h.i)", "| a | b |\n|---|---|\n| c |", ""])
    | st.sampled_from(["```", "> q", "<b>", "&amp;", "![p](https://x.y)", "j  k", "***", "\u202e"])
).map("\n".join)


@UNHURRIED
@given(MARKDOWN, MARKDOWN)
def test_prose_holds_the_words_of_both(old, new):
    made = diff.prose(old, new)
    page = Page(made)
    if made in (diff.words(old, new), diff._sentence("No changes.")) or "…" in page.side("div"):
        return
    for text, tag in ((old, "del"), (new, "ins")):
        read = "".join(word.text for word in diff._flat(text))
        shown = page.side("div", tag)
        assert re.sub(r"[\s\d.•]", "", shown) == re.sub(r"[\s\d.•]", "", read)  # the marks of a list are the new one's


def test_prose_is_compared_as_it_is_read():
    old = "## Plan\n\n1. Read `a.py`\n2. Fix **it**\n\n| what | when |\n|---|---|\n| tests | later |\n"
    new = "## Plan\n\n1. Read `b.py`\n2. Ask\n3. Fix [it](https://x.y)\n\n| what | when |\n|---|---|\n| tests | now |\n"
    page = Page(diff.prose(old, new))
    assert re.sub(" +", " ", page.side("div", "ins")) == (
        "Plan\n\n1. Read b.py\n2. Ask\n3. Fix it (https://x.y)\n\nwhat | when\ntests | now"
    )
    assert [data for tag, data in page.pieces if tag == "del"] == ["a", "it", "later"]
    assert [data for tag, data in page.pieces if tag == "ins"] == ["b", "2. Ask", "it (https://x.y)", "now"]


def marked(old: str, new: str) -> list[tuple[str, str]]:
    return [(tag, data) for tag, data in Page(diff.prose(old, new)).pieces if tag != "div"]


def test_items_of_lists_are_compared_with_items():
    old = "1. Store the items.\n2. Add one.\n3. List them, each with its number.\n4. Mark one as done.\n"
    more = old.replace("4.", "4. Test it. It stays.\n5.")
    assert marked(old, more) == [("ins", "4. Test it. It stays.")]
    assert marked(more, old) == [("del", "4. Test it. It stays.")]
    assert marked(old, old + "5. Ship it.\n") == [("ins", "5. Ship it.")]
    fewer = "1. Store the items.\n2. Add one; list them, each with its number.\n3. Mark one as done.\n4. Test it.\n"
    joined = [("del", "."), ("del", "List"), ("ins", "; list"), ("ins", "4. Test it.")]
    assert marked(old, fewer) == joined  # no number is struck out: nobody has taken one out
    assert marked(fewer, old) == [("del", "; list"), ("ins", ".\n3. List"), ("del", "4. Test it.")]
    longer = old.replace("Add one.", "Add one: its text, and when it is due.").replace("3. List", "3. Ask.\n4. List")
    assert marked(old, longer) == [("ins", ": its text, and when it is due"), ("ins", "3. Ask.")]
    bullets = re.sub("[0-9]\\.", "-", old)
    assert marked(bullets, bullets.replace("- Add one.\n", "")) == [("del", "• Add one.")]
    assert marked(bullets + "\nThe end.", bullets + "\nAn end.") == [("del", "The"), ("ins", "An")]


def test_a_change_at_the_end_has_its_context_before_it():
    old = " ".join(f"word{number}" for number in range(200))
    assert Page(diff.prose(old, old + "\n\n- new\n")).side("div", "ins").startswith("… word175 ")


def test_what_only_the_source_shows_is_shown_as_source():
    assert "".join(data for tag, data in Page(diff.prose("a  b", "a   b")).pieces if tag == "ins").strip() == "b"
    code = "Text.\n\n```\nif x:\n    y\n```\n"
    assert "<ins" in diff.prose(code, code.replace("    y", "        y"))
    assert Page(diff.prose("same", "same")).side("p") == "No changes."


def test_no_line_goes_through_a_minus_sign():
    made = diff.lines("a\nb", "a\nc")
    assert re.findall(r"<(ins|del) style=\"[^\"]*text-decoration:([a-z]+)", made) == [("del", "none"), ("ins", "none")]
    assert re.findall(r"text-decoration:([a-z-]+)", diff.words("b", "c")) == ["line-through", "underline"]


def test_marked_words_can_be_read_in_both_themes():
    def over(page: int, style: str) -> str:
        *channels, alpha = re.search(r"background:rgba\((\d+),(\d+),(\d+),([\d.]+)\)", style).groups()
        return "#" + "".join(f"{round(int(one) * float(alpha) + page * (1 - float(alpha))):02x}" for one in channels)

    for style in re.findall(r'<(?:ins|del) style="([^"]*)"', diff.words("a", "b") + diff.lines("a", "b")):
        assert contrast("#212121", over(255, style)) >= 4.5
        assert contrast("#dedede", over(17, style)) >= 4.5


@pytest.mark.parametrize("show", [diff.words, diff.lines, diff.prose, diff.between])
def test_markup_is_text(show):
    html = show("<script>a</script>", "<img src=x onerror='y'>\n</pre></div>")
    Page(html)
    assert "<script" not in html
    assert "<img" not in html


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("def f(x):\n    return x + 1\n\nprint(f(2))\n", True),
        ('{\n  "a": 1,\n  "b": [2]\n}\n', True),
        ("x = 1\ny = 2\nrun(x)\n", True),
        ("function f() {\n  return 1;\n}\n", True),
        ("It is used so:\n\n```console\n$ todo add milk\n$ todo list\n1 [ ] milk\n```\n", True),
        ("A sentence.\n\nAnother one.\n\n```\n$ todo list\n```\n", False),
        ("First look at the tests. Then fix them.\n", False),
        ("# Plan\n\n1. Read `a.py`\n2. Fix the test (it fails)\n\n- done\n", False),
        ("If it fails, try again.\nReturn later.\n", False),
        ("", False),
    ],
)
def test_prose_by_words_and_code_by_lines(text, code):
    shown = diff.between(text, text + "More.\n")
    assert shown == (diff.lines if code else diff.prose)(text, text + "More.\n")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("a b " * 7_000, "b a " * 7_000),
        ("a\nb\n" * 4_000, "b\na\n" * 4_000),
        ("x\n" * 9_000, "y\n" * 9_000),
        ("\n".join(map(str, range(9_000))), "\n".join(map(str, range(9_000, 0, -1)))),
        ("x" * 900_000, "y" * 900_000),
        ("- a\n- b\n" * 1_500, "- b\n- c\n" * 1_500),
        ("1. a b a b a b a\n" * 800, "1. b a b a b a b c\n" * 800),
    ],
)
def test_hostile_texts_are_compared_within_bounds(old, new):
    for html in (diff.words(old, new), diff.lines(old, new), diff.prose(old, new)):
        Page(html)


def test_too_large_says_so():
    shown = "Too large to compare: 15001 lines and 8001 lines."
    old, new = "a\n" * 15_000, "b\n" * 8_000
    assert diff.text(old, new) == shown + "\n"
    assert Page(diff.lines(old, new)).side("p") == shown
    assert Page(diff.words(old * 2, new * 2)).side("p").startswith("Too large")


def columns(made: str) -> tuple[list[str], list[str]]:
    cells = re.findall(r"<td[^>]*>(.*?)</td>", made, re.DOTALL)[2:]
    plain = [re.sub(r"<[^>]*>", "", re.sub(r'<span style="position[^>]*>.*?</span>', "", cell)) for cell in cells]
    return plain[::2], plain[1::2]


def test_side_by_side_each_text_has_its_column() -> None:
    made = diff.side_by_side("one <b>\nsame\nthe long plan", "two <b>\nsame\nthe short plan\nmore", ("A & B", "C"))
    assert "<b>A &amp; B</b>" in made
    left, right = columns(made)
    assert left == ["one &lt;b&gt;", "same", "the long plan", ""]
    assert right == ["two &lt;b&gt;", "same", "the short plan", "more"]
    assert len(re.findall("<del", made)) == 2
    assert len(re.findall("<ins", made)) == 3
    assert "No changes." in diff.side_by_side("same", "same")


@UNHURRIED
@given(LINES, LINES)
def test_side_by_side_shows_all_that_changed(old, new):
    made = diff.side_by_side(old, new)
    if old == new:
        return
    left, right = columns(made)
    before, after = clean(old).split("\n"), clean(new).split("\n")
    shown = [line for line in left if line], [line for line in right if line]
    for lines, others, seen in ((before, after, shown[0]), (after, before, shown[1])):
        gone = [line for line in lines if line and line not in others]
        assert all(escape(line) in seen for line in gone)


def test_a_patch_names_its_files_without_what_git_says_for_itself():
    git = """\
diff --git a/a <b>.py b/a <b>.py
new file mode 100644
index 0000000..1f600ad
--- /dev/null
+++ b/a <b>.py
@@ -0,0 +1,2 @@
+--- x
+diff --git a/x b/x
diff --git a/run b/run
new file mode 100755
index 0000000..e988929
diff --git a/old b/new
similarity index 100%
rename from old
rename to new
"""
    said = diff.patch(git)
    assert "<b>a &lt;b&gt;.py</b>\n@@ -0,0 +1,2 @@\n" in said
    assert "+--- x\n+diff --git a/x b/x" in said  # lines of the file
    assert "<b>run</b>\nnew file mode 100755\n" in said  # that it may be executed is worth knowing
    assert "<b>a/old b/new</b>\nsimilarity index 100%\nrename from old\nrename to new\n" in said
    for hidden in ("/dev/null", "1f600ad", "100644"):
        assert hidden not in said
