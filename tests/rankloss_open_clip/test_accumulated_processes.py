"""Every registered loss on several processes at an accumulated step, against one with the whole batch.

At a step of several batches open_clip's trainer calls the loss once for each of them, with all features and
the gradient of that batch's alone. Summed over the calls and averaged over the processes, as DDP does, the
gradients of the features are those of the whole batch. The scale's gradient is whole in each call.
"""

from __future__ import annotations

from argparse import Namespace

import pytest
import torch
from named_inputs import inputs_of
from torch import Tensor

from process_pool import Pools
from rankloss_open_clip.trainer_loss import TrainerLoss
from rankloss_trainers import catalog
from rankloss_trainers.run_options import GIVEN, RunOptions
from registered import NAMES

PAIRS = 12
COLUMNS = {"caption_key": "synthetic"}
LEAVES = ("image_features", "text_features", "logit_scale")


def built(name: str) -> TrainerLoss:
    """The loss as the trainer has it with both of its flags, in the middle of a training."""
    named = catalog.load(name)
    given = {key: COLUMNS[key] for key, option in named.options.items() if option.is_required}
    losses = catalog.choose_each(catalog.names_of(name), {name: given})
    is_sigmoid = named.kind == "sigmoid"
    args = Namespace(loss=name, local_loss=True, gather_with_grad=True, siglip=is_sigmoid, device="cpu")
    loss = TrainerLoss(args, losses, RunOptions(teacher=GIVEN if named.teacher else None))
    torch.manual_seed(0)  # of weights that a loss may have
    return loss


def whole_batch(name: str) -> dict[str, Tensor]:
    """The inputs of 12 pairs, those with a gradient among them."""
    parts = [inputs_of(name, seed) for seed in (0, 100)]
    pairs = {key: torch.cat([part[key] for part in parts])[:PAIRS] for key, x in parts[0].items() if x.dim()}
    numbers = {key: x for key, x in parts[0].items() if not x.dim()}
    inputs: dict[str, Tensor] = {**pairs, **numbers}
    return {key: x.clone().requires_grad_(key in LEAVES) for key, x in inputs.items()}


def step(rank: int, world_size: int, name: str, batches: int) -> tuple[Tensor, list[Tensor]]:
    """The value at the last call of a step, and the sum of the gradients of its calls."""
    loss, whole = built(name), whole_batch(name)
    loss.start_epoch(5, 10, 2, batches)
    leaves = [whole[key] for key in LEAVES]
    total = [torch.zeros_like(x) for x in leaves]
    value = torch.zeros(())
    for call in range(batches):
        inputs: dict[str, Tensor] = {}
        for key, x in whole.items():
            if x.dim():
                of_calls = x.chunk(world_size)[rank].chunk(batches)
                x = torch.cat([y if i == call else y.detach() for i, y in enumerate(of_calls)])
            inputs[key] = x
        if "query_features" in inputs:
            inputs["query_features"] = inputs["image_features"]
        value = loss(**inputs)
        assert loss.step == 10, "the calls of a step are one step"
        found = torch.autograd.grad(value, leaves, allow_unused=True)
        total = [x if y is None else x + y for x, y in zip(total, found, strict=True)]
    return value.detach(), total


@pytest.mark.parametrize(
    ("world_size", "batches"),
    [(2, 3), pytest.param(2, 1, marks=pytest.mark.slow), pytest.param(3, 2, marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore:.*norm")
def test_a_step_of_several_processes_and_batches_is_that_of_the_whole_batch(
    pools: Pools, name: str, world_size: int, batches: int
) -> None:
    value, wanted = step(0, 1, name, 1)
    of_ranks = pools[world_size].run(step, name, batches)
    assert torch.stack([x for x, _ in of_ranks]).mean() == pytest.approx(value.item(), rel=1e-6)
    found = [torch.stack(x).mean(0) for x in zip(*(x for _, x in of_ranks), strict=True)]
    found[-1] = found[-1] / batches
    for key, x, y in zip(LEAVES, found, wanted, strict=True):
        assert (x - y).norm() <= 1e-6 * y.norm(), key
        assert y.norm() > 0, key
