"""Losses of the catalogue for a dataset's two columns of pairs."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rankloss.distributed import GatherOption
from rankloss_features.binding import features_of_labels
from rankloss_features.folder import NAMES
from rankloss_trainers.declared import Options
from rankloss_trainers.entries import Entries, LoggedTerms
from rankloss_trainers.extras import extra
from rankloss_trainers.host import Host, read_losses
from rankloss_trainers.option import did_you_mean, options_of
from rankloss_trainers.pair_ids import CAPTIONS, hash_tokens
from rankloss_trainers.run_options import RunKeywords, RunOptions, takes_run_options
from rankloss_trainers.runtime import Runtime
from rankloss_trainers.sentence_transformers.embeddings import EmbeddingLoss, is_cut

if TYPE_CHECKING:
    from typing_extensions import Unpack

with extra("sentence-transformers"):
    from accelerate.utils import extract_model_from_parallel  # type: ignore[import-untyped]

_logger = logging.getLogger("rankloss_trainers")

HOST = Host(
    name="sentence-transformers",
    biased="a trainer with a sigmoid loss",
    teacher="give labels, [N, 2, D'], or teacher=FOLDER, of `rankloss features` or of "
    "rankloss_features.caching.compute_features, and data that are bound to it",
    progress="give the trainer callbacks=[Progress(loss)]",
    serves=("ids", "folder"),
    instead={"lists": "RankedListsLoss of rankloss_trainers.sentence_transformers trains them"},
)

Columns = Iterable[dict[str, Tensor]]


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
        teacher: A folder of ``rankloss features``, or of
            :func:`rankloss_features.caching.compute_features`, that the data are bound to
            (:func:`rankloss_features.bind` with ``column="label"``). None: the labels, where they are a
            teacher's embeddings; ``"given"`` needs these.
        scale: The multiplier of the similarities, 1/temperature.
        mini_batch_size: Embed each column in mini-batches of so many rows at most, in the memory of one, for
            a second forward pass's time (GradCache). Loss and gradients are those of the whole batch. By
            default a column is embedded at once.
        output_dict: Return the terms by name, which the trainer adds up and logs, and with them λ and other
            values, which it only logs. False returns the sum of the terms, which a loss that is wrapped in
            another (``MatryoshkaLoss``) has to. The first line with a raw term is the first all of whose
            steps have λ above 0.
        gather: The gathering of a named loss, see :class:`rankloss.Gather`.
        **run_options: The other options of a run, see :class:`RunOptions
            <rankloss_trainers.run_options.RunOptions>`.

    Attributes:
        metrics: The names of the metrics until the log's next line; None before its first step.

    Shapes:
        The embeddings are ``[N, D]`` per column and process; all entries are scalars.

    Raises:
        TypeError: for an option that the loss or a run does not have, and for options beside a module.
        ValueError: for an unknown loss, for options that exclude each other, for a loss with parameters, a
            state, or further columns of the data, which this trainer does not serve, and for mini-batches of
            a model that begins with a ``StaticEmbedding``; in ``forward`` unless there are two columns, for a
            scale that is not positive, and for a teacher that is missing or not used.
        RuntimeError: in ``forward``, if :class:`Progress` does not tell the loss where training stands.

    References:
        Cached gradients: "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup", RepL4NLP
        2021.
    """

    @takes_run_options
    def __init__(
        self,
        model: nn.Module,
        loss: str | nn.Module = "rankclip",
        options: Options | None = None,
        *,
        scale: float = 20.0,
        mini_batch_size: int | None = None,
        output_dict: bool = True,
        gather: GatherOption = None,
        **run_options: Unpack[RunKeywords],
    ) -> None:
        super().__init__(model, scale, mini_batch_size)
        self.output_dict = output_dict
        for key in run_options:
            if key not in options_of(RunOptions):
                hint = did_you_mean(key, options_of(RunOptions))
                hint = hint or "; options of the loss are given as options={…}"
                raise TypeError(f"{type(self).__name__} has no keyword {key!r}{hint}")
        self.run = Runtime(HOST, read_losses(loss, options), RunOptions(**run_options), gather=gather)
        self.metrics: tuple[str, ...] | None = None
        self._has_warned = False  # of labels that are not used
        # The place of the column of images; of a folder's pairs Progress finds it.
        self.image_column = None if self.run.teaching.features is not None else 0
        if self.run.id_key not in (None, CAPTIONS, "label"):
            text = f"key must be {CAPTIONS} or label, the columns that a loss is given"
            raise ValueError(f"{text}; got {self.run.id_key!r}")

    def forward(self, sentence_features: Columns, labels: Tensor | None = None) -> Any:
        """The loss of a batch.

        Args:
            sentence_features: The tokenized columns, two of them.
            labels: A teacher's embeddings in the format of ``EmbedDistillLoss``, ``[N, 2, D']`` in the order
                of the columns or ``[N, D']`` for both; or the column ``label`` of data that are bound to a
                folder of them; or the ids of the pairs. Others are not used, and the first batch with them
                gives a warning.
        """
        columns = list(sentence_features)
        if len(columns) != 2:
            text = f"sentence_features must be a dataset's two columns of pairs; got {len(columns)}"
            if len(columns) > 2:
                text += "; train a positive and its negatives by RankedListsLoss(model, rankloss.RankedLists("
                text += "in_batch_negatives=True)) of rankloss_trainers.sentence_transformers"
            raise ValueError(text)
        images, texts = reversed(columns) if self.image_column == 1 else columns
        image_features, text_features = NAMES
        features = {image_features: self.embedded(images), text_features: self.embedded(texts)}
        entries = self._entries(features, labels, texts)
        self._end_at_backward(entries)
        return LoggedTerms(entries.terms, self._logged(entries)) if self.output_dict else entries.total

    def _end_at_backward(self, entries: Entries) -> None:
        """Let the progress that was told serve one backward pass.

        An error ends a training without a call of its callbacks, and the loss may go into another training
        that does not tell it: the second batch there is refused, if not the first.
        """

        def end(_gradient: Tensor) -> None:
            self.run.end()

        for term in entries.terms.values():
            if term.requires_grad:
                term.register_hook(end)

    def _logged(self, entries: Entries) -> dict[str, Tensor]:
        """The metrics of this interval of the log; the trainer divides their sums by all of its steps.

        One that appears later waits for the next interval, and NaN stands for one that ends: the trainer
        takes the average so far in its place.
        """
        if not entries.metrics:  # in an evaluation
            return {}
        if self.metrics is None:
            self.metrics = tuple(entries.metrics)
        nan = entries.total.detach() * math.nan
        return {name: entries.metrics.get(name, nan) for name in self.metrics}

    def _entries(
        self, features: dict[str, Tensor], labels: Tensor | None, texts: dict[str, Tensor]
    ) -> Entries:
        """The entries of the loss; without gradients, as in evaluation, those of the base.

        Args:
            features: The embeddings of images and texts, as losses call them.
            labels: See :meth:`forward`.
            texts: The tokenized column of texts.
        """
        if not torch.is_grad_enabled():
            return self.run.evaluate(**features, logit_scale=self.scale)
        if self.image_column is None:
            raise RuntimeError(f"the columns were not compared with the folder's: {HOST.progress}")
        if labels is not None and labels.is_floating_point() and is_cut(labels):
            raise ValueError(
                f"MatryoshkaLoss cut the teacher's labels to {labels.shape[-1]} of {labels.stride(-2)} "
                "dimensions: bind the data to a folder of them, and give it as teacher"
            )
        of_teacher = features_of_labels(self.run.teaching.features, labels)
        of_ids = self._ids(labels, texts)
        has_use_for_labels = bool(of_teacher) or self.run.id_key == "label"
        if labels is not None and not has_use_for_labels:
            self._warn_of_unused_labels()
        entries: Entries = self.run(**features, logit_scale=self.scale, **of_teacher, **of_ids)
        return entries

    def _ids(self, labels: Tensor | None, texts: dict[str, Tensor]) -> dict[str, Tensor]:
        """The ids of the pairs among the inputs of the loss, where it takes any.

        Raises:
            ValueError: They are to be the labels, and there are none.
        """
        key = self.run.id_key
        if key is None:
            return {}
        if key == CAPTIONS:
            first_module = extract_model_from_parallel(self.model)[0]
            return {"pair_ids": hash_tokens(texts, getattr(first_module, "tokenizer", None))}
        if labels is None:
            raise ValueError("clip-ids needs a column label of integers, the ids of the pairs")
        return {"pair_ids": labels}  # the key is "label": __init__ refuses any other

    def _warn_of_unused_labels(self) -> None:
        """Warn once of labels that are neither a teacher's nor ids, such as grades of the pairs."""
        rank, _world_size = self.run.gather.place
        if rank == 0 and not self._has_warned:
            self._has_warned = True
            text = "%s does not use the column label, and takes every pair for a match: leave out the pairs "
            _logger.warning(text + "that are none, and remove the column", self.run.name)

    def get_config_dict(self) -> dict[str, Any]:
        """The arguments, for the model card."""
        options = {loss.name: loss.values for loss in self.run.losses}
        return {"loss": self.run.name, "options": options, **super().get_config_dict()}

    @property
    def citation(self) -> str:
        """The BibTeX entry of the loss's paper, for the model card."""
        return "\n".join(loss.named.citation for loss in self.run.losses if loss.named.citation)
