"""``transformers.Trainer`` with a loss of the catalogue."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint, has_length

import rankloss
from rankloss.losses import base_entries
from rankloss_trainers import state as loss_state
from rankloss_trainers.clock import tell
from rankloss_trainers.driven_loss import Entries
from rankloss_trainers.logging import RankClipLog
from rankloss_trainers.refusals import refuse_run
from rankloss_trainers.transformers import choice, embeddings
from rankloss_trainers.transformers.charts import ChartOfEachEpoch

__all__ = ["STATE_FILE", "ContrastiveTrainer", "ContrastiveTrainerMixin"]

STATE_FILE = "rankloss.pt"
"""Where a checkpoint holds the state of the loss, if the loss has one."""

_logger = logging.getLogger("rankloss_trainers")


class ContrastiveTrainerMixin:
    """Lets a subclass of ``transformers.Trainer`` train with a loss of rankloss's catalogue.

    Put it before the Trainer: ``class MyTrainer(ContrastiveTrainerMixin, transformers.Trainer)``.

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
            whose ``base``, if it has one, is what evaluation gives.
        loss_options: Options of the named loss, by their names without prefix; see ``LossEntry.options``.
            ALIP's ``caption_key`` is the prefix of the second caption's columns: ``caption`` for
            ``caption_input_ids`` beside ``input_ids``. With ``{"reference": "teacher"}``, and in
            ``rankclip-distill``, the lists are ranked by a teacher, whose features of each pair are the
            columns ``reference_image_features`` and ``reference_text_features``, or one of them. The model is
            not given them, and evaluation does not need them.
        gather: The :class:`rankloss.Gather` of the run, for a named loss; None for the default process group,
            exactly.
        **kwargs: What the Trainer takes.

    Raises:
        TypeError: for an option that the loss does not have, and for ``loss_options`` or ``gather`` beside a
            module.
        ValueError: for options that cannot work, and for a set-up that would train something else:
            DataParallel, ZeRO stage 3, FSDP with flat parameters, a ``compute_loss_func``, a model without a
            scale, or a loss with parameters, which the Trainer's optimizer does not know. In ``train``, for a
            loss that goes by epochs on data without a length.
    """

    # The loss is a mean over a micro-batch, which the Trainer has to divide by the accumulated batches.
    loss_is_scaled_for_ga: bool | None = False

    def __init__(
        self,
        *args: Any,
        loss: str | nn.Module = "rankclip",
        loss_options: Mapping[str, Any] | None = None,
        gather: rankloss.Gather | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        trainer: Any = self
        _refuse(trainer)
        # Releases without loss_is_scaled_for_ga divide by the accumulated batches unless this is set.
        trainer.model_accepts_loss_kwargs = False
        if trainer.args.label_names is None:
            trainer.label_names = []  # the pairs are the labels; else evaluation would give no loss
        gather_of_run = rankloss.Gather() if gather is None else gather
        sigmoid = embeddings.has_bias(trainer.model)
        base = choice.base_of(sigmoid=sigmoid, gather=gather_of_run)
        if isinstance(loss, str):
            chosen = choice.named(loss, loss_options, base, gather_of_run, sigmoid=sigmoid)
        else:
            chosen = choice.own(loss, loss_options=loss_options, gather=gather)
        self.chosen_loss = chosen
        self.driven_loss = chosen.loss.to(trainer.args.device)
        own_base = _without_rank_terms(self.driven_loss.criterion)
        self.evaluation_loss = base if own_base is None else own_base
        self._first_state = deepcopy(self.driven_loss.criterion.state_dict())
        self._means = _Means()
        trainer.add_callback(_Progress(chosen, self._means))
        log = self.driven_loss.evaluate
        if isinstance(log, RankClipLog) and log.agreement_every is not None:
            trainer.add_callback(ChartOfEachEpoch(log, trainer.callback_handler))

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train, and give a resumed run the state of its loss back."""
        trainer: Any = self
        if trainer.model_init is not None:  # a model that is made anew, as in the trials of a search
            self.driven_loss.criterion.load_state_dict(self._first_state)
        if resume_from_checkpoint and loss_state.has_state(self.driven_loss.criterion):
            path: Any = resume_from_checkpoint
            if path is True:
                path = get_last_checkpoint(trainer.args.output_dir)  # type: ignore[no-untyped-call]
            if path is not None:  # else the Trainer says what is missing
                _restore(self.chosen_loss, Path(path))
        return super().train(resume_from_checkpoint, *args, **kwargs)  # type: ignore[misc]

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,  # noqa: ARG002 (counts labels, which pairs do not have)
    ) -> Any:
        """The loss of a batch; without gradients, as in evaluation, the base loss."""
        trainer: Any = self
        trains = torch.is_grad_enabled()  # a model may keep itself in evaluation mode
        # The model's own loss is of this process alone, and would be computed for nothing.
        inputs = {name: value for name, value in inputs.items() if name != "return_loss"}
        inputs, references = embeddings.without_references(inputs)
        captions = self.chosen_loss.captions
        if captions is not None:
            select = embeddings.with_captions if trains else embeddings.without_captions
            inputs = select(inputs, captions)
        outputs = model(**inputs)
        features: dict[str, Any] = dict(embeddings.features_of(outputs))
        if captions is not None and trains:
            features["text_features"], features["caption_features"] = features["text_features"].chunk(2)
        whole = trainer.accelerator.unwrap_model(model)
        features["logit_scale"] = embeddings.logit_scale(whole)
        if embeddings.has_bias(whole):
            features["logit_bias"] = embeddings.logit_bias(whole)
        if trains:
            self.chosen_loss.check_references(references, inputs)
            entries: Entries = self.driven_loss(**features, **references)
            self._means.add(entries)
            loss = entries.total
        else:
            loss = self._evaluated(features)
        return (loss, outputs) if return_outputs else loss

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Evaluate a batch: the Trainer computes a loss without labels only where the batch asks for it."""
        return super().prediction_step(model, {**inputs, "return_loss": True}, *args, **kwargs)  # type: ignore[misc]

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the terms and the metrics of the loss to the lines of training."""
        if "loss" in logs:
            trainer: Any = self
            logs.update(self._means.take(trainer.accelerator))
        super().log(logs, *args, **kwargs)  # type: ignore[misc]

    # A callback's on_save would miss the checkpoint at SIGTERM, and the directories of a search's trials.
    def _save_checkpoint(self, model: nn.Module, trial: Any, *args: Any, **kwargs: Any) -> None:
        super()._save_checkpoint(model, trial, *args, **kwargs)  # type: ignore[misc]
        trainer: Any = self
        checkpoint = f"{PREFIX_CHECKPOINT_DIR}-{trainer.state.global_step}"
        self._save_state(Path(trainer._get_output_dir(trial=trial), checkpoint))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        self._save_state(Path(checkpoint_folder))  # before what is above uploads the folder
        super()._push_from_checkpoint(checkpoint_folder)  # type: ignore[misc]

    def _save_state(self, checkpoint: Path) -> None:
        trainer: Any = self
        criterion = self.driven_loss.criterion
        if trainer.args.should_save and loss_state.has_state(criterion):
            torch.save(loss_state.saved(self.chosen_loss.name, criterion), checkpoint / STATE_FILE)

    def _evaluated(self, features: dict[str, Any]) -> Tensor:
        images: Tensor = features["image_features"]
        if len(images) == 1 and rankloss.Gather().place[1] == 1:
            return images.new_zeros(())  # one pair has nothing to be told from
        entries = base_entries(self.evaluation_loss, **features)
        return Entries.of(self.evaluation_loss, entries).total

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()  # type: ignore[misc]
        trainer: Any = self
        columns, captions = trainer._signature_columns, self.chosen_loss.captions
        # What the loss takes and the model does not, which would be dropped as unused.
        of_loss = [] if captions is None else [f"{captions}_{name}" for name in columns]
        if self.chosen_loss.uses_teacher is not False:
            of_loss += embeddings.REFERENCES
        trainer._signature_columns = list(dict.fromkeys([*columns, *of_loss]))


