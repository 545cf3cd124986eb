"""How many tokens a run kept while it trained, from its metrics.jsonl: Photon Fig. 5 and Fig. 6."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mllm3d.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

METRICS = "metrics.jsonl"
BAND_FIGURE, RATE_FIGURE = "retention_band.png", "keep_rate.png"
PURPLE, ORANGE = "#7b2fd0", "#c8541b"
WINDOWS = 50  # a drawn line is a running mean over so many parts of the run
LAST = 0.1  # share of the steps that a run's end is


@dataclass(frozen=True)
class History:
    """What a run logged per step, all float (steps,) and nan where a step has no such value.

    keep_rate: mean share of visual tokens kept. kept_tokens: their mean number per question; None if the run
    does not log it. triggered: share of questions whose mean retention probability left the band (Photon
    Eq. 18); band: the band's loss. soft_from, hard_from: first step of soft masking and of dropping; None
    before it, or (soft) without a band.
    """

    name: str
    steps: np.ndarray
    keep_rate: np.ndarray
    kept_tokens: np.ndarray | None
    triggered: np.ndarray
    band: np.ndarray
    soft_from: int | None
    hard_from: int | None


def plot(runs: Sequence[Path], out: Path | None = None) -> list[Path]:
    """Draw both figures, one column per run, print a line per run, and return where the figures are.

    out: folder of the figures, by default `figures` in the first run. Raises `UserError` for a folder that is
    no run, or one of a recipe that drops no tokens.
    """
    histories = [read_history(run) for run in runs]
    out = out or runs[0] / "figures"
    out.mkdir(parents=True, exist_ok=True)
    for history in histories:
        print(describe(history))
    files = [out / BAND_FIGURE, out / RATE_FIGURE]
    for file, figure in zip(files, (band_figure(histories), rate_figure(histories)), strict=True):
        figure.savefig(file, dpi=110, metadata={"Software": None})
        print(file)
    return files


def read_history(run: Path) -> History:
    """A run's keep rates and band, and from them where its stages begin.

    Below the first step with a band no token is masked; the first step below a keep rate of 1 begins dropping.
    """
    lines = _lines(run / METRICS)
    columns = {
        name: np.array([np.nan if line.get(name) is None else line[name] for line in lines], np.float64)
        for name in ("keep_rate", "kept_tokens", "band_triggered", "loss/band")
    }
    if np.isnan(columns["keep_rate"]).all():
        raise UserError(f"{run / METRICS}: no keep_rate in it; name a run that drops tokens, as photon.phase2 does")
    steps = np.array([line["step"] for line in lines])
    kept = columns["kept_tokens"]
    return History(
        name="/".join(run.resolve().parts[-2:]),
        steps=steps,
        keep_rate=columns["keep_rate"],
        kept_tokens=None if np.isnan(kept).all() else kept,
        triggered=columns["band_triggered"],
        band=np.where(np.isnan(columns["band_triggered"]), np.nan, columns["loss/band"]),  # 0 is logged there
        soft_from=_first(steps, ~np.isnan(columns["band_triggered"])),
        hard_from=_first(steps, columns["keep_rate"] < 1),
    )


def _lines(file: Path) -> list[dict[str, float | None]]:
    """The steps of a run, which may still be writing its last line."""
    try:
        texts = file.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}; name the folder of a run") from error
    lines = []
    for number, text in enumerate(texts, 1):
        try:
            lines.append(json.loads(text))
        except ValueError as error:
            if number < len(texts):
                raise UserError(f"{file}:{number}: not a line of metrics; delete it") from error
    if not lines:
        raise UserError(f"{file}: empty; the run has not taken a step yet")
    return lines


def _first(steps: np.ndarray, where: np.ndarray) -> int | None:
    return int(steps[np.argmax(where)]) if where.any() else None


def describe(history: History) -> str:
    """A run's stages, its keep rate at the end, and how often the band was left, in one line."""
    parts = [f"{history.name}: {len(history.steps)} steps"]
    if history.soft_from is not None:
        parts.append(f"soft masking from step {history.soft_from}")
    if history.hard_from is None:
        return "; ".join([*parts, "no token dropped yet"])
    parts.append(f"dropping from step {history.hard_from}")
    dropping = history.steps >= history.hard_from
    end = history.steps > history.steps[-1] - max(1, round(LAST * len(history.steps)))
    parts.append(f"keep rate {np.nanmean(history.keep_rate[dropping]):.3f}, at the end {_mean(history.keep_rate[end])}")
    banded = dropping & ~np.isnan(history.triggered)
    if banded.any():
        parts.append(f"band left at {100 * np.mean(history.triggered[banded] > 0):.0f} % of these steps")
    return "; ".join(parts)


