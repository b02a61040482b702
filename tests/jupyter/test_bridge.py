"""The bridge, in real kernels: clicks while a cell runs, waiting in a cell, who is there, outputs from threads.

Each test talks to a kernel of the environment it runs in, over sockets, as a front end does; so running this file in
environments with different ipykernels tests them all. A cell under test says "ready" before it waits and how it ended,
and waits itself for what should happen (10 s at most), so nothing here depends on the speed of the machine.
"""

import contextlib
import os
import queue
import signal
import subprocess
import sys
import time
import types
import uuid
from pathlib import Path

import ipykernel
import pytest
from jupyter_client import BlockingKernelClient
from jupyter_client.connect import write_connection_file
from jupyter_client.session import Session

from cm_notebook.jupyter import bridge

ROOT = Path(__file__).resolve().parents[2]
KERNEL_6 = ipykernel.version_info[0] == 6

SETUP = """
import asyncio, concurrent.futures, sys, threading, time
import comm
from cm_notebook import loops
from cm_notebook.jupyter import bridge
from cm_notebook.jupyter.bridge import direct_clicks

kernel = get_ipython().kernel
original = kernel.shell_stream._recv_callback
clicks, late = [], []

def reset():
    global answer
    clicks.clear(); late.clear()
    answer = concurrent.futures.Future()

def clicked(content):
    took_ms = (time.time() - content["sent"]) * 1000
    clicks.append({**content, "took_ms": took_ms, "thread": threading.current_thread().name})
    if content.get("raise"):
        raise ValueError("a handler's bug")
    if not answer.done():
        answer.set_result(content["n"])

view = comm.create_comm(target_name="cm-test")
view.on_msg(lambda message: late.append(message["content"]["data"]))
other = comm.create_comm(target_name="cm-test")
other.on_msg(lambda message: late.append(message["content"]["data"]))
reset()
installed = direct_clicks.install(kernel)
direct_clicks.register(view.comm_id, clicked)
print(installed, view.comm_id, other.comm_id)
"""

LOOP = "end = time.time() + 10\nwhile not answer.done() and time.time() < end: {}\nprint(answer.done())"
CELLS = {
    "computes": LOOP.format("sum(range(1000))"),
    "sleeps": LOOP.format("time.sleep(0.05)"),
    "awaits": LOOP.format("await asyncio.sleep(0.01)"),
    "awaits the run": "await loops.wait_detached(answer, 10); print(answer.done())",
    "waits": "bridge.wait_in_cell(answer, 10); print(answer.done())",
}
"""Ways of being busy until a click comes; each prints whether it came."""


