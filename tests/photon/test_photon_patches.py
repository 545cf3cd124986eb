"""Patches of any size, and a 3D embedding that starts from a slice-video model's."""

from typing import Any

import numpy as np
import pytest
import torch

from photon.building import with_patches, with_scheduling
from photon.geometry import PatchGeometry
from photon.heads import class_shares
from photon.patch_embedding import Scale, patchify
from photon.processing_photon import PhotonProcessor, VolumeChats
from photon.scheduling import SchedulingSettings
from tests.photon.conftest import turn


@pytest.mark.parametrize("shape", [(8, 24, 32), (1, 1, 1), (9, 13, 5), (4, 8, 8)])
def test_any_volume_size_is_cut_into_whole_tokens(shape: tuple[int, int, int]) -> None:
    geometry = PatchGeometry((4, 4, 4), 1, 2)
    volume = torch.rand(shape) + 1
    patches, grid = patchify(volume, geometry)
    assert len(patches) == grid[0] * grid[1] * grid[2]
    assert grid[1] % 2 == grid[2] % 2 == 0
    assert geometry.tokens(shape) == len(patches) // 4
    # Nothing is lost and what is added is the volume's minimum.
    added = patches.numel() - volume.numel()
    assert patches.double().sum().item() == pytest.approx(volume.double().sum().item() + added * volume.min().item())


SCALE = Scale(0.5, 0.5)


def test_patches_of_one_token_are_neighbours_in_plane() -> None:
    depth, height, width = torch.meshgrid(torch.arange(4), torch.arange(8), torch.arange(16), indexing="ij")
    patches, _ = patchify((depth * 10_000 + height * 100 + width).float(), PatchGeometry((2, 4, 4), 1, 2))
    first = patches[:, 0].tolist()
    assert first[:4] == [0, 4, 400, 404]  # a 2x2 merge group
    assert first[4:8] == [8, 12, 408, 412]  # the next token along the width
    assert first[8] == 20_000  # the next depth slab


def test_an_inflated_model_equals_its_slice_video_model(tiny: Any, tokenizer: Any) -> None:
    """Frames are means of two slices, the new kernel spreads over four: the same sums."""
    frames, _ = tiny(vision={"temporal_patch_size": 2, "in_channels": 3}, slices_per_frame=2, temporal_step=4.0)
    volumetric = with_patches(frames, (4, 4, 4), 1, "inflate", SCALE, [SCALE] * 3, temporal_step=4.0)
    group = VolumeChats([torch.rand(8, 24, 32)], [turn("Is there?", "no"), turn("Which side is it on?", "left")])
    logits = [
        model(**PhotonProcessor.from_config(model.config, tokenizer).batch([group])).logits
        for model in (frames, volumetric)
    ]
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)
    assert volumetric.config.patches == PatchGeometry((4, 4, 4), 1, 2)


def test_a_fresh_embedding_is_new_and_everything_else_is_copied(tiny: Any) -> None:
    model, _ = tiny()
    renewed = with_patches(model, (6, 8, 8), 1, "fresh", SCALE)
    old, new = model.state_dict(), renewed.state_dict()
    name = "model.visual.patch_embed.proj.weight"
    assert new[name].shape == (32, 6 * 8 * 8)
    assert all(torch.equal(old[k], new[k]) for k in old if k != name)


def test_inflation_to_several_channels_is_refused(tiny: Any) -> None:
    model, _ = tiny()
    with pytest.raises(ValueError, match="patch_init"):
        with_patches(model, (4, 4, 4), 3, "inflate", SCALE)


def test_scheduling_is_added_to_a_model_without_it(tiny: Any) -> None:
    model, _ = tiny(scheduling=None)
    assert len(model.model.threshold_predictors) == 0
    scheduled = with_scheduling(model, SchedulingSettings(predictor_bias=-5.0))
    predictor: Any = scheduled.model.threshold_predictors[0]
    assert predictor is not None and predictor.mlp[2].bias.item() == -5.0
    again = with_scheduling(scheduled, SchedulingSettings(temperature=0.5))
    assert torch.equal(again.model.threshold_predictors[0].mlp[0].weight, predictor.mlp[0].weight)


def test_class_shares_count_voxels_per_token() -> None:
    geometry = PatchGeometry((2, 2, 2), 1, 2)
    labels = np.zeros((4, 4, 8), np.uint8)
    labels[:2, :, 4:] = 16
    labels[3, 0, 0] = 45
    shares = class_shares(labels, geometry, [16, 45])
    np.testing.assert_allclose(shares, [[0, 0], [1, 0], [0, 1 / 32], [0, 0]])
