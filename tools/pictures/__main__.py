"""Draws the pictures of the documents, each in a light and in a dark version: ``python tools/pictures``."""

from __future__ import annotations

import argparse
from pathlib import Path

import alignment
import cost
import gains
import method
import pairs
import schedules
import spread
import style
import watch
import ways

PICTURES = {
    "method": method.draw,
    "schedules": schedules.draw,
    "cost": cost.draw_bars,
    "gains": gains.draw,
    "watch": watch.draw,
    "spread": spread.draw,
    "alignment": alignment.draw,
    "ways": ways.draw,
    "pairs": pairs.draw,
}


def main() -> None:
    """Draw all pictures into a folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[2] / "docs/assets")
    output = parser.parse_args().output
    output.mkdir(parents=True, exist_ok=True)
    for name, draw in PICTURES.items():
        for theme in style.THEMES:
            path = output / f"{name}-{theme}.svg"
            style.save(draw, theme, path)
            print(f"{path}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
