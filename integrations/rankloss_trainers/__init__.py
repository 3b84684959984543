"""Losses by name for any trainer: the catalogue, and the runtime that every trainer's plug-in stands on.

:func:`create` builds a loss for a loop of one's own. Nothing here imports a trainer, and this module imports
nothing until :func:`create` is called.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from torch import nn

    from rankloss.distributed import GatherOption


def create(
    name: str, base: Any = None, *, teacher: str | None = None, gather: GatherOption = None, **options: Any
) -> nn.Module:
    """Build the loss that ``--loss NAME`` builds.

    Args:
        name: A loss of the catalogue, or several joined by ``+``; ``rankloss losses`` lists them. ``"clip"``
            and ``"siglip"``, alone or as the first of joined ones, are the losses of pairs.
        base: The loss to stand on. None: :class:`rankloss.SigLipLoss` for ``"siglip"``, alone or joined, and
            a loss that needs it; else :class:`rankloss.ClipLoss`.
        teacher: A folder of ``rankloss features``, or of
            :func:`rankloss_features.caching.compute_features`, whose rows each call gives as
            ``reference_image_features`` and ``reference_text_features``.
        gather: See :class:`rankloss.Gather`. None: the base's, else ``Gather()``.
        **options: Options by their names without prefix, those of joined losses by loss, as
            ``rankclip={"top_k": 8}``; ``rankloss losses NAME`` lists them.

    Returns:
        A module that is called with ``image_features``, ``text_features`` and ``logit_scale``, and is told
        its progress by ``set_epoch`` or ``set_progress``. Its ``base`` is the loss under all others, for a
        validation. One that needs a teacher refuses a call without its features, and one that uses none a
        call with them.

    Raises:
        TypeError: The name is no text, the loss has no such option, or those of joined losses are not given
            by loss.
        ValueError: There is no such loss, an option has another value, only a trainer can serve it, options
            exclude each other, or the loss does not work on the base.

    Example:
        >>> loss = create("rankclip", top_k=8, schedule="linear")
        >>> loss.set_progress(2, 3)
        >>> loss.schedule_value
        0.5
    """
    from rankloss_trainers.loop import created

    return created(name, base, gather, teacher, options)
