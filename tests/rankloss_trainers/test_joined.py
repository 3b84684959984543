"""Losses joined by +: their options, their folder, and the joins that are refused."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch
from taught import ROWS, features, folder
from torch.nn.functional import normalize

import rankloss_trainers
from rankloss import ClipLoss, Gather, MimicryLoss, RankClipLoss
from rankloss.losses import TEACHER
from rankloss_baselines import CyClipLoss
from rankloss_trainers.catalog import choose, load
from rankloss_trainers.command_line import LossArguments, described, mentioned

ALONE = Gather(rank=0, world_size=1)


def reason(name: str, given: Any) -> str | None:
    try:
        choose(name, given).build(ClipLoss(gather=False), ALONE)
    except ValueError as error:
        return str(error)
    return None


def test_the_terms_are_those_of_each_loss_and_the_base_is_one() -> None:
    v, t, *teacher = normalize(torch.randn(4, 6, 4, generator=torch.Generator().manual_seed(0)), dim=-1)
    taught = dict(zip(TEACHER, teacher, strict=True))
    loss = rankloss_trainers.create(
        "rankclip-distill+mimicry+cyclip",
        **{"rankclip-distill": {"schedule": "constant", "top_k": 3}},
        mimicry={"weight": 0.5},
        cyclip={"lambda_in": 2.0},
    )
    ranks = RankClipLoss(schedule="constant", lambda_cross=16, lambda_in=16, top_k=3)
    expected = {
        **ranks(v, t, 9.0, output_dict=True, **taught),
        **MimicryLoss(weight=0.5)(v, t, 9.0, output_dict=True, **taught),
        **CyClipLoss(lambda_in=2.0)(v, t, 9.0, output_dict=True),
    }
    actual = loss(v, t, 9.0, output_dict=True, **taught)
    assert actual.keys() == expected.keys()
    torch.testing.assert_close(list(actual.values()), list(expected.values()))
    assert [type(x) for x in loss.modules()].count(ClipLoss) == 1


@pytest.mark.parametrize(
    ("name", "options", "part", "key", "value"),
    [
        ("rankclip+mimicry", {"mimicry": {"weight": 2}}, 1, "weight", 2.0),
        ("rankclip+mimicry", {"mimicry": {"weight": "2"}}, 1, "weight", 2.0),
        ("rankclip-distill+cyclip", {}, 0, "top_k", 8),
        ("rankclip-distill+mimicry", {}, 0, "top_k", 4),
        ("rankclip-distill+mimicry", {"rankclip-distill": {"top_k": 8}}, 0, "top_k", 8),
        ("mimicry+rankclip-distill", {}, 0, "weight", 16.0),
        ("mimicry+rankclip", {}, 0, "weight", 8.0),
        ("rankclip+cyclip", {"cyclip": {"lambda_in": 2}}, 1, "lambda_in", 2.0),
    ],
)
def test_options_are_given_by_loss(
    name: str, options: dict[str, Any], part: int, key: str, value: Any
) -> None:
    assert getattr(choose(name, options).parts[part], key) == value


@pytest.mark.parametrize("name", ["rankclip", "mimicry"])
def test_a_folder_is_given_once_and_serves_all(name: str) -> None:
    given = {name: {"reference_features": "FOLDER"}}
    chosen = choose("rankclip+mimicry", given)
    assert [part.reference_features for part in chosen.parts] == ["FOLDER", "FOLDER"]
    assert reason("rankclip+mimicry", given) is None
    given["rankclip"] = {**given.get("rankclip", {}), "bins": 9}
    assert str(reason("rankclip+mimicry", given)).startswith("rankclip.bins: bins=9 needs method='bin'")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("rankclip+cyclip", {"lambda_in": 1}, "given by loss, .*; got 'lambda_in'"),
        ("rankclip+mimicry", {"mimicry": {"weigt": 1}}, "has no option 'weigt'; did you mean weight"),
        (
            "rankclip-distill+mimicry",
            {"rankclip-distill": {"distill_loss": "include"}},
            "rankclip-distill.distill_loss: include has no effect beside mimicry",
        ),
        ("rankclip+mimicry", {"mimicry": {"weight": -1}}, "mimicry.weight must be a finite number"),
        ("rankclip+rankclip", {}, "names a loss twice"),
        ("rankclip+rankclip-in", {}, "names a loss twice"),
        ("clip+mimicry", {}, "got 'clip'"),
        ("mimicry+rankclp", {}, "got 'rankclp'; did you mean rankclip"),
        ("mimicry+", {}, "got ''"),
        ("mimicry+alip", {"alip": {"caption_key": "x"}}, "alip stands on no other loss .*: name it first"),
        ("clip-streamed+siglip-streamed", {}, "siglip-streamed|this is ClipLoss"),
        (
            "rankclip+mimicry",
            {"rankclip": {"reference": "own"}},
            "mimicry needs a teacher, which rankclip is told not to",
        ),
        (
            "rankclip+mimicry",
            {"rankclip": {"reference_features": "A"}, "mimicry": {"reference_features": "B"}},
            "A and B are two teachers",
        ),
    ],
)
def test_what_cannot_be_joined_is_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        raise ValueError(reason(name, options))


def test_two_encoders_rank_the_in_modal_lists_alone(tmp_path: Path) -> None:
    columns = {name: [f"{name} {i}" for i in range(ROWS)] for name in ("image", "text")}
    data = pytest.importorskip("datasets").Dataset.from_dict(columns)
    path = folder(tmp_path / "x", data, features(), "image", "text", "separate")
    loss, encoders = load("rankclip-distill"), load("rankclip-encoders")
    for loss_, given in ((loss, {}), (loss, {"lambda_cross": 0}), (encoders, {})):
        chosen = loss_.of({"reference_features": path, **given})
        assert (chosen.lambda_cross, chosen.lambda_in, chosen.model) == (0, 16, "top_one")
        assert (chosen.schedule, chosen.reference_scale, chosen.diagonal) == ("constant", 40, False)
    chosen = loss.of({"reference_features": path, "lambda_in": 3.0, "reference_scale": 20.0})
    assert (chosen.lambda_cross, chosen.lambda_in, chosen.reference_scale) == (0, 3, 20)
    with pytest.raises(ValueError, match=r"model='top_one' needs top_k=None; got top_k=4 \(a default where"):
        loss.of({"reference_features": path, "top_k": 4})
    one = folder(tmp_path / "one", data, features(), "image", "text")
    with pytest.raises(ValueError, match=f"reference_features must be of encoders; .*; got {one}"):
        encoders.of({"reference_features": one})
    with pytest.raises(ValueError, match=r"lambda_cross must be 0, as .*separate spaces.*; got 1"):
        loss.of({"reference_features": path, "lambda_cross": 1})
    parts = choose("cyclip+rankclip", {"rankclip": {"reference_features": path}}).parts
    assert [part.lambda_cross for part in parts] == [0.25, 0]


# --- on a command line ------------------------------------------------------------------------------------


def parsed(*argv: str) -> Any:
    parser = argparse.ArgumentParser(exit_on_error=False)
    losses = LossArguments(parser, mentioned(argv))
    return losses.chosen(parser.parse_args(argv))


def test_each_loss_is_typed_with_its_own_options() -> None:
    name = "rankclip-distill+mimicry"
    for flags in (("--loss", name), (f"--loss={name}",)):
        found = parsed(*flags, "--rankclip-top-k", "4", "--mimicry-weight", "2")
        assert found.name == name
        assert (found.parts[0].top_k, found.parts[1].weight) == (4, 2.0)
    with pytest.raises(ValueError, match=r"^--cyclip-lambda-in: only with --loss cyclip"):
        parsed("--loss", name, "--cyclip-lambda-in", "1")
    with pytest.raises(ValueError, match=r"^--loss: loss must be one of .*did you mean mimicry"):
        parsed("--loss", "rankclip+mimcry")


def test_the_options_of_joined_losses_are_listed() -> None:
    text = described([load("rankclip"), load("mimicry")])
    assert "--rankclip-top-k N" in text
    assert "--mimicry-weight X" in text
