"""A damaged file of the plug-in: programs go on, with one warning, and ``--loss`` never trains plain CLIP."""

from __future__ import annotations

import compileall
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

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

NOT_NEEDED = "rankloss_trainers/__init__.py"  # whose names the way into the trainer does not need
OF_RUNS_WITH_A_LOSS = {"rankloss_open_clip/training.py", "rankloss_open_clip/trainer_loss.py"}
"""The files that are read once a command line has ``--loss``."""
START = [
    "rankloss_open_clip/bootstrap.py",
    "rankloss_open_clip/patches.py",
    "rankloss_trainers/import_hook.py",
]
"""The files that a program reads before its command line is known."""

# The process imports torch and the trainer once, and runs each case in a fork of it, with modules of its own.
# It reads a line a case, a JSON list, and answers with one: the outcome, details of it, and the warnings of
# rankloss.
RUN_OF_CASES = """
import contextlib, json, os, sys, warnings
from pathlib import Path
import open_clip, open_clip_train.main

folder = Path(sys.argv[1])
sys.path.insert(0, str(folder))
sys.dont_write_bytecode = True
ours = ("rankloss", "open_clip_train.params")
assert not [name for name in sys.modules if name.startswith("rankloss")]
del sys.modules["open_clip_train.params"]

def outcome(program, words):
    sys.argv = [program, *words]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            import rankloss_open_clip
            assert Path(rankloss_open_clip.__file__).parents[1] == folder
            rankloss_open_clip.wait_for_trainer()
            rankloss_open_clip.wait_for_trainer()
        except SystemExit as error:
            return ["refused at import of torch", str(error), []]
        except BaseException as error:
            return ["import of torch fails", repr(error), []]
        warned = [str(x.message) for x in caught if "rankloss" in str(x.message)]
        try:
            from open_clip_train.params import parse_args
            with contextlib.redirect_stderr(None):
                args = vars(parse_args(words))
        except BaseException as error:
            return ["refused", repr(error), warned]
    return ["rankclip" if args.get("loss") else "clip", str(args.get("loss_dist_impl")), warned]

for line in sys.stdin:
    name, content, program, words = json.loads(line)
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
        print(answer.read(), flush=True)
    os.wait()
    file.write_bytes(whole)
"""
MAIN, OTHER = "/x/open_clip_train/main.py", "my_program.py"
LOSS = ["--loss", "rankclip"]
WHOLE = {name: (ROOT / "integrations" / name).read_text() for name in FILES}


class Case(NamedTuple):
    """A program that is started with a file of ours damaged."""

    file: str
    content: str | None  # of the file; None where it is gone
    program: str  # sys.argv[0]
    words: list[str]  # its command line


class Outcome(NamedTuple):
    """How a program went on."""

    ended: str  # the loss that it trains, "rankclip" or "clip", or the step that refused it
    detail: str
    warnings: list[str]


Outcomes = Callable[[list[Case]], list[Outcome]]


@pytest.fixture(scope="module")
def outcomes_of(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Outcomes]:
    """A function that runs cases on a copy of our packages."""
    folder = tmp_path_factory.mktemp("damaged")
    for package in (ROOT / "rankloss", *(ROOT / "integrations").iterdir()):
        if package.is_dir():
            shutil.copytree(package, folder / package.name, ignore=shutil.ignore_patterns("__pycache__"))
    assert compileall.compile_dir(folder, quiet=1)  # once, not in each case

    environment = {**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", RUN_OF_CASES, str(folder)]
    with subprocess.Popen(
        command, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:

        def run(cases: list[Case]) -> list[Outcome]:
            outcomes = []
            for case in cases:
                print(json.dumps(case), file=process.stdin, flush=True)
                outcomes.append(Outcome(*json.loads(process.stdout.readline())))
            return outcomes

        yield run
        process.stdin.close()
    assert process.returncode == 0


def damages(file: str) -> dict[str, str | None]:
    """The contents of a damaged file, by the damage; None where it is gone."""
    lines = WHOLE[file].splitlines(keepends=True)
    return {"gone": None, "empty": "", "cut": "".join(lines[: len(lines) // 2])}


def assert_programs_go_on(cases: list[Case], outcomes: list[Outcome]) -> None:
    """Assert that programs without a loss train plain CLIP, and warn of the damaged file at most once."""
    for case, outcome in zip(cases, outcomes, strict=True):
        assert outcome.ended == "clip", (case, outcome)
        assert len(outcome.warnings) <= 1, (case, outcome)


def test_whole_files_train_the_asked_loss_without_a_warning(outcomes_of: Outcomes) -> None:
    """So that the refusals and the warnings of the tests below are of the damage."""
    file = FILES[0]
    with_a_loss, without = outcomes_of([Case(file, WHOLE[file], MAIN, words) for words in (LOSS, [])])
    assert (with_a_loss.ended, with_a_loss.warnings) == ("rankclip", [])
    assert (without.ended, without.warnings) == ("clip", [])


def test_runs_with_a_loss_are_refused_when_a_file_is_damaged(outcomes_of: Outcomes) -> None:
    cases = [Case(file, content, MAIN, LOSS) for file in FILES for content in damages(file).values()]
    for case, outcome in zip(cases, outcomes_of(cases), strict=True):
        trains_it_all_the_same = outcome.ended == "rankclip" and case.file == NOT_NEEDED
        assert outcome.ended.startswith("refused") or trains_it_all_the_same, (case, outcome)


def test_programs_without_a_loss_go_on_and_a_warning_names_the_damage(outcomes_of: Outcomes) -> None:
    cut = [Case(file, damages(file)["cut"], program, []) for file in FILES for program in (OTHER, MAIN)]
    gone = [Case(file, None, MAIN, []) for file in START]
    cases = [*cut, *gone]
    outcomes = outcomes_of(cases)
    assert_programs_go_on(cases, outcomes)
    warned_of = {
        case.file
        for case, outcome in zip(cases, outcomes, strict=True)
        if any("rankloss is damaged" in warning for warning in outcome.warnings)
    }
    assert warned_of == {*FILES} - OF_RUNS_WITH_A_LOSS


@pytest.mark.slow
def test_programs_go_on_whatever_the_damage(outcomes_of: Outcomes) -> None:
    cases = [
        Case(file, content, program, [])
        for file in FILES
        for content in damages(file).values()
        for program in (OTHER, MAIN)
    ]
    assert_programs_go_on(cases, outcomes_of(cases))


@pytest.mark.slow
def test_a_file_cut_at_any_third_line_never_trains_plain_clip(outcomes_of: Outcomes) -> None:
    cases = []
    for file in START:
        lines = WHOLE[file].splitlines(keepends=True)
        cases += [Case(file, "".join(lines[:n]), MAIN, LOSS) for n in range(0, len(lines), 3)]
    for case, outcome in zip(cases, outcomes_of(cases), strict=True):
        # A cut behind the last line that matters leaves the loss as it was asked for.
        assert outcome.ended.startswith("refused") or outcome.ended == "rankclip", (case, outcome)
