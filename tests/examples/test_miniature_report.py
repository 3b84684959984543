"""The miniature's report: both forms of it and its figures, on records that are made up."""

from __future__ import annotations

import html.parser
import io
import random
import re

import pytest

for module in ("scipy", "PIL", "matplotlib", "jinja2"):
    pytest.importorskip(module, reason="the example's packages are not installed")

import miniature_records  # noqa: E402
from miniature_paper import figures, grid, paper, report  # noqa: E402
from miniature_paper.collection import Collection  # noqa: E402
from PIL import Image  # noqa: E402

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


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return folder, *write(folder, everything())


@pytest.fixture(scope="module")
def partial(tmp_path_factory):
    """What an interrupted run leaves: the first models of the plan."""
    folder = tmp_path_factory.mktemp("partial")
    return folder, *write(folder, everything()[:17], notes=["a.json & b.json are of one setting"])


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    return folder, *write(folder, everything()[:1])


@pytest.fixture(scope="module")
def nothing(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nothing")
    return folder, *write(folder, [])


@pytest.fixture(params=["whole", "partial", "one", "nothing"])
def written(request):
    return request.getfixturevalue(request.param)


class Page(html.parser.HTMLParser):
    """A strict reader: every element is closed by its own end tag."""

    VOID = frozenset(("meta", "img", "source", "br", "link", "input"))

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.text = [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), (tag, names)
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, (tag, self.getpos())

    def handle_data(self, data):
        self.text.append(data)

    def of(self, tag):
        return [attrs for name, attrs in self.elements if name == tag]


# --- the page ---


def test_the_page_is_well_formed_and_needs_nothing_else(written):
    page = Page(written[1])
    for tag, attrs in page.elements:
        for name in ("src", "srcset", "href", "data", "action"):
            if name in attrs:
                assert attrs[name].startswith(("data:image/png;base64,", "#")), (tag, name)
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.elements}
    style = written[1].partition("<style>")[2].partition("</style>")[0]
    assert "url(" not in style
    assert "@import" not in style
    assert any("default-src 'none'" in attrs.get("content", "") for attrs in page.of("meta"))


def test_the_page_can_be_used_without_eyes_and_on_a_phone(written):
    page = Page(written[1])
    ids = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
    assert len(ids) == len(set(ids))
    targets = [a["href"][1:] for a in page.of("a")] + [
        attrs["aria-labelledby"] for _, attrs in page.elements if "aria-labelledby" in attrs
    ]
    assert set(targets) <= set(ids)
    assert all(len(attrs["alt"]) > 40 for attrs in page.of("img"))
    assert all("scope" in attrs for attrs in page.of("th"))
    assert page.of("html")[0]["lang"] == "en"
    assert any(attrs.get("name") == "viewport" for attrs in page.of("meta"))
    assert "prefers-color-scheme: dark" in written[1]


def test_the_rows_of_a_table_have_its_columns(whole):
    for table in re.findall(r"<table>.*?</table>", whole[1], re.DOTALL):
        widths = set()
        for row in re.findall(r"<tr>.*?</tr>", table, re.DOTALL):
            cells = re.findall(r"<t[hd]\b[^>]*>", row)
            spans = (re.search(r'colspan="(\d+)"', cell) for cell in cells)
            widths.add(sum(int(span[1]) if span else 1 for span in spans))
        assert len(widths) == 1, table[:300]


def test_texts_are_escaped(whole, partial):
    assert "<b>|</b>" not in whole[1]
    assert "&lt;b&gt;|&lt;/b&gt;" in whole[1]
    assert "a.json &amp; b.json" in partial[1]


def test_a_figure_has_a_light_and_a_dark_version(whole):
    page = Page(whole[1])
    assert len(page.of("img")) == len(page.of("source")) == 4
    assert all("dark" in attrs["media"] for attrs in page.of("source"))
    sources = {attrs["srcset"] for attrs in page.of("source")} | {attrs["src"] for attrs in page.of("img")}
    assert len(sources) == 8


# --- Markdown ---


def test_the_markdown_has_its_figures_and_its_tables_are_rectangular(written):
    folder, _, text = written
    named = set(re.findall(r"\]\((figures/[^)]+)\)", text))
    assert named == {f"figures/{path.name}" for path in (folder / "figures").iterdir()}
    blocks = re.findall(r"(?:^\|.*\n?)+", text, re.MULTILINE)
    assert len(blocks) == 2 + 7  # conditions, summary, and every exhibit but Figure 7
    for block in blocks:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1


