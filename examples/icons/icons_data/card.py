"""The data card and the attributions, written from what was built."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

from .baseline import ALIKE_LIMITS, ClassRow, RetrievalRow
from .draw import SIZE, THUMBNAIL
from .labels import SOURCES
from .package import LICENCES, PACKAGE, RESERVED, IconSet
from .records import Record
from .split import ALIKE, OF_A_SHIFT, SAME_DRAWING, SHIFTS, SIDES

_STYLE_NOTE = (
    f"Changes: each icon was drawn as {SIZE} × {SIZE} pixels on white, centred in a square, in black where "
    "it names no colour. The captions are the icons' names, rewritten. Every picture stays under the licence "
    "of its set: pass this file on with them."
)


def attributions(sets: Sequence[IconSet], records: Sequence[Record], version: str) -> str:
    """Return whom the pictures are from, as their licences ask."""
    used = Counter(record.set for record in records)
    lines = [
        "# Attributions",
        "",
        f"The pictures in this folder were made from these icon sets, as packaged in {PACKAGE} {version}.",
        _STYLE_NOTE,
        "",
        "| set | by | pictures | licence |",
        "|---|---|---:|---|",
    ]
    for one in sets:
        title = f"[{_cell(one.title)}]({one.url})" if one.url else _cell(one.title)
        licence = f"[{one.licence}]({one.licence_url})" if one.licence_url else one.licence
        lines.append(
            f"| {title} (`{one.prefix}`) | {_cell(one.authors)} | {used[one.prefix]:,} | {licence} |"
        )
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def data_card(
    *,
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
    parts = [
        f"# Data card: icons and their names (seed {seed})",
        f"Made from {PACKAGE} {version} by `examples/icons/build.py`: {len(records):,} pictures of "
        f"{SIZE} × {SIZE} pixels from {len(sets)} icon sets, each with its name as a caption.",
        _parts(records, ranges),
        _shifts(),
        _licences(sets, records, left_out),
        _twins(counts),
        _retrieval(retrieval),
        _classes(classification),
        _LIMITS,
    ]
    return "\n\n".join(parts) + "\n"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    align = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, align, *rows))


def _parts(records: Sequence[Record], ranges: Mapping[str, tuple[int, int]]) -> str:
    rows = []
    for name, (start, stop) in ranges.items():
        part = records[start:stop]
        items = sum(record.retrieval for record in part)
        rows.append(
            (
                name,
                f"{len(part):,}",
                f"{len({record.concept for record in part}):,}",
                f"{len({record.caption for record in part}):,}",
                f"{items:,}" if items else "–",
                f"{sum(record.palette for record in part):,}",
            )
        )
    return (
        "## Parts\n\n"
        "Split by concept: all drawings of one thing, in all sets and styles, are on one side. Only `train` "
        "is trained on; settings are chosen on `validation`; a shift's `train` and `validation` parts are "
        "for probes on its labels, never for training a model.\n\n"
        + _table(("part", "pictures", "concepts", "captions", "retrieval items", "from colour sets"), rows)
    )


def _shifts() -> str:
    rows = "\n".join(f"| {name} | {_code(prefixes)} |" for name, prefixes in SHIFTS.items())
    return (
        "## Shifts\n\n"
        "No picture of these sets is trained on; retrieval and zero-shot use held-out concepts only. The "
        "first are whole styles, the last two are vendors of colour emojis.\n\n"
        f"| shift | sets |\n|---|---|\n{rows}\n\n"
        f"Left out of everything: {_code(RESERVED)}, kept for measurements that this data has not seen, and "
        f"{_code(OF_A_SHIFT)}, colourless drawings of a held-out vendor."
    )


def _code(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _licences(sets: Sequence[IconSet], records: Sequence[Record], left_out: Mapping[str, str]) -> str:
    licence = {one.prefix: one.licence for one in sets}
    pictures = Counter(licence[record.set] for record in records)
    number = Counter(licence.values())
    rows = [(name, f"{number[name]}", f"{pictures[name]:,}") for name in LICENCES if number[name]]
    reasons: dict[str, list[str]] = defaultdict(list)
    for prefix, reason in left_out.items():
        reasons[reason].append(prefix)
    lines = [f"- {reason}: {_code(sorted(prefixes))}" for reason, prefixes in sorted(reasons.items())]
    return (
        "## Licences\n\nFrom the SPDX field of each set; `ATTRIBUTIONS.md` names the authors.\n\n"
        + _table(("licence", "sets", "pictures"), rows)
        + "\n\nSets that are not used:\n\n"
        + "\n".join(lines)
    )


def _twins(counts: Mapping[str, int]) -> str:
    limits = " and ".join(map(str, ALIKE_LIMITS))
    return f"""\