class FrontEnd:
    """A kernel process and a client that plays the front end."""

    def __init__(self, folder, environment=None):
        file, _ = write_connection_file(str(folder / "kernel.json"), key=uuid.uuid4().hex.encode())
        self.log = (folder / "kernel.log").open("w+")
        command = [sys.executable, "-m", "ipykernel_launcher", "-f", file]

        # With JPY_PARENT_PID a kernel ends with us, even when we are killed.
        env = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "JPY_PARENT_PID": str(os.getpid()),
            "IPYTHONDIR": str(folder),
            **(environment or {}),
        }
        env.pop("CM_HEADLESS", None)
        self.process = subprocess.Popen(command, stdout=self.log, stderr=self.log, env=env)
        self.client = BlockingKernelClient()
        self.outputs = {}
        self.client.load_connection_file(file)
        self.client.start_channels(hb=False)  # a slow start must not look like a dead kernel
        try:
            self.client.wait_for_ready(timeout=60)
        except BaseException:
            self.close()
            raise

    def close(self):
        self.client.stop_channels()
        self.process.kill()
        self.process.wait()
        self.log.close()

    def said(self):
        """What the kernel wrote to its log."""
        return Path(self.log.name).read_text()

    def ask(self, code, *, allow_stdin=True, cell_id=None, silent=False):
        """Send a cell, and return its message id."""
        content = {"code": code, "silent": silent, "store_history": False, "user_expressions": {}}
        content |= {"allow_stdin": allow_stdin, "stop_on_error": False}
        message = self.client.session.msg("execute_request", content)
        if cell_id:
            message["metadata"] = message["metadata"] | {"cellId": cell_id}
        self.client.shell_channel.send(message)
        return message["header"]["msg_id"]

    def messages(self, timeout_s=30):
        """Everything the kernel publishes, until it has been silent for `timeout_s` (an error)."""
        while True:
            yield self.client.get_iopub_msg(timeout=timeout_s)

    def until(self, asked, text=None, timeout_s=30):
        """Wait for `text` in the output of that cell, or for the cell's end; returns the output so far."""
        output = self.outputs.setdefault(asked, [])
        for message in self.messages(timeout_s):
            if message["parent_header"].get("msg_id") != asked:
                continue
            if message["msg_type"] == "stream":
                output.append(message["content"]["text"])
            elif message["msg_type"] == "error":
                output.append("{ename}: {evalue}".format(**message["content"]))
            elif message["msg_type"] == "status" and message["content"]["execution_state"] == "idle":
                return "".join(output).strip()
            if text and text in "".join(output):
                return "".join(output)

    def interrupt(self, asked):
        """Press Stop until that cell has ended; one that comes before the cell waits may go unheard."""
        for _ in range(20):
            self.process.send_signal(signal.SIGINT)
            with contextlib.suppress(queue.Empty):
                return self.until(asked, timeout_s=1)
        raise AssertionError("the cell does not hear an interrupt")

    def run(self, code, **options):
        """Run a cell and return what it printed."""
        return self.until(self.ask(code, **options))

    def click(self, comm_id, session=None, method="custom", **content):
        """Send a widget's message, and return its message id."""
        data = {"method": method, "content": {"n": 1, "sent": time.time(), **content}}
        session = session or self.client.session
        message = session.msg("comm_msg", {"comm_id": comm_id, "data": data})
        session.send(self.client.shell_channel.socket, message)
        return message["header"]["msg_id"]


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    front_end = FrontEnd(tmp_path_factory.mktemp("kernel"))
    installed, front_end.view, front_end.other = front_end.run(SETUP).split()
    assert installed == "True"
    yield front_end
    front_end.close()


@pytest.fixture
def page(shared):
    """A kernel with the filter in place; the same for all tests of this file, cleared."""
    shared.run("reset(); direct_clicks.install(kernel); direct_clicks.enabled = True")
    return shared


@pytest.fixture
def fresh(tmp_path):
    """A kernel of one's own, for what cannot be undone."""
    front_end = FrontEnd(tmp_path)
    _, front_end.view, front_end.other = front_end.run(SETUP).split()
    yield front_end
    front_end.close()


# -- clicks while a cell runs ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cell", CELLS)
def test_a_click_is_heard_before_the_cell_ends(page, cell):
    if KERNEL_6 and cell in ("computes", "sleeps"):
        pytest.skip("ipykernel 6 reads nothing while a cell computes")
    asked = page.ask(f"print('ready', flush=True)\n{CELLS[cell]}")
    page.until(asked, "ready")
    page.click(page.view, n=7)
    assert page.until(asked) == "ready\nTrue"
    assert page.run("print([c['n'] for c in clicks], late)") == "[7] []"  # once, and not the usual way as well


def test_a_click_is_heard_when_no_cell_runs(page):
    asked = page.click(page.view, n=3)
    page.until(asked)
    assert page.run("print(answer.result(0))") == "3"


def test_the_page_is_told_that_its_click_is_dealt_with_and_that_the_cell_still_runs(page):
    asked = page.ask(f"print('ready', flush=True)\n{CELLS['awaits']}")
    page.until(asked, "ready")
    click = page.click(page.view)
    states = []
    for message in page.messages():
        if message["msg_type"] == "status":
            about = {asked: "cell", click: "click"}.get(message["parent_header"].get("msg_id"), "other")
            states.append((about, message["content"]["execution_state"]))
            if states[-1] == ("cell", "idle"):
                break
    assert states == [("click", "idle"), ("cell", "busy"), ("cell", "idle")]


