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
"""Options of a training, which its file of weights does not say."""
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


@pytest.mark.parametrize("model", ["local-dir:/gone/clip", "hf-hub:owner/clip"])
def test_options_of_a_run_are_obeyed_where_its_model_was_a_folders_or_a_hubs(model: str, saved: Save) -> None:
    given = {**GIVEN, "force_image_size": 320}
    weights = saved(model=model, pretrained="", siglip=True, image_interpolation=None, **given)
    bias_of_siglip = {"init_logit_bias": -10.0}  # which the file's own bias replaces
    assert options_of("ViT-B-32", str(weights)) == {**given, **bias_of_siglip}


def test_pictures_that_the_options_of_a_run_describe_whole_need_no_known_weights(saved: Save) -> None:
    """All known weights of the model want others than open_clip's default."""
    pictures = {**SIGLIP, "image_resize_mode": "squash"}
    weights = saved(model="hf-hub:timm/ViT-B-16-SigLIP", pretrained="", **pictures)
    assert options_of("ViT-B-16-SigLIP", str(weights)) == pictures


def test_pictures_that_the_options_of_a_run_describe_in_part_are_refused(saved: Save) -> None:
    """SigLIP's weights want pictures that are squashed, open_clip's default cuts them."""
    weights = saved(model="hf-hub:timm/ViT-B-16-SigLIP", pretrained="", **SIGLIP)
    with pytest.raises(ValueError, match=r"nothing says how .*epoch_1.pt, and ViT-B-16-SigLIP .* params.txt"):
        options_of("ViT-B-16-SigLIP", str(weights))


def test_weights_of_another_model_are_refused(saved: Save) -> None:
    """Both have the same weights, of other activations."""
    weights = saved(model="ViT-B-32-quickgelu", pretrained="openai")
    with pytest.raises(
        ValueError, match=r"epoch_1.pt are of --model ViT-B-32-quickgelu, as their params.txt"
    ):
        options_of("ViT-B-32", str(weights))


@pytest.mark.parametrize("run", [{}, {"model": "hf-hub:timm/ViT-B-16-SigLIP", "pretrained": ""}], ids=str)
def test_pictures_that_nothing_describes_are_refused_where_the_default_is_not_theirs(
    run: dict[str, Any], saved: Save
) -> None:
    weights = str(saved(**run))
    with pytest.raises(ValueError, match=r"nothing says how .*epoch_1.pt, and ViT-B-16-SigLIP .* params.txt"):
        options_of("ViT-B-16-SigLIP", weights)
    assert options_of("ViT-B-32", weights) == {}


def test_published_weights_need_no_options() -> None:
    assert options_of("ViT-B-16-SigLIP", "webli") == {}


def test_open_clips_default_is_that_of_openais_weights() -> None:
    """The premise of the error above."""
    openais = open_clip.get_pretrained_cfg("ViT-B-32", "openai")
    default = vars(PreprocessCfg())
    for name in ("mean", "std", "interpolation", "resize_mode"):
        assert openais[name] == default[name]
