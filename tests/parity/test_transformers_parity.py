"""Without dropping, Photon is the transformers model; positions, logits and generation are compared with it."""

from typing import Any

import pytest
import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from photon.building import read_config, read_model
from photon.packing import rope_positions, volume_grids
from photon.processing_photon import PhotonProcessor, VolumeChats
from tests.photon.conftest import tiny_config, turn


@pytest.fixture
def pair(tokenizer: Any, tmp_path: Any) -> tuple[Qwen2_5_VLForConditionalGeneration, Any, PhotonProcessor]:
    """A random Qwen2.5-VL with its own 2-frame, 3-channel patches, and Photon read from its files."""
    vision = {"temporal_patch_size": 2, "in_channels": 3}
    values = tiny_config(tokenizer, vision=vision).to_dict()
    for name in ("scheduling", "slices_per_frame", "temporal_step", "text_after", "turn_end_token_id", "model_type"):
        values.pop(name, None)
    torch.manual_seed(0)
    qwen = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**values)).eval()
    with torch.no_grad():
        for parameter in qwen.parameters():
            if parameter.ndim == 2:
                parameter.mul_(5)
    qwen.save_pretrained(tmp_path)
    photon = read_model(tmp_path).eval()
    photon.config.text_after = "plane"  # as in the installed library
    photon.config.turn_end_token_id = tokenizer.eos_token_id
    return qwen, photon, PhotonProcessor.from_config(photon.config, tokenizer)


def inputs_for_qwen(batch: dict[str, Any], qwen: Any) -> dict[str, Any]:
    ids = batch["input_ids"]
    return {
        "input_ids": ids,
        "attention_mask": batch["attention_mask"],
        "pixel_values_videos": batch["pixel_values_videos"],
        "video_grid_thw": batch["video_grid_thw"],
        "mm_token_type_ids": (ids == qwen.config.video_token_id).int() * 2,
        "second_per_grid_ts": torch.full((len(batch["video_grid_thw"]),), 2.0),
    }


def test_logits_equal_those_of_transformers(pair: Any) -> None:
    qwen, photon, processor = pair
    torch.manual_seed(1)
    groups = [
        VolumeChats([torch.rand(4, 24, 16)], [turn("Is there a pleural effusion?", "yes")]),
        VolumeChats([torch.rand(6, 16, 16)], [turn("Which side?", "left")]),
    ]
    batch = processor.batch(groups)
    with torch.no_grad():
        expected = qwen(**inputs_for_qwen(batch, qwen)).logits
        found = photon(**batch, reduction="none").logits
    rows, columns = (batch["labels"][:, 1:] != -100).nonzero(as_tuple=True)
    # The same products in another order, in float32.
    torch.testing.assert_close(found, expected[rows, columns], rtol=1e-4, atol=1e-4)


def test_positions_equal_those_of_transformers(pair: Any) -> None:
    qwen, photon, processor = pair
    chats = [turn("Which side?", "left")]
    batch = processor.batch([VolumeChats([torch.rand(4, 24, 16), torch.rand(8, 16, 32)], chats)])
    given = inputs_for_qwen(batch, qwen)
    expected, _ = qwen.model.get_rope_index(
        given["input_ids"],
        given["mm_token_type_ids"],
        video_grid_thw=given["video_grid_thw"],
        second_per_grid_ts=given["second_per_grid_ts"],
        attention_mask=given["attention_mask"],
    )
    grids = volume_grids(batch["video_grid_thw"].tolist(), None, 2)
    config = photon.config
    found = rope_positions(batch["input_ids"][0].tolist(), grids, config.special_tokens, config.geometry)
    assert torch.equal(found, expected[:, 0])


def test_text_goes_on_behind_the_largest_position_on_any_axis(pair: Any) -> None:
    """The rule of the releases that the backbones and the published Photon were trained with, written plainly."""
    _, photon, processor = pair
    config = photon.config
    config.text_after = "maximum"
    batch = processor.batch([VolumeChats([torch.rand(4, 24, 16), torch.rand(24, 16, 32)], [turn("Which side?")])])
    ids, grids = batch["input_ids"][0].tolist(), batch["video_grid_thw"].tolist()
    expected: list[list[int]] = []
    begin, shapes = 0, iter(grids)
    for i, token in enumerate(ids):
        if token != config.video_token_id:
            begin = max(map(max, expected), default=-1) + 1
            expected.append([begin] * 3)
        elif ids[i - 1] != token:
            begin = max(map(max, expected)) + 1
            t, h, w = next(shapes)
            step = 2 * config.vision_config.tokens_per_second  # two slices a slab, one a second
            expected += [
                [begin + step * z, begin + y, begin + x] for z in range(t) for y in range(h // 2) for x in range(w // 2)
            ]
    found = rope_positions(ids, volume_grids(grids, None, 2), config.special_tokens, config.geometry)
    assert found.T.tolist() == expected
    config.text_after = "plane"
    assert (
        rope_positions(ids, volume_grids(grids, None, 2), config.special_tokens, config.geometry)[0, -1] < found[0, -1]
    )


def test_greedy_generation_equals_that_of_transformers(pair: Any) -> None:
    qwen, photon, processor = pair
    batch = processor([torch.rand(4, 24, 16)], [turn("Is there a pleural effusion?")])
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    expected = qwen.generate(**inputs_for_qwen(batch, qwen), **settings)
    assert torch.equal(photon.generate(**batch, reduction="none", **settings), expected)


def test_old_and_new_key_names_load_and_a_missing_weight_is_named(pair: Any, tmp_path: Any) -> None:
    from safetensors.torch import load_file, save_file

    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    name = next(k for k in weights if "visual.blocks.1.mlp.up_proj.weight" in k)
    removed = weights.pop(name)
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(ValueError, match=r"visual\.blocks\.1\.mlp\.up_proj\.weight"):
        read_model(tmp_path)
    old = {
        k.replace("model.visual.", "visual.").replace("model.language_model.", "model."): v for k, v in weights.items()
    }
    old[name.replace("model.visual.", "visual.")] = removed
    save_file(old, path, {"format": "pt"})
    _, photon, _ = pair
    again = read_model(tmp_path).state_dict()
    assert all(torch.equal(v, again[k]) for k, v in photon.state_dict().items())


def test_another_family_is_refused(tmp_path: Any) -> None:
    from transformers import Qwen2Config

    Qwen2Config().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="qwen2"):
        read_config(tmp_path)
