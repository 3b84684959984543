"""Columns beside the captions: read, sent through the trainer's data path, taken apart before the model."""

from __future__ import annotations

import copy
import functools
import io
import json
import pickle
import re
import tarfile
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import open_clip
import open_clip_train.data
import pandas
import pytest
import torch
from open_clip_train.params import parse_args
from stand_ins import refusal_of_command
from teacher_features import student_before_last_step, unit_rows
from torch import Tensor, nn
from trainer_runs import RANKCLIP_IN_WHOLE_BATCHES, Trainer

import rankloss
from rankloss_features import Features
from rankloss_features.command import main
from rankloss_features.data import Shards, extensions, open_data
from rankloss_features.folder import NAMES, identity_of
from rankloss_open_clip.columns import teacher_rows
from rankloss_open_clip.columns.captions import Caption, CaptionsOfRows
from rankloss_open_clip.columns.pair_ids import PairIds
from rankloss_open_clip.columns.second_caption import SecondCaption
from rankloss_open_clip.columns.teacher_rows import RowColumn
from rankloss_open_clip.columns.text_columns import Members, TextColumn, TextColumns
from rankloss_open_clip.training import run_of
from stored_features import features_folder

CONTEXT = 16  # tokens of a caption, as in the tiny model
SECOND_CAPTION = SecondCaption(caption_key="syn")


@functools.cache
def tokenizer() -> open_clip.SimpleTokenizer:
    """The tokenizer of the tiny model."""
    return open_clip.SimpleTokenizer(context_length=CONTEXT)


def read_samples(
    parts: list[TextColumn], *samples: dict[str, Any], members: Members | None = None
) -> list[dict[str, Any]]:
    """The samples of a shard ``a.tar``, with columns; their keys are "0", "1", …, and each has a picture."""

    def reader(source: str, handler: str) -> Iterator[dict[str, Any]]:
        for i, sample in enumerate(samples):
            yield {"__key__": str(i), "__url__": source, "jpg": b"...", **sample}

    return list(TextColumns(parts).join_samples(reader, members or Members(), "a.tar", handler="handler"))


def decoded_captions(samples: list[dict[str, Any]], key: str = "txt") -> list[Caption]:
    """The captions of samples, as the trainer decodes them."""
    return [sample[key].decode("utf-8") for sample in samples]


def csv_dataset(folder: Path, text: str) -> tuple[Any, str]:
    """The trainer's dataset of a CSV file with this text, and the file's path."""
    file = folder / "data.csv"
    file.write_text(text)
    dataset = open_clip_train.data.CsvDataset(str(file), None, "filepath", "title", sep=";")
    return dataset, str(file)


# --- reading --------------------------------------------------------------------------------------------


def test_first_caption_is_the_one_the_trainer_prefers() -> None:
    """A ``txt`` where there is one, else a ``caption``; the columns stand beside it, and beside no other."""
    without_txt = {"caption": b"a", "syn": b"b"}
    with_both = {"txt": b"c", "caption": b"d", "syn": b"e"}
    without_column = {"txt": b"f"}  # which is skipped
    samples = read_samples(
        [SECOND_CAPTION],
        *(without_txt, with_both, without_column),
        members=Members(captions=extensions("txt; caption")),
    )
    first, second = samples
    (of_first,), (of_second,) = decoded_captions([first], "caption"), decoded_captions([second], "txt")
    assert (of_first, of_first.columns) == ("a", ("b",))
    assert (of_second, of_second.columns) == ("c", ("e",))
    assert type(second["caption"]) is bytes


SKIPPED = {
    "no caption": {"jpg": b"...", "syn": b"a"},
    "no picture": {"txt": b"a", "syn": b"a"},
    "a blank caption": {"jpg": b"...", "txt": b" \n", "syn": b"a"},
}


@pytest.mark.parametrize("sample", SKIPPED.values(), ids=SKIPPED.keys())
def test_a_sample_that_the_trainer_skips_is_left_to_it_and_its_columns_are_not_read(
    sample: dict[str, Any],
) -> None:
    column = mock.Mock(read_sample=mock.Mock(side_effect=LookupError))
    column.name = "column"
    members = Members(images=("jpg",), skips_blank=True)
    assert list(TextColumns([column]).join_samples(lambda: [sample], members)) == [sample]
    complete = {"jpg": b"...", "txt": b"a", "syn": b"a"}
    with pytest.raises(LookupError):  # the column is read where nothing is missing
        list(TextColumns([column]).join_samples(lambda: [complete], members))


