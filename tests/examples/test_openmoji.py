"""The emoji example: split, pictures, baseline, scores, and what counts as the same run."""

import io
import json
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from openmoji_demo import arms, command, data, evaluate, report, train
from openmoji_demo.trainer import TrainingError
from PIL import Image
from rich.console import Console

from batches import unit
from rankloss.metrics import partner_ranks


@pytest.fixture(scope="module")
def emojis():
    return data.load_emojis()


@pytest.fixture(scope="module")
def few(emojis):
    """Some whole sub-groups, enough for a split."""
    return [e for e in emojis if e.subgroup in {"food fruit", "person fantasy", "geometric"}]


@pytest.fixture(scope="module")
def built(few, tmp_path_factory):
    root = tmp_path_factory.mktemp("openmoji")
    data.build(root / "data" / "split0", root=root, emojis=few)
    return root


@pytest.mark.parametrize("number", [0, 1])
def test_no_concept_is_on_both_sides(emojis, number):
    split = data.split_by_concept(emojis, number)
    train, test, dropped = ([e.concept for e in part] for part in (split.train, split.test, split.dropped))
    assert not {*train} & {*test}
    assert len({*test}) == len(test)
    assert {*dropped} <= {*test}
    assert Counter((*split.train, *split.test, *split.dropped)) == Counter(emojis)


def test_build_is_complete_and_attributed(built):
    folder = built / "data" / "split0"
    assert data.is_complete(folder, 0)
    assert not data.is_complete(folder, 1)
    assert [p.name for p in folder.parent.iterdir()] == ["split0"]
    attribution = (folder / "ATTRIBUTION.md").read_text(encoding="utf-8")
    assert "All emojis designed by OpenMoji" in attribution
    assert "CC BY-SA 4.0" in attribution


def test_no_picture_or_caption_is_on_both_sides(built):
    folder = built / "data" / "split0"
    train, test = (data.read_table(folder / name) for name in ("train.csv", "test.csv"))
    assert list(train) == ["filepath", "title"]
    assert all((built / path).is_file() for path in [*train["filepath"], *test["line_filepath"]])
    for column in train:
        assert not {*train[column]} & {*test[column]}
    tables = (evaluate.open_all(built, {*table["filepath"]}) for table in (train, test))
    seen, unseen = ({image.tobytes() for image in images} for images in tables)
    assert not seen & unseen


def test_finished_runs_are_recognised_and_not_overwritten(built, monkeypatch):
    """Two losses whose trainers are scripts, one of which warns of something."""
    (built / "model").mkdir(exist_ok=True)
    model = built / "model" / "open_clip_config.json"
    model.write_text("{}", encoding="utf-8")
    pair = [train.Run(built, "data/split0", arms.find(name), 5, 1, "cpu") for name in ("clip", "rankclip")]
    step = "Train Epoch: 0 [5372/5372 (100%)] Contrastive_loss: 5.2 (5.2) Cross_modal_loss: 0 (0)"
    said = {"clip": "2026-01-01,00:00:00 | WARNING | beware", "rankclip": step}

    def command(run):
        script = f"import pathlib; p = pathlib.Path({str(run.checkpoint)!r}); p.parent.mkdir(parents=True)"
        return [sys.executable, "-c", f"{script}; print({step!r}); print({said[run.arm.name]!r}); p.touch()"]

    monkeypatch.setattr(train.Run, "command", command)
    monkeypatch.setattr(train, "side_by_side", lambda count, device: (1, 1))
    out = io.StringIO()
    train.train_all(pair, "cpu", Console(file=out, width=200))
    assert "clip: beware" in out.getvalue()
    for run in pair:
        assert run.is_complete()
        assert run.record()["threads"] == 1
    model.write_text('{"embed_dim": 8}', encoding="utf-8")
    with pytest.raises(TrainingError, match=run.folder.name):
        run.is_complete()


def test_trainer_arguments_follow_two_dashes(capsys):
    args = command.parse(["--arms", "encoders", "--", "--lr", "5e-4"])
    run = train.Run(Path(), "data/split0", *args.arms, 3, 2, "cpu", args.extra)
    assert run.command()[-2:] == ["--lr", "5e-4"]  # verbatim, and last
    for mistake, said in ((["--", "--loss=clip"], "--loss after --"), (["--epochs", "2", "clip"], ": clip")):
        with pytest.raises(SystemExit):
            command.parse(mistake)
        assert said in capsys.readouterr().err


