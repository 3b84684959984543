"""The miniature's tables and what is said of them, on records that are made up."""

from __future__ import annotations

import dataclasses
import re

import miniature_records
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from miniature_paper import findings, grid, paper, scores, tables, wording
from miniature_paper.collection import Collection
from miniature_paper.scores import Measure
from miniature_paper.statistics import Difference, Estimate, correct
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


# --- the numbers ---


@pytest.mark.parametrize("loss", grid.LOSSES)
@pytest.mark.parametrize(
    ("section", "row", "read"),
    [("Image → text", "R@5", recall), ("Zero-shot, mean of 10 sets", "top-1", mean_top_1)],
)
def test_a_cell_is_what_scipy_makes_of_the_records(records, complete, loss, section, row, read):
    found = cell(complete["table1"], section, row, scores.LOSS_NAMES[loss])
    own, clip = (np.array(values(records, name, read)) for name in (loss, "clip"))
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


def test_a_backbone_is_compared_with_its_own_clip(records, complete):
    found = cell(complete["table4"], "Image → text", "R@5", 3)  # the ViT's RankCLIP
    own, clip = (np.array(values(records, name, recall, backbone="vit")) for name in ("rankclip", "clip"))
    assert found.difference.mean == pytest.approx((own - clip).mean())
    assert [group for group, _ in complete["table4"].columns] == ["ResNet", "ResNet", "ViT", "ViT"]


def test_the_sweep_uses_its_own_seeds_and_compares_with_clip_and_with_the_recipe(records, complete):
    def both_ways(metrics):
        return np.mean(
            [metrics["retrieval/test"][f"{way} R@1"] for way in ("image_to_text", "text_to_image")]
        )

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


def test_the_families_have_the_sizes_of_the_exhibits(complete):
    sizes = {key: len(e.comparisons) for key, e in complete.items()}
    swept = 2 * len(FULL.lambdas) - 1
    assert sizes == {
        "table1": 5 * 9,
        "table2": 5 * (4 * 4 + 1),
        "table3": 5 * 11,
        "table4": 2 * 10,
        "figure3": 2 * (swept + swept - 1),
        "figure4": 3 * len(FULL.sizes),
        "figure6": 5 * len(scores.geometry()),
        "figure7": 0,
    }


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


def test_every_shift_and_loss_has_a_name():
    assert set(scores.SHIFT_NAMES) == set(scores.SHIFTS)
    assert set(scores.LOSS_NAMES) == set(grid.LOSSES)
    assert scores.SHIFTS["silhouette"] is None
    assert len(scores.LABELLED_SETS) == 10


# --- parts of a plan ---


def test_a_cell_says_how_many_of_its_seeds_are_there(records):
    first = [r for r in records if r["setting"]["seed"] < 3 or r["setting"]["loss"] != "alip"]
    table = exhibits(first)["table1"]
    found = cell(table, "Image → text", "R@1", "ALIP")
    assert (found.estimate.n, found.planned, found.difference.n) == (3, 5, 3)
    assert ("ALIP", 3, 5) in table.seeds


def test_one_seed_has_no_interval_and_no_verdict(records):
    table = exhibits([r for r in records if r["setting"]["seed"] == 0])["table1"]
    found = cell(table, "Image → text", "R@1", "RankCLIP")
    assert found.estimate.half_width is None
    assert wording.mark(found.difference) == wording.MARKS["too few seeds"]
    assert not findings.Tally(table.comparisons).tested


def test_a_missing_model_is_a_dash(records):
    table = exhibits([r for r in records if r["setting"]["loss"] != "cyclip"])["table1"]
    found = cell(table, "Image → text", "R@1", "CyCLIP")
    assert (found.estimate, found.difference) == (None, None)
    assert str(found) == "–"


def test_nothing_at_all(records):
    for exhibit in exhibits([]).values():
        assert exhibit.counts[0] == 0
        assert findings.text(exhibit).count("\n\n") == 1  # what is missing, and the paper's
        ours = [c for row in exhibit.rows if not row.quoted for c in row.cells if c is not None]
        assert all(c.estimate is None and c.difference is None for c in ours)


def test_a_set_that_one_model_lacks_leaves_its_mean_out(records):
    without = [dict(r) for r in records]
    without[0] = {
        **without[0],
        "metrics": {k: v for k, v in without[0]["metrics"].items() if k != "probe/mdi"},
    }
    name = scores.LOSS_NAMES[without[0]["setting"]["loss"]]
    table = exhibits(without)["table3"]
    assert cell(table, "Linear probe", "mean of 10 sets", name).estimate.n == FULL.seeds - 1
    assert cell(table, "Linear probe", "emoji", name).estimate.n == FULL.seeds


def test_records_that_are_not_planned_are_counted_and_left_alone(records):
    few = grid.plan(FULL, seeds=range(3))
    collection = Collection(records, FULL, few)
    assert collection.unplanned == len(records) - len(few)
    assert exhibits(records, few)["table1"].seeds[0] == ("CLIP", 3, 3)