def test_a_blank_caption_has_columns_where_the_trainer_does_not_skip_it() -> None:
    (sample,) = read_samples([SECOND_CAPTION], {"txt": b"", "syn": b"a"}, members=Members(skips_blank=False))
    assert sample["txt"].decode("utf-8").columns == ("a",)


@pytest.mark.parametrize("loss", ["rankclip", "clip-ids", "ranked-lists"])
def test_a_wrong_separator_is_named_before_a_row_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], loss: str
) -> None:
    """Also where the loss reads no column.

    The separator is the trainer's default, a tab. With it the last row has three cells under a header of one,
    so that an attempt to read the rows would fail with pandas's own message.
    """
    (tmp_path / "data.csv").write_text("filepath,title\n0.png,a\n1.png,a\tb\tc\n")
    message = refusal_of_command(capsys, "--loss", loss, "--train-data", str(tmp_path / "data.csv"))
    for named in ("--train-data", "'filepath'", "filepath,title", "--csv-separator"):
        assert named in message


@pytest.mark.parametrize("loss", ["rankclip", "clip-ids", "ranked-lists"])
def test_shards_are_not_read_as_a_table_when_the_command_line_is_parsed(tmp_path: Path, loss: str) -> None:
    shard = tmp_path / "data.tar"
    shard.write_bytes(b"no table")
    parse_args(["--loss", loss, "--train-data", str(shard)])  # does not raise


def test_a_file_is_read_once_for_its_check_and_all_its_columns(tmp_path: Path) -> None:
    parts = [SECOND_CAPTION, PairIds(key="group"), PairIds(key="title")]
    dataset, file = csv_dataset(tmp_path, "filepath;title;syn;group\n0.png;a;b;1\n1.png;c;d;2\n")
    with mock.patch("pandas.read_csv", wraps=pandas.read_csv) as reads:
        TextColumns(parts).check_csv(file, ";", "filepath", "title")
        TextColumns(parts).join_csv(dataset, file, ";")
    # Others read the header, or a column, alone.
    of_whole_file = [call for call in reads.mock_calls if not {"nrows", "usecols"} & call.kwargs.keys()]
    assert len(of_whole_file) == 1


def test_a_file_that_has_changed_since_its_check_is_read_again(tmp_path: Path) -> None:
    _, file = csv_dataset(tmp_path, "filepath;title;syn\n0.png;a;b\n1.png;c;d\n")
    TextColumns([SECOND_CAPTION]).check_csv(file, ";", "filepath", "title")
    csv_dataset(tmp_path, "filepath;title;syn\n0.png;a;other\n")
    assert SECOND_CAPTION.read_rows(file, ";", None) == ["other"]


# The quotation mark before "a cat" ends at the hat: row 2 swallows the two lines below it.
SWALLOWED = """filepath;title;group
0.png;a dog;0
1.png;"big" dog;1
2.png;"a cat;2
3.png;a mat;3
4.png;the hat";4
5.png;a bat;5
"""
REFUSAL_OF_SWALLOWED = "row 2 of {file}, column 'title': the cell 'a cat;2' goes on for 2 more lines"


@pytest.mark.parametrize("loss", ["rankclip", "clip-ids --clip-ids-key group"])
def test_a_cell_that_swallows_rows_is_refused_before_a_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], loss: str
) -> None:
    """Also where the loss, as RankCLIP's, reads no column. The mended file is accepted."""
    dataset, file = csv_dataset(tmp_path, SWALLOWED)
    assert len(dataset) == 4, "the trainer itself reads four of the six rows"
    command = f"--loss {loss} --csv-separator ; --train-data {file}".split()
    refusal = REFUSAL_OF_SWALLOWED.format(file=file)
    assert f"argument --train-data: {refusal}" in refusal_of_command(capsys, *command)
    quoted = SWALLOWED.replace('"a cat', '"""a"" cat"').replace('hat"', "hat")
    dataset, _ = csv_dataset(tmp_path, quoted)
    assert (len(dataset), dataset.captions[2]) == (6, '"a" cat')
    parse_args(command)  # does not raise


def test_a_csv_file_without_rows_is_refused_before_a_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "header.csv"
    file.write_text("filepath;title;group\n")
    command = f"--loss clip-ids --clip-ids-key group --csv-separator ; --train-data {file}".split()
    assert f"argument --train-data: {file} has no rows" in refusal_of_command(capsys, *command)


