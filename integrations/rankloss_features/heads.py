"""Heads on frozen encoders: two small networks that bring features of both into one space, and their folder.

::

    from rankloss_features.heads import load_heads

    model = load_heads("heads")
    scores = model.encode_images(["new.jpg"]) @ model.encode_texts(["a red shoe", "a blue hat"]).T

The folder has ``heads.json``, with the method that made the heads, the names of the encoders, the hashes of
their weights and the way to pictures; and the heads' weights, beside the encoders' features of fixed inputs
(:mod:`rankloss_features.probing`), in a file that is named by its hash. So heads that replace others are
there once ``heads.json`` names them, and an interruption before leaves the others.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rankloss.options import shown
from rankloss.precision import unit_rows
from rankloss_features import clip_models, image_encoders, opening, packages, probing, text_encoders
from rankloss_features.cca import CanonicalCorrelation
from rankloss_features.data import Sample
from rankloss_features.errors import named_errors
from rankloss_features.folder import (
    NAMES,
    SEPARATE_SPACES,
    Entries,
    are_widths,
    check_entries,
    check_rows_differ,
    hash_of,
    is_count,
    is_setting,
    read_json,
    write_bytes,
)
from rankloss_features.pictures import Rendering
from rankloss_features.side_by_side import Own, Projection, SideBySide
from rankloss_features.teachers import Encoder, Teacher

ABOUT = "heads.json"
CCA, TRAINED, BOTH = "cca", "trained", "both"
"""Methods that make heads, an entry of ``heads.json``: in closed form, trained, both side by side."""

METHODS = (CCA, TRAINED, BOTH)

OWN = "own"
"""A part of heads: the encoders' own features, which have a common space."""

_IMAGES, _TEXTS = NAMES
_LOCAL = "local-dir:"  # timm's word for a folder
_BATCH_SIZE = 64
_LEAST_STD = 0.1
_EPSILON = 1e-5  # of batch normalisation


@dataclass(frozen=True)
class Encoders:
    """The two frozen encoders, or a model that has both, by the names that ``rankloss features`` has."""

    image_encoder: str | None = None
    text_encoder: str | None = None
    image_weights: str | None = None
    model: str | None = None
    pretrained: str | None = None

    def load(self, device: torch.device, batch_size: int) -> Teacher:
        """Load both, or the model that has both.

        Raises:
            ValueError: One is not found or not installed.
        """
        if self.model is not None:
            with named_errors(f"--model {self.model}"):
                return clip_models.load(self.model, self.pretrained, device)
        assert self.image_encoder is not None
        assert self.text_encoder is not None
        with named_errors(f"--image-encoder {self.image_encoder}"):
            images = image_encoders.load(self.image_encoder, self.image_weights, device)
        with named_errors(f"--text-encoder {self.text_encoder}"):
            texts = text_encoders.load(self.text_encoder, batch_size, device)
        encoders = {**images.encoders, **texts.encoders}
        return Teacher({**images.about, **texts.about}, encoders, device=device, spaces=SEPARATE_SPACES)


class Standardise(nn.Module):
    """(x − mean) / std in each dimension, of constants.

    Attributes:
        mean: ``[features]``.
        std: ``[features]``, the population standard deviation, but at least a tenth of the root of its mean
            square over the dimensions: one that is constant in a training is noise elsewhere.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, features: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("std", torch.ones(features))

    @torch.no_grad()
    def fit(self, features: Tensor) -> None:
        """Take the statistics of features, ``[N, features]``."""
        std, mean = torch.std_mean(features, dim=0, correction=0)
        self.std.copy_(std.clamp(min=_LEAST_STD * float(std.square().mean().sqrt())))
        self.mean.copy_(mean)

    def forward(self, features: Tensor) -> Tensor:
        """The standardised features."""
        return (features - self.mean) / self.std


class Head(nn.Sequential):
    """Standardises an encoder's unit-norm features, and brings them into the common space, ``[n, width]``."""

    def __init__(self, features: int, hidden: int, width: int, dropout: float) -> None:
        super().__init__(
            Standardise(features),
            nn.Dropout(dropout),
            nn.Linear(features, hidden),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, width),
        )
        self.hidden, self.width = hidden, width

    def standardise(self, name: str, features: Tensor) -> None:
        """Take the statistics of all features that are trained on, which are constants.

        Raises:
            ValueError: They are not finite, or one row N times.
        """
        statistics: Any = self[0]
        statistics.fit(features)
        if not bool(statistics.std.isfinite().all()):
            raise ValueError(f"{name} must be finite; got NaN or infinity")
        check_rows_differ(name, [features.numpy()])


