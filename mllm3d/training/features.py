"""Features of a frozen encoder, computed before the first step wherever they are not there yet."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from tqdm import tqdm

from mllm3d.data.dataset import Reader
from mllm3d.data.features import FeatureCache
from mllm3d.data.manifest import Row, volume_path
from mllm3d.data.preprocess import for_modality
from mllm3d.training.distributed import World
from mllm3d.training.recipe import FrozenEncoder, Recipe


def with_features(reader: Reader, recipe: Recipe, world: World, rows: Sequence[Row], half: bool) -> Reader:
    """A reader of features, if the recipe has a frozen encoder; the ranks share the volumes that it has not seen.

    half: compute them in bfloat16, as training would.
    """
    with world.together():
        encoder = recipe.frozen_encoder()
    if encoder is None:
        return reader
    # Training draws the same numbers whether features were there already or not.
    with torch.random.fork_rng([world.device] if world.device.type == "cuda" else []):
        return replace(reader, features=_completed(encoder, reader, world, rows, half))


def _completed(encoder: FrozenEncoder, reader: Reader, world: World, rows: Sequence[Row], half: bool) -> FeatureCache:
    """The cache, with the features of all the rows' volumes."""
    dtype = torch.bfloat16 if half else torch.float32
    module = encoder.module.to(world.device, dtype).eval()
    features = FeatureCache(reader.cache, f"{encoder.identity}-{dtype}")
    scans = ((path, row.modality) for row in rows for path in (row.prior, row.volume) if path is not None)
    wanted = [
        (volume_path(reader.root, path), for_modality(reader.config, kind)) for path, kind in dict.fromkeys(scans)
    ]
    with world.together():  # each rank looks at its share alone, so that no rank waits for another's disk
        missing = [pair for pair in wanted[world.rank :: world.size] if not features.has(*pair)]
        bar = tqdm(missing, desc="frozen features", unit="volume", disable=not (world.is_main and missing))
        for path, config in bar:
            volume = torch.from_numpy(reader.cache.get(path, config).array).to(world.device, dtype)
            with torch.inference_mode():
                features.put(path, config, encoder.encode(module, volume))
    return features
