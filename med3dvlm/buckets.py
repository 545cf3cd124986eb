"""Rows of much different length, such as answers of a word and reports, go through the language model apart.

Legend: R rows, L row length, G rows of a bucket.

Rows of one batch are padded to the longest. Beside a report of 300 tokens a question of 30 is then nine tenths padding,
which is computed like text.
"""

import torch
from torch import Tensor

MOST = 2.0
"""A bucket's longest row has at most so many times the tokens of its shortest: padding is less than half of it."""


def length_buckets(lengths: Tensor, most: float = MOST) -> list[Tensor]:
    """Rows of similar length together.

    Args:
        lengths: ``(R)`` tokens of each row, at least 1.
        most: times the tokens of a bucket's shortest row that its longest may have.

    Returns:
        Indices ``(G)`` of each bucket's rows in ascending order, shortest rows first; each row is in one.
    """
    order = torch.argsort(lengths, stable=True)
    buckets: list[list[int]] = []
    shortest = 0
    for row, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        if not buckets or length > most * shortest:
            buckets.append([])
            shortest = length
        buckets[-1].append(row)
    return [torch.tensor(sorted(rows), device=lengths.device) for rows in buckets]
