"""A model whose answers are known: it says whether anything is bright and keeps the brighter tokens."""

import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Self

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from mllm3d.config import VolumeConfig
from mllm3d.errors import UserError
from mllm3d.inference.adapter import Mode, RawAnswer

NAME = "tests.inference.fake_adapter:FakeAdapter"
PATCH = 4


class FakeAdapter:
    """Tokens are cubes of PATCH voxels; `scheduled` keeps the brighter half."""

    calls: ClassVar[list[tuple[int, Mode]]] = []  # (questions, mode) of every call

    def __init__(self, threshold: float):
        self.threshold = threshold

    @classmethod
    def load(cls, directory: Path, device: torch.device, dtype: torch.dtype) -> Self:
        weights = load_file(directory / "model.safetensors")
        if set(weights) != {"threshold"}:
            raise UserError(f"{directory}: missing or unexpected weights; export it again")
        return cls(float(weights["threshold"]))

    def answer(
        self,
        volumes: Sequence[np.ndarray],
        questions: Sequence[str],
        mode: Mode,
        max_new_tokens: int,
        seed: int,
    ) -> list[RawAnswer]:
        self.calls.append((len(questions), mode))
        means = np.concatenate([token_means(volume) for volume in volumes])
        bright = means.max() > self.threshold
        return [self._one(question, bright, means, mode, seed) for question in questions]

    def _one(self, question: str, bright: bool, means: np.ndarray, mode: Mode, seed: int) -> RawAnswer:
        order = np.argsort(means, kind="stable")
        if mode == "random":
            order = np.random.default_rng([seed, zlib.crc32(question.encode())]).permutation(len(means))
        kept = np.ones(len(means), bool)
        if mode != "none":
            kept[order[: len(means) // 2]] = False
        text = "Yes" if bright else "No"
        if "\nA. " in question:
            text = next(line for line in question.splitlines() if line.endswith(f". {text}"))
        return RawAnswer(text, len(means), int(kept.sum()), 3, 0.25, 0.45, kept)

    def token_boxes(self, shape: tuple[int, int, int]) -> np.ndarray:
        grid = np.indices([size // PATCH for size in shape]).reshape(3, -1).T * PATCH
        return np.stack([grid, grid + PATCH], axis=-1)


def token_means(volume: np.ndarray) -> np.ndarray:
    """Mean per cube, in the order of the boxes."""
    d, h, w = (size // PATCH for size in volume.shape)
    return volume.reshape(d, PATCH, h, PATCH, w, PATCH).mean(axis=(1, 3, 5)).ravel()


def write_model(folder: Path, volume: VolumeConfig | None = None, threshold: float = 0.5) -> Path:
    """A checkpoint folder of the fake model, with preprocessing.json if `volume` is given."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "fake", "architectures": ["Fake"]}))
    save_file({"threshold": torch.tensor(threshold)}, folder / "model.safetensors")
    if volume is not None:
        (folder / "preprocessing.json").write_text(volume.model_dump_json())
    return folder
