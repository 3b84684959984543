"""rankloss's own losses, as they are named.

The options of the rank terms are those of :class:`rankloss.options.RankOptions`: name, choices, bounds,
default and help stand there, and only there.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar, Literal

from torch import nn

import rankloss
from rankloss import schedules
from rankloss.distributed import Gather
from rankloss.options import RankOptions
from rankloss_trainers.logging import RankClipLog
from rankloss_trainers.named import NamedLoss, Options, option, taken_over

# --- RankCLIP -------------------------------------------------------------------------------------------

_RANK_OPTIONS = [field.name for field in dataclasses.fields(RankOptions)]
_SHORT_RAMP = 10  # epochs, below which λ rises in a few large steps
_FOLDER = (
    "a teacher's features from a folder of `rankloss features`; with a webdataset also the word "
    "samples (or samples:image, samples:text), for members image_features.npy and text_features.npy"
)


class RankClip(NamedLoss, RankOptions):
    """The trainer's own plus RankCLIP's ranking terms."""

    prefix = "rankclip"
    citation = """@inproceedings{zhang2025rankclip,
    title = {{RankCLIP}: Ranking-Consistent Language-Image Pretraining},
    author = {Zhang, Yiming and Zhao, Zhuokai and Chen, Zhaorun and Feng, Zhili and Ding, Zenghui and Sun, Yining},
    booktitle = {ICCV},
    year = {2025},
}"""  # noqa: E501
    of_two_encoders: ClassVar[Options] = {}

    # A value per anchor cannot be added to the base, and a sum is a mean times a weight.
    reduction: ClassVar[Any] = "mean"
    schedule: str = option("rankclip", "course of lambda over training", choices=schedules.NAMES)
    schedule_unit: Literal["epoch", "step"] = option(
        "epoch",
        "evaluate the schedule per epoch or per optimizer step; a run of one epoch goes by steps",
        for_trainer=True,
    )
    lambda_cross: float = option(1.0, "multiplies lambda in the cross-modal term", at_least=0)
    lambda_in: float = option(1.0, "multiplies lambda in the in-modal term", at_least=0)
    reference: Literal["auto", "own", "teacher"] = option(
        "auto",
        "the rankings to match: the batch's own, or a teacher's, which the trainer has or whose features "
        "come with the data; auto takes a teacher's where its features come with the data",
    )
    reference_features: str | None = option(
        None, f"rank by {_FOLDER}", none="none", metavar="FOLDER", for_trainer=True
    )
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
        return self.reference == "teacher" or self.reference_features is not None

    @property
    def teacher(self) -> str | None:
        return "required" if self.has_teacher else "none" if self.reference == "own" else None

    @property
    def keeps_distillation(self) -> bool:
        return self.distill_loss == "include"

    @classmethod
    def in_separate_spaces(cls, given: Options) -> Options:
        if given.get("lambda_cross"):
            raise ValueError(
                "lambda_cross: must be 0, as the teacher's images and texts have separate spaces, which "
                f"rank the in-modal lists alone; got {given['lambda_cross']}"
            )
        return {"lambda_cross": 0.0, **cls.of_two_encoders, **given}

    def refuse(self, gather: Gather) -> str | None:  # noqa: ARG002
        if self.reference == "own" and self.reference_features is not None:
            return f"reference_features: {self.reference_features} excludes reference own"
        if not self.has_teacher and self.reference_scale is not None:
            return "reference_scale: multiplies a teacher's similarities, and needs reference teacher"
        if self.has_teacher and self.fixed_reference is not None:
            return "fixed_reference: fixes one of the batch's own rankings, not a teacher's"
        if not self.has_teacher and self.distill_loss == "exclude":
            return "distill_loss: exclude needs reference teacher, or the teacher has no use"
        return None

    def build(self, base: Any, gather: Gather) -> rankloss.RankClipLoss:
        if self.lists == "batch" and gather.gather_with_grad:
            # One list of the whole batch is exact on every process, and so are a base's own rows.
            gather = dataclasses.replace(gather, local_loss=False)
        if type(base) in (rankloss.ClipLoss, rankloss.SigLipLoss):  # a subclass has other arguments
            streaming = {"chunk_size": self.chunk_size, "memory_budget": self.memory_budget}
            base = type(base)(gather=base.gather, **streaming)
        own = {name: getattr(self, name) for name in _RANK_OPTIONS}
        own.update(schedule=self.schedule, lambda_cross=self.lambda_cross, lambda_in=self.lambda_in)
        return rankloss.RankClipLoss(base, gather=gather, **own)

    def unit(self, epochs: float) -> str:
        return "step" if epochs == 1 and self.schedule != "constant" else self.schedule_unit

    def describe(self, epochs: float) -> str:
        unit = self.unit(epochs)
        text = f"schedule {self.schedule} per {unit}"
        text += f" over {epochs:g} epoch(s)" if math.isfinite(epochs) else ""
        if unit != self.schedule_unit:
            text += " (one epoch has no ramp over epochs)"
        elif unit == "epoch" and epochs < _SHORT_RAMP and self.schedule != "constant":
            text += " (few values of lambda; schedule-unit step changes it at every optimizer step)"
        largest = max(self.lambda_cross, self.lambda_in)
        is_large = self.has_teacher and largest > 1
        large = f"the rank terms weigh lambda * {largest:g}/16 and dominate the total"
        large = f"{large}: compare contrastive_loss" if is_large else ""
        return ", ".join(filter(None, [text, self.told("schedule", "schedule_unit"), large]))

    def log(self) -> RankClipLog:
        return RankClipLog(self.agreement_every)


class RankClipCross(RankClip):
    """rankclip without its in-modal term: the ablation RankCLIP^C"""

    lambda_in = 0.0


class RankClipIn(RankClip):
    """rankclip without its cross-modal term: the ablation RankCLIP^I"""

    lambda_cross = 0.0


class RankClipDistill(RankClip):
    """rankclip trained to match a teacher's eight best ranks, of two encoders their sixteen best"""

    # The setting that the miniature confirmed (docs/evidence.md), with the recipe's ramp.
    lambda_cross = 64.0
    lambda_in = 64.0
    reference = "teacher"
    top_k = 8
    distill_loss = "exclude"
    # The best one of two encoders on emojis and icons (docs/evidence.md).
    of_two_encoders: ClassVar[Options] = {"lambda_in": 16.0, "top_k": 16}


