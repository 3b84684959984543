"""Losses that are trained together: one stands on the other, and the first on the trainer's own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

import rankloss
from rankloss.distributed import Gather
from rankloss_trainers.catalog import JOIN, LossEntry, Option, Options, prefixed


def joined(parts: Mapping[str, LossEntry]) -> LossEntry:
    """The entry of several losses: ``L_base + terms of the first + terms of the second + …``.

    The first stands on the trainer's own loss, each other one on the one before. Each has its own options,
    whose keys begin with its prefix. A folder of a teacher's features is given to one and serves all. A
    teacher reaches every loss that takes one.

    Args:
        parts: The losses by their names.

    Raises:
        ValueError: Two of them are one loss with different defaults.

    Example:
        >>> from rankloss_trainers.own_losses import MIMICRY, RANKCLIP
        >>> entry = joined({"rankclip": RANKCLIP, "mimicry": MIMICRY})
        >>> entry.checked("rankclip+mimicry", {"top_k": 8, "mimicry_weight": 2.0})["rankclip_top_k"]
        8
    """
    prefixes = {entry.prefix or name: name for name, entry in parts.items()}
    if len(prefixes) < len(parts):
        raise ValueError(f"loss {JOIN.join(parts)} names one loss with two sets of defaults")
    return _Joined(dict(zip(prefixes, parts.values(), strict=True)), tuple(parts)).entry()


@dataclasses.dataclass(frozen=True)
class _Joined:
    """Losses by their prefixes, and their names."""

    parts: Mapping[str, LossEntry]
    names: tuple[str, ...]

    def entry(self) -> LossEntry:
        parts = self.parts.values()
        return LossEntry(
            build=self.build,
            help=" and ".join(entry.help for entry in parts),
            options=tuple(self.options()),
            refuse=self.refuse,
            describe=self.describe,
            unit=self.unit,
            caption_key=lambda options: self.first("caption_key", options),
            companions=lambda options: [x for found in self.each("companions", options) for x in found],
            uses_teacher=self.uses_teacher,
            in_separate_spaces=self.in_separate_spaces,
            reference_features=self.folder,
            keeps_distillation=lambda options: all(self.each("keeps_distillation", options)),
            no_sigmoid=", ".join(filter(None, (entry.no_sigmoid for entry in parts))),
            only_sigmoid=", ".join(filter(None, (entry.only_sigmoid for entry in parts))),
            log=self.log,
            citation="\n".join(filter(None, (entry.citation for entry in parts))),
        )

    def options(self) -> Iterator[Option]:
        for prefix, entry in self.parts.items():
            yield from (dataclasses.replace(option, prefix=prefix) for option in entry.options)

    def own(self, options: Options) -> Iterator[tuple[str, LossEntry, dict[str, Any]]]:
        """Each loss with its own options, by their keys without prefix."""
        for prefix, entry in self.parts.items():
            keys = {option.own_key: prefixed(prefix, option.own_key) for option in entry.options}
            yield prefix, entry, {own: options[key] for own, key in keys.items() if key in options}

    def each(self, function: str, options: Options) -> list[Any]:
        return [getattr(entry, function)(own) for _, entry, own in self.with_folder(options)]

    def first(self, function: str, options: Options) -> Any:
        return next((x for x in self.each(function, options) if x is not None), None)

    def folder(self, options: Options) -> str | None:
        found = (entry.reference_features(own) for _, entry, own in self.own(options))
        return next((x for x in found if x is not None), None)

    def with_folder(self, options: Options) -> Iterator[tuple[str, LossEntry, dict[str, Any]]]:
        """Each loss with its own options, of which all share the folder of the teacher's features."""
        folder = self.folder(options)
        for prefix, entry, own in self.own(options):
            if "reference_features" in own and own.get("reference") != "own":
                own["reference_features"] = folder
            yield prefix, entry, own

    def uses_teacher(self, options: Options) -> bool | None:
        found = self.each("uses_teacher", options)
        return True if True in found else False if False in found else None

    def in_separate_spaces(self, given: Options) -> dict[str, Any]:
        changed = {}
        for prefix, entry, own in self.own(given):
            try:
                found = entry.in_separate_spaces(own)
            except ValueError as error:
                raise ValueError(prefixed(prefix, str(error))) from None
            changed.update({prefixed(prefix, key): value for key, value in found.items()})
        return changed

    def refuse(self, options: Options, gather: Gather) -> str | None:
        folders = {
            own["reference_features"] for *_, own in self.own(options) if own.get("reference_features")
        }
        if len(folders) > 1:
            return f"{' and '.join(sorted(folders))} are two teachers; joined losses have one"
        uses = dict(zip(self.names, self.each("uses_teacher", options), strict=True))
        if {True, False} <= {*uses.values()}:
            with_, without = (next(x for x in uses if uses[x] is use) for use in (True, False))
            return f"{with_} needs a teacher, which {without} is told not to use"
        for prefix, entry, own in self.with_folder(options):
            reason = entry.refuse(own, gather)
            if reason is not None:
                key = reason.partition(":")[0].partition("=")[0].partition(" ")[0]
                return prefixed(prefix, reason) if key in own else reason
        sigmoid = any(entry.only_sigmoid for entry in self.parts.values())
        try:
            base = rankloss.SigLipLoss(gather=False) if sigmoid else rankloss.ClipLoss(gather=False)
            self.build(base, options, Gather(rank=0, world_size=1))
        except ValueError as error:
            return str(error)
        return None

    def build(self, base: Any, options: Options, gather: Gather) -> nn.Module:
        loss: Any = base
        for name, (_, entry, own) in zip(self.names, self.with_folder(options), strict=True):
            below, loss = loss, entry.build(loss, own, gather)
            if below is not base and not any(part is below for part in loss.modules()):
                raise ValueError(f"{name} stands on no other loss but the trainer's: name it first")
        return loss  # type: ignore[no-any-return]

    def describe(self, options: Options, epochs: float) -> str:
        texts = (
            f"{name}: {text}"
            for name, (_, entry, own) in zip(self.names, self.own(options), strict=True)
            if (text := entry.described(own, epochs))
        )
        return "; ".join(texts)

    def unit(self, options: Options, epochs: float) -> str | None:
        units = {
            entry.unit(own, epochs) if callable(entry.unit) else entry.unit
            for _, entry, own in self.own(options)
        } - {None}
        if len(units) > 1:
            raise ValueError(f"{JOIN.join(self.names)}: one goes by epochs, the other by steps")
        return units.pop() if units else None

    def log(self, options: Options) -> Callable[..., dict[str, Tensor]]:
        logs = [entry.log(own) for _, entry, own in self.own(options) if entry.log is not None]

        def logged(criterion: nn.Module, *call: Any) -> dict[str, Tensor]:
            return {name: x for log in logs for name, x in log(criterion, *call).items()}

        return logged