@dataclass(frozen=True)
class Part:
    """A part of heads.

    Attributes:
        method: :data:`CCA`, :data:`TRAINED` or :data:`OWN`.
        share: Its share of the similarity.
        sizes: The sizes by which its modules are built, as ``heads.json`` has them.
        modules: Its module for each modality.
    """

    method: str
    share: float
    sizes: dict[str, Any]
    modules: dict[str, nn.Module]

    @classmethod
    def closed(cls, cca: CanonicalCorrelation, share: float) -> Part:
        """A part of the projections of a canonical correlation analysis."""
        sizes = {"setting": cca.setting.as_options(), "width": len(cca.correlations)}
        widths = {_IMAGES: len(cca.image_mean), _TEXTS: len(cca.text_mean)}
        part = cls.of(CCA, share, sizes, widths)
        for name, mean, matrix in (
            (_IMAGES, cca.image_mean, cca.image_projection),
            (_TEXTS, cca.text_mean, cca.text_projection),
        ):
            part.modules[name].load_state_dict({"mean": mean.float(), "matrix": matrix.float()})
        return part

    @classmethod
    def trained(cls, heads: nn.ModuleDict, share: float) -> Part:
        """A part of trained heads."""
        first: Any = heads[_IMAGES]
        return cls(TRAINED, share, {"hidden": first.hidden, "width": first.width}, dict(heads.items()))

    @classmethod
    def own(cls, widths: Mapping[str, int], share: float) -> Part:
        """A part of the encoders' own features, which have one width."""
        return cls.of(OWN, share, {}, widths)

    @classmethod
    def of(cls, method: str, share: float, sizes: dict[str, Any], widths: Mapping[str, int]) -> Part:
        """A part whose modules have initial weights, to be filled from a fit or a file.

        Args:
            method: :data:`CCA`, :data:`TRAINED` or :data:`OWN`.
            share: Its share of the similarity.
            sizes: The sizes of its modules, as ``heads.json`` has them.
            widths: The width of the encoder's features, for each modality.
        """
        modules = {name: _module(method, sizes, width) for name, width in widths.items()}
        return cls(method, share, sizes, modules)

    def entry(self) -> dict[str, Any]:
        """Its entry of ``heads.json``."""
        return {"method": self.method, "share": self.share, **self.sizes}


def _module(method: str, sizes: Mapping[str, Any], features: int) -> nn.Module:
    """The module of a part, with initial weights, for one modality of so many features."""
    if method == CCA:
        setting = sizes["setting"]
        return Projection(features, sizes["width"], root=setting["root"])
    if method == TRAINED:
        return Head(features, sizes["hidden"], sizes["width"], dropout=0.0)
    return Own(features)


def joined(parts: Sequence[Part]) -> nn.ModuleDict:
    """The head of each modality: the module of the only part, or those of all parts side by side."""
    shares = [part.share for part in parts]
    heads = nn.ModuleDict()
    for name in NAMES:
        modules = [part.modules[name] for part in parts]
        heads[name] = modules[0] if len(modules) == 1 else SideBySide(modules, shares)
    return heads


