"""Med3DVLM's ablations (Tables 5-8 of the paper) on phantoms: encoders, contrastive losses, projectors.

    python benchmarks/med3dvlm_phantoms.py                                  every row, one seed
    python benchmarks/med3dvlm_phantoms.py --rows dcformer-siglip 2xMLP     some of them
    python benchmarks/med3dvlm_phantoms.py --table                          the tables of what is there

Rows of Table 5 train image and text encoder and are asked for the report of each scan and the scan of each report.
Rows of Tables 6-8 put a projector between the first row's encoder and a small language model, train it in both stages,
and are asked questions and for reports. All use the configs of the quickstart, configs/quickstart/med3dvlm/.

What is finished in --out is not run again, so that an interrupted benchmark goes on.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from running import ROOT, Runs, cores, keep_table, or_exit, percent, prepare_folder

from mllm3d.errors import UserError
from mllm3d.evaluation.results import Results, read_results
from mllm3d.evaluation.retrieval_run import RetrievalResults

CONFIGS = ROOT / "configs/quickstart/med3dvlm"
PHANTOMS = (
    *("--shape", "64,112,112", "--priors", "0", "--splits", "0.866,0.067,0.067"),
    *("--tasks", "report", "existence", "phase", "location", "organ", "abnormality"),
    *("--findings", "pleural effusion", "pericardial effusion", "cardiomegaly", "splenomegaly", "fatty liver"),
    *("consolidation", "kidney cyst", "liver lesion"),
)
"""As the quickstart's."""
VIT3D = {"name": "vit3d", "patch": [8, 8, 8], "width": 128, "hidden": 384, "layers": 3, "heads": 4, "pool": 2}
CLIP = ("model.loss=clip", "model.start=published")
BASELINE = ("model.encoder=null", f"model.encoder={json.dumps(VIT3D)}")
"""Null first: a mapping is merged into the config's, key by key."""
ENCODERS: dict[str, tuple[str, tuple[str, ...]]] = {
    "dcformer-siglip": ("DCFormer-nano, SigLIP", ()),
    "dcformer-clip": ("DCFormer-nano, CLIP", CLIP),
    "vit3d-siglip": ("ViT-3D, SigLIP", BASELINE),
    "vit3d-clip": ("ViT-3D, CLIP", (*BASELINE, *CLIP)),
}
"""Row -> title in Table 5, and what differs from contrastive.yaml."""
PROJECTORS = ("2xMLP", "2xMLP-H", "1xMLP-Mixer-H", "2xMLP-Mixer-H")
QUICK_STEPS = 2


@dataclass(frozen=True)
class Bench:
    """The runs of all rows with one seed."""

    runs: Runs
    seed: int

    def name(self, row: str) -> str:
        """Of a row's run folder."""
        return f"{row}-seed{self.seed}"

    def train(self, row: str, config: str, *settings: str) -> None:
        seed = f"run.seed={self.seed}"
        self.runs.train(self.name(row), CONFIGS / f"{config}.yaml", seed, *settings, quick_steps=QUICK_STEPS)

    def evaluate(self, row: str, config: str, *settings: str) -> Path:
        """Ask the run, unless it has been; gives the folder of what was found."""
        found = self.runs.out / self.name(row) / "evaluation/test"
        if not (found / "results.json").is_file():
            self.runs.evaluate(self.name(row), CONFIGS / f"{config}.yaml", f"run.seed={self.seed}", *settings)
        return found

    def start(self) -> None:
        """The text models that all rows share."""
        self.train("bert", "bert")
        self.train("decoder", "decoder")

    def encoder(self, row: str) -> None:
        """A row of Table 5."""
        settings = (f"model.text_encoder={self.runs.out / self.name('bert')}", *ENCODERS[row][1])
        self.train(row, "contrastive", *settings)
        self.evaluate(row, "contrastive", *settings)

    def projector(self, row: str) -> None:
        """A row of Tables 6-8."""
        self.encoder("dcformer-siglip")
        models = [f"model.{key}={self.runs.out / self.name(of)}" for key, of in (
            ("encoder", "dcformer-siglip"), ("language_model", "decoder"))]  # fmt: skip
        self.train(f"{row}-projector", "projector", *models, f"model.projector={row}")
        settings = (f"model.checkpoint={self.runs.out / self.name(f'{row}-projector')}",)
        self.train(row, "finetune", *settings)
        found = self.evaluate(row, "finetune", *settings, "evaluation.modes=[none,zeroed]")
        if not (found / "reports.json").is_file() and not self.runs.quick:
            self.runs.call(
                f"{self.name(row)}-reports", "data/phantom/score_reports.py",
                *("--manifest", str(self.runs.out / "data/manifest.jsonl"), "--json", str(found / "reports.json")),
                *("--predictions", str(found / "predictions-none.jsonl")),
            )  # fmt: skip


# --- the tables ---------------------------------------------------------------------------------------------

