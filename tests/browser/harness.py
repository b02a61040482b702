"""Drive JupyterLab and Notebook 7 in a real Chromium.

Three parts, each usable alone:

- `kernel_environment` makes a virtual environment with the project and one version of ipykernel.
- `JupyterServer` is a server on a free port of 127.0.0.1, with its own token and its own folders:
  nothing of the user's is read or written. It is its own process group, and only that group is ended.
- `Chromium` opens notebooks in tabs; a `NotebookPage` is one such tab.

Cells are started through the front end's own commands, so a test does not depend on menus, focus or the
place of a toolbar button. Clicks and keys go through the browser's input protocol: the page sees them as
trusted, as it sees a person's.

Tests use the fixture `open_notebook` of ``conftest.py``::

    def test_approve(open_notebook):
        nb = open_notebook(["%load_ext cm_notebook", "run = %cm run"], kernel="7.4", theme="dark")
        nb.run_all()
        nb.wait_text(1, "Waiting for you")
        nb.click("button", "Approve", cell=1)
        nb.wait_text(1, "completed")
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.resources
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock
from playwright.sync_api import (
    Browser,
    BrowserContext,
    ConsoleMessage,
    Dialog,
    Locator,
    Page,
    Playwright,
    sync_playwright,
)
from playwright.sync_api import Error as PlaywrightError
from playwright.sync_api import TimeoutError as PlaywrightTimeout

App = Literal["lab", "notebook"]
Theme = Literal["light", "dark"]
Cell = str | dict[str, Any]  # a code cell's source, or a whole nbformat cell

ROOT = Path(__file__).parents[2]
KERNELS = ("6.31", "7.3", "7.4")
"""The ipykernel versions that the project is tested with; each has its own virtual environment."""

CHROMIUM_FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
THEMES: dict[Theme, str] = {"light": "JupyterLab Light", "dark": "JupyterLab Dark"}
SETTINGS: dict[str, dict[str, Any]] = {
    # No "would you like news?" pop-up, and no request to the update server.
    "@jupyterlab/apputils-extension:notification": {"fetchNews": "false", "checkForUpdates": False},
    # Keep every cell in the page: a cell outside the viewport must still be found.
    "@jupyterlab/notebook-extension:tracker": {"windowingMode": "none"},
    # Save only when a test says so.
    "@jupyterlab/docmanager-extension:plugin": {"autosave": False},
}
FRONT_END_ERRORS = (
    # Notebook 7.6, while it starts: its shortcuts look at a plugin that is not loaded yet.
    "Cannot read properties of undefined (reading 'schema')",
)


# -- kernels ---------------------------------------------------------------------------------


def kernel_environment(version: str, folder: Path) -> Path:
    """Path of the Python of a virtual environment with ``ipykernel==<version>.*`` and the project.

    The project is installed editable, with its dependencies and pytest (which some notebooks run). The
    environment is made once and used again until ``pyproject.toml`` or the Python version changes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    venv = folder / f"ipykernel-{version}"
    python = venv / "bin" / "python"
    stamp = venv / "complete"
    recipe = "\n".join([sys.version, str(ROOT), (ROOT / "pyproject.toml").read_text(encoding="utf-8")])
    digest = hashlib.sha256(recipe.encode()).hexdigest()
    with FileLock(folder / f"ipykernel-{version}.lock"):
        if not (stamp.exists() and stamp.read_text(encoding="utf-8") == digest):
            _uv("venv", "--quiet", "--clear", "--python", sys.executable, str(venv))
            _uv(
                *("pip", "install", "--quiet", "--python", str(python)),
                *("--editable", str(ROOT), f"ipykernel=={version}.*", "pytest"),
            )
            stamp.write_text(digest, encoding="utf-8")
    return python


