"""A run in words: what every view says, in one place, so that they cannot say different things.

Strategy: three layers. Numbers (``duration``, ``tokens``, ``cost``, ``clock``) become short words. A step becomes a
``Look``: the word for its state and the tone that a drawing gives it. From these come the sentences (``sentence``,
``gate_sentence``, ``story``), the lines of a headless run (``event_line``) and the tables of ``text/plain``.

A run from a tape says the same each time it is executed: no clock time and no duration that this machine measured.
``spent`` and ``clock_of`` are the two places that see to it.

Nothing here is HTML; texts of agents are cleaned and cut to one line, and whoever makes HTML of them escapes them.
"""

from __future__ import annotations

import time
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from itertools import starmap
from typing import Any, Literal, NamedTuple

from ..errors import typed
from ..events import (
    EDITABLE,
    GATE_DEADLINE,
    OTHER_WORDS,
    Action,
    AgentsCalled,
    BaseEvent,
    Decision,
    Gate,
    GateDecided,
    GateOpened,
    LoopedBack,
    ModeChanged,
    Rewound,
    RunFinished,
    RunForked,
    RunPaused,
    RunResumed,
    RunStarted,
    RunUnpaused,
    Scope,
    SnapshotFailed,
    SnapshotTaken,
    StepAdded,
    StepChanged,
    StepFailed,
    StepOutdated,
    StepRemoved,
    StepSkipped,
    TellingFailed,
    ToolCalled,
    ToolReturned,
    TurnCutShort,
    TurnFailed,
    TurnFinished,
    Usage,
    WorkflowChanged,
    WorkspaceRestored,
)
from ..runstate import STATUS_WORDS, Attempt, Budget, RunState, StepState, gate_path, status_word, why_stale
from ..tools import BUILT_IN, denied, write_arguments
from ..workflow import Module, Parallel, Separator, limits_of
from .markdown import Clipped, clean, clip

Tone = Literal["done", "waiting", "running", "failed", "pending", "skipped"]

# -- numbers ----------------------------------------------------------------------------------------------------------


def duration(seconds: float | None, space: str = " ") -> str:
    """Seconds in words (``4.6 s``, ``38 s``, ``2 min 05 s``, ``1 h 02 min``); ``""`` when not known."""
    if seconds is None:
        return ""
    if seconds < 0.05:
        return f"<0.1{space}s"
    if seconds < 19.95:
        return f"{seconds:.1f}{space}s"
    whole = round(seconds)
    if whole < 120:
        return f"{whole}{space}s"
    if whole < 3600:
        return f"{whole // 60}{space}min{space}{whole % 60:02d}{space}s"
    return f"{whole // 3600}{space}h{space}{whole % 3600 // 60:02d}{space}min"


def tokens(count: int | None, estimated: bool = False) -> str:
    """A number of tokens in words (``640 tok``, ``1.6k tok``), after ``~`` when we counted; ``""`` for none."""
    if not count:
        return ""
    mark = "~" if estimated else ""
    if count < 1000:
        return f"{mark}{count} tok"
    for limit, unit, scale in ((9_950, "k", 1e3), (999_500, "k", 1e3), (9_950_000, "M", 1e6)):
        if count < limit:
            return f"{mark}{count / scale:.{0 if limit == 999_500 else 1}f}{unit} tok"
    return f"{mark}{count / 1e6:.0f}M tok"


def cost(usd: float | None, estimated: bool = False) -> str:
    """US dollars in words (``$0.008``, ``$1.20``), after ``~`` when estimated; ``""`` for none."""
    if not usd:
        return ""
    digits = 2 if usd >= 0.995 else 3 if usd >= 0.0005 else 4
    return f"{'~' if estimated else ''}${usd:.{digits}f}" if usd >= 0.00005 else "<$0.0001"


def amount(name: str, value: float) -> str:
    """So much of what the limit of that option limits: ``$0.50``, ``20,000 tokens``, ``1 turn``."""
    if name == "max_cost_usd":
        return f"${value:,.2f}" if round(value, 2) == round(value, 6) else cost(value)
    return f"{value:,.0f} {name[4:] if value != 1 else name[4:-1]}"


def clock(at: float) -> str:
    """Unix seconds as the wall clock of this machine shows them: ``12:31``."""
    return time.strftime("%H:%M", time.localtime(at))


def size(count: int) -> str:
    """Bytes in words: ``640 B``, ``212 kB``, ``1.4 MB``."""
    if count < 1000:
        return f"{count} B"
    return f"{count / 1e3:.0f} kB" if count < 999_500 else f"{count / 1e6:.1f} MB"


def steps(count: int) -> str:
    """``1 step``, ``2 steps``."""
    return f"{count} step{'s' if count != 1 else ''}"


def one_line(text: object, limit: int = 160) -> str:
    """The text cleaned, on one line, cut after `limit` characters with ``…``."""
    line = " ".join(clean(str(text)[: 20 * limit]).split())
    return line if len(line) <= limit else line[: limit - 1].rstrip() + "…"


def quoted(text: object, limit: int = 160) -> str:
    """The text on one line, in quotation marks."""
    return f"“{one_line(text, limit)}”"


def left_out(cut: Clipped, more: str) -> str:
    """What was left out of a text, and the command that shows all of it."""
    return f"{cut.omitted_chars:,} characters left out. Show all {size(cut.total_bytes)}: `{more}`"


def bounded(text: str, more: str) -> str:
    """The text cleaned; of a long one, as in HTML, its two ends and between them a line that says how to see all."""
    cut = clip(clean(text))
    return f"{cut.head.rstrip()}\n… {left_out(cut, more)} …\n{cut.tail}" if cut.tail else cut.head


def show_command(step: StepState, attempt: Attempt) -> str:
    """The command that shows all of an attempt."""
    which = "" if attempt is step.last else f" --attempt {attempt.number}"
    return f"%cm show {step.path}{which} --full"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _ended(text: str) -> str:
    """The text with a full stop, unless it ends a sentence by itself."""
    return text if not text or text[-1] in ".!?…”" else text + "."


# -- what was spent ---------------------------------------------------------------------------------------------------


def spent(state: RunState, attempt: Attempt, now: float | None = None) -> float | None:
    """Seconds an attempt took, waiting for a person not counted; of a tape only what was recorded.

    With `now` (Unix seconds), of one that runs too.
    """
    if state.recorded is not None or attempt.engine == "offline":
        return attempt.measured_s
    if attempt.ended_at is None and now is not None and not attempt.edited:
        until = now if attempt.waits_since is None else attempt.waits_since
        return max(0.0, until - attempt.started_at - attempt.asked_s)
    return attempt.duration_s


