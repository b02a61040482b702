"""What pages are told and what they may say, without a browser: a widget that writes down what it is given."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest

import cm_notebook as cm
from cm_notebook import errors
from cm_notebook.jupyter import bridge, pending, view
from cm_notebook.render import html
from tests.helpers import gate, until
from tests.render.builder import Story


class Widget:
    """In place of the real one."""

    made: ClassVar[list[Widget]] = []

    def __init__(self, **traits):
        self.sent, self.closed, self.handlers = [], False, []
        self.comm = SimpleNamespace(comm_id=f"comm-{len(self.made)}")
        self.final = ""
        for name, value in traits.items():
            setattr(self, name, value)
        self.made.append(self)

    def hold_sync(self):
        return contextlib.nullcontext()

    def send_state(self, names):
        self.sent.append({"kind": "state", "names": names})

    def send(self, content):
        self.sent.append({**content, "at": time.monotonic()})

    def on_msg(self, handler):
        self.handlers.append(handler)

    def close(self):
        self.closed = True

    def _repr_mimebundle_(self):
        return {"application/vnd.jupyter.widget-view+json": {"model_id": self.comm.comm_id}}, {}

    # -- the page

    def says(self, **content):
        for handler in self.handlers:
            handler(self, {"page": "p", **content}, [])

    def hears(self, kind, **wanted):
        def find():
            return next((m for m in self.sent if m["kind"] == kind and wanted.items() <= m.items()), None)

        return until(find, f"{kind} {wanted}")


class Notebook:
    """Cells and their outputs, by display id."""

    def __init__(self):
        self.cell, self.execution_count, self.outputs, self.display_pub = "a", 1, {}, self

    def publish(self, data, metadata=None, transient=None, update=False):
        id = transient["display_id"]
        assert update is (id in self.outputs)
        self.outputs[id] = data

    def run(self, cell):
        self.cell, self.execution_count = cell, self.execution_count + 1

    @property
    def shown(self):
        return list(self.outputs.values())


@pytest.fixture
def notebook(monkeypatch):
    made = Notebook()
    Widget.made = []
    monkeypatch.setenv("CM_DIRECT_CLICKS", "0")
    monkeypatch.setattr(bridge, "shell", lambda: made)
    monkeypatch.setattr(bridge, "kernel", lambda: made)
    monkeypatch.setattr(bridge, "cell_id", lambda: made.cell)
    monkeypatch.setattr(view, "_widget_class", lambda: Widget)
    monkeypatch.setattr(view, "SETTLE_S", 0.0)
    return made


@pytest.fixture(autouse=True)
def _shown_only_by_us(monkeypatch):
    monkeypatch.setattr(cm.Run, "show_here", lambda run: None)


def begin(steps="planner? -> builder", script=None):
    script = script or {"planner": ["first plan", "second plan"], "builder": ["built", "built again"]}
    agents = [cm.Agent(id=name, prompt="Go.") for name in script]
    return cm.Workflow("flow", agents=agents, steps=steps).start(engine=cm.ScriptedEngine(script), journal=":memory:")


def widget():
    return Widget.made[-1]


def waiting(step="planner"):
    """The page's record of that step's gate."""
    return until(lambda: next((one for one in widget().gates if one["step"] == step), None), f"the bar of {step}")


# -- two outputs, and what becomes of them ----------------------------------------------------------------------------


def test_a_is_the_widget_and_b_the_snapshot_until_the_end(notebook):
    run = begin()
    view.show(run)
    record = waiting()
    live, snapshot = until(
        lambda: "Run this cell again" in notebook.shown[1]["text/html"] and notebook.shown, "a snapshot"
    )
    assert "application/vnd.jupyter.widget-view+json" in live
    assert "text/html" not in live  # the untrusted file would show the run twice
    assert live["text/plain"] == "flow, as saved below. Run this cell again to go on here."
    assert f'data-cm-static="{widget().place}"' in snapshot["text/html"]
    widget().says(decide=record["id"], digest=record["digest"], action="approve")
    run.wait(20)
    until(lambda: widget().closed, "the widget to be closed")
    live, snapshot = notebook.shown
    assert set(live) == {"text/html", "text/plain"}
    assert "Finished: 2 of 2 done." in live["text/html"]
    assert "builder" in live["text/plain"]
    assert snapshot == {"text/plain": ""}


def test_a_page_opened_from_the_file_gets_the_end_through_the_widget(notebook):
    """It does not know A's display id, so A cannot be replaced there."""
    run = begin()
    view.show(run)
    gate(run)
    widget().says(hello=True)
    widget().says(hello=True, page="second tab")
    widget().hears("all", page="second tab")
    run.approve().wait(20)
    until(lambda: "Finished" in widget().final, "the saved view in the widget")
    assert not widget().closed


