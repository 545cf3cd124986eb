"""What the fast forms of DCFormer save, beside what memory bandwidth and matrix products allow.

    python benchmarks/med3dvlm_encoder.py                    DCFormer-S at 128 x 256 x 256 on one core: three minutes
    python benchmarks/med3dvlm_encoder.py --device cuda      the same on a GPU
    python benchmarks/med3dvlm_encoder.py --quick            whether the program works; its ratios say nothing

All variants hold the same parameters and run in turn, round after round. The bounds of a part are

- by memory: what it reads and writes at least (its input, its parameters and its output, each once) at the speed of a
  copy, measured in the same run;
- by products: the operations of the form that is run, at the speed of a large matrix product, measured likewise.

The plain form is Conv3d and BatchNorm3d as published. A training step is forward and backward, without an optimizer.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measuring import machine, peak_bytes, seconds, show_table
from torch import Tensor, nn

from med3dvlm.dcformer import VARIANTS, DCFormer
from med3dvlm.decomposed import DecomposedConv3d
from med3dvlm.decomposed_triton import available
from med3dvlm.stem import Stem

SIZE, QUICK_SIZE = (128, 256, 256), (32, 64, 64)
EVAL, TRAINING = "eval", "training"
Run = Callable[[], Any]


@dataclass
class Timed:
    """One thing that is measured.

    Attributes:
        part, mode, form: which. run: does it once. flops, numbers: of the form, and moved at least.
        times: seconds of each round. peak: bytes.
    """

    part: str
    mode: str
    form: str
    run: Run
    flops: float = 0.0
    numbers: float = 0.0
    times: list[float] = field(default_factory=list)
    peak: int = 0

    @property
    def median(self) -> float:
        return statistics.median(self.times)

    @property
    def spread(self) -> str:
        low, *_, high = statistics.quantiles(self.times, n=4) if len(self.times) > 1 else self.times * 2
        return f"{1e3 * low:.4g}-{1e3 * high:.4g}"


@dataclass
class Bounds:
    """What this machine can do: bytes a second of a copy (read and written), operations a second of a product."""

    bandwidth: float
    rate: float

    def memory(self, numbers: float, width: int) -> float:
        return numbers * width / self.bandwidth

    def products(self, flops: float) -> float:
        return flops / self.rate


def measure_bounds(device: torch.device, dtype: torch.dtype, quick: bool) -> Bounds:
    """The best of several rounds of each, since a bound is what is possible."""
    numbers, side = (2**20, 256) if quick else (2**26, 2048)
    source = torch.rand(numbers, device=device, dtype=dtype)
    target = torch.empty_like(source)
    left, right = (torch.rand(side, side, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(left)
    best = {
        name: min(seconds(run, device) for _ in range(2 if quick else 7))
        for name, run in (
            ("copy", partial(target.copy_, source)),
            ("product", partial(torch.mm, left, right, out=out)),
        )
    }
    return Bounds(2 * source.nbytes / max(best["copy"], 1e-9), 2 * side**3 / max(best["product"], 1e-9))


# --- operations and numbers -------------------------------------------------------------------------------------


def positions(model: DCFormer, stage: int, batch: int) -> int:
    depth, height, width = model.grid(stage)
    return batch * depth * height * width


def stem_width(model: DCFormer) -> int:
    blocks: Any = model.encoder["s1"]
    return blocks[0].proj.in_channels


def stem_flops(model: DCFormer, batch: int, form: str) -> float:
    """Plain: nine taps of each dense convolution. Views: the first two as one. Planes: seven taps."""
    width, places = stem_width(model), positions(model, 0, batch)
    if form == "plain":
        return 2.0 * places * width * 3 * (7 * model.channels + 3 * 3 * width)
    taps = 7 if form == "planes" else 9
    return 2.0 * places * width * taps * (22 + 2 * width)


def stage_flops(model: DCFormer, stage: int, batch: int) -> float:
    """All forms do the same: 1x1x1 convolution, depthwise taps, MLP."""
    blocks: Any = model.encoder[f"s{stage}"]
    width_in, width = blocks[0].proj.in_channels, blocks[0].proj.out_channels
    of_block = 3 * blocks[0].dwconv.kernel * width + 8 * width * width
    return 2.0 * positions(model, stage, batch) * (width_in * width + len(blocks) * of_block)


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


# --- what is measured -------------------------------------------------------------------------------------------


def step(model: nn.Module, run: Callable[[], Tensor]) -> None:
    """Forward and backward."""
    model.zero_grad(set_to_none=True)
    run().square().mean().backward()


def without_gradients(run: Run) -> Run:
    def evaluated() -> None:
        with torch.no_grad():
            run()

    return evaluated


def with_mode(model: nn.Module, mode: str, run: Run) -> Run:
    """The same after setting the mode: frozen for eval. That takes no time worth counting."""

    def ready() -> None:
        model.train(mode == TRAINING).requires_grad_(mode == TRAINING)
        run()

    return ready


def whole(model: DCFormer, volume: Tensor) -> list[Timed]:
    """The encoder, plain and as it chooses."""
    batch, found = len(volume), []
    least = volume.numel() + parameters(model) + batch * sum(a * b for a, b in (model.low_shape, model.high_shape))
    for mode in (EVAL, TRAINING):
        for form in ("plain", "auto"):

            def encode(form: str = form) -> Tensor:
                model.set_form(form)
                return torch.cat([x.flatten() for x in model(volume)])

            run = without_gradients(encode) if mode == EVAL else partial(step, model, encode)
            stem = {"plain": "plain", "auto": "planes" if mode == EVAL and not volume.is_cuda else "views"}[form]
            flops = stem_flops(model, batch, stem) + sum(stage_flops(model, i, batch) for i in range(1, 5))
            factor = 1 if mode == EVAL else 3
            found.append(Timed("encoder", mode, form, with_mode(model, mode, run), factor * flops, factor * least))
    return found


def parts(model: DCFormer, volume: Tensor) -> list[Timed]:
    """Stem and stages in eval mode; the pooling between them is in both, as the fast stem cannot do without it."""
    batch, found = len(volume), []
    stem: Stem = model.get_submodule("encoder.s0.0")  # type: ignore[assignment]
    pool = model.get_submodule("encoder.s1.0.pool")
    runs: dict[str, Run] = {
        "plain": lambda: pool(stem(volume.permute(0, 1, 3, 4, 2))),
        "views": lambda: stem.pooled(volume, "views"),
        "planes": lambda: stem.pooled(volume, "planes"),
    }
    out = positions(model, 1, batch) * stem_width(model)
    for form, run in runs.items():
        least = volume.numel() + parameters(stem) + out
        timed = with_mode(model, EVAL, without_gradients(run))
        found.append(Timed("stem", EVAL, form, timed, stem_flops(model, batch, form), least))
    for i in range(1, 5):
        blocks: Any = model.encoder[f"s{i}"]
        grid, width_in = model.grid(i), blocks[0].proj.in_channels
        x = torch.rand(batch, *(2 * n for n in grid), width_in, device=volume.device, dtype=volume.dtype)
        first = x.permute(0, 4, 2, 3, 1).contiguous()
        numbers = x.numel() + parameters(blocks) + positions(model, i, batch) * blocks[0].proj.out_channels
        for form, run in (("plain", partial(_plain_stage, blocks, first)), ("auto", partial(_fast_stage, blocks, x))):
            timed = with_mode(model, EVAL, without_gradients(partial(_in_form, model, form, run)))
            found.append(Timed(f"stage {i}", EVAL, form, timed, stage_flops(model, i, batch), numbers))
    return found


def _in_form(model: DCFormer, form: str, run: Run) -> None:
    model.set_form(form)
    run()


def _plain_stage(blocks: Any, x: Tensor) -> Tensor:
    for block in blocks:
        x = block(x)
    return x


def _fast_stage(blocks: Any, x: Tensor) -> Tensor:
    for block in blocks:
        x = block.channels_last(x)
    return x


def depthwise(model: DCFormer, batch: int, like: Tensor) -> list[Timed]:
    """The depthwise decomposed convolution with its batch norm, at the shape of each stage, in every form."""
    found = []
    for i in range(1, 5):
        module: DecomposedConv3d = model.get_submodule(f"encoder.s{i}.0.dwconv")  # type: ignore[assignment]
        width = module.branches()[0][0].out_channels
        x = torch.rand(batch, *model.grid(i), width, device=like.device, dtype=like.dtype)
        first = x.permute(0, 4, 2, 3, 1).contiguous()
        flops, numbers = 2.0 * x.numel() * 3 * module.kernel, 2 * x.numel()
        for mode in (EVAL, TRAINING):
            forms = ["plain", "views", "banded"] + (["fused"] if mode == EVAL and like.is_cuda and available() else [])
            for form in forms:
                given = first if form == "plain" else x
                forward = partial(module, given) if form == "plain" else partial(module.channels_last, given, form)
                if mode == TRAINING:
                    run: Run = partial(_convolution_step, module, given, form)
                else:
                    run = without_gradients(forward)
                factor = 1 if mode == EVAL else 3
                timed = with_mode(module, mode, run)
                found.append(Timed(f"depthwise {i}", mode, form, timed, factor * flops, factor * numbers))
    return found


def _convolution_step(module: DecomposedConv3d, x: Tensor, form: str) -> None:
    module.zero_grad(set_to_none=True)
    x = x.detach().requires_grad_()
    out = module(x) if form == "plain" else module.channels_last(x, form)
    out.backward(x.detach())


def difference(model: DCFormer, volume: Tensor) -> float:
    """Largest difference between both forms, of the largest output."""
    model.eval()
    outputs = []
    with torch.no_grad():
        for form in ("plain", "auto"):
            model.set_form(form)
            outputs.append(torch.cat([x.flatten() for x in model(volume)]))
    return float((outputs[1] - outputs[0]).abs().max() / outputs[0].abs().max())


# --- the program ------------------------------------------------------------------------------------------------


def table(found: list[Timed], bounds: Bounds, width: int) -> list[list[str]]:
    """Seconds beside the plain form's and beside the bounds."""
    lines = []
    for timed in found:
        plain = next(t for t in found if (t.part, t.mode, t.form) == (timed.part, timed.mode, "plain"))
        memory, products = bounds.memory(timed.numbers, width), bounds.products(timed.flops)
        lines.append(
            [f"{timed.part}, {timed.mode}: {timed.form}", f"{1e3 * timed.median:.4g}", timed.spread,
             f"{plain.median / timed.median:.2f}", f"{timed.flops / 1e9:.3g}", f"{1e3 * products:.3g}",
             f"{1e3 * memory:.3g}", f"{timed.median / max(products, memory):.2f}",
             f"{timed.peak / 1e6:,.0f}" if timed.peak else ""]
        )  # fmt: skip
    return lines