class Spent(NamedTuple):
    """What some attempts took together; ``seconds`` is ``None`` when it is not known of any."""

    seconds: float | None
    usage: Usage | None
    cost_usd: float
    cost_estimated: bool = False
    budget: Budget | None = None

    def words(self) -> list[str]:
        """Time, tokens and cost, those that are known; each of the limits with what there is of it."""
        estimated = self.usage is not None and self.usage.estimated
        count = self.usage.input_tokens + self.usage.output_tokens if self.usage is not None else 0
        computed = estimated or self.cost_estimated
        said = {"max_tokens": tokens(count, estimated), "max_cost_usd": cost(self.cost_usd, computed)}
        if self.budget is not None:
            counted = self.budget.used  # of a fork less than all: what was used before it does not count
            paid = amount("max_cost_usd", counted["max_cost_usd"]) if counted["max_cost_usd"] else "$0"
            used = {
                "max_cost_usd": f"{'~' if computed and counted['max_cost_usd'] else ''}{paid}",
                "max_tokens": tokens(int(counted["max_tokens"]), estimated).removesuffix(" tok") or "0",
                "max_turns": f"{self.budget.used['max_turns']:,}",
            }
            said |= {name: f"{used[name]} of {amount(name, most)}" for name, most in self.budget.limits.items()}
        return [word for word in (duration(self.seconds), *(said.get(name, "") for name in _ORDER)) if word]


_ORDER = ("max_turns", "max_tokens", "max_cost_usd")


def total(state: RunState, attempts: Iterable[Attempt], now: float | None = None) -> Spent:
    """The sum over `attempts`."""
    seconds: float | None = None
    usage: Usage | None = None
    paid, computed = 0.0, False
    for attempt in attempts:
        if (took := spent(state, attempt, now)) is not None:
            seconds = (seconds or 0.0) + took
        if attempt.edited:
            continue
        if attempt.usage is not None:
            usage = attempt.usage if usage is None else usage + attempt.usage
        paid += attempt.cost_usd or 0.0
        computed = computed or attempt.cost_estimated
    return Spent(seconds, usage, paid, computed)


def taken(state: RunState, step: StepState, now: float | None = None) -> Spent:
    """The sum over all attempts of `step`, and of the agents that it called: each one's work counts."""
    attempts = list(step.attempts)
    for _depth, member in team(step):
        attempts += member.attempts
    return total(state, attempts, now)._replace(budget=step.budget)


def team(step: StepState, depth: int = 1) -> Iterator[tuple[int, StepState]]:
    """The agents that `step` called, each followed by those that it called; and how deep."""
    for member in step.members:
        yield depth, member
        yield from team(member, depth + 1)


def run_total(state: RunState, now: float | None = None) -> Spent:
    """What the whole run took: seconds of work (not of waiting), tokens, cost."""
    everybody = (*state.order, *state.members.values())
    seconds = total(state, (attempt for step in everybody for attempt in step.attempts), now).seconds
    usage = state.usage if state.usage.input_tokens + state.usage.output_tokens else None
    budget = state.budget if state.budget.limits else None
    return Spent(seconds, usage, state.cost_usd, state.cost_estimated, budget)


def source(state: RunState) -> str:
    """Where the answers came from, when not from a model: a recording, or the offline engine; else ``""``."""
    if state.recorded is not None:
        where = f" ({one_line(state.recorded, 60)})" if state.recorded != state.name else ""
        return f"recorded{where}: no model was called"
    if _first_offline(state) is not None:
        return "offline: no model was called"
    return ""


def fork_words(state: RunState) -> str:
    """What the run is a fork of, and what had been paid before: ``fork of r-1f2e at planner``; ``""`` for none."""
    origin = state.origin
    if origin is None:
        return ""
    of = "" if state.recorded is not None else f" of {origin.run}"
    before = cost(origin.cost_usd, state.cost_estimated)
    return f"fork{of} at {origin.step}{f', {before} of it before the fork' if before else ''}"


def _first_offline(state: RunState) -> Attempt | None:
    everybody = (*state.order, *state.members.values())
    return next((one for step in everybody for one in step.attempts if one.engine == "offline"), None)


# -- a step and the run in a word -------------------------------------------------------------------------------------


class Look(NamedTuple):
    """A state as it is shown: the word, and the tone that colours and icons follow."""

    word: str
    tone: Tone


_TONES: dict[str, Tone] = {
    "pending": "pending",
    "ready": "pending",
    "running": "running",
    "asking": "waiting",
    "calling": "running",
    "retrying": "running",
    "due": "waiting",
    "waiting": "waiting",
    "looping": "running",
    "finished": "done",
    "skipped": "skipped",
    "failed": "failed",
}


def look(state: RunState, step: StepState) -> Look:
    """How `step` stands."""
    kind = step.gate.kind if step.gate is not None else step.due.kind if step.due is not None else None
    if step.status in ("due", "waiting") and kind == "failed":
        return Look("failed", "failed")
    if state.ended is not None:
        if step.status == "due":
            return Look(said := status_word(state, step), "failed" if said == "failed" else "waiting")
        if step.last is not None and step.last.cut_short and step.status in ("ready", "asking", "running"):
            return Look("cut short", "failed")
        if step.status == "retrying":
            return Look("failed", "failed")
    if step.stale:
        return Look("stale", _TONES[step.status])
    if step.status == "calling" and isinstance(step.step, Parallel):
        return Look("running", "running")  # its members are what it does
    if step.answered is not None:
        return Look(status_word(state, step), "pending")
    last = step.last
    if step.status == "finished" and last is not None and last.decision is not None:
        return Look("edited" if last.edited else "approved", "done")
    return Look(STATUS_WORDS[step.status], _TONES[step.status])


def run_look(state: RunState) -> Look:
    """How the run stands."""
    if state.status == "waiting":
        return Look("waiting for you", "waiting")
    tones: dict[str, Tone] = {
        "running": "running",
        "paused": "waiting",
        "completed": "done",
        "stopped": "failed",
        "failed": "failed",
    }
    return Look("done" if state.status == "completed" else state.status, tones[state.status])


def will_stop(state: RunState, step: StepState, place: Literal["before", "after"]) -> bool:
    """Whether a gate will stop the run before or after `step`'s work, as the mode is now."""
    if step.settled or state.ended is not None or state.mode == "unattended":
        return False
    if place == "before" and (step.status != "pending" or step.turn > 1):
        return False
    return step.step.gate in (place, "both") and state.pauses(step.step)


def counts(state: RunState) -> str:
    """How many steps stand how: ``4 done, 1 skipped``."""
    settled = [step.status for step in state.order if step.settled]
    parts = [f"{settled.count('finished')} of {len(state.order)} done"]
    if skipped := settled.count("skipped"):
        parts.append(f"{skipped} skipped")
    return ", ".join(parts)


# -- gates ------------------------------------------------------------------------------------------------------------


class Way(NamedTuple):
    """One way to answer a gate: its action, what the button says, and the magic that does the same.

    ``edit`` approves a text of the person's, ``prompt`` tries again with one, ``rerun`` runs all from this step on.
    """

    action: Action | Literal["edit", "prompt", "rerun"]
    label: str
    magic: str
    times: int = 1
    """How often to retry."""
    scope: Scope | None = None
    """For how long to allow a tool."""

    @property
    def name(self) -> str:
        """What tells it from the others: its action, or the scope of a permission that is for longer than once."""
        return self.scope or self.action


