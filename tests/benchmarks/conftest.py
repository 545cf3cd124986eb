"""What tests of the benchmarks share."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def programs() -> Iterator[None]:
    """The programs import what lies beside them. They run with one thread; others get theirs back."""
    threads = torch.get_num_threads()
    sys.path.insert(0, str(FOLDER))
    yield
    sys.path.remove(str(FOLDER))
    torch.set_num_threads(threads)
