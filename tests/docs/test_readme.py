"""The README leads to what exists, here and on a page outside the repository."""

from __future__ import annotations

import json
import re
from collections.abc import Callable

import pytest
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


def test_it_is_read_in_a_few_minutes_and_all_pages_in_an_hour() -> None:
    assert len(README.split()) <= 600
    pages = [page.read_text(encoding="utf-8") for page in (ROOT / "docs").rglob("*.md")]
    assert sum(len(text.split()) for text in [README, *pages]) <= 16_000


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
