"""Numbers of the pages are those of the studies' reports and records."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import cache, reduce
from operator import getitem
from typing import Any

import numpy as np
import pytest
from scipy import stats
from tools_folder import ROOT, tool

ENCODERS = "CLIP + two encoders"  # the demo's name of it
PAGES = [
    f"docs/{name}.md"
    for name in ("evidence", "evidence_details", "lists", "losses", "papers", "teachers", "your_data")
]
NUMBER = r"(?<![\d.])\d+\.\d\d(?![\d.])"
ROUNDED_INTERVAL = r"(?<![\d.])\d+\.\d ± \d+\.\d(?![\d.])"


@pytest.mark.parametrize("path", [*PAGES, "examples/studies/miniature/README.md"])
def test_every_gain_and_score_is_in_a_report(path: str) -> None:
    """That is, every number with two decimals, with the interval that follows it."""
    text, reports = prose(path), reported()
    on_the_page = re.findall(rf"{NUMBER}(?: ± {NUMBER})?", text)
    in_reports = {*re.findall(NUMBER, reports), *re.findall(rf"{NUMBER} ± {NUMBER}", reports)}
    assert len(on_the_page) >= 8
    assert set(on_the_page) - in_reports == set()


@pytest.mark.parametrize("page", ["README.md", "docs/evidence.md"])
def test_every_interval_of_one_decimal_rounds_one_of_a_report(page: str) -> None:
    on_the_page = re.findall(ROUNDED_INTERVAL, prose(page))
    in_reports = {*re.findall(ROUNDED_INTERVAL, tool("cases.py").with_one_decimal(reported()))}
    assert len(on_the_page) >= 12
    assert set(on_the_page) - in_reports == set()


def test_gains_in_short_round_those_of_the_tables() -> None:
    """The whole numbers of README's table of what to expect, row by row."""
    of_encoders = first_gains(of_mimicry(), column=0)
    over_clip = over_the_higher_clip()
    of_spread, of_ranks = first_gains(over_clip, column=0), first_gains(over_clip, column=1)
    of_mimicry_of_icons = differences_of("captions")["icons-250", "mimicry", "clip"]
    expected = {
        "`mimicry` of a CLIP of icons": f"icons {whole(of_mimicry_of_icons)}",
        "`rankclip-encoders`": f"icons {of_encoders['icons, 64']}, emojis {of_encoders['emojis, 250']}, "
        f"photographs {of_encoders['photographs, 250']} to {of_encoders['photographs, 64']}",
        "`spread`": f"icons {of_spread['icons, 64']} to {of_spread['icons, 250']}, "
        f"photographs {of_spread['photographs, 250']} in batches of 250",
        "`rankclip`": f"icons {of_ranks['icons, 250']} to {of_ranks['icons, 64']}",
    }
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = dict(re.findall(r"^\| (`.*?) \| (.*?) \|", readme.partition("**In short")[2], re.MULTILINE))
    assert shown == expected


def first_gains(rows: list[str], column: int) -> dict[str, str]:
    """The gain in a column of a table's rows, as a whole number, by the row's name."""
    return {name: whole(gains[column]) for name, *gains in map(cells_of, rows) if gains[column] != "–"}


def cells_of(row: str) -> list[str]:
    """The cells of a row of a table."""
    return [cell.strip() for cell in row.strip("| ").split(" | ")]


def whole(gain: str) -> str:
    """A gain, as "+4.19 (3.14 to 5.23)" or "+4.19 ± 1.05", rounded and without its interval."""
    return f"{float(gain.split()[0].replace('−', '-')):+.0f}"


def prose(path: str) -> str:
    """The text of a page without code, addresses and emphasis."""
    text = (ROOT / path).read_text(encoding="utf-8")
    return re.sub(r"```.*?```|\]\([^)]*\)|\*", "", text, flags=re.DOTALL)


@cache
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
    """The difference in R@10, with its interval, of every row of the table of a report's tests."""
    rows = re.findall(r"^\| `.*", table_of_tests(report), re.MULTILINE)
    return [row.split("|")[3].strip() for row in rows]


def photographs_table() -> list[str]:
    """Differences in R@10 and in the agreement with experts, of the four comparisons that the page shows."""
    report = of_photographs("1")
    (agreement,) = re.findall(r"^\| τ_c, experts +\|(.*)\|$", report, re.MULTILINE)
    in_recall, in_agreement = first_differences(report), agreement.replace("*", "").split("|")
    comparisons = re.findall(r"^\| (`.*?) +\|", table_of_tests(report), re.MULTILINE)
    assert len(comparisons) == len(in_recall) == len(in_agreement) == 9
    on_the_page = (0, 1, 5, 6)  # rows of the report
    return [f"{in_recall[row]} | {in_agreement[row].strip()} |" for row in on_the_page]


