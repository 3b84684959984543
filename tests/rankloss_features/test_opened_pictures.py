"""Pictures become RGB of 8 bits as an eye sees them: upright, in their range, on a background."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageColor

from rankloss_features.pictures import Rendering

RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)
"""Every grey of 8 bits."""


def file_content(picture: Image.Image, form: str, **options: Any) -> bytes:
    """The content of a file of a picture."""
    file = io.BytesIO()
    picture.save(file, form, **options)
    return file.getvalue()


def grey_of(content: bytes) -> Any:
    """The greys of an opened picture, whose three channels must be equal."""
    pixels = np.asarray(Rendering().open(content))
    assert pixels.shape == (16, 16, 3)
    assert (pixels == pixels[..., :1]).all()
    return pixels[..., 0]


@pytest.mark.parametrize("form", ["PNG", "TIFF", "PPM"])
@pytest.mark.parametrize("white", [255, 40])
def test_grey_of_16_bits_is_scaled_also_where_a_picture_is_dark(form: str, white: int) -> None:
    grey = (RAMP.astype(np.uint32) * white // 255).astype(np.uint16)
    content = file_content(Image.fromarray(grey * 257), form)  # 255 · 257 is the white of 16 bits
    np.testing.assert_array_equal(grey_of(content), grey)


@pytest.mark.parametrize(
    ("dtype", "white"),
    [(np.float32, 1), (np.float32, 255), (np.float32, 65535), (np.int32, 255), (np.int32, 65535)],
)
def test_grey_of_floats_and_of_32_bits_is_scaled(dtype: Any, white: int) -> None:
    content = file_content(Image.fromarray((RAMP * (white / 255)).astype(dtype)), "TIFF")
    np.testing.assert_array_equal(grey_of(content), RAMP)


@pytest.mark.parametrize(
    ("wrong", "greys"), [(-0.5, "-0.5 to 255"), (np.nan, "nan to nan"), (1e6, r"1 to 1e\+06")]
)
def test_grey_of_no_known_range_is_refused_with_its_least_and_its_most(wrong: float, greys: str) -> None:
    values = RAMP.astype(np.float32)
    values[0, 0] = wrong  # in place of 0, the only pixel of this grey
    with pytest.raises(
        ValueError, match=rf"its grey values are from {greys}; they must be from 0 to 1, 255 or 65535"
    ):
        Rendering().open(file_content(Image.fromarray(values), "TIFF"))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "RGB"])
@pytest.mark.parametrize("background", ["white", "#336699"])
def test_transparent_pixels_have_the_colour_of_the_background(mode: str, background: str) -> None:
    """A red square on nothing, which is stored as black."""
    picture = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    picture.paste((204, 0, 0, 255), (1, 1, 3, 3))
    if mode in ("RGBA", "LA"):  # which have a channel of opacity
        content = file_content(picture.convert(mode), "PNG")
    else:  # a colour that counts as transparent
        opaque = picture.convert("RGB").convert(mode)
        content = file_content(opaque, "PNG", transparency=opaque.getpixel((0, 0)))
    pixels = np.asarray(Rendering(background=background).open(content))
    square = grey_of_red() if mode in ("L", "LA") else (204, 0, 0)
    np.testing.assert_array_equal(pixels[0, 0], ImageColor.getrgb(background))
    np.testing.assert_array_equal(pixels[1:3, 1:3], np.full((2, 2, 3), square))


def grey_of_red() -> tuple[int, int, int]:
    """The red of the square, as a mode without colours stores it."""
    grey = Image.new("RGB", (1, 1), (204, 0, 0)).convert("L").getpixel((0, 0))
    return (grey, grey, grey)


def orientation(number: int) -> Image.Exif:
    """The entry of a camera: 6 of one turned by a quarter, 3 by a half."""
    exif = Image.Exif()
    exif[0x0112] = number
    return exif


@pytest.mark.parametrize("upright", [True, False])
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_a_picture_is_turned_if_it_shall_be_upright(form: str, upright: bool) -> None:
    exif = orientation(6)
    content = file_content(Image.new("RGB", (6, 4)), form, exif=exif)
    assert Rendering(upright).open(content).size == ((4, 6) if upright else (6, 4))


def test_grey_of_16_bits_is_turned_too() -> None:
    grey = Image.fromarray(RAMP.astype(np.uint16) * 257)
    content = file_content(grey, "PNG", exif=orientation(3))
    np.testing.assert_array_equal(grey_of(content), RAMP[::-1, ::-1])


@pytest.mark.parametrize("wrong", ["whitish", "", "#12", "#ffffff80", None, 7])
def test_a_background_that_is_no_colour_is_refused(wrong: Any) -> None:
    words = f"background must be a colour, such as white or #808080; got {wrong!r}"
    with pytest.raises(ValueError, match=f"^{words}$"):
        Rendering(background=wrong)
