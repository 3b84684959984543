"""The example of ordered ids: the lists, the loss, the batches, the plan, the trainings and the report."""

from __future__ import annotations

import dataclasses
import io
import itertools
import math

import numpy as np
import pytest
import torch
from examples_common.records import Store
from examples_common.trainings import finder
from hypothesis import given
from hypothesis import strategies as st
from orderstudy import command, findings, plan, report, task
from orderstudy.plan import CLIP, COMPARISONS, NEAR_CLIP, NEAR_ORDERS, ORDERS
from orderstudy.study import Study
from orderstudy.train import OrdersLoss, Setting, train, with_neighbours
from photographs_folder import PICTURES, Encoders, filled, read_folder
from photostudy import features, folder, heads
from rich.console import Console
from studies import assert_corrected, assert_reported_again, decided, records
from torch.nn.functional import normalize

import rankloss

TINY = dataclasses.replace(
    plan.FULL,
    sizes={"photographs": (2, 8), "emojis": (2, 8)},
    smoothings=(0.1, 0.2),
    weights=(1.0,),
    seeds=(5, 6, 7),
    train_pictures=PICTURES["train"],
)


def _random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_listed_ids_are_those_of_the_nearest_mean_captions():
    captions = _random(9, 3, 4)
    means = np.stack([(of / np.linalg.norm(of, axis=1, keepdims=True)).mean(0) for of in captions.numpy()])
    cosines = means @ means.T / np.outer(*[np.linalg.norm(means, axis=1)] * 2)
    for own, listed in enumerate(task.search(captions, 5).tolist()):
        others = sorted((i for i in range(9) if i != own), key=lambda i: -cosines[own, i])
        assert listed == others[:5]


def test_a_batch_is_ranked_by_each_list_its_own_pair_first_and_all_others_uncounted():
    v, t = (normalize(_random(6, 4, seed=seed), dim=-1) for seed in (1, 2))
    places = torch.tensor([[1, -1, 4], [-1, -1, -1], [5, 0, 1], [-1, 2, -1], [0, 3, 5], [2, 4, -1]])
    grades = torch.full((6, 6), -math.inf)
    for row, of in enumerate(places.tolist()):
        for rank, item in enumerate([row, *of]):
            if item >= 0:
                grades[row, item] = -rank
    index = torch.arange(6).expand(6, 6)
    of = {
        (x, y): rankloss.RankedLists()(x, y, grades, 9.0, candidate_index=index).item()
        for x, y in itertools.product((v, t), repeat=2)
    }
    cross, within = (of[v, t] + of[t, v]) / 2, (of[v, v] + of[t, t]) / 2
    scale = torch.tensor(9.0)
    assert OrdersLoss(in_modal=False)(v, t, places, scale).item() == pytest.approx(cross, rel=1e-5)
    assert OrdersLoss(in_modal=True)(v, t, places, scale).item() == pytest.approx(cross + within, rel=1e-5)


@given(st.integers(0, 10**6), st.integers(0, 4))
def test_each_seed_is_followed_by_its_best_ids_that_are_not_drawn_yet(seed, neighbours):
    permutation = torch.from_numpy(np.random.default_rng(seed).permutation(12))
    orders = task.search(_random(12, 2, 3, seed=seed), 4)
    left = with_neighbours(permutation, orders, neighbours).tolist()
    assert sorted(left) == list(range(12))
    for one in permutation.tolist():
        if one in left:
            group = [one, *[other for other in orders[one].tolist() if other in left][:neighbours]]
            assert left[: len(group)] == group
            del left[: len(group)]


def test_without_orders_and_neighbours_the_training_is_that_of_the_photographs():
    pairs = features.Side(_random(20, 6), _random(20, 5, 4))
    part = task.Part(pairs, task.search(pairs.sentences), lambda _: {})
    sizes = {"epochs": 2, "batch_size": 8, "label_smoothing": 0.1}
    found, together = train(Setting(CLIP, 3, "test", **sizes), part)
    expected = heads.train(heads.Setting("clip", 3, "test", **sizes, train_pictures=20), pairs)
    assert all(map(torch.equal, found.parameters(), expected.parameters()))
    assert together == pytest.approx(7 / 19, abs=0.15)
    near, more = train(Setting(NEAR_CLIP, 3, "test", **sizes, neighbours=4), part)
    assert more > together
    assert not all(map(torch.equal, near.parameters(), expected.parameters()))