RECALL = ("retrieval", "R@10, mean of both")
"""The place of R@10 in the metrics of a record."""
Lines = dict[str, dict[int, dict[str, Any]]]  # records by arm and seed


def records(folder: str, arm: Callable[[dict[str, Any]], str]) -> Lines:
    """The records of a folder of a study that are of the test side, by an arm's name and seed."""
    found: Lines = {}
    text = (ROOT / "examples/studies" / folder / "records.jsonl").read_text(encoding="utf-8")
    for line in map(json.loads, text.splitlines()):
        if line.get("setting", {}).get("side") == "test":
            found.setdefault(arm(line["setting"]), {})[line["setting"]["seed"]] = line
    return found


def of_seeds(lines: dict[int, dict[str, Any]], *place: str) -> dict[int, float]:
    """R@10, the mean of both ways, by seed, at a place in the metrics."""
    return {seed: reduce(getitem, ("metrics", *place, *RECALL), line) for seed, line in lines.items()}


def minus(first: dict[int, dict[str, Any]], second: dict[int, dict[str, Any]], *place: str) -> str:
    """The mean difference in R@10 of the seeds that both have, with its 95 % t-interval."""
    recall, other = of_seeds(first, *place), of_seeds(second, *place)
    return mean_and_interval(np.array([recall[seed] - other[seed] for seed in recall.keys() & other.keys()]))


CELLS_OF_ICONS = [
    ("icons", 64, 4),
    ("icons", 250, 4),
    ("icons", 250, 16),
    ("icons-71680", 64, 2),
    ("icons-all", 64, 2),
]
"""Records of the captions' study: folder, batch size and epochs."""


def beside_shuffled_words() -> list[str]:
    """Differences in R@10: RankCLIP minus CLIP and minus shuffled words, two encoders minus these words."""
    rows = []
    for folder, *cell in CELLS_OF_ICONS:
        arms = records(f"captions/results/{folder}", of_cell(*cell))
        encoders = minus(arms["encoders"], arms["shuffled"]) if "encoders" in arms else "–"
        ranks = [minus(arms["rankclip"], arms[other]) for other in ("clip", "shuffled")]
        rows.append(f"| {len(arms['rankclip'])} | {' | '.join([*ranks, encoders])} |")
    return rows


def rows_of(path: str, head: str) -> list[list[str]]:
    """The cells of the rows of a report's tables that begin with a pattern, without code's marks."""
    text = (ROOT / "examples/studies" / path).read_text(encoding="utf-8")
    lines = re.findall(rf"^\| {head}.*\|$", text, re.MULTILINE)
    return [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in lines]


def differences_of(study: str) -> dict[tuple[str, str, str], str]:
    """The differences in R@10 of a study's report, by cell and both arms: from its rows of eight columns."""
    rows = rows_of(f"{study}/report/{study}.md", "[^|]+ \\| +`")
    of_tests = (row for row in rows if len(row) == 8)
    return {(cell, arm, minus): difference for cell, arm, minus, difference, *_ in of_tests}


def spread_on_heads() -> list[str]:
    """Differences in R@10 of arms of heads on frozen encoders, and of those with the same dropout."""
    smoothed = [("spread", "clip"), ("smoothing", "clip"), ("spread", "smoothing")]
    ranked = [("rankclip", "clip"), ("rankclip", "spread"), ("rankclip-spread", "spread")]
    heads, dropout = differences_of("heads"), differences_of("dropout")
    for pair in smoothed:  # each arm is at its best with this dropout, which the page says
        assert dropout[("dropout 0.15", *pair)] == dropout[("each at its best", *pair)]
    rows = [[heads[(cell, *pair)] for pair in (*smoothed, *ranked)] for cell in ("emojis", "photographs")]
    for share in ("0", "0.15", "0.3"):
        measured = [dropout[(f"dropout {share}", *pair)] for pair in smoothed]
        rows.append([*measured, *["–"] * len(ranked)])
    return [f"| {' | '.join(row)} |" for row in rows]


