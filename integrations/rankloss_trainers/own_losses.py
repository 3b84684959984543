"""rankloss's own losses, as they are named.

The options of the rank terms are those of :class:`rankloss.options.RankOptions`: choices, bounds, default and
help stand there, and only there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import nn

import rankloss
from rankloss import schedules
from rankloss.distributed import Gather
from rankloss.options import KernelOption, Method, Model, RankOptions
from rankloss_features.folder import has_separate_spaces, is_of_one_model
from rankloss_trainers.extras import extra
from rankloss_trainers.logging import RankClipLog
from rankloss_trainers.named import NamedLoss, OptionError, Options, option, option_of

if TYPE_CHECKING:
    from typing_extensions import Self

# --- RankCLIP -------------------------------------------------------------------------------------------

_OF_TERMS = (
    *("model", "reference_scale", "top_k", "diagonal", "method", "bins"),
    *("chunk_size", "memory_budget", "kernel"),
)
_SHORT_RAMP = 10  # epochs, below which λ would rise in a few large steps
_FOLDER = "a teacher's features from a folder of `rankloss features`"
_SPEC = (
    "a teacher whose features of the training data are computed before the first step: MODEL:PRETRAINED of "
    "open_clip, image=A,text=B, image=A or text=B"
)


def unit_of(epochs: float) -> Literal["epoch", "step"]:
    """The unit of a schedule in a run that chooses none; steps where the number of epochs is unknown."""
    return "epoch" if _SHORT_RAMP <= epochs < math.inf else "step"


class RankClip(NamedLoss):
    """The trainer's own plus RankCLIP's ranking terms."""

    prefix = "rankclip"
    citation = """@inproceedings{zhang2025rankclip,
    title = {{RankCLIP}: Ranking-Consistent Language-Image Pretraining},
    author = {Zhang, Yiming and Zhao, Zhuokai and Chen, Zhaorun and Feng, Zhili and Ding, Zenghui and Sun, Yining},
    booktitle = {ICCV},
    year = {2025},
}"""  # noqa: E501
    of_two_encoders: ClassVar[Options] = {}
    """Defaults where the teacher is two encoders without a common space."""
    of_one_encoder: ClassVar[Options] = {}
    """Defaults where the teacher is named as the encoder of one modality."""

    schedule: str = option("rankclip", "course of lambda over training", choices=schedules.NAMES)
    schedule_unit: Literal["auto", "epoch", "step"] = option(
        "auto",
        "evaluate the schedule per epoch or per optimizer step; auto: per epoch in a run of ten or more",
        for_trainer=True,
    )
    lambda_cross: float = option(1.0, "multiplies lambda in the cross-modal term", at_least=0)
    lambda_in: float = option(1.0, "multiplies lambda in the in-modal term", at_least=0)
    model: Model = option_of(RankOptions, "model")
    reference_scale: float | None = option_of(RankOptions, "reference_scale")
    top_k: int | None = option_of(RankOptions, "top_k")
    diagonal: bool = option_of(RankOptions, "diagonal")
    method: Method = option_of(RankOptions, "method")
    bins: int = option_of(RankOptions, "bins")
    chunk_size: int | None = option_of(RankOptions, "chunk_size")
    memory_budget: int | None = option_of(RankOptions, "memory_budget")
    kernel: KernelOption = option_of(RankOptions, "kernel")
    reference: Literal["auto", "own", "teacher"] = option(
        "auto",
        "the rankings to match: the batch's own, or a teacher's, which the trainer has or whose features "
        "come with the data; auto takes a teacher's where its features come with the data",
    )
    reference_features: str | None = option(
        None, f"rank by {_FOLDER}", none="none", metavar="FOLDER", for_trainer=True
    )
    teacher: str | None = option(None, f"rank by {_SPEC}", none="none", metavar="SPEC", for_trainer=True)
    distill_loss: Literal["include", "exclude"] = option(
        "include",
        "include or exclude the own distillation term of a trainer that distils from a teacher",
        for_trainer=True,
    )
    agreement_every: int | None = option(
        None,
        "log the batch's rank agreement, Kendall's tau, measured at every so many optimizer steps",
        none="never",
        metavar="STEPS",
        for_trainer=True,
        at_least=1,
    )

    @property
    def has_teacher(self) -> bool:
        """True where the options ask for a teacher."""
        return self.reference == "teacher" or (self.reference_features or self.teacher) is not None

    @property
    def use_of_teacher(self) -> str | None:
        return "required" if self.has_teacher else "none" if self.reference == "own" else None

    @property
    def keeps_distillation(self) -> bool:
        return self.distill_loss == "include"

    @property
    def _of_terms(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _OF_TERMS}

    @classmethod
    def of(cls, given: Options) -> Self:
        """The loss with the options that were given; encoders without a common space teach in-modal lists."""
        spec = given.get("teacher", cls.options()["teacher"].default)
        is_named, are_stored = _is_of_encoders(spec), has_separate_spaces(given.get("reference_features"))
        if not (is_named or are_stored):
            return super().of(given)
        lambda_cross = cls.options()["lambda_cross"].checked(given.get("lambda_cross", 0.0))
        if lambda_cross:
            text = (
                "must be 0, as the teacher's images and texts have separate spaces, which rank the in-modal"
            )
            raise OptionError("lambda_cross", f"{text} lists alone; got {lambda_cross}")
        defaults = cls.of_two_encoders if are_stored or "," in spec else cls.of_one_encoder
        try:
            return super().of({"lambda_cross": 0.0, **defaults, **given})
        except OptionError as error:
            if error.key not in defaults or error.key in given:
                raise
            text = f"{error.reason} (a default where two encoders teach; --loss rankclip ranks by them)"
            raise OptionError(error.key, text, error.loss) from None

    def check(self) -> None:
        RankOptions(**self._of_terms)
        _check_teacher(self)
        for key in ("reference_features", "teacher"):
            if self.reference == "own" and getattr(self, key) is not None:
                raise OptionError(key, f"{getattr(self, key)} excludes reference own")
        if not self.has_teacher and self.reference_scale is not None:
            text = "multiplies a teacher's similarities, and needs reference teacher"
            raise OptionError("reference_scale", text)
        if not self.has_teacher and self.distill_loss == "exclude":
            raise OptionError("distill_loss", "exclude needs reference teacher, or the teacher has no use")

    def build(self, base: Any, gather: Gather) -> rankloss.RankClipLoss:
        # A subclass, and a loss with ids or smoothing, has options of its own.
        is_plain = type(base) in (rankloss.ClipLoss, rankloss.SigLipLoss) and base.same_id is None
        if is_plain and not getattr(base, "label_smoothing", 0.0):
            streaming = {"chunk_size": self.chunk_size, "memory_budget": self.memory_budget}
            base = type(base)(gather=base.gather, **streaming)
        return rankloss.RankClipLoss(
            base,
            schedule=self.schedule,
            lambda_cross=self.lambda_cross,
            lambda_in=self.lambda_in,
            gather=gather,
            **self._of_terms,
        )

    def unit(self, epochs: float) -> str:
        if self.schedule_unit == "auto":
            return unit_of(epochs)
        return "step" if epochs == 1 and self.schedule != "constant" else self.schedule_unit

    def describe(self, epochs: float) -> str:
        unit = self.unit(epochs)
        text = f"schedule {self.schedule} per {unit}"
        text += f" over {epochs:g} epoch(s)" if math.isfinite(epochs) else ""
        if unit == "step" and self.schedule_unit == "auto" and self.schedule != "constant":
            text += " (in fewer than ten epochs a ramp per epoch has few steps; schedule-unit epoch takes it)"
        elif unit != self.schedule_unit != "auto":
            text += " (one epoch has no ramp over epochs)"
        largest = max(self.lambda_cross, self.lambda_in)
        is_large = self.has_teacher and largest > 1
        large = f"the rank terms weigh lambda * {largest:g}/16 and dominate the total"
        large = f"{large}: compare contrastive_loss" if is_large else ""
        return ", ".join(filter(None, [text, self.told("schedule", "schedule_unit"), large]))

    def log(self) -> RankClipLog:
        return RankClipLog(self.agreement_every)


class RankClipCross(RankClip):
    """rankclip without its in-modal term: the ablation RankCLIP^C."""

    lambda_in: float = option_of(RankClip, "lambda_in", 0.0)


class RankClipIn(RankClip):
    """rankclip without its cross-modal term: the ablation RankCLIP^I."""

    lambda_cross: float = option_of(RankClip, "lambda_cross", 0.0)


class RankClipDistill(RankClip):
    """rankclip trained to match a teacher's eight best ranks, of two encoders their top-one probabilities."""

    # Of two encoders softmax is ahead of ranks, pooled over three data sets (docs/evidence.md).
    of_two_encoders: ClassVar[Options] = {
        "schedule": "constant",
        "lambda_in": 16.0,
        "model": "top_one",
        "reference_scale": 40.0,
        "top_k": None,
        "diagonal": False,
    }
    of_one_encoder: ClassVar[Options] = {"lambda_in": 16.0, "top_k": 16}
    # The setting of both that the miniature confirmed.
    beside: ClassVar[Mapping[str, Options]] = {
        "mimicry": {"lambda_cross": 16.0, "lambda_in": 16.0, "top_k": 4}
    }

    # The setting that the miniature confirmed (docs/evidence.md), with the recipe's ramp.
    lambda_cross: float = option_of(RankClip, "lambda_cross", 64.0)
    lambda_in: float = option_of(RankClip, "lambda_in", 64.0)
    reference: Literal["auto", "own", "teacher"] = option_of(RankClip, "reference", "teacher")
    top_k: int | None = option_of(RankClip, "top_k", 8)
    distill_loss: Literal["include", "exclude"] = option_of(RankClip, "distill_loss", "exclude")