def test_everything_else_takes_its_usual_way(page):
    page.until(page.click(page.other, n=1))  # a comm that is not registered
    page.until(page.click(page.view, n=2, method="update"))  # not a custom message
    assert page.run("print(len(clicks), [d['method'] for d in late])") == "0 ['custom', 'update']"
    page.run("direct_clicks.unregister(view.comm_id)")
    page.until(page.click(page.view, n=3))
    assert (
        page.run("print(len(clicks), late[-1]['content']['n']); direct_clicks.register(view.comm_id, clicked)") == "0 3"
    )


def test_the_switch_sends_every_message_the_usual_way(page):
    page.run("direct_clicks.enabled = False")
    page.until(page.click(page.view, n=4))
    assert page.run("print(len(clicks), late[0]['content']['n'])") == "0 4"


def test_forged_and_repeated_messages_are_refused(page):
    page.click(page.view, session=Session(key=b"not the kernel's key"), n=1)
    message = page.client.session.msg(
        "comm_msg", {"comm_id": page.view, "data": {"method": "custom", "content": {"n": 2, "sent": 0}}}
    )
    frames = page.client.session.serialize(message)
    for _ in range(2):
        page.client.shell_channel.socket.send_multipart(frames)
    page.until(page.click(page.view, n=3))
    assert page.run("print([c['n'] for c in clicks], late)") == "[2, 3] []"
    assert "Invalid Signature" in page.said()
    assert "Duplicate Signature" in page.said()


def test_a_bug_in_a_handler_is_logged_and_harms_nothing(page):
    page.until(page.click(page.view, n=1, **{"raise": True}))
    page.until(page.click(page.view, n=2))
    assert page.run("print([c['n'] for c in clicks])") == "[1, 2]"
    assert "a click could not be handled" in page.said()
    assert "a handler's bug" in page.said()


def test_odd_messages_harm_nothing(page):
    session, socket = page.client.session, page.client.shell_channel.socket
    for content in ({}, {"comm_id": page.view}, {"comm_id": page.view, "data": None}, {"comm_id": [1], "data": {}}):
        session.send(socket, session.msg("comm_msg", content))
    socket.send_multipart([b"no delimiter"])
    page.until(page.click(page.view, n=5))
    assert page.run("print([c['n'] for c in clicks])") == "[5]"


def test_uninstall_restores_and_install_may_be_repeated(page):
    page.run("direct_clicks.uninstall(); direct_clicks.uninstall()")
    assert page.run("print(kernel.shell_stream._recv_callback == original, direct_clicks.installed)") == "True False"
    page.until(page.click(page.view, n=1))
    assert page.run("print(len(clicks), len(late))") == "0 1"
    assert page.run("print(direct_clicks.install(kernel), direct_clicks.install(kernel))") == "True True"
    page.until(page.click(page.view, n=2))
    assert page.run("print([c['n'] for c in clicks], len(late))") == "[2] 1"
    callbacks = "sum(len(v) for v in get_ipython().events.callbacks.values())"
    assert page.run(f"a = {callbacks}; direct_clicks.uninstall(); b = {callbacks}; print(a - b)") == "2"


def test_a_reloaded_module_replaces_the_older_filter(fresh):
    fresh.run("""
import importlib
old = direct_clicks
bridge = importlib.reload(bridge)
installed = bridge.direct_clicks.install(kernel)
bridge.direct_clicks.register(view.comm_id, clicked)
""")
    fresh.until(fresh.click(fresh.view, n=1))
    assert fresh.run("print(installed, bridge.direct_clicks is old, [c['n'] for c in clicks])") == "True False [1]"
    fresh.run("bridge.direct_clicks.uninstall()")
    assert fresh.run("print(kernel.shell_stream._recv_callback == original)") == "True"


