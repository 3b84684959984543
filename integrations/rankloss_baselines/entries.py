"""CyCLIP and ALIP as they are named."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rankloss.distributed import Gather
from rankloss_baselines.alip import AlipLoss
from rankloss_baselines.cyclip import CyClipLoss
from rankloss_baselines.second_caption import SecondCaption
from rankloss_trainers.named import NamedLoss, option


class CyClip(NamedLoss):
    """The trainer's own plus CyCLIP's cyclic consistency terms."""

    lambda_cross: float = option(0.25, "weight of the cross-modal term", at_least=0)
    lambda_in: float = option(0.25, "weight of the in-modal term", at_least=0)

    def build(self, base: Any, gather: Gather) -> CyClipLoss:
        return CyClipLoss(base, **self.values, gather=gather)


class Alip(NamedLoss):
    """CLIP's loss on two captions of each image, weighted by how well they fit (ALIP)."""

    no_sigmoid = "it weighs the pairs of a softmax loss of its own"

    caption_key: str | None = option(
        None,
        "where the synthetic caption is: a column of a CSV file; in a webdataset the extension of a text "
        "file, or json:FIELD; in Hugging Face's Trainer the prefix of its columns",
        none="must be given",
        metavar="KEY",
    )
    gamma_sample: float = option(2.0, "how steeply a weight falls with the captions' similarity", at_least=0)
    gamma_pair: float = option(2.0, "how steeply a weight changes with the pair's similarity", at_least=0)
    momentum: float = option(0.99, "share of the histories that a step keeps", at_least=0)
    initial_history: float = option(1.0, "where the histories start; 1 closes nearly all gates at first")

    def refuse(self, gather: Gather) -> str | None:  # noqa: ARG002
        if self.caption_key is None:
            return "alip needs a second caption of each image: name it with --alip-caption-key"
        return None

    def build(self, base: Any, gather: Gather) -> AlipLoss:  # noqa: ARG002
        return AlipLoss(**{key: x for key, x in self.values.items() if key != "caption_key"}, gather=gather)

    def companions(self) -> list[SecondCaption]:
        return [SecondCaption(str(self.caption_key))]

    def log(self) -> Any:
        return alip_log


def alip_log(criterion: nn.Module, *_: Any) -> dict[str, Tensor]:
    """ALIP's histories: of the two captions, and of the image with each."""
    names = ("alip_text_caption", "alip_image_text", "alip_image_caption")
    alip = next(x for x in criterion.modules() if isinstance(x, AlipLoss))
    histories = alip.histories.to(torch.float32, copy=True).unbind()
    return dict(zip(names, histories, strict=True))


CYCLIP, ALIP = CyClip, Alip  # the entry points of an editable installation that is older
