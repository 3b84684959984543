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
        self._due: tuple[int, str] | None = None

    def due(self, step: int, title: str) -> None:
        """Ask for a chart at the next measurement.

        Args:
            step: The step under which it is stored.
            title: What stands above it.
        """
        if self._trackers:
            self._due = step, title

    def draw(self, image_features: Tensor, text_features: Tensor) -> None:
        """Draw the chart, if one is due.

        Args:
            image_features: Those of all processes, ``[N, D]``.
            text_features: ``[N, D]``.
        """
        if self._due is None:
            return
        (step, title), self._due = self._due, None
        try:
            from rankloss import plots

            v, t = image_features[:_PAIRS], text_features[:_PAIRS]
            labels = [f"pair {number}" for number in range(1, len(v) + 1)]
            figure = plots.slope_chart(v, t, labels, anchor=0, title=title)
            for store in self._trackers:
                store(NAME, figure, step)
        except Exception as error:
            self._trackers = ()
            if isinstance(error, ModuleNotFoundError) and (error.name or "").startswith("matplotlib"):
                _logger.warning(
                    "The rank agreement is logged without a chart, which needs matplotlib: "
                    "pip install 'rankloss[plots]'"
                )
            else:
                _logger.warning("No more charts of the rank agreement: %s", error, exc_info=True)
