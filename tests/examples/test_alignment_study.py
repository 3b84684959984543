"""The study of the alignment: its arms, its choices, and a report that is of its records."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace as Namespace

import numpy as np
import pytest
import torch
from PIL import Image
from studies import cells
from studies.alignment import heads, pretrained, study, zero_shot
from studies.alignment.data import Encoded
from studies.alignment.setting import Setting
from studies.alignment.students import ARMS, teacher, train
from studies.data.features import Side
from studies.data.sets import Source
from studies.runner import load
from studies.statistics import Arms

from batches import unit
from made_up_records import made_up, record

SIZES = load("alignment").sizes("full")
ENCODED = {"train": 140, "dev": 24, "test": 24, "second": 20}


def drawings():
    """Return a source of random pictures, whose captions are of three words."""
    rng = np.random.default_rng(0)
    captions = {side: [[f"a{i % 3} b{i % 5} c{i}"] for i in range(n)] for side, n in ENCODED.items()}

    def pictures(side):
        return [
            Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)) for _ in range(ENCODED[side])
        ]

    return Source(captions, pictures)


def of_two_views(n, *, seed, directions):
    """Return features of pictures and of captions, which share what both see."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(n, 6, generator=generator)
    noise = [0.7 * torch.randn(n, width, generator=generator) for width in (14, 12)]
    v, t = (shared @ of + more for of, more in zip(directions, noise, strict=True))
    return Side(torch.nn.functional.normalize(v, dim=-1), torch.nn.functional.normalize(t, dim=-1)[:, None])


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A small data set whose encoders are made up."""
    made = Encoded(drawings(), tmp_path)
    generator = torch.Generator().manual_seed(9)
    directions = [torch.randn(6, width, generator=generator) for width in (14, 12)]
    sides = {
        side: of_two_views(n, seed=seed, directions=directions)
        for seed, (side, n) in enumerate(ENCODED.items())
    }
    monkeypatch.setattr(made, "encoded", sides.__getitem__)
    return made


def test_the_closed_form_finds_what_both_encoders_see(data):
    found = heads.record(Setting("cca", 0, "test"), data)["metrics"]
    assert found["retrieval"]["R@10, mean of both"] > 80
    assert found["second"]["hits"]["pictures"] == ENCODED["second"]
    assert {"image_ridge", "text_ridge", "dimensions", "power", "root", "dev"} == found["chosen"].keys()
    assert found["joined"].keys() == {"cca-search"}


def test_a_record_of_heads_holds_those_that_stand_side_by_side(data):
    setting = Setting("heads", 3, "test", batch_size=20, epochs=3, lr=0.01)
    found = heads.record(setting, data)["metrics"]
    assert found["joined"].keys() == {"heads-2", "both", "both-2"}
    assert found["joined"]["both"]["chosen"]["weight"] in heads.WEIGHTS
    again = heads.record(setting, data)["metrics"]
    assert again["hits"] == found["hits"]
    tried = heads.record(dataclasses.replace(setting, side="dev"), data)["metrics"]
    assert "joined" not in tried
    assert "second" not in tried


def test_models_side_by_side_add_their_similarities():
    class Fixed:
        def __init__(self, seed):
            self.v, self.t = unit(5, 4, seed=seed), unit(5, 4, seed=seed + 1)

        def pictures(self, _):
            return self.v

        def sentences(self, _):
            return self.t[:, None]

    first, second = Fixed(0), Fixed(2)
    both = heads.SideBySide({first: 2.0, second: 1.0})
    found = both.pictures(None) @ both.sentences(None)[:, 0].T
    torch.testing.assert_close(found, (4 * first.v @ first.t.T + second.v @ second.t.T) / 5)


@pytest.mark.parametrize("arm", ARMS)
def test_every_student_trains_and_differs_from_clip(arm, data):
    def trained(name, value):
        return train(Setting(name, 1, "dev", batch_size=20, epochs=2, lr=0.01, value=value), data)

    first = {name: value for of in SIZES.tries.values() for name, value in of}[arm]
    model, clips = trained(arm, first), trained("clip", 0.0)
    assert all(of.isfinite().all() for of in model.parameters())
    same = torch.equal(model.of_pictures[1].weight, clips.of_pictures[1].weight)
    assert same is (arm == "clip")


@pytest.mark.parametrize("name", ["cca", "shuffled", "components", "heads"])
def test_a_teacher_has_unit_rows_of_the_students_width(name, data):
    of = teacher(name, data)
    n = ENCODED["train"]
    assert of.pictures.shape == (n, 256)
    assert of.sentences.shape == (n, 1, 256)
    for x in (of.pictures, of.sentences):
        torch.testing.assert_close(x.norm(dim=-1), torch.ones(x.shape[:-1]))


def test_a_closed_form_of_shuffled_pairs_does_not_find_the_partners(data):
    def own(name):
        of = teacher(name, data)
        return (of.pictures * of.sentences[:, 0]).sum(-1).mean()

    assert own("cca") > own("shuffled") + 0.2


def test_a_pretrained_clip_is_measured_on_new_and_on_old_pairs(data, tmp_path, monkeypatch):
    monkeypatch.setattr(pretrained, "PRETRAINING", dataclasses.replace(pretrained.PRETRAINING, epochs=1))
    of = pretrained.Pretrained(Encoded(drawings(), tmp_path / "old"), data)
    of.encoded("train")  # trains the CLIP, although nothing else here needs a gradient
    before = {name: x.clone() for name, x in of.start.state_dict().items()}
    setting = Setting("start", 0, "test", batch_size=20, epochs=2, lr=0.01)
    found = {arm: of.train(dataclasses.replace(setting, arm=arm))["metrics"] for arm in pretrained.ARMS}
    assert len({repr(one["hits"]) for one in found.values()}) == len(pretrained.ARMS)
    assert all(one[pretrained.OLD]["hits"]["pictures"] == ENCODED["test"] for one in found.values())
    for name, x in of.start.state_dict().items():
        assert torch.equal(x, before[name])


@pytest.fixture
def kept(data, tmp_path, monkeypatch):
    """Return a function from a share of a CLIP's own similarity to the metrics of its record."""
    monkeypatch.setattr(pretrained, "PRETRAINING", dataclasses.replace(pretrained.PRETRAINING, epochs=1))
    monkeypatch.setattr(zero_shot, "FEWEST_HELD_OUT", 5)
    monkeypatch.setattr(zero_shot, "FEWEST_TRAINED", 5)
    source = Source({side: worded(n) for side, n in ENCODED.items()}, drawings().pictures)
    of = pretrained.Pretrained(Encoded(source, tmp_path / "old"), data)
    return lambda share: of.train(Setting("start-kept", 0, "test", value=share))["metrics"]


