"""The benchmarks' own arithmetic: turns, products, and the page that is made of their JSON."""

from __future__ import annotations

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
TARGETS = [
    page.Target("a / b", (GROUP, "a"), (GROUP, "b"), 2.0, at_least=True),
    page.Target("b / a", (GROUP, "b"), (GROUP, "a"), 0.3),
    page.Target("a, memory", (GROUP, "a"), (GROUP, "b"), 4.0, quantity="peak_bytes"),
    page.Target("a", (GROUP, "a"), None, 2.5),
    page.Target("c / a", (GROUP, "c"), (GROUP, "a"), 1.0),
]


def measured(group: str, contender: str, seconds: list[float], **counts: float) -> dict[str, Any]:
    """A benchmark as pytest-benchmark writes it."""
    params = {"contender": contender}
    return {"group": group, "params": params, "stats": {"data": seconds}, "extra_info": counts}


def test_every_round_runs_every_contender_once_and_in_the_other_order() -> None:
    ran: list[str] = []
    steps = {name: (lambda name=name: ran.append(name)) for name in "abc"}

    def seconds(step: Any) -> float:
        step()
        return float(len(ran))

    found = turns.in_turns(steps, 3, seconds)
    assert "".join(ran) == "abccbaabc"
    assert found == {"a": [1.0, 6.0, 7.0], "b": [2.0, 5.0, 8.0], "c": [3.0, 4.0, 9.0]}


def test_on_a_card_seconds_and_bytes_are_of_what_the_card_has_done(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr(turns, "DEVICE", torch.device("cuda"))
    for name, bytes_there in {"synchronize": 0, "reset_peak_memory_stats": 0, "memory_allocated": 3}.items():
        monkeypatch.setattr(torch.cuda, name, lambda name=name, x=bytes_there: seen.append(name) or x)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3 + seen.count("step"))
    turns.stopwatch(lambda: seen.append("step"))
    assert seen == ["synchronize", "step", "synchronize"]
    seen.clear()
    assert turns.count_memory(lambda: seen.append("step")) == {"peak_bytes": 1, "saved_bytes": 0}
    assert seen == ["synchronize", "reset_peak_memory_stats", "memory_allocated", "step"]


def test_products_of_a_step_are_all_its_products() -> None:
    n, d = 96, 24
    v, t = (F.normalize(torch.randn(n, d), dim=-1).requires_grad_() for _ in range(2))
    loss = rankloss.RankClipLoss(schedule="constant")
    products = products_of(lambda: loss(v, t, torch.tensor(10.0)).backward())
    in_place = {torch.ops.aten.addmm_: lambda _, a, b, **__: 2 * a[0] * a[1] * b[1]}
    with FlopCounterMode(display=False, custom_mapping=in_place) as flops:
        products()
    assert flops.get_total_flops() == 8 * 2 * n * n * d


@pytest.mark.parametrize("method", ["sort", "bin"])
def test_a_step_by_the_kernels_moves_at_most_35_bytes_for_each_element_of_its_lists(method: str) -> None:
    """On one of eight GPUs, with 1,024 pairs on each."""
    loss = rankloss.RankClipLoss(schedule="constant", method=method, kernel="triton")
    counted = traffic.count(loss, traffic.features(1024, 8192, 512))
    assert counted["bytes_by_operation"]["kernel"] > 8  # what the lists' kernels move is in the count
    assert counted["bytes_per_element"] <= 35


def test_a_target_is_judged_by_the_median_of_the_rounds_ratios() -> None:
    slow_round = [[3.0, 30.0, 2.0], [1.0, 10.0, 4.0]]  # ratios 3, 3 and 1/2; of the medians 3/4
    results = [
        measured(GROUP, name, x, peak_bytes=y) for name, x, y in zip("ab", slow_round, (30, 10), strict=True)
    ]
    rows = page.judged(page.groups_of({"benchmarks": results}), TARGETS).splitlines()[2:]
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
    with pytest.raises(ValueError, match="bench:x"):
        page.fill(path, "x", "text\n")
