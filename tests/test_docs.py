"""The code of the pages: with a prompt it is a doctest, else it is quoted from an example, or run here.

Examples are run by ``tests/examples/test_trainer_examples.py``, console blocks are read by
``tests/docs/test_commands.py``.
"""

from __future__ import annotations

import ast
import doctest
import importlib
import json
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
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
    """The blocks of a language that stand between fences."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


README = (ROOT / "README.md").read_text(encoding="utf-8")
PROMPT = ">>> "
PROMPTED = [page for page in PAGES if PROMPT in page.read_text(encoding="utf-8")]
PRINTS_OF_README = 4  # the steps after which its loop prints
OF_MAIN_BRANCH = "CLIPTask("
"""A mark of code that needs a branch of the trainer."""


def code_without_prompt() -> Iterator[Any]:
    """The pages' names and their blocks of code; tests/docs/test_your_data.py has those of its page."""
    for page in PAGES:
        if page.stem == "your_data":
            continue
        for number, code in enumerate(blocks(page.read_text(encoding="utf-8"))):
            if PROMPT not in code:
                marks = [pytest.mark.slow] if OF_MAIN_BRANCH in code else []
                yield pytest.param(page.name, code, id=f"{page.stem} {number}", marks=marks)


@pytest.mark.parametrize("page", PROMPTED, ids=lambda page: page.name)
def test_examples_with_a_prompt_run(page: Path) -> None:
    failures, count = doctest.testfile(str(page), module_relative=False)
    assert count > 0
    assert failures == 0


@pytest.fixture
def readme_loop() -> str:
    """The code of README's training loop, which begins at one seed."""
    torch.manual_seed(0)
    (code,) = [code for code in blocks(README) if "optimizer.step()" in code]
    return code


def test_the_loop_of_the_readme_trains(readme_loop: str, capsys: pytest.CaptureFixture[str]) -> None:
    """It can be pasted: it has all that it names, and prints terms, of which CLIP's own falls by half."""
    exec(readme_loop, {})
    after_the_step = [line.partition(" ")[2] for line in capsys.readouterr().out.splitlines()]
    printed_terms = [ast.literal_eval(text) for text in after_the_step]
    assert len(printed_terms) == PRINTS_OF_README
    first, *_, last = printed_terms
    assert {*last} == {"contrastive_loss", "cross_modal_loss", "in_modal_loss"}
    assert last["contrastive_loss"] < first["contrastive_loss"] / 2


