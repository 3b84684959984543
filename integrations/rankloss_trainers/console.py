"""The command ``rankloss``: what can be trained with, and whether it will work here.

``rankloss doctor``: for each trainer whether it is installed, supported, and will honour ``--loss``; torch,
the accelerator and whether the fused kernels serve; and what in this process changes results. The exit code
is 0 if no installed trainer has a problem, else 1.

``rankloss losses [NAME …]``: what ``--loss`` can name, with options and defaults. Losses that share their
options stand together, above the options.

``rankloss features``: a teacher's features of a training's pairs, computed once (:mod:`rankloss_features`).

``python -m rankloss`` is the same command.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence

from rankloss._version import __version__
from rankloss_trainers import catalog, doctor
from rankloss_trainers.catalog import Candidate
from rankloss_trainers.command_line import add_options, by_prefix


def main(argv: Sequence[str] | None = None) -> int:
    """Carry out what the command line says, and return the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["features"]:  # it imports what it needs, and has a parser of its own
        from rankloss_features.command import main as features

        return features(argv[1:])
    parser = argparse.ArgumentParser(prog="rankloss", description="Losses for CLIP training, in any trainer.")
    parser.add_argument("--version", action="version", version=f"rankloss {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    commands.add_parser("doctor", help="say which installed trainers will honour --loss, and what would run")
    losses = commands.add_parser("losses", help="list what --loss can name, with options and defaults")
    losses.add_argument("names", nargs="*", metavar="NAME", help="only these")
    commands.add_parser("features", help="compute a teacher's features of the training data", add_help=False)
    args = parser.parse_args(argv)
    if args.command is None:
        parser.print_help()
        return 0
    if args.command == "doctor":
        return doctor.main()
    found = catalog.candidates()
    unknown = [name for name in args.names if name not in found]
    if unknown:
        losses.error(f"no loss is called {', '.join(unknown)}; there are {', '.join(found)}")
    for paragraph in described(found[name] for name in args.names or found):
        print(paragraph)
    return 0


def described(candidates: Iterable[Candidate]) -> Iterator[str]:
    """Losses in lines: what each is, and once for those that share them the options and their defaults."""
    entries, titles = {}, {}
    for candidate in candidates:
        name, package = candidate.name, candidate.package and f" ({candidate.package})"
        try:
            entries[name] = candidate.load()
        except Exception as error:  # another package's
            yield f"{name}{package}: cannot be used: {type(error).__name__}: {error}"
        else:
            titles[name] = f"{name}{package}: {entries[name].help}\n"
    for alike in by_prefix(entries).values():
        parser = argparse.ArgumentParser(add_help=False)
        add_options(parser, {name: entries[name] for name in alike})
        _, _, options = parser.format_help().partition(f"--loss {', '.join(alike)}:\n")
        yield "".join([*(titles[name] for name in alike), options]).rstrip()


if __name__ == "__main__":
    sys.exit(main())
