"""The labelled sets: categories that icon sets give their icons, as classes to recognise."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Sequence

from .package import Icon
from .split import SIDES

# Prompts of zero-shot classification; the training texts are made with the same ones.
TEMPLATES = ("{}", "an icon of {}", "{} icon", "a pictogram of {}")


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a labelled set comes from."""

    sets: tuple[str, ...]  # icon sets that share one list of categories
    shift: str = ""  # the shift they belong to, if they are never trained on


SOURCES: dict[str, Source] = {
    "emoji": Source(("fluent-emoji-flat", "fluent-emoji-high-contrast", "twemoji")),
    "health": Source(("healthicons",)),
    "icon-park": Source(("icon-park", "icon-park-outline", "icon-park-solid", "icon-park-twotone")),
    "iconmind": Source(("iconmind",)),
    "material-symbols": Source(("material-symbols",)),
    "mdi": Source(("mdi",)),
    "remix": Source(("ri",)),
    "solar": Source(("solar",)),
    "streamline": Source(("streamline", "streamline-color")),
    "ultimate": Source(("streamline-ultimate", "streamline-ultimate-color")),
    "noto": Source(("noto",), "noto"),
    "emojione": Source(("emojione",), "emojione"),
    "pixel": Source(("streamline-pixel",), "pixel-art"),
    "freehand": Source(("streamline-freehand", "streamline-freehand-color"), "hand-drawn"),
}
_EMOJI_SETS = ("emoji", "noto", "emojione")
# Categories that say nothing about what an icon shows.
_VAGUE = {
    "abstract", "action", "actions", "activities", "android", "base", "content", "general", "interface",
    "interface essential", "life", "like", "newicons", "objects", "operate", "others", "other", "parts",
    "symbols", "system", "ui", "ui actions",
}  # fmt: skip
_MIN_TRAIN, _MIN_TEST = 8, 4


@dataclasses.dataclass(frozen=True)
class Labelled:
    """One labelled set; probes are trained on concepts of the training side and tested on held-out ones."""

    name: str
    shift: str  # the shift it belongs to, or nothing
    classes: list[str]
    index: dict[str, list[int]]  # for every side, the records
    label: dict[str, list[int]]  # for every side, the class of every record


def class_name(category: str) -> str:
    """Return a category as words that fit into a prompt.

    Example:
        >>> class_name("FoodDrink"), class_name("Account / User"), class_name("Animals & Nature")
        ('food drink', 'account and user', 'animals and nature')
    """
    text = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", category)
    text = re.sub(r"\s*[/&+]\s*", " and ", text)
    return " ".join(text.replace("-", " ").lower().split())


def build(icons: Sequence[Icon], sides: Sequence[str]) -> list[Labelled]:
    """Make the labelled sets out of the records.

    Icons with several categories are left out, since only one answer would count as right, and so are classes
    with few icons on either side.
    """
    made = []
    for name, source in SOURCES.items():
        rows: list[tuple[int, str]] = []
        for position, icon in enumerate(icons):
            if icon.set in source.sets and len(icon.categories) == 1:
                label = class_name(icon.categories[0])
                if name in _EMOJI_SETS or label not in _VAGUE:
                    rows.append((position, label))
        train = Counter(label for position, label in rows if sides[position] == "train")
        test = Counter(label for position, label in rows if sides[position] == "test")
        classes = sorted(c for c in train if train[c] >= _MIN_TRAIN and test[c] >= _MIN_TEST)
        if len(classes) < 2:
            continue
        column = {label: number for number, label in enumerate(classes)}
        chosen = {
            side: [(p, column[c]) for p, c in rows if c in column and sides[p] == side] for side in SIDES
        }
        index, label = ({side: [pair[i] for pair in of] for side, of in chosen.items()} for i in (0, 1))
        made.append(Labelled(name, source.shift, classes, index, label))
    return made
