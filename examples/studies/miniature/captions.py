"""Writes the second caption of a picture, which ALIP needs, in place of a captioner.

ALIP's authors describe every image with OFA. No captioner knows icons, so the description is made of what
the pixels show (colours, how much is filled, symmetry) and what the icon set says (style, category): "a
symmetric black outline drawing of arrows". It never uses the icon's name, and only pictures of the training
side get one.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_PAPER = 245  # brighter is background
_COLOURS = {
    "black": (20, 20, 20),
    "gray": (128, 128, 128),
    "red": (220, 50, 50),
    "orange": (245, 140, 40),
    "yellow": (250, 210, 60),
    "green": (70, 160, 70),
    "teal": (40, 160, 160),
    "blue": (50, 100, 220),
    "light blue": (130, 195, 240),
    "purple": (130, 70, 180),
    "pink": (240, 130, 180),
    "brown": (130, 85, 55),
    "beige": (240, 215, 180),
}
_NAMES = tuple(_COLOURS)
_VALUES = np.array(list(_COLOURS.values()), dtype=np.int32)
_SECOND = 0.2  # share of the ink above which a second colour is named
_SAME_HALVES = 6.0  # mean difference, in grey levels, of halves that count as mirrored


def colours(pixels: np.ndarray) -> list[str]:
    """Name the one or two colours that cover most of what is drawn; an empty list for an empty picture.

    Args:
        pixels: ``uint8 [height, width, 3]``.
    """
    ink = pixels[(pixels < _PAPER).any(axis=-1)].astype(np.int32)
    if not len(ink):
        return []
    if np.ptp(ink, axis=1).max() < 24:  # no colour: grey pixels are the antialiased edge of a black line
        return ["black" if ink.min() < 80 else "gray"]
    nearest = ((ink[:, None] - _VALUES) ** 2).sum(axis=-1).argmin(axis=1)
    share = np.bincount(nearest, minlength=len(_NAMES)) / len(ink)
    order = np.argsort(-share, kind="stable")[:2]
    return [_NAMES[i] for number, i in enumerate(order) if number == 0 or share[i] >= _SECOND]


def fill(pixels: np.ndarray) -> str:
    """Say how much of the picture is drawn on."""
    share = (pixels < _PAPER).any(axis=-1).mean()
    if share < 0.2:
        return "thin outline"
    return "outline" if share < 0.35 else "half filled" if share < 0.55 else "solid"


def is_symmetric(pixels: np.ndarray) -> bool:
    """Say whether the right half mirrors the left one."""
    grey = pixels.astype(np.float32).mean(axis=-1)
    return float(np.abs(grey - grey[:, ::-1]).mean()) < _SAME_HALVES


def synthetic_caption(pixels: np.ndarray, style: str, categories: Sequence[str]) -> str:
    """Describe a picture by its pixels, its style and its set's categories.

    Args:
        pixels: ``uint8 [height, width, 3]``.
        style: The style that its set gives it, or an empty string: then the pixels say how much is filled.
        categories: The categories that its set gives it, if any.

    Example:
        >>> square = np.full((8, 8, 3), 255, dtype=np.uint8)
        >>> square[1:7, 1:7] = 0
        >>> synthetic_caption(square, "", ["Shapes"])
        'a symmetric black solid drawing of shapes'
    """
    words = ["a", "symmetric"] if is_symmetric(pixels) else ["a"]
    words += [" and ".join(colours(pixels)), style or fill(pixels), "drawing"]
    if categories:
        words += ["of", categories[0].lower()]
    return " ".join(word for word in words if word)
