"""What the text log, TensorBoard and W&B show of a run: that it is true, and that it changes nothing."""

from __future__ import annotations

import copy
import io
import logging
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from agreement_processes import check_agreement
from PIL import Image
from scipy.stats import kendalltau
from torch import Tensor
from torch.nn.functional import normalize
from trainer_runs import STEPS, Run, Runs, Trainer

from process_pool import Pools
from rankloss import RankClipLoss, RankConsistency, schedules
from rankloss_open_clip.logged_terms import LoggedTerms, TrainerLoss
from rankloss_trainers.charts import AgreementCharts
from rankloss_trainers.clock import Position
from rankloss_trainers.logging import RankClipLog
from wandb_files import wandb_scalars

TERMS = ["contrastive_loss", "cross_modal_loss", "in_modal_loss"]
METRICS = ["rank_lambda", "cross_modal_raw", "in_modal_raw", "cross_modal_tau", "in_modal_tau"]
EPOCHS, EVERY = 3, 3  # of the run called "agreement"


@pytest.fixture
def run(runs: Runs) -> Run:
    return runs["agreement"]


# --- a run of the trainer ---


def test_text_log_tensorboard_and_wandb_show_the_same(run: Run, trainer: Trainer) -> None:
    wandb = wandb_scalars(trainer.directory, "agreement")
    lines = run.train_lines()
    assert len(lines) == EPOCHS * STEPS
    for name in (*TERMS, *METRICS, "loss"):
        shown = run.scalars[name]
        assert list(shown) == list(range(EPOCHS * STEPS)), name
        assert shown == {step: np.float32(value) for step, value in wandb[f"train/{name}"].items()}, name
        assert list(shown.values()) == pytest.approx([line[name.capitalize()] for line in lines], rel=1e-4)
    ours = {name for name in run.scalars if name in (*TERMS, *METRICS)}
    assert ours == {*TERMS, *METRICS}


def test_trained_loss_is_exactly_the_sum_of_the_weighted_terms(run: Run) -> None:
    terms = [run.scalars[name] for name in TERMS]
    for step, loss in run.scalars["loss"].items():
        total = np.float32(0)
        for values in terms:
            total += np.float32(values[step])
        assert loss == total


