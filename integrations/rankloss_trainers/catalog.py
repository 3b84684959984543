"""The losses by name: rankloss's own, and those that other packages register.

Another package registers a loss as an entry point, whose name is the value of ``--loss`` and whose object is
the class of a module, a function ``(base, *, …, gather) → module``, or a
:class:`rankloss_trainers.declared.Named`::

    [project.entry-points."rankloss.losses"]
    soft = "my_package.losses:SoftLoss"

A loss is imported when it is asked for or described, so that a broken or slow package cannot affect other
runs. Only the standard library is imported here.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from importlib import metadata
from types import MappingProxyType

from rankloss_trainers import citations
from rankloss_trainers.declared import Loss, Named, Options
from rankloss_trainers.option import did_you_mean

GROUP = "rankloss.losses"
"""The group of the entry points."""

JOIN = "+"
"""The sign between the names of losses that are trained together."""

TRAINERS_OWN = "clip"
"""The value of ``--loss`` that leaves the trainer's own loss alone."""

_rank_clip = functools.partial(
    Named,
    "rankloss:RankClipLoss",
    more="rankloss:RankOptions",
    prefix="rankclip",
    # Left out of command lines: fixed_reference was searched and found no better, normalizer scales both
    # terms as the λ do, and reduction is of no use beside a base.
    python_only=frozenset({"normalizer", "fixed_reference", "reduction"}),
    citation=citations.RANKCLIP,
)

LOSSES: Mapping[str, Named] = {
    "rankclip": _rank_clip(help="the trainer's own plus RankCLIP's ranking terms"),
    "rankclip-in": _rank_clip({"lambda_cross": 0.0}, help="rankclip without its cross-modal term"),
    "rankclip-distill": _rank_clip(
        {"lambda_cross": 64.0, "lambda_in": 64.0, "top_k": 8},
        # The setting of both that the miniature confirmed (docs/evidence.md).
        beside={"mimicry": {"lambda_cross": 16.0, "lambda_in": 16.0, "top_k": 4}},
        teacher="required",
        help="rankclip trained to match a teacher's eight best ranks",
    ),
    # Above the encoders' ranks and softmax on three of four data sets (docs/evidence.md, "Two encoders").
    "rankclip-encoders": Named(
        "rankloss:MimicryLoss",
        prefix="mimicry",
        teacher="image=efficientnet-lite0,text=minilm,align",
        help="mimicry of two small encoders of the extra `encoders`, in one space that the pairs give them: "
        "needs pairs alone, and in a loop or sentence-transformers a folder of `rankloss features --align`",
        citation=citations.MIMICRY,
    ),
    "spread": Named(
        "rankloss:SpreadLoss",
        help="the trainer's own plus the spread of similarities within each modality: pairs alone are needed",
        citation=citations.SPREAD,
    ),
    "mimicry": Named(
        "rankloss:MimicryLoss",
        beside={"rankclip-distill": {"weight": 16.0}},
        teacher="required",
        help="the trainer's own plus the distance of the features from a teacher's",
        citation=citations.MIMICRY,
    ),
    "clip-ids": Named(
        "rankloss_trainers.clip_ids:clip_ids",
        more="rankloss:ClipLoss",
        columns="rankloss_open_clip.columns.pair_ids:PairIds",
        log="rankloss_trainers.clip_ids:PartnersLog",
        replaces=True,
        citation=citations.CLIP_IDS,
    ),
    "clip-smooth": Named(
        "rankloss:ClipLoss",
        {"label_smoothing": 0.1},
        kind="softmax",
        python_only=frozenset({"same_id"}),
        help="CLIP's loss with label smoothing",
    ),
    "clip-streamed": Named(
        "rankloss:ClipLoss",
        prefix="streamed",
        kind="softmax",
        python_only=frozenset({"same_id", "label_smoothing"}),
        help="CLIP's loss in memory linear in the batch",
    ),
    "siglip-streamed": Named(
        "rankloss:SigLipLoss",
        prefix="streamed",
        kind="sigmoid",
        python_only=frozenset({"same_id"}),
        help="SigLIP's loss in memory linear in the batch",
    ),
    "ranked-lists": Named(
        "rankloss_trainers.graded.term:ranked_lists",
        more="rankloss:RankedLists",
        columns="rankloss_open_clip.columns.candidates:Candidates",
        python_only=frozenset({"reduction"}),
    ),
}
"""rankloss's own losses."""


def prefix_of(name: str, named: Named) -> str:
    """The prefix of the options of a loss on a command line."""
    return named.prefix or name


PREFIXES = frozenset(prefix_of(name, named) for name, named in LOSSES.items())
"""The prefixes of the options of rankloss's own losses."""


