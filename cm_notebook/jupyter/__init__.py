"""The notebook side: magics, views, and the bridge to the kernel. Nobody else imports it.

Strategy: ``load`` is what ``%load_ext cm_notebook`` does, ``unload`` takes all of it back, and either may be repeated.
What cells have said is kept by ``notebook.py`` and survives both. The view, which is slow to import, is loaded when the
first run is shown.
"""

from __future__ import annotations

import contextlib
from typing import Any

from .. import config, errors
from ..engines.base import configured_engine
from ..errors import CodeMachineError, GatePending


def load(shell: Any) -> None:
    """Register magic, completion, settings and clicks with `shell`, and say in one line what is here."""
    from . import bridge
    from .completion import make_matcher
    from .magics import CMMagics, Shown, keep_questions, show_pending
    from .notebook import notebook
    from .settings import Settings

    unload(shell)
    notebook.variables = lambda: shell.user_ns
    shown = Shown(shell)
    magics = CMMagics(shell, notebook, shown)  # puts itself among the configurables
    shell.register_magics(magics)
    formatter = shell.display_formatter.ipython_display_formatter
    for kind in Shown.TYPES:
        formatter.for_type(kind, shown)
    matcher = make_matcher(notebook)
    shell.Completer.custom_matchers.append(matcher)
    settings = Settings(parent=shell)
    shell.configurables.append(settings)
    shell.input_transformers_cleanup.append(keep_questions)
    GatePending.show, errors.has_magic = show_pending, True
    if config.setting("direct_clicks"):
        bridge.direct_clicks.install(bridge.kernel())
    shell.cm_notebook_parts = (matcher, keep_questions, (magics, settings), Shown.TYPES)
    print(_greeting())


def unload(shell: Any) -> None:
    """Take back what :func:`load` registered; a shell that has nothing of it is left as it is."""
    from . import bridge

    parts = getattr(shell, "cm_notebook_parts", None)
    if parts is None:
        return
    matcher, transformer, configurables, shown = parts
    del shell.cm_notebook_parts
    for table in shell.magics_manager.magics.values():
        table.pop("cm", None)
    shell.magics_manager.registry.pop("CMMagics", None)
    with contextlib.suppress(ValueError):
        shell.Completer.custom_matchers.remove(matcher)
    with contextlib.suppress(ValueError):
        shell.input_transformers_cleanup.remove(transformer)
    for configurable in configurables:
        with contextlib.suppress(ValueError):
            shell.configurables.remove(configurable)
    formatter = shell.display_formatter.ipython_display_formatter
    for kind in shown:
        formatter.pop(kind, None)
    GatePending.show, errors.has_magic = None, False
    bridge.direct_clicks.uninstall()


def _greeting() -> str:
    """Version, engine in force and why, and what to try next."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        number = version("cm-notebook")
    except PackageNotFoundError:  # a source tree on the path
        number = ""
    try:
        engine, where = config.lookup("engine")
        if where != "default":
            configured_engine()
        why = (
            "no model is called; %config CM.engine names another"
            if (engine, where) == ("offline", "default")
            else where
        )
        said = f"engine {engine} ({why})"
    except CodeMachineError as error:
        said = str(error)
    return f"cm_notebook {number} · {said} · next: %cm workflow my-workflow, or %cm? for examples"
