"""What pruning costs in accuracy: the quickstart's slice-video backbone on phantoms that it has not seen.

    python benchmarks/pruner_accuracy.py                     100 test volumes, some ten minutes of one core
    python benchmarks/pruner_accuracy.py --table             tables and picture of what is there
    python benchmarks/pruner_accuracy.py --quick             whether the program works

Asked about the findings that the backbone was trained on: unpruned; under every method of `medpruner` at equal budgets;
in the rows of MedPruner's Table 3; and along tau (its Fig. 2). Methods that choose how much they keep get the tau or
the threshold at which they keep the budget of all tokens of a few volumes of --fit-split. Some can't keep so little:
whole slices are all that uniform sampling has, and Hulu-L1's first slice stays. Clusters have their share of a slice's
tokens, but at most a tenth of the budget.

Writes OUT/accuracy.json, table.md and accuracy.png. What is finished in --out is not asked again, so that an
interrupted benchmark goes on.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from pruners import bisected
from running import or_exit, prepare_folder

from mllm3d.data.cache import VolumeCache
from mllm3d.data.manifest import Row, read_manifest, select, volume_path
from mllm3d.data.preprocess import Prepared
from mllm3d.errors import UserError
from mllm3d.evaluation.predictions import Sample
from mllm3d.evaluation.runner import Work, group_by_study
from mllm3d.evaluation.scoring import score
from mllm3d.evaluation.tables import markdown_table
from mllm3d.inference.adapter import Mode
from mllm3d.inference.checkpoint import open_checkpoint
from mllm3d.inference.predictor import Predictor
from mllm3d.release.convert import convert_to

FINDINGS = ("pleural effusion", "cardiomegaly", "splenomegaly", "fatty liver", "pericardial effusion")
BUDGETS: Sequence[float] = (0.5, 0.25, 0.1, 0.05)
TAUS: Sequence[float] = tuple(n / 10 for n in range(1, 11))
SEEDS = 3
"""Draws of random tokens, whose results are averaged."""
IAF_RATE = 0.6033
"""Slices that MedPruner's Table 3 has left after the slice filter alone."""
LONGEST = 4
"""Tokens of an answer."""
Values = dict[str, Any]


@dataclass(frozen=True)
class Point:
    """One way of pruning.

    Attributes:
        group: which table it is in. name: of its row or column there. method, values: settings; None: unpruned.
    """

    group: str
    name: str
    method: str | None = None
    values: Values = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """What came out at one point. Shares are in [0, 1].

    Attributes:
        kept: share of all tokens, slices: of the slices. mean: accuracy over findings, low and high its 95 % interval
            over patients; findings: each one's.
    """

    point: Point
    kept: float
    slices: float
    mean: float
    low: float
    high: float
    findings: dict[str, float]
    seconds: float


# --- settings at a budget -----------------------------------------------------------------------------------------


def counted(budget: float, tokens: int) -> dict[str, Values]:
    """Settings of the methods that are told how many tokens of a slice stay; tokens: M of a slice."""
    keep = max(round(budget * tokens), 1)
    contextual = round(keep * 5 / 70)  # VisionZip's 65 % + 5 %
    # Shares that become these numbers again, whichever way they are rounded.
    share, dominant, centres = ((n + 1e-6) / tokens for n in (keep, keep - contextual, contextual))
    return {
        "visionzip": {"keep": dominant, "contextual": centres if contextual else 0.0},
        "hiprune": {"keep": min(share, 1.0)},
        "random": {"keep": min(share, 1.0)},
        "uniform": {"keep": budget},
    }


def fitted(budget: float, rate: Callable[[str, Values], float]) -> list[Point]:
    """The methods that choose for themselves, at the tau or threshold where they keep the budget.

    rate: method and settings -> share of the tokens that stay of the volumes that are fitted on.
    """
    share = {"centre_share": min(0.05, budget / 10)}
    rows: list[tuple[str, Values]] = [("medpruner", share), ("medpruner, no clusters", {"clusters": False})]
    points = []
    for name, fixed in rows:
        tau, _ = bisected(lambda x, fixed=fixed: rate("medpruner", {**fixed, "tau": x}), budget, 1e-6, 1.0)
        points.append(Point(group_of(budget), name, "medpruner", {**fixed, "tau": tau}))
    threshold, _ = bisected(lambda x: rate("hulu_l1", {"threshold": x}), budget, 0.0, 2.0)
    return [*points, Point(group_of(budget), "hulu_l1", "hulu_l1", {"threshold": threshold})]


def at_budget(budget: float, tokens: int, rate: Callable[[str, Values], float]) -> list[Point]:
    """Every method; random tokens once for each seed."""
    group = group_of(budget)
    points = fitted(budget, rate)
    for method, values in counted(budget, tokens).items():
        seeds = [{"seed": seed} for seed in range(SEEDS)] if method == "random" else [{}]
        points += [Point(group, method, method, {**values, **seed}) for seed in seeds]
    return points


