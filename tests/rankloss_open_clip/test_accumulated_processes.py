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
REQUIRED_OPTIONS = {"caption_key": "synthetic"}  # of losses without a default for them
LEAVES = ("image_features", "text_features", "logit_scale")


def built(name: str) -> TrainerLoss:
    """The loss as the trainer has it with both of its flags, in the middle of a training."""
    named = catalog.load(name)
    required = {key: REQUIRED_OPTIONS[key] for key, option in named.options.items() if option.is_required}
    losses = catalog.choose_each(catalog.names_of(name), {name: required})
    is_sigmoid = named.kind == "sigmoid"
    args = Namespace(loss=name, local_loss=True, gather_with_grad=True, siglip=is_sigmoid, device="cpu")
    torch.manual_seed(0)  # weights that a loss may have are equal in all processes
    return TrainerLoss(args, losses, RunOptions(teacher=GIVEN if named.teacher else None))


def whole_batch(name: str) -> dict[str, Tensor]:
    """The inputs of PAIRS pairs for a loss; features and the scale take a gradient."""
    first, second = inputs_of(name, seed=0), inputs_of(name, seed=100)
    inputs = {}
    for key, value in first.items():
        is_number = value.dim() == 0  # the scale and the bias
        whole = value if is_number else torch.cat([value, second[key]])[:PAIRS]
        inputs[key] = whole.clone().requires_grad_(key in LEAVES)
    return inputs


def inputs_of_call(
    whole: dict[str, Tensor], call: int, *, rank: int, world_size: int, batches: int
) -> dict[str, Tensor]:
    """A call's inputs on one process: its part of all pairs, with the gradient of one batch of it alone."""
    inputs = {}
    for key, of_all in whole.items():
        if of_all.dim() == 0:
            inputs[key] = of_all
        else:
            of_calls = of_all.chunk(world_size)[rank].chunk(batches)
            inputs[key] = torch.cat([x if i == call else x.detach() for i, x in enumerate(of_calls)])
    if "query_features" in inputs:  # the pictures ask for candidates
        inputs["query_features"] = inputs["image_features"]
    return inputs


def step_of_rank(rank: int, world_size: int, name: str, batches: int) -> tuple[Tensor, list[Tensor]]:
    """The value at the last call of a step, and the sums over its calls of the gradients of LEAVES."""
    loss, whole = built(name), whole_batch(name)
    loss.start_epoch(epoch=5, epochs=10, steps=2, accum_freq=batches)  # after 10 steps
    leaves = [whole[key] for key in LEAVES]
    sums = [torch.zeros_like(leaf) for leaf in leaves]
    value = torch.zeros(())
    for call in range(batches):
        value = loss(**inputs_of_call(whole, call, rank=rank, world_size=world_size, batches=batches))
        assert loss.step == 10, "the calls of a step are one step"
        gradients = torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True)
        sums = [sum_so_far + gradient for sum_so_far, gradient in zip(sums, gradients, strict=True)]
    return value.detach(), sums


@pytest.mark.parametrize(
    ("world_size", "batches"),
    [(2, 3), pytest.param(2, 1, marks=pytest.mark.slow), pytest.param(3, 2, marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore:.*norm")
def test_a_step_of_several_processes_and_batches_is_that_of_the_whole_batch(
    pools: Pools, name: str, world_size: int, batches: int
) -> None:
    whole_value, whole_gradients = step_of_rank(0, 1, name, 1)
    values, gradients_of_ranks = zip(*pools[world_size].run(step_of_rank, name, batches), strict=True)
    assert torch.stack(values).mean() == pytest.approx(whole_value.item(), rel=1e-6)
    # DDP takes the mean over the processes.
    gradients = [torch.stack(of_leaf).mean(0) for of_leaf in zip(*gradients_of_ranks, strict=True)]
    *_, of_scale = gradients
    gradients[-1] = of_scale / batches  # which each call has whole
    for key, gradient, whole_gradient in zip(LEAVES, gradients, whole_gradients, strict=True):
        assert whole_gradient.norm() > 0, key
        assert (gradient - whole_gradient).norm() <= 1e-6 * whole_gradient.norm(), key
