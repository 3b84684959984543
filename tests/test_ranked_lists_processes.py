"""`RankedLists` on one, two and three processes: values, gradients and collectives."""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from batches import assert_same
from collectives import Collectives
from lists_item_by_item import F64, MODELS, Frozen, Lists, lists_of
from process_pool import Pools
from rankloss import Gather, RankedLists

FLAGS = list(itertools.product([False, True], repeat=2))  # local_loss, gather_with_grad
# Options, and whether a frozen model's scores are subtracted, which is before they are reduced.
SHARDED = [
    ({**options, "reduction": reduction}, is_frozen)
    for options in MODELS
    for reduction, is_frozen in (("mean", False), ("mean", True), ("sum", False), ("none", False))
]
N, K, M = 3, 3, 7  # lists, candidates and rows of a process


def whole(world_size: int) -> Lists:
    """Every process's lists have candidates of its own rows; some rows are equal across processes."""
    shards = [lists_of(rank, N, K, M) for rank in range(world_size)]
    for shard in shards[1:]:
        shard.items[:2] = shards[0].items[:2]
    queries, items, grades, mask = (
        torch.cat([getattr(x, name) for x in shards]) for name in ("queries", "items", "grades", "mask")
    )
    index = torch.cat([x.index + rank * M for rank, x in enumerate(shards)])
    return Lists(queries, items, index, grades, 10.0, mask)


def share(lists: Lists, rows: slice, offset: int = 0) -> Lists:
    """The lists of a process, whose items begin there."""
    index, grades, mask = (x[rows] for x in (lists.index - offset, lists.grades, lists.mask))
    return Lists(lists.queries, lists.items, index, grades, 10.0, mask)


def weighed(values: Tensor, rows: slice = slice(None), times: int = 1) -> Tensor:
    """A value, or the sum of the values of some queries, each with a weight of its own."""
    if not values.dim():
        return values
    weights = torch.linspace(-1.7, 0.6, 3 * N, dtype=F64)[rows][: len(values)]
    return times * (weights * values).sum()


def of_this_rank(rank: int, world_size: int) -> dict[Any, list[Tensor]]:
    lists = whole(world_size)
    rows, places = slice(rank * N, (rank + 1) * N), slice(rank * M, (rank + 1) * M)
    own = share(lists, rows, rank * M)
    found = {}
    for case, flags in itertools.product(range(len(SHARDED)), [*FLAGS, None]):
        gather = None if flags is None else Gather(local_loss=flags[0], gather_with_grad=flags[1])
        options, is_frozen = SHARDED[case]
        loss = RankedLists(**options, gather=gather)
        more = Frozen.of(lists).as_features(rows, places) if is_frozen else {}
        found[case, flags] = own.differentiated(
            lambda q, c, s: weighed(own.loss(loss, q[rows], c[places], s, **more), rows, world_size)  # noqa: B023
        )
    bad = own.leaves()
    if rank == world_size - 1:
        bad[0].data[rows.start, 0] = math.nan
    found["nan"] = [own.loss(RankedLists(), bad[0][rows], bad[1][places], bad[2])]
    return found


@pytest.fixture(scope="module", params=[1, 2, 3])
def table(request: pytest.FixtureRequest, pools: Pools) -> list[dict[Any, list[Tensor]]]:
    return pools[request.param].run(of_this_rank)


@pytest.mark.parametrize("case", range(len(SHARDED)), ids=lambda case: str(SHARDED[case]))
def test_values_and_gradients_of_several_processes_are_those_of_one(table: list[Any], case: int) -> None:
    world_size, (options, is_frozen) = len(table), SHARDED[case]
    lists = whole(world_size)
    more = {"frozen": Frozen.of(lists).scores} if is_frozen else {}
    value, *by = lists.differentiated(lambda *inputs: weighed(lists.owed(*inputs, **options, **more)))
    for flags in [*FLAGS, None]:
        local_loss, gather_with_grad = flags or (True, True)
        local_loss = local_loss or options["reduction"] == "none"
        of_ranks = (of[case, flags] for of in table)
        averaged = [torch.stack(x).mean(0) for x in zip(*of_ranks, strict=True)]
        assert_same([averaged[0], averaged[3]], [value, by[2]])
        is_local = local_loss and not options.get("in_batch_negatives")  # nothing is gathered
        if gather_with_grad or is_local or world_size == 1:
            assert_same(averaged[1:3], by[:2])
        elif not local_loss:  # as in CLIP's loss
            assert_same(averaged[1:3], [x / world_size for x in by[:2]])
        else:
            assert_same(averaged[1:2], by[:1])  # the candidates lack the other processes' lists


def test_nan_of_one_process_is_seen_by_all(table: list[Any]) -> None:
    assert all(of_rank["nan"][0].isnan() for of_rank in table)


def collectives(rank: int, world_size: int) -> list[dict[str, int]]:
    counts = []
    for options in ({}, {"in_batch_negatives": True}):
        lists, loss = lists_of(rank, N, K, M), RankedLists(**options)
        for _ in range(2):
            with Collectives() as calls:
                lists.loss(loss, *lists.leaves())
        counts.append(dict(calls.counts))
    return counts


def excluded_items(lists: Lists) -> Tensor:
    """An item of each query that is no negative: in the list of a query of the other process."""
    return lists.index.roll(N, 0)[:, 0]


def of_ids(rank: int, world_size: int, local_loss: bool = True) -> list[Tensor]:
    """Processes share candidates, whose features differ by a rounding."""
    lists = lists_of(0, 2 * N, K, M)
    rows = slice(rank * N, (rank + 1) * N) if world_size == 2 else slice(None)
    own, ids = share(lists, rows), torch.arange(M) - 3
    loss = RankedLists(in_batch_negatives=True, gather=Gather(local_loss=local_loss))
    excluded = ids[excluded_items(lists)][rows]

    def value(q: Tensor, c: Tensor, s: Tensor) -> Tensor:
        features = q[rows], c * (1 + rank * 1e-14), s
        return own.loss(loss, *features, candidate_ids=ids, excluded_ids=excluded)

    return own.differentiated(value)


@pytest.mark.parametrize("local_loss", [True, False])
def test_a_candidate_is_one_by_its_id_on_all_processes(pools: Pools, local_loss: bool) -> None:
    of_process = functools.partial(of_ids, local_loss=local_loss)
    (alone,), of_ranks = pools[1].run(of_process), pools[2].run(of_process)
    assert_same([torch.stack(x).mean(0) for x in zip(*of_ranks, strict=True)], alone)
    lists = lists_of(0, 2 * N, K, M)
    options = {"in_batch_negatives": True, "excluded": excluded_items(lists).tolist()}
    assert_same(alone, lists.differentiated(lambda *inputs: lists.owed(*inputs, **options)))


def test_without_negatives_only_the_number_of_lists_is_gathered(pools: Pools) -> None:
    assert pools[2].run(collectives) == [[{"allreduce": 1, "allgather": n} for n in (1, 4)]] * 2
