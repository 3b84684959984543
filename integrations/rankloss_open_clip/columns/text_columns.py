"""Extra per-pair data travels with the caption, so that open_clip's loader carries it.

The trainer reads one text per image, tokenizes it, stacks the batch and calls ``model(images, texts)``. Only
the values differ:

- A caption has its columns beside it (:mod:`rankloss_open_clip.columns.captions`) from the moment it is read,
  in the column of a CSV file or in a webdataset sample. It stays the same caption to all steps between.
- The tokenizer of the training data gives integers, ``[n, 1 + columns, width]`` instead of ``[n, context]``.
- A hook before the model restores the tokens, and a hook behind it adds the columns to the model's output,
  from which they reach the loss. The model is called once, so DDP sees one forward.

Validation data, zero-shot prompts and ``encode_text`` have no columns and do not change. The rows of a
folder of features are a column, and so are those of a loss (``Named.columns``).
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rankloss_features.data import IMAGES
from rankloss_open_clip.columns.captions import Caption, CaptionsOfRows, EncodedCaption, text_of
from rankloss_open_clip.columns.csv_files import check_header, check_rows, forget_files, read_columns

Sample = dict[str, Any]
"""A webdataset sample: its members by their extensions."""

_MAX_MISSING = 100  # samples without a column, before the first with it


class TextColumn(Protocol):
    """One kind of data that travels with each text.

    Attributes:
        name: The noun for it in messages.
    """

    name: str

    def read_rows(self, path: str, separator: str, dataset: Any) -> Iterable[Any]:
        """Texts for the rows of a CSV file.

        Args:
            path: The file.
            separator: The separator of its columns.
            dataset: The trainer's dataset, with its ``captions`` and ``images``.

        Raises:
            ValueError: A row has none.
        """

    def read_sample(self, sample: Sample, caption: str, image: bytes) -> Any:
        """Text for a webdataset sample with this caption and this picture; None skips the sample.

        Raises:
            ValueError: The data are others than those that the column belongs to.
        """

    def encode(self, tokenize: Callable[[list[str]], Tensor], texts: list[str]) -> Tensor:
        """Texts as integers, ``[n, width]``."""

    def inputs(self, texts: Tensor, encoded: Tensor) -> Tensor:  # noqa: ARG002
        """Texts that the model is called with, given its texts so far and integers ``[B, ≥ width]``."""
        return texts

    def outputs(self, output: dict[str, Any], encoded: Tensor) -> dict[str, Any]:
        """Output of the model, with the features that the integers stand for."""


@dataclass(frozen=True)
class Members:
    """The members of a webdataset sample that the trainer takes, by their extensions, the preferred first.

    Attributes:
        captions: The extensions of captions.
        images: Those of pictures.
        skips_blank: The trainer skips samples with a blank caption.
    """

    captions: Sequence[str] = ("txt",)
    images: Sequence[str] = IMAGES
    skips_blank: bool = False

    def key_of_caption(self, sample: Sample) -> str | None:
        """The extension of a sample's caption; None of a sample that the trainer skips."""
        key = next((key for key in self.captions if key in sample), None)
        if key is None or self.image_of(sample) is None:
            return None
        is_skipped = self.skips_blank and not text_of(sample[key]).strip()
        return None if is_skipped else key

    def image_of(self, sample: Sample) -> Any:
        """A sample's picture, the content of its file; None without one."""
        return next((sample[key] for key in self.images if key in sample), None)


