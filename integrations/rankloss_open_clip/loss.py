"""Between the trainer and a loss: options in, epochs in, logged terms out."""

from __future__ import annotations

import inspect
import logging
import operator
from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

import rankloss
from rankloss_open_clip import checkpoints, registry
from rankloss_open_clip.versions import judge

if TYPE_CHECKING:
    from collections.abc import Mapping

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


class Call(NamedTuple):
    """Which call of the loss this is, in its epoch.

    Attributes:
        step: The optimizer step that it is for, counted from 0.
        first: Whether it is the first for this step; gradient accumulation makes more.
    """

    step: int
    first: bool


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
    """A loss as open_clip's trainer calls it.

    The trainer's own position is the only clock: :meth:`start_epoch` sets it at each epoch, calls are counted
    within the epoch only, and a resumed run is therefore where an uninterrupted one would be.

    Args:
        criterion: The loss, see :class:`rankloss_open_clip.registry.LossEntry`.
        unit: ``"epoch"`` or ``"step"``, what the clock of the loss goes by.
        first_call: A keyword of the loss that tells the first call for an optimizer step; empty for none.
        sums_every_value: Whether the trainer adds up all values of the returned dict, whatever their keys.
    """

    def __init__(
        self, criterion: nn.Module, *, unit: str, first_call: str = "", sums_every_value: bool = True
    ) -> None:
        super().__init__()
        self.criterion = criterion
        self.unit = unit
        self.first_call = first_call
        self.sums_every_value = sums_every_value
        self._position: Position | None = None
        self._calls = 0

    @property
    def started(self) -> bool:
        """Whether the trainer has announced an epoch."""
        return self._position is not None

    def start_epoch(self, position: Position) -> None:
        """Take the trainer's position at the start of an epoch."""
        self._position = position
        self._calls = 0
        if self.unit == "epoch":
            self._tell("set_epoch", position.epoch + 1, position.epochs)

    # The clock moves at every call, and a compiler would compile again with it. So it breaks its graph here,
    # once, and what follows runs as it is.
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

        Args:
            image_features: Image embeddings of this process, ``[N, D]``.
            text_features: Text embeddings of this process, ``[N, D]``.
            logit_scale: The multiplier of the similarities.
            output_dict: Return the terms by name instead of their sum.
            **base_inputs: What else the trainer hands to its own loss.

        Returns:
            The sum of the terms, or the terms and the metrics: the entries of the loss whose names end in
            ``_loss``, and the others, detached. The keys never change.

        Raises:
            RuntimeError: The trainer has announced no epoch.
            ValueError: The loss gives no term.
        """
        call = self._advance()
        # Always with names: only they tell what is a term.
        entries = self.entries(call, image_features, text_features, logit_scale, **base_inputs)
        terms = {name: value for name, value in entries.items() if name.endswith("_loss")}
        if not terms:
            raise ValueError(
                f"{type(self.criterion).__name__} gives no term to train: no name ends in _loss, got "
                f"{', '.join(entries)}"
            )
        if not output_dict:
            return reduce(operator.add, terms.values())
        metrics = {name: value.detach() for name, value in entries.items() if name not in terms}
        return LoggedTerms(terms, metrics) if self.sums_every_value else {**terms, **metrics}

    def entries(
        self,
        call: Call,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        **base_inputs: Any,
    ) -> Mapping[str, Tensor]:
        """The terms, whose names end in ``_loss``, and what is logged beside them.

        Scalars, on the device of the features.
        """
        if self.first_call:
            base_inputs[self.first_call] = call.first
        entries: Mapping[str, Tensor] = self.criterion(
            image_features=image_features,
            text_features=text_features,
            logit_scale=logit_scale,
            output_dict=True,
            **base_inputs,
        )
        return entries

    def _advance(self) -> Call:
        """Count a call, and say which it is."""
        position = self._position
        if position is None:
            raise RuntimeError(
                "the loss was told of no epoch: call start_epoch(), as the trainer's train_one_epoch() does "
                "where rankloss_open_clip has patched it"
            )
        step, call_of_step = divmod(self._calls, position.accum_freq)
        self._calls += 1
        if self.unit == "step" and call_of_step == 0:
            step_of_run = position.epoch * position.steps + min(step, position.steps - 1)
            self._tell("set_progress", step_of_run + 1, position.epochs * position.steps)
        return Call(step, call_of_step == 0)

    def _tell(self, method: str, now: int, end: int) -> None:
        """Tell every part of the loss that wants to know where training stands."""
        for part in self.criterion.modules():
            tell = getattr(part, method, None)
            if callable(tell):
                tell(now, end)


def build_loss(base: nn.Module, args: Any, *, sums_every_value: bool) -> TrainerLoss:
    """Build the loss that the trainer's arguments ask for, and log what the run trains with.

    Args:
        base: The loss that the trainer built.
        args: The trainer's arguments, as completed by :mod:`rankloss_open_clip.arguments`.
        sums_every_value: See :class:`TrainerLoss`.

    Raises:
        TypeError: What is built is no module.
        ValueError: The loss has parameters, or the trainer's own loss does not take the features of images
            and texts.
    """
    name = args.loss
    _check_forward(name, base)
    candidate = registry.candidates()[name]
    entry = candidate.load()
    loss = entry.build(base, args)
    if not isinstance(loss, nn.Module):
        raise TypeError(f"--loss {name}: {candidate.reference} must build a module, got {loss!r}")
    if not isinstance(loss, TrainerLoss):
        unit = entry.unit if isinstance(entry.unit, str) else entry.unit(args)
        loss = TrainerLoss(loss, unit=unit, first_call=entry.first_call)
    if any(parameter.requires_grad for parameter in loss.parameters()):
        raise ValueError(
            f"--loss {name}: {type(loss.criterion).__name__} has parameters, which the trainer's optimizer "
            "does not know and would never train"
        )
    loss.sums_every_value = sums_every_value
    if getattr(args, "rank", 0) == 0:
        _log_start(candidate, loss, base, entry.describe(args))
    return loss


def start_epoch(loss: object, epoch: int, data: Mapping[str, Any], args: Any, optimizer: Any = None) -> None:
    """Tell the loss that an epoch begins; before the first, see to its state.

    Args:
        loss: What the trainer trains with.
        epoch: The trainer's epoch, counted from 0.
        data: The trainer's data, by split.
        args: The trainer's arguments.
        optimizer: The trainer's optimizer, whose checkpoints carry the state of the loss.

    Raises:
        RuntimeError: The run asks for a loss of the registry and trains with another.
    """
    if not isinstance(loss, TrainerLoss):
        raise RuntimeError(
            f"--loss {args.loss} was given, but the trainer trains with {type(loss).__name__}; "
            "run `python -m rankloss_open_clip.doctor` for advice"
        )
    if not loss.started:
        resumed = epoch > 0 and getattr(args, "resume", None) is not None
        checkpoints.restore(loss, args.loss, warn=resumed and getattr(args, "rank", 0) == 0)
        checkpoints.save_with(optimizer, loss, args.loss, sharded=getattr(args, "fsdp", False))
    steps = max(1, data["train"].dataloader.num_batches // args.accum_freq)
    loss.start_epoch(Position(epoch=epoch, epochs=args.epochs, steps=steps, accum_freq=args.accum_freq))


def _check_forward(name: str, base: nn.Module) -> None:
    parameters = inspect.signature(base.forward).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    missing = {"image_features", "text_features", "logit_scale", "output_dict"} - parameters.keys()
    if missing:
        raise ValueError(
            f"--loss {name} needs a trainer that compares images with texts, but "
            f"{type(base).__name__}.forward takes no {', '.join(sorted(missing))}"
        )


def _log_start(candidate: registry.Candidate, loss: TrainerLoss, base: nn.Module, text: str) -> None:
    from open_clip import __version__ as open_clip_version

    _logger.info(
        "Loss: %s (%s) %s %s, %sopen_clip %s",
        candidate.name,
        candidate.package or f"rankloss {rankloss.__version__}",
        "on" if _stands_on(loss, base) else "in place of",
        type(base).__name__,
        f"{text}, " if text else "",
        open_clip_version,
    )
    remark = judge(open_clip_version).remark
    if remark:
        _logger.warning(remark)


def _stands_on(loss: nn.Module, base: nn.Module) -> bool:
    return any(part is base or isinstance(part, rankloss.ClipLoss) for part in loss.modules())
