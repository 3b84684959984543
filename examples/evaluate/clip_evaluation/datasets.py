"""Reads data in CLIP_benchmark's webdataset layout, which it has for every set that CLIP is measured on."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import webdataset
from PIL import Image
from torch.utils.data import IterableDataset
from webdataset.tariterators import group_by_keys, tar_file_expander


class ImageSet(NamedTuple):
    """One split of a data set."""

    name: str
    images: IterableDataset[Any]  # transformed images with a target: a class's number, or a list of captions
    retrieval: bool  # whether the targets are captions
    classes: list[str]  # their names; none for captions
    templates: list[str]  # the prompts that come with the data


def load(folder: Path, split: str, transform: Callable[[Image.Image], Any]) -> ImageSet:
    """Open one split, such as ``test``, with the model's preprocessing.

    Raises:
        FileNotFoundError: If the folder has no such split, or a shard of it is missing.
        ValueError: If the data are neither for classification nor for retrieval.
    """
    if not has_split(folder, split):
        raise FileNotFoundError(f"{folder}: no {split}/nshards.txt, so no split of CLIP_benchmark's layout")
    shards = [folder / split / f"{n}.tar" for n in range(int(*_lines(folder / split / "nshards.txt")))]
    missing = [shard for shard in shards if not shard.is_file()]
    if missing:
        raise FileNotFoundError(f"nshards.txt says {len(shards)}, but there is no {missing[0]}")
    kind = (_lines(folder / "dataset_type.txt") or ["classification"])[0].lower()
    if kind not in ("classification", "retrieval"):
        raise ValueError(f"{folder / 'dataset_type.txt'}: {kind} is not supported")
    retrieval = kind == "retrieval"
    samples = webdataset.DataPipeline(
        webdataset.SimpleShardList([str(shard.resolve()) for shard in shards]),
        webdataset.split_by_worker,
        _samples,
        webdataset.decode("pil"),
        webdataset.to_tuple("webp;png;jpg;jpeg", "txt" if retrieval else "cls"),
        webdataset.map_tuple(transform, str.splitlines if retrieval else int),
    )
    texts = ("classnames", "zeroshot_classification_templates")
    return ImageSet(
        folder.resolve().name, samples, retrieval, *(_lines(folder / f"{name}.txt") for name in texts)
    )


def has_split(folder: Path, split: str) -> bool:
    """Say whether a data set has a split of that name."""
    return (folder / split / "nshards.txt").is_file()


def _samples(shards: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for shard in shards:
        with Path(shard["url"]).open("rb") as stream:  # what webdataset opens itself stays open
            yield from group_by_keys(tar_file_expander([{**shard, "stream": stream}]))


def _lines(path: Path) -> list[str]:
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return [line.strip() for line in lines if line.strip()]
