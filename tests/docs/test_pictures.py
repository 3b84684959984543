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
    page = (ROOT / "docs/evidence_details.md").read_text(encoding="utf-8")
    sizes, both, closed_form, search, from_scratch = [], [], [], [], []
    table = page.partition("<!-- pairs -->")[2].partition("<!-- /pairs -->")[0]
    for size, cells in re.findall(r"^\| ([\d,]+), first \|(.*)\|$", table, re.MULTILINE):
        means = [float(cell.split()[0]) for cell in cells.split("|")]
        of_search, _of_heads, of_closed_form, of_both, _of_both_with_two_heads, *of_losses = means
        sizes.append(int(size.replace(",", "")))
        both.append(of_both)
        closed_form.append(of_closed_form)
        search.append(of_search)
        from_scratch.append(max(of_losses))
    assert len(sizes) >= 3, "the pattern finds the page's rows"
    assert pairs.sizes() == sizes
    drawn = [list(by_size.values()) for by_size in pairs.lines().values()]
    assert drawn == [both, closed_form, search, from_scratch]


HEIGHT_OF_A_NAME = 8.0  # in the units of the ends


@pytest.mark.parametrize("ends", [[1.0, 2.0, 2.0, 30.0], [0.0, 10.0, 20.0], [5.0]])
def test_names_of_lines_stand_apart_around_the_ends_of_the_lines(ends: list[float], pairs: Any) -> None:
    places = pairs.apart(np.array(ends), HEIGHT_OF_A_NAME)
    assert places.mean() == pytest.approx(np.mean(ends))
    rounding_error = 1e-9
    assert np.all(np.diff(places) >= HEIGHT_OF_A_NAME - rounding_error)


@pytest.mark.parametrize("ends", [[0.0, 10.0, 20.0], [5.0]])
def test_names_of_lines_that_end_far_apart_stand_at_their_ends(ends: list[float], pairs: Any) -> None:
    assert pairs.apart(np.array(ends), HEIGHT_OF_A_NAME) == pytest.approx(ends)


def test_images_of_the_site_are_files_of_their_type(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "page").mkdir()
    (tmp_path / "good.svg").write_text("<svg/>")
    (tmp_path / "page/text.png").write_text("<!doctype html>")
    good = ["../good.svg#gh-light-mode-only", "data:image/png;base64,AA"]
    on_github = "https://github.com/rankloss/rankloss/blob/main/examples/some.svg"  # a page, no image
    bad = ["none.svg", "text.png", on_github]
    html = "".join(f'<img alt="a" src="{address}">' for address in [*good, *bad])
    (tmp_path / "page/index.html").write_text(html)
    hooks = tool("site/hooks.py")
    hooks.on_post_build(SimpleNamespace(site_dir=str(tmp_path)))
    warnings = [record.getMessage() for record in caplog.records]
    assert warnings == [f"page/index.html shows {address}, which is no image of the site" for address in bad]


def table(cell: str, columns: int) -> str:
    """The HTML of a table of one row with ``cell`` in each column: a, b and one without a head, at most."""
    heads = "".join(f"<th>{name}</th>" for name in ("a", "b", "")[:columns])
    cells = "".join(f"<td{more}>{cell}</td>" for more in ("", ' style="x"', "")[:columns])
    return f"<table>\n<thead><tr>{heads}</tr></thead>\n<tbody><tr>\n{cells}</tr></tbody></table>"


def on_the_site(html: str) -> str:
    return tool("site/hooks.py").on_page_content(html)


def test_a_table_of_commands_becomes_a_list_on_a_phone() -> None:
    """Each of its cells has the head of its column."""
    stacked = on_the_site(table("<code>x</code>", 3))
    assert "<table data-stacked>" in stacked
    assert re.findall(r'<td data-label="([^"]*)"', stacked) == ["a: ", "b: ", ""]


@pytest.mark.parametrize("html", [table("<code>x</code>", 2), table("1.2", 3)], ids=["narrow", "numbers"])
def test_another_table_is_left_as_it_is(html: str) -> None:
    assert on_the_site(html) == html


def test_no_line_is_broken_in_an_option() -> None:
    """Neither an attribute of HTML nor two dashes alone are one."""
    html = '<code data-label="--no-tag">a {} , -- x</code>'
    marked = html.format('<span class="option">--csv-separator</span>')
    assert on_the_site(html.format("--csv-separator")) == marked


def test_no_line_is_broken_before_an_interval() -> None:
    assert "1.2&nbsp;±&nbsp;0.3" in on_the_site(table("1.2 ± 0.3", 3))


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.name)
def test_bold_in_a_table_means_one_thing(page: Path) -> None:
    """It means significance, and a page with bold cells says so: ``**bold**: significant``."""
    without_code = re.sub(r"`[^`]*`", "", page.read_text(encoding="utf-8"))
    bold_rows = [line for line in without_code.splitlines() if line.startswith("|") and "**" in line]
    explains_it = re.search(r"bold\W*: significant", without_code)
    assert explains_it or not bold_rows
