"""The doctor: what is here, what is missing, how to mend it. Through the public API only."""

from __future__ import annotations

import importlib
import socket
import sys
from pathlib import Path
from typing import Any

import pytest

import cm_notebook as cm
from cm_notebook.engines import base

METADATA = "Metadata-Version: 2.1\nName: {}\nVersion: 1.0\n"


def said_of(about: str) -> tuple[str, str, str]:
    """Word, finding and remedy."""
    found = [one for one in cm.doctor().findings if one.about.startswith(about)]
    assert len(found) == 1, found
    return found[0].word, found[0].found, found[0].remedy


@pytest.fixture
def packages(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Installs a package that offers an engine."""
    monkeypatch.setattr(base, "_engines", {})
    site = tmp_path_factory.mktemp("site")
    monkeypatch.syspath_prepend(str(site))

    def install(name: str, source: str) -> None:
        module = f"cm_test_{name}"
        (site / f"{module}.py").write_text(source)
        info = site / f"cm_{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(METADATA.format(f"cm-{name}"))
        (info / "entry_points.txt").write_text(f"[cm_notebook.engines]\n{name} = {module}:Engine\n")
        importlib.invalidate_caches()

    return install


def test_each_engine_is_listed_with_its_key_its_address_and_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-planted-0123456789abcdef")
    assert said_of("engine openai") == ("ok", "https://api.openai.com/v1; OPENAI_API_KEY is set", "")
    word, found, remedy = said_of("engine anthropic")
    assert (word, found) == ("off", "https://api.anthropic.com; ANTHROPIC_API_KEY is not set")
    assert remedy.startswith(
        "No key for anthropic. Set ANTHROPIC_API_KEY before starting Jupyter, or run `%cm keys set"
    )
    assert said_of("engine offline")[0] == "ok"
    assert "planted" not in cm.doctor().text + cm.doctor().html
    monkeypatch.setenv("CM_ENGINE", "anthropic:claude-sonnet-5")
    assert said_of("engine anthropic")[0] == "look", "what is in force is needed"
    assert cm.doctor().problems


def test_a_program_is_here_where_it_would_be_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert said_of("pytest") == ("ok", "is here", "")
    other = tmp_path / "pytest"
    other.write_text("#!/bin/sh\n")
    other.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setitem(sys.modules, "pytest", None)  # as where it is not installed
    found = "not found; only needed for quality gates that run tests"
    assert said_of("pytest") == ("off", found, "pip install pytest"), "another Python's does not count"
    assert said_of("git")[0] == "off"
    assert "git" not in [one.about for one in cm.doctor().problems]


def test_a_server_on_this_machine_is_there_or_not(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{server.getsockname()[1]}/v1"
        monkeypatch.setenv("CM_OLLAMA_BASE_URL", address)
        word, found, remedy = said_of("engine ollama")
        assert (word, found) == ("off", f"{address}; OLLAMA_API_KEY is not set")
        assert remedy == (
            "nothing listens there. Start its server, or say where it is: %config CM.ollama_base_url = 'http://…/v1'"
        )
        server.listen()
        assert said_of("engine ollama") == ("ok", f"{address}; OLLAMA_API_KEY is not set", "")


@pytest.mark.parametrize("password", ["hunter2", "at@hunter2"])
def test_a_password_in_an_address_is_not_told(password: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CM_VLLM_BASE_URL", f"https://me:{password}@models.example.com/v1")
    assert said_of("engine vllm")[1] == "https://models.example.com/v1; VLLM_API_KEY is not set"
    assert "hunter2" not in cm.doctor().text


@pytest.mark.parametrize(
    "url", ["nonsense", "foo bar", "localhost:8000/v1", "ftp://localhost/v1", "http://[", "http://localhost:nope/v1"]
)
def test_an_address_that_is_none_is_a_finding(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CM_VLLM_BASE_URL", url)
    word, _, remedy = said_of("engine vllm")
    assert (word, remedy) == (
        "off",
        f"the base URL {url!r} is not an address. Write it like https://api.example.com/v1.",
    )
    assert "engine in force" in cm.doctor().text
    assert said_of("engine offline")[0] == "ok"


def test_engines_of_packages_are_listed_and_a_broken_one_breaks_nothing_else(packages: Any) -> None:
    packages("good", "class Engine:\n    name = 'good'\n    about = 'my own'\n    async def stream(self, r): yield\n")
    packages("ill", "raise ImportError('no module\\nnamed flux')\n")
    packages("worse", "import sys\nsys.exit(3)\n")
    packages("none", "class Engine: pass\n")
    packages(
        "odd",
        "class Engine:\n    name = 'odd'\n    def stream(self, r): ...\n    @property\n    def about(self): 1 / 0\n",
    )
    assert said_of("engine good (package cm-good)") == ("ok", "my own", "")
    word, found, remedy = said_of("engine ill (package cm-ill)")
    assert (word, found) == ("look", "cannot be loaded: ImportError: no module named flux")
    assert remedy == "update cm-ill or remove it: pip install -U cm-ill"
    assert said_of("engine worse")[1] == "cannot be loaded: SystemExit: 3"
    assert "is no engine" in said_of("engine none")[1]
    assert said_of("engine odd")[1].startswith("cannot be loaded: ZeroDivisionError")
    assert said_of("engine offline")[0] == "ok"
    said = "the engine 'ill' of the package cm-ill cannot be loaded: ImportError: no module named flux. Update it"
    with pytest.raises(cm.EngineError, match=said):
        cm.Workflow("w", agents=[cm.Agent("a", "x", engine="ill")], steps="a").start()
