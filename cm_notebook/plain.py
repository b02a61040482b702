"""Plain data: dataclasses that compare and print by one method for all.

Strategy: ``@dataclass`` compiles these methods anew for each class at every import, a fifth of its time. So a plain
class says ``@dataclass(slots=True, eq=False, repr=False)`` and has them from here.
"""

from __future__ import annotations

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
