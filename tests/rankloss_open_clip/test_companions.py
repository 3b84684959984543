"""What comes with a text: read, sent through the trainer's data path, and taken apart before the model."""

from __future__ import annotations

import copy
import functools
import io
import json
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import open_clip_train.data
import pytest
import torch
from open_clip_train.params import parse_args
from teacher_features import stored, unit_rows
from torch import Tensor, nn

from rankloss_features.folder import NAMES
from rankloss_open_clip.command_line import companion_of
from rankloss_open_clip.companions import (
    Companion,
    SecondCaption,
    join_csv,
    joined_samples,
    joined_tokenizer,
    split_features,
)
from rankloss_open_clip.reference_features import IN_SAMPLES, ReferenceFeatures, refuse
from rankloss_open_clip.two_companions import TwoCompanions

CONTEXT = 9
OPTION = "--rankclip-reference-features"


def npy(array: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


@functools.cache
def tokenizer() -> open_clip.SimpleTokenizer:
    return open_clip.SimpleTokenizer(context_length=CONTEXT)


def taken_apart(companion: Companion, texts: list[str]) -> tuple[Tensor, Tensor]:
    """Tokens and companions, as the hook in front of the model finds them."""
    joined = joined_tokenizer(tokenizer(), companion)(texts)
    assert joined.shape[:2] == (len(texts), 1)
    assert joined.dtype == torch.int64
    return joined[:, 0, :CONTEXT], joined[:, 0, CONTEXT:]


# --- samples of a webdataset ----------------------------------------------------------------------------


def read(companion: Companion, *samples: dict[str, Any], text_key: str = "txt") -> list[dict[str, Any]]:
    def reader(source: str, handler: str) -> Iterator[dict[str, Any]]:
        for i, sample in enumerate(samples):
            yield {"__key__": str(i), "__url__": source, "jpg": b"...", **sample}

    return list(joined_samples(reader, companion, text_key, "a.tar", handler="handler"))


@pytest.mark.parametrize(
    ("key", "samples", "texts"),
    [
        (
            "Syn.TXT",
            [
                {"txt": b"raw \xc3\xa9", "syn.txt": b"made\x1fup"},
                {"txt": b"left out"},
                {"syn.txt": b"dropped"},
            ],
            ["raw é\x1fmade up"],
        ),
        (
            "json:blip",
            [
                {"txt": b"a", "json": json.dumps({"blip": "b", "url": "u"}).encode()},
                {"txt": b"c", "json": b'{"other": "d"}'},
                {"txt": b"e", "json": b"not json"},
                {"txt": b"f"},
                {"txt": b"g", "json": b'{"blip": 7}'},
            ],
            ["a\x1fb", "g\x1f7"],
        ),
        ("syn", [{"txt": b"a"}] * 99 + [{"txt": b"a", "syn": b"b"}] + [{"txt": b"a"}] * 200, ["a\x1fb"]),
        ("syn", [], []),
    ],
)
def test_second_caption_of_a_sample(key: str, samples: list[dict[str, Any]], texts: list[str]) -> None:
    assert [sample["txt"].decode() for sample in read(SecondCaption(key), *samples)] == texts


def test_first_caption_is_the_one_the_trainer_prefers() -> None:
    given = ({"caption": b"a", "syn": b"b"}, {"txt": b"c", "caption": b"d", "syn": b"e"})
    texts = [(x.get("txt"), x["caption"]) for x in read(SecondCaption("syn"), *given, text_key="txt;caption")]
    assert texts == [(None, b"a\x1fb"), (b"c\x1fe", b"d")]


@pytest.mark.parametrize("count", [1, 1000])
def test_samples_without_any_companion_are_an_error_that_shows_one(count: int) -> None:
    shown = min(count, 100)
    with pytest.raises(ValueError, match=f"{shown} samples .*'syn'.* '{shown - 1}', has jpg, txt"):
        read(SecondCaption("syn"), *[{"txt": b"a"}] * count)
    with pytest.raises(ValueError, match=r"image_features\.npy and text_features\.npy"):
        read(ReferenceFeatures("samples"), *[{"txt": b"a", "image_features.npy": npy(np.ones(2))}] * count)


@pytest.mark.parametrize("where", IN_SAMPLES)
def test_members_of_the_samples_are_their_features(where: str) -> None:
    arrays = dict(zip(NAMES, unit_rows(2, 5).astype(np.float16), strict=True))
    members = {f"{name}.npy": npy(array) for name, array in arrays.items()}
    companion = ReferenceFeatures(where)
    (sample,) = read(companion, {"txt": b"left out"}, {"txt": b"caption", **members})
    # What is not named stays, as every other member does.
    left = {name for name in sample if name.endswith(".npy")}
    assert left == {f"{x}.npy" for x in NAMES if x not in companion.names}
    tokens, companions = taken_apart(companion, [sample["txt"].decode()])
    assert torch.equal(tokens, tokenizer()("caption"))
    taken = companion.merge({}, companions)
    assert list(taken) == [f"reference_{name}" for name in companion.names]
    for name in companion.names:
        expected = torch.from_numpy(arrays[name].astype(np.float32))
        assert torch.equal(taken[f"reference_{name}"][0, :5], expected)


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (np.ones(3), r"\(3,\)"),
        (np.ones((1, 2)), r"\(1, 2\)"),
        (np.array([1, np.nan]), "nan"),
        (np.zeros(2), "zeros"),
        (np.array([1, 0]), "int64"),
    ],
)
def test_features_of_samples_that_do_not_fit_are_an_error(second: Any, message: str) -> None:
    samples = ({"txt": b"a", "text_features.npy": npy(array)} for array in (np.ones(2), second))
    with pytest.raises(ValueError, match=rf"(?=.*sample '1').*{message}"):
        read(ReferenceFeatures("samples:text"), *samples)


