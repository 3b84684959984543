"""The entries of a loss for one batch: its trained terms, and the metrics that are logged beside them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor


class Entries(NamedTuple):
    """The entries of a loss for one batch: scalars on the device of the features.

    Attributes:
        terms: The trained terms; their names end in ``_loss``.
        metrics: Logged values beside them, detached.
    """

    terms: dict[str, Tensor]
    metrics: dict[str, Tensor]

    @property
    def total(self) -> Tensor:
        """The sum of the terms."""
        first, *others = self.terms.values()
        return sum(others, first)

    @classmethod
    def of(cls, loss: object, entries: Mapping[str, Tensor]) -> Entries:
        """Separate the terms from the metrics, by their names.

        Args:
            loss: The loss, for the errors.
            entries: All of them.

        Raises:
            ValueError: There is no term, an entry is no tensor of one value, or a metric has a gradient,
                which would train nothing.
        """
        name_of_loss = getattr(loss, "__name__", type(loss).__name__)
        for name, value in entries.items():
            if not isinstance(value, Tensor) or value.numel() != 1:
                shown = tuple(value.shape) if isinstance(value, Tensor) else repr(value)
                raise ValueError(
                    f"{name_of_loss} must give each entry as a tensor of one value; {name} is {shown}"
                )
        terms = {name: value for name, value in entries.items() if name.endswith("_loss")}
        metrics = {name: value for name, value in entries.items() if name not in terms}
        if not terms:
            raise ValueError(f"{name_of_loss} gives no entry ending in _loss to train; got {list(entries)}")
        for name, value in metrics.items():
            if value.requires_grad:
                text = f"call it {name}_loss to train it, or detach it to log it"
                raise ValueError(f"{name_of_loss} gives {name!r} with a gradient: {text}")
        return cls(_all_in_the_graph(terms), metrics)


def _all_in_the_graph(terms: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same values; if any term requires a gradient, so do all, constants included.

    A rank term is a constant while λ is 0. If it began to require a gradient when λ rises above 0, a compiled
    trainer would be compiled again.
    """
    trained = next((value for value in terms.values() if value.requires_grad), None)
    if trained is None:
        return terms
    # 0 · trained requires a gradient; where it is finite, it changes neither a value nor a gradient.
    return {name: value if value.requires_grad else value + 0 * trained for name, value in terms.items()}


class LoggedTerms(dict[str, Tensor]):
    """The terms of a loss together with metrics that are logged but not trained.

    open_clip 3.x and sentence-transformers add up ``values()`` and log ``items()``; ``values()`` therefore
    leaves the metrics out.

    Args:
        terms: The terms.
        metrics: The metrics.
    """

    def __init__(self, terms: Mapping[str, Tensor], metrics: Mapping[str, Tensor]) -> None:
        super().__init__({**terms, **metrics})
        self._metrics = frozenset(metrics)

    def values(self) -> Any:
        """The terms only."""
        return [value for name, value in self.items() if name not in self._metrics]
