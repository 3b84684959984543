"""Pairs that belong together, and lists with a reference: plans, measures, choices, tests."""

import importlib.util
import itertools
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from examples_common.statistics import Difference
from torch.nn.functional import normalize

STUDIES = Path(__file__).parents[2] / "examples" / "studies"


def loaded(name):
    spec = importlib.util.spec_from_file_location(f"{name}_study", STUDIES / name / "train.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


ids, references = loaded("ids"), loaded("references")


def test_seeds_are_in_no_other_record():
    seeds = {"ids": {*ids.SEEDS}, "references": {*references.SEEDS, *references.CHOICE_SEEDS}}
    for name, own in seeds.items():
        for path in STUDIES.parent.rglob("records.jsonl"):
            if STUDIES / name not in path.parents:
                settings = (json.loads(line).get("setting", {}) for line in path.read_text().splitlines())
                assert own.isdisjoint({setting.get("seed") for setting in settings}), path


# --- ids ---


def test_ids_are_trained_seed_by_seed():
    settings = ids.planned()
    assert len(set(settings)) == len(settings) == 8 * (6 * 2 * 2 + 2 * 2 * 3)
    assert [seed for seed, _ in itertools.groupby(settings, key=lambda one: one.seed)] == [*ids.SEEDS]


@pytest.mark.parametrize("loss", ids.LOSSES)
def test_sharing_is_clips_loss_where_partners_have_one_caption(loss):
    torch.manual_seed(0)
    captions = normalize(torch.randn(5, 8, dtype=torch.float64), dim=-1).requires_grad_()
    v = normalize(torch.randn(30, 8, dtype=torch.float64), dim=-1).requires_grad_()
    of = torch.randint(5, (30,))
    found = []
    for use in (ids.OWN, ids.SHARE):
        criterion = ids.build(f"{loss} {use}")
        if loss == "rankclip":
            criterion.set_progress(5, 10)
        value = criterion(v, captions[of], 14.3, **({} if use == ids.OWN else {"pair_ids": of}))
        found.append((value, *torch.autograd.grad(3 * value, (v, captions))))
    for own, shared in zip(*found, strict=True):
        torch.testing.assert_close(shared, own, rtol=1e-12, atol=1e-13)


def test_recall_counts_any_right_partner():
    similarity = torch.tensor([[0.9, 0.8, 0.1], [0.2, 0.3, 0.4], [0.5, 0.6, 0.7]])
    right = torch.tensor([[False, True, False], [True, False, True], [False, False, True]])
    # Rows: the second place, the first, the first; columns: the last place, the first, the first.
    assert [ids.recall(similarity, right, k) for k in (1, 2, 3)] == pytest.approx([200 / 3, 250 / 3, 100])


def test_pictures_of_a_smaller_share_are_among_those_of_a_larger():
    keys = [f"{number:04x}" for number in range(1000)]
    found = [ids.of_class(keys, share) for share in ids.SHARES.values()]
    assert [len(of) for of in found] == [1000, 500, 100]
    assert found[0] > found[1] > found[2]
    assert found == [ids.of_class(keys[::-1], share) for share in ids.SHARES.values()]


def difference(mean, adjusted):
    return Difference(mean, 0.1, 8, adjusted, adjusted)


def test_it_matters_from_the_smallest_share_without_a_gap():
    shares = {"emojis, all": 90.0, "emojis, half": 38.0, "emojis, tenth": 3.0, "icons, all": 99.0,
              "icons, half": 47.0, "icons, tenth": 6.0, "rows, 250": 3.0, "rows, 1000": 13.0}  # fmt: skip
    above = {"emojis, all", "emojis, half", "icons, tenth", "rows, 250", "rows, 1000"}
    found = {
        (cell, "clip", ids.IGNORE, measure): difference(1.0, 0.01 if cell in above else 0.2)
        for cell in shares
        for measure in ids.MEASURES[cell]
    }
    assert ids.matters(found, shares) == [
        ("emojis", ids.RECALL, "from 38.0 % on"),
        ("emojis", ids.ZERO_SHOT, "from 38.0 % on"),
        ("icons", ids.RECALL, "at none"),
        ("icons", ids.ZERO_SHOT, "at none"),
        ("rows", ids.RECALL, "from 3.0 % on"),
    ]


def test_ids_are_reported_once_all_trainings_are_there(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    records = {
        one: {
            "metrics": {
                m: 30 + 2 * one.arm.endswith("ignore") + rng.normal(0, 0.1) for m in ids.MEASURES[one.cell]
            },
            "partnered": 50.0,
            "conditions": {"cores": 2},
        }
        for one in ids.planned()
    }
    assert len(ids.tests(records)) == 32
    monkeypatch.setattr(ids, "write_report", lambda path, template, **values: values)
    values = ids.write(records)
    assert values["tests"] == len(values["rows"]) == 32
    del records[ids.planned()[0]]
    with pytest.raises(RuntimeError, match="1 of 288 trainings are missing"):
        ids.write(records)


# --- references ---


def test_a_choice_keeps_recall_where_a_try_does():
    a, b, c = (references.Setting("lambda", 0, "choice", lr) for lr in (1.0, 2.0, 3.0))
    assert references.best({a: (48.0, 60.0), b: (47.0, 61.6), c: (46.0, 63.0)}, 62.0) == b
    assert references.best({a: (48.0, 50.0), b: (47.0, 52.0)}, 62.0) == b  # none keeps it: the larger sum


@pytest.mark.parametrize(
    ("lists", "recall", "yes"),
    [
        (difference(1.5, 0.01), difference(0.0, 0.9), True),
        (difference(1.4, 0.01), difference(0.0, 0.9), False),  # too small a gain
        (difference(1.5, 0.06), difference(0.0, 0.9), False),  # not shown
        (difference(1.5, 0.01), difference(-0.01, 0.9), False),  # R@10 is below
        (difference(1.5, 0.01), Difference(0.1, 1.2, 12, 0.9, 0.9), False),  # it may be a point below
    ],
)
def test_the_question_is_answered_as_the_plan_says(lists, recall, yes):
    none = difference(0.0, 1.0)
    found = {("emojis", arm, "clip", m): none for arm in references.LISTS for m in ("nDCG@10", "R@10")}
    found |= {("emojis", "lambda", "clip", "nDCG@10"): lists, ("emojis", "lambda", "clip", "R@10"): recall}
    assert references.answers(found, "emojis") == (["lambda"] if yes else [])


def test_there_are_72_tests():
    rng = np.random.default_rng(0)
    values = {
        name: {
            arm: {seed: {references.LISTED[name]: rng.normal(), "R@10": rng.normal()} for seed in range(12)}
            for arm in ("clip", *references.LISTS)
        }
        for name in references.SETS
    }
    found = references.tests(values)
    assert len(found) == 72
    assert ("emojis", "lambda − reference beside clip", "lambda beside clip", "R@10") in found


def test_grades_of_zero_are_unranked_for_plackett_luce_alone():
    grades = torch.tensor([[1.0, 0.0]])
    assert references.changed("plackett_luce", grades).tolist() == [[1.0, -math.inf]]
    assert references.changed("lambda", grades) is grades
