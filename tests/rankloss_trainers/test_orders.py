"""Orders of a folder: the loss against sums over items, the folder, and the trainers that read it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas
import pytest
import tiny_transformers
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import rankloss_trainers
from batches import gradients
from process_pool import Pools
from rankloss import Gather
from rankloss_features.binding import RowCompanion
from rankloss_trainers.console import main
from rankloss_trainers.orders import Orders, bind
from rankloss_trainers.orders.loss import OrderedRankClipLoss

F64 = torch.float64
CONSTANT: dict[str, Any] = {"schedule": "constant", "normalizer": 1.0}


def lists_of(seed: int, n: int, k: int, pictures: int) -> dict[str, Tensor]:
    """Some listed pictures in the batch, some not, ties, places without one; a picture may come twice."""
    rng = np.random.default_rng(seed)
    own = rng.integers(0, pictures, n)
    listed = np.stack([rng.permutation([x for x in range(pictures) if x != i])[:k] for i in own])
    listed[rng.random(listed.shape) < 0.2] = -1
    arrays = own, listed, rng.integers(-2, 3, listed.shape).astype(float)
    names = ("order_pictures", "order_listed", "order_grades")
    return dict(zip(names, map(torch.from_numpy, arrays), strict=True))


def owed(
    v: Tensor, t: Tensor, s: Tensor, lists: dict[str, Tensor], *, top_k: int | None = None
) -> list[Tensor]:
    """Both terms, item by item."""
    pictures, listed, grades = (x.tolist() for x in lists.values())

    def of_list(x: Tensor, i: int, with_own: bool) -> Tensor | None:
        graded = {i: math.inf} if with_own else {}
        for picture, grade in zip(listed[i], grades[i], strict=True):
            if picture in pictures:
                graded[pictures.index(picture)] = grade
        rest = [j for j in range(len(x)) if j not in graded and j != i]
        found = []
        for p, grade in graded.items():
            below = [q for q in graded if graded[q] <= grade] + rest
            counts = top_k is None or sum(g > grade for g in graded.values()) < top_k
            if counts and len(below) > 1:
                found.append(torch.logsumexp(x[below], 0) - x[p])
        return torch.stack(found).mean() if found else None

    def mean(q: Tensor, k: Tensor, with_own: bool) -> Tensor:
        values = [of_list(s * k @ q[i], i, with_own) for i in range(len(q))]
        there = [x for x in values if x is not None]
        return torch.stack(there).mean() if there else (q.sum() + k.sum() + s) * 0

    return [(mean(v, t, True) + mean(t, v, True)) / 2, (mean(v, v, False) + mean(t, t, False)) / 2]


def features(seed: int, n: int, d: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    v, t = F.normalize(torch.randn(2, n, d, dtype=F64, generator=generator), dim=-1)
    s = torch.tensor(7.0, dtype=F64)
    return v.requires_grad_(), t.requires_grad_(), s.requires_grad_()


@given(
    st.integers(0, 2**32 - 1),
    st.integers(2, 6),
    st.integers(1, 4),
    st.integers(0, 4),
    st.sampled_from([None, 1, 2]),
)
def test_terms_and_gradients_are_the_sums_over_items(
    seed: int, n: int, k: int, more: int, top_k: int | None
) -> None:
    lists, inputs = lists_of(seed, n, k, k + 1 + more), features(seed % 1000, n)
    loss = OrderedRankClipLoss(**CONSTANT, lambda_cross=2.0, lambda_in=3.0, top_k=top_k)
    entries = loss(*inputs, output_dict=True, **lists)
    cross, in_ = owed(*inputs, lists, top_k=top_k)
    found = [entries["cross_modal_loss"], entries["in_modal_loss"]]
    for value, expected in zip(found, (2 * cross, 3 * in_), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-12)
        for a, b in zip(gradients(value, inputs, 1.3), gradients(expected, inputs, 1.3), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_the_order_of_a_batch_and_of_padding_makes_no_difference() -> None:
    lists, (v, t, s) = lists_of(0, 6, 3, 7), features(0, 6)
    loss = OrderedRankClipLoss(**CONSTANT)
    shuffle = torch.tensor([3, 0, 5, 1, 4, 2])
    lists["order_pictures"] = torch.arange(6)  # each once, since the first of several is the listed one
    padded = {**lists, "order_listed": F.pad(lists["order_listed"], (1, 2), value=-1)}
    padded["order_grades"] = F.pad(lists["order_grades"], (1, 2), value=9.0)
    shuffled = {name: x[shuffle] for name, x in lists.items()}
    value = loss(v, t, s, **lists)
    torch.testing.assert_close(loss(v, t, s, **padded), value)
    torch.testing.assert_close(loss(v[shuffle], t[shuffle], s, **shuffled), value)


def test_under_autocast_and_with_features_that_are_not_finite() -> None:
    lists, (v, t, s) = lists_of(1, 5, 3, 6), features(1, 5)
    loss = OrderedRankClipLoss(**CONSTANT)
    half = [x.detach().bfloat16() for x in (v, t)]
    with torch.autocast("cpu", torch.bfloat16):
        found = loss(*half, 7.0, output_dict=True, **lists)
    expected = loss(*(x.float() for x in half), 7.0, output_dict=True, **lists)
    for name in ("cross_modal_loss", "in_modal_loss"):
        torch.testing.assert_close(found[name], expected[name])
    assert loss(v.detach().index_fill(0, torch.tensor([0]), math.nan), t, s, **lists).isnan()


@pytest.mark.parametrize("grade", [-3.0, 0.0, 3.0, 1.7e18])
def test_the_own_pair_is_above_any_grade(grade: float) -> None:
    loss, inputs = OrderedRankClipLoss(**CONSTANT, lambda_in=0.0), features(0, 3)
    lists = {"order_pictures": torch.arange(3), "order_listed": torch.tensor([[1], [2], [0]])}
    of_grades = [loss(*inputs, **lists, order_grades=torch.full((3, 1), g)) for g in (1.0, grade)]
    torch.testing.assert_close(*of_grades)
    lists["order_grades"] = torch.full((3, 1), -math.inf)
    below, lists["order_listed"] = loss(*inputs, **lists), torch.full((3, 1), -1)
    torch.testing.assert_close(below, loss(*inputs, **lists))


def test_wrong_lists_are_refused_by_name() -> None:
    v, t, s = features(0, 3)
    loss, lists = OrderedRankClipLoss(**CONSTANT), lists_of(0, 3, 2, 4)
    with pytest.raises(ValueError, match=r"^ranking by orders needs order_pictures"):
        loss(v, t, s, **{**lists, "order_listed": None})
    with pytest.raises(ValueError, match=r"^order_pictures, .* must be \[N\] = \(3,\)"):
        loss(v, t, s, **{name: x[:2] for name, x in lists.items()})


# --- several processes ------------------------------------------------------------------------------------


def share(rank: int, world_size: int, gather: Gather | None) -> list[Tensor]:
    """The gradient of a shared weight, averaged as DDP does it."""
    lists, (v, t, s) = lists_of(3, 6, 3, 8), features(3, 6)
    weight = torch.eye(4, dtype=F64).requires_grad_()
    n = 6 // world_size
    rows = slice(rank * n, (rank + 1) * n)
    loss = OrderedRankClipLoss(**CONSTANT, gather=gather)
    value = loss(
        v.detach()[rows] @ weight,
        t.detach()[rows] @ weight,
        s.detach(),
        **{k: x[rows] for k, x in lists.items()},
    )
    value.backward()
    for x in (both := [value.detach().clone(), weight.grad]) if dist.is_initialized() else ():
        dist.all_reduce(x)
        x /= world_size
    return both if dist.is_initialized() else [value.detach(), weight.grad]


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("gather", [None, Gather(local_loss=False)])
def test_processes_train_as_one(pools: Pools, world_size: int, gather: Gather | None) -> None:
    expected = share(0, 1, None)
    for found in pools[world_size].run(share, gather):
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


# --- the folder -------------------------------------------------------------------------------------------

LISTS = [
    {"id": "a.jpg", "ids": ["c.jpg", "b.jpg"]},
    {"id": "b.jpg", "ids": ["c.jpg", "a.jpg", "d.jpg"], "grades": [1, 2, 1]},
]
ROWS = [("x/a.jpg", "one"), ("x/a.jpg", "another"), ("x/b.jpg", "b"), ("x/c.jpg", "c"), ("x/d.jpg", "d")]


def csv(folder: Path, rows: list[tuple[str, str]] = ROWS) -> str:
    (folder / "pairs.csv").write_text("\n".join(["filepath\ttitle", *map("\t".join, rows)]) + "\n")
    return str(folder / "pairs.csv")


def command(folder: Path, lists: list[Any] = LISTS, *more: str) -> int:
    (folder / "lists.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lists))
    pairs = str(folder / "pairs.csv")
    if not Path(pairs).exists():
        csv(folder)
    return main(
        [
            "orders",
            "--from",
            str(folder / "lists.jsonl"),
            "--data",
            pairs,
            "--output",
            str(folder / "o"),
            *more,
        ]
    )


def test_the_folder_has_the_lists_of_each_rows_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(tmp_path) == 0
    assert capsys.readouterr().out.endswith("2 lists of at most 3 ids; 2 of 4 pictures have none\n")
    found = Orders(str(tmp_path / "o")).check().take(np.arange(len(ROWS)))
    np.testing.assert_array_equal(found["order_pictures"], [0, 0, 1, 2, 3])
    listed = [[2, 1, -1], [2, 1, -1], [2, 0, 3], [-1] * 3, [-1] * 3]
    np.testing.assert_array_equal(found["order_listed"], listed)
    np.testing.assert_array_equal(found["order_grades"][:3], [[2, 1, 0], [2, 1, 0], [1, 2, 1]])
    pandas.DataFrame(LISTS).to_parquet(tmp_path / "lists.parquet")
    assert command(tmp_path, LISTS, "--from", str(tmp_path / "lists.parquet")) == 0
    again = Orders(str(tmp_path / "o")).take(np.arange(len(ROWS)))
    for name, array in found.items():
        np.testing.assert_array_equal(again[name], array)


def test_a_sample_without_a_picture_is_skipped_and_one_of_another_caption_refused(tmp_path: Path) -> None:
    assert command(tmp_path) == 0
    companion = RowCompanion("list of ids", Orders(str(tmp_path / "o")))
    sample = {"__key__": "a", "__url__": "x.tar", "txt": b"a"}
    assert companion.of_sample(sample, "another") is None
    with pytest.raises(ValueError, match=r"sample 'a' of x\.tar with caption 'another' has no row in"):
        companion.of_sample({**sample, "jpg": b""}, "another")


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        (
            [{"id": "a.jpg", "ids": ["e.jpg"]}],
            "the data have no picture 'e.jpg', as 'a.jpg' is one; it is in line 1",
        ),
        ([{"id": 3, "ids": ["a.jpg"]}], "the data have no picture 3"),
        ([*LISTS, LISTS[0]], "'a.jpg' has two lists; the second in line 3"),
        (
            [{"id": "a.jpg", "ids": ["b.jpg", "b.jpg"]}],
            "ids must be distinct, and not the list's own; got 'b.jpg'",
        ),
        (
            [{"id": "a.jpg", "ids": ["b.jpg", "a.jpg"]}],
            "ids must be distinct, and not the list's own; got 'a.jpg'",
        ),
        ([{"id": "a.jpg", "ids": []}], "ids must be a list with at least one id; got []"),
        (
            [{"id": "a.jpg", "ids": ["b.jpg"], "grades": [math.nan]}],
            "grades must be numbers, or −infinity; got nan",
        ),
        ([{"id": "a.jpg", "ids": ["b.jpg"], "grades": [1, 2]}], "got 1 candidates and 2 grades in line 1"),
        ([{"id": "a.jpg", "ids": ["b.jpg"], "grade": [1]}], "a list must have id, ids and perhaps grades"),
        ([], "has no list"),
    ],
)
def test_wrong_lists_name_their_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], lists: list[Any], message: str
) -> None:
    assert command(tmp_path, lists) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def test_two_pictures_of_one_name_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    csv(tmp_path, [*ROWS, ("y/a.jpg", "elsewhere")])
    assert command(tmp_path) == 1
    assert (
        "--data has two pictures 'a.jpg', of which ids name one; the second in row 5"
        in capsys.readouterr().err
    )


def test_other_files_stay_and_damage_shows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / "mine").touch()
    assert command(tmp_path) == 1
    assert "it is not of this command" in capsys.readouterr().err
    (tmp_path / "o" / "mine").unlink()
    assert command(tmp_path) == 0
    grades = np.load(tmp_path / "o" / "grades.npy")
    np.save(tmp_path / "o" / "grades.npy", grades + 1)
    with pytest.raises(ValueError, match=r"grades\.npy is not as it was written"):
        Orders(str(tmp_path / "o")).check()
    with pytest.raises(ValueError, match=r"^orders: .*grades\.npy is not as it was written"):
        rankloss_trainers.create("rankclip", orders=str(tmp_path / "o"))
    with pytest.raises(ValueError, match=r"is no folder of `rankloss orders`"):
        Orders(str(tmp_path))


def test_the_folder_keeps_the_order_of_any_grades(tmp_path: Path) -> None:
    grades = [1_700_000_000.0, 1_700_000_001.0, 1e39]
    assert command(tmp_path, [{"id": "a.jpg", "ids": ["b.jpg", "c.jpg", "d.jpg"], "grades": grades}]) == 0
    found = Orders(str(tmp_path / "o")).take(np.arange(1))
    np.testing.assert_array_equal(found["order_grades"], [[1, 2, 3]])


def test_options_that_rank_in_another_way_are_refused(tmp_path: Path) -> None:
    command(tmp_path)
    with pytest.raises(ValueError, match="model has no effect on lists of ids; got 'top_one'"):
        OrderedRankClipLoss(model="top_one")
    with pytest.raises(ValueError, match=r"^orders: .* excludes method bin"):
        rankloss_trainers.create("rankclip", orders=str(tmp_path / "o"), method="bin")
    with pytest.raises(ValueError, match=r"^orders: .* excludes .*reference teacher"):
        rankloss_trainers.create("rankclip-distill", orders=str(tmp_path / "o"))


# --- the trainers -----------------------------------------------------------------------------------------


def test_hugging_face(tmp_path: Path) -> None:
    rows = 32
    pairs = tiny_transformers.Pairs(rows)
    table = [(f"{i}.jpg", f"caption {i}") for i in range(rows)]
    lists = [
        {"id": f"{i}.jpg", "ids": [f"{(i + j) % rows}.jpg" for j in (3, 1, 7)]} for i in range(0, rows, 2)
    ]
    csv(tmp_path, table)
    assert command(tmp_path, lists) == 0
    folder = str(tmp_path / "o")
    named = datasets.Dataset.from_dict(
        dict(zip(("image", "caption"), map(list, zip(*table, strict=True)), strict=True))
    )
    bound = bind(named, folder).remove_columns(["image", "caption"])
    columns = datasets.Dataset.from_dict({name: x.tolist() for name, x in pairs.columns.items()})
    trained = tiny_transformers.train(
        tmp_path,
        pairs=datasets.concatenate_datasets([bound, columns], axis=1).with_format("torch"),
        loss="rankclip",
        loss_options={"orders": folder, "schedule": "constant", "lambda_cross": 8.0, "lambda_in": 8.0},
        max_steps=2,
        **tiny_transformers.SGD,
    )
    model = tiny_transformers.clip()
    loss = rankloss_trainers.create(
        "rankclip", orders=folder, schedule="constant", lambda_cross=8.0, lambda_in=8.0
    )
    pairs.columns.update({k: torch.from_numpy(x) for k, x in Orders(folder).take(np.arange(rows)).items()})
    log = tiny_transformers.own_loop(model, loss, pairs, [8], 2)
    torch.testing.assert_close(
        tiny_transformers.weights(trained.model), tiny_transformers.weights(model), rtol=1e-4, atol=1e-6
    )
    logged = tiny_transformers.column(trained, "in_modal_loss")
    assert logged == pytest.approx([x["in_modal_loss"] for x in log], rel=1e-4)
    assert min(logged) > 0
    command(tmp_path, [{"id": "1.jpg", "ids": ["2.jpg"]}])
    with pytest.raises(ValueError, match=r"do not have the lists of .*orders\.bind"):
        trained.train()
