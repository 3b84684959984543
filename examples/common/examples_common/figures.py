"""The reports' figures, as small PNGs in one style."""

import io
from collections.abc import Callable
from pathlib import Path

import matplotlib.style
from matplotlib.figure import Figure
from PIL import Image

from .page import Picture

COLOURS = 256  # of a PNG of lines and flat areas
_DPI = 150
_STYLE = Path(__file__).with_name("figures.mplstyle")


def picture(alt: str, figure_of: Callable[[], Figure], *, colours: int | None = COLOURS) -> Picture:
    """Draw a figure, with at most so many colours."""
    raw, small = io.BytesIO(), io.BytesIO()
    with matplotlib.style.context(_STYLE):
        figure_of().savefig(raw, format="png", dpi=_DPI)
    with Image.open(raw) as image:
        shown = image.convert("RGB")
        if colours is not None:
            shown = shown.quantize(colours, dither=Image.Dither.NONE)
        shown.save(small, format="PNG", optimize=True, dpi=(_DPI, _DPI))
    return Picture(small.getvalue(), alt)
