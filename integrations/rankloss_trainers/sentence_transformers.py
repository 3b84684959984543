"""RankCLIP's loss for sentence-transformers: ``SentenceTransformerTrainer`` and its conventions.

It takes the loss, and the callback that tells it where training stands::

    loss = RankClipLoss(model)
    trainer = SentenceTransformerTrainer(model, args, pairs, loss=loss, callbacks=[Progress(loss)])
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from sentence_transformers.base.losses import CachedLossMixin, has_static_embedding_input
from torch import Tensor, nn
from torch.utils.data import ConcatDataset
from transformers import TrainerCallback

import rankloss
from rankloss.losses import base_entries
from rankloss.options import RankOptions
from rankloss_trainers.driven_loss import DrivenLoss, Entries, LoggedTerms
from rankloss_trainers.logging import RankClipLog
from rankloss_trainers.refusals import check_criterion, refuse_run

__all__ = ["CachedRankClipLoss", "Progress", "RankClipLoss"]

_logger = logging.getLogger("rankloss_trainers")

_LARGEST_SCALE = 100.0  # CLIP's own limit of a learnable scale

Columns = Iterable[dict[str, Tensor]]


class RankClipLoss(nn.Module):
    r"""CLIP's symmetric InfoNCE plus RankCLIP's rank terms, of a dataset's two columns of pairs.

        L = L_base + λ1·cross + λ2·in,   features: the columns' embeddings, divided by their norms

    The first column's embeddings are the ``image_features`` of :class:`rankloss.RankClipLoss`, the second
    column's are the ``text_features``. The loss is the same with the columns swapped, unless an option names
    one of them (``fixed_reference``).

    - λ follows the optimizer steps: give the trainer the callback :class:`Progress`.
    - Under several processes each process's pairs are contrasted with those of all, exactly under DDP's
      averaging; this is the ``gather_across_devices`` of other losses.
    - Without gradients, as in evaluation, the loss is the base loss alone, which does not grow with λ. A last
      batch of one pair counts 0.

    Args:
        model: The ``SentenceTransformer`` that is trained.
        scale: The multiplier of the similarities, 1/temperature.
        learn_scale: Train the logarithm of the scale, as CLIP does, between 1 and 100 (or as far as ``scale``
            is beyond). The trainer's optimizer knows the parameters of a loss; :class:`Progress` keeps the
            value in checkpoints.
        output_dict: Return the terms by name, which the trainer adds up and logs, and with them the λ of the
            schedule and the raw terms, which it only logs. False returns their sum, which a loss that is
            wrapped in another (``MatryoshkaLoss``) has to.
        agreement_every: Log the batch's rank agreement at every so many optimizer steps, see
            :class:`rankloss_trainers.logging.RankClipLog`.
        **options: Of :class:`rankloss.RankClipLoss`: ``base``, ``schedule``, ``lambda_cross``, ``gather``, …

    Shapes:
        The embeddings are ``[N, D]`` per column and process; all entries are scalars.

    Raises:
        ValueError: for a scale that is not positive, a base with parameters, and as
            :class:`rankloss.RankClipLoss`; in ``forward`` unless there are two columns, and for a training
            batch of one pair (set ``dataloader_drop_last=True``).
        RuntimeError: in ``forward``, if :class:`Progress` does not tell the loss where training stands.

    References:
        "RankCLIP: Ranking-Consistent Language-Image Pretraining", ICCV 2025.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        scale: float = 20.0,
        learn_scale: bool = False,
        output_dict: bool = True,
        agreement_every: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        if not (math.isfinite(scale) and scale > 0):
            raise ValueError(f"scale must be positive and finite; got {scale!r}")
        self.model = model
        self.scale_limits = min(scale, 1.0), max(scale, _LARGEST_SCALE)
        log_scale = torch.tensor(math.log(scale))
        if learn_scale:
            self.logit_scale = nn.Parameter(log_scale)
            self.logit_scale.register_hook(_averaged)
        else:
            self.register_buffer("logit_scale", log_scale, persistent=False)
        self.output_dict = output_dict
        self.driven_loss = DrivenLoss(
            rankloss.RankClipLoss(**options), unit="step", evaluate=RankClipLog(agreement_every)
        )
        check_criterion(
            type(self).__name__,
            self.driven_loss.criterion,
            "the trainer would neither average over its processes nor keep in its checkpoints",
        )
        if options.get("schedule") == "constant" and agreement_every is None:
            self.driven_loss.clock.start_step(1, 1)  # it needs nobody to tell it the step

    def forward(self, sentence_features: Columns, labels: Tensor | None = None) -> Any:
        """The loss of a batch.

        Args:
            sentence_features: The tokenized columns, two of them.
            labels: Not used; the pairs are the labels.
        """
        embeddings = [self.model(column)["sentence_embedding"] for column in _two(sentence_features)]
        return self.compute_loss_from_embeddings(embeddings, labels)

    def compute_loss_from_embeddings(
        self,
        embeddings: list[Tensor],
        labels: Tensor | None = None,  # noqa: ARG002
    ) -> Any:
        """The loss of the two columns' embeddings, ``[N, D]`` each, of any norm."""
        if self.training and torch.is_grad_enabled():
            self._limit_the_scale()
        entries = self._entries(embeddings, self.logit_scale)
        return LoggedTerms(*entries) if self.output_dict else entries.total

    @property
    def learns_scale(self) -> bool:
        """Whether the scale is trained."""
        return isinstance(self.logit_scale, nn.Parameter)

    def get_config_dict(self) -> dict[str, Any]:
        """What a model card says of the loss."""
        criterion: Any = self.driven_loss.criterion
        schedule = criterion.schedule
        default, options = RankOptions(), criterion.consistency.options
        changed = {name: value for name, value in vars(options).items() if value != getattr(default, name)}
        return {
            "scale": round(self.logit_scale.exp().item(), 6),
            "learn_scale": self.learns_scale,
            "base": type(criterion.base).__name__,
            "schedule": getattr(schedule, "__name__", repr(schedule)),
            **{name: getattr(criterion, name) for name in ("lambda_cross", "lambda_in", "normalizer")},
            **changed,
        }

    @property
    def citation(self) -> str:
        """BibTeX for model cards."""
        return """
@inproceedings{rankclip2025,
    title={{RankCLIP}: Ranking-Consistent Language-Image Pretraining},
    author={{The RankCLIP authors}},
    booktitle={IEEE/CVF International Conference on Computer Vision (ICCV)},
    year={2025}
}
"""

    def _entries(self, embeddings: list[Tensor], log_scale: Tensor) -> Entries:
        images, texts = (_normalized(x) for x in embeddings)
        features = {"image_features": images, "text_features": texts, "logit_scale": log_scale.exp()}
        criterion: Any = self.driven_loss.criterion
        if not torch.is_grad_enabled():
            if len(images) < criterion.consistency.gather.min_pairs:
                return Entries({"contrastive_loss": images.new_zeros(())}, {})  # a softmax of one class
            terms, _ = Entries.of(criterion.base, base_entries(criterion.base, **features))
            return Entries(terms, {})
        if not self.driven_loss.clock.started:
            raise RuntimeError(
                f"{type(self).__name__} does not know where training stands: give the trainer "
                "callbacks=[Progress(loss)], from rankloss_trainers.sentence_transformers"
            )
        entries: Entries = self.driven_loss(**features)
        return entries

    @torch.no_grad()
    def _limit_the_scale(self) -> None:
        if self.learns_scale:
            self.logit_scale.clamp_(*map(math.log, self.scale_limits))


