"""Scores of a record: every row of the exhibits, and its name for people."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from studies.icons import split
from studies.icons.labels import SOURCES

# Display names of what records and settings name.
NAMES = yaml.safe_load(Path(__file__).with_name("names.yaml").read_text(encoding="utf-8"))
LOSS_NAMES, BACKBONE_NAMES = NAMES["losses"], NAMES["backbones"]

# The labelled sets of the icons whose styles are trained on: the ten sets.
LABELLED_SETS = tuple(name for name, source in SOURCES.items() if "shift" not in source)
# Every shift, with its labelled set; the silhouettes have no categories, so no classes to recognise.
SHIFTS = {
    shift: next((name for name, source in SOURCES.items() if source.get("shift") == shift), None)
    for shift in split.SHIFTS
}
TOPS = ("top-1", "top-3", "top-5")
RECALLS = ("R@1", "R@5", "R@10")


@dataclasses.dataclass(frozen=True)
class Measure:
    """A number of a model: the mean of one or several entries of its record."""

    group: str  # such as "Image → text"
    label: str  # its name in the group, such as R@1
    entries: tuple[tuple[str, str], ...]  # task and metric of each entry that is averaged
    percent: bool = True  # a percentage; higher is better

    @property
    def name(self) -> str:
        """Group and label in one."""
        return f"{self.group}, {self.label}"

    def __call__(self, record: Mapping[str, Any], part: str = "metrics") -> float | None:
        """Read it from a record's ``metrics`` or ``chance``; None if an entry is missing."""
        found: list[Any] = [record[part].get(task, {}).get(metric) for task, metric in self.entries]
        return sum(found) / len(found) if found and None not in found else None

    def items(self, record: Mapping[str, Any]) -> int | None:
        """Count the held-out items behind it; None if that was not recorded."""
        found = [record["items"].get(task) for task in dict.fromkeys(task for task, _ in self.entries)]
        return sum(found) if found and None not in found else None


def zero_shot(sets: Sequence[str]) -> list[Measure]:
    """Top-1, -3 and -5 of zero-shot classification, averaged over labelled sets."""
    group = f"Zero-shot, mean of {len(sets)} sets"
    return [Measure(group, top, tuple((f"zero-shot/{s}", top) for s in sets)) for top in TOPS]


def retrieval() -> list[Measure]:
    """Recall in both directions among the held-out concepts."""
    return [
        Measure(name, recall, (("retrieval/test", f"{direction} {recall}"),))
        for direction, name in NAMES["directions"].items()
        for recall in RECALLS
    ]


def retrieval_both_ways(recall: str, where: str = "test", group: str = "Retrieval") -> Measure:
    """The mean of a recall in both directions, as the paper's Figure 3 has it."""
    entries = tuple((f"retrieval/{where}", f"{direction} {recall}") for direction in NAMES["directions"])
    return Measure(group, f"{recall}, both ways", entries)


def shifts(tasks: Sequence[str]) -> list[Measure]:
    """Zero-shot accuracy and recall under every shift, as far as records have the tasks."""
    found = []
    for shift, labelled in SHIFTS.items():
        name = NAMES["shifts"][shift]
        if f"zero-shot/{labelled}" in tasks:
            found += [Measure(name, f"zero-shot {top}", ((f"zero-shot/{labelled}", top),)) for top in TOPS]
        if f"retrieval/{shift}" in tasks:
            found.append(retrieval_both_ways("R@10", shift, name))
    return found


def probes(sets: Sequence[str]) -> list[Measure]:
    """Linear-probe accuracy of every labelled set, and the mean."""
    return [*(_probe(s, [s]) for s in sets), *mean_probe(sets)]


def mean_probe(sets: Sequence[str]) -> list[Measure]:
    """The mean linear-probe accuracy; nothing where there is no set."""
    return [_probe(f"mean of {len(sets)} sets", sets)] if sets else []


def _probe(label: str, sets: Sequence[str]) -> Measure:
    return Measure("Linear probe", label, tuple((f"probe/{name}", "top-1") for name in sets))


def geometry() -> list[Measure]:
    """The modality gap and its relatives, as rankloss.metrics defines them."""
    return [
        Measure("Embeddings", label, (("geometry/test", key),), percent=False)
        for key, label in NAMES["geometry"].items()
    ]


def agreement() -> list[Measure]:
    """The agreement of the rankings with the teacher's."""
    return [
        Measure("Agreement with the teacher", label, (("teacher/test", key),), percent=False)
        for key, label in (("cross_modal_tau", "cross-modal (τ)"), ("in_modal_tau", "in-modal (τ)"))
    ]
