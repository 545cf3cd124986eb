"""Values and places after preprocessing: each voxel of the model's array leads back to where it came from."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from mllm3d.config import VolumeConfig
from mllm3d.data.orientation import Stored, apply_map, canonical
from mllm3d.data.preprocess import LEVELS, prepare, prepare_labels, same_grid
from mllm3d.data.volumes import Volume, read_volume
from mllm3d.errors import UserError
from tests.data.scans import ORIENTATIONS, save_nifti, scan, store

HALF_STEP = 0.5 / LEVELS


def volume_of(array: np.ndarray, name: str = "x.nii.gz", spacing: tuple[float, ...] = (3, 2, 1.5)) -> Volume:
    return Volume(
        array=array,
        spacing_mm=(float(spacing[0]), float(spacing[1]), float(spacing[2])),
        to_source=np.eye(4),
        source_shape=(array.shape[0], array.shape[1], array.shape[2]),
        source_affine=np.eye(4),
        path=Path(name),
        has_spacing=not name.endswith(".npy"),
    )


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_a_voxel_leads_back_to_the_stored_index(data: st.DataObject) -> None:
    """A ramp along a stored axis holds its index, also between voxels: linear interpolation keeps that."""
    size = st.integers(8, 20)
    maybe = lambda strategy: st.none() | st.tuples(strategy, strategy, strategy)  # noqa: E731
    shape = data.draw(st.tuples(size, size, size))
    spacing = data.draw(st.tuples(*[st.floats(0.5, 4)] * 3))
    axes, flips = data.draw(st.sampled_from(ORIENTATIONS))
    config = VolumeConfig(
        spacing_mm=data.draw(maybe(st.floats(0.7, 3))),
        crop=data.draw(maybe(st.integers(5, 24))),
        shape=data.draw(maybe(st.integers(5, 30))),
        flip=data.draw(st.sampled_from([(), ("W",), ("D", "H"), ("D", "H", "W")])),
        window_hu=(0.0, 20.0),
    )
    stored_shape = shape[axes[0]], shape[axes[1]], shape[axes[2]]
    for n in range(3):
        ramp = np.broadcast_to(
            np.arange(stored_shape[n]).reshape([-1 if m == n else 1 for m in range(3)]), stored_shape
        )
        affine = store(np.zeros(shape), axes=axes, flips=flips, spacing=spacing)[1]
        found = canonical(Stored(ramp.astype(np.float32), affine), Path("x"))
        volume = Volume(found.array, found.spacing_mm, found.to_source, stored_shape, affine, Path("x"))
        prepared = prepare(volume, config)
        places = np.stack(np.meshgrid(*map(np.arange, prepared.array.shape), indexing="ij"), axis=-1)
        index = apply_map(prepared.to_source, places.astype(float))
        # Beyond the outermost voxel centres, and those of the crop, there is no ramp.
        reach = 1 + np.abs(prepared.to_source[:3, :3]).sum(axis=1)
        if config.spacing_mm is not None:
            reach += np.array([config.spacing_mm[a] / spacing[a] for a in axes])
        inside = ((index >= reach) & (index <= np.array(stored_shape) - 1 - reach)).all(axis=-1)
        if config.crop is not None and config.shape is not None:
            in_crop = (places + 0.5) * np.array(config.crop) / np.array(config.shape) - 0.5
            inside &= ((in_crop >= 0) & (in_crop <= np.array(config.crop) - 1)).all(axis=-1)
        np.testing.assert_allclose(prepared.array[inside] * 20, index[inside][:, n], atol=0.01)


def test_a_voxel_keeps_its_place_in_the_patient(tmp_path: Path) -> None:
    """The brightest voxel is found again within half a voxel, through resampling, crop, resize and flip."""
    array = np.full((30, 40, 50), -1000, np.int16)
    array[17, 11, 33] = 1000
    path = save_nifti(tmp_path / "x.nii.gz", array, axes=(1, 2, 0), flips=(True, False, True))
    volume = read_volume(path)
    config = VolumeConfig(spacing_mm=(1, 1, 1), crop=(80, 70, 70), shape=(40, 35, 70), flip=("W", "D"))
    prepared = prepare(volume, config)
    peak = np.array(np.unravel_index(prepared.array.argmax(), prepared.array.shape), dtype=float)
    index = apply_map(prepared.to_source, peak)
    stored, _ = store(array, axes=(1, 2, 0), flips=(True, False, True))
    marker = np.array(np.unravel_index(stored.argmax(), stored.shape))
    voxel_mm = np.array([2.0, 1.5, 3.0])  # of the stored axes
    assert (np.abs(index - marker) * voxel_mm <= 0.51 * np.array([2.0, 1.5, 3.0])).all()
    assert prepared.source_shape == stored.shape


def test_window_mean_and_deviation() -> None:
    array = np.array([-3000, -200, 50, 299, 300, 3000], np.int16).reshape(1, 2, 3)
    found = prepare(volume_of(array), VolumeConfig(preset="phantom", shape=None)).array.ravel()
    np.testing.assert_allclose(found, [-1, -1, 0, 0.996, 1, 1], atol=4 * HALF_STEP)
    assert found.dtype == np.float32


def test_values_are_those_of_torch_interpolate() -> None:
    rng = np.random.default_rng(0)
    array = rng.integers(-1200, 1200, (9, 12, 15)).astype(np.int16)
    found = prepare(volume_of(array), VolumeConfig(shape=(6, 20, 10), flip=("W",))).array
    unit = (torch.from_numpy(array).float().clamp(-1000, 1000) + 1000) / 2000
    wanted = F.interpolate(unit[None, None], size=(6, 20, 10), mode="trilinear", align_corners=False)[0, 0]
    np.testing.assert_allclose(found, wanted.flip(2).numpy(), atol=HALF_STEP * 1.01)


def test_percentiles_replace_the_window_for_mr() -> None:
    array = np.arange(1001, dtype=np.int16).reshape(7, 11, 13)
    found = prepare(volume_of(array), VolumeConfig(window_percentile=(10, 90))).array.ravel()
    np.testing.assert_allclose(found, np.clip((np.arange(1001) - 100) / 800, 0, 1), atol=HALF_STEP * 1.01)
    with pytest.raises(UserError, match=r"x\.nii\.gz: percentiles .* are both 0; widen"):
        prepare(volume_of(np.where(array > 999, array, 0)), VolumeConfig(window_percentile=(1, 99)))


def test_padding_is_the_windows_lower_end_and_the_crop_is_central() -> None:
    array = np.full((4, 5, 6), 200, np.int16)
    prepared = prepare(volume_of(array), VolumeConfig(crop=(6, 3, 6)))
    assert prepared.array.shape == (6, 3, 6)
    np.testing.assert_array_equal(prepared.array[[0, 5]], 0)
    np.testing.assert_allclose(prepared.array[1:5], 0.6, atol=HALF_STEP)
    np.testing.assert_array_equal(apply_map(prepared.to_source, np.array([1.0, 0, 0])), [0, 1, 0])


@pytest.mark.parametrize(
    ("shape", "spacing", "target", "wanted"),
    [
        ((20, 30, 40), (3, 1, 1), (1, 1, 1), (60, 30, 40)),
        ((20, 30, 40), (3, 0.7, 0.7), (1, 1, 1), (60, 21, 28)),
        ((20, 31, 41), (1, 1, 1), (2, 2, 2), (10, 16, 20)),  # 15.5 and 20.5 round to even
        ((20, 30, 40), (1.0004, 1, 1), (1, 1, 1), (20, 30, 40)),
        ((20, 30, 40), (1, 1, 1), (90, 1, 1), (1, 30, 40)),
    ],
)
def test_the_resampled_grid(
    shape: tuple[int, ...],
    spacing: tuple[float, ...],
    target: tuple[float, float, float],
    wanted: tuple[int, ...],
) -> None:
    prepared = prepare(volume_of(scan(shape), spacing=spacing), VolumeConfig(spacing_mm=target))
    assert prepared.array.shape == wanted
    middle = apply_map(prepared.to_source, (np.array(wanted) - 1) / 2)
    np.testing.assert_allclose(middle, (np.array(shape) - 1) / 2)


def test_the_border_is_extended_not_zero() -> None:
    array = np.full((5, 5, 5), 1000, np.int16)
    array[2, 2, 2] = 999
    found = prepare(volume_of(array, spacing=(1.3, 1.3, 1.3)), VolumeConfig(spacing_mm=(1, 1, 1))).array
    assert found.min() > 0.99


def test_a_tiny_target_spacing_is_refused_before_it_allocates() -> None:
    with pytest.raises(UserError, match="over the limit"):
        prepare(volume_of(scan()), VolumeConfig(spacing_mm=(0.001, 0.001, 0.001)))


def test_npy_has_no_spacing_to_resample_from() -> None:
    with pytest.raises(UserError, match="no voxel spacing"):
        prepare(volume_of(scan(), name="x.npy"), VolumeConfig(preset="photon"))
    assert prepare(volume_of(scan(), name="x.npy"), VolumeConfig(preset="phantom")).array.shape == (
        56,
        112,
        112,
    )


@pytest.mark.parametrize("spacing_mm", [None, (1.0, 1.0, 1.0)])
def test_labels_lie_on_the_image(spacing_mm: tuple[float, float, float] | None) -> None:
    """A bright box and its label go through everything to the same voxels."""
    image = np.full((20, 24, 28), -1000, np.int16)
    labels = np.zeros(image.shape, np.uint8)
    image[4:13, 6:16, 9:20], labels[4:13, 6:16, 9:20] = 1000, 7
    config = VolumeConfig(spacing_mm=spacing_mm, crop=(30, 30, 30), shape=(33, 41, 27), flip=("H",))
    seen = prepare(volume_of(image), config).array > 0.5
    found = prepare_labels(volume_of(labels), config)
    assert found.dtype == np.uint8 and set(np.unique(found)) == {0, 7}
    overlap = (seen & (found == 7)).sum() / (seen | (found == 7)).sum()
    assert overlap > 0.9, overlap
    centres = [np.argwhere(mask).mean(axis=0) for mask in (seen, found == 7)]
    np.testing.assert_allclose(centres[0], centres[1], atol=0.5)


def test_labels_without_resampling_are_the_nearest_stored_voxel() -> None:
    labels = np.random.default_rng(1).integers(0, 9, (7, 9, 11)).astype(np.uint8)
    config = VolumeConfig(crop=(8, 6, 11), shape=(12, 13, 5), flip=("W",))
    found = prepare_labels(volume_of(labels), config)
    prepared = prepare(volume_of(labels.astype(np.int16) * 10 + np.int16(5)), config)
    places = np.stack(np.meshgrid(*map(np.arange, found.shape), indexing="ij"), axis=-1).astype(float)
    index = apply_map(prepared.to_source, places)
    clear = (np.abs(index - np.floor(index) - 0.5) > 1e-3).all(axis=-1)
    padded = np.pad(labels, ((1, 1), (0, 0), (0, 0)))
    nearest = np.rint(index).astype(int) + (1, 0, 0)
    assert clear.sum() > 400
    np.testing.assert_array_equal(found[clear], padded[tuple(nearest[clear].T)])


def test_same_grid_compares_places_not_storage(tmp_path: Path) -> None:
    config = VolumeConfig(crop=(4, 4, 4))
    one, other = (
        prepare(read_volume(save_nifti(tmp_path / f"{n}.nii", scan(), axes=axes)), config)
        for n, axes in enumerate([(2, 1, 0), (0, 2, 1)])
    )
    moved = prepare(read_volume(save_nifti(tmp_path / "m.nii", scan(), spacing=(3, 2, 1.7))), config)
    assert same_grid(one, other) and not same_grid(one, moved)


def test_preparing_leaves_the_volume_alone(tmp_path: Path) -> None:
    volume = read_volume(save_nifti(tmp_path / "x.nii", scan().astype(np.float32)))
    prepare(volume, VolumeConfig(preset="phantom", flip=("W",)))
    np.testing.assert_array_equal(volume.array, scan())
