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


def _icon_set(prefix, names, spdx="MIT", category="General", palette=False, tags=(), redrawn=None, **more):
    """A set of Iconify; icons that are ``redrawn`` look like icons of the set ``mdi``, by their names."""
    info = {"name": f"Set {prefix}", "category": category, "palette": palette, "tags": tags}
    info["author"] = {"name": f"Maker of {prefix}", "url": f"https://example.org/{prefix}"}
    info["license"] = {"spdx": spdx}
    drawings = {name: f"{prefix}/{name}" for name in _expanded(names)}
    drawings |= {name: f"mdi/{original}" for name, original in (redrawn or {}).items()}
    icons = {name: {"body": _drawing(key)} for name, key in drawings.items()}  # one key, one drawing
    return {"prefix": prefix, "info": info, "icons": icons, "width": 24, "height": 24, **more}


# Names of forty icons each, such as "animalba" of "animals"; women have faces' names with a beginning.
FAMILIES = {
    kind.upper(): [f"{kind[:-1]}{a}{b}" for a in "bcdfghjk" for b in "aeiou"]
    for kind in ("animals", "tools", "faces")
}
FAMILIES["WOMEN"] = [f"woman-{name}" for name in FAMILIES["FACES"][:20]]
SETS = yaml.safe_load(Path(__file__).with_name("icons.yaml").read_text(encoding="utf-8"))
USED = {"mdi", "tabler", "lucide", "pixel", "noto", "twemoji"}


def _expanded(names):
    """Names, where a family stands for all of its names, and ``FAMILY-end`` for all of them with the end."""
    for name in names:
        family, dash, style = name.partition("-")
        if family in FAMILIES:
            yield from (f"{member}{dash}{style}" for member in FAMILIES[family])
        else:
            yield name


def _sets():
    """The sets of ``icons.yaml``, as Iconify has them."""
    sets = {prefix: _icon_set(prefix, **about) for prefix, about in SETS.items()}
    categories = sets["mdi"]["categories"]
    for category, names in categories.items():
        categories[category] = list(_expanded(names))
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
    """Make classes of few icons: the real thresholds are for thousands of concepts."""
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
    """The icons of the sets that may be used, and their drawings."""
    sets = _sets()
    icons = [icon for one in sorted(USED) for icon in package.icons_of(one, sets[one], {"acme"})]
    _, thumbnails = draw.draw_all(icons, tmp_path_factory.mktemp("cache"), workers=1)
    return icons, thumbnails


every_seed = pytest.mark.parametrize("seed", [0, 1])


def sides_of(icons, made):
    """Each icon with its side: a split has a group for each icon, and a side for each group."""
    return zip(icons, (made.side[group] for group in made.group), strict=True)


@every_seed
def test_no_drawings_that_look_alike_are_on_two_sides(drawn, seed):
    icons, thumbnails = drawn
    sides = [side for _, side in sides_of(icons, split.split(icons, thumbnails, seed=seed))]
    alike = list(split.alike_pairs(thumbnails))
    assert alike, "icons.yaml has some"
    for a, b in alike:
        assert sides[a] == sides[b]


@every_seed
def test_no_concept_or_synonym_is_on_two_sides(drawn, seed):
    icons, thumbnails = drawn
    side_of = {}
    for icon, side in sides_of(icons, split.split(icons, thumbnails, seed=seed)):
        for concept in (icon.concept, *(synonym for _, synonym in icon.synonyms)):
            assert side_of.setdefault(concept, side) == side


@every_seed
def test_concepts_of_drawings_that_look_alike_are_one_group(drawn, seed):
    icons, thumbnails = drawn
    made = split.split(icons, thumbnails, seed=seed)
    group = {icon.concept: name for icon, name in zip(icons, made.group, strict=True)}
    assert group["trash"] == group["bin"]  # which icons.yaml draws alike
    assert made.counts["alike_pairs_of_different_concepts"] >= 1


def test_blank_drawings_are_counted_apart_and_join_nothing(drawn):
    icons, thumbnails = drawn
    blank = np.full_like(thumbnails, 255)
    made = split.split(icons, blank)
    assert made.counts["blank"] == len(icons)
    assert made.counts["alike_pairs"] == made.counts["alike_pairs_of_different_concepts"] == 0
    group = {icon.concept: name for icon, name in zip(icons, made.group, strict=True)}
    assert group["trash"] != group["bin"]


def _rows(path):
    """The cells of the rows of a file's tables, by the first cell."""
    lines = [line.strip("| ") for line in path.read_text(encoding="utf-8").splitlines() if line[:1] == "|"]
    rows = [re.split(r" *\| *", line) for line in lines]
    return {first: others for first, *others in rows}


def test_only_sets_that_may_be_used_are_used(data):
    assert {record.set for record in data.records} == USED
    assert not any(record.caption.startswith(("reserved", "forbidden", "acme")) for record in data.records)


def test_every_maker_is_named_with_the_number_of_icons_and_their_licence(built, data):
    counts = Counter(record.set for record in data.records)
    named = {key: row for key, row in _rows(built / "ATTRIBUTIONS.md").items() if key.startswith("[")}
    assert named == {
        f"[Set {name}](https://example.org/{name}) (`{name}`)": [
            f"Maker of {name}",
            str(count),
            SETS[name].get("spdx", "MIT"),
        ]
        for name, count in counts.items()
    }


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # webdataset leaves its files to the collector
def test_shards_hold_pictures_and_texts(built, data):
    train, test = data.part("train"), data.part("test")
    for name, images, texts in (
        ("shards/train-0000.tar", train.images, train.texts),
        ("shards/test-0000.tar", test.images, [record.caption for record in test.records]),
    ):
        samples = list(webdataset.WebDataset(str(built / name), shardshuffle=False))
        assert [sample["txt"].decode() for sample in samples] == texts
        assert (np.stack([draw.pixels(sample["png"]) for sample in samples]) == images).all()
