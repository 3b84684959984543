"""Part 2c: drawings as data sets, tries that both score, the tests of both, the command."""

from __future__ import annotations

import dataclasses
import io

import numpy as np
import pytest
import torch
from examples_common.records import Store
from icons_data.load import load
from miniature_icons import write_icons
from photographs_folder import Encoders, finder
from photostudy import command
from photostudy.drawings import data, findings, plan, report, study
from photostudy.findings import PRIMARY
from photostudy.measure import BOTH_WAYS
from photostudy.students import train
from photostudy.students.losses import PER_STEP
from photostudy.students.plan import CLIP, RANKS
from photostudy.students.study import Study
from photostudy.students.train import Setting
from rich.console import Console
from scipy import stats
from statsmodels.stats.multitest import multipletests

import rankloss


class Sums(Encoders):
    """Encoders of drawings, whose first pixels are white."""

    def pictures(self, pictures):
        """Return the sums of a picture's rows."""
        return np.stack([np.asarray(one, dtype=np.float32).sum((1, 2)) for one in pictures])


def sized(sizes, **changes):
    """Return a plan whose trainings and seeds are others."""
    return dataclasses.replace(sizes, arms=dataclasses.replace(sizes.arms, **changes))


# --- data ---


def test_held_out_concepts_are_of_their_own():
    sides = data.emojis()
    assert {side: len(of.pictures) for side, of in sides.items()} == {"train": 1097, "dev": 215, "test": 270}
    names = {
        side: {text.split(",")[0] for of in drawn.captions for text in of} for side, drawn in sides.items()
    }
    assert not names["dev"] & names["test"]
    assert {len(of) for of in sides["train"].captions} == {8}


def test_icons_are_searched_by_caption_and_learned_by_text(tmp_path):
    build = load(write_icons(tmp_path / "icons"))
    sides = data.icons(build, 20, 6)
    assert [len(sides[side].pictures) for side in ("train", "dev", "test")] == [20, 6, 6]
    assert sides["train"].captions[0] == [build.part("train").records[0].text]
    assert sides["test"].captions[0] == [build.part("test").records[0].caption]
    with pytest.raises(ValueError, match="99 icons are needed of train, got 96"):
        data.icons(build, 99, 6)


# --- the choice ---


def test_a_try_has_the_mean_score_of_both_data_sets():
    """Emojis and icons disagree: the joint choice is neither's own."""
    scores = {
        "emojis": {4.0: 30.0, 16.0: 29.0, 64.0: 20.0},
        "icons": {4.0: 10.0, 16.0: 19.0, 64.0: 21.0},
    }
    clip = {"emojis": {"lr": 0.1}, "icons": {"lr": 0.2}}

    def found(name):
        def score(one):
            assert one.lr == clip[name]["lr"]
            return scores[name].get(one.weight, 0.0) - 0.1 * (one.top_k == 16)

        return finder(score)

    choice = plan.choice(plan.FULL, RANKS, plan.joint({name: found(name) for name in plan.SETS}, clip))
    assert choice.chosen == {"weight": 16.0, "top_k": 4}
    assert choice.tries[16.0, 4][950] == pytest.approx(24.0)
    half = plan.joint({"emojis": found("emojis"), "icons": finder(lambda _: None)}, clip)
    assert {one.seed for one in plan.choice(plan.FULL, RANKS, half).due} == {950}


def test_lambda_per_step_rises_within_an_epoch(monkeypatch):
    told, original = [], rankloss.RankClipLoss.set_progress

    def tell(loss, *at):
        told.append(at)
        original(loss, *at)

    monkeypatch.setattr(rankloss.RankClipLoss, "set_progress", tell)
    monkeypatch.setattr(rankloss.RankClipLoss, "set_epoch", lambda *_: pytest.fail("told of an epoch"))
    x = torch.nn.functional.normalize(torch.randn(8, 4), dim=-1)
    pictures = torch.randint(0, 256, (8, 64, 64, 3), dtype=torch.uint8)
    pairs = data.Pairs(data.Side(pictures, torch.full((8, 1, 2), 2)), data.Side(x, x.unsqueeze(1)))
    setting = Setting(PER_STEP, 0, "dev", epochs=2, batch_size=4, train_pictures=8, weight=0.0, top_k=2)
    train.train(setting, pairs, 3)
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]


