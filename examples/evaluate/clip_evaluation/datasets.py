"""Data to evaluate on: folders, tables, COCO's captions, CLIP_benchmark's shards, torchvision's sets."""

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import webdataset
import yaml
from PIL import Image
from torch.utils.data import Dataset
from torchvision import datasets as torchvision_datasets
from torchvision.datasets.folder import ImageFolder, default_loader
from webdataset.tariterators import group_by_keys, tar_file_expander

Transform = Callable[[Image.Image], Any]

_TORCHVISION = "torchvision:"
_COCO_CAPTIONS = 5  # per image, the usual protocol


@dataclasses.dataclass(frozen=True)
class ImageSet:
    """One split of a data set."""

    name: str
    images: Dataset[Any]  # transformed images with their targets: a class's number, or a list of captions
    retrieval: bool  # whether the targets are captions
    classes: list[str] | None = None  # their names, where they are known
    templates: list[str] | None = None  # the prompts that come with the data


def load(
    source: str,
    split: str,
    transform: Transform,
    *,
    class_names: str | None = None,
    image_folder: Path | None = None,
    root: Path = Path("data"),
    download: bool = False,
    **columns: str,
) -> ImageSet:
    """Open one split of a data set.

    Args:
        source: A folder in CLIP_benchmark's webdataset layout, a folder of class folders (or of splits that
            hold these), a table (``.csv``, ``.tsv``), COCO's captions (``.json``), or ``torchvision:NAME``.
        split: Such as ``test``. Ignored for a single table or a folder of classes without splits.
        transform: The model's preprocessing.
        class_names: ``imagenet`` for open_clip's names of ImageNet's classes, or a file with one name per
            line for the sorted class folders. By default the names of the folders.
        image_folder: Where the images of COCO's captions are; the folder of the file by default.
        root: Where torchvision keeps its data.
        download: Whether torchvision may fetch it.
        **columns: ``csv_image_key``, ``csv_caption_key``, ``csv_label_key`` and ``csv_separator`` of a table.
    """
    if source.startswith(_TORCHVISION):
        return _torchvision(source.removeprefix(_TORCHVISION), split, transform, root, download)
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"no such data: {source}")
    if path.is_file():
        if path.suffix == ".json":
            return _coco(path, image_folder or path.parent, transform)
        if path.suffix in (".csv", ".tsv"):
            return _table(path, transform, **columns)
        raise ValueError(f"{source}: a file must be a table (.csv, .tsv) or COCO's captions (.json)")
    if (path / split / "nshards.txt").is_file():
        return _webdataset(path, split, transform)
    return _folder(path, split, transform, class_names)


def has_split(source: str, split: str) -> bool:
    """Say whether a data set has a split of that name."""
    if source.startswith(_TORCHVISION):
        return split in _splits(source.removeprefix(_TORCHVISION))
    return (Path(source) / split).is_dir()


class _Files(Dataset[Any]):
    """Image files and a target for each."""

    def __init__(self, items: Sequence[tuple[Path, Any]], transform: Transform) -> None:
        self._items, self._transform = items, transform

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        path, target = self._items[index]
        return self._transform(default_loader(str(path))), target


class _Classes(ImageFolder):
    def find_classes(self, directory: str | Path) -> tuple[list[str], dict[str, int]]:
        # ImageNetV2 names its folders by number, and 10 does not come before 2.
        names = [path.name for path in Path(directory).iterdir() if path.is_dir()]
        names.sort(key=lambda name: (int(name), "") if name.isdigit() else (-1, name))
        return names, {name: number for number, name in enumerate(names)}


def _folder(path: Path, split: str, transform: Transform, class_names: str | None) -> ImageSet:
    top = path / split if (path / split).is_dir() else path
    is_of_classes = any(map(Path.is_dir, top.iterdir()))
    if not is_of_classes or not len(images := _Classes(str(top), transform, allow_empty=True)):
        raise ValueError(f"{top} holds no folders of images, and no {split}/nshards.txt")
    return ImageSet(_name(path), images, False, _class_names(images.classes, class_names))


def _name(path: Path) -> str:
    return path.resolve().name if path.is_dir() else path.stem


def _class_names(folders: Sequence[str], class_names: str | None) -> list[str]:
    if class_names is None:
        return [name.replace("_", " ") for name in folders]
    if class_names == "imagenet":
        return _imagenet(folders)
    names = Path(class_names).read_text(encoding="utf-8").splitlines()
    if len(names) != len(folders):
        raise ValueError(f"class_names: {class_names} has {len(names)} lines for {len(folders)} folders")
    return [name.strip() for name in names]


