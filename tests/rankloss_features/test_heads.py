"""``rankloss heads``: a model saved with its encoders' names and read again, splits by id, refusals."""

from __future__ import annotations

import contextlib
import functools
import io
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import tiny_teacher as tiny
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from test_evaluate_command import read_csv, write_csv, write_webdataset
from torch import Tensor
from torch.nn.functional import normalize

from memory import LiveBytes
from rankloss_features import clip_models, methods, sources, train_heads, trained_files
from rankloss_features.folder import NAMES, hash_of
from rankloss_features.heads import TRAINED, Encoders, FrozenEncoders, Part, load_heads, make_heads
from rankloss_features.heads_training import Training, train
from rankloss_features.pictures import Rendering
from rankloss_features.teachers import Encoder, Teacher, image_encoder
from rankloss_features.train_heads import split
from rankloss_trainers.console import main
from samples import add_sample

EPOCHS = 12  # of the heads that the command trains


def weights_of(folder: Path) -> Path:
    """The file of the heads' weights, whose name has their hash."""
    (file,) = folder.glob("heads-*.safetensors")
    return file


def run_heads(sample: Path, output: Path, data: Path, *options: str) -> int:
    """Run ``rankloss heads`` with the encoders of a folder, to train heads; the exit code."""
    encoders = ["--image-encoder", f"{sample}/image_encoder", "--text-encoder", f"{sample}/text_encoder"]
    options_of_run = ["--data", str(data), "--output", str(output), "--workers", "0", "--epochs", str(EPOCHS)]
    return main(["heads", *encoders, *options_of_run, "--method", TRAINED, *options])


