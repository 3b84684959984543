"""The miniature's report: the paper's numbers, and tables, findings and text from the committed records."""

import dataclasses
import random
import re

import numpy as np
import pytest
from examples_common.page import Picture
from examples_common.records import Store
from examples_common.statistics import Difference, correct
from hypothesis import given
from hypothesis import strategies as st
from miniature_paper import command, figures, findings, grid, paper, report, scores, tables
from miniature_paper.collection import Collection
from miniature_paper.options import _EXAMPLE as EXAMPLE
from miniature_paper.scores import Measure
from miniature_paper.tables import Cell, Row
from scipy import stats

PAPER = paper.load()
FULL = grid.PRESETS["full"]
PLAN = grid.plan(FULL)
RECORDS = Store(EXAMPLE / "results" / "full").of(PLAN)


def exhibits(records, planned=PLAN):
    return {e.key: e for e in tables.build(Collection(records, FULL, planned), PAPER)}


@pytest.fixture(scope="module")
def complete():
    return exhibits(RECORDS)


def cell(exhibit, section, row, column):
    labels = [label for _, label in exhibit.columns]
    position = labels.index(column) if isinstance(column, str) else column
    return next(r for r in exhibit.rows if (r.section, r.label) == (section, row)).cells[position]


def values(loss, read, **setting):
    wanted = {"loss": loss, "backbone": "resnet", "pairs": FULL.pairs, **setting}
    wanted.setdefault("lambda_cross", float(loss in ("rankclip", "rankclip-cross")))
    wanted.setdefault("lambda_in", float(loss in ("rankclip", "rankclip-in")))
    found = [r for r in RECORDS if wanted.items() <= r["setting"].items()]
    return [read(r["metrics"]) for r in sorted(found, key=lambda r: r["setting"]["seed"])]


def recall(metrics):
    return metrics["retrieval/test"]["image_to_text R@5"]


def mean_top_1(metrics):
    return np.mean([metrics[f"zero-shot/{s}"]["top-1"] for s in scores.LABELLED_SETS])


@pytest.mark.parametrize(
    ("exhibit", "column", "loss", "backbone"),
    [("table1", 0, "clip", "resnet"), ("table1", 3, "rankclip", "resnet"), ("table4", 3, "rankclip", "vit")],
)
@pytest.mark.parametrize(
    ("section", "row", "read"),
    [("Image → text", "R@5", recall), ("Zero-shot, mean of 10 sets", "top-1", mean_top_1)],
)
def test_a_cell_is_what_scipy_makes_of_the_records(
    complete, exhibit, column, loss, backbone, section, row, read
):
    found = cell(complete[exhibit], section, row, column)
    own, clip = (np.array(values(name, read, backbone=backbone)) for name in (loss, "clip"))
    assert found.estimate.n == found.planned == FULL.seeds
    assert found.estimate.mean == pytest.approx(own.mean())
    low, high = stats.t.interval(0.95, len(own) - 1, own.mean(), stats.sem(own))
    assert (found.estimate.low, found.estimate.high) == pytest.approx((low, high))
    if loss == "clip":
        assert (found.difference, found.reference) == (None, "")
    else:
        assert found.difference.mean == pytest.approx((own - clip).mean())
        assert found.difference.p == pytest.approx(stats.ttest_rel(own, clip).pvalue)
        assert found.difference.adjusted >= found.difference.p


# --- what is said ---


def compared(difference, label="R@1", percent=True):
    return Cell("RankCLIP", Measure("Image → text", label, (), percent), 5, None, "CLIP", difference)


differences = st.builds(
    Difference, st.floats(-5, 5), st.floats(0.01, 3), st.integers(1, 6), st.floats(1e-6, 1)
)


@given(st.lists(differences, min_size=1, max_size=12), st.booleans())
def test_the_text_names_nothing_that_is_not_established(complete, family, percent):
    corrected = correct(dict(enumerate(family)))
    cells = [compared(d, f"measure{i:02d}", percent) for i, d in corrected.items()]
    rows = (Row("", "", tuple(cells), quoted=False),)
    text = findings.text(dataclasses.replace(complete["table1"], rows=rows, columns=()))
    above = {c.measure.label for c in cells if c.difference.established and c.difference.mean > 0}
    below = {c.measure.label for c in cells if c.difference.established and c.difference.mean < 0}
    named = set(re.findall(r"measure\d\d", text))
    assert named <= above | below
    assert len(named) == min(4, len(above)) + min(4, len(below))
    words = ("better", "worse") if percent else ("higher", "lower")
    for word, found in zip(words, (above, below), strict=True):
        assert (f"RankCLIP is {word} than CLIP" in text) == bool(found)


# --- the report ---


def write(folder, records):
    page = report.write(records, folder, preset=FULL, planned=PLAN, command='run.py --note "<b>|</b>"')
    return page.read_text(encoding="utf-8"), (folder / "report.md").read_text(encoding="utf-8")


@pytest.fixture
def undrawn(monkeypatch):
    """Drawing takes seconds, and its bytes depend on matplotlib's version."""
    monkeypatch.setattr(figures, "picture", lambda alt, figure_of, colours=0: Picture(b"", alt))


def test_the_committed_report_follows_from_the_committed_records(tmp_path, undrawn):
    (tmp_path / report.SEARCH).touch()
    assert command.main(["--preset", "full", "--report-only", "--report", str(tmp_path)]) == 0
    committed = EXAMPLE / "report" / "report.md"
    assert (tmp_path / "report.md").read_text(encoding="utf-8") == committed.read_text(encoding="utf-8")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")  # which has every test, too
    assert [int(n) for n in re.findall(r"<summary>All (\d+) tests", page)] == [45, 85, 55, 20, 34, 15, 30]


def test_an_interrupted_run_is_reported_as_far_as_it_is(tmp_path, undrawn):
    page, text = write(tmp_path, random.Random(0).sample(RECORDS[:17], 17))
    assert f"17 of {len(PLAN)}" in text
    assert "(3 of 5)" in text
    assert "<b>" not in page  # the command's
    assert set(re.findall(r'href="#([^"]+)"', page)) <= set(re.findall(r'id="([^"]+)"', page))


@pytest.mark.slow
def test_the_figures_are_small_and_go_when_they_are_no_longer_there(tmp_path):
    write(tmp_path, RECORDS)
    drawn = [*(tmp_path / "figures").iterdir()]
    assert {path.stem for path in drawn} == {"figure3", "figure4", "figure6", "figure7"}
    assert sum(path.stat().st_size for path in drawn) < 1_200_000
    write(tmp_path, [])
    assert list((tmp_path / "figures").iterdir()) == []


# --- the paper's numbers: they have to agree wherever the paper says a thing twice ---

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