# --- rows of a CSV file ---------------------------------------------------------------------------------


def csv(path: Path, text: str) -> tuple[Any, str]:
    file = path / "data.csv"
    file.write_text(text)
    dataset = open_clip_train.data.CsvDataset(str(file), None, "filepath", "title", sep=";")
    return dataset, str(file)


ROWS = [("1.png", "a"), ("2.png", "5")]


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (ROWS, ""),
        (ROWS[::-1], "row 0 .* in row 1"),
        ([ROWS[0], ("2.png", "6")], "row 1 .*'5'"),
        ([("3.png", "a"), ROWS[1]], r"row 0 .*1\.png"),
        (ROWS[:1], "row 1 .*1 rows"),
        ([*ROWS, ("3.png", "b")], "row 2 is missing"),
    ],
)
def test_rows_of_features_are_those_of_the_table(
    tmp_path: Path, pairs: list[tuple[str, str]], message: str
) -> None:
    dataset, file = csv(tmp_path, "filepath;title\nfolder/1.png;a\n2.png;5\n")
    companion = ReferenceFeatures(stored(tmp_path / "x", pairs, text_features=unit_rows(len(pairs), 2)))
    if not message:
        join_csv(dataset, file, ";", companion)
        assert list(dataset.captions) == ["a\x1f0", "5\x1f1"]
    else:
        with pytest.raises(ValueError, match=message):
            join_csv(dataset, file, ";", companion)


def test_rows_of_features_are_found_by_key_and_caption(tmp_path: Path) -> None:
    folder = stored(tmp_path / "x", [("1", "b"), ("0", "a")], text_features=unit_rows(2, 2))
    samples = {"txt": b"a"}, {"txt": b"b"}
    assert [x["txt"].decode() for x in read(ReferenceFeatures(folder), *samples)] == ["a\x1f1", "b\x1f0"]
    # What the trainer skips has no row, and needs none.
    assert len(read(ReferenceFeatures(folder), *samples, {"syn": b"left out"})) == 2
    for wrong in ({"txt": b"b"},), (*samples, {"txt": b"a"}):
        with pytest.raises(ValueError, match=f"sample '{len(wrong) - 1}' .*{folder}"):
            read(ReferenceFeatures(folder), *wrong)


def test_a_second_caption_and_a_row_of_features(tmp_path: Path) -> None:
    dataset, file = csv(tmp_path, "filepath;title;syn\n1.png;a;made\n2.png;5;up\n")
    texts = unit_rows(2, 5)
    folder = stored(tmp_path / "x", ROWS, text_features=texts)
    companion = TwoCompanions(SecondCaption("syn"), ReferenceFeatures(folder))
    join_csv(dataset, file, ";", companion)
    tokens, companions = taken_apart(companion, list(dataset.captions))
    assert torch.equal(tokens, tokenizer()(["a", "5"]))
    assert torch.equal(companion.texts(tokens, companions), tokenizer()(["a", "5", "made", "up"]))
    taken = companion.merge({"text_features": torch.arange(4.0)}, companions)
    assert torch.equal(taken["caption_features"], torch.tensor([2.0, 3.0]))
    assert torch.equal(taken["reference_text_features"][:, :5], torch.from_numpy(texts))
    keys = stored(tmp_path / "keys", [("0", "a")], text_features=texts[:1])
    of_shards = TwoCompanions(SecondCaption("syn"), ReferenceFeatures(keys))
    (sample,) = read(of_shards, {"txt": b"a", "syn": b"b"}, {"txt": b"left out"})
    assert sample["txt"].decode() == "a\x1fb\x1e0"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("filepath;title;syn\n1.png;raw;made\n2.png;5;NULL and void\n", ""),
        ("filepath;title\n1.png;raw\n", "'syn'.* filepath, title"),
        ("filepath;title;syn\n1.png;a;b\n2.png;c;\n3.png;d;\n", "2 rows: column 'syn' .* row 2"),
    ],
)
def test_column_is_joined_to_the_captions(tmp_path: Path, text: str, message: str) -> None:
    dataset, file = csv(tmp_path, text)
    if not message:
        join_csv(dataset, file, ";", SecondCaption("syn"))
        assert list(dataset.captions) == ["raw\x1fmade", "5\x1fNULL and void"]
    else:
        with pytest.raises(ValueError, match=message):
            join_csv(dataset, file, ";", SecondCaption("syn"))