class CachedRankClipLoss(RankClipLoss):
    """:class:`RankClipLoss` of any batch size, in the memory of one mini-batch (GradCache).

    The batch is embedded in mini-batches without gradients; the loss of the whole batch gives the gradients
    of the embeddings; each mini-batch is embedded again and takes its part of them. Value and gradients are
    those of :class:`RankClipLoss`, for a second forward pass's time.

    Args:
        model: The ``SentenceTransformer`` that is trained, not one that begins with a ``StaticEmbedding``.
        mini_batch_size: Texts, or images, that are embedded at a time.
        **options: As :class:`RankClipLoss`.

    Raises:
        ValueError: for a model whose inputs cannot be split, a mini-batch size below 1, and as
            :class:`RankClipLoss`.

    References:
        "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup", RepL4NLP 2021.
    """

    uses_gradient_cache = True  # MatryoshkaLoss then decorates calculate_loss

    def __init__(self, model: nn.Module, *, mini_batch_size: int = 32, **options: Any) -> None:
        if has_static_embedding_input(model):
            raise ValueError(
                "the inputs of a StaticEmbedding cannot be split into mini-batches; use RankClipLoss"
            )
        if mini_batch_size < 1:
            raise ValueError(f"mini_batch_size must be at least 1; got {mini_batch_size!r}")
        super().__init__(model, **options)
        self.mini_batch_size = mini_batch_size
        self._calculated: list[Entries] = []

    def forward(self, sentence_features: Columns, labels: Tensor | None = None) -> Any:
        """As :meth:`RankClipLoss.forward`."""
        if self.training and torch.is_grad_enabled():
            self._limit_the_scale()
        self._calculated = []
        grad_cache = _GradCache(self)
        total: Tensor = grad_cache.forward_cached(_two(sentence_features), labels)
        if grad_cache.value.requires_grad:  # adds 0, and the gradient of the scale, which GradCache detaches
            total = total + (grad_cache.value - grad_cache.value.detach())
        if not self.output_dict:
            return total
        if len(self._calculated) != 1:
            raise ValueError(
                f"the loss was calculated {len(self._calculated)} times: inside of another loss, give "
                "output_dict=False"
            )
        ((terms, metrics),) = self._calculated
        if torch.is_grad_enabled():
            name = next(iter(terms))
            terms = {**terms, name: terms[name] + (total - total.detach())}  # the gradient is the total's
        return LoggedTerms(terms, metrics)

    def calculate_loss(
        self,
        reps: list[list[Tensor]],
        labels: Tensor | None = None,  # noqa: ARG002
        *,
        with_backward: bool = False,
    ) -> Tensor:
        """The loss of embeddings that come in mini-batches; what GradCache asks of a loss."""
        log_scale = self.logit_scale.detach().requires_grad_(self.learns_scale and with_backward)
        terms, metrics = self._entries([torch.cat(column) for column in reps], log_scale)
        total = Entries(terms, metrics).total
        if with_backward:
            total.backward()
            total = total.detach()
        if log_scale.grad is not None:
            # Its backward pass is the trainer's, so that the factors of trainer and MatryoshkaLoss apply.
            total = total + log_scale.grad * (self.logit_scale - self.logit_scale.detach())
        self._calculated.append(Entries({name: term.detach() for name, term in terms.items()}, metrics))
        return total

    def get_config_dict(self) -> dict[str, Any]:
        """What a model card says of the loss."""
        return {**super().get_config_dict(), "mini_batch_size": self.mini_batch_size}

    @property
    def citation(self) -> str:
        """BibTeX for model cards."""
        return f"""{super().citation}
@inproceedings{{gradcache2021,
    title={{Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup}},
    author={{{{The GradCache authors}}}},
    booktitle={{Workshop on Representation Learning for NLP (RepL4NLP)}},
    year={{2021}}
}}
"""


