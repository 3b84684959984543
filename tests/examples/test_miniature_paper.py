"""The paper's numbers, transcribed: they have to agree wherever the paper says a thing twice."""

import re

import pytest
from miniature_paper import grid, paper

PAPER = paper.load()
LOSSES = {*grid.LOSSES, *(f"{backbone}/{loss}" for backbone in grid.BACKBONES for loss in grid.LOSSES)}


COUNTS = {"table1": 36, "table2": 48, "table3": 44, "table4": 40}  # of printed numbers


@pytest.mark.parametrize("key", grid.EXHIBITS)
def test_an_exhibit_is_complete_and_holds_percentages_of_known_losses(key):
    quoted = PAPER.exhibits[key]
    assert re.fullmatch(r"(Table|Figure) \d+", quoted.source)
    values = [value for found in quoted.rows for value in found.values.values()]
    assert all(found.values.keys() <= LOSSES for found in quoted.rows)
    if key in COUNTS:
        assert (len(values), None in values) == (COUNTS[key], False)
    values += [y for series in quoted.series for y in series.y]
    assert all(value is None or 0 < value < 100 for value in values)
    assert all(len(series.x) == len(series.y) for series in quoted.series)
    assert (quoted.read_off is not None) == (key in ("figure3", "figure4", "figure6"))


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


def test_what_figures_share_with_tables_is_equal():
    assert tuple(PAPER.exhibits) == grid.EXHIBITS
    values = {
        (key, row.group, row.measure): row.values for key, of in PAPER.exhibits.items() for row in of.rows
    }
    lines = {(key, s.panel, s.name): s.y for key, of in PAPER.exhibits.items() for s in of.series}
    top = values["table1", "ImageNet1K, zero-shot", "top-1"]["rankclip"]
    assert lines["figure3", "scheduled", "ImageNet1K top-1"][0] == top
    ways = [values["table1", f"MS-COCO, {way}", "R@1"] for way in ("image → text", "text → image")]
    mean = sum(way["rankclip"] for way in ways) / 2
    assert lines["figure3", "scheduled", "MS-COCO R@1"][0] == pytest.approx(mean)
    for loss in ("clip", "rankclip"):
        end = values["table4", "ImageNet1K, zero-shot", "top-1"][f"resnet/{loss}"]
        assert lines["figure4", "size", loss][-1] == pytest.approx(end, abs=0.1)
