"""The study: its trainings seed by seed, and what their records say."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Any

from studies import icons
from studies.photographs.features import FrozenEncoders, cached
from studies.photographs.folder import needed, read
from studies.plan import Find
from studies.records import Record
from studies.report import conditions_texts, marked, mean_text, p_text
from studies.runner import Study
from studies.statistics import Difference, correct, estimate, paired_difference

from .train import CLIP, IGNORE, OWN, RANKCLIP, RECALL, ROWS, SHARE, ZERO_SHOT, Data, Setting

LOSSES = (CLIP, RANKCLIP)
Key = tuple[str, str, str, str]  # cell, loss, use minus OWN, measure


def uses(cell: str) -> tuple[str, ...]:
    """Return the uses of ids that are trained: sharing is OWN where partners have one caption."""
    return (OWN, IGNORE, SHARE) if cell.startswith(ROWS) else (OWN, IGNORE)


def measures(cell: str) -> tuple[str, ...]:
    """Return the measures of a cell."""
    return (RECALL,) if cell.startswith(ROWS) else (RECALL, ZERO_SHOT)


def setting(sizes: SimpleNamespace, cell: str, loss: str, use: str, seed: int) -> Setting:
    """Return the setting of a training."""
    return Setting(cell, f"{loss} {use}", seed, **sizes.cells[cell])


def planned(sizes: SimpleNamespace) -> list[Setting]:
    """Return all trainings, seed by seed."""
    return [
        setting(sizes, cell, loss, use, seed)
        for seed, cell, loss in itertools.product(sizes.seeds, sizes.cells, LOSSES)
        for use in uses(cell)
    ]


def data(sizes: SimpleNamespace, options: argparse.Namespace) -> dict[str, Data]:
    """Return the cells; features of photographs that are missing are computed."""
    cache = None
    if any(cell.startswith(ROWS) for cell in sizes.cells):
        cache = cached(read(needed(options.data)), sizes.train_pictures, FrozenEncoders)

    def built() -> Any:
        return icons.built(options.icons)

    return {"ids": Data([*sizes.cells], sizes.shares, cache, sizes.train_pictures, built, sizes.emojis)}


def tests(sizes: SimpleNamespace, records: Mapping[Setting, Record]) -> dict[Key, Difference]:
    """Return the planned differences to OWN, paired by seed, corrected by Holm over all of them."""

    def values(cell: str, loss: str, use: str, measure: str) -> dict[int, float]:
        of = {seed: records[setting(sizes, cell, loss, use, seed)] for seed in sizes.seeds}
        return {seed: record["metrics"][measure] for seed, record in of.items()}

    return correct(
        {
            (cell, loss, use, m): paired_difference(values(cell, loss, use, m), values(cell, loss, OWN, m))
            for cell, loss in itertools.product(sizes.cells, LOSSES)
            for use, m in itertools.product(uses(cell)[1:], measures(cell))
        }
    )


def matters(found: Mapping[Key, Difference], shares: Mapping[str, float]) -> list[list[str]]:
    """Return for each kind of data and measure the smallest share from which leaving out is above OWN.

    It is above at that share and at every larger one of the kind, with CLIP's loss, after the correction.
    """
    rows = []
    kinds = dict.fromkeys((cell.partition(", ")[0], m) for cell in shares for m in measures(cell))
    for kind, measure in kinds:
        cells = sorted((cell for cell in shares if cell.startswith(kind)), key=lambda cell: -shares[cell])
        above = [found[cell, CLIP, IGNORE, measure] for cell in cells]
        n = next((i for i, d in enumerate(above) if not (d.established and d.mean > 0)), len(cells))
        rows.append([kind, measure, f"from {shares[cells[n - 1]]:.1f} % on" if n else "at none"])
    return rows


def results(sizes: SimpleNamespace, finds: Mapping[str, Find], _: object) -> dict[str, Any]:
    """Return the report's values."""
    records = finds["ids"](planned(sizes))
    found = tests(sizes, records)

    def own(cell: str, loss: str) -> list[Record]:
        return [records[setting(sizes, cell, loss, OWN, seed)] for seed in sizes.seeds]

    shares = {cell: fmean(record["partnered"] for record in own(cell, CLIP)) for cell in sizes.cells}
    rows = []
    for (cell, loss, use, measure), d in sorted(found.items(), key=lambda of: -shares[of[0][0]]):
        mean = estimate([record["metrics"][measure] for record in own(cell, loss)])
        texts = mean_text(mean), use, marked(d), p_text(d.adjusted)
        rows.append([cell, f"{shares[cell]:.1f} %", f"`{loss}`", measure, *texts])
    return {
        "seeds": sizes.seeds,
        "tests": len(found),
        "rows": rows,
        "matters": matters(found, shares),
        "made": conditions_texts(records.values()),
    }


def study(_: str) -> Study:
    """Return the study."""
    return Study(
        folder=Path(__file__).parent,
        setting=Setting,
        plan="plan.yaml",
        records={"ids": "."},
        data=data,
        results=results,
        report="ids",
        packages=("torch", "numpy", "rankloss"),
    )