def test_a_step_is_frozen_when_it_is_settled_and_thaws_when_it_is_touched(notebook):
    run = begin("planner? -> builder?")
    view.show(run, ["planner"])
    gate(run)
    run.approve()
    gate(run, "builder")
    until(lambda: widget().closed, "the card to be frozen")
    run.rerun("planner")
    until(lambda: len(Widget.made) == 2, "the card to be live again")
    assert waiting()["step"] == "planner"
    assert "application/vnd.jupyter.widget-view+json" in notebook.shown[0]


def test_a_step_in_a_loop_that_may_come_back_stays_live(notebook):
    again = cm.Reply(verdict=cm.Verdict(action="pause", reason="look"))
    steps = [cm.step("planner"), cm.module("checker", loop_steps=1, loop_max_iterations=3)]
    run = begin(steps, {"planner": ["one", "two"], "checker": [again, again]})
    view.show(run, ["planner"])
    gate(run, "checker")
    assert run["planner"].status == "done"
    assert not widget().closed
    run.reject("more")
    until(lambda: len(run["planner"].attempts) == 2, "the second pass")


def test_a_finished_run_is_shown_as_html_and_goes_on_live(notebook):
    run = begin("builder")
    run.wait(20)
    view.show(run)
    assert Widget.made == []
    run.add(cm.step("planner", interactive=True))
    until(lambda: Widget.made, "the view to be live again")
    assert waiting()["step"] == "planner"


def test_a_run_whose_journal_cannot_be_written_is_shown_as_failed(notebook, tmp_path):
    release = threading.Event()

    @cm.agent("builder")
    def builder(turn: cm.Turn) -> str:
        release.wait(20)
        return "y" * 3_000_000

    journal = cm.Journal(tmp_path / "j.db")
    run = cm.Workflow("flow", agents=[builder], steps="builder").start(journal=journal)
    view.show(run)
    hub = view._hubs[run.id]
    until(lambda: run["builder"].status == "running" and hub._drawn_at and not hub._dirty, "the view to be drawn")
    pages = journal._writer.execute("PRAGMA page_count").fetchone()[0]
    journal._writer.execute(f"PRAGMA max_page_count={pages + 20}")
    release.set()
    until(lambda: "Failed" in notebook.shown[0].get("text/html", "") + widget().final, "the view to say so")
    with pytest.raises(cm.JournalError, match="the disk is full"):
        run.wait(10)


def test_a_card_moves(notebook):
    run = begin()
    view.show(run, ["planner"])
    view.show(run)
    notebook.run("b")
    view.show(run, ["planner"])
    until(lambda: notebook.shown[0]["text/plain"] == "planner: shown further below", "the line that says so")
    first, whole, second = Widget.made
    until(lambda: first.closed, "the first card to be closed")
    assert not whole.closed
    assert not second.closed


def test_a_cell_run_again_replaces_its_own_view(notebook):
    run = begin()
    view.show(run)
    notebook.run("a")
    view.show(run)
    until(lambda: Widget.made[0].closed, "the old widget to be closed")
    assert not Widget.made[1].closed


def test_a_cell_shows_a_run_once(notebook):
    run = begin()
    view.show(run)
    view.show(run)
    assert len(Widget.made) == 1
    assert len(notebook.shown) == 2
    view.show(run, mode="html")
    until(lambda: Widget.made[0].closed, "the widget to be closed")
    assert [sorted(shown) for shown in notebook.shown] == [["text/plain"], ["text/plain"], ["text/html", "text/plain"]]


@pytest.mark.parametrize("mode", ["full", "html", "log"])
def test_a_cell_that_shows_a_run_does_not_show_it_again_for_its_last_line(notebook, mode):
    """``await run`` there: IPython displays the run."""
    run = begin()
    view.show(run, mode=mode)
    gate(run)
    run.approve().wait(20)
    before = len(notebook.shown)
    view.show(run)
    assert len(notebook.shown) == before
    until(lambda: "Finished" in str(notebook.shown[0]) or "completed" in str(notebook.shown[0]), "the end in its place")


def test_html_has_no_widget(notebook):
    run = begin()
    view.show(run, mode="html")
    until(lambda: "Run this cell again to decide" in notebook.shown[0]["text/html"], "the gate")
    run.approve().wait(20)
    until(lambda: "Finished" in notebook.shown[0]["text/html"], "the end")
    assert Widget.made == []
    assert len(notebook.shown) == 1


def test_log_is_lines(notebook):
    run = begin()
    view.show(run, mode="log")
    gate(run)
    run.approve().wait(20)
    until(lambda: "cm: flow completed" in notebook.shown[0]["text/plain"], "the last line")
    assert Widget.made == []


def test_log_of_a_run_that_waits_already_says_for_what(notebook):
    run = begin()
    gate(run)
    view.show(run, mode="log")
    until(lambda: "planner is waiting for you" in notebook.shown[0]["text/plain"], "the gate")
    assert "%cm approve" in notebook.shown[0]["text/plain"]


