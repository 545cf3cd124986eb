"""What keeping a frozen encoder's features on disk saves of the training steps of Med3DVLM's second stage.

    python benchmarks/med3dvlm_speed.py                      DCFormer-S, a small language model, one core: minutes
    python benchmarks/med3dvlm_speed.py --device cuda        Qwen2.5-7B's shape with random weights, bfloat16
    python benchmarks/med3dvlm_speed.py --quick              whether the program works; its ratios say nothing

`configs/med3dvlm_projector.yaml` trains on phantoms of the encoder's size, by the trainer's own steps: reading,
collating, forward, backward and optimizer. Rows differ in K, the questions that share a volume in a step, and in
`model.cache_features`. Both rows of one K read the same batches; all rows run in turn, round after round, and train one
model. Reading is done by the process that trains (`data.workers` 0); other workers may do it beside the step. Files are
in the system's memory, as they have just been written.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from measuring import Part, clocked, machine, quartiles, seconds, show_table
from transformers import AutoConfig, AutoModelForCausalLM

from med3dvlm.configuration_med3dvlm import QWEN_7B
from med3dvlm.encoders import NAMES
from med3dvlm.recipes.language import LanguageRecipe
from med3dvlm.recipes.text import byte_pairs
from mllm3d.config import Config, load
from mllm3d.data.cache import VolumeCache
from mllm3d.data.dataset import Loaded, Reader, batch_loader
from mllm3d.data.manifest import Row, read_manifest, volume_path, write_manifest
from mllm3d.data.preprocess import compact
from mllm3d.data.samplers import BatchSchedule
from mllm3d.data.volumes import read_volume
from mllm3d.registry import recipe_class
from mllm3d.training import distributed
from mllm3d.training.distributed import World
from mllm3d.training.engine import build_engine
from mllm3d.training.recipe import to_device
from mllm3d.training.step import global_counts, train_step
from mllm3d.training.trainer import open_reader, take

ROOT = Path(__file__).resolve().parents[1]
SIZE, QUICK_SIZE = (128, 256, 256), (32, 64, 64)
TASKS = ("report", "plane", "phase", "organ", "abnormality", "location")
"""What the second stage learns from, of phantoms; `existence` fills up where a volume has too few."""
MOST_QUESTIONS = 16
WHOLE, READING, ENCODER, FORWARD, BACKWARD, OPTIMIZER, REST = (
    "step", "reading", "encoder", "projector and language model", "backward", "optimizer", "rest",
)  # fmt: skip
PARTS = (READING, ENCODER, FORWARD, BACKWARD, OPTIMIZER, REST)


@dataclass(frozen=True)
class Work:
    """What all rows do.

    Attributes:
        size: voxels of a volume. volumes: per step. cases: volumes in all. per_volume: questions about each.
        language_model: fields of its configuration.
    """

    encoder: str
    size: tuple[int, int, int]
    volumes: int
    cases: int
    per_volume: int
    mixed_tokens: int
    language_model: dict[str, Any]


@dataclass
class Measured:
    """A row: K questions per volume, with kept features or without. times: seconds of each round by part."""

    questions: int
    kept: bool
    per_step: int
    times: list[dict[str, float]] = field(default_factory=list)

    @property
    def title(self) -> str:
        return f"K = {self.questions}, {'kept features' if self.kept else 'encoder in every step'}"

    def of(self, part: str) -> list[float]:
        """Seconds of each round."""
        return [times.get(part, 0.0) for times in self.times]

    def median(self, part: str = WHOLE) -> float:
        return statistics.median(self.of(part))


@dataclass(frozen=True)
class Stored:
    """Of one volume on average: seconds to prepare it and to compute its features, bytes and numbers of both."""

    prepare_s: float
    features_s: float
    volume_bytes: float
    features_bytes: float
    voxels: int
    numbers: int

    def repaid(self, plain: Measured, kept: Measured, volumes: int, per_volume: int) -> tuple[float, float]:
        """After how many encodings of a volume, and after how many passes over the data, its features have saved what
        they took; infinite where they save nothing. A pass encodes a volume once for each K of its questions."""
        saved = (plain.median() - kept.median()) / volumes
        encodings = self.features_s / saved if saved > 0 else math.inf
        return encodings, encodings * plain.questions / per_volume


# --- data and models ----------------------------------------------------------------------------------------------


def draw(folder: Path, work: Work, seed: int = 0) -> list[Row]:
    """Phantoms and questions about them, equally many about each."""
    shape = ",".join(map(str, work.size))
    drawn = ("--cases", str(work.cases), "--seed", str(seed), "--shape", shape, "--tasks", *TASKS, "existence")
    whole = ("--splits", "1,0,0", "--priors", "0", "--workers", "1", "--out", str(folder))
    subprocess.run([sys.executable, str(ROOT / "data/phantom/prepare.py"), *drawn, *whole], check=True)
    by_volume: dict[str | None, list[Row]] = {}
    for row in read_manifest(folder / "manifest.jsonl"):
        by_volume.setdefault(row.volume, []).append(row)
    chosen = [sorted(rows, key=lambda row: row.task == "existence")[: work.per_volume] for rows in by_volume.values()]
    if (fewest := min(map(len, chosen))) < work.per_volume:
        raise SystemExit(f"--questions: {work.per_volume} about each volume, but one has {fewest}; ask for fewer")
    rows = [row for group in chosen for row in group]
    write_manifest(folder / "manifest.jsonl", rows)
    return rows


def save_language_model(folder: Path, work: Work, rows: Sequence[Row], device: torch.device) -> None:
    """A decoder with random weights, and a tokenizer of the rows' words."""
    tokenizer = byte_pairs({text for row in rows for text in (row.question, " " + row.answer)}, 1000, 512)
    tokenizer.save_pretrained(folder)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(**work.language_model),
            dtype=torch.bfloat16 if device.type == "cuda" else torch.float32,
        )
    model.save_pretrained(folder)


