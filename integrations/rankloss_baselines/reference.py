"""The formulas once more, in NumPy float64 and symbol by symbol: the oracle of the tests."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["alip", "cyclic_cross_modal", "cyclic_in_modal"]

Array = NDArray[np.float64]


def cyclic_cross_modal(image_features: ArrayLike, text_features: ArrayLike) -> float:
    """CyCLIP's cross-modal term, ``(1/N)·Σ_ij (v_i·t_j − v_j·t_i)²``.

    Example:
        >>> round(cyclic_cross_modal(np.eye(2), [[0.6, 0.8], [0, 1]]), 4)  # ½ · 2 · 0.8²
        0.64
    """
    cosines = _cosines(image_features, text_features)
    return float(((cosines - cosines.T) ** 2).sum() / len(cosines))


def cyclic_in_modal(image_features: ArrayLike, text_features: ArrayLike) -> float:
    """CyCLIP's in-modal term, ``(1/N)·Σ_ij (v_i·v_j − t_i·t_j)²``.

    Example:
        >>> round(cyclic_in_modal(np.eye(2), [[0.6, 0.8], [0, 1]]), 4)  # ½ · 2 · 0.8²
        0.64
    """
    images, texts = _cosines(image_features, image_features), _cosines(text_features, text_features)
    return float(((images - texts) ** 2).sum() / len(images))


def alip(
    image_features: ArrayLike,
    text_features: ArrayLike,
    caption_features: ArrayLike,
    logit_scale: float = 1.0,
    *,
    histories: ArrayLike = (1.0, 1.0, 1.0),
    gamma_sample: float = 2.0,
    gamma_pair: float = 2.0,
    momentum: float = 0.99,
) -> dict[str, Any]:
    """One step of ALIP: the histories H, Hʳ, Hᶜ after it, the weights, and the two parts of the loss.

    Arguments as in :class:`rankloss_baselines.AlipLoss`; ``histories`` are those before the step.

    Example:
        >>> step = alip(np.eye(2), np.eye(2), np.eye(2), histories=(0, 0, 0))
        >>> round(step["text"] + step["caption"], 4)  # all gates open: twice CLIP's
        0.6265
    """
    v, t, c = (np.asarray(x, np.float64) for x in (image_features, text_features, caption_features))
    cosines = np.array([(t * c).sum(-1), (t * v).sum(-1), (c * v).sum(-1)])
    after = momentum * np.asarray(histories, np.float64) + (1 - momentum) * cosines.mean(-1)
    s, s_r, s_c = cosines - after[:, None]
    gate = np.exp(gamma_sample * s)
    w_s = np.minimum(1, gate)
    w_r = np.where(gate < 1, np.exp(gamma_pair * s_r), 1)
    w_c = np.where(gate < 1, np.exp(gamma_pair * s_c), 1)
    return {
        "histories": after,
        "weights": np.array([w_s, w_r, w_c]),
        "text": float((_nll(v, t, logit_scale) * w_s * w_r).mean()),
        "caption": float((_nll(v, c, logit_scale) * w_s * w_c).mean()),
    }


def _nll(v: Array, u: Array, s: float) -> Array:
    """``½[CE_k(s·V·Uᵀ) + CE_k(s·U·Vᵀ)]`` of every pair k."""
    logits = s * v @ u.T
    sums = np.logaddexp.reduce(logits, axis=0) + np.logaddexp.reduce(logits, axis=1)
    nll: Array = sums / 2 - logits.diagonal()
    return nll


def _cosines(a: ArrayLike, b: ArrayLike) -> Array:
    products: Array = np.asarray(a, np.float64) @ np.asarray(b, np.float64).T
    return products
