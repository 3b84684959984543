"""``rankloss evaluate``: how well a model finds the captions of pictures, and the pictures of captions."""

from __future__ import annotations

import argparse
import json
import logging
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from rankloss.options import check_count
from rankloss_features import clip_models, data, sources
from rankloss_features.data import Data
from rankloss_features.errors import message_of
from rankloss_features.evaluation import Encoded, Pairs, differences, encode_rows, measure, noun_of_group
from rankloss_features.folder import is_count, read_json, write_bytes
from rankloss_features.teachers import Teacher

WAYS = {
    "image_to_text": "picture → text",
    "text_to_image": "text → picture",
    "image_to_image": "picture → picture",
    "text_to_text": "text → text",
}
"""The directions of retrieval, query → answer, in a result and in its table; the last two have ids alone."""


def main(argv: Sequence[str]) -> int:
    """Carry out a command line, and return the exit code."""
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        check_count("--batch-size", args.batch_size)
        check_count("--workers", args.workers, at_least=0)
        ks = sorted({check_count("--k", k) for k in args.k})
        other = None if args.against is None else _read(args.against)
        with quiet_libraries():
            result = _evaluated(args, ks, other)
        print("\n".join(lines(result, ks)))
        if args.json is not None:
            result["command"] = shlex.join(["rankloss", "evaluate", *argv])
            write_bytes(args.json, (json.dumps(result) + "\n").encode())
    except (OSError, ValueError) as error:
        print(f"rankloss evaluate: {message_of(error)}", file=sys.stderr)
        return 1
    return 0


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """A context without the libraries' notes on what they load."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(level)


def evaluate(
    model: Teacher,
    opened: Data,
    ks: Sequence[int] = (1, 5, 10),
    *,
    name: str,
    ids_key: str | None = None,
    batch_size: int = 64,
    workers: int = 0,
) -> tuple[dict[str, Any], Encoded]:
    """Encode all pairs by a model, and measure it.

    Args:
        model: The model.
        opened: The pairs.
        ks: The numbers of answers.
        name: The model's name, for the result and the errors.
        ids_key: The name of the ids, if the pairs have them.
        batch_size: Pairs at a time.
        workers: Processes that read pictures.

    Returns:
        The result that ``--json`` writes, and the features.

    Raises:
        ValueError: The data cannot be read, are of one picture or one id, or k is beyond them.
    """
    pairs = Pairs.of(opened)
    _check_groups_differ(pairs, ids_key)
    rows = encode_rows(model, opened, batch_size=batch_size, workers=workers, shows=True)
    encoded = pairs.with_pictures(rows.pictures).encoded(rows.features)
    about = described(encoded, name, pairs.data, ids_key)
    try:
        return {**about, **measure(encoded, ks, by_ids=pairs.by_ids)}, encoded
    except ValueError as error:
        hint = "; give fewer answers by --k" if str(error).startswith("k must") else ""
        raise ValueError(f"--model {name}: {error}{hint}") from error


def _check_groups_differ(pairs: Pairs, ids_key: str | None) -> None:
    """Raise a ValueError for pairs of one id, or one picture: any answer of any model would be right."""
    if len(set(pairs.groups)) == 1:
        raise ValueError(
            f"--data {pairs.data}: its pairs, {len(pairs.captions)}, have one {noun_of_group(ids_key)}, so "
            "every answer would be right"
        )


def _evaluated(
    args: argparse.Namespace, ks: Sequence[int], other: Mapping[str, Any] | None
) -> dict[str, Any]:
    """The result of a command line, with the difference from another one if it is given."""
    clip_models.check_pretrained(args.model, args.pretrained)
    opened = data.open_data(args)
    device = sources.device_of(args.device, "cuda" if torch.cuda.is_available() else "cpu")
    model = sources.load(["model"], args, device)
    result, encoded = evaluate(
        model,
        opened,
        ks,
        name=f"{args.model} ({args.pretrained})" if args.pretrained else args.model,
        ids_key=args.ids_key,
        batch_size=args.batch_size,
        workers=args.workers,
    )
    if other is None:
        return result
    if other["identity"] != encoded.identity:
        raise ValueError(
            f"--against {args.against} is of other pictures, captions or ids: {other['pictures']} pictures "
            f"and {other['texts']} texts of {other['data']}, ids {other['ids_key']}; these are "
            f"{result['pictures']} and {result['texts']} of {args.data}, ids {args.ids_key}"
        )
    against = {"file": str(args.against), "model": other["model"]}
    return {**result, "against": against, "differences": differences(encoded, result, other)}


def described(encoded: Encoded, model: str, data: str, ids_key: str | None) -> dict[str, Any]:
    """The entries of a result that say what was evaluated."""
    return {
        "rankloss": version("rankloss"),
        "model": model,
        "data": data,
        "ids_key": ids_key,
        "identity": encoded.identity,
        "pictures": len(encoded.image_features),
        "texts": len(encoded.text_features),
        "groups": 1 + int(encoded.image_ids.max()),
        "repeated_captions": encoded.repeated,
        "width": encoded.image_features.shape[1],
    }


def _read(file: Path) -> dict[str, Any]:
    """The result that ``--json`` has written into a file.

    Raises:
        ValueError: It is no such file, an entry is missing, or its ranks are not those of its queries.
    """
    try:
        result = read_json(file)
    except ValueError as error:
        raise ValueError(f"--against {file} is no JSON file: {error}") from error
    entries = ("identity", "ranks", "recall", "model", "data", "ids_key", "pictures", "texts")
    present = result if isinstance(result, dict) else {}
    missing = [entry for entry in entries if entry not in present]
    if missing:
        raise ValueError(f"--against {file} is no result of --json: it has no {missing[0]!r}")
    _check_ranks(file, result)
    return dict(result)


def _check_ranks(file: Path, result: Mapping[str, Any]) -> None:
    """Raise a ValueError unless a file of ``--json`` has a rank, or null, of each query of its directions.

    These are the first two of :data:`WAYS` at least, and no others than these four.
    """
    ranks = result["ranks"]
    ways = set(ranks) if isinstance(ranks, dict) else set()
    has_both_ways = {"image_to_text", "text_to_image"} <= ways
    if not has_both_ways or not ways <= set(WAYS):
        raise ValueError(f"--against {file} is damaged: its ranks are not those of the directions")
    for way, ranks_of_way in ranks.items():
        queries = result["pictures" if way.startswith("image") else "texts"]
        is_whole = isinstance(ranks_of_way, list) and len(ranks_of_way) == queries
        if not is_whole or not all(rank is None or is_count(rank) for rank in ranks_of_way):
            raise ValueError(f"--against {file} is damaged: {way} must have {queries} ranks from 1, or null")


# --- the table --------------------------------------------------------------------------------------------


def lines(result: Mapping[str, Any], ks: Sequence[int]) -> list[str]:
    """The result as a table for a terminal, in percent."""
    by_ids = result["ids_key"] is not None
    unit = f"ids of {result['ids_key']!r}" if by_ids else "pictures"
    head = f"{result['model']} on {result['data']}: {result['pictures']} pictures, {result['texts']} texts"
    if by_ids:
        head += f", {result['groups']} {unit}"
    shown = [
        head,
        "",
        *_table(result["recall"], ks, result["median_rank"], sign=""),
        "",
        f"R@k in percent, with 95 % intervals over the {result['groups']} {unit} (bootstrap).",
        f"Agreement of the rankings: τ {result['cross_modal_tau']:.3f} cross-modal, "
        f"{result['in_modal_tau']:.3f} in-modal. Modality gap: {result['modality_gap']:.3f}.",
    ]
    if result["repeated_captions"]:
        others = "another id" if by_ids else "another picture"
        advice = "" if by_ids else "; --ids-key names the column of what belongs together"
        shown.append(
            f"{result['repeated_captions']} texts repeat a caption of {others}, and count as wrong answers "
            f"there{advice}."
        )
    if "differences" in result:
        shown += [
            "",
            f"Difference from {result['against']['model']} ({result['against']['file']}), same pictures:",
            "",
            *_table(result["differences"], ks, None, sign="+"),
        ]
    return shown


def _table(
    values: Mapping[str, Mapping[str, float]],
    ks: Sequence[int],
    medians: Mapping[str, float] | None,
    *,
    sign: str,
) -> list[str]:
    """A line for each way that has values, under a header: R@k with its interval, then the median rank.

    Args:
        values: The value and the interval of ``{way}_R@{k}``.
        ks: The k of the columns.
        medians: The median rank of each way; None for a table without them.
        sign: ``"+"`` to mark positive numbers, as of differences, or ``""``.
    """
    header = f"{'':<18}" + "".join(f"{f'R@{k}':>22}" for k in ks)
    if medians is not None:
        header += f"{'median rank':>14}"
    rows = [header]
    for way, name in WAYS.items():
        intervals = [values.get(f"{way}_R@{k}") for k in ks]
        if not any(intervals):
            continue
        row = f"{name:<18}" + "".join(f"{_percent(interval, sign):>22}" for interval in intervals)
        if medians is not None:
            row += f"{medians[way]:>14.0f}"
        rows.append(row)
    return rows


def _percent(interval: Mapping[str, float] | None, sign: str) -> str:
    """A value and its interval in percent, ``12.5 [10.0, 15.0]``; a dash where there is none.

    Args:
        interval: ``value``, ``low`` and ``high``, in [0, 1]; or None.
        sign: ``"+"`` to mark positive numbers, or ``""``.
    """
    if interval is None:
        return "–"
    value, low, high = (f"{100 * interval[key]:{sign}.1f}" for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rankloss evaluate",
        description="Evaluate a model on pairs: R@k both ways with intervals, median ranks, agreement of the "
        "rankings, modality gap; and the difference from another model on the same pictures.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--model",
        required=True,
        metavar="NAME",
        help="a model of open_clip, local-dir:FOLDER and hf-hub:… included; or a folder of transformers or "
        "of rankloss heads",
    )
    parser.add_argument(
        "--pretrained",
        metavar="FILE",
        help="a checkpoint or a tag of open_clip; folders have their own",
    )
    data.add_options(parser)
    parser.add_argument(
        "--ids-key", metavar="COLUMN", help="column of ids: pictures and captions of one id are partners"
    )
    parser.add_argument("--k", type=int, nargs="+", default=(1, 5, 10), help="numbers of answers (1 5 10)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result, with each query's rank")
    parser.add_argument(
        "--against",
        type=Path,
        metavar="FILE",
        help="a --json of another model on the same data",
    )
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="pairs at a time (64)")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="readers of pictures (2)")
    parser.add_argument("--device", help="the model's device; a GPU where there is one")
    return parser
