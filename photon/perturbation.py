"""Volumes without usable evidence, for the robustness loss (Photon Sec. 3.4, Eq. 19).

The paper says "masking, shuffling, etc."; kinds, shares and probabilities are those of the published code.

Legend: N patches of all volumes, n of one volume, X = C P numbers of a patch, C channels, P voxels of a patch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor

Perturbation = Literal["shuffle_patches", "shuffle_voxels", "keep_patches", "keep_voxels", "noise", "zeros"]


@dataclass(frozen=True)
class Published:
    """How often a perturbation is drawn, and the share of patches or voxel positions that it leaves."""

    probability: float
    keep: float = 0.0


PERTURBATIONS: Mapping[Perturbation, Published] = MappingProxyType(
    {
        "shuffle_patches": Published(0.16),
        "shuffle_voxels": Published(0.16),
        "keep_patches": Published(0.16, keep=0.2),
        "keep_voxels": Published(0.16, keep=0.1),
        "noise": Published(0.16),
        "zeros": Published(0.20),
    }
)


def draw_kind(generator: torch.Generator) -> Perturbation:
    """A perturbation, by the published probabilities; the same amount is drawn whichever it is."""
    weights = torch.tensor([p.probability for p in PERTURBATIONS.values()], device=generator.device)
    return tuple(PERTURBATIONS)[int(torch.multinomial(weights, 1, generator=generator))]


def perturb(
    patches: Tensor,
    counts: Sequence[int],
    kind: Perturbation,
    generator: torch.Generator,
    fill: float = 0.0,
    channels: int = 1,
) -> Tensor:
    """Perturb every volume of a batch on its own, all in the same way: ``(N, X) -> (N, X)``.

    - ``shuffle_patches``: the volume's patches change places. They are patches of the vision tower, not tokens,
      which are merge x merge of them.
    - ``shuffle_voxels``: the same, and the voxels inside the patches change places, in all patches alike.
    - ``keep_patches``: 20 % of the patches stay, the others become ``fill``.
    - ``keep_voxels``: 10 % of the voxel positions stay, the same in all patches, the others become ``fill``.
    - ``noise``: uniform between the volume's least and largest value.
    - ``zeros``: 0 as published. That is air where voxels are in [0, 1], and the mean where they are (x - mean) / std.

    Args:
        patches: patches of all volumes end to end, as :func:`photon.patch_embedding.patchify` cuts them; not changed.
        counts: patches of each volume.
        generator: may be on another device than ``patches``. The outcome is the same for the same state of it, and
            differs between a generator on the CPU and one on a GPU.
        fill: value of what does not stay.
        channels: C. A grey volume is repeated on each, and stays so: positions and noise are those of voxels.

    Returns:
        A new tensor, in the dtype and on the device of ``patches``. Shares are rounded, to one at least.

    Raises:
        ValueError: unknown kind, counts that do not add up to N, or X not a multiple of ``channels``.
    """
    if kind not in PERTURBATIONS:
        raise ValueError(f"kind: {kind!r} is no perturbation; choose one of {', '.join(PERTURBATIONS)}")
    if sum(counts) != len(patches) or any(count < 1 for count in counts):
        raise ValueError(f"counts: {list(counts)} must be positive and add up to the {len(patches)} patches")
    if patches.shape[1] % channels:
        raise ValueError(f"channels: {channels} do not divide the {patches.shape[1]} numbers of a patch")
    result = torch.empty_like(patches)
    voxels = patches.unflatten(1, (channels, -1))
    for source, target in zip(voxels.split(list(counts)), result.split(list(counts)), strict=True):
        target.copy_(_perturbed(source, kind, generator, fill).flatten(1))
    return result


def _perturbed(volume: Tensor, kind: Perturbation, generator: torch.Generator, fill: float) -> Tensor:
    """One volume: ``(n, C, P) -> (n, C, P)``."""
    if kind == "zeros":
        return torch.zeros_like(volume)
    if kind == "noise":
        return _noise(volume, generator)
    if kind in ("keep_patches", "keep_voxels"):
        return _keep(volume, 0 if kind == "keep_patches" else 2, PERTURBATIONS[kind].keep, fill, generator)
    shuffled = volume[_order(volume, 0, generator)]
    return shuffled if kind == "shuffle_patches" else shuffled[..., _order(volume, 2, generator)]


def _order(volume: Tensor, axis: int, generator: torch.Generator) -> Tensor:
    """A random order of the places along an axis."""
    return torch.randperm(volume.shape[axis], generator=generator, device=generator.device).to(volume.device)


def _keep(volume: Tensor, axis: int, share: float, fill: float, generator: torch.Generator) -> Tensor:
    """``fill`` everywhere but at a random ``share`` of the places along an axis."""
    places = _order(volume, axis, generator)[: max(1, round(share * volume.shape[axis]))]
    return torch.full_like(volume, fill).index_copy_(axis, places, volume.index_select(axis, places))


def _noise(volume: Tensor, generator: torch.Generator) -> Tensor:
    """Uniform noise over the volume's range, drawn in at least float32: bfloat16 would have 256 levels only."""
    precise = torch.promote_types(volume.dtype, torch.float32)
    shape = (len(volume), 1, volume.shape[2])
    share = torch.rand(shape, generator=generator, dtype=precise, device=generator.device).to(volume.device)
    low, high = (x.to(precise) for x in volume.aminmax())
    return torch.lerp(low, high, share).expand_as(volume)
