"""The studies' reports and their command: what may be said, what is repeated, what real trainings give."""

import re
from dataclasses import replace

import pytest
from examples_common.page import Picture
from examples_common.records import Store
from miniature_icons import write_icons
from miniature_paper.options import _EXAMPLE as EXAMPLE
from miniature_paper.search import command, report
from miniature_paper.search.confirmation import needed
from miniature_paper.search.ladder import progress
from miniature_paper.search.study import SETTING, STUDIES, load
from miniature_paper.search.trials import PLANS, REFERENCE, TEST
from miniature_records import fake_trainings, study_records

SEARCH, QUESTION = (load(name, "full") for name in ("search", "question"))
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
    ("effect", "noise", "said"),
    [(0.5, 0.1, "Confirmed"), (-0.5, 0.1, "Refuted"), (0.0, 1.0, "Bounded")],
)
def test_one_test_is_answered_by_its_interval_alone(tmp_path, no_picture, effect, noise, said):
    effects = {"validation rankclip-recipe": 9.0, "test rankclip-recipe": effect}
    text = page(tmp_path, QUESTION, study_records(effects=effects, noise=noise))
    assert re.findall(VERDICTS, text) == [said]
    low, high = re.search(rf"\*\*{said}.*interval (\S+) to (\S+),", text).groups()
    assert said == ("Confirmed" if low[0] == "+" else "Refuted" if high[0] == "−" else "Bounded")
    assert f"which asks for {len(QUESTION.confirmation.seeds)}" in text
    last = f"test-4ep-clip-seed{QUESTION.confirmation.seeds[-1]}"
    text = page(tmp_path, QUESTION, study_records(effects=effects, noise=noise, missing=[last]))
    assert re.findall(VERDICTS, text) == ["Nothing is concluded"]
    assert "The confirmation:" not in text


@pytest.mark.parametrize("lost", ["rankclip-recipe", REFERENCE])
def test_a_model_that_diverged_leaves_the_question_open(tmp_path, no_picture, lost):
    text = page(tmp_path, QUESTION, study_records(lost=(lost,)))
    assert re.findall(VERDICTS, text) == ["No answer"]
    assert "points (95 % interval" not in text
    assert f"`{lost}` | diverged" in re.sub(" +", " ", text)


@pytest.mark.parametrize("name", [name for name in STUDIES if (EXAMPLE / "report" / f"{name}.md").exists()])
def test_the_committed_report_follows_from_the_committed_records(tmp_path, monkeypatch, name):
    drawn = Picture(b"", "")

    def draw(panels, alt, label):
        return replace(drawn, alt=alt) if any(panels.values()) else None

    monkeypatch.setattr(report, "draw", draw)
    assert command.main([name, "--preset", "full", "--report-only", "--report", str(tmp_path)]) == 0
    committed = EXAMPLE / "report" / f"{name}.md"
    assert (tmp_path / f"{name}.md").read_text(encoding="utf-8") == committed.read_text(encoding="utf-8")


# --- the command ---


@pytest.fixture
def faked(monkeypatch):
    monkeypatch.setattr(command, "prepare_teacher", lambda *_: True)
    return fake_trainings(monkeypatch, command)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "question" else pytest.mark.slow) for name in STUDIES]
)
def test_the_command_goes_on_after_a_failure_and_repeats_nothing(faked, tmp_path, capsys, monkeypatch, name):
    made, broken = faked
    line, one = [name, "--output", str(tmp_path)], load(name, "quick")
    text = tmp_path / "quick" / "report" / f"{name}.md"
    last = one.reference(BY_NAME["recipe"], one.confirmation, one.confirmation.seeds[0], TEST)
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
    assert command.main(line) == command.main([*line, "--report-only"]) == 0
    assert text.read_text(encoding="utf-8") == whole
    assert len(made) == before + 1 == len(set(made))


# --- real trainings ---


@pytest.mark.slow
@pytest.mark.parametrize("name", ["search", "teacher", "distil"])
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
    records = find(needed(one, progress(one, find).winners))
    for attempt, record in records.items():
        assert record["items"]["retrieval/test" if attempt.whole else "retrieval"] == 60
        # The teacher took part.
        terms = set(record["training"]["first"])
        assert ("distill_loss" in terms) == (attempt.loss == "clip" and not attempt.trial.startswith("clip"))
        ranks = attempt.loss.startswith("rankclip") or "--rivals-rank-lambda" in dict(attempt.changes)
        assert ("in_modal_loss" in terms) == ranks
    before = store.path.read_bytes()
    assert command.main(line) == 0
    assert store.path.read_bytes() == before
