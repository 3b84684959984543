"""Tiny models of transformers with random weights, and generated pairs; nothing here knows of rankloss."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from torch.utils.data import Dataset

TOWER = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
TEXT: dict[str, int] = {
    **TOWER,
    "vocab_size": 50,
    "max_position_embeddings": 8,
    "eos_token_id": 49,
    "pad_token_id": 0,
}
VISION = {**TOWER, "image_size": 16, "patch_size": 8}
CONVOLUTIONS = {
    **{"image_size": 16, "hidden_dim": 8, "width_coefficient": 0.25, "depth_coefficient": 0.25},
    **{"kernel_sizes": [3], "in_channels": [16], "out_channels": [16], "strides": [1]},
    **{"num_block_repeats": [1], "expand_ratios": [1]},
}
CONFIGS: dict[str, Any] = {
    "CLIP": {"text_config": TEXT, "vision_config": VISION, "projection_dim": 8},
    "Align": {"text_config": TEXT, "vision_config": CONVOLUTIONS, "projection_dim": 8},
    "Siglip": {
        "text_config": {**TEXT, "projection_size": 16},
        "vision_config": {**VISION, "vision_use_head": True},
    },
    "Siglip2": {
        "text_config": {**TEXT, "projection_size": 16},
        "vision_config": {**TOWER, "num_patches": 4, "patch_size": 8},
    },
}


def tiny_model(kind: str) -> Any:
    """The model of one of ``CONFIGS``, with the same random weights at each call."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**CONFIGS[kind])
    return getattr(transformers, f"{kind}Model")(config)


def tiny_clip() -> Any:
    return tiny_model("CLIP")


class Pairs(Dataset[dict[str, Tensor]]):
    """Generated pairs, with more columns on request.

    Args:
        number: How many there are.
        more: ``image`` and ``text``, a teacher's features of these; ``patches``, images as SigLIP 2 takes
            them.
    """

    def __init__(self, number: int = 32, *more: str) -> None:
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(number, 3, 16, 16, generator=generator)
        texts = torch.randint(1, 48, (number, 8), generator=generator)
        texts[:, -1] = TEXT["eos_token_id"]
        mask = torch.ones(number, 8)
        self.columns = {"pixel_values": images, "input_ids": texts, "attention_mask": mask}
        for modality in sorted({"image", "text"} & {*more}):  # of another dimension than the model's
            features = F.normalize(torch.randn(number, 6, generator=generator), dim=-1)
            self.columns[f"reference_{modality}_features"] = features
        if "patches" in more:
            # Of each image 2 × 2 patches of 8 × 8 pixels, and none that is padding.
            self.columns.update(
                pixel_values=F.unfold(images, kernel_size=8, stride=8).mT,
                pixel_attention_mask=torch.ones(number, 4).long(),
                spatial_shapes=torch.tensor([2, 2]).expand(number, 2),
            )

    def __len__(self) -> int:
        return len(self.columns["input_ids"])

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {name: column[i] for name, column in self.columns.items()}

    def batch(self, start: int = 0, end: int | None = None) -> dict[str, Tensor]:
        return {name: column[start:end] for name, column in self.columns.items()}
