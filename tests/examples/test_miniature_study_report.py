"""The studies' reports and their command: what may be said, what is repeated, what real trainings give."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from miniature_icons import write_icons
from miniature_paper.records import Store
from miniature_paper.search import command, report
from miniature_paper.search.confirmation import needed
from miniature_paper.search.ladder import progress
from miniature_paper.search.study import SETTING, STUDIES, load
from miniature_paper.search.trials import PLANS, REFERENCE, TEST, VALIDATION, Attempt, teacher_folder
from miniature_records import fake_trainings, study_record, study_records

import rankloss

SEARCH, QUESTION, TEACHER = (load(name, "full") for name in ("search", "question", "teacher"))
BY_NAME = {trial.name: trial for trial in SEARCH.arms[SETTING]}


@pytest.fixture
def no_picture(monkeypatch):
    """For what is not about it: drawing takes seconds."""
    monkeypatch.setattr(report, "draw", lambda *_: None)


def page(folder, one, find):
    written = report.write(one, folder, find=find, command="the command")
    return written.with_suffix(".md").read_text(encoding="utf-8")


# --- what may be said ---

VERDICTS = r"\*\*(Confirmed|Refuted|Bounded|Nothing is concluded|No answer)"


@pytest.mark.parametrize(
    ("one", "name"), [(QUESTION, "rankclip-recipe"), (SEARCH, "in-x4")], ids=["question", "search"]
)
@pytest.mark.parametrize(
    ("effect", "noise", "said"),
    [(0.5, 0.1, "Confirmed"), (-0.5, 0.1, "Refuted"), (0.0, 1.0, "Bounded")],
)
def test_one_test_is_answered_by_its_interval_alone(tmp_path, no_picture, one, name, effect, noise, said):
    effects = {f"validation {name}": 9.0, f"test {name}": effect}
    text = page(tmp_path, one, study_records(effects=effects, noise=noise))
    assert re.findall(VERDICTS, text) == [said]
    low, high = re.search(rf"\*\*{said}.*interval (\S+) to (\S+),", text).groups()
    assert said == ("Confirmed" if low[0] == "+" else "Refuted" if high[0] == "−" else "Bounded")
    if one == SEARCH:
        assert f"The search's winner is `{name}`" in text
        compared = {"Confirmed": "better than", "Refuted": "worse than", "Bounded": "not told apart from"}
        assert f"It is {compared[said]} the recipe" in text
        assert "for the 11 secondary comparisons" in text
    else:
        assert f"which asks for {len(QUESTION.confirmation.seeds)}" in text
    last = f"test-4ep-clip-seed{one.confirmation.seeds[-1]}"
    text = page(tmp_path, one, study_records(effects=effects, noise=noise, missing=[last]))
    assert re.findall(VERDICTS, text) == ["Nothing is concluded"]
    assert "The confirmation:" not in text


@pytest.mark.parametrize("lost", ["rankclip-recipe", REFERENCE])
def test_a_model_that_diverged_leaves_the_question_open(tmp_path, no_picture, lost):
    text = page(tmp_path, QUESTION, study_records(lost=(lost,)))
    assert re.findall(VERDICTS, text) == ["No answer"]
    assert "points (95 % interval" not in text
    assert f"`{lost}` | diverged" in re.sub(" +", " ", text)


def test_the_teachers_report_names_what_is_established(tmp_path):
    strong = TEACHER.arms["top-ranks"][1].name
    text = page(tmp_path, TEACHER, study_records(effects={strong: 2.0}))
    assert re.search(r"\*\*Above plain CLIP in the objective.*: `top-ranks`\.\*\*", text)
    assert "**Above `distillation`, the trainer's own: `top-ranks`.**" in text
    assert f"`{strong}` (chosen)" in text
    assert "Agreement with the teacher, in-modal (τ)" in text
    for name, seeds in (("A", "2000, 2001, 2002, 2003, 2004, 2005"), ("B", "2006, 2007")):
        assert re.search(rf"\| taught by weights {name} +\| seeds {seeds} +\|", text)
    for name in ("teacher.png", "teacher-rounds.png"):
        assert (tmp_path / "figures" / name).stat().st_size > 1000
    assert "**No arm is confirmed" in page(tmp_path, TEACHER, study_records(noise=1.0))
    assert "33 trainings of round 1 of 2 are missing" in page(tmp_path, TEACHER, lambda _: {})
    assert list((tmp_path / "figures").iterdir()) == []


def test_the_searchs_report_names_every_setting(tmp_path, no_picture):
    text, steps = page(tmp_path, SEARCH, study_records()), progress(SEARCH, study_records()).steps[SETTING]
    trials = {trial for step in steps for trial in step.trials}
    assert len(trials) > len(BY_NAME)
    assert f"the best of {len(trials)} settings" in text
    assert all(f"| `{trial.name}`" in text for trial in trials)
    assert page(tmp_path, SEARCH, study_records()) == text


@pytest.mark.parametrize("name", ["top-10", "top-50", "log-discount", "batch-512"])
def test_the_share_of_the_weight_is_that_of_the_loss_itself(name):
    """Σμ/N, read off the loss of a list in which every item but the last costs the same."""
    flags = dict(BY_NAME[name].changes)
    n = int(flags.get("--batch-size", SEARCH.grid.batch_size))
    options = {"top_k": int(flags.get("--rankclip-top-k", n)), "discount": flags.get("--rankclip-discount")}
    # Every item is twice as likely as all that follow it together.
    scores = np.log(np.append(2 * 3.0 ** np.arange(n - 1)[::-1], 1.0))
    nll = rankloss.reference.plackett_luce_nll(scores, np.arange(n)[::-1], **options)
    last = (1.0 if options["discount"] is None else 1 / np.log(1 + n)) if options["top_k"] == n else 0.0
    assert nll / np.log(1.5) / n == pytest.approx(report.weight(SEARCH, flags) - last / n)
    assert (report.weight(SEARCH, flags) < 1) == (name != "batch-512")


def test_old_records_of_such_settings_are_pointed_out(tmp_path, no_picture):
    def old(needed):
        return {one: {**study_record(one), "conditions": {"rankloss": "0.1.0"}} for one in needed}

    attempts = SEARCH.attempts(BY_NAME.values(), SEARCH.rounds[0], VALIDATION)
    assert report.lighter_weights(SEARCH, study_records()(attempts)) == {}
    found = report.lighter_weights(SEARCH, old(attempts))
    rounded = {name: round(share, 3) for name, share in found.items()}
    assert rounded == {"top-10": 0.039, "top-50": 0.195, "log-discount": 0.236}
    assert "`top-10` 0.039" in page(tmp_path, SEARCH, old)


# --- the command ---


@pytest.fixture
def faked(monkeypatch):
    monkeypatch.setattr(command, "prepare_teacher", lambda *_: True)
    return fake_trainings(monkeypatch, command)


@pytest.mark.parametrize("name", STUDIES)
def test_the_command_goes_on_after_a_failure_and_repeats_nothing(faked, tmp_path, capsys, monkeypatch, name):
    made, broken = faked
    line, one = [name, "--output", str(tmp_path)], load(name, "quick")
    text = tmp_path / "quick" / "report" / f"{name}.md"
    last = one.reference(BY_NAME["recipe"], one.confirmation, one.confirmation.seeds[0], TEST)
    if one.rounds:
        broken.add(one.reference(BY_NAME["recipe"], one.rounds[0], one.rounds[0].seeds[0], VALIDATION).name)
        assert command.main(line) == 1
        assert {a.side for a in made} == {VALIDATION}
        broken.clear()
    broken.add(last.name)
    assert command.main(line) == 1
    assert "Nothing is concluded yet: 1 of" in text.read_text(encoding="utf-8")
    assert "out of luck" in capsys.readouterr().out
    broken.clear()
    before = len(made)
    assert command.main(line) == 0
    assert made[before:] == [last]
    whole = text.read_text(encoding="utf-8")
    assert "Nothing is concluded" not in whole
    monkeypatch.setattr(command, "prepare_teacher", pytest.fail)  # a finished study needs none
    assert command.main(line) == 0
    assert command.main([*line, "--report-only"]) == 0
    assert text.read_text(encoding="utf-8") == whole
    assert len(made) == before + 1 == len(set(made))


def test_another_winner_after_the_confirmation_began_and_doubled_records_are_refused(faked, tmp_path, capsys):
    made, _ = faked
    line, results = ["search", "--output", str(tmp_path)], tmp_path / "quick" / "results" / "search"
    assert command.main(line) == 0
    found = len(made)
    declared = results / SETTING / "confirmations.jsonl"
    winner = json.loads(declared.read_text())
    other = next(name for name in BY_NAME if name != winner["trial"])
    declared.write_text(json.dumps({**winner, "trial": other}) + "\n")
    for more in ([], ["--report-only"]):
        assert command.main([*line, *more]) == 1
        assert f"the test side was used to confirm {other}" in capsys.readouterr().out.replace("\n", " ")
    assert len(made) == found
    # A report on half of the records might name another winner.
    Store(results).save("a second record", study_record(made[0]))
    assert command.main([*line, "--report-only"]) == 1
    assert "are of one setting" in capsys.readouterr().out


# --- real trainings ---


@pytest.mark.slow
@pytest.mark.parametrize("name", ["search", "teacher"])
def test_a_study_is_trained_by_the_real_trainer_and_measured(tmp_path, monkeypatch, name):
    few = {"tries": ["recipe", "batch-512"], "rounds": [{"epochs": 1, "seeds": [10], "keep": 1}]}
    few |= {"size": {"preset": "quick"}, "confirmation": {"epochs": 1, "seeds": [100]}}
    monkeypatch.setitem(PLANS["search"], "quick", few)
    write_icons(tmp_path / "icons", train=4200, validation=40, test=60)
    folders = ["--output", str(tmp_path / "out"), "--icons", str(tmp_path / "icons")]
    line, one = [name, *folders, "--device", "cpu"], load(name, "quick")
    assert command.main(line) == 0
    results = tmp_path / "out" / "quick" / "results" / name
    find, store = command.finished(results), Store(results)
    now = progress(one, find)
    records = find(needed(one, now.winners))
    assert len({record.get("teacher") for record in records.values()}) == 1
    for attempt, record in records.items():
        assert Attempt.of_record(record["setting"]) == attempt
        assert not record["diverged"]
        assert record["items"]["retrieval/test" if attempt.whole else "retrieval"] == 60
        # What makes an arm: the teacher took part.
        terms = set(record["training"]["first"])
        assert ("distill_loss" in terms) == (attempt.loss == "clip" and not attempt.trial.startswith("clip"))
        assert ("in_modal_loss" in terms) == attempt.loss.startswith("rankclip")
    rounds = find([a for steps in now.steps.values() for step in steps for a in step.attempts])
    assert {record["items"]["retrieval"] for record in rounds.values()} == {40}
    assert not list((tmp_path / "out" / "runs").iterdir())
    if one.teacher:
        assert all(-1 <= r["metrics"]["teacher/test"]["in_modal_tau"] <= 1 for r in records.values())
        (teacher,) = store.of([one.teacher])[0]
        assert teacher["metrics"]["retrieval/test"]
        folder = tmp_path / "out" / teacher_folder(one.teacher)
        weights = {
            name: torch.load(Path(f"{folder}{name}") / "open_clip_pytorch_model.bin", weights_only=True)
            for name in ("", "@0.25")
        }
        scale = {name: float(state["logit_scale"].exp()) for name, state in weights.items()}
        assert scale["@0.25"] == pytest.approx(scale[""] / 4, rel=1e-5)
    before = store.path.read_bytes()
    assert command.main(line) == 0
    assert store.path.read_bytes() == before
