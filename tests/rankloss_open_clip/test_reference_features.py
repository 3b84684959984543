"""A teacher's precomputed features: read, sent through the trainer's data path, and ranked by."""

from __future__ import annotations

import copy
import functools
import io
import pickle
import re
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cpu_ddp
import numpy as np
import open_clip
import open_clip_train.data
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from open_clip_train.params import parse_args
from teacher_features import TEACHER, stored, student, unit_rows
from torch import Tensor, nn
from trainer_runs import SAMPLES, TORCHRUN, WHOLE_SET, Runs, Trainer

from rankloss import reference
from rankloss_open_clip import command_line
from rankloss_open_clip.companions import JoinedSamples, JoinedTokenizer, join_csv, split_features
from rankloss_open_clip.reference_features import IN_SAMPLES, NAMES, ReferenceFeatures, opened

OPTION = "--rankclip-reference-features"
CONTEXT = 9


def npy(array: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


# --- files ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["", ".npz"])
@pytest.mark.parametrize("names", [NAMES, NAMES[:1], NAMES[1:]])
def test_arrays_of_a_directory_and_of_a_file(tmp_path: Path, suffix: str, names: tuple[str, ...]) -> None:
    arrays = {name: unit_rows(5, 3, seed) for seed, name in enumerate(names)}
    found = opened(stored(tmp_path / f"teacher{suffix}", **arrays))
    assert tuple(found) == names
    for name, array in arrays.items():
        assert np.array_equal(found[name], array)
        assert isinstance(found[name], np.memmap) is (suffix == "")


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": unit_rows(4, 2)}, "has neither image_features nor text_features; it has images.npy"),
        ({}, "has neither image_features nor text_features; it has nothing"),
        (
            {"image_features": np.zeros((4, 2), np.int64)},
            r"floating-point numbers, a row per pair; got int64 \(4, 2\)",
        ),
        ({"image_features": np.zeros(4)}, r"a matrix of .* got float64 \(4,\)"),
        ({"text_features": np.zeros((0, 4))}, r"a matrix of .* got float64 \(0, 4\)"),
        (
            {"image_features": unit_rows(4, 2), "text_features": unit_rows(4, 3)},
            r"must have one shape .*; got \(4, 2\) and \(4, 3\)",
        ),
        ({"text_features": np.array([[None]])}, "Python objects in dtype"),
    ],
)
def test_what_is_no_pair_of_matrices_is_refused(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        opened(stored(tmp_path / "teacher", **arrays))


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    with pytest.raises(SystemExit):
        parse_args(["--loss", "rankclip", *argv])
    return capsys.readouterr().err


def test_what_cannot_work_is_a_usage_error(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = stored(tmp_path / "teacher", image_features=unit_rows(4, 2), text_features=unit_rows(4, 2))
    for argv, message in (
        (
            [file, "--distill-model", "RN50", "--distill-pretrained", "x"],
            f"{OPTION}: excludes --distill-model",
        ),
        ([str(tmp_path / "none")], f"{OPTION}: {tmp_path}/none is neither a directory nor an .npz file"),
        ([file, "--dataset-type", "webdataset"], f"{OPTION}: {file} is read by row number"),
        ([file, "--train-data", "shard.tar"], f"{OPTION}: {file} is read by row number"),
        (["samples", "--dataset-type", "csv"], f"{OPTION}: samples names members of a webdataset's samples"),
        (["samples:text", "--train-data", "pairs.csv"], f"{OPTION}: samples:text names members"),
        (
            ["samples", "--dataset-type", "synthetic"],
            "--dataset-type synthetic has no second caption, and no row of precomputed features",
        ),
        ([file, "--model", "coca_ViT-B-32"], "rankclip does not work with CoCa"),
        ([file, "--torchscript"], "rankclip does not work with --torchscript"),
        (
            [file, "--rankclip-fixed-reference", "text"],
            "--rankclip-fixed-reference: fixes one of the batch's own",
        ),
    ):
        assert message in refused(capsys, OPTION, *argv)
    assert parse_args(["--loss", "rankclip", OPTION, file]).rankclip_reference_features == file


# --- from the reader to the model's output ---------------------------------------------------------------


@functools.cache
def tokenizer() -> open_clip.SimpleTokenizer:
    return open_clip.SimpleTokenizer(context_length=CONTEXT)


@given(
    rows=st.integers(1, 4),
    dimension=st.integers(1, 7),
    names=st.sampled_from([NAMES, NAMES[:1]]),
    data=st.data(),
)
def test_tokens_and_features_come_back_as_they_were(
    rows: int,
    dimension: int,
    names: tuple[str, ...],
    data: st.DataObject,
) -> None:
    numbers = st.floats(width=32, allow_nan=False, allow_infinity=False)
    size = rows * dimension
    arrays = {
        name: np.array(data.draw(st.lists(numbers, min_size=size, max_size=size)), np.float32).reshape(
            rows, -1
        )
        for name in names
    }
    with tempfile.TemporaryDirectory() as directory:
        check_round_trip(ReferenceFeatures(stored(Path(directory, "x"), **arrays)), arrays, data)


def check_round_trip(
    companion: ReferenceFeatures, arrays: dict[str, np.ndarray[Any, Any]], data: st.DataObject
) -> None:
    rows, dimension = next(iter(arrays.values())).shape
    captions = [f"picture {i}" for i in range(rows)]
    texts = [f"{a}\x1f{b}" for a, b in zip(captions, companion.of_rows("data.csv", ",", rows), strict=True)]
    joined = JoinedTokenizer(tokenizer(), companion)
    order = data.draw(st.permutations(range(rows)))
    tokens, taken = companion.take_off(joined([texts[i] for i in order]))
    assert torch.equal(tokens, tokenizer()([captions[i] for i in order]))
    assert list(taken) == [f"reference_{name}" for name in arrays]
    for name, array in arrays.items():
        features = taken[f"reference_{name}"]
        assert features.dtype == torch.float32
        assert torch.equal(features[:, :dimension], torch.from_numpy(array[list(order)]))
        assert not features[:, dimension:].any()
        assert features.shape[1] - dimension in (0, 1)


def test_a_copy_in_another_process_opens_the_file_itself(tmp_path: Path) -> None:
    array = unit_rows(1000, 64)
    joined = JoinedTokenizer(tokenizer(), ReferenceFeatures(stored(tmp_path / "x", text_features=array)))
    expected = joined("a\x1f7")
    sent = pickle.dumps(joined)
    assert b"memmap" not in sent
    for other in (pickle.loads(sent), copy.deepcopy(joined)):
        assert torch.equal(other("a\x1f7"), expected)


def test_rows_are_those_of_the_table(tmp_path: Path) -> None:
    table = tmp_path / "data.csv"
    table.write_text("filepath;title\n1.png;a\n2.png;5\n")
    dataset = open_clip_train.data.CsvDataset(str(table), None, "filepath", "title", sep=";")
    for rows in (1, 3):
        companion = ReferenceFeatures(stored(tmp_path / str(rows), text_features=unit_rows(rows, 2)))
        message = rf"must have a row of features per row of {table}, which has 2; got {rows}"
        with pytest.raises(ValueError, match=message):
            join_csv(dataset, str(table), ";", companion)
    with pytest.raises(
        ValueError, match=f"samples names members of a webdataset's samples, but {table} is a CSV"
    ):
        join_csv(dataset, str(table), ";", ReferenceFeatures("samples"))
    join_csv(
        dataset, str(table), ";", ReferenceFeatures(stored(tmp_path / "2", text_features=unit_rows(2, 2)))
    )
    assert list(dataset.captions) == ["a\x1f0", "5\x1f1"]


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e300])
def test_feature_that_is_not_finite_is_an_error_that_names_the_row(tmp_path: Path, value: float) -> None:
    array = unit_rows(4, 3).astype(np.float64)
    array[2, 1] = value
    file = stored(tmp_path / "x", image_features=array)
    joined = JoinedTokenizer(tokenizer(), ReferenceFeatures(file))
    joined("a\x1f1")
    with pytest.raises(
        ValueError, match=f"row 2 of {file}, counted from 0, has a feature that is not finite"
    ):
        joined("a\x1f2")


