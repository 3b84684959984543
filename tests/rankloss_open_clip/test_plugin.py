"""The plug-in: how it gets in, what it leaves untouched, and what it says about itself."""

from __future__ import annotations

import importlib
import inspect
import pickle
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import open_clip.factory
import open_clip_train.params
import open_clip_train.train
import pytest
import torch
from torch import Tensor, nn
from trainer_runs import Processes, Trainer

from rankloss_open_clip import bootstrap, names, patches
from rankloss_open_clip.logged_terms import TrainerLoss
from rankloss_open_clip.training import start_epoch
from rankloss_trainers.clock import Position

FUNCTIONS = [
    open_clip.factory.create_loss,
    open_clip_train.params.parse_args,
    open_clip_train.train.train_one_epoch,
]


def test_bootstrap_imports_only_the_standard_library(trainer: Trainer) -> None:
    script = (
        "import sys; before = set(sys.modules)\n"
        "from rankloss_open_clip import bootstrap; bootstrap.attach()\n"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "print(sorted(new - sys.stdlib_module_names))"
    )
    assert trainer.python("-c", script).output.strip() == "['rankloss_open_clip', 'rankloss_trainers']"


def test_import_of_torch_attaches_and_loads_nothing_else(trainer: Trainer) -> None:
    script = (
        "import sys, torch\n"
        "print([type(finder).__name__ for finder in sys.meta_path].count('Finder'))\n"
        "print(sorted(name for name in sys.modules if name.startswith(('rankloss', 'open_clip'))))"
    )
    count, names = trainer.python("-W", "error", "-c", script).output.strip().splitlines()
    assert count == "1"
    ours = ["rankloss_open_clip", "rankloss_open_clip.bootstrap"]
    assert names == str([*ours, "rankloss_trainers", "rankloss_trainers.import_hook"])


def test_attaching_twice_changes_nothing() -> None:
    finders = list(sys.meta_path)
    bootstrap.attach()
    assert sys.meta_path == finders
    assert open_clip.factory.create_loss is FUNCTIONS[0]
    assert open_clip_train.params.parse_args is FUNCTIONS[1]
    assert open_clip_train.train.train_one_epoch is FUNCTIONS[2]


def test_everything_is_patched_once_loaded() -> None:
    importlib.import_module("open_clip_train.main")
    assert patches.unpatched() == []
    assert open_clip.create_loss is open_clip.factory.create_loss


def test_function_that_was_missed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(open_clip_train.train, "train_one_epoch", inspect.unwrap(FUNCTIONS[2]))
    assert patches.unpatched() == ["open_clip_train.train.train_one_epoch"]


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_patched_function_keeps_source_signature_and_pickle(function: Any) -> None:
    original = inspect.unwrap(function)
    assert original is not function
    assert f"def {function.__name__}(" in inspect.getsource(function)
    assert inspect.signature(function) == inspect.signature(original)
    assert pickle.loads(pickle.dumps(function)) is function


def test_reloaded_module_is_patched_again() -> None:
    module = importlib.import_module("open_clip_train.params")
    try:
        importlib.reload(module)
        assert module.parse_args is not FUNCTIONS[1]
        assert module.parse_args(["--loss", "rankclip"]).loss == "rankclip"
    finally:
        module.parse_args = FUNCTIONS[1]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("argv", "asks"),
    [
        (["--loss", "rankclip"], True),
        (["--loss=rankclip"], True),
        (["--loss", "clip"], True),
        (["--los", "rankclip"], True),
        (["--rankclip-top-k", "3"], True),
        (["--loss-dist-impl", "rankclip"], False),
        (["--name", "rankclip", "--local-loss"], False),
        ([], False),
    ],
)
def test_request_is_read_from_the_command_line(argv: list[str], asks: bool) -> None:
    assert names.asks_for_loss(argv) is asks


