"""Photon behind the framework's inference interface."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor, nn
from transformers import StoppingCriteriaList

from mllm3d.errors import UserError
from mllm3d.inference.adapter import Mode, RawAnswer
from mllm3d.inference.generation import Clock, answer_length, grid_boxes, question_seed
from photon.building import read_processor
from photon.decoding import EncodedPrefix
from photon.modeling_photon import PhotonForConditionalGeneration
from photon.processing_photon import PhotonProcessor
from photon.recipes.base import chat, read_checkpoint

NOISE = 0.1
"""Thresholds of the mode `noisy` are off by up to 10 % (Photon A.2.7)."""


@dataclass
class PhotonAdapter:
    """Photon behind `mllm3d.inference.adapter.Adapter`."""

    takes_pixels: ClassVar[bool] = True
    model: PhotonForConditionalGeneration
    processor: PhotonProcessor
    _encoded: tuple[bytes, EncodedPrefix] | None = None
    """What was last shown and what questions about it share: asked again, it is not encoded again."""

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
        images: Sequence[np.ndarray] = (),
        videos: Sequence[np.ndarray] = (),
    ) -> list[RawAnswer]:
        """Greedy answers; what is shown is encoded once for all questions, and for those of the next call."""
        clock = Clock()
        inputs = dict(self.processor(list(volumes), [chat(q) for q in questions], images=images, videos=videos))
        total = sum(self.processor.geometry.tokens(v.shape) for v in volumes)
        total += sum(len(self.pixel_boxes((1, *image.shape[:2]))) for image in images)
        total += sum(len(self.pixel_boxes(video.shape[:3])) for video in videos)
        inputs["seeds"] = torch.tensor([question_seed(seed, q) for q in questions])
        key = _digest({"volumes": volumes, "images": images, "videos": videos}, mode == "none")
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
        ends = [answer_length(row, [self.processor.tokenizer.eos_token_id]) for row in new]
        entered: list[Any] = list(decided) or [None] * len(questions)
        kept = [_on_grid(k, inputs.get("token_index"), total) for k in entered]
        texts = self.processor.tokenizer.batch_decode(
            [r[:n] for r, n in zip(new, ends, strict=True)], skip_special_tokens=True
        )
        return [
            RawAnswer(text.strip(), total, int(k.sum()), n, clock.until(0), clock.until(n - 1), k)
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
        return grid_boxes(shape, self.processor.geometry.token_shape)

    def pixel_boxes(self, shape: tuple[int, int, int]) -> np.ndarray:
        """Boxes of a video's or an image's tokens on the resized frames."""
        reader = self.processor.reader
        return grid_boxes((shape[0], *reader.size(shape[1], shape[2])), reader.frames.token_shape)


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


def _digest(shown: Mapping[str, Sequence[np.ndarray]], whole: bool) -> bytes:
    """Tells apart what is shown (kind -> arrays), and whether all of the decoder's layers are shared."""
    digest = hashlib.blake2b(bytes([whole]))
    for kind, arrays in shown.items():
        for array in arrays:
            digest.update(repr((kind, array.shape, array.dtype)).encode())
            digest.update(np.ascontiguousarray(array).data)
    return digest.digest()
