"""Cost of the losses on one CUDA card, in under nine minutes. Their correctness: ``make test-gpu``.

Each section writes its results to ``OUTPUT/NAME.json`` when it is done, and is not run again while that file
is there, so that the same command resumes an interrupted run. A section that fails leaves the others.
``--dry-run`` runs every section on the CPU, at sizes that say nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import measure
import rankloss
from naive import naive_rank_terms
from report import fill, markdown_table
from share import one_of
from training_step import DEMO, step_of

LIMIT = 530  # seconds for everything
SIZES = ((1024, 1024), (1024, 8192), (4096, 4096), (1024, 32768), (16384, 16384), (1024, 65536))
LARGEST = ((65536, 65536), (1024, 131072))
MODELS = {"ViT-B-32": 1024, "ViT-B-16": 384}  # of open_clip, and the batch
TINY = {f"local-dir:{DEMO}": 4}


class Bench(NamedTuple):
    """Place, size and deadline of a run."""

    device: torch.device
    dry: bool
    deadline: float

    @property
    def left(self) -> float:
        return self.deadline - time.monotonic()

    def sizes(self, *sizes: tuple[int, int]) -> Sequence[tuple[int, int]]:
        return ((4, 8), (8, 8)) if self.dry else sizes

    def features(self, rows: int, items: int) -> list[Tensor]:
        """Local features, those of all processes (the same where there is one), the scale."""
        generator = torch.Generator(device=self.device).manual_seed(0)
        shape = (items, 8 if self.dry else 512)
        everyone = [
            F.normalize(torch.randn(shape, device=self.device, generator=generator), dim=-1).requires_grad_()
            for _ in range(2)
        ]
        local = everyone if rows == items else [x.detach()[:rows].clone().requires_grad_() for x in everyone]
        return [*local, *everyone, torch.tensor(100.0, device=self.device, requires_grad=True)]

    def timed(self, call: Callable[[], Any], most: float) -> dict[str, float]:
        """Median milliseconds, and MiB beyond what was allocated before."""
        on_card = self.device.type == "cuda"
        for _ in range(1 if self.dry else 3):
            call()
        before = 0
        if on_card:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        times: list[float] = []
        start = time.monotonic()
        while not times or (len(times) < 20 and time.monotonic() - start < min(most, self.left)):
            begin = time.perf_counter()
            call()
            if on_card:
                torch.cuda.synchronize()
            times.append(1e3 * (time.perf_counter() - begin))
        peak = torch.cuda.max_memory_allocated() - before if on_card else 0
        return {"milliseconds": sorted(times)[len(times) // 2], "peak_mib": peak / 2**20}


def implementations() -> dict[str, dict[str, Any]]:
    """Options of the loss by the name of what computes it."""
    engines = ("torch", "triton") if torch.cuda.is_available() else ("torch",)
    return {f"{e}-{m}": {"method": m, "kernel": e} for e in engines for m in ("sort", "bin")}


def step(loss: Callable[..., Tensor], inputs: Sequence[Tensor]) -> Callable[[], None]:
    """One forward and backward pass."""

    def run() -> None:
        for x in inputs:
            x.grad = None
        loss(*inputs).backward()

    return run


def clip_loss(v: Tensor, t: Tensor, all_v: Tensor, all_t: Tensor, s: Tensor) -> Tensor:
    """The symmetric cross-entropy of the same rows, as open_clip's ClipLoss computes it."""
    own = torch.arange(len(v), device=v.device)
    return (F.cross_entropy(s * v @ all_t.T, own) + F.cross_entropy(s * t @ all_v.T, own)) / 2


