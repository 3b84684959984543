"""The miniature's report: from the committed records, from parts of them, and its figures."""

import random
import re

import pytest
from examples_common.page import Picture
from miniature_paper import command, figures, grid, report
from miniature_paper.options import _EXAMPLE as EXAMPLE
from miniature_paper.records import Store

FULL = grid.PRESETS["full"]
PLAN = grid.plan(FULL)
RECORDS = Store(EXAMPLE / "results" / "full").of(PLAN)


def write(folder, records):
    page = report.write(records, folder, preset=FULL, planned=PLAN, command='run.py --note "<b>|</b>"')
    return page.read_text(encoding="utf-8"), (folder / "report.md").read_text(encoding="utf-8")


@pytest.fixture
def undrawn(monkeypatch):
    """Drawing takes seconds, and its bytes depend on matplotlib's version."""
    monkeypatch.setattr(figures, "picture", lambda alt, figure_of, colours=0: Picture(b"", alt))


def test_the_committed_report_follows_from_the_committed_records(tmp_path, undrawn):
    (tmp_path / report.SEARCH).touch()
    command.main(["--preset", "full", "--report-only", "--report", str(tmp_path)])
    committed = EXAMPLE / "report" / "report.md"
    assert (tmp_path / "report.md").read_text(encoding="utf-8") == committed.read_text(encoding="utf-8")


def test_both_forms_say_the_same_of_what_an_interrupted_run_leaves(tmp_path, undrawn):
    records = RECORDS[:17]
    text, markdown = write(tmp_path, records)
    assert f"17 of {len(PLAN)}" in markdown
    assert "(3 of 5)" in markdown
    assert "<b>" not in text  # the command's
    assert set(re.findall(r'href="#([^"]+)"', text)) <= set(re.findall(r'id="([^"]+)"', text))
    shown = re.sub("<details>.*?</details>", "", text, flags=re.DOTALL)
    seen = re.findall(r"<t[hd]\b[^>]*>(.*?)</t[hd]>", shown, re.DOTALL)
    lines = [line for line in markdown.splitlines() if line.startswith("|") and not line.startswith("|:")]
    cells = [cell for line in lines for cell in re.split(r"(?<!\\)\|", line)[1:-1]]

    def numbers(text):
        return re.findall(r"[−+]?\d[\d.,]*", re.sub(r"\]\([^)]*\)|<[^>]+>", " ", text))

    assert len(cells) > 1000
    assert [numbers(cell) for cell in cells] == [numbers(cell) for cell in seen]
    random.Random(0).shuffle(records)
    assert write(tmp_path, records) == (text, markdown)


@pytest.mark.slow
def test_the_figures_are_small_and_go_when_they_are_no_longer_there(tmp_path):
    write(tmp_path, RECORDS)
    drawn = [*(tmp_path / "figures").iterdir()]
    assert {path.stem for path in drawn} == {"figure3", "figure4", "figure6", "figure7"}
    assert sum(path.stat().st_size for path in drawn) < 1_200_000
    write(tmp_path, [])
    assert list((tmp_path / "figures").iterdir()) == []
