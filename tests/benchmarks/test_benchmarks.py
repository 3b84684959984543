"""The benchmarks' own arithmetic: turns, products, and the page that is made of their JSON."""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import rankloss

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "benchmarks"))

import page  # noqa: E402
import traffic  # noqa: E402
import turns  # noqa: E402
from products import products_of  # noqa: E402

GROUP = "losses: N = 8"
A, B, C = (GROUP, "a"), (GROUP, "b"), (GROUP, "c")
TARGETS = [
    page.Target("a / b", of=A, beside=B, bound=2.0, at_least=True),
    page.Target("b / a", of=B, beside=A, bound=0.3),
    page.Target("a, memory", of=A, beside=B, bound=4.0, quantity="peak_bytes"),
    page.Target("a", of=A, beside=None, bound=2.5),
    page.Target("c / a", of=C, beside=A, bound=1.0),
]


def benchmark_result(contender: str, seconds: list[float], **counts: float) -> dict[str, Any]:
    """A benchmark of the group as pytest-benchmark writes it: the seconds of its rounds, and counts."""
    params = {"contender": contender}
    return {"group": GROUP, "params": params, "stats": {"data": seconds}, "extra_info": counts}


def test_every_round_runs_every_contender_once_and_in_the_other_order() -> None:
    """The number of a call stands for its seconds."""
    ran: list[str] = []
    steps = {name: functools.partial(ran.append, name) for name in "abc"}

    def call_and_count(step: Any) -> float:
        step()
        return float(len(ran))

    rounds = 3
    seconds = turns.in_turns(steps, rounds, call_and_count)
    assert "".join(ran) == "abc" + "cba" + "abc"
    assert seconds == {"a": [1.0, 6.0, 7.0], "b": [2.0, 5.0, 8.0], "c": [3.0, 4.0, 9.0]}


@pytest.fixture
def card_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The calls of a card that is not there, in order, to which a test's step adds ``"step"``.

    The card has three bytes allocated, and each step allocates one more.
    """
    calls: list[str] = []

    def recorded(name: str, result: int) -> Any:
        """A function that adds its name to the calls, and returns the result."""

        def call() -> int:
            calls.append(name)
            return result

        return call

    monkeypatch.setattr(turns, "DEVICE", torch.device("cuda"))
    for name, result in {"synchronize": 0, "reset_peak_memory_stats": 0, "memory_allocated": 3}.items():
        monkeypatch.setattr(torch.cuda, name, recorded(name, result))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3 + calls.count("step"))
    return calls


def test_on_a_card_the_stopwatch_waits_for_it_before_and_after_a_step(card_calls: list[str]) -> None:
    turns.stopwatch(lambda: card_calls.append("step"))
    assert card_calls == ["synchronize", "step", "synchronize"]


def test_on_a_card_the_peak_is_what_the_step_has_added(card_calls: list[str]) -> None:
    counted = turns.count_memory(lambda: card_calls.append("step"))
    assert counted == {"peak_bytes": 1, "saved_bytes": 0}  # of 3 + 1 bytes 3 were there before
    assert card_calls == ["synchronize", "reset_peak_memory_stats", "memory_allocated", "step"]


def test_products_of_a_step_are_all_its_products() -> None:
    """``products_of`` records a step's matrix products and replays them: torch counts their operations."""
    n, d = 96, 24
    v, t = (F.normalize(torch.randn(n, d), dim=-1).requires_grad_() for _ in range(2))
    loss = rankloss.RankClipLoss(schedule="constant")
    products = products_of(lambda: loss(v, t, torch.tensor(10.0)).backward())

    def of_product_in_place(_: Any, a: list[int], b: list[int], **__: Any) -> int:
        """By the shapes of a and b; torch's counter passes over such products."""
        return 2 * a[0] * a[1] * b[1]

    in_place = {torch.ops.aten.addmm_: of_product_in_place}
    with FlopCounterMode(display=False, custom_mapping=in_place) as flops:
        products()
    forward_and_backward = 4 + 4  # the matrices S, Sᵀ, I and X; as many for the gradients
    operations_of_product = 2 * n * n * d  # a multiplication and an addition each
    assert flops.get_total_flops() == forward_and_backward * operations_of_product


@pytest.fixture(scope="module", params=["sort", "bin"])
def cost_of_a_kernel_step(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Counts of ``traffic.py`` for a step by the Triton kernels on one of eight GPUs, 1,024 pairs on each."""
    loss = rankloss.RankClipLoss(schedule="constant", method=request.param, kernel="triton")
    counted: dict[str, Any] = traffic.count(loss, traffic.features(rows=1024, items=8192, dim=512))
    return counted


def test_a_step_by_the_kernels_moves_at_most_35_bytes_for_each_element_of_its_lists(
    cost_of_a_kernel_step: dict[str, Any],
) -> None:
    """34.9 is the count at the time of writing, by either method."""
    counted = cost_of_a_kernel_step
    read_and_written = 2 * torch.float32.itemsize  # of each element, by the kernels of the lists
    assert counted["bytes_by_operation"]["kernel"] > read_and_written  # so that they are in the count
    assert counted["bytes_per_element"] <= 35


def test_a_step_by_the_kernels_launches_at_most_71_operations(cost_of_a_kernel_step: dict[str, Any]) -> None:
    """71 is the count at the time of writing, by either method: raise it only for a launch that is needed."""
    counted = cost_of_a_kernel_step
    of_equal_rows = 2 * 2  # two kernels for each modality
    of_lists = 2  # one kernel for each term, with both directions
    assert counted["launches_by_operation"]["kernel"] == of_equal_rows + of_lists
    assert counted["launches"] <= 71


def test_a_target_is_judged_by_the_median_of_the_rounds_ratios() -> None:
    """The rounds' ratios are 3, 3 and 1/2, of which the second is slow; that of the medians is 3/4.

    Contender c has no result.
    """
    results = [
        benchmark_result("a", [3.0, 30.0, 2.0], peak_bytes=30),
        benchmark_result("b", [1.0, 10.0, 4.0], peak_bytes=10),
    ]
    table = page.judged(page.groups_of({"benchmarks": results}), TARGETS)
    _header, _line, *rows = table.splitlines()
    assert rows == [
        "| a / b | at least 2.00× | 3.00× | yes |",
        "| b / a | at most 0.30× | 0.33× | no |",
        "| a, memory | at most 4.00× | 3.00× | yes |",
        "| a | at most 2.50 s | 3.00 s | no |",
        "| c / a | at most 1.00× | not measured | – |",
    ]


def test_fill_replaces_what_is_between_the_markers_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "doc.md"
    path.write_text("a\n<!-- bench:x -->\nold\n<!-- /bench:x -->\nb\n")
    for text in ("new \\1\n", "newer\n"):  # \1 stays: the text is no template of a regular expression
        page.fill(path, "x", text)
        assert path.read_text() == f"a\n<!-- bench:x -->\n{text}<!-- /bench:x -->\nb\n"


def test_fill_refuses_a_page_that_lacks_a_marker(tmp_path: Path) -> None:
    path = tmp_path / "doc.md"
    path.write_text("a\n<!-- bench:x -->\nb\n")
    with pytest.raises(ValueError, match=r"doc\.md must have <!-- bench:x --> and <!-- /bench:x --> once"):
        page.fill(path, "x", "text\n")