_LABELS: dict[tuple[str, str], str] = {
    ("start", "approve"): "Send it",
    ("verdict", "approve"): "Continue",
    ("verdict", "reject"): "Loop…",
    ("exhausted", "approve"): "Accept the last",
    ("exhausted", "retry"): "2 more",
    ("stale", "approve"): "Keep",
    ("stale", "retry"): "Run again",
    ("permission", "approve"): "Allow once",
    ("permission", "reject"): "Deny…",
    ("may_have_run", "approve"): "It did",
    ("may_have_run", "retry"): "Run again",
}
_MAGICS = {"reject": "%%cm reject", "answer": "%%cm answer"}
"""Those with words of the person's: as a cell, because a line that ends in ``?`` opens IPython's help."""


_SCOPES: dict[Scope, str] = {"run": "Allow for this run", "always": "Always allow"}
_MEMBER_LABELS = {"retry": "Retry this one", "skip": "Continue without it"}


def ways(state: RunState, gate: Gate) -> list[Way]:
    """How `gate` can be answered, in the order of the buttons; the step is named when several gates are open."""
    several = len(state.gates) > 1
    failed_member = gate.kind == "failed" and gate.path in state.members
    found: list[Way] = []
    for action in gate.actions:
        if gate.kind == "budget" and action == "approve":
            label = "Continue uncounted" if "unknown" in gate.payload else f"Continue with {_more(gate.payload)}"
        elif action == "reject" and not isinstance(state.find(gate.path).step, Module) and gate.kind == "verdict":
            label = "Reject…"
        elif failed_member and action in _MEMBER_LABELS:
            label = _MEMBER_LABELS[action]
        else:
            label = _LABELS.get((gate.kind, action)) or action.capitalize() + ("…" if action in _MAGICS else "")
        magic = _MAGICS.get(action, f"%cm {action}")
        if several:
            magic += f" --step {gate.path}" if action in _MAGICS else f" {gate.path}" if action != "stop" else ""
        more = 2 if (gate.kind, action) == ("exhausted", "retry") else 1
        found.append(Way(action, label, magic if more == 1 else f"{magic} --count {more}", more))
        if (gate.kind, action) == ("permission", "approve"):
            found += [Way(action, said, f"{magic} --scope {scope}", scope=scope) for scope, said in _SCOPES.items()]
    if gate.kind == "permission":
        found.insert(1 + len(_SCOPES), Way("edit", "Edit…", f"%cm edit {gate.path}" if several else "%cm edit"))
        return found
    place = next((index for index, way in enumerate(found) if way.action in ("skip", "stop")), len(found))
    no_prompt = isinstance(state.find(gate.path).step, Parallel)  # its members have theirs
    if (gate.kind in EDITABLE or gate.kind == "failed") and not (gate.kind == "failed" and no_prompt):
        edit = Way("prompt", "Edit prompt", "%cm edit") if gate.kind == "failed" else Way("edit", "Edit", "%cm edit")
        found.insert(place, edit._replace(magic=f"%cm edit {gate.path}") if several else edit)
    elif gate.kind == "stale":
        found.insert(place, Way("rerun", "Run from here", f"%cm run --from {gate.step}"))
    return found


def similar(state: RunState, gate: Gate) -> list[Gate]:
    """The open gates that ask the same as `gate`, itself among them: of its kind, and about the same tool."""

    def asked(one: Gate) -> tuple[str, object, bool]:
        return one.kind, one.payload.get("tool"), one.path in state.members

    return [one for one in state.gates.values() if asked(one) == asked(gate)]


def _more(said: Mapping[str, Any]) -> str:
    return f"+{amount(said['limit'], said['amount'])}"


def limit_words(said: Mapping[str, Any]) -> str:
    """Which limit is reached, or cannot be held, as the payload of its gate says it."""
    most, after, whose = amount(said["limit"], said["most"]), said.get("after"), said.get("of")
    if "unknown" in said:
        what = "cost" if said["limit"] == "max_cost_usd" else "number of tokens"
        turns = "a turn" if said["unknown"] == 1 else f"{said['unknown']} turns"
        owner = f"{whose}'s" if whose else "the"
        return f"Paused: the {what} of {turns} is not known, so {owner} limit of {most} cannot be held."
    return f"Paused: {most} limit{f' of {whose}' if whose else ''} reached{f' after {after}' if after else ''}."


def following(state: RunState, step: StepState) -> str:
    """What comes after `step`: ``Next: deployer.``, or that none does so far: a notebook's next cell may add one."""
    after = state.after(step)
    if after is not None:
        return f"Next: {after.id}."
    return typed("No step follows so far: add one, or it ends the run.", "No step follows: it ends the run.")


def gate_sentence(state: RunState, gate: Gate, *, beside: bool = False) -> str:
    """What the run waits for at `gate`, why, what the answers mean, until when; without what is shown `beside` it."""
    untold = f"Nobody was told: {_ended(one_line(state.untold[gate.id], 300))}" if gate.id in state.untold else ""
    return " ".join(filter(None, (_gate_words(state, gate, beside=beside), deadline_words(state, gate), untold)))


QUESTION = 600
"""Characters of a question that a sentence holds."""
_ELSE = {"reject": "it is rejected", "skip": "it is skipped"}


def deadline_words(state: RunState, gate: Gate) -> str:
    """Until when to decide, and what comes else: ``Decide by 14:05, else the run stops.``; ``""``: at any time."""
    if gate.timeout_s is None or gate.deadline is None:
        return ""
    by = f"within {duration(gate.timeout_s)}"
    if state.recorded is None:
        near = gate.timeout_s < 600
        local = time.localtime(gate.deadline)
        day = "" if local[:3] == time.localtime(gate.opened_at)[:3] else time.strftime("%Y-%m-%d ", local)
        by = f"by {day}{time.strftime('%H:%M:%S' if near else '%H:%M', local)}"
    return f"Decide {by}, else {_ELSE.get(gate.default or '', 'the run stops')}."


def _gate_words(state: RunState, gate: Gate, *, beside: bool) -> str:
    step = state.find(gate.path)
    said = gate.payload
    reason = _ended(one_line(said.get("reason", ""), 300))
    if gate.kind == "review":
        more = said.get("next_prompt")
        prompts = step.step.turns
        goes_on = f"Next: its prompt {more} of {prompts}." if more else following(state, step)
        return " ".join(filter(None, (f"{step.id} is waiting for you.", goes_on, one_line(said.get("note", ""), 300))))
    if gate.kind == "start":
        return f"{step.id} is about to start. This is its prompt: send it, edit it, or skip the step."
    if gate.kind == "verdict":
        back = "Loop goes back" if isinstance(step.step, Module) else "Reject runs it again"
        return f"{step.id} needs your verdict. {reason} Continue goes on; {back} with your words."
    if gate.kind == "exhausted":
        return f"{step.id}: {reason[:1].lower()}{reason[1:]} Accept the last output, allow 2 more, or stop."
    if gate.kind == "failed":
        error = _ended(one_line(said.get("error", "no reason was given"), 300))
        tries = len(step.last.errors) if step.last is not None else 1
        times = f" after {tries} tries" if tries > 1 else f" (attempt {gate.attempt})" if gate.attempt > 1 else ""
        what = "." if beside else f": {error}"
        if step.caller:
            others = f"{caller_words(state, step)} goes on when all that it has called have ended."
            return f"{step.id} failed{times}{what} Retry this one, continue without it, or stop. {others}"
        if isinstance(step.step, Parallel):
            return f"{step.id} failed{times}{what} Retry those that failed, skip it, or stop."
        return f"{step.id} failed{times}{what} Retry, edit its prompt, skip it, or stop."
    if gate.kind == "budget":
        goes_on = "Continue without counting it?" if "unknown" in said else f"Continue with {_more(said)}?"
        return f"{limit_words(said)} {goes_on}"
    if gate.kind == "stale":
        ways_on = "Keep it, run this step again, or run from here: it and all after it."
        return f"{step.id} is stale: {stale_words(state, step)}. {ways_on}"
    if gate.kind == "permission":
        what = "" if beside else f" with {one_line(write_arguments(said.get('arguments', {})), 300)}"
        note = f" {one_line(said['note'], 300)}" if "note" in said else ""
        ways_on = "Allow it, change its arguments, or deny it: the agent is told why."
        return f"{step.id} wants to call {one_line(said.get('tool', ''), 80)}{what}.{note} {ways_on}"
    if gate.kind == "question" and beside:
        return f"{step.id} is waiting for your answer."
    if gate.kind == "question":
        return f"{step.id} asks: {quoted(said.get('question', ''), QUESTION)}"
    return f"{reason or f'{step.id} may have run.'} Did it? If not, run it again."


