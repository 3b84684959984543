"""One training step of the demo's model, as open_clip's trainer makes it, with different losses."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import open_clip
import torch
from open_clip_train.params import parse_args
from torch import Tensor, nn

from measure import Times, in_turns

BATCH = 128
LOSSES = ("--loss clip", "--loss rankclip")
DEMO = Path(__file__).resolve().parents[1] / "examples" / "openmoji" / "model"


def training_steps() -> dict[str, Callable[[], None]]:
    """A function a loss; each has a model and an optimizer of its own, and all train on the same batch."""
    generator = torch.Generator().manual_seed(0)
    config = json.loads((DEMO / "open_clip_config.json").read_text(encoding="utf-8"))["model_cfg"]
    size, text = config["vision_cfg"]["image_size"], config["text_cfg"]
    images = torch.rand(BATCH, 3, size, size, generator=generator) * 2 - 1
    texts = torch.randint(1, text["vocab_size"], (BATCH, text["context_length"]), generator=generator)
    made = {}
    for name in LOSSES:
        torch.manual_seed(0)
        made[name] = step_of(open_clip.CLIP(**config, output_dict=True).train(), _loss(name), images, texts)
    return made


def _loss(name: str) -> nn.Module:
    args = parse_args(name.split())
    args.rank, args.world_size, args.distill = 0, 1, False
    loss = open_clip.create_loss(args)
    if name != "--loss clip":  # past the first epoch, whose λ is 0
        loss.start_epoch(epoch=1, epochs=8, steps=1, accum_freq=1)
    return loss


def step_of(
    model: nn.Module, loss: nn.Module, images: Tensor, texts: Tensor, dtype: torch.dtype | None = None
) -> Callable[[], None]:
    """A step as open_clip's trainer makes it, under autocast if a dtype is given."""
    decayed, others = [], []
    for name, p in model.named_parameters():  # as open_clip_train.main divides them
        is_other = p.ndim < 2 or any(part in name for part in ("bn", "ln", "bias", "logit_scale"))
        (others if is_other else decayed).append(p)
    groups = [{"params": others, "weight_decay": 0.0}, {"params": decayed, "weight_decay": 0.1}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.98), eps=1e-6)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(images.device.type, dtype, enabled=dtype is not None):
            terms = loss(**model(images, texts), output_dict=True)
        torch.stack(list(terms.values())).sum().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))

    return step


def measure_steps(threads: int, rounds: int) -> dict[str, Times]:
    """The steps in turns."""
    torch.set_num_threads(threads)
    return in_turns(training_steps(), rounds, warm_up=2)
