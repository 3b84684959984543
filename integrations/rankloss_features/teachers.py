"""Teachers: encoders of batches of pairs, and the batches."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset, get_worker_info

from rankloss.precision import unit_rows
from rankloss_features.data import Data, Sample, Spans
from rankloss_features.folder import COMMON_SPACE, Features, identity_of
from rankloss_features.opening import content_of
from rankloss_features.pictures import Rendering


@dataclass(frozen=True)
class Encoder:
    """The encoder of one modality.

    Attributes:
        prepare: From samples to the encoder's inputs; called in the processes that read the data.
        encode: From the inputs to ``[n, D']`` features.
        width: D'.
        needs_pictures: True if the samples' pictures are opened.
    """

    prepare: Callable[[list[Sample]], Any]
    encode: Callable[[Any], Tensor]
    width: int
    needs_pictures: bool = False


@dataclass(frozen=True)
class Teacher:
    """A teacher of images, of texts, or of both.

    Attributes:
        about: Its entries of ``folder.json``, which identify it.
        encoders: One for each of the features that it gives.
        scale: The multiplier of its similarities; None where it has none.
        rows: The rows that it has features of; None for any.
        device: The device that it computes on.
        spaces: One of :data:`rankloss_features.folder.SPACES`.
        stored: The folder that has its rows, if it is one.
        rendering: The way to its pictures; None for the data's.
    """

    about: dict[str, Any]
    encoders: dict[str, Encoder]
    scale: float | None = None
    rows: int | None = None
    device: torch.device = torch.device("cpu")
    spaces: str = COMMON_SPACE
    stored: Features | None = None
    rendering: Rendering | None = None

    @torch.inference_mode()
    def encode(self, prepared: dict[str, Any], dtype: torch.dtype) -> dict[str, Tensor]:
        """The features of a batch, ``[n, D']`` of each modality, of unit norm, on the CPU and in float32.

        Args:
            prepared: The inputs of each encoder, by its modality.
            dtype: The dtype in which the encoders compute.
        """
        features = {}
        with torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32):
            for name, encoder in self.encoders.items():
                inputs = prepared[name]
                if isinstance(inputs, Tensor):
                    inputs = inputs.to(self.device, non_blocking=True)
                features[name] = unit_rows(encoder.encode(inputs).float()).cpu()
        return features


def hash_of_weights(model: nn.Module) -> str:
    """SHA-256 of a model's parameters and buffers."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


# A function of a module, since it is pickled for the processes that read data, where these are not forked.
def pictures(transform: Callable[[Any], Tensor], samples: list[Sample]) -> tuple[Tensor, list[int]]:
    """The pixels of the distinct pictures, each transformed once, and each sample's place among them."""
    place_of: dict[Any, int] = {}  # by the identity of the picture
    places: list[int] = []
    pixels: list[Tensor] = []
    for sample in samples:
        if sample.source not in place_of:
            place_of[sample.source] = len(pixels)
            pixels.append(transform(sample.open()))
        places.append(place_of[sample.source])
    return torch.stack(pixels), places


def image_encoder(
    transform: Callable[[Any], Tensor],
    encode: Callable[[Tensor], Tensor],
    width: int,
    device: torch.device,
) -> Encoder:
    """The encoder of images by a model, which sees each picture of a batch once.

    Args:
        transform: From a picture to its pixels.
        encode: From pixels to features.
        width: The number of features.
        device: The model's device.
    """

    def features(pixels_and_places: tuple[Tensor, list[int]]) -> Tensor:
        pixels, places = pixels_and_places
        return encode(pixels.to(device, non_blocking=True))[places]

    return Encoder(partial(pictures, transform), features, width, needs_pictures=True)


def captions(samples: list[Sample]) -> list[str]:
    """The samples' captions."""
    return [sample.caption for sample in samples]


class Batches(IterableDataset[Any]):
    """The batches of some groups of batches, prepared for the teacher.

    A batch holds the same rows in every run: a row's last bits may depend on the others of its batch.

    Yields:
        The batch's first row and the row after its last, the rows of its samples that can be read, the
        identities of their pictures, and the teacher's inputs. Without an encoder of pictures no picture is
        read, and there are no identities.
    """

    def __init__(self, data: Data, groups: list[tuple[int, Spans]], teacher: Teacher) -> None:
        self.data, self.groups = data, groups
        self.rendering = teacher.rendering or data.rendering
        self.prepare = {name: encoder.prepare for name, encoder in teacher.encoders.items()}
        self.needs_pictures = any(encoder.needs_pictures for encoder in teacher.encoders.values())

    def __iter__(self) -> Iterator[Any]:
        """The batches of this process, one of those that read."""
        worker = get_worker_info()
        groups = self.groups if worker is None else self.groups[worker.id :: worker.num_workers]
        for shard, spans in groups:
            for span, samples in zip(spans, self.data.read(shard, spans), strict=True):
                identities = []
                if self.needs_pictures:
                    samples = list(self._readable(samples))
                    identities = [sample.source for sample in samples]
                rows = [sample.row for sample in samples]
                prepared = {name: prepare(samples) for name, prepare in self.prepare.items() if samples}
                yield span, rows, identities, prepared

    def _readable(self, samples: list[Sample]) -> Iterator[Sample]:
        """The samples whose pictures can be read, with these and their identities.

        A picture is read once for all samples that have its path or its content.

        Raises:
            ValueError: A picture cannot be read, and the data are no stream, whose trainer would skip it.
        """
        identity_of_source: dict[Any, str] = {}  # a source is a path, or the picture's bytes
        pictures: dict[str, Any] = {}  # by identity
        for sample in samples:
            try:
                if sample.source is None:  # as in a table with an empty cell
                    raise ValueError("there is none")
                if sample.source not in identity_of_source:
                    content = content_of(sample.source)
                    identity = identity_of(content)
                    if identity not in pictures:
                        pictures[identity] = self.rendering.open(content)
                    identity_of_source[sample.source] = identity
                identity = identity_of_source[sample.source]
                yield sample._replace(open=pictures[identity].copy, source=identity)
            except Exception as error:  # Pillow raises many
                if not self.data.is_stream:
                    where = f"row {sample.row}: the picture of {sample.name!r}"
                    raise ValueError(f"{where} cannot be read: {error}") from error
