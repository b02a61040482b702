"""The run under its cell: live while there is something to do, plain HTML ever after.

Strategy: whoever calls ``show`` makes a *display*: two outputs of the cell (``JUPYTER.md`` §8). In A stands the live
widget, in B a snapshot for the saved file, which the widget's script hides while it lives. When nothing more happens to
what is shown, A becomes static HTML, B is emptied and the widget closed; if something does happen to it later (a step
is added, a loop comes back), A becomes live again.

All displays of a run are fed by one *hub* on the run's own loop. It is woken by the run's ``Feed``, at most 20 times a
second takes all there is, renders each character of a text once, and tells every page:

    traits     page (what never changes), head, graph, cards, gates: small, whole, made from ``RunState`` by the
               functions named ``*_record``
    messages   numbered: ``live`` with the pieces of texts (``start``, ``delta``, ``block``), the lanes that changed
               (``lane``, ``tail``) and lines that tick; ``body``, what a page asked for; ``said``, why a decision was
               refused; ``mark``, the last number again
    ``all``    everything that is being written, and all lanes, in answer to a page's ``hello``: first, after a gap, a
               reload

Of an agent that a step called, a page gets a *lane*: how it stands and its last line, at most five times a second. Its
whole text is sent, and formatted, only while some page has the lane open (``see``), so a hundred cost little.

A page sends ``hello``, ``want`` (a body), ``see``, ``decide`` and ``do``, nothing else, and sets no trait. It decides
nothing: a click becomes ``run.decide``, which accepts one answer. HTML comes from ``render/html.py``, as in the saved
view.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import time
import uuid
import weakref
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, Literal, get_args

from ..cleaning import SAVED_BELOW
from ..config import setting
from ..errors import AlreadyDecided, CodeMachineError, did_you_mean
from ..events import Action, Decision, Gate, Mode, RunResumed, RunStarted, TurnStarted
from ..feed import Feed, LiveText
from ..render import html, svg
from ..render import text as say
from ..render.markdown import BlockStream, clean
from ..run import Run
from ..runstate import RunState, StepState, gate_path
from ..state import apply
from ..workflow import Parallel
from . import bridge

ViewMode = Literal["full", "html", "log"]

TICK_S = 0.05
"""Shortest time between two messages to a page."""
CLOCK_S = 1.0
"""How often the seconds of what runs are counted on."""
SETTLE_S = 3.0
"""Time that a page has to load a widget: front ends stumble over one that is closed while they do."""
FORMATTED = html.STEP_LIMIT
"""Characters of a text that are formatted while it is written, and …"""
BURST = 8_000
"""… how many may arrive in one tick: what comes faster nobody reads, and formatting it would hold up the agent."""
KEPT = 32_000
"""Characters of unformatted text that a page keeps while it grows."""
TAIL_S = 0.2
"""Shortest time between two last lines of a lane, of which …"""
TAIL = 400
"""… so many characters are kept to find it in."""
BARS = 12
"""Open gates that have a bar of their own at the same time."""
ATTEMPTS = 12
"""Attempts of a step that have a tab."""
LOG_LINES = 200

# -- showing ----------------------------------------------------------------------------------------------------------


def show(run: Run, steps: Sequence[str] | None = None, *, mode: ViewMode | None = None) -> None:
    """Show the run, or some of its steps with their gates, under the present cell; returns at once.

    Parameters
    ----------
    steps
        Ids of the steps to show as cards. A card that was shown under another cell moves here; what this cell shows
        already is not shown twice.
    mode
        ``"full"``: live, with buttons. ``"html"``: a snapshot, renewed at each gate. ``"log"``: a line per event.
        ``None``: as configured (``%config CM.view``).

    Notes
    -----
    Where nobody is there to answer, or the run is driven by another process, it is one static view.

    Raises
    ------
    TransitionError     There is no such step.
    CodeMachineError    There is no such mode.
    """
    chosen = None if steps is None else [run[id].id for id in steps]
    how = mode or setting("view")
    if how not in (modes := get_args(ViewMode)):
        raise CodeMachineError(f"there is no view {how!r}. {did_you_mean(str(how), modes, 'Views')}")
    if bridge.kernel() is None or run._driver.loop is None or not run._answers.somebody:
        show_static(run, chosen)
        return
    if how == "full" and setting("direct_clicks"):
        bridge.direct_clicks.install(bridge.kernel())
    hub = _hub(run)
    if hub.makes_room(chosen, how if mode is not None else None):
        hub.add(Display(run, chosen, how, hub.listen))


def show_static(run: Run, steps: Sequence[str] | None = None) -> None:
    """Show the run, or some of its steps, as it is now and stays."""
    bridge.Slot.open(_static(run, steps))


_told: dict[str, int] = {}
"""Up to which event the lines of a run have been printed."""


def follow_lines(run: Run) -> None:
    """Wait until the run rests, and print a line for each of its events; raises as ``run.wait`` does.

    For cells that nobody watches: the lines belong to the cell that waits. An event is told once in a notebook.
    """
    state, feed = RunState(), run.watch(lambda: None)
    past = run.events
    begin = next((event.seq for event in reversed(past) if isinstance(event, (RunStarted, RunResumed))), 0) - 1

    def tell(things: Iterable[Any]) -> None:
        for event in things:
            if isinstance(event, LiveText) or event.seq <= state.seq:
                continue
            apply(state, event)
            if event.seq > max(begin, _told.get(run.id, 0)):
                _told[run.id] = event.seq
                if (line := say.event_line(state, event)) is not None:
                    print(line, flush=True)

    try:
        tell(past)
        while True:
            try:
                run.wait(timeout_s=0.2)
                return
            except TimeoutError as late:
                if run.error is late:
                    raise
            finally:
                tell(feed.take())
    finally:
        run.unwatch(feed)


def _static(run: Run, steps: Sequence[str] | None) -> dict[str, str]:
    with run.reading() as state:
        kept = None if steps is None else [id for id in steps if id in state.steps]
        if kept == [] and steps:
            return _line(f"{', '.join(steps)}: removed from the workflow")
        return {"text/html": html.run_html(state, kept), "text/plain": say.run_text(state)}


def _line(words: str) -> dict[str, str]:
    return {"text/html": html.page(html.faint(words), framed=False), "text/plain": words}


# -- what a page is told ----------------------------------------------------------------------------------------------


HELP = [
    ("A", "approve (in the bar)"),
    ("S", "skip (in the bar)"),
    ("R", "reject, with words"),
    ("E", "edit"),
    ("Ctrl+Enter", "send the words"),
    ("G", "to the next decision"),
    ("J", "next step"),
    ("K", "step before"),
    ("[", "attempt before"),
    ("]", "next attempt"),
    ("D", "what changed"),
    ("Esc", "back to the cell"),
    ("?", "this list"),
]
MODES: dict[Mode, str] = {
    "step-by-step": "Pause after every step",
    "gates": "Pause where a step asks for it",
    "unattended": "Do not pause: gates approve themselves",
}
SURE = "Switch to unattended? Gates that open from now on are approved without you."
SILENT = "The kernel has not answered yet. The buttons come when it does; until then use %cm approve in a cell."
BUSY = "Sent. The kernel is busy; it answers when it can."
GONE = "Not connected to the kernel. Run the notebook from the top to here: nothing runs twice, the gate is the same."


CARD = (
    '<li><div data-part="flat"></div><details data-part="details"><summary data-part="summary"></summary>'
    '<div class="cm-tools" data-part="tools"></div><div class="cm-body" tabindex="0" data-part="body"></div></details>'
    '<div class="cm-tail cm-small" data-part="tail"></div><ol class="cm-lanes" data-part="lanes"></ol>'
    '<div data-part="slot"></div></li>'
)
BAR = (
    '<div class="cm-bar" role="group" tabindex="-1"><div data-part="words"></div>'
    '<div class="cm-buttons" data-part="buttons"></div><div class="cm-ask" data-part="more" hidden></div>'
    '<div class="cm-note" data-part="error" hidden></div></div>'
)


def page_record(state: RunState, steps: Sequence[str] | None = None) -> dict[str, Any]:
    """What never changes in a page: its parts, which it fills in by their names, and words for when nobody answers."""
    label = f"Workflow run {state.name}{': ' if steps else ''}{', '.join(steps or ())}"
    controls = (
        '<button type="button" data-part="stop" data-do="stop">Stop</button>'
        '<button type="button" data-part="goOn" data-do="unpause">Go on</button>'
    )
    modes = (
        '<span class="cm-end" data-part="modes"><button type="button" data-part="modeButton" data-do="choose" '
        'aria-haspopup="menu" aria-expanded="false"></button>'
        '<div class="cm-menu" role="menu" aria-label="Mode" data-part="menu" hidden></div></span>'
    )
    if steps is None:
        above = (
            '<div class="cm-head"><span class="cm-name" data-part="title"></span><span data-part="pill"></span>'
            f'{controls}<span data-part="words"></span>{modes}</div><div class="cm-small" data-part="source"></div>'
        )
        below = '<div class="cm-said cm-small" data-part="said"></div>'
    else:
        above = ""
        below = f'<div class="cm-head cm-small"><span data-part="place"></span>{controls}{modes}</div>'
    keys = "".join(f"<div><kbd>{escape(key)}</kbd> {escape(what)}</div>" for key, what in HELP)
    return {
        "html": f'<section class="cm-run" role="region" tabindex="-1" hidden style="{html.FRAME}" '
        f'aria-label="{escape(label)}" data-lm-suppress-shortcuts="true"><div data-part="inside" hidden>{above}'
        f'<div class="cm-ask" data-part="sure" hidden>{escape(SURE)}<div class="cm-buttons">'
        '<button type="button" class="cm-no" data-do="mode" data-mode="unattended">Switch to unattended</button>'
        '<button type="button" data-do="back">Back</button></div></div><div class="cm-graph" data-part="graph"></div>'
        '<ol class="cm-list" data-part="list"></ol><div data-part="gates"></div>'
        f'<div class="cm-tray cm-small" data-part="tray"></div>{below}</div>'
        '<div class="cm-note" data-part="error" hidden></div>'
        f'<div class="cm-help" data-part="help" hidden>{keys}</div>'
        '<div class="cm-status" data-part="status" role="status" aria-live="polite"></div></section>',
        "card": CARD,
        "bar": BAR,
        "shortcuts": bool(setting("shortcuts")),
        "words_for": {"silent": SILENT, "gone": GONE, "busy": BUSY},
    }


def head_record(state: RunState, steps: Sequence[str] | None = None, now: float | None = None) -> dict[str, Any]:
    """The line above, the words below, and what may be done to the run as a whole."""
    return {
        "title": html.inline(say.one_line(state.name, 80)),
        "pill": html.pill(say.run_look(state)),
        "words": html.faint(*say.run_total(state, now).words()),
        "source": html.origin_words(state),
        "mode": state.mode,
        "menu": _menu(state),
        "locked": state.locked is not None,
        "paused": state.paused and state.ended is None,
        "said": _said(state, now),
        "tray": _tray(state, html.gates_of(state, steps)),
        "spoken": say.one_line(say.sentence(state), 300),
        "place": "" if steps is None else html.inline(html.place_words(state, [state.step(id) for id in steps])),
    }


def _menu(state: RunState) -> str:
    """The modes, the present one marked; what is not undone by choosing again is asked about first."""

    def item(mode: Mode, what: str) -> str:
        now = mode == state.mode
        does = (
            'data-do="back"'
            if now
            else 'data-do="doubt"'
            if mode == "unattended"
            else f'data-do="mode" data-mode="{mode}"'
        )
        mark = "✓" if now else "\u2003"
        return (
            f'<button type="button" role="menuitemradio" aria-checked="{str(now).lower()}" tabindex="-1" {does}>'
            f"{mark} {mode}<small>{what}</small></button>"
        )

    does = "Pause when this step is done"
    pause = f'<button type="button" role="menuitem" tabindex="-1" data-do="pause">\u2003 {does}</button>'
    return "".join(item(mode, what) for mode, what in MODES.items()) + ("" if state.paused else pause)


def _tray(state: RunState, gates: Sequence[Gate]) -> str:
    """The decisions that wait, each a way to its buttons; none where the buttons are just above."""
    if len(gates) < 2 and not any("/" in gate.path for gate in gates):
        return ""
    one = len(gates) == 1
    words = f"{len(gates)} decision{' waits' if one else 's wait'} for you: "
    more = f" and {len(gates) - BARS} more" if len(gates) > BARS else ""
    return words + "".join(_to_gate(state, gate) for gate in gates[:BARS]) + more


def _to_gate(state: RunState, gate: Gate) -> str:
    step = state.find(gate.path)
    words = f"{say.lane_name(step)}: {say.look(state, step).word}"
    return f'<button type="button" data-gate="{escape(gate.id)}">{escape(say.one_line(words, 60))}</button>'


def _said(state: RunState, now: float | None) -> str:
    """What was decided last and what comes now: it stands where the bar was, and not beside one."""
    if state.gates:
        return ""
    last = next(reversed(state.decisions), None)
    decided = f"{gate_path(last)}: {say.decided(state, state.decisions[last], live=True)}. " if last is not None else ""
    said = html.inline(decided + say.sentence(state, now))
    return said if state.current is None else html.ticking(state, state.current, said, now)


def card_records(
    state: RunState, steps: Sequence[str] | None = None, now: float | None = None, opened: Container[str] = ()
) -> list[dict[str, Any]]:
    """The lines of the view: cards, folds, captions; `opened`: paths of lanes that are shown however they stand."""
    return [_row_record(state, row, place, now, opened) for place, row in enumerate(html.rows(state, steps))]


def _row_record(
    state: RunState, row: html.Row, place: int, now: float | None, opened: Container[str]
) -> dict[str, Any]:
    if row.caption is not None:
        return {"key": f"-{place}", "caption": row.caption}
    if len(row.steps) > 1:
        first, last, tone = row.steps[0], row.steps[-1], "done" if row.steps[0].settled else "pending"
        ids = [step.id for step in row.steps]
        return {
            "key": f"+{first.id}",
            "summary": html.fold_summary(state, row.steps),
            "colour": html.COLOURS["done" if tone == "done" else "pending"],
            "steps": ids,
            "want": {"tab": "group", "steps": ids},
            "body": tone == "done",
            "open": False,
            "last": 0,
            "rev": f"{last.id} {sum(step.gates + step.attempt for step in row.steps)}",
        }
    step = row.steps[0]
    record = {**_step_record(state, step, now), "open": row.open}
    if step.members:
        chosen, rest = say.shown_members(state, step, opened)
        record |= _team_record(state, step, {member.path for _depth, member in chosen})
        if rest:
            record["lanes"].append(
                {
                    "key": f"{step.path}+",
                    "summary": html.faint(rest),
                    "colour": html.COLOURS["pending"],
                    "want": {"want": step.path, "tab": "rest"},
                    "body": True,
                    "open": False,
                    "last": 0,
                    "rev": rest,
                }
            )
    return record


def _step_record(state: RunState, step: StepState, now: float | None) -> dict[str, Any]:
    # One that asks shows its question; what a parallel step gives is there when it has ended.
    writing = step.status in ("running", "calling") and not isinstance(step.step, Parallel)
    return {
        "key": step.path,
        "step": step.path,
        "summary": html.summary(state, step, now),
        "colour": html.COLOURS[say.look(state, step).tone],
        "stale": step.stale,
        "body": bool(step.attempts) or step.gate is not None,
        "tools": _tools(state, step),
        "last": step.attempt,
        "writing": step.attempt if writing else -1,
        # Another one: bodies that a page has of this step are old.
        "rev": f"{step.attempt}.{step.turn}.{step.status}.{step.gates}.{step.stale}"
        f".{len(step.last.errors) if step.last is not None else 0}.{state.ended}",
    }


def _team_record(state: RunState, step: StepState, shown: Container[str]) -> dict[str, Any]:
    """Where the lanes of those stand whom `step` called: captions, and keys of what ``lane_records`` says."""
    columns, parts = say.lanes(state, step, shown)
    places: list[dict[str, Any]] = [
        {"key": f"-{number} {step.path}", "caption": part}
        if isinstance(part, str)
        else {"key": part.path, "lane": True}
        for number, part in enumerate(parts)
    ]
    return {"columns": columns, "lanes": places}


def lane_records(
    state: RunState,
    steps: Sequence[str] | None = None,
    now: float | None = None,
    *,
    opened: Container[str] = (),
    tails: Mapping[str, str] | None = None,
) -> dict[str, dict[str, Any]]:
    """The lanes below the cards, by path; `tails`: the ends of texts that are being written."""
    made: dict[str, dict[str, Any]] = {}
    for row in html.rows(state, steps):
        for step in row.steps if len(row.steps) == 1 else ():
            chosen, _rest = say.shown_members(state, step, opened)
            shown = {member.path for _depth, member in chosen}
            for _depth, member in chosen:
                made[member.path] = {
                    **_step_record(state, member, now),
                    **(_team_record(state, member, shown) if member.members else {}),
                    "lane": True,
                    "team": say.team_words(member),
                    "open": False,
                    "tail": say.last_words(member, (tails or {}).get(member.path, "")),
                }
    return made


def _tools(state: RunState, step: StepState) -> str:
    """What stands above the body of a card: its attempts, and what to show of one."""
    name, shown = escape(say.lane_name(step)), step.attempts[-ATTEMPTS:]
    if not shown:
        return ""
    attempts = "".join(
        f'<button type="button" role="tab" data-attempt="{one.number}" '
        f'title="{escape(say.one_line(say.outcome(state, step, one), 300))}">'
        f"{escape(f'{one.number} {say.attempt_word(state, step, one)}')}</button>"
        for one in shown
    )
    made = f'Attempt<div class="cm-tabs" role="tablist" aria-label="Attempts of {name}">{attempts}</div>'
    kinds = {"output": "Output", "diff": "Diff", "files": "Files", "prompt": "Prompt", "log": "Log"}
    if len(shown) == 1:
        made = ""
        del kinds["diff"]
    if not any(one.files_total for one in shown):
        del kinds["files"]
    tabs = "".join(f'<button type="button" role="tab" data-tab="{tab}">{word}</button>' for tab, word in kinds.items())
    made += f'<div class="cm-tabs" role="tablist" aria-label="What to show of {name}">{tabs}</div>'
    if step.stale and step.gate is None and state.ended is None:
        made += (
            f'<button type="button" data-do="rerun" data-step="{escape(step.id)}" title="%cm run --from '
            f'{escape(step.id)}">Run from here</button>'
        )
    if not step.caller and state.back_at != step.id:
        made += (
            f'<button type="button" data-do="rewind" data-step="{escape(step.id)}" title="%cm rewind '
            f'{escape(step.id)}: it and all after it are to run again, once you go on">Back to here</button>'
        )
    if not step.caller:
        made += (
            f'<button type="button" data-do="fork" data-step="{escape(step.id)}" title="%cm fork '
            f'{escape(step.id)}: a new run with the same history, before this step; this one stays">Fork here</button>'
        )
    return made


NO_WORDS = "Nothing to send yet."
_ASKS: dict[str, dict[str, Any]] = {
    "reject": {
        "ask": "feedback",
        "label": "What should be different?",
        "send": "Send back",
        "empty": "Say what should be different: its agent gets your words.",
    },
    "answer": {"ask": "feedback", "label": "Your answer", "send": "Answer", "at_once": True, "empty": NO_WORDS},
    "edit": {
        "action": "approve",
        "ask": "output",
        "text_of": "edit-output",
        "label": "The output to go on with",
        "send": "Approve this",
        "empty": NO_WORDS,
    },
    "prompt": {
        "action": "retry",
        "ask": "prompt",
        "text_of": "edit-prompt",
        "label": "The prompt to try with",
        "send": "Try this",
        "empty": NO_WORDS,
    },
    "rerun": {"do": "rerun"},
}
_ASKS_AT: dict[tuple[str, str], dict[str, Any]] = {
    ("start", "edit"): {"label": "The prompt to send", "send": "Send this"},
    ("permission", "edit"): {"label": "The arguments to call it with", "send": "Allow with these"},
    ("permission", "reject"): {
        "label": "Why not? The agent is told.",
        "send": "Deny",
        "empty": "Say why not: the agent is told, and may do better.",
    },
}
STOPS = ("exhausted", "failed", "budget")
"""Kinds of gates that have Stop among their buttons, too; there is always one beside the run's state."""
_FOR_ALL: dict[str, tuple[Action, str]] = {
    "failed": ("retry", "Retry all {} that failed"),
    "permission": ("approve", "Allow all {} like this"),
}
"""By kind of gate: what can be answered for all that ask the same, in one go."""
_KEYS = {"approve": "A", "reject": "R", "edit": "E", "prompt": "E", "skip": "S"}


