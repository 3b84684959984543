"""This package's own losses, as the registry describes a loss.

Every run of the trainer imports this module, for the options; what only a run with a loss needs is imported
by the functions.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn

import rankloss
from rankloss import schedules
from rankloss_open_clip.registry import LossEntry, Option, count, layout, weight

# --- RankCLIP -------------------------------------------------------------------------------------------

_RANKCLIP_OPTIONS = (
    Option("schedule", "rankclip", "course of lambda over training", {"choices": schedules.NAMES}),
    Option(
        "schedule-unit",
        "epoch",
        "evaluate the schedule once per epoch or at each optimizer step; a run of one epoch has no ramp "
        "over epochs and goes by steps",
        {"choices": ("epoch", "step")},
    ),
    Option(
        "lambda-cross",
        1.0,
        "multiplies lambda in the cross-modal term",
        {"type": weight, "metavar": "X"},
    ),
    Option("lambda-in", 1.0, "multiplies lambda in the in-modal term", {"type": weight, "metavar": "X"}),
    Option(
        "lists",
        "row",
        "one list per anchor, or one of all pairs of the batch",
        {"choices": ("row", "batch")},
    ),
    Option(
        "worth",
        "exp",
        "worth of an item: exp of the logit, (1 + cosine)/2, or the cosine",
        {"choices": ("exp", "shifted", "identity")},
    ),
    Option(
        "ties",
        "shared",
        "equal reference scores share one denominator, or are shuffled at each step",
        {"choices": ("shared", "random")},
    ),
    Option("discount", "none", "weight of a rank: 1, or 1/log(1 + rank)", {"choices": ("none", "log")}),
    Option("top-k", None, "count only the best ranks of each list", {"type": count, "metavar": "K"}, "all"),
    Option(
        "diagonal",
        "include",
        "whether an anchor's own pair is an item of its lists",
        {"choices": ("include", "exclude")},
    ),
    Option(
        "fixed-reference",
        "none",
        "the modality whose rankings the other one's follow, without following them",
        {"choices": ("none", "image", "text")},
    ),
    Option(
        "method",
        "sort",
        "rank a list by its exact order, or faster by bins of the reference",
        {"choices": ("sort", "bin")},
    ),
    Option("bins", 2048, "number of bins of --rankclip-method bin", {"type": count, "metavar": "B"}),
    Option(
        "chunk-size",
        None,
        "rows computed at a time: less memory, same result",
        {"type": count, "metavar": "ROWS"},
        "from the sizes and the device",
    ),
    Option(
        "memory-budget",
        None,
        "bytes that matrices of the whole batch may take to save products: more memory, same result",
        {"type": count, "metavar": "BYTES"},
        "64 MiB on a CPU, 1 GiB elsewhere",
    ),
    Option(
        "agreement-every",
        None,
        "log the batch's rank agreement, Kendall's tau, measured at every so many optimizer steps",
        {"type": count, "metavar": "STEPS"},
        "never",
    ),
)


def _rankclip(base: nn.Module, args: Any) -> rankloss.RankClipLoss:
    return rankloss.RankClipLoss(
        _shareable(base, args),
        schedule=args.rankclip_schedule,
        lambda_cross=args.rankclip_lambda_cross,
        lambda_in=args.rankclip_lambda_in,
        lists=args.rankclip_lists,
        worth=args.rankclip_worth,
        ties=args.rankclip_ties,
        discount=_or_none(args.rankclip_discount),
        top_k=args.rankclip_top_k,
        diagonal=args.rankclip_diagonal == "include",
        fixed_reference=_or_none(args.rankclip_fixed_reference),
        method=args.rankclip_method,
        bins=args.rankclip_bins,
        chunk_size=args.rankclip_chunk_size,
        memory_budget=args.rankclip_memory_budget,
        gather=rankloss.Gather(**layout(args, rows=args.rankclip_lists == "row")),
    )


def _or_none(choice: str) -> Any:
    return None if choice == "none" else choice


def _shareable(base: nn.Module, args: Any) -> nn.Module:
    """CLIP's loss as rankloss has it, which shares its gathering, and its products, with the terms on it.

    Any other loss, a subclass of CLIP's included, stays what it is.
    """
    from open_clip.loss import ClipLoss

    return rankloss.ClipLoss(**layout(args)) if type(base) is ClipLoss else base


def _build_rankclip(base: nn.Module, args: Any) -> nn.Module:
    from rankloss_open_clip.rank_clip import RankClipTrainerLoss

    return RankClipTrainerLoss(
        _rankclip(base, args), unit=_rankclip_unit(args), agreement_every=args.rankclip_agreement_every
    )


def _rankclip_unit(args: Any) -> str:
    if args.epochs == 1 and args.rankclip_schedule != "constant":
        return "step"
    unit: str = args.rankclip_schedule_unit
    return unit


def _refuse_rankclip(args: Any) -> str | None:
    if args.rankclip_lists == "batch" and getattr(args, "local_loss", False):
        return "--rankclip-lists: batch needs the whole batch on every process, not --local-loss"
    try:
        _rankclip(nn.Identity(), args)
    except ValueError as error:  # what the library itself refuses
        return str(error)
    return None


def _describe_rankclip(args: Any) -> str:
    unit = _rankclip_unit(args)
    text = (
        f"schedule {args.rankclip_schedule} per {unit} over {args.epochs} epoch(s), lambda scale "
        f"{args.rankclip_lambda_cross:g} cross-modal and {args.rankclip_lambda_in:g} in-modal, lists "
        f"{args.rankclip_lists}"
    )
    if unit != args.rankclip_schedule_unit:
        text += " (one epoch has no ramp over epochs, so the schedule goes by optimizer steps)"
    return text


RANKCLIP = LossEntry(
    build=_build_rankclip,
    help="the trainer's own plus RankCLIP's ranking terms",
    options=_RANKCLIP_OPTIONS,
    prefix="rankclip",
    refuse=_refuse_rankclip,
    describe=_describe_rankclip,
)


def _without(term: str) -> LossEntry:
    """RankCLIP without one of its terms."""
    dest = f"rankclip_lambda_{term}"

    def refuse(args: Any) -> str | None:
        value = getattr(args, dest)
        if value != 0:
            return f"--rankclip-lambda-{term}: {args.loss} has no {term}-modal term, got {value:g}"
        return _refuse_rankclip(args)

    kept = "in" if term == "cross" else "cross"
    return dataclasses.replace(
        RANKCLIP,
        help=f"rankclip without its {term}-modal term: the ablation RankCLIP^{kept[0].upper()}",
        options=tuple(
            dataclasses.replace(option, default=0.0) if option.name == f"lambda-{term}" else option
            for option in _RANKCLIP_OPTIONS
        ),
        refuse=refuse,
    )


RANKCLIP_CROSS = _without("in")
RANKCLIP_IN = _without("cross")


# --- CyCLIP ---------------------------------------------------------------------------------------------


def _build_cyclip(base: nn.Module, args: Any) -> rankloss.CyClipLoss:
    return rankloss.CyClipLoss(
        _shareable(base, args),
        lambda_cross=args.cyclip_lambda_cross,
        lambda_in=args.cyclip_lambda_in,
        gather=rankloss.Gather(**layout(args)),
    )


CYCLIP = LossEntry(
    build=_build_cyclip,
    help="the trainer's own plus CyCLIP's cyclic consistency terms",
    options=(
        Option("lambda-cross", 0.25, "weight of the cross-modal term", {"type": weight, "metavar": "X"}),
        Option("lambda-in", 0.25, "weight of the in-modal term", {"type": weight, "metavar": "X"}),
    ),
    describe=lambda args: (
        f"weights {args.cyclip_lambda_cross:g} cross-modal and {args.cyclip_lambda_in:g} in-modal"
    ),
)


# --- ALIP -----------------------------------------------------------------------------------------------


def _build_alip(_: nn.Module, args: Any) -> nn.Module:
    from rankloss_open_clip.alip import AlipTrainerLoss

    loss = rankloss.AlipLoss(
        gamma_sample=args.alip_gamma_sample,
        gamma_pair=args.alip_gamma_pair,
        momentum=args.alip_momentum,
        initial_history=args.alip_initial_history,
        gather=rankloss.Gather(**layout(args)),
    )
    return AlipTrainerLoss(loss.to(args.device))


def _refuse_alip(args: Any) -> str | None:
    if args.alip_caption_key is None:
        return "alip needs a second caption of each image: name it with --alip-caption-key"
    if not 0 <= args.alip_momentum <= 1:
        return f"--alip-momentum: must be in [0, 1], got {args.alip_momentum:g}"
    if getattr(args, "siglip", False):
        return "alip does not work with --siglip: it weighs the pairs of a softmax loss of its own"
    return None


ALIP = LossEntry(
    build=_build_alip,
    help="CLIP's loss on two captions of each image, weighted by how well they fit (ALIP)",
    options=(
        Option(
            "caption-key",
            None,
            "where the synthetic caption is: a column of a CSV file; in a webdataset the extension of a text "
            "file, or json:FIELD",
            {"metavar": "KEY"},
            "must be given",
        ),
        Option(
            "gamma-sample",
            2.0,
            "how steeply a sample's weight falls with the similarity of its captions",
            {"type": weight, "metavar": "X"},
        ),
        Option(
            "gamma-pair",
            2.0,
            "how steeply a pair's weight changes with its similarity",
            {"type": weight, "metavar": "X"},
        ),
        Option(
            "momentum", 0.99, "share of the histories that a step keeps", {"type": weight, "metavar": "X"}
        ),
        Option(
            "initial-history",
            1.0,
            "where the histories start; 1 closes almost every gate at first",
            {"type": float, "metavar": "X"},
        ),
    ),
    refuse=_refuse_alip,
    describe=lambda args: (
        f"second caption {args.alip_caption_key!r}, gamma {args.alip_gamma_sample:g} for samples and "
        f"{args.alip_gamma_pair:g} for pairs, histories from {args.alip_initial_history:g} with momentum "
        f"{args.alip_momentum:g}"
    ),
    caption_key=lambda args: args.alip_caption_key,
)
