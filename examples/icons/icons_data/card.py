"""The data card and the attributions, filled in with the numbers of a build."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from examples_common.page import fill

from . import SETS
from .baseline import ALIKE_LIMITS, Row
from .draw import SIZE, THUMBNAIL
from .labels import SOURCES
from .package import LICENCES, PACKAGE, IconSet
from .records import Record
from .split import ALIKE, SAME_DRAWING


def _number(n: int) -> str:
    return f"{n:,}"


def _scores(values: Mapping[int, float]) -> str:
    return "/".join(f"{value:.1f}" if value >= 1 else f"{value:.2f}" for value in values.values())


def _fill(template: str, **values: Any) -> str:
    filters = {"number": _number, "code": lambda names: ", ".join(map("`{}`".format, names))}
    return fill(Path(__file__).with_name(template), filters, package=PACKAGE, size=SIZE, **values)


def attributions(sets: Sequence[IconSet], records: Sequence[Record], version: str) -> str:
    """Return whom the pictures are from, as their licences ask."""

    def link(text: str, url: str) -> str:
        return f"[{text}]({url})" if url else text

    used, rows = Counter(record.set for record in records), []
    for one in sets:
        name = f"{link(one.title, one.url)} (`{one.prefix}`)"
        rows.append([name, one.authors, _number(used[one.prefix]), link(one.licence, one.licence_url)])
    return _fill("attributions.md", version=version, sets=rows)


def data_card(
    sets: Sequence[IconSet],
    left_out: Mapping[str, str],
    records: Sequence[Record],
    ranges: Mapping[str, tuple[int, int]],
    retrieval: Sequence[Row],
    classification: Sequence[Row],
    **values: Any,
) -> str:
    """Return what a user has to know about the data, with the numbers of this very build."""
    reasons: dict[str, list[str]] = defaultdict(list)
    for prefix, reason in left_out.items():
        reasons[reason].append(prefix)
    licence = {one.prefix: one.licence for one in sets}
    pictures, number = Counter(licence[record.set] for record in records), Counter(licence.values())
    searched = [
        [
            row["block"],
            *map(_number, (row["images"], row["captions"])),
            *map(_scores, (*row["chance"].values(), *row["knn"].values())),
            *(f"{share:.1f} %" for share in row["alike"].values()),
        ]
        for row in retrieval
    ]
    classes = [
        [
            f"{row['name']} (shift {row['shift']})" if row["shift"] else row["name"],
            *map(_number, (row["classes"], *row["items"].values())),
            _scores(row["chance"]),
            f"{row['majority']:.1f}",
            _scores(row["knn"]),
        ]
        for row in classification
    ]
    return _fill(
        "data_card.md",
        **values,
        thumbnail=THUMBNAIL,
        sets=sets,
        records=records,
        parts=[_part(name, records[start:stop]) for name, (start, stop) in ranges.items()],
        known=SETS,
        licences=[[name, f"{number[name]}", _number(pictures[name])] for name in LICENCES if number[name]],
        left_out=reasons,
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