def _mean(values: np.ndarray) -> str:
    known = values[~np.isnan(values)]
    return f"{known.mean():.3f}" if len(known) else "unknown"


def band_figure(histories: Sequence[History]) -> "Figure":
    """Photon Fig. 5: kept tokens above, size of the band's loss and where it was triggered below."""
    figure, (above, below) = _panels(histories, rows=2)
    counted = all(history.kept_tokens is not None for history in histories)
    for history, upper, lower in zip(histories, above, below, strict=True):
        kept = history.kept_tokens if counted and history.kept_tokens is not None else history.keep_rate
        _draw(upper, history, kept, PURPLE)
        upper.set_title(history.name)
        upper.set_ylim(bottom=0)
        _draw(lower, history, history.band, ORANGE)
        hit = history.triggered > 0
        lower.plot(history.steps[hit], np.zeros(hit.sum()), "|", color="black", markersize=9, label="band left")
        lower.legend(loc="upper right", fontsize=8)
        lower.set_xlabel("step")
    above[0].set_ylabel("kept tokens per question" if counted else "keep rate")
    below[0].set_ylabel("loss of the band (Eq. 18)")
    return figure


def rate_figure(histories: Sequence[History]) -> "Figure":
    """Photon Fig. 6: keep rate over steps, with both stages of the warm-up."""
    figure, (panels,) = _panels(histories, rows=1)
    for history, axes in zip(histories, panels, strict=True):
        _draw(axes, history, history.keep_rate, PURPLE)
        ends = [history.steps[0], history.soft_from, history.hard_from or history.steps[-1]]
        labels = ("warm-up 1: nothing masked", "warm-up 2: soft masking")
        if history.soft_from is None:
            ends, labels = [ends[0], ends[2]], ("before dropping", "")
        for start, end, shade, label in zip(ends[:-1], ends[1:], ("0.82", "0.92"), labels, strict=False):
            axes.axvspan(start, end, color=shade, label=label, zorder=0)
        axes.legend(loc="upper right", fontsize=8)
        axes.set_ylim(0, 1.05)
        axes.set_title(history.name)
        axes.set_xlabel("step")
    panels[0].set_ylabel("keep rate")
    return figure


def _panels(histories: Sequence[History], rows: int) -> tuple["Figure", "np.ndarray"]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2 * len(histories), 2.9 * rows), layout="constrained")
    return figure, figure.subplots(rows, len(histories), squeeze=False, sharex="col", sharey="row")


def _draw(axes: "Axes", history: History, values: np.ndarray, color: str) -> None:
    """Every step faintly, and a running mean that does not reach from one stage into the next."""
    known = ~np.isnan(values)
    steps, values = history.steps[known], values[known]
    axes.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
    width = len(history.steps) // WINDOWS
    starts = np.searchsorted(steps, [step for step in (history.soft_from, history.hard_from) if step is not None])
    for part, those in zip(np.split(values, starts), np.split(steps, starts), strict=True):
        axes.plot(those, running_mean(part, width), color=color, linewidth=1.6)


def running_mean(values: np.ndarray, width: int) -> np.ndarray:
    """Mean of each value with the `width` ones on either side, or as many as there are."""
    middle = np.arange(len(values))
    first, end = np.maximum(middle - width, 0), np.minimum(middle + width + 1, len(values))
    sums = np.concatenate([[0.0], np.cumsum(values)])
    return np.asarray((sums[end] - sums[first]) / (end - first))