def reader(*samples: dict[str, Any]) -> Any:
    def read() -> Iterator[dict[str, Any]]:
        for i, sample in enumerate(samples):
            yield {"__key__": str(i), "__url__": "a.tar", "jpg": b"...", "txt": b"caption", **sample}

    return read


@pytest.mark.parametrize("where", IN_SAMPLES)
def test_members_of_the_samples_are_their_features(where: str) -> None:
    arrays = dict(zip(NAMES, unit_rows(2, 5).astype(np.float16), strict=True))
    sample = {f"{name}.npy": npy(array) for name, array in arrays.items()}
    companion = ReferenceFeatures(where)
    (read,) = JoinedSamples(reader(sample), companion)()
    # What is not named stays, as every other member does.
    assert {name for name in read if name.endswith(".npy")} == {
        f"{x}.npy" for x in NAMES if x not in companion.names
    }
    tokens, taken = companion.take_off(JoinedTokenizer(tokenizer(), companion)(read["txt"].decode()))
    assert torch.equal(tokens, tokenizer()("caption"))
    assert list(taken) == [f"reference_{name}" for name in companion.names]
    for name in companion.names:
        assert torch.equal(
            taken[f"reference_{name}"][0, :5], torch.from_numpy(arrays[name].astype(np.float32))
        )


