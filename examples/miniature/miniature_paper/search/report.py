"""Records → ``search.md``: every round, every trial, the confirmation, and what they show.

The sentences claim nothing that an interval does not support.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from examples_common.page import Block
from examples_common.tables import markdown as table

from miniature_paper import statistics
from miniature_paper.findings import p_text
from miniature_paper.report import SIGNS, conditions, write_page
from miniature_paper.statistics import CONFIDENCE, Difference, Estimate
from miniature_paper.tables import difference_text, mark, mean_text, signed

from . import figure
from .confirmation import WITH_CLIP, WITH_RECIPE, Confirmation, Declaration
from .ladder import Find, Standing, Step, tried, winner
from .objective import DEFINITION, OBJECTIVE, SCORES
from .trials import LOSS, RECIPE, Round, Search, Trial

_PICTURE = "search.png"


def write(
    search: Search,
    steps: Sequence[Step],
    confirmations: Sequence[Confirmation],
    folder: Path,
    *,
    find: Find,
    command: str,
) -> Path:
    """Write the report with its picture, and return the path of its HTML page.

    Args:
        search: The search.
        steps: Its rounds, as far as they are.
        confirmations: The confirmations, in order.
        folder: Where to; an earlier report is replaced.
        find: Returns the records of trainings.
        command: The command that makes this report.
    """
    picture = figure.draw(steps)
    (folder / "figures" / _PICTURE).unlink(missing_ok=True)
    content = blocks(
        search, steps, confirmations, find=find, command=command, alt=picture.alt if picture else None
    )
    pictures = {_PICTURE: picture} if picture else {}
    return write_page(folder, "search", content, f"A stronger setting: {search.name}", pictures)


def blocks(
    search: Search,
    steps: Sequence[Step],
    confirmations: Sequence[Confirmation],
    *,
    find: Find,
    command: str,
    alt: str | None = None,
) -> list[Block]:
    """Return the report's content."""
    best = winner(search, steps)
    settings = tried(steps)
    needed = [a for step in steps for a in step.attempts]
    needed += [a for c in confirmations for a in c.declaration.attempts(search)]
    records = list(find(needed).values())
    hours = sum(sum(record["seconds"].values()) for record in records) / 3600
    facts = [
        ["command", f"`{command}`"],
        ["settings tried", str(len(settings))],
        ["trainings", f"{len(records)}, {hours:.1f} hours summed over them"],
    ]
    content: list[Block] = [
        f"# A stronger setting: {search.name}",
        "Is there a setting in which the rank terms help more than the recipe's? Searched for on the "
        "validation side, confirmed once on the test side.",
        *([f"> {search.note}"] if search.note else []),
        *(f"> {warning}" for warning in warnings(confirmations, best)),
        "## In short",
        progress(search, steps),
        *(_said(confirmation) for confirmation in confirmations),
    ]
    if best is not None and not confirmations:
        content.append("Nothing is confirmed yet: `--confirm` does it.")
    weights = lighter_weights(search, steps, find)
    content += [
        *([weights] if weights else []),
        table(["", ""], [*facts, *conditions(records)]),
        "## What is compared, and how",
        *_method(search, settings),
        "## The settings",
        _settings(settings),
        "## The rounds",
        f"Mean difference to plain CLIP at the same batch size and of the same seeds, ± half of its "
        f"{100 * CONFIDENCE:.0f} % t-interval, in points; the best first. **The intervals are those of "
        f"single comparisons, and {len(settings)} settings were tried: with so many, some exclude zero by "
        "chance alone, and the first one leads partly by chance.** So nothing is tested here, and no "
        "difference in these tables is a result.",
    ]
    if alt is not None:
        content += [f"![{alt}](figures/{_PICTURE})", "Coloured: continues. Dashed: plain CLIP."]
    for number, step in enumerate(steps, start=1):
        content += _round(number, step)
    for confirmation in confirmations:
        content += _confirmation(confirmation)
    return content


# --- what is said ---


def interval(difference: Difference) -> str:
    """Mean and interval of a difference, in points."""
    if difference.half_width is None:
        return f"{signed(difference.mean)} points (one seed, so no interval)"
    return (
        f"{signed(difference.mean)} points ({100 * CONFIDENCE:.0f} % interval {signed(difference.low)} to "
        f"{signed(difference.high)}, {difference.n} seeds)"
    )


