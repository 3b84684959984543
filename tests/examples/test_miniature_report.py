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
