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


def test_a_split_is_made_once_when_it_is_first_needed():
    made = []

    class Made:
        def __init__(self, split):
            made.append(split)
            self.fingerprint = f"data of {split}"

    splits = Splits(Made)
    settings = [Setting("clip", seed=1, side="test", split=split) for split in (2, 2, 0)]
    assert [splits.fingerprint(setting) for setting in settings] == ["data of 2", "data of 2", "data of 0"]
    assert made == [2, 0]


def assert_no_concept_is_on_two_sides(concepts_of_sides):
    """Assert that the sides' sets of concepts are disjoint."""
    everywhere = set.union(*concepts_of_sides)
    assert sum(map(len, concepts_of_sides)) == len(everywhere)


@pytest.mark.parametrize("split", [0, 1])
def test_no_concept_of_emojis_is_on_two_sides_of_a_split(split):
    sides = split_emojis(split=split).values()
    assert_no_concept_is_on_two_sides([{emoji.concept for emoji in side} for side in sides])


def test_splits_of_emojis_hold_out_other_concepts():
    """Of the first split's held-out concepts the second may draw some again: a fifth by chance."""
    first, second = ({emoji.concept for emoji in split_emojis(split=split)["test"]} for split in (0, 1))
    by_chance = 0.2  # the share of concepts that a split holds out
    assert len(first & second) < 2 * by_chance * len(first)


CONCEPTS = 200


@pytest.fixture
def icons():
    """A build of three icons of each concept; of eight concepts one is tested and one validates."""
    parts = {"train": [], "validation": [], "test": []}
    names = ("test", "validation", *["train"] * 6)
    for i in range(3 * CONCEPTS):
        concept = i % CONCEPTS
        part, is_first = names[concept % len(names)], i < CONCEPTS
        icon = Record(
            index=i,
            set="set",
            name=f"n{i}",
            caption="",
            text="",
            style="",
            concept=f"c{concept}",
            synonyms=(),
            categories=(),
            side=part,
            shift="",
            retrieval=is_first,
            palette=False,
        )
        parts[part].append(icon)
    return Namespace(part=lambda name: Namespace(records=parts[name]))


def concepts_of(icons, split):
    """The concepts of each side of a split."""
    sides = drawings._split_icons(icons, split)
    return {side: {icon.concept for icon in of_side} for side, of_side in sides.items()}


@pytest.mark.parametrize("split", range(3))
def test_no_concept_of_icons_is_on_two_sides_of_a_split_and_none_is_lost(icons, split):
    concepts = concepts_of(icons, split).values()
    assert_no_concept_is_on_two_sides(concepts)
    assert len(set.union(*concepts)) == CONCEPTS


@pytest.mark.parametrize("split", range(3))
def test_all_icons_of_a_concept_are_trained_on_and_one_is_held_out(icons, split):
    sides, concepts = drawings._split_icons(icons, split), concepts_of(icons, split)
    icons_of_a_concept = {side: len(sides[side]) / len(concepts[side]) for side in sides}
    assert icons_of_a_concept == {"train": 3, "dev": 1, "test": 1}


def test_the_first_split_of_icons_is_the_builds_own_and_the_others_hold_out_other_concepts(icons):
    own, second, third = (concepts_of(icons, split)["test"] for split in range(3))
    assert own == {f"c{number}" for number in range(0, CONCEPTS, 8)}
    assert 10 < len(second) < 60  # the build's own has 25; other splits draw the side of each concept
    assert second != third


COLOURS, THINGS = ("red", "blue", "green"), "abcdefghijklmnopqrst"


@pytest.fixture(scope="module")
def tarball(tmp_path_factory):
    """A package as npm makes it: a vendor's drawings of each thing in each colour, one in two styles."""
    names = [f"{colour}-{thing}" for colour in COLOURS for thing in THINGS]
    drawing = {"body": '<path d="M0 0h9v9z" fill="red"/>'}
    icons = dict.fromkeys([*names, "red-a-outline"], drawing)
    packed = json.dumps({"info": {"name": "Made up"}, "icons": icons}).encode()
    path = tmp_path_factory.mktemp("vendor") / "package.tgz"
    with tarfile.open(path, "w:gz") as archive:
        member = tarfile.TarInfo("package/json/made-up.json")
        member.size = len(packed)
        archive.addfile(member, io.BytesIO(packed))
    return path


def test_a_vendors_concepts_are_on_one_side_only(tarball):
    sides = vendor(tarball, "made-up", 0).captions
    first_captions = {side: {captions[0] for captions in texts} for side, texts in sides.items()}
    assert_no_concept_is_on_two_sides(first_captions.values())
    assert len(set.union(*first_captions.values())) == len(COLOURS) * len(THINGS)
    assert 5 < len(first_captions["test"]) < 30  # of the 60: each thing's side is drawn


def test_a_held_out_drawing_of_a_vendor_has_one_caption_and_a_picture(tarball):
    source = vendor(tarball, "made-up", 0)
    for side in ("dev", "test"):
        assert {len(captions) for captions in source.captions[side]} == {1}
    assert len(source.pictures("test")) == len(source.captions["test"])


def test_another_split_of_a_vendor_has_other_captions_on_its_sides(tarball):
    assert vendor(tarball, "made-up", 0).captions != vendor(tarball, "made-up", 1).captions


def test_a_vendor_that_the_package_has_not_is_refused(tarball):
    with pytest.raises(ValueError, match="no icon set 'absent'"):
        vendor(tarball, "absent", 0)
