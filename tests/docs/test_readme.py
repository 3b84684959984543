"""The README leads to what exists, here and on a page outside the repository."""

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

pytest.importorskip("hatchling")

README = (ROOT / "README.md").read_text(encoding="utf-8")
SOURCE = "https://github.com/rankloss/rankloss"
ENCODERS = "CLIP + encoders' ranks"  # the demo's name of it


def links(markdown: str) -> list[str]:
    return re.findall(r"\]\(([^)\s]+)\)", markdown) + re.findall(r'(?:src|srcset)="([^"]+)"', markdown)


def anchors(markdown: str) -> set[str]:
    """The addresses of headings, as forges make them."""
    headings = re.findall(r"^#+ (.*)$", markdown, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", ["README.md", "CONTRIBUTING.md", "SECURITY.md", "CODE_OF_CONDUCT.md"])
def test_links_lead_to_files_and_headings(path: str) -> None:
    text = (ROOT / path).read_text(encoding="utf-8")
    for link in links(text):
        target, _, fragment = link.partition("#")
        if not re.match(r"\w+:", link):
            file = ROOT / target if target else ROOT / path
            assert file.exists(), link
            assert not fragment or fragment in anchors(file.read_text(encoding="utf-8")), link


def test_links_of_the_package_are_absolute_and_lead_to_the_same() -> None:
    text = tool("package_readme.py").absolute_links(README, SOURCE)
    for before, after in zip(links(README), links(text), strict=True):
        if re.match(r"\w+:|#", before):
            assert after == before
        else:
            kind = "raw" if before.endswith(".svg") else "blob"
            assert after == f"{SOURCE}/{kind}/main/{before}"
    assert re.sub(rf"{SOURCE}/\w+/main/", "", text) == README


def recalls(study: str, *settings: str) -> tuple[list[str], str]:
    """R@10 of these settings in a study's confirmation, as its report shows it, and the number of seeds."""
    report = (ROOT / f"examples/studies/miniature/report/{study}.md").read_text(encoding="utf-8")
    table = report.partition("## The confirmation")[2]
    lines = (re.findall(rf"^\| `{setting}` .*", table, re.M)[0] for setting in settings)
    cells = [line.split("|")[3].strip() for line in lines]  # 8.75 ± 0.38 (8)
    (seeds,) = {cell.partition("(")[2].rstrip(")") for cell in cells}
    return [cell.split(" ±")[0] for cell in cells], seeds


def answer() -> list[str]:
    """The README's numbers of the recipe are those of the question's report."""
    report = (ROOT / "examples/studies/miniature/report/question.md").read_text(encoding="utf-8")
    low, high, seeds = re.findall(r"interval \+([\d.]+) to \+([\d.]+), (\d+) seeds\), paired", report)[0]
    (before, after), _ = recalls("question", "clip", "rankclip-recipe")
    return [f"from {before} to {after}", f"{low} to {high}", f"{seeds} pairs of seeds"]


def effect_of_a_teacher() -> list[str]:
    """… and of a teacher's ranks."""
    (before, after, distilled), seeds = recalls(
        "teacher", "clip", "top-ranks-top-8", "distillation-scale-x0.25"
    )
    return [f"from {before} to {after}", f"distillation to {distilled}", f"{seeds} seeds"]


def ways_to_learn() -> list[str]:
    """… and of its ranks beside its features."""
    (before, ranks, mimicry), seeds = recalls("distil", "clip", "top-ranks-64-4", "mimicry-8")
    return [f"from {before} to {ranks}", f"to {mimicry}", f"{seeds} seeds"]


def of_photographs(part: str) -> str:
    """The report of a part of the photographs' study."""
    return (ROOT / f"examples/studies/photographs/report/part{part}.md").read_text(encoding="utf-8")


def table_of_tests(report: str) -> str:
    """The table of a report's tests."""
    return report.partition("## The tests")[2].partition("## Secondary")[0]


def photographs_table() -> list[str]:
    """… in R@10 and in the agreement with experts, of every comparison."""
    report = of_photographs("1")
    tests = table_of_tests(report)
    recall = [line.split("|")[3].strip() for line in re.findall(r"^\| `.*", tests, re.MULTILINE)]
    (agreement,) = re.findall(r"^\| τ_c, experts +\|(.*)\|$", report, re.MULTILINE)
    both = zip(recall, agreement.replace("*", "").split("|"), strict=True)
    return [f"{of_recall} | {of_agreement.strip()} |" for of_recall, of_agreement in both]


def taught_heads() -> list[str]:
    """… in R@10 of every way to learn from one teacher, minus CLIP's and minus ranks'."""
    tests = table_of_tests(of_photographs("2b"))
    cells = [line.split("|")[3].strip() for line in re.findall(r"^\| `.*", tests, re.MULTILINE)]
    return [f"| {cell} |" for cell in cells]


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


def pearson() -> list[str]:
    """… of Pearson's distance, which was tried on photographs alone, and its place there."""
    report = of_photographs("2a")
    cells = re.findall(r"^\| `([\w-]+)` +\| `clip` +\| ([^|]+?) +\|", report, re.MULTILINE)
    arms = [arm for arm, cell in sorted(cells, key=lambda of: -float(of[1].split(" ±")[0].replace("−", "-")))]
    assert arms.index("pearson") == 1
    return [f"| {dict(cells)['pearson']} | – | – |", "Pearson, second best on photographs"]


def from_scratch() -> list[str]:
    """… of a student under RankCLIP without a teacher."""
    report = of_photographs("2a")
    (recall,) = re.findall(r"^\| `rankclip` +\| `clip` +\| ([^|]+?) +\|", report, re.MULTILINE)
    secondary = report.partition("## Secondary")[2]
    lines = (re.findall(rf"^\|{of}.*$", secondary, re.MULTILINE)[0] for of in ("  ", " `rankclip`"))
    names, values = ([cell.strip() for cell in line.split("|")] for line in lines)
    agreement = values[names.index("τ_c, experts")]
    assert "**" not in agreement + recall
    return [f"τ_c {agreement}, R@10 {recall}, neither significant"]


Lines = dict[str, dict[int, dict[str, Any]]]  # records by arm and seed


def records(folder: str, arm: Callable[[dict[str, Any]], str]) -> Lines:
    """The records of a test side below the studies' folder."""
    found: Lines = {}
    text = (ROOT / "examples/studies" / folder / "records.jsonl").read_text(encoding="utf-8")
    for line in map(json.loads, text.splitlines()):
        if line.get("setting", {}).get("side") == "test":
            found.setdefault(arm(line["setting"]), {})[line["setting"]["seed"]] = line
    return found


def bar() -> list[str]:
    """… the one-sided p of a gain above 1.5 points, of the preset."""
    found = []
    for name in ("emojis", "icons", "photographs"):
        preset, clip = (
            records(f"photographs/results/part2{part}/{name}", lambda setting: setting["arm"])[arm]
            for part, arm in (("e", "rankclip-encoders"), ("d", "clip"))
        )
        recall = ("metrics", "retrieval", "R@10, mean of both")
        values = [[reduce(getitem, recall, of[seed]) for seed in preset] for of in (preset, clip)]
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


def orders() -> list[str]:
    """… of ids from a search, minus CLIP's loss on emojis and photographs."""
    report = (ROOT / "examples/studies/orders/report/orders.md").read_text(encoding="utf-8")
    cells = re.findall(r"^\| `orders` +\| `clip` +\| ([^|]+?) +\|", report, re.MULTILINE)
    photographs, emojis = cells
    return [f"gain {emojis.lstrip('+')} points", photographs]


def two_forms() -> list[str]:
    """… of softmax minus ranks, one test over all three data sets."""
    numbers = r"\*\*\+([\d.]+) points \(95 % interval \+([\d.]+) to \+([\d.]+)"
    return ["{} ({} to {})".format(*of) for of in re.findall(numbers, of_photographs("2d"))]


def preset() -> list[str]:
    """… of the preset minus CLIP's, on photographs, emojis and icons."""
    (row,) = re.findall(r"^\| `rankclip-encoders` +\| `clip` .*$", of_photographs("2e"), re.MULTILINE)
    return [x.lstrip("+") for x in re.findall(r"\+?[\d.]+ ± [\d.]+", row)]


def ids() -> list[str]:
    """… where pairs belong together, of the tests that are named, and their shares of partners."""
    report = (ROOT / "examples/studies/ids/report/ids.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\w+, \w+) +\| ([\d.]+) % .*ignore +\| ([^|]+?) +\|", report, re.MULTILINE)
    significant = [(share, d) for _, share, d in rows if "**" in d]
    found = [text.strip("*+") for row in significant for text in row]
    assert len(significant) == 3
    return [*found, *(d[1:] for cell, _, d in rows if cell == "emojis, all" and d.startswith("+1"))]


def founds() -> list[dict[str, dict[str, float]]]:
    """The demo's R@10 by seed and model, as it wrote them."""
    files = sorted((ROOT / "examples/demo/results").glob("seed*.json"))
    return [json.loads(file.read_text(encoding="utf-8"))["found"] for file in files]


def demo_by_seed() -> list[str]:
    """… and its gain by seed."""
    return [", ".join(f"{found[ENCODERS]['minus_first']:+.1f}" for found in founds())]


def demo_table() -> list[str]:
    """… with its interval, beside both scores."""
    pairs = [(found["CLIP"], found[ENCODERS]) for found in founds()]
    return [
        f"| {clip['percent']:.1f} | {of['percent']:.1f} | {of['minus_first']:+.1f} ± {of['half_width']:.1f} |"
        for clip, of in pairs
    ]


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("docs/teachers.md", [demo_by_seed, two_forms, preset]),
        ("README.md", [preset]),
        ("examples/demo/README.md", [demo_table]),
        (
            "docs/evidence.md",
            [
                answer,
                effect_of_a_teacher,
                ways_to_learn,
                photographs_table,
                taught_heads,
                two_encoders,
                pearson,
                from_scratch,
                bar,
                costs,
                orders,
                parts_of_a_teacher,
                two_forms,
                preset,
                ids,
            ],
        ),
        ("examples/studies/miniature/README.md", [effect_of_a_teacher, ways_to_learn]),
        ("docs/teachers.md", [ways_to_learn]),
    ],
)
def test_numbers_are_the_reports(path: str, said: list[Callable[[], list[str]]]) -> None:
    text = " ".join((ROOT / path).read_text(encoding="utf-8").replace("*", "").split())
    numbers = [number for of in said for number in of()]
    assert [number for number in numbers if number not in text] == []
