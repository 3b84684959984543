"""Losses that are trained together: one stands on the other, and the first on the trainer's own."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from rankloss_trainers.named import NamedLoss, OptionError, naming_options

JOIN = "+"
"""The sign between the names of losses that are trained together, the innermost first."""


class Joined(NamedLoss):
    """``L_base + terms of the first + terms of the second + …``: a loss that several chosen ones make."""

    joined: tuple[NamedLoss, ...] = ()

    parts = property(lambda self: self.joined)
    values = property(lambda self: {x.name: x.values for x in self.parts})
    name = property(lambda self: JOIN.join(part.name for part in self.parts))
    package = property(lambda self: ", ".join(self._each("package")))
    use_of_teacher = property(lambda self: next(iter(self._each("use_of_teacher")), None))
    teacher = property(lambda self: next(iter(self._each("teacher")), None))
    reference_features = property(lambda self: next(iter(self._each("reference_features")), None))
    caption_key = property(lambda self: next(iter(self._each("caption_key")), None))
    pair_key = property(lambda self: next(iter(self._each("pair_key")), None))
    keeps_distillation = property(lambda self: all(part.keeps_distillation for part in self.parts))
    citation = property(lambda self: "\n".join(self._each("citation")))

    def _each(self, fact: str) -> list[Any]:
        return [found for part in self.parts if (found := getattr(part, fact))]

    def check(self) -> None:
        if len(teachers := {*self._each("reference_features"), *self._each("teacher")}) > 1:
            raise ValueError(f"{' and '.join(sorted(teachers))} are two teachers; joined losses have one")
        uses = {part.use_of_teacher: part.name for part in self.parts}
        if {"required", "none"} <= uses.keys():
            raise ValueError(f"{uses['required']} needs a teacher, which {uses['none']} is told not to use")
        without = [part.name for part in self.parts if not part.keeps_distillation]
        for part in self.parts:
            if without and part.keeps_distillation and "distill_loss" in part.changed:
                text = f"include has no effect beside {without[0]}"
                raise OptionError("distill_loss", text, loss=part.name)

    def build(self, base: Any, gather: Any) -> Any:
        loss = base
        for part in self.parts:
            with naming_options(part, part.name):
                below, loss = loss, part.build(loss, gather)
            if below is not base and not any(x is below for x in loss.modules()):
                raise ValueError(f"{part.name} stands on no other loss but the trainer's: name it first")
        return loss

    def describe(self, epochs: float) -> str:
        return "; ".join(f"{part.name}: {text}" for part in self.parts if (text := part.describe(epochs)))

    def unit(self, epochs: float) -> str | None:
        units = {part.unit(epochs) for part in self.parts} - {None}
        if len(units) > 1:
            raise ValueError(f"{self.name}: one goes by epochs, the other by steps")
        return units.pop() if units else None

    def companions(self) -> Iterable[Any]:
        return [companion for part in self.parts for companion in part.companions()]

    def log(self) -> Callable[..., Any]:
        logs = [log for part in self.parts if (log := part.log()) is not None]
        return lambda *call: {name: x for log in logs for name, x in log(*call).items()}
