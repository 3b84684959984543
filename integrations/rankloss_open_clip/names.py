"""Names that the plug-in's parts share. Nothing is imported here."""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

PREFIXES = ("rankclip", "streamed")
"""What the options of rankloss's own losses begin with: :data:`rankloss_trainers.catalog.PREFIXES`."""

DIST_IMPLS = ("bidir", "shift", "reduce", "gather")
"""The values that the trainer's ``--loss-dist-impl`` is meant to have."""


def asks_for_loss(argv: "Iterable[str]") -> bool:
    """Whether a trainer's command line has ``--loss`` or one of the options that belong to it.

    ``--los`` counts: without the plug-in it is read as ``--loss-dist-impl`` too. That option itself does not.
    """
    names = [str(argument).partition("=")[0] for argument in argv]
    options = tuple(f"--{prefix}-" for prefix in PREFIXES)
    return any(name in ("--los", "--loss") or name.startswith(options) for name in names)
