"""Files of weights of open_clip's trainer: models are built, and pictures prepared, as in the training."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from open_clip.factory import _MODEL_CONFIGS
from open_clip.transform import PreprocessCfg
from PIL import Image
from tiny_teacher import CLIP_CONFIG, picture
from torch import Tensor

from rankloss_features import clip_models, opening
from rankloss_features.data import Sample
from rankloss_features.trained_files import options_of

NAME = "tiny-clip"
GIVEN = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.6, 0.7], "force_quick_gelu": True}
"""Options of a training that are not in its file of weights."""
SIGLIP = {"image_mean": (0.5,) * 3, "image_std": (0.5,) * 3, "image_interpolation": "bicubic"}
"""The pictures of SigLIP's published weights."""
Save = Callable[..., Path]


@pytest.fixture
def saved(tmp_path: Path) -> Save:
    """A function that writes a file of weights, beside the options of its run if some are given."""

    def save(content: Any = None, **options: Any) -> Path:
        file = tmp_path / "run/checkpoints/epoch_1.pt"
        file.parent.mkdir(parents=True)
        torch.save(content, file)
        lines = [f"{name}: {value}\n" for name, value in options.items()]
        if lines:
            (tmp_path / "run/params.txt").write_text("".join(lines))
        return file

    return save


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A tiny CLIP among open_clip's models."""
    (tmp_path / f"{NAME}.json").write_text(json.dumps(CLIP_CONFIG))
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIGS", dict(_MODEL_CONFIGS))
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIG_PATHS", [*open_clip.factory._MODEL_CONFIG_PATHS])
    open_clip.add_model_config(tmp_path)


@pytest.mark.skipif(torch.__version__ < "2.10", reason="this torch does not read pickles of weights safely")
@pytest.mark.usefixtures("tiny")
def test_pictures_have_the_features_that_they_had_in_the_training(saved: Save) -> None:
    torch.manual_seed(0)
    trained, _, prepare = open_clip.create_model_and_transforms(NAME, **GIVEN)
    weights = saved({"state_dict": trained.state_dict()}, model=NAME, pretrained="", **GIVEN)
    opened = Image.open(picture_file(weights.parent))
    with torch.no_grad():
        expected = trained.eval().encode_image(prepare(opened)[None])
    torch.testing.assert_close(features_of(opened, weights), expected)


@pytest.mark.skipif(torch.__version__ < "2.10", reason="this torch does not read pickles of weights safely")
@pytest.mark.usefixtures("tiny")
def test_a_checkpoint_of_a_training_with_siglip_is_read_with_its_bias(saved: Save) -> None:
    trained = open_clip.create_model(NAME, init_logit_bias=-10.0)  # as the trainer's --siglip builds it
    trained.logit_bias.data.fill_(-3.0)  # as training has moved it
    weights = saved({"state_dict": trained.state_dict()}, model=NAME, pretrained="", siglip=True)
    options = options_of(NAME, str(weights))
    opened, _, _ = opening.open_clip_model(NAME, str(weights), torch.device("cpu"), **options)
    assert opened.logit_bias.item() == -3.0
    clip_models.load(NAME, str(weights), torch.device("cpu"))  # raises without the run's option


def picture_file(folder: Path) -> Path:
    """A file of a picture that is larger than the model's, so that its preparation shows."""
    file = folder / "picture.png"
    file.write_bytes(picture(0, size=16))
    return file


def features_of(opened: Image.Image, weights: Path) -> Tensor:
    """The features that a command computes."""
    encoder: Any = clip_models.load(NAME, str(weights), torch.device("cpu")).encoders["image_features"]
    with torch.no_grad():
        features: Tensor = encoder.encode(encoder.prepare([Sample(0, "", "", lambda: opened, "0")]))
    return features


@pytest.mark.parametrize(
    ("run", "options"),
    [
        ({"pretrained": "webli"}, {**SIGLIP, "image_resize_mode": "squash"}),
        ({"pretrained": "webli", "image_resize_mode": "longest"}, {**SIGLIP, "image_resize_mode": "longest"}),
        ({"pretrained": "", "image_mean": None, "force_quick_gelu": False}, {}),
        ({"pretrained": "", "force_image_size": 320}, {"force_image_size": 320}),
    ],
    ids=["of published weights", "with an option", "from scratch", "of another size"],
)
def test_the_options_are_those_of_the_run(run: dict[str, Any], options: dict[str, Any], saved: Save) -> None:
    assert options_of("ViT-B-16-SigLIP", str(saved(model="ViT-B-16-SigLIP", **run))) == options


