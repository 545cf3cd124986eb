"""DeepSpeed's files of a checkpoint: a full disk is noticed by all ranks, and reading runs no code."""

import os
import pickle
from enum import Enum
from types import SimpleNamespace
from typing import Any

import torch
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine

from mllm3d.errors import UserError


class _Pickler(pickle.Pickler):
    """Writes members of an enumeration by their value.

    So does pickle itself, but in Python 3.11.0 to 3.11.3: there it writes a call of `getattr`, which must not be read.
    """

    def reducer_override(self, value: Any) -> Any:
        return (type(value), (value.value,)) if isinstance(value, Enum) else NotImplemented


class StateFiles(TorchCheckpointEngine):
    """Writes and reads the files of `engine.save_checkpoint` and `engine.load_checkpoint`.

    A write that fails is kept in `failures` instead of raised: the ranks meet in barriers while they save,
    and one that left early would keep the others waiting. Reading is `weights_only`: tensors, plain
    containers and the few classes of DeepSpeed named here, all of them without side effects.
    """

    def __init__(self) -> None:
        super().__init__()
        self.zipfile_serialization = True
        self.failures: list[Exception] = []

    def save(self, state_dict: dict[str, Any], path: str) -> None:
        try:
            with open(path, "wb") as file:
                torch.save(state_dict, file, pickle_module=SimpleNamespace(Pickler=_Pickler, __name__=pickle.__name__))
                file.flush()
                os.fsync(file.fileno())
        except (OSError, RuntimeError) as error:  # torch's writer turns a full disk into a RuntimeError
            self.failures.append(error)

    def load(self, path: str, map_location: Any = None) -> Any:
        try:
            with torch.serialization.safe_globals(_known_classes()):
                return torch.load(path, map_location=map_location, weights_only=True)
        except pickle.UnpicklingError as error:
            raise UserError(
                f"{path}: refused: holds more than tensors and plain values; resume from a checkpoint of ours"
            ) from error


def _known_classes() -> list[Any]:
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [LossScaler, ZeroStageEnum, fragment_address]
