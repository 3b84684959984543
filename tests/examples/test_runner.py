"""The runner on a study that is made up: choices, resuming, shared trainings, corrected tests."""

from __future__ import annotations

import dataclasses
import random
from types import SimpleNamespace

import numpy as np
import pytest
from filelock import FileLock
from rich.console import Console
from scipy import stats
from statsmodels.stats.multitest import multipletests
from studies import cells
from studies.plan import best_of
from studies.records import key_of, read_lines
from studies.runner import Run, Study
from studies.statistics import MIN_SEEDS_OVER_PICTURES, Arms, Measure

from made_up_records import record

SCORE = Measure("score", ("score",))


@dataclasses.dataclass(frozen=True)
class Setting:
    arm: str
    seed: int
    side: str
    lr: float = 1.0
    weight: float = 0.0


def value(one):
    """The score of a setting, which is best at a rate of 4, and a weight of 8."""
    noise = random.Random(f"{one.arm}{one.seed}").gauss(0, 0.01)
    return -abs(np.log2(one.lr) - 2) - abs(one.weight - 8) / 8 + noise


class Data:
    """A data set whose trainings score by :func:`value`; it notes them, and fails for broken arms."""

    fingerprint = "made up"

    def __init__(self, broken=()):
        self.made, self.broken = [], broken

    def train(self, setting):
        if setting.arm in self.broken:
            raise RuntimeError("out of luck")
        self.made.append(setting)
        return {"metrics": {"score": value(setting)}}


def results(sizes, finds):
    """The study: the best of three rates of the arm ``plain``, which is compared with ``other``."""
    find = finds["set"]
    tries = [Setting("plain", seed=9, side="dev", lr=lr) for lr in (1, 2, 4)]
    plain = best_of("plain", tries, find.scores(SCORE))
    settings = {"plain": plain.chosen, "other": dataclasses.replace(plain.chosen, arm="other", weight=8.0)}
    arms = Arms(find.arms(settings, sizes.seeds))
    return {"tests": arms.tests([("other", "plain")], [SCORE]), "arms": arms, "chosen": plain.chosen}


TRAININGS = 3 + 2 * 3
"""The study's: tries of a rate, and both arms on every seed."""


@pytest.fixture
def run(tmp_path):
    """A run of the study, of which no training is done."""
    (tmp_path / "made.md").write_text("# Report\n\n{{ chosen.lr }}, {{ preset }}\n", encoding="utf-8")
    sizes = SimpleNamespace(seeds=[0, 1, 2])
    study = Study(
        folder=tmp_path,
        setting=Setting,
        plan=lambda _: sizes,
        records={"set": "."},
        data=lambda *_: {},
        results=results,
        report="made",
        packages=("torch",),
    )
    return Run(study, "full", tmp_path / "output")


def trained(run, data):
    """Do the missing trainings of a run; all settings that its data have trained."""
    run.train({"set": data}, Console(quiet=True))
    return data.made


def interrupted(run):
    """The trainings of a run that ends with the first one of the arm ``other``."""
    data = Data(broken=("other",))
    with pytest.raises(RuntimeError, match="out of luck"):
        trained(run, data)
    return data.made


def test_without_a_record_there_is_nothing_to_report(run):
    with pytest.raises(RuntimeError, match="results holds no record: nothing to report"):
        run.write()


def test_missing_trainings_are_done_in_the_plans_order(run):
    made = [(one.arm, one.side, one.seed) for one in interrupted(run)]
    assert made == [("plain", "dev", 9)] * 3 + [("plain", "test", 0)]


def test_a_report_with_missing_trainings_is_refused_with_their_number(run):
    interrupted(run)
    left = TRAININGS - 4  # three tries of a rate and one arm's first seed were done
    with pytest.raises(RuntimeError, match=f"set: {left} "):
        run.write()


def test_a_run_goes_on_with_the_trainings_that_an_error_left(run):
    before, after = interrupted(run), trained(run, Data())
    assert [(one.arm, one.seed) for one in after][:2] == [("other", 0), ("plain", 1)]
    assert len({*before, *after}) == len(before) + len(after) == TRAININGS


def test_a_finished_run_trains_nothing_again(run):
    assert len(trained(run, Data())) == TRAININGS
    assert trained(run, Data()) == []


def test_the_report_is_the_template_with_the_results(run):
    trained(run, Data())
    assert run.write().read_text(encoding="utf-8") == "# Report\n\n4, full\n"


def test_records_begin_with_the_conditions_that_they_share(run):
    trained(run, Data())
    lines = read_lines(run.stores["set"].path)
    assert [*lines[0]] == ["conditions", "conditions_id"]
    assert len(lines) == 1 + TRAININGS


