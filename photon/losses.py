"""Photon's training objective (Sec. 3.4)."""

from torch import Tensor


def band_loss(mean_probability: Tensor, low: float, high: float) -> Tensor:
    """Soft retention band (Photon Eq. 18), one value per row: ``(R) -> (R)``.

    Zero while r, the mean retention probability of a row's visual tokens, is within [``low``, ``high``]; the
    distance to the band outside.
    """
    return (mean_probability - high).clamp(min=0) + (low - mean_probability).clamp(min=0)