## Duplicates

Pictures are compared as {THUMBNAIL} × {THUMBNAIL} averages, by the root of their mean squared difference, in
levels of 255.

- {counts["drawn"]:,} icons were drawn; {counts["blank"]:,} are blank and left out.
- {counts["same_caption_same_drawing"]:,} drawings differ by less than {SAME_DRAWING:g} from another one \
with the same caption (sizes, weights, copies between sets) and are dropped.
- {counts["alike_pairs"]:,} pairs differ by less than {ALIKE:g}, which the eye hardly sees; \
{counts["alike_pairs_of_different_concepts"]:,} of them are named as different concepts. A split by name \
would leave such twins on both sides. Here their concepts are joined and go to one side: nothing has to be \
removed from either side, which would thin the test of common shapes, or the training set of their names.
- {counts["concepts"]:,} concepts by name form {counts["groups"]:,} groups, which are what is split.
- What remains is in the next table: the share of retrieval items whose nearest training picture is closer \
than {limits}. Up to about 6 such pairs mostly mean the same; beyond it most differ in meaning (a lock open \
or closed, one letter or another)."""


def _scores(values: Mapping[int, float]) -> str:
    return "/".join(f"{value:.1f}" if value >= 1 else f"{value:.2f}" for value in values.values())


def _retrieval(rows: Sequence[RetrievalRow]) -> str:
    tasks = ("image_to_text", "text_to_image")
    table = _table(
        (
            "R@1/5/10", "pictures", "captions", "chance → text", "chance → image", "pixel kNN → text",
            "pixel kNN → image", *(f"nearest < {limit}" for limit in ALIKE_LIMITS),
        ),
        [
            (
                row.block, f"{row.images:,}", f"{row.captions:,}",
                *(_scores(row.chance[task]) for task in tasks), *(_scores(row.knn[task]) for task in tasks),
                *(f"{row.alike[limit]:.1f} %" for limit in ALIKE_LIMITS),
            )
            for row in rows
        ],
    )  # fmt: skip
    return (
        "## Retrieval: chance and raw pixels\n\n"
        "Percent. One picture for each held-out concept; any of its captions is right. Pixel kNN learns "
        "nothing: the captions of the five nearest training pictures rank the candidates by shared words.\n\n"
        + table
    )


def _classes(rows: Sequence[ClassRow]) -> str:
    table = _table(
        (
            "top-1/3/5", "classes", "train", "validation", "test", "chance", "majority top-1", "pixel kNN",
        ),
        [
            (
                f"{row.name}{f' (shift {row.shift})' if row.shift else ''}", f"{row.classes}",
                *(f"{row.items[side]:,}" for side in SIDES),
                _scores(row.chance), f"{row.majority:.1f}", _scores(row.knn),
            )
            for row in rows
        ],
    )  # fmt: skip
    sources = "; ".join(f"{row.name}: {_code(SOURCES[row.name].sets)}" for row in rows)
    return (
        "## Labelled sets: chance and raw pixels\n\n"
        "Percent, on held-out concepts. The classes are the categories that the sets themselves give (icons "
        "of one category only, categories that describe content only). Pixel kNN needs the labels of the "
        "training pictures, as a probe does; zero-shot needs the classes' names only. The training pictures "
        "of the sets without a shift are among those that a model is trained on; those of the shifts are "
        "not.\n\n"
        f"{table}\n\nSources: {sources}."
    )


_LIMITS = """\
## What these data are not

- Names are short and terse; they are what designers call an icon, with the odd misspelling, and no
  description. Training texts put the caption, half of the time with the style where it is known, into one of
  four templates.
- Concepts are recognised by rules on names. Synonyms that no set declares and no two drawings show to be the
  same (an "automobile", a "car") may be on both sides.
- Logos that no set marks as such are filtered by the names of brands that two or more lists of logos share.
  Some remain, and some plain words are lost with them.
- Several drawings of one concept are in every labelled set: its test items are not independent, and an error
  bar that counts pictures is too small.
- Groups of more than a hundred concepts, arrows and plain shapes, are always trained on."""
