"""Between the trainer and :class:`rankloss.RankClipLoss`: options in, epochs in, logged terms out."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import rankloss

if TYPE_CHECKING:
    from collections.abc import Mapping

_LAMBDA = "rank_lambda"
_logger = logging.getLogger("rankloss_open_clip")


@dataclass(frozen=True)
class Position:
    """Where the trainer stands at the start of an epoch.

    Attributes:
        epoch: The epoch that begins, counted from 0 as the trainer does.
        epochs: Epochs of the whole run.
        steps: Optimizer steps of one epoch.
        accum_freq: How often the loss is called for one step.
    """

    epoch: int
    epochs: int
    steps: int
    accum_freq: int


class LoggedTerms(dict[str, Tensor]):
    """The terms of a loss together with what is logged but not trained.

    open_clip 3.x adds up ``values()`` and logs ``items()``; the first therefore leaves out λ.
    """

    def values(self) -> Any:
        """The loss terms only."""
        return {key: value for key, value in self.items() if key != _LAMBDA}.values()


class TrainerLoss(nn.Module):
    """The ranking loss as open_clip's trainer calls it.

    The trainer's own position is the only clock: :meth:`start_epoch` sets it at each epoch, calls are counted
    within the epoch only, and a resumed run is therefore where an uninterrupted one would be.

    Args:
        criterion: The loss, around the trainer's own.
        unit: ``"epoch"`` or ``"step"``, what the schedule goes by.
        sums_every_value: Whether the trainer adds up all values of the returned dict, whatever their keys.
    """

    def __init__(self, criterion: rankloss.RankClipLoss, *, unit: str, sums_every_value: bool) -> None:
        super().__init__()
        self.criterion = criterion
        self.unit = unit
        self.sums_every_value = sums_every_value
        self._position: Position | None = None
        self._calls = 0
        # Filled between steps, so that a compiled forward neither reads it from the device nor depends on it.
        self._lambda = torch.zeros(())

    def start_epoch(self, position: Position) -> None:
        """Take the trainer's position at the start of an epoch."""
        self._position = position
        self._calls = 0
        if self.unit == "epoch":
            self.criterion.set_epoch(position.epoch + 1, position.epochs)
            self._lambda.fill_(self.criterion.schedule_value)

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        output_dict: bool = False,
        **base_inputs: Any,
    ) -> Tensor | dict[str, Tensor]:
        """Compute the loss; with ``output_dict`` its terms, and λ for the log.

        Args:
            image_features: Image embeddings of this process, ``[N, D]``.
            text_features: Text embeddings of this process, ``[N, D]``.
            logit_scale: The multiplier of the similarities.
            output_dict: Return the terms by name instead of their sum.
            **base_inputs: What else the trainer hands to its own loss.

        Returns:
            The sum of the terms, or the terms: those of the trainer's own loss, ``cross_modal_loss`` and
            ``in_modal_loss`` (weighted), and the detached ``rank_lambda``. The keys never change.
        """
        self._advance()
        losses: Any = self.criterion(
            image_features, text_features, logit_scale, output_dict=output_dict, **base_inputs
        )
        if not output_dict:
            total: Tensor = losses
            return total
        terms: dict[str, Tensor] = losses
        terms[_LAMBDA] = self._lambda.to(image_features.device, copy=True)
        return LoggedTerms(terms) if self.sums_every_value else terms

    def _advance(self) -> None:
        if self.unit != "step" or self._position is None:
            return  # without a position the criterion refuses to run, and says why
        position = self._position
        step = min(self._calls // position.accum_freq, position.steps - 1)
        self.criterion.set_progress(
            position.epoch * position.steps + step + 1, position.epochs * position.steps
        )
        self._lambda.fill_(self.criterion.schedule_value)
        self._calls += 1


def build_loss(base: nn.Module, args: Any, *, sums_every_value: bool) -> TrainerLoss:
    """Wrap the trainer's own loss as its arguments ask, and log what the run trains with.

    Args:
        base: The loss that the trainer built.
        args: The trainer's arguments, as completed by :mod:`rankloss_open_clip.arguments`.
        sums_every_value: See :class:`TrainerLoss`.
    """
    options = _options(args)
    if getattr(args, "siglip", False):
        # The sigmoid loss is exact in every layout, whatever the flags say, and so must its companions be.
        options.update(local_loss=options["lists"] == "row", gather_with_grad=True)
    unit = args.rankclip_schedule_unit
    if args.epochs == 1 and args.rankclip_schedule != "constant":
        unit = "step"
    if getattr(args, "rank", 0) == 0:
        _log_start(base, args, unit)
    criterion = rankloss.RankClipLoss(base, **options)
    return TrainerLoss(criterion, unit=unit, sums_every_value=sums_every_value)


def check_options(args: Any) -> None:
    """Refuse what the library refuses, with a ValueError, before a model is built."""
    rankloss.RankClipLoss(nn.Identity(), **_options(args))


def start_epoch(loss: object, epoch: int, data: Mapping[str, Any], args: Any) -> None:
    """Tell the loss that an epoch begins.

    Args:
        loss: What the trainer trains with.
        epoch: The trainer's epoch, counted from 0.
        data: The trainer's data, by split.
        args: The trainer's arguments.

    Raises:
        RuntimeError: The run asks for the ranking loss and trains with another.
    """
    if not isinstance(loss, TrainerLoss):
        raise RuntimeError(
            f"--loss rankclip was given, but the trainer trains with {type(loss).__name__}; "
            "run `python -m rankloss_open_clip.doctor` for advice"
        )
    steps = max(1, data["train"].dataloader.num_batches // args.accum_freq)
    loss.start_epoch(Position(epoch=epoch, epochs=args.epochs, steps=steps, accum_freq=args.accum_freq))


def _options(args: Any) -> dict[str, Any]:
    return {
        "schedule": args.rankclip_schedule,
        "lambda_cross": args.rankclip_lambda_cross,
        "lambda_in": args.rankclip_lambda_in,
        "lists": args.rankclip_lists,
        "worth": args.rankclip_worth,
        "ties": args.rankclip_ties,
        "discount": None if args.rankclip_discount == "none" else args.rankclip_discount,
        "top_k": args.rankclip_top_k,
        "chunk_size": args.rankclip_chunk_size,
        "local_loss": getattr(args, "local_loss", False),
        "gather_with_grad": getattr(args, "gather_with_grad", False),
        "rank": getattr(args, "rank", 0),
        "world_size": getattr(args, "world_size", 1),
    }


def _log_start(base: nn.Module, args: Any, unit: str) -> None:
    from open_clip import __version__ as open_clip_version

    _logger.info(
        "Loss: rankclip (rankloss %s) on %s, schedule %s per %s over %d epoch(s), lambda scale %g cross-modal"
        " and %g in-modal, lists %s, open_clip %s",
        rankloss.__version__,
        type(base).__name__,
        args.rankclip_schedule,
        unit,
        args.epochs,
        args.rankclip_lambda_cross,
        args.rankclip_lambda_in,
        args.rankclip_lists,
        open_clip_version,
    )
    if unit != args.rankclip_schedule_unit:
        _logger.info("Loss: one epoch has no ramp over epochs, so the schedule goes by optimizer steps")