def test_the_links_of_the_markdown_lead_to_its_headings(whole):
    text = whole[2]
    headings = {
        re.sub(r"[^\w\- ]", "", line[3:].lower()).replace(" ", "-")
        for line in text.splitlines()
        if line.startswith("## ")
    }
    links = set(re.findall(r"\]\(#([^)]+)\)", text))
    assert len(links) == len(grid.EXHIBITS)
    assert links <= headings


# --- what both say ---


def page_rows(text):
    """What can be seen of the exhibits' tables in the page, row by row, the lowest row of heads first."""
    rows = []
    for table in re.findall(r"<table>\s*<caption>(?:Table|Figure).*?</table>", text, re.DOTALL):
        head, _, body = table.partition("</thead>")
        found = [re.findall(r"<tr>.*?</tr>", part, re.DOTALL) for part in (head, body)]
        for row in [found[0][-1], *found[1]]:
            seen = re.sub(r'<span class="hidden">.*?</span>', "", row)
            cells = re.findall(r"<t[hd]\b[^>]*>(.*?)</t[hd]>", seen, re.DOTALL)
            rows.append([" ".join(re.sub(r"<[^>]+>", " ", cell).split()) for cell in cells])
    return rows


def markdown_rows(text):
    rows = []
    for block in re.findall(r"(?:^\|.*\n?)+", text, re.MULTILINE)[2:]:  # after the conditions and the summary
        head, _, *body = (
            [cell.replace("<br>", " ").replace("*", "").strip() for cell in line[1:-1].split("|")]
            for line in block.splitlines()
        )
        rows += [[label.rpartition(": ")[2] for label in head], *body]
    return rows


def test_both_forms_have_the_same_tables(written):
    of_page, of_markdown = page_rows(written[1]), markdown_rows(written[2])
    assert len(of_page) == len(of_markdown) > 100
    for ours, theirs in zip(of_page, of_markdown, strict=True):
        assert ours == (theirs[:1] if len(ours) == 1 else theirs)


def test_it_begins_with_how_much_is_there(whole, partial, nothing):
    assert f"All {len(PLAN)} planned models are trained and measured." in whole[1]
    for text in partial[1:]:
        assert f"17 of {len(PLAN)} planned models are trained and measured" in text
        assert "the same command goes on with the rest" in text
    assert f"0 of {len(PLAN)} planned models" in nothing[2]


def test_command_versions_hardware_and_hours(whole):
    for text in whole[1:]:
        assert "run.py --note" in text
        assert "2.13.0" in text
        assert "A processor" in text
        hours = len(PLAN) * 660 / 3600
        assert f"{hours:.1f} hours of training and measuring" in text
        assert f"in about {hours / 2:.1f} hours" in text
        assert f"{FULL.steps:,} steps of {FULL.batch_size} pairs" in text


def test_every_exhibit_has_its_section_and_its_paragraph(written):
    for name in ("Table 1", "Table 2", "Table 3", "Table 4", "Figure 3", "Figure 4", "Figure 6", "Figure 7"):
        assert f"## {name}: " in written[2]
        assert f">{name}: " in written[1]
        assert f"The paper's {name}" in written[2]


def test_missing_seeds_and_models_show(partial):
    for text in partial[1:]:
        assert "(3 of 5)" in text
        assert "Seeds are missing: " in text


def test_nothing_is_claimed_of_one_seed(one):
    for text in one[1:]:
        assert "▲ " not in text.replace("▲ ▼", "")
        assert "better than" not in text
        assert "worse than" not in text


def test_the_papers_numbers_are_marked_as_such(written):
    for text in written[1:]:
        assert "The paper's: MS-COCO, image → text" in text
        assert "19.57" in text
        assert "not available to us" in text
        assert paper.load().reading[:60] in text
    assert 'tbody class="quoted"' in written[1]


def test_different_conditions_are_told_apart(tmp_path, no_figures):
    records = everything()[:3]
    records[0]["conditions"]["torch"] = "2.14.0"
    _, text = write(tmp_path, records)
    assert "2.13.0 (2 models), 2.14.0 (1 models)" in text


