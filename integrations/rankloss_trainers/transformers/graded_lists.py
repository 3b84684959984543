"""Lists of graded candidates in transformers' Trainer: the texts of a picture, or the pictures of a text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.data_loader import DataLoaderDispatcher  # type: ignore[import-untyped]
from torch import Tensor
from torch.utils.data import IterableDataset

from rankloss import metrics
from rankloss.losses.composition import base_under
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

# The keys of a batch that are no inputs of the model.
_KEYS_OF_LISTS = (
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
            candidates or of another number of grades, a grade that is no number, NaN or +∞, a text twice in
            a list with two grades, or, with ``unique``, a query twice. The message names the row of the
            batch and shows the query.
    """

    processor: Any
    padding: bool | str = True
    unique: bool = False

    def __post_init__(self) -> None:
        missing = [part for part in ("tokenizer", "image_processor") if not hasattr(self.processor, part)]
        if missing:
            kind = type(self.processor).__name__
            raise TypeError(f"lists need the model's processor, with a {' and a '.join(missing)}; got {kind}")

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """A batch of rows."""
        graded_by = find_grades(rows[0])
        has_own = "own" in rows[0]
        queries = [row["query"] for row in rows]
        are_texts = isinstance(queries[0], str)
        places = [f"row {n} of the batch, query {query!r:.60}" for n, query in enumerate(queries)]
        lists = [read_list(row, graded_by, place) for row, place in zip(rows, places, strict=True)]
        if self.unique:
            check_unique(queries, places, _REMEDY)
        for row, place in zip(rows, places, strict=True):
            others_of_row = [*row["candidates"], row["own"]] if has_own else row["candidates"]
            _check_kinds(row["query"], others_of_row, are_texts, place)

        pool = pool_lists(lists)
        distinct_queries = Distinct()
        others = Distinct(pool.candidates)  # in the pool's rows; the own ones that are no candidates follow
        batch: dict[str, Any] = {
            # The Trainer takes the length of the first for the number of lists.
            "grade_bits": encode_grades(pool.grades),
            "graded_by": graded_by,
            "query_index": distinct_queries.rows_of(queries),
            "candidate_index": pool.index,
            "candidate_ids": pool.ids,
            "queries": "text" if are_texts else "image",
        }
        if has_own:
            batch["own_index"] = others.rows_of(row["own"] for row in rows)
            batch["excluded_ids"] = others.ids[batch["own_index"]]
        batch["plan"] = EmbeddingPlan(len(distinct_queries.items), len(others.items))
        if are_texts:
            encoded = self._encoded(texts=distinct_queries.items, pictures=others.items)
        else:
            encoded = self._encoded(texts=others.items, pictures=distinct_queries.items)
        return {**batch, **encoded}

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
        mini_batches = math.ceil(many / size)
        few_repeated = max(few, mini_batches)  # at least a row for each mini-batch, see :meth:`repeated`
        return Split(number=mini_batches, rows=(many, few_repeated))

    def repeated(self, columns: Mapping[str, Tensor], split: Split | None) -> dict[str, Tensor]:
        """The model's inputs with as many rows of each kind as the split needs."""
        few = min(self.queries, self.others)
        if split is None or split.number <= few:
            return dict(columns)
        rows = torch.arange(split.number) % few  # 0, 1, …, few − 1, 0, 1, …
        repeated = {}
        for name, column in columns.items():
            is_of_few = len(column) == few
            repeated[name] = column[rows.to(column.device)] if is_of_few else column
        return repeated


def _check_kinds(query: Any, others: Sequence[Any], queries_are_texts: bool, place: str) -> None:
    """Raise a ValueError unless the query is of the batch's kind, and its candidates and own of the other."""
    is_right = isinstance(query, str) == queries_are_texts
    are_right = all(isinstance(other, str) != queries_are_texts for other in others)
    if not is_right or not are_right:
        needed = "pictures for a text" if queries_are_texts else "texts for a picture"
        raise ValueError(f"candidates must be {needed}, in each row of a batch; got others in {place}")


def find_grades(names: Any) -> str:
    """The column of grades or of ranks.

    Raises:
        ValueError: unless there is one of them, beside queries and candidates.
    """
    orders = [name for name in ("grades", "ranks") if name in names]
    if len(orders) != 1 or "query" not in names or "candidates" not in names:
        raise ValueError(
            f"lists need the columns query, candidates, and grades or ranks; got {', '.join(names)}"
        )
    return orders[0]


def read_list(row: Mapping[str, Any], column: str, where: str) -> list[tuple[Any, float]]:
    """The candidates of a row with their grades; see :func:`rankloss_trainers.graded.lists.check_list`."""
    grades = row[column]
    if column == "ranks" and isinstance(grades, (list, tuple)):
        grades = [_grade_of(rank) for rank in grades]
    return check_list(row["candidates"], grades, where)


def _grade_of(rank: Any) -> Any:
    """The grade of a rank, as a smaller rank is better; what is no number stays, for the check's error."""
    is_number = isinstance(rank, (int, float)) and not isinstance(rank, bool)
    return -rank if is_number else rank


