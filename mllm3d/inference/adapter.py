"""What a model must offer to be asked questions: the seam between `Predictor` and the model packages.

A model package registers one class per `model_type` in `mllm3d.registry.ADAPTERS`. The class gets volumes
that are already preprocessed, and images and videos as they are stored. It knows nothing of files, manifests or
scans; the framework knows nothing of the model's tokens but what stands here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, Self

import numpy as np

from mllm3d.data.prompts import with_options

if TYPE_CHECKING:
    import torch

Mode = Literal["scheduled", "none", "random", "noisy", "evicted"]


@dataclass(frozen=True)
class RawAnswer:
    """The answer to one question.

    text: the decoded answer, special tokens removed and stripped.
    tokens_before, tokens_after: visual tokens of all that is shown (background that was left out counts), and those
        that remain after the scheduling layer.
    new_tokens: generated tokens, the end token included.
    seconds_first: wall time until this question's first token, the (shared) encoding of what is shown included.
    seconds_total: wall time until its last token.
    kept: bool (tokens_before,), of volumes, then images, then videos, each in the order given; None if the model
        cannot say.
    retention: of a pruned slice-wise model, shares of `slices` that stayed, of `tokens` within these, and `overall`.
    phases: of such a model, seconds of the call in vision `tower`, `pruner`, `prefill` and `decode`.
    """

    text: str
    tokens_before: int
    tokens_after: int
    new_tokens: int
    seconds_first: float
    seconds_total: float
    kept: np.ndarray | None
    retention: Mapping[str, float] | None = None
    phases: Mapping[str, float] | None = None


class Embedder(Protocol):
    """One loaded model that puts volumes and texts into one space, where what belongs together is near."""

    @classmethod
    def load(cls, directory: Path, device: "torch.device", dtype: "torch.dtype") -> Self:
        """As for an `Adapter`."""
        ...

    @property
    def width(self) -> int:
        """Of an embedding."""
        ...

    def embed_volumes(self, volumes: Sequence[np.ndarray]) -> np.ndarray:
        """Float32 (volumes, width), rows of length 1; volumes as for an `Adapter`."""
        ...

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        """Float32 (texts, width), rows of length 1."""
        ...


class Adapter(Protocol):
    """One loaded model."""

    takes_pixels: ClassVar[bool] = False
    """Whether `answer` is about images and videos too, and `pixel_boxes` is there; not so where it is left out."""

    @classmethod
    def load(cls, directory: Path, device: "torch.device", dtype: "torch.dtype") -> Self:
        """Load a Hugging Face folder (config.json, safetensors, processor) in eval mode.

        Strict: a missing, unexpected or misshapen weight raises `UserError`, never a warning.
        """
        ...

    def wording(self, question: str, options: Sequence[str] | None) -> str:
        """A question with its options as the model was trained to read it; where this is left out, it is
        `mllm3d.data.prompts.with_options`."""
        return with_options(question, options)

    @classmethod
    def save_merged(cls, directory: Path, out: Path) -> None:
        """Write the model in `directory` into the empty folder `out`, its adapters (LoRA) added to what they adapt.

        Left out where models have none. Raises `UserError` if this one has none.
        """
        ...

    def prune_with(self, name: str, values: Mapping[str, Any]) -> None:
        """Leave out slices and tokens by this method of `medpruner` from now on: what `scheduled` then means.

        Left out where models have no such methods. Raises `UserError` for a name, key or value that is not allowed.
        """
        ...

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
        """Greedy answers, in the order of the questions, all about the same volumes, images and videos.

        volumes: float32 (D, H, W) in model units (`mllm3d.data.preprocess.Prepared.array`), a prior scan
            first; encoded once for all questions.
        questions: the text of the user's turn as `wording` gives it, no chat template.
        mode: `scheduled` drops as trained, `none` keeps every token, `random` keeps as many tokens as
            `scheduled` would for the same question, drawn from the seed and the question's text alone, so
            that a question's draw does not depend on which others share the call. `noisy` is `scheduled` with
            its thresholds off by up to 10 %; `evicted` is `scheduled` without the dropped tokens' keys and values
            in the layers below the drop. A model without thresholds or caches answers as `scheduled`.
        images: uint8 (H, W) or (H, W, 3); videos: uint8 (T, H, W) or (T, H, W, 3). Never given (not even empty) to a
            class without `takes_pixels`, which may leave them out of its signature.
        """
        ...

    def token_boxes(self, shape: tuple[int, int, int]) -> np.ndarray:
        """Half-open voxel boxes on the model grid of the visual tokens of one volume of this (D, H, W) shape.

        Returns int (tokens, 3, 2): per token (start, stop) on each of D, H, W, in the order of
        `RawAnswer.kept`. A box may reach past the volume's end where the model pads it.
        """
        ...

    def pixel_boxes(self, shape: tuple[int, int, int]) -> np.ndarray:
        """The same for a video of this (T, H, W) shape as given, or an image (T = 1), after the model's resizing.

        The last box ends in H and W where the resized frames end.
        """
        ...
