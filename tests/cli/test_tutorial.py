"""The tutorial: what is copied and what is kept, a real JupyterLab on loopback, a notebook with nobody there."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import nbformat
import pytest

from cm_notebook import cli, tutorial
from cm_notebook.errors import CodeMachineError, WorkflowError
from tests.helpers import until

STEP = [
    "%load_ext cm_notebook",
    "%cm workflow w --tape tapes/w.jsonl",
    "%%cm step planner --interactive\nPlan it.",
]
TAPE = [
    {"tape": 1, "run": "w-1"},
    {"path": "planner", "attempt": 1, "text": "1. Do it."},
    {"gate": {"path": "planner", "attempt": 1, "kind": "review"}, "decision": {"action": "approve"}},
]


def notebook(path: Path, title: str, *cells: str) -> None:
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(f"# {title}\n\nWords.")])
    book.cells += [nbformat.v4.new_code_cell(source) for source in cells]
    book.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(book, path)


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of notebooks in place of the shipped ones, and a home of its own."""
    folder = tmp_path / "shipped"
    (folder / "tapes").mkdir(parents=True)
    (folder / ".ipynb_checkpoints").mkdir()
    notebook(folder / "00-start-here.ipynb", "Start here", "1 + 1")
    notebook(folder / "01-human-in-the-loop.ipynb", "1 · Human in the loop", *STEP)
    notebook(folder / "02-supervised.ipynb", "2 · Supervised", "x = nothing")
    notebook(folder / ".ipynb_checkpoints" / "00-start-here-checkpoint.ipynb", "Old")
    (folder / "tapes" / "w.jsonl").write_text("\n".join(map(json.dumps, TAPE)), encoding="utf-8")
    (tmp_path / "home").mkdir()
    for name in [name for name in os.environ if name.startswith(("JUPYTER", "IPYTHON", "XDG_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("CM_NOTEBOOKS", str(folder))
    monkeypatch.delenv("CM_HEADLESS")
    return folder


def ran(*words: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "cm_notebook", "tutorial", *words]
    return subprocess.run(argv, capture_output=True, encoding="utf-8", timeout=110, stdin=subprocess.DEVNULL)


# -- which notebook ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "found"),
    [
        (None, "00-start-here"),
        ("00-start-here.ipynb", "00-start-here"),
        ("01", "01-human-in-the-loop"),
        ("1", "01-human-in-the-loop"),
        ("Human", "01-human-in-the-loop"),
        ("superv", "02-supervised"),
    ],
)
def test_a_notebook_is_found_by_number_or_part(shipped: Path, name: str | None, found: str) -> None:
    assert tutorial.resolve(name, tutorial.notebooks(shipped)).stem == found


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("02-suprvised", "there is no notebook '02-suprvised'. Did you mean '02-supervised'?"),
        ("7", "there is no notebook '7'. Notebooks: 00-start-here, 01-human-in-the-loop, 02-supervised."),
        ("e", "'e' may be 00-start-here or 01-human-in-the-loop or 02-supervised. Write more of it."),
    ],
)
def test_a_name_that_fits_none_or_several(shipped: Path, name: str, said: str) -> None:
    with pytest.raises(WorkflowError) as caught:
        tutorial.resolve(name, tutorial.notebooks(shipped))
    assert str(caught.value).startswith(said)