def test_a_gates_bar_stands_alone_and_the_card_stays(notebook):
    run = begin()
    view.show(run, ["planner"])
    card = widget()
    waiting()
    notebook.run("b")
    pending.show_bar(run, gate(run))
    bar = until(lambda: widget() is not card and widget(), "the bar")
    assert (bar.cards, bar.graph, [one["step"] for one in bar.gates]) == ([], "", ["planner"])
    assert "first plan" not in notebook.shown[-1]["text/html"]
    assert not card.closed, "the card is still live under its own cell"
    bar.says(decide=bar.gates[0]["id"], digest=bar.gates[0]["digest"], action="approve")
    run.wait(20)
    until(lambda: bar.closed, "the bar to be over")
    assert "planner approved by you" in notebook.shown[2]["text/plain"]
    assert run["builder"].text == "built"


def test_a_bar_without_its_card_shows_what_is_to_be_decided(notebook, monkeypatch):
    monkeypatch.setattr(errors, "has_magic", True)
    script = cm.ScriptedEngine(
        {"asker": [cm.Reply(tool_calls=[{"name": "ask_human", "arguments": {"question": "Red or blue?"}}])]}
    )
    workflow = cm.Workflow("flow", agents=[cm.Agent("asker", "Ask.")], steps="asker")
    run = workflow.start(engine=script, journal=":memory:")
    opened = gate(run)
    with pytest.raises(cm.GatePending, match=r"Decide here \(or `%cm answer …`\)"):
        _ = run["asker"].text
    pending.show_bar(run, opened)
    assert "Red or blue?" in until(lambda: widget().gates, "the gate")[0]["words"]
    run.stop().wait(20)


def test_a_gate_that_is_closed_leaves_a_line(notebook):
    run = begin()
    opened = gate(run)
    run.approve().wait(20)
    pending.show_bar(run, opened)
    assert Widget.made == []
    assert "planner approved by you" in notebook.shown[0]["text/plain"]


def test_a_result_read_before_any_gate_is_open_shows_where_the_run_is_and_then_each_bar(notebook):
    go = threading.Event()

    @cm.agent("planner")
    def planner(turn):
        go.wait(30)
        return "a plan"

    @cm.agent("builder")
    def builder(turn):
        return "built"

    run = cm.Workflow("flow", agents=[planner, builder], steps="planner? -> builder?").start(journal=":memory:")
    until(lambda: run["planner"].status == "running", "the planner")
    with pytest.raises(cm.GatePending, match="has no result yet") as early:
        _ = run["builder"].text
    pending.show_bar(run, early.value.gate, early.value.step)
    assert widget().gates == []
    assert "planner is running" in widget().head["place"]
    assert "planner is running" in notebook.shown[1]["text/plain"]
    go.set()
    for step in ("planner", "builder"):
        bar = waiting(step)
        until(lambda: "%cm approve" in notebook.shown[1]["text/plain"], "the snapshot")
        widget().says(decide=bar["id"], digest=bar["digest"], action="approve")
    run.wait(20)
    until(lambda: widget().closed, "the bar to be over")
    assert len(Widget.made) == 1


def test_a_failed_steps_prompt_is_edited_by_a_button_that_names_its_magic(notebook):
    run = begin("planner", {"planner": [cm.Reply(error=cm.EngineError("no luck")), "at last"]})
    view.show(run)
    record = waiting()
    assert [button["text"] for button in record["buttons"]] == ["Retry", "Edit prompt", "Skip", "Stop"]
    edit = record["buttons"][1]
    assert (edit["action"], edit["ask"], edit["magic"]) == ("retry", "prompt", "%cm edit")
    widget().says(decide=record["id"], digest=record["digest"], action="retry", prompt="Go on.")
    assert run.wait(20)["planner"].prompt == "Go on."


def test_nobody_there(notebook, headless, capsys):
    run = begin("builder")
    view.follow_lines(run)
    view.show_static(run)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("cm: flow started: 1 step")
    assert lines[1].startswith("cm: builder ok")
    assert lines[-1].startswith("cm: flow completed")
    view.follow_lines(run)
    assert capsys.readouterr().out == ""  # told once
    view.show(run)
    assert Widget.made == []
    assert all("Finished" in shown["text/html"] for shown in notebook.shown)


def test_nobody_there_at_a_gate(notebook, headless, capsys):
    run = begin()
    with pytest.raises(cm.GatePending):
        view.follow_lines(run)
    assert "cm: gate: planner is waiting for you" in capsys.readouterr().out


# -- the protocol -----------------------------------------------------------------------------------------------------


def apply_messages(sent, page="p"):
    """What a page makes of them: texts by path, and the number it has come to."""
    number, texts = None, {}
    for message in sent:
        if message["kind"] == "all" and message["page"] == page:
            number, texts = message["number"], {path: list(text) for path, text in message["texts"].items()}
        elif number is not None and "number" in message:
            assert message["number"] == number + (message["kind"] != "mark")
            number = message["number"]
            for kind, path, *told in message.get("pieces", ()):
                if kind not in ("start", "delta", "block"):
                    continue
                text = texts.setdefault(path, ["", ""])
                if kind == "start":
                    text[:] = ["", ""]
                elif kind == "delta":
                    text[1] += told[0]
                elif kind == "block":
                    text[:] = [text[0] + told[0], told[1]]
    return texts


