"""What a frozen encoder says of a volume, kept on disk: computed once, read in every epoch.

An entry is named after the content of the scan's files, the preprocessing and the encoder; like the volumes' it is
written under a temporary name and renamed, and its checksum is verified on every read. It is a safetensors file behind
that checksum, so features keep the precision that they were computed in.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from mllm3d.config import VolumeConfig
from mllm3d.data.cache import VolumeCache, seal, unseal
from mllm3d.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

Features = Mapping[str, "Tensor"]
"""By name, of one volume."""


class FeatureCache:
    """The features of one encoder, in the folder of a `VolumeCache`.

    encoder: names the encoder with its weights and precision: a hash. Another encoder's entries are never read.
    """

    def __init__(self, cache: VolumeCache, encoder: str) -> None:
        self.cache, self.encoder = cache, encoder

    def file(self, scan: Path, config: VolumeConfig) -> Path:
        """Where the features of this scan are kept."""
        settings = {**config.model_dump(mode="json", exclude={"preset"}), "encoder": self.encoder}
        return self.cache.file(scan, "features", settings, ".features")

    def has(self, scan: Path, config: VolumeConfig) -> bool:
        """Whether they are there; whether they are whole shows when they are read."""
        return self.file(scan, config).is_file()

    def get(self, scan: Path, config: VolumeConfig) -> dict[str, "Tensor"]:
        """Features that were put here. Raises `UserError` if they are not there or damaged; these are removed."""
        file = self.file(scan, config)
        try:
            return self._read(file)
        except (OSError, ValueError, SafetensorError) as error:
            file.unlink(missing_ok=True)
            raise UserError(
                f"{file}: features of {scan}: {error}; start the run again, it computes them anew"
            ) from error

    def put(self, scan: Path, config: VolumeConfig, features: Features) -> None:
        """Keep the features of this scan."""
        from safetensors.torch import save

        whole = {name: value.detach().cpu().contiguous() for name, value in features.items()}
        self.cache.write(self.file(scan, config), seal(save(whole)))

    @staticmethod
    def _read(file: Path) -> dict[str, "Tensor"]:
        """Raises ValueError unless `file` is whole."""
        from safetensors.torch import load

        return load(bytes(unseal(file.read_bytes())))
