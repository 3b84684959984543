"""``--loss rivals`` and ``--loss ablation``, registered as any other package registers its losses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rankloss import RankClipLoss, RankOptions
from rankloss.distributed import Gather
from rankloss.losses import base_entries
from rankloss.options import Discount, FixedReference, ListsOption, Worth
from rankloss_trainers.named import NamedLoss, option, option_of
from studies import distillation

TERMS = ("mimicry", "contrast", "relation", "softmax", "pearson", "distances")
SCALED = ("contrast", "relation", "softmax", "pearson")
_OF_FEATURES = ("mimicry", "contrast")  # what compares features of both in one space


class RivalsLoss(nn.Module):
    """``L_base + Σ weight·term``, the terms being those of :mod:`studies.distillation`; of one process.

    Args:
        base: The loss that the terms are added to; one that takes a teacher's features is given them, too.
        weights: Of the terms by name; one without a weight is left out.
        scales: Of contrast's logits, else of the teacher's similarities, by the term's name; the student's
            own ``logit_scale`` where one is missing.
        components: ``[D', D]``, what the teacher's features are multiplied by for mimicry and contrast, which
            compare them with the student's. None where the widths are the same.

    Example:
        >>> from rankloss import ClipLoss
        >>> v = torch.eye(2)
        >>> given = {"reference_image_features": v, "reference_text_features": v.flip(0)}
        >>> loss = RivalsLoss(ClipLoss(), {"mimicry": 2.0})
        >>> loss(v, v, 1.0, output_dict=True, **given)["mimicry_loss"].item()
        4.0
    """

    def __init__(
        self,
        base: nn.Module,
        weights: Mapping[str, float],
        scales: Mapping[str, float] | None = None,
        components: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.base, self.weights, self.scales = base, dict(weights), dict(scales or {})
        self.components = components

    def forward(
        self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None, output_dict: bool = False, *,
        reference_image_features: Tensor, reference_text_features: Tensor, **base_inputs: Any,
    ) -> Tensor | dict[str, Tensor]:  # fmt: skip
        """Return the loss, or with ``output_dict`` its summands."""
        references = {
            "reference_image_features": reference_image_features,
            "reference_text_features": reference_text_features,
        }
        inputs = image_features, text_features, logit_scale, logit_bias
        found = base_entries(self.base, *inputs, teacher=references, **base_inputs)
        student, teacher = (image_features, text_features), tuple(references.values())
        for name, weight in self.weights.items():
            scale = self.scales.get(name, logit_scale)
            given: list[Any] = [student, self._projected(teacher) if name in _OF_FEATURES else teacher]
            if name in SCALED:
                given.append(scale if name == "contrast" else (logit_scale, scale))
            found[f"{name}_loss"] = weight * getattr(distillation, name)(*given)
        return found if output_dict else torch.stack(list(found.values())).sum()

    def _projected(self, teacher: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if self.components is None:
            return teacher
        return tuple(F.normalize(x @ self.components.to(x), dim=-1) for x in teacher)


# --- as --loss names them ---


class _Rivals(NamedLoss):
    use_of_teacher = "required"
    keeps_distillation = False
    no_sigmoid = "its terms are those of a softmax loss"

    rank_lambda: float = option(0.0, "multiplies lambda of the terms ranked by the teacher", at_least=0)
    rank_top_k: int = option(8, "how many of the teacher's ranks count")
    components: str | None = option(
        None, "an .npy file of the teacher's principal components", none="none", metavar="PATH"
    )
    reference_features: str | None = option(
        None, "the teacher's precomputed features", none="those of the trainer's teacher", metavar="PATH"
    )

    def check(self) -> None:
        """Refuse several processes."""
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            raise ValueError("the terms are of one process")

    def build(self, base: Any, gather: Gather) -> RivalsLoss:
        """Return the terms with a weight, beside what ``--loss rankclip-distill`` trains with."""
        if self.rank_lambda:
            lambdas = {"lambda_cross": self.rank_lambda, "lambda_in": self.rank_lambda}
            base = RankClipLoss(base, top_k=self.rank_top_k, gather=gather, **lambdas)
        weights = {name: weight for name in TERMS if (weight := self.values[name])}
        scales = {name: scale for name in SCALED if (scale := self.values[f"{name}_scale"])}
        components = None if self.components is None else torch.from_numpy(np.load(self.components))
        return RivalsLoss(base, weights, scales, components)

    def unit(self, epochs: float) -> str:  # noqa: ARG002
        """Return "step"."""
        return "step"


_WEIGHTS = {name: option(0.0, f"weight of the term {name}", at_least=0) for name in TERMS}
_SCALES = {f"{name}_scale": option(None, f"scale of {name}", none="the student's") for name in SCALED}
_TYPES = {**dict.fromkeys(_WEIGHTS, float), **dict.fromkeys(_SCALES, float | None)}
_ABOUT = {"__doc__": "The trainer's own plus other ways to learn from a teacher.", "__annotations__": _TYPES}
RIVALS: type[NamedLoss] = type("Rivals", (_Rivals,), {**_ABOUT, **_WEIGHTS, **_SCALES})


class Ablation(NamedLoss):
    """RankCLIP with any option of its lists, λ being set per step: the settings of a search."""

    schedule: str = option("rankclip", "course of lambda over training")
    lambda_cross: float = option(1.0, "multiplies lambda in the cross-modal term", at_least=0)
    lambda_in: float = option(1.0, "multiplies lambda in the in-modal term", at_least=0)
    lists: ListsOption = option_of(RankOptions, "lists")
    worth: Worth = option_of(RankOptions, "worth")
    discount: Discount = option_of(RankOptions, "discount")
    top_k: int | None = option_of(RankOptions, "top_k")
    diagonal: bool = option_of(RankOptions, "diagonal")
    fixed_reference: FixedReference = option_of(RankOptions, "fixed_reference")

    def build(self, base: Any, gather: Gather) -> RankClipLoss:
        """Return the library's loss."""
        return RankClipLoss(base, gather=gather, **self.values)

    def unit(self, epochs: float) -> str:  # noqa: ARG002
        """Return "step"."""
        return "step"
