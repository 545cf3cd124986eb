"""Trainings and evaluations that go on where they stopped. Used by the programs beside it."""

import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from mllm3d.errors import UserError
from mllm3d.evaluation.tables import markdown_table

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Runs:
    """A folder of runs and how they run.

    Attributes:
        out: the folder; data is in `out/data`. device: cpu or cuda. threads: of a run on the CPU. quick: two volumes
            a step and no warm-up, to see that all parts fit together.
    """

    out: Path
    device: str
    threads: int
    quick: bool

    def phantoms(self, *arguments: str) -> None:
        """Draw the phantoms, with these arguments of `data/phantom/prepare.py`."""
        if not (self.out / "data").is_dir():
            where = ("--out", str(self.out / "data"), "--workers", str(self.threads))
            self.call("data", "data/phantom/prepare.py", *where, *arguments)

    def train(self, name: str, config: Path | str, *settings: str, quick_steps: int = 1) -> None:
        """Train the run of this name, if it is not there. It is saved once, at its end."""
        folder = self.out / name
        if (folder / "checkpoints/latest").is_file():
            return
        if folder.exists():
            shutil.rmtree(folder)  # it was interrupted
        few = [f"training.max_steps={quick_steps}", "training.optimizer.warmup=0", "training.volumes_per_batch=2"]
        extra = few if self.quick else []
        self.call(name, "train.py", "--config", str(config), *self._where(name), *settings, *extra)

    def evaluate(self, name: str, config: Path | str, *settings: str) -> None:
        """Ask the run of this name."""
        few = ["evaluation.limit_volumes=2"] if self.quick else []
        options = ("--device", self.device, "--config", str(config))
        self.call(f"{name}-eval", "eval.py", *options, *self._where(name), *settings, *few)

    def _where(self, name: str) -> list[str]:
        where = [f"run.output={self.out / name}", f"data.manifest={self.out / 'data/manifest.jsonl'}"]
        return where if self.device != "cpu" else [*where, f"run.threads={self.threads}"]

    def call(self, name: str, program: str, *arguments: str) -> None:
        """Run a program of the repository; what it prints goes to OUT/logs/NAME.log."""
        log = self.out / "logs" / f"{name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        environment = dict(os.environ)
        if self.device == "cpu":
            environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": str(self.threads)}
        print(f"{name} ...", flush=True)
        with log.open("w", encoding="utf-8") as stream:
            done = subprocess.run(
                [sys.executable, str(ROOT / program), *arguments],
                stdout=stream, stderr=subprocess.STDOUT, env=environment, check=False,
            )  # fmt: skip
        if done.returncode:
            raise UserError(f"{program} for {name} failed, see {log}; mend that and run again, it goes on from here")


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def prepare_folder(out: Path, identity: Mapping[str, object]) -> None:
    """Make ``out``; what other settings made is not gone on with."""
    file = out / "settings.json"
    if file.is_file() and json.loads(file.read_text(encoding="utf-8")) != identity:
        raise UserError(f"--out {out}: made with other settings ({file}); remove it or name another folder")
    out.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(identity) + "\n", encoding="utf-8")


def or_exit(program: str, run: Callable[[], None]) -> None:
    """Run; an error that a user can mend ends the program with its line."""
    try:
        run()
    except UserError as error:
        sys.exit(f"{program}: {error}")


def percent(shares: Sequence[float | None]) -> str:
    """Mean of what is known, with the lowest and the highest where they differ; - where nothing is known."""
    known = [100 * share for share in shares if share is not None]
    if not known:
        return "-"
    mean = f"{statistics.fmean(known):.1f}"
    return mean if max(known) - min(known) < 0.05 else f"{mean} ({min(known):.1f}-{max(known):.1f})"


def keep_table(file: Path, header: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    """Print a table and write it to ``file`` as Markdown."""
    file.write_text("\n".join(markdown_table(header, lines)) + "\n", encoding="utf-8")
    table = Table()
    for column in header:
        table.add_column(column, justify="right" if column else "left")
    for line in lines:
        table.add_row(*line)
    console = Console()
    console.width = max(console.width, 160)
    console.print(table)
