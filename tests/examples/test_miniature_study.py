"""Studies: plans that are fixed, who continues, what is looked at once, and what is compared."""

import dataclasses
import itertools
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from miniature_paper.search.confirmation import SecondConfirmationError, declare, needed, outcome
from miniature_paper.search.ladder import climb, winner
from miniature_paper.search.objective import SCORES
from miniature_paper.search.study import SETTING, STUDIES, Round, Spread, load
from miniature_paper.search.trials import RECIPE, REFERENCE, SIZE_NAMES, TEST, VALIDATION
from miniature_records import study_records
from open_clip_train.params import parse_args
from scipy import stats

SEARCH, QUESTION, TEACHER, DISTIL = (
    load(name, "full") for name in ("search", "question", "teacher", "distil")
)
QUICK = load("search", "quick")
EVERY = [load(name, size) for name in STUDIES for size in SIZE_NAMES]
every = pytest.mark.parametrize("one", EVERY, ids=lambda one: f"{one.name}-{one.size}")
TRIALS = SEARCH.arms[SETTING]


# --- plans ---


@every
def test_no_plan_misleads(one):
    """Arms have equally many tries, seeds serve once, and no round keeps more tries than the one before."""
    tries = [trial for of in one.arms.values() for trial in of]
    assert len({trial.name for trial in tries}) == len(tries)
    assert len({len(of) for of in one.arms.values()}) == 1
    seeds = [seed for part in (*one.rounds, one.confirmation) for seed in part.seeds]
    seeds += [one.teacher.seed] if one.teacher else []
    seeds += range(one.grid.seeds)  # those of the tables, which were looked at
    assert len(set(seeds)) == len(seeds)
    kept = [len(tries) // len(one.arms), *(part.keep for part in one.rounds)]
    assert kept == sorted(kept, reverse=True)
    assert kept[-1] == 1
    assert not one.combined or RECIPE in tries


def test_the_number_of_seeds_follows_from_the_spread():
    values, spread = (0.1, 0.5, -0.3, 0.9), Spread((0.1, 0.5, -0.3, 0.9), 0.2, 0.9)
    assert spread.deviation == pytest.approx(np.std(values, ddof=1))

    def power(n):
        shift = 0.2 / spread.deviation * n**0.5
        bound = stats.t.isf(0.025, n - 1)
        return stats.nct.sf(bound, n - 1, shift) + stats.nct.cdf(-bound, n - 1, shift)

    assert power(spread.seeds) >= 0.9 > power(spread.seeds - 1)


# --- trainings ---

FOUR_EPOCHS = Round(4, (7,))


def parsed(attempt):
    return parse_args(attempt.job().command("pairs.csv", "name", device="cpu", workers=0)[3:])


@pytest.mark.parametrize("one", [SEARCH, QUESTION], ids=lambda one: one.name)
def test_the_trainer_takes_every_try(one):
    """Those without a teacher, whose files do not have to be there."""
    for trial in itertools.chain(*one.arms.values()):
        attempt = one.attempt(trial, FOUR_EPOCHS, 7, VALIDATION)
        args, base = parsed(attempt), parsed(one.reference(trial, FOUR_EPOCHS, 7, VALIDATION))
        for flag, value in trial.changes:
            taken = getattr(args, flag.lstrip("-").replace("-", "_"))
            assert taken == {"include": True, "exclude": False}.get(value, type(taken)(value))
        assert (args.loss, args.seed, args.epochs) == (trial.loss, 7, 4)
        assert (base.loss, base.seed, base.epochs) == ("clip", 7, 4)
        assert (base.batch_size, base.warmup) == (args.batch_size, args.warmup)
        # Every batch size sees the same pairs.
        assert attempt.steps * args.batch_size == attempt.pairs * args.epochs
        assert 0 < args.warmup < attempt.steps


# --- the rounds ---

SMALL = dataclasses.replace(
    QUICK,
    arms={SETTING: TRIALS[:9]},
    rounds=(Round(1, (10, 11), 3), Round(1, (20, 21), 2), Round(2, (30, 31, 32), 1)),
)


def by_chance(seed, lost=()):
    """Records by chance, in an order by chance; ``lost`` names tries that diverge."""

    def find(needed):
        made = list(study_records(noise=1.0, lost=lost, salt=seed)(needed).items())
        random.Random(seed).shuffle(made)
        return dict(made)

    return find


@settings(max_examples=8)
@given(seed=st.integers(0, 10**6), lost=st.sets(st.sampled_from([t.name for t in TRIALS[1:9]]), max_size=4))
def test_the_winner_is_not_below_what_it_beat(seed, lost):
    steps = climb(SMALL, SETTING, by_chance(seed, lost))
    best = winner(SMALL, SETTING, steps)
    assert best.name not in lost
    worth = {standing.trial: standing.worth for standing in steps[-1].standings}
    assert worth[best] == max(worth.values())
    for before, after in itertools.pairwise(steps):
        assert len(before.kept) == before.round.keep
        left = min(s.worth for s in before.standings if s.trial in before.kept)
        assert all(s.worth <= left for s in before.standings if s.trial not in before.kept)
        assert {RECIPE, *before.kept} <= set(after.trials)
    assert all(RECIPE in step.trials for step in steps)
    assert {one.side for step in steps for one in step.attempts} == {VALIDATION}


# --- the confirmation ---

ONE, OTHER = TRIALS[2], TRIALS[8]


def test_a_second_confirmation_is_refused(tmp_path):
    declare(QUICK, {SETTING: OTHER}, tmp_path, record=False)  # as long as nothing is recorded
    for _ in range(2):
        declare(QUICK, {SETTING: ONE}, tmp_path, record=True)
    path = tmp_path / SETTING / "confirmations.jsonl"
    before = path.read_bytes()
    longer = dataclasses.replace(QUICK, confirmation=Round(2, (100, 101, 102, 103)))
    for plan, trial in ((QUICK, OTHER), (longer, ONE), (QUICK, dataclasses.replace(ONE, loss="clip"))):
        for record in (True, False):
            with pytest.raises(SecondConfirmationError, match=f"confirm {ONE.name}, .* {trial.name} by"):
                declare(plan, {SETTING: trial}, tmp_path, record=record)
    assert path.read_bytes() == before


@pytest.mark.parametrize("one", [SEARCH, QUESTION, TEACHER], ids=lambda one: one.name)
def test_the_outcome_is_the_paired_test_of_the_studys_score(one):
    """A comparison with the recipe in it is secondary, and so are the other scores."""
    winners = {arm: tries[-1] for arm, tries in one.arms.items()}
    names = {arm: trial.name for arm, trial in winners.items()} | {"recipe": "recipe"}
    find = study_records(effects={"rankclip-recipe": 0.3})
    found = outcome(one, winners, find)
    values = {(a.trial, a.seed): SCORES[one.score](r) for a, r in find(needed(one, winners)).items()}
    pairs = {(arm, REFERENCE) for arm in one.arms}
    pairs |= {(arm, one.rival) for arm in one.arms if one.rival in one.arms and arm != one.rival}
    assert found.tests.keys() == pairs
    for (arm, other), d in found.tests.items():
        clip = one.reference(winners[arm], one.confirmation, 0, TEST).trial
        base = clip if other == REFERENCE else names[other]
        both = [(values[names[arm], s], values[base, s]) for s in one.confirmation.seeds]
        assert d.p == pytest.approx(stats.ttest_rel(*zip(*both, strict=True)).pvalue)
        assert d.mean == pytest.approx(np.mean([a - b for a, b in both]))
    for d in (*found.tests.values(), *found.others.values()):
        assert d.adjusted is None or d.adjusted >= d.p
