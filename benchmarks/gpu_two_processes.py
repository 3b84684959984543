"""One of two processes of a batch: its gradient against that of the whole batch, and its time."""

from __future__ import annotations

import argparse
import json
import time

import torch
import torch.distributed as dist
import torch.nn.functional as F

import rankloss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", required=True)
    parser.add_argument("--rows", type=int, required=True)
    parser.add_argument("--dim", type=int, required=True)
    args = parser.parse_args()
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(0)
    n = world * args.rows
    whole = [F.normalize(torch.randn(n, args.dim, generator=generator), dim=-1).to(args.device) for _ in "vt"]
    rows = slice(rank * args.rows, (rank + 1) * args.rows)
    s = torch.tensor(100.0, device=args.device)
    alone = [x.clone().requires_grad_() for x in whole]
    without = rankloss.Gather(rank=0, world_size=1) if hasattr(rankloss, "Gather") else None
    single = {"gather": without} if without is not None else {"rank": 0, "world_size": 1}
    rankloss.RankClipLoss(schedule="constant", **single)(*alone, s).backward()
    flags = {"local_loss": True, "gather_with_grad": True}
    if hasattr(rankloss, "Gather"):
        shared = {"gather": rankloss.Gather(**flags)}
    else:
        shared = {**flags, "rank": rank, "world_size": world}
    loss = rankloss.RankClipLoss(schedule="constant", **shared)
    seconds = []
    for _ in range(4):
        local = [x[rows].clone().requires_grad_() for x in whole]
        start = time.perf_counter()
        loss(*local, s).backward()
        if args.device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    errors = []
    for x, y in zip(local, alone, strict=True):
        assert x.grad is not None
        assert y.grad is not None
        expected = y.grad[rows]
        errors.append(float((x.grad / world - expected).norm() / expected.norm()))  # as DDP averages
    if rank == 0:
        print(
            json.dumps({"processes": world, "gradient": max(errors), "milliseconds": 1e3 * min(seconds[1:])})
        )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