class FrozenEncoders:
    """Two frozen encoders with their heads.

    Args:
        encoders: The names of the encoders.
        teacher: The encoders.
        parts: The parts of the heads.
        scale: The multiplier of the similarities.
        rendering: The way to the pictures, the same for those that trained the heads and for others.
    """

    def __init__(
        self,
        encoders: Encoders,
        teacher: Teacher,
        parts: Sequence[Part],
        scale: float,
        rendering: Rendering = Rendering(),  # noqa: B008 (it is frozen)
    ) -> None:
        self.encoders = encoders
        self.scale = scale
        self.rendering = rendering
        self.parts = list(parts)
        self.heads = joined(parts).to(teacher.device).eval()
        self._frozen = teacher
        with_heads = {name: self._with_head(name, encoder) for name, encoder in teacher.encoders.items()}
        self.teacher = Teacher(teacher.about, with_heads, scale, device=teacher.device, rendering=rendering)
        """The encoders followed by their heads, for the commands that take a teacher."""

    def _with_head(self, name: str, encoder: Encoder) -> Encoder:
        """An encoder, followed by the head of its modality."""
        head: Any = self.heads[name]

        def encode(inputs: Any) -> Tensor:
            features: Tensor = head(unit_rows(encoder.encode(inputs).float()))
            return features

        return Encoder(encoder.prepare, encode, head.width, encoder.needs_pictures)

    def encode_images(self, pictures: Sequence[Any]) -> Tensor:
        """The unit-norm features of pictures: ``[n, width]``.

        Args:
            pictures: Paths, bytes of files, or pictures of Pillow.

        Raises:
            ValueError: It is one picture, not several, or an item is of another type.
            OSError: A file cannot be read, or a file or bytes are no picture.
        """
        is_one_picture = isinstance(pictures, (str, bytes, os.PathLike)) or hasattr(pictures, "convert")
        if is_one_picture:
            raise ValueError(f"pictures must be several, in a list; got {shown(pictures)}")
        samples = [self._sample_of(place, picture) for place, picture in enumerate(pictures)]
        return self._encode(_IMAGES, samples)

    def _sample_of(self, place: int, picture: Any) -> Sample:
        """The sample of a path, of bytes or of a picture of Pillow, which is opened when it is needed.

        Raises:
            ValueError: It is none of these.
        """
        if hasattr(picture, "convert"):
            opened = partial(self.rendering.convert, picture)
        elif isinstance(picture, (str, bytes, os.PathLike)):
            opened = partial(self.rendering.open, os.fspath(picture))
        else:
            raise ValueError(
                f"pictures must be paths, bytes of files or pictures of Pillow; in place {place} stands "
                f"{shown(picture)}"
            )
        return Sample(row=place, name="", caption="", open=opened, source=place)

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """The unit-norm features of texts: ``[n, width]``.

        Raises:
            ValueError: It is one text, not several, or an item is no text.
        """
        if isinstance(texts, (str, bytes)):
            raise ValueError(f"texts must be several, in a list; got {shown(texts)}")
        for place, text in enumerate(texts):
            if not isinstance(text, str):
                raise ValueError(f"texts must be of type str; got {shown(text)} in place {place}")
        samples = [Sample(row=place, name="", caption=text) for place, text in enumerate(texts)]
        return self._encode(_TEXTS, samples)

    def _encode(self, name: str, samples: list[Sample]) -> Tensor:
        """The features of one modality, :data:`NAMES`, of samples: ``[n, width]``, computed in batches."""
        encoder = self.teacher.encoders[name]
        of_modality = Teacher({}, {name: encoder}, device=self.teacher.device)
        features = [torch.empty(0, encoder.width)]  # the result without samples
        for first in range(0, len(samples), _BATCH_SIZE):
            prepared = encoder.prepare(samples[first : first + _BATCH_SIZE])
            features.append(of_modality.encode({name: prepared}, torch.float32)[name])
        return torch.cat(features)

    def save(self, folder: str | Path) -> None:
        """Write the heads and the names of their encoders into a folder, in place of heads that it has.

        Raises:
            OSError: The disk is full, or the folder cannot be written.
        """
        from safetensors.torch import save

        place = Path(folder)
        place.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.contiguous() for name, tensor in self.heads.state_dict().items()}
        weights = save({**tensors, **probing.features_of(self._frozen)})
        methods = {part.method for part in self.parts} - {OWN}
        about = {
            "method": BOTH if len(methods) > 1 else methods.pop(),
            "encoders": _with_absolute_paths(self.encoders),
            "weights": self._frozen.about,
            "pictures": asdict(self.rendering),
            "widths": {name: encoder.width for name, encoder in self._frozen.encoders.items()},
            "parts": [part.entry() for part in self.parts],
            "scale": self.scale,
            "hash": hash_of(weights).hex(),
        }
        old_file = _weights_in(place)
        file = _weights_file(place, about)
        # In this order a process that is killed leaves the old heads or the new ones, each with its weights.
        write_bytes(file, weights)
        write_bytes(place / ABOUT, (json.dumps(about, indent=2) + "\n").encode())
        if old_file is not None and old_file != file:  # equal weights have one file
            old_file.unlink(missing_ok=True)


