"""``transformers.Trainer`` with a loss of the catalogue."""

from __future__ import annotations

import functools
import importlib
import logging
import math
from collections.abc import Mapping
from copy import deepcopy
from typing import Any, cast

import torch
import transformers
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import TrainerCallback
from transformers.integrations.integration_utils import TensorBoardCallback, WandbCallback
from transformers.trainer_utils import has_length

import rankloss
from rankloss.losses import base_entries
from rankloss_trainers import state as loss_state
from rankloss_trainers.charts import AgreementCharts, Tracker, picture
from rankloss_trainers.clock import tell
from rankloss_trainers.driven_loss import Entries
from rankloss_trainers.logging import RankClipLog
from rankloss_trainers.refusals import refuse_run
from rankloss_trainers.transformers import choice, embeddings, teacher

__all__ = ["ContrastiveTrainer", "ContrastiveTrainerMixin"]

_AXIS = "train/global_step"
_STATE = "rankloss"  # the key in a checkpoint's trainer_state.json, among the states of callbacks

_logger = logging.getLogger("rankloss_trainers")


class ContrastiveTrainer(transformers.Trainer):
    """``transformers.Trainer`` with a loss of rankloss's catalogue.

    For a Trainer of one's own, put it before that: ``class Mine(ContrastiveTrainerMixin, MyTrainer)``.

    - λ follows the optimizer steps, ``global_step`` of ``max_steps``, and is right after a resume. With the
      option ``schedule_unit="epoch"`` it follows the epochs, as many as the Trainer trains. What a loss
      remembers (ALIP's histories) is in the checkpoints.
    - Each process's pairs are contrasted with those of all processes, exactly under DDP's averaging.
    - The loss is a mean over the pairs of a forward pass. With gradient accumulation the means are averaged,
      and pairs are contrasted within a micro-batch only.
    - A model with a ``logit_bias`` (SigLIP) is trained with the sigmoid loss, others with CLIP's: ALIGN too,
      whose own loss smooths its labels.
    - Evaluation, or any call without gradients, gives the base loss without the rank terms, which does not
      grow with λ; so ``load_best_model_at_end`` compares like with like. A last batch of one pair counts 0.
    - The log shows each term, λ, and what else the loss gives, averaged since the last line. With the option
      ``agreement_every`` TensorBoard and W&B get a chart of the rank agreement per epoch.

    Args:
        *args: What the Trainer takes.
        loss: A loss as the catalogue names it, or a module with the forward convention of open_clip's losses,
            whose innermost ``base``, if it has one, is what evaluation gives.
        loss_options: Options of the named loss, by their names without prefix; see ``LossEntry.options``.
            ALIP's ``caption_key`` is the prefix of the second caption's columns: ``caption`` for
            ``caption_input_ids`` beside ``input_ids``. With the columns ``reference_image_features`` and
            ``reference_text_features``, or one of them, the lists are ranked by a teacher, whose features of
            each pair they hold. The model is not given them, and evaluation does not need them. They can
            also be in a folder of ``rankloss features``, ``{"reference_features": FOLDER}``, that the data
            are bound to (:func:`rankloss_features.bind`). With
            ``{"reference": "teacher"}``, and in ``rankclip-distill``, data without them are an error.
        **kwargs: What the Trainer takes.

    Raises:
        TypeError: for an option that the loss does not have, and for ``loss_options`` beside a module.
        ValueError: for options that cannot work, and for a set-up that would train something else:
            DataParallel, ZeRO stage 3, FSDP with flat parameters, a ``compute_loss_func``, a model without a
            scale, or a loss with parameters, which the Trainer's optimizer does not know. In ``train``, for a
            loss that goes by epochs on data without a length, and for a teacher's columns that are missing,
            hold what is no teacher's, or come with a loss that has no use for them.
    """

    # The loss is a mean over a micro-batch, which the Trainer has to divide by the accumulated batches.
    loss_is_scaled_for_ga: bool | None = False

    def __init__(
        self,
        *args: Any,
        loss: str | nn.Module = "rankclip",
        loss_options: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        refuse_run(_conditions(self))
        embeddings.logit_scale(self.model)  # an error where there is none
        # Releases without loss_is_scaled_for_ga divide by the accumulated batches unless this is set.
        self.model_accepts_loss_kwargs = False
        if self.args.label_names is None:
            self.label_names = []  # the pairs are the labels; else evaluation would give no loss
        base = rankloss.SigLipLoss() if embeddings.has_bias(self.model) else rankloss.ClipLoss()
        chosen = choice.choose(loss, loss_options or {}, base)
        self.chosen_loss = chosen
        self.driven_loss = chosen.loss.to(self.args.device)
        innermost = _innermost_base(self.driven_loss.criterion)
        self.evaluation_loss = base if innermost is None else innermost
        self._teachers_columns: list[str] | None = None  # those of the last batch
        self._columns: list[str] = []  # of the data, where the Trainer drops some of them
        self._means = _Means()
        self.add_callback(_Progress(self))

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Batches in which a teacher's features have been looked at."""
        if self.chosen_loss.teacher and self.args.remove_unused_columns:
            self._columns = teacher.columns_of(self.train_dataset)
        collate = self.data_collator
        self.data_collator = functools.partial(teacher.collate_checked, collate, self.chosen_loss.features)
        try:
            loader: DataLoader[Any] = super().get_train_dataloader()
        finally:
            self.data_collator = collate
        return loader

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,  # noqa: ARG002 (counts labels, which pairs do not have)
    ) -> Any:
        """The loss of a batch; without gradients, as in evaluation, the base loss."""
        trains = torch.is_grad_enabled()  # a model may keep itself in evaluation mode
        # The model's own loss is of this process alone, and would be computed for nothing.
        inputs = {name: value for name, value in inputs.items() if name != "return_loss"}
        inputs, references = teacher.split(inputs)
        captions = self.chosen_loss.captions
        if captions is not None:
            select = embeddings.with_captions if trains else embeddings.without_captions
            inputs = select(inputs, captions)
        outputs = model(**inputs)
        features: dict[str, Any] = embeddings.features_of(outputs, self.accelerator.unwrap_model(model))
        if not trains:
            loss = self._evaluated(features)
        else:
            if captions is not None:
                texts, of_captions = features["text_features"].chunk(2)
                features.update(text_features=texts, caption_features=of_captions)
            self._check_teacher(list(references), list(inputs))
            entries: Entries = self.driven_loss(**features, **references)
            self._means.add(entries)
            loss = entries.total
        return (loss, outputs) if return_outputs else loss

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Evaluate a batch: the Trainer computes a loss without labels only where the batch asks for it."""
        return super().prediction_step(model, {**inputs, "return_loss": True}, *args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the terms and the metrics of the loss to the lines of training."""
        if "loss" in logs:
            logs.update(self._means.take(self.accelerator))
        super().log(logs, *args, **kwargs)

    # A callback's on_save would miss the checkpoint at SIGTERM.
    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        criterion, states = self.driven_loss.criterion, cast("dict[str, Any]", self.state.stateful_callbacks)
        if loss_state.has_state(criterion):
            saved = loss_state.saved(self.chosen_loss.name, criterion)
            states[_STATE] = {**saved, "state_dict": {k: x.tolist() for k, x in saved["state_dict"].items()}}
        super()._save_checkpoint(*args, **kwargs)

    def _check_teacher(self, found: list[str], others: list[str]) -> None:
        if found == self._teachers_columns:
            return
        others = [column for column in dict.fromkeys([*others, *self._columns]) if column not in found]
        teacher.check_columns(self.chosen_loss.name, self.chosen_loss.teacher, found, others)
        self._teachers_columns = found
        if found and self.is_world_process_zero():
            _logger.info("%s ranks by a teacher: %s", self.chosen_loss.name, " and ".join(found))

    def _evaluated(self, features: dict[str, Any]) -> Tensor:
        images: Tensor = features["image_features"]
        if len(images) == 1 and rankloss.Gather().place[1] == 1:
            return images.new_zeros(())  # a single pair has no negatives
        entries = base_entries(self.evaluation_loss, **features)
        return Entries.of(self.evaluation_loss, entries).total

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns, captions = cast("list[str]", self._signature_columns), self.chosen_loss.captions
        # What the loss takes and the model does not, which would be dropped as unused.
        of_captions = [] if captions is None else [f"{captions}_{name}" for name in columns]
        self._signature_columns: Any = list(
            dict.fromkeys([*columns, *of_captions, *teacher.COLUMNS, teacher.BOUND])
        )


