"""One table of all methods, as Markdown and as JSON, and what may be read from it."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import metrics, page, tables
from .evaluate import HELD_OUT, TASKS, TRAINING, Agreement, Found, Scores

HEADS = {
    "image_to_text": "image → text",
    "text_to_image": "text → image",
    "subgroup": "sub-group",
    "group": "group",
}
_STYLES = {"color": "Colour", "line": "Line art"}
_TITLE = "Held-out emojis: how many are found"
_FOUND_TITLE = (
    "In colour, R@10 in percent, mean of image → text and text → image; ± 95 % interval over the emojis"
)
_TASKS_TITLE = "Percent: R@1/5/10 of image → text and text → image, top-1/3/5 of zero-shot classes"
_TAU_TITLE = "Kendall's τ between a picture's ranking of the concepts and its caption's"

CHANCE = "chance"
KNN = "untrained pixel kNN"


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
        """Return the rows as text: a method's name, and its scores at the cut-offs of each task."""
        rows = []
        for name, scores in self.rows.items():
            row = [name]
            for task in TASKS:
                row.append("/".join(f"{value:.1f}" for value in scores[task].values()))
            rows.append(row)
        return rows


def verdict(found: Found) -> str:
    """Return the word for a difference: noise, higher or lower; empty for the first model itself."""
    if found.minus_first is None:
        return ""
    if found.is_noise:
        return "noise"
    return "higher" if found.minus_first > 0 else "lower"


def difference(found: Found) -> str:
    """Return a difference with its interval as text; empty for the first model itself."""
    if found.minus_first is None:
        return ""
    return f"{found.minus_first:+.1f} ± {found.half_width:.1f}".replace("-", "−")


def _table_of_found(found: dict[str, Found]) -> str:
    """Return the share that each model finds, against that of the first."""
    first = next(iter(found))
    rows = []
    for name, of_model in found.items():
        rows.append([name, f"{of_model.percent:.1f}", difference(of_model), verdict(of_model)])
    return tables.markdown(["trained with", "R@10", f"minus {first}", "verdict"], rows, right=3)


def _table_of_taus(agreement: Agreement) -> str:
    """Return the average τ of each model on training and on held-out concepts."""
    head = ["method", *(f"{agreement.concepts[side]:,} {side} concepts" for side in (TRAINING, HELD_OUT))]
    rows = [
        [name, f"{tau[TRAINING]:.3f}", f"{tau[HELD_OUT]:.3f}"] for name, tau in agreement.averages.items()
    ]
    return tables.markdown(head, rows, right=2)


def _table_of_tasks(blocks: Sequence[Block]) -> str:
    """Return the scores of each method at each task, below the title of each block."""
    blank = [""] * len(TASKS)
    rows = []
    for block in blocks:
        rows += [[f"**{block.title}**", *blank], *block.cells()]
    return tables.markdown(["method", *HEADS.values()], rows, right=len(TASKS))


def notes(n: int) -> list[str]:
    """Say in plain words what numbers of n concepts cannot show."""
    errors = {level: metrics.standard_error(level, n) for level in (10, 35)}
    text = page.fill(Path(__file__).with_name("notes.md"), {}, n=n, errors=errors)
    return [line.removeprefix("- ") for line in text.splitlines() if line]


def closing(block: Block, found: dict[str, Found], agreement: Agreement) -> list[str]:
    """Say what to look at, beside the baseline that learns nothing."""
    first = next(iter(found))
    best = max(found, key=lambda name: found[name].percent)
    gain = "" if best == first else f", {difference(found[best])} points against {first}"
    of_pixels = block.rows[KNN]
    pixels = (of_pixels["image_to_text"][10] + of_pixels["text_to_image"][10]) / 2
    lines = [
        f"Look at R@10 of {block.n} unseen emojis: {best} finds most, {found[best].percent:.1f} %{gain}. "
        f"Untrained pixels find {pixels:.1f} %: with so few data they are hard to beat."
    ]
    taus = agreement.averages
    if len(taus) > 1 and best == min(taus, key=lambda name: taus[name][TRAINING]):
        lines.append(
            f"Its τ is the lowest on training concepts ({taus[best][TRAINING]:.2f}; on unseen ones "
            f"{taus[best][HELD_OUT]:.2f}): τ compares whole rankings, R@10 their first ten."
        )
    lines.append(
        "Where pairs are so few, two frozen encoders find more by themselves than a small student: "
        "docs/your_data.md."
    )
    return lines


def markdown(blocks: Sequence[Block], found: dict[str, Found], agreement: Agreement) -> str:
    """Return the tables and the notes as Markdown."""
    parts = [
        f"# {_TITLE}",
        f"{_FOUND_TITLE}:",
        _table_of_found(found),
        f"{_TASKS_TITLE}:",
        _table_of_tasks(blocks),
        f"{_TAU_TITLE}:",
        _table_of_taus(agreement),
        "\n".join(f"- {line}" for line in notes(blocks[0].n)),
    ]
    return "\n\n".join(parts) + "\n"


def save(
    blocks: Sequence[Block],
    found: dict[str, Found],
    agreement: Agreement,
    conditions: dict[str, Any],
    folder: Path,
) -> None:
    """Write ``results.md`` and ``results.json``."""
    (folder / "results.md").write_text(markdown(blocks, found, agreement), encoding="utf-8")
    results = {
        "conditions": conditions,
        "found": {name: dataclasses.asdict(of) | {"is_noise": of.is_noise} for name, of in found.items()},
        "results": [dataclasses.asdict(block) for block in blocks],
        "tau": agreement.averages,
        "notes": notes(blocks[0].n),
    }
    text = json.dumps(results, indent=2, ensure_ascii=False) + "\n"
    (folder / "results.json").write_text(text, encoding="utf-8")
