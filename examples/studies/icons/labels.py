"""The labelled sets: categories that icon sets give their icons, as classes to recognise."""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import pandas as pd

from . import SETS
from .package import Icon
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
    templates: Sequence[str] = TEMPLATES  # prompts with one {} each


def class_name(category: str) -> str:
    """Return a category as words that fit into a prompt.

    Example:
        >>> class_name("FoodDrink"), class_name("Account / User"), class_name("Animals & Nature")
        ('food drink', 'account and user', 'animals and nature')
    """
    text = re.sub(r"\s*[/&+]\s*", " and ", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", category))
    return " ".join(text.replace("-", " ").lower().split())


def build(icons: Sequence[Icon], sides: Sequence[str]) -> list[Labelled]:
    """Make the labelled sets out of the records.

    Icons with several categories are left out, since only one answer would count as right, and so are classes
    with few icons on either side.
    """
    labels = [class_name(icon.categories[0]) if len(icon.categories) == 1 else None for icon in icons]
    every = pd.DataFrame({"set": [icon.set for icon in icons], "side": sides, "label": labels}).dropna()
    made = []
    for name, source in SOURCES.items():
        rows = every[every["set"].isin(source["sets"])]
        if name not in SETS["labelled_emojis"]:
            rows = rows[~rows["label"].isin(SETS["vague_categories"])]
        counts = pd.crosstab(rows["label"], rows["side"]).reindex(columns=SIDES, fill_value=0)
        classes = counts.index[(counts["train"] >= _MIN_TRAIN) & (counts["test"] >= _MIN_TEST)].tolist()
        if len(classes) < 2:
            continue
        of = {side: rows[rows["label"].isin(classes) & (rows["side"] == side)] for side in SIDES}
        index = {side: part.index.tolist() for side, part in of.items()}
        label = {side: part["label"].map(classes.index).tolist() for side, part in of.items()}
        made.append(Labelled(name, source.get("shift", ""), classes, index, label))
    return made
