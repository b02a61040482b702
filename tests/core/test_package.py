"""The package: its names, and what it loads for them. Through the public API only."""

from __future__ import annotations

import subprocess
import sys

ASKED = """
import sys
import cm_notebook as cm

def loaded(name):
    return f"cm_notebook.{name}" in sys.modules

assert not loaded("run") and not loaded("engines.scripted"), "defining a workflow has no need of them"
assert not set(cm.__all__) - set(dir(cm))
assert cm.Run.__module__ == "cm_notebook.run" and "Run" in vars(cm)
assert loaded("run") and not loaded("engines.scripted")
assert not [name for name in cm.__all__ if getattr(cm, name) is None]
assert not set(vars(cm)) - set(dir(cm))
from cm_notebook import *
assert ScriptedEngine is cm.ScriptedEngine
try:
    cm.runns
except AttributeError as error:
    print(error)
"""


def test_names_are_there_when_they_are_asked_for():
    done = subprocess.run([sys.executable, "-c", ASKED], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("module 'cm_notebook' has no attribute 'runns'\n", "")
