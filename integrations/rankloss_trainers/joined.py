"""Losses that are trained together: one stands on the other, and the first on the trainer's own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

import rankloss
from rankloss.distributed import Gather
from rankloss_trainers.catalog import JOIN, LossEntry, Option, Options, error_of, prefixed


def joined(name: str, load: Callable[[str], LossEntry]) -> LossEntry:
    """The entry of several losses: ``L_base + terms of the first + terms of the second + …``.

    The first stands on the trainer's own loss, each other one on the one before. Each has its own options,
    whose keys begin with its prefix. A folder of a teacher's features is given to one and serves all. A
    teacher reaches every loss that takes one.

    Args:
        name: The names of the losses, joined by :data:`JOIN`.
        load: The entry of each, by its name.

    Raises:
        ValueError: Two of them are one loss.

    Example:
        >>> from rankloss_trainers.catalog import find
        >>> entry = joined("rankclip+mimicry", lambda part: find(part).load())
        >>> entry.checked("rankclip+mimicry", {"top_k": 8, "mimicry_weight": 2.0})["rankclip_top_k"]
        8
    """
    entries = [(part, load(part)) for part in name.split(JOIN)]
    parts = [(part, entry.prefix or part, entry) for part, entry in entries]
    if len({prefix for _, prefix, _ in parts}) < len(parts):
        raise ValueError(f"loss {name} names a loss twice")
    return _Joined(parts).entry()


@dataclasses.dataclass(frozen=True)
class _Joined:
    """Losses with their names and prefixes."""

    parts: list[tuple[str, str, LossEntry]]

    def entry(self) -> LossEntry:
        entries = [entry for *_, entry in self.parts]
        return LossEntry(
            build=self.build,
            help=" and ".join(entry.help for entry in entries),
            options=tuple(self.options()),
            refuse=self.refuse,
            describe=self.describe,
            unit=self.unit,
            caption_key=lambda options: self.first("caption_key", options),
            companions=lambda options: [x for found in self.each("companions", options) for x in found],
            uses_teacher=self.uses_teacher,
            in_separate_spaces=self.in_separate_spaces,
            reference_features=lambda options: self.first("reference_features", options),
            keeps_distillation=lambda options: all(self.each("keeps_distillation", options)),
            no_sigmoid=", ".join(filter(None, (entry.no_sigmoid for entry in entries))),
            only_sigmoid=", ".join(filter(None, (entry.only_sigmoid for entry in entries))),
            log=self.log,
            citation="\n".join(filter(None, (entry.citation for entry in entries))),
        )

    def options(self) -> Iterator[Option]:
        for _, prefix, entry in self.parts:
            yield from (dataclasses.replace(option, prefix=prefix) for option in entry.options)

    def own(self, options: Options) -> Iterator[tuple[str, str, LossEntry, dict[str, Any]]]:
        """Each loss with its own options, by their keys without prefix."""
        for name, prefix, entry in self.parts:
            keys = {option.own_key: prefixed(prefix, option.own_key) for option in entry.options}
            yield name, prefix, entry, {own: options[key] for own, key in keys.items() if key in options}

    def each(self, function: str, options: Options) -> list[Any]:
        return [getattr(entry, function)(own) for *_, entry, own in self.own(options)]

    def first(self, function: str, options: Options) -> Any:
        return next((x for x in self.each(function, options) if x is not None), None)

    def uses_teacher(self, options: Options) -> bool | None:
        found = self.each("uses_teacher", options)
        return True if True in found else False if False in found else None

    def in_separate_spaces(self, given: Options) -> dict[str, Any]:
        changed = {}
        for _, prefix, entry, own in self.own(given):
            try:
                found = entry.in_separate_spaces(own)
            except ValueError as error:
                raise ValueError(prefixed(prefix, str(error))) from None
            changed.update({prefixed(prefix, key): value for key, value in found.items()})
        return changed

    def refuse(self, options: Options, gather: Gather) -> str | None:
        folders = {*self.each("reference_features", options)} - {None}
        if len(folders) > 1:
            return f"{' and '.join(sorted(folders))} are two teachers; joined losses have one"
        names = [name for name, *_ in self.parts]
        uses = dict(zip(names, self.each("uses_teacher", options), strict=True))
        if {True, False} <= {*uses.values()}:
            with_, without = (next(x for x in uses if uses[x] is use) for use in (True, False))
            return f"{with_} needs a teacher, which {without} is told not to use"
        keeps = dict(zip(names, self.each("keeps_distillation", options), strict=True))
        for name, prefix, entry, own in self.own(options):
            is_said = any(x.own_key == "distill_loss" and own[x.own_key] != x.default for x in entry.options)
            if is_said and keeps[name] and not all(keeps.values()):
                other = next(x for x in keeps if not keeps[x])
                return f"{prefixed(prefix, 'distill_loss')}: include has no effect beside {other}"
        for _, prefix, entry, own in self.own(options):
            reason = entry.refuse(own, gather)
            if reason is not None:
                key = reason.partition(":")[0].partition("=")[0].partition(" ")[0]
                return prefixed(prefix, reason) if key in own else reason
        sigmoid = any(entry.only_sigmoid for *_, entry in self.parts)
        base = rankloss.SigLipLoss(gather=False) if sigmoid else rankloss.ClipLoss(gather=False)
        return error_of(lambda: self.build(base, options, Gather(rank=0, world_size=1)))

    def build(self, base: Any, options: Options, gather: Gather) -> nn.Module:
        loss: Any = base
        for name, _, entry, own in self.own(options):
            below, loss = loss, entry.build(loss, own, gather)
            if below is not base and not any(part is below for part in loss.modules()):
                raise ValueError(f"{name} stands on no other loss but the trainer's: name it first")
        return loss  # type: ignore[no-any-return]

    def describe(self, options: Options, epochs: float) -> str:
        texts = ((name, entry.described(own, epochs)) for name, _, entry, own in self.own(options))
        return "; ".join(f"{name}: {text}" for name, text in texts if text)

    def unit(self, options: Options, epochs: float) -> str | None:
        units = {entry.unit_of(own, epochs) for *_, entry, own in self.own(options)} - {None}
        if len(units) > 1:
            names = JOIN.join(name for name, *_ in self.parts)
            raise ValueError(f"{names}: one goes by epochs, the other by steps")
        return units.pop() if units else None

    def log(self, options: Options) -> Callable[..., dict[str, Tensor]]:
        logs = [entry.log(own) for *_, entry, own in self.own(options) if entry.log is not None]

        def logged(criterion: nn.Module, *call: Any) -> dict[str, Tensor]:
            return {name: x for log in logs for name, x in log(criterion, *call).items()}

        return logged
