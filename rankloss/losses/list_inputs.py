"""The inputs of a loss of graded lists, and the errors of wrong ones."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import NamedTuple

import torch
from torch import Tensor

from rankloss import checks, precision

_REALS = checks.INTEGERS | {torch.float16, torch.bfloat16, torch.float32, torch.float64}
_REFERENCE = ("reference_query_features", "reference_candidate_features", "reference_scale")


class ListInputs(NamedTuple):
    """The arguments of :meth:`rankloss.RankedLists.forward`."""

    query_features: Tensor
    candidate_features: Tensor
    logit_scale: Tensor | float
    grades: Tensor
    candidate_index: Tensor | None
    mask: Tensor | None
    candidate_ids: Tensor | None
    excluded_ids: Tensor | None
    reference_scores: Tensor | None
    reference_query_features: Tensor | None
    reference_candidate_features: Tensor | None
    reference_scale: Tensor | float | None

    @property
    def tensors(self) -> dict[str, Tensor | None]:
        """The arguments without the two scales; None for those that are not given."""
        return {name: x for name, x in self._asdict().items() if not name.endswith("_scale")}

    @property
    def is_item(self) -> Tensor:
        """``[N, K]``, False at padding."""
        return torch.ones_like(self.grades, dtype=torch.bool) if self.mask is None else self.mask

    def listed(self, features: Tensor) -> Tensor:
        """The rows that are items of a list, ``[items, D]``, list by list; padding has none.

        ``features`` are in the form of ``candidate_features``: ``[N, K, D]``, or with an index ``[M, D]``.
        """
        if self.candidate_index is None:
            return features[self.is_item]
        rows = self.candidate_index[self.is_item].long()
        return features[rows]

    def scaled_reference(self) -> tuple[Tensor | None, Tensor | None]:
        """The frozen model's queries times its scale, ``[N, D']``, and its candidates, ``[M, D']``.

        They have no gradient. Both are None without the model's features.
        """
        queries = self.reference_query_features
        candidates = self.reference_candidate_features
        scale = self.reference_scale
        if queries is None or candidates is None or scale is None:  # they go together, see _check_reference
            return None, None
        dtype = precision.arithmetic_dtype(queries, candidates)
        scale = scale.detach().reshape(()) if isinstance(scale, Tensor) else scale
        return precision.constant(queries).to(dtype) * scale, precision.constant(candidates.flatten(0, -2))

    # --- errors ---------------------------------------------------------------------------------------------

    def check(self, has_negatives: bool) -> None:
        """Raise an error that names the argument unless types, shapes and devices fit.

        Scales must be positive. ``has_negatives`` is True with ``in_batch_negatives``.
        """
        queries = self.query_features
        checks.check_matrix("query_features", queries)
        self._check_of_lists("grades", self.grades, _REALS)
        if self.candidate_index is not None:
            self._check_of_lists("candidate_index", self.candidate_index, checks.INTEGERS)
        if self.mask is not None:
            self._check_of_lists("mask", self.mask, {torch.bool})
        if self.reference_scores is not None:
            self._check_of_lists("reference_scores", self.reference_scores, _REALS)
        _, width = queries.shape
        self._check_candidates("candidate_features", self.candidate_features, width)
        self._check_ids()
        checks.check_scale(self.logit_scale, queries)
        self._check_reference(has_negatives)

    def _check_of_lists(self, name: str, entries: Tensor, dtypes: Collection[torch.dtype]) -> None:
        """Raise an error unless an argument is ``[N, K]``, an entry for every item, of one of the dtypes."""
        checks.check_is_tensor(name, entries)
        n = len(self.query_features)
        is_matrix_of_queries = entries.dim() == 2 and len(entries) == n and entries.numel() > 0
        if not is_matrix_of_queries or entries.shape != self.grades.shape:
            raise ValueError(
                f"{name} must have shape [N, K], with N = {n} queries and K at least 1 as in grades; "
                f"got {tuple(entries.shape)}"
            )
        if entries.dtype not in dtypes:
            choices = " or ".join(sorted(map(str, dtypes)))
            raise ValueError(f"{name} must be of {choices}; got {entries.dtype}")
        checks.check_device(name, entries, self.query_features, "query_features")

    def _check_ids(self) -> None:
        """Raise an error unless ids of candidates are integers, one each; excluded ids need them."""
        ids = self.candidate_ids
        if ids is not None:
            checks.check_is_tensor("candidate_ids", ids)
            shape = self.candidate_features.shape[:-1]
            if ids.shape != shape or ids.dtype not in checks.INTEGERS:
                needed = f"integers of shape {tuple(shape)}"
                raise ValueError(f"candidate_ids must be {needed}; got {ids.dtype} {tuple(ids.shape)}")
            checks.check_device("candidate_ids", ids, self.query_features, "query_features")
        if self.excluded_ids is not None:
            checks.check_ids("excluded_ids", self.excluded_ids, self.query_features)
            if ids is None:
                raise ValueError("excluded_ids are ids of candidates, and need candidate_ids")

    def _check_candidates(self, name: str, features: Tensor, width: int) -> None:
        """Raise an error unless features of the candidates, by the model or the frozen one, have their shape.

        It is ``[N, K, width]``, features of every item of the lists, or with ``candidate_index``
        ``[M, width]``, of every row of ``candidate_features``, to which the index points.
        """
        checks.check_is_tensor(name, features)
        has_index = self.candidate_index is not None
        shape_of_items = self.candidate_features.shape[:1] if has_index else self.grades.shape
        if features.shape != (*shape_of_items, width):
            raise ValueError(
                f"{name} must have shape [N, K, D] = {(*self.grades.shape, width)}, or [M, D] with "
                f"candidate_index; got {tuple(features.shape)}"
            )
        checks.check_matrix(name, features.flatten(0, -2))
        checks.check_device(name, features, self.query_features, "query_features")

    def _check_reference(self, has_negatives: bool) -> None:
        """Raise an error unless a frozen model's scores, or its features and scale, or neither are given."""
        names_given = [name for name in _REFERENCE if getattr(self, name) is not None]
        if self.reference_scores is not None and names_given:
            raise ValueError(f"reference_scores and {names_given[0]} are two references; give one")
        if self.reference_scores is not None and has_negatives:
            raise ValueError(
                "reference_scores are of a query's own candidates; with in_batch_negatives give "
                f"{', '.join(_REFERENCE)}"
            )
        if not names_given:
            return
        if len(names_given) < len(_REFERENCE):
            raise ValueError(f"{', '.join(_REFERENCE)} go together; got {' and '.join(names_given)} alone")
        assert self.reference_query_features is not None
        assert self.reference_candidate_features is not None
        assert self.reference_scale is not None
        self._check_reference_features(self.reference_query_features, self.reference_candidate_features)
        self._check_reference_scale(self.reference_scale)

    def _check_reference_features(self, queries: Tensor, candidates: Tensor) -> None:
        """Raise an error unless a frozen model's features are those of the same queries and candidates."""
        checks.check_matrix("reference_query_features", queries)
        if len(queries) != len(self.query_features):
            raise ValueError(
                f"reference_query_features must have one row per query, {len(self.query_features)}; got "
                f"shape {tuple(queries.shape)}"
            )
        checks.check_device("reference_query_features", queries, self.query_features, "query_features")
        dimension = queries.shape[1]
        self._check_candidates("reference_candidate_features", candidates, dimension)

    def _check_reference_scale(self, scale: Tensor | float) -> None:
        """Raise an error unless a frozen model's scale is one positive number; its value is read on a CPU."""
        checks.check_is_number("reference_scale", scale, self.query_features)
        if isinstance(scale, Tensor):
            if not scale.is_cpu:  # an accelerator's number is not waited for
                return
            scale = scale.detach()
        if not 0 < scale < math.inf:
            raise ValueError(f"reference_scale must be positive and finite; got {float(scale):g}")

    def refuse_wrong_places_and_references(self) -> None:
        """Raise a ValueError for an empty list, an index out of range, or a reference that is not finite."""
        if (row := first_row(~self.is_item.any(-1))) is not None:
            raise ValueError(f"mask must leave a candidate in every list; row {row} has none")
        index = self.candidate_index
        rows = len(self.candidate_features)
        if index is not None:
            self.refuse("candidate_index", (index < 0) | (index >= rows), f"at least 0 and less than {rows}")
        if self.reference_scores is not None:
            self.refuse("reference_scores", ~self.reference_scores.isfinite(), "finite")
        if self.reference_query_features is not None:
            row = first_row(~self.reference_query_features.isfinite().all(-1))
            if row is not None:
                raise ValueError(f"reference_query_features must be finite; row {row} is not")
        if self.reference_candidate_features is not None:
            self._refuse_infinite_candidates(self.reference_candidate_features)

    def _refuse_infinite_candidates(self, features: Tensor) -> None:
        """Raise a ValueError for an item whose features by a frozen model have NaN or infinity.

        It shows the item's row of ``[M, D']``, or without an index its list and its place there.
        """
        is_wrong = ~features.isfinite().all(-1)
        rows = self._rows_of_items()
        is_wrong_item = self.is_item & (is_wrong if rows is None else is_wrong[rows])
        places = is_wrong_item.nonzero().tolist()
        if places:
            n, k = places[0]
            found = f"candidate {k} of row {n} is not" if rows is None else f"row {int(rows[n, k])} is not"
            raise ValueError(f"reference_candidate_features must be finite; {found}")

    def refuse_two_grades_of_one_candidate(self) -> None:
        """Raise a ValueError for a candidate that is twice in a list, with two grades."""
        candidates = self._identities()
        if candidates is None:
            return
        is_item = self.is_item
        first_item = is_item.byte().argmax(-1, keepdim=True)  # padding is this item once more
        candidates = candidates.where(is_item, candidates.gather(1, first_item))
        grades = self.grades.where(is_item, self.grades.gather(1, first_item))
        candidates, order = candidates.sort(-1)
        grades = grades.gather(1, order)
        # Equal candidates now stand beside each other: each is compared with the one before it.
        is_same_candidate = candidates[:, 1:] == candidates[:, :-1]
        is_other_grade = grades[:, 1:] != grades[:, :-1]
        is_wrong = is_same_candidate & is_other_grade
        if (row := first_row(is_wrong)) is not None:
            place = int(is_wrong[row].byte().argmax())
            both_grades = grades[row, place : place + 2].tolist()
            raise ValueError(
                f"grades must be one of each candidate; row {row} has one twice, with {both_grades}"
            )

    def _identities(self) -> Tensor | None:
        """Integers ``[N, K]``, equal for equal candidates; None if nothing tells which are equal."""
        rows, ids = self._rows_of_items(), self.candidate_ids
        if rows is None:
            return ids
        return rows if ids is None else ids[rows]

    def _rows_of_items(self) -> Tensor | None:
        """The index ``[N, K]``, 0 at padding, where it may be out of range; None without an index."""
        index = self.candidate_index
        return None if index is None else index.long().masked_fill(~self.is_item, 0)

    def refuse(self, name: str, is_wrong: Tensor, needed: str) -> None:
        """Raise a ValueError that shows the first list in which an argument has wrong values, if any.

        ``is_wrong`` is ``[N, K]``; at padding it counts nothing.
        """
        is_wrong = self.is_item & is_wrong
        if (row := first_row(is_wrong)) is not None:
            values = getattr(self, name)[row][is_wrong[row]].tolist()
            raise ValueError(f"{name} must be {needed}; row {row} has {values}")


def first_row(is_wrong: Tensor) -> int | None:
    """The first row of ``[n]`` or ``[n, K]`` that has True, or None."""
    places = is_wrong.nonzero()
    return int(places[0, 0]) if len(places) else None
