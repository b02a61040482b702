"""Take the README's picture: notebook 02 in a real JupyterLab, waiting at its gate.

uv run python tests/notebooks/picture.py
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from tests.browser.harness import Chromium, JupyterServer, find_chromium, write_notebook  # noqa: E402

TARGET = ROOT / ".github" / "images" / "run-view.png"


def main() -> None:
    """Run the notebook as far as its gate, and save what its cell shows."""
    source = ROOT / "notebooks" / "02-supervised.ipynb"
    cells = json.loads(source.read_text(encoding="utf-8"))["cells"]
    for cell in cells:
        if cell["cell_type"] == "code":
            cell["outputs"], cell["execution_count"] = [], None
    place = next(n for n, cell in enumerate(cells) if "".join(cell["source"]) == "run = %cm run")
    executable = find_chromium()
    assert executable, "Chromium was not found: install it, or set CM_CHROMIUM to its path"
    with JupyterServer("lab") as server, Chromium(executable) as chromium:
        server.add_kernel("project", Path(sys.executable))
        shutil.copytree(source.parent / "tapes", server.root / "tapes")
        notebook = server.root / source.name
        write_notebook(notebook, cells, "project")
        page = chromium.open(server, notebook)
        page.run_all()
        page.wait_text(place, "reviewer is waiting for you", timeout_s=60)
        page.page.wait_for_timeout(1500)  # the last block of the answer, and the buttons
        page.screenshot(TARGET, place)
    print(f"{TARGET.relative_to(ROOT)}: {TARGET.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
