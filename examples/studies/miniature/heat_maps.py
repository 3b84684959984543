"""Text-conditioned heat maps by occlusion: the places that the match of image and text depends on.

Gradients and attention look different in a ResNet and a transformer, so their maps could not be compared;
occlusion only asks for the similarity, and is the same method for every model.
"""

import torch
from captum.attr import Occlusion
from torch import Tensor
from torch.nn.functional import cosine_similarity

WINDOW = 8  # side of the window
STRIDE = 4  # its step
_AT_ONCE = 64


@torch.no_grad()
def heat_map(model: torch.nn.Module, image: Tensor, text_features: Tensor, *, paper: float) -> Tensor:
    """Return how much the cosine of image and text falls when a window of paper covers a part of the image.

    Args:
        model: An open_clip model; only its ``encode_image`` is used.
        image: ``[3, H, W]``, preprocessed.
        text_features: ``[D]``.
        paper: The value of an empty pixel after preprocessing.
    """

    def similarity(images: Tensor) -> Tensor:
        return cosine_similarity(model.encode_image(images), text_features[None], dim=-1)

    options = {"baselines": paper, "perturbations_per_eval": _AT_ONCE}
    shape, steps = ((len(image), side, side) for side in (WINDOW, STRIDE))
    falls = Occlusion(similarity).attribute(image[None], shape, steps, **options)
    # Constant within a cell of STRIDE × STRIDE pixels: the mean fall over the windows that cover it.
    return falls[0, 0, ::STRIDE, ::STRIDE]
