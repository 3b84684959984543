"""Reads the icon sets of npm's ``@iconify/json`` and chooses the ones to use."""

import dataclasses
import json
import re
import shutil
import subprocess
import tarfile
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from . import SETS
from .names import SKIN_TONE, Name, Namer

PACKAGE = "@iconify/json"
VERSION = "2.2.535"  # the figures in the README are of this version

LICENCES, RESERVED = SETS["licences"], SETS["reserved"]
_ANIMATED = "Contains Animations"  # the first frame may be empty

_PROPER_CATEGORY = re.compile(r"\b(brands?|logos?|flags?|social media|social network)\b", re.IGNORECASE)
_COUNTRY_FLAG = re.compile(r"flag-(for-)?(flag-)?")
_BRAND_PREFIX = re.compile(r"(?:brand|logo)-(.+)")


@dataclasses.dataclass(frozen=True)
class IconSet:
    """One icon set, with what its licence asks for."""

    prefix: str  # its name in Iconify, such as mdi
    title: str
    authors: str
    url: str
    licence: str  # SPDX identifier
    licence_url: str
    palette: bool  # whether the icons have colours of their own; others are drawn in black
    emoji: bool


@dataclasses.dataclass(frozen=True)
class Icon(Name):
    """One drawing with its words."""

    set: str  # the prefix of its set
    name: str  # in that set
    synonyms: tuple[tuple[str, str], ...]  # captions of its other names, with the concept of each
    categories: tuple[str, ...]  # of its set
    svg: str  # the drawing, in a square


