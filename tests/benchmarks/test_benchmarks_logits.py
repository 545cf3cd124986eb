"""Logits are computed where they are needed, in training and in the prefill, and peak memory shows it.

The vocabulary is large and the model tiny, so that logits of every token would be most of what a pass holds.
"""

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
CPU = torch.device("cpu")
VOCABULARY = 50_000
QUESTION, ANSWER = 300, 2


@pytest.fixture(scope="module")
def modules() -> Iterator[tuple[Any, Any]]:
    """photon_speed and measuring, which import what lies beside them."""
    sys.path.insert(0, str(FOLDER))
    yield importlib.import_module("photon_speed"), importlib.import_module("measuring")
    sys.path.remove(str(FOLDER))


@pytest.fixture(scope="module")
def subject(modules: tuple[Any, Any]) -> Any:
    speed, _ = modules
    torch.manual_seed(0)
    config = speed.small_config(64, 4, 32, 2)
    config.text_config.vocab_size = VOCABULARY
    work = speed.Work(shape=(28, 112, 112), text=QUESTION, answer=ANSWER, before=4, tokens=1)
    return speed.Subject(config, work, CPU, torch.float32)


@contextmanager
def everywhere(model: Any) -> Iterator[list[int]]:
    """The head runs on what every token leaves the decoder with, besides; how many tokens these are, pass by pass."""
    left: list[Tensor] = []
    tokens: list[int] = []

    def add(head: Any, _given: Any, logits: Tensor) -> Tensor:
        hidden = left.pop()
        tokens.append(hidden.shape[-2])
        return logits + 0 * F.linear(hidden, head.weight).sum()

    last = model.model.language_model.layers[-1]
    handles = [
        last.register_forward_hook(lambda *given: left.append(given[-1])),
        model.lm_head.register_forward_hook(add),
    ]
    try:
        yield tokens
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("name", ["a", "c", "d4", "f4"])
def test_peak_memory_is_below_that_of_all_tokens_logits(modules: tuple[Any, Any], subject: Any, name: str) -> None:
    """Without dropping, with it, and with four questions on a volume."""
    speed, measuring = modules
    variant = next(v for v in speed.variants([1, 4]) if v.name == name)
    if variant.keep is not None:
        subject.calibrate(variant)
    runs = speed.Runs(subject, variant)
    passes: list[Callable[[], None]] = [runs.step, runs.prefill]
    for run in passes:
        with everywhere(subject.model) as tokens:
            full = measuring.peak_bytes(run, CPU)
        subject.model.zero_grad(set_to_none=True)
        peak = measuring.peak_bytes(run, CPU)
        subject.model.zero_grad(set_to_none=True)
        # Those of the last layers, which are the fewest: after dropping, and without the answer in the prefill. Beside
        # the activations a step holds three gradients of the embedding, each as large as the logits of 64 tokens.
        (count,) = tokens
        assert peak < count * VOCABULARY * 4 < full