CELLS = {
    "emojis, 250": ("emojis", 250, 30, "emojis-250", "clip"),
    "icons, 64": ("icons", 64, 4, "icons-64", "smoothing"),
    "icons, 250": ("icons", 250, 4, "icons-250", "clip"),
    "photographs, 64": ("photographs", 64, 8, "photographs-64", "clip"),
    "photographs, 250": ("photographs", 250, 8, "photographs-250", "scale-5"),
    "71,680 icons, 64": ("icons-71680", 64, 2, "icons-71680-64", "smoothing"),
}
"""Cells of both studies of one student: records, batch, epochs, name, and CLIP of the captions' study."""
ARMS = {"std-constant": "spread", "rankclip": "rankclip", "encoders-spread": "encoders-spread"}
"""Arms of the study of the spread, as its records and its report have them."""
CLIPS = ("clip", "smoothing")
"""Arms of CLIP's loss in the study of the alignment; the dev side of a cell chose one."""
OF_ALIGNMENT = ("emojis-250", "icons-64", "photographs-64", "photographs-250", "icons-71680-64")
"""Cells of that student in the study of the alignment, too."""


def baselines() -> list[str]:
    """CLIP's R@10 in the three studies, where the captions' has the arm that its dev side chose."""
    rows = []
    for title, (*_, cell, reference) in CELLS.items():
        of_cell_in_report = rows_of("captions/report/captions.md", f"{cell} ")
        (tries,) = (row for row in of_cell_in_report if row[-1] == reference)
        assert len(tries) == 9  # the columns of the table of CLIP's tries, whose last is the chosen arm
        means = [mean_of(study, cell, arm) for study, arm in (("captions", reference), ("spread", "clip"))]
        means.append(mean_of("alignment", cell, "clip") if cell in OF_ALIGNMENT else "–")
        rows.append(f"| {title} | {' | '.join(means)} |")
    return rows


def mean_of(study: str, cell: str, arm: str) -> str:
    """An arm's R@10 in a report, without the number of its seeds."""
    rows = rows_of(f"{study}/report/{study}.md", f"{cell} ")
    recall = next(recall for _, of, recall, *_ in rows if of == arm and "±" in recall)
    return re.sub(r" \([0-9]+\)$", "", recall)


def of_mimicry() -> list[str]:
    """Differences in R@10 of mimicry of two encoders in one space: over the highest CLIP, and paired."""
    tests, rows = differences_of("alignment"), []
    pairs = [("mimicry", other) for other in ("clip", "encoders", "mimicry-shuffled")]
    pairs += [(more, "mimicry") for more in ("mimicry-ranks", "mimicry-spread")]
    clips = {
        "emojis-250": records("captions/results/emojis", of_cell(250, 30))["clip"],
        "icons-64": records("captions/results/icons", of_cell(64, 4))["smoothing"],
        "photographs-64": records("spread/results/photographs", of_cell(64, 8))["scale"],
        "photographs-250": records("captions/results/photographs", of_cell(250, 8))["scale-5"],
    }
    for cell, title in {
        "emojis-250": "emojis, 250",
        "icons-64": "icons, 64",
        "photographs-64": "photographs, 64",
        "photographs-250": "photographs, 250",
    }.items():
        batch, epochs = next((of[1], of[2]) for of in CELLS.values() if of[3] == cell)
        own = records(f"alignment/results/{cell.partition('-')[0]}", of_cell(batch, epochs))["mimicry"]
        over = unpaired(*(list(of_seeds(of).values()) for of in (own, clips[cell])))
        rows.append(f"| {title} | {over} | {' | '.join(tests[(cell, *pair)] for pair in pairs)} |")
    for cell, title in {
        "icons-64, second": "… another thousand",
        "noto-v1-250": "`noto-v1`, 250",
        "emojis-250-long": "emojis, 250, eight times the epochs",
        "icons-250-long": "icons, 250, eight times the epochs",
        "icons-250-long, second": "… another thousand",
        "photographs-250-long": "photographs, 250, four times the epochs",
        "icons-71680-64": "71,680 icons, 64",
        "icons-71680-64, second": "… another thousand",
    }.items():
        rows.append(f"| {title} | – | {' | '.join(tests.get((cell, *pair), '–') for pair in pairs)} |")
    return rows


