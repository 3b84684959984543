"""Every loss that has a name, on a model that is sharded or frozen in part."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from named_inputs import D, N, inputs_of
from torch import Tensor, nn
from torch.distributed import is_initialized
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.functional import normalize
from torch.nn.parallel import DistributedDataParallel

import rankloss_trainers
from process_pool import Pools
from rankloss_trainers import catalog

NAMES = sorted(catalog.known())


class Towers(nn.Module):
    """Two encoders; a scale and a bias of one element each, as a scalar cannot be sharded."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image, self.text, self.unused = (
            nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, D)) for _ in range(3)
        )
        self.logit_scale, self.logit_bias = (nn.Parameter(torch.tensor([x])) for x in (2.0, -1.0))

    def forward(self, images: Tensor, texts: Tensor) -> tuple[Tensor, ...]:
        features = (normalize(tower(x), dim=-1) for tower, x in ((self.image, images), (self.text, texts)))
        return *features, self.logit_scale.exp().sum(), self.logit_bias.sum()


def value_of(name: str, model: nn.Module, rows: slice) -> Tensor:
    """The loss of some of the batch's rows: pictures, texts, other texts."""
    generator = torch.Generator().manual_seed(3)
    data = torch.randn(3, N, 5, generator=generator, dtype=torch.float64)[:, rows]
    loss = rankloss_trainers.create(name)
    loss.set_epoch(3, 4), loss.set_progress(3, 4)
    given = {key: x[rows] if x.dim() else x for key, x in inputs_of(name, 3).items()}
    v, texts, given["logit_scale"], given["logit_bias"] = model(data[0], data[1:].flatten(0, 1))
    t, c = texts.chunk(2)
    of_model = {"query_features": v, "candidate_features": torch.stack([t, c, c], 1), "caption_features": c}
    given.update({key: x for key, x in of_model.items() if key in given})
    value: Tensor = loss(**{**given, "image_features": v, "text_features": t})
    return value


def gradients(rank: int, world_size: int, wrap: Callable[[Any], Any]) -> dict[str, dict[str, Tensor]]:
    """The gradients of a share of the batch, by loss and parameter, all of one model.

    DDP refuses the step after one that left parameters it waits for.
    """
    found, share = {}, N // world_size
    model = Towers().double()
    wrapped = wrap(model)
    for name in (*NAMES, NAMES[0]):
        model.zero_grad()
        value_of(name, wrapped, slice(rank * share, (rank + 1) * share)).backward()
        given = {key: x.grad for key, x in model.named_parameters() if x.grad is not None}
        found[name] = {key: x.full_tensor() if isinstance(x, DTensor) else x for key, x in given.items()}
    return found


def distributed(model: Any, frozen: tuple[str, ...] = (), **options: Any) -> Any:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(frozen))
    return DistributedDataParallel(model, **options) if is_initialized() else model


def sharded(model: Any) -> Any:
    for part in (model.image, model.text, model) if is_initialized() else ():
        fully_shard(part)
    return model


WRAPPED: dict[str, Callable[[Any], Any]] = {
    "of used parameters": functools.partial(distributed, frozen=("unused",)),
    "of unused parameters": functools.partial(distributed, find_unused_parameters=True),
    "of a frozen image tower": functools.partial(distributed, frozen=("unused", "image")),
    "of a frozen text tower": functools.partial(distributed, frozen=("unused", "text")),
    "of frozen towers": functools.partial(distributed, frozen=("unused", "image", "text")),
    "sharded": sharded,
}


@pytest.mark.filterwarnings("ignore:logit_bias is given")  # by one model for all losses
@pytest.mark.parametrize("kind", WRAPPED)
def test_two_processes_have_the_gradients_of_the_whole_batch(pools: Pools, kind: str) -> None:
    expected = gradients(0, 1, WRAPPED[kind])
    for found in pools[2].run(gradients, WRAPPED[kind]):
        assert found.keys() == expected.keys() >= {*NAMES}
        for name, of_loss in expected.items():
            assert of_loss["logit_scale"].abs() > 1e-3
            for key in of_loss.keys() | found[name].keys():  # of what no step uses there may be none
                both = (x[name].get(key, torch.zeros(())).double() for x in (found, expected))
                tolerance = {"rtol": 1e-8, "atol": 1e-10}
                torch.testing.assert_close(*torch.broadcast_tensors(*both), **tolerance, msg=f"{name}: {key}")
