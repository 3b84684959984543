"""The icons example: names, sets that may be used, the split, the files that are written, the loader."""

import dataclasses
import json
import random
import re
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import webdataset
import yaml
from clip_evaluation import datasets
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy
from icons_data import baseline, command, draw, labels, load, package, records, split, write
from icons_data.names import SKIN_TONE, Namer, concept_of
from miniature_icons import digests


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
SETS, NAMES = (
    yaml.safe_load(Path(__file__).with_name(table).read_text(encoding="utf-8"))
    for table in ("icons.yaml", "icon_names.yaml")
)
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
    command.build(output, tarball, workers=1, png=True)
    return output


@pytest.fixture(scope="module")
def data(built):
    return load.load(built)


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_caption_and_style(name):
    suffixes = {"24-filled": "24", "bold-duotone": "", "light": ""}
    parsed = Namer("some", NAMES, suffixes=suffixes)(name)
    said = [] if parsed is None else [word for word in (parsed.caption, parsed.style) if word]
    assert said == NAMES[name]


def test_style_prefixes():
    prefixes = ("baseline", "outline", "twotone")
    names = [f"{prefix}-home" for prefix in prefixes]
    found = list(map(Namer("ic", names, prefixes=prefixes), names))
    assert [(one.caption, one.style) for one in found] == [("home", s) for s in ("", "outline", "duotone")]


@given(st.permutations(["arrow", "up", "circles", "left"]), st.sampled_from(["", "2", "three", "alt"]))
def test_concept_has_no_order_number_or_plural(words, last):
    assert concept_of([*words, *([last] if last else [])]) == concept_of(["left", "circle", "arrows", "up"])


def test_concept_of_emojis_has_no_gender():
    people = (["man", "health", "worker"], ["health", "workers"])
    assert len({concept_of(words, emoji=True) for words in people}) == 1
    assert concept_of(["man"], emoji=True) == "man"
    assert concept_of(["man", "walking"]) != concept_of(["woman", "walking"])


def test_skin_tones():
    toned = ["wave-medium-dark-skin-tone", "wave-dark", "person-light-skin-tone-bald", "man-tone3"]
    assert [name for name in (*toned, "wave", "flashlight", "light-bulb") if SKIN_TONE.search(name)] == toned


def test_sets_that_may_not_be_used_are_left_out_and_the_reason_is_given():
    reasons = {prefix: package.reason_to_leave_out(prefix, one) for prefix, one in _sets().items()}
    assert {prefix: reason for prefix, reason in reasons.items() if reason is not None} == {
        "emojione-monotone": "of a vendor that is held out",
        "noto-v1": "reserved",
        "fxemoji": "reserved",
        "freeware": "licence CC-BY-NC-4.0",
        "copyleft": "licence GPL-3.0",
        "simple-icons": "logos or file types",
        "moving": "animated",
    }
    assert {prefix for prefix, reason in reasons.items() if reason is None} == USED
    for spdx in ("CC-BY-ND-4.0", "CC-BY-SA-4.0", "AGPL-3.0-only", "none", "Proprietary"):
        assert package.reason_to_leave_out("x", _set("x", ["a"], spdx=spdx)) == f"licence {spdx}"


def test_brands_are_what_two_lists_of_logos_know_and_no_emoji():
    sets = _sets()
    assert package.brand_names(sets) == {"acme"}
    sets["noto"]["icons"]["acme-anvil"] = {"body": ""}
    assert package.brand_names(sets) == set()


def test_icons_of_a_set():
    one = _set(
        "some",
        ["home-16", "home-24", "home-32", "gone", "logo-acme", "acme", "portal"],
        suffixes={"16": "", "24": "", "32": ""},
        aliases={"house-24": {"parent": "home-24"}, "turned": {"parent": "home-24", "rotate": 1}},
        categories={"Buildings": ["home-24"], "Logos": ["portal"]},
    )
    one["icons"]["gone"]["hidden"] = True
    (icon,) = package.icons_of("some", one, {"acme"})
    assert (icon.name, icon.caption) == ("home-24", "home")
    assert (icon.synonyms, icon.categories) == ((("house", "house"),), ("Buildings",))