def read_config(folder: Path, work: Work, device: torch.device) -> Config:
    """Stage 2 as shipped, on these data and models."""
    changes: dict[str, Any] = {
        "run.threads": 1 if device.type == "cpu" else None,
        "data.manifest": str(folder / "data/manifest.jsonl"),
        "data.where": None,
        "data.workers": 0,
        "volume.shape": list(work.size),
        "model.encoder": work.encoder,
        "model.language_model": str(folder / "decoder"),
        "model.mixed_tokens": work.mixed_tokens,
        "training.volumes_per_batch": work.volumes,
    }
    if device.type == "cpu":  # as the quickstart's
        changes |= {"training.precision": "fp32", "training.zero_stage": 0}
    path = ROOT / "configs/med3dvlm_projector.yaml"
    return load(path, [f"{key}={json.dumps(value)}" for key, value in changes.items()])


# --- what is measured ---------------------------------------------------------------------------------------------


class Bench:
    """One model and the rows that train it.

    total_steps: of the schedule of the learning rate. folder: of data and models.
    """

    def __init__(self, work: Work, questions: Sequence[int], folder: Path, world: World, total_steps: int) -> None:
        self.work, self.world, self.total_steps, self.steps = work, world, total_steps, 0
        rows = draw(folder / "data", work)
        save_language_model(folder / "decoder", work, rows, world.device)
        self.config = read_config(folder, work, world.device)
        recipe = recipe_class(self.config.recipe)(self.config)
        assert isinstance(recipe, LanguageRecipe)
        self.recipe = recipe
        self.engine = build_engine(self.config, recipe, world, total_steps)
        self.stored, self.readers = self._store(rows)
        self.measured = [Measured(k, kept, k * work.volumes) for k in questions for kept in (False, True)]
        self.batches = [self._batches(rows, row) for row in self.measured]

    def _store(self, rows: list[Row]) -> tuple[Stored, dict[bool, Reader]]:
        """Prepare the volumes, then their features as a run does before its first step."""
        config, device = self.config, self.world.device
        root = config.data.manifest.parent
        plain = Reader(root, VolumeCache(root / ".cache"), config.volume)
        paths = [volume_path(root, name) for name in dict.fromkeys(row.volume for row in rows) if name is not None]

        def prepare() -> None:
            for path in paths:
                plain.cache.get(path, config.volume)

        compact(read_volume(paths[0]), config.volume)  # imports libraries
        prepare_s = seconds(prepare, device) / len(paths)
        opened: list[Reader] = []
        module = self.engine.module
        with torch.inference_mode():  # warm
            module.encode(torch.rand(1, 1, *self.work.size, device=device))
        features_s = seconds(lambda: opened.append(open_reader(config, self.recipe, self.world, rows)), device)
        (kept,) = opened
        assert kept.features is not None
        found = kept.features.get(paths[0], config.volume)
        stored = Stored(
            prepare_s, features_s / len(paths), _size(root, "*.b2") / len(paths),
            _size(root, "*.features") / len(paths), math.prod(self.work.size), sum(x.numel() for x in found.values()),
        )  # fmt: skip
        return stored, {True: kept, False: replace(kept, features=None)}

    def _batches(self, rows: list[Row], row: Measured) -> Iterator[Loaded]:
        schedule = BatchSchedule(rows, row.questions, self.work.volumes, seed=self.config.run.seed)
        return batch_loader(schedule, self.readers[row.kept], self.recipe.collate, self.config.data.workers)

    def difference(self) -> float:
        """Of the mean loss of one batch between both rows of each K, the largest, as a share of it."""
        found = []
        for number in range(0, len(self.measured), 2):
            both = []
            for batches in self.batches[number : number + 2]:
                batch = take(batches, 1, self.world)[0].batch
                counts = global_counts(self.recipe, [batch], 0, self.world)
                weights = {name: 1 / count for name, count in counts.items()}
                with torch.no_grad():
                    moved = to_device(batch, self.world.device)
                    output = self.recipe.losses(self.engine.module, moved, 0, self.total_steps, weights)
                both.append(float(output.terms["ce"].value) / counts["label_tokens"])
            found.append(abs(both[1] - both[0]) / both[0])
        return max(found)

    def step(self, row: Measured, batches: Iterator[Loaded]) -> dict[str, float]:
        """Seconds of a training step by part."""
        engine, recipe, device, taken = self.engine, self.recipe, self.world.device, []
        reading = seconds(lambda: taken.extend(take(batches, 1, self.world)), device)
        batch = taken[0].batch
        assert recipe.counts(batch)["questions"] == row.per_step and ("features" in batch) == row.kept
        parts = [
            Part(engine.module, "encode", ENCODER), Part(recipe, "losses", FORWARD),
            Part(engine, "backward", BACKWARD), Part(engine, "step", OPTIMIZER),
        ]  # fmt: skip
        with clocked(parts, device) as spent:
            whole = seconds(
                lambda: train_step(engine, recipe, [batch], self.steps, self.total_steps, self.world), device
            )
        self.steps += 1
        encoder = spent.get(ENCODER, 0.0)
        inside = sum(spent.get(part, 0.0) for part in (FORWARD, BACKWARD, OPTIMIZER))
        own = {FORWARD: spent[FORWARD] - encoder, REST: whole - inside}
        return {WHOLE: reading + whole, READING: reading, ENCODER: encoder, **spent, **own}

    def run(self, rounds: int) -> None:
        """All rows in turn, after a round that is not counted."""
        for number in range(rounds + 1):
            for row, batches in zip(self.measured, self.batches, strict=True):
                try:
                    times = self.step(row, batches)
                except torch.OutOfMemoryError as error:
                    raise SystemExit(f"{row.title}: out of memory; fewer --volumes or --questions") from error
                if number:
                    row.times.append(times)


