"""The study of heads: as many tries for every arm, tests of whole seeds, a report that is of its records."""

from __future__ import annotations

import dataclasses
import re
from types import SimpleNamespace as Namespace

import pytest
import torch
from rich.console import Console
from studies.baselines.study import data
from studies.heads import study
from studies.runner import Run, load
from studies.statistics import Arms
from studies.students import losses
from studies.training import set_epoch
from test_studies import Encoders

import rankloss
from batches import unit
from made_up_records import made_up

SIZES = load("heads").sizes("full")


def records(gains, *, best=(0.002, 0.0)):
    """Return made-up records, where an arm is so many points above CLIP.

    ``best`` are the rate and the dropout that are best for all.
    """

    def score(one):
        return 50 + gains.get(study.arm_of(one), 0.0) + 3 * (one.lr == best[0]) + 3 * (one.dropout == best[1])

    return made_up(study.ask, SIZES, study.SETS, score)


def gain(row):
    """Return the difference of a table's row."""
    return float(row[3].split(" ")[0].replace("−", "-"))


@pytest.mark.parametrize("best", [(0.001, 0.5), (0.002, 0.0)])
def test_every_arm_has_six_tries_and_its_best_is_tested(best):
    finds = records({}, best=best)
    for name, find in finds.items():
        of_side = {side: [one for one in find.records if one.side == side] for side in ("dev", "test")}
        assert len(of_side["dev"]) == 6 * len(SIZES.numbers)
        assert {one.seed for one in of_side["dev"]} == {SIZES.try_seed}
        assert len(of_side["test"]) == len(SIZES.seeds) * len(SIZES.numbers)
        assert {one.seed for one in of_side["test"]} == set(SIZES.seeds)
        assert {(one.lr, one.dropout) for one in of_side["test"]} == {best}
        for arm in SIZES.numbers:
            tried = study.tried(SIZES, name, find, arm)
            assert len(tried.tries) == 6
            tested = dataclasses.replace(tried.chosen, seed=SIZES.seeds[0], side="test")
            assert tested in find.records


def test_the_plans_page_has_the_numbers_of_its_settings():
    page = (load("heads").folder / "plan.md").read_text(encoding="utf-8")
    for arm, (values,) in ((arm, of.values()) for arm, of in SIZES.numbers.items()):
        first, second, third = (f"{value:g}" for value in values)
        assert re.search(rf"^\| `{arm}` \|.*: {first}; {second}, {third} \|$", page, re.MULTILINE)
    assert f"learning rates of {SIZES.rates[0]:g} and {SIZES.rates[1]:g}" in page
    first, second, third = (f"{value:g}" for value in SIZES.dropouts)
    assert f"dropout of {first}" in page
    assert f"dropout of {second} and {third}" in page
    for of in SIZES.sizes.values():
        assert f"{of['epochs']} epochs of {of['batch_size']}" in page
    assert f"seed {SIZES.try_seed}" in page
    assert f"seeds {SIZES.seeds[0]} to {SIZES.seeds[-1]} " in page
    assert SIZES.seeds == list(range(SIZES.seeds[0], SIZES.seeds[-1] + 1))
    for letter, pair in study.PRIMARY_TESTS.items():
        assert f"| ({letter}) | {' − '.join(f'`{arm}`' for arm in pair)} |" in page


def test_every_family_is_of_both_data_sets(monkeypatch):
    monkeypatch.setattr(Arms, "over_pictures", lambda *_: (-1.0, 1.0))  # a bootstrap of seconds
    finds = records({"spread": 3.0, "smoothing": 1.5, "rankclip-spread": 3.0})
    for of in finds["photographs"].records.values():
        of["metrics"]["people"] = {"experts τ_c": 40.0}
    found = study.results(SIZES, finds)
    families = [of for _, of in found["primary"]]
    assert [[row[0] for row in of] for of in families] == [list(study.SETS)] * 4
    gains = [gain(row) for of in families for row in of]
    assert gains == pytest.approx([3, 3, -3, -3, 0, 0, 1.5, 1.5], abs=0.3)
    assert [row[6] for of in families[:2] for row in of] == ["▲", "▲", "▼", "▼"]
    assert [row[:3] for row in found["secondary"][::2]] == [
        ["photographs", "`spread`", "`smoothing`"],
        ["photographs", "`rankclip`", "`clip`"],
    ]
    assert found["verdicts"][0] == "`spread` minus `clip`: above 0 on photographs, emojis."
    assert [row[3] for row in found["arms"] if row[0] == "emojis"] == ["–"] * 5
    assert all("dropout 0" in row[2] for row in found["tries"])


def test_a_seed_is_tested_once_every_arm_has_it():
    finds = records({})
    kept = finds["photographs"].records
    del kept[next(one for one in kept if (one.side, one.arm, one.seed) == ("test", "rankclip", 9417))]
    seeds = {
        of.cell: {arm: list(by_seed) for arm, by_seed in of.arms.records.items()}
        for of in study.by_set(SIZES, finds)
    }
    assert seeds == {
        "emojis": dict.fromkeys(SIZES.numbers, SIZES.seeds),
        "photographs": dict.fromkeys(SIZES.numbers, SIZES.seeds[:-1]),
    }
    del finds["emojis"]
    assert [of.cell for of in study.by_set(SIZES, finds)] == ["photographs"]


def test_losses_with_spread_are_its_term_more():
    v, t, scale = unit(9, 6, seed=0), unit(9, 6, seed=1), torch.tensor(8.0, dtype=torch.float64)

    def value(name, **options):
        loss = losses.build(name, **options)
        set_epoch(loss, 3, 4)
        return loss(v, t, scale).item()

    term = (rankloss.SpreadLoss(weight=1.0)(v, t, scale) - rankloss.ClipLoss()(v, t, scale)).item()
    assert term > 0.1
    assert value("spread", weight=0.7) - value("clip") == pytest.approx(0.7 * term)
    assert value("rankclip-spread", weight=4.0) - value("rankclip", weight=4.0) == pytest.approx(0.3 * term)


@pytest.mark.slow
def test_the_quick_preset_trains_and_reports(tmp_path):
    of = load("heads")
    run, options = Run(of, "quick", tmp_path), Namespace(output=tmp_path, icons=None, data=None)
    sizes = of.sizes("quick")
    run.train(data(sizes, options, Encoders), Console(quiet=True))
    found = run.stores["emojis"].find()
    assert len(found) == (6 + len(sizes.seeds)) * len(sizes.numbers)
    clip, *others = (
        record["metrics"]["retrieval"] for one, record in found.items() if (one.seed, one.side) == (1, "test")
    )
    assert all(other != clip for other in others)
    text = run.write().read_text(encoding="utf-8")
    assert "smoke test" in text
    assert len(re.findall(r"^\| emojis \| +`spread` \| +`clip` \|", text, re.MULTILINE)) == 1
