"""Hugging Face's Trainer with a loss of the catalogue.

    >>> from rankloss_trainers.transformers import ContrastiveTrainer
    >>> trainer = ContrastiveTrainer(model, args, train_dataset=pairs, loss="rankclip")  # doctest: +SKIP

The model is any whose output has ``image_embeds`` and ``text_embeds`` and that holds its ``logit_scale`` as a
logarithm (CLIP, ChineseCLIP, AltCLIP, VisionTextDualEncoder, …) or its ``temperature`` (ALIGN).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import TrainerCallback

import rankloss
from rankloss.losses import base_entries
from rankloss_trainers import catalog, state
from rankloss_trainers.clock import tell
from rankloss_trainers.driven_loss import DrivenLoss, Entries, call_alone
from rankloss_trainers.logging import RankClipLog

__all__ = ["ContrastiveTrainer", "ContrastiveTrainerMixin"]

_logger = logging.getLogger("rankloss_trainers")


class ContrastiveTrainerMixin:
    """Lets a subclass of ``transformers.Trainer`` train with a loss of rankloss's catalogue.

    Put it before the Trainer: ``class MyTrainer(ContrastiveTrainerMixin, transformers.Trainer)``.

    - λ follows the optimizer steps, ``global_step`` of ``max_steps``, and is right after a resume.
    - Each process's pairs are contrasted with those of all processes, exactly under DDP's averaging.
    - The loss is a mean over the pairs of a forward pass. With gradient accumulation the means are averaged,
      and pairs are contrasted within a micro-batch only.
    - Evaluation gives the base loss without the rank terms, which does not grow with λ; so
      ``load_best_model_at_end`` compares like with like. A last batch of one pair counts 0.
    - The log shows each term, λ, and what else the loss gives, averaged since the last line.

    Args:
        *args: What the Trainer takes.
        loss: A loss as the catalogue names it, or a module with the forward convention of open_clip's losses,
            whose ``base``, if it has one, is what evaluation gives.
        loss_options: Options of the named loss, by their names without prefix; see ``LossEntry.options``.
        gather: The :class:`rankloss.Gather` of the run; None for the default process group, exactly.
        **kwargs: What the Trainer takes.

    Raises:
        TypeError: for an option that the loss does not have.
        ValueError: for options that cannot work, and for a set-up that would train something else:
            DataParallel, a ``compute_loss_func``, or a model without a scale.
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
        trainer.label_names = []  # the pairs are the labels; else evaluation would give no loss
        gather = rankloss.Gather() if gather is None else gather
        base = rankloss.ClipLoss(gather=gather)
        if isinstance(loss, str):
            self.driven_loss = _build(loss, loss_options or {}, base, gather, trainer.args)
        elif loss_options:
            raise TypeError("loss_options belong to a loss that is given by its name; the module has its own")
        else:
            evaluate = RankClipLog() if isinstance(loss, rankloss.RankClipLoss) else call_alone
            self.driven_loss = DrivenLoss(loss, unit="step", evaluate=evaluate)
        if state.has_state(self.driven_loss.criterion):
            self.driven_loss.to(trainer.args.device)
            _logger.warning("The loss has a state that checkpoints do not hold: a resumed run starts it anew")
        own_base = getattr(self.driven_loss.criterion, "base", None)
        self.evaluation_loss = base if own_base is None else own_base
        self._means = _Means()
        trainer.add_callback(_Progress(self.driven_loss))

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,  # noqa: ARG002 (counts labels, which pairs do not have)
    ) -> Any:
        """The loss of a batch; in evaluation the base loss."""
        trainer: Any = self
        # The model's own loss is of this process alone, and would be computed for nothing.
        outputs = model(**{name: value for name, value in inputs.items() if name != "return_loss"})
        features = _features(outputs)
        features["logit_scale"] = logit_scale(trainer.accelerator.unwrap_model(model))
        if model.training:
            entries: Entries = self.driven_loss(**features)
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

    def _evaluated(self, features: dict[str, Any]) -> Tensor:
        images: Tensor = features["image_features"]
        if len(images) == 1 and rankloss.Gather().place[1] == 1:
            return images.new_zeros(())  # the cross-entropy of one class
        entries = base_entries(self.evaluation_loss, **features)
        return Entries(entries, {}).total


class ContrastiveTrainer(ContrastiveTrainerMixin, transformers.Trainer):
    """``transformers.Trainer`` with a loss of rankloss's catalogue, see :class:`ContrastiveTrainerMixin`."""