def worded(n):
    """Return a caption for each picture, with one word of three."""
    return [[f"a {('cat', 'dog', 'owl')[i % 3]} c{i}"] for i in range(n)]


def test_a_share_of_one_is_the_clip_as_it_is_and_less_is_between(kept):
    found = {share: kept(share) for share in (1.0, 0.999, 0.0)}
    held_out = sum(ENCODED[side] for side in pretrained.HELD_OUT)
    for one in found.values():
        assert one["zero-shot"]["classes"] == ["cat", "dog", "owl"]
        assert one["zero-shot"]["pictures"] == held_out
    assert abs(found[1.0]["zero-shot"]["top-1"] - found[0.999]["zero-shot"]["top-1"]) < 5
    assert found[1.0]["hits"] != found[0.0]["hits"]


def test_the_table_of_shares_has_differences_with_intervals_over_pictures():
    def scored(hits):
        bits = np.packbits(np.array(hits, bool)).tobytes().hex()
        of_pairs = {
            "retrieval": {"R@10, mean of both": 100 * np.mean(hits)},
            "hits": {"pictures": len(hits), "image_to_text": bits, "text_to_image": bits},
        }
        zero = {"top-1": 100 * np.mean(hits), "pictures": len(hits), "hits": bits}
        return {0: {"metrics": {**of_pairs, "old": of_pairs, "zero-shot": zero}}}

    arms = {"start-kept 1": scored([0] * 10 + [1] * 10), "start-kept 0.9": scored([0] * 6 + [1] * 14)}
    rows = study.kept_rows(cells.Tested("emojis-after", Arms(arms)))
    half = 1.96 * np.std([0] * 16 + [100] * 4, ddof=1) / 20**0.5
    assert rows == [
        ["emojis-after", "1", "50.0", "50.0", "50.0"],
        ["emojis-after", "0.9", *[f"+20.0 ± {half:.1f}"] * 3],
    ]


def records(score, *, blocks):
    """Return the plan's first blocks of split 0 with two cells, and made-up records that follow them."""
    sizes = Namespace(**{**vars(SIZES), "blocks": SIZES.blocks[:blocks]})
    finds = made_up(study.ask, sizes, study.SETS, score)
    rng = np.random.default_rng(1)
    for find in finds.values():
        for one, of in find.records.items():
            if one.side == "test" and one.arm in heads.JOINED:
                of["metrics"]["joined"] = {
                    name: record(score(one) + 5, rng)["metrics"] for name in heads.JOINED[one.arm]
                }
    return sizes, finds