def _uv(*args: str) -> None:
    uv = os.environ.get("UV") or shutil.which("uv")
    if uv is None:
        raise RuntimeError("uv is not on PATH; the browser tests need it to make their kernels: pip install uv")
    done = subprocess.run(
        [uv, *args],
        env={**os.environ, "UV_PYTHON_DOWNLOADS": "never"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    if done.returncode != 0:
        raise RuntimeError(f"uv {' '.join(args)} ended with {done.returncode}:\n{done.stderr[-3000:]}")


# -- server ----------------------------------------------------------------------------------


class JupyterServer:
    """JupyterLab or Notebook 7 on a free port of 127.0.0.1; a context manager.

    Parameters
    ----------
    app
        ``"lab"`` or ``"notebook"``.
    """

    def __init__(self, app: App) -> None:
        self.app = app
        self.home = Path(tempfile.mkdtemp(prefix=f"cm-{app}-"))
        self.root = self.home / "files"
        self.token = secrets.token_hex(16)
        self.base = ""
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> JupyterServer:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def start(self, timeout_s: float = 90) -> None:
        """Start the server and wait until it answers."""
        self.root.mkdir()
        for plugin, values in SETTINGS.items():
            self.set_setting(plugin, values)
        port = _free_port()
        self.base = f"http://127.0.0.1:{port}"
        module, app_class = {"lab": ("jupyterlab", "LabApp"), "notebook": ("notebook", "JupyterNotebookApp")}[self.app]
        argv = [
            *(sys.executable, "-m", module, "--no-browser", "--allow-root", "--ip=127.0.0.1"),
            f"--ServerApp.port={port}",
            "--ServerApp.port_retries=0",
            f"--ServerApp.root_dir={self.root}",
            "--ServerApp.terminals_enabled=False",
            f"--IdentityProvider.token={self.token}",
            # The front end's own object, `window.jupyterapp`, runs cells and tells their state.
            f"--{app_class}.expose_app_in_browser=True",
            # The extension manager would ask a package index what there is.
            "--LabApp.extension_manager=readonly",
        ]
        with (self.home / "server.log").open("wb") as log:
            self._process = subprocess.Popen(
                argv,
                env=self._environment(),
                cwd=self.root,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        deadline = time.monotonic() + timeout_s
        while not self._answers():
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self.app} did not answer in {timeout_s} s:\n{self.log()[-3000:]}")
            time.sleep(0.1)

    def stop(self) -> None:
        """End kernels and server, and remove their folders."""
        if self._process is not None:
            with contextlib.suppress(OSError):
                self.api("POST", "/api/shutdown")
            try:
                self._process.wait(15)
            except subprocess.TimeoutExpired:
                os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()
        shutil.rmtree(self.home, ignore_errors=True)

    def api(self, method: str, path: str) -> Any:
        """What the server's REST API answers."""
        request = urllib.request.Request(
            self.base + path, method=method, headers={"Authorization": f"token {self.token}"}
        )
        with urllib.request.urlopen(request, timeout=15) as reply:
            body = reply.read()
        return json.loads(body) if body else None

    def add_kernel(self, name: str, python: Path, environment: Mapping[str, str] | None = None) -> None:
        """Offer a kernel of this name that runs on `python`, with `environment` added to the server's.

        Notebooks opened from now on can use it.
        """
        folder = self.home / "data" / "kernels" / name
        folder.mkdir(parents=True, exist_ok=True)
        spec = {
            "argv": [str(python), "-m", "ipykernel_launcher", "-f", "{connection_file}"],
            "display_name": name,
            "language": "python",
            "env": dict(environment or {}),
            "metadata": {"debugger": False},
        }
        (folder / "kernel.json").write_text(json.dumps(spec), encoding="utf-8")

    def set_setting(self, plugin: str, values: Mapping[str, Any]) -> None:
        """Set a front-end plugin's settings; pages opened from now on have them."""
        package, name = plugin.split(":")
        file = self.home / "settings" / package / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(values), encoding="utf-8")

    def set_theme(self, theme: Theme) -> None:
        """Set the theme of pages opened from now on."""
        self.set_setting("@jupyterlab/apputils-extension:themes", {"theme": THEMES[theme]})

    def end_sessions(self) -> None:
        """End every kernel that a notebook started."""
        for session in self.api("GET", "/api/sessions"):
            with contextlib.suppress(OSError):
                self.api("DELETE", f"/api/sessions/{session['id']}")

    def url(self, notebook: str) -> str:
        """Address that opens a notebook alone (a Lab workspace remembers its tabs, so each page gets its own)."""
        place = f"lab/workspaces/{secrets.token_hex(4)}/tree" if self.app == "lab" else "notebooks"
        return f"{self.base}/{place}/{notebook}?token={self.token}"

    def log(self) -> str:
        """What the server and its kernels have printed so far."""
        return (self.home / "server.log").read_text(encoding="utf-8", errors="replace")

    def _answers(self) -> bool:
        if self._process is not None and self._process.poll() is not None:
            raise RuntimeError(f"{self.app} ended with {self._process.returncode}:\n{self.log()[-3000:]}")
        try:
            return bool(self.api("GET", "/api/status"))
        except OSError:
            return False

    def _environment(self) -> dict[str, str]:
        """Environment of the server and its kernels: the user's, without settings or keys, in folders of its own."""
        unwanted = re.compile(r"(JUPYTER|IPYTHON|CM_|XDG_|PYTHON|VIRTUAL_ENV|PYTEST_).*|.*(_API_KEY|_TOKEN)")
        kept = {name: value for name, value in os.environ.items() if not unwanted.fullmatch(name)}
        return {
            **kept,
            "HOME": str(self.home),
            "IPYTHONDIR": str(self.home / "ipython"),
            "JUPYTER_CONFIG_DIR": str(self.home / "config"),
            "JUPYTER_DATA_DIR": str(self.home / "data"),
            "JUPYTER_RUNTIME_DIR": str(self.home / "runtime"),
            "JUPYTERLAB_SETTINGS_DIR": str(self.home / "settings"),
            "JUPYTERLAB_WORKSPACES_DIR": str(self.home / "workspaces"),
            "PYDEVD_DISABLE_FILE_VALIDATION": "1",
        }


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
    return port


# -- browser ---------------------------------------------------------------------------------


def find_chromium() -> str | None:
    """Path of Chromium: ``CM_CHROMIUM``, or ``chromium`` on PATH, or Debian's place; None if there is none."""
    asked = os.environ.get("CM_CHROMIUM")
    return shutil.which(asked) if asked else shutil.which("chromium") or shutil.which("/usr/bin/chromium")


class Chromium:
    """A headless Chromium with an empty profile; a context manager."""

    def __init__(self, executable: str) -> None:
        self.executable = executable
        self._contexts: dict[JupyterServer, BrowserContext] = {}

    def __enter__(self) -> Chromium:
        self._playwright: Playwright = sync_playwright().start()
        self._browser: Browser = self._playwright.chromium.launch(
            executable_path=self.executable, args=list(CHROMIUM_FLAGS)
        )
        return self

    def __exit__(self, *exc: object) -> None:
        with contextlib.suppress(PlaywrightError):
            self._browser.close()
        self._playwright.stop()

    def new_page(self, server: JupyterServer) -> Page:
        """A new tab for pages of this server.

        The tabs of one server share cache and cookies; those of two servers do not, because cookies do not tell
        the ports of one host apart.
        """
        if server not in self._contexts:
            self._contexts[server] = self._browser.new_context(viewport={"width": 1280, "height": 900})
        return self._contexts[server].new_page()

    def pages(self) -> list[Page]:
        """The open tabs."""
        return [page for context in self._contexts.values() for page in context.pages]

    def open(self, server: JupyterServer, notebook: Path, timeout_s: float = 60) -> NotebookPage:
        """Open a notebook in a new tab and wait until its kernel is ready."""
        page = NotebookPage(self, server, notebook)
        page.goto(timeout_s)
        return page


def write_notebook(path: Path, cells: Sequence[Cell], kernel: str) -> None:
    """Write a notebook of these cells for the kernel of this name."""
    code: dict[str, Any] = {"cell_type": "code", "metadata": {}, "execution_count": None, "outputs": []}
    whole = [code | {"source": cell} if isinstance(cell, str) else cell for cell in cells]
    notebook = {
        "nbformat": 4,
        "nbformat_minor": 5,
        "metadata": {"kernelspec": {"name": kernel, "display_name": kernel, "language": "python"}},
        "cells": [{"id": f"cell-{number}"} | cell for number, cell in enumerate(whole)],
    }
    path.write_text(json.dumps(notebook), encoding="utf-8")


# `panel()` is the open notebook: the same class in JupyterLab and in Notebook 7.
_IN_PAGE = """
window.cmTest = {
  panel() {
    const shell = window.jupyterapp?.shell;
    const isNotebook = w => w?.content?.widgets && w.sessionContext;
    return shell && [shell.currentWidget, ...shell.widgets('main')].find(isNotebook);
  },
  kernel() { return this.panel()?.sessionContext.session?.kernel; },
  ready() {
    const kernel = this.kernel();
    const connected = kernel?.connectionStatus === 'connected' && kernel.status === 'idle';
    return connected && this.panel().content.widgets.length > 0;
  },
  cell(i) { return this.panel().content.widgets[i]; },
  // "" before the run, "*" while the cell runs or is queued to run, then its number.
  prompt(i) {
    const prompt = this.cell(i).node.querySelector('.jp-InputPrompt')?.textContent ?? '';
    return prompt.replace(/[\\[\\]:\\s]/g, '');
  },
  // Not awaited: these commands resolve only when the cells have ended.
  start(command, i) {
    const { content } = this.panel();
    const cells = i === null ? content.widgets : [this.cell(i)];
    for (const cell of cells) if (cell.model.type === 'code') cell.model.executionCount = null;
    if (i !== null) { content.deselectAll(); content.activeCellIndex = i; }
    void window.jupyterapp.commands.execute(command);
  },
};
"""

# The front ends' `body` is 0 px high and hides what flows over it, so axe takes all of the page for invisible and looks
# at no contrast (nor at what is below the window): for as long as it looks, nothing around the output hides anything.
# Of text with an opacity it cannot tell what is behind (it is left as "incomplete"); that is computed here. Text in
# pictures is tested where they are drawn.
_AXE = """
async element => {
  const around = [];
  for (let one = element; one; one = one.parentElement) {
    if (getComputedStyle(one).overflow === 'hidden') around.push([one.style, one.style.overflow]);
  }
  for (const [style] of around) style.overflow = 'visible';
  const results = await axe.run(element, { elementRef: true }).finally(
    () => { for (const [style, before] of around) style.overflow = before; });
  const contrast = kind => results[kind].filter(rule => rule.id === 'color-contrast').flatMap(rule => rule.nodes);
  const parse = colour => {
    const [r, g, b, a = 1] = colour.match(/[\\d.]+/g).map(Number);
    return { rgb: [r, g, b], a };
  };
  const over = (front, a, back) => front.map((value, n) => value * a + back[n] * (1 - a));
  const light = rgb => {
    const [r, g, b] = rgb.map(v => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  // What is painted: from the outermost element in, each background, then the text, through each opacity on the way.
  const ratio = node => {
    const line = [];
    for (let one = node; one; one = one.parentElement) line.unshift(getComputedStyle(one));
    let back = [255, 255, 255], opacity = 1, behind = back;
    for (const css of line) {
      if (css.opacity < 1) { if (opacity === 1) behind = back; opacity *= css.opacity; }
      const { rgb, a } = parse(css.backgroundColor);
      back = over(rgb, a, back);
    }
    const { rgb, a } = parse(line.at(-1).color);
    const seen = [over(rgb, a, back), back].map(colour => light(over(colour, opacity, behind))).sort((x, y) => y - x);
    return (seen[0] + 0.05) / (seen[1] + 0.05);
  };
  const unsure = contrast('incomplete').map(node => node.element).filter(
    node => node.isConnected && !node.closest('svg'));  // a live view may have drawn it anew
  const faint = unsure.map(node => [ratio(node), node.outerHTML]).filter(([found]) => found < 4.5);
  return {
    violations: results.violations.map(({ id, impact, help, nodes }) => ({ id, impact, help, nodes })).map(
      rule => ({ ...rule, nodes: rule.nodes.map(({ html }) => ({ html })) })),
    looked: contrast('passes').length + contrast('violations').length,
    faint: faint.map(([found, html]) => `contrast of ${found.toFixed(2)} : 1: ${html.slice(0, 300)}`),
  };
}
"""


class NotebookPage:
    """A notebook that is open in a tab. Cells are numbered from 0; times are in seconds.

    Attributes
    ----------
    page
        Playwright's page, for what is not here.
    path
        The notebook's file; what the kernel writes to its working folder lies beside it.
    console_errors
        What the page has reported as an error: uncaught exceptions and ``console.error``, without the front
        ends' own (`FRONT_END_ERRORS`).
    """

    def __init__(self, browser: Chromium, server: JupyterServer, path: Path) -> None:
        self.browser, self.server, self.path = browser, server, path
        self.page: Page = browser.new_page(server)
        self.console_errors: list[str] = []
        self.page.on("console", self._on_console)
        self.page.on("pageerror", lambda error: self._add_error(f"uncaught: {error}"))
        self.page.on("dialog", self._on_dialog)
        self.page.add_init_script(_IN_PAGE)

    # -- the tab

    def goto(self, timeout_s: float = 60) -> None:
        """Open the notebook in this tab and wait until its kernel is ready."""
        self.page.goto(self.server.url(self.path.relative_to(self.server.root).as_posix()))
        self.wait_ready(timeout_s)

    def wait_ready(self, timeout_s: float = 60) -> None:
        """Wait until the notebook is shown and its kernel is connected and idle."""
        self._wait("cmTest.ready()", timeout_s, "the notebook and its kernel to be ready")

    def reload(self, timeout_s: float = 60, *, kernel_is_busy: bool = False) -> None:
        """Reload the page; what was not saved is lost."""
        self.page.reload()
        if kernel_is_busy:
            self._wait("cmTest.kernel()?.connectionStatus === 'connected'", timeout_s, "the kernel's connection")
        else:
            self.wait_ready(timeout_s)

    def second_tab(self, timeout_s: float = 60) -> NotebookPage:
        """Another tab on the same notebook and the same kernel."""
        return self.browser.open(self.server, self.path, timeout_s)

    def close(self) -> None:
        """Close the tab; the kernel goes on."""
        self.page.close()

    # -- cells

    def run_cell(self, cell: int) -> None:
        """Start a cell; `wait_done` waits for its end."""
        self.page.evaluate("i => cmTest.start('notebook:run-cell', i)", cell)

    def run_all(self) -> None:
        """Start all cells; `wait_done` of the last one waits for their end."""
        self.page.evaluate("() => cmTest.start('notebook:run-all-cells', null)")

    def wait_running(self, cell: int, timeout_s: float = 40) -> None:
        """Wait until the cell runs, or is queued to run."""
        self._wait(f"cmTest.prompt({cell}) === '*'", timeout_s, f"cell {cell} to start", cell)

    def wait_done(self, cell: int, timeout_s: float = 30) -> None:
        """Wait until the cell that was started has ended, well or with an error."""
        self._wait(f"/^\\d+$/.test(cmTest.prompt({cell}))", timeout_s, f"cell {cell} to end", cell)

    def is_running(self, cell: int) -> bool:
        """Whether the cell runs, or is queued to run."""
        return self.prompt(cell) == "*"

    def prompt(self, cell: int) -> str:
        """What stands beside the cell: ``""`` before it is run, ``"*"`` until it has ended, then its number."""
        return str(self.page.evaluate("i => cmTest.prompt(i)", cell))

    def count_cells(self) -> int:
        """How many cells the notebook has."""
        return int(self.page.evaluate("() => cmTest.panel().content.widgets.length"))

    def source(self, cell: int) -> str:
        """The cell's source, as it stands in the page."""
        return str(self.page.evaluate("i => cmTest.cell(i).model.sharedModel.getSource()", cell))

    # -- kernel and file

    def restart_kernel(self, timeout_s: float = 60) -> None:
        """Restart the kernel, as the front end's Restart does, and wait until it is ready."""
        self.page.evaluate("() => cmTest.panel().sessionContext.restartKernel()")
        self.wait_ready(timeout_s)

    def wait_idle(self, timeout_s: float = 30) -> None:
        """Wait until the kernel has nothing to do."""
        self._wait("cmTest.kernel()?.status === 'idle'", timeout_s, "an idle kernel")

    def save(self) -> dict[str, Any]:
        """Save the notebook; what now lies on disk."""
        self.page.evaluate("() => cmTest.panel().context.save()")
        return self.saved()

    def saved(self) -> dict[str, Any]:
        """The notebook as it lies on disk."""
        notebook: dict[str, Any] = json.loads(self.path.read_text(encoding="utf-8"))
        return notebook

    # -- look

    def cell(self, cell: int) -> Locator:
        """The cell's element."""
        return self.page.locator(".jp-NotebookPanel:not(.lm-mod-hidden) .jp-Notebook .jp-Cell").nth(cell)

    def output(self, cell: int) -> Locator:
        """The element of the cell's output, widgets included."""
        return self.cell(cell).locator(".jp-Cell-outputArea").first

    def text(self, cell: int) -> str:
        """The text that is to be seen in the cell's output."""
        outputs = self.output(cell).locator(":scope > .jp-OutputArea-child > .jp-OutputArea-output:visible")
        return "\n".join(outputs.all_inner_texts())

    def wait_text(self, cell: int, text: str, timeout_s: float = 40) -> None:
        """Wait until the cell's output shows this text."""
        self.wait_until(lambda: text in self.text(cell), timeout_s, f"{text!r} in the output of cell {cell}", cell)

    def wait_until(
        self, condition: Callable[[], object], timeout_s: float = 40, what: str = "it", cell: int | None = None
    ) -> None:
        """Wait until `condition()` is true; the error names `what` and shows the output of `cell`."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            if time.monotonic() > deadline:
                raise TimeoutError(self._missed(what, timeout_s, cell))
            self.page.wait_for_timeout(25)

    def screenshot(self, path: Path, cell: int | None = None) -> Path:
        """Write a PNG of the page, or of one cell."""
        path.parent.mkdir(parents=True, exist_ok=True)
        (self.page if cell is None else self.cell(cell)).screenshot(path=path)
        return path

    def accessibility_violations(self, cell: int) -> list[str]:
        """What axe-core finds wrong in the cell's output: one line for each rule, with the elements."""
        axe = importlib.resources.files("axe_playwright_python") / "axe.min.js"
        self.page.evaluate(axe.read_text(encoding="utf-8"))
        found = self.output(cell).evaluate(_AXE)
        assert found["looked"], "axe has looked at the contrast of no text"
        lines = [
            f"{rule['id']} ({rule['impact']}): {rule['help']}: " + "; ".join(node["html"] for node in rule["nodes"])
            for rule in found["violations"]
        ]
        return [*lines, *found["faint"]]

    # -- touch

    def by_role(self, role: Any, name: str, cell: int | None = None) -> Locator:
        """The elements with this ARIA role and exact name, in the cell's output or in the whole page."""
        place = self.page if cell is None else self.output(cell)
        return place.get_by_role(role, name=name, exact=True)

    def click(self, role: Any, name: str, cell: int | None = None, timeout_s: float = 40) -> None:
        """Click, with the mouse, the first element with this role and name, once it can be clicked."""
        self.by_role(role, name, cell).first.click(timeout=timeout_s * 1000)

    def press(self, key: str) -> None:
        """Press a key, or keys together as in ``"Shift+Enter"``, where the focus is."""
        self.page.keyboard.press(key)

    def type(self, text: str) -> None:
        """Type text where the focus is."""
        self.page.keyboard.type(text)

    # -- inside

    def _wait(self, expression: str, timeout_s: float, what: str, cell: int | None = None) -> None:
        try:
            self.page.wait_for_function(f"() => {expression}", timeout=timeout_s * 1000)
        except PlaywrightTimeout:
            raise TimeoutError(self._missed(what, timeout_s, cell)) from None

    def _missed(self, what: str, timeout_s: float, cell: int | None) -> str:
        shown = "" if cell is None else f"\nOutput of cell {cell}:\n{self.text(cell)[-2000:]}"
        errors = "".join(f"\nConsole: {line}" for line in self.console_errors[-5:])
        return f"waited {timeout_s} s for {what}{shown}{errors}"

    def _on_console(self, message: ConsoleMessage) -> None:
        if message.type == "error":
            self._add_error(message.text)

    def _add_error(self, text: str) -> None:
        if not any(theirs in text for theirs in FRONT_END_ERRORS):
            self.console_errors.append(text)

    def _on_dialog(self, dialog: Dialog) -> None:
        with contextlib.suppress(PlaywrightError):
            dialog.accept()
