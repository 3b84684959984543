"""Pictures of the batch's rank agreement, for TensorBoard, W&B and the like."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Tracker = Callable[[str, "Figure", int], None]
"""``(name, figure, step)``: stores a figure."""

NAME = "train/agreement"
"""The name under which the charts are stored."""

_PAIRS = 1024  # at most: the chart's copies of the features stay small beside a training

_logger = logging.getLogger("rankloss_trainers")


def picture(figure: Figure) -> Any:
    """A figure as ``wandb.Image`` takes it; figures themselves it takes only once pyplot is imported."""
    from PIL import Image  # comes with matplotlib

    file = io.BytesIO()
    figure.savefig(file, format="png")
    return Image.open(file)


class AgreementCharts:
    """Draws :func:`rankloss.plots.slope_chart` of a batch's first pair, and hands it to trackers.

    The items ranked are the batch's first pairs, at most 1,024. Nothing that goes wrong with a chart ends a
    training: a warning says what it was, and no more charts are drawn.

    Args:
        trackers: What stores the charts.
    """

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self._trackers = trackers
        self._due: tuple[int, int] | None = None

    def due(self, epoch: int, step: int) -> None:
        """Ask for a chart at the next measurement.

        Args:
            epoch: The epoch, counted from 1, for the title.
            step: The step under which the trainer logs what it calls step 0 of the loss.
        """
        self._due = epoch, step

    def draw(self, image_features: Tensor, text_features: Tensor, step: int) -> None:
        """Draw the chart, if one is due.

        Args:
            image_features: Those of all processes, ``[N, D]``.
            text_features: ``[N, D]``.
            step: The step that is measured, as the loss counts them.
        """
        if self._due is None or not self._trackers:
            return
        (epoch, first), self._due = self._due, None
        try:
            from rankloss import plots

            v, t = image_features[:_PAIRS], text_features[:_PAIRS]
            labels = [f"pair {number}" for number in range(1, len(v) + 1)]
            title = f"epoch {epoch}, step {first + step}"
            figure = plots.slope_chart(v, t, labels, anchor=0, title=title)
            for store in self._trackers:
                store(NAME, figure, first + step)
        except Exception as error:
            self._trackers = ()
            remedy = "; charts need matplotlib: pip install 'rankloss[plots]'"
            said = remedy if isinstance(error, ModuleNotFoundError) else ""
            _logger.warning("No more charts of the rank agreement: %s%s", error, said, exc_info=not said)
