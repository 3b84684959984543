"""The study of hard negatives: its rules, its losses, and a small run of it on made-up photographs."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from studies.data.features import Side
from studies.data.flickr8k import Photographs
from studies.negatives import data, rules
from studies.negatives.losses import HardNegatives
from studies.runner import Run, load
from test_studies import Encoders
from torch.nn.functional import normalize

import rankloss

COUNTS = Counter({word: 3 for groups in rules._GROUPS.values() for of in groups for word in of.split()})


def unit(*shape, seed):
    return normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


@pytest.mark.parametrize(
    ("captions", "kind", "changed"),
    [
        (["A red sky"], "colour", "red"),
        (["Two cyclists race"], "number", "two"),
        (["Men argue"], "object", "men"),
        (["A man and a dog rest"], None, None),
        (["A tree"], "", ""),
    ],
)
def test_a_hard_negative_differs_by_one_rule(captions, kind, changed):
    ((found,),) = rules.negatives([captions], COUNTS)
    words, others = rules.words_of(captions[0]), rules.words_of(found.text)
    differ = [pair for pair in zip(words, others, strict=False) if pair[0] != pair[1]]
    if kind == "":
        assert found == ("", "")
    elif kind is None:  # a noun, or both nouns
        assert (found.kind, len(differ)) in {("object", 1), ("swap", 2)}
    else:
        ((before, after),) = differ
        assert (found.kind, before) == (kind, changed)
        (group,) = (of.split() for of in rules._GROUPS[kind] if changed in of.split())
        assert after in group


def test_a_hard_negative_has_no_word_of_the_pictures_captions_and_none_that_is_never_seen():
    captions = ["A black sky", "blue, green and yellow", "white or brown"]
    few = Counter(["black", "blue", "green", "yellow", "white", "brown", "red"])
    (found,) = rules.negatives([captions], few)
    assert all("red" in rules.words_of(one.text) for one in found)
    assert found == rules.negatives([captions], few)[0]
    assert rules.negatives([["a red sky"]], Counter(red=5)) == [[("", "")]]


def test_swapped_nouns_are_the_same_words():
    texts = [f"a {a} sees a {b}" for a in ("man", "woman", "boy") for b in ("zebra", "lion", "ball")]
    counts = Counter()  # so that no other word can be drawn
    found = [one for of in rules.negatives([[text] for text in texts], counts) for one in of]
    swapped = {one.text for one in found if one.kind == "swap"}
    assert swapped == {"a ball sees a man", "a ball sees a woman", "a ball sees a boy"}


V, T, N = (unit(6, 8, seed=seed) for seed in range(3))
HAS = torch.tensor([True, True, False, True, True, True])


def value(name, weight=1.0):
    return HardNegatives(name, weight)(V, T, torch.tensor(9.0), negatives=N, has_negative=HAS)


def test_the_losses_are_those_of_the_plan():
    clip, own = rankloss.ClipLoss()(V, T, torch.tensor(9.0)), torch.arange(6)
    assert value("clip").item() == pytest.approx(clip.item(), rel=1e-6)
    to_texts = torch.nn.functional.cross_entropy(9 * V @ torch.cat([T, N[HAS]]).T, own)
    to_pictures = torch.nn.functional.cross_entropy(9 * T @ V.T, own)
    assert value("negclip").item() == pytest.approx((to_texts + to_pictures).item() / 2, rel=1e-6)
    assert value("lists", 2.0).item() == pytest.approx((clip + 2 * to_texts).item(), rel=1e-6)
    margins = 9 * (V * (T - N)).sum(-1)[HAS]
    pairs = torch.nn.functional.softplus(-margins).mean()
    assert value("preferences", 3.0).item() == pytest.approx((clip + 3 * pairs).item(), rel=1e-6)


def test_mimicry_stands_beside_every_loss():
    inputs = {
        "negatives": N,
        "has_negative": HAS,
        "reference_image_features": T,
        "reference_text_features": V,
    }
    for name in ("clip", "negclip", "preferences"):
        both = rankloss.MimicryLoss(HardNegatives(name), weight=0.5)(V, T, torch.tensor(9.0), **inputs)
        distance = (V - T).square().sum(-1).mean()
        assert both.item() == pytest.approx((value(name) + distance).item(), rel=1e-6)


def test_accuracy_counts_captions_with_a_negative_and_blind_is_that_of_another_picture():
    eye = torch.eye(4)
    texts = torch.stack([eye, eye.roll(1, 0)], 1)  # the second caption is that of the row before
    part = data.Part(Side(eye, texts), texts.flip(1), torch.tensor([[0, -1], [3, 0], [3, 3], [-1, -1]]))
    model = SimpleNamespace(pictures=lambda x: x, sentences=lambda x: x)
    found = data.told(model, part)
    assert (found["right"], found["blind right"], found["of"]) == ("1110", "0110", "1220")
    assert found["accuracy"] == pytest.approx(100 * (1 + 0.5 + 0.5) / 3)
    assert found["blind"] == pytest.approx(100 * (0 + 0.5 + 0.5) / 3)
    assert found["seen"] == pytest.approx(100 / 3)
    assert found["colour"] == pytest.approx(50.0)
    record = {"metrics": {"told": found}}
    assert data.told_of_pictures(record).mean() == pytest.approx(found["accuracy"])


def photographs(folder):
    """Made-up photographs, every third of which shows a dog."""
    rng = np.random.default_rng(0)
    splits = {"train": range(500), "dev": range(500, 560), "test": range(560, 620)}
    sentences = {}
    (folder / "Flicker8k_Dataset").mkdir()
    for row in range(620):
        name = f"{row}.png"
        pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "Flicker8k_Dataset" / name)
        who = ("dog", "man", "girl")[row % 3]
        things = (("two red caps", "three blue caps")[row % 2], f"a {who} and a hat")
        sentences[name] = [f"{', '.join(things)} {k}" for k in range(5)]
    names = {side: [f"{row}.png" for row in of] for side, of in splits.items()}
    return Photographs(folder, names, sentences, [])


@pytest.mark.slow
def test_a_small_study_is_trained_and_reported_and_not_repeated(tmp_path, monkeypatch):
    made = photographs(tmp_path)
    monkeypatch.setattr(data, "read", lambda _: made)
    study = load("negatives")
    options, run = SimpleNamespace(output=tmp_path, data=tmp_path), Run(study, "quick", tmp_path)
    found = data.data(study.sizes("quick"), options, Encoders)["photographs"]
    dogs, others = found.dogs["dev"], found.others["dev"]
    assert (len(dogs.kinds), len(others.kinds)) == (20, 40)
    assert (found.sides["train"].kinds >= 0).all()
    run.train({"photographs": found}, Console(quiet=True))
    text = run.write().read_text(encoding="utf-8")
    assert "smoke test" in text
    records = run.stores["photographs"].find().values()
    start = [one for one in records if one["setting"]["arm"] == "start"]
    tuned = [one for one in records if one["setting"]["arm"] == "clip" and one["setting"]["start_lr"]]
    assert len(start) == 3
    assert all({"dogs", "told", "hits"} < one["metrics"].keys() for one in (*start, *tuned))
    assert len({one["metrics"]["geometry"]["logit_scale"] for one in (*start, *tuned)}) > 3
    before = run.stores["photographs"].path.read_bytes()
    run.train({"photographs": found}, Console(quiet=True))
    assert run.stores["photographs"].path.read_bytes() == before


def test_without_the_folder_of_photographs_an_error_names_the_option():
    with pytest.raises(RuntimeError, match="--data"):
        data.data(load("negatives").sizes("quick"), SimpleNamespace(data=None))
