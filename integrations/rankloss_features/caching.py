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
from rankloss_features.opening import is_tag, open_clip_name
from rankloss_features.teachers import Teacher
from rankloss_features.writing import only_writer, precision_on, write

_FORMS = (
    "MODEL:PRETRAINED of open_clip, hf-hub:OWNER/NAME, local-dir:FOLDER, image=A,text=B, "
    "image=A,text=B,align, image=A or text=B"
)
_ALIGN = "align"
_LOCAL = "local-dir:"  # before a folder with a model of open_clip or timm
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

        It is ``MODEL:PRETRAINED`` of open_clip, also ``hf-hub:OWNER/NAME`` or ``local-dir:FOLDER``;
        ``image=A,text=B``, ``image=A,text=B,align``, ``image=A`` or ``text=B``.

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
            words.remove(_ALIGN)
            both = cls.of(",".join(words))
            if both.image_encoder is None or both.text_encoder is None:
                raise ValueError(f"{text!r}: {_ALIGN} brings two encoders into one space, image=A,text=B")
            return both._replace(align=True)
        if all("=" in word for word in words):
            return cls(**_encoders_of(text))
        if text.startswith(clip_models.OWN_WEIGHTS) and text not in clip_models.OWN_WEIGHTS:
            return cls(model=text)
        model, _, pretrained = text.partition(":")
        if model and pretrained:
            return cls(model=model, pretrained=pretrained)
        raise _no_teacher(text)

    def names(self) -> dict[str, str]:
        """The attributes that are given, without ``align``: the model and its weights, or the encoders."""
        values = {name: getattr(self, name) for name in _NAMES}
        return {name: value for name, value in values.items() if value is not None}

    def options(self) -> list[str]:
        """The options of ``rankloss features`` that name the teacher."""
        words: list[str] = []
        for name, value in self.names().items():
            words += [flag(name), value]
        if self.align:
            words.append(flag(_ALIGN))
        return words

    def command(self, *more: str) -> str:
        """The command of ``rankloss features`` with more options."""
        return shlex.join(["rankloss", "features", *self.options(), *more])

    def two_steps(self, remedy: str) -> str:
        """Advice where a trainer cannot compute the features by itself: the command, then ``remedy``.

        Args:
            remedy: The use of the folder that the command writes, as in ``give the training teacher FOLDER``.
        """
        return f"compute them, `{self.command('--data', 'PAIRS', '--output', 'FOLDER')}`, and {remedy}"

    def check(self) -> Spec:
        """Look the names up, as far as they are known before anything is loaded, and return itself.

        Raises:
            ValueError: There is no such model, tag or encoder, or its package is not installed.
        """
        for name, value in self.names().items():
            if name != "pretrained":
                with named_errors(f"{flag(name)} {value}"):
                    self._look_up(name, packages.SHORT.get(value, value))
        return self

    def load(self, device: torch.device, batch_size: int) -> Teacher:
        """The teacher, on a device; its texts are encoded so many at a time. Encoders are not aligned yet.

        Raises:
            ValueError: It is not installed, not found, or has no weights.
        """
        # The options of ``rankloss features``, as its parser would have them.
        options = dict.fromkeys(("features", "image_weights", "spaces", "align", *_NAMES))
        args = Namespace(**{**options, **self.names()}, batch_size=batch_size)
        return sources.load(sources.options_of_teacher(args), args, device)

    def _look_up(self, name: str, value: str) -> None:
        """Look a model or an encoder up, as far as that needs no loading.

        Args:
            name: The attribute: ``model``, ``image_encoder`` or ``text_encoder``.
            value: Its name or path.

        Raises:
            ValueError: There is no such folder or encoder of images; or of a model with ``pretrained``, there
                is no such model, or no such tag or file of weights.
            ModuleNotFoundError: Its package is not installed.
        """
        folder = value.removeprefix(_LOCAL)
        is_path = value.startswith((_LOCAL, ".", "/", "~"))
        if is_path and not os.path.exists(folder):
            raise ValueError(f"there is no folder {folder}")
        package = value.replace("-", "_")
        if package in packages.MODULES and importlib.util.find_spec(package) is None:
            raise ModuleNotFoundError(f"No module named {package!r}", name=package)
        if name == "image_encoder":
            image_encoders.loader_of(value)
        if self.pretrained is not None:
            _look_up_weights(value, self.pretrained)


def _encoders_of(text: str) -> dict[str, Any]:
    """The encoders of ``image=A,text=B``, ``image=A`` or ``text=B``, by the attributes of :class:`Spec`.

    Args:
        text: Parts with ``=`` in each, separated by commas.

    Raises:
        ValueError: A modality is unknown, there twice, or without an encoder.
    """
    parts = [word.split("=", 1) for word in text.split(",")]
    for modality, _ in parts:
        if modality not in _ENCODERS:
            hint = did_you_mean(modality, [*_ENCODERS])
            raise ValueError(f"{text!r}: {modality!r} is no modality{hint}")
    encoders = {_ENCODERS[modality]: encoder for modality, encoder in parts}
    if len(encoders) < len(parts) or not all(encoders.values()):
        raise _no_teacher(text)
    return encoders


