"""The studies' data: splits hold out concepts, and a vendor's drawings are read from the icons' package."""

from __future__ import annotations

import io
import json
import tarfile
from types import SimpleNamespace as Namespace

import pytest
from studies.alignment.data import Splits
from studies.alignment.setting import Setting
from studies.data import drawings
from studies.data.drawings import split_emojis
from studies.data.sets import vendor
from studies.icons.records import Record


def test_a_split_is_made_when_it_is_trained_on():
    made = []

    class Made:
        def __init__(self, split):
            made.append(split)
            self.fingerprint = f"data of {split}"

    of = Splits(Made)
    settings = [Setting("clip", 1, "test", split=split) for split in (2, 2, 0)]
    assert [of.fingerprint(one) for one in settings] == ["data of 2", "data of 2", "data of 0"]
    assert made == [2, 0]


def test_splits_of_emojis_hold_out_other_concepts():
    sides = [split_emojis(split=split) for split in (0, 1)]
    tests = [{one.concept for one in of["test"]} for of in sides]
    assert len(tests[0] & tests[1]) < 0.4 * len(tests[0])
    for of in sides:
        concepts = [{one.concept for one in side} for side in of.values()]
        assert sum(map(len, concepts)) == len(set.union(*concepts))


def test_splits_of_icons_hold_out_other_concepts_once_each():
    parts = {"train": [], "validation": [], "test": []}
    for i in range(600):
        concept, part = f"c{i % 200}", ("test", "validation", *["train"] * 6)[i % 200 % 8]
        parts[part].append(Record(i, "set", f"n{i}", "", "", "", concept, (), (), part, "", i < 200, False))
    build = Namespace(part=lambda name: Namespace(records=parts[name]))
    tests = []
    for split in range(3):
        sides = drawings._split_icons(build, split)
        concepts = {side: {one.concept for one in of} for side, of in sides.items()}
        assert sum(map(len, concepts.values())) == len(set.union(*concepts.values())) == 200
        assert all(len(sides[side]) == len(concepts[side]) for side in ("dev", "test"))
        assert len(sides["train"]) == 3 * len(concepts["train"])
        tests.append(concepts["test"])
    assert 10 < len(tests[1]) < 60
    assert tests[1] != tests[2]
    assert tests[0] == {f"c{i}" for i in range(0, 200, 8)}


def test_a_vendors_concepts_are_on_one_side_only(tmp_path):
    names = [f"{colour}-{thing}" for colour in ("red", "blue", "green") for thing in map(chr, range(97, 117))]
    body = '<path d="M0 0h9v9z" fill="red"/>'
    content = {
        "info": {"name": "Made up"},
        "icons": {name: {"body": body} for name in [*names, "red-a-outline"]},
    }
    tarball = tmp_path / "package.tgz"
    with tarfile.open(tarball, "w:gz") as archive:
        packed = json.dumps(content).encode()
        member = tarfile.TarInfo("package/json/made-up.json")
        member.size = len(packed)
        archive.addfile(member, io.BytesIO(packed))
    source = vendor(tarball, "made-up", 0)
    captions = {side: {of[0] for of in texts} for side, texts in source.captions.items()}
    assert sum(map(len, captions.values())) == len(set.union(*captions.values())) == len(names)
    assert 5 < len(captions["test"]) < 30
    assert all(len(of) == 1 for side in ("dev", "test") for of in source.captions[side])
    assert len(source.pictures("test")) == len(source.captions["test"])
    assert source.captions != vendor(tarball, "made-up", 1).captions
    with pytest.raises(ValueError, match="no icon set 'absent'"):
        vendor(tarball, "absent", 0)