def test_records_of_other_data_do_not_count_and_are_not_reported_beside_these(run):
    trained(run, Data())
    other = Data()
    other.fingerprint = "other data"
    assert len(trained(run, other)) == TRAININGS
    with pytest.raises(ValueError, match=run.stores["set"].path.name):
        run.write()


def test_a_training_that_another_process_holds_comes_after_the_others_of_its_search(run):
    data = Data()
    taken = Setting(arm="plain", seed=9, side="dev", lr=1)
    key = key_of(taken, data.fingerprint)
    (run.output / "locks").mkdir(parents=True)
    of_another_process = FileLock(run.output / "locks" / f"{key}.lock")
    of_another_process.acquire()
    train = data.train

    def train_and_release(setting):
        if setting.lr == 4 and setting.side == "dev":
            of_another_process.release()
        return train(setting)

    data.train = train_and_release
    run.train({"set": data}, Console(quiet=True))
    # The search tries the rates 1, 2 and 4; another process holds 1 until 4 is trained.
    assert [one.lr for one in data.made[:3]] == [2, 4, 1]


def test_the_last_line_of_a_killed_writer_is_dropped(run):
    store = run.stores["set"]
    setting = dataclasses.asdict(Setting("plain", 9, "dev", 1))
    store.save({"key": "a", "setting": setting, "data": "made up", "metrics": {}})
    with store.path.open("a", encoding="utf-8") as file:
        file.write('{"key": "half')
    assert len(store.find()) == 1


def test_a_damaged_line_of_records_is_named(run):
    store = run.stores["set"]
    store.path.parent.mkdir(parents=True, exist_ok=True)
    store.path.write_text("no JSON\n", encoding="utf-8")
    with pytest.raises(ValueError, match="line 1"):
        store.find()


PAIRS = [("a", "b"), ("a", "c"), ("c", "b")]


def scored(values):
    """The arms of records with a score for each seed."""
    return Arms(
        {
            arm: {seed: {"metrics": {"score": score}} for seed, score in enumerate(scores)}
            for arm, scores in values.items()
        }
    )


@pytest.fixture
def values():
    """Six scores of three arms."""
    rng = np.random.default_rng(0)
    return {arm: rng.normal(size=6) for arm in "abc"}


def test_a_difference_is_the_mean_over_the_seeds(values):
    found = [difference.mean for difference in scored(values).tests(PAIRS, [SCORE]).values()]
    assert found == pytest.approx([np.mean(values[x] - values[y]) for x, y in PAIRS])


def test_the_tests_are_paired_and_corrected_together(values):
    found = [difference.adjusted for difference in scored(values).tests(PAIRS, [SCORE]).values()]
    p = [stats.ttest_rel(values[x], values[y]).pvalue for x, y in PAIRS]
    _, corrected, *_ = multipletests(p, method="holm")
    assert found == pytest.approx(list(corrected))


def over_two_pictures(common_seeds):
    """The interval of arms that differ by 2 in both pictures of each common seed; one has a seed more."""
    scores = {seed: np.array([seed, seed]) for seed in range(common_seeds)}
    above = {seed: np.array([seed + 2.0, seed + 2.0]) for seed in range(common_seeds + 1)}
    return Arms({"above": above, "arm": scores}).over_pictures(("above", "arm"), lambda record: record)


def test_an_interval_over_pictures_compares_the_seeds_that_both_arms_have():
    assert over_two_pictures(MIN_SEEDS_OVER_PICTURES) == (2.0, 2.0)


def test_an_interval_over_pictures_needs_eight_common_seeds():
    assert MIN_SEEDS_OVER_PICTURES == 8
    assert over_two_pictures(8 - 1) is None


def test_an_interval_over_pictures_is_left_out_where_ties_are_hits():
    def eight_seeds(recall, share_of_hits):
        """Records with a recall in percent, and hits of a share of the pictures."""
        rng = np.random.default_rng(0)
        found = {seed: record(recall, rng) for seed in range(8)}
        for of_seed in found.values():
            of_seed["metrics"]["hits"] = record(share_of_hits, rng)["metrics"]["hits"]
        return found

    b = eight_seeds(recall=50.0, share_of_hits=50)
    as_counted = Arms({"a": eight_seeds(recall=60.0, share_of_hits=60), "b": b})
    low, high = cells.over_pictures(as_counted, ("a", "b"), 10.0)
    assert low < 10.0 < high
    tied = Arms({"a": eight_seeds(recall=60.0, share_of_hits=90), "b": b})
    assert cells.over_pictures(tied, ("a", "b"), 10.0) is None
