"""The code of the pages: with a prompt it is a doctest, else it is quoted from an example, or run here.

Examples are run by ``tests/examples/test_trainer_examples.py``, console blocks are read by
``tests/docs/test_commands.py``.
"""

from __future__ import annotations

import doctest
import importlib
import json
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import Tensor

import rankloss
from batches import unit
from memory import saved_bytes
from open_clip_main import unpacked
from rankloss_features import Features
from rankloss_trainers import create
from rankloss_trainers.catalog import choose
from rankloss_trainers.declared import Named
from rankloss_trainers.run_options import RunOptions, Teacher
from rankloss_trainers.runtime import Runtime
from registered import register

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
LOSSES = (ROOT / "docs/losses.md").read_text(encoding="utf-8")
WRITING_TEXT = (ROOT / "docs/writing.md").read_text(encoding="utf-8")
EXAMPLES = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "examples/trainers").glob("*.py")}

sys.path += [str(Path(__file__).parent / name) for name in ("rankloss_trainers", "rankloss_features")]


def blocks(text: str, language: str = "python") -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


README = (ROOT / "README.md").read_text(encoding="utf-8")
PROMPTED = [page for page in PAGES if ">>> " in page.read_text(encoding="utf-8")]
ELSEWHERE = "CLIPTask("  # of code that runs on a branch of the trainer
CODE = [
    pytest.param(page.name, code, id=f"{page.stem} {number}", marks=[pytest.mark.slow] * (ELSEWHERE in code))
    for page in PAGES
    for number, code in enumerate(blocks(page.read_text(encoding="utf-8")))
    if ">>> " not in code and page.stem != "your_data"  # tests/docs/test_your_data.py runs it
]


@pytest.mark.parametrize("page", PROMPTED, ids=lambda page: page.name)
def test_examples_with_a_prompt_run(page: Path) -> None:
    failures, count = doctest.testfile(str(page), module_relative=False)
    assert count > 0
    assert failures == 0


def test_the_loop_of_the_readme_trains(capsys: pytest.CaptureFixture[str]) -> None:
    """It can be pasted: it has all that it names, and prints terms whose sum falls."""
    torch.manual_seed(0)
    (code,) = [code for code in blocks(README) if "optimizer.step()" in code]
    exec(code, {})
    printed = [line.partition(" ")[2] for line in capsys.readouterr().out.splitlines()]
    terms = [json.loads(line.replace("'", '"')) for line in printed]
    assert len(terms) == 4
    assert {*terms[-1]} == {"contrastive_loss", "cross_modal_loss", "in_modal_loss"}
    assert terms[-1]["contrastive_loss"] < terms[0]["contrastive_loss"] / 2


