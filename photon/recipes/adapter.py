"""Photon behind the framework's inference interface."""

import hashlib
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn
from transformers import StoppingCriteria, StoppingCriteriaList

from mllm3d.errors import UserError
from mllm3d.inference.adapter import Mode, RawAnswer
from photon.building import read_processor
from photon.decoding import EncodedPrefix
from photon.modeling_photon import PhotonForConditionalGeneration
from photon.processing_photon import PhotonProcessor
from photon.recipes.base import chat, read_checkpoint

NOISE = 0.1
"""Thresholds of the mode `noisy` are off by up to 10 % (Photon A.2.7)."""


class _Clock(StoppingCriteria):
    """Notes when each token was there; never stops."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        if input_ids.is_cuda:
            torch.cuda.synchronize(input_ids.device)
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


@dataclass
class PhotonAdapter:
    """Photon behind `mllm3d.inference.adapter.Adapter`."""

    model: PhotonForConditionalGeneration
    processor: PhotonProcessor
    _encoded: tuple[bytes, EncodedPrefix] | None = None
    """The last volumes and what questions about them share: asked again, they are not encoded again."""

    @classmethod
    def load(cls, directory: Path, device: torch.device, dtype: torch.dtype) -> Self:
        """Strict: weights that do not fit raise `UserError`."""
        try:
            model = read_checkpoint(directory, dtype)
            processor = read_processor(directory, model.config)
        except (OSError, ValueError) as error:
            raise UserError(f"{directory}: {' '.join(str(error).split())}") from error
        return cls(model.to(device).eval(), processor)

    def answer(
        self,
        volumes: Sequence[np.ndarray],
        questions: Sequence[str],
        mode: Mode,
        max_new_tokens: int,
        seed: int,
    ) -> list[RawAnswer]:
        """Greedy answers; the volumes are encoded once for all questions, and for those of the next call."""
        clock, start = _Clock(), time.perf_counter()
        inputs = dict(self.processor(list(volumes), [chat(q) for q in questions]))
        inputs["seeds"] = torch.tensor([question_seed(seed, q) for q in questions])
        key = _digest(volumes, mode == "none")
        if self._encoded is not None and self._encoded[0] == key:
            del inputs["pixel_values_videos"]
        inputs = {k: v.to(self.model.device) for k, v in inputs.items()}
        with torch.inference_mode(), _decisions(self.model) as decided:
            result = self.model.generate(
                **inputs,
                **self._how(mode, None if "pixel_values_videos" in inputs else self._encoded),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                stopping_criteria=StoppingCriteriaList([clock]),
                return_dict_in_generate=True,
            )
        prefix = result.past_key_values.photon.prefix
        self._encoded = None if prefix is None else (key, prefix)
        generated = result.sequences
        new = generated[:, inputs["input_ids"].shape[1] :].tolist()
        ends = [_length(row, self.processor.tokenizer.eos_token_id) for row in new]
        total = sum(self.processor.geometry.tokens(v.shape) for v in volumes)
        entered: list[Any] = list(decided) or [None] * len(questions)
        kept = [_on_grid(k, inputs.get("token_index"), total) for k in entered]
        texts = self.processor.tokenizer.batch_decode(
            [r[:n] for r, n in zip(new, ends, strict=True)], skip_special_tokens=True
        )
        return [
            RawAnswer(text.strip(), total, int(k.sum()), n, clock.times[0] - start, clock.times[n - 1] - start, k)
            for text, n, k in zip(texts, ends, kept, strict=True)
        ]

    @staticmethod
    def _how(mode: Mode, encoded: tuple[bytes, EncodedPrefix] | None) -> dict[str, Any]:
        """What a mode is to the model."""
        return {
            "reduction": "none" if mode == "none" else "hard",
            "selection": "random" if mode == "random" else None,
            "threshold_noise": NOISE if mode == "noisy" else 0.0,
            "early_cache": "evict" if mode == "evicted" else "keep",
            "prefix": None if encoded is None else encoded[1],
        }

    def token_boxes(self, shape: tuple[int, int, int]) -> np.ndarray:
        """Voxel boxes of a volume's tokens, in their order; boxes may reach past the volume's end."""
        unit = np.array(self.processor.geometry.token_shape)
        t, h, w = (-(-n // u) for n, u in zip(shape, unit, strict=True))
        corner = np.stack(np.meshgrid(np.arange(t), np.arange(h), np.arange(w), indexing="ij"), -1).reshape(-1, 3)
        return np.stack([corner * unit, (corner + 1) * unit], axis=-1)


@contextmanager
def _decisions(model: nn.Module) -> Iterator[list[np.ndarray]]:
    """What the prefill decided to keep, row by row, which `generate` does not return; empty where nothing was."""
    kept: list[np.ndarray] = []

    def note(_module: nn.Module, _inputs: Any, output: Any) -> None:
        if output.kept is not None:
            kept.extend(output.kept.cpu().numpy())

    handle = model.register_forward_hook(note)
    try:
        yield kept
    finally:
        handle.remove()


def _on_grid(kept: np.ndarray | None, token_index: Tensor | None, total: int) -> np.ndarray:
    """Which of the volumes' ``total`` tokens stayed, from those of them that entered the model; None: all these."""
    mask = np.zeros(total, bool)
    mask[slice(None) if token_index is None else token_index.cpu().numpy()] = True if kept is None else kept
    return mask


def _digest(volumes: Sequence[np.ndarray], whole: bool) -> bytes:
    """Tells volumes apart, and whether all of the decoder's layers are shared."""
    digest = hashlib.blake2b(bytes([whole]))
    for volume in volumes:
        digest.update(repr((volume.shape, volume.dtype)).encode())
        digest.update(np.ascontiguousarray(volume).data)
    return digest.digest()


def _length(tokens: list[int], end: int) -> int:
    """Tokens up to and including the first end token."""
    return tokens.index(end) + 1 if end in tokens else len(tokens)


def question_seed(seed: int, question: str) -> int:
    """A seed that depends on the question's text and not on its company."""
    digest = hashlib.sha256(f"{seed}\n{question}".encode()).digest()
    return int.from_bytes(digest[:4], "little")
