"""From a scan on the canonical axes to the array that a model sees, with the way back.

Order: resample to millimetres, window to [0, 1], crop or pad (with 0, the window's lower end), resize, flip,
`(x - mean) / std`. Cropping and windowing commute, as the pad value is the window's end.

Values are kept on a grid of 1 / LEVELS between 0 and 1, also where no cache is used, so that a cached volume
and a fresh one are the same to the bit. A step is 0.12 HU for a window of 2,000 HU.

Resampling to millimetres is SimpleITK's (3 to 7 times faster than MONAI's). The rest is MONAI's, which
carries the index map along as the affine of its MetaTensor. MONAI takes seconds to import, hence inside the
functions.
"""

from dataclasses import dataclass

import numpy as np

from mllm3d.config import VolumeConfig
from mllm3d.data.limits import check_size
from mllm3d.data.orientation import corners_mm
from mllm3d.data.volumes import Volume
from mllm3d.errors import UserError

MR_PERCENTILES = (0.5, 99.5)
LEVELS = 2**14 - 1
_AXES = ("D", "H", "W")
_SAME_SPACING = 1e-3  # relative: closer than this, no resampling


@dataclass(frozen=True)
class Prepared:
    """What a model sees of a scan: `array` float32 (D, H, W).

    `to_source` (4, 4) takes (d, h, w, 1) of `array` to the stored index (i, j, k, 1) of the file, an image of
    `source_shape` whose `source_affine` (4, 4) leads to RAS mm.
    """

    array: np.ndarray
    to_source: np.ndarray
    source_shape: tuple[int, int, int]
    source_affine: np.ndarray


@dataclass(frozen=True)
class Compact:
    """A preprocessed scan as the cache keeps it: `array` uint16 (D, H, W), 0 to LEVELS, or uint8 labels."""

    array: np.ndarray
    to_source: np.ndarray
    source_shape: tuple[int, int, int]
    source_affine: np.ndarray


def prepare(volume: Volume, config: VolumeConfig) -> Prepared:
    """Preprocess an image. Raises `UserError` if `config` asks for what this scan doesn't have."""
    return in_model_units(compact(volume, config), config)


def prepare_labels(labels: Volume, config: VolumeConfig) -> np.ndarray:
    """Preprocess a label map: uint8 (D, H, W), nearest neighbour, padded with 0."""
    return compact_labels(labels, config).array


def compact(volume: Volume, config: VolumeConfig) -> Compact:
    """Everything but mean and standard deviation."""
    low, high = _window(volume, config)
    array, index_map = _resample(volume, config, labels=False)
    array, index_map = _to_grid(array, index_map, config, window=(low, high))
    levels = np.rint(array * np.float32(LEVELS)).astype(np.uint16)
    return Compact(levels, index_map, volume.source_shape, volume.source_affine)


def compact_labels(labels: Volume, config: VolumeConfig) -> Compact:
    """A label map on the same grid as the image that it belongs to."""
    array, index_map = _resample(labels, config, labels=True)
    array, index_map = _to_grid(array, index_map, config, window=None)
    return Compact(array.astype(np.uint8), index_map, labels.source_shape, labels.source_affine)


def in_model_units(found: Compact, config: VolumeConfig) -> Prepared:
    """`(x - mean) / std` of the kept values."""
    array = found.array.astype(np.float32)
    array *= np.float32(1 / (LEVELS * config.std))
    array -= np.float32(config.mean / config.std)
    return Prepared(array, found.to_source, found.source_shape, found.source_affine)


def for_modality(config: VolumeConfig, modality: str) -> VolumeConfig:
    """The preprocessing of a scan of this modality: MR has no HU, so a window in HU becomes one by percentiles."""
    if modality == "MR" and config.window_percentile is None:
        return config.model_copy(update={"window_percentile": MR_PERCENTILES})
    return config


def _window(volume: Volume, config: VolumeConfig) -> tuple[float, float]:
    """Lower and upper end in the file's values; percentiles are those of the stored voxels."""
    if config.window_percentile is None:
        return config.window_hu
    low, high = (float(end) for end in np.percentile(volume.array, config.window_percentile))
    if low >= high:
        raise UserError(
            f"{volume.path}: percentiles {config.window_percentile} are both {low:g}; widen volume.window_percentile"
        )
    return low, high