@pytest.mark.parametrize(
    "loss",
    [
        "rankloss.SpreadLoss()",
        "rankloss.ClipLoss()",
        "rankloss.RankConsistency()",
        "rankloss.RankClipLoss(rankloss.ClipLoss())",
    ],
)
def test_the_loop_of_the_readme_takes_any_loss_of_pairs(
    readme_loop: str, loss: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "rankloss.RankClipLoss()" in readme_loop  # or nothing would be replaced
    executed(readme_loop.replace("rankloss.RankClipLoss()", loss))
    assert len(capsys.readouterr().out.splitlines()) == PRINTS_OF_README


def documented_calls() -> dict[str, tuple[str, str]]:
    """By its name, a loss as the page calls it by this name, and as a class."""
    calls_by_name = {}
    for line in re.findall(r"^- \*\*Call\*\*: (.*)$", LOSSES, re.MULTILINE):
        calls = re.findall(r"`((?:create|rankloss\w*\.\w+)\(.*?\))`", line)
        if len(calls) > 1:
            by_name, as_class = calls[0], calls[-1]
            (name,) = re.findall(r'^create\("([^"]+)"', by_name)
            calls_by_name[name] = by_name, as_class
    return calls_by_name


CALLS = documented_calls()
any_call = pytest.mark.parametrize(("name", "as_class"), [(name, x) for name in CALLS for x in (False, True)])


def loss_of_call(call: str) -> Any:
    """What a call of the page builds."""
    if "rankloss_baselines" in call:
        pytest.importorskip("rankloss_baselines")
    imports = "import rankloss, rankloss_baselines; from rankloss_trainers import create"
    return executed(f"loss = {call}", imports)["loss"]


@pytest.mark.parametrize("name", CALLS)
def test_both_calls_of_a_loss_have_one_value(name: str) -> None:
    """Of the inputs that the tests of trainers have for the loss of this name."""
    inputs = importlib.import_module("named_inputs").inputs_of(name)
    if "query_features" in inputs:  # the loss by its name also trains pairs, where there are some
        inputs = {key: x for key, x in inputs.items() if key not in ("image_features", "text_features")}
    values = []
    for call in CALLS[name]:
        loss = loss_of_call(call)
        loss.set_epoch(1, 3)
        loss.set_progress(2, 3)
        values.append(loss(**inputs))
    assert torch.equal(*values)


@any_call
def test_both_calls_of_a_loss_refuse_a_progress_that_cannot_be(name: str, as_class: bool) -> None:
    by_name, of_class = CALLS[name]
    loss = loss_of_call(of_class if as_class else by_name)
    with pytest.raises(ValueError, match="step must be at most total_steps; got step=4, total_steps=3"):
        loss.set_progress(4, 3)
    with pytest.raises(ValueError, match="epoch must be an integer of at least 1; got 0"):
        loss.set_epoch(0, 3)


# --- quotations -------------------------------------------------------------------------------------------


def quoted_from(code: str) -> list[str]:
    """The names of the examples that have the code's paragraphs, in their order."""
    return [name for name, example in EXAMPLES.items() if has_paragraphs(example, code)]


def has_paragraphs(example: str, code: str) -> bool:
    """Whether the paragraphs stand in the example one after another, each at any depth of indentation."""
    start = 0
    for paragraph in re.split(r"\n{2,}", code.strip("\n")):
        indented = [textwrap.indent(paragraph, " " * depth) for depth in (0, 4, 8, 12)]
        start = max(example.find(f"\n{lines}\n", start) for lines in indented)
        if start < 0:  # at no depth
            return False
    return True


@pytest.mark.parametrize(("page", "code"), [*code_without_prompt()])
def test_code_without_a_prompt_is_quoted_or_run(
    page: str, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    examples = quoted_from(code)
    if examples:  # which another test runs
        before, _, _ = (ROOT / "docs" / page).read_text(encoding="utf-8").partition(code)
        links = re.findall(r"\]\(\.\./examples/trainers/(\w+\.py)\)", before)
        assert links, f"{page} does not link the example"
        assert links[-1] in examples, "the last link before the code is to the example"
        return
    runs = [run for mark, run in RUNS.items() if mark in code]
    assert len(runs) == 1, "code of a page is quoted from an example, or has a function below that runs it"
    monkeypatch.chdir(tmp_path)  # where the code may write
    runs[0](code)


def test_every_short_example_is_linked() -> None:
    pages = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    linked = {*re.findall(r"examples/trainers/(\w+\.\w+)", pages)}
    assert linked == {example.name for example in (ROOT / "examples/trainers").glob("*.*")}


PAGE_NAMED = re.compile(r"\bdocs/[\w/-]+\.md\b")


def test_pages_that_the_code_names_are_there() -> None:
    """Such as ``docs/method.md`` in a docstring or an error."""
    files = [file for folder in ("rankloss", "integrations") for file in (ROOT / folder).rglob("*.py")]
    named = {(page, file) for file in files for page in PAGE_NAMED.findall(file.read_text(encoding="utf-8"))}
    assert len(named) > 5  # so that none passes because none was found
    assert [place for place in named if not (ROOT / place[0]).exists()] == []


# --- what is run: the names that a page takes for granted, and what its code has to bring about -------------


def executed(code: str, imports: str = "", **names: Any) -> dict[str, Any]:
    """The names after the code has run with imports and with these names."""
    exec(f"{imports}\n{code}", names)
    return names


OF_TRANSFORMERS = "from rankloss_trainers.transformers import ContrastiveTrainer"
OF_SENTENCES = "import numpy as np; from rankloss_trainers.sentence_transformers import ContrastiveLoss"


def options_of_a_script(code: str) -> None:
    """An option that is typed reaches the loss of a training."""
    tiny = pytest.importorskip("tiny_transformers")
    imports = f"{OF_TRANSFORMERS}; from transformers import HfArgumentParser, TrainingArguments"
    imports += "; from rankloss_trainers.command_line import LossArguments"
    typed = ["--rankclip-top-k=3", "--output_dir=out", "--max_steps=2", "--logging_steps=1", "--use_cpu=1"]
    with patch.object(sys, "argv", ["script.py", *typed]):
        trainer = executed(code, imports, model=tiny.tiny_clip(), pairs=tiny.Pairs(8))["trainer"]
    trainer.train()
    assert trainer.loss_runtime.losses[0].values["top_k"] == 3
    assert tiny.logged_lines(trainer, "in_modal_loss")


def hard_negatives(code: str) -> None:
    """Rows of one caption and its negatives become graded lists."""
    datasets = pytest.importorskip("datasets")
    row = {"query": "a.png", "caption": "a dog", "negatives": ["a cat", "no dog"]}
    lists = executed(code, pairs=datasets.Dataset.from_list([row]))["lists"]
    candidates = ["a dog", "a cat", "no dog"]
    assert lists[0] == {"query": "a.png", "own": "a dog", "candidates": candidates, "grades": [1, 0, 0]}


def lists_of_sentences(code: str) -> None:
    """The code trains the model."""
    tiny = pytest.importorskip("tiny_sentences")
    queries, candidates = tiny.WORDS[:8], tiny.WORDS[10:]
    rows = [
        {"query": query, "candidates": candidates[row : row + 2], "label": [row % 2, 2]}
        for row, query in enumerate(queries)
    ]
    model = tiny.tiny_model()
    weights_before = tiny.weights(tiny.tiny_model())
    args = tiny.SentenceTransformerTrainingArguments(
        "out", use_cpu=True, report_to="none", disable_tqdm=True, max_steps=1, save_strategy="no"
    )
    executed(code, model=model, args=args, lists=tiny.datasets.Dataset.from_list(rows))
    assert not torch.equal(tiny.weights(model), weights_before)


def pairs_with_teacher(width: int, *, images: list[str] | None = None) -> Any:
    """Pairs ``0.png``, ``word0`` and so on, whose teacher's features are in the folder ``teacher``."""
    datasets, made = pytest.importorskip("datasets"), importlib.import_module("taught")
    images = images or [f"{row}.png" for row in range(made.ROWS)]
    captions = [f"word{row}" for row in range(made.ROWS)]
    pairs = datasets.Dataset.from_dict({"image": images, "caption": captions})
    made.write_teacher_folder(
        Path("teacher"), pairs, made.teacher_features(width), image_column="image", caption_column="caption"
    )
    return pairs


def taught_in_transformers(code: str) -> None:
    """A training with the teacher's folder copies the teacher, which is wider than the model's 8."""
    tiny = pytest.importorskip("tiny_transformers")
    pairs = pairs_with_teacher(12)

    def processor(images: list[str], text: list[str], **_: Any) -> dict[str, Tensor]:
        """The model's inputs by the rows of the images, whose captions are of the same rows."""
        rows = [int(Path(image).stem) for image in images]
        assert text == [f"word{row}" for row in rows]
        return {name: column[rows] for name, column in tiny.Pairs(len(pairs)).columns.items()}

    def training_arguments(_: str, **named: Any) -> Any:
        return tiny.arguments(Path(), max_steps=2, **named)

    names = {"TrainingArguments": training_arguments, "model": tiny.tiny_clip()}
    trainer = executed(code, OF_TRANSFORMERS, **names, processor=processor, pairs=pairs)["trainer"]
    trainer.train()
    assert tiny.logged_lines(trainer)[-1]["mimicry_loss"] > 0


def taught_sentences(code: str) -> None:
    """A training with the teacher's folder, or features that the page computes, logs the teacher's term.

    The teacher is wider than the model's 16.
    """
    tiny = pytest.importorskip("tiny_sentences")
    last_words = tiny.WORDS[:-33:-1]  # as many as there are rows, which stand for pictures
    pairs = pairs_with_teacher(20, images=last_words)
    if "teacher.encode" in code:
        pairs = pairs.rename_columns({"image": "question", "caption": "answer"})
    model = tiny.tiny_model()
    with patch("rankloss_features.caching.compute_features", return_value="teacher") as computing:
        names = executed(
            code, OF_SENTENCES, model=model, teacher=tiny.tiny_model(), pairs=pairs, create=create
        )
    for call in computing.call_args_list:
        teacher_name, computed_pairs = call.args[:2]
        Teacher(teacher_name).check()
        assert computed_pairs is pairs
    ended = tiny.train(Path(), names["loss"], model, train_dataset=names["pairs"], max_steps=2)
    logged_last = ended.state.log_history[-2]  # the last has the training's times
    assert logged_last["mimicry_loss" if "mimicry" in code else "in_modal_loss"] > 0


def several_teachers(code: str) -> None:
    """Similarities of the joined teacher are the mean of each teacher's."""
    rows = np.arange(len(pairs_with_teacher(6)))
    Path("teacher").rename("first")
    pairs_with_teacher(4)
    Path("teacher").rename("second")
    executed(code, np=np, Features=Features, rows=rows)

    def similarities(features: dict[str, np.ndarray]) -> np.ndarray:
        images, texts = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in features.values())
        return images @ texts.T

    each = [similarities(Features(name).take(rows)) for name in ("first", "second")]
    joined = similarities(dict(np.load("both.npz")))
    np.testing.assert_allclose(joined, sum(each) / 2, atol=2e-3)  # a folder's features are float16


def own_script_of_a_fork(code: str) -> None:
    """It attaches, and starts the trainer with its arguments."""
    training, main = ModuleType("training"), ModuleType("training.main")
    training.main = main  # type: ignore[attr-defined]

    def train_one_epoch(model: Any, data: Any, loss: Any, epoch: int, args: Any) -> None:
        pass

    started_with: list[Any] = []
    of_fork = {"create_loss": lambda args: args, "parse_args": lambda args: args, "main": started_with.append}
    vars(main).update(of_fork, train_one_epoch=train_one_epoch)
    with patch.dict(sys.modules, {"training": training, "training.main": main}):
        executed(code)
    assert started_with == [sys.argv[1:]]
    for patched in ("create_loss", "parse_args", "train_one_epoch"):
        assert hasattr(vars(main)[patched], "__wrapped__"), patched


def loss_that_is_a_scalar(code: str) -> None:
    """It takes open_clip's arguments, and gives CLIP's loss with rank terms, which are positive."""
    of_open_clip = {"local_loss": True, "gather_with_grad": True, "cache_labels": True}
    loss = executed(code)["RankLoss"](**of_open_clip, rank=0, world_size=1)
    loss.set_progress(2, 3)
    features = torch.nn.functional.normalize(torch.randn(2, 8, 4), dim=-1)
    value = loss(*features, 10.0)
    assert value.shape == ()
    assert value > rankloss.ClipLoss()(*features, 10.0)


def loss_in_place_of_clips(code: str) -> None:
    """It has the value and the gradients of the docstring's formula, by its name, and may be a base."""
    loss = executed(code)["LogisticLoss"](margin=0.5)

    def by_pairs(images: Tensor, texts: Tensor, scale: Tensor) -> Tensor:
        n = len(images)
        values = []
        for i in range(n):
            own = scale * images[i] @ texts[i]
            for j in range(n):
                of_text, of_image = scale * images[i] @ texts[j], scale * images[j] @ texts[i]
                values += [(1 + (x - own + 0.5).exp()).log() for x in (of_text, of_image)]
        return torch.stack(values).mean()

    features = torch.nn.functional.normalize(torch.randn(2, 5, 4, dtype=torch.float64), dim=-1)
    inputs = [x.clone().requires_grad_() for x in (*features, torch.tensor(3.0, dtype=torch.float64))]
    value, owed = loss(*inputs), by_pairs(*inputs)
    torch.testing.assert_close(value, owed)
    gradients = torch.autograd.grad(-1.3 * value, inputs)
    torch.testing.assert_close(gradients, torch.autograd.grad(-1.3 * owed, inputs))
    with_ranks = rankloss.RankClipLoss(loss, schedule="constant")(*inputs, output_dict=True)
    torch.testing.assert_close(with_ranks["logistic_loss"], owed)
    assert {*with_ranks} == {"logistic_loss", "cross_modal_loss", "in_modal_loss"}


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

    of_30_pairs = [x.requires_grad_() for x in inputs(30, torch.float64)]
    value, owed = loss(*of_30_pairs), from_matrices(*of_30_pairs)
    torch.testing.assert_close(value, owed)
    gradients = torch.autograd.grad(-1.3 * value, of_30_pairs)
    torch.testing.assert_close(gradients, torch.autograd.grad(-1.3 * owed, of_30_pairs))
    assert list(loss(*of_30_pairs, output_dict=True)) == ["contrastive_loss"]
    of_1024_pairs = [x.requires_grad_() for x in inputs(1024, torch.float32)]
    bytes_of_features = of_1024_pairs[0].nbytes  # a matrix has 256 times as many
    # Both modalities with their gradients are 4.
    assert saved_bytes(lambda: loss(*of_1024_pairs)) < 5 * bytes_of_features


# What the page's code takes for granted, in a process that finds the main branch first; it prints the losses.
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
    """Run where open_clip's main branch is imported, it gives all losses, which add up, and all gradients."""
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
    loss, host = executed(code)["CopyLoss"], importlib.import_module("named_inputs").HOST
    _, _, shown = WRITING_TEXT.partition(code)
    # "`--loss copy --loss-teacher NAME` … : `the error`"
    ((teacher, error),) = re.findall(r"`--loss copy --loss-teacher (\S+)` .*: `([^`]*)`", shown, re.DOTALL)
    with pytest.MonkeyPatch.context() as patch:
        register(patch, copy=loss)
        with pytest.raises(ValueError, match=" ".join(error.split())):
            Runtime(host, choose("copy"), RunOptions(teacher=teacher))
        pairs_with_teacher(12)
        run = Runtime(host, choose("copy"), RunOptions(teacher="teacher"))
    images, texts = (unit(8, 4, seed=seed, dtype=torch.float32) for seed in (0, 1))
    reference = torch.from_numpy(Features("teacher").take(np.arange(8))["text_features"])
    features = {"image_features": images, "text_features": texts, "reference_text_features": reference}
    terms = run(**features, logit_scale=5.0).terms
    projected = torch.nn.functional.normalize(reference @ run.criterion.components, dim=-1)
    torch.testing.assert_close(terms["copy_loss"], (texts - projected).square().sum(-1).mean())


def logged_by_trainers(code: str) -> None:
    """A training by the first block writes the page's curves for TensorBoard; the second builds its loss."""
    tiny, sentences = pytest.importorskip("tiny_transformers"), pytest.importorskip("tiny_sentences")
    of_transformers, of_sentences = code.split("\n\n")

    def arguments(_: str, *, logging_steps: int, **named: Any) -> Any:
        """For two steps, each of which is logged."""
        return tiny.arguments(Path(), max_steps=2, **named)

    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("TENSORBOARD_LOGGING_DIR", "curves")
        names: dict[str, Any] = {
            "TrainingArguments": arguments,
            "pairs": tiny.Pairs(8),
            "model": tiny.tiny_clip(),
        }
        executed(of_transformers, OF_TRANSFORMERS, **names)["trainer"].train()
    content = b"".join(path.read_bytes() for path in Path().rglob("events.out.tfevents*"))
    for curve in ("contrastive_loss", "in_modal_loss", "in_modal_raw", "rank_lambda", "in_modal_tau"):
        assert f"train/{curve}".encode() in content
    names = {"SentenceTransformerTrainingArguments": arguments, "model": sentences.tiny_model()}
    assert isinstance(executed(of_sentences, OF_SENTENCES, **names)["loss"], torch.nn.Module)


def logged_by_lightning(code: str) -> None:
    """The trainer that it builds has a logger for TensorBoard."""
    lightning = pytest.importorskip("lightning")
    imports = "from rankloss_trainers.lightning import Progress"
    trainer = executed(code, imports, lightning=lightning)["trainer"]
    assert type(trainer.logger).__name__ == "TensorBoardLogger"


def logged_by_a_loop(code: str) -> None:
    """Both writers get every term and λ."""
    criterion = rankloss.RankClipLoss()
    criterion.set_progress(step=2, total_steps=3)
    images, texts = (unit(8, 4, seed=seed, dtype=torch.float32) for seed in (0, 1))
    of_loop = {"criterion": criterion, "images": images, "texts": texts, "scale": 10.0, "step": 1}
    in_tensorboard: dict[str, Any] = {}
    in_wandb: dict[str, Any] = {}
    writer = SimpleNamespace(add_scalar=lambda name, value, step: in_tensorboard.update({name: value}))
    wandb = SimpleNamespace(log=lambda logged, step: in_wandb.update(logged))
    executed(code, writer=writer, wandb=wandb, **of_loop)
    assert in_tensorboard == in_wandb
    assert set(in_wandb) == {"contrastive_loss", "cross_modal_loss", "in_modal_loss", "rank_lambda"}
    assert in_wandb["rank_lambda"] > 0


# The function that runs a page's code, by a mark: a text that this code alone has.
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
    "class LogisticLoss": loss_in_place_of_clips,
    "class DecoupledLoss": streamed_loss,
    "class CopyLoss": loss_that_copies,
    OF_MAIN_BRANCH: task_of_the_main_branch,
}


