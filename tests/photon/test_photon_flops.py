"""FLOPs counted from shapes beside those that torch counts while the model runs."""

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from photon.flops import decoder_flops, forward_flops, vision_flops
from photon.processing_photon import VolumeChats

TOLERANCE = 0.09
"""The formula leaves out the text before the volume (12 tokens beside 256 or 512), the scheduler, and what the
kernel computes of the other questions of a volume only to mask it."""


def attention_flops(query: Any, key: Any, value: Any, dropout: float = 0, causal: bool = False, **_: Any) -> int:
    """Two products of queries with keys or values; torch has no count for its CPU kernel. Shapes come in."""
    batch, heads, length, width = query
    return 4 * batch * heads * length * key[2] * width // (2 if causal else 1)


def counted(run: Any) -> int:
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    with FlopCounterMode(display=False, custom_mapping={kernel: attention_flops}) as counter:
        run()
    return counter.get_total_flops()


def conversation(question: str, answer: str) -> list[dict[str, str]]:
    """With an empty system prompt: the template's own would be as long as the question."""
    return [
        {"role": "system", "content": ""},
        {"role": "user", "content": question},
        {"role": "assistant", "content": answer},
    ]


@pytest.mark.parametrize("shape", [(16, 64, 64), (32, 64, 64)])
@pytest.mark.parametrize("keep_rate", [None, 0.25])
@pytest.mark.parametrize("questions", [1, 4])
def test_a_forward_pass(tiny: Any, shape: tuple[int, int, int], keep_rate: float | None, questions: int) -> None:
    model, processor = tiny(scheduling=None if keep_rate is None else {"keep_ratio": keep_rate})
    asked = [conversation("Is there a pleural effusion?", "yes")] * questions
    batch = processor.batch([VolumeChats([torch.rand(shape)], asked)])
    layout = model.layout(*(batch[name] for name in LAYOUT_INPUTS))
    assert layout.prefix_lengths[0] - layout.visual_counts[0] == 12
    text, answer = layout.suffix_lengths[0][0], len(layout.targets) // questions
    found = counted(lambda: model(**batch, reduction="none" if keep_rate is None else "hard"))
    assert forward_flops(model.config, shape, questions, text, answer, keep_rate) == pytest.approx(found, rel=TOLERANCE)


LAYOUT_INPUTS = ("input_ids", "attention_mask", "video_grid_thw", "group_index", "labels")


def test_the_vision_tower_alone(tiny: Any) -> None:
    """One block with windows, one with full attention inside a slab: exact but for norms."""
    model, processor = tiny()
    batch = processor.batch([VolumeChats([torch.rand(16, 64, 64)], [conversation("?", "yes")])])
    grid = batch["video_grid_thw"]
    found = counted(lambda: model.model.visual.encode(batch["pixel_values_videos"], grid))
    patches, slab = len(batch["pixel_values_videos"]), int(grid[0, 1] * grid[0, 2])
    assert vision_flops(model.config, patches, slab) == pytest.approx(found, rel=1e-6)


def test_dropping_saves_upper_layers_and_sharing_saves_encodings(tiny: Any) -> None:
    model, _ = tiny(scheduling={"keep_ratio": 0.25})

    def flops(questions: int, keep_rate: float | None) -> float:
        return forward_flops(model.config, (32, 64, 64), questions, 20, 2, keep_rate)

    assert flops(1, 0.25) < flops(1, 0.5) < flops(1, None)
    assert flops(8, None) < 8 * flops(1, None) / 3
    assert decoder_flops(model.config, 2, 100, 50) == 2 * decoder_flops(model.config, 1, 100, 50)
