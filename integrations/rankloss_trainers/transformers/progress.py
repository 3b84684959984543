"""The callback that tells losses where a transformers Trainer, or one derived from it, stands.

And the last batch: checked before a training, kept in an evaluation.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.utils.data import ConcatDataset
from transformers import TrainerCallback
from transformers.trainer_utils import has_length

from rankloss_trainers.runtime import Runtime

_logger = logging.getLogger("rankloss_trainers")


class Progress(TrainerCallback):
    """Tells losses where a Trainer stands, at each epoch and optimizer step.

    Args:
        *losses: The losses of the trainer, or modules that hold them.

    Raises:
        ValueError: None of them is a loss of this package; when training begins, for a last batch of one
            pair, and for a loss that goes by epochs on data without a length.
    """

    def __init__(self, *losses: nn.Module) -> None:
        self.runs = [part for loss in losses for part in loss.modules() if isinstance(part, Runtime)]
        if not self.runs:
            classes = ", ".join(type(loss).__name__ for loss in losses) or "none"
            raise ValueError(f"losses must hold a loss of rankloss_trainers; got {classes}")
        self._epoch: int | None = None  # counted from 0; None before the run's first

    # Only now is the number of epochs known: `max_steps` and the data have a say in it.
    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Check the data, and log the loss of the run."""
        self._epoch = None
        loader = kwargs["train_dataloader"]
        epochs = math.inf
        if has_length(loader):
            epochs = state.num_train_epochs
            # A list needs no second query.
            least_pairs = 1 if all(run.takes_lists for run in self.runs) else 2
            _check_last_batch(loader, args, state.max_steps, least_pairs)
        for run in self.runs:
            run.begin(epochs, state.max_steps)
            if state.is_world_process_zero:
                _logger.info("%s", run.summary(epochs))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """A next training has to tell the losses itself."""
        for run in self.runs:
            run.end()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """At each epoch, for losses that go by epochs."""
        # state.epoch is a fraction after an epoch that a callback ended, so the next ones are counted.
        # A run resumed with smaller batches restarts at an earlier epoch than state.epoch: hence the min.
        self._epoch = int(state.epoch) if self._epoch is None else self._epoch + 1
        epochs = state.num_train_epochs
        for run in self.runs:
            run.set_epoch(min(self._epoch + 1, epochs), epochs)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Once per optimizer step."""
        for run in self.runs:
            run.set_progress(state.global_step + 1, state.max_steps)


@contextlib.contextmanager
def keeping_last_batch(args: Any) -> Iterator[None]:
    """Let a loader that is made within have every row, since ``dataloader_drop_last`` is for training.

    Args:
        args: The training arguments.
    """
    drop_last, args.dataloader_drop_last = args.dataloader_drop_last, False
    try:
        yield
    finally:
        args.dataloader_drop_last = drop_last


def _check_last_batch(loader: Any, args: Any, max_steps: int, least_pairs: int) -> None:
    """Raise a ValueError if a last batch, which the run reaches, has less than the least number of pairs.

    Of several processes each must have as many pairs as the others. Where accelerate completes the last batch
    from the first ones, there is none.
    """
    is_completed = getattr(loader.batch_sampler, "even_batches", False)
    batches_of_run = max_steps * args.gradient_accumulation_steps
    is_reached = batches_of_run >= len(loader)
    if args.dataloader_drop_last or is_completed or not is_reached:
        return
    dataset: Any = loader.dataset
    datasets: list[Any] = dataset.datasets if isinstance(dataset, ConcatDataset) else [dataset]
    size, processes = args.train_batch_size, args.world_size
    for pairs in map(len, datasets):
        last = pairs % (size * processes)  # 0 where all batches are full
        is_too_small = 0 < last < least_pairs
        is_uneven = last > 0 and processes > 1
        if is_too_small or is_uneven:
            reason = f"the last batch of an epoch has {last} pair(s), which processes cannot contrast"
            data = f"{pairs} pairs in batches of {size} on {processes} process(es)"
            raise ValueError(f"{reason}: {data}; set dataloader_drop_last=True")
