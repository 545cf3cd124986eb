"""Starting train.py as a user does, under deepspeed, torchrun or python, and comparing what runs leave."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests.training.toy_launch import PYTHON, TORCHRUN, free_port, read_metrics, read_weights

ROOT = Path(__file__).resolve().parents[2]
TRAIN = str(ROOT / "train.py")
MANY = str(Path(__file__).with_name("many_runs.py"))
LAUNCHERS_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

__all__ = ["PYTHON", "TORCHRUN", "read_metrics", "read_weights"]


@dataclass(frozen=True)
class Run:
    """How a run of a program ended, and what it printed."""

    status: int
    out: str
    err: str

    def line(self) -> str:
        """The one line of a mistake: status 2, nothing else on stderr, no traceback."""
        lines = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert self.status == 2 and len(lines) == 1 and "Traceback" not in self.err + self.out, self
        return lines[0]


def deepspeed(ranks: int | None = None) -> list[str]:
    """The launcher, told how many ranks or left to choose (one, on a CPU). A port of its own: runs don't meet."""
    told = [] if ranks is None else ["--num_gpus", str(ranks)]
    return [str(Path(sys.executable).with_name("deepspeed")), *told, "--master_port", str(free_port())]


def start(command: Sequence[str], cwd: Path = ROOT, env: Mapping[str, str] | None = None) -> Run:
    """A program in an environment that no earlier launch has left traces in."""
    clean = {name: value for name, value in os.environ.items() if name not in LAUNCHERS_VARIABLES}
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        command,
        cwd=cwd,
        env={**clean, "OMP_NUM_THREADS": "1", "PATH": path, **(env or {})},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    return Run(done.returncode, done.stdout, done.stderr)


def launch(launcher: Sequence[str], *arguments: str) -> Run:
    """`LAUNCHER train.py ARGUMENTS`, which must go well."""
    run = start([*launcher, TRAIN, *arguments])
    assert run.status == 0, run.out + run.err
    return run


def launch_many(launcher: Sequence[str], plan: Mapping[str, Mapping[str, Any]], folder: Path) -> dict[str, Run]:
    """The named steps of a plan (see many_runs.py) in one launch: a launch alone takes ten seconds."""
    folder.mkdir(parents=True, exist_ok=True)
    file, results = folder / "plan.json", folder / "results.json"
    file.write_text(json.dumps(list(plan.values())))
    run = start([*launcher, MANY, str(file), str(results)])
    assert run.status == 0 and results.is_file(), run.out + run.err
    return {name: Run(**found) for name, found in zip(plan, json.loads(results.read_text()), strict=True)}


# --- what runs leave ----------------------------------------------------------------------------------------


def results(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what a clock measured."""
    timed = ("_per_s", "seconds_per_step", "mfu")
    return [{key: value for key, value in line.items() if not key.endswith(timed)} for line in read_metrics(run)]


def assert_same(run: Path, other: Path) -> None:
    """To the last bit: every metric of every step, every weight."""
    assert results(run) == results(other) != []
    mine, theirs = read_weights(run), read_weights(other)
    assert mine.keys() == theirs.keys()
    assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == []
