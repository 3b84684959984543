"""The documents: their examples run, and the code they show is the code that is tested."""

from __future__ import annotations

import doctest
import inspect
import re
from pathlib import Path

import pytest

from rankloss_trainers.named import NamedLoss, option

ROOT = Path(__file__).parents[1]
WRITING = ROOT / "docs/writing.md"


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", path.read_text(), re.DOTALL | re.MULTILINE)


PAGES = sorted((ROOT / "docs").glob("*.md"))
PROMPTED = [page for page in PAGES if ">>> " in page.read_text()]


@pytest.mark.parametrize("page", PROMPTED, ids=lambda page: page.name)
def test_examples_with_a_prompt_run(page: Path) -> None:
    failures, count = doctest.testfile(str(page), module_relative=False)
    assert count > 0
    assert failures == 0


def test_examples_without_a_prompt_are_on_pages_whose_tests_run_them() -> None:
    # By test_trainers_document.py, test_trainers_page.py, rankloss_features, and below.
    # test_sentence_transformers_lists.py among them.
    run = {"features.md", "lists.md", "trainers.md", "trainers-more.md", "teachers.md", "writing.md"}
    assert {page.name for page in PAGES if any(">>> " not in x for x in blocks(page, "python"))} == run


def test_writing_a_loss_shows_the_package_that_the_tests_install() -> None:
    package = ROOT / "tests/rankloss_open_clip/third_party_loss"
    assert (package / "uniform_clip.py").read_text() in blocks(WRITING, "python")
    assert (ROOT / "tests/rankloss_trainers/cka_clip.py").read_text() in blocks(WRITING, "python")
    (registration,) = blocks(WRITING, "toml")
    assert registration in (package / "pyproject.toml").read_text()


def test_writing_a_loss_names_all_that_a_loss_may_define_and_an_option_takes() -> None:
    shown = re.findall(r"^\| `(\w+)` \|", WRITING.read_text(), re.MULTILINE)
    of_the_catalogue = {"name", "package", "options", "help", "with_defaults", "of"}
    derived = {"parts", "values", "changed", "told"}
    own = [x for x in vars(NamedLoss) if not x.startswith("_") and x not in of_the_catalogue | derived]
    assert shown == [*own, *inspect.signature(option).parameters]