def own_prefix(name: str) -> str:
    """The prefix of the options of a loss of rankloss; any other's name, since nothing is imported here."""
    return prefix_of(name, LOSSES[name]) if name in LOSSES else name


@functools.cache  # each call would read the metadata of every installed package
def known() -> Mapping[str, tuple[metadata.EntryPoint, ...]]:
    """All losses that can be named, rankloss's own first, with the entry points that register them."""
    losses: dict[str, tuple[metadata.EntryPoint, ...]] = dict.fromkeys(LOSSES, ())
    points = sorted(metadata.entry_points(group=GROUP), key=lambda point: point.name)
    for point in points:
        # These names mean the same in every environment, whatever packages are installed.
        is_taken = point.name in LOSSES or point.name == TRAINERS_OWN
        if not is_taken:
            losses[point.name] = (*losses.get(point.name, ()), point)
    return losses


def package_of(name: str) -> str:
    """The distribution that registers a loss, with its version; empty for rankloss's own.

    Several that register the same name are joined by "and".
    """
    texts = []
    for point in known()[name]:
        package = point.dist
        texts.append("unknown package" if package is None else f"{package.name} {package.version}")
    return " and ".join(texts)


def names_of(name: str) -> list[str]:
    """The name of a loss, or the several that :data:`JOIN` joins; no loss is imported.

    Raises:
        ValueError: There is no such loss, or two of them are one.

    Example:
        >>> names_of("rankclip+mimicry")
        ['rankclip', 'mimicry']
    """
    names = name.split(JOIN)
    for each in names:
        if each not in known():
            hint = did_you_mean(each, known())
            if each == TRAINERS_OWN:
                hint = ", the trainer's own loss, on which the others stand: leave it out"
            raise ValueError(f"loss must be one of {', '.join(known())}; got {each!r}{hint}")
    prefixes = {own_prefix(each) for each in names}
    if len(prefixes) < len(names):  # two names are one loss, with one prefix
        raise ValueError(f"loss {name} names a loss twice")
    return names


def load(name: str) -> Named:
    """The declaration of one loss.

    Raises:
        ValueError: There is no such loss, two packages register another under its name, or its prefix is
            taken.
        Exception: Any error of the import.
    """
    names_of(name)
    if name in LOSSES:
        return LOSSES[name]
    point, *others = known()[name]
    if any(other.value != point.value for other in others):
        raise ValueError(f"{name} is registered by both {package_of(name)}; uninstall one")
    loaded = point.load()
    named = loaded if isinstance(loaded, Named) else Named(loaded)
    prefix = prefix_of(name, named)
    if prefix in PREFIXES or prefix == "loss":  # the prefix of a run's options
        raise ValueError(f"the prefix {prefix!r} of {name} is taken")
    return named


def _among(name: str, names: Sequence[str]) -> Named:
    """The declaration of one of several losses, with the defaults that it has among them."""
    named = load(name)
    for other in names:
        named = named.with_defaults(named.beside.get(other, {}))
    return named


def choose_each(names: Sequence[str], given: Mapping[str, Options]) -> list[Loss]:
    """The losses of these names, each with its options and defaults among the others, the innermost first.

    One that replaces the trainer's loss is the innermost, wherever its name stands.

    Raises:
        TypeError: There is no such option, or an option stands outside of its loss's.
        Exception: As :func:`load`.
    """
    for key, options in given.items():
        if key not in names:
            joined = JOIN.join(names)
            raise TypeError(f"options of {joined} are given by loss, {names[0]}={{…}}; got {key!r}")
        if not isinstance(options, Mapping):
            raise TypeError(f"options of {key} must be a mapping; got {options!r}")
    losses = [Loss(name, _among(name, names), given.get(name, {}), package_of(name)) for name in names]
    replacing = [loss for loss in losses if loss.replaces]
    added = [loss for loss in losses if not loss.replaces]
    return replacing + added


def choose(name: str, given: Options = MappingProxyType({})) -> list[Loss]:
    """The losses of a name with options, the innermost first.

    Args:
        name: A name, or several joined by :data:`JOIN`.
        given: Its options; those of joined losses by the name of each.

    Raises:
        TypeError: There is no such option, or those of joined losses are not given by loss.
        ValueError: There is no such loss, or two of them are one.
        Exception: As :func:`load`.

    Example:
        >>> choose("rankclip", {"top_k": 8})[0].given
        {'top_k': 8}
        >>> [loss.name for loss in choose("rankclip+mimicry", {"mimicry": {"weight": 2.0}})]
        ['rankclip', 'mimicry']
    """
    names = names_of(name)
    return choose_each(names, given if JOIN in name else {name: given})