class ContrastiveTrainer(ContrastiveTrainerMixin, transformers.Trainer):
    """``transformers.Trainer`` with a loss of rankloss's catalogue, see :class:`ContrastiveTrainerMixin`."""


class _Progress(TrainerCallback):
    """Tells the loss, and what is logged of it, where the Trainer stands."""

    def __init__(self, chosen: choice.Choice, means: _Means) -> None:
        self.chosen = chosen
        self.loss = chosen.loss
        self.means = means
        self._epoch: int | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Only now is the number of epochs known: ``max_steps`` and the data have a say in it."""
        epochs = state.num_train_epochs if has_length(kwargs["train_dataloader"]) else math.inf
        self._epoch = None
        self.means.clear()
        self.chosen.start(epochs, announce=state.is_world_process_zero)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """For losses that go by epochs."""
        # Counted: an epoch that a callback ended leaves a fraction.
        self._epoch = int(state.epoch) if self._epoch is None else self._epoch + 1
        if self.loss.clock.unit == "epoch":
            epochs = state.num_train_epochs
            tell(self.loss.criterion, "set_epoch", min(self._epoch + 1, epochs), epochs)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Once per optimizer step."""
        self.loss.clock.start_step(state.global_step + 1, state.max_steps)


def _without_rank_terms(criterion: nn.Module) -> nn.Module | None:
    """The base that a loss stands on, below every RankCLIP, whose terms grow; None for a loss without one."""
    base = getattr(criterion, "base", None)
    while isinstance(base, nn.Module) and hasattr(base, "base"):
        if not any(isinstance(part, rankloss.RankClipLoss) for part in base.modules()):
            break
        base = base.base
    return base