def _weights_file(folder: Path, about: Mapping[str, Any]) -> Path:
    """The file of weights of the heads whose ``heads.json`` has these entries."""
    if "method" not in about:
        return folder / "heads.safetensors"  # of a folder of an earlier release
    return folder / f"heads-{about['hash'][:16]}.safetensors"


def _weights_in(folder: Path) -> Path | None:
    """The file of weights of the heads in a folder; None if it has no heads that can be read."""
    with suppress(ValueError):
        return _weights_file(folder, _read(folder))
    return None


def has_other_files(folder: Path) -> bool:
    """True for a folder with files other than heads, whole or as an interrupted command leaves them."""
    for file in folder.iterdir():
        name = file.name.removeprefix(".")  # which a file has that is not whole yet
        is_weights = re.fullmatch(r"heads(-[0-9a-f]{16})?\.safetensors", name)
        if name != ABOUT and not is_weights:
            return True
    return False


def _with_absolute_paths(encoders: Encoders) -> dict[str, str | None]:
    """The names of encoders, in which the path of a file or folder is absolute, of ``local-dir:FOLDER`` too.

    A name that :meth:`Encoders.load` takes for no path stays as it is, even where the working directory has a
    file of that name: a model, a tag of its weights, or an encoder inside a package.
    """
    names: dict[str, str | None] = asdict(encoders)
    for kind, name in names.items():
        if name is not None and _is_path(kind, name, encoders):
            scheme = _LOCAL if name.startswith(_LOCAL) else ""
            names[kind] = scheme + os.path.abspath(name.removeprefix(scheme))
    return names


def _is_path(kind: str, name: str, encoders: Encoders) -> bool:
    """True if the loader of an attribute of :class:`Encoders` opens its name as a file or folder."""
    if kind == "image_weights" or name.startswith(_LOCAL):
        return True
    if kind == "model":
        return clip_models.is_folder_of_transformers(name)
    if kind == "pretrained":
        return not opening.is_tag(str(encoders.model), name)
    is_inside_a_package = name in {*packages.SHORT, *packages.IMAGES, *packages.TEXTS}
    return os.path.isdir(name) and not is_inside_a_package


def _are_encoders(value: Any) -> bool:
    """True for the attributes of :class:`Encoders`: those of a model, or of an encoder of each modality."""
    if not isinstance(value, dict) or {*value} != {field.name for field in fields(Encoders)}:
        return False
    present = {name for name, text in value.items() if text is not None}
    if not all(isinstance(value[name], str) for name in present):
        return False
    if "model" in present:
        return present <= {"model", "pretrained"}
    # Two encoders, perhaps with image_weights; pretrained are weights of a model alone.
    return {"image_encoder", "text_encoder"} <= present and "pretrained" not in present


def _are_parts(value: Any) -> bool:
    """True for the entries of one part or more."""
    return isinstance(value, list) and bool(value) and all(map(_is_part, value))


