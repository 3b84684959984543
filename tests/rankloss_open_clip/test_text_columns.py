"""TextColumns of a text: read, sent through the trainer's data path, and taken apart before the model."""

from __future__ import annotations

import copy
import functools
import json
import pickle
import re
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
from stand_ins import refused
from teacher_features import student, unit_rows
from torch import Tensor, nn
from trainer_runs import WHOLE_SET, Trainer

import rankloss
from rankloss_features import Features
from rankloss_features.command import main
from rankloss_features.data import extensions, open_data
from rankloss_features.folder import NAMES, identity_of
from rankloss_open_clip.columns import teacher_rows
from rankloss_open_clip.columns.captions import Caption, CaptionsOfRows
from rankloss_open_clip.columns.pair_ids import PairIds
from rankloss_open_clip.columns.second_caption import SecondCaption
from rankloss_open_clip.columns.teacher_rows import RowColumn
from rankloss_open_clip.columns.text_columns import Members, TextColumn, TextColumns
from rankloss_open_clip.training import run_of
from stored_features import stored

CONTEXT = 16
CAPTION = SecondCaption(caption_key="syn")


@functools.cache
def tokenizer() -> open_clip.SimpleTokenizer:
    return open_clip.SimpleTokenizer(context_length=CONTEXT)


def read(
    parts: list[TextColumn], *samples: dict[str, Any], members: Members | None = None
) -> list[dict[str, Any]]:
    def reader(source: str, handler: str) -> Iterator[dict[str, Any]]:
        for i, sample in enumerate(samples):
            yield {"__key__": str(i), "__url__": source, "jpg": b"...", **sample}

    return list(TextColumns(parts).join_samples(reader, members or Members(), "a.tar", handler="handler"))


def captions(samples: list[dict[str, Any]], key: str = "txt") -> list[Caption]:
    """The captions of samples, as the trainer decodes them."""
    return [sample[key].decode("utf-8") for sample in samples]


def csv(path: Path, text: str) -> tuple[Any, str]:
    file = path / "data.csv"
    file.write_text(text)
    dataset = open_clip_train.data.CsvDataset(str(file), None, "filepath", "title", sep=";")
    return dataset, str(file)


# --- reading --------------------------------------------------------------------------------------------


def test_first_caption_is_the_one_the_trainer_prefers() -> None:
    first, both, without = (
        {"caption": b"a", "syn": b"b"},
        {"txt": b"c", "caption": b"d", "syn": b"e"},
        {"txt": b"f"},
    )
    members = Members(captions=extensions("txt; caption"))
    samples = read([CAPTION], first, both, without, members=members)
    (one,), (other,) = captions(samples[:1], "caption"), captions(samples[1:])
    assert [(one, one.columns), (other, other.columns)] == [("a", ("b",)), ("c", ("e",))]
    assert type(samples[1]["caption"]) is bytes


SKIPPED: list[dict[str, Any]] = [
    {"jpg": b"...", "syn": b"no caption"},
    {"txt": b"no picture", "syn": b"a"},
    {"jpg": b"...", "txt": b" \n", "syn": b"a blank caption"},
]


@pytest.mark.parametrize("sample", SKIPPED)
def test_a_sample_that_the_trainer_skips_is_left_to_it_and_its_columns_are_not_read(
    sample: dict[str, Any],
) -> None:
    column = mock.Mock(read_sample=mock.Mock(side_effect=LookupError))
    column.name = "column"
    members = Members(images=("jpg",), skips_blank=True)
    assert list(TextColumns([column]).join_samples(lambda: [sample], members)) == [sample]
    with pytest.raises(LookupError):
        list(TextColumns([column]).join_samples(lambda: [{"jpg": b"...", "txt": b""}], Members()))


