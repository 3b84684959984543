"""Two losses of a package that is not rankloss's, registered as any other's: generic tests have them, too.

The folder lies on ``sys.path`` as an installed package's files do, with its metadata beside it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rankloss import ClipLoss
from rankloss.distributed import GatherOption
from rankloss.losses import AddedTerms, Base, OwnTerms, check_weight
from rankloss_trainers.declared import Named


class TinyLoss(AddedTerms):
    """The trainer's own plus the squared distance of the two features of a pair.

    ``base + weight·(1/N)·Σ_i ‖v_i − t_i‖²``

    Args:
        weight: Weight of the distance.
    """

    def __init__(self, base: Base | None = None, *, weight: float = 0.5, gather: GatherOption = None) -> None:
        super().__init__(base, gather=gather)
        self.weight = check_weight("weight", weight)

    def own_terms(self, image_features: Tensor, text_features: Tensor, _scale: Any) -> dict[str, Tensor]:
        pair = image_features, text_features
        if not self.gather.anchors_are_local:
            pair = tuple(self.gather.items(x) for x in pair)
        wide = torch.promote_types(torch.promote_types(pair[0].dtype, pair[1].dtype), torch.float32)
        distance = (pair[0].to(wide) - pair[1].to(wide)).square().sum(-1).mean()
        return {"tiny_loss": self.weight * distance}


class TinyCaptionLoss(OwnTerms):
    """CLIP's loss of two captions of each image: a column of data, and a state that each step moves.

    ``L(v, t) + m·L(v, c)``, c the second caption and m a moving average of the mean of ``t_i·c_i``, which
    begins at 1 and moves once in each training step, before it is used.

    Args:
        momentum: Share of the average that a step keeps.
    """

    average: Tensor

    def __init__(self, *, momentum: float = 0.75, gather: GatherOption = None) -> None:
        super().__init__(gather)
        self.momentum = check_weight("momentum", momentum)
        self.clip = ClipLoss(gather=self.gather)
        self.register_buffer("average", torch.ones(()))
        self._step_begins = self._calls_are_steps = True

    def set_progress(self, step: int, total_steps: int) -> None:
        """A training step begins, in which the average moves once."""
        self._step_begins, self._calls_are_steps = True, False

    def own_terms(
        self, image_features: Tensor, text_features: Tensor, scale: Any, *, caption_features: Tensor
    ) -> dict[str, Tensor]:
        first = self.clip(image_features, text_features, scale)
        second = self.clip(image_features, caption_features, scale)
        if self.training and self._step_begins:
            with torch.no_grad():
                texts, captions = self.gather.items(text_features), self.gather.items(caption_features)
                mean = (texts * captions).sum(-1).mean()
                self.average.lerp_(mean.to(self.average.dtype), 1 - self.momentum)
            self._step_begins = self._calls_are_steps
        return {"contrastive_loss": first, "caption_loss": self.average * second}


def log(criterion: nn.Module, *_: Any) -> dict[str, Tensor]:
    """The average after the step."""
    loss = next(x for x in criterion.modules() if isinstance(x, TinyCaptionLoss))
    return {"caption_average": loss.average.clone()}


TINY_CAPTION = Named(
    TinyCaptionLoss,
    columns="rankloss_open_clip.columns.second_caption:SecondCaption",
    prefix="second",
    kind="softmax",
    log=lambda: log,
)