def progress(search: Search, steps: Sequence[Step]) -> str:
    """How far the search is."""
    last = steps[-1]
    if last.missing:
        return (
            f"The search is not over: round {len(steps)} of {len(search.rounds)} has "
            f"{len(last.attempts) - len(last.missing)} of {len(last.attempts)} trainings. "
            "The same command continues."
        )
    best = winner(search, steps)
    assert best is not None
    found = (
        "The search found no setting that did better than the recipe itself"
        if best == RECIPE
        else f"The search's winner is `{best.name}` (`{best.command}`)"
    )
    return (
        f"{found}: {interval(last.standings[0].differences[OBJECTIVE])} over plain CLIP in the objective, on "
        f"the validation side. It is the best of {len(tried(steps))} settings, and the best of many looks "
        "better than it is: this is where the search ends, not what it shows."
    )


def verdict(confirmation: Confirmation) -> str:
    """What a confirmation shows of its setting against plain CLIP."""
    name = f"`{confirmation.declaration.trial.name}`"
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
    """What has to be known about the confirmations before they are read."""
    found = []
    if len(confirmations) > 1:
        names = ", ".join(f"`{c.declaration.trial.name}`" for c in confirmations)
        found.append(
            f"The test side was used for {len(confirmations)} confirmations ({names}). Only the first one is "
            "what it was meant to be: the others were requested by someone who had seen it, and their "
            "p-values do not account for that."
        )
    if confirmations and best is not None and confirmations[-1].declaration.trial != best:
        found.append(
            f"What was confirmed is `{confirmations[-1].declaration.trial.name}`; the winner of these "
            f"records is `{best.name}`, which was not."
        )
    return found


def lighter_weights(search: Search, steps: Sequence[Step], find: Find) -> str | None:
    """What has to be known about records of releases before 0.2 in which not all items count the same.

    Those releases divided a list's loss by its N items instead of by Σμ, the number of items that count.
    """
    trials = [trial for trial in tried(steps) if trial.counts_fewer]
    attempts = [a for step in steps for a in step.attempts if a.trial in {trial.name for trial in trials}]
    old = {a.trial for a, record in find(attempts).items() if _before_0_2(record)}
    affected = [trial for trial in trials if trial.name in old]
    if not affected:
        return None
    shares = ", ".join(f"`{trial.name}` {weight(search, trial):.3f}" for trial in affected)
    return (
        "**What the `top_k` and `discount` settings compared.** These records were made with a release whose "
        '`reduction="mean"` divided the loss of a list by its number of items N. Later ones divide by Σμ, '
        "the number of items that count. With `top_k` or `discount` Σμ is below N, so these settings also "
        "lowered the weight of the rank terms. Relative to a full list it was multiplied by Σμ/N: "
        f"{shares}. They weighed less than they seemed, and their rows change the list and the weight "
        "at once."
    )


def _before_0_2(record: Mapping[str, Mapping[str, str]]) -> bool:
    return str(record["conditions"].get("rankloss", "")).startswith("0.1.")


def weight(search: Search, trial: Trial) -> float:
    """Return Σμ/N of a trial's lists: the share of the weight that a division by N leaves."""
    changes = dict(trial.changes)
    n = int(changes.get("--batch-size", search.grid.batch_size))
    rank = np.arange(1, n + 1)
    mu = 1 / np.log1p(rank) if changes.get("--rankclip-discount") == "log" else np.ones(n)
    return float(mu[: int(changes.get("--rankclip-top-k", n))].sum() / n)


def _said(confirmation: Confirmation) -> str:
    words = [verdict(confirmation), against_recipe(confirmation)]
    return f"**{' '.join(word for word in words if word)}**"


# --- what was done ---


