"""Photographs: the search, the records, the comparisons and the report."""

from __future__ import annotations

import io
import re

import pytest
from examples_common.records import Store
from examples_common.statistics import Difference
from photographs_folder import PICTURES, drawn, filled, finder, read_folder
from photostudy import command, figure, findings, plan, report
from photostudy.plan import Plan
from photostudy.study import Study
from PIL import Image
from rich.console import Console
from studies import assert_corrected, printed_by_readme

START = {"train_pictures": PICTURES["train"], "batch_size": 8, "epochs": 4}
TINY = Plan("full", START, {"dropout": (0.1,), "lr": (1e-2, 1e-4)}, (900, 901), (5, 6, 7), (5, 6, 7))


# --- the search ---


def test_the_search_keeps_the_best_mean_of_two_seeds_factor_by_factor():
    def score(one):
        lucky = 5 if one.dropout == 0.1 and one.seed == 900 else 0
        return 50 + lucky - (4 if one.dropout == 0.1 else 0) + {1e-2: 1, 1e-3: 0, 1e-4: -1}[one.lr]

    found = plan.search(TINY, "clip", finder(score))
    assert found.due == ()
    # A level ahead with one seed alone is not taken; the mean of 51 and 46 is below 50.
    assert found.chosen == {**START, "dropout": 0.3, "lr": 1e-2}
    assert found.score == 51
    assert [(one.level, one.scores, one.taken) for one in found.tries] == [
        (0.1, (51, 46), False),
        (1e-2, (51, 51), True),
        (1e-4, (49,), False),
    ]


def arms_of(chosen=None, other=None):
    searches = [
        plan.Search(loss, of or START, 50.0, (), ()) for loss, of in (("clip", chosen), ("rankclip", other))
    ]
    return plan.arms(TINY, *searches, finder(lambda _: 50.0))


def test_the_controls_share_everything_with_their_own_plain_clip():
    arms = arms_of()
    assert "rankclip-tuned" not in arms
    assert arms_of(other={**START, "lr": 0.1})["rankclip-tuned"].changes["lr"] == 0.1
    for one in plan.comparisons(arms):
        arm, reference = arms[one.arm], arms[one.reference]
        assert (arm.changes, arm.seeds, reference.loss) == (reference.changes, reference.seeds, "clip")
    assert arms["rankclip, twice the epochs"].changes["epochs"] == 2 * START["epochs"]
    fixed = arms["clip, equal scale"].changes
    assert (fixed["scale_start"], fixed["scale_fixed"]) == (9.0, True)
    order = plan.in_order(arms)
    assert sorted(map(repr, order)) == sorted({repr(one) for arm in arms.values() for one in arm.settings()})


# --- comparisons ---


def found_of(skip=lambda one: False):
    return findings.findings(arms_of(), drawn(skip))


def test_differences_are_paired_tests_corrected_over_all_comparisons():
    found = found_of()
    pairs = {
        one.arm: [
            [findings.PRIMARY(record) for record in found.records[name].values()]
            for name in (one.arm, one.reference)
        ]
        for one in plan.comparisons(found.arms)
    }
    assert_corrected([found.primary(name) for name in pairs], [*pairs.values()])


def test_what_lacks_a_training_is_not_stated_and_still_counts_in_the_correction():
    whole, found = found_of(), found_of(lambda one: one.loss == "rankclip-in" and one.seed == 7)
    assert found.primary("rankclip-in") is None
    stated = [found.primary(name) for name in set(found.rows) - {"rankclip-in"}]
    assert {one.mean for one in stated} < {whole.primary(name).mean for name in whole.rows}
    smallest = min(stated, key=lambda d: d.p)
    assert smallest.adjusted == pytest.approx(min(1, smallest.p * len(found.rows)))


# --- from the folder to the report ---


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    root = tmp_path_factory.mktemp("flickr8k")
    photographs = read_folder(root)
    cache = filled(photographs)
    study = Study(photographs, cache, Store(root / "results"), PICTURES["train"])
    console = Console(file=io.StringIO())
    command.train(study, TINY, console)
    found = [plan.search(TINY, loss, study.find) for loss in plan.TUNED]
    arms = plan.arms(TINY, *found, study.find)
    return study, arms, console.file.getvalue()


def test_the_cost_is_said_beforehand_and_finished_trainings_are_kept(trained):
    study, arms, said = trained
    assert re.search(r"best setting: \d+ trainings, 0 of them finished already; about \d+ minutes", said)
    content = study.store.path.read_bytes()
    console = Console(file=io.StringIO())
    settings = plan.in_order(arms)
    command.train(study, TINY, console)
    assert (
        f"Test side: {len(settings)} trainings, {len(settings)} of them finished" in console.file.getvalue()
    )
    assert study.store.path.read_bytes() == content


def test_an_interrupted_study_continues_with_the_same_numbers(trained, tmp_path):
    study, arms, _ = trained
    lines = study.store.path.read_text(encoding="utf-8").splitlines(keepends=True)
    half = Study(study.photographs, study.cache, Store(tmp_path), study.train_pictures)
    half.store.path.write_text("".join(lines[:-3]) + lines[-3][:40], encoding="utf-8")  # killed while writing
    half.do("Test side", plan.in_order(arms), Console(file=io.StringIO()))
    first, second = (one.store.read() for one in (study, half))
    assert {key: r["metrics"] for key, r in first.items()} == {key: r["metrics"] for key, r in second.items()}


def test_the_report_is_made_of_the_records_alone_and_the_readme_computes_its_numbers(
    trained, tmp_path, monkeypatch
):
    study, arms, _ = trained
    text = report.write(TINY, command.finished(study.store), tmp_path).read_text(encoding="utf-8")
    assert "missing" not in text
    found = findings.findings(arms, study.find)
    first = next(iter(found.records["clip"].values()))["setting"]
    for name in found.rows:
        assert f"| `{name}`" in text
    lines = printed_by_readme("photographs", "results/part1", study.store, tmp_path, monkeypatch)
    by_hand = [line.split(" ", 4) for line in lines]
    chosen = str({key: value for key, value in first.items() if key not in ("loss", "seed")})
    main = {loss: float(mean) for loss, _, mean, _, setting in by_hand if setting == chosen}
    for name in ("rankclip", *plan.COMPONENTS):
        assert main[name] == pytest.approx(found.primary(name).mean)


def test_a_report_of_an_unfinished_study_concludes_nothing(trained, tmp_path):
    study, *_ = trained
    store = Store(tmp_path)
    lines = study.store.path.read_text(encoding="utf-8").splitlines(keepends=True)
    store.path.write_text("".join(lines[:4]), encoding="utf-8")
    text = report.write(TINY, command.finished(store), tmp_path).read_text(encoding="utf-8")
    assert "Nothing is concluded yet" in text


def test_a_figure_shows_the_arms_that_have_a_difference_in_every_panel(tmp_path):
    path, some = tmp_path / "report/part.png", Difference(1.0, 0.5, 8)
    heights = []
    for of in ({"a": None, "b": some}, {"a": some, "b": some}):
        alt = figure.write(path, {"first": {"a": some, "b": some}, "second": of})
        assert alt == "Differences to plain CLIP with their intervals: first; second."
        with Image.open(path) as image:
            heights.append(image.height)
    assert heights[0] < heights[1]
    path.unlink()
    assert figure.write(path, {"first": {"a": None}}) is None
    assert not path.exists()
