"""Keep rate and band of a run, read from its metrics and drawn: what the figures hold, not how they look."""

import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_hex

from mllm3d.cli import main
from mllm3d.errors import UserError
from mllm3d.evaluation.plots import PURPLE, band_figure, describe, rate_figure, read_history, running_mean


def write_run(folder: Path, steps: int = 12, **columns: list[float | None]) -> Path:
    """Nothing masked in steps 1 to 3, soft masking to step 6, then dropping; step 8 has a loss of its own."""
    usual: dict[str, list[float | None]] = {
        "keep_rate": [1.0] * 6 + [0.5, None, 0.3, 0.2, 0.2, 0.4],
        "band_triggered": [None] * 3 + [1.0, 0.5, 0.25, 0.0, None, 0.0, 0.5, 0.0, 0.0],
        "loss/band": [0.0] * 3 + [0.3, 0.2, 0.1, 0.0, 0.0, 0.0, 0.05, 0.0, 0.0],
    }
    columns = usual | columns
    lines = [{"step": at + 1, **{name: values[at] for name, values in columns.items()}} for at in range(steps)]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_stages_are_read_from_the_metrics(tmp_path: Path) -> None:
    history = read_history(write_run(tmp_path / "set" / "run"))
    assert (history.soft_from, history.hard_from, history.name) == (4, 7, "set/run")
    assert history.kept_tokens is None and np.isnan(history.keep_rate[7])
    # Dropping: 0.5, 0.3, 0.2, 0.2, 0.4; the last tenth of 12 steps is one; the band is left at 1 of 5 known steps.
    assert describe(history) == (
        "set/run: 12 steps; soft masking from step 4; dropping from step 7; keep rate 0.320, at the end 0.400; "
        "band left at 20 % of these steps"
    )


def test_a_run_in_its_warm_up_and_one_without_a_band(tmp_path: Path) -> None:
    early = read_history(write_run(tmp_path / "early", steps=5))
    assert describe(early).endswith("soft masking from step 4; no token dropped yet")
    fixed = read_history(write_run(tmp_path / "fixed", band_triggered=[None] * 12, **{"loss/band": [None] * 12}))
    assert (fixed.soft_from, fixed.hard_from) == (None, 7)
    assert "band" not in describe(fixed)
    for figure in (band_figure([early, fixed]), rate_figure([early, fixed])):
        figure.canvas.draw()
    assert [patch.get_label() for patch in rate_figure([fixed]).axes[0].patches] == ["before dropping"]


def test_both_figures_hold_the_values_and_the_stages(tmp_path: Path) -> None:
    history = read_history(write_run(tmp_path / "run"))
    (axes,) = rate_figure([history]).axes
    every = axes.get_lines()[0]
    assert every.get_xdata().tolist() == [1, 2, 3, 4, 5, 6, 7, 9, 10, 11, 12] and to_hex(every.get_color()) == PURPLE
    assert every.get_ydata().tolist() == [1.0] * 6 + [0.5, 0.3, 0.2, 0.2, 0.4]
    assert [(span.get_x(), span.get_x() + span.get_width()) for span in axes.patches] == [(1, 4), (4, 7)]
    smooth = [line.get_xdata().tolist() for line in axes.get_lines()[1:]]
    assert smooth == [[1, 2, 3], [4, 5, 6], [7, 9, 10, 11, 12]]  # no line from one stage into the next

    above, below = band_figure([history]).axes
    assert above.get_ylabel() == "keep rate"
    assert below.get_lines()[0].get_xdata().tolist() == [4, 5, 6, 7, 9, 10, 11, 12]  # steps that have a band
    assert below.get_lines()[0].get_ydata().tolist() == [0.3, 0.2, 0.1, 0, 0, 0.05, 0, 0]
    hits = next(line for line in below.get_lines() if line.get_label() == "band left")
    assert hits.get_xdata().tolist() == [4, 5, 6, 10]


def test_kept_tokens_are_drawn_where_all_runs_count_them(tmp_path: Path) -> None:
    counting = read_history(write_run(tmp_path / "a", kept_tokens=[8.0 * n for n in range(12)]))
    rates = read_history(write_run(tmp_path / "b"))
    alone, beside = band_figure([counting]).axes[0], band_figure([counting, rates]).axes[0]
    assert alone.get_ylabel() == "kept tokens per question" and alone.get_lines()[0].get_ydata()[-1] == 88
    assert beside.get_ylabel() == "keep rate" and beside.get_lines()[0].get_ydata()[-1] == 0.4


def test_running_mean_by_hand() -> None:
    values = np.array([1.0, 2.0, 6.0, 3.0])
    assert running_mean(values, 0).tolist() == values.tolist()
    assert running_mean(values, 1).tolist() == [1.5, 3.0, pytest.approx(11 / 3), 4.5]
    assert running_mean(values, 9).tolist() == [3.0] * 4
    assert running_mean(values[:0], 2).tolist() == []


def test_the_command_draws_runs_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = write_run(tmp_path / "first"), write_run(tmp_path / "second", steps=9)
    assert main(["plot", str(first), str(second)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[1].split(";")[0] for line in printed[:2]] == ["12 steps", "9 steps"]
    for name in ("retention_band.png", "keep_rate.png"):
        assert (first / "figures" / name).read_bytes().startswith(b"\x89PNG")
        assert str(first / "figures" / name) in printed
    assert main(["plot", str(first), "--out", str(tmp_path / "new" / "folder")]) == 0
    assert (tmp_path / "new" / "folder" / "keep_rate.png").stat().st_size > 5000


def test_the_last_line_may_still_be_written(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    file = run / "metrics.jsonl"
    file.write_text(file.read_text() + '{"step": 13, "keep')
    assert len(read_history(run).steps) == 12
    file.write_text('{"step": \n' + file.read_text())
    with pytest.raises(UserError, match=r"metrics\.jsonl:1: not a line of metrics"):
        read_history(run)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "No such file or directory; name the folder of a run"),
        ("", "empty; the run has not taken a step yet"),
        ('{"step": 1, "loss": 2.0}\n', "no keep_rate in it; name a run that drops tokens"),
    ],
)
def test_a_folder_that_cannot_be_drawn_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None, says: str
) -> None:
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    assert main(["plot", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1
    assert not (tmp_path / "figures").exists()
