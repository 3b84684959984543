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
        pixels = rng.integers(0, 256, (ENCODED[side], 32, 32, 3), dtype=np.uint8)
        return [Image.fromarray(picture) for picture in pixels]

    return Source(captions, pictures)


def of_two_views(n, *, seed, directions):
    """Return unit features of pictures and of captions: six shared numbers along directions, and noise."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(n, 6, generator=generator)
    of_pictures, of_captions = directions
    v = shared @ of_pictures + 0.7 * torch.randn(n, 14, generator=generator)
    t = shared @ of_captions + 0.7 * torch.randn(n, 12, generator=generator)
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


def metrics_of(setting, data):
    """Train and measure heads, or the closed form, and return the metrics."""
    return heads.record(setting, data)["metrics"]


CLOSED_FORM = Setting("cca", seed=0, side="test")


def test_the_closed_form_finds_what_both_encoders_see(data):
    chance = 100 * 10 / ENCODED["test"]  # percent: 42
    assert metrics_of(CLOSED_FORM, data)["retrieval"]["R@10, mean of both"] > 80 > chance


def test_a_record_of_the_closed_form_has_its_setting_the_other_thousand_and_the_joined_search(data):
    metrics = metrics_of(CLOSED_FORM, data)
    assert metrics["chosen"].keys() == {"image_ridge", "text_ridge", "dimensions", "power", "root", "dev"}
    assert metrics["second"]["hits"]["pictures"] == ENCODED["second"]
    assert metrics["joined"].keys() == {"cca-search"}


HEADS = Setting("heads", seed=3, side="test", batch_size=20, epochs=3, lr=0.01)


def test_a_record_of_heads_holds_those_that_stand_side_by_side(data):
    joined = metrics_of(HEADS, data)["joined"]
    assert joined.keys() == {"heads-2", "both", "both-2"}
    assert joined["both"]["chosen"]["weight"] in heads.WEIGHTS


def test_heads_trained_again_find_the_same(data):
    assert metrics_of(HEADS, data)["hits"] == metrics_of(HEADS, data)["hits"]


def test_a_try_of_heads_has_neither_joined_ones_nor_the_other_thousand(data):
    tried = metrics_of(dataclasses.replace(HEADS, side="dev"), data)
    assert not tried.keys() & {"joined", "second"}


def test_models_side_by_side_average_their_similarities_by_their_squared_weights():
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
def test_every_student_trains_and_each_but_clip_differs_from_clip(arm, data):
    def trained(name, value):
        setting = Setting(name, seed=1, side="dev", batch_size=20, epochs=2, lr=0.01, value=value)
        return train(setting, data)

    values = {name: value for tries in SIZES.tries.values() for name, value in tries}
    model, clips = trained(arm, values[arm]), trained("clip", 0.0)
    assert all(weight.isfinite().all() for weight in model.parameters())
    is_clips = torch.equal(model.of_pictures[1].weight, clips.of_pictures[1].weight)
    assert is_clips is (arm == "clip")


@pytest.mark.parametrize("name", ["cca", "shuffled", "components", "heads"])
def test_a_teacher_has_unit_rows_of_the_students_width(name, data):
    side, n = teacher(name, data), ENCODED["train"]
    assert side.pictures.shape == (n, 256)
    assert side.sentences.shape == (n, 1, 256)
    for x in (side.pictures, side.sentences):
        torch.testing.assert_close(x.norm(dim=-1), torch.ones(x.shape[:-1]))


def test_a_closed_form_of_shuffled_pairs_does_not_find_the_partners(data):
    def similarity_of_partners(name):
        side = teacher(name, data)
        return (side.pictures * side.sentences[:, 0]).sum(-1).mean()

    assert similarity_of_partners("cca") > similarity_of_partners("shuffled") + 0.2


def test_every_arm_of_a_pretrained_clip_is_measured_on_new_and_old_pairs_and_leaves_it_as_it_is(
    data, tmp_path, monkeypatch
):
    monkeypatch.setattr(pretrained, "PRETRAINING", dataclasses.replace(pretrained.PRETRAINING, epochs=1))
    study_of_clip = pretrained.Pretrained(Encoded(drawings(), tmp_path / "old"), data)
    study_of_clip.encoded("train")  # trains the CLIP, although nothing else here needs a gradient
    clip = study_of_clip.start
    before = {name: x.clone() for name, x in clip.state_dict().items()}
    metrics = [
        study_of_clip.train(Setting(arm, seed=0, side="test", batch_size=20, epochs=2, lr=0.01))["metrics"]
        for arm in pretrained.ARMS
    ]
    assert len({repr(of_arm["hits"]) for of_arm in metrics}) == len(pretrained.ARMS)
    assert {of_arm[pretrained.OLD]["hits"]["pictures"] for of_arm in metrics} == {ENCODED["test"]}
    for name, x in clip.state_dict().items():
        assert torch.equal(x, before[name])


@pytest.fixture
def kept(data, tmp_path, monkeypatch):
    """Return a function from a share of a CLIP's own similarity to the metrics of its record.

    Without a share they are those of the CLIP as it is.
    """
    monkeypatch.setattr(pretrained, "PRETRAINING", dataclasses.replace(pretrained.PRETRAINING, epochs=1))
    monkeypatch.setattr(zero_shot, "FEWEST_HELD_OUT", 5)
    monkeypatch.setattr(zero_shot, "FEWEST_TRAINED", 5)
    source = Source({side: worded(n) for side, n in ENCODED.items()}, drawings().pictures)
    study_of_clip = pretrained.Pretrained(Encoded(source, tmp_path / "old"), data)

    def metrics_with(share=None):
        arm = {"arm": "start"} if share is None else {"arm": "start-kept", "value": share}
        return study_of_clip.train(Setting(**arm, seed=0, side="test"))["metrics"]

    return metrics_with


def worded(n):
    """Return a caption for each picture, with one word of three."""
    return [[f"a {('cat', 'dog', 'owl')[i % 3]} c{i}"] for i in range(n)]


def test_zero_shot_classes_are_the_common_words_of_held_out_captions(kept):
    zero_shot = kept(0.5)["zero-shot"]
    assert zero_shot["classes"] == ["cat", "dog", "owl"]
    assert zero_shot["pictures"] == sum(ENCODED[side] for side in pretrained.HELD_OUT)


def test_a_share_of_one_is_the_clip_as_it_is_and_a_share_of_nearly_one_is_near_it(kept):
    all_kept, nearly_all, nothing = kept(1.0), kept(0.999), kept(0.0)
    assert all_kept["hits"] == kept()["hits"]

    def pictures_that_differ(metrics):
        """Return how many pictures find their caption with one of the two shares alone."""
        hits, hits_of_all = (int(of["hits"]["image_to_text"], 16) for of in (metrics, all_kept))
        return (hits ^ hits_of_all).bit_count()

    assert pictures_that_differ(nearly_all) <= 1 < pictures_that_differ(nothing)
    one_picture = 100 / all_kept["zero-shot"]["pictures"]  # in percent
    assert nearly_all["zero-shot"]["top-1"] == pytest.approx(all_kept["zero-shot"]["top-1"], abs=one_picture)


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
    gains = [0] * 16 + [100] * 4  # of 20 pictures in percent: four are hits with the share 0.9 alone
    half = 1.96 * np.std(gains, ddof=1) / 20**0.5
    assert rows == [
        ["emojis-after", "1", "50.0", "50.0", "50.0"],
        ["emojis-after", "0.9", *[f"+20.0 ± {half:.1f}"] * 3],
    ]


def records(score, *, blocks):
    """Return a plan of so many of the study's first blocks, and made-up records of all its trainings.

    ``score`` is a function from a setting to its R@10.
    """
    sizes = Namespace(**{**vars(SIZES), "blocks": SIZES.blocks[:blocks]})
    finds = made_up(study.ask, sizes, study.SETS, score)
    rng = np.random.default_rng(1)
    for find in finds.values():
        for setting, found in find.records.items():
            if setting.side == "test" and setting.arm in heads.JOINED:
                found["metrics"]["joined"] = {
                    name: record(score(setting) + 5, rng)["metrics"] for name in heads.JOINED[setting.arm]
                }
    return sizes, finds


# Of the tries of each student (a loss and its value) the last.
LAST_TRIES = {arm: tuple(tries[-1]) for arm, tries in SIZES.tries.items()}


def best_of_last_tries(one):
    """Return a score that is highest at a learning rate of 0.001 and for the last try of each student."""
    is_best = (one.arm, one.value) in LAST_TRIES.values()
    return 30.0 - abs(np.log2(max(one.lr, 1e-6) / 0.001)) + (2 if is_best else 0)


def test_every_arm_of_students_has_as_many_tries():
    assert {len(SIZES.tries[arm]) for arm in ARMS if arm in SIZES.tries} == {3}
    sizes, finds = records(best_of_last_tries, blocks=2)
    (emojis,) = [cell for cell in study.by_cell(sizes, finds) if cell.cell == "emojis-250"]
    values_beside_the_first = 2  # tried at the best rate
    assert {len(tries) for tries in emojis.tried.values()} == {len(SIZES.rates) + values_beside_the_first}


def test_the_best_try_of_every_student_is_tested():
    _, finds = records(best_of_last_tries, blocks=2)
    tested = [one for one in finds["emojis"].records if one.side == "test" and one.arm in ARMS]
    students = SIZES.blocks[1]["arms"]
    assert {(one.arm, one.value) for one in tested} == {LAST_TRIES[arm] for arm in students}
    assert {one.lr for one in tested} == {0.001}


def test_no_seed_of_a_choice_is_a_seed_of_a_test():
    _, finds = records(best_of_last_tries, blocks=2)
    tried = {one.seed for find in finds.values() for one in find.records if one.side == "dev"}
    tested = {one.seed for one in finds["emojis"].records if one.side == "test" and one.arm in ARMS}
    assert tried.isdisjoint(tested)


def test_the_finalists_alone_have_all_tuning_seeds():
    _, finds = records(lambda one: 30.0 + 1000 * one.lr, blocks=2)  # by far more than the records' noise
    tries = [one for one in finds["emojis"].records if (one.arm, one.side) == ("mimicry", "dev")]
    first, second, third = (
        {(one.lr, one.value) for one in tries if one.seed == seed} for seed in SIZES.tuning_seeds
    )
    all_tries = len(SIZES.rates) + len(SIZES.tries["mimicry"]) - 1  # a rate each, then each further value
    assert len(first) == all_tries
    assert second == third
    assert len(second) == SIZES.finalists
    assert {lr for lr, _ in second} == {max(SIZES.rates)}  # at which all values were tried


def test_heads_are_tried_stage_by_stage():
    best = {"lr": 0.0005, "epochs": 40, "dropout": 0.15, "label_smoothing": 0.2}

    def score(one):
        return 30.0 + 2 * sum(getattr(one, name) == value for name, value in best.items())

    _, finds = records(score, blocks=1)
    tested = [one for one in finds["photographs"].records if (one.arm, one.side) == ("heads", "test")]
    assert [{name: getattr(one, name) for name in best} for one in tested] == [best] * len(tested)
    assert len(tested) == len(SIZES.blocks[0]["seeds"])


@pytest.fixture(scope="module")
def first_block():
    """Return the results of the first block, in which the closed form scores 34, all heads 30, both 35."""
    sizes, finds = records(lambda one: 30.0 + 4 * (one.arm == "cca"), blocks=1)
    return study.results(sizes, finds)


def family(results, letter):
    """Return the rows of a family of primary tests, by the heads of their columns."""
    families = dict(zip(study.PRIMARY_TESTS, results["primary"], strict=True))
    _, rows = families[letter]
    return [dict(zip(results["tests_head"], row, strict=True)) for row in rows]


def test_the_closed_form_is_compared_with_every_seed_of_the_heads(first_block):
    """The column without a heading has a mark of significance."""
    rows = family(first_block, "a")
    assert [(row["n"], row[""]) for row in rows] == [("8", "▲")] * 5  # eight seeds, on five data sets


def test_heads_beside_the_closed_form_are_compared_with_it_alone(first_block):
    gains = [float(row["R@10"].split(" ")[0].replace("−", "-")) for row in family(first_block, "b")]
    noise = 0.8  # four standard deviations of a made-up score's
    assert gains == pytest.approx([35.0 - 34.0] * 5, abs=noise)


def test_tests_of_another_block_have_no_rows_before_it_is_trained(first_block):
    assert family(first_block, "d") == []


def test_a_block_that_is_recorded_is_shown_as_done(first_block):
    for _cells, _arms, _seeds, progress in first_block["blocks"]:
        done, asked = progress.split(" of ")
        assert done == asked


def test_heads_of_another_cells_settings_keep_its_schedule():
    of_71680, *_ = [block for block in SIZES.blocks if "71680" in block["cells"][0]]
    of_141093 = {**of_71680, "cells": ["heads-icons-141093"]}
    sizes = Namespace(**{**vars(SIZES), "blocks": [of_71680, of_141093]})
    finds = made_up(study.ask, sizes, study.SETS, lambda one: 30.0 + (one.epochs == 20) + (one.value == 5.0))
    largest = finds["icons-141093"].records
    assert {one.side for one in largest} == {"test"}
    assert {(one.epochs, one.batch_size) for one in largest if one.arm == "heads"} == {(20, 500)}
    assert {one.value for one in largest if one.arm == "search"} == {5.0}


def test_a_cell_with_another_cells_settings_is_trained_as_the_dev_side_of_that_cell_chose():
    _, finds = records(lambda one: 30.0 + (one.lr == 0.002), blocks=5)

    def tested(name):
        """Return the arms of a data set that have a value to choose, with their rate, but for the search."""
        return {
            (one.arm, one.lr)
            for one in finds[name].records
            if one.side == "test" and one.value and one.arm != "search"
        }

    assert tested("fxemoji") == tested("emojis") != set()
    assert {one.epochs for one in finds["fxemoji"].records if one.arm == "mimicry"} == {60}
