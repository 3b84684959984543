"""How far a picture and its caption rank the concepts alike, and the pair whose rankings are drawn."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from rankloss.metrics import kendall_tau, rank_agreement

from .evaluate import ClipModel, Pictures

TRAINING, HELD_OUT = "training", "held-out"


@dataclasses.dataclass(frozen=True)
class Agreement:
    """Kendall's τ of every model, and the rankings of the training pair with τ nearest to the averages."""

    averages: Mapping[str, Mapping[str, float]]  # by model, on the training and on the held-out concepts
    concepts: Mapping[str, int]  # how many
    anchor: int
    labels: Sequence[str]  # names of the training concepts
    scores: Mapping[str, tuple[Tensor, Tensor]]  # by model: those of the picture, and of its caption

    def save(self, path: Path) -> None:
        """Write it as JSON."""
        rounded = {
            name: [x.double().numpy().round(5).tolist() for x in of] for name, of in self.scores.items()
        }
        text = json.dumps({**vars(self), "scores": rounded}, ensure_ascii=False) + "\n"
        path.write_text(text, encoding="utf-8")


def measure(models: Mapping[str, ClipModel], training: Pictures, held_out: Pictures) -> Agreement:
    """Compare the rankings of all pictures with those of their captions, under every model."""
    averages: dict[str, dict[str, float]] = {}
    lists: dict[str, tuple[Tensor, Tensor]] = {}
    distance = torch.zeros(len(training.images), dtype=torch.float64)
    for name, model in models.items():
        v, t = model.features(training)
        averages[name] = {
            key: rank_agreement(*features)["cross_modal_tau"].item()
            for key, features in ((TRAINING, (v, t)), (HELD_OUT, model.features(held_out)))
        }
        lists[name] = (v @ t.T, t @ v.T)
        distance += (kendall_tau(*lists[name]) - averages[name][TRAINING]).square()
    anchor = int(distance.nan_to_num(torch.inf).argmin())
    return Agreement(
        averages=averages,
        concepts={TRAINING: len(training.images), HELD_OUT: len(held_out.images)},
        anchor=anchor,
        labels=training.rows["name"].tolist(),
        scores={name: (first[anchor], second[anchor]) for name, (first, second) in lists.items()},
    )