class Gated:
    """Writes, and goes on when it may."""

    name = "gated"

    def __init__(self, parts):
        self.parts, self.go = parts, False

    async def stream(self, request):
        import asyncio

        for part in self.parts:
            yield cm.Delta(part)
            await asyncio.sleep(0.002)
        while not self.go:
            await asyncio.sleep(0.002)
        yield cm.TurnDone("".join(self.parts))


def write(parts, hello_after=0.0):
    engine = Gated(parts)
    flow = cm.Workflow("flow", agents=[cm.Agent(id="planner", prompt="Go.")], steps="planner?")
    run = flow.start(engine=engine, journal=":memory:")
    view.show(run)
    time.sleep(hello_after)
    widget().says(hello=True)
    return run, engine


@pytest.mark.parametrize("hello_after", [0.0, 0.15])
def test_a_text_arrives_whole_whenever_the_page_begins(notebook, hello_after):
    parts = [f"word{n} " if n % 20 else f"\n\nParagraph {n}: " for n in range(200)]
    run, engine = write(parts, hello_after)

    def plain():
        blocks, rest = apply_messages(widget().sent).get("planner", ("", ""))
        return f"{blocks} {rest}"

    until(lambda: "word199" in plain(), "the last word")
    assert all(f"word{n} " in plain() or f"word{n}<" in plain() for n in range(200) if n % 20)
    assert "<p" in plain()
    engine.go = True
    gate(run)


@pytest.mark.parametrize("watched", [False, True])
def test_a_page_that_says_hello_before_its_output_is_complete_misses_nothing(notebook, monkeypatch, watched):
    """While the cell still makes the snapshot, the page has loaded the widget and the agent writes."""
    publish, written = notebook.publish, {1: "one ", 2: "two ", 3: "three "}
    said: queue.Queue[str] = queue.Queue()

    @cm.agent("planner")
    def planner(turn):
        while text := said.get():
            turn.emit(text)
        return "done"

    run = cm.Workflow("flow", agents=[planner], steps="planner?").start(journal=":memory:")
    until(lambda: run.state.running, "the turn")
    if watched:
        view.show(run)
        notebook.run("b")

    def slow(data, **options):
        publish(data, **options)
        if "application/vnd.jupyter.widget-view+json" in data:
            shown = widget()
            said.put(written[1])
            until(lambda: run.draft("planner") == written[1], "the first word")
            shown.says(hello=True)
            shown.hears("all")
            said.put(written[2])
            if watched:  # the other view has it, so this one's turn was missed
                until(lambda: "two" in run.draft("planner"), "the second word")
                other = Widget.made[-2]
                other.says(hello=True)
                until(lambda: "two" in apply_messages(other.sent).get("planner", ["", ""])[1], "the other view")

    monkeypatch.setattr(notebook, "publish", slow)
    view.show(run)
    said.put(written[3])
    until(lambda: "three" in apply_messages(widget().sent).get("planner", ["", ""])[1], "the last word")
    assert apply_messages(widget().sent)["planner"] == ["", "one two three "]
    said.put("")
    gate(run)


def test_two_runs_with_the_same_step_write_at_the_same_time(notebook):
    said = {name: queue.Queue[str]() for name in ("first", "second")}

    @cm.agent("planner")
    def planner(turn):
        while text := said[turn.inputs["name"]].get():
            turn.emit(text)
        return "done"

    flow = cm.Workflow("flow", agents=[planner], steps="planner?")
    shown = {}
    for name in said:
        run = flow.start({"name": name}, journal=":memory:")
        view.show(run)
        notebook.run(name)
        shown[name] = (run, widget())
        widget().says(hello=True)
        widget().hears("all")
    for word in range(3):
        for name, queued in said.items():
            queued.put(f"{name} {word} ")
            sent = shown[name][1].sent
            until(lambda sent=sent, word=word: f" {word} " in apply_messages(sent)["planner"][1], f"{name} {word}")
    for name, (run, page) in shown.items():
        assert apply_messages(page.sent)["planner"] == ["", f"{name} 0 {name} 1 {name} 2 "]
        said[name].put("")
        gate(run)


def test_at_most_twenty_messages_a_second(notebook):
    run, engine = write([f"{n} " for n in range(500)])
    until(lambda: "499" in apply_messages(widget().sent).get("planner", "  ")[1], "the last word")
    engine.go = True
    gate(run)
    times = [message["at"] for message in widget().sent if message["kind"] == "live"]
    assert len(times) > 2
    assert len(times) <= 20 * (times[-1] - times[0]) + 2


