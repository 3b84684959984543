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

import json
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

_SEPARATOR = "\x1f"  # ASCII's own, which no caption contains
_MAX_MISSING = 100  # samples without a companion, before the first with one

_HOOKED = "_rankloss_open_clip_companion"


class Companion(ABC):
    """What travels with the text of each image.

    Attributes:
        name: What a message calls it.
        context: The length of a tokenized text.
    """

    name: str
    context: int

    @abstractmethod
    def of_rows(self, path: str, separator: str, dataset: Any) -> Sequence[str]:
        """The companions of the rows of a CSV file, as text.

        Args:
            path: The file.
            separator: What separates the file's columns.
            dataset: What the trainer has read of it: its ``captions`` and ``images``.

        Raises:
            ValueError: A row has none.
        """

    @abstractmethod
    def of_sample(self, sample: dict[str, Any], caption: str) -> str | None:
        """The companion of a webdataset sample and its caption, as text, or None."""

    @abstractmethod
    def encode(self, tokenize: Callable[[list[str]], Tensor], companions: list[str]) -> Tensor:
        """Companions as integers, ``[n, width]``."""

    def texts(self, tokens: Tensor, companions: Tensor) -> Tensor:  # noqa: ARG002
        """What the model is called with, of ``[B, context]`` and ``[B, width]``."""
        return tokens

    @abstractmethod
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

        columns = list(pandas.read_csv(path, sep=separator, nrows=0).columns)
        if self.key not in columns:
            raise ValueError(
                f"{path} has no column {self.key!r} for the second caption; it has {', '.join(columns)}"
            )
        second = pandas.read_csv(path, sep=separator, usecols=[self.key])[self.key]
        empty = second.isna()
        if empty.any():
            raise ValueError(
                f"{path} has no second caption in {int(empty.sum())} rows: column {self.key!r} is empty, "
                f"first in row {int(empty.argmax()) + 1}"
            )
        captions: list[str] = second.tolist()
        return captions

    def of_sample(self, sample: dict[str, Any], caption: str) -> str | None:  # noqa: ARG002
        """See :class:`Companion`."""
        kind, _, name = self.key.partition(":")
        if kind != "json" or not name:
            second = sample.get(self.key.lower())
        else:
            try:
                second = json.loads(sample["json"])[name]
            except (KeyError, TypeError, ValueError):
                second = None
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
    dataset.captions = type(first)([_joined(a, b) for a, b in zip(first, second, strict=True)])


class JoinedSamples:
    """A reader of webdataset samples that adds the companion to the text of each.

    Samples without a companion are skipped, as the trainer skips those without a caption.

    Args:
        read: The trainer's own reader.
        companion: What is added.
        text_key: The extension of the caption; several, by preference, are separated by ``;``.
    """

    def __init__(
        self, read: Callable[..., Iterable[dict[str, Any]]], companion: Companion, text_key: str = "txt"
    ) -> None:
        self.read = read
        self.companion = companion
        self.text_keys = text_key.split(";")

    def __call__(self, *args: Any, **kwargs: Any) -> Iterator[dict[str, Any]]:
        """Read samples as the trainer's reader does.

        Raises:
            ValueError: None of the first hundred samples has a companion, or none at all.
        """
        found = missing = 0
        sample: dict[str, Any] = {}
        for sample in self.read(*args, **kwargs):
            text_key = next((name for name in self.text_keys if name in sample), None)
            caption = "" if text_key is None else _text(sample[text_key])
            second = self.companion.of_sample(sample, caption)
            if text_key is not None and second is not None:
                found += 1
                sample[text_key] = _joined(sample[text_key], second).encode()
                yield sample
            elif second is None:
                missing += 1
                if not found and missing >= _MAX_MISSING:
                    break
        if missing and not found:
            members = ", ".join(name for name in sample if not name.startswith("__"))
            raise ValueError(
                f"none of {missing} samples has a {self.companion.name}; the last one, "
                f"{sample.get('__key__')!r}, has {members}"
            )


def _joined(first: Any, second: Any) -> str:
    return _SEPARATOR.join(_text(part).replace(_SEPARATOR, " ") for part in (first, second))


def _text(value: Any) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


# --- tokenizing -----------------------------------------------------------------------------------------


class JoinedTokenizer:
    """The trainer's tokenizer applied to n texts with companions: ``[n, 1, context + width]``."""

    def __init__(self, tokenizer: Any, companion: Companion) -> None:
        self.tokenizer = tokenizer
        self.companion = companion
        companion.context = tokenizer([""]).shape[-1]

    def __getattr__(self, name: str) -> Any:
        if name == "tokenizer":  # not set yet (copy, pickle): do not look it up in itself
            raise AttributeError(name)
        return getattr(self.tokenizer, name)

    def __call__(self, texts: str | list[str]) -> Tensor:
        """Tokenize every text and encode its companion.

        Raises:
            ValueError: A text has no companion.
        """
        pairs = [text.split(_SEPARATOR) for text in ([texts] if isinstance(texts, str) else texts)]
        for pair in pairs:
            if len(pair) != 2:
                raise ValueError(
                    f"a training text must be joined with a {self.companion.name}, got {len(pair)} parts: "
                    f"{pair!r}"
                )

        def tokenize(captions: list[str]) -> Tensor:
            tokens: Tensor = self.tokenizer(captions)
            return tokens.long()

        captions, companions = (list(column) for column in zip(*pairs, strict=True))
        return torch.cat([tokenize(captions), self.companion.encode(tokenize, companions)], dim=1)[:, None]


# --- the model ------------------------------------------------------------------------------------------


def split_features(model: nn.Module, companion: Companion) -> None:
    """Let a model of open_clip take texts with companions, beside plain ones.

    Args:
        model: The model, in whatever DDP and ``torch.compile`` wrap around it. Safe to call twice.
        companion: What comes with the texts.
    """
    while isinstance(inner := getattr(model, "module", getattr(model, "_orig_mod", None)), nn.Module):
        model = inner
    if getattr(model, _HOOKED, False):
        return
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
    setattr(model, _HOOKED, True)