class _Progress(TrainerCallback):
    """Tells the loss, and what is logged of it, where the Trainer stands."""

    def __init__(self, trainer: ContrastiveTrainer) -> None:
        self.trainer = trainer
        self.chosen, self.loss = trainer.chosen_loss, trainer.driven_loss
        # With model_init every training that is not resumed begins with a new model, as trials do.
        anew = trainer.model_init is not None
        self._first_state = deepcopy(self.loss.criterion.state_dict()) if anew else None
        self._epoch: int | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Only now is the number of epochs known: ``max_steps`` and the data have a say in it."""
        if state.global_step > 0:
            _restore(self.chosen, state.stateful_callbacks.get(_STATE))
        elif self._first_state is not None:
            self.loss.criterion.load_state_dict(self._first_state)
        epochs = state.num_train_epochs if has_length(kwargs["train_dataloader"]) else math.inf
        self._epoch = None
        self.trainer._means.clear()
        if isinstance(self.loss.evaluate, RankClipLog):
            self.loss.evaluate.charts = None  # a run has writers of its own
        self.chosen.start(epochs, announce=state.is_world_process_zero)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """For losses that go by epochs."""
        # Counted: an epoch that a callback ended leaves a fraction.
        self._epoch = int(state.epoch) if self._epoch is None else self._epoch + 1
        if self.loss.clock.unit == "epoch":
            epochs = state.num_train_epochs
            tell(self.loss.criterion, "set_epoch", min(self._epoch + 1, epochs), epochs)
        log = self.loss.evaluate
        if isinstance(log, RankClipLog) and log.agreement_every is not None and state.is_world_process_zero:
            if log.charts is None:  # every reporter has begun by now
                log.charts = AgreementCharts(_trackers(self.trainer.callback_handler.callbacks))
            log.charts.due(self._epoch + 1, 1)  # the Trainer's log counts steps from 1

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Once per optimizer step."""
        self.loss.clock.start_step(state.global_step + 1, state.max_steps)


