"""``cm-notebook tutorial``: the shipped notebooks, copied to where one may write, and opened.

Strategy: the copy belongs to the person. A note beside it (``.shipped.json``) has the digest of each file as we wrote
it; a file that is no longer like that was changed, and is kept. JupyterLab gets a server of its own on loopback, whose
token and whose few settings (no news prompt) are in a folder that is gone when it ends, so nothing of the user's is
touched and the token is in no list of processes. ``--execute`` is the same notebook with nobody there.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import http.client
import json
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .errors import CodeMachineError, GatePending, WorkflowError, did_you_mean
from .loops import run_sync

FOLDER = "cm-notebook-tutorial"
NOTE = ".shipped.json"
START_S, END_S = 90.0, 15.0
"""Seconds that JupyterLab gets to answer after its start, and to end."""
NO_NEWS = "@jupyterlab/apputils-extension:announcements"
"""JupyterLab's plugin that asks about news, over the notebook, and looks for updates."""


def tutorial(name: str | None, to: Path | None = None, *, execute: bool = False, browser: bool = True) -> int:
    """Copy the notebooks, and open or execute the one that `name` means; returns the exit code.

    Raises
    ------
    CodeMachineError    There is no such notebook, the folder cannot be written, or a program is missing.
    GatePending         Executed, and a gate stayed undecided.
    """
    where = source()
    chosen = resolve(name, notebooks(where))
    folder = to if to is not None else Path(FOLDER)
    for line in copy(where, folder).words(folder):
        print(line, flush=True)
    if execute:
        return run_headless(folder / chosen.name)
    return open_lab(folder / chosen.name, browser=browser)


# -- which notebooks there are -----------------------------------------------------------------------------------------


def source() -> Path:
    """The folder of the shipped notebooks: in the wheel, or beside the package in a checkout.

    Raises
    ------
    CodeMachineError    It is not there.
    """
    package = Path(__file__).parent
    asked = os.environ.get("CM_NOTEBOOKS")  # for tests
    for folder in [Path(asked)] if asked else [package / "_notebooks", package.parent / "notebooks"]:
        if notebooks(folder):
            return folder
    raise CodeMachineError("the notebooks are not part of this installation. Install it again: pip install cm-notebook")


def notebooks(folder: Path) -> list[Path]:
    """The notebooks of a folder, in their order."""
    return sorted(folder.glob("*.ipynb"))


def listing(folder: Path) -> list[str]:
    """A line for each notebook: its name and its title."""
    from .render.text import table

    return table([[path.stem, _title(path)] for path in notebooks(folder)])


def _title(path: Path) -> str:
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            for line in "".join(cell["source"]).splitlines() if cell["cell_type"] == "markdown" else ():
                if line.startswith("# "):
                    return line[2:].strip()
    return ""


def resolve(name: str | None, found: list[Path]) -> Path:
    """The notebook that `name` means: all of its name, its number, or a part that only one has; the first for ``None``.

    Raises
    ------
    WorkflowError    None, or several.
    """
    if name is None:
        return found[0]
    wanted = name.removesuffix(".ipynb").lower()
    number = wanted.zfill(2) if wanted.isdigit() else wanted
    stems = {path.stem.lower(): path for path in found}
    if wanted in stems:
        return stems[wanted]
    fits = [path for stem, path in stems.items() if stem.startswith(f"{number}-")]
    fits = fits or [path for stem, path in stems.items() if wanted and wanted in stem]
    if len(fits) == 1:
        return fits[0]
    if fits:
        raise WorkflowError(f"{name!r} may be {' or '.join(path.stem for path in fits)}. Write more of it.")
    raise WorkflowError(f"there is no notebook {name!r}. {did_you_mean(wanted, [p.stem for p in found], 'Notebooks')}")


# -- the copy ----------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Copied:
    """What became of the files: those written now, and those left because they were changed."""

    written: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)

    def words(self, folder: Path) -> Iterator[str]:
        """What to tell about it."""
        if self.written:
            yield f"{len(self.written)} file{'s' if len(self.written) != 1 else ''} copied to {folder}"
        if self.kept:
            yield f"Kept as you changed it: {', '.join(self.kept)}. For a fresh copy: --to ANOTHER-FOLDER"