def requested(gate: Gate) -> str:
    """The arguments with which a permission's tool is to be called, to read and to edit."""
    return write_arguments(gate.payload.get("arguments", {}))


def caller_words(state: RunState, member: StepState) -> str:
    """The name of who called `member`."""
    return state.find(member.caller).id


def team_words(step: StepState) -> str:
    """How far those are that `step` has called: ``2 of 3 finished``; ``""`` when it has called nobody."""
    members = step.last.members if step.last is not None else []
    if not members:
        return ""
    return finished_words(members)


def finished_words(members: Sequence[StepState]) -> str:
    """How far `members` are: ``2 of 3 finished, 1 failed``."""
    over = [member.status for member in members if member.status in ("finished", "skipped", "failed")]
    failed = over.count("failed")
    return f"{len(over) - failed} of {len(members)} finished" + (f", {failed} failed" if failed else "")


def stale_words(state: RunState, step: StepState) -> str:
    """Why `step` is stale: ``planner changed after this ran``."""
    return why_stale(state, step)


def sentence(state: RunState, now: float | None = None, go_on: str = "%cm run") -> str:
    """What state the run is in and what comes next; `go_on`: what one types to go on with it."""
    if state.ended == "completed":
        return f"Finished: {counts(state)}."
    if state.ended is not None:
        reason = _ended(one_line(state.reason, 400))
        word = state.ended.capitalize()
        said = (
            f"{word}."
            if not reason
            else f"{word}{reason[7:]}"
            if reason.startswith("stopped by")
            else f"{word}: {reason}"
        )
        return f"{said} {_capital(counts(state))}. `{go_on}` goes on."
    if state.gates:
        return " ".join(gate_sentence(state, gate) for gate in state.gates.values())
    if state.running:
        return " ".join(_running(state, step) for step in state.running.values() if not step.caller)
    step = state.current
    if state.paused:
        if step is not None and step.id == state.back_at:
            other = f", or its cell with other words: `%%cm step {step.id}`" if go_on.startswith("%cm") else ""
            return f"Back at {step.id}: nothing runs until you go on.{_files_come_back(step)} Next: `{go_on}`{other}."
        reason = one_line(state.pause_reason, 120)
        why = reason[6:] if reason.startswith("paused by") else f" ({reason})" if reason else ""
        return f"Paused{why}. " + (f"Next: {step.id}. " if step is not None else "") + f"`{go_on}` goes on."
    if step is None:
        return f"{counts(state)}."
    if step.status == "retrying":
        return f"{step.id}: {retry_words(state, step, now)}."
    return f"{step.id} is next."


def _files_come_back(step: StepState) -> str:
    """That what lies in the folder now is not what the step will find, and what becomes of a person's own changes."""
    if not step.restore:
        return ""
    return (
        f" The files are as they were before {step.id} when it begins, not yet now; what was changed by hand is taken "
        f"away then, but kept: `run.restore_files({step.path!r}, 'kept')`."
    )


def _running(state: RunState, step: StepState) -> str:
    details = attempt_words(step)
    if step.status == "calling":
        does = "is running" if isinstance(step.step, Parallel) else "waits for its team"
        return f"{step.id} {does}: {team_words(step)}. {following(state, step)}"
    return f"{step.id} is running{f' ({details})' if details else ''}. {following(state, step)}"


def attempt_words(step: StepState) -> str:
    """Which attempt and pass: ``attempt 2, pass 3``; ``""`` for the first of each."""
    parts = [f"attempt {step.attempt}"] if step.attempt > 1 and step.attempt != step.iteration else []
    if step.iteration > 1:
        parts.append(f"pass {step.iteration}")
    return ", ".join(parts)


def retry_words(state: RunState, step: StepState, now: float | None = None) -> str:
    """The countdown of an automatic retry: ``rate limited, again in 4 s (2 of 3)``."""
    error = step.last.error if step.last is not None else None
    kind, message = (error.kind, error.message) if error is not None else ("", "failed")
    why = _PASSING.get(kind) or one_line(message, 160).rstrip(".")
    return f"{why}, {_again(state, step, retry_left(state, step, now))}"


def retry_left(state: RunState, step: StepState, now: float | None = None) -> float | None:
    """In how many seconds it is tried again by itself; ``None`` when it is not."""
    if step.status != "retrying" or step.retry_at is None or state.recorded is not None or state.ended is not None:
        return None
    return max(0.0, step.retry_at - (state.at if now is None else now))


_PASSING = {"EngineRateLimited": "rate limited", "EngineUnavailable": "not available"}


def _again(state: RunState, step: StepState, in_s: float | None) -> str:
    tried = step.last.failures if step.last is not None else 0
    wait = f" in {duration(in_s).replace('.0 ', ' ')}" if in_s is not None and state.recorded is None else ""
    return f"again{wait} ({tried + 1} of {step.step.retries + 1})"


_HELD_BY = {"review": "approved", "question": "done", "permission": "done", "budget": "done", "start": "done"}
"""By the kind of its gate: what a step must be before the next one starts; done, where the gate only lets it go on."""


def waits_for(state: RunState, step: StepState) -> str:
    """Why a step that has not begun does not run: ``starts when planner is approved``; ``""`` if nothing holds it."""
    if state.ended is not None or step.status not in ("pending", "ready"):
        return ""
    for gate in state.gates.values():
        other = state.find(gate.path)
        if other.index < step.index:
            more = " and the run goes on" if state.paused else ""
            return f"starts when {other.id} is {_HELD_BY.get(gate.kind, 'decided')}{more}"
    return "the run is paused" if state.paused and step is state.current else ""


def beside(step: StepState) -> str:
    """That an answer was recorded for other words, which a closed card must not hide; else ``""``."""
    noted = step.last.note if step.last is not None else None
    return "recorded for other words" if noted is not None and noted.endswith(OTHER_WORDS) else ""


