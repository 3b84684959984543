"""One table of all methods, for the console, as Markdown and as JSON, and what may be read from it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clip_evaluation import metrics
from rich import box
from rich.console import Console
from rich.table import Table

from .evaluate import TASKS, Scores

_HEADS = {
    "image_to_text": ("image → text", metrics.RETRIEVAL_KS, "R@"),
    "text_to_image": ("text → image", metrics.RETRIEVAL_KS, "R@"),
    "subgroup": ("sub-group", metrics.CLASS_KS, "top-"),
    "group": ("group", metrics.CLASS_KS, "top-"),
}
_STYLES = {"color": "Colour", "line": "Line art"}
_LABELS = {"clip": "CLIP", "rankclip": "RankCLIP"}

CHANCE = "chance"
KNN = "untrained pixel kNN"


def label_of(loss: str) -> str:
    """Return a loss's name as the table prints it."""
    return _LABELS.get(loss, loss)


@dataclasses.dataclass(frozen=True)
class Block:
    """The results on the held-out concepts in one style.

    Attributes:
        style: ``color`` or ``line``.
        n: Number of concepts.
        subgroups: Number of sub-groups to choose from.
        groups: Number of groups to choose from.
        rows: The scores of each method, in the order of the table.
    """

    style: str
    n: int
    subgroups: int
    groups: int
    rows: dict[str, Scores]

    @property
    def title(self) -> str:
        """The heading of the block, with n."""
        return f"{_STYLES[self.style]}, n = {self.n}"


def _heading(task: str) -> str:
    name, ks, prefix = _HEADS[task]
    return f"{name} {prefix}{'/'.join(map(str, ks))}"


def _cell(values: dict[int, float]) -> str:
    return "/".join(f"{value:.1f}" for value in values.values())


def notes(blocks: Sequence[Block]) -> list[str]:
    """Say in plain words what the numbers show and what they cannot show."""
    lines = []
    colour = blocks[0]
    trained = [name for name in colour.rows if name not in (CHANCE, KNN)]
    for name in trained:
        ratios = [
            f"{task.replace('_to_', ' → ')} "
            + ", ".join(
                f"{colour.rows[name][task][k] / colour.rows[CHANCE][task][k]:.0f}× at R@{k}" for k in (1, 10)
            )
            for task in ("image_to_text", "text_to_image")
        ]
        lines.append(f"{name} against chance, in colour: {'; '.join(ratios)}.")
    if trained:
        lines.append(_against_knn(blocks, trained))
    n = colour.n
    lines.append(
        f"Standard error of one number (binomial, n = {n}): ±{metrics.standard_error(10, n):.1f} points at "
        f"10 %, ±{metrics.standard_error(35, n):.1f} at 35 %. This is one split and one training seed: it "
        "cannot separate losses that differ by less than about 3 points."
    )
    lines.append(
        "Pixel kNN compares raw pixels with the training pictures; their captions' words rank the captions, "
        "their classes vote on the class. It needs those labels; zero-shot uses the class's name only. "
        "Zero-shot means emojis never seen, of classes whose names occur in training captions."
    )
    return lines


def _against_knn(blocks: Sequence[Block], trained: Sequence[str]) -> str:
    """Count, from the numbers, where the untrained baseline is ahead on retrieval."""
    parts = []
    for block in blocks:
        for name in trained:
            pairs = [
                (block.rows[KNN][task][k], block.rows[name][task][k])
                for task in ("image_to_text", "text_to_image")
                for k in metrics.RETRIEVAL_KS
            ]
            ahead = sum(round(knn, 1) > round(value, 1) for knn, value in pairs)
            where = "in colour" if block.style == "color" else "on line art"
            parts.append(f"{name} {where} on {ahead} of {len(pairs)}")
    return (
        "Untrained pixel kNN beats the trained model on retrieval scores: " + "; ".join(parts) + "."
        if any(not part.endswith(f"on 0 of {len(pairs)}") for part in parts)
        else "Untrained pixel kNN beats the trained models on none of the retrieval scores."
    )


def show(blocks: Sequence[Block], console: Console) -> None:
    """Print the table and the notes."""
    # The first column may wrap, so that the whole table fits a terminal of 80 columns.
    table = Table(
        title="Held-out emojis, percent", title_style="bold", box=box.SIMPLE, padding=0, show_edge=False
    )
    table.add_column("method")
    for task in TASKS:
        name, ks, prefix = _HEADS[task]
        table.add_column(f"{name}\n{prefix}{'/'.join(map(str, ks))}", justify="right", no_wrap=True)
    for block in blocks:
        table.add_row(f"[bold]{block.title}[/bold]", *[""] * len(TASKS))
        for i, (name, scores) in enumerate(block.rows.items()):
            table.add_row(
                name,
                *[_cell(scores[task]) for task in TASKS],
                style="" if name not in (CHANCE, KNN) else "dim",
                end_section=i == len(block.rows) - 1,
            )
    console.print(table)
    for line in notes(blocks):
        console.print(f"• {line}", markup=False, highlight=False)


def markdown(blocks: Sequence[Block]) -> str:
    """Return the table and the notes as Markdown."""
    lines = ["# Held-out emojis, percent", ""]
    lines.append("| method | " + " | ".join(_heading(task) for task in TASKS) + " |")
    lines.append("|---|" + "---:|" * len(TASKS))
    for block in blocks:
        lines.append(f"| **{block.title}** |" + " |" * len(TASKS))
        for name, scores in block.rows.items():
            lines.append(f"| {name} | " + " | ".join(_cell(scores[task]) for task in TASKS) + " |")
    lines += ["", *[f"- {line}" for line in notes(blocks)], ""]
    return "\n".join(lines)


def save(blocks: Sequence[Block], conditions: dict[str, Any], folder: Path) -> None:
    """Write ``results.md`` and ``results.json``."""
    (folder / "results.md").write_text(markdown(blocks), encoding="utf-8")
    results = {
        "conditions": conditions,
        "results": [dataclasses.asdict(block) for block in blocks],
        "notes": notes(blocks),
    }
    text = json.dumps(results, indent=2, ensure_ascii=False) + "\n"
    (folder / "results.json").write_text(text, encoding="utf-8")