def costs(bench: Bench) -> dict[str, Any]:
    """Forward and backward pass."""
    found: dict[str, Any] = {}
    for rows, items in bench.sizes(*SIZES, *LARGEST):
        contenders: dict[str, Callable[..., Tensor]] = {"ClipLoss": clip_loss}
        for name, engine in implementations().items():
            loss = rankloss.RankClipLoss(schedule="constant", **engine)
            contenders[name] = lambda v, t, _v, _t, s, loss=loss: loss(v, t, s)
        if rows == items:
            contenders["naive terms"] = lambda v, t, _v, _t, s: naive_rank_terms(v, t, s)
        for name, loss in contenders.items():
            key = f"{name}, {rows} × {items}"
            if bench.left < 5:
                found[key] = {"skipped": "no time left"}
                continue
            inputs = bench.features(rows, items)
            try:
                with one_of(items // rows, inputs[:2], inputs[2:4]):
                    found[key] = bench.timed(step(loss, inputs), most=2.0)
            except RuntimeError as error:
                if "out of memory" not in str(error):
                    raise
                found[key] = {"skipped": "out of memory"}
                torch.cuda.empty_cache()
    return found


def training_step(bench: Bench) -> dict[str, Any]:
    """A training step of open_clip's models in bfloat16"""
    import open_clip

    found: dict[str, Any] = {}
    for model_name, batch in (TINY if bench.dry else MODELS).items():
        model = open_clip.create_model(model_name, pretrained=None, output_dict=True)
        size = np.broadcast_to(model.visual.image_size, 2).tolist()
        images = torch.randn(batch, 3, *size, device=bench.device)
        texts = torch.randint(1, model.vocab_size, (batch, model.context_length), device=bench.device)
        losses: dict[str, Any] = {"clip": open_clip.ClipLoss()}
        for name, engine in implementations().items():
            losses[f"rankclip {name}"] = rankloss.RankClipLoss(schedule="constant", **engine)
        for name, loss in losses.items():
            run = step_of(model.to(bench.device), loss, images, texts, torch.bfloat16)
            key = f"{model_name} --loss {name}"
            found[key] = {"skipped": "no time left"} if bench.left < 8 else bench.timed(run, most=3.0)
    return found


SECTIONS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "costs": costs,
    "training_step": training_step,
}


def conditions(device: torch.device, dry: bool) -> dict[str, Any]:
    """Conditions of the numbers."""
    found: dict[str, Any] = {"card": "none: the CPU", "dry run": dry}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"card": properties.name, "GiB": round(properties.total_memory / 2**30, 1)}
        found |= {"processors": properties.multi_processor_count, "CUDA": torch.version.cuda}
    return {**found, **measure.conditions()}


def report(folder: Path) -> str:
    """All tables as Markdown, from the files of a folder."""
    measured = {name: folder / f"{name}.json" for name in ("conditions", *SECTIONS)}
    found = {name: json.loads(path.read_text()) for name, path in measured.items() if path.exists()}
    parts = ["; ".join(f"{name} {value}" for name, value in found.pop("conditions").items()) + "."]
    for name, rows in found.items():
        columns = list(dict.fromkeys(column for row in rows.values() for column in row))
        cells = [[key, *(_cell(row.get(column)) for column in columns)] for key, row in rows.items()]
        parts += [f"### {SECTIONS[name].__doc__}", markdown_table(["", *columns], cells)]
    missing = [name for name in SECTIONS if name not in found]
    parts += [f"Not measured: {', '.join(missing)}."] if missing else []
    return "\n\n".join(parts) + "\n"


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:,.4g}" if isinstance(value, float) else str(value).replace("|", "\\|")


def run_section(name: str, bench: Bench, folder: Path) -> bool:
    """True if it succeeded; then its results are in the folder."""
    start = time.monotonic()
    try:
        results: Mapping[str, Any] = SECTIONS[name](bench)
    except Exception:
        traceback.print_exc()
        print(f"{name}: FAILED", flush=True)
        return False
    (folder / f"{name}.json").write_text(json.dumps(results, indent=2) + "\n")
    print(f"{name}: done in {time.monotonic() - start:.0f} s", flush=True)
    return True


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("outputs/gpu"), help="default: %(default)s")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, at tiny sizes")
    parser.add_argument("--write", type=Path, help="also fill the tables into this file, between its markers")
    args = parser.parse_args(argv)
    if not args.dry_run and not torch.cuda.is_available():
        parser.error("there is no CUDA device; --dry-run runs every section on the CPU")
    device = torch.device("cpu" if args.dry_run else "cuda")
    torch.backends.cuda.matmul.allow_tf32 = True  # as open_clip's trainer sets it
    args.output.mkdir(parents=True, exist_ok=True)
    about = json.dumps(conditions(device, args.dry_run), indent=2) + "\n"
    (args.output / "conditions.json").write_text(about)
    bench, failed = Bench(device, args.dry_run, time.monotonic() + LIMIT), []
    for name in SECTIONS:
        if (args.output / f"{name}.json").exists():
            print(f"{name}: done before", flush=True)
        elif bench.left < 10:
            print(f"{name}: no time left; repeat the command to run it", flush=True)
            failed.append(name)
        elif not run_section(name, bench, args.output):
            failed.append(name)
    text = report(args.output)
    (args.output / "report.md").write_text(text, encoding="utf-8")
    if args.write:
        fill(args.write, "gpu", text)
    print("Wrote", args.output / "report.md", *([args.write] if args.write else []))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
