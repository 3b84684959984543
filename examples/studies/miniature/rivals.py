"""``--loss rivals`` and ``--loss ablation``, registered as any other package registers its losses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from rankloss import RankClipLoss, RankOptions
from rankloss.distributed import Gather, GatherOption
from rankloss.losses import Base, GatheringLoss, base_entries, check_base, check_weight, combined
from rankloss.options import Discount, FixedReference, ListsOption, Worth
from rankloss.precision import arithmetic_dtype, full_precision
from rankloss_trainers.named import NamedLoss, option, taken_over
from studies.distillation import Pair, contrast, distances, mimicry, pearson, relation, softmax

_OF_FEATURES = {"mimicry": mimicry, "contrast": contrast}  # what compares features of both in one space
_OF_RELATIONS: dict[str, Callable[..., Tensor]] = {
    "relation": relation,
    "softmax": softmax,
    "pearson": pearson,
    "distances": distances,
}
TERMS: dict[str, Callable[..., Tensor]] = {**_OF_FEATURES, **_OF_RELATIONS}
SCALED = ("contrast", "relation", "softmax", "pearson")


class RivalsLoss(GatheringLoss):
    """``L_base + Σ weight·term``, the terms being those of :data:`TERMS`, over the pairs of all processes.

    Args:
        base: the loss that the terms are added to, with the forward convention of open_clip's losses. None:
            :class:`rankloss.ClipLoss`. One that takes a teacher's features is given them, too.
        components: ``[D', D]``, what the teacher's features are multiplied by for mimicry and contrast, which
            compare them with the student's; the result is given unit norm. See
            :func:`studies.distillation.principal_components`. None where the widths are the same.
        scales: the scale of a term by its name: of contrast's logits, else of the teacher's similarities. One
            that is missing or None is the student's own, ``logit_scale``.
        gather: see :class:`rankloss.Gather`. Every process computes the terms of the whole batch.
        **weights: of the terms by name; a term without one is left out.

    Raises:
        ValueError: for a weight that is negative or not finite, or no term; for a scale that is not positive;
            for components that are no matrix; in ``forward`` for wrong features, as in rankloss's losses, for
            a teacher's of another width than the student's where the terms need the same, and for several
            processes with ``local_loss`` and without ``gather_with_grad``, which leave no gradient here.

    Example:
        >>> v = torch.eye(2)
        >>> entries = RivalsLoss(mimicry=2.0)(
        ...     v, v, 1.0, output_dict=True, reference_image_features=v, reference_text_features=v.flip(0)
        ... )
        >>> entries["mimicry_loss"].item()
        4.0
    """

    def __init__(
        self,
        base: Base | None = None,
        *,
        components: Tensor | None = None,
        scales: Mapping[str, float | None] | None = None,
        gather: GatherOption = None,
        **weights: float,
    ) -> None:
        super().__init__(gather)
        unknown = [*(weights.keys() - TERMS.keys()), *((scales or {}).keys() - {*SCALED})]
        if unknown:
            raise ValueError(
                f"terms are {', '.join(TERMS)}, with a scale {', '.join(SCALED)}; got {unknown[0]}"
            )
        self.base = check_base(base, self.gather)
        self.weights = {name: w for name in TERMS if (w := check_weight(name, weights.get(name, 0.0))) > 0}
        if not self.weights:
            raise ValueError(f"one of {', '.join(TERMS)} must have a weight above 0; got {weights}")
        self.scales = {name: scale for name, scale in (scales or {}).items() if scale is not None}
        for name, scale in self.scales.items():
            if check_weight(f"{name}_scale", scale) == 0:
                raise ValueError(f"{name}_scale must be above 0; got {scale!r}")
        if components is not None and (components.dim() != 2 or not components.is_floating_point()):
            kind = f"{components.dtype} {tuple(components.shape)}"
            raise ValueError(f"components must be a floating-point matrix; got {kind}")
        self.components = components

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        output_dict: bool = False,
        *,
        reference_image_features: Tensor,
        reference_text_features: Tensor,
        **base_inputs: Any,
    ) -> Tensor | dict[str, Tensor]:
        """The loss, or with ``output_dict`` its summands; ``base_inputs`` go to the base alone."""
        references = {
            "reference_image_features": reference_image_features,
            "reference_text_features": reference_text_features,
        }
        self.check_inputs(image_features, text_features, logit_scale, **references)
        _check_layout(self.gather)
        inputs = image_features, text_features, logit_scale, logit_bias
        entries = base_entries(self.base, *inputs, teacher=references, **base_inputs)
        both = *self.gather(image_features, text_features), *self.gather.constants(*references.values())
        dtype = arithmetic_dtype(image_features, text_features)
        images, texts, *teacher = (x.to(dtype) for x in both)
        with full_precision(images.device):
            own = self._terms((images, texts), cast(Pair, tuple(teacher)), logit_scale)
        return combined(entries, own, output_dict)

    def _terms(self, student: Pair, teacher: Pair, logit_scale: Tensor | float) -> dict[str, Tensor]:
        """Each term times its weight, by its name in the log."""
        own = {}
        for name, weight_ in self.weights.items():
            scale = self.scales.get(name, logit_scale)
            if name in _OF_FEATURES:
                given: list[Any] = [student, self._in_students_space(teacher, student[0].shape[1])]
                given += [scale] if name in SCALED else []
            else:
                given = [student, teacher, *([(logit_scale, scale)] if name in SCALED else [])]
            own[f"{name}_loss"] = weight_ * TERMS[name](*given)
        return own

    def _in_students_space(self, teacher: Pair, width: int) -> Pair:
        if self.components is not None:
            components = self.components.to(teacher[0])
            if len(components) != teacher[0].shape[1]:
                raise ValueError(
                    "components must have as many rows as the teacher's features have numbers, "
                    f"{teacher[0].shape[1]}; got {tuple(components.shape)}"
                )
            teacher = tuple(F.normalize(x @ components, dim=-1) for x in teacher)  # type: ignore[assignment]
        for name, x in zip(("image", "text"), teacher, strict=True):
            if x.shape[1] != width:
                raise ValueError(
                    f"reference_{name}_features must have the student's width, {width}, to be compared with "
                    f"its features; got {x.shape[1]}: give the teacher's principal components"
                )
        return teacher

    def extra_repr(self) -> str:
        """The weights and scales."""
        said = {**self.weights, **{f"{name}_scale": scale for name, scale in self.scales.items()}}
        return ", ".join(f"{name}={value:g}" for name, value in said.items())


def _check_layout(gather: Gather) -> None:
    if gather.anchors_are_local and not gather.gather_with_grad:
        raise ValueError("--local-loss needs --gather-with-grad: without it the terms have no gradient")


# --- as --loss names it -----------------------------------------------------------------------------------


class _Rivals(NamedLoss):
    teacher = "required"
    keeps_distillation = False
    no_sigmoid = "its terms are those of a softmax loss"

    rank_lambda: float = option(0.0, "multiplies lambda of the terms ranked by the teacher", at_least=0)
    rank_top_k: int = option(8, "how many of the teacher's ranks count")
    components: str | None = option(
        None, "an .npy file of the teacher's principal components", none="none", metavar="PATH"
    )
    reference_features: str | None = option(
        None,
        "the teacher's precomputed features, as for rankclip",
        none="those of the teacher that the trainer has",
        metavar="PATH",
    )

    def refuse(self, gather: Gather) -> str | None:
        try:
            _check_layout(gather)
            _components(self.components)
        except (ValueError, OSError) as error:
            return str(error)
        return None

    def build(self, base: Any, gather: Gather) -> RivalsLoss:
        if self.rank_lambda:  # what --loss rankclip-distill trains with
            lambdas = {"lambda_cross": self.rank_lambda, "lambda_in": self.rank_lambda}
            base = RankClipLoss(base, top_k=self.rank_top_k, gather=gather, **lambdas)
        scales = {name: self.values[f"{name}_scale"] for name in SCALED}
        own = {name: self.values[name] for name in TERMS}
        return RivalsLoss(base, components=_components(self.components), scales=scales, gather=gather, **own)

    def unit(self, epochs: float) -> str:  # noqa: ARG002
        return "step"


def _components(path: str | None) -> Tensor | None:
    try:
        return None if path is None else torch.from_numpy(np.load(path))
    except (ValueError, OSError) as error:  # whatever the file can be
        raise ValueError(f"components: {error}") from error


_WEIGHTS = {name: option(0.0, f"weight of the term {name}", at_least=0) for name in TERMS}
_SCALES = {f"{name}_scale": option(None, f"scale of {name}", none="the student's") for name in SCALED}
_TYPES = {**dict.fromkeys(_WEIGHTS, float), **dict.fromkeys(_SCALES, float | None)}
RIVALS: type[NamedLoss] = type(
    "Rivals",
    (_Rivals,),
    {
        "__doc__": "The trainer's own plus other ways to learn from a teacher.",
        "__annotations__": _TYPES,
        **_WEIGHTS,
        **_SCALES,
    },
)


class Ablation(NamedLoss):
    """RankCLIP with any option of its lists, λ being set per step: the settings of a search."""

    schedule: str = option("rankclip", "course of lambda over training")
    lambda_cross: float = option(1.0, "multiplies lambda in the cross-modal term", at_least=0)
    lambda_in: float = option(1.0, "multiplies lambda in the in-modal term", at_least=0)
    lists: ListsOption = taken_over(RankOptions, "lists")
    worth: Worth = taken_over(RankOptions, "worth")
    discount: Discount = taken_over(RankOptions, "discount")
    top_k: int | None = taken_over(RankOptions, "top_k")
    diagonal: bool = taken_over(RankOptions, "diagonal")
    fixed_reference: FixedReference = taken_over(RankOptions, "fixed_reference")

    def build(self, base: Any, gather: Gather) -> RankClipLoss:
        """Return the library's loss."""
        return RankClipLoss(base, gather=gather, **self.values)

    def unit(self, epochs: float) -> str:  # noqa: ARG002
        """Return "step"."""
        return "step"
