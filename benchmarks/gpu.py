"""What the losses cost on one CUDA card, and whether they are right there, in less than nine minutes.

Each section runs in a process of its own and writes its results to ``OUTPUT/NAME.json`` when it is done. A
section that fails or runs out of time costs only itself. One that is done is not run again, so that the same
command resumes an interrupted run. ``--dry-run`` runs every section on the CPU, at sizes that say nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import platform
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import rankloss
from gpu_report import write_report
from naive import naive_rank_terms
from rankloss import kernels
from rankloss.ranking import quantize
from traffic import with_library

LIMIT = 530  # seconds for everything
SCALE = 100.0
SIZES = ((1024, 1024), (1024, 8192), (4096, 4096), (1024, 32768), (16384, 16384), (1024, 65536))
LARGEST = ((65536, 65536), (1024, 131072))
# From siglip-kernel's own table: an H100, bfloat16, D = 768, forward and backward.
PUBLISHED = {"siglip-kernel, B = 65,536, D = 768 (published)": {"milliseconds": 48.8, "gib": 1.4}}


class Bench(NamedTuple):
    """Where a section runs, and how large."""

    device: torch.device
    dry: bool
    deadline: float

    @property
    def dim(self) -> int:
        return 8 if self.dry else 512

    def sizes(self, sizes: Sequence[tuple[int, int]]) -> Sequence[tuple[int, int]]:
        return ((4, 8), (8, 8)) if self.dry else sizes

    @property
    def left(self) -> float:
        return self.deadline - time.monotonic()

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def features(self, rows: int, items: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        """Local features, those of all, and the scale: what :func:`traffic.with_library` takes."""
        generator = torch.Generator(device=self.device).manual_seed(0)
        everyone = [
            F.normalize(torch.randn(items, self.dim, device=self.device, generator=generator), dim=-1)
            .to(dtype).requires_grad_()
            for _ in range(2)
        ]  # fmt: skip
        local = everyone if rows == items else [x.detach()[:rows].clone().requires_grad_() for x in everyone]
        return [*local, *everyone, torch.tensor(SCALE, device=self.device, requires_grad=True)]

    def timed(self, call: Callable[[], Any], most: float) -> dict[str, float]:
        """Median milliseconds, and MiB beyond what was allocated before."""
        for _ in range(1 if self.dry else 3):
            call()
        self.synchronize()
        before = 0
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        times: list[float] = []
        start = time.monotonic()
        while not times or (len(times) < 20 and time.monotonic() - start < min(most, self.left)):
            begin = time.perf_counter()
            call()
            self.synchronize()
            times.append(1e3 * (time.perf_counter() - begin))
        peak = torch.cuda.max_memory_allocated() - before if self.device.type == "cuda" else 0
        return {"milliseconds": sorted(times)[len(times) // 2], "peak_mib": peak / 2**20}


def implementations() -> dict[str, dict[str, Any]]:
    """Options of the loss by the name of what computes it."""
    # A dry run has the kernels in a section of their own: in the interpreter a loss takes minutes.
    engines = ("torch", "triton") if torch.cuda.is_available() else ("torch",)
    return {
        f"{engine}-{method}": {"method": method, "kernel": engine}
        for engine in engines
        for method in ("sort", "bin")
    }


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


def naive_loss(v: Tensor, t: Tensor, _all_v: Tensor, _all_t: Tensor, s: Tensor) -> Tensor:
    """The rank terms as they are usually first written; of a whole batch only."""
    return naive_rank_terms(v, t, s)


@contextlib.contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error)


# The sections, in the order in which they run: what decides whether the rest means anything comes first.


def kernel_agreement(bench: Bench) -> dict[str, Any]:
    """The kernels against float64, at sizes on both sides of every choice of a launch."""
    found = {}
    for n, items in bench.sizes(((64, 1000), (64, 2048), (64, 2049), (32, 8192), (8, 65536), (4, 131072))):
        x, y = cosines(bench, n, items)
        for method in ("sort", "bin"):
            found[f"{method}, {n} × {items}"] = agreement(bench, x, y, method)
    x, y = cosines(bench, *bench.sizes(((8, 8192),))[0])
    y[0] = 0.5
    y[1, 1:] = torch.linspace(0, 1e-6, y.shape[1] - 1, device=y.device)
    y[2] = y[2].mul(20).round().div(20)
    found["sort, rows that are merged"] = agreement(bench, x, y, "sort")
    return found


def cosines(bench: Bench, n: int, items: int) -> tuple[Tensor, Tensor]:
    v, t, all_v, all_t, _ = (x.detach() for x in bench.features(n, items))
    with tf32(False):
        return v @ all_t.T, t @ all_v.T


def agreement(bench: Bench, x: Tensor, y: Tensor, method: Any) -> dict[str, Any]:
    one = torch.ones((), device=x.device)
    arguments, bins = (x, y, SCALE * one, one), 8 if bench.dry else 512
    _, nll, slopes = kernels.evaluate_rows(*arguments, alpha=one, method=method, bins=bins)
    again = kernels.evaluate_rows(*arguments, alpha=one, method=method, bins=bins)
    assert slopes is not None
    assert again[2] is not None
    scores = (x.double() * SCALE).requires_grad_()
    own = torch.arange(len(x), device=x.device)
    reference = y if method == "sort" else quantize(y, bins)
    expected = rankloss.plackett_luce_nll(scores, reference)
    total = expected + F.cross_entropy(scores, own, reduction="none")
    (gradient,) = torch.autograd.grad(total.sum(), scores)
    bench.synchronize()
    return {
        "nll": float(((nll - expected).abs() / expected.abs()).max().detach()),
        "gradient": float((slopes - gradient).norm() / gradient.norm()),
        "same_bits_twice": torch.equal(nll, again[1]) and torch.equal(slopes, again[2]),
    }


def waits(bench: Bench) -> dict[str, Any]:
    """Whether a step makes the host wait for the device, by option."""
    cases: list[dict[str, Any]] = [
        {}, {"discount": "log"}, {"top_k": 2}, {"ties": "random"}, {"diagonal": False},
        {"fixed_reference": "text"}, {"reduction": "sum"},
    ]  # fmt: skip
    found = {}
    for name, engine in implementations().items():
        for case in cases:
            if "ties" in case and engine["method"] == "bin":
                continue
            rows, items = bench.sizes(((256, 1024),))[0]
            inputs = bench.features(rows, items)
            if "ties" in case:
                engine = {k: v for k, v in engine.items() if k != "kernel"}
            run = step(with_library(rows, items, **engine, **case), inputs)
            run()
            bench.synchronize()
            found[f"{name} {case}"] = first_wait(bench, run)
    return found


def first_wait(bench: Bench, run: Callable[[], None]) -> str:
    if bench.device.type != "cuda":
        run()
        return "not measured"
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return "none"


def precision(bench: Bench) -> dict[str, Any]:
    """The gradient by the features against float64 on the CPU, with and without TF32 products."""
    n = 8 if bench.dry else 1024
    v, t = (x.detach() for x in bench.features(n, n)[:2])
    found = {}
    for s in (14.3, 100.0):
        exact = [x.cpu().double().requires_grad_() for x in (v, t)]
        rankloss.RankConsistency()(*exact, s).backward()
        expected = torch.cat([x.grad for x in exact if x.grad is not None])
        for allowed in (False, True):
            for name, engine in implementations().items():
                got = [x.clone().requires_grad_() for x in (v, t)]
                with tf32(allowed):
                    loss = rankloss.RankConsistency(**engine)
                    loss(*got, torch.tensor(s, device=bench.device)).backward()
                gradient = torch.cat([x.grad for x in got if x.grad is not None]).cpu().double()
                error = float((gradient - expected).norm() / expected.norm())
                found[f"{name}, s = {s}, TF32 {'on' if allowed else 'off'}"] = error
    return found


def costs(bench: Bench) -> dict[str, Any]:
    """Time and memory of a forward and backward pass, TF32 products as open_clip's trainer sets them."""
    found: dict[str, Any] = dict(PUBLISHED)
    with tf32(True):
        for rows, items in bench.sizes((*SIZES, *LARGEST)):
            contenders: dict[str, Callable[..., Tensor]] = {"ClipLoss": clip_loss}
            for name, engine in implementations().items():
                contenders[name] = with_library(rows, items, **engine)
            if rows == items:
                contenders["naive terms"] = naive_loss
            for name, loss in contenders.items():
                key = f"{name}, {rows} × {items}"
                if bench.left < 5:
                    found[key] = {"skipped": "no time left"}
                    continue
                try:
                    found[key] = bench.timed(step(loss, bench.features(rows, items)), most=2.0)
                except RuntimeError as error:
                    if not is_out_of_memory(error):
                        raise
                    found[key] = {"skipped": "out of memory"}
                if bench.device.type == "cuda":
                    torch.cuda.empty_cache()
    return found


