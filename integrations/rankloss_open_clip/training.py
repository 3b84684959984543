"""The patched functions in a run with ``--loss``: data are read, the loss is built, and its epochs start."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable
from inspect import BoundArguments
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from open_clip.version import __version__
from torch import Tensor, nn

import rankloss
from rankloss_features.folder import NAMES
from rankloss_open_clip import checkpoints
from rankloss_open_clip.arguments import HOST, chosen, companions_of, compute_teacher, distils, gather_of
from rankloss_trainers.runtime import Entries, LoggedTerms, Runtime

_COMPANIONS = "_rankloss_open_clip_companions"  # the attribute of the training data that holds them
_logger = logging.getLogger("rankloss_open_clip")

# Early releases, to which a trainer may be attached, have no such loss.
_SigLipLoss: Any = getattr(open_clip.loss, "SigLipLoss", None)


class TrainerLoss(Runtime):
    """A loss of the catalogue as open_clip's trainers call it: its terms and its metrics in one dict.

    The trainers announce epochs and no steps, so the calls of each epoch are counted. There is no other
    state, so a resumed run is where an uninterrupted one would be.

    Args:
        base: The loss that the trainer built.
        args: The trainer's arguments, as completed by :mod:`rankloss_open_clip.arguments`.
        sums_every_value: The trainer adds up all values of the returned dict, whatever their keys.

    Attributes:
        place: The epoch that began last, counted from 0, the number of epochs, the optimizer steps of each,
            and the calls of the loss per step; None before the first.
    """

    def __init__(self, base: nn.Module, args: Any, *, sums_every_value: bool) -> None:
        loss = chosen(args)
        self._keeps_distillation = loss.keeps_distillation
        if distils(args) and not self._keeps_distillation:
            # The loss of a run without a teacher; the trainer refuses to distil CoCa.
            base = _SigLipLoss() if getattr(args, "siglip", False) else open_clip.ClipLoss()
        gather = gather_of(args)
        super().__init__(HOST, loss, base=_shareable(base, gather), gather=gather)
        # An option that names whose rankings to match decides over a teacher that the loss does not need.
        chooses = self.teacher == "optional" and not any("reference" in x.options() for x in loss.parts)
        self._takes_teacher = distils(args) and (chooses or self.teacher == "required")
        self.has_fixed_entries = getattr(args, "torchcompile", False)
        self.sums_every_value = sums_every_value
        self.place: tuple[int, int, int, int] | None = None
        self._calls = 0  # of the epoch

    def _folder(self) -> None:
        """Nothing: the companions of the texts read it."""

    def start_epoch(self, epoch: int, epochs: int, steps: int, accum_freq: int) -> None:
        """An epoch begins; its steps are counted from the calls. For the arguments see :attr:`place`."""
        if self.place is None:
            self.begin(epochs)
        self.place, self._calls = (epoch, epochs, steps, accum_freq), 0
        self.set_epoch(epoch + 1, epochs)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, *features: Tensor, output_dict: bool = False, **inputs: Any) -> Any:
        """The sum of the terms, or with ``output_dict`` the terms and the metrics by name.

        Some trainers give the features and the scale by position.
        """
        inputs.update(zip((*NAMES, "logit_scale"), features, strict=False))
        if self._takes_teacher:
            # Several teachers side by side, as MobileCLIP's data have them, have another norm together.
            taught = {name: F.normalize(inputs[f"dist_{name}"].float(), dim=-1) for name in NAMES}
            inputs.update({f"reference_{name}": x for name, x in taught.items()})
        if not self._keeps_distillation:
            inputs = {name: x for name, x in inputs.items() if not name.startswith(("dist_", "syn_"))}
        self._count()
        entries: Entries = super().forward(**inputs)
        if not output_dict:
            return entries.total
        return LoggedTerms(*entries) if self.sums_every_value else {**entries.terms, **entries.metrics}

    def _count(self) -> None:
        """Announce the optimizer step of a call; gradient accumulation makes several calls for one."""
        epoch, epochs, steps, accum_freq = self.place or (0, 0, 0, 0)
        if accum_freq and self._calls % accum_freq == 0:
            # An epoch that is longer than announced stays at its last step.
            step = min(self._calls // accum_freq, steps - 1)
            self.set_progress(epoch * steps + step + 1, epochs * steps)
        self._calls += 1


# --- the patched functions ------------------------------------------------------------------------------


def create_loss(original: Callable[..., Any], bound: BoundArguments) -> nn.Module:
    """A loss for a trainer that adds up every value of the dict that a loss returns."""
    return build_loss(original(*bound.args, **bound.kwargs), bound.arguments["args"], sums_every_value=True)


def create_task(original: Callable[..., Any], bound: BoundArguments) -> Any:
    """A task of open_clip's later trainer, which adds up keys that end in ``_loss`` and logs the others."""
    task = original(*bound.args, **bound.kwargs)
    task.loss = build_loss(task.loss, bound.arguments["args"], sums_every_value=False)
    return task


