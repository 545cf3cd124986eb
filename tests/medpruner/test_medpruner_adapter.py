"""Slice-wise models behind the framework's inference interface: what they are shown, whole and pruned."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor

import medpruner
from medpruner.recipes.adapter import SlicewiseAdapter
from medpruner.settings import MedPruner, Random
from mllm3d.config import VolumeConfig
from mllm3d.inference.adapter import RawAnswer
from mllm3d.inference.generation import question_seed
from mllm3d.registry import adapter_class
from tests.medpruner.asking import generated, load, refused, texts
from tests.medpruner.saved_slicewise import KINDS, QUESTIONS, SETTINGS, SHAPE, TOKENS, VOLUME, saved, scan, tokenizer

PRUNED = {"gamma": 0.01, "tau": 0.5}


@pytest.fixture(params=KINDS)
def adapter(request: Any, tmp_path: Path) -> SlicewiseAdapter:
    return load(saved(request.param, tmp_path / "model"))


@pytest.fixture
def qwen(tmp_path: Path) -> Path:
    return saved("qwen2_5_vl", tmp_path / "model")


def ask(adapter: SlicewiseAdapter, mode: Any, questions: Sequence[str] = QUESTIONS, **given: Any) -> list[RawAnswer]:
    return adapter.answer(given.get("volumes", [scan()]), questions, mode, max_new_tokens=5, seed=given.get("seed", 0))


def plain_inputs(adapter: SlicewiseAdapter, volumes: Sequence[np.ndarray], questions: Sequence[str]) -> dict[str, Any]:
    """As the library wants them: each row with pixels of its own."""
    shown = adapter.reader.show(volumes)
    inputs = adapter.reader.ask(shown, questions)
    ids = inputs["input_ids"]
    inputs["pixel_values_videos"] = shown.pixels.repeat(len(questions), 1)
    inputs["mm_token_type_ids"] = 2 * (ids == adapter.model.config.video_token_id).int()
    return inputs


# --- what is shown ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [SHAPE, (11, 9, 20)], ids=["whole", "padded"])
def test_every_token_has_the_voxels_of_its_box(tmp_path: Path, shape: tuple[int, int, int]) -> None:
    settings = SETTINGS | {"slices_per_frame": 3, "pixel_mean": [0.5, 0.25, 0.0], "pixel_std": [0.5, 0.25, 1.0]}
    adapter = load(saved("qwen2_5_vl", tmp_path, settings))
    volume = scan(shape)
    shown = adapter.reader.show([volume])
    boxes = adapter.token_boxes(shape)
    assert boxes[-1, :, 1].tolist() == [-(-n // u) * u for n, u in zip(shape, (6, 8, 8), strict=True)]
    assert len(shown.pixels) == 4 * len(boxes) and adapter.reader.tokens(shown.grids[0]) == len(boxes)
    padded = np.full(boxes[-1, :, 1], volume.min(), np.float32)
    padded[tuple(map(slice, shape))] = volume
    for number, ((d, _), (h, _), (w, _)) in enumerate(boxes.tolist()):
        for part, (row, column) in enumerate([(0, 0), (0, 4), (4, 0), (4, 4)]):
            cube = padded[d : d + 6, h + row : h + row + 4, w + column : w + column + 4]
            window = cube.reshape(2, 3, 4, 4).mean(1) * 0.5 + 0.5  # back to [0, 1]
            pixels = np.stack([(window - 0.5) / 0.5, (window - 0.25) / 0.25, window])
            found = shown.pixels[4 * number + part].numpy()
            np.testing.assert_allclose(found, pixels.ravel(), atol=1e-5)  # the same arithmetic in another order


def test_prompts_are_those_of_the_library(tmp_path: Path) -> None:
    """Qwen3-VL has a time before each temporal patch, as its processor computes them."""
    older, newer = (load(saved(kind, tmp_path / kind)) for kind in KINDS)
    row = newer.reader.ask(newer.reader.show([scan()]), QUESTIONS[:1])["input_ids"][0].tolist()
    times = Qwen3VLProcessor._calculate_timestamps(None, list(range(8)), 2.0, 2)
    pads = "<|vision_start|>" + "<|video_pad|>" * 6 + "<|vision_end|>"
    expected = "".join(f"<{t:.1f} seconds>{pads}" for t in times)
    head = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    tail = QUESTIONS[0] + "<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer().decode(row) == head + expected + tail
    inputs = older.reader.ask(older.reader.show([scan(), scan((2, 8, 8))]), QUESTIONS[:1])
    pads = "".join(f"<|vision_start|>{'<|video_pad|>' * count}<|vision_end|>" for count in (TOKENS, 1))
    assert tokenizer().decode(inputs["input_ids"][0]) == head + pads + tail
    assert inputs["video_grid_thw"].tolist() == [[4, 4, 6], [1, 2, 2]]
    assert inputs["second_per_grid_ts"] == [1.0, 1.0]


def test_without_settings_a_slice_is_a_frame_and_a_second(tmp_path: Path) -> None:
    folder = saved("qwen2_5_vl", tmp_path, None)
    scale = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.25, 0.25, 0.5]}
    (folder / "preprocessor_config.json").write_text(json.dumps(scale))
    reader = load(folder).reader
    assert (reader.token_shape, reader.seconds_per_grid) == ((2, 8, 8), 2.0)
    assert reader.scale == [(2.0, 0.0), (2.0, pytest.approx(0.4)), (1.0, pytest.approx(0.4))]
    (folder / "preprocessor_config.json").unlink()
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": scale}))
    assert load(folder).reader.scale == reader.scale


# --- answers ------------------------------------------------------------------------------------------------


def test_unpruned_answers_are_the_librarys_own(adapter: SlicewiseAdapter) -> None:
    for volumes in ([scan()], [scan(seed=1), scan((4, 8, 16), seed=2)]):
        found = ask(adapter, "none", volumes=volumes)
        assert texts(found) == generated(adapter, plain_inputs(adapter, volumes, QUESTIONS))
        alone = [generated(adapter, plain_inputs(adapter, volumes, [question]))[0] for question in QUESTIONS]
        assert texts(found) == alone
        assert all(answer.kept is not None and answer.kept.all() for answer in found)
    assert texts(ask(adapter, "scheduled")) == texts(ask(adapter, "none"))  # nothing prunes yet


def test_pruned_answers_are_those_of_the_attached_model(adapter: SlicewiseAdapter) -> None:
    adapter.prune_with("medpruner", PRUNED)
    volumes = [scan(seed=1), scan((4, 8, 16), seed=2)]
    found = ask(adapter, "scheduled", volumes=volumes)
    assert adapter.model.medpruner.settings == MedPruner(gamma=0.01, tau=0.5)
    expected = generated(adapter, plain_inputs(adapter, volumes, QUESTIONS))
    kept = adapter.model.medpruner.report.volumes[:2]
    assert texts(found) == expected
    assert texts(found) != texts(ask(adapter, "none", volumes=volumes))
    for answer in found:
        assert answer.kept is not None
        assert answer.kept.tolist() == [flag for volume in kept for flag in volume.tokens.flatten().tolist()]
        assert answer.tokens_before == len(adapter.token_boxes(SHAPE)) + len(adapter.token_boxes((4, 8, 16)))
        assert answer.tokens_after == answer.kept.sum() < answer.tokens_before
        assert 1 <= answer.new_tokens <= 5 and 0 < answer.seconds_first <= answer.seconds_total
    assert texts(ask(adapter, "noisy", volumes=volumes)) == texts(found)
    assert texts(ask(adapter, "evicted", volumes=volumes)) == texts(found)


def test_random_keeps_as_many_of_every_slice_drawn_by_the_question(adapter: SlicewiseAdapter) -> None:
    adapter.prune_with("uniform", {"keep": 0.5})
    answers = ask(adapter, "random")
    kept = [answer.kept.reshape(4, 6) for answer in answers if answer.kept is not None]
    assert [mask.sum(1).tolist() for mask in kept] == [[3, 3, 3, 3]] * 3
    assert not np.array_equal(kept[0], kept[1])
    alone = ask(adapter, "random", QUESTIONS[1:2])[0]
    assert np.array_equal(alone.kept.reshape(4, 6), kept[1]) and alone.text == answers[1].text  # type: ignore[union-attr]
    medpruner.attach(medpruner.detach(adapter.model), Random(keep=0.5, seed=question_seed(0, QUESTIONS[1])))
    assert generated(adapter, plain_inputs(adapter, [scan()], QUESTIONS[1:2])) == [alone.text]
    other = ask(adapter, "random", QUESTIONS[1:2], seed=1)[0]
    assert not np.array_equal(other.kept.reshape(4, 6), kept[1])  # type: ignore[union-attr]


def test_the_tower_runs_once_for_all_questions(adapter: SlicewiseAdapter) -> None:
    patches: list[int] = []
    adapter.model.model.visual.register_forward_pre_hook(lambda _module, args: patches.append(len(args[0])))
    ask(adapter, "none")
    assert patches == [4 * TOKENS]
    adapter.prune_with("medpruner", PRUNED)
    ask(adapter, "scheduled")
    assert patches == [4 * TOKENS, 2 * TOKENS]  # half of the slices repeat the others
    ask(adapter, "random")
    assert patches[2:] == [2 * TOKENS, 4 * TOKENS]  # for the rate, and for all three questions


def test_a_mode_leaves_the_method_in_place(adapter: SlicewiseAdapter) -> None:
    adapter.prune_with("medpruner", PRUNED)
    before = adapter.model.medpruner.settings
    ask(adapter, "none")
    ask(adapter, "random")
    assert adapter.model.medpruner.settings is before
    adapter.prune_with("uniform", {"keep": 0.25})
    assert ask(adapter, "scheduled")[0].tokens_after == TOKENS // 4
    medpruner.detach(adapter.model)


def test_text_goes_on_behind_all_of_a_volume_where_the_model_was_trained_so(tmp_path: Path) -> None:
    """Patches are 3 s apart at 2 positions a second: the volume reaches position 18, its plane 2."""
    settings = SETTINGS | {"seconds_per_grid": 3.0}
    for name, behind in (("plane", 3), ("maximum", 19)):
        adapter = load(saved("qwen2_5_vl", tmp_path / name, settings | {"text_after": name}))
        ids = adapter.reader.ask(adapter.reader.show([scan()]), QUESTIONS[:1])["input_ids"][0].tolist()
        first, end = ids.index(6), ids.index(4)
        with adapter._pruning(MedPruner(gamma=None, tau=1.0), 1, {}) as pruner:
            given = adapter._inputs(adapter.reader.show([scan()]), QUESTIONS[:1])
            positions = pruner.prune(given)[0]["position_ids"][1:, 0]
        assert positions[:, first].tolist() == [first] * 3
        assert positions[:, end - 1].tolist() == [first + 18, first + 1, first + 2]
        assert positions[:, end].tolist() == [first + behind] * 3


# --- what is refused ----------------------------------------------------------------------------------------


def test_methods_and_settings_that_are_not_there(qwen: Path) -> None:
    adapter = load(qwen)
    adapter.prune_with("medpruner", PRUNED)
    for name, values, expected in (
        ("medprune", {}, "pruner 'medprune': unknown"),
        ("medpruner", {"tua": 0.5}, "pruner medpruner: no setting 'tua'"),
        ("medpruner", {"tau": "0.5"}, "pruner medpruner: tau: Input should be a valid number, got '0.5'"),
        ("medpruner", {"clusters": 1}, "pruner medpruner: clusters: Input should be a valid boolean"),
        ("medpruner", {"importance": "max"}, "pruner medpruner: importance: Input should be 'sum' or 'mean'"),
        ("medpruner", {"tau": 1.5}, "pruner medpruner: tau: 1.5, allowed is"),
        ("medpruner", {"layer": 3}, "pruner medpruner: layer: 3, the tower has blocks 0 to 2"),
        ("random", {"keep": True}, "pruner random: keep: Input should be a valid number"),
    ):
        assert expected in refused(lambda name=name, values=values: adapter.prune_with(name, values))
        assert adapter.settings == adapter.model.medpruner.settings == MedPruner(gamma=0.01, tau=0.5)


def test_gamma_in_hu_follows_the_models_window(tmp_path: Path) -> None:
    adapter = load(saved("qwen2_5_vl", tmp_path / "a", SETTINGS | {"pixel_std": [0.5, 0.25, 1.0]}))
    adapter.prune_with("medpruner", {"gamma": 30, "gamma_unit": "hu"})
    assert isinstance(adapter.settings, MedPruner)
    # One HU is 1/500 of [0, 1], and 2, 4 and 1 times that in the channels' pixels.
    assert adapter.settings.threshold == pytest.approx(30 / 500 * (2 + 4 + 1) / 3)
    adapter.prune_with("medpruner", {"gamma": 30, "gamma_unit": "hu", "hu_per_pixel": 100.0})
    assert adapter.settings.threshold == pytest.approx(0.3)
    scaled = load(saved("qwen2_5_vl", tmp_path / "b", volume=VolumeConfig(window_percentile=(0.0, 100.0), shape=SHAPE)))
    message = refused(lambda: scaled.prune_with("medpruner", {"gamma_unit": "hu"}))
    assert message.startswith("pruner medpruner: gamma_unit: hu: ")


def test_folders_that_do_not_fit(qwen: Path) -> None:
    def message() -> str:
        return refused(lambda: load(qwen))

    file = qwen / "slicewise.json"
    for settings, expected in (
        (SETTINGS | {"slices": 2}, "slicewise.json: slices: "),
        (SETTINGS | {"slices_per_frame": "2"}, "slicewise.json: slices_per_frame: "),
        (SETTINGS | {"pixel_std": [0.5]}, "3 numbers in pixel_mean, 1 in pixel_std"),
        (SETTINGS | {"pixel_mean": [0.5], "pixel_std": [0.5]}, "1 numbers for a model of 3 channels"),
    ):
        file.write_text(json.dumps(settings))
        assert expected in message()
    file.unlink()
    assert "neither slicewise.json nor image_mean" in message()
    (qwen / "preprocessor_config.json").write_text("[")
    assert "preprocessor_config.json: damaged" in message()
    file.write_text(json.dumps(SETTINGS))
    weights = load_file(qwen / "model.safetensors")
    name = next(key for key in weights if key.endswith("visual.merger.ln_q.weight"))
    for changed in (
        {key: value for key, value in weights.items() if key != name},
        weights | {"more": torch.zeros(1)},
        weights | {name: torch.zeros(5)},
    ):
        save_file(changed, qwen / "model.safetensors", {"format": "pt"})
        assert "the weights do not fit config.json" in message()
    (qwen / "model.safetensors").write_bytes(b"0")
    assert str(qwen) in message()


def test_only_qwen25_has_two_ways_to_count(tmp_path: Path) -> None:
    folder = saved("qwen3_vl", tmp_path, SETTINGS | {"text_after": "maximum"})
    assert "text_after: maximum is for qwen2_5_vl" in refused(lambda: load(folder))


def test_scans_and_questions_that_cannot_be_asked(qwen: Path) -> None:
    adapter = load(qwen)
    assert "<|video_pad|>" in refused(lambda: ask(adapter, "none", ["What is <|video_pad|>?"]))
    broken = scan()
    broken[0, 0, 0] = np.nan
    assert "nan" in refused(lambda: ask(adapter, "none", volumes=[broken]))
    for volumes in ([scan()[0]], []):
        line = refused(lambda given=volumes: ask(adapter, "none", volumes=given))
        assert "a slice-wise model is asked about one (D, H, W) or several" in line


def test_the_registry_knows_the_kinds() -> None:
    assert all(adapter_class(kind) is SlicewiseAdapter for kind in KINDS)
    assert VOLUME.mean == 0.5