def test_raw_terms_are_the_weighted_ones_before_lambda(run: Run) -> None:
    scalars = run.scalars
    for term in ("cross_modal", "in_modal"):
        for step, raw in scalars[f"{term}_raw"].items():
            lambda_ = schedules.official(step // STEPS + 1, EPOCHS)
            assert scalars["rank_lambda"][step] == lambda_
            assert scalars[f"{term}_loss"][step] == pytest.approx(raw * lambda_ / 16, rel=1e-6)
            assert 0.1 < raw < 10, "shown while λ is 0, too"


def test_agreement_is_held_between_measurements(run: Run) -> None:
    for term in ("cross_modal", "in_modal"):
        by_epoch = np.array(list(run.scalars[f"{term}_tau"].values())).reshape(EPOCHS, STEPS)
        assert (abs(by_epoch) <= 1).all()
        assert (by_epoch[:, :EVERY] == by_epoch[:, :1]).all()
        measured = by_epoch[:, [0, EVERY]]
        assert len(np.unique(measured)) == measured.size


def test_tensorboard_and_wandb_have_a_chart_of_every_epoch(runs: Runs, run: Run, trainer: Trainer) -> None:
    charts = run.images["train/agreement"]
    assert list(charts) == [epoch * STEPS for epoch in range(EPOCHS)]
    assert len(set(charts.values())) == EPOCHS
    for chart in charts.values():
        assert min(Image.open(io.BytesIO(chart)).size) > 200
    (wandb,) = trainer.directory.glob("wandb/offline-run-*/run-agreement.wandb")
    paths = wandb_scalars(trainer.directory, "agreement")["train/agreement/path"]
    assert list(paths) == list(charts)
    assert len(set(paths.values())) == EPOCHS
    assert all((wandb.parent / "files" / str(path)).is_file() for path in paths.values())
    assert not runs["--loss rankclip"].images


def test_run_does_not_depend_on_what_it_logs(runs: Runs, run: Run) -> None:
    for epoch in range(1, EPOCHS + 1):
        with_, without = run.epoch(epoch), runs["--loss rankclip"].epoch(epoch)
        assert with_.keys() == without.keys()
        assert all(torch.equal(value, without[name]) for name, value in with_.items())


# --- the loss alone ---


def features(n: int = 7, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rows = normalize(torch.randn(2, n, 5, generator=generator, dtype=torch.float64), dim=-1).float()
    scale = torch.tensor(8.0, requires_grad=True)
    image_features, text_features = (x.clone().requires_grad_() for x in rows)
    return {"image_features": image_features, "text_features": text_features, "logit_scale": scale}


def trainer_loss(*, unit: str = "epoch", agreement_every: int | None = None, **options: Any) -> TrainerLoss:
    options = {"schedule": "linear", **options}
    return TrainerLoss(RankClipLoss(**options), unit=unit, evaluate=RankClipLog(agreement_every))


def at(epoch: int, *, accum_freq: int = 1) -> Position:
    return Position(epoch=epoch, epochs=3, steps=4, accum_freq=accum_freq)


@pytest.mark.parametrize("epoch", [0, 1, 2])  # λ = 0, ½, 1
@pytest.mark.parametrize("options", [{}, {"lambda_cross": 0.3, "lambda_in": 4.0}, {"worth": "shifted"}])
def test_raw_terms_are_those_of_rank_consistency(epoch: int, options: dict[str, Any]) -> None:
    loss = trainer_loss(**options)
    loss.start_epoch(at(epoch))
    inputs = features()
    shown = loss(**inputs, output_dict=True)
    with torch.no_grad():
        raw = RankConsistency(worth=options.get("worth", "exp"))(**inputs, output_dict=True)
    for term in ("cross_modal", "in_modal"):
        torch.testing.assert_close(shown[f"{term}_raw"], raw[f"{term}_loss"], rtol=1e-6, atol=0)


@pytest.mark.parametrize("epoch", [0, 1])
def test_term_that_is_left_out_of_the_run_has_no_raw_value(epoch: int) -> None:
    loss = trainer_loss(lambda_cross=0.0)
    loss.start_epoch(at(epoch))
    assert list(loss(**features(), output_dict=True)) == [*TERMS, "rank_lambda", "in_modal_raw"]


@pytest.mark.parametrize("epoch", [0, 1])
def test_nothing_is_computed_for_a_run_without_rank_terms(
    epoch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss = trainer_loss(lambda_cross=0.0, lambda_in=0.0)
    loss.start_epoch(at(epoch))
    monkeypatch.setattr(RankConsistency, "forward", None)
    assert list(loss(**features(), output_dict=True)) == [*TERMS, "rank_lambda"]


@pytest.mark.parametrize("epoch", [0, 1])
def test_metrics_are_detached_and_leave_value_and_gradient_as_they_are(epoch: int) -> None:
    loss = trainer_loss(agreement_every=1)
    loss.start_epoch(at(epoch))
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


def test_random_ties_shown_at_lambda_zero_do_not_move_the_generator() -> None:
    loss = trainer_loss(ties="random")
    loss.start_epoch(at(0))
    before = torch.get_rng_state()
    assert loss(**features(), output_dict=True)["cross_modal_raw"] > 0
    assert torch.equal(torch.get_rng_state(), before)
    loss.start_epoch(at(1))
    loss(**features(), output_dict=True)
    assert not torch.equal(torch.get_rng_state(), before), "the control: training draws from it"


def mean_tau(a: Tensor, b: Tensor) -> float:
    return float(np.mean([kendalltau(x, y).statistic for x, y in zip(a.numpy(), b.numpy(), strict=True)]))


def test_agreement_is_kendalls_tau_of_the_step_s_first_call() -> None:
    loss = trainer_loss(agreement_every=2)
    loss.start_epoch(at(1, accum_freq=2))
    measured = []
    for call in range(8):
        inputs = features(seed=call)
        shown = loss(**inputs, output_dict=True)
        measured.append(shown["cross_modal_tau"].item())
        if call in (0, 4):  # the first calls of steps 0 and 2
            v, t = inputs["image_features"].detach().double(), inputs["text_features"].detach().double()
            assert shown["cross_modal_tau"].item() == pytest.approx(mean_tau(v @ t.T, t @ v.T), abs=1e-6)
            assert shown["in_modal_tau"].item() == pytest.approx(mean_tau(v @ v.T, t @ t.T), abs=1e-6)
    assert measured == [measured[0]] * 4 + [measured[4]] * 4
    assert measured[0] != measured[4]


def test_agreement_is_that_of_the_batch_of_all_processes(pools: Pools) -> None:
    whole = {name: x.detach() for name, x in features(8).items()}
    v, t = whole["image_features"].double(), whole["text_features"].double()
    expected = {"cross_modal_tau": mean_tau(v @ t.T, t @ v.T), "in_modal_tau": mean_tau(v @ v.T, t @ t.T)}
    pools[2].run(check_agreement, whole, expected)


# --- charts ---


def charted_loss(*trackers: Callable[..., None]) -> tuple[TrainerLoss, AgreementCharts]:
    loss, charts = trainer_loss(agreement_every=2), AgreementCharts(trackers)
    loss.evaluate.charts = charts
    loss.start_epoch(at(1))
    return loss, charts


def test_a_chart_shows_the_first_pair_s_rankings_once_it_is_due() -> None:
    pytest.importorskip("matplotlib")
    stored: list[tuple[str, Any, int]] = []
    loss, charts = charted_loss(lambda *chart: stored.append(chart))
    loss(**features())
    assert not stored
    charts.due(9, "epoch 2")
    loss(**features())  # of a step at which nothing is measured
    assert not stored
    inputs = features(seed=3)
    for _ in range(3):
        loss(**inputs)
    ((name, figure, step),) = stored
    assert (name, step) == ("train/agreement", 9)
    v, t = inputs["image_features"].detach().numpy(), inputs["text_features"].detach().numpy()
    tau = kendalltau(t @ v[0], v @ t[0]).statistic
    assert figure.axes[0].get_title() == f"epoch 2\nKendall τ = {tau:.3f}"
    assert {f"pair {i}" for i in range(1, 8)} <= {
        text.get_text().rpartition("  ")[0] for text in figure.axes[0].texts
    }


def test_of_a_large_batch_the_first_pairs_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    plots = pytest.importorskip("rankloss.plots")
    shown: list[tuple[int, ...]] = []
    monkeypatch.setattr(
        plots, "slope_chart", lambda v, t, labels, **_: shown.append((len(v), len(t), len(labels)))
    )
    charts = AgreementCharts([lambda *_: None])
    charts.due(0, "")
    charts.draw(torch.eye(1500), torch.eye(1500))
    assert shown == [(1024, 1024, 1024)]


def test_without_matplotlib_one_warning_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "rankloss.plots", raising=False)
    monkeypatch.delattr("rankloss.plots", raising=False)
    loss, charts = charted_loss(lambda *_: pytest.fail("nothing can be stored"))
    with caplog.at_level(logging.WARNING):
        for epoch in range(3):
            charts.due(epoch, "")
            for _ in range(2):
                shown = loss(**features(), output_dict=True)
    assert [record.message for record in caplog.records] == [
        "The rank agreement is logged without a chart, which needs matplotlib: pip install 'rankloss[plots]'"
    ]
    assert abs(shown["cross_modal_tau"]) <= 1


def test_a_tracker_that_fails_ends_the_charts_and_not_the_training(caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("matplotlib")

    def full(*_: Any) -> None:
        raise OSError("disk full")

    loss, charts = charted_loss(full)
    inputs, alone = features(), features()
    for epoch in range(3):
        charts.due(epoch, "")
        loss(**inputs).backward()
        loss.criterion(**alone).backward()
        loss(**features())
    assert [record.message for record in caplog.records] == [
        "No more charts of the rank agreement: disk full"
    ]
    assert all(torch.equal(value.grad, alone[name].grad) for name, value in inputs.items())


@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
def test_features_that_are_not_finite_have_a_chart(broken: float, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("matplotlib")
    stored: list[Any] = []
    charts = AgreementCharts([lambda _, figure, __: stored.append(figure)])
    charts.due(0, "")
    charts.draw(torch.full((4, 3), broken), torch.eye(4, 3))
    assert not caplog.records
    assert "no ranking" in stored[0].axes[0].get_title()