def test_a_filter_under_another_tools_lets_everything_through_when_uninstalled(fresh):
    fresh.run("""
stream = kernel.shell_stream
ours, loop = stream._recv_callback, stream.io_loop
seen = []
def theirs(frames):
    seen.append(1)
    return ours(frames)
bridge._on_loop(loop, lambda: stream.on_recv(theirs, copy=False))
""")
    fresh.run("direct_clicks.uninstall()")
    fresh.until(fresh.click(fresh.view, n=1))
    assert fresh.run("print(stream._recv_callback is theirs, len(seen) > 0, len(clicks), len(late))") == "True True 0 1"
    assert fresh.run("print(direct_clicks.install(kernel))") == "True"
    fresh.until(fresh.click(fresh.view, n=2))
    assert fresh.run("print([c['n'] for c in clicks], len(late))") == "[2] 1"


@pytest.mark.parametrize("missing", ["_recv_callback", "_recv_copy", "io_loop", "session", "shell"])
def test_install_refuses_a_kernel_that_is_not_as_expected(missing):
    async def usual(frames): ...

    stream = types.SimpleNamespace(_recv_callback=usual, _recv_copy=False, io_loop=None, on_recv=None)
    session = types.SimpleNamespace(feed_identities=None, deserialize=None, unpack=None, send=None)
    names = {"iopub_socket": None, "get_parent": None, "io_loop": None, "shell": None}
    kernel = types.SimpleNamespace(shell_stream=stream, session=session, **names)
    delattr(stream if hasattr(stream, missing) and missing != "io_loop" else kernel, missing)
    clicks = bridge.DirectClicks()
    assert clicks.install(kernel) is False
    assert not clicks.installed
    assert clicks.install(None) is False


# -- when a cell was asked for -----------------------------------------------------------------------------------------


def test_a_queued_cell_was_asked_for_before_the_one_before_it_ended(page):
    page.run("pass")  # so that the sender's shortest delay is known (ipykernel 6)
    first = page.ask("print('ready', flush=True); time.sleep(0.5); ended = time.time()")
    page.until(first, "ready")
    second = page.ask("print(ended - bridge.asked_at(), time.time() - bridge.asked_at())")
    waited, since = map(float, page.until(second).split())
    assert 0.2 < waited < 0.6
    assert since >= waited


def test_a_wrong_clock_of_the_front_end_does_not_matter(page):
    """Both kernels: the date that the page wrote counts at most relatively."""
    import datetime

    session = Session(key=page.client.session.key)
    for _ in range(2):
        content = {"code": "print(time.time() - bridge.asked_at())", "silent": False, "allow_stdin": True}
        message = session.msg("execute_request", content)
        message["header"]["date"] = datetime.datetime.now(datetime.UTC) - datetime.timedelta(hours=3)
        session.send(page.client.shell_channel.socket, message)
        age = float(page.until(message["header"]["msg_id"]))
    assert 0 <= age < 5


def test_arrival_times_are_bounded(page):
    page.run("keep, direct_clicks.REMEMBERED = direct_clicks.REMEMBERED, 3")
    for _ in range(5):
        page.run("pass")
    assert page.run("print(len(direct_clicks._arrivals)); direct_clicks.REMEMBERED = keep") == "3"


def test_without_the_filter_the_date_on_the_request_counts(page):
    page.run("direct_clicks.uninstall()")
    assert abs(float(page.run("print(time.time() - bridge.asked_at())"))) < 5


# -- waiting in a cell -------------------------------------------------------------------------------------------------


INTERRUPTED = {
    "sync": "bridge.wait_in_cell(answer, 20)",
    "await": "await loops.wait_detached(answer, 20)",
    "sync in a cell with await": "await asyncio.sleep(0); bridge.wait_in_cell(answer, 20)",
}


