"""Heads in closed form, trained and side by side: their choice, their folder, a CLIP's own space."""

from __future__ import annotations

import contextlib
import io
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_aligning import features_of_pairs
from torch import Tensor

from rankloss.precision import unit_rows
from rankloss_features import methods
from rankloss_features.cca import CanonicalCorrelation, Grid
from rankloss_features.folder import NAMES
from rankloss_features.heads import BOTH, CCA, TRAINED, FrozenEncoders, Part, joined, load_heads
from rankloss_features.heads_training import Training
from rankloss_features.methods import Asked, Made, Pairs, make
from rankloss_features.train_heads import KEEP
from rankloss_trainers.console import main

TRAINING = Training(epochs=2, hidden=16, width=8)


def made_up_pairs() -> Pairs:
    """120 pictures with two captions each, of test_aligning.py; each picture is a group of its own."""
    v, t, numbers = features_of_pairs(120)
    features = dict(zip(NAMES, (unit_rows(v), unit_rows(t)), strict=True))
    return Pairs(features, pictures=numbers, groups=numbers)


@pytest.fixture(autouse=True)
def small_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    """The grid of the search for a setting has four points, and their square roots."""
    grid = Grid(image_ridges=(0.1, 1.0), text_ridges=(1.0,), dimensions=(4, 16), powers=(1.0,))
    monkeypatch.setattr("rankloss_features.tuning.Grid", lambda: grid)


@torch.no_grad()
def similarities(made: Made, pairs: Pairs) -> Tensor:
    """The similarities of all pictures and captions by heads."""
    v, t = (unit_rows(made.modules[name](pairs.features[name])) for name in NAMES)
    return v @ t.T


def test_the_closed_form_as_heads_is_the_closed_form_of_the_best_setting() -> None:
    pairs = made_up_pairs()
    made = make(Asked(CCA), pairs)
    assert made.tuned is not None
    best = made.tuned.trials[0]
    images, texts = pairs.features.values()
    cca = CanonicalCorrelation.fit(images, texts, **best.setting.as_options())
    expected = cca.images(images) @ cca.texts(texts).T
    torch.testing.assert_close(similarities(made, pairs), expected, atol=1e-5, rtol=0)
    assert [part.method for part in made.parts] == [CCA]
    assert made.chosen == {CCA: best.recall}


def test_the_similarity_of_parts_side_by_side_is_the_mean_of_theirs_by_shares() -> None:
    pairs = made_up_pairs()
    closed = similarities(make(Asked(CCA, TRAINING), pairs), pairs)
    trained = similarities(make(Asked(TRAINED, TRAINING), pairs), pairs)
    both = make(Asked(BOTH, TRAINING), pairs)
    share_of_closed, share_of_trained = (part.share for part in both.parts)
    mean = share_of_closed * closed + share_of_trained * trained
    torch.testing.assert_close(similarities(both, pairs), mean, atol=1e-5, rtol=0)