def test_the_list(shipped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["tutorial", "--list"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "00-start-here         Start here",
        "01-human-in-the-loop  1 · Human in the loop",
        "02-supervised         2 · Supervised",
    ]
    assert not Path(tutorial.FOLDER).exists()


def test_the_shipped_notebooks_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CM_NOTEBOOKS", raising=False)
    assert tutorial.source().name in ("notebooks", "_notebooks")
    assert tutorial.resolve(None, tutorial.notebooks(tutorial.source())).stem == "00-start-here"


def test_an_installation_without_notebooks_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CM_NOTEBOOKS", str(tmp_path))
    with pytest.raises(CodeMachineError, match="pip install cm-notebook"):
        tutorial.source()


# -- the copy ----------------------------------------------------------------------------------------------------------


def test_what_was_changed_is_kept_and_the_rest_is_brought_up_to_date(shipped: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    done = tutorial.copy(shipped, copy)
    names = ["00-start-here.ipynb", "01-human-in-the-loop.ipynb", "02-supervised.ipynb", "tapes/w.jsonl"]
    assert (done.written, done.kept) == (names, [])
    assert list(done.words(Path("copy"))) == ["4 files copied to copy"]
    assert list(tutorial.copy(shipped, copy).words(copy)) == []

    (copy / "00-start-here.ipynb").write_text("mine", encoding="utf-8")
    (copy / "my.ipynb").write_text("mine", encoding="utf-8")
    for name in names:  # a new version of all of them
        (shipped / name).write_text((shipped / name).read_text(encoding="utf-8") + "\n", encoding="utf-8")
    done = tutorial.copy(shipped, copy)
    assert (done.written, done.kept) == (names[1:], names[:1])
    assert (copy / "00-start-here.ipynb").read_text(encoding="utf-8") == "mine"
    assert (copy / "my.ipynb").read_text(encoding="utf-8") == "mine"
    assert list(done.words(copy))[1].startswith("Kept as you changed it: 00-start-here.ipynb. ")


def test_a_file_that_was_there_before_us_is_kept(shipped: Path, tmp_path: Path) -> None:
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "02-supervised.ipynb").write_text("mine", encoding="utf-8")
    (tmp_path / "copy" / tutorial.NOTE).write_text("not JSON", encoding="utf-8")
    assert tutorial.copy(shipped, tmp_path / "copy").kept == ["02-supervised.ipynb"]


def test_the_copies_are_trusted_and_those_of_others_are_not(shipped: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    tutorial.copy(shipped, copy)
    notebook(copy / "00-start-here.ipynb", "Changed", "2 + 2")
    tutorial.copy(shipped, copy)
    code = (
        "import sys, nbformat; from nbformat.sign import NotebookNotary; notary = NotebookNotary(); "
        "print([notary.check_signature(nbformat.read(file, as_version=4)) for file in sys.argv[1:]])"
    )
    files = [str(copy / "00-start-here.ipynb"), str(copy / "01-human-in-the-loop.ipynb")]
    seen = subprocess.run([sys.executable, "-c", code, *files], capture_output=True, text=True, check=True)
    assert seen.stdout == "[False, True]\n"


def test_a_folder_that_cannot_be_made_is_one_line(shipped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("file").touch()
    assert cli.main(["tutorial", "--to", "file/folder", "--no-browser"]) == 1
    assert capsys.readouterr().err == "cm-notebook: file/folder: Not a directory. Choose a folder: --to DIR\n"


# -- JupyterLab --------------------------------------------------------------------------------------------------------


def test_without_jupyterlab_it_says_what_to_install(
    shipped: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tutorial, "find_spec", lambda name: None)
    assert cli.main(["tutorial"]) == 1
    assert "pip install 'cm-notebook[lab]'" in capsys.readouterr().err
    assert Path(tutorial.FOLDER, "00-start-here.ipynb").exists()
    assert cli.main(["tutorial", "--execute"]) == 1
    assert "pip install nbclient" in capsys.readouterr().err


@pytest.mark.parametrize(("variable", "shown"), [("DISPLAY", True), ("BROWSER", True), ("LANG", False)])
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere there is always a display")
def test_a_browser_needs_a_display(monkeypatch: pytest.MonkeyPatch, variable: str, shown: bool) -> None:
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, "x")
    assert tutorial._has_display() is shown


@pytest.fixture
def lab(shipped: Path) -> Iterator[subprocess.Popen[str]]:
    """``cm-notebook tutorial human --no-browser``, where a token of somebody else's is set."""
    process = subprocess.Popen(
        [sys.executable, "-m", "cm_notebook", "tutorial", "human", "--no-browser"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        env={**os.environ, "JUPYTER_TOKEN": "theirs", "http_proxy": "http://127.0.0.1:9"},
    )
    yield process
    if process.poll() is None:
        process.terminate()  # it ends its server
    process.communicate(timeout=60)


def get(port: int, path: str, token: str | None) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("GET", path, headers={"Authorization": f"token {token}"} if token else {})
    reply = connection.getresponse()
    body = reply.read().decode()
    connection.close()
    return reply.status, body


@pytest.mark.timeout(180)
def test_jupyterlab_answers_on_loopback_until_it_is_stopped(lab: subprocess.Popen[str], tmp_path: Path) -> None:
    assert lab.stdout is not None
    assert lab.stdout.readline() == f"4 files copied to {tutorial.FOLDER}\n"
    assert lab.stdout.readline() == "\n"
    found = re.fullmatch(r"JupyterLab: (http://127\.0\.0\.1:\d+/lab/tree/\S+)\?token=(\w{48})\n", lab.stdout.readline())
    assert found is not None
    assert lab.stdout.readline() == "Stop it with Ctrl+C.\n"
    url, token = urlsplit(found[1]), found[2]
    port = url.port
    assert port is not None
    assert url.path == "/lab/tree/01-human-in-the-loop.ipynb"

    assert get(port, "/api/contents", None)[0] == 403
    assert get(port, "/api/contents", "theirs")[0] == 403
    status, body = get(port, "/api/contents", token)
    assert status == 200
    assert "01-human-in-the-loop.ipynb" in [item["name"] for item in json.loads(body)["content"]]
    status, page = get(port, url.path, token)
    assert status == 200
    assert tutorial.NO_NEWS in page

    server = int(Path(f"/proc/{lab.pid}/task/{lab.pid}/children").read_text().split()[0])
    assert token not in Path(f"/proc/{server}/cmdline").read_text()
    lab.send_signal(signal.SIGINT)
    assert lab.wait(60) == 0
    assert "JupyterLab is stopped." in lab.stdout.read()
    assert not Path(f"/proc/{server}").exists()
    with pytest.raises(OSError), socket.create_connection(("127.0.0.1", port), timeout=5):  # noqa: PT011
        pass
    assert not list((tmp_path / "home").rglob("*page_config*"))


def test_a_server_that_does_not_start_is_one_line(
    shipped: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tutorial, "_command", lambda *args, **options: [sys.executable, "-c", "raise SystemExit(3)"])
    assert cli.main(["tutorial", "--no-browser"]) == 1
    assert capsys.readouterr().err.startswith("cm-notebook: JupyterLab did not start; ")


def test_a_port_that_is_taken_is_not_used() -> None:
    first = tutorial._free_port()
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", first))
        listener.listen()
        assert tutorial._free_port(first) != first


# -- headless ----------------------------------------------------------------------------------------------------------


def test_executed_the_steps_are_told_and_the_copy_stays_as_it_is(shipped: Path) -> None:
    done = ran("human", "--execute")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0].startswith("4 files copied")
    assert [line for line in lines if line.startswith("cm: planner ")][-1] == "cm: planner approved (recorded)"
    assert lines[-1] == "01-human-in-the-loop: 3 cells ran."
    copy = Path(tutorial.FOLDER, "01-human-in-the-loop.ipynb")
    assert copy.read_bytes() == (shipped / copy.name).read_bytes()


def test_executed_with_a_gate_that_nobody_answers(shipped: Path) -> None:
    tape = shipped / "tapes" / "w.jsonl"
    tape.write_text("\n".join(map(json.dumps, TAPE[:2])), encoding="utf-8")
    done = ran("01", "--execute")
    assert done.returncode == 3
    assert 'Stopped at the gate "planner": nobody can answer here.' in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_executed_with_a_cell_that_fails(shipped: Path) -> None:
    done = ran("02", "--execute")
    assert done.returncode == 1
    assert done.stderr == "cm-notebook: 02-supervised.ipynb, cell 2: NameError: name 'nothing' is not defined\n"


def test_executed_on_a_kernel_that_is_not_there(shipped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = shipped / "00-start-here.ipynb"
    file.write_text(file.read_text(encoding="utf-8").replace('"python3"', '"no-such-kernel"'), encoding="utf-8")
    done = ran("--execute")
    assert done.returncode == 1
    assert "needs the kernel 'no-such-kernel'" in done.stderr


def test_interrupted_it_takes_the_kernel_with_it(shipped: Path) -> None:
    said = "import os\nfrom pathlib import Path\nPath('kernel.tmp').write_text(str(os.getpid()))\n"
    said += "os.rename('kernel.tmp', 'kernel')\nimport time\ntime.sleep(100)"
    notebook(shipped / "00-start-here.ipynb", "Start here", said)
    argv = [sys.executable, "-m", "cm_notebook", "tutorial", "--execute"]
    process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    kernel = Path(tutorial.FOLDER, "kernel")
    until(kernel.exists, "the kernel", 60)
    process.send_signal(signal.SIGTERM)
    _, complaint = process.communicate(timeout=60)
    assert process.returncode == 4
    assert complaint.decode().splitlines()[-1] == "cm-notebook: stopped."
    assert b"Traceback" not in complaint
    assert not Path("/proc", kernel.read_text()).exists()
