"""What pruning a slice-wise model saves, and what choosing costs: every method of `medpruner` on one backbone shape.

    python benchmarks/pruners.py --volume CT.nii.gz          a file's slices as a video, and none drawn
    python benchmarks/pruners.py                             a phantom, on the CPU
    python benchmarks/pruners.py --device cuda               Qwen2.5-VL 3B's shape with random weights in bfloat16
    python benchmarks/pruners.py --quick                     whether the program works; its ratios say nothing

The model is a Qwen2.5-VL with random weights; on the CPU a small one, whose vision tower and language model take about
equal shares of a prefill, as the 3B model's do. A volume's slices are the frames of a video, so that what the tower
encodes apart, a slice here, are two of them. Settings are the published ones, but that attention of random weights is
nearly flat: what MedPruner's nucleus keeps is about tau. Its slice filter is also run with the gamma at which the share
--drop of the slices goes, before the tower and in the published order, which encodes all of them first.

Seconds are split into the tower (its forward pass, without reading attention), the pruner (all else until it is known
what stays: comparing slices, reading attention, choosing, merging, sorting), the prefill (building the shorter prompt
and the language model until the first token) and further tokens. On the CPU they are seconds of this process. Rows run
in turn, round after round; interrupted (Ctrl-C), the program shows the rounds that it finished. ``--out`` keeps the
single times.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from measuring import Part, clocked, machine, now, peak_bytes, quartiles, show_table
from torch import Tensor
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, StoppingCriteria, StoppingCriteriaList

import medpruner
from medpruner import HiPrune, HuluL1, MedPruner, PruningSettings, Random, Uniform, VisionZip
from medpruner.slice_filter import kept_slices
from mllm3d.config import VolumeConfig
from mllm3d.data.preprocess import prepare as prepare_volume
from mllm3d.data.volumes import read_volume
from mllm3d.errors import UserError
from photon.configuration_photon import BACKBONES
from photon.geometry import PatchGeometry
from photon.patch_embedding import patchify, usual_pixels

ROOT = Path(__file__).resolve().parents[1]
BACKBONE = "Qwen/Qwen2.5-VL-3B-Instruct"
GAMMA = 0.05
WINDOW = (-160.0, 240.0)
"""HU, soft tissue."""
TOWER, PRUNER, PREFILL, TOKENS, WHOLE = PHASES = ("tower", "pruner", "prefill", "further tokens", "together")
TEXT_BEFORE, TEXT_AFTER = 8, 48
OVERHEAD, LESS = 0.03, 0.1
"""Goals: the pruner takes less of the tower's time; filtering first saves the share of dropped slices but a tenth."""


@dataclass(frozen=True)
class Row:
    """A row of the table; settings: None runs the model as it is."""

    name: str
    title: str
    settings: PruningSettings | None


def rows(gamma: float, drop: float) -> list[Row]:
    """All methods; gamma: at which about the share `drop` of the slices goes."""
    dropping = f"MedPruner, gamma {gamma:.3g}"
    return [
        Row("unpruned", "unpruned", None),
        Row("medpruner", f"MedPruner, gamma {GAMMA:g}", MedPruner(gamma=GAMMA)),
        Row("filtering", f"{dropping} ({drop:.0%} of the slices go)", MedPruner(gamma=gamma)),
        Row("published", f"{dropping}, published order", MedPruner(gamma=gamma, encode_dropped=True)),
        Row("visionzip", "VisionZip, 65 % + 5 %", VisionZip()),
        Row("hiprune", "HiPrune, 22.3 %", HiPrune()),
        Row("hulu_l1", "Hulu-L1, 0.1", HuluL1()),
        Row("uniform", "uniform slices, 50 %", Uniform()),
        Row("random", "random tokens, 50 %", Random()),
    ]


# --- model and input ----------------------------------------------------------------------------------------------