def test_an_arm_is_a_name_with_a_loss_and_arguments():
    runs = [train.Run(Path(), "data/split0", arm, 0, 1, "cpu") for arm in command.parse([]).arms]
    commands = [" ".join(run.command()) for run in runs]
    assert "--loss rankclip --" in commands[1]
    assert "--loss-schedule-unit epoch" in commands[1]
    assert "--loss rankclip-encoders --" in commands[2]
    (other,) = command.parse(["--arms", "siglip-streamed"]).arms
    assert (other.label, other.loss, other.arguments) == ("siglip-streamed", "siglip-streamed", ())


def test_trainer_arguments_of_a_loss_go_to_the_runs_with_it():
    given = ["--lr", "1", "--rankclip-lambda-in", "3", "--tiny-weight", "2"]
    assert train.arguments_for("clip", given) == ("--lr", "1")
    assert train.arguments_for("rankclip-distill+mimicry", given) == tuple(given[:4])
    of_preset = ["--mimicry-weight", "0.1"]
    assert train.arguments_for("rankclip-encoders", of_preset) == tuple(of_preset)
    assert train.arguments_for("rankclip", of_preset) == ()


def test_a_difference_is_noise_unless_its_interval_excludes_zero():
    n = 400
    perfect = torch.eye(n)
    half = perfect.clone()
    half[::2] = half[::2].roll(n // 2, dims=1)  # the picture's own caption is beaten by one of another half
    shifted = torch.eye(n).roll(1, dims=1)
    images = {"first": half, "same": half.clone(), "all": perfect, "none": shifted}
    found = evaluate.compare({name: partner_ranks(of, perfect) for name, of in images.items()}, k=1)
    for name, of in images.items():
        recall = evaluate.metrics.recall(of @ perfect.T, ks=(1,))
        assert found[name].percent == pytest.approx(sum(way[1] for way in recall.values()) / 2)
    said = {name: report.verdict(of) for name, of in found.items()}
    assert said == {"first": "", "same": "noise", "all": "higher", "none": "lower"}


def test_recall_of_ranks_is_that_of_the_scores_where_none_tie():
    images, texts = (unit(40, 8, seed=seed) for seed in range(2))
    ranked = evaluate.Answers(images @ texts.T, {}, partner_ranks(images, texts))
    votes = evaluate.Answers(images @ texts.T, {})
    assert ranked.recall() == {way: pytest.approx(of) for way, of in votes.recall().items()}


@pytest.mark.slow
def test_the_demo_trains_evaluates_draws_and_resumes(tmp_path, few, capsys, monkeypatch):
    monkeypatch.setattr(data, "load_emojis", lambda: few)
    argv = ["--output", str(tmp_path), "--epochs", "1", "--device", "cpu"]
    assert command.main(argv) == 0
    capsys.readouterr()
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    labels = [arms.find(name).label for name in arms.DEFAULT]
    assert [list(block["rows"])[2:] for block in results["results"]] == [labels, labels]
    assert list(results["found"]) == list(results["tau"]) == labels
    with Image.open(tmp_path / "openmoji.png") as image:
        assert min(image.size) > 800
    assert command.main(argv) == 0
    assert capsys.readouterr().out.count("Complete already") == 4
    assert json.loads((tmp_path / "results.json").read_text(encoding="utf-8")) == results


@pytest.mark.parametrize("seed", range(3))
def test_the_end_says_what_to_look_at(seed):
    """Of the committed results: two encoders' model finds most, and agrees least on training concepts."""
    path = Path(__file__).parents[2] / f"examples/demo/results/seed{seed}.json"
    results = json.loads(path.read_text(encoding="utf-8"))
    rows = {name: {task: {int(k): x for k, x in of.items()} for task, of in row.items()}
            for name, row in results["results"][0]["rows"].items()}  # fmt: skip
    block = report.Block("color", 270, 0, 0, rows)
    fields = ("percent", "minus_first", "half_width")
    found = {name: evaluate.Found(*map(of.get, fields)) for name, of in results["found"].items()}
    first, agreement, last = report.closing(block, found, evaluate.Agreement(results["tau"], {}, 0, [], {}))
    encoders = arms.find("encoders").label
    best, baseline = found[encoders], rows[report.KNN]
    pixels = (baseline["image_to_text"][10] + baseline["text_to_image"][10]) / 2
    assert [x for x in (best.percent, best.minus_first, pixels) if f"{x:.1f}" not in first] == []
    assert (Path(__file__).parents[2] / last.rpartition(" ")[2].rstrip(".")).is_file()
    assert min(results["tau"], key=lambda name: results["tau"][name]["training"]) == encoders
    assert [x for x in results["tau"][encoders].values() if f"{x:.2f}" not in agreement] == []
