"""A damaged file of the plug-in: programs go on, with one warning, and ``--loss`` never trains plain CLIP."""

from __future__ import annotations

import compileall
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
FILES = [
    "rankloss_open_clip/bootstrap.py",
    "rankloss_open_clip/patches.py",
    "rankloss_open_clip/arguments.py",
    "rankloss_open_clip/training.py",
    "rankloss_open_clip/trainer_loss.py",
    "rankloss_trainers/__init__.py",
    "rankloss_trainers/import_hook.py",
]
"""The files on the way into the trainer, but the one that has the entry point."""

EMPTY = "rankloss_trainers/__init__.py"  # nothing here needs its names
OF_A_LOSS = {"rankloss_open_clip/training.py", "rankloss_open_clip/trainer_loss.py"}
START = [
    "rankloss_open_clip/bootstrap.py",
    "rankloss_open_clip/patches.py",
    "rankloss_trainers/import_hook.py",
]
"""The files that a program reads before its command line is known."""

# The process imports torch and the trainer once, and each case in a fork of it, with modules of its own.
CASES = """
import contextlib, json, os, sys, warnings
from pathlib import Path
import open_clip, open_clip_train.main

folder, cases = Path(sys.argv[1]), json.load(sys.stdin)
sys.path.insert(0, str(folder))
sys.dont_write_bytecode = True
ours = ("rankloss", "open_clip_train.params")
assert not [name for name in sys.modules if name.startswith("rankloss")]
del sys.modules["open_clip_train.params"]

def outcome(program, words):
    # What becomes of the program: the loss that it trains, or how it was refused; and the warnings, last.
    sys.argv = [program, *words]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            import rankloss_open_clip
            assert Path(rankloss_open_clip.__file__).parents[1] == folder
            rankloss_open_clip.wait_for_trainer()
            rankloss_open_clip.wait_for_trainer()
        except SystemExit as error:
            return ["refused at import of torch", str(error)]
        except BaseException as error:
            return ["import of torch fails", repr(error)]
        kinds = [str(x.message) for x in caught if "rankloss" in str(x.message)]
        try:
            from open_clip_train.params import parse_args
            with contextlib.redirect_stderr(None):
                args = vars(parse_args(words))
        except BaseException as error:
            return ["refused", repr(error), kinds]
    return ["rankclip" if args.get("loss") else "clip", str(args.get("loss_dist_impl")), kinds]

for name, content, program, words in cases:
    file = folder / name
    whole = file.read_bytes()
    file.unlink()
    if content is not None:
        file.write_text(content)
    read, write = os.pipe()
    if os.fork() == 0:
        os.write(write, json.dumps(outcome(program, words)).encode())
        os._exit(0)
    os.close(write)
    with open(read) as answer:
        print(answer.read())
    os.wait()
    file.write_bytes(whole)
"""
MAIN, OTHER = "/x/open_clip_train/main.py", "my_program.py"
LOSS = ["--loss", "rankclip"]
Case = tuple[str, str | None, str, list[str]]  # a file, what it holds, a program, and its command line
WHOLE = {name: (ROOT / "integrations" / name).read_text() for name in FILES}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A function that gives the outcome of each case: a damaged file, a program, and its command line."""
    folder = tmp_path_factory.mktemp("damaged")
    for package in (ROOT / "rankloss", *(ROOT / "integrations").iterdir()):
        if package.is_dir():
            shutil.copytree(package, folder / package.name, ignore=shutil.ignore_patterns("__pycache__"))
    assert compileall.compile_dir(folder, quiet=1)  # once, not in each case

    def run(cases: list[Case]) -> list[list[Any]]:
        environment = {**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, "-c", CASES, str(folder)],
            input=json.dumps(cases),
            env=environment,
            text=True,
            capture_output=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]

    return run


def damages(name: str) -> dict[str, str | None]:
    """What a damaged file holds, by the damage; None where it is gone."""
    lines = WHOLE[name].splitlines(keepends=True)
    return {"gone": None, "empty": "", "cut": "".join(lines[: len(lines) // 2])}


def check(cases: list[Case], outcomes: Any) -> set[str]:
    """Assert that programs go on and that a loss is never lost; return the files that a warning tells of."""
    warned = set()
    for case, (outcome, *details) in zip(cases, outcomes(cases), strict=True):
        name, content, program, words = case
        shown = (name, program, words, outcome, details)
        if content == WHOLE[name]:
            _, warnings = details
            assert outcome == ("rankclip" if words else "clip"), shown
            assert warnings == [], shown
        elif words:
            assert outcome.startswith("refused") or (outcome, name) == ("rankclip", EMPTY), shown
        else:
            assert outcome == "clip", shown
            _, warnings = details
            assert len(warnings) <= 1, shown
            warned |= {name for text in warnings if "rankloss is damaged" in text}
    return warned


def test_programs_go_on_and_runs_with_a_loss_are_refused(outcomes: Any) -> None:
    whole: list[Case] = [(FILES[0], WHOLE[FILES[0]], MAIN, words) for words in (LOSS, [])]
    with_a_loss = [(name, content, MAIN, LOSS) for name in FILES for content in damages(name).values()]
    cut = [(name, damages(name)["cut"], program, []) for name in FILES for program in (OTHER, MAIN)]
    gone = [(name, None, MAIN, []) for name in START]
    cases = [*whole, *with_a_loss, *cut, *gone]
    warned = check(cases, outcomes)
    assert warned == {*FILES} - OF_A_LOSS, "these are read by runs with a loss alone"


@pytest.mark.slow
def test_programs_go_on_whatever_the_damage(outcomes: Any) -> None:
    check(
        [
            (name, content, program, [])
            for name in FILES
            for content in damages(name).values()
            for program in (OTHER, MAIN)
        ],
        outcomes,
    )


@pytest.mark.slow
def test_a_file_cut_at_any_line_never_trains_plain_clip(outcomes: Any) -> None:
    cases = []
    for name in START:
        lines = WHOLE[name].splitlines(keepends=True)
        cases += [(name, "".join(lines[:n]), MAIN, LOSS) for n in range(0, len(lines), 3)]
    for (name, content, *_), (outcome, *details) in zip(cases, outcomes(cases), strict=True):
        shown = (name, content[-200:], outcome, details)
        assert outcome.startswith("refused") or outcome == "rankclip", shown