def test_the_order_of_the_records_does_not_matter(tmp_path, no_figures):
    records = everything()[:17]
    first = write(tmp_path, records)
    random.Random(0).shuffle(records)
    assert write(tmp_path, records) == first


def test_figures_that_are_no_longer_there_go(tmp_path):
    write(tmp_path, everything()[:1])
    assert [p.name for p in sorted((tmp_path / "figures").iterdir())] == [
        f"figure{n}.png" for n in (3, 4, 6, 7)
    ]
    (tmp_path / "figures" / "notes.txt").write_text("mine", encoding="utf-8")
    write(tmp_path, [])
    assert [p.name for p in (tmp_path / "figures").iterdir()] == ["notes.txt"]


def test_records_out_of_the_plan_are_mentioned(tmp_path, no_figures):
    _, text = write(tmp_path, everything()[:8], planned=PLAN[:6])
    assert "Left out, as they are not part of this plan: 2 records." in text
    assert "All 6 planned models" in text


def test_a_search_beside_the_report_is_linked(tmp_path, no_figures):
    forms = write(tmp_path, everything()[:2])
    assert not any(report.SEARCH in form for form in forms)
    (tmp_path / report.SEARCH).write_text("# A stronger setting\n", encoding="utf-8")
    page, text = write(tmp_path, everything()[:2])
    assert f'<a href="{report.SEARCH}">' in page
    assert f"[{report.SEARCH}]({report.SEARCH})" in text


def test_the_quick_preset_says_what_it_is(tmp_path, no_figures):
    quick = grid.PRESETS["quick"]
    plan = grid.plan(quick)
    _, text = write(tmp_path, miniature_records.records(plan[:12]), preset=quick, planned=plan, command=None)
    assert quick.note in text
    assert "run.py --preset quick" in text
    assert "better than" not in text


def test_a_report_without_a_plan_is_refused(tmp_path):
    with pytest.raises(ValueError, match="planned: at least one"):
        report.write([], tmp_path, preset=FULL, planned=[])


# --- the figures ---


def test_the_figures_of_a_whole_report_are_small(monkeypatch):
    monkeypatch.setattr(figures, "_DPI", 150)
    records = [miniature_records.record(s, effect=0.5, points=FULL.umap_pairs, pictures=6) for s in PLAN]
    drawn = figures.draw(Collection(records, FULL, PLAN), paper.load())
    assert set(drawn) == {"figure3", "figure4", "figure6", "figure7"}
    # The files, and both versions once more in the page, in base64.
    files = sum(len(p.light) for p in drawn.values())
    embedded = sum(len(p.light) + len(p.dark) for p in drawn.values()) * 4 / 3
    assert files + embedded < LIMIT
    for picture in drawn.values():
        for data in (picture.light, picture.dark):
            with Image.open(io.BytesIO(data)) as image:
                assert 1000 < image.width < 1400


def test_dark_figures_are_dark(drawn):
    for picture in drawn.values():
        light, dark = (Image.open(io.BytesIO(d)).convert("L") for d in (picture.light, picture.dark))
        assert light.getpixel((0, 0)) > 240
        assert dark.getpixel((0, 0)) < 40


def test_the_alternative_texts_hold_the_numbers(drawn):
    shown = next(r for r in everything() if "figures" in r and r["setting"]["loss"] == "rankclip")
    assert f"RankCLIP {shown['metrics']['geometry/test']['modality_gap']:.2f}" in drawn["figure6"].alt
    assert all(f"“{one['text']}”" in drawn["figure7"].alt for one in shown["figures"]["heat_maps"])
    assert f"{FULL.sizes[0]:,} to {FULL.sizes[-1]:,}" in drawn["figure4"].alt


def test_embeddings_on_a_line_are_drawn_without_contours():
    records = everything()[:2]
    for record in records:
        points = [[float(i), 2.0 * i] for i in range(20)]
        record["figures"]["umap"] = {"image": points, "text": points}
    drawn = figures.draw(Collection(records, FULL, PLAN), paper.load())
    assert {"figure6", "figure7"} <= set(drawn)


def test_pictures_are_of_what_the_plan_shows():
    """Records of other seeds carry no pictures; nothing is drawn of them."""
    others = [r for r in everything() if r["setting"]["seed"] > 0]
    collection = Collection(others, FULL, PLAN)
    assert set(figures.draw(collection, paper.load())) == {"figure3", "figure4"}
