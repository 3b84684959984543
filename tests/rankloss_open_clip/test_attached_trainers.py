"""Trainers that are laid out like open_clip's before 2.26: ``attach()``, and the runner's ``--trainer``."""

from __future__ import annotations

import functools
import importlib
import itertools
import json
import os
import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from teacher_features import unit_rows
from torch import Tensor, nn
from trainer_runs import OFF, OFFICIAL, STEPS, Run, Trainer, assert_equal_training

import batches
import rankloss_open_clip
from rankloss import reference, schedules
from rankloss_open_clip import __main__ as runner
from rankloss_open_clip.arguments import chosen
from rankloss_open_clip.trainer_loss import TrainerLoss
from rankloss_open_clip.training import build_loss, start
from stored_features import stored

FORK = """
import argparse, torch
from torch.nn.functional import cross_entropy

FEATURES = torch.eye(4), torch.eye(4)[[1, 0, 3, 2]]

class ClipLoss(torch.nn.Module):
    def forward(self, image_features, text_features, logit_scale, output_dict=False):
        logits = logit_scale * image_features @ text_features.T
        loss = cross_entropy(logits, torch.arange(len(logits)))
        return {"contrastive_loss": loss} if output_dict else loss

def create_loss(args):
    return ClipLoss()

def parse_args(args):
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="ViT-B-32")
    parser.add_argument("--epochs", type=int, default=4)
    return parser.parse_args(args)

def train_one_epoch(model, data, loss, epoch, args, optimizer=None):  # by position, for a scalar
    return loss(*FEATURES, torch.tensor(8.0)).item()
"""


DATA = {"train": SimpleNamespace(dataloader=SimpleNamespace(num_batches=1))}


