"""Split of the icons: every group of related concepts is on one side, and no drawing is used twice.

A concept is on one side only. Two concepts belong together, and so go to the same side, where a set gives
one drawing names of both (aliases), and where two drawings of them look alike: "navaid military" and
"target" are one picture, whatever they are called. So no picture of one side has a twin on another.
"""

import dataclasses
import hashlib
from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd
from scipy.cluster.hierarchy import DisjointSet
from scipy.spatial import cKDTree

from . import SETS
from .names import concept_of
from .package import Icon

SIDES = ("train", "validation", "test")

SHIFTS: dict[str, list[str]] = SETS["shifts"]

VALIDATION = 0.05
TEST = 0.15
TEST_OF_EMOJIS = 1 / 3  # emojis are few, and two of the shifts consist of them
TEST_OF_SHIFTS = 1 / 2  # concepts that no trained set has
_HUB = 100  # larger groups (arrows, plain shapes) are always trained on: in a test they would be one item

ALIKE = 4.0  # root of the mean squared difference of thumbnails, in grey levels of 255
SAME_DRAWING = 16.0  # the same, for drawings of one caption: sizes, weights, copies
_DIRECTIONS = 10
_BLANK = 0.005


@dataclasses.dataclass(frozen=True)
class Split:
    """The icons that are used, and the side of each."""

    kept: list[int]  # positions of the icons that are used
    group: list[str]  # for every icon, the group of its concept
    side: dict[str, str]  # for every group: train, validation or test
    counts: dict[str, int]  # what was left out, and what was joined


def shift_of(prefix: str) -> str:
    """Return the shift that a set belongs to, or an empty string for a set that is trained on."""
    return next((shift for shift, prefixes in SHIFTS.items() if prefix in prefixes), "")


def split(icons: Sequence[Icon], thumbnails: np.ndarray, *, seed: int = 0) -> Split:
    """Put every icon on a side, and drop repeated drawings; other seeds hold out other concepts.

    ``thumbnails`` are averaged pictures, ``uint8 [N, 16, 16, 3]``.
    """
    drawn = (thumbnails < 250).any(axis=-1).mean(axis=(1, 2)) >= _BLANK
    pairs = [(a, b) for a, b in alike_pairs(thumbnails).tolist() if drawn[a] and drawn[b]]
    groups = DisjointSet()
    for icon in icons:
        # Among emojis, a woman and a man walking are one concept; in other sets they may be two.
        words = [(icon.concept, concept_of(icon.caption.split()))]
        for caption, concept in icon.synonyms:
            words += [(icon.concept, concept), (concept, concept_of(caption.split()))]
        for pair in words:
            for concept in pair:
                groups.add(concept)  # has no effect on a known one
            groups.merge(*pair)
    by_name = [groups[icon.concept] for icon in icons]
    joined = 0
    for a, b in pairs:
        joined += by_name[a] != by_name[b]
        groups.merge(icons[a].concept, icons[b].concept)
    group = _named([icon.concept for icon in icons], groups)
    side = {name: _side(of, f"{seed}/{name}") for name, of in pd.Series(icons).groupby(group)}
    kept = _distinct(icons, thumbnails, np.flatnonzero(drawn).tolist())
    counts = {
        "drawn": len(icons),
        "blank": int((~drawn).sum()),
        "same_caption_same_drawing": int(drawn.sum()) - len(kept),
        "alike_pairs": len(pairs),
        "alike_pairs_of_different_concepts": joined,
        "concepts": len({icon.concept for icon in icons}),
        "groups": len(side),
    }
    return Split(kept, group, side, counts)


def alike_pairs(thumbnails: np.ndarray, limit: float = ALIKE) -> np.ndarray:
    """Return all pairs of pictures whose thumbnails differ by less than ``limit``: ``[P, 2]``, ordered.

    Pairs are searched in the ten directions in which the thumbnails differ most, where no distance is
    longer than the true one, and then compared in full.
    """
    flat = thumbnails.reshape(len(thumbnails), -1)
    sample = flat[:: max(1, len(flat) // 20_000)].astype(np.float64)
    mean = sample.mean(axis=0)
    _, vectors = np.linalg.eigh(np.cov((sample - mean).T) if len(sample) > 1 else np.eye(flat.shape[1]))
    directions = vectors[:, -_DIRECTIONS:]
    parts = np.array_split(flat, max(1, len(flat) // 10_000))
    reduced = np.concatenate([(part - mean) @ directions for part in parts])
    radius = limit * np.sqrt(flat.shape[1])
    candidates = cKDTree(reduced).query_pairs(radius, output_type="ndarray")
    candidates = candidates[np.lexsort((candidates[:, 1], candidates[:, 0]))]
    pairs = np.array_split(candidates, max(1, len(candidates) // 50_000))
    close = [_distance(flat[part[:, 0]], flat[part[:, 1]]) < limit for part in pairs]
    return candidates[np.concatenate(close)]


def _distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the root of the mean squared difference, over all axes but the first."""
    difference = a.astype(np.float32) - b.astype(np.float32)
    return np.sqrt((difference**2).mean(axis=tuple(range(1, difference.ndim))))


def _named(concepts: Sequence[str], groups: DisjointSet) -> list[str]:
    """Name every concept's group after its alphabetically first member, whatever the order of joining."""
    first: dict[str, str] = {}
    for concept in sorted(set(concepts)):
        first.setdefault(groups[concept], concept)
    return [first[groups[concept]] for concept in concepts]


def _side(icons: Iterable[Icon], name: str) -> str:
    """Return the side of a group's icons, by a hash of ``name``: its name with the seed.

    The share that is tested on is larger for groups with emojis, and for groups in shifts alone.
    """
    if len({icon.concept for icon in icons}) > _HUB:
        return "train"
    shifts = {shift_of(prefix) for prefix in {icon.set for icon in icons}}
    test = TEST_OF_EMOJIS if shifts & {"noto", "emojione"} else TEST
    if "" not in shifts:
        test = TEST_OF_SHIFTS
    # A number in [0, 1) that depends on the name only.
    draw = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64
    return "test" if draw < test else "validation" if draw < test + VALIDATION else "train"


def _distinct(icons: Sequence[Icon], thumbnails: np.ndarray, positions: Sequence[int]) -> list[int]:
    """Keep the visibly different drawings of each caption.

    The trained sets and every shift are looked through on their own, so that no shift loses items to a
    trained set.
    """
    same: dict[tuple[str, str], list[int]] = defaultdict(list)
    for position in positions:
        icon = icons[position]
        same[shift_of(icon.set), icon.caption].append(position)
    kept: list[int] = []
    for candidates in same.values():
        chosen: list[int] = []
        for position in candidates:
            near = _distance(thumbnails[chosen], thumbnails[position][None])
            if near.min(initial=SAME_DRAWING) >= SAME_DRAWING:
                chosen.append(position)
        kept.extend(chosen)
    return sorted(kept)
