"""Draws icons as small pictures, in parallel, with a cache."""

from __future__ import annotations

import hashlib
import io
import itertools
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from examples_common.terminal import Track
from PIL import Image

from .package import Icon

SIZE = 64
THUMBNAIL = 16
_CHUNK = 256

Drawing = tuple[bytes, np.ndarray]


def rasterise(svg: str, size: int = SIZE) -> bytes:
    """Draw an SVG on white, in black where it names no colour, and return a PNG."""
    import resvg_py

    return bytes(
        resvg_py.svg_to_bytes(
            svg_string=svg, width=size, height=size, background="white", skip_system_fonts=True
        )
    )


def pixels(png: bytes) -> np.ndarray:
    """Decode a PNG: ``uint8 [height, width, 3]``."""
    with Image.open(io.BytesIO(png)) as image:
        return np.asarray(image.convert("RGB"))


def thumbnail(png: bytes) -> np.ndarray:
    """Decode a PNG and average it: ``uint8 [16, 16, 3]``."""
    with Image.open(io.BytesIO(png)) as image:
        return np.asarray(image.convert("RGB").reduce(SIZE // THUMBNAIL))


def draw_all(
    icons: Sequence[Icon],
    cache: Path,
    *,
    workers: int = 2,
    track: Track = lambda items, _length, _what: items,
) -> tuple[list[bytes], np.ndarray]:
    """Return the PNG of every icon, in order, and their thumbnails, ``uint8 [N, 16, 16, 3]``.

    Each set has a file of its own in ``cache``, named by a digest of all its drawings, so an interrupted
    build resumes and a changed set is drawn again.

    Args:
        icons: Sorted by set.
        cache: Folder for what is drawn.
        workers: Number of processes.
        track: Wraps the loop over the drawings in a progress bar.
    """
    cache.mkdir(parents=True, exist_ok=True)
    pngs: list[bytes] = []
    thumbnails: list[np.ndarray] = []
    with ProcessPoolExecutor(max_workers=workers) as pool:
        drawings: Iterable[Drawing] = itertools.chain.from_iterable(_draw_sets(icons, cache, pool))
        for png, small in track(drawings, len(icons), "Drawing"):
            pngs.append(png)
            thumbnails.append(small)
    return pngs, np.stack(thumbnails)


def _draw_sets(icons: Sequence[Icon], cache: Path, pool: ProcessPoolExecutor) -> Iterator[Sequence[Drawing]]:
    for prefix, members in itertools.groupby(icons, key=lambda icon: icon.set):
        svgs = [icon.svg for icon in members]
        path = cache / f"{prefix}-{_digest(svgs)}.npz"
        if path.is_file():
            yield _load(path)
            continue
        done: list[Drawing] = []
        for chunk in pool.map(_draw_many, (svgs[i : i + _CHUNK] for i in range(0, len(svgs), _CHUNK))):
            done.extend(chunk)
            yield chunk
        _save(path, done)


def _draw_many(svgs: Sequence[str]) -> list[Drawing]:
    pngs = [rasterise(svg) for svg in svgs]
    return [(png, thumbnail(png)) for png in pngs]


def _digest(svgs: Sequence[str]) -> str:
    digest = hashlib.sha256(f"{SIZE} {THUMBNAIL}".encode())
    for svg in svgs:
        digest.update(svg.encode())
    return digest.hexdigest()[:16]


def _save(path: Path, drawings: Sequence[Drawing]) -> None:
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        np.savez(
            file,
            lengths=np.array([len(png) for png, _ in drawings]),
            data=np.frombuffer(b"".join(png for png, _ in drawings), dtype=np.uint8),
            thumbnails=np.stack([small for _, small in drawings]),
        )
    partial.replace(path)  # atomic, so an interrupted build leaves no half file


def _load(path: Path) -> list[Drawing]:
    with np.load(path) as stored:
        ends = np.cumsum(stored["lengths"]).tolist()
        data, thumbnails = stored["data"].tobytes(), stored["thumbnails"]
    starts = [0, *ends[:-1]]
    return [(data[start:end], small) for start, end, small in zip(starts, ends, thumbnails, strict=True)]
