"""Runs the commands and the code of docs/your_data.md on a sample, in one process and in their order.

Then it runs the training that README begins with, which is of the sample already.

``python page_runner.py PAGE README`` writes ``outputs.json``: each block's text, output and error.
What a reader would change is changed: the model, sizes of batches, and numbers of epochs.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import re
import shlex
import shutil
import sys
import traceback
from pathlib import Path
from typing import Any

# What a reader would change to run the page on the sample: texts, and patterns with their groups.
TEXTS = {
    "--model ViT-B-32 --pretrained laion2b_s34b_b79k": "--model local-dir:sample/open_clip",
    "--model ViT-B-32 --pretrained logs/first/checkpoints/epoch_5.pt": "--model local-dir:trained",
    "--image-encoder efficientnet-lite0": "--image-encoder sample/image_encoder",
    "--text-encoder minilm": "--text-encoder sample/text_encoder",
    "pictures/0001.jpg": "sample/pictures/red-circle-small.png",
    '"ViT-B-32"': '"local-dir:sample/open_clip"',
    "openai/clip-vit-base-patch32": "sample/transformers",
    'read_csv("pairs.csv")': 'read_csv("sample/train.csv", sep="\\t")',
    'to_csv("train.csv"': 'to_csv("split_train.csv"',
    'to_csv("val.csv"': 'to_csv("split_val.csv"',
}
PATTERNS = {
    r"(--batch-size |_batch_size=)(256|64)\b": r"\g<1>16",
    r"--accum-freq 4\b": "--accum-freq 2",
    r"--epochs 5\b": "--epochs 1",
    r"--epochs 6\b": "--epochs 2",
    r"--epochs 30\b": "--epochs 15",
    r"epoch_5\.pt": "epoch_2.pt",
    r"num_train_epochs=5\b": "num_train_epochs=4",  # so that the tenth step is logged
}
SEARCH = "held_out = pandas"
GOES_ON = {"get_peft_model": "AutoProcessor", SEARCH: "load_checkpoint", "rankloss.metrics": SEARCH}
"""Some words of a block of code that needs the names of an earlier block, and some words of that."""


def blocks(page: str) -> list[tuple[str, str]]:
    """The language and the text of each block that a reader runs, with the changes; the sample's first."""
    found = re.findall(r"^```(console|python)\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    found.sort(key=lambda block: "rankloss sample" not in block[1])
    return [(language, changed(text)) for language, text in found]


def first_training(readme: str) -> str:
    """The first training of README, without its prompt and its output, with the changes."""
    consoles = re.findall(r"^```console\n(.*?)^```", readme, re.DOTALL | re.MULTILINE)
    of_sample = next(block for block in consoles if "sample" in block)
    lines = of_sample.replace("\\\n", " ").splitlines()
    command = next(line for line in lines if line.startswith("$ python"))
    return changed(command.removeprefix("$ "))


def changed(text: str) -> str:
    """A block as it runs on the sample."""
    for large, small in TEXTS.items():
        text = text.replace(large, small)
    for large, small in PATTERNS.items():
        text = re.sub(large, small, text)
    return text


def run_commands(text: str) -> None:
    """Run each command line in this process."""
    from open_clip_train.main import main as open_clip

    from rankloss_trainers.console import main as rankloss

    for line in text.replace("\\\n", " ").splitlines():
        program, *words = shlex.split(line, comments=True)
        if program == "rankloss":
            assert not rankloss(words), line
        elif program == "cp":
            *files, place = words
            for file in files:
                shutil.copy(file, place)
        elif program == "mkdir":
            Path(*words).mkdir()
        elif program == "python":
            assert words[:2] == ["-m", "open_clip_train.main"], line
            open_clip([*words[2:], "--workers", "0"])
            logging.getLogger().handlers.clear()  # or what follows is written into this run's log, too
        else:
            assert program == "pip", line


def run_block(language: str, text: str, names: dict[str, Any]) -> dict[str, str]:
    """Run a block, its code with some names, to which it adds; its text, its output and its error."""
    output, error = io.StringIO(), ""
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            if language == "console":
                run_commands(text)
            else:
                exec(text, names)
        except (Exception, SystemExit):
            error = traceback.format_exc()
    return {"text": text, "output": output.getvalue(), "error": error}


def main(page: Path, readme: Path) -> None:
    """Run all blocks of a page, then the first training of README."""
    first = ("console", first_training(readme.read_text(encoding="utf-8")))
    outputs = []
    names_after: dict[str, dict[str, Any]] = {}  # by the words of GOES_ON
    for language, text in [*blocks(page.read_text(encoding="utf-8")), first]:
        earlier = [names_after[words] for mark, words in GOES_ON.items() if mark in text]
        names = earlier[0] if earlier else {}
        outputs.append(run_block(language, text, names))
        names_after.update({words: names for words in GOES_ON.values() if words in text})
    Path("outputs.json").write_text(json.dumps(outputs), encoding="utf-8")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