# --- the tests ---


def random_findings(skip=lambda one: False):
    sizes = sized(plan.FULL, seeds=(5, 6, 7))
    known: dict = {}

    def of(name):
        def find(settings):
            for one in settings:
                if (name, one) not in known and not (one.side == "test" and skip(one)):
                    value = np.random.default_rng(len(known)).normal() + 3 * (one.arm == "cka")
                    known[name, one] = {"metrics": {"retrieval": {BOTH_WAYS: value}}}
            return {one: known[name, one] for one in settings if (name, one) in known}

        return find

    return findings.findings(sizes, {name: of(name) for name in plan.SETS})


def test_differences_are_paired_and_corrected_over_both_data_sets():
    found = random_findings()
    assert found.missing == 0
    p = {}
    for name in plan.SETS:
        for pair in plan.COMPARISONS:
            values = [[PRIMARY(found.records[name][arm][seed]) for seed in (5, 6, 7)] for arm in pair]
            p[name, pair] = stats.ttest_rel(*values).pvalue
    assert len(p) == 18
    holm = multipletests([*p.values()], method="holm")[1]
    assert [found.tests[key].adjusted for key in p] == pytest.approx(holm)
    early = random_findings(lambda one: one.arm == CLIP and one.seed == 7)
    assert early.missing == 2
    assert {pair[1] for _, pair in early.tests} == {RANKS}
    assert report.conclusions(early, 3) == []


def test_a_rival_is_a_candidate_where_it_is_above_ranks_and_nowhere_below():
    found = random_findings()

    def told(**signs):
        tests = {
            key: dataclasses.replace(d, mean=sign or 1.0, adjusted=0.01 if sign else 1.0)
            for key, d in found.tests.items()
            for sign in [signs.get(key[1][0], {}).get(key[0], 0) if key[1][1] == RANKS else 0]
        }
        return dataclasses.replace(found, tests=tests)

    both = told(cka={"emojis": 1, "icons": -1}, softmax={"icons": 1})
    assert both.candidates == ["softmax"]
    said = " ".join(report.conclusions(both, 3))
    assert "`cka` is above `ranks` on emojis." in said
    assert "`cka` is below `ranks` on icons." in said
    assert told().candidates == []
    ahead = {"ranks": {"emojis": 1.0, "icons": 1.0}, "picture-ranks": {"emojis": 2.0, "icons": 1.5}}
    variants = dataclasses.replace(found, variants={**ahead, "text-ranks": {"emojis": 2.0, "icons": 0.5}})
    assert variants.better_variants == ["picture-ranks"]


# --- from drawings to the report ---


def test_the_study_is_trained_reported_and_not_repeated(tmp_path, monkeypatch):
    small = dataclasses.replace(plan.QUICK.arms, start={"train_pictures": 12, "epochs": 2, "batch_size": 6})
    sizes = dataclasses.replace(plan.QUICK, clip=dict.fromkeys(plan.SETS, small), arms=small)
    sides = data.icons(load(write_icons(tmp_path / "icons")), 12, 6)
    stores = {name: Store(tmp_path / "quick/results" / name) for name in plan.SETS}
    of = data.data_set("icons", sides, tmp_path / "kept", Sums)
    studies = {name: Study(of, store) for name, store in stores.items()}
    quiet = Console(file=io.StringIO())
    study.follow(sizes, studies, quiet)
    monkeypatch.setattr(train, "train", lambda *_: pytest.fail("trained again"))
    monkeypatch.setattr(Sums, "pictures", lambda *_: pytest.fail("encoded again"))
    again = data.data_set("icons", sides, tmp_path / "kept", Sums)
    study.follow(sizes, {name: Study(again, store) for name, store in stores.items()}, quiet)
    monkeypatch.setitem(plan.PLANS, "quick", sizes)
    assert command.main(["--part", "2c", "--output", str(tmp_path), "--report-only"]) == 0
    text = (tmp_path / "quick/report/part2c.md").read_text(encoding="utf-8")
    assert "missing" not in text
    assert "| `ranks-per-step`" in text
    assert "(part2c.png)\n\nColoured: differs from 0 after the correction.\n" in text  # no photographs
    assert (tmp_path / "quick/report/part2c.png").is_file()