@pytest.fixture(scope="module")
def folder(sample_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of heads that were trained on ``train.csv``."""
    output = tmp_path_factory.mktemp("heads") / "heads"
    options = ("--val-data", str(sample_folder / "val.csv"), "--ids-key", "product")
    assert run_heads(sample_folder, output, sample_folder / "train.csv", *options) == 0
    return output


@pytest.fixture
def evaluated(sample_folder: Path, folder: Path, tmp_path: Path) -> dict[str, Any]:
    """The result of ``rankloss evaluate`` of the trained heads."""
    options = ["--data", str(sample_folder / "val.csv"), "--ids-key", "product", "--workers", "0"]
    assert main(["evaluate", "--model", str(folder), *options, "--json", str(tmp_path / "x.json")]) == 0
    return dict(json.loads((tmp_path / "x.json").read_text()))


def test_heads_find_pairs_of_products_that_they_have_not_seen(evaluated: dict[str, Any]) -> None:
    """The encoders have random weights; a random order has a median rank of 5 among 16, two of which fit.

    The sample holds out whole products, so that none of ``val.csv`` is in ``train.csv``.
    """
    assert evaluated["median_rank"]["image_to_text"] <= 2
    assert evaluated["median_rank"]["text_to_image"] <= 2


def test_heads_have_256_dimensions_unless_a_width_is_given(evaluated: dict[str, Any]) -> None:
    assert evaluated["width"] == 256


def test_three_lines_encode_a_new_picture_and_a_new_caption(sample_folder: Path, folder: Path) -> None:
    """A red circle is of ``val.csv``: no training has seen it."""
    model = load_heads(folder)
    file = sample_folder / "pictures/red-circle-large.png"
    by_path, opened = model.encode_images([file, Image.open(file)])
    scores = model.encode_images([file]) @ model.encode_texts(["a red circle", "a blue square"]).T
    torch.testing.assert_close(by_path, opened)
    torch.testing.assert_close(by_path.norm(), torch.tensor(1.0))
    assert scores[0, 0] > scores[0, 1]


def with_captions(sample: Path, captions: int) -> list[dict[str, str]]:
    """The pairs of ``train.csv``, with so many titles of each picture."""
    return [
        {**row, "title": f"{row['title']} {n}"}
        for n in range(captions)
        for row in read_csv(sample / "train.csv")
    ]


@dataclass(frozen=True)
class Printed:
    """Heads of eight dimensions on 48 pictures with four captions each, and the output of their training."""

    folder: Path
    text: str


@pytest.fixture(scope="module")
def printed(sample_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Printed:
    folder = tmp_path_factory.mktemp("printed")
    table = write_csv(folder / "many.csv", with_captions(sample_folder, 4))
    with contextlib.redirect_stdout(io.StringIO()) as output:
        assert run_heads(sample_folder, folder / "x", table, "--width", "8") == 0
    return Printed(folder / "x", output.getvalue())


def test_the_command_holds_out_a_tenth_of_the_pictures_and_prints_both_numbers(printed: Printed) -> None:
    """Of 48 pictures with four captions each, 4 are held out, and 44 are trained on."""
    assert "training on 176 pairs of 44 pictures" in printed.text
    assert re.search(r"held-out .*many.csv: 4 pictures, 16 texts", printed.text)


def test_the_last_loss_that_the_command_prints_is_below_the_first(printed: Printed) -> None:
    losses = [float(loss) for loss in re.findall(r"^epoch \d+: loss (\S+)$", printed.text, re.MULTILINE)]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("epochs", "expected"), [(1, [1]), (2, [1, 2]), (11, [1, 3, 5, 7, 9, 11]), (12, [1, 3, 5, 7, 9, 11, 12])]
)
def test_the_loss_of_some_epochs_and_of_the_last_is_printed_once(
    epochs: int, expected: list[int], capsys: Any
) -> None:
    train_heads._print_losses([1 / epoch for epoch in range(1, epochs + 1)])
    assert capsys.readouterr().out.splitlines() == [f"epoch {n}: loss {1 / n:.3f}" for n in expected]


def test_the_command_prints_the_call_that_loads_the_heads(printed: Printed) -> None:
    (path,) = re.findall(r"rankloss_features\.heads\.load_heads\('(.*)'\)\.encode_texts", printed.text)
    assert load_heads(path).encode_texts(["a red circle"]).shape == (1, 8)


@pytest.mark.parametrize("seed", range(3))
def test_no_group_is_on_both_sides_of_the_split(seed: int) -> None:
    groups = [n % 37 for n in range(200)]
    learned, held_out = split(groups, seed)
    assert sorted(learned + held_out) == list(range(200))
    assert not {groups[row] for row in learned} & {groups[row] for row in held_out}
    assert len({groups[row] for row in held_out}) == 37 // 10  # a tenth of the groups


def refusal(capsys: Any, code: int) -> str:
    """The error of a command that has ended with an exit code, which must be 1."""
    assert code == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("rankloss heads: ")
    return str(error)


def test_few_pairs_are_refused_with_their_number(sample_folder: Path, tmp_path: Path, capsys: Any) -> None:
    few = write_csv(tmp_path / "few.csv", read_csv(sample_folder / "val.csv")[:9])
    error = refusal(capsys, run_heads(sample_folder, tmp_path / "x", few))
    assert f"--data {few} has 9 pairs: at least 16 are needed to train on, and 16 to evaluate on" in error
    assert not (tmp_path / "x").exists()


def test_pairs_of_which_few_would_be_held_out_are_refused(
    sample_folder: Path, tmp_path: Path, capsys: Any
) -> None:
    error = refusal(capsys, run_heads(sample_folder, tmp_path / "x", sample_folder / "train.csv"))
    assert "4 pairs are too few to evaluate on, of 48" in error  # a tenth of 48 pictures with one caption
    assert not (tmp_path / "x").exists()


def test_ids_on_both_sides_are_refused_with_their_number(
    sample_folder: Path, tmp_path: Path, capsys: Any
) -> None:
    both = sample_folder / "val.csv"
    options = ("--val-data", str(both), "--ids-key", "product")
    error = refusal(capsys, run_heads(sample_folder, tmp_path / "x", both, *options))
    # The 16 pairs of val.csv are two of each product.
    words = "8 ids of 'product' of --val-data are in --data, too; the first is '.*', of row 0"
    assert re.search(words, error)
    assert not (tmp_path / "x").exists()


def test_ids_of_which_one_alone_is_held_out_are_refused(
    sample_folder: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every held-out caption would be a right answer for every held-out picture: an R@1 of 100 %."""
    monkeypatch.setattr(Encoders, "load", None)  # a loading would be a TypeError
    rows = read_csv(sample_folder / "train.csv")
    three_ids = [{**row, "product": f"id {number // 16}"} for number, row in enumerate(rows)]
    table = write_csv(tmp_path / "three.csv", three_ids)
    error = refusal(capsys, run_heads(sample_folder, tmp_path / "x", table, "--ids-key", "product"))
    assert re.search("the 16 held-out pairs have one of the ids of 'product', 'id [012]'", error)
    assert not (tmp_path / "x").exists()


def test_ids_that_leave_no_pair_to_hold_out_are_refused(
    sample_folder: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Encoders, "load", None)  # a loading would be a TypeError
    rows = [{**row, "product": "one"} for row in read_csv(sample_folder / "train.csv")]
    one = write_csv(tmp_path / "one.csv", rows)
    error = refusal(capsys, run_heads(sample_folder, tmp_path / "x", one, "--ids-key", "product"))
    assert (
        f"--data {one}: all 48 pairs have one id of 'product', so none can be held out: give --val-data"
        in error
    )


def test_batches_of_one_pair_are_refused_by_the_option(
    sample_folder: Path, tmp_path: Path, capsys: Any
) -> None:
    code = run_heads(sample_folder, tmp_path / "x", sample_folder / "train.csv", "--batch-size", "1")
    assert "--batch-size must be an integer of at least 2; got 1" in refusal(capsys, code)
    assert not (tmp_path / "x").exists()


# --- settings of the training -------------------------------------------------------------------------------

PAIRS = 24
"""The pairs of the trainings below, which are one batch."""


def random_features() -> dict[str, Tensor]:
    """Features of the pairs, eight dimensions of pictures and of captions."""
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(PAIRS, 8, generator=generator) for name in NAMES}


def first_loss(ids: Tensor | None = None, **settings: Any) -> float:
    """The loss of the only step of a training, in which all random features are one batch."""
    _, _, (loss,) = train(random_features(), ids, Training(epochs=1, batch_size=PAIRS, **settings))
    return loss


def test_the_training_loss_is_linear_in_the_weight_of_the_spread() -> None:
    ids = torch.arange(PAIRS) // 2
    without, half, whole = (first_loss(ids, spread_weight=weight) for weight in (0.0, 0.5, 1.0))
    assert half - without > 0.05  # so that the ratio below is not of rounding errors
    assert whole - without == pytest.approx(2 * (half - without), rel=1e-4)