@pytest.mark.parametrize("loss", ["rankclip", "clip-ids", "ranked-lists"])
def test_a_wrong_separator_is_named_before_a_row_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], loss: str
) -> None:
    """Also where the loss reads no column, and where the rows cannot be read with this separator."""
    (tmp_path / "data.csv").write_text("filepath,title\n0.png,a\n1.png,a\tb\tc\n")
    said = refused(capsys, "--loss", loss, "--train-data", str(tmp_path / "data.csv"))
    assert all(x in said for x in ("--train-data", "'filepath'", "filepath,title", "--csv-separator"))
    parse_args(["--loss", loss, "--train-data", str(tmp_path / "data.tar")])


def test_a_file_is_read_once_for_its_check_and_all_its_columns(tmp_path: Path) -> None:
    """Beside the trainer's own reading; a file that has changed is read again."""
    parts = [CAPTION, PairIds(key="group"), PairIds(key="title")]
    dataset, file = csv(tmp_path, "filepath;title;syn;group\n0.png;a;b;1\n1.png;c;d;2\n")
    with mock.patch("pandas.read_csv", wraps=pandas.read_csv) as reads:
        TextColumns(parts).check_csv(file, ";", "filepath", "title")
        TextColumns(parts).join_csv(dataset, file, ";")
        whole = [call for call in reads.mock_calls if not {"nrows", "usecols"} & call.kwargs.keys()]
        assert len(whole) == 1
        TextColumns([CAPTION]).check_csv(file, ";", "filepath", "title")
        csv(tmp_path, "filepath;title;syn;group\n0.png;a;other;1\n")
        assert SecondCaption(caption_key="syn").read_rows(file, ";", None) == ["other"]


SWALLOWED = """filepath;title;group
0.png;a dog;0
1.png;"big" dog;1
2.png;"a cat;2
3.png;a mat;3
4.png;the hat";4
5.png;a bat;5
"""


@pytest.mark.parametrize("loss", ["rankclip", "clip-ids --clip-ids-key group"])
def test_a_cell_that_swallows_rows_is_refused_before_a_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], loss: str
) -> None:
    """Also where the loss reads no column."""
    dataset, file = csv(tmp_path, SWALLOWED)
    assert len(dataset) == 4, "the trainer itself reads four of the six rows"
    command = f"--loss {loss} --csv-separator ; --train-data {file}".split()
    reason = f"row 2 of {file}, column 'title': the cell 'a cat;2' goes on for 2 more lines"
    assert f"argument --train-data: {reason}" in refused(capsys, *command)
    keys = {"csv_separator": ";", "csv_img_key": "filepath", "csv_caption_key": "title"}
    with pytest.raises(ValueError, match=re.escape(reason)):
        open_data(Namespace(data=file, dataset_type="auto", **keys))
    dataset, _ = csv(tmp_path, SWALLOWED.replace('"a cat', '"""a"" cat"').replace('hat"', "hat"))
    assert (len(dataset), dataset.captions[2]) == (6, '"a" cat')
    parse_args(command)


@pytest.mark.parametrize("other", ["8", "x"])
def test_ids_of_a_csv_file_are_two_where_they_differ_by_a_zero(tmp_path: Path, other: str) -> None:
    dataset, file = csv(
        tmp_path, f"filepath;title;group\n0.png;a;7\n1.png;b;007\n2.png;c;{other}\n3.png;d;7\n"
    )
    ids = PairIds(key="group").read_rows(file, ";", dataset)
    assert ids[0] == ids[3]
    assert len(set(ids)) == 3


@pytest.mark.parametrize("text", ["a\x1fb", "\x1b1", "", "a"])
def test_a_caption_with_columns_is_the_caption(text: str) -> None:
    second = text or "b"  # a blank one is none
    (sample,) = read([CAPTION], {"txt": text.encode(), "syn": second.encode()})
    (table,) = CaptionsOfRows([text], [[second]])
    for caption in (*captions([sample]), str(table), pickle.loads(pickle.dumps(table))):
        assert (caption, hash(caption), caption.columns) == (text, hash(text), (second,))
    assert sample["txt"] == text.encode()


