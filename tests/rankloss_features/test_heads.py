"""``rankloss heads``: a model saved with its encoders' names and read again, splits by id, refusals."""

from __future__ import annotations

import functools
import itertools
import json
import math
import operator
import os
import re
import shutil
import signal
import tarfile
from argparse import Namespace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import tiny_teacher as tiny
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from test_evaluate_command import rows_of, shard, write
from torch import Tensor
from torch.nn.functional import normalize

from memory import LiveBytes
from rankloss_features import methods, sources, train_heads
from rankloss_features.folder import NAMES, hash_of
from rankloss_features.heads import TRAINED, Encoders, FrozenEncoders, Part, load_heads, make_heads
from rankloss_features.heads_training import Training, train
from rankloss_features.pictures import Rendering
from rankloss_features.teachers import Encoder, Teacher, image_encoder
from rankloss_features.train_heads import split
from rankloss_trainers.console import main
from samples import add_sample


def weights_of(folder: Path) -> Path:
    (file,) = folder.glob("heads-*.safetensors")
    return file


def run(sample: Path, output: Path, data: Path, *options: str, texts: str = "{}/text_encoder") -> int:
    encoders = ["--image-encoder", f"{sample}/image_encoder", "--text-encoder", texts.format(sample)]
    given = ["--data", str(data), "--output", str(output), "--workers", "0", "--epochs", "12"]
    return main(["heads", *encoders, *given, "--method", TRAINED, *options])


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
    assert f"--data {few} has 9 pairs: at least 16 are needed to train on, and 16 to evaluate on" in error
    error = refusal(capsys, run(sample_folder, tmp_path / "x", sample_folder / "train.csv"))
    assert "4 pairs are too few to evaluate on, of 48" in error
    shutil.copy(sample_folder / "val.csv", few)
    error = refusal(capsys, run(sample_folder, tmp_path / "x", few, *val, "--ids-key", "product"))
    assert re.search(
        "8 ids of 'product' of --val-data are in --data, too; the first is '.*', of row 0", error
    )
    assert not (tmp_path / "x").exists()


def test_ids_that_leave_no_pair_to_hold_out_are_refused(
    sample_folder: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Encoders, "load", None)  # nothing is loaded
    rows = [{**row, "product": "one"} for row in rows_of(sample_folder / "train.csv")]
    one = write(tmp_path / "one.csv", rows)
    error = refusal(capsys, run(sample_folder, tmp_path / "x", one, "--ids-key", "product"))
    assert (
        f"--data {one}: all 48 pairs have one id of 'product', so none can be held out: give --val-data"
        in error
    )


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
        v = normalize(heads["image_features"](features["image_features"]), dim=-1)
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
        for name, x in features.items():
            heads[name].standardise(name, x)
        v, t = (normalize(heads[name](features[name]), dim=-1) for name in NAMES)
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
    ("parts",): [None, [], {}, [7]],
    ("parts", 0, "hidden"): [None, True, 2**40, 7],
    ("parts", 0, "width"): [None, -1, 2**40, 7],
    ("parts", 0, "share"): [None, 0, -1.0, 2.0, float("nan"), "x"],
    ("parts", 0, "method"): [None, "cca", "own", []],
    ("scale",): [None, "x", 0.0, -1.0, float("inf"), float("nan")],
    ("hash",): [None, 7, "", "/../../other", "0" * 32],
    ("pictures",): [None, {}, {"upright": True}, {"upright": 1, "background": "white"}],
    ("pictures", "background"): [None, 7, "whitish", "#ffffff00"],
    ("method",): [None, "pca", []],
}


