"""Pictures: from a file, its bytes or an open picture to RGB, by one way for every command."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from rankloss_features import opening

_WHITES: tuple[int, ...] = (1, 255, 65_535)  # in pictures of floats; in those of 32 bits the latter two
_SCALED_TO_16_BITS = ("PNG", "PPM")  # formats whose deeper grey Pillow scales

_WHITE = "white"


@dataclass(frozen=True)
class Rendering:
    """The way to an RGB picture of 8 bits.

    Grey of 16 bits is scaled, where Pillow's own conversion cuts it off at 255 and leaves white. White of
    floats is 1, 255 or 65,535, the first that no value exceeds; of 32 bits one of the latter two.

    Attributes:
        upright: True to turn a picture as its camera was held, by its EXIF. open_clip's readers of CSV files
            and shards do not; datasets does.
        background: The colour behind transparent pixels, by a name of CSS or as ``#rrggbb``. The trainers
            drop the transparency, which leaves the colour that is hidden there, mostly black.

    Raises:
        ValueError: The background is no colour.
    """

    upright: bool = True
    background: str = _WHITE

    def __post_init__(self) -> None:
        if self.background == _WHITE:  # modules have this default, also where Pillow is not installed
            return

        from PIL import ImageColor

        with suppress(ValueError, AttributeError, TypeError):
            if len(ImageColor.getrgb(self.background)) == 3:  # without an opacity
                return
        raise ValueError(f"background must be a colour, such as white or #808080; got {self.background!r}")

    def open(self, source: bytes | str) -> Any:
        """The picture of a file, of its bytes, or of a URL.

        Raises:
            OSError: As :func:`rankloss_features.opening.picture`.
            ValueError: As :meth:`convert`.
        """
        with opening.picture(source) as image:
            return self.convert(image)

    def convert(self, image: Any) -> Any:
        """A picture of Pillow in RGB of 8 bits: upright if that is asked for, grey scaled, with a background.

        Raises:
            ValueError: Values of floats or 32 bits are negative, not finite, or above 65,535.
        """
        from PIL import Image, ImageOps

        # A turned picture has no format any more.
        has_16_bits = image.mode.startswith("I;16") or image.format in _SCALED_TO_16_BITS
        if self.upright:
            image = ImageOps.exif_transpose(image)
        if image.mode.startswith(("I", "F")):
            return Image.fromarray(_grey_of_8_bits(image, has_16_bits=has_16_bits)).convert("RGB")
        if not image.has_transparency_data:
            return image.convert("RGB")
        canvas = Image.new("RGBA", image.size, self.background)
        canvas.alpha_composite(image.convert("RGBA"))
        return canvas.convert("RGB")


def _grey_of_8_bits(image: Any, *, has_16_bits: bool) -> Any:
    """Grey of more bits, or of floats, as an array of 8.

    Raises:
        ValueError: Values are negative, not finite, or above 65,535.
    """
    values = np.asarray(image, np.float64)
    least, most = values.min(), values.max()
    if has_16_bits:
        whites = _WHITES[-1:]
    elif image.mode == "I":
        whites = _WHITES[1:]
    else:
        whites = _WHITES
    possible_whites = [white for white in whites if least >= 0 and most <= white]
    if not possible_whites:
        raise ValueError(
            f"its grey values are from {least:g} to {most:g}; they must be from 0 to 1, 255 or 65535"
        )
    return np.rint(values * (255 / possible_whites[0])).astype(np.uint8)
