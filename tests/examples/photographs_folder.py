"""A small folder laid out as Flickr8k is, of random pictures and sentences, and encoders of it."""

from __future__ import annotations

import dataclasses
import hashlib
import random

import numpy as np
import studies
from photostudy import command, features, folder
from photostudy.findings import PRIMARY, SECONDARY
from photostudy.measure import BOTH_WAYS
from PIL import Image

PICTURES = {"train": 24, "dev": 8, "test": 8}


def write_folder(root):
    """Write the folder, and return its expected contents."""
    rng = np.random.default_rng(0)
    texts, pictures = root / folder.TEXTS, root / folder.PICTURES
    texts.mkdir(parents=True)
    pictures.mkdir()
    names = {side: [f"{side}_{i}.jpg" for i in range(n)] for side, n in PICTURES.items()}
    described = [
        f"{name}#{i}\tsentence {i} of {name}" for of in names.values() for name in of for i in range(5)
    ]
    extra = [f"left_out.jpg.1#{i}\tof no split" for i in range(5)]
    test = names["test"]
    judged = [
        f"{picture}\t{other}#{i % 5}\t" + "\t".join(map(str, rng.integers(1, 5, 3)))
        for picture in test
        for i, other in enumerate(test)
    ]
    contents = {f"Flickr_8k.{side}Images.txt": of for side, of in names.items()}
    contents |= {folder.SENTENCES: described, folder.EXPERTS: judged}
    for name, lines in contents.items():
        more = extra if name == folder.SENTENCES else []
        (texts / name).write_text("".join(f"{line}\n" for line in [*lines, *more]), encoding="utf-8")
    for name in (name for of in names.values() for name in of):
        Image.fromarray(rng.integers(0, 256, (16, 20, 3), dtype=np.uint8)).save(pictures / name)
    hashes = {name: folder.digest(sorted(lines)) for name, lines in contents.items()}
    return folder.Expected(PICTURES, len(judged), hashes)


class Encoders:
    """Encoders that need no weights."""

    name = "made up"
    pictures_seen = 0

    def pictures(self, pictures):
        """Return a picture's first pixels."""
        self.pictures_seen += len(pictures)
        return np.stack([np.asarray(one, dtype=np.float32)[:2, :4].ravel() / 255 for one in pictures])

    def sentences(self, sentences):
        """Return numbers drawn by a sentence's hash."""
        seeds = (int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) for text in sentences)
        return np.stack([np.random.default_rng(seed).normal(size=12).astype(np.float32) for seed in seeds])


def filled(photographs, encoders=None):
    """Return the features of all pictures, computed."""
    encoders = encoders or Encoders()
    cache = features.Cache(photographs, encoders.name)
    for path, names in cache.missing(photographs.splits.values()):
        cache.fill(path, names, encoders)
    return cache


def finder(score):
    """Return a function that finds a record of every setting with a score; None is no record."""

    def metrics(one):
        found = score(one)
        return None if found is None else {"retrieval": {BOTH_WAYS: found}, "geometry": {"logit_scale": 9.0}}

    return studies.records(metrics)


def drawn(skip=lambda one: False):
    """Return a function that finds a record of random numbers of every setting but those to skip."""

    def metrics(one):
        if skip(one):
            return None
        rng = random.Random(repr(one))
        found = {"retrieval": {}, "people": {}, "geometry": {}}
        for measure in (PRIMARY, *SECONDARY):
            found[measure.task][measure.name] = rng.gauss(0, 1)
        return found

    return studies.records(metrics)


def primary(found, pair, seeds):
    """Return the primary measure of both arms of a comparison, seed by seed."""
    return [[PRIMARY(found.records[arm][seed]) for seed in seeds] for arm in pair]


def established(found, means):
    """Return the findings where the differences of these means are established, and there are no others."""
    differences = {}
    for ((arm, other), title), d in found.differences.items():
        value = means.get(arm, 0.0) - means.get(other, 0.0)
        differences[(arm, other), title] = dataclasses.replace(d, mean=value, adjusted=0.01 if value else 1.0)
    return dataclasses.replace(found, differences=differences)


def reported(part, store, folder):
    """Return what the command reports of a study's records in a folder without data."""
    arguments = ["--part", part, "--output", str(folder), "--report-only"]
    assert command.main(arguments) == 1  # there is no record
    results = folder / f"quick/results/part{part}"
    results.mkdir(parents=True)
    (results / "records.jsonl").write_bytes(store.path.read_bytes())
    assert command.main(arguments) == 0
    text = (folder / f"quick/report/part{part}.md").read_text(encoding="utf-8")
    assert "smoke test" in text
    return text


def read_folder(root):
    """Write the folder, and return it as the study reads it."""
    return folder.read(root, write_folder(root))
