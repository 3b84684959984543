"""Between the trainer and :class:`rankloss.RankClipLoss`: options in, epochs in, logged terms out."""

from __future__ import annotations

import inspect
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import rankloss
from rankloss_open_clip.versions import judge

if TYPE_CHECKING:
    from collections.abc import Mapping

_LAMBDA = "rank_lambda"
_RANK_TERMS = ("cross_modal", "in_modal")
_AGREEMENT_ANCHORS = 256
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

    open_clip 3.x adds up ``values()`` and logs ``items()``; the first therefore leaves the metrics out.

    Args:
        terms: The loss terms.
        metrics: What is logged beside them.
    """

    def __init__(self, terms: Mapping[str, Tensor], metrics: Mapping[str, Tensor]) -> None:
        super().__init__({**terms, **metrics})
        self._metrics = frozenset(metrics)

    def values(self) -> Any:
        """The loss terms only."""
        return {key: value for key, value in self.items() if key not in self._metrics}.values()


class TrainerLoss(nn.Module):
    """The ranking loss as open_clip's trainer calls it.

    The trainer's own position is the only clock: :meth:`start_epoch` sets it at each epoch, calls are counted
    within the epoch only, and a resumed run is therefore where an uninterrupted one would be.

    Args:
        criterion: The loss, around the trainer's own.
        unit: ``"epoch"`` or ``"step"``, what the schedule goes by.
        sums_every_value: Whether the trainer adds up all values of the returned dict, whatever their keys.
        agreement_every: Measure the batch's rank agreement at every so many optimizer steps, the first of an
            epoch among them; None never does.
    """

    def __init__(
        self,
        criterion: rankloss.RankClipLoss,
        *,
        unit: str,
        sums_every_value: bool,
        agreement_every: int | None = None,
    ) -> None:
        super().__init__()
        self.criterion = criterion
        self.unit = unit
        self.sums_every_value = sums_every_value
        self.agreement_every = agreement_every
        self._position: Position | None = None
        self._calls = 0
        self._agreement: dict[str, Tensor] = {}

    def start_epoch(self, position: Position) -> None:
        """Take the trainer's position at the start of an epoch."""
        self._position = position
        self._calls = 0
        if self.unit == "epoch":
            self.criterion.set_epoch(position.epoch + 1, position.epochs)

    # A compiler would cut the rank terms into dozens of graphs at their data-dependent branches, and would
    # compile again as the clock moves. So it breaks its graph here, once, and what follows runs as it is.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        output_dict: bool = False,
        **base_inputs: Any,
    ) -> Tensor | dict[str, Tensor]:
        """Compute the loss; with ``output_dict`` its terms, and metrics for the log.

        The metrics are detached scalars whose names do not end in ``_loss``:

        - ``rank_lambda``: the schedule's λ.
        - ``cross_modal_raw``, ``in_modal_raw``: the rank terms before λ and every other weight. While λ is 0
          they are computed without a gradient. A term that is left out of the whole run has none.
        - ``cross_modal_tau``, ``in_modal_tau``: with ``agreement_every``, Kendall's τ of the image's ranking
          with its text's (:func:`rankloss.metrics.rank_agreement`), over the batch of all processes, from at
          most 256 of its rows. Between two measurements they keep the value of the last: a gap, or a NaN,
          would spoil the averages that the trainer keeps, and would differ from step to step in what the
          processes exchange.

        Args:
            image_features: Image embeddings of this process, ``[N, D]``.
            text_features: Text embeddings of this process, ``[N, D]``.
            logit_scale: The multiplier of the similarities.
            output_dict: Return the terms by name instead of their sum.
            **base_inputs: What else the trainer hands to its own loss.

        Returns:
            The sum of the terms, or the terms: those of the trainer's own loss, ``cross_modal_loss`` and
            ``in_modal_loss`` (weighted), and the metrics. The keys never change.
        """
        measures = self._advance()
        losses: Any = self.criterion(
            image_features, text_features, logit_scale, output_dict=output_dict, **base_inputs
        )
        if not output_dict:
            total: Tensor = losses
            return total
        terms: dict[str, Tensor] = losses
        metrics = {_LAMBDA: torch.full((), self.criterion.schedule_value, device=image_features.device)}
        weight = self.criterion.schedule_value * self.criterion.normalizer
        scales = {"cross_modal": self.criterion.lambda_cross, "in_modal": self.criterion.lambda_in}
        scales = {name: scale for name, scale in scales.items() if scale}
        if weight:
            raw = {name: terms[f"{name}_loss"].detach() / (weight * scale) for name, scale in scales.items()}
        elif scales:
            raw = self._untrained_terms(image_features, text_features, logit_scale)
            for name in scales:
                # The zeros look like the terms whose place they hold: a compiled trainer sees no change.
                zero = torch.zeros_like(terms[f"{name}_loss"], requires_grad=torch.is_grad_enabled())
                terms[f"{name}_loss"] = zero
        metrics.update({f"{name}_raw": raw[name] for name in scales})
        if measures:
            self._agreement = self._measure_agreement(image_features, text_features)
        metrics.update(self._agreement)
        return LoggedTerms(terms, metrics) if self.sums_every_value else {**terms, **metrics}

    def _advance(self) -> bool:
        """Count a call, and say whether the agreement is to be measured with it."""
        if self._position is None:
            return False  # the criterion refuses to run, and says why
        position = self._position
        step, call_of_step = divmod(self._calls, position.accum_freq)
        self._calls += 1
        if self.unit == "step":
            step_of_run = position.epoch * position.steps + min(step, position.steps - 1)
            self.criterion.set_progress(step_of_run + 1, position.epochs * position.steps)
        return call_of_step == 0 and self.agreement_every is not None and step % self.agreement_every == 0

    @torch.no_grad()
    def _untrained_terms(
        self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor
    ) -> dict[str, Tensor]:
        device = image_features.device
        # Random ties must not move the generator by which the run's data are shuffled.
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            terms = self.criterion.consistency(image_features, text_features, logit_scale, output_dict=True)
        return {name: terms[f"{name}_loss"] for name in _RANK_TERMS}

    @torch.no_grad()
    def _measure_agreement(self, image_features: Tensor, text_features: Tensor) -> dict[str, Tensor]:
        images, texts = self.criterion.consistency.gather(image_features, text_features)
        agreement = rankloss.metrics.rank_agreement(images, texts, max_anchors=_AGREEMENT_ANCHORS)
        return {f"{name}_tau": agreement[f"{name}_tau"].float() for name in _RANK_TERMS}


