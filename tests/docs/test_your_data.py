"""The page of one's own data: all its code runs on a sample, its tables are computed."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import page_runner
import pytest
import torch
from tools_folder import ROOT

PAGE = ROOT / "docs/your_data.md"
TEXT = PAGE.read_text(encoding="utf-8")
BLOCKS = [text for _, text in page_runner.blocks(TEXT)]


@dataclass(frozen=True)
class Done:
    """The page's commands and code, run one after another."""

    folder: Path
    blocks: list[dict[str, str]]
    """Of each block its ``text``, its ``output`` and its ``error``; the last is README's first training."""

    def block(self, words: str) -> dict[str, str]:
        """The only block with some words in its text."""
        (block,) = [block for block in self.blocks if words in block["text"]]
        return block

    def read(self, file: str) -> str:
        return (self.folder / file).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Done:
    for package in ("open_clip_train", "datasets", "transformers", "sentence_transformers", "peft", "timm"):
        pytest.importorskip(package)
    folder = tmp_path_factory.mktemp("your_data")
    command = [sys.executable, page_runner.__file__, str(PAGE), str(ROOT / "README.md")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    return Done(folder, json.loads((folder / "outputs.json").read_text(encoding="utf-8")))


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_every_command_and_code_of_the_page_runs(number: int, done: Done) -> None:
    block = done.blocks[number]
    assert block["text"] == BLOCKS[number]
    assert block["error"] == ""


def test_a_run_trains_the_loss_and_is_resumed(done: Done) -> None:
    log = done.read("logs/first/out.log")
    runs, lines_of_a_run = 2, 2  # a run writes its loss at the start and before training
    assert log.count("| Loss: clip-streamed (rankloss") == runs * lines_of_a_run
    assert "resuming checkpoint 'logs/first/checkpoints/epoch_1.pt'" in log
    assert log.count("Eval Epoch: 2 image_to_text_mean_rank") == 1  # the resumed run did not begin anew


def test_the_smaller_model_trains(done: Done) -> None:
    assert "Train Epoch: 0" in done.read("logs/small/out.log")


def test_a_trained_model_finds_pictures(done: Done) -> None:
    """The page prints the paths of three pictures for a caption, and of three for a picture."""
    printed = done.block("by_caption")["output"]
    assert len(re.findall(r"sample/pictures/[\w-]+\.png", printed)) == 6


def test_the_second_evaluation_is_of_the_trained_model(done: Done) -> None:
    """The gap between the modalities has moved, and by more than the rounding of one model's evaluation."""
    before, after = (json.loads(done.read(name))["modality_gap"] for name in ("before.json", "after.json"))
    assert before != pytest.approx(after, rel=1e-5)


def test_the_printed_recall_is_that_of_the_metrics(done: Done) -> None:
    by_metrics = re.search(r"image_to_image_R@5 ([\d.]+)", done.block("rankloss.metrics")["output"])
    evaluated = done.block("--against before.json")["output"]
    in_percent, *_ = re.findall(r"picture → picture +[\d.]+ \[[^]]*\] +([\d.]+)", evaluated)
    assert by_metrics is not None
    assert 100 * float(by_metrics[1]) == pytest.approx(float(in_percent), abs=0.1)


def test_code_that_loads_heads_prints_three_pictures(done: Done) -> None:
    printed = done.block("load_heads")["output"]
    assert len(set(re.findall(r"sample/pictures/[\w-]+\.png", printed))) == 3


HUGGING_FACE = " ContrastiveTrainer("


@pytest.mark.parametrize("trainer", [HUGGING_FACE, "SentenceTransformerTrainer("])
def test_trainings_in_python_log_their_loss(trainer: str, done: Done) -> None:
    block = next(block for block in done.blocks if trainer in block["text"])
    assert '"clip-streamed"' in block["text"]
    assert "'contrastive_loss':" in block["output"]


def test_a_pretrained_clip_is_fine_tuned_by_clips_own_loss() -> None:
    """No loss was compared on one."""
    text = " ".join(BLOCKS)
    losses = re.findall(r"--loss ([\w+-]+)", text)
    losses += re.findall(r'(?:loss=|ContrastiveLoss\(model, )"([\w+-]+)"', text)
    assert len(losses) == 8, "or the patterns above have missed one that the page names"
    assert set(losses) == {"clip-streamed"}


def test_hugging_faces_training_chooses_by_a_recall_that_is_not_saturated(done: Done) -> None:
    """No epoch is chosen by a recall that is 1 in all, nor by R@10, which is equal in all on few pairs."""
    block = next(block for block in done.blocks if HUGGING_FACE in block["text"])
    name, *_ = re.findall(r'metric_for_best_model="(.*)"', block["text"])
    values = [float(x) for x in re.findall(rf"'{re.escape(name)}': '?([\d.]+)", block["output"])]
    assert name == "eval_mean_R@1"
    assert len(values) == 4, "after each of the four epochs that page_runner leaves of five"
    assert max(values) < 1


def test_the_first_training_of_the_readme_is_on(done: Done) -> None:
    assert done.blocks[-1]["error"] == ""
    assert "| Loss: clip-ids (rankloss" in done.read("logs/sample/out.log")


def test_the_loss_of_the_first_training_of_the_readme_falls_from_chance(done: Done) -> None:
    log = done.read("logs/sample/out.log")
    losses = [float(x) for x in re.findall(r"Contrastive_loss: ([\d.]+) \(", log)]
    chance = math.log(16)  # of a batch of 16
    assert losses[0] == pytest.approx(chance, abs=0.5)
    assert losses[-1] < 0.6 * chance, "far below, whatever the processor"


def evaluation_of_the_page() -> str:
    return TEXT.partition("<!-- evaluated -->\n```text\n")[2].partition("```")[0]


NUMBER = re.compile(r"-?\d+\.\d+|\d+")


def test_the_words_of_the_pages_evaluation_are_the_commands(done: Done) -> None:
    printed = done.block("--json before.json")["output"]
    shown, words = (NUMBER.sub("n", text).split() for text in (evaluation_of_the_page(), printed))
    assert " ".join(shown) in " ".join(words)


def test_the_numbers_of_the_pages_evaluation_are_the_commands(done: Done) -> None:
    """As far as another processor leaves them: by two of the sample's 16 pictures, 12.5 points of recall."""
    printed = done.block("--json before.json")["output"]
    table = printed[printed.index("local-dir:") :]
    shown, two_pictures = NUMBER.findall(evaluation_of_the_page()), 13
    assert shown
    for of_page, of_command in zip(shown, NUMBER.findall(table), strict=True):
        assert float(of_page) == pytest.approx(float(of_command), abs=two_pictures)


def test_loras_checkpoint_is_an_ordinary_clip_with_trained_attention_and_projections(done: Done) -> None:
    transformers = pytest.importorskip("transformers")
    start, trained = (
        transformers.AutoModel.from_pretrained(done.folder / name).state_dict()
        for name in ("sample/transformers", "my-lora-clip")
    )
    assert start.keys() == trained.keys()
    changed = {name for name in start if not torch.equal(start[name], trained[name])}
    layers = {(name.split(".")[0], name.split(".")[-2]) for name in changed}
    assert layers == {
        ("vision_model", "q_proj"),
        ("vision_model", "v_proj"),
        ("text_model", "q_proj"),
        ("text_model", "v_proj"),
        ("visual_projection", "visual_projection"),
        ("text_projection", "text_projection"),
    }


def table(name: str) -> list[str]:
    """The rows of a table between two comments, without its head."""
    return TEXT.partition(f"<!-- {name} -->\n")[2].partition(f"<!-- /{name} -->")[0].splitlines()[2:]


def scores(report: str) -> dict[tuple[str, str], str]:
    """``mean ± half width`` of R@10 in a report, by cell and arm, without the number of seeds."""
    text = (ROOT / "examples/studies" / report).read_text(encoding="utf-8")
    rows = re.findall(
        r"^\| +([\w-]+) +\| +`([\w-]+)` +\| +(\d+\.\d\d ± \d\.\d\d) \(\d+\)", text, re.MULTILINE
    )
    return {(cell, arm): score for cell, arm, score in rows}


def settings_of_tested_heads(data: str) -> list[dict[str, Any]]:
    """The settings of the records of heads on the first split of a data set."""
    path = ROOT / f"examples/studies/alignment/results/{data}/records.jsonl"
    records = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    settings = [record["setting"] for record in records if "setting" in record]
    return [x for x in settings if (x["arm"], x["side"], x["split"]) == ("heads", "test", 0)]


def heads_command(setting: dict[str, Any]) -> str:
    """The options of ``rankloss heads`` that train so, with a rate as the page writes it: 5e-4."""
    rate = f"{setting['lr']:.0e}".replace("e-0", "e-")
    options = f"--epochs {setting['epochs']} --batch-size {setting['batch_size']} --lr {rate}"
    options = f"{options} --dropout {setting['dropout']:g}"
    smoothing = setting["label_smoothing"]
    return f"{options} --label-smoothing {smoothing:g}" if smoothing else options


def test_settings_of_heads_are_those_of_the_records() -> None:
    recall = scores("alignment/report/alignment.md")
    rows = []
    for data in ("emojis", "photographs", "icons", "icons-35840"):
        (options,) = {heads_command(setting) for setting in settings_of_tested_heads(data)}
        rows.append(f"| `{options}` | {recall[f'heads-{data}', 'heads']} |")
    assert [row[row.index("| `") :] for row in table("settings")] == rows


def test_recall_by_batch_is_that_of_the_clip_that_the_dev_side_chose() -> None:
    report = "captions/report/captions.md"
    text = (ROOT / "examples/studies" / report).read_text(encoding="utf-8")
    tries = text.partition("## CLIP's tries")[2]
    # By cell, the last column: the arm of CLIP's that was best on the dev side.
    chosen = dict(re.findall(r"^\| ([\w-]+) .*`([\w-]+)` \|$", tries, re.MULTILINE))
    recall = scores(report)
    for row, data in zip(table("batches"), ("emojis", "icons", "photographs"), strict=True):
        cells = (f"{data}-64", f"{data}-250")
        _, *shown = row.strip(" |").split(" | ")
        assert shown == [recall[cell, chosen[cell]] for cell in cells]


def share_with_a_partner(pictures: int, of_each: int, batch: int) -> float:
    """The probability that another picture of a product is among the other N - 1 of the batch.

    The other pictures of the product are drawn one after another, each into the rest of the batch or not.
    """
    without_one = 1.0
    for drawn in range(1, of_each):
        without_one *= 1 - (batch - 1) / (pictures - drawn)
    return 1 - without_one


def test_the_share_with_a_partner_is_that_of_drawn_batches() -> None:
    generator = torch.Generator().manual_seed(0)
    products = torch.arange(60) // 3
    shares = []
    for _ in range(4000):
        batch = products[torch.randperm(60, generator=generator)[:8]]
        has_partner = (batch[:, None] == batch).sum(dim=1) > 1
        shares.append(has_partner.double().mean())
    assert torch.stack(shares).mean().item() == pytest.approx(share_with_a_partner(60, 3, 8), abs=0.01)


def whole_number(text: str) -> int:
    return int(text.replace(",", ""))


def test_the_table_of_partners_is_the_formula() -> None:
    head = TEXT.partition("<!-- partners -->\n")[2].partition("\n")[0]
    batches = [whole_number(x) for x in re.findall(r"[\d,]+(?= \|)", head)]
    assert len(batches) == 5, "one for each column"
    for row in table("partners"):
        _, data, *cells, _ = row.split("|")  # data: "5,000 pictures, 4 of each"
        pictures, of_each = map(whole_number, re.findall(r"\d[\d,]*", data))
        shares = [share_with_a_partner(pictures, of_each, batch) for batch in batches]
        assert [cell.strip() for cell in cells] == [f"{round(100 * share)} %" for share in shares]


def test_scales_of_small_trainings_are_those_of_the_records() -> None:
    """Of the studies of the tiny student: CLIP's with the usual scale at the start, and spread's."""
    scales: dict[str, list[float]] = {"clip": [], "smoothing": [], "std-constant": []}
    for study in ("captions", "spread", "alignment"):
        for path in (ROOT / f"examples/studies/{study}/results").rglob("records.jsonl"):
            for line in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
                setting = line.get("setting", {})
                if setting.get("side") == "test" and setting["arm"] in scales:
                    scales[setting["arm"]].append(line["metrics"]["geometry"]["logit_scale"])
    ((low, high),) = re.findall(r"CLIP's, from 14.3, ended between (\d+) and (\d+)", TEXT)
    of_clip = scales["clip"] + scales["smoothing"]
    assert (round(min(of_clip)), round(max(of_clip))) == (int(low), int(high))
    assert "spread's in the longest of icons at 100" in TEXT
    assert round(max(scales["std-constant"])) == 100
