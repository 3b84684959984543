"""What the patched functions do in a run with ``--loss``: build the loss, and start its epochs."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import open_clip
from open_clip.version import __version__
from torch import nn

import rankloss
from rankloss_open_clip import checkpoints
from rankloss_open_clip.command_line import distils, gather_of
from rankloss_open_clip.logged_terms import TrainerLoss
from rankloss_open_clip.versions import remark
from rankloss_trainers import catalog, state
from rankloss_trainers.clock import Position
from rankloss_trainers.driven_loss import call_alone
from rankloss_trainers.refusals import check_criterion

_logger = logging.getLogger("rankloss_open_clip")

# Early releases, to which a trainer may be attached, have no such loss.
_SigLipLoss: Any = getattr(open_clip.loss, "SigLipLoss", None)


def build_loss(base: nn.Module, args: Any, *, sums_every_value: bool) -> TrainerLoss:
    """Build the loss that the trainer's arguments ask for, and log what the run trains with.

    Args:
        base: The loss that the trainer built.
        args: The trainer's arguments, as completed by :mod:`rankloss_open_clip.command_line`.
        sums_every_value: See :class:`rankloss_open_clip.logged_terms.TrainerLoss`.

    Raises:
        TypeError: The entry builds something else than a module.
        ValueError: The loss has parameters.
    """
    if isinstance(base, TrainerLoss):  # from a factory within this one
        return base
    name = args.loss
    candidate = catalog.candidates()[name]
    entry = candidate.load()
    options = catalog.option_values(name, entry, args)
    gather = gather_of(args)
    if distils(args) and not entry.keeps_distillation(options):
        # What the trainer would train with if it had no teacher; it refuses to distil CoCa.
        base = _SigLipLoss() if getattr(args, "siglip", False) else open_clip.ClipLoss()
    criterion = check_criterion(f"--loss {name}", entry.build(_shareable(base, gather), options, gather))
    if state.has_state(criterion):
        criterion.to(args.device)
    loss = TrainerLoss(
        criterion,
        sums_every_value=sums_every_value,
        # Features that come with the data have the names of the loss already.
        uses_teacher=entry.uses_teacher(options) and entry.reference_features(options) is None,
        keeps_distillation=entry.keeps_distillation(options),
        unit=entry.unit if isinstance(entry.unit, str) else entry.unit(options, args.epochs),
        evaluate=call_alone if entry.log is None else entry.log(options),
    )
    if getattr(args, "rank", 0) == 0:
        _log_start(candidate, loss, base, entry.described(options, args.epochs))
    return loss


def start_epoch(
    loss: object,
    epoch: int,
    data: Mapping[str, Any],
    args: Any,
    optimizer: Any = None,
) -> None:
    """Tell the loss that an epoch begins; before the first of a run, see to its state.

    Args:
        loss: What the trainer trains with.
        epoch: The trainer's epoch, counted from 0.
        data: The trainer's data, by split.
        args: The trainer's arguments.
        optimizer: The trainer's optimizer, whose checkpoints carry the state of the loss.

    Raises:
        RuntimeError: The run asks for a loss of the catalogue and trains with another.
    """
    if not isinstance(loss, TrainerLoss):
        raise RuntimeError(
            f"--loss {args.loss} was given, but the trainer trains with {type(loss).__name__}; "
            "run `rankloss doctor` for advice"
        )
    if loss.position is None:
        resumed_from = getattr(args, "resume", None)
        # A file of weights alone begins at epoch 0, and has no state to miss.
        warn = epoch > 0 and getattr(args, "rank", 0) == 0
        checkpoints.restore(loss.criterion, args.loss, resumed_from, warn=warn)
        checkpoints.save_with(optimizer, loss.criterion, args.loss, sharded=getattr(args, "fsdp", False))
    accum_freq = getattr(args, "accum_freq", 1)  # forks of early releases have no such option
    steps = max(1, data["train"].dataloader.num_batches // accum_freq)
    loss.start_epoch(Position(epoch=epoch, epochs=args.epochs, steps=steps, accum_freq=accum_freq))


def _shareable(base: nn.Module, gather: rankloss.Gather) -> nn.Module:
    """CLIP's or SigLIP's loss as rankloss has it, in linear memory.

    CLIP's shares its gathering, and its products, with the terms on it. Any other loss, a subclass of these
    two included, stays what it is.
    """
    if type(base) is open_clip.ClipLoss:
        return rankloss.ClipLoss(gather=gather)
    return rankloss.SigLipLoss(gather=gather) if type(base) is _SigLipLoss else base


def _log_start(candidate: catalog.Candidate, loss: TrainerLoss, base: nn.Module, text: str) -> None:
    _logger.info(
        "Loss: %s (%s) %s %s, %sopen_clip %s",
        candidate.name,
        candidate.package or f"rankloss {rankloss.__version__}",
        "on" if _stands_on(loss, base) else "in place of",
        type(base).__name__,
        f"{text}, " if text else "",
        __version__,
    )
    if remark(__version__):
        _logger.warning(remark(__version__))


def _stands_on(loss: nn.Module, base: nn.Module) -> bool:
    as_ours = rankloss.ClipLoss, rankloss.SigLipLoss
    return any(part is base or isinstance(part, as_ours) for part in loss.modules())
