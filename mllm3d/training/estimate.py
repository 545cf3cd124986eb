"""What a run would take, before it starts: the report of `--dry-run`."""

import math
from dataclasses import dataclass
from typing import NamedTuple

from mllm3d.config import Config, TrainingConfig
from mllm3d.data.manifest import Row, read_manifest, select
from mllm3d.data.samplers import make_groups
from mllm3d.training.optim import trainable_and_frozen
from mllm3d.training.recipe import Description, ParameterGroup, Recipe

GIB = 1024**3


class Size(NamedTuple):
    """The training split, and where the numbers come from. groups: encodings of a volume in an epoch.

    volumes: or sets of images, or videos. pixels: whether there are such; only_pixels: whether there are no volumes.
    """

    volumes: int
    questions: int
    groups: int
    source: str
    pixels: bool
    only_pixels: bool

    @property
    def noun(self) -> str:
        return "studies" if self.pixels else "volumes"


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU, without activations."""

    weights: float
    gradients: float
    optimizer: float

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer


def report(config: Config, recipe: Recipe) -> str:
    """Parameters, tokens, memory, steps and hours, built on the meta device: no weights or volumes read."""
    model = recipe.build(meta=True)
    trainable, frozen = trainable_and_frozen(model)
    described = recipe.describe()
    size = data_size(config, recipe)
    lines = [
        ("recipe", config.recipe),
        ("parameters", f"{_count(trainable)} trainable, {_count(frozen)} frozen"),
        *_token_lines(config, size, described),
        *_memory_lines(config, recipe.parameter_groups(model), trainable, frozen),
        *_time_lines(config, size, described.get("flops_per_volume")),
    ]
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:<{width}}  {text}" for name, text in lines)


def data_size(config: Config, recipe: Recipe) -> Size | None:
    """From the manifest if it is there, else from data.expected; None without both."""
    data = config.data
    if data.manifest.is_file():
        rows = select(read_manifest(data.manifest), data.train_split, data.where, data.limit_volumes)
        recipe.check_rows(rows)
        return _counted(rows, data.questions_per_volume, str(data.manifest))
    if data.expected is None:
        return None
    volumes, questions = data.expected.volumes, data.expected.questions
    # As if every volume had the same number of questions.
    groups = min(questions, volumes * math.ceil(questions / volumes / data.questions_per_volume))
    source, pixels = f"data.expected, because {data.manifest} is not there yet", not config.prepares_volumes
    return Size(volumes, questions, groups, source, pixels, pixels)


def _counted(rows: list[Row], questions_per_volume: int, source: str) -> Size:
    groups = len(make_groups(rows, questions_per_volume, seed=0, epoch=0))
    pixels, only_pixels = any(row.has_pixels for row in rows), all(row.volume is None for row in rows)
    return Size(len({row.study for row in rows}), len(rows), groups, source, pixels, only_pixels)


def count_steps(training: TrainingConfig, batches_per_epoch: int) -> int:
    """Optimizer steps of a run. The last one may reach into the next epoch, so that it is a full one."""
    by_epochs = math.inf
    if training.epochs is not None:
        by_epochs = math.ceil(training.epochs * batches_per_epoch / training.accumulation)
    return int(min(by_epochs, training.max_steps or math.inf))


def memory(training: TrainingConfig, gpus: int, trainable: int, frozen: int, muon: int = 0) -> Memory:
    """Bytes per GPU under the ZeRO stage (ZeRO, Rajbhandari et al. 2020, 3.1), as DeepSpeed keeps them.

    Per parameter: its weight (bf16 2, fp32 4); if it trains, its gradient (4; bf16 without ZeRO 2, for only
    ZeRO sums in fp32), an fp32 copy of the weight (not for fp32 without ZeRO) and two moments of 4 (one under
    Muon). Stage 1 divides the optimizer's part by the number of GPUs, stage 2 the gradients too, stage 3 the
    weights too; offload moves the optimizer's part to the host.
    """
    bf16, stage = training.precision == "bf16", training.zero_stage
    copy = 4 if bf16 or stage > 0 else 0
    optimizer = (copy + 8) * trainable - 4 * muon
    gradients = (2 if bf16 and stage == 0 else 4) * trainable
    weights = (2 if bf16 else 4) * (trainable + frozen)
    return Memory(
        weights / (gpus if stage == 3 else 1),
        gradients / (gpus if stage >= 2 else 1),
        0.0 if training.offload == "cpu" else optimizer / (gpus if stage >= 1 else 1),
    )


def _memory_lines(config: Config, groups: list[ParameterGroup], trainable: int, frozen: int) -> list[tuple[str, str]]:
    training, estimate = config.training, config.estimate
    muon = 0
    if training.optimizer.name == "muon":
        muon = sum(p.numel() for group in groups if group.get("use_muon") for p in group["params"])
    need = memory(training, estimate.gpus, trainable, frozen, muon)
    parts = f"weights {_gib(need.weights)} + gradients {_gib(need.gradients)} + optimizer {_gib(need.optimizer)}"
    offload = " (offloaded)" if training.offload == "cpu" else ""
    rest = estimate.memory_gib - need.total / GIB
    fits = (
        f"{rest:.1f} GiB of {estimate.memory_gib:g} left for"
        if rest > 0
        else f"more than {estimate.memory_gib:g}, before"
    )
    return [
        ("memory per GPU", f"{_gib(need.total)} = {parts}{offload}; {fits} activations"),
        ("", f"{estimate.gpus} GPUs, ZeRO stage {training.zero_stage}, {training.precision}"),
    ]


def _token_lines(config: Config, size: Size | None, described: Description) -> list[tuple[str, str]]:
    """Of what the data has: volumes, images (and videos), or both."""
    lines = []
    if config.prepares_volumes if size is None else not size.only_pixels:
        tokens = described.get("tokens_per_volume")
        text = f"{tokens:,}" if tokens else "differ: volume.shape and volume.crop are not set"
        lines.append(("tokens per volume", text))
    if not config.prepares_volumes if size is None else size.pixels:
        most = described.get("most_tokens_per_image")
        text = f"at most {most:,}; of a video for each slab of frames" if most else "unknown: the recipe does not say"
        lines.append(("tokens per image", text))
    return lines


def _time_lines(config: Config, size: Size | None, flops_per_volume: float | None) -> list[tuple[str, str]]:
    training, estimate = config.training, config.estimate
    per_step = training.volumes_per_batch * training.accumulation * estimate.gpus
    if size is None:
        unknown = f"unknown: {config.data.manifest} is not there and data.expected is not given"
        if training.max_steps is None:
            return [("data", unknown), ("steps", "unknown"), ("hours", "unknown")]
        lines, steps = [("data", unknown)], training.max_steps
    else:
        batches = math.ceil(size.groups / (training.volumes_per_batch * estimate.gpus))
        steps = count_steps(training, batches)
        lines = [("data", f"{size.volumes:,} {size.noun}, {size.questions:,} questions ({size.source})")]
    most, noun = per_step * config.data.questions_per_volume, size.noun if size else "volumes"
    lines.append(("steps", f"{steps:,} of {per_step:,} {noun} ({most:,} questions at most)"))
    if size is not None and size.pixels:
        return [*lines, ("hours", "unknown: images and videos differ in size")]
    if flops_per_volume is None:
        return [*lines, ("hours", "unknown: the recipe gives no FLOPs")]
    speed = estimate.gpus * estimate.peak_flops * estimate.mfu
    hours = steps * per_step * flops_per_volume / speed / 3600
    machine = f"{estimate.gpus} GPUs of {estimate.peak_flops / 1e12:g} TFLOPS at {estimate.mfu:.0%}"
    return [*lines, ("hours", f"{hours:.2g} on {machine}; {flops_per_volume / 1e12:.3g} TFLOP per volume")]


def _count(parameters: int) -> str:
    for unit, name in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if parameters >= unit:
            return f"{parameters / unit:.2f} {name} ({parameters:,})"
    return f"{parameters:,}"


def _gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB"
