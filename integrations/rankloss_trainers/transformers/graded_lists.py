"""Lists of graded candidates in transformers' Trainer: the texts of a picture, or the pictures of a text."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.data_loader import DataLoaderDispatcher  # type: ignore[import-untyped]
from torch import Tensor
from torch.utils.data import IterableDataset

from rankloss import metrics
from rankloss_features.folder import NAMES
from rankloss_trainers.cached import Split
from rankloss_trainers.graded.lists import (
    Distinct,
    check_list,
    check_unique,
    decode_grades,
    encode_grades,
    has_order,
    pad_lists,
    pool_lists,
    warn_of_ties,
)
from rankloss_trainers.runtime import Runtime
from rankloss_trainers.transformers import embeddings

COLUMNS = ("query", "candidates", "grades", "ranks", "own")
"""The columns of a table of lists: grades and ranks exclude each other, own is optional."""

METRICS = ("ndcg", "reciprocal_rank", "pairwise_accuracy", "kendall_tau_b", "kendall_tau_c")
"""The metrics of an evaluation, with the defaults of :mod:`rankloss.metrics`."""

# Of a batch, beside the model's inputs.
_BATCH = (
    "grade_bits",
    "graded_by",
    "query_index",
    "own_index",
    "excluded_ids",
    "candidate_index",
    "candidate_ids",
    "queries",
    "plan",
)
_REMEDY = "Join its lists"


@dataclass
class RankedListsCollator:
    """Collates rows of a query, its candidates and their grades; no picture or text is embedded twice.

    A row has ``query``, a picture or a text, ``candidates``, a list of the other kind, and ``grades``, a
    number for each, larger for better; or ``ranks``, smaller for better. Lists may differ in length. With a
    column ``own``, of the candidates' kind, query and own are a pair for a loss of pairs beside the lists.

    The batch has the model's inputs of the distinct queries, of the M distinct candidates and of the own ones
    that are no candidates; ``grade_bits`` (:func:`rankloss_trainers.graded.lists.encode_grades`) and
    ``candidate_index`` ``[N, K]``, ``candidate_ids`` ``[M]``, ``query_index`` and, with pairs, ``own_index``
    and ``excluded_ids``, the ids of the own ones, which are no negatives of their queries, ``[N]``;
    ``queries``, ``"image"`` or ``"text"``, ``graded_by``, ``"grades"`` or ``"ranks"``, and ``plan``, an
    :class:`EmbeddingPlan`.

    Args:
        processor: A model's processor, with its ``tokenizer`` and its ``image_processor``.
        padding: The padding of texts, an argument of the tokenizer; ``"max_length"`` for SigLIP.
        unique: Refuse a query twice in a batch, as in-batch negatives need it.

    Raises:
        TypeError: for a processor without these two.
        ValueError: for rows without these columns, a query or candidates of another kind, a list without
            candidates, a grade for each missing, or a grade that is no number, NaN or +∞. The message names
            the row of the batch and shows the query.
    """

    processor: Any
    padding: bool | str = True
    unique: bool = False

    def __post_init__(self) -> None:
        missing = [x for x in ("tokenizer", "image_processor") if not hasattr(self.processor, x)]
        if missing:
            kind = type(self.processor).__name__
            raise TypeError(f"lists need the model's processor, with a {' and a '.join(missing)}; got {kind}")

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """A batch of rows."""
        graded_by = find_grades(rows[0])
        queries = [row["query"] for row in rows]
        places = [f"row {n} of the batch, query {query!r:.60}" for n, query in enumerate(queries)]
        lists = [read_list(row, graded_by, place) for row, place in zip(rows, places, strict=True)]
        owns = [row["own"] for row in rows] if "own" in rows[0] else []
        if self.unique:
            check_unique(queries, places, _REMEDY)
        are_texts = isinstance(queries[0], str)
        for n, row in enumerate(rows):
            _check_kinds(row, owns[n : n + 1], are_texts, places[n])

        pool, distinct_queries = pool_lists(lists), Distinct()
        others = Distinct(
            pool.candidates
        )  # which keep their rows; the own ones that are no candidates follow
        batch: dict[str, Any] = {
            # The first: its length is the number of lists to the Trainer.
            "grade_bits": encode_grades(pool.grades),
            "graded_by": graded_by,
            "query_index": distinct_queries.rows_of(queries),
            "candidate_index": pool.index,
            "candidate_ids": pool.ids,
            "queries": "text" if are_texts else "image",
        }
        if owns:
            batch["own_index"] = others.rows_of(owns)
            batch["excluded_ids"] = others.ids[batch["own_index"]]
        batch["plan"] = EmbeddingPlan(len(distinct_queries.items), len(others.items))
        texts, pictures = distinct_queries.items, others.items
        if not are_texts:
            texts, pictures = pictures, texts
        return {**batch, **self._encoded(texts, pictures)}

    def _encoded(self, texts: list[str], pictures: list[Any]) -> dict[str, Any]:
        """The model's inputs of the distinct texts and pictures."""
        tokens = self.processor.tokenizer(texts, padding=self.padding, truncation=True, return_tensors="pt")
        return {**tokens, **self.processor.image_processor(pictures, return_tensors="pt")}


