"""The code of docs/loops.md and docs/sentence_transformers.md, executed with the trainers it is for."""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from launch import torchrun
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Subset, TensorDataset

import rankloss
from open_clip_main import unpacked
from process_pool import Pools

PAGE = Path(__file__).parents[2] / "docs" / "loops.md"
EPOCHS, PAIRS = 2, 32


def block(section: str, number: int = 0) -> str:
    """A Python block of a section of the page."""
    (text,) = re.findall(
        rf"^## {re.escape(section)}\n(.*?)(?=^## |\Z)", PAGE.read_text(), re.DOTALL | re.MULTILINE
    )
    return str(re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)[number])


def needs(package: str) -> Any:
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"{package} is not installed")


class Towers(nn.Module):
    def __init__(self, *, returns_scale: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image, self.text = nn.Linear(6, 4), nn.Linear(5, 4)
        self.logit_scale = nn.Parameter(torch.tensor(2.0))
        self.returns_scale = returns_scale

    def forward(self, images: Tensor, texts: Tensor) -> tuple[Tensor, ...]:
        features = F.normalize(self.image(images)), F.normalize(self.text(texts))
        return (*features, self.logit_scale.exp()) if self.returns_scale else features


def pairs() -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(
        torch.randn(PAIRS, 6, generator=generator), torch.randn(PAIRS, 5, generator=generator)
    )


def weights(model: nn.Module) -> list[float]:
    return torch.cat([p.detach().flatten() for p in model.parameters()]).tolist()


def moved(ended: list[float]) -> bool:
    return math.dist(ended, weights(Towers(returns_scale=True))) > 0.01


@needs("sentence_transformers")
def test_sentence_transformers(tmp_path: Path) -> None:
    tiny = importlib.import_module("tiny_sentences")
    arguments = tiny.SentenceTransformerTrainingArguments(
        str(tmp_path / "out"),
        **{"use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no"},
        **{"logging_steps": 1, "max_steps": 4, "dataloader_pin_memory": False},
    )
    names = {"model": tiny.tiny(tmp_path), "args": arguments, "pairs": tiny.pairs()}
    page = PAGE.with_name("sentence_transformers.md").read_text()
    (code,) = re.findall(r"^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    exec(code, names)
    lines = [line for line in names["trainer"].state.log_history if "loss" in line]
    expected = [rankloss.schedules.rankclip(step, 4) for step in range(1, 5)]
    assert [line["rank_lambda"] for line in lines] == pytest.approx(expected, abs=1e-4)


def lightning_run(rank: int = 0, processes: int = 1) -> dict[str, Any]:
    # Lightning's own sampler shuffles.
    off = ("logger", "enable_progress_bar", "enable_checkpointing", "use_distributed_sampler")
    options = dict.fromkeys(off, False)
    share = DataLoader(Subset(pairs(), range(rank, PAIRS, processes)), 16 // processes)
    strategy = "ddp" if processes > 1 else "auto"
    names: dict[str, Any] = {
        "torch": torch,
        "model": Towers(returns_scale=True),
        "batches": share,
        "validation_batches": share,
        "options": {**options, "accelerator": "cpu", "devices": processes, "strategy": strategy},
    }
    exec(block("Lightning"), names)
    return names


@needs("lightning")
@pytest.mark.filterwarnings("ignore")  # lightning's own
def test_lightning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = lightning_run()
    logged = names["trainer"].logged_metrics
    assert logged["rank_lambda"] == 2
    assert logged.keys() >= {"contrastive_loss", "cross_modal_loss", "in_modal_loss", "val_loss"}
    assert moved(weights(names["model"]))


def own_loop(rank: int, world_size: int) -> list[float]:
    """The page's loop; each process has its share of the batches of one.

    Returns:
        The last step's loss, as the page has it logged, and the weights.
    """
    model: nn.Module = Towers(returns_scale=True)
    if world_size > 1:
        model = DistributedDataParallel(model)
    batches = [tuple(x.chunk(world_size)[rank] for x in batch) for batch in DataLoader(pairs(), 16)] * EPOCHS
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    names = {"model": model, "batches": batches, "optimizer": optimizer, "total_steps": len(batches)}
    exec(block("Your own loop, with DDP"), names)
    assert names["criterion"].schedule_value == 2
    value = names["loss"].detach()
    if world_size > 1:
        torch.distributed.all_reduce(value)  # for the log
    return [value.item() / world_size, *weights(model)]


def test_own_loop_in_two_processes_is_the_one_in_one(pools: Pools) -> None:
    alone = own_loop(0, 1)
    assert moved(alone[1:])
    for ended in pools[2].run(own_loop):
        assert ended == pytest.approx(alone, rel=1e-4, abs=1e-6)


def accelerated(rank: int, processes: int) -> list[float]:
    """The loss of all pairs after the training, as the page logs it, and the weights."""
    model = Towers(returns_scale=False)
    names = {
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "batches": DataLoader(pairs(), 16 // processes),
        "epochs": EPOCHS,
    }
    exec(block("accelerate"), names)
    assert names["criterion"].schedule_value == 2
    images, texts = pairs()[rank::processes]
    names["value"] = names["criterion"](*model(images, texts), model.logit_scale.exp())
    (logged,) = re.findall(r"^- For the log, `(.*?)`", PAGE.read_text(), re.MULTILINE)
    return [eval(logged, names).item(), *weights(model)]


def lightning_logged(rank: int, processes: int) -> list[float]:
    """The log at the end, and the weights."""
    names = lightning_run(rank, processes)
    logged = names["trainer"].logged_metrics
    return [*(logged[name].item() for name in sorted(logged)), *weights(names["model"])]


@pytest.mark.slow
@pytest.mark.parametrize(
    "run",
    [
        pytest.param("accelerated", marks=needs("accelerate")),
        pytest.param("lightning_logged", marks=needs("lightning")),
    ],
)
def test_two_processes_train_as_one_and_log_the_same(tmp_path: Path, run: str) -> None:
    for processes in (1, 2):
        torchrun(__file__, run, tmp_path, processes=processes)
    alone, *shares = (json.loads(file.read_text()) for file in sorted(tmp_path.glob("*.json")))
    assert moved(alone[-len(weights(Towers(returns_scale=True))) :])
    assert len(shares) == 2
    for ended in shares:
        assert ended == pytest.approx(alone, rel=1e-4, abs=1e-6)


def test_forks_script_is_the_one_that_the_trainers_are_tested_with() -> None:
    tests = (PAGE.parents[1] / "tests/rankloss_open_clip/test_attached_trainers.py").read_text()
    (by_hand,) = re.findall(r"^BY_HAND = (\(.*?^\))", tests, re.DOTALL | re.MULTILINE)
    assert block("open_clip before 2.26, and its forks").strip() == eval(by_hand)[1]


def test_class_for_a_trainer_that_wants_a_scalar() -> None:
    names: dict[str, Any] = {}
    exec(block("open_clip before 2.26, and its forks", 1), names)
    loss = names["RankLoss"](local_loss=True, gather_with_grad=True, cache_labels=True, rank=0, world_size=1)
    loss.set_progress(2, 3)
    model = Towers(returns_scale=True)
    with torch.no_grad():
        features = model(*pairs()[:8])
        assert loss(*features).shape == ()
        assert loss(*features) > rankloss.ClipLoss()(*features)


class Model(nn.Module):
    """Towers with the output of open_clip's models."""

    def __init__(self) -> None:
        super().__init__()
        self.towers = Towers(returns_scale=True)

    def forward(self, image: Tensor, text: Tensor) -> dict[str, Tensor]:
        names = ("image_features", "text_features", "logit_scale")
        return dict(zip(names, self.towers(image, text), strict=True))


def task(result: str) -> None:
    images, texts = pairs()[:8]
    names: dict[str, Any] = {"model": Model(), "images": images, "texts": texts, "step": 3, "total_steps": 4}
    exec(block("Tasks of open_clip's main branch"), names)
    assert all(p.grad is not None for p in names["model"].parameters())
    Path(result).write_text(json.dumps({name: value.item() for name, value in names["losses"].items()}))


def test_task_of_the_main_branch(tmp_path: Path) -> None:
    torchrun(__file__, "task", tmp_path / "losses.json", processes=1, path=unpacked(tmp_path))
    losses = json.loads((tmp_path / "losses.json").read_text())
    total = losses.pop("loss")
    assert set(losses) == {"contrastive_loss", "cross_modal_loss", "in_modal_loss"}
    assert total == pytest.approx(sum(losses.values()))


if __name__ == "__main__":
    name, path = sys.argv[1:]
    if name == "task":
        task(path)
    else:
        rank, processes = (int(os.environ.get(x, n)) for x, n in (("RANK", "0"), ("WORLD_SIZE", "1")))
        os.chdir(path)
        ended = {"accelerated": accelerated, "lightning_logged": lightning_logged}[name](rank, processes)
        Path(f"{processes}-{rank}.json").write_text(json.dumps(ended))