def note(step: StepState) -> str:
    """What is to be said beside a step, unless its story says it."""
    decision = step.last.decision if step.last is not None else None
    told = step.status == "skipped" and decision is not None and decision.action == "skip"
    return "" if told else one_line(step.note or "", 120)


# -- what happened ----------------------------------------------------------------------------------------------------

_DONE = {"approve": "approved", "reject": "rejected", "retry": "retried", "skip": "skipped", "answer": "answered"}


def clock_of(state: RunState, decision: Decision, *, live: bool = False) -> str:
    """When it was decided, or ``""``: what is kept of a tape is the same bytes each time, so it has no time of day."""
    shown = decision.at and decision.by != "tape" and (live or state.recorded is None)
    return clock(decision.at) if shown else ""


def decided(state: RunState, decision: Decision, *, used_up: bool = False, live: bool = False) -> str:
    """The decision in words: ``rejected by you, 12:31: “name the tests”``.

    `used_up`: it ended a loop at its limit; `live`: it is told to a person who is there.
    """
    by = "(recorded)" if decision.by == "tape" else f"by {one_line(decision.by, 60)}"
    by = "at its deadline" if decision.by == GATE_DEADLINE else by
    at = clock_of(state, decision, live=live)
    done = "edited and approved" if decision.output is not None else _DONE.get(decision.action, "stopped")
    done = {"run": "allowed for this run", "always": "always allowed"}.get(decision.scope or "", done)
    for name, more in limits_of(decision).items():
        done = f"+{amount(name, more)} permitted"
    if used_up and done == "approved":
        done = "the last output accepted"
    why = f": {quoted(decision.feedback)}" if decision.feedback else ""
    return f"{done} {by}{f', {at}' if at else ''}{why}"


def outcome(state: RunState, step: StepState, attempt: Attempt) -> str:
    """How an attempt of `step` ended: verdict, error, decision, who sent it back; ``""`` when it ended plainly."""
    parts: list[str] = []
    verdict = attempt.verdict
    if verdict is not None and not attempt.edited:
        score = f" ({verdict.score:g})" if verdict.score is not None else ""
        why = f": {quoted(verdict.reason)}" if verdict.reason else ""
        parts.append(f"said {verdict.action}{score}{why}")
    if attempt.error is not None and attempt.answer is None:
        parts.append(f"failed: {quoted(attempt.error.message)}")
    if attempt.cut_short:
        parts.append(f"cut short: {one_line(attempt.cut_short)}")
    if used_up := _used_up(step, attempt):
        parts.append("the limit was reached")
    if (decision := attempt.decision) is not None:
        parts.append("replaced by an edited text" if replaced(attempt) else decided(state, decision, used_up=used_up))
    if sent_back := _sent_back(state, step, attempt):
        parts.append(sent_back)
    if not parts and (later := _later(step, attempt)) is not None:
        parts.append(f"replaced by attempt {later.number}")  # its cell was changed, or it ran again
    return "; ".join(parts)


def _later(step: StepState, attempt: Attempt) -> Attempt | None:
    return next((one for one in step.attempts if one.number > attempt.number), None)


def replaced(attempt: Attempt) -> bool:
    """Whether a person's text counts in place of this attempt's."""
    return attempt.decision is not None and attempt.decision.output is not None and not attempt.edited


def attempt_word(state: RunState, step: StepState, attempt: Attempt) -> str:
    """How an attempt ended in a word or two, the shortest form of its outcome: ``loop 0.52``, ``rejected``."""
    if attempt.edited:
        return "edited"
    if replaced(attempt):
        return "replaced"
    if attempt.decision is not None:
        return _DONE.get(attempt.decision.action, "stopped")
    if (verdict := attempt.verdict) is not None:
        return verdict.action + (f" {verdict.score:g}" if verdict.score is not None else "")
    if attempt.cut_short:
        return "cut short"
    if attempt.errors and attempt.answer is None:
        return "failed"
    words = _sent_back(state, step, attempt)
    if words:
        return "sent back" if words.startswith("sent back") else "accepted"
    return "replaced" if _later(step, attempt) is not None else ""


def _used_up(step: StepState, attempt: Attempt) -> bool:
    """Whether a module would have gone back after this attempt, had its repeats not been used up."""
    said = attempt.verdict.action if attempt.verdict is not None else None
    return isinstance(step.step, Module) and said == "loop" and attempt is step.last and step.status == "finished"


def _sent_back(state: RunState, step: StepState, attempt: Attempt) -> str:
    """Which module did not accept an attempt: ``sent back by quality-gate (0.52): “2 tests fail”``."""
    module = state.loop_of(step)
    if module is None or module.id == step.id or (attempt.decision is not None and attempt.decision.action == "reject"):
        return ""
    if any(later.iteration == attempt.iteration for later in step.attempts if later.number > attempt.number):
        return ""
    judge = state.steps[module.id]
    if judge.status != "looping" and step.iteration == attempt.iteration:
        # The run has not gone back: the judge has not spoken, or waits at its limit, or had reached it.
        last = judge.last
        if last is None or last.iteration != attempt.iteration or not _used_up(judge, last):
            return ""
        return f"accepted at the limit of {module.id}"
    for judged in reversed(judge.attempts):
        if judged.iteration != attempt.iteration:
            continue
        verdict, decision = judged.verdict, judged.decision
        if decision is not None and decision.action == "reject":
            return f"sent back by {one_line(decision.by, 60)}: {quoted(decision.feedback)}"
        if verdict is not None and verdict.action == "loop":
            score = f" ({verdict.score:g})" if verdict.score is not None else ""
            return f"sent back by {module.id}{score}" + (f": {quoted(verdict.reason)}" if verdict.reason else "")
        return ""
    return ""


def story(state: RunState, step: StepState) -> str:
    """What became of each attempt: ``attempt 1 rejected by you: “name the tests”; attempt 2 approved by you``."""
    told = [(attempt.number, outcome(state, step, attempt)) for attempt in step.attempts]
    if len(told) == 1:
        return told[0][1]
    return "; ".join(f"attempt {number} {words}" for number, words in told if words)


def loop_words(step: StepState) -> str:
    """A module's passes: ``1 loop 0.52 · 2 loop 0.71 · 3 continue 0.9 (max 5)``; ``""`` for other steps."""
    if not isinstance(step.step, Module) or not step.attempts:
        return ""
    chips = []
    for attempt in step.attempts[-12:]:
        verdict = attempt.verdict
        score = f" {verdict.score:g}" if verdict is not None and verdict.score is not None else ""
        chips.append(f"{attempt.number} {verdict.action if verdict is not None else _unjudged(attempt)}{score}")
    if len(step.attempts) > 12:
        chips.insert(0, "…")
    return f"{' · '.join(chips)} ({loop_limit(step)})"


def _unjudged(attempt: Attempt) -> str:
    if attempt.answer is not None:
        return "no verdict"
    return "failed" if attempt.error is not None else "cut short" if attempt.cut_short else "running"


