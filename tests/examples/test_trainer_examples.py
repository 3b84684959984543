"""The short examples of trainers: each trains the loss of its case, and a loop the same on two processes."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import importlib.util
import inspect
import json
import math
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data import DataLoader, Subset

sys.path += [str(Path(__file__).parents[1] / name) for name in ("docs", "rankloss_trainers")]

from launch import torchrun
from tools_folder import ROOT, loaded, tool

import rankloss
import rankloss_trainers
from rankloss_trainers import catalog, console, host, loop
from registered import register

cases = tool("cases.py")
FOLDER = ROOT / "examples/trainers"
SLOW = ("own_loss.py", "two_encoders.py")  # which train as transformers_trainer.py and plain_loop.py do
PYTHON = [
    pytest.param(name.removesuffix(".py"), case, id=name, marks=[pytest.mark.slow] * (name in SLOW))
    for name, _, case in cases.EXAMPLES
    if name.endswith(".py")
]


# What a file that is no loop may import beside torch, rankloss and the standard library.
LIBRARIES = {"PIL", "accelerate", "datasets", "lightning"}
LIBRARIES |= {"open_clip", "sentence_transformers", "transformers"}
OURS = {"rankloss", "rankloss_features", "rankloss_trainers", "torch"}


def imported(name):
    """The module of an example."""
    return loaded(FOLDER / f"{name}.py")


def test_all_examples_are_in_the_table_and_begin_with_their_command():
    assert {name for name, _, _ in cases.EXAMPLES} == {x.name for x in FOLDER.glob("*.*")}
    for name, *_ in cases.EXAMPLES:
        lines = (FOLDER / name).read_text(encoding="utf-8").splitlines()
        assert len(lines) <= 85
        head = "\n".join(lines[:8])
        assert f"python examples/trainers/{name}" in head or f"sh examples/trainers/{name}" in head


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.stem)
def test_example_can_be_copied_out_of_the_repository(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = [x for x in ast.walk(tree) if isinstance(x, ast.Import | ast.ImportFrom)]
    modules = [x.module if isinstance(x, ast.ImportFrom) else x.names[0].name for x in found]
    theirs = {x.partition(".")[0] for x in modules} - sys.stdlib_module_names - OURS
    assert theirs <= (set() if path.stem == "plain_loop" else LIBRARIES)


def test_no_loss_of_the_examples_is_offered(capsys):
    assert importlib.metadata.distribution("rankloss-examples")  # which is installed
    assert console.main(["losses"]) == 0
    assert "rankloss-examples" not in capsys.readouterr().out


def weights_in(file):
    if file.suffix == ".safetensors":
        return importlib.import_module("safetensors.torch").load_file(file)
    saved = torch.load(file, weights_only=file.suffix == ".pt")
    return saved.get("state_dict", saved)


@pytest.fixture
def chosen(monkeypatch):
    """The losses of each choice by name that an example makes."""
    choices, choose = [], host.choose

    def choose_and_keep(name, given):
        choices.append(choose(name, given))
        return choices[-1]

    for module in (host, loop):
        monkeypatch.setattr(module, "choose", choose_and_keep)
    return choices


@pytest.fixture
def trained():
    """The weights of all optimizers that step, and the norm of their gradients behind each step."""
    weights, norms = {}, []

    def measure(optimizer, *_):
        weights.update((id(p), p) for group in optimizer.param_groups for p in group["params"])
        gradients = [weight.grad for weight in weights.values() if weight.grad is not None]
        norms.append(sum(gradient.norm().item() for gradient in gradients))

    hook = register_optimizer_step_post_hook(measure)
    yield SimpleNamespace(weights=weights, norms=norms)
    hook.remove()


@pytest.mark.filterwarnings("ignore")  # the trainers' own, of tiny runs
@pytest.mark.parametrize(("name", "case"), PYTHON)
def test_example_trains_the_loss_of_its_case_evaluates_and_saves(
    name, case, sample_folder, chosen, trained, tmp_path, monkeypatch, capsys
):
    pytest.importorskip("lightning" if "lightning" in name else "accelerate")
    module, output = imported(name), tmp_path / "output"
    if "datasets" in sys.modules:
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    arguments = {"output": str(output)}
    if "folder" in inspect.signature(module.main).parameters:
        arguments["folder"] = str(sample_folder)
    module.main(**arguments)
    printed = capsys.readouterr().out

    # It trains,
    assert trained.norms
    assert all(math.isfinite(norm) and norm > 0 for norm in trained.norms)
    logged = [float(x) for x in re.findall(r"loss\b['\"]?:? ['\"]?([\d.]+|nan|inf)", printed)]
    assert logged
    assert all(map(math.isfinite, logged))

    # evaluates: a trainer prints a loss, a loop its R@1 of 200 made-up pairs,
    (held_out,) = re.findall(r"(?:\beval_loss|\bval_loss|R@1)['\"]?: ['\"]?([\d.]+)", printed)[-1:]
    assert float(held_out) > (0.3 if "_loop" in name else 0)

    # saves every weight,
    files = [file for file in output.rglob("*") if file.suffix in (".safetensors", ".pt", ".ckpt")]
    saved = [weight for file in files for weight in weights_in(file).values()]
    for weight in trained.weights.values():
        assert any(torch.equal(weight.detach(), x) for x in saved if x.shape == weight.shape)

    # and all that with the loss of its case.
    if isinstance(case, cases.Case):
        (losses,) = chosen
        expected = eval(case.python(), {"create": lambda name, **options: catalog.choose(name, options)})
        assert [(x.name, x.values) for x in losses] == [(x.name, x.values) for x in expected]


def test_the_own_loss_is_short_and_has_options_by_name(monkeypatch):
    """As another package would register it; test_catalog has the help and the errors of such a loss."""
    soft = imported("own_loss").SoftLoss
    assert len(inspect.getsource(soft).splitlines()) <= 20
    register(monkeypatch, soft=soft)
    loss = rankloss_trainers.create("rankclip+soft", soft={"weight": 2.0})
    parts = {type(part): part for part in loss.modules()}
    assert parts[soft].weight == 2.0
    assert parts[soft].base is parts[rankloss.RankClipLoss]


def test_the_own_loss_trains_on_the_bases_gradient_and_its_own():
    loss = imported("own_loss").SoftLoss(weight=0.5, gather=rankloss.Gather())
    v, t = torch.eye(4, 8), torch.eye(4, 8).flip(0).requires_grad_()
    teacher = torch.ones(4, 3) / 3**0.5  # to which all captions are equal
    entries = loss(v, t, 1.0, reference_text_features=teacher, output_dict=True)
    logits = 20 * torch.eye(4)
    assert entries["soft_loss"].item() == pytest.approx(-0.5 * logits.log_softmax(-1).mean().item())
    assert entries["contrastive_loss"] == rankloss.ClipLoss()(v, t, 1.0)
    entries["soft_loss"].backward()
    assert t.grad is not None
    both = {"reference_image_features": v, "reference_text_features": teacher}  # of which it uses one
    assert loss(v, t, 1.0, **both) == sum(entries.values())
    own = {"reference_image_features": v, "reference_text_features": t}  # a base that takes both gets both
    above = imported("own_loss").SoftLoss(rankloss.MimicryLoss(), gather=rankloss.Gather())
    assert above(v, t, 1.0, **own, output_dict=True)["mimicry_loss"] == 0


# --- two processes ----------------------------------------------------------------------------------------

PAIRS, EPOCHS = 32, 2


def towers():
    torch.manual_seed(0)
    return imported("plain_loop").Towers()


def pairs():
    return Subset(imported("plain_loop").made_pairs()[0], range(PAIRS))


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()]).tolist()


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1)


def looped(rank, processes):
    """The last step's loss of the plain loop, and the weights; each process has its share of the batches."""
    model = towers() if processes == 1 else DistributedDataParallel(towers())
    shares = [tuple(x.chunk(processes)[rank] for x in batch) for batch in DataLoader(pairs(), 16)]
    batches = DataLoader(shares, batch_size=None)
    value = imported("plain_loop").train(model, batches, sgd(model), EPOCHS).detach()
    if processes > 1:
        torch.distributed.all_reduce(value)
    return [value.item() / processes, *weights(model)]


