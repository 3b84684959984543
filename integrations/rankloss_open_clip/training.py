"""What the patched functions do in a run with ``--loss``: build the loss, and start its epochs."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from open_clip.version import __version__
from torch import Tensor, nn

import rankloss
from rankloss_open_clip import checkpoints
from rankloss_open_clip.command_line import chosen, companion_of, distils, gather_of
from rankloss_open_clip.companions import COMPANION, split_features
from rankloss_trainers import state
from rankloss_trainers.clock import Position
from rankloss_trainers.driven_loss import DrivenLoss, Entries, LoggedTerms, call_alone
from rankloss_trainers.refusals import check_criterion

TESTED = ("2.16.1", "2.24.0", "3.0.0", "3.1.0", "3.2.0", "3.3.0")
"""The releases of open_clip that get no remark; to the first two a trainer is attached by hand."""

_logger = logging.getLogger("rankloss_open_clip")

# Early releases, to which a trainer may be attached, have no such loss.
_SigLipLoss: Any = getattr(open_clip.loss, "SigLipLoss", None)


class TrainerLoss(DrivenLoss):
    """A loss of the catalogue as open_clip's trainers call it: its terms and its metrics in one dict.

    Args:
        criterion: The loss, see :class:`rankloss_trainers.catalog.LossEntry`.
        sums_every_value: Whether the trainer adds up all values of the returned dict, whatever their keys.
        uses_teacher: Whether the loss is given the features of the trainer's teacher under its own names.
        keeps_distillation: Whether the base is given them, under the trainer's names (``dist_image_features``
            and so on), where the trainer has a teacher.
        **driven: ``unit`` and ``evaluate`` of :class:`rankloss_trainers.driven_loss.DrivenLoss`.
    """

    def __init__(
        self,
        criterion: nn.Module,
        *,
        sums_every_value: bool = True,
        uses_teacher: bool = False,
        keeps_distillation: bool = True,
        **driven: Any,
    ) -> None:
        super().__init__(criterion, **driven)
        self.sums_every_value = sums_every_value
        self.uses_teacher = uses_teacher
        self.keeps_distillation = keeps_distillation

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(
        self, *features: Tensor, output_dict: bool = False, **inputs: Tensor
    ) -> Tensor | dict[str, Tensor]:
        """The sum of the terms, or with ``output_dict`` the terms and the metrics by name.

        Some trainers give the features and the scale by position.
        """
        if self.uses_teacher:
            for name in ("image_features", "text_features"):
                # Several teachers side by side, as MobileCLIP's data have them, have another norm together.
                inputs[f"reference_{name}"] = F.normalize(inputs[f"dist_{name}"].float(), dim=-1)
        if not self.keeps_distillation:
            inputs = {name: x for name, x in inputs.items() if not name.startswith(("dist_", "syn_"))}
        entries: Entries = super().forward(*features, **inputs)
        if not output_dict:
            return entries.total
        if self.sums_every_value:
            return LoggedTerms(entries.terms, entries.metrics)
        return {**entries.terms, **entries.metrics}


def build_loss(base: nn.Module, args: Any, *, sums_every_value: bool) -> TrainerLoss:
    """Build the loss that the trainer's arguments ask for, and log what the run trains with.

    Args:
        base: The loss that the trainer built.
        args: The trainer's arguments, as completed by :mod:`rankloss_open_clip.command_line`.
        sums_every_value: See :class:`TrainerLoss`.

    Raises:
        TypeError: The entry builds something else than a module.
        ValueError: The loss has parameters.
    """
    if isinstance(base, TrainerLoss):  # from a factory within this one
        return base
    candidate, entry, options = chosen(args)
    name, gather = candidate.name, gather_of(args)
    if distils(args) and not entry.keeps_distillation(options):
        # What the trainer would train with if it had no teacher; it refuses to distil CoCa.
        base = _SigLipLoss() if getattr(args, "siglip", False) else open_clip.ClipLoss()
    criterion = check_criterion(f"--loss {name}", entry.build(_shareable(base, gather), options, gather))
    if state.has_state(criterion):
        criterion.to(args.device)
    if getattr(args, "rank", 0) == 0:
        stands = rankloss.ClipLoss, rankloss.SigLipLoss, type(base)
        on = "on" if any(isinstance(part, stands) for part in criterion.modules()) else "in place of"
        package = candidate.package or f"rankloss {rankloss.__version__}"
        said = [f"Loss: {name} ({package}) {on} {type(base).__name__}", entry.described(options, args.epochs)]
        _logger.info("%s", ", ".join(filter(None, [*said, f"open_clip {__version__}"])))
        if __version__.partition("+")[0] not in TESTED:  # what follows is a local label
            _logger.warning(
                "open_clip %s: --loss is tested with 3.0.0 to 3.3.0, and tried with this", __version__
            )
    return TrainerLoss(
        criterion,
        sums_every_value=sums_every_value,
        # Features that come with the data have the names of the loss already.
        uses_teacher=entry.uses_teacher(options) and entry.reference_features(options) is None,
        keeps_distillation=entry.keeps_distillation(options),
        unit=entry.unit if isinstance(entry.unit, str) else entry.unit(options, args.epochs),
        evaluate=call_alone if entry.log is None else entry.log(options),
    )


def start_epoch(given: Mapping[str, Any]) -> None:
    """Tell the loss that an epoch begins; before the first of a run, connect it with the rest of the run.

    Args:
        given: What the trainer's ``train_one_epoch`` is called with, by name: ``loss``, ``epoch`` (counted
            from 0), ``data`` (by split), ``args``, ``optimizer`` (whose checkpoints carry the state of the
            loss) and ``model`` (which is to hand on what comes with the texts).

    Raises:
        RuntimeError: The run asks for a loss of the catalogue and trains with another, or on data without
            what that loss needs.
    """
    loss, args, epoch, train = given["loss"], given["args"], given["epoch"], given["data"]["train"]
    if not isinstance(loss, TrainerLoss):
        raise RuntimeError(
            f"--loss {args.loss} was given, but the trainer trains with {type(loss).__name__}; "
            "run `rankloss doctor` for advice"
        )
    if loss.position is None:
        needed, companion = companion_of(args), getattr(train, COMPANION, None)
        if needed is not None and companion is None:
            raise RuntimeError(
                f"--loss {args.loss} needs a {needed.name} with every text, and rankloss_open_clip did not "
                "reach what reads this trainer's data: get_csv_dataset or get_wds_dataset"
            )
        if companion is not None:
            split_features(given["model"], companion)
        checkpoints.connect(loss.criterion, args, given.get("optimizer"), epoch)
    accum_freq = getattr(args, "accum_freq", 1)  # forks of early releases have no such option
    steps = max(1, train.dataloader.num_batches // accum_freq)
    loss.start_epoch(Position(epoch=epoch, epochs=args.epochs, steps=steps, accum_freq=accum_freq))


def _shareable(base: nn.Module, gather: rankloss.Gather) -> nn.Module:
    """CLIP's or SigLIP's loss as rankloss has it, in linear memory.

    CLIP's shares its gathering, and its products, with the terms on it. Any other loss, a subclass of these
    two included, stays what it is.
    """
    if type(base) is open_clip.ClipLoss:
        return rankloss.ClipLoss(gather=gather)
    return rankloss.SigLipLoss(gather=gather) if type(base) is _SigLipLoss else base
