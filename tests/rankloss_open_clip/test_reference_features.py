"""A teacher's features of each pair: from a folder to what the loss is called with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from open_clip_train.params import parse_args
from teacher_features import stored, unit_rows
from test_text_columns import CONTEXT, csv, read, tokenizer
from torch import Tensor

from rankloss_features import Features
from rankloss_features.binding import RowColumn
from rankloss_features.command import main
from rankloss_features.folder import NAMES
from rankloss_open_clip.text_columns import TextColumns
from rankloss_open_clip.training import run_of

OPTION = "--loss-teacher"
BOTH = unit_rows(4, 2)


def column_of(where: str) -> Any:
    return RowColumn(Features(where))


def taken_apart(column: Any, texts: list[str]) -> dict[str, Tensor]:
    """Features of texts, as the loss gets them."""
    encoded = TextColumns([column]).tokenizer(tokenizer())(texts)
    assert encoded.dtype == torch.int64
    assert torch.equal(encoded[:, 0, :CONTEXT], tokenizer()([text.split("\x1f")[0] for text in texts]))
    return column.outputs({}, encoded[:, 1])


def features_of(*samples: dict[str, Any], where: str) -> dict[str, Tensor]:
    """Features of a webdataset's samples."""
    column = column_of(where)
    return taken_apart(column, [x["txt"].decode() for x in read([column], *samples)])


# --- folders --------------------------------------------------------------------------------------------


def test_rows_of_features_are_those_of_the_table(tmp_path: Path) -> None:
    dataset, file = csv(tmp_path, "filepath;title\nfolder/1.png;a\n2.png;5\n")
    array, pairs = unit_rows(2, 2), [("1.png", "a"), ("2.png", "5")]
    column = column_of(stored(tmp_path / "x", pairs, text_features=array))
    other = column_of(stored(tmp_path / "other", pairs[::-1], text_features=array))
    with pytest.raises(ValueError, match=r"row 0 .* is row 1 "):
        other.read_rows(file, ";", dataset)
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
        assert "'NA'" in capsys.readouterr().err
    else:
        assert code == 0
        TextColumns([column := column_of(folder)]).join_csv(dataset, file, ";")
        assert float(dataset.captions[0].split("\x1f")[0]) == float(caption)
        assert len(taken_apart(column, list(dataset.captions))["reference_text_features"]) == 2


def test_rows_of_features_are_found_by_key_and_caption(tmp_path: Path) -> None:
    array = unit_rows(2, 2)
    folder = stored(tmp_path / "x", [("1", "b"), ("0", "a")], text_features=array)
    samples = {"txt": b"a"}, {"txt": b"b"}, {"syn": b"skipped by the trainer"}
    (found,) = features_of(*samples, where=folder).values()
    assert torch.equal(found, torch.from_numpy(array[::-1].copy()))
    for wrong in ({"txt": b"b"},), (*samples[:2], {"txt": b"a"}):
        with pytest.raises(ValueError, match=rf"sample '{len(wrong) - 1}' of a\.tar .*{folder}"):
            features_of(*wrong, where=folder)


# --- the command line -----------------------------------------------------------------------------------


def test_a_damaged_folder_is_refused_before_training(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = stored(tmp_path / "teacher", image_features=unit_rows(12, 3))
    file = tmp_path / "teacher/image_features-00000.npy"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(SystemExit):
        parse_args(["--loss", "rankclip", OPTION, folder])
    said = capsys.readouterr().err
    assert f"{OPTION}: {file} is not as it was written" in said


@pytest.mark.parametrize("loss", ["rankclip", "cyclip+rankclip"])
def test_features_of_two_widths_rank_the_in_modal_lists_alone(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, loss: str
) -> None:
    folder = stored(tmp_path / "teacher", **dict(zip(NAMES, (BOTH, unit_rows(4, 3)), strict=True)))
    assert run_of(parse_args(["--loss", "rankclip-in", OPTION, folder])).features is not None
    with pytest.raises(SystemExit):
        parse_args(["--loss", loss, OPTION, folder])
    assert "--rankclip-lambda-cross: must be 0" in capsys.readouterr().err


def test_sources_that_contradict_are_refused_with_both_names(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = stored(tmp_path / "teacher", image_features=BOTH, text_features=BOTH)
    for argv, named in (
        (f"rankclip {OPTION} {folder} --distill-model RN50 --distill-pretrained x", "--distill-model"),
        (f"cyclip {OPTION} {folder}", "cyclip"),
        (f"rankclip {OPTION} {tmp_path}/none", f"{tmp_path}/none"),
    ):
        with pytest.raises(SystemExit):
            parse_args(["--loss", *argv.split()])
        said = capsys.readouterr().err.splitlines()[-1]
        assert f"{OPTION}: " in said
        assert named in said


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (f"rankclip {OPTION} FOLDER", "row 0 of FILE, image '0.png' with caption 'a0', is row 1 of the 2 of"),
        (f"mimicry {OPTION} FOLDER", "row 0 of FILE, image '0.png'"),
        (f"rankclip-in {OPTION} text=FOLDER --csv-caption-key nope", "--csv-caption-key nope: "),
        (f"mimicry {OPTION} local-dir:no", f"{OPTION}: --model local-dir:no: there is no "),
        (
            "clip-ids --csv-separator ;",
            "has no column 'filepath'; it has filepath\ttitle\tcandidates\tgrades; wr",
        ),
        ("clip-ids --clip-ids-key nope", "--train-data: FILE has no column 'nope'"),
        ("alip --alip-caption-key nope", "--train-data: FILE has no column 'nope'"),
        ("ranked-lists", "--train-data: a list must have candidates, and a grade for each; got 1 candidates"),
        ("clip-ids --train-data no.csv", "--train-data: [Errno 2] No such file or directory: 'no.csv'"),
    ],
)
def test_what_is_not_the_datas_is_refused_before_the_trainer_makes_a_folder(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, options: str, named: str
) -> None:
    """By the parser, as the trainer makes it from the parsed arguments."""
    pairs = [("0.png", "a0"), ("1.png", "a1")]
    good = stored(tmp_path / "good", pairs, image_features=BOTH[:2], text_features=BOTH[:2])
    wrong = stored(tmp_path / "wrong", pairs[::-1], image_features=BOTH[:2], text_features=BOTH[:2])
    file, lists = tmp_path / "data.csv", "\tcandidates\tgrades\n"
    rows = [f'{image}\t{caption}\t["x"]\t[1{", 2" * n}]\n' for n, (image, caption) in enumerate(pairs)]
    file.write_text("".join(["filepath\ttitle", lists, *rows]))
    data = ["--train-data", str(file)]
    assert parse_args([*data, "--loss", "rankclip", OPTION, good]).loss_teacher == good
    options, named = (text.replace("FOLDER", wrong).replace("FILE", str(file)) for text in (options, named))
    with pytest.raises(SystemExit):
        parse_args([*data, "--loss", *options.split()])
    assert named in capsys.readouterr().err