@pytest.mark.parametrize(
    "loss", ["SpreadLoss()", "ClipLoss()", "RankConsistency()", "RankClipLoss(ClipLoss())"]
)
def test_the_loop_of_the_readme_takes_any_loss_of_pairs(
    loss: str, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    (code,) = [code for code in blocks(README) if "optimizer.step()" in code]
    assert "RankClipLoss()" in code
    other = re.sub(r"(\w+Loss|RankConsistency)\(", r"rankloss.\1(", loss)
    executed(code.replace("rankloss.RankClipLoss()", other))
    assert len(capsys.readouterr().out.splitlines()) == 4


CALLS = {  # of a loss by its name, and as a class
    calls[0].split('"')[1]: (calls[0], calls[-1])
    for line in re.findall(r"^- \*\*Call\*\*: (.*)$", LOSSES, re.MULTILINE)
    if len(calls := re.findall(r"`((?:create|rankloss\w*\.\w+)\(.*?\))`", line)) > 1
}


@pytest.mark.parametrize("name", CALLS)
def test_both_calls_of_a_loss_are_told_alike_and_have_one_value(name: str) -> None:
    if "rankloss_baselines" in CALLS[name][1]:
        pytest.importorskip("rankloss_baselines")
    inputs = importlib.import_module("named_inputs").inputs_of(name)
    if "query_features" in inputs:  # the loss by its name also trains pairs, where there are some
        inputs = {key: x for key, x in inputs.items() if key not in ("image_features", "text_features")}
    imports = "import rankloss, rankloss_baselines; from rankloss_trainers import create"
    losses = [executed(f"loss = {call}", imports)["loss"] for call in CALLS[name]]
    values = []
    for loss in losses:
        with pytest.raises(ValueError, match="step must be at most total_steps; got step=4, total_steps=3"):
            loss.set_progress(4, 3)
        with pytest.raises(ValueError, match="epoch must be an integer of at least 1; got 0"):
            loss.set_epoch(0, 3)
        loss.set_epoch(1, 3)
        loss.set_progress(2, 3)
        values.append(loss(**inputs))
    assert torch.equal(*values)


# --- quotations -------------------------------------------------------------------------------------------


def quoted_from(code: str) -> list[str]:
    """The examples that have the code: its paragraphs in their order, each as deep as it stands there."""

    def has(text: str) -> bool:
        start = 0
        for part in re.split(r"\n{2,}", code.strip("\n")):
            ends = (text.find(f"\n{textwrap.indent(part, ' ' * depth)}\n", start) for depth in (0, 4, 8, 12))
            start = max(ends)
            if start < 0:
                return False
        return True

    return [name for name, text in EXAMPLES.items() if has(text)]


@pytest.mark.parametrize(("page", "code"), CODE)
def test_code_without_a_prompt_is_quoted_or_run(
    page: str, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    examples = quoted_from(code)
    if examples:
        before = (ROOT / "docs" / page).read_text(encoding="utf-8").partition(code)[0]
        links = re.findall(r"\]\(\.\./examples/trainers/(\w+\.py)\)", before)
        assert links, f"{page} does not link the example"
        assert links[-1] in examples
        return
    runs = [run for mark, run in RUNS.items() if mark in code]
    assert len(runs) == 1, "code of a page is quoted from an example, or has a function below that runs it"
    monkeypatch.chdir(tmp_path)
    runs[0](code)


def test_every_short_example_is_linked() -> None:
    pages = "".join(page.read_text() for page in PAGES)
    linked = {*re.findall(r"examples/trainers/(\w+\.\w+)", pages)}
    assert linked == {x.name for x in (ROOT / "examples/trainers").glob("*.*")}


def test_pages_that_the_code_names_are_there() -> None:
    for folder in ("rankloss", "integrations"):
        for path in (ROOT / folder).rglob("*.py"):
            pages = re.findall(r"\bdocs/[\w/]+\.md\b", path.read_text(encoding="utf-8"))
            assert [page for page in pages if not (ROOT / page).exists()] == [], path


# --- what is run: the names that a page takes for granted, and what its code has to bring about -------------


def executed(code: str, imports: str = "", **names: Any) -> dict[str, Any]:
    """What a page's code makes of imports and of names."""
    exec(f"{imports}\n{code}", names)
    return names


OF_TRANSFORMERS = "from rankloss_trainers.transformers import ContrastiveTrainer"
OF_SENTENCES = "import numpy as np; from rankloss_trainers.sentence_transformers import ContrastiveLoss"


def options_of_a_script(code: str) -> None:
    tiny = pytest.importorskip("tiny_transformers")
    imports = f"{OF_TRANSFORMERS}; from transformers import HfArgumentParser, TrainingArguments"
    imports += "; from rankloss_trainers.command_line import LossArguments"
    typed = ["--rankclip-top-k=3", "--output_dir=out", "--max_steps=2", "--logging_steps=1", "--use_cpu=1"]
    with patch.object(sys, "argv", ["script.py", *typed]):
        trainer = executed(code, imports, model=tiny.clip(), pairs=tiny.Pairs(8))["trainer"]
    trainer.train()
    assert trainer.loss_runtime.losses[0].values["top_k"] == 3
    assert tiny.lines(trainer, "in_modal_loss")


def hard_negatives(code: str) -> None:
    datasets = pytest.importorskip("datasets")
    row = {"query": "a.png", "caption": "a dog", "negatives": ["a cat", "no dog"]}
    lists = executed(code, pairs=datasets.Dataset.from_list([row]))["lists"]
    candidates = ["a dog", "a cat", "no dog"]
    assert lists[0] == {"query": "a.png", "own": "a dog", "candidates": candidates, "grades": [1, 0, 0]}


def lists_of_sentences(code: str) -> None:
    tiny = pytest.importorskip("tiny_sentences")
    words = tiny.WORDS
    rows = [{"query": words[n], "candidates": words[10 + n : 12 + n], "label": [n % 2, 2]} for n in range(8)]
    model, before = tiny.tiny(), tiny.weights(tiny.tiny())
    args = tiny.SentenceTransformerTrainingArguments(
        "out", use_cpu=True, report_to="none", disable_tqdm=True, max_steps=1, save_strategy="no"
    )
    executed(code, model=model, args=args, lists=tiny.datasets.Dataset.from_list(rows))
    assert not torch.equal(tiny.weights(model), before)


def taught(width: int, **columns: Any) -> Any:
    """Pairs whose teacher's features are in the folder ``teacher``."""
    datasets, made = pytest.importorskip("datasets"), importlib.import_module("taught")
    names = {"image": "{}.png", "caption": "word{}"}
    columns = {name: [x.format(n) for n in range(made.ROWS)] for name, x in names.items()} | columns
    data = datasets.Dataset.from_dict(columns)
    made.folder(Path("teacher"), data, made.features(width), "image", "caption")
    return data


def taught_in_transformers(code: str) -> None:
    tiny, pairs = pytest.importorskip("tiny_transformers"), taught(12)  # wider than the model's 8

    def processor(images: list[str], text: list[str], **_: Any) -> dict[str, Tensor]:
        rows = [int(Path(image).stem) for image in images]
        assert text == [f"word{row}" for row in rows]
        return {name: x[rows] for name, x in tiny.Pairs(len(pairs)).columns.items()}

    names = {"TrainingArguments": lambda _, **given: tiny.arguments(Path(), max_steps=2, **given)}
    names |= {"model": tiny.clip(), "processor": processor, "pairs": pairs}
    trainer = executed(code, OF_TRANSFORMERS, **names)["trainer"]
    trainer.train()
    assert tiny.lines(trainer)[-1]["mimicry_loss"] > 0


def taught_sentences(code: str) -> None:
    tiny = pytest.importorskip("tiny_sentences")
    pairs = taught(20, image=tiny.WORDS[:-33:-1])  # wider than the model's 16
    if "teacher.encode" in code:
        pairs = pairs.rename_columns({"image": "question", "caption": "answer"})
    model = tiny.tiny()
    with patch("rankloss_features.caching.compute_features", return_value="teacher") as computing:
        names = executed(code, OF_SENTENCES, model=model, teacher=tiny.tiny(), pairs=pairs, create=create)
    for call in computing.call_args_list:
        Teacher(call.args[0]).check()
        assert call.args[1] is pairs
    ended = tiny.train(Path(), names["loss"], model, train_dataset=names["pairs"], max_steps=2)
    assert ended.state.log_history[-2]["mimicry_loss" if "mimicry" in code else "in_modal_loss"] > 0


def several_teachers(code: str) -> None:
    rows = np.arange(len(taught(6)))
    Path("teacher").rename("first")
    taught(4)
    Path("teacher").rename("second")
    executed(code, np=np, Features=Features, rows=rows)
    folders = [dict(np.load("both.npz")), *(Features(name).take(rows) for name in ("first", "second"))]
    both, *each = ([x / np.linalg.norm(x, axis=1, keepdims=True) for x in of.values()] for of in folders)
    np.testing.assert_allclose(both[0] @ both[1].T, sum(x @ y.T for x, y in each) / 2, atol=2e-3)


def own_script_of_a_fork(code: str) -> None:
    """It attaches, and starts the trainer with its arguments."""
    training, started = ModuleType("training"), []
    training.main = main = ModuleType("training.main")  # type: ignore[attr-defined]

    def train_one_epoch(model: Any, data: Any, loss: Any, epoch: int, args: Any) -> None:
        pass

    own = {"create_loss": lambda args: args, "parse_args": lambda args: args, "main": started.append}
    vars(main).update(own, train_one_epoch=train_one_epoch)
    with patch.dict(sys.modules, {"training": training, "training.main": main}):
        executed(code)
    assert started == [sys.argv[1:]]
    for name in ("create_loss", "parse_args", "train_one_epoch"):
        assert hasattr(vars(main)[name], "__wrapped__"), name


def loss_that_is_a_scalar(code: str) -> None:
    make = executed(code)["RankLoss"]
    loss = make(local_loss=True, gather_with_grad=True, cache_labels=True, rank=0, world_size=1)
    loss.set_progress(2, 3)
    features = torch.nn.functional.normalize(torch.randn(2, 8, 4), dim=-1)
    assert loss(*features, 10.0).shape == ()
    assert loss(*features, 10.0) > rankloss.ClipLoss()(*features, 10.0)


def streamed_loss(code: str) -> None:
    """It has the value and the gradients of whole matrices, and keeps none."""
    loss = executed(code)["DecoupledLoss"](chunk_size=7)

    def from_matrices(v: Tensor, t: Tensor, s: Tensor, b: Tensor) -> Tensor:
        scores = s * v @ t.T + b
        own, others = scores.diag(), scores.masked_fill(torch.eye(len(v), dtype=torch.bool), -torch.inf)
        return (others.logsumexp(0) + others.logsumexp(1) - 2 * own).mean() / 2

    def inputs(n: int, dtype: torch.dtype) -> list[Tensor]:
        features = torch.nn.functional.normalize(torch.randn(2, n, 4, dtype=dtype), dim=-1)
        return [*features.unbind(), torch.tensor(10.0, dtype=dtype), torch.tensor(-2.0, dtype=dtype)]

    few = [x.requires_grad_() for x in inputs(30, torch.float64)]
    value, owed = loss(*few), from_matrices(*few)
    torch.testing.assert_close(value, owed)
    slopes = [torch.autograd.grad(-1.3 * x, few) for x in (value, owed)]
    torch.testing.assert_close(*slopes)
    assert list(loss(*few, output_dict=True)) == ["contrastive_loss"]
    many = [x.requires_grad_() for x in inputs(1024, torch.float32)]
    assert saved_bytes(lambda: loss(*many)) < 5 * many[0].nbytes  # a matrix is 256 times the features


TASK = """
import json, pathlib, sys, torch

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.tower, self.logit_scale = torch.nn.Linear(6, 4), torch.nn.Parameter(torch.tensor(2.0))

    def forward(self, image, text):
        images, texts = (torch.nn.functional.normalize(self.tower(x)) for x in (image, text))
        return {"image_features": images, "text_features": texts, "logit_scale": self.logit_scale.exp()}

model, (images, texts), step, total_steps = Model(), torch.randn(2, 8, 6), 3, 4
exec(pathlib.Path("code.py").read_text())
assert all(x.grad is not None for x in model.parameters())
print(json.dumps({name: value.item() for name, value in losses.items()}))
"""


def task_of_the_main_branch(code: str) -> None:
    Path("code.py").write_text(code)
    path = os.pathsep.join(filter(None, [unpacked(Path()), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-c", TASK], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    losses = json.loads(done.stdout.splitlines()[-1])
    total = losses.pop("loss")
    assert set(losses) == {"contrastive_loss", "cross_modal_loss", "in_modal_loss"}
    assert total == pytest.approx(sum(losses.values()))


def loss_that_copies(code: str) -> None:
    """It is refused as the page says, and copies the folder's components of a wider teacher."""
    make, host = executed(code)["CopyLoss"], importlib.import_module("named_inputs").HOST
    shown = WRITING_TEXT.partition(code)[2]
    ((teacher, error),) = re.findall(r"`--loss copy --loss-teacher (\S+)` .*: `([^`]*)`", shown, re.DOTALL)
    with pytest.MonkeyPatch.context() as patch:
        register(patch, copy=make)
        with pytest.raises(ValueError, match=" ".join(error.split())):
            Runtime(host, choose("copy"), RunOptions(teacher=teacher))
        taught(12)
        run = Runtime(host, choose("copy"), RunOptions(teacher="teacher"))
    images, texts = (unit(8, 4, seed=seed, dtype=torch.float32) for seed in (0, 1))
    reference = torch.from_numpy(Features("teacher").take(np.arange(8))["text_features"])
    features = {"image_features": images, "text_features": texts, "reference_text_features": reference}
    terms = run(**features, logit_scale=5.0).terms
    projected = torch.nn.functional.normalize(reference @ run.criterion.components, dim=-1)
    torch.testing.assert_close(terms["copy_loss"], (texts - projected).square().sum(-1).mean())


def logged_by_trainers(code: str) -> None:
    """The curves of the page are in TensorBoard's files."""
    tiny, sentences = pytest.importorskip("tiny_transformers"), pytest.importorskip("tiny_sentences")
    of_transformers, of_sentences = code.split("\n\n")

    def arguments(_: str, *, logging_steps: int, **named: Any) -> Any:
        return tiny.arguments(Path(), max_steps=2, **named)

    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("TENSORBOARD_LOGGING_DIR", "curves")
        names: dict[str, Any] = {"TrainingArguments": arguments, "pairs": tiny.Pairs(8), "model": tiny.clip()}
        executed(of_transformers, OF_TRANSFORMERS, **names)["trainer"].train()
    content = b"".join(path.read_bytes() for path in Path().rglob("events.out.tfevents*"))
    for curve in ("contrastive_loss", "in_modal_loss", "in_modal_raw", "rank_lambda", "in_modal_tau"):
        assert f"train/{curve}".encode() in content
    names = {"SentenceTransformerTrainingArguments": arguments, "model": sentences.tiny()}
    assert isinstance(executed(of_sentences, OF_SENTENCES, **names)["loss"], torch.nn.Module)


def logged_by_lightning(code: str) -> None:
    lightning = pytest.importorskip("lightning")
    imports = "from rankloss_trainers.lightning import Progress"
    trainer = executed(code, imports, lightning=lightning)["trainer"]
    assert type(trainer.logger).__name__ == "TensorBoardLogger"


def logged_by_a_loop(code: str) -> None:
    """Both writers get every term and λ."""
    criterion, features = rankloss.RankClipLoss(), torch.nn.functional.normalize(torch.randn(2, 8, 4), dim=-1)
    criterion.set_progress(2, 3)
    seen: dict[str, Any] = {}
    writer = SimpleNamespace(add_scalar=lambda name, value, step: seen.update({name: value}))
    wandb = SimpleNamespace(log=lambda logged, step: seen.update(all=logged))
    named = {"criterion": criterion, "images": features[0], "texts": features[1], "scale": 10.0, "step": 1}
    executed(code, writer=writer, wandb=wandb, **named)
    assert seen.pop("all") == seen
    assert set(seen) == {"contrastive_loss", "cross_modal_loss", "in_modal_loss", "rank_lambda"}
    assert seen["rank_lambda"] > 0


RUNS: dict[str, Callable[[str], None]] = {
    'report_to="tensorboard"': logged_by_trainers,
    "TensorBoardLogger(": logged_by_lightning,
    "writer.add_scalar(": logged_by_a_loop,
    "HfArgumentParser(": options_of_a_script,
    "pairs.map(": hard_negatives,
    "RankedListsTrainer(": lists_of_sentences,
    "def encoded(rows)": taught_in_transformers,
    'column="label")': taught_sentences,
    "teacher.encode": taught_sentences,
    "np.savez(": several_teachers,
    "import sys, rankloss_open_clip": own_script_of_a_fork,
    "class RankLoss": loss_that_is_a_scalar,
    "class DecoupledLoss": streamed_loss,
    "class CopyLoss": loss_that_copies,
    ELSEWHERE: task_of_the_main_branch,
}
"""By a mark in the code."""


# --- the page of writing a loss ---------------------------------------------------------------------------


def test_writing_a_loss_takes_20_lines_and_is_registered_as_the_tests_package_is() -> None:
    text = WRITING_TEXT
    for code in blocks(text):
        assert len([line for line in code.splitlines() if line.strip()]) <= 20
    ((header, name, class_),) = re.findall(r'^(\[.*\])\n(\w+) = "\w+:(\w+)"', blocks(text, "toml")[0])
    package = ROOT / "tests/rankloss_open_clip/third_party_loss"
    assert header in (package / "pyproject.toml").read_text(encoding="utf-8")
    assert f"class {class_}(" in blocks(text)[0]
    assert f"--loss {name} " in text


def test_writing_a_loss_names_the_facts_of_a_row() -> None:
    shown = re.findall(r"^\| `(\w+)` \|", WRITING_TEXT, re.MULTILINE)
    assert [x for x in shown if x in Named.__dataclass_fields__] == [*Named.__dataclass_fields__]


def test_writing_a_loss_lists_the_attributes_that_the_trainers_read() -> None:
    """All that they ask a part of a loss for, but its base and its gathering."""
    table = WRITING_TEXT.partition("| attribute | meaning |")[2].partition("\n\n")[0]
    asked = re.compile(r'(?:get|has)attr\((?:type\()?(?:part|of_pairs)\)?, "(\w+)"')
    files = (ROOT / "integrations/rankloss_trainers").rglob("*.py")
    read = {name for path in files for name in asked.findall(path.read_text(encoding="utf-8"))}
    assert {*re.findall(r"^\| `(\w+)", table, re.MULTILINE)} == read - {"base", "gather"}
