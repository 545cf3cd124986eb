"""What is read of a tower beside its kernel equals the attention that the tower itself computes."""

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.vision_utils import get_vision_window_index

import medpruner
from medpruner import MedPruner
from medpruner.towers import block_index
from tests.medpruner.tiny_slicewise import prompts, qwen3, qwen25

SIZES = [(2, 8, 8), (2, 4, 8)]


def eager_weights(model: Any, inputs: dict[str, Any], block: int, monkeypatch: Any) -> list[Tensor]:
    """The matrices (heads, M, M) of a block's slices or windows, one after the other."""
    module = importlib.import_module(type(model).__module__)
    given = module.eager_attention_forward
    found: dict[Any, list[Tensor]] = {}

    def recording(attention: Any, *args: Any, **kwargs: Any) -> Any:
        out, weights = given(attention, *args, **kwargs)
        found.setdefault(attention, []).append(weights[0])
        return out, weights

    monkeypatch.setattr(module, "eager_attention_forward", recording)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        model.model.visual(inputs["pixel_values_videos"], grid_thw=inputs["video_grid_thw"])
    return found[model.model.visual.blocks[block].attn]


@pytest.mark.parametrize("block", [0, 2])
@pytest.mark.parametrize("make", [qwen25, qwen3])
def test_readings_equal_the_tower_s_own_attention(make: Any, block: int, monkeypatch: Any) -> None:
    model = make()
    inputs = prompts(model, SIZES)
    medpruner.attach(model, MedPruner(gamma=None, layer=block))
    backbone = model.medpruner.backbone
    wanted = [torch.ones(2, dtype=torch.bool)] * 2
    with torch.no_grad():
        found = backbone.encode(inputs, wanted, [block]).readings[block]
    parts = eager_weights(model, inputs, block, monkeypatch)
    sums = torch.cat([p.double().mean(0).sum(0) for p in parts])
    assert len(sums) == len(inputs["pixel_values_videos"])
    of_tokens = sums.unflatten(0, (-1, 4)).mean(1)
    if make is qwen25:
        visual = model.model.visual
        order, _ = get_vision_window_index(inputs["video_grid_thw"], 2, visual.window_size, visual.patch_size)
        of_tokens = torch.empty_like(of_tokens).scatter(0, order, of_tokens)
    # float32 sums of at most 64 shares.
    torch.testing.assert_close(found.received.double(), of_tokens, rtol=1e-5, atol=1e-5)
    assert found.received.mean().item() == pytest.approx(1, abs=1e-5)
    assert found.keys.shape == (len(of_tokens), 16)


def test_reading_leaves_nothing_behind() -> None:
    model = qwen25()
    medpruner.attach(model, MedPruner(gamma=None))
    with torch.no_grad():
        model(**prompts(model, SIZES))
    medpruner.detach(model)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_blocks_count_from_both_ends() -> None:
    assert (block_index(0, 4, "layer"), block_index(-1, 4, "layer")) == (0, 3)
    for index in (4, -5):
        with pytest.raises(ValueError, match="layer: .*, the tower has blocks 0 to 3"):
            block_index(index, 4, "layer")
