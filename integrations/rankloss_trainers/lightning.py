"""For Lightning: a callback that tells the losses in a LightningModule where training stands.

Example::

    self.loss = rankloss_trainers.create("rankclip", top_k=8)      # in the module's __init__
    trainer = lightning.Trainer(max_epochs=3, callbacks=[Progress()])
"""

from __future__ import annotations

import inspect
import math
from typing import Any, Literal

from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from rankloss.options import check_choice, check_count
from rankloss_trainers.extras import extra
from rankloss_trainers.progress import METHODS, course, end_training, listeners, one_line, warn_of_change
from rankloss_trainers.run_options import RunOptions

with extra("lightning"):
    from lightning.pytorch import Callback
    from lightning.pytorch.callbacks import GradientAccumulationScheduler, StochasticWeightAveraging
    from lightning.pytorch.utilities import CombinedLoader, rank_zero_info

__all__ = ["Progress"]


class Progress(Callback):
    """Tells every loss in the module where training stands, also in a resumed run.

    Told are the parts of modules that are called with ``image_features`` and ``text_features``. Elsewhere
    the methods ``set_epoch(epoch, epochs)`` and ``set_progress(step, total_steps)`` are called if their
    parameters have just these names: a backbone may have a ``set_epoch`` of its own.
    The checkpoints say the losses and the course of the training, and a resumed run of others is warned of.

    A loss of rankloss may be built in the module's ``__init__``: with the default ``gather=None`` it reads
    rank and world size when it is first called, by which time Lightning has started the processes. λ is set
    before the sanity validation too, though ``validation_step`` had better use the loss's ``base``, which
    does not grow with λ.

    Args:
        unit: ``"step"`` calls ``set_progress(step, total_steps)`` once before each optimizer step, whose
            batches may be several; ``"epoch"`` calls ``set_epoch(epoch, epochs)`` before each epoch, and is
            ``"step"`` in a run of one epoch. Both count from 1. ``"auto"`` goes by steps in a run of fewer
            than ten epochs, of ``max_steps`` or of ``total_steps``, by epochs otherwise. The log says which.
        total_steps: The optimizer steps of the run, where the trainer does not know them: a dataset without
            a length, a ``GradientAccumulationScheduler`` or ``StochasticWeightAveraging``, unless
            ``max_steps`` alone ends the run. Later steps stay at the last. None asks the trainer.

    Raises:
        ValueError: for another unit, and for ``total_steps`` below 1 or beside ``unit="epoch"``; when
            training begins with a loss that has a schedule: if it goes by the other unit alone, if the
            trainer does not know the run's steps (under ``unit="epoch"``, if ``max_epochs`` alone does not
            end it), and under manual optimization, whose steps the trainer may not count; and for a last
            batch of one pair, where the loader has a length.

    Example:
        >>> Progress(unit="batch")
        Traceback (most recent call last):
        ValueError: unit must be one of 'auto', 'step', 'epoch'; got 'batch'
    """

    def __init__(
        self, unit: Literal["auto", "step", "epoch"] = "auto", *, total_steps: int | None = None
    ) -> None:
        check_choice("unit", unit, ("auto", "step", "epoch"))
        self._given = unit
        self.unit = unit  # of the present run
        self.total_steps = None if total_steps is None else check_count("total_steps", total_steps)
        if unit == "epoch" and total_steps is not None:
            raise ValueError(f"total_steps is for unit='step'; got total_steps={total_steps!r}, unit='epoch'")
        self._tellers: list[Any] = []  # the methods to call, bound to the parts of losses that have them
        self._end = 0  # the last step or epoch
        self._told = 0  # the last one that was told, since an accumulated batch is no step of its own
        self._training = ""  # for the checkpoint: a line of the losses and their course; none before training
        self._training_before: str | None = None  # that of the checkpoint that is resumed from

    def on_sanity_check_start(self, trainer: Any, pl_module: nn.Module) -> None:
        """Before a validation that precedes the first step, by which λ is told already."""
        self.on_train_start(trainer, pl_module)

    def on_train_start(self, trainer: Any, pl_module: nn.Module) -> None:
        """Before the first epoch."""
        self.unit = self._unit_of(trainer, pl_module)
        self._check_units(pl_module)
        self._tellers = self._listeners(pl_module, self.unit, preferred=self.unit)
        self._told = 0
        self._end = self._end_of(trainer, pl_module) if self._tellers else 0
        self._training = self._described(pl_module)
        if trainer.is_global_zero:
            warn_of_change(self._training_before, self._training)
        self._training_before = None
        if not trainer.sanity_checking:
            _check_last_batch(trainer, pl_module)
        if self._tellers and not trainer.sanity_checking:
            rank_zero_info(f"Loss: lambda per {self.unit} over {self._end} {self.unit}(s)")
        self._tell(trainer)

    def _check_units(self, pl_module: nn.Module) -> None:
        """Raise a ValueError for a loss that is told at the other unit alone."""
        other = "epoch" if self.unit == "step" else "step"
        untold = self._listeners(pl_module, other, preferred=self.unit)
        if untold:
            part = type(untold[0].__self__).__name__
            raise ValueError(f"{part} has {METHODS[other]} alone: give the trainer Progress({other!r})")

    def _described(self, pl_module: nn.Module) -> str:
        """The losses in the module, and the course of those that are told."""
        lengths: dict[str, float] = {self.unit: self._end}
        courses = [course(tell.__self__, self.unit, lengths) for tell in self._tellers]
        losses = [one_line(loss) for loss in _losses(pl_module)]
        return ": ".join(filter(None, [", ".join(losses), ", ".join(courses)]))

    def _unit_of(self, trainer: Any, pl_module: nn.Module) -> Literal["epoch", "step"]:
        """The unit of a run: the given one, or the one that its length decides."""
        has_epochs_alone = bool(self._listeners(pl_module, "epoch", preferred="step"))
        # A run of one epoch would go by steps, of which such a loss cannot be told.
        if self._given != "auto" and has_epochs_alone:
            return self._given
        by_steps = self.total_steps is not None or trainer.max_steps != -1
        # Of endless epochs, -1 or None, there are fewer than ten by their number: they go by steps.
        epochs = math.inf if by_steps else trainer.max_epochs or 0
        return RunOptions(schedule_unit=self._given).unit(epochs)

    def _listeners(self, pl_module: nn.Module, unit: str, preferred: str) -> list[Any]:
        """The methods by which the losses in the module are told at this unit.

        Args:
            pl_module: The module, whose own methods are the user's.
            unit: ``"epoch"`` or ``"step"``.
            preferred: The unit of a part that has both methods.
        """
        in_losses = {part for loss in _losses(pl_module) for part in loss.modules()}
        tellers = [tell for tell in listeners(pl_module, unit, preferred) if tell.__self__ is not pl_module]
        return [tell for tell in tellers if tell.__self__ in in_losses or _has_names(tell, unit)]

    def on_train_batch_start(self, trainer: Any, pl_module: nn.Module, batch: Any, batch_idx: int) -> None:  # noqa: ARG002
        """Before each batch, the first of an epoch too; accumulated batches are for the same step."""
        self._tell(trainer)

    def on_fit_end(self, trainer: Any, pl_module: nn.Module) -> None:  # noqa: ARG002
        """Tell the losses that the training has ended; a next one has to tell them anew."""
        end_training(tell.__self__ for tell in self._tellers)
        self._tellers = []

    def on_exception(self, trainer: Any, pl_module: nn.Module, exception: BaseException) -> None:  # noqa: ARG002
        """An error ends the training, too."""
        self.on_fit_end(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """The losses and the course of the training, for a checkpoint."""
        return {"training": self._training} if self._training else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Those of the training that is resumed."""
        self._training_before = state_dict.get("training")

    def _end_of(self, trainer: Any, pl_module: Any) -> int:
        """The steps, or the epochs, of the run.

        Raises:
            ValueError: The module is optimized by hand, or the trainer does not know their number.
        """
        if not pl_module.automatic_optimization:
            raise ValueError("with manual optimization call set_progress(step, total_steps) in training_step")
        changing = (GradientAccumulationScheduler, StochasticWeightAveraging)  # each may change the estimate
        reasons = [type(each).__name__ for each in trainer.callbacks if isinstance(each, changing)]
        if self.unit == "epoch":
            return _epochs_of(trainer, reasons)
        return _steps_of(trainer, reasons) if self.total_steps is None else self.total_steps

    def _tell(self, trainer: Any) -> None:
        """Tell the losses the present step or epoch, once; later ones than the last stay at it."""
        now = 1 + (trainer.global_step if self.unit == "step" else trainer.current_epoch)
        if now != self._told:
            self._told = now
            for tell in self._tellers:
                tell(min(now, self._end), self._end)


_PARAMETERS = {"epoch": ["epoch", "epochs"], "step": ["step", "total_steps"]}
"""The parameters of the methods of :data:`METHODS`."""


def _losses(module: nn.Module) -> list[nn.Module]:
    """The losses in a module, without those that others hold."""
    losses = [part for part in module.modules() if part is not module and _is_loss(part)]
    held = {part for loss in losses for part in loss.modules() if part is not loss}
    return [loss for loss in losses if loss not in held]


def _check_last_batch(trainer: Any, pl_module: nn.Module) -> None:
    """Raise a ValueError for a last batch of one pair, which the run reaches and a loss cannot contrast.

    In one process; of several, each contrasts its pair with the others'.
    """
    parts = [part for loss in _losses(pl_module) for part in loss.modules()]
    contrasts_pairs = any(getattr(part, "min_pairs", 1) > 1 for part in parts)
    if trainer.world_size > 1 or not contrasts_pairs:
        return
    for loader in CombinedLoader(trainer.train_dataloader).flattened:
        if _has_last_batch(loader) and _is_reached(trainer, len(loader)):
            pairs = len(loader.sampler)
            if loader.batch_size > 1 and pairs % loader.batch_size == 1:
                raise ValueError(
                    "the last batch of an epoch has 1 pair, which cannot be contrasted: "
                    f"{pairs} pairs in batches of {loader.batch_size}; give the DataLoader drop_last=True"
                )


def _has_last_batch(loader: Any) -> bool:
    """True for a loader of a known number of rows, which keeps a last batch of fewer."""
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return False
    return loader.batch_size is not None and not loader.drop_last


def _is_reached(trainer: Any, batches: int) -> bool:
    """True if a run reads the last of so many batches of an epoch, as far as its start can tell.

    A ``GradientAccumulationScheduler`` may let it read more.
    """
    batches_of_run = trainer.max_steps * trainer.accumulate_grad_batches  # negative without max_steps
    is_in_run = batches_of_run < 0 or batches_of_run >= batches
    return bool(is_in_run and trainer.num_training_batches >= batches)


def _is_loss(part: nn.Module) -> bool:
    """True for a module that is called with features, as losses are."""
    return {"image_features", "text_features"} <= inspect.signature(part.forward).parameters.keys()


def _has_names(method: Any, unit: str) -> bool:
    """True for a method with the names of a loss's; the ``set_epoch(epoch)`` of a backbone is for others."""
    first_two = list(inspect.signature(method).parameters)[:2]
    return first_two == _PARAMETERS[unit]


def _epochs_of(trainer: Any, reasons: list[str]) -> int:
    """The epochs of a run that ``max_epochs`` alone ends; a ValueError for any other run.

    Args:
        trainer: Lightning's Trainer.
        reasons: The callbacks that may change the run's length.
    """
    epochs = -1 if trainer.max_epochs is None else trainer.max_epochs
    if trainer.max_steps != -1:
        reasons = [*reasons, f"max_steps={trainer.max_steps}"]
    if epochs < 1 or reasons:
        shown = ", ".join([f"max_epochs={trainer.max_epochs}", *reasons])
        raise ValueError(f"unit='epoch' needs a Trainer whose run max_epochs ends; got {shown}")
    return int(epochs)


def _steps_of(trainer: Any, reasons: list[str]) -> int:
    """The steps of a run; a ValueError where the trainer does not know them.

    Args:
        trainer: Lightning's Trainer.
        reasons: The callbacks that may change their number, unless ``max_steps`` alone ends the run.
    """
    is_ended_by_steps_alone = trainer.max_epochs in (None, -1)
    if reasons and not is_ended_by_steps_alone:
        raise ValueError(f"with {reasons[0]} the steps of the run are not known: give Progress total_steps")
    steps = float(trainer.estimated_stepping_batches)
    if not 1 <= steps < math.inf:  # -1 stands for no limit
        raise ValueError(
            "with a run without a known end the steps of the run are not known: give Progress total_steps"
        )
    return int(steps)
