"""Images and videos as the arrays that :func:`photon.patch_embedding.patchify` cuts.

Legend: T frames, H W pixels, C channels that the model reads.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from photon.geometry import PatchGeometry, Size3
from photon.patch_embedding import PixelScale, patchify

LUMA = (0.299, 0.587, 0.114)
"""What red, green and blue weigh in grey (ITU-R BT.601)."""


@dataclass(frozen=True)
class PixelReader:
    """How a model reads pixels of 0 to 255.

    Attributes:
        geometry: of the model's patches.
        scale: of x / 255, for each channel.
        min_pixels, max_pixels: of an image, or of each frame, after resizing.
    """

    geometry: PatchGeometry
    scale: PixelScale
    min_pixels: int
    max_pixels: int

    def image(self, pixels: np.ndarray | Tensor) -> tuple[Tensor, Size3]:
        """Patches and grid of an image, ``(H, W)`` or ``(H, W, 3)`` uint8: one slab that repeats it."""
        image = torch.as_tensor(pixels)
        if image.ndim not in (2, 3):
            raise ValueError(f"images: shape {tuple(image.shape)}, expected (H, W) or (H, W, 3)")
        return self._cut(image[None], "images")

    def video(self, pixels: np.ndarray | Tensor) -> tuple[Tensor, Size3]:
        """Patches and grid of a video, ``(T, H, W)`` or ``(T, H, W, 3)`` uint8; its last frame fills the last slab."""
        video = torch.as_tensor(pixels)
        if video.ndim not in (3, 4) or not len(video):
            raise ValueError(f"videos: shape {tuple(video.shape)}, expected (T, H, W) or (T, H, W, 3)")
        return self._cut(video, "videos")

    @property
    def frames(self) -> PatchGeometry:
        """Of patches of frames, after resizing: frames are not averaged as slices are."""
        return replace(self.geometry, slices_per_frame=1)

    def _cut(self, frames: Tensor, name: str) -> tuple[Tensor, Size3]:
        if frames.dtype != torch.uint8:
            raise ValueError(f"{name}: {frames.dtype}, expected uint8 from 0 to 255")
        frames = frames[..., None] if frames.ndim == 3 else frames
        if frames.shape[-1] not in (1, 3):
            raise ValueError(f"{name}: {frames.shape[-1]} channels in the last axis, expected 3, or no such axis")
        frames = frames.permute(0, 3, 1, 2)
        size = self.size(frames.shape[2], frames.shape[3], name)
        if tuple(frames.shape[2:]) != size:
            # As Qwen's own processors do it, in uint8.
            frames = F.interpolate(frames, size, mode="bicubic", antialias=True)
        missing = -len(frames) % self.geometry.size[0]
        frames = torch.cat([frames, frames[-1:].expand(missing, -1, -1, -1)])
        return patchify(self._scaled(frames.float() / 255), self.frames)

    def size(self, height: int, width: int, name: str = "images") -> tuple[int, int]:
        """Nearest size in whole tokens within the budget, with nearly the same aspect ratio.

        Raises ValueError, which begins with ``name``, for pixels that have no such size.
        """
        try:
            # The other module that has it needs torchvision.
            from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize
        except ImportError as error:
            raise ValueError(f"{name}: the library's resizing needs Pillow; pip install pillow") from error
        _, patch_height, patch_width = self.geometry.size
        factor = math.lcm(patch_height, patch_width) * self.geometry.merge
        try:
            return smart_resize(height, width, factor, self.min_pixels, self.max_pixels)
        except (ValueError, ZeroDivisionError) as error:
            raise ValueError(f"{name}: {height} x {width} pixels: {error}") from error

    def _scaled(self, frames: Tensor) -> Tensor:
        """``(T, 1 or 3, H, W)`` in [0, 1] to ``(C, T, H, W)`` in model units."""
        if self.geometry.channels == 1 and frames.shape[1] == 3:
            frames = torch.einsum("tchw,c->thw", frames, frames.new_tensor(LUMA))[:, None]
        mean, std = frames.new_tensor(self.scale).T[:, :, None, None, None]
        return (frames.transpose(0, 1) - mean) / std
