"""The study of captions: its memory, its hits, its two intervals, and a report that is of its records."""

from __future__ import annotations

from types import SimpleNamespace as Namespace

import numpy as np
import pytest
import torch
from PIL import Image
from studies.captions import data, study, teachers
from studies.captions.data import DataSet, Source, Splits
from studies.captions.memory import MemoryLoss
from studies.captions.teachers import Teachers
from studies.captions.train import Setting
from studies.data import drawings
from studies.data.drawings import split_emojis
from studies.icons.records import Record
from studies.runner import load

import rankloss
from batches import unit
from made_up_records import made_up

SIZES = load("captions").sizes("full")


def test_the_memory_of_one_batch_has_clips_gradient():
    """With γ = 1 and ε = 1/(N − 1), at a second visit too; in float64 to rounding."""
    n, inputs = 12, [unit(12, 8, seed=seed) for seed in (0, 1)]
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
    v, t = (unit(3, 5, seed=seed, dtype=torch.float32) for seed in (2, 3))
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


def test_a_clip_of_more_pairs_teaches_fewer_of_them(tmp_path, monkeypatch):
    """Its rows are those of the pairs that are taught, whatever their places and words are among the more."""
    monkeypatch.setattr(data, "TEACHER", Setting("clip", 1, "dev", batch_size=8, epochs=1, lr=0.01))
    rng = np.random.default_rng(0)
    drawn = [Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)) for _ in range(24)]

    def made(places, name, **more):
        captions = {side: [[f"a{i % 3} b{i}"] for i in places] for side in data.SIDES}
        return DataSet(Source(captions, lambda _: [drawn[i] for i in places]), tmp_path / name, **more)

    larger = made(range(24), "larger")
    few, same = (made([7, 3, 20], name, more=lambda: larger).teachers for name in ("few", "same"))
    every = larger.encode(larger)
    for kind in ("pictures", "texts"):
        rows = few.rows(f"clip's {kind}")
        torch.testing.assert_close(rows, every[kind][[7, 3, 20]])
        torch.testing.assert_close(rows, same.rows(f"clip's {kind}"), rtol=0, atol=0)
    assert "clip.pt" in {path.name for path in few.folder.iterdir()}
    with pytest.raises(ValueError, match="clip's texts"):
        larger.teachers.rows("clip's texts")


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


def of_blocks(gain, *, blocks=1):
    """Return records of the first blocks, where an arm is so many points above CLIP (scales: 1 below)."""
    gain = {"scale-5": -1.0, "scale-50": -1.0, **gain}
    plan = Namespace(**{**vars(SIZES), "blocks": SIZES.blocks[:blocks]})
    names = (*study.SETS, *study.LARGE, *study.MORE)
    return made_up(study.ask, plan, names, lambda one: 30 + gain.get(one.arm, 0) + np.log2(one.lr / 0.001))


@pytest.mark.slow
def test_the_verdict_is_that_of_the_plan():
    finds = of_blocks({"captions": 4.0, "shuffled": -2.0, "smoothing": -1.0})
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
    found = study.results(SIZES, of_blocks({"captions": 4.0, "shuffled": 4.0}))
    assert found["captions_own"] == []
    assert len(found["not_captions"]) == 5
    assert not any(of["met"] for of in found["verdicts"].values())


@pytest.mark.slow
@pytest.mark.parametrize("arm", study.TRIED)
def test_the_reference_is_clips_best_try(arm):
    found = study.results(SIZES, of_blocks({"captions": 4.0, arm: 3.0}))
    assert all(row[2] == f"`{arm}`" for row in found["primary"])
    assert not any(of["met"] for of in found["verdicts"].values())


def test_a_report_is_of_the_records_that_are_there():
    """A cell of whose arms one has fewer seeds is compared on the common ones."""
    finds = of_blocks({"captions": 4.0})
    emojis = finds["emojis"].records
    for one in [one for one in emojis if one.arm == "captions" and one.seed > 9101 and one.batch_size == 64]:
        del emojis[one]
    found = study.results(SIZES, {name: finds[name] for name in ("emojis", "icons")})
    n = {row[0]: row[4] for row in found["primary"]}
    assert n == {"emojis-64": "2", "emojis-250": "4", "icons-64": "4", "icons-250": "4"}


GAINS = {"captions": 4.0, "encoders": 3.0}
OF_MORE_PAIRS = {"icons-71680-64", "icons-all-64"}


@pytest.fixture(scope="module")
def of_every_block():
    """Made-up records of every block, by the data they are of, and the report's tables."""
    finds = of_blocks(GAINS, blocks=len(SIZES.blocks))
    return finds, study.results(SIZES, finds)


