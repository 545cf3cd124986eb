"""Where image tokens go among the text.

Legend: R rows, L row length, N image tokens of a row, D width of the language model.
"""

from typing import Literal

import torch
from torch import Tensor

IMAGE_TOKEN = "<im_patch>"
Splice = Literal["correct", "published"]
"""``correct``: the image tokens take the places of ``<im_patch>``.

``published``: they take the N places after the row's first, as the published code has it, which expects a BOS token
there. Qwen2.5 has none: the first ``<im_patch>`` stays as it is, and the last image token overwrites the first token
of the question. Imported weights were trained so.
"""


def image_places(
    input_ids: Tensor, attention_mask: Tensor, image_token_id: int, tokens: int, splice: Splice = "correct"
) -> Tensor:
    """``(R, L)`` bool: where each row's ``tokens`` image tokens go.

    Args:
        input_ids, attention_mask: ``(R, L)``, padded on either side.

    Raises:
        ValueError: a row has another number of ``<im_patch>``, or its places do not fit ``splice``.
    """
    marked = (input_ids == image_token_id) & (attention_mask != 0)
    counts = marked.sum(1)
    if bool((counts != tokens).any()):
        row = int((counts != tokens).nonzero()[0])
        raise ValueError(
            f"input_ids: {int(counts[row])} {IMAGE_TOKEN} in row {row} for {tokens} image tokens; "
            "make prompts with this model's processor"
        )
    if splice == "correct":
        return marked
    first = attention_mask.long().argmax(1, keepdim=True)
    offset = torch.arange(input_ids.shape[1], device=input_ids.device) - first
    places = (offset >= 1) & (offset <= tokens)
    # `<im_patch>` from the first or second token on, and something to overwrite.
    expected = marked.long().argmax(1) - first[:, 0]
    if bool((expected > 1).any() | ((places & (attention_mask != 0)).sum(1) != tokens).any()):
        raise ValueError(
            f"input_ids: splice: published needs {IMAGE_TOKEN} at the start of each row and a question behind them; "
            "use plain prompts, or splice: correct"
        )
    return places


def splice_in(embeds: Tensor, image: Tensor, places: Tensor) -> Tensor:
    """``(R, L, D)`` embeddings with the image tokens ``(R, N, D)`` at their places."""
    return embeds.masked_scatter(places[..., None], image.to(embeds.dtype))