PRIMARY = {
    "(a) closed form − heads": ("heads", "cca", "heads"),
    "(b) both − closed form": ("heads", "both", "cca"),
    "(c) both − two heads": ("heads", "both", "heads-2"),
    "(d) mimicry of the closed form − CLIP": ("students", "mimicry", "clip"),
    "(e) … − the former preset": ("students", "mimicry", "encoders"),
    "(f) … − of shuffled pairs": ("students", "mimicry", "mimicry-shuffled"),
    "(g) … and ranks − mimicry": ("students", "mimicry-ranks", "mimicry"),
    "(h) … and spread − mimicry": ("students", "mimicry-spread", "mimicry"),
    "(i) closed form of a CLIP − fine-tuning": ("after", "start-cca", "start-tuned"),
}
"""The alignment's primary tests: their kind of cells, and both arms."""
CELLS_OF_PRIMARY = {
    "heads": [
        f"heads-{name}" for name in ("emojis", "icons", "icons, second", "photographs", "fxemoji", "noto-v1")
    ],
    "students": [
        "emojis-250",
        "icons-64",
        "icons-64, second",
        "photographs-64",
        "fxemoji-250",
        "noto-v1-250",
    ],
    "after": ["emojis-after", "", "", "", "fxemoji-after", "noto-v1-after"],
}


def primary_tests() -> list[str]:
    """The difference in R@10 of every primary test on every data set."""
    tests = differences_of("alignment")
    return [
        f"| {' | '.join([title, *(tests.get((cell, *pair), '–') for cell in CELLS_OF_PRIMARY[kind])])} |"
        for title, (kind, *pair) in PRIMARY.items()
    ]


def of_cell(batch: int, epochs: int) -> Callable[[dict[str, Any]], str]:
    """The arm of a setting of a cell on its own split."""

    def arm(setting: dict[str, Any]) -> str:
        own_cell = (setting["batch_size"], setting["epochs"], setting.get("split", 0))
        return setting["arm"] if own_cell == (batch, epochs, 0) else ""

    return arm


def of_a_pretrained_clip() -> list[str]:
    """R@10 of the new pairs and of the old ones, of a CLIP that was trained on icons."""
    arms = ("start", "start-cca", "start-joined", "start-heads", "start-tuned")
    names = ("emojis", "noto-v1", "fxemoji")
    cells = [f"{name}-after{old}" for name in names for old in ("", ", old")]
    rows = [[mean_of("alignment", cell, arm).removesuffix(" ± 0.00") for cell in cells] for arm in arms]
    return [f"| {' | '.join(row)} |" for row in rows]


def of_keep() -> list[str]:
    """Zero-shot accuracy and R@10 of new pairs by the share of a CLIP's own similarity.

    A row of the report is a cell, a share, the accuracy, R@10 of new pairs and of old ones.
    """
    of_cells = []
    for name in ("emojis", "noto-v1", "fxemoji"):
        rows = rows_of("alignment/report/alignment.md", f"{name}-after ")
        of_cells.append([row for row in rows if len(row) == 5])
    shares = []
    for of_share in zip(*of_cells, strict=True):
        accuracies = [accuracy for _, _, accuracy, _, _ in of_share]
        recalls = [recall for _, _, _, recall, _ in of_share]
        shares.append(f"| {' | '.join([*accuracies, *recalls])} |")
    return shares


def from_how_many_pairs() -> list[str]:
    """R@10 of both thousands of icons, by the number of pairs: frozen encoders, and models from scratch."""
    sizes = {
        2_000: "heads-icons-2000 pairs-2000",
        8_000: "heads-icons pairs-8000",
        35_840: "heads-icons-35840 pairs-35840",
        71_680: "heads-icons-71680 pairs-71680",
        141_093: "heads-icons-141093 pairs-141093",
    }
    rows = []
    for frozen, scratch in map(str.split, sizes.values()):
        of = [(frozen, arm) for arm in ("search", "heads", "cca", "both", "both-2")]
        of += [(scratch, arm) for arm in ("clip", "spread", "mimicry")]
        for side in ("", ", second"):
            means = [mean_of("alignment", cell + side, arm).removesuffix(" ± 0.00") for cell, arm in of]
            rows.append(f"| {' | '.join(means)} |")
    return rows


WAYS_TO_LEARN = {
    "two-rivals": "mimicry and contrast",
    "mimicry": "mimicry",
    "ranks-and-rival": "mimicry and ranks",
    "contrast": "interactive contrast",
    "distances": "relational distances",
    "ranks-in-memory": "teacher's ranks, in memory",
    "softmax": "softmax of all matrices",
    "pearson": "row-wise Pearson",
    "relation": "contrastive relation",
    "sentence-encoder": "sentence encoder's ranks",
}
"""Arms of the study of teachers, as its report and as the page has them."""


