"""What all tests share: nobody is there, nothing of the user's is read, and runs are found by their journal."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from cm_notebook.config import SETTINGS
from tests.helpers import NOBODY


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test works in a folder of its own, with no settings from outside and somebody there to answer."""
    for name, setting in SETTINGS.items():
        service = name.removesuffix("_base_url")
        key = f"{service.upper()}_API_KEY" if service != name else None
        for variable in filter(None, (f"CM_{name.upper()}", setting.also, key)):
            monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("CM_HEADLESS", "0")
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def reachable() -> Iterator[Path]:
    """A folder in which ``powerless`` may write; one below ``tmp_path`` is out of its reach when root tests."""
    folder = Path(tempfile.mkdtemp())
    if os.geteuid() == 0:
        os.chown(folder, NOBODY, -1)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def headless(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is there."""
    monkeypatch.setenv("CM_HEADLESS", "1")