def test_a_column_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="a column has 2 rows beside 3 captions"):
        CaptionsOfRows(["a", "b", "c"], [range(3), ["x", "y"]])


def test_a_text_that_lost_its_columns_is_an_error() -> None:
    (caption,) = captions(read([CAPTION], {"txt": b" a ", "syn": b"b"}))
    tokenized = TextColumns([CAPTION]).tokenizer(tokenizer())
    tokenized([caption])
    for text in (caption.strip(), [caption, "a"]):
        with pytest.raises(TypeError, match="second caption 'syn' of caption 'a'"):
            tokenized(text)


@pytest.mark.parametrize("count", [1, 1000])
def test_samples_without_any_column_are_an_error_that_shows_one(count: int) -> None:
    shown = min(count, 100)
    with pytest.raises(ValueError, match=f"{shown} samples .*'syn'.* '{shown - 1}', has jpg, txt"):
        read([CAPTION], *[{"txt": b"a"}] * count)
    late = [{"txt": b"a"}] * 99 + [{"txt": b"a", "syn": b"b"}] + [{"txt": b"a"}] * 200
    assert len(read([CAPTION], *late)) == 1
    assert read([CAPTION]) == []


def test_reader_of_shards_is_put_back(tmp_path: Path) -> None:
    original = open_clip_train.data.tarfile_to_samples_nothrow
    data = ["--train-data", str(tmp_path / "0.tar")]
    args = parse_args(["--loss", "tiny-caption", "--second-caption-key", "syn", *data])
    args.world_size = 1
    with pytest.raises(RuntimeError, match="number of dataset samples must be specified"):
        open_clip_train.data.get_wds_dataset(args, None, is_train=True, tokenizer=tokenizer())
    assert open_clip_train.data.tarfile_to_samples_nothrow is original
    assert run_of(parse_args(["--loss", "rankclip"])).text_columns() is None


# --- from the texts to the model's output ----------------------------------------------------------------


def model(trainer: Trainer) -> nn.Module:
    torch.manual_seed(0)
    path = f"local-dir:{trainer.directory / 'tiny'}"
    return open_clip.create_model(path, output_dict=True, load_weights=False).double()