def small_config(width: int = 512, layers: int = 10, vision_width: int = 256, depth: int = 16) -> Qwen2_5_VLConfig:
    """For the CPU; heads are 64 wide, every fourth block of the tower attends to a whole slice."""
    text = {
        "vocab_size": 2048, "hidden_size": width, "intermediate_size": round(5.375 * width),
        "num_hidden_layers": layers, "num_attention_heads": width // 64, "num_key_value_heads": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]},
    }  # fmt: skip
    vision = {
        "depth": depth, "hidden_size": vision_width, "intermediate_size": round(2.67 * vision_width),
        "num_heads": vision_width // 64, "out_hidden_size": width, "window_size": 112, "tokens_per_second": 2,
        "fullatt_block_indexes": list(range(3, depth, 4)),
    }  # fmt: skip
    ids = {
        "video_token_id": 1, "image_token_id": 0, "vision_start_token_id": 2, "vision_end_token_id": 3,
        "tie_word_embeddings": True,
    }  # fmt: skip
    return Qwen2_5_VLConfig(text_config={**text, **SPECIAL}, vision_config=vision, **ids)


SPECIAL = {"bos_token_id": None, "eos_token_id": 4, "pad_token_id": 5}


def full_config() -> Qwen2_5_VLConfig:
    """The 3B model's shape."""
    values = BACKBONES[BACKBONE]
    text, vision = ({k: v for k, v in values[key].items() if k != "model_type"} for key in KEYS)
    return Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=values["tie_word_embeddings"])


KEYS = ("text_config", "vision_config")


@dataclass(frozen=True)
class Scan:
    """A volume as the model gets it.

    Attributes:
        pixels: normalised patches of all slices. grid: (t, h, w) of them. slices: (t, ...) the same, slice by slice.
    """

    name: str
    pixels: Tensor
    grid: tuple[int, int, int]

    @property
    def slices(self) -> Tensor:
        return self.pixels.unflatten(0, (self.grid[0], -1)).flatten(1)


def read_scan(path: Path, slices: int | None, size: int, config: Qwen2_5_VLConfig) -> Scan:
    """A file's slices in a soft-tissue window, `size` pixels wide and high, on the backbone's own pixel scale."""
    volume = read_volume(path)
    shape = (slices or volume.array.shape[0], size, size)
    grey = torch.from_numpy(prepare_volume(volume, VolumeConfig(window_hu=WINDOW, shape=shape)).array)
    scales = usual_pixels(3)
    frames = torch.stack([(grey - scale.mean) / scale.std for scale in scales])
    vision = config.vision_config
    patch_size = (vision.temporal_patch_size, vision.patch_size, vision.patch_size)
    pixels, grid = patchify(frames, PatchGeometry(patch_size, 3, vision.spatial_merge_size))
    return Scan(path.name, pixels, grid)


def draw_phantom(folder: Path, slices: int, size: int) -> Path:
    """A phantom of this shape."""
    shape = f"{slices},{size},{size}"
    drawn = ("--cases", "1", "--seed", "0", "--shape", shape, "--splits", "0,0,1", "--priors", "0", "--workers", "1")
    command = [sys.executable, str(ROOT / "data/phantom/prepare.py"), "--out", str(folder / "data"), *drawn]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"data/phantom/prepare.py failed: {done.stderr.strip()}")
    return next((folder / "data" / "volumes").iterdir()).rename(folder / "phantom.nii.gz")


def bisected(
    measured: Callable[[float], float], goal: float, low: float, high: float, steps: int = 14
) -> tuple[float, float]:
    """Where a rising or falling measure is nearest to a goal, of the places that a bisection tries, and what it is."""
    tried = [(place, measured(place)) for place in (low, high)]
    rising = tried[1][1] >= tried[0][1]
    for _ in range(steps):
        middle = (low + high) / 2
        tried.append((middle, measured(middle)))
        low, high = (middle, high) if (tried[-1][1] < goal) == rising else (low, middle)
    return min(tried, key=lambda found: abs(found[1] - goal))


def dropped_share(slices: Tensor, gamma: float) -> float:
    """Share of the slices that the filter drops."""
    return 1 - float(kept_slices(slices, gamma).float().mean())


