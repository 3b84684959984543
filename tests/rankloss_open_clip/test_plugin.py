"""The plug-in: how it gets in, what it leaves untouched, and what it says about itself."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import pickle
import re
import subprocess
import sys
import warnings
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import open_clip.factory
import open_clip_train.params
import open_clip_train.train
import pytest
from stand_ins import LossOfTrainer, begin_epoch, completed_args, random_features
from trainer_runs import Trainer

import rankloss_open_clip
from rankloss_open_clip import __main__ as runner
from rankloss_open_clip import bootstrap, patches

FUNCTIONS = [
    open_clip.factory.create_loss,
    open_clip_train.params.parse_args,
    open_clip_train.train.train_one_epoch,
]


# --- the way in -----------------------------------------------------------------------------------------


def test_attaching_twice_changes_nothing() -> None:
    importlib.import_module("open_clip_train.main")
    finders = list(sys.meta_path)  # of modules, among which an import hook would stand
    rankloss_open_clip.wait_for_trainer()
    assert sys.meta_path == finders
    patched = [
        open_clip.factory.create_loss,
        open_clip_train.params.parse_args,
        open_clip_train.train.train_one_epoch,
    ]
    assert patched == FUNCTIONS  # which were the patched ones when this file was imported
    assert bootstrap.problems() == []


def test_the_factorys_patched_function_is_that_of_the_package() -> None:
    assert open_clip.create_loss is open_clip.factory.create_loss


def test_a_command_line_without_a_loss_imports_no_loss_when_it_is_parsed() -> None:
    """Nor the runtime: of rankloss the process has the patches."""
    script = """
import sys
import torch  # which loads the plug-in, by its entry point
from open_clip_train.params import parse_args

parse_args(["--epochs", "1"])
print(*(name for name in sys.modules if name.startswith("rankloss")))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    imported = set(done.stdout.split())
    assert "rankloss_open_clip.patches" in imported
    assert not imported & {"rankloss", "rankloss_features", "rankloss_trainers.runtime"}


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_patched_function_keeps_source_signature_and_pickle(function: Any) -> None:
    original = inspect.unwrap(function)
    assert original is not function
    assert f"def {function.__name__}(" in inspect.getsource(function)
    assert inspect.signature(function) == inspect.signature(original)
    assert pickle.loads(pickle.dumps(function)) is function


# --- what goes wrong ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "source", "reason"),
    [
        pytest.param("open_clip.factory", "", "has none of create_loss, ", id="no such function"),
        pytest.param(
            "open_clip_train.train",
            "def train_one_epoch(trainer): pass",
            "train_one_epoch has unknown parameters: (trainer)",
            id="a function with other parameters",
        ),
    ],
)
def test_unknown_layout_is_kept_as_a_failure(
    monkeypatch: pytest.MonkeyPatch, name: str, source: str, reason: str
) -> None:
    monkeypatch.setattr(rankloss_open_clip, "failures", {})
    module = ModuleType(name)
    exec(source, vars(module))
    bootstrap.patch(module)
    assert reason in str(rankloss_open_clip.failures[name])
    assert name in bootstrap.problems()[0]


PATCHES, HOOK = "rankloss_open_clip.patches", "rankloss_trainers.import_hook"


def test_a_trainer_whose_patches_fail_refuses_nothing_but_a_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rankloss_open_clip, "failures", {})
    monkeypatch.setattr(rankloss_open_clip, "_reported", True)  # no warning
    monkeypatch.setitem(sys.modules, PATCHES, None)  # an import of it fails
    monkeypatch.delattr(PATCHES)
    params = ModuleType(bootstrap.PARAMS)
    vars(params)["parse_args"] = lambda argv: argv
    bootstrap.patch(params)
    for asks_for_loss in (["--loss", "rankclip"], ["--los=tiny"]):  # an abbreviation, which argparse takes
        with pytest.raises(ImportError, match=re.escape(PATCHES)):
            params.parse_args(asks_for_loss)
    option_of_trainer = ["--loss-dist-impl", "x"]
    assert params.parse_args(option_of_trainer) == option_of_trainer


def test_a_hook_that_fails_ends_the_command(trainer: Trainer, tmp_path: Path) -> None:
    """Python imports ``sitecustomize`` when it starts; here it makes an import of the hook fail."""
    (tmp_path / "sitecustomize.py").write_text(f"import sys; sys.modules[{HOOK!r}] = None")
    done = trainer.run("damaged", "--loss", "rankclip", code=1, PYTHONPATH=str(tmp_path))
    assert re.search(f"--loss .*{re.escape(HOOK)}", done.output, re.DOTALL)
    assert not done.directory.exists()


MAIN, RUNNER = "/x/open_clip_train/main.py", "C:\\x\\rankloss_open_clip\\__main__.py"