@pytest.mark.skipif(sys.platform == "win32", reason="sends a POSIX signal")
@pytest.mark.parametrize("cell", INTERRUPTED)
def test_an_interrupt_detaches_and_the_work_goes_on(page, cell):
    if KERNEL_6 and cell == "sync in a cell with await":
        pytest.skip("refused on ipykernel 6")
    asked = page.ask(f"print('ready', flush=True)\n{INTERRUPTED[cell]}")
    page.until(asked, "ready")
    error = page.interrupt(asked)
    assert "KeyboardInterrupt" in error or "CancelledError" in error
    assert page.run("print(answer.done())") == "False"
    page.until(page.click(page.view, n=9))
    assert page.run("print(bridge.wait_in_cell(answer, 5))") == "9"


@pytest.mark.skipif(not KERNEL_6, reason="about ipykernel 6")
def test_a_cell_with_await_is_not_turned_from_within(page):
    """Interrupted at the wrong moment, it would take the kernel with it."""
    said = page.run(INTERRUPTED["sync in a cell with await"])
    assert said.startswith("CodeMachineError: On ipykernel 6, a cell that holds an `await`")
    assert page.run(INTERRUPTED["sync in a cell with await"].replace("20", "0.05"), allow_stdin=False).startswith(
        "Timeout"
    )


def test_a_time_out_in_a_cell(page):
    assert page.run("bridge.wait_in_cell(answer, 0.05)").startswith("TimeoutError: not finished within 0.05 s")
    assert page.run("print(answer.done())") == "False"


def test_the_loop_is_turned_from_within_on_ipykernel_6_alone(fresh):
    assert fresh.run("print(hasattr(asyncio, '_nest_patched'), 'nest_asyncio2' in sys.modules)") == "False False"
    asked = fresh.ask(f"print('ready', flush=True)\n{CELLS['waits']}")
    fresh.until(asked, "ready")
    fresh.click(fresh.view)
    assert fresh.until(asked) == "ready\nTrue"
    assert fresh.run("print(hasattr(asyncio, '_nest_patched'))") == str(KERNEL_6)
    assert fresh.run("import asyncio; await asyncio.sleep(0.01); print(1)") == "1"  # the kernel is well


def test_where_nobody_is_there_nothing_is_turned(fresh):
    code = """
threading.Timer(0.1, answer.set_result, [1]).start()
print(bridge.wait_in_cell(answer, 10), hasattr(asyncio, "_nest_patched"))
"""
    assert fresh.run(code, allow_stdin=False) == "1 False"


def test_waiting_says_when_no_click_could_arrive(page):
    page.run("direct_clicks.uninstall(); direct_clicks.enabled = False")
    error = page.run("bridge.wait_in_cell(answer, 10)")
    assert error.startswith(f"CodeMachineError: This kernel (ipykernel {ipykernel.__version__}) cannot receive clicks")
    assert ("install ipykernel 7.4" in error) is KERNEL_6
    page.run("direct_clicks.install(kernel)")
    assert "cannot receive clicks" in page.run("bridge.wait_in_cell(answer, 10)")
    assert page.run("answer.set_result(1); print(bridge.wait_in_cell(answer))") == "1"  # nothing left to wait for


def test_waiting_for_work_on_the_kernels_own_loop(fresh):
    fresh.run("""
loop = asyncio.get_running_loop()
async def work():
    await asyncio.sleep(0.05)
    answer.set_result("worked")
task = loop.create_task(work())
""")
    said = fresh.run("answer.done() or print(bridge.wait_in_cell(answer, 10, loop=asyncio.get_running_loop()))")
    assert said in (("worked", "") if KERNEL_6 else ("",)) or "Use `await`" in said


def test_on_the_kernels_own_loop_a_sync_wait_is_refused_on_ipykernel_7(page):
    said = page.run("bridge.wait_in_cell(answer, 0.3, loop=asyncio.get_running_loop())")
    assert said.startswith("TimeoutError" if KERNEL_6 else "CodeMachineError: wait() was called on the event loop")


# -- who is there ------------------------------------------------------------------------------------------------------


def test_who_is_there_in_a_kernel(page):
    code = "print(bridge.somebody(), bridge.front_end(), bridge.kernel_version(), bridge.cell_id())"
    assert page.run(code, cell_id="c-1") == f"True jupyter {ipykernel.__version__} c-1"
    assert page.run(code, allow_stdin=False) == f"False headless {ipykernel.__version__} None"


