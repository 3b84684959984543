"""The records: one line per picture, in the order in which the pictures are stored."""

import dataclasses
import hashlib
import random
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from .labels import TEMPLATES
from .package import Icon
from .split import SHIFTS, SIDES, Split, shift_of

# In the table, list entries are joined by the separator, and flags are 0 or 1.
_SEPARATOR, _LISTS, _FLAGS = "|", ("synonyms", "categories"), ("retrieval", "palette")
_STYLED = 0.5


@dataclasses.dataclass(frozen=True)
class Record:
    """One picture with its words."""

    index: int  # position among the pictures
    set: str  # the prefix of its icon set
    name: str  # in that set
    caption: str  # the name's words, without style, size and numbering
    text: str  # what a model is trained on: the caption, at times with the style, in a template
    style: str  # how it is drawn, or nothing
    concept: str  # the group of concepts that it belongs to; on one side only
    synonyms: tuple[str, ...]  # other captions that its set gives it
    categories: tuple[str, ...]  # of its set
    side: str  # train, validation or test, by its concept
    shift: str  # the shift whose set it is from, or nothing; pictures of a shift are never trained on
    retrieval: bool  # whether it stands for its concept in the retrieval of its side
    palette: bool  # whether its set has colours of its own

    @property
    def captions(self) -> tuple[str, ...]:
        """The caption and its synonyms: each of them is right."""
        return (self.caption, *self.synonyms)


def training_text(icon: Icon, seed: int = 0) -> str:
    """Return the text that an icon is trained with: always the same one for the same seed."""
    rng = random.Random(f"{seed}/{icon.set}/{icon.name}")
    words = icon.caption
    if icon.style and rng.random() < _STYLED:
        words = f"{words}, {icon.style}"
    return rng.choice(TEMPLATES).format(words)


def make(
    icons: Sequence[Icon], split: Split, palettes: Mapping[str, bool], *, seed: int = 0
) -> tuple[list[Record], list[int], dict[str, tuple[int, int]]]:
    """Put the icons that are kept into the order in which they are stored.

    The trained sets come first, one side after the other, then the shifts in the same way; within each
    such block the order is random, so that its first n pictures are a random sample. Also returned are the
    position of each record's icon, and the range of each block, such as ``train`` and ``noto/train``.
    """
    blocks = [f"{shift}/{side}".strip("/") for shift in ("", *SHIFTS) for side in SIDES]
    table = pd.DataFrame(map(vars, icons)).drop(columns="svg")
    table["text"] = [training_text(icon, seed) for icon in icons]
    table["synonyms"] = [tuple(caption for caption, _ in icon.synonyms) for icon in icons]
    table["concept"] = split.group
    table["side"], table["shift"] = table["concept"].map(split.side), table["set"].map(shift_of)
    table["palette"] = table["set"].map(palettes)
    table["block"] = pd.Categorical((table["shift"] + "/" + table["side"]).str.strip("/"), blocks)
    keys = (f"{seed}/{icon.set}/{icon.name}" for icon in icons)
    table["place"] = [hashlib.sha256(key.encode()).hexdigest() for key in keys]
    table = table.loc[split.kept].sort_values(["block", "place"])
    # One picture per concept, so that no query has two right answers. Shifts are only tested on.
    searched = table["block"].isin(["validation", *(block for block in blocks if block.endswith("test"))])
    table["retrieval"] = searched & ~table.duplicated(["block", "concept"])
    sizes = table.groupby("block", observed=True).size()
    ranges = {block: (int(stop - sizes[block]), int(stop)) for block, stop in sizes.cumsum().items()}
    order = table.index.tolist()
    rows = table.drop(columns=["block", "place"]).assign(index=range(len(table))).to_dict("records")
    return [Record(**row) for row in rows], order, ranges


def write_table(path: Path, records: Sequence[Record]) -> None:
    """Write the records as a table with a heading."""
    table = pd.DataFrame(map(vars, records))
    for name in _LISTS:
        table[name] = table[name].map(_SEPARATOR.join)
    table.astype(dict.fromkeys(_FLAGS, int)).to_csv(path, index=False, lineterminator="\n")


def read_table(path: Path) -> list[Record]:
    """Read what :func:`write_table` wrote."""
    table = pd.read_csv(path, dtype=str, na_filter=False).astype({"index": int})
    for name in _LISTS:
        table[name] = [tuple(cell.split(_SEPARATOR)) if cell else () for cell in table[name]]
    for name in _FLAGS:
        table[name] = table[name] == "1"
    return [Record(*row) for row in zip(*(table[name].tolist() for name in table), strict=True)]
