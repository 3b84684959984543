"""Numbers of the pages are those of the studies' reports and records."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import reduce
from operator import getitem
from typing import Any

import numpy as np
import pytest
from scipy import stats
from tools_folder import ROOT, tool

ENCODERS = "CLIP + encoders' ranks"  # the demo's name of it
PAGES = [f"docs/{name}.md" for name in ("evidence", "lists", "losses", "papers", "teachers", "your_data")]
NUMBER = r"(?<![\d.])\d+\.\d\d(?![\d.])"


@pytest.mark.parametrize("path", [*PAGES, "examples/studies/miniature/README.md"])
def test_every_gain_and_score_is_in_a_report(path: str) -> None:
    """That is, every number with two decimals, with the interval that follows it."""
    text, reports = prose(path), reported()
    found = re.findall(rf"{NUMBER}(?: ± {NUMBER})?", text)
    there = {*re.findall(NUMBER, reports), *re.findall(rf"{NUMBER} ± {NUMBER}", reports)}
    assert len(found) >= 8
    assert set(found) - there == set()


def test_every_interval_of_the_readme_rounds_one_of_a_report() -> None:
    intervals = re.findall(r"(?<![\d.])\d+\.\d ± \d+\.\d(?![\d.])", prose("README.md"))
    rounded = tool("cases.py").of_readme(reported())
    assert len(intervals) >= 15
    assert [x for x in intervals if x not in rounded] == []


def prose(path: str) -> str:
    """The text of a page without code, addresses and emphasis."""
    text = (ROOT / path).read_text(encoding="utf-8")
    return re.sub(r"```.*?```|\]\([^)]*\)|\*", "", text, flags=re.DOTALL)


def reported() -> str:
    """All reports, and the differences that are recomputed from records below."""
    reports = [x.read_text(encoding="utf-8") for x in (ROOT / "examples").rglob("report/*.md")]
    return " ".join([*reports, *differences_without_a_report()])


def of_photographs(part: str) -> str:
    """The report of a part of the photographs' study."""
    return (ROOT / f"examples/studies/photographs/report/part{part}.md").read_text(encoding="utf-8")


def table_of_tests(report: str) -> str:
    """The table of a report's tests."""
    return report.partition("## The tests")[2].partition("## Secondary")[0]


def first_differences(report: str) -> list[str]:
    """The first number of every row of that table, with its interval."""
    rows = re.findall(r"^\| `.*", table_of_tests(report), re.MULTILINE)
    return [row.split("|")[3].strip() for row in rows]


def photographs_table() -> list[str]:
    """… in R@10 and in the agreement with experts, of every comparison."""
    report = of_photographs("1")
    (agreement,) = re.findall(r"^\| τ_c, experts +\|(.*)\|$", report, re.MULTILINE)
    both = zip(first_differences(report), agreement.replace("*", "").split("|"), strict=True)
    return [f"{of_recall} | {of_agreement.strip()} |" for of_recall, of_agreement in both]


def taught_heads() -> list[str]:
    """… in R@10 of every way to learn from one teacher, minus CLIP's and minus ranks'."""
    return [f"| {cell} |" for cell in first_differences(of_photographs("2b"))]


def parts_of_a_teacher() -> list[str]:
    """… in R@10 of every loss that sees a part of that teacher, minus CLIP's."""
    tests = table_of_tests(of_photographs("3"))
    arms = re.findall(r"^\| `[^:]+: ([^`]+)` +\| `clip` +\| ([^|]+?) +\|", tests, re.MULTILINE)
    names = {"pearson": "Pearson", "cka": "CKA", "soft-labels": "soft labels", "ranks": "|"}
    return [f"{names.get(loss, loss.replace('-', ' '))} {difference}" for loss, difference in arms]