class Subject:
    """One model and one scan."""

    def __init__(self, config: Qwen2_5_VLConfig, scan: Scan, device: torch.device, dtype: torch.dtype) -> None:
        self.scan, self.device = scan, device
        with torch.device(device), torch.random.fork_rng():
            torch.manual_seed(0)
            made: Any = Qwen2_5_VLForConditionalGeneration._from_config(config, dtype=dtype)
        self.model = made.eval()
        self.inputs = {name: value.to(device) for name, value in self._inputs(config).items()}

    @property
    def tokens(self) -> int:
        """Visual tokens."""
        t, h, w = self.scan.grid
        return t * h * w // self.model.model.visual.spatial_merge_size**2

    def _inputs(self, config: Qwen2_5_VLConfig) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(0)
        low, high = 10, 1000  # no special tokens
        before, after = (torch.randint(low, high, (n,), generator=generator) for n in (TEXT_BEFORE, TEXT_AFTER))
        start, video, end = (
            torch.tensor([getattr(config, f"{name}_token_id")]) for name in ("vision_start", "video", "vision_end")
        )
        count = self.scan.grid[0] * self.scan.grid[1] * self.scan.grid[2] // config.vision_config.spatial_merge_size**2
        ids = torch.cat([before, start, video.expand(count), end, after])[None]
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "mm_token_type_ids": 2 * (ids == config.video_token_id).int(),
            "pixel_values_videos": self.scan.pixels,
            "video_grid_thw": torch.tensor([self.scan.grid]),
        }

    def generate(self, tokens: int) -> list[float]:
        """So many tokens; seconds from the start until each was there."""
        clock = TokenClock(self.device)
        # Nothing ends an answer, and no placeholder is written.
        banned = [self.model.config.video_token_id, self.model.config.image_token_id]
        self.model.generate(
            **self.inputs, max_new_tokens=tokens, do_sample=False, eos_token_id=None, suppress_tokens=banned,
            stopping_criteria=StoppingCriteriaList([clock]),
        )  # fmt: skip
        return clock.times

    @contextmanager
    def pruning(self, row: Row) -> Iterator[None]:
        """The model as a row has it."""
        if row.settings is None:
            yield
            return
        medpruner.attach(self.model, row.settings)
        try:
            yield
        finally:
            medpruner.detach(self.model)


class TokenClock(StoppingCriteria):
    """Notes when each token was there; never stops."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.start = device, now(device)
        self.times: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.times.append(now(self.device) - self.start)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


# --- measuring ----------------------------------------------------------------------------------------------------


@dataclass
class Found:
    """What was measured of a row.

    Attributes:
        seconds: of each round, by phase. peak: bytes of the prefill above weights and input. slices, tokens: how many
            stayed. slice_rate: share of the slices.
    """

    seconds: dict[str, list[float]] = field(default_factory=lambda: {phase: [] for phase in PHASES})
    peak: int = 0
    slices: int = 0
    tokens: int = 0
    slice_rate: float = 1.0

    def median(self, phase: str) -> float:
        return statistics.median(self.seconds[phase])

    def overhead(self) -> float:
        """The pruner's seconds over the tower's: median of the rounds."""
        pairs = zip(self.seconds[PRUNER], self.seconds[TOWER], strict=True)
        return statistics.median(pruner / tower for pruner, tower in pairs)


def measure_once(subject: Subject, tokens: int) -> dict[str, float]:
    """Seconds of one answer by phase, the model pruning or not."""
    pruner = getattr(subject.model, "medpruner", None)
    parts = [Part(subject.model.model.visual, "forward", "visual")]
    if pruner is not None:
        parts.append(Part(pruner.backbone, "encode", "encode"))
    with (
        clocked(parts, subject.device) as spent,
        patch("medpruner.pruner.clock", now),
        patch("medpruner.towers.clock", now),
    ):
        times = subject.generate(1 + tokens)
    tower, of_pruner = spent["visual"], 0.0
    if pruner is not None:
        told = pruner.report.seconds
        reading = spent["encode"] - told["tower"]
        tower -= reading
        of_pruner = told["pruner"] + told["tower"] - tower
    first, whole = times[0], times[-1]
    return dict(zip(PHASES, (tower, of_pruner, first - tower - of_pruner, whole - first, whole), strict=True))


def start(subject: Subject, row: Row) -> Found:
    """Peak memory and what stays, which warms a row up as well."""
    found = Found(slices=subject.scan.grid[0], tokens=subject.tokens)
    with subject.pruning(row):
        if subject.device.type == "cuda":  # kernels that are compiled or chosen at their first call
            subject.generate(2)
        found.peak = peak_bytes(lambda: subject.generate(1), subject.device)
        if row.settings is not None:
            report = subject.model.medpruner.report
            found.tokens = sum(int(volume.tokens.sum()) for volume in report.volumes)
            found.slices = sum(int(volume.tokens.any(1).sum()) for volume in report.volumes)
            found.slice_rate = report.slice_rate
    return found


def measure(subject: Subject, chosen: Sequence[Row], rounds: int, tokens: int) -> dict[str, Found]:
    """All rows in turn, round after round; interrupted, the rounds that were finished."""
    found = {row.name: start(subject, row) for row in chosen}
    for number in range(rounds):
        taken: dict[str, dict[str, float]] = {}
        try:
            for row in chosen:
                with subject.pruning(row):
                    taken[row.name] = measure_once(subject, tokens)
        except KeyboardInterrupt:
            if not number:
                raise
            print(f"interrupted: {number} of {rounds} rounds")
            break
        for name, seconds in taken.items():
            for phase in PHASES:
                found[name].seconds[phase].append(seconds[phase])
    return found


# --- tables -------------------------------------------------------------------------------------------------------


def time_rows(chosen: Sequence[Row], found: dict[str, Found], total: int) -> list[list[str]]:
    """Tokens, and seconds by phase with their quartiles."""
    lines = []
    for row in chosen:
        of = found[row.name]
        cells = [f"{of.slices:,}", f"{of.tokens:,}", f"{of.tokens / total:.1%}"]
        for phase in PHASES:
            low, high = quartiles(of.seconds[phase])
            cells.append(f"{of.median(phase):.3f} ({low:.3f}-{high:.3f})")
        lines.append([row.title, *cells])
    return lines


def ratio_rows(chosen: Sequence[Row], found: dict[str, Found]) -> list[list[str]]:
    """Medians over those of the unpruned model, peak memory, and the pruner's share of the tower."""
    base = found["unpruned"]
    lines = []
    for row in chosen:
        of = found[row.name]
        shares = [of.median(phase) / base.median(phase) for phase in (TOWER, PREFILL, TOKENS, WHOLE)]
        peak = [f"{of.peak / 1e6:,.0f}", f"{of.peak / base.peak:.2f}"]
        overhead = "" if row.settings is None else f"{of.overhead():.2%}"
        lines.append([row.title, *(f"{share:.2f}" for share in shares), *peak, overhead])
    return lines


