"""``%config CM``: the settings of ``config.py`` as IPython shows and sets them.

Strategy: one trait for each row of ``config.SETTINGS``, made from it; what is set goes to ``config.chosen``, where
everybody looks.
"""

from __future__ import annotations

from typing import Any

import traitlets
from traitlets.config import Configurable

from .. import config
from ..engines.base import configured_engine
from ..errors import CodeMachineError, did_you_mean
from . import bridge


class SettingRefused(BaseException):
    """A setting of ``%config CM`` cannot be.

    IPython's ``%config`` prints each ``Exception`` as a line and goes on with the cell, which would then run with what
    nobody wanted; this one ends the cell.
    """

    def _render_traceback_(self) -> list[str]:
        return [str(self)]


class _Base(Configurable):
    def update_config(self, config: Any) -> None:
        """What ``%config`` calls."""
        try:
            super().update_config(config)
        except traitlets.TraitError as error:
            raise SettingRefused(str(error)) from None

    def _load_config(self, cfg: Any, section_names: Any = None, traits: Any = None) -> None:
        """Take what was configured: by ``%config``, or in IPython's own configuration file.

        A trait tells only of a change, and choosing the default is no change to it: so not by observing. When a
        value is refused here, nothing is changed.
        """
        mine = self._find_my_config(cfg)
        for name in mine:
            if name not in config.SETTINGS and name[:1].islower():  # with a capital it is a section
                raise traitlets.TraitError(
                    f"There is no setting CM.{name}. {did_you_mean(name, config.SETTINGS, 'Settings')}"
                )
        for name, value in mine.items():
            if name in config.SETTINGS:
                _choose(name, value)
        super()._load_config(cfg, section_names=section_names, traits=traits)


def _choose(name: str, value: Any) -> None:
    before = dict(config.chosen)
    config.chosen[name] = value
    try:
        fitting = config.setting(name)
        if name == "engine":
            configured_engine()
    except CodeMachineError as error:
        config.chosen.clear()
        config.chosen.update(before)
        raise traitlets.TraitError(str(error)) from None
    if name == "direct_clicks":
        bridge.direct_clicks.enabled = bool(fitting)


def _trait(setting: config.Setting) -> Any:
    kind = traitlets.Bool if setting.kind == "switch" else traitlets.Unicode
    return kind(setting.default, allow_none=True, help=setting.meaning).tag(config=True)


Settings: Any = type("CM", (_Base,), {name: _trait(setting) for name, setting in config.SETTINGS.items()})
"""IPython calls it by its class's name: ``%config CM.engine = 'offline'``."""
