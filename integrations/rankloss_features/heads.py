"""Heads on frozen encoders: two small networks that bring features of both into one space, and their folder.

::

    from rankloss_features.heads import load_heads

    model = load_heads("heads")
    scores = model.encode_images(["new.jpg"]) @ model.encode_texts(["a red shoe", "a blue hat"]).T

The folder has ``heads.json``, with the names of the encoders and the hashes of their weights, and
``heads.safetensors``.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rankloss
from rankloss.precision import unit_rows
from rankloss_features import image_encoders, opening, text_encoders
from rankloss_features.data import Sample
from rankloss_features.errors import named_errors
from rankloss_features.folder import (
    NAMES,
    SPACES,
    Entries,
    are_widths,
    check_entries,
    hash_of,
    is_count,
    read_json,
    write_bytes,
)
from rankloss_features.teachers import Encoder, Teacher

ABOUT, WEIGHTS = "heads.json", "heads.safetensors"
_IMAGES, _TEXTS = NAMES
_LOCAL = "local-dir:"  # timm's word for a folder


@dataclass(frozen=True)
class Encoders:
    """The two frozen encoders, by the names that ``rankloss features`` has for them."""

    image_encoder: str
    text_encoder: str
    image_weights: str | None = None

    def load(self, device: torch.device, batch_size: int) -> Teacher:
        """Load both.

        Raises:
            ValueError: One is not found or not installed.
        """
        with named_errors(f"--image-encoder {self.image_encoder}"):
            images = image_encoders.load(self.image_encoder, self.image_weights, device)
        with named_errors(f"--text-encoder {self.text_encoder}"):
            texts = text_encoders.load(self.text_encoder, batch_size, device)
        encoders = {**images.encoders, **texts.encoders}
        return Teacher({**images.about, **texts.about}, encoders, device=device, spaces=SPACES[1])


class Head(nn.Sequential):
    """Standardises an encoder's unit-norm features, and brings them into the common space, ``[n, width]``."""

    def __init__(self, features: int, hidden: int, width: int, dropout: float) -> None:
        super().__init__(
            nn.BatchNorm1d(features, affine=False),
            nn.Dropout(dropout),
            nn.Linear(features, hidden),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, width),
        )


class FrozenEncoders:
    """Two frozen encoders with their heads.

    Args:
        encoders: The names of the encoders.
        teacher: The encoders.
        heads: The head of each, by ``image_features`` and ``text_features``.
        scale: The multiplier of the similarities.
    """

    def __init__(self, encoders: Encoders, teacher: Teacher, heads: nn.ModuleDict, scale: float) -> None:
        self.encoders, self.scale = encoders, scale
        self.heads = heads.to(teacher.device).eval()
        self._frozen = teacher
        with_heads = {name: self._with_head(name, encoder) for name, encoder in teacher.encoders.items()}
        self.teacher = Teacher(teacher.about, with_heads, scale, device=teacher.device)
        """The same as :class:`rankloss_features.teachers.Teacher`, for ``rankloss evaluate``."""

    def _with_head(self, name: str, encoder: Encoder) -> Encoder:
        head: Any = self.heads[name]

        def encode(inputs: Any) -> Tensor:
            features: Tensor = head(unit_rows(encoder.encode(inputs).float()))
            return features

        return Encoder(encoder.prepare, encode, head[-1].out_features, encoder.needs_pictures)

    def encode_images(self, pictures: Sequence[Any]) -> Tensor:
        """The unit-norm features of pictures, paths or PIL's: ``[n, width]``."""
        opened = [
            x.convert("RGB") if hasattr(x, "convert") else opening.picture(os.fspath(x)) for x in pictures
        ]
        return self._encode(_IMAGES, [Sample(n, "", "", x.copy, n) for n, x in enumerate(opened)])

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """The unit-norm features of texts: ``[n, width]``."""
        return self._encode(_TEXTS, [Sample(n, "", text) for n, text in enumerate(texts)])

    def _encode(self, name: str, samples: list[Sample]) -> Tensor:
        encoder = self.teacher.encoders[name]
        one = Teacher({}, {name: encoder}, device=self.teacher.device)
        return one.encode({name: encoder.prepare(samples)}, torch.float32)[name]

    def save(self, folder: str | Path) -> None:
        """Write the heads and the names of their encoders into a folder.

        Raises:
            OSError: The disk is full, or the folder cannot be written.
        """
        from safetensors.torch import save

        place = Path(folder)
        place.mkdir(parents=True, exist_ok=True)
        first: Any = self.heads[_IMAGES]
        about = {
            "encoders": {name: _absolute(value) for name, value in asdict(self.encoders).items()},
            "weights": self._frozen.about,
            "widths": {name: encoder.width for name, encoder in self._frozen.encoders.items()},
            "hidden": first[2].out_features,
            "width": first[-1].out_features,
            "scale": self.scale,
        }
        weights = save({name: x.contiguous() for name, x in self.heads.state_dict().items()})
        about["hash"] = hash_of(weights).hex()  # an interruption between the files is seen by it
        write_bytes(place / WEIGHTS, weights)
        write_bytes(place / ABOUT, (json.dumps(about, indent=2) + "\n").encode())


def _absolute(name: str | None) -> str | None:
    """The absolute path of a file or folder, of ``local-dir:FOLDER`` too; other names as they are."""
    if name is None:
        return None
    scheme = _LOCAL if name.startswith(_LOCAL) else ""
    path = name.removeprefix(scheme)
    return scheme + os.path.abspath(path) if os.path.exists(path) else name