@dataclass(frozen=True)
class Goal:
    """A figure that was asked for, and what came out."""

    what: str
    wanted: str
    measured: str
    met: bool

    @property
    def text(self) -> str:
        return f"{self.what}: {self.measured} (goal {self.wanted}): {'met' if self.met else 'missed'}"


def goals(found: dict[str, Found]) -> list[Goal]:
    """The pruner's overhead; what filtering before the tower saves of the published order's tower and pruner."""
    checked = []
    for name in ("medpruner", "filtering"):
        if name in found:
            share = found[name].overhead()
            checked.append(
                Goal(f"pruner over tower ({name})", f"below {OVERHEAD:.0%}", f"{share:.2%}", share < OVERHEAD)
            )
    if {"filtering", "published"} <= found.keys():
        first, after = (
            [t + p for t, p in zip(found[n].seconds[TOWER], found[n].seconds[PRUNER], strict=True)]
            for n in ("filtering", "published")
        )
        saved = statistics.median(1 - a / b for a, b in zip(first, after, strict=True))
        dropped = 1 - found["filtering"].slice_rate
        wanted = (1 - LESS) * dropped
        text = f"{dropped:.1%} of the slices dropped, {saved:.1%} of the time saved"
        what = "filtering before the tower, against the published order"
        checked.append(Goal(what, f"at least {wanted:.1%}", text, saved >= wanted))
    return checked


def show(subject: Subject, chosen: Sequence[Row], found: dict[str, Found], tokens: int) -> None:
    """Print what was measured of one scan."""
    name, (t, h, w) = subject.scan.name, subject.scan.grid
    title = f"{name}: {t} slices of {subject.tokens // t} tokens ({h} x {w} patches); seconds (quartiles)"
    header = ["", "slices", "tokens", "kept", *(f"{tokens} tokens" if p == TOKENS else p for p in PHASES)]
    show_table(title, header, time_rows(chosen, found, subject.tokens))
    if "unpruned" in found:
        header = ["", TOWER, PREFILL, f"{tokens} tokens", WHOLE, "peak MB", "of unpruned", "pruner of tower"]
        show_table(f"{name}: medians over unpruned", header, ratio_rows(chosen, found))
    print()
    for goal in goals(found):
        print(f"{name}: {goal.text}")