def test_samples_without_features_are_skipped_and_none_at_all_is_an_error() -> None:
    whole = {f"{name}.npy": npy(np.ones(2, np.float32)) for name in NAMES}
    half = {"image_features.npy": npy(np.ones(2, np.float32))}
    samples = list(JoinedSamples(reader(half, whole, {}), ReferenceFeatures("samples"))())
    assert [sample["__key__"] for sample in samples] == ["1"]
    message = (
        r"none of 1 samples has a set of image_features.npy and text_features.npy; the last one, '0', has"
    )
    with pytest.raises(ValueError, match=message):
        list(JoinedSamples(reader(half), ReferenceFeatures("samples"))())


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (np.ones(3), r"vectors of one length; got \[\(3,\)\] in '1' and \(2,\) before"),
        (np.ones((1, 2)), r"vectors of one length; got \[\(1, 2\)\]"),
        (np.array([1, np.nan]), "sample '1' has a feature that is not finite"),
        (np.array([1, 0]), "sample '1' must have floating-point features; got int64"),
    ],
)
def test_features_of_samples_that_do_not_fit_are_an_error(second: Any, message: str) -> None:
    samples = ({"text_features.npy": npy(array)} for array in (np.ones(2), second))
    read = JoinedSamples(reader(*samples), ReferenceFeatures("samples:text"))()
    next(read)
    with pytest.raises(ValueError, match=message):
        next(read)


def test_file_beside_shards_is_an_error(tmp_path: Path) -> None:
    file = stored(tmp_path / "x", image_features=unit_rows(4, 3))
    with pytest.raises(
        ValueError, match=f"{file} has rows of a CSV file, but the samples come from a webdataset"
    ):
        list(JoinedSamples(reader({}), ReferenceFeatures(file))())


# --- the model ------------------------------------------------------------------------------------------


def model() -> nn.Module:
    torch.manual_seed(0)
    tower = {"width": 32, "layers": 1}
    return open_clip.CLIP(
        embed_dim=16,
        vision_cfg={"image_size": 16, "patch_size": 8, "head_width": 16, **tower},
        text_cfg={"context_length": CONTEXT, "vocab_size": 49408, "heads": 2, **tower},
        output_dict=True,
    )


# The compiler reads .grad of tensors that are not leaves, which warns.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("named", [False, True])
def test_features_join_the_output_of_the_model(tmp_path: Path, named: bool, compiled: bool) -> None:
    arrays = {name: unit_rows(3, 5, seed) for seed, name in enumerate(NAMES)}
    companion = ReferenceFeatures(stored(tmp_path / "x", **arrays))
    texts = JoinedTokenizer(tokenizer(), companion)([f"text {i}\x1f{i}" for i in range(3)])
    images = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    clip, plain = model(), model()
    call = torch.compile(clip, backend="eager") if compiled else clip
    for _ in range(2):
        split_features(call, companion)
    tokens = tokenizer()([f"text {i}" for i in range(3)])
    for _ in range(2):
        output = call(image=images, text=texts) if named else call(images, texts)
        expected = plain(images, tokens)
        assert list(output) == [*expected, *(f"reference_{name}" for name in NAMES)]
        for name, value in expected.items():
            torch.testing.assert_close(output[name], value)
        for name, array in arrays.items():
            found: Tensor = output[f"reference_{name}"]
            assert torch.equal(found[:, :5], torch.from_numpy(array))
            assert not found.requires_grad
        # What has no features passes untouched, after a call that had them.
        assert list(call(images, tokens)) == list(expected)
    torch.compiler.reset()