class _GradCache(CachedLossMixin):
    """GradCache's forward pass, which detaches the value of the loss; here it is kept."""

    value: Tensor

    def __init__(self, loss: CachedRankClipLoss) -> None:
        self.model, self.mini_batch_size = loss.model, loss.mini_batch_size
        self._calculate_loss = loss.calculate_loss  # as a MatryoshkaLoss may have decorated it

    def calculate_loss(self, *args: Any, **kwargs: Any) -> Tensor:
        """The loss's own."""
        self.value = self._calculate_loss(*args, **kwargs)
        return self.value


class Progress(TrainerCallback):
    """Tells losses where a sentence-transformers (or transformers) Trainer stands, at each optimizer step.

    A learnable scale is no part of the model, so checkpoints do not have it: the callback keeps it in the
    trainer's own state, gives it back to a resumed run, and logs a warning if the checkpoint has none.

    Args:
        *losses: The losses that the trainer was given, or losses that hold them.

    Raises:
        ValueError: None of the losses is rankloss's; when training begins, if another ``Progress`` of the
            trainer also has a loss that learns its scale, and for several datasets on several processes,
            unless the losses have ``gather=False``.
    """

    def __init__(self, *losses: nn.Module) -> None:
        self._losses = [x for loss in losses for x in loss.modules() if isinstance(x, RankClipLoss)]
        if not self._losses:
            given = ", ".join(type(loss).__name__ for loss in losses) or "none"
            raise ValueError(f"losses must hold a RankClipLoss or CachedRankClipLoss; got {given}")

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Restore the scales of a resumed run, and put them into every checkpoint."""
        if isinstance(getattr(kwargs.get("train_dataloader"), "dataset", None), ConcatDataset):
            self._check_gathers_nothing()
        learning = [loss for loss in self._losses if loss.learns_scale]
        if not learning:
            return
        kept = state.stateful_callbacks.get(_KEY)
        if isinstance(kept, _Scales):
            raise ValueError("give all losses that learn their scale to one Progress: Progress(loss, other)")
        if kept is not None:
            for loss, scale in zip(learning, kept["attributes"]["logit_scales"], strict=True):
                nn.init.constant_(loss.logit_scale, scale)
        elif state.global_step > 0:
            _logger.warning(
                "The checkpoint of step %d holds no learned scale: it starts anew at %s",
                state.global_step,
                ", ".join(f"{loss.logit_scale.exp().item():g}" for loss in learning),
            )
        state.stateful_callbacks[_KEY] = _Scales(learning)

    def _check_gathers_nothing(self) -> None:
        for loss in self._losses:
            criterion: Any = loss.driven_loss.criterion
            if criterion.consistency.gather.place[1] > 1:
                refuse_run({"several_datasets": ""})

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Once per optimizer step."""
        for loss in self._losses:
            loss.driven_loss.clock.start_step(state.global_step + 1, state.max_steps)


_KEY = "rankloss_trainers.sentence_transformers.Progress"


class _Scales:
    """The learned scales as an entry of the trainer's state, read when the trainer writes it.

    An ``ExportableState`` would not do: with ``restore_callback_states_from_checkpoint`` the trainer calls
    its class with arguments from JSON, which cannot hold the losses.
    """

    def __init__(self, losses: list[RankClipLoss]) -> None:
        self._losses = losses

    def __deepcopy__(self, memo: Any) -> dict[str, Any]:
        """The entry that is written: the trainer's state is copied by ``dataclasses.asdict`` first."""
        return {"args": {}, "attributes": {"logit_scales": [x.logit_scale.item() for x in self._losses]}}


def _two(sentence_features: Columns) -> list[dict[str, Tensor]]:
    columns = list(sentence_features)
    if len(columns) != 2:
        raise ValueError(f"the dataset must have two columns of pairs; got {len(columns)}")
    return columns


def _normalized(x: Tensor) -> Tensor:
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)


def _averaged(gradient: Tensor) -> Tensor:
    """The mean over the processes: DDP averages the model's gradients, and the loss is no part of it."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return gradient
    total = gradient.clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()
