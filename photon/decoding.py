"""Keys and values after the prompt: what generation reads, and what a second question on a volume re-uses.

Legend: R rows, L tokens of a row, P tokens of a prefix, S packed tokens of a stream, J key-value heads, E head width,
D width.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from photon.packing import Layout
from photon.stream import Stream, pad_rows

KeysValues = dict[int, tuple[Tensor, Tensor]]
EarlyCache = Literal["keep", "evict"]


@dataclass
class DecodeState:
    """What decoding needs beside keys and values: rows are padded, and layers differ in length.

    Attributes:
        masks: per decoder layer ``(R, keys)`` bool.
        position: ``(R)`` rotary position of the next token.
        length: tokens of a row, padding included, that the cache has seen.
        prefix: what another question about the same volume can start from.
    """

    masks: list[Tensor]
    position: Tensor
    length: int
    prefix: "EncodedPrefix | None" = None


@dataclass
class EncodedPrefix:
    """A volume and the text before the questions, as far as it is the same for every question.

    Attributes:
        ids: ``(P)`` token ids. positions: ``(3, P)`` rotary positions.
        hidden: ``(P, D)`` below the first drop; keys_values: of the layers up to there ``(J, P, E)``.
        layers: decoder layers that ``keys_values`` covers.
        deepstack: features of the visual tokens for the decoder's first layers (Qwen3-VL).
    """

    ids: Tensor
    positions: Tensor
    hidden: Tensor
    keys_values: KeysValues
    layers: int
    deepstack: list[Tensor]

    def must_fit(self, ids: Tensor, positions: Tensor, prefixes: list[int], layers: int) -> None:
        """Raise ``ValueError`` unless the rows start with this very prefix.

        Ids and positions are those of the rows' prefixes, end to end.
        """
        if len(prefixes) != 1:
            raise ValueError(f"prefix: {len(prefixes)} groups of rows; an encoded volume serves one")
        if not (torch.equal(ids, self.ids) and torch.equal(positions, self.positions)):
            raise ValueError("prefix: the text before the questions, or the volume's size, is not the encoded one")
        if layers != self.layers:
            raise ValueError(f"prefix: encoded for {self.layers} decoder layers, this pass shares {layers}")


@dataclass
class Stage:
    """A run of decoder layers on one stream. ``first``: the first of them."""

    first: int
    row_tokens: Tensor
    source: Tensor | None

    @classmethod
    def of(cls, stream: Stream, first: int) -> "Stage":
        return cls(first, stream.row_tokens, stream.source)


def cache_tables(stages: list[Stage], early: EarlyCache) -> list[Tensor]:
    """For each stage, which of its packed keys each row of the cache keeps: ``(R, L)``, -1 behind a row's end.

    ``keep``: a layer's cache has all that passed it. ``evict``: only what passed the last drop (Photon Sec. 3.2).
    """
    if early == "keep":
        return [stage.row_tokens for stage in stages]
    tables = [stages[-1].row_tokens]
    for stage in reversed(stages[1:]):
        assert stage.source is not None
        table = tables[0]
        tables.insert(0, torch.where(table < 0, -1, stage.source[table.clamp(min=0)]))
    return tables


def fill(
    cache: Cache,
    keys_values: KeysValues,
    stages: list[Stage],
    layout: Layout,
    order: list[int],
    early: EarlyCache,
    length: int,
) -> DecodeState:
    """Write the keys and values of every layer into ``cache``, one padded row per row of the input.

    ``order``: packed place of each row of the input. ``length``: columns of the input.
    """
    tables = cache_tables(stages, early)
    masks = []
    for layer, (key, value) in sorted(keys_values.items()):
        stage = max(i for i, s in enumerate(stages) if s.first <= layer)
        table = tables[stage][order]
        cache.update(pad_rows(key, table), pad_rows(value, table), layer)
        masks.append(table >= 0)
    return DecodeState(masks, layout.next_position[order], length)
