"""The command ``rankloss``: what can be trained with, and whether it will work here.

``rankloss doctor``: for each trainer whether it is installed, supported, and will honour ``--loss``; torch,
the accelerator and the kernel that would run; and what in this process changes results. The exit code is 0 if
no installed trainer has a problem, else 1.

``rankloss losses``: every name that ``--loss`` can have, with its options and their defaults.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from rankloss_trainers import catalog, doctor
from rankloss_trainers.catalog import Candidate, LossEntry, flag


def main(argv: Sequence[str] | None = None) -> int:
    """Carry out what the command line says, and return the exit code."""
    parser = argparse.ArgumentParser(prog="rankloss", description="Losses for CLIP training, in any trainer.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("doctor", help="say which installed trainers will honour --loss, and what would run")
    losses = commands.add_parser("losses", help="list what --loss can name, with options and defaults")
    losses.add_argument("names", nargs="*", metavar="NAME", help="only these")
    args = parser.parse_args(argv)
    if args.command == "doctor":
        return doctor.main()
    found = catalog.candidates()
    unknown = [name for name in args.names if name not in found]
    if unknown:
        losses.error(f"no loss is called {', '.join(unknown)}; there are {', '.join(found)}")
    for name in args.names or found:
        print("\n".join(described(found[name])))
    for sentence in catalog.shadowed():
        print(f"{sentence}.")
    return 0


def described(candidate: Candidate) -> list[str]:
    """A loss in lines: what it is, and each of its options with its default and choices."""
    package = candidate.package and f" ({candidate.package})"
    try:
        entry = candidate.load()
    except Exception as error:  # another package's
        return [f"{candidate.name}{package}: cannot be used: {type(error).__name__}: {error}"]
    lines = [f"{candidate.name}{package}: {entry.help}"]
    rows = [_option(candidate.name, entry, i) for i in range(len(entry.options))]
    width = max((len(typed) for typed, _ in rows), default=0)
    return lines + [f"  {typed:{width}}  {text}" for typed, text in rows]


def _option(name: str, entry: LossEntry, index: int) -> tuple[str, str]:
    option = entry.options[index]
    choices, metavar = option.keywords.get("choices"), option.keywords.get("metavar", "")
    value = f"{{{','.join(map(str, choices))}}}" if choices else metavar
    default = option.unset if option.default is None else option.default
    return f"{flag(name, entry, option)} {value}".rstrip(), f"{option.help} (default: {default})"


if __name__ == "__main__":
    sys.exit(main())
