"""The example of fine-tuning: the data, the arms, the plan, the trainings and the report."""

from __future__ import annotations

import dataclasses
import io
import re

import numpy as np
import pytest
import torch
from examples_common.records import Store
from examples_common.trainings import finder
from finetuningstudy import command, findings, plan, report, task, train
from finetuningstudy.plan import ARMS, AVERAGED, GENTLE, LEARNED, MIMICRY, PLAIN, RANKS, START
from finetuningstudy.study import Study
from finetuningstudy.train import Setting
from icons_data.load import load
from rich.console import Console
from studies import EXAMPLES, assert_corrected, assert_reported_again, decided, records

import rankloss

TINY = dataclasses.replace(plan.QUICK, pretrained=32, held_out=8, emojis=70, choice_seed=9, seeds=(1, 2, 3))


@pytest.fixture(scope="module", autouse=True)
def _small_batches():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "_BATCH", 16)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from miniature_icons import write_icons

    return write_icons(tmp_path_factory.mktemp("icons") / "built", train=160, validation=30)


@pytest.fixture(scope="module")
def pairs(folder):
    return task.read(load(folder), pretrained=TINY.pretrained, held_out=TINY.held_out, emojis=TINY.emojis)


@pytest.fixture(scope="module")
def start(pairs):
    return train.pretrain(3, 1, pairs.old)


def _state(model):
    return torch.cat([x.flatten() for x in model.state_dict().values()])


# --- the data ---


def test_pictures_are_averages_and_no_held_out_emoji_is_fine_tuned_on(folder, pairs):
    stored = load(folder).part("train").images[0].astype(float)
    corner = stored[:2, :2].mean((0, 1)).round()
    assert pairs.old.pictures[0, :, 0, 0].tolist() == pytest.approx(corner)
    assert pairs.old.pictures.shape[1:] == (3, task.SIZE, task.SIZE)
    shown = [
        {x.numpy().tobytes() for x in of.pictures}
        for of in (pairs.parts["test"].new, pairs.parts["test"].new_held_out)
    ]
    assert not shown[0] & shown[1]
    assert len(pairs.parts["choice"].new.pictures) < len(pairs.parts["test"].new.pictures)
    assert len(pairs.parts["choice"].old_held_out.pictures) == TINY.held_out


def test_sets_of_emojis_are_no_icons(folder, monkeypatch):
    icons = load(folder)
    icons.records = [
        dataclasses.replace(one, set="openmoji") if one.index % 2 else one for one in icons.records
    ]
    found = task.read(icons, pretrained=1000, held_out=1000, emojis=TINY.emojis)
    start, stop = icons.manifest["ranges"]["train"]
    assert len(found.old.pictures) == sum(number % 2 == 0 for number in range(start, stop))


# --- the arms ---

SETTING = Setting(PLAIN, 3, "test", pretraining=1, epochs=1, lr=1e-3)


def _tuned(start, pairs, **changed):
    return train.fine_tune(dataclasses.replace(SETTING, **changed), start, pairs.parts["test"].new)


def test_without_epochs_the_starting_checkpoint_is_left_as_it_is(start, pairs):
    assert torch.equal(_state(_tuned(start, pairs, epochs=0)), _state(start))


def test_averaged_weights_lie_between_start_and_fine_tuned(start, pairs):
    before, after = _state(start), _state(_tuned(start, pairs))
    assert not torch.equal(before, after)
    expected = 0.75 * before + 0.25 * after
    torch.testing.assert_close(_state(_tuned(start, pairs, share=0.25)), expected)


def test_the_teacher_is_the_start_for_the_very_pairs_of_the_batch(start, pairs, monkeypatch):
    distances = []

    def watched(setting):
        loss = rankloss.MimicryLoss(weight=1.0)
        loss.register_forward_hook(
            lambda _, args, given, __: distances.append(
                max(
                    (x - given[f"reference_{name}_features"]).abs().max().item()
                    for x, name in zip(args, ("image", "text"), strict=False)
                )
            ),
            with_kwargs=True,
        )
        return loss

    monkeypatch.setattr(train, "_loss", watched)
    _tuned(start, pairs, loss="mimicry", epochs=4)
    assert distances[0] < 1e-4 < 1e-2 < max(distances)


def test_a_heavy_weight_holds_the_features_back(start, pairs):
    new = pairs.parts["test"].new
    own = train.features(start, new)[0]
    given = ({}, {"loss": "mimicry", "weight": 1000.0})
    moved = [train.features(_tuned(start, pairs, epochs=6, **of), new)[0] - own for of in given]
    assert moved[1].norm() < moved[0].norm() / 2


def test_ranks_are_the_teachers_at_a_constant_weight():
    loss = train._loss(dataclasses.replace(SETTING, loss="rankclip-distill", weight=8.0))
    assert loss.rank_weights == {"cross_modal": 0.5, "in_modal": 0.5}


def test_what_is_measured_is_recall_of_both_held_out_sets(start, pairs):
    part = pairs.parts["test"]
    found = train.measure(start, part)
    assert found["mean"] == pytest.approx((found["kept"] + found["learned"]) / 2)
    swapped = dataclasses.replace(part, old_held_out=part.new_held_out, new_held_out=part.old_held_out)
    assert train.measure(start, swapped)["kept"] == found["learned"]
    v, t = (x.reshape(len(x), -1) for x in train.features(start, part.new_held_out))
    scores = (v @ t.T).numpy()
    ranks = [(s > s.diagonal()[:, None]).sum(1) for s in (scores, scores.T)]
    assert found["learned"] == pytest.approx(100 * np.mean([(r < 10).mean() for r in ranks]))


