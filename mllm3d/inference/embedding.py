"""One loaded embedder, asked about scans and texts: the same preprocessing as in training."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Self

import numpy as np

from mllm3d.errors import UserError
from mllm3d.inference.adapter import Embedder
from mllm3d.inference.checkpoint import Checkpoint, open_checkpoint
from mllm3d.inference.loaded import Loaded, choose_device
from mllm3d.registry import EMBEDDERS, embedder_class

TEXTS = 16
"""So many texts are embedded at a time."""


class EmbeddingModel(Loaded):
    """A checkpoint that puts volumes and texts into one space.

    Embeddings are computed in float32 on every device, because they are kept, and compared with those of queries that
    may be made on another machine. Volumes go one by one and each text once, so that what is equal has equal bits,
    whatever it comes with.
    """

    def __init__(self, checkpoint: Checkpoint, embedder: Embedder, device: str):
        super().__init__(checkpoint, device)
        self.embedder = embedder

    @classmethod
    def load(cls, path: Path, device: str | None = None) -> Self:
        """Load a released folder, a step of a run, or a run's newest step.

        device: a torch device, by default `cuda` where there is one. Raises `UserError` for a model that only answers
        questions.
        """
        import torch

        checkpoint = open_checkpoint(path)
        if checkpoint.model_type not in EMBEDDERS:
            raise UserError(
                f"{path}: a model of type {checkpoint.model_type!r} puts no volumes and texts into one space; name "
                f"a checkpoint of type {' or '.join(EMBEDDERS)}, which the recipe med3dvlm.contrastive trains"
            )
        kind: type[Embedder] = embedder_class(checkpoint.model_type)
        chosen, name = choose_device(device)
        return cls(checkpoint, kind.load(checkpoint.model, chosen, torch.float32), name)

    @property
    def width(self) -> int:
        """Of an embedding."""
        return self.embedder.width

    def embed_volume(self, volume: np.ndarray) -> np.ndarray:
        """Float32 (width,) of a prepared volume."""
        found: np.ndarray = self.embedder.embed_volumes([volume])[0]
        return found

    def embed_texts(self, texts: Sequence[str], progress: Callable[[int], object] | None = None) -> np.ndarray:
        """Float32 (texts, width).

        progress: called with how many texts are done since the last call.
        """
        distinct = sorted(set(texts), key=lambda text: (len(text), text))  # equally long ones need little padding
        done: dict[str, np.ndarray] = {}
        for start in range(0, len(distinct), TEXTS):
            chunk = distinct[start : start + TEXTS]
            done |= dict(zip(chunk, self.embedder.embed_texts(chunk), strict=True))
            if progress is not None:
                progress(len(chunk))
        return np.stack([done[text] for text in texts])
