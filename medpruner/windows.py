"""CT as MedGemma 1.5 takes it: three windows as the colours of an image, a label before each, the question last.

Google's notebook for CT has the label behind its image; ``medpruner`` takes text in front of an image for its label,
so that it leaves the prompt with the image.

Legend: D, H, W slices, rows and columns of a scan, S slices that are shown.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from medpruner.sampling import uniform_slices

WINDOWS = ((-1024.0, 1024.0), (-135.0, 215.0), (0.0, 80.0))
"""HU that are black and full in red (wide), green (soft tissue) and blue (brain)."""

SLICES = 85
"""Most slices of a prompt."""


def shown_slices(count: int, limit: int = SLICES) -> Tensor:
    """Which of a scan's slices are shown, at uniform distance: ``(D)`` bool. Raises ``ValueError`` for a ``limit``
    below 1."""
    if limit < 1:
        raise ValueError(f"limit: {limit} slices; give 1 or more")
    return uniform_slices(count, min(count, limit))


def ct_images(
    hu_DHW: Tensor,
    limit: int = SLICES,
    size: int | None = None,
    windows: Sequence[tuple[float, float]] = WINDOWS,
) -> Tensor:
    """Slices at uniform distance as normalised images.

    Args:
        hu_DHW: a scan in HU, any number type. limit: slices at most; the first is always among them.
        size: side of the square that images are resized to, 896 for MedGemma; None: as they are.
        windows: of red, green and blue, in the units of the scan.

    Returns:
        ``(S, 3, H, W)`` float32 from -1 to 1, with the 256 levels of an 8-bit image (before resizing).

    Raises:
        ValueError: not a volume, values that are not finite, or a ``limit`` below 1.
    """
    if hu_DHW.ndim != 3 or 0 in hu_DHW.shape:
        raise ValueError(f"CT: of shape {tuple(hu_DHW.shape)}; give (slices, rows, columns)")
    shown = hu_DHW[shown_slices(len(hu_DHW), limit).to(hu_DHW.device)].float()
    if not shown.isfinite().all():
        raise ValueError("CT: values that are not finite; give HU")
    colours = [(shown.clamp(low, high) - low) / (high - low) for low, high in windows]
    images = torch.stack(colours, 1).mul(255).round()
    if size is not None:
        images = nn.functional.interpolate(images, (size, size), mode="bilinear", antialias=True)
    return images / 127.5 - 1


def ct_message(count: int, question: str, instruction: str = "") -> list[dict[str, str]]:
    """The content of a user's message about so many slices, as chat templates of transformers take it.

    Returns:
        the instruction if there is one, ``SLICE i:`` and an image for each slice from 1 on, and the question.

    Raises:
        ValueError: no slices.
    """
    if count < 1:
        raise ValueError(f"count: {count} slices; give 1 or more")
    parts = [{"type": "text", "text": instruction}] if instruction else []
    for index in range(1, count + 1):
        parts += [{"type": "text", "text": f"SLICE {index}:"}, {"type": "image"}]
    return [*parts, {"type": "text", "text": question}]
