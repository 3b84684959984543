"""The short examples of trainers: each trains the loss of its case, and a loop the same on two processes."""

from __future__ import annotations

import ast
import contextlib
import importlib
import importlib.metadata
import importlib.util
import inspect
import io
import json
import math
import os
import re
import subprocess
import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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
    pytest.param((name.removesuffix(".py"), case), id=name, marks=[pytest.mark.slow] * (name in SLOW))
    for name, _, case in cases.EXAMPLES
    if name.endswith(".py")
]
"""The name of each example in Python and the case whose loss it trains, or some words on its loss."""

MOST_LINES = {"plain_loop.py": 105}  # of a file that a reader copies; this one serves several GPUs, too

# What a file that is no loop may import beside torch, rankloss and the standard library.
LIBRARIES = {"PIL", "accelerate", "datasets", "lightning"}
LIBRARIES |= {"open_clip", "sentence_transformers", "transformers"}
OURS = {"rankloss", "rankloss_features", "rankloss_trainers", "torch"}


def imported(name):
    """The module of an example."""
    return loaded(FOLDER / f"{name}.py")


# --- the files --------------------------------------------------------------------------------------------


def test_the_table_of_examples_has_every_file_of_the_folder():
    assert {name for name, _, _ in cases.EXAMPLES} == {file.name for file in FOLDER.glob("*.*")}


@pytest.mark.parametrize("name", sorted({name for name, _, _ in cases.EXAMPLES}))
def test_an_example_is_short_and_begins_with_the_command_that_runs_it(name):
    lines = (FOLDER / name).read_text(encoding="utf-8").splitlines()
    assert len(lines) <= MOST_LINES.get(name, 85)
    assert re.search(rf"(python|sh) examples/trainers/{name}", "\n".join(lines[:8]))


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.stem)
def test_example_can_be_copied_out_of_the_repository(path):
    modules = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            modules.add(node.module)
        elif isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
    packages = {module.partition(".")[0] for module in modules}
    others = packages - sys.stdlib_module_names - OURS
    assert others <= (set() if path.stem == "plain_loop" else LIBRARIES)


def test_no_loss_of_the_examples_is_offered(capsys):
    assert importlib.metadata.distribution("rankloss-examples")  # which is installed
    assert console.main(["losses"]) == 0
    assert "rankloss-examples" not in capsys.readouterr().out


# --- a run of each ----------------------------------------------------------------------------------------


@dataclass
class Run:
    """A run of an example: its losses, weights, files and print."""

    name: str
    case: Any
    """The case whose loss it trains, or some words on its loss."""
    losses: list[Any] = field(default_factory=list)
    """The losses that it chose by name, a list for each choice."""
    weights: dict[int, Any] = field(default_factory=dict)
    """The weights of all optimizers that stepped, by the identity of the parameter."""
    gradient_norms: list[float] = field(default_factory=list)
    """The sum of these weights' gradient norms, at every step."""
    saved: list[Any] = field(default_factory=list)
    """The weights in the files that it saved."""
    printed: str = ""

    def numbers_after(self, words):
        """The printed numbers behind words: ``loss 0.5`` of a loop, ``'loss': '0.5'`` of a trainer."""
        found = re.findall(rf"{words}['\"]?:? ['\"]?(-?[\d.]+|nan|-?inf)", self.printed)
        return [float(number) for number in found]


def weights_in(file):
    """The weights in a saved file, by name: of safetensors, a state dict or Lightning's checkpoint."""
    if file.suffix == ".safetensors":
        return importlib.import_module("safetensors.torch").load_file(file)
    saved = torch.load(file, weights_only=file.suffix == ".pt")
    return saved.get("state_dict", saved)


def keep_losses(patch, run):
    """Let a run keep every choice of losses by name."""
    choose = host.choose

    def choose_and_keep(name, given):
        run.losses.append(choose(name, given))
        return run.losses[-1]

    for module in (host, loop):
        patch.setattr(module, "choose", choose_and_keep)


@contextlib.contextmanager
def optimizers_watched(run):
    """Let a run keep the weights of all optimizers and the norm of their gradients, behind each step."""

    def measure(optimizer, *_):
        run.weights.update((id(p), p) for group in optimizer.param_groups for p in group["params"])
        gradients = [weight.grad for weight in run.weights.values() if weight.grad is not None]
        run.gradient_norms.append(sum(gradient.norm().item() for gradient in gradients))

    hook = register_optimizer_step_post_hook(measure)
    yield
    hook.remove()


