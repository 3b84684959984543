"""Spread: a base loss, and the standard deviation of the similarities within each modality."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rankloss.checks import kind_of
from rankloss.distributed import GatherOption
from rankloss.losses.composition import Base
from rankloss.losses.gathering import Number
from rankloss.losses.own_terms import AddedTerms
from rankloss.options import check_weight
from rankloss.precision import arithmetic_dtype, in_arithmetic
from rankloss.spread import spread


class SpreadLoss(AddedTerms):
    r"""A base loss plus the spread of each modality: how much its similarities vary around an item.

        L_base + weight · ½ [σ(V) + σ(T)],   σ(X) = (1/N) Σ_i √(Var_{j≠i}(s·x_i·x_j) + ε·s²)

    V, T are the image and text features of the N pairs, x_i a row of X; the variance is the mean squared
    deviation over the N − 1 other items, and ε = 1e-9 gives its root a gradient where all are equal. The term
    pushes similar items of a modality apart until all are equally far from each other, without a teacher. The
    scale s is a constant in it: it gets its gradient from the base alone.

    With more than D pairs no N × N matrix is held: σ follows from the mean and the covariance of the
    features, N·D + D² numbers. Of at most D pairs the matrix of similarities is the smaller one, and is
    computed. Over processes, means and covariances are summed, D + D² numbers a modality, forward and
    backward.

    The term is computed in float32 at least, under autocast too. Under ``torch.compile`` the loss is one call
    between two graphs.

    Args:
        base: The loss to which the spread is added: a module or function with the forward convention of
            open_clip's losses. None: :class:`ClipLoss`.
        weight: Weight of the spread, at least 0.
        gather: Gathering of other processes' features, for the term and for the default base. None: exact,
            from the default process group, if one of several processes is initialised. False: none. Otherwise
            a :class:`rankloss.Gather`.

    Shapes:
        ``image_features`` and ``text_features``: ``[N, D]``, unit-norm, N at least 2. ``logit_scale``: the
        multiplier s. The result is a scalar, float32 at least. ``output_dict=True`` gives the base's entries,
        then the weighted ``spread_loss``.

    Raises:
        ValueError: for a weight that is negative or not finite, or a base that cannot be called; in
            ``forward`` for features that are not two floating-point matrices of N rows with at least two rows
            in the whole batch, a scale that is not positive, or a base without an entry
            ``contrastive_loss``.

    References:
        Uniformity: "Understanding Contrastive Representation Learning through Alignment and Uniformity on the
        Hypersphere", ICML 2020. Second moments of a modality's similarities: "Learning Spread-out Local
        Feature Descriptors", ICCV 2017.

    Example:
        >>> import rankloss, torch
        >>> image_features = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
        >>> text_features = torch.tensor([[0.8, 0.6], [0.6, 0.8], [0.0, 1.0]])
        >>> entries = SpreadLoss()(image_features, text_features, logit_scale=10.0, output_dict=True)
        >>> {name: round(x.item(), 2) for name, x in entries.items()}
        {'contrastive_loss': 0.49, 'spread_loss': 0.58}
    """

    one_space = False  # the base decides whether images are compared with texts

    def __init__(self, base: Base | None = None, *, weight: float = 0.3, gather: GatherOption = None) -> None:
        super().__init__(base, gather=gather)
        self.weight = check_weight("weight", weight)

    def own_terms(self, image_features: Tensor, text_features: Tensor, scale: Number) -> dict[str, Tensor]:
        """``weight · ½ [σ(V) + σ(T)]``."""
        dtype = arithmetic_dtype(image_features, text_features)
        # A constant: learned through the term, the scale would fall, which softens the base's softmax, too.
        constant_scale = in_arithmetic(scale, dtype, image_features.device).detach().reshape(())
        spreads = [spread(x, self.gather, dtype) for x in (image_features, text_features)]
        return {"spread_loss": self.weight * constant_scale * torch.stack(spreads).mean()}

    def entries_of_base(self, *inputs: Any, **named: Any) -> dict[str, Tensor]:
        """The base's entries.

        Raises:
            ValueError: unless they have a loss of pairs, ``contrastive_loss``.
        """
        entries = super().entries_of_base(*inputs, **named)
        if not isinstance(entries.get("contrastive_loss"), Tensor):
            entries_given = ", ".join(f"{name} ({kind_of(x)})" for name, x in entries.items())
            raise ValueError(
                "base must give a loss of pairs, an entry contrastive_loss, since the spread alone brings no "
                f"caption to its picture; got {entries_given or 'no entry'}"
            )
        return entries