@pytest.fixture
def fork(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A fork of one file."""
    (tmp_path / "fork.py").write_text(FORK)
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("fork")
    del sys.modules["fork"]


def test_fork_that_calls_by_position_gets_a_scalar_and_without_a_loss_its_own(fork: Any) -> None:
    rankloss_open_clip.attach(fork)
    rankloss_open_clip.attach(fork)  # a second time changes nothing
    args = fork.parse_args(["--loss", "rankclip", "--rankclip-schedule", "linear"])
    loss = fork.create_loss(args)
    assert isinstance(loss, TrainerLoss)
    values = [fork.train_one_epoch(None, DATA, loss, epoch, args) for epoch in range(4)]
    assert values[0] == pytest.approx(fork.ClipLoss()(*fork.FEATURES, 8.0).item())
    steps = [b - a for a, b in itertools.pairwise(values)]
    assert steps == pytest.approx([steps[0]] * 3, rel=1e-4), "λ grows linearly"
    assert steps[0] > 0.01
    without = fork.parse_args(["--epochs", "2"])
    assert vars(without) == {"model": "ViT-B-32", "epochs": 2}
    assert type(fork.create_loss(without)) is fork.ClipLoss


@pytest.mark.parametrize(
    ("name", "other"),
    [
        *((name, None) for name in ("create_loss", "parse_args", "train_one_epoch")),
        ("create_loss", "def create_loss(options): pass"),
        ("train_one_epoch", "def train_one_epoch(loader, args): pass"),
    ],
)
def test_trainer_of_another_layout_is_not_patched(fork: Any, name: str, other: str | None) -> None:
    exec(other or f"{name} = None", vars(fork))
    before = dict(vars(fork))
    with pytest.raises((TypeError, AttributeError), match=f"fork.*{name}"):
        rankloss_open_clip.attach(fork)
    assert vars(fork) == before


@pytest.mark.parametrize(
    ("options", "needed"),
    [
        ("tiny-caption --second-caption-key synthetic", "caption_features"),
        ("ranked-lists", "query_features"),
    ],
)
def test_loss_whose_data_are_read_by_nobody_is_an_error(fork: Any, options: str, needed: str) -> None:
    rankloss_open_clip.attach(fork)
    args = fork.parse_args(["--loss", *options.split()])
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)])
    with pytest.raises((TypeError, ValueError), match=needed):
        fork.train_one_epoch(None, DATA, fork.create_loss(args), 0, args, optimizer)


def test_runner_hands_on_the_arguments(monkeypatch: pytest.MonkeyPatch, fork: Any) -> None:
    seen: list[Any] = []
    for fork.main in (lambda argv: seen.append((argv, *sys.argv)), lambda: seen.append(sys.argv)):
        monkeypatch.setattr(sys, "argv", ["rankloss_open_clip", "--trainer", "fork", "--epochs", "1"])
        runner.main()
    assert seen == [(["--epochs", "1"], fork.__file__, "--epochs", "1"), [fork.__file__, "--epochs", "1"]]


# --- data that hold the features, as MobileCLIP's patched trainer reads them ----------------------------

ROWS = 12


class DRClipLoss(nn.Module):
    """The patch's own loss: it needs the teacher's features, and takes those of synthetic captions."""

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        dist_image_features: Tensor,
        dist_text_features: Tensor,
        syn_text_features: Tensor | None = None,
        dist_syn_text_features: Tensor | None = None,
        output_dict: bool = False,
    ) -> dict[str, Tensor]:
        assert output_dict
        distances = (image_features - text_features).square().sum()
        return {
            "contrastive_loss": distances,
            "distill_loss": dist_image_features.sum() + dist_text_features.sum(),
        }


unit = functools.partial(batches.unit, dtype=torch.float32)
STUDENT = {"image_features": unit(ROWS, 8, seed=0), "text_features": unit(ROWS, 8, seed=1)}
# Two teachers side by side.
TEACHER = {
    f"dist_{name}": torch.cat([unit(ROWS, 5, seed=seed), unit(ROWS, 4, seed=seed + 1)], 1)
    for name, seed in (("image_features", 2), ("text_features", 4))
}
SYNTHETIC = {
    "syn_text_features": unit(ROWS, 8, seed=6),
    "dist_syn_text_features": TEACHER["dist_text_features"],
}


def arguments(**options: Any) -> Namespace:
    given = {"loss": "rankclip", "rankclip_schedule": "constant", "rankclip_top_k": 4, **options}
    return Namespace(dataset_reinforcement=True, epochs=2, device="cpu", **given)


@pytest.mark.parametrize("options", [{"loss_teacher": "given"}, {}, {"loss": "rankclip-distill"}])
def test_a_loss_that_learns_from_the_teacher_takes_the_place_of_the_distillation(
    options: dict[str, str],
) -> None:
    """And its base is CLIP's loss."""
    loss = build_loss(DRClipLoss(), arguments(**options), sums_every_value=True)
    loss.start_epoch(0, 2, 1, 1)
    found = loss(**STUDENT, logit_scale=torch.tensor(10.0), **TEACHER, **SYNTHETIC, output_dict=True)
    students = {name: x.double().numpy() for name, x in STUDENT.items()}
    if options:
        assert "distill_loss" not in found
        assert found["contrastive_loss"].item() == pytest.approx(reference.clip(**students, logit_scale=10.0))
    else:
        assert found["distill_loss"] == sum(x.sum() for x in TEACHER.values())
    given = {f"reference_{name.removeprefix('dist_')}": x.numpy() for name, x in TEACHER.items()}
    taught = given if options else {}
    expected = reference.cross_modal(**students, logit_scale=10.0, **taught, top_k=4)
    assert found["cross_modal_raw"].item() == pytest.approx(expected, rel=1e-5)


def test_the_option_names_a_teacher(tmp_path: Path) -> None:
    args = arguments(loss="rankclip-distill")
    assert start(args, chosen(args)).teaching.use == "required"
    args.loss_teacher = stored(tmp_path / "x", text_features=unit_rows(4, 2))
    with pytest.raises(ValueError, match=r"--loss-teacher: .*--dataset-reinforcement"):
        start(args, chosen(args))


# --- the former releases themselves ---------------------------------------------------------------------


@pytest.fixture(scope="module", params=["2.16.1", "2.24.0"])
def release(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A release of open_clip_torch in a folder of its own, before the installed one on PYTHONPATH."""
    directory, wanted = str(tmp_path_factory.mktemp("release")), f"open_clip_torch=={request.param}"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", directory, wanted]
    subprocess.run(pip, check=True, timeout=300)
    return request.param, os.pathsep.join(filter(None, [directory, os.environ.get("PYTHONPATH")]))


def run_release(trainer: Trainer, release: tuple[str, str], name: str, module: str, *options: str) -> Run:
    version, path = release
    configs = trainer.directory / "former-configs"
    configs.mkdir(exist_ok=True)
    config = json.loads((trainer.directory / "tiny" / "open_clip_config.json").read_text())["model_cfg"]
    config["text_cfg"]["context_length"] = 77  # the tokenizer of 2.16 has no other
    (configs / "tiny-former.json").write_text(json.dumps(config))
    module, *words = module.split()
    script = (
        f"import open_clip, runpy, sys; open_clip.add_model_config({str(configs)!r})\n"
        f"sys.argv[1:1] = {words!r}; runpy.run_module({module!r}, run_name='__main__', alter_sys=True)"
    )
    name = f"{version} {name}"
    arguments = trainer.arguments(name, "--model", "tiny-former", "--epochs", "2", *options)
    at = arguments.index("--device")
    del arguments[at : at + 2]  # such releases take what there is
    return trainer.python("-c", script, *arguments, name=name, PYTHONPATH=path, **OFF)


@pytest.mark.slow
def test_former_release_trains(trainer: Trainer, release: tuple[str, str]) -> None:
    attached = "rankloss_open_clip --trainer training.main"
    stock = run_release(trainer, release, "stock", "training.main")
    run = run_release(trainer, release, "rankclip", attached, *OFFICIAL)
    assert f"open_clip {release[0]}" in run.log
    number = np.float64(0)  # such releases save the learning rate as NumPy's number
    kinds = [number.__reduce__()[0], np.dtype, type(number.dtype)]
    with torch.serialization.safe_globals(kinds):
        assert_equal_training(stock, run, epochs=(1,))  # at λ = 0
        assert not torch.equal(stock.epoch(2)["visual.proj"], run.epoch(2)["visual.proj"])
    expected = {step: schedules.official(step // STEPS + 1, 2) for step in range(2 * STEPS)}
    assert run.scalars["rank_lambda"] == expected
    captions = ["--loss", "tiny-caption", "--second-caption-key", "synthetic", "--accum-freq", "2"]
    assert len(run_release(trainer, release, "captions", attached, *captions).scalars["loss"]) == STEPS
