"""Studies: plans that are fixed, arms with equally many tries, a teacher, and what may be concluded."""

from __future__ import annotations

import dataclasses
import json
import random
import re
from pathlib import Path

import numpy as np
import open_clip_train.main
import pytest
import torch
from miniature_icons import write_icons
from miniature_paper import measure
from miniature_paper.records import Store
from miniature_paper.runs import key_of
from miniature_paper.search import study, study_command, study_report
from miniature_paper.search.confirmation import SecondConfirmationError
from miniature_paper.search.objective import SCORES
from miniature_paper.search.study import SIZE_NAMES, STUDIES, Spread, load
from miniature_paper.search.trials import REFERENCE, TEST, VALIDATION, Attempt
from miniature_records import fake_trainings
from scipy import stats

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "miniature"
QUESTION, TEACHER, QUICK = load("question", "full"), load("teacher", "full"), load("teacher", "quick")
EVERY = [load(name, size) for name in STUDIES for size in SIZE_NAMES]


def _record(one, effects=None, noise=0.1, lost=()):
    """A record whose scores are what its seed gives, noise of its own, and its trial's effect."""
    level = 20 + random.Random(one.seed).gauss(0, 1) + random.Random(one.name).gauss(0, noise)
    level += (effects or {}).get(one.trial, 0.0)
    ways = ("image_to_text", "text_to_image")
    recall = {f"{way} R@{k}": level for way in ways for k in (1, 5, 10)}
    metrics = {"retrieval/test" if one.whole else "retrieval": recall, "zero-shot/mdi": {"top-1": level}}
    if one.whole:
        metrics |= {
            "zero-shot/noto": {"top-1": 99.0},
            "teacher/test": {"cross_modal_tau": 0.1, "in_modal_tau": 0.2},
        }
    return {
        "setting": dataclasses.asdict(one),
        "metrics": metrics,
        "items": dict.fromkeys(metrics, 100),
        "chance": {},
        "diverged": one.trial in lost,
        "seconds": {"training": 100.0},
        "conditions": {"cpu": "A"},
    }


def _find(**options):
    return lambda needed: {one: _record(one, **options) for one in needed}


def _nothing(needed):
    return {}


# --- plans ---


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
    attempts = study.needed(QUESTION, study.standing(QUESTION, _nothing).winners)
    assert f"all {len(attempts)} models" in text
    assert (QUESTION.score, QUESTION.arms["rankclip"].trials[0].changes) == ("R@10, both ways", ())
    size = QUESTION.grid
    assert f"pairs ({size.pairs:,}), steps ({size.steps:,} of {size.batch_size})" in text


def test_a_plan_whose_records_are_gone_is_refused():
    with pytest.raises(ValueError, match="seed 77, which a plan rests on, has no pair of records"):
        study.earlier_spread((77,), (), 0.2, 0.9)


@pytest.mark.parametrize("one", EVERY, ids=lambda one: f"{one.name}-{one.size}")
def test_arms_have_equally_many_tries_and_seeds_serve_once(one):
    assert len({len(search.trials) for search in one.arms.values()}) == 1
    names = [trial.name for search in one.arms.values() for trial in search.trials]
    assert len(set(names)) == len(names)
    seeds = [
        seed for part in (*next(iter(one.arms.values())).rounds, one.confirmation) for seed in part.seeds
    ]
    seeds += [one.teacher.seed] if one.teacher else []
    assert len(set(seeds)) == len(seeds)
    if one.name == "teacher" and one.size == "full":
        assert len(one.confirmation.seeds) >= 8


def test_unequal_arms_are_refused(monkeypatch):
    arms = {"one": {"a": {}}, "two": {"a": {}, "b": {"--rankclip-top-k": "2"}}}
    monkeypatch.setitem(study._CONTENT, "teacher", {**study._CONTENT["teacher"], "arms": arms})
    with pytest.raises(ValueError, match="every arm must have equally many tries"):
        load("teacher", "full")


