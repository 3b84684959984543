"""The search for a stronger setting: what is tried, who continues, what is looked at, what may be said."""

import dataclasses
import itertools
import random

import numpy as np
import open_clip_train.main
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from miniature_icons import write_icons
from miniature_paper import grid, runs, wording
from miniature_paper.records import Store
from miniature_paper.runs import key_of
from miniature_paper.search import command, objective, report
from miniature_paper.search.confirmation import WITH_CLIP, Declarations, SecondConfirmationError, confirm
from miniature_paper.search.ladder import climb, helped, stand, tried, winner
from miniature_paper.search.objective import OBJECTIVE
from miniature_paper.search.trials import (
    RECIPE,
    SEARCHES,
    TEST,
    TRIALS,
    VALIDATION,
    Attempt,
    Round,
    Trial,
    attempt,
    attempts,
    combine,
    reference,
)
from miniature_records import fake_trainings
from scipy import stats

import rankloss

FULL, QUICK = SEARCHES["full"], SEARCHES["quick"]
searches = pytest.mark.parametrize("search", SEARCHES.values(), ids=lambda search: search.name)


def _record(one, score=None, diverged=False):
    """A record whose objective is ``score``, by default noise that the attempt's name decides."""
    rng = random.Random(one.name)
    level, tilt = 20 + rng.gauss(0, 1) if score is None else score, rng.gauss(0, 0.3)
    found = {"setting": dataclasses.asdict(one), "diverged": diverged, "metrics": {}, "items": {}}
    if not diverged:
        recall = {f"{way} R@10": level + tilt for way in ("image_to_text", "text_to_image")}
        classes = {f"zero-shot/{name}": {"top-1": level - tilt} for name in ("mdi", "solar")}
        found["metrics"] = {"retrieval": recall, **classes}
        found["items"] = {"retrieval": 2000, "zero-shot/mdi": 150, "zero-shot/solar": 50}
    rest = {"chance": {}, "seconds": {"training": 100.0}, "conditions": {"cpu": "A", "rankloss": "0.2.0"}}
    return {**found, **rest}


def _all(needed):
    return {one: _record(one) for one in needed}


# --- what is tried ---


def _parsed(job):
    from open_clip_train.params import parse_args

    return parse_args(job.command("pairs.csv", "name", device="cpu", workers=0)[3:])


def _loss(args):
    """Build the loss as the trainer does."""
    args.rank, args.world_size, args.distill = 0, 1, False  # what its main sets
    return open_clip_train.main.create_loss(args)


def test_the_trainer_takes_every_combination_of_two():
    for one, other in itertools.combinations(TRIALS[1:], 2):
        if one.factor != other.factor:
            _loss(_parsed(attempt(FULL, one + other, 1, 0, VALIDATION).job()))


@pytest.mark.parametrize("trial", TRIALS, ids=lambda trial: trial.name)
def test_the_trainer_takes_every_setting(trial):
    one = attempt(FULL, trial, 4, 7, VALIDATION)
    args = _parsed(one.job())
    for flag, value in trial.changes:
        taken = getattr(args, flag.lstrip("-").replace("-", "_"))
        assert taken == type(taken)(value)
    assert (args.loss, args.seed, args.epochs, args.batch_size) == ("rankclip", 7, 4, one.batch_size)
    assert args.rankclip_schedule_unit == "step"
    _loss(args)
    base = _parsed(reference(FULL, trial, 4, 7, VALIDATION).job())
    assert (base.loss, base.seed, base.epochs) == ("clip", 7, 4)
    assert (base.batch_size, base.warmup) == (args.batch_size, args.warmup)


def test_the_recipe_is_plain_rankclip_as_the_grid_trains_it():
    preset = grid.PRESETS["full"]
    plain = grid.Setting("rankclip", "resnet", preset.pairs, 1.0, 1.0, 3, "full")
    ours, theirs = _parsed(attempt(FULL, RECIPE, 4, 3, TEST).job()), _parsed(plain.job())
    assert vars(ours) == vars(theirs)
    clip = dataclasses.replace(plain, loss="clip", lambda_cross=0.0, lambda_in=0.0)
    assert reference(FULL, RECIPE, 4, 3, TEST).job() == clip.job()


