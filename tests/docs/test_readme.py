"""The README leads to what exists, here and on a page outside the repository."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

pytest.importorskip("hatchling")

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SOURCE = "https://github.com/rankloss/rankloss"


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
    spec = importlib.util.spec_from_file_location("package_readme", ROOT / "tools/package_readme.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    text = module.absolute_links(README, SOURCE)
    for before, after in zip(links(README), links(text), strict=True):
        if re.match(r"\w+:|#", before):
            assert after == before
        else:
            kind = "raw" if before.endswith(".svg") else "blob"
            assert after == f"{SOURCE}/{kind}/main/{before}"
    assert re.sub(rf"{SOURCE}/\w+/main/", "", text) == README


def test_readme_says_the_demos_minutes_once_and_is_short() -> None:
    assert README.count("minutes") == 1
    assert "about 5 minutes on 2 cores, set-up included" in " ".join(README.split())
    assert len(README.split()) < 800
    assert "$$" not in README  # the page of a package registry does not draw TeX


def recalls(study: str, *settings: str) -> list[str]:
    """R@10 of these settings in a study's confirmation, as its report shows it: ``8.75 ± 0.38 (8)``."""
    report = (ROOT / f"examples/miniature/report/{study}.md").read_text(encoding="utf-8")
    table = report.partition("## The confirmation")[2]
    lines = (re.findall(rf"^\| `{setting}` .*", table, re.M)[0] for setting in settings)
    return [line.split("|")[3].strip() for line in lines]


@pytest.mark.parametrize("path", ["README.md", "docs/evidence.md"])
def test_answer_to_the_question_is_the_reports(path: str) -> None:
    text = " ".join((ROOT / path).read_text(encoding="utf-8").split())
    report = (ROOT / "examples/miniature/report/question.md").read_text(encoding="utf-8")
    low, high, seeds = re.findall(r"interval \+([\d.]+) to \+([\d.]+), (\d+) seeds\), paired", report)[0]
    before, after = (cell.split(" ±")[0] for cell in recalls("question", "clip", "rankclip-recipe"))
    assert f"from {before} to {after}" in text
    assert f"{low} to {high}" in text
    assert f"{seeds} pairs of seeds" in text


@pytest.mark.parametrize("path", ["README.md", "docs/evidence.md", "examples/miniature/README.md"])
def test_effect_of_a_teacher_is_the_reports(path: str) -> None:
    text = " ".join((ROOT / path).read_text(encoding="utf-8").split())
    cells = recalls("teacher", "clip", "top-ranks-top-8", "distillation-scale-x0.25")
    before, after, distilled = (cell.split(" ±")[0] for cell in cells)
    assert f"from {before} to {after}" in text
    assert f"distillation to {distilled}" in text
    (seeds,) = {cell.partition("(")[2].rstrip(")") for cell in cells}
    assert f"{seeds} seeds" in text
