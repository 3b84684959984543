"""The emoji example: split, pictures, baseline, scores, and what counts as the same run."""

import io
import json
import re
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from openmoji_demo import arms, command, data, evaluate, report, train
from openmoji_demo.trainer import TrainingError
from PIL import Image
from rich.console import Console

from batches import unit
from rankloss.metrics import partner_ranks

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def emojis():
    return data.load_emojis()


@pytest.fixture(scope="module")
def few(emojis):
    """Some whole sub-groups, enough for a split."""
    subgroups = {"food fruit", "person fantasy", "geometric"}
    return [emoji for emoji in emojis if emoji.subgroup in subgroups]


# --- the split --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[0, 1])
def split(request, emojis):
    return data.split_by_concept(emojis, request.param)


def concepts(part):
    return [emoji.concept for emoji in part]


def test_no_concept_is_on_both_sides(split):
    assert not {*concepts(split.train)} & {*concepts(split.test)}


def test_every_emoji_is_in_one_part_of_the_split(split, emojis):
    assert Counter((*split.train, *split.test, *split.dropped)) == Counter(emojis)


def test_a_held_out_concept_has_one_picture_and_its_others_are_dropped(split):
    held_out = concepts(split.test)
    assert len({*held_out}) == len(held_out)
    assert {*concepts(split.dropped)} <= {*held_out}


# --- the built folder -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def built(few, tmp_path_factory):
    """The root of a folder of split 0."""
    root = tmp_path_factory.mktemp("openmoji")
    data.build(root / "data" / "split0", root=root, emojis=few)
    return root


@pytest.fixture
def tables(built):
    """The tables of both sides."""
    return [data.read_table(built / "data/split0" / name) for name in ("train.csv", "test.csv")]


def test_a_built_folder_is_complete_for_its_own_split_and_stands_alone(built):
    folder = built / "data" / "split0"
    assert data.is_complete(folder, 0)
    assert not data.is_complete(folder, 1)
    assert [path.name for path in folder.parent.iterdir()] == ["split0"]  # nothing half-built beside it


def test_a_built_folder_names_its_designers_and_their_licence(built):
    attribution = (built / "data/split0/ATTRIBUTION.md").read_text(encoding="utf-8")
    assert "All emojis designed by OpenMoji" in attribution
    assert "CC BY-SA 4.0" in attribution


def test_the_tables_have_the_trainers_columns_and_name_pictures_that_are_there(built, tables):
    train_table, test_table = tables
    assert list(train_table) == ["filepath", "title"]
    named = [*train_table["filepath"], *test_table["filepath"], *test_table["line_filepath"]]
    assert all((built / path).is_file() for path in named)


def test_no_picture_or_caption_is_on_both_sides(built, tables):
    train_table, test_table = tables
    for column in ("filepath", "title"):
        assert not {*train_table[column]} & {*test_table[column]}
    images = [evaluate.open_all(built, {*table["filepath"]}) for table in tables]
    trained, held_out = ({image.tobytes() for image in side} for side in images)
    assert not trained & held_out


# --- runs -------------------------------------------------------------------------------------------------

STEP = "Train Epoch: 0 [5372/5372 (100%)] Contrastive_loss: 5.2 (5.2) Cross_modal_loss: 0 (0)"
WARNING = "2026-01-01,00:00:00 | WARNING | beware"


def run_of(arm, *, root=Path(), extra=()):
    """A run of an arm of the demo for one epoch, on split 0 in a folder."""
    return train.Run(root, "data/split0", arm, seed=0, epochs=1, device="cpu", extra=extra)


def script_in_place_of_the_trainer(run):
    """A command that logs a step, writes the run's checkpoint and warns of something if it trains CLIP."""
    lines = [STEP, WARNING] if run.arm.name == "clip" else [STEP]
    script = f"""
import pathlib
checkpoint = pathlib.Path({str(run.checkpoint)!r})
checkpoint.parent.mkdir(parents=True)
print(*{lines!r}, sep="\\n")
checkpoint.touch()
"""
    return [sys.executable, "-c", script]


@pytest.fixture
def finished(built, monkeypatch, tmp_path_factory):
    """Runs of two losses that have ended, the configuration of their model and what was printed."""
    root = tmp_path_factory.mktemp("runs")
    (root / "data").symlink_to(built / "data")
    model = root / "model" / "open_clip_config.json"
    model.parent.mkdir()
    model.write_text("{}", encoding="utf-8")
    runs = [run_of(arms.find(name), root=root) for name in ("clip", "rankclip")]
    monkeypatch.setattr(train.Run, "command", script_in_place_of_the_trainer)
    # One after another, each with one thread.
    monkeypatch.setattr(train, "side_by_side", lambda count, device: (1, 1))
    printed = io.StringIO()
    train.train_all(runs, "cpu", Console(file=printed, width=200))
    return SimpleNamespace(runs=runs, model=model, printed=printed.getvalue())