def loop_limit(step: StepState) -> str:
    """``max 5``, with what a person has allowed beyond the limit, or ``no limit``."""
    most = step.step.loop_max_iterations if isinstance(step.step, Module) else None
    # From the attempts: the state forgets it when the loop has ended.
    judged = [one.decision for one in step.attempts if one.verdict is not None and one.verdict.action == "loop"]
    allowed = sum(decision.count for decision in judged if decision is not None and decision.action == "retry")
    return "no limit" if most is None else f"max {most + allowed}"


# -- lines and tables -------------------------------------------------------------------------------------------------


def event_line(state: RunState, event: BaseEvent) -> str | None:
    """The headless line for `event`, after it was applied to `state`; ``None`` when it is not worth a line."""
    words = _event_words(state, event)
    return f"cm: {words}" if words else None


def _event_words(state: RunState, event: BaseEvent) -> str | None:
    # One branch per kind of event; those that another line says anyway (TurnStarted, GateOpened of …) give none.
    if isinstance(event, RunStarted):
        said = source(state)
        return f"{one_line(state.name, 80)} started: {steps(len(state.order))}, mode {state.mode}" + (
            f", {said}" if said else ""
        )
    if isinstance(event, RunResumed):
        return f"{one_line(state.name, 80)} goes on" + (f": {one_line(event.reason)}" if event.reason else "")
    if isinstance(event, RunPaused):
        return "paused" + (f": {one_line(event.reason)}" if event.reason else "")
    if isinstance(event, RunUnpaused):
        return "goes on" + (f" as far as {event.until}" if event.until else "")
    if isinstance(event, ModeChanged):
        return f"mode {event.mode}"
    if isinstance(event, RunFinished):
        parts = [one_line(state.name, 80), event.status, *_short(run_total(state).words())]
        return " ".join(parts) + (f": {one_line(event.reason, 300)}" if event.reason else "")
    if isinstance(event, StepAdded):
        id = event.step.get("id") or event.step.get("agent")
        return f"{id} added" if id else None
    if isinstance(event, StepChanged):
        return f"{event.step.get('id') or event.step.get('agent')} changed"
    if isinstance(event, WorkflowChanged):
        anew, limits = ", ".join(_redefined(event)), ", ".join(starmap(amount, (event.limits or {}).items()))
        changed = (
            anew and f"the workflow is defined anew: {anew}",
            limits and f"{one_line(state.name, 80)} may use {limits} in all from now on",
        )
        return "; ".join(filter(None, changed)) or None
    if isinstance(event, StepRemoved):
        return f"{event.step} removed"
    if isinstance(event, StepOutdated):
        return f"{event.step} is made again: {event.by} has changed"
    if isinstance(event, StepSkipped):
        return f"{event.step} skipped: {one_line(event.reason)}"
    if isinstance(event, ToolCalled):
        # of these the gate or the call of agents has a line of its own
        return (
            None
            if event.name in BUILT_IN
            else f"{event.path} calls {_tool_name(event.name)} {one_line(event.arguments)}"
        )
    if isinstance(event, ToolReturned):
        did = "denied" if denied(event.text, event.failed) else "failed" if event.failed else "returned"
        if event.name in BUILT_IN and not event.failed:
            return None
        return f"{event.path}: {_tool_name(event.name)} {did}: {one_line(event.text)}"
    if isinstance(event, TurnFinished):
        return _turn_line(state, event)
    if isinstance(event, TurnFailed):
        step = state.members.get(event.path) or state.steps.get(event.path)
        again = (
            f"; {_again(state, step, event.retry_in_s)}" if step is not None and event.retry_in_s is not None else ""
        )
        return f"{event.path} failed: {one_line(event.error.message, 300)}{again}{_attempt(event.attempt)}"
    if isinstance(event, TurnCutShort):
        return f"{event.path} cut short: {one_line(event.reason or 'stopped')}{_attempt(event.attempt)}"
    if isinstance(event, GateOpened):
        if event.gate.kind == "failed":  # what failed was the line before
            return f"{event.gate.path} waits: {' · '.join(way.magic for way in ways(state, event.gate))}"
        return f"gate: {gate_sentence(state, event.gate)}"
    if isinstance(event, GateDecided):
        return f"{gate_path(event.gate_id)} {decided(state, event.decision)}"
    if isinstance(event, TellingFailed):
        return f"{gate_path(event.gate_id)} waits, and nobody was told: {one_line(event.reason, 300)}"
    if isinstance(event, AgentsCalled):
        groups = (", ".join(one.agent for one in group[:8]) + _left_out(len(group) - 8) for group in event.groups)
        return f"{event.path} calls {', then '.join(groups)}"
    if isinstance(event, StepFailed):
        return f"{event.path} is given up: nobody was there to decide"
    if isinstance(event, LoopedBack):
        module = state.steps.get(event.module)
        limit = f", {loop_limit(module)}" if module is not None else ""
        reason = event.reason if isinstance(event.reason, str) else state.text(event.reason)
        return f"{event.module} goes back to {event.to} (pass {event.iteration}{limit})" + (
            f": {one_line(reason)}" if reason else ""
        )
    if isinstance(event, Rewound):
        return f"back {'at' if event.afresh else 'to'} {event.to}{', paused' if event.afresh else ''}"
    if isinstance(event, RunForked):
        return f"forked at {event.step}: a run of its own from here on"
    if isinstance(event, SnapshotTaken):
        many = f"{event.total:,} file{'' if event.total == 1 else 's'}"
        if event.when == "kept":
            return f"{event.path}: {many} changed since the last snapshot, kept before the files are taken back"
        return f"{event.path}: {many} changed" if event.when == "after" and event.total else None
    if isinstance(event, SnapshotFailed):
        return (
            event.reason if event.lasting else f"{event.path}: no snapshot of its files: {one_line(event.reason, 300)}"
        )
    if isinstance(event, WorkspaceRestored):
        return f"{event.path}: the files are as they were before it"
    return None


def _tool_name(name: str) -> str:
    return one_line(name, 80)


def tool_lines(attempt: Attempt) -> list[str]:
    """What an attempt did with tools: ``→ add {"a": 2}``, ``← 5`` or ``✗ why not``."""
    lines = []
    for use in attempt.tools:
        lines.append(f"→ {_tool_name(use.name)} {one_line(use.arguments)}")
        if use.text is not None:
            lines.append(f"{'✗' if use.failed else '←'} {one_line(use.text)}")
    return lines


_FILE_WORDS = {"added": "new", "deleted": "deleted", "modified": "changed", "renamed": "renamed", "mode": "mode"}
FILES_SHOWN = 50
"""Changed files of an attempt that are listed."""


def files_words(attempt: Attempt) -> str:
    """How many files an attempt changed: ``2 files changed``; ``""`` for none."""
    many = attempt.files_total
    return f"{many:,} file{'' if many == 1 else 's'} changed" if many else ""


def file_lines(attempt: Attempt) -> list[str]:
    """The files that an attempt changed: ``changed todo.py (+3 -1)``."""
    lines = []
    for change in attempt.files_changed[:FILES_SHOWN]:
        was = f" from {one_line(change.old_path)}" if change.old_path is not None else ""
        count = f" (+{change.added} -{change.removed})" if change.added or change.removed else ""
        lines.append(f"{_FILE_WORDS[change.kind]} {one_line(change.path)}{was}{count}")
    if (more := attempt.files_total - len(lines)) > 0:
        lines.append(f"and {more:,} more")
    return lines


