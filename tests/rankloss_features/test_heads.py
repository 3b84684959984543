"""``rankloss heads``: a model saved with its encoders' names and read again, splits by id, refusals."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from test_evaluate_command import rows_of, write

from rankloss_features.folder import NAMES
from rankloss_features.heads import Training, load_heads, make_heads, train
from rankloss_features.train_heads import split
from rankloss_trainers.console import main


def run(sample: Path, output: Path, data: Path, *options: str, texts: str = "{}/text_encoder") -> int:
    encoders = ["--image-encoder", f"{sample}/image_encoder", "--text-encoder", texts.format(sample)]
    given = ["--data", str(data), "--output", str(output), "--workers", "0", "--epochs", "12"]
    return main(["heads", *encoders, *given, *options])


@pytest.fixture(scope="module")
def folder(sample_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained heads."""
    output = tmp_path_factory.mktemp("heads") / "heads"
    options = ("--val-data", str(sample_folder / "val.csv"), "--ids-key", "product")
    assert run(sample_folder, output, sample_folder / "train.csv", *options) == 0
    return output


def test_heads_find_pairs_of_products_that_they_have_not_seen(
    sample_folder: Path, folder: Path, tmp_path: Path, capsys: Any
) -> None:
    """The encoders have random weights; a random order has a median rank of 6 among 16, two of which fit."""
    given = ["--data", str(sample_folder / "val.csv"), "--ids-key", "product", "--workers", "0"]
    assert main(["evaluate", "--model", str(folder), *given, "--json", str(tmp_path / "x.json")]) == 0
    result = json.loads((tmp_path / "x.json").read_text())
    assert result["median_rank"]["image_to_text"] <= 2
    assert result["median_rank"]["text_to_image"] <= 2
    assert result["width"] == 256


def test_three_lines_encode_a_new_picture_and_a_new_caption(sample_folder: Path, folder: Path) -> None:
    model = load_heads(folder)
    file = sample_folder / "pictures/red-circle-large.png"
    by_path, opened = model.encode_images([file, Image.open(file)])
    scores = model.encode_images([file]) @ model.encode_texts(["a red circle", "a blue square"]).T
    torch.testing.assert_close(by_path, opened)
    torch.testing.assert_close(by_path.norm(), torch.tensor(1.0))
    assert scores[0, 0] > scores[0, 1]


def test_the_command_prints_the_loss_and_recall_and_how_to_go_on(
    sample_folder: Path, tmp_path: Path, capsys: Any
) -> None:
    rows = [
        {**row, "title": f"{row['title']} {n}"}
        for n in range(4)
        for row in rows_of(sample_folder / "train.csv")
    ]
    assert run(sample_folder, tmp_path / "x", write(tmp_path / "many.csv", rows), "--width", "8") == 0
    printed = capsys.readouterr().out
    assert "training on 176 pairs of 44 pictures" in printed  # a tenth of 48 pictures is held out
    assert re.search(r"held-out .*many.csv: 4 pictures, 16 texts", printed)
    losses = [float(x) for x in re.findall(r"^epoch \d+: loss (\S+)$", printed, re.MULTILINE)]
    assert losses[-1] < losses[0]
    assert "rankloss_features.heads.load_heads(" in printed
    assert load_heads(tmp_path / "x").encode_texts(["a red circle"]).shape == (1, 8)


@pytest.mark.parametrize("seed", range(3))
def test_no_group_is_on_both_sides_of_the_split(seed: int) -> None:
    groups = [n % 37 for n in range(200)]
    learned, held_out = split(groups, seed)
    assert sorted(learned + held_out) == list(range(200))
    assert not {groups[row] for row in learned} & {groups[row] for row in held_out}
    assert len({groups[row] for row in held_out}) == 3


def refusal(capsys: Any, code: int) -> str:
    assert code == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("rankloss heads: ")
    return str(error)


