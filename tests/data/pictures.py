"""Small images for tests, and files of them."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def picture(*shape: int, seed: int = 0) -> np.ndarray:
    """Noise, (H, W) or (H, W, 3) uint8."""
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def save(path: Path, pixels: np.ndarray, **how: Any) -> Path:
    """Write an image in the format of its suffix, and its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **how)
    return path
