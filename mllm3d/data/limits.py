"""How large volumes and images may become in memory, checked from their headers before anything is allocated."""

import math
from collections.abc import Sequence
from pathlib import Path

from mllm3d.errors import UserError

MAX_BYTES = 2**31
"""Unpacked size of one volume: 512 x 512 x 4096 voxels of int16."""

RATIO_FREE_BYTES = 2**28
MAX_RATIO = 200
"""Above RATIO_FREE_BYTES a file may unpack to MAX_RATIO times its size. Real CT packs 2 to 4 times; a label
map packs several hundred times but is small."""


def check_size(path: Path, shape: Sequence[int], itemsize: int, packed_bytes: int | None = None) -> int:
    """Bytes of such an array; raises `UserError` above the limits. `packed_bytes`: its size on disk."""
    unpacked = math.prod(shape) * itemsize
    if unpacked > MAX_BYTES:
        raise UserError(
            f"{path}: {_times(shape)} voxels take {unpacked / 2**30:.1f} GiB unpacked, over the limit of "
            f"{MAX_BYTES / 2**30:g} GiB (mllm3d.data.limits.MAX_BYTES); crop or resample it first"
        )
    if packed_bytes is not None and unpacked > RATIO_FREE_BYTES and unpacked > MAX_RATIO * packed_bytes:
        raise UserError(
            f"{path}: would unpack to {unpacked / max(packed_bytes, 1):.0f} times its size, over the limit "
            f"of {MAX_RATIO}; if it is a real scan, store it uncompressed"
        )
    return unpacked


MAX_PIXELS = 2**26
"""Of an image: 8192 x 8192. A mammogram has 2**24."""

MAX_VIDEO_PIXELS = 2**29
"""Of all frames of a video together: 10 minutes of 1280 x 720 at one frame per second."""


def check_pixels(path: Path, shape: Sequence[int], limit: int) -> None:
    """Raises `UserError` if an image or a video of this shape has more pixels than `limit`."""
    if (pixels := math.prod(shape)) > limit:
        raise UserError(
            f"{path}: {_times(shape)} are {pixels:,} pixels, over the limit of {limit:,} (mllm3d.data.limits); "
            f"make it smaller{' or take fewer frames' if len(shape) > 2 else ''}"
        )


def _times(shape: Sequence[int]) -> str:
    return " x ".join(str(n) for n in shape)
