"""Volumes of 4x4x4 voxels with questions, and the config of a toy run."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest


@pytest.fixture(scope="session")
def toy_manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five volumes, four questions each, answers of one to four digits."""
    folder = tmp_path_factory.mktemp("toy")
    random = np.random.default_rng(0)
    rows = []
    for volume in range(5):
        np.save(folder / f"v{volume}.npy", random.integers(-1000, 1000, (4, 4, 4)).astype(np.float32))
        for question in range(4):
            digits = "".join(str(digit) for digit in random.integers(0, 10, random.integers(1, 5)))
            rows.append({"id": f"v{volume}q{question}", "case": f"c{volume}", "split": "train", "task": "toy"})
            rows[-1] |= {"volume": f"v{volume}.npy", "question": str(question), "answer": digits}
    manifest = folder / "manifest.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return manifest


@pytest.fixture(scope="session")
def toy_config(toy_manifest: Path) -> Callable[..., dict[str, Any]]:
    """JSON of a config; keywords are `section__key=value`."""

    def make(output: Path, **changes: Any) -> dict[str, Any]:
        config: dict[str, Any] = {
            "recipe": "toy",
            "run": {"output": str(output), "seed": 3, "threads": 1},
            "volume": {},
            "data": {"manifest": str(toy_manifest), "questions_per_volume": 2},
            "model": {"dropout": 0.2},
            "training": {
                "max_steps": 4,
                "accumulation": 2,
                "optimizer": {"lr": 0.01, "weight_decay": 0.1, "warmup": 2.0},
                "precision": "fp32",
                "log_every": 2,
                "save_every": 2,
            },
        }
        for key, value in changes.items():
            section = config
            *outer, last = key.split("__")
            for name in outer:
                section = section.setdefault(name, {})
            section[last] = value
        return config

    return make