def test_a_cell_that_swallows_rows_is_refused_by_rankloss_features(tmp_path: Path) -> None:
    _, file = csv_dataset(tmp_path, SWALLOWED)
    keys = {"csv_separator": ";", "csv_img_key": "filepath", "csv_caption_key": "title"}
    with pytest.raises(ValueError, match=re.escape(REFUSAL_OF_SWALLOWED.format(file=file))):
        open_data(Namespace(data=file, dataset_type="auto", **keys))


@pytest.mark.parametrize("last_id", ["8", "x"], ids=["a column of numbers", "a column of texts"])
def test_ids_7_and_007_of_a_csv_file_are_two(tmp_path: Path, last_id: str) -> None:
    """Although pandas reads a column of numbers as 7 and 7."""
    rows = f"0.png;a;7\n1.png;b;007\n2.png;c;7\n3.png;d;{last_id}\n"
    dataset, file = csv_dataset(tmp_path, f"filepath;title;group\n{rows}")
    seven, zero_zero_seven, seven_again, _ = PairIds(key="group").read_rows(file, ";", dataset)
    assert seven == seven_again
    assert seven != zero_zero_seven


# Also with the control characters that a format of one text with separators would give a meaning.
@pytest.mark.parametrize("text", ["a\x1fb", "\x1b1", "", "a"])
def test_a_caption_with_columns_is_the_caption(text: str) -> None:
    second = text or "b"  # a blank one is none
    (sample,) = read_samples([SECOND_CAPTION], {"txt": text.encode(), "syn": second.encode()})
    (of_sample,) = decoded_captions([sample])
    (of_table,) = CaptionsOfRows([text], [[second]])
    for caption in (of_sample, str(of_table), pickle.loads(pickle.dumps(of_table))):
        assert (caption, hash(caption), caption.columns) == (text, hash(text), (second,))
    assert sample["txt"] == text.encode()


def test_a_column_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="a column has 2 rows beside 3 captions"):
        CaptionsOfRows(["a", "b", "c"], [range(3), ["x", "y"]])


def test_a_text_that_lost_its_columns_is_an_error() -> None:
    (caption,) = decoded_captions(read_samples([SECOND_CAPTION], {"txt": b" a ", "syn": b"b"}))
    tokenized = TextColumns([SECOND_CAPTION]).tokenizer(tokenizer())
    tokenized([caption])  # the caption itself has its columns
    stripped = caption.strip()
    for texts in (stripped, [caption, "a"]):
        with pytest.raises(TypeError, match="second caption 'syn' of caption 'a'"):
            tokenized(texts)


@pytest.mark.parametrize(
    ("count", "read"), [(1, 1), (1000, 100)], ids=["one sample", "more than are read in vain"]
)
def test_samples_without_any_column_are_an_error_that_shows_the_last_one_read(count: int, read: int) -> None:
    with pytest.raises(ValueError, match=f"none of {read} samples .*'syn'.* '{read - 1}', has jpg, txt"):
        read_samples([SECOND_CAPTION], *[{"txt": b"a"}] * count)


def test_the_last_sample_without_a_column_is_shown_where_samples_without_a_caption_follow() -> None:
    without_caption: list[dict[str, Any]] = [{}, {}]
    with pytest.raises(ValueError, match=r"the last one, '1', has jpg, txt$"):
        read_samples([SECOND_CAPTION], {"txt": b"a"}, {"txt": b"b"}, *without_caption)


def test_samples_without_a_column_are_skipped_where_one_of_the_first_hundred_has_it() -> None:
    samples = [{"txt": b"a"}] * 99 + [{"txt": b"a", "syn": b"b"}] + [{"txt": b"a"}] * 200
    assert [sample["__key__"] for sample in read_samples([SECOND_CAPTION], *samples)] == ["99"]


def test_an_empty_shard_is_no_error() -> None:
    assert read_samples([SECOND_CAPTION]) == []


