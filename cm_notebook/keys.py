"""Keys of services: the one place that is asked for one, and what keeps them out of everything that is shown or kept.

Strategy: a key comes from the environment (``ANTHROPIC_API_KEY``), else from :func:`set`, which asks for it in a hidden
field and keeps it in this process's memory alone: no environment, so no child process gets it, no file, no object that
shows it. Every key that was handed out, or was there when a run began, is remembered, and :func:`hide` and
:class:`Hider` take it out of whatever comes back: a server may repeat it in an error or in an answer, and a function
may write it to a file. With no key there is nothing to do, and nothing is done.
"""

from __future__ import annotations

import os
from typing import NoReturn

from .config import SETTINGS
from .errors import WorkflowError, did_you_mean, typed

SHORTEST = 12
"""Characters of a key that is hidden; shorter ones are words like ``EMPTY``, which local servers want to be given."""
SHOWN = "[key]"
"""What stands in place of a key."""


class Key:
    """A key that is not shown, not even where local variables are."""

    __slots__ = ("_text",)

    def __init__(self, text: str) -> None:
        self._text = text

    def __bool__(self) -> bool:
        return bool(self._text)

    def __repr__(self) -> str:
        return "<key>" if self._text else "<no key>"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a key is not copied to anywhere.")

    def reveal(self) -> str:
        """The text: for a header, at the last moment."""
        return self._text


_typed: dict[str, Key] = {}
_known: dict[str, Key] = {}
"""All keys that anybody may have by now, by a name that tells them apart."""


def variable(engine: str) -> str:
    """The environment variable of an engine's key: ``OPENAI_API_KEY``."""
    return f"{engine.upper().replace('-', '_')}_API_KEY"


def find(engine: str) -> Key:
    """The key of `engine`; false if there is none."""
    key = Key(os.environ.get(variable(engine), "").strip()) or _typed.get(engine) or Key("")
    if len(key.reveal()) >= SHORTEST:
        _known[f"{engine} {source(engine)}"] = key
    return key


def learn() -> None:
    """Look up all keys that are here, so that they are hidden from now on, whoever uses them, and with whatever."""
    for engine in names():
        find(engine)


def source(engine: str) -> str:
    """Where its key comes from, ``""`` if there is none; never a part of it."""
    if os.environ.get(variable(engine), "").strip():
        return variable(engine)
    return "typed, for this session" if engine in _typed else ""


def sources() -> dict[str, str]:
    """Where the key of each engine that takes one comes from; ``""``: it has none."""
    return {name: source(name) for name in names()}


def names() -> list[str]:
    """The engines that take a key: those that have an address, and those that were given one."""
    services = {name.removesuffix("_base_url") for name in SETTINGS if name.endswith("_base_url")}
    return sorted(services | _typed.keys())


def missing(engine: str) -> str:
    """What is to be said where `engine` needs a key and has none."""
    where = variable(engine)
    how = typed(
        f"Set {where} before starting Jupyter, or run `%cm keys set {engine}` (typed hidden, kept for this session "
        "only).",
        f"Set {where}.",
    )
    return f"No key for {engine}. {how}"


def refused(engine: str) -> str:
    """What is to be done where the key of `engine` was refused, which depends on where it comes from."""
    if source(engine) == (where := variable(engine)):
        how = typed(
            f"set that anew before starting Jupyter, or take it out (`del os.environ['{where}']`) and run "
            f"`%cm keys set {engine}`",
            "set that anew",
        )
        return f"It comes from {where}, which comes first: {how}."
    return typed(
        f"Type it again: `%cm keys set {engine}`, or set {where} before starting Jupyter.", f"Set {where} anew."
    )


def set(engine: str) -> None:
    """Ask for the key of `engine` in a hidden field, and keep it until this process ends.

    In a notebook ``%cm keys set anthropic``. A key is never written in a cell or in a program, where it would stay.

    Parameters
    ----------
    engine
        Its name: ``anthropic``.

    Raises
    ------
    WorkflowError    There is no such engine, the environment has a key for it, nobody can type here, or what was typed
                     is no key; nothing was changed.
    """
    _check(engine)
    if (where := source(engine)) == variable(engine):
        raise WorkflowError(f"{where} is set, and comes first. Take it out of the environment to use another key.")
    key = _typed_key(f"Key for {engine} (not shown): ", engine)
    if not key:
        raise WorkflowError("nothing was typed, and nothing was changed.")
    if not (key.reveal().isascii() and key.reveal().isprintable()):
        raise WorkflowError("what was typed is no key: it holds a character that no key has. Nothing was changed.")
    _typed[engine] = key
    find(engine)


def forget(engine: str) -> None:
    """Forget a key that :func:`set` has asked for.

    Raises
    ------
    WorkflowError    There is none; one of the environment stays there.
    """
    _check(engine)
    if engine not in _typed:
        where = source(engine)
        reason = f"it comes from {where}" if where else "there is none"
        raise WorkflowError(f"no key of {engine} was typed here: {reason}.")
    del _typed[engine]


def _check(engine: str) -> None:
    """Refuse what is no engine; the word is not repeated: it may be a key that was pasted in the wrong place."""
    from .engines.base import engine_names, find_engine

    known = engine_names()
    if engine not in known:
        near = did_you_mean(engine, known, "Engines") if len(engine) < SHORTEST else f"Engines: {', '.join(known)}."
        raise WorkflowError(f"there is no engine of that name. {near} The key is typed later, in a hidden field.")
    if getattr(find_engine(engine), "free", False):
        raise WorkflowError(f"{engine} calls no service, so it needs no key.")


def _typed_key(question: str, engine: str) -> Key:
    import getpass
    import warnings

    nobody = f"nobody can type a key here. Set {variable(engine)} in the environment, before it is started."
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", getpass.GetPassWarning)  # it would be seen while it is typed
            return Key(getpass.getpass(question).strip())
    except (NotImplementedError, EOFError, OSError, getpass.GetPassWarning):  # the first is a kernel's
        raise WorkflowError(nobody) from None


# -- hiding ------------------------------------------------------------------------------------------------------------


def known() -> tuple[str, ...]:
    """The keys that must not be in anything that is shown or kept."""
    return tuple(key.reveal() for key in _known.values()) if _known else ()


def hide(text: str) -> str:
    """`text` without any key."""
    for secret in known():
        text = text.replace(secret, SHOWN)
    return text


class Hider:
    """Hides keys in a text that comes in pieces: what may be the beginning of one waits for the next piece."""

    __slots__ = ("_held",)

    def __init__(self) -> None:
        self._held = ""

    def __bool__(self) -> bool:
        """Whether something still waits."""
        return bool(self._held)

    def __call__(self, piece: str, last: bool = False) -> str:
        """What may be shown by now; with `last`, all that is left."""
        if not _known:
            return piece
        text, self._held = hide(self._held + piece), ""
        if last:
            return text
        keep = max(_begun(text, secret) for secret in known())
        if keep:
            text, self._held = text[:-keep], text[-keep:]
        return text


def _begun(text: str, secret: str) -> int:
    """How many characters at the end of `text` may be the beginning of `secret`."""
    at = text.find(secret[0], max(0, len(text) - len(secret) + 1))
    while at >= 0:
        if secret.startswith(text[at:]):
            return len(text) - at
        at = text.find(secret[0], at + 1)
    return 0
