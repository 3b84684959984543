"""The report, from the records."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

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

from .findings import Findings, findings, neighbours_help, orders_help
from .plan import ARMS, COMPARISONS, PRIMARY, SECONDARY, Plan, best
from .train import Setting

_TOGETHER = "listed in batch"


def write(sizes: Plan, stores: Mapping[str, Store], folder: Path) -> Path:
    """Write the report and return its path."""
    finds = {name: finder(store, Setting) for name, store in stores.items() if store.path.is_file()}
    if not finds:
        raise RuntimeError(f"{next(iter(stores.values())).path}: holds no record: nothing to report")
    found = findings(sizes, finds)
    left_out = [name for name in SECONDARY if name not in finds]
    return write_report(
        folder / "orders.md",
        Path(__file__).with_name("report.md"),
        sizes=sizes,
        missing=found.missing + len(left_out) * len(ARMS) * len(sizes.seeds),
        conclusions=conclusions(found, len(sizes.seeds), left_out),
        parts=[_part(found, data, len(sizes.seeds)) for data in finds],
    )


def conclusions(found: Findings, seeds: int, left_out: list[str]) -> list[str]:
    """Return the plan's sentences for the findings; none before all trainings are there."""
    if (early := too_early(seeds, missing=bool(found.missing or left_out))) is not None:
        return early
    orders, neighbours = orders_help(found), neighbours_help(found)
    sampler = "and the sampler" if neighbours else "without the sampler"
    product = f"the folder of orders {sampler}" if orders else "neither the folder of orders nor the sampler"
    return [
        f"**In-batch ranking by ordered ids {_raises(orders)}.**",
        f"With it, drawing batches with neighbours {_raises(neighbours)}.",
        f"By the plan the product gets {product}.",
    ]


def _raises(data: list[str]) -> str:
    return f"raises R@10 on {' and '.join(data)}" if data else "is not shown to raise R@10"


def _part(found: Findings, data: str, seeds: int) -> dict[str, Any]:
    measures = (PRIMARY, SECONDARY[data], _TOGETHER)
    records = found.records[data]
    seconds = {arm: [one["processor_seconds"] for one in of.values()] for arm, of in records.items()}
    arms = [
        [
            f"`{arm}`",
            *(mean_text(found.estimate(data, arm, measure), seeds) for measure in measures),
            f"{fmean(seconds[arm]):.1f} s" if seconds[arm] else "–",
        ]
        for arm in ARMS
    ]
    tests = [
        [
            f"`{arm}`",
            f"`{other}`",
            *test_cells(found.tests.get((data, (arm, other)))),
            *test_cells(found.others.get((data, (arm, other)))),
        ]
        for arm, other in COMPARISONS
    ]
    return {
        "title": data.capitalize(),
        "arms": arms,
        "arms_head": ["arm", PRIMARY, SECONDARY[data], "listed ids in the batch", "training"],
        "tests": tests,
        "tests_head": ["arm", "minus", PRIMARY, "p", "", SECONDARY[data], "p", ""],
        "searches": [
            tries_row(arm, search, best(search), _text) for arm, search in found.searches[data].items()
        ],
        "made": conditions_texts(one for of in records.values() for one in of.values()),
    }


def _text(setting: Setting) -> str:
    parts = [f"smoothing {setting.label_smoothing:g}", f"{setting.lr:g}"]
    if setting.weight:
        parts.append(f"weight {setting.weight:g}{', in-modal too' * setting.in_modal}")
    if setting.neighbours:
        parts.append(f"{setting.neighbours} neighbours")
    return ", ".join(parts)