def test_a_finished_run_is_recognised_with_its_threads(finished):
    assert [run.is_complete() for run in finished.runs] == [True, True]
    assert [run.record()["threads"] for run in finished.runs] == [1, 1]


def test_a_warning_of_the_trainer_is_printed_with_its_arm(finished):
    assert "clip: beware" in finished.printed


def test_a_finished_run_of_another_model_is_not_overwritten(finished):
    finished.model.write_text('{"embed_dim": 8}', encoding="utf-8")
    for run in finished.runs:
        with pytest.raises(TrainingError, match=run.folder.name):
            run.is_complete()


# --- the command line -------------------------------------------------------------------------------------


def test_arguments_after_two_dashes_are_the_trainers_last_and_verbatim():
    args = command.parse(["--arms", "encoders", "--", "--lr", "5e-4"])
    (arm,) = args.arms
    assert run_of(arm, extra=args.extra).command()[-2:] == ["--lr", "5e-4"]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [(["--", "--loss=clip"], "--loss after --"), (["--epochs", "2", "clip"], "unrecognized argument: clip")],
)
def test_arguments_that_the_demo_sets_or_does_not_know_are_refused(arguments, reason, capsys):
    with pytest.raises(SystemExit):
        command.parse(arguments)
    assert reason in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("rankclip", ["--loss rankclip --", "--loss-schedule-unit epoch"]),
        ("encoders", ["--loss rankclip-encoders --"]),
    ],
)
def test_an_arm_of_the_demo_is_trained_with_its_loss_and_arguments(name, arguments):
    (arm,) = [arm for arm in command.parse([]).arms if arm.name == name]
    command_line = " ".join(run_of(arm).command())
    assert [argument for argument in arguments if argument not in command_line] == []


def test_any_other_arm_is_a_loss_with_its_defaults():
    (arm,) = command.parse(["--arms", "siglip-streamed"]).arms
    assert (arm.name, arm.label, arm.loss) == ("siglip-streamed",) * 3
    assert arm.arguments == ()


RATE, LAMBDA = ("--lr", "1"), ("--rankclip-lambda-in", "3")
TINY_WEIGHT, MIMICRY_WEIGHT = ("--tiny-weight", "2"), ("--mimicry-weight", "0.1")


@pytest.mark.parametrize(
    ("loss", "arguments", "expected"),
    [
        ("clip", (*RATE, *LAMBDA, *TINY_WEIGHT), RATE),
        ("rankclip-distill+mimicry", (*RATE, *LAMBDA, *TINY_WEIGHT), (*RATE, *LAMBDA)),
        ("rankclip-encoders", MIMICRY_WEIGHT, MIMICRY_WEIGHT),  # a preset of mimicry
        ("rankclip", MIMICRY_WEIGHT, ()),
    ],
)
def test_trainer_arguments_of_a_loss_go_to_the_runs_with_it(loss, arguments, expected):
    assert train.arguments_for(loss, list(arguments)) == expected


# --- scores -----------------------------------------------------------------------------------------------


