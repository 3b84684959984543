"""Heads on two frozen encoders: trained, in closed form, side by side; and the search without either."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import normalize

from studies.data.features import Side
from studies.data.sets import SECOND
from studies.records import Record
from studies.students import heads
from studies.students.measure import PRIMARY, Metrics, measure

from .cca import searched
from .search import Search
from .setting import Setting

if TYPE_CHECKING:
    from .data import Encoded

CCA, HEADS, SEARCH = "cca", "heads", "search"
ARMS = (CCA, HEADS, SEARCH)
TWO_HEADS, BOTH, BOTH_AND_HEAD, WITH_SEARCH = "heads-2", "both", "both-2", "cca-search"
JOINED = {HEADS: (TWO_HEADS, BOTH, BOTH_AND_HEAD), CCA: (WITH_SEARCH,)}
"""What the record of an arm's test side holds beside the arm: its parts side by side with others."""
WEIGHTS = (0.5, 0.7, 1.0, 1.4, 2.0)  # of the closed form beside the other part
SECOND_HEAD = 1000  # is added to the seed of the first
_NEIGHBOURS = 10  # of the search that stands beside the closed form


class Part(Protocol):
    """A model of the encoders' unit-norm features."""

    def pictures(self, pictures: Tensor) -> Tensor:
        """Return unit-norm features, ``[N, K]``."""

    def sentences(self, sentences: Tensor) -> Tensor:
        """Return unit-norm features, ``[N, S, K]``."""


class Standardised:
    """A model of features in which those of pictures are standardised, by the statistics of the train side.

    Args:
        train: The train side, as the encoders have it.
        make: Returns the model, given that side with standardised pictures.
    """

    def __init__(self, train: Side, make: Callable[[Side], Any]) -> None:
        self.std, self.mean = torch.std_mean(train.pictures, dim=0)
        self.model = make(Side(self._of(train.pictures), train.sentences))

    def _of(self, pictures: Tensor) -> Tensor:
        """Return features of pictures, standardised."""
        return (pictures - self.mean) / self.std.clamp(min=1e-6)

    @torch.no_grad()
    def pictures(self, pictures: Tensor) -> Tensor:
        """Return unit-norm features, ``[N, K]``."""
        found: Tensor = self.model.pictures(self._of(pictures))
        return found

    @torch.no_grad()
    def sentences(self, sentences: Tensor) -> Tensor:
        """Return unit-norm features, ``[N, S, K]``."""
        found: Tensor = self.model.sentences(sentences)
        return found


class SideBySide:
    """Several models as one, whose similarity is the mean of theirs, weighted by the weights' squares."""

    log_scale = torch.zeros(())

    def __init__(self, parts: Mapping[Part, float]) -> None:
        self.parts = parts

    def pictures(self, pictures: Tensor) -> Tensor:
        """Return unit-norm features, ``[N, K]``."""
        return self._joined([part.pictures(pictures) for part in self.parts])

    def sentences(self, sentences: Tensor) -> Tensor:
        """Return unit-norm features, ``[N, S, K]``."""
        return self._joined([part.sentences(sentences) for part in self.parts])

    def _joined(self, features: Sequence[Tensor]) -> Tensor:
        """Return the parts' features in one row, each times its weight, with unit norm."""
        weighted = [weight * of for weight, of in zip(self.parts.values(), features, strict=True)]
        return normalize(torch.cat(weighted, -1), dim=-1)


def trained(setting: Setting, train: Side, seed: int) -> Standardised:
    """Return heads that are trained as a setting says, with a seed."""
    of = heads.Training(
        seed=seed,
        epochs=setting.epochs,
        batch_size=setting.batch_size,
        lr=setting.lr,
        dropout=setting.dropout,
        label_smoothing=setting.label_smoothing,
    )
    return Standardised(train, lambda side: heads.train(of, side))


def record(setting: Setting, data: Encoded) -> Record:
    """Train heads, or fit or search, and measure: on the test side also what stands side by side."""
    began = time.process_time()
    train = data.encoded("train")
    if setting.arm == SEARCH:
        found = measured(Standardised(train, lambda of: Search(of, int(setting.value))), setting.side, data)
    elif setting.arm == CCA:
        found = _closed_form(setting, train, data)
    else:
        found = _trained(setting, train, data)
    return {"metrics": found, "processor_seconds": {"all": round(time.process_time() - began, 1)}}


def _closed_form(setting: Setting, train: Side, data: Encoded) -> Metrics:
    """Return the metrics of the closed form; on the test side with those beside the search."""
    closed, chosen = searched(data)
    found = {**measured(closed, setting.side, data), "chosen": chosen}
    if setting.side == "test":
        search = Standardised(train, lambda of: Search(of, _NEIGHBOURS))
        found["joined"] = {WITH_SEARCH: _weighted(closed, [search], data)}
    return found


def _trained(setting: Setting, train: Side, data: Encoded) -> Metrics:
    """Train heads, and return their metrics; on the test side with those of the models in JOINED."""
    first = trained(setting, train, setting.seed)
    found = measured(first, setting.side, data)
    if setting.side == "test":
        second = trained(setting, train, setting.seed + SECOND_HEAD)
        closed, _ = searched(data)
        found["joined"] = {
            TWO_HEADS: measured(SideBySide({first: 1.0, second: 1.0}), "test", data),
            BOTH: _weighted(closed, [first], data),
            BOTH_AND_HEAD: _weighted(closed, [first, second], data),
        }
    return found


def measured(model: Any, side: str, data: Encoded) -> Metrics:
    """Return the metrics of a model on a side; with the test side also those of the second."""
    if not hasattr(model, "log_scale"):
        model = SideBySide({model: 1.0})
    judgements = data.source.judgements if side == "test" else None
    found = measure(model, data.encoded(side), data.source.names.get(side, ()), judgements)
    if side == "test" and SECOND in data.sides:
        found[SECOND] = measure(model, data.encoded(SECOND), ())
    return found


def _weighted(closed: Part, others: Sequence[Part], data: Encoded) -> Metrics:
    """Return the metrics of the closed form beside others, with the weight that is best on the dev side."""
    models = {weight: SideBySide({closed: weight, **dict.fromkeys(others, 1.0)}) for weight in WEIGHTS}
    scores = {weight: PRIMARY({"metrics": measured(of, "dev", data)}) for weight, of in models.items()}
    best = max(scores, key=scores.__getitem__)
    return {**measured(models[best], "test", data), "chosen": {"weight": best, "dev": scores[best]}}