@searches
def test_every_batch_size_sees_the_same_pairs(search):
    for trial, one in itertools.product(search.trials, search.rounds):
        found = attempt(search, trial, one.epochs, 0, VALIDATION)
        assert found.steps * found.batch_size == found.pairs * one.epochs
        assert _parsed(found.job()).warmup < found.steps


@searches
def test_no_seed_serves_twice(search):
    used = [*(one.seeds for one in search.rounds), *map(search.confirmation_seeds, (1, 2, 3))]
    used.append(range(search.grid.seeds))  # those of the tables, which were looked at
    seeds = list(itertools.chain(*used))
    assert len(set(seeds)) == len(seeds)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"rounds": (Round(1, (10,), 2), Round(2, (10,), 1))},
            "rounds, confirmation: no seed may serve twice",
        ),
        ({"trials": QUICK.trials[1:]}, "trials: the recipe must be among them"),
        ({"rounds": (Round(1, (10,), 2),)}, "rounds: none may keep more"),
    ],
    ids=["seed", "recipe", "keep"],
)
def test_a_search_that_would_mislead_is_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        dataclasses.replace(QUICK, **changes)


def test_levels_of_one_factor_are_not_combined():
    by_name = {trial.name: trial for trial in TRIALS}
    with pytest.raises(ValueError, match="lambda-x4 and lambda-x16 change the same argument"):
        by_name["lambda-x4"] + by_name["lambda-x16"]
    found = combine([by_name[name] for name in ("top-10", "batch-512", "no-diagonal", "one-list")], 3)
    assert [trial.name for trial in found] == [
        "batch-512+no-diagonal",
        "batch-512+top-10",
        "no-diagonal+top-10",
        "batch-512+no-diagonal+top-10",
        "batch-512+no-diagonal+one-list+top-10",
    ]
    assert reference(FULL, found[-1], 1, 0, VALIDATION).changes == (("--batch-size", "512"),)
    assert combine([by_name["top-10"]], 3) == []


# --- the ladder ---

_SMALL = dataclasses.replace(
    QUICK, trials=TRIALS[:9], rounds=(Round(1, (10, 11), 3), Round(1, (20, 21), 2), Round(2, (30, 31, 32), 1))
)


def _find(seed, lost=()):
    """Records by chance, in an order by chance; ``lost`` names trials that diverge."""

    def find(needed):
        scores = {one: 20 + random.Random(f"{seed}{one.name}").gauss(0, 1) for one in needed}
        made = [(one, _record(one, score, one.trial in lost)) for one, score in scores.items()]
        random.Random(seed).shuffle(made)
        return dict(made)

    return find


@given(seed=st.integers(0, 10**6), lost=st.sets(st.sampled_from([t.name for t in TRIALS[1:9]]), max_size=4))
def test_the_winner_is_not_below_what_it_beat(seed, lost):
    steps = climb(_SMALL, _find(seed, lost))
    best = winner(_SMALL, steps)
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
    shuffled = list(_SMALL.trials)
    order.shuffle(shuffled)
    find, other = _find(seed), dataclasses.replace(_SMALL, trials=tuple(shuffled))
    first, second = climb(_SMALL, find), climb(other, lambda needed: dict(reversed(find(needed).items())))
    assert [step.standings for step in first] == [step.standings for step in second]


@given(seed=st.integers(0, 10**6), at_a_time=st.integers(1, 25))
@settings(max_examples=25)
def test_it_goes_on_from_what_there_is(seed, at_a_time):
    there, made, whole = {}, [], _find(seed)

    def find(needed):
        return {one: there[one] for one in needed if one in there}

    while winner(_SMALL, steps := climb(_SMALL, find)) is None:
        assert steps[-1].standings == ()
        todo = steps[-1].missing[:at_a_time]
        made += todo
        there.update(whole(todo))
    assert len(set(made)) == len(made)
    assert steps == climb(_SMALL, whole)


