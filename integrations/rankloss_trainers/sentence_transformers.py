"""Losses of the catalogue for sentence-transformers: ``SentenceTransformerTrainer`` and its conventions.

It takes the loss, and the callback that tells it where training stands::

    loss = ContrastiveLoss(model, "rankclip", {"top_k": 8})
    trainer = SentenceTransformerTrainer(model, args, pairs, loss=loss, callbacks=[Progress(loss)])
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import ConcatDataset

from rankloss.distributed import GatherOption
from rankloss.options import check_count
from rankloss_features.binding import taught
from rankloss_features.data import Table
from rankloss_features.folder import NAMES, Features, hash_of_pair
from rankloss_trainers.cached import embedding_in
from rankloss_trainers.clip_ids import CAPTIONS
from rankloss_trainers.declared import Options
from rankloss_trainers.extras import extra
from rankloss_trainers.pair_ids import check_column, hash_tokens
from rankloss_trainers.run_options import RunOptions
from rankloss_trainers.runtime import Entries, Host, LoggedTerms, Runtime, read_losses

with extra("sentence-transformers"):
    import datasets as datasets
    from accelerate.utils import extract_model_from_parallel  # type: ignore[import-untyped]
    from sentence_transformers.base.losses import has_static_embedding_input

    from rankloss_trainers.transformers.progress import Progress as TrainerProgress

__all__ = ["ContrastiveLoss", "Progress"]

HOST = Host(
    name="sentence-transformers",
    biased="a trainer with a sigmoid loss",
    teacher="give labels, [N, 2, D'], or teacher=FOLDER and data that are bound to it",
    progress="give the trainer callbacks=[Progress(loss)]",
    serves=("ids", "folder"),
    instead={"lists": "RankedListsLoss of rankloss_trainers.graded.sentence_transformers trains them"},
)

Columns = Iterable[dict[str, Tensor]]


class EmbeddingLoss(nn.Module):
    """A loss of the columns' embeddings.

    Args:
        model: The ``SentenceTransformer`` that is trained.
        scale: The multiplier of the similarities.
        mini_batch_size: Embed each column in mini-batches of so many rows at most; None embeds it at once.

    Raises:
        ValueError: for a mini-batch size below 1, and mini-batches of a model that begins with a
            ``StaticEmbedding``.
    """

    def __init__(self, model: nn.Module, scale: float, mini_batch_size: int | None) -> None:
        super().__init__()
        if mini_batch_size is not None:
            check_count("mini_batch_size", mini_batch_size)
            if has_static_embedding_input(model):
                raise ValueError("mini_batch_size cannot split the inputs of a StaticEmbedding")
        self.model, self.scale, self.mini_batch_size = model, scale, mini_batch_size

    def embedded(self, column: dict[str, Tensor]) -> Tensor:
        """The embeddings of a column, divided by their norms, in float32 at least."""
        inner, name = extract_model_from_parallel(self.model), "sentence_embedding"
        if self.mini_batch_size is not None and type(inner[0].forward).__name__ == "TransformerDecorator":
            raise ValueError(
                "mini_batch_size must be None in AdaptiveLayerLoss and Matryoshka2dLoss, which keep every "
                f"layer of the whole batch; got {self.mini_batch_size}"
            )
        with embedding_in(inner, self.mini_batch_size, lambda output: {name: output[name]}):
            embeddings: Tensor = self.model(column)[name]
        return F.normalize(embeddings.to(torch.promote_types(embeddings.dtype, torch.float32)), dim=-1)

    def get_config_dict(self) -> dict[str, Any]:
        """The arguments, for the model card."""
        return {"scale": self.scale, "mini_batch_size": self.mini_batch_size}


class ContrastiveLoss(EmbeddingLoss):
    r"""A loss of the catalogue, of a dataset's two columns of pairs.

        L(V, T, s),   V, T: the columns' embeddings, divided by their norms,   s: the scale

    The first column's embeddings are the ``image_features`` of the loss, the second column's are the
    ``text_features``. With a folder of a teacher's features the columns may come in either order: the column
    of the folder's images gives the ``image_features``.

    - A schedule follows the optimizer steps: give the trainer the callback :class:`Progress`.
    - Under several processes each process's pairs are contrasted with those of all, exactly under DDP's
      averaging; this is the ``gather_across_devices`` of other losses.
    - Without gradients, as in evaluation, the loss is the base loss alone, which does not grow with λ. A last
      batch of one pair counts 0.

    Args:
        model: The ``SentenceTransformer`` that is trained.
        loss: The name of a loss of the catalogue, or a module with the forward convention of open_clip's
            losses.
        options: Options of a named loss by their names without prefix; ``rankloss losses NAME`` lists them.
        teacher: A folder of ``rankloss features`` that the data are bound to (:func:`rankloss_features.bind`
            with ``column="label"``). None: the labels, where they are a teacher's embeddings; ``"given"``
            needs these.
        schedule_unit: ``"epoch"`` or ``"step"``: the unit of λ's schedule; ``"auto"`` is the step in runs of
            fewer than ten epochs.
        agreement_every: Log the batch's rank agreement at every so many optimizer steps.
        scale: The multiplier of the similarities, 1/temperature.
        mini_batch_size: Embed each column in mini-batches of so many rows at most, in the memory of one, for
            a second forward pass's time (GradCache). Loss and gradients are those of the whole batch. By
            default a column is embedded at once.
        output_dict: Return the terms by name, which the trainer adds up and logs, and with them λ and other
            values, which it only logs. False returns their sum, which a loss that is wrapped in another
            (``MatryoshkaLoss``) has to. A raw term is logged from the first line on of whose steps all have λ
            above 0.
        gather: The gathering of a named loss, see :class:`rankloss.Gather`.

    Attributes:
        metrics: The names of the metrics until the log's next line; None before its first step.

    Shapes:
        The embeddings are ``[N, D]`` per column and process; all entries are scalars.

    Raises:
        TypeError: for an option that the loss does not have, and for options beside a module.
        ValueError: for an unknown loss, for options that exclude each other, for a loss with parameters, a
            state, or a second caption, which this trainer does not serve, and for mini-batches of a model
            that begins with a ``StaticEmbedding``; in ``forward`` unless there are two columns, for a scale
            that is not positive, and for a teacher that is missing or not used.
        RuntimeError: in ``forward``, if :class:`Progress` does not tell the loss where training stands.

    References:
        Cached gradients: "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup", RepL4NLP
        2021.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: str | nn.Module = "rankclip",
        options: Options | None = None,
        *,
        teacher: str | None = None,
        schedule_unit: Literal["auto", "epoch", "step"] = "auto",
        agreement_every: int | None = None,
        scale: float = 20.0,
        mini_batch_size: int | None = None,
        output_dict: bool = True,
        gather: GatherOption = None,
    ) -> None:
        super().__init__(model, scale, mini_batch_size)
        self.output_dict = output_dict
        of_run = RunOptions(teacher=teacher, schedule_unit=schedule_unit, agreement_every=agreement_every)
        self.run = Runtime(HOST, read_losses(loss, options), of_run, gather=gather)
        self.metrics: tuple[str, ...] | None = None
        self.image_column = None if self.run.features is not None else 0
        if self.run.id_key not in (None, CAPTIONS, "label"):
            text = f"key must be {CAPTIONS} or label, the columns that a loss is given"
            raise ValueError(f"{text}; got {self.run.id_key!r}")

    def forward(self, sentence_features: Columns, labels: Tensor | None = None) -> Any:
        """The loss of a batch.

        Args:
            sentence_features: The tokenized columns, two of them.
            labels: A teacher's embeddings in the format of ``EmbedDistillLoss``, ``[N, 2, D']`` in the order
                of the columns or ``[N, D']`` for both; or the column ``label`` of data that are bound to a
                folder of them. Others are not used: the pairs are the labels.
        """
        columns = list(sentence_features)
        if len(columns) != 2:
            text = "; train a positive and its negatives by RankedListsLoss(model, "
            text += "rankloss.RankedLists(in_batch_negatives=True)) of rankloss_trainers.graded"
            raise ValueError(
                f"sentence_features must be a dataset's two columns of pairs; got {len(columns)}"
                + text * (len(columns) > 2)
            )
        columns = columns[::-1] if self.image_column else columns
        features = dict(zip(NAMES, map(self.embedded, columns), strict=True))
        entries = self._entries(features, labels, columns[1])
        return LoggedTerms(entries.terms, self._logged(entries)) if self.output_dict else entries.total

    def _logged(self, entries: Entries) -> dict[str, Tensor]:
        """The metrics of this interval of the log; the trainer divides their sums by all of its steps.

        One that appears later waits for the next interval, and NaN stands for one that ends: the trainer
        takes the average so far in its place.
        """
        if not entries.metrics:  # in an evaluation
            return {}
        if self.metrics is None:
            self.metrics = tuple(entries.metrics)
        return {
            name: entries.metrics[name] if name in entries.metrics else entries.total.detach() * math.nan
            for name in self.metrics
        }

    def _entries(
        self, features: dict[str, Tensor], labels: Tensor | None, texts: dict[str, Tensor]
    ) -> Entries:
        if not torch.is_grad_enabled():
            return self.run.evaluate(**features, logit_scale=self.scale)
        if self.image_column is None:
            raise RuntimeError(f"the columns were not compared with the folder's: {HOST.progress}")
        if labels is not None and labels.is_floating_point() and is_cut(labels):
            raise ValueError(
                f"MatryoshkaLoss cut the teacher's labels to {labels.shape[-1]} of {labels.stride(-2)} "
                "dimensions: bind the data to a folder of them, and give it as teacher"
            )
        key, more = self.run.id_key, taught(self.run.features, labels)
        if key == CAPTIONS:
            tokenizer = getattr(extract_model_from_parallel(self.model)[0], "tokenizer", None)
            more["pair_ids"] = hash_tokens(texts, tokenizer)
        elif key is not None:
            if labels is None:
                raise ValueError("clip-ids needs a column label of integers, the ids of the pairs")
            more["pair_ids"] = labels
        entries: Entries = self.run(**features, logit_scale=self.scale, **more)
        return entries

    def get_config_dict(self) -> dict[str, Any]:
        """The arguments, for the model card."""
        options = {loss.name: loss.values for loss in self.run.losses}
        return {"loss": self.run.name, "options": options, **super().get_config_dict()}

    @property
    def citation(self) -> str:
        """The BibTeX entry of the loss's paper, for the model card."""
        return "\n".join(loss.named.citation for loss in self.run.losses if loss.named.citation)


