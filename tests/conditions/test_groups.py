"""Whatever torch.distributed holds: two processes that share a batch, or keep to themselves.

By default a loss is that of the whole batch: its value on average over the processes, and its gradient
after the averaging that DDP does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from subjects import SUBJECTS, Inputs, Result, Subject, assert_right, data, differentiated, expected, leaves
from torch import Tensor

from process_pool import Pools

BY_NAME = {subject.name: subject for subject in SUBJECTS}
modules = pytest.mark.parametrize("name", [s.name for s in SUBJECTS if s.is_module])

Found = tuple[Tensor, Inputs]  # what a process sends: value and gradients


def local(subject: Subject) -> Any:
    return subject.build(gather=False)


def compiled(subject: Subject) -> Any:
    torch._dynamo.reset()
    return torch.compile(subject.build(), backend="aot_eager")


def on_meta(subject: Subject) -> Any:
    with torch.device("meta"):
        module = subject.build()
    return module.to_empty(device="cpu")


def inputs_of(subject: Subject, rank: int, world_size: int) -> Inputs:
    """This process's share of the pairs; the equal rows are in both shares."""
    whole = subject.pick(data("equal rows"))
    return {k: x.chunk(world_size)[rank] if x.dim() else x for k, x in whole.items()}


def share(
    rank: int,
    world_size: int,
    name: str,
    build: Callable[[Subject], Any] | None = None,
    create_graph: bool = False,
    bad: float | None = None,
) -> Found:
    """What one process of several gets of its share."""
    subject = BY_NAME[name]
    inputs = leaves(inputs_of(subject, rank, world_size), subject.differentiable)
    if bad is not None and rank == 0:
        inputs[subject.inputs[0]].data[1, 2] = bad
    value = subject.started(None if build is None else build(subject))(**inputs)
    found = differentiated(value, inputs, subject.differentiable, None, create_graph)
    return found.value, found.gradients


def averaged(results: list[Found]) -> Result:
    """The value and the gradients of the whole batch, as DDP makes them of the processes'."""
    gradients = {k: [of_process[k] for _, of_process in results] for k in results[0][1]}
    joined = {
        k: torch.stack(g).mean(0) if g[0].dim() == 0 else torch.cat(g) / len(g) for k, g in gradients.items()
    }
    return Result(torch.stack([value for value, _ in results]).mean(0), joined)


def whole(name: str) -> Result:
    return expected(BY_NAME[name], BY_NAME[name].pick(data("equal rows")))


@pytest.mark.parametrize("build", [None, on_meta])
@modules
def test_two_processes_have_the_loss_of_the_whole_batch(
    pools: Pools, name: str, build: Callable[[Subject], Any] | None
) -> None:
    assert_right(averaged(pools[2].run(share, name, build, build is on_meta)), whole(name))


def test_two_processes_with_a_compiled_loss(pools: Pools) -> None:
    """Graph breaks are allowed around the collectives; wrong gradients are not."""
    assert_right(averaged(pools[2].run(share, "RankClipLoss", compiled)), whole("RankClipLoss"))


@pytest.mark.parametrize("name", [s.name for s in SUBJECTS if s.name != "all_gather"])
def test_without_gathering_a_process_sees_its_own_pairs(pools: Pools, name: str) -> None:
    """As measures and single lists always do."""
    subject = BY_NAME[name]
    for rank, (value, _) in enumerate(pools[2].run(share, name, local if subject.is_module else None)):
        assert_right(Result(value, {}), expected(subject, inputs_of(subject, rank, 2), ()))


def test_all_gather_gives_the_whole_and_adds_up_the_gradients(pools: Pools) -> None:
    owed = whole("all_gather")
    for rank, (value, gradients) in enumerate(pools[2].run(share, "all_gather")):
        added = 2 * owed.gradients["x"].chunk(2)[rank]
        assert_right(Result(value, gradients), Result(owed.value, {"x": added}))


@modules
def test_a_bad_feature_of_one_process_makes_the_loss_nan_on_all(pools: Pools, name: str) -> None:
    """Otherwise one process would skip a step that the others take."""
    for value, gradients in pools[2].run(share, name, None, False, float("nan")):
        if BY_NAME[name].covers == "SigLipLoss":  # no image leaves its process; what it does to a text does
            value = gradients["text_features"]
        assert value.isnan().any(), value


@pytest.mark.parametrize("name", ["RankConsistency[default]", "ClipLoss", "SigLipLoss"])
def test_two_processes_without_a_graph(pools: Pools, name: str) -> None:
    values = pools[2].run(without_a_graph, name)
    assert_right(averaged([(value, {}) for value in values]), Result(whole(name).value, {}))


def without_a_graph(rank: int, world_size: int, name: str) -> Tensor:
    with torch.inference_mode():
        return BY_NAME[name].started()(**inputs_of(BY_NAME[name], rank, world_size))
