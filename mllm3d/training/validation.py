"""The loss on questions that a run does not train on, so that its best checkpoint can be kept."""

from typing import Any

import torch

from mllm3d.config import Config
from mllm3d.data.dataset import Reader
from mllm3d.data.manifest import Row, read_manifest, select
from mllm3d.data.samplers import batches_for_rank, make_groups
from mllm3d.training.distributed import World
from mllm3d.training.recipe import Recipe, to_device


class Validation:
    """Minus the mean loss over `data.validation_split`: higher is better. Called by all ranks together.

    The batches are the same every time. As in training, groups may come twice so that all ranks have as many.
    """

    def __init__(self, config: Config, recipe: Recipe, world: World, reader: Reader, total_steps: int) -> None:
        data = config.data
        self.recipe, self.world, self.reader, self.total_steps = recipe, world, reader, total_steps
        with world.together():
            self.rows = validation_rows(config)
            recipe.check_rows(self.rows)
        groups = make_groups(self.rows, data.questions_per_volume, config.run.seed, epoch=0)
        size = config.training.volumes_per_batch
        self.batches = batches_for_rank(groups, size, world.rank, world.size, config.run.seed, epoch=0)

    def __call__(self, engine: Any, step: int) -> float:
        sums: dict[str, float] = {}
        counts: dict[str, float] = {}
        for groups in self.batches:
            with self.world.together():
                items = [self.reader.load(group, self.rows) for group in groups]
                batch = self.recipe.collate(items)
            counted = self.recipe.counts(batch)
            weights = dict.fromkeys(counted, 1.0)  # nothing is differentiated
            with torch.no_grad():
                moved = to_device(batch, self.world.device)
                output = self.recipe.losses(engine, moved, step, self.total_steps, weights)
            for name, term in output.terms.items():
                sums[name] = sums.get(name, 0.0) + float(term.value)
                counts[name] = counts.get(name, 0.0) + counted[term.per]
        names = sorted(sums)
        totals = self.world.sum(torch.tensor([[sums[name], counts[name]] for name in names], dtype=torch.float64))
        loss = float((totals[:, 0] / totals[:, 1]).sum())
        if self.world.is_main:
            print(f"\nstep {step}: validation loss {loss:.4f}", flush=True)
        return -loss


def validation_rows(config: Config) -> list[Row]:
    """The manifest's rows of `data.validation_split`."""
    data = config.data
    assert data.validation_split is not None
    return select(read_manifest(data.manifest), data.validation_split, data.where, data.validation_volumes)
