"""The rank terms as they are usually first written, in eager operations on whole matrices: the baseline.

Four list-wise likelihoods of N×N matrices: shuffle, sort the reference, exponentiate around the row's
maximum, reverse running sum, logarithm with a floor. Memory is quadratic in N several times over.
"""

from __future__ import annotations

import torch
from torch import Tensor


def list_nll(scores: Tensor, reference: Tensor) -> Tensor:
    """The list-wise likelihood's negative logarithm: its sum over a list, its mean over the lists."""
    shuffle = torch.randperm(scores.shape[-1], device=scores.device)
    _, order = reference[:, shuffle].sort(dim=-1, descending=True)
    ranked = scores[:, shuffle].gather(1, order)
    shifted = ranked - ranked.amax(dim=1, keepdim=True)
    tails = shifted.exp().flip(1).cumsum(1).flip(1)
    return ((tails + 1e-10).log() - shifted).sum(1).mean()


def naive_rank_terms(image_features: Tensor, text_features: Tensor, logit_scale: Tensor | float) -> Tensor:
    """Cross-modal and in-modal terms, in nats per item as ``RankConsistency`` gives them."""
    per_image = logit_scale * image_features @ text_features.T
    per_text = per_image.T
    images = logit_scale * image_features @ image_features.T
    texts = logit_scale * text_features @ text_features.T
    cross = list_nll(per_image, per_text) + list_nll(per_text, per_image)
    within = list_nll(images, texts) + list_nll(texts, images)
    return (cross + within) / (2 * len(image_features))
