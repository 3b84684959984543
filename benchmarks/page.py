"""Tables of a page from pytest-benchmark's JSON: ``python benchmarks/page.py JSON [PAGE NAME]``.

PAGE has a line ``<!-- bench:NAME -->`` and a line ``<!-- /bench:NAME -->``; the tables replace what is
between them. Without PAGE they are printed. The rest, and the targets, are always printed.
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
    groups: Groups = {}
    for x in results["benchmarks"]:
        measured = Measured(x["stats"]["data"], x["extra_info"])
        groups.setdefault(x["group"], {})[x["params"]["contender"]] = measured
    return groups


# --- targets ------------------------------------------------------------------------------------------------


class Target(NamedTuple):
    """A quantity of a contender of a group, as a multiple of another's if that is given, and its bound."""

    what: str
    of: tuple[str, str]
    beside: tuple[str, str] | None
    bound: float
    at_least: bool = False
    quantity: str = "seconds"


def _of_losses(
    what: str, n: int, above: str, below: str, bound: float, at_least: bool = False, quantity: str = "seconds"
) -> Target:
    group = f"losses: N = {n:,}"
    return Target(f"{what}, N = {n:,}", (group, above), (group, below), bound, at_least, quantity)


STEP, LISTS = "training step: demo, N = 128", "lists: 512 of 64 candidates, with negatives"
TARGETS = [
    _of_losses("naive / sort", 4096, "naive", "RankConsistency", 4, at_least=True),
    _of_losses("naive / bin", 4096, "naive", "RankConsistency-bin", 5, at_least=True),
    _of_losses("naive / sort, memory", 4096, "naive", "RankConsistency", 12, True, "peak_bytes"),
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
        2.2,
        quantity="peak_bytes",
    ),
    Target(
        "Plackett–Luce lists with negatives / cross-entropy",
        (LISTS, "plackett_luce"),
        (LISTS, "cross-entropy"),
        2,
    ),
    Target("pairwise lists with negatives / Plackett–Luce", (LISTS, "pairwise"), (LISTS, "plackett_luce"), 3),
    Target("a step of the demo's model, rankclip / clip", (STEP, "rankclip"), (STEP, "clip"), 1.03),
    Target("import rankloss, after torch", ("start: imports", "rankloss-after-torch"), None, 0.1),
    Target("python -m rankloss --help", ("start: python -m rankloss", "--help"), None, 3),
]


def judged(groups: Groups, targets: Iterable[Target] = TARGETS) -> str:
    """A table of the targets, each with its value and whether it is met."""
    rows = []
    for x in targets:
        value = value_of(x, groups)
        form = "{:.2f} s" if x.beside is None else "{:.2f}×"
        bound = f"{'at least' if x.at_least else 'at most'} {form.format(x.bound)}"
        cells = ["not measured", "–"]
        if value is not None:
            met = value >= x.bound if x.at_least else value <= x.bound
            cells = [form.format(value), "yes" if met else "no"]
        rows.append([x.what, bound, *cells])
    return markdown_table(["what", "target", "measured", "met"], rows)


def value_of(target: Target, groups: Groups) -> float | None:
    """What was measured; None where a contender was not."""
    above, below = (
        None if at is None else groups.get(at[0], {}).get(at[1]) for at in (target.of, target.beside)
    )
    if above is None or (below is None and target.beside is not None):
        return None
    if target.quantity != "seconds":
        return above.counts[target.quantity] / below.counts[target.quantity]
    return above.median if below is None else above.ratio_to(below)


# --- tables -------------------------------------------------------------------------------------------------


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """The first column to the left, the others to the right."""
    rule = ["---"] + ["---:"] * (len(head) - 1)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, rule, *rows))


def by_column(groups: Groups, cell: Callable[[Measured, Measured], str]) -> str:
    """A row for each contender, a column for each group; ``cell`` gets a contender and its group's first."""
    rows = []
    for name in dict.fromkeys(name for group in groups.values() for name in group):
        firsts = [next(iter(group.values())) for group in groups.values()]
        found = [group.get(name) for group in groups.values()]
        cells = ["–" if x is None else cell(x, first) for x, first in zip(found, firsts, strict=True)]
        rows.append([name, *cells])
    return markdown_table(["loss", *groups], rows)


