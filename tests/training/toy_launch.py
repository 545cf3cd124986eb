"""Starting toy_run.py under a launcher, and reading what it leaves."""

import json
import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

HERE = Path(__file__).parent


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass(frozen=True)
class Outcome:
    """Errors and moved weights of each run in a plan (see toy_run.py), and what was printed."""

    status: int
    errors: list[str | None]
    moved: list[float]
    output: str


def launch(command: list[str], plan: list[dict[str, Any]], folder: Path, **environment: str) -> Outcome:
    """Run a plan under a launcher: `command` stands before toy_run.py."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "plan.json"
    file.write_text(json.dumps(plan))
    kept = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    done = subprocess.run(
        [*command, str(HERE / "toy_run.py"), str(file)],
        env=kept
        | {"OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        | environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    output = done.stdout + done.stderr
    results = [Path(f"{file}.{name}") for name in ("errors", "moved")]
    assert all(path.is_file() for path in results), output
    errors, moved = (json.loads(path.read_text()) for path in results)
    return Outcome(done.returncode, errors, moved, output)


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
DEEPSPEED = [
    str(Path(sys.executable).parent / "deepspeed"),
    "--num_gpus",
    "2",
    "--master_port",
    str(free_port()),
]
PYTHON = [sys.executable]


def read_metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def read_weights(run: Path) -> dict[str, Tensor]:
    """Weights of the newest checkpoint."""
    step = (run / "checkpoints" / "latest").read_text().strip()
    return load_file(run / "checkpoints" / step / "model" / "model.safetensors")
