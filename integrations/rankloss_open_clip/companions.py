"""Lets something travel with the text of each image, without changing the trainer's data path.

The trainer reads one text per image, tokenizes it, stacks the batch and calls ``model(images, texts)``. All
of that stays; only the values differ:

- The text and its companion are one text, with a separator between, from the moment they are read: the
  column of a CSV file, the text of a webdataset sample.
- The tokenizer of the training data splits them, and puts the companion behind the tokens as further
  integers: ``[n, 1, context + width]`` instead of ``[n, context]``.
- A hook in front of the model splits ``[B, 1, context + width]`` into what the model takes and the rest, and
  one behind it adds the rest to the model's output, from where it reaches the loss. The model is called
  once, so DDP sees one forward.

Validation data, zero-shot prompts and ``encode_text`` have no companion and are not changed. The companions
are a second caption and a teacher's precomputed features (:mod:`rankloss_open_clip.reference_features`).
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

Sample = dict[str, Any]
"""A webdataset sample: its members by their extensions."""

_SEPARATOR = "\x1f"  # ASCII's own, which no caption contains
_MAX_MISSING = 100  # samples without a companion, before the first with one

COMPANION = "_rankloss_open_clip_companion"
"""The attribute of the trainer's training data that has what comes with their texts."""


class Companion(Protocol):
    """What travels with the text of each image.

    Attributes:
        name: What a message calls it.
        context: The length of a tokenized text.
    """

    name: str
    context: int = 0  # until the tokenizer is known

    def of_rows(self, path: str, separator: str, dataset: Any) -> Sequence[str]:
        """The companions of the rows of a CSV file, as text.

        Args:
            path: The file.
            separator: What separates the file's columns.
            dataset: What the trainer has read of it: its ``captions`` and ``images``.

        Raises:
            ValueError: A row has none.
        """

    def of_sample(self, sample: Sample, caption: str | None) -> str | None:
        """The companion of a webdataset sample and its caption, as text, or None."""

    def encode(self, tokenize: Callable[[list[str]], Tensor], companions: list[str]) -> Tensor:
        """Companions as integers, ``[n, width]``."""

    def texts(self, tokens: Tensor, companions: Tensor) -> Tensor:  # noqa: ARG002
        """What the model is called with, of ``[B, context]`` and ``[B, width]``."""
        return tokens

    def merge(self, output: dict[str, Any], companions: Tensor) -> dict[str, Any]:
        """The model's output with the companions, ``[B, width]``."""


class SecondCaption(Companion):
    """A second caption, whose features become ``caption_features`` of the model's output.

    Both captions are encoded in one call.

    Args:
        key: A column of a CSV file; in a webdataset the extension of a text file, or ``json:FIELD``.
    """

    def __init__(self, key: str) -> None:
        self.key = key
        self.name = f"second caption {key!r}"

    def of_rows(self, path: str, separator: str, dataset: Any) -> Sequence[str]:  # noqa: ARG002
        """See :class:`Companion`."""
        import pandas  # type: ignore[import-untyped]

        table = pandas.read_csv(path, sep=separator)
        if self.key not in table:
            raise ValueError(
                f"{path} has no column {self.key!r} for the second caption; it has {', '.join(table)}"
            )
        empty = table[self.key].isna()
        if empty.any():
            raise ValueError(
                f"{path} has no second caption in {int(empty.sum())} rows: column {self.key!r} is empty, "
                f"first in row {int(empty.argmax()) + 1}"
            )
        return [str(caption) for caption in table[self.key]]

    def of_sample(self, sample: Sample, caption: str | None) -> str | None:  # noqa: ARG002
        """See :class:`Companion`."""
        kind, _, field = self.key.partition(":")
        try:
            second = json.loads(sample["json"])[field] if kind == "json" else sample[self.key.lower()]
        except (KeyError, TypeError, ValueError):
            return None
        return None if second is None else _text(second)

    def encode(self, tokenize: Callable[[list[str]], Tensor], companions: list[str]) -> Tensor:
        """See :class:`Companion`."""
        return tokenize(companions)

    def texts(self, tokens: Tensor, companions: Tensor) -> Tensor:
        """The first captions, then the second ones."""
        return torch.cat([tokens, companions])

    def merge(self, output: dict[str, Any], companions: Tensor) -> dict[str, Any]:  # noqa: ARG002
        """The features of both captions, apart."""
        first, second = output["text_features"].chunk(2)
        return {**output, "text_features": first, "caption_features": second}