def _method(search: Search, settings: Sequence[Trial]) -> list[str]:
    preset = search.grid
    rounds = "; ".join(
        f"round {number}, {_budget(one)}, from which "
        + (f"the best {one.keep} continue" if one.keep > 1 else "the best one is the winner")
        for number, one in enumerate(search.rounds, start=1)
    )
    return [
        f"The recipe is `--loss {LOSS}` with its defaults and λ set per step; {preset.pairs:,} pairs, "
        f"batches of {preset.batch_size}. A setting is the recipe with some arguments changed, one factor at "
        f"a time to begin with: {rounds}. After the first round, the best level of every factor that did "
        "better than the recipe is combined with those of the others (all combinations of the best "
        f"{search.combined} factors, and all factors together). Whatever the batch size, the same pairs are "
        "seen equally often, and the learning rate is the same. The recipe goes through every round.",
        DEFINITION,
        "Seeds are never used twice: those of a later round, and of the confirmation, chose nothing.",
        f"Altogether {len(settings)} settings were tried.",
    ]


def _budget(one: Round | Declaration) -> str:
    first, last = one.seeds[0], one.seeds[-1]
    seeds = f"seeds {first} to {last}" if last > first else f"seed {first}"
    return f"{one.epochs} epoch{'s' * (one.epochs > 1)}, {seeds}"


def _settings(settings: Sequence[Trial]) -> str:
    rows = [
        [f"`{trial.name}`", trial.factor, f"`{trial.command}`" if trial.changes else "nothing"]
        for trial in settings
    ]
    return table(["setting", "varies", "changes"], rows)


def _round(number: int, step: Step) -> list[Block]:
    title = f"### Round {number}: {_budget(step.round)}"
    if step.missing:
        return [title, f"{len(step.missing)} of {len(step.attempts)} trainings are missing."]
    rows = [
        [
            f"`{standing.trial.name}`",
            *_differences(standing),
            mean_text(standing.reference[OBJECTIVE], standing.reference[OBJECTIVE].n),
            _continues(standing, step),
        ]
        for standing in step.standings
    ]
    head = ["setting", *SCORES, "CLIP's objective", "continues" if step.round.keep > 1 else "wins"]
    return [title, table(head, rows, right=len(head) - 1)]


def _continues(standing: Standing, step: Step) -> str:
    if standing.trial in step.kept:
        return "yes"
    return "always" if standing.trial == RECIPE and step.round.keep > 1 else "no"


def _differences(standing: Standing) -> list[str]:
    if not standing.differences:
        return ["diverged", *[""] * (len(SCORES) - 1)]
    return [difference_text(standing.differences[name]) for name in SCORES]


def _confirmation(confirmation: Confirmation) -> list[Block]:
    one = confirmation.declaration
    heading = "Confirmation" if one.number == 1 else f"Confirmation {one.number}"
    title = f"## {heading}: `{one.trial.name}`, {_budget(one)}, test side"
    if confirmation.missing:
        return [title, f"{confirmation.missing} trainings are missing."]
    levels = [[f"`{s.trial.name}`", *_levels(s.levels)] for s in confirmation.standings]
    levels += [[f"plain CLIP, for `{s.trial.name}`", *_levels(s.reference)] for s in confirmation.standings]
    rows = []
    if confirmation.primary is not None:
        rows.append(_tested(WITH_CLIP, OBJECTIVE, confirmation.primary, "the test"))
    rows += [_tested(pair, name, d, p_text(d.adjusted)) for (pair, name), d in confirmation.others.items()]
    content: list[Block] = [
        title,
        "The one test is that of the objective against plain CLIP; everything else is secondary and "
        "corrected together (Holm). The held-out pictures are the same for every seed: an interval says "
        "where the mean over more seeds would be.",
        table(["", *SCORES], levels, right=len(SCORES)),
        table(["compared", "score", "difference", "p", "corrected", ""], rows, right=4),
        SIGNS,
    ]
    if one.trial != RECIPE:
        content.append(f"As arguments: `--loss {LOSS} --rankclip-schedule-unit step {one.trial.command}`")
    return content


def _levels(of: Mapping[str, Estimate]) -> list[str]:
    return [mean_text(of[name], of[name].n) if of else "diverged" for name in SCORES]


def _tested(pair: str, name: str, difference: Difference, corrected: str) -> list[str]:
    return [pair, name, difference_text(difference), p_text(difference.p), corrected, mark(difference)]
