"""What adapters share: when tokens came, and where an answer ends."""

import time
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria


class Clock(StoppingCriteria):
    """Notes when each token was there; never stops."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.times: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        if input_ids.is_cuda:
            torch.cuda.synchronize(input_ids.device)
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    def until(self, token: int) -> float:
        """Seconds from the start until this token (counted from 0) was there."""
        return self.times[token] - self.start


def answer_length(tokens: list[int], ends: Collection[int]) -> int:
    """Tokens up to and including the first end token."""
    return next((number + 1 for number, token in enumerate(tokens) if token in ends), len(tokens))
