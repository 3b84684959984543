"""rankloss's own losses, as the catalogue describes them.

The options of the rank terms are generated from the fields of :class:`rankloss.options.RankOptions`: name,
choices, bounds, default and help stand there, and only there.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from torch import nn

import rankloss
from rankloss import schedules
from rankloss.distributed import Gather
from rankloss.options import CHOICES, RankOptions
from rankloss_features.binding import RowCompanion
from rankloss_trainers.catalog import LossEntry, Option, Options, changed, error_of, weight
from rankloss_trainers.logging import RankClipLog
from rankloss_trainers.orders.folder import Orders
from rankloss_trainers.orders.loss import OrderedRankClipLoss, log_orders

# --- RankCLIP -------------------------------------------------------------------------------------------

_HIDDEN = ("reduction",)  # a value per anchor cannot be added to the base, and a sum is a mean times a weight
_STREAMING = ("chunk_size", "memory_budget")  # of any streamed loss
_RANK_FIELDS = [field for field in dataclasses.fields(RankOptions) if field.name not in _HIDDEN]


def _rank_option(field: dataclasses.Field[Any]) -> Option:
    name, help_, none = field.name.replace("_", "-"), field.metadata["help"], field.metadata["none"]
    choices = CHOICES[field.name]
    if not choices:
        is_real = "above" in field.metadata["bounds"]  # RankOptions checks the bounds
        kind = {"type": float if is_real else int, "metavar": "X" if is_real else "N"}
        return Option(name, field.default, help_, kind, none)
    words = {None: "none", True: "include", False: "exclude"}
    return Option(
        name, field.default, help_, values={words.get(choice, choice): choice for choice in choices}
    )


_WEIGHT = {"type": weight, "metavar": "X"}
_STEPS = {"type": int, "metavar": "STEPS"}
_REFERENCE = (
    "the rankings to match: the batch's own, or a teacher's, which the trainer has or whose features come "
    "with the data; auto takes a teacher's where its features come with the data"
)
_FOLDER = (
    "a teacher's features from a folder of `rankloss features`; with a webdataset also the word "
    "samples (or samples:image, samples:text), for members image_features.npy and text_features.npy"
)
_UNIT = "evaluate the schedule per epoch or per optimizer step; a run of one epoch goes by steps"
_DISTILL = "include or exclude the own distillation term of a trainer that distils from a teacher"
_AGREEMENT = "log the batch's rank agreement, Kendall's tau, measured at every so many optimizer steps"
_ORDERS = "rank a batch by the lists of ids in a folder of `rankloss orders`"
_RANKCLIP_OPTIONS = (
    Option("schedule", "rankclip", "course of lambda over training", {"choices": schedules.NAMES}),
    Option("schedule-unit", "epoch", _UNIT, {"choices": ("epoch", "step")}, for_trainer=True),
    Option("lambda-cross", 1.0, "multiplies lambda in the cross-modal term", _WEIGHT),
    Option("lambda-in", 1.0, "multiplies lambda in the in-modal term", _WEIGHT),
    *map(_rank_option, _RANK_FIELDS),
    Option("reference", "auto", _REFERENCE, {"choices": ("auto", "own", "teacher")}),
    Option("reference-features", None, f"rank by {_FOLDER}", {"metavar": "FOLDER"}, "none", for_trainer=True),
    Option("distill-loss", "include", _DISTILL, {"choices": ("include", "exclude")}, for_trainer=True),
    Option("agreement-every", None, _AGREEMENT, _STEPS, "never", for_trainer=True),
    Option("orders", None, _ORDERS, {"metavar": "FOLDER"}, "none"),
)
_WITH_ORDERS = {"lambda_cross", "lambda_in", "schedule", "schedule_unit", "top_k", "orders", *_STREAMING}


def _build_rankclip(base: nn.Module, options: Options, gather: Gather) -> rankloss.RankClipLoss:
    loss = rankloss.RankClipLoss if options["orders"] is None else OrderedRankClipLoss
    if options["lists"] == "batch" and gather.gather_with_grad:
        # One list of the whole batch is exact on every process, and so are a base's own rows.
        gather = dataclasses.replace(gather, local_loss=False)
    if type(base) is rankloss.ClipLoss or type(base) is rankloss.SigLipLoss:  # a subclass has other arguments
        base = type(base)(gather=base.gather, **{name: options[name] for name in _STREAMING})
    names = ["schedule", "lambda_cross", "lambda_in", *(field.name for field in _RANK_FIELDS)]
    return loss(base, gather=gather, **{name: options[name] for name in names})


def _has_teacher(options: Options) -> bool:
    return options["reference"] == "teacher" or options["reference_features"] is not None


def _rankclip_teacher(options: Options) -> bool | None:
    return True if _has_teacher(options) else False if options["reference"] == "own" else None


def _rankclip_in_separate_spaces(given: Options) -> dict[str, float]:
    if given.get("lambda_cross"):
        raise ValueError(
            "lambda_cross: must be 0, as the teacher's images and texts have separate spaces, which rank the "
            f"in-modal lists alone; got {given['lambda_cross']}"
        )
    return {"lambda_cross": 0.0}


def _rankclip_unit(options: Options, epochs: float) -> str:
    if epochs == 1 and options["schedule"] != "constant":
        return "step"
    return str(options["schedule_unit"])


def _refuse_orders(options: Options) -> str | None:
    """The reason against the orders of a folder: they rank by themselves, in the way that they do."""
    others = (x for x in _RANKCLIP_OPTIONS if x.own_key not in _WITH_ORDERS)
    if text := changed(others, options):
        return f"orders: {options['orders']} excludes {text}"
    reason = error_of(lambda: Orders(options["orders"]).check())
    return reason and f"orders: {reason}"


def _orders_of(options: Options) -> list[RowCompanion]:
    orders = options["orders"]
    return [] if orders is None else [RowCompanion("list of ids", Orders(orders))]


def _log_of(options: Options) -> Any:
    return RankClipLog(options["agreement_every"]) if options["orders"] is None else log_orders


def _refuse_rankclip(options: Options, gather: Gather) -> str | None:
    if options["orders"] is not None and (reason := _refuse_orders(options)):
        return reason
    if options["reference"] == "own" and options["reference_features"] is not None:
        return f"reference_features: {options['reference_features']} excludes reference own"
    if not _has_teacher(options) and options["reference_scale"] is not None:
        return "reference_scale: multiplies a teacher's similarities, and needs reference teacher"
    if _has_teacher(options) and options["fixed_reference"] is not None:
        return "fixed_reference: fixes one of the batch's own rankings, not a teacher's"
    if not _has_teacher(options) and options["distill_loss"] == "exclude":
        return "distill_loss: exclude needs reference teacher, or the teacher has no use"
    alone = dataclasses.replace(gather, rank=0, world_size=1, group=None)  # which warns of nothing
    return error_of(lambda: (_build_rankclip(nn.Identity(), options, alone), _log_of(options)))


_SHORT_RAMP = 10  # epochs, below which λ rises in a few large steps


def _describe_rankclip(options: Options, epochs: float) -> str:
    unit = _rankclip_unit(options, epochs)
    text = f"schedule {options['schedule']} per {unit}"
    text += f" over {epochs:g} epoch(s)" if math.isfinite(epochs) else ""
    if unit != options["schedule_unit"]:
        text += " (one epoch has no ramp over epochs)"
    elif unit == "epoch" and epochs < _SHORT_RAMP and options["schedule"] != "constant":
        text += " (few values of lambda; schedule-unit step changes it at every optimizer step)"
    others = (option for option in _RANKCLIP_OPTIONS if not option.name.startswith("schedule"))
    largest = max(options["lambda_cross"], options["lambda_in"])
    is_large = _has_teacher(options) and largest > 1
    large = f"the rank terms weigh lambda * {largest:g}/16 and dominate the total: compare contrastive_loss"
    return ", ".join(filter(None, [text, changed(others, options), large if is_large else ""]))


_CITATION = """@inproceedings{zhang2025rankclip,
    title = {{RankCLIP}: Ranking-Consistent Language-Image Pretraining},
    author = {Zhang, Yiming and Zhao, Zhuokai and Chen, Zhaorun and Feng, Zhili and Ding, Zenghui and Sun, Yining},
    booktitle = {ICCV},
    year = {2025},
}"""  # noqa: E501
RANKCLIP = LossEntry(
    build=_build_rankclip,
    help="the trainer's own plus RankCLIP's ranking terms",
    options=_RANKCLIP_OPTIONS,
    prefix="rankclip",
    refuse=_refuse_rankclip,
    describe=_describe_rankclip,
    unit=_rankclip_unit,
    uses_teacher=_rankclip_teacher,
    in_separate_spaces=_rankclip_in_separate_spaces,
    reference_features=lambda options: options["reference_features"],
    keeps_distillation=lambda options: options["distill_loss"] == "include",
    companions=_orders_of,
    log=_log_of,
    citation=_CITATION,
)


def _preset(help: str, **defaults: Any) -> LossEntry:
    """RankCLIP with some other defaults, each of which can be given another value."""
    return dataclasses.replace(RANKCLIP.with_defaults(**defaults), help=help)


RANKCLIP_CROSS = _preset("rankclip without its in-modal term: the ablation RankCLIP^C", lambda_in=0.0)
RANKCLIP_IN = _preset("rankclip without its cross-modal term: the ablation RankCLIP^I", lambda_cross=0.0)

# The setting that the miniature confirmed (docs/evidence.md), with the recipe's ramp.
_DISTILLED: Any = {"reference": "teacher", "top_k": 8, "distill_loss": "exclude"}
# The best one of two encoders on emojis and icons (docs/evidence.md).
_OF_TWO_ENCODERS = {"lambda_in": 16.0, "top_k": 16}
RANKCLIP_DISTILL = dataclasses.replace(
    _preset(
        "rankclip trained to match a teacher's eight best ranks, of two encoders their sixteen best",
        lambda_cross=64.0,
        lambda_in=64.0,
        **_DISTILLED,
    ),
    in_separate_spaces=lambda given: {**_rankclip_in_separate_spaces(given), **_OF_TWO_ENCODERS},
)


# --- a teacher's features, copied -------------------------------------------------------------------------


def _build_mimicry(base: nn.Module, options: Options, gather: Gather) -> rankloss.MimicryLoss:
    given = {name: options[name] for name in ("weight", "contrast", "contrast_scale")}
    return rankloss.MimicryLoss(base, gather=gather, **given)


def _mimicry_in_separate_spaces(_: Options) -> dict[str, Any]:
    raise ValueError(
        "reference_features: the teacher's images and texts have separate spaces, which a student with one "
        "space cannot copy; rankclip-distill ranks by them"
    )


MIMICRY = LossEntry(
    build=_build_mimicry,
    help="the trainer's own plus the distance of the features from a teacher's",
    options=(
        Option("weight", 8.0, "weight of the squared distances", _WEIGHT),
        Option("contrast", 0.0, "weight of the contrast with the teacher's other modality", _WEIGHT),
        Option("contrast-scale", 20.0, "multiplier of that contrast's similarities", _WEIGHT),
        Option(
            "reference-features",
            None,
            f"learn from {_FOLDER}",
            {"metavar": "FOLDER"},
            "those of the teacher that the trainer has",
            for_trainer=True,
        ),
    ),
    refuse=lambda options, _: error_of(lambda: _build_mimicry(nn.Identity(), options, Gather.of(False))),
    uses_teacher=lambda _: True,
    in_separate_spaces=_mimicry_in_separate_spaces,
    reference_features=lambda options: options["reference_features"],
    keeps_distillation=lambda _: False,
    citation="""@inproceedings{yang2024clipkd,
    title = {{CLIP-KD}: An Empirical Study of {CLIP} Model Distillation},
    author = {Yang, Chuanguang and An, Zhulin and Huang, Libo and Bi, Junyu and Yu, Xinqiang and Yang, Han and Diao, Boyu and Xu, Yongjun},
    booktitle = {CVPR},
    year = {2024},
}""",  # noqa: E501
)


# --- CLIP's and SigLIP's own, in linear memory ------------------------------------------------------------

_STREAMED_OPTIONS = tuple(_rank_option(x) for x in _RANK_FIELDS if x.name in _STREAMING)


def _streamed(loss: type[rankloss.ClipLoss | rankloss.SigLipLoss], help: str, **needs: Any) -> LossEntry:
    """A loss in place of one that computes the same, and of no other.

    Where the trainer has no loss of its own, the base is CLIP's.
    """

    def build(base: nn.Module, options: Options, gather: Gather) -> nn.Module:
        if type(base).__name__ not in (loss.__name__, "ClipLoss"):
            raise ValueError(f"this is {loss.__name__}, but the trainer trains with {type(base).__name__}")
        return loss(gather=gather, **options)

    return LossEntry(build=build, help=help, options=_STREAMED_OPTIONS, prefix="streamed", **needs)


CLIP_STREAMED = _streamed(
    rankloss.ClipLoss,
    "CLIP's loss in memory linear in the batch",
    no_sigmoid="it is CLIP's softmax loss; siglip-streamed is the sigmoid loss",
)

SIGLIP_STREAMED = _streamed(
    rankloss.SigLipLoss,
    "SigLIP's loss in memory linear in the batch",
    only_sigmoid="the loss is that of a model with a bias",
)
