"""Studies: plans that are fixed, who continues, what is looked at once, and what is compared."""

import dataclasses
import itertools
import json
import random
from pathlib import Path

import numpy as np
import open_clip_train.main
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from miniature_paper import grid
from miniature_paper.options import _EXAMPLE as EXAMPLE
from miniature_paper.runs import key_of
from miniature_paper.search import objective, study, trials
from miniature_paper.search.confirmation import SecondConfirmationError, declare, needed, outcome
from miniature_paper.search.ladder import climb, helped, progress, stand, winner
from miniature_paper.search.objective import OBJECTIVE, SCORES
from miniature_paper.search.study import SETTING, STUDIES, Round, Spread, load
from miniature_paper.search.trials import RECIPE, REFERENCE, SIZE_NAMES, TEST, VALIDATION, combine
from miniature_records import study_records
from open_clip_train.params import parse_args
from scipy import stats

SEARCH, QUESTION, TEACHER = (load(name, "full") for name in ("search", "question", "teacher"))
QUICK = load("search", "quick")
EVERY = [load(name, size) for name in STUDIES for size in SIZE_NAMES]
every = pytest.mark.parametrize("one", EVERY, ids=lambda one: f"{one.name}-{one.size}")
TRIALS = SEARCH.arms[SETTING]
BY_NAME = {trial.name: trial for trial in TRIALS}


# --- plans ---


@every
def test_arms_have_equally_many_tries_and_seeds_serve_once(one):
    tries = [trial.name for of in one.arms.values() for trial in of]
    assert len(set(tries)) == len(tries) == len(one.arms) * len(next(iter(one.arms.values())))
    seeds = [seed for part in (*one.rounds, one.confirmation) for seed in part.seeds]
    seeds += [one.teacher.seed] if one.teacher else []
    seeds += range(one.grid.seeds)  # those of the tables, which were looked at
    assert len(set(seeds)) == len(seeds)
    if one.name == "teacher" and one.size == "full":
        assert len(one.confirmation.seeds) >= 8


@pytest.mark.parametrize(
    ("plan", "changes", "said"),
    [
        (QUICK, {"rounds": (Round(1, (10,), 2), Round(2, (10,), 1))}, "no seed may serve twice"),
        (QUICK, {"arms": {SETTING: TRIALS[1:]}}, "arms: the recipe must be among the tries"),
        (QUICK, {"rounds": (Round(1, (10,), 2),)}, "rounds: none may keep more"),
        (QUICK, {"rounds": ()}, "rounds: several tries need at least one"),
        (QUICK, {"arms": {SETTING: (*TRIALS, RECIPE)}}, "arms: every name once"),
        (
            TEACHER,
            {"arms": {"one": TRIALS[:1], "two": TRIALS[1:3]}},
            "every arm must have equally many tries",
        ),
    ],
)
def test_a_plan_that_would_mislead_is_refused(plan, changes, said):
    with pytest.raises(ValueError, match=said):
        dataclasses.replace(plan, **changes)


def test_the_number_of_seeds_follows_from_the_spread():
    values, spread = (0.1, 0.5, -0.3, 0.9), Spread((0.1, 0.5, -0.3, 0.9), 0.2, 0.9)
    assert spread.deviation == pytest.approx(np.std(values, ddof=1))

    def power(n):
        shift = 0.2 / spread.deviation * n**0.5
        bound = stats.t.isf(0.025, n - 1)
        return stats.nct.sf(bound, n - 1, shift) + stats.nct.cdf(-bound, n - 1, shift)

    assert power(spread.seeds) >= 0.9 > power(spread.seeds - 1)


def test_the_preregistration_says_what_the_command_does():
    text = (EXAMPLE / "preregistration.md").read_text(encoding="utf-8")
    seeds = QUESTION.confirmation.seeds
    assert f"**{len(seeds)}**, {seeds[0]} to {seeds[-1]}," in text
    assert f"**{QUESTION.spread.deviation:.3f}**" in text
    assert len(seeds) == QUESTION.spread.seeds >= 16
    attempts = needed(QUESTION, progress(QUESTION, lambda _: {}).winners)
    assert f"all {len(attempts)} models" in text
    assert (QUESTION.score, QUESTION.arms["rankclip"][0].changes) == ("R@10, both ways", ())
    size = QUESTION.grid
    assert f"pairs ({size.pairs:,}), steps ({size.steps:,} of {size.batch_size})" in text


def test_a_plan_whose_records_are_gone_is_refused():
    with pytest.raises(ValueError, match="seed 77, which a plan rests on, has no pair of records"):
        study.earlier_spread((77,), (), 0.2, 0.9)


