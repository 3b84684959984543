"""Image encoders, by the name or path that ``--image-encoder`` has."""

from __future__ import annotations

import difflib
import hashlib
import json
import logging
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
from PIL import Image
from torch import Tensor, nn

from rankloss_features import packages
from rankloss_features.folder import NAMES
from rankloss_features.teachers import Teacher, hash_of_weights, image_encoder
from rankloss_features.weights import fill, untrained

_SIZE = 224  # pixels of an ONNX model that takes any
_logger = logging.getLogger("rankloss_features")


Loaded: TypeAlias = tuple[Callable[[Tensor], Tensor], Callable[[Any], Tensor], str]
"""An encoder of pixels ``[n, 3, height, width]``, the transform of a picture, and the hash of the weights."""


def load(name: str, weights: str | None, device: torch.device) -> Teacher:
    """A teacher of images.

    Args:
        name: The name or path of ``--image-encoder``.
        weights: The file or folder of ``--image-weights``, for a model of timm or torchvision.
        device: The device that it computes on.

    Raises:
        ValueError: The name is unknown, the weights do not fit, or the model gives no vector per picture, or
            another one each time.
        ImportError: A package is not installed.
    """
    loader = _loader(name)
    if weights is not None and loader not in (_timm, _torchvision):
        raise ValueError(f"--image-weights {weights} is for a name of timm or torchvision alone")
    encode, transform, digest = loader(name, weights, device)
    probe = transform(Image.linear_gradient("L").convert("RGB"))[None].to(device)
    with torch.inference_mode():
        first, second = encode(probe), encode(probe)
    if first.dim() != 2:
        raise ValueError(f"its output must be one vector per picture; got shape {tuple(first.shape)}")
    if not torch.equal(first, second):
        raise ValueError("it gives other features of the same picture each time: its forward pass is random")
    encoder = image_encoder(transform, encode, first.shape[1], device)
    return Teacher({"image_encoder": name, "image_weights": digest}, {NAMES[0]: encoder})


def _loader(name: str) -> Callable[[str, str | None, torch.device], Loaded]:
    """The loader of a name or path."""
    import timm
    from timm.models import split_model_name_tag

    if name in packages.IMAGES:
        return _package
    if name.endswith(".onnx"):
        return _onnx
    if os.path.isdir(name):
        file = Path(name, "config.json")
        config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        found = next((loader for key, loader in _FOLDERS.items() if key in config), None)
        if found is None:
            raise ValueError(f"the folder has no config.json with {' or '.join(_FOLDERS)}")
        return found
    if os.path.isfile(name):
        raise ValueError("a file of weights is given by --image-weights, beside its model's name")
    if name.startswith(("hf-hub:", "local-dir:")) or timm.is_model(split_model_name_tag(name)[0]):
        return _timm
    if name.startswith("torchvision:") or name in _torchvision_names():
        return _torchvision
    if "/" in name:
        return _transformers
    known = [*timm.list_models(), *_torchvision_names(), *packages.IMAGES]
    raise ValueError(f"unknown name{did_you_mean(name, known)}")


def did_you_mean(name: str, known: list[str]) -> str:
    """The names that are like an unknown one, as the end of an error."""
    close = difflib.get_close_matches(name, known)
    return f"; did you mean {', '.join(close)}?" if close else ""


def _torchvision_names() -> list[str]:
    from torchvision import models

    return list(models.list_models(module=models))


# --- kinds ------------------------------------------------------------------------------------------------


def _package(name: str, weights: str | None, device: torch.device) -> Loaded:  # noqa: ARG001
    return _of_timm(packages.IMAGES[name](), device)


def _timm(name: str, weights: str | None, device: torch.device) -> Loaded:
    import timm

    folder = name.removeprefix("local-dir:")
    if os.path.isdir(folder):
        name, weights = f"local-dir:{folder}", weights or folder
    model: Any = timm.create_model(name, pretrained=weights is None, num_classes=0)
    if weights is not None:
        heads = model.pretrained_cfg.get("classifier") or ()
        # timm's own conversion of the weights that a model's authors published.
        convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
        fill(model, weights, (heads,) if isinstance(heads, str) else tuple(heads), convert)
    return _of_timm(model, device)


