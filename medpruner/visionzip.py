"""VisionZip's choice of tokens, a baseline: the tokens that get most attention, and the others merged into a few.

Legend: M tokens of a slice.

Towers without a class token score a token by the attention that it receives
(:func:`medpruner.nucleus.attention_received`; the published code sums over heads, which ranks alike). Its contextual
tokens have the centres and means of :func:`medpruner.clustering.clusters` and :func:`medpruner.clustering.merge`; they
stay at their places, where its own code puts them behind the dominant ones.
"""

import torch
from torch import Tensor


def dominant(scores_M: Tensor, keep: int) -> Tensor:
    """The ``keep`` tokens with the highest scores.

    Args:
        scores_M: ``(..., M)``, each row for itself.
        keep: tokens of a row, from 0 to M.

    Returns:
        ``(..., M)`` bool with exactly ``keep`` True in a row; of equal tokens the first stay.

    Raises:
        ValueError: ``keep`` is out of range.
    """
    if not 0 <= keep <= scores_M.shape[-1]:
        raise ValueError(f"keep: {keep} of {scores_M.shape[-1]} tokens; give 0 up to all of them")
    best = scores_M.argsort(dim=-1, descending=True, stable=True)[..., :keep]
    return torch.zeros_like(scores_M, dtype=torch.bool).scatter_(-1, best, True)