def by_row(groups: Groups) -> str:
    """A row for each contender of each group, with all that was counted."""
    everyone = [(title, name, x) for title, group in groups.items() for name, x in group.items()]
    counted = list(dict.fromkeys(key for *_, x in everyone for key in x.counts))
    rows = []
    for title, name, x in everyone:
        ratio = x.ratio_to(next(iter(groups[title].values())))
        counts = [_shown(key, x.counts[key]) for key in counted]
        rows.append([f"{title}: {name}", f"{x.median:.3g}", f"{ratio:.2f}×", *counts])
    units = [key.replace("_bytes", ", MiB").replace("_seconds", ", s") for key in counted]
    return markdown_table(["", "seconds", "ratio", *units], rows)


def _shown(key: str, value: float) -> str:
    return f"{value / _MIB:,.1f}" if key.endswith("_bytes") else f"{value:.3g}"


def _time(x: Measured, first: Measured) -> str:
    return f"{x.median:.3g}" if x is first else f"{x.median:.3g} ({x.ratio_to(first):.2f}×)"


def _memory(x: Measured, _: Measured) -> str:
    peak, saved = (_shown(key, x.counts[key]) for key in ("peak_bytes", "saved_bytes"))
    return f"{peak} ({saved})"


CAPTIONS = {
    "training step": "**A training step**, as open_clip's trainer makes it",
    "processes": "**RankClipLoss on gloo processes** of one thread, forward and backward of the slowest",
}


def conditions(results: dict[str, Any]) -> str:
    """The conditions of a run as a sentence."""
    c = results["machine_info"]
    cpu = c["cpu"].get("brand_raw", "unknown processor")
    versions = ", ".join(f"{name} {version}" for name, version in c["versions"].items())
    return (
        f"{c['card'] or cpu}, {c['threads']} threads of {c['cpu']['count']} cores, load average "
        f"{c['load_average']:.1f} at the start; {c['system']} {c['machine']}, Python {c['python_version']}, "
        f"{versions}; {results['datetime'][:10]}."
    )


def tables(results: dict[str, Any]) -> str:
    """All tables of a run."""
    groups, families = groups_of(results), dict[str, Groups]()
    for title, group in groups.items():
        family, _, one = title.partition(": ")
        families.setdefault(family, {})[one] = group
    parts = [conditions(results)]
    if losses := families.pop("losses", None):
        parts += ["**Time of forward and backward, seconds**; in brackets, as a multiple of the first row's."]
        parts += [by_column(losses, _time)]
        parts += [
            "**Memory, MiB**: the most that tensors hold at once; in brackets, what is kept for backward."
        ]
        parts += [by_column({one: _in_memory(group) for one, group in losses.items()}, _memory)]
    for family, found in families.items():
        parts += [f"{CAPTIONS[family]}.", by_row(found)] if family in CAPTIONS else []
    return "\n\n".join(parts) + "\n"


def printed(results: dict[str, Any]) -> str:
    """What only a developer reads: graded lists, the times before the first step, and the targets."""
    groups = groups_of(results)
    rest = {title: x for title, x in groups.items() if title.startswith(("lists: ", "start: "))}
    return "\n\n".join(([by_row(rest)] if rest else []) + [judged(groups)])


def _in_memory(group: dict[str, Measured]) -> dict[str, Measured]:
    return {name: x for name, x in group.items() if not name.endswith("-products")}


def fill(path: Path, name: str, text: str) -> None:
    """Put the tables between the markers of a page.

    Raises:
        ValueError: unless the page has one pair of them.
    """
    before = path.read_text(encoding="utf-8")
    marked = re.compile(rf"(<!-- bench:{name} -->\n).*?(<!-- /bench:{name} -->)", re.DOTALL)
    if len(marked.findall(before)) != 1:
        raise ValueError(
            f"{path} must have <!-- bench:{name} --> and <!-- /bench:{name} --> once, in this order"
        )
    path.write_text(marked.sub(lambda m: m[1] + text + m[2], before), encoding="utf-8")


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
