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
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from teacher_features import unit_rows
from torch import Tensor, nn
from trainer_runs import PLUGIN_OFF, RANKCLIP_OFFICIAL, STEPS, Run, Trainer, assert_equal_training

import batches
import rankloss_open_clip
from rankloss import reference, schedules
from rankloss_open_clip import __main__ as runner
from rankloss_open_clip.arguments import chosen
from rankloss_open_clip.trainer_loss import TrainerLoss
from rankloss_open_clip.training import build_loss, start
from registered import TINY_PACKAGE
from stored_features import features_folder

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


@pytest.mark.parametrize("attached", ["once", "twice"])
def test_fork_that_calls_by_position_gets_a_scalar_in_which_lambda_grows(fork: Any, attached: str) -> None:
    rankloss_open_clip.attach(fork)
    if attached == "twice":
        rankloss_open_clip.attach(fork)
    args = fork.parse_args(["--loss", "rankclip", "--rankclip-schedule", "linear"])
    loss = fork.create_loss(args)
    assert isinstance(loss, TrainerLoss)
    values = [fork.train_one_epoch(None, DATA, loss, epoch, args) for epoch in range(4)]
    assert values[0] == pytest.approx(fork.ClipLoss()(*fork.FEATURES, 8.0).item())  # λ is 0
    # The features are the same in each epoch, so the value grows as λ does: by equal steps.
    increases = [after - before for before, after in itertools.pairwise(values)]
    first, second, third = increases
    assert (second, third) == pytest.approx((first, first), rel=1e-4)
    assert first > 0.01, "three increases of 0 would be equal, too"


def test_fork_without_a_loss_has_its_own_arguments_and_loss(fork: Any) -> None:
    rankloss_open_clip.attach(fork)
    args = fork.parse_args(["--epochs", "2"])
    assert vars(args) == {"model": "ViT-B-32", "epochs": 2}
    assert type(fork.create_loss(args)) is fork.ClipLoss


@pytest.mark.parametrize(
    ("name", "definition"),
    [
        pytest.param("create_loss", "create_loss = None", id="create_loss is no function"),
        pytest.param("parse_args", "parse_args = None", id="parse_args is no function"),
        pytest.param("train_one_epoch", "train_one_epoch = None", id="train_one_epoch is no function"),
        pytest.param("create_loss", "def create_loss(options): pass", id="create_loss has other parameters"),
        pytest.param(
            "train_one_epoch",
            "def train_one_epoch(loader, args): pass",
            id="train_one_epoch has other parameters",
        ),
    ],
)
def test_trainer_of_another_layout_is_not_patched(fork: Any, name: str, definition: str) -> None:
    exec(definition, vars(fork))
    before = dict(vars(fork))
    with pytest.raises((TypeError, AttributeError), match=f"fork.*{name}"):
        rankloss_open_clip.attach(fork)
    assert vars(fork) == before


def test_trainer_whose_data_are_read_in_another_way_is_not_patched(fork: Any) -> None:
    """The functions that read them are in the module of ``get_data``, here another than the main one."""
    module_of_data = ModuleType("module_of_data")
    exec("def get_data(args): pass\ndef get_csv_dataset(path): pass", vars(module_of_data))
    fork.get_data = vars(module_of_data)["get_data"]
    before = [dict(vars(module)) for module in (fork, module_of_data)]
    with pytest.raises(TypeError, match=r"get_csv_dataset has unknown parameters: \(path\)"):
        rankloss_open_clip.attach(fork)
    assert [vars(fork), vars(module_of_data)] == before


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
    """A trainer's ``main`` takes them as a list, or reads ``sys.argv``."""
    received: list[Any] = []

    def takes_a_list(argv: list[str]) -> None:
        received.append((argv, sys.argv))

    def reads_sys_argv() -> None:
        received.append(sys.argv)

    for main in (takes_a_list, reads_sys_argv):
        fork.main = main
        monkeypatch.setattr(sys, "argv", ["rankloss_open_clip", "--trainer", "fork", "--epochs", "1"])
        runner.main()
    whole = [fork.__file__, "--epochs", "1"]
    assert received == [(["--epochs", "1"], whole), whole]


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


TOP_K, SCALE = 4, 10.0


def arguments(**options: Any) -> Namespace:
    """The arguments of the patched trainer, whose data hold a teacher's features; rankclip by default."""
    of_loss = {"loss": "rankclip", "rankclip_schedule": "constant", "rankclip_top_k": TOP_K, **options}
    return Namespace(dataset_reinforcement=True, epochs=2, device="cpu", **of_loss)


def entries_of(**options: str) -> dict[str, Tensor]:
    """The entries of a loss that is built on the patch's own, for a batch with the teacher's features."""
    loss = build_loss(DRClipLoss(), arguments(**options), sums_every_value=True)
    loss.start_epoch(0, 2, 1, 1)  # the first of two epochs, each of one batch
    scale = torch.tensor(SCALE)
    return loss(**STUDENT, logit_scale=scale, **TEACHER, **SYNTHETIC, output_dict=True)


# The same features as rankloss.reference takes them.
STUDENT_ARRAYS = {name: x.double().numpy() for name, x in STUDENT.items()}
TEACHER_ARRAYS = {f"reference_{name.removeprefix('dist_')}": x.numpy() for name, x in TEACHER.items()}


