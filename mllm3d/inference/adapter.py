"""What a model must offer to be asked questions: the seam between `Predictor` and the model packages.

A model package registers one class per `model_type` in `mllm3d.registry.ADAPTERS`. The class gets volumes
that are already preprocessed and knows nothing of files, manifests or scans; the framework knows nothing of
the model's tokens but what stands here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, Self

import numpy as np

if TYPE_CHECKING:
    import torch

Mode = Literal["scheduled", "none", "random", "noisy", "evicted"]


@dataclass(frozen=True)
class RawAnswer:
    """The answer to one question.

    text: the decoded answer, special tokens removed and stripped.
    tokens_before, tokens_after: visual tokens of all volumes (background that was left out counts), and those
        that remain after the scheduling layer.
    new_tokens: generated tokens, the end token included.
    seconds_first: wall time until this question's first token, the (shared) encoding of the volumes included.
    seconds_total: wall time until its last token.
    kept: bool (tokens_before,), volumes one after the other in the order given; None if the model cannot say.
    """

    text: str
    tokens_before: int
    tokens_after: int
    new_tokens: int
    seconds_first: float
    seconds_total: float
    kept: np.ndarray | None


class Adapter(Protocol):
    """One loaded model."""

    @classmethod
    def load(cls, directory: Path, device: "torch.device", dtype: "torch.dtype") -> Self:
        """Load a Hugging Face folder (config.json, safetensors, processor) in eval mode.

        Strict: a missing, unexpected or misshapen weight raises `UserError`, never a warning.
        """
        ...

    def answer(
        self,
        volumes: Sequence[np.ndarray],
        questions: Sequence[str],
        mode: Mode,
        max_new_tokens: int,
        seed: int,
    ) -> list[RawAnswer]:
        """Greedy answers, in the order of the questions, all about the same volumes.

        volumes: float32 (D, H, W) in model units (`mllm3d.data.preprocess.Prepared.array`), a prior scan
            first; encoded once for all questions.
        questions: the text of the user's turn (`mllm3d.data.prompts.question_text`), no chat template.
        mode: `scheduled` drops as trained, `none` keeps every token, `random` keeps as many tokens as
            `scheduled` would for the same question, drawn from the seed and the question's text alone, so
            that a question's draw does not depend on which others share the call. `noisy` is `scheduled` with
            its thresholds off by up to 10 %; `evicted` is `scheduled` without the dropped tokens' keys and values
            in the layers below the drop. A model without thresholds or caches answers as `scheduled`.
        """
        ...

    def token_boxes(self, shape: tuple[int, int, int]) -> np.ndarray:
        """Half-open voxel boxes on the model grid of the visual tokens of one volume of this (D, H, W) shape.

        Returns int (tokens, 3, 2): per token (start, stop) on each of D, H, W, in the order of
        `RawAnswer.kept`. A box may reach past the volume's end where the model pads it.
        """
        ...
