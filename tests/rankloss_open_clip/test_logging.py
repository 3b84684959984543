"""What the loss gives to be logged: that it is true, and that it changes nothing."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from stand_ins import at, features

from rankloss import RankClipLoss, RankConsistency
from rankloss.metrics import rank_agreement
from rankloss_open_clip.training import TrainerLoss
from rankloss_trainers.charts import AgreementCharts
from rankloss_trainers.driven_loss import LoggedTerms
from rankloss_trainers.logging import RankClipLog

TERMS = ["contrastive_loss", "cross_modal_loss", "in_modal_loss"]
METRICS = ["rank_lambda", "cross_modal_raw", "in_modal_raw", "cross_modal_tau", "in_modal_tau"]


def trainer_loss(*, unit: str = "epoch", agreement_every: int | None = None, **options: Any) -> TrainerLoss:
    options = {"schedule": "linear", **options}
    return TrainerLoss(RankClipLoss(**options), unit=unit, evaluate=RankClipLog(agreement_every))


@pytest.mark.parametrize(
    ("epoch", "cross", "in_modal"), [(0, 1.0, 1.0), (1, 0.3, 4.0), (2, 0.0, 1.0), (2, 0.0, 0.0)]
)
def test_raw_terms_are_those_that_are_computed_before_every_weight(
    epoch: int, cross: float, in_modal: float
) -> None:
    loss = trainer_loss(lambda_cross=cross, lambda_in=in_modal)
    loss.start_epoch(at(epoch))  # λ = 0, ½, 1
    inputs = features()
    shown = loss(**inputs, output_dict=True)
    with torch.no_grad():
        raw = RankConsistency()(**inputs, output_dict=True)
    weights = {"cross_modal": epoch * cross, "in_modal": epoch * in_modal}
    names = [name for name, weight in weights.items() if weight]
    assert list(shown) == [*TERMS, "rank_lambda", *(f"{name}_raw" for name in names)]
    for name in names:
        torch.testing.assert_close(shown[f"{name}_raw"], raw[f"{name}_loss"], rtol=1e-6, atol=0)


def test_metrics_are_detached_and_no_part_of_the_sum() -> None:
    loss = trainer_loss(agreement_every=1)
    loss.start_epoch(at(1))
    shown = loss(**features(), output_dict=True)
    assert list(shown) == [*TERMS, *METRICS]
    assert list(shown.values()) == [shown[name] for name in TERMS]
    assert all(shown[name].shape == () and not shown[name].requires_grad for name in METRICS)
    assert torch.equal(sum(shown.values()), loss.criterion(**features()))


@pytest.mark.parametrize("duplicate", [LoggedTerms.copy, copy.copy, copy.deepcopy])
def test_copy_still_tells_terms_from_metrics(duplicate: Callable[[LoggedTerms], LoggedTerms]) -> None:
    shown = LoggedTerms({"a_loss": torch.tensor(1.0)}, {"depth": torch.tensor(7.0)})
    other = duplicate(shown)
    other["b_loss"] = torch.tensor(2.0)
    assert list(other.items()) == [("a_loss", 1), ("depth", 7), ("b_loss", 2)]
    assert sum(other.values()) == 3
    assert list(shown) == ["a_loss", "depth"]


def test_agreement_is_that_of_every_call_of_a_measured_step() -> None:
    loss = trainer_loss(agreement_every=2)
    loss.start_epoch(at(1, accum_freq=2))
    shown = [loss(**features(seed=call), output_dict=True) for call in range(8)]
    for name in ("cross_modal_tau", "in_modal_tau"):
        measured = []
        for call in (0, 1, 4, 5):  # those of steps 0 and 2
            pair = features(seed=call)
            agreement = rank_agreement(pair["image_features"], pair["text_features"])
            measured.append(pytest.approx(agreement[name].item(), abs=1e-6))
        a, b, c, d = measured
        assert [entries[name].item() for entries in shown] == [a, b, b, b, c, d, d, d]


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