def build_loss(base: nn.Module, args: Any, *, sums_every_value: bool) -> TrainerLoss:
    """Build the loss that the trainer's arguments ask for, and log it. See :class:`TrainerLoss`."""
    if isinstance(base, TrainerLoss):  # from a factory within this one
        return base
    loss = TrainerLoss(base, args, sums_every_value=sums_every_value).to(getattr(args, "device", None))
    if getattr(args, "rank", 0) == 0:
        _logger.info("%s, open_clip %s", loss.described(args.epochs), __version__)
    return loss


def _shareable(base: nn.Module, gather: rankloss.Gather) -> nn.Module:
    """CLIP's or SigLIP's loss of rankloss, in linear memory.

    CLIP's shares its gathering, and its products, with the terms on it. Any other loss, a subclass of these
    two included, stays as it is.
    """
    if type(base) is open_clip.ClipLoss:
        return rankloss.ClipLoss(gather=gather)
    return rankloss.SigLipLoss(gather=gather) if type(base) is _SigLipLoss else base


def train_one_epoch(original: Callable[..., Any], bound: BoundArguments) -> Any:
    """Announce an epoch to the loss; before the first of a run, connect it with the rest of the run.

    Raises:
        RuntimeError: The run asks for a loss of the catalogue and trains with another.
    """
    given = bound.arguments
    if "state" in given:  # of open_clip's later trainer: it holds the task, and the task model and loss
        state = given["state"]
        given = {**vars(state), **given, "loss": state.task.loss, "model": state.task.trainable_module}
    loss, args, epoch, train = given["loss"], given["args"], given["epoch"], given["data"]["train"]
    if not isinstance(loss, TrainerLoss):
        raise RuntimeError(
            f"--loss {args.loss} was given, but the trainer trains with {type(loss).__name__}; "
            "run `rankloss doctor` for advice"
        )
    if loss.place is None:
        companions = getattr(train, _COMPANIONS, None)
        if companions is not None:
            companions.attach(given["model"])
        checkpoints.connect(loss, args, given.get("optimizer"), epoch)
    accum_freq = getattr(args, "accum_freq", 1)  # forks of early releases have no such option
    steps = max(1, train.dataloader.num_batches // accum_freq)
    loss.start_epoch(epoch, args.epochs, steps, accum_freq)
    return original(*bound.args, **bound.kwargs)


def get_dataset(original: Callable[..., Any], bound: BoundArguments) -> Any:
    """Data of the trainer, whose training texts have the companions that the loss needs."""
    given, args = bound.arguments, bound.arguments["args"]
    if not given["is_train"]:
        return original(*bound.args, **bound.kwargs)
    compute_teacher(args)
    companions = companions_of(args)
    if companions is None:
        return original(*bound.args, **bound.kwargs)
    given["tokenizer"] = companions.tokenizer(given["tokenizer"])
    # A webdataset's pipeline is built inside the call, so the reader is replaced during it.
    names, reader = inspect.unwrap(original).__globals__, "tarfile_to_samples_nothrow"
    read: Any = names.get(reader)
    names[reader] = functools.partial(companions.join_samples, read, getattr(args, "text_key", None) or "txt")
    try:
        info = original(*bound.args, **bound.kwargs)
    finally:
        names[reader] = read
    setattr(info, _COMPANIONS, companions)
    dataset = getattr(info.dataloader, "dataset", None)
    if hasattr(dataset, "captions"):  # of a CSV file
        companions.join_csv(dataset, args.train_data, args.csv_separator)
    return info
