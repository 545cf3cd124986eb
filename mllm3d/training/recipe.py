"""What the trainer sees of a model.

A recipe builds a model, says which parameters train at which rate, makes batches and computes a step's loss.
Everything else (steps, ranks, precision, checkpoints, logs) belongs to the trainer.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NotRequired, TypedDict

import torch
from torch import Tensor, nn

from mllm3d.config import Config, Settings
from mllm3d.data.dataset import GroupItem
from mllm3d.data.manifest import Row
from mllm3d.errors import UserError

Batch = Mapping[str, Any]
Metrics = dict[str, tuple[Tensor | float, Tensor | float]]
"""Name -> (sum, count)."""


@dataclass(frozen=True)
class Term:
    """One term of the loss, not yet averaged.

    `value` is a scalar: the SUM over this batch's units (tokens, questions, volumes, ...), weight included.
    The trainer divides it by the number of `per` units in the whole optimizer step: all ranks, all
    accumulated batches. `per` must be a key of `Recipe.counts`.
    """

    value: Tensor
    per: str


@dataclass(frozen=True)
class StepOutput:
    """Loss terms by name, and what to log: name -> (sum, count), added up over ranks and then divided.

    Both may be device tensors; nothing is moved to the host before the next log line.
    """

    terms: dict[str, Term]
    metrics: Metrics = field(default_factory=dict)


class ParameterGroup(TypedDict):
    """One group for the optimizer. `use_muon` marks 2-D matrices for `optimizer.name: muon`."""

    name: str
    params: list[nn.Parameter]
    lr: float
    weight_decay: float
    use_muon: NotRequired[bool]


class Description(TypedDict):
    """Figures for `--dry-run` and MFU, as far as they are known.

    most_tokens_per_image: of the largest image that enters, or of a depth slab of a video's frames.
    flops_per_volume: of a forward and a backward pass on one of `counts`' volumes with its questions.
    """

    tokens_per_volume: NotRequired[int]
    most_tokens_per_image: NotRequired[int]
    flops_per_volume: NotRequired[float]


@dataclass(frozen=True)
class FrozenEncoder:
    """What does not learn and is computed once for each volume, apart from the model that trains.

    Attributes:
        module: in eval mode. identity: a hash of all that its outputs depend on but the volume.
        encode: (module, volume (D, H, W) on its device) -> features by name.
    """

    module: nn.Module
    identity: str
    encode: Callable[[nn.Module, Tensor], Mapping[str, Tensor]]


class Recipe(ABC):
    """One way to train one model. `mllm3d.registry` maps the `recipe:` key to a subclass."""

    Settings: ClassVar[type[Settings]]
    wants_labels: ClassVar[bool] = False
    """True: `GroupItem.labels` are filled (label maps on the model's grid)."""

    wants_volumes: ClassVar[bool] = True
    """False: it learns from the rows' texts alone, and no volume is read."""

    takes_pixels: ClassVar[bool] = False
    """True: `collate` takes `GroupItem.images` and `GroupItem.videos`; else rows that have them are errors."""

    def __init__(self, config: Config) -> None:
        self.config = config

    def check_rows(self, rows: Sequence[Row]) -> None:
        """Raises `UserError` for rows that this run cannot be given."""
        if not self.config.prepares_volumes and (row := next((row for row in rows if row.volume), None)):
            raise UserError(f"volume: is missing, and row {row.id} has a volume; say how volumes are prepared")
        if not self.takes_pixels and (row := next((row for row in rows if row.has_pixels), None)):
            raise UserError(f"row {row.id}: {row.study}: {self.config.recipe} takes volumes, no images or videos")

    @abstractmethod
    def build(self, meta: bool = False) -> nn.Module:
        """The model with its weights loaded and its frozen parts set to `requires_grad=False`.

        `meta=True`: the same parameters on `torch.device("meta")`, without reading weights.
        """

    def parts(self, model: nn.Module) -> Mapping[str, Sequence[nn.Parameter]]:
        """The model's parameters by part, to be printed with what trains of them; none: nothing is printed."""
        return {}

    def frozen_encoder(self) -> FrozenEncoder | None:
        """An encoder whose outputs `collate` takes in place of volumes; None: it wants the volumes."""
        return None

    @abstractmethod
    def parameter_groups(self, model: nn.Module) -> list[ParameterGroup]:
        """Each trainable parameter once. Usual: no weight decay for parameters with fewer than 2 axes."""

    @abstractmethod
    def collate(self, items: list[GroupItem]) -> Batch:
        """One batch of CPU tensors (and plain values) from volume groups.

        Runs in loader workers, and for a bit-for-bit resume must draw no random numbers.
        """

    @abstractmethod
    def counts(self, batch: Batch) -> dict[str, int]:
        """Units in the batch, the same keys for every batch: usually `label_tokens`, `questions`, `volumes`.

        They weigh the terms and give the throughput; none of them may be zero in a whole optimizer step.
        """

    @abstractmethod
    def losses(
        self, model: nn.Module, batch: Batch, step: int, total_steps: int, weights: dict[str, float]
    ) -> StepOutput:
        """Forward pass. `model` is the DeepSpeed engine: call `model(**inputs)`, so that its hooks run.

        `step` is the global optimizer step, from 0. `weights`: by which one unit (a token, a question, ...)
        is multiplied in the loss that is differentiated; for backward passes that depend on the loss's scale.
        Under ZeRO-3 every rank must run the same modules, and go back through the same ones (a gradient of zero will
        do); below it, parameters may stay unused on some ranks. In bf16 the weights are bf16: cast the inputs.
        """

    @abstractmethod
    def save(self, module: nn.Module, state_dict: dict[str, Tensor] | None, directory: Path) -> None:
        """Write a Hugging Face folder (config, safetensors, processor) into the existing `directory`.

        Called on rank 0 alone. `state_dict` holds the gathered weights under ZeRO-3, else None.
        """

    @abstractmethod
    def describe(self) -> Description:
        """Figures for the dry-run report and MFU."""

    def sample_ids(self, batch: Batch) -> list[str]:
        """Ids of the batch's samples, for error messages: the batch's `ids`, if it has them."""
        return [str(name) for name in batch.get("ids", ())]


def to_device(batch: Any, device: torch.device) -> Any:
    """A copy of the batch with every tensor in it (also inside dicts, lists and tuples) on `device`.

    What else has a method `to(device)` is asked to move itself.
    """
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if hasattr(batch, "to"):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, list | tuple):
        return type(batch)(to_device(value, device) for value in batch)
    return batch