def test_a_lost_message_is_noticed_at_the_end(notebook, monkeypatch):
    monkeypatch.setattr(view, "CLOCK_S", 0.1)
    run, engine = write(["one two"])
    engine.go = True
    gate(run)
    mark = widget().hears("mark")
    assert mark["number"] == max(message.get("number", 0) for message in widget().sent)


def test_too_much_too_fast_is_plain_and_bounded():
    writing = view.Writing(1)
    told = [writing.add("- item\n" * 10)]
    told += [writing.add(f"{n:06d} " * 2000) for n in range(20)]
    assert [one[0] for one in told] == ["delta", "block", *["delta"] * 19]
    blocks, rest = writing.whole()
    assert blocks.startswith('<div class="cm-piece">- item')
    assert rest.endswith("000019 ")
    for _n in range(100):
        writing.add("x" * 20_000)
    assert len(writing.whole()[1]) <= 2 * view.KEPT


def test_what_is_written_is_cleaned():
    writing = view.Writing(1)
    assert writing.add("a\x1b[31m\u202eb") == ["delta", "a⟨U+202E⟩b"]
    kind, block, rest = writing.add("<script>x</script>\n\n[y](javascript:z)\n\nend\n\nnext")
    assert (kind, rest) == ("block", "end\n\nnext")
    assert "<script" not in block
    assert "href" not in block


def test_bodies_are_given_to_who_asks(notebook):
    run = begin()
    view.show(run)
    gate(run)
    run.reject("name the tests")
    until(lambda: len(run["planner"].attempts) == 2 and run.gates, "the second attempt")
    wanted = {
        ("output", 1): "Rejected by you",
        ("output", 2): "second plan",
        ("diff", 2): "<ins",
        ("prompt", 2): "name the tests",
        ("log", 2): "attempt 2 started",
    }
    for ticket, ((tab, attempt), text) in enumerate(wanted.items()):
        widget().says(want="planner", attempt=attempt, tab=tab, ticket=ticket)
        assert text in widget().hears("body", ticket=ticket, page="p")["html"]
    widget().says(want="planner", attempt=2, tab="edit-output", ticket=99)
    assert widget().hears("body", ticket=99)["text"] == "second plan"


def test_what_cannot_be_decided_is_said_in_words(notebook):
    run = begin("planner? -> builder?")
    view.show(run)
    record = waiting()
    answer = {"decide": record["id"], "digest": record["digest"]}
    widget().says(**answer, action="reject", seq=1)
    assert "Say why" in widget().hears("said", gate=record["id"])["text"]
    widget().sent.clear()
    widget().says(**answer, action="fly")
    assert "action='fly' is not valid" in widget().hears("said")["text"]
    widget().sent.clear()
    widget().says(**{**answer, "digest": "of another text"}, action="approve")
    until(lambda: any("something else" in m.get("text", "") for m in widget().sent), "what differs")
    assert run.status == "waiting"
    widget().says(**answer, action="approve")
    gate(run, "builder")
    widget().says(**answer, action="approve", page="late")
    assert "Already approved by you" in widget().hears("said", page="late")["text"]
    assert len(run.state.decisions) == 1
    widget().says(do="mode", mode="unattended")
    until(lambda: run.mode == "unattended", "the mode")
    widget().says(do="nonsense")
    widget().says(do="stop")
    run.wait(20)
    assert run.status == "stopped"


def test_back_to_here_takes_the_run_back(notebook):
    run = begin("planner -> builder?")
    view.show(run)
    gate(run, "builder")
    assert 'data-do="rewind" data-step="planner"' in str(widget().cards)
    widget().says(do="rewind", step="planner")
    until(lambda: run.status == "paused", "the run to be back")
    assert [step.status for step in run] == ["pending", "pending"]
    until(lambda: "Back at planner" in str(widget().head), "the words below")
    widget().says(do="unpause")
    gate(run, "builder")
    assert len(run["planner"].attempts) == 2
    run.stop()


def test_fork_here_makes_a_run_that_waits_and_says_so(notebook):
    run = begin("planner -> builder?")
    view.show(run)
    gate(run, "builder")
    assert 'data-do="fork" data-step="planner"' in str(widget().cards)
    before = run.events
    widget().says(do="fork", step="planner", page="one")
    said = widget().hears("said", page="one")["text"]
    fork = cm.current()
    assert said == f"Run {fork.id} is a fork of {run.id} at planner. `%cm show` shows it, `%cm run` goes on with it."
    assert [step.status for step in fork] == ["pending", "pending"]
    assert run.events == before
    widget().says(do="fork", step="nobody", page="two")
    assert "no step 'nobody'" in widget().hears("said", page="two")["text"]
    fork.stop()
    run.stop()


def test_a_message_that_is_none_changes_nothing(notebook):
    run = begin()
    view.show(run)
    gate(run)
    for content in ({"want": 5}, {"decide": None}, {"decide": "x/y", "action": "approve"}, {"do": ["stop"]}, {}):
        widget().says(**content)
    widget().says(hello=True, page="last")
    widget().hears("all", page="last")
    assert run.status == "waiting"