def kernel_times(bench: Bench) -> dict[str, Any]:
    """Each kernel alone: how fast it takes elements, beside what it moves."""
    found = {}
    for n, items in bench.sizes(((1024, 1024), (1024, 8192), (1024, 32768), (1024, 131072))):
        x, y = cosines(bench, n, items)
        one = torch.ones((), device=x.device)
        for method, bins in (
            ("sort", 0),
            ("bin", 8 if bench.dry else 512),
            ("bin", 9 if bench.dry else 2048),
        ):
            moved = kernels.traffic(n, items, bins=bins)
            run = functools.partial(
                kernels.evaluate_rows, x, y, SCALE * one, one, alpha=one, method=method, bins=bins or 2
            )
            taken = bench.timed(run, most=1.0)
            seconds = taken["milliseconds"] / 1e3
            found[f"{method} {bins or ''}, {n} × {items}"] = {
                **taken,
                "giga_elements_per_second": n * items / seconds / 1e9,
                "gigabytes_per_second_if_cached": moved.once / seconds / 1e9,
                "gigabytes_per_second_issued": moved.issued / seconds / 1e9,
            }
    return found


def kernels_by_name(bench: Bench) -> dict[str, Any]:
    """The twelve operations that take most of the time."""
    from torch.profiler import ProfilerActivity, profile

    rows, items = bench.sizes(((1024, 8192),))[0]
    on_gpu = bench.device.type == "cuda"
    activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
    found: dict[str, Any] = {}
    for name, engine in implementations().items():
        run = step(with_library(rows, items, **engine), bench.features(rows, items))
        run()
        with profile(activities=[activity]) as profiler:
            run()
            bench.synchronize()
        attribute = "self_device_time_total" if on_gpu else "self_cpu_time_total"
        events = sorted(profiler.key_averages(), key=lambda e: -getattr(e, attribute))[:12]
        found[name] = {e.key: {"microseconds": getattr(e, attribute), "calls": e.count} for e in events}
    return found