def test_reader_of_shards_is_put_back_after_an_error(tmp_path: Path) -> None:
    """A run with columns replaces the trainer's reader of shards while the trainer builds its dataset."""
    original = open_clip_train.data.tarfile_to_samples_nothrow
    data = ["--train-data", str(tmp_path / "0.tar")]
    args = parse_args(["--loss", "tiny-caption", "--second-caption-key", "syn", *data])
    assert run_of(args).text_columns() is not None
    args.world_size = 1
    with pytest.raises(RuntimeError, match="number of dataset samples must be specified"):
        open_clip_train.data.get_wds_dataset(args, None, is_train=True, tokenizer=tokenizer())
    assert open_clip_train.data.tarfile_to_samples_nothrow is original


def test_a_loss_without_columns_leaves_the_texts_alone() -> None:
    assert run_of(parse_args(["--loss", "rankclip"])).text_columns() is None


# --- from the texts to the model's output ----------------------------------------------------------------


def tiny_model(trainer: Trainer) -> nn.Module:
    """The tiny model with the weights of one seed, in float64."""
    torch.manual_seed(0)
    path = f"local-dir:{trainer.directory / 'tiny'}"
    return open_clip.create_model(path, output_dict=True, load_weights=False).double()


IMAGES = torch.randn(3, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
CAPTIONS = [f"a{i}" for i in range(3)]
SECOND_CAPTIONS = [f"other {i}" for i in range(3)]


@dataclass(frozen=True)
class Call:
    """A call of a model whose texts have columns, beside a plain model with the same weights."""

    model: nn.Module
    wrapped: Any
    """The model in what ``torch.compile`` or DataParallel wraps around it."""
    output: dict[str, Tensor]
    calls_of_text_tower: int
    teacher: dict[str, np.ndarray]
    """The teacher's features."""
    plain: nn.Module
    plain_output: dict[str, Tensor]
    """The plain model's output, of the captions."""
    plain_output_of_second: dict[str, Tensor]
    """The plain model's output, of the second captions in place of the captions."""


@pytest.fixture(
    scope="module",
    params=["plain", "module", pytest.param("compile", marks=pytest.mark.slow)],
)
def call(
    request: pytest.FixtureRequest, trainer: Trainer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Call]:
    """Two columns, a second caption and a teacher's features, attached to a model."""
    folder = tmp_path_factory.mktemp("columns")
    rows = zip(CAPTIONS, SECOND_CAPTIONS, strict=True)
    lines = [f"{i}.png;{caption};{second}\n" for i, (caption, second) in enumerate(rows)]
    dataset, file = csv_dataset(folder, "filepath;title;syn\n" + "".join(lines))
    teacher = {name: unit_rows(3, 21, seed) for seed, name in enumerate(NAMES)}
    columns = TextColumns(
        [SECOND_CAPTION, RowColumn(Features(features_folder(folder / "teacher", **teacher)))]
    )

    plain, clip = tiny_model(trainer), tiny_model(trainer)
    wrappers = {
        "plain": lambda model: model,
        "module": nn.DataParallel,
        "compile": functools.partial(torch.compile, backend="eager"),
    }
    wrapped = wrappers[request.param](clip)
    calls: list[None] = []
    clip.transformer.register_forward_hook(lambda *_: calls.append(None))

    tokenized = columns.tokenizer(tokenizer())
    columns.join_csv(dataset, file, ";")
    # As the trainer's dataset does, in processes that are sent copies of both.
    dataset, tokenized = pickle.loads(pickle.dumps((dataset, copy.deepcopy(tokenized))))
    texts = torch.stack([tokenized([str(dataset.captions[i])])[0] for i in range(len(dataset))])
    columns.attach(wrapped)
    is_called_by_position = request.param == "plain"  # a caller may do either
    output = wrapped(IMAGES, texts) if is_called_by_position else wrapped(image=IMAGES, text=texts)
    yield Call(
        model=clip,
        wrapped=wrapped,
        output=output,
        calls_of_text_tower=len(calls),
        teacher=teacher,
        plain=plain,
        plain_output=plain(IMAGES, tokenizer()(CAPTIONS)),
        plain_output_of_second=plain(IMAGES, tokenizer()(SECOND_CAPTIONS)),
    )
    torch.compiler.reset()


def test_columns_leave_the_models_own_output_as_it_is(call: Call) -> None:
    for name, value in call.plain_output.items():
        torch.testing.assert_close(call.output[name], value)


def test_columns_join_the_output_of_one_call_of_the_model(call: Call) -> None:
    assert call.calls_of_text_tower == 1
    joined = {"reference_image_features", "reference_text_features", "caption_features"}
    assert call.output.keys() - call.plain_output.keys() == joined


def test_the_teachers_features_are_its_rows_without_a_gradient(call: Call) -> None:
    for name, rows in call.teacher.items():
        joined = call.output[f"reference_{name}"]
        assert torch.equal(joined, torch.from_numpy(rows))
        assert not joined.requires_grad


def test_the_second_captions_features_are_those_of_the_text_tower(call: Call) -> None:
    expected = call.plain_output_of_second["text_features"]
    torch.testing.assert_close(call.output["caption_features"], expected)


def test_gradients_flow_from_both_captions_into_the_one_text_tower(call: Call) -> None:
    """The factor 3 tells the second captions' part from the captions'."""
    (call.output["text_features"].sum() + 3 * call.output["caption_features"].sum()).backward()
    captions, second_captions = call.plain_output, call.plain_output_of_second
    (captions["text_features"].sum() + 3 * second_captions["text_features"].sum()).backward()
    expected = {name: x.grad for name, x in call.plain.named_parameters() if x.grad is not None}
    assert "text_projection" in expected
    for name, gradient in expected.items():
        torch.testing.assert_close(call.model.get_parameter(name).grad, gradient, msg=name)


def test_a_batch_without_columns_passes_untouched_after_one_that_had_them(call: Call) -> None:
    """Also pictures alone, as the trainer's evaluation calls the model."""
    own_names = list(call.plain_output)
    assert list(call.wrapped(IMAGES, tokenizer()(CAPTIONS))) == own_names
    assert list(call.wrapped(IMAGES)) == own_names


def test_columns_add_nothing_to_the_models_state(call: Call) -> None:
    assert call.model.state_dict().keys() == call.plain.state_dict().keys()


# --- a teacher's features ------------------------------------------------------------------------------


def teacher_column(folder: str) -> Any:
    """The column of a folder with a teacher's features."""
    return RowColumn(Features(folder))


def encoded_column(column: Any, texts: Sequence[str]) -> Tensor:
    """The integers of the one column of texts, which stand behind the captions' own tokens."""
    tokens, of_column = TextColumns([column]).tokenizer(tokenizer())(list(texts)).unbind(1)
    assert tokens.dtype == torch.int64
    assert torch.equal(tokens[:, :CONTEXT], tokenizer()(list(texts)))
    return of_column


def teacher_features(column: Any, texts: Sequence[str]) -> dict[str, Tensor]:
    """The teacher's features of texts, as the loss gets them."""
    return column.outputs({}, encoded_column(column, texts))


def teacher_features_of_samples(*samples: dict[str, Any], folder: str) -> dict[str, Tensor]:
    """The teacher's features of webdataset samples, whose rows are found in a folder."""
    column = teacher_column(folder)
    return teacher_features(column, decoded_captions(read_samples([column], *samples)))


@dataclass(frozen=True)
class Table:
    """A CSV file of two pairs, whose pictures are in different folders."""

    dataset: Any
    file: str
    pairs: list[tuple[str, str]]
    """The pictures' paths, from the data's folder, and the captions."""


@pytest.fixture
def table(tmp_path: Path) -> Table:
    """Two pairs whose pictures, in two folders, have the same content."""
    pairs = [("folder/1.png", "a"), ("2.png", "5")]
    (tmp_path / "folder").mkdir()
    for picture, _ in pairs:
        (tmp_path / picture).write_bytes(b"a picture")
    lines = [f"{tmp_path / picture};{caption}\n" for picture, caption in pairs]
    dataset, file = csv_dataset(tmp_path, "filepath;title\n" + "".join(lines))
    return Table(dataset, file, pairs)


def test_rows_of_features_are_those_of_the_table(tmp_path: Path, table: Table) -> None:
    rows = unit_rows(2, 2)
    column = teacher_column(features_folder(tmp_path / "teacher", table.pairs, text_features=rows))
    TextColumns([column]).join_csv(table.dataset, table.file, ";")
    first, second = table.dataset.captions
    (features,) = teacher_features(column, [second, first]).values()
    assert torch.equal(features, torch.from_numpy(rows[[1, 0]]))


def test_pictures_are_not_opened_for_a_teacher_of_texts(tmp_path: Path, table: Table) -> None:
    column = teacher_column(features_folder(tmp_path / "teacher", table.pairs, text_features=unit_rows(2, 2)))
    with mock.patch.object(teacher_rows, "content_of", side_effect=AssertionError):
        TextColumns([column]).join_csv(table.dataset, table.file, ";")
        teacher_features(column, list(table.dataset.captions))


def test_features_of_the_same_pairs_in_another_order_are_refused(tmp_path: Path, table: Table) -> None:
    reversed_folder = features_folder(tmp_path / "teacher", table.pairs[::-1], text_features=unit_rows(2, 2))
    with pytest.raises(ValueError, match=r"row 0 .* row 1 "):
        teacher_column(reversed_folder).read_rows(table.file, ";", table.dataset)


def features_command(tmp_path: Path, file: str) -> int:
    """The exit code of ``rankloss features`` with two stored features, for the pairs of a file."""
    np.savez(tmp_path / "features.npz", text_features=unit_rows(2, 2))
    data = ["--data", file, "--csv-separator", ";", "--features", str(tmp_path / "features.npz")]
    return main(["--output", str(tmp_path / "teacher"), *data])


def test_command_and_trainer_read_a_caption_of_digits_alike(tmp_path: Path) -> None:
    """The trainer reads with pandas, which makes the number 7 of 007."""
    dataset, file = csv_dataset(tmp_path, "filepath;title\n1.png;007\n2.png;5\n")
    assert features_command(tmp_path, file) == 0
    column = teacher_column(str(tmp_path / "teacher"))
    TextColumns([column]).join_csv(dataset, file, ";")  # refuses captions other than the folder's
    assert float(dataset.captions[0]) == 7
    assert len(teacher_features(column, list(dataset.captions))["reference_text_features"]) == 2


def test_a_caption_that_the_trainer_takes_for_a_missing_value_is_refused_by_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, file = csv_dataset(tmp_path, "filepath;title\n1.png;NA\n2.png;5\n")
    assert features_command(tmp_path, file) == 1
    assert re.search("row 0 of .*'title'.*'NA'", capsys.readouterr().err)


FIRST, SECOND = {"txt": b"a", "jpg": b"first"}, {"txt": b"b", "jpg": b"second"}
ROW_OF_SECOND, ROW_OF_FIRST = 0, 1  # of the folder below


@pytest.fixture
def folder_of_two_samples(tmp_path: Path) -> str:
    """A teacher's folder of both samples, in the other order."""
    pairs = [(identity_of(b"second"), "b"), (identity_of(b"first"), "a")]
    return features_folder(tmp_path / "teacher", pairs, text_features=unit_rows(2, 2))


@pytest.mark.parametrize(
    ("samples", "rows"),
    [
        pytest.param((FIRST, SECOND), [ROW_OF_FIRST, ROW_OF_SECOND], id="first, second"),
        pytest.param((SECOND, FIRST), [ROW_OF_SECOND, ROW_OF_FIRST], id="second, first"),
    ],
)
def test_rows_of_features_are_found_by_the_pictures_content_and_the_caption(
    folder_of_two_samples: str, samples: tuple[dict[str, bytes], ...], rows: list[int]
) -> None:
    """In any order, so a sample's key, which counts the samples here, says nothing."""
    (features,) = teacher_features_of_samples(*samples, folder=folder_of_two_samples).values()
    assert torch.equal(features, torch.from_numpy(unit_rows(2, 2)[rows]))


@pytest.mark.parametrize(
    "samples",
    [
        pytest.param(({**SECOND, "txt": b"a"},), id="another caption"),
        pytest.param((FIRST, SECOND, {**FIRST, "jpg": b"another"}), id="another picture"),
    ],
)
def test_a_sample_with_another_picture_or_caption_than_the_features_is_refused(
    folder_of_two_samples: str, samples: tuple[dict[str, bytes], ...]
) -> None:
    """The last of the samples is the wrong one."""
    key = f"{len(samples) - 1}"
    message = rf"sample '{key}' of a\.tar .*{folder_of_two_samples}.* another picture or caption"
    with pytest.raises(ValueError, match=message):
        teacher_features_of_samples(*samples, folder=folder_of_two_samples)


def test_the_picture_of_a_sample_is_the_one_that_the_trainer_takes(folder_of_two_samples: str) -> None:
    column, two_pictures = teacher_column(folder_of_two_samples), {**FIRST, "png": b"another"}
    read_samples([column], two_pictures, members=Members(images=("jpg", "png")))  # does not raise
    with pytest.raises(ValueError, match="sample '0' of"):
        read_samples([column], two_pictures, members=Members(images=("png", "jpg")))


@dataclass(frozen=True)
class PicturesOfTable:
    """Three pictures of a CSV file, and the column of a teacher that has read them."""

    files: list[Path]
    dataset: Any
    table: str
    column: Any


@pytest.fixture
def pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PicturesOfTable:
    """Pictures of which the first and the last are compared before a training, as some are of a long file."""
    monkeypatch.setattr(teacher_rows, "some_rows", lambda rows: [0, rows - 1])
    contents = [b"first", b"second", b"third"]
    files = [tmp_path / f"{i}.png" for i in range(3)]
    for file, content in zip(files, contents, strict=True):
        file.write_bytes(content)
    lines = "".join(f"{file};a{i}\n" for i, file in enumerate(files))
    dataset, table = csv_dataset(tmp_path, f"filepath;title\n{lines}")
    folder = features_folder(tmp_path / "teacher", pictures=contents, text_features=unit_rows(3, 2))
    return PicturesOfTable(files, dataset, table, teacher_column(folder))


def refusal_of_picture(pictures: PicturesOfTable, row: int) -> str:
    """A pattern of the error for a row's picture that the teacher has not read."""
    file = pictures.files[row]
    return re.escape(f"row {row} of {pictures.table}: the picture '{file}' is not the one that the features")


@pytest.mark.parametrize("row", [0, 1])
def test_a_picture_that_has_changed_is_refused_where_the_trainer_reads_it(
    pictures: PicturesOfTable, row: int
) -> None:
    TextColumns([pictures.column]).join_csv(pictures.dataset, pictures.table, ";")
    tokenized = TextColumns([pictures.column]).tokenizer(tokenizer())
    dataset, tokenized = pickle.loads(pickle.dumps((pictures.dataset, tokenized)))  # as a worker has them
    tokenized(list(dataset.captions))  # while no picture has changed
    pictures.files[row].write_bytes(b"another")
    with pytest.raises(ValueError, match=refusal_of_picture(pictures, row)):
        tokenized([dataset.captions[row]])
    tokenized([dataset.captions[2]])  # whose picture is the same


def test_reading_rows_refuses_a_changed_picture_among_those_it_compares(
    pictures: PicturesOfTable,
) -> None:
    pictures.column.read_rows(pictures.table, ";", pictures.dataset)  # while no picture has changed
    pictures.files[0].write_bytes(b"another")  # row 0 is compared, see the fixture
    with pytest.raises(ValueError, match=refusal_of_picture(pictures, row=0)):
        pictures.column.read_rows(pictures.table, ";", pictures.dataset)


# --- ids of pairs -----------------------------------------------------------------------------------------


def pair_ids(column: PairIds, texts: Sequence[str]) -> list[int]:
    """The ids of texts, as the loss gets them."""
    ids: list[int] = column.outputs({}, encoded_column(column, texts))["pair_ids"].tolist()
    return ids


@pytest.mark.parametrize(
    ("key", "partners"),
    [
        pytest.param("captions", (0, 2), id="the captions a, b, a"),
        pytest.param("group", (1, 2), id="a column x, y, y"),
    ],
)
def test_rows_with_an_equal_caption_or_an_equal_cell_of_a_column_have_one_id(
    tmp_path: Path, key: str, partners: tuple[int, int]
) -> None:
    dataset, file = csv_dataset(tmp_path, "filepath;title;group\n0.png;a;x\n1.png;b;y\n2.png;a;y\n")
    column = PairIds(key=key)
    TextColumns([column]).join_csv(dataset, file, ";")
    ids = pair_ids(column, dataset.captions)
    with_one_id = [(i, j) for i, j in ((0, 1), (0, 2), (1, 2)) if ids[i] == ids[j]]
    assert with_one_id == [partners]


def samples_of_groups(*groups: str) -> list[dict[str, Any]]:
    """Samples whose caption, member ``group.txt`` and JSON field are their group; each key is another."""
    return [
        {"txt": group.encode(), "group.txt": group.encode(), "json": json.dumps({"group": group}).encode()}
        for group in groups
    ]


@pytest.mark.parametrize("key", ["captions", "group.txt", "json:group"])
def test_samples_with_an_equal_caption_or_member_have_one_id(key: str) -> None:
    column = PairIds(key=key)
    samples = read_samples([column], *samples_of_groups("x", "y", "x"))
    first, other, partner = pair_ids(column, decoded_captions(samples))
    assert first == partner
    assert first != other


SPELLINGS_OF_ONE_ID = pytest.mark.parametrize(
    ("key", "members"),
    [
        pytest.param("id", [{"id": b"7"}, {"id": b"7\n"}, {"id": b" 7\r\n"}], id="files, with ends of lines"),
        pytest.param(
            "json:id", [{"json": b'{"id": 7}'}, {"json": b'{"id": "7"}'}], id="JSON, number and text"
        ),
    ],
)


@SPELLINGS_OF_ONE_ID
def test_an_id_of_samples_is_one_in_a_training_however_it_is_written(
    key: str, members: list[dict[str, bytes]]
) -> None:
    column = PairIds(key=key)
    samples = read_samples([column], *({"txt": b"a", **member} for member in members))
    ids = pair_ids(column, decoded_captions(samples))
    assert len(ids) == len(members)
    assert len(set(ids)) == 1


@SPELLINGS_OF_ONE_ID
def test_an_id_of_samples_is_one_in_an_evaluation_however_it_is_written(
    tmp_path: Path, key: str, members: list[dict[str, bytes]]
) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as shard:
        for number, member in enumerate(members):
            for extension, content in {"jpg": b"...", "txt": b"a", **member}.items():
                file = tarfile.TarInfo(f"{number}.{extension}")
                file.size = len(content)
                shard.addfile(file, io.BytesIO(content))
    data = Shards(str(tmp_path / "a.tar"), id_key=key)
    assert [len(block.captions) for block in data.pairs()] == [len(members)]  # which reads the ids
    assert data.ids == ["7"] * len(members)


def test_samples_of_one_group_have_two_ids_by_their_keys() -> None:
    column = PairIds(key="__key__")
    samples = read_samples([column], *samples_of_groups("x", "y", "x"))
    assert len(set(pair_ids(column, decoded_captions(samples)))) == 3


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        pytest.param(("x", ""), "group .*row 1 has float nan", id="an empty cell"),
        pytest.param(("7", "7"), "group .*2 rows", id="one id for all rows"),
    ],
)
def test_a_column_of_no_ids_is_refused(tmp_path: Path, groups: tuple[str, ...], message: str) -> None:
    rows = "".join(f"{i}.png;a;{group}\n" for i, group in enumerate(groups))
    dataset, file = csv_dataset(tmp_path, f"filepath;title;group\n{rows}")
    with pytest.raises(ValueError, match=message):
        PairIds(key="group").read_rows(file, ";", dataset)


