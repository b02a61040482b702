"""Values as texts that prompts can name: inputs and structured outputs.

Strategy: a text is kept once, at the event that brought it (``Ref``); prompts refer to it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ..events import Ref
from ..runstate import RunState


def take_inputs(state: RunState, seq: int, inputs: Mapping[str, Any]) -> None:
    """Inputs are known, and their texts may be referred to."""
    for name, value in inputs.items():
        here = Ref(seq, name)
        state.inputs[name] = value
        state.input_refs[name] = here
        state.texts[here] = as_text(value)
        if isinstance(value, dict):
            for key, inner in value.items():
                state.texts[Ref(seq, f"{name}.{key}")] = as_text(inner)


def take_fields(state: RunState, seq: int, output: Any) -> None:
    """The fields of a structured output may be referred to."""
    if isinstance(output, dict):
        for key, value in output.items():
            state.texts[Ref(seq, f".{key}")] = as_text(value)


def as_text(value: Any) -> str:
    """An input as it stands in a prompt: text as it is, everything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
