"""One table of all methods, as Markdown and as JSON, and what may be read from it."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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


def _taus(agreement: Agreement) -> tuple[list[str], list[list[str]]]:
    keys = (TRAINING, HELD_OUT)
    rows = [[name, *(f"{tau[key]:.3f}" for key in keys)] for name, tau in agreement.averages.items()]
    return ["method", *(f"{agreement.concepts[key]:,} {key} concepts" for key in keys)], rows


def notes(n: int) -> list[str]:
    """Say in plain words what numbers of n concepts cannot show."""
    errors = {level: metrics.standard_error(level, n) for level in (10, 35)}
    text = page.fill(Path(__file__).with_name("notes.md"), {}, n=n, errors=errors)
    return [line.removeprefix("- ") for line in text.splitlines() if line]


def markdown(blocks: Sequence[Block], agreement: Agreement) -> str:
    """Return the tables and the notes as Markdown."""
    blank = [""] * len(TASKS)
    rows = [row for block in blocks for row in ([f"**{block.title}**", *blank], *block.cells())]
    table = tables.markdown(blocks[0].head(), rows, right=len(TASKS))
    taus = tables.markdown(*_taus(agreement), right=2)
    lines = [f"- {line}" for line in notes(blocks[0].n)]
    return "\n".join([f"# {_TITLE}", "", table, "", f"{_TAU_TITLE}:", "", taus, "", *lines, ""])


def save(blocks: Sequence[Block], agreement: Agreement, conditions: dict[str, Any], folder: Path) -> None:
    """Write ``results.md`` and ``results.json``."""
    (folder / "results.md").write_text(markdown(blocks, agreement), encoding="utf-8")
    results = {
        "conditions": conditions,
        "results": [dataclasses.asdict(block) for block in blocks],
        "tau": agreement.averages,
        "notes": notes(blocks[0].n),
    }
    text = json.dumps(results, indent=2, ensure_ascii=False) + "\n"
    (folder / "results.json").write_text(text, encoding="utf-8")