@pytest.mark.slow
def test_more_pairs_have_rates_and_a_family_of_their_own(of_every_block):
    """No planned family grows."""
    finds, tables = of_every_block
    for name, tried in zip(study.LARGE, ({0.002, 0.004}, {0.002, 0.004, 0.008}), strict=True):
        every = finds[name].records
        assert {one.lr for one in every if one.side == "dev"} == tried
        assert {one.lr for one in every if one.side == "test"} == {max(tried)}
    assert {row[0] for row in tables["large"]} == OF_MORE_PAIRS
    assert len(tables["large"]) == 10
    assert len(tables["primary"]) == len(tables["control"]) == 6


@pytest.mark.slow
def test_a_secondary_test_is_of_no_cell_that_is_described_alone(of_every_block):
    described = {name for name, cell in SIZES.cells.items() if "described" in cell}
    tested = {row[0] for row in of_every_block[1]["secondary"]}
    assert tested.isdisjoint(OF_MORE_PAIRS | described)


@pytest.mark.slow
def test_every_curve_has_the_gains_of_its_cells_and_the_changes_of_every_arm(of_every_block):
    tables = of_every_block[1]
    assert [row[2] for row in tables["gains"]] == [x for cells in SIZES.curves.values() for x in cells]
    curves = {row[0] for row in tables["changes"]}
    assert curves
    for curve in curves:
        arms = {row[1] for row in tables["changes"] if row[0] == curve}
        assert {"`encoders`", "`rankclip`", "`captions`"} <= arms


@pytest.mark.slow
def test_splits_show_the_mean_gain_of_five_and_mark_one_above_0(of_every_block):
    splits = of_every_block[1]["splits"]
    assert len(splits) == 7
    for cell, arm, *of_splits, mean, _, mark in splits:
        assert cell in SIZES.splits["cells"]
        assert len(of_splits) == 5
        gain = GAINS.get(arm.strip("`"), 0.0)
        assert float(mean.split(" ")[0].replace("−", "-")) == pytest.approx(gain, abs=0.5)
        assert (mark == "▲") == (gain > 0)


def test_the_change_of_a_gain_is_paired_by_seed():
    def record(score):
        return {"metrics": {"retrieval": {"R@10, mean of both": score}}}

    def cell(gains):
        above = {seed: record(20.0 + gain) for seed, gain in gains.items()}
        return study.Arms({"clip": dict.fromkeys(gains, record(20.0)), "captions": above})

    gains = {"first": {1: 3.0, 2: 5.0, 3: 9.0}, "middle": {1: 7.0}, "last": {2: 1.0, 3: 4.0, 4: 8.0}}
    arms_of = {name: cell(of) for name, of in gains.items()}
    ((key, change),) = study.changes({"pairs": dict.fromkeys([*gains, "absent"], "")}, arms_of).items()
    assert key == ("pairs", "captions", "first", "last")
    assert (change.mean, change.n) == (pytest.approx(-4.5), 2)


def test_a_split_is_made_when_it_is_trained_on():
    made = []

    class Made:
        def __init__(self, split):
            made.append(split)
            self.fingerprint = f"data of {split}"

    of = Splits(Made)
    settings = [Setting("clip", 1, "test", 8, 1, 0.1, split) for split in (2, 2, 0)]
    assert [of.fingerprint(one) for one in settings] == ["data of 2", "data of 2", "data of 0"]
    assert made == [2, 0]


def test_splits_of_emojis_hold_out_other_concepts():
    sides = [split_emojis(split=split) for split in (0, 1)]
    tests = [{one.concept for one in of["test"]} for of in sides]
    assert len(tests[0] & tests[1]) < 0.4 * len(tests[0])
    for of in sides:
        concepts = [{one.concept for one in side} for side in of.values()]
        assert sum(map(len, concepts)) == len(set.union(*concepts))


def test_splits_of_icons_hold_out_other_concepts_once_each():
    parts = {"train": [], "validation": [], "test": []}
    for i in range(600):
        concept, part = f"c{i % 200}", ("test", "validation", *["train"] * 6)[i % 200 % 8]
        parts[part].append(Record(i, "set", f"n{i}", "", "", "", concept, (), (), part, "", i < 200, False))
    build = Namespace(part=lambda name: Namespace(records=parts[name]))
    tests = []
    for split in range(3):
        sides = drawings._split_icons(build, split)
        concepts = {side: {one.concept for one in of} for side, of in sides.items()}
        assert sum(map(len, concepts.values())) == len(set.union(*concepts.values())) == 200
        assert all(len(sides[side]) == len(concepts[side]) for side in ("dev", "test"))
        assert len(sides["train"]) == 3 * len(concepts["train"])
        tests.append(concepts["test"])
    assert 10 < len(tests[1]) < 60
    assert tests[1] != tests[2]
    assert tests[0] == {f"c{i}" for i in range(0, 200, 8)}
