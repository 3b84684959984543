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


def _scores(values: Mapping[int, float]) -> str:
    return "/".join(f"{value:.1f}" if value >= 1 else f"{value:.2f}" for value in values.values())


def _fill(template: str, **values: Any) -> str:
    filters = {
        "number": "{:,}".format,
        "scores": _scores,
        "code": lambda names: ", ".join(map("`{}`".format, names)),
        "cell": lambda text: text.replace("|", "\\|"),
        "distinct": lambda records, name: len({getattr(record, name) for record in records}),
    }
    return fill(Path(__file__).with_name(template), filters, package=PACKAGE, size=SIZE, **values)


def attributions(sets: Sequence[IconSet], records: Sequence[Record], version: str) -> str:
    """Return whom the pictures are from, as their licences ask."""
    used = Counter(record.set for record in records)
    return _fill("attributions.md", version=version, sets=sets, used=used)


def data_card(
    sets: Sequence[IconSet],
    left_out: Mapping[str, str],
    records: Sequence[Record],
    ranges: Mapping[str, tuple[int, int]],
    classification: Sequence[Row],
    **values: Any,
) -> str:
    """Return what a user has to know about the data, with the numbers of this very build."""
    reasons: dict[str, list[str]] = defaultdict(list)
    for prefix, reason in left_out.items():
        reasons[reason].append(prefix)
    licence = {one.prefix: one.licence for one in sets}
    return _fill(
        "data_card.md",
        **values,
        thumbnail=THUMBNAIL,
        sets=sets,
        records=records,
        parts={name: records[start:stop] for name, (start, stop) in ranges.items()},
        known=SETS,
        licences=[name for name in LICENCES if name in licence.values()],
        sets_of=Counter(licence.values()),
        pictures_of=Counter(licence[record.set] for record in records),
        left_out=reasons,
        same_drawing=SAME_DRAWING,
        alike=ALIKE,
        limits=ALIKE_LIMITS,
        classification=classification,
        sources={row["name"]: SOURCES[row["name"]]["sets"] for row in classification},
    )