@dataclass(frozen=True)
class EmbeddingPlan:
    """The rows that a model embeds of a batch of lists.

    A model takes texts and pictures in one call, so each mini-batch needs rows of both. Where the one kind
    has fewer rows than there are mini-batches, these are repeated; the index of a row leads to its first.

    Attributes:
        queries: The distinct queries.
        others: The distinct candidates, and the own ones that are no candidates.

    For instance, 2 queries and 9 others, at most 3 rows of a kind at a time, are 3 mini-batches: the others
    split as 3 + 3 + 3, and the queries, repeated as rows 0, 1, 0, as 1 + 1 + 1.
    """

    queries: int
    others: int

    def split(self, size: int | None) -> Split | None:
        """The split into mini-batches of at most ``size`` rows of each kind; None without a size."""
        if size is None:
            return None
        few, many = sorted((self.queries, self.others))
        number = math.ceil(many / size)
        return Split(number, (many, max(few, number)))

    def repeated(self, columns: Mapping[str, Tensor], split: Split | None) -> dict[str, Tensor]:
        """The model's inputs with as many rows of each kind as the split needs."""
        few = min(self.queries, self.others)
        if split is None or split.number <= few:
            return dict(columns)
        rows = torch.arange(split.number) % few
        return {
            name: column[rows.to(column.device)] if len(column) == few else column
            for name, column in columns.items()
        }


def _check_kinds(row: Mapping[str, Any], own: Sequence[Any], are_texts: bool, place: str) -> None:
    """Raise a ValueError unless the query is of the batch's kind, and its candidates and own of the other."""
    is_right = isinstance(row["query"], str) == are_texts
    if not is_right or any(isinstance(other, str) == are_texts for other in (*row["candidates"], *own)):
        needed = "pictures for a text" if are_texts else "texts for a picture"
        raise ValueError(f"candidates must be {needed}, in each row of a batch; got others in {place}")


def find_grades(names: Any) -> str:
    """The column of grades or of ranks.

    Raises:
        ValueError: unless there is one of them, beside queries and candidates.
    """
    found = [name for name in COLUMNS[2:4] if name in names]
    if len(found) != 1 or not {*COLUMNS[:2]} <= {*names}:
        raise ValueError(
            f"lists need the columns query, candidates, and grades or ranks; got {', '.join(names)}"
        )
    return found[0]


def read_list(row: Mapping[str, Any], column: str, where: str) -> list[tuple[Any, float]]:
    """The candidates of a row with their grades; see :func:`rankloss_trainers.graded.lists.check_list`."""
    values = row[column]
    if column == "ranks" and isinstance(values, (list, tuple)):
        values = [x if isinstance(x, bool) or not isinstance(x, (int, float)) else -x for x in values]
    return check_list(row["candidates"], values, where)


def check_table(run: Runtime, dataset: Any) -> None:
    """Check all lists of a table of `datasets`, without decoding a picture; data of other kinds pass.

    Raises:
        ValueError: as the collator, and as :func:`check_batch`; the message names the row of the table.
    """
    names = getattr(dataset, "column_names", None)
    if names is None or not hasattr(dataset, "select_columns") or isinstance(dataset, IterableDataset):
        return
    from pyarrow.compute import list_value_length  # type: ignore[import-untyped]

    column, rows, is_ordered = find_grades(names), itertools.count(), False
    check_batch(run, {"graded_by": column, **dict.fromkeys({"own"} & {*names}, "own")})
    for block in dataset.select_columns(["candidates", column]).with_format("arrow").iter(1000):
        lists = (size and [None] * size for size in list_value_length(block["candidates"]).to_pylist())
        for candidates, values in zip(lists, block[column].to_pylist(), strict=True):
            read_list({"candidates": candidates, column: values}, column, f"row {next(rows)} of the data")
            is_ordered = is_ordered or has_order(values)
    if not is_ordered:
        warn_of_ties("the data")


