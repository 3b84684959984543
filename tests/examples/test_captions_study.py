"""The study of captions: its memory, its hits, its two intervals, and a report that is of its records."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from studies.captions import study, teachers
from studies.captions.memory import MemoryLoss
from studies.captions.teachers import Teachers
from studies.plan import Find, MissingError
from studies.runner import load
from torch.nn.functional import normalize

import rankloss

SIZES = load("captions").sizes("full")


def unit(*shape, seed):
    return normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_the_memory_of_one_batch_has_clips_gradient():
    """With γ = 1 and ε = 1/(N − 1), at a second visit too; in float64 to rounding."""
    n, inputs = 12, [unit(12, 8, seed=seed).double() for seed in (0, 1)]
    loss, places = MemoryLoss(40, epsilon=1 / (n - 1)), torch.randperm(40)[:n]
    for scale in (5.0, 60.0):
        gradients = []
        for call in (rankloss.ClipLoss(), lambda *of: loss(*of, rows=places)):
            of = [x.clone().requires_grad_() for x in (*inputs, torch.tensor(scale, dtype=torch.float64))]
            gradients.append(torch.autograd.grad(call(*of), of))
        for mine, clips in zip(*reversed(gradients), strict=True):
            assert clips.abs().max() > 0
            torch.testing.assert_close(mine, clips, rtol=1e-9, atol=1e-13)


def test_the_memory_is_an_average_over_visits():
    loss, scale, places = MemoryLoss(6), torch.tensor(3.0), torch.tensor([4, 1, 0])
    v, t = unit(3, 5, seed=2), unit(3, 5, seed=3)
    ratios = (3 * (v @ t.T - (v * t).sum(1, keepdim=True))).exp()
    g = (ratios.sum(1) - 1) / 2
    loss(v, t, scale, places)
    torch.testing.assert_close(loss.means[0, places].float(), g)
    assert loss.means[0, [2, 3, 5]].isnan().all()
    loss.set_epoch(5, 8)
    assert loss.gamma == pytest.approx(0.2)
    loss(t, v, scale, places)  # towers change places
    swapped = ((3 * (v @ t.T - (v * t).sum(1))).exp().sum(0) - 1) / 2
    torch.testing.assert_close(loss.means[0, places].float(), 0.8 * g + 0.2 * swapped)


def test_shuffled_captions_are_those_of_other_pictures(tmp_path):
    captions = [[f"a{i % 5} b{i % 7}", f"b{i % 7} c{i % 3}"] for i in range(30)]
    pixels = torch.randint(0, 256, (30, 32, 32, 3), dtype=torch.uint8)
    teachers = Teachers(captions, pixels, lambda: [], tmp_path)
    rows, shuffled = teachers.rows("tf-idf"), teachers.rows("shuffled tf-idf")
    assert rows.shape[:2] == (30, 2)
    assert sorted(map(tuple, shuffled.flatten(1).tolist())) == sorted(map(tuple, rows.flatten(1).tolist()))
    assert (shuffled != rows).any(dim=(1, 2)).float().mean() > 0.8
    both = teachers.rows("tf-idf+shuffled tf-idf")[:, 0]
    expected = (rows[:, 0] @ rows[:, 0].T + shuffled[:, 0] @ shuffled[:, 0].T) / 2
    torch.testing.assert_close(both @ both.T, expected)
    small = teachers.rows("thumbnails")
    assert small.shape == (30, 3 * 8 * 8)
    torch.testing.assert_close(small.norm(dim=1), torch.ones(30))


@pytest.mark.parametrize("name", ["tf-idf", "shuffled tf-idf"])
def test_rows_of_many_texts_are_those_with_their_zeros(name, tmp_path, monkeypatch):
    captions = [[f"a{i % 5} b{i % 7}", f"b{i % 7} c{i % 3}", f"alone{i}"] for i in range(30)]
    made = [torch.zeros(30, 32, 32, 3, dtype=torch.uint8), lambda: [], tmp_path]
    whole = Teachers(captions, *made).rows(name)
    monkeypatch.setattr(teachers, "_MOST", 80)
    monkeypatch.setattr(teachers, "_PART", 7)
    sparse = Teachers(captions, *made).rows(name)
    assert isinstance(sparse, teachers.SparseRows)
    rows, drawn = torch.tensor([3, 29, 3, 0]), torch.tensor([0, 2, 1, 2])
    torch.testing.assert_close(sparse[rows, drawn], whole[rows, drawn], rtol=0, atol=0)


def made_up(gain, *, sizes=SIZES, blocks=1):
    """Return records of the first blocks, where an arm is so many points above CLIP."""
    finds = {name: Find(name, {}) for name in (*study.SETS, *study.LARGE)}
    rng = np.random.default_rng(0)
    plan = type(sizes)(**{**vars(sizes), "blocks": sizes.blocks[:blocks]})
    for _ in range(1000):
        try:
            study.ask(plan, finds)
            return finds
        except MissingError as missing:
            for one in missing.settings:
                n = 40
                score = 30 + gain.get(one.arm, 0) + rng.normal(0, 0.3) + np.log2(one.lr / 0.001)
                bits = rng.permutation(n) < n * score / 100
                packed = np.packbits(bits).tobytes().hex()
                hits = {"pictures": n, "image_to_text": packed, "text_to_image": packed}
                finds[missing.data].records[one] = {
                    "metrics": {"retrieval": {"R@10, mean of both": score}, "hits": hits},
                    "conditions": {"cores": 2},
                }
    raise AssertionError


@pytest.mark.slow
def test_the_verdict_is_that_of_the_plan():
    finds = made_up({"captions": 4.0, "shuffled": -2.0, "smoothing": -1.0})
    found = study.results(SIZES, finds)
    assert {size: (of["met"], of["absent"]) for size, of in found["verdicts"].items()} == {
        64: (True, []),
        250: (False, ["photographs-250"]),
    }
    assert len(found["primary"]) == 5
    assert found["captions_own"] == [row[0] for row in found["primary"]]
    assert all(row[2] == "`clip`" for row in found["primary"])
    tested = {(one.side, one.lr) for find in finds.values() for one in find.records if one.side == "test"}
    assert tested == {("test", 0.004)}  # the best of CLIP's rates, for every arm


@pytest.mark.slow
def test_what_shuffled_captions_gain_too_is_not_the_captions():
    found = study.results(SIZES, made_up({"captions": 4.0, "shuffled": 4.0}))
    assert found["captions_own"] == []
    assert len(found["not_captions"]) == 5
    assert not any(of["met"] for of in found["verdicts"].values())


@pytest.mark.slow
def test_the_reference_is_clips_best_try():
    found = study.results(SIZES, made_up({"captions": 4.0, "smoothing": 3.0}))
    assert all(row[2] == "`smoothing`" for row in found["primary"])
    assert not any(of["met"] for of in found["verdicts"].values())


def test_a_report_is_of_the_records_that_are_there():
    """A cell of whose arms one has fewer seeds is compared on the common ones."""
    finds = made_up({"captions": 4.0})
    emojis = finds["emojis"].records
    for one in [one for one in emojis if one.arm == "captions" and one.seed > 9101 and one.batch_size == 64]:
        del emojis[one]
    found = study.results(SIZES, {name: finds[name] for name in ("emojis", "icons")})
    n = {row[0]: row[4] for row in found["primary"]}
    assert n == {"emojis-64": "2", "emojis-250": "4", "icons-64": "4", "icons-250": "4"}


@pytest.mark.slow
def test_more_pairs_have_a_family_of_their_own_and_the_rate_of_fewer():
    """Their trainings are on their own data; no planned family grows."""
    finds = made_up({"captions": 4.0}, blocks=len(SIZES.blocks))
    found = study.results(SIZES, finds)
    few, all_icons = (finds[name].records for name in study.LARGE)
    assert {one.lr for one in few if one.side == "dev"} == {0.002, 0.004}
    assert {(one.side, one.lr) for one in all_icons} == {("test", 0.004)}
    cells = {"icons-71680-64", "icons-all-64"}
    assert {row[0] for row in found["large"]} == cells
    assert len(found["large"]) == 10
    assert len(found["primary"]) == len(found["control"]) == 6
    assert cells.isdisjoint(row[0] for row in found["secondary"])
    assert [row[0] for row in found["gains"]] == SIZES.curves
