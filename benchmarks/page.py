"""Tables of a page from pytest-benchmark's JSON: ``python benchmarks/page.py JSON [PAGE NAME]``.

PAGE has a line ``<!-- bench:NAME -->`` and a line ``<!-- /bench:NAME -->``; the tables replace what is
between them. Without PAGE they are printed. The tables of graded lists and of the time before the first step,
and the targets, are always printed.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

_MIB = 2**20


class Measured(NamedTuple):
    """The seconds of a contender's rounds, in turns with the others of its group, and what was counted."""

    seconds: list[float]
    counts: dict[str, float]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def ratio_to(self, other: Measured) -> float:
        """The median of the rounds' ratios: what slows a whole round down cancels."""
        return statistics.median(a / b for a, b in zip(self.seconds, other.seconds, strict=True))


Groups = dict[str, dict[str, Measured]]
"""The contenders by group and name. A group is ``"family: one of it"``."""


def groups_of(results: dict[str, Any]) -> Groups:
    """The contenders in pytest-benchmark's JSON."""
    groups: Groups = {}
    for benchmark in results["benchmarks"]:
        measured = Measured(benchmark["stats"]["data"], benchmark["extra_info"])
        groups.setdefault(benchmark["group"], {})[benchmark["params"]["contender"]] = measured
    return groups


# --- targets ------------------------------------------------------------------------------------------------


class Target(NamedTuple):
    """A quantity of a contender, as a multiple of another's if that is given, and its bound.

    Attributes:
        what: The quantity in words.
        of: The group and the name of the contender.
        beside: The group and the name of the other; None for a quantity in seconds by itself.
        bound: The bound.
        at_least: True if the bound is a lower one.
        quantity: ``"seconds"``, or one of the counts.
    """

    what: str
    of: tuple[str, str]
    beside: tuple[str, str] | None
    bound: float
    at_least: bool = False
    quantity: str = "seconds"


def _of_losses(
    what: str,
    n: int,
    above: str,
    below: str,
    bound: float,
    *,
    at_least: bool = False,
    quantity: str = "seconds",
) -> Target:
    """A target of two losses, ``above`` as a multiple of ``below``, of n pairs."""
    group = f"losses: N = {n:,}"
    return Target(f"{what}, N = {n:,}", (group, above), (group, below), bound, at_least, quantity)


STEP, LISTS = "training step: demo, N = 128", "lists: 512 of 64 candidates, with negatives"
TARGETS = [
    _of_losses("naive / sort", 4096, "naive", "RankConsistency", 4, at_least=True),
    _of_losses("naive / bin", 4096, "naive", "RankConsistency-bin", 5, at_least=True),
    _of_losses(
        "naive / sort, memory", 4096, "naive", "RankConsistency", 12, at_least=True, quantity="peak_bytes"
    ),
    _of_losses("RankClipLoss / its matrix products", 4096, "RankClipLoss", "RankClipLoss-products", 2.1),
    _of_losses("value alone / value and gradient", 1024, "RankClipLoss-no_grad", "RankClipLoss", 0.55),
    _of_losses("value alone / value and gradient", 4096, "RankClipLoss-no_grad", "RankClipLoss", 0.55),
    _of_losses("λ = 0, with the log / ClipLoss", 1024, "rankclip-lambda-0", "ClipLoss", 1.02),
    _of_losses("λ = 0, with the log / ClipLoss", 4096, "rankclip-lambda-0", "ClipLoss", 1.02),
    _of_losses("SpreadLoss / ClipLoss", 4096, "SpreadLoss", "ClipLoss", 1.1),
    _of_losses("ids that share / ClipLoss", 1024, "ClipLoss-ids", "ClipLoss", 1.15),
    _of_losses("rankclip-distill / ClipLoss", 4096, "rankclip-distill", "ClipLoss", 2.5),
    _of_losses("ClipLoss streamed / whole", 8192, "ClipLoss-streamed", "ClipLoss", 1.3),
    _of_losses("SigLipLoss streamed / whole", 8192, "SigLipLoss-streamed", "SigLipLoss", 1.3),
    Target(
        "RankClipLoss, memory, N = 8,192 / 4,096",
        ("losses: N = 8,192", "RankClipLoss"),
        ("losses: N = 4,096", "RankClipLoss"),
        bound=2.2,
        quantity="peak_bytes",
    ),
    Target(
        "Plackett–Luce lists with negatives / cross-entropy",
        (LISTS, "plackett_luce"),
        (LISTS, "cross-entropy"),
        bound=2,
    ),
    Target(
        "pairwise lists with negatives / Plackett–Luce",
        (LISTS, "pairwise"),
        (LISTS, "plackett_luce"),
        bound=3,
    ),
    Target("a step of the demo's model, rankclip / clip", (STEP, "rankclip"), (STEP, "clip"), bound=1.03),
    Target("import rankloss, after torch", ("start: imports", "rankloss-after-torch"), None, bound=0.1),
    Target("python -m rankloss --help", ("start: python -m rankloss", "--help"), None, bound=3),
]