def configuration(name: str, *, pictures: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    """The content of an ``open_clip_config.json``: a built-in model's, with changes of its ``model_cfg``."""
    return {"model_cfg": {**open_clip.get_model_config(name), **changes}, "preprocess_cfg": pictures or {}}


def as_folder(folder: Path, content: dict[str, Any]) -> dict[str, str]:
    """Write a configuration into a folder, and return the options of a run of that model."""
    (folder / "clip").mkdir()
    (folder / "clip/open_clip_config.json").write_text(json.dumps(content))
    return {"model": f"local-dir:{folder}/clip"}


def as_cached_of_hub(folder: Path, content: dict[str, Any]) -> dict[str, str]:
    """Write a configuration as huggingface_hub keeps it, and return the options of a run of that model."""
    commit = "0" * 40
    repository = folder / "cache/models--owner--clip"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text(commit)
    (repository / "snapshots" / commit).mkdir(parents=True)
    (repository / "snapshots" / commit / "open_clip_config.json").write_text(json.dumps(content))
    return {"model": "hf-hub:owner/clip", "cache_dir": f"{folder}/cache"}


Place = Callable[[Path, dict[str, Any]], dict[str, str]]
places = pytest.mark.parametrize("place", [as_folder, as_cached_of_hub])


@pytest.mark.skipif(torch.__version__ < "2.10", reason="this torch does not read pickles of weights safely")
@pytest.mark.usefixtures("tiny")
@places
def test_features_are_of_the_activation_and_pictures_in_the_configuration_of_the_trained_model(
    place: Place, saved: Save, tmp_path: Path
) -> None:
    """The file of weights fits the built-in model of this name, too, whose activation is the other GELU."""
    pictures = {"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.6, 0.7]}
    run = place(tmp_path, configuration(NAME, pictures=pictures, quick_gelu=True))
    torch.manual_seed(0)
    trained, _, prepare = open_clip.create_model_and_transforms(
        NAME, quick_gelu=True, image_mean=pictures["mean"], image_std=pictures["std"]
    )
    weights = saved({"state_dict": trained.state_dict()}, pretrained="", **run)
    opened = Image.open(picture_file(weights.parent))
    with torch.no_grad():
        expected = trained.eval().encode_image(prepare(opened)[None])
    torch.testing.assert_close(features_of(opened, weights), expected)


@pytest.mark.parametrize(
    ("name", "configured", "run", "expected"),
    [
        pytest.param("ViT-B-32", False, {}, {}, id="both GELU"),
        pytest.param("ViT-B-32", True, {}, {"quick_gelu": True}, id="QuickGELU under the name of GELU"),
        pytest.param(
            "ViT-B-32-quickgelu", False, {}, {"quick_gelu": False}, id="GELU under the name of QuickGELU"
        ),
        pytest.param(
            "ViT-B-32",
            False,
            {"force_quick_gelu": True},
            {"force_quick_gelu": True},
            id="the option of the run counts more",
        ),
    ],
)
def test_the_activation_is_that_of_the_run(
    name: str, configured: bool, run: dict[str, Any], expected: dict[str, Any], saved: Save, tmp_path: Path
) -> None:
    trained = as_folder(tmp_path, configuration("ViT-B-32", quick_gelu=configured))
    assert options_of(name, str(saved(pretrained="", **trained, **run))) == expected


@places
def test_options_of_a_run_count_more_than_the_configuration_of_its_model(
    place: Place, saved: Save, tmp_path: Path
) -> None:
    other_pictures = {"mean": [0.5] * 3, "std": [0.5] * 3}
    given = {**GIVEN, "force_image_size": 320}
    run = place(tmp_path, configuration("ViT-B-32", pictures={**other_pictures, "resize_mode": "squash"}))
    weights = saved(**run, pretrained="", siglip=True, image_interpolation=None, **given)
    bias_of_siglip = {"init_logit_bias": -10.0}  # which the file's own bias replaces
    of_the_configuration_alone = {"image_resize_mode": "squash"}
    assert options_of("ViT-B-32", str(weights)) == {**given, **bias_of_siglip, **of_the_configuration_alone}


@pytest.mark.parametrize(
    ("trained", "remedy"),
    [
        ("local-dir:/gone/clip", "give --model local-dir:FOLDER"),
        ("hf-hub:owner/clip", "`hf download owner/clip open_clip_config.json` brings it"),
    ],
    ids=["folder", "hub"],
)
def test_a_run_whose_models_configuration_is_not_found_is_refused(
    trained: str, remedy: str, saved: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing else says whether the file is of GELU or QuickGELU, although the run's options are known."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "empty"))
    weights = saved(model=trained, pretrained="", cache_dir=None, **GIVEN)
    with pytest.raises(ValueError, match=rf"epoch_1.pt are of --model {trained}, .* not found, .*{remedy}"):
        options_of("ViT-B-32", str(weights))


@places
def test_a_run_whose_model_differs_in_what_no_weight_shows_is_refused(
    place: Place, saved: Save, tmp_path: Path
) -> None:
    """A number of heads changes the features, and no weight's shape."""
    text_tower = open_clip.get_model_config("ViT-B-32")["text_cfg"]
    run = place(tmp_path, configuration("ViT-B-32", text_cfg={**text_tower, "heads": 4}))
    with pytest.raises(ValueError, match=r"differs from ViT-B-32 in text_cfg.heads \(4, not 8\): copy"):
        options_of("ViT-B-32", str(saved(**run, pretrained="")))


@pytest.mark.parametrize("options", [{"patch_dropout": 0.5}, {"image_size": 320}], ids=str)
def test_fields_without_an_effect_on_the_opened_model_may_differ(
    options: dict[str, Any], saved: Save, tmp_path: Path
) -> None:
    """Patches are dropped in training alone, and the run's own option replaces the size of pictures."""
    vision_tower = open_clip.get_model_config("ViT-B-32")["vision_cfg"]
    run = as_folder(tmp_path, configuration("ViT-B-32", vision_cfg={**vision_tower, **options}))
    weights = saved(**run, pretrained="", force_image_size=256)
    assert options_of("ViT-B-32", str(weights)) == {"force_image_size": 256}


@pytest.mark.parametrize(("text", "reason"), [("{", "cannot be read"), ("{}", "has no 'model_cfg'")])
def test_a_damaged_configuration_is_refused(text: str, reason: str, saved: Save, tmp_path: Path) -> None:
    run = as_folder(tmp_path, {})
    (tmp_path / "clip/open_clip_config.json").write_text(text)
    with pytest.raises(ValueError, match=rf"clip/open_clip_config.json {reason}"):
        options_of("ViT-B-32", str(saved(**run, pretrained="")))


def test_weights_of_another_model_are_refused(saved: Save) -> None:
    """Both have the same weights, of other activations."""
    weights = saved(model="ViT-B-32-quickgelu", pretrained="openai")
    with pytest.raises(
        ValueError, match=r"epoch_1.pt are of --model ViT-B-32-quickgelu, as their params.txt"
    ):
        options_of("ViT-B-32", str(weights))


def test_pictures_that_nothing_describes_are_refused_where_the_default_is_not_theirs(saved: Save) -> None:
    """A file in no run: SigLIP's weights want pictures that are squashed, open_clip's default cuts them."""
    weights = str(saved())
    with pytest.raises(ValueError, match=r"nothing says how .*epoch_1.pt, and ViT-B-16-SigLIP .* params.txt"):
        options_of("ViT-B-16-SigLIP", weights)
    assert options_of("ViT-B-32", weights) == {}


def test_published_weights_need_no_options() -> None:
    assert options_of("ViT-B-16-SigLIP", "webli") == {}


def test_open_clips_default_is_that_of_openais_weights() -> None:
    """So a file in no run needs no options, as above, where the model's published weights are OpenAI's."""
    openais = open_clip.get_pretrained_cfg("ViT-B-32", "openai")
    default = vars(PreprocessCfg())
    for name in ("mean", "std", "interpolation", "resize_mode"):
        assert openais[name] == default[name]
