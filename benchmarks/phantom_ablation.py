"""Photon's ablation (Table 4 of the paper) on phantoms, with two controls that the paper lacks.

    python benchmarks/phantom_ablation.py --rows no-reduction photon fixed random --seeds 2 --jobs 2
    python benchmarks/phantom_ablation.py --device cuda                                    every row, three seeds
    python benchmarks/phantom_ablation.py --table                                          the table of what is there

The findings asked about are round lesions in few of several hundred tokens, so that it matters which tokens are
kept. All rows start from one checkpoint of phase 1 (the vision tower learns from label maps first, see
docs/training.md) and train equally long. Controls: ``random`` is trained and asked with random tokens at the same
rate, ``no-reduction`` is trained without dropping; each model is also asked with all tokens and with as many random
ones as it keeps itself.

What is finished in --out is not run again, so that an interrupted benchmark goes on. Settings of the runs are in
benchmarks/phantom_ablation/.
"""

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from running import Runs, cores, keep_table, or_exit, percent, prepare_folder

from mllm3d.errors import UserError
from mllm3d.evaluation.results import Results, read_results
from mllm3d.evaluation.retention import Retention

CONFIGS = Path(__file__).resolve().with_suffix("")
FINDINGS = ("lung nodule", "liver lesion", "kidney cyst", "kidney tumour", "pleural effusion", "splenomegaly")
SMALL = FINDINGS[:4]
RATES = (0.3, 0.1, 0.05)
NEVER = 1_000_000
"""A step that no run reaches."""


STEPS = {"vision": 2, "backbone": 2, "phase1": 1, "phase2": 4}
"""Of ``--quick``."""


@dataclass(frozen=True)
class Variant:
    """A row of the table.

    Attributes:
        name: of its run folders. title: in the table. settings: what differs from phase2.yaml.
        start: the run that it begins with. modes: how it is asked (``evaluation.modes``), as trained first.
    """

    name: str
    title: str
    settings: tuple[str, ...] = ()
    start: str = "phase1"
    modes: tuple[str, ...] = ("scheduled", "none", "random")


def _scheduling(**values: object) -> tuple[str, ...]:
    return tuple(f"model.scheduling.{key}={json.dumps(value)}" for key, value in values.items())


def _at_rate(rate: float, layer: str | int) -> list[Variant]:
    """A fixed ratio and random tokens. Neither has a predictor to warm up, so dropping begins with the first step."""
    settings = _scheduling(keep_ratio=rate, layers=[layer], soft_from=0, hard_from=0)
    name, where = (f"{rate:g}", "after n/4") if layer else (f"{rate:g}-layer0", "before the first layer")
    drawn = (*settings, *_scheduling(selection="random"))
    return [
        Variant(f"fixed-{name}", f"fixed ratio {rate:g}, {where}", settings),
        Variant(f"random-{name}", f"random tokens, {rate:g}, {where}", drawn, modes=("scheduled", "none")),
    ]


def _shared(rate: float) -> Variant:
    """A fixed ratio where the questions of a volume share what any of them keeps."""
    settings = _scheduling(keep_ratio=rate, layers=["n/4"], soft_from=0, hard_from=0, upper_layers="union")
    return Variant(f"union-{rate:g}", f"fixed ratio {rate:g}, after n/4, union", settings, modes=("scheduled", "none"))


def variants(rates: Sequence[float] = RATES) -> dict[str, Variant]:
    """All rows by name, in the order of the table."""
    rows = [
        Variant("no-reduction", "no reduction", _scheduling(soft_from=NEVER, hard_from=NEVER), modes=("none",)),
        Variant("photon", "Photon (after n/4)"),
        Variant("sparse", "Photon, band 0.05 to 0.2", ("model.band.low=0.05", "model.band.high=0.2")),
        Variant("no-phase1", "without phase 1", _fresh_patches(), start="backbone"),
        Variant("layer-0", "before the first layer", _scheduling(layers=[0])),
        Variant("layer-half", "after n/2", _scheduling(layers=["n/2"])),
        Variant("layer-late", "after 3n/4", _scheduling(layers=["3n/4"])),
        *(variant for layer in ("n/4", 0) for rate in rates for variant in _at_rate(rate, layer)),
        _shared(0.1),
        Variant("no-affinity", "without self-affinity", _scheduling(self_affinity=False)),
        Variant("no-robustness", "without robustness loss", ("model.robustness.probability=0",)),
        Variant("no-flip", "without flip loss", ("model.flip.probability=0",)),
        Variant("removal", "the other sign of importance", _scheduling(importance="removal")),
    ]
    return {row.name: row for row in rows}


