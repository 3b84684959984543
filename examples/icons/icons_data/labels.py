"""The labelled sets: categories that icon sets give their icons, as classes to recognise."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from .package import Icon
from .sets import SETS
from .split import SIDES

# Prompts of zero-shot classification; the training texts are made with the same ones.
TEMPLATES = ("{}", "an icon of {}", "{} icon", "a pictogram of {}")


SOURCES: dict[str, dict[str, Any]] = SETS["labelled"]
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
            if icon.set in source["sets"] and len(icon.categories) == 1:
                label = class_name(icon.categories[0])
                if name in SETS["labelled_emojis"] or label not in SETS["vague_categories"]:
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
        index, numbers = ({side: [pair[i] for pair in of] for side, of in chosen.items()} for i in (0, 1))
        made.append(Labelled(name, source.get("shift", ""), classes, index, numbers))
    return made