def fetch(folder: Path) -> Path:
    """Download the package with npm, unless ``folder`` has it already, and return the tarball.

    Raises:
        RuntimeError: If npm is not there, or fails.
    """
    tarball = folder / f"iconify-json-{VERSION}.tgz"
    if tarball.is_file():
        return tarball
    npm = shutil.which("npm")
    if npm is None:
        raise RuntimeError(
            f"npm was not found: install it, or fetch {PACKAGE} in another way and give its file as --tarball"
        )
    folder.mkdir(parents=True, exist_ok=True)
    command = [npm, "pack", f"{PACKAGE}@{VERSION}", "--ignore-scripts", "--pack-destination", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0 or not tarball.is_file():
        raise RuntimeError(f"npm pack {PACKAGE}@{VERSION} failed:\n{done.stderr.strip()}")
    return tarball


def read(tarball: Path) -> tuple[str, dict[str, dict[str, Any]]]:
    """Return the package's version and every icon set in it, as its JSON says.

    Raises:
        ValueError: If the tarball holds no icon set.
    """
    version, sets = "", {}
    with tarfile.open(tarball, "r:gz") as archive:
        for member in archive:
            path = Path(member.name)
            if path.parts[1:] == ("package.json",):
                version = str(json.load(archive.extractfile(member))["version"])
            elif path.parts[1:-1] == ("json",) and path.suffix == ".json":
                sets[path.stem] = json.load(archive.extractfile(member))
    if not sets:
        raise ValueError(f"{tarball} holds no icon sets (no json/*.json in its top folder)")
    return version, dict(sorted(sets.items()))


def reason_to_leave_out(prefix: str, data: Mapping[str, Any]) -> str | None:
    """Say why a set is not used, or None if it is."""
    info = data["info"]
    spdx = (info.get("license") or {}).get("spdx", "none")
    logos = info.get("category") in SETS["categories_of_logos"] and prefix not in SETS["not_logos"]
    rules = (
        (prefix in RESERVED, "reserved"),
        (prefix in SETS["of_a_shift"], "of a vendor that is held out"),
        (spdx not in LICENCES, f"licence {spdx}"),
        (logos, "logos or file types"),
        (prefix in SETS["proper_names"], "proper names or codes"),
        (prefix in SETS["twins"], "another edition of a set that is used"),
        (prefix in SETS["run_together"], "names are not split into words"),
        (_ANIMATED in info.get("tags", ()), "animated"),
        (not data["icons"], "empty"),
    )
    return next((reason for applies, reason in rules if applies), None)


def describe(prefix: str, data: Mapping[str, Any]) -> IconSet:
    """Describe a set."""
    info = data["info"]
    author, licence = info.get("author") or {}, info.get("license") or {}
    return IconSet(
        prefix=prefix,
        title=info["name"],
        authors=author.get("name", "unknown"),
        url=author.get("url", ""),
        licence=licence.get("spdx", "none"),
        licence_url=licence.get("url", ""),
        palette=bool(info.get("palette", False)),
        emoji=info.get("category") == "Emoji" or prefix in SETS["emoji_sets"],
    )


def brand_names(sets: Mapping[str, Mapping[str, Any]]) -> set[str]:
    """Return the names of brands: those that two or more lists of logos know, unless an emoji has the word.

    Collections of pictograms hold logos that nothing marks as such. Lists of logos hold words such as
    "apple", "link" and "signal" that are brands, too; the names of the emojis tell them apart.
    """
    lists: dict[str, set[str]] = defaultdict(set)
    plain: set[str] = set()
    for prefix, data in sets.items():
        for name in data["icons"]:
            if prefix in SETS["brand_sets"]:
                lists[prefix].add(name)
            elif match := _BRAND_PREFIX.fullmatch(name):
                lists[prefix].add(match[1])
        for category, names in data.get("categories", {}).items():
            if _PROPER_CATEGORY.search(category) and "flag" not in category.lower():
                lists[prefix].update(names)
        if describe(prefix, data).emoji and prefix not in RESERVED:
            plain.update(word for name in data["icons"] for word in name.split("-"))
    counts: Counter[str] = Counter()
    for prefix, names in lists.items():
        namer = Namer(prefix, names)
        counts.update({parsed.caption for name in names if (parsed := namer(name)) is not None})
    return {caption for caption, n in counts.items() if n >= 2 and not plain.issuperset(caption.split())}


def icons_of(
    prefix: str, data: Mapping[str, Any], brands: set[str] | frozenset[str] = frozenset()
) -> Iterator[Icon]:
    """Yield the icons of a set that are used, one for each name and style, in the order of the file.

    Left out are icons that the set has withdrawn, logos, flags of countries, emojis with a skin tone, and
    of the sizes of one drawing all but the one nearest to 24 pixels.
    """
    about = describe(prefix, data)
    names = data["icons"]
    namer = Namer(
        prefix, names, suffixes=data.get("suffixes", ()), prefixes=data.get("prefixes", ()), emoji=about.emoji
    )
    categories, aliases = defaultdict[str, list[str]](list), defaultdict[str, list[str]](list)
    for category, members in data.get("categories", {}).items():
        for name in members:
            categories[name].append(" ".join(category.split()))
    for name, alias in data.get("aliases", {}).items():
        if set(alias) == {"parent"} and prefix not in SETS["aliases_are_codes"]:  # not turned or mirrored
            aliases[alias["parent"]].append(name)

    best: dict[tuple[str, str], tuple[int, Icon]] = {}
    for name, drawing in names.items():
        words = set(name.split("-"))
        if (
            drawing.get("hidden")
            or not words.isdisjoint(SETS["logo_words"])
            or any(_PROPER_CATEGORY.search(category) for category in categories[name])
            or (about.emoji and (SKIN_TONE.search(name) or _COUNTRY_FLAG.match(name)))
        ):
            continue
        parsed = namer(name)
        if parsed is None or parsed.caption in brands:
            continue
        others = filter(None, map(namer, aliases[name]))
        synonyms = {o.caption: o.concept for o in others if o.caption not in (parsed.caption, *brands)}
        icon = Icon(
            **vars(parsed),
            set=prefix,
            name=name,
            synonyms=tuple(sorted(synonyms.items())),
            categories=tuple(categories[name]),
            svg=square_svg(data, drawing),
        )
        sizes = re.findall(r"(?:^|-)(\d{2})(?:-|px|$)", name)
        distance = min((abs(int(size) - 24) for size in sizes), default=0)
        key = (parsed.caption, parsed.style)
        if key not in best or distance < best[key][0]:
            best[key] = (distance, icon)
    yield from (icon for _, icon in best.values())


def square_svg(data: Mapping[str, Any], drawing: Mapping[str, Any]) -> str:
    """Return an icon as a document: its body in the middle of a square view box, as Iconify's format says."""
    defaults = {"left": 0, "top": 0, "width": 16, "height": 16}
    left, top, width, height = (float({**defaults, **data, **drawing}[key]) for key in defaults)
    side = max(width, height)
    view = f"{left - (side - width) / 2:g} {top - (side - height) / 2:g} {side:g} {side:g}"
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{view}">{drawing["body"]}</svg>'
    )
