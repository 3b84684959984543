"""A teacher's features that a training computes before its first step, and finds again: a cache of folders.

::

    spec = Spec.of("image=efficientnet-lite0,text=minilm").check()
    folder = cached(spec, of_open_clip(args), cache="logs/teachers")
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import os
import re
import shlex
from argparse import Namespace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from rankloss_features import clip_models, image_encoders, packages, sources
from rankloss_features.aligning import align, check_pairs_suffice
from rankloss_features.data import OPTIONS, Data, Table, kind_of, open_data
from rankloss_features.errors import flag, named_errors
from rankloss_features.folder import FORMAT, Features, read_about
from rankloss_features.image_encoders import did_you_mean
from rankloss_features.teachers import Teacher
from rankloss_features.writing import precision_on, turn, write

_FORMS = "MODEL:PRETRAINED of open_clip, image=A,text=B, image=A,text=B,align, image=A or text=B"
_ALIGN = "align"
_ENCODERS = {"image": "image_encoder", "text": "text_encoder"}
_NAMES = ("model", "pretrained", *_ENCODERS.values())
_REMEDY = "give the training teacher FOLDER"
_BATCH_SIZE, _WORKERS = 256, 2
_logger = logging.getLogger("rankloss_features")


class Spec(NamedTuple):
    """A teacher, by the names that ``rankloss features`` has for it.

    Attributes:
        model: A model of open_clip, with both modalities; None for encoders.
        pretrained: Its weights; None for ``hf-hub:…`` and ``local-dir:…``, which have their own.
        image_encoder: The encoder of images, or None.
        text_encoder: The encoder of texts, or None.
        align: True if the features of both encoders are brought into one space.
    """

    model: str | None = None
    pretrained: str | None = None
    image_encoder: str | None = None
    text_encoder: str | None = None
    align: bool = False

    @classmethod
    def of(cls, text: str) -> Spec:
        """Parse a teacher.

        It is ``MODEL:PRETRAINED`` of open_clip, ``image=A,text=B``, ``image=A,text=B,align``, ``image=A`` or
        ``text=B``.

        Raises:
            ValueError: It is none of these.

        Example:
            >>> Spec.of("ViT-L-14-quickgelu:openai").options()
            ['--model', 'ViT-L-14-quickgelu', '--pretrained', 'openai']
            >>> Spec.of("text=minilm").options()
            ['--text-encoder', 'minilm']
            >>> Spec.of("image=efficientnet-lite0,text=minilm,align").options()
            ['--image-encoder', 'efficientnet-lite0', '--text-encoder', 'minilm', '--align']
        """
        words = text.split(",")
        if "=" in words[0] and words.count(_ALIGN) == 1:
            both = cls.of(",".join(word for word in words if word != _ALIGN))
            if both.image_encoder is None or both.text_encoder is None:
                raise ValueError(f"{text!r}: {_ALIGN} brings two encoders into one space, image=A,text=B")
            return both._replace(align=True)
        parts = [word.partition("=") for word in words]
        if all(separator for _, separator, _ in parts):
            unknown = next((key for key, _, _ in parts if key not in _ENCODERS), None)
            if unknown is not None:
                raise ValueError(f"{text!r}: {unknown!r} is no modality{did_you_mean(unknown, [*_ENCODERS])}")
            encoders: dict[str, Any] = {_ENCODERS[key]: name for key, _, name in parts}
            if len(encoders) == len(parts) and all(encoders.values()):
                return cls(**encoders)
        elif text.startswith(clip_models.OWN_WEIGHTS) and text not in clip_models.OWN_WEIGHTS:
            return cls(model=text)
        else:
            model, _, pretrained = text.partition(":")
            if model and pretrained:
                return cls(model=model, pretrained=pretrained)
        raise ValueError(f"{text!r} is no teacher: give {_FORMS}")

    def options(self) -> list[str]:
        """The options of ``rankloss features`` that name the teacher."""
        named = [(flag(name), getattr(self, name)) for name in _NAMES]
        words = [word for pair in named if pair[1] is not None for word in pair]
        return [*words, *([flag(_ALIGN)] if self.align else [])]

    def command(self, *more: str) -> str:
        """The command of ``rankloss features`` with more options."""
        return shlex.join(["rankloss", "features", *self.options(), *more])

    def two_steps(self, remedy: str) -> str:
        """Advice where a trainer cannot compute the features by itself."""
        return f"compute them, `{self.command('--data', 'PAIRS', '--output', 'FOLDER')}`, and {remedy}"

    def check(self) -> Spec:
        """Look the names up, as far as they are known before anything is loaded; the same teacher.

        Raises:
            ValueError: There is no such model, tag or encoder, or its package is not installed.
        """
        for name in ("model", *_ENCODERS.values()):
            value = getattr(self, name)
            if value is not None:
                with named_errors(f"{flag(name)} {value}"):
                    self._look_up(name, packages.SHORT.get(value, value))
        return self

    def load(self, device: torch.device, batch_size: int) -> Teacher:
        """The teacher, on a device; its texts are encoded so many at a time. Encoders are not aligned yet.

        Raises:
            ValueError: It is not installed, not found, or has no weights.
        """
        names = dict.fromkeys(("features", "image_weights", "spaces"))
        given = {name: getattr(self, name) for name in _NAMES}
        args = Namespace(**names, **given, align=None, batch_size=batch_size)
        return sources.load(sources.given(args), args, device)

    def _look_up(self, name: str, value: str) -> None:
        place = value.removeprefix("local-dir:")
        if (place != value or value.startswith((".", "/", "~"))) and not os.path.exists(place):
            raise ValueError(f"there is no folder {place}")
        package = value.replace("-", "_")
        if package in packages.MODULES and importlib.util.find_spec(package) is None:
            raise ModuleNotFoundError(f"No module named {package!r}", name=package)
        if name == "image_encoder":
            image_encoders.loader_of(value)
        if self.pretrained is not None:
            import open_clip

            models, model = open_clip.list_models(), value.replace("/", "-")
            if model not in models:
                raise ValueError(f"unknown model{did_you_mean(model, models)}")
            if not (open_clip.get_pretrained_cfg(model, self.pretrained) or os.path.isfile(self.pretrained)):
                tags = ", ".join(open_clip.list_pretrained_tags_by_model(model))
                raise ValueError(f"{self.pretrained} is no file, and none of its tags {tags}")
            clip_models.check_activation(model, self.pretrained)


# --- the data ---------------------------------------------------------------------------------------------


def of_open_clip(args: Any, spec: Spec) -> Data:
    """The training data of open_clip's trainer.

    Args:
        args: The trainer's parsed arguments.
        spec: The teacher, for the errors.

    Raises:
        ValueError: There are none, or they are synthetic; they cannot be read.
    """
    if args.dataset_type == "synthetic" or not args.train_data:
        found = "--dataset-type synthetic" if args.dataset_type == "synthetic" else "no --train-data"
        raise ValueError(f"{found}: the features of a teacher need pairs; {spec.two_steps(_REMEDY)}")
    try:
        kind = kind_of(args.train_data, args.dataset_type)
        # The trainer's parser has the options of every kind, given or not.
        options = {name: getattr(args, name, None) for name in OPTIONS[kind]}
        return open_data(Namespace(data=args.train_data, dataset_type=kind, **options))
    except ValueError as error:
        raise ValueError(str(error).replace("--data ", "--train-data ")) from error


def of_dataset(
    dataset: Any, spec: Spec, image_column: str = "image", caption_column: str = "caption"
) -> Data:
    """The pairs of a ``datasets.Dataset``.

    Args:
        dataset: The training data of a trainer.
        spec: The teacher, for the errors.
        image_column: The images, or their paths.
        caption_column: The captions.

    Raises:
        ValueError: They are a stream or another kind of data, or lack a column.
    """
    import datasets

    if not isinstance(dataset, datasets.Dataset):
        kind = type(dataset).__name__
        raise ValueError(f"the data are no datasets.Dataset, but {kind}; {spec.two_steps(_REMEDY)}")
    missing = [name for name in (image_column, caption_column) if name not in dataset.column_names]
    if missing:
        has = ", ".join(dataset.column_names)
        raise ValueError(f"the data have no column {missing[0]!r}, but {has}; {spec.two_steps(_REMEDY)}")
    return Table(dataset, image_column, caption_column, data="dataset")


def compute_features(
    teacher: str,
    pairs: Any,
    *,
    image_column: str = "image",
    caption_column: str = "caption",
    cache: str | Path = "teachers",
    device: str | torch.device | None = None,
) -> str:
    """The folder of a teacher's features of some pairs, computed unless the cache has it.

    It is the folder of ``rankloss features``, and the one that trainers compute which take a teacher by name;
    the others take it, as :func:`rankloss_features.bind` and :class:`rankloss_features.Features` do.

    Args:
        teacher: ``"MODEL:PRETRAINED"`` of open_clip, ``"image=A,text=B"``, ``"image=A,text=B,align"`` for
            two encoders that are brought into one space by these pairs, ``"image=A"`` or ``"text=B"``.
        pairs: A ``datasets.Dataset`` of the pairs to train on, and no others: they are what ``align`` fits.
        image_column: The images, or their paths.
        caption_column: The captions.
        cache: The place of the folder, unless the environment variable ``RANKLOSS_CACHE`` names another.
        device: The device that computes; by default a GPU where there is one.

    Raises:
        ValueError: No teacher has this name, or it is not installed; the pairs are of another kind or lack a
            column; a picture cannot be read, or the features cannot be aligned.
        OSError: The disk is full, or the cache cannot be written.

    Example::

        folder = compute_features("image=efficientnet-lite0,text=minilm,align", pairs)
        pairs = bind(pairs, folder, column="label")
        loss = ContrastiveLoss(model, "mimicry", teacher=folder)
    """
    spec = Spec.of(teacher).check()
    return cached(spec, of_dataset(pairs, spec, image_column, caption_column), cache, device)


# --- the cache --------------------------------------------------------------------------------------------


def cached(spec: Spec, data: Data, cache: str | Path, device: str | torch.device | None = None) -> str:
    """The folder of a teacher's features of some pairs, computed unless the cache has it.

    One process computes while others of the machine, or of machines that share the cache, wait for it. What
    an interrupted one has computed is kept. The state of torch's random numbers is as before.

    Args:
        spec: The teacher.
        data: The pairs.
        cache: The place of the cache, unless the environment variable ``RANKLOSS_CACHE`` names another.
        device: The device that computes; by default a GPU where there is one.

    Raises:
        ValueError: The teacher cannot be loaded, or gives no teacher's features; a picture cannot be read; a
            lock is a link.
        OSError: The disk is full, or the cache cannot be written.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    settings = {"dtype": "float16", "precision": precision_on(device), "batch_size": _BATCH_SIZE}
    folder = Path(os.environ.get("RANKLOSS_CACHE") or cache, _name(spec, data, settings))
    if _is_complete(folder):
        _logger.info("a teacher's features are found in %s", folder)
        return str(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with turn(Path(f"{folder}.lock"), folder):
        if not _is_complete(folder):
            _logger.info("a teacher's features are computed into %s", folder)
            command = spec.command("--data", str(data.about["data"]), "--output", str(folder))
            if spec.align:
                check_pairs_suffice(data)
                encoded = cached(spec._replace(align=False), data, cache, device)
                folder.mkdir(exist_ok=True)
                align(Features(encoded), data, folder, command)
                return str(folder)
            with torch.random.fork_rng([device] if device.type == "cuda" else []):
                teacher = spec.load(device, _BATCH_SIZE)
                write(folder, data, teacher, {**settings, "command": command}, _WORKERS, shared=False)
    return str(folder)


def _is_complete(folder: Path) -> bool:
    about = read_about(folder)
    return about is not None and bool(about["complete"])


def _name(spec: Spec, data: Data, settings: dict[str, Any]) -> str:
    """The name of a folder, which tells a reader the data and the teacher, and differs for any others."""
    names = [name for name in (getattr(spec, each) for each in _NAMES) if name is not None]
    files = {name: _files(name) for name in names}
    known = json.dumps([FORMAT, spec, files, settings, data.identity()])
    digest = hashlib.blake2b(known.encode(), digest_size=6).hexdigest()
    words = []
    for name in (str(data.about["data"]), *names, *([_ALIGN] if spec.align else [])):
        last_part = os.path.basename(name.rstrip("/"))
        words.append(re.sub(r"[^\w.]+", "-", last_part).strip("-")[:32])
    return "_".join([*words, digest])


def _files(name: str) -> list[Any]:
    """Path, size and time of change of the files that a name of a teacher means, if it is a path."""
    place = Path(name.removeprefix("local-dir:"))
    candidates = place.rglob("*") if place.is_dir() else [place]
    files = [file for file in candidates if file.is_file()]
    return sorted([str(file.absolute()), file.stat().st_size, file.stat().st_mtime_ns] for file in files)