class RankClipEncoders(RankClipDistill):
    """rankclip-distill taught by two small encoders of the extra `encoders`: pairs alone are needed."""

    teacher: str | None = option_of(RankClip, "teacher", "image=efficientnet-lite0,text=minilm")

    @classmethod
    def of(cls, given: Options) -> Self:
        """The loss with the options that were given; a folder of features stands for the encoders."""
        where = given.get("reference_features")
        return super().of(given if where is None else {"teacher": None, **given})

    def check(self) -> None:
        super().check()
        text = "must be of encoders; rankclip-distill learns from a model of both modalities"
        if self.teacher is not None and not _is_of_encoders(self.teacher):
            raise OptionError("teacher", f"{text}; got {self.teacher}")
        if is_of_one_model(self.reference_features):
            raise OptionError("reference_features", f"{text}; got {self.reference_features}")


def _is_of_encoders(spec: Any) -> bool:
    """True for a teacher of one or two encoders, which have no common space of images and texts."""
    return isinstance(spec, str) and spec.startswith(("image=", "text="))


def _check_teacher(loss: NamedLoss) -> None:
    """Raise an OptionError for a teacher that does not exist, or is given beside a folder."""
    if loss.teacher is None:
        return
    if loss.reference_features is not None:
        raise OptionError("teacher", f"{loss.teacher} excludes reference_features {loss.reference_features}")
    with extra("features"):
        from rankloss_features.caching import Spec
    try:
        Spec.of(loss.teacher).check()
    except ValueError as error:
        raise OptionError("teacher", str(error)) from error


