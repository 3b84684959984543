r"""CLIP's own loss, also of pairs that belong together.

A row of logits x_i = s·c_i has the loss and the gradient by c_i

    L_i = log Z_i − Σ_j t_ij·x_ij,   G_ij = s·(e^{x_ij} / Z_i − t_ij),   Z_i = Σ_j e^{x_ij},

with the target t_i. Columns that the row ignores are in no sum and have no gradient. Smoothing changes the
target alone, so it adds a linear function of the logits, which sums of features give without a matrix.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rankloss.batch import Batch
from rankloss.checks import InputWarning
from rankloss.distributed import GatherOption, gather_once
from rankloss.graded import first_of_id
from rankloss.losses.gathering import Number, SameId, StreamedLoss, equal_ids, partners, scaled_cosines
from rankloss.losses.score_rows import mean_of_rows
from rankloss.options import check_weight
from rankloss.precision import nan_unless_finite, widest_dtype


class ClipLoss(StreamedLoss):
    r"""CLIP's symmetric InfoNCE: ``½[CE(s·V·Tᵀ) + CE(s·T·Vᵀ)]``, with target i for row i.

    Pairs of one id belong together: their images and texts are right for each other. With ``same_id`` the
    loss of row i is, in both directions,

        ignore   L_i = log[e^{x_ii} + Σ_{j : id_j ≠ id_i} e^{x_ij}] − x_ii
        share    L_i = log Σ_j e^{x_ij} − (1/n_i)·Σ_{j : id_j = id_i} x_ij

    with the logits x of the row and the number n_i of pairs of its id. Other pairs of the id are removed from
    the denominator, or share the target equally. If all ids differ, both are CLIP's loss.

    ``label_smoothing`` ε spreads a share of the target evenly over the columns that the row counts: all N, or
    with ``"ignore"`` the N − n_i + 1 of the denominator. In each of the formulas

        L_i = log Z_i − (1 − ε)·right_i − ε·mean_j x_ij

    where log Z_i is the logarithm of the denominator, right_i the row's right logit x_ii, or with ``"share"``
    the mean of those of its id, and j runs over the counted columns.

    Memory: within the budget the loss is open_clip's formula, bit for bit. A batch with more logits is
    computed in chunks of rows, value and gradient together, in float32 at least; products are TF32's where
    torch allows them. It differs from the formula by rounding; if the formula's logits are half precision, by
    their rounding. The backward pass keeps O(N·D), the forward pass holds O(chunk·N). Features in float16,
    where the formula's sum over a large batch overflows, are always computed in chunks.

    Args:
        same_id: Use of the pairs of one id: ignore takes them out of each other's terms, share lets them
            share their targets. None is a loss without ``pair_ids``.
        label_smoothing: Share ε of the target that is spread evenly over the columns, at least 0 and below 1.
        gather: Gathering of other processes' features. None: exact, from the default process group, if one of
            several processes is initialised. False: none. Otherwise a :class:`rankloss.Gather`.
        chunk_size: Rows computed at a time: less memory, same result.
        memory_budget: Bytes of a matrix of the whole batch above which the loss streams; None is 64 MiB on a
            CPU and 1 GiB elsewhere.

    Shapes:
        ``image_features`` and ``text_features``: ``[N, D]``, unit-norm; ``logit_scale``: the multiplier s
        itself, not its logarithm, a number or a tensor of one element. The result is a scalar in nats (within
        the budget in the dtype of torch's cross-entropy of the logits), or with ``output_dict=True``
        ``{"contrastive_loss": …}``. A ``logit_bias``, one number, is added to all logits and
        changes nothing; the first one gives a warning.
        ``pair_ids``: ``[N]`` integers of any dtype, gathered as the features are; only their equality counts.

    Raises:
        ValueError: for another ``same_id``, a ``label_smoothing`` outside [0, 1) or a negative budget; in
            ``forward`` for features that are not two floating-point matrices of one shape with at least one
            row, a scale that is not positive (not checked on an accelerator, where reading it would wait), a
            bias that is not one number, or ``pair_ids`` that are not N integers on the features' device, or
            are given without ``same_id`` or missing with it.

    References:
        "Learning Transferable Visual Models From Natural Language Supervision", ICML 2021,
        fig. 3. Shared targets: "Unified Contrastive Learning in Image-Text-Label Space", CVPR 2022 (UniCL);
        "Supervised Contrastive Learning", NeurIPS 2020 (SupCon), L_out with the own pair among the positives.
        Label smoothing: "Rethinking the Inception Architecture for Computer Vision", CVPR 2016, section 7.

    Example:
        >>> v = torch.eye(2)
        >>> round(ClipLoss()(v, v, logit_scale=1.0).item(), 4)  # log(1 + 1/e)
        0.3133
        >>> ids = torch.tensor([4, 4])  # two pairs of one caption
        >>> ClipLoss(same_id="ignore")(v, v, logit_scale=1.0, pair_ids=ids).item()
        0.0
        >>> round(ClipLoss(same_id="share")(v, v, logit_scale=1.0, pair_ids=ids).item(), 4)
        0.8133
        >>> round(ClipLoss(label_smoothing=0.2)(v, v, logit_scale=1.0).item(), 4)  # 0.3133 + 0.2·(1 − ½)
        0.4133
    """

    def __init__(
        self,
        *,
        same_id: SameId | None = None,
        label_smoothing: float = 0.0,
        gather: GatherOption = None,
        chunk_size: int | None = None,
        memory_budget: int | None = None,
    ) -> None:
        super().__init__(same_id=same_id, gather=gather, chunk_size=chunk_size, memory_budget=memory_budget)
        self.label_smoothing = check_weight("label_smoothing", label_smoothing, below=1.0)

    def warn_of_bias(self, logit_bias: Number | None) -> None:
        """Warn once of a bias, which no softmax depends on: a model that has one is SigLIP's."""
        if logit_bias is not None and "logit_bias" not in self._checked_once:
            self._checked_once.add("logit_bias")
            warnings.warn(
                "logit_bias is given, and CLIP's softmax does not depend on it. A model with a bias is one "
                "for rankloss.SigLipLoss, alone or as a base; with open_clip --siglip",
                InputWarning,
                stacklevel=1,
            )

    def compute(
        self,
        is_whole: bool,
        images: Tensor,
        texts: Tensor,
        scale: Number,
        bias: Number | None,
        ids: Tensor | None,
    ) -> Tensor:
        """The loss of checked inputs, by the formula or in chunks, and the summand of the smoothing.

        Smoothing takes ε of the target from the right logit and gives it to the mean of the counted ones: it
        adds ε·(right logit − mean logit) to the loss of a row.
        """
        with gather_once():  # the loss and the summand of smoothing gather the same features
            loss = super().compute(is_whole, images, texts, scale, bias, ids)
            if self.label_smoothing == 0:
                return loss
            excess = _excess_over_mean(self._batch(images, texts, scale), ids, self.same_id)
        return loss + (self.label_smoothing * excess).to(loss.dtype)

    @property
    def _changed_options(self) -> dict[str, Any]:
        """The options with other values than their defaults."""
        smoothing = {"label_smoothing": self.label_smoothing} if self.label_smoothing else {}
        return {**smoothing, **super()._changed_options}

    def _whole(
        self, images: Tensor, texts: Tensor, scale: Number, bias: Number | None, ids: Tensor | None
    ) -> Tensor:
        """The loss from whole matrices of logits, of this process's rows or of all."""
        all_images, all_texts = self.gather(images, texts)
        is_one_process = all_images is images
        if is_one_process or self.gather.anchors_are_local:
            per_image = scaled_cosines(scale, images, all_texts)
            per_text = scaled_cosines(scale, texts, all_images)
        else:  # both directions have the rows of all processes: one product for both, as open_clip has it
            per_image = scaled_cosines(scale, all_images, all_texts)
            per_text = per_image.T
        if bias is not None:
            per_image = per_image + bias
            per_text = per_text + bias
        first_row = self.gather.first_row(len(images))
        if ids is not None:
            loss = _cross_entropy((per_image, per_text), ids, self.same_id, first_row)
            # An infinite feature, whose logits are −∞, would be hidden where all rows here ignore its column.
            return nan_unless_finite(loss, all_images, all_texts).to(loss.dtype)
        own_columns = torch.arange(len(per_image), device=images.device) + first_row
        return (F.cross_entropy(per_image, own_columns) + F.cross_entropy(per_text, own_columns)) / 2

    def _streamed(
        self, images: Tensor, texts: Tensor, scale: Number, bias: Number | None, ids: Tensor | None
    ) -> Tensor:
        """The loss in chunks of rows; without ids it is the first term of the rank terms' pass."""
        if ids is None:
            without_rank_terms = 1.0, 0.0, 0.0
            inputs = images, texts, scale, bias
            contrastive, _, _ = self.weighted_terms(inputs, self._options, without_rank_terms)
            return contrastive
        batch = self._batch(images, texts, scale)
        row_loss = PairSoftmax(ids, self.same_id)
        loss = mean_of_rows(row_loss, batch.inputs._asdict(), batch.first_row, self._options.chunk_size)
        if isinstance(bias, Tensor):  # changes nothing, but DDP expects a gradient of a parameter
            loss = loss + 0 * bias.sum()
        return loss


def _excess_over_mean(batch: Batch, ids: Tensor | None, same_id: SameId | None) -> Tensor:
    """The right logit of a row less the mean of its counted logits, averaged over rows and directions."""
    total: Tensor
    rows_are_whole_batch = batch.inputs.image_anchors is None
    if ids is None and rows_are_whole_batch:
        # Both directions have the same sums: Σ_i v_i·t_i of the right cosines, Σ_ij v_i·t_j of all.
        v, t = batch.inputs.image, batch.inputs.text
        of_pairs = torch.dot(v.flatten(), t.flatten())
        of_all = (v.sum(0) * t.sum(0)).sum()
        total = batch.inputs.scale * (of_pairs - of_all / batch.items)
        return total / batch.items
    rows = slice(batch.first_row, batch.first_row + batch.anchors)
    of_cosines = []  # Σ_i (right cosine − mean cosine) of each direction
    for anchors, items, _ in batch.matrices("cross_modal"):
        right, mean = _right_and_mean_items(items, rows, ids, same_id)
        of_cosines.append((anchors * (right - mean)).sum())
    of_images, of_texts = of_cosines
    total = batch.inputs.scale * (of_images + of_texts)
    return total / (2 * batch.anchors)


def _right_and_mean_items(
    items: Tensor, rows: slice, ids: Tensor | None, same_id: SameId | None
) -> tuple[Tensor, Tensor]:
    """The mean of each row's right items, and that of its counted items: ``[n, D]`` each.

    An anchor's products with them, times the scale, are the row's right logit and its mean logit. Where every
    row counts all items, without ids and with ``"share"``, the second mean is one row ``[D]`` for all.
    """
    own = items[rows]
    mean_of_all = items.mean(0)
    if ids is None:
        return own, mean_of_all
    # In float64 where there is one: the sum of all less that of an id may be a small difference.
    widened = items.to(widest_dtype(items.device))
    sum_of_id = _sums_by_id(widened, ids)[rows]
    size = _sums_by_id(torch.ones_like(widened[:, :1]), ids)[rows]
    if same_id == "share":
        return sum_of_id / size, mean_of_all
    sum_of_counted = widened.sum(0) - sum_of_id + own
    return own, sum_of_counted / (len(items) - size + 1)


def _sums_by_id(features: Tensor, ids: Tensor) -> Tensor:
    """For every row i the sum of the rows that have its id: in the shape of ``features``."""
    first = first_of_id(ids)
    sums_at_first = torch.zeros_like(features).index_add(0, first, features)
    return sums_at_first[first]


def _cross_entropy(logits: Sequence[Tensor], ids: Tensor, same_id: SameId | None, first_row: int) -> Tensor:
    """The mean loss of the rows of both directions' logits, averaged; it may overwrite the logits."""
    rows = len(logits[0])
    dtype = logits[0].dtype
    if same_id == "ignore":
        target = torch.arange(first_row, first_row + rows, device=ids.device)
        ignored = partners(ids, first_row, rows)
        hidden = torch.zeros_like(ignored, dtype=dtype).masked_fill_(ignored, -math.inf)
        logits = [of_direction.add_(hidden) for of_direction in logits]
    else:
        target = _shares(ids, first_row, rows, dtype)
    return (F.cross_entropy(logits[0], target) + F.cross_entropy(logits[1], target)) / 2


def _shares(ids: Tensor, first_row: int, rows: int, dtype: torch.dtype) -> Tensor:
    """The targets t of rows, ``[rows, N]``: 1/n_i at each of the n_i pairs of the row's id, else 0."""
    same = equal_ids(ids, first_row, rows)
    return same.to(dtype).div_(same.sum(-1, keepdim=True))


class PairSoftmax(NamedTuple):
    """The loss of rows whose pairs of one id belong together, ``log Z_i − Σ_j t_ij·x_ij``."""

    ids: Tensor
    same_id: SameId | None

    def values(self, scores: Tensor, first_row: int) -> Tensor:
        """The loss of every row, differentiable any number of times."""
        rows = scores.shape[-2]
        if self.same_id == "ignore":
            counted = scores.masked_fill(partners(self.ids, first_row, rows), -math.inf)
            return counted.logsumexp(-1) - scores.diagonal(first_row, -2, -1)
        shares = _shares(self.ids, first_row, rows, scores.dtype)
        return scores.logsumexp(-1) - (shares * scores).sum(-1)

    def evaluate(self, scores: Tensor, first_row: int, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
        """The loss of every row, and its gradient, which overwrites the scores; None unless it is wanted."""
        rows = scores.shape[-2]
        if self.same_id == "ignore":
            scores.masked_fill_(partners(self.ids, first_row, rows), -math.inf)
            right = scores.diagonal(first_row, -2, -1)
        else:
            shares = _shares(self.ids, first_row, rows, scores.dtype)
            right = (shares * scores).sum(-1)
        log_sums = scores.logsumexp(-1)
        values = log_sums - right
        if not with_gradient:
            return values, None
        gradient = scores.sub_(log_sums[..., None]).exp_()  # the softmax, from which the target is taken
        if self.same_id == "ignore":
            gradient.diagonal(first_row, -2, -1).sub_(1)
        else:
            gradient.sub_(shares)
        return values, gradient