@pytest.mark.parametrize("options", [{"loss_teacher": "given"}, {"loss": "rankclip-distill"}])
def test_a_loss_that_learns_from_the_teacher_takes_the_place_of_the_distillation(
    options: dict[str, str],
) -> None:
    """Its base is CLIP's loss, and the teacher ranks, as in ``rankloss.reference``."""
    entries = entries_of(**options)
    assert "distill_loss" not in entries  # which DRClipLoss has
    contrastive = reference.clip(**STUDENT_ARRAYS, logit_scale=SCALE)
    assert entries["contrastive_loss"].item() == pytest.approx(contrastive)
    ranked = reference.cross_modal(**STUDENT_ARRAYS, logit_scale=SCALE, **TEACHER_ARRAYS, top_k=TOP_K)
    assert entries["cross_modal_raw"].item() == pytest.approx(ranked, rel=1e-5)


def test_a_loss_without_a_teacher_stands_beside_the_distillation() -> None:
    """Which stays as it is; the rank term is ``rankloss.reference``'s, by the student's own ranks."""
    entries = entries_of()
    assert entries["distill_loss"] == sum(features.sum() for features in TEACHER.values())  # of DRClipLoss
    ranked = reference.cross_modal(**STUDENT_ARRAYS, logit_scale=SCALE, top_k=TOP_K)
    assert entries["cross_modal_raw"].item() == pytest.approx(ranked, rel=1e-5)


def test_a_loss_that_needs_a_teacher_is_content_with_that_of_the_data() -> None:
    args = arguments(loss="rankclip-distill")
    teaching = start(args, chosen(args)).teaching
    assert (teaching.use, teaching.features) == ("required", None)  # no folder is read beside the data


def test_a_folder_beside_the_teacher_of_the_data_is_refused(tmp_path: Path) -> None:
    args = arguments(loss="rankclip-distill")
    args.loss_teacher = features_folder(tmp_path / "x", text_features=unit_rows(4, 2))
    with pytest.raises(ValueError, match=r"--loss-teacher: .*--dataset-reinforcement"):
        start(args, chosen(args))


# --- the former releases themselves ---------------------------------------------------------------------


@pytest.fixture(scope="module", params=["2.16.1", "2.24.0"])
def release(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A release of open_clip_torch, and the PYTHONPATH that has it before the installed one.

    The losses of the tests are on it, too: a fresh interpreter has none of pytest's paths.
    """
    directory = str(tmp_path_factory.mktemp("release"))
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", directory]
    subprocess.run([*pip, f"open_clip_torch=={request.param}"], check=True, timeout=300)
    folders = [directory, str(TINY_PACKAGE), os.environ.get("PYTHONPATH")]
    return request.param, os.pathsep.join(filter(None, folders))


def run_release(trainer: Trainer, release: tuple[str, str], name: str, module: str, *options: str) -> Run:
    """Two epochs of a release's trainer.

    ``module`` is what ``python -m`` starts, and the words behind it, as on a command line.
    """
    version, python_path = release
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
    device = arguments.index("--device")
    del arguments[device : device + 2]  # the option and its value: such releases take what there is
    return trainer.python("-c", script, *arguments, name=name, PYTHONPATH=python_path, **PLUGIN_OFF)


ATTACHED = "rankloss_open_clip --trainer training.main"


@pytest.fixture(scope="module")
def run_of_release(trainer: Trainer, release: tuple[str, str]) -> Run:
    """Two epochs of rankclip, of which the first has λ = 0."""
    return run_release(trainer, release, "rankclip", ATTACHED, *RANKCLIP_OFFICIAL)


@pytest.mark.slow
def test_former_release_trains_as_without_a_loss_while_lambda_is_0(
    trainer: Trainer, release: tuple[str, str], run_of_release: Run
) -> None:
    stock = run_release(trainer, release, "stock", "training.main")
    number = np.float64(0)  # such releases save the learning rate as NumPy's number
    kinds_in_a_checkpoint = [number.__reduce__()[0], np.dtype, type(number.dtype)]
    with torch.serialization.safe_globals(kinds_in_a_checkpoint):
        assert_equal_training(stock, run_of_release, epochs=(1,))
        # In the second epoch λ is above 0.
        assert not torch.equal(
            stock.tensors_after_epoch(2)["visual.proj"], run_of_release.tensors_after_epoch(2)["visual.proj"]
        )


@pytest.mark.slow
def test_former_release_is_named_and_follows_the_schedule(
    release: tuple[str, str], run_of_release: Run
) -> None:
    assert f"open_clip {release[0]}" in run_of_release.log
    expected = {step: schedules.official(step // STEPS + 1, 2) for step in range(2 * STEPS)}
    assert run_of_release.scalars["rank_lambda"] == expected


@pytest.mark.slow
def test_former_release_trains_with_a_column_and_accumulation(
    trainer: Trainer, release: tuple[str, str]
) -> None:
    captions = ["--loss", "tiny-caption", "--second-caption-key", "synthetic", "--accum-freq", "2"]
    run = run_release(trainer, release, "captions", ATTACHED, *captions)
    assert len(run.scalars["loss"]) == STEPS  # two epochs of half as many steps