def test_trained_similarities_are_less_spread_with_more_weight() -> None:
    features, ids = random_features(), torch.arange(PAIRS) // 2

    def spread(weight: float) -> float:
        """The standard deviation of the similarities of different pictures, after a training."""
        heads, _, _ = train(features, ids, Training(epochs=30, batch_size=PAIRS, spread_weight=weight))
        v = normalize(heads[NAMES[0]](features[NAMES[0]]), dim=-1)
        return (v @ v.T)[~torch.eye(PAIRS, dtype=torch.bool)].std().item()

    assert spread(1.0) < spread(0.5) < spread(0.0)


def smoothed_loss_of_new_heads(smoothing: float) -> float:
    """CLIP's loss at its first temperature, of heads that no step has trained."""
    features, settings = random_features(), Training()
    torch.manual_seed(settings.seed)
    heads = make_heads(dict.fromkeys(NAMES, 8), settings.hidden, settings.width)
    for name, rows in features.items():
        heads[name].standardise(name, rows)
    v, t = (normalize(heads[name](features[name]), dim=-1) for name in NAMES)
    logits, partners = v @ t.T / 0.07, torch.arange(PAIRS)
    of_images = torch.nn.functional.cross_entropy(logits, partners, label_smoothing=smoothing)
    of_texts = torch.nn.functional.cross_entropy(logits.T, partners, label_smoothing=smoothing)
    return (of_images.item() + of_texts.item()) / 2


def test_smoothing_is_of_the_loss_that_trains() -> None:
    """Without dropout the first loss is that of the same heads, smoothed."""
    for smoothing in (0.0, 0.3):
        loss = first_loss(dropout=0.0, label_smoothing=smoothing)
        assert loss == pytest.approx(smoothed_loss_of_new_heads(smoothing), rel=1e-4)
    # Far above the tolerance, so that a loss without smoothing would not pass.
    assert abs(smoothed_loss_of_new_heads(0.3) - smoothed_loss_of_new_heads(0.0)) > 0.01


def test_dropout_is_of_the_loss_that_trains_and_a_share_of_three_tenths_by_default() -> None:
    losses = {dropout: first_loss(dropout=dropout) for dropout in (0.0, 0.3, 0.9)}
    assert len({*losses.values()}) == len(losses)
    assert losses[0.3] == first_loss()


@pytest.mark.parametrize("dropout", [0.0, 0.3, 0.9])
def test_trained_heads_know_their_dropout_and_leave_it_out(dropout: float) -> None:
    features = random_features()
    heads, _, _ = train(features, None, Training(epochs=1, batch_size=PAIRS, dropout=dropout))
    assert {module.p for module in heads.modules() if isinstance(module, torch.nn.Dropout)} == {dropout}
    once, again = (heads[NAMES[0]](features[NAMES[0]]) for _ in range(2))
    assert torch.equal(once, again)


@pytest.mark.parametrize(
    ("option", "value"),
    [("spread-weight", "-1"), ("dropout", "1"), ("label-smoothing", "1")],
    ids=["a negative weight", "all units dropped", "all of the label smoothed"],
)
def test_a_number_out_of_its_bounds_is_refused(
    sample_folder: Path, tmp_path: Path, capsys: Any, option: str, value: str
) -> None:
    assert run_heads(sample_folder, tmp_path / "x", sample_folder / "train.csv", f"--{option}", value) == 1
    assert re.search(rf"--{option} must be .*; got {value}", capsys.readouterr().err)
    assert not (tmp_path / "x").exists()


def test_a_folder_of_something_else_is_left_alone(sample_folder: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    error = refusal(capsys, run_heads(sample_folder, tmp_path, sample_folder / "train.csv"))
    assert f"--output {tmp_path} is there and no folder of heads: give a new one" in error
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]


