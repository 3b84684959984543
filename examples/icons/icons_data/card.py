"""The data card and the attributions, filled in with the numbers of a build."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from examples_common.page import fill
from examples_common.tables import markdown

from .baseline import ALIKE_LIMITS, Row
from .draw import SIZE, THUMBNAIL
from .labels import SOURCES
from .package import LICENCES, PACKAGE, RESERVED, IconSet
from .records import Record
from .split import ALIKE, OF_A_SHIFT, SAME_DRAWING, SHIFTS, SIDES

_TEMPLATE = Path(__file__).with_name("data_card.md")
_CHANGES = (
    f"Changes: each icon was drawn as {SIZE} × {SIZE} pixels on white, centred in a square, in black where "
    "it names no colour. The captions are the icons' names, rewritten. Every picture stays under the licence "
    "of its set: pass this file on with them."
)


def attributions(sets: Sequence[IconSet], records: Sequence[Record], version: str) -> str:
    """Return whom the pictures are from, as their licences ask."""
    used = Counter(record.set for record in records)
    rows = [
        [
            f"{_link(one.title, one.url)} (`{one.prefix}`)",
            one.authors,
            f"{used[one.prefix]:,}",
            _link(one.licence, one.licence_url),
        ]
        for one in sets
    ]
    made = f"The pictures in this folder were made from these icon sets, as packaged in {PACKAGE} {version}."
    return f"# Attributions\n\n{made}\n{_CHANGES}\n\n{markdown(['set', 'by', 'pictures', 'licence'], rows)}\n"


def _link(text: str, url: str) -> str:
    return f"[{text}]({url})" if url else text


def data_card(
    version: str,
    seed: int,
    sets: Sequence[IconSet],
    left_out: Mapping[str, str],
    records: Sequence[Record],
    ranges: Mapping[str, tuple[int, int]],
    counts: Mapping[str, int],
    retrieval: Sequence[Row],
    classification: Sequence[Row],
) -> str:
    """Return what a user has to know about the data, with the numbers of this very build."""
    reasons: dict[str, list[str]] = defaultdict(list)
    for prefix, reason in left_out.items():
        reasons[reason].append(prefix)
    licence = {one.prefix: one.licence for one in sets}
    pictures, number = Counter(licence[record.set] for record in records), Counter(licence.values())
    searched, classes = [], []
    for row in retrieval:
        scores = [
            of[task] for of in (row["chance"], row["knn"]) for task in ("image_to_text", "text_to_image")
        ]
        shares = (f"{share:.1f} %" for share in row["alike"].values())
        numbers = map(_number, (row["images"], row["captions"]))
        searched.append([row["block"], *numbers, *map(_scores, scores), *shares])
    for row in classification:
        name = f"{row['name']} (shift {row['shift']})" if row["shift"] else row["name"]
        items = (_number(row["items"][side]) for side in SIDES)
        scores = [_scores(row["chance"]), f"{row['majority']:.1f}", _scores(row["knn"])]
        classes.append([name, f"{row['classes']}", *items, *scores])
    return fill(
        _TEMPLATE,
        {"number": _number, "code": _code},
        seed=seed,
        package=PACKAGE,
        version=version,
        size=SIZE,
        thumbnail=THUMBNAIL,
        sets=sets,
        records=records,
        parts=[_part(name, records[start:stop]) for name, (start, stop) in ranges.items()],
        shifts=[[name, _code(prefixes)] for name, prefixes in SHIFTS.items()],
        reserved=RESERVED,
        of_a_shift=OF_A_SHIFT,
        licences=[[name, f"{number[name]}", _number(pictures[name])] for name in LICENCES if number[name]],
        left_out=reasons,
        counts=counts,
        same_drawing=SAME_DRAWING,
        alike=ALIKE,
        limits=ALIKE_LIMITS,
        retrieval=searched,
        classes=classes,
        sources={row["name"]: SOURCES[row["name"]]["sets"] for row in classification},
    )


def _part(name: str, part: Sequence[Record]) -> list[str]:
    concepts, captions = ({getattr(record, of) for record in part} for of in ("concept", "caption"))
    searched, coloured = sum(record.retrieval for record in part), sum(record.palette for record in part)
    return [name, *map(_number, (len(part), len(concepts), len(captions), searched, coloured))]


def _number(n: int) -> str:
    return f"{n:,}"


def _code(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _scores(values: Mapping[int, float]) -> str:
    return "/".join(f"{value:.1f}" if value >= 1 else f"{value:.2f}" for value in values.values())