def test_flags_and_skin_tones_of_emojis_are_left_out():
    assert {icon.name for icon in package.icons_of("noto", _sets()["noto"])} == set(FAMILIES["FACES"])


def test_a_wide_icon_is_centred_in_a_square():
    svg = package.square_svg({"height": 16}, {"body": "<path/>", "width": 32, "left": 4})
    assert 'viewBox="4 -8 32 32"' in svg
    body = '<rect x="0" y="0" width="32" height="16" fill="currentColor"/>'
    picture = draw.pixels(draw.rasterise(package.square_svg({}, {"body": body, "width": 32, "height": 16})))
    inked = (picture != 255).any(axis=(1, 2))
    assert picture.shape == (64, 64, 3)
    assert inked[17:47].all()
    assert not inked[[*range(15), *range(49, 64)]].any()


def _icons(names, prefix="mdi"):
    return list(package.icons_of(prefix, _set(prefix, names)))


def test_what_is_drawn_is_kept_and_a_changed_drawing_is_drawn_anew(tmp_path, monkeypatch):
    icons = [*_icons(["ant", "bee"], "mdi"), *_icons(["cat"], "tabler")]
    pngs, thumbnails = draw.draw_all(icons, tmp_path, workers=1)
    for png, small in zip(pngs, thumbnails, strict=True):
        exact = draw.pixels(png).reshape(16, 4, 16, 4, 3).mean(axis=(1, 3))
        assert np.abs(small - exact).max() <= 0.5

    asked = []
    monkeypatch.setattr(draw, "rasterise", lambda svg: asked.append(svg) or pngs[0])
    again, same = draw.draw_all(icons, tmp_path, workers=1)
    assert again == pngs
    assert (same == thumbnails).all()
    assert asked == []
    changed = dataclasses.replace(icons[2], svg=icons[0].svg)
    draw.draw_all([*icons[:2], changed], tmp_path, workers=1)
    assert asked == [changed.svg]


_THUMBNAILS = st.tuples(st.integers(2, 12), st.just(4), st.just(4), st.just(3))


@given(st_numpy.arrays(np.uint8, _THUMBNAILS, elements=st.integers(0, 9)), st.floats(0.5, 8))
def test_alike_pairs_are_all_pairs_that_are_close(thumbnails, limit):
    flat = thumbnails.reshape(len(thumbnails), -1).astype(float)
    distance = np.sqrt(((flat[:, None] - flat) ** 2).mean(axis=2)).astype(np.float32)
    expected = np.argwhere(np.triu(distance < limit, 1))
    assert split.alike_pairs(thumbnails, limit).tolist() == expected.tolist()


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    sets = _sets()
    icons = [icon for one in sorted(USED) for icon in package.icons_of(one, sets[one], {"acme"})]
    _, thumbnails = draw.draw_all(icons, tmp_path_factory.mktemp("cache"), workers=1)
    return icons, thumbnails


@pytest.mark.parametrize("seed", [0, 1, 2])
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


def test_the_split_depends_on_the_seed_and_on_nothing_else(drawn):
    icons, thumbnails = drawn
    made = split.split(icons, thumbnails)
    order = np.random.default_rng(0).permutation(len(icons))
    assert made.side == split.split([icons[i] for i in order], thumbnails[order]).side
    assert made.side != split.split(icons, thumbnails, seed=1).side
    counts = {s: list(made.side.values()).count(s) for s in split.SIDES}
    assert counts["train"] > counts["test"] > 0


def test_drawings_of_one_caption_are_kept_once(drawn):
    icons, thumbnails = drawn
    kept = {(icons[i].caption, icons[i].set) for i in split.split(icons, thumbnails).kept}
    # lucide's trash-2 is mdi's trash, drawn again; tabler's bin has a caption of its own.
    assert {pair for pair in kept if pair[0] in ("trash", "bin")} == {("trash", "lucide"), ("bin", "tabler")}


def test_blank_drawings_are_left_out():
    thumbnails = np.full((3, 16, 16, 3), 255, np.uint8)
    thumbnails[0, :8] = 0
    made = split.split(_icons(["ant", "bee", "cat"]), thumbnails)
    assert (made.kept, made.counts["blank"]) == ([0], 2)
    assert made.group == ["ant", "bee", "cat"]  # two blanks are not alike