def check_table(run: Runtime, dataset: Any) -> None:
    """Check all lists of a table of `datasets`, without decoding a picture; data of other kinds pass.

    Raises:
        ValueError: as the collator, and as :func:`check_lists_fit`; the message names the row of the table.
    """
    names = getattr(dataset, "column_names", None)
    if names is None or not hasattr(dataset, "select_columns") or isinstance(dataset, IterableDataset):
        return
    from pyarrow.compute import list_value_length  # type: ignore[import-untyped]

    column = find_grades(names)
    check_lists_fit(run, column, has_pairs="own" in names)
    row, any_is_ordered = 0, False
    rows_at_once = 1000
    blocks = dataset.select_columns(["candidates", column]).with_format("arrow").iter(rows_at_once)
    for block in blocks:
        lengths = list_value_length(block["candidates"]).to_pylist()
        for length, grades in zip(lengths, block[column].to_pylist(), strict=True):
            # Their number is checked, and no candidate is decoded; a cell without a list has no length.
            stand_ins = None if length is None else [None] * length
            read_list({"candidates": stand_ins, column: grades}, column, f"row {row} of the data")
            any_is_ordered = any_is_ordered or has_order(grades)
            row += 1
    if not any_is_ordered:
        warn_of_ties("the data")


def check_lists_fit(run: Runtime, graded_by: str, *, has_pairs: bool) -> None:
    """Raise a ValueError for lists that the loss would take for something else.

    Args:
        run: The loss.
        graded_by: The column of grades or of ranks.
        has_pairs: True if each query has an own text or picture beside its list.
    """
    parts = list(run.criterion.modules())
    uses_values = any(getattr(part, "uses_grade_values", False) for part in parts)
    if graded_by == "ranks" and uses_values:
        raise ValueError(f"ranks are an order, and {run.name} takes grades as values; give the column grades")
    # A part on a base trains pairs. One that says whether it needs them trains them beside lists.
    on_pairs = [part for part in parts if base_under(part) is not None]
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
    """Raise a ValueError for a loss with ids of pairs, an OptionError for options of open_clip's trainer."""
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
        ValueError: as :func:`check_lists_fit`.
    """
    index, ids = inputs["candidate_index"], inputs["candidate_ids"]
    grades = decode_grades(inputs["grade_bits"])
    has_pairs = "own_index" in inputs
    check_lists_fit(run, inputs["graded_by"], has_pairs=has_pairs)
    plan = inputs["plan"]
    split = plan.split(size)
    of_model = {name: value for name, value in inputs.items() if name not in (*_KEYS_OF_LISTS, "return_loss")}
    outputs, features = embeddings.embedded(call, model, plan.repeated(of_model, split), split)
    of_queries, of_others = NAMES if inputs["queries"] == "image" else reversed(NAMES)
    queries, others = features[of_queries][inputs["query_index"]], features[of_others]

    arguments = {"query_features": queries, "logit_scale": features["logit_scale"]}
    if has_pairs:
        arguments[of_queries] = queries
        arguments[of_others] = others[inputs["own_index"]]
    if "logit_bias" in features:
        if has_pairs:
            arguments["logit_bias"] = features["logit_bias"]
        else:  # changes no list, but is a parameter of which DDP expects a gradient
            arguments["logit_scale"] = features["logit_scale"] + 0.0 * features["logit_bias"]
    candidates = others[: len(ids)]  # the own ones follow
    arguments.update(pad_lists(run.gather, candidates, index, grades, ids))
    if "excluded_ids" in inputs:
        arguments["excluded_ids"] = inputs["excluded_ids"]
    return outputs, arguments


def measure(features: Mapping[str, Tensor]) -> Tensor:
    """The metrics of :data:`METRICS` of each list, NaN where one is not defined: ``[N, 6]``.

    The last of the six columns is 1 for a list with finite scores, else 0.

    Args:
        features: The arguments of :func:`embed`.
    """
    index, grades, mask = features["candidate_index"], features["grades"], features["mask"]
    places = index.clamp_min(0)  # where there is none any will do: the mask leaves it out
    candidates = features["candidate_features"][places].float()  # [N, K, D]
    queries = features["query_features"].float()[:, None]
    scores = (queries * candidates).sum(-1)  # autocast would round a product of matrices
    has_negative = ((grades < 0) & (grades > -torch.inf) & mask).any(-1, keepdim=True)
    # nDCG refuses grades below 0. It is NaN for a list whose grades are all 0.
    grades_of_ndcg = grades.masked_fill(has_negative, 0.0)
    values = (
        metrics.ndcg(scores, grades_of_ndcg, mask=mask),
        metrics.reciprocal_rank(scores, grades, mask=mask),
        metrics.pairwise_accuracy(scores, grades, mask=mask),
        metrics.kendall_tau(scores, grades, mask=mask),
        metrics.kendall_tau(scores, grades, variant="c", mask=mask),
    )
    is_finite = scores.masked_fill(~mask, 0.0).isfinite().all(-1)
    return torch.stack([*values, is_finite.to(values[0].dtype)], dim=-1)


def mean_metrics(measured: Tensor) -> dict[str, float]:
    """The mean of each metric over the lists that define it; one that no list defines is left out.

    All are NaN where a list's scores are not finite, as after a training that has diverged.

    Args:
        measured: :func:`measure` of all lists, ``[N, 6]``.
    """
    values, is_finite = measured[:, :-1], measured[:, -1].bool()
    if not is_finite.all():
        return dict.fromkeys(METRICS, math.nan)
    means = zip(METRICS, values.nanmean(0).tolist(), strict=True)
    return {name: mean for name, mean in means if not math.isnan(mean)}
