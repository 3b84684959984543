"""Features of two frozen encoders."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

PICTURE_SIZE = 224


class FrozenEncoders:
    """EfficientNet-Lite0 (ImageNet, 1,280 dimensions) and all-MiniLM-L6-v2 (384), whole inside packages.

    Pictures are resized to 224 × 224 without regard to their shape, so that nothing of them is cut off.

    Raises:
        RuntimeError: If a package is missing.
    """

    name = "tf_efficientnet_lite0 224x224 and all-MiniLM-L6-v2"

    def __init__(self) -> None:
        try:
            from sentence_transformers import SentenceTransformer

            from rankloss_features import packages

            model, sentences = packages.efficientnet_lite0(), packages.all_minilm_l6_v2()
        except ImportError as error:
            raise RuntimeError(
                f"{error.name} is needed to compute features: pip install -e 'examples[studies]'"
            ) from error
        self._pictures = model.eval().to(memory_format=torch.channels_last)
        self._sentences = SentenceTransformer(str(sentences), device="cpu")

    @torch.inference_mode()
    def pictures(self, pictures: Sequence[Image.Image]) -> np.ndarray:
        """Return the pooled features, ``[N, 1280]``."""
        size = (PICTURE_SIZE, PICTURE_SIZE)
        arrays = [np.asarray(one.resize(size, Image.Resampling.BICUBIC)) for one in pictures]
        pixels = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 127.5 - 1
        # A few at a time stay within a processor's caches.
        return torch.cat([self._pictures(few) for few in pixels.split(8)]).numpy()

    def sentences(self, sentences: Sequence[str]) -> np.ndarray:
        """Return the unit-norm features, ``[N, 384]``."""
        return self._sentences.encode(list(sentences), batch_size=128, show_progress_bar=False)


@dataclasses.dataclass(frozen=True)
class Side:
    """The features of a split's pictures, in the split's order, and of their sentences, five for each."""

    pictures: Tensor  # [N, D]
    sentences: Tensor  # [N, 5, D']