def ways_to_learn_from_a_teacher() -> list[str]:
    """… in R@10 of each way to learn from a teacher, minus CLIP's and minus its ranks'."""
    differences = {
        compared: difference
        for compared, _, difference, *_ in rows_of("miniature/report/distil.md", ".* less ")
    }
    others = ("plain CLIP", "top-ranks")
    return [
        f"| {title} | {' | '.join(differences[f'{arm} less {other}'] for other in others)} |"
        for arm, title in WAYS_TO_LEARN.items()
    ]


SPLITS = range(5)
"""Of concepts: emojis and icons have heads on each, once the study of the alignment has trained them."""


ARMS_OF_SPLITS = {"heads": ("heads",), "cca": ("cca",), "both": ("heads", "joined", "both")}
"""The arm that has the record, and where in its metrics the arm stands."""


def mean_recall(lines: dict[int, dict[str, Any]], *place: str) -> float:
    """The mean R@10 of an arm's seeds, at a place in their metrics."""
    return float(np.mean(recalls(lines, *place)))


def recalls(lines: dict[int, dict[str, Any]], *place: str) -> list[float]:
    """R@10 of each of an arm's seeds, the mean of both ways, at a place in their metrics."""
    return list(of_seeds(lines, *place).values())


def across_splits() -> list[str]:
    """Differences in R@10 over held-out concepts: the closed form minus heads, both minus the closed form.

    Of the splits whose four seeds are recorded: the mean of the splits' differences with its 95 % t-interval,
    and their least and greatest.
    """
    rows = []
    for title, folder, inner in (
        ("emojis", "emojis", ()),
        ("icons", "icons", ()),
        ("… another thousand", "icons", ("second",)),
    ):
        found = records(f"alignment/results/{folder}", lambda s: f"{s['arm']} {s['split']}")
        complete = [x for x in SPLITS if len(found.get(f"heads {x}", {})) >= 4 and f"cca {x}" in found]
        recalls = {
            arm: [mean_recall(found[f"{recorded} {x}"], *joined, *inner) for x in complete]
            for arm, (recorded, *joined) in ARMS_OF_SPLITS.items()
        }
        differences = (np.subtract(recalls[a], recalls[b]) for a, b in (("cca", "heads"), ("both", "cca")))
        cells = [cell for of in differences for cell in (mean_and_interval(of), least_to_greatest(of))]
        rows.append(f"| {title} | {len(complete)} | {' | '.join(cells)} |")
    return rows


def mean_and_interval(values: np.ndarray) -> str:
    """The mean of signed values with its 95 % t-interval."""
    half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
    return f"{values.mean():+.2f} ± {half:.2f}".replace("-", "−")


def least_to_greatest(values: np.ndarray) -> str:
    """The least and the greatest of signed values."""
    return f"{values.min():+.2f} to {values.max():+.2f}".replace("-", "−")


def over_the_higher_clip() -> list[str]:
    """Differences in R@10 of students from scratch from the highest CLIP of the three studies."""
    tests, rows = differences_of("spread"), []
    for title, (folder, batch, epochs, cell, reference) in CELLS.items():
        of_captions, of_spread = (
            records(f"{study}/results/{folder}", of_cell(batch, epochs)) for study in ("captions", "spread")
        )
        clips = [list(of_seeds(of_captions[reference]).values())]
        if cell in OF_ALIGNMENT:
            of_alignment = records(f"alignment/results/{folder}", of_cell(batch, epochs))
            clips += [list(of_seeds(of_alignment[arm]).values()) for arm in CLIPS if arm in of_alignment]
        clip = max(clips, key=np.mean)
        clip_of_spread = float(mean_of("spread", cell, "clip").split()[0])
        is_paired = clip_of_spread > np.mean(clip)  # with the same seeds, as that CLIP is the highest
        row = []
        for arm, name in ARMS.items():
            if arm not in of_spread:
                row.append("–")
            elif is_paired:
                row.append(tests[cell, name, "clip"])
            else:
                row.append(unpaired(list(of_seeds(of_spread[arm]).values()), clip))
        rows.append(f"| {title} | {' | '.join([*row, tests[cell, 'rankclip', 'spread']])} |")
    return rows


def unpaired(values: list[float], others: list[float]) -> str:
    """The mean difference of two samples with the ends of Welch's 95 % interval."""
    ends = stats.ttest_ind(values, others, equal_var=False).confidence_interval()
    text = f"{np.mean(values) - np.mean(others):+.2f} ({ends.low:.2f} to {ends.high:.2f})"
    return text.replace("-", "−")