def test_features_of_the_other_kind_of_data_are_an_error(tmp_path: Path) -> None:
    dataset, file = csv(tmp_path, "filepath;title\n1.png;a\n")
    with pytest.raises(ValueError, match=file):
        join_csv(dataset, file, ";", ReferenceFeatures("samples"))
    path = stored(tmp_path / "x", image_features=unit_rows(4, 3))
    with pytest.raises(ValueError, match=path):
        read(ReferenceFeatures(path), {"txt": b"a"})


# --- folders of features --------------------------------------------------------------------------------

BOTH = unit_rows(4, 2)


def damaged(row: int | slice, value: float, rows: int = 12) -> np.ndarray[Any, Any]:
    array = unit_rows(rows, 3).astype(np.float64)
    array[row] = value
    return array


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"image_features": BOTH, "text_features": unit_rows(3, 2)}, r"\(3, 2\).*\(4, 2\)"),
        ({"image_features": BOTH, "text_features": BOTH.astype(np.float16)}, "float32.*float16"),
        (dict(zip(NAMES, (BOTH, unit_rows(4, 3)), strict=True)), "--rankclip-lambda-cross 0"),
        # What no teacher gives.
        *(({"image_features": damaged(2, x)}, "image_features .*row 2") for x in (np.nan, np.inf, 1e300, 0)),
        ({"text_features": np.ones((12, 3))}, "text_features .*12 times"),
        ({"text_features": damaged(slice(16_390, None), 0.0, 16_400)}, "from row 16384, .*first is row 6"),
    ],
)
def test_what_is_no_teachers_features_is_refused(
    tmp_path: Path, arrays: dict[str, Any], message: str
) -> None:
    reason = refuse(stored(tmp_path / "teacher", **arrays), two_widths=False)
    assert reason is not None
    assert re.search(message, reason)


