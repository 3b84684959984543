from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from batches import random_batch
from rankloss import Gather, RankClipLoss, RankConsistency, operator, streaming
from rankloss.kernels import rows
from rankloss.options import RankOptions

CPU = torch.device("cpu")


@given(
    n=st.integers(2, 100_000),
    share=st.integers(1, 8),
    budget=st.none() | st.integers(0, 2**34),
    chunk_size=st.none() | st.integers(1, 1000),
    has_teacher=st.booleans(),
)
def test_a_plan_keeps_its_limits(
    n: int, share: int, budget: int | None, chunk_size: int | None, has_teacher: bool
) -> None:
    anchors = max(1, n // share)
    options = RankOptions(chunk_size=chunk_size, memory_budget=budget)
    plan = options.plan(anchors, n, CPU, torch.float32, has_teacher=has_teacher)
    limit = 64 * 2**20 if budget is None else budget
    assert plan.matrix_bytes <= limit
    assert (plan.name == "shared") == (anchors == n and 4 * n * n <= limit)
    assert plan.shares_reference == (has_teacher and anchors == n and 6 * n * n <= limit)
    assert 1 <= plan.slice_size <= plan.ranked_size <= plan.chunk_size <= anchors
    assert plan.ranked_size * n <= max(n, 2**20)
    assert chunk_size is None or plan.chunk_size == min(chunk_size, anchors)


def test_memory_of_a_chunk_grows_no_faster_than_n() -> None:
    elements = [
        RankOptions().plan(n, n, CPU, torch.float32).chunk_size * n for n in (8192, 16384, 32768, 65536)
    ]
    assert all(b <= 2 * a for a, b in itertools.pairwise(elements))


def test_the_module_says_which_plan_runs() -> None:
    assert RankConsistency().plan(64).name == "shared"
    assert RankConsistency().plan(65536).name == "rows"
    assert RankConsistency(memory_budget=0).plan(64).name == "rows"
    assert RankConsistency(chunk_size=7).plan(64).chunk_size == 7
    assert RankConsistency(lists="batch").plan(64) is None
    local = RankConsistency(gather=Gather(rank=0, world_size=4))
    assert (local.plan(4096).name, local.plan(512).chunk_size) == ("rows", 128)


UNPROVEN = "kernel='auto' takes torch's operations until the kernels have run on a card"


@pytest.fixture
def with_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(rows, "triton_version", lambda: "3.7.0")


@pytest.mark.usefixtures("with_triton")
@pytest.mark.parametrize(
    ("options", "device", "dtype", "reason"),
    [
        ({}, "cuda", torch.float32, UNPROVEN),
        (
            {"kernel": "triton", "method": "bin", "top_k": 3, "discount": "log", "diagonal": False},
            "cuda",
            torch.bfloat16,
            None,
        ),
        ({"kernel": "triton"}, "cuda", torch.float32, None),
        ({}, "cpu", torch.float32, "the kernels run on CUDA, not on cpu"),
        ({}, "cuda", torch.float64, "the kernels compute in float32, not in float64"),
        ({"worth": "shifted"}, "cuda", torch.float32, "worth='shifted' has no kernel"),
        ({"ties": "random"}, "cuda", torch.float32, "ties='random' has no kernel"),
        ({"kernel": "torch"}, "cuda", torch.float32, "kernel='torch'"),
    ],
    ids=str,
)
def test_the_plan_says_which_kernel_is_taken_and_why_not_the_fused_one(
    options: dict, device: str, dtype: torch.dtype, reason: str | None
) -> None:
    plan = RankConsistency(**options).plan(64, device, dtype)
    assert (plan.kernel, plan.why_no_kernel) == ("triton" if reason is None else "torch", reason)


def test_without_triton_the_kernel_is_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "triton_version", lambda: None)
    assert RankConsistency().plan(64, "cuda").why_no_kernel == "Triton is not installed"


def test_the_interpreter_is_taken_where_it_is_asked_for_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "triton_version", lambda: "3.7.0")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert RankConsistency(kernel="triton").plan(64).kernel == "triton"
    assert RankConsistency().plan(64).why_no_kernel == UNPROVEN


