"""One table of all methods, as Markdown and as JSON, and what may be read from it."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from clip_evaluation import metrics
from examples_common import page, tables

from .evaluate import HELD_OUT, TASKS, TRAINING, Agreement, Scores

_HEADS = {  # of the columns, with what stands before a cut-off
    "image_to_text": ("image → text", "R@"),
    "text_to_image": ("text → image", "R@"),
    "subgroup": ("sub-group", "top-"),
    "group": ("group", "top-"),
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

    @property
    def trained(self) -> list[str]:
        """The methods that are models."""
        return [name for name in self.rows if name not in (CHANCE, KNN)]

    def cells(self) -> list[list[str]]:
        """Return the rows as text."""
        return [
            [name, *("/".join(f"{value:.1f}" for value in scores[task].values()) for task in TASKS)]
            for name, scores in self.rows.items()
        ]

    def head(self) -> list[str]:
        """Return what stands above them."""
        cutoffs = {task: "/".join(map(str, scores)) for task, scores in self.rows[CHANCE].items()}
        return ["method", *(f"{name} {before}{cutoffs[t]}" for t, (name, before) in _HEADS.items())]


def _flat(scores: Scores) -> pd.Series:
    """Return the scores by their names, such as ``image → text R@5``."""
    return pd.Series(
        {" ".join(_HEADS[task]) + str(k): v for task, of in scores.items() for k, v in of.items()}
    )


def apart(block: Block) -> dict[str, Any] | None:
    """Compare the last model with the first one, score by score; None if there is only one."""
    if len(block.trained) < 2:
        return None
    first, last = block.trained[0], block.trained[-1]
    difference = _flat(block.rows[last]) - _flat(block.rows[first])
    where = difference.abs().idxmax()
    ahead = int((difference.round(1) > 0).sum())
    compared = {"first": first, "last": last, "ahead": ahead, "scores": len(difference)}
    return {**compared, "where": where, "points": difference[where]}


def knn_ahead(block: Block, name: str) -> tuple[int, int]:
    """Return on how many retrieval scores the untrained baseline is ahead of a method, and of how many."""
    knn, own = (_flat(block.rows[method]).filter(like="R@").round(1) for method in (KNN, name))
    return int((knn > own).sum()), len(own)


def _taus(agreement: Agreement) -> tuple[list[str], list[list[str]]]:
    keys = (TRAINING, HELD_OUT)
    rows = [[name, *(f"{tau[key]:.3f}" for key in keys)] for name, tau in agreement.averages.items()]
    return ["method", *(f"{agreement.concepts[key]:,} {key} concepts" for key in keys)], rows


def notes(blocks: Sequence[Block]) -> list[str]:
    """Say in plain words what the numbers show and what they cannot show."""
    colour = blocks[0]
    text = page.fill(
        Path(__file__).with_name("notes.md"),
        {},
        blocks=blocks,
        colour=colour,
        chance=colour.rows[CHANCE],
        ahead={(name, block.style): knn_ahead(block, name) for block in blocks for name in block.trained},
        apart=apart(colour),
        errors={level: metrics.standard_error(level, colour.n) for level in (10, 35)},
    )
    return [line.removeprefix("- ") for line in text.splitlines() if line]


def markdown(blocks: Sequence[Block], agreement: Agreement) -> str:
    """Return the tables and the notes as Markdown."""
    blank = [""] * len(TASKS)
    rows = [row for block in blocks for row in ([f"**{block.title}**", *blank], *block.cells())]
    table = tables.markdown(blocks[0].head(), rows, right=len(TASKS))
    taus = tables.markdown(*_taus(agreement), right=2)
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