# -- teams ------------------------------------------------------------------------------------------------------------


class Team:
    """A coordinator whose team writes what it is told, until it is told ``""``; an error fails."""

    def __init__(self, *names, gates=()):
        self.said = {name: queue.Queue() for name in names}

        def member(name):
            @cm.agent(name)
            def works(turn):
                while text := self.said[name].get():
                    if isinstance(text, Exception):
                        raise text
                    turn.emit(text)
                return f"{name} is done."

            return works

        @cm.agent("boss")
        async def boss(turn):
            done = await turn.run_agents([[{"agent": name, "prompt": "Go."} for name in names]])
            return "; ".join(f"{one.agent} {one.status}" for one in done)

        flow = cm.Workflow("flow", agents=[boss, *map(member, names)], steps="boss", sub_agents=list(names))
        self.run = flow.start(journal=":memory:", max_concurrency=len(names))

    def tell(self, *texts, to=None):
        for name in [to] if to else self.said:
            for text in texts:
                self.said[name].put(text)


def lanes(sent, page="p"):
    """The lanes as a page has them."""
    known, begun = {}, False
    for message in sent:
        if message["kind"] == "all" and message["page"] == page:
            known, begun = {lane["key"]: dict(lane) for lane in message["lanes"]}, True
        if not begun:
            continue
        for kind, path, *told in message.get("pieces", ()):
            if kind == "lane":
                known[path] = dict(told[0])
            elif kind == "tail":
                known[path]["tail"] = told[0]
    return known


def lane(name, **wanted):
    """That lane, once it is so."""

    def find():
        one = lanes(widget().sent).get(f"boss/{name}#1")
        return one if one and wanted.items() <= one.items() else None

    return until(find, f"{name}: {wanted}")


def test_a_lane_has_the_last_line_and_its_whole_text_when_it_is_open(notebook):
    team = Team("a", "b")
    view.show(team.run)
    widget().says(hello=True)
    team.tell("one\n", "two **bold**\n")
    for name in "ab":
        lane(name, tail="two bold")
    assert not any(path.startswith("boss/") for path in apply_messages(widget().sent))
    (card,) = until(lambda: [one for one in widget().cards if one.get("lanes")], "the lanes' places")
    assert [one["key"] for one in card["lanes"]] == ["boss/a#1", "boss/b#1"]
    assert card["columns"] == 2
    widget().says(see="boss/a#1", on=True)
    until(lambda: "two **bold**" in apply_messages(widget().sent).get("boss/a#1", ("", ""))[1], "what was written")
    team.tell("three ")
    until(lambda: "three" in apply_messages(widget().sent)["boss/a#1"][1], "what is written")
    assert apply_messages(widget().sent)["boss/a#1"][1].count("two") == 1
    assert "boss/b#1" not in apply_messages(widget().sent)
    widget().says(see="boss/a#1", on=False)
    team.tell("four ")
    lane("a", tail="three four")
    assert "four" not in apply_messages(widget().sent)["boss/a#1"][1]
    widget().says(hello=True, page="late")
    widget().hears("all", page="late")
    assert lanes(widget().sent, "late")["boss/b#1"]["tail"] == "three four"
    team.tell("")
    team.run.wait(20)
    until(lambda: "a is done." in str(notebook.shown[0].get("text/html")) + widget().final, "the saved lanes")


def test_what_asks_the_same_is_answered_in_one_go_and_what_opened_later_is_not(notebook):
    team = Team("a", "b", "c")
    view.show(team.run)
    widget().says(hello=True)
    for name in "ab":
        team.tell(cm.EngineError("no"), to=name)
        waiting(name)
    record = until(
        lambda: next((one for one in widget().gates if len(one["buttons"]) == 5), None), "the button for all"
    )
    button = record["buttons"][-1]
    assert button["text"] == "Retry all 2 that failed"
    assert button["magic"] == "%cm retry boss/a#1 · %cm retry boss/b#1"
    assert "2 decisions wait for you" in widget().head["tray"]
    team.tell(cm.EngineError("no"), to="c")
    waiting("c")
    widget().says(decide=record["id"], digest=record["digest"], action="retry", **button["more"])
    until(lambda: len(team.run.state.decisions) == 2, "two decisions")
    assert [one.step for one in team.run.gates] == ["c"]
    widget().says(decide=team.run.gates[0].id, digest=team.run.gates[0].digest, action="skip")
    team.tell("")
    assert team.run.wait(20)["boss"].text == "a done; b done; c skipped"


class Asks:
    """Asks before each of its turns whether it may call a tool, its path's last name being the argument."""

    name = "asks"

    async def stream(self, request):
        tool = "shell" if request.agent.id == "c" else "remove"
        said = await request.ask_permission(tool, {"path": request.agent.id})
        yield cm.TurnDone(f"{request.agent.id} {said.allowed}")


