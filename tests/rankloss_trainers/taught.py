"""A loss with a teacher of its own, and folders of a teacher's features."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

import rankloss
from rankloss.losses import base_entries, combined


class Mimicry(nn.Module):
    """Feature mimicry, which is not in the catalogue; a narrower teacher has the first numbers."""

    def __init__(self, base: Any = None) -> None:
        super().__init__()
        self.base = rankloss.ClipLoss() if base is None else base

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Any,
        logit_bias: Any = None,
        output_dict: bool = False,
        *,
        reference_image_features: Tensor,
        reference_text_features: Tensor,
    ) -> Any:
        entries = base_entries(self.base, image_features, text_features, logit_scale, logit_bias)
        pairs = (image_features, reference_image_features), (text_features, reference_text_features)
        mimicry = sum((x[:, : y.shape[1]] - y).square().sum(-1).mean() for x, y in pairs)
        return combined(entries, {"mimicry_loss": mimicry}, output_dict)


def folder(path: Path, dataset: Any, features: Mapping[str, Tensor], image: str, caption: str) -> str:
    """A folder of these features of a dataset's pairs."""
    from tiny_teacher import written

    from rankloss_features.data import Table
    from rankloss_features.teachers import Encoder, Teacher

    def encoder(rows: Tensor) -> Encoder:
        return Encoder(lambda samples: rows[[x.row for x in samples]], lambda x: x, rows.shape[1])

    teacher = Teacher({}, {name: encoder(x) for name, x in features.items()})
    path_of: str = written(path, Table(dataset, image, caption, data="given"), teacher, dtype="float32").path
    return path_of