def test_what_the_surroundings_say(page):
    look = "print(bridge.somebody(), bridge.front_end())"
    cases = [
        ("os.environ['CM_HEADLESS'] = '1'", True, "False headless"),
        ("os.environ['CM_HEADLESS'] = '0'", False, "True jupyter"),
        ("os.environ['CM_HEADLESS'] = ''; os.environ['SERVER_SOFTWARE'] = 'voila/0.5.8'", False, "True voila"),
        ("del os.environ['SERVER_SOFTWARE']; sys.modules['google.colab'] = sys", False, "True colab"),
        ("del sys.modules['google.colab']; __vsc_ipynb_file__ = '/a/b.ipynb'", True, "True vscode"),
        ("print(bridge.notebook_key()); del __vsc_ipynb_file__", True, "/a/b.ipynb\nTrue jupyter"),
        (
            "os.environ['JPY_SESSION_NAME'] = '/c/d.ipynb'; print(bridge.notebook_key())",
            True,
            "/c/d.ipynb\nTrue jupyter",
        ),
        ("del os.environ['JPY_SESSION_NAME']; print(bridge.notebook_key() == os.getcwd())", True, "True\nTrue jupyter"),
    ]
    page.run("import os; vscode = [os.environ.pop(n) for n in list(os.environ) if n.startswith('VSCODE_')]")
    for code, allow_stdin, expected in cases:
        assert page.run(f"{code}\n{look}", allow_stdin=allow_stdin) == expected, code


@pytest.mark.parametrize(("isatty", "expected"), [(True, (True, "terminal")), (False, (False, "none"))])
def test_without_a_kernel_a_terminal_is_somebody(monkeypatch, isatty, expected):
    monkeypatch.delenv("CM_HEADLESS", raising=False)
    monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(isatty=lambda: isatty))
    assert (bridge.somebody(), bridge.front_end()) == expected
    assert bridge.kernel() is None
    assert (bridge.kernel_version(), bridge.cell_id(), bridge.notebook_key()) == ("", None, str(Path.cwd()))
    assert abs(time.time() - bridge.asked_at()) < 1


def test_without_stdin_nobody_is_there(monkeypatch):
    monkeypatch.delenv("CM_HEADLESS", raising=False)
    monkeypatch.setattr(sys, "stdin", None)
    assert bridge.somebody() is False


# -- outputs from threads ----------------------------------------------------------------------------------------------


def test_an_update_from_a_thread_goes_where_the_slot_was_opened(page):
    opened = page.ask("slot = bridge.Slot.open({'text/plain': 'first', 'text/html': '<b>first</b>'})")
    shown = next(m for m in page.messages() if m["msg_type"] == "display_data")
    assert shown["parent_header"]["msg_id"] == opened
    later = page.ask("""
def update():
    slot.update({"text/plain": "second"})
    answer.set_result(1)
loops.engine_loop().call_soon_threadsafe(update)
answer.result(10)
""")
    updated = next(m for m in page.messages() if m["msg_type"] == "update_display_data")
    page.until(later)
    assert updated["content"]["transient"] == shown["content"]["transient"]
    assert updated["content"]["data"] == {"text/plain": "second"}


def test_an_update_is_not_caught_by_another_cells_capture(page):
    page.run("slot = bridge.Slot.open({'text/plain': 'first'})")
    page.ask(
        "%%capture\nthreading.Thread(target=slot.update, args=[{'text/plain': 'second'}]).start(); time.sleep(0.2)"
    )
    assert next(m for m in page.messages() if m["msg_type"] == "update_display_data")


def test_without_ipython_a_slot_prints(capsys):
    bridge.Slot.open({"text/plain": "planner ok", "text/html": "<b>planner ok</b>"}).update({"text/plain": "done"})
    assert capsys.readouterr().out == "planner ok\ndone\n"
