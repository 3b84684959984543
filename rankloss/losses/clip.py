r"""CLIP's own loss, also of pairs that belong together.

A row of logits x_i = s·c_i has the loss and the gradient by c_i

    L_i = log Z_i − Σ_j t_ij·x_ij,   G_ij = s·(e^{x_ij} / Z_i − t_ij),   Z_i = Σ_j e^{x_ij},

with the target t_i. Columns that the row ignores are in no sum and have no gradient.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rankloss import engine
from rankloss.batch import Batch, Inputs
from rankloss.losses.gathering import Number, SameId, StreamedLoss, of_one_id, partners
from rankloss.precision import nan_unless_finite


class ClipLoss(StreamedLoss):
    r"""CLIP's symmetric InfoNCE: ``½[CE(s·V·Tᵀ) + CE(s·T·Vᵀ)]``, with target i for row i.

    Pairs of one id belong together: their images and texts are right for each other. With ``same_id`` the
    loss of row i is, in both directions,

        ignore   L_i = log[e^{x_ii} + Σ_{j : id_j ≠ id_i} e^{x_ij}] − x_ii
        share    L_i = log Σ_j e^{x_ij} − (1/n_i)·Σ_{j : id_j = id_i} x_ij

    with the logits x of the row and the number n_i of pairs of its id: its partners leave the denominator, or
    share its target. Ids that all differ give CLIP's loss.

    Memory: within the budget the loss is open_clip's formula, bit for bit. A batch with more logits is
    computed in chunks of rows, value and gradient together, in float32 at least; products are TF32's where
    torch allows them. It differs from the formula by rounding; if the formula's logits are half precision, by
    their rounding. The backward pass keeps O(N·D), the forward pass holds O(chunk·N). Features in float16,
    where the formula's sum over a large batch overflows, are always computed in chunks.

    Args:
        same_id: the use of the pairs of one id in ``pair_ids``: ``"ignore"`` or ``"share"``; None for a loss
            without ids.
        gather: gathering of other processes' features. None: exact, from the default process group, if one of
            several processes is initialised. False: none. Otherwise a :class:`rankloss.Gather`.
        chunk_size: see :class:`rankloss.RankOptions`.
        memory_budget: see :class:`rankloss.RankOptions`.

    Shapes:
        ``image_features`` and ``text_features``: ``[N, D]``, unit-norm; ``logit_scale``: the multiplier s
        itself, not its logarithm, a number or a tensor of one element. The result is a scalar in nats (within
        the budget in the dtype of torch's cross-entropy of the logits), or with ``output_dict=True``
        ``{"contrastive_loss": …}``. A ``logit_bias``, one number, is added to all logits and changes nothing.
        ``pair_ids``: ``[N]`` integers of any dtype, gathered as the features are; only their equality counts.

    Raises:
        ValueError: for another ``same_id`` or a negative budget; in ``forward`` for features that are not two
            floating-point matrices of one shape with at least one row, a scale that is not positive (not
            checked on an accelerator, where reading it would wait), a bias that is not one number, or
            ``pair_ids`` that are not N integers on the features' device, or are given without ``same_id`` or
            missing with it.

    References:
        "Learning Transferable Visual Models From Natural Language Supervision", ICML 2021,
        fig. 3. Shared targets: "Unified Contrastive Learning in Image-Text-Label Space", CVPR 2022 (UniCL);
        "Supervised Contrastive Learning", NeurIPS 2020 (SupCon), L_out with the own pair among the positives.

    Example:
        >>> v = torch.eye(2)
        >>> round(ClipLoss()(v, v, logit_scale=1.0).item(), 4)  # log(1 + 1/e)
        0.3133
        >>> ids = torch.tensor([4, 4])  # two pairs of one caption
        >>> ClipLoss(same_id="ignore")(v, v, logit_scale=1.0, pair_ids=ids).item()
        0.0
        >>> round(ClipLoss(same_id="share")(v, v, logit_scale=1.0, pair_ids=ids).item(), 4)
        0.8133
    """

    def _whole(
        self, images: Tensor, texts: Tensor, scale: Number, bias: Number | None, ids: Tensor | None
    ) -> Tensor:
        all_images, all_texts = self.gather(images, texts)
        if all_images is images or self.gather.anchors_are_local:
            logits = scale * images @ all_texts.T, scale * texts @ all_images.T
        else:
            per_image = scale * all_images @ all_texts.T
            logits = per_image, per_image.T
        if bias is not None:
            logits = logits[0] + bias, logits[1] + bias
        first_row = self.gather.first_row(len(images))
        if ids is not None:
            loss = _cross_entropy(logits, ids, self.same_id, first_row)
            return nan_unless_finite(loss, all_images, all_texts).to(loss.dtype)
        own = torch.arange(len(logits[0]), device=images.device) + first_row
        return (F.cross_entropy(logits[0], own) + F.cross_entropy(logits[1], own)) / 2

    def _streamed(
        self, images: Tensor, texts: Tensor, scale: Number, bias: Number | None, ids: Tensor | None
    ) -> Tensor:
        if ids is None:
            return self.weighted_terms((images, texts, scale, bias), self._options, (1.0, 0.0, 0.0))[0]
        gather = self.gather
        anchors = (images, texts) if gather.anchors_are_local else None
        first_row = gather.first_row(len(images))
        batch = Batch.of(*gather(images, texts), scale, anchors=anchors, first_row=first_row)
        terms = PairSoftmax(batch, ids, self.same_id, self._options.chunk_size)
        weights = ids.new_ones(1, dtype=batch.sum_dtype)
        (loss,) = engine.apply(terms, weights, batch.inputs)
        return loss + 0 * bias.sum() if isinstance(bias, Tensor) else loss


def _cross_entropy(logits: Sequence[Tensor], ids: Tensor, same_id: SameId | None, first_row: int) -> Tensor:
    """The mean loss of the rows, averaged over the directions; it may overwrite the logits."""
    rows, dtype = len(logits[0]), logits[0].dtype
    if same_id == "ignore":
        target = torch.arange(first_row, first_row + rows, device=ids.device)
        ignored = partners(ids, first_row, rows)
        hidden = torch.zeros_like(ignored, dtype=dtype).masked_fill_(ignored, -math.inf)
        logits = [x.add_(hidden) for x in logits]
    else:
        target = _shares(ids, first_row, rows, dtype)
    return (F.cross_entropy(logits[0], target) + F.cross_entropy(logits[1], target)) / 2


def _shares(ids: Tensor, first_row: int, rows: int, dtype: torch.dtype) -> Tensor:
    """The targets t of rows that share them."""
    same = of_one_id(ids, first_row, rows)
    return same.to(dtype).div_(same.sum(-1, keepdim=True))


class PairSoftmax(NamedTuple):
    """The loss of a batch whose pairs of one id belong together."""

    batch: Batch
    ids: Tensor
    same_id: SameId | None
    chunk_size: int | None
    wanted: Sequence[bool] = (True,)

    def stream(self, inputs: Sequence[Any], weights: Tensor, with_gradient: bool) -> engine.Streamed:
        """The loss times its weight, and the gradient by each of the inputs."""
        batch = replace(self.batch, inputs=Inputs(*inputs))
        scale = batch.inputs.scale
        given = {name: x for name, x in batch.inputs._asdict().items() if x is not None}
        sums = {name: torch.zeros_like(x) for name, x in given.items()} if with_gradient else None

        def of_rows(cosines: Tensor, _: Tensor | None, first_row: int) -> Sequence[Tensor | None]:
            x, rows = scale * cosines, cosines.shape[1]
            if self.same_id == "ignore":
                x.masked_fill_(partners(self.ids, first_row, rows), -math.inf)
                right = x.diagonal(first_row, 1, 2)
            else:
                shares = _shares(self.ids, first_row, rows, x.dtype)
                right = (shares * x).sum(-1)
            log_sums = x.logsumexp(-1)
            value = log_sums - right
            if not with_gradient:
                return value, None, None
            gradient = torch.sub(x, log_sums[..., None], out=cosines).exp_()
            if self.same_id == "ignore":
                gradient.diagonal(first_row, 1, 2).sub_(1)
            else:
                gradient.sub_(shares)
            return value, None, gradient

        matrices = batch.matrices("cross_modal")
        found = engine.accumulate(of_rows, matrices, (), sums, batch.first_row, self.chunk_size)
        share = nan_unless_finite(weights[0] / (2 * batch.anchors), *batch.features)
        value = share * found[0].sum()
        if sums is None:
            return [value], [None] * len(inputs)
        is_local = "image_anchors" in given
        anchors = ("image_anchors", "text_anchors") if is_local else ("image", "text")
        by_scale = torch.stack([(sums[name] * given[name]).sum() for name in anchors]).sum()
        gradients = {name: x.mul_(share * scale) for name, x in sums.items()}
        # Where the anchors are the items, each matrix is in the sums twice.
        gradients["scale"] = (share * by_scale / (1 if is_local else 2)).to(scale.dtype)
        return [value], [gradients.get(name) for name in Inputs._fields]

    def definition(self, inputs: Sequence[Any], weights: Tensor) -> Sequence[Tensor]:
        """The same from the whole matrices."""
        batch = replace(self.batch, inputs=Inputs(*inputs))
        logits = [batch.inputs.scale * x.cosines() for x in batch.matrices("cross_modal")]
        loss = _cross_entropy(logits, self.ids, self.same_id, batch.first_row)
        return [nan_unless_finite(weights[0], *batch.features).to(loss.dtype) * loss]
