"""The pages: their words, tables and formulas are what the code has, and notebooks run."""

from __future__ import annotations

import ast
import importlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tools_folder import ROOT, tool

import rankloss
from rankloss import schedules
from rankloss_trainers import catalog, create
from registered import OF_PACKAGES

PAGES = {path.stem: path.read_text(encoding="utf-8") for path in (ROOT / "docs").glob("*.md")}
SOURCE = "https://github.com/rankloss/rankloss"
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", ["open_clip", "transformers", "sentence_transformers", "loops"])
def test_a_trainers_page_says_which_curve_to_watch(page: str) -> None:
    section = PAGES[page].partition("# Watch this\n")[2].partition("\n#")[0].lower()
    words = ("cross_modal_tau", "ndcg", "assets/watch-light.svg", "assets/watch-dark.svg")
    assert [word for word in words if word not in section] == []
    assert (ROOT / "docs/assets/watch-light.svg").exists()


# --- links ------------------------------------------------------------------------------------------------


def links(markdown: str) -> list[str]:
    """The addresses of links and pictures, in Markdown and in HTML."""
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
        is_absolute_or_here = re.match(r"\w+:|#", before)
        kind = "raw" if before.endswith(".svg") else "blob"
        assert after == (before if is_absolute_or_here else f"{SOURCE}/{kind}/main/{before}")
    assert re.sub(rf"{SOURCE}/\w+/main/", "", text) == README  # nothing else has changed


# --- notebooks --------------------------------------------------------------------------------------------

NOTEBOOKS = sorted((ROOT / "docs/notebooks").glob("*.ipynb"))


def outputs_of(cells: list[Any]) -> list[int]:
    """The number of outputs of each cell of code."""
    return [len(cell["outputs"]) for cell in cells if cell["cell_type"] == "code"]


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_has_the_committed_outputs(
    notebook: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    if notebook.stem == "openmoji":
        pytest.importorskip("resvg_py")
        monkeypatch.setenv("OPENMOJI_EPOCHS", "1")
        monkeypatch.setenv("OPENMOJI_OUTPUT", str(tmp_path / "openmoji"))
    read = nbformat.read(notebook, as_version=4)
    # The longest cell takes minutes on two idle cores, and has taken half an hour on busy ones.
    resources = {"metadata": {"path": str(notebook.parent)}}
    nbclient.NotebookClient(read, timeout=5400, kernel_name="python3", resources=resources).execute()
    committed = json.loads(notebook.read_text(encoding="utf-8"))
    assert outputs_of(read.cells) == outputs_of(committed["cells"])


# --- formulas and options ---------------------------------------------------------------------------------


def formulas_of(docstring: str) -> list[str]:
    """The indented blocks of a docstring before its sections, such as ``Args:``."""
    before_sections, *_ = re.split(r"^\w+:$", docstring, flags=re.MULTILINE)
    return re.findall(r"(?<=\n\n)(?: {4}.*\n?)+", before_sections)


def docstrings() -> list[str]:
    """The docstrings of rankloss."""
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in (ROOT / "rankloss").rglob("*.py")]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    described = (ast.Module, ast.ClassDef, ast.FunctionDef)
    return [ast.get_docstring(node) or "" for node in nodes if isinstance(node, described)]


def test_no_sign_of_a_docstring_is_left_untranslated() -> None:
    blocks = [block for docstring in docstrings() for block in formulas_of(docstring)]
    assert len(blocks) >= 8
    for block in blocks:
        tex = tool("site/formulas.py").to_tex(block)
        assert tex.isascii(), tex
        assert tex.count("{") == tex.count("}")


def test_the_tables_of_options_are_generated() -> None:
    options_table = tool("options_table.py")
    shown = {match[2]: match[3] for match in options_table.SECTION.finditer(PAGES["options"])}
    expected = {name: options_table.table(name) for name in options_table.OWNERS}
    assert shown == expected, "python tools/options_table.py writes them"


def test_every_schedule_is_named() -> None:
    (row,) = re.findall(r"^\| `schedule` .*", PAGES["options"], re.MULTILINE)
    listed = row.partition("training: ")[2].replace(" or ", " ")
    assert re.findall(r"\w+", listed) == list(schedules.NAMES)


# --- papers -----------------------------------------------------------------------------------------------

ROWS = [line.strip("| ").split(" | ") for line in PAGES["papers"].splitlines() if line.startswith("| [")]
"""The rows of papers, which begin with a link."""


def test_every_paper_has_a_row_with_a_link_and_what_was_measured() -> None:
    assert len(ROWS) > 10
    for paper, _, _, measured in ROWS:
        assert re.match(r"\[[\w-]+\]\(https:", paper)
        assert re.search(r"\d\.\d\d ± \d|not measured|\]\(\w+\.md#", measured)


@pytest.mark.parametrize("call", re.findall(r"`([\w.]+\([^`]*\))`", PAGES["papers"]))
def test_what_a_row_of_the_papers_names_can_be_built(call: str) -> None:
    of_packages = [catalog.load(name).constructor for name in OF_PACKAGES]
    names = {**vars(rankloss), "rankloss": rankloss, **{make.__name__: make for make in of_packages}}
    assert isinstance(eval(call, names), torch.nn.Module)


