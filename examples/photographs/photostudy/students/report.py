"""The report of part 2a, from its records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from examples_common.statistics import Difference
from examples_common.wording import (
    conditions_texts,
    difference_text,
    mark,
    marked,
    mean_text,
    p_text,
    signed,
    too_early,
    write_report,
)

from photostudy import figure
from photostudy.findings import CORRELATION, DIRECTIONS, DRAWN, PRIMARY, SCALE, SECONDARY
from photostudy.plan import Changes, Find, Search

from .findings import Findings, Key, above_ranks, findings, helping, ranks_are_best
from .plan import CLIP, COMPARISONS, GRIDS, RANKS, Choice, Pair, Plan
from .train import Setting

_SHOWN = (PRIMARY, *DIRECTIONS, CORRELATION, SCALE)


def write(sizes: Plan, find: Find, folder: Path, others: Mapping[Key, Difference] | None = None) -> Path:
    """Write the report and return its path; ``others`` are part 2b's planned tests."""
    found = findings(sizes, find, others)
    template, said = Path(__file__).with_name("report.md"), conclusions(found, len(sizes.seeds))
    path = folder / "part2a.md"
    return filled(
        template, path, found, COMPARISONS, sizes=sizes, conclusions=said, clip=search_rows(found.search),
        over=not found.search.due, setting=Setting(CLIP, 0, "dev", **found.search.chosen),
        score=found.search.score,
    )  # fmt: skip


def filled(
    template: Path, path: Path, found: Findings, comparisons: Sequence[Pair], *, sizes: Any, **values: Any
) -> Path:
    """Write a template with the tables of findings, and return its path."""
    seeds = len(sizes.seeds)
    arms = [arm for arm, other in comparisons if other == CLIP]
    panels = {title: {arm: found.difference((arm, CLIP), m) for arm in arms} for m, title in DRAWN.items()}
    return write_report(
        path,
        template,
        sizes=sizes,
        alt=figure.write(path.with_suffix(".png"), panels),
        missing=found.missing,
        tries=[tries_row(arm, one) for arm, one in found.choices.items()],
        measured=any(found.records.values()),
        arms=[
            [f"`{arm}`", *(mean_text(found.estimate(arm, m), seeds, m.digits) for m in _SHOWN), _seconds(of)]
            for arm, of in ((arm, [*of.values()]) for arm, of in found.records.items())
        ],
        arms_head=["arm", *(measure.title for measure in _SHOWN), "training"],
        tests=[
            [f"`{arm}`", f"`{other}`", *_test(found.difference((arm, other)))] for arm, other in comparisons
        ],
        secondary=[
            [
                f"`{arm}` − `{other}`",
                *(marked(found.difference((arm, other), m), m.digits) for m in SECONDARY),
            ]
            for arm, other in comparisons
        ],
        secondary_head=["", *(measure.title for measure in SECONDARY)],
        made=conditions_texts(record for of in found.records.values() for record in of.values()),
        **values,
    )


def conclusions(found: Findings, seeds: int) -> list[str]:
    """Return the plan's sentences for the findings; none before all trainings are there."""
    if (early := too_early(seeds, missing=found.missing > 0)) is not None:
        return early
    helped = helping(found)
    said = [f"`{arm}` helps: {interval(found.difference((arm, CLIP)))}." for arm in helped]
    if rest := [f"`{arm}`" for arm in GRIDS if arm not in helped]:
        said.append(f"Not shown to raise R@10 above plain CLIP's: {', '.join(rest)}.")
    if ranks_are_best(found):
        said.append("**Ranks are the best use of two encoders without a common space, here.**")
    for arm in above_ranks(found):
        said.append(
            f"**`{arm}` retrieves better than `{RANKS}`: {interval(found.difference((arm, RANKS)))}.**"
        )
    recall, people = found.leading(PRIMARY), found.leading(CORRELATION)
    if recall != people:
        said.append(f"Recall is highest with `{recall}`, the correlation with people with `{people}`.")
    return said


def interval(d: Difference) -> str:
    """Return a difference in R@10 with its interval and its p."""
    ends = f"95 % interval {signed(d.low)} to {signed(d.high)}"
    return f"R@10 {signed(d.mean)} points ({ends}, p {p_text(d.adjusted)} after the correction)"


def _test(d: Difference | None) -> list[str]:
    return ["–"] * 4 if d is None else [difference_text(d), p_text(d.p), p_text(d.adjusted), mark(d)]


def _seconds(records: list) -> str:
    return f"{fmean(one['processor_seconds']['training'] for one in records):.0f} s" if records else "–"


def search_rows(search: Search) -> list[list[str]]:
    """Return a row for each try of a search: the factor, the level, its R@10."""
    return [
        [one.factor.replace("_", " "), f"{one.level:g}", f"{_scores(one.scores)}{' (taken)' * one.taken}"]
        for one in search.tries
    ]


def tries_row(arm: str, choice: Choice) -> list[str]:
    """Return an arm's row of tries: its name, the values chosen, and the R@10 of each try."""
    tries = (
        f"{values_text(dict(zip(choice.fields, point, strict=True)))}: {_scores(of.values())}"
        for point, of in choice.tries.items()
    )
    known = choice.chosen
    chosen = values_text({name: known[name] for name in choice.fields}) if known else "not finished"
    return [f"`{arm}`", chosen, "; ".join(tries) or "–"]


def values_text(changes: Changes) -> str:
    """Return the fields of a setting with their values.

    Example:
        >>> values_text({"weight": 8.0, "top_k": 4})
        'weight 8, top k 4'
    """
    return ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in changes.items())


def _scores(scores) -> str:
    return ", ".join(f"{score:.2f}" for score in scores)
