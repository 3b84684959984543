"""What the loss gives to be logged: that it is true, and that it changes nothing."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import kendalltau
from stand_ins import at, features
from torch import Tensor

from rankloss import RankClipLoss, RankConsistency
from rankloss_open_clip.training import TrainerLoss
from rankloss_trainers.charts import AgreementCharts
from rankloss_trainers.driven_loss import LoggedTerms
from rankloss_trainers.logging import RankClipLog

TERMS = ["contrastive_loss", "cross_modal_loss", "in_modal_loss"]
METRICS = ["rank_lambda", "cross_modal_raw", "in_modal_raw", "cross_modal_tau", "in_modal_tau"]


def trainer_loss(*, unit: str = "epoch", agreement_every: int | None = None, **options: Any) -> TrainerLoss:
    options = {"schedule": "linear", **options}
    return TrainerLoss(RankClipLoss(**options), unit=unit, evaluate=RankClipLog(agreement_every))


@pytest.mark.parametrize("epoch", [1, 2])  # λ = ½, 1
@pytest.mark.parametrize("options", [{"lambda_cross": 0.3, "lambda_in": 4.0}, {"worth": "shifted"}])
def test_raw_terms_are_those_of_rank_consistency(epoch: int, options: dict[str, Any]) -> None:
    loss = trainer_loss(**options)
    loss.start_epoch(at(epoch))
    inputs = features()
    shown = loss(**inputs, output_dict=True)
    with torch.no_grad():
        raw = RankConsistency(worth=options.get("worth", "exp"))(**inputs, output_dict=True)
    for term in ("cross_modal", "in_modal"):
        torch.testing.assert_close(shown[f"{term}_raw"], raw[f"{term}_loss"], rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("epoch", "in_modal", "shown"), [(0, 1.0, []), (1, 1.0, ["in_modal_raw"]), (1, 0.0, [])]
)
def test_term_that_is_not_computed_has_no_raw_value(epoch: int, in_modal: float, shown: list[str]) -> None:
    loss = trainer_loss(lambda_cross=0.0, lambda_in=in_modal)
    loss.start_epoch(at(epoch))
    assert list(loss(**features(), output_dict=True)) == [*TERMS, "rank_lambda", *shown]


def test_metrics_are_detached_and_leave_value_and_gradient_as_they_are() -> None:
    loss = trainer_loss(agreement_every=1)
    loss.start_epoch(at(1))
    inputs, alone = features(), features()
    shown = loss(**inputs, output_dict=True)
    assert list(shown) == [*TERMS, *METRICS]
    assert list(shown.values()) == [shown[name] for name in TERMS]
    assert all(shown[name].shape == () and not shown[name].requires_grad for name in METRICS)
    assert not any(name.endswith("_loss") for name in METRICS)

    total = sum(shown.values())
    (0.7 * total).backward()
    reference = loss.criterion(**alone)
    (0.7 * reference).backward()
    assert torch.equal(total, reference)
    for name, value in inputs.items():
        assert torch.equal(value.grad, alone[name].grad), name


@pytest.mark.parametrize("duplicate", [LoggedTerms.copy, copy.copy, copy.deepcopy])
def test_copy_still_tells_terms_from_metrics(duplicate: Callable[[LoggedTerms], LoggedTerms]) -> None:
    shown = LoggedTerms({"a_loss": torch.tensor(1.0)}, {"depth": torch.tensor(7.0)})
    other = duplicate(shown)
    other["b_loss"] = torch.tensor(2.0)
    assert list(other.items()) == [("a_loss", 1), ("depth", 7), ("b_loss", 2)]
    assert sum(other.values()) == 3
    assert list(shown) == ["a_loss", "depth"]


def mean_tau(a: Tensor, b: Tensor) -> float:
    return float(np.mean([kendalltau(x, y).statistic for x, y in zip(a.numpy(), b.numpy(), strict=True)]))


def test_agreement_is_kendalls_tau_of_a_steps_calls() -> None:
    loss = trainer_loss(agreement_every=2)
    loss.start_epoch(at(1, accum_freq=2))
    measured = []
    for call in range(8):
        inputs = features(seed=call)
        shown = loss(**inputs, output_dict=True)
        measured.append(shown["cross_modal_tau"].item())
        if call in (0, 1, 4, 5):  # those of steps 0 and 2
            v, t = inputs["image_features"].detach().double(), inputs["text_features"].detach().double()
            assert shown["cross_modal_tau"].item() == pytest.approx(mean_tau(v @ t.T, t @ v.T), abs=1e-6)
            assert shown["in_modal_tau"].item() == pytest.approx(mean_tau(v @ v.T, t @ t.T), abs=1e-6)
    assert measured == [measured[0], *[measured[1]] * 3, measured[4], *[measured[5]] * 3]
    assert len({*measured}) == 4


def test_without_matplotlib_one_warning_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "rankloss.plots", raising=False)
    monkeypatch.delattr("rankloss.plots", raising=False)
    loss, charts = trainer_loss(agreement_every=2), AgreementCharts([lambda *_: pytest.fail("no chart")])
    loss.evaluate.charts = charts
    for epoch in range(2):
        loss.start_epoch(at(epoch))
        charts.due(epoch, 0)
        shown = loss(**features(), output_dict=True)
    (message,) = caplog.messages
    assert "pip install 'rankloss[plots]'" in message
    assert abs(shown["cross_modal_tau"]) <= 1
