"""RankCLIP's loss for sentence-transformers: ``SentenceTransformerTrainer`` and its conventions.

It takes the loss, and the callback that tells it where training stands::

    loss = RankClipLoss(model)
    trainer = SentenceTransformerTrainer(model, args, pairs, loss=loss, callbacks=[Progress(loss)])
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from sentence_transformers.base.losses import CachedLossMixin, has_static_embedding_input
from torch import Tensor, nn
from torch.utils.data import ConcatDataset
from transformers import TrainerCallback

import rankloss
from rankloss.options import check_count
from rankloss_features.binding import taught
from rankloss_features.folder import Features
from rankloss_trainers.clock import tell
from rankloss_trainers.driven_loss import Entries, LoggedTerms, evaluation
from rankloss_trainers.logging import RankClipLog
from rankloss_trainers.refusals import check_criterion, refuse_run

__all__ = ["CachedRankClipLoss", "Progress", "RankClipLoss"]

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
        output_dict: Return the terms by name, which the trainer adds up and logs, and with them the λ of the
            schedule and the raw terms, which it only logs. False returns their sum, which a loss that is
            wrapped in another (``MatryoshkaLoss``) has to.
        reference_features: A folder of ``rankloss features`` that the data are bound to, by
            ``rankloss_features.bind(…, column="label")``: the lists are ranked by this teacher.
        agreement_every: Log the batch's rank agreement at every so many optimizer steps, see
            :class:`rankloss_trainers.logging.RankClipLog`.
        **options: Of :class:`rankloss.RankClipLoss`: ``base``, ``schedule``, ``lambda_cross``, ``gather``, …

    Shapes:
        The embeddings are ``[N, D]`` per column and process; all entries are scalars.

    Raises:
        ValueError: for a base with parameters, and as :class:`rankloss.RankClipLoss`; in ``forward`` unless
            there are two columns, for a scale that is not positive, and for a training batch of one pair (set
            ``dataloader_drop_last=True``).
        RuntimeError: in ``forward``, if :class:`Progress` does not tell the loss where training stands.

    References:
        "RankCLIP: Ranking-Consistent Language-Image Pretraining", ICCV 2025.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        scale: float = 20.0,
        output_dict: bool = True,
        agreement_every: int | None = None,
        reference_features: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.reference_features = None if reference_features is None else Features(reference_features).check()
        self.model = model
        self.scale = scale
        self.output_dict = output_dict
        self.criterion = rankloss.RankClipLoss(**options)
        check_criterion(type(self).__name__, self.criterion)
        self.log = RankClipLog(agreement_every, raw=False)
        self.step = 0  # counted from 0

    def set_progress(self, step: int, total_steps: int) -> None:
        """Optimizer step ``step`` of ``total_steps`` begins, counted from 1; :class:`Progress` calls this."""
        tell(self.criterion, "set_progress", step, total_steps)
        self.step = step - 1

    def forward(self, sentence_features: Columns, labels: Tensor | None = None) -> Any:
        """The loss of a batch.

        Args:
            sentence_features: The tokenized columns, two of them.
            labels: A teacher's embeddings in the format of ``EmbedDistillLoss``, ``[N, 2, D']`` or
                ``[N, D']`` for both columns, by which the lists are ranked; or the column ``label`` of data
                that are bound to a folder of them. Others are not used: the pairs are the labels.
        """
        embeddings = [self.model(column)["sentence_embedding"] for column in _two(sentence_features)]
        entries = self._entries(embeddings, labels)
        return LoggedTerms(*entries) if self.output_dict else entries.total

    def _entries(self, embeddings: list[Tensor], labels: Tensor | None) -> Entries:
        images, texts = (
            F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1) for x in embeddings
        )
        features: dict[str, Any] = {"image_features": images, "text_features": texts}
        features["logit_scale"] = self.scale
        if not torch.is_grad_enabled():
            return evaluation(self.criterion.base, self.criterion.consistency.gather, **features)
        features.update(taught(self.reference_features, labels))
        return Entries.of(self.criterion, self.log(self.criterion, self.step, **features))


class CachedRankClipLoss(CachedLossMixin, RankClipLoss):
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

    def __init__(self, model: nn.Module, *, mini_batch_size: int = 32, **options: Any) -> None:
        if has_static_embedding_input(model):
            raise ValueError(
                "model begins with a StaticEmbedding, whose inputs cannot be split into mini-batches; "
                "use RankClipLoss"
            )
        super().__init__(model, **options)
        self.mini_batch_size = check_count("mini_batch_size", mini_batch_size)
        self._calculated: list[Entries] = []

    def forward(self, sentence_features: Columns, labels: Tensor | None = None) -> Any:
        """As :meth:`RankClipLoss.forward`."""
        self._calculated = []
        total = self.forward_cached(_two(sentence_features), labels)
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
        labels: Tensor | None = None,
        *,
        with_backward: bool = False,
    ) -> Tensor:
        """The loss of embeddings that come in mini-batches; what GradCache asks of a loss."""
        entries = self._entries([torch.cat(column) for column in reps], labels)
        total = entries.total
        if with_backward:
            total.backward()
        terms = {name: term.detach() for name, term in entries.terms.items()}
        self._calculated.append(Entries(terms, entries.metrics))
        return total.detach()


class Progress(TrainerCallback):
    """Tells losses where a sentence-transformers (or transformers) Trainer stands, at each optimizer step.

    Args:
        *losses: The losses that the trainer was given, or losses that hold them.

    Raises:
        ValueError: None of the losses is rankloss's; when training begins, for several datasets on several
            processes, unless the losses have ``gather=False``.
    """

    def __init__(self, *losses: nn.Module) -> None:
        self._losses = [x for loss in losses for x in loss.modules() if isinstance(x, RankClipLoss)]
        if not self._losses:
            given = ", ".join(type(loss).__name__ for loss in losses) or "none"
            raise ValueError(f"losses must hold a RankClipLoss or CachedRankClipLoss; got {given}")

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Refuse what would contrast one dataset with another."""
        several = isinstance(getattr(kwargs.get("train_dataloader"), "dataset", None), ConcatDataset)
        if several and any(loss.criterion.consistency.gather.place[1] > 1 for loss in self._losses):
            refuse_run({"several_datasets": ""})

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Once per optimizer step."""
        for loss in self._losses:
            loss.set_progress(state.global_step + 1, state.max_steps)


def _two(sentence_features: Columns) -> list[dict[str, Tensor]]:
    columns = list(sentence_features)
    if len(columns) != 2:
        raise ValueError(
            f"sentence_features must be the two columns of a dataset of pairs; got {len(columns)}"
        )
    return columns
