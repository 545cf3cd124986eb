"""Gemma 3 (MedGemma 1.5) behind the framework's inference interface: volumes as images of three windows."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import Gemma3Processor
from transformers.models.gemma3 import Gemma3ImageProcessorPil

from medpruner.recipes.adapter import SlicewiseAdapter
from medpruner.recipes.gemma import ANOTHER
from medpruner.settings import MedPruner
from medpruner.windows import SLICES, WINDOWS, ct_message, shown_slices
from mllm3d.config import VolumeConfig
from mllm3d.errors import UserError
from mllm3d.evaluation.masks import pack_kept
from mllm3d.inference.adapter import RawAnswer
from mllm3d.inference.predictor import Predictor
from tests.medpruner.asking import generated, load, refused, texts
from tests.medpruner.saved_gemma import BEGIN, END, IMAGE, QUESTIONS, SCALE, VOLUME, saved, scan, tokenizer
from tests.medpruner.tiny_gemma import SIDE, TOKENS

PRUNED = {"gamma": 0.01, "tau": 0.5}
PIXELS = 32
"""Side of the tower's images."""
MR = VolumeConfig(window_percentile=(1.0, 99.0), mean=0.5, std=0.25)


@pytest.fixture
def adapter(tmp_path: Path) -> SlicewiseAdapter:
    return load(saved(tmp_path / "model"))


def ask(adapter: SlicewiseAdapter, mode: Any, volumes: Sequence[np.ndarray], count: int = 3) -> list[RawAnswer]:
    return adapter.answer(volumes, QUESTIONS[:count], mode, max_new_tokens=5, seed=0)


def hu_of(volume: np.ndarray) -> np.ndarray:
    low, high = VOLUME.window_hu
    return low + (volume * VOLUME.std + VOLUME.mean) * (high - low)


def colours(volume: np.ndarray) -> np.ndarray:
    """uint8 (D, H, W, 3), as Google's notebook makes them."""
    windows = [(np.clip(hu_of(volume), low, high) - low) / (high - low) for low, high in WINDOWS]
    return np.rint(np.stack(windows, -1).astype(np.float32) * 255).astype(np.uint8)


def processed(volume: np.ndarray, questions: Sequence[str]) -> dict[str, Any]:
    """Inputs by the library's own processor, each row with images of its own."""
    size = {"height": PIXELS, "width": PIXELS}
    images = Gemma3ImageProcessorPil(size=size, **SCALE)
    processor = Gemma3Processor(images, tokenizer(), image_seq_length=TOKENS)
    chats = [[{"role": "user", "content": ct_message(len(volume), question)}] for question in questions]
    prompts = [tokenizer().apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats]
    shown = [list(colours(volume))] * len(questions)
    options = {"padding": True, "add_special_tokens": False}
    return dict(processor(images=shown, text=prompts, return_tensors="pt", **options))


def repeated(adapter: SlicewiseAdapter, volumes: Sequence[np.ndarray], questions: Sequence[str]) -> dict[str, Any]:
    """The reader's inputs, each row with images of its own."""
    inputs = adapter.reader.ask(adapter.reader.show(volumes), questions)
    return inputs | {"pixel_values": inputs["pixel_values"].repeat(len(questions), 1, 1, 1)}


# --- what is shown ------------------------------------------------------------------------------------------


def test_inputs_are_those_of_the_library(adapter: SlicewiseAdapter) -> None:
    found = repeated(adapter, [scan()], QUESTIONS)
    expected = processed(scan(), QUESTIONS)
    assert found.keys() == expected.keys()
    for key in ("input_ids", "attention_mask", "token_type_ids"):
        assert found[key].tolist() == expected[key].tolist()
    # From HU to model units and back is off by less than 1e-3 HU, which moves few voxels to the next of 256 levels.
    off = (found["pixel_values"] - expected["pixel_values"]).abs()
    assert off.max() < 1.01 / 127.5 and (off > 1e-5).float().mean() < 1e-2


def test_a_second_volume_is_announced_and_apart(adapter: SlicewiseAdapter) -> None:
    volumes = [scan((2, 8, 8)), scan((1, 8, 8))]
    inputs = adapter.reader.ask(adapter.reader.show(volumes), ["\n Which? "])
    image = f"\n\n{BEGIN}{IMAGE * TOKENS}{END}\n\n"
    slices = f"SLICE 1:{image}SLICE 2:{image}{ANOTHER}SLICE 1:{image}"
    expected = f"<bos><start_of_turn>user\n{slices}Which?<end_of_turn>\n<start_of_turn>model\n"
    assert tokenizer().decode(inputs["input_ids"][0]) == expected
    adapter.prune_with("medpruner", {"gamma": 100.0, "nucleus": False})
    assert ask(adapter, "scheduled", volumes)[0].tokens_after == 2 * TOKENS  # the first slice of each
    assert adapter.report is not None and len(adapter.report.volumes) == 2 * 3


