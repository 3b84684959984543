"""Softmax against ranks, the preset, ids, references: the tests of the reports, and what they decide."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats
from studies.ids import study as ids
from studies.ids import train as pairs
from studies.photographs import part2d
from studies.photographs.student_losses import ENCODERS
from studies.plan import Find, MissingError
from studies.references import study as references
from studies.report import fill
from studies.runner import load
from studies.statistics import Arms, Difference

NAMES = ("photographs-2d", "photographs-2e", "ids", "references")
SIZES = {name: load(name).sizes("full") for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_said_before_all_trainings_are_there(name):
    study = load(name)
    finds = {data: Find(data, {}) for data in study.records}
    with pytest.raises(MissingError):
        study.results(SIZES[name], finds, None)


def difference(mean, adjusted, half=0.1):
    return Difference(mean, half, 8, adjusted, adjusted)


# --- softmax against ranks ---


def records_of(score, arms=part2d.ARMS, sizes=SIZES["photographs-2d"]):
    """Records of a part, whose R@10 is ``score(data set, arm, seed)``."""
    finds = {}
    for name in part2d.SETS:
        settings = [one for seed in sizes.seeds for one in part2d.planned(sizes, name, seed, arms).values()]
        finds[name] = Find(
            name,
            {
                one: {
                    "metrics": {"retrieval": {"R@10, mean of both": score(name, one.arm, one.seed)}},
                    "conditions": {"cores": 2},
                }
                for one in settings
            },
        )
    return finds


def test_the_primary_test_weighs_data_sets_alike():
    rng = np.random.default_rng(0)
    sizes, scores = SIZES["photographs-2d"], {}
    finds = records_of(lambda *key: scores.setdefault(key, rng.normal(10, 1)))
    arms = part2d.found(sizes, finds)
    blocks = [
        np.mean([scores[name, "top-one", seed] - scores[name, "ranks", seed] for name in part2d.SETS])
        for seed in sizes.seeds
    ]
    found, test = part2d.pooled(arms), stats.ttest_1samp(blocks, 0.0)
    assert (found.mean, found.p) == pytest.approx((np.mean(blocks), test.pvalue), rel=1e-12)
    assert (found.low, found.high) == pytest.approx(tuple(test.confidence_interval()), rel=1e-12)
    assert found.adjusted == found.p
    nine = part2d.secondary(arms)
    smallest = min(nine.values(), key=lambda d: d.p)
    assert len(nine) == 9
    assert smallest.adjusted == pytest.approx(min(1.0, 9 * smallest.p))


@pytest.mark.parametrize(
    ("gain", "said"), [(1.0, "Softmax wins"), (-1.0, "Ranks win"), (0.0, "Neither is shown")]
)
def test_the_report_decides_as_the_plan_says(gain, said):
    rng, sizes = np.random.default_rng(2), SIZES["photographs-2d"]

    def score(_, arm, seed):
        return 10 + rng.normal(0, 1e-3) + (gain + 0.1 * (-1) ** seed) * (arm == "top-one")

    study = load("photographs-2d")
    values = study.results(sizes, records_of(score), None)
    text = fill(study.folder / "part2d.md", preset="full", **values)
    assert said in text
    assert ("below `ranks` on photographs and emojis and icons" in text) is (gain < 0)


@pytest.mark.parametrize(
    ("gains", "said"),
    [
        ({"photographs": 1.6, "emojis": 3.0, "icons": 2.0}, "at least 1.5 points of R@10 on each"),
        ({"photographs": 1.4, "emojis": 3.0, "icons": 2.0}, "is missed on photographs"),
        ({"photographs": 1.6, "emojis": 0.0, "icons": -2.0}, "is missed on emojis and icons"),
    ],
)
def test_the_presets_goal_is_missed_by_name(gains, said):
    rng, study = np.random.default_rng(3), load("photographs-2e")

    def score(name, arm, seed):
        return 10 + rng.normal(0, 1e-3) + gains[name] * (arm == ENCODERS)

    other = SIZES["photographs-2d"], records_of(score)
    finds = records_of(score, [ENCODERS], SIZES["photographs-2e"])
    values = study.results(SIZES["photographs-2e"], finds, lambda _: other)
    assert said in fill(study.folder / "part2e.md", preset="full", **values)


# --- ids ---


def test_it_matters_from_the_smallest_share_without_a_gap():
    shares = {
        "emojis, all": 90.0, "emojis, half": 38.0, "emojis, tenth": 3.0, "icons, all": 99.0,
        "icons, half": 47.0, "icons, tenth": 6.0, "rows, 250": 3.0, "rows, 1000": 13.0,
    }  # fmt: skip
    above = {"emojis, all", "emojis, half", "icons, tenth", "rows, 250", "rows, 1000"}
    found = {
        (cell, "clip", pairs.IGNORE, measure): difference(1.0, 0.01 if cell in above else 0.2)
        for cell in shares
        for measure in ids.measures(cell)
    }
    assert ids.matters(found, shares) == [
        ["emojis", "R@10", "from 38.0 % on"],
        ["emojis", "zero-shot top-1", "from 38.0 % on"],
        ["icons", "R@10", "at none"],
        ["icons", "zero-shot top-1", "at none"],
        ["rows", "R@10", "from 3.0 % on"],
    ]


@pytest.mark.parametrize(("captions", "partnered"), [(8, 100.0), (64, 0.0)])
def test_leaving_partners_out_changes_a_training_that_has_any(captions, partnered):
    noise = torch.Generator().manual_seed(0)
    pictures = torch.randint(256, (64, 64, 64, 3), generator=noise, dtype=torch.uint8)
    side = pairs.Captioned(pictures, [[f"word{n % captions}"] for n in range(64)])
    drawn = pairs.Drawings(side, side, ["word1", "word2"], [0] * 64)
    weights = {}
    for arm in ("clip own", "clip ignore"):
        setting = pairs.Setting("emojis, all", arm, 1, 1, 0.01, 32)
        model, share = pairs.train(setting, drawn)
        assert abs(share - partnered) < 5
        assert drawn.measure(model).keys() == {pairs.RECALL, pairs.ZERO_SHOT}
        weights[arm] = torch.cat([x.detach().flatten() for x in model.parameters()])
    assert torch.equal(*weights.values()) is (partnered == 0)


def test_ids_have_32_tests():
    rng, sizes, study = np.random.default_rng(0), SIZES["ids"], load("ids")
    records = {
        one: {
            "metrics": {
                m: 30 + 2 * one.arm.endswith("ignore") + rng.normal(0, 0.1) for m in ids.measures(one.cell)
            },
            "partnered": 50.0,
            "conditions": {"cores": 2},
        }
        for one in ids.planned(sizes)
    }
    values = study.results(sizes, {"ids": Find("ids", records)}, None)
    assert values["tests"] == len(values["rows"]) == 32
    assert "from 50.0 % on" in fill(study.folder / "ids.md", preset="full", **values)


# --- references ---


@pytest.mark.parametrize(
    ("lists", "recall", "yes"),
    [
        (difference(1.5, 0.01), difference(0.0, 0.9), True),
        (difference(1.4, 0.01), difference(0.0, 0.9), False),  # too small a gain
        (difference(1.5, 0.06), difference(0.0, 0.9), False),  # not shown
        (difference(1.5, 0.01), difference(-0.01, 0.9), False),  # R@10 is below
        (difference(1.5, 0.01), difference(0.1, 0.9, half=1.2), False),  # it may be a point below
    ],
)
def test_the_question_is_answered_as_the_plan_says(lists, recall, yes):
    found = {
        ("emojis", (arm, "clip"), m): difference(0.0, 1.0)
        for arm in references.LISTS
        for m in ("nDCG@10", "R@10")
    }
    found["emojis", ("lambda", "clip"), "nDCG@10"] = lists
    found["emojis", ("lambda", "clip"), "R@10"] = recall
    assert references.answers(SIZES["references"], found, "emojis") == (["lambda"] if yes else [])


def test_references_have_72_tests():
    rng = np.random.default_rng(0)
    arms = {
        name: Arms(
            {
                arm: {seed: {"metrics": {m.title: rng.normal(), "R@10": rng.normal()}} for seed in range(12)}
                for arm in ("clip", *references.LISTS)
            }
        )
        for name, m in references.LISTED.items()
    }
    found = references.tests(arms)
    assert len(found) == 72
    assert ("emojis", ("lambda − reference beside clip", "lambda beside clip"), "R@10") in found