def test_few_pairs_are_refused_with_their_number(sample_folder: Path, tmp_path: Path, capsys: Any) -> None:
    few = write(tmp_path / "few.csv", rows_of(sample_folder / "val.csv")[:9])
    val = ("--val-data", str(sample_folder / "val.csv"))
    error = refusal(capsys, run(sample_folder, tmp_path / "x", few))
    assert re.search(r"\d pairs are too few to train on, of 9 in --data .*; at least 16 are needed", error)
    error = refusal(capsys, run(sample_folder, tmp_path / "x", sample_folder / "train.csv"))
    assert "4 pairs are too few to evaluate on, of 48" in error
    shutil.copy(sample_folder / "val.csv", few)
    error = refusal(capsys, run(sample_folder, tmp_path / "x", few, *val, "--ids-key", "product"))
    assert "8 ids of 'product' of --val-data are in --data, too; the first is 'black-triangle'" in error
    assert not (tmp_path / "x").exists()


def test_batches_of_one_pair_are_refused_by_the_option(
    sample_folder: Path, tmp_path: Path, capsys: Any
) -> None:
    code = run(sample_folder, tmp_path / "x", sample_folder / "train.csv", "--batch-size", "1")
    assert "--batch-size must be an integer of at least 2; got 1" in refusal(capsys, code)
    assert not (tmp_path / "x").exists()


def test_the_weight_of_the_spread_is_of_the_loss_that_trains() -> None:
    generator = torch.Generator().manual_seed(0)
    features = {name: torch.randn(24, 8, generator=generator) for name in ("image_features", "text_features")}
    ids = torch.arange(24) // 2
    first, spreads = {}, {}
    for weight in (0.0, 0.5, 1.0):
        _, _, (first[weight],) = train(features, ids, Training(1, batch_size=24, spread_weight=weight))
        heads, _, _ = train(features, ids, Training(30, batch_size=24, spread_weight=weight))
        v = torch.nn.functional.normalize(heads["image_features"](features["image_features"]), dim=-1)
        spreads[weight] = (v @ v.T)[~torch.eye(24, dtype=torch.bool)].std().item()
    assert first[0.5] - first[0.0] > 0.05
    assert first[1.0] - first[0.0] == pytest.approx(2 * (first[0.5] - first[0.0]), rel=1e-4)
    assert spreads[1.0] < spreads[0.5] < spreads[0.0]


def test_smoothing_is_of_the_loss_that_trains() -> None:
    """Without dropout the first loss of one batch is that of the same heads, smoothed."""
    features = {name: torch.randn(24, 8, generator=torch.Generator().manual_seed(0)) for name in NAMES}
    losses, expected = {}, {}
    for smoothing in (0.0, 0.3):
        settings = Training(1, batch_size=24, dropout=0.0, label_smoothing=smoothing)
        _, _, (losses[smoothing],) = train(features, None, settings)
        torch.manual_seed(settings.seed)
        heads = make_heads(dict.fromkeys(NAMES, 8), settings.hidden, settings.width)
        v, t = (torch.nn.functional.normalize(heads[name](features[name]), dim=-1) for name in NAMES)
        logits, own = v @ t.T / 0.07, torch.arange(24)
        expected[smoothing] = sum(
            torch.nn.functional.cross_entropy(x, own, label_smoothing=smoothing).item() / 2
            for x in (logits, logits.T)
        )
    assert losses == pytest.approx(expected, rel=1e-4)
    assert abs(expected[0.3] - expected[0.0]) > 0.01


def test_dropout_is_of_the_training_alone() -> None:
    features = {name: torch.randn(24, 8, generator=torch.Generator().manual_seed(0)) for name in NAMES}
    losses = {}
    for dropout in (0.0, 0.3, 0.9):
        heads, _, (losses[dropout],) = train(features, None, Training(1, batch_size=24, dropout=dropout))
        assert {x.p for x in heads.modules() if isinstance(x, torch.nn.Dropout)} == {dropout}
        once, again = (heads[NAMES[0]](features[NAMES[0]]) for _ in range(2))
        assert torch.equal(once, again)
    assert len(set(losses.values())) == 3
    assert losses[0.3] == train(features, None, Training(1, batch_size=24))[2][0]  # the default


@pytest.mark.parametrize(
    ("option", "value"), [("spread-weight", "-1"), ("dropout", "1"), ("label-smoothing", "1")]
)
def test_a_number_out_of_its_bounds_is_refused(
    sample_folder: Path, tmp_path: Path, capsys: Any, option: str, value: str
) -> None:
    assert run(sample_folder, tmp_path / "x", sample_folder / "train.csv", f"--{option}", value) == 1
    assert re.search(rf"--{option} must be .*; got {value}", capsys.readouterr().err)
    assert not (tmp_path / "x").exists()


