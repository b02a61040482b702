"""Plain data: dataclasses that compare and print by one method for all.

Strategy: ``@dataclass`` compiles these methods anew for each class at every import, a fifth of its time. So a plain
class says ``@dataclass(slots=True, eq=False, repr=False)`` and has them from here. And what of anybody's values is no
plain data is said here too: whatever is recorded has to be read again.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import fields
from typing import Any


class Plain:
    """Base of a dataclass: equal to one of its class with equal fields; shown with them."""

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        if type(self) is not type(other):
            return NotImplemented
        mine: Any = self
        return all(getattr(self, one.name) == getattr(other, one.name) for one in fields(mine) if one.compare)

    def __repr__(self) -> str:
        mine: Any = self
        shown = ", ".join(f"{one.name}={getattr(self, one.name)!r}" for one in fields(mine) if one.repr)
        return f"{type(self).__qualname__}({shown})"


MOST_NESTED = 100
"""Lists and dicts in each other; readers of JSON give up at twice as many."""


def not_json(value: Any) -> str | None:
    """What `value` holds that JSON cannot say, in words: "nan, which JSON does not have"; ``None``: nothing."""
    try:
        json.dumps(value)
    except TypeError as error:
        found = re.search(r"Object of type (\w+)", str(error))
        return f"a value of type {found[1]}, which JSON does not have" if found else "a key that is no text"
    except ValueError:
        return "itself, so it has no end"
    except RecursionError:
        return _TOO_DEEP
    level = [value]
    for _ in range(MOST_NESTED):
        below: list[Any] = []
        for one in level:
            if isinstance(one, float) and not math.isfinite(one):
                return f"{float(one)!r}, which JSON does not have"
            if isinstance(one, dict):
                below += [*one, *one.values()]
            elif isinstance(one, (list, tuple)):
                below += one
        if not below:
            return None
        level = below
    return _TOO_DEEP


_TOO_DEEP = f"lists or dicts in each other, more than {MOST_NESTED} deep"
