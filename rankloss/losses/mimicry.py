"""Mimicry: a base loss and the distance of the features from a teacher's."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rankloss.distributed import GatherOption
from rankloss.losses.composition import TEACHER, Base
from rankloss.losses.gathering import Number
from rankloss.losses.own_terms import AddedTerms
from rankloss.options import check_weight
from rankloss.precision import arithmetic_dtype, constant, product


class MimicryLoss(AddedTerms):
    r"""A base loss plus the squared distances of the features v, t from a teacher's v', t'.

        L_base + weight · [mean_i ‖v_i − v'_i‖² + mean_i ‖t_i − t'_i‖²]

    With a teacher of one modality, only that modality has distances.

    Features of a teacher that is narrower than the student are padded with zeros, which keeps their products.
    Those of a wider one are projected onto its principal components, V'·P divided by its norms, with P in
    :attr:`components`, which the trainers' plug-ins set from a folder of features.

    The distances are computed in float32 at least, under autocast too. Under ``torch.compile`` the loss is
    one call between two graphs.

    Args:
        base: The loss to which the distances are added: a module or function with the forward convention of
            open_clip's losses. None: :class:`ClipLoss`.
        weight: Weight of the squared distances, above 0.
        gather: Gathering of other processes' features, for the default base and for processes that each
            compute all rows. None: exact, from the default process group, if one of several processes is
            initialised. False: none. Otherwise a :class:`rankloss.Gather`.

    Attributes:
        components: P, ``[D', D]`` with orthonormal columns, or None. It is not in checkpoints.

    Shapes:
        ``image_features`` and ``text_features``: ``[N, D]``, unit-norm. ``logit_scale``: the multiplier s of
        the base. ``reference_image_features`` and ``reference_text_features``: ``[N, D']``, unit-norm, D'
        above D with components; they carry no gradient. ``output_dict=True`` gives the base's entries,
        then the weighted ``mimicry_loss``.

    Raises:
        ValueError: for a weight that is not above 0 or not finite, or a base that cannot be called; in
            ``forward`` without a teacher's features, for features of another shape, and for a teacher that is
            wider than the student without components that fit.

    References:
        "CLIP-KD: An Empirical Study of CLIP Model Distillation", CVPR 2024.

    Example:
        >>> v = torch.eye(2)
        >>> teacher = {"reference_image_features": v, "reference_text_features": v.flip(0)}
        >>> entries = MimicryLoss()(v, v, 1.0, output_dict=True, **teacher)
        >>> entries["mimicry_loss"].item()
        16.0
    """

    min_pairs = 1
    one_space = False  # the base decides whether images are compared with texts

    def __init__(self, base: Base | None = None, *, weight: float = 8.0, gather: GatherOption = None) -> None:
        super().__init__(base, gather=gather)
        self.weight = check_weight("weight", weight, above=0.0)
        self.components: Tensor | None = None  # no buffer: to_empty() would leave it without numbers

    def own_terms(
        self,
        image_features: Tensor,
        text_features: Tensor,
        scale: Number,  # noqa: ARG002
        *,
        reference_image_features: Tensor | None = None,
        reference_text_features: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """``weight · [mean_i ‖v_i − v'_i‖² + mean_i ‖t_i − t'_i‖²]``."""
        students = image_features, text_features
        teachers = reference_image_features, reference_text_features
        dtype = arithmetic_dtype(*students)
        differences = []  # v − v' and t − t', of the modalities that the teacher has
        for argument, student, teacher in zip(TEACHER, students, teachers, strict=True):
            if teacher is not None:
                target = self._target(argument, teacher.to(dtype), student)
                differences.append(student.to(dtype) - target)
        if not differences:
            raise ValueError(f"MimicryLoss needs {' or '.join(TEACHER)}; got neither")
        return {"mimicry_loss": self.weight * self._mean_of_pairs(differences)}

    def _target(self, name: str, features: Tensor, student: Tensor) -> Tensor:
        """The teacher's features as ``[N, D]``, of the student's width: padded or projected; no gradient.

        Raises:
            ValueError: for wider features, unless ``components`` bring them to that width.
        """
        features = constant(features)
        width = student.shape[1]
        if features.shape[1] == width:
            return features
        if features.shape[1] < width:
            return F.pad(features, (0, width - features.shape[1]))
        if self.components is None:
            raise ValueError(
                f"{name} must have at most the student's width, {width}, to be compared with it; got "
                f"{features.shape[1]}. The principal components of a folder of features bring them to it: "
                f"loss.components = rankloss_features.Features(FOLDER).components({width}).matrix"
            )
        self.components = components = self.components.to(features.device)  # copied once
        if components.shape != (features.shape[1], width):
            raise ValueError(
                f"components must be {(features.shape[1], width)} for {name}; got {tuple(components.shape)}"
            )
        return F.normalize(product(features, components.to(features.dtype)), dim=-1)

    def _mean_of_pairs(self, differences: list[Tensor]) -> Tensor:
        """The mean over pairs of ``‖v − v'‖² + ‖t − t'‖²``.

        Over this process's pairs, or over all processes' pairs if every process computes all rows.
        """
        by_modality = [difference.square().sum(-1) for difference in differences]
        by_pair = torch.stack(by_modality).sum(0)
        if not self.gather.anchors_are_local:
            by_pair = self.gather.items(by_pair[:, None])
        return by_pair.mean()
