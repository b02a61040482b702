"""The files of the workspace: the snapshots that attempts begin and end with, and what is taken back.

Strategy: a snapshot is the id of a tree. The run knows the last one, a step the one that it goes back to when it is
rejected (``files_before``) or rewound (``files_first``). Going back is only noted here (``restore``): the next turn of
the step does it before anything else and says so, and does it again if it dies in between.

What belongs to an attempt that was cut short or failed, and is tried again, belongs to the next one: a rejection takes
all of it back. What a person changed between two attempts does not: it is there before the second one. Whatever is in
the folder when files are taken back is in a snapshot by then, so nothing is lost.

Members of a team share the folder; what they change belongs to the step that called them.
"""

from __future__ import annotations

from ..errors import TransitionError
from ..events import NO_FILES, Ref, SnapshotFailed, SnapshotTaken, WorkspaceRestored
from ..runstate import Attempt, RunState, StepState
from .transitions import met


def files_before(state: RunState, step: StepState) -> str | None:
    """The snapshot from before the first attempt of `step`, since the run came to it; ``None``: there is none."""
    return step.files_first


def take_back(state: RunState, step: StepState, before: str | None) -> None:
    """The next turn of `step` begins with the files of that snapshot, unless they are as in it."""
    step.restore = before if before is not None and (state.loose or state.tree != before) else None


def begin_files(state: RunState, step: StepState, *, attempt: bool) -> None:
    """A turn of `step` begins, and a new `attempt` with it: until its files are looked at, what is known of them.

    Nobody else puts files into a folder that we have made; of any other nothing is known yet, nor of one where files
    are still to be taken back.
    """
    if not attempt:
        step.files_before = None  # a chained prompt: its rejection leaves what the ones before it did
    empty = state.workspace is None and state.tree == NO_FILES and step.restore is None
    if step.files_before is None and empty:
        step.files_before = NO_FILES
    if step.files_first is None:
        step.files_first = step.files_before
    if attempt and step.files_before is not None:
        step.attempts[-1].before = step.files_before


def forget_files(step: StepState) -> None:
    """What comes next is a beginning: its files are what they are then."""
    step.files_before, step.files_first, step.restore = None, None, None


def snapshot_taken(state: RunState, event: SnapshotTaken) -> None:
    """The files are kept: as an attempt begins, as it ends, or before they are taken back."""
    step, last = _about(state, event)
    if event.when == "kept":
        last.kept, last.kept_total = event.tree, event.total
    elif event.when == "before":
        again = len(step.attempts) > 1 and (step.attempts[-2].cut_short or event.tree == state.tree)
        if step.files_before is None or not again:
            step.files_before = event.tree
        step.files_first = step.files_first or step.files_before
        if last.after is None:  # else it is before a chained prompt
            last.before = step.files_before
    else:
        last.before, last.after = event.before, event.tree
        step.files_before = step.files_before or event.before
        step.files_first = step.files_first or event.before
        last.files_changed, last.files_total = event.changes, event.total
        last.patch = Ref(event.seq, "diff")
        state.texts[last.patch] = event.diff
    if event.unread:
        names = ", ".join(event.unread[:3]) + (f" and {len(event.unread) - 3} more" if len(event.unread) > 3 else "")
        last.unkept = f"{names} could not be read."
    state.tree, state.loose, state.unkept = event.tree, False, None


def snapshot_failed(state: RunState, event: SnapshotFailed) -> None:
    """The files could not be kept."""
    _step, last = _about(state, event)
    state.loose = True
    if event.lasting:
        state.unkept = event.reason
    else:
        last.unkept = event.reason


def workspace_restored(state: RunState, event: WorkspaceRestored) -> None:
    """The files are as they were."""
    step, last = _about(state, event)
    if step.restore != event.tree:
        raise TransitionError(f"the files of {step.path!r} are not to be taken back to {event.tree!r}.")
    step.restore, last.restored = None, True
    step.files_before = last.before = event.tree
    step.files_first = step.files_first or event.tree
    state.tree, state.loose = event.tree, False


def _about(state: RunState, event: SnapshotTaken | SnapshotFailed | WorkspaceRestored) -> tuple[StepState, Attempt]:
    step = met(state, event.path, event.type)
    last = step.last
    if step.caller or last is None or last.number != event.attempt:
        raise TransitionError(
            f"{event.type} names attempt {event.attempt} of {step.path!r}, which is at attempt {step.attempt}."
        )
    return step, last
