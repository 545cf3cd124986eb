"""benchmarks/photon_speed.py and what it measures with: on known work, and its quick path."""

import importlib
import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
CPU = torch.device("cpu")
MB = 1_000_000


@pytest.fixture(scope="module")
def measuring(programs: None) -> Any:
    return importlib.import_module("measuring")


@pytest.fixture(scope="module")
def speed(programs: None) -> Any:
    return importlib.import_module("photon_speed")


@pytest.fixture(scope="module")
def subject(speed: Any) -> Any:
    torch.manual_seed(0)
    work = speed.Work(shape=(28, 112, 112), text=20, answer=2, before=4, tokens=2)
    return speed.Subject(speed.small_config(64, 4, 32, 2), work, CPU, torch.float32)


# --- measuring ------------------------------------------------------------------------------------------------


def test_peak_memory_is_of_what_lives_at_once(measuring: Any) -> None:
    size = MB // 4  # floats of a megabyte

    def in_turn() -> None:
        for _ in range(3):
            torch.zeros(size)

    def together() -> float:
        kept = [torch.zeros(size) for _ in range(3)]
        return len(kept)

    assert measuring.peak_bytes(in_turn, CPU) == pytest.approx(MB, rel=0.01)
    assert measuring.peak_bytes(together, CPU) == pytest.approx(3 * MB, rel=0.01)


def test_what_is_there_before_does_not_count(measuring: Any) -> None:
    weight = torch.zeros(500, 500, requires_grad=True)
    weight.grad = torch.zeros_like(weight)
    x = torch.ones(500, 500)
    # The product, its gradient, and the weight's new gradient; no more than two of them and the sum's at once.
    peak = measuring.peak_bytes(lambda: (x @ weight).sum().backward(), CPU)
    assert MB <= peak <= 2.1 * MB


