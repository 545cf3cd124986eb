"""How a volume is cut into patches and tokens."""

from dataclasses import dataclass

Size3 = tuple[int, int, int]


@dataclass(frozen=True)
class PatchGeometry:
    """Patches of ``size`` (depth, height, width), merged ``merge`` x ``merge`` in plane.

    Attributes:
        size: frames, rows and columns of a patch.
        channels: input channels; a grey volume is repeated on each.
        merge: patches along height and width that become one token (Photon Sec. 3.1).
        slices_per_frame: slices averaged into one frame before patches are cut (slice-video models).
    """

    size: Size3
    channels: int
    merge: int
    slices_per_frame: int = 1

    @property
    def voxels(self) -> int:
        """Numbers in one patch, channels included."""
        return self.channels * self.size[0] * self.size[1] * self.size[2]

    @property
    def token_shape(self) -> Size3:
        """Voxels (depth, height, width) that one language-model token stands for."""
        return (self.size[0] * self.slices_per_frame, self.size[1] * self.merge, self.size[2] * self.merge)

    def grid(self, shape: Size3) -> Size3:
        """Patches (depth, height, width) of a volume of ``shape`` voxels, padded up to whole tokens."""
        t, h, w = (-(-n // unit) for n, unit in zip(shape, self.token_shape, strict=True))
        return (t, h * self.merge, w * self.merge)

    def tokens(self, shape: Size3) -> int:
        """Language-model tokens of a volume of ``shape`` voxels (Photon Eq. 1)."""
        t, h, w = self.grid(shape)
        return t * h * w // self.merge**2
