"""How soon it is there: imported, and loaded into a kernel."""

from __future__ import annotations

import subprocess
import sys

from jupyter_client.manager import start_new_kernel

from tests.benchmarks.measure import new_process, paired

OURS = "import cm_notebook; print('done', flush=True)"
FLOOR = """
import asyncio, sqlite3
from pydantic import BaseModel

class Fact(BaseModel):
    type: str
    text: str = ""

print("done", flush=True)
"""
UNWANTED = ("IPython", "httpx", "ipywidgets", "anywidget", "markdown_it", "ipykernel", "filelock", "importlib.metadata")


def test_import(budget):
    pair = paired(lambda: new_process(OURS)[1], lambda: new_process(FLOOR)[1], rounds=20)
    budget("import cm_notebook; floor: a pydantic model, asyncio, sqlite3", pair, "ms", clock="CPU", plus=40)


def test_import_loads_nothing_heavy():
    code = f"import sys, cm_notebook; print([name for name in {UNWANTED} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_load_ext(budget):
    def ours() -> float:
        manager, client = start_new_kernel(kernel_name="python3")
        try:
            said: list[str] = []

            def keep(message) -> None:
                content = message["content"]
                said.append(content.get("text") or "\n".join(content.get("traceback", ())))

            client.execute_interactive("import time; 1 + 1", timeout=60, output_hook=keep)
            timed = "_start = time.perf_counter()\n%load_ext cm_notebook\nprint(time.perf_counter() - _start)"
            reply = client.execute_interactive(timed, timeout=60, output_hook=keep)
            assert reply["content"]["status"] == "ok", "".join(said)
            return float(said[-1].split()[-1])
        finally:
            client.stop_channels()
            manager.shutdown_kernel(now=True)

    pair = paired(ours, lambda: float("nan"), rounds=5)
    budget("%load_ext cm_notebook in a warm kernel", pair.ours, "ms", clock="wall", at_most=400)