def _are_encoders(value: Any) -> bool:
    if not isinstance(value, dict) or {*value} != {field.name for field in fields(Encoders)}:
        return False
    weights = value["image_weights"]
    are_named = isinstance(value["image_encoder"], str) and isinstance(value["text_encoder"], str)
    return are_named and (weights is None or isinstance(weights, str))


_ENTRIES: Entries = {
    "encoders": (_are_encoders, "the names of two encoders"),
    "weights": (
        lambda value: isinstance(value, dict) and {"image_weights", "text_weights"} <= {*value},
        "the hashes of two encoders' weights",
    ),
    "widths": (lambda value: are_widths(value) and len(value) == len(NAMES), "a width from 1 for each"),
    "hidden": (is_count, "a width from 1"),
    "width": (is_count, "a width from 1"),
    "scale": (lambda value: type(value) is float and 0 < value < math.inf, "a number above 0"),
    "hash": (lambda value: isinstance(value, str), "a hash"),
}


def load_heads(folder: str | Path, device: str | torch.device = "cpu") -> FrozenEncoders:
    """Heads on frozen encoders, of a folder of ``rankloss heads``.

    Args:
        folder: The folder.
        device: The device that computes.

    Raises:
        ValueError: It is no such folder, an entry of it is missing or not of its kind, its weights are not as
            they were written, or an encoder is not found or has other weights than it was trained with.
    """
    place = Path(folder)
    if not os.path.lexists(place / ABOUT):
        raise ValueError(f"{folder} has no {ABOUT}: it is no folder of rankloss heads")
    about = read_json(place / ABOUT)
    check_entries(place / ABOUT, about, _ENTRIES)
    weights = (place / WEIGHTS).read_bytes() if (place / WEIGHTS).is_file() else b""
    if hash_of(weights).hex() != about["hash"]:
        raise ValueError(f"{place / WEIGHTS} is not as it was written with {ABOUT}: train the heads again")
    encoders = Encoders(**about["encoders"])
    teacher = encoders.load(torch.device(device), 64)
    for name in ("image_weights", "text_weights"):
        if teacher.about[name] != about["weights"][name]:
            raise ValueError(
                f"{folder} was trained on {name} {about['weights'][name]}; the encoder that is found has "
                f"{teacher.about[name]}"
            )
    with torch.device("meta"):  # the weights are the memory; a file may name any width
        heads = make_heads(about["widths"], about["hidden"], about["width"])
    opening.load_safetensors(heads, place / WEIGHTS)
    return FrozenEncoders(encoders, teacher, heads.float(), about["scale"])


def make_heads(widths: dict[str, int], hidden: int, width: int, dropout: float = 0.0) -> nn.ModuleDict:
    """A head for each encoder, with random weights; dropout is of their training alone."""
    return nn.ModuleDict({name: Head(features, hidden, width, dropout) for name, features in widths.items()})


# --- training ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Training:
    """The settings of a training.

    Attributes:
        epochs: Passes over the pairs.
        batch_size: Pairs of a step; all pairs if they are fewer.
        lr: The learning rate, which falls to 0 by a cosine.
        hidden: The width of a head's hidden layer.
        width: The width of the common space.
        seed: Of weights, dropout and the order of the pairs.
        dropout: The share of units that drop out, before each layer of a head.
        label_smoothing: Of CLIP's loss.
        spread_weight: The weight of the spread of each modality beside CLIP's loss; 0 leaves it out.
    """

    epochs: int = 20
    batch_size: int = 128
    lr: float = 1e-3
    hidden: int = 512
    width: int = 256
    seed: int = 0
    dropout: float = 0.3
    label_smoothing: float = 0.0
    spread_weight: float = 0.0


def train(
    features: dict[str, Tensor], ids: Tensor | None, settings: Training
) -> tuple[nn.ModuleDict, float, list[float]]:
    """Train heads on features of pairs with CLIP's loss, and spread if it has a weight.

    Pairs of one id are no negatives of each other.

    Args:
        features: ``image_features`` and ``text_features``, ``[N, D']`` each.
        ids: ``[N]``, or None.
        settings: The settings.

    Returns:
        The heads, the scale, and the mean loss of each epoch.
    """
    images, texts = features[_IMAGES], features[_TEXTS]
    criterion: nn.Module = rankloss.ClipLoss(
        label_smoothing=settings.label_smoothing, same_id=None if ids is None else "ignore", gather=False
    )
    if settings.spread_weight > 0:
        criterion = rankloss.SpreadLoss(criterion, weight=settings.spread_weight, gather=False)
    generator = torch.Generator().manual_seed(settings.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        widths = {name: x.shape[1] for name, x in features.items()}
        heads = make_heads(widths, settings.hidden, settings.width, settings.dropout)
        log_scale = nn.Parameter(torch.tensor(2.6593))  # log(1 / 0.07), as CLIP begins
        optimizer = torch.optim.AdamW([*heads.parameters(), log_scale], lr=settings.lr, weight_decay=0.05)
        size = min(settings.batch_size, len(images))
        steps = len(images) // size
        decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.epochs * steps)
        losses = []
        for _ in range(settings.epochs):
            total = 0.0
            for rows in torch.randperm(len(images), generator=generator).split(size)[:steps]:
                v = F.normalize(heads[_IMAGES](images[rows]), dim=-1)
                t = F.normalize(heads[_TEXTS](texts[rows]), dim=-1)
                of_pairs = {} if ids is None else {"pair_ids": ids[rows]}
                loss = criterion(v, t, log_scale.exp(), **of_pairs)
                loss.backward()
                optimizer.step()
                decay.step()
                optimizer.zero_grad()
                total += loss.item()
            losses.append(total / steps)
    return heads.eval(), float(log_scale.detach().exp()), losses
