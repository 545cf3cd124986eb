"""What adapters share: when tokens came, where an answer ends, seeds of questions, boxes of tokens."""

import hashlib
import time
from collections.abc import Collection
from typing import Any

import numpy as np
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


def question_seed(seed: int, question: str) -> int:
    """A seed that depends on the question's text and not on its company."""
    digest = hashlib.sha256(f"{seed}\n{question}".encode()).digest()
    return int.from_bytes(digest[:4], "little")


def grid_boxes(shape: tuple[int, int, int], unit: tuple[int, int, int]) -> np.ndarray:
    """Half-open boxes (tokens, 3, 2) of ``unit`` voxels that cover a shape, W fastest."""
    t, h, w = (-(-n // u) for n, u in zip(shape, unit, strict=True))
    corner = np.stack(np.meshgrid(np.arange(t), np.arange(h), np.arange(w), indexing="ij"), -1).reshape(-1, 3)
    return np.stack([corner * unit, (corner + 1) * unit], axis=-1)