def _resample(volume: Volume, config: VolumeConfig, labels: bool) -> tuple[np.ndarray, np.ndarray]:
    """The array at `config.spacing_mm`, and its map to the stored index. The middle stays where it is."""
    if config.spacing_mm is None:
        return volume.array, volume.to_source
    if not volume.has_spacing:
        raise UserError(
            f"{volume.path}: a .npy file has no voxel spacing to resample from; "
            "store it as NIfTI, or set volume.spacing_mm: null"
        )
    old, new = np.array(volume.spacing_mm), np.array(config.spacing_mm)
    if np.allclose(old, new, rtol=_SAME_SPACING):
        return volume.array, volume.to_source
    old_shape = np.array(volume.array.shape)
    shape = np.maximum(1, np.rint(old_shape * old / new)).astype(int)
    check_size(volume.path, shape.tolist(), itemsize=4)
    scale = new / old
    offset = ((old_shape - 1) - (shape - 1) * scale) / 2
    step = np.eye(4)
    step[:3, :3] = np.diag(scale)
    step[:3, 3] = offset
    return _resample_grid(volume.array, shape, scale, offset, labels), volume.to_source @ step


def _resample_grid(
    array: np.ndarray, shape: np.ndarray, scale: np.ndarray, offset: np.ndarray, labels: bool
) -> np.ndarray:
    """Values at old index `offset + scale * n`, n < `shape`, all (D, H, W); the border extends outward."""
    import SimpleITK as sitk

    resampler = sitk.ResampleImageFilter()
    resampler.SetInterpolator(sitk.sitkNearestNeighbor if labels else sitk.sitkLinear)
    resampler.SetUseNearestNeighborExtrapolator(True)
    resampler.SetSize(shape[::-1].tolist())
    resampler.SetOutputSpacing(scale[::-1].tolist())
    resampler.SetOutputOrigin(offset[::-1].tolist())
    image = sitk.GetImageFromArray(array if labels else array.astype(np.float32, copy=False))
    return np.asarray(sitk.GetArrayFromImage(resampler.Execute(image)))


def _to_grid(
    array: np.ndarray, index_map: np.ndarray, config: VolumeConfig, window: tuple[float, float] | None
) -> tuple[np.ndarray, np.ndarray]:
    """Window (None: a label map), crop or pad, resize, flip: float32 (D, H, W) and the map from its index."""
    import torch
    from monai.data import MetaTensor
    from monai.transforms import Compose, Flip, ResizeWithPadOrCrop, ScaleIntensityRange

    steps: list[object] = []
    if window is not None:
        steps.append(ScaleIntensityRange(*window, b_min=0.0, b_max=1.0, clip=True))
    if config.crop is not None:
        steps.append(ResizeWithPadOrCrop(config.crop, mode="constant", value=0))
    if config.shape is not None:
        steps.append(_resize(config.shape, labels=window is None))
    if config.flip:
        steps.append(Flip([_AXES.index(axis) for axis in config.flip]))
    image = MetaTensor(torch.from_numpy(np.array(array, dtype=np.float32))[None], affine=torch.from_numpy(index_map))
    result = Compose(steps)(image)
    return np.ascontiguousarray(result.numpy()[0]), result.affine.numpy().astype(np.float64)


def _resize(shape: tuple[int, int, int], labels: bool) -> object:
    """Voxel edges stay aligned (align_corners=False); nearest-exact is the same grid for labels."""
    from monai.transforms import Resize

    return Resize(shape, mode="nearest-exact") if labels else Resize(shape, mode="trilinear", align_corners=False)


def same_grid(a: Compact | Prepared, b: Compact | Prepared, tolerance_mm: float = 0.1) -> bool:
    """Whether two arrays cover the same space: same shape, and corners at the same place in RAS mm."""
    if a.array.shape != b.array.shape:
        return False
    first, second = (corners_mm(grid.array.shape, grid.source_affine @ grid.to_source) for grid in (a, b))
    return bool(np.abs(first - second).max() <= tolerance_mm)
