"""The reports of parts 2b and 3, from their records."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from examples_common.statistics import Difference
from examples_common.wording import (
    difference_text,
    mark,
    too_early,
)

from photostudy.findings import CORRELATION, PRIMARY
from photostudy.plan import Find, Search
from photostudy.students.findings import Findings, Key
from photostudy.students.report import filled, interval

from .findings import findings
from .plan import BOTH, CLIP, RANKS, Plan
from .study import of_teacher


def write(sizes: Plan, search: Search, find: Find, folder: Path, others: Mapping[Key, Difference]) -> Path:
    """Write the report of a part and return its path; the arguments are those of the findings."""
    found = findings(sizes, search, find, others)
    teacher = [*find([of_teacher(sizes, search.chosen)]).values()]
    said = of_teachers(sizes, found) if sizes.part == "2b" else of_views(sizes, found)
    return filled(
        Path(__file__).with_name("report.md"), folder / f"part{sizes.part}.md", found, sizes.comparisons,
        sizes=sizes, conclusions=said, over=not search.due,
        teacher=[f"{measure(one):.1f}" for one in teacher for measure in (PRIMARY, CORRELATION)],
        views=_views(sizes, found) if sizes.part == "3" else [],
    )  # fmt: skip


def of_teachers(sizes: Plan, found: Findings) -> list[str]:
    """Return the sentences of part 2b; none before all trainings are there."""
    if (early := too_early(len(sizes.seeds), missing=found.missing > 0)) is not None:
        return early
    helped = [arm for arm in sizes.arms if found.above((arm, CLIP))]
    said = [f"`{arm}` helps: {interval(found.differences[(arm, CLIP), PRIMARY.title])}." for arm in helped]
    if rest := [f"`{arm}`" for arm in sizes.arms if arm not in helped]:
        said.append(f"Not shown to raise R@10 above plain CLIP's: {', '.join(rest)}.")
    for arm in sizes.arms:
        if arm not in (RANKS, BOTH) and found.above((arm, RANKS)):
            d = found.differences[(arm, RANKS), PRIMARY.title]
            said.append(f"**`{arm}` retrieves better than `{RANKS}`: {interval(d)}.**")
    above = "is" if found.above((BOTH, RANKS)) else "is not shown to be"
    said.append(f"`{BOTH}` {above} above `{RANKS}`; nothing is said about mimicry alone.")
    leading = {measure: _leading(sizes, found, measure) for measure in (PRIMARY, CORRELATION)}
    if leading[PRIMARY] != leading[CORRELATION]:
        recall, people = leading.values()
        said.append(f"Recall is highest with `{recall}`, the correlation with people with `{people}`.")
    return said


def of_views(sizes: Plan, found: Findings) -> list[str]:
    """Return the sentences of part 3, one of each view; none before all trainings are there."""
    if (early := too_early(len(sizes.seeds), missing=found.missing > 0)) is not None:
        return early
    said = []
    for view, rivals in _rivals(sizes).items():
        ranks = sizes.ranks_of(rivals[0])
        ds = {rival: found.differences[(rival, ranks), PRIMARY.title] for rival in rivals}
        better = [f"`{rival}`" for rival, d in ds.items() if d.established and d.mean > 0]
        worse = [f"`{rival}`" for rival, d in ds.items() if d.established and d.mean < 0]
        helps = "help" if found.above((ranks, CLIP)) else "are not shown to help"
        if better:
            text = f"{', '.join(better)} retrieves better than ranks"
        elif len(worse) == len(rivals):
            text = "**ranks retrieve better than every rival**"
        else:
            text = "no rival is shown to retrieve better than ranks"
            text += f"; ranks retrieve better than {', '.join(worse)}" if worse else ""
        said.append(f"{view}: {text}. Ranks {helps}.")
    return said


def _leading(sizes: Plan, found: Findings, measure) -> str:
    means = {arm: found.estimate(arm, measure) for arm in sizes.arms}
    return max(means, key=lambda arm: means[arm].mean)


def _rivals(sizes: Plan) -> dict[str, list[str]]:
    """Return each view's arms but ranks."""
    found: dict[str, list[str]] = {}
    for name, arm in sizes.arms.items():
        if arm.loss != RANKS:
            found.setdefault(arm.view, []).append(name)
    return found


def _views(sizes: Plan, found: Findings) -> list[list[str]]:
    """Return the differences to CLIP: a view in each row, a loss in each column, marked where corrected."""

    def cell(name: str) -> str:
        d = found.difference((name, CLIP))
        return "–" if d is None else f"{difference_text(d)} {mark(d)}"

    rows = []
    for view, rivals in _rivals(sizes).items():
        of = "; ".join(f"`{sizes.arms[name].loss}` {cell(name)}" for name in rivals)
        rows.append([view, cell(sizes.ranks_of(rivals[0])), of])
    return rows