def build_loss(base: nn.Module, args: Any, *, sums_every_value: bool) -> TrainerLoss:
    """Wrap the trainer's own loss as its arguments ask, and log what the run trains with.

    Args:
        base: The loss that the trainer built.
        args: The trainer's arguments, as completed by :mod:`rankloss_open_clip.arguments`.
        sums_every_value: See :class:`TrainerLoss`.

    Raises:
        ValueError: The trainer's own loss does not take the features of images and texts.
    """
    _check_forward(base)
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
    return TrainerLoss(
        criterion,
        unit=unit,
        sums_every_value=sums_every_value,
        agreement_every=args.rankclip_agreement_every,
    )


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


def _check_forward(base: nn.Module) -> None:
    parameters = inspect.signature(base.forward).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    missing = {"image_features", "text_features", "logit_scale", "output_dict"} - parameters.keys()
    if missing:
        raise ValueError(
            "--loss rankclip needs a loss that compares images with texts, but "
            f"{type(base).__name__}.forward takes no {', '.join(sorted(missing))}"
        )


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
    remark = judge(open_clip_version).remark
    if remark:
        _logger.warning(remark)
    if unit != args.rankclip_schedule_unit:
        _logger.info("Loss: one epoch has no ramp over epochs, so the schedule goes by optimizer steps")
