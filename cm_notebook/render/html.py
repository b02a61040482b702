"""The run as HTML: the pieces that the live view and the saved one share, and the saved one itself.

Strategy: small functions from the state to a string, put together by ``run_html``. A step becomes a *card* (``details``
with one summary line), an open gate a *bar*, the run a *header*. The live view shows the same pieces and only adds what
moves, so the two cannot drift apart and nothing jumps when a run ends.

The saved HTML must look right where nobody trusts it: inline ``style=`` in the forms JupyterLab's sanitizer keeps, no
style sheet, script or class of ours; the graph is an ``<img>``. It does not know the theme: text takes the page's
colour, backgrounds are translucent, and the colours of states are borders and marks that reach 3 : 1 on white and on
#111. A state is always a word too. One element a line, so that a diff of a notebook is readable. Nor may the words turn
into formulas there, as those between two prices would (``page``).

Texts of agents pass through ``markdown.to_html`` or ``_esc``, nothing else. A step shows ``STEP_LIMIT`` bytes of text,
a run ``RUN_LIMIT`` bytes of HTML; what is left out is said, with the command that shows it.
"""

from __future__ import annotations

import functools
import html
import re
from collections.abc import Container, Iterable, Sequence
from typing import NamedTuple

from ..errors import TransitionError
from ..events import NOT_CALLED, Gate
from ..runstate import Attempt, RunState, StepState
from ..workflow import Separator
from . import diff, svg
from . import text as say
from .markdown import clean, clip, to_html
from .text import Look, Tone, look, one_line

STEP_LIMIT = 64_000
"""Bytes of text shown of one step."""
RUN_LIMIT = 1_000_000
"""Bytes of HTML of one run."""
PROMPT_LIMIT = 16_000
OLD_LIMIT = 16_000
"""Bytes shown of a prompt, and of an attempt that is not the last one."""
ATTEMPTS_SHOWN = 8
"""Earlier attempts shown of one step."""
FOLD = 3
"""From this many on, finished steps in a row become one line; so do steps that have not begun."""
STORIES = 12
"""Up to this many steps, a finished one that has a story, of several attempts or of being skipped, is not folded."""

COLOURS: dict[Tone, str] = {
    "done": "#1a7f37",
    "waiting": "#9a6700",
    "running": "#0969da",
    "failed": "#cf222e",
    "pending": "#6e7781",
    "skipped": "#6e7781",
}
"""Borders and marks: 3 : 1 on white and on #111. White text on them reaches 4.5 : 1."""
RULE = "#8c8c8c"

FRAME = f"border:1px solid {RULE};border-radius:8px;padding:10px 14px;margin:4px 0;font-size:13px;line-height:1.5"
BAR = f"border-top:1px solid {RULE};margin:10px 0 0;padding:8px 0 0"
"""Of what waits for a decision."""
FAINT = "opacity:0.78"
"""Of words about a run or a step; nothing that an agent wrote stands by itself in it."""
_FAINT = FAINT
_SMALL = f"font-size:12px;{_FAINT}"
_CODE = "font-family:monospace;font-size:12px;background:rgba(128,128,128,0.14);padding:0 3px"
_PRE = (
    "margin:4px 0 8px;padding:6px 8px;background:rgba(128,128,128,0.12);font-family:monospace;font-size:12px;"
    "white-space:pre-wrap;overflow-wrap:break-word"
)
_CELL = f"border:1px solid {RULE};padding:2px 9px"


_WORDS = '<div class="mathjax_ignore tex2jax_ignore"'
"""What MathJax leaves as it is: that of JupyterLab, and that of nbconvert and nbviewer. It knows no other sign."""
FRAMED = f'{_WORDS} style="{FRAME}">\n'
"""The first line of what stands in a frame."""


# -- the smallest pieces ----------------------------------------------------------------------------------------------


def _esc(text: str) -> str:
    return html.escape(clean(text))


def inline(text: str) -> str:
    """A sentence as HTML: escaped, with what stands in backticks as code."""
    return re.sub(r"`([^`]{1,80})`", rf'<code style="{_CODE}">\1</code>', _esc(text))


def pill(seen: Look) -> str:
    """A state: its word in a mark of its colour; filled when it wants attention."""
    colour = COLOURS[seen.tone]
    filled = f";background:{colour};color:#fff" if wants_attention(seen) else ""
    style = f"border:1px solid {colour};border-radius:10px;padding:0 8px;font-size:12px;white-space:nowrap{filled}"
    return f'<span style="{style}">{_esc(seen.word)}</span>'


def faint(*words: str) -> str:
    """Less important words, a dot between them."""
    said = " · ".join(filter(None, words))
    return f'<span style="{_FAINT}">{inline(said)}</span>' if said else ""


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def opened(state: RunState, words: str) -> str:
    """The sentence with a capital letter, unless it begins with a step's id or with code."""
    first = re.match(r"[a-z]+(?=[ ,])", words)
    return _capital(words) if first and first[0] not in state.steps else words


