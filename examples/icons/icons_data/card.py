"""The data card and the attributions, filled in with the numbers of a build."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from examples_common.tables import markdown

from .baseline import ALIKE_LIMITS, ClassRow, RetrievalRow
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
_TASKS = ("image_to_text", "text_to_image")


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
    retrieval: Sequence[RetrievalRow],
    classification: Sequence[ClassRow],
) -> str:
    """Return what a user has to know about the data, with the numbers of this very build."""
    reasons: dict[str, list[str]] = defaultdict(list)
    for prefix, reason in left_out.items():
        reasons[reason].append(prefix)
    return _TEMPLATE.read_text(encoding="utf-8").format(
        seed=seed,
        package=PACKAGE,
        version=version,
        pictures=len(records),
        size=SIZE,
        thumbnail=THUMBNAIL,
        sets=len(sets),
        parts=_parts(records, ranges),
        shifts=markdown(["shift", "sets"], [[name, _code(prefixes)] for name, prefixes in SHIFTS.items()]),
        reserved=_code(RESERVED),
        of_a_shift=_code(OF_A_SHIFT),
        licences=_licences(sets, records),
        unused="\n".join(f"- {reason}: {_code(sorted(names))}" for reason, names in sorted(reasons.items())),
        counts=counts,
        same_drawing=SAME_DRAWING,
        alike=ALIKE,
        limits=" and ".join(map(str, ALIKE_LIMITS)),
        retrieval=_retrieval(retrieval),
        classes=_classes(classification),
        sources="; ".join(f"{row.name}: {_code(SOURCES[row.name].sets)}" for row in classification),
    )


def _numbers(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return markdown(head, rows, right=len(head) - 1)


def _code(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _parts(records: Sequence[Record], ranges: Mapping[str, tuple[int, int]]) -> str:
    rows = []
    for name, (start, stop) in ranges.items():
        part = records[start:stop]
        counts = (
            len(part),
            len({record.concept for record in part}),
            len({record.caption for record in part}),
            sum(record.retrieval for record in part),
            sum(record.palette for record in part),
        )
        rows.append([name, *(f"{count:,}" for count in counts)])
    head = ("part", "pictures", "concepts", "captions", "retrieval items", "from colour sets")
    return _numbers(head, rows)


def _licences(sets: Sequence[IconSet], records: Sequence[Record]) -> str:
    licence = {one.prefix: one.licence for one in sets}
    pictures = Counter(licence[record.set] for record in records)
    number = Counter(licence.values())
    rows = [(name, f"{number[name]}", f"{pictures[name]:,}") for name in LICENCES if number[name]]
    return _numbers(("licence", "sets", "pictures"), rows)


def _scores(values: Mapping[int, float]) -> str:
    return "/".join(f"{value:.1f}" if value >= 1 else f"{value:.2f}" for value in values.values())


def _retrieval(rows: Sequence[RetrievalRow]) -> str:
    head = (
        "R@1/5/10", "pictures", "captions", "chance → text", "chance → image", "pixel kNN → text",
        "pixel kNN → image", *(f"nearest < {limit}" for limit in ALIKE_LIMITS),
    )  # fmt: skip
    cells = [
        (
            row.block, f"{row.images:,}", f"{row.captions:,}",
            *(_scores(row.chance[task]) for task in _TASKS), *(_scores(row.knn[task]) for task in _TASKS),
            *(f"{row.alike[limit]:.1f} %" for limit in ALIKE_LIMITS),
        )
        for row in rows
    ]  # fmt: skip
    return _numbers(head, cells)


def _classes(rows: Sequence[ClassRow]) -> str:
    head = ("top-1/3/5", "classes", "train", "validation", "test", "chance", "majority top-1", "pixel kNN")
    cells = [
        (
            f"{row.name}{f' (shift {row.shift})' if row.shift else ''}", f"{row.classes}",
            *(f"{row.items[side]:,}" for side in SIDES),
            _scores(row.chance), f"{row.majority:.1f}", _scores(row.knn),
        )
        for row in rows
    ]  # fmt: skip
    return _numbers(head, cells)
