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


@pytest.fixture
def forest(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module that draws intervals, beside its neighbours."""
    monkeypatch.syspath_prepend(TOOLS)
    return importlib.import_module("forest")


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