def _no_teacher(text: str) -> ValueError:
    """The error of a text of no teacher's form."""
    return ValueError(f"{text!r} is no teacher: give {_FORMS}")


def _look_up_weights(name: str, pretrained: str) -> None:
    """Raise a ValueError unless open_clip has the model, and its weights are a tag of it or a file.

    A tag of weights for another activation is refused, too, as :func:`clip_models.check_activation` says.
    """
    import open_clip

    models, model = open_clip.list_models(), open_clip_name(name)
    if model not in models:
        raise ValueError(f"unknown model{did_you_mean(model, models)}")
    if not is_tag(model, pretrained) and not os.path.isfile(pretrained):
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(model))
        raise ValueError(f"{pretrained} is no file, and none of its tags {tags}")
    clip_models.check_activation(model, pretrained)


# --- the data ---------------------------------------------------------------------------------------------


def of_open_clip(args: Any, spec: Spec) -> Data:
    """The training data of open_clip's trainer.

    Args:
        args: The trainer's parsed arguments.
        spec: The teacher, for the errors.

    Raises:
        ValueError: There are none, or they are synthetic; they cannot be read.
    """
    is_synthetic = args.dataset_type == "synthetic"
    if is_synthetic or not args.train_data:
        reason = "--dataset-type synthetic" if is_synthetic else "no --train-data"
        raise ValueError(f"{reason}: the features of a teacher need pairs; {spec.two_steps(_REMEDY)}")
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

    ``rankloss features`` writes the same folder, and so do trainers that take a teacher by name. Other
    trainers take its path, as :func:`rankloss_features.bind` and :class:`rankloss_features.Features` do.

    Args:
        teacher: ``"MODEL:PRETRAINED"`` of open_clip, also ``"hf-hub:OWNER/NAME"`` or ``"local-dir:FOLDER"``;
            ``"image=A,text=B"``, ``"image=A,text=B,align"`` for two encoders that are brought into one space
            by these pairs, ``"image=A"`` or ``"text=B"``.
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
        ValueError: The teacher cannot be loaded, gives no teacher's features, or they cannot be aligned; a
            picture cannot be read; a folder is damaged; a lock is a link.
        OSError: The disk is full, or the cache cannot be written.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    settings = {"dtype": "float16", "precision": precision_on(device), "batch_size": _BATCH_SIZE}
    folder = Path(os.environ.get("RANKLOSS_CACHE") or cache, _folder_name(spec, data, settings))
    if _is_complete(folder):
        _logger.info("a teacher's features are found in %s", folder)
        return str(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with only_writer(Path(f"{folder}.lock"), folder):
        if _is_complete(folder):  # by another process, while this one waited
            return str(folder)
        _logger.info("a teacher's features are computed into %s", folder)
        command = spec.command("--data", str(data.about["data"]), "--output", str(folder))
        if spec.align:
            check_pairs_suffice(data)
            # The encoders' own features have a folder of the cache, too, and serve other trainings.
            encoded = cached(spec._replace(align=False), data, cache, device)
            folder.mkdir(exist_ok=True)
            align(Features(encoded), data, folder, command)
        else:
            with torch.random.fork_rng([device] if device.type == "cuda" else []):
                teacher = spec.load(device, _BATCH_SIZE)
                write(folder, data, teacher, {**settings, "command": command}, _WORKERS, shared=False)
    return str(folder)


def _is_complete(folder: Path) -> bool:
    """True for a folder of features that is there and finished."""
    about = read_about(folder)
    return about is not None and bool(about["complete"])


def _folder_name(spec: Spec, data: Data, settings: dict[str, Any]) -> str:
    """The name of a teacher's folder in the cache.

    It begins with words for the data and the teacher, and ends with a hash that differs for any others, for
    other settings, and for files of the teacher that have changed.
    """
    names = list(spec.names().values())
    files = {name: _states_of_files(name) for name in names}
    described = json.dumps([FORMAT, spec, files, settings, data.identity()])
    digest = hashlib.blake2b(described.encode(), digest_size=6).hexdigest()
    words = [str(data.about["data"]), *names]
    if spec.align:
        words.append(_ALIGN)
    return "_".join([*map(_short_file_name, words), digest])


def _short_file_name(name: str) -> str:
    """The last part of a path or a name, with ``-`` in place of unusual characters, cut at 32."""
    last_part = os.path.basename(name.rstrip("/"))
    return re.sub(r"[^\w.]+", "-", last_part).strip("-")[:32]


def _states_of_files(name: str) -> list[Any]:
    """Path, size and time of change of each file of a teacher whose name is a path.

    Empty for a name that is no path of a file or folder.
    """
    place = Path(name.removeprefix(_LOCAL))
    candidates = place.rglob("*") if place.is_dir() else [place]
    files = [file for file in candidates if file.is_file()]
    return sorted([str(file.absolute()), file.stat().st_size, file.stat().st_mtime_ns] for file in files)