def judged(groups: Groups, targets: Iterable[Target] = TARGETS) -> str:
    """A table of the targets, each with its value and whether it is met."""
    rows = []
    for target in targets:
        unit = " s" if target.beside is None else "×"
        limit = "at least" if target.at_least else "at most"
        value = value_of(target, groups)
        if value is None:
            measured, answer = "not measured", "–"
        else:
            is_met = value >= target.bound if target.at_least else value <= target.bound
            measured, answer = f"{value:.2f}{unit}", "yes" if is_met else "no"
        rows.append([target.what, f"{limit} {target.bound:.2f}{unit}", measured, answer])
    return markdown_table(["what", "target", "measured", "met"], rows)


def value_of(target: Target, groups: Groups) -> float | None:
    """The quantity of a target as it was measured; None where a contender was not measured."""
    group, name = target.of
    measured = groups.get(group, {}).get(name)
    if measured is None:
        return None
    if target.beside is None:
        assert target.quantity == "seconds"  # the unit of a bound by itself
        return measured.median
    group, name = target.beside
    other = groups.get(group, {}).get(name)
    if other is None:
        return None
    if target.quantity != "seconds":
        return measured.counts[target.quantity] / other.counts[target.quantity]
    return measured.ratio_to(other)


# --- tables -------------------------------------------------------------------------------------------------


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of Markdown, its first column to the left, the others to the right."""
    rule = ["---"] + ["---:"] * (len(head) - 1)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, rule, *rows))


def by_column(groups: Groups, cell: Callable[[Measured, Measured], str]) -> str:
    """A row for each contender, a column for each group; ``cell`` gets a contender and its group's first."""
    names = dict.fromkeys(name for group in groups.values() for name in group)  # in order, each once
    rows = []
    for name in names:
        row = [name]
        for group in groups.values():
            first_of_group = next(iter(group.values()))
            row.append(cell(group[name], first_of_group) if name in group else "–")
        rows.append(row)
    return markdown_table(["loss", *groups], rows)


def by_row(groups: Groups) -> str:
    """A row for each contender of each group, with all that was counted."""
    counts_of_all = [measured.counts for group in groups.values() for measured in group.values()]
    counted = list(dict.fromkeys(key for counts in counts_of_all for key in counts))  # in order, each once
    rows = []
    for title, group in groups.items():
        first = next(iter(group.values()))
        for name, measured in group.items():
            counts = [_shown(key, measured.counts[key]) for key in counted]
            ratio = f"{measured.ratio_to(first):.2f}×"
            rows.append([f"{title}: {name}", f"{measured.median:.3g}", ratio, *counts])
    units = [key.replace("_bytes", ", MiB").replace("_seconds", ", s") for key in counted]
    return markdown_table(["", "seconds", "ratio", *units], rows)


def _shown(key: str, value: float) -> str:
    """A count by its name: bytes in MiB, others as they are."""
    return f"{value / _MIB:,.1f}" if key.endswith("_bytes") else f"{value:.3g}"


