"""A training step as open_clip's trainer makes it, by its loss: the demo's model, on a card open_clip's."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from torch import Tensor, nn

from devices import DEVICE
from trainer import loss_of_the_trainer
from turns import Step

ON_CARD = DEVICE.type == "cuda"
DEMO = Path(__file__).resolve().parents[1] / "examples" / "demo" / "model" / "open_clip_config.json"
MODELS = {"ViT-B-32": 1024, "ViT-B-16": 384} if ON_CARD else {"demo": 128}  # and the batch
LOSSES = {"clip": "--loss clip", "rankclip": "--loss rankclip"}
if ON_CARD:
    LOSSES["rankclip-triton"] = "--loss rankclip --rankclip-kernel triton"


def config_of(model: str) -> dict[str, Any]:
    """The arguments of :class:`open_clip.CLIP` for the demo's model, or one of open_clip's."""
    if model == "demo":
        config = json.loads(DEMO.read_text(encoding="utf-8"))["model_cfg"]
    else:
        config = open_clip.get_model_config(model)
    return {name: config[name] for name in ("embed_dim", "vision_cfg", "text_cfg")}


def training_step(config: dict[str, Any], images: Tensor, texts: Tensor, line: str) -> Step:
    """A step of a model and an optimizer of its own; on a card in bfloat16."""
    torch.manual_seed(0)
    model = open_clip.CLIP(**config, output_dict=True).train().to(DEVICE)
    loss = loss_of_the_trainer(line, epoch=1)  # in the first one λ is 0
    with_decay, without_decay = [], []
    for name, parameter in model.named_parameters():  # as open_clip_train.main divides them
        is_named_so = any(part in name for part in ("bn", "ln", "bias", "logit_scale"))
        if parameter.ndim < 2 or is_named_so:
            without_decay.append(parameter)
        else:
            with_decay.append(parameter)
    groups = [{"params": without_decay, "weight_decay": 0.0}, {"params": with_decay, "weight_decay": 0.1}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.98), eps=1e-6)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=ON_CARD):
            terms = loss(**model(images, texts), output_dict=True)
        torch.stack(list(terms.values())).sum().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))

    return step


@pytest.mark.parametrize("contender", LOSSES)
@pytest.mark.parametrize("model", MODELS)
def test_step(model: str, contender: str, compare: Callable[..., None], size: Callable[[int], int]) -> None:
    is_timed = size(64) == 64  # the fixture leaves a size as it is only where steps are timed
    config = config_of(model if is_timed else "demo")
    n = size(MODELS[model])
    pixels, text = config["vision_cfg"]["image_size"], config["text_cfg"]
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(n, 3, pixels, pixels, generator=generator) * 2 - 1
    texts = torch.randint(1, text["vocab_size"], (n, text["context_length"]), generator=generator)
    batch = images.to(DEVICE), texts.to(DEVICE)
    group = f"training step: {model}, N = {MODELS[model]:,}"
    compare(group, contender, lambda name: training_step(config, *batch, LOSSES[name]), rounds=31)