def two_encoders() -> list[str]:
    """… in R@10 of every way to learn from two encoders, minus CLIP's, on all three data sets."""
    cells: dict[str, list[str]] = {}
    for part in ("2a", "2c"):
        report = of_photographs(part)
        for line in re.findall(r"^\| `[\w-]+` +\| `clip` .*$", report, re.MULTILINE):
            arm, _, *of = (cell.strip() for cell in line.strip("| ").split("|"))
            cells.setdefault(arm, []).extend(of[:1] if part == "2a" else of[:4:3])
    return [f"| {' | '.join(of)} |" for of in cells.values() if len(of) == 3]


RECALL = ("metrics", "retrieval", "R@10, mean of both")
Lines = dict[str, dict[int, dict[str, Any]]]  # records by arm and seed


def records(folder: str, arm: Callable[[dict[str, Any]], str]) -> Lines:
    """The records of a test side below the studies' folder."""
    found: Lines = {}
    text = (ROOT / "examples/studies" / folder / "records.jsonl").read_text(encoding="utf-8")
    for line in map(json.loads, text.splitlines()):
        if line.get("setting", {}).get("side") == "test":
            found.setdefault(arm(line["setting"]), {})[line["setting"]["seed"]] = line
    return found


def of_seeds(lines: dict[int, dict[str, Any]]) -> dict[int, float]:
    """R@10, the mean of both ways, by seed."""
    return {seed: reduce(getitem, RECALL, line) for seed, line in lines.items()}


def minus(first: dict[int, dict[str, Any]], second: dict[int, dict[str, Any]]) -> str:
    """The mean difference in R@10 of the seeds that both have, with its 95 % t-interval."""
    recall, other = of_seeds(first), of_seeds(second)
    differences = np.array([recall[seed] - other[seed] for seed in recall.keys() & other.keys()])
    half = stats.t.ppf(0.975, len(differences) - 1) * stats.sem(differences)
    return f"{differences.mean():+.2f} ± {half:.2f}".replace("-", "−")


CELLS_OF_ICONS = [
    ("icons", 64, 4),
    ("icons", 250, 4),
    ("icons", 250, 16),
    ("icons-71680", 64, 2),
    ("icons-all", 64, 2),
]
"""Records of the captions' study: folder, batch size and epochs."""


def beside_shuffled_words() -> list[str]:
    """… in R@10 of RankCLIP, minus CLIP's and minus shuffled words', and of two encoders minus those."""
    rows = []
    for folder, *cell in CELLS_OF_ICONS:
        arms = records(
            f"captions/results/{folder}",
            lambda s, cell=cell: (
                s["arm"] if [s["batch_size"], s["epochs"], s.get("split", 0)] == [*cell, 0] else ""
            ),
        )
        encoders = minus(arms["encoders"], arms["shuffled"]) if "encoders" in arms else "–"
        ranks = [minus(arms["rankclip"], arms[other]) for other in ("clip", "shuffled")]
        rows.append(f"| {len(arms['rankclip'])} | {' | '.join([*ranks, encoders])} |")
    return rows


def primary_tests(study: str, families_count: int, least_cells: int) -> list[str]:
    """… in R@10 of a study's primary tests, a row for each cell, with the seeds of each."""
    report = (ROOT / f"examples/studies/{study}/report/{study}.md").read_text(encoding="utf-8")
    families = report.partition("## Primary tests")[2].partition("\n## ")[0].split("\n**(")[1:]
    rows: dict[str, list[str]] = {}
    for place, family in enumerate(families):
        for line in re.findall(r"^\| [^|]+ \| +`.*\|$", family, re.MULTILINE):
            cell, _, _, difference, n, *_ = (of.strip() for of in line.strip("| ").split("|"))
            rows.setdefault(cell, ["–"] * len(families))[place] = f"{difference} ({n})"
    assert len(families) == families_count
    assert len(rows) >= least_cells
    return [f"| {' | '.join(of)} |" for of in rows.values()]


def spread_or_ranks() -> list[str]:
    """… on students from scratch."""
    return primary_tests("spread", 5, 5)


def spread_on_heads() -> list[str]:
    """… on heads on frozen encoders."""
    return primary_tests("heads", 4, 2)


def same_dropout() -> list[str]:
    """… on heads with the same dropout."""
    return primary_tests("dropout", 3, 4)