def _fresh_patches() -> tuple[str, ...]:
    return "model.patch_init=fresh", "model.patch_size=[8,4,4]"


# --- running ------------------------------------------------------------------------------------------------


def draw(runs: Runs, cases: int) -> None:
    """The phantoms of all rows."""
    runs.phantoms(
        *("--cases", str(cases), "--seed", "1", "--shape", "40,80,80", "--splits", "0.9,0.01,0.09"),
        *("--tasks", "existence", "--priors", "0", "--lesion-scale", "1.5", "--findings", *FINDINGS),
    )


def common_start(runs: Runs) -> None:
    """The stages that all rows share."""
    train(runs, "vision", "vision")
    train(runs, "backbone", "backbone", f"model.checkpoint={runs.out / 'vision'}")
    train(runs, "phase1", "phase1", f"model.checkpoint={runs.out / 'backbone'}")


def row(runs: Runs, variant: Variant, seed: int) -> None:
    """Train and ask one model."""
    name = run_name(variant, seed)
    if (runs.out / name / "evaluation/test/retention.json").is_file():
        return
    settings = (f"run.seed={seed}", f"model.checkpoint={runs.out / variant.start}", *variant.settings)
    train(runs, name, "phase2", *settings)
    runs.evaluate(name, CONFIGS / "phase2.yaml", *settings, f"evaluation.modes={json.dumps(variant.modes)}")


def train(runs: Runs, name: str, config: str, *settings: str) -> None:
    """Train the run of this name, if it is not there."""
    runs.train(name, CONFIGS / f"{config}.yaml", *settings, quick_steps=STEPS[config])


def run_name(variant: Variant, seed: int) -> str:
    """The run's folder in --out."""
    return f"{variant.name}-seed{seed}"


# --- the table ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """One run. Shares are in [0, 1]; `small` are the round lesions.

    Attributes:
        tokens: visual tokens per question after the last scheduling layer. keep_rate: the same as a share.
        overall, small: accuracy over all findings, and over the small ones. majority: best text-only rule.
        coverage: share of the tokens with the lesion named in the question that stayed. chance: the share that as
            many random tokens would cover. all_tokens, random_tokens: `small`, asked without dropping, and with as
            many random tokens; None where it was not asked.
    """

    tokens: float
    keep_rate: float
    overall: float
    small: float
    majority: float
    coverage: float
    chance: float
    all_tokens: float | None
    random_tokens: float | None


def read_outcome(folder: Path, variant: Variant) -> Outcome:
    """A run's figures from its evaluation (`results.json`, `retention.json`)."""
    results = read_results(folder / "results.json")
    retention = Retention.model_validate_json((folder / "retention.json").read_text(encoding="utf-8"))
    mode = variant.modes[0]
    task = next(row for row in results.rows if row.subtask is None)
    regions = [
        region
        for region in (retention.modes[mode].coverage if mode in retention.modes else [])
        if region.of == "finding" and region.name in SMALL and region.blocks
    ]
    held = sum(region.blocks for region in regions)
    covered, by_chance = (
        sum(getattr(region, field) * region.blocks for region in regions) / held if held else 1.0
        for field in ("pooled", "random")
    )
    return Outcome(
        tokens=results.modes[mode].tokens_after,
        keep_rate=results.modes[mode].keep_rate,
        overall=task.modes[mode].value,
        small=_small(results, mode),
        majority=task.best_text_only or 0.0,
        coverage=covered,
        chance=by_chance,
        all_tokens=_small(results, "none") if "none" in variant.modes else None,
        random_tokens=_small(results, "random") if "random" in variant.modes else None,
    )


def _small(results: Results, mode: str) -> float:
    """Mean accuracy over the small findings."""
    return statistics.fmean(row.modes[mode].value for row in results.rows if row.subtask in SMALL)


