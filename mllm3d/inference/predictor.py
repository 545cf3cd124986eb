"""Volume and question in, answer out: the same preprocessing and the same model code as in training."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from mllm3d.data.preprocess import Prepared
from mllm3d.data.prompts import with_options
from mllm3d.data.volumes import read_volume
from mllm3d.errors import UserError
from mllm3d.inference.adapter import Adapter, Mode, RawAnswer
from mllm3d.inference.checkpoint import Checkpoint, open_checkpoint
from mllm3d.inference.loaded import Loaded, choose_device
from mllm3d.registry import adapter_class

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Answer(RawAnswer):
    """The adapter's answer and what follows from it."""

    @property
    def keep_rate(self) -> float:
        """Share of the visual tokens that passed the scheduling layer."""
        return self.tokens_after / self.tokens_before if self.tokens_before else 1.0

    @property
    def seconds_per_further_token(self) -> float | None:
        """Mean wall time of the tokens after the first; None if there was only one."""
        further = self.new_tokens - 1
        return (self.seconds_total - self.seconds_first) / further if further > 0 else None


class Predictor(Loaded):
    """One loaded checkpoint, asked about files or prepared volumes."""

    def __init__(self, checkpoint: Checkpoint, adapter: Adapter, device: str):
        super().__init__(checkpoint, device)
        self.adapter = adapter

    @classmethod
    def load(
        cls,
        path: Path,
        device: str | None = None,
        dtype: "torch.dtype | None" = None,
        pruner: Mapping[str, Any] | None = None,
    ) -> Self:
        """Load a released folder, a step of a run, or a run's newest step.

        device: a torch device, by default `cuda` where there is one. dtype: by default bfloat16 on a GPU and
        float32 elsewhere. pruner: `name` of a method of medpruner and its settings, for slice-wise models.
        """
        import torch

        checkpoint = open_checkpoint(path)
        adapter = _adapter_of(checkpoint)
        if pruner is not None and not hasattr(adapter, "prune_with"):
            raise UserError(
                f"{checkpoint.name}: a pruner is for slice-wise models such as qwen2_5_vl, not for one of type "
                f"{checkpoint.model_type}; leave --pruner or evaluation.pruner out"
            )
        chosen, name = choose_device(device)
        if dtype is None:
            dtype = torch.bfloat16 if chosen.type == "cuda" else torch.float32
        loaded = adapter.load(checkpoint.model, chosen, dtype)
        if pruner is not None:
            loaded.prune_with(str(pruner["name"]), {k: v for k, v in pruner.items() if k != "name"})
        return cls(checkpoint, loaded, name)

    def answer(
        self,
        volumes: Sequence[Prepared | Path],
        questions: Sequence[str],
        mode: Mode = "scheduled",
        max_new_tokens: int = 512,
        seed: int = 0,
        images: Sequence[np.ndarray] = (),
        videos: Sequence[np.ndarray] = (),
    ) -> list[Answer]:
        """Answers in the order of the questions, all about the same volumes (a prior scan first), images and videos.

        images, videos: see `mllm3d.data.images`. Raises `UserError` where the model takes none.
        """
        prepared = [item if isinstance(item, Prepared) else self.prepare(read_volume(item)) for item in volumes]
        arrays = [item.array for item in prepared]
        pixels: dict[str, Any] = {}
        if len(images) or len(videos):
            self._must_take_pixels()
            pixels = {"images": images, "videos": videos}
        raw = self.adapter.answer(arrays, list(questions), mode, max_new_tokens, seed, **pixels)
        return [Answer(**vars(item)) for item in raw]

    def wording(self, question: str, options: Sequence[str] | None = None) -> str:
        """A question with its options as the model was trained to read it."""
        # An adapter need not derive from the protocol.
        of_model: Callable[..., str] = getattr(self.adapter, "wording", with_options)
        return of_model(question, options)

    def _must_take_pixels(self) -> None:
        if not getattr(self.adapter, "takes_pixels", False):
            raise UserError(
                f"{self.checkpoint.name}: a model of type {self.checkpoint.model_type} takes volumes, "
                "no images or videos; name another checkpoint"
            )

    def boxes(
        self,
        shapes: Sequence[tuple[int, int, int]],
        images: Sequence[np.ndarray] = (),
        videos: Sequence[np.ndarray] = (),
    ) -> list[np.ndarray]:
        """Boxes (tokens, 3, 2) of all that was shown, in the order of `Answer.kept`; shapes: of the volumes."""
        of_pixels = [(1, *image.shape[:2]) for image in images] + [video.shape[:3] for video in videos]
        return [self.adapter.token_boxes(shape) for shape in shapes] + [
            self.adapter.pixel_boxes(shape) for shape in of_pixels
        ]

    def kept_boxes(self, answer: Answer, shapes: Sequence[tuple[int, int, int]], index: int = -1) -> np.ndarray:
        """Boxes (kept tokens, 3, 2) on the model grid of volume `index` out of those that were asked about.

        shapes: (D, H, W) of all those volumes in the order they were given.
        """
        return self.kept_of(answer, self.boxes(shapes))[index]

    def kept_of(self, answer: Answer, boxes: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Those of `boxes` (of all that was shown, see there) that stayed."""
        if answer.kept is None:
            raise ValueError(f"{type(self.adapter).__name__} does not say which tokens it kept")
        ends = np.cumsum([len(item) for item in boxes])
        if ends[-1] != len(answer.kept):
            raise ValueError(f"{len(answer.kept)} tokens in the answer, {ends[-1]} boxes on what was shown")
        return [item[kept] for item, kept in zip(boxes, np.split(answer.kept, ends[:-1]), strict=True)]


def _adapter_of(checkpoint: Checkpoint) -> type[Adapter]:
    try:
        found: type[Adapter] = adapter_class(checkpoint.model_type)
    except UserError as error:
        raise UserError(f"{checkpoint.model / 'config.json'}: {error}; name a checkpoint of one of these") from error
    return found