# --- a teacher's features, copied -------------------------------------------------------------------------


class Mimicry(NamedLoss):
    """The trainer's own plus the distance of the features from a teacher's."""

    use_of_teacher = "required"
    keeps_distillation = False
    citation = """@inproceedings{yang2024clipkd,
    title = {{CLIP-KD}: An Empirical Study of {CLIP} Model Distillation},
    author = {Yang, Chuanguang and An, Zhulin and Huang, Libo and Bi, Junyu and Yu, Xinqiang and Yang, Han and Diao, Boyu and Xu, Yongjun},
    booktitle = {CVPR},
    year = {2024},
}"""  # noqa: E501
    beside: ClassVar[Mapping[str, Options]] = {"rankclip-distill": {"weight": 16.0}}

    weight: float = option(8.0, "weight of the squared distances", above=0)
    reference_features: str | None = option(
        None,
        f"learn from {_FOLDER}",
        none="those of the teacher that the trainer has",
        metavar="FOLDER",
        for_trainer=True,
    )

    teacher: str | None = option(None, f"learn from {_SPEC}", none="none", metavar="SPEC", for_trainer=True)

    def check(self) -> None:
        _check_teacher(self)
        if has_separate_spaces(self.reference_features) or _is_of_encoders(self.teacher):
            raise OptionError(
                "reference_features" if self.teacher is None else "teacher",
                "the teacher's images and texts have separate spaces, which a student with one space cannot "
                "copy; rankclip-distill ranks by them",
            )

    def build(self, base: nn.Module, gather: Gather) -> rankloss.MimicryLoss:
        return rankloss.MimicryLoss(base, weight=self.weight, gather=gather)


# --- CLIP's and SigLIP's own, in linear memory ------------------------------------------------------------


class ClipStreamed(NamedLoss):
    """CLIP's loss in memory linear in the batch."""

    prefix = "streamed"
    no_sigmoid = "it is CLIP's softmax loss; siglip-streamed is the sigmoid loss"
    computes: ClassVar[type[nn.Module]] = rankloss.ClipLoss

    chunk_size: int | None = option_of(RankOptions, "chunk_size")
    memory_budget: int | None = option_of(RankOptions, "memory_budget")

    def check(self) -> None:
        self.computes(**self.values)

    def build(self, base: Any, gather: Gather) -> nn.Module:
        """The loss in place of one that computes the same; CLIP's where the trainer has none of its own."""
        if type(base).__name__ not in (self.computes.__name__, "ClipLoss"):
            text = f"this is {self.computes.__name__}, but the trainer trains with {type(base).__name__}"
            raise ValueError(text)
        return self.computes(gather=gather, **self.values)


class SigLipStreamed(ClipStreamed):
    """SigLIP's loss in memory linear in the batch."""

    no_sigmoid = ""
    only_sigmoid = "the loss is that of a model with a bias"
    computes: ClassVar[type[nn.Module]] = rankloss.SigLipLoss