def test_shares_add_up_to_one_and_their_ratio_is_the_square_of_the_chosen_weight(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(methods, "WEIGHTS", (2.0,))  # which is chosen; the square of 1 would be 1
    both = make(Asked(BOTH, TRAINING), made_up_pairs())
    share_of_closed, share_of_trained = (part.share for part in both.parts)
    assert share_of_closed + share_of_trained == pytest.approx(1)
    assert share_of_closed / share_of_trained == pytest.approx(2.0**2)


def test_the_weight_is_the_best_on_pairs_that_were_cut_and_heads_of_the_others_choose_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of 120 pictures with two captions, twelve are cut. By made-up recalls the third weight is best."""
    steps: list[tuple[str, int]] = []  # each training and evaluation, with the number of its pairs
    of_weights, of_closed_form, of_trained_head = [0.5, 0.6, 0.9, 0.7, 0.1], 0.4, 0.3
    recalls = iter([*of_weights, of_closed_form, of_trained_head])  # in the order of the evaluations
    train = methods.train

    def train_noting_step(features: dict[str, Tensor], *arguments: Any) -> Any:
        steps.append(("train", len(features[NAMES[0]])))
        return train(features, *arguments)

    def made_up_recall(_: Any, cut: Pairs) -> float:
        steps.append(("evaluate", len(cut.groups)))
        return next(recalls)

    monkeypatch.setattr(methods, "train", train_noting_step)
    monkeypatch.setattr(methods, "recall_of", made_up_recall)
    made = make(Asked(BOTH, TRAINING), made_up_pairs())
    pairs, cut = 120 * 2, 12 * 2
    evaluations = [("evaluate", cut)] * (len(of_weights) + 2)
    assert steps == [("train", pairs - cut), *evaluations, ("train", pairs)]
    third_weight = methods.WEIGHTS[2]
    assert made.chosen == {CCA: of_closed_form, TRAINED: of_trained_head, BOTH: 0.9, "weight": third_weight}


def test_several_trained_heads_have_seeds_of_their_own_and_equal_shares() -> None:
    pairs = made_up_pairs()

    def trained(seed: int, count: int = 1) -> Tensor:
        """The similarities by so many trained heads, whose first has the seed."""
        training = Training(epochs=2, hidden=16, width=8, seed=seed)
        return similarities(make(Asked(TRAINED, training, count=count), pairs), pairs)

    first, second, third = trained(seed=3), trained(seed=4), trained(seed=5)
    torch.testing.assert_close(trained(seed=3, count=3), (first + second + third) / 3, atol=1e-5, rtol=0)
    assert (first - second).abs().max() > 0.01  # far above the tolerance, or equal seeds would pass


def test_a_kept_space_has_its_share_of_the_similarity() -> None:
    """The encoders' features are cut to one width, so that pictures and captions have a space to keep."""
    pairs = made_up_pairs()
    of_one_width = {name: unit_rows(rows[:, :16]) for name, rows in pairs.features.items()}
    pairs = pairs._replace(features=of_one_width)
    images, texts = pairs.features.values()
    new = similarities(make(Asked(CCA), pairs), pairs)
    kept = similarities(make(Asked(CCA, keep=0.8), pairs), pairs)
    torch.testing.assert_close(kept, 0.8 * (images @ texts.T) + 0.2 * new, atol=1e-5, rtol=0)


def test_recall_counts_a_picture_once_and_every_caption() -> None:
    """Twelve pictures, the first two with two captions; both captions of the first fit it worst.

    So of 12 pictures one is no hit among ten, and of 14 captions two.
    """
    numbers = np.array([0, 0, 1, 1, *range(2, 12)])  # of each row's picture
    v = torch.eye(12)[numbers]
    t = v.clone()
    t[:2] = -v[:2]
    heads = torch.nn.ModuleDict({name: torch.nn.Identity() for name in NAMES})
    features = dict(zip(NAMES, (v, t), strict=True))
    recall = methods.recall_of(heads, Pairs(features, pictures=numbers, groups=numbers))
    of_pictures, of_captions = 11 / 12, 12 / 14
    assert recall == pytest.approx((of_pictures + of_captions) / 2)


# --- the command ------------------------------------------------------------------------------------------


def run_heads(sample: Path, output: Path, *options: str, clip: str | None = None) -> int:
    """Run ``rankloss heads`` on the sample's encoders, or on a CLIP, with two epochs; the exit code."""
    encoders = ["--image-encoder", f"{sample}/image_encoder", "--text-encoder", f"{sample}/text_encoder"]
    model = encoders if clip is None else ["--model", clip]
    pairs = ["--data", f"{sample}/train.csv", "--val-data", f"{sample}/val.csv", "--ids-key", "product"]
    epochs = [] if CCA in options else ["--epochs", "2"]  # which are refused beside the closed form alone
    return main(["heads", *model, *pairs, "--output", str(output), "--workers", "0", *epochs, *options])


def test_without_a_method_the_closed_form_stands_beside_a_trained_head(
    sample_folder: Path, tmp_path: Path
) -> None:
    assert run_heads(sample_folder, tmp_path / "x") == 0
    about = json.loads((tmp_path / "x/heads.json").read_text())
    assert about["method"] == BOTH
    assert [part["method"] for part in about["parts"]] == [CCA, TRAINED]


@dataclass(frozen=True)
class Saved:
    """Heads that the command has made by a method."""

    method: str
    parts: list[str]
    """The method that each part must have."""
    folder: Path
    printed: str

    @property
    def about(self) -> dict[str, Any]:
        return dict(json.loads((self.folder / "heads.json").read_text()))


@pytest.fixture(
    scope="module",
    params=[
        (CCA, (), [CCA]),
        (BOTH, ("--heads", "2"), [CCA, TRAINED, TRAINED]),
        (TRAINED, ("--heads", "2"), [TRAINED, TRAINED]),
    ],
    ids=[CCA, BOTH, TRAINED],
)
def saved(
    request: pytest.FixtureRequest, sample_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Saved:
    """The command's heads of every method; the pairs are too few to search a setting."""
    method, options, parts = request.param
    folder = tmp_path_factory.mktemp("heads") / "x"
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert run_heads(sample_folder, folder, "--method", method, *options) == 0
    return Saved(method, parts, folder, printed.getvalue())


def test_a_folder_of_heads_names_its_method_and_that_of_each_part(saved: Saved) -> None:
    assert saved.about["method"] == saved.method
    assert [part["method"] for part in saved.about["parts"]] == saved.parts


def test_the_default_setting_of_a_closed_form_is_printed_where_a_part_has_one(saved: Saved) -> None:
    is_printed = "closed form, of the default setting" in saved.printed
    assert is_printed == (CCA in saved.parts)


def test_evaluate_prints_the_recall_that_the_command_printed(
    saved: Saved, sample_folder: Path, capsys: Any
) -> None:
    def recalls(text: str) -> list[str]:
        return re.findall(r"^(?:picture|text) → .*$", text, re.MULTILINE)

    options = ["--data", f"{sample_folder}/val.csv", "--ids-key", "product", "--workers", "0"]
    assert main(["evaluate", "--model", str(saved.folder), *options]) == 0
    assert recalls(saved.printed) != []
    assert recalls(capsys.readouterr().out) == recalls(saved.printed)


def test_loaded_heads_have_the_widths_of_their_parts_side_by_side(saved: Saved) -> None:
    width = load_heads(saved.folder).encode_texts(["a red circle"]).shape[1]
    assert width == sum(part["width"] for part in saved.about["parts"])


@pytest.mark.parametrize(
    ("keep", "expected"), [("0.75", ["share of the model's own similarity (--keep): 0.75"]), ("0", [])]
)
def test_the_share_of_a_clips_own_similarity_is_printed_if_it_has_one(
    sample_folder: Path, tmp_path: Path, keep: str, expected: list[str], capsys: Any
) -> None:
    clip = f"local-dir:{sample_folder}/open_clip"
    assert run_heads(sample_folder, tmp_path / "x", "--method", CCA, "--keep", keep, clip=clip) == 0
    assert re.findall(r".*--keep.*", capsys.readouterr().out) == expected


def test_a_clip_is_joined_with_its_own_space_by_its_share(sample_folder: Path, tmp_path: Path) -> None:
    clip = f"local-dir:{sample_folder}/open_clip"
    for name, keep in (("kept", "0.75"), ("alone", "0")):
        assert run_heads(sample_folder, tmp_path / name, "--method", CCA, "--keep", keep, clip=clip) == 0
    kept, alone = load_heads(tmp_path / "kept"), load_heads(tmp_path / "alone")
    widths = {name: encoder.width for name, encoder in kept._frozen.encoders.items()}
    as_it_was = FrozenEncoders(
        kept.encoders, kept._frozen, [Part.own(widths, share=1.0)], scale=1.0, rendering=kept.rendering
    )

    def scores(model: FrozenEncoders) -> Tensor:
        pictures = [sample_folder / "pictures/red-circle-large.png"]
        return model.encode_images(pictures) @ model.encode_texts(["a red circle", "a blue square"]).T

    expected = 0.75 * scores(as_it_was) + 0.25 * scores(alone)
    torch.testing.assert_close(scores(kept), expected, atol=1e-5, rtol=0)


def test_a_clip_keeps_most_of_its_own_similarity_unless_a_share_is_given(
    sample_folder: Path, tmp_path: Path
) -> None:
    clip = f"local-dir:{sample_folder}/open_clip"
    assert run_heads(sample_folder, tmp_path / "x", "--method", CCA, clip=clip) == 0
    parts = json.loads((tmp_path / "x/heads.json").read_text())["parts"]
    shares = {part["method"]: part["share"] for part in parts}
    assert shares == {CCA: pytest.approx(1 - KEEP), "own": KEEP}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--keep", "0.5"), "--keep 0.5 keeps the space that images and texts share: it needs --model"),
        (("--keep", "1"), "--keep must be a finite number >= 0 and < 1; got 1.0"),
        (("--method", "cca", "--heads", "2"), "--heads 2 is of trained heads: --method cca trains none"),
        (("--method", "cca", "--batch-size", "64"), "--batch-size 64 is of trained heads: --method cca"),
        (("--method", "cca", "--dropout", "0.1"), "--dropout 0.1 is of trained heads: --method cca trains"),
        (("--heads", "0"), "--heads must be an integer of at least 1; got 0"),
        (("--model", "x"), "teacher must be one of .*; got --model and --image-encoder and --text-encoder"),
        (("--pretrained", "openai"), "--pretrained openai belongs to --model, which is not given"),
    ],
    ids=[
        "a kept space of two encoders",
        "all of the similarity kept",
        "a number of heads of the closed form",
        "a batch of the closed form",
        "dropout of the closed form",
        "no heads",
        "two teachers",
        "a tag without a model",
    ],
)
def test_options_that_do_not_fit_are_refused_before_anything_is_encoded(
    sample_folder: Path, tmp_path: Path, capsys: Any, options: Any, message: str, monkeypatch: Any
) -> None:
    monkeypatch.setattr("rankloss_features.heads.Encoders.load", lambda *_: pytest.fail("loaded"))
    assert run_heads(sample_folder, tmp_path / "x", *options) == 1
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "x").exists()


