"""Training from a config and a recipe to a run folder."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from mllm3d.config import Config, TrainingConfig
from mllm3d.data.cache import VolumeCache
from mllm3d.data.dataset import Loaded, Reader, batch_loader
from mllm3d.data.manifest import Row, read_manifest, select
from mllm3d.data.samplers import BatchSchedule
from mllm3d.training import distributed
from mllm3d.training.checkpoint import Checkpoints, Progress, identity
from mllm3d.training.distributed import World
from mllm3d.training.engine import build_engine
from mllm3d.training.estimate import count_steps
from mllm3d.training.features import with_features
from mllm3d.training.logging import MetricsLog
from mllm3d.training.optim import count_trainable, trainable_and_frozen
from mllm3d.training.recipe import Recipe
from mllm3d.training.rundir import open_run
from mllm3d.training.step import train_step
from mllm3d.training.validation import Validation, validation_rows

Evaluate = Callable[[Any, int], float]
"""(DeepSpeed engine, step) -> a value, higher is better. Called by all ranks before each checkpoint; all of
them return the same value. The checkpoint with the best one is kept beside the last."""


def fit(config: Config, recipe: Recipe, resume: bool = False, evaluate: Evaluate | None = None) -> Path:
    """Train, from the start or (`resume`) from the newest checkpoint; the run folder.

    Called on every rank, under `deepspeed`, `torchrun` or `python`. Raises `UserError` for what a user can
    mend.
    """
    training = config.training
    world = distributed.start(config.run.threads)
    run = open_run(config, world, resume)
    rows = training_rows(config, recipe, world)
    schedule = BatchSchedule(
        rows,
        config.data.questions_per_volume,
        training.volumes_per_batch,
        world.rank,
        world.size,
        config.run.seed,
    )
    total_steps = count_steps(training, schedule.batches_per_epoch)
    engine = build_engine(config, recipe, world, total_steps)
    agreement = identity(config, engine.module, world, data_fingerprint(rows))
    checkpoints = Checkpoints(run, config, agreement, world)
    progress = checkpoints.load(engine) if resume else Progress()
    if progress.position is not None:
        schedule.seek(progress.position)
    reader = open_reader(config, recipe, world, rows)
    batches = batch_loader(schedule, reader, recipe.collate, config.data.workers)
    if evaluate is None and config.data.validation_split is not None:
        evaluate = Validation(config, recipe, world, reader, total_steps)
    if resume:
        checkpoints.restore_random_state()

    announce(engine, recipe, run, progress.step, total_steps, world)
    peak = peak_speed(config, recipe, world)
    with MetricsLog(run, world, progress.step, total_steps, training.log_every, peak) as log:
        for step in range(progress.step, total_steps):
            taken = take(batches, training.accumulation, world)
            rates = learning_rates(engine)
            result = train_step(engine, recipe, [loaded.batch for loaded in taken], step, total_steps, world)
            log.add(step + 1, taken[-1].position[0], rates, result)
            if is_save_due(training, step + 1, total_steps):
                log.flush()
                progress = replace(progress, step=step + 1, position=taken[-1].next_position)
                progress = judged(progress, evaluate, engine, training.keep_best)
                checkpoints.save(engine, recipe, progress)
                log.restart_clock()
    world.barrier()
    return run


def announce(engine: Any, recipe: Recipe, run: Path, first_step: int, total_steps: int, world: World) -> None:
    """On rank 0 before the progress bar: which steps follow, and for each of the model's parts whether it trains."""
    trainable, frozen = trainable_and_frozen(engine.module)
    if world.is_main and first_step >= total_steps:
        print(f"{run}: all {total_steps} steps are done; raise training.max_steps or epochs to go on", flush=True)
    elif world.is_main:
        print(
            f"{run}: steps {first_step + 1} to {total_steps}, {trainable:,} parameters train, {frozen:,} are frozen, "
            f"{world.size} rank{'s' if world.size > 1 else ''} on {world.device.type}",
            *part_lines(recipe.parts(engine.module)),
            sep="\n",
            flush=True,
        )


def part_lines(parts: Mapping[str, Sequence[nn.Parameter]]) -> list[str]:
    """Name, parameters, and whether they train; parts without parameters are left out."""
    lines = []
    counted = {name: count_trainable(parameters) for name, parameters in parts.items()}
    counted = {name: sizes for name, sizes in counted.items() if sum(sizes)}
    width = max(map(len, counted), default=0)
    for name, (trainable, frozen) in counted.items():
        state = "frozen" if not trainable else "trains" if not frozen else f"trains, {frozen:,} of them frozen"
        lines.append(f"  {name:<{width}}  {trainable + frozen:>14,}  {state}")
    return lines


def training_rows(config: Config, recipe: Recipe, world: World) -> list[Row]:
    """The manifest's rows to train on."""
    data = config.data
    with world.together():
        rows = select(read_manifest(data.manifest), data.train_split, data.where, data.limit_volumes)
        recipe.check_rows(rows)
    return rows


def open_reader(config: Config, recipe: Recipe, world: World, rows: list[Row]) -> Reader:
    """What reads the run's volumes, or their features, which are computed here if they are not there yet."""
    root = config.data.manifest.parent
    cache = VolumeCache(config.data.cache or root / ".cache")
    reader = Reader(root, cache, config.volume, recipe.wants_volumes, recipe.wants_labels)
    if config.data.validation_split is not None:
        with world.together():
            rows = rows + validation_rows(config)
    return with_features(reader, recipe, world, rows, config.training.precision == "bf16")


def data_fingerprint(rows: list[Row]) -> str:
    """Changes with any row: a sampler position means nothing in other rows."""
    total = hashlib.sha256()
    for row in rows:
        # Runs that began before rows had images and videos go on.
        absent = {name for name in ("images", "video") if getattr(row, name) is None}
        total.update(row.model_dump_json(exclude=absent).encode())
    return total.hexdigest()[:16]


def take(batches: Iterator[Loaded], count: int, world: World) -> list[Loaded]:
    """The micro-batches of one optimizer step. A volume that one rank cannot read stops all of them."""
    with world.together():
        taken = [next(batches) for _ in range(count)]
    return taken


def learning_rates(engine: Any) -> dict[str, float]:
    """Rate of each parameter group in the coming step: `lr`, the first group's, and `lr/<name>`."""
    groups = engine.basic_optimizer.param_groups
    return {"lr": groups[0]["lr"], **{f"lr/{group['name']}": group["lr"] for group in groups}}


def peak_speed(config: Config, recipe: Recipe, world: World) -> float | None:
    """Volumes per second that the ranks' devices would train at their peak; None where that is not known. A CPU has
    no peak unless the config names it."""
    per_volume = recipe.describe().get("flops_per_volume")
    known = config.estimate.peak_tflops is not None or world.device.type == "cuda"
    return world.size * config.estimate.peak_flops / per_volume if per_volume and known else None


def is_save_due(training: TrainingConfig, step: int, total_steps: int) -> bool:
    """At the end, and every `save_every` steps before it."""
    return step == total_steps or (training.save_every is not None and step % training.save_every == 0)


def judged(progress: Progress, evaluate: Evaluate | None, engine: Any, keep: int) -> Progress:
    """Progress with the `keep` best steps so far, where the run is evaluated at all; of equals the earlier wins."""
    if evaluate is None:
        return progress
    engine.eval()
    value = evaluate(engine, progress.step)
    engine.train()
    ranked = sorted([*progress.best, (progress.step, value)], key=lambda item: (-item[1], item[0]))[:keep]
    return replace(progress, best=tuple(ranked), best_step=ranked[0][0], best_value=ranked[0][1])
