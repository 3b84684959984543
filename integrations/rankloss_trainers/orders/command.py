"""``rankloss orders``: lists of a search engine's, a reranker's or a person's ids, kept beside the data."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from rankloss_features import data
from rankloss_trainers.orders import folder


def main(argv: Sequence[str]) -> int:
    """Carry out a command line, and return the exit code."""
    parser = argparse.ArgumentParser(
        prog="rankloss orders",
        description="Keep lists of ids, by which --rankclip-orders ranks the pairs of a batch.",
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--from",
        dest="file",
        type=Path,
        required=True,
        metavar="FILE",
        help="JSON lines or Parquet: id, the file name of a picture or its key in a webdataset; ids of "
        "others, the best first; and perhaps grades, a number for each id, a larger one being better",
    )
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="where they go")
    data.add_options(parser)
    args = parser.parse_args(argv)
    try:
        command = shlex.join(["rankloss", "orders", *argv])
        about = folder.write(args.output, data.open_data(args), args.file, command)
    except (OSError, ValueError) as error:
        print(f"rankloss orders: {error}", file=sys.stderr)
        return 1
    print(
        f"{args.output}: {about['lists']} lists of at most {about['longest']} ids; "
        f"{about['pictures'] - about['lists']} of {about['pictures']} pictures have none"
    )
    return 0