HEADER = [
    "", "ms", "quartiles", "times as fast as plain", "GFLOP", "products alone, ms", "memory alone, ms",
    "times the bound", "peak MB",
]  # fmt: skip


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--variant", choices=list(VARIANTS), default="small")
    parser.add_argument("--size", type=int, nargs=3, metavar=("D", "H", "W"), default=SIZE, help="voxels")
    parser.add_argument("--batch", type=int, default=1, help="volumes at a time")
    parser.add_argument("--bfloat16", action="store_true", help="instead of float32")
    parser.add_argument("--rounds", type=int, default=5, help="times that each variant runs")
    parser.add_argument("--quick", action="store_true", help="the smallest variant, a small volume, one round")
    parser.add_argument("--out", type=Path, help="a JSON file for all that was measured")
    args = parser.parse_args()
    if min(args.rounds, args.batch, *args.size) < 1:
        parser.error("--rounds, --batch, --size: too small; 1 or more")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device: no GPU that torch can use; take cpu")
    if args.quick:
        args.variant, args.size, args.batch, args.rounds = "nano", QUICK_SIZE, 2, 1
    if args.batch == 1 and max(args.size) <= 64:
        parser.error("--size: one volume of 64 voxels or less along each axis is one position, and has no variance")
    return args


def prepare(args: argparse.Namespace) -> tuple[DCFormer, Tensor]:
    """The encoder with statistics of its own, and volumes."""
    device, dtype = torch.device(args.device), torch.bfloat16 if args.bfloat16 else torch.float32
    if device.type == "cpu":
        torch.set_num_threads(1)
    shape = VARIANTS[args.variant]
    model = DCFormer(args.size, layers=shape.layers, widths=shape.widths)
    for name, parameter in model.named_parameters():
        if name.endswith("scale"):
            nn.init.constant_(parameter, 0.1)  # else the MLPs could do anything
    return model.to(device, dtype), torch.rand(args.batch, 1, *args.size, device=device, dtype=dtype)


