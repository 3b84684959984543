"""Ids of pairs in open_clip's trainer: from a CSV file or a webdataset to the loss."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from open_clip_train.params import parse_args
from teacher_features import student
from test_text_columns import csv, read, tokenizer
from trainer_runs import WHOLE_SET, Trainer

import rankloss
from rankloss_open_clip.text_columns import TextColumns
from rankloss_trainers.clip_ids import PairIds

TABLE = "filepath;title;group\n0.png;a;x\n1.png;b;y\n2.png;a;y\n"


def ids_of(column: Any, texts: list[str]) -> list[int]:
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
    assert [ids[i] == ids[j] for i, j in ((0, 1), (0, 2), (1, 2))] == [
        (i, j) == equal for i, j in ((0, 1), (0, 2), (1, 2))
    ]


@pytest.mark.parametrize("key", ["captions", "group.txt", "json:group", "__key__"])
def test_samples_have_the_ids_of_captions_members_or_keys(key: str) -> None:
    groups = ["x", "y", "x"]
    samples = [
        {"txt": group.encode(), "group.txt": group.encode(), "json": json.dumps({"group": group}).encode()}
        for group in groups
    ]
    column = PairIds(key=key)
    ids = ids_of(column, [x["txt"].decode() for x in read([column], *samples)])
    assert len({*ids}) == (3 if key == "__key__" else 2)
    assert (ids[0] == ids[2]) is (key != "__key__")


@pytest.mark.parametrize(
    ("text", "key", "message"),
    [
        (TABLE, "picture", "'picture'.*filepath, title, group"),
        ("filepath;title;group\n0.png;a;x\n1.png;b;\n", "group", "group .*nan in row 1"),
        ("filepath;title;group\n0.png;a;7\n1.png;b;7\n", "group", "group .*2 rows"),
    ],
)
def test_a_column_of_no_ids_is_refused(tmp_path: Path, text: str, key: str, message: str) -> None:
    dataset, file = csv(tmp_path, text)
    with pytest.raises(ValueError, match=message):
        PairIds(key=key).read_rows(file, ";", dataset)


def test_a_sample_without_an_id_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'1' of a\.tar .*'group\.txt'.*jpg, txt"):
        read([PairIds(key="group.txt")], {"txt": b"a", "group.txt": b"x"}, {"txt": b"b"})


def test_data_without_texts_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_args(["--loss", "clip-ids", "--dataset-type", "synthetic"])
    assert "clip-ids does not work with --dataset-type synthetic" in capsys.readouterr().err


def test_a_run_leaves_partners_out(trainer: Trainer) -> None:
    """Under RankCLIP's terms, which need no ids."""
    lines = ["filepath\ttitle\tgroup"]
    groups = [n // 3 if n % 2 else 100 + n for n in range(len(trainer.rows))]
    lines += ["\t".join([*row[:2], f"group {x}"]) for row, x in zip(trainer.rows, groups, strict=True)]
    file = trainer.directory / "groups.csv"
    file.write_text("\n".join(lines) + "\n")
    options = ["--loss", "clip-ids+rankclip", "--clip-ids-key", "group", "--train-data", str(file)]
    run = trainer.call("clip-ids", *WHOLE_SET, *options)
    assert run.returncode == 0, run.output[-4000:]
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
