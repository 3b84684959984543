"""Photographs: the folder and its checks, features, losses, measures."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from photographs_folder import PICTURES, Encoders, filled, write_folder
from photostudy import features, folder, heads, losses, measure
from photostudy.heads import Setting
from scipy.stats import kendalltau

import rankloss

TINY = {"train_pictures": PICTURES["train"], "batch_size": 8, "epochs": 2}


@pytest.fixture
def made(tmp_path):
    return tmp_path, write_folder(tmp_path)


# --- the folder ---


def test_the_folder_is_read_as_its_authors_ship_it(made):
    root, expected = made
    found = folder.read(root, expected)
    assert {side: len(names) for side, names in found.splits.items()} == PICTURES
    assert found.sentences["dev_3.jpg"] == [f"sentence {i} of dev_3.jpg" for i in range(5)]
    assert "left_out.jpg.1" not in found.sentences
    assert len(found.judgements) == PICTURES["test"] ** 2
    assert all(1 <= grade <= 4 for one in found.judgements for grade in one.grades)


def _change(old, new):
    return lambda path: path.write_bytes(path.read_bytes().replace(old, new, 1))


@pytest.mark.parametrize(
    ("name", "do"),
    [
        (folder.PICTURES, lambda path: path.rename(path.with_name("pictures"))),
        (f"{folder.PICTURES}/dev_2.jpg", lambda path: path.unlink()),
        (f"{folder.TEXTS}/{folder.EXPERTS}", lambda path: path.unlink()),
        (
            f"{folder.TEXTS}/{folder.EXPERTS}",
            lambda path: path.write_text("test_0.jpg\ttest_1.jpg#0\t5\t1\t1\n"),
        ),
        (f"{folder.TEXTS}/{folder.SENTENCES}", _change(b"sentence 4 of dev_1", b"sentence 5 of dev_1")),
        (f"{folder.TEXTS}/Flickr_8k.trainImages.txt", _change(b"train_3.jpg", b"dev_3.jpg")),
    ],
)
def test_the_first_bad_file_is_named_with_what_belongs_there(made, name, do):
    root, expected = made
    do(root / name)
    with pytest.raises(folder.FolderError) as caught:
        folder.read(root, expected)
    first, *rest = str(caught.value).split("\n")
    assert first.split(": ")[0].endswith(name.rpartition("/")[2])
    assert "\n".join(rest) == folder.WHERE


# --- features ---


def compute(root, expected, encoders):
    photographs = folder.read(root, expected)
    cache = filled(photographs, encoders)
    return {side: cache.side(names) for side, names in photographs.splits.items()}


def test_features_are_computed_once_and_again_for_changed_pictures(made, monkeypatch):
    monkeypatch.setattr(features, "BLOCK", 10)
    root, expected = made
    encoders = Encoders()
    found = compute(root, expected, encoders)
    assert encoders.pictures_seen == sum(PICTURES.values())
    names = folder.read(root, expected).splits["train"]
    photographs = folder.read(root, expected)
    for side, names in photographs.splits.items():
        assert found[side].sentences.shape == (len(names), 5, 12)
        own = Encoders().sentences(photographs.sentences[names[-1]])
        np.testing.assert_array_equal(found[side].sentences[-1], own)
    again = compute(root, expected, encoders)
    assert encoders.pictures_seen == sum(PICTURES.values())
    torch.testing.assert_close(again["test"].pictures, found["test"].pictures, rtol=0, atol=0)
    (root / folder.PICTURES / "train_23.jpg").write_bytes(
        (root / folder.PICTURES / "train_0.jpg").read_bytes()
    )
    changed = compute(root, expected, encoders)
    assert encoders.pictures_seen == sum(PICTURES.values()) + 4  # the last block of the train side
    torch.testing.assert_close(changed["train"].pictures[23], found["train"].pictures[0], rtol=0, atol=0)


# --- losses and heads ---


@given(st.integers(2, 6), st.floats(0.01, 0.5), st.integers(0, 100))
def test_label_smoothing_by_its_definition(n, epsilon, seed):
    rng = np.random.default_rng(seed)
    v, t = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in rng.normal(size=(2, n, 3)))
    targets = (1 - epsilon) * np.eye(n) + epsilon / n
    logits = 5 * v @ t.T
    logs = [of - np.log(np.exp(of).sum(1, keepdims=True)) for of in (logits, logits.T)]
    expected = np.mean([-(targets * of).sum(1).mean() for of in logs])
    loss = losses.build("clip", label_smoothing=epsilon)
    found = loss(torch.from_numpy(v), torch.from_numpy(t), logit_scale=torch.tensor(5.0))
    assert found.item() == pytest.approx(expected)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_arms_are_the_librarys_losses(smoothing):
    inputs = (*torch.nn.functional.normalize(torch.randn(2, 6, 4), dim=-1), torch.tensor(10.0))
    base = losses.build("clip", label_smoothing=smoothing)(*inputs)
    if not smoothing:
        torch.testing.assert_close(base, rankloss.ClipLoss()(*inputs))
    added = {}
    for name in losses.NAMES:
        loss = losses.build(name, label_smoothing=smoothing)
        if hasattr(loss, "set_epoch"):
            loss.set_epoch(4, 4)
        added[name] = (loss(*inputs) - base).item()
    cross, in_ = (
        rankloss.RankConsistency(cross_modal=x, in_modal=1 - x)(*inputs).item() / 16 for x in (1, 0)
    )
    expected = {"clip": 0.0, "rankclip": 2 * (cross + in_), "rankclip-constant": cross + in_}
    expected |= {"rankclip-cross": 2 * cross, "rankclip-in": 2 * in_}
    assert added == pytest.approx(expected, rel=1e-4)


def test_a_seed_trains_the_same_heads_and_the_scale_keeps_to_its_bounds(made):
    train = features.standardised(compute(*made, Encoders()))["train"]
    one, same, other = (
        heads.train(Setting("rankclip", seed, "dev", **TINY), train).of_pictures[1].weight
        for seed in (0, 0, 1)
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    scales = {
        fixed: heads.train(
            Setting("clip", 0, "dev", **TINY, scale_start=7.0, scale_ceiling=7.0, scale_fixed=fixed, lr=0.1),
            train,
        )
        for fixed in (True, False)
    }
    assert scales[True].log_scale.item() == pytest.approx(math.log(7))
    assert 0 <= scales[False].log_scale.item() <= math.log(7) + 1e-6
    with pytest.raises(ValueError, match="train_pictures: 6000 of 24"):
        heads.train(Setting("clip", 0, "dev"), train)


# --- measures ---


@given(
    st.lists(st.lists(st.integers(0, 4), min_size=6, max_size=6), min_size=1, max_size=5), st.integers(1, 5)
)
def test_the_median_rank_counts_what_is_above_the_best_right_answer(rows, right):
    scores = torch.tensor(rows, dtype=torch.float64)
    mask = torch.zeros_like(scores, dtype=torch.bool)
    mask[:, :right] = True
    ranks = []
    for row in rows:
        best, wrong = max(row[:right]), row[right:]
        above = sum(x > best for x in row)
        ranks.append(1 + above + sum(x == best for x in wrong) / 2)
    assert measure.median_rank(scores, mask) == pytest.approx(np.median(ranks))


def test_the_correlation_is_of_single_grades_without_a_pictures_own_sentences(made):
    root, expected = made
    judgements = folder.read(root, expected).judgements
    rng = np.random.default_rng(1)
    scores = {(one.picture, one.sentence): rng.normal() for one in judgements}
    kept = [one for one in judgements if one.picture != one.sentence[0]]
    assert len(kept) == PICTURES["test"] * (PICTURES["test"] - 1)
    x = [scores[one.picture, one.sentence] for one in kept for _ in range(3)]
    y = [grade for one in kept for grade in one.grades]
    found = measure.correlation_with_experts(scores, judgements)
    concordance = sum(
        np.sign(x[i] - x[j]) * np.sign(y[i] - y[j]) for i, j in itertools.combinations(range(len(x)), 2)
    )
    classes = len(set(y))
    tau_c = 2 * concordance / (len(x) ** 2 * (classes - 1) / classes)
    assert found["experts τ_c"] == pytest.approx(100 * tau_c)
    assert found["experts τ_b"] == pytest.approx(100 * kendalltau(x, y).statistic)
