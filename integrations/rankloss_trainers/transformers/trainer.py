"""``transformers.Trainer`` with a loss of the catalogue."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Mapping
from copy import deepcopy
from typing import Any, cast

import torch
import transformers
from torch import nn
from torch.utils.data import DataLoader
from transformers import TrainerCallback
from transformers.trainer_utils import has_length

import rankloss
from rankloss.options import check_count
from rankloss_trainers import state as loss_state
from rankloss_trainers.clock import tell
from rankloss_trainers.driven_loss import Entries, evaluation
from rankloss_trainers.refusals import refuse_run
from rankloss_trainers.transformers import choice, embeddings, mini_batches, teacher

__all__ = ["ContrastiveTrainer", "ContrastiveTrainerMixin"]

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
    - The log shows each term, λ, and what else the loss gives, averaged since the last line.

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
        mini_batch_size: Embed each batch in mini-batches of so many pairs at most, in the memory of one, for
            a second forward pass's time (GradCache). Loss and gradients are those of the whole batch, which
            ``per_device_train_batch_size`` sets. Batch norm, as in ALIGN, is of a mini-batch, and counts each
            twice in its running averages. In evaluation the batch is split, too, and ``compute_metrics`` gets
            the embeddings and the scale. By default the batch is embedded at once.
        **kwargs: What the Trainer takes.

    Raises:
        TypeError: for an option that the loss does not have, and for ``loss_options`` beside a module.
        ValueError: for options that cannot work, and for a set-up that would train something else:
            DataParallel, ZeRO stage 3, FSDP with flat parameters, a ``compute_loss_func``, a model without a
            scale, or a loss with parameters, which the Trainer's optimizer does not know. In ``train``, for a
            loss that goes by epochs on data without a length, for a teacher's columns that are missing, hold
            what is no teacher's, or come with a loss that has no use for them, and for mini-batches of a
            model that is compiled as a whole, or of columns that do not have a row for each pair.

    References:
        Cached gradients: "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup", RepL4NLP
        2021.
    """

    def __init__(
        self,
        *args: Any,
        loss: str | nn.Module = "rankclip",
        loss_options: Mapping[str, Any] | None = None,
        mini_batch_size: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if mini_batch_size is not None:
            mini_batch_size = check_count("mini_batch_size", mini_batch_size)
        self.mini_batch_size = mini_batch_size
        self._refuse_what_would_train_something_else()
        embeddings.logit_scale(self.model)  # an error where there is none
        # The loss is a mean over a micro-batch, which the Trainer has to divide by the accumulated batches.
        self.model_accepts_loss_kwargs = False
        if self.args.label_names is None:
            self.label_names = []  # the pairs are the labels; else evaluation would give no loss
        self.can_return_loss = True  # without labels, and whether the batch asks for it or not
        base = rankloss.SigLipLoss() if embeddings.has_bias(self.model) else rankloss.ClipLoss()
        self.chosen_loss = choice.choose(loss, loss_options or {}, base)
        self.evaluation_loss: Any = base
        below: Any = self.chosen_loss.criterion.to(self.args.device)
        while (below := getattr(below, "base", None)) is not None:
            self.evaluation_loss = below
        self._teachers_columns: list[str] | None = None  # those of the last batch
        self._sums: dict[str, tuple[Any, int]] = {}  # of the entries since the log's last line, and how many
        self.add_callback(_Progress(self))

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Batches in which a teacher's features have been looked at."""
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
        unwrapped = self.accelerator.unwrap_model(model)
        with mini_batches.embedding_in(unwrapped, self.mini_batch_size):
            outputs = model(**inputs)
        features: dict[str, Any]
        features = dict(outputs) if self.mini_batch_size else embeddings.features_of(outputs, unwrapped)
        if not trains:
            loss = evaluation(self.evaluation_loss, rankloss.Gather(), **features).total
        else:
            if captions is not None:
                texts, of_captions = features["text_features"].chunk(2)
                features.update(text_features=texts, caption_features=of_captions)
            self._check_teacher(list(references), list(inputs))
            evaluate, criterion = self.chosen_loss.evaluate, self.chosen_loss.criterion
            given = evaluate(criterion, self.state.global_step, **features, **references)
            entries = Entries.of(criterion, given)
            for name, value in {**entries.terms, **entries.metrics}.items():
                total, number = self._sums.get(name, (0.0, 0))
                self._sums[name] = total + value.detach().float(), number + 1
            loss = entries.total
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add to the lines of training each entry of the loss, as the mean over the calls that gave it."""
        if "loss" in logs and self._sums:
            means = torch.stack([total / number for total, number in self._sums.values()])
            of_all = self.accelerator.reduce(means, reduction="mean").tolist()
            logs.update(zip(self._sums, of_all, strict=True))
            self._sums.clear()
        super().log(logs, *args, **kwargs)

    # A callback's on_save would miss the checkpoint at SIGTERM.
    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        criterion, states = self.chosen_loss.criterion, cast("dict[str, Any]", self.state.stateful_callbacks)
        if loss_state.has_state(criterion):
            saved = loss_state.saved(self.chosen_loss.name, criterion)
            states[_STATE] = {**saved, "state_dict": {k: x.tolist() for k, x in saved["state_dict"].items()}}
        super()._save_checkpoint(*args, **kwargs)

    def _refuse_what_would_train_something_else(self) -> None:
        fsdp = getattr(self.accelerator.state, "fsdp_plugin", None)
        held = {
            "compute_loss_func": self.compute_loss_func is not None,
            "data_parallel": self.args.n_gpu > 1,
            "fsdp_1": fsdp is not None and fsdp.fsdp_version == 1,
        }
        refuse_run({name: str(self.args.n_gpu) for name, holds in held.items() if holds})

    def _check_teacher(self, found: list[str], others: list[str]) -> None:
        if found == self._teachers_columns:
            return
        wanted = self.chosen_loss.teacher
        columns = teacher.columns_of(self.train_dataset) if wanted else ()  # the Trainer drops unused ones
        others = [column for column in dict.fromkeys([*others, *columns]) if column not in found]
        teacher.check_columns(self.chosen_loss.name, wanted, found, others)
        self._teachers_columns = found
        if found and self.is_world_process_zero():
            _logger.info("%s ranks by a teacher: %s", self.chosen_loss.name, " and ".join(found))

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
        self.trainer, self.chosen = trainer, trainer.chosen_loss
        self._first_state = deepcopy(self.chosen.criterion.state_dict())
        self._unit = "step"
        self._epoch: int | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Only now is the number of epochs known: ``max_steps`` and the data have a say in it."""
        chosen = self.chosen
        if state.global_step > 0 and loss_state.has_state(chosen.criterion):
            saved = state.stateful_callbacks.get(_STATE)
            loss_state.restore(chosen.name, chosen.criterion, saved, warn=state.is_world_process_zero)
        else:  # a search trains several times, with a new model
            chosen.criterion.load_state_dict(self._first_state)
        epochs = state.num_train_epochs if has_length(kwargs["train_dataloader"]) else math.inf
        self._unit, self._epoch = chosen.unit(epochs), None
        self.trainer._sums.clear()
        if chosen.package and state.is_world_process_zero:
            text = chosen.entry.described(chosen.options, epochs)
            _logger.info("Loss: %s (%s)%s", chosen.name, chosen.package, text and f", {text}")

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """For losses that go by epochs."""
        # Counted: an epoch that a callback ended leaves a fraction.
        self._epoch = int(state.epoch) if self._epoch is None else self._epoch + 1
        if self._unit == "epoch":
            epochs = state.num_train_epochs
            tell(self.chosen.criterion, "set_epoch", min(self._epoch + 1, epochs), epochs)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Once per optimizer step."""
        if self._unit == "step":
            tell(self.chosen.criterion, "set_progress", state.global_step + 1, state.max_steps)


ContrastiveTrainerMixin = ContrastiveTrainer
"""The same class, before a Trainer of one's own: ``class Mine(ContrastiveTrainerMixin, MyTrainer)``."""
