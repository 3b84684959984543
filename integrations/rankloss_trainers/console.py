"""The command ``rankloss``: what can be trained with, and whether it will work here.

``rankloss doctor``: for each trainer whether it is installed, supported, and will honour ``--loss``; torch,
the accelerator and the kernel that would run; and what in this process changes results. The exit code is 0 if
no installed trainer has a problem, else 1.

``rankloss losses``: every name that ``--loss`` can have, with its options and their defaults.

``rankloss features``: a teacher's features of a training's pairs, computed once (:mod:`rankloss_features`).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from rankloss_trainers import catalog, doctor
from rankloss_trainers.catalog import Candidate
from rankloss_trainers.command_line import add_options


def main(argv: Sequence[str] | None = None) -> int:
    """Carry out what the command line says, and return the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["features"]:  # it imports what it needs, and has a parser of its own
        from rankloss_features.command import main as features

        return features(argv[1:])
    parser = argparse.ArgumentParser(prog="rankloss", description="Losses for CLIP training, in any trainer.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("doctor", help="say which installed trainers will honour --loss, and what would run")
    losses = commands.add_parser("losses", help="list what --loss can name, with options and defaults")
    losses.add_argument("names", nargs="*", metavar="NAME", help="only these")
    commands.add_parser("features", help="compute a teacher's features of the training data", add_help=False)
    args = parser.parse_args(argv)
    if args.command == "doctor":
        return doctor.main()
    found = catalog.candidates()
    unknown = [name for name in args.names if name not in found]
    if unknown:
        losses.error(f"no loss is called {', '.join(unknown)}; there are {', '.join(found)}")
    for name in args.names or found:
        print(described(found[name]))
    return 0


def described(candidate: Candidate) -> str:
    """A loss in lines: what it is, and each of its options with its choices and default."""
    name, package = candidate.name, candidate.package and f" ({candidate.package})"
    try:
        entry = candidate.load()
    except Exception as error:  # another package's
        return f"{name}{package}: cannot be used: {type(error).__name__}: {error}"
    parser = argparse.ArgumentParser(add_help=False)
    add_options(parser, [name], entry)
    _, _, options = parser.format_help().partition(f"--loss {name}:\n")
    return f"{name}{package}: {entry.help}\n{options}".rstrip()


if __name__ == "__main__":
    sys.exit(main())