# --- reading --------------------------------------------------------------------------------------------


def join_csv(dataset: Any, path: str, separator: str, companion: Companion) -> None:
    """Add companions to the captions of the trainer's CSV dataset.

    Args:
        dataset: The trainer's ``CsvDataset``.
        path: Its file.
        separator: What separates the file's columns.
        companion: What is added.

    Raises:
        ValueError: A row has no companion.
    """
    first = dataset.captions
    second = companion.of_rows(path, separator, dataset)
    dataset.captions = type(first)([joined(a, b) for a, b in zip(first, second, strict=True)])


def joined_samples(
    read: Callable[..., Iterable[Sample]], companion: Companion, text_keys: str, *args: Any, **kwargs: Any
) -> Iterator[Sample]:
    """Read webdataset samples as the trainer does, and add the companion to the text of each.

    Samples without a companion are skipped, as the trainer skips those without a caption.

    Args:
        read: The trainer's own reader.
        companion: What is added.
        text_keys: The extension of the caption; several, by preference, are separated by ``;``.
        *args: What the reader is called with.
        **kwargs: The same, by name.

    Raises:
        ValueError: None of the first hundred samples has a companion, or none at all.
    """
    found = missing = 0
    sample: Sample = {}
    for sample in read(*args, **kwargs):
        text_key = next((name for name in text_keys.split(";") if name in sample), None)
        second = companion.of_sample(sample, None if text_key is None else _text(sample[text_key]))
        if text_key is not None and second is not None:
            found += 1
            sample[text_key] = joined(sample[text_key], second).encode()
            yield sample
        elif second is None:
            missing += 1
            if not found and missing >= _MAX_MISSING:
                break
    if missing and not found:
        members = ", ".join(name for name in sample if not name.startswith("__"))
        raise ValueError(
            f"none of {missing} samples has a {companion.name}; the last one, {sample.get('__key__')!r}, "
            f"has {members}"
        )


def joined(first: Any, second: Any, separator: str = _SEPARATOR) -> str:
    """Two texts as one, which splits at the separator into these two."""
    return separator.join(_text(part).replace(separator, " ") for part in (first, second))


def _text(value: Any) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


# --- tokenizing -----------------------------------------------------------------------------------------


def joined_tokenizer(tokenizer: Any, companion: Companion) -> Callable[[str | list[str]], Tensor]:
    """The trainer's tokenizer applied to n texts with companions: ``[n, 1, context + width]``."""
    companion.context = tokenizer([""]).shape[-1]
    return functools.partial(_tokenized, tokenizer, companion)  # which other processes can be sent


def _tokenized(tokenizer: Any, companion: Companion, texts: str | list[str]) -> Tensor:
    """Tokenize every text and encode its companion."""
    pairs = [text.split(_SEPARATOR) for text in ([texts] if isinstance(texts, str) else texts)]

    def tokenize(captions: list[str]) -> Tensor:
        tokens: Tensor = tokenizer(captions)
        return tokens.long()

    captions, companions = (list(column) for column in zip(*pairs, strict=True))
    return torch.cat([tokenize(captions), companion.encode(tokenize, companions)], dim=1)[:, None]


# --- the model ------------------------------------------------------------------------------------------


def split_features(model: nn.Module, companion: Companion) -> None:
    """Let a model of open_clip take texts with companions, beside plain ones.

    Args:
        model: The model, in whatever DDP and ``torch.compile`` wrap around it.
        companion: What comes with the texts.
    """
    while isinstance(inner := getattr(model, "module", getattr(model, "_orig_mod", None)), nn.Module):
        model = inner
    held: list[Tensor] = []  # the companions of the present call

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        held.clear()
        text = kwargs.get("text", args[1] if len(args) > 1 else None)
        if not isinstance(text, Tensor) or text.dim() != 3:
            return None
        tokens, companions = (x.contiguous() for x in text[:, 0].tensor_split([companion.context], dim=1))
        held.append(companions)
        text = companion.texts(tokens, companions)
        return (args, {**kwargs, "text": text}) if "text" in kwargs else ((args[0], text, *args[2:]), kwargs)

    def after(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:  # noqa: ARG001
        return companion.merge(output, held.pop()) if held else None

    model.register_forward_pre_hook(before, with_kwargs=True)
    model.register_forward_hook(after, with_kwargs=True)