def graph_capture(bench: Bench) -> dict[str, Any]:
    """Whether a captured step replays to the same bits, and whether a new λ reaches it."""
    rows, items = bench.sizes(((256, 1024),))[0]
    found = {}
    for name, engine in implementations().items():
        inputs = bench.features(rows, items)
        loss = rankloss.RankClipLoss(schedule="linear", **engine)
        square = inputs[2:4] if rows == items else inputs[:2]

        def gradients(loss: Any = loss, square: Any = square, s: Tensor = inputs[4]) -> tuple[Tensor, ...]:
            return torch.autograd.grad(loss(*square, s), square)

        loss.set_progress(1, 2)
        eager = gradients()
        if bench.device.type != "cuda":
            found[name] = {"captured": "not measured"}
            continue
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                gradients()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = gradients()
        graph.replay()
        same = all(torch.equal(a, b) for a, b in zip(captured, eager, strict=True))
        before = captured[0].clone()
        loss.set_progress(2, 2)
        graph.replay()
        found[name] = {"replay_is_eager": same, "lambda_moves": not torch.equal(before, captured[0])}
    return found


def training_step(bench: Bench) -> dict[str, Any]:
    """A step of open_clip's models in bfloat16 on random pictures and words, by loss."""
    import open_clip

    found = {}
    models = ("ViT-B-32",) if bench.dry else ("ViT-B-32", "ViT-B-16")
    for model_name in models:
        torch.manual_seed(0)
        config: dict[str, Any] = {}
        if bench.dry:
            config = {
                "vision_cfg": {
                    "layers": 1, "width": 64, "patch_size": 32, "image_size": 64, "head_width": 32,
                },
                "text_cfg": {"layers": 1, "width": 32, "heads": 2}, "embed_dim": 16,
            }  # fmt: skip
            model = open_clip.CLIP(**config)
        else:
            model = open_clip.create_model(model_name, pretrained=None)
        model = model.to(bench.device)
        batch = 4 if bench.dry else {"ViT-B-32": 1024, "ViT-B-16": 384}[model_name]
        size = 64 if bench.dry else 224
        images = torch.randn(batch, 3, size, size, device=bench.device)
        texts = torch.randint(1, 49407, (batch, 77), device=bench.device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
        losses: dict[str, Callable[..., Tensor]] = {"clip": open_clip.ClipLoss()}
        for name, engine in implementations().items():
            losses[f"rankclip {name}"] = rankloss.RankClipLoss(schedule="constant", **engine)
        for name, loss in losses.items():

            def run(model: Any = model, loss: Any = loss, images: Tensor = images, texts: Tensor = texts,
                    optimizer: Any = optimizer) -> None:  # fmt: skip
                optimizer.zero_grad(set_to_none=True)
                with torch.autocast(bench.device.type, torch.bfloat16):
                    loss(*model(images, texts)[:3]).backward()
                optimizer.step()

            if bench.left < 8:
                found[f"{model_name} --loss {name}"] = {"skipped": "no time left"}
                continue
            with tf32(True):
                found[f"{model_name} --loss {name}"] = {**bench.timed(run, most=3.0), "batch": batch}
    return found


def two_processes(bench: Bench) -> dict[str, Any]:
    """Two processes on the one card, over gloo: the gradient is that of the whole batch in one process."""
    rows = 4 if bench.dry else 512
    code = Path(__file__).with_name("gpu_two_processes.py")
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=0",
        "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0",
        code, "--device", bench.device.type, "--rows", str(rows), "--dim", str(bench.dim),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=max(20, bench.left))
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


