"""Fixtures for tests in a real browser: one Chromium and one server per front end for the whole session.

A test that uses them is marked ``browser`` by itself. Without Chromium such tests are skipped; where ``CI`` is
set they fail instead, so that a green run has really looked at the page.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path

import pytest

from tests.browser.harness import (
    KERNELS,
    App,
    Cell,
    Chromium,
    JupyterServer,
    NotebookPage,
    Theme,
    find_chromium,
    kernel_environment,
    write_notebook,
)

OpenNotebook = Callable[..., NotebookPage]

_REPORT = pytest.StashKey[pytest.TestReport]()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what needs the browser, and run it last: Playwright keeps an event loop open in the main thread."""
    for item in items:
        if "chromium" in getattr(item, "fixturenames", ()):
            item.add_marker("browser")
            if "[7.3]" in item.name:
                # ipykernel 7.1 to 7.3 may stop answering for ever, with or without us (ipykernel's issue 1554), or
                # miss the first message after a restart ("'_control_lock' expected a Lock")
                item.add_marker(pytest.mark.flaky(reruns=2))
    items.sort(key=lambda item: item.get_closest_marker("browser") is not None)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Keep the report for `open_notebook`; in CI, a browser test that was skipped has failed."""
    report = yield
    skipped = report.skipped and not hasattr(report, "wasxfail")
    if skipped and item.get_closest_marker("browser") and os.environ.get("CI"):
        report.outcome = "failed"
        report.longrepr = f"browser tests may not be skipped in CI: {report.longrepr}"
    item.stash[_REPORT] = report
    return report


@pytest.fixture(scope="session")
def chromium() -> Iterator[Chromium]:
    """The session's Chromium."""
    executable = find_chromium()
    if executable is None:
        pytest.skip("Chromium was not found: install it (apt-get install chromium), or set CM_CHROMIUM to its path")
    with Chromium(executable) as browser:
        yield browser


@pytest.fixture(scope="session")
def jupyter_server() -> Iterator[Callable[[App], JupyterServer]]:
    """Function that returns the session's server of a front end, and starts it at first use."""
    with contextlib.ExitStack() as running:
        servers: dict[App, JupyterServer] = {}

        def server(app: App) -> JupyterServer:
            if app not in servers:
                servers[app] = running.enter_context(JupyterServer(app))
            return servers[app]

        yield server


@pytest.fixture(params=KERNELS)
def kernel(request: pytest.FixtureRequest) -> str:
    """Each supported ipykernel version in turn."""
    version: str = request.param
    return version


@pytest.fixture(params=[*KERNELS, "notebook"])
def front(request: pytest.FixtureRequest) -> dict[str, str]:
    """Options of `open_notebook`: JupyterLab with each supported ipykernel in turn, then Notebook 7."""
    return {"app": "notebook"} if request.param == "notebook" else {"kernel": request.param}


@pytest.fixture
def open_notebook(
    request: pytest.FixtureRequest, chromium: Chromium, jupyter_server: Callable[[App], JupyterServer]
) -> Iterator[OpenNotebook]:
    """Function that opens a notebook in a new tab.

    It takes a list of cells, or the path of a notebook, which is copied together with the folder ``tapes`` beside it;
    ``app="lab" | "notebook"``; ``kernel=`` an ipykernel version; ``theme="light" | "dark"``; ``environment=`` more
    variables for its kernel. Each notebook has a folder of its own. When the test is over, its tabs are closed and its
    kernels ended; if it failed, a picture of each tab is in pytest's cache folder and the end of the server's log is in
    the report.
    """
    cache = request.config.cache
    name = re.sub(r"\W+", "-", request.node.name).strip("-")
    servers: list[JupyterServer] = []
    before = chromium.pages()

    def open_notebook(
        notebook: Sequence[Cell] | Path,
        *,
        app: App = "lab",
        kernel: str = KERNELS[-1],
        theme: Theme = "light",
        environment: Mapping[str, str] | None = None,
    ) -> NotebookPage:
        server = jupyter_server(app)
        servers.append(server)
        folder = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=server.root))
        kernel_name = f"ipykernel-{kernel}" + (f"-{folder.name}" if environment else "")
        server.add_kernel(kernel_name, kernel_environment(kernel, cache.mkdir("kernels")), environment)
        server.set_theme(theme)
        if isinstance(notebook, Path):
            path, cells = folder / notebook.name, json.loads(notebook.read_text(encoding="utf-8"))["cells"]
            if (tapes := notebook.parent / "tapes").is_dir():
                shutil.copytree(tapes, folder / "tapes")
        else:
            path, cells = folder / "notebook.ipynb", notebook
        write_notebook(path, cells, kernel_name)
        return chromium.open(server, path)

    yield open_notebook

    tabs = [page for page in chromium.pages() if page not in before]
    report = request.node.stash.get(_REPORT, None)
    if report is not None and report.failed:
        for number, tab in enumerate(tabs):
            tab.screenshot(path=cache.mkdir("browser-failures") / f"{name}-{number}.png")
        for server in dict.fromkeys(servers):
            report.sections.append((f"log of {server.app}", server.log()[-3000:]))
    for tab in tabs:
        tab.close()
    for server in dict.fromkeys(servers):
        server.end_sessions()
