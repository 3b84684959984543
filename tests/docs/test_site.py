"""The documentation site in a real browser: its pages, its formulas and its themes."""

from __future__ import annotations

import functools
import itertools
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
KATEX = ROOT / "docs/vendor/katex"
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")  # public CI has the latter
DRIVER = shutil.which("chromedriver")
FLAGS = [
    "headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking",
    "disable-component-update", "disable-sync",
]  # fmt: skip
PHONE, LAPTOP = (390, 844), (1280, 800)


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None: ...


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as strictly as `make docs` builds it."""
    pytest.importorskip("mkdocs")
    if not KATEX.exists():
        if shutil.which("npm") is None:
            pytest.skip("npm is needed to fetch KaTeX")
        subprocess.run(["make", "docs/vendor/katex"], cwd=ROOT, check=True, timeout=900)
    directory = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(directory)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stderr[-4000:]
    return directory


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    """Where the site is served."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    if CHROMIUM is None or DRIVER is None:
        pytest.skip("chromium and chromedriver are not installed")
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for flag in FLAGS:
        options.add_argument(f"--{flag}")
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('chromium')}")
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


def pages(site: Path) -> list[str]:
    """The addresses of all pages, from the site's map."""
    return re.findall(r"<loc>https?://[^/]+/rankloss/([^<]*)</loc>", (site / "sitemap.xml").read_text())


def errors(browser: Any) -> list[dict[str, Any]]:
    return [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]


def resize(browser: Any, size: tuple[int, int]) -> None:
    """The page's own size: the window cannot be made as narrow as a phone."""
    metrics = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


def test_every_page_of_the_navigation_is_built_and_no_other(site: Path) -> None:
    listed = re.findall(r"^ +- .+: (\S+)\.md$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert len(listed) > 20
    assert sorted("" if name == "index" else f"{name}/" for name in listed) == sorted(pages(site))


def test_every_page_is_without_an_error_an_unrendered_formula_or_a_sideways_scroll(
    site: Path, address: str, browser: Any
) -> None:
    formulas = {}
    for name, size in itertools.product(pages(site), (PHONE, LAPTOP)):
        resize(browser, size)
        browser.get(f"{address}/{name}")
        assert errors(browser) == [], name
        text = browser.execute_script("return document.querySelector('article').innerText")
        assert not re.search(r"\$\$|\\\[|:(class|func|meth|mod|data):", text), name
        counts = """return [...document.querySelectorAll(".arithmatex")]
            .map(e => e.querySelectorAll(".katex").length)"""
        rendered = browser.execute_script(counts)
        assert all(rendered), name
        formulas[name] = len(rendered)
        assert browser.execute_script("return document.querySelectorAll('.katex-error').length") == 0
        broken = """return [...document.images].filter(i => i.src && i.complete && !i.naturalWidth)
            .map(i => i.src)"""
        assert browser.execute_script(broken) == [], name
        needed = browser.execute_script("return document.scrollingElement.scrollWidth")
        assert needed <= size[0], f"{name} is {needed} pixels wide on a screen of {size[0]}"
    assert formulas["method/"] >= 10
    assert formulas["api/losses/"] >= 5
    assert formulas["api/functions/"] >= 1


def test_theme_follows_the_choice_of_the_reader(address: str, browser: Any) -> None:
    shown = """return [...document.querySelectorAll('article img')]
        .filter(i => getComputedStyle(i).display != 'none').map(i => i.src)"""
    for theme in ("light", "dark"):
        media = {"features": [{"name": "prefers-color-scheme", "value": theme}]}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
        browser.get(address)
        browser.execute_script("localStorage.clear()")
        for page, count in (("", 3), ("method/", 3)):
            browser.get(f"{address}/{page}")
            pictures = browser.execute_script(shown)
            assert len(pictures) == count
            assert all(f"-{theme}.svg" in picture for picture in pictures)