def test_the_trainer_takes_every_try(tmp_path, monkeypatch):
    """Parsed where the teacher's files are; and its loss is built."""
    from open_clip_train.params import parse_args

    monkeypatch.chdir(tmp_path)
    texts = Path(study.teacher_folder(TEACHER.teacher)) / f"texts-{TEACHER.grid.pairs}.npz"
    texts.parent.mkdir(parents=True)
    np.savez(texts, text_features=np.eye(4, dtype=np.float32))
    for arm, search in TEACHER.arms.items():
        for trial in search.trials:
            one = study.attempts(search, [trial], 2, [910], VALIDATION)[1]
            args = parse_args(one.job().command("pairs.csv", "name", device="cpu", workers=0)[3:])
            args.rank, args.world_size, args.distill = 0, 1, args.distill_model is not None
            assert args.distill == (arm not in ("own-ranks", "teachers-texts"))
            loss = open_clip_train.main.create_loss(args)
            assert (type(loss).__name__ == "DistillClipLoss") == (arm == "distillation")


def test_keys_follow_the_teacher():
    first = study.attempts(QUICK.arms["top-ranks"], QUICK.arms["top-ranks"].trials, 1, [2000], TEST)
    other = dataclasses.replace(QUICK.teacher, epochs=2)
    assert study.teacher_folder(other) != study.teacher_folder(QUICK.teacher)
    before = [key_of(one, "data") for one in first]
    size = study.SIZES["teacher-quick"]
    try:
        study.SIZES["teacher-quick"] = dataclasses.replace(size, teacher="another")
        assert not {key_of(one, "data") for one in first} & {
            *before
        }  # CLIP's agreement with it is measured, too
    finally:
        study.SIZES["teacher-quick"] = size


# --- selection and outcome ---


def test_every_arm_selects_its_best_try_and_all_are_confirmed_with_the_same_seeds():
    best = {arm: search.trials[-1].name for arm, search in TEACHER.arms.items()}
    find = _find(effects=dict.fromkeys(best.values(), 3.0))
    now = study.standing(TEACHER, find)
    assert {arm: trial.name for arm, trial in now.winners.items()} == best
    assert not now.due
    wanted = study.needed(TEACHER, now.winners)
    assert len(wanted) == len(set(wanted)) == (len(best) + 1) * len(TEACHER.confirmation.seeds)
    assert {one.side for one in wanted} == {TEST}
    sides = {a.side for steps in now.steps.values() for step in steps for a in step.attempts}
    assert sides == {VALIDATION}


def test_what_is_due_is_a_round_of_every_arm_and_plain_clip_once():
    due = study.standing(TEACHER, _nothing).due
    tries = sum(len(search.trials) for search in TEACHER.arms.values())
    assert len(due) == tries + 1
    assert sum(one.trial == REFERENCE for one in due) == 1


def _winners(one):
    return {arm: search.trials[0] for arm, search in one.arms.items()}


def test_the_outcome_is_the_paired_test_of_the_study_s_score():
    winners, find = _winners(QUESTION), _find(effects={"rankclip-recipe": 0.3})
    found = study.outcome(QUESTION, winners, find)
    records = find(study.needed(QUESTION, winners))
    by_seed = {(one.trial, one.seed): SCORES[QUESTION.score](record) for one, record in records.items()}
    pairs = [(by_seed["rankclip-recipe", s], by_seed[REFERENCE, s]) for s in QUESTION.confirmation.seeds]
    test = stats.ttest_rel(*zip(*pairs, strict=True))
    d = found.tests["rankclip", REFERENCE]
    assert (d.p, d.mean) == pytest.approx((test.pvalue, np.mean([a - b for a, b in pairs])))
    assert d.adjusted == d.p


def test_nothing_is_concluded_while_a_record_is_missing_and_a_lost_arm_is_in_no_test():
    winners = _winners(TEACHER)
    assert study.outcome(TEACHER, winners, lambda needed: dict(list(_find()(needed).items())[:-1])) is None
    name = winners["top-one"].name
    found = study.outcome(TEACHER, winners, _find(lost=(name,)))
    assert found.lost == ("top-one",)
    assert not any("top-one" in pair for pair in found.tests)
    assert len(found.tests) == (len(winners) - 1) + (len(winners) - 2)


