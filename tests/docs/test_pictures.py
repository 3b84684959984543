"""The pictures in the documents: drawn from what they say, the same every time, and all there."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tools_folder import tool

pytest.importorskip("matplotlib")

ROOT = Path(__file__).parents[2]
TOOLS = ROOT / "tools/pictures"


@pytest.fixture
def pairs(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module that draws recall against the number of pairs."""
    monkeypatch.syspath_prepend(TOOLS)
    return importlib.import_module("pairs")


def test_recall_against_pairs_is_drawn_from_every_size_of_the_page(pairs: Any) -> None:
    """The lines have the scores of the first thousand icons; from scratch, those of the best loss."""
    page = (ROOT / "docs/evidence.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([\d,]+), first \|(.*)\|$", page, re.MULTILINE)
    scores = {
        int(size.replace(",", "")): [float(cell.split()[0]) for cell in cells.split("|")]
        for size, cells in rows
    }
    lines = {name: list(of.values()) for name, of in pairs.lines().items()}
    search, _, closed_form, both = zip(*(of[:4] for of in scores.values()), strict=True)
    from_scratch = [max(of[4:]) for of in scores.values()]
    assert len(scores) >= 3
    assert pairs.sizes() == list(scores)
    assert list(lines.values()) == [list(both), list(closed_form), list(search), from_scratch]


@pytest.mark.parametrize("ends", [[1.0, 2.0, 2.0, 30.0], [0.0, 10.0, 20.0], [5.0]])
def test_names_of_lines_stand_apart_around_the_ends_of_the_lines(ends: list[float], pairs: Any) -> None:
    places = pairs.apart(np.array(ends), 8.0)
    assert places.mean() == pytest.approx(np.mean(ends))
    assert np.all(np.diff(places) >= 8.0 - 1e-9)
    if np.all(np.diff(ends) >= 8.0):
        assert places == pytest.approx(ends)


def test_images_of_the_site_are_files_of_their_type(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "page").mkdir()
    (tmp_path / "good.svg").write_text("<svg/>")
    (tmp_path / "page/text.png").write_text("<!doctype html>")
    addresses = ["../good.svg#gh-light-mode-only", "data:image/png;base64,AA", "none.svg", "text.png"]
    addresses += ["https://github.com/rankloss/rankloss/blob/main/examples/some.svg"]
    html = "".join(f'<img alt="a" src="{address}">' for address in addresses)
    (tmp_path / "page/index.html").write_text(html)
    hooks = tool("site/hooks.py")
    hooks.on_post_build(SimpleNamespace(site_dir=str(tmp_path)))
    said = [record.getMessage() for record in caplog.records]
    assert said == [f"page/index.html shows {x}, which is no image of the site" for x in addresses[2:]]


def test_a_table_of_commands_becomes_a_list_on_a_phone() -> None:
    def table(cell: str, columns: int) -> str:
        heads = "".join(f"<th>{name}</th>" for name in ("a", "b", "")[:columns])
        cells = [f"<td{more}>{cell}</td>" for more in ("", ' style="x"', "")[:columns]]
        return f"<table>\n<thead><tr>{heads}</tr></thead>\n<tbody><tr>\n{''.join(cells)}</tr></tbody></table>"

    hooks = tool("site/hooks.py")
    found = hooks.on_page_content(table("<code>x</code>", 3))
    assert re.findall(r'<td data-label="([^"]*)"', found) == ["a: ", "b: ", ""]
    assert "<table data-stacked>" in found
    for other in (table("<code>x</code>", 2), table("1.2", 3)):
        assert hooks.on_page_content(other) == other
    options = '<code data-label="--no-tag">a --csv-separator , -- x</code>'
    assert hooks.on_page_content(options) == options.replace(
        "--csv-separator", '<span class="option">--csv-separator</span>'
    )
    assert "1.2&nbsp;±&nbsp;0.3" in hooks.on_page_content(table("1.2 ± 0.3", 3))


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.name)
def test_bold_in_a_table_means_one_thing(page: Path) -> None:
    """The significance that the page explains."""
    text = re.sub(r"`[^`]*`", "", page.read_text(encoding="utf-8"))
    bold = [line for line in text.splitlines() if line.startswith("|") and "**" in line]
    assert not bold or re.search(r"bold\W*: significant", text), bold