RETRIEVAL_HEADER = (
    "", "seeds", "items", "image to text R@1", "R@5", "R@10", "text to image R@1", "R@5", "R@10", "chance R@1",
)  # fmt: skip


def retrieval_lines(out: Path) -> list[list[str]]:
    """Table 5: a line for each row that is finished."""
    lines = []
    for row, (title, _) in ENCODERS.items():
        files = _found(out, row, "results.json")
        runs = [RetrievalResults.model_validate_json(file.read_text(encoding="utf-8")).recall[0] for file in files]
        if runs:
            both = [[run.image_to_text for run in runs], [run.text_to_image for run in runs]]
            shares = [percent([run[k] for run in way]) for way in both for k in (1, 5, 10)]
            chance = percent([run.chance[1] for run in runs])
            lines.append([title, str(len(runs)), str(runs[0].items), *shares, chance])
    return lines


CLOSED, OPEN = ("existence", "abnormality"), ("phase", "location", "organ")
LANGUAGE_HEADER = (
    "", "seeds", *(f"{task}, {kind}" for tasks, kind in ((CLOSED, "closed"), (OPEN, "open")) for task in tasks),
    "closed", "closed, text only", "closed, zeroed",
    "organs F1", "random report", "findings with place F1", "random report",
)  # fmt: skip


def language_lines(out: Path) -> list[list[str]]:
    """Tables 6-8, and a line for each rule that does not look: accuracies and shares in percent."""
    lines = []
    for row in PROJECTORS:
        results = [read_results(file) for file in _found(out, row, "results.json")]
        reports = [json.loads(file.read_text(encoding="utf-8"))["figures"] for file in _found(out, row, "reports.json")]
        if not results:
            continue
        by_task = [percent([_accuracy(result, task) for result in results]) for task in CLOSED + OPEN]
        closed = [percent([_closed(result, of) for result in results]) for of in ("none", "text only", "zeroed")]
        named = [
            percent([figures[f"{level} F1"][of] for figures in reports])
            for level in ("organ", "finding with place")
            for of in ("model", "random")
        ]
        lines.append([row, str(len(results)), *by_task, *closed, *named])
    return lines


def _found(out: Path, row: str, file: str) -> list[Path]:
    return sorted(out.glob(f"{row}-seed[0-9]*/evaluation/test/{file}"))


def _accuracy(results: Results, task: str, of: str = "none") -> float | None:
    """Of a task as a whole; in a mode, or of the best rule that reads only the text."""
    row = next((row for row in results.rows if row.task == task and row.subtask is None), None)
    if row is None:
        return None
    return row.best_text_only if of == "text only" else row.modes[of].value


def _closed(results: Results, of: str) -> float | None:
    """Mean over the closed questions, each of which counts alike."""
    rows = [row for row in results.rows if row.task in CLOSED and row.subtask is None]
    known = [(_accuracy(results, row.task, of), row.questions) for row in rows]
    if not known or any(value is None for value, _ in known):
        return None
    return sum((value or 0.0) * count for value, count in known) / sum(count for _, count in known)


def show(out: Path) -> None:
    """Print both tables and write them to OUT/retrieval.md and OUT/language.md."""
    found: Mapping[str, tuple[Sequence[str], list[list[str]]]] = {
        "retrieval": (RETRIEVAL_HEADER, retrieval_lines(out)),
        "language": (LANGUAGE_HEADER, language_lines(out)),
    }
    if not any(lines for _, lines in found.values()):
        raise UserError(f"{out}: no finished run in it; run without --table first")
    for name, (header, lines) in found.items():
        if lines:
            keep_table(out / f"{name}.md", header, lines)


# --- the command --------------------------------------------------------------------------------------------


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add, rows = parser.add_argument, (*ENCODERS, *PROJECTORS)
    add("--out", type=Path, default=Path("runs/med3dvlm_phantoms"), help="folder of data, runs and tables")
    add("--rows", nargs="+", choices=rows, metavar="ROW", default=rows, help=f"out of {', '.join(rows)}; default all")
    add("--seeds", type=int, default=1, help="seeds of each row (default 1)")
    add("--cases", type=int, help="phantoms to draw (default 1500)")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="default cpu")
    add("--quick", action="store_true", help="a few steps on a few cases: a test of this program, no result")
    add("--table", action="store_true", help="only the tables of what is finished")
    return parser.parse_args(arguments)


def run(args: argparse.Namespace) -> None:
    if args.table:
        show(args.out)
        return
    cases = args.cases or (60 if args.quick else 1500)
    prepare_folder(args.out, {"cases": cases, "quick": args.quick})
    runs = Runs(args.out.resolve(), args.device, cores(), args.quick)
    runs.phantoms("--cases", str(cases), "--seed", "0", *PHANTOMS)
    for seed in range(args.seeds):
        bench = Bench(runs, seed)
        bench.start()
        for row in args.rows:
            (bench.encoder if row in ENCODERS else bench.projector)(row)
    show(args.out)


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(arguments)
    or_exit("med3dvlm_phantoms.py", lambda: run(args))


if __name__ == "__main__":
    main()