def test_levels_of_one_factor_are_not_combined():
    with pytest.raises(ValueError, match="lambda-x4 and lambda-x16 change the same argument"):
        BY_NAME["lambda-x4"] + BY_NAME["lambda-x16"]
    found = combine([BY_NAME[name] for name in ("top-10", "batch-512", "no-diagonal", "one-list")], 3)
    assert [trial.name for trial in found] == [
        "batch-512+no-diagonal",
        "batch-512+top-10",
        "no-diagonal+top-10",
        "batch-512+no-diagonal+top-10",
        "batch-512+no-diagonal+one-list+top-10",
    ]
    clip = SEARCH.reference(found[-1], SEARCH.rounds[0], 0, VALIDATION)
    assert clip.changes == (("--batch-size", "512"),)
    assert combine([BY_NAME["top-10"]], 3) == []


# --- trainings ---

FOUR_EPOCHS = Round(4, (7,))


def parsed(attempt):
    return parse_args(attempt.job().command("pairs.csv", "name", device="cpu", workers=0)[3:])


def loss_of(args):
    """Build the loss as the trainer does."""
    args.rank, args.world_size, args.distill = 0, 1, args.distill_model is not None  # what its main sets
    return open_clip_train.main.create_loss(args)


def test_the_trainer_takes_every_combination_of_two():
    for one, other in itertools.combinations(TRIALS[1:], 2):
        if one.factor != other.factor:
            loss_of(parsed(SEARCH.attempt(one + other, FOUR_EPOCHS, 0, VALIDATION)))


@pytest.mark.parametrize(
    ("one", "trial"),
    [(one, trial) for one in (SEARCH, QUESTION, TEACHER) for tries in one.arms.values() for trial in tries],
    ids=lambda value: value.name,
)
def test_the_trainer_takes_every_try(one, trial, tmp_path, monkeypatch):
    """Parsed where the teacher's files are; and its loss is built."""
    monkeypatch.chdir(tmp_path)
    texts = Path(trials.teacher_folder(TEACHER.teacher)) / f"texts-{TEACHER.grid.pairs}.npz"
    texts.parent.mkdir(parents=True)
    np.savez(texts, text_features=np.eye(4, dtype=np.float32))
    attempt = one.attempt(trial, FOUR_EPOCHS, 7, VALIDATION)
    args = parsed(attempt)
    for flag, value in trial.changes:
        taken = getattr(args, flag.lstrip("-").replace("-", "_"))
        assert taken == type(taken)(value)
    assert (args.loss, args.seed, args.epochs, args.batch_size) == (trial.loss, 7, 4, attempt.batch_size)
    assert trial.loss == "clip" or args.rankclip_schedule_unit == "step"
    loss = loss_of(args)
    assert args.distill == (one == TEACHER and trial.factor not in ("own-ranks", "teachers-texts"))
    assert (type(loss).__name__ == "DistillClipLoss") == (trial.factor == "distillation")
    base = parsed(one.reference(trial, FOUR_EPOCHS, 7, VALIDATION))
    assert (base.loss, base.seed, base.epochs) == ("clip", 7, 4)
    assert (base.batch_size, base.warmup) == (args.batch_size, args.warmup)


def test_the_recipe_is_plain_rankclip_as_the_grid_trains_it():
    plain = grid.Setting("rankclip", "resnet", grid.PRESETS["full"].pairs, 1.0, 1.0, 3, "full")
    assert vars(parsed(SEARCH.attempt(RECIPE, FOUR_EPOCHS, 3, TEST))) == vars(parsed(plain))
    clip = dataclasses.replace(plain, loss="clip", lambda_cross=0.0, lambda_in=0.0)
    assert SEARCH.reference(RECIPE, FOUR_EPOCHS, 3, TEST).job() == clip.job()


@every
def test_every_batch_size_sees_the_same_pairs(one):
    for trial, part in itertools.product(itertools.chain(*one.arms.values()), one.rounds):
        found = one.attempt(trial, part, 0, VALIDATION)
        assert found.steps * found.batch_size == found.pairs * part.epochs
        assert 0 < round(found.steps * one.grid.warmup / one.grid.steps) < found.steps


def test_keys_follow_the_teacher(monkeypatch):
    quick = load("teacher", "quick")
    attempts = quick.attempts(quick.arms["top-ranks"], quick.confirmation, TEST)
    other = dataclasses.replace(quick.teacher, epochs=2)
    assert trials.teacher_folder(other) != trials.teacher_folder(quick.teacher)
    before = {key_of(one, "data") for one in attempts}
    monkeypatch.setitem(
        trials.SIZES, "teacher-quick", dataclasses.replace(trials.SIZES["teacher-quick"], teacher=other)
    )
    assert not {key_of(one, "data") for one in attempts} & before  # CLIP's agreement with it is measured, too


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


