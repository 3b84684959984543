r"""SigLIP's loss, from the whole matrix of logits or in blocks of rows.

With logits x_ij = s·v_i·t_j + b, and y_ij = −x_ij if text j is right for image i, else x_ij,

    L = (1/n)·Σ_ij log(1 + e^{y_ij}),
    G_ij = n·∂L/∂x_ij = −σ(y_ij) where text j is right for image i, else σ(y_ij),   ∂b = (1/n)·Σ G.

Where pairs of one id are ignored, their terms and gradients are 0.
"""

from __future__ import annotations

import math
import warnings
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rankloss.checks import InputWarning
from rankloss.losses.gathering import Number, SameId, StreamedLoss, equal_ids, partners, scaled_cosines
from rankloss.losses.score_rows import mean_of_rows
from rankloss.precision import arithmetic_dtype, in_arithmetic, nan_unless_finite, sum_dtype

_LINEAR_FROM = 40.0  # from here log(1 + e^y) is y in float64


class SigLipLoss(StreamedLoss):
    r"""SigLIP's loss: a binary classification of every pair of an image and a text.

        L = −(1/N)·Σ_ij log σ(z_ij·(s·v_i·t_j + b)),   z_ij = 1 where i = j, else −1

    Pairs of one id belong together: their images and texts are right for each other. With
    ``same_id="share"`` z_ij = 1 where id_i = id_j. With ``"ignore"`` the sum runs over the pairs (i, j) with
    i = j or id_i ≠ id_j; it is still divided by N. So every remaining term has the weight and the gradient
    that it has without ids, and processes need not know each other's numbers of terms.

    Memory: within the budget the loss is open_clip's formula, bit for bit in one process. A batch with more
    logits is computed in chunks of images, value and gradient together, in float32 at least; products are
    TF32's where torch allows them. It differs from the formula by rounding; if the formula's logits are half
    precision, by their rounding. The backward pass keeps O(N·D), the forward pass holds O(chunk·N). Features
    in float16, where the formula's sum over a large batch overflows, are always computed in chunks.

    Several processes: open_clip's loss of a process is the sum over its own images and all texts, divided by
    the number of its own images. With both flags of ``gather`` this loss is the same, and DDP's average has
    the value and the gradient of the whole batch. Only texts are gathered then. Without ``gather_with_grad``
    other processes' features are constants; a process's own features never are.

    Args:
        same_id: Use of the pairs of one id: ignore takes them out of each other's terms, share lets them
            share their targets. None is a loss without ``pair_ids``.
        gather: Gathering of other processes' features. None: exact, from the default process group, if one of
            several processes is initialised. False: none. Otherwise a :class:`rankloss.Gather`.
        chunk_size: Rows computed at a time: less memory, same result.
        memory_budget: Bytes of a matrix of the whole batch above which the loss streams; None is 64 MiB on a
            CPU and 1 GiB elsewhere.

    Shapes:
        ``image_features`` and ``text_features``: ``[N, D]``, unit-norm; ``logit_scale``: the multiplier s
        itself, not its logarithm; ``logit_bias``: b, None for 0 (SigLIP starts from −10; without a bias the
        many pairs that do not match dominate). Both are a number or a tensor of one element. The result is a
        scalar in nats (within the budget in the dtype of torch's formula), or with ``output_dict=True``
        ``{"contrastive_loss": …}``. ``pair_ids``: ``[N]`` integers of any dtype, gathered as the texts are;
        only their equality counts.

    Raises:
        ValueError: for another ``same_id`` or a negative budget; in ``forward`` for features that are not two
            floating-point matrices of one shape with at least one row, a bias that is not one number, a scale
            that is not one positive number (its sign is not checked on an accelerator, where reading it would
            wait), or ``pair_ids`` that are not N integers on the features' device, or are given without
            ``same_id`` or missing with it.

    References:
        "Sigmoid Loss for Language Image Pre-Training", ICCV 2023. Several right texts of an image: "Unified
        Contrastive Learning in Image-Text-Label Space", CVPR 2022 (UniCL), there with a softmax.

    Example:
        >>> v = torch.eye(2)
        >>> round(SigLipLoss()(v, v, logit_scale=1.0).item(), 4)  # log(1 + 1/e) + log 2
        1.0064
        >>> ids = torch.tensor([4, 4])  # two pairs of one caption
        >>> round(SigLipLoss(same_id="ignore")(v, v, 1.0, 0.0, pair_ids=ids).item(), 4)  # log(1 + 1/e)
        0.3133
    """

    def warn_of_bias(self, logit_bias: Number | None) -> None:
        """Warn once of a missing bias."""
        if logit_bias is None and "logit_bias" not in self._checked_once:
            self._checked_once.add("logit_bias")
            warnings.warn(
                "logit_bias is not given, so it is 0. SigLIP starts from −10: without a bias the many pairs "
                "that do not match dominate; open_clip's models have one with --siglip or init_logit_bias",
                InputWarning,
                stacklevel=1,
            )

    def _whole(
        self, images: Tensor, texts: Tensor, scale: Number, bias: Number | None, ids: Tensor | None
    ) -> Tensor:
        """The loss from the whole matrix of logits, of this process's images or of all."""
        first_row = self.gather.first_row(len(images))
        images, texts = self._pairs(images, texts)
        logits = scaled_cosines(scale, images, texts)
        if bias is not None:
            logits += bias  # in place: a bias of shape [1] does not change the dtype
        total = _log_likelihoods(logits, images.dtype, first_row, ids, self.same_id).sum()
        loss = -total / len(images)
        # With infinite features or overflowing products the sigmoid loss could be a finite number.
        return nan_unless_finite(loss, images, texts).to(loss.dtype)

    def _streamed(
        self, images: Tensor, texts: Tensor, scale: Number, bias: Number | None, ids: Tensor | None
    ) -> Tensor:
        """The loss in chunks of the images' rows."""
        dtype = arithmetic_dtype(images, texts)
        device = images.device
        first_row = self.gather.first_row(len(images))
        images, texts = self._pairs(images, texts)
        inputs = {
            "image": in_arithmetic(images, dtype, device),
            "text": in_arithmetic(texts, dtype, device),
            "scale": in_arithmetic(scale, dtype, device).reshape(()),
            "bias": in_arithmetic(0.0 if bias is None else bias, dtype, device).reshape(()),
        }
        row_loss = PairSigmoid(ids, self.same_id)
        factors = [("image", "text")]  # one matrix, since a pair's term is the same in both directions
        return mean_of_rows(row_loss, inputs, first_row, self._options.chunk_size, factors)

    def _pairs(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
        """The images of the rows that this process computes, its own or all, and all texts."""
        # Images are rows, texts are not: a process's own texts get their gradient through the gathering.
        rows = images if self.gather.anchors_are_local else self.gather.items(images)
        return rows, self.gather.items(texts, are_anchors=False)


class PairSigmoid(NamedTuple):
    """The loss of rows of logits, ``Σ_j log(1 + e^{y_ij})``."""

    ids: Tensor | None = None
    same_id: SameId | None = None

    def values(self, scores: Tensor, first_row: int) -> Tensor:
        """The loss of every row, differentiable any number of times."""
        return -_log_likelihoods(scores, scores.dtype, first_row, self.ids, self.same_id).sum(-1)

    def evaluate(self, scores: Tensor, first_row: int, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
        """The loss of every row, and its gradient, which overwrites the scores; None unless it is wanted."""
        rows = scores.shape[-2]
        # y is x with the other sign where a text is right. ``signed`` is a view of the entries with a sign.
        y = scores
        if self.ids is not None and self.same_id == "share":
            signed = y
            sign: Number = 1 - 2 * equal_ids(self.ids, first_row, rows).to(y.dtype)
        else:
            signed = y.diagonal(first_row, -2, -1)
            sign = -1.0
            if self.ids is not None:
                # log(1 + e^y) and its slope are 0 at −∞.
                y.masked_fill_(partners(self.ids, first_row, rows), -math.inf)
        signed.mul_(sign)
        values = F.softplus(y, threshold=_LINEAR_FROM).sum(-1, dtype=sum_dtype(y))
        if not with_gradient:
            return values, None
        gradient = y.sigmoid_()
        signed.mul_(sign)  # the derivative of y by x
        return values, gradient


def _log_likelihoods(
    logits: Tensor, dtype: torch.dtype, first_row: int, ids: Tensor | None, same_id: SameId | None
) -> Tensor:
    """The log σ(z_ij·x_ij) of every pair, with z in a dtype; 0 for a pair that does not count."""
    rows, columns = logits.shape
    distinct_ids = torch.arange(columns, device=logits.device)  # by which the own text alone is right
    right_ids = distinct_ids if ids is None or same_id == "ignore" else ids
    z = 2 * equal_ids(right_ids, first_row, rows).to(dtype) - 1
    terms = F.logsigmoid(z * logits)
    if ids is not None and same_id == "ignore":
        terms = terms.masked_fill(partners(ids, first_row, rows), 0.0)
    return terms
