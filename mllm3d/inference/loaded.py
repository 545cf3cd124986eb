"""What a loaded checkpoint has, whatever it is asked for: its preprocessing, and where it runs."""

import sys
from typing import TYPE_CHECKING

import numpy as np

from mllm3d.config import VolumeConfig
from mllm3d.data.preprocess import Prepared, for_modality, prepare
from mllm3d.data.volumes import Volume
from mllm3d.inference.checkpoint import Checkpoint

if TYPE_CHECKING:
    import torch


class Loaded:
    """A checkpoint in memory; `device` is its name for people."""

    def __init__(self, checkpoint: Checkpoint, device: str) -> None:
        self.checkpoint, self.device = checkpoint, device

    def volume_config(self, modality: str = "CT") -> VolumeConfig:
        """The checkpoint's preprocessing; for `MR`, whose units are arbitrary, a window by percentiles."""
        return for_modality(self.checkpoint.volume, modality)

    def prepare(self, volume: Volume, modality: str = "CT") -> Prepared:
        """A scan as read from disk, as the model wants it; one warning line if a CT does not look like HU."""
        config = self.volume_config(modality)
        if config.window_percentile is None and not looks_like_hu(volume.array):
            print(
                f"warning: {volume.path}: its intensities do not look like HU (no air below -200 or nothing "
                "above 0); give --modality mr for MR, or convert the file to HU",
                file=sys.stderr,
            )
        return prepare(volume, config)


def choose_device(device: str | None) -> tuple["torch.device", str]:
    """The device of this name, by default `cuda` where there is one, and its name for people."""
    import torch

    chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return chosen, torch.cuda.get_device_name(chosen) if chosen.type == "cuda" else chosen.type


def looks_like_hu(array: np.ndarray) -> bool:
    """Whether a scan has air below -200 and something denser than water, as a CT of a body has.

    MR, raw detector values and images scaled to [0, 1] lack the first; HU rescaled twice, the second.
    """
    low, high = np.percentile(array[::4, ::4, ::4], [0.5, 99.5])
    return bool(low < -200 and high > 0)