@given(seed=st.integers(0, 10**6), order=st.randoms())
def test_the_order_of_settings_and_records_makes_no_difference(seed, order):
    shuffled = list(SMALL.arms[SETTING])
    order.shuffle(shuffled)
    find, other = by_chance(seed), dataclasses.replace(SMALL, arms={SETTING: tuple(shuffled)})
    first = climb(SMALL, SETTING, find)
    second = climb(other, SETTING, lambda needed: dict(reversed(find(needed).items())))
    assert [step.standings for step in first] == [step.standings for step in second]


@given(seed=st.integers(0, 10**6), at_a_time=st.integers(1, 25))
@settings(max_examples=25)
def test_it_goes_on_from_what_there_is(seed, at_a_time):
    there, made, whole = {}, [], by_chance(seed)

    def find(needed):
        return {one: there[one] for one in needed if one in there}

    while due := (now := progress(SMALL, find)).due:
        assert now.winners == {}
        assert now.steps[SETTING][-1].standings == ()
        made += due[:at_a_time]
        there.update(whole(due[:at_a_time]))
    assert len(set(made)) == len(made)
    assert now == progress(SMALL, whole)


def test_what_helped_is_the_best_level_of_each_factor_above_the_recipe():
    effects = {"recipe": 1, "lambda-x4": 4, "lambda-x16": 3, "top-10": 2, "one-list": 0.5}
    tried = [BY_NAME[name] for name in effects]
    one = Round(1, (0, 1))
    records = study_records(effects=effects, noise=0)(SEARCH.attempts(tried, one, VALIDATION))
    standings = stand(SEARCH, tried, one, records)
    assert [s.worth for s in standings] == pytest.approx([4, 3, 2, 1, 0.5])
    assert [trial.name for trial in helped(standings)] == ["lambda-x4", "top-10"]


def test_differences_are_paired_by_seed_and_batch_size():
    trial, one = BY_NAME["batch-512"], Round(1, (0, 1, 2, 3))
    wanted = SEARCH.attempts([RECIPE, trial], one, VALIDATION)
    records = study_records()(wanted)
    assert len({key_of(a, "data") for a in records}) == 16
    found = {s.trial: s for s in stand(SEARCH, [RECIPE, trial], one, records)}
    for which, clip in ((RECIPE, "clip"), (trial, "clip-batch-size-512")):
        values = [
            [SCORES[OBJECTIVE](records[a]) for a in wanted if a.trial == name] for name in (which.name, clip)
        ]
        test = stats.ttest_rel(*values)
        difference = found[which].differences[OBJECTIVE]
        assert difference.p == pytest.approx(test.pvalue)
        assert (difference.low, difference.high) == pytest.approx(tuple(test.confidence_interval()))
        assert found[which].clip.mean == pytest.approx(np.mean(values[1]))
    with pytest.raises(ValueError, match=r"plain CLIP, which \S+ is compared with, diverged"):
        stand(SEARCH, [RECIPE, trial], one, study_records(lost=("clip",))(wanted))


def test_the_objective_is_half_recall_and_half_zero_shot():
    recall = {"image_to_text R@10": 10.0, "text_to_image R@10": 14.0, "image_to_text R@1": 99.0}
    classes = {"zero-shot/a": {"top-1": 30.0}, "zero-shot/b": {"top-1": 10.0}, "zero-shot/noto": {"top-1": 9}}
    items = {"retrieval": 7, "zero-shot/a": 30, "zero-shot/b": 10, "zero-shot/noto": 50}
    record = {"metrics": {"retrieval": recall, **classes}, "items": items}
    assert objective.recall_at_10(record) == 12
    assert objective.zero_shot(record) == pytest.approx((30 * 30 + 10 * 10) / 40)  # not of the shift
    assert SCORES["zero-shot top-1, mean of sets"](record) == 20
    assert SCORES[OBJECTIVE](record) == pytest.approx((12 + 25) / 2)


def test_what_is_due_is_a_round_of_every_arm_and_plain_clip_once():
    due = progress(TEACHER, lambda _: {}).due
    assert len(due) == sum(map(len, TEACHER.arms.values())) + 1
    assert sum(one.trial == REFERENCE for one in due) == 1


def test_every_arm_selects_its_best_try_and_all_are_confirmed_with_the_same_seeds():
    best = {arm: tries[-1].name for arm, tries in TEACHER.arms.items()}
    now = progress(TEACHER, study_records(effects=dict.fromkeys(best.values(), 3.0)))
    assert {arm: trial.name for arm, trial in now.winners.items()} == best
    assert not now.due
    wanted = needed(TEACHER, now.winners)
    assert len(wanted) == len(set(wanted)) == (len(best) + 1) * len(TEACHER.confirmation.seeds)
    assert {one.side for one in wanted} == {TEST}
    assert {a.side for steps in now.steps.values() for step in steps for a in step.attempts} == {VALIDATION}


