"""Med3DVLM behind the framework's inference interfaces."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from transformers import StoppingCriteriaList

from med3dvlm.building import read_clip, read_model, read_processor
from med3dvlm.configuration_med3dvlm import Med3DVLMConfig
from med3dvlm.lora import merge_lora
from med3dvlm.modeling_med3dclip import Med3DCLIPModel
from med3dvlm.modeling_med3dvlm import Med3DVLMForConditionalGeneration
from med3dvlm.processing_med3dclip import Med3DCLIPProcessor
from med3dvlm.processing_med3dvlm import Med3DVLMProcessor, with_choices
from mllm3d.errors import UserError
from mllm3d.inference.adapter import Mode, RawAnswer
from mllm3d.inference.generation import Clock, answer_length
from mllm3d.training.huggingface import save_pretrained, without_bars


@dataclass
class Med3DVLMAdapter:
    """Med3DVLM behind `mllm3d.inference.adapter.Adapter`. It has no scheduling: every mode keeps all tokens."""

    model: Med3DVLMForConditionalGeneration
    processor: Med3DVLMProcessor
    _encoded: tuple[np.ndarray, tuple[Tensor, Tensor]] | None = None
    """The last volume and its features: asked again, it is not encoded again."""

    @classmethod
    def load(cls, directory: Path, device: torch.device, dtype: torch.dtype) -> Self:
        """Strict: weights that do not fit raise `UserError`."""
        adapter = cls._read(directory, device, dtype)
        if dtype == torch.float32:  # two products fewer for each layer and token; in bfloat16 the sum would be rounded
            merge_lora(adapter.model)
        return adapter

    @classmethod
    def _read(cls, directory: Path, device: torch.device, dtype: torch.dtype) -> Self:
        try:
            with without_bars():
                model = read_model(directory, dtype)
            processor = read_processor(directory, model.config)
        except (OSError, ValueError) as error:
            raise UserError(f"{directory}: {' '.join(str(error).split())}") from error
        return cls(model.to(device).eval(), processor)

    def wording(self, question: str, options: Sequence[str] | None) -> str:
        """A question as it was asked in training."""
        return with_choices(question, options or ())

    @classmethod
    def save_merged(cls, directory: Path, out: Path) -> None:
        """The model with its adapters added to the language model's weights, in the precision that it is stored in."""
        adapter = cls._read(directory, torch.device("cpu"), torch.float32)
        model = adapter.model
        if model.config.lora is None:
            raise UserError(f"--merge-lora: {directory}: has no adapters, or they are merged already; leave it out")
        stored = Med3DVLMConfig.from_pretrained(directory).dtype
        merge_lora(model)
        save_pretrained(model.to(stored or torch.float32), adapter.processor, None, out)

    def answer(
        self, volumes: Sequence[np.ndarray], questions: Sequence[str], mode: Mode, max_new_tokens: int, seed: int
    ) -> list[RawAnswer]:
        """Greedy answers; the volume is encoded once for all questions, and for those of the next call."""
        if len(volumes) != 1:
            raise UserError(f"{len(volumes)} volumes: Med3DVLM is asked about one; leave the prior scan out")
        clock = Clock()
        tokens = self.processor.image_tokens
        try:
            inputs = self.processor(text=list(questions), group_index=[0] * len(questions))
            features = self._features(volumes[0])
        except ValueError as error:
            raise UserError(str(error)) from error
        with torch.inference_mode():
            generated = self.model.generate(
                **inputs.to(self.model.device),
                features=features,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                stopping_criteria=StoppingCriteriaList([clock]),
            )
        new = generated[:, inputs["input_ids"].shape[1] :].tolist()
        lengths = [answer_length(row, self._ends()) for row in new]
        texts = self.processor.tokenizer.batch_decode(
            [row[:n] for row, n in zip(new, lengths, strict=True)], skip_special_tokens=True
        )
        return [
            RawAnswer(text.strip(), tokens, tokens, n, clock.until(0), clock.until(n - 1), None)
            for text, n in zip(texts, lengths, strict=True)
        ]

    def _features(self, volume: np.ndarray) -> tuple[Tensor, Tensor]:
        if self._encoded is None or self._encoded[0] is not volume:
            given = self.processor.stack([volume]).to(self.model.device)
            with torch.inference_mode():
                low, high = self.model.encode(given)
            self._encoded = volume, (low, high)
        return self._encoded[1]

    def _ends(self) -> list[int]:
        ends = self.model.generation_config.eos_token_id
        return ends if isinstance(ends, list) else [ends]

    def token_boxes(self, shape: tuple[int, int, int]) -> np.ndarray:
        raise UserError("Med3DVLM mixes a volume's tokens: they have no places in it, and there is no evidence to show")


@dataclass
class Med3DCLIPAdapter:
    """The contrastive model behind `mllm3d.inference.adapter.Embedder`."""

    model: Med3DCLIPModel
    processor: Med3DCLIPProcessor

    @classmethod
    def load(cls, directory: Path, device: torch.device, dtype: torch.dtype) -> Self:
        """Strict: weights that do not fit raise `UserError`."""
        try:
            with without_bars():
                model = read_clip(directory, dtype)
            processor: Any = Med3DCLIPProcessor.from_pretrained(directory)
        except (OSError, ValueError) as error:
            raise UserError(f"{directory}: {' '.join(str(error).split())}") from error
        return cls(model.to(device).eval(), processor)

    @property
    def width(self) -> int:
        """Of an embedding."""
        return self.model.config.projection_dim

    def embed_volumes(self, volumes: Sequence[np.ndarray]) -> np.ndarray:
        """Float32 (volumes, width), rows of length 1; volumes are float32 (D, H, W) in model units."""
        return self._embedded(self.model.encode_image, volumes=list(volumes))

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        """Float32 (texts, width), rows of length 1."""
        return self._embedded(self.model.encode_text, text=list(texts))

    def _embedded(self, encode: Any, **given: Any) -> np.ndarray:
        try:
            inputs = self.processor(**given).to(self.model.device)
            with torch.inference_mode():
                found: np.ndarray = encode(**inputs).float().cpu().numpy()
        except ValueError as error:
            raise UserError(str(error)) from error
        return found