# --- the program --------------------------------------------------------------------------------------------------


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add = parser.add_argument
    add("--volume", type=Path, action="append", metavar="FILE", help="a CT; several times; default: a phantom is drawn")
    add("--device", choices=["cpu", "cuda"], default="cpu", help="cuda: the 3B model's shape")
    add("--slices", type=int, help="resample to so many slices; default: the file's own, 112 of a phantom")
    add("--size", type=int, default=168, help="rows and columns of a slice (default 168)")
    add("--rounds", type=int, default=3, help="times that each row runs (default 3)")
    add("--tokens", type=int, default=64, help="further tokens (default 64)")
    add("--drop", type=float, default=0.4, help="share of the slices that a second gamma drops (default 0.4)")
    add("--rows", nargs="+", metavar="ROW", help=f"only these: {', '.join(row.name for row in rows(0, 0))}")
    add("--quick", action="store_true", help="a tiny model, few slices, one round, few tokens")
    add("--out", type=Path, help="a JSON file for all that was measured")
    args = parser.parse_args()
    unknown = set(args.rows or ()) - {row.name for row in rows(0, 0)}
    if unknown:
        parser.error(f"--rows: no {', '.join(sorted(unknown))}; there are {', '.join(r.name for r in rows(0, 0))}")
    if min(args.size, args.rounds, args.tokens, args.slices or 1) < 1 or not 0 < args.drop < 1:
        parser.error("--slices, --size, --rounds, --tokens: at least 1; --drop: between 0 and 1")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device: no GPU that torch can use; take cpu")
    if args.quick:
        args.slices, args.size, args.rounds, args.tokens = 20, 56, 1, 3
    return args


def main() -> None:
    args = arguments()
    device, dtype, config = torch.device(args.device), torch.float32, small_config()
    if device.type == "cpu":
        torch.set_num_threads(1)
    else:
        dtype, config = torch.bfloat16, full_config()
    if args.quick:
        config = small_config(64, 2, 64, 4)
    kept: dict[str, Any] = {"machine": machine(device), "config": config.to_dict(), "scans": {}}
    with tempfile.TemporaryDirectory() as folder:
        files = args.volume or [draw_phantom(Path(folder), args.slices or 112, args.size)]
        try:
            scans = [read_scan(path, args.slices, args.size, config) for path in files]
        except UserError as error:
            raise SystemExit(f"--volume: {error}") from error
    for number, scan in enumerate(scans):
        if not number:
            print(heading(config, device, dtype, args.rounds))
        slices = scan.slices
        most = float((slices.amax(0) - slices.amin(0)).mean())
        gamma, dropped = bisected(partial(dropped_share, slices), args.drop, 0.0, most, 24)
        fixed = dropped_share(slices, GAMMA)
        print(f"\n{scan.name}: gamma {GAMMA:g} drops {fixed:.1%} of the slices, gamma {gamma:.3g} {dropped:.1%}")
        chosen = [row for row in rows(gamma, dropped) if args.rows is None or row.name in args.rows]
        subject = Subject(config, scan, device, dtype)
        found = measure(subject, chosen, args.rounds, args.tokens)
        show(subject, chosen, found, args.tokens)
        of_scan = {name: asdict(value) for name, value in found.items()}
        kept["scans"][scan.name] = {"grid": scan.grid, "dropped": {GAMMA: fixed, gamma: dropped}, "rows": of_scan}
    if args.out:
        args.out.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


def heading(config: Qwen2_5_VLConfig, device: torch.device, dtype: torch.dtype, rounds: int) -> str:
    """Machine and model."""
    text, vision = config.text_config, config.vision_config
    return (
        f"{machine(device)}, {dtype}, {rounds} rounds\n"
        f"tower: {vision.depth} blocks of width {vision.hidden_size}; "
        f"language model: {text.num_hidden_layers} layers of width {text.hidden_size}"
    )


if __name__ == "__main__":
    main()