@pytest.mark.parametrize(
    ("name", "source", "reason"),
    [
        ("open_clip.factory", "", "neither create_loss nor create_task"),
        ("open_clip_train.params", "def parse_args(args): pass", "does not use argparse"),
        ("open_clip_train.train", "", "no attribute 'train_one_epoch'"),
        ("open_clip_train.train", "def train_one_epoch(trainer): pass", "unknown parameters: trainer"),
    ],
)
def test_unknown_layout_is_kept_as_a_failure(
    monkeypatch: pytest.MonkeyPatch, name: str, source: str, reason: str
) -> None:
    monkeypatch.setattr(bootstrap, "failures", {})
    module = ModuleType(name)
    exec(source, vars(module))
    bootstrap.patch(module)
    assert reason in str(bootstrap.failures[name])


def test_params_without_parse_args_stop_only_a_command_that_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bootstrap, "failures", {})
    module = ModuleType("open_clip_train.params")
    monkeypatch.setattr(sys, "argv", ["main.py"])
    bootstrap.patch(module)
    monkeypatch.setattr(sys, "argv", ["main.py", "--loss", "rankclip"])
    with pytest.raises(ImportError, match="could not attach"):
        bootstrap.patch(module)


def test_trainer_with_a_loss_option_of_its_own_keeps_it() -> None:
    module = ModuleType("open_clip_train.params")
    source = (
        "import argparse\n"
        "def parse_args(args):\n"
        "    parser = argparse.ArgumentParser()\n"
        "    parser.add_argument('--loss', choices=['clip', 'sigmoid'], default='sigmoid')\n"
        "    parser.add_argument('--epochs', default=2)\n"
        "    return parser.parse_args(args)\n"
    )
    exec(source, vars(module))
    patches.patch_params(module)
    assert vars(module.parse_args([])) == {"loss": "sigmoid", "epochs": 2}
    args = module.parse_args(["--loss", "rankclip"])
    assert args.loss == "rankclip"

    factory = ModuleType("open_clip.factory")
    seen: list[str] = []

    def create_loss(args: Any) -> nn.Module:
        seen.append(args.loss)
        return Base()

    factory.create_loss = create_loss  # type: ignore[attr-defined]
    patches.patch_factory(factory)
    assert isinstance(factory.create_loss(args), TrainerLoss)
    assert seen == ["sigmoid"]


def test_broken_plugin_fails_a_run_that_asks(processes: Processes) -> None:
    done = processes["plug-in broken"]
    assert done.returncode not in (0, 2)
    assert "--loss was given, but rankloss_open_clip could not attach" in done.output
    assert "sabotaged" in done.output


def test_doctor_says_yes_where_the_loss_is_honoured(processes: Processes) -> None:
    done = processes["doctor"]
    assert (done.returncode, "Yes: " in done.output) == (0, True), done.output


def test_doctor_reports_the_switched_off_plugin(processes: Processes) -> None:
    done = processes["doctor, plug-in off"]
    assert done.returncode == 1
    assert "No: " in done.output
    assert "TORCH_DEVICE_BACKEND_AUTOLOAD=0 keeps torch from loading plug-ins" in done.output
    assert "python -m rankloss_open_clip" in done.output
    assert "trains plain CLIP" in done.output


def test_doctor_reports_a_broken_plugin(processes: Processes) -> None:
    done = processes["doctor, plug-in broken"]
    assert done.returncode == 1
    assert "open_clip.factory could not be patched: OSError: sabotaged" in done.output


class Task(nn.Module):
    """The shape of open_clip's later training task."""

    def __init__(self) -> None:
        super().__init__()
        self.loss: nn.Module = Base()


class Base(nn.Module):
    """A loss with the trainer's calling convention."""

    def forward(
        self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor, output_dict: bool = False
    ) -> Tensor | dict[str, Tensor]:
        value = (image_features * text_features).sum() * logit_scale
        return {"contrastive_loss": value} if output_dict else value


def arguments(**changes: Any) -> Any:
    args = open_clip_train.params.parse_args(["--loss", "rankclip"])
    vars(args).update({"rank": 0, "world_size": 1, "accum_freq": 1, "epochs": 3, **changes})
    return args


def features() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    rows = nn.functional.normalize(torch.randn(2, 6, 4, generator=generator), dim=-1)
    return {"image_features": rows[0], "text_features": rows[1], "logit_scale": torch.tensor(10.0)}


