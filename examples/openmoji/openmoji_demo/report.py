"""One table of all methods, for the console, as Markdown and as JSON, and what may be read from it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clip_evaluation import metrics
from examples_common import tables
from examples_common.terminal import say
from rich.console import Console

from .agreement import HELD_OUT, TRAINING, Agreement
from .evaluate import TASKS, Scores

_HEADS = {
    "image_to_text": ("image → text", metrics.RETRIEVAL_KS, "R@"),
    "text_to_image": ("text → image", metrics.RETRIEVAL_KS, "R@"),
    "subgroup": ("sub-group", metrics.CLASS_KS, "top-"),
    "group": ("group", metrics.CLASS_KS, "top-"),
}
_STYLES = {"color": "Colour", "line": "Line art"}
_LABELS = {"clip": "CLIP", "rankclip": "RankCLIP"}
_TITLE = "Held-out emojis, percent"
_TAU_TITLE = "Kendall's τ between a picture's ranking of the concepts and its caption's"

CHANCE = "chance"
KNN = "untrained pixel kNN"


def label_of(loss: str) -> str:
    """Return a loss's name as the table prints it."""
    return _LABELS.get(loss, loss)


@dataclasses.dataclass(frozen=True)
class Block:
    """The results on the held-out concepts in one style."""

    style: str  # color or line
    n: int  # number of concepts
    subgroups: int  # number of sub-groups to choose from
    groups: int  # number of groups to choose from
    rows: dict[str, Scores]  # the scores of each method, in the order of the table

    @property
    def title(self) -> str:
        """The heading of the block, with n."""
        return f"{_STYLES[self.style]}, n = {self.n}"

    def cells(self) -> list[list[str]]:
        """Return the rows as text."""
        return [[name, *(_cell(scores[task]) for task in TASKS)] for name, scores in self.rows.items()]


def _cell(values: dict[int, float]) -> str:
    return "/".join(f"{value:.1f}" for value in values.values())


def _head(separator: str) -> list[str]:
    parts = ((name, prefix, "/".join(map(str, ks))) for name, ks, prefix in (_HEADS[task] for task in TASKS))
    return ["method", *(f"{name}{separator}{prefix}{ks}" for name, prefix, ks in parts)]


def notes(blocks: Sequence[Block]) -> list[str]:
    """Say in plain words what the numbers show and what they cannot show."""
    lines = []
    colour = blocks[0]
    trained = [name for name in colour.rows if name not in (CHANCE, KNN)]
    for name in trained:
        own, chance = colour.rows[name], colour.rows[CHANCE]
        ratios = (
            f"{task.replace('_to_', ' → ')} "
            + ", ".join(f"{own[task][k] / chance[task][k]:.0f}× at R@{k}" for k in (1, 10))
            for task in ("image_to_text", "text_to_image")
        )
        lines.append(f"{name} against chance, in colour: {'; '.join(ratios)}.")
    if trained:
        lines.append(_against_knn(blocks, trained))
    if len(trained) > 1:
        lines.append(_apart(colour, trained[0], trained[-1]))
    errors = [f"±{metrics.standard_error(level, colour.n):.1f} points at {level} %" for level in (10, 35)]
    lines.append(
        f"Standard error of one number (binomial, n = {colour.n}): {', '.join(errors)}. This is one split "
        "and one training seed: it cannot separate losses that differ by less than about 3 points."
    )
    lines.append(
        "Pixel kNN compares raw pixels with the training pictures; the words of their captions rank the "
        "captions, and their classes vote. It needs those labels; zero-shot uses the class's name only. "
        "Zero-shot means emojis never seen, of classes whose names occur in training captions."
    )
    return lines


def _apart(block: Block, first: str, last: str) -> str:
    """Say how far two models are apart, and what does not follow."""
    differences = {
        (task, k): block.rows[last][task][k] - block.rows[first][task][k]
        for task in TASKS
        for k in block.rows[last][task]
    }
    (task, k), largest = max(differences.items(), key=lambda item: abs(item[1]))
    ahead = sum(round(difference, 1) > 0 for difference in differences.values())
    name, _, prefix = _HEADS[task]
    return (
        f"{last} is ahead of {first} on {ahead} of {len(differences)} scores in colour. "
        f"They are furthest apart in {name} {prefix}{k}, {largest:+.1f} points. "
        "One training of each is no evidence for either."
    )


def knn_ahead(block: Block, name: str) -> tuple[int, int]:
    """Return on how many retrieval scores the untrained baseline is ahead of a method, and of how many."""
    pairs = [
        (block.rows[KNN][task][k], block.rows[name][task][k])
        for task in ("image_to_text", "text_to_image")
        for k in metrics.RETRIEVAL_KS
    ]
    return sum(round(knn, 1) > round(value, 1) for knn, value in pairs), len(pairs)


def _against_knn(blocks: Sequence[Block], trained: Sequence[str]) -> str:
    where = {"color": "in colour", "line": "on line art"}
    counts = {(name, block.style): knn_ahead(block, name) for block in blocks for name in trained}
    if not any(ahead for ahead, _ in counts.values()):
        return "Untrained pixel kNN beats the trained models on none of the retrieval scores."
    parts = (f"{name} {where[style]} on {ahead} of {n}" for (name, style), (ahead, n) in counts.items())
    return f"Untrained pixel kNN beats the trained model on retrieval scores: {'; '.join(parts)}."


def _tau_head(agreement: Agreement) -> list[str]:
    return ["method", *(f"{agreement.concepts[key]:,} {key} concepts" for key in (TRAINING, HELD_OUT))]


def _tau_rows(agreement: Agreement) -> list[list[str]]:
    return [
        [name, *(f"{by_set[key]:.3f}" for key in (TRAINING, HELD_OUT))]
        for name, by_set in agreement.averages.items()
    ]


def show(blocks: Sequence[Block], agreement: Agreement, console: Console) -> None:
    """Print the tables and the notes."""
    rows = [row for block in blocks for row in ([block.title], *block.cells())]
    tables.show(console, _head("\n"), rows, right=len(TASKS), title=_TITLE)
    tables.show(console, _tau_head(agreement), _tau_rows(agreement), right=2, title=_TAU_TITLE)
    for line in notes(blocks):
        say(console, f"• {line}")


def markdown(blocks: Sequence[Block], agreement: Agreement) -> str:
    """Return the tables and the notes as Markdown."""
    blank = [""] * len(TASKS)
    rows = [row for block in blocks for row in ([f"**{block.title}**", *blank], *block.cells())]
    table = tables.markdown(_head(" "), rows, right=len(TASKS))
    taus = tables.markdown(_tau_head(agreement), _tau_rows(agreement), right=2)
    lines = [f"- {line}" for line in notes(blocks)]
    return "\n".join([f"# {_TITLE}", "", table, "", f"{_TAU_TITLE}:", "", taus, "", *lines, ""])


def save(blocks: Sequence[Block], agreement: Agreement, conditions: dict[str, Any], folder: Path) -> None:
    """Write ``results.md`` and ``results.json``."""
    (folder / "results.md").write_text(markdown(blocks, agreement), encoding="utf-8")
    results = {
        "conditions": conditions,
        "results": [dataclasses.asdict(block) for block in blocks],
        "tau": agreement.averages,
        "notes": notes(blocks),
    }
    text = json.dumps(results, indent=2, ensure_ascii=False) + "\n"
    (folder / "results.json").write_text(text, encoding="utf-8")
