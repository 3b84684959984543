"""Flickr8k as its authors ship it: read, and checked before anything is computed."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
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


# Hashes of the sorted lines that are used: line ends and order make no difference.
HASHES = {
    "Flickr_8k.trainImages.txt": "0e91c191ca46f050",
    "Flickr_8k.devImages.txt": "09aa9e58d277fd21",
    "Flickr_8k.testImages.txt": "fad160651f84c573",
    SENTENCES: "200fcefc52d081d9",
    EXPERTS: "56c2b1a9e1a46ba7",
}


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


def read(folder: Path) -> Photographs:
    """Read and check the folder's texts, and that every picture of the splits is there.

    Raises:
        FolderError: If something is missing, incomplete or changed; it names the first file.
    """
    for part in (PICTURES, TEXTS):
        if not (folder / part).is_dir():
            raise FolderError(folder / part, "no such folder")
    splits = {split: _lines(folder / TEXTS / f"Flickr_8k.{split}Images.txt") for split in SPLITS}
    names = {name for of in splits.values() for name in of}
    sentences: dict[str, list[str]] = {name: [] for of in splits.values() for name in of}
    for line in sorted(_lines(folder / TEXTS / SENTENCES, keep=lambda line: line.partition("#")[0] in names)):
        key, _, text = line.partition("\t")
        sentences[key.partition("#")[0]].append(text)
    judgements = [_judgement(line) for line in _lines(folder / TEXTS / EXPERTS)]
    found = Photographs(folder, splits, sentences, judgements)
    for name in names:
        if not found.path(name).is_file():
            raise FolderError(found.path(name), "no such picture")
    return found


def _lines(path: Path, keep: Callable[[str], object] = bool) -> list[str]:
    """Return a file's lines without the space at their ends, of them those to keep: by default no blank one.

    Raises:
        FolderError: If the file is not there, or is not the published one.
    """
    if not path.is_file():
        raise FolderError(path, "no such file")
    text = path.read_text(encoding="utf-8", errors="replace")
    found = [line for line in map(str.rstrip, text.splitlines()) if keep(line)]
    content = "".join(f"{line}\n" for line in sorted(found))
    if hashlib.sha256(content.encode()).hexdigest()[:16] != HASHES[path.name]:
        raise FolderError(path, "its content is not that of the published file")
    return found


def _judgement(line: str) -> Judgement:
    """Return a line of the experts' file: picture, ``PICTURE#NUMBER`` of the sentence, and three grades."""
    picture, key, *grades = line.split("\t")
    name, _, number = key.partition("#")
    first, second, third = map(int, grades)
    return Judgement(picture, (name, int(number)), (first, second, third))
