"""Teachers: encoders of batches, and features that are stored already."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rankloss.checks import check_teacher
from rankloss_features.data import Sample
from rankloss_features.folder import NAMES, Array

IMAGES, TEXTS = NAMES
_CHOICES = "--model, --features, --image-encoder, --text-encoder, or the latter two"


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
        about: Its entries of ``features.json``, which identify it.
        encoders: One for each of the features that it gives.
        scale: The multiplier of its similarities; None where it has none.
        rows: The rows that it has features of; None for any.
    """

    about: dict[str, Any]
    encoders: dict[str, Encoder]
    scale: float | None = None
    rows: int | None = None

    @torch.inference_mode()
    def encode(self, prepared: dict[str, Any], device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """The features of a batch, of unit norm, computed in a dtype, on the CPU in float32."""
        features = {}
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            for name, encoder in self.encoders.items():
                inputs = prepared[name]
                inputs = inputs.to(device, non_blocking=True) if isinstance(inputs, Tensor) else inputs
                features[name] = F.normalize(encoder.encode(inputs).float(), dim=-1).cpu()
        return features


def load(args: Any, device: torch.device) -> Teacher:
    """The teacher that the command line names.

    Raises:
        ValueError: It is not installed, not found, or has no weights.
    """
    loaders = {"model": _open_clip, "features": _stored, "image_encoder": _timm, "text_encoder": _sentences}
    given = [name for name in loaders if getattr(args, name) is not None]
    if len(given) != 1 and given != ["image_encoder", "text_encoder"]:
        shown = " and ".join(f"--{name}" for name in given) or "none"
        raise ValueError(f"the teacher must be one of {_CHOICES}; got {shown.replace('_', '-')}")
    parts = []
    for name in given:
        flag = f"--{name.replace('_', '-')}"
        try:
            parts.append(loaders[name](args, device))
        except ImportError as error:
            raise ValueError(f"{flag} needs a package: pip install 'rankloss[features]' ({error})") from error
        except Exception as error:  # a library's error for a name that it does not know
            raise ValueError(f"{flag} {getattr(args, name)}: {type(error).__name__}: {error}") from error
    about = {key: value for part in parts for key, value in part.about.items()}
    encoders = {key: encoder for part in parts for key, encoder in part.encoders.items()}
    return Teacher(about, encoders, parts[0].scale, parts[0].rows)


def hash_of_weights(model: nn.Module) -> str:
    """SHA-256 of a model's parameters and buffers."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


# Functions that prepare samples are sent to other processes, where these are not forked.
def _pictures(transform: Callable[[Any], Tensor], samples: list[Sample]) -> Tensor:
    return torch.stack([transform(sample.open()) for sample in samples])


def _captions(samples: list[Sample]) -> list[str]:
    return [sample.caption for sample in samples]


def _tokens(tokenizer: Callable[[list[str]], Tensor], samples: list[Sample]) -> Tensor:
    return tokenizer(_captions(samples))


def _rows(array: Array, samples: list[Sample]) -> Tensor:
    return torch.from_numpy(array[[sample.row for sample in samples]].astype(np.float32))


def _open_clip(args: Any, device: torch.device) -> Teacher:
    import open_clip

    model, _, transform = open_clip.create_model_and_transforms(
        args.model, args.pretrained, device=device, require_pretrained=True
    )
    model.eval()
    tokenizer = open_clip.get_tokenizer(args.model)
    about = {"open_clip": args.model, "pretrained": args.pretrained, "weights": hash_of_weights(model)}
    with torch.inference_mode():
        width = model.encode_text(tokenizer([""]).to(device)).shape[1]
    encoders = {
        IMAGES: Encoder(partial(_pictures, transform), model.encode_image, width, needs_pictures=True),
        TEXTS: Encoder(partial(_tokens, tokenizer), model.encode_text, width),
    }
    return Teacher(about, encoders, float(model.logit_scale.detach().exp()))


def _sentences(args: Any, device: torch.device) -> Teacher:
    import sentence_transformers

    model = sentence_transformers.SentenceTransformer(args.text_encoder, device=str(device))

    def encode(captions: list[str]) -> Tensor:
        return model.encode(
            captions, batch_size=len(captions), convert_to_tensor=True, show_progress_bar=False
        )

    about = {"text_encoder": args.text_encoder, "text_weights": hash_of_weights(model)}
    encoder = Encoder(_captions, encode, encode([""]).shape[1])
    return Teacher(about, {TEXTS: encoder})


def _timm(args: Any, device: torch.device) -> Teacher:
    import timm
    from timm.data.config import resolve_model_data_config
    from timm.data.transforms_factory import create_transform

    model = timm.create_model(args.image_encoder, pretrained=True, num_classes=0).to(device).eval()
    config = resolve_model_data_config(model)  # type: ignore[no-untyped-call]
    with torch.inference_mode():
        width = model(torch.zeros(1, *config["input_size"], device=device)).shape[1]
    transform = create_transform(**config, is_training=False)
    about = {"image_encoder": args.image_encoder, "image_weights": hash_of_weights(model)}
    return Teacher(about, {IMAGES: Encoder(partial(_pictures, transform), model, width, needs_pictures=True)})


def _stored(args: Any, _: torch.device) -> Teacher:
    """Arrays that are there already, row i for row i of the data."""
    if os.path.isdir(args.features):
        files = {name: os.path.join(args.features, f"{name}.npy") for name in NAMES}
        arrays = {name: np.load(file, mmap_mode="c") for name, file in files.items() if os.path.isfile(file)}
    else:
        stored = np.load(args.features)
        if not isinstance(stored, np.lib.npyio.NpzFile):
            raise ValueError(f"a folder or .npz file of {' and '.join(NAMES)} is needed, not one array")
        arrays = {name: stored[name] for name in NAMES if name in stored.files}
    if not arrays:
        raise ValueError(f"there are neither {' nor '.join(NAMES)}")
    tensors = [torch.from_numpy(np.asarray(array)) for array in arrays.values()]
    for name, tensor in zip(arrays, tensors, strict=True):
        check_teacher(name, tensor, tensors[0], first_look=False)
    digests = {x: hashlib.sha256(np.ascontiguousarray(a).data).hexdigest() for x, a in arrays.items()}
    encoders = {x: Encoder(partial(_rows, a), lambda rows: rows, a.shape[1]) for x, a in arrays.items()}
    return Teacher({"features": digests}, encoders, rows=len(tensors[0]))
