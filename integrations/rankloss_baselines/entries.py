"""CyCLIP and ALIP as the catalogue of ``--loss`` describes them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rankloss.distributed import Gather
from rankloss_baselines.alip import AlipLoss
from rankloss_baselines.cyclip import CyClipLoss
from rankloss_baselines.second_caption import SecondCaption
from rankloss_trainers.catalog import LossEntry, Option, Options, weight

_ANY = {"type": float, "metavar": "X"}
_NUMBER = {"type": weight, "metavar": "X"}

CYCLIP = LossEntry(
    build=lambda base, options, gather: CyClipLoss(base, **options, gather=gather),
    help="the trainer's own plus CyCLIP's cyclic consistency terms",
    options=(
        Option("lambda-cross", 0.25, "weight of the cross-modal term", _NUMBER),
        Option("lambda-in", 0.25, "weight of the in-modal term", _NUMBER),
    ),
)


def _build_alip(_: Any, options: Options, gather: Gather) -> AlipLoss:
    return AlipLoss(**{key: x for key, x in options.items() if key != "caption_key"}, gather=gather)


def alip_log(criterion: nn.Module, *_: Any) -> dict[str, Tensor]:
    """ALIP's histories: of the two captions, and of the image with each."""
    names = ("alip_text_caption", "alip_image_text", "alip_image_caption")
    alip = next(x for x in criterion.modules() if isinstance(x, AlipLoss))
    histories = alip.histories.to(torch.float32, copy=True).unbind()
    return dict(zip(names, histories, strict=True))


_NO_CAPTION = "alip needs a second caption of each image: name it with --alip-caption-key"

ALIP = LossEntry(
    build=_build_alip,
    help="CLIP's loss on two captions of each image, weighted by how well they fit (ALIP)",
    options=(
        Option(
            "caption-key",
            None,
            "where the synthetic caption is: a column of a CSV file; in a webdataset the extension of a text "
            "file, or json:FIELD; in Hugging Face's Trainer the prefix of its columns",
            {"metavar": "KEY"},
            "must be given",
        ),
        Option("gamma-sample", 2.0, "how steeply a weight falls with the captions' similarity", _NUMBER),
        Option("gamma-pair", 2.0, "how steeply a weight changes with the pair's similarity", _NUMBER),
        Option("momentum", 0.99, "share of the histories that a step keeps", _NUMBER),
        Option("initial-history", 1.0, "where the histories start; 1 closes nearly all gates at first", _ANY),
    ),
    refuse=lambda options, _: _NO_CAPTION if options["caption_key"] is None else None,
    caption_key=lambda options: options["caption_key"],
    companions=lambda options: [SecondCaption(options["caption_key"])],
    no_sigmoid="it weighs the pairs of a softmax loss of its own",
    log=lambda _: alip_log,
)