IMAGES = torch.randn(3, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
FILE = "filepath;title;syn\n" + "".join(f"{i}.png;a{i};other {i}\n" for i in range(3))


def tokens(text: str) -> Tensor:
    return tokenizer()([text.format(i) for i in range(3)])


@dataclass(frozen=True)
class Call:
    """A call of a model with columns, beside the model without them."""

    model: nn.Module
    wrapped: Any
    plain: nn.Module
    output: dict[str, Tensor]
    expected: dict[str, Tensor]
    """The output of the plain model."""
    second: dict[str, Tensor]
    """The plain model's, of the second captions."""
    arrays: dict[str, np.ndarray]
    """The teacher's features."""
    calls_of_text_tower: int


# The compiler reads .grad of tensors that are not leaves, which warns.
@pytest.fixture(
    scope="module",
    params=[(False, ""), (True, "module"), pytest.param((True, "compile"), marks=pytest.mark.slow)],
    ids=["plain", "module", "compile"],
)
def call(
    request: pytest.FixtureRequest, trainer: Trainer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Call]:
    """Two columns, a second caption and a teacher's features, attached to a model."""
    named, wrap = request.param
    tmp_path = tmp_path_factory.mktemp("columns")
    arrays = {name: unit_rows(3, 21, seed) for seed, name in enumerate(NAMES)}
    columns = TextColumns([CAPTION, RowColumn(Features(stored(tmp_path / "x", **arrays)))])
    plain, clip = model(trainer), model(trainer)
    expected, second = plain(IMAGES, tokens("a{}")), plain(IMAGES, tokens("other {}"))
    wrapped = {"module": nn.DataParallel, "compile": functools.partial(torch.compile, backend="eager")}
    outer = wrapped[wrap](clip) if wrap else clip
    calls: list[int] = []
    clip.transformer.register_forward_hook(lambda *_: calls.append(1))

    tokenized = columns.tokenizer(tokenizer())
    dataset, file = csv(tmp_path, FILE)
    columns.join_csv(dataset, file, ";")
    # As the trainer's dataset does, in processes that are sent copies of both.
    dataset, tokenized = pickle.loads(pickle.dumps((dataset, copy.deepcopy(tokenized))))
    texts = torch.stack([tokenized([str(dataset.captions[i])])[0] for i in range(len(dataset))])
    columns.attach(outer)
    output = outer(image=IMAGES, text=texts) if named else outer(IMAGES, texts)
    yield Call(clip, outer, plain, output, expected, second, arrays, len(calls))
    torch.compiler.reset()


def test_columns_leave_the_models_own_output_as_it_is(call: Call) -> None:
    for name, value in call.expected.items():
        torch.testing.assert_close(call.output[name], value)


def test_columns_join_the_output_of_one_call_of_the_model(call: Call) -> None:
    assert call.calls_of_text_tower == 1
    names = {f"reference_{name}" for name in call.arrays}
    assert call.output.keys() - call.expected.keys() == {*names, "caption_features"}


def test_the_teachers_features_are_its_rows_without_a_gradient(call: Call) -> None:
    for name, array in call.arrays.items():
        found = call.output[f"reference_{name}"]
        assert torch.equal(found, torch.from_numpy(array))
        assert not found.requires_grad


def test_the_second_captions_features_are_those_of_the_text_tower(call: Call) -> None:
    torch.testing.assert_close(call.output["caption_features"], call.second["text_features"])


def test_gradients_flow_from_both_captions_into_the_one_text_tower(call: Call) -> None:
    (call.output["text_features"].sum() + 3 * call.output["caption_features"].sum()).backward()
    (call.expected["text_features"].sum() + 3 * call.second["text_features"].sum()).backward()
    for (name, a), b in zip(call.model.named_parameters(), call.plain.parameters(), strict=True):
        if b.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, msg=name)


def test_a_batch_without_columns_passes_untouched_after_one_that_had_them(call: Call) -> None:
    assert list(call.wrapped(IMAGES, tokens("a{}"))) == list(call.wrapped(IMAGES)) == list(call.expected)


def test_columns_add_nothing_to_the_models_state(call: Call) -> None:
    assert call.model.state_dict().keys() == call.plain.state_dict().keys()


# --- a teacher's features ------------------------------------------------------------------------------


def column_of(where: str) -> Any:
    return RowColumn(Features(where))


def taken_apart(column: Any, texts: list[Caption]) -> dict[str, Tensor]:
    """Features of texts, as the loss gets them."""
    encoded = TextColumns([column]).tokenizer(tokenizer())(texts)
    assert encoded.dtype == torch.int64
    assert torch.equal(encoded[:, 0, :CONTEXT], tokenizer()(texts))
    return column.outputs({}, encoded[:, 1])


def features_of(*samples: dict[str, Any], where: str) -> dict[str, Tensor]:
    """Features of a webdataset's samples."""
    column = column_of(where)
    return taken_apart(column, captions(read([column], *samples)))


def test_rows_of_features_are_those_of_the_table(tmp_path: Path) -> None:
    files = [str(tmp_path / "folder/1.png"), str(tmp_path / "2.png")]
    (tmp_path / "folder").mkdir()
    for name in files:
        Path(name).write_bytes(b"a picture")
    dataset, file = csv(tmp_path, f"filepath;title\n{files[0]};a\n{files[1]};5\n")
    array, pairs = unit_rows(2, 2), [("folder/1.png", "a"), ("2.png", "5")]
    column = column_of(stored(tmp_path / "x", pairs, text_features=array))
    other = column_of(stored(tmp_path / "other", pairs[::-1], text_features=array))
    with pytest.raises(ValueError, match=r"row 0 .* row 1 "):
        other.read_rows(file, ";", dataset)
    with mock.patch.object(teacher_rows, "content_of", side_effect=AssertionError):  # a teacher of texts
        TextColumns([column]).join_csv(dataset, file, ";")
        (found,) = taken_apart(column, [dataset.captions[1], dataset.captions[0]]).values()
    assert torch.equal(found, torch.from_numpy(array[::-1].copy()))


