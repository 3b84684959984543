"""The page of one's own data: all its code runs on a sample, its tables are computed."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import page_runner
import pytest
import torch
from tools_folder import ROOT

PAGE = ROOT / "docs/your_data.md"
TEXT = PAGE.read_text(encoding="utf-8")
BLOCKS = [text for _, text in page_runner.blocks(TEXT)]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, str]]]:
    """The folder where the page's commands and code were run, and what each gave."""
    for package in ("open_clip_train", "datasets", "transformers", "sentence_transformers", "peft", "timm"):
        pytest.importorskip(package)
    folder = tmp_path_factory.mktemp("your_data")
    command = [sys.executable, page_runner.__file__, str(PAGE), str(ROOT / "README.md")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    return folder, json.loads((folder / "outputs.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_every_command_and_code_of_the_page_runs(
    number: int, done: tuple[Path, list[dict[str, str]]]
) -> None:
    block = done[1][number]
    assert block["text"] == BLOCKS[number]
    assert block["error"] == ""


def test_a_run_trains_the_loss_and_is_resumed(done: tuple[Path, Any]) -> None:
    folder, _ = done
    log = (folder / "logs/first/out.log").read_text(encoding="utf-8")
    assert log.count("| Loss: clip-streamed (rankloss") == 4  # of two runs, at the start and before training
    assert "resuming checkpoint 'logs/first/checkpoints/epoch_1.pt'" in log
    assert len(re.findall("Eval Epoch: 2 image_to_text_mean_rank", log)) == 1


def test_the_smaller_model_trains(done: tuple[Path, Any]) -> None:
    folder, _ = done
    assert "Train Epoch: 0" in (folder / "logs/small/out.log").read_text(encoding="utf-8")


def test_a_trained_model_finds_pictures(done: tuple[Path, Any]) -> None:
    _, outputs = done
    (search,) = [x["output"] for x in outputs if "by_caption" in x["text"]]
    assert len(re.findall(r"sample/pictures/[\w-]+\.png", search)) == 6


def test_recall_is_another_after_training_and_that_of_the_metrics(done: tuple[Path, Any]) -> None:
    folder, outputs = done
    tables = [
        json.loads((folder / name).read_text(encoding="utf-8")) for name in ("before.json", "after.json")
    ]
    assert tables[0] != tables[1]
    (shares,) = [x["output"] for x in outputs if "rankloss.metrics" in x["text"]]
    shown = re.search(r"image_to_image_R@5 ([\d.]+)", shares)
    (evaluated,) = [x["output"] for x in outputs if "--against before.json" in x["text"]]
    row = re.findall(r"picture → picture +[\d.]+ \[[^]]*\] +([\d.]+)", evaluated)[0]
    assert shown is not None
    assert 100 * float(shown[1]) == pytest.approx(float(row), abs=0.1)


def test_loaded_heads_find_pictures(done: tuple[Path, Any]) -> None:
    _, outputs = done
    (search,) = [x["output"] for x in outputs if "load_heads" in x["text"]]
    assert len(set(re.findall(r"sample/pictures/[\w-]+\.png", search))) == 3


@pytest.mark.parametrize("trainer", [" ContrastiveTrainer(", "SentenceTransformerTrainer("])
def test_trainings_in_python_log_their_loss(trainer: str, done: tuple[Path, Any]) -> None:
    block = next(x for x in done[1] if trainer in x["text"])
    assert '"clip-streamed"' in block["text"]
    assert "'contrastive_loss':" in block["output"]


def test_a_pretrained_clip_is_fine_tuned_by_clips_own_loss() -> None:
    """No loss was compared on one: pages and examples begin with CLIP's, with ids where there are some."""
    losses = re.findall(r"--loss ([\w+-]+)", " ".join(BLOCKS))
    losses += re.findall(r'(?:loss=|ContrastiveLoss\(model, )"([\w+-]+)"', " ".join(BLOCKS))
    assert len(losses) == 8
    assert set(losses) == {"clip-streamed", "clip-ids"}


def test_hugging_faces_training_chooses_by_a_recall_that_is_not_saturated(done: tuple[Path, Any]) -> None:
    """No epoch is chosen by a recall that is 1 in all, nor by R@10, which is equal in all on few pairs."""
    block = next(x for x in done[1] if " ContrastiveTrainer(" in x["text"])
    name = re.findall(r'metric_for_best_model="(.*)"', block["text"])[0]
    values = [float(x) for x in re.findall(rf"'{re.escape(name)}': '?([\d.]+)", block["output"])]
    assert name == "eval_mean_R@1"
    assert len(values) == 4
    assert max(values) < 1


def test_the_first_training_of_the_readme_is_on_and_its_loss_falls(done: tuple[Path, Any]) -> None:
    folder, outputs = done
    assert outputs[-1]["error"] == ""
    log = (folder / "logs/sample/out.log").read_text(encoding="utf-8")
    assert "| Loss: clip-ids (rankloss" in log
    losses = [float(x) for x in re.findall(r"Contrastive_loss: ([\d.]+) \(", log)]
    chance = math.log(16)
    assert losses[0] == pytest.approx(chance, abs=0.5)
    assert losses[-1] < 0.6 * chance


def test_the_printed_evaluation_of_the_page_is_the_commands(done: tuple[Path, Any]) -> None:
    """In its words, and in its numbers as far as another processor leaves them."""
    shown = TEXT.partition("<!-- evaluated -->\n```text\n")[2].partition("```")[0]
    (printed,) = [x["output"] for x in done[1] if "--json before.json" in x["text"]]
    number = re.compile(r"-?\d+\.\d+|\d+")
    assert " ".join(number.sub("n", shown).split()) in " ".join(number.sub("n", printed).split())
    printed = printed[printed.index("local-dir:") :]
    for page, command in zip(number.findall(shown), number.findall(printed), strict=True):
        assert float(page) == pytest.approx(float(command), abs=13)


def test_loras_checkpoint_is_an_ordinary_clip_whose_attention_was_trained(done: tuple[Path, Any]) -> None:
    transformers = pytest.importorskip("transformers")
    start, trained = (
        transformers.AutoModel.from_pretrained(done[0] / name).state_dict()
        for name in ("sample/transformers", "my-lora-clip")
    )
    assert start.keys() == trained.keys()
    changed = {name for name in start if not torch.equal(start[name], trained[name])}
    assert {re.sub(r".*\.(\w+\.\w+)$", r"\1", name) for name in changed} == {
        "q_proj.weight",
        "v_proj.weight",
        "visual_projection.weight",
        "text_projection.weight",
    }


def table(name: str) -> list[str]:
    """The rows of a table between two comments, without its head."""
    return TEXT.partition(f"<!-- {name} -->\n")[2].partition(f"<!-- /{name} -->")[0].splitlines()[2:]


def scores(report: str) -> dict[tuple[str, str], str]:
    """R@10 of a report, by cell and arm, without the number of seeds."""
    text = (ROOT / "examples/studies" / report).read_text(encoding="utf-8")
    rows = re.findall(
        r"^\| +([\w-]+) +\| +`([\w-]+)` +\| +(\d+\.\d\d ± \d\.\d\d) \(\d+\)", text, re.MULTILINE
    )
    return {(cell, arm): score for cell, arm, score in rows}


def test_settings_of_heads_are_those_of_the_records() -> None:
    found, folder = scores("alignment/report/alignment.md"), ROOT / "examples/studies/alignment/results"
    rows = []
    for name in ("emojis", "photographs", "icons", "icons-35840"):
        lines = map(json.loads, (folder / name / "records.jsonl").read_text(encoding="utf-8").splitlines())
        of = [x["setting"] for x in lines if x.get("setting", {}).get("arm") == "heads"]
        (options,) = {heads_command(x) for x in of if (x["side"], x["split"]) == ("test", 0)}
        rows.append(f"| `{options}` | {found[f'heads-{name}', 'heads']} |")
    assert [row[row.index(" `") - 1 :] for row in table("settings")] == rows


def heads_command(setting: dict[str, Any]) -> str:
    """The options of ``rankloss heads`` that train so."""
    options = f"--epochs {setting['epochs']} --batch-size {setting['batch_size']} --lr {setting['lr']:.0e}"
    options = f"{options.replace('e-0', 'e-')} --dropout {setting['dropout']:g}"
    smoothing = setting["label_smoothing"]
    return f"{options} --label-smoothing {smoothing:g}" if smoothing else options


def test_recall_by_batch_is_that_of_the_clip_that_the_dev_side_chose() -> None:
    text = (ROOT / "examples/studies/captions/report/captions.md").read_text(encoding="utf-8")
    tries = text.partition("## CLIP's tries")[2]
    chosen = dict(re.findall(r"^\| ([\w-]+) .*`([\w-]+)` \|$", tries, re.MULTILINE))
    found = scores("captions/report/captions.md")
    for row, data in zip(table("batches"), ("emojis", "icons", "photographs"), strict=True):
        cells = [f"{data}-{batch}" for batch in (64, 250)]
        assert row.split(" | ")[1:] == [
            found[cells[0], chosen[cells[0]]],
            f"{found[cells[1], chosen[cells[1]]]} |",
        ]


def share_with_a_partner(pictures: int, of_each: int, batch: int) -> float:
    """The probability that another picture of a product is among the other N - 1 of the batch."""
    without = 1.0
    for j in range(1, of_each):
        without *= 1 - (batch - 1) / (pictures - j)
    return 1 - without


def test_the_share_with_a_partner_is_that_of_drawn_batches() -> None:
    generator = torch.Generator().manual_seed(0)
    products = torch.arange(60) // 3
    drawn = [products[torch.randperm(60, generator=generator)[:8]] for _ in range(4000)]
    found = torch.stack([(batch[:, None] == batch).sum(1) > 1 for batch in drawn]).double().mean()
    assert found.item() == pytest.approx(share_with_a_partner(60, 3, 8), abs=0.01)


def test_the_table_of_partners_is_the_formula() -> None:
    head = TEXT.partition("<!-- partners -->\n")[2].partition("\n")[0]
    batches = [int(x.replace(",", "")) for x in re.findall(r"[\d,]+(?= \|)", head)]
    assert len(batches) == 5
    for row in table("partners"):
        pictures, of_each = (int(x.replace(",", "")) for x in re.findall(r"[\d,]+\d|\d", row.split("|")[1]))
        shares = [round(100 * share_with_a_partner(pictures, of_each, batch)) for batch in batches]
        assert [f"{share} %" for share in shares] == [cell.strip() for cell in row.split("|")[2:-1]]


def test_scales_of_small_trainings_are_those_of_the_records() -> None:
    scales: dict[str, list[float]] = {"clip": [], "rankclip": []}
    for path in (ROOT / "examples/studies/captions/results").rglob("records.jsonl"):
        for line in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
            setting = line.get("setting", {})
            if setting.get("side") == "test" and setting["arm"] in scales:
                scales[setting["arm"]].append(line["metrics"]["geometry"]["logit_scale"])
    low, high = re.findall(r"CLIP's ended between (\d+) and (\d+)", TEXT)[0]
    assert [round(min(scales["clip"])), round(max(scales["clip"]))] == [int(low), int(high)]
    assert sum(scales["rankclip"]) / len(scales["rankclip"]) < sum(scales["clip"]) / len(scales["clip"])