def _trackers(callbacks: list[Any]) -> list[Tracker]:
    """What a Trainer reports to, by the callbacks that hold the writers."""
    writers = [x.tb_writer for x in callbacks if isinstance(x, TensorBoardCallback)]
    trackers: list[Tracker] = [writer.add_figure for writer in writers if writer is not None]
    if any(isinstance(x, WandbCallback) for x in callbacks):
        wandb = importlib.import_module("wandb")
        # The Trainer's lines go by this axis, too.
        trackers.append(
            lambda name, figure, step: wandb.log({name: wandb.Image(picture(figure)), _AXIS: step})
        )
    return trackers


def _innermost_base(criterion: object) -> Any:
    """The loss at the bottom of a composition, whose value does not grow with λ; None for one without."""
    base = getattr(criterion, "base", None)
    below = None if base is None else _innermost_base(base)
    return base if below is None else below


def _restore(chosen: choice.Choice, saved: dict[str, Any] | None) -> None:
    """Give the loss of a resumed run its state back."""
    if not loss_state.has_state(chosen.loss.criterion):
        return
    found = loss_state.restore(chosen.name, chosen.loss.criterion, saved)
    if found:
        _logger.warning(
            "The loss %s has a state that belongs to the run, and its checkpoint holds %s: it starts anew",
            chosen.name,
            found,
        )


class _Means:
    """Means of a loss's entries since the last line of the log, each over the calls that gave it."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Begin anew."""
        self._sums: dict[str, Tensor] = {}  # of the values, and of their number

    def add(self, entries: Entries) -> None:
        """Take the entries of one call, without waiting for the device."""
        for name, value in {**entries.terms, **entries.metrics}.items():
            one = torch.stack([value.detach().float(), torch.ones_like(value, dtype=torch.float)])
            self._sums[name] = one + self._sums.get(name, 0)

    def take(self, accelerator: Any) -> dict[str, float]:
        """The means over all processes, and begin anew; every process has to call it."""
        if not self._sums:
            return {}
        means = torch.stack([sum_ / number for sum_, number in self._sums.values()])
        taken = dict(zip(self._sums, accelerator.reduce(means, reduction="mean").tolist(), strict=True))
        self.clear()
        return taken


def _conditions(trainer: Any) -> dict[str, str]:
    """What keeps a loss from being trained as it should, as :mod:`rankloss_trainers.refusals` calls it."""
    shards = trainer.accelerator.state
    deepspeed, fsdp = (getattr(shards, f"{name}_plugin", None) for name in ("deepspeed", "fsdp"))
    held = {
        "compute_loss_func": getattr(trainer, "compute_loss_func", None) is not None,
        "data_parallel": trainer.args.n_gpu > 1,
        "zero_3": deepspeed is not None and deepspeed.zero_stage == 3,
        "fsdp_1": fsdp is not None and getattr(fsdp, "fsdp_version", 1) == 1,
    }
    return {name: str(trainer.args.n_gpu) for name, holds in held.items() if holds}


ContrastiveTrainerMixin = ContrastiveTrainer
"""The same class, before a Trainer of one's own: ``class Mine(ContrastiveTrainerMixin, MyTrainer)``."""
