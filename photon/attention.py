"""Attention over sequences that lie end to end, without padding.

Legend: T tokens of all sequences together, H heads, J key-value heads, E head width, G groups, R rows.

A *group* is one volume (or a prior and a current one) with all questions about it. Its visual prefix stands
before every question, so under causal attention the prefix is the same for all of them and is computed once:
``TreePlan``. Once tokens were dropped, each question owns its sequence: ``RowsPlan``.

The decoder layers of transformers call :func:`photon_attention` through their attention interface; the plan
travels as a keyword argument. Without a plan (decoding with a cache) it is the library's own SDPA.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from photon.varlen import packed_attention, tree_attention

ATTENTION_NAME = "photon"


class Plan:
    """Who attends to whom; optionally remembers the keys and values that passed (for a cache, for saliency)."""

    def __init__(self, record: bool = False, watch: int | None = None) -> None:
        self.record = record
        self.watch = watch
        self.keys_values: dict[int, tuple[Tensor, Tensor]] = {}
        self.watched: tuple[Tensor, Tensor] | None = None

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """``(H, T, E)`` from query ``(H, T, E)`` and key, value ``(J, T, E)`` of a decoder layer.

        Remembers key and value of every layer when recording, and query and key of the watched layer.
        """
        if self.record:
            self.keys_values[layer] = (key, value)
        if layer == self.watch:
            self.watched = (query, key)
        return self._attend(query, key, value, scale)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        raise NotImplementedError


class ScorePlan(Plan):
    """Only watches: for the queries and keys of a layer that has not run yet."""

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        return torch.zeros_like(query)


class RowsPlan(Plan):
    """Independent causal sequences end to end."""

    def __init__(self, lengths: list[int], record: bool = False, watch: int | None = None) -> None:
        super().__init__(record, watch)
        self.lengths = lengths

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        return packed_attention(query, key, value, self.lengths, True, scale)


class TreePlan(Plan):
    """Every group's prefix once, and its questions as branches of it.

    Packed order: the prefixes of all groups, then the questions group by group. With ``stored`` keys and values
    of one group's prefix by layer, only its questions pass; what is remembered has the prefix in front. ``visible``
    hides part of the prefix from a question, ``(K, P)`` bool for each group.
    """

    def __init__(
        self,
        prefixes: list[int],
        suffixes: list[list[int]],
        record: bool = False,
        watch: int | None = None,
        stored: dict[int, tuple[Tensor, Tensor]] | None = None,
        visible: list[Tensor] | None = None,
    ) -> None:
        super().__init__(record, watch)
        self.prefixes, self.suffixes, self.stored, self.visible = prefixes, suffixes, stored, visible

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        if self.stored is None:
            return super().attend(layer, query, key, value, scale)
        before = self.stored[layer]
        key, value = torch.cat([before[0], key], dim=1), torch.cat([before[1], value], dim=1)
        # Nobody asks for the prefix's queries: zeros keep the places of the others.
        whole = F.pad(query, (0, 0, self.prefixes[0], 0))
        return super().attend(layer, whole, key, value, scale)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        first = 0 if self.stored is None else self.prefixes[0]
        return tree_attention(query[:, first:], key, value, self.prefixes, self.suffixes, scale, self.visible)


def photon_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    plan: Plan | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention interface of transformers: ``(1, H, T, E)`` in, ``(1, T, H, E)`` out."""
    if plan is None:
        out, _ = sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
        return out, None
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    layer: int = module.layer_idx  # type: ignore[assignment]
    return plan.attend(layer, query[0], key[0], value[0], scale).transpose(0, 1)[None], None


AttentionInterface.register(ATTENTION_NAME, photon_attention)
