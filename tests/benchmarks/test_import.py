"""How soon it is there: imported, and loaded into a kernel."""

from __future__ import annotations

import subprocess
import sys

import pytest
from jupyter_client.manager import start_new_kernel

from tests.benchmarks.measure import Time, new_process, paired

OURS = "import cm_notebook; print('done', flush=True)"
RUNS = "import cm_notebook; cm_notebook.Run; print('done', flush=True)"
FLOOR = """
import asyncio, sqlite3
from pydantic import BaseModel

class Fact(BaseModel):
    type: str
    text: str = ""

print("done", flush=True)
"""
UNWANTED = ("IPython", "httpx", "ipywidgets", "anywidget", "markdown_it", "ipykernel", "filelock")


def test_import(budget):
    pair = paired(lambda: new_process(OURS), lambda: new_process(FLOOR), rounds=12)
    budget("import cm_notebook; floor: a pydantic model, asyncio, sqlite3", pair.cpu, "ms", plus=40)


def test_import_what_a_run_needs(budget):
    pair = paired(lambda: new_process(RUNS), lambda: new_process(FLOOR), rounds=12)
    budget("the same, and what the first run loads", pair.cpu, "ms", plus=40, known=1.5)


@pytest.mark.parametrize("code", ["import cm_notebook", "import cm_notebook; cm_notebook.Run"])
def test_import_loads_nothing_heavy(code):
    code += f"; import sys; print([name for name in {UNWANTED} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_load_ext(budget):
    timed = """
import time
start = time.perf_counter(), time.process_time()
get_ipython().run_line_magic("load_ext", "cm_notebook")
assert "cm" in get_ipython().magics_manager.magics["line"], "the extension has not loaded"
print(time.perf_counter() - start[0], time.process_time() - start[1])
"""

    def ours() -> Time:
        manager, client = start_new_kernel(kernel_name="python3")
        try:
            said: list[str] = []

            def keep(message) -> None:
                if message["msg_type"] == "stream":
                    said.append(message["content"]["text"])

            client.execute_interactive("1 + 1", timeout=60, output_hook=lambda message: None)
            reply = client.execute_interactive(timed, timeout=60, output_hook=keep)["content"]
            assert reply["status"] == "ok", f"{reply['evalue']}\n{''.join(said)}"
            return Time(*map(float, "".join(said).splitlines()[-1].split()))
        finally:
            client.stop_channels()
            manager.shutdown_kernel(now=True)

    budget("%load_ext cm_notebook in a warm kernel", paired(ours, rounds=5).cpu, "ms", at_most=400)