def group_of(budget: float) -> str:
    """The table of a budget."""
    return f"budget {budget:g}"


def ablation(gamma: float) -> list[Point]:
    """Table 3, and its rows with a slice filter again at a gamma that leaves as many slices as in the paper."""
    parts: list[tuple[str, Values]] = [
        ("slice filter", {"nucleus": False}),
        ("primary", {"gamma": None, "clusters": False}),
        ("primary, redundant", {"gamma": None}),
        ("slice filter, primary, redundant", {}),
    ]
    points = [Point("parts", name, "medpruner", values) for name, values in parts]
    again = (parts[0], parts[-1])
    return points + [Point("parts", f"{n}, gamma {gamma:.3g}", "medpruner", {**v, "gamma": gamma}) for n, v in again]


# --- asking -------------------------------------------------------------------------------------------------------


class Asker:
    """A backbone and the volumes that it is asked about."""

    def __init__(self, folder: Path, manifest: Path, device: str) -> None:
        self.predictor = Predictor.load(folder, device)
        self.adapter: Any = self.predictor.adapter
        if not hasattr(self.adapter, "prune_with"):
            raise UserError(f"--checkpoint {folder}: not a slice-wise model; name the quickstart's backbone")
        self.manifest = manifest
        self.cache = VolumeCache(manifest.parent / ".cache")
        self._prepared: dict[str, Prepared] = {}

    def works(self, split: str, volumes: int) -> list[Work]:
        """Questions about the findings, by volume."""
        where = {"task": ["existence"], "finding": list(FINDINGS)}
        return group_by_study(select(read_manifest(self.manifest), split, where, volumes), len(FINDINGS))

    def prepared(self, work: Work) -> Prepared:
        """The volume as the model sees it, read once."""
        name = work.study.volume
        assert name is not None
        if name not in self._prepared:
            settings = self.predictor.volume_config(work.modality)
            self._prepared[name] = self.cache.get(volume_path(self.manifest.parent, name), settings)
        return self._prepared[name]

    def grid(self, work: Work) -> tuple[int, int]:
        """Slices of a volume and tokens of a slice."""
        shown = self.adapter.reader.show([self.prepared(work).array])
        slices = shown.grids[0][0]
        return slices, self.adapter.reader.tokens(shown.grids[0]) // slices

    def rate(self, works: Sequence[Work], method: str, values: Values) -> float:
        """Share of the tokens that stay; the language model does not run."""
        self.adapter.prune_with(method, values)
        rates = []
        for work in works:
            shown = self.adapter.reader.show([self.prepared(work).array])
            inputs = self.adapter.reader.ask(shown, [work.rows[0].question])
            moved = {k: v.to(self.adapter.model.device) if hasattr(v, "to") else v for k, v in inputs.items()}
            self.adapter.model.medpruner.prune(moved)
            rates.append(self.adapter.model.medpruner.report.rate)
        return statistics.fmean(rates)

    def ask(self, works: Sequence[Work], point: Point) -> Outcome:
        """All questions at one point."""
        if point.method is not None:
            self.adapter.prune_with(point.method, point.values)
        mode: Mode = "none" if point.method is None else "scheduled"
        start = time.perf_counter()
        samples: list[Sample] = []
        slices = []
        for work in works:
            questions = [self.predictor.wording(row.question, row.options) for row in work.rows]
            answers = self.predictor.answer([self.prepared(work)], questions, mode, LONGEST)
            slices.append(self.adapter.report.slice_rate)
            samples += [_sample(row, answer) for row, answer in zip(work.rows, answers, strict=True)]
        whole, *rows = score({"asked": samples}, [])
        cell = whole.modes["asked"]
        findings = {str(row.subtask): row.modes["asked"].value for row in rows}
        mean_slices, seconds = statistics.fmean(slices), time.perf_counter() - start
        return Outcome(point, cell.keep_rate, mean_slices, cell.value, cell.low, cell.high, findings, seconds)


def _sample(row: Row, answer: Any) -> Sample:
    return Sample(
        id=row.id, case=row.case, task=row.task, subtask=row.subtask, question=row.question, options=row.options,
        reference=row.answer, prediction=answer.text, keep_rate=answer.keep_rate, tokens_before=answer.tokens_before,
        tokens_after=answer.tokens_after, seconds=0.0,
    )  # fmt: skip


