"""From volumes and texts to the tensors that the contrastive model takes.

Legend: B volumes, D H W a volume, R texts, L row length.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import BatchFeature
from transformers.processing_utils import ProcessorMixin

from med3dvlm.processing_med3dvlm import stack_volumes

Array = np.ndarray | Tensor


class Med3DCLIPProcessor(ProcessorMixin):
    """Tokenizer and volume size of one checkpoint.

    Attributes:
        size: (depth, height, width) of the volumes. max_length: tokens of a text; longer ones lose their end, as in
            the paper's code.
    """

    tokenizer_class = "AutoTokenizer"

    def __init__(self, tokenizer: Any = None, size: Sequence[int] = (128, 256, 256), max_length: int = 512) -> None:
        self.size = list(size)
        self.max_length = max_length
        super().__init__(tokenizer)

    def __call__(self, volumes: Sequence[Array] | None = None, text: str | Sequence[str] | None = None) -> BatchFeature:
        """Volumes, texts or both.

        Args:
            volumes: ``(D, H, W)`` each, values in [0, 1]. text: one or several.

        Returns:
            ``volumes`` ``(B, 1, D, H, W)``, and ``input_ids``, ``attention_mask`` ``(R, L)``, as far as given.

        Raises:
            ValueError: nothing to encode, an empty text, or volumes of another size or not in [0, 1].
        """
        batch: dict[str, Tensor] = {}
        texts = [text] if isinstance(text, str) else list(text or [])
        if not texts and not volumes:
            raise ValueError("volumes, text: give volumes, texts or both")
        if texts:
            if empty := [number for number, each in enumerate(texts) if not each.strip()]:
                raise ValueError(f"text: number {empty[0]} is empty")
            found = self.tokenizer(texts, padding=True, truncation=True, max_length=self.max_length)
            batch = {name: torch.tensor(found[name]) for name in ("input_ids", "attention_mask")}
        if volumes:
            batch["volumes"] = stack_volumes(volumes, self.size)
        return BatchFeature(batch)
