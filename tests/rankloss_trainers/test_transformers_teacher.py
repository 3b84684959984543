"""A teacher's features as columns of the batch, in Hugging Face's Trainer."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

if importlib.util.find_spec("transformers") is None or importlib.util.find_spec("accelerate") is None:
    pytest.skip("transformers or accelerate is not installed", allow_module_level=True)

from tiny_transformers import Pairs, Taught, clip, siglip, steps, train, weights

import rankloss
from rankloss import reference, schedules

ONE_STEP = {"optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 0, "max_steps": 1}


@pytest.mark.parametrize(
    ("modalities", "given", "expected"),
    [
        (
            ("image", "text"),
            {"loss": "rankclip", "loss_options": {"reference": "teacher", "schedule": "constant"}},
            {},
        ),
        (
            ("image", "text"),
            {"loss": "rankclip-distill", "loss_options": {"schedule": "constant"}},
            {"lambda_cross": 64.0, "lambda_in": 64.0, "top_k": 8},
        ),
        (
            ("text",),
            {
                "loss": "rankclip-distill",
                "loss_options": {"schedule": "constant", "lambda_cross": 0.0, "lambda_in": 2.0},
            },
            {"lambda_cross": 0.0, "lambda_in": 2.0, "top_k": 8},
        ),
    ],
)
def test_first_step_is_the_step_of_an_own_loop(
    tmp_path: Path, modalities: tuple[str, ...], given: Any, expected: Any
) -> None:
    pairs = Taught(*modalities)
    trainer = train(tmp_path, pairs=pairs, per_device_train_batch_size=16, **given, **ONE_STEP)
    batch = [pairs[i] for i in range(16)]  # more than the best eight
    inputs = {name: torch.stack([pair[name] for pair in batch]) for name in batch[0]}
    teacher = {name: inputs.pop(name) for name in pairs.features}
    model = clip()
    output = model(**inputs)
    features = {"image_features": output.image_embeds, "text_features": output.text_embeds}
    loss = rankloss.RankClipLoss(schedule="constant", **expected)
    loss(**features, logit_scale=model.logit_scale.exp(), **teacher).backward()
    torch.optim.SGD(model.parameters(), lr=1e-2).step()
    taken = torch.cat([p.detach().flatten() for p in model.parameters()])
    torch.testing.assert_close(weights(trainer), taken, rtol=1e-5, atol=1e-7)
    (line,) = steps(trainer)
    arrays = {name: x.detach().double().numpy() for name, x in {**features, **teacher}.items()}
    scale, top_k = clip().logit_scale.exp().item(), expected.get("top_k")
    value = reference.in_modal(**arrays, logit_scale=scale, top_k=top_k)
    assert line["in_modal_raw"] == pytest.approx(value, rel=1e-5)


def test_a_module_of_ones_own_takes_the_columns(tmp_path: Path) -> None:
    given = {"optim": "sgd", "max_steps": 1}
    lines = []
    for pairs in (Taught("image", "text"), Pairs()):
        loss = rankloss.RankClipLoss(schedule="constant")
        lines += steps(train(tmp_path, pairs=pairs, loss=loss, **given))
    by_teacher, own = lines
    assert by_teacher["contrastive_loss"] == own["contrastive_loss"]
    assert abs(by_teacher["in_modal_raw"] / own["in_modal_raw"] - 1) > 1e-3


@pytest.mark.parametrize("loss", ["rankclip-distill", rankloss.RankClipLoss(schedule="linear")])
def test_columns_of_the_teacher_are_not_dropped_as_unused(tmp_path: Path, loss: Any) -> None:
    given = {"pairs": Taught("image", "text"), "loss": loss, "max_steps": 2}
    kept, dropping = (steps(train(tmp_path, remove_unused_columns=drops, **given)) for drops in (False, True))
    assert [line["in_modal_raw"] for line in dropping] == [line["in_modal_raw"] for line in kept]


def test_evaluation_does_without_the_teacher(tmp_path: Path) -> None:
    pairs = Taught("image", "text")
    for model in (clip(), siglip()):
        trainer = train(
            tmp_path, model=model, pairs=pairs, loss="rankclip-distill", max_steps=2, eval_dataset=pairs
        )
        assert [line["rank_lambda"] for line in steps(trainer)] == [schedules.rankclip(i, 2) for i in (1, 2)]
        assert trainer.evaluate()["eval_loss"] == trainer.evaluate(Pairs())["eval_loss"]


@pytest.mark.parametrize(
    ("modalities", "given", "message"),
    [
        (
            (),
            {"loss": "rankclip-distill"},
            "rankclip-distill ranks by a teacher, but the batch has none of the columns "
            "reference_image_features, reference_text_features, got pixel_values, input_ids, attention_mask",
        ),
        (
            ("text",),
            {"loss": "rankclip"},
            "the batch has reference_text_features, but rankclip does not rank by a teacher: set its option "
            "reference to 'teacher'",
        ),
        (("image",), {"loss": "rankclip-distill"}, "got reference_image_features alone"),
    ],
)
def test_batch_without_what_is_ranked_by_is_an_error(
    tmp_path: Path, modalities: tuple[str, ...], given: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        train(tmp_path, pairs=Taught(*modalities), **given)
