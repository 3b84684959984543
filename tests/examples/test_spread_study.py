"""The study of the spread: its terms, its arms, its choices, and a report that is of its records."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import tarfile
from types import SimpleNamespace as Namespace

import numpy as np
import pytest
import torch
from PIL import Image
from statsmodels.stats.multitest import multipletests
from studies.captions.data import SIDES, Source
from studies.captions.student import Student
from studies.captions.train import fit
from studies.report import p_text
from studies.runner import load
from studies.spread import study
from studies.spread.data import Measured, of_class, sharing, vendor
from studies.spread.terms import FORMS, SameTowerLoss, WithinModalities
from studies.spread.train import ARMS, Setting, train
from studies.students.losses import TEACHER

import rankloss
from batches import unit
from made_up_records import made_up, record

SIZES = load("spread").sizes("full")
FORMS_OF_NUMPY = {
    "std": lambda x: np.mean(np.std(x, axis=1)),
    "variance": lambda x: np.mean(np.var(x, axis=1)) / 2,
    "log-mean-exp": lambda x: np.mean(np.log(np.mean(np.exp(x), axis=1))),
    "uniform": lambda x: np.mean(np.log(np.sum(np.exp(x), axis=1)) - np.mean(x, axis=1)),
}


def batch(n=9, d=6):
    """Return the features of both modalities."""
    return unit(n, d, seed=0), unit(n, d, seed=1)


@pytest.mark.parametrize("form", FORMS_OF_NUMPY)
def test_a_term_is_its_form_of_the_similarities_to_the_others(form):
    v, t = batch()
    scale = torch.tensor(8.0, dtype=torch.float64)
    values = []
    for x in (v.numpy(), t.numpy()):
        similarities = 8.0 * x @ x.T
        rows = [np.delete(row, i) for i, row in enumerate(similarities)]
        values.append(FORMS_OF_NUMPY[form](np.stack(rows)))
    term = WithinModalities(form, 0.7)(v, t, scale) - rankloss.ClipLoss()(v, t, scale)
    assert term.item() == pytest.approx(0.7 * np.mean(values), rel=1e-7)


@pytest.mark.parametrize("form", FORMS)
def test_a_constant_scale_has_the_gradient_of_the_base_alone(form):
    gradients = []
    for loss in (
        WithinModalities(form, 0.7, is_scale_constant=True),
        rankloss.ClipLoss(),
        WithinModalities(form, 0.7),
    ):
        scale = torch.tensor(8.0, dtype=torch.float64, requires_grad=True)
        torch.manual_seed(0)
        loss(*batch(), scale).backward()
        gradients.append(scale.grad.item())
    assert gradients[0] == pytest.approx(gradients[1], rel=1e-9)
    assert abs(gradients[2] - gradients[1]) > 1e-4


def test_the_librarys_spread_is_the_standard_deviation_with_a_constant_scale():
    found = []
    for loss in (rankloss.SpreadLoss(weight=0.7), WithinModalities("std", 0.7, is_scale_constant=True)):
        inputs = [x.requires_grad_() for x in (*batch(), torch.tensor(8.0, dtype=torch.float64))]
        value = loss(*inputs)
        found.append([value, *torch.autograd.grad(2 * value, inputs)])
    for librarys, own in zip(*found, strict=True):
        assert own.abs().max() > 0
        torch.testing.assert_close(librarys, own, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(
    ("arm", "beside"), [("rankclip-spread", "rankclip"), ("encoders-spread", "encoders")]
)
def test_spread_beside_another_loss_is_its_term_more(arm, beside):
    teacher = dict(zip(TEACHER, (unit(9, 5, seed=2), unit(9, 7, seed=3)), strict=True))
    teacher = teacher if ARMS[arm].texts else {}
    scale, values = torch.tensor(8.0, dtype=torch.float64), []
    for name in (arm, beside):
        loss = ARMS[name].loss(4.0)
        for part in loss.modules():
            if hasattr(part, "set_epoch"):
                part.set_epoch(3, 4)
        values.append(loss(*batch(), scale, **teacher))
    term = WithinModalities("std", 0.3)(*batch(), scale) - rankloss.ClipLoss()(*batch(), scale)
    torch.testing.assert_close(values[0] - values[1], term, rtol=1e-6, atol=1e-8)


def test_a_target_drawn_at_each_step_is_uniform_in_the_mean():
    torch.manual_seed(0)
    x, scale = torch.randn(8, 7, dtype=torch.float64), torch.tensor(1.0)
    drawn = torch.stack([FORMS["one-hot"](x, scale) for _ in range(4000)])
    assert drawn.std() > 0.05
    assert drawn.mean().item() == pytest.approx(FORMS["uniform"](x, scale).item(), abs=0.02)


def test_same_tower_negatives_enter_clips_denominator():
    v, t = (x.numpy() for x in batch())
    expected = []
    for x, z in ((v, t), (t, v)):
        for i, row in enumerate(8 * x @ z.T):
            own = np.delete(8 * x @ x.T, i, axis=1)[i]
            expected.append(np.log(np.exp(row).sum() + 0.4 * np.exp(own).sum()) - row[i])
    found = SameTowerLoss(0.4)(*batch(), torch.tensor(8.0, dtype=torch.float64))
    assert found.item() == pytest.approx(np.mean(expected), rel=1e-7)


def drawings(n=24):
    """Return a source of random pictures, whose captions are of three words."""
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)) for _ in range(n)]
    captions = {side: [[f"a{i % 3} b{i % 5} c{i}"] for i in range(n)] for side in (*SIDES, "second")}
    categories = {side: [[f"k{i % 3}"] for i in range(n)] for side in ("dev", "test")}
    return Source(captions, lambda _: pictures, categories=categories)


@pytest.fixture
def data(tmp_path):
    """A small data set whose encoders are made up."""
    made = Measured(drawings(), tmp_path)
    n = len(made.sides["train"].pictures)
    made.teachers._made |= {
        "efficientnet": unit(n, 10, seed=4, dtype=torch.float32),
        "minilm": unit(n, 12, seed=5, dtype=torch.float32).unsqueeze(1),
    }
    return made


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_trains_and_differs_from_clip(arm, data):
    def trained(name, value):
        setting = Setting(name, 1, "dev", 8, 2, 0.01, value)
        return train(setting, data.sides["train"], data.teachers, data.words)

    first = {name: value for of in SIZES.tries.values() for name, value in of}.get(arm, 5.0)
    model, clips = trained(arm, first), trained("clip", 0.0)
    assert all(of.isfinite().all() for of in model.parameters())
    same = torch.equal(model.of_pictures[1].weight, clips.of_pictures[1].weight)
    assert same is (arm == "clip")
    if arm.endswith("-unbounded"):
        assert math.isinf(ARMS[arm].ceiling)
    if arm.endswith("-fixed"):
        assert model.log_scale.exp().item() == pytest.approx(5.0)


def test_one_space_gives_both_teachers_the_mean_of_both_similarities(data, monkeypatch):
    seen = {}

    class Kept(torch.nn.Module):
        def forward(self, v, t, scale, **teachers):
            seen.update(teachers)
            return (v.sum() + t.sum()) * scale

    monkeypatch.setitem(ARMS, "one-space", dataclasses.replace(ARMS["one-space"], loss=lambda _: Kept()))
    train(Setting("one-space", 1, "dev", 24, 1, 0.01, 1.0), data.sides["train"], data.teachers, data.words)
    images, texts = seen.values()
    torch.testing.assert_close(images, texts)
    similarities = {
        x @ x.T for x in (data.teachers.rows("efficientnet"), data.teachers.rows("minilm").squeeze(1))
    }
    expected = sum(similarities) / 2
    torch.testing.assert_close((images @ images.T).sort().values.sum(), expected.sort().values.sum())


def test_a_test_of_icons_measures_the_second_side_too(data):
    found = data.train(Setting("clip", 1, "test", 8, 1, 0.01, 0.0))["metrics"]
    assert found["second"]["hits"]["pictures"] == 24
    assert {"pictures R@1", "texts R@10"} <= found["within"].keys()
    assert {"alignment", "texts' uniformity"} <= found["geometry"].keys()
    assert "second" not in data.train(Setting("clip", 1, "dev", 8, 1, 0.01, 0.0))["metrics"]


def test_recall_by_class_counts_neighbours_of_a_shared_class():
    rng = np.random.default_rng(0)
    classes = [tuple(f"k{c}" for c in rng.choice(6, rng.integers(0, 3), replace=False)) for _ in range(30)]
    x = unit(30, 4, seed=3)
    for k in (1, 5):
        hits = []
        for i, of in enumerate(classes):
            right = [j for j in range(30) if j != i and set(of) & set(classes[j])]
            nearest = sorted((j for j in range(30) if j != i), key=lambda j: -(x[i] @ x[j]).item())[:k]
            if right:
                hits.append(bool(set(nearest) & set(right)))
        assert of_class(x, sharing(classes), k) == pytest.approx(100 * np.mean(hits))


def test_a_vendors_concepts_are_on_one_side_only(tmp_path):
    names = [f"{colour}-{thing}" for colour in ("red", "blue", "green") for thing in map(chr, range(97, 117))]
    body = '<path d="M0 0h9v9z" fill="red"/>'
    content = {
        "info": {"name": "Made up"},
        "icons": {name: {"body": body} for name in [*names, "red-a-outline"]},
    }
    tarball = tmp_path / "package.tgz"
    with tarfile.open(tarball, "w:gz") as archive:
        packed = json.dumps(content).encode()
        member = tarfile.TarInfo("package/json/made-up.json")
        member.size = len(packed)
        archive.addfile(member, io.BytesIO(packed))
    source = vendor(tarball, "made-up", 0)
    captions = {side: {of[0] for of in texts} for side, texts in source.captions.items()}
    assert sum(map(len, captions.values())) == len(set.union(*captions.values())) == len(names)
    assert 5 < len(captions["test"]) < 30
    assert all(len(of) == 1 for side in ("dev", "test") for of in source.captions[side])
    assert len(source.pictures("test")) == len(source.captions["test"])
    assert source.captions != vendor(tarball, "made-up", 1).captions
    with pytest.raises(ValueError, match="no icon set 'absent'"):
        vendor(tarball, "absent", 0)


def records(gain, *, blocks, of_numbers=0.0):
    """Return made-up records of the first blocks, where an arm is so many points above CLIP.

    ``of_numbers`` is what its own number takes off.
    """
    sizes = Namespace(**{**vars(SIZES), "blocks": SIZES.blocks[:blocks]})

    def score(one):
        return (
            30
            + gain.get(one.arm, 0.0)
            - abs(np.log2(one.lr / 0.008))
            - of_numbers * np.log2(1 + 10 * one.value)
        )

    return sizes, made_up(study.ask, sizes, study.SETS, score)


def test_every_arm_has_as_many_tries_and_its_best_is_tested():
    assert {len(of) for of in SIZES.tries.values()} == {3}
    sizes, finds = records({}, blocks=2, of_numbers=3.0)
    for one in study.by_cell(sizes, finds):
        assert {len(tried) for tried in one.tried.values()} == {len(SIZES.rates) + 2}
        for arm, of in one.settings.items():
            assert (of.lr, of.value) == (0.008, min(value for _, value in SIZES.tries[arm]))
    tested = [one for find in finds.values() for one in find.records if one.side == "test"]
    assert len(tested) == (4 + 2) * 4
    tuned = {one.seed for find in finds.values() for one in find.records if one.side == "dev"}
    assert tuned.isdisjoint(one.seed for one in tested)


def test_a_family_is_of_the_cells_that_have_records():
    sizes, finds = records({"std-constant": 4.0, "rankclip": 1.0, "rankclip-spread": 4.0}, blocks=6)
    for find in finds.values():
        for of in find.records.values():
            of["metrics"]["within"] = {"texts R@1": 1.0}
    found = study.results(sizes, finds)
    cells = ["emojis-250", "icons-64", "photographs-64", "vendor-250"]
    families = [of for _, of in found["primary"]]
    assert [[row[0] for row in of] for of in families] == [cells, cells, cells, [], []]
    assert [[row[6] for row in of] for of in families[:2]] == [["▲"] * 4, ["▼"] * 4]
    assert all(abs(float(row[3].split(" ")[0].replace("−", "-"))) < 0.5 for row in families[2])
    gained, *_, last = found["verdicts"]
    assert gained == f"`spread` minus `clip`: above 0 on {', '.join(cells)}."
    assert last == "`encoders` minus `encoders-shuffled`: no record yet."
    assert all(len(set(row[3].split(" of "))) == 1 for row in found["blocks"])


def test_all_arms_minus_clip_are_one_family_and_spread_is_in_it():
    sizes, finds = records({"std-constant": 0.3}, blocks=1)
    for find in finds.values():
        for of in find.records.values():
            of["metrics"]["within"] = {}
    found = study.results(sizes, finds)
    tests = [found["primary"][0][1][0], *(row for row in found["secondary"] if row[2] == "`clip`")]
    assert [row[1] for row in tests] == ["`spread`", "`rankclip`", "`rankclip-spread`"]
    (cell,) = study.by_cell(sizes, finds)
    p = [cell.difference((row[1].strip("`"), "clip")).p for row in tests]
    assert [row[5] for row in tests] == [p_text(x) for x in multipletests(p, method="holm")[1]]


def test_a_split_is_a_cell_of_its_own_with_the_settings_of_the_first():
    first = {"cells": ["emojis-250"], "arms": ["clip", "spread"], "seeds": [1, 2, 3]}
    sizes = Namespace(**{**vars(SIZES), "blocks": [first, {**first, "split": 5}]})
    finds = made_up(study.ask, sizes, study.SETS, lambda one: 30.0 + one.split * (one.arm == "std-constant"))
    whole, split = study.by_cell(sizes, finds)
    assert (whole.cell, split.cell) == ("emojis-250", "emojis-250, split 5")
    assert {arm: dataclasses.replace(of, split=0) for arm, of in split.settings.items()} == whole.settings
    gains = [of.difference(("spread", "clip")).mean for of in (whole, split)]
    assert gains == pytest.approx([0.0, 5.0], abs=0.6)
    assert (bool(whole.tried), bool(split.tried)) == (True, False)


def test_a_repeat_is_read_once_it_is_whole():
    """The plan tests four seeds, or eight."""
    first = {"cells": ["emojis-250"], "arms": ["clip", "spread"], "seeds": [9210, 9211]}
    sizes = Namespace(**{**vars(SIZES), "blocks": [first, {**first, "seeds": [9214, 9215]}]})
    finds = made_up(study.ask, sizes, study.SETS, lambda one: 30.0 + one.seed % 3)
    (whole,) = study.by_cell(sizes, finds)
    assert sorted(whole.arms.records["clip"]) == [9210, 9211, 9214, 9215]
    kept = finds["emojis"].records
    del kept[next(one for one in kept if (one.side, one.arm, one.seed) == ("test", "std-constant", 9215))]
    (four,) = study.by_cell(sizes, finds)
    assert sorted(four.arms.records["clip"]) == [9210, 9211]


def test_the_second_thousand_of_icons_is_a_cell_of_its_own():
    sizes, finds = records({"std-constant": 4.0}, blocks=2)
    rng = np.random.default_rng(0)
    for one, of in finds["icons"].records.items():
        if one.side == "test":
            of["metrics"]["second"] = record(
                20.0 + 2 * (one.arm == "std-constant") + rng.normal(0, 0.1), rng
            )["metrics"]
    found = study.results(sizes, finds)
    gains = {row[0]: float(row[3].split(" ")[0]) for row in found["primary"][0][1]}
    assert gains["icons-64, second"] == pytest.approx(2.0, abs=0.3)
    assert gains["icons-64"] == pytest.approx(4.0, abs=0.6)


def test_a_seed_over_the_sets_together_is_the_mean_of_its_differences():
    block = {"cells": study.TOGETHER_CELLS, "arms": ["encoders", "encoders-spread", "one-space"]}
    sizes = Namespace(**{**vars(SIZES), "blocks": [{**block, "seeds": [1, 2, 3]}]})
    gains = {"encoders-spread": 1.0, "one-space": -2.0}
    finds = made_up(study.ask, sizes, study.SETS, lambda one: 30.0 + gains.get(one.arm, 0.0))
    for name, gain in (("emojis", 3.0), ("icons", 0.0), ("photographs", -9.0)):
        for one, of in finds[name].records.items():
            if one.arm == "encoders-spread" and one.side == "test":
                of["metrics"]["retrieval"]["R@10, mean of both"] += gain
    rows = study.together(list(study.by_cell(sizes, finds)))
    found = {row[0]: float(row[3].split(" ")[0].replace("−", "-")) for row in rows}
    assert found == pytest.approx({"`encoders-spread`": 1.0 - 2.0, "`one-space`": -2.0}, abs=0.3)
    assert [row[2] for row in rows] == ["3", "3"]
    del finds["icons"]
    assert study.together(list(study.by_cell(sizes, finds))) == []


def test_the_vendors_drawings_have_the_settings_of_emojis():
    _, finds = records({}, blocks=3)
    emojis, vendors = (
        {one.arm: (one.lr, one.value) for one in finds[name].records if one.side == "test"}
        for name in ("emojis", "vendor")
    )
    assert vendors == emojis
    assert {one.side for one in finds["vendor"].records} == {"test"}
    assert {one.epochs for one in finds["vendor"].records} == {60}


def test_a_fixed_scale_is_that_of_clip_at_its_end():
    of = {"cells": ["emojis-250"], "seeds": [1, 2]}
    blocks = [{**of, "arms": ["clip", "rankclip"]}, {**of, "arms": ["clip-fixed", "rankclip-fixed"]}]
    sizes = Namespace(**{**vars(SIZES), "blocks": blocks})

    def scored(one):
        return 30.0 + (one.lr == {"clip": 0.002}.get(one.arm, 0.004))

    finds = made_up(study.ask, sizes, study.SETS, scored, geometry=lambda one: {"logit_scale": 1e4 * one.lr})
    tested = {one.arm: one for one in finds["emojis"].records if one.side == "test"}
    assert (tested["clip-fixed"].lr, tested["clip-fixed"].value) == (0.002, 20.0)
    assert (tested["rankclip-fixed"].lr, tested["rankclip-fixed"].value) == (0.004, 20.0)
    (cell,) = study.by_cell(sizes, finds)
    assert cell.arms.records.keys() == tested.keys()


@pytest.mark.parametrize("best", [0.002, 0.0005])
def test_clip_lower_is_the_best_of_clips_tries_and_of_those_at_lower_rates(best):
    blocks = [{"cells": ["emojis-250"], "arms": ["clip", "clip-lower"], "seeds": [1, 2]}]
    sizes = Namespace(**{**vars(SIZES), "blocks": blocks})
    finds = made_up(study.ask, sizes, study.SETS, lambda one: 30.0 + (one.lr == best))
    (cell,) = study.by_cell(sizes, finds)
    assert cell.settings["clip-lower"].lr == best
    assert cell.settings["clip"].lr in SIZES.rates
    assert {one.lr for one in cell.tried["clip-lower"]} == {*SIZES.rates, *SIZES.lower_rates}


def test_the_arm_without_a_ceiling_has_the_settings_of_spread():
    blocks = [{"cells": ["emojis-250"], "arms": ["spread", "spread-unbounded"], "seeds": [1, 2]}]
    sizes = Namespace(**{**vars(SIZES), "blocks": blocks})
    finds = made_up(study.ask, sizes, study.SETS, lambda one: 30.0 + (one.lr == 0.004))
    (cell,) = study.by_cell(sizes, finds)
    spread, unbounded = (cell.settings[arm] for arm in ("spread", "spread-unbounded"))
    assert dataclasses.replace(spread, arm="spread-unbounded") == unbounded


def test_a_scale_without_a_ceiling_passes_it(data):
    setting = Setting("spread-unbounded", 1, "dev", 8, 2, 0.01, 0.3)
    model = Student(data.words, scale=200.0)
    arm = ARMS[setting.arm]
    fit(model, arm.loss(0.3), setting, data.sides["train"], lambda *_: {}, ceiling=arm.ceiling)
    assert model.log_scale.exp() > 150