class _Progress(TrainerCallback):
    """Tells the loss where the Trainer stands."""

    def __init__(self, loss: DrivenLoss) -> None:
        self.loss = loss

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """For losses that go by epochs."""
        if self.loss.clock.unit == "epoch":
            epochs = math.ceil(args.num_train_epochs)
            tell(self.loss.criterion, "set_epoch", min(int(state.epoch) + 1, epochs), epochs)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Once per optimizer step."""
        self.loss.clock.start_step(state.global_step + 1, state.max_steps)


class _Means:
    """Means of a loss's entries since the last line of the log."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._calls = 0

    def add(self, entries: Entries) -> None:
        """Take the entries of one call, without waiting for the device."""
        self._calls += 1
        for name, value in {**entries.terms, **entries.metrics}.items():
            sum_ = self._sums.get(name)
            value = value.detach().float()
            self._sums[name] = value if sum_ is None else sum_ + value

    def take(self, accelerator: Any) -> dict[str, float]:
        """The means over all processes, and begin anew; every process has to call it."""
        if not self._calls:
            return {}
        means = torch.stack(list(self._sums.values())) / self._calls
        values = accelerator.reduce(means, reduction="mean").tolist()
        names, self._sums, self._calls = list(self._sums), {}, 0
        return dict(zip(names, values, strict=True))


def logit_scale(model: Any) -> Tensor:
    """The multiplier of the similarities, from the parameter of a model.

    Raises:
        ValueError: The model has none, or this process does not hold it whole.
    """
    for name in ("logit_scale", "temperature"):
        parameter = getattr(model, name, None)
        if isinstance(parameter, Tensor):
            break
    else:
        raise ValueError(f"{type(model).__name__} has neither a logit_scale nor a temperature")
    whole: Tensor = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
    if whole.numel() != 1:
        raise ValueError(
            f"{name} has {whole.numel()} elements on this process: ZeRO stage 3 and FSDP with flat "
            "parameters do not show it outside the forward pass; use ZeRO stage 2 or FSDP version 2"
        )
    scale = whole.reshape(())
    return scale.exp() if name == "logit_scale" else 1 / scale


def _features(outputs: Any) -> dict[str, Any]:
    names = {"image_features": "image_embeds", "text_features": "text_embeds"}
    missing = [name for name in names.values() if getattr(outputs, name, None) is None]
    if missing:
        given = ", ".join(outputs) if isinstance(outputs, Mapping) else type(outputs).__name__
        raise ValueError(f"the model's output has no {' and no '.join(missing)}, got {given}")
    return {feature: getattr(outputs, name) for feature, name in names.items()}


def _refuse(trainer: Any) -> None:
    """Raise for what would train something else than what was asked for."""
    if trainer.compute_loss_func is not None:
        raise ValueError("compute_loss_func is ignored by this trainer; give the loss as `loss`")
    if trainer.args.n_gpu > 1:
        raise ValueError(
            f"DataParallel over {trainer.args.n_gpu} GPUs contrasts each GPU's pairs alone; "
            "start the script with torchrun or accelerate launch"
        )
    logit_scale(trainer.model)
    if getattr(trainer.model, "logit_bias", None) is not None:
        raise ValueError(
            f"{type(trainer.model).__name__} has a logit_bias, which a softmax loss does not train"
        )


def _build(
    name: str, given: Mapping[str, Any], base: nn.Module, gather: rankloss.Gather, args: Any
) -> DrivenLoss:
    found = catalog.candidates()
    if name not in found:
        raise ValueError(f"loss must be one of {', '.join(map(repr, found))}, or a module; got {name!r}")
    entry = found[name].load()
    if entry.is_former:
        raise ValueError(f"{name} ({found[name].package}) is written for open_clip's arguments alone")
    options = {option.key: option.default for option in entry.options}
    if "schedule_unit" in options:
        options["schedule_unit"] = "step"  # the number of epochs may be a fraction
    unknown = given.keys() - options.keys()
    if unknown:
        raise TypeError(f"{name} has no option {sorted(unknown)[0]!r}; it has {', '.join(options)}")
    options.update(given)
    reason = entry.refuse(options, gather)
    if entry.only_sigmoid:
        reason = f"{name} needs a trainer with a sigmoid loss of its own: {entry.only_sigmoid}"
    if reason is None and entry.caption_key(options) is not None:
        reason = f"{name} needs a second caption of each image, which this trainer does not read"
    if reason is None and entry.uses_teacher(options):
        reason = f"{name} ranks by a teacher's features, which this trainer does not have"
    if reason is not None:
        raise ValueError(reason)
    criterion = entry.build(base, options, gather)
    if args.process_index == 0:
        package = found[name].package or f"rankloss {rankloss.__version__}"
        text = entry.describe(options, args.num_train_epochs)
        _logger.info("Loss: %s (%s)%s", name, package, text and f", {text}")
    return DrivenLoss(
        criterion,
        unit=entry.unit if isinstance(entry.unit, str) else entry.unit(options, args.num_train_epochs),
        first_call=entry.first_call,
        evaluate=call_alone if entry.log is None else entry.log(options),
    )
