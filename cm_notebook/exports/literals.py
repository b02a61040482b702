"""Values as Python source, as a person would write them.

Strategy: what fits on its line stays there; what does not is broken at its commas, a part a line. A text of several
lines becomes a block between triple quotes, whose lines begin at the margin, so that nothing has to be taken off again:
evaluated, each literal is exactly the value it was made of. What does not print stands as its escape.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

LINE = 100
"""Characters of a line, where that is possible."""


class Code(str):
    """Python as it stands: a name, an expression."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class Call:
    """A call: of `name`, with values, or ``Code``, or calls again."""

    name: str
    values: Sequence[Any] = ()
    options: Mapping[str, Any] = field(default_factory=dict)


def write(value: Any, indent: int = 0, taken: int | None = None) -> str:
    """`value` as source.

    Parameters
    ----------
    indent
        Column at which its last line ends a bracket.
    taken
        Characters that stand beside it on its first line; by default those of `indent`.
    """
    line = _line(value)
    if line is not None and (indent if taken is None else taken) + len(line) <= LINE:
        return line
    if isinstance(value, Code):
        return value
    if isinstance(value, str):
        return _block(value) if "\n" in value else _pieces(value, indent)
    parts = _parts(value)
    if parts is None:
        return line or repr(value)
    opening, closing, rows = parts
    inner = indent + 4
    written = [f"{' ' * inner}{name}{write(part, inner, inner + len(name) + 1)},\n" for name, part in rows]
    return f"{opening}\n{''.join(written)}{' ' * indent}{closing}" if rows else opening + closing


def _parts(value: Any) -> tuple[str, str, list[tuple[str, Any]]] | None:
    """Brackets and what stands between them, each after what leads to it; ``None``: it has no parts."""
    if isinstance(value, Call):
        options = [(f"{name}=", part) for name, part in value.options.items()]
        return f"{value.name}(", ")", [*(("", part) for part in value.values), *options]
    if isinstance(value, dict):
        keys = ((_quoted(key) if isinstance(key, str) else _line(key), part) for key, part in value.items())
        return "{", "}", [(f"{key}: ", part) for key, part in keys]
    if isinstance(value, (set, frozenset)):
        opening, closing = ("{", "}") if isinstance(value, set) else ("frozenset({", "})")
        return opening, closing, [("", part) for part in sorted(value, key=repr)]
    if isinstance(value, (list, tuple)):
        opening, closing = ("[", "]") if isinstance(value, list) else ("(", ")")
        return opening, closing, [("", part) for part in value]
    return None


def _line(value: Any) -> str | None:
    """`value` on one line; ``None`` when it should not be."""
    if isinstance(value, Code):
        return value if "\n" not in value else None
    if isinstance(value, str):
        text = str.__str__(value)
        return _quoted(text) if text.count("\n") <= 1 and (len(text) <= 60 or "\n" not in text) else None
    if isinstance(value, bool) or value is None:
        return repr(value)
    if isinstance(value, float) and not math.isfinite(value):
        return f'float("{float(value)}")'
    for kind in (int, float, bytes):
        if isinstance(value, kind):
            return kind.__repr__(value)  # an enumeration's member is its value
    parts = _parts(value)
    if parts is None:
        return repr(value)
    opening, closing, rows = parts
    if not rows and isinstance(value, (set, frozenset)):
        return f"{type(value).__name__}()"
    made = []
    for name, part in rows:
        if (line := _line(part)) is None:
            return None
        made.append(name + line)
    alone = "," if isinstance(value, tuple) and len(made) == 1 else ""
    return f"{opening}{', '.join(made)}{alone}{closing}"


def _quoted(text: str) -> str:
    made = repr(text)
    return f'"{made[1:-1]}"' if made[0] == "'" and '"' not in text else made


def _pieces(text: str, indent: int) -> str:
    """A long text without line breaks: pieces, cut behind blanks, in parentheses."""
    pad = " " * (indent + 4)
    words = re.findall(r"[^ ]* +|[^ ]+$", text)
    lines = [""]
    for word in words:
        if lines[-1] and len(pad) + len(_quoted(lines[-1] + word)) > LINE:
            lines.append("")
        lines[-1] += word
    if len(lines) == 1:
        return _quoted(text)
    return "(\n" + "".join(f"{pad}{_quoted(line)}\n" for line in lines) + " " * indent + ")"


def _block(text: str) -> str:
    """Between triple quotes, line by line."""
    made = "".join(c if c == "\n" or (c != "\\" and c.isprintable()) else repr(c)[1:-1] for c in text)
    made = re.sub(r'"(?="|\Z)', r"\"", made)
    made = re.sub(r" (?=\n)", r"\\x20", made)  # editors take blanks off the ends of lines
    return f'"""\\\n{made}"""'