def test_a_folder_of_something_else_is_left_alone(sample_folder: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    error = refusal(capsys, run(sample_folder, tmp_path, sample_folder / "train.csv"))
    assert f"--output {tmp_path} is there and no folder of heads: give a new one" in error
    with pytest.raises(ValueError, match=r"has no heads.json: it is no folder of rankloss heads"):
        load_heads(tmp_path)


WRONG = {
    ("encoders",): [None, {}, 7],
    ("encoders", "image_encoder"): [None, 7],
    ("weights",): [None, {}, "x"],
    ("widths",): [None, {}, {"image_features": 64}],
    ("widths", "image_features"): [0, -1, 2.5, "x", 2**40, 7],
    ("hidden",): [None, True, 2**40, 7],
    ("width",): [None, -1, 2**40, 7],
    ("scale",): [None, "x", 0.0, -1.0, float("inf"), float("nan")],
    ("hash",): [None, 7],
}


@pytest.mark.parametrize(("path", "values"), WRONG.items())
def test_entries_of_a_folder_that_another_made_are_refused_without_their_memory(
    folder: Path, tmp_path: Path, path: tuple[str, ...], values: list[Any]
) -> None:
    shutil.copytree(folder, tmp_path / "heads")
    file = tmp_path / "heads/heads.json"
    for value in [..., *values]:
        about = json.loads((folder / "heads.json").read_text())
        entry = about if len(path) == 1 else about[path[0]]
        entry[path[-1]] = value
        if value is ...:
            del entry[path[-1]]
        file.write_text(json.dumps(about))
        with pytest.raises(
            ValueError, match=f"heads.json is damaged: .*'{path[0]}'|does not fit|not as it was"
        ):
            load_heads(tmp_path / "heads")


@pytest.mark.parametrize("text", ["", "[]", "7", "[" * 100_000])
def test_a_file_of_something_else_is_no_heads(folder: Path, tmp_path: Path, text: str) -> None:
    shutil.copytree(folder, tmp_path / "heads")
    (tmp_path / "heads/heads.json").write_text(text)
    with pytest.raises(ValueError, match=r"heads.json (is damaged|cannot be read)"):
        load_heads(tmp_path / "heads")
    (tmp_path / "heads/heads.json").unlink()
    os.mkfifo(tmp_path / "heads/heads.json")
    with pytest.raises(ValueError, match=r"heads.json cannot be read: it is no regular file"):
        load_heads(tmp_path / "heads")


def test_heads_find_their_local_encoders_from_another_folder(
    sample_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(sample_folder)
    encoders = ["--image-encoder", "local-dir:image_encoder", "--text-encoder", "text_encoder"]
    data = ["--data", "train.csv", "--val-data", "val.csv", "--workers", "0", "--epochs", "1"]
    assert main(["heads", *encoders, *data, "--output", str(tmp_path / "heads")]) == 0
    monkeypatch.chdir(tmp_path)
    assert load_heads("heads").encode_texts(["a red circle"]).shape == (1, 256)


def test_heads_on_another_encoder_than_they_were_trained_with_are_refused(
    sample_folder: Path, folder: Path, tmp_path: Path
) -> None:
    other, copy = tmp_path / "text_encoder", tmp_path / "heads"
    shutil.copytree(sample_folder / "text_encoder", other)
    shutil.copytree(folder, copy)
    file = next(other.rglob("*.safetensors"))
    save_file({name: x + 1 for name, x in load_file(file).items()}, file)
    about = json.loads((copy / "heads.json").read_text())
    about["encoders"]["text_encoder"] = str(other)
    (copy / "heads.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match=r"was trained on text_weights .*; the encoder that is found has"):
        load_heads(copy)
    about["encoders"]["text_encoder"] = str(sample_folder / "text_encoder")
    (copy / "heads.json").write_text(json.dumps(about))
    (copy / "heads.safetensors").write_bytes(b"{}")
    with pytest.raises(ValueError, match=r"heads.safetensors is not as it was written with heads.json"):
        load_heads(copy)
