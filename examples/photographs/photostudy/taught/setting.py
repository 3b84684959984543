"""The settings of the trainings."""

from __future__ import annotations

import dataclasses

from photostudy import heads


@dataclasses.dataclass(frozen=True)
class Setting(heads.Setting):
    """All that determines a training, beside the features and the teacher."""

    view: str = ""  # a name of views.NAMES
    weight: float = 0.0  # of the added term; of ranks of features, what multiplies λ
    top_k: int = 0  # the best ranks that count; 0: all
    scale: float = 0.0  # of the teacher's similarities
    mimicry: float = 0.0  # weight of mimicry beside ranks

    @property
    def arm(self) -> str:
        """The view and the loss."""
        return f"{self.view} {self.loss}".strip()