def finished(out: Path, rows: Mapping[str, Variant]) -> dict[str, list[Outcome]]:
    """Outcomes of the runs in ``out`` by row, one for each seed; rows without a finished run are left out."""
    found: dict[str, list[Outcome]] = {}
    for name, variant in rows.items():
        for results in sorted(out.glob(f"{name}-seed[0-9]*/evaluation/test/retention.json")):
            found.setdefault(name, []).append(read_outcome(results.parent, variant))
    return found


HEADER = (
    "", "seeds", "tokens", "keep rate", "accuracy", "text-only majority", "lesion kept", "by chance",
    "small findings", "all tokens", "random tokens",
)  # fmt: skip


def cells(outcomes: Mapping[str, Sequence[Outcome]], rows: Mapping[str, Variant]) -> list[list[str]]:
    """The table's lines: means over seeds, with the lowest and the highest where there are several."""
    lines = []
    for name, runs in outcomes.items():
        tokens = statistics.fmean(run.tokens for run in runs)
        fields = (
            "keep_rate", "overall", "majority", "coverage", "chance", "small", "all_tokens", "random_tokens",
        )  # fmt: skip
        shares = [percent([getattr(run, field) for run in runs]) for field in fields]
        lines.append([rows[name].title, str(len(runs)), f"{tokens:.0f}", *shares])
    return lines


def show(out: Path, rows: Mapping[str, Variant]) -> None:
    """Print the table and write it to OUT/table.md.

    Of ``accuracy`` on: over all findings; the best rule that reads only the text; share of the tokens with the lesion
    named in the question that stayed, and of as many random tokens; over the small findings, asked as trained, with
    all tokens, and with as many random ones.
    """
    lines = cells(finished(out, rows), rows)
    if not lines:
        raise UserError(f"{out}: no finished run in it; run without --table first")
    keep_table(out / "table.md", HEADER, lines)


# --- the command --------------------------------------------------------------------------------------------


def chosen(names: Sequence[str], rows: Mapping[str, Variant]) -> list[Variant]:
    """Rows by name; ``fixed`` and ``random`` mean those rows at every rate, ``all`` every row."""
    found: dict[str, Variant] = {}
    for name in names:
        matching = {key: row for key, row in rows.items() if name in ("all", key, key.partition("-")[0])}
        if not matching:
            raise UserError(f"--rows {name}: no such row; there are {', '.join(rows)}, fixed, random and all")
        found |= matching
    return [row for key, row in rows.items() if key in found]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add = parser.add_argument
    add("--out", type=Path, default=Path("runs/phantom_ablation"), help="folder of data, runs and table")
    add("--rows", nargs="+", metavar="ROW", help=f"all (default), fixed, random, or out of {', '.join(variants())}")
    add("--seeds", type=int, help="seeds of each row (default 3)")
    add("--cases", type=int, help="phantoms to draw (default 5000)")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="default cpu")
    add("--jobs", type=int, default=1, help="runs at a time")
    add("--quick", action="store_true", help="a few steps on a few cases: a test of this program, no result")
    add("--table", action="store_true", help="only the table of what is finished")
    return parser.parse_args(arguments)


def run(args: argparse.Namespace) -> None:
    rows = variants()
    if args.table:
        show(args.out, rows)
        return
    names = args.rows or (["no-reduction", "photon", "random-0.1-layer0"] if args.quick else ["all"])
    wanted, cases = chosen(names, rows), args.cases or (100 if args.quick else 5000)
    prepare_folder(args.out, {"cases": cases, "quick": args.quick})
    out = args.out.resolve()
    alone = Runs(out, args.device, cores(), args.quick)
    draw(alone, cases)
    common_start(alone)
    shared = Runs(out, args.device, max(1, cores() // args.jobs), args.quick)
    seeds = args.seeds or (1 if args.quick else 3)
    with ThreadPoolExecutor(args.jobs) as pool:
        work = [pool.submit(row, shared, variant, seed) for seed in range(seeds) for variant in wanted]
        try:
            for each in work:
                each.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    show(args.out, rows)


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(arguments)
    or_exit("phantom_ablation.py", lambda: run(args))


if __name__ == "__main__":
    main()
