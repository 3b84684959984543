"""The report, from the records."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean

from examples_common.records import Store
from examples_common.trainings import finder
from examples_common.wording import (
    conditions_texts,
    mean_text,
    test_cells,
    too_early,
    tries_row,
    write_report,
)

from .findings import Findings, findings
from .plan import COMPARISONS, MEASURES, TEACHERS, Plan, best
from .train import Setting


def write(sizes: Plan, store: Store, folder: Path) -> Path:
    """Write the report and return its path."""
    if not store.path.is_file():
        raise RuntimeError(f"{store.path}: holds no record: nothing to report")
    found, seeds = findings(sizes, finder(store, Setting)), len(sizes.seeds)
    arms = [
        [
            f"`{arm}`",
            *(mean_text(found.estimate(arm, measure), seeds) for measure in MEASURES),
            f"{fmean(one['processor_seconds'] for one in of.values()):.1f} s" if of else "–",
        ]
        for arm, of in found.records.items()
    ]
    tests = [
        [
            f"`{arm}`",
            f"`{other}`",
            *(cell for m in MEASURES for cell in test_cells(found.tests.get((m, (arm, other))))),
        ]
        for arm, other in COMPARISONS
    ]
    return write_report(
        folder / "finetuning.md",
        Path(__file__).with_name("report.md"),
        sizes=sizes,
        missing=found.missing,
        conclusions=conclusions(found, seeds),
        arms=arms,
        tests=tests,
        tests_head=["arm", "minus", *(cell for measure in MEASURES for cell in (measure, "p", ""))],
        searches=[tries_row(arm, search, best(search), _text) for arm, search in found.searches.items()],
        made=conditions_texts(one for of in found.records.values() for one in of.values()),
    )


def conclusions(found: Findings, seeds: int) -> list[str]:
    """Return the plan's sentences for the findings; none before all trainings are there."""
    if (early := too_early(seeds, missing=found.missing > 0)) is not None:
        return early
    return [
        f"`{arm}` {'beats' if found.helps(arm) else 'is not shown to beat'} both baselines in the mean of "
        "what is kept and what is learned."
        for arm in TEACHERS
    ]


def _text(setting: Setting) -> str:
    parts = [f"{setting.epochs} epochs", f"{setting.lr:g}"]
    if setting.weight:
        parts.append(f"weight {setting.weight:g}")
    if setting.share < 1:
        parts.append(f"share {setting.share:g}")
    return ", ".join(parts)
