"""The view in a waiting kernel while somebody decides elsewhere, and the page's title while nobody sees it."""

from __future__ import annotations

import ast
import subprocess
import sys
import time

from tests.browser.test_view import RUN, SETUP, WAITS, start

KEPT = SETUP.replace(', journal=":memory:"', "")
WHERE = "import os\n(run.id, os.path.abspath('.cm_notebook/journal.db'))"


def command(nb, name, *words):
    """A decision from a process of its own about the run in cell 1."""
    nb.run_cell(2)
    nb.wait_done(2)
    run, journal = ast.literal_eval(nb.text(2).strip())
    line = [sys.executable, "-m", "cm_notebook", name, run, *words, "--journal", journal]
    done = subprocess.run(line, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_decision_of_another_process_shows_within_a_second(open_notebook, kernel):
    nb = open_notebook([KEPT, RUN, WHERE], kernel=kernel)
    nb.run_all()
    nb.wait_text(1, WAITS)
    assert "rejected by" in command(nb, "reject", "--feedback", "name the tests")
    nb.wait_text(1, "2 attempts")
    nb.wait_text(1, WAITS)
    command(nb, "approve")
    decided = time.monotonic()
    nb.wait_text(1, "Finished: 2 of 2 done.")
    print(f"the page had it {time.monotonic() - decided:.2f} s after the command had ended")
    assert "in a terminal" in nb.text(1)
    assert nb.console_errors == []


HIDE = """hidden => {
    Object.defineProperty(document, "hidden", {value: hidden, configurable: true});
    document.dispatchEvent(new Event("visibilitychange"));
}"""


def test_a_hidden_page_says_in_its_title_how_many_decisions_wait(open_notebook):
    """Chromium without a window shows every page, so the page is told that it is hidden."""
    nb = start(open_notebook, RUN, "other = start()\nshow(other)\nshow(run)")
    nb.wait_until(lambda: nb.output(2).get_by_role("button", name="Approve").count() == 2)
    page = nb.page
    title = page.title()
    assert not title.startswith("(")
    page.evaluate(HIDE, True)
    nb.wait_until(lambda: page.title() == f"(2) {title}")
    page.evaluate(HIDE, False)
    assert page.title() == title
    page.evaluate(HIDE, True)
    nb.output(2).get_by_role("button", name="Approve").first.click()
    nb.wait_until(lambda: page.title() == f"(1) {title}")
    nb.output(2).get_by_role("button", name="Approve").last.click()
    nb.wait_until(lambda: page.title() == title)
    assert nb.console_errors == []
