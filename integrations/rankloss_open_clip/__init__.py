"""``--loss`` for the unmodified ``python -m open_clip_train.main``: RankCLIP, CyCLIP, ALIP, and others.

Next to nothing is imported here: torch loads :mod:`rankloss_open_clip.bootstrap` in every program that
imports torch, so this package costs nothing until open_clip is imported.
"""

from types import ModuleType


def attach(trainer: ModuleType, create_loss: str = "create_loss") -> None:
    """Let ``--loss`` work in a trainer that is laid out like open_clip's: its old one, or a fork.

    The trainer's main module holds, or imports by name, three functions: the one that builds the loss from
    the parsed arguments, ``parse_args`` (by argparse), and ``train_one_epoch``. They are patched in that
    module, if all of them are recognised. Call it before the trainer's ``main()``::

        import rankloss_open_clip
        import training.main

        rankloss_open_clip.attach(training.main, "create_loss")
        training.main.main(sys.argv[1:])

    Args:
        trainer: The trainer's main module.
        create_loss: The name of the function that builds the loss.

    Raises:
        AttributeError: The module has not these functions, or its parser is not argparse's.
        TypeError: Their parameters are others than in open_clip's trainer.
    """
    from rankloss_open_clip import patches

    patches.patch_trainer(trainer, create_loss)