# --- a teacher's features, copied -------------------------------------------------------------------------


class Mimicry(NamedLoss):
    """The trainer's own plus the distance of the features from a teacher's."""

    teacher = "required"
    keeps_distillation = False
    citation = """@inproceedings{yang2024clipkd,
    title = {{CLIP-KD}: An Empirical Study of {CLIP} Model Distillation},
    author = {Yang, Chuanguang and An, Zhulin and Huang, Libo and Bi, Junyu and Yu, Xinqiang and Yang, Han and Diao, Boyu and Xu, Yongjun},
    booktitle = {CVPR},
    year = {2024},
}"""  # noqa: E501

    weight: float = option(8.0, "weight of the squared distances", at_least=0)
    contrast: float = option(0.0, "weight of the contrast with the teacher's other modality", at_least=0)
    contrast_scale: float = option(20.0, "multiplier of that contrast's similarities", at_least=0)
    reference_features: str | None = option(
        None,
        f"learn from {_FOLDER}",
        none="those of the teacher that the trainer has",
        metavar="FOLDER",
        for_trainer=True,
    )

    @classmethod
    def in_separate_spaces(cls, given: Options) -> Options:  # noqa: ARG003
        raise ValueError(
            "reference_features: the teacher's images and texts have separate spaces, which a student with "
            "one space cannot copy; rankclip-distill ranks by them"
        )

    def build(self, base: nn.Module, gather: Gather) -> rankloss.MimicryLoss:
        contrast = {"contrast": self.contrast, "contrast_scale": self.contrast_scale}
        return rankloss.MimicryLoss(base, weight=self.weight, gather=gather, **contrast)


# --- CLIP's and SigLIP's own, in linear memory ------------------------------------------------------------


class ClipStreamed(NamedLoss):
    """CLIP's loss in memory linear in the batch."""

    prefix = "streamed"
    no_sigmoid = "it is CLIP's softmax loss; siglip-streamed is the sigmoid loss"
    computes: ClassVar[type[nn.Module]] = rankloss.ClipLoss

    chunk_size: int | None = taken_over(RankOptions, "chunk_size")
    memory_budget: int | None = taken_over(RankOptions, "memory_budget")

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
