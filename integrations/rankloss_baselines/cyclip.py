"""CyCLIP: a base loss and the two cyclic consistency terms."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rankloss.distributed import GatherOption
from rankloss.losses import AddedTerms, Base, check_weight, product, widest_dtype


class CyClipLoss(AddedTerms):
    r"""CyCLIP: ``L_base + lambda_cross·cross + lambda_in·in``.

    With v_i, t_i the image and text features of the N pairs,

        cross = (1/N)·Σ_ij (v_i·t_j − v_j·t_i)²,   in = (1/N)·Σ_ij (v_i·v_j − t_i·t_j)².

    Both compare cosines, without the scale. As squared Frobenius norms of differences of N×N products they
    are computed from D×D moments of the features: memory and arithmetic grow linearly with N. A device
    without float64 (MPS) computes whole N×N matrices.

    Args:
        base: The loss that the terms are added to: a module or function with the forward convention of
            open_clip's losses, including ``output_dict``; it may also return a plain scalar. None:
            :class:`rankloss.ClipLoss`.
        lambda_cross: Weight of the cross-modal term.
        lambda_in: Weight of the in-modal term.
        gather: Gathering of other processes' features, for the terms and for the base that None builds.
            None: from the default process group, if one of more than one process is initialised, exactly.
            False: not at all. Else a :class:`rankloss.Gather`.

    Shapes:
        ``image_features`` and ``text_features``: ``[N, D]``, unit-norm; ``logit_scale``: the multiplier s
        itself, not its logarithm. The result is a scalar, float32 at least. ``output_dict=True`` gives the
        base's own entries, then the weighted ``cyclic_cross_modal_loss`` and ``cyclic_in_modal_loss``; they
        add up to the loss.

    Raises:
        ValueError: for a weight that is negative or not finite; in ``forward`` for features that are not two
            floating-point matrices of one shape with at least two rows in the whole batch, a scale that is
            not positive, or a base that has entries of the same names.

    References:
        "CyCLIP: Cyclic Contrastive Language-Image Pretraining", NeurIPS 2022.

    Example:
        >>> v, t = torch.eye(2), torch.tensor([[0.6, 0.8], [0.0, 1.0]])
        >>> entries = CyClipLoss()(v, t, logit_scale=1.0, output_dict=True)
        >>> round(entries["cyclic_cross_modal_loss"].item(), 4)  # 0.25 · ½ · 2 · 0.8²
        0.16
    """

    def __init__(
        self,
        base: Base | None = None,
        *,
        lambda_cross: float = 0.25,
        lambda_in: float = 0.25,
        gather: GatherOption = None,
    ) -> None:
        super().__init__(base, gather=gather)
        self.lambda_cross = check_weight("lambda_cross", lambda_cross)
        self.lambda_in = check_weight("lambda_in", lambda_in)

    def own_terms(
        self,
        image_features: Tensor,
        text_features: Tensor,
        scale: Tensor | float,  # noqa: ARG002
    ) -> dict[str, Tensor]:
        """The two weighted terms."""
        own = image_features, text_features
        anchors = items = _widened(*map(self.gather.items, own))
        if self.gather.anchors_are_local:
            anchors = _widened(*own)
        dtype = torch.promote_types(torch.promote_types(own[0].dtype, own[1].dtype), torch.float32)
        squares = (_squares if items[0].dtype == torch.float64 else _differences)(anchors, items)
        cross, in_ = ((x / len(anchors[0])).to(dtype) for x in squares)
        return {
            "cyclic_cross_modal_loss": self.lambda_cross * cross,
            "cyclic_in_modal_loss": self.lambda_in * in_,
        }


def _widened(image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    """The features as the terms, small differences of large norms, need them: float64 if the device has it.

    Relative errors of the value where the compared cosines differ by 1e-2 and by 1e-4: float32 moments 1e-3
    and 1, a direct sum of squares in float32 6e-8 and 4e-6, float64 moments 8e-13 and 2e-8.
    """
    dtype = widest_dtype(image.device)
    return image.to(dtype), text.to(dtype)


def _differences(anchors: tuple[Tensor, Tensor], items: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """As :func:`_squares`, by a direct sum over the entries of N×N matrices."""
    (v, t), (w, u) = anchors, items
    cross, in_ = (product(v, x.T) - product(t, y.T) for x, y in ((u, w), (w, u)))
    return cross.square().sum(), in_.square().sum()


def _squares(anchors: tuple[Tensor, Tensor], items: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """``Σ_ij (v_i·t_j − t_i·v_j)²`` and ``Σ_ij (v_i·v_j − t_i·t_j)²`` of the anchors i and the items j.

    They come from VᵀV, TᵀT and VᵀT, ``[D, D]`` each, of the anchors and of the items.
    """
    a = _Moments.of(*anchors)
    b = a if items is anchors else _Moments.of(*items)
    # Σ_ij (v_i·t_j)² = ⟨VᵀV, TᵀT⟩, and Σ_ij (v_i·t_j)·(t_i·v_j) = ⟨VᵀT, (VᵀT)ᵀ⟩, V and T of a side each.
    cross = _inner(a.image, b.text) + _inner(a.text, b.image) - 2 * _inner(a.between, b.between.T)
    in_ = _inner(a.image, b.image) + _inner(a.text, b.text) - 2 * _inner(a.between, b.between)
    # Rounding may leave values below 0, which become 0; the gradient, right to rounding, stays.
    return cross - cross.detach().clamp_max(0), in_ - in_.detach().clamp_max(0)


class _Moments(NamedTuple):
    """VᵀV, TᵀT and VᵀT."""

    image: Tensor
    text: Tensor
    between: Tensor

    @classmethod
    def of(cls, v: Tensor, t: Tensor) -> _Moments:
        return cls(v.T @ v, t.T @ t, v.T @ t)


def _inner(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum()
