"""``%config CM``: the settings of ``config.py`` as IPython shows and sets them.

Strategy: one trait for each row of ``config.SETTINGS``, made from it; what is set goes to ``config.chosen``, where
everybody looks.
"""

from __future__ import annotations

from typing import Any

import traitlets
from traitlets.config import Configurable

from .. import config
from ..errors import CodeMachineError
from . import bridge


class _Base(Configurable):
    def __init__(self, **options: Any) -> None:
        self._filling = True
        super().__init__(**options)
        for name in config.SETTINGS:
            if name in config.chosen:
                setattr(self, name, config.chosen[name])
        self._filling = False
        self.observe(self._set, names=list(config.SETTINGS))

    def _set(self, change: Any) -> None:
        before = config.chosen.get(change.name)
        config.chosen[change.name] = change.new
        try:
            value = config.setting(change.name)
        except CodeMachineError as error:
            config.chosen[change.name] = before
            raise traitlets.TraitError(str(error)) from None
        if change.name == "direct_clicks":
            bridge.direct_clicks.enabled = bool(value)


def _trait(setting: config.Setting) -> Any:
    kind = traitlets.Bool if setting.kind == "switch" else traitlets.Unicode
    return kind(setting.default, allow_none=True, help=setting.meaning).tag(config=True)


Settings: Any = type("CM", (_Base,), {name: _trait(setting) for name, setting in config.SETTINGS.items()})
"""IPython calls it by its class's name: ``%config CM.engine = 'offline'``."""