def _time(measured: Measured, first: Measured) -> str:
    """Seconds, and in brackets their ratio to the first of the group."""
    if measured is first:
        return f"{measured.median:.3g}"
    return f"{measured.median:.3g} ({measured.ratio_to(first):.2f}×)"


def _memory(measured: Measured, _: Measured) -> str:
    """The peak of a step, and in brackets the part that is kept for backward."""
    peak = _shown("peak_bytes", measured.counts["peak_bytes"])
    saved = _shown("saved_bytes", measured.counts["saved_bytes"])
    return f"{peak} ({saved})"


CAPTIONS = {
    "training step": "**A training step**, as open_clip's trainer makes it",
    "processes": "**RankClipLoss on gloo processes** of one thread, forward and backward of the slowest",
}


def conditions(results: dict[str, Any]) -> str:
    """The conditions of a run as a sentence."""
    machine = results["machine_info"]
    processor = machine["card"] or machine["cpu"].get("brand_raw", "unknown processor")
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    date, _, _ = results["datetime"].partition("T")
    return (
        f"{processor}, {machine['threads']} threads of {machine['cpu']['count']} cores, load average "
        f"{machine['load_average']:.1f} at the start; {machine['system']} {machine['machine']}, Python "
        f"{machine['python_version']}, {versions}; {date}."
    )


def tables(results: dict[str, Any]) -> str:
    """All tables of a run."""
    families: dict[str, Groups] = {}
    for title, group in groups_of(results).items():
        family, _, one = title.partition(": ")
        families.setdefault(family, {})[one] = group
    parts = [conditions(results)]
    if "losses" in families:
        losses = families["losses"]
        parts += [
            "**Time of forward and backward, seconds**; in brackets, as a multiple of the first row's.",
            by_column(losses, _time),
            "**Memory, MiB**: the most that tensors hold at once; in brackets, what is kept for backward.",
            by_column({one: _in_memory(group) for one, group in losses.items()}, _memory),
        ]
    for family, groups in families.items():
        if family in CAPTIONS:
            parts += [f"{CAPTIONS[family]}.", by_row(groups)]
    return "\n\n".join(parts) + "\n"


def printed(results: dict[str, Any]) -> str:
    """The tables for developers alone: graded lists, the times before the first step, and the targets."""
    groups = groups_of(results)
    for_developers = {
        title: group for title, group in groups.items() if title.startswith(("lists: ", "start: "))
    }
    parts = [by_row(for_developers)] if for_developers else []
    return "\n\n".join([*parts, judged(groups)])


def _in_memory(group: dict[str, Measured]) -> dict[str, Measured]:
    """The contenders of a table of memory; products alone keep none."""
    return {name: measured for name, measured in group.items() if not name.endswith("-products")}


def fill(path: Path, name: str, text: str) -> None:
    """Put the tables between the markers of a page.

    Raises:
        ValueError: unless the page has one pair of them.
    """
    page = path.read_text(encoding="utf-8")
    marked = re.compile(rf"(<!-- bench:{name} -->\n).*?(<!-- /bench:{name} -->)", re.DOTALL)
    if len(marked.findall(page)) != 1:
        raise ValueError(
            f"{path} must have <!-- bench:{name} --> and <!-- /bench:{name} --> once, in this order"
        )
    filled = marked.sub(lambda match: match[1] + text + match[2], page)
    path.write_text(filled, encoding="utf-8")


def main() -> None:
    """Fill or print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("json", type=Path, help="what --benchmark-json wrote")
    parser.add_argument(
        "page", type=Path, nargs="?", help="the page to fill; without it the tables are printed"
    )
    parser.add_argument("name", nargs="?", default="cpu", help="the name of the page's markers")
    args = parser.parse_args()
    results = json.loads(args.json.read_text(encoding="utf-8"))
    text = tables(results)
    print(printed(results))
    if args.page is None:
        print(text)
    else:
        fill(args.page, args.name, text)


if __name__ == "__main__":
    main()