def test_a_sample_without_an_id_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'1' of a\.tar .*'group\.txt'.*jpg, txt"):
        read_samples([PairIds(key="group.txt")], {"txt": b"a", "group.txt": b"x"}, {"txt": b"b"})


def test_a_run_leaves_partners_out(trainer: Trainer) -> None:
    """Joined with RankCLIP's terms, which need no ids. The batch of each step is the whole set."""
    # Some odd rows share a group; each even row is a group by itself.
    groups = [row // 3 if row % 2 else 100 + row for row in range(len(trainer.rows))]
    lines = ["filepath\ttitle\tgroup"]
    for (picture, title, _), group in zip(trainer.rows, groups, strict=True):
        lines.append(f"{picture}\t{title}\tgroup {group}")
    file = trainer.directory / "groups.csv"
    file.write_text("\n".join(lines) + "\n")
    options = ["--loss", "clip-ids+rankclip", "--clip-ids-key", "group", "--train-data", str(file)]
    run = trainer.call("clip-ids", *RANKCLIP_IN_WHOLE_BATCHES, *options)
    assert "Loss: clip-ids+rankclip (rankloss" in run.log

    features, scale = student_before_last_step(trainer, run)  # at the second step, whose number is 1
    both = [torch.from_numpy(features[name]) for name in ("image_features", "text_features")]
    plain = rankloss.ClipLoss()(*both, scale).item()
    without_partners = rankloss.ClipLoss(same_id="ignore")(*both, scale, pair_ids=torch.tensor(groups)).item()
    assert run.scalars["contrastive_loss"][1] == pytest.approx(without_partners, rel=1e-5)
    assert abs(plain / without_partners - 1) > 1e-3, "the tolerance tells the two apart"
    with_partner = [groups.count(group) > 1 for group in groups]
    share = sum(with_partner) / len(groups)
    assert run.scalars["pairs_with_partner"][1] == pytest.approx(share)
