"""Time and memory of ``RankedLists`` with negatives beside CLIP's cross-entropy of the same products.

Both multiply N queries with all N·K candidates; CLIP's takes each query's first candidate as its positive.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from contenders import SCALE, D
from measure import added_bytes, conditions, in_fresh_process, in_turns
from memory import saved_bytes
from rankloss import Gather, RankedLists
from report import benchmark, markdown_table, parser_of, under

CLIP = "CLIP's cross-entropy"
MODELS = {"Plackett–Luce": "plackett_luce", "top-one": "top_one"}
TARGET = 2.0  # Plackett–Luce's time over CLIP's, at most


def batch(n: int, k: int, d: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, candidates and grades 0 to 4."""
    generator = torch.Generator().manual_seed(0)
    shapes = (n, d), (n, k, d)
    features = (F.normalize(torch.randn(*shape, generator=generator), dim=-1) for shape in shapes)
    grades = torch.randint(0, 5, (n, k), generator=generator)
    q, c = (x.requires_grad_() for x in features)
    return q, c, grades


def forward(name: str, n: int, k: int, d: int) -> Callable[[], Tensor]:
    q, c, grades = batch(n, k, d)
    scale = torch.tensor(SCALE, requires_grad=True)
    if name == CLIP:
        first = torch.arange(0, n * k, k)
        return lambda: F.cross_entropy(scale * q @ c.flatten(0, 1).T, first)
    gather = Gather(rank=0, world_size=1)
    loss = RankedLists(model=MODELS[name], in_batch_negatives=True, gather=gather)  # type: ignore[arg-type]
    return lambda: loss(q, c, grades, scale)  # type: ignore[no-any-return]


def memory(name: str, n: int, k: int, d: int, threads: int) -> dict[str, int]:
    torch.set_num_threads(threads)
    forward(name, 4, k, d)().backward()
    call = forward(name, n, k, d)
    return {"added_bytes": added_bytes(lambda: call().backward()), "saved_bytes": saved_bytes(call)}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    size = (8, 4, 16) if args.quick else (args.n, args.k, D)
    names = [CLIP, *MODELS]
    found = {name: in_fresh_process(memory, name, *size, args.threads) for name in names}
    torch.set_num_threads(args.threads)
    calls = {name: forward(name, *size) for name in names}
    steps = {name: (lambda call=call: call().backward()) for name, call in calls.items()}
    times = in_turns(steps, args.rounds)
    points = {
        name: {**found[name], "seconds": times[name].median, "ratio": times[name].ratio_to(times[CLIP])}
        for name in names
    }
    n, k, d = size
    return {"conditions": conditions(threads=args.threads, n=n, k=k, d=d), "points": points}


def report(results: dict[str, Any]) -> str:
    c = results["conditions"]
    rows = [
        [
            name,
            f"{x['seconds'] * 1e3:,.0f}",
            f"{x['ratio']:.2f}×",
            f"{x['added_bytes'] / 2**20:,.0f}",
            f"{x['saved_bytes'] / 2**20:,.0f}",
        ]
        for name, x in results["points"].items()
    ]
    ratio = results["points"]["Plackett–Luce"]["ratio"]
    head = [
        "forward and backward",
        "ms",
        "median of the rounds' ratios",
        "added MiB",
        "MiB saved for backward",
    ]
    return (
        f"{c['n']} lists of {c['k']} candidates. {under(c)}\n\n{markdown_table(head, rows)}\n\n"
        f"Plackett–Luce at most {TARGET:.2f}× CLIP's: {'yes' if ratio <= TARGET else '**no**'}.\n"
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--n", type=int, default=512, help="lists; default: %(default)s")
    parser.add_argument("--k", type=int, default=64, help="candidates of a list; default: %(default)s")
    parser.add_argument("--threads", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    benchmark(parser.parse_args(argv), "lists", measure, report, ("ranked_lists.json", "ranked_lists.md"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