def plan(asker: Asker, fit_on: Sequence[Work], budgets: Sequence[float], taus: Sequence[float]) -> list[Point]:
    """Every point, those that keep a budget fitted."""
    _, tokens = asker.grid(fit_on[0])

    def rate(method: str, values: Values) -> float:
        return asker.rate(fit_on, method, values)

    gamma, _ = bisected(lambda x: rate("medpruner", {"nucleus": False, "gamma": x}), IAF_RATE, 0.0, 2.0)
    points = [Point("unpruned", "unpruned")]
    points += [point for budget in budgets for point in at_budget(budget, tokens, rate)]
    points += ablation(gamma)
    return points + [Point("tau", f"{tau:g}", "medpruner", {"tau": tau}) for tau in taus]


# --- tables -------------------------------------------------------------------------------------------------------


def averaged(outcomes: Sequence[Outcome]) -> Outcome:
    """Draws of one method: means, with the lowest and the highest mean in place of the interval."""
    if len(outcomes) == 1:
        return outcomes[0]
    kept, slices, mean = (statistics.fmean(getattr(o, name) for o in outcomes) for name in ("kept", "slices", "mean"))
    means = [one.mean for one in outcomes]
    findings = {name: statistics.fmean(o.findings[name] for o in outcomes) for name in outcomes[0].findings}
    seconds = sum(one.seconds for one in outcomes)
    return Outcome(outcomes[0].point, kept, slices, mean, min(means), max(means), findings, seconds)


def by_name(outcomes: Sequence[Outcome], group: str) -> dict[str, Outcome]:
    """A group's outcomes, draws averaged."""
    found: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        if outcome.point.group == group:
            found.setdefault(outcome.point.name, []).append(outcome)
    return {name: averaged(several) for name, several in found.items()}


def tables(outcomes: Sequence[Outcome]) -> str:
    """All tables in Markdown; accuracy in percent."""
    whole = by_name(outcomes, "unpruned")
    groups = list(dict.fromkeys(outcome.point.group for outcome in outcomes))
    lines: list[str] = []
    for group in (g for g in groups if g.startswith("budget")):
        columns = {**whole, **by_name(outcomes, group)}
        lines += [f"### {group.capitalize()}", "", *markdown_table(["", *columns], finding_rows(columns)), ""]
    parts, taus = ({**whole, **by_name(outcomes, group)} for group in ("parts", "tau"))
    header = ["", "accuracy", "95 % interval", "of unpruned", "tokens kept", "slices kept", *FINDINGS]
    lines += ["### Parts (Table 3)", "", *markdown_table(header, part_rows(parts)), ""]
    return "\n".join([*lines, "### tau (Fig. 2)", "", *markdown_table(header, part_rows(taus))]) + "\n"


def finding_rows(columns: Mapping[str, Outcome]) -> list[list[str]]:
    """A row for each finding, their mean, its interval and what was kept."""
    cells = [[name, *(percent(of.findings.get(name)) for of in columns.values())] for name in FINDINGS]
    cells.append(["mean", *(percent(of.mean) for of in columns.values())])
    cells.append(["interval", *(f"{percent(of.low)}-{percent(of.high)}" for of in columns.values())])
    cells.append(["tokens kept", *(percent(of.kept) for of in columns.values())])
    return cells


def part_rows(rows: Mapping[str, Outcome]) -> list[list[str]]:
    """A row for each outcome; the first is what others are compared to."""
    base = next(iter(rows.values())).mean
    return [
        [
            name, percent(of.mean), f"{percent(of.low)}-{percent(of.high)}",
            percent(of.mean / base if base else None), percent(of.kept), percent(of.slices),
            *(percent(of.findings.get(finding)) for finding in FINDINGS),
        ]
        for name, of in rows.items()
    ]  # fmt: skip


def percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"