def gate_record(state: RunState, gate: Gate, *, beside: bool = True) -> dict[str, Any]:
    """An open gate as a page shows it: its sentence, and a button for each way to answer; `beside` as in ``text``."""
    buttons: list[dict[str, Any]] = []
    for way in say.ways(state, gate):
        if way.action == "stop" and gate.kind not in STOPS:
            continue  # there is one beside the run's state
        button: dict[str, Any] = {"action": way.action, "text": way.label, "magic": way.magic}
        button |= _ASKS.get(way.action, {}) | _ASKS_AT.get((gate.kind, way.action), {})
        if way.times > 1:
            button["more"] = {"count": way.times}
        if way.scope is not None:
            button["more"] = {"scope": way.scope}
        if way.action == "skip":
            button["sure"] = f"Skip {gate.step}? It gives no output; what names it gets an empty text."
            button["send"] = "Skip it"
        if key := _KEYS.get(way.name):
            button["key"] = key
        buttons.append(button)
    buttons += _for_all(state, gate)
    for button in buttons:
        if form := _form(button):
            button["form"] = form
    return {
        "id": gate.id,
        "step": gate.step,
        "path": gate.path,
        "attempt": gate.attempt,
        "kind": gate.kind,
        "digest": gate.digest,
        "words": html.sentence_html(state, gate, beside=beside),
        "buttons": buttons,
        "html": _buttons(buttons),
    }


