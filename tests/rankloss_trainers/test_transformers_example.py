"""transformers' own run_clip.py, unmodified, on a tiny model and generated pictures.

No package holds the examples, so a checkout of transformers has to be named:

    RANKLOSS_TRANSFORMERS_CHECKOUT=…/transformers python -m pytest tests/rankloss_trainers -k example
"""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import pytest

if any(importlib.util.find_spec(name) is None for name in ("transformers", "accelerate", "datasets")):
    pytest.skip("transformers, accelerate or datasets is not installed", allow_module_level=True)

import torch
import transformers
from test_transformers_script import RUNNER, check_runs, started
from tiny_transformers import clip
from torchvision.io import write_png

CHECKOUT = os.environ.get("RANKLOSS_TRANSFORMERS_CHECKOUT", "")
SCRIPT = Path(CHECKOUT, "examples", "pytorch", "contrastive-image-text", "run_clip.py")
PAIRS = 32
WORDS = [f"word{i}" for i in range(40)]

pytestmark = pytest.mark.skipif(
    not CHECKOUT, reason="RANKLOSS_TRANSFORMERS_CHECKOUT names no checkout of transformers"
)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, its tokenizer and image processor, and pairs for training and validation."""
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder / "model")
    size = {"height": 16, "width": 16}
    transformers.CLIPImageProcessor(size=size, crop_size=size).save_pretrained(folder / "model")
    clip().save_pretrained(folder / "model")
    generator = torch.Generator().manual_seed(0)
    rows = []
    for i in range(PAIRS):
        picture = torch.randint(0, 256, (3, 20, 24), generator=generator, dtype=torch.uint8)
        write_png(picture, str(folder / f"{i}.png"))
        caption = " ".join(WORDS[j] for j in torch.randint(0, 40, (4,), generator=generator))
        rows.append(json.dumps({"image_path": str(folder / f"{i}.png"), "caption": caption}))
    (folder / "train.json").write_text("\n".join(rows))
    (folder / "validation.json").write_text("\n".join(rows[:8]))
    return folder


def trained(
    inputs: Path, directory: Path, *argv: str, launcher: tuple[str, ...] = RUNNER, **changes: Any
) -> Path:
    given = {
        **{"model_name_or_path": inputs / "model", "train_file": inputs / "train.json", "max_seq_length": 8},
        **{"validation_file": inputs / "validation.json", "cache_dir": directory / "cache"},
        **{"learning_rate": 1e-3, **changes},
    }
    return started(launcher, directory, *argv, script=SCRIPT, **given)


def test_without_loss_the_script_is_bit_equal_to_itself_and_with_it_ranks(
    inputs: Path, tmp_path: Path
) -> None:
    check_runs(
        trained(inputs, tmp_path / "ranked", "--loss", "rankclip", "--rankclip-lambda-in", "0.5"),
        trained(inputs, tmp_path / "plain", launcher=()),
        trained(inputs, tmp_path / "through"),
    )