def loader(batches: int) -> dict[str, Any]:
    return {"train": SimpleNamespace(dataloader=SimpleNamespace(num_batches=batches))}


def test_task_api_gets_a_plain_dict_and_its_epochs() -> None:
    factory, train = ModuleType("open_clip.factory"), ModuleType("open_clip_train.train")
    exec("def train_one_epoch(state, data, args, tb_writer=None): return state", vars(train))
    factory.create_task = lambda args, model, dist_model=None: Task()  # type: ignore[attr-defined]
    patches.patch_factory(factory)
    patches.patch_train(train)
    args = arguments()
    task = factory.create_task(args, model=None)
    state = SimpleNamespace(task=task, epoch=1)
    assert train.train_one_epoch(state, loader(4), args, tb_writer=None) is state
    losses = task.loss(**features(), output_dict=True)
    assert type(losses) is dict
    terms = ["contrastive_loss", "cross_modal_loss", "in_modal_loss"]
    assert list(losses) == [*terms, "rank_lambda", "cross_modal_raw", "in_modal_raw"]
    assert losses["rank_lambda"].item() == 2.0
    assert not losses["rank_lambda"].requires_grad
    assert type(factory.create_task(SimpleNamespace(), model=None).loss) is Base


def test_task_that_compares_nothing_is_refused() -> None:
    factory = ModuleType("open_clip.factory")
    factory.create_task = lambda args, model: SimpleNamespace()  # type: ignore[attr-defined]
    patches.patch_factory(factory)
    with pytest.raises(ValueError, match="compares images with texts, got SimpleNamespace"):
        factory.create_task(arguments(), None)


def test_other_loss_in_the_trainer_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="the trainer trains with Identity"):
        start_epoch(nn.Identity(), 0, loader(4), arguments())


def built(**changes: Any) -> TrainerLoss:
    factory = ModuleType("open_clip.factory")
    factory.create_loss = lambda args: Base()  # type: ignore[attr-defined]
    patches.patch_factory(factory)
    loss = factory.create_loss(arguments(**changes))
    assert isinstance(loss, TrainerLoss)
    return loss


def test_scalar_form_is_the_sum_of_the_terms() -> None:
    loss = built()
    loss.start_epoch(Position(epoch=1, epochs=3, steps=4, accum_freq=1))
    terms = loss(**features(), output_dict=True)
    torch.testing.assert_close(loss(**features()), sum(terms.values()))
    assert len(terms) == 6
    assert len(terms.values()) == 3


@pytest.mark.parametrize("unit", ["epoch", "step"])
def test_loss_that_was_told_no_epoch_refuses_to_run(unit: str) -> None:
    with pytest.raises(RuntimeError, match=r"told of no epoch: call start_epoch\(\)"):
        built(rankclip_schedule_unit=unit)(**features(), output_dict=True)


def test_epoch_that_is_longer_than_announced_stays_at_its_last_step() -> None:
    loss = built(rankclip_schedule_unit="step", rankclip_schedule="linear")
    loss.start_epoch(Position(epoch=0, epochs=2, steps=2, accum_freq=1))
    values = [loss(**features(), output_dict=True)["rank_lambda"].item() for _ in range(3)]
    assert values == pytest.approx([0, 1 / 3, 1 / 3])


def test_resumed_run_is_where_the_uninterrupted_one_would_be() -> None:
    def lambdas(loss: TrainerLoss, epochs: range) -> list[float]:
        values = []
        for epoch in epochs:
            loss.start_epoch(Position(epoch=epoch, epochs=3, steps=4, accum_freq=2))
            values += [loss(**features(), output_dict=True)["rank_lambda"].item() for _ in range(8)]
        return values

    whole = lambdas(built(rankclip_schedule_unit="step", rankclip_schedule="linear"), range(3))
    resumed = lambdas(built(rankclip_schedule_unit="step", rankclip_schedule="linear"), range(1, 3))
    assert resumed == whole[8:]
    assert whole[::2] == whole[1::2]
    assert len(set(whole)) == 12