def _buttons(buttons: Sequence[Mapping[str, Any]]) -> str:
    """The buttons of a bar, each with its key, and the magic that does the same as the first."""
    made = ""
    for number, button in enumerate(buttons):
        look = "cm-go" if number == 0 and "ask" not in button else "cm-no" if button["action"] == "reject" else ""
        key = button.get("key") if setting("shortcuts") else None
        keys, cap = (f' aria-keyshortcuts="{key}"', _keycap(key)) if key else ("", "")
        made += f'<button type="button" class="{look}"{keys}>{escape(button["text"])}{cap}</button>'
    return f'{made}<span class="cm-small">Same as running <code>{escape(buttons[0]["magic"])}</code></span>'


def _keycap(key: str) -> str:
    return f'<kbd aria-hidden="true">{key}</kbd>'


def _form(button: Mapping[str, Any]) -> str:
    """What a button opens before it decides: a field for words or a text, or whether it is meant."""
    if "sure" in button:
        asked, look, cap = f"<div>{escape(button['sure'])}</div>", "cm-no", ""
    elif "ask" in button:
        look = "cm-no" if button["action"] == "reject" else "cm-go"
        kind = ' class="cm-text"' if "text_of" in button else ""
        asked = f'<label>{escape(button["label"])}<textarea rows="3"{kind}></textarea></label>'
        cap = _keycap("Ctrl+↵") if setting("shortcuts") else ""
    else:
        return ""
    back = "" if button.get("at_once") else '<button type="button">Back</button>'
    send = f'<button type="button" class="{look}">{escape(button["send"])}{cap}</button>'
    return f'{asked}<div class="cm-buttons">{send}{back}</div>'


