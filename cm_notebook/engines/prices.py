"""What tokens cost: a table with its date, and a user's own over it.

Strategy: a model is looked up by its name, or by its name without the date at its end; one that is in neither table
has no price, and nothing is guessed.
"""

from __future__ import annotations

import functools
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import lookup
from ..errors import WorkflowError

_TABLE = Path(__file__).with_name("prices.toml")
_DATED = re.compile(r"-(?:\d{8}|\d{4}-\d{2}-\d{2}|latest)$")
_KINDS = ("input", "output", "cached", "cache_write")


@dataclass(slots=True)
class Tokens:
    """What an exchange used. ``cached`` and ``cache_write`` are parts of ``input``; ``cost_usd``: by the service."""

    input: int = 0
    output: int = 0
    cached: int = 0
    cache_write: int = 0
    cost_usd: float | None = None


def cost_usd(price: Mapping[str, float] | None, tokens: Tokens) -> float | None:
    """US dollars: what the service said, else by the price; ``None`` without either."""
    if tokens.cost_usd is not None or price is None:
        return tokens.cost_usd
    plain = max(0, tokens.input - tokens.cached - tokens.cache_write)
    return (
        plain * price["input"]
        + tokens.cached * price.get("cached", price["input"])
        + tokens.cache_write * price.get("cache_write", price["input"])
        + tokens.output * price["output"]
    ) / 1e6


def price_of(model: str) -> Mapping[str, float] | None:
    """The price of `model`, if it is in a table.

    Raises
    ------
    WorkflowError    The user's table cannot be read.
    """
    own, where = lookup("prices")
    tables = [_read(str(_TABLE), _TABLE.stat().st_mtime_ns, "prices.toml")]
    if own:
        path = Path(own).expanduser()
        try:
            tables.insert(0, _read(str(path), path.stat().st_mtime_ns, where))
        except OSError as error:
            raise WorkflowError(f"prices {own!r} ({where}) cannot be read: {error.strerror}.") from None
    for table in tables:
        for name in (model, _DATED.sub("", model)):
            if name in table:
                return table[name]
    return None


@functools.lru_cache(maxsize=8)
def _read(file: str, stamp: int, where: str) -> dict[str, dict[str, float]]:
    try:
        models: Any = tomllib.loads(Path(file).read_text(encoding="utf-8"))["models"]
        for name, price in models.items():
            if not {"input", "output"} <= price.keys() <= set(_KINDS):
                raise ValueError(f"{name!r} has {', '.join(price)}; a price has input, output, and may have cached …")
            if not all(type(amount) in (int, float) and amount >= 0 for amount in price.values()):
                raise ValueError(f"{name!r} has a price that is no amount")
    except KeyError:
        raise WorkflowError(f"prices {file!r} ({where}): there is no table [models].") from None
    except (AttributeError, ValueError) as error:
        raise WorkflowError(f"prices {file!r} ({where}) cannot be read: {error}.") from None
    return dict(models)
