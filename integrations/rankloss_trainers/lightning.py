"""For Lightning: a callback that tells the losses in a LightningModule where training stands.

Example::

trainer = lightning.Trainer(max_epochs=3, callbacks=[Progress()])
"""

from __future__ import annotations

import math
from typing import Any, Literal

from lightning.pytorch import Callback
from lightning.pytorch.callbacks import GradientAccumulationScheduler, StochasticWeightAveraging
from torch import nn

from rankloss.options import check_choice, check_count
from rankloss_trainers.clock import tell

__all__ = ["Progress"]


class Progress(Callback):
    """Tells every loss in the module where training stands, also in a resumed run.

    A loss of rankloss may be built in the module's ``__init__``: with the default ``gather=None`` it reads
    rank and world size when it is first called, by which time Lightning has started the processes. λ is set
    before the sanity validation too, though ``validation_step`` had better use the loss's ``base``, which
    does not grow with λ.

    Args:
        unit: ``"step"`` calls ``set_progress(step, total_steps)`` before each batch, with the optimizer step
            that it is for; ``"epoch"`` calls ``set_epoch(epoch, epochs)`` before each epoch, as many as
            ``max_epochs`` and ``max_steps`` let the run have. Both count from 1.
        total_steps: The optimizer steps of the run, where the trainer does not know them: a dataset without
            a length, manual optimization, a ``GradientAccumulationScheduler``, or
            ``StochasticWeightAveraging`` of a module with batch norm, unless ``max_steps`` alone ends the
            run. Later steps stay at the last. None asks the trainer.

    Raises:
        ValueError: for another unit, and for ``total_steps`` below 1 or beside ``unit="epoch"``; when
            training begins, if the trainer does not know the run's steps, if no part of the module can be
            told, or if several optimizers step, whose steps the trainer counts together.
        RuntimeError: in training, under manual optimization, for steps that the trainer does not count.

    Example:
        >>> Progress(unit="batch")
        Traceback (most recent call last):
        ValueError: unit must be one of 'step', 'epoch'; got 'batch'
    """

    def __init__(self, unit: Literal["step", "epoch"] = "step", *, total_steps: int | None = None) -> None:
        check_choice("unit", unit, ("step", "epoch"))
        self.unit = unit
        self.total_steps = None if total_steps is None else check_count("total_steps", total_steps)
        if unit == "epoch" and total_steps is not None:
            raise ValueError(f"total_steps is for unit='step'; got total_steps={total_steps!r}, unit='epoch'")
        self._losses = nn.ModuleList()
        self._end = 0
        self._has_stepped = False  # under manual optimization

    def on_sanity_check_start(self, trainer: Any, pl_module: nn.Module) -> None:
        """Before the first λ the module is validated."""
        self._start(trainer, pl_module)
        self._tell(trainer)

    def on_train_start(self, trainer: Any, pl_module: nn.Module) -> None:
        """Before the first epoch; a run that resumes within one gets no ``on_train_epoch_start`` for it."""
        self._start(trainer, pl_module)
        self._tell(trainer)
        self._has_stepped, self._first_step = False, trainer.global_step
        if not pl_module.automatic_optimization:
            for optimizer in trainer.optimizers:
                optimizer.register_step_post_hook(self._on_step)

    def _on_step(self, *_: Any) -> None:
        self._has_stepped = True

    def on_train_epoch_start(self, trainer: Any, pl_module: nn.Module) -> None:  # noqa: ARG002
        """For losses that go by epochs."""
        if self.unit == "epoch":
            self._tell(trainer)

    def on_train_batch_start(self, trainer: Any, pl_module: nn.Module, batch: Any, batch_idx: int) -> None:  # noqa: ARG002
        """Before each batch; accumulated batches are for the same step."""
        if self.unit == "step":
            if self._has_stepped and trainer.global_step == self._first_step:
                raise RuntimeError(
                    "an optimizer has stepped, and the trainer did not count it: with manual optimization, "
                    "step what self.optimizers() gives, and not with use_pl_optimizer=False"
                )
            self._tell(trainer)

    def _start(self, trainer: Any, pl_module: nn.Module) -> None:
        method = {"step": "set_progress", "epoch": "set_epoch"}[self.unit]
        # A part of its own: the module is searched once, not at each step.
        self._losses = nn.ModuleList(
            part for part in pl_module.modules() if part is not pl_module and hasattr(part, method)
        )
        if not self._losses:
            raise ValueError(f"no part of {type(pl_module).__name__} has the method {method}")
        if self.unit == "epoch":
            end = trainer.max_epochs
            if end is None or end < 1:
                raise ValueError(f"unit='epoch' needs a Trainer with max_epochs; got max_epochs={end!r}")
            averaging = (each for each in trainer.callbacks if isinstance(each, StochasticWeightAveraging))
            # swa_end is the last epoch that takes steps; with batch norm there is one after it.
            ends = [end, *(each.swa_end + 1 for each in averaging)]
            if trainer.max_steps != -1:
                ends.append(_epochs(trainer, pl_module))
            self._end = min(ends)
            return
        if len(trainer.optimizers) > 1:
            raise ValueError(
                f"the trainer counts the steps of {len(trainer.optimizers)} optimizers together; call "
                "set_progress(step, total_steps) in training_step instead"
            )
        end = _steps(trainer, pl_module) if self.total_steps is None else self.total_steps
        if math.isinf(end) or end < 1:  # -1 stands for no limit
            raise ValueError(
                "the run has no known end: give the Trainer max_steps, or Progress its total_steps"
            )
        self._end = int(end)

    def _tell(self, trainer: Any) -> None:
        if self.unit == "step":
            tell(self._losses, "set_progress", min(trainer.global_step + 1, self._end), self._end)
        else:
            tell(self._losses, "set_epoch", min(trainer.current_epoch + 1, self._end), self._end)


def _epochs(trainer: Any, pl_module: Any) -> int:
    """The epochs of a run that ``max_steps`` may end."""
    steps, batches = _steps(trainer, pl_module), trainer.num_training_batches
    if math.isinf(batches):
        raise ValueError("with max_steps, unit='epoch' needs data with a length; use unit='step'")
    steps_per_epoch: int = math.ceil(batches / trainer.accumulate_grad_batches)
    return max(1, math.ceil(steps / steps_per_epoch))


def _steps(trainer: Any, pl_module: Any) -> float:
    """The optimizer steps of the run, from the trainer's estimate where that is exact."""
    cause = "" if pl_module.automatic_optimization else "manual optimization"
    for each in trainer.callbacks:
        if isinstance(each, GradientAccumulationScheduler) and each.going_to_accumulate_grad_batches():
            cause = "a GradientAccumulationScheduler"
        elif isinstance(each, StochasticWeightAveraging) and each.pl_module_contains_batch_norm(pl_module):
            cause = "StochasticWeightAveraging and batch norm"  # adds an epoch without steps
    # The estimate divides batches by trainer.accumulate_grad_batches, unless max_steps alone ends the run.
    if cause and trainer.max_epochs != -1:
        raise ValueError(
            f"with {cause} the trainer does not know how many optimizer steps the run has: "
            "give Progress its total_steps"
        )
    return float(trainer.estimated_stepping_batches)
