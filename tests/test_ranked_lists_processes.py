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
from lists_item_by_item import F64, MODELS, Frozen, Lists, random_lists
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
    shards = [random_lists(rank, N, K, M) for rank in range(world_size)]
    for shard in shards[1:]:
        shard.items[:2] = shards[0].items[:2]
    queries, items, grades, mask = (
        torch.cat([getattr(x, name) for x in shards]) for name in ("queries", "items", "grades", "mask")
    )
    index = torch.cat([x.index + rank * M for rank, x in enumerate(shards)])
    return Lists(queries, items, index, grades, 10.0, mask)


def share(lists: Lists, rows: slice, first_item: int = 0) -> Lists:
    """The lists of a process, whose candidates are counted from its first item; all queries and items."""
    assert lists.mask is not None
    return Lists(
        lists.queries, lists.items, lists.index[rows] - first_item, lists.grades[rows], 10.0, lists.mask[rows]
    )


def total(values: Tensor, rows: slice = slice(None)) -> Tensor:
    """A value as it is; of values of some queries the sum, each with a weight of its own."""
    if not values.dim():
        return values
    most_queries = 3 * N  # of three processes
    weights = torch.linspace(-1.7, 0.6, most_queries, dtype=F64)[rows][: len(values)]
    return (weights * values).sum()


def rows_and_places(rank: int) -> tuple[slice, slice]:
    """The queries and the items of a process among all."""
    return slice(rank * N, (rank + 1) * N), slice(rank * M, (rank + 1) * M)


def of_this_rank(rank: int, world_size: int) -> dict[Any, list[Tensor]]:
    """By case and flags, the value of this rank's lists and its gradients by all processes' inputs."""
    lists = whole(world_size)
    rows, places = rows_and_places(rank)
    own = share(lists, rows, first_item=places.start)

    def value_and_gradients(options: dict[str, Any], is_frozen: bool, flags: Any) -> list[Tensor]:
        gather = None if flags is None else Gather(local_loss=flags[0], gather_with_grad=flags[1])
        loss = RankedLists(**options, gather=gather)
        frozen = Frozen.of(lists).as_features(rows, places) if is_frozen else {}

        def value_of(q: Tensor, c: Tensor, s: Tensor) -> Tensor:
            values = own.value_of(loss, q[rows], c[places], s, **frozen)
            # DDP averages, and values of queries are to be added up.
            return total(values, rows) * (world_size if values.dim() else 1)

        return own.differentiated(value_of)

    return {
        (case, flags): value_and_gradients(options, is_frozen, flags)
        for case, (options, is_frozen) in enumerate(SHARDED)
        for flags in [*FLAGS, None]
    }


@pytest.fixture(scope="module", params=[1, 2, 3])
def table(request: pytest.FixtureRequest, pools: Pools) -> list[dict[Any, list[Tensor]]]:
    return pools[request.param].run(of_this_rank)


@functools.cache
def owed_by(case: int, world_size: int) -> list[Tensor]:
    """The value of the whole batch in one process, and its gradients by queries, items and scale."""
    options, is_frozen = SHARDED[case]
    lists = whole(world_size)
    frozen = {"frozen": Frozen.of(lists).scores} if is_frozen else {}
    return lists.differentiated(lambda *inputs: total(lists.loss_item_by_item(*inputs, **options, **frozen)))


def id_of(case: int) -> str:
    """Its options, and "frozen" where a frozen model's scores are subtracted."""
    options, is_frozen = SHARDED[case]
    named = [f"{name}={value}" for name, value in options.items()]
    return "-".join([*named, *["frozen"] * is_frozen])


every_case = pytest.mark.parametrize("case", range(len(SHARDED)), ids=id_of)


@every_case
def test_value_and_the_scales_gradient_are_those_of_one_process_under_all_flags(
    table: list[Any], case: int
) -> None:
    value, _, _, by_scale = owed_by(case, len(table))
    for flags in [*FLAGS, None]:
        mean_value, _, _, mean_by_scale = mean_over_ranks([of_rank[case, flags] for of_rank in table])
        assert_same([mean_value, mean_by_scale], [value, by_scale])


@every_case
def test_features_gathered_with_their_graph_have_the_gradients_of_one_process(
    table: list[Any], case: int
) -> None:
    for flags in ((False, True), (True, True), None):
        assert_same(mean_over_ranks([of_rank[case, flags] for of_rank in table]), owed_by(case, len(table)))


LOCAL, GLOBAL = (True, False), (False, False)  # the flags of features that are gathered without their graph