def test_what_cannot_work_is_a_usage_error(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = stored(tmp_path / "teacher", image_features=BOTH, text_features=BOTH)
    two = stored(tmp_path / "two", image_features=BOTH, text_features=unit_rows(4, 3))
    zeros = stored(tmp_path / "zeros", image_features=damaged(2, 0.0))
    for argv, named in (
        (f"{file} --distill-model RN50 --distill-pretrained x", f"{OPTION}: excludes --distill-model"),
        (f"{file} --rankclip-reference own", "--rankclip-reference: "),
        (f"{tmp_path}/none", f"{OPTION}: {tmp_path}/none"),
        (two, "--rankclip-lambda-cross 0"),
        (zeros, f"{OPTION}: image_features in {zeros}"),
    ):
        with pytest.raises(SystemExit):
            parse_args(["--loss", "rankclip", OPTION, *argv.split()])
        assert named in capsys.readouterr().err
    for given in ([file], [file, "--rankclip-reference", "teacher"], [two, "--rankclip-lambda-cross", "0"]):
        assert isinstance(companion_of(parse_args(["--loss", "rankclip", OPTION, *given])), ReferenceFeatures)


# --- from the reader to the model's output ---------------------------------------------------------------


@pytest.mark.parametrize(
    "widths",
    [
        {"image_features": 1, "text_features": 1},
        {"text_features": 6},
        {"image_features": 5, "text_features": 2},
    ],
)
def test_tokens_and_features_come_back_as_they_were(tmp_path: Path, widths: dict[str, int]) -> None:
    arrays = {name: np.float32(1e-30) * unit_rows(5, width, width) for name, width in widths.items()}
    next(iter(arrays.values()))[0] = np.finfo(np.float32).max
    companion = ReferenceFeatures(stored(tmp_path / "x", **arrays), two_widths=True)
    order = [3, 0, 4, 3]
    tokens, companions = taken_apart(companion, [f"picture {i}\x1f{i}" for i in order])
    assert torch.equal(tokens, tokenizer()([f"picture {i}" for i in order]))
    taken = companion.merge({"image_features": tokens}, companions)
    assert list(taken) == ["image_features", *(f"reference_{name}" for name in arrays)]
    for name, array in arrays.items():
        features, width = taken[f"reference_{name}"], array.shape[1]
        assert features.dtype == torch.float32
        assert torch.equal(features[:, :width], torch.from_numpy(array[order]))
        assert not features[:, width:].any()


def test_two_captions_are_tokenized_alike() -> None:
    tokens, second = taken_apart(SecondCaption("syn"), ["a cat\x1fa small animal", "\x1fa dog"])
    assert torch.equal(tokens, tokenizer()(["a cat", ""]))
    assert torch.equal(second, tokenizer()(["a small animal", "a dog"]))
    with pytest.raises(ValueError, match="unpack"):
        taken_apart(SecondCaption("syn"), ["only one"])


def test_copy_in_another_process_gives_the_same_and_opens_files_itself(tmp_path: Path) -> None:
    file = stored(tmp_path / "x", text_features=unit_rows(1000, 64))
    for companion in (ReferenceFeatures(file), SecondCaption("syn")):
        joined = joined_tokenizer(tokenizer(), companion)
        sent = pickle.dumps(joined)
        assert b"memmap" not in sent
        for other in (pickle.loads(sent), copy.deepcopy(joined)):
            assert torch.equal(other("a\x1f7"), joined("a\x1f7"))


def test_reader_of_shards_is_put_back(tmp_path: Path) -> None:
    original = open_clip_train.data.tarfile_to_samples_nothrow
    data = ["--train-data", str(tmp_path / "0.tar")]
    args = parse_args(["--loss", "alip", "--alip-caption-key", "syn", *data])
    args.world_size = 1
    with pytest.raises(RuntimeError, match="number of dataset samples must be specified"):
        open_clip_train.data.get_wds_dataset(args, None, is_train=True, tokenizer=tokenizer())
    assert open_clip_train.data.tarfile_to_samples_nothrow is original
    assert companion_of(parse_args(["--loss", "rankclip"])) is None


# --- the model ------------------------------------------------------------------------------------------


def model() -> nn.Module:
    torch.manual_seed(0)
    tower = {"width": 32, "layers": 1}
    return open_clip.CLIP(
        embed_dim=16,
        vision_cfg={"image_size": 16, "patch_size": 8, "head_width": 16, **tower},
        text_cfg={"context_length": CONTEXT, "vocab_size": 49408, "heads": 2, **tower},
        output_dict=True,
    ).double()


IMAGES = torch.randn(3, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
TITLES = [f"text {i}" for i in range(3)]


# The compiler reads .grad of tensors that are not leaves, which warns.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize(("named", "wrap"), [(False, ""), (True, "module"), (True, "compile")])
def test_companions_join_the_output_of_one_call_of_the_model(tmp_path: Path, named: bool, wrap: str) -> None:
    arrays = {name: unit_rows(3, 5, seed) for seed, name in enumerate(NAMES)}
    features = ReferenceFeatures(stored(tmp_path / "x", **arrays))
    plain, tokens, others = model(), tokenizer()(TITLES), tokenizer()([f"other {i}" for i in range(3)])
    expected, second = plain(IMAGES, tokens), plain(IMAGES, others)
    for companion, follow in ((features, "{}"), (SecondCaption("syn"), "other {}")):
        clip = model()
        wrapped = {"module": nn.DataParallel, "compile": functools.partial(torch.compile, backend="eager")}
        call = wrapped[wrap](clip) if wrap else clip
        calls: list[int] = []
        clip.transformer.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        texts = joined_tokenizer(tokenizer(), companion)(
            [f"{title}\x1f{follow.format(i)}" for i, title in enumerate(TITLES)]
        )
        split_features(call, companion)
        output = call(image=IMAGES, text=texts) if named else call(IMAGES, texts)
        assert len(calls) == 1
        for name, value in expected.items():
            torch.testing.assert_close(output[name], value)
        added = {name: output[name] for name in output if name not in expected}
        if companion is features:
            for name, array in arrays.items():
                found = added.pop(f"reference_{name}")
                assert torch.equal(found[:, :5], torch.from_numpy(array))
                assert not found.requires_grad
        else:
            torch.testing.assert_close(added.pop("caption_features"), second["text_features"])
            (output["text_features"].sum() + 3 * output["caption_features"].sum()).backward()
        assert added == {}
        # What has no companion passes untouched, after a call that had one.
        assert list(call(IMAGES, tokens)) == list(call(IMAGES)) == list(expected)
        assert clip.state_dict().keys() == plain.state_dict().keys()
        assert torch.equal(clip.encode_text(tokens), plain.encode_text(tokens))
        torch.compiler.reset()
    # Gradients flow from both captions into the one text tower.
    (expected["text_features"].sum() + 3 * second["text_features"].sum()).backward()
    for (name, a), b in zip(clip.named_parameters(), plain.parameters(), strict=True):
        if b.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, msg=name)
