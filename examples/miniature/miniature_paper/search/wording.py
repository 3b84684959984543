"""What may be said of the search: sentences that claim nothing an interval does not support."""

from __future__ import annotations

from collections.abc import Sequence

from miniature_paper import statistics
from miniature_paper.findings import p_text
from miniature_paper.statistics import Difference
from miniature_paper.tables import signed

from .confirmation import WITH_RECIPE, Confirmation
from .ladder import Standing, Step, tried, winner
from .objective import OBJECTIVE
from .trials import RECIPE, Search, Trial

_DIGITS = 2


def interval(difference: Difference) -> str:
    """Mean and interval of a difference, in points."""
    if difference.half_width is None:
        return f"{signed(difference.mean, _DIGITS)} points (one seed, so no interval)"
    low, high = (signed(end, _DIGITS) for end in (difference.low, difference.high))
    return (
        f"{signed(difference.mean, _DIGITS)} points "
        f"({100 * statistics.CONFIDENCE:.0f} % interval {low} to {high}, {difference.n} seeds)"
    )


def progress(search: Search, steps: Sequence[Step]) -> str:
    """How far the search is."""
    last = steps[-1]
    if last.missing:
        return (
            f"The search is not over: round {len(steps)} of {len(search.rounds)} has "
            f"{len(last.attempts) - len(last.missing)} of {len(last.attempts)} trainings. "
            "The same command goes on."
        )
    best = winner(search, steps)
    assert best is not None
    standing = last.standings[0]
    found = (
        "The search found no setting that did better than the recipe itself"
        if best == RECIPE
        else f"The search's winner is `{best.name}` (`{best.command}`)"
    )
    return (
        f"{found}: {interval(standing.differences[OBJECTIVE])} over plain CLIP in the objective, on the "
        f"validation side. It is the best of {len(tried(steps))} settings, and the best of many looks better "
        "than it is: this is where the search ends, not what it shows."
    )


def verdict(confirmation: Confirmation) -> str:
    """What a confirmation shows of its setting against plain CLIP."""
    one = confirmation.declaration
    name = f"`{one.trial.name}`"
    if confirmation.missing:
        return (
            f"The confirmation of {name} is not over: {confirmation.missing} trainings are missing. "
            "Nothing is concluded yet."
        )
    difference = confirmation.primary
    if difference is None:
        return f"Not confirmed: trained with {name}, a model diverged."
    said = statistics.verdict(difference)
    measured = f"{interval(difference)} over plain CLIP in the objective, on the test side with fresh seeds"
    p = f"paired t-test, p {p_text(difference.p)}"
    if said == statistics.TOO_FEW_SEEDS:
        return f"Nothing is concluded for {name}: {measured}, too few seeds."
    if said == statistics.BETTER:
        return f"Confirmed: {name} helps. {measured} ({p})."
    if said == statistics.WORSE:
        return f"Contradicted: {name} is worse than plain CLIP. {measured} ({p})."
    return (
        f"Not confirmed: {name} and plain CLIP are not told apart. {measured} ({p}). Neither that it helps "
        "nor that it does not is shown: the interval is what the data leave open."
    )


def against_recipe(confirmation: Confirmation) -> str | None:
    """What a confirmation shows of its setting against the recipe; None where there is nothing to say."""
    if confirmation.missing or confirmation.declaration.trial == RECIPE:
        return None
    difference = confirmation.others.get((WITH_RECIPE, OBJECTIVE))
    if difference is None:
        return None
    said = {
        statistics.BETTER: "It is better than the recipe",
        statistics.WORSE: "It is worse than the recipe",
        statistics.NOT_TOLD_APART: "It is not told apart from the recipe",
        statistics.TOO_FEW_SEEDS: "Too few seeds to compare it with the recipe",
    }[statistics.verdict(difference)]
    return (
        f"{said}: {interval(difference)}, p {p_text(difference.p)}, {p_text(difference.adjusted)} after "
        f"Holm's correction for the {len(confirmation.others)} secondary comparisons."
    )


def warnings(confirmations: Sequence[Confirmation], best: Trial | None) -> list[str]:
    """What has to be known of the confirmations before they are read."""
    found = []
    if len(confirmations) > 1:
        names = ", ".join(f"`{c.declaration.trial.name}`" for c in confirmations)
        found.append(
            f"The test side was used for {len(confirmations)} confirmations ({names}). Only the first one is "
            "what it was meant to be: the others were asked for by someone who had seen it, and their "
            "p-values do not count that."
        )
    if confirmations and best is not None and confirmations[-1].declaration.trial != best:
        found.append(
            f"What was confirmed is `{confirmations[-1].declaration.trial.name}`; these records' winner is "
            f"`{best.name}`, which was not."
        )
    return found


def lost(standing: Standing) -> bool:
    """Whether a trial diverged."""
    return not standing.differences
