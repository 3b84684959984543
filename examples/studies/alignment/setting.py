"""What determines a training or a measurement, beside its data."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Setting:
    """Of heads or of a student; what an arm does not use is 0."""

    arm: str  # of heads.ARMS or students.ARMS
    seed: int
    side: str  # that is measured
    batch_size: int = 0
    epochs: int = 0
    lr: float = 0.0
    value: float = 0.0  # the arm's own number
    dropout: float = 0.0  # of heads
    label_smoothing: float = 0.0  # of heads
    split: int = 0  # other ones hold out other concepts
