"""Lets something travel with the text of each image, without changing the trainer's data path.

The trainer reads one text per image, tokenizes it, stacks the batch and calls ``model(images, texts)``. All
of that stays; only the values differ:

- The text and its companion are one text, with a separator between, from the moment they are read: the
  column of a CSV file, the text of a webdataset sample.
- The tokenizer of the training data splits them and gives ``[rows, width]`` integers instead of
  ``[context]``.
- A hook in front of the model turns ``[B, rows, width]`` into what the model takes, and one behind it adds
  the rest to the model's output, from where it reaches the loss. The model is called once, so DDP sees one
  forward.

Validation data, zero-shot prompts and ``encode_text`` have no companion and are not changed. The companions
are a second caption (:mod:`rankloss_open_clip.captions`) and a teacher's features
(:mod:`rankloss_open_clip.reference_features`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

_SEPARATOR = "\x1f"  # ASCII's own, which no caption contains
_PATIENCE = 100  # samples without a companion, before the first with one

_HOOKED = "_rankloss_open_clip_companion"


class Companion(ABC):
    """What travels with the text of each image.

    Attributes:
        name: What a message calls it.
    """

    name: str

    def prepare(self, tokenizer: Any) -> None:  # noqa: B027 (not every companion has something to learn)
        """Learn from the trainer's tokenizer what :meth:`take_off` depends on."""

    @abstractmethod
    def of_rows(self, path: str, separator: str, count: int) -> Sequence[str]:
        """The companions of the rows of a CSV file, as text.

        Args:
            path: The file.
            separator: What separates the file's columns.
            count: The number of its rows.

        Raises:
            ValueError: A row has none.
        """

    @abstractmethod
    def of_sample(self, sample: dict[str, Any]) -> str | None:
        """The companion of a webdataset sample, as text, or None."""

    @abstractmethod
    def encode(self, tokenize: Callable[[list[str]], Tensor], pairs: list[tuple[str, str]]) -> Tensor:
        """Texts and their companions as integers, ``[n, rows, width]``."""

    @abstractmethod
    def take_off(self, text: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The model's texts, ``[M, context]``, of ``[B, rows, width]``, and what is to join its output."""

    def share_out(self, output: dict[str, Any], taken: dict[str, Tensor]) -> dict[str, Any]:
        """The model's output with what was taken off its texts."""
        return {**output, **taken}


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
    second = companion.of_rows(path, separator, len(first))
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
            second = self.companion.of_sample(sample)
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
                f"none of {missing} samples has a {self.companion.name}; the last one, "
                f"{sample.get('__key__')!r}, has {members}"
            )


def _joined(first: Any, second: Any) -> str:
    return _SEPARATOR.join(as_text(part).replace(_SEPARATOR, " ") for part in (first, second))


def as_text(value: Any) -> str:
    """A text from what a reader gives for it."""
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


# --- tokenizing -----------------------------------------------------------------------------------------


class JoinedTokenizer:
    """The trainer's tokenizer applied to n texts with companions: ``[n, rows, width]``."""

    def __init__(self, tokenizer: Any, companion: Companion) -> None:
        self.tokenizer = tokenizer
        self.companion = companion
        companion.prepare(tokenizer)

    def __getattr__(self, name: str) -> Any:
        if name == "tokenizer":  # not set yet (copy, pickle): do not look it up in itself
            raise AttributeError(name)
        return getattr(self.tokenizer, name)

    def __call__(self, texts: str | list[str], *args: Any, **kwargs: Any) -> Tensor:
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
        return self.companion.encode(
            lambda captions: self.tokenizer(captions, *args, **kwargs), [(a, b) for a, b in pairs]
        )


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
    held: list[dict[str, Tensor]] = []  # what was taken off the texts of the present call

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        held.clear()
        text = kwargs.get("text", args[1] if len(args) > 1 else None)
        if not isinstance(text, Tensor) or text.dim() != 3:
            return None
        text, taken = companion.take_off(text)
        held.append(taken)
        return (args, {**kwargs, "text": text}) if "text" in kwargs else ((args[0], text, *args[2:]), kwargs)

    def after(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:  # noqa: ARG001
        return companion.share_out(output, held.pop()) if held else None

    model.register_forward_pre_hook(before, with_kwargs=True)
    model.register_forward_hook(after, with_kwargs=True)
    setattr(model, _HOOKED, True)