# --- the trainer ----------------------------------------------------------------------------------------


TOP = ["--rankclip-top-k", "4"]


@pytest.fixture(scope="module")
def runs_with_features(trainer: Trainer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    directory = tmp_path_factory.mktemp("teacher")
    both = stored(directory / "both", **TEACHER)
    texts = stored(directory / "texts.npz", text_features=TEACHER["text_features"])
    shards = with_features(trainer, directory)
    table = Runs()

    def add(name: str, where: str, *options: str, **keywords: Any) -> None:
        start = trainer.run if keywords else trainer.call
        table.add(name, start, f"features, {name}", *WHOLE_SET, *TOP, OPTION, where, *options, **keywords)

    add("csv", both)
    add(
        "accumulation, a worker",
        both,
        "--batch-size",
        str(SAMPLES // 2),
        "--accum-freq",
        "2",
        "--workers",
        "1",
    )
    add("webdataset", "samples", *shards)
    add("texts", texts, "--rankclip-lambda-cross", "0", "--precision", "amp_bf16")
    add("texts in the cross-modal term", texts)
    two = (*TORCHRUN, "2", "--", cpu_ddp.__file__)
    add("two processes", both, "--batch-size", str(SAMPLES // 2), command=two)
    yield table
    table.close()


def with_features(trainer: Trainer, directory: Path) -> list[str]:
    """The trainer's shards with two more members per sample."""
    for number in range(2):
        with (
            tarfile.open(trainer.directory / f"shard-{number}.tar") as given,
            tarfile.open(directory / f"shard-{number}.tar", "w") as shard,
        ):
            for member in given:
                shard.addfile(member, given.extractfile(member))
                key, _, extension = member.name.partition(".")
                for name, array in TEACHER.items() if extension == "txt" else ():
                    content = npy(array[int(key)])
                    info = tarfile.TarInfo(f"{key}.{name}.npy")
                    info.size = len(content)
                    shard.addfile(info, io.BytesIO(content))
    return [x.replace(str(trainer.directory), str(directory)) for x in trainer.webdataset]


@pytest.mark.parametrize("name", ["csv", "accumulation, a worker", "webdataset", "two processes"])
def test_every_pair_is_ranked_by_its_own_row(trainer: Trainer, runs_with_features: Runs, name: str) -> None:
    run = runs_with_features[name]
    assert "ranked by the teacher's features in" in run.log
    assert "on ClipLoss" in run.log
    features, scale = student(trainer, run)
    teacher = {f"reference_{key}": value for key, value in TEACHER.items()}
    shown = run.scalars
    for term, oracle in (("cross_modal", reference.cross_modal), ("in_modal", reference.in_modal)):
        expected = oracle(**features, logit_scale=scale, **teacher, top_k=4)
        assert shown[f"{term}_raw"][1] == pytest.approx(expected, rel=1e-4), term
        others = {key: np.roll(rows, 1, axis=0) for key, rows in teacher.items()}
        for wrong in ({}, others):
            value = oracle(**features, logit_scale=scale, **wrong, top_k=4)
            assert abs(value / expected - 1) > 1e-3, "the comparison above could not fail"


def test_texts_alone_rank_the_images_and_the_texts(trainer: Trainer, runs_with_features: Runs) -> None:
    run = runs_with_features["texts"]
    features, scale = student(trainer, run)
    expected = reference.in_modal(
        **features, logit_scale=scale, reference_text_features=TEACHER["text_features"], top_k=4
    )
    assert run.scalars["in_modal_raw"][1] == pytest.approx(expected, rel=0.02)  # bf16 features
    assert "cross_modal_raw" not in run.scalars


def test_texts_alone_cannot_rank_across_modalities(runs_with_features: Runs) -> None:
    run = Runs.__mro__[1].__getitem__(runs_with_features, "texts in the cross-modal term")
    assert run.returncode != 0
    assert re.search("got reference_text_features alone, which ranks the in-modal term", run.output)


def test_namespace_without_features_has_no_companion() -> None:
    assert command_line.companion_of(parse_args(["--loss", "rankclip"])) is None