def test_a_folder_of_something_else_is_not_loaded(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no heads.json: it is no folder of rankloss heads"):
        load_heads(tmp_path)


ABSENT = object()
"""In place of a value: the entry is missing."""
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
"""Values that an entry of ``heads.json`` may not have, by the keys that lead to it."""


def words_of_refusal(keys: tuple[Any, ...], value: Any) -> str:
    """The pattern of the error for an entry: of another kind, or of a right kind that the weights refuse."""
    sizes = ("image_features", "hidden", "width")
    if keys[-1] in sizes and value in (7, 2**40):
        return "safetensors does not fit: "
    if keys == ("hash",) and value == "0" * 32:  # the weights' file has its beginning in its name
        return "heads-0+.safetensors, which heads.json names, is missing"
    if keys == ("method",) and value is ABSENT:  # as in an earlier release, which has no parts
        return "heads.json is damaged: 'parts' must be"
    return rf"heads.json(:| is damaged:) .*{keys[0]}"


@pytest.mark.parametrize(
    ("keys", "value"),
    [(keys, value) for keys, values in WRONG.items() for value in (ABSENT, *values)],
    ids=lambda argument: "absent" if argument is ABSENT else str(argument),
)
def test_entries_of_a_folder_that_another_made_are_refused_without_their_memory(
    folder: Path, tmp_path: Path, keys: tuple[Any, ...], value: Any
) -> None:
    """A width of 2**40 would take terabytes if a module of it were made before it is refused."""
    shutil.copytree(folder, tmp_path / "heads")
    about = json.loads((folder / "heads.json").read_text())
    *outer, last = keys
    entries = functools.reduce(operator.getitem, outer, about)
    if value is ABSENT:
        del entries[last]
    else:
        entries[last] = value
    (tmp_path / "heads/heads.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match=words_of_refusal(keys, value)):
        load_heads(tmp_path / "heads")


@pytest.mark.parametrize("text", ["", "[]", "7", "[" * 100_000])
def test_a_file_of_something_else_is_no_heads(folder: Path, tmp_path: Path, text: str) -> None:
    shutil.copytree(folder, tmp_path / "heads")
    (tmp_path / "heads/heads.json").write_text(text)
    with pytest.raises(ValueError, match=r"heads.json (is damaged|cannot be read)"):
        load_heads(tmp_path / "heads")


def test_a_pipe_is_no_heads(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "heads")
    (tmp_path / "heads/heads.json").unlink()
    os.mkfifo(tmp_path / "heads/heads.json")
    with pytest.raises(ValueError, match=r"heads.json cannot be read: it is no regular file"):
        load_heads(tmp_path / "heads")


def test_heads_find_their_local_encoders_from_another_folder(
    sample_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(sample_folder)
    encoders = ["--image-encoder", "local-dir:image_encoder", "--text-encoder", "text_encoder"]
    options = ["--data", "train.csv", "--val-data", "val.csv", "--workers", "0", "--epochs", "1"]
    options += ["--method", TRAINED]
    assert main(["heads", *encoders, *options, "--output", str(tmp_path / "heads")]) == 0
    monkeypatch.chdir(tmp_path)
    assert load_heads("heads").encode_texts(["a red circle"]).shape == (1, 256)


NAMES_OF_OPEN_CLIP = {"model": "ViT-B-32-quickgelu", "pretrained": "openai"}
NAMES_OF_PACKAGES = {"image_encoder": "efficientnet-lite0", "text_encoder": "minilm"}
NAMES_OF_LOCAL_FILES = {"model": "ViT-B-32", "pretrained": "epoch_5.pt"}


@pytest.mark.parametrize(
    ("names", "are_paths"),
    [
        (NAMES_OF_OPEN_CLIP, set()),
        (NAMES_OF_PACKAGES, set()),
        (NAMES_OF_LOCAL_FILES, {"pretrained"}),
        ({"image_encoder": "own_encoder", "image_weights": "own.pth"}, {"image_encoder", "image_weights"}),
        ({"model": "clip_of_transformers"}, {"model"}),
    ],
    ids=["a model and a tag", "packages", "a model and a file", "a folder and a file", "a folder"],
)
def test_a_name_is_stored_as_a_path_only_if_its_loader_opens_one(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: dict[str, str], are_paths: set[str]
) -> None:
    """Of every name there is a folder, or of one with an ending a file, in the working directory."""
    for name in names.values():
        if Path(name).suffix:
            (tmp_path / name).write_bytes(b"")
        else:
            (tmp_path / name).mkdir()
    (tmp_path / "clip_of_transformers").mkdir(exist_ok=True)
    (tmp_path / "clip_of_transformers/config.json").write_text("{}")
    model = load_heads(folder)
    model.encoders = Encoders(**names)
    monkeypatch.chdir(tmp_path)
    model.save("heads")
    stored = json.loads(Path("heads/heads.json").read_text())["encoders"]
    expected = {kind: str(tmp_path / name) if kind in are_paths else name for kind, name in names.items()}
    assert {kind: name for kind, name in stored.items() if name is not None} == expected


def test_a_tag_is_no_file_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So the weights that open_clip takes, by the tag, are not those of a run beside the file."""
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "checkpoints/openai").write_bytes(b"")
    (run / "params.txt").write_text("model: ViT-L-14\n")
    monkeypatch.chdir(run / "checkpoints")
    assert trained_files.options_of("ViT-B-32-quickgelu", "openai") == {}


def test_weights_may_stand_beside_a_name_of_open_clip_that_a_folder_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ViT-B-32").mkdir()
    (tmp_path / "own_clip").mkdir()
    monkeypatch.chdir(tmp_path)
    clip_models.check_pretrained("ViT-B-32", "laion2b_s34b_b79k")
    with pytest.raises(ValueError, match="the folder --model own_clip has its own weights"):
        clip_models.check_pretrained("own_clip", "laion2b_s34b_b79k")


@pytest.fixture
def on_copies(sample_folder: Path, folder: Path, tmp_path: Path) -> Path:
    """A folder with the heads, and with copies of their encoders on which they stand."""
    shutil.copytree(folder, tmp_path / "heads")
    about = json.loads((folder / "heads.json").read_text())
    for name in ("image_encoder", "text_encoder"):
        shutil.copytree(sample_folder / name, tmp_path / name)
        about["encoders"][name] = str(tmp_path / name)
    (tmp_path / "heads/heads.json").write_text(json.dumps(about))
    assert load_heads(tmp_path / "heads").encode_texts(["a red circle"]).shape[0] == 1
    return tmp_path


def test_heads_on_another_encoder_than_they_were_trained_with_are_refused(on_copies: Path) -> None:
    file = next((on_copies / "text_encoder").rglob("*.safetensors"))
    save_file({name: tensor + 1 for name, tensor in load_file(file).items()}, file)
    with pytest.raises(ValueError, match=r"was trained on text_weights .*; the encoder that is found has"):
        load_heads(on_copies / "heads")


@pytest.mark.parametrize("changed", NAMES)
def test_heads_on_an_encoder_with_other_preparation_of_its_inputs_are_refused(
    on_copies: Path, changed: str
) -> None:
    tiny.prepare_otherwise(on_copies, changed)
    words = f"was trained on another .*: {changed} of a fixed input have a cosine"
    with pytest.raises(ValueError, match=words):
        load_heads(on_copies / "heads")


def test_weights_that_are_not_as_they_were_written_are_refused(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "heads")
    weights_of(tmp_path / "heads").write_bytes(b"{}")
    with pytest.raises(ValueError, match=r"heads-\w+.safetensors is not as it was written with heads.json"):
        load_heads(tmp_path / "heads")


# --- statistics -------------------------------------------------------------------------------------------


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
    heads, _, _ = train(features, None, Training(epochs=epochs, batch_size=128))
    for name, x in features.items():
        standardised = heads[name][0](x)
        varies = x.std(dim=0) > 0
        torch.testing.assert_close(standardised.mean(dim=0), torch.zeros(x.shape[1]), atol=1e-4, rtol=0)
        torch.testing.assert_close(standardised.std(dim=0, correction=0), varies.float(), atol=1e-4, rtol=0)


def test_a_dimension_that_is_constant_in_a_training_does_not_drown_the_others_later() -> None:
    generator = torch.Generator().manual_seed(0)
    features = unit_features(64, generator)
    heads, _, _ = train(features, None, Training(epochs=1, batch_size=32))
    later = features[NAMES[0]].clone()
    later[:, 3] += 0.1  # as much as the others vary
    # A tenth of the others' spread is the least that divides, which gives some 10; its own is about 0.
    assert heads[NAMES[0]][0](later).abs().max() < 30


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (torch.full((24, 8), math.nan), "image_features must be finite; got NaN or infinity"),
        (torch.ones(24, 8), "image_features must not be one row 24 times, which ranks nothing"),
    ],
    ids=["NaN", "one row"],
)
def test_features_that_teach_nothing_are_refused(wrong: Tensor, message: str) -> None:
    features = {NAMES[0]: wrong, NAMES[1]: torch.randn(24, 8)}
    with pytest.raises(ValueError, match=message):
        train(features, None, Training(epochs=1))


def normalised_batches() -> list[Tensor]:
    """Batches of features of 64 dimensions, which an earlier release has normalised one after another."""
    generator = torch.Generator().manual_seed(0)
    return [normalize(torch.rand(24, 64, generator=generator), dim=-1) for _ in range(3)]


def earlier_weights(weights: dict[str, Tensor], batches: list[Tensor]) -> dict[str, Tensor]:
    """Weights as an earlier release stored them: without probes, and with batch normalisation's statistics.

    A modality that has fewer dimensions has the first of these.
    """
    normalisation = torch.nn.BatchNorm1d(64, affine=False)
    for batch in batches:
        normalisation(batch)
    earlier = {name: tensor for name, tensor in weights.items() if not name.startswith("probe.")}
    for name in NAMES:
        width = len(earlier.pop(f"{name}.0.mean"))
        del earlier[f"{name}.0.std"]
        for kind, tensor in normalisation.state_dict().items():
            earlier[f"{name}.0.{kind}"] = (tensor[:width] if tensor.dim() else tensor).clone()
    return earlier


def earlier_entries(about: dict[str, Any], file: Path) -> dict[str, Any]:
    """Entries as an earlier release stored them: of a single trained head."""
    (part,) = about["parts"]
    kept = {name: value for name, value in about.items() if name not in ("method", "pictures", "parts")}
    encoders = {
        name: encoder for name, encoder in about["encoders"].items() if name not in ("model", "pretrained")
    }
    sizes = {name: part[name] for name in ("hidden", "width")}
    return {**kept, **sizes, "encoders": encoders, "hash": hash_of(file.read_bytes()).hex()}


@pytest.fixture
def earlier(folder: Path, tmp_path: Path) -> Path:
    """The folder of heads as an earlier release wrote it."""
    place = Path(shutil.copytree(folder, tmp_path / "heads"))
    weights_of(place).unlink()
    file = place / "heads.safetensors"
    save_file(earlier_weights(load_file(weights_of(folder)), normalised_batches()), file)
    about = json.loads((folder / "heads.json").read_text())
    (place / "heads.json").write_text(json.dumps(earlier_entries(about, file)))
    return place


@pytest.mark.parametrize("name", NAMES)
def test_an_earlier_folder_is_read_with_the_statistics_of_its_features(earlier: Path, name: str) -> None:
    """Those of batch normalisation, of which 0.9³ is left of their first values 0 and 1."""
    batches = normalised_batches()  # three
    shares = torch.tensor([0.1 * 0.9**2, 0.1 * 0.9, 0.1]) / (1 - 0.9**3)
    # Its momentum is 0.1, so a batch counts 0.9 times as much as the next one.
    mean = sum(share * batch.mean(dim=0) for share, batch in zip(shares, batches, strict=True))
    variance = sum(share * batch.var(dim=0) for share, batch in zip(shares, batches, strict=True))
    standardisation: Any = load_heads(earlier).heads[name][0]
    width = len(standardisation.mean)
    torch.testing.assert_close(standardisation.mean, mean[:width])
    # The latter term is what batch normalisation adds.
    torch.testing.assert_close(standardisation.std, (variance[:width] + 1e-5).sqrt(), rtol=1e-4, atol=0)


def test_an_earlier_folder_encodes(earlier: Path) -> None:
    assert load_heads(earlier).encode_texts(["a red circle"]).isfinite().all()


# --- pictures ---------------------------------------------------------------------------------------------


def awkward(picture: Image.Image, number: int, file: Path) -> Path:
    """A picture in a PNG file of one of three kinds in turn: turned by a quarter, of 16 bits, transparent."""
    if number % 3 == 0:
        exif = Image.Exif()
        exif[0x0112] = 6  # the camera's orientation
        picture.save(file, "PNG", exif=exif)
    elif number % 3 == 1:
        grey = np.asarray(picture.convert("L"), np.uint16) * 257
        Image.fromarray(grey).save(file, "PNG")
    else:
        transparent = picture.convert("RGBA")
        transparent.putalpha(picture.convert("L"))
        transparent.save(file, "PNG")
    return file


def write_table(folder: Path, rows: list[dict[str, str]]) -> Path:
    return write_csv(folder / "train.csv", rows)


def write_dataset(folder: Path, rows: list[dict[str, str]]) -> Path:
    columns = {"image": [row["filepath"] for row in rows], "caption": [row["title"] for row in rows]}
    datasets.Dataset.from_dict(columns).save_to_disk(folder / "data")
    return folder / "data"


def write_shard(folder: Path, rows: list[dict[str, str]]) -> Path:
    with tarfile.open(folder / "data.tar", "w") as tar:
        for number, row in enumerate(rows):
            picture = Path(row["filepath"]).read_bytes()
            add_sample(tar, f"{number:02}", png=picture, txt=row["title"].encode())
    return folder / "data.tar"


BACKGROUND = "gray"


@dataclass(frozen=True)
class OnAwkward:
    """Heads that were trained on pictures of :func:`awkward`."""

    folder: Path
    files: list[Path]
    """The pictures."""
    trained: Tensor
    """The heads' features of the pictures, from the encoder's features as the training was given them."""


@pytest.fixture(scope="module", params=[write_table, write_dataset, write_shard])
def on_awkward(
    request: pytest.FixtureRequest, sample_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> OnAwkward:
    """Such heads, of a table, a folder of datasets and a shard in turn."""
    place, rows = tmp_path_factory.mktemp("awkward"), read_csv(sample_folder / "train.csv")
    files = []
    for number, row in enumerate(rows):
        files.append(awkward(Image.open(row["filepath"]), number, place / f"{number:02}.png"))
        row["filepath"] = str(files[-1])
    trained_features: list[dict[str, Tensor]] = []

    def train_and_keep_features(features: dict[str, Tensor], *args: Any) -> Any:
        trained_features.append(features)
        return train(features, *args)

    options = ("--val-data", str(sample_folder / "val.csv"), "--background", BACKGROUND)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(methods, "train", train_and_keep_features)
        assert run_heads(sample_folder, place / "heads", request.param(place, rows), *options) == 0
    with torch.no_grad():
        trained = normalize(
            load_heads(place / "heads").heads[NAMES[0]](trained_features[0][NAMES[0]]), dim=-1
        )
    return OnAwkward(place / "heads", files, trained)


@pytest.mark.parametrize("opened", [str, Image.open, Path.read_bytes])
def test_new_pictures_are_opened_as_those_that_trained(on_awkward: OnAwkward, opened: Any) -> None:
    """By their paths, opened, or as the bytes of their files."""
    features = load_heads(on_awkward.folder).encode_images([opened(file) for file in on_awkward.files])
    torch.testing.assert_close(features, on_awkward.trained, atol=1e-5, rtol=0)


def test_heads_as_a_teacher_open_pictures_as_those_that_trained(on_awkward: OnAwkward) -> None:
    rendering = load_heads(on_awkward.folder).rendering
    assert rendering == Rendering(upright=True, background=BACKGROUND)
    arguments = Namespace(model=str(on_awkward.folder), pretrained=None)
    assert sources.load(["model"], arguments, torch.device("cpu")).rendering == rendering


def wide_encoders(*_: Any) -> Teacher:
    """Two encoders of 1024 numbers each."""
    generator = torch.Generator().manual_seed(0)
    of_pixels, of_letters = (
        torch.randn(inputs, 1024, generator=generator) for inputs in (tiny.PIXELS, tiny.LETTERS)
    )
    prepare = functools.partial(tiny.pixels, 8)
    images = image_encoder(prepare, lambda pixels: pixels @ of_pixels, 1024, torch.device("cpu"))
    texts = Encoder(tiny.letters, lambda letters: letters @ of_letters, 1024)
    return Teacher({}, dict(zip(NAMES, (images, texts), strict=True)), spaces="separate")


def write_many_pairs(file: Path, rows: int, first: int) -> Path:
    """A table of captions of forty pictures, whose numbers begin with the first."""
    for number in range(first, first + 40):
        (file.parent / f"{number}.png").write_bytes(tiny.picture(number))
    lines = [f"{file.parent}/{first + i % 40}.png\tcaption {i} from {first}" for i in range(rows)]
    file.write_text("\n".join(["filepath\ttitle", *lines]))
    return file


@pytest.mark.parametrize(
    ("has_val_data", "most"),
    [
        # Of both modalities as 1: parting one copies it, which is 1.5. A copy of both would be 2.
        pytest.param(False, 1.75, id="split off"),
        # Nothing is parted. A copy of one modality would be 1.5.
        pytest.param(True, 1.3, id="given"),
    ],
)
def test_memory_holds_the_features_of_all_pairs_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_val_data: bool, most: float
) -> None:
    """And, where held-out pairs are split off, a copy of one modality while it is parted.

    Each bound lies between what is needed and one copy more; batches and captions take the rest.
    """
    rows = 2000  # of both sides; a tenth is held out
    pairs = write_many_pairs(tmp_path / "many.csv", rows * 9 // 10 if has_val_data else rows, first=0)
    others = write_many_pairs(tmp_path / "others.csv", rows // 10, first=40)
    monkeypatch.setattr(Encoders, "load", wide_encoders)
    live, bytes_at_training = LiveBytes(), list[int]()

    def train_a_step_and_end(asked: Any, pairs: methods.Pairs) -> Any:
        """In place of the making of heads: note the memory, and end the command after a step."""
        bytes_at_training.append(live.now)
        train(pairs.features, None, Training(epochs=1, hidden=8, width=8, batch_size=64))
        raise ValueError("made")

    monkeypatch.setattr(train_heads, "make", train_a_step_and_end)
    options = ["--val-data", str(others)] if has_val_data else []
    with live:
        assert run_heads(tmp_path, tmp_path / "x", pairs, *options) == 1
    features = rows * 2 * 1024 * 4  # bytes, float32
    assert live.peak < most * features
    assert bytes_at_training[0] < 1.2 * features  # no copy of a modality is left


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
    ids=[
        "an unknown device",
        "a missing device",
        "the meta device",
        "a seed of 65 bits",
        "a negative seed",
        "a large learning rate",
        "a learning rate of NaN",
        "a large width",
        "negative workers",
        "an unknown colour",
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
    code = run_heads(sample_folder, tmp_path / "x", sample_folder / "train.csv", f"--{option}", value)
    assert message in refusal(capsys, code)
    assert not (tmp_path / "x").exists()


def test_a_training_that_diverges_names_the_options() -> None:
    features = unit_features(64, torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match=r"diverged in epoch 1: give less than --lr 1e\+30$"):
        train(features, None, Training(epochs=3, batch_size=16, lr=1e30))
    with pytest.raises(ValueError, match=r"give less than --lr 1e\+30 or --spread-weight 2$"):
        train(features, None, Training(epochs=3, batch_size=16, lr=1e30, spread_weight=2.0))


@pytest.fixture
def no_encoder_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Encoders, "load", lambda *_: pytest.fail("the encoders are loaded"))


@pytest.mark.usefixtures("no_encoder_is_loaded")
def test_trained_heads_are_not_replaced_without_a_demand(
    sample_folder: Path, folder: Path, tmp_path: Path, capsys: Any
) -> None:
    shutil.copytree(folder, tmp_path / "heads")
    error = refusal(capsys, run_heads(sample_folder, tmp_path / "heads", sample_folder / "train.csv"))
    assert f"--output {tmp_path}/heads has trained heads: give another folder, or --overwrite" in error
    assert tiny.contents_of_files(tmp_path / "heads") == tiny.contents_of_files(folder)


def test_trained_heads_are_replaced_on_demand(sample_folder: Path, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "heads")
    options = ("--val-data", str(sample_folder / "val.csv"), "--ids-key", "product", "--seed", "1")
    table = sample_folder / "train.csv"
    assert run_heads(sample_folder, tmp_path / "heads", table, *options, "--overwrite") == 0
    after = tiny.contents_of_files(tmp_path / "heads")
    assert len(after) == 2  # the entries and the weights
    assert not {*after.values()} & {*tiny.contents_of_files(folder).values()}
    load_heads(tmp_path / "heads")


@pytest.mark.usefixtures("no_encoder_is_loaded")
def test_a_file_in_the_place_of_the_folder_is_refused_before_the_training(
    sample_folder: Path, tmp_path: Path, capsys: Any
) -> None:
    (tmp_path / "file").write_text("mine")
    error = refusal(capsys, run_heads(sample_folder, tmp_path / "file", sample_folder / "train.csv"))
    assert f"--output {tmp_path}/file is no folder" in error


@pytest.mark.usefixtures("no_encoder_is_loaded")
def test_a_place_that_cannot_be_written_is_refused_before_the_training(
    sample_folder: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)  # root may write anywhere
    error = refusal(capsys, run_heads(sample_folder, tmp_path / "new/x", sample_folder / "train.csv"))
    assert f"--output {tmp_path}/new/x cannot be written: {tmp_path} may not be changed" in error


# --- interruptions ------------------------------------------------------------------------------------------


def has_weights_of(model: FrozenEncoders, other: FrozenEncoders) -> bool:
    """True if both have the same heads, bit for bit.

    Features are no test of that: a product may be rounded by where in memory the weights lie.
    """
    weights, expected = model.heads.state_dict(), other.heads.state_dict()
    if weights.keys() != expected.keys():
        return False
    return all(torch.equal(weight, expected[name]) for name, weight in weights.items())


def test_a_kill_at_any_step_of_a_saving_leaves_the_old_heads_or_the_new(folder: Path, tmp_path: Path) -> None:
    """At each step in turn, until a saving has fewer steps; the next saving goes through."""
    old = load_heads(folder)
    widths = {name: encoder.width for name, encoder in old._frozen.encoders.items()}
    heads = make_heads(widths, hidden=16, width=8)
    new = FrozenEncoders(old.encoders, old._frozen, [Part.trained(heads, share=1.0)], scale=20.0)
    left = []  # which heads each kill left
    for step in itertools.count(1):
        place = tmp_path / str(step)
        shutil.copytree(folder, place)
        if tiny.in_process(save_and_die, new, place, step) == 0:
            break
        loaded = load_heads(place)
        (heads_left,) = [name for name, x in {"old": old, "new": new}.items() if has_weights_of(loaded, x)]
        left.append(heads_left)
        new.save(place)
        assert has_weights_of(load_heads(place), new)
    olds = left.count("old")
    assert 0 < olds < len(left)  # there is a kill before the new heads stand, and one after
    assert left == ["old"] * olds + ["new"] * (len(left) - olds)


def save_and_die(model: FrozenEncoders, place: Path, step: int) -> None:
    """Save, but be killed at a call, by its number, that changes a file: these are the steps of a saving."""
    calls = itertools.count(1)

    def dying(function: Any) -> Any:
        """The function, whose call kills this process if it is the one of that number."""

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
    rows = read_csv(sample_folder / "train.csv")
    for number, row in enumerate(rows[16:32]):
        row["filepath"] = shutil.copy(row["filepath"], f"{tmp_path}/{number}.png")
        row["product"] = f"another {number}"
    held_out = ["--val-data", str(write_csv(tmp_path / "val.csv", rows[16:32]))]
    # With ids, whose values are others here, pictures are compared, too.
    for options in (held_out, [*held_out, "--ids-key", "product"]):
        code = run_heads(sample_folder, tmp_path / "x", sample_folder / "train.csv", *options)
        error = refusal(capsys, code)
        assert "16 pictures of --val-data are in --data, too; the first is '0.png', of row 0" in error
    assert not (tmp_path / "x").exists()


def test_captions_of_one_picture_in_shards_are_on_one_side(
    sample_folder: Path, tmp_path: Path, capsys: Any
) -> None:
    shard = write_webdataset(tmp_path / "x.tar", with_captions(sample_folder, 5))
    assert run_heads(sample_folder, tmp_path / "x", shard) == 0
    printed = capsys.readouterr().out
    # Of 48 pictures with five captions each, a tenth is held out.
    assert "training on 220 pairs of 44 pictures" in printed
    assert "4 pictures, 20 texts" in printed


def test_shards_are_held_out_by_other_shards(sample_folder: Path, tmp_path: Path, capsys: Any) -> None:
    shard = write_webdataset(tmp_path / "a.tar", read_csv(sample_folder / "train.csv"))
    held_out = write_webdataset(tmp_path / "b.tar", read_csv(sample_folder / "val.csv"))
    options = ("--val-data", str(held_out), "--ids-key", "id")
    assert run_heads(sample_folder, tmp_path / "x", shard, *options) == 0
    assert "48 pairs of 24 ids of 'id'" in capsys.readouterr().out  # train.csv whole: nothing is split off


def test_shards_with_pictures_of_the_training_are_not_held_out(
    sample_folder: Path, tmp_path: Path, capsys: Any
) -> None:
    shard = write_webdataset(tmp_path / "a.tar", read_csv(sample_folder / "train.csv"))
    error = refusal(capsys, run_heads(sample_folder, tmp_path / "x", shard, "--val-data", str(shard)))
    assert "48 pictures of --val-data are in --data, too" in error


# --- what is encoded --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(folder: Path) -> FrozenEncoders:
    return load_heads(folder)


def test_one_text_is_no_list_of_texts(model: FrozenEncoders) -> None:
    with pytest.raises(ValueError, match="texts must be several, in a list; got 'a red shoe'"):
        model.encode_texts("a red shoe")


@pytest.mark.parametrize("as_given", [str, Path, Path.read_bytes])
def test_a_file_of_a_picture_is_no_list_of_pictures(
    model: FrozenEncoders, sample_folder: Path, as_given: Any
) -> None:
    with pytest.raises(ValueError, match="pictures must be several, in a list; got"):
        model.encode_images(as_given(sample_folder / "pictures/red-circle-large.png"))


def test_an_open_picture_is_no_list_of_pictures(model: FrozenEncoders) -> None:
    with pytest.raises(ValueError, match="pictures must be several, in a list; got"):
        model.encode_images(Image.new("RGB", (8, 8)))


def test_what_is_no_text_is_named_by_its_place(model: FrozenEncoders) -> None:
    with pytest.raises(ValueError, match="texts must be of type str; got None in place 1"):
        model.encode_texts(["a red shoe", None])


def test_what_is_no_picture_is_named_by_its_place(model: FrozenEncoders) -> None:
    with pytest.raises(ValueError, match="in place 0 stands 7"):
        model.encode_images([7])


def test_an_empty_list_has_no_rows(model: FrozenEncoders) -> None:
    assert model.encode_texts([]).shape == model.encode_images([]).shape == (0, 256)


def test_a_long_list_is_encoded_in_its_order(model: FrozenEncoders) -> None:
    """In three batches of at most 64 texts, whose words change within a batch and from one to the next."""
    words = ("red", "blue", "circle", "square")
    texts = [f"a {words[n % 4]} {words[n % 3]} {words[n // 64]}" for n in range(150)]
    one_by_one = torch.cat([model.encode_texts([text]) for text in texts])
    torch.testing.assert_close(model.encode_texts(texts), one_by_one, atol=1e-5, rtol=0)
