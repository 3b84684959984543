"""The pictures in the documents: drawn from what they say, the same every time, and all there."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")

ROOT = Path(__file__).parents[2]
TOOLS = ROOT / "tools/pictures"
NAMES = {"agreement", "cost", "distil", "effect", "evidence", "method", "miniature", "schedules"}


@pytest.fixture
def forest(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module that draws intervals, beside its neighbours."""
    monkeypatch.syspath_prepend(TOOLS)
    return importlib.import_module("forest")


def test_every_picture_is_committed_in_both_themes_and_shown_in_a_document() -> None:
    files = {path.name for path in (ROOT / "docs/assets").glob("*.svg")}
    assert files == {f"{name}-{theme}.svg" for name in NAMES for theme in ("light", "dark")}
    documents = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    text = "".join(path.read_text(encoding="utf-8") for path in documents)
    assert {file for file in files if f"assets/{file}" in text} == files


@pytest.mark.parametrize("name", ["question", "teacher", "distil", "miniature"])
def test_comparisons_of_the_forest_plot_are_the_reports(name: str, forest: Any) -> None:
    """A cell of a table in docs/evidence.md has its number from the report that the table links to."""
    for row in map(vars, forest.comparisons(name)):
        report = (ROOT / "docs" / row["report"]).read_text(encoding="utf-8")
        assert report.startswith(f"# {row['study']}\n")
        difference = f"{row['mean']:+.2f} ± {row['half_width']:.2f}".replace("-", "−")
        (score,) = re.findall(r"R@\d+|top-\d|objective", row["score"])
        there = [one for one in report.splitlines() if score in one and difference in one]
        seeds = f" {row['seeds']} |", f"({row['seeds']})"
        assert any(x in one for one in there for x in seeds), row