# --- the plan ---


def test_every_arm_has_six_tries_and_starts_from_the_best_of_those_before():
    found = plan.searches(
        plan.FULL,
        "photographs",
        records(
            lambda one: {"R@10": one.weight - one.label_smoothing - one.lr + one.in_modal + one.neighbours}
        ),
    )
    assert {len(search) for search in found.values()} == {6}
    assert {(one.lr, one.label_smoothing) for one in found[ORDERS]} == {(5e-4, 0.1)}
    assert {one.lr for one in found[NEAR_CLIP]} == {5e-4}
    assert {one.in_modal for one in found[NEAR_ORDERS]} == {True}
    chosen = plan.best(found[NEAR_ORDERS])
    assert (chosen.neighbours, chosen.weight) == (10, max(plan.FULL.weights))
    assert {len(of) for of in plan.arms(plan.FULL, found).values()} == {8}
    assert list(plan.searches(plan.FULL, "emojis", lambda _: {})[ORDERS]) == []


# --- from the data to the report ---


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    root = tmp_path_factory.mktemp("flickr8k")
    pictures = read_folder(root)
    cache = filled(pictures)
    ranked = task.of_photographs(pictures, cache, PICTURES["train"])
    study = Study("photographs", ranked, Store(tmp_path_factory.mktemp("results")))
    study.follow(TINY, Console(file=io.StringIO()))
    return study


def _findings(study):
    return findings.findings(TINY, {"photographs": finder(study.store, Setting)})


def test_the_tests_are_paired_by_seed_and_corrected_together(trained):
    found = _findings(trained)
    assert found.missing == 0
    of = found.records["photographs"]
    pairs = [
        [[of[arm][seed]["metrics"]["experts τ_c"] for seed in TINY.seeds] for arm in pair]
        for pair in COMPARISONS
    ]
    assert_corrected([found.others["photographs", pair] for pair in COMPARISONS], pairs)


def _metrics(value):
    return dict.fromkeys((plan.PRIMARY, *plan.SECONDARY.values()), value)


@pytest.mark.parametrize(
    ("means", "orders", "sampler"),
    [
        ({}, False, False),
        ({ORDERS: 12.0, NEAR_ORDERS: 12.0}, True, False),
        ({NEAR_ORDERS: 12.0}, True, True),
        ({NEAR_CLIP: 12.0, NEAR_ORDERS: 12.0}, False, False),  # the batches', not the orders'
        ({ORDERS: 8.0, NEAR_CLIP: 12.0}, False, False),
    ],
)
def test_the_decision_is_the_plans(means, orders, sampler):
    finds = {"photographs": decided({}, _metrics), "emojis": decided(means, _metrics)}
    found = findings.findings(TINY, finds)
    assert findings.orders_help(found) == ["emojis"] * orders
    assert findings.neighbours_help(found) == ["emojis"] * sampler
    said = " ".join(report.conclusions(found, 3, []))
    assert ("ids raises R@10 on emojis" in said) is orders
    assert ("neighbours raises R@10 on emojis" in said) is sampler
    assert ("neither" in said) is not orders


def test_an_unfinished_study_concludes_nothing(trained, tmp_path):
    store = Store(tmp_path / "results")
    with pytest.raises(RuntimeError, match="no record"):
        report.write(TINY, {"photographs": store}, tmp_path)
    text = report.write(TINY, {"photographs": trained.store, "emojis": store}, tmp_path).read_text()
    assert "12 of the planned trainings are missing" in text  # the emojis'
    assert "By the plan" not in text
    mean = _findings(trained).estimate("photographs", ORDERS, "R@10").mean
    assert f"{mean:.2f} ±" in text


def test_the_command_runs_on_emojis_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "FrozenEncoders", Encoders)
    options = ["--preset", "quick", "--output", str(tmp_path)]
    assert command.main(options) == 0
    assert folder.PICTURES in capsys.readouterr().out
    written = tmp_path / "quick/report/orders.md"
    text = written.read_text(encoding="utf-8")
    assert "smoke test" in text
    assert "Nothing is concluded from fewer than 3 seeds." in text
    assert_reported_again(command.main, options, written)
