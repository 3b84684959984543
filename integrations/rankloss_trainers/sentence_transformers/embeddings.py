"""Embeddings of a dataset's columns, for a loss."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rankloss.options import check_count
from rankloss_trainers.cached import Split, embedding_in
from rankloss_trainers.extras import extra

with extra("sentence-transformers"):
    from accelerate.utils import extract_model_from_parallel  # type: ignore[import-untyped]
    from sentence_transformers.base.losses import has_static_embedding_input


_EMBEDDINGS = "sentence_embedding"  # the key of them in a model's output


class EmbeddingLoss(nn.Module):
    """A loss of the columns' embeddings.

    Args:
        model: The ``SentenceTransformer`` that is trained.
        scale: The multiplier of the similarities.
        mini_batch_size: Embed each column in mini-batches of so many rows at most; None embeds it at once.

    Raises:
        ValueError: for a mini-batch size below 1, and mini-batches of a model that begins with a
            ``StaticEmbedding``.
    """

    def __init__(self, model: nn.Module, scale: float, mini_batch_size: int | None) -> None:
        super().__init__()
        if mini_batch_size is not None:
            check_count("mini_batch_size", mini_batch_size)
            if has_static_embedding_input(model):
                raise ValueError("mini_batch_size cannot split the inputs of a StaticEmbedding")
        self.model, self.scale, self.mini_batch_size = model, scale, mini_batch_size

    def embedded(self, column: dict[str, Tensor]) -> Tensor:
        """The embeddings of a column, divided by their norms, in float32 at least.

        Raises:
            ValueError: for mini-batches of a model that is compiled as a whole, or whose layers
                sentence-transformers keeps.
        """
        unwrapped = extract_model_from_parallel(self.model)
        self._check_keeps_no_layers(unwrapped)
        split = Split.of_pairs(column, self.mini_batch_size)
        with embedding_in(unwrapped, split, _embeddings_of):
            embeddings = _embeddings_of(self.model(column))[_EMBEDDINGS]
        at_least_float32 = torch.promote_types(embeddings.dtype, torch.float32)
        return F.normalize(embeddings.to(at_least_float32), dim=-1)

    def _check_keeps_no_layers(self, model: Any) -> None:
        """Raise a ValueError for mini-batches of a model whose layers sentence-transformers keeps."""
        is_compiled = hasattr(model, "_orig_mod")  # which cannot be split either, as embedding_in says
        if self.mini_batch_size is None or is_compiled:
            return
        # The class by which sentence-transformers keeps every layer.
        keeps_every_layer = type(model[0].forward).__name__ == "TransformerDecorator"
        if keeps_every_layer:
            raise ValueError(
                "mini_batch_size must be None in AdaptiveLayerLoss and Matryoshka2dLoss, which keep every "
                f"layer of the whole batch; got {self.mini_batch_size}"
            )

    def get_config_dict(self) -> dict[str, Any]:
        """The arguments, for the model card."""
        return {"scale": self.scale, "mini_batch_size": self.mini_batch_size}


def _embeddings_of(output: Any) -> dict[str, Tensor]:
    """The embeddings in an output of the model."""
    return {_EMBEDDINGS: output[_EMBEDDINGS]}


def is_cut(labels: Tensor) -> bool:
    """True for a view of the first numbers of each row, as MatryoshkaLoss cuts labels to fewer dimensions.

    The rows of a view lie as far apart as those of the tensor that it is of.
    """
    return labels.dim() > 1 and labels.stride(-2) > labels.shape[-1]