def test_a_window_by_percentiles_is_shown_in_grey(tmp_path: Path) -> None:
    adapter = load(saved(tmp_path, MR))
    volume = np.random.default_rng(0).uniform(-2, 2, (2, PIXELS, PIXELS)).astype(np.float32)
    shown = adapter.reader.show([volume]).pixels.numpy()
    levels = np.rint((volume * 0.25 + 0.5) * 255)
    for colour in range(3):
        np.testing.assert_allclose(shown[:, colour], levels / 127.5 - 1, atol=1e-5)
    assert len(ask(adapter, "none", [volume])) == 3


def test_pixels_have_the_models_scale(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    plain = load(folder).reader.show([scan()]).pixels
    scale = {"image_mean": [0.5, 0.25, 0.0], "image_std": [0.5, 0.25, 2.0]}
    (folder / "preprocessor_config.json").write_text(json.dumps(scale))
    scaled = load(folder).reader.show([scan()]).pixels
    for colour, (mean, std) in enumerate(zip(*scale.values(), strict=True)):
        unit = plain[:, colour].numpy() / 2 + 0.5
        np.testing.assert_allclose(scaled[:, colour], (unit - mean) / std, atol=1e-5)


# --- boxes --------------------------------------------------------------------------------------------------


def test_a_token_sees_the_voxels_of_its_box(adapter: SlicewiseAdapter) -> None:
    """16 x 64 voxels stretched to 32 x 32 pixels: a token is 4 x 16 voxels."""
    shape = (3, 16, 64)
    boxes = adapter.token_boxes(shape)
    assert boxes.shape == (3 * TOKENS, 3, 2) and boxes[-1].tolist() == [[2, 3], [12, 16], [48, 64]]
    dark = np.full(shape, scan().min(), np.float32)
    side = PIXELS // SIDE
    for token in (0, 6, 25, 47):
        lit = dark.copy()
        lit[tuple(slice(*ends) for ends in boxes[token])] = scan().max()
        images, _ = adapter.reader._cut(adapter.reader.show([lit]).pixels.new_tensor(lit))
        tiles = images.unflatten(2, (SIDE, side)).unflatten(4, (SIDE, side)).mean((1, 3, 5)).flatten()
        assert int(tiles.argmax()) == token
        assert tiles[token] > 2 * (tiles.sort().values[-2] - tiles.min()) + tiles.min()  # neighbours blur a little


def test_slices_that_are_not_shown_have_no_tokens(adapter: SlicewiseAdapter) -> None:
    shape = (100, 10, 9)
    boxes = adapter.token_boxes(shape)
    assert sorted({int(d) for d in boxes[:, 0, 0]}) == shown_slices(100).nonzero()[:, 0].tolist()
    assert len(boxes) == SLICES * TOKENS and (boxes[:, 0, 1] - boxes[:, 0, 0] == 1).all()
    # 10 rows, 2.5 a token; 9 columns, 2.25 a token.
    assert boxes[:TOKENS:SIDE, 1].tolist() == [[0, 3], [2, 5], [5, 8], [7, 10]]
    assert boxes[:SIDE, 2].tolist() == [[0, 3], [2, 5], [4, 7], [6, 9]]
    assert ask(adapter, "none", [scan(shape)], 1)[0].tokens_before == len(boxes)
    assert adapter.token_boxes((5, 2, 2))[:, 1:].min(axis=0).tolist() == [[0, 1], [0, 1]]  # fewer voxels than tokens


def test_kept_tokens_are_evidence(tmp_path: Path) -> None:
    predictor = Predictor.load(saved(tmp_path), "cpu", pruner={"name": "uniform", "keep": 0.5})
    assert isinstance(predictor.adapter, SlicewiseAdapter)
    shape = (4, PIXELS, PIXELS)
    raw = ask(predictor.adapter, "scheduled", [scan()], 1)[0]
    assert raw.kept is not None
    boxes = predictor.boxes([shape])
    assert sorted({int(d) for d in boxes[0][raw.kept][:, 0, 0]}) == [0, 2]
    packed = pack_kept(raw.kept, boxes)
    assert packed is not None and packed.voxels == (1, 8, 8)
    assert [mask.mean() for mask in packed.masks()[0]] == [1, 0, 1, 0]


# --- answers ------------------------------------------------------------------------------------------------


def test_unpruned_answers_are_the_librarys_own(adapter: SlicewiseAdapter) -> None:
    found = ask(adapter, "none", [scan()])
    assert texts(found) == generated(adapter, repeated(adapter, [scan()], QUESTIONS))
    by_hand = processed(scan(), QUESTIONS) | {"pixel_values": adapter.reader.show([scan()]).pixels.repeat(3, 1, 1, 1)}
    assert texts(found) == generated(adapter, by_hand)
    assert all(answer.kept is not None and answer.kept.all() for answer in found)
    assert texts(found) == texts(ask(adapter, "scheduled", [scan()]))  # nothing prunes yet
    assert len({*texts(found), *texts(ask(adapter, "none", [scan(seed=1)]))}) > 1


def test_pruned_answers_are_those_of_the_attached_model(adapter: SlicewiseAdapter) -> None:
    adapter.prune_with("medpruner", PRUNED)
    volumes = [scan(seed=1), scan((2, 16, 64), seed=2)]
    found = ask(adapter, "scheduled", volumes)
    assert adapter.model.medpruner.settings == MedPruner(gamma=0.01, tau=0.5)
    assert texts(found) == generated(adapter, repeated(adapter, volumes, QUESTIONS))
    kept = [volume.tokens for volume in adapter.model.medpruner.report.volumes[:2]]
    assert [tokens.any(1).tolist() for tokens in kept] == [[True, False, True, False], [True, False]]
    assert texts(found) != texts(ask(adapter, "none", volumes))
    for answer in found:
        assert answer.kept is not None
        assert answer.kept.tolist() == [flag for tokens in kept for flag in tokens.flatten().tolist()]
        assert answer.tokens_before == sum(len(adapter.token_boxes(volume.shape)) for volume in volumes)
        assert answer.tokens_after == answer.kept.sum() < answer.tokens_before


def test_the_tower_runs_once_for_all_questions(adapter: SlicewiseAdapter) -> None:
    images: list[int] = []
    adapter.model.model.vision_tower.register_forward_pre_hook(
        lambda _module, _args, kwargs: images.append(len(kwargs["pixel_values"])), with_kwargs=True
    )
    ask(adapter, "none", [scan()])
    assert images == [4]
    adapter.prune_with("medpruner", PRUNED)
    ask(adapter, "scheduled", [scan()])
    ask(adapter, "random", [scan()])
    assert images[1:] == [2, 2, 4]  # half of the slices repeat others; then for the rate, and for all questions


# --- what is refused ----------------------------------------------------------------------------------------


def test_windows_that_leave_out_hu(tmp_path: Path) -> None:
    for window in ((-1000.0, 1024.0), (-1024.0, 1000.0)):
        folder = saved(tmp_path, VolumeConfig(window_hu=window))
        message = refused(lambda folder=folder: load(folder))
        assert "preprocessing.json: window_hu: [" in message and 'write "window_hu": [-1024, 1024]' in message
    assert load(saved(tmp_path, VolumeConfig(window_hu=(-1024.0, 1024.0)))).reader.side == SIDE


def test_gamma_in_hu_has_no_scale(adapter: SlicewiseAdapter) -> None:
    assert "another window" in refused(lambda: adapter.prune_with("medpruner", {"gamma": 30, "gamma_unit": "hu"}))
    adapter.prune_with("medpruner", {"gamma": 30, "gamma_unit": "hu", "hu_per_pixel": 100.0})
    assert isinstance(adapter.settings, MedPruner) and adapter.settings.threshold == pytest.approx(0.3)


def test_folders_that_do_not_fit(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    pixels = {"pixel_mean": [0.5] * 3, "pixel_std": [0.5] * 3}
    for settings, expected in (
        ({"slices_per_frame": 2}, "slicewise.json: slices_per_frame and seconds_per_grid"),
        ({"seconds_per_grid": 1.0}, "slicewise.json: slices_per_frame and seconds_per_grid"),
        ({"text_after": "maximum"}, "text_after: maximum is for qwen2_5_vl, not for gemma3"),
        ({"pixel_mean": [0.5], "pixel_std": [0.5]}, "1 numbers for a model of 3 channels"),
    ):
        (folder / "slicewise.json").write_text(json.dumps(pixels | settings))
        assert expected in refused(lambda: load(folder))
    (folder / "slicewise.json").write_text(json.dumps(pixels))
    config = json.loads((folder / "config.json").read_text())
    for key in ("boi_token_index", "image_token_index", "eoi_token_index"):
        (folder / "config.json").write_text(json.dumps(config | {key: 40}))
        assert "of another model than config.json" in refused(lambda: load(folder))


def test_scans_and_questions_that_cannot_be_asked(adapter: SlicewiseAdapter) -> None:
    with pytest.raises(UserError, match=BEGIN):
        adapter.answer([scan()], [f"What is {BEGIN}?"], "none", 1, 0)
    broken = scan()
    broken[0, 0, 0] = np.inf
    with pytest.raises(UserError, match="infinite"):
        ask(adapter, "none", [broken])