def files_notes(step: StepState, attempt: Attempt) -> list[str]:
    """What is to be said about the files of an attempt besides: what was taken back for it, what is not kept."""
    notes = []
    which = "" if attempt is step.last else f", attempt={attempt.number}"
    if attempt.restored:
        notes.append("It began with the files as they were before the step.")
    if attempt.kept is not None:
        many = f"{attempt.kept_total:,} file{'' if attempt.kept_total == 1 else 's'}"
        notes.append(
            f"Until then {many} had been changed since the last snapshot; that is kept, and comes back with "
            f"`run.restore_files({step.path!r}, 'kept'{which})`."
        )
    if attempt.unkept:
        notes.append(f"No snapshot of its files: {one_line(attempt.unkept, 300)} Reject leaves them as they are.")
    return notes


def tool_words(attempt: Attempt) -> str:
    """Which tools an attempt called: ``called add (3 times), remove; 1 failed, 1 denied``; ``""`` for none.

    While the attempt goes on, one that has not returned does not count: it may be waiting for a permission.
    """
    names: dict[str, int] = {}
    for use in attempt.tools:
        if use.text is None and attempt.ended_at is None:
            continue
        names[_tool_name(use.name)] = names.get(_tool_name(use.name), 0) + 1
    denied = sum(use.denied for use in attempt.tools)
    failed = sum(use.failed for use in attempt.tools) - denied
    said = [f"{name} ({count} times)" if count > 1 else name for name, count in names.items()]
    wrong = ", ".join(f"{count} {word}" for count, word in ((failed, "failed"), (denied, "denied")) if count)
    return f"called {', '.join(said)}{f'; {wrong}' if wrong else ''}" if said else ""


def _left_out(count: int) -> str:
    return f" and {count} more" if count > 0 else ""


_LIMITED = {"max_cost_usd": "cost", "max_tokens": "tokens", "max_turns": "turns"}


def _redefined(event: WorkflowChanged) -> Iterator[str]:
    yield from (f"input {one_line(name, 80)}" for name in {**event.defaults, **event.inputs})
    if event.autonomous_mode is not None:
        yield f"autonomous mode {str(event.autonomous_mode).lower()}"
    if event.sub_agents is not None:
        yield f"sub-agents {', '.join(event.sub_agents) or 'none'}"
    yield from (f"agent {one_line(agent.get('id', ''), 80)}" for agent in event.agents)
    if event.max_concurrency is not None:
        yield f"at most {event.max_concurrency} at work"
    if event.engine is not None:
        yield f"engine {one_line(event.engine, 80) or 'as configured'}"
    for name, most in (event.default_limits or {}).items():
        yield f"limit {amount(name, most)}" if most is not None else f"no limit of {_LIMITED[name]}"


def _attempt(number: int) -> str:
    return f" (attempt {number})" if number > 1 else ""


def _short(words: Iterable[str]) -> list[str]:
    """As in a log: no space between number and ``s``."""
    return [word.replace(" s", "s").replace(" min", "min").replace(" h", "h") for word in words]


def _turn_line(state: RunState, event: TurnFinished) -> str:
    step = state.members.get(event.path) or state.steps.get(event.path)
    attempt = next((a for a in step.attempts if a.number == event.attempt), None) if step is not None else None
    action = event.verdict.action if event.verdict is not None else "continue"
    word: str = "ok" if action == "continue" else action
    if event.verdict is not None and event.verdict.score is not None:
        word += f" ({event.verdict.score:g})"
    took = spent(state, attempt) if attempt is not None else None
    paid = Spent(took, event.usage, event.cost_usd or 0.0, bool(event.cost_estimated))
    words = [event.path, word, *_short(paid.words())]
    if event.turn > 1:
        words.append(f"prompt {event.turn}")
    why = f": {one_line(event.verdict.reason)}" if event.verdict is not None and event.verdict.reason else ""
    # That no model was called is said once, not beside every answer.
    again = event.note == source(state) and attempt is not _first_offline(state)
    note = f"; {one_line(event.note)}" if event.note and not again else ""
    return " ".join(words) + _attempt(event.attempt) + why + note


def table(rows: list[list[str]], right: Iterable[int] = ()) -> list[str]:
    """Rows as aligned lines, two spaces between columns; `right`: columns whose cells end in line."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))] if rows else []
    ends = set(right)
    lines = []
    for row in rows:
        cells = enumerate(zip(row, widths, strict=True))
        placed = [cell.rjust(width) if column in ends else cell.ljust(width) for column, (cell, width) in cells]
        lines.append("  ".join(placed).rstrip())
    return lines


STATUS_COLUMNS = ("Step", "State", "Time", "Tokens", "Cost", "Attempts")


def status_rows(state: RunState, now: float | None = None) -> list[list[str]]:
    """A row of ``STATUS_COLUMNS`` for each step, and their sum."""
    rows = []
    for step in state.order:
        count = str(len(step.attempts) or "")
        rows.append([step.id, look(state, step).word, *_sums(taken(state, step, now)), count])
    attempts = sum(len(step.attempts) for step in state.order)
    rows.append(["total", run_look(state).word, *_sums(run_total(state, now)), str(attempts or "")])
    return rows


def _sums(taken: Spent) -> list[str]:
    estimated = taken.usage is not None and taken.usage.estimated
    count = taken.usage.input_tokens + taken.usage.output_tokens if taken.usage is not None else 0
    paid = cost(taken.cost_usd, estimated or taken.cost_estimated)
    return [duration(taken.seconds), tokens(count, estimated).removesuffix(" tok"), paid]


def status_table(state: RunState, now: float | None = None) -> str:
    """States, times, tokens and costs as an aligned table."""
    return "\n".join(table([list(STATUS_COLUMNS), *status_rows(state, now)], right=(2, 3, 4, 5)))


def headline(state: RunState, now: float | None = None) -> str:
    """Name, state, time, tokens, cost and source in one line."""
    parts = [run_look(state).word, *run_total(state, now).words(), fork_words(state), source(state)]
    return f"{one_line(state.name, 80)}: {' · '.join(filter(None, parts))}"


def step_lines(state: RunState, now: float | None = None) -> list[str]:
    """A line per step, with what became of it."""
    rows = []
    for step in state.order:
        rows.append(_step_row(state, step, taken(state, step, now), now, waits_for(state, step)))
    made, lines = iter(table(rows)), list[str]()
    for item in state.items:
        if isinstance(item, Separator):
            lines.append(f"  -- {one_line(item.text, 80)}".rstrip())
        else:
            lines += [f"  {next(made)}", *member_lines(state, state.steps[item.id], now)]
    return lines


def _step_row(state: RunState, step: StepState, took: Spent, now: float | None, waits: str = "") -> list[str]:
    spent_words = " ".join(took.words())
    again = retry_words(state, step, now) if step.status == "retrying" and state.ended is None else ""
    said = "; ".join(filter(None, (again, story(state, step), note(step), waits)))
    name = step.path.rpartition("/")[2]
    return [name, look(state, step).word, f"{spent_words}{f'  ({said})' if said and spent_words else said}"]


class Lanes(NamedTuple):
    """A step's team as it is shown: ``parts`` are captions of groups and members, in order."""

    columns: int
    """So many fit side by side; 0: a row for each."""
    parts: list[str | StepState]


