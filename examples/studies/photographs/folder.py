"""Flickr8k as its authors ship it: read, and checked before anything is computed."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Callable, Iterable
from pathlib import Path

PICTURES, TEXTS = "Flicker8k_Dataset", "Flickr8k_text"  # the authors' spelling
SPLITS = ("test", "dev", "train")
SENTENCES, EXPERTS = "Flickr8k.token.txt", "ExpertAnnotations.txt"
SENTENCES_PER_PICTURE = 5

WHERE = f"""\
The folder needs
  {PICTURES}/             8,091 pictures, NAME.jpg
  {TEXTS}/{SENTENCES}
  {TEXTS}/Flickr_8k.trainImages.txt, Flickr_8k.devImages.txt, Flickr_8k.testImages.txt
  {TEXTS}/{EXPERTS}
as the archives Flickr8k_Dataset.zip and Flickr8k_text.zip have them, of "Framing Image Description as a
Ranking Task" (JAIR 2013). examples/studies/photographs/README.md says where they are."""


class FolderError(RuntimeError):
    """The folder lacks something, or something in it is damaged."""

    def __init__(self, path: Path, problem: str) -> None:
        super().__init__(f"{path}: {problem}\n{WHERE}")


def needed(folder: Path | None) -> Path:
    """Return the folder.

    Raises:
        RuntimeError: If none is given.
    """
    if folder is None:
        raise RuntimeError(f"--data is needed\n{WHERE}")
    return folder


@dataclasses.dataclass(frozen=True)
class Expected:
    """The contents of the texts: their numbers, and hashes of the lines that are used."""

    pictures: dict[str, int]  # by split
    judged: int  # pairs that three experts graded
    hashes: dict[str, str]  # by file


FLICKR8K = Expected(
    pictures={"train": 6000, "dev": 1000, "test": 1000},
    judged=5822,
    hashes={
        "Flickr_8k.trainImages.txt": "0e91c191ca46f050",
        "Flickr_8k.devImages.txt": "09aa9e58d277fd21",
        "Flickr_8k.testImages.txt": "fad160651f84c573",
        SENTENCES: "200fcefc52d081d9",
        EXPERTS: "56c2b1a9e1a46ba7",
    },
)


@dataclasses.dataclass(frozen=True)
class Judgement:
    """Three experts' grades, 1 to 4, of a sentence as a description of a picture."""

    picture: str
    sentence: tuple[str, int]  # the name of its picture, and its number there
    grades: tuple[int, int, int]


@dataclasses.dataclass(frozen=True)
class Photographs:
    """The pictures' names, their sentences, and the experts' judgements."""

    folder: Path
    splits: dict[str, list[str]]  # names of pictures
    sentences: dict[str, list[str]]  # five of each picture of the splits
    judgements: list[Judgement]

    def path(self, name: str) -> Path:
        """Return the file of a picture."""
        return self.folder / PICTURES / name

    def used(self, train_pictures: int) -> dict[str, list[str]]:
        """Return the pictures of every split that a study uses: of the train split the first ones."""
        return {split: self.splits[split][: train_pictures if split == "train" else None] for split in SPLITS}


def read(folder: Path, expected: Expected = FLICKR8K) -> Photographs:
    """Read and check the folder's texts, and that every picture of the splits is there.

    Raises:
        FolderError: If something is missing, incomplete or changed; it names the first file.
    """
    for part in (PICTURES, TEXTS):
        if not (folder / part).is_dir():
            raise FolderError(folder / part, "no such folder")
    texts = _Texts(folder / TEXTS, expected)
    splits = {
        split: texts.lines(f"Flickr_8k.{split}Images.txt", _NAME, expected.pictures[split])
        for split in SPLITS
    }
    names = [name for split in SPLITS for name in splits[split]]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise FolderError(folder / TEXTS, f"{twice} stands in the splits twice")
    of_splits = set(names)
    described = texts.lines(
        SENTENCES,
        _SENTENCE,
        SENTENCES_PER_PICTURE * len(names),
        keep=lambda line: line.partition("#")[0] in of_splits,
    )
    sentences: dict[str, list[str]] = {name: [] for name in names}
    for line in sorted(described):
        key, _, text = line.partition("\t")
        name, _, number = key.partition("#")
        if int(number) != len(sentences[name]):
            raise FolderError(folder / TEXTS / SENTENCES, f"{name} has no sentence {len(sentences[name])}")
        sentences[name].append(text)
    judgements = [_judgement(line) for line in texts.lines(EXPERTS, _JUDGED, expected.judged)]
    for one in judgements:
        if unknown := {one.picture, one.sentence[0]} - set(splits["test"]):
            raise FolderError(folder / TEXTS / EXPERTS, f"{unknown.pop()} is not in the test split")
    found = Photographs(folder, splits, sentences, judgements)
    for name in names:
        if not found.path(name).is_file():
            raise FolderError(found.path(name), "no such picture")
    return found


_NAME = re.compile(r"[\w.-]+\.jpg")
_SENTENCE = re.compile(r"[\w.-]+\.jpg#[0-4]\t\S.*")
_JUDGED = re.compile(r"[\w.-]+\.jpg\t[\w.-]+\.jpg#[0-4]\t[1-4]\t[1-4]\t[1-4]")


class _Texts:
    def __init__(self, folder: Path, expected: Expected) -> None:
        self.folder, self.hashes = folder, expected.hashes

    def lines(
        self, name: str, form: re.Pattern[str], count: int, keep: Callable[[str], object] = bool
    ) -> list[str]:
        """Return a file's lines, without the space at their ends and the lines that are not kept.

        The hash is of the sorted lines, so line ends and order make no difference.
        """
        path = self.folder / name
        if not path.is_file():
            raise FolderError(path, "no such file")
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise FolderError(path, f"damaged: {error}") from error
        found = [line for line in map(str.rstrip, text.splitlines()) if keep(line)]
        for line in found:
            if not form.fullmatch(line):
                raise FolderError(path, f"damaged: {line[:80]!r} is no line of it")
        if len(found) != count:
            raise FolderError(path, f"{count:,} lines are needed, got {len(found):,}")
        if digest(sorted(found)) != self.hashes[name]:
            raise FolderError(path, "its content is not that of the published file")
        return found


def digest(lines: Iterable[str]) -> str:
    """Return the hash of lines, 16 hexadecimal digits."""
    return hashlib.sha256("".join(f"{line}\n" for line in lines).encode()).hexdigest()[:16]


def _judgement(line: str) -> Judgement:
    picture, key, *grades = line.split("\t")
    name, _, number = key.partition("#")
    first, second, third = map(int, grades)
    return Judgement(picture, (name, int(number)), (first, second, third))