def _line(text: str, style: str = _SMALL) -> str:
    return f'<div style="{style};margin:2px 0">{inline(text)}</div>\n'


def _fold(summary: str, body: str, *, open: bool = False) -> str:
    """Something behind a click; `summary` is plain text."""
    return (
        f'<details{" open" if open else ""} style="margin:4px 0">\n'
        f'<summary style="cursor:pointer;{_SMALL}">{inline(summary)}</summary>\n{body}</details>\n'
    )


def _shown(text: str, limit: int, more: str, *, plain: bool = False) -> str:
    """A text of an agent, at most `limit` bytes of it; `more` is the command that shows all."""
    cut = clip(text, limit)
    made = [_pre(cut.head) if plain else _markdown(cut.head)]
    if cut.tail:
        made += [
            _line(say.left_out(cut, more), f"border-left:3px solid {RULE};padding:0 0 0 8px"),
            _pre(cut.tail) if plain else _markdown(cut.tail),
        ]
    return "".join(made)


@functools.lru_cache(maxsize=128)
def _markdown(text: str) -> str:
    """`text` rendered; kept, because a run is shown again at each gate and 20 kB take 200 ms."""
    return to_html(text)


def _pre(text: str) -> str:
    return f'<pre style="{_PRE}">\n{_esc(text)}</pre>\n'  # a browser drops the first newline


def page(inner: str, *, framed: bool = True) -> str:
    """All that stands under a cell; JupyterLab would set what is between two ``$``, as in two prices, as a formula."""
    head = FRAMED if framed else f"{_WORDS}>\n"
    return f"{head}{inner}</div>\n"


# -- a step -----------------------------------------------------------------------------------------------------------


def card(
    state: RunState,
    step: StepState,
    *,
    open: bool | None = None,
    now: float | None = None,
    limit: int = STEP_LIMIT,
    full: bool = False,
) -> str:
    """One step as HTML: a line that opens to its attempts, output, changes and prompt.

    Parameters
    ----------
    open
        ``None``: open when it runs, waits or failed.
    now
        Unix seconds, for the time of an attempt that runs.
    limit
        Bytes of text to show.
    full
        Show everything, whatever its size.
    """
    seen = look(state, step)
    body = _body(state, step, 1 << 40 if full else limit)
    if step.attempts:
        body += _members(state, step, 1 << 40 if full else limit)
    is_open = bool(body) and (wants_attention(seen) if open is None else open)
    line = _summary(state, step, seen, now, open=is_open)
    dash = "dashed" if step.stale else "solid"
    style = f"border-left:3px {dash} {COLOURS[seen.tone]};padding:1px 0 1px 10px;margin:6px 0"
    if not body:
        return f'<div style="{style}">{line}</div>\n'
    return (
        f'<details{" open" if is_open else ""} style="{style}">\n'
        f'<summary style="cursor:pointer">{line}</summary>\n'
        f'<div style="margin:6px 0 4px">\n{body}</div>\n</details>\n'
    )


def wants_attention(seen: Look) -> bool:
    """Whether a step of that look should be open."""
    return seen.tone in ("running", "waiting", "failed")


def _summary(state: RunState, step: StepState, seen: Look, now: float | None, *, open: bool) -> str:
    """The line of a card; what became of its attempts is on it unless it is open and shows them itself."""
    words = [say.team_words(step)] if step.status in ("calling", "failed", "due", "waiting") else []
    words += say.taken(state, step, now).words()
    if len(step.attempts) > 1:
        words.append(f"{len(step.attempts)} attempts")
    if step.iteration > 1:
        words.append(f"pass {step.iteration}")
    if step.status == "retrying" and state.ended is None:
        words.append(say.retry_words(state, step, now))
    words += [say.waits_for(state, step), say.note(step), "" if open else say.beside(step)]
    told = one_line(say.story(state, step), 400) if step.settled and not open else ""
    line = ""
    if loop := say.loop_words(step):
        line = _chips(loop)
    elif told and len(step.attempts) > 1:
        line = f'\n<span style="display:block;{_SMALL}">{inline(_capital(told))}</span>'
    else:
        words.append(told)
    return f"<b>{_esc(say.lane_name(step))}</b> {pill(seen)} {faint(*words)}{line}"


