"""The paper's numbers, transcribed: they have to agree wherever the paper says a thing twice."""

from __future__ import annotations

import pytest
from miniature_paper import grid, paper

PAPER = paper.load()
LOSSES = {*grid.LOSSES, *(f"{backbone}/{loss}" for backbone in grid.BACKBONES for loss in grid.LOSSES)}


def row(exhibit, group, measure):
    found = [r for r in PAPER.exhibits[exhibit].rows if r.group == group and r.measure == measure]
    assert len(found) == 1
    return found[0].values


def line(exhibit, panel, name):
    return next(s for s in PAPER.exhibits[exhibit].series if s.panel == panel and s.name == name)


def test_every_exhibit_has_its_counterpart_with_its_source():
    assert tuple(PAPER.exhibits) == grid.EXHIBITS
    for quoted in PAPER.exhibits.values():
        kind, number = quoted.source.split()
        assert kind in ("Table", "Figure")
        assert number.isdigit()
    assert PAPER.arxiv in PAPER.reading


@pytest.mark.parametrize("key", grid.EXHIBITS)
def test_values_are_percentages_of_known_losses(key):
    quoted = PAPER.exhibits[key]
    for found in quoted.rows:
        assert found.values
        assert found.values.keys() <= LOSSES
        assert all(value is None or 0 < value < 100 for value in found.values.values())
    for series in quoted.series:
        assert len(series.x) == len(series.y)
        assert all(0 < value < 100 for value in series.y)
    assert (quoted.read_off is not None) == (key in ("figure3", "figure4", "figure6"))


@pytest.mark.parametrize(("key", "count"), [("table1", 36), ("table2", 48), ("table3", 44), ("table4", 40)])
def test_the_tables_are_complete(key, count):
    values = [value for found in PAPER.exhibits[key].rows for value in found.values.values()]
    assert len(values) == count
    assert None not in values


@pytest.mark.parametrize("key", ["table1", "table2", "table4"])
def test_more_guesses_are_never_worse(key):
    groups = {}
    for found in PAPER.exhibits[key].rows:
        groups.setdefault(found.group, []).append(found.values)
    for rows in groups.values():
        for loss in rows[0]:
            column = [values[loss] for values in rows]
            assert column == sorted(column), loss


def test_the_printed_averages_are_those_of_the_printed_sets():
    *sets, mean = PAPER.exhibits["table3"].rows
    assert len(sets) == 10
    for loss, printed in mean.values.items():
        assert sum(found.values[loss] for found in sets) / 10 == pytest.approx(printed, abs=0.0501)


def test_figure_3s_levels_are_table_1s():
    assert (
        line("figure3", "scheduled", "ImageNet1K top-1").y[0]
        == row("table1", "ImageNet1K, zero-shot", "top-1")["rankclip"]
    )
    both = [row("table1", f"MS-COCO, {way}", "R@1")["rankclip"] for way in ("image → text", "text → image")]
    assert line("figure3", "scheduled", "MS-COCO R@1").y[0] == pytest.approx(sum(both) / 2)


def test_figure_4_ends_in_table_4():
    top = row("table4", "ImageNet1K, zero-shot", "top-1")
    for loss in ("clip", "rankclip"):
        assert line("figure4", "size", loss).y[-1] == pytest.approx(top[f"resnet/{loss}"], abs=0.1)
