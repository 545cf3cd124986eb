"""Auxiliary heads for training a vision tower from nothing: what is where, and what is there at all.

Legend: B volumes, N tokens of a volume, D width, K classes of the label map, F findings.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from photon.geometry import PatchGeometry


class AuxiliaryHeads(nn.Module):
    """Per token, the share of each class of the label map; per volume, which findings it has.

    A language model learns little from a vision tower that has not learned to see, and a small tower learns to
    see from dense labels within minutes where it would need hours from answers alone.
    """

    def __init__(self, width: int, classes: int, findings: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, classes)
        self.whole = nn.Linear(2 * width, findings)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """``(B, N, D) -> (B, N, K), (B, F)`` logits."""
        pooled = torch.cat([tokens.mean(1), tokens.amax(1)], dim=-1)
        return self.dense(tokens), self.whole(pooled)


def class_shares(labels: np.ndarray, geometry: PatchGeometry, classes: list[int]) -> np.ndarray:
    """Share of each token's voxels that carry each class: ``(D, H, W) uint8 -> (N, K) float32``."""
    depth, height, width = geometry.token_shape
    t, h, w = (-(-n // unit) for n, unit in zip(labels.shape, geometry.token_shape, strict=True))
    full = np.zeros((t * depth, h * height, w * width), np.uint8)
    full[: labels.shape[0], : labels.shape[1], : labels.shape[2]] = labels
    column = np.full(256, len(classes), np.int64)
    column[classes] = np.arange(len(classes))
    blocks = full.reshape(t, depth, h, height, w, width).transpose(0, 2, 4, 1, 3, 5).reshape(t * h * w, -1)
    cells = column[blocks] + np.arange(len(blocks))[:, None] * (len(classes) + 1)
    counts = np.bincount(cells.ravel(), minlength=len(blocks) * (len(classes) + 1))
    return (counts.reshape(len(blocks), -1)[:, :-1] / blocks.shape[1]).astype(np.float32)


def dense_loss(logits: Tensor, shares: Tensor, small: Tensor) -> Tensor:
    """Binary cross-entropy on the shares, one value per volume: ``(B, N, K) x 2 -> (B)``.

    Args:
        small: ``(K)`` bool; of these classes presence counts instead of the share, and positives weigh four
            times, because a lesion fills a small part of a few tokens.
    """
    targets = torch.where(small, (shares > 0.02).to(shares.dtype), shares)
    weight = torch.where(small, 4.0, 1.0)
    losses = F.binary_cross_entropy_with_logits(logits, targets, pos_weight=weight, reduction="none")
    return losses.mean((1, 2))


def findings_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Binary cross-entropy over the findings that are known of each volume: ``(B, F) x 2 -> (B)``.

    ``targets`` are 1, 0, or -1 where nothing is known.
    """
    known = targets >= 0
    losses = F.binary_cross_entropy_with_logits(logits, targets.clamp(min=0), reduction="none")
    return (losses * known).sum(1) / known.sum(1).clamp(min=1)
