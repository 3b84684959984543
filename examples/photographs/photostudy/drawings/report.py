"""The report of part 2c, from its records."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from examples_common.statistics import Difference
from examples_common.wording import (
    conditions_texts,
    mean_text,
    test_cells,
    too_early,
    write_report,
)

from photostudy import figure
from photostudy.plan import Find
from photostudy.students.plan import CLIP, RANKS
from photostudy.students.report import search_rows, tries_row, values_text

from .findings import Findings, findings
from .plan import COMPARISONS, GRIDS, SETS, Plan


def write(
    sizes: Plan,
    finds: Mapping[str, Find],
    folder: Path,
    photographs: Mapping[str, Difference | None],
) -> Path:
    """Write the report and return its path.

    Args:
        sizes: The plan.
        finds: Find the records of each data set.
        folder: Of the report.
        photographs: Part 2a's differences to CLIP by arm, for the figure.
    """
    found, seeds = findings(sizes, finds), len(sizes.seeds)
    panels = {name: {arm: found.tests.get((name, (arm, CLIP))) for arm in GRIDS} for name in SETS}
    has_photographs = any(photographs.values())
    if has_photographs:
        panels = {"photographs": dict(photographs), **panels}
    tests = {pair: [found.tests.get((name, pair)) for name in SETS] for pair in COMPARISONS}
    return write_report(
        folder / "part2c.md",
        Path(__file__).with_name("report.md"),
        sizes=sizes,
        missing=found.missing,
        alt=figure.write(folder / "part2c.png", panels),
        photographs=has_photographs,
        conclusions=conclusions(found, seeds),
        arms=[
            [f"`{arm}`", *(mean_text(found.estimate(name, arm), seeds) for name in SETS)]
            for arm in found.records[SETS[0]]
        ],
        tests=[
            [f"`{arm}`", f"`{other}`", *(cell for d in ds for cell in test_cells(d))]
            for (arm, other), ds in tests.items()
        ],
        tests_head=["arm", "minus", *(cell for name in SETS for cell in (name, "p", ""))],
        clip=[[name, *row] for name in SETS for row in search_rows(found.searches[name])],
        tries=[tries_row(arm, choice) for arm, choice in found.choices.items()],
        variants=[
            [f"`{arm}`", *(f"{of[name]:.2f}" for name in SETS)] for arm, of in found.variants.items()
        ],
        made=conditions_texts(
            one for arms in found.records.values() for of in arms.values() for one in of.values()
        ),
    )  # fmt: skip


def conclusions(found: Findings, seeds: int) -> list[str]:
    """Return the plan's sentences for the findings; none before all trainings are there."""
    if (early := too_early(seeds, missing=found.missing > 0)) is not None:
        return early
    ranks = found.choices[RANKS]
    chosen = values_text({name: ranks.chosen[name] for name in ranks.fields})
    said = [f"The weights of `rankclip-distill`: {chosen}."]
    said += [f"`{arm}` is ahead of `{RANKS}` on both dev sides." for arm in found.better_variants]
    helps = found.established((RANKS, CLIP), 1)
    said.append(f"Ranks help on {' and '.join(helps)}." if helps else "Ranks are not shown to help.")
    for arm, _ in (pair for pair in COMPARISONS if pair[1] == RANKS):
        for sign, word in ((1, "above"), (-1, "below")):
            if names := found.established((arm, RANKS), sign):
                said.append(f"`{arm}` is {word} `{RANKS}` on {' and '.join(names)}.")
    rivals = ", ".join(f"`{arm}`" for arm in found.candidates) or "none"
    said.append(f"Rivals that replace ranks if they are above them on photographs: {rivals}.")
    return said
