"""Draws icons as small pictures, in parallel, with a cache."""

import io
import itertools
from collections.abc import Sequence
from pathlib import Path

import joblib
import numpy as np
from openmoji_demo.drawing import rasterise
from openmoji_demo.terminal import Track
from PIL import Image

from .package import Icon

SIZE = 64
THUMBNAIL = 16
_CHUNK = 256


def pixels(png: bytes, *, averaged: int = 1) -> np.ndarray:
    """Decode a PNG, ``uint8 [height, width, 3]``, and average its squares of ``averaged`` pixels a side."""
    with Image.open(io.BytesIO(png)) as image:
        return np.asarray(image.convert("RGB").reduce(averaged))


def draw_all(
    icons: Sequence[Icon],
    cache: Path,
    *,
    workers: int = 2,
    track: Track = lambda items, _length, _what: items,
) -> tuple[list[bytes], np.ndarray]:
    """Return the PNG of every icon, in order, and their thumbnails, ``uint8 [N, 16, 16, 3]``.

    The icons are sorted by set. What is drawn is kept in ``cache``, some drawings of one set at a time: an
    interrupted build resumes, and changed drawings are drawn again.
    """
    sets = ([icon.svg for icon in of] for _, of in itertools.groupby(icons, key=lambda icon: icon.set))
    chunks = (svgs[i : i + _CHUNK] for svgs in sets for i in range(0, len(svgs), _CHUNK))
    kept = joblib.Memory(cache, verbose=0).cache(_draw_many)
    parts = joblib.Parallel(n_jobs=workers, return_as="generator")(map(joblib.delayed(kept), chunks))
    drawings = itertools.chain.from_iterable(zip(*part, strict=True) for part in parts)
    pngs, thumbnails = zip(*track(drawings, len(icons), "Drawing"), strict=True)
    return list(pngs), np.stack(thumbnails)


def _draw_many(svgs: Sequence[str]) -> tuple[list[bytes], np.ndarray]:
    """Return the PNGs of drawings, and their thumbnails."""
    pngs = [rasterise(svg, SIZE) for svg in svgs]
    return pngs, np.stack([pixels(png, averaged=SIZE // THUMBNAIL) for png in pngs])