def test_what_helped_is_the_best_level_of_each_factor_above_the_recipe():
    scores = {"recipe": 21, "lambda-x4": 24, "lambda-x16": 23, "top-10": 22, "one-list": 20.5, "clip": 20}
    trials = [trial for trial in TRIALS if trial.name in scores]
    one = Round(1, (0, 1), 1)
    records = {a: _record(a, scores[a.trial]) for a in attempts(FULL, trials, 1, one.seeds, VALIDATION)}
    standings = stand(FULL, trials, one, VALIDATION, records)
    assert [s.worth for s in standings] == pytest.approx([4, 3, 2, 1, 0.5])
    assert [trial.name for trial in helped(standings)] == ["lambda-x4", "top-10"]


def test_differences_are_paired_by_seed_and_batch_size():
    trial = next(t for t in TRIALS if t.name == "batch-512")
    one = Round(1, (0, 1, 2, 3), 1)
    needed = attempts(FULL, [RECIPE, trial], 1, one.seeds, VALIDATION)
    records = _all(needed)
    assert len({key_of(a, "data") for a in records}) == 16
    found = {s.trial: s for s in stand(FULL, [RECIPE, trial], one, VALIDATION, records)}
    for which, clip in ((RECIPE, "clip"), (trial, "clip-batch-size-512")):
        values = [
            [objective.objective(records[a]) for a in needed if a.trial == name]
            for name in (which.name, clip)
        ]
        test = stats.ttest_rel(*values)
        difference = found[which].differences[OBJECTIVE]
        assert difference.p == pytest.approx(test.pvalue)
        assert (difference.low, difference.high) == pytest.approx(tuple(test.confidence_interval()))
    lost = {a: _record(a, diverged=a.loss == "clip") for a in needed}
    with pytest.raises(ValueError, match=r"plain CLIP, which \S+ is compared with, diverged"):
        stand(FULL, [RECIPE, trial], one, VALIDATION, lost)


def test_the_objective_is_half_recall_and_half_zero_shot():
    recall = {"image_to_text R@10": 10.0, "text_to_image R@10": 14.0, "image_to_text R@1": 99.0}
    classes = {"zero-shot/a": {"top-1": 30.0}, "zero-shot/b": {"top-1": 10.0}}
    items = {"retrieval": 7, "zero-shot/a": 30, "zero-shot/b": 10}
    record = {"metrics": {"retrieval": recall, **classes}, "items": items}
    assert objective.recall_at_10(record) == 12
    assert objective.zero_shot(record) == pytest.approx((30 * 30 + 10 * 10) / 40)
    assert objective.zero_shot_of_sets(record) == 20
    assert objective.objective(record) == pytest.approx((12 + 25) / 2)


# --- the confirmation ---

ONE, OTHER = TRIALS[2], TRIALS[8]


def test_a_second_confirmation_is_refused(tmp_path):
    declarations = Declarations(tmp_path)
    assert declarations.all() == []
    first = declarations.declare(QUICK, ONE, lambda _: {})
    assert first.seeds == QUICK.confirmation.seeds
    said = f"was used to confirm {ONE.name}; confirming {OTHER.name}"
    for find in (lambda _: {}, _all):  # in the middle of it, and afterwards
        assert declarations.declare(QUICK, ONE, find) == first
        with pytest.raises(SecondConfirmationError, match=said):
            declarations.declare(QUICK, OTHER, find)
    assert declarations.all() == [first]
    # What is not finished is finished first, so that nobody draws seeds until they please.
    assert declarations.declare(QUICK, ONE, lambda _: {}, again=True) == first
    second = declarations.declare(QUICK, OTHER, _all, again=True)
    third = declarations.declare(QUICK, OTHER, _all, again=True)
    assert declarations.all() == [first, second, third]
    assert len({*first.seeds, *second.seeds, *third.seeds}) == 3 * len(first.seeds)
    assert {one.side for one in first.attempts(QUICK)} == {TEST}
    assert {one.trial for one in first.attempts(QUICK)} == {"clip", "recipe", ONE.name}


@pytest.mark.parametrize("text", ["x\n", "{}\n", "[]\n", '{"number": 2}\n', ""])
def test_a_damaged_or_lost_declaration_stops_everything(tmp_path, text):
    declarations = Declarations(tmp_path)
    for _ in range(2):
        declarations.declare(QUICK, ONE, _all, again=True)
    path = tmp_path / "confirmations.jsonl"
    path.write_text(text + path.read_text().partition("\n")[2])
    with pytest.raises(ValueError, match=r"confirmations\.jsonl(, line 1|: declaration 1 is missing)"):
        declarations.declare(QUICK, ONE, _all)