def test_two_builds_are_byte_equal_and_a_complete_one_is_recognised(built, tarball, tmp_path):
    argv = ["--output", str(tmp_path), "--tarball", str(tarball), "--workers", "2", "--png"]
    assert command.main(argv) == 0
    assert digests(tmp_path) == digests(built)
    written = (tmp_path / "records.csv").stat().st_mtime_ns
    assert command.main(argv) == 0
    assert (tmp_path / "records.csv").stat().st_mtime_ns == written
    for png in (True, False):
        assert command.is_complete(built, tarball, seed=0, png=png)
        assert not command.is_complete(built.parent, tarball, seed=0, png=png)
    assert not command.is_complete(built, tarball, seed=1, png=False)


def test_an_interrupted_build_leaves_drawings_and_no_manifest(tarball, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(write, "shards", fail)
        with pytest.raises(OSError, match="disk full"):
            command.build(tmp_path, tarball, workers=1)
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]
    monkeypatch.setattr(draw, "rasterise", fail)
    command.build(tmp_path, tarball, workers=1)
    assert (tmp_path / "manifest.json").is_file()


def test_the_command_reports_mistakes(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(package.shutil, "which", lambda name: None)
    assert command.main(["--output", str(tmp_path / "other")]) == 1
    assert "--tarball" in capsys.readouterr().out
    (tmp_path / "iconify-json-9.9.9.tgz").touch()
    assert package.fetch(tmp_path, "9.9.9") == tmp_path / "iconify-json-9.9.9.tgz"
    with pytest.raises(SystemExit):
        command.main(["--tarball", str(tmp_path / "missing.tgz")])
    with pytest.raises(ValueError, match="no icon sets"):
        package.read(_pack(tmp_path, {}))


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


def test_the_card_states_counts_and_chance(data, built):
    rows = _rows(built / "DATA_CARD.md")
    assert rows["train"][0] == str(len(data.part("train").records))
    assert rows["noto/test"][0] == str(len(data.retrieval("noto/test").images))
    assert (rows["mdi"][0], rows["mdi"][4]) == ("2", "50.0/100.0/100.0")


def test_sides_share_no_concept_no_caption_and_no_drawing(data):
    concepts, others = {}, {}
    for record, picture in zip(data.records, data.images, strict=True):
        assert concepts.setdefault(record.concept, record.side) == record.side
        for own in (*record.captions, picture.tobytes()):
            assert others.setdefault(own, record.side) == record.side
    assert set(concepts.values()) == set(split.SIDES)


def test_shifts_are_in_parts_of_their_own(data):
    assert data.shifts == ["pixel-art", "noto"]
    for name in data.manifest["ranges"]:
        part = data.part(name)
        shift, _, side = name.rpartition("/")
        kinds = {(r.shift, r.side, r.set in ("pixel", "noto")) for r in part.records}
        assert kinds == {(shift, side, bool(shift))}
        assert len(part.images) == len(part.records) == len(part.texts)
    with pytest.raises(KeyError, match="no part 'holdout'; there are train, "):
        data.part("holdout")


def test_the_loader_returns_what_was_drawn_and_written(built, data, tmp_path):
    sets = _sets()
    assert isinstance(data.images, np.memmap)
    icons = {(one, icon.name): icon for one in USED for icon in package.icons_of(one, sets[one])}
    for record in data.records[::7]:
        icon = icons[record.set, record.name]
        assert (data.images[record.index] == draw.pixels(draw.rasterise(icon.svg))).all()
        assert (record.caption, record.text) == (icon.caption, records.training_text(icon))
    records.write_table(tmp_path / "records.csv", data.records)
    assert records.read_table(tmp_path / "records.csv") == data.records
    with pytest.raises(FileNotFoundError, match="no finished build"):
        load.load(built.parent)


def test_retrieval_has_one_picture_for_each_concept_and_every_caption(data):
    found = data.retrieval("test")
    chosen = [data.records[i] for i in found.index]
    assert len(found.images) == len({record.concept for record in chosen})
    assert {record.concept for record in chosen} == {r.concept for r in data.part("test").records}
    assert found.captions == [caption for record in chosen for caption in record.captions]
    assert [chosen[i].concept for i in found.image_of] == [r.concept for r in chosen for _ in r.captions]
    assert len(set(found.captions)) == len(found.captions)
    assert any(r.captions == ("lock open", "lock shackle") for r in data.records)
    assert len(data.retrieval("noto/test").images) > 0
    with pytest.raises(ValueError, match="in their test part only"):
        data.retrieval("noto/train")


def test_training_texts_are_templates_of_captions_and_styles(data):
    for record in data.records:
        words = (record.caption, f"{record.caption}, {record.style}")
        assert record.text in {template.format(w) for template in labels.TEMPLATES for w in words}
    assert any(record.style and record.style in record.text for record in data.records)


def test_labelled_sets(data):
    mdi = data.labelled["mdi"]
    assert (mdi.classes, mdi.templates) == (["animal and pet", "tools"], list(labels.TEMPLATES))
    for side in split.SIDES:
        items = mdi.side(side)
        for index, label in zip(items.index, items.labels, strict=True):
            record = data.records[index]
            assert (record.set, record.side) == ("mdi", side)
            assert labels.class_name(record.categories[0]) == mdi.classes[label]
        assert (items.images == data.images[items.index]).all()
    assert len(mdi.train.labels) > len(mdi.test.labels) > 0


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize("side", split.SIDES)
def test_shards_hold_pictures_and_texts(built, data, side):
    samples = list(webdataset.WebDataset(str(built / f"shards/{side}-0000.tar"), shardshuffle=False))
    part = data.part(side)
    captions = [record.caption for record in part.records]
    assert [one["txt"].decode() for one in samples] == (part.texts if side == "train" else captions)
    assert (np.stack([draw.pixels(one["png"]) for one in samples]) == part.images).all()


def test_the_evaluation_reads_benchmark_and_tables(built, data):
    train, test, items, mdi = data.part("train"), data.part("test"), data.retrieval(), data.labelled["mdi"]
    for source, images, targets in (
        ("train.csv", train.images, [[text] for text in train.texts]),
        ("test.csv", test.images, [[record.caption] for record in test.records]),
        ("benchmark/retrieval", items.images, [list(data.records[i].captions) for i in items.index]),
        ("benchmark/mdi", mdi.test.images, mdi.test.labels.tolist()),
    ):
        found = datasets.load(str(built / source), "test", np.asarray)
        pictures, read = zip(*found.images, strict=True)
        assert (np.stack(pictures) == images).all()
        assert list(read) == targets
    assert found.classes == mdi.classes
    assert "{c} icon" in found.templates


def test_raw_pixels_find_what_they_have_seen():
    # Held-out pictures that repeat training pictures get their captions and classes.
    base = np.random.default_rng(0).integers(0, 255, (6, 16, 16, 3)).astype(np.uint8)
    thumbnails = np.concatenate([base, base])
    captions = ["red ant", "red bee", "big cat", "big dog", "old elk", "old fox"]
    rows = [
        SimpleNamespace(index=i, caption=captions[i % 6], captions=captions[i % 6 :][:1], retrieval=i > 5)
        for i in range(12)
    ]
    (row,) = baseline.retrieval(rows, thumbnails, {"train": (0, 6), "test": (6, 12)})
    assert row["alike"] == {8: 100.0, 16: 100.0}
    assert row["chance"]["image_to_text"][1] == pytest.approx(100 / 6)
    # Five of six neighbours lend their words, the nearest among them; all captions but one score alike.
    assert row["knn"]["image_to_text"][5] > row["chance"]["image_to_text"][5]
    index = {"train": [0, 1, 2, 3, 4, 5], "test": [6, 7, 8], "validation": []}
    label = {"train": [0, 0, 0, 1, 1, 1], "test": [0, 0, 1], "validation": []}
    (row,) = baseline.classification([labels.Labelled("mdi", "", ["a", "b"], index, label)], thumbnails)
    assert row["majority"] == pytest.approx(200 / 3)
    assert row["chance"] == {1: 50.0, 3: 100.0, 5: 100.0}
