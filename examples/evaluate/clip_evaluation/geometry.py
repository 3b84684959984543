"""The shape of the embedding space: alignment, uniformity, modality gap, and how rankings agree."""

from torch import Tensor

from rankloss import metrics

MAX_ANCHORS = 1024


def geometry(
    image_features: Tensor, text_features: Tensor, *, max_anchors: int | None = MAX_ANCHORS
) -> dict[str, float]:
    """Return what :mod:`rankloss.metrics` says of unit-norm pairs, ``[N, D]`` each.

    The rankings are compared for ``max_anchors`` rows, or for all of them if None.
    """
    values = {
        "alignment": metrics.alignment(image_features, text_features),
        "uniformity_image": metrics.uniformity(image_features),
        "uniformity_text": metrics.uniformity(text_features),
        "uniformity_cross": metrics.uniformity(image_features, text_features),
        "modality_gap": metrics.modality_gap(image_features, text_features),
        **metrics.rank_agreement(image_features, text_features, max_anchors=max_anchors),
    }
    return {name: value.item() for name, value in values.items()}
