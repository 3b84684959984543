"""What the loss gives to be logged: that it is true, and that it changes nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from agreement_processes import check_agreement
from stand_ins import at, features

from process_pool import Pools
from rankloss import RankClipLoss, RankConsistency
from rankloss.metrics import rank_agreement
from rankloss_open_clip.training import TrainerLoss
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


def test_agreement_is_that_of_the_batch_of_all_processes(pools: Pools) -> None:
    whole = {name: x.detach() for name, x in features(8).items()}
    agreement = rank_agreement(whole["image_features"], whole["text_features"])
    expected = {name: agreement[name].item() for name in ("cross_modal_tau", "in_modal_tau")}
    pools[2].run(check_agreement, whole, expected)