def _is_part(value: Any) -> bool:
    """True for a method of a :class:`Part`, a share in (0, 1], and the sizes that the method needs."""
    if not isinstance(value, dict) or not isinstance(value.get("share"), (int, float)):
        return False
    if not 0 < value["share"] <= 1:
        return False
    method, sizes = value.get("method"), _sizes_of(value)
    if method == TRAINED:
        return {*sizes} == {"hidden", "width"} and all(map(is_count, sizes.values()))
    if method == CCA:
        return {*sizes} == {"setting", "width"} and is_setting(sizes["setting"]) and is_count(sizes["width"])
    return method == OWN and not sizes


def _sizes_of(entry: Mapping[str, Any]) -> dict[str, Any]:
    """The sizes in the entry of a part."""
    return {name: size for name, size in entry.items() if name not in ("method", "share")}


def _is_rendering(value: Any) -> bool:
    """True for the attributes of a :class:`rankloss_features.pictures.Rendering`."""
    if not isinstance(value, dict) or {*value} != {field.name for field in fields(Rendering)}:
        return False
    with suppress(ValueError):
        return isinstance(value["upright"], bool) and bool(Rendering(**value))
    return False


_ENTRIES: Entries = {
    "encoders": (_are_encoders, "the names of two encoders, or of a model"),
    "weights": (
        lambda value: isinstance(value, dict) and bool(_hashes(value)),
        "the hashes of the encoders' weights",
    ),
    "pictures": (_is_rendering, "the way to pictures"),
    "widths": (lambda value: are_widths(value) and len(value) == len(NAMES), "a width from 1 for each"),
    "parts": (_are_parts, "a method, a share and sizes for each"),
    "scale": (lambda value: type(value) is float and 0 < value < math.inf, "a number above 0"),
    "hash": (lambda value: isinstance(value, str) and bool(re.fullmatch("[0-9a-f]{32}", value)), "a hash"),
}


def load_heads(folder: str | Path, device: str | torch.device = "cpu") -> FrozenEncoders:
    """Heads on frozen encoders, of a folder of ``rankloss heads``.

    Args:
        folder: The folder.
        device: The device that computes.

    Raises:
        ValueError: It is no such folder, or its heads are of an unknown method; an entry of it is missing or
            not of its kind, its weights are not as they were written, or an encoder is not found, has other
            weights than it was trained with, or with these gives other features of fixed inputs.
    """
    about = _read(Path(folder))
    file = _weights_file(Path(folder), about)
    stored = _stored_tensors(file, about["hash"])
    encoders = Encoders(**about["encoders"])
    teacher = encoders.load(torch.device(device), _BATCH_SIZE)
    for name, value in _hashes(about["weights"]).items():
        if teacher.about.get(name) != value:
            raise ValueError(
                f"{folder} was trained on {name} {value}; the encoder that is found has "
                f"{teacher.about.get(name)}"
            )
    probing.check_same(f"{folder} was trained on", stored, teacher)
    try:
        parts = _parts_of(about, stored)
    except RuntimeError as error:
        raise ValueError(f"{file} does not fit: {error}") from error
    return FrozenEncoders(encoders, teacher, parts, about["scale"], Rendering(**about["pictures"]))


def _stored_tensors(file: Path, expected_hash: str) -> dict[str, Tensor]:
    """The tensors of the file that ``heads.json`` names.

    Raises:
        ValueError: There is no such file, or it is not as it was written.
    """
    if not file.is_file():
        raise ValueError(f"{file}, which {ABOUT} names, is missing: train the heads again")
    content = file.read_bytes()
    if hash_of(content).hex() != expected_hash:
        raise ValueError(f"{file} is not as it was written with {ABOUT}: train the heads again")
    try:
        return opening.tensors_of(content)
    except ValueError as error:
        raise ValueError(f"{file} is damaged: {error}") from error