# --- the report ---


@pytest.fixture
def no_picture(monkeypatch):
    monkeypatch.setattr(study_report, "forest", lambda rows, label: None)


def _page(folder, one, find):
    return (
        study_report.write(one, folder, find=find, command="c").with_suffix(".md").read_text(encoding="utf-8")
    )


@pytest.mark.parametrize(
    ("effect", "noise", "said"),
    [
        (0.5, 0.1, "Confirmed"),
        (-0.5, 0.1, "Refuted"),
        (0.0, 1.0, "Bounded"),
        (None, 0.1, "Nothing is concluded"),
    ],
)
def test_the_question_is_answered_by_its_interval_alone(tmp_path, no_picture, effect, noise, said):
    whole = _find(effects={"rankclip-recipe": effect or 0.0}, noise=noise)
    find = whole if effect is not None else lambda needed: dict(list(whole(needed).items())[:-1])
    text = _page(tmp_path, QUESTION, find)
    assert re.findall(r"\*\*(Confirmed|Refuted|Bounded|Nothing is concluded|No answer)", text) == [said]
    assert ("points (95 % interval" in text) == (effect is not None)
    assert f"which asks for {len(QUESTION.confirmation.seeds)}" in text


@pytest.mark.parametrize("lost", ["rankclip-recipe", REFERENCE])
def test_a_model_that_diverged_leaves_the_question_open(tmp_path, no_picture, lost):
    text = _page(tmp_path, QUESTION, _find(lost=(lost,)))
    assert "**No answer: a model diverged.**" in text
    assert "points (95 % interval" not in text


def test_the_teacher_s_report_names_what_is_established(tmp_path):
    strong = TEACHER.arms["top-ranks"].trials[1].name
    text = _page(tmp_path, TEACHER, _find(effects={strong: 2.0}))
    assert re.search(r"\*\*Above plain CLIP in the objective.*: `top-ranks`\.\*\*", text)
    assert "**Above `distillation`, the trainer's own: `top-ranks`.**" in text
    assert f"`{strong}` (chosen)" in text
    assert "Agreement with the teacher, in-modal (τ)" in text
    assert (tmp_path / "figures" / "teacher.png").stat().st_size > 1000
    assert "**No arm is confirmed" in _page(tmp_path, TEACHER, _find(noise=1.0))
    assert "the tries are being selected" in _page(tmp_path, TEACHER, _nothing)


# --- the command ---


@pytest.fixture
def faked(monkeypatch):
    monkeypatch.setattr(study_command, "prepare_teacher", lambda *_: True)
    return fake_trainings(monkeypatch, study_command, _record)


@pytest.mark.parametrize("name", STUDIES)
def test_the_command_goes_on_after_a_failure_and_repeats_nothing(faked, tmp_path, capsys, name):
    made, broken = faked
    line = [name, "--output", str(tmp_path)]
    one = load(name, "quick")
    last = study.needed(one, _winners(one))[0]  # plain CLIP's first confirmation
    broken.add(last.name)
    assert study_command.main(line) == 1
    text = tmp_path / "quick" / "report" / f"{name}.md"
    assert "Nothing is concluded yet: 1 of" in text.read_text(encoding="utf-8")
    assert "out of luck" in capsys.readouterr().out
    broken.clear()
    before = len(made)
    assert study_command.main(line) == 0
    assert made[before:] == [last]
    assert study_command.main([*line, "--report-only"]) == 0
    assert len(made) == before + 1 == len(set(made))
    assert "Nothing is concluded" not in text.read_text(encoding="utf-8")