def _of_timm(model: nn.Module, device: torch.device) -> Loaded:
    from timm.data.config import resolve_model_data_config
    from timm.data.transforms_factory import create_transform

    config = resolve_model_data_config(model)  # type: ignore[no-untyped-call]
    model = model.to(device).eval()
    return model, create_transform(**config, is_training=False), hash_of_weights(model)


def _torchvision(name: str, weights: str | None, device: torch.device) -> Loaded:
    """The input of the last linear layer; the transform is that of the model's default weights."""
    from torchvision import models

    name = name.removeprefix("torchvision:")
    if name not in _torchvision_names():
        raise ValueError(f"unknown name{did_you_mean(name, _torchvision_names())}")
    model = models.get_model(name, weights=None if weights else "DEFAULT")
    linear = [key for key, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise ValueError("its classifier is no linear layer, whose input would be the features")
    model.set_submodule(linear[-1], nn.Identity())
    if weights:
        fill(model, weights, (linear[-1],))
    model = model.to(device).eval()
    default: Any = models.get_model_weights(name)
    return model, default.DEFAULT.transforms(), hash_of_weights(model)


def _transformers(name: str, weights: str | None, device: torch.device) -> Loaded:  # noqa: ARG001
    """The image features of a model of both modalities, the pooled output of one of images.

    The first token stands for a pooler that the weights do not have.
    """
    from transformers import AutoImageProcessor, AutoModel

    processor = AutoImageProcessor.from_pretrained(name)  # type: ignore[no-untyped-call]
    model, info = AutoModel.from_pretrained(name, output_loading_info=True)
    has_pooler = untrained(info, name)
    model = model.float().to(device).eval()
    encode = partial(_vectors, model, has_pooler)
    return encode, partial(_processed, processor), hash_of_weights(model)


def _vectors(model: Any, has_pooler: bool, pixels: Tensor) -> Tensor:
    found: Tensor
    if hasattr(model, "get_image_features"):
        output = model.get_image_features(pixel_values=pixels)
        found = output if isinstance(output, Tensor) else output.pooler_output  # since transformers 5
    else:
        output = model(pixel_values=pixels)
        pooled = output.get("pooler_output") if has_pooler else None
        found = output.last_hidden_state[:, 0] if pooled is None else pooled.flatten(1)
    return found


def _processed(processor: Any, picture: Any) -> Tensor:
    pixels: Tensor = processor(images=picture, return_tensors="pt")["pixel_values"][0]
    return pixels


def _onnx(name: str, weights: str | None, device: torch.device) -> Loaded:  # noqa: ARG001
    """The first output that is a matrix; a file says nothing of its pictures but their size."""
    import onnxruntime
    from timm.data.transforms_factory import create_transform

    wanted = ["CUDAExecutionProvider"] * (device.type == "cuda") + ["CPUExecutionProvider"]
    providers = [x for x in wanted if x in onnxruntime.get_available_providers()]
    session = onnxruntime.InferenceSession(name, providers=providers)
    inputs = {x.name: (x.type, x.shape) for x in session.get_inputs()}
    kind, shape = next(iter(inputs.values()))
    if len(inputs) > 1 or kind != "tensor(float)" or len(shape) != 4 or shape[1] != 3:
        raise ValueError(f"it must have one input, tensor(float) [N, 3, height, width]; got {inputs}")
    outputs = session.get_outputs()
    output = next((x for x in outputs if len(x.shape) == 2), outputs[0]).name
    height, width = (x if isinstance(x, int) else _SIZE for x in shape[2:])
    _logger.warning(
        "%s does not say how its pictures are prepared: assumed are %d × %d pixels, cut from the middle, "
        "with ImageNet's mean and standard deviation; the features are its output %r",
        *(name, height, width, output),
    )
    transform = create_transform((3, height, width), interpolation="bicubic", is_training=False)
    encode = partial(_run, session, next(iter(inputs)), output, shape[0])
    return encode, transform, hashlib.sha256(Path(name).read_bytes()).hexdigest()


def _run(session: Any, given: str, output: str, batch: Any, pixels: Tensor) -> Tensor:
    """The features of a batch, in pieces of the size that the file fixes, if it does."""
    pieces = pixels.split(batch) if isinstance(batch, int) else [pixels]
    found = [session.run([output], {given: x.cpu().numpy()})[0] for x in pieces]
    return torch.cat([torch.from_numpy(x) for x in found])


_FOLDERS = {"architecture": _timm, "model_type": _transformers}  # by a key of config.json