def heads_beside_smoothing() -> list[str]:
    """… in R@10 of heads on photographs with RankCLIP, minus those with label smoothing."""
    heads = records(
        "baselines/results/photographs", lambda s: f"{s['arm']} {s['label_smoothing']} {s['same_id']}"
    )
    return [minus(heads["rankclip 0.0 "], heads["clip 0.2 "])]


def differences_without_a_report() -> list[str]:
    return [*beside_shuffled_words(), *heads_beside_smoothing()]


def bar() -> list[str]:
    """… the one-sided p of a gain above 1.5 points, of the preset."""
    found = []
    for name in ("emojis", "icons", "photographs"):
        preset, clip = (
            records(f"photographs/results/part2{part}/{name}", lambda setting: setting["arm"])[arm]
            for part, arm in (("e", "rankclip-encoders"), ("d", "clip"))
        )
        values = [[of_seeds(of)[seed] for seed in preset] for of in (preset, clip)]
        p = stats.ttest_1samp(np.subtract(*values), 1.5, alternative="greater").pvalue
        found.append(f"{p:.2g}")
    assert len(found) == 3
    return ["(one-sided p {}) and icons ({}), not on photographs ({})".format(*found)]


def costs() -> list[str]:
    """… the processor time of arms with as many epochs."""

    def seconds(of: dict[int, dict[str, Any]]) -> float:
        return float(np.mean([line["processor_seconds"]["training"] for line in of.values()]))

    of_2a = records("photographs/results/part2a", lambda s: s["arm"])
    students = {arm: seconds(of) for arm, of in of_2a.items()}
    taught = records("photographs/results/part2b", lambda s: s["loss"])
    heads = records("photographs/results/part1", lambda s: str({**s, "seed": 0}))
    ratios = [seconds(of) / seconds(heads[clip]) for key, of in heads.items() if "'rankclip'" in key
              and (clip := key.replace("'rankclip'", "'clip'")) in heads]  # fmt: skip
    return [
        f"up to {100 * (max(students.values()) / students['clip'] - 1):.0f} % more",
        f"{min(ratios):.1f} to {max(ratios):.1f} times CLIP's with RankCLIP",
        f"{seconds(taught['ranks']) / seconds(taught['clip']):.1f} times with a teacher's ranks",
    ]


def demo_table() -> list[str]:
    """The demo's gain by seed with its interval, beside both scores."""
    files = sorted((ROOT / "examples/demo/results").glob("seed*.json"))
    founds = (json.loads(file.read_text(encoding="utf-8"))["found"] for file in files)
    pairs = [(found["CLIP"], found[ENCODERS]) for found in founds]
    return [
        f"| {clip['percent']:.1f} | {of['percent']:.1f} | {of['minus_first']:+.1f} ± {of['half_width']:.1f} |"
        for clip, of in pairs
    ]


def demo_agreement() -> list[str]:
    """The models' average τ on the concepts that the demo trained on and on others, as the demo wrote it."""
    record = json.loads((ROOT / "docs/assets/agreement.json").read_text(encoding="utf-8"))
    sides = ("training", "held-out")
    values = [[f"{record['averages'][model][side]:.3f}" for model in ("CLIP", "RankCLIP")] for side in sides]
    return [
        f"| {record['concepts'][side]:,} {side} concepts | {' | '.join(of)} |"
        for side, of in zip(sides, values, strict=True)
    ]


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("docs/method.md", [demo_agreement]),
        ("examples/demo/README.md", [demo_table]),
        (
            "docs/evidence.md",
            [
                photographs_table,
                taught_heads,
                two_encoders,
                beside_shuffled_words,
                spread_or_ranks,
                spread_on_heads,
                same_dropout,
                bar,
                costs,
                parts_of_a_teacher,
            ],
        ),
    ],
)
def test_numbers_are_the_reports(path: str, said: list[Callable[[], list[str]]]) -> None:
    text = " ".join((ROOT / path).read_text(encoding="utf-8").replace("*", "").split())
    numbers = [number for of in said for number in of()]
    assert [number for number in numbers if number not in text] == []
