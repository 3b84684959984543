"""The miniature's tables and what is said of them, on records that are made up."""

import dataclasses
import re

import miniature_records
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from miniature_paper import findings, grid, paper, scores, tables
from miniature_paper.collection import Collection
from miniature_paper.scores import Measure
from miniature_paper.statistics import Difference, correct
from miniature_paper.tables import Cell, QuotedCell, Row
from scipy import stats

PAPER = paper.load()
FULL = grid.PRESETS["full"]
PLAN = grid.plan(FULL)


def exhibits(records, planned=PLAN):
    return {e.key: e for e in tables.build(Collection(records, FULL, planned), PAPER)}


@pytest.fixture(scope="module")
def records():
    return miniature_records.records(PLAN, effect=0.8)


@pytest.fixture(scope="module")
def complete(records):
    return exhibits(records)


def cell(exhibit, section, row, column):
    labels = [label for _, label in exhibit.columns]
    position = labels.index(column) if isinstance(column, str) else column
    return next(r for r in exhibit.rows if (r.section, r.label) == (section, row)).cells[position]


def values(records, loss, read, **setting):
    wanted = {"loss": loss, "backbone": "resnet", "pairs": FULL.pairs, **setting}
    wanted.setdefault("lambda_cross", float(loss in ("rankclip", "rankclip-cross")))
    wanted.setdefault("lambda_in", float(loss in ("rankclip", "rankclip-in")))
    found = [r for r in records if wanted.items() <= r["setting"].items()]
    return [read(r["metrics"]) for r in sorted(found, key=lambda r: r["setting"]["seed"])]


def recall(metrics):
    return metrics["retrieval/test"]["image_to_text R@5"]


def mean_top_1(metrics):
    return np.mean([metrics[f"zero-shot/{s}"]["top-1"] for s in scores.LABELLED_SETS])


@pytest.mark.parametrize(
    ("exhibit", "column", "loss", "backbone"),
    [("table1", i, loss, "resnet") for i, loss in enumerate(grid.LOSSES)]
    + [("table4", 3, "rankclip", "vit")],
)
@pytest.mark.parametrize(
    ("section", "row", "read"),
    [("Image → text", "R@5", recall), ("Zero-shot, mean of 10 sets", "top-1", mean_top_1)],
)
def test_a_cell_is_what_scipy_makes_of_the_records(
    records, complete, exhibit, column, loss, backbone, section, row, read
):
    found = cell(complete[exhibit], section, row, column)
    own, clip = (np.array(values(records, name, read, backbone=backbone)) for name in (loss, "clip"))
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


def test_the_sweep_uses_its_own_seeds_and_compares_with_clip_and_with_the_recipe(records, complete):
    def both_ways(metrics):
        ways = ("image_to_text", "text_to_image")
        return np.mean([metrics["retrieval/test"][f"{way} R@1"] for way in ways])

    section = f"{tables.TERM_NAMES['lambda_cross']}; the other one is 1"
    seeds = FULL.sweep_seeds
    own = np.array(values(records, "rankclip", both_ways, lambda_cross=4.0, lambda_in=1.0))
    clip, recipe = (np.array(values(records, loss, both_ways))[:seeds] for loss in ("clip", "rankclip"))
    found = cell(complete["figure3"], section, "4", 2)
    assert found.estimate.n == found.planned == seeds
    assert found.difference.mean == pytest.approx((own - clip).mean())
    assert cell(complete["figure3"], section, "4", 3).difference.mean == pytest.approx((own - recipe).mean())
    # The ends of the sweep are the ablations.
    assert cell(complete["figure3"], section, "0", 0).estimate.n == seeds


def test_the_sizes_are_rows(records, complete):
    for pairs in FULL.sizes:
        found = cell(complete["figure4"], "Training pairs", f"{pairs:,}", 1)
        own = values(records, "rankclip", mean_top_1, pairs=pairs)
        assert found.estimate.mean == pytest.approx(np.mean(own))


