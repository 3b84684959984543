"""A training step of the demo's model with ClipLoss, the naive rank terms and RankClipLoss: ``make bench``.

The benchmark is a round in which each loss makes a step; ``extra_info`` holds the medians of each and the
medians of the rounds' ratios, which a machine that slows down changes little.
"""

from __future__ import annotations

import itertools

import torch
from pytest_benchmark.fixture import BenchmarkFixture

from measure import Times, in_turns
from training_step import LOSSES, training_steps

ROUNDS = 15


def test_training_step_in_turns(benchmark: BenchmarkFixture) -> None:
    steps = training_steps()
    orders = itertools.cycle([steps, dict(reversed(steps.items()))])
    times = {name: Times([]) for name in LOSSES}

    def one_round() -> None:
        for name, once in in_turns(next(orders), rounds=1, warm_up=0).items():
            times[name].seconds.extend(once.seconds)

    benchmark.pedantic(one_round, rounds=ROUNDS, warmup_rounds=2)
    measured = {name: Times(t.seconds[-ROUNDS:]) for name, t in times.items()}
    clip = measured[LOSSES[0]]
    benchmark.extra_info.update(
        torch=torch.__version__,
        threads=torch.get_num_threads(),
        median_milliseconds={name: 1000 * t.median for name, t in measured.items()},
        ratio_to_clip={name: t.ratio_to(clip) for name, t in measured.items()},
    )
