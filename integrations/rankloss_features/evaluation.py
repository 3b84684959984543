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
        repeated: The captions that stand beside pictures of several groups.
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
        """The groups of a direction's queries."""
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
        """The distinct pictures and texts, of the features of all rows.

        A caption that stands in several groups is a text of each.
        """
        image_features, text_features = features[_IMAGES], features[_TEXTS]
        pictures, _ = _distinct(self.pictures)
        texts, of_text = _distinct(list(zip(self.captions, self.groups, strict=True)))
        # The last bits of equal captions may differ by their batches: each has those of its first row.
        first_of_caption = {caption: row for row, caption in reversed([*enumerate(self.captions)])}
        numbers = {group: number for number, group in enumerate(dict.fromkeys(self.groups))}
        digest = hashlib.blake2b(hashes_of_pairs(self.captions, self.pictures).tobytes(), digest_size=16)
        digest.update(repr([numbers[group] for group in self.groups]).encode())
        return Encoded(
            image_features=image_features[pictures],
            text_features=text_features[[first_of_caption[self.captions[row]] for row in texts]],
            image_ids=torch.tensor([numbers[self.groups[row]] for row in pictures]),
            text_ids=torch.tensor([numbers[self.groups[row]] for row in texts]),
            pair_texts=torch.tensor([of_text[row] for row in pictures]),
            repeated=len(texts) - len(first_of_caption),
            identity=digest.hexdigest(),
        )


def _distinct(values: Sequence[Any]) -> tuple[list[int], list[int]]:
    """The first row of each distinct value, and the number of the value of each row."""
    number: dict[Any, int] = {}
    first: list[int] = []
    of_row = []
    for row, value in enumerate(values):
        if value not in number:
            number[value] = len(first)
            first.append(row)
        of_row.append(number[value])
    return first, of_row


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
    known: dict[str, str] = {}  # equal identities are one object
    was_read = torch.zeros(rows, dtype=torch.bool)
    batches = DataLoader(
        Batches(data, groups_of(data, batch_size, [range(rows)]), teacher), None, num_workers=workers
    )
    with tqdm(total=rows, unit="pair", disable=not shows) as bar:
        for (first, last), places, identities, prepared in batches:
            if places:
                was_read[places] = True
                for row, identity in zip(places, identities, strict=True):
                    pictures[row] = known.setdefault(identity, identity)
                for name, encoded in teacher.encode(prepared, torch.float32).items():
                    features[name][places] = encoded
            bar.update(last - first)
    if not bool(was_read.all()):
        lost = (~was_read).nonzero().flatten().tolist()
        raise ValueError(
            f"{len(lost)} of {rows} pictures of {data.about['data']} cannot be read; the first is that of "
            f"sample {lost[0]}"
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
        interval; ``median_rank`` and ``ranks`` by direction, the latter with None for a query without
        partner; ``cross_modal_tau`` and ``in_modal_tau`` of :func:`rankloss.metrics.rank_agreement`, and
        ``modality_gap``, of each picture and its first text.

    Raises:
        ValueError: k is beyond the number of pictures or texts; features are not finite, or have two widths.
    """
    v, t = encoded.image_features, encoded.text_features
    for k in ks:
        for kind, features in (("pictures", v), ("texts", t)):
            if k > len(features):
                raise ValueError(f"k must be at most the number of {kind}, {len(features)}; got {k}")
    by_way = partner_ranks(v, t, image_ids=encoded.image_ids, text_ids=encoded.text_ids)
    ranks = {way: x.numpy() for way, x in by_way.items() if by_ids or way not in IN_MODAL}
    hits = {
        f"{way}_R@{k}": Scores(hits_within(k, of_way), encoded.groups(way))
        for way, of_way in ranks.items()
        for k in ks
        if way not in IN_MODAL or k < len(of_way)  # a query is no answer to itself
    }
    pairs = v, t[encoded.pair_texts]
    agreement = rank_agreement(*pairs, max_anchors=_ANCHORS)
    return {
        "recall": means(hits),
        "median_rank": {way: float(np.floor(np.nanmedian(of_way))) for way, of_way in ranks.items()},
        "cross_modal_tau": agreement["cross_modal_tau"].item(),
        "in_modal_tau": agreement["in_modal_tau"].item(),
        "modality_gap": modality_gap(*pairs).item(),
        "ranks": {
            way: [None if math.isnan(x) else int(x) for x in of_way.tolist()] for way, of_way in ranks.items()
        },
    }


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
        if way not in other["ranks"]:
            continue
        ours, theirs = (hits_within(int(k), np.array(x["ranks"][way], np.float64)) for x in (result, other))
        scores[name] = Scores(ours - theirs, encoded.groups(way))
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
    number = 1 + max(int(x.groups.max()) for x in scores.values())
    columns = []
    for values, groups in scores.values():
        has_value = ~np.isnan(values)
        counted, kept = groups[has_value], values[has_value]
        columns.append([np.bincount(counted, kept, number), np.bincount(counted, minlength=number)])
    sums, counts = np.array(columns, np.float64).swapaxes(0, 1)  # [scores, groups]
    generator = np.random.default_rng(0)
    drawn = np.empty((RESAMPLES, len(scores)))
    for resample in range(RESAMPLES):
        times = np.bincount(generator.integers(number, size=number), minlength=number).astype(np.float64)
        with np.errstate(invalid="ignore"):  # a draw may have no query of a score
            drawn[resample] = (sums @ times) / (counts @ times)
    low, high = np.nanpercentile(drawn, [2.5, 97.5], axis=0)
    mean = sums.sum(1) / counts.sum(1)
    return {
        name: {"value": float(mean[n]), "low": float(low[n]), "high": float(high[n])}
        for n, name in enumerate(scores)
    }
