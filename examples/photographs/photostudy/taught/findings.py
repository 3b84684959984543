"""Records of the test side to differences: paired by seed, corrected as the plans say."""

from __future__ import annotations

from collections.abc import Mapping

from examples_common.statistics import Difference

from photostudy.plan import Find, Search
from photostudy.students.findings import Findings, Key, compared

from . import plan
from .plan import CLIP, Plan


def findings(sizes: Plan, search: Search, find: Find, others: Mapping[Key, Difference]) -> Findings:
    """Return the comparisons whose trainings are all there.

    Args:
        sizes: The part's plan.
        search: Part 1's, of the heads' setting.
        find: Finds the part's records.
        others: Other planned tests in the same correction.
    """
    chosen = {} if search.due else plan.choices(sizes, search.chosen, find)
    known = plan.settings(sizes, search.chosen, chosen)
    arms = {name: known.get(name, ()) for name in (CLIP, *sizes.arms)}
    return compared(search, chosen, arms, len(sizes.seeds), find, sizes.comparisons, others)