SECTIONS: dict[str, tuple[Callable[[Bench], dict[str, Any]], int]] = {
    # with the seconds that each may take
    "kernel_agreement": (kernel_agreement, 75),
    "waits": (waits, 45),
    "precision": (precision, 45),
    "costs": (costs, 150),
    "kernel_times": (kernel_times, 40),
    "graph_capture": (graph_capture, 30),
    "training_step": (training_step, 80),
    "two_processes": (two_processes, 35),
    "kernels_by_name": (kernels_by_name, 30),
}


def conditions(device: torch.device, dry: bool) -> dict[str, Any]:
    """What the numbers hold for."""
    found: dict[str, Any] = {
        "dry_run": dry,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "rankloss": rankloss.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "card": "none: the CPU",
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
        found |= {
            "card": properties.name,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "processors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
            "driver": driver.splitlines()[0] if driver else "unknown",
        }
    return found


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("outputs/gpu"), help="default: %(default)s")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), metavar="SECTION",
                        help=f"of {', '.join(SECTIONS)} (default: all)")  # fmt: skip
    parser.add_argument("--again", action="store_true", help="run sections that are done as well")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds in all (default: %(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, at tiny sizes")
    parser.add_argument("--write", type=Path, help="also fill the tables into this file, between its markers")
    parser.add_argument("--section", choices=SECTIONS, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if not args.dry_run and not torch.cuda.is_available():
        parser.error("there is no CUDA device; --dry-run runs every section on the CPU")
    if args.dry_run and args.write:
        parser.error("--write is for measurements; a dry run has none")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = _parse(argv)
    args.output.mkdir(parents=True, exist_ok=True)
    device = torch.device("cpu" if args.dry_run else "cuda")
    if args.section:
        return run_section(args.section, device, args)
    (args.output / "conditions.json").write_text(
        json.dumps(conditions(device, args.dry_run), indent=2) + "\n"
    )
    deadline = time.monotonic() + args.limit
    failed = []
    for name in args.only:
        if (args.output / f"{name}.json").exists() and not args.again:
            print(f"{name}: done before", flush=True)
            continue
        seconds = min(SECTIONS[name][1], deadline - time.monotonic() - 5)
        if seconds < 10:
            print(f"{name}: no time left; repeat the command to run it", flush=True)
            failed.append(name)
        elif not start_section(name, seconds, args):
            failed.append(name)
    written = write_report(args.output, args.write)
    print("Wrote", *written)
    return 1 if failed else 0


def start_section(name: str, seconds: float, args: argparse.Namespace) -> bool:
    """Run a section in a process of its own; whether it succeeded."""
    command = [sys.executable, __file__, "--section", name, "--output", args.output, "--limit", str(seconds)]
    environment = dict(os.environ)
    if args.dry_run:
        command.append("--dry-run")
        environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    start = time.monotonic()
    try:
        # A section keeps to its time itself; this ends one that hangs.
        code = subprocess.run(command, env=environment, check=False, timeout=seconds + 30).returncode
    except subprocess.TimeoutExpired:
        code = -1
    print(f"{name}: {'done' if code == 0 else 'FAILED'} in {time.monotonic() - start:.0f} s", flush=True)
    return code == 0


def run_section(name: str, device: torch.device, args: argparse.Namespace) -> int:
    bench = Bench(device, args.dry_run, time.monotonic() + args.limit)
    partial = args.output / f"{name}.json.partial"
    try:
        partial.write_text(json.dumps(SECTIONS[name][0](bench), indent=2) + "\n")
    except Exception:
        (args.output / f"{name}.error.txt").write_text(traceback.format_exc())
        traceback.print_exc()
        return 1
    (args.output / f"{name}.error.txt").unlink(missing_ok=True)
    partial.rename(args.output / f"{name}.json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