COLUMNS = 3
"""Up to so many members of a group stand side by side."""


def lanes(state: RunState, step: StepState, shown: Container[str]) -> Lanes:
    """Those whom `step` itself has called and whose paths are among `shown`, group by group."""
    groups: dict[tuple[int, int, int], list[StepState]] = {}
    for member in step.members:
        groups.setdefault(member.group, []).append(member)
    parts: list[str | StepState] = []
    for key in sorted(groups):
        seen = [member for member in groups[key] if member.path in shown]
        if seen and len(groups) > 1:
            parts.append(_group_words(step, key, groups))
        parts += seen
    most = max(map(len, groups.values()), default=0)
    return Lanes(most if not step.depth and most <= COLUMNS else 0, parts)


def _group_words(
    step: StepState, key: tuple[int, int, int], groups: Mapping[tuple[int, int, int], list[StepState]]
) -> str:
    """What stands above a group: which one it is, and how far it is."""
    call, number, of = key
    calls = sorted({other[0] for other in groups})
    which = "attempt" if isinstance(step.step, Parallel) else "call"
    words = [f"{which} {calls.index(call) + 1}"] if len(calls) > 1 else []
    words += [f"group {number} of {of}"] if of > 1 else []
    before = groups.get((call, number - 1, of), [])
    if all(member.status == "pending" for member in groups[key]) and before:
        failed = any(member.status == "failed" for member in before)
        state = "not begun, as one before failed" if failed else "starts when those before have finished"
    else:
        state = finished_words(groups[key])
    return f"{_capital(', '.join(words))}: {state}"


def lane_name(member: StepState) -> str:
    """A member's name among its siblings; the first of an agent needs no number."""
    return member.path.rpartition("/")[2].removesuffix("#1")


def last_line(text: str, *, grows: bool = False) -> str:
    """The last line of a text that has words, without its Markdown marks; of one that `grows`, its end."""
    for line in reversed(text[-600:].splitlines()):
        if any(char.isalnum() for char in line):
            words = one_line(line.strip(" \t#>*-|").replace("**", "").replace("`", ""), 600)
            return f"…{words[-119:]}" if grows and len(words) > 120 else one_line(words, 160)
    return ""


def last_words(step: StepState, draft: str = "") -> str:
    """What a lane says below its name: what is being written there, the end of the answer, what went wrong."""
    if step.gate is not None and step.gate.kind == "question":
        return one_line(step.gate.payload.get("question", ""), 160)
    last = step.last
    if last is None or step.status in ("pending", "ready"):
        return ""
    if step.status in ("running", "calling"):
        return last_line(draft, grows=True)
    if last.answer is None and last.error is not None:
        return one_line(last.error.message, 160)
    return last_line(last.text)


MEMBERS = 20
"""So many of the agents that a step called are shown; of more, first those that want attention."""


def shown_members(
    state: RunState, step: StepState, kept: Container[str] = ()
) -> tuple[list[tuple[int, StepState]], str]:
    """Those of a step's team to be shown, with their depth, and what is to be said about the rest.

    `kept`: paths of those that are shown however they stand.
    """
    everybody = list(team(step))
    if len(everybody) <= MEMBERS:
        return everybody, ""
    calm = {"done", "pending", "skipped"}
    wanted = {member.path for _depth, member in everybody if member.path in kept}
    for _depth, member in everybody:
        if len(wanted) < MEMBERS and look(state, member).tone not in calm:
            wanted.add(member.path)
    chosen = [one for one in everybody if one[1].path in wanted]
    words: dict[str, int] = {}
    for _depth, member in everybody:
        if member.path not in wanted:
            word = look(state, member).word
            words[word] = words.get(word, 0) + 1
    rest = ", ".join(f"{count} {word}" for word, count in words.items())
    return chosen, f"{len(everybody) - len(chosen)} more: {rest}"


def member_lines(state: RunState, step: StepState, now: float | None = None) -> list[str]:
    """A line for each agent that `step` called, indented."""
    chosen, rest = shown_members(state, step)
    rows = [_step_row(state, member, total(state, member.attempts, now), now) for _depth, member in chosen]
    lines = [f"  {'  ' * depth}{line}" for (depth, _member), line in zip(chosen, table(rows), strict=True)]
    return [*lines, f"    {rest}"] if rest else lines


def run_text(state: RunState, now: float | None = None) -> str:
    """The run as ``text/plain``: its headline, a line per step with what became of it, and what comes next."""
    lines = [headline(state, now), *step_lines(state, now)]
    if state.unkept is not None:
        lines.append(_capital(one_line(state.unkept, 300)))
    lines.append(sentence(state, now))
    for gate in state.gates.values():
        lines.append("  " + " · ".join(way.magic for way in ways(state, gate)))
    return "\n".join(lines)


def show_text(
    state: RunState, step: StepState, attempt: Attempt | None = None, full: bool = False, more: str = ""
) -> str:
    """One step as ``text/plain``: a line about it, then its output; `full`: all of it, however long.

    `more`: the command that shows all of it, if not the magic.
    """
    shown = attempt if attempt is not None else step.last
    words = [f"{step.path}: {look(state, step).word}"]
    if shown is not None:
        words += [f"attempt {shown.number} of {step.attempt}"] if step.attempt > 1 else []
        words += [*total(state, [shown]).words(), outcome(state, step, shown)]
        words += [retry_words(state, step)] if step.status == "retrying" and shown is step.last else []
        if shown.note:
            words.append(one_line(shown.note))
    head = " · ".join(filter(None, words))
    tools = [f"  {line}" for line in tool_lines(shown)] if shown is not None else []
    files = _files(step, shown) if shown is not None else []
    head = "\n".join([head, *member_lines(state, step), *tools, *files])
    text = ""
    if step.gate is not None and step.gate.kind == "permission" and attempt is None:
        text = clean(requested(step.gate))
    elif shown is not None:
        text = clean(shown.text) if full else bounded(shown.text, more or show_command(step, shown))
        text += f"\n\n{clean(shown.diff)}" if full and shown.diff else ""
    return f"{head}\n\n{text}" if text else head


def _files(step: StepState, attempt: Attempt) -> list[str]:
    """What an attempt changed in the workspace, and what is to be said about it."""
    words = files_words(attempt)
    lines = [f"  {words}:", *(f"    {line}" for line in file_lines(attempt))] if words else []
    return [*lines, *(f"  {note}" for note in files_notes(step, attempt))]


def undriven(word: str) -> str:
    """How a run stands, given in a word, when nobody drives it."""
    return "interrupted" if word == "running" else f"{word}, not driven"


def runs_rows(runs: Iterable[Any]) -> list[list[str]]:
    """Rows (id, name, state, started) of runs given as ``(id, name, status, started_at)``."""
    rows = []
    for id, name, status, started_at in runs:
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(started_at)) if started_at else ""
        rows.append([one_line(id, 80), one_line(name, 80), one_line(status, 40), when])
    return rows
