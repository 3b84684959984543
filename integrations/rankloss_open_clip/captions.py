"""Adds a second caption per image without changing the trainer's data path.

The trainer reads one text per image, tokenizes it, stacks the batch and calls ``model(images, texts)``. All
of that stays; only the values differ:

- Both captions are one text, with a separator between, from the moment they are read: the column of a CSV
  file, the text of a webdataset sample.
- The tokenizer of the training data splits them and gives ``[2, context]`` instead of ``[context]``.
- A hook in front of the model reshapes ``[B, 2, context]`` to ``[2·B, context]``, and one behind it splits
  the text features: the first captions' are ``text_features``, the second ones' ``caption_features``. The
  model is called once, so DDP sees one forward.

Validation data, zero-shot prompts and ``encode_text`` have one caption and are not changed.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

_SEPARATOR = "\x1f"  # ASCII's own, which no caption contains
_PATIENCE = 100  # samples without a second caption, before the first with one

_HOOKED = "_rankloss_open_clip_captions"


def refuse(args: Any) -> str | None:
    """Why the trainer's arguments rule out a second caption, or None."""
    if getattr(args, "dataset_type", None) == "synthetic":
        return "--dataset-type synthetic has no second caption"
    if getattr(args, "distill_model", None) and getattr(args, "distill_pretrained", None):
        return f"{args.loss} does not work with --distill-model: the teacher takes one caption per image"
    if "coca" in args.model.lower():
        return f"{args.loss} does not work with CoCa: its decoder takes one caption per image"
    if getattr(args, "torchscript", False):
        return f"{args.loss} does not work with --torchscript: a compiled model takes one caption per image"
    # Options of open_clip's later trainer.
    for option in ("json_text_key", "variable_text"):
        if getattr(args, option, None):
            return f"{args.loss} does not work with --{option.replace('_', '-')}"
    return None


# --- reading --------------------------------------------------------------------------------------------


def join_csv(dataset: Any, path: str, separator: str, key: str) -> None:
    """Add the second caption to those of the trainer's CSV dataset.

    Args:
        dataset: The trainer's ``CsvDataset``.
        path: Its file.
        separator: What separates the file's columns.
        key: The column of the second caption.

    Raises:
        ValueError: There is no such column, or it has empty cells.
    """
    import pandas  # type: ignore[import-untyped]

    columns = list(pandas.read_csv(path, sep=separator, nrows=0).columns)
    if key not in columns:
        raise ValueError(f"{path} has no column {key!r} for the second caption; it has {', '.join(columns)}")
    second = pandas.read_csv(path, sep=separator, usecols=[key])[key]
    empty = second.isna()
    if empty.any():
        raise ValueError(
            f"{path} has no second caption in {int(empty.sum())} rows: column {key!r} is empty, first in row "
            f"{int(empty.argmax()) + 1}"
        )
    first = dataset.captions
    dataset.captions = type(first)([_joined(a, b) for a, b in zip(first, second, strict=True)])


class JoinedSamples:
    """A reader of webdataset samples that adds the second caption to the text of each.

    Samples without a second caption are skipped, as the trainer skips those without a first.

    Args:
        read: The trainer's own reader.
        key: The extension of a text file, or ``json:FIELD``.
        text_key: The extension of the first caption; several, by preference, are separated by ``;``.
    """

    def __init__(
        self, read: Callable[..., Iterable[dict[str, Any]]], key: str, text_key: str = "txt"
    ) -> None:
        self.read = read
        self.key = key
        self.text_keys = text_key.split(";")

    def __call__(self, *args: Any, **kwargs: Any) -> Iterator[dict[str, Any]]:
        """Read samples as the trainer's reader does.

        Raises:
            ValueError: None of the first hundred samples has a second caption, or none at all.
        """
        found = missing = 0
        sample: dict[str, Any] = {}
        for sample in self.read(*args, **kwargs):
            text_key = next((name for name in self.text_keys if name in sample), None)
            second = self._second(sample)
            if text_key is not None and second is not None:
                found += 1
                sample[text_key] = _joined(sample[text_key], second).encode()
                yield sample
            elif second is None:
                missing += 1
                if not found and missing >= _PATIENCE:
                    break
        if missing and not found:
            members = ", ".join(name for name in sample if not name.startswith("__"))
            raise ValueError(
                f"none of {missing} samples has a second caption {self.key!r}; the last one, "
                f"{sample.get('__key__')!r}, has {members}"
            )

    def _second(self, sample: dict[str, Any]) -> str | None:
        kind, _, name = self.key.partition(":")
        if kind != "json" or not name:
            second = sample.get(self.key.lower())
        else:
            try:
                second = json.loads(sample["json"])[name]
            except (KeyError, TypeError, ValueError):
                second = None
        return None if second is None else _text(second)


def _joined(first: Any, second: Any) -> str:
    return _SEPARATOR.join(_text(caption).replace(_SEPARATOR, " ") for caption in (first, second))


def _text(caption: Any) -> str:
    return caption.decode(errors="replace") if isinstance(caption, bytes) else str(caption)


# --- tokenizing -----------------------------------------------------------------------------------------


class PairTokenizer:
    """The trainer's tokenizer applied to n joined captions: ``[n, 2, context]``."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def __getattr__(self, name: str) -> Any:
        if name == "tokenizer":  # not set yet (copy, pickle): do not look it up in itself
            raise AttributeError(name)
        return getattr(self.tokenizer, name)

    def __call__(self, texts: str | list[str], *args: Any, **kwargs: Any) -> Tensor:
        """Tokenize both captions of every text.

        Raises:
            ValueError: A text is not two joined captions.
        """
        pairs = [text.split(_SEPARATOR) for text in ([texts] if isinstance(texts, str) else texts)]
        for pair in pairs:
            if len(pair) != 2:
                raise ValueError(f"a training text must be two joined captions, got {len(pair)}: {pair!r}")
        tokens: Tensor = self.tokenizer([caption for pair in pairs for caption in pair], *args, **kwargs)
        return tokens.view(len(pairs), 2, -1)


# --- the model ------------------------------------------------------------------------------------------


def split_features(model: nn.Module) -> None:
    """Let a model of open_clip take two captions per image, beside one.

    Args:
        model: The model, in whatever DDP and ``torch.compile`` wrap around it. Safe to call twice.
    """
    while isinstance(inner := getattr(model, "module", getattr(model, "_orig_mod", None)), nn.Module):
        model = inner
    if getattr(model, _HOOKED, False):
        return
    model.register_forward_pre_hook(_stack, with_kwargs=True)
    model.register_forward_hook(_share_out, with_kwargs=True)
    setattr(model, _HOOKED, True)


def _stack(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
    text = _input("text", 1, args, kwargs)
    if not isinstance(text, Tensor) or text.dim() != 3:
        return None
    text = text.transpose(0, 1).flatten(0, 1)  # the first captions, then the second ones
    if "text" in kwargs:
        return args, {**kwargs, "text": text}
    return (args[0], text, *args[2:]), kwargs


def _share_out(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    image, text = _input("image", 0, args, kwargs), _input("text", 1, args, kwargs)
    if image is None or text is None or len(text) != 2 * len(image):
        return None
    first, second = output["text_features"].chunk(2)
    return {**output, "text_features": first, "caption_features": second}


def _input(name: str, position: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return kwargs.get(name, args[position] if position < len(args) else None)
