"""The weights of a loss's terms: checked numbers, and a tensor of them beside the features."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from rankloss.precision import dtype_of_numbers

__all__ = ["FixedWeights", "TermWeights", "as_number", "check_weight", "is_capturing", "is_plain"]


def check_weight(name: str, value: float) -> float:
    """``value`` as a float, or a ValueError that names the argument unless it is finite and at least 0."""
    if isinstance(value, Tensor) and value.requires_grad:
        raise ValueError(f"{name} is a number and takes no gradient; got a tensor that requires one")
    number = as_number(value)
    if not (math.isfinite(number) and number >= 0):
        raise ValueError(f"{name} must be finite and >= 0; got {value!r}")
    return number


def as_number(value: Any) -> float:
    """``value`` as a float; NaN for what is not a number."""
    try:
        return math.nan if isinstance(value, (str, bytes)) else float(value)
    except (TypeError, ValueError, RuntimeError):  # the last for a meta tensor
        return math.nan


class FixedWeights:
    """A module whose weights are read while it is built: to set one later is an error, not without effect."""

    _fixed: ClassVar[frozenset[str]]

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self._fixed and name in self.__dict__:
            raise AttributeError(
                f"{name} cannot be changed once {type(self).__name__} is built; build another"
            )
        super().__setattr__(name, value)


class TermWeights:
    """What the terms of a loss are multiplied by, also as a tensor on each device where the loss is called.

    The numbers in ``values`` are the truth; a copy or a pickle holds nothing else. :meth:`beside` gives them
    as a tensor, which :meth:`set` changes in place: a captured CUDA graph and a compiled one read the tensor
    and so follow, without a new capture or compilation and without waiting for the device.

    Example:
        >>> weights = TermWeights(1.0, 0.5)
        >>> seen = weights.beside(torch.eye(2))
        >>> weights.set(1.0, 0.25)
        >>> seen
        tensor([1.0000, 0.2500], dtype=torch.float64)
    """

    def __init__(self, *values: float) -> None:
        self.values = values
        self._tensors: list[Tensor] = []
        self._wanted: torch.device | None = None
        self._add(torch.device("cpu"))

    def set(self, *values: float) -> None:
        """Change the values, and with them every tensor that :meth:`beside` has given."""
        self.values = values
        for tensor in self._tensors:
            _fill(tensor, values)
        if self._wanted is not None:
            self._add(self._wanted)

    def beside(self, features: Tensor) -> Tensor:
        """The values as a tensor on the features' device: float64, or float32 on MPS, which has no float64.

        Raises:
            RuntimeError: at the first call for a device while a CUDA graph is captured. A tensor made there
                would be filled again with the same values at each replay.
        """
        device = features.device
        if not is_plain(features):
            return self._made(device)  # not kept: beside a fake tensor it is a fake one
        for tensor in self._tensors:
            if tensor.device == device:
                return tensor
        if torch.compiler.is_compiling():
            # A tensor made in a compiled graph is the graph's own. This one is a constant, which is right
            # until the next set(): that makes the tensor, and the graph is compiled once more.
            self._wanted = device
            return torch.tensor(self.values, dtype=dtype_of_numbers(device), device=device)
        if is_capturing(device):
            raise RuntimeError(
                f"call the loss once on {device} before capturing a CUDA graph, as torch's warm-up does, so "
                "that its weights have a place there which stays"
            )
        return self._add(device)

    def _add(self, device: torch.device) -> Tensor:
        self._wanted = None
        # Not an inference tensor, whatever the caller's mode: those cannot be changed outside it.
        with torch.inference_mode(False):
            tensor = self._made(device)
        if is_plain(tensor):
            self._tensors.append(tensor)
        return tensor

    def _made(self, device: torch.device) -> Tensor:
        tensor = torch.empty(len(self.values), dtype=dtype_of_numbers(device), device=device)
        _fill(tensor, self.values)
        return tensor

    def __getstate__(self) -> dict[str, Any]:
        return {"values": self.values}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(*state["values"])  # type: ignore[misc]


def is_plain(x: Tensor) -> bool:
    """Whether ``x`` is torch's own tensor, and not a fake one or another subclass."""
    return type(x) in (Tensor, nn.Parameter)


def is_capturing(device: torch.device) -> bool:
    """Whether the device's current stream is being captured into a CUDA graph."""
    return (
        device.type == "cuda"
        and torch.backends.cuda.is_built()  # fake tensors are on a device that is not there
        and not torch.compiler.is_compiling()
        and torch.cuda.is_current_stream_capturing()
    )


def _fill(tensor: Tensor, values: tuple[float, ...]) -> None:
    # Numbers are arguments of the kernels that write them; a copy from the host would wait.
    for i, value in enumerate(values):
        tensor[i].fill_(value)