@pytest.mark.parametrize("caption", ["007", "NA"])
def test_command_and_trainer_read_a_caption_alike_or_the_command_refuses_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caption: str
) -> None:
    """The trainer reads with pandas, which makes numbers, or missing values, of some captions."""
    dataset, file = csv(tmp_path, f"filepath;title\n1.png;{caption}\n2.png;5\n")
    np.savez(tmp_path / "given.npz", text_features=unit_rows(2, 2))
    folder, data = str(tmp_path / "teacher"), ["--data", file, "--csv-separator", ";"]
    code = main(["--output", folder, "--features", str(tmp_path / "given.npz"), *data])
    if caption == "NA":
        assert code == 1
        assert re.search("row 0 of .*'title'.*'NA'", capsys.readouterr().err)
    else:
        assert code == 0
        TextColumns([column := column_of(folder)]).join_csv(dataset, file, ";")
        assert float(dataset.captions[0]) == float(caption)
        assert len(taken_apart(column, list(dataset.captions))["reference_text_features"]) == 2


def test_rows_of_features_are_found_by_picture_and_caption(tmp_path: Path) -> None:
    """The picture is its content, under any key, and the one that the trainer takes."""
    array = unit_rows(2, 2)
    pairs = [(identity_of(b"second"), "b"), (identity_of(b"first"), "a")]
    folder = stored(tmp_path / "x", pairs, text_features=array)
    first, second = {"txt": b"a", "jpg": b"first"}, {"txt": b"b", "jpg": b"second"}
    for samples in ((first, second), (second, first)):
        (found,) = features_of(*samples, where=folder).values()
        rows = [1, 0] if samples[0] is first else [0, 1]
        assert torch.equal(found, torch.from_numpy(array[rows]))
    for wrong in ({**second, "txt": b"a"},), (first, second, {**first, "jpg": b"another"}):
        with pytest.raises(
            ValueError, match=rf"sample '{len(wrong) - 1}' of a\.tar .*{folder}.* another picture or caption"
        ):
            features_of(*wrong, where=folder)
    column, both = column_of(folder), {**first, "png": b"another"}
    read([column], both, members=Members(images=("jpg", "png")))
    with pytest.raises(ValueError, match="sample '0' of"):
        read([column], both, members=Members(images=("png", "jpg")))


@pytest.mark.parametrize("row", [0, 1])
def test_a_picture_that_has_changed_is_refused_where_the_trainer_reads_it(tmp_path: Path, row: int) -> None:
    """The first row's before the training, as one of few that are compared there."""
    contents = [b"first", b"second", b"third"]
    files = [tmp_path / f"{i}.png" for i in range(3)]
    for file, content in zip(files, contents, strict=True):
        file.write_bytes(content)
    lines = "".join(f"{file};a{i}\n" for i, file in enumerate(files))
    dataset, file = csv(tmp_path, f"filepath;title\n{lines}")
    as_read = copy.copy(dataset)
    column = column_of(stored(tmp_path / "x", pictures=contents, text_features=unit_rows(3, 2)))
    with mock.patch.object(teacher_rows, "some_rows", lambda rows: [0, rows - 1]):
        TextColumns([column]).join_csv(dataset, file, ";")
        tokenized = TextColumns([column]).tokenizer(tokenizer())
        dataset, tokenized = pickle.loads(pickle.dumps((dataset, tokenized)))  # as a worker has them
        tokenized(list(dataset.captions))
        files[row].write_bytes(b"another")
        named = re.escape(f"row {row} of {file}: the picture '{files[row]}' is not the one that the features")
        with pytest.raises(ValueError, match=named):
            tokenized([dataset.captions[row]])
        tokenized([dataset.captions[2]])
        if row == 0:
            with pytest.raises(ValueError, match=named):
                column.read_rows(file, ";", as_read)


