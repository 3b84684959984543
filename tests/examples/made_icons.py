"""A finished build of the icons, small and made up: for what only reads one."""

import itertools
import json
import random
from pathlib import Path

import numpy as np
from studies.icons import labels, write
from studies.icons.records import Record, write_table

ADJECTIVES = ("big", "small", "left", "right", "open", "round", "double", "broken")
NOUNS = ("arrow", "heart", "house", "cloud", "lock", "star", "tree", "wheel")
CLASSES = ("shapes", "things")


def drawing(key: str, colour: tuple[int, int, int] = (0, 0, 0)) -> np.ndarray:
    """Some bars that nothing else looks like, ``uint8 [64, 64, 3]``."""
    rng = random.Random(key)
    picture = np.full((64, 64, 3), 255, dtype=np.uint8)
    for row in range(4, 60, 8):
        start = rng.randint(2, 40)
        picture[row : row + 4, start : start + rng.randint(4, 20)] = colour
    return picture


def write_icons(folder: Path, *, train: int = 96, validation: int = 8, test: int = 24) -> Path:
    """Write what ``studies.icons.load.load`` reads: one trained set, one shift, a labelled set of each."""
    folder.mkdir(parents=True)
    records, images, ranges = [], [], {}
    counts = {"train": train, "validation": validation, "test": test}
    for shift, side in itertools.product(("", "noto"), counts):
        start = len(records)
        for number in range(counts[side]):
            index, key = len(records), f"{shift}/{side}/{number}"
            rng = random.Random(key)
            words = f"{rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}"
            images.append(drawing(key, (200, 40, 40) if number % 2 else (0, 0, 0)))
            records.append(
                Record(
                    index=index,
                    set=shift or "mdi",
                    name=f"icon-{index}",
                    caption=words,
                    text=f"an icon of {words}",
                    style="outline" if number % 3 == 0 else "",
                    concept=f"{words} {side}",
                    synonyms=(f"other {words}",) if number % 4 == 0 and side == "test" else (),
                    categories=(CLASSES[number % 2],),
                    side=side,
                    shift=shift,
                    retrieval=side == "test" or (side == "validation" and not shift),
                    palette=bool(number % 2),
                )
            )
        ranges[f"{shift}/{side}" if shift else side] = (start, len(records))
    np.save(folder / "images.npy", np.stack(images))
    write_table(folder / "records.csv", records)
    labelled = labels.build(records, [record.side for record in records])
    write.labels(folder / "labels", labelled)
    manifest = {"ranges": ranges, "labelled": [one.name for one in labelled], "tarball": "0" * 64}
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    return folder
