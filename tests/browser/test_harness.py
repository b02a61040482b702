"""The harness does what the other browser tests rely on."""

from __future__ import annotations

import pytest

BUTTON = """
import ipykernel, ipywidgets
count = 0
def on_click(_):
    global count
    count += 1
    label.value = f"clicked {count}"
button, label = ipywidgets.Button(description="Press me"), ipywidgets.Label("not yet")
button.on_click(on_click)
print("ipykernel", ipykernel.__version__)
ipywidgets.VBox([button, label])
"""
TRUSTED = """
import anywidget
class Probe(anywidget.AnyWidget):
    _esm = '''export default {render({el}) {
      const button = document.createElement("button");
      button.textContent = "Probe";
      button.onclick = event => { button.textContent = event.isTrusted ? "trusted" : "not trusted"; };
      el.append(button);
    }}'''
Probe()
"""


def test_run_click_restart_and_second_tab(open_notebook, kernel):
    nb = open_notebook([BUTTON, "count"], kernel=kernel)
    assert nb.count_cells() == 2
    nb.run_cell(0)
    nb.wait_text(0, f"ipykernel {kernel}.")
    nb.wait_text(0, "not yet")
    nb.click("button", "Press me", cell=0)
    nb.wait_text(0, "clicked 1")

    nb.save()
    other = nb.second_tab()
    other.click("button", "Press me", cell=0)
    other.wait_text(0, "clicked 2")
    nb.wait_text(0, "clicked 2")
    other.run_cell(1)
    other.wait_done(1)
    assert other.text(1).strip() == "2"
    other.close()

    nb.restart_kernel()
    nb.run_cell(1)
    nb.wait_done(1)
    assert "NameError" in nb.text(1)
    assert nb.save()["cells"][1]["outputs"][0]["ename"] == "NameError"


@pytest.mark.parametrize("app", ["lab", "notebook"])
def test_clicks_are_trusted_and_themes_differ(open_notebook, app, tmp_path):
    backgrounds = {}
    for theme in ("light", "dark"):
        nb = open_notebook([TRUSTED], app=app, theme=theme)
        nb.run_all()
        nb.click("button", "Probe", cell=0)
        nb.wait_text(0, "trusted")
        assert "not trusted" not in nb.text(0)
        assert nb.screenshot(tmp_path / f"{theme}.png", cell=0).stat().st_size > 1000
        backgrounds[theme] = nb.page.evaluate(
            "() => getComputedStyle(document.body).getPropertyValue('--jp-layout-color1')"
        )
        assert nb.console_errors == []
    assert backgrounds["light"] != backgrounds["dark"]


PALE = """<div style="background:#fff;color:#000;position:relative"><input><p>fine</p><p style="color:#aaa">pale</p>
<span style="opacity:0.4">faint</span> <span style="opacity:0.9">fine</span></div>"""


def test_reload_keyboard_and_axe(open_notebook):
    nb = open_notebook([BUTTON, f"from IPython.display import HTML; HTML({PALE!r})"])
    nb.run_all()
    nb.wait_done(1)
    found = "\n".join(nb.accessibility_violations(1))
    assert "label (critical)" in found
    assert "color-contrast (serious)" in found
    for text in ("pale", "faint"):
        assert f">{text}<" in found
    assert ">fine<" not in found
    nb.save()
    nb.reload()
    nb.by_role("button", "Press me", cell=0).focus()
    nb.press("Enter")
    nb.wait_text(0, "clicked 1")
