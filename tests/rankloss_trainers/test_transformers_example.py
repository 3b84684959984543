"""transformers' own run_clip.py, unmodified, on a tiny model and generated pictures.

No package holds the examples, so a checkout of transformers has to be named:

    RANKLOSS_TRANSFORMERS_CHECKOUT=…/transformers python -m pytest tests/rankloss_trainers -k example
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

if any(importlib.util.find_spec(name) is None for name in ("transformers", "accelerate", "datasets")):
    pytest.skip("transformers, accelerate or datasets is not installed", allow_module_level=True)

import torch
import transformers
from tiny_transformers import METRICS, TERMS, clip
from torchvision.io import write_png

from rankloss import schedules

CHECKOUT = os.environ.get("RANKLOSS_TRANSFORMERS_CHECKOUT", "")
SCRIPT = Path(CHECKOUT, "examples", "pytorch", "contrastive-image-text", "run_clip.py")
RUNNER = ("-m", "rankloss_trainers.transformers")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
PAIRS, STEPS = 32, 8
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
        **{"output_dir": directory / "out", "do_train": True, "do_eval": True, "use_cpu": True, "seed": 1},
        **{"per_device_train_batch_size": 8, "num_train_epochs": 2, "logging_steps": 1, "report_to": "none"},
        **{"save_strategy": "no", "remove_unused_columns": False, "dataloader_pin_memory": False},
        **{"learning_rate": 1e-3, **changes},
    }
    options = [str(part) for name, value in given.items() for part in (f"--{name}", value)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(directory)}
    command = [sys.executable, *launcher, str(SCRIPT), *options, *argv]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return directory / "out"


def history(directory: Path) -> list[dict[str, float]]:
    log = json.loads((directory / "trainer_state.json").read_text())["log_history"]
    return [line for line in log if "loss" in line]


def test_without_loss_the_script_is_bit_equal_to_itself_and_with_it_ranks(
    inputs: Path, tmp_path: Path
) -> None:
    plain = trained(inputs, tmp_path / "plain", launcher=())
    through = trained(inputs, tmp_path / "through")
    weights = (plain / "model.safetensors").read_bytes()
    assert (through / "model.safetensors").read_bytes() == weights
    assert [line["loss"] for line in history(through)] == [line["loss"] for line in history(plain)]

    ranked = trained(inputs, tmp_path / "ranked", "--loss", "rankclip", "--rankclip-lambda-in", "0.5")
    lines = history(ranked)
    assert [line["rank_lambda"] for line in lines] == pytest.approx(
        [schedules.rankclip(step, STEPS) for step in range(1, STEPS + 1)]
    )
    for line in lines:
        assert line.keys() >= {*TERMS, *METRICS}
        assert line["loss"] == pytest.approx(sum(line[term] for term in TERMS), rel=1e-4)
        assert line["in_modal_loss"] == pytest.approx(
            line["in_modal_raw"] * line["rank_lambda"] / 32, rel=1e-4
        )
    assert lines[0]["contrastive_loss"] == pytest.approx(history(plain)[0]["loss"], rel=1e-4)
    assert (ranked / "model.safetensors").read_bytes() != weights
    assert "eval_loss" in json.loads((ranked / "eval_results.json").read_text())


def test_two_processes_contrast_the_whole_batch(inputs: Path, tmp_path: Path) -> None:
    given = {"optim": "sgd", "learning_rate": 0.01, "max_grad_norm": 0, "do_eval": False}
    loss = ("--loss", "rankclip", "--rankclip-schedule", "constant")
    whole = trained(inputs, tmp_path / "one", *loss, per_device_train_batch_size=16, **given)
    two = trained(inputs, tmp_path / "two", *loss, launcher=(*TORCHRUN, *RUNNER), **given)
    assert len(history(whole)) == len(history(two)) == STEPS / 2
    for a, b in zip(history(two), history(whole), strict=True):
        names = {*TERMS, *METRICS, "loss"}
        assert {n: a[n] for n in names} == pytest.approx({n: b[n] for n in names}, rel=1e-3, abs=1e-5)