def check_batch(run: Runtime, batch: Mapping[str, Any]) -> None:
    """Raise a ValueError for lists that the loss would take for something else.

    Args:
        run: The loss.
        batch: Its ``graded_by``, and ``own`` or ``own_index`` where it has pairs.
    """
    parts = [*run.criterion.modules()]
    uses_values = any(getattr(part, "uses_grade_values", False) for part in parts)
    if batch["graded_by"] == "ranks" and uses_values:
        raise ValueError(f"ranks are an order, and {run.name} takes grades as values; give the column grades")
    has_pairs = bool({"own", "own_index"} & batch.keys())
    on_pairs = [part for part in parts if getattr(part, "base", None) is not None]
    if not has_pairs and any(getattr(part, "needs_pairs", True) for part in on_pairs):
        raise ValueError(f"{run.name} needs pairs beside the lists: give each query's own in a column own")
    if has_pairs and not any(hasattr(part, "needs_pairs") for part in on_pairs):
        raise ValueError(f"the data have own, of pairs that {run.name} does not train")


def check_loader(loader: Any) -> None:
    """Raise a ValueError for a loader that slices batches, whose queries and candidates differ in number."""
    if isinstance(loader, DataLoaderDispatcher):
        raise ValueError(
            "lists cannot be dispatched from one process to the others: give "
            'accelerator_config={"dispatch_batches": False}'
        )


def check_run(run: Runtime) -> None:
    """Raise an OptionError for options that are for other trainers."""
    if run.id_key is not None:
        raise ValueError(f"{run.name} needs a table of pairs; one of lists has no ids")
    for loss in run.losses:
        loss.refuse_column_options("is for open_clip's trainer")


def embed(
    run: Runtime, call: Any, model: Any, inputs: Mapping[str, Any], size: int | None
) -> tuple[Any, dict[str, Any]]:
    """Embed the pictures and texts of a batch of lists in one call of the model.

    Args:
        run: The loss.
        call: The model, in its wrappers.
        model: The model itself.
        inputs: A batch of :class:`RankedListsCollator`.
        size: Rows of a mini-batch, at most; None embeds all at once.

    Returns:
        The model's output, and the arguments of the loss, of the same shapes on all processes.

    Raises:
        KeyError: The batch is of another collator.
        ValueError: as :func:`check_batch`.
    """
    index, ids, plan = (inputs[name] for name in ("candidate_index", "candidate_ids", "plan"))
    grades, own_index = decode_grades(inputs["grade_bits"]), inputs.get("own_index")
    check_batch(run, inputs)
    split = plan.split(size)
    columns = {name: x for name, x in inputs.items() if name not in (*_BATCH, "return_loss")}
    outputs, features = embeddings.embedded(call, model, plan.repeated(columns, split), split)
    names = NAMES if inputs["queries"] == "image" else NAMES[::-1]
    distinct_queries, others = (features[name] for name in names)
    queries = distinct_queries[inputs["query_index"]]

    scale, pairs = {"logit_scale": features["logit_scale"]}, {}
    if own_index is not None:
        pairs = dict(zip(names, (queries, others[own_index]), strict=True))
    if "logit_bias" in features:
        if pairs:
            scale["logit_bias"] = features["logit_bias"]
        else:  # changes no list, but is a parameter of which DDP expects a gradient
            scale["logit_scale"] = scale["logit_scale"] + 0.0 * features["logit_bias"]
    lists = pad_lists(run.gather, others[: len(ids)], index, grades, ids)
    if "excluded_ids" in inputs:
        lists["excluded_ids"] = inputs["excluded_ids"]
    return outputs, {"query_features": queries, **scale, **pairs, **lists}


def measure(features: Mapping[str, Tensor]) -> Tensor:
    """The metrics of :data:`METRICS` of each list, ``[N, 5]``; NaN where one is not defined.

    Args:
        features: The arguments of :func:`embed`.
    """
    index, grades, mask = (features[name] for name in ("candidate_index", "grades", "mask"))
    own = features["candidate_features"][index.clamp_min(0)].float()
    scores = (features["query_features"].float()[:, None] * own).sum(-1)  # autocast would round a product
    has_negative = ((grades < 0) & (grades > -torch.inf) & mask).any(-1, keepdim=True)
    values = (
        metrics.ndcg(scores, grades.masked_fill(has_negative, 0.0), mask=mask),
        metrics.reciprocal_rank(scores, grades, mask=mask),
        metrics.pairwise_accuracy(scores, grades, mask=mask),
        metrics.kendall_tau(scores, grades, mask=mask),
        metrics.kendall_tau(scores, grades, variant="c", mask=mask),
    )
    return torch.stack(values, dim=-1)
