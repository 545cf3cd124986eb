"""Photon's configuration: kept in config.json, sized as the published models, strict about what it is given."""

from pathlib import Path
from typing import Any

import pytest
import torch

from mllm3d.config import VolumeConfig
from photon import PhotonConfig, PhotonForConditionalGeneration
from photon.building import patched_config, planned_config, read_config
from photon.geometry import PatchGeometry
from photon.scheduling import SchedulingSettings
from photon.surrogate import SurrogateSettings
from tests.photon.conftest import tiny_config

QWEN_3B = "Qwen/Qwen2.5-VL-3B-Instruct"


def planned(name: str) -> PhotonConfig:
    config = planned_config(name)
    assert config is not None
    return config


def test_a_config_comes_back_from_json_as_it_was(tokenizer: Any, tmp_path: Path) -> None:
    settings = SchedulingSettings(layers=(2,), keep_ratio=0.4, surrogate=SurrogateSettings(importance="removal"))
    config = tiny_config(tokenizer, scheduling=settings.to_dict(), slices_per_frame=3, temporal_step=1.5)
    config.save_pretrained(tmp_path)
    again = PhotonConfig.from_pretrained(tmp_path)
    assert again.to_json_string() == config.to_json_string()
    assert again.scheduling_settings == settings
    assert again.patches == PatchGeometry((4, 4, 4), 1, 2, slices_per_frame=3)
    assert (again.scheduling_layers, again.geometry.temporal_step) == ((2,), 1.5)
    assert again.special_tokens == config.special_tokens
    assert read_config(tmp_path).to_json_string() == config.to_json_string()


def test_patches_that_are_not_square_come_back_too(tokenizer: Any, tmp_path: Path) -> None:
    patched_config(tiny_config(tokenizer), (6, 8, 10), 1).save_pretrained(tmp_path)
    assert PhotonConfig.from_pretrained(tmp_path).patches.size == (6, 8, 10)


@pytest.mark.parametrize(
    ("preset", "size", "channels", "tokens"),
    [("photon", (14, 14, 14), 1, 1000), ("photon_max", (2, 14, 14), 3, 7000)],
)
def test_visual_tokens_of_the_published_presets(
    preset: Any, size: tuple[int, int, int], channels: int, tokens: int
) -> None:
    shape = VolumeConfig(preset=preset).shape
    assert shape is not None
    assert patched_config(planned(QWEN_3B), size, channels).patches.tokens(shape) == tokens


def test_a_second_is_a_slice_unless_the_config_says_otherwise() -> None:
    """FACTS: a slab of 14 slices lasts 14 s at 2 rotary steps a second."""
    assert patched_config(planned(QWEN_3B), (14, 14, 14), 1).geometry.temporal_step == 28
    assert patched_config(planned(QWEN_3B), (14, 14, 14), 1, temporal_step=1.0).geometry.temporal_step == 1


@pytest.mark.parametrize(("name", "billions"), [(QWEN_3B, 3.75), ("Qwen/Qwen2.5-VL-7B-Instruct", 8.29)])
def test_planned_backbones_have_the_published_number_of_parameters(name: str, billions: float) -> None:
    with torch.device("meta"):
        model = PhotonForConditionalGeneration(planned(name))
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, abs=0.006)
    assert all(p.is_meta for p in model.parameters())


def test_an_unknown_backbone_is_not_planned() -> None:
    assert planned_config("Qwen/Qwen2.5-VL-9000B") is None


@pytest.mark.parametrize(("layers", "expected"), [(36, 9), (28, 7), (4, 1), (3, 1)])
def test_tokens_are_dropped_after_a_quarter_of_the_layers(tokenizer: Any, layers: int, expected: int) -> None:
    config = tiny_config(tokenizer, scheduling={})
    config.text_config.num_hidden_layers = layers
    assert config.scheduling_layers == (expected,)


@pytest.mark.parametrize(
    ("names", "numbers"),
    [(["0"], None), ([0], (0,)), (["n/2"], (18,)), (["3n/4"], (27,)), (["n/4", 20, "3n/4"], (9, 20, 27))],
)
def test_scheduling_layers_are_numbers_or_shares(tokenizer: Any, names: Any, numbers: Any) -> None:
    config = tiny_config(tokenizer, scheduling={"layers": names})
    config.text_config.num_hidden_layers = 36
    if numbers is None:
        with pytest.raises(ValueError, match="'0' is neither a number nor a share"):
            _ = config.scheduling_layers
    else:
        assert config.scheduling_layers == numbers


@pytest.mark.parametrize(
    ("layers", "message"), [([4], "4 is not in 0..3"), ([-1], "-1 is not in"), ([2, 1], "must grow"), ([], "must grow")]
)
def test_scheduling_layers_outside_the_decoder_are_an_error(tokenizer: Any, layers: Any, message: str) -> None:
    with pytest.raises(ValueError, match=rf"scheduling.layers: .*{message}"):
        PhotonForConditionalGeneration(tiny_config(tokenizer, scheduling={"layers": layers}))


def test_an_unknown_scheduling_setting_is_an_error(tokenizer: Any) -> None:
    with pytest.raises(TypeError, match="temprature"):
        PhotonForConditionalGeneration(tiny_config(tokenizer, scheduling={"temprature": 0.1}))
