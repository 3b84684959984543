"""Any model that open_clip can build, as a source of unit-norm features."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils.data import DataLoader

_TEXTS = 256


class ClipModel:
    """A model of open_clip with its preprocessing and tokenizer.

    ``name`` and ``pretrained`` are as for open_clip; ``checkpoint`` is one of its trainer's.
    """

    def __init__(
        self,
        name: str,
        *,
        pretrained: str | None = None,
        checkpoint: str | Path | None = None,
        device: str = "cpu",
        batch_size: int = 256,
        workers: int = 0,
    ) -> None:
        if pretrained is not None and checkpoint is not None:
            raise ValueError("pretrained, checkpoint: give one of them")
        if pretrained is None and checkpoint is None and not name.startswith(("local-dir:", "hf-hub:")):
            raise ValueError(f"{name} without pretrained or checkpoint has random weights")
        # open_clip warns that it built a model without weights; they come from the checkpoint below.
        previous = logging.root.manager.disable
        if checkpoint is not None:
            logging.disable(logging.WARNING)
        try:
            model, _, self.preprocess = open_clip.create_model_and_transforms(
                name, pretrained=pretrained, device=device
            )
            self.tokenizer = open_clip.get_tokenizer(name)
        finally:
            logging.disable(previous)
        if checkpoint is not None:
            open_clip.load_checkpoint(model, str(checkpoint), device=device)
        self.model, self.device = model.eval(), device
        self._loading = {"batch_size": batch_size, "num_workers": workers, "collate_fn": _collate}

    @property
    def logit_scale(self) -> float:
        """The multiplier of the cosines, not its logarithm."""
        return float(self.model.logit_scale.detach().exp())

    @torch.inference_mode()
    def image_features(
        self, images: Any, *, progress: Callable[[Any], Any] = iter
    ) -> tuple[Tensor, list[Any]]:
        """Encode a dataset of pairs: an image as :attr:`preprocess` returns it, and anything.

        Returns:
            ``[N, D]``, as the model projects them, not normalised; and the second items, as a list.
        """
        features, targets = [], []
        for pixels, others in progress(DataLoader(images, **self._loading)):
            features.append(self.model.encode_image(pixels.to(self.device)).cpu())
            targets.extend(others)
        if not features:
            raise ValueError("images: the dataset is empty")
        return torch.cat(features), targets

    @torch.inference_mode()
    def text_features(self, texts: Sequence[str]) -> Tensor:
        """Return unit-norm text embeddings, ``[N, D]``."""
        parts = [
            self.model.encode_text(self.tokenizer(list(texts[i : i + _TEXTS])).to(self.device))
            for i in range(0, len(texts), _TEXTS)
        ]
        return normalize(torch.cat(parts).cpu(), dim=-1)

    def classifier(self, classes: Sequence[str], templates: Sequence[str]) -> Tensor:
        """Return open_clip's zero-shot classifier, ``[D, classes]``: the mean of each class's prompts.

        In a template, the name goes to ``{}``, or to ``{c}`` as CLIP_benchmark writes it.
        """
        prompts = list(map(_prompt, templates))
        weights: Tensor = open_clip.build_zero_shot_classifier(
            self.model, self.tokenizer, classnames=classes, templates=prompts, device=self.device
        )
        return weights.cpu()


def _prompt(template: str) -> Callable[[str], str]:
    if "{}" not in template and "{c}" not in template:
        raise ValueError(f"templates: no {{}} or {{c}} in {template!r}")
    return lambda name: template.replace("{c}", name).replace("{}", name)


def _collate(batch: Sequence[tuple[Tensor, Any]]) -> tuple[Tensor, list[Any]]:
    return torch.stack([pixels for pixels, _ in batch]), [other for _, other in batch]