def test_peak_memory_holds_at_least_what_autograd_saves(measuring: Any, subject: Any, speed: Any) -> None:
    runs = speed.Runs(subject, speed.variants([1])[0])
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        output = subject.model(**runs.training)
    for known in (*subject.model.parameters(), *runs.training.values()):
        if isinstance(known, torch.Tensor):
            saved.pop(known.untyped_storage().data_ptr(), None)
    assert output.loss.requires_grad and sum(saved.values()) > MB
    del output
    # Below twice as much: the backward pass needs room for gradients of what it is at.
    assert sum(saved.values()) < measuring.peak_bytes(runs.step, CPU) < 2 * sum(saved.values())
    subject.model.zero_grad(set_to_none=True)


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.large, self.small = nn.Linear(400, 400), nn.Linear(400, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query = self.large(x)[:, None, None].relu()
        mixed = nn.functional.scaled_dot_product_attention(query, query, query)
        return self.small(mixed[:, 0, 0])


def test_a_profile_finds_forward_and_backward_of_each_part(measuring: Any) -> None:
    model, x = Two(), torch.rand(300, 400)
    parts = [measuring.Part(model.large, "forward", "large"), measuring.Part(model.small, "forward", "small")]
    spent = measuring.profile_parts(lambda: model(x).sum().backward(), parts, CPU)
    # Forward, and the weight's gradient; the small layer's input has a gradient as well.
    assert spent["large"].flops == 2 * 2 * 300 * 400 * 400
    assert spent["small"].flops == 3 * 2 * 300 * 400 * 10
    assert spent["large"].seconds["matrix products"] > 0 and spent["large"].rate > 0
    assert spent["large"].seconds["attention"] == 0 == spent["small"].seconds["attention"]
    assert spent["rest"].seconds["attention"] > 0 and spent["rest"].rate == 0
    assert "forward" not in vars(model.large)  # as it was


# --- the rows ---------------------------------------------------------------------------------------------------


def test_rows(speed: Any) -> None:
    rows = speed.variants([1, 4, 8])
    kept = [v for v in rows if v.early == "keep"]
    assert [v.name for v in kept] == ["a", "b", "c", "d4", "d8", "e", "f4", "f8"]
    # Where nothing is dropped there is nothing to evict.
    assert [v.name for v in rows if v not in kept] == ["c-evict", "d4-evict", "d8-evict", "e-evict"]
    assert [v.name for v in rows if v.is_one_of(["b", "d8"])] == ["b", "d8", "d8-evict"]
    assert [v.name for v in rows if v.is_one_of(["d"])] == ["d4", "d4-evict", "d8", "d8-evict"]


@pytest.mark.parametrize("name", ["c", "d4", "e"])
def test_the_predictor_keeps_the_share_that_was_asked_for(speed: Any, subject: Any, name: str) -> None:
    """Of 32 tokens, or of 224, as nearly as whole tokens can."""
    variant = next(v for v in speed.variants([1, 4]) if v.name == name)
    kept = subject.calibrate(variant)
    assert kept == pytest.approx(variant.keep, abs=0.02)
    output = subject.model(**subject.training(variant))
    output.loss.backward()
    assert float(output.keep_rate.mean()) == pytest.approx(kept)
    predictor = subject.model.model.threshold_predictors[0]
    assert predictor.mlp[-1].bias.grad.abs() > 0  # through the surrogate gradient
    subject.model.zero_grad(set_to_none=True)


def test_batches_are_what_the_work_says(speed: Any, subject: Any) -> None:
    variant = next(v for v in speed.variants([1, 4]) if v.name == "f4")
    layout = subject.training(variant)["layout"]
    assert layout.suffix_lengths == [[20] * 4] and len(layout.targets) == 8
    assert layout.prefix_lengths[0] - layout.visual_counts[0] == 4
    assert layout.visual_counts == [subject.configs[True].patches.tokens((28, 112, 112))]
    assert layout.instruction.shape == (4, 20 - 2 - speed.HEADER)
    runs = speed.Runs(subject, variant)
    for _, run in runs:
        run()
    assert runs.next.shape == (4, 1) and runs.cache.get_seq_length() == 4 + layout.visual_counts[0] + 18 + 2
    subject.model.zero_grad(set_to_none=True)


def test_evicting_leaves_less_below_the_drop(speed: Any, subject: Any) -> None:
    """Keys and values of one head of 64 in float32: per token 512 bytes a layer, of which one lies below the drop."""
    per_token, text = 2 * 64 * 4, 18 + 4  # the question without its answer, and what stands before it
    for name, visual in (("c", 32), ("e", 224)):
        cached, answers, kept = {}, {}, 0
        for variant in (v for v in speed.variants([1]) if v.is_one_of([name])):
            kept = round(visual * subject.calibrate(variant))
            runs = speed.Runs(subject, variant)
            phases = [phase for phase, _ in runs]
            assert phases == list(speed.PHASES if variant.early == "keep" else speed.PHASES[1:])
            runs.prefill()
            cached[variant.early], answers[variant.early] = runs.cache_bytes, runs.next
            runs.decode()
            assert runs.cache_bytes - cached[variant.early] == 4 * per_token * subject.work.tokens
        assert cached["keep"] == per_token * (4 * text + visual + 3 * kept)
        assert cached["evict"] == per_token * (4 * text + 4 * kept)
        assert torch.equal(answers["keep"], answers["evict"])  # the first token comes before


def made_up(speed: Any, subject: Any) -> Any:
    chosen = speed.variants([1, 4])
    seconds = {"a": 40.0, "b": 8.0, "c": 4.0, "d4": 2.0, "e": 20.0, "f4": 1.0}
    seconds |= {f"{name}-evict": seconds[name] / 2 for name in ("c", "d4", "e")}
    found = {v: speed.Found({phase: [seconds[v.name]] * 3 for phase in speed.PHASES}) for v in chosen}
    for v in chosen:
        found[v].peak = {phase: round(seconds[v.name] * MB) for phase in (speed.STEP, speed.PREFILL)}
        found[v].cache = seconds[v.name] * MB / 10
    return speed.Report(subject, chosen, found)


def test_each_gain_has_its_own_column(speed: Any, subject: Any) -> None:
    report = made_up(speed, subject)
    gains = {v.name: report.gains(speed.STEP, v) for v in report.chosen if v.early == "keep"}
    # Of the 3D patch embedding, of dropping, of sharing.
    assert gains == {
        "a": [1.0, 1.0, 1.0],
        "b": [5.0, 1.0, 1.0],
        "c": [5.0, 2.0, 1.0],
        "d4": [5.0, 0.5, 8.0],
        "e": [1.0, 2.0, 1.0],
        "f4": [5.0, 1.0, 8.0],
    }


def test_rows_show_ratios_beside_predicted_ones(speed: Any, subject: Any) -> None:
    report = made_up(speed, subject)
    c = next(v for v in report.chosen if v.name == "c")
    work, configs = subject.work, subject.configs
    planned = speed.forward_flops(configs[False], work.shape, 1, 20, 2, None, 4) / speed.forward_flops(
        configs[True], work.shape, 1, 20, 2, 0.39, 4
    )
    row = report.time_row(speed.STEP, c)
    assert row == [
        "(c) Photon, keep 0.39", "4", "4-4", "5.00", "2.00", "1.00", "10.00", f"{planned:.2f}", f"{10 / planned:.2f}",
    ]  # fmt: skip
    evicting = next(v for v in report.chosen if v.name == "c-evict")
    planned = {e: speed.token_flops(configs[True], work.shape, 20, 0.39, 4, e) for e in ("keep", "evict")}
    base = speed.token_flops(configs[False], work.shape, 20, None, 4)
    for variant, ratio in ((c, 10), (evicting, 20)):
        row = report.time_row(speed.TOKEN, variant)
        predicted = base / planned[variant.early]
        assert row[6:] == [f"{ratio:.2f}", f"{predicted:.2f}", f"{ratio / predicted:.2f}", f"{4 / ratio:.2f}"]
    assert planned["evict"] < planned["keep"]
    report.found[c].kept = 0.5
    visual = configs[True].patches.tokens(work.shape)
    sizes = [str(visual), str(visual // 2), str(24 + visual), str(24 + visual // 2), "4", "0.10", "4", "0.10"]
    assert report.size_row(c)[1:] == sizes


def test_what_the_memory_is_too_small_for_is_said(speed: Any, subject: Any) -> None:
    report = made_up(speed, subject)
    a, b = report.chosen[:2]
    found = speed.Found()

    def fail() -> None:
        raise torch.OutOfMemoryError

    def unreachable() -> None:
        raise AssertionError

    assert speed.attempt(found, speed.PREFILL, fail, subject.model) is None
    assert found.missing == [speed.PREFILL]
    for phase in (speed.PREFILL, speed.TOKEN):  # nothing to continue from
        assert speed.attempt(found, phase, unreachable, subject.model) is None
    assert speed.attempt(found, speed.STEP, lambda: 3, subject.model) == 3
    report.found[a] = found
    assert report.time_row(speed.PREFILL, a)[1] == "out of memory"
    widths = [len(report.time_row(phase, a)) for phase in speed.PHASES]
    assert widths == [len(report.time_row(phase, b)) for phase in speed.PHASES]
    row = report.time_row(speed.PREFILL, b)
    assert row[1] == "8" and row[3] == "" == row[6]


# --- the program ------------------------------------------------------------------------------------------------


def run(monkeypatch: pytest.MonkeyPatch, *options: str) -> None:
    monkeypatch.setattr(sys, "argv", ["photon_speed.py", *options])
    runpy.run_path(str(FOLDER / "photon_speed.py"), run_name="__main__")


def test_quick_path(
    programs: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "speed.json"
    run(monkeypatch, "--quick", "--out", str(out))
    printed = capsys.readouterr().out
    for title in ("Tokens, and peak memory", "Training step", "Prefill", "Further token"):
        assert f"\n{title}" in printed
    assert printed.count("| (d) keep 0.39, K = 4 ") == 4
    assert printed.count("| (d) keep 0.39, K = 4, evict ") == 1 == printed.count("cache MB per question")
    kept = json.loads(out.read_text())
    found = {v["name"]: v for v in kept["variants"]}
    assert list(found) == ["a", "b", "c", "c-evict", "d4", "d4-evict", "e", "e-evict", "f4"]
    for variant in found.values():
        phases = ["training step", "prefill"] if variant["early"] == "keep" else ["prefill"]
        assert list(variant["peak"]) == phases and variant["missing"] == []
        measured = [phase for phase, times in variant["seconds"].items() if len(times) == 1 and times[0] >= 0]
        assert measured == [*phases, "further token"]
    for name in ("c", "d4", "e"):
        assert found[f"{name}-evict"]["cache"] < found[name]["cache"]
    assert found["d4"]["cache"] == pytest.approx(found["c"]["cache"], rel=0.05)  # of a question, not of the batch


def test_profile(programs: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run(monkeypatch, "--quick", "--profile", "d4", "--checkpointing")
    printed = capsys.readouterr().out
    decoder = [f"decoder, {place} the drop" for place in ("below", "above")]
    for name in (*decoder, "vision tower", "patch embedding", "choice of tokens", "dropping", "logits"):
        assert printed.count(f"| {name} ") == 2  # in the training step and in the prefill
    assert printed.count("| index tables ") == 1  # in training they are there


@pytest.mark.parametrize(
    ("options", "says"),
    [(["--text", "12"], "--text"), (["--profile", "d5"], "d4"), (["--device", "cuda", "--backbone", "x"], "--")],
)
def test_options_that_make_no_sense(
    programs: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], options: list[str], says: str
) -> None:
    with pytest.raises(SystemExit) as left:
        run(monkeypatch, "--quick", *options)
    assert left.value.code
    assert says in f"{left.value} {capsys.readouterr().err}"
