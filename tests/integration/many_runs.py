"""Runs train.py several times in one process: what the launchers start in tests.

The plan is a JSON list of
    {"train": [argument, ...]}                            train.py with these arguments
    {"interrupt": run, "after": step, "as": other}        a copy of a run as a kill after that step's save leaves it
Rank 0 writes status and output of each to the results.
"""

import io
import json
import os
import runpy
import shutil
import sys
import traceback
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def train(arguments: list[str]) -> int:
    """Exit status of train.py. What only a launcher could end (a traceback) is 1, as it is for python."""
    sys.argv = ["train.py", *arguments]
    try:
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    except SystemExit as left:
        return int(left.code or 0)
    except Exception:
        traceback.print_exc()
    return 1


def interrupt(run: Path, step: int, copy: Path) -> int:
    """The later checkpoints are not there yet; the metrics are, as far as they were flushed."""
    shutil.copytree(run, copy)
    checkpoints = copy / "checkpoints"
    for folder in checkpoints.glob("step_*"):
        if int(folder.name[5:]) > step:
            shutil.rmtree(folder)
    (checkpoints / f"step_{step + 1}.tmp").mkdir()
    (checkpoints / "latest").write_text(f"step_{step}\n")
    return 0


def follow(entry: dict[str, Any], is_main: bool) -> int:
    if "train" in entry:
        return train(entry["train"])
    return interrupt(Path(entry["interrupt"]), entry["after"], Path(entry["as"])) if is_main else 0


def main() -> int:
    plan, target = sys.argv[1:]
    sys.path[0] = str(ROOT)  # as for `python train.py`
    is_main = os.environ.get("RANK", "0") == "0"
    results = []
    for entry in json.loads(Path(plan).read_text()):
        out, err = io.StringIO(), io.StringIO()
        with redirect_stdout(out), redirect_stderr(err):
            status = follow(entry, is_main)
        results.append({"status": status, "out": out.getvalue(), "err": err.getvalue()})
    if is_main:
        Path(target).write_text(json.dumps(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
