"""Photon models without a 3D patch embedding become Qwen2.5-VL: the same logits, the same answers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Qwen2_5_VLForConditionalGeneration

from medpruner.recipes.adapter import SlicewiseAdapter
from mllm3d.config import VolumeConfig
from mllm3d.errors import UserError
from mllm3d.inference.adapter import RawAnswer
from mllm3d.inference.checkpoint import open_checkpoint
from mllm3d.release.convert import convert_from, convert_to
from photon.building import read_model
from photon.recipes.adapter import PhotonAdapter
from photon.slicewise import _seconds
from tests.photon.conftest import turn
from tests.photon.tiny_qwen3 import tiny_qwen3

CPU = torch.device("cpu")
QUESTIONS = ["Is there a pleural effusion?", "Which side is it on?", "How many lesions?"]
VOLUME = VolumeConfig(window_hu=(-200.0, 300.0), mean=0.5, std=0.25)
SLICES = {"temporal_patch_size": 2, "in_channels": 3}
Build = Callable[..., Path]


@pytest.fixture
def saved(tiny: Any, tmp_path: Path) -> Build:
    """A slice-video model, two slices a frame, or what `changes` make of it."""

    def build(name: str = "photon", **changes: Any) -> Path:
        kind = {"vision": SLICES, "scheduling": None, "slices_per_frame": 2, "temporal_step": 1.5}
        return write(tmp_path / name, *tiny(**(kind | changes)))

    return build


def write(folder: Path, model: Any, processor: Any) -> Path:
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    (folder / "preprocessing.json").write_text(VOLUME.model_dump_json())
    return folder


def scan(shape: tuple[int, int, int], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-2, 2, shape).astype(np.float32)


def whole(adapter: Any, volumes: list[np.ndarray]) -> list[RawAnswer]:
    found: list[RawAnswer] = adapter.answer(volumes, QUESTIONS, "none", max_new_tokens=8, seed=0)
    return found


def test_logits_are_those_of_the_library(saved: Build, tmp_path: Path) -> None:
    source = saved()
    out = convert_to("qwen2_5_vl", source, tmp_path / "qwen")
    photon = PhotonAdapter.load(source, CPU, torch.float32)
    qwen, report = Qwen2_5_VLForConditionalGeneration.from_pretrained(out, output_loading_info=True)
    assert not any(report.values())
    volume = scan((8, 24, 32))  # 2 slabs, so that both ways to count on behind a volume agree
    batch = dict(photon.processor([volume], [turn(QUESTIONS[0])]))
    expected = read_model(source).eval()(**batch, reduction="none").logits
    ids = batch["input_ids"]
    kinds = 2 * (ids == qwen.config.video_token_id).int()
    adapter = SlicewiseAdapter.load(out, CPU, torch.float32)
    inputs = adapter.reader.ask(adapter.reader.show([volume]), QUESTIONS[:1])
    assert torch.equal(inputs["input_ids"], ids)
    assert torch.equal(inputs["pixel_values_videos"], batch["pixel_values_videos"])
    with torch.no_grad():
        found = qwen.eval()(**inputs, mm_token_type_ids=kinds).logits
    # The same products in another order, in float32.
    torch.testing.assert_close(found[0, -1], expected.reshape(-1, expected.shape[-1])[-1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("text_after", ["maximum", "plane"])
def test_answers_are_those_of_photon(saved: Build, tmp_path: Path, text_after: str) -> None:
    source = saved(text_after=text_after)
    convert_to("qwen2_5_vl", source, tmp_path / "qwen")
    photon = PhotonAdapter.load(source, CPU, torch.float32)
    qwen = SlicewiseAdapter.load(tmp_path / "qwen", CPU, torch.float32)
    for shapes in ([(16, 8, 16)], [(30, 10, 12), (8, 24, 24)]):  # deep enough to reach past the plane, and odd
        volumes = [scan(shape, seed) for seed, shape in enumerate(shapes)]
        expected, found = whole(photon, volumes), whole(qwen, volumes)
        assert [answer.text for answer in found] == [answer.text for answer in expected]
        assert [answer.tokens_after for answer in found] == [answer.tokens_after for answer in expected]
        assert len({answer.text for answer in found}) > 1
        for shape in shapes:
            assert np.array_equal(qwen.token_boxes(shape), photon.token_boxes(shape))


def test_what_the_folder_holds(saved: Build, tmp_path: Path) -> None:
    out = convert_to("qwen2_5_vl", saved(), tmp_path / "qwen")
    assert json.loads((out / "slicewise.json").read_text()) == {
        "slices_per_frame": 2, "seconds_per_grid": 0.75, "pixel_mean": [0.5] * 3, "pixel_std": [0.25] * 3,
        "text_after": "maximum",
    }  # fmt: skip
    checkpoint = open_checkpoint(out)
    assert (checkpoint.model_type, checkpoint.volume) == ("qwen2_5_vl", VOLUME)
    assert (out / "tokenizer.json").is_file() and (out / "chat_template.jinja").is_file()
    before, after = read_model(tmp_path / "photon").state_dict(), read_model(out).state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize(("step", "rate"), [(1.0, 4), (1.0, 49), (0.7, 25), (4.2, 3), (56, 4), (1.1, 30)])
def test_no_position_is_lost_by_rounding(step: float, rate: float) -> None:
    seconds = json.loads(json.dumps(_seconds(step, rate)))
    assert seconds == pytest.approx(step / rate, rel=1e-12)
    assert [int(t * (seconds * rate)) for t in range(200)] == [int(t * step) for t in range(200)]


def test_models_that_are_no_qwen_are_refused(saved: Build, tmp_path: Path, tokenizer: Any) -> None:
    def message(source: Path) -> str:
        with pytest.raises(UserError) as error:
            convert_to("qwen2_5_vl", source, tmp_path / "out")
        assert not (tmp_path / "out").exists()
        assert "\n" not in str(error.value)
        return str(error.value)

    deep = saved("deep", vision={}, slices_per_frame=1)
    assert "a 3D patch embedding" in message(deep)
    assert "drops tokens itself (scheduling)" in message(saved("dropping", scheduling={"predictor_bias": 0.0}))
    newer = write(tmp_path / "newer", *tiny_qwen3(tokenizer, scheduling=None))
    assert "text_config is of qwen3_vl_text" in message(newer)
    bare = saved("bare")
    (bare / "preprocessing.json").unlink()
    assert "preprocessing.json: missing or damaged" in message(bare)
    qwen = convert_to("qwen2_5_vl", saved("again"), tmp_path / "qwen")
    assert "not a Photon model of ours" in message(qwen)
    with pytest.raises(UserError, match="read as it is"):
        convert_from("qwen2_5_vl", qwen, tmp_path / "out")
