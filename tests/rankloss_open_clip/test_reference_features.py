"""A teacher's features of each pair: from a folder to what the loss is called with."""

from __future__ import annotations

import functools
import re
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from open_clip_train.params import parse_args
from teacher_features import stored, unit_rows
from test_text_columns import CONTEXT, csv, read, tokenizer
from torch import Tensor, nn

import batches
from rankloss import reference
from rankloss_features import Features
from rankloss_features.binding import RowColumn
from rankloss_features.command import main
from rankloss_features.folder import NAMES
from rankloss_open_clip.arguments import chosen
from rankloss_open_clip.text_columns import TextColumns
from rankloss_open_clip.training import build_loss, run_of, start

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
    with pytest.raises(ValueError, match=r"row 0 .* row 1 "):
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
        assert re.search("row 0 of .*'title'.*'NA'", capsys.readouterr().err)
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


@pytest.mark.parametrize("loss", ["rankclip", "cyclip+rankclip"])
def test_features_of_two_widths_rank_the_in_modal_lists_alone(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, loss: str
) -> None:
    folder = stored(tmp_path / "teacher", **dict(zip(NAMES, (BOTH, unit_rows(4, 3)), strict=True)))
    assert run_of(parse_args(["--loss", "rankclip-in", OPTION, folder])).features is not None
    with pytest.raises(SystemExit):
        parse_args(["--loss", loss, OPTION, folder])
    assert "--rankclip-lambda-cross: " in capsys.readouterr().err


def test_contradicting_sources_are_both_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
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
        (f"rankclip {OPTION} FOLDER", "FILE, '0.png' 'a0', FOLDER"),
        (f"mimicry {OPTION} FOLDER", "FILE, '0.png' 'a0', FOLDER"),
        (f"rankclip-in {OPTION} text=FOLDER --csv-caption-key nope", "--csv-caption-key nope: "),
        (f"mimicry {OPTION} local-dir:no", f"{OPTION}: --model local-dir:no: "),
        ("clip-ids --csv-separator ;", "'filepath' filepath\ttitle\tcandidates\tgrades"),
        ("clip-ids --clip-ids-key nope", "--train-data: FILE 'nope'"),
        ("alip --alip-caption-key nope", "--train-data: FILE 'nope'"),
        ("ranked-lists", "--train-data: candidates grade 1"),
        ("clip-ids --train-data no.csv", "--train-data: no.csv"),
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
    said = capsys.readouterr().err
    assert [word for word in named.split() if word not in said] == []


# --- data that hold the features, as MobileCLIP's patched trainer reads them ----------------------------

ROWS = 12


class DRClipLoss(nn.Module):
    """The patch's own loss: it needs the teacher's features, and takes those of synthetic captions."""

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        dist_image_features: Tensor,
        dist_text_features: Tensor,
        syn_text_features: Tensor | None = None,
        dist_syn_text_features: Tensor | None = None,
        output_dict: bool = False,
    ) -> dict[str, Tensor]:
        assert output_dict
        distances = (image_features - text_features).square().sum()
        return {
            "contrastive_loss": distances,
            "distill_loss": dist_image_features.sum() + dist_text_features.sum(),
        }


unit = functools.partial(batches.unit, dtype=torch.float32)
STUDENT = {"image_features": unit(ROWS, 8, seed=0), "text_features": unit(ROWS, 8, seed=1)}
# Two teachers side by side.
TEACHER = {
    f"dist_{name}": torch.cat([unit(ROWS, 5, seed=seed), unit(ROWS, 4, seed=seed + 1)], 1)
    for name, seed in (("image_features", 2), ("text_features", 4))
}
SYNTHETIC = {
    "syn_text_features": unit(ROWS, 8, seed=6),
    "dist_syn_text_features": TEACHER["dist_text_features"],
}


def arguments(**options: Any) -> Namespace:
    given = {"loss": "rankclip", "rankclip_schedule": "constant", "rankclip_top_k": 4, **options}
    return Namespace(dataset_reinforcement=True, epochs=2, device="cpu", **given)


@pytest.mark.parametrize("options", [{"loss_teacher": "given"}, {}])
def test_a_loss_that_is_taught_replaces_the_distillation(options: dict[str, str]) -> None:
    loss = build_loss(DRClipLoss(), arguments(**options), sums_every_value=True)
    loss.start_epoch(0, 2, 1, 1)
    found = loss(**STUDENT, logit_scale=torch.tensor(10.0), **TEACHER, **SYNTHETIC, output_dict=True)
    if options:
        assert "distill_loss" not in found
    else:
        assert found["distill_loss"] == sum(x.sum() for x in TEACHER.values())
    given = {f"reference_{name.removeprefix('dist_')}": x.numpy() for name, x in TEACHER.items()}
    taught = given if options else {}
    students = {name: x.double().numpy() for name, x in STUDENT.items()}
    expected = reference.cross_modal(**students, logit_scale=10.0, **taught, top_k=4)
    assert found["cross_modal_raw"].item() == pytest.approx(expected, rel=1e-5)


def test_without_its_distillation_the_base_is_clips() -> None:
    loss = build_loss(DRClipLoss(), arguments(loss="rankclip-distill"), sums_every_value=True)
    loss.start_epoch(0, 2, 1, 1)
    found = loss(**STUDENT, logit_scale=torch.tensor(10.0), **TEACHER, **SYNTHETIC, output_dict=True)
    logits = 10 * STUDENT["image_features"] @ STUDENT["text_features"].T
    expected = (
        F.cross_entropy(logits, torch.arange(ROWS)) + F.cross_entropy(logits.T, torch.arange(ROWS))
    ) / 2
    torch.testing.assert_close(found["contrastive_loss"], expected)
    assert "distill_loss" not in found


def test_the_option_names_a_teacher(tmp_path: Path) -> None:
    args = arguments(loss="rankclip-distill")
    assert start(args, *chosen(args)).use_of_teacher == "required"
    args.loss_teacher = stored(tmp_path / "x", text_features=unit_rows(4, 2))
    with pytest.raises(ValueError, match=r"--loss-teacher: .*--dataset-reinforcement"):
        start(args, *chosen(args))