@pytest.mark.parametrize(("path", "values"), WRONG.items())
def test_entries_of_a_folder_that_another_made_are_refused_without_their_memory(
    folder: Path, tmp_path: Path, path: tuple[Any, ...], values: list[Any]
) -> None:
    shutil.copytree(folder, tmp_path / "heads")
    file = tmp_path / "heads/heads.json"
    for value in [..., *values]:
        about = json.loads((folder / "heads.json").read_text())
        entry = functools.reduce(operator.getitem, path[:-1], about)
        entry[path[-1]] = value
        if value is ...:
            del entry[path[-1]]
        file.write_text(json.dumps(about))
        with pytest.raises(
            ValueError, match=f"heads.json(:| is damaged:) .*{path[0]}|does not fit|not as it was"
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
    data += ["--method", TRAINED]
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
    weights_of(copy).write_bytes(b"{}")
    with pytest.raises(ValueError, match=r"heads-\w+.safetensors is not as it was written with heads.json"):
        load_heads(copy)


# --- statistics -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changed", ["image_features", "text_features"])
def test_heads_on_an_encoder_with_other_preparation_of_its_inputs_are_refused(
    sample_folder: Path, folder: Path, tmp_path: Path, changed: str
) -> None:
    copy = tmp_path / "heads"
    shutil.copytree(folder, copy)
    about = json.loads((copy / "heads.json").read_text())
    for name in ("image_encoder", "text_encoder"):
        shutil.copytree(sample_folder / name, tmp_path / name)
        about["encoders"][name] = str(tmp_path / name)
    (copy / "heads.json").write_text(json.dumps(about))
    assert load_heads(copy).encode_texts(["a red circle"]).shape[0] == 1
    tiny.prepare_otherwise(tmp_path, changed)
    with pytest.raises(
        ValueError, match=f"was trained on another .*: {changed} of a fixed input have a cosine"
    ):
        load_heads(copy)


def unit_features(rows: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Unit-norm features with a mean that is not 0, and a dimension that is constant."""
    features = {}
    for name, width in zip(NAMES, (40, 24), strict=True):
        x = torch.randn(rows, width, generator=generator) + 2.0
        x[:, 3] = 0.0
        features[name] = normalize(x, dim=-1)
    return features


@pytest.mark.parametrize("epochs", [1, 30])
def test_the_statistics_are_those_of_all_features_after_few_steps_as_after_many(epochs: int) -> None:
    features = unit_features(200, torch.Generator().manual_seed(0))
    heads, _, _ = train(features, None, Training(epochs, batch_size=128))
    for name, x in features.items():
        standardised = heads[name][0](x)
        varies = x.std(dim=0) > 0
        torch.testing.assert_close(standardised.mean(dim=0), torch.zeros(x.shape[1]), atol=1e-4, rtol=0)
        torch.testing.assert_close(standardised.std(dim=0, correction=0), varies.float(), atol=1e-4, rtol=0)


def test_a_dimension_that_is_constant_in_a_training_does_not_drown_the_others_later() -> None:
    generator = torch.Generator().manual_seed(0)
    features = unit_features(64, generator)
    heads, _, _ = train(features, None, Training(1, batch_size=32))
    later = features[NAMES[0]] + 0.1 * torch.eye(40)[3]  # as much as the others vary
    assert heads[NAMES[0]][0](later).abs().max() < 30


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (torch.full((24, 8), math.nan), "image_features must be finite; got NaN or infinity"),
        (torch.ones(24, 8), "image_features must not be one row 24 times, which ranks nothing"),
    ],
)
def test_features_that_teach_nothing_are_refused(wrong: Tensor, message: str) -> None:
    features = {NAMES[0]: wrong, NAMES[1]: torch.randn(24, 8)}
    with pytest.raises(ValueError, match=message):
        train(features, None, Training(1))


def test_an_earlier_folder_is_read_with_the_statistics_of_its_features(folder: Path, tmp_path: Path) -> None:
    """It has those of batch normalisation, of which 0.9ⁿ is left of their first values 0 and 1."""
    batches = [normalize(torch.rand(24, 64), dim=-1) for _ in range(3)]
    earlier = torch.nn.BatchNorm1d(64, affine=False)
    for batch in batches:
        earlier(batch)
    weights = load_file(weights_of(folder))
    for name in NAMES:
        del weights[f"probe.{name}"]
        width = len(weights.pop(f"{name}.0.mean"))
        del weights[f"{name}.0.std"]
        for kind, x in earlier.state_dict().items():
            weights[f"{name}.0.{kind}"] = (x[:width] if x.dim() else x).clone()
    shutil.copytree(folder, tmp_path / "heads")
    weights_of(tmp_path / "heads").unlink()
    file = tmp_path / "heads/heads.safetensors"
    save_file(weights, file)
    about = json.loads((folder / "heads.json").read_text())
    del about["method"], about["pictures"], about["encoders"]["model"], about["encoders"]["pretrained"]
    (part,) = about.pop("parts")
    about |= {name: part[name] for name in ("hidden", "width")}
    (tmp_path / "heads/heads.json").write_text(
        json.dumps({**about, "hash": hash_of(file.read_bytes()).hex()})
    )
    model = load_heads(tmp_path / "heads")
    shares = torch.tensor([0.081, 0.09, 0.1]) / 0.271
    for name in NAMES:
        found: Any = model.heads[name][0]
        width = len(found.mean)
        mean = sum(share * batch.mean(dim=0) for share, batch in zip(shares, batches, strict=True))
        variance = sum(share * batch.var(dim=0) for share, batch in zip(shares, batches, strict=True))
        torch.testing.assert_close(found.mean, mean[:width])
        torch.testing.assert_close(found.std, (variance[:width] + 1e-5).sqrt(), rtol=1e-4, atol=0)
    assert model.encode_texts(["a red circle"]).isfinite().all()


# --- pictures ---------------------------------------------------------------------------------------------


def awkward(picture: Image.Image, number: int, file: Path) -> Path:
    """A picture as a camera that was turned, of 16 bits, or transparent, as a PNG file."""
    if number % 3 == 0:
        exif = Image.Exif()
        exif[0x0112] = 6
        picture.save(file, "PNG", exif=exif)
    elif number % 3 == 1:
        grey = np.asarray(picture.convert("L"), np.uint16) * 257
        Image.fromarray(grey).save(file, "PNG")
    else:
        transparent = picture.convert("RGBA")
        transparent.putalpha(picture.convert("L"))
        transparent.save(file, "PNG")
    return file


@pytest.mark.parametrize("kind", ["csv", "datasets", "webdataset"])
def test_new_pictures_are_opened_as_those_that_trained(
    sample_folder: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = rows_of(sample_folder / "train.csv")
    for number, row in enumerate(rows):
        row["filepath"] = str(awkward(Image.open(row["filepath"]), number, tmp_path / f"{number:02}.png"))
    data = write(tmp_path / "train.csv", rows)
    if kind == "datasets":
        columns = {"image": [row["filepath"] for row in rows], "caption": [row["title"] for row in rows]}
        data = tmp_path / "data"
        datasets.Dataset.from_dict(columns).save_to_disk(data)
    elif kind == "webdataset":
        data = tmp_path / "data.tar"
        with tarfile.open(data, "w") as tar:
            for number, row in enumerate(rows):
                picture = Path(row["filepath"]).read_bytes()
                add_sample(tar, f"{number:02}", png=picture, txt=row["title"].encode())
    seen: list[dict[str, Tensor]] = []

    def watched(features: dict[str, Tensor], *args: Any) -> Any:
        seen.append(features)
        return train(features, *args)

    monkeypatch.setattr(methods, "train", watched)
    val = ("--val-data", str(sample_folder / "val.csv"), "--background", "gray")
    assert run(sample_folder, tmp_path / "heads", data, *val) == 0
    model = load_heads(tmp_path / "heads")
    with torch.no_grad():
        of_training = normalize(model.heads[NAMES[0]](seen[0][NAMES[0]]), dim=-1)
    files = [row["filepath"] for row in rows]
    torch.testing.assert_close(model.encode_images(files), of_training, atol=1e-5, rtol=0)
    torch.testing.assert_close(model.encode_images(map(Image.open, files)), of_training, atol=1e-5, rtol=0)
    contents = [Path(file).read_bytes() for file in files]
    torch.testing.assert_close(model.encode_images(contents), of_training, atol=1e-5, rtol=0)
    assert model.rendering == Rendering(upright=True, background="gray")
    given = Namespace(model=str(tmp_path / "heads"), pretrained=None)
    assert sources.load(["model"], given, torch.device("cpu")).rendering == model.rendering


def wide_encoders(*_: Any) -> Teacher:
    """Two encoders of 1024 numbers each."""
    generator = torch.Generator().manual_seed(0)
    of_pixels, of_letters = (torch.randn(width, 1024, generator=generator) for width in (192, 256))
    pixels = functools.partial(tiny.pixels, 8)
    images = image_encoder(pixels, lambda x: x @ of_pixels, 1024, torch.device("cpu"))
    texts = Encoder(tiny.letters, lambda x: x @ of_letters, 1024)
    return Teacher({}, dict(zip(NAMES, (images, texts), strict=True)), spaces="separate")


@pytest.mark.parametrize(("is_split", "most", "left"), [(True, 1.75, 1.2), (False, 1.3, 1.2)])
def test_memory_holds_the_features_of_all_pairs_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_split: bool, most: float, left: float
) -> None:
    """While one modality is parted from the held-out pairs, the other is there in whole."""
    rows, pictures = 2000, 40
    for number in range(2 * pictures):
        (tmp_path / f"{number}.png").write_bytes(tiny.picture(number))
    learned = rows if is_split else rows * 9 // 10
    of_files = {
        "many.csv": [f"{tmp_path}/{i % pictures}.png\ta caption {i}" for i in range(learned)],
        "others.csv": [f"{tmp_path}/{pictures + i % pictures}.png\tanother {i}" for i in range(rows // 10)],
    }
    for name, lines in of_files.items():
        (tmp_path / name).write_text("\n".join(["filepath\ttitle", *lines]))
    monkeypatch.setattr(Encoders, "load", wide_encoders)
    live, held = LiveBytes(), list[int]()

    def make(asked: Any, pairs: methods.Pairs) -> Any:
        held.append(live.now)
        train(pairs.features, None, Training(epochs=1, hidden=8, width=8, batch_size=64))
        raise ValueError("made")

    monkeypatch.setattr(train_heads, "make", make)
    options = [] if is_split else ["--val-data", str(tmp_path / "others.csv")]
    with live:
        assert run(tmp_path, tmp_path / "x", tmp_path / "many.csv", *options) == 1
    features = rows * 2 * 1024 * 4
    assert live.peak < most * features
    assert held[0] < left * features


# --- options that fail before anything is computed -----------------------------------------------------


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("device", "nonsense", "--device must be a device of torch, such as cpu or cuda:0; got 'nonsense'"),
        ("device", "cuda:99", "--device cuda:99 is not here: "),
        ("device", "meta", "--device meta computes nothing"),
        ("seed", str(2**64), f"--seed must be at most {2**63 - 1}; got {2**64}"),
        ("seed", "-1", "--seed must be an integer of at least 0; got -1"),
        ("lr", "1e6", "--lr must be a finite number > 0 and < 1; got 1000000.0"),
        ("lr", "nan", "--lr must be a finite number > 0 and < 1; got nan"),
        ("width", str(10**9), "--width must be at most 65536; got 1000000000"),
        ("workers", "-1", "--workers must be an integer of at least 0; got -1"),
        ("background", "whitish", "--background must be a colour, such as white or #808080; got 'whitish'"),
    ],
)
def test_an_option_that_cannot_be_is_refused_before_the_encoders_are_loaded(
    sample_folder: Path,
    tmp_path: Path,
    capsys: Any,
    monkeypatch: pytest.MonkeyPatch,
    option: str,
    value: str,
    message: str,
) -> None:
    monkeypatch.setattr(Encoders, "load", lambda *_: pytest.fail("the encoders are loaded"))
    code = run(sample_folder, tmp_path / "x", sample_folder / "train.csv", f"--{option}", value)
    assert message in refusal(capsys, code)
    assert not (tmp_path / "x").exists()


def test_a_training_that_diverges_names_the_options() -> None:
    features = unit_features(64, torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match=r"diverged in epoch 1: give less than --lr 1e\+30$"):
        train(features, None, Training(3, batch_size=16, lr=1e30))
    with pytest.raises(ValueError, match=r"give less than --lr 1e\+30 or --spread-weight 2$"):
        train(features, None, Training(3, batch_size=16, lr=1e30, spread_weight=2.0))


def test_trained_heads_are_replaced_only_on_demand(
    sample_folder: Path, folder: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are refused before the encoders are loaded."""
    shutil.copytree(folder, tmp_path / "heads")
    before = tiny.files(folder)
    val = ("--val-data", str(sample_folder / "val.csv"), "--ids-key", "product")
    with monkeypatch.context() as patch:
        patch.setattr(Encoders, "load", lambda *_: pytest.fail("the encoders are loaded"))
        code = run(sample_folder, tmp_path / "heads", sample_folder / "train.csv", *val)
    error = refusal(capsys, code)
    assert f"--output {tmp_path}/heads has trained heads: give another folder, or --overwrite" in error
    assert tiny.files(tmp_path / "heads") == before
    more = (*val, "--overwrite", "--seed", "1")
    assert run(sample_folder, tmp_path / "heads", sample_folder / "train.csv", *more) == 0
    after = tiny.files(tmp_path / "heads")
    assert len(after) == 2
    assert not {*after.values()} & {*before.values()}
    load_heads(tmp_path / "heads")


def test_a_place_that_cannot_be_written_is_refused_before_the_training(
    sample_folder: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Encoders, "load", lambda *_: pytest.fail("the encoders are loaded"))
    (tmp_path / "file").write_text("mine")
    error = refusal(capsys, run(sample_folder, tmp_path / "file", sample_folder / "train.csv"))
    assert f"--output {tmp_path}/file is no folder" in error
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)  # root may write anywhere
    error = refusal(capsys, run(sample_folder, tmp_path / "new/x", sample_folder / "train.csv"))
    assert f"--output {tmp_path}/new/x cannot be written: {tmp_path} may not be changed" in error


# --- interruptions ------------------------------------------------------------------------------------------


def test_a_kill_at_any_step_of_a_saving_leaves_the_old_heads_or_the_new(folder: Path, tmp_path: Path) -> None:
    old = load_heads(folder)
    heads = make_heads({name: x[0].mean.numel() for name, x in old.heads.items()}, 16, 8)
    new = FrozenEncoders(old.encoders, old._frozen, [Part.trained(heads, 1.0)], 20.0)
    expected = {"old": old.encode_texts(["a red circle"]), "new": new.encode_texts(["a red circle"])}
    outcomes = []
    for step in range(1, 40):
        place = tmp_path / str(step)
        shutil.copytree(folder, place)
        code = tiny.in_process(save_and_die, new, place, step)
        found = load_heads(place).encode_texts(["a red circle"])
        (outcome,) = [name for name, x in expected.items() if torch.equal(x, found)]
        outcomes.append(outcome)
        if code == 0:
            break
        assert code == -signal.SIGKILL
        new.save(place)  # and the next saving goes through
        assert torch.equal(load_heads(place).encode_texts(["a red circle"]), expected["new"])
    assert outcomes == sorted(outcomes, reverse=True)
    assert {*outcomes[:-1]} == {"old", "new"}


def save_and_die(model: FrozenEncoders, place: Path, step: int) -> None:
    """Save, but be killed at a call that opens, brings to the disk, renames or deletes a file."""
    calls = itertools.count(1)

    def dying(function: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            if next(calls) == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **options)

        return call

    os.fsync = dying(os.fsync)
    Path.replace = dying(Path.replace)  # type: ignore[method-assign]
    Path.unlink = dying(Path.unlink)  # type: ignore[method-assign]
    Path.mkdir = dying(Path.mkdir)  # type: ignore[method-assign]
    model.save(place)


# --- pictures that are trained on are not held out -----------------------------------------------------


def test_pictures_of_the_training_are_not_held_out_under_another_path(
    sample_folder: Path, tmp_path: Path, capsys: Any
) -> None:
    rows = rows_of(sample_folder / "train.csv")
    for number, row in enumerate(rows[16:32]):
        row["filepath"] = shutil.copy(row["filepath"], f"{tmp_path}/{number}.png")
        row["product"] = f"another {number}"
    val = ["--val-data", str(write(tmp_path / "val.csv", rows[16:32]))]
    for options in (val, [*val, "--ids-key", "product"]):
        code = run(sample_folder, tmp_path / "x", sample_folder / "train.csv", *options)
        error = refusal(capsys, code)
        assert "16 pictures of --val-data are in --data, too; the first is '0.png', of row 0" in error
    assert not (tmp_path / "x").exists()


def test_captions_of_one_picture_in_shards_are_on_one_side(
    sample_folder: Path, tmp_path: Path, capsys: Any
) -> None:
    rows = [
        {**row, "title": f"{row['title']} {n}"}
        for n in range(5)
        for row in rows_of(sample_folder / "train.csv")
    ]
    assert run(sample_folder, tmp_path / "x", shard(tmp_path / "x.tar", rows)) == 0
    printed = capsys.readouterr().out
    assert "training on 220 pairs of 44 pictures" in printed
    assert "4 pictures, 20 texts" in printed


def test_shards_are_held_out_by_other_shards_of_other_pictures(
    sample_folder: Path, tmp_path: Path, capsys: Any
) -> None:
    data = shard(tmp_path / "a.tar", rows_of(sample_folder / "train.csv"))
    val = shard(tmp_path / "b.tar", rows_of(sample_folder / "val.csv"))
    assert run(sample_folder, tmp_path / "x", data, "--val-data", str(val), "--ids-key", "id") == 0
    assert "48 pairs of 24 ids of 'id'" in capsys.readouterr().out
    error = refusal(capsys, run(sample_folder, tmp_path / "y", data, "--val-data", str(data)))
    assert "48 pictures of --val-data are in --data, too" in error


def test_one_text_or_picture_is_no_list_of_them(sample_folder: Path, folder: Path) -> None:
    model = load_heads(folder)
    file = sample_folder / "pictures/red-circle-large.png"
    with pytest.raises(ValueError, match="texts must be several, in a list; got 'a red shoe'"):
        model.encode_texts("a red shoe")
    for one in (str(file), file, file.read_bytes(), Image.new("RGB", (8, 8))):
        with pytest.raises(ValueError, match="pictures must be several, in a list; got"):
            model.encode_images(one)
    with pytest.raises(ValueError, match="texts must be of type str; got None in place 1"):
        model.encode_texts(["a red shoe", None])
    with pytest.raises(ValueError, match="in place 0 stands 7"):
        model.encode_images([7])
    assert model.encode_texts([]).shape == model.encode_images([]).shape == (0, 256)
    many = model.encode_texts([f"a red shoe {n}" for n in range(150)])
    torch.testing.assert_close(many[149], model.encode_texts(["a red shoe 149"])[0], atol=1e-5, rtol=0)
