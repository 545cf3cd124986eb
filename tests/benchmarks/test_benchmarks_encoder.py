"""benchmarks/med3dvlm_encoder.py: what it counts, and its quick path."""

import importlib
import json
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from med3dvlm.dcformer import DCFormer

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def program() -> Iterator[Any]:
    """The program imports what lies beside it. It runs with one thread; others get theirs back."""
    threads = torch.get_num_threads()
    sys.path.insert(0, str(FOLDER))
    yield importlib.import_module("med3dvlm_encoder")
    sys.path.remove(str(FOLDER))
    torch.set_num_threads(threads)


def test_operations_of_the_plain_form_are_torchs(program: Any) -> None:
    with torch.device("meta"):
        model, volume = DCFormer(form="plain").eval(), torch.empty(2, 1, 128, 256, 256)
        with FlopCounterMode(display=False) as counter:
            model(volume)
    stages = [program.stage_flops(model, i, 2) for i in range(1, 5)]
    counted = counter.get_total_flops()
    assert program.stem_flops(model, 2, "plain") + sum(stages) == pytest.approx(counted, rel=1e-6)
    # The dense stem has two thirds of them; two convolutions as one, and seven taps for nine.
    assert program.stem_flops(model, 2, "plain") / counted == pytest.approx(0.69, abs=0.02)
    assert program.stem_flops(model, 2, "planes") / program.stem_flops(model, 2, "plain") == pytest.approx(
        0.6, abs=0.02
    )


def test_rows_show_ratios_and_bounds(program: Any) -> None:
    plain = program.Timed("stem", "eval", "plain", print, 8e9, 1e8, [0.4, 0.4, 0.5])
    fast = program.Timed("stem", "eval", "planes", print, 4e9, 1e8, [0.1, 0.1, 0.1])
    bounds = program.Bounds(bandwidth=8e9, rate=1e11)
    rows = program.table([plain, fast], bounds, 4)
    # 0.1 s against 0.05 s of copying (its products would need 0.04 s).
    assert rows[1] == ["stem, eval: planes", "100", "100-100", "4.00", "4", "40", "50", "2.00", ""]
    assert rows[0][3] == "1.00" and rows[0][7] == "5.00"


def run(monkeypatch: pytest.MonkeyPatch, *options: str) -> None:
    monkeypatch.setattr(sys, "argv", ["med3dvlm_encoder.py", *options])
    runpy.run_path(str(FOLDER / "med3dvlm_encoder.py"), run_name="__main__")


def test_quick_path(
    program: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "encoder.json"
    run(monkeypatch, "--quick", "--out", str(out))
    printed = capsys.readouterr().out
    for title in ("Encoder", "Parts", "Depthwise convolutions with batch norm"):
        assert f"\n{title}\n" in printed
    kept = json.loads(out.read_text())
    assert kept["difference"] < 1e-4
    names = {(row["part"], row["mode"], row["form"]) for row in kept["rows"]}
    assert {("encoder", mode, form) for mode in ("eval", "training") for form in ("plain", "auto")} <= names
    assert {("stem", "eval", form) for form in ("plain", "views", "planes")} <= names
    assert {("depthwise 4", "training", form) for form in ("plain", "views", "banded")} <= names
    assert all(len(row["times"]) == 1 and row["times"][0] > 0 and row["flops"] > 0 for row in kept["rows"])
    assert all(row["peak"] > 0 for row in kept["rows"] if row["part"] == "encoder")


@pytest.mark.parametrize(
    ("options", "says"), [(["--rounds", "0"], "--rounds"), (["--size", "64", "64", "64"], "--size")]
)
def test_options_that_make_no_sense(
    program: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], options: list[str], says: str
) -> None:
    with pytest.raises(SystemExit) as left:
        run(monkeypatch, *options)
    assert left.value.code and says in capsys.readouterr().err
