"""Losses of the catalogue for sentence-transformers: ``SentenceTransformerTrainer`` and its conventions.

It takes the loss, and the callback that tells it where training stands::

    loss = ContrastiveLoss(model, "rankclip", {"top_k": 8})
    trainer = SentenceTransformerTrainer(model, args, pairs, loss=loss, callbacks=[Progress(loss)])
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import ConcatDataset

from rankloss.distributed import GatherOption
from rankloss.options import check_count
from rankloss_features.binding import taught
from rankloss_features.data import Table
from rankloss_features.folder import hash_of_pair
from rankloss_trainers.cached import embedding_in
from rankloss_trainers.catalog import Options
from rankloss_trainers.extras import extra
from rankloss_trainers.runtime import Entries, Host, LoggedTerms, Runtime

with extra("sentence-transformers"):
    import datasets
    from accelerate.utils import extract_model_from_parallel
    from sentence_transformers.base.losses import has_static_embedding_input

    from rankloss_trainers.transformers.progress import Progress as TrainerProgress

__all__ = ["ContrastiveLoss", "Progress", "RankClipLoss"]

HOST = Host(
    name="sentence-transformers",
    biased="a trainer with a sigmoid loss",
    teacher="give the data a column label of its embeddings, [N, 2, D'], or give the option reference_features, "
    "a folder that the data are bound to",
    progress="give the trainer callbacks=[Progress(loss)]",
    serves=("folder",),
    defaults={"schedule_unit": "step"},  # epochs may be a fraction
)

Columns = Iterable[dict[str, Tensor]]


class ContrastiveLoss(nn.Module):
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
            With ``{"reference_features": FOLDER}``, a folder of ``rankloss features`` that the data are bound
            to (:func:`rankloss_features.bind` with ``column="label"``), the loss uses this teacher.
        scale: The multiplier of the similarities, 1/temperature.
        mini_batch_size: Embed each column in mini-batches of so many rows at most, in the memory of one, for
            a second forward pass's time (GradCache). Loss and gradients are those of the whole batch. By
            default a column is embedded at once.
        output_dict: Return the terms by name, which the trainer adds up and logs, and with them λ and other
            values, which it only logs. False returns their sum, which a loss that is wrapped in another
            (``MatryoshkaLoss``) has to.
        gather: The gathering of a named loss, see :class:`rankloss.Gather`.

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
        scale: float = 20.0,
        mini_batch_size: int | None = None,
        output_dict: bool = True,
        gather: GatherOption = None,
    ) -> None:
        super().__init__()
        if mini_batch_size is not None:
            check_count("mini_batch_size", mini_batch_size)
            if has_static_embedding_input(model):
                raise ValueError("mini_batch_size cannot split the inputs of a StaticEmbedding; leave it out")
        self.model = model
        self.scale = scale
        self.mini_batch_size = mini_batch_size
        self.output_dict = output_dict
        self.run = Runtime(HOST, loss, options, gather=gather)
        self.image_column = None if self.run.features is not None else 0

    def forward(self, sentence_features: Columns, labels: Tensor | None = None) -> Any:
        """The loss of a batch.

        Args:
            sentence_features: The tokenized columns, two of them.
            labels: A teacher's embeddings in the format of ``EmbedDistillLoss``, ``[N, 2, D']`` in the order of
                the columns or ``[N, D']`` for both; or the column ``label`` of data that are bound to a folder
                of them. Others are not used: the pairs are the labels.
        """
        columns = list(sentence_features)
        if len(columns) != 2:
            raise ValueError(
                f"sentence_features must be the two columns of a dataset of pairs; got {len(columns)}"
            )
        embeddings = [F.normalize(self._embed(column), dim=-1) for column in columns]
        entries = self._entries(embeddings, labels)
        return LoggedTerms(*entries) if self.output_dict else entries.total

    def _embed(self, column: dict[str, Tensor]) -> Tensor:
        inner = extract_model_from_parallel(self.model)
        with embedding_in(inner, self.mini_batch_size, lambda x: {_EMBEDDING: x[_EMBEDDING]}):
            embeddings: Tensor = self.model(column)[_EMBEDDING]
        return embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))

    def _entries(self, embeddings: list[Tensor], labels: Tensor | None) -> Entries:
        images, texts = embeddings if self.image_column in (0, None) else reversed(embeddings)
        features = {"image_features": images, "text_features": texts, "logit_scale": self.scale}
        if not torch.is_grad_enabled():
            return self.run.evaluate(**features)
        if self.image_column is None:
            raise RuntimeError(f"the columns were not compared with the folder's: {HOST.progress}")
        terms, metrics = self.run(**features, **taught(self.run.features, labels))
        # The trainer's means count an entry that is missing, as raw terms are while λ is 0, as 0.
        return Entries(terms, {name: x for name, x in metrics.items() if not name.endswith("_raw")})

    def get_config_dict(self) -> dict[str, Any]:
        """The arguments, for the model card."""
        given = {"loss": self.run.name, "options": dict(self.run.options), "scale": self.scale}
        return {**given, "mini_batch_size": self.mini_batch_size}

    @property
    def citation(self) -> str:
        """The BibTeX entry of the loss's paper, for the model card."""
        return self.run.entry.citation


_EMBEDDING = "sentence_embedding"


class RankClipLoss(ContrastiveLoss):
    """:class:`ContrastiveLoss` with ``loss="rankclip"`` and its options by keywords.

    Args:
        model: The ``SentenceTransformer`` that is trained.
        scale: See :class:`ContrastiveLoss`, as ``mini_batch_size``, ``output_dict`` and ``gather``.
        mini_batch_size: See there.
        output_dict: See there.
        gather: See there.
        **options: Of ``rankclip``: ``schedule``, ``lambda_cross``, ``top_k``, ``reference_features``, …

    Raises:
        TypeError, ValueError, RuntimeError: as :class:`ContrastiveLoss`.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        scale: float = 20.0,
        mini_batch_size: int | None = None,
        output_dict: bool = True,
        gather: GatherOption = None,
        **options: Any,
    ) -> None:
        given = {"scale": scale, "mini_batch_size": mini_batch_size, "output_dict": output_dict}
        super().__init__(model, "rankclip", options, gather=gather, **given)


class Progress(TrainerProgress):
    """Tells losses where a ``SentenceTransformerTrainer`` stands, and compares its data with their folders.

    Args:
        *losses: The losses that the trainer was given, or losses that hold them.

    Raises:
        ValueError: None of the losses is a :class:`ContrastiveLoss`; when training begins, for a last batch of
            one pair, for several datasets on several processes, unless the losses have ``gather=False``, and
            for columns that are not those of the folder of a teacher's features.
    """

    def __init__(self, *losses: nn.Module) -> None:
        super().__init__(*losses)
        self._losses = [x for loss in losses for x in loss.modules() if isinstance(x, ContrastiveLoss)]

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check the data."""
        data = kwargs["train_dataloader"].dataset
        several = isinstance(data, ConcatDataset)
        if several and any(loss.run.gather.place[1] > 1 for loss in self._losses):
            raise ValueError(
                "at one step each process has a batch of another dataset, and the loss would contrast them "
                "with each other, or wait for a process that calls another loss: with several datasets on "
                "several processes give each loss gather=False"
            )
        for loss in self._losses:
            if loss.run.features is not None:
                found = (_image_column(loss.run.features, x) for x in (data.datasets if several else [data]))
                loss.image_column = next((x for x in found if x is not None), None)
                if loss.image_column is None:
                    raise ValueError(
                        f"no two columns of the data hold the pairs that rankloss_features.bind(…, "
                        f"{loss.run.features.path!r}, column='label') compared: bind the data as they are "
                        "trained on"
                    )
        super().on_train_begin(args, state, control, **kwargs)


def _image_column(features: Any, dataset: Any) -> int | None:
    """The place, 0 or 1, of the images among the columns of bound data; None where they are not the folder's.

    The hash of the first row's pair tells.
    """
    first = dataset.select([0]) if hasattr(dataset, "select") else None
    if first is None:
        first = datasets.Dataset.from_list(list(itertools.islice(dataset, 1)), features=dataset.features)
    names = [name for name in first.column_names if name not in ("label", "dataset_name")]
    if len(names) != 2 or "label" not in first.column_names:
        return None
    row, pair = (int(x) for x in first.with_format(None)[0]["label"])
    for place in (0, 1):
        try:
            (((caption,), (image,)),) = Table(first, names[place], names[1 - place]).pairs()
        except ValueError:  # a column of pictures holds no captions
            continue
        image = f"row {row}" if image == "row 0" else image  # a picture without a name
        if hash_of_pair(caption, image) == pair % 2**64:
            return place
    return None
