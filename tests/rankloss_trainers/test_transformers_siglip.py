"""Models with a bias are trained with the sigmoid loss."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

if importlib.util.find_spec("transformers") is None or importlib.util.find_spec("accelerate") is None:
    pytest.skip("transformers or accelerate is not installed", allow_module_level=True)

from tiny_transformers import Pairs, Patches, arguments, clip, siglip, siglip2, steps, train, weights

from rankloss_trainers.transformers import ContrastiveTrainer

BOTH = pytest.mark.parametrize(("build", "data"), [(siglip, Pairs), (siglip2, Patches)])


@BOTH
def test_base_is_the_models_own_loss(tmp_path: Path, build: Any, data: Any) -> None:
    pairs = data(16)
    trainer = train(tmp_path, model=build(), pairs=pairs, eval_dataset=pairs, eval_on_start=True)
    (first, *_) = [line for line in trainer.state.log_history if "eval_loss" in line]
    model, total = build().eval(), 0.0
    for start in (0, 8):
        batch = [pairs[i] for i in range(start, start + 8)]
        inputs = {name: torch.stack([pair[name] for pair in batch]) for name in batch[0]}
        with torch.no_grad():
            total += model(**inputs, return_loss=True).loss.item() / 2
    assert first["eval_loss"] == pytest.approx(total, rel=1e-5)
    assert steps(trainer)[-1]["cross_modal_loss"] > 0


@BOTH
def test_scale_and_bias_are_trained(tmp_path: Path, build: Any, data: Any) -> None:
    trainer = train(tmp_path, model=build(), pairs=data(), max_steps=2, optim="sgd", max_grad_norm=0)
    before = build()
    for name in ("logit_scale", "logit_bias"):
        assert not torch.equal(getattr(trainer.model, name), getattr(before, name)), name
    assert torch.isfinite(weights(trainer)).all()


def test_streamed_loss_is_the_models_own(tmp_path: Path) -> None:
    pairs = Pairs(8)
    batch = [pairs[i] for i in range(8)]
    inputs = {name: torch.stack([pair[name] for pair in batch]) for name in batch[0]}
    (line,) = steps(train(tmp_path, model=siglip(), pairs=pairs, loss="siglip-streamed", max_steps=1))
    own = siglip()(**inputs, return_loss=True).loss.item()
    assert line["contrastive_loss"] == pytest.approx(own, rel=1e-5)


def test_budget_is_that_of_the_base_too(tmp_path: Path) -> None:
    given = {"args": arguments(tmp_path), "loss_options": {"memory_budget": 5}}
    for model, base in ((clip(), "ClipLoss"), (siglip(), "SigLipLoss")):
        trainer = ContrastiveTrainer(model=model, **given)
        assert repr(trainer.driven_loss.criterion.base) == f"{base}(memory_budget=5)"
    pairs = Pairs(8)
    inputs = {name: torch.stack([pairs[i][name] for i in range(8)]) for name in pairs[0]}
    own = siglip().eval()(**inputs, return_loss=True).loss.item()
    assert trainer.evaluate(pairs)["eval_loss"] == pytest.approx(own, rel=1e-5)


def test_softmax_loss_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="alip does not work with a model that has a logit_bias"):
        ContrastiveTrainer(
            model=siglip(), args=arguments(tmp_path), loss="alip", loss_options={"caption_key": "caption"}
        )