@pytest.fixture(scope="module", params=PYTHON)
def run(request, sample_folder, tmp_path_factory):
    """A run of an example on the sample, in this process and in a folder of its own."""
    name, case = request.param
    pytest.importorskip("lightning" if "lightning" in name else "accelerate")
    folder, run, printed = tmp_path_factory.mktemp(name), Run(name, case), io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        optimizers_watched(run),
        contextlib.redirect_stdout(printed),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # the trainers' own, of tiny runs
        example = imported(name)
        keep_losses(patch, run)
        patch.chdir(folder)
        if "datasets" in sys.modules:
            patch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "cache")
        arguments = {"output": "output", "folder": str(sample_folder)}
        example.main(**{x: arguments[x] for x in inspect.signature(example.main).parameters})
    run.printed = printed.getvalue()
    files = [
        file for file in (folder / "output").rglob("*") if file.suffix in (".safetensors", ".pt", ".ckpt")
    ]
    run.saved = [weight for file in files for weight in weights_in(file).values()]
    return run


def test_an_example_trains_with_gradients(run):
    assert run.gradient_norms
    assert all(math.isfinite(norm) and norm > 0 for norm in run.gradient_norms)


def test_an_example_prints_finite_losses(run):
    losses = run.numbers_after(r"loss\b")
    assert losses
    assert all(map(math.isfinite, losses))


def test_an_example_prints_an_evaluation(run):
    """A trainer prints a loss; a loop its R@1 of 200 made-up pairs, of which chance finds 0.005."""
    evaluation = run.numbers_after(r"(?:\beval_loss|\bval_loss|R@1)")[-1]
    far_above_chance = 0.3
    assert evaluation > (far_above_chance if "_loop" in run.name else 0)


def test_an_example_saves_every_weight_that_it_trained(run):
    """One of its shape in the file is equal: the names there are the trainer's, not always the model's."""
    assert run.weights
    for weight in run.weights.values():
        alike = [saved for saved in run.saved if saved.shape == weight.shape]
        assert any(torch.equal(weight.detach(), saved) for saved in alike)


def test_an_example_trains_the_loss_of_its_case(run):
    if not isinstance(run.case, cases.Case):
        pytest.skip("its loss is not chosen by name")
    (losses,) = run.losses
    expected = eval(run.case.python(), {"create": lambda name, **options: catalog.choose(name, options)})
    assert [(loss.name, loss.values) for loss in losses] == [(loss.name, loss.values) for loss in expected]


# --- the loss of one's own --------------------------------------------------------------------------------


def test_the_own_loss_is_short():
    soft = imported("own_loss").SoftLoss
    assert len(inspect.getsource(soft).splitlines()) <= 20


def test_the_own_loss_has_its_options_by_name_and_the_base_before_it(monkeypatch):
    """As another package would register it; test_catalog has the help and the errors of such a loss."""
    soft = imported("own_loss").SoftLoss
    register(monkeypatch, soft=soft)
    loss = rankloss_trainers.create("rankclip+soft", soft={"weight": 2.0})
    parts = {type(part): part for part in loss.modules()}
    assert parts[soft].weight == 2.0
    assert parts[soft].base is parts[rankloss.RankClipLoss]


V = torch.eye(4, 8)
T = V.flip(0)
EQUAL = torch.ones(4, 3) / 3**0.5
"""A teacher's unit features of captions, to which all captions are equal."""


def own_loss(base=None):
    """The loss of the example with half of its term, as this file's tests call it."""
    return imported("own_loss").SoftLoss(base, weight=0.5, gather=rankloss.Gather())


def test_the_own_loss_is_the_cross_entropy_with_the_teachers_similarities_and_has_a_gradient():
    t = T.clone().requires_grad_()
    term = own_loss()(V, t, 1.0, reference_text_features=EQUAL, output_dict=True)["soft_loss"]
    # The loss multiplies similarities of captions, here 1 of a caption with itself and 0 otherwise, by 20.
    logits = 20 * torch.eye(4)
    # The teacher's softmax is 1/4 everywhere: the cross-entropy is a mean over a row. The weight is 0.5.
    assert term.item() == pytest.approx(-0.5 * logits.log_softmax(-1).mean().item())
    term.backward()
    assert t.grad is not None


