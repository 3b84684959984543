"""Charts of the rank agreement, in the TensorBoard and W&B that a Trainer reports to."""

from __future__ import annotations

import importlib
from typing import Any

from transformers import TrainerCallback
from transformers.integrations.integration_utils import TensorBoardCallback, WandbCallback

from rankloss_trainers.charts import AgreementCharts, Tracker, picture
from rankloss_trainers.logging import RankClipLog


class ChartOfEachEpoch(TrainerCallback):
    """Has a chart drawn of the first batch of each epoch whose agreement is measured.

    Args:
        log: What measures the agreement.
        reporters: The Trainer's ``callback_handler``, whose callbacks hold the writers.
    """

    def __init__(self, log: RankClipLog, reporters: Any) -> None:
        self.log = log
        self.reporters = reporters

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """A run has writers of its own."""
        self.log.charts = None

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Every reporter has begun by now."""
        if self.log.charts is None:
            trackers = self._trackers() if state.is_world_process_zero else []
            self.log.charts = AgreementCharts(trackers)
        step = self.log.next_measured(state.global_step) + 1  # counted from 1, as in the log
        self.log.charts.due(step, f"epoch {int(state.epoch) + 1}, step {step}")

    def _trackers(self) -> list[Tracker]:
        callbacks = self.reporters.callbacks
        writers = [x.tb_writer for x in callbacks if isinstance(x, TensorBoardCallback)]
        trackers: list[Tracker] = [writer.add_figure for writer in writers if writer is not None]
        if any(isinstance(x, WandbCallback) for x in callbacks):
            wandb = importlib.import_module("wandb")
            if wandb.run is not None:  # the Trainer's lines go by this axis, too
                trackers.append(
                    lambda name, figure, step: wandb.log(
                        {name: wandb.Image(picture(figure)), "train/global_step": step}
                    )
                )
        return trackers
