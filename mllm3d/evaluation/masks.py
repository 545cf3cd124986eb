"""Which tokens of a volume stayed, small enough for a line of text, and which tokens a labelled region fills.

Shapes: volume (D, H, W) in voxels of the model's grid; grid (d, h, w) in tokens.
"""

import base64
import binascii
from collections.abc import Sequence
from typing import Annotated, Self

import numpy as np
from pydantic import Field, Strict, model_validator

from mllm3d.config import Settings
from mllm3d.config.sections import Shape
from mllm3d.data.volumes import UNKNOWN_LABEL


class KeptTokens(Settings):
    """The kept tokens of a question's volumes, or of its images and video if it has no volume; all tokens are boxes of
    one size side by side.

    Measured: 1,000 tokens take 168 characters of base64, where the rest of a prediction's line has about 420.
    """

    grids: Annotated[tuple[Shape, ...], Strict(False)] = Field(
        description="Tokens of each volume along (D, H, W), a prior scan first; or of each image and video."
    )
    voxels: Shape = Field(description="Size of a token in voxels of the model's grid (D, H, W), or in resized pixels.")
    bits: str = Field(
        description="base64 of one bit per token (1: kept), the highest bit of a byte first; W runs fastest, and "
        "volumes follow each other without a gap."
    )

    @model_validator(mode="after")
    def _has_a_bit_per_token(self) -> Self:
        try:
            found = len(base64.b64decode(self.bits, validate=True))
        except binascii.Error as error:
            raise ValueError("bits: not base64") from error
        if found != -(-self._tokens // 8):
            raise ValueError(f"bits: {found} bytes for {self._tokens} tokens")
        return self

    @property
    def _tokens(self) -> int:
        return sum(d * h * w for d, h, w in self.grids)

    def masks(self) -> list[np.ndarray]:
        """Bool (d, h, w) per volume."""
        packed = np.frombuffer(base64.b64decode(self.bits), np.uint8)
        flat = np.unpackbits(packed, count=self._tokens).astype(bool)
        ends = np.cumsum([d * h * w for d, h, w in self.grids])
        return [part.reshape(grid) for part, grid in zip(np.split(flat, ends[:-1]), self.grids, strict=True)]


def pack_kept(kept: np.ndarray, boxes: Sequence[np.ndarray]) -> KeptTokens | None:
    """What `RawAnswer.kept` says in compact form; None where tokens are no boxes of one size side by side.

    kept: bool (tokens of all volumes,); boxes: `Adapter.token_boxes` of each volume, (tokens, 3, 2).
    Raises ValueError if their numbers differ.
    """
    if len(kept) != sum(map(len, boxes)):
        raise ValueError(f"{len(kept)} tokens in the answer, {sum(map(len, boxes))} boxes on the volumes")
    found = [_lattice(each) for each in boxes]
    lattices = [each for each in found if each is not None]
    if len(lattices) < len(found) or len({voxels for _, voxels in lattices}) != 1:
        return None
    bits = base64.b64encode(np.packbits(np.asarray(kept, bool)).tobytes()).decode()
    return KeptTokens(grids=tuple(grid for grid, _ in lattices), voxels=lattices[0][1], bits=bits)


def _lattice(boxes: np.ndarray) -> tuple[tuple[int, int, int], tuple[int, int, int]] | None:
    """Grid and size of boxes that fill the volume from its first corner, W fastest; None for any others."""
    if not len(boxes):
        return None
    size = boxes[0, :, 1] - boxes[0, :, 0]
    grid = boxes[-1, :, 1] // np.maximum(size, 1)
    corners = np.indices(grid).reshape(3, -1).T * size
    if not np.array_equal(boxes, np.stack([corners, corners + size], axis=-1)):
        return None
    (d, h, w), (dd, hh, ww) = grid.tolist(), size.tolist()
    return (d, h, w), (dd, hh, ww)


def labels_per_token(labels: np.ndarray, kept: KeptTokens) -> np.ndarray:
    """How many voxels of each label every token of the last volume has: int (d, h, w, 255).

    labels: uint8 (D, H, W) on the model's grid, 0 to 254; voxels past the last token are left out, and a token
    that reaches past the volume has fewer.
    """
    (d, h, w), (dd, hh, ww) = kept.grids[-1], kept.voxels
    size = (d * dd, h * hh, w * ww)
    cut = labels[tuple(slice(0, end) for end in size)]
    missing = [(0, end - have) for end, have in zip(size, cut.shape, strict=True)]
    padded = np.pad(cut, missing, constant_values=UNKNOWN_LABEL)
    counts = np.empty((d, h * w, UNKNOWN_LABEL + 1), np.int64)
    first = np.arange(h * w).reshape(h, 1, w, 1) * (UNKNOWN_LABEL + 1)
    for layer in range(d):  # one layer of tokens at a time: an index of the whole volume is eight times its size
        blocks = padded[layer * dd : (layer + 1) * dd].reshape(dd, h, hh, w, ww)
        counts[layer] = np.bincount((first + blocks).ravel(), minlength=counts[0].size).reshape(counts.shape[1:])
    return counts.reshape(d, h, w, UNKNOWN_LABEL + 1)[..., :UNKNOWN_LABEL]