def draw(outcomes: Sequence[Outcome], path: Path) -> None:
    """Accuracy over what was kept for each method, and along tau with the rate (Fig. 2)."""
    from matplotlib.figure import Figure

    whole = by_name(outcomes, "unpruned")["unpruned"]
    figure = Figure(figsize=(12, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    budgets = [g for g in dict.fromkeys(o.point.group for o in outcomes) if g.startswith("budget")]
    found = [by_name(outcomes, group) for group in budgets]
    for name in found[0] if found else ():
        kept, mean = ([100 * getattr(columns[name], key) for columns in found] for key in ("kept", "mean"))
        left.plot(kept, mean, marker="o", markersize=4, label=name)
    left.axhline(100 * whole.mean, color="black", linewidth=1, linestyle="--", label="unpruned")
    left.axhspan(100 * whole.low, 100 * whole.high, color="0.92", zorder=0)
    left.set(xlabel="tokens kept, %", ylabel="accuracy, mean of five findings, %", title="equal budgets")
    left.legend(fontsize=8)
    taus = by_name(outcomes, "tau")
    places = [float(name) for name in taus]
    low, mean, high, kept = ([100 * getattr(o, k) for o in taus.values()] for k in ("low", "mean", "high", "kept"))
    right.fill_between(places, low, high, color="#7b2fd0", alpha=0.15)
    right.plot(places, mean, marker="o", color="#7b2fd0", label="accuracy")
    right.axhline(100 * whole.mean, color="black", linewidth=1, linestyle="--", label="unpruned")
    right.plot(places, kept, marker="s", color="#c8541b", label="tokens kept")
    right.set(xlabel="tau", ylabel="%", ylim=(0, 102), title="MedPruner")
    right.legend(fontsize=8)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def keep(file: Path, items: Sequence[Point] | Sequence[Outcome]) -> None:
    """Write points or outcomes."""
    file.write_text(json.dumps([asdict(item) for item in items], indent=1) + "\n", encoding="utf-8")


def show(out: Path, outcomes: Sequence[Outcome]) -> None:
    """Tables, printed too, and the picture."""
    text = tables(outcomes)
    (out / "table.md").write_text(text, encoding="utf-8")
    draw(outcomes, out / "accuracy.png")
    print(text)


def read_points(file: Path) -> list[Point]:
    """What was planned; nothing where nothing was."""
    return [Point(**one) for one in json.loads(file.read_text(encoding="utf-8"))] if file.is_file() else []


def read_outcomes(out: Path) -> list[Outcome]:
    """What is finished."""
    file = out / "accuracy.json"
    found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
    return [Outcome(**{**one, "point": Point(**one["point"])}) for one in found]


# --- the command --------------------------------------------------------------------------------------------------


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add = parser.add_argument
    add("--checkpoint", type=Path, default=Path("runs/quickstart/backbone"), help="run, or slice-wise model's folder")
    add("--manifest", type=Path, default=Path("runs/quickstart/data/manifest.jsonl"), help="of the phantoms")
    add("--split", default="test", help="whose volumes are asked about (default test)")
    add("--fit-split", default="validation", help="whose volumes tau and thresholds are fitted on (default validation)")
    add("--volumes", type=int, default=100, help="of --split (default 100)")
    add("--fit-volumes", type=int, default=20, help="of --fit-split (default 20)")
    add("--device", default="cpu", help="default cpu")
    add("--out", type=Path, default=Path("runs/pruner_accuracy"), help="folder of results")
    add("--quick", action="store_true", help="two volumes, one budget, two tau")
    add("--table", action="store_true", help="only tables and picture of what is in --out")
    args = parser.parse_args(arguments)
    if min(args.volumes, args.fit_volumes) < 1:
        parser.error("--volumes, --fit-volumes: at least 1")
    return args


def slicewise(checkpoint: Path, out: Path) -> Path:
    """The folder of a slice-wise model; a run of photon.backbone is converted into OUT/backbone."""
    if open_checkpoint(checkpoint).model_type != "photon":
        return checkpoint
    folder = out / "backbone"
    return folder if (folder / "config.json").is_file() else convert_to("qwen2_5_vl", checkpoint, folder)


def run(args: argparse.Namespace) -> None:
    out = args.out
    if args.table:
        if not (found := read_outcomes(out)):
            raise UserError(f"{out}: nothing finished in it; run without --table first")
        show(out, found)
        return
    if args.device == "cpu":
        torch.set_num_threads(1)
    volumes, fit_volumes, budgets, taus = args.volumes, args.fit_volumes, BUDGETS, TAUS
    if args.quick:
        volumes, fit_volumes, budgets, taus = 2, 1, budgets[:1], taus[4:6]
    given = {"checkpoint": str(args.checkpoint), "manifest": str(args.manifest), "quick": args.quick}
    prepare_folder(out, {**given, "asked": [args.split, volumes], "fitted": [args.fit_split, fit_volumes]})
    asker = Asker(slicewise(args.checkpoint, out), args.manifest, args.device)
    works = asker.works(args.split, volumes)
    slices, tokens = asker.grid(works[0])
    print(f"{len(works)} volumes of {slices} slices with {tokens} tokens, {sum(len(w.rows) for w in works)} questions")
    planned = out / "points.json"
    if not (points := read_points(planned)):
        points = plan(asker, asker.works(args.fit_split, fit_volumes), budgets, taus)
        keep(planned, points)
    outcomes = read_outcomes(out)
    for point in points[len(outcomes) :]:
        outcomes.append(asker.ask(works, point))
        keep(out / "accuracy.json", outcomes)
        print(f"{point.group}, {point.name}: {percent(outcomes[-1].mean)}, {outcomes[-1].seconds:.1f} s", flush=True)
    show(out, outcomes)


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(arguments)
    or_exit("pruner_accuracy.py", lambda: run(args))


if __name__ == "__main__":
    main()