# --- ids of pairs -----------------------------------------------------------------------------------------

TABLE = "filepath;title;group\n0.png;a;x\n1.png;b;y\n2.png;a;y\n"


def ids_of(column: Any, texts: Sequence[str]) -> list[int]:
    encoded = TextColumns([column]).tokenizer(tokenizer())(texts)
    found: list[int] = column.outputs({}, encoded[:, 1])["pair_ids"].tolist()
    return found


@pytest.mark.parametrize(("key", "equal"), [("captions", (0, 2)), ("group", (1, 2))])
def test_rows_have_the_ids_of_captions_or_of_a_column(
    tmp_path: Path, key: str, equal: tuple[int, int]
) -> None:
    dataset, file = csv(tmp_path, TABLE)
    TextColumns([column := PairIds(key=key)]).join_csv(dataset, file, ";")
    ids = ids_of(column, dataset.captions)
    pairs = ((0, 1), (0, 2), (1, 2))
    assert [pair for pair in pairs if ids[pair[0]] == ids[pair[1]]] == [equal]


@pytest.mark.parametrize("key", ["captions", "group.txt", "json:group", "__key__"])
def test_samples_have_the_ids_of_captions_members_or_keys(key: str) -> None:
    groups = ["x", "y", "x"]
    samples = [
        {"txt": group.encode(), "group.txt": group.encode(), "json": json.dumps({"group": group}).encode()}
        for group in groups
    ]
    column = PairIds(key=key)
    ids = ids_of(column, captions(read([column], *samples)))
    assert len({*ids}) == (3 if key == "__key__" else 2)
    assert (ids[0] == ids[2]) is (key != "__key__")


def test_a_column_of_no_ids_is_refused(tmp_path: Path) -> None:
    for groups, message in (("x ", "group .*row 1 has float nan"), ("77", "group .*2 rows")):
        text = "".join(f"{n}.png;a;{x.strip()}\n" for n, x in enumerate(groups))
        dataset, file = csv(tmp_path, f"filepath;title;group\n{text}")
        with pytest.raises(ValueError, match=message):
            PairIds(key="group").read_rows(file, ";", dataset)


def test_a_sample_without_an_id_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'1' of a\.tar .*'group\.txt'.*jpg, txt"):
        read([PairIds(key="group.txt")], {"txt": b"a", "group.txt": b"x"}, {"txt": b"b"})


def test_a_run_leaves_partners_out(trainer: Trainer) -> None:
    """Under RankCLIP's terms, which need no ids."""
    lines = ["filepath\ttitle\tgroup"]
    # Some odd rows share a group; each even row is a group by itself.
    groups = [n // 3 if n % 2 else 100 + n for n in range(len(trainer.rows))]
    lines += ["\t".join([*row[:2], f"group {x}"]) for row, x in zip(trainer.rows, groups, strict=True)]
    file = trainer.directory / "groups.csv"
    file.write_text("\n".join(lines) + "\n")
    options = ["--loss", "clip-ids+rankclip", "--clip-ids-key", "group", "--train-data", str(file)]
    run = trainer.call("clip-ids", *WHOLE_SET, *options)
    assert "Loss: clip-ids+rankclip (rankloss" in run.log
    features, scale = student(trainer, run)
    both = [torch.from_numpy(features[name]) for name in ("image_features", "text_features")]
    own, left_out = (
        rankloss.ClipLoss(same_id=same)(*both, scale, **ids).item()
        for same, ids in ((None, {}), ("ignore", {"pair_ids": torch.tensor(groups)}))
    )
    assert run.scalars["contrastive_loss"][1] == pytest.approx(left_out, rel=1e-5)
    assert abs(own / left_out - 1) > 1e-3
    counts = [groups.count(x) for x in groups]
    share = sum(x > 1 for x in counts) / len(counts)
    assert run.scalars["pairs_with_partner"][1] == pytest.approx(share)
