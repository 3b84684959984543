"""The study of heads with the same dropout: means of seeds decide, each cell has the dropout of its name."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from studies.baselines.study import Setting
from studies.dropout import study
from studies.heads.study import SMOOTHING, arm_of
from studies.plan import Find
from studies.runner import load
from studies.statistics import Arms
from studies.students.measure import PRIMARY

from made_up_records import made_up, record

STUDY = load("dropout")
SIZES = STUDY.sizes("full")
CELLS = ["dropout 0", "dropout 0.15", "dropout 0.3", study.BEST]


@pytest.fixture(scope="module")
def finds():
    """Spread gains 4 with a dropout of 0.3, where it is best; the others are best without."""

    def score(one):
        if arm_of(one) == "spread":
            return 50 + (4 if one.dropout == 0.3 else 0) + 2 * (one.lr == 0.002)
        return 50 - 10 * one.dropout + 2 * (one.lr == 0.001)

    return made_up(
        lambda sizes, finds: study.tested(sizes, finds["photographs"]), SIZES, ["photographs"], score
    )


def test_every_arm_has_the_same_tries_and_seeds(finds):
    records = finds["photographs"].records
    for arm, own in SIZES.arms.items():
        of = [one for one in records if arm_of(one) == arm]
        dev, test = ([one for one in of if one.side == side] for side in ("dev", "test"))
        assert len(dev) == len(SIZES.rates) * len(SIZES.dropouts) * len(SIZES.tuning_seeds)
        assert len(test) == len(SIZES.dropouts) * len(SIZES.seeds)
        assert {one.seed for one in dev} == set(SIZES.tuning_seeds)
        assert {one.seed for one in test} == set(SIZES.seeds)
        assert {one.lr for one in test} == {0.002 if arm == "spread" else 0.001}
        for field, value in own.items():
            assert {getattr(one, field) for one in of} == {value}


def test_a_cell_is_of_its_dropout_and_the_last_of_each_arms_best(finds):
    every = study.tested(SIZES, finds["photographs"])
    assert [of.cell for of in every] == CELLS
    gains = {of.cell: of.difference(("spread", "clip")).mean for of in every}
    assert gains == pytest.approx(dict(zip(CELLS, [0.0, 1.5, 7.0, 4.0], strict=True)), abs=0.3)
    *_, best = every
    with_dropout = {
        arm: {one.dropout for one in settings_of(finds, of)} for arm, of in best.arms.records.items()
    }
    assert with_dropout == {"clip": {0.0}, SMOOTHING: {0.0}, "spread": {0.3}}


def settings_of(finds, records):
    """The settings that have these records."""
    wanted = [id(of) for of in records.values()]
    return [one for one, of in finds["photographs"].records.items() if id(of) in wanted]


def test_means_over_seeds_are_of_each_setting():
    one, other = (Setting("clip", 1, "dev", lr=lr) for lr in (0.1, 0.2))
    rng = np.random.default_rng(0)
    scores = {(0.1, 1): 10.0, (0.1, 2): 30.0, (0.2, 1): 5.0, (0.2, 2): 6.0}
    records = {
        dataclasses.replace(of, seed=seed): record(scores[of.lr, seed], rng)
        for of in (one, other)
        for seed in (1, 2)
    }
    find = Find("photographs", records)
    assert find.means(PRIMARY, [1, 2])([other, one]) == [5.5, 20.0]
    assert find.means(PRIMARY, [2])([other, one]) == [6.0, 30.0]


def test_the_report_has_a_family_for_each_question(finds, monkeypatch):
    monkeypatch.setattr(Arms, "over_pictures", lambda *_: (-1.0, 1.0))  # a bootstrap of seconds
    found = study.results(SIZES, finds)
    assert [[row[0] for row in rows] for _, rows in found["primary"]] == [CELLS] * 3
    assert found["verdicts"][0].startswith("`spread` minus `clip`: no significant difference on dropout 0;")
    assert [row[1] for row in found["tries"]] == [
        "lr 0.001, dropout 0",
        "lr 0.001, dropout 0",
        "lr 0.002, dropout 0.3",
    ]


def test_the_plans_page_has_the_numbers_of_its_settings():
    page = (STUDY.folder / "plan.md").read_text(encoding="utf-8")
    assert f"every learning rate ({', '.join(f'{x:g}' for x in SIZES.rates)})" in page
    assert f"every dropout ({', '.join(f'{x:g}' for x in SIZES.dropouts)})" in page
    assert f"seeds, {SIZES.tuning_seeds[0]} to {SIZES.tuning_seeds[-1]}." in " ".join(page.split())
    assert f"seeds {SIZES.seeds[0]} to {SIZES.seeds[-1]} " in page
    assert "`clip` (weight decay of 0.005), `smoothing` (of 0.1), `spread` (weight 1)" in page
    assert {arm: [*own.values()] for arm, own in SIZES.arms.items()} == {
        "clip": [0.005],
        SMOOTHING: [0.1],
        "spread": [1.0],
    }
    for letter, pair in study.PRIMARY_TESTS.items():
        assert f"| ({letter}) | {' − '.join(f'`{arm}`' for arm in pair)} |" in page