def _confirmed(tmp_path, effect, noise=0.1, trial=ONE):
    """A confirmation whose setting is ``effect`` points above plain CLIP, the recipe level with it."""
    declaration = Declarations(tmp_path).declare(FULL, trial, _all)

    def score(one):
        return 20 + effect * (one.trial == trial.name) + random.Random(one.name).gauss(0, noise)

    return confirm(FULL, declaration, lambda needed: {one: _record(one, score(one)) for one in needed})


@pytest.mark.parametrize(
    ("effect", "noise", "said", "mark"),
    [(2.0, 0.1, "Confirmed", "▲"), (-2.0, 0.1, "Contradicted", "▼"), (0.0, 1.0, "Not confirmed", "≈")],
)
def test_the_verdict_claims_what_the_interval_supports(tmp_path, no_picture, effect, noise, said, mark):
    found = _confirmed(tmp_path, effect, noise)
    low, high = found.primary.low, found.primary.high
    assert said == ("Confirmed" if low > 0 else "Contradicted" if high < 0 else "Not confirmed")
    assert f"**{said}: " in _page(tmp_path, [found])
    assert found.primary.adjusted == found.primary.p
    assert (WITH_CLIP, OBJECTIVE) not in found.others  # the one test is not corrected for the others
    assert len(found.others) == 11
    assert wording.mark(found.against_recipe) == mark


def test_the_recipe_is_not_compared_with_itself(tmp_path):
    assert _confirmed(tmp_path, 0.0, trial=RECIPE).against_recipe is None


def test_an_unfinished_confirmation_and_one_that_diverged_claim_nothing(tmp_path, no_picture):
    declaration = Declarations(tmp_path).declare(FULL, ONE, _all)
    found = confirm(FULL, declaration, lambda needed: _all(needed[:5]))
    assert found.missing == 3 * len(FULL.confirmation.seeds) - 5  # the setting, the recipe and plain CLIP
    assert "Confirmed" not in _page(tmp_path, [found])
    lost = {a: _record(a, diverged=a.trial == ONE.name) for a in declaration.attempts(FULL)}
    lost = confirm(FULL, declaration, lambda needed: lost)
    assert lost.primary is None
    assert f"trained with `{ONE.name}`, a model diverged" in _page(tmp_path, [lost])


# --- the report and the command ---


@pytest.fixture
def no_picture(monkeypatch):
    """For what is not about it: drawing takes seconds."""
    monkeypatch.setattr(report.figure, "draw", lambda steps: None)


def _page(folder, confirmations=(), find=_all):
    page = report.write(FULL, climb(FULL, find), confirmations, folder, find=find, command="the command")
    return page.with_suffix(".md").read_text(encoding="utf-8")


def test_the_report_names_every_setting(tmp_path, no_picture):
    text, trials = _page(tmp_path), tried(climb(FULL, _all))
    assert len(trials) > len(TRIALS)
    assert f"the best of {len(trials)} settings" in text
    assert all(f"`{trial.name}`" in text for trial in trials)
    assert _page(tmp_path) == text
    n = len(climb(FULL, lambda needed: _all(needed[:-1]))[-1].attempts)
    assert f"{n - 1} of {n} trainings" in _page(tmp_path, find=lambda needed: _all(needed[:-1]))


@pytest.mark.parametrize("name", ["top-10", "top-50", "log-discount", "batch-512"])
def test_the_share_of_the_weight_is_that_of_the_loss_itself(name):
    """Σμ/N, read off the loss of a list in which every item but the last costs the same."""
    trial = next(trial for trial in TRIALS if trial.name == name)
    flags = dict(trial.changes)
    n = int(flags.get("--batch-size", FULL.grid.batch_size))
    options = {"top_k": int(flags.get("--rankclip-top-k", n)), "discount": flags.get("--rankclip-discount")}
    # Every item is twice as likely as all that follow it together.
    scores = np.log(np.append(2 * 3.0 ** np.arange(n - 1)[::-1], 1.0))
    nll = rankloss.reference.plackett_luce_nll(scores, np.arange(n)[::-1], **options)
    last = (1.0 if options["discount"] is None else 1 / np.log(1 + n)) if options["top_k"] == n else 0.0
    assert nll / np.log(1.5) / n == pytest.approx(report.weight(FULL, trial) - last / n)
    assert trial.counts_fewer == (name != "batch-512")