def is_cut(labels: Tensor) -> bool:
    """True for a view of the first numbers of each row."""
    return labels.dim() > 1 and labels.stride(-2) > labels.shape[-1]


class Progress(TrainerProgress):
    """Tells losses where a ``SentenceTransformerTrainer`` stands, and compares its data with their folders.

    Args:
        *losses: The losses that the trainer was given, or losses that hold them.

    Raises:
        ValueError: None of the losses is a :class:`ContrastiveLoss`; when training begins, for a last batch
            of one pair, for several datasets on several processes, unless the losses have ``gather=False``,
            for a label that all pairs share and that is their id, and for columns that are not those of the
            folder of a teacher's features.
    """

    def __init__(self, *losses: nn.Module) -> None:
        super().__init__(*losses)
        self._losses = [x for loss in losses for x in loss.modules() if isinstance(x, ContrastiveLoss)]

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check the data."""
        data = kwargs["train_dataloader"].dataset
        parts = data.datasets if isinstance(data, ConcatDataset) else [data]
        for loss in self._losses:
            if len(parts) > 1 and loss.run.gather.place[1] > 1:
                raise ValueError("several datasets on several processes: give each loss gather=False")
            folder = loss.run.features
            if loss.run.id_key == "label":
                for dataset in parts:
                    _check_labels(dataset)
            if folder is not None:
                found = [place for dataset in parts for place in _image_columns(folder, dataset)]
                if len({*found}) != 1 or None in found:
                    bind = f"rankloss_features.bind(dataset, {folder.path!r}, column='label')"
                    raise ValueError(f"teacher needs the two columns and the label of {bind}")
                loss.image_column = found[0]
        super().on_train_begin(args, state, control, **kwargs)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:  # noqa: ARG002
        """After a line about training an interval begins."""
        for loss in self._losses if "loss" in logs else ():
            loss.metrics = None


def _check_labels(dataset: Any) -> None:
    """Raise a ValueError for a table whose pairs all have one label."""
    if isinstance(dataset, datasets.Dataset) and "label" in dataset.column_names:
        labels = torch.as_tensor(dataset.with_format("numpy")["label"][:])
        if not labels.is_floating_point() and labels.dim() == 1:  # others are of another loss
            check_column(labels, "label")


def _image_columns(folder: Features, dataset: Any) -> list[int | None]:
    """The place, 0 or 1, of the images among the columns of data that are bound to a folder; else nothing.

    The hash of the first row's pair tells; None if it is that of neither order.
    """
    if not isinstance(dataset, datasets.Dataset) or "label" not in dataset.column_names:
        return []
    names = [name for name in dataset.column_names if name not in ("label", "dataset_name")]
    first = dataset.select([0]).with_format(None)
    bound = np.array(first[0]["label"])
    if len(names) != 2 or bound.dtype != np.int64 or bound.shape != (2,):
        return []
    row, pair = (int(x) % 2**64 for x in bound)
    if row >= len(folder) or int(folder.pairs[row]) != pair:
        return []
    for place in (0, 1):
        with contextlib.suppress(ValueError):  # of a column of pictures, which holds no captions
            (((caption,), (image,)),) = Table(first, names[place], names[1 - place]).pairs()
            if pair == hash_of_pair(caption, image):
                return [place]
    return [None]
