"""The check of external links: what it collects, and what it says of each answer."""

from __future__ import annotations

import importlib.util
import json
import socket
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("check_links", ROOT / "tools/check_links.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def address() -> Iterator[str]:
    """A server on this machine that answers with the status in the path."""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status = int(self.path.rpartition("/")[2])
            self.send_response(status)
            if status == 301:
                self.send_header("Location", "/200")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Answer) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("status", "verdict"),
    [
        (200, "ok"),
        (301, "ok"),
        (404, "broken"),
        (410, "broken"),
        (403, "refused"),
        (429, "refused"),
        (503, "refused"),
    ],
)
def test_an_answer_is_told_from_a_page_that_is_gone(
    tool: ModuleType, address: str, status: int, verdict: str
) -> None:
    assert tool.check(f"{address}/{status}")[0] == verdict


def test_a_server_that_cannot_be_reached_is_no_broken_link(tool: ModuleType) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # not listening
        assert tool.check(f"http://127.0.0.1:{unused.getsockname()[1]}/")[0] == "unreachable"
    assert tool.check("https://nowhere.invalid/")[0] == "unreachable"


def test_placeholders_are_not_requested(tool: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tool.urllib.request, "urlopen", None)
    for prefix in tool.PLACEHOLDERS:
        for url in (prefix, f"{prefix}/issues", f"{prefix}.git"):
            assert tool.check(url) == ("placeholder", "")
        assert not tool.is_placeholder(f"{prefix}-fork")


def test_links_are_those_of_the_text(tool: ModuleType) -> None:
    text = (
        "See [this](https://a.example/x_(y)) and <https://b.example>, or https://c.example/z. "
        '<img src="https://d.example/i.svg"> `https://e.example/`'
    )
    assert tool.links(text) == {
        "https://a.example/x_(y", "https://b.example", "https://c.example/z", "https://d.example/i.svg",
        "https://e.example/",
    }  # fmt: skip


def test_links_of_a_notebook_are_those_that_somebody_wrote(tool: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "n.ipynb").write_text(
        json.dumps(
            {"cells": [{"source": ["a https://a.example"], "outputs": [{"text": "https://b.example"}]}]}
        )
    )
    (tmp_path / "not_tracked.md").write_text("https://c.example")
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    subprocess.run(["git", "add", "n.ipynb"], cwd=tmp_path, check=True)
    assert tool.collect(tmp_path) == {"https://a.example": ["n.ipynb"]}


def test_the_documents_of_this_repository_are_collected(tool: ModuleType) -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a repository")
    where = tool.collect()
    assert {"README.md", "CITATION.cff", "pyproject.toml"} <= set(where["https://arxiv.org/abs/2404.09387"])
    assert all(any(prefix in url for url in where) for prefix in tool.PLACEHOLDERS)


def test_only_a_broken_link_is_a_failure(tool: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    where = {"https://a.example": ["README.md"], "https://b.example": ["docs/x.md"]}
    fine = [("https://a.example", ("unreachable", "no address")), ("https://b.example", ("refused", "403"))]
    assert tool.report(fine, where) == 0
    assert "1 cannot be reached from this machine" in capsys.readouterr().out
    assert tool.report([("https://b.example", ("broken", "404 Not Found"))], where) == 1
    assert "https://b.example (404 Not Found)\n      in docs/x.md" in capsys.readouterr().out
