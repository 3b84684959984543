"""The command ``rankloss``: the losses, their options, and the trainers here that will honour them.

``rankloss doctor``: for each trainer its version, and the loss's way into it or the reason against it. The
exit code is 0 if a trainer is ready and none has a problem, else 1.

``rankloss losses``: the losses, one a line. ``rankloss losses NAME …``: their options and defaults.

``rankloss features``: a teacher's features of a training's pairs, computed once (:mod:`rankloss_features`).

``rankloss evaluate``: recall of a model on pairs, with intervals, and its difference from another model's.

``rankloss heads``: heads on two frozen encoders, trained, evaluated and saved.

``rankloss sample``: pictures with captions and ids, and tiny models, to try everything on.

``python -m rankloss`` is the same command.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import version

from rankloss_trainers import catalog
from rankloss_trainers.command_line import described
from rankloss_trainers.extras import extra

_HELP_OF_FEATURES = {
    "features": "compute a teacher's features of the training data",
    "evaluate": "evaluate a model: recall with intervals, and its difference from another's",
    "heads": "train heads on two frozen encoders, for a few thousand pairs",
    "sample": "write pictures with captions and tiny models, to try everything on",
}
"""The commands of ``rankloss_features``, each with a parser of its own."""

_MODULES_OF_FEATURES = {
    "features": "rankloss_features.command",
    "evaluate": "rankloss_features.evaluate",
    "heads": "rankloss_features.train_heads",
    "sample": "rankloss_features.sample",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Carry out the command line, and return the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in _MODULES_OF_FEATURES:
        return _run_of_features(argv[0], argv[1:])
    parser = argparse.ArgumentParser(prog="rankloss", description="Losses for CLIP training, in any trainer.")
    parser.add_argument("--version", action="version", version=f"rankloss {version('rankloss')}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    commands.add_parser("doctor", help="say which installed trainers will honour --loss")
    losses = commands.add_parser("losses", help="list the losses, or the options of some")
    losses.add_argument("names", nargs="*", metavar="NAME", help="show the options of these")
    for name, summary in _HELP_OF_FEATURES.items():
        commands.add_parser(name, help=summary, add_help=False)
    args = parser.parse_args(argv)
    if args.command is None:
        parser.print_help()
        return 0
    if args.command == "doctor":
        from rankloss_trainers import doctor

        return doctor.main()
    try:
        for name in args.names or catalog.known():
            print(*_lines_about(name, with_options=bool(args.names)), sep="\n", flush=True)
    except ValueError as error:
        losses.error(str(error))
    except BrokenPipeError:  # its reader, `head` say, wants no more: Python's flush at the end goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _run_of_features(command: str, argv: Sequence[str]) -> int:
    """Carry out a command of ``rankloss_features``; its exit code, 1 where a package is missing."""
    try:
        with extra("features"):
            module = importlib.import_module(_MODULES_OF_FEATURES[command])
            code: int = module.main(argv)
            return code
    except ModuleNotFoundError as error:
        print(f"rankloss {command}: {error}", file=sys.stderr)
        return 1


def _lines_about(name: str, *, with_options: bool) -> Iterator[str]:
    """The line that lists a loss, or joined ones; with options, these and their defaults beside others."""
    names = catalog.names_of(name)
    packages = [catalog.package_of(each) for each in names]
    # rankloss's own losses have none; a dictionary has each once, in this order.
    other_packages = dict.fromkeys(package for package in packages if package)
    title = name + (f" ({', '.join(other_packages)})" if other_packages else "")
    try:
        summaries = [catalog.load(each).summary for each in names]
    except Exception as error:  # another package's
        yield f"{title}: cannot be used: {type(error).__name__}: {error}"
        return
    yield f"{title}: {' and '.join(summaries)}"
    if with_options:
        for each in names:
            yield from _defaults_beside_others(each)
        yield described(names)


def _defaults_beside_others(name: str) -> Iterator[str]:
    """The defaults that a loss has where it is joined with another loss, a sentence for each."""
    named = catalog.load(name)
    for other, values in named.beside.items():
        yield f"Beside {other}, {name} has other defaults: {named.spelled(values)}."


if __name__ == "__main__":
    sys.exit(main())
