"""Random states of one rank (torch, CUDA, numpy, python) in one safetensors file."""

import random
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file


def save(path: Path) -> None:
    version, python_words, python_gauss = random.getstate()
    assert version == 3
    _, numpy_words, numpy_place, numpy_has_gauss, numpy_gauss = np.random.get_state(legacy=True)
    nan = float("nan")
    state = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor(python_words, dtype=torch.int64),
        "numpy": torch.from_numpy(np.asarray(numpy_words, dtype=np.int64)),
        "numpy_place": torch.tensor([numpy_place, numpy_has_gauss], dtype=torch.int64),
        # The second half of a pair of normal draws, if one waits.
        "gauss": torch.tensor([nan if python_gauss is None else python_gauss, numpy_gauss], dtype=torch.float64),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    save_file(state, path)


def load(path: Path) -> None:
    state = load_file(path)
    python_gauss, numpy_gauss = state["gauss"].tolist()
    place, has_gauss = state["numpy_place"].tolist()
    waiting = None if np.isnan(python_gauss) else python_gauss
    torch.set_rng_state(state["torch"])
    random.setstate((3, tuple(state["python"].tolist()), waiting))
    np.random.set_state(("MT19937", state["numpy"].numpy().astype(np.uint32), place, has_gauss, numpy_gauss))
    if torch.cuda.is_available() and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])


def seed(number: int) -> None:
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)
