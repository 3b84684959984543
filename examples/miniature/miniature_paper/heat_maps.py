"""Text-conditioned heat maps by occlusion: the places that the match of image and text depends on.

Gradients and attention look different in a ResNet and a transformer, so their maps could not be compared;
occlusion only asks for the similarity, and is the same method for every model.
"""

import torch
from captum.attr import Occlusion
from torch import Tensor
from torch.nn.functional import cosine_similarity

WINDOW = 8
STRIDE = 4
_AT_ONCE = 64


@torch.no_grad()
def heat_map(
    model: torch.nn.Module,
    image: Tensor,
    text_features: Tensor,
    *,
    paper: float = 1.0,
    window: int = WINDOW,
    stride: int = STRIDE,
) -> Tensor:
    """Return how much the cosine of image and text falls when a window of paper covers a part of the image.

    Args:
        model: An open_clip model; only its ``encode_image`` is used.
        image: ``[3, H, W]``, preprocessed.
        text_features: ``[D]``.
        paper: The value of an empty pixel after preprocessing.
        window: Side of the window, which is moved by steps of ``stride``.
        stride: Side of a cell of the map, whose value is the mean fall over the windows that cover it.

    Raises:
        ValueError: If the windows do not tile the image in steps.
    """
    height, width = image.shape[-2:]
    if height % stride or width % stride or window % stride or window > min(height, width):
        raise ValueError(f"window, stride: {window} and {stride} do not tile {height} × {width} pixels")

    def similarity(images: Tensor) -> Tensor:
        return cosine_similarity(model.encode_image(images), text_features[None], dim=-1)

    options = {"baselines": paper, "perturbations_per_eval": _AT_ONCE}
    shape, steps = ((len(image), side, side) for side in (window, stride))
    falls = Occlusion(similarity).attribute(image[None], shape, steps, **options)
    # The map is constant within a cell of stride × stride pixels.
    return falls[0, 0, ::stride, ::stride]