def _imagenet(folders: Sequence[str]) -> list[str]:
    """Name ImageNet's classes, or some of them (ImageNet-R), by their WordNet numbers or their positions."""
    from open_clip import IMAGENET_CLASSNAMES
    from timm.data import ImageNetInfo

    position = {label: number for number, label in enumerate(ImageNetInfo("imagenet-1k").label_names())}
    position |= {str(number): number for number in position.values()}
    keys = [str(int(name)) if name.isdigit() else name for name in folders]
    if unknown := [name for name in keys if name not in position]:
        known = "ImageNet's 1,000 classes; folders must be named n01440764 or 0"
        raise ValueError(f"class_names: {unknown[0]} is none of {known}")
    return [IMAGENET_CLASSNAMES[position[key]] for key in keys]


def _table(
    path: Path,
    transform: Transform,
    *,
    csv_image_key: str = "filepath",
    csv_caption_key: str = "title",
    csv_label_key: str = "label",
    csv_separator: str = "\t",
) -> ImageSet:
    table = pd.read_csv(path, sep=csv_separator, dtype=str, na_filter=False)
    wanted = csv_label_key if csv_label_key in table else csv_caption_key
    for column in (csv_image_key, wanted):
        if column not in table:
            raise ValueError(f"{path}: no column {column!r} among {', '.join(table)} (wrong separator?)")
    if table.empty:
        raise ValueError(f"{path} holds no rows")
    if wanted == csv_label_key:
        labels, names = pd.factorize(table[wanted], sort=True)
        classes, targets = list(names), pd.Series(labels, table[csv_image_key])
    else:
        classes, targets = None, table.groupby(csv_image_key, sort=False)[wanted].agg(list)
    items = [(path.parent / str(name), target) for name, target in targets.items()]
    return ImageSet(_name(path), _Files(items, transform), classes is None, classes)


def _coco(path: Path, folder: Path, transform: Transform) -> ImageSet:
    content = json.loads(path.read_text(encoding="utf-8"))
    if not {"images", "annotations"} <= set(content):
        raise ValueError(f"{path}: COCO's captions have images and annotations, not {', '.join(content)}")
    table = pd.DataFrame(content["annotations"]).sort_values("id")
    captions = table["caption"].str.strip().groupby(table["image_id"]).agg(list)
    items = [
        (folder / image["file_name"], captions[image["id"]][:_COCO_CAPTIONS])
        for image in content["images"]
        if image["id"] in captions
    ]
    return ImageSet(_name(path), _Files(items, transform), True)


def _samples(shards: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for shard in shards:
        with Path(shard["url"]).open("rb") as stream:  # what webdataset opens itself stays open
            yield from group_by_keys(tar_file_expander([{**shard, "stream": stream}]))


def _webdataset(path: Path, split: str, transform: Transform) -> ImageSet:
    number = int((path / split / "nshards.txt").read_text(encoding="utf-8"))
    shards = [path / split / f"{shard}.tar" for shard in range(number)]
    missing = [shard for shard in shards if not shard.is_file()]
    if missing:
        raise FileNotFoundError(f"nshards.txt says {number}, but there is no {missing[0]}")
    kind = (_lines(path / "dataset_type.txt") or ["classification"])[0].lower()
    if kind not in ("classification", "retrieval"):
        raise ValueError(f"{path / 'dataset_type.txt'}: {kind} is not supported")
    retrieval = kind == "retrieval"
    samples = webdataset.DataPipeline(
        webdataset.SimpleShardList([str(shard.resolve()) for shard in shards]),
        webdataset.split_by_worker,
        _samples,
        webdataset.decode("pil"),
        webdataset.to_tuple("webp;png;jpg;jpeg", "txt" if retrieval else "cls"),
        webdataset.map_tuple(transform, str.splitlines if retrieval else int),
    )
    classes, templates = (
        _lines(path / f"{name}.txt") for name in ("classnames", "zeroshot_classification_templates")
    )
    return ImageSet(_name(path), samples, retrieval, classes, templates)


def _lines(path: Path) -> list[str] | None:
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else None
    return lines and [line.strip() for line in lines if line.strip()]


_SETS: dict[str, dict[str, Any]] = yaml.safe_load(
    Path(__file__).with_name("torchvision.yaml").read_text(encoding="utf-8")
)


def _splits(name: str) -> dict[str, Any]:
    if name not in _SETS:
        raise ValueError(f"torchvision:{name} is not supported; there are {', '.join(_SETS)}")
    return _SETS[name]["splits"]


def _torchvision(name: str, split: str, transform: Transform, root: Path, download: bool) -> ImageSet:
    splits = _splits(name)
    if split not in splits:
        raise ValueError(f"torchvision:{name} has no split {split!r}; there are {', '.join(splits)}")
    options = {"transform": transform, "download": download, **splits[split]}
    made = getattr(torchvision_datasets, name)(str(root), **options)
    names = _SETS[name].get("classes") or getattr(made, "classes", None)
    return ImageSet(name, made, False, [str(one).replace("_", " ") for one in names] if names else None)