def test_a_plan_of_a_part_is_not_called_incomplete(records):
    found = exhibits(records, grid.plan(FULL, ["table1"]))
    assert all(have == want for _, have, want in found["table1"].seeds)
    assert [seeds for seeds in found["table4"].seeds if seeds[0].endswith("(ViT)")] == [
        ("CLIP (ViT)", 0, 0), ("RankCLIP (ViT)", 0, 0),
    ]  # fmt: skip


def test_odd_records_are_refused(records):
    with pytest.raises(ValueError, match=r"records: clip-resnet.* twice"):
        Collection([*records, records[0]], FULL, PLAN)
    with pytest.raises(ValueError, match=r"planned: .* is not of the preset quick"):
        Collection([], grid.PRESETS["quick"], PLAN)


# --- what is said ---


def compared(difference, label="R@1", percent=True):
    return Cell("RankCLIP", Measure("Image → text", label, (), percent), 5, None, "CLIP", difference)


def said_of(complete, *cells):
    return findings.text(
        dataclasses.replace(complete["table1"], rows=(Row("", "", cells, quoted=False),), columns=())
    )


def test_only_what_the_correction_leaves_is_claimed(complete):
    won = compared(Difference(0.62, 0.3, 5, 0.002, 0.03))
    text = said_of(complete, won, compared(Difference(0.1, 0.4, 5, 0.5, 0.5), "other"))
    assert "RankCLIP is better than CLIP in 1 of 2" in text
    assert "R@1 (+0.62 ± 0.30, n = 5, p 0.002, corrected 0.030)" in text
    assert "other" not in text
    lost = [compared(Difference(0.62, 0.5, 5, 0.03, 0.4))]
    lost += [compared(Difference(0.0, 0.4, 5, 0.9, 1.0), f"{i}") for i in range(19)]
    assert "better" not in said_of(complete, *lost)
    found = findings.Tally(lost)
    assert (len(found.established), len(found.nominal), found.expected) == (0, 1, 1.0)
    assert "better" not in said_of(complete, compared(Difference(5.0, 0.1, 2, 0.001, None)))


def test_a_gap_is_higher_or_lower_and_never_better(complete):
    text = said_of(complete, compared(Difference(0.05, 0.01, 5, 0.001, 0.01), "modality gap", percent=False))
    assert "RankCLIP is higher than CLIP" in text
    assert "+0.050 ± 0.010" in text
    assert "better" not in text


differences = st.builds(
    Difference, st.floats(-5, 5), st.floats(0.01, 3), st.integers(1, 6), st.floats(1e-6, 1)
)


@given(st.lists(differences, min_size=1, max_size=12))
def test_the_text_names_nothing_that_is_not_established(complete, family):
    corrected = correct(dict(enumerate(family)))
    cells = [compared(d, f"measure{i:02d}") for i, d in corrected.items()]
    text = said_of(complete, *cells)
    above = {c.measure.label for c in cells if c.difference.established and c.difference.mean > 0}
    below = {c.measure.label for c in cells if c.difference.established and c.difference.mean < 0}
    named = set(re.findall(r"measure\d\d", text))
    assert named <= above | below
    assert len(named) == min(4, len(above)) + min(4, len(below))
    assert ("better than" in text) == bool(above)
    assert ("worse than" in text) == bool(below)


def test_without_any_effect_hardly_anything_is_established():
    """The records' noise is shared between losses, as in Table 1; five seeds, six losses, all exhibits."""
    found = exhibits(miniature_records.records(PLAN, effect=0.0))
    claims = [c for e in found.values() for c in findings.Tally(e.comparisons).established]
    assert len(claims) <= 2


def test_the_papers_paragraph_counts_its_own_differences(complete):
    assert "RankCLIP (ResNet) in 10 of 10 (+0.80 to +12.70 points)" in findings.text(complete["table4"])
    assert "CyCLIP in 8 of 9" in findings.text(complete["table1"])


# --- how a cell reads ---


@pytest.mark.parametrize(
    ("difference", "mark"),
    [
        (Difference(1.0, 0.1, 5, 0.001, 0.01), "▲"),
        (Difference(-1.0, 0.1, 5, 0.001, 0.01), "▼"),
        (Difference(1.0, 0.1, 5, 0.04, 0.4), "△"),
        (Difference(-1.0, 0.1, 5, 0.04, 0.4), "▽"),
        (Difference(1.0, 2.0, 5, 0.3, 1.0), "≈"),
        (Difference(1.0, None, 1, None, None), "·"),
        (None, ""),
    ],
)
def test_marks(difference, mark):
    assert wording.mark(difference) == mark


def test_a_negative_mean_has_a_true_minus():
    assert wording.mean_text(Estimate(-2.5, 0.25, 5), 5) == "−2.50 ± 0.25 (5)"
