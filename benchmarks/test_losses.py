"""Forward and backward of the losses beside open_clip's, by the pairs N and by a process's share of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from open_clip.loss import ClipLoss, SigLipLoss
from torch import Tensor

import rankloss
import rankloss_trainers
from devices import DEVICE
from naive import naive_rank_terms
from one_of import one_of
from products import products_of
from trainer import loss_of_the_trainer
from turns import Step

D, SCALE, BIAS = 512, 1 / 0.07, -10.0
WORK = 1e10 if DEVICE.type == "cuda" else 1.5e8  # entries of S in all rounds of a group
Features = tuple[Tensor, Tensor, Tensor]

# Pairs of the whole batch, and the processes that share it.
ON_CPU = ((512, 1), (1024, 1), (4096, 1), (8192, 1), (4096, 4))
ON_CARD = ((1024, 1), (4096, 1), (16384, 1), (65536, 1), (8192, 8), (32768, 32), (65536, 64))
SIZES = ON_CARD if DEVICE.type == "cuda" else ON_CPU
NAIVE_UP_TO = 16384 if DEVICE.type == "cuda" else 4096


def training(loss: Callable[..., Tensor], **inputs: Tensor | float) -> Callable[[Features], Step]:
    """Forward and backward of a loss, for any features, with its other inputs."""

    def with_features(x: Features) -> Step:
        return lambda: loss(*x, **inputs).backward()

    return with_features


def values_alone(loss: Callable[..., Tensor]) -> Callable[[Features], Step]:
    """Forward of a loss without gradients, for any features."""

    def with_features(x: Features) -> Step:
        return torch.no_grad()(lambda: loss(*x))

    return with_features


def products_alone(loss: Callable[..., Tensor]) -> Callable[[Features], Step]:
    """The matrix products of forward and backward, for any features."""

    def with_features(x: Features) -> Step:
        return products_of(training(loss)(x))

    return with_features


def of_open_clip(x: Features) -> Step:
    """ClipLoss, of one process or of the first of several."""
    processes = dist.get_world_size() if dist.is_initialized() else 1
    return training(ClipLoss(local_loss=True, world_size=processes))(x)


def distilled(x: Features) -> Step:
    """``--loss rankclip-distill`` of a teacher's features."""
    loss = rankloss_trainers.create("rankclip-distill", schedule="constant")
    n, d = x[0].shape
    v, t, _ = features(n, d, seed=1)  # the teacher's
    return training(loss, reference_image_features=v.detach(), reference_text_features=t.detach())(x)


def in_the_first_epoch(x: Features) -> Step:
    """``--loss rankclip`` in open_clip's trainer while λ is 0, with what it logs."""
    loss: Any = loss_of_the_trainer("--loss rankclip --rankclip-schedule official", epoch=0)
    assert loss.criterion.schedule_value == 0
    return lambda: sum(loss(*x, output_dict=True).values()).backward()


def sharing_ids(x: Features) -> Step:
    """ClipLoss with ids, of which two pairs each share one."""
    v, _, _ = x
    ids = torch.arange(len(v), device=DEVICE) // 2
    return training(rankloss.ClipLoss(same_id="share"), pair_ids=ids)(x)


# ClipLoss and SigLipLoss are open_clip's, ClipLoss first: ratios are to it. The others are rankloss's, but
# for naive; a budget of 0 streams a loss at any size.
CONTENDERS: dict[str, Callable[[Features], Step]] = {
    "ClipLoss": of_open_clip,
    "SigLipLoss": training(SigLipLoss(), logit_bias=BIAS),
    "ClipLoss-streamed": training(rankloss.ClipLoss(memory_budget=0)),
    "SigLipLoss-streamed": training(rankloss.SigLipLoss(memory_budget=0), logit_bias=BIAS),
    "naive": training(naive_rank_terms),
    "RankConsistency": training(rankloss.RankConsistency()),
    "RankConsistency-bin": training(rankloss.RankConsistency(method="bin")),
    "RankClipLoss": training(rankloss.RankClipLoss(schedule="constant")),
    "RankClipLoss-bin": training(rankloss.RankClipLoss(schedule="constant", method="bin")),
    "RankClipLoss-no_grad": values_alone(rankloss.RankClipLoss(schedule="constant")),
    "RankClipLoss-products": products_alone(rankloss.RankClipLoss(schedule="constant")),
    "rankclip-lambda-0": in_the_first_epoch,
    "rankclip-distill": distilled,
}
if hasattr(rankloss, "SpreadLoss"):
    CONTENDERS["SpreadLoss"] = training(rankloss.SpreadLoss())
if "same_id" in inspect.signature(rankloss.ClipLoss).parameters:  # not in every revision to compare with
    CONTENDERS["ClipLoss-ids"] = sharing_ids
if "label_smoothing" in inspect.signature(rankloss.ClipLoss).parameters:
    CONTENDERS["ClipLoss-smoothed"] = training(rankloss.ClipLoss(label_smoothing=0.2))
if DEVICE.type == "cuda":
    CONTENDERS["RankClipLoss-triton"] = training(rankloss.RankClipLoss(schedule="constant", kernel="triton"))
OF_A_SHARE = ("ClipLoss", "RankClipLoss", "RankClipLoss-bin", "RankClipLoss-triton")
AT_MOST_4096 = (  # the beginnings of names
    "RankConsistency",
    "RankClipLoss-",
    "rankclip-",
    "ClipLoss-ids",
    "ClipLoss-smoothed",
)  # a CPU takes minutes beyond


def contenders(n: int, processes: int) -> list[str]:
    """The contenders that are measured on n pairs, which so many processes share."""
    names = list(CONTENDERS) if processes == 1 else [name for name in OF_A_SHARE if name in CONTENDERS]
    if n > NAIVE_UP_TO and "naive" in names:
        names.remove("naive")
    if DEVICE.type == "cpu" and n > 4096:
        names = [name for name in names if not name.startswith(AT_MOST_4096)]
    return names


def features(n: int, d: int, seed: int = 0) -> Features:
    """Image and text features of unit norm, independent of each other, and CLIP's initial scale."""
    generator = torch.Generator().manual_seed(seed)
    v = F.normalize(torch.randn(n, d, generator=generator), dim=-1).to(DEVICE).requires_grad_()
    t = F.normalize(torch.randn(n, d, generator=generator), dim=-1).to(DEVICE).requires_grad_()
    return v, t, torch.tensor(SCALE, device=DEVICE, requires_grad=True)


def first_of(processes: int, everyone: Features) -> Features:
    """The features of the first process."""
    v, t, s = everyone
    share = len(v) // processes
    return v.detach()[:share].clone().requires_grad_(), t.detach()[:share].clone().requires_grad_(), s


@pytest.mark.parametrize(
    ("n", "processes", "contender"), [(*size, name) for size in SIZES for name in contenders(*size)]
)
def test_loss(
    n: int, processes: int, contender: str, compare: Callable[..., None], size: Callable[[int], int]
) -> None:
    everyone = features(size(n), size(D))
    own = everyone
    group = f"losses: N = {n:,}"
    if processes > 1:
        own = first_of(processes, everyone)
        group += f", one of {processes} processes"
    rounds = int(min(40, max(3, WORK * processes // n**2)))
    # Stand-ins for the other processes: gathering returns the features of all, in rankloss and in open_clip.
    gathered = mock.patch("open_clip.loss.gather_features", return_value=everyone[:2])
    with one_of(processes, own[:2], everyone[:2]), gathered:
        compare(group, contender, lambda name: CONTENDERS[name](own), rounds)
