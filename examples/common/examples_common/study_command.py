"""The part of the command line that every study has."""

import argparse
from collections.abc import Iterable
from pathlib import Path


def study_parser(
    description: str, presets: Iterable[str], output: str, holds: str
) -> argparse.ArgumentParser:
    """Return a parser with ``--preset``, ``--output`` and ``--report-only``.

    Args:
        description: Of the command.
        presets: The names of the sizes, "quick" among them.
        output: The default folder.
        holds: What the folder is of, for ``--help``.
    """
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    add = parser.add_argument
    add("--preset", choices=presets, default="quick", help="size (default: %(default)s)")
    add("--output", type=Path, default=Path(output), help=f"folder of {holds} (default: %(default)s)")
    add("--report-only", action="store_true", help="train nothing; report the records that are there")
    return parser


def home(args: argparse.Namespace, example: Path) -> Path:
    """Return the folder of the records and the report.

    The full preset's records are part of the repository, in the example's folder: runs resume from them.
    """
    return example if args.preset == "full" else Path(args.output, args.preset)