def _members(state: RunState, step: StepState, limit: int) -> str:
    """The lanes of the agents that a step called."""
    chosen, rest = say.shown_members(state, step)
    share = max(limit // 4 // max(1, len(chosen)), 400) if limit < 1 << 40 else limit
    made = _lanes(state, step, {member.path for _depth, member in chosen}, share)
    return made + (_line(f"{rest}.") if rest else "")


def _lanes(state: RunState, step: StepState, shown: Container[str], limit: int) -> str:
    columns, parts = say.lanes(state, step, shown)
    return "".join(
        _line(part) if isinstance(part, str) else _lane(state, part, shown, limit, columns) for part in parts
    )


_BESIDE = {2: ("44%", "300px"), 3: ("28%", "185px")}
"""By the number of columns: how wide a lane is at least, and its words; what opens in it may take the whole row."""


def _lane(state: RunState, member: StepState, shown: Container[str], limit: int, columns: int) -> str:
    """A member: who it is and how it stands, its last line, and all of it behind a click."""
    seen = look(state, member)
    style = f"border:1px solid {RULE};border-left:3px solid {COLOURS[seen.tone]};border-radius:6px;padding:3px 10px"
    width, words_width = _BESIDE.get(columns, ("", ""))
    if width:
        style += f";display:inline-block;vertical-align:top;min-width:{width};max-width:100%;margin:4px 6px 4px 0"
    else:
        style += ";margin:4px 0"
    last = say.last_words(member)
    line = _summary(state, member, seen, None, open=False)
    line += f'\n<span style="display:block;{_SMALL}">{_esc(last)}</span>' if last else ""
    if width:
        line = f'<span style="display:inline-block;vertical-align:top;width:{words_width}">{line}</span>'
    body = _body(state, member, limit)
    inner = _lanes(state, member, shown, limit)
    if body:
        line = (
            f'<details>\n<summary style="cursor:pointer">{line}</summary>\n'
            f'<div style="margin:6px 0 4px">\n{body}</div>\n</details>'
        )
    return f'<div style="{style}">\n{line}\n{inner}</div>\n'


_CHIP_TONES: dict[str, Tone] = {"continue": "done", "running": "running", "failed": "failed", "error": "failed"}


def _chips(loop: str) -> str:
    """A module's passes (``1 loop 0.52 · 2 running (max 5)``), each in a mark of its colour."""
    passes, _, limit = loop.rpartition(" (")
    chips = []
    for words in passes.split(" · "):
        colour = COLOURS[_CHIP_TONES.get(words.split(" ")[1] if " " in words else "", "waiting")]
        style = f"border:1px solid {colour};border-radius:10px;padding:0 7px;margin:0 4px 0 0;white-space:nowrap"
        chips.append(f'<span style="{style}">{_esc(words)}</span>')
    return (
        f'\n<span style="display:block;font-size:12px;margin:3px 0 0">{"".join(chips)}{_esc(limit.rstrip(")"))}</span>'
    )


def _body(state: RunState, step: StepState, limit: int) -> str:
    parts = []
    if step.stale:
        again = f" Run from here: `%cm run --from {step.id}`" if step.gate is None else ""
        parts.append(_line(f"Stale: {say.stale_words(state, step)}.{again}"))
    parts += _earlier(state, step, limit)
    if step.last is not None:
        parts += _last(state, step, step.last, limit)
    else:
        parts += _asked(state, step)
    return "".join(parts)


def _asked(state: RunState, step: StepState) -> list[str]:
    """Questions and answers of a step, and the question or the prompt that waits for a decision."""
    parts = [
        _line(f"Asked: {say.quoted(asked, 400)} Answered: {say.quoted(given, 400)}") for asked, given in step.answers
    ]
    if step.gate is not None and step.gate.kind == "question":
        parts.append(_quote(_markdown(str(step.gate.payload.get("question", ""))[:8000]), "waiting"))
    if step.gate is not None and step.gate.kind == "permission":
        parts.append(_line(f"It wants to call `{one_line(step.gate.payload.get('tool', ''), 70)}` with:"))
        parts.append(_shown(say.requested(step.gate), PROMPT_LIMIT, f"%cm show {step.path} --full", plain=True))
    if step.gate is not None and step.gate.kind == "start" and step.redo is not None:
        parts.append(_line("The prompt that would be sent:"))
        parts.append(_shown(state.text(step.redo.prompt), PROMPT_LIMIT, f"%cm show {step.path} --full", plain=True))
    return parts


def _earlier(state: RunState, step: StepState, limit: int) -> list[str]:
    """The attempts before the last, each on a line that opens: how it ended is the summary."""
    before = step.attempts[:-1]
    parts = []
    if len(before) > ATTEMPTS_SHOWN:
        hidden = len(before) - ATTEMPTS_SHOWN
        parts.append(_line(f"{hidden} earlier attempts are not shown: `%cm show {step.path} --attempt 1`"))
    each = min(OLD_LIMIT, max(limit // 4 // ATTEMPTS_SHOWN, 400)) if limit < STEP_LIMIT else OLD_LIMIT
    for attempt in before[-ATTEMPTS_SHOWN:]:
        more = say.show_command(step, attempt)
        ended = say.outcome(state, step, attempt)
        body = _shown(attempt.text, each, more) if attempt.text else ""
        body = body + _errors(step, attempt) or _line("It gave no output.")
        body += "".join(map(_line, filter(None, (say.files_words(attempt), *say.files_notes(step, attempt)))))
        parts.append(_fold(f"Attempt {attempt.number}{': ' + ended if ended else ''}", body))
    return parts


def _last(state: RunState, step: StepState, attempt: Attempt, limit: int) -> list[str]:
    """The attempt that counts: its output, how it ended, what changed, and its prompt."""
    parts = []
    several = len(step.attempts) > 1
    if several:
        parts.append(_line(f"Attempt {attempt.number}{', edited' if attempt.edited else ''}:"))
    parts += _result(state, step, attempt, limit)
    parts += _asked(state, step)
    previous = next((other for other in reversed(step.attempts[:-1]) if other.text), None)
    if previous is not None and attempt.text:
        changed = _bounded_diff(step, previous, attempt, limit)
        parts.append(_fold(f"What changed since attempt {previous.number}", changed))
    if called := say.tool_words(attempt):
        lines = "\n".join(say.tool_lines(attempt))
        parts.append(
            _fold(
                _capital(called), _shown(lines, min(PROMPT_LIMIT, limit), say.show_command(step, attempt), plain=True)
            )
        )
    if attempt.files_total:
        parts.append(_fold(say.files_words(attempt), _files(step, attempt, min(OLD_LIMIT, limit))))
    if prompt := attempt.prompt:
        shown = _shown(prompt, min(PROMPT_LIMIT, limit), f"%cm show {step.path} --full", plain=True)
        engine = f" sent to {attempt.engine}" if attempt.engine not in ("", "offline") else ""
        parts.append(_fold(f"Prompt{engine}", shown))
    return parts


def _result(state: RunState, step: StepState, attempt: Attempt, limit: int) -> list[str]:
    """What an attempt gave, what is to be said about it, and how it ended."""
    parts = []
    if attempt.text:
        parts.append(_shown(attempt.text, limit, say.show_command(step, attempt)))
    elif attempt is step.last and step.status == "running":
        parts.append(_line("It is at work; nothing to show yet."))
    elif attempt.answer is not None:
        parts.append(_line("It finished without output."))
    if attempt.note and attempt.note != NOT_CALLED:  # its text begins with that
        parts.append(_quote(_line(_capital(one_line(attempt.note, 300)), ""), "waiting"))
    parts.append(_errors(step, attempt))
    parts += map(_line, say.files_notes(step, attempt))
    ended = say.outcome(state, step, attempt)
    if attempt.verdict is not None and one_line(attempt.verdict.reason) == one_line(attempt.text):
        ended = ended.replace(f": {say.quoted(attempt.verdict.reason)}", "", 1)  # a function's text is its reason
    if ended and not (attempt.error is not None and attempt.decision is None and attempt.answer is None):
        parts.append(_line(_capital(ended) + ("" if ended[-1] in ".”" else ".")))
    return parts


def _files(step: StepState, attempt: Attempt, limit: int) -> str:
    """The files that an attempt changed, and their diff."""
    made = _pre("\n".join(say.file_lines(attempt)))
    cut = clip(attempt.diff, limit)
    if cut.head:
        made += diff.patch(cut.head)
    if cut.tail:
        more = f'`run["{step.path}"].attempt({attempt.number}).diff`'
        made += _line(f"The rest is not shown here: {more}")
    return made


def _bounded_diff(step: StepState, old: Attempt, new: Attempt, limit: int) -> str:
    if len(old.text) + len(new.text) > 2 * limit:
        return _line(f"Too long to show here: `%cm diff {step.id} {old.number} {new.number}`")
    return diff.between(old.text, new.text)


def _quote(inner: str, tone: Tone) -> str:
    return f'<div style="border-left:3px solid {COLOURS[tone]};padding:2px 0 2px 8px;margin:4px 0">\n{inner}</div>\n'


def _errors(step: StepState, attempt: Attempt) -> str:
    """What went wrong, the newest last; more to read is folded."""
    parts = []
    whole = attempt is step.last and step.gate is not None and step.gate.kind == "failed"  # the card has the mark
    for error in attempt.errors[-5:]:
        inner = f"<div><b>{_esc(one_line(error.kind, 60))}</b>: {_esc(one_line(error.message, 600))}</div>\n"
        if error.detail:
            name = "Traceback" if error.detail.startswith("Traceback") else "Details"
            inner += _fold(name, _shown(error.detail, 8_000, say.show_command(step, attempt), plain=True))
        parts.append(inner if whole else _quote(inner, "failed"))
    return "".join(parts)


# -- a gate -----------------------------------------------------------------------------------------------------------


def gate_bar(state: RunState, gate: Gate, *, beside: bool = False, again: bool = True) -> str:
    """What the run waits for, and how to answer, where there are no buttons.

    Parameters
    ----------
    beside
        Whether the card of its step stands above.
    again
        Whether running the cell again brings the buttons back: not in the answer of ``%cm show``.
    """
    lead = "Run this cell again to decide, or:" if again else "To decide:"
    said = "\n".join(map(_way, say.ways(state, gate)))
    return (
        f'<div style="{BAR}">\n'
        f"<div>{sentence_html(state, gate, beside=beside)}</div>\n"
        f'<div style="font-size:12px;margin:4px 0 0">{lead}\n{said}</div>\n'
        "</div>\n"
    )


def sentence_html(state: RunState, gate: Gate, *, beside: bool = False) -> str:
    """The gate's sentence, its step in bold; without what the card `beside` it shows: the error, or the question.

    Of a tool's call all is shown, here or beside: nobody allows what cannot be read.
    """
    asked = gate.kind == "permission" and not beside
    said = say.gate_sentence(state, gate, beside=beside or asked)
    rest = said.removeprefix(gate.step)
    made = f"<b>{_esc(gate.step)}</b>{inline(rest)}" if rest != said else inline(said)
    more = f"%cm show {gate.path} --full"
    return made + ("\n" + _shown(say.requested(gate), PROMPT_LIMIT, more, plain=True) if asked else "")


def _way(way: say.Way) -> str:
    plain = way.label.rstrip("…").lower() == way.action
    label = "" if plain else f"{_esc(way.label.rstrip('…'))} "
    magic = f'<code style="{_CODE};white-space:nowrap">{_esc(way.magic)}</code>'
    return f'<span style="white-space:nowrap;margin:0 8px 0 0">{label}{magic}</span>'


# -- a run ------------------------------------------------------------------------------------------------------------


def header_words(state: RunState, now: float | None = None) -> str:
    """What it took, its mode and id: the part of the header that changes while it runs."""
    mode = f"mode: {state.mode}" + (" (locked)" if state.locked is not None else "")
    run = "" if state.recorded is not None or not state.run_id else f"run `{one_line(state.run_id, 60)}`"
    return faint(*say.run_total(state, now).words(), mode, run)


def header(state: RunState, now: float | None = None) -> str:
    """Name and state of the run, what it took, and where its answers came from."""
    name = _esc(one_line(state.name, 80))
    made = (
        f'<div style="margin:0 0 6px"><b style="font-size:15px">{name}</b> {pill(say.run_look(state))} '
        f"{header_words(state, now)}</div>\n"
    )
    said = origin_words(state)
    return made + (f'<div style="{_SMALL};margin:0 0 6px">{said}</div>\n' if said else "")


def origin_words(state: RunState) -> str:
    """What the run is a fork of, where answers came from, if not from a model, and what it goes on from."""
    unkept = _capital(one_line(state.unkept or "", 300))
    fork = _capital(say.fork_words(state))
    return inline(" · ".join(filter(None, (fork, _capital(say.source(state)), _resumed(state), unkept))))


def _resumed(state: RunState) -> str:
    if not state.resumed:
        return ""
    last = state.resumed[-1]
    at = f", {say.clock(last.at)}" if last.at and state.recorded is None else ""
    reason = f" ({one_line(last.reason, 120)})" if last.reason else ""
    return f"Resumed by {one_line(last.by, 60)}{at}{reason}"


def run_html(
    state: RunState, steps: Sequence[str] | None = None, *, now: float | None = None, full: bool = False
) -> str:
    """The run, or some of its steps, as it is saved in a notebook.

    Parameters
    ----------
    state
        The run.
    steps
        Ids of the steps to show, for the cell of a step; ``None`` shows all, with header and graph.
    now
        Unix seconds, for the time of what runs.
    full
        Show everything, whatever its size.
    """
    chosen = state.order if steps is None else [state.find(id) for id in steps]
    limit = min(STEP_LIMIT, max(2_000, RUN_LIMIT // 4 // max(1, len(chosen))))  # Markdown grows, lists fivefold
    while True:
        cards = _cards(state, steps, now, limit, full)
        if full or len(cards.encode("utf-8", "replace")) <= RUN_LIMIT or limit < 200:
            break
        limit //= 4
    if steps is None:
        parts = [header(state, now), svg.graph_img(state) + "\n" if state.order else "", cards]
    else:
        parts = [cards]
    gates = gates_of(state, steps)
    parts += [gate_bar(state, gate, beside=beside(gate, steps)) for gate in gates]
    if steps is None and not gates:
        parts.append(_line(say.sentence(state, now), f"margin:8px 0 0;{_FAINT}"))
    if steps is not None:
        parts.append(_line(place_words(state, chosen)))
    return page("".join(parts))


def gates_of(state: RunState, steps: Sequence[str] | None = None) -> list[Gate]:
    """The open gates; with `steps` those that concern them: their own, and what they wait for."""
    if steps is None:
        return list(state.gates.values())
    held = any(say.waits_for(state, state.find(id)) for id in steps)
    return [gate for gate in state.gates.values() if held or gate.path in steps or gate.path.split("/")[0] in steps]


_IN_BAR: set[str] = {"question", "permission"}
"""Kinds of gates about which a lane says too little: their bars say all."""


def beside(gate: Gate, steps: Sequence[str] | None) -> bool:
    """Whether what `gate` is about stands above: in one of the cards of those `steps`, or of all; or in a lane."""
    if "/" in gate.path and gate.kind in _IN_BAR:
        return False
    return steps is None or gate.path.partition("/")[0] in steps


def place_words(state: RunState, chosen: Sequence[StepState]) -> str:
    """Which steps these are, and of what run."""
    places = ", ".join(str(step.index + 1) for step in chosen)
    # A notebook's next cell may add a step after the last one: only what has ended, or has more, has a number of steps.
    grows = state.ended is None and any(step is state.order[-1] for step in chosen)
    of = "" if grows else f" of {len(state.order)}"
    said = [f"Step {places}{of} in {one_line(state.name, 80)}", say.source(state)]
    if state.ended in ("stopped", "failed") and not all(step.settled for step in chosen):
        said.append(say.sentence(state))
    return " · ".join(filter(None, said))


def _cards(state: RunState, steps: Sequence[str] | None, now: float | None, limit: int, full: bool) -> str:
    """The cards in order, with the separators between them; many alike become one line."""
    parts: list[str] = []
    for row in rows(state, steps):
        if row.caption is not None:
            parts.append(f'<div style="{_SMALL};margin:10px 0 2px">{_esc(row.caption) or "—"}</div>\n')
        elif len(row.steps) > 1:
            parts.append(_folded(state, row.steps, now, limit, full))
        else:
            share = STEP_LIMIT if row.open and limit >= 2_000 else limit
            parts.append(card(state, row.steps[0], open=row.open, now=now, limit=share, full=full))
    return "".join(parts)


def _focus(state: RunState, chosen: Sequence[StepState]) -> list[StepState]:
    """The steps that stay open: what runs, waits or failed; else the one gone back to, or the last with an output."""
    wanting = [step for step in chosen if wants_attention(look(state, step))]
    if wanting:
        return wanting
    told = [step for step in chosen if step.last is not None and step.last.text]
    return [step for step in told if state.paused and step.id == state.back_at] or told[-1:]


def _groups(
    state: RunState, chosen: Sequence[StepState], alone: Sequence[StepState]
) -> Iterable[tuple[str | None, list[StepState]]]:
    """Steps in a row that may be folded together; a separator comes by itself, as its text."""
    ids = {step.id for step in chosen}
    kept = {step.id for step in alone}
    row: list[StepState] = []

    def kind(step: StepState) -> str:
        return step.id if step.id in kept else "done" if step.settled else "pending" if not step.attempts else step.id

    for item in state.items:
        if isinstance(item, Separator):
            if len(ids) == len(state.order):
                if row:
                    yield None, row
                    row = []
                yield one_line(item.text, 90), []
            continue
        if item.id not in ids:
            continue
        step = state.steps[item.id]
        if row and kind(row[-1]) != kind(step):
            yield None, row
            row = []
        row.append(step)
    if row:
        yield None, row


def _folded(state: RunState, group: list[StepState], now: float | None, limit: int, full: bool) -> str:
    """Many steps of a kind as one line that opens, unless nothing has happened in them."""
    tone: Tone = "done" if group[0].settled else "pending"
    style = f"border-left:3px solid {COLOURS[tone]};padding:1px 0 1px 10px;margin:6px 0"
    line = fold_summary(state, group)
    if tone == "pending":
        return f'<div style="{style}">{line}</div>\n'
    inner = "".join(card(state, step, open=False, now=now, limit=limit, full=full) for step in group)
    return f'<details style="{style}">\n<summary style="cursor:pointer">{line}</summary>\n{inner}</details>\n'


def fold_summary(state: RunState, group: list[StepState]) -> str:
    """Many steps of a kind in a line: ``16 done step-1 to step-16 · 63 s · $0.048``."""
    names = f"{group[0].id} to {group[-1].id}" if len(group) > 4 else ", ".join(step.id for step in group)
    if not group[0].settled:
        return f"{pill(Look(f'{len(group)} pending', 'pending'))} {faint(names, say.waits_for(state, group[0]))}"
    skipped = sum(step.status == "skipped" for step in group)
    words = [names, *say.total(state, (attempt for step in group for attempt in step.attempts)).words()]
    again = [f"{step.id} took {len(step.attempts)} attempts" for step in group if len(step.attempts) > 1]
    words += [f"{skipped} skipped"] if skipped else []
    other = [step.id for step in group if say.beside(step)]
    words += [f"{', '.join(other) if len(other) <= 3 else len(other)} recorded for other words"] if other else []
    words += again if len(again) <= 3 else [f"{len(again)} took several attempts"]
    decided = [(step.id, step.last.decision) for step in group if step.last is not None and step.last.decision]
    told = [f"{id} {say.decided(state, decision)}" for id, decision in decided]
    words += told if len(told) <= 1 else [f"{len(told)} were approved"]
    return f"{pill(Look(f'{len(group) - skipped} done', 'done'))} {faint(*words)}"


# -- pieces for the live view -----------------------------------------------------------------------------------------


class Row(NamedTuple):
    """A line of the view: a separator's ``caption``, or ``steps``; several of them are folded into one."""

    caption: str | None
    steps: list[StepState]
    open: bool


def rows(state: RunState, steps: Sequence[str] | None = None) -> Iterable[Row]:
    """What ``run_html`` shows, from top to bottom."""
    chosen = state.order if steps is None else [state.find(id) for id in steps]
    focus = _focus(state, chosen)
    told = [step for step in chosen if len(step.attempts) > 1 or step.status == "skipped"]
    alone = chosen if steps is not None else focus + (told if len(chosen) <= STORIES else [])
    for caption, group in _groups(state, chosen, alone):
        if caption is not None or (steps is None and len(group) >= FOLD):
            yield Row(caption, group, False)
        else:
            for step in group:
                yield Row(None, [step], wants_attention(look(state, step)) or step in focus)


def summary(state: RunState, step: StepState, now: float | None = None) -> str:
    """The line of a card."""
    return ticking(state, step, _summary(state, step, look(state, step), now, open=False), now)


def ticking(state: RunState, step: StepState, made: str, now: float | None = None) -> str:
    """`made` with the seconds until `step` is tried again marked, so that a page can count them down by itself."""
    left = say.retry_left(state, step, now)
    if left is None:
        return made
    words = f" in {say.duration(left)} ("
    return made.replace(words, f' in <span data-until="{step.retry_at:.2f}">{say.duration(left)}</span> (', 1)


def group_html(state: RunState, steps: Iterable[str]) -> str:
    """Closed cards: what opens below the line of a fold."""
    chosen = [state.find(id) for id in steps]
    limit = min(OLD_LIMIT, max(400, RUN_LIMIT // 4 // max(1, len(chosen))))
    return "".join(card(state, step, open=False, limit=limit) for step in chosen)


def output_html(state: RunState, step: StepState, attempt: Attempt | None) -> str:
    """What an attempt gave and how it ended; of the last one also what the step waits for. No folds: see tabs."""
    parts = []
    newest = attempt is step.last
    if newest and step.stale:
        parts.append(_line(f"Stale: {say.stale_words(state, step)}."))
    if attempt is not None:
        parts += _result(state, step, attempt, STEP_LIMIT)
        if called := say.tool_words(attempt):
            parts.append(_line(f"{_capital(called)}."))
    return "".join([*parts, *(_asked(state, step) if newest else ())])


def changes_html(step: StepState, attempt: Attempt) -> str:
    """What changed from the attempt before that has an output."""
    older = [other for other in step.attempts if other.number < attempt.number and other.text]
    if not older or not attempt.text:
        return _line("There is no earlier output to compare with.")
    old = older[-1]
    return _line(f"From attempt {old.number} to {attempt.number}:") + _bounded_diff(step, old, attempt, STEP_LIMIT)


def files_html(step: StepState, attempt: Attempt) -> str:
    """What an attempt changed in the files of the workspace."""
    if not attempt.files_total:
        return _line("It changed no files.")
    return _line(f"{say.files_words(attempt)}:") + _files(step, attempt, STEP_LIMIT)


def prompt_html(step: StepState, attempt: Attempt) -> str:
    """The exact prompt of an attempt, and to whom it was sent."""
    if not attempt.prompt:
        return _line("It was given no prompt.")
    sent = f"Sent to {attempt.engine}:" if attempt.engine not in ("", "offline") else "No model was called. The prompt:"
    return _line(sent) + _shown(attempt.prompt, STEP_LIMIT, f"%cm show {step.path} --full", plain=True)


def thinking_html(text: str) -> str:
    """What an agent thought before it wrote, folded and faint; it is shown while the turn runs, and kept nowhere."""
    words = f"Thinking, {len(text):,} characters"
    return _fold(words, f'<div style="{_FAINT};white-space:pre-wrap">{_esc(clip(text, OLD_LIMIT).head)}</div>\n')


def plain_html(text: str) -> str:
    """Text as it stands."""
    return _pre(text)


# -- answers of single commands ---------------------------------------------------------------------------------------


def bold(text: str) -> str:
    """A name that stands out."""
    return f"<b>{_esc(text)}</b>"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], right: Sequence[int] = ()) -> str:
    """Rows as a table; cells are HTML already."""
    lines = ['<table style="border-collapse:collapse;font-size:13px;margin:4px 0">\n<thead>\n<tr>']
    for number, cell in enumerate(head):
        lines.append(f'<th scope="col" style="{_CELL};text-align:{"right" if number in right else "left"}">{cell}</th>')
    lines.append("</tr>\n</thead>\n<tbody>")
    for row in rows:
        lines.append("<tr>")
        for number, cell in enumerate(row):
            lines.append(f'<td style="{_CELL};text-align:{"right" if number in right else "left"}">{cell}</td>')
        lines.append("</tr>")
    return "\n".join([*lines, "</tbody>\n</table>\n"])


def rows_html(head: Sequence[str], rows: Iterable[Sequence[str]], note: str) -> str:
    """Rows of texts as a table, the first of each being a name as it is typed, and a note below."""
    cells = [[f'<code style="{_CODE}">{_esc(name)}</code>', *map(_esc, rest)] for name, *rest in rows]
    return page(table(head, cells) + _line(note), framed=False)


STATUS_HEAD = table(say.STATUS_COLUMNS, [], right=(2, 3, 4, 5)).partition("</tr>")[0]
RUNS_HEAD = table(("Run", "Workflow", "State", "Started"), []).partition("</tr>")[0]


def status_html(state: RunState, now: float | None = None) -> str:
    """States, times, tokens and costs as one table."""
    rows = []
    looks = [*(look(state, step) for step in state.order), say.run_look(state)]
    for cells, seen in zip(say.status_rows(state, now), looks, strict=True):
        rows.append([f"<b>{_esc(cells[0])}</b>", pill(seen), *(_esc(cell) for cell in cells[2:])])
    said = _line(" · ".join(filter(None, (say.source(state), say.sentence(state, now)))))
    name = f"<div><b>{_esc(one_line(state.name, 80))}</b></div>\n"
    return page(f"{name}{table(say.STATUS_COLUMNS, rows, right=(2, 3, 4, 5))}{said}", framed=False)


def find_attempt(step: StepState, number: int | None) -> Attempt:
    """The attempt of that number; a negative one counts from the end, ``None`` is the last.

    Raises
    ------
    TransitionError    There is none; the message says which there are.
    """
    if not step.attempts:
        raise TransitionError(f"{step.id!r} has not run yet.")
    if number is None:
        return step.attempts[-1]
    if number < 0 and -number <= len(step.attempts):
        return step.attempts[number]
    for attempt in step.attempts:
        if attempt.number == number:
            return attempt
    numbers = f"1 to {step.attempt}" if step.attempt > 1 else "only 1"
    raise TransitionError(f"{step.id!r} has no attempt {number}; there is {numbers}.")


def diff_html(state: RunState, step: StepState, a: int = -2, b: int = -1, *, columns: bool = False) -> str:
    """What changed in a step's output from attempt `a` to attempt `b` (numbers, or negative from the end).

    `columns`: each in a column of its own.
    """
    old, new = find_attempt(step, a), find_attempt(step, b)
    head = f"<div><b>{_esc(step.id)}</b> {faint(f'attempt {old.number} to attempt {new.number}')}</div>\n"
    said = say.outcome(state, step, old)
    why = _line(f"Attempt {old.number}: {said}") if said else ""
    heads = f"attempt {old.number}", f"attempt {new.number}"
    made = diff.side_by_side(old.text, new.text, heads) if columns else diff.between(old.text, new.text)
    return page(head + why + made)


def show_html(state: RunState, step: StepState, attempt: int | None = None, full: bool = False) -> str:
    """One step, or one attempt of it, opened."""
    limit = 1 << 40 if full else STEP_LIMIT
    if attempt is None:
        body = card(state, step, open=True, full=full)
        if step.gate is not None:
            body += gate_bar(state, step.gate, beside=True, again=False)
        return page(body)
    chosen = find_attempt(step, attempt)
    words = [
        f"attempt {chosen.number} of {step.attempt}",
        *say.total(state, [chosen]).words(),
        say.outcome(state, step, chosen),
    ]
    head = f"<div><b>{_esc(step.id)}</b> {faint(*words)}</div>\n"
    more = say.show_command(step, chosen)
    output = _shown(chosen.text, limit, more) if chosen.text else _line("It gave no output.")
    prompt = chosen.prompt
    sent = _fold("Prompt", _shown(prompt, limit, more, plain=True)) if prompt else ""
    files = "".join(map(_line, say.files_notes(step, chosen)))
    if chosen.files_total:
        files += _fold(say.files_words(chosen), _files(step, chosen, limit))
    return page(f"{head}{output}{_errors(step, chosen)}{files}{sent}")


def runs_html(runs: Iterable[tuple[str, str, str, float]]) -> str:
    """Runs given as ``(id, name, status, started_at)`` as a table, with how to go on with one."""
    tones: dict[str, Tone] = {"running": "running", "waiting": "waiting", "paused": "waiting", "completed": "done"}
    rows = []
    for id, name, status, when in say.runs_rows(runs):
        state = pill(Look(status, tones.get(status.partition(",")[0], "failed")))
        rows.append([f'<code style="{_CODE}">{_esc(id)}</code>', _esc(name), state, _esc(when)])
    if not rows:
        return _line("There are no runs yet.")
    made = table(("Run", "Workflow", "State", "Started"), rows)
    return page(made + _line("To go on with one: `%cm resume RUN`"), framed=False)