def long_trainings() -> list[str]:
    """Differences in R@10 of trainings with several times the epochs, and of a vendor's emojis."""
    tests = differences_of("spread")
    cells = {
        "icons, 250, eight times the epochs": "icons-250-long",
        "emojis, 250, eight times the epochs": "emojis-250-long",
        "photographs, 250, four times the epochs": "photographs-250-long",
        "a vendor's emojis, 250": "vendor-250",
    }
    pairs = [("spread", "clip"), ("rankclip", "clip"), ("encoders-spread", "clip"), ("rankclip", "spread")]
    rows = {title: [tests.get((cell, *pair), "–") for pair in pairs] for title, cell in cells.items()}
    return [f"| {title} | {' | '.join(row)} |" for title, row in rows.items()]


def without_columns(rows: list[str], *columns: int) -> list[str]:
    """The rows of a table without some of their columns, which are counted after the row's name."""
    shorter = []
    for row in rows:
        name, *cells = cells_of(row)
        kept = [cell for column, cell in enumerate(cells) if column not in columns]
        shorter.append(f"| {' | '.join([name, *kept])} |")
    return shorter


def spread_in_short() -> list[str]:
    """The tables of spread with CLIP's R@10, without the encoders' column and two of the cells."""
    gains = without_columns([*over_the_higher_clip(), *long_trainings()], 2)
    clips = {name: max(cells, key=float_of) for name, *cells in map(cells_of, baselines())}
    for name, cell in (
        ("icons, 250, eight times the epochs", "icons-250-long"),
        ("photographs, 250, four times the epochs", "photographs-250-long"),
    ):
        clips[name] = mean_of("spread", cell, "clip")
    rows = [cells_of(row) for row in gains]
    return [f"| {' | '.join([name, clips[name], *cells])} |" for name, *cells in rows if name in clips]


def float_of(mean: str) -> float:
    """The mean of a cell, as "28.61 ± 1.36"; a dash is below all."""
    return -1.0 if mean == "–" else float(mean.split()[0])


def mimicry_in_short_and_long() -> list[str]:
    """The gains of mimicry of two encoders over the highest CLIP, and over its own, short and long."""
    gains = {name: cells[:2] for name, *cells in map(cells_of, of_mimicry())}

    def short(name: str) -> str:
        return f"| {' | '.join([name, *gains[name]])} |"

    def over_its_own(name: str) -> str:
        return gains[name][1]

    long_of_emojis = over_its_own("emojis, 250, eight times the epochs")
    return [
        f"{short('emojis, 250')} {long_of_emojis} (over the highest 12.1) |",
        f"{short('photographs, 64')} – |",
        f"{short('photographs, 250')} {over_its_own('photographs, 250, four times the epochs')} |",
        f"{short('icons, 64')} – |",
        f"| icons, 250 | – | – | {over_its_own('icons, 250, eight times the epochs')}; second thousand ",
    ]


def mimicry_minus_spread() -> list[str]:
    """Differences of mimicry of two encoders, minus spread, in 16 epochs of icons, on both thousands."""
    differences = []
    for folder in ("icons", "icons-35840", "icons-71680", "icons-141093"):
        trained = records(f"alignment/results/{folder}", of_cell(250, 16))
        differences += [minus(trained["mimicry"], trained["spread"], *side) for side in ((), ("second",))]
    return differences


def frozen_minus_scratch(pairs: int, heads: str, *side: str) -> str:
    """The difference in R@10 of frozen encoders minus the best model from scratch.

    ``heads`` is the arm of the closed form beside one head or beside two. ``side`` is nothing on the first
    thousand of icons, and "second" on the second.
    """
    folder = f"alignment/results/icons-{pairs}"
    frozen = recalls(records(folder, of_cell(500, 20))["heads"], "joined", heads, *side)
    return unpaired(frozen, best_from_scratch(pairs, *side))


def best_from_scratch(pairs: int, *side: str) -> list[float]:
    """R@10 of the seeds of the model from scratch whose mean is highest, of 16 epochs."""
    trained = records(f"alignment/results/icons-{pairs}", of_cell(250, 16))
    return max((recalls(trained[arm], *side) for arm in ("smoothing", "spread", "mimicry")), key=np.mean)


