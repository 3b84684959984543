"""Graded lists for sentence-transformers: each query with candidates of its own, and their grades.

A dataset with columns of queries, of lists of candidates and of lists of grades trains by::

    loss = RankedListsLoss(model, rankloss.RankedLists(in_batch_negatives=True))
    trainer = RankedListsTrainer(model, args, data, loss=loss)

Lists of one length may be columns, (query, candidate_1, …, candidate_K) with a list of K grades as the label;
then any ``SentenceTransformerTrainer`` serves. Without a label the first candidate is the positive, and the
others are negatives: triplets.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rankloss import RankedLists
from rankloss.options import check_weight
from rankloss_trainers.extras import extra
from rankloss_trainers.graded.lists import (
    check_list,
    check_unique,
    decode_grades,
    encode_grades,
    pad_lists,
    pool_lists,
)
from rankloss_trainers.graded.term import RankedListsTerm
from rankloss_trainers.sentence_transformers.embeddings import EmbeddingLoss, is_cut

with extra("sentence-transformers"):
    from sentence_transformers import SentenceTransformerTrainer
    from sentence_transformers.sentence_transformer.data_collator import SentenceTransformerDataCollator

    from rankloss_trainers.transformers.progress import keeping_last_batch

_IDS = "candidate_ids"  # the key of them among the candidates' inputs
_CITATIONS = {
    # The key of the BibTeX entry, its title and year, by the model of the lists.
    "plackett_luce": ("xia2008listwise", "Listwise Approach to Learning to Rank: Theory and Algorithm", 2008),
    "top_one": ("cao2007learning", "Learning to Rank: From Pairwise Approach to Listwise Approach", 2007),
    "pairwise": ("burges2005learning", "Learning to Rank using Gradient Descent", 2005),
    "lambda": ("wang2018lambdaloss", "The LambdaLoss Framework for Ranking Metric Optimization", 2018),
}


@dataclass
class RankedListsCollator(SentenceTransformerDataCollator):
    """Collates queries with lists of candidates of any length; a candidate of several lists is embedded once.

    The rows have a query, a list of candidates (texts or pictures) and, in a label column, a list of as many
    grades; between query and candidates there may be the query's own, for a loss of these pairs. The
    candidates of a batch become one column without repetitions; the label becomes ``[N, K, 2]``, int64, the
    row of each candidate in this column, or −1 for padding, and the bits of its grade.

    Raises:
        ValueError: unless the rows have these columns; for a list without candidates or of another number of
            grades, a grade that is no number, NaN or +∞, a text twice in a list with two grades, and a query
            twice in a batch, whose lists would be negatives of each other. The message names the row of the
            batch and shows the query.
    """

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        """A batch of rows."""
        rows = features  # of the data, as sentence-transformers calls them
        label = next((name for name in self.valid_label_columns if name in rows[0]), None)
        names = [name for name in rows[0] if name not in ("dataset_name", label)]
        if len(names) not in (2, 3) or label is None:
            raise ValueError(
                "the data must have a column of queries, one of lists of candidates and a label column "
                f"({', '.join(self.valid_label_columns)}) of lists of grades; got {', '.join(rows[0])}"
            )
        query, *own, candidates = names
        places = [f"row {n} of the batch, {query} {row[query]!r:.60}" for n, row in enumerate(rows)]
        remedy = "Join its lists, or train with batch_sampler=BatchSamplers.NO_DUPLICATES"
        check_unique([row[query] for row in rows], places, remedy)
        lists = [
            check_list(row[candidates], row[label], place) for row, place in zip(rows, places, strict=True)
        ]
        pool = pool_lists(lists)

        # Queries and candidates differ in number, so each kind is a table of its own to the collator behind.
        dataset_name = {"dataset_name": rows[0]["dataset_name"]} if "dataset_name" in rows[0] else {}
        table_of_queries = []
        for row in rows:
            pair = {name: row[name] for name in (query, *own)}
            table_of_queries.append({**dataset_name, **pair})
        table_of_candidates = [{**dataset_name, candidates: candidate} for candidate in pool.candidates]
        return {
            **super().__call__(table_of_queries),
            **super().__call__(table_of_candidates),
            f"{candidates}_{_IDS}": pool.ids,
            "label": torch.stack([pool.index, encode_grades(pool.grades)], dim=-1),
        }


class RankedListsTrainer(SentenceTransformerTrainer):
    """A ``SentenceTransformerTrainer`` of queries with lists of candidates: it has the collator for them.

    ``dataloader_drop_last`` is for training: an evaluation has every row.
    """

    data_collator_class = RankedListsCollator

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        """Batches of all rows."""
        with keeping_last_batch(self.args):
            return super().get_eval_dataloader(*args, **kwargs)

    def get_test_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        """As :meth:`get_eval_dataloader`."""
        with keeping_last_batch(self.args):
            return super().get_test_dataloader(*args, **kwargs)


class RankedListsLoss(EmbeddingLoss):
    r"""A loss of graded lists: :class:`rankloss.RankedLists` of the columns' embeddings.

        L_base(Q, O, s) + weight·L(Q, C, g, s)

    Q, C, O are the embeddings of the queries, the candidates and the queries' own, divided by their norms; s
    is the scale. Without a ``base`` the loss is that of the lists alone.

    The columns are a query and its K candidates, the label their K grades; or, from
    :class:`RankedListsCollator`, lists of any length, padded also to the longest of all processes. A larger
    grade is better, equal grades are tied. Without a label the first candidate is above the others: triplets
    (anchor, positive, negatives) train with ``rankloss.RankedLists(in_batch_negatives=True)``.

    With a ``base`` the second column is the query's own, the other text or picture of its pair. With a label
    it has no grade; without one it is the positive, both the base's pair and the best of the list.

    Args:
        model: The ``SentenceTransformer`` that is trained.
        criterion: The loss of the lists; by default ``rankloss.RankedLists()``, Plackett–Luce.
        base: A loss of the pairs of query and own, such as ``rankloss.ClipLoss()``; None for none.
        weight: The weight of the lists beside it.
        scale: The multiplier of the similarities, 1/temperature.
        mini_batch_size: Embed each column in mini-batches of so many rows, in the memory of one, for a second
            forward pass's time (GradCache). Loss and gradients are those of the whole batch. By default a
            column is embedded at once.

    Raises:
        ValueError: for a scale that is not positive, a weight that is negative, a mini-batch size below 1,
            mini-batches of a model that begins with a ``StaticEmbedding``; in ``forward`` for columns without
            candidates, for one candidate without a label, for labels of another number of candidates, and as
            the criterion.

    References:
        Cached gradients: "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup", RepL4NLP
        2021.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: RankedLists | None = None,
        *,
        base: nn.Module | None = None,
        weight: float = 1.0,
        scale: float = 20.0,
        mini_batch_size: int | None = None,
    ) -> None:
        super().__init__(model, check_weight("scale", scale, above=0.0), mini_batch_size)
        self.criterion = RankedLists() if criterion is None else criterion
        self.term = RankedListsTerm(self.criterion, base, weight=weight)

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None = None) -> Tensor:
        """The loss of a batch.

        Args:
            sentence_features: The tokenized columns: a query, with a base its own, and its candidates.
            labels: The grades, ``[N, K]``, or ``[N, K, 2]`` from :class:`RankedListsCollator`; None for a
                positive, which is the own of a base, and its negatives.
        """
        columns = list(sentence_features)
        ids = columns[-1].get(_IDS)
        queries, *candidates = [self._embedded_column(column) for column in columns]
        pairs = {}
        if self.term.base is not None and candidates:
            own, *others = candidates
            pairs = {"image_features": queries, "text_features": own}
            if labels is not None:  # without labels the own is the list's positive
                candidates = others
        if labels is None and len(candidates) > 1:
            labels = _grades_of_triplets(len(queries), len(candidates), queries.device)
        if labels is None or not candidates:
            raise ValueError("graded lists need columns of candidates and a label column with their grades")
        lists = self._lists(len(queries), candidates, labels, ids)
        loss: Tensor = self.term(logit_scale=self.scale, query_features=queries, **pairs, **lists)
        return loss

    def _embedded_column(self, column: dict[str, Tensor]) -> Tensor:
        """The embeddings of a column, which gets the model's output: AdaptiveLayerLoss takes its layers."""
        inputs = {name: value for name, value in column.items() if name != _IDS}
        embeddings = self.embedded(inputs)
        column.update(inputs)
        return embeddings

    def _lists(
        self, queries: int, candidates: list[Tensor], labels: Tensor, ids: Tensor | None
    ) -> dict[str, Any]:
        """The candidates and grades of so many queries, as arguments of the criterion."""
        is_collated = labels.dim() == 3 and len(candidates) == 1
        if is_collated:  # RankedListsCollator put each candidate's place and its grade side by side
            index, encoded_grades = labels.unbind(-1)
            grades = decode_grades(encoded_grades)
            return pad_lists(self.criterion.gather, candidates[0], index, grades, ids)
        if labels.shape == (queries, len(candidates)):
            return {"candidate_features": torch.stack(candidates, 1), "grades": labels}
        if len(candidates) != labels.shape[-1] and is_cut(labels):
            uncut_length = labels.stride(-2)  # a view's rows lie as far apart as those of the tensor it is of
            raise ValueError(
                f"labels are grades, which MatryoshkaLoss cut to {labels.shape[-1]} of {uncut_length} "
                "as if they were embeddings of as many dimensions: train such lists by RankedListsTrainer"
            )
        raise ValueError(
            f"labels must have a grade for each of {len(candidates)} candidates, "
            f"({queries}, {len(candidates)}); got {tuple(labels.shape)}. Lists of several lengths "
            "need RankedListsTrainer"
        )

    def get_config_dict(self) -> dict[str, Any]:
        """The arguments, for the model card."""
        return {"criterion": repr(self.criterion), **super().get_config_dict()}

    @property
    def citation(self) -> str:
        """The BibTeX entry of the criterion's paper, for the model card."""
        key, title, year = _CITATIONS[self.criterion.model]
        return f"@inproceedings{{{key},\n    title={{{title}}},\n    year={{{year}}}\n}}"


def _grades_of_triplets(queries: int, candidates: int, device: torch.device) -> Tensor:
    """Grades of lists of a positive and its negatives, which are below it and not ranked: 1, −∞, −∞, …."""
    grades = torch.full((queries, candidates), -torch.inf, device=device)
    grades[:, 0] = 1.0
    return grades