def test_an_unknown_method_is_refused_by_the_command_line(
    sample_folder: Path, tmp_path: Path, capsys: Any
) -> None:
    with pytest.raises(SystemExit):
        run_heads(sample_folder, tmp_path / "x", "--method", "pca")
    assert "invalid choice: 'pca'" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parts": []}, "'parts' must be a method, a share and sizes for each"),
        ({"parts": [{"method": "cca", "share": 1.0, "width": 4}]}, "'parts' must be a method"),
        ({"parts": [{"method": "own", "share": 2.0}]}, "'parts' must be a method"),
        ({"method": "pca"}, "its heads are of the method 'pca'; this release has cca, trained, both"),
        ({"encoders": {"model": "x"}}, "'encoders' must be the names of two encoders, or of a model"),
    ],
    ids=[
        "no parts",
        "a part without a setting",
        "a share above one",
        "an unknown method",
        "a model without the entries of the encoders",
    ],
)
def test_a_folder_with_an_entry_of_another_kind_is_refused(
    sample_folder: Path, tmp_path: Path, change: Any, message: str, capsys: Any
) -> None:
    assert run_heads(sample_folder, tmp_path / "x", "--method", CCA) == 0
    capsys.readouterr()
    file = tmp_path / "x/heads.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(ValueError, match=message):
        load_heads(tmp_path / "x")


def test_joined_heads_are_the_modules_of_one_part_or_of_all() -> None:
    part = Part.own(dict.fromkeys(NAMES, 3), share=1.0)
    assert joined([part])[NAMES[0]] is part.modules[NAMES[0]]
    assert joined([part, part])[NAMES[0]].width == 3 + 3
