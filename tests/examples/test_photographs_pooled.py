"""Softmax against ranks over three data sets: the plan, the arm, the primary test."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from photostudy import pooled
from photostudy.students import losses
from photostudy.students.losses import TOP_ONE
from scipy import stats
from torch.nn.functional import normalize

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_seeds_are_in_no_other_record():
    used = set()
    for path in EXAMPLES.rglob("records.jsonl"):
        if "part2d" not in path.parts:
            settings = (json.loads(line).get("setting", {}) for line in path.read_text().splitlines())
            used |= {setting.get("seed") for setting in settings}
    assert len(used) > 50
    assert used.isdisjoint(pooled.SEEDS)


def test_a_stop_leaves_whole_blocks():
    settings = pooled.planned()
    assert len(set(settings)) == len(settings) == 144
    by_seed = itertools.groupby(settings, key=lambda of: of[1].seed)
    assert [len(list(of)) for _, of in by_seed] == [9] * 16


@pytest.mark.parametrize("scale", [20.0, 40.0])
def test_the_librarys_options_are_the_term_of_the_other_parts(scale):
    torch.manual_seed(0)
    v, t, pictures, texts = (
        normalize(torch.randn(60, width, dtype=torch.float64), dim=-1) for width in (8, 8, 20, 12)
    )
    logit_scale = torch.tensor(14.3, dtype=torch.float64)
    found = []
    for arm, weight in ((TOP_ONE, 16.0), ("softmax", 1.0)):
        inputs = [x.clone().requires_grad_() for x in (v, t, logit_scale)]
        loss = losses.build(arm, 8, (20, 12), weight=weight, scale=scale)
        value = loss(*inputs, **losses.references(arm, (pictures, texts)))
        found.append((value, *torch.autograd.grad(3 * value, inputs)))
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-14)


def values(rng):
    return {
        name: {arm: dict(zip(pooled.SEEDS, rng.normal(10, 1, 16), strict=True)) for arm in pooled.ARMS}
        for name in pooled.SETS
    }


def test_the_primary_test_weighs_data_sets_alike():
    given = values(np.random.default_rng(0))
    blocks = [
        np.mean([given[name][TOP_ONE][seed] - given[name]["ranks"][seed] for name in pooled.SETS])
        for seed in pooled.SEEDS
    ]
    found, test = pooled.pooled(given), stats.ttest_1samp(blocks, 0.0)
    assert (found.mean, found.p) == pytest.approx((np.mean(blocks), test.pvalue), rel=1e-12)
    assert (found.low, found.high) == pytest.approx(tuple(test.confidence_interval()), rel=1e-12)
    assert found.adjusted == found.p


def test_nine_secondary_tests_are_corrected_together():
    found = pooled.secondary(values(np.random.default_rng(1)))
    assert len(found) == 9
    smallest = min(found.values(), key=lambda d: d.p)
    assert smallest.adjusted == pytest.approx(min(1.0, 9 * smallest.p))


def test_nothing_is_reported_before_all_trainings_are_there(tmp_path):
    with pytest.raises(RuntimeError, match="144 of 144 trainings are missing"):
        pooled.write({name: {} for name in pooled.SETS}, tmp_path / "part2d.md")


@pytest.mark.parametrize(
    ("gain", "said"), [(1.0, "Softmax wins"), (-1.0, "Ranks win"), (0.0, "Neither is shown")]
)
def test_the_report_decides_as_the_plan_says(tmp_path, gain, said):
    rng = np.random.default_rng(2)
    records = {name: {} for name in pooled.SETS}
    noise = dict(zip(pooled.SEEDS, np.tile([-0.1, 0.1], 8), strict=True))
    for name, setting in pooled.planned():
        score = 10 + rng.normal(0, 1e-3) + (gain + noise[setting.seed]) * (setting.arm == TOP_ONE)
        records[name][setting] = {
            "metrics": {"retrieval": {"R@10, mean of both": score}},
            "conditions": {"cores": 2},
        }
    text = pooled.write(records, tmp_path / "part2d.md").read_text()
    assert said in text
    assert "cores 2" in text
