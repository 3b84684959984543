"""Time and memory of RankClipLoss in this checkout and in another, step by step in turns."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from contenders import D
from measure import conditions
from report import markdown_table, under

ROOT = Path(__file__).resolve().parents[1]
OPTIONS: dict[str, dict[str, Any]] = {"default": {}, "top_k=8": {"top_k": 8}, "bin": {"method": "bin"}}
SIZES, THREADS, PROCESSES = (1024, 4096), (1, 2), (1, 4)
_MEMORY_ROUNDS = 3
_PAUSE = 0.02  # seconds, in which the idle threads of the last step stop spinning


class Worker:
    """A process that takes a step of the loss of one checkout when it is asked to."""

    def __init__(self, checkout: Path, threads: int, **given: Any) -> None:
        paths = [checkout, checkout / "integrations"]
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(map(str, paths)),
            "OMP_NUM_THREADS": str(threads),
        }
        script = Path(__file__).with_name("checkout_worker.py")
        self._process = subprocess.Popen(
            [sys.executable, script, json.dumps({"checkout": str(checkout), **given})],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, what: str) -> float:
        """``"time"``: seconds of a step. ``"memory"``: its added bytes of resident memory."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        time.sleep(_PAUSE)
        with contextlib.suppress(BrokenPipeError):  # then there is no answer either
            print(what, file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"a worker ended with status {self._process.wait()}; its error is above")
        return float(answer)

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


@contextlib.contextmanager
def workers(checkouts: dict[str, Path], **given: Any) -> Iterator[dict[str, Worker]]:
    with contextlib.ExitStack() as stack:
        started = {}
        for name, checkout in checkouts.items():
            started[name] = Worker(checkout, **given)
            stack.callback(started[name].close)
        yield started


def measure_against(args: argparse.Namespace) -> dict[str, Any]:
    """Steps of both checkouts in turns, every other round in reverse order; the other one waits."""
    checkouts = {"this": ROOT, "other": args.against.resolve()}
    d = 16 if args.quick else D
    sizes = (32,) if args.quick else args.n or SIZES
    threads = (args.threads,) if args.threads else THREADS
    results: dict[str, Any] = {
        "conditions": conditions(threads=" and ".join(map(str, threads)), d=d),
        "checkouts": {name: commit_of(path) for name, path in checkouts.items()},
        "cells": [],
    }
    for n, processes, count, name in itertools.product(sizes, PROCESSES, threads, OPTIONS):
        print(f"… {name}, N = {n:,}, one of {processes}, threads = {count}", file=sys.stderr, flush=True)
        rounds = 1 if args.quick else max(9, 30 * 1024 // n)
        cell = {"loss": name, "n": n, "processes": processes, "threads": count}
        with workers(checkouts, n=n, d=d, processes=processes, threads=count, options=OPTIONS[name]) as both:
            found: dict[str, dict[str, list[float]]] = {"memory": {}, "time": {}}
            asked = ["memory"] * (1 if args.quick else _MEMORY_ROUNDS) + ["time"] * rounds
            for k, what in enumerate(asked):
                for which in both if k % 2 == 0 else reversed(both):
                    found[what].setdefault(which, []).append(both[which].ask(what))
        for what, by_checkout in found.items():
            cell[what] = {which: statistics.median(values) for which, values in by_checkout.items()}
        results["cells"].append(cell)
    return results


def commit_of(checkout: Path) -> str:
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=10"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def report_against(results: dict[str, Any]) -> str:
    """The Markdown that a run leaves: a row for each loss, size, share and number of threads."""
    rows = []
    for cell in results["cells"]:
        rows_here = "all" if cell["processes"] == 1 else f"1/{cell['processes']}"
        cells = [cell["loss"], f"{cell['n']:,}", rows_here, str(cell["threads"])]
        for what, form, unit in (("time", "{:.3g}", 1), ("memory", "{:.1f}", 2**20)):
            this, other = (cell[what][which] / unit for which in ("this", "other"))
            cells += [form.format(this), form.format(other), f"**{this / other:.2f}**" if other else "–"]
        rows.append(cells)
    head = ["RankClipLoss", "N", "rows", "threads", "s", "s, other", "ratio", "MiB", "MiB, other", "ratio"]
    commits = results["checkouts"]
    return (
        f"Forward and backward of {commits['this']} and of {commits['other']} (other), in turns: medians of "
        f"seconds and of added memory at its peak, and their ratios. {under(results['conditions'])}\n\n"
        f"{markdown_table(head, rows)}\n"
    )