def test_the_own_loss_adds_its_term_to_the_base_and_ignores_a_teacher_of_pictures():
    teacher = {"reference_image_features": V, "reference_text_features": EQUAL}
    entries = own_loss()(V, T, 1.0, reference_text_features=EQUAL, output_dict=True)
    assert entries["contrastive_loss"] == rankloss.ClipLoss()(V, T, 1.0)
    assert own_loss()(V, T, 1.0, **teacher) == sum(entries.values())


def test_the_own_loss_passes_a_teacher_of_pictures_to_a_base_that_takes_it():
    itself = {"reference_image_features": V, "reference_text_features": T}
    entries = own_loss(rankloss.MimicryLoss())(V, T, 1.0, **itself, output_dict=True)
    assert entries["mimicry_loss"] == 0  # of a model that is its own teacher


# --- two processes ----------------------------------------------------------------------------------------

PAIRS, BATCH, EPOCHS = 32, 16, 2


def towers():
    """The plain loop's model, with the same first weights at each call."""
    torch.manual_seed(0)
    return imported("plain_loop").Towers()


def pairs():
    """The first pairs of the plain loop."""
    return Subset(imported("plain_loop").made_pairs()[0], range(PAIRS))


def weights_of(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()]).tolist()


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1)


def looped(rank, processes):
    """Train by the plain loop, each process on its share of every batch: the last loss, and all weights."""
    own = towers()
    model = own if processes == 1 else DistributedDataParallel(own)
    shares = [tuple(x.chunk(processes)[rank] for x in batch) for batch in DataLoader(pairs(), BATCH)]
    batches = DataLoader(shares, batch_size=None)
    loss = imported("plain_loop").train(model, own.logit_scale, batches, sgd(model), EPOCHS).detach()
    if processes > 1:
        torch.distributed.all_reduce(loss)
    return [loss.item() / processes, *weights_of(model)]


def accelerated(rank, processes):
    """Train by accelerate's loop: the last loss, as it is logged, and all weights."""
    accelerate = importlib.import_module("accelerate")
    model, batches = towers(), DataLoader(pairs(), BATCH // processes)
    accelerator = accelerate.Accelerator(cpu=True)
    loss = imported("accelerate_loop").train(accelerator, model, batches, sgd(model), EPOCHS)
    return [loss.item(), *weights_of(model)]


def assert_one_training(alone, together):
    """Assert that one process has trained its weights, and each of several processes ends with the same.

    ``alone`` and each of ``together`` have the last loss, and then all weights.
    """
    _, *weights = alone
    assert math.dist(weights, weights_of(towers())) > 0.01, "they have moved"
    for of_process in together:
        assert of_process == pytest.approx(alone, rel=1e-4, abs=1e-6)


def test_the_plain_loop_holds_the_scale_at_100():
    model = towers()
    with torch.no_grad():
        model.logit_scale.fill_(math.log(200))
    imported("plain_loop").train(model, model.logit_scale, DataLoader(pairs(), BATCH), sgd(model), EPOCHS)
    assert model.logit_scale.exp().item() <= 100.001


@pytest.mark.slow
def test_the_plain_loop_in_two_processes_is_the_one_in_one(pools):
    assert_one_training(looped(0, 1), pools[2].run(looped))


@pytest.mark.slow
def test_the_plain_loop_runs_under_torchrun(tmp_path):
    """As its first lines say; the first process alone evaluates and saves."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command.append(str(FOLDER / "plain_loop.py"))
    without_gpus = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        command, cwd=tmp_path, env=without_gpus, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-4000:]
    (recall_at_1,) = re.findall(r"^held-out R@1: (\S+)$", done.stdout, re.MULTILINE)
    assert float(recall_at_1) > 0.5  # of 200 pairs
    saved = torch.load(tmp_path / "outputs/trainers/plain_loop/model.pt", weights_only=True)
    assert {*saved} == {*towers().state_dict()}


@pytest.mark.slow
def test_accelerate_in_two_processes_is_the_one_in_one(tmp_path):
    """This file as a script, which writes ``PROCESSES-RANK.json`` of each process."""
    pytest.importorskip("accelerate")
    for processes in (1, 2):
        torchrun(__file__, tmp_path, processes=processes)
    alone, *together = (json.loads(file.read_text()) for file in sorted(tmp_path.glob("*.json")))
    assert len(together) == 2
    assert_one_training(alone, together)


if __name__ == "__main__":
    rank, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    ended = json.dumps(accelerated(rank, processes))
    Path(sys.argv[1], f"{processes}-{rank}.json").write_text(ended)
