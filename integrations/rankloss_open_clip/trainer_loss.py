"""A loss as open_clip's trainer calls it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import open_clip
import torch
from torch import Tensor

import rankloss
from rankloss.distributed import Gather
from rankloss.precision import unit_rows
from rankloss_features.folder import NAMES
from rankloss_open_clip.columns.teacher_rows import RowColumn
from rankloss_open_clip.columns.text_columns import TextColumns
from rankloss_trainers.declared import Loss
from rankloss_trainers.entries import Entries, LoggedTerms
from rankloss_trainers.host import Host
from rankloss_trainers.run_options import RunOptions
from rankloss_trainers.runtime import Runtime

HOST = Host(
    name="open_clip's trainer",
    biased="--siglip",
    teacher="name it with --distill-model and --distill-pretrained",
    progress="run `rankloss doctor` for advice",
    serves=("columns", "ids", "lists", "folder", "state", "teacher"),
)

# Early releases, to which a trainer may be attached, have no such loss.
_SigLipLoss: Any = getattr(open_clip.loss, "SigLipLoss", None)


class Place(NamedTuple):
    """A place in a training, and its length.

    Attributes:
        epoch: The epoch that began last, counted from 0.
        epochs: The number of epochs.
        steps: The optimizer steps of each epoch.
        accum_freq: The calls of the loss per step.
    """

    epoch: int
    epochs: int
    steps: int
    accum_freq: int


class TrainerLoss(Runtime):
    """Losses in open_clip's trainer, which takes their terms and their metrics in one dict.

    The trainer announces epochs and no steps, so the calls of each epoch are counted. The schedule depends on
    nothing else, so λ of a resumed run is that of an uninterrupted one.

    Args:
        args: The trainer's parsed arguments.
        losses: The losses.
        options: The options of the run.
        base: The loss that the trainer built, where it is known; None: CLIP's or, with --siglip, SigLIP's.

    Attributes:
        takes_trainers_teacher: It learns from the trainer's teacher, in place of the trainer's own
            distillation term.
        sums_every_value: The trainer adds up all values of the returned dict, whatever their keys.
        place: The epoch that began last; None before the first.
    """

    def __init__(self, args: Any, losses: Sequence[Loss], options: RunOptions, base: Any = None) -> None:
        gather = gather_of(args)
        if base is None:
            base = rankloss.SigLipLoss if getattr(args, "siglip", False) else rankloss.ClipLoss
        super().__init__(HOST, losses, options, base=base, gather=gather)
        self.args = args
        self.takes_trainers_teacher = distils(args) and self.teaching.use == "required"
        self.has_fixed_entries = getattr(args, "torchcompile", False)  # or a new entry would compile it again
        self.sums_every_value = True
        self.place: Place | None = None
        self._calls = 0  # in this epoch

    def on(self, base: Any) -> TrainerLoss:
        """These losses on the loss that the trainer built.

        They are this object itself where that is open_clip's own loss, for which they have rankloss's, or its
        distillation loss, whose teacher they learn from.
        """
        open_clips_own = _SigLipLoss if getattr(self.args, "siglip", False) else open_clip.ClipLoss
        if self.takes_trainers_teacher or type(base) is open_clips_own:
            return self
        on_base = TrainerLoss(self.args, self.losses, self.options, base)
        on_base.teaching.features = self.teaching.features  # which may have been computed for this run
        return on_base

    def text_columns(self) -> TextColumns | None:
        """Columns of every training text, as far as they are known; None for losses of pairs alone."""
        parts = [loss.columns for loss in self.losses if loss.columns is not None]
        if self.teaching.features is not None:
            parts.append(RowColumn(self.teaching.features))
        return TextColumns(parts) if parts else None

    def start_epoch(self, epoch: int, epochs: int, steps: int, accum_freq: int) -> None:
        """An epoch begins; its steps are counted from the calls. For the arguments see :class:`Place`."""
        if self.place is None:
            self.begin(epochs, epochs * steps)
        self.place = Place(epoch, epochs, steps, accum_freq)
        self._calls = 0
        self.set_epoch(epoch + 1, epochs)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, *features: Tensor, output_dict: bool = False, **inputs: Any) -> Any:
        """The sum of the terms, or with ``output_dict`` the terms and the metrics by name.

        Some trainers give the features and the scale by position.
        """
        names_by_position = (*NAMES, "logit_scale")
        inputs.update(zip(names_by_position, features, strict=False))  # often none is given by position
        if self.takes_trainers_teacher:
            inputs = _with_trainers_teacher(inputs)
        self._announce_step()
        entries: Entries = super().forward(**inputs)
        if not output_dict:
            return entries.total
        if self.sums_every_value:
            return LoggedTerms(*entries)  # whose values are the terms alone
        return {**entries.terms, **entries.metrics}

    def _announce_step(self) -> None:
        """Announce the optimizer step of a call; gradient accumulation makes several calls for one."""
        if self.place is None:  # no epoch has begun
            return
        epoch, epochs, steps, accum_freq = self.place
        if self._calls % accum_freq == 0:
            # An epoch that is longer than announced stays at its last step.
            step = min(self._calls // accum_freq, steps - 1)
            self.set_progress(epoch * steps + step + 1, epochs * steps)
        self._calls += 1


def gather_of(args: Any) -> Gather:
    """The gathering that the trainer's arguments ask for; with ``--siglip`` an exact one, whatever they say.

    The processes are those that there are when the loss is first called.
    """
    # The sigmoid loss is exact in every layout, and so must the losses beside it be.
    exact = getattr(args, "siglip", False)
    return Gather(
        local_loss=exact or getattr(args, "local_loss", False),
        gather_with_grad=exact or getattr(args, "gather_with_grad", False),
    )


def distils(args: Any) -> bool:
    """True if the trainer hands a teacher's features to its loss.

    It has a teacher where both of its arguments name one. MobileCLIP's patch adds an option by which it reads
    the features with the data.
    """
    model, pretrained = getattr(args, "distill_model", None), getattr(args, "distill_pretrained", None)
    reads_features = getattr(args, "dataset_reinforcement", False)
    return reads_features or (model is not None and pretrained is not None)


def _with_trainers_teacher(inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs of a loss, in which the features of the trainer's teacher have the loss's names."""
    of_teacher = ("dist_", "syn_")  # its features, and in MobileCLIP's data those of generated captions
    renamed = {name: value for name, value in inputs.items() if not name.startswith(of_teacher)}
    for name in NAMES:
        # Several teachers side by side, as MobileCLIP's data have them, have another norm together.
        renamed[f"reference_{name}"] = unit_rows(inputs[f"dist_{name}"].float())
    return renamed
