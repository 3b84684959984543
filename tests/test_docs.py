"""The documents: their examples run, and the code they show is the code that is tested."""

from __future__ import annotations

import doctest
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import rankloss
from rankloss.losses import takes_teacher
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
    # By test_trainers_document.py, test_trainers_page.py, rankloss_features/test_trainers.py, the tests of
    # lists, and below.
    run = {
        f"{x}.md" for x in ("lists", "loops", "sentence_transformers", "teachers", "transformers", "writing")
    }
    assert {page.name for page in PAGES if any(">>> " not in x for x in blocks(page, "python"))} == run


def test_writing_a_loss_shows_a_loss_that_the_tests_train_in_25_lines() -> None:
    package = ROOT / "tests/rankloss_open_clip/third_party_loss"
    short = (ROOT / "tests/rankloss_trainers/soft_clip.py").read_text()
    assert short in blocks(WRITING, "python")
    assert len([line for line in short.splitlines() if line.strip()]) <= 25
    (registration,) = blocks(WRITING, "toml")
    assert registration in (package / "pyproject.toml").read_text()


def test_the_short_loss_trains_on_the_bases_gradient_and_its_own() -> None:
    names: dict[str, Any] = {}
    exec((ROOT / "tests/rankloss_trainers/soft_clip.py").read_text(), names)
    chosen = names["Soft"](weight=0.5, scale=10.0)
    v, t = torch.eye(4, 8), torch.eye(4, 8).flip(0).requires_grad_()
    teacher = torch.ones(4, 3) / 3**0.5  # to which all captions are equal
    loss = chosen.build(rankloss.ClipLoss(), rankloss.Gather())
    entries = loss(v, t, logit_scale=1.0, reference_text_features=teacher, output_dict=True)
    logits = 10 * torch.eye(4)
    assert entries["soft_loss"].item() == pytest.approx(-0.5 * logits.log_softmax(-1).mean().item())
    assert entries["contrastive_loss"] == rankloss.ClipLoss()(v, t, 1.0)
    entries["soft_loss"].backward()
    assert t.grad is not None
    assert chosen.teacher is None
    assert takes_teacher(loss)


def test_writing_a_loss_names_all_that_a_loss_may_define_and_an_option_takes() -> None:
    shown = re.findall(r"^\| `(\w+)` \|", WRITING.read_text(), re.MULTILINE)
    of_the_catalogue = {"name", "package", "options", "help", "with_defaults", "of"}
    derived = {"parts", "values", "changed", "told"}
    own = [x for x in vars(NamedLoss) if not x.startswith("_") and x not in of_the_catalogue | derived]
    assert shown == [*own, *inspect.signature(option).parameters]