def test_permissions_of_the_same_tool_are_given_in_one_go(notebook):
    @cm.agent("boss")
    async def boss(turn):
        done = await turn.run_agents("a 'x' & b 'x' & c 'x'")
        return "; ".join(one.text for one in done)

    agents = [boss, *(cm.Agent(name, "Go.", engine="asks") for name in "abc")]
    cm.register_engine(Asks())
    run = cm.Workflow("flow", agents=agents, steps="boss", sub_agents=["a", "b", "c"]).start(journal=":memory:")
    view.show(run)
    widget().says(hello=True)
    records = until(lambda: len(widget().gates) == 3 and widget().gates, "three bars")
    alike = {one["step"]: one["buttons"][-1]["text"] for one in records}
    assert alike["a"] == alike["b"] == "Allow all 2 like this"
    assert alike["c"] != alike["a"], "it asks for another tool"
    assert all('"path"' in one["words"] or "&quot;path&quot;" in one["words"] for one in records), "all that is decided"
    first = next(one for one in records if one["step"] == "a")
    button = first["buttons"][-1]
    widget().says(decide=first["id"], digest=first["digest"], action=button["action"], **button["more"])
    until(lambda: [one.step for one in run.gates] == ["c"], "the two that are alike")
    widget().says(decide=run.gates[0].id, digest=run.gates[0].digest, action="reject", feedback="no")
    assert run.wait(20)["boss"].text == "a True; b True; c False"


def test_a_hundred_that_write_cost_little_and_only_what_changed_is_sent(notebook):
    team = Team(*(f"m{number}" for number in range(100)))
    view.show(team.run)
    widget().says(hello=True)
    until(lambda: len(team.run.state.running) == 101, "all of them")
    until(lambda: len(lanes(widget().sent)) == 20, "as many lanes as are shown")
    rest = "80 more: 80 running"
    card = until(lambda: next((one for one in widget().cards if rest in str(one.get("lanes"))), None), rest)
    assert card["columns"] == 0
    before = len(widget().sent)
    for number in range(30):
        team.tell(f"{number} and some more words. ")
    lane("m0", tail=until(lambda: lanes(widget().sent)["boss/m0#1"]["tail"], "a last line"))
    until(lambda: "29 and" in lanes(widget().sent)["boss/m0#1"]["tail"], "the last line")
    pieces = [piece for message in widget().sent[before:] for piece in message.get("pieces", ())]
    assert {piece[0] for piece in pieces} <= {"tail", "line", "words", "said"}
    assert max(len(str(message)) for message in widget().sent[before:]) < 20_000
    team.tell("", to="m0")
    lane("m1")
    until(lambda: any(piece[0] == "lane" for m in widget().sent[before:] for piece in m.get("pieces", ())), "a change")
    changed = [m for m in widget().sent[before:] if any(piece[0] == "lane" for piece in m.get("pieces", ()))]
    assert len(changed[0]["pieces"]) <= 2, "what took the place of the one that is done"
    widget().says(want="boss", tab="rest", ticket=7)
    assert "m99" in widget().hears("body", ticket=7)["html"]
    team.tell("")
    team.run.wait(60)


def test_a_countdown_is_sent_once(notebook, monkeypatch):
    monkeypatch.setattr(view, "CLOCK_S", 0.05)
    busy = cm.Reply(error=cm.EngineRateLimited("rate limited", retry_after_s=30))
    run = begin("planner", {"planner": [busy]})
    view.show(run)
    widget().says(hello=True)
    card = until(lambda: next((one for one in widget().cards if "data-until" in one["summary"]), None), "the countdown")
    assert f'data-until="{run.state.steps["planner"].retry_at:.2f}"' in card["summary"]
    hub = view._hubs[run.id]
    until(lambda: hub._timer is None and not hub._dirty, "nothing more to send")
    assert not any(piece[0] == "line" for message in widget().sent for piece in message.get("pieces", ()))
    run.stop()


# -- records ----------------------------------------------------------------------------------------------------------


def labels(state):
    (only,) = view.gate_records(state)
    return [button["text"] for button in only["buttons"]]


def test_buttons_of_each_kind_of_gate():
    assert labels(Story("planner?").answer("plan").state) == ["Approve", "Reject…", "Edit", "Skip"]
    failed = Story("planner").fail("no key")
    assert labels(failed.state) == ["Retry", "Edit prompt", "Skip", "Stop"]
    spent = Story("planner -> coder", max_turns=1).answer("plan")
    assert labels(spent.state) == ["Continue with +1 turn", "Stop"]
    assert "1 of 1 turn" in view.head_record(spent.state)["words"]
    asks = Story("planner").ask("Which one?")
    assert labels(asks.state) == ["Answer…"]
    (record,) = view.gate_records(asks.state)
    assert record["buttons"][0]["at_once"]


def test_every_button_names_its_magic_and_asks_only_for_what_its_decision_takes():
    for state in (Story("a?").answer("x").state, Story("a").fail("no").state, Story("a").ask("b?").state):
        for button in view.gate_records(state)[0]["buttons"]:
            assert "%cm " in button["magic"] or "cm.current()." in button["magic"]
            assert button.get("ask") in (None, "feedback", "output", "prompt")


