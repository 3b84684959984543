"""The icons example: names, sets that may be used, the split, the files that are written, the loader."""

import json
import random
import re
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import webdataset
import yaml
from studies.icons import command, draw, labels, load, package, split


def _drawing(key: str) -> str:
    """A body that nothing else looks like: eight bars, drawn from the key."""
    rng = random.Random(key)
    bars = ((rng.randint(0, 18), 3 * i, rng.randint(2, 6)) for i in range(8))
    drawn = "".join(f'<rect x="{x}" y="{y}" width="{width}" height="2"/>' for x, y, width in bars)
    return f'<g fill="currentColor">{drawn}</g>'


def _set(prefix, names, spdx="MIT", category="General", palette=False, tags=(), redrawn=None, **more):
    info = {"name": f"Set {prefix}", "category": category, "palette": palette, "tags": tags}
    info["author"] = {"name": f"Maker of {prefix}", "url": f"https://example.org/{prefix}"}
    info["license"] = {"spdx": spdx}
    drawings = {name: f"{prefix}/{name}" for name in _expanded(names)}
    drawings |= {name: f"mdi/{other}" for name, other in (redrawn or {}).items()}
    icons = {name: {"body": _drawing(key)} for name, key in drawings.items()}
    return {"prefix": prefix, "info": info, "icons": icons, "width": 24, "height": 24, **more}


FAMILIES = {
    kind.upper(): [f"{kind[:-1]}{a}{b}" for a in "bcdfghjk" for b in "aeiou"]
    for kind in ("animals", "tools", "faces")
}
FAMILIES["WOMEN"] = [f"woman-{name}" for name in FAMILIES["FACES"][:20]]
SETS = yaml.safe_load(Path(__file__).with_name("icons.yaml").read_text(encoding="utf-8"))
USED = {"mdi", "tabler", "lucide", "pixel", "noto", "twemoji"}


def _expanded(names):
    for name in names:
        family, _, style = name.partition("-")
        members = FAMILIES.get(family, [name])
        yield from (f"{member}-{style}" if style and family in FAMILIES else member for member in members)


def _sets():
    sets = {prefix: _set(prefix, **one) for prefix, one in SETS.items()}
    categories = sets["mdi"]["categories"]
    categories |= {category: list(_expanded(names)) for category, names in categories.items()}
    return sets


def _pack(folder, sets):
    """A tarball as npm makes it."""
    (folder / "package" / "json").mkdir(parents=True)
    (folder / "package" / "package.json").write_text('{"version": "1.2.3"}')
    for prefix, data in sets.items():
        (folder / "package" / "json" / f"{prefix}.json").write_text(json.dumps(data))
    return Path(shutil.make_archive(str(folder / "iconify"), "gztar", folder, "package"))


@pytest.fixture(scope="module", autouse=True)
def low_thresholds():
    """The real ones are for thousands of concepts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(labels, "_MIN_TRAIN", 3)
        patch.setattr(labels, "_MIN_TEST", 1)
        yield


@pytest.fixture(scope="module")
def tarball(tmp_path_factory):
    return _pack(tmp_path_factory.mktemp("package"), _sets())


@pytest.fixture(scope="module")
def built(tarball, tmp_path_factory, low_thresholds):
    output = tmp_path_factory.mktemp("icons")
    command.build(output, tarball, workers=1)
    return output


@pytest.fixture(scope="module")
def data(built):
    return load.load(built)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    sets = _sets()
    icons = [icon for one in sorted(USED) for icon in package.icons_of(one, sets[one], {"acme"})]
    _, thumbnails = draw.draw_all(icons, tmp_path_factory.mktemp("cache"), workers=1)
    return icons, thumbnails


@pytest.mark.parametrize("seed", [0, 1])
def test_nothing_alike_is_on_two_sides(drawn, seed):
    icons, thumbnails = drawn
    made = split.split(icons, thumbnails, seed=seed)
    side = [made.side[group] for group in made.group]
    for a, b in split.alike_pairs(thumbnails):
        assert side[a] == side[b]
    of_concept = {}
    for icon, own in zip(icons, side, strict=True):
        for concept in (icon.concept, *(concept for _, concept in icon.synonyms)):
            assert of_concept.setdefault(concept, own) == own
    # By drawing (trash, bin) and by alias (lock open, lock shackle).
    group = {icon.concept: name for icon, name in zip(icons, made.group, strict=True)}
    assert group["trash"] == group["bin"]
    assert made.counts["alike_pairs_of_different_concepts"] >= 1


def _rows(path):
    lines = (line.strip("| ") for line in path.read_text(encoding="utf-8").splitlines() if line[:1] == "|")
    return {row[0]: row[1:] for row in (re.split(r" *\| *", line) for line in lines)}


def test_only_what_may_be_used_is_used_and_everybody_is_named(built, data):
    used = Counter(record.set for record in data.records)
    assert used.keys() == USED
    named = {key: row for key, row in _rows(built / "ATTRIBUTIONS.md").items() if key.startswith("[")}
    assert named == {
        f"[Set {s}](https://example.org/{s}) (`{s}`)": [f"Maker of {s}", str(n), SETS[s].get("spdx", "MIT")]
        for s, n in used.items()
    }
    assert not any(record.caption.startswith(("reserved", "forbidden", "acme")) for record in data.records)


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_shards_hold_pictures_and_texts(built, data):
    train, test = data.part("train"), data.part("test")
    for name, images, kind, targets in (
        ("shards/train-0000.tar", train.images, "txt", train.texts),
        ("shards/test-0000.tar", test.images, "txt", [record.caption for record in test.records]),
    ):
        samples = list(webdataset.WebDataset(str(built / name), shardshuffle=False))
        assert [one[kind].decode() for one in samples] == targets
        assert (np.stack([draw.pixels(one["png"]) for one in samples]) == images).all()