@pytest.fixture
def without_hook(monkeypatch: pytest.MonkeyPatch) -> None:
    """The import hook cannot be imported, and nothing has said so yet."""
    monkeypatch.setattr(rankloss_open_clip, "_reported", False)
    monkeypatch.setitem(sys.modules, HOOK, None)


@pytest.mark.usefixtures("without_hook")
@pytest.mark.parametrize("argv", [[MAIN, "--loss", "rankclip"], [RUNNER, "--epochs", "1", "--los=tiny"]])
def test_a_hook_that_cannot_be_loaded_ends_the_trainer_at_once(
    monkeypatch: pytest.MonkeyPatch, argv: list[str]
) -> None:
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit, match=HOOK):
        rankloss_open_clip.wait_for_trainer()


@pytest.mark.usefixtures("without_hook")
@pytest.mark.parametrize(
    "argv",
    [
        pytest.param([], id="no command"),
        pytest.param(["run_clip.py", "--loss", "rankclip"], id="another program"),
        pytest.param([MAIN, "--loss-dist-impl", "x"], id="the trainer without a loss"),
    ],
)
def test_a_hook_that_cannot_be_loaded_is_one_warning_elsewhere(
    monkeypatch: pytest.MonkeyPatch, argv: list[str]
) -> None:
    monkeypatch.setattr(sys, "argv", argv)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        rankloss_open_clip.wait_for_trainer()
        rankloss_open_clip.wait_for_trainer()
    (warning,) = caught  # of two calls
    assert HOOK in str(warning.message)


@pytest.mark.usefixtures("without_hook")
def test_warning_that_is_an_error_does_not_stop_an_import_of_torch() -> None:
    rankloss_open_clip.wait_for_trainer()  # warnings are errors in this suite
    assert rankloss_open_clip._reported


def test_missing_trainer_is_named_with_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "open_clip_train", None)
    monkeypatch.setattr(sys, "argv", ["rankloss_open_clip"])
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'rankloss\[open-clip\]'"):
        runner.main()


# --- what the patched functions do ------------------------------------------------------------------------


def arguments() -> Any:
    """The trainer's arguments of a training of three epochs, with λ by epochs."""
    words = ["--loss", "rankclip", "--epochs", "3", "--loss-schedule-unit", "epoch", "--device", "cpu"]
    return completed_args(open_clip_train.params.parse_args(words))


class TaskTrainer(NamedTuple):
    """The two modules of open_clip's later layout that have a patched function."""

    factory: Any
    train: Any


@pytest.fixture
def task_trainer() -> TaskTrainer:
    """A stand-in for open_clip's main branch: the factory builds a task, which holds the trainer's loss."""

    def create_task(args: Any, model: Any = None) -> Any:
        return SimpleNamespace(loss=LossOfTrainer(), trainable_module=model)

    factory, train = ModuleType("open_clip.factory"), ModuleType("open_clip_train.train")
    vars(factory)["create_task"] = create_task
    exec("def train_one_epoch(state, data, args, tb_writer=None): return state", vars(train))
    patches.patch(factory)
    patches.patch(train)
    return TaskTrainer(factory, train)


@pytest.fixture
def entries_of_second_epoch(task_trainer: TaskTrainer) -> Any:
    """The dict that the loss of a task returns after its second epoch of three began."""
    args = arguments()
    task = task_trainer.factory.create_task(args, model=None)
    state = SimpleNamespace(task=task, epoch=1, optimizer=None)
    data = {"train": SimpleNamespace(dataloader=SimpleNamespace(num_batches=4))}
    returned = task_trainer.train.train_one_epoch(state, data, args, tb_writer=None)
    assert returned is state
    return task.loss(**random_features(), output_dict=True)


def test_a_task_gets_a_plain_dict_of_terms_and_metrics(entries_of_second_epoch: Any) -> None:
    assert type(entries_of_second_epoch) is dict
    terms = ["contrastive_loss", "cross_modal_loss", "in_modal_loss"]
    assert list(entries_of_second_epoch) == [*terms, "rank_lambda", "cross_modal_raw", "in_modal_raw"]


def test_the_loss_of_a_task_is_told_its_epoch(entries_of_second_epoch: Any) -> None:
    lambda_ = entries_of_second_epoch["rank_lambda"]
    assert lambda_.item() == 2.0  # the schedule of the paper in the second of three epochs
    assert not lambda_.requires_grad


def test_a_task_without_a_loss_keeps_the_trainers(task_trainer: TaskTrainer) -> None:
    assert type(task_trainer.factory.create_task(SimpleNamespace(), model=None).loss) is LossOfTrainer


def test_an_epoch_with_the_trainers_own_loss_is_an_error_where_another_was_asked_for() -> None:
    message = "--loss rankclip was given, but the trainer trains with LossOfTrainer"
    with pytest.raises(RuntimeError, match=message):
        begin_epoch(LossOfTrainer(), 0, arguments())