def test_the_loop_of_several_processes_runs_as_the_page_puts_it_together() -> None:
    """With the imports that the page names, and what it says is the reader's."""
    page = (ROOT / "docs/loops.md").read_text(encoding="utf-8")
    (function,) = [code for code in blocks(page) if "def on_this_process" in code]
    (loop,) = [code for code in blocks(page) if code.startswith("device = log_scale.device")]
    (call,) = re.findall(r"`(model, batches = on_this_process\(.*?\))`", page)
    imports = (
        "import math, os, torch, rankloss_trainers; from torch.nn.parallel import DistributedDataParallel"
    )
    imports += "; from torch.utils.data import DataLoader, DistributedSampler"
    namespace = {"__name__": "plain_loop"}
    exec(EXAMPLES["plain_loop.py"], namespace)
    towers, (pairs, _) = namespace["Towers"](), namespace["made_pairs"]()
    before = towers.image.weight.detach().clone()
    names = {
        "towers": towers,
        "pairs": pairs,
        "epochs": 1,
        "log_scale": towers.logit_scale,
        "optimizer": torch.optim.AdamW(towers.parameters(), lr=1e-2),
    }
    with patch.object(torch.cuda, "device_count", return_value=0):
        names = executed(f"{function}\n{call}\n{loop}", imports, **names)
    assert names["step"] == names["total_steps"] == 10
    assert not torch.equal(towers.image.weight, before)


