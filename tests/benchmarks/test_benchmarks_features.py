"""benchmarks/med3dvlm_speed.py: what its tables say of known times, and its quick path."""

import importlib
import json
import math
import runpy
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from med3dvlm.encoders import build_encoder

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
PROGRAM = FOLDER / "med3dvlm_speed.py"


@pytest.fixture(scope="module")
def program() -> Iterator[Any]:
    """The program imports what lies beside it."""
    sys.path.insert(0, str(FOLDER))
    yield importlib.import_module(PROGRAM.stem)
    sys.path.remove(str(FOLDER))


def row(program: Any, questions: int, kept: bool, *steps: float) -> Any:
    times = [{program.WHOLE: step, program.READING: step / 10} for step in steps]
    return program.Measured(questions, kept, 2 * questions, times)


@pytest.fixture
def measured(program: Any) -> list[Any]:
    """Two volumes per step. K = 1 saves 1.5 s of a step, K = 4 none."""
    plain = [row(program, 1, False, 2.0, 2.0, 3.0), row(program, 4, False, 4.0, 4.0, 4.0)]
    return [plain[0], row(program, 1, True, 0.5, 0.5, 0.4), plain[1], row(program, 4, True, 5.0, 5.0, 5.0)]


def test_speed_is_compared_within_a_k(program: Any, measured: list[Any]) -> None:
    lines = program.speed_table(measured)
    assert [line[1] for line in lines] == ["1", "4", "2", "1.6"]
    assert [line[-1] for line in lines] == ["1.00", "4.00", "1.00", "0.80"]
    # Quartiles of three are the smallest and the largest; the slowest step has the fewest questions a second.
    assert (lines[0][2], lines[0][4]) == ("0.667-1", "2-3")
    assert program.part_table(measured)[0][1:3] == ["0.200", "0.000"]


def test_features_are_repaid_by_what_an_encoding_saves(program: Any, measured: list[Any]) -> None:
    stored = program.Stored(1.0, 3.0, 1e7, 5e5, 100, 10)
    # 0.75 s saved per volume and step: 3 s after four encodings; a pass over 8 questions has eight of them.
    assert stored.repaid(measured[0], measured[1], volumes=2, per_volume=8) == pytest.approx((4.0, 0.5))
    assert stored.repaid(measured[2], measured[3], volumes=2, per_volume=8) == (math.inf, math.inf)


def test_a_clock_counts_calls_and_what_is_within_them(program: Any) -> None:
    measuring = sys.modules["measuring"]

    class Worker:
        def inner(self) -> None:
            end = time.process_time() + 0.01
            while time.process_time() < end:
                pass

        def outer(self) -> None:
            self.inner()

    worker = Worker()
    parts = [measuring.Part(worker, "inner", "inner"), measuring.Part(worker, "outer", "outer")]
    with measuring.clocked(parts, torch.device("cpu")) as spent:
        worker.outer()
        worker.inner()
    assert spent["inner"] >= 0.02 > 0.01 <= spent["outer"]
    worker.inner()
    assert vars(worker) == {} and set(spent) == {"inner", "outer"}


def test_quick_path(tmp_path: Path) -> None:
    """In a process of its own, as it joins a group of ranks."""
    out = tmp_path / "speed.json"
    command = [sys.executable, str(PROGRAM), "--quick", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for title in ("Training step", "Where the time goes, s of a step", "On disk, per volume"):
        assert f"\n{title}\n" in done.stdout
    found = json.loads(out.read_text())
    assert found["difference"] < 1e-5  # fp32: kept features are those that the encoder gives in a step
    assert [(r["questions"], r["kept"], r["per_step"]) for r in found["rows"]] == [
        (1, False, 2), (1, True, 2), (4, False, 8), (4, True, 8),
    ]  # fmt: skip
    for each in found["rows"]:
        (times,) = each["times"]
        assert (times["encoder"] == 0) == each["kept"]
        parts = sum(seconds for part, seconds in times.items() if part != "step")
        assert min(times["reading"], times["backward"], times["optimizer"]) > 0
        assert parts == pytest.approx(times["step"])
    stored = found["stored"]
    encoder = build_encoder({"name": "dcformer-nano", "size": [32, 64, 64]})
    assert stored["voxels"] == 32 * 64 * 64
    assert stored["numbers"] == math.prod(encoder.low_shape) + math.prod(encoder.high_shape)
    assert stored["features_bytes"] > 4 * stored["numbers"]  # float32 and what is about them
    assert min(stored["prepare_s"], stored["features_s"], stored["volume_bytes"]) > 0


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--rounds", "0"], "--rounds"),
        (["--questions", "5", "7"], "--questions"),
        (["--hidden-size", "100"], "--hidden-size"),
    ],
)
def test_options_that_make_no_sense(
    program: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], options: list[str], says: str
) -> None:
    monkeypatch.setattr(sys, "argv", [PROGRAM.name, *options])
    with pytest.raises(SystemExit) as left:
        runpy.run_path(str(PROGRAM), run_name="__main__")
    assert left.value.code and says in capsys.readouterr().err