# --- the plan ---


def test_every_arm_has_six_tries_chosen_by_its_own_measure():
    def score(one):
        return {"kept": 0.0, LEARNED: one.lr, "mean": one.weight - one.lr + one.share}

    found = plan.searches(plan.FULL, records(score))
    assert {arm: len(search) for arm, search in found.items()} == dict.fromkeys(ARMS, 6)
    settings = plan.tests(plan.FULL, found)
    assert {len(of) for of in settings.values()} == {8}
    chosen = {arm: of[0] for arm, of in settings.items()}
    assert chosen[PLAIN].lr == max(plan.FULL.lrs[PLAIN])  # what it learned
    assert chosen[GENTLE].lr == min(plan.FULL.lrs[GENTLE])  # the mean
    assert chosen[AVERAGED].share == max(plan.FULL.shares) < 1
    for arm in (AVERAGED, MIMICRY, RANKS):
        assert (chosen[arm].lr, chosen[arm].epochs) == (chosen[PLAIN].lr, chosen[PLAIN].epochs)
    assert chosen[START].epochs == 0
    assert list(plan.tests(plan.FULL, plan.searches(plan.FULL, lambda _: {}))) == [START]


# --- from the data to the report ---


@pytest.fixture(scope="module")
def trained(folder, pairs, tmp_path_factory):
    root = tmp_path_factory.mktemp("study")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(plan.PLANS, "quick", TINY)
        assert command.main(["--icons", str(folder), "--output", str(root)]) == 0
    return Study(pairs, Store(root / "quick/results"), root / "checkpoints")


def _findings(study):
    return findings.findings(TINY, finder(study.store, Setting))


def test_finished_trainings_are_kept_and_repeated_ones_have_the_same_numbers(trained, tmp_path):
    content = trained.store.path.read_bytes()
    trained.follow(TINY, Console(file=io.StringIO()))
    assert trained.store.path.read_bytes() == content
    again = Study(trained.task, Store(tmp_path), tmp_path)  # pretrains anew
    settings = plan.tests(TINY, _findings(trained).searches)[MIMICRY]
    (one, record), *_ = trained.find(settings).items()
    assert again.record(one)["metrics"] == record["metrics"]


def test_kept_and_learned_are_corrected_together(trained):
    found = _findings(trained)
    assert found.missing == 0
    keys = [key for key in found.tests if key[0] != plan.MEAN]
    assert len(keys) == 2 * len(plan.COMPARISONS)
    pairs = [
        [[one["metrics"][measure] for _, one in sorted(found.records[arm].items())] for arm in pair]
        for measure, pair in keys
    ]
    assert_corrected([found.tests[key] for key in keys], pairs)


@pytest.mark.parametrize("means", [{}, {MIMICRY: 12.0}, {MIMICRY: 12.0, GENTLE: 13.0}, {RANKS: 8.0}])
def test_a_teacher_helps_if_it_beats_both_baselines(means):
    found = findings.findings(TINY, decided(means, lambda value: dict.fromkeys(plan.MEASURES, value)))
    helps = means == {MIMICRY: 12.0}
    assert (found.helps(MIMICRY), found.helps(RANKS)) == (helps, False)
    said = report.conclusions(found, 3)
    assert ["is not shown" in one for one in said] == [not helps, True]


def test_an_unfinished_study_concludes_nothing(trained, tmp_path):
    with pytest.raises(RuntimeError, match="no record"):
        report.write(TINY, Store(tmp_path / "none"), tmp_path)
    more = dataclasses.replace(TINY, seeds=(1, 2, 3, 4))
    text = report.write(more, trained.store, tmp_path).read_text(encoding="utf-8")
    assert "6 of the planned trainings are missing" in text
    assert "baselines in" not in text
    mean = _findings(trained).estimate(MIMICRY, "kept").mean
    assert f"{mean:.2f} ±" in text


def test_the_command_reports_what_is_there(trained, monkeypatch, capsys):
    root = trained.checkpoints.parent
    written = root / "quick/report/finetuning.md"
    text = written.read_text(encoding="utf-8")
    assert "smoke test" in text
    assert "both baselines in the mean" in text
    monkeypatch.setitem(plan.PLANS, "quick", TINY)
    assert_reported_again(command.main, ["--output", str(root)], written)
    assert str(written) in capsys.readouterr().out
    few = report.write(dataclasses.replace(TINY, seeds=(1,)), trained.store, root).read_text(encoding="utf-8")
    assert "Nothing is concluded from fewer than 3 seeds." in few


def test_the_report_is_that_of_the_records_and_the_page_has_its_numbers(tmp_path):
    example = EXAMPLES / "finetuning"
    text = report.write(plan.FULL, Store(example / "results"), tmp_path).read_text(encoding="utf-8")
    assert (example / "report/finetuning.md").read_text(encoding="utf-8") == text
    for page in (EXAMPLES.parent / "docs/teachers.md", example / "README.md"):
        found = page.read_text(encoding="utf-8")
        section = found.partition("## Fine-tuning that forgets less")[2].partition("\n## ")[0] or found
        numbers = re.findall(r"\d+\.\d\d ± \d\.\d\d", section)
        assert numbers
        assert {one for one in numbers if one not in text} == set()