# --- the page of writing a loss ---------------------------------------------------------------------------


def test_writing_a_loss_takes_20_lines_at_most() -> None:
    for code in blocks(WRITING_TEXT):
        assert len([line for line in code.splitlines() if line.strip()]) <= 20


def test_writing_a_loss_registers_the_loss_that_it_writes_as_the_tests_package_does() -> None:
    entry_point = blocks(WRITING_TEXT, "toml")[0]  # ends with "[table]", then 'name = "module:Class"'
    ((table, name, class_name),) = re.findall(r'^(\[.*\])\n(\w+) = "\w+:(\w+)"', entry_point, re.MULTILINE)
    package = ROOT / "tests/rankloss_open_clip/third_party_loss"
    assert table in (package / "pyproject.toml").read_text(encoding="utf-8")
    assert f"class {class_name}(" in blocks(WRITING_TEXT)[0]
    assert f"--loss {name} " in WRITING_TEXT


def test_writing_a_loss_names_the_facts_of_a_row() -> None:
    facts = [*Named.__dataclass_fields__]
    first_columns = re.findall(r"^\| `(\w+)` \|", WRITING_TEXT, re.MULTILINE)
    assert [name for name in first_columns if name in facts] == facts


def test_writing_a_loss_lists_the_attributes_that_the_trainers_read() -> None:
    """All that they ask a part of a loss for, but its base and its gathering."""
    _, _, after_header = WRITING_TEXT.partition("| attribute | meaning |")
    table, _, _ = after_header.partition("\n\n")
    listed = {*re.findall(r"^\| `(\w+)", table, re.MULTILINE)}
    # getattr(part, "name"), hasattr(of_pairs, "name"), getattr(type(part), "name")
    reading = re.compile(r'(?:get|has)attr\((?:type\()?(?:part|of_pairs)\)?, "(\w+)"')
    files = (ROOT / "integrations/rankloss_trainers").rglob("*.py")
    read = {name for path in files for name in reading.findall(path.read_text(encoding="utf-8"))}
    assert listed == read - {"base", "gather"}
