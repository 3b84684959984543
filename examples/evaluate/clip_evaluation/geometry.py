"""The shape of the embedding space: alignment, uniformity, modality gap, and how rankings agree."""

from torch import Tensor

from rankloss import metrics

MAX_ANCHORS = 1024


def geometry(
    image_features: Tensor, text_features: Tensor, *, max_anchors: int | None = MAX_ANCHORS
) -> dict[str, float]:
    """Measure the embeddings of pairs.

    Args:
        image_features: ``[N, D]``, unit-norm.
        text_features: ``[N, D]``, unit-norm; row i belongs to image i.
        max_anchors: Rows for which the rankings are compared; all of them if None.

    Returns:
        ``alignment``, ``uniformity_image``, ``uniformity_text``, ``uniformity_cross``, ``modality_gap`` and
        the entries of :func:`rankloss.metrics.rank_agreement`, as :mod:`rankloss.metrics` defines them.
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