@every_case
def test_a_local_loss_of_constants_has_the_queries_gradients_of_one_process(
    table: list[Any], case: int
) -> None:
    """With negatives those of candidates lack the other processes' lists; values of queries are local."""
    options, _ = SHARDED[case]
    _, by_queries, by_items, _ = owed_by(case, len(table))
    gathers = options.get("in_batch_negatives") and len(table) > 1
    for flags in [LOCAL, GLOBAL] if options["reduction"] == "none" else [LOCAL]:
        _, mean_by_queries, mean_by_items, _ = mean_over_ranks([of_rank[case, flags] for of_rank in table])
        assert_same([mean_by_queries], [by_queries])
        if not gathers:
            assert_same([mean_by_items], [by_items])


@pytest.mark.parametrize(
    "case", [case for case, (options, _) in enumerate(SHARDED) if options["reduction"] != "none"], ids=id_of
)
def test_a_global_loss_of_constants_divides_the_features_gradients_by_the_processes(
    table: list[Any], case: int
) -> None:
    """As in CLIP's loss."""
    _, by_queries, by_items, _ = owed_by(case, len(table))
    _, mean_by_queries, mean_by_items, _ = mean_over_ranks([of_rank[case, GLOBAL] for of_rank in table])
    assert_same([mean_by_queries, mean_by_items], [by_queries / len(table), by_items / len(table)])


def mean_over_ranks(of_ranks: list[list[Tensor]]) -> list[Tensor]:
    """DDP's mean of a value and of each gradient."""
    return [torch.stack(results).mean(0) for results in zip(*of_ranks, strict=True)]


def value_with_nan(rank: int, world_size: int) -> Tensor:
    """The value where a query of the last rank has a NaN."""
    lists = whole(world_size)
    rows, places = rows_and_places(rank)
    q, c, s = lists.leaves()
    if rank == world_size - 1:
        q.data[rows.start, 0] = math.nan
    return share(lists, rows, first_item=places.start).value_of(RankedLists(), q[rows], c[places], s)


@pytest.mark.parametrize("world_size", [2, 3])
def test_nan_of_one_process_is_seen_by_all(pools: Pools, world_size: int) -> None:
    assert all(value.isnan() for value in pools[world_size].run(value_with_nan))


def collectives(rank: int, world_size: int, in_batch_negatives: bool) -> tuple[dict[str, int], int]:
    """The number of each kind of collective call of a loss's second call, and the bytes of its gatherings.

    In the first call processes may compare more.
    """
    lists, loss = random_lists(rank, N, K, M), RankedLists(in_batch_negatives=in_batch_negatives)
    for _ in range(2):
        with Collectives() as calls:
            lists.value_of(loss, *lists.leaves())
    return dict(calls.counts), calls.filled["allgather"]


def excluded_items(lists: Lists) -> Tensor:
    """An item of each query that is no negative: the first in the list of a query of the other process."""
    first_candidates = lists.index[:, 0]
    return first_candidates.roll(N)


def of_shared_candidates(rank: int, world_size: int, local_loss: bool) -> list[Tensor]:
    """The value and gradients of lists whose candidates all processes have, but for a rounding.

    One process alone has the lists of both.
    """
    lists = random_lists(seed=0, n=2 * N, k=K, m=M)
    rows = slice(rank * N, (rank + 1) * N) if world_size == 2 else slice(None)
    own, ids = share(lists, rows), torch.arange(M) - 3
    loss = RankedLists(in_batch_negatives=True, gather=Gather(local_loss=local_loss))
    excluded = ids[excluded_items(lists)][rows]

    def value(q: Tensor, c: Tensor, s: Tensor) -> Tensor:
        features = q[rows], c * (1 + rank * 1e-14), s
        return own.value_of(loss, *features, candidate_ids=ids, excluded_ids=excluded)

    return own.differentiated(value)


@pytest.mark.parametrize("local_loss", [True, False])
def test_a_candidate_is_one_by_its_id_on_all_processes(pools: Pools, local_loss: bool) -> None:
    lists = random_lists(seed=0, n=2 * N, k=K, m=M)
    options = {"in_batch_negatives": True, "excluded": excluded_items(lists).tolist()}
    owed = lists.differentiated(lambda *inputs: lists.loss_item_by_item(*inputs, **options))
    for world_size in (1, 2):
        of_ranks = pools[world_size].run(of_shared_candidates, local_loss)
        assert_same(mean_over_ranks(of_ranks), owed)


def test_without_negatives_only_the_number_of_lists_is_gathered(pools: Pools) -> None:
    """Beside one sum, by which the processes see that they agree."""
    numbers_of_two_processes = 2 * F64.itemsize
    owed = {"allreduce": 1, "allgather": 1}, numbers_of_two_processes
    assert pools[2].run(collectives, False) == [owed] * 2


def test_with_negatives_a_step_has_four_gatherings(pools: Pools) -> None:
    """Of queries, which may not be equal, candidates, whether each is listed, and the number of lists."""
    for counts, _bytes in pools[2].run(collectives, True):
        assert counts == {"allreduce": 1, "allgather": 4}