def main() -> None:
    args = arguments()
    torch.manual_seed(0)
    model, volume = prepare(args)
    bounds = measure_bounds(volume.device, volume.dtype, args.quick)
    print(f"{machine(volume.device)}, {volume.dtype}, DCFormer {args.variant}, {args.batch} x {tuple(args.size)}")
    print(f"copy {bounds.bandwidth / 1e9:.1f} GB/s read and written, product {bounds.rate / 1e9:,.0f} GFLOP/s")
    off = difference(model, volume)
    print(f"largest difference between the forms: {off:.1e} of the largest output")
    groups = {
        "Encoder": whole(model, volume),
        "Parts": parts(model, volume),
        "Depthwise convolutions with batch norm": depthwise(model, args.batch, volume),
    }
    every = [timed for group in groups.values() for timed in group]
    for timed in every:
        timed.run()  # warm
        if timed.part == "encoder":
            timed.peak = peak_bytes(timed.run, volume.device)
    for _ in range(args.rounds):
        for timed in every:
            timed.times.append(seconds(timed.run, volume.device))
    for title, group in groups.items():
        show_table(title, HEADER, table(group, bounds, volume.element_size()))
    if args.out:
        rows = [{k: v for k, v in vars(timed).items() if k != "run"} for timed in every]
        result = {"machine": machine(volume.device), "bounds": vars(bounds), "difference": off, "rows": rows}
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