def _parts_of(about: Mapping[str, Any], stored: dict[str, Tensor]) -> list[Part]:
    """The parts with their stored weights, in float32.

    Raises:
        RuntimeError: The weights do not fit them.
    """
    # On the meta device modules take no memory, whatever widths the file names.
    with torch.device("meta"):
        parts = [_part(entry, about["widths"]) for entry in about["parts"]]
    weights = _constants_of_batch_norm(stored) if _is_of_an_earlier_release(about) else _of_heads(stored)
    joined(parts).load_state_dict(weights, assign=True)  # into the modules of the parts
    for part in parts:
        for module in part.modules.values():
            module.float()
    return parts


def _part(entry: Mapping[str, Any], widths: Mapping[str, int]) -> Part:
    """The part that an entry describes, with initial weights."""
    return Part.of(entry["method"], entry["share"], _sizes_of(entry), widths)


def _hashes(about: Mapping[str, Any]) -> dict[str, Any]:
    """The hashes of the weights among the entries of a teacher."""
    return {name: value for name, value in about.items() if name.endswith("weights") and value is not None}


def _read(folder: Path) -> dict[str, Any]:
    """The entries of ``heads.json``.

    Raises:
        ValueError: There is none, its method is unknown, or an entry is missing or not of its kind.
    """
    file = folder / ABOUT
    if not os.path.lexists(file):
        raise ValueError(f"{folder} has no {ABOUT}: it is no folder of rankloss heads")
    about = read_json(file)
    if isinstance(about, dict):
        if _is_of_an_earlier_release(about):
            about = _with_todays_entries(about)
        elif about["method"] not in METHODS:
            known = ", ".join(METHODS)
            raise ValueError(
                f"{file}: its heads are of the method {about['method']!r}; this release has {known}"
            )
    check_entries(file, about, _ENTRIES)
    return dict(about)


def _is_of_an_earlier_release(about: Mapping[str, Any]) -> bool:
    """True for the entries of a folder with one trained head, which names no method."""
    return "method" not in about


def _with_todays_entries(about: dict[str, Any]) -> dict[str, Any]:
    """The entries of a folder of an earlier release in the form of today, but for the method."""
    about = {"pictures": asdict(Rendering()), **about}
    if isinstance(about.get("encoders"), dict):
        about["encoders"] = {"model": None, "pretrained": None, **about["encoders"]}
    part = {"method": TRAINED, "share": 1.0, "hidden": about.get("hidden"), "width": about.get("width")}
    about["parts"] = [part]
    return about


def _of_heads(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of the heads, without the encoders' features of fixed inputs beside them."""
    return {name: x for name, x in tensors.items() if not name.startswith(probing.PREFIX)}


def _constants_of_batch_norm(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of an earlier folder, whose statistics are those of batch normalisation, with constants.

    Its running mean began at 0 and its running variance at 1, of which n steps leave 0.9ⁿ. Without that share
    they are weighted means of the batches' own.
    """
    converted = dict(weights)
    absent = torch.tensor(0.0)  # which leads to a refusal, as its shape does not fit
    for name in NAMES:
        first_layer = f"{name}.0"
        mean = converted.pop(f"{first_layer}.running_mean", absent).double()
        variance = converted.pop(f"{first_layer}.running_var", absent).double()
        steps = converted.pop(f"{first_layer}.num_batches_tracked", absent).double()
        share_of_beginning = 0.9**steps
        mean = mean / (1 - share_of_beginning)
        variance = (variance - share_of_beginning) / (1 - share_of_beginning)
        converted[f"{first_layer}.mean"] = mean.float()
        converted[f"{first_layer}.std"] = (variance.clamp(min=0) + _EPSILON).sqrt().float()
    return converted


def make_heads(widths: dict[str, int], hidden: int, width: int, dropout: float = 0.0) -> nn.ModuleDict:
    """A head for each encoder, with random weights; dropout is of their training alone."""
    return nn.ModuleDict({name: Head(features, hidden, width, dropout) for name, features in widths.items()})