def frozen_encoders_minus_scratch() -> list[str]:
    """Differences of the closed form beside one head and beside two, and of one head alone.

    Of 71,680 pairs on the first thousand of icons, of 141,093 on both; the head alone is of the latter.
    """
    sides = ((), ("second",))
    beside_heads = []
    for arm in ("both", "both-2"):
        beside_heads.append(frozen_minus_scratch(71_680, arm))
        beside_heads += [frozen_minus_scratch(141_093, arm, *side) for side in sides]
    one_head = records("alignment/results/icons-141093", of_cell(500, 20))["heads"]
    alone = [unpaired(recalls(one_head, *side), best_from_scratch(141_093, *side)) for side in sides]
    return [*beside_heads, *alone]


def second_heads_and_closed_forms() -> list[str]:
    """Differences on both thousands: of a second head, by number of pairs, and of the closed form."""

    def difference(pairs: int, arm: str, other: str, *side: str) -> str:
        heads = records(f"alignment/results/icons-{pairs}", of_cell(500, 20))["heads"]
        values, others = (np.array(recalls(heads, "joined", of, *side)) for of in (arm, other))
        return mean_and_interval(values - others)

    sides = ((), ("second",))
    sizes = (35_840, 71_680, 141_093)
    of_a_second_head = [difference(pairs, "both-2", "both", *side) for pairs in sizes for side in sides]
    return [*of_a_second_head, *(difference(141_093, "both-2", "heads-2", *side) for side in sides)]


def frozen_encoders_in_short() -> list[str]:
    """The table of frozen encoders without the vendors' drawings."""
    return frozen_encoders(("emojis", "icons", "photographs"))


def frozen_encoders(
    names: tuple[str, ...] = ("emojis", "icons", "photographs", "fxemoji", "noto-v1"),
) -> list[str]:
    """R@10 without training, of heads, in closed form, of both and beside a search; and the differences."""
    cells = [f"heads-{name}" for name in names]
    means = {
        (cell, arm): re.sub(r" ± 0\.00|( ?\(\d+\))", "", recall)  # without the count of seeds
        for cell, arm, recall, *_ in rows_of("alignment/report/alignment.md", "heads-")
        if "±" in recall
    }
    tests = differences_of("alignment")
    arms = ("search", "heads", "cca", "cca-search", "both")
    rows = [[means[cell, arm] for cell in cells] for arm in arms]
    pairs = [("cca", "heads"), ("both", "cca")]
    rows += [[tests[(cell, *pair)] for cell in cells] for pair in pairs]
    return [f"| {' | '.join(row)} |" for row in rows]


def uniform_beside_spread() -> list[str]:
    """The difference in R@10 of uniform targets on icons in batches of 64, minus spread."""
    arms = records("spread/results/icons", of_cell(64, 4))
    return [minus(arms["uniform"], arms["std-constant"])]


def ranks_beside_spread_in_taught_models() -> list[str]:
    """Differences in R@10 of models that copy two encoders: with ranks, minus with spread."""
    differences = []
    for folder, batch, epochs in (("emojis", 250, 30), ("icons", 64, 4), ("photographs", 64, 8)):
        arms = records(f"alignment/results/{folder}", of_cell(batch, epochs))
        differences.append(minus(arms["mimicry-ranks"], arms["mimicry-spread"]))
    return differences


def heads_beside_smoothing() -> list[str]:
    """The difference in R@10 of heads on photographs with RankCLIP, minus those with label smoothing."""

    def arm(setting: dict[str, Any]) -> str:
        without_ids = not setting["same_id"]
        return f"{setting['arm']} {setting['label_smoothing']}" if without_ids else ""

    heads = records("baselines/results/photographs", arm)
    return [minus(heads["rankclip 0.0"], heads["clip 0.2"])]


def mimicry_of_a_clip_in_long_trainings() -> list[str]:
    """The difference in R@10 with eight times the epochs of icons, over the highest CLIP of the studies."""
    students, clips = (
        records(f"{study}/results/icons", of_cell(250, 32)) for study in ("captions", "alignment")
    )
    return [unpaired(recalls(students["mimicry"]), recalls(clips["smoothing"]))]


def ranks_minus_shuffled_words() -> list[str]:
    """Differences in R@10 of RankCLIP and the control by other pairs' captions, both tuned."""
    differences = []
    for folder, batch, epochs, *_ in CELLS.values():
        arms = records(f"spread/results/{folder}", of_cell(batch, epochs))
        if "captions-shuffled" in arms:
            differences.append(minus(arms["rankclip"], arms["captions-shuffled"]))
    return differences