def _restore(chosen: choice.Choice, checkpoint: Path) -> None:
    path = checkpoint / STATE_FILE
    saved = torch.load(path, map_location="cpu", weights_only=True) if path.exists() else None
    found = loss_state.restore(chosen.name, chosen.loss.criterion, saved)
    if found:
        _logger.warning(
            "The loss %s has a state that belongs to the run, and %s holds %s: it starts anew",
            chosen.name,
            checkpoint,
            found,
        )


class _Means:
    """Means of a loss's entries since the last line of the log, each over the calls that gave it."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Begin anew."""
        self._sums: dict[str, Tensor] = {}
        self._calls: Counter[str] = Counter()

    def add(self, entries: Entries) -> None:
        """Take the entries of one call, without waiting for the device."""
        for name, value in {**entries.terms, **entries.metrics}.items():
            sum_ = self._sums.get(name)
            value = value.detach().float()
            self._sums[name] = value if sum_ is None else sum_ + value
            self._calls[name] += 1

    def take(self, accelerator: Any) -> dict[str, float]:
        """The means over all processes, and begin anew; every process has to call it."""
        if not self._sums:
            return {}
        means = torch.stack([sum_ / self._calls[name] for name, sum_ in self._sums.items()])
        values = accelerator.reduce(means, reduction="mean").tolist()
        taken = dict(zip(self._sums, values, strict=True))
        self.clear()
        return taken


def _refuse(trainer: Any) -> None:
    """Raise for what would train something else than what was asked for."""
    shards = trainer.accelerator.state
    deepspeed, fsdp = (getattr(shards, f"{name}_plugin", None) for name in ("deepspeed", "fsdp"))
    held = {
        "compute_loss_func": getattr(trainer, "compute_loss_func", None) is not None,
        "data_parallel": trainer.args.n_gpu > 1,
        "zero_3": deepspeed is not None and deepspeed.zero_stage == 3,
        "fsdp_1": fsdp is not None and getattr(fsdp, "fsdp_version", 1) == 1,
    }
    words = {"data_parallel": str(trainer.args.n_gpu)}
    refuse_run({name: words.get(name, name) for name, holds in held.items() if holds})
    embeddings.logit_scale(trainer.model)
