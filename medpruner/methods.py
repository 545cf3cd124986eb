"""The methods behind one interface: which slices are encoded, and which of their tokens stay.

Legend: S slices of a volume, M tokens of a slice, P pixels of a token, d width of a head.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from medpruner.clustering import Clusters, clusters
from medpruner.hiprune import hiprune
from medpruner.hulu_l1 import hulu_l1
from medpruner.nucleus import nucleus
from medpruner.sampling import random_tokens, uniform_slices
from medpruner.settings import HiPrune, HuluL1, MedPruner, PruningSettings, Random, Uniform, VisionZip
from medpruner.slice_filter import kept_slices
from medpruner.towers import Reading, block_index
from medpruner.visionzip import dominant


@dataclass(frozen=True)
class Choice:
    """Of slices: tokens that stay (bool (S, M), centres of clusters among them), and how centres are made."""

    tokens: Tensor
    clusters: Clusters | None = None


class Method(Protocol):
    """One call's worth of decisions."""

    blocks: tuple[int, ...]
    """Blocks of the tower whose attention is read, counted from its start."""

    def slices(self, pixels: Tensor) -> Tensor:
        """Which slices stay: (S, M, P) normalised pixels of a volume -> bool (S,). Called volume by volume."""
        ...

    def tokens(self, volume: int, count: int, grid: tuple[int, int], readings: dict[int, Reading]) -> Choice:
        """Which tokens of a volume's ``count`` staying slices stay, from what was read of these (received (S, M),
        keys (S, M, d))."""
        ...


def method_of(settings: PruningSettings, depth: int) -> Method:
    """The method of these settings for a tower of so many blocks. Raises `ValueError` if it has not the block."""
    method: Method = _METHODS[type(settings)](settings, depth)
    return method


class _All:
    """Every slice and every token."""

    blocks: tuple[int, ...] = ()

    def slices(self, pixels: Tensor) -> Tensor:
        return torch.ones(len(pixels), dtype=torch.bool)

    def tokens(self, volume: int, count: int, grid: tuple[int, int], readings: dict[int, Reading]) -> Choice:
        return Choice(torch.ones(count, grid[0] * grid[1], dtype=torch.bool))


class _MedPruner(_All):
    def __init__(self, settings: MedPruner, depth: int) -> None:
        self.settings = settings
        self.block = block_index(settings.layer, depth, "layer")
        self.blocks = (self.block,) if settings.nucleus else ()

    def slices(self, pixels: Tensor) -> Tensor:
        gamma = self.settings.threshold
        return super().slices(pixels) if gamma is None else kept_slices(pixels.flatten(1), gamma)

    def tokens(self, volume: int, count: int, grid: tuple[int, int], readings: dict[int, Reading]) -> Choice:
        s = self.settings
        if not s.nucleus:
            return super().tokens(volume, count, grid, readings)
        read = readings[self.block]
        size = read.received.shape[-1]
        importance = read.received if s.importance == "sum" else read.received / size
        chosen = nucleus(importance, s.temperature, s.tau)
        if not s.clusters:
            return Choice(chosen)
        return _with_centres(chosen, read.keys, max(int(s.centre_share * size), 1))


class _VisionZip(_All):
    def __init__(self, settings: VisionZip, depth: int) -> None:
        self.settings = settings
        self.block = block_index(settings.layer, depth, "layer")
        self.blocks = (self.block,)

    def tokens(self, volume: int, count: int, grid: tuple[int, int], readings: dict[int, Reading]) -> Choice:
        read = readings[self.block]
        size = read.received.shape[-1]
        chosen = dominant(read.received, max(int(self.settings.keep * size), 1))
        centres = int(self.settings.contextual * size)
        return _with_centres(chosen, read.keys, centres) if centres else Choice(chosen)


class _HiPrune(_All):
    def __init__(self, settings: HiPrune, depth: int) -> None:
        self.settings = settings
        chosen = depth // 2 if settings.object_layer is None else settings.object_layer
        self.object_block = block_index(chosen, depth, "object_layer")
        self.deep_block = block_index(settings.deep_layer, depth, "deep_layer")
        self.blocks = tuple(dict.fromkeys((self.object_block, self.deep_block)))

    def tokens(self, volume: int, count: int, grid: tuple[int, int], readings: dict[int, Reading]) -> Choice:
        keep = max(int(self.settings.keep * grid[0] * grid[1]), 1)
        of_object, of_deep = (readings[block].received for block in (self.object_block, self.deep_block))
        return Choice(hiprune(of_object, of_deep, grid, keep, self.settings.alpha))


class _HuluL1(_All):
    def __init__(self, settings: HuluL1, depth: int) -> None:
        self.threshold = settings.threshold
        self.kept: list[Tensor] = []

    def slices(self, pixels: Tensor) -> Tensor:
        self.kept.append(hulu_l1(pixels, self.threshold))
        return super().slices(pixels)

    def tokens(self, volume: int, count: int, grid: tuple[int, int], readings: dict[int, Reading]) -> Choice:
        return Choice(self.kept[volume])


class _Uniform(_All):
    def __init__(self, settings: Uniform, depth: int) -> None:
        self.keep = settings.keep

    def slices(self, pixels: Tensor) -> Tensor:
        return uniform_slices(len(pixels), max(round(self.keep * len(pixels)), 1))


class _Random(_All):
    def __init__(self, settings: Random, depth: int) -> None:
        self.keep = settings.keep
        self.generator = torch.Generator().manual_seed(settings.seed)

    def tokens(self, volume: int, count: int, grid: tuple[int, int], readings: dict[int, Reading]) -> Choice:
        size = grid[0] * grid[1]
        keep = max(round(self.keep * size), 1)
        return Choice(torch.stack([random_tokens(size, keep, self.generator) for _ in range(count)]))


def _with_centres(chosen: Tensor, keys: Tensor, count: int) -> Choice:
    """What was not chosen, merged into so many centres, which stay at their places."""
    merged = clusters(keys, chosen, count)
    tokens = chosen.flatten().scatter(0, merged.centres, True).view_as(chosen)
    return Choice(tokens, merged)


_METHODS: dict[type[PruningSettings], type] = {
    MedPruner: _MedPruner,
    VisionZip: _VisionZip,
    HiPrune: _HiPrune,
    HuluL1: _HuluL1,
    Uniform: _Uniform,
    Random: _Random,
}