def copy(where: Path, folder: Path) -> Copied:
    """Bring `folder` up to date with the shipped files; what was changed there is kept.

    Notebooks that are as we shipped them are trusted: their saved outputs are shown as they were saved.

    Raises
    ------
    CodeMachineError    The folder cannot be written.
    """
    done, ours = Copied(), []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        note = folder / NOTE
        shipped = _read_note(note)
        for file in _files(where):
            place = file.relative_to(where)
            name, data, target = place.as_posix(), file.read_bytes(), folder / place
            there = _digest(target.read_bytes()) if target.exists() else None
            if there not in (None, _digest(data), shipped.get(name)):
                done.kept.append(name)
                continue
            if there != _digest(data):
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(data)
                done.written.append(name)
            shipped[name] = _digest(data)
            ours.append(target)
        note.write_text(json.dumps(shipped, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    except OSError as error:
        raise CodeMachineError(
            f"{error.filename or folder}: {error.strerror or error}. Choose a folder: --to DIR"
        ) from error
    _trust([file for file in ours if file.suffix == ".ipynb"])
    return done


def _files(where: Path) -> Iterator[Path]:
    """What is shipped: everything but what a run or an editor leaves behind."""
    for file in sorted(where.rglob("*")):
        parts = file.relative_to(where).parts
        if file.is_file() and not any(part.startswith((".", "__pycache__")) for part in parts):
            yield file


def _read_note(note: Path) -> dict[str, str]:
    with contextlib.suppress(OSError, ValueError):
        read = json.loads(note.read_text(encoding="utf-8"))
        return read if isinstance(read, dict) else {}
    return {}


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _trust(files: list[Path]) -> None:
    """Sign the notebooks for Jupyter; where that cannot be kept, they open all the same."""
    if find_spec("nbformat") is None:
        return
    nbformat: Any = import_module("nbformat")
    with contextlib.suppress(Exception):  # a home that cannot be written, a broken database
        notary = import_module("nbformat.sign").NotebookNotary()
        try:
            for file in files:
                notary.sign(nbformat.read(file, as_version=4))
        finally:
            notary.store.close()


# -- JupyterLab --------------------------------------------------------------------------------------------------------


def open_lab(notebook: Path, *, browser: bool = True) -> int:
    """Start JupyterLab on that notebook and stay until it ends; Ctrl+C ends it.

    Raises
    ------
    CodeMachineError    JupyterLab is not installed, or does not start.
    """
    if find_spec("jupyterlab") is None:
        raise CodeMachineError(
            f"JupyterLab is not installed: pip install 'cm-notebook[lab]', and run this again. "
            f"The notebooks are in {notebook.parent}, for any other Jupyter."
        )
    port, token = _free_port(), secrets.token_hex(24)
    with tempfile.TemporaryDirectory(prefix="cm-notebook-", ignore_cleanup_errors=True) as own:
        _write_settings(Path(own), token)
        search = os.pathsep.join(filter(None, (own, os.environ.get("JUPYTER_CONFIG_PATH"))))
        environment = {**os.environ, "JUPYTER_CONFIG_PATH": search}
        environment.pop("JUPYTER_TOKEN", None)  # it would count for more than ours
        server = subprocess.Popen(
            _command(notebook, port, Path(own), browser=browser and _has_display()),
            cwd=notebook.parent,
            env=environment,
            stdin=subprocess.DEVNULL,  # so that it does not ask whether Ctrl+C was meant
        )
        try:
            _await_answer(server, port, token)
            print(f"\nJupyterLab: http://127.0.0.1:{port}/lab/tree/{notebook.name}?token={token}")
            print("Stop it with Ctrl+C.", flush=True)
            return 1 if server.wait() else 0
        except KeyboardInterrupt:
            _end(server)
            print("\nJupyterLab is stopped.", flush=True)
            return 0
        finally:
            _end(server)


def _write_settings(own: Path, token: str) -> None:
    """What counts for this server only, in a folder that Jupyter reads before the user's; nobody else may read it."""
    (own / "labconfig").mkdir()
    page = {"disabledExtensions": {NO_NEWS: True}}
    (own / "labconfig" / "page_config.json").write_text(json.dumps(page), encoding="utf-8")
    server = {"IdentityProvider": {"token": token}}
    (own / "jupyter_server_config.json").write_text(json.dumps(server), encoding="utf-8")


def _command(notebook: Path, port: int, own: Path, *, browser: bool) -> list[str]:
    words = [
        sys.executable,
        "-m",
        "jupyterlab",
        notebook.name,
        "--ServerApp.log_level=ERROR",
        "--LabApp.log_level=ERROR",
    ]
    words += ["--ServerApp.ip=127.0.0.1", f"--ServerApp.port={port}", "--ServerApp.port_retries=0"]
    words += ["--ServerApp.base_url=/", "--ServerApp.certfile=", f"--ServerApp.root_dir={notebook.parent.absolute()}"]
    words += [f"--LabApp.workspaces_dir={own / 'workspaces'}"]  # the tabs of other days stay as they are
    if not browser:
        words.append("--no-browser")
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        words.append("--allow-root")
    return words


def _has_display() -> bool:
    """Whether a browser can show itself; without a display Python would start one in the terminal."""
    if sys.platform in ("win32", "darwin"):
        return True
    return any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER"))


def _free_port(first: int = 8888) -> int:
    for port in (*range(first, first + 50), 0):
        with socket.socket() as listener, contextlib.suppress(OSError):
            listener.bind(("127.0.0.1", port))
            return int(listener.getsockname()[1])
    raise CodeMachineError("no port of 127.0.0.1 is free.")


def _await_answer(server: subprocess.Popen[bytes], port: int, token: str) -> None:
    deadline = time.monotonic() + START_S
    while not _answers(port, token):
        if server.poll() is not None:
            raise CodeMachineError(
                "JupyterLab did not start; what it said is above. More about it: jupyter lab --debug"
            )
        if time.monotonic() > deadline:
            raise CodeMachineError(f"JupyterLab did not answer within {START_S:g} s.")
        time.sleep(0.1)


def _answers(port: int, token: str) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)  # never by way of a proxy
    try:
        connection.request("GET", "/api/status", headers={"Authorization": f"token {token}"})
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _end(server: subprocess.Popen[bytes]) -> None:
    """End the server with its kernels; it is killed if it does not."""
    if server.poll() is None:
        server.terminate()
        try:
            server.wait(END_S)
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            server.kill()
            server.wait()


# -- headless ----------------------------------------------------------------------------------------------------------


def run_headless(notebook: Path) -> int:
    """Execute the notebook with nobody there, in its folder, and print its steps' lines; the file stays as it is.

    Raises
    ------
    CodeMachineError    nbclient is not installed, or a cell failed; the message says which.
    GatePending         A gate stayed undecided.
    """
    if find_spec("nbclient") is None:
        raise CodeMachineError("executing needs nbclient: pip install nbclient ipykernel, and run this again.")
    from jupyter_client.kernelspec import NoSuchKernel
    from nbclient import NotebookClient
    from nbclient.exceptions import CellControlSignal, CellExecutionError, DeadKernelError

    class Client(NotebookClient):
        """Prints what a cell says about its steps as soon as it says it."""

        line = ""

        def process_message(self, msg: dict[str, Any], cell: Any, cell_index: int) -> Any:
            if msg["msg_type"] == "stream" and msg["content"]["name"] == "stdout":
                *lines, self.line = (self.line + msg["content"]["text"]).split("\n")
                for line in lines:
                    if line.startswith("cm: "):
                        print(line, flush=True)
            return super().process_message(msg, cell, cell_index)

    book = import_module("nbformat").read(notebook, as_version=4)
    quiet = ["--IPKernelApp.log_level=CRITICAL"]  # a kernel talks about loopback, and about being ended
    client = Client(book, resources={"metadata": {"path": str(notebook.parent)}}, timeout=None, extra_arguments=quiet)

    def hurry() -> None:
        client.shutdown_kernel = "immediate"  # else a cell that does not listen keeps its kernel for seconds

    try:
        _see_through(client.async_execute(env={**os.environ, "CM_HEADLESS": "1"}), hurry)
    except CellExecutionError as error:
        if error.ename == "GatePending":
            raise GatePending(error.evalue) from error
        raise CodeMachineError(f"{notebook.name}, cell {_failed(book)}: {error.ename}: {error.evalue}") from error
    except NoSuchKernel as error:
        raise CodeMachineError(f"{notebook.name} needs the kernel {error.name!r}: pip install ipykernel") from error
    except (CellControlSignal, DeadKernelError) as error:
        raise CodeMachineError(f"{notebook.name}: the kernel ended before the notebook did.") from error
    count = sum(1 for cell in book.cells if cell.cell_type == "code")
    print(f"{notebook.stem}: {count} cells ran.", flush=True)
    return 0


def _see_through(work: Coroutine[Any, Any, Any], hurry: Callable[[], object]) -> None:
    """Do `work` on another thread, for nbclient would take Ctrl+C for itself; then it is cancelled and tidies up.

    ``hurry`` is called before it is cancelled.

    The loop is the work's own. nbclient leaves a task behind that looks after the kernel and fails once it is gone;
    on a loop that ends with the work it is cancelled with it, and what it says then is for nobody.
    """
    begun: Future[Callable[[], object]] = Future()
    done: Future[None] = Future()

    async def doing() -> None:
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None

        def give_up() -> None:
            loop.set_exception_handler(lambda _loop, _context: None)
            hurry()
            task.cancel()

        begun.set_result(lambda: loop.call_soon_threadsafe(give_up))
        await work

    def on_thread() -> None:
        try:
            done.set_result(asyncio.run(doing()))
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=on_thread, name="cm-notebook-cells", daemon=True).start()
    try:
        run_sync(done)
    except KeyboardInterrupt:
        with contextlib.suppress(Exception, CancelledError):
            run_sync(begun, END_S)()
            run_sync(done, END_S)
        raise


def _failed(book: Any) -> int:
    """The number of the cell that failed, counted from 1."""
    for number, cell in enumerate(book.cells, 1):
        if any(output.output_type == "error" for output in cell.get("outputs", ())):
            return number
    return len(book.cells)