def _size(root: Path, pattern: str) -> int:
    return sum(file.stat().st_size for file in (root / ".cache").rglob(pattern))


# --- tables -------------------------------------------------------------------------------------------------------


def pairs(measured: Sequence[Measured]) -> Iterator[tuple[Measured, Measured]]:
    """Rows of the same K, without kept features and with them."""
    for plain in measured:
        if not plain.kept:
            yield plain, next(row for row in measured if row.kept and row.questions == plain.questions)


def speed_table(measured: Sequence[Measured]) -> list[list[str]]:
    """Questions a second, seconds a step with quartiles, and the ratio to the row without kept features."""
    lines = []
    for both in pairs(measured):
        for row in both:
            low, high = quartiles(row.of(WHOLE))
            middle = row.median()
            lines.append([
                row.title, f"{row.per_step / middle:.3g}", f"{row.per_step / high:.3g}-{row.per_step / low:.3g}",
                f"{middle:.3g}", f"{low:.3g}-{high:.3g}", f"{both[0].median() / middle:.2f}",
            ])  # fmt: skip
    return lines


def part_table(measured: Sequence[Measured]) -> list[list[str]]:
    """Medians of the parts, in seconds of a step."""
    return [[row.title, *(f"{row.median(part):.3f}" for part in PARTS)] for row in measured]


def stored_table(stored: Stored) -> list[list[str]]:
    """A volume beside its features."""
    return [
        ["prepared volume", f"{stored.voxels:,}", f"{stored.volume_bytes / 1e6:.2f}", f"{stored.prepare_s:.3g}"],
        ["features", f"{stored.numbers:,}", f"{stored.features_bytes / 1e6:.2f}", f"{stored.features_s:.3g}"],
    ]


def repaid_table(measured: Sequence[Measured], stored: Stored, work: Work) -> list[list[str]]:
    """When computing features has paid."""
    lines = []
    for plain, kept in pairs(measured):
        found = stored.repaid(plain, kept, work.volumes, work.per_volume)
        saved = (plain.median() - kept.median()) / work.volumes
        lines.append([f"K = {plain.questions}", f"{saved:.3g}", *(f"{x:.2f}" for x in found)])
    return lines


