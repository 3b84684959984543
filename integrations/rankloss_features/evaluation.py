"""The evaluation of a model on pairs: recall, its intervals, its difference from another model's.

::

    data = open_data(args)
    pairs = Pairs.of(data)
    rows = encode_rows(teacher, data, batch_size=64)
    encoded = pairs.with_pictures(rows.pictures).encoded(rows.features)
    result = measure(encoded, (1, 5, 10), by_ids=False)
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm  # type: ignore[import-untyped]

from rankloss.metrics import modality_gap, partner_ranks, rank_agreement
from rankloss_features.data import Data, groups_of
from rankloss_features.folder import NAMES, hashes_of_pairs
from rankloss_features.teachers import Batches, Teacher

RESAMPLES = 2000
"""Resamples of a bootstrap interval."""

_ANCHORS = 1000  # pairs whose rankings are compared
_IMAGES, _TEXTS = NAMES

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Encoded:
    """The distinct pictures and texts of some pairs, encoded.

    Attributes:
        image_features: ``[N, D]``, in the order in which the pictures first stand in the data.
        text_features: ``[M, D]``, likewise.
        image_ids: ``[N]``, the group of each picture, counted from 0 in the order of the data.
        text_ids: ``[M]``, that of each text.
        pair_texts: ``[N]``, the first text of each picture.
        repeated: The number of texts whose caption an earlier text, of another group, has.
        identity: A hash of pictures, captions and ids.
    """

    image_features: Tensor
    text_features: Tensor
    image_ids: Tensor
    text_ids: Tensor
    pair_texts: Tensor
    repeated: int
    identity: str

    def groups(self, way: str) -> NDArray[np.int64]:
        """The group of each query of a direction, ``image_to_text`` say: of each picture, or of each text."""
        ids = self.image_ids if way.startswith("image") else self.text_ids
        return ids.numpy()


@dataclass(frozen=True)
class Pairs:
    """Pairs of a picture and a caption, and what belongs together.

    Attributes:
        captions: The caption of each row.
        names: The name of each row's picture.
        pictures: The picture of each row, where equal values are one picture: its place in the data, until
            :meth:`with_pictures` knows its content.
        groups: The group of each row: its id, or without ids its picture.
        data: The data, for messages.
        by_ids: True if the data have ids.
    """

    captions: list[str]
    names: list[str]
    pictures: list[str]
    groups: list[Any]
    data: str
    by_ids: bool = False

    @classmethod
    def of(cls, data: Data) -> Pairs:
        """All pairs of some data.

        Raises:
            ValueError: There are none, or a picture has two ids.
        """
        captions, names = list[str](), list[str]()
        for block in data.pairs():
            captions += block.captions
            names += block.names
        place = str(data.about["data"])
        if not captions:
            raise ValueError(f"--data {place} has no pairs of a picture and a caption")
        pictures = data.sources()
        groups = pictures if data.ids is None else data.ids
        return cls(captions, names, pictures, groups, place, by_ids=data.ids is not None)._checked()

    def with_pictures(self, pictures: list[str]) -> Pairs:
        """The same pairs by their pictures' content; without ids a picture is the group of its rows.

        Args:
            pictures: The identity of each row's picture, of :func:`encode_rows`.

        Raises:
            ValueError: A picture has two ids.
        """
        groups = self.groups if self.by_ids else pictures
        return replace(self, pictures=pictures, groups=groups)._checked()

    def _checked(self) -> Pairs:
        """These pairs themselves, once it is sure that all rows of a picture are of one group.

        Raises:
            ValueError: A picture has two ids.
        """
        first_row: dict[str, int] = {}
        for row, picture in enumerate(self.pictures):
            first = first_row.setdefault(picture, row)
            if self.groups[first] != self.groups[row]:
                raise ValueError(
                    f"row {row}: the picture {self.names[row]!r} has the id {self.groups[row]!r} here, and "
                    f"{self.groups[first]!r} in row {first}, as {self.names[first]!r}"
                )
        return self

    def take(self, rows: Sequence[int]) -> Pairs:
        """Some of the pairs."""
        return replace(
            self,
            captions=[self.captions[row] for row in rows],
            names=[self.names[row] for row in rows],
            pictures=[self.pictures[row] for row in rows],
            groups=[self.groups[row] for row in rows],
        )

    def encoded(self, features: Mapping[str, Tensor]) -> Encoded:
        """The distinct pictures and texts of these pairs, with their features.

        A caption that stands in several groups is a text of each of them.

        Args:
            features: ``image_features`` and ``text_features`` of all rows.
        """
        picture_rows, _ = _distinct(self.pictures)
        text_rows, text_of_row = _distinct(list(zip(self.captions, self.groups, strict=True)))
        # The last bits of equal captions may differ by their batches: all have those of the first row.
        caption_rows, caption_of_row = _distinct(self.captions)
        rows_of_text_features = [caption_rows[caption_of_row[row]] for row in text_rows]
        _, group_of_row = _distinct(self.groups)
        digest = hashlib.blake2b(hashes_of_pairs(self.captions, self.pictures).tobytes(), digest_size=16)
        digest.update(repr(group_of_row).encode())
        return Encoded(
            image_features=features[_IMAGES][picture_rows],
            text_features=features[_TEXTS][rows_of_text_features],
            image_ids=torch.tensor([group_of_row[row] for row in picture_rows]),
            text_ids=torch.tensor([group_of_row[row] for row in text_rows]),
            pair_texts=torch.tensor([text_of_row[row] for row in picture_rows]),
            repeated=len(text_rows) - len(caption_rows),
            identity=digest.hexdigest(),
        )


def noun_of_group(ids_key: str | None) -> str:
    """The noun for a group of pairs in messages: a picture, or an id of a column."""
    return "picture" if ids_key is None else f"id of {ids_key!r}"


def _distinct(values: Sequence[Any]) -> tuple[list[int], list[int]]:
    """The first row of each distinct value, and for each row the number of its value, from 0.

    Example:
        >>> _distinct(["a", "b", "a"])
        ([0, 1], [0, 1, 0])
    """
    number_of: dict[Any, int] = {}
    first_rows: list[int] = []
    numbers: list[int] = []
    for row, value in enumerate(values):
        if value not in number_of:
            number_of[value] = len(first_rows)
            first_rows.append(row)
        numbers.append(number_of[value])
    return first_rows, numbers


class EncodedRows(NamedTuple):
    """All rows of some data, encoded.

    Attributes:
        features: ``image_features`` and ``text_features``, ``[rows, width]``, float32.
        pictures: The identity of each row's picture, a hash of its content.
    """

    features: dict[str, Tensor]
    pictures: list[str]


def encode_rows(
    teacher: Teacher, data: Data, *, batch_size: int, workers: int = 0, shows: bool = False
) -> EncodedRows:
    """The features of all pairs, and the identities of their pictures, each of which is read once.

    Args:
        teacher: The model.
        data: The pairs, once they were counted (:meth:`Pairs.of`).
        batch_size: Pairs of a forward pass.
        workers: Processes that read pictures.
        shows: True for a progress bar.

    Raises:
        ValueError: A picture cannot be read.
    """
    rows = sum(data.counts)
    features = {name: torch.empty(rows, encoder.width) for name, encoder in teacher.encoders.items()}
    pictures = [""] * rows
    identity_objects: dict[str, str] = {}  # of equal identities the first, which stands for all in memory
    was_read = torch.zeros(rows, dtype=torch.bool)
    batches = DataLoader(
        Batches(data, groups_of(data, batch_size, [range(rows)]), teacher), None, num_workers=workers
    )
    with tqdm(total=rows, unit="pair", disable=not shows) as bar:
        # A batch is of the rows from first up to end; of these, ``rows_read`` have pictures that can be read.
        for (first, end), rows_read, identities, prepared in batches:
            if rows_read:
                was_read[rows_read] = True
                for row, identity in zip(rows_read, identities, strict=True):
                    pictures[row] = identity_objects.setdefault(identity, identity)
                for name, encoded in teacher.encode(prepared, torch.float32).items():
                    features[name][rows_read] = encoded
            bar.update(end - first)
    unread = (~was_read).nonzero().flatten().tolist()
    if unread:
        raise ValueError(
            f"{len(unread)} of {rows} pictures of {data.about['data']} cannot be read; the first is that of "
            f"sample {unread[0]}"
        )
    return EncodedRows(features, pictures)


# --- measures ---------------------------------------------------------------------------------------------

IN_MODAL = ("image_to_image", "text_to_text")


def measure(encoded: Encoded, ks: Sequence[int], *, by_ids: bool) -> dict[str, Any]:
    """Recall with its intervals, median ranks, rank agreement and modality gap.

    Args:
        encoded: The pictures and texts.
        ks: The numbers of answers.
        by_ids: True if the data have ids: then pictures are also compared with pictures, texts with texts.

    Returns:
        ``recall``: by name, such as ``image_to_text_R@1``, with ``value``, ``low`` and ``high``, the 95 %
        interval, but not for a k above the number of answers within a modality; ``median_rank``, rounded
        down, and ``ranks`` by direction, the latter with None for a query without partner;
        ``cross_modal_tau`` and ``in_modal_tau`` of :func:`rankloss.metrics.rank_agreement`, and
        ``modality_gap``, of each picture and its first text.

    Raises:
        ValueError: k is beyond the number of pictures or texts; features are not finite, or have two widths.
    """
    v, t = encoded.image_features, encoded.text_features
    for k in ks:
        for kind, features in (("pictures", v), ("texts", t)):
            if k > len(features):
                raise ValueError(f"k must be at most the number of {kind}, {len(features)}; got {k}")
    all_ranks = partner_ranks(v, t, image_ids=encoded.image_ids, text_ids=encoded.text_ids)
    ranks = {way: all_ranks[way].numpy() for way in all_ranks if by_ids or way not in IN_MODAL}
    hits = {}
    for way, ranks_of_way in ranks.items():
        # Within a modality a query is no answer to itself.
        answers = len(ranks_of_way) - 1 if way in IN_MODAL else math.inf
        for k in ks:
            if k <= answers:
                hits[f"{way}_R@{k}"] = Scores(hits_within(k, ranks_of_way), encoded.groups(way))
    first_texts = t[encoded.pair_texts]
    agreement = rank_agreement(v, first_texts, max_anchors=_ANCHORS)
    return {
        "recall": means(hits),
        "median_rank": {way: float(np.floor(np.nanmedian(x))) for way, x in ranks.items()},
        "cross_modal_tau": agreement["cross_modal_tau"].item(),
        "in_modal_tau": agreement["in_modal_tau"].item(),
        "modality_gap": modality_gap(v, first_texts).item(),
        "ranks": {way: _integers_or_none(x) for way, x in ranks.items()},
    }


def _integers_or_none(ranks: Floats) -> list[int | None]:
    """Ranks as JSON has them: None without a rank, which is NaN in an array."""
    return [None if math.isnan(rank) else int(rank) for rank in ranks.tolist()]


def differences(encoded: Encoded, result: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """The recall of a result minus that of another model on the same pictures, with intervals.

    Args:
        encoded: The pictures and texts.
        result: Of :func:`measure`.
        other: The same of another model.

    Returns:
        By name as in ``recall``: ``value``, ``low``, ``high``; without the directions that the other has not,
        since it was evaluated without ids.
    """
    scores = {}
    for name in result["recall"]:
        way, _, k = name.rpartition("_R@")
        if way in other["ranks"]:
            ranks = np.array(result["ranks"][way], np.float64)  # None becomes NaN
            ranks_of_other = np.array(other["ranks"][way], np.float64)
            difference = hits_within(int(k), ranks) - hits_within(int(k), ranks_of_other)
            scores[name] = Scores(difference, encoded.groups(way))
    return means(scores)


def hits_within(k: int, ranks: Floats) -> Floats:
    """1 for a rank of at most k, else 0; NaN without a rank."""
    return np.where(np.isnan(ranks), np.nan, ranks <= k)


class Scores(NamedTuple):
    """A score of each query, NaN for one without partner, and the group of each query."""

    values: Floats
    groups: NDArray[np.int64]


def means(scores: Mapping[str, Scores]) -> dict[str, dict[str, float]]:
    """The mean of each score, ``value``, and its 95 % interval, ``low`` and ``high``.

    The percentile bootstrap draws whole groups with their queries, since those depend on each other. All
    scores are of the same draws.
    """
    number_of_groups = 1 + max(int(score.groups.max()) for score in scores.values())
    sums = np.empty((len(scores), number_of_groups))  # of the values of each group's queries
    counts = np.empty_like(sums)  # of these queries
    for place, (values, groups) in enumerate(scores.values()):
        has_value = ~np.isnan(values)
        sums[place] = np.bincount(groups[has_value], values[has_value], number_of_groups)
        counts[place] = np.bincount(groups[has_value], minlength=number_of_groups)
    generator = np.random.default_rng(0)
    resampled_means = np.empty((RESAMPLES, len(scores)))
    for resample in range(RESAMPLES):
        drawn = generator.integers(number_of_groups, size=number_of_groups)
        times = np.bincount(drawn, minlength=number_of_groups).astype(np.float64)
        with np.errstate(invalid="ignore"):  # a draw may have no query of a score
            resampled_means[resample] = (sums @ times) / (counts @ times)
    low, high = np.nanpercentile(resampled_means, [2.5, 97.5], axis=0)
    mean = sums.sum(1) / counts.sum(1)
    return {
        name: {"value": float(mean[place]), "low": float(low[place]), "high": float(high[place])}
        for place, name in enumerate(scores)
    }
