"""The miniature's report: both forms of it and its figures, on records that are made up."""

import html.parser
import io
import random
import re

import miniature_records
import pytest
from miniature_paper import figures, grid, paper, report
from miniature_paper.collection import Collection
from PIL import Image

FULL = grid.PRESETS["full"]
PLAN = grid.plan(FULL)
COMMAND = 'run.py --note "<b>|</b>"'
LIMIT = 3_000_000


def everything():
    return miniature_records.records(PLAN, effect=0.8)


def write(folder, records, **options):
    options = {"preset": FULL, "planned": PLAN, "command": COMMAND, **options}
    page = report.write(records, folder, **options)
    return page.read_text(encoding="utf-8"), (folder / "report.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module", autouse=True)
def coarse():
    """Figures as coarse as a stamp, except where their size is tested."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "_DPI", 40)
        yield


@pytest.fixture
def no_figures(monkeypatch):
    """For what is not about them: drawing takes seconds."""
    monkeypatch.setattr(figures, "draw", lambda *_: {})


@pytest.fixture(scope="module")
def drawn(coarse):
    return figures.draw(Collection(everything(), FULL, PLAN), paper.load())


# What there is: everything, what an interrupted run leaves, one model.
@pytest.fixture(scope="module", params=[len(PLAN), 17, 1])
def written(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    return folder, *write(folder, everything()[: request.param], notes=["a.json & <i>b.json</i>"])


class Page(html.parser.HTMLParser):
    """A strict reader: every element is closed by its own end tag."""

    VOID = frozenset(("meta", "img", "source", "br", "link", "input"))

    def __init__(self, text):
        super().__init__()
        self.open, self.elements = [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, (tag, self.getpos())

    def of(self, tag):
        return [attrs for name, attrs in self.elements if name == tag]


# --- the page ---


def test_the_page_is_well_formed_and_needs_nothing_else(written):
    page = Page(written[1])
    allowed = ("data:image/png;base64,", "#", "https://arxiv.org/")
    for tag, attrs in page.elements:
        for name in attrs.keys() & {"src", "srcset", "href", "data", "action"}:
            assert attrs[name].startswith(allowed), (tag, name)
    assert not {"script", "link", "iframe", "object", "b", "i"} & {tag for tag, _ in page.elements}
    assert "url(" not in written[1]
    assert any("default-src 'none'" in attrs.get("content", "") for attrs in page.of("meta"))
    assert "<b>" not in written[1]  # the command's
    assert "a.json &amp; &lt;i&gt;" in written[1]


def test_the_page_can_be_used_without_eyes(written):
    page = Page(written[1])
    ids = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert {a["href"][1:] for a in page.of("a") if a["href"].startswith("#")} <= set(ids)
    assert all(len(attrs["alt"]) > 40 for attrs in page.of("img"))
    assert all(attrs["scope"] in ("row", "col") for attrs in page.of("th"))
    assert all(attrs["aria-label"] for attrs in page.of("span") if attrs.get("role") == "img")
    assert page.of("html")[0]["lang"] == "en"


def test_both_forms_have_the_same_cells(written):
    page = re.sub(r"<details>.*?</details>", "", written[1], flags=re.S)
    seen = re.findall(r"<t[hd]\b[^>]*>(.*?)</t[hd]>", page, re.S)
    lines = [line for line in written[2].splitlines() if line.startswith("|") and not line.startswith("|:")]
    cells = [cell for line in lines for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
    assert len(cells) == len(seen) > 1000

    def numbers(text):
        return re.findall(r"[−+]?\d[\d.,]*", re.sub(r"\]\([^)]*\)|<[^>]+>", " ", text))

    assert [numbers(cell) for cell in cells] == [numbers(cell) for cell in seen]


def test_every_test_is_in_the_page(tmp_path, no_figures):
    text, _ = write(tmp_path, everything())
    assert [int(n) for n in re.findall(r"<summary>All (\d+) tests", text)] == [45, 85, 55, 20, 34, 15, 30]


# --- Markdown ---


def test_the_markdown_names_its_figures_and_its_links_lead_to_its_headings(written):
    folder, _, text = written
    named = set(re.findall(r"\]\((figures/[^)]+)\)", text))
    assert named == {f"figures/{path.name}" for path in (folder / "figures").iterdir()}
    headings = (line[3:].lower() for line in text.splitlines() if line.startswith("## "))
    headings = {re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in headings}
    links = set(re.findall(r"\]\(#([^)]+)\)", text))
    assert len(links) == len(grid.EXHIBITS)
    assert links <= headings


def test_it_says_how_much_is_there_and_how_long_it_took(tmp_path, no_figures):
    records = everything()[:17]
    records[0]["conditions"]["torch"] = "2.14.0"
    text = write(tmp_path, records)[1]
    assert f"17 of {len(PLAN)}" in text
    assert "(3 of 5)" in text
    assert "2.13.0+cpu (16 models), 2.14.0 (1 models)" in text
    hours = sum(sum(record["seconds"].values()) for record in records) / 3600
    assert f"{hours:.1f} hours" in text
    assert f"{hours / 2:.1f} hours" in text  # two at a time


def test_the_order_of_the_records_does_not_matter(tmp_path, no_figures):
    records = everything()[:17]
    first = write(tmp_path, records)
    random.Random(0).shuffle(records)
    assert write(tmp_path, records) == first


def test_figures_that_are_no_longer_there_go(tmp_path):
    write(tmp_path, everything()[:1])
    figures_there = [f"figure{n}.png" for n in (3, 4, 6, 7)]
    assert [p.name for p in sorted((tmp_path / "figures").iterdir())] == figures_there
    (tmp_path / "figures" / "notes.txt").write_text("mine", encoding="utf-8")
    write(tmp_path, [])
    assert [p.name for p in (tmp_path / "figures").iterdir()] == ["notes.txt"]


def test_a_search_beside_the_report_is_linked(tmp_path, no_figures):
    assert report.SEARCH not in write(tmp_path, everything()[:2])[1]
    (tmp_path / report.SEARCH).write_text("# A stronger setting\n", encoding="utf-8")
    assert f"({report.SEARCH})" in write(tmp_path, everything()[:2])[1]


# --- the figures ---


def test_the_figures_of_a_whole_report_are_small(monkeypatch):
    monkeypatch.setattr(figures, "_DPI", 150)
    records = [miniature_records.record(s, effect=0.5, points=FULL.umap_pairs, pictures=6) for s in PLAN]
    drawn = figures.draw(Collection(records, FULL, PLAN), paper.load())
    assert set(drawn) == {"figure3", "figure4", "figure6", "figure7"}
    # The files, and both versions once more in the page, in base64.
    files = sum(len(p.light) for p in drawn.values())
    assert files + sum(len(p.light) + len(p.dark) for p in drawn.values()) * 4 / 3 < LIMIT


def test_dark_figures_are_dark_and_the_alternative_texts_hold_the_numbers(drawn):
    for picture in drawn.values():
        light, dark = (Image.open(io.BytesIO(d)).convert("L") for d in (picture.light, picture.dark))
        assert light.getpixel((0, 0)) > 240
        assert dark.getpixel((0, 0)) < 40
    shown = next(r for r in everything() if "figures" in r and r["setting"]["loss"] == "rankclip")
    assert f"RankCLIP {shown['metrics']['geometry/test']['modality_gap']:.2f}" in drawn["figure6"].alt
    assert all(f"“{one['text']}”" in drawn["figure7"].alt for one in shown["figures"]["heat_maps"])


def test_embeddings_on_a_line_are_drawn_without_contours():
    records = everything()[:2]
    for record in records:
        points = [[float(i), 2.0 * i] for i in range(20)]
        record["figures"]["umap"] = {"image": points, "text": points}
    drawn = figures.draw(Collection(records, FULL, PLAN), paper.load())
    assert {"figure6", "figure7"} <= set(drawn)
