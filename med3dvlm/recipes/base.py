"""What Med3DVLM's recipes share: volumes of the encoder's size, saving, figures."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from med3dvlm.encoders import build_encoder
from med3dvlm.features import VolumeEncoder
from mllm3d.config import Config
from mllm3d.data.dataset import GroupItem
from mllm3d.data.manifest import Row
from mllm3d.errors import UserError
from mllm3d.training.huggingface import save_pretrained
from mllm3d.training.optim import parameter_groups
from mllm3d.training.recipe import ParameterGroup, Recipe

EncoderSpec = str | dict[str, Any]
"""A name (``dcformer-small``, ``vit3d``, ``timm:<model>``), or a mapping with ``name`` and its settings."""


class Med3DRecipe(Recipe):
    """What Med3DVLM's recipes share."""

    processor: Any
    """Makes batches; set when the model is built."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        volume = config.volume
        if volume.shape is None:
            raise UserError("volume.shape: is missing; Med3DVLM's encoders read volumes of one size: set it")
        if (volume.mean, volume.std) != (0.0, 1.0):
            raise UserError("volume.mean, volume.std: Med3DVLM's encoders read values in [0, 1]; set them to 0 and 1")

    @property
    def settings(self) -> Any:
        """The config's `model` section."""
        return self.config.model

    def must_read(self, encoder: VolumeEncoder) -> None:
        """A trained encoder has to be made for volumes as they are prepared."""
        if tuple(encoder.size) != tuple(self.config.volume.shape or ()):
            raise UserError(
                f"volume.shape: {list(self.config.volume.shape or ())}, but the encoder was trained on volumes of "
                f"{list(encoder.size)}; prepare them alike"
            )

    def check_rows(self, rows: Sequence[Row]) -> None:
        super().check_rows(rows)
        if row := next((row for row in rows if row.prior is not None), None):
            raise UserError(f"row {row.id}: prior: {self.config.recipe} reads one scan; choose others with data.where")

    def parameter_groups(self, model: nn.Module) -> list[ParameterGroup]:
        return parameter_groups(model, self.config.training.optimizer, is_hidden=is_hidden)

    def save(self, module: nn.Module, state_dict: dict[str, Tensor] | None, directory: Path) -> None:
        save_pretrained(module, self.processor, state_dict, directory)

    @contextmanager
    def under(self, key: str) -> Iterator[None]:
        """What goes wrong is a matter of this setting, unless the error begins with another setting's name."""
        try:
            yield
        except (OSError, ValueError) as error:
            text = " ".join(str(error).split())
            named = text.partition(":")[0] in type(self.settings).model_fields
            raise UserError(f"model.{text}" if named else f"{key}: {text}") from error

    @contextmanager
    def naming(self, items: Sequence[GroupItem]) -> Iterator[None]:
        """What the processor refuses is a matter of these rows."""
        try:
            yield
        except ValueError as error:
            names = ", ".join(row.id for item in items for row in item.rows[:1])
            raise UserError(f"volumes of rows {names}: {error}") from error

    def encoder_spec(self, encoder: EncoderSpec) -> dict[str, Any]:
        """The encoder of the settings, for volumes as they are prepared."""
        spec = {"name": encoder} if isinstance(encoder, str) else dict(encoder)
        assert self.config.volume.shape is not None
        return {"channels": 1, **spec, "size": list(self.config.volume.shape)}

    def fresh_encoder(self, encoder: EncoderSpec) -> VolumeEncoder:
        """That encoder with random weights."""
        try:
            return build_encoder(self.encoder_spec(encoder))
        except (ValueError, TypeError) as error:
            raise UserError(f"model.encoder: {error}") from error


def is_hidden(name: str) -> bool:
    """Whether a matrix of this name stands between other layers: what Muon may take."""
    return any(part in f".{name}" for part in (".layer.", ".layers.", ".blocks.", ".mlp.", ".projector."))


def encoder_flops(encoder: VolumeEncoder) -> float:
    """FLOPs of a forward pass on one volume, as the plain form of the encoder has them."""
    plain = {"form": "plain"} if encoder.spec["name"].startswith("dcformer") else {}
    with torch.device("meta"):
        counted = build_encoder({**encoder.spec, **plain}).eval()
    return counted_flops(counted, torch.empty(1, encoder.channels, *encoder.size, device="meta"))


def encoder_identity(encoder: VolumeEncoder) -> str:
    """A hash over an encoder's settings and weights."""
    total = hashlib.sha256(json.dumps(encoder.spec, sort_keys=True).encode())
    for name, value in sorted(encoder.state_dict().items()):
        total.update(f"{name} {value.dtype}".encode())
        total.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return total.hexdigest()[:16]


def counted_flops(module: nn.Module, *inputs: Any) -> float:
    """FLOPs of a forward pass, counted operation by operation; on the meta device nothing is computed."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(*inputs)
    return float(counter.get_total_flops())
