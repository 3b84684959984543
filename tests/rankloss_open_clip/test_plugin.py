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
from typing import Any

import open_clip.factory
import open_clip_train.params
import open_clip_train.train
import pytest
from stand_ins import Base, epoch_begins, features, ready
from torch import nn
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
    finders = list(sys.meta_path)
    rankloss_open_clip.wait_for_trainer()
    assert sys.meta_path == finders
    assert open_clip.create_loss is open_clip.factory.create_loss is FUNCTIONS[0]
    assert open_clip_train.params.parse_args is FUNCTIONS[1]
    assert open_clip_train.train.train_one_epoch is FUNCTIONS[2]
    assert bootstrap.problems() == []


def test_a_run_without_a_loss_imports_no_loss() -> None:
    """Nor the runtime: of rankloss it has the patches, and the names of losses."""
    script = (
        "from open_clip_train.params import parse_args; import torch, sys; parse_args(['--epochs', '1']);"
    )
    script += "print(*(name for name in sys.modules if name.startswith('rankloss')))"
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


def test_unknown_layout_is_kept_as_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, source, reason in (
        ("open_clip.factory", "", "create_loss"),
        ("open_clip_train.train", "def train_one_epoch(trainer): pass", "trainer"),
    ):
        monkeypatch.setattr(rankloss_open_clip, "failures", {})
        module = ModuleType(name)
        exec(source, vars(module))
        bootstrap.patch(module)
        assert reason in str(rankloss_open_clip.failures[name])
        assert name in bootstrap.problems()[0]


PATCHES, HOOK = "rankloss_open_clip.patches", "rankloss_trainers.import_hook"


def test_a_trainer_whose_patches_fail_refuses_a_loss_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rankloss_open_clip, "failures", {})
    monkeypatch.setattr(rankloss_open_clip, "_reported", True)
    monkeypatch.setitem(sys.modules, PATCHES, None)
    monkeypatch.delattr(PATCHES)
    params = ModuleType(bootstrap.PARAMS)
    vars(params)["parse_args"] = lambda argv: argv
    bootstrap.patch(params)
    for argv in (["--loss", "rankclip"], ["--los=tiny"]):
        with pytest.raises(ImportError, match=re.escape(PATCHES)):
            params.parse_args(argv)
    assert params.parse_args(["--loss-dist-impl", "x"]) == ["--loss-dist-impl", "x"]


def test_a_hook_that_fails_ends_the_command(trainer: Trainer, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(f"import sys; sys.modules[{HOOK!r}] = None")
    done = trainer.run("damaged", "--loss", "rankclip", code=1, PYTHONPATH=str(tmp_path))
    assert re.search(f"--loss .*{re.escape(HOOK)}", done.output, re.DOTALL)
    assert not done.directory.exists()


MAIN, RUNNER = "/x/open_clip_train/main.py", "C:\\x\\rankloss_open_clip\\__main__.py"


@pytest.fixture
def without_hook(monkeypatch: pytest.MonkeyPatch) -> None:
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
@pytest.mark.parametrize("argv", [[], ["run_clip.py", "--loss", "rankclip"], [MAIN, "--loss-dist-impl", "x"]])
def test_a_hook_that_cannot_be_loaded_is_one_warning_elsewhere(
    monkeypatch: pytest.MonkeyPatch, argv: list[str]
) -> None:
    monkeypatch.setattr(sys, "argv", argv)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        rankloss_open_clip.wait_for_trainer()
        rankloss_open_clip.wait_for_trainer()
    assert [HOOK in str(warning.message) for warning in caught] == [True]


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
    return ready(
        open_clip_train.params.parse_args(
            ["--loss", "rankclip", "--epochs", "3", "--loss-schedule-unit", "epoch", "--device", "cpu"]
        )
    )


def factory_with(**functions: Any) -> Any:
    factory = ModuleType("open_clip.factory")
    vars(factory).update(functions)
    patches.patch(factory)
    return factory


def task(args: Any, model: Any = None) -> Any:
    """The shape of open_clip's later training task."""
    return SimpleNamespace(loss=Base(), trainable_module=model)


def test_task_api_gets_a_plain_dict_and_its_epochs() -> None:
    train = ModuleType("open_clip_train.train")
    exec("def train_one_epoch(state, data, args, tb_writer=None): return state", vars(train))
    factory = factory_with(create_task=task)
    patches.patch(train)
    args = arguments()
    state = SimpleNamespace(task=factory.create_task(args, model=None), epoch=1, optimizer=None)
    data = {"train": SimpleNamespace(dataloader=SimpleNamespace(num_batches=4))}
    assert train.train_one_epoch(state, data, args, tb_writer=None) is state
    losses = state.task.loss(**features(), output_dict=True)
    assert type(losses) is dict
    terms = ["contrastive_loss", "cross_modal_loss", "in_modal_loss"]
    assert list(losses) == [*terms, "rank_lambda", "cross_modal_raw", "in_modal_raw"]
    assert losses["rank_lambda"].item() == 2.0
    assert not losses["rank_lambda"].requires_grad
    assert type(factory.create_task(SimpleNamespace(), model=None).loss) is Base


def test_what_cannot_be_trained_with_a_loss_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="Identity"):
        epoch_begins(nn.Identity(), 0, arguments())