# --- the confirmation ---

ONE, OTHER = TRIALS[2], TRIALS[8]


def test_the_recipe_goes_along_with_what_is_confirmed():
    wanted = needed(SEARCH, {SETTING: ONE})
    assert {one.side for one in wanted} == {TEST}
    assert {one.trial for one in wanted} == {"clip", "recipe", ONE.name}
    assert {one.trial for one in needed(SEARCH, {SETTING: RECIPE})} == {"clip", "recipe"}


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
    del (line := json.loads(before))["loss"]
    path.write_text(json.dumps({**line, "number": 1}) + "\n")  # as earlier releases wrote it
    declare(QUICK, {SETTING: ONE}, tmp_path, record=True)


def test_what_the_repository_declares_is_what_its_records_lead_to():
    find = study_records()  # the rounds' records lead elsewhere
    with pytest.raises(SecondConfirmationError, match="was used to confirm batch-128"):
        declare(SEARCH, progress(SEARCH, find).winners, study.RESULTS / "search", record=False)
    declare(SEARCH, {SETTING: BY_NAME["batch-128"]}, study.RESULTS / "search", record=False)


@pytest.mark.parametrize("text", ["x\n", "{}\n", "[]\n", '{"number": 2}\n', '{"trial": "a"}\n'])
def test_a_damaged_or_second_declaration_stops_everything(tmp_path, text):
    declare(QUICK, {SETTING: ONE}, tmp_path, record=True)
    path = tmp_path / SETTING / "confirmations.jsonl"
    path.write_text(path.read_text() + text)
    with pytest.raises(ValueError, match=r"confirmations\.jsonl: one line is needed"):
        declare(QUICK, {SETTING: ONE}, tmp_path, record=True)


@pytest.mark.parametrize("one", [SEARCH, QUESTION, TEACHER], ids=lambda one: one.name)
def test_the_outcome_is_the_paired_test_of_the_studys_score(one):
    """Of all of them for the arms; what includes the recipe that goes along is secondary."""
    winners = {arm: tries[-1] for arm, tries in one.arms.items()}
    names = {arm: trial.name for arm, trial in winners.items()} | {"recipe": "recipe"}
    find = study_records(effects={"rankclip-recipe": 0.3})
    found = outcome(one, winners, find)
    records = find(needed(one, winners))
    others = [*one.arms, *one.along]
    pairs = {(arm, REFERENCE) for arm in others} | {(arm, one.rival) for arm in others if one.rival}
    pairs -= {(one.rival, one.rival)}
    assert found.tests.keys() == {pair for pair in pairs if "recipe" not in pair}

    def expected(arm, other, score):
        trial = winners.get(arm, RECIPE)
        clip = one.reference(trial, one.confirmation, 0, TEST).trial
        by_seed = {(a.trial, a.seed): score(record) for a, record in records.items()}
        base = clip if other == REFERENCE else names[other]
        both = [(by_seed[names[arm], s], by_seed[base, s]) for s in one.confirmation.seeds]
        return stats.ttest_rel(*zip(*both, strict=True)).pvalue, np.mean([a - b for a, b in both])

    for pair, d in found.tests.items():
        assert (d.p, d.mean) == pytest.approx(expected(*pair, SCORES[one.score]))
        assert d.adjusted == d.p if len(found.tests) == 1 else d.adjusted >= d.p
    if one == SEARCH:
        assert found.others.keys() | {((SETTING, REFERENCE), OBJECTIVE)} == set(
            itertools.product(pairs, SCORES)
        )
        for (pair, name), d in found.others.items():
            assert (d.p, d.mean) == pytest.approx(expected(*pair, SCORES[name]))
    assert all(d.adjusted is None or d.adjusted >= d.p for d in found.others.values())


def test_the_recipe_is_not_compared_with_itself():
    found = outcome(SEARCH, {SETTING: RECIPE}, study_records())
    assert {pair for pair, _ in found.others} == {(SETTING, REFERENCE)}


def test_nothing_is_concluded_while_a_record_is_missing_and_a_lost_arm_is_in_no_test():
    winners = {arm: tries[0] for arm, tries in TEACHER.arms.items()}
    assert outcome(TEACHER, winners, study_records(missing=["test-8ep-clip-seed2007"])) is None
    found = outcome(TEACHER, winners, study_records(lost=(winners["top-one"].name,)))
    assert found.comparison.lost == ["top-one"]
    assert not any("top-one" in pair for pair in found.tests)
    assert len(found.tests) == (len(winners) - 1) + (len(winners) - 2)