def differences_without_a_report() -> list[str]:
    return [
        *ranks_minus_shuffled_words(),
        *mimicry_of_a_clip_in_long_trainings(),
        *beside_shuffled_words(),
        *heads_beside_smoothing(),
        *over_the_higher_clip(),
        *of_mimicry(),
        *frozen_encoders_minus_scratch(),
        *second_heads_and_closed_forms(),
        *mimicry_minus_spread(),
        *uniform_beside_spread(),
        *ranks_beside_spread_in_taught_models(),
        *across_splits(),
        *primary_tests(),
    ]


def costs() -> list[str]:
    """Sentences of the page on the processor time of arms with as many epochs."""

    def seconds(of_seeds: dict[int, dict[str, Any]]) -> float:
        return float(np.mean([line["processor_seconds"]["training"] for line in of_seeds.values()]))

    trained = records("photographs/results/part2a", lambda setting: setting["arm"])
    students = {arm: seconds(of_seeds) for arm, of_seeds in trained.items()}
    taught = records("photographs/results/part2b", lambda setting: setting["loss"])
    # Heads by all of their settings, as one text, in which RankCLIP's and CLIP's differ by the loss alone.
    heads = records("photographs/results/part1", lambda setting: str({**setting, "seed": 0}))
    ratios = []
    for setting, of_rankclip in heads.items():
        of_clip = heads.get(setting.replace("'rankclip'", "'clip'"))
        if "'rankclip'" in setting and of_clip is not None:
            ratios.append(seconds(of_rankclip) / seconds(of_clip))
    return [
        f"up to {100 * (max(students.values()) / students['clip'] - 1):.0f} % more",
        f"{min(ratios):.1f} to {max(ratios):.1f} times CLIP's with RankCLIP",
        f"{seconds(taught['ranks']) / seconds(taught['clip']):.1f} times with a teacher's ranks",
    ]


def demo_table() -> list[str]:
    """The demo's gain by seed with its interval, both scores, and zero-shot accuracy of both models."""
    rows = []
    for seed, result in enumerate(demo_results()):
        clip, of = (result["found"][name] for name in ("CLIP", ENCODERS))
        scores = result["results"][0]["rows"]
        accuracies = [
            f"{scores['CLIP'][level]['1']:.1f} → {scores[ENCODERS][level]['1']:.1f}"
            for level in ("subgroup", "group")
        ]
        gain = f"{of['minus_first']:+.1f} ± {of['half_width']:.1f}"
        cells = [str(seed), f"{clip['percent']:.1f}", f"{of['percent']:.1f}", gain, *accuracies]
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def demo_taus() -> list[str]:
    """The least and the greatest τ over the demo's seeds, of the model of two encoders and of CLIP."""
    ranges = []
    for side in ("training", "held-out"):
        for name in (ENCODERS, "CLIP"):
            taus = [result["tau"][name][side] for result in demo_results()]
            ranges.append(f"{min(taus):.2f} to {max(taus):.2f}")
    return ranges


def demo_results() -> list[dict[str, Any]]:
    """The demo's committed results, by seed."""
    files = sorted((ROOT / "examples/demo/results").glob("seed*.json"))
    return [json.loads(file.read_text(encoding="utf-8")) for file in files]


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
    ("path", "recomputed"),
    [
        ("docs/method.md", [demo_agreement]),
        ("docs/your_data.md", [of_keep]),
        ("examples/demo/README.md", [demo_table, demo_taus]),
        (
            "docs/evidence.md",
            [
                baselines,
                frozen_encoders_in_short,
                spread_in_short,
                mimicry_in_short_and_long,
            ],
        ),
        (
            "docs/evidence_details.md",
            [
                photographs_table,
                spread_on_heads,
                across_splits,
                from_how_many_pairs,
                over_the_higher_clip,
                long_trainings,
                of_mimicry,
                frozen_encoders,
                mimicry_minus_spread,
                frozen_encoders_minus_scratch,
                second_heads_and_closed_forms,
                ranks_beside_spread_in_taught_models,
                of_a_pretrained_clip,
                beside_shuffled_words,
                ways_to_learn_from_a_teacher,
                primary_tests,
                costs,
            ],
        ),
    ],
)
def test_numbers_are_the_reports(path: str, recomputed: list[Callable[[], list[str]]]) -> None:
    """Every row and sentence that is recomputed stands on the page, whatever its emphasis."""
    text = " ".join((ROOT / path).read_text(encoding="utf-8").replace("*", "").split())
    passages = [passage for recompute in recomputed for passage in recompute()]
    assert [passage for passage in passages if passage not in text] == []
