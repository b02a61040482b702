"""What a run tells those who watch it: recorded events, and the text that is being written.

Strategy: the run puts things in on its own thread; each watcher has a ``Feed`` and takes all there is in one go, on its
thread, when it is ready. It is woken once for any number of things, and text that nobody has taken yet is one piece, so
neither a fast agent nor a slow watcher costs anything.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from .events import AnyEvent
from .plain import Plain


@dataclass(slots=True, eq=False, repr=False)
class LiveText(Plain):
    """Text that an agent wrote just now. It is not an event: what counts is the answer at the end of the turn.

    ``kind``: what an agent thinks before it writes comes to the views alone, not to ``run.stream()``.
    """

    path: str
    attempt: int
    text: str
    kind: Literal["text", "thinking"] = "text"


class Feed:
    """What has happened since the last :meth:`take`.

    Parameters
    ----------
    wake
        Called on the run's thread when there is something to take, once until it is taken. It must be short. What it
        raises is logged, as nothing that watches a run may stop it.
    """

    def __init__(self, wake: Callable[[], None]) -> None:
        self._wake = wake
        self._lock = threading.Lock()
        self._things: list[AnyEvent | tuple[str, int, list[str], Literal["text", "thinking"]]] = []
        self._woken = False

    def wake(self) -> None:
        """Have it looked at, though there may be nothing to take: the run is given up."""
        with self._lock:
            wake, self._woken = not self._woken, True
        if wake:
            try:
                self._wake()
            except Exception:
                logging.getLogger("cm_notebook").exception("who watches a run could not be told of what happened")

    def put(self, event: AnyEvent) -> None:
        """Add a recorded event."""
        with self._lock:
            self._things.append(event)
        self.wake()

    def put_text(self, path: str, attempt: int, text: str, kind: Literal["text", "thinking"] = "text") -> None:
        """Add live text; what stands last and is of the same turn grows."""
        with self._lock:
            last = self._things[-1] if self._things else None
            if isinstance(last, tuple) and last[0] == path and last[1] == attempt and last[3] == kind:
                last[2].append(text)
                if len(last[2]) > 4096:
                    last[2][:] = ["".join(last[2])]
            else:
                self._things.append((path, attempt, [text], kind))
        self.wake()

    def take(self) -> list[AnyEvent | LiveText]:
        """Everything since the last time, in order."""
        with self._lock:
            things, self._things, self._woken = self._things, [], False
        return [
            LiveText(thing[0], thing[1], "".join(thing[2]), thing[3]) if isinstance(thing, tuple) else thing
            for thing in things
        ]
