"""A marker of this folder's own: most of its tests start kernels."""

from __future__ import annotations

import pytest


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: executes notebooks in kernels; for a quick look, -m 'not slow'")