class TextColumns:
    """All columns of a run's training texts.

    Args:
        parts: The columns.

    Attributes:
        context: The tokens of a text, once :meth:`tokenizer` has asked for them.
    """

    context: int

    def __init__(self, parts: Sequence[TextColumn]) -> None:
        self.parts = parts
        self.name = " and a ".join(part.name for part in parts)

    # --- reading ------------------------------------------------------------------------------------------

    def check_csv(self, path: str, separator: str, image_key: str, caption_key: str) -> None:
        """Read the columns of a CSV file as the trainer will; see :meth:`TextColumn.read_rows`.

        Raises:
            ValueError: The file lacks a column, also one of the trainer's own, or a cell has swallowed rows.
        """
        if self.parts:
            images, captions = read_columns(path, separator, image_key, caption_key)
            rows = SimpleNamespace(images=images.tolist(), captions=captions.tolist())
            for part in self.parts:
                part.read_rows(path, separator, rows)
        elif os.path.exists(path):  # the trainer names a missing file
            check_header(path, separator, image_key, caption_key)
            check_rows(path, separator)
            forget_files()  # no column will be read

    def join_csv(self, dataset: Any, path: str, separator: str) -> None:
        """Put the columns beside the captions of the trainer's dataset; see :meth:`TextColumn.read_rows`."""
        columns = [part.read_rows(path, separator, dataset) for part in self.parts]
        forget_files()  # each part read its columns from one table in memory, which nothing needs any longer
        dataset.captions = CaptionsOfRows(dataset.captions, columns)

    def join_samples(
        self, read: Callable[..., Iterable[Sample]], members: Members, /, *args: Any, **kwargs: Any
    ) -> Iterator[Sample]:
        """Read webdataset samples as the trainer does, and put the columns beside the caption of each.

        Samples without a column are skipped, as the trainer skips those without a caption or a picture.

        Args:
            read: The trainer's reader.
            members: The members of a sample that the trainer takes.
            *args: Arguments of the reader.
            **kwargs: The same, by name.

        Raises:
            ValueError: None of the first hundred samples has all columns, or of all, if they are fewer.
        """
        any_has_columns = False
        missing = 0
        last_missing: Sample = {}
        for sample in read(*args, **kwargs):
            key = members.key_of_caption(sample)
            if key is None:
                yield sample  # which the trainer skips
                continue
            caption = text_of(sample[key])
            image = members.image_of(sample)
            texts = [part.read_sample(sample, caption, image) for part in self.parts]
            if None not in texts:
                any_has_columns = True
                sample[key] = EncodedCaption(sample[key], texts)
                yield sample
            else:
                missing += 1
                last_missing = sample
                if not any_has_columns and missing >= _MAX_MISSING:
                    break
        if missing and not any_has_columns:
            key = last_missing.get("__key__")
            names = ", ".join(name for name in last_missing if not name.startswith("__"))
            raise ValueError(
                f"none of {missing} samples has a {self.name}; the last one, {key!r}, has {names}"
            )

    # --- tokenizing ---------------------------------------------------------------------------------------

    def tokenizer(self, tokenizer: Any) -> Callable[[Any], Tensor]:
        """The trainer's tokenizer for texts with columns: ``[n, 1 + columns, width]``."""
        self.context = tokenizer([""]).shape[-1]  # which attach cuts the padded tokens to
        return functools.partial(_tokenized, tokenizer, self.parts)  # which other processes can be sent

    # --- the model ----------------------------------------------------------------------------------------

    def attach(self, model: nn.Module) -> None:
        """Let a model of open_clip take texts with columns, beside plain ones.

        Args:
            model: The model, in whatever DDP and ``torch.compile`` wrap around it.
        """
        held: list[Tensor] = []  # the columns of the present call, from ``before`` to ``after``

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
            """Replace texts with columns by their tokens, and keep the columns; plain texts stay."""
            held.clear()  # a call that failed has left its own
            by_position = args[1] if len(args) > 1 else None
            text = kwargs.get("text", by_position)
            if not isinstance(text, Tensor) or text.dim() != 3:  # with columns [n, 1 + columns, width]
                return None
            padded_tokens, *columns = text.unbind(1)  # as _tokenized has stacked them
            held.extend(columns)
            tokens = padded_tokens[:, : self.context].contiguous()
            for part, column in zip(self.parts, columns, strict=True):
                tokens = part.inputs(tokens, column)
            if "text" in kwargs:
                return args, {**kwargs, "text": tokens}
            return (args[0], tokens, *args[2:]), kwargs

        def after(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:  # noqa: ARG001
            """Add the columns to the output of a call whose texts had some."""
            if held:
                # The last texts that were appended are the first to be taken apart.
                for part, column in reversed(list(zip(self.parts, held, strict=True))):
                    output = part.outputs(output, column)
                held.clear()
            return output

        unwrapped = _unwrapped(model)
        unwrapped.register_forward_pre_hook(before, with_kwargs=True)
        unwrapped.register_forward_hook(after, with_kwargs=True)


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model that DDP (``module``) and ``torch.compile`` (``_orig_mod``) have wrapped."""
    while True:
        inner = getattr(model, "module", getattr(model, "_orig_mod", None))
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def _tokenized(tokenizer: Any, parts: Sequence[TextColumn], texts: str | list[str]) -> Tensor:
    """Tokenize every caption, encode its columns, and pad all to one width.

    Raises:
        TypeError: A caption has lost its columns.
    """

    def tokenize(captions: list[str]) -> Tensor:
        tokens: Tensor = tokenizer(captions)
        return tokens.long()

    captions = [texts] if isinstance(texts, str) else texts
    texts_of_captions = []
    for caption in captions:
        if not isinstance(caption, Caption):
            names = " and ".join(part.name for part in parts)
            raise TypeError(f"the trainer's data path has lost the {names} of caption {caption!r:.60}")
        texts_of_captions.append(caption.columns)
    texts_of_columns = zip(*texts_of_captions, strict=True)  # transposed: for each column its n texts
    encoded = [tokenize(list(captions))]
    for part, texts_of_column in zip(parts, texts_of_columns, strict=True):
        encoded.append(part.encode(tokenize, list(texts_of_column)))
    width = max(integers.shape[1] for integers in encoded)
    padded = [F.pad(integers, (0, width - integers.shape[1])) for integers in encoded]
    return torch.stack(padded, dim=1)