def test_every_difference_of_an_exhibit_is_corrected_in_its_family(complete):
    for exhibit in complete.values():
        shown = [c.difference for row in exhibit.rows if not row.quoted for c in row.cells if c is not None]
        family = [c.difference for c in exhibit.comparisons]
        assert {d for d in shown if d is not None} == set(family)
        again = correct(dict(enumerate(dataclasses.replace(d, adjusted=None) for d in family)))
        assert family == list(again.values())


def test_the_papers_numbers_stand_in_the_columns_of_their_losses(complete):
    found = cell(complete["table1"], "MS-COCO, image → text", "R@10", "CyCLIP")
    assert isinstance(found, QuotedCell)
    assert found.value == 29.14
    assert found.difference == pytest.approx(29.14 - 26.94)
    assert cell(complete["table1"], "ImageNet1K, zero-shot", "top-1", "RankCLIP, in-modal only") is None
    assert cell(complete["figure6"], "Embedding space", "modality gap", "CLIP").value is None
    read_off = cell(complete["figure4"], "ImageNet1K top-1", "500,000", 0)
    assert (read_off.value, read_off.approximate) == (pytest.approx(4.5, abs=0.05), True)


def test_chance_and_items_are_the_records(records, complete):
    row = next(row for row in complete["table1"].rows if row.label == "R@5")
    assert row.chance == records[0]["chance"]["retrieval/test"]["image_to_text R@5"]
    assert row.items == records[0]["items"]["retrieval/test"]


# --- parts of a plan ---


@pytest.mark.parametrize(
    ("seeds", "text"),
    [(5, "(5)"), (3, "(3 of 5)"), (1, "± – (1 of 5)"), (0, "–")],
    ids=["all", "some", "one", "none"],
)
def test_a_cell_says_how_many_of_its_seeds_are_there(records, seeds, text):
    first = [r for r in records if r["setting"]["seed"] < seeds or r["setting"]["loss"] != "alip"]
    table = exhibits(first)["table1"]
    found = cell(table, "Image → text", "R@1", "ALIP")
    assert ("ALIP", seeds, 5) in table.seeds
    assert text in str(found)
    assert (found.difference.n if found.difference else 0) == seeds
    assert (found in findings.Tally(table.comparisons).tested) == (seeds >= 3)


def test_a_set_that_one_model_lacks_leaves_its_mean_out(records):
    metrics = {task: of for task, of in records[0]["metrics"].items() if task != "probe/mdi"}
    without = [{**records[0], "metrics": metrics}, *records[1:]]
    name = scores.LOSS_NAMES[without[0]["setting"]["loss"]]
    table = exhibits(without)["table3"]
    assert cell(table, "Linear probe", "mean of 10 sets", name).estimate.n == FULL.seeds - 1
    assert cell(table, "Linear probe", "emoji", name).estimate.n == FULL.seeds


def test_records_that_are_not_planned_are_left_alone(records):
    few = grid.plan(FULL, seeds=range(3))
    assert list(Collection(records, FULL, few).records) == few
    assert exhibits(records, few)["table1"].seeds[0] == ("CLIP", 3, 3)
    part = exhibits(records, grid.plan(FULL, ["table1"]))
    assert all(have == want for _, have, want in part["table1"].seeds)
    assert part["table4"].counts == (10, 10)  # of the ResNet


# --- what is said ---


def test_what_only_passes_without_the_correction_is_nominal():
    cells = [compared(Difference(0.62, 0.5, 5, 0.03, 0.4))]
    cells += [compared(Difference(0.0, 0.4, 5, 0.9, 1.0), f"{i}") for i in range(19)]
    found = findings.Tally(cells)
    assert (found.established, found.nominal, found.expected) == ([], cells[:1], 1.0)


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


def test_without_any_effect_hardly_anything_is_established():
    """The records' noise is shared between losses, as in Table 1; five seeds, six losses, all exhibits."""
    found = exhibits(miniature_records.records(PLAN, effect=0.0))
    claims = [c for e in found.values() for c in findings.Tally(e.comparisons).established]
    assert len(claims) <= 2


def test_the_papers_paragraph_counts_its_own_differences(complete):
    assert "RankCLIP (ResNet) in 10 of 10 (+0.80 to +12.70 points)" in findings.text(complete["table4"])
    assert "CyCLIP in 8 of 9" in findings.text(complete["table1"])