def compared_models():
    """Captions, and the features of four models' pictures by the models' names.

    "first" and "same" rank the own caption best for half of the pictures, "all" for all, "none" for none.
    """
    n = 400
    captions = torch.eye(n)
    half = captions.clone()
    half[::2] = half[::2].roll(n // 2, dims=1)  # every second picture's own caption is beaten by another
    none = captions.roll(1, dims=1)
    return captions, {"first": half, "same": half.clone(), "all": captions, "none": none}


def test_a_difference_is_noise_unless_its_interval_excludes_zero():
    captions, models = compared_models()
    compared = evaluate.compare({name: partner_ranks(v, captions) for name, v in models.items()}, k=1)
    verdicts = {name: report.verdict(of_model) for name, of_model in compared.items()}
    assert verdicts == {"first": "", "same": "noise", "all": "higher", "none": "lower"}


def test_compared_models_have_the_mean_recall_of_both_ways():
    captions, models = compared_models()
    compared = evaluate.compare({name: partner_ranks(v, captions) for name, v in models.items()}, k=1)
    for name, v in models.items():
        both_ways = evaluate.metrics.recall(v @ captions.T, ks=(1,))
        mean = (both_ways["image_to_text"][1] + both_ways["text_to_image"][1]) / 2
        assert compared[name].percent == pytest.approx(mean)


def test_recall_of_ranks_is_that_of_the_scores_where_none_tie():
    images, texts = (unit(40, 8, seed=seed) for seed in range(2))
    by_ranks = evaluate.Answers(images @ texts.T, {}, partner_ranks(images, texts)).recall()
    by_scores = evaluate.Answers(images @ texts.T, {}).recall()
    assert by_ranks == {way: pytest.approx(recalls) for way, recalls in by_scores.items()}


# --- the demo ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo(few, tmp_path_factory):
    """The folder and the command of a demo of few emojis that was run once."""
    output = tmp_path_factory.mktemp("demo")
    argv = ["--output", str(output), "--epochs", "1", "--device", "cpu"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "load_emojis", lambda: few)
        assert command.main(argv) == 0
        yield SimpleNamespace(output=output, argv=argv)


def results_of(demo):
    return json.loads((demo.output / "results.json").read_text(encoding="utf-8"))


@pytest.mark.slow
def test_the_demo_scores_each_arm_and_both_baselines(demo):
    results = results_of(demo)
    labels = [arms.find(name).label for name in arms.DEFAULT]
    for block in results["results"]:
        assert list(block["rows"]) == [report.CHANCE, report.KNN, *labels]
    assert list(results["found"]) == list(results["tau"]) == labels


@pytest.mark.slow
def test_the_demo_draws_a_picture(demo):
    with Image.open(demo.output / "openmoji.png") as image:
        assert min(image.size) > 800  # pixels, enough to read its texts


@pytest.mark.slow
def test_the_demo_repeated_trains_nothing_and_has_the_same_results(demo, capsys):
    before = results_of(demo)
    capsys.readouterr()  # of the fixture's run
    assert command.main(demo.argv) == 0
    # The data and each training.
    assert capsys.readouterr().out.count("Complete already") == 1 + len(arms.DEFAULT)
    assert results_of(demo) == before


@pytest.fixture(params=range(3))
def ending(request):
    """The committed results of a seed, and the sentences that end the demo with them."""
    text = (ROOT / f"examples/demo/results/seed{request.param}.json").read_text(encoding="utf-8")
    results = json.loads(text)
    colour, _ = results["results"]
    rows = {
        name: {task: {int(k): score for k, score in by_k.items()} for task, by_k in scores.items()}
        for name, scores in colour["rows"].items()
    }  # JSON has made texts of the numbers k
    block = report.Block("color", n=270, subgroups=0, groups=0, rows=rows)
    found = {
        name: evaluate.Found(of_model["percent"], of_model["minus_first"], of_model["half_width"])
        for name, of_model in results["found"].items()
    }
    # The sentences have nothing of what is empty here.
    agreement = evaluate.Agreement(results["tau"], concepts={}, anchor=0, labels=[], scores={})
    first, of_agreement, last = report.closing(block, found, agreement)
    return SimpleNamespace(
        first=first, of_agreement=of_agreement, last=last, rows=rows, found=found, tau=results["tau"]
    )


ENCODERS = arms.find("encoders").label


def test_the_end_has_the_recall_of_two_encoders_their_gain_and_the_recall_of_pixels(ending):
    """R@10 in percent, the mean of both ways; the gain is over CLIP, the first arm."""
    encoders, pixels = ending.found[ENCODERS], ending.rows[report.KNN]
    of_pixels = (pixels["image_to_text"][10] + pixels["text_to_image"][10]) / 2
    assert f"{ENCODERS} finds most, {encoders.percent:.1f} %" in ending.first
    assert re.search(rf"{re.escape(f'{encoders.minus_first:+.1f}')} ± \S+ points against CLIP", ending.first)
    assert f"pixels find {of_pixels:.1f} %" in ending.first


def test_the_end_has_the_agreement_of_two_encoders_which_is_the_lowest_on_training_concepts(ending):
    assert min(ending.tau, key=lambda name: ending.tau[name]["training"]) == ENCODERS
    for tau in ending.tau[ENCODERS].values():
        assert f"{tau:.2f}" in ending.of_agreement


def test_the_end_leads_to_a_page_that_is_there(ending):
    page = ending.last.rpartition(" ")[2].rstrip(".")
    assert (ROOT / page).is_file()
