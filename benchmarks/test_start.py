"""The time before the first step: imports, commands, and open_clip's command line with a loss."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import open_clip
import pytest

from trainer import parsed
from turns import Step

TIMED = "import {before}; start = time.perf_counter(); import {module}; print(time.perf_counter() - start)"
# The modules that are imported before, the timed one, and 1 if torch looks for plug-ins, such as open_clip's.
IMPORTS = {
    "torch": ("time", "torch", "0"),
    "torch-with-plug-in": ("time", "torch", "1"),
    "rankloss-after-torch": ("time, torch", "rankloss", "0"),
}
COMMANDS = {"--help": ["--help"], "losses": ["losses"]}


def nothing(_: Step) -> dict[str, Any]:
    """Count nothing, in place of memory."""
    return {}


def imported(name: str) -> float:
    """Seconds of an import in a new process."""
    before, module, plug_ins = IMPORTS[name]
    code = TIMED.format(before=before, module=module)
    environment = {**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": plug_ins}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=True)
    return float(done.stdout)


@pytest.mark.parametrize("contender", IMPORTS)
def test_import(contender: str, compare: Callable[..., None]) -> None:
    compare(
        "start: imports",
        contender,
        lambda name: lambda: imported(name),
        rounds=9,
        seconds=lambda step: step(),
        count=nothing,
    )


@pytest.mark.parametrize("contender", COMMANDS)
def test_command(contender: str, compare: Callable[..., None]) -> None:
    def make(name: str) -> Step:
        line = [sys.executable, "-m", "rankloss", *COMMANDS[name]]
        return lambda: subprocess.run(line, capture_output=True, check=True)

    compare("start: python -m rankloss", contender, make, rounds=9, count=nothing)


@pytest.mark.parametrize("contender", ["parse-clip", "parse-rankclip", "build-clip", "build-rankclip"])
def test_command_line(contender: str, compare: Callable[..., None]) -> None:
    def make(name: str) -> Step:
        action, loss = name.split("-")
        line = f"--loss {loss}"
        if action == "parse":
            return lambda: parsed(line)
        args = parsed(line)
        return lambda: open_clip.create_loss(args)

    compare("start: open_clip's trainer", contender, make, rounds=40, count=nothing)
