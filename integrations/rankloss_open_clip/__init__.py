"""``--loss`` for the unmodified ``python -m open_clip_train.main``: RankCLIP and every other registered loss.

Next to nothing is imported here: torch calls :func:`wait_for_trainer` in every program that imports torch, so
this package costs nothing until open_clip is imported.
"""

import sys
from types import ModuleType

_MAINS = ("open_clip_train/main.py", "rankloss_open_clip/__main__.py")
_reported = False  # whether this process has been warned of a damaged file

failures: dict[str, Exception] = {}
"""The errors, by the module that could not be patched."""


def wait_for_trainer() -> None:
    """Wait for open_clip's trainer; torch's entry point, called each time torch is imported.

    Whatever file of rankloss is damaged but this one, an import of torch succeeds. The process gets one
    warning. It ends if it is the trainer and was given ``--loss``, which the trainer's parser would take for
    an abbreviation of ``--loss-dist-impl``, and train plain CLIP.

    Raises:
        SystemExit: The trainer cannot be waited for, and this process is the trainer with ``--loss``.
    """
    try:
        from rankloss_open_clip import bootstrap

        bootstrap.attach()
        # Asked of the finders themselves: a damaged file may do nothing, and raise nothing. A module's name
        # stays among the actions of bootstrap's finder once the module is loaded.
        waited_for = {name for finder in sys.meta_path for name in getattr(finder, "actions", ())}
        if bootstrap.PARAMS not in waited_for:
            raise ImportError("no module of open_clip's trainer is waited for")
    except Exception as error:
        report_damage(error)


def report_damage(error: Exception) -> None:
    """Warn of an error for which ``--loss`` cannot work, once.

    Raises:
        SystemExit: This process is the trainer, started with ``--loss``.
    """
    global _reported
    program, *words = getattr(sys, "argv", None) or [""]  # an embedded Python has no command line
    if program.replace("\\", "/").endswith(_MAINS) and asks_for_loss(words):
        sys.exit(f"error: {refusal('rankloss_open_clip', error)}")
    if not _reported:
        import contextlib
        import warnings

        _reported = True
        with contextlib.suppress(UserWarning):  # under -W error: `import torch` has to succeed
            text = f"rankloss is damaged: --loss will not work in open_clip's trainer ({error!r})"
            warnings.warn(text, stacklevel=2)


def asks_for_loss(words: list[str]) -> bool:
    """True for ``--loss`` or ``--los``, which the trainer's own parser reads as ``--loss-dist-impl``."""
    flags = {word.partition("=")[0] for word in words}
    return "--loss" in flags or "--los" in flags  # a shorter one is ambiguous


def refusal(name: str, error: Exception) -> str:
    """The message that refuses a run with ``--loss``, given a module's name and why it is not patched."""
    return (
        "--loss was given, but rankloss_open_clip could not attach to open_clip's trainer "
        f"({name}: {error!r}). Run `rankloss doctor` for advice, or leave --loss away."
    )


def attach(trainer: ModuleType, create_loss: str = "create_loss") -> None:
    """Let ``--loss`` work in a trainer that is laid out like open_clip's: its old one, or a fork.

    The trainer's main module holds, or imports by name, three functions: the one that builds the loss from
    the parsed arguments, ``parse_args``, which returns a namespace of argparse, and ``train_one_epoch``. They
    are patched in that module, and the functions that read its data in the module of its ``get_data``, if it
    has one: all of them, or none where an error is raised. Call it before the trainer's ``main()``::

        import rankloss_open_clip
        import training.main

        rankloss_open_clip.attach(training.main, "create_loss")
        training.main.main(sys.argv[1:])

    Args:
        trainer: The trainer's main module.
        create_loss: The name of the function that builds the loss.

    Raises:
        AttributeError: The module has not these functions.
        TypeError: A function's parameters are others than in open_clip's trainer.
    """
    from rankloss_open_clip import patches

    patches.patch_trainer(trainer, create_loss)


def raise_failures() -> None:
    """Raise an ImportError for the first module that could not be patched, if there is one."""
    for name, error in failures.items():
        raise ImportError(refusal(name, error)) from error