def _for_all(state: RunState, gate: Gate) -> list[dict[str, Any]]:
    """The button that answers this gate and all that ask the same and are open now."""
    alike = say.similar(state, gate)
    if len(alike) < 2 or gate.kind not in _FOR_ALL:
        return []
    action, label = _FOR_ALL[gate.kind]
    return [
        {
            "action": action,
            "text": label.format(len(alike)),
            "magic": " · ".join(f"%cm {action} {one.path}" for one in alike[:3]) + (" …" if len(alike) > 3 else ""),
            "more": {"similar": max(one.opened_at for one in alike)},
        }
    ]


def gate_records(state: RunState, steps: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """The open gates: of the run, or those that the steps wait for."""
    gates = html.gates_of(state, steps)[:BARS]
    return [gate_record(state, gate, beside=html.beside(gate, steps)) for gate in gates]


def body_record(state: RunState, path: str, attempt: int, tab: str) -> dict[str, Any]:
    """What a page asks for: an attempt's ``output, diff, files`` or ``prompt`` as HTML; or, to be edited, a text."""
    step = state.find(path)
    found = next((one for one in step.attempts if one.number == attempt), step.last)
    if tab == "edit-output" and step.gate is not None and step.gate.kind == "permission":
        return {"text": say.requested(step.gate)}
    if tab == "edit-output":
        waits = step.gate is not None and step.gate.kind == "start" and step.redo is not None
        return {"text": state.text(step.redo.prompt) if waits and step.redo else found.text if found else ""}
    if tab == "edit-prompt":
        return {"text": found.prompt if found is not None else ""}
    if tab == "diff" and found is not None:
        return {"html": html.changes_html(step, found)}
    if tab == "files" and found is not None:
        return {"html": html.files_html(step, found)}
    if tab == "prompt" and found is not None:
        return {"html": html.prompt_html(step, found)}
    return {"html": html.output_html(state, step, found)}


def log_html(run: Run, path: str) -> str:
    """What happened to a step, a line per event with the time of day."""
    state, lines = RunState(), []
    for event in run.events:
        apply(state, event)
        gate = getattr(event, "gate", None)
        about = getattr(event, "path", None) or (gate.path if gate is not None else None)
        if about is None and hasattr(event, "gate_id"):
            about = gate_path(event.gate_id)
        if about == path and (line := say.event_line(state, event) or _began(event)) is not None:
            lines.append(f"{time.strftime('%H:%M:%S', time.localtime(event.at))}  {line.removeprefix('cm: ')}")
    return html.plain_html("\n".join(lines))


def _began(event: Any) -> str | None:
    return f"attempt {event.attempt} started ({event.engine})" if isinstance(event, TurnStarted) else None


class Writing:
    """A text that is being written, as pages have it: formatted blocks, and the rest as plain text."""

    def __init__(self, attempt: int) -> None:
        self.attempt = attempt
        self.blocks: list[str] = []
        self.rest: list[str] = []
        self._stream: BlockStream | None = BlockStream()
        self._size = 0
        self._thoughts: list[str] = []

    def think(self, text: str) -> list[str]:
        """Take more of what is thought: a line that moves, folded away as soon as something is written."""
        closed = ""
        if not self._thoughts and self._stream is not None and any(self.rest):
            closed = self._close("".join(block.html for block in self._stream.finish()), "")[1]
        self._thoughts.append(clean(text))
        return ["block", closed, self._open()]

    def _open(self) -> str:
        thought = f"Thinking: {say.one_line(''.join(self._thoughts[-16:])[-160:])}" if self._thoughts else ""
        return "\n\n".join(filter(None, ("".join(self.rest), thought)))

    def add(self, text: str) -> list[str]:
        """Take more of it; what to tell the pages."""
        kind, *told = self._add(text)
        if not self._thoughts:
            return [kind, *told]
        folded, self._thoughts = html.thinking_html("".join(self._thoughts)), []
        self.blocks.insert(len(self.blocks) - (kind == "block"), folded)
        return ["block", folded + (told[0] if kind == "block" else ""), "".join(self.rest)]

    def _add(self, text: str) -> list[str]:
        self._size += len(text)
        if self._stream is not None and (len(text) > BURST or self._size > FORMATTED):
            return self._go_plain(text)
        made = self._stream.push(text) if self._stream is not None else []
        if made and self._stream is not None:
            return self._close("".join(block.html for block in made), self._stream.tail)
        self.rest.append(clean(text))
        told = ["delta", self.rest[-1]]
        if self._stream is None and (len(self.rest) > 64 or len(text) > BURST):
            self.rest = ["".join(self.rest)[-KEPT:]]
        return told

    def _go_plain(self, text: str) -> list[str]:
        """Format no more of it. A page keeps only the end of what is plain, so the beginning becomes a block."""
        opened = "".join(self.rest) + clean(text)
        self._stream = None
        return self._close(f'<div class="cm-piece">{escape(opened[:KEPT])}</div>', opened[KEPT:])

    def _close(self, block: str, rest: str) -> list[str]:
        self.blocks.append(block)
        self.rest = [rest]
        return ["block", block, rest]

    def whole(self) -> list[Any]:
        """All there is, for a page that begins."""
        return ["".join(self.blocks), self._open()]


# -- one place where a run is shown -----------------------------------------------------------------------------------


@functools.cache
def _widget_class() -> Any:
    import anywidget  # half a second: only where somebody looks
    import traitlets

    class RunWidget(anywidget.AnyWidget):
        _esm = (Path(__file__).parent / "view.js").read_text(encoding="utf-8")
        _css = (Path(__file__).parent / "view.css").read_text(encoding="utf-8") + svg.live_css(".cm-graph")
        place = traitlets.Unicode().tag(sync=True)
        page = traitlets.Dict().tag(sync=True)
        head = traitlets.Dict().tag(sync=True)
        graph = traitlets.Unicode().tag(sync=True)
        cards: Any = traitlets.List().tag(sync=True)
        gates: Any = traitlets.List().tag(sync=True)
        final = traitlets.Unicode().tag(sync=True)

    return RunWidget


class Display:
    """The run, or some of its steps, under one cell. Made there; then only the hub touches it."""

    def __init__(self, run: Run, steps: list[str] | None, mode: ViewMode, listen: Callable[[Display], None]) -> None:
        self.run, self.steps, self.mode, self._listen = run, steps, mode, listen
        self.place = uuid.uuid4().hex[:12]
        self.cell, self.execution = bridge.cell_id(), bridge.shell().execution_count
        self.widget: Any = None
        self.number = 0
        """Of the last message sent."""
        self.pages = set[str]()
        """Those that have said hello."""
        self.opened = set[tuple[str, str]]()
        """Pages, and the lanes that they have open."""
        self.lanes = dict[str, dict[str, Any]]()
        """As the pages have been told."""
        self.tails: Mapping[str, str] = {}
        """The ends of what is being written in lanes."""
        self._lines: list[str] = []
        self._gates: tuple[str, ...] = ()
        with run.reading() as state:
            self._over = self.over(state)
        if mode == "full" and not self._over:
            self._make_widget()
            self.main = bridge.Slot.open(*self._widget_bundle())
            self.spare: bridge.Slot | None = bridge.Slot.open(self._snapshot())
        else:
            self.main, self.spare = bridge.Slot.open(_static(run, steps)), None

    def over(self, state: RunState) -> bool:
        """Whether nothing more happens by itself to what is shown here."""
        if state.ended is not None:
            return True
        return self.steps is not None and all(_settled_for_good(state, id) for id in self.steps)

    @property
    def loading(self) -> bool:
        """Whether a page may just be making the widget."""
        return self.widget is not None and not self.pages and time.monotonic() < self._made_at + SETTLE_S

    def covers(self, path: str) -> bool:
        """Whether the text of what is there is shown here: of a step always, of a lane when it is open."""
        root, _, lane = path.partition("/")
        return (self.steps is None or root in self.steps) and (not lane or path in self._open_lanes)

    def has_line(self, path: str) -> bool:
        """Whether a line about what is there is shown here; ``""`` is the run."""
        return not path or path in self.lanes or self.covers(path)

    @property
    def _open_lanes(self) -> set[str]:
        return {path for _page, path in self.opened}

    def _make_widget(self) -> None:
        with self.run.reading() as state:
            traits = self._traits(state, time.time())
            page, lanes = self._page(state), self._lanes(state, time.time())
        self.widget = _widget_class()(place=self.place, page=page, **traits)
        self.pages, self.number, self._made_at = set(), 0, time.monotonic()
        self.opened, self.lanes = set(), lanes
        self._listen(self)  # before a page can say anything: what is said earlier would queue behind the next cell

    def _widget_bundle(self) -> tuple[dict[str, Any], dict[str, Any]]:
        made = self.widget._repr_mimebundle_()
        bundle, metadata = made if isinstance(made, tuple) else (made, {})
        # Seen where the widget is not: in a file that is not trusted, and in tools that read text. It is not renewed,
        # so it says nothing about the state; the snapshot below does.
        name = ", ".join([self.run.state.name, *(self.steps or ())])
        return {**bundle, "text/plain": f"{name}{SAVED_BELOW}"}, metadata

    def _snapshot(self) -> dict[str, str]:
        bundle = _static(self.run, self.steps)
        # The widget's style sheet hides what carries this mark.
        bundle["text/html"] = f'<div data-cm-static="{self.place}">\n{bundle["text/html"]}</div>\n'
        return bundle

    def _page(self, state: RunState) -> dict[str, Any]:
        return page_record(state, self.steps)

    def _lanes(self, state: RunState, now: float) -> dict[str, dict[str, Any]]:
        return lane_records(state, self.steps, now, opened=self._open_lanes, tails=self.tails)

    def _traits(self, state: RunState, now: float) -> dict[str, Any]:
        return {
            "head": head_record(state, self.steps, now),
            "graph": svg.graph(state, live=True) if self.steps is None and state.order else "",
            "cards": card_records(state, self.steps, now, self._open_lanes),
            "gates": gate_records(state, self.steps),
        }

    def refresh(self, state: RunState, lines: Sequence[str]) -> int:
        """Show the state as it is now; how many messages it took."""
        if self.mode == "log":
            self._lines = [*self._lines, *lines][-LOG_LINES:]
            self.main.update({"text/plain": "\n".join(self._lines) or say.run_text(state)})
            return 1
        over, was_over = self.over(state), self._over
        if over and self.loading:
            self._snap()
            return 1
        self._over = over
        if over and was_over:
            return 0
        if over:
            self._freeze()
        elif self.mode == "html":
            self.main.update(_static(self.run, self.steps))
        elif was_over:
            self._thaw()
        else:
            self._tell_lanes(self._lanes(state, time.time()))
            with self.widget.hold_sync():
                for name, value in self._traits(state, time.time()).items():
                    setattr(self.widget, name, value)
            if self._gates != tuple(state.gates):
                self._snap()
        return 1

    def _tell_lanes(self, lanes: dict[str, dict[str, Any]]) -> None:
        """Tell the pages the lanes that are others now, before the cards say where they stand."""
        changed = []
        for path, lane in lanes.items():
            told = self.lanes.get(path, {})
            if _still(lane) != _still(told):
                changed.append(lane)
            else:
                lane["tail"] = told["tail"]  # what came since is told by the next piece
        self.lanes = lanes
        if changed and self.pages:
            self.send("live", pieces=[["lane", lane["key"], lane] for lane in changed])

    def tail_pieces(self, paths: Iterable[str]) -> list[list[Any]]:
        """The last lines of those lanes that have another one now."""
        pieces = []
        for path in paths:
            lane = self.lanes.get(path)
            if (
                lane is not None
                and lane["writing"] > 0
                and (last := say.last_line(self.tails.get(path, ""), grows=True)) != lane["tail"]
            ):
                lane["tail"] = last
                pieces.append(["tail", path, last])
        return pieces

    def _snap(self) -> None:
        """Put a fresh snapshot into B."""
        self._gates = tuple(self.run.state.gates)
        if self.spare is not None:
            self.spare.update(self._snapshot())

    def _freeze(self) -> None:
        final = _static(self.run, self.steps)
        self.main.update(final)
        if self.spare is not None:
            self.spare.update({"text/plain": ""})
        if self.widget is not None and len(self.pages) > 1:
            # A page that was opened from the file does not know A's id: the widget itself shows it the saved view.
            self.widget.final = final["text/html"]
        else:
            self.close()

    def _thaw(self) -> None:
        if self.widget is None:
            self._make_widget()
        else:
            self.widget.final = ""
        self.main.update(*self._widget_bundle())
        self._snap()

    def retire(self, words: str) -> None:
        """It is shown somewhere else: say so here."""
        self.main.update(_line(words) if words else {"text/plain": ""})
        if self.spare is not None:
            self.spare.update({"text/plain": ""})
        self.close()

    def close(self) -> None:
        """No page hears of it any more."""
        if self.widget is not None:
            bridge.direct_clicks.unregister(self.widget.comm.comm_id)
            self.widget.close()
            self.widget = None

    def send(self, kind: str, **content: Any) -> None:
        """Tell the pages that show this; numbered, so that they notice when one is missing."""
        if self.widget is not None:
            self.number += 1
            self.widget.send({"kind": kind, "number": self.number, **content})


def _still(lane: Mapping[str, Any]) -> dict[str, Any]:
    """What a lane says beside its seconds and what it writes: both have pieces of their own."""
    moving = ("summary", "tail") if lane.get("writing", 0) > 0 else ()
    return {name: value for name, value in lane.items() if name not in moving}


def _moves(state: RunState, step: StepState) -> bool:
    """Whether its seconds count."""
    return state.ended is None and step.status in ("running", "calling")  # a page counts down by itself


def _settled_for_good(state: RunState, id: str) -> bool:
    step = state.steps.get(id)
    if step is None:
        return True  # removed
    loop = state.loop_of(step)
    return step.settled and (loop is None or state.steps[loop.id].settled)


# -- one hub for each run ---------------------------------------------------------------------------------------------


class Hub:
    """Takes what happens in a run and tells it to all places where the run is shown."""

    def __init__(self, run: Run) -> None:
        self.run, self.displays = run, list[Display]()
        self._feed: Feed | None = None
        self._writings: dict[str, Writing] = {}
        self._tails: dict[str, str] = {}
        self._grown = set[str]()
        self._thinking = set[str]()
        self._tails_at = 0.0
        self._lock = threading.Lock()
        self._timer: Any = None
        self._next_at = 0.0
        self._drawn_at = self._counted_at = 0.0
        self._dirty = False
        self._ended: str | None = None
        self._quiet = True
        self._lines: list[str] = []

    @property
    def loop(self) -> Any:
        """The run's loop, on which everything here happens that is not called from a cell."""
        return self.run._driver.loop

    # -- from a cell

    def add(self, display: Display) -> None:
        """Keep `display` right from now on."""
        display.tails = self._tails
        with self._lock:
            self.displays.append(display)
        self._call(self._begin, display)

    def follow(self, run: Run) -> None:
        """The same run goes on as another object (it was resumed)."""
        if self._feed is not None:
            self.run.unwatch(self._feed)
        self.run, self._feed = run, None
        for display in self.displays:
            display.run = run
        self._call(self._begin)

    def makes_room(self, steps: list[str] | None, mode: ViewMode | None) -> bool:
        """Whether such a display is to be added to the present cell; without a `mode`, any that it has will do.

        What it makes invalid is ended: the cell's own earlier output, and cards that move here.
        """
        cell, execution = bridge.cell_id(), bridge.shell().execution_count
        with self._lock:
            for display in list(self.displays):
                same_cell, now = cell is not None and display.cell == cell, display.execution == execution
                if now and display.steps == steps and mode in (None, display.mode):
                    return False
                # On the loop: a message that is being sent must not meet a widget that is being closed.
                if same_cell and not now:
                    self._call(display.close)
                elif now and display.steps == steps:
                    self._call(display.retire, "")
                elif steps is not None and display.steps is not None and set(display.steps) <= set(steps):
                    self._call(display.retire, f"{', '.join(display.steps)}: shown further below")
                else:
                    continue
                self.displays.remove(display)
        return True

    # -- on the run's loop

    def _call(self, function: Any, *args: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: the kernel shuts down
            self.loop.call_soon_threadsafe(function, *args)

    def _begin(self, added: Display | None = None) -> None:
        """Watch the run; a page that said hello before we did, or before its display was ours, begins again."""
        begun = [added] if added is not None else []
        if self._feed is None:
            with self._lock:
                begun = list(self.displays)
            with self.run.reading() as state:  # nobody writes meanwhile: no text is lost and none comes twice
                self._feed = self.run.watch(lambda: self._call(self._soon))
                self._writings = {}
                for path, step in state.running.items():
                    if step.caller:
                        self._tails[path] = self.run.draft(path)[-TAIL:]
                        self._grown.add(path)
                    if self._covered(path):
                        self._write(path, step.attempt)
        for display in begun:
            for page in display.pages:
                self._tell_all(display, page)
        self._dirty = True
        self._soon()

    def _covered(self, path: str) -> bool:
        with self._lock:
            return any(display.covers(path) for display in self.displays)

    def _write(self, path: str, attempt: int) -> Writing:
        """What has been written there so far, to be told from now on."""
        made = self._writings[path] = Writing(attempt)
        made.add(self.run.draft(path))
        return made

    def _soon(self) -> None:
        """Look what there is, at once or when the last message is long enough ago."""
        if self._timer is not None and self._quiet:
            self._timer.cancel()
            self._timer = None
        if self._timer is None:
            self._quiet = False
            self._timer = self.loop.call_later(max(0.0, self._next_at - time.monotonic()), self._tick)

    def _tick(self) -> None:
        self._timer = None
        now = time.monotonic()
        pieces, last = self._take()
        if self._ended != (ended := self.run.state.ended):  # also without an event: when the run is given up
            self._ended, self._dirty = ended, True
        with self._lock:
            displays = list(self.displays)
        grown: set[str] = set()
        if now - self._tails_at >= TAIL_S:
            grown, self._grown, self._tails_at = self._grown, set(), now
        sent = 0
        for display in displays:
            told = [piece for piece in pieces if display.covers(piece[1])] + display.tail_pieces(grown)
            if told and display.pages:
                display.send("live", pieces=told)
                sent = 1
        # Drawing costs in proportion to the number of steps, so long runs are drawn less often.
        state = self.run.state
        rest = self._drawn_at + 0.0005 * (len(state.order) + len(state.members)) - now
        if self._dirty and rest <= 0:
            self._dirty = False
            sent += self._draw(displays)
            self._drawn_at = time.monotonic()
        self._next_at = now + TICK_S * max(1, sent)
        if any(display.loading for display in displays) and self.run.state.ended is not None:
            self.loop.call_later(SETTLE_S, self._begin)
        if self._dirty:
            self._timer = self.loop.call_later(max(rest, TICK_S), self._tick)
        elif self._grown:
            self._quiet = True  # what happens meanwhile does not wait for it
            self._timer = self.loop.call_later(max(self._tails_at + TAIL_S - now, TICK_S), self._tick)
        elif last or self.run.state.running:
            if now - self._counted_at > CLOCK_S:
                self._count()
            self._quiet = True
            self._timer = self.loop.call_later(CLOCK_S, self._clock)

    def _take(self) -> tuple[list[list[Any]], bool]:
        """What to tell about texts, and whether there was anything at all."""
        things = self._feed.take() if self._feed is not None else []
        pieces: list[list[Any]] = []
        for thing in things:
            if isinstance(thing, LiveText):
                if thing.path in self._tails:
                    self._grow(thing)
                writing = self._writings.get(thing.path)
                if writing is None or writing.attempt != thing.attempt:
                    continue
                kind, *texts = (writing.add if thing.kind == "text" else writing.think)(thing.text)
                pieces.append([kind, thing.path, *texts])
                continue
            self._dirty = True
            if isinstance(thing, TurnStarted):
                if "/" in thing.path:
                    self._tails[thing.path] = ""
                    self._thinking.discard(thing.path)
                if self._covered(thing.path):
                    self._writings[thing.path] = Writing(thing.attempt)
                    pieces.append(["start", thing.path])
            with self.run.reading() as state:
                if any(display.mode == "log" for display in self.displays):
                    self._lines += filter(None, [say.event_line(state, thing)])
        return pieces, bool(things)

    def _grow(self, live: LiveText) -> None:
        """Keep the end of what is written in a lane, or thought."""
        thinks, thought = live.kind != "text", live.path in self._thinking
        begin = "" if thinks == thought else "\nThinking: " if thinks else "\n"
        (self._thinking.add if thinks else self._thinking.discard)(live.path)
        self._tails[live.path] = (self._tails[live.path] + begin + live.text)[-TAIL:]
        self._grown.add(live.path)

    def _draw(self, displays: Sequence[Display]) -> int:
        lines, self._lines = self._lines, []
        sent = 0
        with self.run.reading() as state:
            for path in [path for path in self._writings if path not in state.running]:
                del self._writings[path]
            for path in [path for path in self._tails if path not in state.running]:
                del self._tails[path]
            for display in displays:
                sent = max(sent, display.refresh(state, lines))
        return sent

    def _clock(self) -> None:
        self._timer = None
        if self._count():
            self._timer = self.loop.call_later(CLOCK_S, self._clock)

    def _count(self) -> bool:
        """Count the seconds on; and say the last number again, so that a page notices if a message was lost."""
        self._counted_at, now = time.monotonic(), time.time()
        with self.run.reading() as state:
            steps: list[StepState | None] = [*state.running.values()] or [state.current]
            moving = [step for step in steps if step is not None and _moves(state, step)]
            lines: list[list[Any]] = [
                ["line", step.path, html.summary(state, step, now)]
                for step in moving
                if not step.caller or any(step.path in display.lanes for display in self.displays)
            ]
            lines.append(["words", "", html.faint(*say.run_total(state, now).words())])
            lines.append(["said", "", _said(state, now)])
        with self._lock:
            displays = list(self.displays)
        for display in displays:
            if display.widget is None or not display.pages:
                continue
            if moving:
                display.send("live", pieces=[line for line in lines if display.has_line(line[1])])
            else:
                display.widget.send({"kind": "mark", "number": display.number})
        return bool(moving)

    # -- what pages say

    def listen(self, display: Display) -> None:
        """Hear what the pages of its widget say, also while a cell computes."""
        widget = display.widget

        def heard(content: dict[str, Any]) -> None:
            self._call(self._answer, display, widget, content)

        widget.on_msg(lambda _widget, content, _buffers: heard(content))
        if bridge.direct_clicks.installed:
            bridge.direct_clicks.register(widget.comm.comm_id, heard)

    def _answer(self, display: Display, widget: Any, content: Mapping[str, Any]) -> None:
        if display.widget is not widget or not isinstance(content, dict):
            return  # it has been closed meanwhile
        page = str(content.get("page", ""))
        try:
            if "hello" in content:
                self._hello(display, page)
            elif "want" in content:
                self._want(display, page, content)
            elif "see" in content:
                self._see(display, page, str(content["see"]), bool(content.get("on")))
            elif "decide" in content:
                self._decide(content)
            elif "do" in content and (said := self._do(content)):
                display.send("said", page=page, gate="", text=said)
        except CodeMachineError as error:
            words = html.opened(self.run.state, str(error))
            display.send("said", page=page, gate=content.get("decide", ""), text=words)

    def _hello(self, display: Display, page: str) -> None:
        if not display.pages:
            self._dirty = True  # what is over may be frozen now
            self._soon()
        display.pages.add(page)
        display.opened = {one for one in display.opened if one[0] != page}  # it says again what it has open
        self._tell_all(display, page)

    def _tell_all(self, display: Display, page: str) -> None:
        texts = {path: writing.whole() for path, writing in self._writings.items() if display.covers(path)}
        if display.widget is not None:
            display.widget.send_state(["head", "graph", "cards", "gates", "final"])
            told = {"texts": texts, "lanes": list(display.lanes.values()), "now": time.time()}
            display.widget.send({"kind": "all", "page": page, "number": display.number, **told})

    def _see(self, display: Display, page: str, path: str, on: bool) -> None:
        """A page has opened a lane, or closed it: what is written there is told only while it is open."""
        if not on:
            display.opened.discard((page, path))
            if not self._covered(path):
                self._writings.pop(path, None)
            return
        with self.run.reading() as state:  # nobody writes meanwhile: no text is lost and none comes twice
            if path not in state.members:
                return
            pieces, _any = self._take()
            display.opened.add((page, path))
            step = state.running.get(path)
            if step is not None and path not in self._writings:
                self._write(path, step.attempt)
        for other in self.displays:
            told = [piece for piece in pieces if other.covers(piece[1])]
            if other is display and path in self._writings:
                told = [piece for piece in told if piece[1] != path]
                told += [["start", path], ["block", path, *self._writings[path].whole()]]
            if told and other.pages:
                other.send("live", pieces=told)
        self._dirty = self._dirty or path not in display.lanes
        self._soon()

    def _want(self, display: Display, page: str, content: Mapping[str, Any]) -> None:
        path, attempt, tab = str(content["want"]), int(content.get("attempt") or 0), str(content.get("tab"))
        if tab == "log":
            # The journal is read for it, which takes long for long runs.
            job = self.loop.run_in_executor(None, log_html, self.run, path)
            job.add_done_callback(lambda done: self._send_body(display, page, content, {"html": done.result()}))
            return
        with self.run.reading() as state:
            if tab == "group":
                body = {"html": html.group_html(state, [id for id in content.get("steps", ()) if id in state.steps])}
            elif tab == "rest":
                body = {"html": html.group_html(state, self._rest(state.find(path), display.lanes))}
            else:
                body = body_record(state, path, attempt, tab)
        self._send_body(display, page, content, body)

    def _rest(self, step: StepState, shown: Container[str]) -> list[str]:
        """Those of its team that have no lane."""
        return [member.path for member in step.members if member.path not in shown][:200]

    def _send_body(self, display: Display, page: str, content: Mapping[str, Any], body: dict[str, Any]) -> None:
        display.send("body", page=page, ticket=content.get("ticket"), **body)

    def _decide(self, content: Mapping[str, Any]) -> None:
        names = ("feedback", "output", "prompt", "count", "scope")
        given = {name: content[name] for name in names if content.get(name) is not None}
        decision = Decision(action=content.get("action", ""), **given)
        id = str(content["decide"])
        with self.run.reading() as state:
            gate, upto = state.gates.get(id), content.get("similar")
            alike = say.similar(state, gate) if gate is not None and upto is not None else []
        self.run.decide(id, decision, digest=str(content.get("digest", "")))
        for other in alike:
            if other.id != id and other.opened_at <= float(upto or 0):  # a later one was not on the button
                with contextlib.suppress(AlreadyDecided):
                    self.run.decide(other.id, decision.model_copy(), digest=other.digest)

    def _do(self, content: Mapping[str, Any]) -> str:
        """Do what a button says; returns what is to be said of it, where the view does not show it by itself."""
        what = content["do"]
        if what == "stop":
            self.run.stop()
        elif what == "pause":
            self.run.pause()
        elif what == "unpause":
            self.run.unpause()
        elif what == "mode":
            self.run.set_mode(content.get("mode", ""))
        elif what == "rerun":
            self.run.rerun(str(content.get("step")), later=True)
        elif what == "rewind":
            self.run.rewind(str(content.get("step")))
        elif what == "fork":
            fork = self.run.fork(str(content.get("step")))
            with fork.reading() as state:
                return f"Run {fork.id} is a {say.fork_words(state)}. `%cm show` shows it, `%cm run` goes on with it."
        return ""


_hubs: weakref.WeakValueDictionary[str, Hub] = weakref.WeakValueDictionary()
"""By the run's id. A hub lives as long as its run, whose feed knows it, or a widget, whose handler does."""


def _hub(run: Run) -> Hub:
    hub = _hubs.get(run.id)
    if hub is None:
        hub = _hubs[run.id] = Hub(run)
    elif hub.run is not run:
        hub.follow(run)
    return hub
