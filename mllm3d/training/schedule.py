"""Learning rate by global step: linear warm-up, then cosine, linear or constant."""

import math
from collections.abc import Callable

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from mllm3d.config import OptimizerConfig


def warmup_steps(config: OptimizerConfig, total_steps: int) -> int:
    """`warmup` below 1 is a share of all steps, else a number of steps."""
    return round(config.warmup * total_steps) if config.warmup < 1 else round(config.warmup)


def rate(config: OptimizerConfig, total_steps: int) -> Callable[[int], float]:
    """Share of the peak rate that optimizer step `step` (from 0) uses.

    Of w warm-up steps the first uses 1/w, the last 1. The decay starts after them with 1 and would reach
    `min_lr_ratio` one step after the last, so that no step is taken at rate 0.
    """
    warmup, floor = warmup_steps(config, total_steps), config.min_lr_ratio

    def at(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        if config.schedule == "constant":
            return 1.0
        progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
        shape = 1 - progress if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
        return floor + (1 - floor) * shape

    return at


def build_schedule(optimizer: Optimizer, config: OptimizerConfig, total_steps: int) -> LambdaLR:
    """The schedule as torch knows it; it scales every group's own peak rate."""
    return LambdaLR(optimizer, rate(config, total_steps))
