"""Small random Qwen2.5-VL and Qwen3-VL, and prompts with slices as videos and as images."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

START, END, IMAGE, VIDEO, EOS = 3, 4, 5, 6, 1
TEXT = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 4096, "bos_token_id": None, "eos_token_id": EOS,
    "pad_token_id": 0,
}  # fmt: skip
VISION = {
    "patch_size": 4, "temporal_patch_size": 2, "spatial_merge_size": 2, "in_channels": 3, "depth": 3,
    "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 32,
}  # fmt: skip
TOKENS = {
    "image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END,
    "tie_word_embeddings": False,
}  # fmt: skip
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}


def louder(model: torch.nn.Module) -> Any:
    """Larger weights than the initial ones, so that tokens differ and attention is not flat."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(5)
    return model.eval()


def qwen25(seed: int = 0) -> Qwen2_5_VLForConditionalGeneration:
    """Three vision blocks, the first with windows, and three decoder layers."""
    torch.manual_seed(seed)
    vision = {**VISION, "fullatt_block_indexes": [1, 2], "window_size": 16, "tokens_per_second": 2}
    text = {**TEXT, "rope_parameters": MROPE}
    return louder(
        Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision, **TOKENS))
    )


def qwen3(seed: int = 0) -> Qwen3VLForConditionalGeneration:
    """Three vision blocks; the first two also reach the first two decoder layers."""
    torch.manual_seed(seed)
    vision = {**VISION, "deepstack_visual_indexes": [0, 1], "num_position_embeddings": 64}
    text = {**TEXT, "head_dim": 8, "rope_parameters": {**MROPE, "mrope_interleaved": True}}
    return louder(Qwen3VLForConditionalGeneration(Qwen3VLConfig(text_config=text, vision_config=vision, **TOKENS)))


Size = tuple[int, int, int]
"""(t, h, w) in patches."""


def volume_pixels(size: Size, generator: torch.Generator) -> Tensor:
    """Patches of a volume whose every second slice nearly repeats the one before."""
    t, h, w = size
    slices = torch.rand(t, h * w, 3 * 2 * 4 * 4, generator=generator)
    slices[1::2] = slices[:-1:2][: len(slices[1::2])] + 0.001
    return slices.flatten(0, 1)


def prompts(model: Any, sizes: Sequence[Size | Sequence[Size]], kind: str = "video", seed: int = 0) -> dict[str, Any]:
    """Inputs with a row for each of ``sizes`` (several volumes in a row where there are several), padded on the left.

    kind: ``video``, a volume as a video; ``image``, each slice as an image with a label of two tokens before it.
    """
    generator = torch.Generator().manual_seed(seed)
    rows: list[list[int]] = []
    pixels, grids = [], []
    for number, of_row in enumerate(sizes):
        ids = [20 + number, 21]
        for t, h, w in [of_row] if isinstance(of_row[0], int) else of_row:  # type: ignore[list-item]
            tokens = h * w // 4
            pixels.append(volume_pixels((t, h, w), generator))
            if kind == "image":
                grids += [(1, h, w)] * t
                ids += [x for s in range(t) for x in (22, 30 + s % 8, START, *[IMAGE] * tokens, END)]
            elif "Qwen3" in type(model).__name__:
                grids.append((t, h, w))
                ids += [x for s in range(t) for x in (22, 30 + s % 8, START, *[VIDEO] * tokens, END)]
            else:
                grids.append((t, h, w))
                ids += [START, *[VIDEO] * (t * tokens), END]
            ids += [23 + k for k in range(10)] + [24] * 10
        rows.append(ids + [25, 26, 27][: 1 + number])
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    names = ("pixel_values", "image_grid_thw") if kind == "image" else ("pixel_values_videos", "video_grid_thw")
    return {
        "input_ids": ids,
        "attention_mask": (torch.arange(width) >= torch.tensor([[width - len(row)] for row in rows])).long(),
        "mm_token_type_ids": (ids == IMAGE).int() + 2 * (ids == VIDEO).int(),
        names[0]: torch.cat(pixels),
        names[1]: torch.tensor(grids),
    }