def test_old_records_of_such_settings_are_pointed_out(tmp_path, no_picture):
    def old(needed):
        return {one: {**record, "conditions": {"rankloss": "0.1.0"}} for one, record in _all(needed).items()}

    assert report.lighter_weights(FULL, climb(FULL, _all), _all) == {}
    found = report.lighter_weights(FULL, climb(FULL, old), old)
    assert (round(found["top-10"], 3), round(found["log-discount"], 3)) == (0.039, 0.236)
    assert "one-list" not in found
    assert "`top-10` 0.039" in _page(tmp_path, find=old)


@pytest.fixture
def faked(monkeypatch):
    return fake_trainings(monkeypatch, command, _record)


def test_the_command_searches_and_confirms(faked, tmp_path, capsys):
    made, _ = faked
    text = tmp_path / "quick" / "report" / "search.md"
    line = ["--output", str(tmp_path)]
    assert command.main(line) == 0
    assert {one.side for one in made} == {VALIDATION}
    assert (text.parent / "figures" / "search.png").stat().st_size > 1000
    found = len(made)
    assert command.main([*line, "--confirm"]) == 0
    assert {one.side for one in made[found:]} == {TEST}
    page = text.read_text(encoding="utf-8")
    assert "## Confirmation: " in page
    found = len(made)
    assert command.main([*line, "--confirm"]) == 0  # nothing is left to do
    assert command.main([*line, "--report-only"]) == 0
    assert len(made) == found
    assert text.read_text(encoding="utf-8") == page
    assert command.main([*line, "--confirm", "--again"]) == 0
    assert len(made) > found
    assert "The test side was used for 2 confirmations" in text.read_text(encoding="utf-8")
    # A report on half of the records might name another winner.
    store = Store(tmp_path / "quick" / "results" / "search")
    store.save("a second record", _record(made[0]))
    assert command.main([*line, "--report-only"]) == 1
    assert "are of one setting" in capsys.readouterr().out


def test_a_failure_ends_the_round_and_the_command_goes_on(faked, tmp_path, capsys):
    made, broken = faked
    broken.add(attempt(QUICK, RECIPE, 1, 10, VALIDATION).name)
    assert command.main(["--output", str(tmp_path), "--confirm"]) == 1
    assert len(made) == 6
    assert "out of luck" in capsys.readouterr().out
    broken.clear()
    assert command.main(["--output", str(tmp_path), "--confirm"]) == 0
    assert len(set(made)) == len(made)


@pytest.mark.slow
def test_a_setting_is_trained_by_the_real_trainer_and_measured(tmp_path):
    write_icons(tmp_path / "icons", train=4200, validation=40, test=60)
    line = ["--output", str(tmp_path / "out"), "--icons", str(tmp_path / "icons"), "--device", "cpu"]
    made = command.prepare(command.parse([*line, "--jobs", "1"]), QUICK.grid.sizes, runs.Console(quiet=True))
    changes = (("--batch-size", "512"), ("--rankclip-diagonal", "exclude"))
    trial = Trial("batch-512+no-diagonal", "both", changes)
    needed = [make(QUICK, trial, 1, 10, VALIDATION) for make in (attempt, reference)]
    assert made.find(needed) == {}
    assert made.do("both", needed, runs.Console(quiet=True))
    found = made.find(needed)
    assert found == command.stored(made.store, needed)
    for wanted, record in found.items():
        assert Attempt.of_record(record["setting"]) == wanted
        assert not record["diverged"]
        assert 0 <= objective.objective(record) <= 100
        assert record["items"]["retrieval"] == 40
    assert made.store.path.stat().st_size < 8000
    assert not list((tmp_path / "out" / "runs").iterdir())
    assert stand(QUICK, [trial], Round(1, (10,), 1), VALIDATION, found)[0].differences[OBJECTIVE].n == 1
