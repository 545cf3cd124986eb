"""What a run says while it goes: metrics.jsonl, TensorBoard and the progress bar.

Values stay on the device until `log_every` steps are together; then the ranks add them up in one reduction.
"""

import json
import math
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from mllm3d.training.distributed import World
from mllm3d.training.step import StepResult


class MetricsLog:
    """Collects steps and writes one line for each. All ranks add and flush; rank 0 writes.

    peak: volumes per second at the peak of all devices; MFU is the share of it, null without it.
    """

    def __init__(
        self, run: Path, world: World, first_step: int, total_steps: int, every: int, peak: float | None
    ) -> None:
        self.world = world
        self.every = every
        self.peak = peak
        self._steps: list[tuple[dict[str, Any], StepResult]] = []
        self._since = time.perf_counter()
        self._file: TextIO | None = None
        if world.is_main:
            file = run / "metrics.jsonl"
            drop_after(file, first_step)
            self._file = file.open("a", encoding="utf-8")
            self._board = SummaryWriter(str(run / "tensorboard"), purge_step=first_step + 1)
            self._bar = tqdm(total=total_steps, initial=first_step, unit="step", dynamic_ncols=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None and self._file is not None and self._steps and self.world.size == 1:
            self.flush()  # with several ranks the others may be gone
        self.close()

    def add(self, step: int, epoch: int, rates: dict[str, float], result: StepResult) -> None:
        """Note optimizer step `step` (from 1) and write, if it is time to."""
        self._steps.append(({"step": step, "epoch": epoch, **rates}, result))
        if self._file is not None:
            self._bar.update(1)
        if step % self.every == 0:
            self.flush()

    def flush(self) -> None:
        """Write the steps noted so far. A collective call: all ranks, at the same step."""
        if not self._steps:
            return
        columns = sorted({name for names in self.world.gather(self._columns()) for name in names})
        table = self.world.sum(self._table(columns))
        seconds = time.perf_counter() - self._since
        if self._file is not None:
            totals = {unit: sum(result.counts[unit] for _, result in self._steps) for unit in self._steps[0][1].counts}
            speed = {f"{unit}_per_s": total / seconds for unit, total in totals.items()}
            speed["seconds_per_step"] = seconds / len(self._steps)
            speed["mfu"] = speed["volumes_per_s"] / self.peak if self.peak and "volumes" in totals else math.nan
            for (line, result), row in zip(self._steps, table, strict=True):
                written = self._write(line | _values(columns, row.tolist(), result) | speed)
            self._file.flush()
            self._show(written)
        self._steps.clear()
        self._since = time.perf_counter()

    def restart_clock(self) -> None:
        """Leave out of the speed what lies between two steps: saving, evaluating."""
        self.flush()
        self._since = time.perf_counter()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._board.close()
            self._bar.close()

    def _columns(self) -> set[str]:
        names: set[str] = set()
        for _, result in self._steps:
            names |= {f"loss/{name}" for name in result.terms}
            names |= {f"{part} {name}" for name in result.metrics for part in ("sum", "count")}
        return names

    def _table(self, columns: list[str]) -> torch.Tensor:
        """(steps, columns) float64 on the host: this rank's share of every value, zero where it has none."""
        rows = []
        for _, result in self._steps:
            row = {f"loss/{name}": value for name, value in result.terms.items()}
            for name, (total, count) in result.metrics.items():
                row |= {f"sum {name}": total, f"count {name}": count}
            zero = torch.zeros(())
            rows += [row.get(name, zero).to(self.world.device, torch.float64) for name in columns]
        return torch.stack(rows).view(len(self._steps), len(columns)).cpu()

    def _write(self, line: dict[str, Any]) -> dict[str, Any]:
        """One step to metrics.jsonl and TensorBoard; the line as written (null for what is not finite)."""
        assert self._file is not None
        plain = {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in line.items()}
        self._file.write(json.dumps(plain) + "\n")
        for name, value in plain.items():
            if name != "step" and value is not None:
                self._board.add_scalar(name, value, line["step"])
        return plain

    def _show(self, plain: dict[str, Any]) -> None:
        """The newest line's figures behind the progress bar."""
        samples = "questions_per_s" if "questions_per_s" in plain else "volumes_per_s"
        shown = {"loss": "loss", "lr": "lr", "keep_rate": "keep", samples: "samples/s"}
        self._bar.set_postfix(
            {label: f"{plain[name]:.3g}" for name, label in shown.items() if plain.get(name) is not None}
        )


def _values(columns: list[str], row: list[float], result: StepResult) -> dict[str, float]:
    by_name = dict(zip(columns, row, strict=True))
    terms = {name: value for name, value in by_name.items() if name.startswith("loss/")}
    metrics = {
        name[4:]: value / by_name[f"count {name[4:]}"] if by_name[f"count {name[4:]}"] else math.nan
        for name, value in by_name.items()
        if name.startswith("sum ")
    }
    return {"loss": sum(terms.values()), **terms, "grad_norm": float(result.grad_norm), **metrics}


def drop_after(file: Path, step: int) -> None:
    """Cut metrics.jsonl back to the steps up to `step`: a resumed run writes the later ones again."""
    if not file.is_file():
        return
    lines = file.read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
    file.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