def test_feature_distillation_is_that_of_the_paper() -> None:
    """There 2000 times the mean over pairs and dimensions."""
    v, t, teacher_v, teacher_t = torch.nn.functional.normalize(torch.randn(4, 6, 512), dim=-1)
    (call,) = re.findall(r"`(MimicryLoss\([^`]*\))`", PAGES["papers"])
    loss = eval(call, vars(rankloss))
    teacher = {"reference_image_features": teacher_v, "reference_text_features": teacher_t}
    found = loss(v, t, 10.0, output_dict=True, **teacher)["mimicry_loss"]
    expected = 2000 * ((v - teacher_v).square().mean() + (t - teacher_t).square().mean())
    torch.testing.assert_close(found, expected)


# --- the losses -------------------------------------------------------------------------------------------

SECTIONS = re.split(
    r"^### ", PAGES["losses"].partition("## The losses")[2].partition("\n## ")[0], flags=re.MULTILINE
)[1:]
BY_NAME = {section.partition("\n")[0]: section for section in SECTIONS}
SCHEMA = ["Call", "Formula", "Paper", "Here"]


def test_every_loss_has_its_call_formula_paper_and_measurement() -> None:
    for name, section in BY_NAME.items():
        assert re.findall(r"^- \*\*(\w+)\*\*:", section, re.MULTILINE) == SCHEMA, name


def test_every_loss_is_named_by_the_page_of_losses() -> None:
    text = "\n".join(SECTIONS)
    named = {*re.findall(r"`([\w-]+)`", text), *re.findall(r"(?<=--loss )[\w-]+", text), *BY_NAME}
    of_rankloss = {name for name in OF_PACKAGES if catalog.package_of(name).startswith("rankloss ")}
    assert {*catalog.LOSSES, *of_rankloss} <= named


def test_a_baseline_is_named_by_the_pages_of_all_losses_alone() -> None:
    """So it goes by its section, its row of the papers, and the records of what was measured."""
    modules = {name: catalog.known()[name][0].module for name in OF_PACKAGES}
    baselines = [name for name, module in modules.items() if module.startswith("rankloss_baselines.")]
    of_all_losses = ("losses", "papers", "evidence", "evidence_details")
    others = {page: text for page, text in PAGES.items() if page not in of_all_losses}
    others["README"] = README
    for name in baselines:
        naming = re.compile(rf"\b{name}(loss)?\b", re.IGNORECASE)
        assert [page for page, text in others.items() if naming.search(text)] == []


@pytest.mark.parametrize("name", BY_NAME)
def test_a_call_of_a_loss_builds_it(name: str) -> None:
    (item,) = re.findall(r"^- \*\*Call\*\*:(.*(?:\n  .*)*)", BY_NAME[name], re.MULTILINE)
    calls = re.findall(r"`((?:create|rankloss\w*\.\w+)\([^`]*\))`", item)
    packages = re.findall(r"`(rankloss\w*)\.", item)
    names = {"create": create, **{package: importlib.import_module(package) for package in packages}}
    assert len(calls) >= 1
    for call in calls:
        assert isinstance(eval(call, names), torch.nn.Module)
    assert f"--loss {name}" in item


# --- the map of files in CONTRIBUTING.md ------------------------------------------------------------------

CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
MAP = CONTRIBUTING.partition("<!-- map:")[2].partition("<!-- /map -->")[0]
FOLDERS = [
    "rankloss",
    *(f"integrations/{x.name}" for x in sorted((ROOT / "integrations").glob("rankloss_*"))),
]


def in_the_tree(folder: str, rows: list[str]) -> set[str]:
    """The files below a folder, as the rows name them: each by itself, by its folder, or as ``*.py``."""

    def row_of(file: str) -> str:
        folders = [row for row in rows if row.endswith("/") and file.startswith(row)]
        if folders:
            return folders[0]
        if file not in rows and "/" not in file and "*.py" in rows:
            return "*.py"
        return file

    root = ROOT / folder
    return {row_of(path.relative_to(root).as_posix()) for path in root.rglob("*.py")}


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_file_is_on_the_map_once_and_nothing_else(folder: str) -> None:
    section = MAP.partition(f"### `{folder}/`")[2].partition("###")[0]
    rows = re.findall(r"^\| `([^`]+)` \|", section, re.MULTILINE)
    assert len(rows) == len(set(rows))
    assert set(rows) == in_the_tree(folder, rows)


def test_every_file_that_the_recipes_name_exists() -> None:
    recipes = CONTRIBUTING.partition("## Adding")[2]
    paths = {*re.findall(r"`((?:\w+/)+[\w.]*)`", recipes)}
    named = {path for path in paths if not re.search("NAME|TRAINER", path)}  # which the reader fills in
    assert len(named) > 10
    assert [path for path in named if not (ROOT / path).exists()] == []
