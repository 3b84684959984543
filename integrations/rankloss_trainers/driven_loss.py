"""A loss as trainers call it: it is told where training stands, and its terms are separated from metrics."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rankloss.distributed import Gather
from rankloss.losses import base_entries
from rankloss_trainers.clock import Position, tell

Evaluate = Callable[..., Mapping[str, Tensor]]
"""``(criterion, step, **inputs) → entries``: calls a loss, and may add to its entries what is logged."""


class Entries(NamedTuple):
    """What a loss gives for one batch: scalars on the device of the features.

    Attributes:
        terms: What is trained; the entries whose names end in ``_loss``.
        metrics: What is logged beside them, detached.
    """

    terms: dict[str, Tensor]
    metrics: dict[str, Tensor]

    @property
    def total(self) -> Tensor:
        """The sum of the terms."""
        first, *others = self.terms.values()
        return sum(others, first)

    @classmethod
    def of(cls, loss: object, entries: Mapping[str, Tensor]) -> Entries:
        """Separate the terms from the metrics, by their names.

        Args:
            loss: What gave them, for the errors.
            entries: All of them.

        Raises:
            ValueError: There is no term, or an entry takes a gradient that nobody would see.
        """
        name_of_loss = getattr(loss, "__name__", type(loss).__name__)
        terms = {name: value for name, value in entries.items() if name.endswith("_loss")}
        if not terms:
            raise ValueError(
                f"{name_of_loss} gives no term to train: no name ends in _loss, got {', '.join(entries)}"
            )
        metrics = {name: value for name, value in entries.items() if name not in terms}
        for name, value in metrics.items():
            if value.requires_grad:
                raise ValueError(
                    f"{name_of_loss} gives {name!r} with a gradient, and what is trained are the entries "
                    f"whose names end in _loss: call it {name}_loss, or detach it if it is only logged"
                )
        return cls(terms, metrics)


def evaluation(base: Any, gather: Gather, **features: Any) -> Entries:
    """What a base loss gives for a batch of an evaluation, in which no rank term has a part.

    Args:
        base: The base.
        gather: How the run's batches are gathered.
        **features: What the loss of the training is called with.

    Returns:
        The base's terms; of a single pair, which has no negatives, a loss of 0.
    """
    images: Tensor = features["image_features"]
    if len(images) < gather.min_pairs:
        return Entries({"contrastive_loss": images.new_zeros(())}, {})
    return Entries(Entries.of(base, base_entries(base, **features)).terms, {})


class LoggedTerms(dict[str, Tensor]):
    """The terms of a loss together with what is logged but not trained.

    open_clip 3.x and sentence-transformers add up ``values()`` and log ``items()``; the first therefore
    leaves the metrics out.

    Args:
        terms: The loss terms.
        metrics: What is logged beside them.
    """

    def __init__(self, terms: Mapping[str, Tensor], metrics: Mapping[str, Tensor]) -> None:
        super().__init__({**terms, **metrics})
        self._metrics = frozenset(metrics)

    def values(self) -> Any:
        """The loss terms only."""
        return [value for name, value in self.items() if name not in self._metrics]


def call_alone(criterion: nn.Module, step: int, **inputs: Any) -> Mapping[str, Tensor]:  # noqa: ARG001
    """Call a loss, and log nothing beside its own entries."""
    entries: Mapping[str, Tensor] = criterion(**inputs, output_dict=True)
    return entries


class DrivenLoss(nn.Module):
    """A loss that knows where training stands, for a trainer that announces its epochs and not its steps.

    The calls of the loss are counted within each epoch. There is no other state, so a resumed run is where an
    uninterrupted one would be.

    Args:
        criterion: The loss, see :class:`rankloss_trainers.catalog.LossEntry`.
        unit: ``"epoch"`` calls ``set_epoch`` of its parts, ``"step"`` calls ``set_progress``, see
            :func:`rankloss_trainers.clock.tell`.
        evaluate: What calls the loss.

    Attributes:
        position: Where the trainer stood when it last announced an epoch; None before the first.
    """

    def __init__(
        self,
        criterion: nn.Module,
        *,
        unit: str = "step",
        evaluate: Evaluate = call_alone,
    ) -> None:
        super().__init__()
        self.criterion = criterion
        self.unit = unit
        self.evaluate = evaluate
        self.position: Position | None = None
        self._calls = 0  # of the epoch

    def start_epoch(self, position: Position) -> None:
        """An epoch begins; its steps are counted from the calls."""
        self.position, self._calls = position, 0
        if self.unit == "epoch":
            tell(self.criterion, "set_epoch", position.epoch + 1, position.epochs)

    # The count moves at every call, which would recompile a compiled caller: the graph breaks here, once.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(
        self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor, **inputs: Any
    ) -> Entries:
        """Compute the loss.

        Args:
            image_features: Image embeddings of this process, ``[N, D]``.
            text_features: Text embeddings of this process, ``[N, D]``.
            logit_scale: The multiplier of the similarities.
            **inputs: What else the trainer hands to its own loss.

        Raises:
            RuntimeError: The trainer has announced no epoch.
            ValueError: As :meth:`Entries.of`.
        """
        step = self._advance()
        # Always by name: only the names tell what is a term.
        entries = self.evaluate(
            self.criterion,
            step,
            image_features=image_features,
            text_features=text_features,
            logit_scale=logit_scale,
            **inputs,
        )
        return Entries.of(self.criterion, entries)

    def _advance(self) -> int:
        """Count a call, of which gradient accumulation makes several for a step.

        Returns:
            The optimizer step of the epoch that it is for, counted from 0.
        """
        position = self.position
        if position is None:
            raise RuntimeError("call start_epoch() first: the loss is not told where training stands")
        step, call_of_step = divmod(self._calls, position.accum_freq)
        self._calls += 1
        if self.unit == "step" and call_of_step == 0:
            # An epoch that is longer than announced stays at its last step.
            of_run = position.epoch * position.steps + min(step, position.steps - 1)
            tell(self.criterion, "set_progress", of_run + 1, position.epochs * position.steps)
        return step