def show(bench: Bench) -> None:
    """All tables."""
    work, measured, stored = bench.work, bench.measured, bench.stored
    header = ["", "questions per s", "quartiles", "s per step", "quartiles", "times as fast"]
    show_table("Training step", header, speed_table(measured))
    show_table("Where the time goes, s of a step", ["", *PARTS], part_table(measured))
    show_table("On disk, per volume", ["", "numbers", "MB", "s to make"], stored_table(stored))
    title = f"When features have saved what they took, {work.per_volume} questions about each volume"
    header = ["", "s saved per encoding", "encodings of a volume", "passes over the data"]
    show_table(title, header, repaid_table(measured, stored, work))


# --- the program --------------------------------------------------------------------------------------------------


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add = parser.add_argument
    add("--device", choices=["cpu", "cuda"], default="cpu", help="cuda: the paper's language model, bfloat16")
    add("--encoder", choices=[n for n in NAMES if n.startswith("dcformer")], default="dcformer-small")
    add("--size", type=int, nargs=3, metavar=("D", "H", "W"), default=SIZE, help="voxels")
    add("--volumes", type=int, help="per step: default 4, on cuda 16 as in the paper")
    add("--questions", type=int, nargs="+", default=[1, 4, 8], help="K, questions per volume in a step")
    add("--hidden-size", type=int, default=256, help="width of the language model on the CPU, a multiple of 64")
    add("--layers", type=int, default=4, help="layers of the language model on the CPU")
    add("--rounds", type=int, default=5, help="times that each row runs")
    add("--quick", action="store_true", help="tiny models, small volumes, few questions, one round")
    add("--out", type=Path, help="a JSON file for all that was measured")
    args = parser.parse_args()
    args.volumes = args.volumes or (16 if args.device == "cuda" else 4)
    if args.quick:
        args.encoder, args.size, args.volumes, args.rounds = "dcformer-nano", QUICK_SIZE, 2, 1
        args.questions, args.hidden_size, args.layers = [1, 4], 64, 2
    if min(args.rounds, args.volumes, args.layers, args.hidden_size, *args.size, *args.questions) < 1:
        parser.error("--rounds, --volumes, --layers, --hidden-size, --size, --questions: too small; 1 or more")
    if args.hidden_size % 64:
        parser.error(f"--hidden-size: {args.hidden_size} is not a multiple of 64, the width of a head")
    if math.lcm(*args.questions) > MOST_QUESTIONS:
        parser.error(f"--questions: must all divide a number up to {MOST_QUESTIONS}, the questions about a volume")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device: no GPU that torch can use; take cpu")
    return args


def work_of(args: argparse.Namespace) -> Work:
    width, layers = args.hidden_size, args.layers
    small = {
        "model_type": "qwen2", "vocab_size": 1024, "hidden_size": width, "intermediate_size": 3 * width,
        "num_hidden_layers": layers, "num_attention_heads": width // 64, "num_key_value_heads": width // 64,
        "initializer_range": width**-0.5, "tie_word_embeddings": True, "bos_token_id": None, "eos_token_id": 0,
    }  # fmt: skip
    return Work(
        encoder=args.encoder,
        size=tuple(args.size),
        volumes=args.volumes,
        cases=args.volumes * math.ceil(4 / args.volumes),
        per_volume=math.lcm(*args.questions),
        mixed_tokens=16 if args.quick else 256,
        language_model=QWEN_7B if args.device == "cuda" and not args.quick else small,
    )


def heading(bench: Bench, difference: float) -> str:
    """Machine, models and whether both ways compute the same."""
    work, module = bench.work, bench.engine.module
    sizes = {name: sum(p.numel() for p in found) / 1e6 for name, found in module.parts().items()}
    language = sizes["embeddings"] + sizes["language_model"]
    return (
        f"{machine(bench.world.device)}, {bench.config.training.precision}\n"
        f"{work.encoder} ({sizes['encoder']:.1f} M parameters) at {work.size}, projector {sizes['projector']:.1f} M, "
        f"language model {language:,.1f} M\n"
        f"{work.volumes} volumes per step, {work.cases} in all, {work.per_volume} questions about each\n"
        f"largest difference of a loss between both ways: {difference:.1e} of it"
    )


def main() -> None:
    args = arguments()
    if args.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    world = distributed.start(1 if args.device == "cpu" else None)
    with tempfile.TemporaryDirectory() as folder:
        steps = 2 * len(args.questions) * (args.rounds + 1)
        bench = Bench(work_of(args), args.questions, Path(folder), world, steps)
        difference = bench.difference()
        print(heading(bench, difference))
        bench.run(args.rounds)
    show(bench)
    if args.out:
        result = {
            "machine": machine(world.device),
            "work": asdict(bench.work),
            "difference": difference,
            "stored": asdict(bench.stored),
            "rows": [asdict(row) for row in bench.measured],
        }
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
