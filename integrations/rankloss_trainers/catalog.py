"""The catalogue of losses: rankloss's own, and those that other packages register.

Another package registers a loss as an entry point. Its name is the value of ``--loss``, its object a class
derived from :class:`rankloss_trainers.named.NamedLoss`, or only a function ``(base, gather) → module``::

    [project.entry-points."rankloss.losses"]
    mine = "my_package.losses:Mine"

Entry points are imported lazily, when their loss is asked for or described, so a broken or slow package
cannot affect other runs. Only the standard library is imported here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from types import MappingProxyType
from typing import Any

from rankloss_trainers.joined import JOIN as JOIN
from rankloss_trainers.joined import Joined
from rankloss_trainers.named import NamedLoss, OptionError, Options, did_you_mean

GROUP = "rankloss.losses"
"""The group of the entry points."""

_OWN = "rankloss_trainers.own_losses"
BUILT_IN = {
    "rankclip": f"{_OWN}:RankClip",
    "rankclip-cross": f"{_OWN}:RankClipCross",
    "rankclip-in": f"{_OWN}:RankClipIn",
    "rankclip-distill": f"{_OWN}:RankClipDistill",
    "rankclip-encoders": f"{_OWN}:RankClipEncoders",
    "mimicry": f"{_OWN}:Mimicry",
    "clip-ids": "rankloss_trainers.clip_ids:ClipIds",
    "clip-streamed": f"{_OWN}:ClipStreamed",
    "siglip-streamed": f"{_OWN}:SigLipStreamed",
    "ranked-lists": "rankloss_trainers.ranked_lists:RankedListsBesidePairs",
}
"""rankloss's own losses."""

PREFIXES = ("rankclip", "mimicry", "clip-ids", "streamed", "ranked-lists")
"""The prefixes of the options of rankloss's own losses, each of which is in the names of those losses."""

TRAINERS_OWN = "clip"
"""The value of ``--loss`` that leaves the trainer's own loss alone."""


@functools.cache  # a run asks some ten times, and each time every installed package would be read
def known() -> Mapping[str, tuple[metadata.EntryPoint, ...]]:
    """All losses that can be named, rankloss's own first, with all who register the name."""
    found = {name: (metadata.EntryPoint(name, reference, GROUP),) for name, reference in BUILT_IN.items()}
    for point in sorted(metadata.entry_points(group=GROUP), key=lambda point: point.name):
        if point.name not in (TRAINERS_OWN, *BUILT_IN):  # which mean the same whatever is installed
            found[point.name] = (*found.get(point.name, ()), point)
    return found


def package_of(name: str) -> str:
    """The distribution that registers a loss, with its version; empty for rankloss's own."""
    points = () if name in BUILT_IN else known()[name]
    dists = (point.dist for point in points)
    return " and ".join(f"{x.name} {x.version}" if x is not None else "unknown package" for x in dists)


def names_of(name: str) -> list[str]:
    """The name of a loss, or the several that :data:`JOIN` joins.

    Raises:
        ValueError: There is no such loss.

    Example:
        >>> names_of("rankclip+mimcry")
        Traceback (most recent call last):
        ValueError: loss must be one of rankclip, ...; got 'mimcry'; did you mean mimicry?
    """
    found, parts = known(), name.split(JOIN)
    for part in parts:
        if part not in found:
            hint = did_you_mean(part, found)
            raise ValueError(f"loss must be one of {', '.join(found)}; got {part!r}{hint}")
    return parts


def load(name: str) -> type[NamedLoss]:
    """Import one loss.

    Raises:
        ValueError: There is no such loss, or its name or prefix is taken.
        Exception: Any error of the import.
    """
    names_of(name)
    point, *others = known()[name]
    if any(other.value != point.value for other in others):
        raise ValueError(f"{name} is registered by both {package_of(name)}; uninstall one")
    loaded = point.load()
    is_class = isinstance(loaded, type) and issubclass(loaded, NamedLoss)
    loss: type[NamedLoss] = loaded if is_class else _of_function(loaded)
    loss.name, loss.package = name, package_of(name)
    if name not in BUILT_IN and loss.prefix in PREFIXES:
        raise ValueError(f"the prefix {loss.prefix!r} belongs to another loss")
    return loss


def _of_function(build: Callable[..., Any]) -> type[NamedLoss]:
    about = {"__doc__": build.__doc__, "build": lambda _, base, gather: build(base, gather)}
    return type("Built", (NamedLoss,), about)


def beside(loss: type[NamedLoss], names: Sequence[str]) -> dict[str, Any]:
    """The defaults of a loss that differ where it is joined with losses of these names."""
    return {key: x for name in names for key, x in loss.beside.get(name, {}).items()}


def choose(name: str, given: Options = MappingProxyType({})) -> NamedLoss:
    """The loss of a name with options.

    Args:
        name: A name, or several joined by :data:`JOIN`.
        given: Its options; those of joined losses by the name of each.

    Raises:
        TypeError: There is no such option.
        ValueError: There is no such loss, two of them are one, or an option cannot have its value
            (:class:`rankloss_trainers.named.OptionError`).

    Example:
        >>> choose("rankclip", {"top_k": 8}).top_k
        8
        >>> choose("rankclip+mimicry", {"mimicry": {"weight": 2.0}}).parts[1].weight
        2.0
    """
    return chosen([load(part) for part in names_of(name)], given)


def chosen(losses: Sequence[type[NamedLoss]], given: Options) -> NamedLoss:
    """The loss of a class, or of several that are joined, with options; see :func:`choose`."""
    if len(losses) == 1:
        return losses[0].of(given)
    names = [loss.name for loss in losses]
    if len({loss.prefix or loss.name for loss in losses}) < len(losses):
        raise ValueError(f"loss {JOIN.join(names)} names a loss twice")
    for key, options in given.items():
        if key not in names or not isinstance(options, Mapping):
            raise TypeError(
                f"options of {JOIN.join(names)} are given by loss, {{{names[0]!r}: {{…}}}}; got {key!r}"
            )
    shared = {}  # a teacher that is given once serves all
    for key in ("reference_features", "teacher"):
        found = {options.get(key) for options in given.values()} - {None}
        shared.update({key: found.pop()} if len(found) == 1 else {})
    joined = []
    for loss in losses:
        own = beside(loss, names) | {key: x for key, x in shared.items() if key in loss.options()}
        own.update(given.get(loss.name, {}))
        try:
            joined.append(loss.of(own))
        except OptionError as error:
            raise OptionError(error.key, error.reason, loss.name) from None
    return Joined(joined=tuple(joined))
