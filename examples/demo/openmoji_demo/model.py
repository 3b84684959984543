"""A model that open_clip can build, as a source of features."""

import logging
from collections.abc import Sequence
from pathlib import Path

import open_clip
import torch
from torch import Tensor
from torch.nn.functional import normalize

_AT_ONCE = 256


class ClipModel:
    """A model of open_clip with its preprocessing and tokenizer.

    ``name`` is as for open_clip; ``checkpoint`` is one of its trainer's, None for a folder or a repository
    with weights, whose name begins with ``local-dir:`` or ``hf-hub:``.

    Raises:
        ValueError: For another name without a checkpoint.
    """

    def __init__(self, name: str, *, checkpoint: str | Path | None = None, device: str = "cpu") -> None:
        if checkpoint is None and not name.startswith(("local-dir:", "hf-hub:")):
            raise ValueError(f"checkpoint: without one {name} has random weights")
        # open_clip warns that it built a model without weights; they come from the checkpoint below.
        previous = logging.root.manager.disable
        if checkpoint is not None:
            logging.disable(logging.WARNING)
        try:
            model, _, self.preprocess = open_clip.create_model_and_transforms(name, device=device)
            self.tokenizer = open_clip.get_tokenizer(name)
        finally:
            logging.disable(previous)
        if checkpoint is not None:
            open_clip.load_checkpoint(model, str(checkpoint), device=device)
        self.model, self.device = model.eval(), device

    @property
    def logit_scale(self) -> float:
        """The multiplier of the cosines, not its logarithm."""
        return float(self.model.logit_scale.detach().exp())

    @torch.inference_mode()
    def image_features(self, images: Sequence[Tensor]) -> Tensor:
        """Return the embeddings of images as :attr:`preprocess` returns them, ``[N, D]``, not normalised."""
        parts = [
            self.model.encode_image(torch.stack(images[i : i + _AT_ONCE]).to(self.device)).cpu()
            for i in range(0, len(images), _AT_ONCE)
        ]
        return torch.cat(parts)

    @torch.inference_mode()
    def text_features(self, texts: Sequence[str]) -> Tensor:
        """Return unit-norm text embeddings, ``[N, D]``."""
        parts = [
            self.model.encode_text(self.tokenizer(list(texts[i : i + _AT_ONCE])).to(self.device)).cpu()
            for i in range(0, len(texts), _AT_ONCE)
        ]
        return normalize(torch.cat(parts), dim=-1)

    def classifier(self, classes: Sequence[str], templates: Sequence[str]) -> Tensor:
        """Return open_clip's zero-shot classifier, ``[D, classes]``: the mean of each class's prompts.

        In a template, the name goes to ``{}``.
        """
        weights: Tensor = open_clip.build_zero_shot_classifier(
            self.model, self.tokenizer, classnames=classes, templates=templates, device=self.device
        )
        return weights.cpu()