def test_thinking_is_a_moving_line_and_then_folded_away():
    writing = view.Writing(1)
    assert writing.think("Let me\nsee") == ["block", "", "Thinking: Let me see"]
    assert writing.whole() == ["", "Thinking: Let me see"]
    writing.think(" <b>")
    kind, folded, rest = writing.add("Hello")
    assert (kind, rest) == ("block", "Hello")
    assert folded.startswith("<details style=")
    assert "Thinking, 14 characters" in folded
    assert "Let me\nsee &lt;b&gt;" in folded
    assert writing.add(", you") == ["delta", ", you"]
    kind, before, rest = writing.think("hm")
    assert (kind, rest) == ("block", "Thinking: hm")
    assert "Hello, you" in before
    kind, again, rest = writing.add("And so on")
    assert "Thinking, 2 characters" in again
    assert writing.whole() == [folded + before + again, "And so on"]


def test_a_permission_shows_all_that_is_decided_about():
    """The buttons, and the arguments: in the card, or in the bar where there is no card; to be edited as they are."""
    story = Story("a").permit("remove", path="x" * 3000)
    assert labels(story.state) == ["Allow once", "Allow for this run", "Always allow", "Edit…", "Deny…"]
    (record,) = view.gate_records(story.state)
    once, for_run, always, edit, deny = record["buttons"]
    assert [button.get("key") for button in record["buttons"]] == ["A", None, None, "E", "R"]
    assert [button.get("more") for button in (once, for_run, always)] == [None, {"scope": "run"}, {"scope": "always"}]
    assert (edit["label"], edit["send"]) == ("The arguments to call it with", "Allow with these")
    assert (deny["ask"], deny["send"]) == ("feedback", "Deny")
    assert "x" * 3000 not in record["words"]
    assert "x" * 3000 in view.body_record(story.state, "a", 1, "output")["html"]
    gate = story.state.gates[record["id"]]
    assert "x" * 3000 in view.gate_record(story.state, gate, beside=False)["words"]
    assert view.body_record(story.state, "a", 1, "edit-output")["text"] == f'{{\n  "path": "{"x" * 3000}"\n}}'


def test_cards_fold_as_in_the_saved_view():
    story = Story(" -> ".join(f"s{n}" for n in range(12)))
    for _ in range(8):
        story.answer("done")
    done, card, pending = view.card_records(story.state)
    assert done["steps"] == [f"s{n}" for n in range(8)]
    assert (card["step"], card["writing"]) == ("s8", 1)
    assert pending["steps"] == ["s9", "s10", "s11"]
    assert [record["open"] for record in (done, card, pending)] == [False, True, False]
    assert [record["body"] for record in (done, card, pending)] == [True, True, False]


def test_a_locked_workflow_has_no_menu():
    assert view.head_record(Story("a", autonomous_mode="always").state)["locked"]
    assert not view.head_record(Story("a").state)["locked"]


def test_the_page_gets_a_small_module():
    folder = Path(view.__file__).parent
    module, style = (folder / "view.js").read_text(), (folder / "view.css").read_text()
    assert len(module.encode()) < 25_000
    assert len(style.encode()) < 6_000
    assert "http" not in module + style
    assert html.FRAME  # the frame comes from the saved view


def test_the_files_that_an_attempt_changed_have_a_tab(tmp_path):
    @cm.agent("builder")
    def builder(turn):
        (turn.workspace / "<img src=x onerror=alert(1)>.py").write_text("<script>alert(1)</script>\n--- a\n")
        return "built"

    flow = cm.Workflow("files", agents=[builder, cm.Agent("idle", "x")], steps="builder?")
    run = flow.start(workspace=tmp_path / "work", journal=":memory:")
    gate(run)
    with run.reading() as state:
        (card,) = view.card_records(state)
        shown = view.body_record(state, "builder", 1, "files")["html"]
        saved = html.run_html(state)
    assert 'data-tab="files"' in card["tools"]
    for made in (shown, saved):
        assert "1 file changed" in made
        assert "new &lt;img src=x onerror=alert(1)&gt;.py (+2 -0)" in made
        assert "+&lt;script&gt;alert(1)&lt;/script&gt;\n+--- a</ins>" in made
        assert "<script" not in made.replace("<scripts", "")
        assert "<img src=x" not in made
    assert "  1 file changed:\n    new <img" in run["builder"]._repr_mimebundle_()["text/plain"]
    run.approve()
    run.wait()


def test_an_attempt_that_changed_no_files_has_no_such_tab(tmp_path):
    @cm.agent("builder")
    def builder(turn):
        return "built"

    run = cm.Workflow("files", agents=[builder], steps="builder?").start(journal=":memory:")
    gate(run)
    with run.reading() as state:
        assert 'data-tab="files"' not in view.card_records(state)[0]["tools"]
    run.stop()