def test_every_arm_of_students_has_as_many_tries_and_its_best_is_tested():
    assert {len(SIZES.tries[arm]) for arm in ARMS if arm in SIZES.tries} == {3}

    def score(one):
        return 30.0 - abs(np.log2(max(one.lr, 1e-6) / 0.001)) - (2 if one.value in (16.0, 8.0) else 0)

    sizes, finds = records(score, blocks=2)
    (emojis,) = [of for of in study.by_cell(sizes, finds) if of.cell == "emojis-250"]
    assert {len(of) for of in emojis.tried.values()} == {len(SIZES.rates) + 2}
    tested = {one for one in finds["emojis"].records if one.side == "test" and one.epochs == 30}
    assert {one.lr for one in tested} == {0.001}
    assert {one.value for one in tested}.isdisjoint({8.0, 16.0})
    tuned = {one.seed for find in finds.values() for one in find.records if one.side == "dev"}
    assert tuned.isdisjoint(one.seed for one in tested)


def test_the_finalists_alone_have_all_tuning_seeds():
    _, finds = records(lambda one: 30.0 + one.lr, blocks=2)
    of_arm = [one for one in finds["emojis"].records if (one.arm, one.side) == ("mimicry", "dev")]
    by_seed = {seed: sum(one.seed == seed for one in of_arm) for seed in SIZES.tuning_seeds}
    assert [*by_seed.values()] == [7, 2, 2]


def test_heads_are_tried_stage_by_stage():
    def score(one):
        longer, smoothed = one.epochs == 40, one.label_smoothing == 0.2
        return 30.0 + 2 * (one.lr == 0.0005) + 2 * longer + 2 * (one.dropout == 0.15) + 2 * smoothed

    _, finds = records(score, blocks=1)
    tested = {one for one in finds["photographs"].records if (one.arm, one.side) == ("heads", "test")}
    assert {(one.lr, one.epochs, one.dropout, one.label_smoothing) for one in tested} == {
        (0.0005, 40, 0.15, 0.2)
    }
    assert len(tested) == len(SIZES.blocks[0]["seeds"])


def test_the_closed_form_stands_beside_every_seed_of_the_heads():
    sizes, finds = records(lambda one: 30.0 + 4 * (one.arm == "cca"), blocks=1)
    found = study.results(sizes, finds)
    families = {
        letter: [dict(zip(found["tests_head"], row, strict=True)) for row in rows]
        for letter, (_, rows) in zip(study.PRIMARY_TESTS, found["primary"], strict=True)
    }
    assert [row["n"] for row in families["a"]] == ["8"] * 5
    assert [row[""] for row in families["a"]] == ["▲"] * 5  # the column without a heading
    assert families["d"] == []
    gains = [float(row["R@10"].split(" ")[0].replace("−", "-")) for row in families["b"]]
    assert gains == pytest.approx([1.0] * 5, abs=0.8)
    for _cells, _arms, _seeds, progress in found["blocks"]:
        done, asked = progress.split(" of ")
        assert done == asked


def test_heads_of_another_cells_settings_keep_its_schedule():
    sizes = Namespace(
        **{**vars(SIZES), "blocks": [of for of in SIZES.blocks if "71680" in of["cells"][0]][:1]}
    )
    sizes.blocks.append({**sizes.blocks[0], "cells": ["heads-icons-141093"]})
    finds = made_up(study.ask, sizes, study.SETS, lambda one: 30.0 + (one.epochs == 20) + (one.value == 5.0))
    largest = finds["icons-141093"].records
    assert {one.side for one in largest} == {"test"}
    assert {(one.epochs, one.batch_size) for one in largest if one.arm == "heads"} == {(20, 500)}
    assert {one.value for one in largest if one.arm == "search"} == {5.0}


def test_cells_of_other_settings_are_trained_as_their_dev_side_chose():
    _, finds = records(lambda one: 30.0 + (one.lr == 0.002), blocks=5)
    of_emojis, of_vendor = (
        {(one.arm, one.lr, one.value) for one in finds[name].records if one.side == "test" and one.value}
        for name in ("emojis", "fxemoji")
    )
    searched = ("search", 0.0)
    students = {(arm, lr) for arm, lr, _ in of_vendor} - {searched}
    assert students == {(arm, lr) for arm, lr, _ in of_emojis} - {searched}
    assert {one.epochs for one in finds["fxemoji"].records if one.arm == "mimicry"} == {60}