def test_another_winner_after_the_confirmation_began_is_refused(faked, tmp_path):
    assert study_command.main(["teacher", "--output", str(tmp_path)]) == 0
    results = tmp_path / "quick" / "results" / "teacher"
    now = study.standing(QUICK, study_command.finished(results))
    other = next(t for t in QUICK.arms["top-ranks"].trials if t != now.winners["top-ranks"])
    changed = dataclasses.replace(now, winners={**now.winners, "top-ranks": other})
    with pytest.raises(SecondConfirmationError, match=other.name):
        study.declare(QUICK, changed, results, _nothing)
    assert study.declare(QUICK, now, results, _nothing) == now.winners


@pytest.mark.parametrize("arguments", [["answer"], ["question", "--seeds", "3"], ["teacher", "--confirm"]])
def test_nothing_of_a_plan_can_be_set(capsys, arguments):
    with pytest.raises(SystemExit) as stopped:
        study_command.main(arguments)
    assert stopped.value.code == 2
    assert arguments[-1 if len(arguments) == 1 else 1] in capsys.readouterr().err.splitlines()[-1]


def test_agreement_with_a_teacher():
    torch.manual_seed(0)
    v, t = (torch.nn.functional.normalize(torch.randn(40, 8), dim=-1) for _ in range(2))
    same = measure.teacher_agreement((v, t), (v, t))
    assert same == pytest.approx({"cross_modal_tau": 1.0, "in_modal_tau": 1.0})
    against = measure.teacher_agreement((v, t), (-v, t))
    assert against["cross_modal_tau"] == pytest.approx(-1.0)
    assert against["in_modal_tau"] == pytest.approx(1.0)
    tau = np.mean([stats.kendalltau(a, b).statistic for a, b in zip((v @ t.T), (t @ v.T), strict=True)])
    mirrored = measure.teacher_agreement((v, t), (t, v))
    assert mirrored["cross_modal_tau"] == pytest.approx(tau, abs=1e-6)


def test_a_model_ranks_the_held_out_pairs_as_itself(icons, model):
    found = measure.measure(model, icons, QUICK.grid, figures=False, teacher=model)
    assert found["metrics"]["teacher/test"] == pytest.approx(
        {"cross_modal_tau": 1.0, "in_modal_tau": 1.0}, abs=0.01
    )
    assert found["items"]["teacher/test"] == found["items"]["geometry/test"]


@pytest.mark.slow
def test_a_teacher_is_trained_and_its_students_by_the_real_trainer(tmp_path):
    write_icons(tmp_path / "icons", train=4200, validation=40, test=60)
    line = [
        "teacher",
        "--output",
        str(tmp_path / "out"),
        "--icons",
        str(tmp_path / "icons"),
        "--device",
        "cpu",
    ]
    assert study_command.main(line) == 0
    store = Store(tmp_path / "out" / "quick" / "results" / "teacher")
    now = study.standing(QUICK, lambda needed: study_command.stored(store, needed))
    records = study_command.stored(store, study.needed(QUICK, now.winners))
    assert len({record["teacher"] for record in records.values()}) == 1
    for one, record in records.items():
        assert Attempt.of_record(record["setting"]) == one
        assert not record["diverged"]
        assert -1 <= record["metrics"]["teacher/test"]["in_modal_tau"] <= 1
        # What makes an arm: the teacher took part.
        terms = set(record["training"]["first"])
        assert ("distill_loss" in terms) == (one.loss == "clip" and one.trial != REFERENCE)
        assert ("in_modal_loss" in terms) == one.loss.startswith("rankclip")
    (teacher,) = store.of([QUICK.teacher])[0]
    assert teacher["metrics"]["retrieval/test"]
    folder = tmp_path / "out" / study.teacher_folder(QUICK.teacher)
    weights = {
        name: torch.load(Path(f"{folder}{name}") / "open_clip_pytorch_model.bin", weights_only=True)
        for name in ("", "@0.25")
    }
    scale = {name: float(state["logit_scale"].exp()) for name, state in weights.items()}
    assert scale["@0.25"] == pytest.approx(scale[""] / 4, rel=1e-5)
    before = store.path.read_bytes()
    assert study_command.main(line) == 0
    assert store.path.read_bytes() == before
    assert json.loads(before.splitlines()[-1])