def accelerated(rank, processes):
    """The last step's loss as it is logged, and the weights."""
    accelerate = importlib.import_module("accelerate")
    model, batches = towers(), DataLoader(pairs(), 16 // processes)
    accelerator = accelerate.Accelerator(cpu=True)
    value = imported("accelerate_loop").train(accelerator, model, batches, sgd(model), EPOCHS)
    return [value.item(), *weights(model)]


def assert_one_training(alone, shares):
    assert math.dist(alone[1:], weights(towers())) > 0.01
    for ended in shares:
        assert ended == pytest.approx(alone, rel=1e-4, abs=1e-6)


@pytest.mark.slow
def test_the_plain_loop_in_two_processes_is_the_one_in_one(pools):
    assert_one_training(looped(0, 1), pools[2].run(looped))


@pytest.mark.slow
def test_accelerate_in_two_processes_is_the_one_in_one(tmp_path):
    pytest.importorskip("accelerate")
    for processes in (1, 2):
        torchrun(__file__, tmp_path, processes=processes)
    alone, *shares = (json.loads(file.read_text()) for file in sorted(tmp_path.glob("*.json")))
    assert len(shares) == 2
    assert_one_training(alone, shares)


if __name__ == "__main__":
    rank, processes = (int(os.environ.get(x, n)) for x, n in (("RANK", "0"), ("WORLD_SIZE", "1")))
    Path(sys.argv[1], f"{processes}-{rank}.json").write_text(json.dumps(accelerated(rank, processes)))