@pytest.mark.usefixtures("with_triton")
def test_a_kernel_that_is_asked_for_and_does_not_serve_is_an_error_that_says_why() -> None:
    v = torch.nn.functional.normalize(torch.randn(4, 3), dim=-1)
    criterion = RankConsistency(kernel="triton")
    for ask in (lambda: criterion(v, v, 10.0), lambda: criterion.plan(4)):
        with pytest.raises(ValueError, match=r"kernel='triton' .* the kernels run on CUDA, not on cpu"):
            ask()
    for options in ({"worth": "identity"}, {"lists": "batch"}, {"ties": "random"}):
        name, value = next(iter(options.items()))
        with pytest.raises(ValueError, match=f"kernel='triton' .* {name}='{value}' has no kernel"):
            RankConsistency(kernel="triton", **options)


def test_the_plan_that_is_named_is_the_one_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []
    original = operator.stream

    def watched(batch, options, plan, *rest):
        ran.append(plan)
        return original(batch, options, plan, *rest)

    monkeypatch.setattr(operator, "stream", watched)
    v = torch.nn.functional.normalize(torch.randn(20, 4), dim=-1)
    for criterion in (RankConsistency(), RankConsistency(memory_budget=0, chunk_size=3)):
        criterion(v, v, 10.0)
        assert ran.pop() == criterion.plan(20)


@pytest.mark.parametrize("chunk_size", [4, 7, 63])
@pytest.mark.parametrize("has_teacher", [False, True])
def test_the_shared_plan_keeps_no_more_than_it_says(
    chunk_size: int, has_teacher: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, made = [], []

    class Watched(streaming.MirroredProducts):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            made.append(self)

        def give(self, *arguments):
            super().give(*arguments)
            of_term = made[-2:] if has_teacher else made[-1:]
            waiting = [w for products in of_term for w in (*products._cosines, *products._gradients)]
            blocks = [block for w in waiting for of in w.values() for _, block in of]
            kept.append(sum(block.untyped_storage().nbytes() for block in blocks))

    monkeypatch.setattr(streaming, "MirroredProducts", Watched)
    n = 64
    v, t, s = random_batch(0, n, 4, 10.0).leaves(torch.float32)
    criterion, teacher = RankConsistency(chunk_size=chunk_size), {}
    if has_teacher:
        features = random_batch(1, n, 6, 10.0)
        teacher = {"reference_image_features": features.image, "reference_text_features": features.text}
    criterion(v, t, s, **teacher).backward()
    done = range(0, n, chunk_size)  # rows, of which what stands in later columns waits, in four matrices
    matrices = 6 if has_teacher else 4
    assert max(kept) == matrices * max(4 * k * (n - k) for k in done)
    assert max(kept) <= criterion.plan(n, has_teacher=has_teacher).matrix_bytes == matrices * n * n
    assert kept[-1] == 0


class Products(TorchDispatchMode):
    """Counts the multiplications of matrix products (torch's own counter passes over those in place)."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        aten = torch.ops.aten
        factors = {
            aten.matmul.default: args[:2],
            aten.mm.out: args[:2],
            aten.addmm_.default: args[1:3],
        }.get(func)
        if factors:
            self.count += factors[0].numel() * factors[1].shape[1]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("options", "of_student", "of_teacher"),
    [
        ({"memory_budget": 0}, 12, 4),
        ({"memory_budget": 4 * 128**2}, 6, 4),
        ({}, 6, 2),
        ({"lambda_cross": 0.0, "memory_budget": 0}, 12, 1),  # of texts: one matrix for both sides
    ],
)
@pytest.mark.parametrize("has_teacher", [False, True])
def test_a_plan_makes_as_many_products_as_it_says(
    options: dict, of_student: int, of_teacher: int, has_teacher: bool, monkeypatch
) -> None:
    n, d, chunk = 128, 8, 8
    counter, original = Products(), operator.stream

    def watched(*arguments):  # from the inside: a mode does not see into an operator
        with counter:
            return original(*arguments)

    monkeypatch.setattr(operator, "stream", watched)
    inputs, teacher = random_batch(0, n, d, 10.0).leaves(torch.float32), {}
    if has_teacher:
        features = random_batch(1, n, d, 10.0)
        teacher = {"reference_image_features": features.image, "reference_text_features": features.text}
        if options.get("lambda_cross") == 0:
            del teacher["reference_image_features"]
    loss = RankClipLoss(schedule="constant", chunk_size=chunk, **options)
    loss(*inputs, **teacher).backward()
    products = of_student + (of_teacher if has_teacher else 0)
    assert products <= counter.count / (n * n * d) <= products * (1 + chunk / n)
